"""Surprise: a p beyond what is usual for the host, and to whose flows it goes."""

from __future__ import annotations

import numpy as np
import pytest

from flowsage.graph.build import contacts
from flowsage.graph.flows import FlowBatch
from flowsage.models.surprise import SURPRISE, UNSURE, P, of_flows, take
from tests.graph.generate import power_law

DAY = 86_400.0
MINUTE_NS = 60 * 10**9


class Hosts:
    """Three hosts whose smallest p is told minute by minute."""

    def __init__(self) -> None:
        self.smallest, self.usual, self.now = np.ones(3), np.zeros((3, 3)), 0.0

    def say(self, p: float, *, ready: bool = True, after: float = 60.0) -> tuple[float, float]:
        """p and surprise of the second of them, once p was its smallest."""
        self.now += after
        self.smallest[1] = min(self.smallest[1], p)
        said = np.empty((2, 2))
        take(np.array([1, -1], np.int32), self.smallest, self.usual, self.now, DAY, ready, said)
        assert np.array_equal(said[1], [1.0, 0.0] if ready else [np.nan, 0.0], equal_nan=True), "nobody's"
        return float(said[0, P]), float(said[0, SURPRISE])


def test_what_nobody_had_before_surprises_whole_and_what_a_host_always_has_does_no_more() -> None:
    hosts = Hosts()
    assert hosts.say(1e-4) == (1e-4, 4.0)
    assert hosts.say(1e-4)[1] == pytest.approx(4.0 - 4.0 / (1.0 + UNSURE), abs=0.01)
    for _ in range(300):
        p, surprise = hosts.say(1e-4)
    assert (p, surprise < 0.5) == (1e-4, True)
    assert hosts.say(1e-8)[1] == pytest.approx(4.0 + surprise, abs=0.02), "it does not excuse what is stranger"
    assert hosts.say(1e-4, after=10 * DAY)[1] > 3.9, "and is forgotten"


def test_each_p_is_told_once_and_others_are_left_alone() -> None:
    hosts = Hosts()
    hosts.smallest[:] = 1e-3
    assert hosts.say(1e-2) == (1e-3, 3.0)
    assert hosts.say(1.0) == (1.0, 0.0)
    assert hosts.smallest.tolist() == [1e-3, 1.0, 1e-3]
    assert not hosts.usual[[0, 2]].any()


def test_nothing_is_usual_or_surprising_before_alarms_are_ready() -> None:
    hosts = Hosts()
    for _ in range(50):
        p, surprise = hosts.say(1e-4, ready=False)
        assert np.isnan(p)
        assert surprise == 0.0
    assert hosts.smallest[1] == 1.0
    assert hosts.say(1e-4) == (1e-4, 4.0)


@pytest.mark.parametrize("undirected", [False, True])
def test_a_flow_has_the_surprise_of_its_source_in_its_window(undirected: bool) -> None:
    flows: FlowBatch = power_law(3_000, 40, 300, windows=7)
    run = contacts(flows, MINUTE_NS)
    window = flows.start_ns // MINUTE_NS
    ends = (flows.src, flows.dst) if undirected else (flows.src,)
    keys = sorted({(int(w), int(h)) for end in ends for w, h in zip(window, end, strict=True)})
    random = np.random.default_rng(1)
    surprise = np.where(random.random(len(keys)) < 0.3, random.random(len(keys)), 0.0)
    told = dict(zip(keys, surprise.tolist(), strict=True))
    expected = [max(told[int(w), int(end[i])] for end in ends) for i, w in enumerate(window)]
    host, at = np.array([h for _, h in keys], np.int32), np.array([w for w, _ in keys], np.int64)
    assert of_flows(run, host, at, surprise, undirected=undirected).tolist() == expected
    assert sum(expected) > 0
    assert not of_flows(run, host, at, np.zeros(len(keys)), undirected=undirected).any()
