"""From the kernel's monotonic clock to Unix time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

SECOND = 1_000_000_000
CLOCK_STEP_NS = 1_000_000
"""A change of (Unix time − monotonic time) below this is noise of the measurement: the offset in use stays."""


class UnixClock:
    """Turns the kernel's monotonic times into Unix times.

    The offset is measured at each drain, between two readings of the monotonic clock, and adopted only where it differs
    from the one in use by more than `CLOCK_STEP_NS`: times of a flow follow a clock that is set, and never jitter.
    `steps` counts adoptions after the first.
    """

    def __init__(
        self,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        realtime_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.monotonic_ns = monotonic_ns
        self._realtime_ns = realtime_ns
        self.steps = 0
        self.offset_ns = self._measure()

    def _measure(self) -> int:
        best, offset = 1 << 62, 0
        for _ in range(3):
            before, unix, after = self.monotonic_ns(), self._realtime_ns(), self.monotonic_ns()
            if after - before < best:
                best, offset = after - before, unix - (before + after) // 2
        return offset

    def update(self) -> int:
        """The offset to use now, nanoseconds."""
        offset = self._measure()
        if abs(offset - self.offset_ns) > CLOCK_STEP_NS:
            self.steps += 1
            logger.warning("the system's clock was set by %+.3f s", (offset - self.offset_ns) / SECOND)
            self.offset_ns = offset
        return self.offset_ns
