"""A small office and six misbehaviours in it, as flow records: what the tests of the alarms look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from flowsage.graph.build import Contacts, contacts
from flowsage.graph.flows import from_table
from flowsage.models.alarms import AlarmConfig, Alarms
from flowsage.models.finding import Finding
from flowsage.models.history import History, HistoryConfig

S = 10**9
START = 1_700_000_000 * S
WINDOW, PANE = 6 * S, S
EVER = 1 << 62
LAB = AlarmConfig(time_scale=60.0, pane_ns=PANE, settle_ns=3_600 * S)
"""The lab's settings: a day takes 24 minutes, a block of calibration 15 seconds."""

LASTING = 9_001
"""Flows to this port last a second, until the next one; all others end as they begin."""

Row = tuple[float, str, str, int, int, int, int]
"""start (s), source, target, port, answered, bytes out, bytes in"""

CLIENTS = [f"10.77.0.{i}" for i in range(20, 28)]
WEB, DNS, SSH, FILES = (f"10.77.0.{i}" for i in range(10, 14))
OUTSIDE = [f"203.0.113.{i}" for i in range(1, 7)]


def office(seconds: float, seed: int) -> list[Row]:
    """Twelve hosts at work: names, pages, files, jobs by the clock, an administrator, the outside."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []

    def poisson(rate: float) -> Iterator[float]:
        yield from np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds))).tolist()

    def size(median: float) -> int:
        return int(median * np.exp(rng.normal(0, 0.6)))

    for client in CLIENTS:
        rows += [(t, client, DNS, 53, 1, 80, 200) for t in poisson(0.3)]
        rows += [(t, client, WEB, 80, 1, size(700), size(6_000)) for t in poisson(0.25)]
        rows += [(t, client, str(rng.choice(OUTSIDE)), 443, 1, size(2_000), size(20_000)) for t in poisson(0.1)]
        rows += [(t, client, FILES, 445, 1, size(20_000), size(60_000)) for t in poisson(0.02)]
        rows += [(t, client, str(rng.choice(CLIENTS)), 80, 0, 60, 54) for t in poisson(0.003)]  # a refused connection
    for job, target, port in ((CLIENTS[0], WEB, 8080), (CLIENTS[1], FILES, 873), (FILES, WEB, 9100)):
        rows += [(t + rng.normal(0, 0.05), job, target, port, 1, 900, 400) for t in np.arange(1, seconds, 5.0).tolist()]
    rows += [
        (t, CLIENTS[2], str(rng.choice([SSH, WEB, FILES])), 22, 1, size(4_000), size(9_000)) for t in poisson(0.05)
    ]
    return rows


def port_scan(t: float, rng: np.random.Generator) -> list[Row]:
    ports = rng.permutation(np.arange(1, 1001)).tolist()
    return [(t + i * 0.01, CLIENTS[3], WEB, p, 0, 60, 54) for i, p in enumerate(ports)]


def host_scan(t: float, rng: np.random.Generator) -> list[Row]:
    return [(t + i * 0.02, CLIENTS[3], f"10.77.0.{i}", 443, 0, 60, 54 * (i < 30)) for i in range(1, 255)]


def slow_scan(t: float, rng: np.random.Generator) -> list[Row]:
    return [(t + i * 4.0, CLIENTS[4], f"10.77.0.{100 + i}", 445, 0, 60, 54) for i in range(10)]


def worm(t: float, rng: np.random.Generator) -> list[Row]:
    peers = [h for h in [*CLIENTS, WEB, DNS, SSH, FILES] if h != CLIENTS[5]] + [f"10.77.0.{i}" for i in range(60, 75)]
    return [(t + i * 0.5, CLIENTS[5], h, 445, int(i % 3 > 0), 3_000, 1_500) for i, h in enumerate(peers)]


def guessing(t: float, rng: np.random.Generator) -> list[Row]:
    return [(t + i * 0.4, CLIENTS[6], SSH, 22, 1, 1_800, 2_200) for i in range(75)]


def beacon(t: float, rng: np.random.Generator) -> list[Row]:
    at = t + np.cumsum(3.0 + rng.uniform(-0.3, 0.3, 20))
    return [(x, CLIENTS[7], "198.51.100.9", 8443, 1, 420, 310) for x in at.tolist()]


def exfiltration(t: float, rng: np.random.Generator) -> list[Row]:
    return [(t + i * 1.0, CLIENTS[1], "198.51.100.77", 443, 1, 20_000_000, 90_000) for i in range(5)]


MISBEHAVIOURS: dict[str, tuple[Callable[[float, np.random.Generator], list[Row]], str]] = {
    "port scan": (port_scan, CLIENTS[3]),
    "host scan": (host_scan, CLIENTS[3]),
    "slow scan": (slow_scan, CLIENTS[4]),
    "worm": (worm, CLIENTS[5]),
    "guessing": (guessing, CLIENTS[6]),
    "beacon": (beacon, CLIENTS[7]),
    "exfiltration": (exfiltration, CLIENTS[1]),
}


def table(rows: list[Row]) -> pa.Table:
    """Rows as a flow file."""
    t, src, dst, port, answered, out, back = (list(c) for c in zip(*rows, strict=True))
    start = START + (np.array(t) * S).astype(np.int64)
    udp = np.array(port) == 53
    return pa.table(
        {
            "start_ns": start, "end_ns": start + S * (np.array(port) == LASTING), "src_ip": src, "dst_ip": dst,
            "src_port": np.full(len(t), 45_000), "dst_port": port, "proto": np.where(udp, 17, 6),
            "packets_fwd": np.full(len(t), 3), "packets_rev": np.where(np.array(answered) > 0, 3, np.array(back) > 0),
            "bytes_fwd": out, "bytes_rev": back,
            "tcp_flags_fwd": np.where(udp, 0, 2),
            "tcp_flags_rev": np.where(udp, 0, np.where(np.array(answered) > 0, 18, 4)),
        }
    )  # fmt: skip


class Watch:
    """History and alarms over rows, pane by pane, as the detector does it."""

    def __init__(self, config: AlarmConfig = LAB, misplaced: dict[tuple[str, str], float] | None = None) -> None:
        self.alarms = Alarms(config)
        self.misplaced = misplaced or {}
        """How much the graph's prior would find some first meetings out of place."""
        self.history = History(HistoryConfig())

    def run(self, rows: list[Row], until: float, after: float = 0.0) -> list[Finding]:
        """Findings of `rows` (in any order) from `after` to `until` seconds, whole windows."""
        flows = from_table(table(sorted(rows)))
        start, found = flows.start_ns, []
        for w in range(int(START + after * S) // WINDOW, int(START + until * S) // WINDOW + 1):
            for p in range(w * WINDOW, (w + 1) * WINDOW, PANE):
                arrived = flows.take(slice(*np.searchsorted(start, (p, p + PANE))))
                seen = contacts(arrived, EVER)
                found += self.alarms.step(p + PANE, seen, self.history.lookup(seen), self._said(seen))
            closed = flows.take(slice(*np.searchsorted(start, (w * WINDOW, (w + 1) * WINDOW))))
            if len(closed):
                self.history.score(closed, contacts(closed, WINDOW))
        return found

    def _said(self, seen: Contacts) -> np.ndarray:
        names = seen.hosts.names.to_pylist() if self.misplaced else []
        pairs = [(names[s], names[t]) for s, t in zip(seen.src, seen.dst, strict=True)] if self.misplaced else []
        return (
            np.array([self.misplaced.get(p, np.nan) for p in pairs]) if self.misplaced else np.full(len(seen), np.nan)
        )
