"""Notebooks run from their first cell to their last, on data that the project makes itself."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from flowsage.pipelines.config import load
from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.replay import Outputs, replay
from flowsage.pipelines.topics import anomalies_topic
from tests.broker import Broker
from tests.conftest import ROOT
from tests.pipelines.test_replay import scan_flows

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a day of forty hosts."""
    for name, value in {"HOSTS": "40", "DAYS": "0.5", "STEPS": "10"}.items():
        monkeypatch.setenv(name, value)


def execute(path: Path, folder: Path) -> tuple[str, int]:
    """What it printed, and how many pictures it drew."""
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(o.get("text", "") for o in outputs), sum("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in notebook.cells)


def test_a_model_is_trained_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", str(tmp_path))
    text, pictures = execute(ROOT / "notebooks" / "train.ipynb", tmp_path)
    assert (tmp_path / "model" / "model.safetensors").exists()
    cold, warm = (float(v) for v in re.findall(r"average precision ([\d.]+)", text))
    assert warm > 0.7
    assert warm > cold - 0.05
    assert pictures == 1


def test_hosts_that_play_the_same_part_lie_together_in_the_embeddings(tmp_path: Path) -> None:
    text, pictures = execute(ROOT / "notebooks" / "explore.ipynb", tmp_path)
    found = re.search(r"same part for (\d+)% of (\d+) hosts inside; at random it would for (\d+)%", text)
    assert found, text
    same, hosts, chance = map(int, found.groups())
    assert hosts > 50
    assert 100 - same < (100 - chance) / 2, "half as many neighbours of another kind as at random"
    assert pictures == 2


@pytest.mark.parametrize("source", ["file", "topic"])
def test_findings_are_read_and_drilled_into(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    flows, findings = scan_flows(tmp_path / "flows.parquet", minutes=100), tmp_path / "findings.jsonl"
    replay(flows, load(), Outputs(findings=findings))
    monkeypatch.setenv("FLOWS", str(flows))
    if source == "file":
        monkeypatch.setenv("FINDINGS", str(findings))
    else:
        broker: Broker = request.getfixturevalue("broker")
        prefix = f"notebook-{uuid.uuid4().hex[:8]}"
        topic = broker.create_topic(anomalies_topic(prefix), 2)
        log = KafkaLog(broker.settings())
        for line in findings.read_text().splitlines():
            log.append(topic, b"10.0.0.13", line.encode())
        log.close()
        monkeypatch.setenv("FLOWSAGE_KAFKA__BOOTSTRAP_SERVERS", ",".join(broker.settings().bootstrap_servers))
        monkeypatch.setenv("FLOWSAGE_KAFKA__PREFIX", prefix)
    text, pictures = execute(ROOT / "notebooks" / "findings.ipynb", tmp_path)
    assert re.search(r"\d+ messages about 1 findings", text)
    assert "10.0.0.13 → 10.0.9" in text
    assert re.search(r"\d+ flows from 10.0.0.13 to 10.0.9\S* while it went on", text)
    assert pictures == 2
