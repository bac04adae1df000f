"""Crowds: where many hosts of a network begin to use a server together, it is the server that did something.

A roll-out, an instance that comes up with the load, a job on forty nodes: each of the meetings may be implausible, but
what happened is one thing. So a first meeting says the less of its source, the more implausible meetings of others its
target has just seen. Plausible ones do not count: that a server has new clients every day excuses nobody.
"""

from __future__ import annotations

import numba
import numpy as np

COUNT, AT = range(2)
"""What is kept of a target: how much of the first meetings with it was out of place, fading, and as of when, s."""

LASTS = 3_600.0
"""Seconds in which a crowd fades by a factor of e; over time_scale."""

FEW = 1.0
"""As much is no crowd: he who was there before may have been the attacker's first try."""


@numba.njit(cache=True, nogil=True)
def crowded(slots, fresh, misplaced, inside, crowds, now, lasts):  # type: ignore[no-untyped-def]
    """The crowd at the target of each contact, f8[c]: how much of others' first meetings with it was out of place, but
    for a `FEW`; 0 where the contact is no first meeting within the network.

    slots i32[2 or more, c] of source and target, fresh bool[c, 3] (`levels.register`), misplaced f8[c], 0 to 1 or NaN;
    crowds f8[·, 2] of targets, which these contacts join in their order.
    """
    out = np.zeros(slots.shape[1])
    for i in range(len(out)):
        source, target = slots[0, i], slots[1, i]
        if not fresh[i, 0] or not inside[source] or not inside[target]:
            continue
        crowd = crowds[target]
        crowd[COUNT] *= np.exp((crowd[AT] - now) / lasts)
        crowd[AT] = now
        # Who had met the target on another service may be in the crowd himself.
        out[i] = max(0.0, crowd[COUNT] - FEW - (0.0 if fresh[i, 1] else 1.0))
        if misplaced[i] > 0.0:
            crowd[COUNT] += misplaced[i]
    return out
