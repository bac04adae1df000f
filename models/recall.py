"""What history knows of contacts right now, without learning from them."""

from __future__ import annotations

import numba
import numpy as np

from flowsage.graph.prefetch import prefetch
from flowsage.models.history_scores import L_C_SS, L_KNOWN, L_PAIR, L_SERVICE, L_SETTLED, L_SOURCES
from flowsage.models.key_levels import (
    ES,
    ES_ALL,
    O_NEW,
    O_SOURCES,
    O_TOKENS,
    S_SS,
    S_SS_NEW,
    SS,
    SS_ALL,
    E,
    O,
    S,
    level_key,
)
from flowsage.models.keys import LOWER, SLOT, home, position
from flowsage.models.predictive import known_child, new_child

_BATCH = 32
_ASKED = (S, SS, E, ES, O)


@numba.njit(cache=True, nogil=True)
def recall(  # type: ignore[no-untyped-def]
    src, dst, service, hashes, entries, s_count, ss_count, e_count, es_count, o_count, o_beat, out, begin, end
):
    """`ContactTerms` of contacts begin to end into out f8[6, c], a row each.

    As `familiarity` would say it of a window after those learnt; sources as of their end. `entries`: the tables of the
    six levels.
    """
    at, row = np.empty((6, _BATCH), np.int64), np.empty((6, _BATCH), np.int64)
    for batch in range(begin, end, _BATCH):
        size = min(_BATCH, end - batch)
        # Asked for ahead: first where the keys are, then what is remembered of them.
        for i in range(size):
            c = batch + i
            for level in _ASKED:
                at[level, i] = level_key(level, hashes[src[c]], hashes[dst[c]], service[c])
                prefetch(entries[level], home(entries[level], at[level, i]))
        for i in range(size):
            for level in _ASKED:
                row[level, i] = (entries[level][position(entries[level], at[level, i]), SLOT] & LOWER) - 1
            prefetch(s_count, max(row[S, i], 0))
            prefetch(ss_count, max(row[SS, i], 0))
            prefetch(e_count, max(row[E, i], 0))
            prefetch(es_count, max(row[ES, i], 0))
            prefetch(o_count, max(row[O, i], 0))
            prefetch(o_beat, max(row[O, i], 0))
        for i in range(size):
            c = batch + i
            s, ss, e, es, o = row[S, i], row[SS, i], row[E, i], row[ES, i], row[O, i]
            out[L_KNOWN, c] = es_count[es, ES_ALL] if es >= 0 else 0.0
            out[L_PAIR, c] = e_count[e, 0] if e >= 0 else 0.0
            out[L_SERVICE, c] = ss_count[ss, SS_ALL] if ss >= 0 else 0.0
            tokens, distinct = (s_count[s, S_SS], s_count[s, S_SS_NEW]) if s >= 0 else (0.0, 0.0)
            if out[L_SERVICE, c] > 0.0:
                out[L_C_SS, c] = known_child(out[L_SERVICE, c], tokens)
            else:
                out[L_C_SS, c] = new_child(tokens, distinct)
            out[L_SOURCES, c] = o_beat[o, O_SOURCES] if o >= 0 else 0.0
            out[L_SETTLED, c] = new_child(o_count[o, O_TOKENS], o_count[o, O_NEW]) if o >= 0 else 0.0
