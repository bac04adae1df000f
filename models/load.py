"""Load: what all sources together do to an offered service, beyond what it and its like are used to.

History judges a window by its source, so a flood from a thousand hosts is a thousand small novelties, and where
nothing has a past it has nothing to judge by. Both are seen at the target: the flows and the sources of o = (target,
service) in a window, beside its own past and beside all other offered services, as the bursts F of `familiarity`, and
only far beyond them, where a burst of one source counts again: what is ordinary stays in the order that it had.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from flowsage.graph.prefetch import prefetch
from flowsage.models.key_levels import O_FLOWS_X, O_SOURCES_X, O_WINDOWS
from flowsage.models.keys import AHEAD
from flowsage.models.weights import CONSTANTS

_POOLED, _FLOWS, _SOURCES, _PEERS = CONSTANTS.pooled, CONSTANTS.load_flows, CONSTANTS.load_sources, CONSTANTS.load_peers
_FADE = CONSTANTS.cold_windows
_LN = np.log1p(np.arange(64))
"""ln(1 + k) of small counts: most offered services have one flow and one source."""


@numba.njit(cache=True, nogil=True, inline="always")
def _ln1p(count):  # type: ignore[no-untyped-def]
    return _LN[int(count)] if count < 64.0 else math.log1p(count)


@numba.njit(cache=True, nogil=True, inline="always")
def cold(seen):  # type: ignore[no-untyped-def]
    """What a comparison with peers is worth after so many windows: 1 at first, a quarter after `cold_windows`."""
    return (_FADE / (_FADE + seen)) ** 2


@numba.njit(cache=True, nogil=True)
def load(run, w, seen, es_row, o_row, o_slot, past, pool, out):  # type: ignore[no-untyped-def]
    """Terms of the offered services of window w into columns 0 to 2 of out f8[rows of o, 4]; what they were is learnt.

    seen: windows before (E). es_row, o_row: rows of directed contacts in the chunk; o_slot: slot of each row of o in
    this window. past f8[slots, 4]: sums of x and y, and windows; pool f8[3]: the same over all o. With x = ln(1 +
    flows) and y = ln(1 + sources) of o in the window, L their sums before, m their means over all windows of the other
    o up to this one (0 where there are none):

    F_o   max(0, x − (L + 3m)/(E + 3) − 4)
    N_o   max(0, y − (L + 3m)/(E + 3) − 3.5)
    G_o   (60/(60 + E))² max(0, x − m − 2.5), 0 where there is no other: those without a past beside each other
    """
    rows = len(o_slot)
    out[:rows, :3] = 0.0
    fresh = 0
    for v in range(run.offsets[w] * run.ways, run.offsets[w + 1] * run.ways):
        o = o_row[v]
        out[o, 0] += run.flows[v // run.ways]
        if es_row[v] == fresh:  # rows are numbered in order of first contact: undirected, both ways may be one
            fresh += 1
            out[o, 1] += 1.0
    for r in range(rows):
        out[r, 0] = _ln1p(out[r, 0])
        out[r, 1] = _ln1p(out[r, 1])
        pool[0] += out[r, 0]
        pool[1] += out[r, 1]
    pool[2] += rows
    worth = cold(seen)
    for r in range(rows):
        prefetch(past, o_slot[min(r + AHEAD, rows - 1)])
        slot = o_slot[r]
        x, y = out[r, 0], out[r, 1]
        flows, sources = past[slot, O_FLOWS_X], past[slot, O_SOURCES_X]
        others = pool[2] - past[slot, O_WINDOWS] - 1.0
        share = 1.0 / others if others > 0.0 else 0.0
        mean = (pool[0] - flows - x) * share
        out[r, 0] = max(0.0, x - (flows + _POOLED * mean) / (seen + _POOLED) - _FLOWS)
        out[r, 2] = worth * max(0.0, x - mean - _PEERS) if others > 0.0 else 0.0
        mean = (pool[1] - sources - y) * share
        out[r, 1] = max(0.0, y - (sources + _POOLED * mean) / (seen + _POOLED) - _SOURCES)
        past[slot, O_FLOWS_X] = flows + x
        past[slot, O_SOURCES_X] = sources + y
        past[slot, O_WINDOWS] += 1.0
