"""The graph as a witness: what it says of a first meeting is what the prior and its deletions say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flowsage.graph.services import service_name
from flowsage.models.meeting import MeetingPrior
from flowsage.models.testimony import LEAST, SHOWN, Witness
from tests.models.enterprise import enterprise
from tests.models.test_attribution import Meetings, watch
from tests.models.test_meeting import eager


@pytest.fixture(scope="module")
def watched() -> tuple[MeetingPrior, Meetings]:
    return watch()


@pytest.fixture(scope="module")
def names(watched: tuple[MeetingPrior, Meetings]) -> dict[int, str]:
    hosts = enterprise(0, departments=4, people=20, windows=200).hosts
    return dict(zip(hosts.hash.tolist(), hosts.names.to_pylist(), strict=True))


def test_it_tells_the_priors_numbers_and_names_what_speaks_against(
    watched: tuple[MeetingPrior, Meetings], names: dict[int, str]
) -> None:
    prior, meetings = watched
    witness, hashes = Witness(prior, names.get), prior.memory.hosts.columns["hash"]
    told = 0
    for source, target, service in meetings:
        ends = int(hashes[source]), int(hashes[target])
        said, evidence = witness(*ends, service), prior.evidence(*ends, service)
        assert said is not None
        assert evidence is not None
        assert said.facts["rank"] == evidence.rank
        assert said.facts["candidates"] == evidence.candidates
        assert said.facts["tail"] == pytest.approx(evidence.tail, rel=0.01)
        assert said.facts.get("among", 1.0) == pytest.approx(evidence.among, rel=0.01)
        assert f"{evidence.less_likely:,} of {evidence.candidates:,} possible peers are less likely" in said.text
        against = said.facts.get("against", [])
        assert len(against) <= SHOWN
        assert all(m["nats"] <= -LEAST for m in against)
        assert all({m["src"], m["dst"]} & {names[e] for e in ends} for m in against)
        assert all(f"{m['src']} met {m['dst']} on {m['service']}" in said.text for m in against)
        told += len(against)
        json.dumps(said.facts)
        assert witness(*ends, service) == said
    assert told >= len(meetings)


def test_hosts_whose_names_are_forgotten_are_left_out(watched: tuple[MeetingPrior, Meetings]) -> None:
    prior, meetings = watched
    source, target, service = meetings[0]
    hashes = prior.memory.hosts.columns["hash"]
    said = Witness(prior, lambda _: None)(int(hashes[source]), int(hashes[target]), service)
    assert said is not None
    assert "against" not in said.facts
    assert "rank" in said.facts


def test_of_what_it_knows_by_now_it_tells_no_rank(
    watched: tuple[MeetingPrior, Meetings], names: dict[int, str]
) -> None:
    prior, _ = watched
    source, target, slot = prior.memory.replay.ring[prior.memory.replay.newest % len(prior.memory.replay.ring)]
    hashes, code = prior.memory.hosts.columns["hash"], int(prior.memory.popularity.service["code"][slot])
    assert service_name(code).startswith(("tcp/", "udp/"))
    said = Witness(prior, names.get)(int(hashes[source]), int(hashes[target]), code)
    assert said is not None
    assert "rank" not in said.facts
    assert np.isfinite(said.facts["graph_nats"])


def test_a_prior_that_is_not_ready_has_nothing_to_say(names: dict[int, str]) -> None:
    assert Witness(MeetingPrior(eager()), names.get)(*list(names)[:2], (7 << 20) + 446) is None
