"""Terms to scores: flow_score and beacon_score of a flow, the score of a host's window."""

from __future__ import annotations

import math

import numba
import numpy as np

from flowsage.graph.prefetch import prefetch
from flowsage.models.keys import AHEAD
from flowsage.models.terms import BEST, CAPPED, FREE
from flowsage.models.weights import CONSTANTS

_ABOVE, _BEACON_FLOOR, _BEACON_SCALE = CONSTANTS.regular_above, CONSTANTS.beacon_floor, CONSTANTS.beacon_scale
_PEERS = CONSTANTS.peers
W_V_REV, W_V_FWD, W_T, W_FAIL, W_B_ES, W_V_LOG, W_BEAT = range(7)


@numba.njit(cache=True, nogil=True, inline="always")
def little(v):  # type: ignore[no-untyped-def]
    """V_log = max(0, ln(1 + V) − V/3): what is a little beyond the usual."""
    return max(0.0, math.log1p(v) - v / 3.0)


@numba.njit(cache=True, nogil=True)
def score(  # type: ignore[no-untyped-def]
    run, seen, before, answered, told, failed, s_rows, e_rows, sums, v_rev, v_fwd, llr, z, zc, weights,
    pair_score, pair_source, highest, peers, flow_score, beacon_score, host, host_window, host_score,
):  # fmt: skip
    """flow_score = max(S, 4 min(Zc − 4, B_es)), beacon_score = Z + Zc, both f8[n] (undirected: mean of both ways); and
    of each row of s its host i32, window i64 and score f8: over distinct targets' highest flow_scores, ¾ of the highest
    and ¼ of their mean.

    B_es = −ln((n + ½)/(E + 1)): n of `before` f8[c], the earlier windows of es, E of `seen`, those before this chunk.

    S = `FREE`, or `CAPPED` where the flow is answered and that is known, and its own terms, weighted by f8[7]: V_rev,
    V_log of it (`little`), V_fwd, T = ln(1 + max(0, LLR − 10)/10), beat = max(0, Zc − 4), [failed]. Scratch: pair_score
    f8, pair_source i32 by row of e, highest and peers f8 by row of s.
    """
    ways = run.ways
    for w in range(len(run.windows)):
        n_e = e_rows.start[w + 1] - e_rows.start[w]
        n_s = s_rows.start[w + 1] - s_rows.start[w]
        pair_score[:n_e] = -np.inf
        last = run.flow_offsets[w + 1] - 1
        for i in range(run.flow_offsets[w], last + 1):
            soon = (run.of_flow[min(i + AHEAD, last)] - run.first) * ways
            prefetch(sums, soon)
            first = (run.of_flow[i] - run.first) * ways
            total = 0.0
            beacon = 0.0
            for way in range(ways):
                v, j = first + way, i * ways + way
                value = sums[v, CAPPED] if answered[i] and told[i] else sums[v, FREE]
                value += weights[W_V_REV] * v_rev[j] + weights[W_V_FWD] * v_fwd[j]
                if v_rev[j] > 0.0:
                    value += weights[W_V_LOG] * little(v_rev[j])
                if failed[i]:
                    value += weights[W_FAIL]
                if llr[j] > _ABOVE:
                    value += weights[W_T] * math.log1p((llr[j] - _ABOVE) / 10.0)
                if llr[j] > 0.0:  # without any, neither Z nor Zc: their zeros need not be read
                    beacon += z[j] + zc[j]
                    if zc[j] > _BEACON_FLOOR:
                        value += weights[W_BEAT] * (zc[j] - _BEACON_FLOOR)
                        unusual = math.log((seen + w + 1.0) / (before[first // ways] + 0.5))
                        value = max(value, _BEACON_SCALE * min(zc[j] - _BEACON_FLOOR, weights[W_B_ES] * unusual))
                total += value
            flow_score[i] = total / ways
            beacon_score[i] = beacon / ways
            for v in range(first, first + ways):
                sums[v, BEST] = max(sums[v, BEST], flow_score[i])
        h0 = s_rows.start[w]
        for v in range(run.offsets[w] * ways, run.offsets[w + 1] * ways):
            c, s = v // ways, s_rows.row[v]
            row = e_rows.row[v]
            pair_score[row] = max(pair_score[row], sums[v, BEST])
            pair_source[row] = s
            host[h0 + s] = run.src[c] if v == c * ways else run.dst[c]
        highest[:n_s] = -np.inf
        for r in range(n_e):
            highest[pair_source[r]] = max(highest[pair_source[r]], pair_score[r])
        host_score[h0 : h0 + n_s] = 0.0
        peers[:n_s] = 0.0
        for r in range(n_e):
            host_score[h0 + pair_source[r]] += pair_score[r]
            peers[pair_source[r]] += 1.0
        for r in range(n_s):
            host_score[h0 + r] = (1.0 - _PEERS) * highest[r] + _PEERS * host_score[h0 + r] / peers[r]
            host_window[h0 + r] = run.windows[w]
