"""Findings over hours: what begins long after a finding last grew is told, and what a host does for a living is not."""

from __future__ import annotations

import json

import pytest

from flowsage.models import analytics as an
from flowsage.models.episodes import Episodes, Offer
from flowsage.models.explain import Explained
from flowsage.models.habits import KNOWN, ROOM, Habits
from tests.models.alarm_streams import START, S
from tests.models.test_alarms import created

MINUTE, HOUR, DAY = 60 * S, 3_600 * S, 86_400 * S


def offer(
    host: str, name: str, p: float, peer: str | None = None, *, on: int | None = None, x: float = 5.0, about: str = ""
) -> Offer:
    why = Explained(f"{host} did {name} on {on}", peer, START, 10.0, 1.0, on=on)
    a = an.NAMES.index(name)
    return Offer(host, a, p, lambda: why, x, x, float(an.TAU[a]), about)


def scanned(episodes: Episodes) -> None:
    """A victim that is scanned for half an hour."""
    for minute in range(0, 35, 5):
        x = 6.0 + minute / 20
        offers = [offer("attacker", "ports", 1e-9, "victim", x=x), offer("victim", "flood", 1e-7, "attacker", x=x)]
        episodes.offer(START + minute * MINUTE, offers, 1e-3)


@pytest.mark.parametrize("saved", [False, True])
def test_a_victim_of_a_scan_that_is_flooded_later_is_told_so(saved: bool) -> None:
    episodes = Episodes()
    scanned(episodes)
    assert len(episodes.open) == 1
    if saved:
        episodes = Episodes.restore(json.loads(json.dumps(episodes.state())), 1.0)
    told = episodes.offer(START + 60 * MINUTE, [offer("victim", "flood", 1e-7, "attacker", x=7.1)], 1e-3)
    assert created(told) == [], "what is left of the scan, and little more"
    for minute, x in ((80, 7.5), (85, 8.0), (90, 8.5)):
        told += episodes.offer(START + minute * MINUTE, [offer("victim", "flood", 1e-7, "attacker", on=80, x=x)], 1e-3)
    (flood,) = created(told)
    assert (flood.host, flood.role, flood.peer) == ("victim", "target", "attacker")
    assert flood.alarm_ns == START + 80 * MINUTE


def test_the_same_again_after_a_pause_is_the_same_finding():
    episodes = Episodes()
    scanned(episodes)
    told = []
    for minute in (80, 85, 90):
        told += episodes.offer(START + minute * MINUTE, [offer("victim", "flood", 1e-7, "attacker", x=8.0)], 1e-3)
    assert created(told) == []


def test_an_attack_that_goes_on_and_grows_is_one_finding_whatever_it_turns_to():
    episodes = Episodes()
    told = []
    for minute in range(0, 240, 5):
        on, x = (80 if minute > 120 else None), 6.0 + minute / 60
        told += episodes.offer(START + minute * MINUTE, [offer("victim", "flood", 1e-7, "a", on=on, x=x)], 1e-3)
    assert len(created(told)) == 1


def test_who_joined_for_one_peer_and_attacks_another_later_is_told_so():
    episodes = Episodes()
    episodes.offer(START, [offer("victim", "flood", 1e-9, "first", on=21)], 1e-3)
    episodes.offer(START + MINUTE, [offer("first", "guess", 1e-7, "victim", on=21, about="victim")], 1e-3)
    assert len(episodes.open) == 1
    told = episodes.offer(START + 40 * MINUTE, [offer("first", "guess", 1e-7, "other", on=22, about="other")], 1e-3)
    (mine,) = created(told)
    assert (mine.host, mine.peer) == ("first", "other")


def test_who_comes_long_after_a_finding_grew_does_not_join_it():
    for after, findings in ((10, 0), (40, 1)):
        episodes = Episodes()
        episodes.offer(START, [offer("victim", "flood", 1e-9, "first", on=21)], 1e-3)
        for minute in range(1, after):
            episodes.offer(START + minute * MINUTE, [offer("victim", "flood", 1e-9, "first", on=21, x=4.9)], 1e-3)
        told = episodes.offer(START + after * MINUTE, [offer("second", "guess", 1e-9, "victim", on=22)], 1e-3)
        assert len(created(told)) == findings, after


def test_a_finding_of_ones_own_that_turns_to_another_service_says_so_and_what_it_was():
    episodes = Episodes()
    episodes.offer(START, [offer("h", "sweep", 1e-9, on=22)], 1e-3)
    (told,) = episodes.offer(START + 50 * MINUTE, [offer("h", "fan", 1e-7, on=445)], 1e-3)
    assert told.activity == "update"
    assert told.sentence == "h did fan on 445; earlier: h did sweep on 22"


def test_what_a_joined_host_does_is_said_where_it_is_rarer():
    episodes = Episodes()
    episodes.offer(START, [offer("victim", "flood", 1e-5, "attacker")], 1e-3)
    (told,) = episodes.offer(START + 6 * MINUTE, [offer("attacker", "guess", 1e-9, "victim")], 1e-3)
    assert told.sentence == "victim did flood on None; done by: attacker; attacker did guess on None"
    assert told.p_value < 1e-7


def test_what_a_host_was_told_for_twice_is_told_again_only_if_it_is_clearly_stronger():
    episodes, told = Episodes(), []
    for day, x in enumerate((3.0, 3.2, 3.5, 4.0, 4.3)):
        now = START + day * DAY
        if day == 3:
            episodes = Episodes.restore(json.loads(json.dumps(episodes.state())), 1.0)
        told.append(len(created(episodes.offer(now, [offer("builder", "meeting", 1e-9, x=x)], 1e-3))))
        episodes.close(now + 2 * HOUR)
    assert told == [1, 1, 0, 0, 1]


def test_what_is_no_habit_what_another_family_bears_out_and_what_is_long_past_is_told():
    def times(name: str, gap: int, *also: str, n: int = 4) -> int:
        episodes, told = Episodes(), []
        for k in range(n):
            now = START + k * gap
            told += episodes.offer(now, [offer("h", name, 1e-9)], 1e-3)
            for other in also:
                told += episodes.offer(now + MINUTE, [offer("h", other, 1e-9)], 1e-3)
            episodes.close(now + 2 * HOUR)
        return len(created(told))

    assert times("meeting", DAY) == 2
    assert times("sweep", DAY) == 4
    assert times("meeting", DAY, "exfil") == 4
    assert times("meeting", 7 * DAY) == 4


def test_habits_are_bounded_and_go_on_while_they_last():
    habits = Habits()
    for k in range(ROOM + 10):
        habits.told(f"h{k}", an.MEETING, 3.0, START)
    assert len(habits.known) == ROOM
    assert ("h0", an.MEETING) not in habits.known
    habits.told("h100", an.MEETING, 3.0, START)
    for day in range(1, 30):
        now = START + day * DAY
        assert habits.usual("h100", an.MEETING, 3.0, now), day
        assert habits.again("h100", an.MEETING, now, HOUR)
        assert not habits.again("h100", an.MEETING, now + 50 * MINUTE, HOUR), "it goes on"
    assert not habits.usual("h100", an.MEETING, 3.0, START + 40 * DAY), KNOWN


def test_what_is_not_told_still_counts_against_its_analytic_once_while_it_lasts():
    episodes, begun = Episodes(), []
    for day in range(4):
        for minute in (0, 1, 50):
            episodes.offer(START + day * DAY + minute * MINUTE, [offer("builder", "meeting", 1e-9, x=3.0)], 1e-3)
            begun += episodes.begun
        episodes.close(START + day * DAY + 3 * HOUR)
    assert len(begun) == 4
