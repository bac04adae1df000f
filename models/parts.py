"""Parts: what one host does by one analytic within an episode, when that last grew, and whether it begins again.

An episode lasts as long as anything of it does, and a level remembers for hours. So that it does not swallow what has
nothing to do with it, each of its parts knows the cause that it began with (the peer, the service, where there is one)
and the course of its level: after it stopped growing, a level that rises again from what was left is a new wave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Cause = tuple[str | None, int | None]
"""The one peer, and the code of the one service, that most of it is of."""

GREW = 0.1
"""A level has grown when x is so much above its highest, nats."""

RECEDED = 0.3
"""It has receded when its lowest since is so much below its highest."""

AGAIN = math.log(2.0)
"""It rises again when x is so much above the lowest since: the level has doubled."""


@dataclass
class Part:
    """One analytic of one host; of one of its pairs or services (`about`) where it looks at these.

    >>> part = Part("h", "target", 0, "", ("other", None), x=5.0, grew_ns=0)
    >>> part.see(7_200 * 10**9, x=5.0, tau=3_600.0)  # two hours later: as much again as then, not what is left of it
    >>> part.again(7_200 * 10**9, 900 * 10**9, 300 * 10**9), part.differs(("other", 80))
    (True, True)
    """

    host: str
    role: str
    analytic: int
    about: str
    cause: Cause | None
    """None: nobody asked."""
    x: float
    """ln(1 + level), as last seen; `high` its highest, `low` its lowest since it grew."""
    grew_ns: int
    last_ns: int = -1
    high: float = 0.0
    low: float = 0.0
    asked_ns: int = -(1 << 62)

    def __post_init__(self) -> None:
        """A part that begins is at its highest."""
        if self.last_ns < 0:
            self.last_ns, self.high, self.low = self.grew_ns, self.x, self.x

    def see(self, now_ns: int, x: float, tau: float) -> None:
        """Its level now; between alarms it has leaked away with `tau`, s (0: it does not)."""
        # What rises beyond its highest has grown, but for what has receded: that may be something new.
        if x > self.high + GREW and self.low > self.high - RECEDED:
            self.high = self.low = x
            self.grew_ns = now_ns
        else:
            left = self.x
            if tau > 0.0:
                left = math.log1p(math.expm1(left) * math.exp(-(now_ns - self.last_ns) / 1e9 / tau))
            self.low = min(self.low, left)
        self.x, self.last_ns = x, now_ns

    def again(self, now_ns: int, together_ns: int, throttle_ns: int) -> bool:
        """Whether it is a new wave of which nobody has asked just now."""
        if now_ns - self.grew_ns <= together_ns or self.x < self.low + AGAIN or now_ns - self.asked_ns < throttle_ns:
            return False
        self.asked_ns = now_ns
        return True

    def differs(self, cause: Cause) -> bool:
        """Whether a cause is another one: of a peer or a service that this one is not of."""
        if self.cause is None:
            return False
        return any(new is not None and new != old for new, old in zip(cause, self.cause, strict=True))

    def goes_on(self, now_ns: int, cause: Cause) -> None:
        """The new wave is of the same cause."""
        self.high = self.low = self.x
        self.grew_ns = now_ns
        self.cause = self.cause or cause
