"""A finding: one thing that a person should look at, with its evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Evidence:
    """Contacts of one (src, dst, service) that raised the level.

    observed is what they added, as of the alarm, in `unit`; expected the part of the key's record that is theirs, at
    most; share their part of all that raised it. text says it for a person, facts what else is known for a program.
    dst_port is None where the service has no one port; src_port is never known: many flows are one contact.
    """

    name: str
    src: str
    dst: str | None
    service: int | None
    proto: int | None
    dst_port: int | None
    observed: float
    expected: float
    unit: str
    first_ns: int
    last_ns: int
    flows: int
    src_port: int | None = None
    share: float = 0.0
    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One thing that a person should look at, as it stands at `told_ns`.

    uid stays the same from "create" through "update" to "close", and so does `alarm_ns`, when it was raised; `told_ns`
    is the end of the pane that had this told, later each time. Both are event time. p_value is that of the host in a
    block (10 · the smallest p of its analytics); severity is OCSF's severity_id: 2 low, 3 medium, 4 high, 5 critical.
    """

    uid: str
    activity: str
    host: str
    role: str
    peer: str | None
    analytic: str
    family: str
    start_ns: int
    alarm_ns: int
    told_ns: int
    end_ns: int | None
    p_value: float
    severity: int
    sentence: str
    technique: str | None
    evidence: tuple[Evidence, ...]
    observed: float = 0.0
    expected: float = 0.0
    unit: str = ""
    analytics: tuple[str, ...] = ()
    """Every analytic that spoke, in the order in which they did."""
    hosts: tuple[str, ...] = ()
    """Every host it speaks of, `host` first."""
    lead: str = ""
    """The analytic whose words and evidence it carries: `analytic`, or the strongest of several causes."""


def severity(p_host: float, allowed: float) -> int:
    """OCSF severity_id from how far p is within what the budget allows: 2 low to 5 critical, a step each 30 times."""
    return int(min(5, 2 + max(0.0, math.log(max(allowed, 1e-300) / max(p_host, 1e-300)) // math.log(30.0))))
