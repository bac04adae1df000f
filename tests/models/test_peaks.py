"""Peaks: what some host has moved on a service is not news when another does."""

from __future__ import annotations

import numpy as np
import pytest

from flowsage.models import peaks
from flowsage.models.analytics import COLUMN, HAUL, SERVICE, WIDTH
from flowsage.models.cells import PAST
from flowsage.models.records import CELL

TAU = STEP = 900.0


def test_the_highest_level_of_any_host_is_the_record_of_the_service_two_spans_later():
    moved, inside = np.array([1000, 1000], np.int64), np.ones(4, np.bool_)
    slots = np.array([[0, 1], [2, 3], [0, 1], [0, 1], [0, 1], [0, 0]], np.int32)
    service, past = np.zeros(1, CELL), np.zeros((1, PAST))
    cells = np.zeros(2 * int(WIDTH[SERVICE]), CELL)
    own = cells[int(COLUMN[HAUL]) :: int(WIDTH[SERVICE])]
    said = []
    for k in range(6):
        now = (k + 0.5) * STEP
        said.append(peaks.highest(slots, moved, service, past, inside, TAU, TAU, STEP, 0.0, now)[0])
        own["at"], own["level"] = now, (50.0, 400.0) if k == 1 else 1.0
        peaks.learn(slots, cells, service, now)
    assert said[:3] == [0.0, 0.0, pytest.approx(np.log1p(1.0))]
    assert said[3:] == pytest.approx([np.log1p(400.0)] * 3)


def test_a_level_of_another_time_is_no_peak_of_now():
    slots, service, cells = np.zeros((6, 1), np.int32), np.zeros(1, CELL), np.zeros(int(WIDTH[SERVICE]), CELL)
    cells["at"][int(COLUMN[HAUL])], cells["level"][int(COLUMN[HAUL])] = 50.0, 400.0
    peaks.learn(slots, cells, service, 90.0)
    assert service["level"][0] == 0.0
    peaks.learn(slots, cells, service, 50.0)
    assert service["level"][0] == 400.0


def test_what_comes_from_outside_or_goes_there_has_no_peak_here():
    slots, moved = np.array([[0], [1], [0], [0], [0], [0]], np.int32), np.array([1000], np.int64)
    for inside in ((True, False), (False, True)):
        service, past = np.zeros(1, CELL), np.full((1, PAST), 9.0)
        assert peaks.highest(slots, moved, service, past, np.array(inside), TAU, TAU, STEP, 0.0, 50.0)[0] == 0.0
        assert service["at"][0] == 0.0
