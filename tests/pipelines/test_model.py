"""Scoring that starts from a model directory: warm, refused where it does not fit, renewed while it runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from flowsage.models.detector import ClosedWindows
from flowsage.models.finding import Finding
from flowsage.pipelines.config import load
from flowsage.pipelines.model import ModelDirectory
from flowsage.pipelines.scorer import Scorer
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.sources import FlowFile, Step
from flowsage.pipelines.train import TrainSettings, train
from tests.pipelines.test_replay import START, flowsage, scan_flows

SECOND = 10**9
WINDOW = 60 * SECOND
MIDDLE = (START // 60 + 70) * WINDOW
"""A window's edge: what the model has learnt ends here, twenty minutes before the scan of `scan_flows`."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load(None, {"model": {"ready_windows": 3, "ready_meetings": 5, "ready_steps": 1}})


def with_model(settings: Settings, path: Path) -> Settings:
    return settings.model_copy(update={"model": settings.model.model_copy(update={"directory": str(path)})})


@pytest.fixture(scope="module")
def flows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scan_flows(tmp_path_factory.mktemp("flows") / "all.parquet")


@pytest.fixture(scope="module")
def early(flows: Path) -> Path:
    table = pq.read_table(flows)
    path = flows.with_name("early.parquet")
    pq.write_table(table.filter(pc.less(table.column("start_ns"), pa.scalar(MIDDLE))), path)
    return path


@pytest.fixture(scope="module")
def model(early: Path, settings: Settings) -> Path:
    torch.set_num_threads(1)
    path = early.with_name("model")
    train((early,), path, settings, TrainSettings(steps=0))
    return path


class Run:
    """A scorer, and all that it said."""

    def __init__(self, settings: Settings) -> None:
        self.findings: list[Finding] = []
        self.scores: dict[int, np.ndarray] = {}
        self.scorer = Scorer(settings, on_findings=self.findings.extend, on_closed=self._closed)

    def _closed(self, closed: ClosedWindows) -> None:
        window = closed.flows.start_ns // WINDOW
        for w in np.unique(window):
            self.scores[int(w)] = closed.scores.flow_score[window == w]

    def step(self, step: Step) -> None:
        self.scorer.take(step.flows, step.watermark_ns)
        self.scorer.step(step.now_ns)

    def balanced(self) -> bool:
        c, buffer = self.scorer.counters, self.scorer.buffer
        return c.consumed == c.scored + c.known + buffer.counters.late + buffer.open_flows()


def steps(path: Path, settings: Settings) -> list[Step]:
    return list(FlowFile(path).steps(settings.windows.pane))


def read(model: ModelDirectory) -> None:
    """Wait for what is read in the background, if it is not there yet."""
    if model._loading is not None:
        model._loading.exception(60)


def test_a_warm_start_scores_as_if_it_had_watched_all_along(flows: Path, model: Path, settings: Settings) -> None:
    cold, warm = Run(settings), Run(with_model(settings, model))
    assert "alarms ready" in warm.scorer.standing()
    for step in steps(flows, settings):
        cold.step(step)
        warm.step(step)
        assert warm.balanced()
    for run in (cold, warm):
        run.scorer.finish()
    assert min(warm.scores) == MIDDLE // WINDOW
    assert warm.scorer.counters.known == sum(len(v) for w, v in cold.scores.items() if w < MIDDLE // WINDOW)
    assert all(np.array_equal(cold.scores[w], scores) for w, scores in warm.scores.items())
    assert warm.findings
    assert warm.findings == cold.findings


def test_a_new_model_is_taken_in_between_panes_and_findings_that_are_open_stay_open(
    flows: Path, early: Path, model: Path, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(model, path)
    run = Run(with_model(settings, path))
    swapped = False
    for step in steps(flows, settings):
        if run.findings and not swapped:
            swapped = True
            before = run.scorer.detector
            train((early,), path, settings, TrainSettings(steps=2))
            assert run.scorer.model is not None
            assert run.scorer.model.renewed(0, None) is None, "it is read in the background"
            read(run.scorer.model)
        run.step(step)
        assert run.balanced()
    assert swapped
    assert run.scorer.model is not None
    assert (run.scorer.model.loads, run.scorer.model.refused) == (2, 0)
    assert run.scorer.detector is not before
    assert before.prior is not None
    assert run.scorer.detector.prior is not None
    assert run.scorer.detector.prior.network.steps != before.prior.network.steps
    (uid,) = {f.uid for f in run.findings}
    assert [e.finding.uid for e in run.scorer.detector.alarms.episodes.open] == [uid]


def test_a_new_model_that_cannot_be_used_leaves_the_old_one_at_work(
    flows: Path, early: Path, model: Path, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model"
    shutil.copytree(model, path)
    run = Run(with_model(settings, path))
    before, panes = run.scorer.detector, steps(flows, settings)
    run.step(panes[0])
    damaged = tmp_path / "damaged"
    train((early,), damaged, settings, TrainSettings(steps=1))
    with (damaged / "history.safetensors").open("r+b") as file:
        file.truncate(1000)
    shutil.rmtree(path)
    run.step(panes[1])
    os.rename(damaged, path)
    run.step(panes[2])
    assert run.scorer.model is not None
    read(run.scorer.model)
    run.step(panes[3])
    assert run.scorer.model.refused == 1
    assert "the new model is not used" in caplog.text
    assert "history.safetensors has 1,000 bytes" in caplog.text
    assert run.scorer.detector is before


def test_a_model_from_the_future_waits_until_the_stream_has_passed_it(
    flows: Path, model: Path, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    path.mkdir()
    run = Run(settings)
    watching = Run(with_model(settings, model)).scorer.model
    assert watching is not None
    watching.go_on_from(None)
    assert watching.renewed(MIDDLE - 1, None) is None
    read(watching)
    assert watching.renewed(MIDDLE - 1, None) is None
    assert watching.renewed(MIDDLE, MIDDLE - 1) is None, "its last window is still open here"
    assert watching.renewed(MIDDLE, MIDDLE) is not None
    assert run.scorer.model is None


def test_the_same_model_put_there_again_is_no_new_one(model: Path, settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(model, path)
    watching = Run(with_model(settings, path)).scorer.model
    assert watching is not None
    before = watching._stamp
    shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copy)
    shutil.rmtree(path)
    os.rename(tmp_path / "copy", path)
    assert watching.renewed(MIDDLE, MIDDLE) is None
    assert watching._stamp != before
    read(watching)
    assert watching.renewed(MIDDLE, MIDDLE) is None
    assert (watching.loads, watching.refused) == (1, 0)


def test_the_command_refuses_another_schema_and_starts_warm_from_its_own(
    flows: Path, model: Path, tmp_path: Path
) -> None:
    ready: dict[str, Any] = {"FLOWSAGE_MODEL__READY_WINDOWS": "3"}
    done = flowsage(
        "replay", flows, "--model", model, "--window", "30s", "--findings", tmp_path / "f.jsonl", code=1, **ready
    )
    assert done.stderr.splitlines()[-1].startswith(
        f"flowsage: {model} was made with windows.window 60s, here it is 30s"
    )
    done = flowsage("replay", flows, "--model", model, "--findings", tmp_path / "f.jsonl", **ready)
    assert "flows before that are not scored" in done.stderr
    assert "1 findings" in done.stderr
