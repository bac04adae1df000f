"""History: how familiar is what a window shows, given the windows before it (DETECTION.md part 1).

Counted in windows, not in flows, so that a flood teaches nothing; only what is answered earns familiarity. All memory
is keyed by 64-bit hashes in six bounded tables (`key_levels`), read and updated in compiled code window by window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from flowsage.graph import memory
from flowsage.graph.build import Contacts
from flowsage.graph.flows import FlowBatch
from flowsage.models.beat import beat
from flowsage.models.familiarity import Scratch, familiarity
from flowsage.models.history_scores import ContactTerms, Float64, HistoryScores, Outputs, Parts
from flowsage.models.key_levels import ES, LEVEL_NAMES, SS, SVC, E, Level, O, Rows, Run, S, assign_together
from flowsage.models.keys import LATEST, NEVER, Int32, Int64
from flowsage.models.rarity import BUCKETS
from flowsage.models.recall import recall
from flowsage.models.scoring import score
from flowsage.models.terms import TERMS
from flowsage.models.volume import volume
from flowsage.models.weights import CONSTANTS, WEIGHTS, Weights

__all__ = ["ContactTerms", "History", "HistoryConfig", "HistoryScores"]

_CHUNK = 1 << 18
"""Contacts handled at once: bounds the memory of a long run, and changes no result."""
_THREADED = 1 << 14
"""Flows from which a second thread pays."""
_SMALL = 1 << 10
"""Rows of a chunk for which scratch is kept."""


@dataclass(frozen=True, kw_only=True)
class HistoryConfig:
    """How history counts. `undirected` where initiators are unknown: every flow then counts both ways.

    max_keys: keys of each kind remembered at most after a window; beyond it some leave (`KeyTable.evict`), an eighth
    at a time. Five million of every kind are 3.1 GB.
    """

    undirected: bool = False
    max_keys: int = 5_000_000
    weights: Weights = WEIGHTS
    threads: int = 2


class History:
    """Memory of keys, and the scores it gives.

    `score` takes closed windows in order, judges each by what was before it and learns it; how windows are cut into
    calls changes nothing. Not safe for use from several threads at once.
    """

    def __init__(self, config: HistoryConfig | None = None) -> None:
        self.config = config or HistoryConfig()
        self.levels = [Level(level) for level in range(len(LEVEL_NAMES))]
        self.windows = 0
        """Windows learnt so far (E): those in which anything was seen."""
        self.last_window = int(NEVER)
        buckets = int(CONSTANTS.buckets)
        self._pool = np.zeros(3)
        self._loads = np.zeros(3)
        self._peers = np.zeros((2, BUCKETS))
        self._ranks = np.zeros(buckets, np.int64)
        self._tops = np.zeros(buckets + 1, np.int64)
        self._threads: ThreadPoolExecutor | None = None
        self._weights = _weights(self.config.weights)
        self._scratch = Scratch.empty([_SMALL] * len(LEVEL_NAMES))

    @property
    def evicted(self) -> dict[str, int]:
        """Keys forgotten so far, by level."""
        return {name: level.table.evicted for name, level in zip(LEVEL_NAMES, self.levels, strict=True)}

    @property
    def keys(self) -> dict[str, int]:
        """Keys remembered, by level."""
        return {name: len(level.table) for name, level in zip(LEVEL_NAMES, self.levels, strict=True)}

    @property
    def nbytes(self) -> int:
        """Bytes of memory of keys."""
        return sum(level.nbytes for level in self.levels)

    def score(self, flows: FlowBatch, contacts: Contacts, *, terms: bool = True, looked: bool = False) -> HistoryScores:
        """Scores of a run of closed windows, which are then learnt.

        Without `terms`, only the scores are kept, and not what they are made of: that takes a third of the room. With
        `looked`, what `lookup` would have said before each window is told too.
        `contacts` are those of `flows`, which are in time order. Raises ValueError where a window is not later than
        the last one learnt, or where flows and contacts do not belong together.
        """
        self._check(flows, contacts)
        ways = 1 + self.config.undirected
        out = Outputs.empty(len(contacts), len(flows), ways, terms=terms, looked=looked)
        hosts: list[tuple[Int32, Int64, Float64]] = []
        begin = 0
        while begin < len(contacts.windows):
            end = self._chunk_end(contacts, begin, ways)
            of_c = slice(int(contacts.offsets[begin]), int(contacts.offsets[end]))
            of_f = slice(int(contacts.flow_offsets[begin]), int(contacts.flow_offsets[end]))
            run = _run(contacts, ways, begin, end, of_c, of_f)
            whole = end - begin == len(contacts.windows)
            part = out if whole else out.part(of_c, of_f, ways)
            hosts.append(self._chunk(run, flows if whole else flows.take(of_f), part))
            if not whole:
                out.keep(part, of_c, ways)
            self.windows += end - begin
            self.last_window = int(contacts.windows[end - 1])
            self._evict()
            begin = end
        host, window, score = hosts[0] if len(hosts) == 1 else _joined(hosts)
        capped = flows.answered & flows.told
        return HistoryScores(
            known=out.known,
            flow_score=out.flow_score,
            beacon_score=out.beacon_score,
            host=host,
            window=window,
            score=score,
            parts=Parts(ways, contacts.of_flow, capped, flows.failed, out, self.config.weights) if terms else None,
            looked=ContactTerms(*out.looked) if looked else None,
        )

    def _chunk(self, run: Run, flows: FlowBatch, out: Outputs) -> tuple[Int32, Int64, Float64]:
        """Scores of the windows of `run` into `out`; host, window and score of the hosts' windows."""
        levels = self.levels
        rows: list[Rows] = [_NO_ROWS] * len(levels)

        def assign(level: int) -> None:
            rows[level] = levels[level].assign(run)

        def learn_volume(level: int, count: Int64, v: Float64) -> None:
            scratch = memory.empty((int(rows[level].start[-1]), 4), np.float64)
            volume(run, rows[level], levels[level]["volume"], _frozen(count), scratch, v)

        def count() -> None:
            counts, scratch = tuple(level["count"] for level in levels), self._room([int(r.start[-1]) for r in rows])
            familiarity(
                run, self.windows, tuple(rows), counts, (levels[O]["load"], self._loads, self._peers), scratch,
                self._pool, self._ranks, levels[SVC]["rank"],
                self._weights[0], sums, out.terms, out.known, out.looked,
            )  # fmt: skip

        def beats() -> None:
            beat(
                run, _frozen(flows.start_ns), _frozen(flows.bytes_fwd),
                rows[E].slot, rows[ES].slot, rows[O].slot, rows[SVC].slot,
                levels[E]["beat"], levels[ES]["beat"], levels[O]["beat"], levels[SVC]["beat"], self._tops,
                self.config.weights.once, out.llr, out.z, out.zc, out.looked,
            )  # fmt: skip

        size = len(run.src) * run.ways + len(flows)
        small = assign_together(levels, run) if size < _THREADED else None
        if small is not None:
            rows = small
        else:
            self._together(size, *(partial(assign, level) for level in (ES, E, SS, O, S, SVC)))
        sums = memory.empty((len(run.src) * run.ways, 4), np.float64)
        # Of es last: its scratch is large, and so is that of `count`, which will have been given back.
        volumes = ((S, flows.bytes_rev, out.v_rev), (ES, flows.bytes_fwd, out.v_fwd))
        self._together(size, beats, count, *(partial(learn_volume, *each) for each in volumes))
        for level in (SVC, SS, ES, O):  # of many contacts they are large, and not needed any more
            rows[level] = _NO_ROWS
        k, pairs = int(rows[S].start[-1]), int(rows[E].start[-1])
        pair_score, pair_source = memory.empty(pairs, np.float64), memory.empty(pairs, np.int32)
        highest, peers = memory.empty(k, np.float64), memory.empty(k, np.float64)
        host, window, host_score = np.empty(k, np.int32), np.empty(k, np.int64), np.empty(k)
        score(
            run, self.windows, out.known, _frozen(flows.answered), _frozen(flows.told), _frozen(flows.failed),
            rows[S], rows[E], sums, out.v_rev, out.v_fwd, out.llr, out.z, out.zc, self._weights[1],
            pair_score, pair_source, highest, peers, out.flow_score, out.beacon_score, host, window, host_score,
        )  # fmt: skip
        return host, window, host_score

    def lookup(self, contacts: Contacts) -> ContactTerms:
        """What is known of contacts now, as of the last window learnt; nothing is learnt from them."""
        c, lv = len(contacts), self.levels
        numbers = np.empty((len(fields(ContactTerms)), c))
        columns = tuple(_frozen(a) for a in (contacts.src, contacts.dst, contacts.service, contacts.hosts.hash))

        def part(begin: int) -> None:
            recall(  # type: ignore[call-arg]
                *columns, tuple(level.table.entries for level in lv), lv[S]["count"], lv[SS]["count"], lv[E]["count"],
                lv[ES]["count"], lv[O]["count"], lv[O]["beat"], numbers, begin, min(begin + _THREADED, c),
            )  # fmt: skip

        self._together(c, *(partial(part, begin) for begin in range(0, c, _THREADED)))
        return ContactTerms(*numbers)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything learnt, as arrays by name: `restore` continues from it bit for bit."""
        state: dict[str, npt.NDArray[Any]] = {
            "windows": np.array([self.windows, self.last_window], np.int64),
            "undirected": np.array(self.config.undirected),
            "pool": self._pool.copy(),
            "loads": self._loads.copy(),
            "peers": self._peers.copy(),
            "ranks": self._ranks.copy(),
            "tops": self._tops.copy(),
        }
        for level in self.levels:
            state |= level.state()
        return state

    @classmethod
    def restore(cls, state: dict[str, npt.NDArray[Any]], config: HistoryConfig | None = None) -> History:
        """The history that `state` describes. Raises ValueError where `config` counts the other way round.

        Without a `config`, the default one for the state's `undirected`.
        """
        undirected = bool(state["undirected"])
        history = cls(config or HistoryConfig(undirected=undirected))
        if history.config.undirected != undirected:
            raise ValueError(f"the history was learnt with undirected={undirected}; configure it so, or start afresh")
        history.windows, history.last_window = (int(x) for x in state["windows"])
        history._pool, history._loads, history._peers = (state[k].copy() for k in ("pool", "loads", "peers"))
        history._ranks, history._tops = state["ranks"].copy(), state["tops"].copy()
        history.levels = [Level.restore(level, state) for level in range(len(LEVEL_NAMES))]
        return history

    def _check(self, flows: FlowBatch, contacts: Contacts) -> None:
        if len(flows) != len(contacts.of_flow):
            raise ValueError(f"{len(flows)} flows, but contacts of {len(contacts.of_flow)}; give those of the same run")
        if len(contacts.windows) and contacts.windows[0] <= self.last_window:
            raise ValueError(
                f"window {int(contacts.windows[0])} is not later than {self.last_window}, which is learnt already; "
                "hand over closed windows once, in order"
            )

    def _room(self, sizes: list[int]) -> Scratch:
        """Scratch for so many rows: what small chunks share, else their own."""
        return self._scratch if max(sizes) <= _SMALL else Scratch.empty(sizes)

    def _chunk_end(self, contacts: Contacts, begin: int, ways: int) -> int:
        """Windows begin:end that are handled at once: one at a time where keys may have to leave after each."""
        windows, offsets = contacts.windows, contacts.offsets
        if begin + 1 == len(windows):
            return begin + 1
        room = self.config.max_keys - max(len(level.table) for level in self.levels)
        most = int(offsets[begin]) + min(_CHUNK, max(0, room)) // ways
        end = int(np.searchsorted(offsets, most, side="right")) - 1
        return max(begin + 1, min(end, int(np.searchsorted(windows, windows[begin] + LATEST))))

    def _together(self, size: int, *jobs: Callable[[], None]) -> None:
        """Independent jobs, the longest first; two at a time where their size is worth a second thread."""
        if size < _THREADED or self.config.threads < 2:
            for job in jobs:
                job()
            return
        todo = deque(jobs)

        def work() -> None:
            while todo:
                try:
                    job = todo.popleft()
                except IndexError:  # the other one took the last
                    return
                job()

        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="history")
        other = self._threads.submit(work)
        work()
        other.result()

    def _evict(self) -> None:
        limit = self.config.max_keys
        for level in self.levels:
            if len(level.table) > limit:
                level.evict(limit - limit // 8)


_NO_ROWS = Rows(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64))


def _joined(parts: list[tuple[Int32, Int64, Float64]]) -> tuple[Int32, Int64, Float64]:
    """Host, window and score of the host-windows of several chunks."""
    none: tuple[Int32, Int64, Float64] = np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0)
    host, window, score = (np.concatenate(column) for column in zip(none, *parts, strict=True))
    return host, window, score


def _weights(weights: Weights) -> tuple[Float64, Float64]:
    """Weights of a contact's terms [20], and of a flow's own [7]."""
    own = ("V_rev", "V_fwd", "T", "fail", "B_es", "V_log", "beat")
    return np.array([getattr(weights, k, 0.0) for k in TERMS]), np.array([getattr(weights, k) for k in own])


def _run(contacts: Contacts, ways: int, begin: int, end: int, of_c: slice, of_f: slice) -> Run:
    c = contacts
    return Run(
        ways,
        _frozen(c.hosts.hash),
        _frozen(c.src[of_c]),
        _frozen(c.dst[of_c]),
        _frozen(c.service[of_c]),
        _frozen(c.flows[of_c]),
        _frozen(c.answered[of_c]),
        _frozen(c.kept[of_c]),
        _frozen(c.of_flow[of_f]),
        of_c.start,
        _frozen(c.offsets[begin : end + 1] - of_c.start),
        _frozen(c.flow_offsets[begin : end + 1] - of_f.start),
        _frozen(c.windows[begin:end]),
    )


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A view that cannot be written: columns from Arrow cannot, others can, and kernels compile once for both."""
    view = array.view()
    view.flags.writeable = False
    return view
