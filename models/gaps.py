"""Gaps between visits: does one come by the clock, or at random?

The likelihood ratio of DETECTION.md's beat, accumulated as a CUSUM gap by gap. What is remembered of a pair's gaps are
five numbers, in the columns from `first` on of its state: how many (of the last 50), mean and sum of squares about it
of ln gap, sum of the gaps, and the ratio.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from flowsage.models.weights import CONSTANTS

COUNT, MEAN, SQUARES, SUM, LLR = range(5)
"""Columns, counted from `first`."""

_MEMORY, _CAP = CONSTANTS.beat_memory, CONSTANTS.beat_cap
_VARIANCE, _NOISE = CONSTANTS.beat_variance, CONSTANTS.beat_noise
_FADED = _MEMORY / (_MEMORY + 1.0)

_COUNTS = range(int(_MEMORY) + 1)
_STUDENT = np.array(
    [math.lgamma((3 + c) / 2) - math.lgamma((2 + c) / 2) - 0.5 * math.log((2 + c) * math.pi) for c in _COUNTS]
)
"""ln of the Student-t density's normalising constant with 2 + c degrees of freedom."""
_LOG = np.array([math.log(max(c, 1)) for c in _COUNTS])


@numba.njit(cache=True, nogil=True, inline="always")
def add_gap(state, first, gap):  # type: ignore[no-untyped-def]
    """One more gap > 0 of a pair, into its columns from `first` on.

    LLR ← clip(LLR + ln(.9 p/q + .1), 0, 200): p the Student-t predictive of ln gap (normal-inverse-gamma, prior weight
    and shape 1, rate .02), q a Poisson process' predictive gap (Lomax), both after the earlier gaps. The first gap only
    teaches.
    """
    y, c, total = math.log(gap), state[first + COUNT], state[first + SUM]
    if c > 0.0:
        nu, off = 2.0 + c, y - state[first + MEAN]
        variance = (_VARIANCE + 0.5 * state[first + SQUARES]) * nu / ((1.0 + 0.5 * c) * (1.0 + c))
        regular = _STUDENT[int(c)] - 0.5 * (
            math.log(variance) + (nu + 1.0) * math.log(1.0 + off * off / (variance * nu))
        )
        poisson = _LOG[int(c)] + c * math.log(total / (total + gap)) - math.log(total + gap) + y
        more = math.log((1.0 - _NOISE) * math.exp(regular - poisson) + _NOISE)
        state[first + LLR] = min(_CAP, max(0.0, state[first + LLR] + more))
    c += 1.0
    if c > _MEMORY:
        c = _MEMORY
        state[first + SQUARES] *= _FADED
        total *= _FADED
    off = y - state[first + MEAN]
    state[first + COUNT] = c
    state[first + MEAN] += off / c
    state[first + SQUARES] += off * (y - state[first + MEAN])
    state[first + SUM] = total + gap
