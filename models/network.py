"""Encoder and decoder over the memory of meetings: a view to answer from, and a training step of bounded size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowsage.models import signatures
from flowsage.models.columns import Float32, Int32
from flowsage.models.decoder import Decoder, service_codes
from flowsage.models.memory import Batch, MeetingMemory
from flowsage.models.plausibility import STEEPEST, batch_popularity
from flowsage.models.profiles import FEATURES
from flowsage.models.sage import EncoderConfig, SageEncoder

BETAS: Final = (0.9, 0.999)
LARGEST_GRADIENT: Final = 5.0


@dataclass(frozen=True)
class View:
    """The memory as the network sees it: h hosts, and in the last row a host that has done nothing.

    embedding f32[h + 1, d], sketch f32[h + 1, BLOCKS · WIDTH] (None without overlaps), peers f32[h + 1, depth].
    """

    embedding: Tensor
    sketch: Tensor | None
    peers: Tensor


class Network(torch.nn.Module):
    """GraphSAGE encoder, decoder and their Adam (Kingma, Ba 2015), seeded and deterministic."""

    def __init__(self, *, width: int, layers: int, overlaps: bool, rate: float, seed: int) -> None:
        super().__init__()
        self.encoder = SageEncoder(EncoderConfig(FEATURES, width, layers, seed))
        self.decoder = Decoder(self.encoder.config.embedding, overlaps=overlaps, seed=seed)
        self.rate, self.steps = rate, 0
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters()]

    @torch.no_grad()
    def view(self, memory: MeetingMemory) -> View:
        """Embed every host that the memory holds, on the fast path."""
        hosts = len(memory.hosts)
        graph = memory.graph(np.arange(hosts, dtype=np.int32), blank=True)
        embedding = self.encoder.encode(graph.x, graph.into, graph.out_of)
        sketch = None
        if self.decoder.overlaps:
            sketch = signatures.sketch(self._signs(memory, blank=True), torch.arange(hosts + 1), None, *graph.sketched)
        return View(embedding, sketch, self.decoder.targets(embedding, sketch))

    @staticmethod
    def _signs(memory: MeetingMemory, *, blank: bool) -> Tensor:
        own = signatures.signs(memory.hosts.columns["hash"][: len(memory.hosts)])
        return torch.cat([own, torch.zeros(1, own.shape[1])]) if blank else own

    @torch.no_grad()
    def sources(self, view: View, source: Int32, code: Int32) -> tuple[Float32, Float32]:
        """Towers f32[n, depth] of (source slot, service code), -1 being a host never seen, and f of an unseen
        target."""
        rows = torch.from_numpy(source.astype(np.int64))  # -1 is the blank host's row
        sketch = None if view.sketch is None else view.sketch[rows]
        tower, stranger = self.decoder.sources(view.embedding[rows], sketch, service_codes(code))
        return tower.numpy(), stranger.clamp(-STEEPEST, STEEPEST).numpy()

    def step(self, memory: MeetingMemory, batch: Batch, candidates: Int32, excess: Float32, view: View | None) -> float:
        """One step of Adam on a batch that the tables are made to forget. Returns the loss, nats a meeting.

        candidates i32[c]: host slots to choose from; excess f32[c]: ln of how often each stands for hosts like it. view
        None: every host is embedded with gradients; else only those of the batch and the candidates, the others speak
        from the view.
        """
        hosts = len(memory.hosts)
        if view is None:
            rows = np.arange(hosts, dtype=np.int32)
        else:
            rows = np.unique(np.concatenate([batch.source, batch.target, candidates])).astype(np.int32)
        place = np.zeros(hosts, np.int64)
        place[rows] = np.arange(len(rows))
        graph = memory.graph(rows, without=batch)
        index = torch.from_numpy(rows.astype(np.int64))
        known = None if view is None else view.embedding[:-1]
        embedding = self.encoder.refresh(graph.x, index, known, graph.into, graph.out_of)
        sketch = None
        if self.decoder.overlaps:
            with torch.no_grad():
                known = None if view is None or view.sketch is None else view.sketch[:-1]
                sketch = signatures.sketch(self._signs(memory, blank=False), index, known, *graph.sketched)
        peers = self.decoder.targets(embedding, sketch)
        at = torch.from_numpy(place[batch.source])
        tower, stranger = self.decoder.sources(
            embedding[at], None if sketch is None else sketch[at], service_codes(batch.code)
        )
        own = (tower * peers[torch.from_numpy(place[batch.target])]).sum(1, keepdim=True)
        f = torch.cat([tower @ peers[torch.from_numpy(place[candidates])].t(), own, stranger.unsqueeze(1)], 1)
        logits = f.clamp(-STEEPEST, STEEPEST) + torch.from_numpy(popularity_of(memory, batch, candidates)).log()
        logits = logits + torch.from_numpy(np.append(excess, np.zeros(2, np.float32)))
        label = torch.from_numpy(np.where(batch.fresh, len(candidates) + 1, len(candidates)))
        weight = torch.from_numpy(batch.gate)
        loss = (torch.nn.functional.cross_entropy(logits, label, reduction="none") * weight).sum() / weight.sum()
        gradients = torch.autograd.grad(loss, list(self.parameters()), allow_unused=True)
        self._descend(gradients)
        return float(loss.detach())

    @torch.no_grad()
    def _descend(self, gradients: tuple[Tensor | None, ...]) -> None:
        self.steps += 1
        norm = torch.sqrt(torch.stack([g.square().sum() for g in gradients if g is not None]).sum())
        scale = float(torch.clamp(LARGEST_GRADIENT / (norm + 1e-9), max=1.0))
        fade = [1 - beta**self.steps for beta in BETAS]
        for parameter, gradient, (mean, square) in zip(self.parameters(), gradients, self._moments, strict=True):
            if gradient is None:
                continue
            gradient = gradient * scale  # noqa: PLW2901
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            parameter.addcdiv_(mean, (square / fade[1]).sqrt_().add_(1e-8), value=-self.rate / fade[0])

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
