"""Habits: hosts whose role it is to do what an analytic tells, from what was told of them before.

A build machine meets hosts that its like do not meet, a monitor calls like a clock; whoever was told so twice knows.
So from the third finding of a host and an analytic on, that nothing of another family has borne out, one is told only
where it is clearly stronger than all before. What fails or asks for passwords is never somebody's role.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from flowsage.models.analytics import TABLE

HALF = 3.5 * 86_400.0
"""Seconds, divided by time_scale, in which what was told counts half."""

KNOWN = 1.25
"""Findings, faded, from which it is known: two within a day or two."""

CLEARLY = 1.0
"""Excess beyond all that was told from which it is told again, nats."""

MOST_COUNT = 3.0
"""It counts as so many at most, so that what is over is forgotten."""

ROOM = 4096
"""Hosts and analytics that are remembered; those not seen for longest go first."""

NEVER = "scan", "credential"
"""Families of which there is no habit."""


@dataclass
class Habit:
    """Findings of one host and analytic: how many, as of when, the largest excess told; and when last seen, asked."""

    count: float
    at_ns: int
    most: float
    seen_ns: int


class Habits:
    """What was told of which host and analytic.

    >>> habits, meeting, day = Habits(), 14, 86_400 * 10**9
    >>> for k in range(2):
    ...     habits.told("builder", meeting, 3.0, k * day)
    >>> [habits.usual("builder", meeting, excess, 2 * day) for excess in (3.5, 4.5)]
    [True, False]
    """

    def __init__(self, time_scale: float = 1.0) -> None:
        self._half_ns = HALF * 1e9 / time_scale
        self.known: dict[tuple[str, int], Habit] = {}

    def told(self, host: str, analytic: int, excess: float, now_ns: int) -> None:
        """A finding has begun."""
        if not self._concerns(analytic):
            return
        habit = self.known.pop((host, analytic), None) or Habit(0.0, now_ns, excess, now_ns)
        count = min(MOST_COUNT, self._count(habit, now_ns) + 1.0)
        self.known[host, analytic] = Habit(count, now_ns, max(habit.most, excess), now_ns)
        if len(self.known) > ROOM:
            del self.known[next(iter(self.known))]

    def bear_out(self, host: str, analytic: int) -> None:
        """Another family has joined a finding: it was no habit."""
        self.known.pop((host, analytic), None)

    def usual(self, host: str, analytic: int, excess: float, now_ns: int) -> bool:
        """Whether this need not be told."""
        habit = self.known.get((host, analytic))
        return habit is not None and self._count(habit, now_ns) >= KNOWN and excess < habit.most + CLEARLY

    def again(self, host: str, analytic: int, now_ns: int, quiet_ns: int) -> bool:
        """What is not told is there: whether it begins, after it has been quiet for `quiet_ns`. Then it counts."""
        habit = self.known[host, analytic]
        begins = now_ns - habit.seen_ns > quiet_ns
        if begins:
            self.told(host, analytic, habit.most, now_ns)
        self.known[host, analytic].seen_ns = now_ns
        return begins

    def state(self) -> list[list[Any]]:
        """As plain values for JSON."""
        return [[*key, asdict(habit)] for key, habit in self.known.items()]

    def restore(self, state: list[list[Any]]) -> None:
        """Take on what `state` describes."""
        self.known = {(host, analytic): Habit(**habit) for host, analytic, habit in state}

    @staticmethod
    def _concerns(analytic: int) -> bool:
        return TABLE[analytic].role == "source" and TABLE[analytic].family not in NEVER

    def _count(self, habit: Habit, now_ns: int) -> float:
        return habit.count * math.exp(-math.log(2.0) * (now_ns - habit.at_ns) / self._half_ns)
