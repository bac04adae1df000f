"""What speaks for a first meeting and what against it: by deletion, in the model's own terms.

The graph's part in the plausibility of (s, t, svc) is f. Everything that f knows of s and t are the meetings that they
are remembered by, so each of those is taken out of the tables, as training does it (`MeetingMemory.graph`, `without`),
and f computed again. What f loses by it is what that meeting spoke *for* this one; what it gains, *against* it.

Source: deletion (occlusion) as in Zeiler, Fergus: Visualizing and Understanding Convolutional Networks, ECCV 2014; for
graphs, Yuan et al.: Explainability in Graph Neural Networks: A Taxonomic Survey, TPAMI 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from flowsage.models import signatures
from flowsage.models.columns import Float64, Int32, Int64
from flowsage.models.decoder import service_codes
from flowsage.models.memory import Graph, MeetingMemory
from flowsage.models.network import Network, View, own_signs
from flowsage.models.sage import Csr, threads_for

MOST: Final = 24
"""Newest meetings of either end that are tried."""


@dataclass(frozen=True)
class Attribution:
    """m remembered meetings of the two hosts, and what each says of their own.

    at i64[m]: positions in the ring; source, target, service i32[m]: host slots and service codes; effect f64[m]: nats
    by which it makes this meeting more plausible (below 0: less). f: nats, with all of them there.
    """

    f: float
    at: Int64
    source: Int32
    target: Int32
    service: Int32
    effect: Float64


@torch.no_grad()
def plausibility(
    memory: MeetingMemory, network: Network, view: View, meeting: tuple[int, int, int], without: Sequence[Int64]
) -> Float64:
    """f of (source slot, target slot, service code), nats, f64[v]: as if each of v sets of meetings, at positions
    `without` i64[·], had never been.

    All at once, each in a graph of its own beside the others: torch's overhead is what costs where rows are few.
    """
    rows = np.array(meeting[:2], np.int32)
    graph = _beside([memory.graph(rows, without=memory.batch(at) if len(at) else None) for at in without])
    near = graph.columns + 1
    embedding = network.encoder.refresh(graph.x, graph.at, view.embedding[near], graph.into, graph.out_of)
    sketch = None
    known = view.sketch(graph.columns)
    if known is not None:
        sketch = signatures.sketch(own_signs(memory, known), graph.at, known, *graph.sketched)
    code = service_codes(np.full(len(without), meeting[2], np.int32))
    tower, _ = network.decoder.sources(embedding[::2], None if sketch is None else sketch[::2], code)
    peer = network.decoder.targets(embedding[1::2], None if sketch is None else sketch[1::2])
    f: Float64 = (tower * peer).sum(1).numpy().astype(np.float64)
    return f


def _beside(graphs: Sequence[Graph]) -> Graph:
    """Graphs that do not touch, as one: rows and columns one graph's after the other's."""
    begins = np.cumsum([0, *(len(graph.columns) for graph in graphs)]).tolist()

    def one(parts: Sequence[Csr]) -> Csr:
        ends = np.cumsum([0, *(len(part.index) for part in parts)]).tolist()
        indptr = [parts[0].indptr[:1], *(part.indptr[1:] + end for part, end in zip(parts, ends, strict=False))]
        index = [part.index + begin for part, begin in zip(parts, begins, strict=False)]
        weight = torch.cat([part.weight for part in parts if part.weight is not None])
        return Csr(torch.cat(indptr), torch.cat(index), begins[-1], weight)

    into, out_of, servers, clients = (
        one(parts) for parts in zip(*((g.into, g.out_of, *g.sketched) for g in graphs), strict=True)
    )
    at = torch.cat([graph.at + begin for graph, begin in zip(graphs, begins, strict=False)])
    x, columns = (torch.cat(parts) for parts in zip(*((g.x, g.columns) for g in graphs), strict=True))
    return Graph(x, columns, at, into, out_of, (servers, clients))


def attribute(memory: MeetingMemory, network: Network, view: View, meeting: tuple[int, int, int]) -> Attribution:
    """What the meetings that are remembered of both ends say of `meeting` (source slot, target slot, service code)."""
    replay = memory.replay
    held = len(replay)
    newest_first = (replay.newest - np.arange(held)) % len(replay.ring)
    ring = replay.ring[newest_first]
    usable = (ring >= 0).all(1) & ~((ring[:, 0] == meeting[0]) & (ring[:, 1] == meeting[1]))
    ends = [
        newest_first[np.flatnonzero(usable & ((ring[:, :2] == host).any(1)))[:MOST]]
        for host in dict.fromkeys(meeting[:2])
    ]
    at: Int64 = np.unique(np.concatenate(ends)).astype(np.int64)
    with threads_for(len(at)):
        f, *left = plausibility(
            memory, network, view, meeting, [at[:0], *(at[i : i + 1] for i in range(len(at)))]
        ).tolist()
    source, target, service = replay.ring[at].T.astype(np.int32)
    return Attribution(f, at, source, target, memory.popularity.service["code"][service], f - np.array(left))
