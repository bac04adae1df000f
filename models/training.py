"""Rehearsal: more training of the graph's prior, on the meetings that it remembers, once a stream has been read.

Online, the prior takes a step a window or so, as much as a window's time allows. Afterwards there is time: a step of
rehearsal is the mean gradient of `batches` batches, each with its own draw of meetings that the tables are made to
forget. The batches of a step are dealt out to the processes of a world, and every process adds all gradients up in the
order of the batches, so the weights are the same bit for bit however many processes took part.

What is gated stays gated: a meeting that was implausible when it happened counts as little here as it did online.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from flowsage.models.meeting import MeetingPrior

VIEW_STEPS: Final = 32
"""Where hosts are many, everybody is embedded anew after so many steps."""

LAST_RATE: Final = 0.1
"""The learning rate falls to this share of itself, along half a cosine (Loshchilov, Hutter 2017)."""

Gather = Callable[[Tensor], list[Tensor]]
"""Takes this process's f32[n], gives that of every process, in the order of ranks."""


@dataclass(frozen=True, kw_only=True)
class RehearsalConfig:
    """steps: how many in all. batches: batches a step, and so the largest number of processes of any use."""

    steps: int = 200
    batches: int = 4
    seed: int = 0


class Rehearsal:
    """Steps of training of one prior. Every process holds the same prior and takes the same steps.

    rank, world    which process this is, and of how many; gather: how they tell each other
    device         where gradients are computed; weights, optimiser and memory stay where they are
    done           steps already taken, by a rehearsal that was interrupted
    """

    def __init__(
        self,
        prior: MeetingPrior,
        config: RehearsalConfig,
        *,
        rank: int = 0,
        world: int = 1,
        gather: Gather | None = None,
        device: torch.device | str = "cpu",
        done: int = 0,
    ) -> None:
        self.prior, self.config, self.done = prior, config, done
        self._rank, self._world = rank, world
        self._gather: Gather = gather or (lambda mine: [mine])
        self._device = torch.device(device)
        self._network = prior.network if self._device.type == "cpu" else copy.deepcopy(prior.network).to(self._device)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.done >= self.config.steps

    def step(self) -> float:
        """One step; returns the mean loss of its batches, nats a meeting (NaN: too few meetings to learn from)."""
        c, network = self.config, self.prior.network
        if self._network is not network:
            self._network.load_state_dict(network.state_dict())
        if self.done % VIEW_STEPS == 0:
            self.prior.embed()
        parameters = list(network.parameters())
        size = sum(p.numel() for p in parameters)
        turns = -(-c.batches // self._world)
        mine = torch.full((turns, size + 1), torch.nan)
        for turn in range(turns):
            batch = turn * self._world + self._rank
            if batch < c.batches:
                number = self.done * c.batches + batch
                chance = np.random.default_rng([c.seed, 1, number])
                found = self.prior.gradients(self._network, chance, recent=1 << 40, seed=number)
                if found is not None:
                    loss, gradients = found
                    flat = [torch.zeros(p.numel()) if g is None else g.detach().cpu().flatten() for p, g in zip(
                        parameters, gradients, strict=True)]  # fmt: skip
                    mine[turn] = torch.cat([torch.tensor([loss]), *flat])
        told = torch.stack([part.view(turns, size + 1) for part in self._gather(mine.flatten())], 1)
        rows = [row for row in told.reshape(-1, size + 1)[: c.batches] if not row[0].isnan()]
        rate = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * self.done / c.steps)) / 2
        self.done += 1
        if not rows:
            return math.nan
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        total /= len(rows)
        cut = torch.split(total[1:], [p.numel() for p in parameters])
        network.descend([part.view_as(p) for part, p in zip(cut, parameters, strict=True)], network.rate * rate)
        self.prior.loss = float(total[0])
        return self.prior.loss
