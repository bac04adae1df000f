"""Kernels between contacts and features: order, group, and sum along edges and hosts.

Sorting is by counting, since keys are dense: 1 ms of one core at 250 k contacts where np.argsort takes 21, and 0.1 s at
2.4 M where np.argsort and torch.argsort take 0.4 and 0.5 (tests/graph/benchmark.py). Rows touched at random are asked
for ahead (`prefetch`).
"""

from __future__ import annotations

import numba
import numpy as np

from flowsage.graph.features import (
    D_BYTES,
    D_GAP,
    D_GAPS,
    D_GAPSQ,
    D_HANDSHAKE,
    D_HANDSHAKES,
    D_LENGTHSQ,
    D_PACKETS,
    E_ANSWERED,
    E_BF,
    E_BR,
    E_DURATION,
    E_FAILED,
    E_FIRST,
    E_FLOWS,
    E_GAPSQ,
    E_HALF_OPEN,
    E_LAST,
    E_PF,
    E_PORTS,
    E_PR,
    E_SERVICES,
    N_FIRST,
    N_GAPSQ,
    N_HALF_OPEN,
    N_LAST,
    N_PORTS,
    PROFILE,
    profile_buckets,
)
from flowsage.graph.prefetch import prefetch

_AHEAD = 16


@numba.njit(cache=True, nogil=True)
def localise(src, dst, local, host_of, local_src, local_dst):  # type: ignore[no-untyped-def]
    """Dense numbers for the hosts that occur, in order of appearance; returns how many.

    src, dst, local_src, local_dst i32[c]; local i32[H] of -1; host_of i32[>= h].
    """
    h = 0
    for k in range(len(src)):
        for side in range(2):
            host = src[k] if side == 0 else dst[k]
            if local[host] < 0:
                local[host] = h
                host_of[h] = host
                h += 1
            if side == 0:
                local_src[k] = local[host]
            else:
                local_dst[k] = local[host]
    return h


@numba.njit(cache=True, nogil=True)
def counting_sort(keys, before, offsets, order, at):  # type: ignore[no-untyped-def]
    """Stable order [c] of keys i32[c] in 0..h-1, after the order `before` (empty: as they are).

    offsets i32[h + 1], order i32[c]; at i32[h] is scratch.
    """
    offsets[:] = 0
    for k in range(len(keys)):
        offsets[keys[k] + 1] += 1
    for i in range(1, len(offsets)):
        offsets[i] += offsets[i - 1]
    at[:] = offsets[:-1]
    chained = len(before) > 0
    for k in range(len(keys)):
        item = before[k] if chained else np.int32(k)
        key = keys[item]
        order[at[key]] = item
        at[key] += 1


@numba.njit(cache=True, nogil=True)
def group(order, local_src, local_dst, edge_of, src, dst, starts):  # type: ignore[no-untyped-def]
    """Edges of contacts in order of (src, dst); returns how many. starts[k]: where edge k begins in `order`."""
    e = -1
    for k in range(len(order)):
        c = order[k]
        if k == 0 or local_src[c] != src[e] or local_dst[c] != dst[e]:
            e += 1
            src[e] = local_src[c]
            dst[e] = local_dst[c]
            starts[e] = k
        edge_of[c] = e
    starts[e + 1] = len(order)
    return e + 1


@numba.njit(cache=True, nogil=True)
def sum_contacts(edge_of, flows, answered, failed, pf, pr, bf, br, sums):  # type: ignore[no-untyped-def]
    """Columns of contacts [c] into the first line of `sums` i64[e, 16]."""
    for k in range(len(edge_of)):
        if k + _AHEAD < len(edge_of):
            prefetch(sums, np.int64(edge_of[k + _AHEAD]))
        row = sums[edge_of[k]]
        row[E_FLOWS] += flows[k]
        row[E_ANSWERED] += answered[k]
        row[E_FAILED] += failed[k]
        row[E_PF] += pf[k]
        row[E_PR] += pr[k]
        row[E_BF] += bf[k]
        row[E_BR] += br[k]
        row[E_SERVICES] += 1


@numba.njit(cache=True, nogil=True)
def profile(local_src, local_dst, service, first, services, out, keys):  # type: ignore[no-untyped-def]
    """Services of each host: how many (services i32[h, 2]), and by dimension into columns `first`.. of out f32[h, F].

    keys i64[2^k >= 2c] is scratch.
    """
    mask = np.uint64(len(keys) - 1)
    for side in range(2):
        keys[:] = -1
        column = first + 2 * PROFILE * side
        for k in range(len(service)):
            host = local_src[k] if side == 0 else local_dst[k]
            counted, present = profile_buckets(service[k])
            out[host, column + counted] += 1
            out[host, column + PROFILE + present] = 1
            key = (np.int64(host) << 32) | np.int64(service[k])
            h = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
            slot = (h ^ (h >> np.uint64(32))) & mask
            while keys[slot] >= 0 and keys[slot] != key:
                slot = (slot + np.uint64(1)) & mask
            if keys[slot] < 0:
                keys[slot] = key
                services[host, side] += 1


@numba.njit(cache=True, nogil=True, inline="always")
def _port_hash(port):  # type: ignore[no-untyped-def]
    # A multiplication alone spreads consecutive ports too evenly for linear counting.
    x = np.uint64(np.int64(port) + 1) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(32)
    return x * np.uint64(0xC4CEB9FE1A85EC53)


@numba.njit(cache=True, nogil=True)
def sum_flows_of_edges(of_flow, edge_of, start, end, port, half_open, origin, shift, sums):  # type: ignore[no-untyped-def]
    """Flows [n], in order of start, into the second line of `sums` i64[e, 16]; half_open bool[n], or [0] for none."""
    n = len(start)
    told = len(half_open) > 0
    for i in range(n):
        if i + _AHEAD < n:
            prefetch(sums[:, E_FIRST:], np.int64(edge_of[of_flow[i + _AHEAD]]))
        row = sums[edge_of[of_flow[i]]]
        tick = (start[i] - origin) >> shift
        if row[E_PORTS] == 0:
            row[E_FIRST] = tick
            row[E_LAST] = tick
        gap = tick - row[E_LAST]
        row[E_GAPSQ] += gap * gap
        row[E_LAST] = tick
        row[E_PORTS] |= np.int64(np.uint64(1) << (_port_hash(port[i]) >> np.uint64(58)))
        row[E_DURATION] += max(0, end[i] - start[i]) >> shift
        if told:
            row[E_HALF_OPEN] += half_open[i]


@numba.njit(cache=True, nogil=True)
def sum_details(of_flow, edge_of, packets, bytes_fwd, handshake, gap, gapsq, lengthsq, sums):  # type: ignore[no-untyped-def]
    """Columns of `FlowDetail` [n] into f64[e, 8]; what is unknown stays out of its sum."""
    for i in range(len(of_flow)):
        row = sums[edge_of[of_flow[i]]]
        if handshake[i] >= 0:
            row[D_HANDSHAKE] += handshake[i]
            row[D_HANDSHAKES] += 1
        if packets[i] > 1 and gap[i] >= 0 and gapsq[i] >= 0:
            row[D_GAP] += gap[i]
            row[D_GAPSQ] += gapsq[i]
            row[D_GAPS] += packets[i] - 1
        if packets[i] > 0 and lengthsq[i] >= 0 and bytes_fwd[i] >= 0:
            row[D_LENGTHSQ] += lengthsq[i]
            row[D_PACKETS] += packets[i]
            row[D_BYTES] += bytes_fwd[i]


@numba.njit(cache=True, nogil=True)
def sum_flows_of_hosts(src, dst, local, start, port, half_open, origin, shift, sums):  # type: ignore[no-untyped-def]
    """Flows [n], in order of start, into `sums` i64[h, 16]: a line as initiator, a line as responder."""
    n = len(start)
    told = len(half_open) > 0
    for i in range(n):
        if i + _AHEAD < n:
            prefetch(sums, np.int64(local[src[i + _AHEAD]]))
            prefetch(sums[:, 8:], np.int64(local[dst[i + _AHEAD]]))
        tick = (start[i] - origin) >> shift
        h = _port_hash(port[i])
        word = np.int64(h >> np.uint64(62))
        bit = np.int64(np.uint64(1) << ((h >> np.uint64(56)) & np.uint64(63)))
        for side in range(2):
            row = sums[local[src[i]], :8] if side == 0 else sums[local[dst[i]], 8:]
            if row[N_PORTS] | row[N_PORTS + 1] | row[N_PORTS + 2] | row[N_PORTS + 3] == 0:
                row[N_FIRST] = tick
                row[N_LAST] = tick
            gap = tick - row[N_LAST]
            row[N_GAPSQ] += gap * gap
            row[N_LAST] = tick
            row[N_PORTS + word] |= bit
            if told:
                row[N_HALF_OPEN] += half_open[i]
