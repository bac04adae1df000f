"""The scorer: flows in, scores and findings out. One for the live stream, Kafka, a capture and a file."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flowsage.collector.errors import ConfigurationError
from flowsage.collector.records import FLOW_SCHEMA
from flowsage.graph.flows import FlowBatch, from_table, merge
from flowsage.graph.window import WindowBuffer, in_order
from flowsage.models.alarms import AlarmConfig
from flowsage.models.detector import ClosedWindows, Detector, DetectorConfig
from flowsage.models.finding import Finding
from flowsage.models.history import HistoryConfig
from flowsage.models.meeting_config import MeetingConfig
from flowsage.pipelines.findings import SEVERITIES, version
from flowsage.pipelines.metrics import Value
from flowsage.pipelines.model import ModelDirectory
from flowsage.pipelines.quantities import moment
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.sources import Step, joined, whole_windows

logger = logging.getLogger(__name__)

OnFindings = Callable[[list[Finding]], None]
OnClosed = Callable[[ClosedWindows], None]

PRIORS: dict[str, dict[str, Any]] = {
    "none": {},
    "popularity": {"graph": False},
    "mlp": {"layers": 0, "overlaps": False},
    "sage1": {"layers": 1, "overlaps": False},
    "sage2": {"layers": 2, "overlaps": False},
    "sage2-sketches": {"layers": 2, "overlaps": True},
}
"""What `model.prior` means for the prior of first meetings: each adds one thing to the one before it."""


def detector_config(settings: Settings) -> DetectorConfig:
    """What the models are made with, from the one configuration."""
    if settings.windows.window % settings.windows.pane:
        raise ConfigurationError(
            f"windows.window ({settings.windows.window / 1e9:g}s) is not a whole number of panes "
            f"({settings.windows.pane / 1e9:g}s); choose a pane that divides it"
        )
    return DetectorConfig(
        window_ns=settings.windows.window,
        graph=settings.model.prior != "none",
        history=HistoryConfig(
            undirected=settings.model.undirected,
            max_keys=settings.model.max_keys,
            threads=settings.model.threads,
        ),
        meeting=MeetingConfig(
            **PRIORS[settings.model.prior],
            seed=settings.model.seed,
            max_hosts=settings.model.max_hosts,
            ready_windows=settings.model.ready_windows,
            ready_meetings=settings.model.ready_meetings,
            ready_steps=settings.model.ready_steps,
        ),
        alarms=AlarmConfig(
            pane_ns=settings.windows.pane,
            block_ns=settings.alarms.block,
            budget=settings.alarms.budget,
            settle_ns=settings.alarms.settle,
            time_scale=settings.alarms.time_scale,
            internal=settings.alarms.internal or None,
        ),
    )


@dataclass
class ScorerCounters:
    """What went through, for metrics and the ledger: consumed = scored + known + late + refused + still open."""

    consumed: int = 0
    known: int = 0
    """Not scored, for the model had learnt from them before."""
    scored: int = 0
    windows: int = 0
    panes: int = 0
    findings: int = 0
    pane_seconds: float = 0.0
    window_seconds: float = 0.0


class Scorer:
    """Steps a detector through event time.

    on_findings   called with the findings of each pane that has some
    on_closed     called with each run of closed windows
    clock         Unix time, ns, beyond which no sensor is believed; None: what the flows say is all there is
    detector      one that has learnt already, under the same configuration; None: that of the model directory, if the
                  settings name one, which is watched either way
    terms         whether closed windows come with what history's scores are made of
    testimony     whether findings come with what the graph says of the first meetings in them
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_findings: OnFindings,
        on_closed: OnClosed | None = None,
        clock: Callable[[], int] | None = None,
        detector: Detector | None = None,
        terms: bool = False,
        testimony: bool = True,
    ) -> None:
        self.settings = settings
        config = replace(detector_config(settings), testimony=testimony)
        self.model = ModelDirectory(Path(settings.model.directory), config) if settings.model.directory else None
        self.known_until_ns = -(1 << 62)
        """What begins before it has been learnt by the model."""
        if detector is None and self.model is not None:
            detector, manifest = self.model.load()
            self.known_until_ns = manifest.until_ns
        self.detector = detector or Detector(config)
        windows = settings.windows
        self.buffer = WindowBuffer(
            windows.window,
            windows.lateness,
            clock=clock,
            idle_timeout_ns=windows.idle_timeout,
            max_ahead_ns=windows.max_ahead,
            max_behind_ns=windows.max_behind,
        )
        self.counters = ScorerCounters()
        self.raised: Counter[str] = Counter()
        """Findings raised, by severity."""
        self._on_findings = on_findings
        self._on_closed, self._terms = on_closed, terms
        self._arrived: list[FlowBatch] = []
        self._clocked = clock is not None

    def take(self, flows: FlowBatch, watermark_ns: int, sensor: str = "file") -> FlowBatch:
        """Flows of the pane that is filling; those of the sensor that start before watermark_ns have all been taken.

        Returns those that were not refused (`WindowBuffer.add`).
        """
        self.counters.consumed += len(flows)
        if len(flows) and int(flows.start_ns.min()) < self.known_until_ns:
            flows = self._unknown(flows)
        taken = self.buffer.add(flows, sensor, watermark_ns)
        if len(taken):
            self._arrived.append(taken)
        return taken

    @property
    def pending(self) -> bool:
        """Whether flows wait for the end of their pane."""
        return bool(self._arrived)

    def step(self, now_ns: int) -> None:
        """The pane ends at now_ns: the alarms look at what was taken since the last one, and windows close."""
        self.look(now_ns)
        self.close_windows()

    def run(self, steps: Iterable[Step]) -> Iterator[list[Step]]:
        """`take` and `step` of one sensor's steps, such as a file's; windows that come whole are scored together.

        Tells which steps were done as it goes on.
        """
        plain = self.model is not None or self._clocked or self.settings.windows.lateness > 0
        for some in ([step] for step in steps) if plain else whole_windows(steps, self.settings.windows.window):
            if len(some) == 1:
                self.take(some[0].flows, some[0].watermark_ns)
                self.step(some[0].now_ns)
            else:
                self._whole(some)
            yield some

    def _whole(self, steps: list[Step]) -> None:
        """Steps that are each a whole window, while none is open."""
        started = time.perf_counter()
        flows = joined(step.part for step in steps)
        self.counters.consumed += len(flows)
        taken = self.buffer.add(flows, "file", steps[-1].watermark_ns)
        closed = self.buffer.close_ready()
        assert closed is not None
        assert len(flows) == len(taken) == len(closed)
        found, windows = self.detector.whole(closed, [step.now_ns for step in steps], terms=self._terms)
        self._publish(found)
        self.counters.panes += len(steps)
        self._scored(windows, started)

    def look(self, now_ns: int) -> None:
        """First half of `step`: the alarms look."""
        if self.model is not None:
            self._renew(now_ns, self.model)
        started = time.perf_counter()
        flows = in_order(merge(self._arrived)) if self._arrived else no_flows()
        self._arrived = []
        self._publish(self.detector.pane(now_ns, flows))
        self.counters.panes += 1
        self.counters.pane_seconds += time.perf_counter() - started

    def close_windows(self) -> None:
        """Second half of `step`: windows close, are scored and learnt."""
        self._close(self.buffer.close_ready())

    def finish(self) -> None:
        """The end of the input: whatever is open closes. Findings that go on stay open: nobody saw their end."""
        self._close(self.buffer.flush())

    def _unknown(self, flows: FlowBatch) -> FlowBatch:
        """Those that the model has not learnt from: the others would be nothing new to it."""
        fresh = np.flatnonzero(flows.start_ns >= self.known_until_ns)
        if not self.counters.known:
            until = moment(self.known_until_ns / 1e9)
            logger.warning("the model has learnt everything up to %s; flows before that are not scored", until)
        self.counters.known += len(flows) - len(fresh)
        return flows.take(fresh)

    def _renew(self, now_ns: int, model: ModelDirectory) -> None:
        """Take in a new model, between panes; the findings that are open stay open."""
        renewed = model.renewed(now_ns, self.buffer.oldest_open_ns)
        if renewed is not None:
            episodes = self.detector.alarms.episodes
            self.detector, _ = renewed
            self.detector.alarms.episodes = episodes

    def _publish(self, findings: list[Finding]) -> None:
        if findings:
            new = [SEVERITIES[f.severity].lower() for f in findings if f.activity == "create"]
            self.counters.findings += len(new)
            self.raised.update(new)
            self._on_findings(findings)

    def _close(self, flows: FlowBatch | None) -> None:
        if flows is None or not len(flows):
            return
        started = time.perf_counter()
        self._scored(self.detector.close(flows, terms=self._terms), started)

    def _scored(self, closed: ClosedWindows, started: float) -> None:
        self.counters.scored += len(closed.flows)
        self.counters.windows += len(closed.contacts.windows)
        self.counters.window_seconds += time.perf_counter() - started
        if self._on_closed is not None:
            self._on_closed(closed)

    def standing(self) -> str:
        """Whether graph and alarms are ready, in words."""
        readiness, prior = self.detector.alarms.readiness(), self.detector.prior
        graph = "off" if prior is None else f"not ready: {prior.waiting}" if prior.waiting else "ready"
        return f"graph {graph}; alarms {readiness.reason}"

    def expected(self) -> str:
        """When the alarms are likely to be ready, in words that go after `standing`; empty where that is not known."""
        at = self.detector.alarms.expected_ns
        return f", ready at about {moment(at / 1e9)}" if at else ""


def no_flows() -> FlowBatch:
    """A batch of none."""
    return from_table(FLOW_SCHEMA.empty_table())


def scoring_metrics(scorers: Sequence[Scorer]) -> dict[str, Value]:
    """Windows, history, graph and alarms, for the table of metrics: sums, and of what is ready the least or latest."""
    values: dict[str, Value] = {"flowsage_build": {version(): 1.0}}
    told = [_metrics(scorer) for scorer in scorers]
    for name in dict.fromkeys(n for each in told for n in each):
        parts = [each[name] for each in told if name in each]
        if isinstance(parts[0], Mapping):
            labels = dict.fromkeys(label for part in parts if isinstance(part, Mapping) for label in part)
            values[name] = {k: sum(p.get(k, 0) for p in parts if isinstance(p, Mapping)) for k in labels}
        else:
            numbers = [float(p) for p in parts if not isinstance(p, Mapping)]
            values[name] = (min if name in LEAST else max if name in MOST else sum)(numbers)
    return values


LEAST = {
    "flowsage_watermark_timestamp_seconds", "flowsage_calibration_ready", "flowsage_graph_ready",
    "flowsage_graph_training_loss", "flowsage_graph_mixture_weight", "flowsage_budget_ratio",
}  # fmt: skip
"""Metrics of which several sites have the least of theirs."""
MOST = {"flowsage_calibration_expected_timestamp_seconds"}
"""And the most."""


def _metrics(scorer: Scorer) -> dict[str, Value]:
    counters, buffer, detector = scorer.counters, scorer.buffer, scorer.detector
    alarms = detector.alarms
    values: dict[str, Value] = {
        "flowsage_flows_consumed": counters.consumed,
        "flowsage_flows_scored": counters.scored,
        "flowsage_flows_known": counters.known,
        "flowsage_flows_late": buffer.counters.late,
        "flowsage_flows_refused": buffer.counters.future,
        "flowsage_sensors_left_out": {"silent": buffer.counters.idled, "clock behind": buffer.counters.fell_behind},
        "flowsage_flows_open": buffer.open_flows(),
        "flowsage_windows_closed": counters.windows,
        "flowsage_panes": counters.panes,
        "flowsage_watermark_timestamp_seconds": max(0, buffer.watermark_ns or 0) / 1e9,
        "flowsage_history_keys": detector.history.keys,
        "flowsage_history_evicted": detector.history.evicted,
        "flowsage_calibration_ready": float(alarms.readiness().ready),
        "flowsage_calibration_blocks": alarms.calibration.blocks,
        "flowsage_calibration_blocks_needed": alarms.config.ready_blocks,
        "flowsage_calibration_host_blocks": alarms.calibration.seen,
        "flowsage_calibration_host_blocks_needed": alarms.config.ready_host_blocks,
        "flowsage_calibration_expected_timestamp_seconds": (alarms.expected_ns or 0) / 1e9,
        "flowsage_budget_ratio": alarms.grown,
        "flowsage_findings": dict(scorer.raised),
        "flowsage_findings_open": len(alarms.episodes.open),
    }
    if scorer.model is not None:
        values |= {"flowsage_model_loads": scorer.model.loads, "flowsage_model_refused": scorer.model.refused}
    if detector.prior is not None:
        prior = detector.prior
        values |= {
            "flowsage_graph_hosts": len(prior.memory.hosts),
            "flowsage_graph_ready": float(prior.waiting is None),
            "flowsage_graph_training_steps": prior.network.steps,
            "flowsage_graph_training_loss": prior.loss,
            "flowsage_graph_mixture_weight": prior.trust,
        }
    return values
