"""p-values: by hand, uniform on what they are made for, and within the budget."""

import math

import numpy as np
import pytest

from flowsage.models import analytics as an
from flowsage.models.calibration import A0, N0, THRESHOLD, Calibration
from flowsage.models.prior import GROUPS, PRIOR

A, G = len(an.TABLE), len(GROUPS)
HOUR, DAY = 4.0, 96.0


class Blocks:
    """Hosts that are active in every block, with excesses given for one analytic."""

    def __init__(self, hosts: int, analytic: int, group: int) -> None:
        self.c, self.hosts, self.analytic, self.group = Calibration(), np.arange(hosts), analytic, group
        self.best, self.run = (tuple(np.zeros((hosts, A), np.float32) for _ in range(G)) for _ in range(2))
        self.last, self.excluded = np.full((hosts, 2), -(1 << 40)), np.zeros((hosts, A), bool)
        self.block = 1000

    def end(self, excess: np.ndarray, named: np.ndarray | None = None) -> None:
        self.best[self.group][:, self.analytic] = excess
        if named is not None:
            self.excluded[named, self.analytic] = True
        self.block += 1
        self.c.flush((self.hosts, self.hosts[:0]), self.best, self.run, self.last, self.excluded,
                     np.zeros(len(self.hosts)), float(self.block), self.block, (HOUR, DAY))  # fmt: skip


def test_p_is_the_formula_with_the_measured_prior():
    c, (rate, mean) = Calibration(), PRIOR["lateral"]
    for s in (0.6, 2.0, 5.0):
        expected = rate[3] * (1 + (s - THRESHOLD) / (A0 * mean[3])) ** -A0
        assert c.p_value(an.LATERAL, 3, s) == pytest.approx(expected, rel=1e-9)
    assert c.p_value(an.LATERAL, 3, THRESHOLD) == 1.0


def test_every_active_host_block_counts_and_an_event_counts_once_when_it_is_over():
    b = Blocks(5, an.SWEEP, 3)
    one = np.array([2.0, 0, 0, 0, 0])
    for excess in (one, 1.5 * one, one):
        b.end(excess)
    assert b.c.k[an.SWEEP, 3] == 0
    b.end(0 * one)
    assert b.c.n[0].tolist() == [0, 0, 20]
    assert b.c.k[an.SWEEP, 3] == 1
    mean = PRIOR["sweep"][1][3]
    assert b.c.e[an.SWEEP, 3] == pytest.approx(min(3.0 - THRESHOLD, 5 * mean))
    rate = (1 + N0 * PRIOR["sweep"][0][3]) / (20 + N0)
    assert b.c.p_value(an.SWEEP, 3, 1.0) == pytest.approx(
        rate * (1 + 0.5 / (A0 * mean + b.c.e[an.SWEEP, 3])) ** -(A0 + 1), rel=1e-9
    )


def test_what_was_named_is_left_out():
    b = Blocks(2, an.SWEEP, 3)
    b.end(np.array([9.0, 0.0]))
    b.end(np.array([9.0, 0.0]), named=np.array([0]))
    b.end(np.zeros(2))
    assert b.c.k.sum() == 0
    assert b.c.n[0].sum() == 6


def test_p_values_are_uniform_on_exponential_excesses():
    """Rate .05, mean .8: of 40,000 host-blocks after 400 of learning, the share with p <= α is about α."""
    rng = np.random.default_rng(7)
    hosts, rate, mean = 100, 0.05, 0.8
    b, ps = Blocks(hosts, an.FAN, 3), []
    for t in range(404):
        fires = rng.random(hosts) < rate
        fires &= b.run[b.group][:, b.analytic] <= 0  # events apart, as the model has it
        s = np.where(fires, THRESHOLD + rng.exponential(mean, hosts), 0.0)
        if t >= 4:
            ps += [b.c.p_value(an.FAN, 3, float(v)) for v in s[fires]]
        b.end(s)
    ps = np.array(ps)
    for alpha in (0.02, 0.005, 0.0005):
        assert (ps <= alpha).sum() / (hosts * 400) == pytest.approx(alpha, rel=0.5)


def test_not_ready_says_what_is_missing():
    b = Blocks(3, an.FAN, 3)
    assert not b.c.readiness(2, 6).ready
    b.end(np.zeros(3))
    assert b.c.readiness(2, 6).reason == "not ready: 1 of 2 blocks and 3 of 6 host-blocks of calibration seen"
    assert b.c.readiness(2, 3).reason == "not ready: 1 of 2 blocks of calibration seen"
    b.end(np.zeros(3))
    assert b.c.readiness(2, 6).ready


def test_how_many_blocks_are_left_follows_from_how_busy_those_so_far_were():
    b = Blocks(3, an.FAN, 3)
    assert b.c.blocks_left(4, 24, active=0) is None
    assert b.c.blocks_left(4, 24, active=3) == 8
    assert b.c.blocks_left(4, 24, active=100) == 4
    for left in (7, 6, 5):
        b.end(np.zeros(3))
        assert b.c.blocks_left(4, 24, active=100) == left
    assert b.c.blocks_left(2, 9, active=0) == 0


def test_budget_is_a_day_per_hundred_hosts_and_at_least_one_a_day():
    c = Calibration()
    c.blocks, c.hosts, c.n[0, 2] = 10, 10 * 200, 10 * 200
    assert c.allowed(10, 1, 96) == pytest.approx(10 / 9600)
    assert c.allowed(10, 1, 96 * 60) == pytest.approx(10 / 9600 / 60)
    c.hosts, c.n[0, 2] = 10 * 5, 10 * 5
    assert c.allowed(10, 1, 96) == pytest.approx(1 / (5 * 96))
    assert c.allowed(1, 1, 96) == pytest.approx(0.1 / (5 * 96))


def test_the_budget_grows_on_the_first_day():
    c = Calibration()
    c.blocks, c.hosts, c.n[0, 2] = 48, 48 * 200, 48 * 200
    assert c.allowed(10, 1, 96, settled=96) == pytest.approx(0.5 * c.allowed(10, 1, 96))
    c.blocks, c.hosts, c.n[0, 2] = 1, 200, 200
    assert c.allowed(10, 1, 96, settled=96) == pytest.approx(0.1 * c.allowed(10, 1, 96))


def test_an_analytic_that_keeps_raising_is_believed_less_and_the_smaller_the_budget_the_sooner():
    c = Calibration()
    c.blocks, c.hosts, c.n[0, 2] = 10, 2_000, 2_000
    assert not c.floors(10, 96).any()
    for _ in range(5):
        c.note(an.SWEEP, 4.0)
    floors = c.floors(10, 96)
    assert floors[an.SWEEP, int(4.0 / 0.25)] == pytest.approx(2 / 2_400)
    assert floors[an.SWEEP, int(6.0 / 0.25)] == 0
    assert floors[an.EXFIL].max() == 0
    assert c.floors(1, 96)[an.SWEEP].max() == pytest.approx(4 / 2_400)
    c.fade(1.0)
    assert c.floors(10, 96).max() == 0


def test_what_an_analytics_share_of_the_budget_allows_says_nothing_against_it():
    c, step = Calibration(), int(4.0 / 0.25)
    c.blocks, c.hosts, c.n[0, 2], c.lately = 10, 20_000, 20_000, 20_000.0
    for _ in range(9):
        c.note(an.MEETING, 4.0)
    share = 0.15 * 10 / 100 / 96 * 20_000
    assert c.floors(10, 96)[an.MEETING, step] == pytest.approx((9 - 3 - share) / 20_400)
    assert c.floors(1, 96)[an.MEETING, step] == pytest.approx((9 - 1 - share / 10) / 20_400)
    c.fade(1.0)
    assert c.lately == 10_000


def test_findings_that_another_family_bears_out_do_not_count_and_earn_belief_for_others():
    c = Calibration()
    c.blocks, c.hosts, c.n[0, 2] = 10, 2_000, 2_000
    for _ in range(7):
        c.note(an.MEETING, 4.0)
    step = int(4.0 / 0.25)
    assert c.floors(10, 96)[an.MEETING, step] == pytest.approx(4 / 2_400)
    c.bear_out(an.MEETING, 4.0)
    assert c.floors(10, 96)[an.MEETING, step] == pytest.approx(2 / 2_400)
    c.bear_out(an.MEETING, 4.0)
    assert c.floors(10, 96).max() == 0
    for _ in range(9):
        c.note(an.EXFIL, 4.0)
    assert c.floors(10, 96)[an.EXFIL, step] == pytest.approx(6 / 2_400)


def test_a_saved_calibration_goes_on():
    b = Blocks(5, an.SWEEP, 3)
    for s in (2.0, 0.0, 1.0):
        b.end(np.full(5, s))
    again = Calibration.restore(b.c.state())
    assert all(np.array_equal(x, y) for x, y in zip(again.parameters(), b.c.parameters(), strict=True))
    assert (again.blocks, again.hosts) == (3, 15)
    assert math.isclose(again.allowed(10, 1, 96), b.c.allowed(10, 1, 96))


def test_a_flood_of_newcomers_hardly_makes_what_newcomers_do_rarer_nor_the_budget_larger():
    b = Blocks(100, an.SWEEP, 0)
    b.end(np.zeros(100))
    hosts = 3_000_000
    before, n = b.c.p_value(an.SWEEP, 0, 2.0), b.c.n[0, 0]
    best, run = (tuple(np.zeros((hosts, A), np.float32) for _ in range(G)) for _ in range(2))
    spoofed = np.arange(hosts)
    b.c.flush((spoofed, spoofed[:1]), best, run, np.full((hosts, 2), -(1 << 40)), np.zeros((hosts, A), bool),
              np.full(hosts, 2000.0), 2000.0, 2000, (HOUR, DAY))  # fmt: skip
    assert b.c.n[0, 0] - n == pytest.approx(2_000)
    assert (b.c.lately, b.c.hosts) == (pytest.approx(2_100), 2_100)
    assert b.c.p_value(an.SWEEP, 0, 2.0) > before / 8


def test_newcomers_of_a_large_network_all_count():
    c, hosts = Calibration(), np.arange(50_000)
    best, run = (tuple(np.zeros((len(hosts), A), np.float32) for _ in range(G)) for _ in range(2))
    best[0][:100, an.SWEEP] = 2.0
    born = np.where(hosts < 40_000, 2000.0, 0.0)
    c.flush((hosts, hosts[:0]), best, run, np.full((len(hosts), 2), -(1 << 40)), np.zeros((len(hosts), A), bool),
            born, 2000.0, 2000, (HOUR, DAY))  # fmt: skip
    assert c.n[0].tolist() == [40_000, 0, 10_000]
    assert c.k[an.SWEEP, 0] == 100
