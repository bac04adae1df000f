"""Levels of history: the six kinds of key, their tables, and what is remembered of each key.

Keys (DETECTION.md part 1): s source · svc service · ss (source, service) · e (source, target) · es (source, target,
service) · o (target, service). A *row* is a key that was active in a window, numbered from 0 in order of first contact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from flowsage.graph.prefetch import prefetch
from flowsage.models.keys import (
    FRESH,
    KEY,
    LOWER,
    SLOT,
    Int32,
    Int64,
    KeyTable,
    aligned_zeros,
    come,
    home,
    mix,
    position,
)
from flowsage.models.weights import CONSTANTS

S, SVC, SS, E, ES, O = range(6)  # noqa: E741
LEVEL_NAMES = ("s", "svc", "ss", "e", "es", "o")

# Columns of `count`. Windows are earlier windows in which the key was active (and, where named, kept or answered);
# tokens are (child, window) pairs, `new` those in which the child was new.
S_ALL, S_KEPT, S_X, S_SS, S_SS_NEW, S_E, S_E_NEW = range(7)
SVC_ALL, SVC_X, SVC_ROWS = range(3)
SS_ALL, SS_KEPT, SS_MET, SS_X, SS_ES, SS_ES_NEW = range(6)
ES_ALL, ES_KEPT, ES_ANSWERED = range(3)
O_ANSWERED, O_TOKENS, O_NEW = range(3)

# Columns of `load` (o), `volume` (s and es), `beat` (svc, e, es, o).
O_FLOWS_X, O_SOURCES_X, O_WINDOWS = range(3)
V_WINDOWS, V_MEAN, V_M2 = range(3)
SVC_PAIRS, SVC_REGULAR = range(2)
E_MET, E_LAST, E_VISIT, E_GAPS, E_MEAN, E_M2, E_SUM, E_LLR = range(8)
ES_FLOWS, ES_MEAN, ES_M2, ES_STATE = range(4)  # STATE: twice the bucket of the largest Z, + 1 if regular
O_SOURCES, O_REGULAR = range(2)

_BATCH = 32
_BUCKETS = int(CONSTANTS.buckets)
# Rows are padded to 16, 32 or 64 bytes, so that none crosses a cache line.
# Numbers of windows fit float32 exactly for 31 years; sums do not.
_COLUMNS: tuple[dict[str, tuple[int, type[np.generic]]], ...] = (
    {"count": (8, np.float64), "volume": (4, np.float64)},
    {"count": (3, np.float64), "beat": (2, np.float64), "rank": (_BUCKETS, np.int32)},
    {"count": (8, np.float64)},
    {"count": (1, np.float32), "beat": (8, np.float64)},
    {"count": (4, np.float32), "beat": (4, np.float64), "volume": (4, np.float64)},
    {"count": (4, np.float64), "load": (4, np.float64), "beat": (2, np.float64)},
)


class Run(NamedTuple):
    """What the kernels see of a chunk of consecutive windows: w windows, c contacts, n flows.

    With `ways` 2 (undirected) every contact and every flow counts both ways, (s, t) then (t, s): *directed contact* v
    belongs to contact v // ways, and is turned round where v is odd.
    """

    ways: int
    hash: npt.NDArray[np.uint64]
    src: Int32
    dst: Int32
    service: Int32
    flows: Int32
    answered: Int32
    kept: npt.NDArray[np.bool_]
    of_flow: Int32
    """[n] index into the run that the chunk is cut from; subtract `first`."""
    first: int
    offsets: Int64
    """[w + 1] of contacts, from 0."""
    flow_offsets: Int64
    windows: Int64


class Rows(NamedTuple):
    """A level's view of a chunk of v directed contacts."""

    slot: Int32
    """[v]"""
    row: Int32
    """[v] within the window."""
    row_slot: Int32
    """[≤ v] rows of all windows, one after the other."""
    start: Int64
    """[w + 1] where each window's rows begin in `row_slot`."""


@numba.njit(cache=True, nogil=True, inline="always")
def level_key(level, s, t, service):  # type: ignore[no-untyped-def]
    """Key i64 of a level for source and target hashes and a service code."""
    if level == 0:
        return np.int64(s)
    if level == 1:
        return np.int64(mix(service, 1))
    if level == 2:
        return np.int64(mix(s, service))
    if level == 3:
        return np.int64(mix(s, t))
    if level == 4:
        return np.int64(mix(mix(s, t), service))
    return np.int64(mix(t, service))


@numba.njit(cache=True, nogil=True)
def _assign(level, entries, row_of, origin, run, rows, done, window, total, count):  # type: ignore[no-untyped-def]
    """Slots and rows of the directed contacts from `done` on, until the table is full.

    row_of i32[·]: row of each slot in the window in which it was last seen; origin: of the table. Returns
    (directed contacts done, window, rows so far, keys in the table): where to go on with a larger table.
    """
    limit = entries.shape[0] * 7 // 10
    ways = run.ways
    keys = np.empty(_BATCH, np.int64)
    for w in range(window, len(run.windows)):
        time = run.windows[w] - origin
        begin = run.offsets[w] * ways
        end = run.offsets[w + 1] * ways
        if done <= begin:
            rows.start[w] = total
        else:
            begin = done
        for batch in range(begin, end, _BATCH):
            stop = min(batch + _BATCH, end)
            for v in range(batch, stop):
                c = v // ways
                a = run.hash[run.src[c]]
                b = run.hash[run.dst[c]]
                if v - c * ways:
                    a, b = b, a
                keys[v - batch] = level_key(level, a, b, run.service[c])
                prefetch(entries, home(entries, keys[v - batch]))
            for v in range(batch, stop):
                key = keys[v - batch]
                at = position(entries, key)
                if entries[at, SLOT] == 0:
                    if count >= limit:
                        return v, w, total, count
                    count += 1
                    entries[at, KEY] = key
                    entries[at, SLOT] = FRESH | count
                slot = np.int32((entries[at, SLOT] & LOWER) - 1)
                if come(entries, at, time):
                    row_of[slot] = total - rows.start[w]
                    rows.row_slot[total] = slot
                    total += 1
                rows.slot[v] = slot
                rows.row[v] = row_of[slot]
    rows.start[len(run.windows)] = total
    return len(rows.slot), len(run.windows), total, count


@numba.njit(cache=True, nogil=True)
def _assign_each(entries, row_of, origins, run, rows, counts):  # type: ignore[no-untyped-def]
    """`_assign` of every level, where all tables have room; counts i64[6] keys in each."""
    for level in range(len(entries)):
        counts[level] = _assign(
            level, entries[level], row_of[level], origins[level], run, rows[level], 0, 0, 0, counts[level]
        )[3]


def assign_together(levels: Sequence[Level], run: Run) -> list[Rows] | None:
    """Rows of a chunk at every level, in one call for small chunks; None where a table has no room for so many."""
    v, w = len(run.src) * run.ways, len(run.windows)
    if any(level.table.room < v for level in levels):
        return None
    entries, row_of = tuple(level.table.entries for level in levels), tuple(level.row_of() for level in levels)
    origins = np.array([level.origin(run) for level in levels], np.int64)
    numbers, start = np.empty((len(levels), 3, v), np.int32), np.empty((len(levels), w + 1), np.int64)
    rows = tuple(Rows(slot, row, row_slot, begin) for (slot, row, row_slot), begin in zip(numbers, start, strict=True))
    counts = np.array([len(level.table) for level in levels], np.int64)
    _assign_each(entries, row_of, origins, run, rows, counts)
    for level, count in zip(levels, counts.tolist(), strict=True):
        level.learnt(count)
    return list(rows)


class Level:
    """One kind of key: its table, and arrays of what is remembered, by slot."""

    def __init__(self, level: int) -> None:
        self.level = level
        self.table = KeyTable()
        self.arrays = {name: aligned_zeros((16, width), kind) for name, (width, kind) in _COLUMNS[level].items()}
        self._row_of = np.empty(0, np.int32)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.arrays[name]

    def assign(self, run: Run) -> Rows:
        """Rows of a chunk; keys that are new get slots, and zeros for memory."""
        v = len(run.src) * run.ways
        rows = Rows(
            np.empty(v, np.int32),
            np.empty(v, np.int32),
            np.empty(v, np.int32),
            np.empty(len(run.windows) + 1, np.int64),
        )
        done = window = total = 0
        before, origin = len(self.table), self.origin(run)
        while True:
            done, window, total, count = _assign(
                self.level, self.table.entries, self.row_of(), origin, run, rows, done, window, total, len(self.table)
            )
            self.table.inserted(count)
            if done == v:
                break
            # If as many contacts are new as so far, but fewer and fewer are: no more than half as many again at once.
            expected = count + int((v - done) * (count - before) / max(done, 1))
            self.table.grow(min(expected, count + count // 2))
        self._reserve(len(self.table))
        return rows

    def origin(self, run: Run) -> int:
        """Of the table, for the windows of a chunk."""
        return self.table.origin(int(run.windows[0]), int(run.windows[-1])) if len(run.windows) else 0

    def row_of(self) -> Int32:
        """Room for the row of every slot that the table has room for; what is not used takes no memory."""
        room, held = len(self.table) + self.table.room, self._row_of
        if len(held) < room:
            self._row_of = np.empty(room, np.int32)
            self._row_of[: min(len(held), len(self.table))] = held[: len(self.table)]
        return self._row_of

    def learnt(self, count: int) -> None:
        """The table holds `count` keys now."""
        self.table.inserted(count)
        self._reserve(count)

    def _reserve(self, count: int) -> None:
        for name, old in self.arrays.items():
            if len(old) < count:
                wider = aligned_zeros((max(count, 2 * len(old)), old.shape[1]), old.dtype)
                wider[: len(old)] = old
                self.arrays[name] = wider

    def evict(self, max_keys: int) -> Int32 | None:
        """As KeyTable.evict, the memory compacted along."""
        before = len(self.table)
        remap = self.table.evict(max_keys)
        if remap is not None:
            kept = np.flatnonzero(remap >= 0)
            for name, old in self.arrays.items():
                array = aligned_zeros((old.shape[0], old.shape[1]), old.dtype)
                array[: len(kept)] = old[:before][kept]
                self.arrays[name] = array
        return remap

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The table's state, and every array [len(table), …], under the level's name."""
        name, n = LEVEL_NAMES[self.level], len(self.table)
        state = {f"{name}.{k}": v for k, v in self.table.state().items()}
        return state | {f"{name}.{k}": v[:n].copy() for k, v in self.arrays.items()}

    @classmethod
    def restore(cls, level: int, state: dict[str, npt.NDArray[Any]]) -> Level:
        """The level that `state` describes."""
        made, prefix = cls(level), f"{LEVEL_NAMES[level]}."
        made.table = KeyTable.restore({k: state[prefix + k] for k in ("keys", "seen", "evicted")})
        made._reserve(len(made.table))
        for name, array in made.arrays.items():
            array[: len(made.table)] = state[prefix + name]
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of the table and the arrays."""
        return self.table.nbytes + self._row_of.nbytes + sum(a.nbytes for a in self.arrays.values())
