"""Rarity: sources of which there is less than of others, while nothing has a past.

History knows a newcomer by what was there before. In the first minutes everybody is new, and who is rare can only be
told beside the others: of all flows so far, how many are of sources that have as few in a window. Where sizes spread
widely most sources are rare in that sense, and it says nothing; where many do much the same, and few do much less, it
does. So it counts from what a source can be expected to have on.
"""

from __future__ import annotations

import math

import numba
import numpy as np

BUCKETS, STEP = 80, 0.25
"""Windows of sources are counted by x = ln(1 + flows), in so many steps of so many nats."""


@numba.njit(cache=True, nogil=True)
def rarity(x, worth, peers):  # type: ignore[no-untyped-def]
    """R_0 of each source of a window in place of x f8[n] = ln(1 + flows); the window is counted among `peers`.

    peers f8[2, BUCKETS]: (source, window) rows so far, and their flows, by x. With m(x) the flows of rows up to x, M
    all flows and a = M/rows, one more row as large as the mean, so that few of them say little:

    r = −ln((m(x) + a)/(M + a)),  R_0 = worth max(0, r − mean r over all rows so far)
    """
    last = BUCKETS - 1
    for i in range(len(x)):
        b = min(last, int(x[i] / STEP))
        peers[0, b] += 1.0
        peers[1, b] += math.expm1(x[i])
    rows, flows = 0.0, 0.0
    for b in range(BUCKETS):
        rows += peers[0, b]
        flows += peers[1, b]
    rare, below, mean = np.zeros(BUCKETS), flows / rows, 0.0
    every = flows + below
    for b in range(BUCKETS):
        below += peers[1, b]
        rare[b] = -math.log(below / every)
        mean += rare[b] * peers[0, b] / rows
    for i in range(len(x)):
        x[i] = worth * max(0.0, rare[min(last, int(x[i] / STEP))] - mean)
