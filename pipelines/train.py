"""`flowsage train`: flows in, a model directory out.

First the stream: flows go through the very code of the live scorer, once, in time order, so history, graph and alarms
learn as they would have learnt by watching. Then rehearsal: the graph's prior trains on what it remembers, on one
process or several (`models/training.py`, `world.py`).

Now and then, at moments that the flows and the settings alone decide, what has been learnt is put beside the model's
place. Who was interrupted starts the same command again: it goes on from there, and ends with the same bytes.
"""

from __future__ import annotations

import heapq
import itertools
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from flowsage.collector.errors import ModelError, UsageError
from flowsage.graph.addresses import Internal
from flowsage.graph.flows import merge
from flowsage.graph.window import in_order
from flowsage.models import artifact
from flowsage.models.detector import Detector
from flowsage.models.meeting import MeetingPrior
from flowsage.models.training import VIEW_STEPS, Rehearsal, RehearsalConfig
from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.scorer import Scorer, detector_config
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.sources import FlowFile, Part, Step, with_watermarks
from flowsage.pipelines.topic_flows import copy_range
from flowsage.pipelines.topics import flows_topic
from flowsage.pipelines.world import World

CHECKPOINT_FLOWS = 1 << 18
"""After so many flows a checkpoint is due, at the next moment when no window is open."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Of the training itself: what does not show in how the model is used."""

    steps: int = 200
    batches: int = 4
    device: str = "auto"
    checkpoint_flows: int = CHECKPOINT_FLOWS
    restart: bool = False
    begin_ns: int | None = None
    end_ns: int | None = None
    partition: int | None = None
    """The time range [begin_ns, end_ns) of the flows' topic (and the partition, None: all) that is learnt from."""


def checkpoint_of(model: Path) -> Path:
    """Where the checkpoints of a training of `model` are."""
    return model.with_name(f".{model.name}.training")


def interrupted(model: Path, training: TrainSettings) -> str:
    """What somebody who interrupts a training of `model` has to know."""
    if checkpoint_of(model).exists():
        return "interrupted; the same command goes on from the last checkpoint"
    every = f"there is one every {training.checkpoint_flows:,} flows (--checkpoint)"
    return f"interrupted before the first checkpoint, so the same command begins anew; {every}"


@dataclass
class Progress:
    """How far a training has come; saved with a checkpoint."""

    flows: int = 0
    now_ns: int = 0
    windows: int = 0
    first_ns: int = 0
    steps: int = 0
    read: bool = False
    """Whether all flows have been read."""


def train(paths: tuple[Path, ...], model: Path, settings: Settings, training: TrainSettings) -> None:
    """Train on flow files, or on a time range of the flows' topic, and write the model directory `model`.

    In a world of several processes every one calls this.

    Raises InputError and SchemaError of the files, ModelError where the model cannot be written or what is left of an
    earlier training does not fit, UsageError where there is nothing to read.
    """
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"directory": ""})})
    # The same bytes on any machine; who has more cores starts more processes, which share the batches of a step.
    torch.set_num_threads(1)
    with World() as world:
        device = world.device(training.device)
        lead = _Lead(paths, model, settings, training) if world.leads else None
        if lead is not None:
            lead.read()
        config = detector_config(settings)
        if config.graph and config.meeting.graph:
            _rehearse(world, device, lead, settings, training)
        if lead is not None:
            lead.write()


def _rehearse(world: World, device: Any, lead: _Lead | None, settings: Settings, training: TrainSettings) -> None:
    """The steps that are left, at every process; the one that leads writes checkpoints."""
    config = detector_config(settings)
    if lead is not None:
        assert lead.detector.prior is not None
        prior = lead.detector.prior
        state = prior.state() | {"done": _number(lead.progress.steps)}
    else:
        prior, state = MeetingPrior(config.meeting, Internal()), None
    shared = world.share(state)
    if lead is None:
        prior.restore(shared)
    rehearsal = Rehearsal(
        prior,
        RehearsalConfig(steps=training.steps, batches=training.batches, seed=settings.model.seed),
        rank=world.rank, world=world.size, gather=world.gather, device=device, done=int(shared["done"]),
    )  # fmt: skip
    left = training.steps - rehearsal.done
    where = f"{world.size} processes, {device.type}" if world.size > 1 else str(device.type)
    with _bar(lead is not None, left, f"rehearsal ({where})") as tick:
        while not rehearsal.finished:
            rehearsal.step()
            tick(1)
            if lead is not None and rehearsal.done % VIEW_STEPS == 0 and not rehearsal.finished:
                lead.progress.steps = rehearsal.done
                lead.checkpoint()
    if lead is not None:
        lead.progress.steps = rehearsal.done
        loss = f", loss {prior.loss:.3f} nats a meeting"
        if math.isnan(prior.loss):
            loss = ": too few first meetings are remembered to learn from" if rehearsal.done else ""
        click.echo(f"{rehearsal.done} steps of rehearsal{loss}", err=True)


def _number(value: int) -> Any:
    import numpy as np

    return np.array(value)


class _Lead:
    """The process that reads the flows and writes the model."""

    def __init__(self, paths: tuple[Path, ...], model: Path, settings: Settings, training: TrainSettings) -> None:
        self.model, self.settings, self.training = model, settings, training
        _require_room(model)
        span = f"{training.begin_ns}-{training.end_ns or 'now'}-{training.partition}"
        self.copy = model.with_name(f".{model.name}.{span}.parquet")
        if training.begin_ns is not None:
            paths = (*paths, self._from_topic(training.begin_ns))
        self.files = [FlowFile(path, undirected=settings.model.undirected) for path in paths]
        self.rows = sum(file.rows for file in self.files)
        if not self.rows:
            raise UsageError("there are no flows to learn from; name files that hold some")
        self.beside = checkpoint_of(model)
        self.config = detector_config(settings)
        self.detector, self.progress = self._begin()

    def _from_topic(self, begin_ns: int) -> Path:
        """The flows of the topic as a file beside the model, which an interrupted training finds there again."""
        training, kafka = self.training, self.settings.kafka
        end_ns = training.end_ns if training.end_ns is not None else time.time_ns()
        if self.copy.exists() and not training.restart:
            return self.copy
        log = KafkaLog(kafka)
        try:
            topic = flows_topic(kafka.prefix)
            copied = copy_range(log, topic, self.copy, begin_ns, end_ns, partition=training.partition)
        finally:
            log.close()
        left_out = f", {copied.repeats} repeated and {copied.unreadable} unreadable batches left out"
        said = left_out if copied.repeats or copied.unreadable else ""
        click.echo(f"{topic}: {copied.flows:,} flows in {copied.batches:,} batches{said}", err=True)
        return self.copy

    def _made_of(self) -> dict[str, Any]:
        """What must be the same for a training to go on."""
        counts = ("steps", "batches", "checkpoint_flows", "begin_ns", "end_ns", "partition")
        steps = {k: v for k, v in asdict(self.training).items() if k in counts}
        files = [[file.path.name, file.path.stat().st_size, file.rows] for file in self.files]
        return {"files": files, "seed": self.settings.model.seed, "pane": self.settings.windows.pane} | steps

    def _begin(self) -> tuple[Detector, Progress]:
        """From the start, or from where an earlier training was interrupted."""
        if self.training.restart or not self.beside.exists():
            shutil.rmtree(self.beside, ignore_errors=True)
            return Detector(self.config), Progress()
        try:
            detector, manifest = artifact.load(self.beside, self.config)
            if manifest.trained["made_of"] != self._made_of():
                raise ModelError(f"{self.beside} is of other flows or settings")
        except ModelError as e:
            raise ModelError(f"an interrupted training cannot go on: {e}; --restart begins anew") from e
        progress = Progress(**manifest.trained["progress"])
        click.echo(f"going on after {progress.flows:,} flows and {progress.steps} steps of rehearsal", err=True)
        return detector, progress

    def checkpoint(self) -> None:
        """Put down what has been learnt, so that whoever is interrupted goes on from here."""
        trained = {"until_ns": self.progress.now_ns, "made_of": self._made_of(), "progress": asdict(self.progress)}
        artifact.save(self.beside, self.detector, trained=trained)

    def read(self) -> None:
        """The stream: every flow that was not read before the interrupt."""
        progress = self.progress
        if progress.read:
            return
        scorer = Scorer(self.settings, on_findings=lambda _: None, detector=self.detector)
        windows, saved = progress.windows, progress.flows
        with _bar(True, self.rows, "reading flows", done=progress.flows) as tick:
            begin_ns = progress.now_ns
            for done in scorer.run(step for step in self._steps() if step.now_ns > begin_ns):
                if not progress.first_ns:
                    progress.first_ns = int(done[0].flows.start_ns[0])
                flows = sum(len(step.flows) for step in done)
                progress.flows += flows
                progress.now_ns, progress.windows = done[-1].now_ns, windows + scorer.counters.windows
                tick(flows)
                if progress.flows - saved >= self.training.checkpoint_flows and not scorer.buffer.open_flows():
                    self.checkpoint()
                    saved = progress.flows
        scorer.finish()
        progress.windows, progress.read = windows + scorer.counters.windows, True
        window = self.settings.windows.window
        progress.now_ns = -(-progress.now_ns // window) * window
        self.checkpoint()
        click.echo(f"{progress.flows:,} flows in {progress.windows:,} windows; {scorer.standing()}", err=True)

    def _steps(self) -> Iterator[Step]:
        """The panes of all files together, in time order."""
        pane = self.settings.windows.pane
        merged = heapq.merge(*(file.steps(pane) for file in self.files), key=lambda step: step.now_ns)
        together = itertools.groupby(merged, key=lambda step: step.now_ns)
        return with_watermarks(
            (now, Part.whole(in_order(merge([part.flows for part in parts])))) for now, parts in together
        )

    def write(self) -> None:
        """The model, in its place; the checkpoint goes."""
        progress = self.progress
        trained = {
            "first_ns": progress.first_ns, "until_ns": progress.now_ns, "flows": progress.flows,
            "windows": progress.windows, "rehearsal_steps": progress.steps,
            "files": [file.path.name for file in self.files if file.path != self.copy],
        }  # fmt: skip
        if self.training.begin_ns is not None:
            trained["topic"] = flows_topic(self.settings.kafka.prefix)
        artifact.save(self.model, self.detector, trained=trained)
        shutil.rmtree(self.beside, ignore_errors=True)
        self.copy.unlink(missing_ok=True)
        click.echo(f"wrote {self.model}; try `flowsage run --model {self.model} …`", err=True)


def _require_room(model: Path) -> None:
    """Raises ModelError where no model directory can be made: now, rather than after an hour of learning."""
    parent = model.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as e:
        raise ModelError(f"cannot write the model {model}: {e.strerror}; name another --output") from e


def _bar(shown: bool, length: int, label: str, done: int = 0) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar on stderr, as a function that moves it on."""
    if not shown:
        return nullcontext(lambda _: None)
    return _Bar(click.progressbar(length=length, label=label, file=sys.stderr, show_pos=True), done)


class _Bar(AbstractContextManager[Callable[[int], None]]):
    def __init__(self, bar: Any, done: int) -> None:
        self._bar, self._done = bar, done

    def __enter__(self) -> Callable[[int], None]:
        bar = self._bar.__enter__()
        bar.update(self._done)
        update: Callable[[int], None] = bar.update
        return update

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)
