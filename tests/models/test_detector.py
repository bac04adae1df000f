"""The detector: its parts together, causal, deterministic, and each to be switched off."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from flowsage.graph.flows import FlowBatch
from flowsage.models.detector import ClosedWindows, Detector, DetectorConfig
from flowsage.models.history import HistoryConfig
from flowsage.models.meeting_config import MeetingConfig
from tests.graph.generate import power_law

WINDOW_NS = 60 * 10**9
EARLY = MeetingConfig(ready_windows=3, ready_meetings=20, ready_steps=2)


def flows() -> FlowBatch:
    return power_law(6_000, 60, 400, windows=20)


def run(detector: Detector, batch: FlowBatch) -> list[ClosedWindows]:
    out = []
    window = batch.start_ns // WINDOW_NS
    for w in np.unique(window):
        part = batch.take(np.flatnonzero(window == w))
        detector.pane(int(w + 1) * WINDOW_NS, part)
        out.append(detector.close(part))
    return out


def test_the_first_half_is_scored_the_same_whatever_follows() -> None:
    batch = flows()
    config = DetectorConfig(meeting=EARLY)
    whole = run(Detector(config), batch)
    half = run(Detector(config), batch.take(np.flatnonzero(batch.start_ns // WINDOW_NS < whole[10].scores.window[0])))
    assert len(half) == 10
    for a, b in zip(half, whole, strict=False):
        assert np.array_equal(a.flow_score, b.flow_score)
        assert np.array_equal(a.host_score, b.host_score)
        assert np.array_equal(a.tails, b.tails, equal_nan=True)
        assert np.array_equal(a.p_values, b.p_values, equal_nan=True)


@pytest.mark.parametrize(("undirected", "testimony"), [(False, False), (False, True), (True, False)])
def test_windows_that_come_whole_are_told_the_same_together_as_one_by_one(undirected: bool, testimony: bool) -> None:
    batch = dataclasses.replace(flows(), told=np.ones(6_000, np.bool_))
    alarms = dataclasses.replace(DetectorConfig().alarms, time_scale=15.0)
    history = HistoryConfig(undirected=undirected, max_keys=300)
    config = DetectorConfig(meeting=EARLY, alarms=alarms, history=history, testimony=testimony)
    single, together = Detector(config), Detector(config)
    windows = batch.start_ns // WINDOW_NS
    found, closed = [], []
    for w in np.unique(windows):
        part = batch.take(np.flatnonzero(windows == w))
        found += single.pane(int(w + 1) * WINDOW_NS, part)
        closed.append(single.close(part, terms=True))
    named, whole = together.whole(batch, [int(w + 1) * WINDOW_NS for w in np.unique(windows)], terms=True)
    assert found == named
    for name in ("flow_score", "beacon_score", "known"):
        assert np.array_equal(getattr(whole.scores, name), np.concatenate([getattr(c.scores, name) for c in closed]))
    assert np.array_equal(whole.tails, np.concatenate([c.tails for c in closed]), equal_nan=True)
    for name in ("p_values", "surprise", "flow_score", "host_score"):
        expected = np.concatenate([getattr(c, name) for c in closed])
        assert np.array_equal(getattr(whole, name), expected, equal_nan=True), name
    assert whole.surprise.any()
    for name, term in whole.scores.terms.items():
        assert np.array_equal(term, np.concatenate([c.scores.terms[name] for c in closed])), name
    (one, told), (other, told_together) = single.state(), together.state()
    assert told == told_together
    assert all(np.array_equal(a, other[name], equal_nan=a.dtype.kind == "f") for name, a in one.items())


def test_the_graph_speaks_only_of_first_meetings_and_only_once_it_is_ready() -> None:
    detector = Detector(DetectorConfig(meeting=EARLY))
    closed = run(detector, flows())
    asked = [np.isfinite(c.tails) for c in closed]
    assert not asked[0].any()
    assert asked[-1].any()
    for c, a in zip(closed, asked, strict=True):
        assert (c.scores.known[a] == 0).all()
        assert ((c.tails[a] >= 0) & (c.tails[a] <= 1)).all()


def test_without_the_graph_history_says_the_same() -> None:
    batch = flows()
    with_graph, without = (run(Detector(DetectorConfig(graph=g, meeting=EARLY)), batch) for g in (True, False))
    for a, b in zip(with_graph, without, strict=True):
        assert np.array_equal(a.scores.flow_score, b.scores.flow_score)
        assert np.isnan(b.tails).all()


def test_a_closed_window_has_its_host_graph() -> None:
    closed = run(Detector(), flows())[0]
    graph = closed.graph(0)
    pairs = {(int(s), int(t)) for s, t in zip(closed.contacts.src, closed.contacts.dst, strict=True)}
    assert len(graph.to_networkx().edges) == len(pairs)


def test_p_values_of_host_windows_are_unknown_until_alarms_are_ready() -> None:
    config = DetectorConfig()
    never = dataclasses.replace(config, alarms=dataclasses.replace(config.alarms, ready_blocks=10**6))
    assert all(np.isnan(c.p_values).all() for c in run(Detector(never), flows()))
    soon = dataclasses.replace(config, alarms=dataclasses.replace(config.alarms, time_scale=15.0))
    last = run(Detector(soon), flows())[-1].p_values
    assert ((last > 0) & (last <= 1)).all()


def test_a_saved_detector_goes_on_bit_for_bit() -> None:
    config = DetectorConfig(meeting=dataclasses.replace(EARLY, exact_hosts=100))
    batch = flows()
    middle = int(batch.start_ns[len(batch) // 2]) // WINDOW_NS * WINDOW_NS
    first, second = (batch.take(np.flatnonzero(late == (batch.start_ns >= middle))) for late in (False, True))
    whole = Detector(config)
    run(whole, first)
    arrays, values = whole.state()
    assert all(a.dtype != object for a in arrays.values())
    other = Detector.restore(config, arrays, json.loads(json.dumps(values)))
    for a, b in zip(run(whole, second), run(other, second), strict=True):
        assert np.array_equal(a.flow_score, b.flow_score)
        assert np.array_equal(a.host_score, b.host_score)
        assert np.array_equal(a.tails, b.tails, equal_nan=True)
        assert np.array_equal(a.p_values, b.p_values, equal_nan=True)
    one, two = whole.state(), other.state()
    assert one[1] == two[1]
    assert all(np.array_equal(a, two[0][name], equal_nan=a.dtype.kind == "f") for name, a in one[0].items())


@pytest.mark.parametrize("seed", [0, 1])
def test_hosts_have_embeddings_that_depend_on_the_seed_alone(seed: int) -> None:
    config = DetectorConfig(meeting=dataclasses.replace(EARLY, seed=seed))
    batch = flows()
    first, second = (Detector(config) for _ in range(2))
    run(first, batch)
    run(second, batch)
    assert first.prior is not None
    assert second.prior is not None
    a, b = first.prior.embeddings(batch.hosts.hash), second.prior.embeddings(batch.hosts.hash)
    assert np.array_equal(a, b, equal_nan=True)
    assert np.isfinite(a).all(1).sum() == len(np.unique(np.concatenate([batch.src, batch.dst])))
