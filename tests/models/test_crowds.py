"""Crowds: implausible meetings of others with one target take away from what the next says of its source."""

from __future__ import annotations

import numpy as np
import pytest

from flowsage.models.crowds import FEW, LASTS, crowded

TARGET, ALSO_OURS, OUTSIDE = 0, 1, 9


class Network:
    """Hosts 0 to 8 are ours."""

    def __init__(self) -> None:
        self.inside, self.crowds = np.arange(10) < OUTSIDE, np.zeros((10, 2))

    def meets(
        self, now: float, *sources: int, misplaced: float = 1.0, target: int = TARGET, fresh: bool = True,
        pair: bool = True,
    ) -> list[float]:  # fmt: skip
        """The crowd that each of them finds."""
        n = len(sources)
        slots = np.array([sources, [target] * n], np.int32)
        new = np.tile([fresh, pair, False], (n, 1))
        got = crowded(slots, new, np.full(n, misplaced), self.inside, self.crowds, now, LASTS)
        return [round(float(x), 3) for x in got]


def test_the_more_others_came_the_larger_the_crowd_and_it_fades() -> None:
    network = Network()
    assert network.meets(0.0, 2, 3, 4, 5) == [0.0, 0.0, 2 - FEW, 3 - FEW]
    assert network.meets(LASTS, 6) == [pytest.approx(4 / np.e - FEW, abs=1e-3)]
    assert network.meets(20 * LASTS, 7) == [0.0]


def test_plausible_meetings_are_no_crowd_and_neither_are_those_nobody_was_asked_about() -> None:
    network = Network()
    for misplaced in (0.0, np.nan):
        assert network.meets(0.0, *range(2, 9), misplaced=misplaced) == [0.0] * 7
    assert network.meets(0.0, 2, 3, 4, misplaced=0.5) == [0.0, 0.0, 0.0]


def test_a_crowd_is_of_one_target_and_within_the_network() -> None:
    network = Network()
    network.meets(0.0, 2, 3, 4, 5)
    assert network.meets(0.0, 6, target=ALSO_OURS) == [0.0]
    assert network.meets(0.0, OUTSIDE) == [0.0]
    assert network.meets(0.0, 6, fresh=False) == [0.0], "known contacts are not asked about"
    assert network.meets(0.0, 6) == [4 - FEW], "and nobody of these has joined"


def test_who_met_the_target_before_is_not_his_own_crowd() -> None:
    network = Network()
    network.meets(0.0, 2, 3)
    assert network.meets(0.0, 2, pair=False) == [0.0]
    assert network.meets(0.0, 4) == [3 - FEW]
