"""What is wrong, kind by kind: an intruder in a network does it, and the flows of it are the truth.

A `Scene` is all that an attack needs to know, so the same attacks go into the simulated enterprise and, as injections,
into recordings of real networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flowsage.pipelines.enterprise.flows import REFUSED, UDP, UNANSWERED, Flows, Ints, sizes

MINUTE, HOUR = 60.0, 3_600.0


@dataclass(frozen=True)
class Scene:
    """Who is where, as host numbers of `Flows`.

    attacker   the host that misbehaves; victim: the one that it goes for, where it goes for one
    inside     other internal hosts; silent: internal addresses nobody has
    foreign    servers that are not the attacker's business, and foreign_ports, the service of each
    outside    the intruder's own machine; crowd: many outside hosts
    known      an outside site that others use, on known_port, and the attacker has not: a service to hide in
    begin_s, end_s   when the attack may begin, and when it has to be over
    """

    attacker: int
    victim: int
    inside: Ints
    silent: Ints
    foreign: Ints
    foreign_ports: Ints
    outside: int
    crowd: Ints
    known: int
    known_port: int
    begin_s: float
    end_s: float


def _answers(f: Flows, scene: Scene, targets: Ints) -> np.ndarray:
    """Hosts that are there refuse, the others are silent."""
    return np.where(np.isin(targets, scene.inside), REFUSED, UNANSWERED)


def _targets(f: Flows, scene: Scene, count: int) -> Ints:
    """`count` addresses, of which a third exist."""
    there = f.rng.permutation(scene.inside)[: max(1, count // 3)]
    return f.rng.permutation(np.concatenate((there, scene.silent[: count - len(there)])))


def fast_scan(f: Flows, s: Scene, i: int) -> None:
    """Two hundred addresses, one port, ten a second."""
    targets = _targets(f, s, 200)
    f.add(s.begin_s + np.arange(len(targets)) * 0.1, s.attacker, targets, int(f.rng.choice([22, 445, 3_389, 80])),
          state=_answers(f, s, targets), attack=i)  # fmt: skip


def slow_scan(f: Flows, s: Scene, i: int) -> None:
    """Forty addresses, one every two minutes."""
    targets = _targets(f, s, 40)
    at = s.begin_s + np.cumsum(f.rng.uniform(60.0, 180.0, len(targets)))
    f.add(at, s.attacker, targets, 445, state=_answers(f, s, targets), attack=i)


def port_scan(f: Flows, s: Scene, i: int) -> None:
    """The first five hundred ports of one host in half a minute; three are open."""
    ports = f.rng.permutation(np.arange(1, 501))
    state = np.where(np.isin(ports, (22, 80, 443)), 0, REFUSED)
    f.add(s.begin_s + np.arange(500) * 0.06, s.attacker, s.victim, ports, out=200.0, back=200.0, state=state, attack=i)


def slow_port_scan(f: Flows, s: Scene, i: int) -> None:
    """Sixty ports of one host, one a minute."""
    ports = f.rng.permutation(np.arange(1, 1_001))[:60]
    at = s.begin_s + np.cumsum(f.rng.uniform(40.0, 80.0, len(ports)))
    f.add(at, s.attacker, s.victim, ports, state=REFUSED, attack=i)


def guessing(f: Flows, s: Scene, i: int) -> None:
    """Four hundred log-ins in ten minutes."""
    at = s.begin_s + np.sort(f.rng.random(400)) * 10 * MINUTE
    f.add(at, s.attacker, s.victim, 22, out=sizes(f.rng, 1_900, 400, 0.1), back=sizes(f.rng, 2_300, 400, 0.1),
          lasts=2.0, attack=i)  # fmt: skip


def slow_guessing(f: Flows, s: Scene, i: int) -> None:
    """Sixty log-ins, one every three minutes or so."""
    at = s.begin_s + np.cumsum(f.rng.exponential(150.0, 60))
    f.add(at, s.attacker, s.victim, 3_389, out=sizes(f.rng, 2_500, 60, 0.1), back=sizes(f.rng, 2_100, 60, 0.1),
          lasts=2.0, attack=i)  # fmt: skip


def worm(f: Flows, s: Scene, i: int) -> None:
    """It tries one service everywhere, and ten minutes later goes on from the hosts that gave in."""
    targets = _targets(f, s, 120)
    falls = np.isin(targets, s.inside) & (f.rng.random(len(targets)) < 0.4)
    at = s.begin_s + np.arange(len(targets)) * 0.5
    f.add(at, s.attacker, targets, 445, out=6_000.0, back=2_000.0,
          state=np.where(falls, 0, _answers(f, s, targets)), attack=i)  # fmt: skip
    for fallen in targets[falls][:4].tolist():
        again = _targets(f, s, 60)
        begin = s.begin_s + 10 * MINUTE + f.rng.random() * 5 * MINUTE
        f.add(begin + np.arange(len(again)) * 0.5, fallen, again, 445, state=_answers(f, s, again), attack=i)


def flood(f: Flows, s: Scene, i: int) -> None:
    """Fifteen hundred connections to one server in two minutes."""
    at = s.begin_s + np.sort(f.rng.random(1_500)) * 2 * MINUTE
    f.add(at, s.attacker, s.victim, 80, out=100.0, back=0.0, state=UNANSWERED, attack=i)


def distributed_flood(f: Flows, s: Scene, i: int) -> None:
    """The same from a thousand places, on a service that it offers."""
    at = s.begin_s + np.sort(f.rng.random(1_500)) * 5 * MINUTE
    f.add(at, s.crowd[f.rng.integers(0, min(1_000, len(s.crowd)), 1_500)], s.victim, 443, out=300.0, back=100.0,
          state=np.where(f.rng.random(1_500) < 0.3, 0, UNANSWERED), attack=i)  # fmt: skip


def lateral(f: Flows, s: Scene, i: int) -> None:
    """By an administrator's services to six hosts within the hour; all let it in."""
    targets = f.rng.permutation(s.inside)[:6]
    at = s.begin_s + np.sort(f.rng.random(len(targets))) * 50 * MINUTE
    f.add(at, s.attacker, targets, f.rng.choice([445, 3_389, 5_985], len(targets)),
          out=sizes(f.rng, 60_000, len(targets)), back=sizes(f.rng, 90_000, len(targets)),
          lasts=120.0, attack=i)  # fmt: skip


def credentials(f: Flows, s: Scene, i: int) -> None:
    """Another department's credentials: its servers, by the services that everybody uses, a few flows each."""
    count = min(4, len(s.foreign))
    which = f.rng.permutation(len(s.foreign))[:count]
    again = np.repeat(which, 3)
    at = s.begin_s + np.sort(f.rng.random(len(again))) * 40 * MINUTE
    f.add(at, s.attacker, s.foreign[again], s.foreign_ports[again], out=sizes(f.rng, 3_000, len(again)),
          back=sizes(f.rng, 60_000, len(again), 1.2), lasts=3.0, attack=i)  # fmt: skip


def _beacon(period: float, beats: int, jitter: float, *, hidden: bool = False) -> Callable[[Flows, Scene, int], None]:
    def beacon(f: Flows, s: Scene, i: int) -> None:
        count = max(4, min(beats, int((s.end_s - s.begin_s) / period)))
        at = s.begin_s + (np.arange(count) + f.rng.uniform(-jitter, jitter, count)) * period
        target, port = (s.known, s.known_port) if hidden else (s.outside, 443)
        f.add(at, s.attacker, target, port, out=sizes(f.rng, 450, count, 0.1), back=sizes(f.rng, 350, count, 0.1),
              attack=i)  # fmt: skip

    where = "a site that others use" if hidden else "the intruder"
    beacon.__doc__ = f"Every {period:g} s ± {100 * jitter:g} % a few bytes to {where}, at most {beats} times."
    return beacon


def exfiltration(f: Flows, s: Scene, i: int) -> None:
    """Three hundred megabytes to the intruder in five minutes."""
    at = s.begin_s + np.arange(10) * 30.0
    f.add(at, s.attacker, s.outside, 443, out=sizes(f.rng, 3e7, 10, 0.2), back=2e5, lasts=25.0, attack=i)


def drip(f: Flows, s: Scene, i: int) -> None:
    """Forty megabytes over four hours."""
    at = s.begin_s + np.sort(f.rng.random(80)) * min(4 * HOUR, s.end_s - s.begin_s)
    f.add(at, s.attacker, s.outside, 443, out=sizes(f.rng, 5e5, 80, 0.4), back=9_000.0, lasts=4.0, attack=i)


def dns_tunnel(f: Flows, s: Scene, i: int) -> None:
    """Fifteen hundred fat questions to a name server of the intruder's in twenty minutes."""
    at = s.begin_s + np.sort(f.rng.random(1_500)) * 20 * MINUTE
    f.add(at, s.attacker, s.outside, 53, proto=UDP, out=sizes(f.rng, 230, 1_500, 0.1),
          back=sizes(f.rng, 180, 1_500, 0.3), lasts=0.05, attack=i)  # fmt: skip


def long_session(f: Flows, s: Scene, i: int) -> None:
    """A remote shell that stays open for hours, told every five minutes as sensors do."""
    at = s.begin_s + np.arange(max(6, min(36, int((s.end_s - s.begin_s) / 300.0)))) * 300.0
    f.add(at, s.attacker, s.outside, 4_443, out=sizes(f.rng, 40_000, len(at)),
          back=sizes(f.rng, 20_000, len(at)), lasts=299.0, src_port=51_515, attack=i)  # fmt: skip


ATTACKS: dict[str, Callable[[Flows, Scene, int], None]] = {
    "fast-scan": fast_scan,
    "slow-scan": slow_scan,
    "port-scan": port_scan,
    "slow-port-scan": slow_port_scan,
    "guessing": guessing,
    "slow-guessing": slow_guessing,
    "worm": worm,
    "flood": flood,
    "distributed-flood": distributed_flood,
    "lateral": lateral,
    "credentials": credentials,
    "beacon-30s": _beacon(30.0, 120, 0.1),
    "beacon-60s": _beacon(60.0, 120, 0.1),
    "beacon-5min": _beacon(300.0, 60, 0.1),
    "beacon-hour": _beacon(3_600.0, 40, 0.05),
    "beacon-hidden": _beacon(120.0, 90, 0.05, hidden=True),
    "exfiltration": exfiltration,
    "drip": drip,
    "dns-tunnel": dns_tunnel,
    "long-session": long_session,
}
"""Twenty kinds."""
