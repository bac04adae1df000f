"""Watching panes: contacts in the terms of the alarms' memory, and in compiled code all that is done with each pane.

A pane's contacts are entered into the memory (births, beats, uploads, the log), they raise levels, and these are
judged. Panes that follow each other are looked at together until something is found in one, since what is found
changes how the next are judged.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from flowsage.graph.addresses import Internal
from flowsage.graph.build import Contacts
from flowsage.models import analytics as an
from flowsage.models import levels
from flowsage.models.beacon import REGULAR, beats
from flowsage.models.cells import PAST, Memory, Store, by_group
from flowsage.models.crowds import LASTS, crowded
from flowsage.models.episodes import QUIET
from flowsage.models.history_scores import ContactTerms
from flowsage.models.judgement import judge
from flowsage.models.peaks import highest, learn
from flowsage.models.reasons import Log
from flowsage.models.surprise import take
from flowsage.models.uploads import usual

Array = npt.NDArray[Any]
_First = TypeVar("_First")
_Second = TypeVar("_Second")

GRANDFATHERED = 30 * an.MINUTE
"""A beat that was there before this much of the stream, or of its source's life, is how they are."""

THREADED = 1 << 14
"""Contacts of a pane from which a second thread is worth its while."""

_BEACON, _SESSION, _DRIP, _HAUL, _JOINT = (int(a) for a in (an.BEACON, an.SESSION, an.DRIP, an.HAUL, an.JOINT))
_DIRECT = np.isin(np.arange(levels.A), an.SHAPED)
_WIDTH, _BEAT, _LASTING = int(an.WIDTH[an.CONTACT]), int(an.COLUMN[an.BEACON]), int(an.COLUMN[an.SESSION])
CELLS, PASTS, BORN, LARGEST, HOSTS, RECEIVED, BEATS, PEAKS = range(8)
"""What kernels get of the memory: cells and past of each kind of key, births of contacts, pairs and services, largest
excesses by age group, then `OfHosts`, what all of ours send to a host, what beats are told by, and
the most that a host has moved on a service."""

CHANCES, TIMES, BOUNDS = range(3)
"""What they get of `Rules`: by what p is told, [A] of each analytic, and numbers."""

_BEST = by_group("best")


class OfHosts(NamedTuple):
    """Arrays of the table of hosts that kernels take by name, see `cells.FIELDS`."""

    born: Array
    inside: Array
    active: Array
    record: Array
    causes: Array
    excluded: Array
    smallest: Array
    usual: Array
    crowd: Array


@dataclass(frozen=True)
class Rules:
    """By what panes are judged; A analytics, times s, scaled."""

    parameters: tuple[Array, Array, Array]
    """[A, 4] each, see `calibration.tail`."""
    floors: Array
    open: Array
    """[A] which analytics may raise."""
    allowed: float
    block_s: float
    scale: float
    settled: float
    """What beat before it is grandfathered."""
    tau: Array
    """[A], as the next two."""
    span: Array
    fade: Array


@dataclass(frozen=True)
class Found:
    """What a look came to."""

    done: int
    """Panes done so far."""
    found: Array
    """i64[·, 5] of the last of them, whose contacts count from the pane's first; as `judgement.judge` writes it."""
    values: Array
    """f8[·, 4]"""
    sources: Array
    """i64[·] hosts that became active in the block."""
    targets: Array


@dataclass(frozen=True)
class Panes:
    """When each of w panes ends, s, and of whom it is asked what is to be said when it is done: hosts i32[·] from
    of_hosts[k] to of_hosts[k + 1]; whether alarms are ready."""

    now: Array
    hosts: Array
    of_hosts: Array
    ready: bool


class Watch:
    """c contacts of w panes of one block, known to the memory from here on, to be looked at in order (`look`): pane k
    has those from offsets[k] to offsets[k + 1]."""

    def __init__(
        self,
        memory: Memory,
        c: Contacts,
        offsets: Array,
        looked: ContactTerms,
        misplaced: Array,
        *,
        block: int,
        origin_ns: int,
        internal: Internal,
        thread: ThreadPoolExecutor,
    ) -> None:
        n, m = len(c), memory
        self._memory, self._offsets, self._thread, self._block = m, offsets, thread, block
        service, told = np.ascontiguousarray(c.service), np.ascontiguousarray(c.told)
        self._slots, ends = np.empty((6, n), np.int32), np.empty(2 * n, np.int32)
        keys, end_keys, before = np.empty((4, n), np.uint64), np.empty(2 * n, np.uint64), len(m.hosts.table)
        levels.all_keys(c.hosts.hash, c.src, c.dst, service, offsets, end_keys, keys)
        stores = m.hosts, m.services, m.pairs, m.contacts, m.codes
        into, of = (ends, *self._slots[2:]), (end_keys, *keys)

        def find(*which: int) -> None:
            Store.slots_each([stores[k] for k in which], [of[k] for k in which], [into[k] for k in which], block)

        if n < THREADED:
            find(*range(len(stores)))
        else:
            self._both(lambda: find(0, 1, 4), lambda: find(2, 3))
        levels.both_ends(ends, offsets, self._slots)
        self._new = slice(before, len(m.hosts.table))
        if self._new.stop > before:
            m.name_hosts(before, self._slots[:2], c, internal)
        known, counts = np.empty((3, n), np.bool_), np.empty((3, n), np.int32)
        sent, moved = np.empty((2, n), np.int64)
        levels.facts(
            looked.known, looked.pair_known, looked.service_known, c.flows, c.answered, c.failed,
            c.bytes_fwd, c.bytes_rev, known, counts, sent, moved,
        )  # fmt: skip
        shared, surprise, settled, strange = (
            np.ascontiguousarray(v, np.float64) for v in (looked.sources, looked.C_ss, looked.settled, misplaced)
        )
        self._what = service, counts, told, sent, moved, shared, surprise, settled, strange
        first, last = (c.first_ns - origin_ns) / 1e9, (c.last_ns - origin_ns) / 1e9
        self._more = known, c.tries, first, last, np.log1p(c.bytes_fwd / c.flows), c.first_ns, c.last_ns

    def newly_active(self) -> int:
        """Number of hosts that will be active for the first time in the block as sources of these contacts."""
        active = self._memory.hosts.arrays["active"]
        return len(np.unique(self._slots[0][active[self._slots[0], 0] != self._block]))

    def look(self, k: int, panes: Panes, rules: Rules, log: Log, said: Array) -> Found:
        """Look at pane k and at those after it, up to the first in which something is found; said f8[·, 2] of
        `panes.hosts` is written on the way."""
        m, r = self._memory, rules
        h, stores = m.hosts.arrays, (m.hosts, m.services, m.pairs, m.contacts)
        keyed = (
            tuple(s.arrays["cells"].reshape(-1) for s in stores),
            tuple(s.arrays["past"].reshape(-1, PAST) for s in stores),
            (m.contacts.arrays["born"], m.pairs.arrays["born"], m.services.arrays["born"]),
            tuple(h[name] for name in _BEST),
            OfHosts(*(h[name] for name in OfHosts._fields)),
            (h["received"], h["received_past"]),
            (m.contacts.arrays["visits"], m.contacts.arrays["beat"], m.codes.arrays["tally"], h["polled"]),
            (m.codes.arrays["moved"], m.codes.arrays["moved_past"]),
        )  # fmt: skip
        by = (*r.parameters, r.floors, r.open), (r.tau, r.span, r.fade), (r.block_s, r.scale, r.allowed, r.settled)
        logged = log.inc, log.meta, log.at
        active = np.empty((2, len(self._slots[0])), np.int64)
        if self._offsets[k + 1] - self._offsets[k] >= THREADED:
            return self._flood(k, panes, keyed, by, logged, active, said)
        done, sources, targets, found, values = _look(
            k, panes.now, self._offsets, panes.hosts, panes.of_hosts, panes.ready, self._slots, self._what, self._more,
            keyed, by, self._block, logged, active, said,
        )  # fmt: skip
        return Found(int(done), found, values, active[0, :sources].copy(), active[1, :targets].copy())

    def _flood(  # type: ignore[no-untyped-def]
        self, k: int, panes: Panes, keyed, by, log, active: Array, said: Array
    ) -> Found:
        """As `look`, at one pane of many contacts, which has to be all there is: with two threads."""
        n, now, slots = len(self._slots[0]), float(panes.now[k]), self._slots
        assert len(self._offsets) == 2
        known, tries, first, last, size, first_ns, last_ns = self._more
        _, counts, _, _, _, shared, _, _, _ = self._what
        fresh = np.empty((n, 3), np.bool_)
        keyed[HOSTS].born[self._new] = now  # births, before beats ask for them
        (sources, targets, news), strengths = self._both(
            lambda: _register(slots, counts, known, keyed, now, self._block, fresh, active),
            lambda: _strengths(slots, first, last, size, shared, keyed, by),
        )
        pane = _enter(slots, self._what, fresh, tries, first_ns, last_ns, keyed, by, now, news, log)
        mine, theirs = self._both(
            lambda: _weigh(0, 2, slots, pane, strengths, keyed, by, now),
            lambda: _weigh(1, 2, slots, pane, strengths, keyed, by, now),
        )
        learn(slots, keyed[CELLS][1], keyed[PEAKS][0], now)
        found, values = np.concatenate((mine[0], theirs[0])), np.concatenate((mine[1], theirs[1]))
        asked = slice(int(panes.of_hosts[k]), int(panes.of_hosts[k + 1]))
        h = keyed[HOSTS]
        take(panes.hosts[asked], h.smallest, h.usual, now, an.DAY / by[BOUNDS][1], panes.ready, said[asked])
        return Found(k + 1, found, values, active[0, :sources].copy(), active[1, :targets].copy())

    def _both(self, first: Callable[[], _First], second: Callable[[], _Second]) -> tuple[_First, _Second]:
        """Two things that do not depend on each other, at once."""
        other = self._thread.submit(second)
        return first(), other.result()


@numba.njit(cache=True, nogil=True)
def _look(  # type: ignore[no-untyped-def]
    k, nows, offsets, hosts, of_hosts, ready, slots, what, more, keyed, by, block, log, active, said
):
    """See `Watch.look`: (panes done, active sources, active targets, found, values)."""
    service, counts, told, sent, moved, shared, surprise, settled, misplaced = what
    known, tries, first, last, size, first_ns, last_ns = more
    h, day, actives = keyed[HOSTS], an.DAY / by[BOUNDS][1], np.zeros(2, np.int64)
    while True:
        a, b, now = offsets[k], offsets[k + 1], nows[k]
        mine, fresh, some = slots[:, a:b].copy(), np.empty((b - a, 3), np.bool_), np.empty((2, b - a), np.int64)
        number = counts[:, a:b].copy()
        sources, targets, news = _register(mine, number, known[:, a:b].copy(), keyed, now, block, fresh, some)
        active[0, actives[0] : actives[0] + sources] = some[0, :sources]
        active[1, actives[1] : actives[1] + targets] = some[1, :targets]
        actives[0] += sources
        actives[1] += targets
        strengths = _strengths(mine, first[a:b], last[a:b], size[a:b], shared[a:b], keyed, by)
        these = (
            service[a:b], number, told[a:b], sent[a:b], moved[a:b], shared[a:b], surprise[a:b], settled[a:b],
            misplaced[a:b],
        )  # fmt: skip
        pane = _enter(mine, these, fresh, tries[a:b], first_ns[a:b], last_ns[a:b], keyed, by, now, news, log)
        found, values = _weigh(np.int64(0), np.int64(1), mine, pane, strengths, keyed, by, now)
        learn(mine, keyed[CELLS][1], keyed[PEAKS][0], now)
        asked = of_hosts[k], of_hosts[k + 1]
        take(hosts[asked[0] : asked[1]], h.smallest, h.usual, now, day, ready, said[asked[0] : asked[1]])
        k += 1
        if len(found) or k == len(nows):
            return k, actives[0], actives[1], found, values


@numba.njit(cache=True, nogil=True)
def _register(slots, counts, known, keyed, now, block, fresh, active):  # type: ignore[no-untyped-def]
    """`levels.register` of a pane."""
    h = keyed[HOSTS]
    return levels.register(slots, counts[2], known, h.born, keyed[BORN], h.active, now, block, fresh, active)


@numba.njit(cache=True, nogil=True)
def _strengths(slots, first, last, size, shared, keyed, by):  # type: ignore[no-untyped-def]
    """Strength f8[2, c] of the beat and of the session of each contact's key, after the pane's contacts."""
    visits, state, tally, polled = keyed[BEATS]
    born, inside = keyed[HOSTS].born, keyed[HOSTS].inside
    _, scale, _, settled = by[BOUNDS]
    n = len(first)
    strengths, grandfathered, near = np.empty((2, n)), np.empty(n), np.empty(n, np.bool_)
    for i in range(n):
        near[i] = inside[slots[1, i]]
        grandfathered[i] = max(settled, born[slots[0, i]] + GRANDFATHERED / scale)
    beats(
        slots[4], slots[5], slots[0], near, first, last, size, shared, visits, state, tally, polled,
        keyed[BORN][0], grandfathered, scale, strengths[0], strengths[1],
    )  # fmt: skip
    return strengths


@numba.njit(cache=True, nogil=True)
def _enter(slots, what, fresh, tries, first_ns, last_ns, keyed, by, now, news, log):  # type: ignore[no-untyped-def]
    """A pane's contacts into the log and what is sent outside; returns what levels are raised by."""
    service, counts, told, sent, moved, shared, surprise, settled, misplaced = what
    born, inside = keyed[HOSTS].born, keyed[HOSTS].inside
    received, received_past = keyed[RECEIVED]
    tau, span, fade = by[TIMES]
    step, scale, _, _ = by[BOUNDS]
    by_hand, awaited, strange = np.empty(len(tries)), np.empty(len(tries)), np.empty(len(tries))
    crowd = crowded(slots, fresh, misplaced, inside, keyed[HOSTS].crowd, now, LASTS / scale)
    for i in range(len(tries)):
        # Where many come at once, it is the server that does something.
        strange[i] = misplaced[i] / (1.0 + crowd[i])
        # Who is new itself has yet to come to its servers.
        awaited[i] = settled[i] - np.log1p(crowd[i]) if now - born[slots[0, i]] >= an.HOUR / scale else 0.0
        # Who logs in by the clock is a program; whether its beat is a beacon's is asked elsewhere.
        by_hand[i] = 0.0 if keyed[BEATS][1][slots[4, i], REGULAR] > 0.0 else tries[i]
    levels.remember(
        slots, service, counts, told, sent, moved, by_hand, shared, fresh, surprise, awaited, strange, first_ns,
        last_ns,
        inside, now, news, log[0], log[1], log[2],
    )  # fmt: skip
    beyond = usual(
        slots, sent, shared, keyed[CELLS][2], keyed[PASTS][2], inside, born, received, received_past,
        tau[_DRIP], span[_DRIP], step, fade[_DRIP], now,
    )  # fmt: skip
    most = highest(
        slots, moved, keyed[PEAKS][0], keyed[PEAKS][1], inside, tau[_HAUL], span[_HAUL], step, fade[_HAUL], now
    )
    return service, counts, told, sent, moved, by_hand, shared, fresh, surprise, awaited, strange, beyond, most


@numba.njit(cache=True, nogil=True)
def _weigh(part, parts, slots, pane, strengths, keyed, by, now):  # type: ignore[no-untyped-def]
    """Raise the levels of a part of a pane's hosts, and judge them."""
    service, counts, told, sent, moved, tries, shared, fresh, surprise, settled, misplaced, beyond, most = pane
    cells, past, births, best, h, _, _, _ = keyed
    rate, shape, scales, floors, open_ = by[CHANCES]
    tau, span, fade = by[TIMES]
    step, scale, allowed, _ = by[BOUNDS]
    n = len(service)
    touched = np.empty((n * levels.A + n, 3), np.int32)
    raised = levels.raise_levels(
        part, parts, slots, service, counts, told, sent, moved, tries, shared, fresh, surprise, settled, misplaced,
        beyond, most, cells, past, h.born, h.inside, h.record, tau, span, step, an.COLUMN, an.KIND, an.WIDTH,
        an.IS_TARGET, fade, now, touched,
    )  # fmt: skip
    for k, (a, column) in enumerate(((_BEACON, _BEAT), (_SESSION, _LASTING))):
        raised = levels.set_statistic(
            part, parts, slots[0], cells[3], slots[4], strengths[k], a, _WIDTH, column, now, touched, raised
        )
    found, values = np.empty((raised + n, 5), np.int64), np.empty((raised + n, 4))
    count = judge(
        touched, raised, slots, service, cells, past, h.born, births, h.record, rate, shape, scales, floors, tau, span,
        step, an.COLUMN, an.KIND, an.WIDTH, an.FAMILY, an.IS_TARGET, _DIRECT, an.LEARNS, an.LEAST, an.SHARE, _JOINT,
        open_, best, h.causes, h.excluded, h.smallest, fade, now, an.HOUR / scale, an.DAY / scale, QUIET / scale,
        allowed, found, values,
    )  # fmt: skip
    return found[:count], values[:count]
