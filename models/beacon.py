"""Beacons: contacts that repeat like a clock, seen as gaps that are regular rather than random.

A *visit* begins after some silence; the gaps between visits are told apart by a likelihood ratio, accumulated as a
CUSUM: regular gaps (Student-t of ln gap, normal-inverse-gamma, one gap in ten may be anything) against a Poisson
process (gaps exponential, their rate Gamma distributed). Strength of a beat, as DETECTION.md part 3 has it:

    Z = min(150, max(0, LLR − 8)) / 10 · 1 / (sources of the destination)
        · (1 − regular pairs of the service / (pairs + 2)) · 1 / (1 + 2 sd of ln bytes)
        · 1 / (1 + 2 max(0, sd of ln gap − .3))

0 for what was there in the first windows of the stream, or of its source.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import numpy.typing as npt

from flowsage.models.gaps import add_gap

F8 = npt.NDArray[np.float64]

SEEN, VISIT = range(2)
GAPS, MEAN, SQUARES, SUM, LLR, SIZES, SIZE_MEAN, SIZE_SQUARES, REGULAR, BEATS = range(10)
"""Columns of a contact's `visits` f8: times of its last flow and its last visit (s); and of its state f4: moments of
ln gap and the sum of gaps, the likelihood ratio, moments of ln bytes, whether it counts as regular, beats of the
present run."""
COLUMNS = 10

MEMORY = 50.0
SILENCE, LEAST_GAP = 10.0, 20.0
"""Seconds of silence that end a visit, and the shortest gap between visits that may be a beat; over time_scale."""

JITTER = 0.3
"""Standard deviation of ln gap that a clock may have: bursts among long gaps are unlike Poisson, and no clock."""

BEGIN, END = 10.0, 2.0
"""A contact becomes regular above the first, stops being so at the second."""


@numba.njit(cache=True, nogil=True)
def beats(slots, services, first, size, sources, visits, state, tally, born, grandfathered, time_scale, strength):  # type: ignore[no-untyped-def]
    """Strength Z f8[c] of the beat of each contact of a pane.

    slots, services i32[c] into visits f8[·, 2], state f4[·, 10] and tally f8[·, 2] (pairs of a service, regular ones
    among them); first s[c], start of its first flow; size f8[c] = ln(1 + bytes a flow); sources f8[c] of (target,
    service); born f8[·]: what was born before `grandfathered` s[c] has no strength.
    """
    silence, least = SILENCE / time_scale, LEAST_GAP / time_scale
    for i in range(len(slots)):
        k, v = slots[i], services[i]
        strength[i] = 0.0
        if state[k, SIZES] == 0.0:
            visits[k, SEEN] = visits[k, VISIT] = first[i]
            tally[v, 0] += 1.0
        t = first[i]
        if t - visits[k, SEEN] > silence:
            gap = t - visits[k, VISIT]
            visits[k, VISIT] = t
            if gap >= least:
                add_gap(state[k], GAPS, gap)
            else:
                state[k, LLR] = max(0.0, state[k, LLR] - 1.0)
            if state[k, LLR] == 0.0:
                state[k, BEATS] = 0.0
            state[k, BEATS] += 1.0
        visits[k, SEEN] = max(visits[k, SEEN], t)
        ratio = state[k, LLR]
        if ratio > BEGIN and state[k, REGULAR] == 0.0:
            state[k, REGULAR] = 1.0
            tally[v, 1] += 1.0
        if ratio <= END and state[k, REGULAR] == 1.0:
            state[k, REGULAR] = 0.0
            tally[v, 1] -= 1.0
        seen = min(MEMORY, state[k, SIZES] + 1.0)
        if state[k, SIZES] >= MEMORY:
            state[k, SIZE_SQUARES] *= MEMORY / (MEMORY + 1)
        delta = size[i] - state[k, SIZE_MEAN]
        state[k, SIZES] = seen
        state[k, SIZE_MEAN] += delta / seen
        state[k, SIZE_SQUARES] += delta * (size[i] - state[k, SIZE_MEAN])
        if ratio > 8.0 and born[k] > grandfathered[i]:
            spread = math.sqrt(max(0.0, state[k, SIZE_SQUARES]) / seen)
            jitter = math.sqrt(max(0.0, state[k, SQUARES]) / max(1.0, state[k, GAPS]))
            others = max(0.0, tally[v, 1] - state[k, REGULAR])
            strength[i] = (
                min(150.0, ratio - 8.0) / 10.0 / max(1.0, sources[i])
                * (1.0 - others / (tally[v, 0] + 2.0)) / (1.0 + 2.0 * spread) / (1.0 + 2.0 * max(0.0, jitter - JITTER))
            )  # fmt: skip
