"""The whole of FlowSAGE on real hosts: ten quiet minutes, then six misbehaviours, live; and the same flows again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flowsage.pipelines.lab import Truth, read_truth

SECOND = 10**9
QUIET_S = 600
SCHEDULE = {"scan": 600, "worm": 630, "guess": 660, "exfil": 695, "slow-scan": 715, "beacon": 745}
DURATION_S = 845
COMMAND = [sys.executable, "-m", "flowsage.pipelines.cli"]
PORT = 19436


@dataclass(frozen=True)
class Played:
    """What a run of the lab printed, what it says of itself while it ran, and what really happened."""

    findings: list[dict[str, Any]]
    messages: str
    status: str
    truths: dict[str, Truth]
    began_ns: int


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    folder = tmp_path_factory.mktemp("lab")
    attacks = [word for name, at in SCHEDULE.items() for word in ("--attack", f"{at}:{name}")]
    began_ns = time.time_ns()
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        run = [*COMMAND, "run", "--lab", "--duration", str(DURATION_S), "--metrics-port", str(PORT), *attacks]
        process = subprocess.Popen(run, stdout=out, stderr=err)
        try:
            time.sleep(60)
            status = subprocess.run(
                [*COMMAND, "status", "--port", str(PORT)], capture_output=True, text=True, check=False
            )
            assert process.wait(DURATION_S + 60) == 0, (folder / "err").read_text()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30)
    messages = (folder / "err").read_text()
    truth_path = re.search(r"truth in (\S+)", messages)
    assert truth_path, messages
    truths = {truth.attack: truth for truth in read_truth(Path(truth_path[1]))}
    findings = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    yield Played(findings, messages, status.stdout + status.stderr, truths, began_ns)
    Path(truth_path[1]).unlink()


def deadline_ns(truth: Truth) -> int:
    """By when it has to be raised: 60 s, the slow scan by its tenth target, the beacon by its twentieth beat."""
    by_step = {"slow-scan": truth.nth_target_ns(10), "beacon": truth.nth_step_ns(20)}
    if truth.attack in by_step:
        reached = by_step[truth.attack]
        assert reached is not None, f"{truth.attack} ended early: {truth}"
        return reached
    return truth.start_ns + 60 * SECOND


def raised_in_time(findings: list[dict[str, Any]], truth: Truth) -> bool:
    # A pane is a second, and a record can follow its packets by the half-open timeout and a sweep.
    return any(
        f["activity_id"] in (1, 2)
        and f["observables"][0]["value"] == truth.address
        and truth.start_ns <= f["time"] * 10**6 <= deadline_ns(truth) + 3 * SECOND
        for f in findings
    )


def test_ten_quiet_minutes_raise_at_most_one_host(played: Played) -> None:
    first = min(truth.start_ns for truth in played.truths.values())
    assert first - played.began_ns >= QUIET_S * SECOND
    raised = [f for f in played.findings if f["activity_id"] == 1 and f["time"] * 10**6 < first]
    hosts = {f["observables"][0]["value"] for f in raised}
    assert len(hosts) <= 1, [f["message"] for f in raised]


def test_at_least_five_of_six_misbehaviours_are_raised_in_time_naming_the_right_host(played: Played) -> None:
    assert set(played.truths) == set(SCHEDULE)
    missed = [name for name, truth in played.truths.items() if not raised_in_time(played.findings, truth)]
    assert len(missed) <= 1, (missed, [(f["time"], f["activity_name"], f["message"]) for f in played.findings])


def test_the_scan_is_explained_by_its_failed_connections(played: Played) -> None:
    scan = played.truths["scan"]
    mine = [f for f in played.findings if f["observables"][0]["value"] == scan.address and f["activity_id"] < 3]
    mine = [f for f in mine if f["time"] * 10**6 >= scan.start_ns]
    targets = {e["dst_endpoint"]["ip"] for f in mine for e in f["evidences"]}
    assert targets
    assert targets <= set(scan.targets)


def test_the_ledger_closes_and_the_graph_has_learnt(played: Played) -> None:
    assert "the ledger closes" in played.messages.splitlines()[-1]
    assert "NOT" not in played.messages.splitlines()[-1]
    assert "graph ready" in played.messages


def test_status_of_the_running_process_is_a_screen(played: Played) -> None:
    assert "closes exactly" in played.status
    assert "on 21 of 21 interfaces" in played.status
    assert "windows" in played.status


def test_nothing_is_left_behind(played: Played) -> None:
    assert played.findings is not None
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert "fslab" not in left


def test_the_same_recorded_flows_give_the_same_findings_byte_for_byte(tmp_path: Path) -> None:
    flows, config = tmp_path / "lab.parquet", tmp_path / "lab.toml"
    with config.open("w") as file:
        subprocess.run([*COMMAND, "run", "--lab", "--show-config"], stdout=file, check=True)
    record = [*COMMAND, "lab", "--duration", "65", "--attack", "45:scan", "--flows", str(flows)]
    subprocess.run(record, check=True, capture_output=True)
    table = pq.read_table(flows)
    assert 500 < sum(table.column("label").to_pylist()) < len(table)
    outputs = []
    for name in ("a", "b"):
        out = tmp_path / name
        subprocess.run([*COMMAND, "replay", str(flows), "--config", str(config), "--findings", str(out)], check=True)
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]
    attackers = {r["src_ip"] for r in table.select(["src_ip", "label"]).to_pylist() if r["label"]}
    raised = {json.loads(line)["observables"][0]["value"] for line in outputs[0].splitlines()}
    assert raised & attackers
