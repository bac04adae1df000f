"""What a replay writes: a table of scores that goes to its file while flows still come."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from flowsage.collector.errors import InputError
from flowsage.pipelines import outputs
from flowsage.pipelines.outputs import ScoreTable

NAMES = ("flow_score", "beacon_score", *outputs._SHARES)


def closed(rows: np.ndarray) -> Any:
    """Windows that closed, whose every number tells its row and its column."""
    numbers = rows[None] + np.arange(len(NAMES))[:, None] / 64
    scores = SimpleNamespace(beacon_score=numbers[1], parts=SimpleNamespace(table=lambda: numbers[4:]))
    flows = type("Flows", (), {"row": rows, "__len__": lambda _: len(rows)})()
    contacts = SimpleNamespace(of_flow=np.arange(len(rows)))
    return SimpleNamespace(
        scores=scores, flows=flows, flow_score=numbers[0], tails=numbers[2], flow_surprise=numbers[3], contacts=contacts
    )


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_BLOCK", 8)
    monkeypatch.setattr(outputs, "_GROUP", 2)


@pytest.mark.parametrize("late", [0, 10, 20, 45], ids=lambda late: f"row {late} comes last")
def test_every_row_has_its_scores_in_whatever_order_flows_come(tmp_path: Path, late: int) -> None:
    rows, lost = np.delete(np.arange(50), late), 49 if late != 49 else 48
    rows = np.append(rows[rows != lost], late)
    table = ScoreTable(tmp_path / "scores.parquet")
    for part in np.array_split(rows, 7):
        table.add(closed(part))
    table.write(50)
    table.close()
    written = pq.read_table(tmp_path / "scores.parquet")
    assert written.column_names == list(NAMES)
    for k, name in enumerate(NAMES):
        expected = np.where(np.arange(50) == lost, np.nan, np.arange(50) + k / 64)
        np.testing.assert_array_equal(written[name].to_numpy(), expected.astype(written[name].type.to_pandas_dtype()))
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]


def test_row_groups_are_written_as_they_fill_and_nothing_of_them_stays_where_the_end_never_comes(
    tmp_path: Path,
) -> None:
    table = ScoreTable(tmp_path / "scores.parquet")
    for part in np.array_split(np.arange(50), 7):
        table.add(closed(part))
    table._wait()
    assert table._written == 48
    assert sum(block[0].size for block in table._blocks) == 8
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet.part"]
    table.close()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_be_written_is_told_by_the_next_windows(tmp_path: Path) -> None:
    table = ScoreTable(tmp_path / "gone" / "scores.parquet")
    table.add(closed(np.arange(8)))
    table.add(closed(np.arange(8, 16)))
    with pytest.raises(InputError, match="cannot write"):
        table.add(closed(np.arange(16, 20)))
    table.close()
