"""The last distinct meetings (source, target, service), for training to replay and to know whom (source, service)
knows.

A ring: the newest meeting overwrites the oldest. Meetings of one (source, service) are a list from newest to oldest
through the ring; a link that points to what was overwritten ends it, so nothing has to be unlinked.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np

from flowsage.models.columns import Array, Bool, Columns, Float32, Int32, Int64, UInt64, follow
from flowsage.models.keys import KeyTable

SHARE: Final = 16
"""At most one in so many meetings is drawn: taking out many at once makes targets look as if nobody ever reached
them."""


@numba.njit(cache=True, nogil=True)
def _count(pair: Int32, counted: Array, weight: Float32) -> None:
    """The j-th target of a (source, service) weighs j^-1/2."""
    for i in range(len(pair)):
        counted[pair[i]] += 1
        weight[i] *= np.float32(1 / np.sqrt(np.float64(counted[pair[i]])))


@numba.njit(cache=True, nogil=True)
def _push(  # type: ignore[no-untyped-def]
    pair, source, target, service, entered, fresh, head, ring, values, flags, prev, newest
):
    for i in range(len(pair)):
        newest += 1
        at = newest % len(ring)
        ring[at, 0], ring[at, 1], ring[at, 2] = source[i], target[i], service[i]
        values[at] = entered[i]
        flags[at] = fresh[i]
        prev[at] = head[pair[i]]
        head[pair[i]] = newest
    return newest


class Replay:
    """A ring of `capacity` meetings, and one entry a (source, service)."""

    def __init__(self, capacity: int) -> None:
        self.pairs = KeyTable()
        self.pair = Columns(met=(np.int32, (), 0), head=(np.int64, (), -1))
        self.ring: Int32 = np.full((capacity, 3), -1, np.int32)
        """Source, target and service slots of a meeting; a row with a -1 is empty."""
        self.values: Float32 = np.zeros((capacity, 4), np.float32)
        """Its weight, by how much the target's services and the pair of hosts were new, and what the gate gave it."""
        self.fresh: Bool = np.zeros(capacity, np.bool_)
        """Whether the target had never been seen before."""
        self.prev: Int64 = np.full(capacity, -1, np.int64)
        self.newest = -1
        """Number of the newest meeting; it stands at newest % capacity."""

    def __len__(self) -> int:
        return min(self.newest + 1, len(self.ring))

    def weigh(self, keys: UInt64, gate: Float32, tick: int) -> tuple[Int32, Float32]:
        """Slots i32[n] of (source, service) `keys`, and weights f32[n]: gate · j^-1/2 for its j-th target."""
        pair = self.pairs.find_or_insert(keys, tick)
        self.pair.ensure(len(self.pairs))
        weight = gate.copy()
        _count(pair, self.pair["met"], weight)
        return pair, weight

    def push(self, pair: Int32, meeting: tuple[Int32, Int32, Int32], values: Float32, fresh: Bool) -> None:
        """Remember n meetings: (source, service) slots; source, target, service slots; values f32[n, 4]; fresh [n]."""
        source, target, service = meeting
        self.newest = int(
            _push(
                pair, source, target, service, values, fresh,
                self.pair["head"], self.ring, self.values, self.fresh, self.prev, self.newest,
            )
        )  # fmt: skip

    def draw(self, count: int, recent: int, generator: np.random.Generator) -> Int64:
        """Positions i64[n], oldest first, of about `count` meetings: of some sources, all meetings from a random moment
        on.

        Training that predicts them from what is left sees each source as it was at that moment, as scoring does;
        leaving out one meeting at a time would teach that everybody knows everything popular already. Sources of the
        `recent` newest meetings come first, up to a quarter of them; never more than one in `SHARE` of all is drawn.
        """
        held = len(self)
        order = (np.arange(self.newest - held + 1, self.newest + 1)) % len(self.ring)
        whole = (self.ring[:held, 0] >= 0) & (self.ring[:held, 1] >= 0) & (self.ring[:held, 2] >= 0)
        order = order[whole[order]]
        count = min(count, len(order) // SHARE)
        if not count:
            return np.empty(0, np.int64)
        source = self.ring[order, 0]
        total = np.bincount(source)
        pool = generator.permutation(np.flatnonzero(total))
        latest = np.unique(source[-min(recent, len(source)) :])
        latest = generator.permutation(latest)[: max(1, len(pool) // 4)]
        pool = np.concatenate([latest, pool[~np.isin(pool, latest)]])
        share = np.minimum(total[pool], 1 + (generator.random(len(pool)) * total[pool]).astype(np.int64))
        share = np.minimum(share, max(1, count // 8))
        pool, share = pool[: (fits := int(np.searchsorted(np.cumsum(share), count)) + 1)], share[:fits]
        drawn = np.zeros(len(total), np.int64)
        drawn[pool] = share
        among = np.flatnonzero(drawn[source])
        among = among[np.argsort(source[among], kind="stable")]
        begin = np.zeros(len(total) + 1, np.int64)
        begin[1:] = np.cumsum(np.where(drawn > 0, total, 0))
        rank = np.arange(len(among)) - begin[source[among]]
        late = rank >= (total - drawn)[source[among]]
        at: Int64 = order[np.sort(among[late])].astype(np.int64)
        return at

    def moved(self, hosts: Int32 | None, services: Int32 | None) -> None:
        """Host or service slots have moved."""
        for column, remap in ((0, hosts), (1, hosts), (2, services)):
            if remap is not None:
                follow(self.ring[:, column], remap)

    def evict(self, max_pairs: int) -> None:
        """Forget the (source, service) longest unseen."""
        remap = self.pairs.evict(max_pairs)
        if remap is not None:
            self.pair.compact(remap)

    def state(self) -> dict[str, Array]:
        """Everything, as arrays."""
        n = len(self)
        parts: dict[str, Array] = {
            "replay.ring": self.ring[:n].copy(),
            "replay.values": self.values[:n].copy(),
            "replay.fresh": self.fresh[:n].copy(),
            "replay.prev": self.prev[:n].copy(),
            "replay.newest": np.array(self.newest),
        }
        parts |= {f"pair.keys.{key}": value for key, value in self.pairs.state().items()}
        return parts | self.pair.state("pair", len(self.pairs))

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; the capacity has to be the same."""
        n = len(state["replay.ring"])
        self.ring[:n], self.values[:n] = state["replay.ring"], state["replay.values"]
        self.fresh[:n], self.prev[:n] = state["replay.fresh"], state["replay.prev"]
        self.newest = int(state["replay.newest"])
        self.pairs = KeyTable.restore({name: state[f"pair.keys.{name}"] for name in ("keys", "seen", "evicted")})
        self.pair.restore("pair", state)
