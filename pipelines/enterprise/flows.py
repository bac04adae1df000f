"""Flows in the making: columns that grow by broadcasting, and become a flow file.

Hosts are interned names, times seconds since the begin. What nobody says is filled in as a sensor would have seen it:
packets from bytes, an ephemeral source port, an end from a duration.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TCP, UDP, ICMP = 6, 17, 1
STATES = ("SF", "S0", "REJ", "S1", "OTH")
"""Zeek's conn_state: established and finished, unanswered, refused, established and never finished, no handshake."""
ESTABLISHED, UNANSWERED, REFUSED, OPEN, OTHER = range(len(STATES))

DAY_NS = 86_400 * 10**9
EPOCH = 3
"""1 January 1970 was a Thursday; Monday is 0."""

SEGMENT = 1_200.0
"""Bytes that a packet of a longer transfer carries."""


def sizes(rng: np.random.Generator, median: float, count: int, spread: float = 0.8) -> Floats:
    """Log-normal sizes f8[count] in bytes; `spread` is the standard deviation of their logarithm."""
    drawn: Floats = median * np.exp(rng.normal(0.0, spread, count))
    return drawn


class Flows:
    """Flows of an enterprise, gathered behaviour by behaviour."""

    def __init__(self, rng: np.random.Generator, begin_ns: int) -> None:
        self.rng = rng
        self.begin_ns = begin_ns
        self._names: dict[str, int] = {}
        self._attacks: list[str] = []
        self._parts: list[tuple[npt.NDArray[Any], ...]] = []

    def __len__(self) -> int:
        """Parts added so far: one a call of `add`."""
        return len(self._parts)

    def latest(self, since: int) -> float:
        """The last start, s, among the parts from number `since` on; -inf if there is none."""
        return max((float(part[0].max()) for part in self._parts[since:]), default=-np.inf)

    def weekend(self, day: int) -> bool:
        """Whether the day of this number, the first being 0, is a Saturday or a Sunday."""
        return (self.begin_ns // DAY_NS + day + EPOCH) % 7 >= 5

    def host(self, name: str) -> int:
        """The number of the host of this name."""
        return self._names.setdefault(name, len(self._names))

    def hosts(self, names: list[str]) -> Ints:
        """Numbers i8[n] of the hosts of these names."""
        return np.array([self.host(n) for n in names], np.int64)

    def name(self, number: int) -> str:
        """The name of a host."""
        return list(self._names)[number]

    def attack(self, name: str) -> int:
        """A new incident; give its number to `add` with every flow of it."""
        self._attacks.append(name)
        return len(self._attacks) - 1

    def add(
        self,
        at: Any,
        src: Any,
        dst: Any,
        port: Any,
        *,
        proto: int = TCP,
        out: Any = 800.0,
        back: Any = 3_000.0,
        lasts: Any = 0.3,
        state: Any = ESTABLISHED,
        src_port: Any = None,
        attack: int = -1,
    ) -> None:
        """Flows that start `at` s, all arguments broadcast to one length: hosts by number, bytes `out` and `back`,
        seconds that they last, index into STATES, incident (-1: benign)."""
        n = np.broadcast(at, src, dst, port, out, back, lasts, state).size
        if not n:
            return

        def wide(value: Any, kind: Any) -> npt.NDArray[Any]:
            return np.broadcast_to(np.asarray(value), (n,)).astype(kind)

        state = wide(state, np.int8)
        answered = (state == ESTABLISHED) | (state == OPEN) | (state == OTHER)
        out = wide(out, np.float64)
        if proto == TCP:
            back = wide(back, np.float64)
            out = np.where(answered, np.maximum(out, 150.0), np.where(state == REFUSED, 60.0, 180.0))
            back = np.where(answered, np.maximum(back, 120.0), np.where(state == REFUSED, 40.0, 0.0))
            shake = np.where(state == UNANSWERED, 3, np.where(state == REFUSED, 1, 4))
        else:
            back, shake = np.where(state == UNANSWERED, 0.0, wide(back, np.float64)), np.zeros(n)
        packets_out = np.maximum(1, shake + np.ceil(out / SEGMENT))
        packets_back = np.where(back > 0, np.maximum(1, np.ceil(back / SEGMENT) + (shake > 1) * answered), 0)
        if src_port is None:
            src_port = self.rng.integers(32_768, 61_000, n)
        lasts = np.where(answered, wide(lasts, np.float64), np.where(state == UNANSWERED, 3.0, 0.01))
        self._parts.append(
            (wide(at, np.float64), lasts, wide(src, np.int32), wide(dst, np.int32), wide(src_port, np.int32),
             wide(port, np.int32), np.full(n, proto, np.int16), packets_out.astype(np.int64),
             packets_back.astype(np.int64), out.astype(np.int64), back.astype(np.int64), state,
             np.full(n, attack, np.int32))
        )  # fmt: skip

    def table(self, end_s: float, *, sensor: str = "simulation") -> pa.Table:
        """The flows that start in [0, end_s) in order of time, as `../shared/data/README.md` has flow files."""
        if not self._parts:
            self._parts.append(tuple(np.empty(0) for _ in range(13)))
        columns = [np.concatenate(c) for c in zip(*self._parts, strict=True)]
        inside = np.flatnonzero((columns[0] >= 0) & (columns[0] < end_s) & (columns[2] != columns[3]))
        order = inside[np.argsort(columns[0][inside], kind="stable")]
        at, lasts, src, dst, src_port, port, proto, packets, packets_back, out, back, state, attack = (
            c[order] for c in columns
        )
        start = self.begin_ns + (at * 1e6).astype(np.int64) * 1_000
        names = pa.array(list(self._names), pa.string())
        attacks = pa.array(self._attacks, pa.string())
        return pa.table(
            {
                "start_ns": start,
                "end_ns": start + (lasts * 1e9).astype(np.int64),
                "src_ip": pa.DictionaryArray.from_arrays(src.astype(np.int32), names),
                "dst_ip": pa.DictionaryArray.from_arrays(dst.astype(np.int32), names),
                "src_port": src_port.astype(np.int32),
                "dst_port": port.astype(np.int32),
                "proto": proto.astype(np.int16),
                "packets_fwd": packets.astype(np.int64),
                "packets_rev": packets_back.astype(np.int64),
                "bytes_fwd": out.astype(np.int64),
                "bytes_rev": back.astype(np.int64),
                "state": pa.DictionaryArray.from_arrays(state.astype(np.int32), pa.array(STATES)),
                "sensor": pa.DictionaryArray.from_arrays(np.zeros(len(at), np.int32), pa.array([sensor])),
                "label": (attack >= 0).astype(np.int8),
                "attack": pa.DictionaryArray.from_arrays(
                    pa.array(attack.astype(np.int32), mask=attack < 0), attacks
                ).cast(pa.string()),
            }
        )
