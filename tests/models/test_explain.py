"""Evidence: what a person is told is what raised the level, and without it the level is gone."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest

from flowsage.graph.services import parts_of
from flowsage.models import analytics as an
from flowsage.models.explain import META, ONE, amount, duration, explain
from flowsage.models.finding import severity
from tests.models.alarm_streams import CLIENTS, MISBEHAVIOURS, PANE, SSH, START, Row, S, Watch, office
from tests.models.test_alarms import BEGIN, LOUD, created, scene


def first(rows: list[Row], host: str, until: float = BEGIN + 72):  # type: ignore[no-untyped-def]
    return next((f for f in created(Watch(LOUD).run(rows, until)) if f.host == host), None)


KINDS = ["port scan", "host scan", "slow scan", "guessing", "exfiltration", "beacon", "worm"]


@pytest.mark.parametrize("name", KINDS)
def test_deleting_the_evidence_weakens_a_finding_more_than_deleting_as_much_at_random(name):
    rows, host = scene(name, seed=1)
    finding = first(rows, host)
    shown = {(e.src, e.dst, e.dst_port) for e in finding.evidence}
    evidence = [r for r in rows if r[0] >= BEGIN and (r[1], r[2], r[3]) in shown]
    other = [r for r in rows if r[0] >= BEGIN - 20 and not (r[0] >= BEGIN and (r[1], r[2], r[3]) in shown)]
    assert evidence
    until = (finding.alarm_ns - START) / S

    def weakened(gone: list[Row]) -> float:
        """ln p after a deletion, at the moment of the alarm; 0 where nothing is raised any more."""
        left = set(gone)
        again = first([r for r in rows if r not in left], host, until)
        return 0.0 if again is None else float(np.log(again.p_value))

    rng = np.random.default_rng(3)
    without = weakened(evidence)
    at_random = [
        weakened([other[i] for i in rng.choice(len(other), min(len(evidence), len(other) // 2), replace=False)])
        for _ in range(3)
    ]
    assert without > np.log(finding.p_value)
    assert without > max(at_random)


def test_evidence_adds_up_to_what_was_observed():
    rows, host = scene("guessing", seed=1)
    finding = first(rows, host)
    assert finding.analytic == "guess"
    assert sum(e.observed for e in finding.evidence) == pytest.approx(finding.observed, rel=1e-5)
    evidence = finding.evidence[0]
    assert (evidence.src, evidence.dst, evidence.dst_port, evidence.proto) == (host, SSH, 22, 6)
    assert evidence.flows == sum(1 for r in rows if r[1] == host and r[3] == 22 and START + r[0] * S < finding.alarm_ns)
    assert finding.peer == SSH
    assert finding.technique == "T1110"


def test_times_are_those_of_the_flows():
    rows, host = scene("host scan", seed=1)
    finding = first(rows, host)
    at = [START + int(r[0] * S) for r in MISBEHAVIOURS["host scan"][0](BEGIN, np.random.default_rng(1))]
    assert finding.alarm_ns % PANE == START % PANE
    assert min(e.first_ns for e in finding.evidence) >= finding.start_ns
    assert all(any(e.first_ns == t for t in at) for e in finding.evidence if e.first_ns >= at[0])


def test_a_sentence_has_numbers_in_real_units_beside_what_was_expected():
    rows, host = scene("exfiltration", seed=1)
    finding = first(rows, host)
    assert finding.sentence.startswith(f"{host} sent 198.51.100.77 ")
    assert "MB more than it received in " in finding.sentence
    assert "; expected at most " in finding.sentence or finding.sentence.endswith("nothing like it before")
    rows, host = scene("beacon", seed=1)
    assert "198.51.100.9 on tcp/8443 like a clock, every 3.0 s ± " in first(rows, host).sentence


def test_a_scan_names_its_service_when_there_is_one():
    rows, host = scene("host scan", seed=1)
    assert "on tcp/443" in first(rows, host).sentence


def test_numbers_are_written_for_people():
    assert [amount(v, "flows") for v in (412.3, 9.25, 9.0, 12_345)] == ["412", "9.2", "9", "12,345"]
    assert [amount(v, "bytes") for v in (0.0, 999, 2.5e9)] == ["0 B", "999 B", "2.5 GB"]
    assert [duration(v) for v in (0.25, 59.0, 3599, 7200, 200_000)] == ["0.2 s", "59 s", "60 min", "2 h", "2 d"]
    assert parts_of((7 << 20) | 446) == (6, 445)
    assert parts_of((7 << 20) | 200_001) == (6, None)


def test_severity_rises_as_p_falls_below_the_budget():
    assert [severity(p, 1e-3) for p in (1e-3, 1e-5, 1e-7, 1e-30)] == [2, 3, 4, 5]


def test_quiet_hosts_have_nothing_to_explain():
    assert first(office(200, 4), CLIENTS[0], 200) is None


@pytest.mark.parametrize(
    ("name", "seed", "words"),
    [
        ("host scan", 2, "first meeting on tcp/443, refused or not answered"),
        ("host scan", 1, "1 of 1 flow on tcp/443 failed"),
        ("port scan", 1, "1 of 1 flow on tcp/"),
        ("guessing", 1, " on tcp/22 count as "),
        ("exfiltration", 1, "MB more sent than received on tcp/443"),
        ("beacon", 1, "every 3.0 s ± "),
        ("worm", 1, "first meeting, on tcp/445"),
    ],
)
def test_every_piece_of_evidence_says_in_words_what_it_adds(name, seed, words):
    rows, host = scene(name, seed=seed)
    finding = first(rows, host)
    assert all(e.text for e in finding.evidence)
    assert any(words in e.text for e in finding.evidence), [e.text for e in finding.evidence]
    shares = [e.share for e in finding.evidence]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1 + 1e-9


@pytest.mark.parametrize(("unit", "last", "said"), [(1, 3_600, "1 h"), (1, 0, "10 s"), (60, 0, "60 s")])
def test_a_span_is_as_long_as_its_flows_and_no_finer_than_their_times(unit, last, said):
    meta, inc = np.full((64, META), -1, np.int64), np.zeros((64, len(an.TABLE)), np.float32)
    for i in range(20):
        first = (START // (60 * S) * 60 - unit * (19 - i)) * S
        meta[i] = 0, 1, 443, first, first, 1, 0
    meta[19, 4] += last * S
    inc[19, an.EXFIL] = 100.0
    origin = START // (60 * S) * 60 * S
    names = np.array(["h", "peer"], object)
    tau = an.TAU[an.EXFIL]
    found = explain((meta, inc), names, an.EXFIL, (0, 1, 443), math.log1p(100), 0.0, 10 * S, origin, tau)
    assert f" in {said};" in found.sentence.replace("60 min", "1 h"), found.sentence


def test_what_is_counted_in_a_sentence_is_what_happened_and_one_is_not_many():
    rows, host = scene("worm", seed=1)
    finding = first(rows, host)
    assert re.search(r" (reached|met) \d+ new (internal )?peers? on tcp/445 in ", finding.sentence), finding.sentence
    assert ONE.sub(lambda m: f"1 {m[1]}{m[2][:-1]}", "met 1 new peers, 11 new peers") == "met 1 new peer, 11 new peers"


def test_implausible_first_meetings_are_told_one_by_one_and_without_them_nothing_is_raised():
    strangers = [f"10.77.0.{200 + i}" for i in range(6)]
    rows = office(BEGIN + 80, 1)
    meetings = [(BEGIN + 2.0 * i, CLIENTS[2], peer, 443, 1, 900, 4_000) for i, peer in enumerate(strangers)]
    misplaced = {(CLIENTS[2], peer): 0.9 for peer in strangers}

    def raised(extra: list[Row], until: float = BEGIN + 20):  # type: ignore[no-untyped-def]
        found = created(Watch(dataclasses.replace(LOUD, budget=500.0), misplaced).run(rows + extra, until))
        return next((f for f in found if f.host == CLIENTS[2] and "meeting" in (f.analytic, f.lead)), None)

    finding = raised(meetings)
    assert finding.technique == "T1078"
    assert {e.dst for e in finding.evidence} <= set(strangers)
    assert len(finding.evidence) >= 2
    for e in finding.evidence:
        assert e.text == "first meeting on tcp/443, 90% out of place"
        assert e.facts["misplaced"] == pytest.approx(0.9)
    said = re.search(r" met (\d+) peers that hosts like it do not meet in ", finding.sentence)
    if finding.analytic == "meeting":
        assert said
        assert int(said[1]) >= len(finding.evidence)
        assert finding.observed > 1.5
    shown = {e.dst for e in finding.evidence}
    until = (finding.alarm_ns - START) / S
    assert raised(meetings, until) == finding
    assert raised([m for m in meetings if m[2] not in shown], until) is None
