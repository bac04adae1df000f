"""What this room costs, against other ways to do the same: `python -m tests.graph.benchmark [--large]`.

Wall and CPU milliseconds, the best of some repetitions; CPU time hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from flowsage.graph import aggregate, memory
from flowsage.graph.build import contacts
from flowsage.graph.flows import FlowBatch
from flowsage.graph.hostgraph import host_graph
from flowsage.graph.window import WindowBuffer
from tests.graph.generate import power_law

WINDOW_NS = 60_000_000_000
SIZES = {"1 M flows": (1_000_000, 90_000, 250_000), "10 M flows": (10_000_000, 880_000, 2_400_000)}


class Cost(NamedTuple):
    """One row: `wall_ms` and `cpu_ms` are each the least that was seen."""

    name: str
    wall_ms: float
    cpu_ms: float


def cost(name: str, call: Callable[[], Any], repeat: int = 5) -> Cost:
    """The least wall and CPU time of a call."""
    wall, cpu = [], []
    for _ in range(repeat):
        w, c = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - w)
        cpu.append(time.process_time() - c)
    return Cost(name, 1e3 * min(wall), 1e3 * min(cpu))


def polars_contacts(frame: pl.DataFrame) -> pl.DataFrame:
    """The sums of `contacts` by polars' streaming group-by (without the order, and without `of_flow`)."""
    totals = ("answered", "failed", "packets_fwd", "packets_rev", "bytes_fwd", "bytes_rev")
    sums = [pl.col(name).sum() for name in totals]
    extent = [pl.col("start_ns").min(), pl.col("end_ns").max(), pl.col("told").any(), pl.len().alias("flows")]
    return frame.lazy().group_by("src", "dst", "service").agg(*sums, *extent).collect(engine="streaming")


def stages(label: str, flows: FlowBatch) -> list[Cost]:
    """Flows to contacts, contacts to graph, and the alternatives that were not taken."""
    columns = ("src", "dst", "service", "answered", "failed", "told", "start_ns", "end_ns")
    volumes = ("packets_fwd", "packets_rev", "bytes_fwd", "bytes_rev")
    frame = pl.DataFrame({name: getattr(flows, name) for name in (*columns, *volumes)})
    folded = contacts(flows, WINDOW_NS)
    graph = host_graph(flows, folded)
    h, c = graph.num_hosts, len(folded)
    src, dst = graph.src[graph.edge_of_contact], graph.dst[graph.edge_of_contact]
    key = src.astype(np.int64) * h + dst
    tensor = torch.from_numpy(key)
    offsets, first, second, scratch = (memory.empty(size, np.int32) for size in (h + 1, c, c, h))

    def counting() -> None:
        aggregate.counting_sort(dst, first[:0], offsets, first, scratch)
        aggregate.counting_sort(src, first, offsets, second, scratch)

    del graph
    return [
        cost(f"{label}: contacts", lambda: contacts(flows, WINDOW_NS)),
        cost(f"{label}: contacts by polars, streaming", lambda: polars_contacts(frame), 3),
        cost(f"{label}: graph and features of contacts", lambda: host_graph(flows, folded)),
        cost(f"{label}: flows to graph and features", lambda: host_graph(flows)),
        cost(f"{label}: contacts by (src, dst), counting sort", counting),
        cost(f"{label}: the same, np.argsort", lambda: np.argsort(key, kind="stable"), 3),
        cost(f"{label}: the same, torch.argsort", lambda: torch.argsort(tensor, stable=True), 3),
    ]


def buffering(flows: FlowBatch) -> list[Cost]:
    """Flows through the window buffer, in order and in the order in which they end."""

    def run(arriving: FlowBatch, size: int) -> None:
        buffer = WindowBuffer(WINDOW_NS, 10_000_000_000)
        for at in range(0, len(arriving), size):
            buffer.add(arriving.take(slice(at, at + size)))
            buffer.close_ready()
        buffer.flush()

    ended = flows.take(np.argsort(flows.end_ns, kind="stable"))
    return [
        cost("window buffer, 1 M flows in order, 10,000 a batch", lambda: run(flows, 10_000), 3),
        cost("window buffer, 1 M flows as they end, 10,000 a batch", lambda: run(ended, 10_000), 3),
        cost("window buffer, 1 M flows as they end, 100 a batch", lambda: run(ended, 100), 3),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="10 M flows too")
    large = parser.parse_args().large
    small = power_law(20, 10, 12)
    rows = [
        cost("20 flows: contacts", lambda: contacts(small, WINDOW_NS), 200),
        cost("20 flows: flows to graph and features", lambda: host_graph(small), 200),
    ]
    for label, size in SIZES.items():
        if large or size[0] <= 1_000_000:
            rows += stages(label, power_law(*size))
    rows += buffering(power_law(1_000_000, 90_000, 250_000, windows=3))
    for row in rows:
        print(f"{row.name:<60}{row.wall_ms:>12.3f} ms wall{row.cpu_ms:>12.3f} ms CPU")


if __name__ == "__main__":
    main()
