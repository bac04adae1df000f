"""Detection on traffic with a truth: a small simulated enterprise, and the labelled files where they are at hand."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowsage.graph.flows import from_table
from flowsage.models.detector import Detector
from flowsage.pipelines.enterprise import ATTACKS, Simulation, simulate
from tests.evaluate import bars, jobs, measures
from tests.evaluate.injections import CONFOUNDERS, Recording, disturb, inject, recording
from tests.evaluate.passes import Scored, score
from tests.models.test_history_reference import load

OFFICE = Simulation(days=1.6, hosts=90, seed=3, repeats=1, quiet=0.55)


@pytest.fixture(scope="module", name="office")
def fixture_office(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame, Scored]:
    path = tmp_path_factory.mktemp("office") / "office.parquet"
    pq.write_table(simulate(OFFICE)[0], path)
    return path, jobs._whole(path), score(path, budgets=(1.0, 10.0), priors=("none",))


def test_attacks_of_a_simulated_office_rank_high(office: tuple[Path, pd.DataFrame, Scored]) -> None:
    _, flows, said = office
    areas = jobs.ranking(flows, said)
    assert areas["flow"].auc > 0.85, areas  # measured: .93
    assert areas["flow"].ap > 3 * areas["flow"].base, areas
    assert areas["host"].ap > 3 * areas["host"].base, areas


def test_findings_keep_to_the_budget_and_name_the_attackers(office: tuple[Path, pd.DataFrame, Scored]) -> None:
    _, flows, said = office
    found = {b: measures.match(flows, said.findings["none", b]) for b in (1.0, 10.0)}
    assert found[10.0].recall >= 0.5, found[10.0]
    assert found[10.0].false_rate <= 20, found[10.0]
    assert found[1.0].false <= found[10.0].false
    for kind in ("fast-scan", "port-scan", "worm", "guessing"):
        n, k, delays = found[10.0].by_kind[kind]
        assert (k, max(delays) < 2) == (n, True), kind


def test_scores_depend_on_the_past_alone(office: tuple[Path, pd.DataFrame, Scored], tmp_path: Path) -> None:
    path, flows, said = office
    table = pq.read_table(path)
    half = len(table) // 2
    pq.write_table(table.slice(0, half), tmp_path / "half.parquet")
    first = score(tmp_path / "half.parquet", budgets=(10.0,), priors=("none",))
    # The last window of the half is cut off in the middle.
    end = int(flows.start_ns.iloc[half]) // measures.MINUTE_NS * measures.MINUTE_NS
    whole = int(np.searchsorted(flows.start_ns.to_numpy(), end))
    assert whole > 0.99 * half
    assert np.array_equal(first.flow_score[:whole], said.flow_score[:whole])
    assert np.array_equal(first.beacon_score[:whole], said.beacon_score[:whole])
    early, later = (s.findings["none", 10.0] for s in (first, said))
    told = ["host", "role", "start_ns", "alarm_ns"]
    same = later[later.alarm_ns <= end][told].merge(early[told], how="left", indicator=True)
    assert (same._merge == "both").all()


def test_the_graph_and_all_it_says_repeats_itself(tmp_path: Path) -> None:
    path = tmp_path / "small.parquet"
    pq.write_table(simulate(Simulation(days=0.5, hosts=60, seed=4, repeats=1, quiet=0.5))[0], path)
    one, other = score(path), score(path)
    tails = one.tails["sage2-sketches"]
    assert np.isfinite(tails).sum() > 50
    assert np.array_equal(tails, other.tails["sage2-sketches"], equal_nan=True)
    key = ("sage2-sketches", 10.0)
    pd.testing.assert_frame_equal(one.findings[key], other.findings[key])


def test_a_million_first_meetings_in_a_window_are_counted_and_stall_nothing() -> None:
    rng = np.random.default_rng(0)
    detector = Detector()
    minute = 60 * 10**9

    def window(w: int, src: np.ndarray, dst: np.ndarray, state: str) -> pa.Table:
        n = len(src)
        names = pa.array([f"10.{k // 65536}.{k // 256 % 256}.{k % 256}" for k in range(4_000)])
        start = w * minute + np.sort(rng.integers(0, minute, n))
        return pa.table(
            {
                "start_ns": start, "end_ns": start,
                "src_ip": pa.DictionaryArray.from_arrays(src.astype(np.int32), names),
                "dst_ip": pa.DictionaryArray.from_arrays(dst.astype(np.int32), names),
                "src_port": np.full(n, 50_000), "dst_port": np.full(n, 445), "proto": np.full(n, 6),
                "packets_fwd": np.full(n, 3), "packets_rev": np.full(n, 2 if state == "SF" else 0),
                "bytes_fwd": np.full(n, 200), "bytes_rev": np.full(n, 300 if state == "SF" else 0),
                "state": [state] * n,
            }
        )  # fmt: skip

    def play(table: pa.Table, w: int) -> int:
        flows = from_table(table)
        told = detector.pane((w + 1) * minute, flows)
        detector.close(flows)
        return len(told)

    for w in range(40):
        play(window(w, rng.integers(0, 200, 400), rng.integers(200, 220, 400), "SF"), w)
    src, dst = (v.ravel() for v in np.meshgrid(np.arange(1_000), np.arange(2_000, 3_000)))
    flood = window(40, src, dst, "S0")
    started = time.process_time()
    play(flood, 40)
    assert time.process_time() - started < 40  # measured: 6 s
    assert detector.alarms.contacts_seen >= 1_000_000
    started = time.process_time()
    play(window(41, rng.integers(0, 200, 400), rng.integers(200, 220, 400), "SF"), 41)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", ["westermo", "dapt2020", "iot23_34_1", "ctu_sme11", "ctu50_sensors"])
def test_a_labelled_file_reaches_its_floor(shared: Path, name: str) -> None:
    areas = jobs.file(shared / "data", name)
    for what, bar in (("flow", bars.FLOW[name][0]), ("host", bars.HOST[name][0])):
        assert areas[what].auc >= bar[0] - 5e-4, (what, areas[what])
        assert areas[what].ap >= bar[1] - 5e-4, (what, areas[what])


def test_the_measures_are_those_of_the_programs_beside_the_checkout(shared: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        detection = load(shared / "tools" / "evaluate_detection.py", tmp_path, patch)
        findings = load(shared / "tools" / "evaluate_findings.py", tmp_path, patch)
    path = shared / "data" / "ctu_sme11.parquet"
    flows, said = pd.read_parquet(path), score(path, priors=("none",))
    hosts = said.hosts.assign(alert=False)
    theirs, ours = detection.evaluate(flows, said.flow_score, hosts), jobs.ranking(flows, said)
    assert (ours["flow"].auc, ours["flow"].ap) == pytest.approx((theirs["flow_late"]["auc"], theirs["flow_late"]["ap"]))
    cell = theirs["host_window_late"]
    assert (ours["host"].auc, ours["host"].ap) == pytest.approx((cell["auc"], cell["ap"]))
    assert measures.macro_auc(flows, said.flow_score) == pytest.approx(theirs["macro_attack_auc"])
    told = said.findings["none", 10.0]
    judged, own = findings.evaluate(flows, told), measures.match(flows, told)
    assert (own.false, own.found, own.incidents) == (judged["false"], judged["found"], judged["incidents"])
    assert own.host_days == pytest.approx(judged["host_days"])


@pytest.fixture(scope="module", name="recorded")
def fixture_recorded(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    path = tmp_path_factory.mktemp("recorded") / "r.parquet"
    pq.write_table(simulate(Simulation(days=1, hosts=60, seed=7, repeats=0))[0], path)
    return recording(path)


def test_injections_find_a_place_and_are_in_order(recorded: Recording) -> None:
    kinds = list(ATTACKS)
    table, left = inject(recorded, kinds, 1)
    assert not left
    start = table.column("start_ns").to_numpy()
    assert (np.diff(start) >= 0).all()
    assert table.column_names == recorded.table.column_names
    assert {a.partition("#")[0] for a in table.column("attack").to_pylist() if a} == set(kinds)
    cases = measures.incidents(table.to_pandas())
    assert len(cases) == len(kinds)


@pytest.mark.parametrize("name", list(CONFOUNDERS))
def test_a_harmless_disturbance_adds_flows_and_no_label(recorded: Recording, name: str) -> None:
    table, begin, end = disturb(recorded, name, 0)
    assert recorded.begin_ns < begin <= end
    assert len(table) > len(recorded.table)
    assert sum(table.column("label").to_pylist()) == 0
