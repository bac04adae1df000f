"""Host graphs: structure, every feature by hand, and what others make of them."""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowsage.collector.errors import ConfigurationError
from flowsage.graph import memory
from flowsage.graph.addresses import Internal
from flowsage.graph.build import contacts
from flowsage.graph.features import EDGE_FEATURES, FEATURE_VERSION, NODE_FEATURES, PROFILE, profile_buckets
from flowsage.graph.flows import FlowBatch, HostTable, hash_names
from flowsage.graph.hostgraph import EDGE_NAMES, NODE_NAMES, HostGraph, host_graph
from tests.graph.generate import handmade, power_law

MS = 1_000_000
S = 1_000 * MS


def ln1(x: float) -> float:
    return math.log(1 + x)


def node(graph: HostGraph, name: str) -> dict[str, float]:
    i = graph.hosts.names.to_pylist().index(name)
    return dict(zip(NODE_NAMES, graph.node_features[i].tolist(), strict=True))


def edge(graph: HostGraph, src: str, dst: str) -> dict[str, float]:
    names = graph.hosts.names.to_pylist()
    pairs = [(names[s], names[d]) for s, d in zip(graph.src, graph.dst, strict=True)]
    return dict(zip(EDGE_NAMES, graph.edge_features[pairs.index((src, dst))].tolist(), strict=True))


def example() -> FlowBatch:
    """10.0.0.1 asks a web server three times and a name server once; a stranger knocks at 10.0.0.1, unanswered."""
    tcp = {"proto": 6, "src_port": 40_000}
    web = {**tcp, "src": "10.0.0.1", "dst": "93.184.216.34", "tcp_flags_fwd": 0x1B, "tcp_flags_rev": 0x1B}
    return handmade(
        [
            {**web, "start_ns": 0, "end_ns": 100 * MS, "dst_port": 443, "packets_fwd": 4, "packets_rev": 6,
             "bytes_fwd": 400, "bytes_rev": 6_000, "handshake_ns": 20_000, "iat_sum_ns_fwd": 90 * MS,
             "iat_sumsq_us2_fwd": 3 * 30_000**2, "length_sumsq_fwd": 4 * 100**2},
            {"src": "10.0.0.1", "dst": "10.0.0.53", "start_ns": 500 * MS, "end_ns": 510 * MS, "proto": 17,
             "dst_port": 53, "src_port": 40_001, "packets_fwd": 1, "packets_rev": 1, "bytes_fwd": 80, "bytes_rev": 120},
            {**web, "start_ns": 1_000 * MS, "end_ns": 1_300 * MS, "dst_port": 443, "packets_fwd": 2, "packets_rev": 2,
             "bytes_fwd": 300, "bytes_rev": 200, "handshake_ns": 40_000, "iat_sum_ns_fwd": 50 * MS,
             "iat_sumsq_us2_fwd": 50_000**2, "length_sumsq_fwd": 100**2 + 200**2},
            {**web, "start_ns": 4_000 * MS, "end_ns": 4_000 * MS, "dst_port": 80, "packets_fwd": 1, "packets_rev": 1,
             "bytes_fwd": 60, "bytes_rev": 60, "tcp_flags_fwd": 2, "tcp_flags_rev": 0x14, "length_sumsq_fwd": 3_600},
            {**tcp, "src": "203.0.113.9", "dst": "10.0.0.1", "start_ns": 5_000 * MS, "end_ns": 8_000 * MS,
             "dst_port": 22, "packets_fwd": 3, "packets_rev": 0, "bytes_fwd": 180, "bytes_rev": 0, "tcp_flags_fwd": 2,
             "tcp_flags_rev": 0},
        ]
    )  # fmt: skip


def test_every_edge_feature_is_what_it_says() -> None:
    got = edge(host_graph(example()), "10.0.0.1", "93.184.216.34")
    gaps = np.array([1_000.0, 3_000.0])
    packet_gaps = np.array([30.0, 30.0, 30.0, 50.0])
    lengths = np.array([100.0] * 4 + [100.0, 200.0] + [60.0])
    expected = {
        "flows": ln1(3), "packets_fwd": ln1(7), "packets_rev": ln1(9), "bytes_fwd": ln1(760), "bytes_rev": ln1(6_260),
        "byte_asymmetry": (760 - 6_260) / (760 + 6_260), "services": ln1(2), "ports": ln1(2), "answered": 2 / 3,
        "failed": 1 / 3, "half_open": 0, "duration_mean": ln1(400 / 3), "gap_mean": ln1(2_000),
        "gap_sd": ln1(gaps.std()), "span": ln1(4_000), "handshake_mean": ln1(30),
        "packet_gap_mean": ln1(packet_gaps.mean()),
        "packet_gap_sd": ln1(packet_gaps.std()), "packet_length_mean": ln1(760 / 7),
        "packet_length_sd": ln1(lengths.std()),
    }  # fmt: skip
    assert set(expected) == set(EDGE_NAMES)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name


def test_a_knock_that_nobody_answers_is_half_open() -> None:
    got = edge(host_graph(example()), "203.0.113.9", "10.0.0.1")
    assert (got["failed"], got["half_open"], got["answered"]) == (1, 1, 0)
    assert (got["gap_mean"], got["gap_sd"], got["span"], got["handshake_mean"]) == (0, 0, 0, 0)
    assert got["duration_mean"] == pytest.approx(ln1(3_000), rel=1e-5)
    assert got["byte_asymmetry"] == 1


def test_every_node_feature_is_what_it_says() -> None:
    flows = example()
    got = node(host_graph(flows), "10.0.0.1")
    gaps = np.array([500.0, 500.0, 3_000.0])
    expected: dict[str, float] = {
        "flows_out": ln1(4), "flows_in": ln1(1), "packets_sent": ln1(8), "packets_received": ln1(13),
        "bytes_sent": ln1(840), "bytes_received": ln1(6_560), "byte_asymmetry": (840 - 6_560) / 7_400,
        "flow_asymmetry": 3 / 5, "degree_out": ln1(2), "degree_in": ln1(1), "services_out": ln1(3),
        "services_in": ln1(1), "ports_out": ln1(3), "ports_in": ln1(1), "answered_out": 3 / 4,
        "answered_in": 0, "failed_out": 1 / 4, "failed_in": 1, "half_open_out": 0, "half_open_in": 1,
        "gap_mean_out": ln1(4_000 / 3), "gap_mean_in": 0, "gap_sd_out": ln1(gaps.std()), "gap_sd_in": 0,
        "span_out": ln1(4_000), "span_in": 0, "is_source": 1, "is_sink": 1, "internal": 1,
    }  # fmt: skip
    for side, services in (("out", flows.service[[0, 1, 3]]), ("in", flows.service[[4]])):
        counted, present = np.zeros(PROFILE), np.zeros(PROFILE)
        for service in services.tolist():
            a, b = profile_buckets(service)
            counted[a] += 1
            present[b] = 1
        for i in range(PROFILE):
            expected[f"profile_{side}_peers_{i:02}"] = ln1(counted[i])
            expected[f"profile_{side}_any_{i:02}"] = present[i]
    assert set(expected) == set(NODE_NAMES)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name


def test_hosts_that_only_answer_are_sinks_and_addresses_outside_are_not_internal() -> None:
    graph = host_graph(example())
    server = node(graph, "93.184.216.34")
    assert (server["is_source"], server["is_sink"], server["internal"]) == (0, 1, 0)
    assert server["bytes_sent"] == pytest.approx(ln1(6_260), rel=1e-5)
    assert server["packets_received"] == pytest.approx(ln1(7), rel=1e-5)
    assert server["gap_sd_in"] == pytest.approx(ln1(1_000), rel=1e-5)
    assert node(graph, "203.0.113.9")["is_sink"] == 0


def test_what_is_unknown_counts_as_nothing() -> None:
    graph = host_graph(handmade([{"src": "a", "dst": "b", "start_ns": 7}, {"src": "a", "dst": "b", "start_ns": 8}]))
    got = edge(graph, "a", "b")
    assert got.pop("flows") == pytest.approx(ln1(2), rel=1e-6)
    assert (got.pop("answered"), got.pop("services"), got.pop("ports")) == pytest.approx((1, ln1(1), ln1(1)), rel=1e-6)
    assert got.pop("gap_mean") == got.pop("span") == pytest.approx(1e-6, rel=1e-3)
    assert set(got.values()) == {0}


def test_names_units_and_meanings_are_given_once_for_each_column() -> None:
    graph = host_graph(example())
    assert graph.node_features.shape == (4, len(NODE_FEATURES))
    assert graph.edge_features.shape == (3, len(EDGE_FEATURES))
    for features in (NODE_FEATURES, EDGE_FEATURES):
        assert len({f.name for f in features}) == len(features)
        assert all(f.unit and f.meaning for f in features)
    assert FEATURE_VERSION == 1


def check_structure(flows: FlowBatch, graph: HostGraph) -> None:
    pairs = sorted(set(zip(flows.src.tolist(), flows.dst.tolist(), strict=True)))
    host_of = graph.host_of
    assert sorted(zip(host_of[graph.src].tolist(), host_of[graph.dst].tolist(), strict=True)) == pairs
    assert set(host_of.tolist()) == {h for p in pairs for h in p}
    assert graph.hosts.hash.tolist() == flows.hosts.hash[host_of].tolist()
    assert hash_names(graph.hosts.names).tolist() == graph.hosts.hash.tolist()
    order = np.lexsort((graph.dst, graph.src))
    assert np.array_equal(order, np.arange(graph.num_edges))
    for i in range(graph.num_hosts):
        a, b = graph.out_offsets[i : i + 2]
        assert np.array_equal(np.arange(a, b), np.flatnonzero(graph.src == i))
        a, b = graph.in_offsets[i : i + 2]
        assert np.array_equal(graph.in_edges[a:b], np.flatnonzero(graph.dst == i))
    assert np.array_equal(graph.in_src, graph.src[graph.in_edges])
    c = graph.contacts
    assert np.array_equal(host_of[graph.src[graph.edge_of_contact]], c.src)
    assert np.array_equal(host_of[graph.dst[graph.edge_of_contact]], c.dst)
    for k in range(graph.num_edges):
        assert graph.services(k).tolist() == c.service[graph.edge_of_contact == k].tolist()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 3), st.integers(0, 5)), max_size=60))
def test_edges_are_the_distinct_pairs_and_both_csr_list_them(rows: list[tuple[int, int, int, int]]) -> None:
    rows.sort(key=lambda r: r[3])
    flows = handmade([{"src": f"h{a}", "dst": f"h{b}", "dst_port": p, "start_ns": t} for a, b, p, t in rows])
    check_structure(flows, host_graph(flows))


def by_name(graph: HostGraph) -> dict[Any, list[float]]:
    names = graph.hosts.names.to_pylist()
    nodes: dict[Any, list[float]] = {n: graph.node_features[i].tolist() for i, n in enumerate(names)}
    for k, (s, d) in enumerate(zip(graph.src.tolist(), graph.dst.tolist(), strict=True)):
        nodes[names[s], names[d]] = graph.edge_features[k].tolist()
    return nodes


def test_features_do_not_depend_on_the_order_of_simultaneous_flows_nor_on_that_of_hosts() -> None:
    flows = power_law(3_000, 60, 300)
    flows = flows.take(np.arange(len(flows)))
    flows.start_ns[:] = flows.start_ns // S * S
    expected = by_name(host_graph(flows))
    rng = np.random.default_rng(2)
    order = np.lexsort((rng.random(len(flows)), flows.start_ns))
    assert by_name(host_graph(flows.take(order))) == expected
    places = rng.permutation(len(flows.hosts)).astype(np.int32)
    where = np.argsort(places)
    hosts = HostTable(flows.hosts.names.take(where), flows.hosts.hash[where])
    moved = FlowBatch(**{**vars(flows), "hosts": hosts, "src": places[flows.src], "dst": places[flows.dst]})
    assert by_name(host_graph(moved)) == expected


def test_the_graph_of_a_window_is_the_same_within_a_run_and_side_by_side_in_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flows = power_law(4_000, 90, 500, windows=3)
    run = contacts(flows, 60 * S)
    for k in range(3):
        a, b = run.flow_offsets[k : k + 2]
        one = flows.take(slice(a, b))
        expected = host_graph(one)
        monkeypatch.setattr("flowsage.graph.hostgraph._THREADED", 10)
        got = host_graph(one, run.slice(k))
        monkeypatch.undo()
        assert np.array_equal(got.node_features, expected.node_features)
        assert np.array_equal(got.edge_features, expected.edge_features)
        assert np.array_equal(got.src, expected.src)
        check_structure(one, got)
    with pytest.raises(ValueError, match="same window"):
        host_graph(flows, run.slice(0))


def test_many_distinct_ports_are_counted_within_a_tenth() -> None:
    rows = [{"src": "a", "dst": "b", "start_ns": i, "dst_port": 1 + 7 * i, "src_port": 50_000} for i in range(150)]
    graph = host_graph(handmade(rows))
    assert math.expm1(node(graph, "a")["ports_out"]) == pytest.approx(150, rel=0.1)
    assert math.expm1(node(graph, "b")["ports_in"]) == pytest.approx(150, rel=0.1)
    assert math.expm1(node(graph, "a")["services_out"]) == pytest.approx(150, rel=1e-5)


def test_pyg_sees_the_same_graph() -> None:
    graph = host_graph(example())
    data = graph.to_pyg()
    assert data.validate(raise_on_error=True)
    assert data.num_nodes == 4
    assert data.hosts == graph.hosts.names.to_pylist()
    assert data.edge_index.tolist() == [graph.src.tolist(), graph.dst.tolist()]
    assert torch.equal(data.x, torch.tensor(graph.node_features))
    assert torch.equal(data.edge_attr, torch.tensor(graph.edge_features))
    assert data.node_feature_names == list(NODE_NAMES)
    assert data.edge_feature_names == list(EDGE_NAMES)


def test_networkx_sees_the_same_graph_with_readable_attributes() -> None:
    graph = host_graph(example())
    seen = graph.to_networkx()
    assert isinstance(seen, nx.DiGraph)
    assert set(seen.nodes) == {"10.0.0.1", "10.0.0.53", "93.184.216.34", "203.0.113.9"}
    attributes = seen.edges["10.0.0.1", "93.184.216.34"]
    assert attributes["services"] == ["tcp/443", "tcp/80"]
    assert (attributes["flows"], attributes["answered"], attributes["failed"]) == (3, 2, 1)
    assert (attributes["bytes_fwd"], attributes["bytes_rev"]) == (760, 6_260)
    assert seen.edges["203.0.113.9", "10.0.0.1"]["half_open"] == 1
    assert seen.nodes["10.0.0.53"]["internal"]
    assert not seen.nodes["203.0.113.9"]["internal"]


def test_no_flows_are_an_empty_graph() -> None:
    graph = host_graph(example().take(slice(0, 0)))
    assert (graph.num_hosts, graph.num_edges) == (0, 0)
    assert graph.to_pyg().num_nodes == 0
    assert len(graph.to_networkx()) == 0


def test_hosts_are_internal_by_private_address_or_by_having_none() -> None:
    names = {
        "10.1.2.3": True, "172.16.0.1": True, "172.32.0.1": False, "192.168.1.1": True, "169.254.9.9": True,
        "8.8.8.8": False, "1.2.3": True, "256.1.1.1": True, "1.2.3.4.5": True, "01.2.3.4": True, "8.8.8.8 ": True,
        "fe80::1": True, "fd00::5": True, "2001:db8::1": False, "::ffff:10.0.0.1": True, "::ffff:8.8.8.8": False,
        "00:11:22:33:44:55": True, "printer": True, "": True, "1..2.3": True, "1.2.3.": True, "8.8.8.0008": True,
    }  # fmt: skip
    table = from_hosts(list(names))
    tell = Internal()
    for _ in range(2):
        assert dict(zip(names, tell(table).tolist(), strict=True)) == names
    assert {n: tell.one(n) for n in names} == names
    own = Internal(["8.8.8.0/24", "2001:db8::/32"])
    told = dict(zip(names, own(table).tolist(), strict=True))
    assert told["8.8.8.8"]
    assert told["2001:db8::1"]
    assert not told["10.1.2.3"]
    assert told["printer"]
    with pytest.raises(ConfigurationError, match="is not a network"):
        Internal(["10.0.0.1/8"])


def from_hosts(names: list[str]) -> HostTable:
    return handmade([{"src": n, "dst": n, "start_ns": 0} for n in names]).hosts


def test_memory_is_used_again_only_when_nobody_looks_at_it() -> None:
    memory._buffers.clear()
    first = memory.empty((100_000, 2), np.int64)
    assert first.ctypes.data % 64 == 0
    first[:] = 7
    view = first[5:10].view(np.int32)
    other = memory.zeros((100_000, 2), np.int64)
    assert not np.shares_memory(first, other)
    address = first.ctypes.data
    del first
    third = memory.empty((100_000, 2), np.int64)
    assert not np.shares_memory(third, view)
    tensor = torch.from_numpy(third)
    del third
    fourth = memory.empty((100_000, 2), np.int64)
    assert fourth.ctypes.data not in (address, tensor.data_ptr())
    del view
    again = memory.empty((90_000, 2), np.int64)
    assert again.ctypes.data == address
    assert np.all(memory.zeros((100_000, 2), np.int64) == 0)


def test_memory_that_nobody_holds_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    memory._buffers.clear()
    monkeypatch.setattr(memory, "_LIMIT", 3_000_000)
    held = memory.empty(1_000_000, np.uint8)
    where = memory.empty(1_000_000, np.uint8).ctypes.data

    def remembered(address: int) -> bool:
        return any(b.ctypes.data <= address < b.ctypes.data + len(b) for b in memory._buffers)

    new = memory.empty(1_100_000, np.uint8)
    assert not remembered(where)
    assert remembered(held.ctypes.data)
    assert remembered(new.ctypes.data)
    assert sum(len(b) for b in memory._buffers) <= 3_000_000
    memory._buffers.clear()


def test_large_memory_is_not_remembered_and_takes_room_when_it_is_touched() -> None:
    memory._buffers.clear()
    count = memory._LARGEST // 8
    before = resident()
    large = memory.zeros((count, 1), np.float64), memory.sparse(count, np.float64)
    assert resident() - before < memory._LARGEST // 8
    assert not any(a.any() for a in large)
    assert large[0].ctypes.data % 64 == 0
    large[1][:: count // 4] = 1.0
    assert large[1].sum() == 4
    assert memory.empty(count, np.float64).shape == (count,)
    assert not memory._buffers


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_graphs_that_are_kept_are_not_overwritten_by_later_ones() -> None:
    kept = [host_graph(power_law(30_000, 2_000, 9_000, seed=k)) for k in range(3)]
    copies = [(g.node_features.copy(), g.edge_sums.copy(), g.contacts.bytes_fwd.copy()) for g in kept]
    for k in range(3):
        host_graph(power_law(30_000, 2_000, 9_000, seed=10 + k))
    for g, (x, sums, volume) in zip(kept, copies, strict=True):
        assert np.array_equal(g.node_features, x)
        assert np.array_equal(g.edge_sums, sums)
        assert np.array_equal(g.contacts.bytes_fwd, volume)
