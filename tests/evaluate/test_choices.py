"""What the others would choose, and a new sensor's recordings: the measures of constants and of cold starts."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from flowsage.models import analytics as an
from flowsage.models import calibration
from flowsage.pipelines.enterprise import ATTACKS, Simulation, simulate
from tests.evaluate import cold, measures
from tests.evaluate.injections import Recording, recording
from tests.evaluate.leave_one_out import Constant, choose, constants, row, using


def test_a_constant_has_its_value_while_it_is_tried_and_its_default_after() -> None:
    for c in constants():
        module, _, name = c.name.partition(".")
        if c.kind != "attribute" or module != "calibration" or "[" in name:
            continue
        with using(c, c.others[0]):
            assert getattr(calibration, name) == c.others[0], c.name
        assert getattr(calibration, name) == c.default, c.name
    before = an.LEAST.copy(), an.SHARE.copy(), an.TAU.copy()
    for c in constants():
        if c.kind == "array":
            with using(c, c.others[0]):
                now = an.LEAST, an.SHARE, an.TAU
                assert sum((a != b).any() for a, b in zip(now, before, strict=True)) == 1, c.name
            assert all((a == b).all() for a, b in zip((an.LEAST, an.SHARE, an.TAU), before, strict=True))


def test_the_file_that_is_judged_has_no_say() -> None:
    c = Constant("x", "config", 2.0, (1.0, 4.0))
    # Only file a is better off with the default; b and c would find more with 4; with 1 more would be false.
    points = {
        1.0: {"a": (1, 9, 0), "b": (9, 9, 5), "c": (9, 9, 5)},
        2.0: {"a": (9, 9, 0), "b": (5, 9, 1), "c": (5, 9, 1)},
        4.0: {"a": (2, 9, 0), "b": (6, 9, 1), "c": (6, 9, 1)},
    }
    assert [choose(c, points, f) for f in "abc"] == [4.0, 2.0, 2.0]
    assert row(c, points)[-2:] == ["19/2", "12/2"]


@pytest.fixture(scope="module", name="recorded")
def fixture_recorded(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    path = tmp_path_factory.mktemp("recorded") / "r.parquet"
    pq.write_table(simulate(Simulation(days=0.7, hosts=60, seed=7, repeats=0))[0], path)
    return recording(path)


@pytest.mark.parametrize("kind", ["fast-scan", "drip", "distributed-flood"])
def test_an_attack_begins_within_the_first_half_hour_of_a_new_sensor(recorded: Recording, kind: str) -> None:
    assert kind in ATTACKS
    for seed in range(3):
        table, after = cold.early(recorded, kind, seed)
        (case,) = measures.incidents(table.to_pandas())
        start = table.column("start_ns").to_numpy()
        assert 0 <= after <= cold.LEAD_S
        assert 0 <= case.first_ns - start[0] <= (cold.LEAD_S + 3_600) * 1e9
        assert (np.diff(start) >= 0).all()
        assert start[-1] - start[0] <= cold.HOURS * 3_600e9


def test_a_labelled_file_begins_before_an_attack_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "labelled.parquet"
    pq.write_table(simulate(Simulation(days=0.7, hosts=60, seed=8, repeats=1))[0], path)
    for table, after in cold.labelled(path, 2):
        assert sum(table.column("label").to_pylist()) > 0
        assert 0 <= after <= cold.LEAD_S
