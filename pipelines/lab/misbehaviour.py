"""Which misbehaviours the lab knows: who does each, towards whom, with which parameters."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowsage.collector.errors import FlowsageError, UsageError
from flowsage.pipelines.lab.plan import ADDRESS, BY_NAME, INSIDE


@dataclass(frozen=True)
class Attack:
    """A misbehaviour: who does it unless told otherwise, its destination ports (empty: many), its parameters."""

    name: str
    what: str
    technique: str
    """MITRE ATT&CK."""
    attacker: str
    ports: tuple[int, ...]
    parameters: Mapping[str, Any]
    proto: str = "tcp"


_PORTS_OF_SLOW_SCAN = (22, 23, 135, 3306, 3389, 5900, 8443)

ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        Attack("scan", "nmap's SYN scan of every inside host", "T1046", "office2", (), {"top_ports": 100, "rate": 200}),
        Attack(
            "slow-scan",
            "a new target every few seconds, one port each",
            "T1046",
            "dev2",
            _PORTS_OF_SLOW_SCAN,
            {"period_s": 3.0},
        ),
        Attack("worm", "one port of many hosts, used or not", "T1210", "office3", (445,), {"port": 445, "rate": 4.0}),
        Attack(
            "guess",
            "wrong SSH passwords against the jump host",
            "T1110.001",
            "fin1",
            (22,),
            {"attempts": 60, "period_s": 0.5},
        ),
        Attack(
            "beacon",
            "a small request to a command server outside, at a period with jitter",
            "T1071.001",
            "dev3",
            (443,),
            {"port": 443, "period_s": 4.0, "jitter": 0.1, "beats": 40},
        ),
        Attack(
            "exfil",
            "a large upload to a drop zone outside",
            "T1048",
            "fin2",
            (443,),
            {"port": 443, "bytes": 40_000_000, "bytes_per_s": 3_000_000, "parts": 2},
        ),
        Attack(
            "flood",
            "connections to the intranet's web server, faster than anyone needs them",
            "T1499.002",
            "dev1",
            (80,),
            {"port": 80, "connections": 1500, "rate": 100.0},
        ),
    )
}
"""By name, each from a host of its own so that findings can be told apart."""


def prepare(
    name: str, attacker: str | None, seed: int, changes: Mapping[str, Any]
) -> tuple[Attack, str, dict[str, Any]]:
    """The attack, its attacker's host name, and its parameters in full: targets drawn, `changes` applied.

    Raises UsageError for an unknown attack, host or parameter, FlowsageError where a tool is missing.
    """
    attack = ATTACKS.get(name)
    if attack is None:
        raise UsageError(f"no misbehaviour is called {name!r}: choose from {', '.join(ATTACKS)}")
    host = attacker or attack.attacker
    if host not in BY_NAME:
        raise UsageError(f"no host of the lab is called {host!r}: choose from {', '.join(BY_NAME)}")
    if name == "scan" and shutil.which("nmap") is None:
        raise FlowsageError("the scan needs nmap, which is not installed: apt install nmap")
    dice = random.Random(f"{seed}:{name}:{host}")
    targets = _targets(name, BY_NAME[host].address, dice)
    parameters = {**attack.parameters, "seed": seed, "ports": list(attack.ports), "targets": targets}
    if unknown := set(changes) - set(parameters):
        known = ", ".join(sorted(parameters))
        raise UsageError(f"{name} has no parameter {', '.join(sorted(unknown))}: choose from {known}")
    return attack, host, {**parameters, **changes}


def _targets(name: str, own: str, dice: random.Random) -> list[str]:
    """Addresses that an attack goes for, in order: of inside hosts, and of unused ones where it cannot know better."""
    inside = [address for address in INSIDE if address != own]
    dark = [f"10.77.9.{n}" for n in range(20, 250)]
    match name:
        case "scan":
            return inside
        case "slow-scan" | "worm":
            mixed = inside + dice.sample(dark, 23 if name == "slow-scan" else 83)
            dice.shuffle(mixed)
            return mixed
        case "guess":
            return [ADDRESS["jump"]]
        case "beacon":
            return [ADDRESS["c2"]]
        case "flood":
            return [ADDRESS["web"]]
        case _:
            return [ADDRESS["dropzone"]]
