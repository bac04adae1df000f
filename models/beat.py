"""Beats: pairs that meet at regular intervals, flow by flow in time order."""

from __future__ import annotations

import math

import numba

from flowsage.graph.prefetch import prefetch
from flowsage.models.gaps import add_gap
from flowsage.models.history_scores import L_SOURCES
from flowsage.models.key_levels import (
    E_GAPS,
    E_LAST,
    E_LLR,
    E_MET,
    E_VISIT,
    ES_FLOWS,
    ES_M2,
    ES_MEAN,
    ES_STATE,
    O_REGULAR,
    O_SOURCES,
    SVC_PAIRS,
    SVC_REGULAR,
)
from flowsage.models.keys import AHEAD
from flowsage.models.weights import CONSTANTS

_SILENCE, _SHORTEST, _MEMORY = CONSTANTS.silence_s, CONSTANTS.shortest_gap_s, CONSTANTS.beat_memory
_ABOVE, _BELOW, _FLOOR, _TOP = (
    CONSTANTS.regular_above,
    CONSTANTS.irregular_below,
    CONSTANTS.beat_floor,
    CONSTANTS.beat_top,
)
_LAST = int(CONSTANTS.buckets) - 1


@numba.njit(cache=True, nogil=True)
def beat(  # type: ignore[no-untyped-def]
    run,
    start_ns,
    bytes_fwd,
    e_slot,
    es_slot,
    o_slot,
    svc_slot,
    pairs,
    keys,
    offered,
    services,
    tops,
    once,
    llr,
    z_out,
    zc_out,
    looked,
):
    """LLR, Z and Zc of each directed flow [n·ways] (given as zeros).

    Z = min(150, max(0, LLR − 8 − 2 ln sources(o)))/10 · (1 − other regular sources of o/sources)
    · (1 − other regular pairs of svc/(pairs + 1))/(1 + 2 sd ln(1+bytes_fwd) of es) · (1 − once/flows of es): the beat
    is the pair's, and who tries a port after the other at regular intervals has none on any of them;
    Zc = −ln((other pairs whose largest Z is at least as large + 1)/(pairs + 1)), by quarters (`tops` i64[65]: how many
    pairs have each largest Z, and how many pairs there are). looked f8[6, c] gets the sources of o before the window,
    unless it has no columns.
    """
    ways = run.ways
    for w in range(len(run.windows)):
        if looked.shape[1] > 0:
            for c in range(run.offsets[w], run.offsets[w + 1]):
                looked[L_SOURCES, c] = offered[o_slot[c * ways], O_SOURCES]
        last = run.flow_offsets[w + 1] - 1
        for i in range(run.flow_offsets[w], last + 1):
            later = (run.of_flow[min(i + 2 * AHEAD, last)] - run.first) * ways
            soon = (run.of_flow[min(i + AHEAD, last)] - run.first) * ways
            prefetch(e_slot, later)
            prefetch(es_slot, later)
            prefetch(pairs, e_slot[soon])
            prefetch(keys, es_slot[soon])
            now = start_ns[i] / 1e9
            size = math.log(1.0 + max(bytes_fwd[i], 0))
            for way in range(ways):
                v = (run.of_flow[i] - run.first) * ways + way
                p = e_slot[v]
                k = es_slot[v]
                if pairs[p, E_MET] == 0.0:
                    pairs[p, E_MET] = 1.0
                    pairs[p, E_VISIT] = now
                elif now - pairs[p, E_LAST] > _SILENCE:
                    gap = now - pairs[p, E_VISIT]
                    pairs[p, E_VISIT] = now
                    if gap >= _SHORTEST:
                        add_gap(pairs[p], E_GAPS, gap)
                    else:
                        pairs[p, E_LLR] = max(0.0, pairs[p, E_LLR] - 1.0)
                pairs[p, E_LAST] = now
                level = pairs[p, E_LLR]
                n = keys[k, ES_FLOWS] + 1.0
                o = s = 0
                state = int(keys[k, ES_STATE])
                top, regular = state >> 1, state & 1
                if n == 1.0 or level > _FLOOR or regular:
                    o = o_slot[v]
                    s = svc_slot[v]
                if n == 1.0:
                    services[s, SVC_PAIRS] += 1.0
                    offered[o, O_SOURCES] += 1.0
                    tops[_LAST + 1] += 1
                    tops[0] += 1
                if level > _ABOVE and not regular:
                    regular = 1
                    services[s, SVC_REGULAR] += 1.0
                    offered[o, O_REGULAR] += 1.0
                elif level <= _BELOW and regular:
                    regular = 0
                    services[s, SVC_REGULAR] -= 1.0
                    offered[o, O_REGULAR] -= 1.0
                keys[k, ES_FLOWS] = n
                short = min(n, _MEMORY)
                off = size - keys[k, ES_MEAN]
                keys[k, ES_MEAN] += off / short
                keys[k, ES_M2] += off * (size - keys[k, ES_MEAN])
                if n > _MEMORY:
                    keys[k, ES_M2] *= _MEMORY / (_MEMORY + 1.0)
                keys[k, ES_STATE] = 2 * top + regular
                if level <= 0.0:
                    continue
                llr[i * ways + way] = level
                if level <= _FLOOR:
                    continue
                z = min(_TOP, max(0.0, level - _FLOOR - 2.0 * math.log(offered[o, O_SOURCES]))) / 10.0
                z *= 1.0 - (offered[o, O_REGULAR] - regular) / offered[o, O_SOURCES]
                z *= 1.0 - (services[s, SVC_REGULAR] - regular) / (services[s, SVC_PAIRS] + 1.0)
                z /= 1.0 + 2.0 * math.sqrt(keys[k, ES_M2] / short)
                z *= 1.0 - once / n
                bucket = min(_LAST, int(4.0 * z))
                if bucket > top:
                    tops[top] -= 1
                    tops[bucket] += 1
                    top = bucket
                    keys[k, ES_STATE] = 2 * top + regular
                if z > 0.0:
                    z_out[i * ways + way] = z
                    others = 0
                    for x in range(max(bucket, 1), _LAST + 1):
                        others += tops[x]
                    if top >= bucket:
                        others -= 1
                    zc_out[i * ways + way] = -math.log((max(others, 0) + 1.0) / (tops[_LAST + 1] + 1.0))
