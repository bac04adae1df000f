"""Rehearsal: the same weights however a step's batches are dealt out, a loss that falls, and no step twice."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowsage.models.meeting import MeetingPrior
from flowsage.models.training import VIEW_STEPS, Rehearsal, RehearsalConfig
from tests.models.test_meeting import eager, run, small


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def learnt(**changes: Any) -> MeetingPrior:
    world = small()
    prior = MeetingPrior(eager(step_meetings=10**9, **changes), world.inside)
    run(prior, world)
    return prior


def weights(prior: MeetingPrior) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in prior.network.parameters()]).numpy()


def rehearse(prior: MeetingPrior, steps: int, **more: Any) -> list[float]:
    rehearsal = Rehearsal(prior, RehearsalConfig(steps=steps, batches=3), **more)
    return [rehearsal.step() for _ in range(steps - rehearsal.done)]


def test_rehearsal_foretells_meetings_better_than_before() -> None:
    losses = rehearse(learnt(), 60)
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1


@pytest.mark.parametrize("exact_hosts", [2_500, 20])
def test_two_processes_reach_the_weights_of_one_bit_for_bit(exact_hosts: int) -> None:
    alone = learnt(exact_hosts=exact_hosts)
    losses = rehearse(alone, 4)
    barrier, told = threading.Barrier(2), [torch.empty(0)] * 2

    def gather(rank: int, mine: Tensor) -> list[Tensor]:
        told[rank] = mine.clone()
        barrier.wait(60)
        both = list(told)
        barrier.wait(60)
        return both

    priors = [learnt(exact_hosts=exact_hosts) for _ in range(2)]
    said: list[list[float]] = [[], []]

    def work(rank: int) -> None:
        said[rank] = rehearse(priors[rank], 4, rank=rank, world=2, gather=lambda mine: gather(rank, mine))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert said == [losses, losses]
    for prior in priors:
        assert np.array_equal(weights(prior), weights(alone))


def test_a_rehearsal_that_was_interrupted_goes_on_where_it_was() -> None:
    whole, first = learnt(), learnt()
    rehearse(whole, VIEW_STEPS + 4)
    half = Rehearsal(first, RehearsalConfig(steps=VIEW_STEPS + 4, batches=3))
    while half.done < VIEW_STEPS:
        half.step()
    second = MeetingPrior(first.config, small().inside)
    second.restore(first.state())
    rehearse(second, VIEW_STEPS + 4, done=VIEW_STEPS)
    assert np.array_equal(weights(second), weights(whole))


def test_too_few_meetings_teach_nothing() -> None:
    prior = MeetingPrior(eager())
    before = weights(prior)
    assert np.isnan(rehearse(prior, 2)).all()
    assert np.array_equal(weights(prior), before)
