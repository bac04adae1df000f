"""Surprise: by how much a host's window is stranger, by the alarms' smallest p, than that host's windows usually are.

History ranks what is unlike the past, contact by contact. What only shows in a sum (a sweep, guesses, an upload) it
ranks too low, and the alarms know. A p that a host always has (it polls, it is a sensor that everybody scans) says
nothing of the one window: it is the host's own mean over a day that surprise is counted from.
"""

from __future__ import annotations

import numba
import numpy as np

from flowsage.graph.build import Contacts
from flowsage.graph.columns import Int64
from flowsage.graph.flows import Int32
from flowsage.models.history_scores import Float64

IN_HOSTS = 0.75
"""A host-window's score rises by this, nats, for a decade of surprise."""

IN_FLOWS = 0.25
"""And the score of each flow that the host sent in it (undirected: had a part in)."""

UNSURE = 10.0
"""Windows without surprise that every host's mean begins with."""

LEAST_P = 1e-12
"""A smaller p is no stranger."""

P, SURPRISE = range(2)
"""Columns of what is said of hosts."""

WEIGHT, TOTAL, AT = range(3)
"""What is kept of a host: windows that its mean is of, fading, the decades in them, and when that was, s."""


@numba.njit(cache=True, nogil=True)
def take(slots, smallest, usual, now, day, ready, said):  # type: ignore[no-untyped-def]
    """What is said of hosts i32[n] (-1: one that nobody knows) for the time since this was last asked, f8[n, 2]: the
    smallest p, which is 1 from here on, and by how many decades it lies beyond what is usual for the host.

    NaN and 0 while not `ready`; only from then on is anything usual. now, day: s, by the alarms' clock.
    """
    for i in range(len(slots)):
        p = min(smallest[slots[i]], 1.0) if slots[i] >= 0 else 1.0
        said[i, P], said[i, SURPRISE] = p if ready else np.nan, 0.0
        if ready and slots[i] >= 0:
            mine = usual[slots[i]]
            mine[: TOTAL + 1] *= np.exp((mine[AT] - now) / day)
            mine[AT] = now
            mean = mine[TOTAL] / (mine[WEIGHT] + UNSURE)
            said[i, SURPRISE] = max(0.0, -np.log10(max(p, LEAST_P)) - mean)
    for i in range(len(slots)):
        if slots[i] < 0:
            continue
        smallest[slots[i]] = 1.0
        if ready:
            mine = usual[slots[i]]
            mine[WEIGHT] += 1.0
            mine[TOTAL] -= np.log10(max(said[i, P], LEAST_P))


def of_flows(run: Contacts, host: Int32, window: Int64, surprise: Float64, *, undirected: bool) -> Float64:
    """Surprise f8[n] of each flow: that of its source in its window (undirected: of the stranger end).

    host i32[k], window i64[k], surprise f8[k]: the run's host-windows, in the order of windows.
    """
    of_contacts = np.zeros(len(run))
    if surprise.any():
        of_hosts = np.append(np.searchsorted(window, run.windows), len(host))
        of_host = np.zeros(len(run.hosts))
        _spread(run.src, run.dst, run.offsets, host, of_hosts, surprise, undirected, of_host, of_contacts)
    return of_contacts[run.of_flow]


@numba.njit(cache=True, nogil=True)
def _spread(src, dst, offsets, host, of_hosts, surprise, undirected, of_host, out):  # type: ignore[no-untyped-def]
    """Surprise of the host-windows of each window to its contacts; of_host f8[·] is nought before, and after."""
    for w in range(len(offsets) - 1):
        a, b = of_hosts[w], of_hosts[w + 1]
        of_host[host[a:b]] = surprise[a:b]
        for c in range(offsets[w], offsets[w + 1]):
            out[c] = max(of_host[src[c]], of_host[dst[c]]) if undirected else of_host[src[c]]
        of_host[host[a:b]] = 0.0
