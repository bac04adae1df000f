"""The simulated enterprise: deterministic, shaped as flow files are, with its truth."""

import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from flowsage.collector.errors import ConfigurationError
from flowsage.graph.flows import from_table
from flowsage.pipelines.cli import main
from flowsage.pipelines.enterprise import ATTACKS, Simulation, simulate
from flowsage.pipelines.lab.truth import read_truth

DAY_NS = 86_400 * 10**9


def test_a_simulation_is_a_flow_file_in_order_of_time_and_the_same_each_time() -> None:
    settings = Simulation(days=1, hosts=60, seed=5, repeats=1)
    table, truths = simulate(settings)
    again, _ = simulate(settings)
    other, _ = simulate(Simulation(days=1, hosts=60, seed=6, repeats=1))
    assert table.equals(again)
    assert not table.equals(other)
    assert table.column_names == [
        "start_ns", "end_ns", "src_ip", "dst_ip", "src_port", "dst_port", "proto", "packets_fwd", "packets_rev",
        "bytes_fwd", "bytes_rev", "state", "sensor", "label", "attack",
    ]  # fmt: skip
    start = table.column("start_ns").to_numpy()
    assert (np.diff(start) >= 0).all()
    assert start[-1] - start[0] < DAY_NS
    flows = from_table(table)
    assert flows.told.all()
    assert 0.001 < flows.failed[table.column("label").to_numpy() == 0].mean() < 0.05
    assert {t.attack for t in truths} == set(ATTACKS)


def test_the_truth_and_the_labels_say_the_same() -> None:
    table, truths = simulate(Simulation(days=2, hosts=80, seed=1))
    label, attack = table.column("label").to_numpy(), table.column("attack").to_pylist()
    assert all((a is not None) == bool(y) for a, y in zip(attack, label, strict=True))
    rows = Counter(a for a in attack if a)
    assert rows == {t.id: len(t.steps) for t in truths}
    assert all(t.start_ns <= s.time_ns <= (t.end_ns or 0) for t in truths for s in t.steps)
    sources = table.column("src_ip").to_pylist()
    for truth in truths:
        mine = {s for s, a in zip(sources, attack, strict=True) if a == truth.id}
        assert truth.address in mine
        assert len(mine) == truth.parameters["sources"]
        assert len(mine) == 1 or truth.attack in ("worm", "distributed-flood")


def test_people_work_by_day_and_new_ones_join() -> None:
    table, _ = simulate(Simulation(days=2, hosts=80, repeats=0))
    people = np.array([not s.startswith(("10.0.", "198.")) for s in table.column("src_ip").to_pylist()])
    hour = (table.column("start_ns").to_numpy() - table.column("start_ns")[0].as_py()) // (3_600 * 10**9) % 24
    by_hour = np.bincount(hour[people], minlength=24)
    assert by_hour[9:16].min() > 2 * by_hour[:5].max()
    first: dict[str, int] = {}
    for source, start in zip(table.column("src_ip").to_pylist(), table.column("start_ns").to_pylist(), strict=True):
        first.setdefault(source, start)
    late = sum(t > table.column("start_ns")[0].as_py() + DAY_NS for s, t in first.items() if s.startswith("10."))
    assert late >= 1
    assert sum(table.column("label").to_pylist()) == 0


def test_the_week_is_that_of_the_day_it_starts_on(tmp_path: Path) -> None:
    out = tmp_path / "e.parquet"
    arguments = ["lab", "--simulate", str(out), "--days", "3", "--hosts", "40", "--repeats", "0"]
    assert CliRunner().invoke(main, [*arguments, "--start", "2026-02-28"]).exit_code == 0  # a Saturday
    table = pq.read_table(out)
    start = table.column("start_ns").to_numpy()
    assert datetime.fromtimestamp(start[0] / 1e9, UTC).strftime("%Y-%m-%d %H") == "2026-02-28 00"
    people = np.array([s.startswith("10.1.") for s in table.column("src_ip").to_pylist()])
    by_day = np.bincount((start[people] - start[0]) // DAY_NS, minlength=3)
    assert by_day[2] > 2 * by_day[:2].max()
    assert CliRunner().invoke(main, [*arguments, "--start", "Saturday"]).exit_code == 2
    assert CliRunner().invoke(main, ["lab", "--start", "2026-02-28"]).exit_code == 2


def test_the_command_writes_flows_and_truth(tmp_path: Path) -> None:
    out, truth = tmp_path / "e.parquet", tmp_path / "e.jsonl"
    arguments = ["lab", "--simulate", str(out), "--days", "0.5", "--hosts", "60", "--seed", "2", "--truth", str(truth)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    rows = pq.read_table(out)
    assert len(rows) > 5_000
    assert sum(len(t.steps) for t in read_truth(truth)) == sum(rows.column("label").to_pylist())
    refused = CliRunner().invoke(main, ["lab", "--simulate", str(out), "--attack", "5:scan"])
    assert refused.exit_code == 2


def test_the_command_needs_no_model(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(numba=None, torch=None); from flowsage.pipelines.cli import main; "
        f"main(['lab', '--simulate', {str(tmp_path / 'e.parquet')!r}, '--days', '0.2', '--hosts', '40'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(pq.read_table(tmp_path / "e.parquet")) > 1_000


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="hosts at least 40"):
        Simulation(hosts=3)
    with pytest.raises(ConfigurationError, match="no attack is called 'nonsense'"):
        Simulation(attacks=("nonsense",))
