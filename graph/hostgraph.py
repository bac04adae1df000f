"""One window as a directed graph of hosts: an edge for each pair that met, CSR both ways, features."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flowsage.graph import aggregate, features, memory
from flowsage.graph.addresses import Internal
from flowsage.graph.build import Contacts, contacts
from flowsage.graph.features import EDGE_FEATURES, EDGE_NAMES, FEATURE_VERSION, NODE_FEATURES, NODE_NAMES
from flowsage.graph.flows import Bool, FlowBatch, HostTable, Int32
from flowsage.graph.services import service_name

if TYPE_CHECKING:
    import networkx
    from torch_geometric.data import Data

__all__ = ["EDGE_FEATURES", "EDGE_NAMES", "FEATURE_VERSION", "NODE_FEATURES", "NODE_NAMES", "HostGraph", "host_graph"]

Float32 = npt.NDArray[np.float32]

_NONE = np.empty(0, np.bool_)
_THREADED = 100_000
"""From this many flows on, edges and hosts are summed side by side."""

_PRIVATE = Internal()


@dataclass(frozen=True)
class HostGraph:
    """h hosts that occur in a window, e edges in order of (src, dst), c contacts.

    Hosts are numbered in order of appearance. Indices and offsets are int32, as torch.embedding_bag takes them.
    """

    hosts: HostTable
    host_of: Int32
    """[h] index of each host in the host table of the flows."""
    src: Int32
    """[e] initiator of each edge."""
    dst: Int32
    """[e] responder: with `out_offsets` the CSR by initiator (its edges are a range)."""
    out_offsets: Int32
    """[h + 1] edges out_offsets[i]:out_offsets[i + 1] are those that i initiates."""
    in_offsets: Int32
    """[h + 1] in_edges[in_offsets[i]:in_offsets[i + 1]] are those towards i."""
    in_edges: Int32
    """[e] edges in order of (dst, src)."""
    in_src: Int32
    """[e] initiator of each of `in_edges`: the CSR by responder."""
    edge_of_contact: Int32
    """[c]"""
    contact_offsets: Int32
    """[e + 1] contact_order[contact_offsets[k]:contact_offsets[k + 1]] are the contacts of edge k, by first flow."""
    contact_order: Int32
    """[c]"""
    contacts: Contacts
    edge_sums: npt.NDArray[np.int64]
    """[e, 16] what edge features are made of; columns features.E_*."""
    node_features: Float32
    """[h, len(NODE_FEATURES)]"""
    edge_features: Float32
    """[e, len(EDGE_FEATURES)]"""
    internal: Bool
    """[h]"""

    @property
    def num_hosts(self) -> int:
        """h."""
        return len(self.host_of)

    @property
    def num_edges(self) -> int:
        """e."""
        return len(self.src)

    def services(self, edge: int) -> Int32:
        """Service codes that were used along an edge, in order of first flow."""
        a, b = self.contact_offsets[edge], self.contact_offsets[edge + 1]
        return self.contacts.service[self.contact_order[a:b]]

    def to_pyg(self) -> Data:
        """As torch_geometric.data.Data: x [h, F], edge_index [2, e], edge_attr [e, G], and names of hosts and columns.

        x and edge_attr share memory with this graph.
        """
        import torch
        from torch_geometric.data import Data

        return Data(
            x=torch.from_numpy(self.node_features),
            edge_index=torch.from_numpy(np.stack([self.src, self.dst]).astype(np.int64)),
            edge_attr=torch.from_numpy(self.edge_features),
            num_nodes=self.num_hosts,
            hosts=self.hosts.names.to_pylist(),
            node_feature_names=list(NODE_NAMES),
            edge_feature_names=list(EDGE_NAMES),
            feature_version=FEATURE_VERSION,
        )

    def to_networkx(self) -> networkx.DiGraph:
        """As networkx.DiGraph for looking at: hosts by name, plain counts and service names as attributes."""
        import networkx as nx

        graph = nx.DiGraph()
        names = self.hosts.names.to_pylist()
        for i, name in enumerate(names):
            graph.add_node(name, internal=bool(self.internal[i]), features=self.node_features[i])
        columns = ("flows", "answered", "failed", "packets_fwd", "packets_rev", "bytes_fwd", "bytes_rev")
        sums = self.edge_sums[:, : len(columns)].tolist()
        half_open = self.edge_sums[:, features.E_HALF_OPEN].tolist()
        for k, (s, d) in enumerate(zip(self.src.tolist(), self.dst.tolist(), strict=True)):
            graph.add_edge(
                names[s],
                names[d],
                **dict(zip(columns, sums[k], strict=True)),
                half_open=half_open[k],
                services=[service_name(code) for code in self.services(k).tolist()],
                features=self.edge_features[k],
            )
        return graph


def host_graph(flows: FlowBatch, folded: Contacts | None = None, *, internal: Internal = _PRIVATE) -> HostGraph:
    """The graph of all `flows`, which are in time order and taken as one window.

    `folded`: their contacts, if at hand (one window, `of_flow` counting from 0); `internal` tells our own hosts.
    Features of a host or an edge do not depend on the order of flows that start at the same time, nor on that of hosts.
    """
    if folded is None:
        folded = contacts(flows, 1 << 62)
    c, n = len(folded), len(flows)
    if len(folded.of_flow) != n:
        raise ValueError(f"contacts of {len(folded.of_flow)} flows with {n} flows; give those of the same window")
    local: Int32 = memory.empty(len(flows.hosts), np.int32)
    local.fill(-1)
    host_of: Int32 = memory.empty(min(len(local), 2 * c), np.int32)
    local_src, local_dst = memory.empty(c, np.int32), memory.empty(c, np.int32)
    h = aggregate.localise(folded.src, folded.dst, local, host_of, local_src, local_dst)
    host_of = host_of[:h].copy()
    # Contacts by (src, dst): by dst, and then stably by src.
    scratch, offsets = memory.empty(h, np.int32), memory.empty(h + 1, np.int32)
    by_dst, order = memory.empty(c, np.int32), memory.empty(c, np.int32)
    aggregate.counting_sort(local_dst, order[:0], offsets, by_dst, scratch)
    aggregate.counting_sort(local_src, by_dst, offsets, order, scratch)
    edge_of, src, dst, starts = (memory.empty(c + k, np.int32) for k in (0, 0, 0, 1))
    e = aggregate.group(order, local_src, local_dst, edge_of, src, dst, starts)
    src, dst, starts = src[:e], dst[:e], starts[: e + 1]
    out_offsets, in_offsets = memory.empty(h + 1, np.int32), memory.empty(h + 1, np.int32)
    out_offsets[0] = 0
    np.cumsum(np.bincount(src, minlength=h), out=out_offsets[1:])
    in_edges = memory.empty(e, np.int32)
    aggregate.counting_sort(dst, order[:0], in_offsets, in_edges, scratch)

    origin = int(flows.start_ns[0]) if n else 0
    shift = max(0, (int(flows.start_ns[-1]) - origin).bit_length() - 31) if n else 0
    tick_ms = 2.0**shift / 1e6
    half_open = _NONE if flows.detail is None else flows.detail.half_open
    edge_sums = memory.zeros((e, 16), np.int64)
    edge_detail = memory.zeros((0 if flows.detail is None else e, 8), np.float64)
    edge_features = memory.empty((e, len(EDGE_FEATURES)), np.float32)
    node_sums, services = memory.zeros((h, 16), np.int64), memory.zeros((h, 2), np.int32)
    node_features = memory.zeros((h, len(NODE_FEATURES)), np.float32)

    def edges() -> None:
        aggregate.sum_contacts(
            edge_of, folded.flows, folded.answered, folded.failed, folded.packets_fwd, folded.packets_rev,
            folded.bytes_fwd, folded.bytes_rev, edge_sums,
        )  # fmt: skip
        aggregate.sum_flows_of_edges(
            folded.of_flow, edge_of, flows.start_ns, flows.end_ns, flows.dst_port, half_open, origin, shift, edge_sums
        )
        if flows.detail is not None:
            d = flows.detail
            aggregate.sum_details(
                folded.of_flow, edge_of, flows.packets_fwd, flows.bytes_fwd,
                d.handshake_ns, d.gap_sum_ns, d.gap_sumsq_us2, d.length_sumsq, edge_detail,
            )  # fmt: skip
        features.fill_edges(edge_sums, edge_detail, tick_ms, edge_features)

    def nodes() -> None:
        aggregate.sum_flows_of_hosts(
            flows.src, flows.dst, local, flows.start_ns, flows.dst_port, half_open, origin, shift, node_sums
        )
        first = NODE_NAMES.index("profile_out_peers_00")
        keys = memory.empty(1 << (2 * c).bit_length(), np.int64)
        aggregate.profile(local_src, local_dst, folded.service, first, services, node_features, keys)

    own = internal(flows.hosts)[host_of]

    def finish(begin: int, end: int) -> None:
        features.fill_nodes(
            out_offsets, in_offsets, in_edges, edge_sums, node_sums, services, own, tick_ms, begin, end, node_features
        )

    if n >= _THREADED:
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(edges)
            nodes()
            waiting.result()
            waiting = other.submit(finish, h // 2, h)
            finish(0, h // 2)
            waiting.result()
    else:
        edges()
        nodes()
        finish(0, h)
    everyone = h == len(flows.hosts) and bool(np.all(host_of[1:] > host_of[:-1]))
    hosts = flows.hosts if everyone else HostTable(flows.hosts.names.take(pa.array(host_of)), flows.hosts.hash[host_of])
    return HostGraph(
        hosts=hosts,
        host_of=host_of,
        src=src,
        dst=dst,
        out_offsets=out_offsets,
        in_offsets=in_offsets,
        in_edges=in_edges,
        in_src=src[in_edges],
        edge_of_contact=edge_of,
        contact_offsets=starts,
        contact_order=order,
        contacts=folded,
        edge_sums=edge_sums,
        node_features=node_features,
        edge_features=edge_features,
        internal=own,
    )
