"""What history knows of contacts right now, without learning from them."""

from __future__ import annotations

import math

import numba
import numpy as np

from flowsage.graph.flows import SERVICE_BITS
from flowsage.graph.prefetch import prefetch
from flowsage.models.beat import BEAT_, LLR_, PAIRS_, REGULAR_, SOURCES_, SPREAD_
from flowsage.models.familiarity import active, bucket, known_child, meeting_rank, new_child
from flowsage.models.key_levels import (
    E_LLR,
    ES_ALL,
    ES_FIRST,
    ES_FLOWS,
    ES_M2,
    ES_Z,
    O_ANSWERED,
    O_NEW,
    O_SOURCES,
    O_TOKENS,
    S_ALL,
    S_SS,
    S_SS_NEW,
    SS_ALL,
    SS_ES,
    SS_ES_NEW,
    SVC_PAIRS,
    SVC_REGULAR,
    level_key,
)
from flowsage.models.keys import LOWER, SLOT, position
from flowsage.models.weights import CONSTANTS

_MEMORY = CONSTANTS.beat_memory
_PORT = (1 << SERVICE_BITS) - 1
_BATCH = 32

FIELDS = (
    "known", "pair_known", "service_known", "source_known", "D", "C_ss", "C_es", "dc",
    "llr", "beat", "sources", "regular", "pairs", "spread", "first",
)  # fmt: skip
"""Rows of what `recall` returns."""
_KNOWN, _PAIR, _SERVICE, _SOURCE, _D, _C_SS, _C_ES, _DC, _SAID = range(9)
# From _SAID on: what `beat` says, in its order.
_FIRST = len(FIELDS) - 1


@numba.njit(cache=True, nogil=True)
def recall(  # type: ignore[no-untyped-def]
    src, dst, service, hashes, ways, seen, entries, s_count, svc_beat, svc_ranks, ss_count, e_count, e_beat,
    es_count, es_beat, o_count, o_beat, ranks, out, slots, begin, end,
):  # fmt: skip
    """`FIELDS` of contacts begin to end into out f8[15, c], and the slots of es (−1: never met) into i32[c].

    As `familiarity` would say it of a window after those learnt; the beat's as of their end. `entries`: the tables of
    the six levels. With `ways` 2 the forward way, but the smaller dc of both.
    """
    at, row = np.empty((6, _BATCH), np.int64), np.empty((6, _BATCH), np.int64)
    for batch in range(begin, end, _BATCH):
        size = min(_BATCH, end - batch)
        for way in range(ways - 1, -1, -1):
            # Asked for ahead: first where the keys are, then what is remembered of them.
            for i in range(size):
                c = batch + i
                a, b = hashes[src[c]], hashes[dst[c]]
                if way:
                    a, b = b, a
                for level in range(6):
                    at[level, i] = level_key(level, a, b, service[c])
                    prefetch(entries[level], at[level, i] & (entries[level].shape[0] - 1))
            for i in range(size):
                for level in range(6):
                    row[level, i] = (entries[level][position(entries[level], at[level, i]), SLOT] & LOWER) - 1
                s, e, es, o = max(row[0, i], 0), max(row[3, i], 0), max(row[4, i], 0), max(row[5, i], 0)
                prefetch(s_count, s)
                prefetch(ss_count, max(row[2, i], 0))
                prefetch(e_count, e)
                prefetch(e_beat, e)
                prefetch(es_count, es)
                prefetch(es_beat, es)
                prefetch(o_count, o)
                prefetch(o_beat, o)
            for i in range(size):
                c = batch + i
                ports = (service[c] & _PORT) > 0
                s, svc, ss, e, es, o = row[0, i], row[1, i], row[2, i], row[3, i], row[4, i], row[5, i]
                n = es_count[es, ES_ALL] if es >= 0 else 0.0
                if o >= 0:
                    d = active(o_count[o, O_ANSWERED], seen) + new_child(o_count[o, O_TOKENS], o_count[o, O_NEW])
                else:
                    d = active(0.0, seen)
                dc = 0.0
                if n == 0.0 and ports:
                    k = bucket(max(0.0, d))
                    own, all_own = (svc_ranks[svc, k], svc_ranks[svc, 0]) if svc >= 0 else (0, 0)
                    dc = meeting_rank(max(0.0, d), ranks[k], ranks[0], own, all_own)
                out[_DC, c] = min(dc, out[_DC, c]) if way < ways - 1 else dc
                if way:
                    continue
                out[_KNOWN, c] = n
                out[_PAIR, c] = e_count[e, 0] if e >= 0 else 0.0
                out[_SERVICE, c] = ss_count[ss, SS_ALL] if ss >= 0 else 0.0
                out[_SOURCE, c] = s_count[s, S_ALL] if s >= 0 else 0.0
                out[_D, c] = d
                tokens, distinct = (s_count[s, S_SS], s_count[s, S_SS_NEW]) if s >= 0 else (0.0, 0.0)
                if out[_SERVICE, c] > 0.0:
                    out[_C_SS, c] = known_child(out[_SERVICE, c], tokens)
                else:
                    out[_C_SS, c] = new_child(tokens, distinct)
                out[_C_ES, c] = 0.0
                if n == 0.0 and ports:
                    tokens, distinct = (ss_count[ss, SS_ES], ss_count[ss, SS_ES_NEW]) if ss >= 0 else (0.0, 0.0)
                    out[_C_ES, c] = new_child(tokens, distinct)
                out[_SAID + LLR_, c] = e_beat[e, E_LLR] if e >= 0 else 0.0
                out[_SAID + BEAT_, c] = es_beat[es, ES_Z] if es >= 0 else 0.0
                out[_SAID + SOURCES_, c] = o_beat[o, O_SOURCES] if o >= 0 else 0.0
                out[_SAID + REGULAR_, c] = svc_beat[svc, SVC_REGULAR] if svc >= 0 else 0.0
                out[_SAID + PAIRS_, c] = svc_beat[svc, SVC_PAIRS] if svc >= 0 else 0.0
                out[_SAID + SPREAD_, c] = 0.0
                if es >= 0 and es_beat[es, ES_FLOWS] > 0.0:
                    out[_SAID + SPREAD_, c] = math.sqrt(es_beat[es, ES_M2] / min(es_beat[es, ES_FLOWS], _MEMORY))
                out[_FIRST, c] = es_count[es, ES_FIRST] if n > 0.0 else seen
                slots[c] = es
