"""Flow files as steps of event time."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowsage.collector.errors import InputError, SchemaError
from flowsage.pipelines.sources import FlowFile, whole_windows

SECOND = 10**9


def write(path: Path, **columns: object) -> Path:
    table = {"start_ns": [1, 2], "src_ip": ["a", "b"], "dst_ip": ["b", "a"]} | columns
    pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), path)
    return path


def test_steps_are_panes_whatever_the_size_of_a_batch(tmp_path: Path) -> None:
    n = 1000
    path = write(
        tmp_path / "flows.parquet",
        start_ns=[i * SECOND // 7 for i in range(n)],
        src_ip=[f"h{i % 13}" for i in range(n)],
        dst_ip=[f"h{i % 17}" for i in range(n)],
    )
    reference = [(s.now_ns, s.flows.row.tolist()) for s in FlowFile(path).steps(10 * SECOND)]
    assert sum(len(rows) for _, rows in reference) == n
    assert all(now % (10 * SECOND) == 0 for now, _ in reference)
    for rows in (1, 7, 64, 999):
        assert [(s.now_ns, s.flows.row.tolist()) for s in FlowFile(path).steps(10 * SECOND, rows)] == reference


def test_a_window_closes_with_its_last_pane_and_those_that_are_one_pane_come_together(tmp_path: Path) -> None:
    seconds = [1, 2, 61, 118, 119, 125, 200, 207, 600, 601]
    hosts = [f"h{i}" for i in range(len(seconds))]
    path = write(tmp_path / "flows.parquet", start_ns=[s * SECOND for s in seconds], src_ip=hosts, dst_ip=hosts[::-1])
    steps = list(FlowFile(path).steps(10 * SECOND))
    assert [s.now_ns // SECOND for s in steps] == [10, 70, 120, 130, 210, 610]
    assert [s.watermark_ns // SECOND for s in steps] == [61, 118, 125, 200, 600, 610], "the next flow, at last the end"
    together = [[s.now_ns // SECOND for s in some] for some in whole_windows(steps, 60 * SECOND)]
    assert together == [[10], [70], [120], [130, 210], [610]], "the last window may go on"


def test_rows_that_go_back_in_time_are_put_in_order_and_keep_their_row_number(tmp_path: Path) -> None:
    path = write(
        tmp_path / "flows.parquet",
        start_ns=[5 * SECOND, 1 * SECOND, 3 * SECOND],
        src_ip=["x", "y", "z"],
        dst_ip=["q", "q", "q"],
    )
    file = FlowFile(path)
    assert file.reordered == 2
    (step,) = file.steps(10 * SECOND)
    assert step.flows.row.tolist() == [1, 2, 0]
    assert step.flows.hosts.names.take(step.flows.src).to_pylist() == ["y", "z", "x"]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"src_ip": None}, "has no column 'src_ip'.*needs start_ns"),
        ({"start_ns": ["today", "now"]}, "column 'start_ns' is string"),
        ({"dst_ip": [1, 2]}, "column 'dst_ip' is int64, expected strings"),
        ({"dst_port": ["http", "dns"]}, "column 'dst_port' is string"),
    ],
)
def test_a_column_that_is_missing_or_of_the_wrong_type_is_named(
    tmp_path: Path, columns: dict[str, object], sentence: str
) -> None:
    with pytest.raises(SchemaError, match=sentence) as caught:
        FlowFile(write(tmp_path / "flows.parquet", **columns))
    assert "flows.parquet" in str(caught.value)


def test_what_is_no_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.parquet"
    path.write_text("not flows")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        FlowFile(path)
    with pytest.raises(InputError, match="there is no file"):
        FlowFile(tmp_path / "absent.parquet")


@pytest.mark.parametrize(("factor", "unit"), [(1, "seconds"), (10**3, "milliseconds"), (10**6, "microseconds")])
def test_times_in_another_unit_are_refused_by_its_name(tmp_path: Path, factor: int, unit: str) -> None:
    begin = 1_499_000_000
    path = write(tmp_path / "flows.parquet", start_ns=[begin * factor, (begin + 86_400) * factor])
    with pytest.raises(SchemaError, match=f"seems to be in {unit}; .* multiply it by {10**9 // factor:,}"):
        FlowFile(path)
    stamps = pa.array([begin * 10**3, (begin + 86_400) * 10**3], pa.timestamp("ms"))
    known = FlowFile(write(tmp_path / "stamps.parquet", start_ns=stamps))
    assert next(known.batches()).start_ns.tolist() == [begin * SECOND, (begin + 86_400) * SECOND], "it says its unit"
    relative = write(tmp_path / "relative.parquet", start_ns=[0, (begin + 86_400) * factor])
    assert FlowFile(relative).rows == 2, "nanoseconds since something else"
