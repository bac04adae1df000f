"""Uploads: what our hosts together send to a host outside, against which each of them is judged there.

To a cloud that thirty hosts send to, another sends as much every day; the same bytes to a machine that nobody sends to
are news, whatever their sender has sent to that cloud. So every host outside has a level of what all of ours send to
it, with a record as any key has (`records`), and what a pair does is an excess only beyond that record too.
"""

from __future__ import annotations

import numba
import numpy as np

from flowsage.graph.prefetch import prefetch
from flowsage.models.analytics import BYTES_SCALE, COLUMN, DRIP, PAIR, SHARED_MOST, WIDTH
from flowsage.models.keys import AHEAD
from flowsage.models.records import BEFORE, RECORD, touch

_WIDTH, _DRIP = int(WIDTH[PAIR]), int(COLUMN[DRIP])


@numba.njit(cache=True, nogil=True)
def usual(  # type: ignore[no-untyped-def]
    slots, sent, sources, cells, past, inside, host_born, received, received_past, tau, span, step, fade, now
):
    """x f8[c] that the others have reached at the target of each contact: 0 where nothing is sent outside.

    It is the record of the sum of all, less what this pair itself may have had in it. `slots`, `sent` (bytes out − in),
    `sources` as in `levels.raise_levels`; cells [·], past f8[·, 3] of the pairs; received [h], received_past f8[h, 3]
    those of the sums, which this raises; tau, span of a drip.
    """
    out, unused = np.zeros(len(sent)), np.zeros((1, 1))
    last = len(sent) - 1
    for i in range(last + 1):
        soon = min(i + AHEAD, last)
        prefetch(received, np.int64(slots[1, soon]))
        source, target = slots[0, i], slots[1, i]
        if sent[i] <= 0 or inside[target] or not inside[source]:
            continue
        touch(received, received_past, target, now, tau, span, fade, unused, 0, 0, host_born[target], step, 0.0)
        received[target].level += sent[i] / BYTES_SCALE
        received[target].last = max(received[target].last, received[target].level)
        record = received_past[target, RECORD] - fade * now
        if record <= 0.0:
            continue
        row = np.int64(slots[3, i]) * _WIDTH + _DRIP
        own = max(cells[row].last, past[row, BEFORE]) * min(SHARED_MOST, max(1.0, sources[i]))
        out[i] = np.log1p(max(0.0, np.expm1(record) - own))
    return out
