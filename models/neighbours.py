"""Neighbours of every host, both ways, in a bounded number of slots: the graph that the encoder passes messages on.

A slot holds a peer, how much its meetings weigh (0 to 1) and how many services it was met on. While there is room every
new peer gets a slot; after that it replaces a random one with probability slots · weight / (weight of all peers so
far): weighted reservoir sampling (Chao, Biometrika 1982), so a busy host keeps a fair sample of its whole past, and
what the gate found surprising seldom enters it. Peers inside the network have slots of their own: a workstation meets
hundreds of sites of the world, and what tells its department are a dozen servers. Way 0: whom the host
reached; way 1: who reached it.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from flowsage.models.columns import Array, Bool, Columns, Float32, Int32, follow
from flowsage.models.keys import mix

TO, FROM = 0, 1


@numba.njit(cache=True, nogil=True)
def _meet(peer, weight, times, mass, inside, near, source, target, value, salt, added):  # type: ignore[no-untyped-def]
    """Enter meetings in order. added f32[n]: the weight of a pair that was not in a slot yet, else 0."""
    slots = peer.shape[2]
    for i in range(len(source)):
        w = value[i]
        for way in range(2):
            host, other = (source[i], target[i]) if way == 0 else (target[i], source[i])
            free, at, side = -1, -1, 0 if inside[other] else 1
            begin, end = (0, near) if inside[other] else (near, slots)
            for j in range(begin, end):
                if peer[host, way, j] == other:
                    at = j
                    break
                if peer[host, way, j] < 0 and free < 0:
                    free = j
            if at >= 0:
                weight[host, way, at] = max(weight[host, way, at], w)
                times[host, way, at] = min(times[host, way, at] + 1, 30_000)
                continue
            mass[host, way, side] += w
            if way == 0:
                added[i] = w
            if free < 0:
                draw = mix(salt + i, (np.int64(source[i]) << 32) | (np.int64(target[i]) << 1) | way)
                chance = np.float64(draw >> np.uint64(11)) * 2.0**-53
                share = (end - begin) * w / mass[host, way, side]
                if chance >= share:
                    continue
                free = begin + int(chance / share * (end - begin))
            peer[host, way, free] = other
            weight[host, way, free] = w
            times[host, way, free] = 1


@numba.njit(cache=True, nogil=True)
def _rows(peer, weight, times, way, rows, begin, mate, indptr, index, value):  # type: ignore[no-untyped-def]
    """CSR of `rows` without the pairs (rows[i], mate[begin[i]:begin[i + 1]]), unless met on more services."""
    at = 0
    for i in range(len(rows)):
        host = rows[i]
        for j in range(peer.shape[2]):
            other = peer[host, way, j]
            if other < 0:
                continue
            left = times[host, way, j]
            for k in range(begin[i], begin[i + 1]):
                if mate[k] == other:
                    left -= 1
            if left <= 0:
                continue
            index[at] = other
            value[at] = weight[host, way, j]
            at += 1
        indptr[i + 1] = at
    return at


class NeighbourSlots:
    """`slots` neighbours inside the network, each way, and `far` ones outside, of every host slot."""

    def __init__(self, slots: int, far: int, seed: int) -> None:
        self.near, self.seed = slots, seed
        self.columns = Columns(
            peer=(np.int32, (2, slots + far), -1),
            weight=(np.float32, (2, slots + far), 0),
            times=(np.int16, (2, slots + far), 0),
            mass=(np.float64, (2, 2), 0),
        )

    def ensure(self, hosts: int) -> None:
        """Room for `hosts` host slots."""
        self.columns.ensure(hosts)

    def meet(self, source: Int32, target: Int32, weight: Float32, inside: Bool, tick: int) -> Float32:
        """Enter n meetings (host slots, weights) of window `tick`; returns f32[n]: weight of each new pair, else 0.

        inside bool[hosts]: which hosts are inside the network.
        """
        added = np.zeros(len(source), np.float32)
        c = self.columns
        salt = (tick * 1_000_003 + self.seed * 7_919) & 0x3FFFFFFFFFFF
        _meet(c["peer"], c["weight"], c["times"], c["mass"], inside, self.near, source, target, weight, salt, added)
        return added

    def degree(self, rows: Int32) -> Float32:
        """Weight of distinct peers of host slots `rows` i32[r], both ways, f32[r, 2]."""
        degree: Float32 = self.columns["mass"][rows].sum(2).astype(np.float32)
        return degree

    def csr(self, way: int, rows: Int32, without: tuple[Int32, Int32] | None = None) -> tuple[Int32, Int32, Float32]:
        """indptr i32[r+1], index i32[e] (host slots), weight f32[e] of host slots `rows` i32[r].

        `without`: pairs (row host, other host) to leave out, once for every time they are named.
        """
        begin, mate = np.zeros(len(rows) + 1, np.int32), np.empty(0, np.int32)
        if without is not None:
            place = np.full(len(self.columns["mass"]), -1, np.int32)
            place[rows] = np.arange(len(rows), dtype=np.int32)
            row = place[without[0]]
            order = np.argsort(row, kind="stable")
            order = order[row[order] >= 0]
            mate = without[1][order]
            begin[1:] = np.cumsum(np.bincount(row[order], minlength=len(rows)))
        c = self.columns
        indptr = np.zeros(len(rows) + 1, np.int32)
        room = int(np.count_nonzero(c["peer"][rows, way] >= 0))
        index, value = np.empty(room, np.int32), np.empty(room, np.float32)
        used = _rows(c["peer"], c["weight"], c["times"], way, rows, begin, mate, indptr, index, value)
        return indptr, index[:used], value[:used]

    def compact(self, remap: Int32) -> None:
        """Host slots have moved; peers that left free their slot."""
        self.columns.compact(remap)
        follow(self.columns["peer"], remap)

    def state(self, hosts: int) -> dict[str, Array]:
        """Arrays of the first `hosts` slots."""
        return self.columns.state("neighbours", hosts)

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave."""
        self.columns.restore("neighbours", state)
