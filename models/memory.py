"""What the meeting prior remembers: hosts, their neighbours, popularity and the meetings to replay, in step with each
other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from flowsage.graph.flows import HostTable
from flowsage.models.columns import Array, Bool, Float32, Int32, Int64, UInt64
from flowsage.models.keys import over
from flowsage.models.neighbours import FROM, TO, NeighbourSlots
from flowsage.models.popularity import Popularity, keys_of
from flowsage.models.profiles import FEATURES, HostMemory, Inside, buckets
from flowsage.models.replay import Replay
from flowsage.models.sage import Csr, inverse


@dataclass(frozen=True)
class Meetings:
    """n first meetings of a window: host slots, their hashes, service codes, and whether the target was never seen
    before."""

    source: Int32
    target: Int32
    source_hash: UInt64
    target_hash: UInt64
    service: Int32
    fresh: Bool

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Batch:
    """n remembered meetings, ordered by service, that training takes out of the tables before it predicts them."""

    source: Int32
    target: Int32
    service: Int32
    """Service slots."""
    code: Int32
    weight: Float32
    offer: Float32
    pair: Float32
    """By how much the target's services, and the pair of hosts, were new with it."""
    gate: Float32
    """How much it counts in the loss."""
    fresh: Bool
    link: Int64
    """What (source, service) had met before, as a link into the ring."""

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Graph:
    """Inputs of a forward pass: r rows, whose neighbours are among `columns` i64[n], the host slots that matter to it.

    x f32[r, FEATURES]; at i64[r]: where the rows are among the columns; into, out_of: neighbours weighted for the
    encoder; sketched: the same, weighted for signatures.
    """

    x: Tensor
    columns: Tensor
    at: Tensor
    into: Csr
    out_of: Csr
    sketched: tuple[Csr, Csr]

    def to(self, device: torch.device) -> Graph:
        """The same where `device` is."""
        if device.type == "cpu":
            return self
        into, out_of, *sketched = (csr.to(device) for csr in (self.into, self.out_of, *self.sketched))
        return Graph(
            self.x.to(device), self.columns.to(device), self.at.to(device), into, out_of, (sketched[0], sketched[1])
        )


@numba.njit(cache=True, nogil=True)
def _weigh(  # type: ignore[no-untyped-def]
    indptr, index, local, value, damp, rarer, internal, weight, scale, sketched, sketched_scale
):
    """Weights f32[e] of a CSR's neighbours for the encoder and for signatures, and for both one over each row's sum.

    index, local i32[e]: the neighbours' host slots, and where they are among damp, rarer f32[n]. For signatures a
    neighbour outside the network counts only where there is none inside: sites of the world are rare or everybody's,
    and the rare ones would be most of a sketch.
    """
    for row in range(len(indptr) - 1):
        near = False
        for e in range(indptr[row], indptr[row + 1]):
            near = near or internal[index[e]]
        total, second = np.float32(0), np.float32(0)
        for e in range(indptr[row], indptr[row + 1]):
            weight[e] = value[e] * damp[local[e]]
            sketched[e] = weight[e] * rarer[local[e]] if internal[index[e]] or not near else np.float32(0)
            total += weight[e]
            second += sketched[e]
        scale[row] = inverse(total)
        sketched_scale[row] = inverse(second)


class MeetingMemory:
    """Bounded by the number of hosts; a host slot means the same in every part."""

    def __init__(
        self, *, slots: int, far: int, replayed: int, max_hosts: int, seed: int, inside: Inside | None
    ) -> None:
        self.hosts = HostMemory(inside)
        self.neighbours = NeighbourSlots(slots, far, seed)
        self.popularity = Popularity()
        self.replay = Replay(replayed)
        self.max_hosts = max_hosts

    def see(self, table: HostTable, source: Int32, target: Int32, window: int) -> tuple[Int32, Int32]:
        """Slots of the hosts of a window's contacts (indices into `table`), which counts as one window active."""
        slots = self.hosts.see(table, np.concatenate((source, target)), window)
        self.neighbours.ensure(len(self.hosts))
        return slots[: len(source)], slots[len(source) :]

    def remember(self, met: Meetings, gate: Float32, window: int, most: int) -> Float32:
        """Enter first meetings with weights `gate` f32[n] (0 to 1); at most `most` of them, by weight, are replayed.

        Returns the weights f32[n] with which they count: gate · j^-1/2 for the j-th target of a (source, service).
        """
        pair, weight = self.replay.weigh(keys_of(met.service, met.source_hash), gate, window)
        service, offer = self.popularity.add(met.service, met.target, met.target_hash, weight, met.fresh, window)
        bucket = np.empty(len(met), np.int32)
        buckets(met.service, bucket)
        self.hosts.add(met.source, met.target, bucket, weight, offer)
        tie = self.neighbours.meet(met.source, met.target, weight, self.hosts.columns["internal"], window)
        keep: Int64 | slice = slice(None)
        if len(met) > most:
            # Weighted sampling without replacement (Efraimidis, Spirakis 2006), by hash, so that it repeats itself.
            draw = (keys_of(met.service, met.source_hash ^ met.target_hash << np.uint64(1)) >> np.uint64(11)) * 2.0**-53
            keep = np.sort(np.argpartition(np.log(draw + 1e-18) / np.maximum(weight, 1e-9), -most)[-most:])
        values = np.stack([weight, offer, tie, gate], 1)
        self.replay.push(pair[keep], (met.source[keep], met.target[keep], service[keep]), values[keep], met.fresh[keep])
        return weight

    def forget(self) -> Int32 | None:
        """Keep within bounds: what was longest unseen leaves. Returns where host slots moved, None if none did."""
        pairs = 4 * self.max_hosts
        moved = self.hosts.evict(self.max_hosts) if over(len(self.hosts), self.max_hosts) else None
        if moved is not None:
            self.neighbours.compact(moved)
            self.popularity.moved(moved)
            self.replay.moved(moved, None)
        p = self.popularity
        if over(len(p.services), self.max_hosts) or over(len(p.offers), pairs):
            services = p.evict(self.max_hosts, pairs)
            if services is not None:
                self.replay.moved(None, services)
        if over(len(self.replay.pairs), pairs):
            self.replay.evict(pairs)
        return moved

    def batch(self, at: Int64) -> Batch:
        """The meetings at these positions of the ring."""
        at = at[np.argsort(self.replay.ring[at, 2], kind="stable")]
        source, target, service = self.replay.ring[at].T.copy()
        weight, offer, pair, gate = self.replay.values[at].T.copy()
        return Batch(
            source,
            target,
            service,
            self.popularity.service["code"][service],
            weight,
            offer,
            pair,
            gate,
            self.replay.fresh[at],
            self.replay.prev[at],
        )

    def links(self, keys: UInt64) -> Int64:
        """Newest meeting i64[n] of each (service code, source hash), as `keys_of` says it, in the ring; -1: none."""
        pair = self.replay.pairs.find(keys)
        links: Int64 = np.where(pair >= 0, self.replay.pair["head"][pair], -1)
        return links

    def graph(self, rows: Int32, *, blank: bool = False, without: Batch | None = None) -> Graph:
        """Features and neighbours of host slots `rows`, without the meetings of a batch; `blank` adds a host that did
        nothing.

        As many rows as there are hosts have to be all of them, in order. With `blank` they have to, and neighbours
        count one host more.
        """
        out = None
        away: tuple[tuple[Int32, Int32] | None, ...] = (None, None)
        if without is not None:
            bucket = np.empty(len(without), np.int32)
            buckets(without.code, bucket)
            out = (without.source, without.target, bucket, without.weight, without.offer, without.pair)
            away = ((without.target, without.source), (without.source, without.target))
        x = self.hosts.features(rows, self.neighbours.degree(rows), out)
        near = [self.neighbours.csr(way, rows, pairs) for way, pairs in zip((FROM, TO), away, strict=True)]
        columns, whole = rows, len(rows) == len(self.hosts)
        if not whole:
            columns = np.unique(np.concatenate([rows, *(index for _, index, _ in near)]))
        total = self.neighbours.degree(columns).sum(1)
        damp = (1 / np.log(2 + total)).astype(np.float32)
        # A common neighbour says the less the more hosts it has in common: sketches weigh it by about 1/degree.
        rarer = ((1 + total) ** -0.5 * np.log(2 + total)).astype(np.float32)
        ways: list[Csr] = []
        sketched: list[Csr] = []
        for indptr, index, value in near:
            local = index if whole else np.searchsorted(columns, index).astype(np.int32)
            if blank:
                indptr = np.append(indptr, indptr[-1])  # noqa: PLW2901
            weights = np.empty((2, len(index)), np.float32)
            scales = np.empty((2, len(indptr) - 1), np.float32)
            inside = self.hosts.columns["internal"]
            _weigh(indptr, index, local, value, damp, rarer, inside, weights[0], scales[0], weights[1], scales[1])
            shape = torch.from_numpy(indptr), torch.from_numpy(local), len(columns) + blank
            for csrs, weight, scale in zip(
                (ways, sketched), torch.from_numpy(weights), torch.from_numpy(scales), strict=True
            ):
                csrs.append(Csr(*shape, weight, scale))
        if blank:
            x = np.concatenate([x, np.zeros((1, FEATURES), np.float32)])
        at = torch.from_numpy(np.searchsorted(columns, rows))
        return Graph(
            torch.from_numpy(x), torch.from_numpy(columns.astype(np.int64)), at, ways[0], ways[1],
            (sketched[0], sketched[1]),
        )  # fmt: skip

    def state(self) -> dict[str, Array]:
        """Everything, as arrays."""
        hosts = self.hosts.state() | self.neighbours.state(len(self.hosts))
        return hosts | self.popularity.state() | self.replay.state()

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave."""
        for part in (self.hosts, self.neighbours, self.popularity, self.replay):
            part.restore(state)
