"""Flow sets with the shape of a network: few hosts do much, most do little. Seeded; used by tests and benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from flowsage.graph.flows import UNKNOWN, FlowBatch, HostTable, from_table, hash_names
from flowsage.graph.services import service_code

PORTS = np.array([443, 80, 53, 22, 445, 3389, 8080, 25, 123, 5432], np.int32)
START_NS = 1_700_000_040_000_000_000
"""A multiple of 60 s."""


def power_law(
    flows: int, hosts: int, edges: int, *, windows: int = 1, window_ns: int = 60_000_000_000, seed: int = 0
) -> FlowBatch:
    """`flows` flows in time order over `windows` windows, between `hosts` hosts along about `edges` pairs.

    Degrees and flows an edge follow power laws, every host occurs in at least one pair where edges >= hosts.
    """
    rng = np.random.default_rng(seed)
    rank = np.arange(1, hosts + 1)
    weight = rank**-0.75
    cumulative = np.cumsum(weight) / weight.sum()
    order_src, order_dst = rng.permutation(hosts), rng.permutation(hosts)
    src = order_src[np.searchsorted(cumulative, rng.random(edges))]
    dst = order_dst[np.searchsorted(cumulative, rng.random(edges))]
    some = min(hosts, edges)
    src[:some] = np.arange(some)
    same = src == dst
    dst[same] = (dst[same] + 1) % hosts
    port = PORTS[np.minimum(rng.geometric(0.35, edges) - 1, len(PORTS) - 1)]
    busy = (rng.pareto(1.3, edges) + 0.05).astype(np.float64)
    of_edge = np.concatenate(
        [np.arange(min(edges, flows)), np.searchsorted(np.cumsum(busy) / busy.sum(), rng.random(max(0, flows - edges)))]
    )
    of_edge = rng.permutation(np.minimum(of_edge, edges - 1))
    start = START_NS + np.sort(rng.integers(0, windows * window_ns, flows))
    length = rng.exponential(2e9, flows).astype(np.int64)
    failed = rng.random(flows) < 0.05
    answered = ~failed & (rng.random(flows) < 0.95)
    packets_fwd = rng.geometric(0.2, flows).astype(np.int64)
    packets_rev = np.where(answered, rng.geometric(0.2, flows), 0).astype(np.int64)
    proto = np.where(port == 53, 17, 6).astype(np.int32)[of_edge]
    src_port = rng.integers(32_768, 61_000, flows).astype(np.int32)
    dst_port = port[of_edge].astype(np.int32)
    names = pa.array(host_names(hosts), pa.string())
    return FlowBatch(
        hosts=HostTable(names, hash_names(names)),
        start_ns=start,
        end_ns=start + length,
        src=src[of_edge].astype(np.int32),
        dst=dst[of_edge].astype(np.int32),
        service=service_code(proto, src_port, dst_port),
        src_port=src_port,
        dst_port=dst_port,
        proto=proto,
        packets_fwd=packets_fwd,
        packets_rev=packets_rev,
        bytes_fwd=packets_fwd * rng.integers(60, 900, flows),
        bytes_rev=packets_rev * rng.integers(60, 1400, flows),
        failed=failed & (proto == 6),
        answered=answered,
        told=np.ones(flows, np.bool_),
        row=np.arange(flows, dtype=np.int64),
    )


def host_names(hosts: int) -> list[str]:
    """Addresses of a private network, and from every eighth on a public one."""
    return [f"{'10' if i % 8 else '81'}.{i >> 16 & 255}.{i >> 8 & 255}.{i & 255}" for i in range(hosts)]


def handmade(rows: list[dict[str, Any]]) -> FlowBatch:
    """Flows from readable rows: src, dst, start_ns, and any column of a flow file; what is left out is unknown."""
    columns = {}
    for name in ("src", "dst", *sorted({"start_ns", *(k for r in rows for k in r)} - {"src", "dst"})):
        kind = pa.string() if name in ("src", "dst", "state") else pa.int64()
        column = {"src": "src_ip", "dst": "dst_ip"}.get(name, name)
        columns[column] = pa.array([r.get(name) for r in rows], kind)
    return from_table(pa.table(columns))


__all__ = ["PORTS", "START_NS", "UNKNOWN", "handmade", "host_names", "power_law"]
