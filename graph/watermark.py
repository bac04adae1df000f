"""How far sensors have come in event time, and which of them are waited for.

A sensor's *watermark* is how far its records have come: what it says itself, or the latest start that it has sent. The
watermark of all is the least of those of the sensors that are heard of; one that is silent for `idle_timeout_ns` of the
clock is left out until it speaks again.

A sensor that says what time it has (`hear`) is left out too while it is more than `max_behind_ns` behind the clock and
comes no closer: its clock is wrong. One that works through a backlog comes closer, and is waited for. Where nobody is
in time, all are waited for. The least time of those that are waited for is the arrival.

What a sensor says about the future is believed with care. With a clock, no watermark counts beyond it. And a step of
more than `max_ahead_ns` needs `_WITNESSES` records in a row, so that a gap in a file is passed over and a single wrong
time is not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numba
import numpy as np

from flowsage.graph.flows import Int64

_WITNESSES = 16
_CLOSER = 1_000_000_000
"""A sensor comes closer to the clock when it gains so much, ns: less is a matter of how long its batches travel."""
NEVER = -(1 << 62)
_ALWAYS = 1 << 62


@dataclass
class SensorCounters:
    """What was not believed of sensors, since the start."""

    jumps: int = 0
    """Records held back from the watermark for being far ahead of their sensor's others."""
    idled: int = 0
    """Times that a sensor was left out of the watermark for its silence."""
    fell_behind: int = 0
    """Times that a sensor was left out for its clock."""


@dataclass
class _Sensor:
    watermark: int = NEVER
    time: int = NEVER
    """What it says the time is, as far as it is believed."""
    heard: int = 0
    idle: bool = False
    behind: bool = False
    lag: int = _ALWAYS
    """How far it was behind the clock when it last came closer, and when that was."""
    closer: int = 0
    witnesses: int = 0
    """Records in a row that were far ahead of the watermark, and the earliest of them."""
    witnessed: int = _ALWAYS


class Watermarks:
    """Those of all sensors, and the least of them.

    `now`, in what follows, is the time by the clock, ns; None where there is no clock. `reached` and `arrival` are
    NEVER before anybody has spoken, and never go back.
    """

    def __init__(
        self, counters: SensorCounters, *, idle_timeout_ns: int, max_ahead_ns: int, max_behind_ns: int
    ) -> None:
        self.reached = self.arrival = NEVER
        self.counters = counters
        self._idle_timeout_ns, self._max_ahead_ns, self._max_behind_ns = idle_timeout_ns, max_ahead_ns, max_behind_ns
        self._sensors: dict[str, _Sensor] = {}

    def hear(self, sensor: str, time_ns: int | None, now: int | None) -> None:
        """A sensor speaks, and says by its own clock that it is `time_ns` (None: it has the clock's time)."""
        state = self._sensors.setdefault(sensor, _Sensor())
        if now is not None:
            time = now if time_ns is None else min(time_ns, now)
            state.time = max(state.time, time)
            lag = now - time
            # After a silence it may have a backlog: then it is given time again.
            if lag <= state.lag - _CLOSER or now - state.heard > self._idle_timeout_ns:
                state.lag, state.closer = lag, now
            behind = lag > self._max_behind_ns and now - state.closer > self._idle_timeout_ns
            self.counters.fell_behind += behind and not state.behind
            state.behind = behind
        elif time_ns is not None:
            state.time = max(state.time, time_ns)
        self._awake(state, now)
        self.arrival = max(self.arrival, min((s.time for s in self._listening()), default=NEVER))

    def wake(self, sensor: str, now: int | None) -> None:
        """Records of a sensor have come: it is waited for again."""
        self._awake(self._sensors.setdefault(sensor, _Sensor()), now)

    def _awake(self, state: _Sensor, now: int | None) -> None:
        state.idle, state.heard = False, now or 0
        self.idle(now)

    def idle(self, now: int | None) -> None:
        """Leave out who has been silent for too long."""
        if now is None:
            return
        for state in self._sensors.values():
            if not state.idle and now - state.heard > self._idle_timeout_ns:
                state.idle = True
                self.counters.idled += 1

    def told(self, sensor: str, watermark_ns: int, now: int | None) -> None:
        """A sensor says itself how far it has come."""
        state = self._sensors[sensor]
        state.watermark = max(state.watermark, watermark_ns if now is None else min(watermark_ns, now))

    def advance(self, sensor: str, start_ns: Int64, now: int | None) -> Int64:
        """Move the sensor's watermark along its records [n]; returns what that of all was at each of them [n]."""
        state = self._sensors[sensor]
        others = min((s.watermark for s in self._listening() if s is not state), default=_ALWAYS)
        reached = np.empty(len(start_ns), np.int64)
        if len(start_ns):
            if state.watermark == NEVER:
                state.watermark = int(start_ns[:_WITNESSES].min())
            state.watermark, state.witnesses, state.witnessed, jumps = _walk(
                start_ns, _ALWAYS if now is None else now, self._max_ahead_ns,
                state.watermark, state.witnesses, state.witnessed, reached,
            )  # fmt: skip
            self.counters.jumps += jumps
        return np.maximum(np.minimum(reached, others), self.reached)

    def rise(self) -> None:
        """`reached` follows the sensors that are waited for."""
        self.reached = max(self.reached, min((s.watermark for s in self._listening()), default=NEVER))

    def _listening(self) -> list[_Sensor]:
        speaking = [s for s in self._sensors.values() if not s.idle]
        return [s for s in speaking if not s.behind] or speaking

    def state(self) -> dict[str, Any]:
        """Everything but the counters, as plain values for JSON."""
        sensors = {name: asdict(s) for name, s in self._sensors.items()}
        return {"sensors": sensors, "watermark": self.reached, "arrival": self.arrival}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` said."""
        self._sensors = {name: _Sensor(**values) for name, values in state["sensors"].items()}
        self.reached, self.arrival = state["watermark"], state["arrival"]


@numba.njit(cache=True, nogil=True)
def _walk(
    start: Int64, latest: int, step: int, mark: int, witnesses: int, witnessed: int, reached: Int64
) -> tuple[int, int, int, int]:
    """The running maximum of `start`, from `mark`, at most `latest`, with steps beyond `step` held back; see above."""
    jumps = 0
    for i in range(len(start)):
        t = min(start[i], latest)
        if t > mark + step:
            jumps += 1
            witnesses += 1
            witnessed = min(witnessed, t)
            if witnesses >= _WITNESSES:
                mark, witnesses, witnessed = witnessed, 0, _ALWAYS
        else:
            witnesses, witnessed = 0, _ALWAYS
            mark = max(mark, t)
        reached[i] = mark
    return mark, witnesses, witnessed, jumps
