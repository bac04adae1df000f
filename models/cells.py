"""Cells: the arrays behind the levels, by slots of keyed memory; they grow, forget and are saved together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flowsage.graph.addresses import Internal, some_inside
from flowsage.graph.build import Contacts
from flowsage.models import beacon
from flowsage.models.analytics import CONTACT, FAMILIES, HOST, PAIR, SERVICE, TABLE, WIDTH
from flowsage.models.keys import KeyTable, find_or_insert_each, over
from flowsage.models.prior import GROUPS
from flowsage.models.records import CELL

Array = npt.NDArray[Any]

PAST = 3
"""Columns of a cell's past, see `records`."""

_PIECE = 1 << 21
"""Bytes looked at at once for whether they are all nought: a huge page."""

_A, _F = len(TABLE), len(FAMILIES)
Field = tuple[tuple[int, ...], npt.DTypeLike, Any]


def _cells(kind: int) -> dict[str, Field]:
    width = int(WIDTH[kind])
    return {"cells": ((width,), CELL, 0.0), "past": ((width, PAST), "f8", 0.0)}


def by_group(name: str) -> tuple[str, ...]:
    """Names of the fields that hold `name` for each age group: most hosts are in one of them, the others stay empty."""
    return tuple(f"{name}_{g}" for g in range(len(GROUPS)))


FIELDS: dict[str, dict[str, Field]] = {
    "hosts": {
        **_cells(HOST),
        "received": ((), CELL, 0.0),
        "received_past": ((PAST,), "f8", 0.0),
        "born": ((), "f8", -1.0),
        "inside": ((), "?", False),
        "name": ((), np.dtypes.StringDType(), ""),
        "record": ((_A,), "f8", 0.0),
        "active": ((2,), "i8", -1),
        "last": ((2,), "i8", -(1 << 40)),
        **dict.fromkeys((*by_group("best"), *by_group("run")), ((_A,), "f4", 0.0)),
        "excluded": ((_A,), "?", False),
        "causes": ((_F,), "f4", 0.0),
        "polled": ((), "f4", 0.0),
        "smallest": ((), "f8", 1.0),
        "usual": ((3,), "f8", 0.0),
        "crowd": ((2,), "f8", 0.0),
    },
    "services": {**_cells(SERVICE), "born": ((), "f8", -1.0)},
    "pairs": {**_cells(PAIR), "born": ((), "f8", -1.0)},
    "contacts": {
        **_cells(CONTACT),
        "born": ((), "f8", -1.0),
        "visits": ((2,), "f8", 0.0),
        "beat": ((beacon.COLUMNS,), "f4", 0.0),
    },
    "codes": {"tally": ((3,), "f8", 0.0), "moved": ((), CELL, 0.0), "moved_past": ((PAST,), "f8", 0.0)},
}
"""Arrays of each table: shape of a slot's part, dtype, and what an unused slot holds."""


FEW = 8
"""New hosts whose names are asked for one by one: Arrow takes as long for any number of them at once."""

CROWDED = 2
"""Times `max_keys` that memory may hold within a block."""


def _moved(array: Array, rows: npt.NDArray[np.intp], size: int) -> Array:
    """These rows of an array at the beginning of one of `size` rows, which takes memory only where it is not nought."""
    moved = np.zeros((size, *array.shape[1:]), array.dtype)
    step = max(1, _PIECE // (array.itemsize * int(np.prod(array.shape[1:]))))
    for begin in range(0, len(rows), step):
        piece = array[rows[begin : begin + step]]
        if piece.dtype.kind == "T" or (piece.view(np.float64) if piece.dtype == CELL else piece).any():
            moved[begin : begin + len(piece)] = piece
    return moved


@dataclass
class Store:
    """A `KeyTable` and the arrays along its slots."""

    table: KeyTable
    arrays: dict[str, Array]
    fields: dict[str, Field]
    filled: int = 0
    """Slots that hold something, or the values of an unused slot."""

    def __post_init__(self) -> None:
        """Arrays that come with the store are whole."""
        self.filled = len(next(iter(self.arrays.values())))

    def slots(self, keys: npt.NDArray[np.uint64], tick: int) -> npt.NDArray[np.int32]:
        """Slots i32[n] of `keys`, with room for them in every array."""
        slots = self.table.find_or_insert(keys, tick)
        self._room(len(self.table))
        return slots

    @staticmethod
    def slots_each(
        stores: Sequence[Store],
        keys: Sequence[npt.NDArray[np.uint64]],
        out: Sequence[npt.NDArray[np.int32]],
        tick: int,
    ) -> None:
        """`slots` of `keys` in a store each, written to `out`; in one call where there is room for them."""
        if find_or_insert_each([store.table for store in stores], keys, out, tick):
            for store in stores:
                store._room(len(store.table))
            return
        for store, each, slots in zip(stores, keys, out, strict=True):
            slots[:] = store.slots(each, tick)

    def _room(self, needed: int) -> None:
        """Room for `needed` slots. What is not used yet, or is nought, is not written: only then it takes memory."""
        if needed <= self.filled:
            return
        held = len(next(iter(self.arrays.values())))
        size = held if needed <= held else max(needed, 2 * held, 1024)
        for name, (_, _, fill) in self.fields.items():
            if size > held:
                self.arrays[name] = _moved(self.arrays[name], np.arange(self.filled), size)
            if fill:
                self.arrays[name][self.filled : needed] = fill
        self.filled = needed

    def evict(self, max_keys: int) -> npt.NDArray[np.int32] | None:
        """As `KeyTable.evict`, the arrays compacted along."""
        remap = self.table.evict(max_keys)
        if remap is not None:
            kept = np.flatnonzero(remap >= 0)
            for name, array in self.arrays.items():
                self.arrays[name] = _moved(array, kept, len(array))
            self.filled = len(kept)
        return remap


class Memory:
    """All keyed memory of the alarms.

    >>> memory = Memory()
    >>> memory.hosts.slots(np.array([7, 9, 7], np.uint64), tick=0)
    array([0, 1, 0], dtype=int32)
    """

    def __init__(self) -> None:
        self.stores = {
            name: Store(KeyTable(), {f: np.empty((0, *s), d) for f, (s, d, _) in fields.items()}, fields)
            for name, fields in FIELDS.items()
        }
        self.hosts, self.services, self.pairs, self.contacts, self.codes = self.stores.values()

    @property
    def nbytes(self) -> int:
        """Bytes held, the names of hosts not counted."""
        return sum(s.table.nbytes + sum(a.nbytes for a in s.arrays.values()) for s in self.stores.values())

    def sizes(self) -> dict[str, int]:
        """Keys held, by table."""
        return {name: len(s.table) for name, s in self.stores.items()}

    def name_hosts(self, before: int, slots: npt.NDArray[np.int32], c: Contacts, internal: Internal) -> None:
        """Names of the hosts whose slots i32[2, c] (sources, targets) are `before` and above; whether they are ours."""
        both = slots.ravel()
        new = np.flatnonzero(both >= before)
        which, first = np.unique(both[new], return_index=True)
        index = np.concatenate((c.src, c.dst))[new[first]]
        arrays = self.hosts.arrays
        if len(index) <= FEW:
            for slot, host in zip(which.tolist(), index.tolist(), strict=True):
                arrays["name"][slot] = c.hosts.names[host].as_py()
        else:
            names = c.hosts.names.take(pa.array(index))
            if pa.types.is_dictionary(names.type):
                names = pc.cast(names, pa.string())
            arrays["name"][which] = names.to_numpy(zero_copy_only=False)
        arrays["inside"][which] = some_inside(internal, c.hosts, index)

    def crowded(self, max_keys: int, more: int = 0) -> bool:
        """Whether a flood has to be forgotten before its block is over; or would, after so many `more` contacts."""
        return max(self.sizes().values()) + 2 * more > CROWDED * max_keys

    def forget(self, max_keys: int) -> npt.NDArray[np.int32] | None:
        """Keep about to `max_keys` of each table. Returns the new slot of each old one of hosts, None if none moved."""
        gone = {name: store.evict(max_keys) for name, store in self.stores.items() if over(len(store.table), max_keys)}
        return gone.get("hosts")

    def state(self) -> dict[str, Array]:
        """Everything, as arrays named table/field."""
        out: dict[str, Array] = {}
        for name, store in self.stores.items():
            n = len(store.table)
            out |= {f"{name}/table/{k}": v for k, v in store.table.state().items()}
            for field, array in store.arrays.items():
                part = array[:n].copy()
                # Names as bytes and offsets: an array of strings cannot be written without pickling.
                if part.dtype.kind == "T":
                    _, offsets, data = pa.array(part.tolist(), pa.large_string()).buffers()
                    out[f"{name}/{field}/offsets"] = np.frombuffer(offsets, np.int64, n + 1).copy()
                    out[f"{name}/{field}/bytes"] = np.frombuffer(data or b"", np.uint8).copy()
                else:  # cells as words: two of each
                    out[f"{name}/{field}"] = part.view(np.uint64) if part.dtype == CELL else part
        return out

    @classmethod
    def restore(cls, state: dict[str, Array]) -> Memory:
        """The memory that `state` describes."""
        memory = cls()
        for name, store in memory.stores.items():
            prefix = f"{name}/table/"
            store.table = KeyTable.restore(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
            n = len(store.table)
            store._room(max(n, 1))
            for field, array in store.arrays.items():
                if array.dtype.kind == "T":
                    offsets, data = state[f"{name}/{field}/offsets"], state[f"{name}/{field}/bytes"]
                    text = pa.Array.from_buffers(
                        pa.large_string(), n, [None, pa.py_buffer(offsets), pa.py_buffer(data)]
                    )
                    array[:n] = text.to_numpy(zero_copy_only=False)
                else:
                    saved = state[f"{name}/{field}"]
                    array[:n] = saved.view(CELL).reshape(n, *array.shape[1:]) if array.dtype == CELL else saved
        return memory
