"""Keyed memory: 64-bit keys to dense slots, bounded by forgetting what came only once or was unseen for longest.

A `KeyTable` is an open-addressing hash table (linear probing, at most 70 % full) of 16-byte entries. It owns no values:
whoever uses it keeps arrays indexed by slot, grows them with `len(table)`, and compacts them with what `evict` returns.
New keys get slots in the order in which they come, so state of new keys is written in sequence. Keys have to be well
mixed (`mix`, or a hash of a name): their lower half, as a share of the table, is where they belong (`home`; Lemire:
Fast random integer generation in an interval, 2019), so a table can be of any size, and a larger one has its keys in
the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from flowsage.graph.prefetch import prefetch

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]

KEY, SLOT = range(2)
"""Words of an entry: the key; and slot + 1 (0: empty, so that fresh zero pages are an empty table), in its upper half
twice the time at which it was last seen, odd once it has been seen at two (`come`). Times are ticks since the table's
origin, of 31 bits."""

LOWER = np.int64(0xFFFF_FFFF)
"""The slot's part of its word."""

FRESH = np.int64(-1 << 32)
"""The other part of an entry that is just made."""

LATEST = (1 << 31) - 2
"""Times are at most this."""

AHEAD = 16
"""How many rows ahead kernels `prefetch`."""

_LINE = 64
_LARGE = 1 << 16
"""Entries of a table from which on it grows in small steps: a table that is half empty costs memory."""

NEVER = np.iinfo(np.int64).min
"""A tick before every tick."""


@numba.njit(cache=True, nogil=True, inline="always")
def mix(a, b):  # type: ignore[no-untyped-def]
    """One well-mixed uint64 of two integers, not commutative: MurmurHash3's 64-bit finaliser over a·odd + b·odd'."""
    h = np.uint64(a) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(b) * np.uint64(0xC2B2AE3D27D4EB4F)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


@numba.njit(cache=True, nogil=True, inline="always")
def home(entries, key):  # type: ignore[no-untyped-def]
    """Index from which on `key`'s entry is looked for. `entries` i64[size, 2], `key` i64."""
    return ((key & LOWER) * entries.shape[0]) >> 32


@numba.njit(cache=True, nogil=True, inline="always")
def position(entries, key):  # type: ignore[no-untyped-def]
    """Index of `key`'s entry, or of the empty entry where it would go."""
    at = home(entries, key)
    while entries[at, SLOT] != 0 and entries[at, KEY] != key:
        at += 1
        if at == entries.shape[0]:
            at = 0
    return at


@numba.njit(cache=True, nogil=True, inline="always")
def come(entries, at, time):  # type: ignore[no-untyped-def]
    """The key of entry `at` is there at `time`: marks it, and tells whether that is new at this time.

    Whoever makes an entry writes `FRESH` into it first.
    """
    word = entries[at, SLOT]
    seen = word >> 32 & LOWER
    if seen >> 1 == time:
        return False
    entries[at, SLOT] = (np.int64(time) << 1 | (seen != LOWER)) << 32 | word & LOWER
    return True


@numba.njit(cache=True, nogil=True)
def _find_or_insert(entries: Int64, keys: Int64, time: int, done: int, count: int, slots: Int32) -> tuple[int, int]:
    """Slots of keys[done:], until the table is full. Returns (keys done, keys in the table)."""
    limit = entries.shape[0] * 7 // 10
    for i in range(done, len(keys)):
        prefetch(entries, home(entries, keys[min(i + AHEAD, len(keys) - 1)]))
        at = position(entries, keys[i])
        if entries[at, SLOT] == 0:
            if count >= limit:
                return i, count
            count += 1
            entries[at, KEY] = keys[i]
            entries[at, SLOT] = FRESH | count
        come(entries, at, time)
        slots[i] = (entries[at, SLOT] & LOWER) - 1
    return len(keys), count


@numba.njit(cache=True, nogil=True)
def _find_or_insert_each(entries, keys, times, counts, slots):  # type: ignore[no-untyped-def]
    """`_find_or_insert` of several tables that all have room; times, counts i64[·]: that of now, and keys, in each."""
    for k in range(len(entries)):
        counts[k] = _find_or_insert(entries[k], keys[k], times[k], 0, counts[k], slots[k])[1]


@numba.njit(cache=True, nogil=True)
def _find(entries: Int64, keys: Int64, slots: Int32) -> None:
    for i in range(len(keys)):
        prefetch(entries, home(entries, keys[min(i + AHEAD, len(keys) - 1)]))
        slots[i] = (entries[position(entries, keys[i]), SLOT] & LOWER) - 1


@numba.njit(cache=True, nogil=True)
def _place(source: Int64, target: Int64) -> None:
    """Every occupied entry of `source` into `target`, which has room."""
    n = source.shape[0]
    for i in range(n):
        prefetch(target, home(target, source[min(i + AHEAD, n - 1), KEY]))
        if source[i, SLOT] != 0:
            at = position(target, source[i, KEY])
            for j in range(2):
                target[at, j] = source[i, j]


def over(count: int, most: int) -> bool:
    """Time to evict? An eighth may gather first: to forget a few costs as much as to forget many."""
    return count > most + most // 8


def _oldest(seen: Int64, count: int) -> Int64:
    """Indices of the `count` lowest of `seen` i64[·], of equals the first."""
    if count == 0:
        return np.empty(0, np.int64)
    cut = np.partition(seen, count - 1)[count - 1]
    before = np.flatnonzero(seen < cut)
    return np.concatenate([before, np.flatnonzero(seen == cut)[: count - len(before)]])


def _size(count: int) -> int:
    """Smallest table for `count` keys."""
    return max(16, -(-count * 10 // 7))


def aligned_zeros(shape: tuple[int, int], kind: npt.DTypeLike) -> npt.NDArray[Any]:
    """As np.zeros, but beginning at a cache line, so that a row of 32 or 64 bytes is one miss and not two."""
    size = shape[0] * shape[1] * np.dtype(kind).itemsize
    memory = np.zeros(size + _LINE, np.uint8)
    begin = -memory.ctypes.data % _LINE
    return memory[begin : begin + size].view(kind).reshape(shape)


def find_or_insert_each(tables: Sequence[KeyTable], keys: Sequence[UInt64], slots: Sequence[Int32], tick: int) -> bool:
    """`find_or_insert` of contiguous keys u64[·] in a table each, in one call, into slots i32[·].

    False, and nothing is done, where a table has no room for all of its keys.
    """
    if any(table.room < len(each) for table, each in zip(tables, keys, strict=True)):
        return False
    counts = np.array([len(table) for table in tables], np.int64)
    times = np.array([table.time(tick) for table in tables], np.int64)
    signed = tuple(each.view(np.int64) for each in keys)
    _find_or_insert_each(tuple(table.entries for table in tables), signed, times, counts, tuple(slots))
    for table, count in zip(tables, counts.tolist(), strict=True):
        table.inserted(count)
    return True


class KeyTable:
    """Keys u64 to slots 0, 1, 2 …, each with the tick at which it was last seen.

    >>> table = KeyTable()
    >>> table.find_or_insert(np.array([70, 80, 70], np.uint64), tick=1)
    array([0, 1, 0], dtype=int32)
    >>> table.find(np.array([80, 90], np.uint64))
    array([ 1, -1], dtype=int32)
    """

    def __init__(self, capacity: int = 0) -> None:
        self.entries: Int64 = aligned_zeros((_size(capacity), 2), np.int64)
        self.evicted = 0
        """Keys forgotten so far."""
        self._count = 0
        self._origin = 0
        """Tick of time 0."""

    def __len__(self) -> int:
        return self._count

    @property
    def room(self) -> int:
        """Keys for which there is room without growing."""
        return int(self.entries.shape[0]) * 7 // 10 - self._count

    @property
    def nbytes(self) -> int:
        """Bytes that the table occupies."""
        return self.entries.nbytes

    def find_or_insert(self, keys: UInt64, tick: int) -> Int32:
        """Slots i32[n] of `keys` u64[n], new ones for new keys; all of them now count as seen at `tick`."""
        signed, slots = np.ascontiguousarray(keys).view(np.int64), np.empty(len(keys), np.int32)
        done, time = 0, self.time(tick)
        while True:
            done, self._count = _find_or_insert(self.entries, signed, time, done, self._count, slots)
            if done == len(keys):
                return slots
            self.grow()

    def time(self, tick: int) -> int:
        """What stands for `tick` in the entries."""
        return max(0, tick - self.origin(tick, tick))

    def origin(self, first: int, last: int) -> int:
        """Tick of time 0, now that ticks `first` to `last` come, no more than `LATEST` apart.

        Of ticks longer ago no more is known than that.
        """
        if not self._count:
            self._origin = first
        past = last - LATEST - self._origin
        if past > 0:
            used = self.entries[:, SLOT] != 0
            word = self.entries[used, SLOT]
            seen = word >> 32 & LOWER
            self.entries[used, SLOT] = np.maximum(seen - 2 * past, seen & 1) << 32 | word & LOWER
            self._origin += past
        return self._origin

    def find(self, keys: UInt64) -> Int32:
        """Slots i32[n] of `keys` u64[n], -1 where there is none."""
        slots = np.empty(len(keys), np.int32)
        _find(self.entries, np.ascontiguousarray(keys).view(np.int64), slots)
        return slots

    def inserted(self, count: int) -> None:
        """A kernel outside has put keys into `entries`, which holds `count` now."""
        self._count = count

    def grow(self, expected: int = 0) -> None:
        """Twice the room, or where that is much a quarter more, or room for `expected` keys if that is more.

        Slots stay.
        """
        size = self.entries.shape[0]
        self._rebuild(self.entries, max(2 * size if size < _LARGE else size + size // 4, _size(expected)))

    def evict(self, max_keys: int) -> Int32 | None:
        """Forget keys beyond `max_keys`, those longest unseen (of equals the oldest), but first what came only once.

        What came at one tick only is left half of the room, then it goes before all that came back: a flood from
        addresses that nobody sees again cannot make us forget the network (Johnson, Shasha: 2Q, VLDB 1994).
        Returns the new slot of each old slot i32[len before], -1 where forgotten; survivors keep their order. None if
        nothing had to go.
        """
        if self._count <= max_keys:
            return None
        used = self.entries[self.entries[:, SLOT] != 0]
        seen, slot = np.empty(self._count, np.int64), (used[:, SLOT] & LOWER) - 1
        seen[slot] = used[:, SLOT] >> 32 & LOWER
        excess = self._count - max_keys
        gone = np.zeros(self._count, np.bool_)
        once = np.flatnonzero(seen & 1 == 0)
        seen >>= 1
        gone[once[_oldest(seen[once], min(excess, max(0, len(once) - max_keys // 2)))]] = True
        left = np.flatnonzero(~gone)
        gone[left[_oldest(seen[left], len(left) - max_keys)]] = True
        remap = np.where(gone, -1, np.cumsum(~gone) - 1).astype(np.int32)
        stays = ~gone[slot]
        kept = used[stays]
        kept[:, SLOT] = kept[:, SLOT] & ~LOWER | remap[slot[stays]] + 1
        self._count, self.evicted = max_keys, self.evicted + excess
        self._rebuild(kept, self.entries.shape[0])
        return remap

    def _rebuild(self, source: Int64, size: int) -> None:
        target = aligned_zeros((size, 2), np.int64)
        _place(source, target)
        self.entries = target

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Keys, when they were seen (as in a `SLOT`, of ticks) [len] in the order of slots, and the number evicted."""
        used = self.entries[self.entries[:, SLOT] != 0]
        used = used[np.argsort(used[:, SLOT] & LOWER)]
        return {
            "keys": used[:, KEY].copy().view(np.uint64),
            "seen": (used[:, SLOT] >> 32 & LOWER) + 2 * self._origin,
            "evicted": np.array(self.evicted, np.int64),
        }

    @classmethod
    def restore(cls, state: dict[str, npt.NDArray[Any]]) -> KeyTable:
        """The table that `state` describes."""
        n = len(state["keys"])
        table = cls(n)
        source = np.zeros((n, 2), np.int64)
        if n:
            table._origin = max(int(state["seen"].min() >> 1), int(state["seen"].max() >> 1) - LATEST)
        source[:, KEY] = state["keys"].view(np.int64)
        source[:, SLOT] = np.maximum(state["seen"] - 2 * table._origin, state["seen"] & 1) << 32 | np.arange(1, n + 1)
        _place(source, table.entries)
        table._count, table.evicted = n, int(state["evicted"])
        return table
