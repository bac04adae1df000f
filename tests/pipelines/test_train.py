"""`flowsage train`: from flows to a model directory, whatever happens in between, on one process or two."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flowsage.collector.errors import FlowsageError, InputError, ModelError
from flowsage.models import artifact
from flowsage.pipelines import train as training
from flowsage.pipelines.config import load
from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.memory_log import MemoryLog
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.site import read_columns
from flowsage.pipelines.topic_flows import copy_range
from flowsage.pipelines.topics import flows_topic
from flowsage.pipelines.train import TrainSettings, train
from flowsage.pipelines.world import World
from tests.broker import Broker
from tests.models.alarm_streams import START
from tests.pipelines.flow_stream import stream
from tests.pipelines.test_replay import flowsage, scan_flows

SECOND = 10**9

FLAGS = {"model": {"ready_windows": 3, "ready_meetings": 5, "ready_steps": 1}}
SMALL = TrainSettings(steps=40, batches=3, checkpoint_flows=300, device="cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load(None, FLAGS)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An office for 50 minutes, in two files that meet in the middle of a window."""
    folder = tmp_path_factory.mktemp("flows")
    table = pq.read_table(scan_flows(folder / "all.parquet", minutes=50))
    paths = folder / "one.parquet", folder / "two.parquet"
    pq.write_table(table.slice(0, 600), paths[0])
    pq.write_table(table.slice(600), paths[1])
    return paths


@pytest.fixture(scope="module")
def model(files: tuple[Path, Path], settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("models") / "model"
    train(files, path, settings, SMALL)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_a_model_says_what_it_was_made_of(model: Path, files: tuple[Path, Path]) -> None:
    config = json.loads((model / "config.json").read_text())
    rows = sum(pq.read_metadata(f).num_rows for f in files)
    assert config["trained"]["flows"] == rows
    assert config["trained"]["files"] == ["one.parquet", "two.parquet"]
    assert config["trained"]["rehearsal_steps"] == SMALL.steps
    assert config["trained"]["windows"] == 50
    last = pq.read_table(files[1]).column("start_ns").to_numpy().max()
    assert 0 <= config["trained"]["until_ns"] - last <= 60 * 10**9
    assert [p.name for p in model.parent.iterdir()] == ["model"], "the checkpoint is gone"


def test_the_order_in_which_files_are_named_changes_nothing_that_was_learnt(
    model: Path, files: tuple[Path, Path], settings: Settings, tmp_path: Path
) -> None:
    train(files[::-1], tmp_path / "other", settings, SMALL)
    same = ("model.safetensors", "history.safetensors", "calibration.safetensors")
    assert {k: v for k, v in contents(tmp_path / "other").items() if k in same} == {
        k: v for k, v in contents(model).items() if k in same
    }


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_training_that_was_interrupted_ends_with_the_same_bytes(
    after: int,
    model: Path,
    files: tuple[Path, Path],
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted while it reads (after checkpoints 1 and 2) and while it rehearses (after the fifth)."""
    real, count = artifact.save, 0

    def interrupted(path: Path, *args: Any, **more: Any) -> Any:
        nonlocal count
        manifest = real(path, *args, **more)
        count += 1
        if count == after:
            raise KeyboardInterrupt
        return manifest

    target = tmp_path / "model"
    assert "before the first checkpoint, so the same command begins anew" in training.interrupted(target, SMALL)
    monkeypatch.setattr(artifact, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(files, target, settings, SMALL)
    assert not target.exists()
    assert training.interrupted(target, SMALL) == "interrupted; the same command goes on from the last checkpoint"
    train(files, target, settings, SMALL)
    assert contents(target) == contents(model)
    assert count > after


def test_what_is_left_of_another_training_is_refused_until_told_to_begin_anew(
    files: tuple[Path, Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    monkeypatch.setattr(training._Lead, "write", lambda _: None)
    train(files, target, settings, TrainSettings(steps=0))
    with pytest.raises(ModelError, match=r"is of other flows or settings; --restart begins anew"):
        train(files[:1], target, settings, TrainSettings(steps=0))
    monkeypatch.undo()
    train(files[:1], target, settings, TrainSettings(steps=0, restart=True))
    assert artifact.read_manifest(target).trained["files"] == ["one.parquet"]


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_read(
    files: tuple[Path, Path], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training._Lead, "read", lambda _: pytest.fail("it has begun to read"))
    with pytest.raises(ModelError, match=r"cannot write the model /proc/absent/model: .*; name another --output"):
        train(files, Path("/proc/absent/model"), settings, SMALL)


def test_two_processes_train_the_model_that_one_trains(model: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    options = ["--steps", SMALL.steps, "--batches", SMALL.batches, "--checkpoint", SMALL.checkpoint_flows]
    environment = {f"FLOWSAGE_MODEL__{k.upper()}": str(v) for k, v in FLAGS["model"].items()}
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "flowsage.pipelines.cli", "train", *map(str, files), "--output", str(tmp_path / "two"),
            "--device", "cpu", *map(str, options),
        ],
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    assert contents(tmp_path / "two") == contents(model)


def test_a_device_that_is_not_there_is_refused_in_a_sentence() -> None:
    with pytest.raises(FlowsageError, match="the device 'cuda:99' cannot be used"):
        World().device("cuda:99")
    assert World().device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_time_range_of_the_topic_trains_the_model_that_its_flows_as_a_file_train(
    settings: Settings, broker: Broker, tmp_path: Path
) -> None:
    prefix = f"train-{uuid.uuid4().hex[:8]}"
    topic = broker.create_topic(flows_topic(prefix), 2)
    batches = stream(60.0, sensors=("edge", "core"))
    log = KafkaLog(broker.settings())
    for batch in [*batches, batches[5]]:
        log.append(topic, batch.origin.sensor.encode(), batch.value)
    log.append(topic, b"edge", b"no Arrow")
    log.close()
    begin, end = START + 12 * SECOND, START + 48 * SECOND
    tables = [read_columns(b.value).replace_schema_metadata(None) for b in batches if b.flows]
    table = pa.concat_tables(tables, promote_options="default")
    start = table.column("start_ns").to_numpy()
    file = tmp_path / "flows.parquet"
    pq.write_table(table.filter(pa.array((start >= begin) & (start < end))).sort_by("start_ns"), file)
    flags = FLAGS | {"windows": {"window": "6s", "pane": "1s"}, "alarms": {"time_scale": 60.0}}
    flags |= {"kafka": {"bootstrap_servers": broker.settings().bootstrap_servers, "prefix": prefix}}
    both = load(None, flags)
    train((file,), tmp_path / "from-file", both, SMALL)
    train((), tmp_path / "from-topic", both, dataclasses.replace(SMALL, begin_ns=begin, end_ns=end))
    one, other = contents(tmp_path / "from-file"), contents(tmp_path / "from-topic")
    assert one["model.safetensors"] == other["model.safetensors"]
    trained = json.loads(other["config.json"])["trained"]
    assert trained["topic"] == topic
    assert trained["flows"] == json.loads(one["config.json"])["trained"]["flows"]
    assert {p.name for p in tmp_path.iterdir()} == {"flows.parquet", "from-file", "from-topic"}


def test_a_range_without_flows_and_nothing_at_all_are_refused(settings: Settings, tmp_path: Path) -> None:
    log = MemoryLog()
    log.append("t.flows.v1", b"edge", stream(2.0)[0].value)
    with pytest.raises(
        InputError, match=r"t\.flows\.v1 has no flows from 1970-01-01T00:00:00 to 1970-01-01T00:00:01 UTC"
    ):
        copy_range(log, "t.flows.v1", tmp_path / "f.parquet", 0, SECOND)
    with pytest.raises(InputError, match="has no partition 7"):
        copy_range(log, "t.flows.v1", tmp_path / "f.parquet", 0, SECOND, partition=7)
    assert list(tmp_path.iterdir()) == []
    assert "name what to learn from" in flowsage("train", "-o", tmp_path / "m", code=2).stderr
    assert "name a broker" in flowsage("train", "-o", tmp_path / "m", "--from", "2026-01-05", code=2).stderr
