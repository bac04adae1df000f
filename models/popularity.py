"""How often each host is the target of a service: q_svc(t), which backs off service -> all services -> uniform.

q_svc(t) = (w(t, svc) + a · q_all(t)) / (w(svc) + a), q_all(t) = (w(t) + b/h) / (w + b) over h hosts, all w being sums
of the weights of distinct meetings. A share u_svc of each service belongs to hosts never seen before, estimated the
same way.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np

from flowsage.models.columns import Array, Bool, Columns, Float32, Int32, UInt64, follow
from flowsage.models.keys import KeyTable, mix

BACKOFF: Final = 10.0
"""a: meetings' worth of belief in the level above."""

UNIFORM: Final = 20.0
"""b: meetings' worth of belief in all hosts alike."""


@numba.njit(cache=True, nogil=True)
def pair_keys(hashes: UInt64, service: Int32, out: UInt64) -> None:
    """Keys u64[n] of (host hash, service code)."""
    for i in range(len(service)):
        out[i] = mix(hashes[i], service[i])


def keys_of(service: Int32, hashes: UInt64 | None = None) -> UInt64:
    """Keys u64[n] of services, or of (host hash, service)."""
    out = np.empty(len(service), np.uint64)
    pair_keys(np.zeros(len(service), np.uint64) if hashes is None else hashes, service, out)
    return out


@numba.njit(cache=True, nogil=True)
def _link(  # type: ignore[no-untyped-def]
    offer, service, target, weight, fresh, before, o_target, o_service, o_weight, o_next, head, total, news, grown
):
    """Add n meetings; offers from `before` on are new and go to the head of their service's list."""
    linked = before
    for i in range(len(offer)):
        o = offer[i]
        if o >= linked:
            linked = o + 1
            o_next[o] = head[service[i]]
            head[service[i]] = o
        o_target[o] = target[i]
        o_service[o] = service[i]
        old = o_weight[o]
        o_weight[o] = old + weight[i]
        grown[i] = min(np.float32(1), o_weight[o]) - min(np.float32(1), old)
        total[service[i]] += weight[i]
        if fresh[i]:
            news[service[i]] += weight[i]


@numba.njit(cache=True, nogil=True)
def _relink(o_service, o_next, head, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        s = o_service[i]
        if s >= 0:
            o_next[i] = head[s]
            head[s] = i


@numba.njit(cache=True, nogil=True)
def _shares(service, share, head, o_next, o_target, o_weight, total, chance):  # type: ignore[no-untyped-def]
    for i in range(len(service)):
        factor = np.float32(share[i] / (total[service[i]] + BACKOFF))
        o = head[service[i]]
        while o >= 0:
            if o_target[o] >= 0:
                chance[o_target[o]] += factor * o_weight[o]
            o = o_next[o]


class Popularity:
    """Weights of (target, service) and of services. Host slots are the caller's."""

    def __init__(self) -> None:
        self.services = KeyTable()
        self.offers = KeyTable()
        self.service = Columns(
            code=(np.int32, (), 0), total=(np.float32, (), 0), fresh=(np.float32, (), 0), head=(np.int32, (), -1)
        )
        self.offer = Columns(
            target=(np.int32, (), -1), service=(np.int32, (), -1), weight=(np.float32, (), 0), next=(np.int32, (), -1)
        )
        self.total = 0.0
        """Weight of all meetings, and of those with a host never seen before."""
        self.fresh = 0.0

    def find(self, service: Int32) -> Int32:
        """Slots i32[n] of service codes, -1 for those never met."""
        return self.services.find(keys_of(service))

    def add(
        self, service: Int32, target: Int32, hashes: UInt64, weight: Float32, fresh: Bool, tick: int
    ) -> tuple[Int32, Float32]:
        """Count n meetings: service codes, target slots and their hashes, weights, whether the target was never seen.

        Returns service slots i32[n] and, f32[n], by how much the number of services of the target grew.
        """
        slots = self.services.find_or_insert(keys_of(service), tick)
        self.service.ensure(len(self.services))
        self.service["code"][slots] = service
        before = len(self.offers)
        offer = self.offers.find_or_insert(keys_of(service, hashes), tick)
        self.offer.ensure(len(self.offers))
        grown = np.empty(len(service), np.float32)
        o, s = self.offer, self.service
        _link(
            offer, slots, target, weight, fresh, before, o["target"], o["service"], o["weight"], o["next"],
            s["head"], s["total"], s["fresh"], grown,
        )  # fmt: skip
        self.total += float(weight.sum(dtype=np.float64))
        self.fresh += float(weight[fresh].sum(dtype=np.float64))
        return slots, grown

    def anywhere(self, received: Float32) -> Float32:
        """q_all f32[h] of hosts that received so much weight f32[h]."""
        h = len(received)
        q: Float32 = ((received + np.float32(UNIFORM / max(h, 1))) / np.float32(received.sum() + UNIFORM)).astype(
            np.float32
        )
        return q

    def shares(self, service: Int32, hosts: int) -> Float32:
        """Mean over service slots i32[n] of w(t, svc) / (w(svc) + a), f32[hosts]."""
        chance = np.zeros(hosts, np.float32)
        slots, count = np.unique(service, return_counts=True)
        _shares(
            slots, count / len(service), self.service["head"], self.offer["next"], self.offer["target"],
            self.offer["weight"], self.service["total"], chance,
        )  # fmt: skip
        return chance

    @property
    def fresh_share(self) -> float:
        """Share of first meetings, of all services, that are with a host never seen before."""
        return (self.fresh + 1.0) / (self.total + 2.0)

    def moved(self, remap: Int32) -> None:
        """Host slots have moved: offers of hosts that left are nobody's until the host comes back."""
        follow(self.offer["target"], remap)

    def evict(self, max_services: int, max_offers: int) -> Int32 | None:
        """Forget what was longest unseen; returns where service slots moved, None if none did."""
        gone = self.offers.evict(max_offers)
        if gone is not None:
            self.offer.compact(gone)
        moved = self.services.evict(max_services)
        if moved is not None:
            self.service.compact(moved)
            follow(self.offer["service"], moved)
        if gone is not None or moved is not None:
            self._lists()
        return moved

    def _lists(self) -> None:
        self.offer["next"][:] = -1
        self.service["head"][:] = -1
        _relink(self.offer["service"], self.offer["next"], self.service["head"], len(self.offers))

    def state(self) -> dict[str, Array]:
        """Everything, as arrays."""
        parts: dict[str, Array] = {"popularity.sums": np.array([self.total, self.fresh])}
        for name, table, columns in (("service", self.services, self.service), ("offer", self.offers, self.offer)):
            parts |= {f"{name}.keys.{key}": value for key, value in table.state().items()}
            parts |= columns.state(name, len(table))
        return parts

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave."""
        self.total, self.fresh = (float(x) for x in state["popularity.sums"])
        names = ("keys", "seen", "evicted")
        self.services = KeyTable.restore({name: state[f"service.keys.{name}"] for name in names})
        self.offers = KeyTable.restore({name: state[f"offer.keys.{name}"] for name in names})
        self.service.restore("service", state)
        self.offer.restore("offer", state)
