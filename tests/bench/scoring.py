"""Flows in memory to a scored window, against graph and model alone by networkx and PyG."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import networkx as nx
import numpy as np
import torch
from torch_geometric.nn import SAGEConv
from torch_geometric.utils import from_networkx

from flowsage.graph.flows import FlowBatch
from flowsage.models.detector import Detector, DetectorConfig
from tests.bench.rows import Row
from tests.graph.generate import power_law

WINDOW_NS = 60 * 10**9


def score(flows: FlowBatch, detector: Detector) -> float:
    """Seconds from flows to everything that is said of their window: history, graph, alarms."""
    started = time.perf_counter()
    now = int(flows.start_ns[-1])
    detector.pane(now, flows)
    detector.close(flows)
    return time.perf_counter() - started


def warm_detector(flows: FlowBatch) -> Detector:
    """A detector that has seen a window of the same network before."""
    detector = Detector(DetectorConfig(window_ns=WINDOW_NS))
    score(flows, detector)
    return detector


def shifted(flows: FlowBatch, windows: int) -> FlowBatch:
    """The same flows, some windows later."""
    columns = {name: getattr(flows, name) for name in flows.__dataclass_fields__}
    columns["start_ns"] = flows.start_ns + windows * WINDOW_NS
    columns["end_ns"] = flows.end_ns + windows * WINDOW_NS
    return FlowBatch(**columns)


def median_of_three(flows: FlowBatch) -> float:
    """Median seconds of three windows with the flows of the window before."""
    detector = warm_detector(flows)
    return float(np.median([score(shifted(flows, k), detector) for k in (1, 2, 3)]))


def by_networkx(flows: FlowBatch) -> float:
    """Seconds for graph and model alone: networkx gathers the flows into edges, PyG converts and runs two SAGEConv."""
    columns = [c.tolist() for c in (flows.src, flows.dst, flows.bytes_fwd, flows.packets_fwd)]
    convs = SAGEConv(5, 48), SAGEConv(48, 48)
    started = time.perf_counter()
    graph = nx.DiGraph()
    for s, t, size, packets in zip(*columns, strict=True):
        if graph.has_edge(s, t):
            edge = graph.edges[s, t]
            edge["flows"] += 1
            edge["bytes"] += size
            edge["packets"] += packets
        else:
            graph.add_edge(s, t, flows=1, bytes=size, packets=packets)
    features = {
        "degree_in": dict(graph.in_degree()), "degree_out": dict(graph.out_degree()),
        "flows_out": dict(graph.out_degree(weight="flows")), "bytes_out": dict(graph.out_degree(weight="bytes")),
        "bytes_in": dict(graph.in_degree(weight="bytes")),
    }  # fmt: skip
    for name, values in features.items():
        nx.set_node_attributes(graph, values, name)
    data = from_networkx(graph, group_node_attrs=list(features))
    with torch.no_grad():
        x = torch.log1p(data.x.float())
        convs[1](convs[0](x, data.edge_index).relu(), data.edge_index)
    return time.perf_counter() - started


def large() -> None:
    """10 M flows in a process of its own, so that its memory is its own: prints seconds and peak bytes."""
    flows = power_law(10_000_000, 880_000, 2_400_000)
    print(median_of_three(flows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def rows() -> Iterator[Row]:
    """1 M flows beside networkx + PyG; 10 M flows."""
    flows = power_law(1_000_000, 90_000, 250_000)
    ours = median_of_three(flows)
    theirs = by_networkx(flows)
    yield Row(
        name="flows to scored window, 1 M flows / 90 k hosts / 250 k edges", value=ours, unit="s",
        reference="graph and model alone, networkx + PyG", reference_value=theirs, bar="≤ 0.5 s and ≥ 14 x",
        met=ours <= 0.5 and theirs / ours >= 14,
    )  # fmt: skip
    del flows
    gc.collect()
    done = subprocess.run(
        [sys.executable, "-c", "from tests.bench.scoring import large; large()"],
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, peak = map(float, done.stdout.split())
    yield Row(
        name="flows to scored window, 10 M flows / 880 k hosts / 2.4 M edges", value=seconds, unit="s",
        bar="≤ 6 s", met=seconds <= 6,
    )  # fmt: skip
    yield Row(
        name="… peak resident memory, the flows included", value=peak / 1e9, unit="GB", bar="≤ 5 GB", met=peak <= 5e9
    )
