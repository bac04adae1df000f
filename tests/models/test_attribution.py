"""What speaks for and against a first meeting: deleting it matters more than deleting anything else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowsage.models.attribution import attribute, plausibility
from flowsage.models.meeting import MeetingPrior
from tests.models.enterprise import CREDENTIALS, enterprise
from tests.models.test_meeting import eager, run

Meetings = list[tuple[int, int, int]]


def watch() -> tuple[MeetingPrior, Meetings]:
    """A prior that has seen the first half of an enterprise, and what stolen credentials do in the second."""
    torch.set_num_threads(1)
    world = enterprise(0, departments=4, people=20, windows=200)
    prior = MeetingPrior(eager(), world.inside)
    run(prior, world, 0, 100)
    theirs = np.flatnonzero((world.kind == CREDENTIALS) & world.first)
    slots = (prior.memory.hosts.find(world.hosts.hash[ends[theirs]]) for ends in (world.src, world.dst))
    meetings = [(int(s), int(t), int(v)) for s, t, v in zip(*slots, world.service[theirs], strict=True)]
    return prior, [m for m in meetings if min(m[:2]) >= 0][:12]


@pytest.fixture(scope="module")
def watched() -> tuple[MeetingPrior, Meetings]:
    return watch()


def test_deleting_what_speaks_against_a_meeting_makes_it_more_plausible_than_deleting_at_random(
    watched: tuple[MeetingPrior, Meetings],
) -> None:
    prior, meetings = watched
    rng = np.random.default_rng(0)
    against, for_it, anything = [], [], []
    for meeting in meetings:
        parts = prior.memory, prior.network, prior._current()
        found = attribute(*parts, meeting)
        order = np.argsort(found.effect)
        some = [rng.choice(len(order), 3, replace=False) for _ in range(5)]
        assert found.f == pytest.approx(plausibility(*parts, meeting, found.at[:0]))
        against.append(plausibility(*parts, meeting, found.at[order[:3]]) - found.f)
        for_it.append(plausibility(*parts, meeting, found.at[order[-3:]]) - found.f)
        anything.append(np.mean([plausibility(*parts, meeting, found.at[k]) - found.f for k in some]))
    assert len(meetings) >= 6
    assert np.mean(np.array(against) > np.array(anything)) > 0.9
    assert np.mean(np.array(for_it) < np.array(anything)) > 0.9
    assert np.mean(against) > 0.05
    assert np.mean(for_it) < -0.05


def test_only_meetings_of_the_two_ends_are_tried_and_the_meeting_itself_is_not(
    watched: tuple[MeetingPrior, Meetings],
) -> None:
    prior, meetings = watched
    for meeting in meetings[:3]:
        found = attribute(prior.memory, prior.network, prior._current(), meeting)
        ends = np.stack([found.source, found.target], 1)
        assert (np.isin(ends, meeting[:2]).any(1)).all()
        assert not (ends == meeting[:2]).all(1).any()
        assert len(found.at) <= 48
