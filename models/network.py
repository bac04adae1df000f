"""Encoder and decoder over the memory of meetings: a view to answer from, and a training step of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowsage.models import signatures
from flowsage.models.columns import Float32, Int32
from flowsage.models.decoder import Decoder, service_codes, sketched, unsketched
from flowsage.models.memory import Batch, MeetingMemory
from flowsage.models.plausibility import STEEPEST, batch_popularity
from flowsage.models.profiles import FEATURES
from flowsage.models.sage import EncoderConfig, SageEncoder

BETAS: Final = (0.9, 0.999)
LARGEST_GRADIENT: Final = 5.0

_MOVED: Final = 1 << 14
"""Rows of a view that are moved at once."""


class View:
    """The memory as the network sees it, in row slot + 1 of each table; row 0 is a host that has done nothing.

    embedding f32[., d], peers f32[., depth], rest f32[., WIDTH]: what sketches have besides (None without overlaps).
    Made whole, and then refreshed in parts: what was not refreshed yet is as of the last time it was (historical
    embeddings).
    """

    @torch.no_grad()
    def __init__(self, network: Network, memory: MeetingMemory) -> None:
        self._network, self._memory = network, memory
        self.hosts = hosts = len(memory.hosts)
        graph = memory.graph(np.arange(hosts, dtype=np.int32), blank=True)
        self.embedding = _last_first(network.encoder.encode(graph.x, graph.into, graph.out_of))
        network.encoder.let_go()  # all hosts are not embedded again soon
        sketch: Tensor | None = None
        if network.decoder.overlaps:
            own = torch.cat([own_signs(memory, None), torch.zeros(1, signatures.WIDTH)])
            sketch = _last_first(signatures.sketch(own, torch.arange(hosts + 1), None, *graph.sketched))
            del own
        del graph  # as large as what was made of it
        self.peers = network.decoder.targets(self.embedding, sketch)
        self.rest = None if sketch is None else unsketched(sketch)
        self.plain = network.decoder.plain()
        """The decoder's weights, for `Network.sources`."""

    @torch.no_grad()
    def refresh(self, rows: Int32) -> None:
        """Bring host slots `rows` up to date with the memory and the weights, among neighbours as they are kept."""
        memory, network = self._memory, self._network
        self.grow()
        graph, place = memory.graph(rows), torch.from_numpy(rows.astype(np.int64) + 1)
        known = self.embedding.index_select(0, graph.columns + 1)
        embedding, sketch = network.encoder.refresh(graph.x, graph.at, known, graph.into, graph.out_of), None
        self.embedding.index_copy_(0, place, embedding)
        sketches = self.sketch(graph.columns)
        if sketches is not None and self.rest is not None:
            sketch = signatures.sketch(own_signs(memory, sketches), graph.at, sketches, *graph.sketched)
            self.rest.index_copy_(0, place, unsketched(sketch))
        self.peers.index_copy_(0, place, network.decoder.targets(embedding, sketch))

    def sketch(self, slots: Tensor) -> Tensor | None:
        """Sketches f32[n, BLOCKS · WIDTH] of host slots i64[n], None without overlaps."""
        if self.rest is None:
            return None
        own, near = signatures.signs(self._memory.hosts.columns["hash"][slots.numpy()]), slots + 1
        return sketched(own, self.peers.index_select(0, near), self.rest.index_select(0, near))

    def compact(self, remap: Int32) -> None:
        """Host slots have moved: rows move up in place, a piece at a time, since none comes from before its place."""
        kept = torch.from_numpy(np.flatnonzero(remap[: self.hosts] >= 0) + 1)
        for begin in range(0, len(kept), _MOVED):
            rows = kept[begin : begin + _MOVED]
            for table in (self.embedding, self.peers, self.rest):
                if table is not None:
                    table[begin + 1 : begin + 1 + len(rows)] = table[rows]
        self.hosts = len(kept)

    def grow(self) -> None:
        """Rows for new hosts, as if they had done nothing yet."""
        hosts = len(self._memory.hosts)
        if hosts == self.hosts:
            return
        more = hosts + 1 - len(self.embedding)
        if more > 0:
            room = max(more, len(self.embedding) // 4)

            def longer(table: Tensor) -> Tensor:
                grown = table.new_empty((len(table) + room, table.shape[1]))  # what is not used yet takes no memory
                grown[: len(table)] = table
                return grown

            self.embedding, self.peers = longer(self.embedding), longer(self.peers)
            self.rest = None if self.rest is None else longer(self.rest)
        for table in (self.embedding, self.peers, self.rest):
            if table is not None:
                rows = table.numpy()  # which torch takes several times as long to fill
                rows[self.hosts + 1 : hosts + 1] = rows[0]
        self.hosts = hosts


def _last_first(table: Tensor) -> Tensor:
    """`table.roll(1, 0)`, in place, a piece at a time."""
    last = table[-1].clone()
    for end in range(len(table), 1, -_MOVED):
        begin = max(1, end - _MOVED)
        table[begin:end] = table[begin - 1 : end - 1].clone()
    table[0] = last
    return table


def own_signs(memory: MeetingMemory, known: Tensor | None) -> Tensor:
    """Signatures f32[hosts, WIDTH] of all hosts; from their sketches where those are kept."""
    if known is not None:
        return known[:, : signatures.WIDTH].contiguous()
    return signatures.signs(memory.hosts.columns["hash"][: len(memory.hosts)])


class Network(torch.nn.Module):
    """GraphSAGE encoder, decoder and their Adam (Kingma, Ba 2015), seeded and deterministic."""

    def __init__(self, *, width: int, layers: int, overlaps: bool, rate: float, seed: int) -> None:
        super().__init__()
        self.encoder = SageEncoder(EncoderConfig(FEATURES, width, layers, seed))
        self.decoder = Decoder(self.encoder.config.embedding, overlaps=overlaps, seed=seed)
        self.rate, self.steps = rate, 0
        self._learnt = list(self.parameters())
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self._learnt]

    def sources(self, view: View, source: Int32, code: Int32) -> tuple[Float32, Float32]:
        """Towers f32[n, depth] of (source slot, service code), -1 being a host never seen, and f of an unseen
        target."""
        rows, rest = source.astype(np.int64) + 1, None if view.rest is None else view.rest.numpy()
        tower, stranger = Decoder.answer(view.plain, rows, code, view.embedding.numpy(), view.peers.numpy(), rest)
        return tower, np.minimum(np.maximum(stranger, np.float32(-STEEPEST)), np.float32(STEEPEST))

    def step(self, memory: MeetingMemory, batch: Batch, candidates: Int32, excess: Float32, view: View | None) -> float:
        """One step of Adam on a batch (see `gradients`). Returns the loss, nats a meeting."""
        loss, gradients = self.gradients(memory, batch, candidates, excess, view)
        self.descend(gradients)
        return loss

    def gradients(
        self, memory: MeetingMemory, batch: Batch, candidates: Int32, excess: Float32, view: View | None
    ) -> tuple[float, list[Tensor | None]]:
        """Loss, nats a meeting, and its gradients, on a batch that the tables are made to forget.

        candidates i32[c]: host slots to choose from; excess f32[c]: ln of how often each stands for hosts like it. view
        None: every host is embedded with gradients; else only those of the batch and the candidates, the others speak
        from the view. Tensors are made where the weights are.
        """
        device = self.decoder.stranger.weight.device
        hosts = len(memory.hosts)
        if view is None:
            rows = np.arange(hosts, dtype=np.int32)
        else:
            rows = np.unique(np.concatenate([batch.source, batch.target, candidates])).astype(np.int32)
        place = np.zeros(hosts, np.int64)
        place[rows] = np.arange(len(rows))
        graph = memory.graph(rows, without=batch).to(device)
        near = graph.columns.cpu() + 1
        known = None if view is None else view.embedding.index_select(0, near).to(device)
        embedding = self.encoder.refresh(graph.x, graph.at, known, graph.into, graph.out_of)
        sketch = None
        if self.decoder.overlaps:
            with torch.no_grad():
                known = None if view is None else view.sketch(graph.columns.cpu())
                known = None if known is None else known.to(device)
                sketch = signatures.sketch(own_signs(memory, known).to(device), graph.at, known, *graph.sketched)
        peers = self.decoder.targets(embedding, sketch)
        source, target, tried = (
            torch.from_numpy(place[slots]).to(device) for slots in (batch.source, batch.target, candidates)
        )
        tower, stranger = self.decoder.sources(
            embedding[source], None if sketch is None else sketch[source], service_codes(batch.code).to(device)
        )
        own = (tower * peers[target]).sum(1, keepdim=True)
        f = torch.cat([tower @ peers[tried].t(), own, stranger.unsqueeze(1)], 1)
        popular = torch.from_numpy(popularity_of(memory, batch, candidates)).log()
        popular = popular + torch.from_numpy(np.append(excess, np.zeros(2, np.float32)))
        logits = f.clamp(-STEEPEST, STEEPEST) + popular.to(device)
        label = torch.from_numpy(np.where(batch.fresh, len(candidates) + 1, len(candidates))).to(device)
        weight = torch.from_numpy(batch.gate).to(device)
        loss = (torch.nn.functional.cross_entropy(logits, label, reduction="none") * weight).sum() / weight.sum()
        gradients = torch.autograd.grad(loss, self._learnt, allow_unused=True)
        return float(loss.detach()), list(gradients)

    @torch.no_grad()
    def descend(self, gradients: Sequence[Tensor | None], rate: float | None = None) -> None:
        """One step of Adam, at `rate` if that is not the network's own."""
        self.steps += 1
        rate = self.rate if rate is None else rate
        norm = torch.sqrt(torch.stack([g.square().sum() for g in gradients if g is not None]).sum())
        scale = float(torch.clamp(LARGEST_GRADIENT / (norm + 1e-9), max=1.0))
        fade = [1 - beta**self.steps for beta in BETAS]
        for parameter, gradient, (mean, square) in zip(self._learnt, gradients, self._moments, strict=True):
            if gradient is None:
                continue
            gradient = gradient * scale  # noqa: PLW2901
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            parameter.addcdiv_(mean, (square / fade[1]).sqrt_().add_(1e-8), value=-rate / fade[0])

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Weights, moments and the number of steps, as arrays."""
        parts: dict[str, npt.NDArray[np.generic]] = {"network.steps": np.array(self.steps)}
        for (name, parameter), (mean, square) in zip(self.named_parameters(), self._moments, strict=True):
            parts[f"network.{name}"] = parameter.detach().numpy().copy()
            parts[f"adam.mean.{name}"], parts[f"adam.square.{name}"] = mean.numpy().copy(), square.numpy().copy()
        return parts

    @torch.no_grad()
    def restore(self, state: dict[str, npt.NDArray[np.generic]]) -> None:
        """What `state` gave, for the same configuration."""
        self.steps = int(state["network.steps"])
        for (name, parameter), (mean, square) in zip(self.named_parameters(), self._moments, strict=True):
            parameter.copy_(torch.from_numpy(state[f"network.{name}"]))
            mean.copy_(torch.from_numpy(state[f"adam.mean.{name}"]))
            square.copy_(torch.from_numpy(state[f"adam.square.{name}"]))


def popularity_of(memory: MeetingMemory, batch: Batch, candidates: Int32) -> Float32:
    """q f32[n, c + 2] of candidates, the true target and unseen hosts, as if the batch had never happened."""
    p, r = memory.popularity, memory.replay
    received = memory.hosts.received()
    np.subtract.at(received, batch.target, batch.weight)
    anywhere = p.anywhere(np.maximum(received, 0))
    out = np.empty((len(batch), len(candidates) + 2), np.float32)
    batch_popularity(
        batch.source, batch.target, batch.service, batch.weight, batch.fresh, batch.link, r.ring, r.prev, r.newest,
        p.service["head"], p.offer["next"], p.offer["target"], p.offer["weight"], p.service["total"],
        p.service["fresh"], anywhere, candidates, p.fresh_share, out,
    )  # fmt: skip
    return out
