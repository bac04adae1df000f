"""Which first meetings are asked about, and the answers: bounded work however many there are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numba
import numpy as np

from flowsage.graph.build import Contacts
from flowsage.models.columns import Bool, Float32, Float64, Int32, Int64, UInt64
from flowsage.models.memory import MeetingMemory
from flowsage.models.network import Network, View
from flowsage.models.plausibility import AMONG, ANSWERS, GAINED, KNOWN, LISTED, LOG_GRAPH, LOG_POPULAR, TAIL, ask
from flowsage.models.popularity import keys_of

DRAWN = 512
"""Draws from all hosts, where not all hosts are candidates."""

_TARGETS, _MEETINGS = 512, 1 << 15
"""About how many targets of one (source, service) are asked about, and how many meetings of a window."""

_NONE: Int64 = np.empty(0, np.int64)

_EXAMINED = 1 << 15
"""Most (source, service) of a window among which those to ask are chosen."""


@dataclass(frozen=True)
class Answers:
    """The first meetings of some contacts: q of them, at positions `contact` i64[q], and what was found of each.

    source, target i32[q]: host slots as of before the window, -1 for a host never seen; the rest f64[q] as
    `plausibility.ask` writes it, NaN where it was not asked.
    """

    contact: Int64
    source: Int32
    target: Int32
    source_hash: UInt64
    target_hash: UInt64
    service: Int32
    tail: Float64
    log_graph: Float64
    log_popular: Float64
    among: Float64
    known: Float64
    gained: Float64


_SLOTS, _HASHES = np.empty(0, np.int32), np.empty(0, np.uint64)
_NOBODY = Answers(_NONE, _SLOTS, _SLOTS, _HASHES, _HASHES, _SLOTS, *np.empty((ANSWERS, 0)))


@dataclass(frozen=True)
class Everybody:
    """q_all f32[h] of the hosts, and draws from it i32[m], none where all hosts are candidates."""

    anywhere: Float32
    shared: Int32

    @classmethod
    def of(cls, memory: MeetingMemory, exact: int) -> Everybody:
        """As the memory is now; more hosts than `exact` are drawn from."""
        hosts, anywhere = len(memory.hosts), memory.popularity.anywhere(memory.hosts.received())
        return cls(anywhere, np.empty(0, np.int32) if hosts <= exact else draw(anywhere, DRAWN, hosts))


@dataclass(frozen=True)
class Candidates:
    """The answers that were possible to one question: n host slots, what each stands for, and how likely it is."""

    host: Int32
    copies: Float64
    density: Float64


def first_meetings(memory: MeetingMemory, contacts: Contacts, first: Bool) -> Answers:
    """The contacts that `first` bool[c] marks, but for hosts that meet themselves; nothing asked yet."""
    at = np.flatnonzero(first & (contacts.src != contacts.dst)) if first.any() else _NONE
    if not len(at):
        return _NOBODY
    source_hash, target_hash = contacts.hosts.hash[contacts.src[at]], contacts.hosts.hash[contacts.dst[at]]
    blank = np.full((ANSWERS, len(at)), np.nan)
    hosts = memory.hosts
    return Answers(
        at, hosts.find(source_hash), hosts.find(target_hash), source_hash, target_hash, contacts.service[at], *blank
    )


def answer(
    memory: MeetingMemory,
    network: Network,
    view: View,
    met: Answers,
    everybody: Everybody,
    *,
    trust: tuple[float, float],
    comparisons: int,
    per_source: int,
) -> Candidates:
    """Fill in the answers of as many of `met` as the bounds allow, in place; trust: w of all, and of our own hosts.

    Asked are (source, service) with all their targets: of each source at most `per_source`, its best-known services
    first; of the window as many as make `comparisons` with candidates, every source's first before any source's second.
    Returns the candidates of the last (source, service).
    """
    hosts = len(memory.hosts)
    most = LISTED + DRAWN + 1 if len(everybody.shared) else hosts
    capacity = max(hosts, 2 * LISTED + DRAWN + 2)
    scratch = np.empty(capacity, np.int32), np.empty(capacity), np.empty(capacity)
    if not len(met.contact) or not hosts:
        return Candidates(scratch[0][:0], scratch[1][:0], scratch[2][:0])
    keys = keys_of(met.service, met.source_hash)
    group, example = np.empty(len(keys), np.int32), np.empty(len(keys), np.int64)
    groups = _group(keys, group, example)
    example, popularity = example[:groups], memory.popularity
    service = popularity.find(met.service[example])
    chosen = _choose(met, example, service, popularity.service["total"], max(1, comparisons // most), per_source)
    chosen = chosen[np.argsort(service[chosen], kind="stable")]
    rank = np.full(groups, -1, np.int32)
    rank[chosen] = np.arange(len(chosen), dtype=np.int32)
    asked = _thin(met, np.flatnonzero(rank[group] >= 0), group)
    begin, order = np.zeros(len(chosen) + 1, np.int64), np.empty(len(asked), np.int64)
    _deal(asked, group, rank, begin, order)
    asked, example = order, example[chosen]
    source, code = met.source[example], met.service[example]
    towers, stranger = network.sources(view, source, code)
    answers = np.empty((len(asked), ANSWERS))
    candidate, density, copies = scratch
    replay, services, offers = memory.replay, popularity.service, popularity.offer
    used = ask(
        source, service[chosen], memory.links(keys[example]), begin, met.target[asked],
        replay.ring, replay.prev, replay.newest, services["head"], offers["next"], offers["target"], offers["weight"],
        services["total"], services["fresh"], everybody.anywhere, everybody.shared, towers,
        view.peers.numpy()[1 : hosts + 1], stranger, popularity.fresh_share, trust[0],
        memory.hosts.columns["internal"][:hosts], trust[1], answers, candidate, density, copies,
    )  # fmt: skip
    columns = {
        TAIL: met.tail, LOG_GRAPH: met.log_graph, LOG_POPULAR: met.log_popular,
        AMONG: met.among, KNOWN: met.known, GAINED: met.gained,
    }  # fmt: skip
    for column, values in columns.items():
        values[asked] = answers[:, column]
    return Candidates(candidate[:used], copies[:used], density[:used])


@numba.njit(cache=True, nogil=True)
def _group(keys, group, example):  # type: ignore[no-untyped-def]
    """Number equal `keys` u64[n] in order of appearance: group i32[n], example i64[g] the first of each. Returns g."""
    size = 2
    while size < 2 * len(keys):
        size *= 2
    table, count = np.full(size, -1, np.int32), 0
    for i in range(len(keys)):
        at = np.int64(keys[i] & np.uint64(size - 1))
        while table[at] >= 0 and keys[example[table[at]]] != keys[i]:
            at = (at + 1) & (size - 1)
        if table[at] < 0:
            table[at], example[count] = count, i
            count += 1
        group[i] = table[at]
    return count


@numba.njit(cache=True, nogil=True)
def _deal(asked, group, rank, begin, order):  # type: ignore[no-untyped-def]
    """Order `asked` i64[q] stably by the rank of its group; begin i64[r + 1] (zeros) says where each rank begins."""
    for i in range(len(asked)):
        begin[rank[group[asked[i]]] + 1] += 1
    for r in range(1, len(begin)):
        begin[r] += begin[r - 1]
    at = begin[:-1].copy()
    for i in range(len(asked)):
        r = rank[group[asked[i]]]
        order[at[r]] = asked[i]
        at[r] += 1


def _choose(met: Answers, example: Int64, service: Int32, totals: Float32, most: int, per_source: int) -> Int64:
    """Groups to ask, i64[<= most]."""
    groups = np.arange(len(example))
    if len(groups) <= min(most, per_source):
        return groups
    source = met.source_hash[example]
    tie = keys_of(met.service[example], source)
    if len(groups) > _EXAMINED:
        groups = np.sort(np.argpartition(tie, _EXAMINED)[:_EXAMINED])
    known = np.where(service >= 0, totals[service], -1.0)
    groups = groups[np.lexsort((tie[groups], -known[groups], source[groups]))]
    _, begin, count = np.unique(source[groups], return_index=True, return_counts=True)
    turn = np.arange(len(groups)) - np.repeat(begin, count)
    within = turn < per_source
    groups, turn = groups[within], turn[within]
    if len(groups) > most:
        groups = groups[np.lexsort((tie[groups], turn))[:most]]
    chosen: Int64 = np.sort(groups)
    return chosen


def _thin(met: Answers, asked: Int64, group: Int32) -> Int64:
    """A bounded part of the meetings `asked`, by hash: about `_TARGETS` of a (source, service), `_MEETINGS` of all."""
    if len(asked) <= _TARGETS:
        return asked
    count = np.bincount(group[asked])
    share = np.minimum(1.0, _TARGETS / np.maximum(count, 1))
    left = float((count * share).sum())
    share *= min(1.0, _MEETINGS / left)
    chance = keys_of(met.service[asked], met.target_hash[asked]) * 2.0**-64
    thinned: Int64 = asked[chance < share[group[asked]]]
    return thinned


@lru_cache(maxsize=4)
def _uniform(count: int, seed: int) -> tuple[Float64, Int64]:
    """`count` random numbers from 0 to 1, ascending, and where each of them stood."""
    drawn = np.random.default_rng(seed).random(count)
    order = np.argsort(drawn)
    return drawn[order], order


def draw(chance: Float32, count: int, seed: int) -> Int32:
    """`count` host slots with replacement, in proportion to chance f32[h]."""
    slots = np.empty(count, np.int32)
    _draw(chance, *_uniform(count, seed), slots)
    return slots


@numba.njit(cache=True, nogil=True)
def _draw(chance, ascending, order, slots):  # type: ignore[no-untyped-def]
    """The slot below which the sum of chances, as a share of all, first exceeds each of `ascending` f64[m]."""
    total, passed = 0.0, np.empty(len(chance))
    for h in range(len(chance)):
        total += np.float64(chance[h])
        passed[h] = total
    at = 0
    for j in range(len(ascending)):
        limit = ascending[j] * total
        while passed[at] <= limit and at < len(chance) - 1:
            at += 1
        slots[order[j]] = at
