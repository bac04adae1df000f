"""Arrays of state that belong to the slots of a `KeyTable`: they grow with it and are compacted with it."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_MOVED = 1 << 14
"""Rows that are moved at once when slots are compacted."""


def _room(count: int) -> int:
    """Rows that are held for `count` slots."""
    held = 16
    while held < count:
        held *= 2
    return held


class Columns:
    """Named arrays [capacity, …], filled with a value of their own where nothing was written.

    `fields` gives (dtype, shape of a row, fill). Arrays are read and written in place; they are replaced when they
    grow. They are as long as what room was asked for; what is held beyond that is not written, and takes no memory.
    """

    def __init__(self, **fields: tuple[Any, tuple[int, ...], float]) -> None:
        self._fields, self._filled = fields, 16
        self._arrays: dict[str, Array] = {
            n: np.full((16, *row), fill, dtype) for n, (dtype, row, fill) in fields.items()
        }

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name][: self._filled]

    def ensure(self, count: int) -> None:
        """Room for `count` slots."""
        if count <= self._filled:
            return
        held = max(len(next(iter(self._arrays.values()))), _room(count))
        for name, (dtype, row, fill) in self._fields.items():
            if held > len(self._arrays[name]):
                grown = np.empty((held, *row), dtype)
                grown[: self._filled] = self[name]
                self._arrays[name] = grown
            self._arrays[name][self._filled : count] = fill
        self._filled = count

    def compact(self, remap: Int32) -> None:
        """Keep the slots that `remap` i32[old slots] sends somewhere, in order (as `KeyTable.evict` gives it)."""
        kept = np.flatnonzero(remap >= 0)
        size = _room(len(kept))
        for name, (_, _, fill) in self._fields.items():
            array = self[name]
            if size < len(array):  # what was a flood is given back
                self._arrays[name] = np.empty((size, *array.shape[1:]), array.dtype)
            # A piece at a time, in place: no row comes from before its place.
            for begin in range(0, len(kept), _MOVED):
                rows = kept[begin : begin + _MOVED]
                self._arrays[name][begin : begin + len(rows)] = array[rows]
            self._arrays[name][len(kept) : self._filled] = fill
        self._filled = min(self._filled, len(next(iter(self._arrays.values()))))

    def state(self, prefix: str, count: int) -> dict[str, Array]:
        """Copies of the first `count` rows of every array, named `prefix.name`."""
        return {f"{prefix}.{name}": array[:count].copy() for name, array in self._arrays.items()}

    def restore(self, prefix: str, state: dict[str, Array]) -> None:
        """What `state` gave."""
        for name in self._fields:
            saved = state[f"{prefix}.{name}"]
            self.ensure(len(saved))
            self._arrays[name][: len(saved)] = saved


def follow(slots: Int32, remap: Int32) -> None:
    """Rewrite `slots` (-1: none) in place to where `remap` sent them. More than one dimension has to be contiguous."""
    _follow(slots.reshape(-1), remap)


@numba.njit(cache=True, nogil=True)
def _follow(slots: Int32, remap: Int32) -> None:
    for i in range(len(slots)):
        if slots[i] >= 0:
            slots[i] = remap[slots[i]]
