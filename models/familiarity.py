"""Familiarity, bursts, novelty and ranks: what a window says about its keys, given the windows before it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from flowsage.graph import memory
from flowsage.graph.flows import Int32
from flowsage.graph.prefetch import prefetch
from flowsage.graph.services import port_part
from flowsage.models.history_scores import L_C_SS, L_KNOWN, L_PAIR, L_SERVICE, L_SETTLED
from flowsage.models.key_levels import (
    ES_ALL,
    ES_ANSWERED,
    ES_KEPT,
    O_ANSWERED,
    O_NEW,
    O_TOKENS,
    S_ALL,
    S_E,
    S_E_NEW,
    S_KEPT,
    S_SS,
    S_SS_NEW,
    S_X,
    SS_ALL,
    SS_ES,
    SS_ES_NEW,
    SS_KEPT,
    SS_MET,
    SS_X,
    SVC_ALL,
    SVC_ROWS,
    SVC_X,
)  # fmt: skip
from flowsage.models.keys import AHEAD
from flowsage.models.load import cold, load
from flowsage.models.predictive import bucket, known_child, meeting_rank, new_child
from flowsage.models.rarity import rarity
from flowsage.models.terms import (
    A_0,
    B_S,
    B_SELF,
    B_SS,
    B_SVC,
    C_E,
    C_ES,
    C_SS,
    DC,
    F_0,
    F_1,
    F_O,
    F_S,
    F_SS,
    G_O,
    K_SS,
    N_O,
    P_SS,
    R_0,
    TERMS,
    D,
    contact_sums,
)  # fmt: skip
from flowsage.models.weights import CONSTANTS

Float64 = npt.NDArray[np.float64]

_POOLED, _RARE = CONSTANTS.pooled, CONSTANTS.rare_windows


class Scratch(NamedTuple):
    """Room for what is known of a window's rows while it is worked on; `familiarity`'s loops say what is where."""

    s_n: Float64
    s_t: Float64
    svc_n: Float64
    ss_n: Float64
    ss_up: Int32
    e_n: Int32
    es_up: Int32
    es_n: Float64
    o_n: Float64

    @classmethod
    def empty(cls, sizes: list[int]) -> Scratch:
        """For so many rows of each level."""
        s, svc, ss, e, es, o = sizes

        def room(rows: int, width: int) -> Float64:
            return memory.empty((rows, width), np.float64)

        return cls(
            room(s, 8), room(s, 4), room(svc, 4), room(ss, 8), memory.empty((ss, 2), np.int32),
            memory.empty(e, np.int32), memory.empty((es, 2), np.int32), memory.empty(es, np.float64),
            room(o, 5),
        )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def familiarity(  # type: ignore[no-untyped-def]
    run, seen, rows, counts, loads, scratch, pool, ranks, svc_ranks, weights, sums, terms, before, looked
):
    """Terms of each directed contact v, and the counts after each window.

    rows, counts: `Rows` and `count` of the six levels. seen: windows in which anything was seen before this chunk (E of
    its first). loads: what `load` knows, of slots of o and of all, and what `rarity` does. pool f8[3]: sum of x over
    all rows of s so far, and their number; services so far. ranks i64[64],
    svc_ranks i32[slots, 64]: first-meeting tokens with D in this bucket or above. weights
    f8[20]. Out: sums f8[v, 4] (`contact_sums`), terms f8[20, v] (`TERMS`) unless it has no columns, before f8[c]:
    earlier windows of es (forward way), looked f8[5, c] (`ContactTerms` of it, but for the sources) unless it has none.

    With x = ln(1 + flows of the key in the window), E earlier windows, all over earlier windows, and
    active = −ln((n + ½)/(E + 1)), the Beta-Bernoulli predictive that a key active in n of E windows is active:
    B_s, B_ss    active, n kept windows of s, ss
    K_ss         active, n windows in which ss met an es with a kept window before it
    B_svc        active, n windows of svc; 0 as long as neither protocol nor port was ever known
    F_s, F_ss    x − (L + 3m)/(E + 3), L the key's sum of x, m mean x of the other keys (all s; ss of the same svc),
                 this window included
    C_ss         `new_child`/`known_child` of s's tokens (ss, window)
    P_ss         [ss new] max(0, ln(1+u) − ln(1+U/max(W,1))), u services new to s in this window, U before in W
                 windows of s
    C_es         [es new] `new_child` of ss's tokens (es, window); without ports instead C_e, the same of e under s
    F_0          (60/(60 + E))² (max(0, F_ss) + max(0, F_s)/2), if it has a weight
    F_1          −F_s as long as neither protocol nor port was ever known (F_ss is the same then), if it has a weight
    B_self       [s = t] active, n windows of e
    R_0          exp(−E/10) times `rarity` of s: what is known of it instead is soon more, and
    A_0          (60/(60 + E))² [TCP, and nothing was answered], both if they have a weight
    D            active(answered windows of o) + `new_child` of o's answered tokens (es, window)
    dc           [es new] `meeting_rank` of D; a (source, window) leaves one token: its largest D among answered first
                 meetings
    """
    ways = run.ways
    s_rows, svc_rows, ss_rows, e_rows, es_rows, o_rows = rows
    s_count, svc_count, ss_count, e_count, es_count, o_count = counts
    s_n, s_t, svc_n, ss_n, ss_up, e_n, es_up, es_n, o_n = scratch
    loaded = weights[F_O] != 0.0 or weights[N_O] != 0.0 or weights[G_O] != 0.0
    bursts, silence = weights[F_0] != 0.0, weights[A_0] != 0.0
    line = np.empty((2, len(TERMS)))
    for w in range(len(run.windows)):
        now = seen + w
        log_now = math.log(now + 1.0)
        s0, svc0, ss0 = s_rows.start[w], svc_rows.start[w], ss_rows.start[w]
        e0, es0, o0 = e_rows.start[w], es_rows.start[w], o_rows.start[w]
        n_s, n_svc, n_ss = s_rows.start[w + 1] - s0, svc_rows.start[w + 1] - svc0, ss_rows.start[w + 1] - ss0
        n_e, n_es, n_o = e_rows.start[w + 1] - e0, es_rows.start[w + 1] - es0, o_rows.start[w + 1] - o0
        begin, end = run.offsets[w] * ways, run.offsets[w + 1] * ways
        s_n[:n_s] = 0.0
        svc_n[:n_svc] = 0.0
        ss_n[:n_ss] = 0.0
        es_n[:n_es] = 0.0
        o_n[:n_o] = 0.0
        # Flows and marks of each row; who is whose child.
        for v in range(begin, end):
            soon = min(v + AHEAD, end - 1)
            prefetch(s_n, s_rows.row[soon])
            prefetch(ss_n, ss_rows.row[soon])
            c = v // ways
            s, ss, es, o = s_rows.row[v], ss_rows.row[v], es_rows.row[v], o_rows.row[v]
            s_n[s, 0] += run.flows[c]
            ss_n[ss, 0] += run.flows[c]
            if run.kept[c]:
                s_n[s, 1] = 1.0
                ss_n[ss, 1] = 1.0
            # A kept contact counts 1, an answered one 2, and below an earlier window 4.
            es_n[es] = int(es_n[es]) | int(run.kept[c]) | int(run.answered[c] > 0) << 1
            ss_up[ss, 0] = s
            ss_up[ss, 1] = svc_rows.row[v]
            e_n[e_rows.row[v]] = s
            es_up[es, 0] = ss
            es_up[es, 1] = o
        # es: tokens for its parents.
        for r in range(n_es):
            soon = min(r + AHEAD, n_es - 1)
            prefetch(es_count, es_rows.row_slot[es0 + soon])
            prefetch(ss_n, es_up[soon, 0])
            prefetch(o_n, es_up[soon, 1])
            slot = es_rows.row_slot[es0 + r]
            ss, o = es_up[r, 0], es_up[r, 1]
            if es_count[slot, ES_KEPT] > 0.0:
                ss_n[ss, 2] = 1.0
            ss_n[ss, 3] += 1.0
            marks, windows = int(es_n[r]), es_count[slot, ES_ALL]
            es_n[r] = marks + 4.0 * windows
            es_count[slot, ES_ALL] += 1.0
            if windows == 0.0:
                ss_n[ss, 4] += 1.0
            if marks >= 2:
                o_n[o, 0] += 1.0
                if es_count[slot, ES_ANSWERED] == 0.0:
                    o_n[o, 1] += 1.0
                es_count[slot, ES_ANSWERED] += 1.0
            es_count[slot, ES_KEPT] += marks & 1
        for r in range(n_e):
            prefetch(e_count, e_rows.row_slot[e0 + min(r + AHEAD, n_e - 1)])
            s, slot = e_n[r], e_rows.row_slot[e0 + r]
            e_n[r] = int(e_count[slot, 0])
            e_count[slot, 0] += 1.0
            s_n[s, 4] += 1.0
            if e_n[r] == 0:
                s_n[s, 5] += 1.0
        # ss: tokens for s, flows for the pools.
        for r in range(n_ss):
            prefetch(ss_count, ss_rows.row_slot[ss0 + min(r + AHEAD, n_ss - 1)])
            s, svc = ss_up[r, 0], ss_up[r, 1]
            ss_n[r, 0] = math.log1p(ss_n[r, 0])
            s_n[s, 2] += 1.0
            if ss_count[ss_rows.row_slot[ss0 + r], SS_ALL] == 0.0:
                s_n[s, 3] += 1.0
            svc_n[svc, 0] += ss_n[r, 0]
            svc_n[svc, 1] += 1.0
        all_x = pool[0]
        for r in range(n_s):
            s_n[r, 0] = math.log1p(s_n[r, 0])
            all_x += s_n[r, 0]
        all_rows = pool[1] + n_s
        # Terms of s, svc, o; their counts.
        for r in range(n_s):
            prefetch(s_count, s_rows.row_slot[s0 + min(r + AHEAD, n_s - 1)])
            slot = s_rows.row_slot[s0 + r]
            x = s_n[r, 0]
            mean = (all_x - x) / (all_rows - 1.0) if all_rows > 1.0 else 0.0
            s_t[r, 0] = log_now - math.log(s_count[slot, S_KEPT] + 0.5)
            s_t[r, 1] = x - (s_count[slot, S_X] + _POOLED * mean) / (now + _POOLED)
            s_t[r, 2] = new_child(s_count[slot, S_E], s_count[slot, S_E_NEW])
            s_t[r, 3] = s_count[slot, S_ALL]
            # For the children, which come after: what s was before this window.
            s_n[r, 6] = s_count[slot, S_SS]
            s_n[r, 7] = new_child(s_count[slot, S_SS], s_count[slot, S_SS_NEW])
            burst = math.log1p(s_n[r, 3]) - math.log1p(s_count[slot, S_SS_NEW] / max(s_count[slot, S_ALL], 1.0))
            s_count[slot, S_SS_NEW] += s_n[r, 3]
            s_n[r, 3] = max(0.0, burst)
            s_count[slot, S_ALL] += 1.0
            s_count[slot, S_KEPT] += s_n[r, 1]
            s_count[slot, S_X] += x
            s_count[slot, S_SS] += s_n[r, 2]
            s_count[slot, S_E] += s_n[r, 4]
            s_count[slot, S_E_NEW] += s_n[r, 5]
        pool[0] = all_x
        pool[1] = all_rows
        worth = cold(now)
        if weights[R_0] != 0.0:
            rarity(s_n[:n_s, 0], math.exp(-now / _RARE), loads[2])
        else:
            s_n[:n_s, 0] = 0.0
        for r in range(n_svc):
            slot = svc_rows.row_slot[svc0 + r]
            if svc_count[slot, SVC_ALL] == 0.0:
                pool[2] += 1.0
            svc_n[r, 2] = log_now - math.log(svc_count[slot, SVC_ALL] + 0.5)
            svc_count[slot, SVC_ALL] += 1.0
            svc_count[slot, SVC_X] += svc_n[r, 0]
            svc_count[slot, SVC_ROWS] += svc_n[r, 1]
        for r in range(n_o):
            prefetch(o_count, o_rows.row_slot[o0 + min(r + AHEAD, n_o - 1)])
            slot = o_rows.row_slot[o0 + r]
            tokens, distinct = o_count[slot, O_TOKENS], o_count[slot, O_NEW]
            o_n[r, 4] = new_child(tokens, distinct)
            o_n[r, 3] = log_now - math.log(o_count[slot, O_ANSWERED] + 0.5) + o_n[r, 4]
            if o_n[r, 0] > 0.0:
                o_count[slot, O_ANSWERED] += 1.0
                o_count[slot, O_TOKENS] += o_n[r, 0]
                o_count[slot, O_NEW] += o_n[r, 1]
        # Terms of ss.
        for r in range(n_ss):
            prefetch(ss_count, ss_rows.row_slot[ss0 + min(r + AHEAD, n_ss - 1)])
            slot = ss_rows.row_slot[ss0 + r]
            s, svc = ss_up[r, 0], svc_rows.row_slot[svc0 + ss_up[r, 1]]
            x, n = ss_n[r, 0], ss_count[slot, SS_ALL]
            others = svc_count[svc, SVC_ROWS] - 1.0
            mean = (svc_count[svc, SVC_X] - x) / others if others > 0.0 else 0.0
            kept, met, tokens, fresh = ss_n[r, 1], ss_n[r, 2], ss_n[r, 3], ss_n[r, 4]
            # From here on ss_n are terms: B, K, F, C_ss, P, C_es, and the earlier windows.
            ss_n[r, 0] = log_now - math.log(ss_count[slot, SS_KEPT] + 0.5)
            ss_n[r, 1] = log_now - math.log(ss_count[slot, SS_MET] + 0.5)
            ss_n[r, 2] = x - (ss_count[slot, SS_X] + _POOLED * mean) / (now + _POOLED)
            if n == 0.0:
                ss_n[r, 3] = s_n[s, 7]
                ss_n[r, 4] = s_n[s, 3]
            else:
                ss_n[r, 3] = known_child(n, s_n[s, 6])
                ss_n[r, 4] = 0.0
            ss_n[r, 5] = new_child(ss_count[slot, SS_ES], ss_count[slot, SS_ES_NEW]) if fresh > 0.0 else 0.0
            ss_n[r, 6] = n
            ss_count[slot, SS_ALL] += 1.0
            ss_count[slot, SS_KEPT] += kept
            ss_count[slot, SS_MET] += met
            ss_count[slot, SS_X] += x
            ss_count[slot, SS_ES] += tokens
            ss_count[slot, SS_ES_NEW] += fresh
        # Ranks of the first meetings, and the token of each source: s_n[., 4], [., 5] are its largest D and where. From
        # here on es_n is minus the rank of what is new, the earlier windows of what is not.
        s_n[:n_s, 4] = -1.0
        for r in range(n_es):
            answered = es_n[r] >= 2.0
            if es_n[r] >= 4.0:
                es_n[r] = int(es_n[r]) >> 2
                continue
            ss, o = es_up[r, 0], es_up[r, 1]
            s, svc = ss_up[ss, 0], svc_rows.row_slot[svc0 + ss_up[ss, 1]]
            d = max(0.0, o_n[o, 3])
            b = bucket(d)
            es_n[r] = -max(0.0, meeting_rank(d, ranks[b], ranks[0], svc_ranks[svc, b], svc_ranks[svc, 0]))
            if answered and d > s_n[s, 4]:
                s_n[s, 4] = d
                s_n[s, 5] = svc
        for r in range(n_s):
            if s_n[r, 4] >= 0.0:
                svc = int(s_n[r, 5])
                for b in range(bucket(s_n[r, 4]) + 1):
                    ranks[b] += 1
                    svc_ranks[svc, b] += 1
        if loaded:
            load(run, w, now, es_rows.row, o_rows.row, o_rows.row_slot[o0 : o0 + n_o], loads[0], loads[1], o_n)
        else:
            o_n[:n_o, :3] = 0.0
        # Out: each directed contact gets what its keys have.
        last = end - 1
        for c in range(run.offsets[w], run.offsets[w + 1]):
            for way in range(ways):
                v = c * ways + way
                soon = min(v + AHEAD, last)
                prefetch(s_t, s_rows.row[soon])
                prefetch(ss_n, ss_rows.row[soon])
                prefetch(o_n, o_rows.row[soon])
                s, svc, ss, es = s_rows.row[v], svc_rows.row[v], ss_rows.row[v], es_rows.row[v]
                new, ports = es_n[es] <= 0.0, port_part(run.service[c]) >= 0
                line[way, B_S] = s_t[s, 0]
                line[way, B_SS] = ss_n[ss, 0]
                line[way, K_SS] = ss_n[ss, 1]
                served = run.service[c] != 0 or pool[2] > 1.0
                line[way, B_SVC] = svc_n[svc, 2] if served else 0.0
                line[way, F_S] = s_t[s, 1]
                line[way, F_SS] = ss_n[ss, 2]
                line[way, C_SS] = ss_n[ss, 3]
                line[way, P_SS] = ss_n[ss, 4]
                line[way, C_ES] = ss_n[ss, 5] if new and ports else 0.0
                line[way, C_E] = s_t[s, 2] if e_n[e_rows.row[v]] == 0 and not ports else 0.0
                line[way, DC] = -es_n[es] if new and ports else 0.0
                line[way, F_O] = o_n[o_rows.row[v], 0]
                line[way, N_O] = o_n[o_rows.row[v], 1]
                line[way, G_O] = o_n[o_rows.row[v], 2]
                line[way, F_0] = worth * (max(0.0, ss_n[ss, 2]) + 0.5 * max(0.0, s_t[s, 1])) if bursts else 0.0
                line[way, F_1] = 0.0 if served or weights[F_1] == 0.0 else -s_t[s, 1]
                own = run.src[c] == run.dst[c]
                line[way, B_SELF] = log_now - math.log(e_n[e_rows.row[v]] + 0.5) if own else 0.0
                line[way, R_0] = s_n[s, 0]
                line[way, A_0] = worth if silence and not run.kept[c] else 0.0
                line[way, D] = o_n[o_rows.row[v], 3]
                if way == 0:
                    before[c] = max(0.0, es_n[es])
                    if looked.shape[1] > 0:
                        looked[L_KNOWN, c] = before[c]
                        looked[L_PAIR, c] = e_n[e_rows.row[v]]
                        looked[L_SERVICE, c] = ss_n[ss, 6]
                        looked[L_C_SS, c] = ss_n[ss, 3]
                        looked[L_SETTLED, c] = o_n[o_rows.row[v], 4]
            if ways == 2:
                line[0, DC] = line[1, DC] = min(line[0, DC], line[1, DC])
            for way in range(ways):
                contact_sums(line[way], weights, sums[c * ways + way])
                if terms.shape[1] > 0:
                    terms[:, c * ways + way] = line[way]
