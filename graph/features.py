"""What a host and an edge look like within one window: names, units and version of every feature, in order.

The lists here are the one place that says what a column means. Change one, and raise FEATURE_VERSION.
Counts and times enter as ln(1 + x): they span orders of magnitude. What is not known is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from flowsage.graph.prefetch import prefetch

FEATURE_VERSION = 1
PROFILE = 16
"""Dimensions that services are hashed to."""


@dataclass(frozen=True)
class Feature:
    """One column: `name`, `unit` (of x, where the column is ln(1 + x)), `meaning`, `logged`."""

    name: str
    unit: str
    meaning: str
    logged: bool = True


def _both(name: str, unit: str, meaning: str, logged: bool = True) -> tuple[Feature, Feature]:
    """The same of the flows that a host initiates (out) and of those that it answers (in)."""
    return (
        Feature(f"{name}_out", unit, f"{meaning}, of the flows it initiates", logged),
        Feature(f"{name}_in", unit, f"{meaning}, of the flows towards it", logged),
    )


def _profile(side: str, what: str) -> tuple[Feature, ...]:
    counted = (
        Feature(f"profile_{side}_peers_{i:02}", "peers", f"distinct (peer, service) {what}, of services hashed to {i}")
        for i in range(PROFILE)
    )
    present = (
        Feature(f"profile_{side}_any_{i:02}", "0 or 1", f"a service {what} whose second hash is {i}", False)
        for i in range(PROFILE)
    )
    return (*counted, *present)


NODE_FEATURES: tuple[Feature, ...] = (
    *_both("flows", "flows", "number"),
    Feature("packets_sent", "packets", "in either role"),
    Feature("packets_received", "packets", "in either role"),
    Feature("bytes_sent", "bytes", "in either role"),
    Feature("bytes_received", "bytes", "in either role"),
    Feature("byte_asymmetry", "-1..1", "(sent - received) / (sent + received)", False),
    Feature("flow_asymmetry", "-1..1", "(initiated - answered to) / (both)", False),
    *_both("degree", "peers", "distinct hosts"),
    *_both("services", "services", "distinct (protocol, port)"),
    *_both("ports", "ports", "distinct destination ports (linear counting in 256 bits)"),
    *_both("answered", "0..1", "share answered", False),
    *_both("failed", "0..1", "share failed", False),
    *_both("half_open", "0..1", "share half open (SYN, and silence)", False),
    *_both("gap_mean", "ms", "mean time between starts"),
    *_both("gap_sd", "ms", "standard deviation of the time between starts"),
    *_both("span", "ms", "first to last start"),
    Feature("is_source", "0 or 1", "initiates a flow", False),
    Feature("is_sink", "0 or 1", "is the target of a flow", False),
    Feature("internal", "0 or 1", "an address of our own networks, or no address", False),
    *_profile("out", "used"),
    *_profile("in", "offered"),
)
EDGE_FEATURES: tuple[Feature, ...] = (
    Feature("flows", "flows", "number"),
    Feature("packets_fwd", "packets", "initiator to responder"),
    Feature("packets_rev", "packets", "responder to initiator"),
    Feature("bytes_fwd", "bytes", "initiator to responder"),
    Feature("bytes_rev", "bytes", "responder to initiator"),
    Feature("byte_asymmetry", "-1..1", "(fwd - rev) / (fwd + rev)", False),
    Feature("services", "services", "distinct (protocol, port)"),
    Feature("ports", "ports", "distinct destination ports (linear counting in 64 bits)"),
    Feature("answered", "0..1", "share of flows answered", False),
    Feature("failed", "0..1", "share of flows failed", False),
    Feature("half_open", "0..1", "share of flows half open (SYN, and silence)", False),
    Feature("duration_mean", "ms", "mean length of a flow"),
    Feature("gap_mean", "ms", "mean time between starts"),
    Feature("gap_sd", "ms", "standard deviation of the time between starts"),
    Feature("span", "ms", "first to last start"),
    Feature("handshake_mean", "us", "mean time from SYN to SYN-ACK"),
    Feature("packet_gap_mean", "ms", "mean time between the initiator's packets inside flows"),
    Feature("packet_gap_sd", "ms", "standard deviation of the same"),
    Feature("packet_length_mean", "bytes", "mean length of the initiator's packets"),
    Feature("packet_length_sd", "bytes", "standard deviation of the same"),
)
NODE_NAMES = tuple(f.name for f in NODE_FEATURES)
EDGE_NAMES = tuple(f.name for f in EDGE_FEATURES)

# Columns of the raw sums that the kernels fill. Times are in ticks of 2^k ns since the window's first start.
# An edge: i64[e, 16], two cache lines. The first is summed over contacts, the second over flows.
E_FLOWS, E_ANSWERED, E_FAILED, E_PF, E_PR, E_BF, E_BR, E_SERVICES = range(8)
E_FIRST, E_LAST, E_GAPSQ, E_PORTS, E_HALF_OPEN, E_DURATION = range(8, 14)
# What only some flows tell: f64[e, 8].
D_HANDSHAKE, D_HANDSHAKES, D_GAP, D_GAPSQ, D_GAPS, D_LENGTHSQ, D_PACKETS, D_BYTES = range(8)
# A host: i64[h, 16], a line as initiator and a line as responder, each of these.
N_FIRST, N_LAST, N_GAPSQ, N_HALF_OPEN, N_PORTS = range(5)  # ports: 4 words

_PROFILE_AT = NODE_NAMES.index("profile_out_peers_00")


@numba.njit(cache=True, nogil=True, inline="always")
def profile_buckets(service: Any) -> Any:
    """The dimensions of a service: of its count, and of its presence."""
    x = np.uint64(service) * np.uint64(0x9E3779B97F4A7C15)
    y = (np.uint64(service) ^ np.uint64(0x5851F42D)) * np.uint64(0xC2B2AE3D27D4EB4F)
    return np.int64(x >> np.uint64(60)), np.int64(y >> np.uint64(60))


@numba.njit(cache=True, nogil=True, inline="always")
def distinct_of_bits(bits: int, size: int) -> float:
    """Linear counting (Whang et al. 1990): how many distinct things set `bits` of `size` bits."""
    if bits >= size:
        return size * math.log(size)
    return round(-size * math.log(1.0 - bits / size))


@numba.njit(cache=True, nogil=True, inline="always")
def _ln1(x: float) -> float:
    return math.log(1.0 + x) if x > 0 else 0.0


@numba.njit(cache=True, nogil=True, inline="always")
def _sd(sum_of_squares: float, total: float, n: float) -> float:
    return math.sqrt(max(0.0, sum_of_squares / n - (total / n) ** 2)) if n > 0 else 0.0


@numba.njit(cache=True, nogil=True, inline="always")
def _asymmetry(a: float, b: float) -> float:
    return (a - b) / (a + b) if a + b > 0 else 0.0


@numba.njit(cache=True, nogil=True, inline="always")
def _popcount(x: Any) -> Any:
    v = np.uint64(x)
    v = v - ((v >> np.uint64(1)) & np.uint64(0x5555555555555555))
    v = (v & np.uint64(0x3333333333333333)) + ((v >> np.uint64(2)) & np.uint64(0x3333333333333333))
    v = (v + (v >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((v * np.uint64(0x0101010101010101)) >> np.uint64(56))


@numba.njit(cache=True, nogil=True)
def fill_edges(sums, detail, tick_ms, out):  # type: ignore[no-untyped-def]
    """`EDGE_FEATURES` from raw sums: i64[e, 16], f64[e or 0, 8] -> f32[e, G]."""
    for k in range(len(out)):
        n = float(sums[k, E_FLOWS])
        span = (sums[k, E_LAST] - sums[k, E_FIRST]) * tick_ms
        row = out[k]
        row[0] = _ln1(n)
        row[1] = _ln1(float(sums[k, E_PF]))
        row[2] = _ln1(float(sums[k, E_PR]))
        row[3] = _ln1(float(sums[k, E_BF]))
        row[4] = _ln1(float(sums[k, E_BR]))
        row[5] = _asymmetry(float(sums[k, E_BF]), float(sums[k, E_BR]))
        row[6] = _ln1(float(sums[k, E_SERVICES]))
        row[7] = _ln1(distinct_of_bits(_popcount(sums[k, E_PORTS]), 64))
        row[8] = sums[k, E_ANSWERED] / n
        row[9] = sums[k, E_FAILED] / n
        row[10] = sums[k, E_HALF_OPEN] / n
        row[11] = _ln1(sums[k, E_DURATION] * tick_ms / n)
        row[12] = _ln1(span / (n - 1)) if n > 1 else 0.0
        row[13] = _ln1(_sd(sums[k, E_GAPSQ] * tick_ms * tick_ms, span, n - 1)) if n > 2 else 0.0
        row[14] = _ln1(span)
        for column in range(15, 20):
            row[column] = 0.0
        row[18] = _ln1(sums[k, E_BF] / sums[k, E_PF]) if sums[k, E_PF] > 0 else 0.0
        if len(detail):
            d = detail[k]
            if d[D_HANDSHAKES] > 0:
                row[15] = _ln1(d[D_HANDSHAKE] / d[D_HANDSHAKES] / 1e3)
            if d[D_GAPS] > 0:
                row[16] = _ln1(d[D_GAP] / d[D_GAPS] / 1e6)
                row[17] = _ln1(1e-3 * _sd(d[D_GAPSQ], d[D_GAP] / 1e3, d[D_GAPS]))
            row[19] = _ln1(_sd(d[D_LENGTHSQ], d[D_BYTES], d[D_PACKETS]))


@numba.njit(cache=True, nogil=True)
def fill_nodes(out_offsets, in_offsets, in_edges, edges, flows_of, services, internal, tick_ms, begin, end, out):  # type: ignore[no-untyped-def]
    """`NODE_FEATURES` of hosts begin..end-1 from raw sums -> f32[h, F], whose profile columns hold counts so far.

    CSR i32 as in HostGraph; edges i64[e, 16]; flows_of i64[h, 16]; services i32[h, 2], internal bool[h].
    """
    s = np.empty(12)  # flows, answered, failed as initiator, as responder; packets, bytes sent, received; peers
    for i in range(begin, end):
        s[:] = 0
        s[10] = out_offsets[i + 1] - out_offsets[i]
        s[11] = in_offsets[i + 1] - in_offsets[i]
        for k in range(out_offsets[i], out_offsets[i + 1]):
            for column in range(3):
                s[column] += edges[k, column]
            s[6] += edges[k, E_PF]
            s[7] += edges[k, E_PR]
            s[8] += edges[k, E_BF]
            s[9] += edges[k, E_BR]
        for j in range(in_offsets[i], in_offsets[i + 1]):
            if j + 16 < len(in_edges):
                prefetch(edges, np.int64(in_edges[j + 16]))
            k = in_edges[j]
            for column in range(3):
                s[3 + column] += edges[k, column]
            s[6] += edges[k, E_PR]
            s[7] += edges[k, E_PF]
            s[8] += edges[k, E_BR]
            s[9] += edges[k, E_BF]
        row = out[i]
        row[2] = _ln1(s[6])
        row[3] = _ln1(s[7])
        row[4] = _ln1(s[8])
        row[5] = _ln1(s[9])
        row[6] = _asymmetry(s[8], s[9])
        row[7] = _asymmetry(s[0], s[3])
        for side in range(2):
            n = s[3 * side]
            at = 8 * side
            bits = 0
            for word in range(4):
                bits += _popcount(flows_of[i, at + N_PORTS + word])
            span = (flows_of[i, at + N_LAST] - flows_of[i, at + N_FIRST]) * tick_ms
            squares = flows_of[i, at + N_GAPSQ] * tick_ms * tick_ms
            row[side] = _ln1(n)
            row[8 + side] = _ln1(s[10 + side])
            row[10 + side] = _ln1(float(services[i, side]))
            row[12 + side] = _ln1(distinct_of_bits(bits, 256))
            row[14 + side] = s[3 * side + 1] / n if n > 0 else 0.0
            row[16 + side] = s[3 * side + 2] / n if n > 0 else 0.0
            row[18 + side] = flows_of[i, at + N_HALF_OPEN] / n if n > 0 else 0.0
            row[20 + side] = _ln1(span / (n - 1)) if n > 1 else 0.0
            row[22 + side] = _ln1(_sd(squares, span, n - 1)) if n > 2 else 0.0
            row[24 + side] = _ln1(span)
            row[26 + side] = 1.0 if n > 0 else 0.0
            first = _PROFILE_AT + 2 * PROFILE * side
            for column in range(first, first + PROFILE):
                row[column] = _ln1(float(row[column]))
        row[28] = 1.0 if internal[i] else 0.0
