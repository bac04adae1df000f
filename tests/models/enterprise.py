"""A small simulated enterprise, as contacts window by window: who first meets whom, and which of it is an attack.

Departments have workstations, file and application servers of their own; all share directory, name, mail, proxy and
intranet servers; administrators go everywhere, developers to build servers, everybody to sites outside. People join
late, change departments, and now and then need somebody else's server. In the second half intruders use what they
stole:

- `credentials`: a workstation of one department opens a file or application server of another, by the same service
  as its own: popular target, usual service, wrong relation;
- `lateral`: from workstation to workstation, or to a server, by an administrator's service.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from flowsage.graph.build import Contacts
from flowsage.graph.flows import HostTable, hash_names

TCP, UDP = 7 << 20, 18 << 20
DNS, KERBEROS, SMB, HTTPS = UDP + 54, TCP + 89, TCP + 446, TCP + 444
SMTP, RDP, SSH, WINRM, SQL = TCP + 26, TCP + 3390, TCP + 23, TCP + 5986, TCP + 1434

BENIGN, CREDENTIALS, LATERAL = 0, 1, 2


@dataclass(frozen=True)
class Enterprise:
    """Distinct contacts of each window, in order; `kind` i8[c] of each (0 benign), `first` bool[c] never met before."""

    hosts: HostTable
    window: np.ndarray
    src: np.ndarray
    dst: np.ndarray
    service: np.ndarray
    kind: np.ndarray
    first: np.ndarray
    windows: int

    def contacts(self, begin: int, end: int) -> Contacts:
        """Contacts begin:end as one run."""
        part = slice(begin, end)
        return make_contacts(self.hosts, self.window[part], self.src[part], self.dst[part], self.service[part])

    def each_window(self) -> list[slice]:
        edges = [0, *(np.flatnonzero(np.diff(self.window)) + 1).tolist(), len(self.window)]
        return [slice(a, b) for a, b in pairwise(edges)]

    def inside(self, hosts: HostTable) -> np.ndarray:
        return np.array([not name.startswith("site") for name in hosts.names.to_pylist()], np.bool_)


def make_contacts(
    hosts: HostTable, window: np.ndarray, src: np.ndarray, dst: np.ndarray, service: np.ndarray
) -> Contacts:
    """Contacts of one answered flow each."""
    c = len(src)
    ones, zeros, wide = np.ones(c, np.int32), np.zeros(c, np.int32), np.zeros(c, np.int64)
    windows, offsets = np.unique(window, return_index=True)
    edges = np.append(offsets, c).astype(np.int64)
    return Contacts(
        hosts=hosts, window=window.astype(np.int64), src=src.astype(np.int32), dst=dst.astype(np.int32),
        service=service.astype(np.int32), flows=ones, answered=ones, failed=zeros, packets_fwd=wide, packets_rev=wide,
        bytes_fwd=wide, bytes_rev=wide, first_ns=wide, last_ns=wide, kept=np.ones(c, np.bool_),
        told=np.ones(c, np.bool_), tries=np.zeros(c), of_flow=np.arange(c, dtype=np.int32), offsets=edges,
        windows=windows.astype(np.int64), flow_offsets=edges,
    )  # fmt: skip


class _World:
    def __init__(self, rng: np.random.Generator, departments: int, people: int) -> None:
        self.rng = rng
        self.names: list[str] = []
        add = self._add
        self.department: list[int] = []
        self.stations = np.array([add(f"ws{i:03d}") for i in range(departments * people)])
        self.home = np.repeat(np.arange(departments), people)
        self.files = [np.array([add(f"file{d}{k}") for k in range(5)]) for d in range(departments)]
        self.apps = [np.array([add(f"app{d}{k}") for k in range(8)]) for d in range(departments)]
        self.sql = [add(f"sql{d}") for d in range(departments)]
        self.core = [np.array([add(f"core{k}")]) for k in range(2)]
        self.mail, self.intranet = np.array([add("mail")]), np.array([add(f"intra{k}") for k in range(6)])
        self.builds = np.array([add(f"build{k}") for k in range(5)])
        self.sites = np.array([add(f"site{k}") for k in range(400)])
        self.admins = rng.choice(self.stations, 5, replace=False)
        self.developers = set(rng.choice(self.stations, len(self.stations) // 8, replace=False).tolist())

    def _add(self, name: str) -> int:
        self.names.append(name)
        return len(self.names) - 1

    def habits(self, i: int, department: int) -> list[tuple[np.ndarray, int, float]]:
        """(targets, service, rate) of one workstation."""
        usual = [
            (np.concatenate(self.core), DNS, 0.5), (np.concatenate(self.core), KERBEROS, 0.15),
            (self.files[department], SMB, 0.03), (self.apps[department], HTTPS, 0.04), (self.mail, SMTP, 0.08),
            (self.intranet, HTTPS, 0.05), (self.sites, HTTPS, 0.01),
        ]  # fmt: skip
        if self.stations[i] in self.developers:
            usual += [(self.builds, SSH, 0.1), (self.builds, HTTPS, 0.05)]
        if self.stations[i] in self.admins:
            servers = np.concatenate([*self.files, *self.apps, self.builds])
            usual += [(servers, RDP, 0.03), (servers, WINRM, 0.03), (self.stations, RDP, 0.01)]
        return usual


def enterprise(seed: int, *, departments: int = 6, people: int = 45, windows: int = 900) -> Enterprise:
    """A few hundred hosts over `windows` windows."""
    rng = np.random.default_rng(seed)
    world = _World(rng, departments, people)
    rows: list[np.ndarray] = []

    def meet(window: Any, src: Any, dst: Any, service: int, kind: int) -> None:
        parts = np.broadcast_arrays(window, src, dst, service, kind)
        rows.append(np.stack(parts, -1).reshape(-1, 5).astype(np.int64))

    site_rank = 1 / np.arange(1, len(world.sites) + 1)
    for i, station in enumerate(world.stations):
        join = 0 if rng.random() < 0.5 else int(rng.integers(windows * 9 // 10))
        moves = int(rng.integers(windows)) if rng.random() < 0.04 else windows
        other = int(rng.integers(departments))
        for begin, end, department in ((join, moves, world.home[i]), (moves, windows, other)):
            for targets, service, rate in world.habits(i, department):
                count = rng.poisson(rate * max(end - begin, 0))
                odds = site_rank if targets is world.sites else 1 / np.arange(1, len(targets) + 1) ** 0.7
                known = rng.choice(targets, count, p=odds / odds.sum())
                meet(rng.integers(begin, max(end, begin + 1), count), station, known, service, BENIGN)
        for _ in range(rng.poisson(0.08)):  # somebody else's server, for a while
            pool, service = ((world.files, SMB), (world.apps, HTTPS))[int(rng.integers(2))]
            target = rng.choice(pool[int(rng.integers(departments))])
            meet(rng.integers(join, windows), station, target, service, BENIGN)
    for d in range(departments):
        for server in (*world.apps[d], *world.files[d]):
            meet(rng.integers(0, windows, windows // 10), server, world.sql[d], SQL, BENIGN)
            meet(rng.integers(0, windows, windows // 10), server, world.core[0][0], DNS, BENIGN)
    for _ in range(windows // 10):  # colleagues share files
        d = int(rng.integers(departments))
        a, b = rng.choice(world.stations[world.home == d], 2, replace=False)
        meet(rng.integers(windows), a, b, SMB, BENIGN)
    for _ in range(12):
        intruder = int(rng.integers(len(world.stations)))
        start = int(rng.integers(windows // 2, windows * 9 // 10))
        others = [d for d in range(departments) if d != world.home[intruder]]
        for d in rng.choice(others, 2, replace=False):
            for pool, service in ((world.files, SMB), (world.apps, HTTPS)):
                targets = rng.choice(pool[d], 2, replace=False)
                meet(start + rng.integers(0, windows // 10, 2), world.stations[intruder], targets, service, CREDENTIALS)
    for _ in range(8):
        intruder = int(rng.integers(len(world.stations)))
        start = int(rng.integers(windows // 2, windows * 9 // 10))
        for service in (SMB, RDP, WINRM):
            meet(
                start + rng.integers(0, windows // 10, 2),
                world.stations[intruder],
                rng.choice(world.stations, 2),
                service,
                LATERAL,
            )
    table = np.concatenate(rows)
    table = table[np.argsort(table[:, 0], kind="stable")]
    _, once = np.unique(table[:, :4], axis=0, return_index=True)
    table = table[np.sort(once)]
    table = table[table[:, 1] != table[:, 2]]
    _, earliest = np.unique(table[:, 1:4], axis=0, return_index=True)
    first = np.zeros(len(table), np.bool_)
    first[earliest] = True
    names = pa.array(world.names)
    window, src, dst, service, kind = table.T
    return Enterprise(HostTable(names, hash_names(names)), window, src, dst, service, kind, first, windows)
