"""The tail probability of a first meeting, in compiled code.

A question is: source s meets target t on service svc for the first time. The answers possible are all hosts that (s,
svc) does not know, and one more: a host never seen before. Each has probability p = w · p_graph + (1 − w) · q, p_graph
proportional to q · exp f. The *tail* is the probability of all answers that are at most as likely as the true one.

With many hosts the sum runs over a sample: the targets of the service (systematically by weight where they are many),
and draws from q_all for everybody else, each weighted by one over its chance of being there.

The tail is about what is new to s. Whether t is *among its like* is another question: of all that hosts like s meet on
svc inside the network, known to s or not, the share that is at most as likely as t. The world outside is left out: its
many rare sites make anything of our own look likely. Mixture and weight of graph and popularity are its own too.
"""

from __future__ import annotations

from typing import Final

import numba
import numpy as np

from flowsage.graph.prefetch import prefetch
from flowsage.models.keys import mix
from flowsage.models.popularity import BACKOFF

LISTED: Final = 512
"""Targets of a service that are looked at one by one where not all hosts are candidates."""

REMEMBERED: Final = 65_536
"""Newest targets of one (source, service) that count as known to it."""

STEEPEST: Final = 20.0
"""Bound on |f|."""

TAIL, LOG_GRAPH, LOG_POPULAR, AMONG, KNOWN, GAINED = range(6)
ANSWERS: Final = 6
"""Columns of answers."""


@numba.njit(cache=True, nogil=True, fastmath=True)
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@numba.njit(cache=True, nogil=True)
def _spread(service, stamp, head, next_, target, weight, received, stamps):  # type: ignore[no-untyped-def]
    """Write the weights of a service's targets to received[host], and the stamp beside them. Returns their number and
    sum."""
    count, total = 0, 0.0
    o = head[service] if service >= 0 else -1
    while o >= 0:
        t = target[o]
        if t >= 0:
            stamps[t] = stamp
            received[t] = weight[o]
            count += 1
            total += weight[o]
        o = next_[o]
    return count, total


@numba.njit(cache=True, nogil=True)
def _mark(link, below, stamp, ring, prev, newest, known):  # type: ignore[no-untyped-def]
    """Stamp the targets that a (source, service) knows, from its newest on, down to a link that is `below` (-1: all of
    them). Returns how many were looked at, -1 where that link is not among theirs."""
    walked = 0
    while link != below and link > below and link > newest - len(ring) and walked < REMEMBERED:
        at = link % len(ring)
        if ring[at, 1] >= 0:
            known[ring[at, 1]] = stamp
        link = prev[at]
        walked += 1
    return walked if link == below or below < 0 else -1


@numba.njit(cache=True, nogil=True)
def ask(  # type: ignore[no-untyped-def]
    source, service, link, begin, target, ring, prev, newest, head, next_, o_target, o_weight, totals, news,
    anywhere, shared, towers, peers, stranger, fresh_share, trust, inside, trust_inside, answers, candidate,
    density, copies,
):  # fmt: skip
    """Answer the questions of g groups (source, service), ordered by service.

    source, service i32[g] (-1: never seen), link i64[g] into the ring; questions begin[g]:begin[g + 1] of group g,
    target i32[q] (-1: never seen); anywhere f32[h] q_all; shared i32[m] draws from it, empty if all hosts are
    candidates; towers f32[g, d], peers f32[h, d], stranger f32[g]: f of an unseen host; trust: w, and
    trust_inside among inside bool[h]. Writes answers f64[q, 6]: tail, ln p of the target by graph and by popularity;
    then, NaN where t is not inside: t among its like, the share of its like that s knows (NaN: nobody), ln of how much
    better than popularity the graph foretold t among those inside that s does not know. candidate, density, copies [h
    or more] are scratch that holds the last group's candidates afterwards; their number is returned.
    """
    hosts = len(anywhere)
    received, listed = np.empty(hosts, np.float32), np.full(hosts, -1, np.int32)
    known = np.full(hosts, -1, np.int32)
    graph = np.empty(len(candidate), np.float64)
    popular = np.empty(len(candidate), np.float64)
    like = np.zeros((2, len(candidate)))
    kin = np.zeros(len(candidate))
    before = np.int64(-2)
    count, total, weight_all, unseen = 0, 0.0, 0.0, 0.0
    n = 0
    for g in range(len(source)):
        svc = service[g]
        if svc != before:
            before = svc
            count, total = _spread(svc, g, head, next_, o_target, o_weight, received, listed)
            stamp = g
            weight_all = totals[svc] if svc >= 0 else 0.0
            unseen = ((news[svc] if svc >= 0 else 0.0) + BACKOFF * fresh_share) / (weight_all + BACKOFF)
            n = 0
            if len(shared) == 0:
                for c in range(hosts):
                    candidate[n], copies[n] = c, 1.0
                    n += 1
            else:
                step = total / LISTED if count > LISTED else 0.0
                draw = np.float64(mix(svc, 17) >> np.uint64(11)) * 2.0**-53 * step
                o = head[svc] if svc >= 0 else -1
                passed = 0.0
                while o >= 0:
                    t = o_target[o]
                    if t >= 0:
                        passed += o_weight[o]
                        if passed > draw or step == 0.0:
                            candidate[n], copies[n] = t, max(1.0, step / max(o_weight[o], 1e-9))
                            n += 1
                            while step > 0.0 and draw < passed:
                                draw += step
                    o = next_[o]
                for j in range(len(shared)):
                    c = shared[j]
                    if listed[c] != stamp:
                        candidate[n], copies[n] = c, 1.0 / (len(shared) * np.float64(anywhere[c]))
                        n += 1
        _mark(link[g], np.int64(-1), g, ring, prev, newest, known)
        if source[g] >= 0:
            known[source[g]] = g
        seen = (1.0 - unseen) / (weight_all + BACKOFF)
        sum_graph, sum_popular = unseen * np.exp(np.float64(stranger[g])), unseen
        alike, new, acquainted = np.zeros(2), np.zeros(2), False
        for i in range(n):
            prefetch(peers, np.int64(candidate[min(i + 2, n - 1)]))
            c = candidate[i]
            own = known[c] == g
            like[0, i] = like[1, i] = graph[i] = popular[i] = 0.0
            if own and (c == source[g] or not inside[c]):
                continue
            q = seen * ((received[c] if listed[c] == stamp else 0.0) + BACKOFF * anywhere[c])
            f = _dot(towers[g], peers[c])
            steep = q * np.exp(np.float64(min(max(f, -STEEPEST), STEEPEST)))
            if inside[c]:
                like[0, i], like[1, i] = steep, q
                alike[0] += steep * copies[i]
                alike[1] += q * copies[i]
            if own:
                acquainted = True
                continue
            if inside[c]:
                new[0] += steep * copies[i]
                new[1] += q * copies[i]
            popular[i], graph[i] = q, steep
            sum_popular += q * copies[i]
            sum_graph += steep * copies[i]
        by_graph, by_popular = trust_inside / max(alike[0], 1e-300), (1.0 - trust_inside) / max(alike[1], 1e-300)
        share = 0.0
        for i in range(n):
            kin[i] = by_graph * like[0, i] + by_popular * like[1, i]
            if known[candidate[i]] == g:
                share += kin[i] * copies[i]
        for i in range(n):
            density[i] = trust * graph[i] / sum_graph + (1.0 - trust) * popular[i] / sum_popular
        lump_graph, lump_popular = unseen * np.exp(np.float64(stranger[g])) / sum_graph, unseen / sum_popular
        lump = trust * lump_graph + (1.0 - trust) * lump_popular
        many = begin[g + 1] - begin[g] > 16
        order = np.argsort(density[:n]) if many else np.empty(0, np.int64)
        below = np.empty(n + 1 if many else 0, np.float64)
        ordered = density[order]
        by_kin = np.argsort(kin[:n]) if many else np.empty(0, np.int64)
        below_kin = np.empty(n + 1 if many else 0, np.float64)
        ordered_kin = kin[by_kin]
        if many:
            below[0] = below_kin[0] = 0.0
            for i in range(n):
                below[i + 1] = below[i] + density[order[i]] * copies[order[i]]
                below_kin[i + 1] = below_kin[i] + kin[by_kin[i]] * copies[by_kin[i]]
        for k in range(begin[g], begin[g + 1]):
            t = target[k]
            answers[k, AMONG] = answers[k, KNOWN] = answers[k, GAINED] = np.nan
            if t < 0:
                p, own_graph, own_popular = lump, lump_graph, lump_popular
            else:
                q = seen * ((received[t] if listed[t] == stamp else 0.0) + BACKOFF * anywhere[t])
                f = _dot(towers[g], peers[t])
                steep = q * np.exp(np.float64(min(max(f, -STEEPEST), STEEPEST)))
                own_popular, own_graph = q / sum_popular, steep / sum_graph
                if inside[t]:
                    mine = by_graph * steep + by_popular * q
                    limit, among = mine * (1.0 + 1e-9), 0.0
                    if many:
                        among = below_kin[np.searchsorted(ordered_kin, limit, side="right")]
                    else:
                        for i in range(n):
                            if kin[i] <= limit:
                                among += kin[i] * copies[i]
                    answers[k, AMONG] = min(max(among, mine), 1.0)
                    if acquainted:
                        answers[k, KNOWN] = share
                    if new[0] > 0.0:
                        answers[k, GAINED] = np.log(steep / new[0]) - np.log(q / new[1])
                p = trust * own_graph + (1.0 - trust) * own_popular
            limit = p * (1.0 + 1e-9)
            tail = lump if lump <= limit else 0.0
            if many:
                tail += below[np.searchsorted(ordered, limit, side="right")]
            else:
                for i in range(n):
                    if density[i] <= limit:
                        tail += density[i] * copies[i]
            answers[k, TAIL] = min(max(tail, p), 1.0)
            answers[k, LOG_GRAPH] = np.log(own_graph)
            answers[k, LOG_POPULAR] = np.log(own_popular)
    return n


@numba.njit(cache=True, nogil=True)
def batch_popularity(  # type: ignore[no-untyped-def]
    source, target, service, weight, fresh, link, ring, prev, newest, head, next_, o_target, o_weight, totals, news,
    anywhere, candidate, fresh_share, out,
):  # fmt: skip
    """q of each candidate for each of n meetings (ordered by service) with those n left out; 0 where it is no answer.

    candidate i32[c] host slots; out f32[n, c + 2]: the candidates, the true target, and the mass of unseen
    hosts.
    """
    hosts, count = len(anywhere), len(candidate)
    received, listed = np.zeros(hosts, np.float32), np.full(hosts, -1, np.int64)
    known = np.full(hosts, -1, np.int64)
    mass = np.empty(count)  # of the candidates for the service at hand
    begin = end = 0
    weight_all = 0.0
    while begin < len(source):
        svc = service[begin]
        while end < len(source) and service[end] == svc:
            end += 1
        _spread(svc, begin, head, next_, o_target, o_weight, received, listed)
        weight_all, new = np.float64(totals[svc]), np.float64(news[svc])
        for k in range(begin, end):
            weight_all -= weight[k]
            if listed[target[k]] == begin:
                received[target[k]] = max(received[target[k]] - weight[k], np.float32(0))
            if fresh[k]:
                new -= weight[k]
        weight_all = max(weight_all, 0.0)
        unseen = (max(new, 0.0) + BACKOFF * fresh_share) / (weight_all + BACKOFF)
        seen = (1.0 - unseen) / (weight_all + BACKOFF)
        for j in range(count):
            c = candidate[j]
            mass[j] = (received[c] if listed[c] == begin else 0.0) + BACKOFF * anywhere[c]
        # Source by source, its oldest meeting first: each knows what the one before it did, and a little more.
        walked, stamp, below, before = REMEMBERED, begin, np.int64(-1), np.int32(-1)
        for i in begin + np.argsort(source[begin:end], kind="mergesort"):
            s, t = source[i], target[i]
            more = _mark(link[i], below, stamp, ring, prev, newest, known) if s == before else -1
            walked += more
            if more < 0 or walked > REMEMBERED:
                stamp = i
                walked = _mark(link[i], np.int64(-1), stamp, ring, prev, newest, known)
            below, before = link[i], s
            known[s] = stamp
            own, known[t] = known[t], stamp
            for j in range(count):
                out[i, j] = 0.0 if known[candidate[j]] == stamp else seen * mass[j]
            known[t] = own
            out[i, count] = 0.0
            if not fresh[i]:
                out[i, count] = seen * ((received[t] if listed[t] == begin else 0.0) + BACKOFF * anywhere[t])
            out[i, count + 1] = unseen
        begin = end
