"""Beacons, contacts that repeat like a clock, and sessions, contacts that do not end.

A *visit* begins after some silence, counted from the latest end of a flow: a connection that is reported piece by
piece, as exporters do with those that last, is one visit. The gaps between visits are told apart by a likelihood ratio,
accumulated as a CUSUM: regular gaps (Student-t of ln gap, normal-inverse-gamma, one gap in ten may be anything) against
a Poisson process (gaps exponential, their rate Gamma distributed). Strength of a beat, as DETECTION.md part 3 has it:

    Z = min(150, max(0, LLR − 8)) / 10 · 1 / (sources of the destination)
        · (1 − regular pairs of the service / (pairs + 2)) · 1 / (1 + 2 sd of ln bytes)
        · 1 / (1 + 2 max(0, sd of ln gap − .3))
        · 1 / (1 + other regular contacts of the source with targets inside), where this one is inside: who calls many
          of its own network by the clock polls them

Of a session with the world outside:

    H = ln(1 + seconds without a pause / 1800) · 1 / (sources of the destination)
        · 1 / (1 + other pairs of the service that ever lasted half an hour)

Both are 0 for what was there in the first windows of the stream, or of its source.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import numpy.typing as npt

from flowsage.models.gaps import add_gap

F8 = npt.NDArray[np.float64]

SEEN, VISIT = range(2)
GAPS, MEAN, SQUARES, SUM, LLR, SIZES, SIZE_MEAN, SIZE_SQUARES, REGULAR, BEATS, LASTED = range(11)
"""Columns of a contact's `visits` f8: latest end of a flow and begin of the last visit (s); and of its state f4:
moments of ln gap and the sum of gaps, the likelihood ratio, moments of ln bytes, whether it counts as regular, beats of
the present run, whether it ever lasted."""
COLUMNS = 11
PAIRS, REGULARS, LASTING = range(3)
"""Columns of a service's `tally` f8: pairs, and of those the regular ones, and those that ever lasted."""

MEMORY = 50.0
SILENCE, LEAST_GAP = 10.0, 20.0
"""Seconds of silence that end a visit, and the shortest gap between visits that may be a beat; over time_scale."""

LONG = 1_800.0
"""Seconds without a pause from which a visit is a session; over time_scale."""

JITTER = 0.3
"""Standard deviation of ln gap that a clock may have: bursts among long gaps are unlike Poisson, and no clock."""

BEGIN, END = 10.0, 2.0
"""A contact becomes regular above the first, stops being so at the second."""


@numba.njit(cache=True, nogil=True)
def beats(  # type: ignore[no-untyped-def]
    slots, codes, sources, near, first, last, size, shared, visits, state, tally, polled, born, grandfathered,
    time_scale, beat, session,
):  # fmt: skip
    """Strengths of each contact of a pane: Z to beat f8[c], H to session f8[c].

    slots, codes, sources i32[c] into visits f8[·, 2] and state f4[·, 11] of contacts, tally f8[·, 3] of services, and
    polled f4[·] of hosts (regular contacts with targets inside); near bool[c]: the target is inside the network; first,
    last s[c], start of its first flow and latest end of any; size f8[c] = ln(1 + bytes a flow); shared f8[c], sources
    of (target, service); born f8[·]: what was born before `grandfathered` s[c] has no strength.
    """
    silence, least, long = SILENCE / time_scale, LEAST_GAP / time_scale, LONG / time_scale
    for i in range(len(slots)):
        k, v, s = slots[i], codes[i], sources[i]
        beat[i] = session[i] = 0.0
        if state[k, SIZES] == 0.0:
            visits[k, SEEN] = visits[k, VISIT] = first[i]
            tally[v, PAIRS] += 1.0
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
        visits[k, SEEN] = max(visits[k, SEEN], last[i])
        lasts = visits[k, SEEN] - visits[k, VISIT]
        if lasts >= long:
            if state[k, LASTED] == 0.0:
                state[k, LASTED] = 1.0
                tally[v, LASTING] += 1.0
            if not near[i] and born[k] > grandfathered[i]:
                session[i] = math.log1p(lasts / long) / max(1.0, shared[i]) / tally[v, LASTING]
        ratio = state[k, LLR]
        if ratio > BEGIN and state[k, REGULAR] == 0.0:
            state[k, REGULAR] = 1.0
            tally[v, REGULARS] += 1.0
            polled[s] += near[i]
        if ratio <= END and state[k, REGULAR] == 1.0:
            state[k, REGULAR] = 0.0
            tally[v, REGULARS] -= 1.0
            polled[s] -= near[i]
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
            others = max(0.0, tally[v, REGULARS] - state[k, REGULAR])
            polls = max(0.0, polled[s] - state[k, REGULAR]) if near[i] else 0.0
            beat[i] = (
                min(150.0, ratio - 8.0) / 10.0 / max(1.0, shared[i]) / (1.0 + polls)
                * (1.0 - others / (tally[v, PAIRS] + 2.0))
                / (1.0 + 2.0 * spread) / (1.0 + 2.0 * max(0.0, jitter - JITTER))
            )  # fmt: skip
