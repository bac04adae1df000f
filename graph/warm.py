"""Compiles every kernel of this room, so that the first packet does not wait for it."""

from __future__ import annotations

import pyarrow as pa

from flowsage.graph.build import contacts
from flowsage.graph.flows import FlowBatch, from_table, merge
from flowsage.graph.hostgraph import host_graph
from flowsage.graph.window import WindowBuffer, order_of

_SECOND = 1_000_000_000


def _flows(*hosts: str) -> FlowBatch:
    n = len(hosts) - 1
    return from_table(
        pa.table(
            {
                "src_ip": pa.array(hosts[:-1]),
                "dst_ip": pa.array(hosts[1:]),
                "start_ns": pa.array([k * 50 * _SECOND for k in range(n)]),
                "dst_port": pa.array([80] * n),
                "handshake_ns": pa.array([1] * n),
            }
        )
    )


def compile_kernels() -> None:
    """Run every kernel once on a few flows. Numba's cache on disk makes the next process's first call fast."""
    buffer = WindowBuffer(60 * _SECOND)
    buffer.add(_flows("10.0.0.1", "fe80::1", "printer"))
    buffer.add(_flows("10.0.0.2", "10.0.0.1", "printer", "10.0.0.2"))
    closed = buffer.flush()
    assert closed is not None
    folded = contacts(closed, 60 * _SECOND)
    first = closed.take(slice(0, int(folded.flow_offsets[1])))
    host_graph(first, folded.slice(0))
    merge([closed, _flows("a", "b")])
    order_of(closed.start_ns)
