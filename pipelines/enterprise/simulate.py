"""The simulation: a network, its habits, and intruders in it, as one flow file with its truth."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any

import numpy as np
import pyarrow as pa

from flowsage.collector.errors import ConfigurationError
from flowsage.pipelines.enterprise import habits
from flowsage.pipelines.enterprise.attacks import ATTACKS, HOUR, Scene
from flowsage.pipelines.enterprise.flows import Flows, Ints
from flowsage.pipelines.enterprise.network import DAY, Network, build
from flowsage.pipelines.lab.truth import Step, Truth

MONDAY = date(2026, 1, 5)


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What to simulate.

    start    the first day, from midnight UTC on; Saturdays and Sundays are weekends
    days     how long it goes on
    hosts    internal hosts, workstations and servers
    repeats  attacks of each kind, spread over working hours of the time after `quiet` (a share of all)
    attacks  the kinds, of ATTACKS
    """

    start: date = MONDAY
    days: float = 4.0
    hosts: int = 300
    seed: int = 0
    repeats: int = 2
    quiet: float = 0.25
    attacks: tuple[str, ...] = tuple(ATTACKS)

    def __post_init__(self) -> None:
        """Refuse what cannot be (ConfigurationError)."""
        if self.days <= 0 or self.hosts < 40 or self.repeats < 0 or not 0 <= self.quiet < 1:
            raise ConfigurationError(
                f"a simulation of {self.days:g} days, {self.hosts} hosts and {self.repeats} attacks of a kind cannot "
                "be: days must be above 0, hosts at least 40, attacks not negative"
            )
        unknown = set(self.attacks) - set(ATTACKS)
        if unknown:
            raise ConfigurationError(f"no attack is called {min(unknown)!r}; there are {', '.join(ATTACKS)}")


def simulate(settings: Simulation) -> tuple[pa.Table, list[Truth]]:
    """Flows in order of time with `label` and `attack` ("lateral#3"), and the truth about each incident.

    Deterministic: the same settings give the same table.
    """
    span = settings.days * DAY
    begin = datetime.combine(settings.start, time(), UTC)
    f = Flows(np.random.default_rng([settings.seed, 6]), round(begin.timestamp()) * 10**9)
    net = build(f, settings.hosts, span)
    work = habits.Work(f, net, span)
    habits.people(f, net, work)
    habits.machines(f, net, work, span)
    habits.servers(f, net, work, span)
    habits.nights(f, net, span)
    habits.events(f, net, work, span)
    intruders(f, net, settings, span)
    table = f.table(span)
    return table, truths(table)


def intruders(f: Flows, net: Network, settings: Simulation, span_s: float) -> None:
    """Attacks, each by a workstation of its own as far as there are enough, in working hours."""
    rng, count = f.rng, Counter[str]()
    kinds = [kind for _ in range(settings.repeats) for kind in settings.attacks]
    settled = np.flatnonzero(net.joins <= 0.5 * settings.quiet * span_s)
    chosen = np.resize(rng.permutation(settled), len(kinds))
    for kind, who in zip(rng.permutation(kinds).tolist(), chosen.tolist(), strict=True):
        begin = _working_hour(f, settings.quiet * span_s, span_s)
        i = f.attack(f"{kind}#{count[kind]}")
        count[kind] += 1
        ATTACKS[kind](f, _scene(f, net, who, begin, span_s), i)


def _working_hour(f: Flows, first_s: float, last_s: float) -> float:
    """A moment between nine and four of a weekday, of which there is left at least an hour if that can be."""
    for _ in range(1_000):
        at = float(f.rng.uniform(first_s, max(first_s, last_s - HOUR)))
        if not f.weekend(int(at // DAY)) and 9 * HOUR <= at % DAY < 16 * HOUR:
            return at
    return float(f.rng.uniform(first_s, max(first_s, last_s - HOUR)))


def _scene(f: Flows, net: Network, who: int, begin_s: float, span_s: float) -> Scene:
    rng, attacker = f.rng, int(net.stations[who])
    mine = int(net.department_at(np.array([begin_s]), np.array([who]))[0])
    others = [d for i, d in enumerate(net.departments) if i != mine]
    foreign = np.concatenate([np.r_[d.files, d.apps] for d in others])
    ports = np.concatenate([np.r_[np.full(len(d.files), 445), np.full(len(d.apps), 443)] for d in others])
    inside: Ints = np.concatenate((net.stations[net.joins <= begin_s], net.servers))
    silent = f.hosts([f"10.{mine + 1}.{9 + k // 200}.{k % 200 + 10}" for k in range(240)])
    unused = 60_001 + int(rng.integers(0, 30_000))
    machine = f.host(f"198.{18 + unused // 50_000}.{unused // 200 % 250}.{unused % 200 + 1}")
    return Scene(
        attacker=attacker, victim=int(rng.choice(np.concatenate((others[0].apps, net.intranet, net.builds)))),
        inside=inside[inside != attacker], silent=silent, foreign=foreign, foreign_ports=ports, outside=machine,
        crowd=f.hosts([f"100.{128 + k // 40_000}.{k // 200 % 200}.{k % 200 + 1}" for k in range(1_000)]),
        known=int(net.outside[200 + int(rng.integers(0, 200))]), known_port=443, begin_s=begin_s, end_s=span_s,
    )  # fmt: skip


def truths(table: pa.Table) -> list[Truth]:
    """The truth about each incident, from the labels of the flows."""
    bad = table.filter(table.column("label").to_numpy() == 1).select(
        ["attack", "start_ns", "end_ns", "src_ip", "dst_ip", "src_port", "dst_port", "proto"]
    )
    bad = bad.set_column(3, "src_ip", bad.column("src_ip").cast(pa.string())).set_column(
        4, "dst_ip", bad.column("dst_ip").cast(pa.string())
    )
    incidents: dict[str, list[dict[str, Any]]] = {}
    for row in bad.to_pylist():
        incidents.setdefault(row["attack"], []).append(row)
    found = []
    for name, rows in incidents.items():
        sources = Counter(str(r["src_ip"]) for r in rows)
        first = str(rows[0]["src_ip"])
        steps = tuple(Step(r["start_ns"], str(r["dst_ip"]), r["dst_port"], r["src_port"]) for r in rows)
        ports = tuple(dict.fromkeys(s.port for s in steps))
        found.append(
            Truth(
                id=name, attack=name.partition("#")[0], attacker=first, address=first,
                proto="udp" if rows[0]["proto"] == 17 else "tcp", targets=tuple(dict.fromkeys(s.target for s in steps)),
                ports=ports if len(ports) <= 16 else (), start_ns=steps[0].time_ns,
                end_ns=max(r["end_ns"] for r in rows), status="done",
                parameters={"flows": len(rows), "sources": len(sources)}, steps=steps,
            )
        )  # fmt: skip
    return found
