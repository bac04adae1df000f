"""Peaks: the most that any one host has moved on a service within the network, against which each host is judged there.

That a workstation fetches gigabytes from the picture archive is news to itself, but others do so every day; what
nobody has ever fetched there is news to all. So every service has a level, the highest of all hosts', with a record as
any key has (`records`), and what a host moves is an excess only beyond that record too.
"""

from __future__ import annotations

import numba
import numpy as np

from flowsage.graph.prefetch import prefetch
from flowsage.models.analytics import COLUMN, HAUL, SERVICE, WIDTH
from flowsage.models.keys import AHEAD
from flowsage.models.records import RECORD, touch

_WIDTH, _HAUL = int(WIDTH[SERVICE]), int(COLUMN[HAUL])


@numba.njit(cache=True, nogil=True)
def highest(slots, moved, peaks, past, inside, tau, span, step, fade, now):  # type: ignore[no-untyped-def]
    """x f8[c] that some host has reached on the service of each contact: 0 where that is not within the network.

    slots i32[6, c] (source and target host first, the service's code last), moved bytes i64[c]; peaks [k] and past
    f8[k, 3] those of the services; tau, span of a haul.
    """
    out, unused = np.zeros(len(moved)), np.zeros((1, 1))
    last = len(moved) - 1
    for i in range(last + 1):
        prefetch(peaks, np.int64(slots[5, min(i + AHEAD, last)]))
        if moved[i] <= 0 or not inside[slots[0, i]] or not inside[slots[1, i]]:
            continue
        code = np.int64(slots[5, i])
        touch(peaks, past, code, now, tau, span, fade, unused, 0, 0, 0.0, step, 0.0)
        out[i] = max(0.0, past[code, RECORD] - fade * now)
    return out


@numba.njit(cache=True, nogil=True)
def learn(slots, cells, peaks, now):  # type: ignore[no-untyped-def]
    """The levels that hosts have reached in this pane, into the peaks of their services."""
    last = slots.shape[1] - 1
    for i in range(last + 1):
        prefetch(cells, np.int64(slots[2, min(i + AHEAD, last)]) * _WIDTH + _HAUL)
        row = np.int64(slots[2, i]) * _WIDTH + _HAUL
        if cells[row].at != now:  # what it moved now is no haul, and its level is of another time
            continue
        code, level = np.int64(slots[5, i]), cells[row].level
        peaks[code].level = max(peaks[code].level, level)
        peaks[code].last = max(peaks[code].last, level)
