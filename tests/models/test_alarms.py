"""Alarms over a stream: what is raised, what is not, how findings live, and that all of it can be done twice."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from flowsage.collector.errors import ConfigurationError
from flowsage.graph.build import contacts
from flowsage.graph.flows import from_table
from flowsage.models import analytics as an
from flowsage.models.alarms import AlarmConfig, Alarms
from flowsage.models.episodes import Episodes, Offer
from flowsage.models.explain import Explained, duration
from flowsage.models.finding import Finding
from flowsage.models.history import History
from tests.models.alarm_streams import (
    CLIENTS,
    DNS,
    FILES,
    LAB,
    LASTING,
    MISBEHAVIOURS,
    PANE,
    SSH,
    START,
    Row,
    S,
    Watch,
    office,
    table,
)  # fmt: skip

BEGIN = 126.0
"""Seconds of calibration before a misbehaviour: two minutes of the lab."""

LOUD = dataclasses.replace(LAB, budget=50.0)


def created(findings: list[Finding]) -> list[Finding]:
    return [f for f in findings if f.activity == "create"]


def scene(name: str, seed: int = 0) -> tuple[list[Row], str]:
    make, host = MISBEHAVIOURS[name]
    return office(BEGIN + 80, seed) + make(BEGIN, np.random.default_rng(seed)), host


@pytest.mark.parametrize(
    ("name", "within", "families"),
    [
        ("port scan", 3, {"scan", "novelty", "joint"}),
        ("host scan", 6, {"scan"}),
        ("slow scan", 41, {"scan", "lateral", "joint"}),
        ("worm", 20, {"scan", "lateral", "joint"}),
        ("guessing", 30, {"credential", "volume"}),
        ("beacon", 60, {"beacon"}),
        ("exfiltration", 3, {"exfiltration"}),
    ],
)
def test_each_misbehaviour_is_raised_in_time_and_names_its_host(name, within, families):
    rows, host = scene(name, seed=1)
    hits = [f for f in created(Watch(LOUD).run(rows, BEGIN + 72)) if f.host == host]
    assert hits, f"{name} was not raised"
    assert hits[0].family in families
    assert 0 <= (hits[0].alarm_ns - START) / S - BEGIN <= within


HARMLESS = {
    "by the clock": [(BEGIN + i * 1.0, CLIENTS[6], SSH, 22, 1, 1_800, 2_200) for i in range(60)],
    "with much to say": [(BEGIN + i * 0.4, CLIENTS[6], SSH, 22, 1, 9_000, 90_000) for i in range(100)],
    "a new host's database": [(BEGIN + i * 0.1, "10.77.0.70", FILES, 5432, 1, 1_500, 4_000) for i in range(500)],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_who_logs_in_often_for_a_harmless_reason_guesses_no_password(name):
    rows = office(BEGIN + 80, 1) + HARMLESS[name]
    assert [f.sentence for f in created(Watch(LOUD).run(rows, BEGIN + 60)) if f.analytic == "guess"] == []


def test_what_asks_a_familiar_service_far_more_often_for_hours_is_raised_though_no_minute_of_it_is_a_burst():
    day = an.DAY / LAB.time_scale + 60
    often = np.arange(day, day + 200, 1 / 3.0).tolist()
    rows = office(day + 200, 1) + [(t, CLIENTS[5], FILES, 445, 1, 160, 300) for t in often]
    told = created(Watch(LOUD).run(rows, day + 200))
    assert [(f.host, f.peer, f.analytic) for f in told if f.alarm_ns > START + day * S] == [
        (CLIENTS[5], FILES, "chatter")
    ]


@pytest.mark.parametrize("usual", [False, True])
def test_who_fetches_more_than_anybody_ever_did_from_a_service_is_raised_and_who_fetches_as_much_is_not(usual):
    day = an.DAY / LAB.time_scale + 60
    rows = office(day + 60, 1) + [(day + i, CLIENTS[5], FILES, 445, 1, 20_000, 90_000_000) for i in range(20)]
    if usual:  # of a colleague, every hour of the day
        rows += [(t, CLIENTS[6], FILES, 445, 1, 20_000, 1_500_000_000) for t in np.arange(30, day, 60.0).tolist()]
    told = created(Watch(LOUD).run(rows, day + 60))
    mine = [(f.peer, f.analytic) for f in told if f.host == CLIENTS[5] and f.alarm_ns > START + day * S]
    assert mine == ([] if usual else [(FILES, "haul")])


def test_a_connection_that_is_reported_piece_by_piece_is_a_session_and_no_beacon():
    rows = office(BEGIN + 260, 1)
    rows += [(BEGIN + i, CLIENTS[6], "198.51.100.9", LASTING, 1, 400, 300) for i in range(250)]
    told = [f for f in Watch(LOUD).run(rows, BEGIN + 255) if f.host == CLIENTS[6] and f.activity != "close"]
    assert {f.analytic for f in told} == {"session"}
    lasted = told[0].evidence[0].observed
    assert 50 < lasted < 250
    assert told[0].sentence.endswith(f"without a pause for {duration(lasted)}")
    assert told[0].evidence[0].facts == {"lasted_s": pytest.approx(lasted, rel=1e-3)}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_who_comes_to_settled_clients_is_raised_unless_he_uses_such_a_service_elsewhere(elsewhere):
    day = an.DAY / LAB.time_scale + 60
    rows = [*office(day + 60, 1), (day + 1, CLIENTS[5], FILES, 873, 1, 900, 400)]
    if elsewhere:
        rows += [(t, CLIENTS[5], DNS, 873, 1, 900, 400) for t in np.arange(2, day, 5.0).tolist()]
    told = [f for f in created(Watch(LOUD).run(rows, day + 60)) if f.alarm_ns > START + day * S]
    assert [(f.host, f.peer, f.analytic) for f in told] == ([] if elsewhere else [(CLIENTS[5], FILES, "newcomer")])


def test_ten_minutes_without_misbehaviour_raise_at_most_one_host():
    for seed in (0, 1, 2):
        hosts = {f.host for f in created(Watch(LOUD).run(office(720, seed), 720))}
        assert len(hosts) <= 1, (seed, hosts)


def test_nothing_but_scans_guessing_and_floods_is_raised_before_the_calibration_carries_it():
    rows, _ = scene("exfiltration")
    watch = Watch(dataclasses.replace(LOUD, ready_blocks=1000))
    assert watch.run(rows, BEGIN + 20) == []
    assert not watch.alarms.readiness().ready
    assert "of 1000 blocks" in watch.alarms.readiness().reason


def test_when_they_are_ready_is_known_beforehand():
    block = LAB.block_ns / LAB.time_scale / 1e9
    watch = Watch(LOUD)
    assert watch.alarms.expected_ns is None
    watch.run(office(20 * block, 0), 1.5 * block)
    expected = watch.alarms.expected_ns
    assert not watch.alarms.readiness().ready
    assert expected is not None
    for later, ready in ((-8, False), (2, True)):  # a window is run to its end, six seconds
        watch = Watch(LOUD)
        watch.run(office(20 * block, 0), expected / 1e9 - START / 1e9 + later)
        assert watch.alarms.readiness().ready is ready
        assert watch.alarms.expected_ns == (None if ready else expected)


@pytest.mark.parametrize("name", ["port scan", "host scan"])
def test_what_fails_and_is_beyond_doubt_is_raised_within_the_first_block(name):
    block = LAB.block_ns / LAB.time_scale / 1e9
    make, host = MISBEHAVIOURS[name]
    rows = office(block, 0) + make(block / 5, np.random.default_rng(0))
    hits = [f for f in created(Watch(LOUD).run(rows, block - 1)) if f.host == host]
    assert [f.family for f in hits] == ["scan"]
    assert hits[0].alarm_ns < START + block * S


def test_what_is_merely_much_is_no_news_in_the_first_block_but_it_is_after():
    block = LAB.block_ns / LAB.time_scale / 1e9
    at = np.arange(0, 9, 0.003).tolist()
    busy: list[Row] = [(t, f"10.0.0.{k % 8}", "10.0.0.80", 443, 1, 700, 60) for k, t in enumerate(at)]
    for begin, raised in ((2.0, False), (3 * block, True)):
        rows = office(begin + 12, 0) + [(begin + t, *rest) for t, *rest in busy]
        found = created(Watch(LOUD).run(rows, begin + 10))
        assert any(f.host == "10.0.0.80" for f in found) == raised


@pytest.mark.parametrize(
    ("begin", "more", "raised"),
    [(0.0, 1, False), (0.0, 30, True), (0.6, 1, True)],
    ids=["steady", "faster", "from nothing"],
)
def test_a_server_that_was_as_busy_from_the_first_minutes_is_no_flood_after_the_first_block(begin, more, raised):
    """`begin` in blocks; from .6 blocks on `more` times as much."""
    block = LAB.block_ns / LAB.time_scale / 1e9
    rng = np.random.default_rng(4)
    busy = [np.sort(rng.uniform(begin * block, 2 * block, int((2 - begin) * block * 100)))]
    busy += [np.sort(rng.uniform(0.6 * block, 2 * block, int(1.4 * block * 100 * (more - 1))))]
    at = np.sort(np.concatenate(busy)).tolist()
    rows: list[Row] = [(t, f"10.77.0.{20 + k % 8}", "10.77.0.80", 53, 1, 80, 200) for k, t in enumerate(at)]
    found = created(Watch(LOUD).run(office(2 * block, 0) + rows, 2 * block))
    assert any(f.host == "10.77.0.80" and f.analytic == "flood" for f in found) == raised


def test_a_quiet_first_block_raises_nothing():
    block = LAB.block_ns / LAB.time_scale / 1e9
    for seed in range(6):
        assert Watch(LOUD).run(office(block, seed), block - 1) == []


def test_a_beat_that_was_told_and_paused_is_not_told_again():
    make, host = MISBEHAVIOURS["beacon"]
    begins = (BEGIN, BEGIN + 60 + 75)  # an hour, of a sixtieth, after the last of twenty beats
    rows = office(begins[1] + 70, 2) + [r for b in begins for r in make(b, np.random.default_rng(1))]
    found = [f for f in created(Watch(LOUD).run(rows, begins[1] + 66)) if (f.host, f.family) == (host, "beacon")]
    assert len(found) == 1


def test_what_is_left_of_a_level_is_not_told_again_after_an_episode():
    make, host = MISBEHAVIOURS["host scan"]
    again = BEGIN + 6 + 60 + 10  # more than an hour, of a sixtieth, after the last probe; a sweep fades in four
    probe: Row = (again, host, "10.77.1.9", 443, 0, 60, 54)
    rows = office(again + 8, 1) + make(BEGIN, np.random.default_rng(1)) + [probe]
    found = [f for f in created(Watch(LOUD).run(rows, again + 8)) if f.host == host]
    assert len(found) == 1


def test_a_smaller_budget_raises_no_more():
    rows = office(300, 5) + [
        r for name in MISBEHAVIOURS for r in MISBEHAVIOURS[name][0](BEGIN, np.random.default_rng(2))
    ]
    counts = [
        len(created(Watch(dataclasses.replace(LAB, budget=b)).run(rows, 300))) for b in (1.0, 10.0, 100.0, 1000.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] >= 1


def test_two_runs_say_the_same():
    rows, _ = scene("worm")
    assert Watch(LOUD).run(rows, BEGIN + 30) == Watch(LOUD).run(rows, BEGIN + 30)


def test_panes_that_are_looked_at_together_say_what_they_say_one_by_one():
    rows, host = scene("worm")
    again = MISBEHAVIOURS["exfiltration"][0](BEGIN + 75, np.random.default_rng(1))
    rows = [row for row in rows if row[0] < BEGIN + 20] + again
    flows = from_table(table(sorted(rows)))
    panes = contacts(flows, PANE)
    scores = History().score(flows, panes, looked=True)
    looked, blank, hosts = scores.looked, np.full(len(panes), np.nan), flows.hosts.hash[scores.host]
    assert looked is not None
    ends = ((panes.windows + 1) * PANE).tolist()
    of_hosts = [*np.searchsorted(scores.window, panes.windows).tolist(), len(hosts)]
    one, many = Alarms(LOUD), Alarms(LOUD)
    said, p = [], []
    for k, end in enumerate(ends):
        part = slice(*panes.offsets[k : k + 2])
        said += one.step(end, panes.slice(k), looked.some(part), blank[part])
        p.append(one.take(hosts[slice(*of_hosts[k : k + 2])]))
    together, smallest = many.step_each(ends, panes, looked, blank, hosts, of_hosts)
    assert together == said
    assert {"create", "close"} <= {f.activity for f in said}
    assert host in {f.host for f in said}
    assert np.array_equal(smallest, np.concatenate(p), equal_nan=True)
    (arrays, values), (others, other_values) = one.state(), many.state()
    assert values == other_values
    assert all(np.array_equal(a, others[name], equal_nan=a.dtype.kind == "f") for name, a in arrays.items())


def test_a_saved_watch_goes_on_bit_for_bit():
    rows, _ = scene("worm")
    whole = Watch(LOUD)
    expected = whole.run(rows, BEGIN + 41)
    first = Watch(LOUD)
    said = first.run(rows, BEGIN + 5)  # in the middle of the worm
    arrays, values = first.alarms.state()
    second = Watch(LOUD)
    second.history = first.history
    second.alarms = Alarms.restore(LOUD, arrays, json.loads(json.dumps(values)))
    after = (int((START + (BEGIN + 5) * S) // (6 * S)) + 1) * 6 - START // S
    said += second.run(rows, BEGIN + 41, after=after)
    assert [dataclasses.asdict(f) for f in said] == [dataclasses.asdict(f) for f in expected]
    for name, array in whole.alarms.state()[0].items():
        assert np.array_equal(array, second.alarms.state()[0][name], equal_nan=array.dtype.kind == "f"), name


def test_a_finding_is_created_updated_and_closed_under_one_uid():
    make, host = MISBEHAVIOURS["port scan"]
    rows = office(300, 1) + make(BEGIN, np.random.default_rng(1))
    mine = [f for f in Watch(LOUD).run(rows, 300) if f.host == host]
    assert [f.activity for f in mine if f.activity != "update"] == ["create", "close"]
    assert any(f.activity == "update" for f in mine)
    assert len({f.uid for f in mine}) == 1
    told = [f.told_ns for f in mine]
    assert told == sorted(set(told))
    assert {f.alarm_ns for f in mine} == {told[0]}
    assert mine[-1].end_ns is not None
    assert told[-2] <= mine[-1].end_ns < told[-1]
    assert min(f.p_value for f in mine) == mine[-1].p_value


def test_memory_is_bounded_at_the_end_of_each_block():
    config = dataclasses.replace(LOUD, max_keys=30)
    rows, _ = scene("host scan")
    watch = Watch(config)
    watch.run(rows, BEGIN + 40)
    assert max(watch.alarms.memory.sizes().values()) <= 30 + 254 + 20, "only what one block saw is above"
    watch.run([(BEGIN + 70.0, "a", "b", 80, 1, 1, 1)], BEGIN + 72, after=BEGIN + 70)
    assert max(watch.alarms.memory.sizes().values()) <= 60


def test_a_flood_from_spoofed_addresses_is_forgotten_within_its_block_and_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flowsage.models.alarms.PIECE", 200)
    config = dataclasses.replace(LOUD, max_keys=400)
    rows, _ = scene("host scan")
    quiet = [row for row in rows if row[0] < BEGIN]
    watch = Watch(config)
    watch.run(quiet, BEGIN - 6)
    before = watch.alarms.memory.hosts.table.state()
    known = before["keys"][before["seen"] & 1 == 1]
    assert len(known) > 15
    flood = [(BEGIN + 1 + i / 1000, f"198.51.{i // 250}.{i % 250}", "10.77.0.10", 80, 0, 60, 0) for i in range(8_000)]
    watch.run(flood, BEGIN + 40, after=BEGIN)
    assert max(watch.alarms.memory.sizes().values()) <= 2 * 400 + 200
    hosts = watch.alarms.memory.hosts.table
    assert hosts.evicted > 6_000
    assert (hosts.find(known) >= 0).all()


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigurationError, match="budget"):
        AlarmConfig(budget=0)
    with pytest.raises(ConfigurationError, match=r"write it like 10\.0\.0\.0/8"):
        Alarms(AlarmConfig(internal=("ten",)))


def offer(host: str, name: str, p: float, peer: str | None = None) -> Offer:
    why = Explained(f"{host} did {name}", peer, START, 10.0, 1.0)
    return Offer(host, an.NAMES.index(name), p, lambda: why)


MINUTE = 60 * S


def test_one_cause_towards_one_peer_at_several_hosts_is_one_finding():
    episodes = Episodes()
    told = []
    for i in range(5):
        told += episodes.offer(START + i * 6 * MINUTE, [offer(f"h{i}", "exfil", 1e-9, "update.example")], 1e-3)
    assert len(episodes.open) == 1
    assert [f.host for f in created(told)] == ["h0"], "the others are told as updates of the first"
    assert [f.hosts for f in told if f.activity == "update"][-1] == ("h0", "h1", "h2", "h3", "h4")
    assert len({f.uid for f in told if f.activity == "update"}) == 1


def test_three_hosts_in_one_pane_with_different_causes_are_three_findings():
    episodes = Episodes()
    told = episodes.offer(
        START, [offer("h1", "exfil", 1e-9, "x"), offer("h2", "ports", 1e-9, "x"), offer("h3", "exfil", 1e-9, "y")], 1e-3
    )
    assert len(created(told)) == 3


def test_causes_of_a_host_join_within_a_quarter_of_an_hour_and_a_family_within_an_hour():
    episodes = Episodes()
    told = episodes.offer(START, [offer("h", "sweep", 1e-6)], 1e-3)
    told += episodes.offer(START + 10 * MINUTE, [offer("h", "exfil", 1e-6, "x")], 1e-3)
    assert len(episodes.open) == 1
    assert episodes.open[0].finding.analytics == ("sweep", "exfil")
    told += episodes.offer(START + 30 * MINUTE, [offer("h", "beacon", 1e-6, "x")], 1e-3)
    assert len(created(told)) == 2
    told += episodes.offer(START + 69 * MINUTE, [offer("h", "fan", 1e-6)], 1e-3)
    assert len(created(told)) == 2, "a scan again, fifty-nine minutes after the finding was last seen"
    assert episodes.close(START + 69 * MINUTE) == []
    assert len(episodes.close(START + 200 * MINUTE)) == 2
    assert len(created(episodes.offer(START + 201 * MINUTE, [offer("h", "fan", 1e-6)], 1e-3))) == 1


def test_a_finding_is_borne_out_once_by_another_family_and_not_by_its_own():
    episodes = Episodes()
    episodes.offer(START, [offer("h", "meeting", 1e-6)], 1e-3)
    episodes.offer(START + MINUTE, [offer("h", "novelty", 1e-6)], 1e-3)
    assert episodes.borne_out == []
    again = Episodes.restore(json.loads(json.dumps(episodes.state())), 1.0)
    for e in (episodes, again):
        e.offer(START + 2 * MINUTE, [offer("h", "sweep", 1e-6)], 1e-3)
        assert [an.NAMES[a] for a, _ in e.borne_out] == ["meeting"]
        e.offer(START + 3 * MINUTE, [offer("h", "guess", 1e-6)], 1e-3)
        assert e.borne_out == []


def test_the_victims_side_joins_the_attackers_finding():
    episodes = Episodes()
    told = episodes.offer(START, [offer("attacker", "ports", 1e-9, "victim")], 1e-3)
    told += episodes.offer(START + 6 * MINUTE, [offer("victim", "fail-in", 1e-7, "attacker")], 1e-3)
    assert len(created(told)) == 1
    assert episodes.open[0].others == [("victim", "target")]
    assert told[-1].sentence == "attacker did ports; felt by: victim"


def test_a_victim_that_does_something_of_its_own_is_a_finding_of_its_own():
    episodes = Episodes()
    episodes.offer(START, [offer("attacker", "ports", 1e-9, "victim")], 1e-3)
    episodes.offer(START + MINUTE, [offer("victim", "fail-in", 1e-7, "attacker")], 1e-3)
    (mine,) = created(episodes.offer(START + 2 * MINUTE, [offer("victim", "sweep", 1e-7)], 1e-3))
    assert (mine.host, mine.role, mine.family) == ("victim", "source", "scan")


def test_updates_are_throttled_and_need_something_worse():
    episodes = Episodes()
    episodes.offer(START, [offer("h", "sweep", 1e-6)], 1e-3)
    assert episodes.offer(START + MINUTE, [offer("h", "sweep", 1e-12)], 1e-3) == []
    assert [f.activity for f in episodes.offer(START + 6 * MINUTE, [offer("h", "sweep", 1e-12)], 1e-3)] == ["update"]
    assert episodes.offer(START + 20 * MINUTE, [offer("h", "sweep", 5e-13)], 1e-3) == []


def test_two_threads_say_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = scene("host scan", 1)
    said = []
    for least in (0, 1 << 30):
        monkeypatch.setattr("flowsage.models.alarms.THREADED", least)
        watch = Watch(LOUD)
        findings = watch.run(rows, BEGIN + 72)
        arrays, _ = watch.alarms.state()
        said.append((findings, arrays))
    assert said[0][0] == said[1][0]
    assert created(said[0][0])
    for name, array in said[0][1].items():
        assert np.array_equal(array, said[1][1][name]), name


def test_a_pane_that_is_looked_at_in_pieces_raises_the_same_hosts_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, host = scene("host scan", seed=1)
    whole = created(Watch(LOUD).run(rows, BEGIN + 72))
    monkeypatch.setattr("flowsage.models.alarms.PIECE", 9)
    pieces = created(Watch(LOUD).run(rows, BEGIN + 72))
    assert host in {f.host for f in pieces}
    assert [(f.host, f.family) for f in pieces] == [(f.host, f.family) for f in whole]
