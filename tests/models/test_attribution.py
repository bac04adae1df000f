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
        sets = [found.at[:0], found.at[order[:3]], found.at[order[-3:]], *(found.at[k] for k in some)]
        f, first, last, *others = plausibility(*parts, meeting, sets).tolist()
        assert found.f == pytest.approx(f)
        against.append(first - f)
        for_it.append(last - f)
        anything.append(np.mean(others) - f)
    assert len(meetings) >= 6
    assert np.mean(np.array(against) > np.array(anything)) > 0.9
    assert np.mean(np.array(for_it) < np.array(anything)) > 0.9
    assert np.mean(against) > 0.05
    assert np.mean(for_it) < -0.05


def test_sets_of_meetings_left_out_at_once_say_what_each_says_alone(watched: tuple[MeetingPrior, Meetings]) -> None:
    prior, meetings = watched
    parts = prior.memory, prior.network, prior._current()
    for meeting in meetings[:3]:
        at = attribute(*parts, meeting).at
        sets = [at[:0], at[:1], at[1:4], at]
        alone = [plausibility(*parts, meeting, [each])[0] for each in sets]
        assert len({round(f, 3) for f in alone}) > 1
        assert plausibility(*parts, meeting, sets) == pytest.approx(alone, rel=1e-5, abs=1e-5)


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
