"""Who is there: departments, roles, servers by service, the world outside."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from flowsage.pipelines.enterprise.flows import Flows, Ints

Bools = npt.NDArray[np.bool_]

OFFICE, DEVELOPER, ADMIN, HELPDESK = range(4)
ROLES = ("office", "developer", "admin", "helpdesk")
SHARES = (0.78, 0.16, 0.03, 0.03)
"""Of the workstations; at least two administrators and one at the helpdesk."""

HOUR, DAY = 3_600.0, 86_400.0


@dataclass(frozen=True)
class Department:
    """Servers of one department, host numbers."""

    files: Ints
    apps: Ints
    sql: int
    printers: Ints


@dataclass(frozen=True)
class Network:
    """Hosts by number. Arrays over workstations have length w."""

    stations: Ints
    """[w] host numbers."""
    home: Ints
    """[w] department; from `moves` s on, `moved_to`."""
    moves: npt.NDArray[np.float64]
    moved_to: Ints
    role: Ints
    """[w] index into ROLES."""
    joins: npt.NDArray[np.float64]
    """[w] seconds at which it first appears; 0 for most."""
    always_on: Bools
    """[w] never switched off."""
    departments: list[Department]
    core: Ints
    """Directory and name servers, two."""
    mail: int
    intranet: Ints
    builds: Ints
    backup: int
    management: int
    """Updates, virus definitions, inventory."""
    monitor: int
    crawler: int
    dmz: Ints
    """What the world may reach: a web server, a mail relay, a file exchange."""
    retired: int
    """A file server that is no more; some still ask for it."""
    rollout: int
    """A server that comes into use in mid-simulation."""
    outside: Ints
    """Sites of the outside world, the most visited first."""
    clouds: Ints
    """Sites that files are shared through."""
    resolvers: Ints
    visitors: Ints
    """Outside hosts that visit the DMZ."""
    servers: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    """All internal servers."""

    def department_at(self, at: npt.NDArray[np.float64], who: Ints) -> Ints:
        """Department i8[n] of workstations `who` i8[n] (indices) at times f8[n]."""
        chosen: Ints = np.where(at < self.moves[who], self.home[who], self.moved_to[who])
        return chosen


def build(flows: Flows, hosts: int, span_s: float) -> Network:
    """A network of about `hosts` internal hosts for a simulation of `span_s` seconds."""
    rng = flows.rng
    count = max(2, round(hosts / 60))
    stations = max(12, hosts - 8 * count - 18)
    home = np.sort(rng.integers(0, count, stations))
    role = rng.choice(len(ROLES), stations, p=SHARES)
    role[rng.choice(stations, 3, replace=False)] = ADMIN, ADMIN, HELPDESK
    joins = np.where(rng.random(stations) < 0.08, rng.uniform(0.15, 0.9, stations) * span_s, 0.0)
    moves = np.where(rng.random(stations) < 0.03, rng.uniform(0.2, 0.9, stations) * span_s, np.inf)

    def many(kind: str, number: int, first: int) -> Ints:
        return flows.hosts([f"10.{kind}.{first + i}" for i in range(number)])

    departments = [
        Department(
            files=many(f"0.{d + 10}", 2, 11), apps=many(f"0.{d + 10}", 4, 21),
            sql=flows.host(f"10.0.{d + 10}.31"), printers=many(f"0.{d + 10}", 1, 41),
        )
        for d in range(count)
    ]  # fmt: skip
    place = np.zeros(count, np.int64)
    names = []
    for d in home.tolist():
        names.append(f"10.{d + 1}.{place[d] // 200}.{place[d] % 200 + 10}")
        place[d] += 1
    world = rng.permutation(60_000)

    def abroad(first: int, number: int) -> Ints:
        part = world[first : first + number].tolist()
        return flows.hosts([f"198.{18 + n // 50_000}.{n // 200 % 250}.{n % 200 + 1}" for n in part])

    core, intranet, builds = many("0.0", 2, 2), many("0.0", 4, 20), many("0.0", 4, 30)
    single = many("0.0", 7, 40)
    servers = np.concatenate(
        [core, intranet, builds, single[[0, 1, 2, 3, 4]], many("9.0", 3, 2)]
        + [np.r_[d.files, d.apps, d.sql] for d in departments]
    )
    return Network(
        stations=flows.hosts(names), home=home, moves=moves, moved_to=rng.integers(0, count, stations), role=role,
        joins=joins, always_on=rng.random(stations) < 0.3, departments=departments, core=core, mail=int(single[0]),
        intranet=intranet, builds=builds, backup=int(single[1]), management=int(single[2]), monitor=int(single[3]),
        crawler=int(single[4]), dmz=many("9.0", 3, 2), retired=int(single[5]), rollout=int(single[6]),
        outside=abroad(0, 4_000), clouds=abroad(4_000, 5), resolvers=abroad(4_010, 2), visitors=abroad(5_000, 20_000),
        servers=servers,
    )  # fmt: skip
