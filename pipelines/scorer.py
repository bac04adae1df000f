"""The scorer: flows in, scores and findings out. One loop for the live stream, a capture and a file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flowsage.collector.errors import ConfigurationError
from flowsage.graph.flows import FlowBatch
from flowsage.graph.window import WindowBuffer, in_order
from flowsage.models.alarms import AlarmConfig
from flowsage.models.detector import ClosedWindows, Detector, DetectorConfig
from flowsage.models.explain import Finding
from flowsage.models.history import HistoryConfig
from flowsage.models.meeting import MeetingConfig
from flowsage.pipelines.config import Settings
from flowsage.pipelines.findings import SEVERITIES, version
from flowsage.pipelines.metrics import Value

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
            time_scale=settings.alarms.time_scale,
            internal=settings.alarms.internal or None,
        ),
    )


@dataclass
class ScorerCounters:
    """What went through, for metrics and the ledger: consumed = scored + late + still open."""

    consumed: int = 0
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
    """

    def __init__(self, settings: Settings, *, on_findings: OnFindings, on_closed: OnClosed | None = None) -> None:
        self.settings = settings
        self.detector = Detector(detector_config(settings))
        self.buffer = WindowBuffer(settings.windows.window, 0, settings.windows.lateness)
        self.counters = ScorerCounters()
        self.raised: Counter[str] = Counter()
        """Findings raised, by severity."""
        self._on_findings = on_findings
        self._on_closed = on_closed

    def step(self, flows: FlowBatch, now_ns: int, watermark_ns: int, sensor: str = "file") -> None:
        """One pane: the flows that arrived up to now_ns; flows that start before watermark_ns are all here."""
        started = time.perf_counter()
        self.counters.consumed += len(flows)
        self.buffer.add(flows, sensor, watermark_ns)
        self._publish(self.detector.pane(now_ns, in_order(flows)))
        self.counters.panes += 1
        self.counters.pane_seconds += time.perf_counter() - started
        self._close(self.buffer.close_ready())

    def finish(self) -> None:
        """The end of the input: whatever is open closes. Findings that go on stay open: nobody saw their end."""
        self._close(self.buffer.flush())

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
        closed = self.detector.close(flows)
        self.counters.scored += len(flows)
        self.counters.windows += len(closed.contacts.windows)
        self.counters.window_seconds += time.perf_counter() - started
        if self._on_closed is not None:
            self._on_closed(closed)

    def standing(self) -> str:
        """Whether graph and alarms are ready, in words."""
        readiness, prior = self.detector.alarms.readiness(), self.detector.prior
        graph = "off" if prior is None else f"not ready: {prior.waiting}" if prior.waiting else "ready"
        return f"graph {graph}; alarms {readiness.reason}"


def scoring_metrics(scorer: Scorer) -> dict[str, Value]:
    """Windows, history, graph and alarms, for the table of metrics."""
    counters, buffer, detector = scorer.counters, scorer.buffer, scorer.detector
    values: dict[str, Value] = {
        "flowsage_build": {version(): 1.0},
        "flowsage_flows_consumed": counters.consumed,
        "flowsage_flows_scored": counters.scored,
        "flowsage_flows_late": buffer.counters.late,
        "flowsage_flows_open": buffer.open_flows(),
        "flowsage_windows_closed": counters.windows,
        "flowsage_panes": counters.panes,
        "flowsage_watermark_timestamp_seconds": max(0, buffer.watermark_ns or 0) / 1e9,
        "flowsage_history_keys": detector.history.keys,
        "flowsage_history_evicted": detector.history.evicted,
        "flowsage_calibration_ready": float(detector.alarms.readiness().ready),
        "flowsage_calibration_host_blocks": detector.alarms.calibration.host_blocks().sum(),
        "flowsage_findings": dict(scorer.raised),
        "flowsage_findings_open": len(detector.alarms.episodes.open),
    }
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
