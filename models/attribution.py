"""What speaks for a first meeting and what against it: by deletion, in the model's own terms.

The graph's part in the plausibility of (s, t, svc) is f. Everything that f knows of s and t are the meetings that they
are remembered by, so each of those is taken out of the tables, as training does it (`MeetingMemory.graph`, `without`),
and f computed again. What f loses by it is what that meeting spoke *for* this one; what it gains, *against* it.

Source: deletion (occlusion) as in Zeiler, Fergus: Visualizing and Understanding Convolutional Networks, ECCV 2014; for
graphs, Yuan et al.: Explainability in Graph Neural Networks: A Taxonomic Survey, TPAMI 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from flowsage.models import signatures
from flowsage.models.columns import Float64, Int32, Int64
from flowsage.models.decoder import service_codes
from flowsage.models.memory import MeetingMemory
from flowsage.models.network import Network, View, own_signs
from flowsage.models.sage import threads_for

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
    memory: MeetingMemory, network: Network, view: View, meeting: tuple[int, int, int], without: Int64
) -> float:
    """f of (source slot, target slot, service code), nats, as if the meetings at `without` i64[n] had never been."""
    rows = np.array(meeting[:2], np.int32)
    graph = memory.graph(rows, without=memory.batch(without) if len(without) else None)
    near = graph.columns + 1
    embedding = network.encoder.refresh(graph.x, graph.at, view.embedding[near], graph.into, graph.out_of)
    sketch = None
    if view.sketch is not None:
        known = view.sketch[near]
        sketch = signatures.sketch(own_signs(memory, known), graph.at, known, *graph.sketched)
    code = service_codes(np.array(meeting[2:], np.int32))
    tower, _ = network.decoder.sources(embedding[:1], None if sketch is None else sketch[:1], code)
    peer = network.decoder.targets(embedding[1:], None if sketch is None else sketch[1:])
    return float((tower * peer).sum())


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
        f = plausibility(memory, network, view, meeting, at[:0])
        left = np.array([plausibility(memory, network, view, meeting, at[i : i + 1]) for i in range(len(at))])
    source, target, service = replay.ring[at].T.astype(np.int32)
    return Attribution(f, at, source, target, memory.popularity.service["code"][service], f - left)
