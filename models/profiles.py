"""What a host is, as far as its meetings tell: the inputs of the encoder. No identity is among them.

A host's service profile counts its distinct (peer, service) each way, hashed by service to 16 dimensions, weighted as
the gate lets them in. A host that was never seen before has the profile of one that has done nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np

from flowsage.graph.addresses import some_inside
from flowsage.graph.flows import HostTable
from flowsage.models.columns import Array, Bool, Columns, Float32, Int32, UInt64
from flowsage.models.keys import KeyTable, mix

Inside = Callable[[HostTable], Bool]
"""Which of these hosts are inside the network: [n] -> bool[n]."""

BUCKETS: Final = 16
FEATURES: Final = 4 * BUCKETS + 7
"""Log count and presence of distinct peers a service bucket, out and in; then log distinct out and in, is source, is
sink, internal, log windows active, log services offered."""


def feature_names() -> list[str]:
    """Names of the `FEATURES` inputs, in order."""
    ways = [f"{what} {way} {b}" for way in ("out", "in") for what in ("services", "presence") for b in range(BUCKETS)]
    return [*ways, "degree out", "degree in", "is source", "is sink", "internal", "windows active", "services offered"]


@numba.njit(cache=True, nogil=True)
def buckets(service: Int32, out: Int32) -> None:
    """Bucket i32[n] of each service code."""
    for i in range(len(service)):
        out[i] = np.int32(mix(service[i], 11) & np.uint64(BUCKETS - 1))


@numba.njit(cache=True, nogil=True)
def _add(counts, offered, source, target, bucket, weight, new_offer):  # type: ignore[no-untyped-def]
    for i in range(len(source)):
        if source[i] >= 0:
            counts[source[i], 0, bucket[i]] += weight[i]
        if target[i] >= 0:
            counts[target[i], 1, bucket[i]] += weight[i]
            offered[target[i]] += new_offer[i]


@numba.njit(cache=True, nogil=True)
def _receive(received, target, weight):  # type: ignore[no-untyped-def]
    for i in range(len(target)):
        received[target[i]] += weight[i]


@numba.njit(cache=True, nogil=True)
def _features(counts, degree, offered, internal, windows, out):  # type: ignore[no-untyped-def]
    half = np.float32(0.5)
    for i in range(len(counts)):
        for way in range(2):
            total = np.float32(0)
            for b in range(BUCKETS):
                c = max(counts[i, way, b], np.float32(0))
                total += c
                at = way * 2 * BUCKETS + b
                out[i, at] = half * np.log1p(c) if c > 0 else np.float32(0)
                out[i, at + BUCKETS] = min(c, np.float32(1))
            out[i, 4 * BUCKETS + way] = half * np.log1p(max(degree[i, way], np.float32(0)))
            out[i, 4 * BUCKETS + 2 + way] = min(total, np.float32(1))
        out[i, 4 * BUCKETS + 4] = internal[i]
        out[i, 4 * BUCKETS + 5] = half * np.log1p(np.float32(windows[i]))
        out[i, 4 * BUCKETS + 6] = half * np.log1p(max(offered[i], np.float32(0)))


@numba.njit(cache=True, nogil=True)
def _see(last, windows, slots, window):  # type: ignore[no-untyped-def]
    for i in range(len(slots)):
        s = slots[i]
        if last[s] != window:
            last[s] = window
            windows[s] += 1


class HostMemory:
    """Hosts by the hash of their name: slots, and the profile of each."""

    def __init__(self, inside: Inside | None = None) -> None:
        self.keys = KeyTable()
        self._inside = inside
        self.columns = Columns(
            hash=(np.uint64, (), 0),
            counts=(np.float32, (2, BUCKETS), 0),
            offered=(np.float32, (), 0),
            received=(np.float32, (), 0),
            internal=(np.bool_, (), 0),
            windows=(np.int32, (), 0),
            last=(np.int64, (), np.iinfo(np.int64).min),
        )

    def __len__(self) -> int:
        return len(self.keys)

    def see(self, hosts: HostTable, index: Int32, window: int) -> Int32:
        """Slots i32[n] of hosts[index], all of them active in `window`; new ones get a blank profile."""
        hashes = hosts.hash[index]
        before = len(self)
        slots = self.keys.find_or_insert(hashes, window)
        if len(self) > before:
            self.columns.ensure(len(self))
            fresh = np.flatnonzero(slots >= before)
            self.columns["hash"][slots[fresh]] = hashes[fresh]
            if self._inside is not None:
                _, once = np.unique(slots[fresh], return_index=True)
                fresh = fresh[once]
                self.columns["internal"][slots[fresh]] = some_inside(self._inside, hosts, index[fresh])
        _see(self.columns["last"], self.columns["windows"], slots, window)
        return slots

    def find(self, hashes: UInt64) -> Int32:
        """Slots i32[n], -1 for hosts that are not known."""
        return self.keys.find(hashes)

    def add(self, source: Int32, target: Int32, bucket: Int32, weight: Float32, new_offer: Float32) -> None:
        """Count n meetings in both profiles. new_offer f32[n]: by how much the target's number of services grows."""
        _add(self.columns["counts"], self.columns["offered"], source, target, bucket, weight, new_offer)
        _receive(self.columns["received"], target, weight)

    def received(self) -> Float32:
        """Weight of all meetings of each host as a target, f32[hosts]."""
        weight: Float32 = self.columns["received"][: len(self)].copy()
        return weight

    def features(
        self,
        rows: Int32,
        degree: Float32,
        without: tuple[Int32, Int32, Int32, Float32, Float32, Float32] | None = None,
    ) -> Float32:
        """Inputs f32[r, FEATURES] of slots `rows`; degree f32[r, 2] is what their neighbour slots count.

        `without`: meetings (source, target, bucket, weight, weight of the new offer, weight of the new pair) to take
        out.
        """
        c = self.columns
        counts, offered, degree = c["counts"][rows], c["offered"][rows], degree.copy()
        if without is not None:
            source, target, bucket, weight, offer, pair = without
            place = np.full(len(self), -1, np.int32)
            place[rows] = np.arange(len(rows), dtype=np.int32)
            source, target = place[source], place[target]
            _add(counts, offered, source, target, bucket, -weight, -offer)
            for way, end in enumerate((source, target)):
                np.subtract.at(degree[:, way], end[end >= 0], pair[end >= 0])
        out = np.empty((len(rows), FEATURES), np.float32)
        _features(counts, degree, offered, c["internal"][rows], c["windows"][rows], out)
        return out

    def evict(self, max_hosts: int) -> Int32 | None:
        """Forget the hosts longest unseen beyond `max_hosts`; returns where slots moved, None if none did."""
        remap = self.keys.evict(max_hosts)
        if remap is not None:
            self.columns.compact(remap)
        return remap

    def state(self) -> dict[str, Array]:
        """Everything, as arrays."""
        keys = {f"hosts.keys.{name}": value for name, value in self.keys.state().items()}
        return keys | self.columns.state("hosts", len(self))

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave."""
        self.keys = KeyTable.restore({name: state[f"hosts.keys.{name}"] for name in ("keys", "seen", "evicted")})
        self.columns.restore("hosts", state)
