"""`flowsage run`: everything in one process, joined by the in-memory log.

Live, the agent is a thread of its own: packets are counted before torch is imported, and what it drains waits in the
log until the scorer is there.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pyarrow as pa

from flowsage.collector.agent import Agent
from flowsage.collector.collect import stopped_by_signals, summary
from flowsage.collector.publish import FLOWS_TOPIC, Publisher, deserialise
from flowsage.pipelines.config import Settings
from flowsage.pipelines.log import Log, LogRecord
from flowsage.pipelines.memory_log import MemoryLog
from flowsage.pipelines.metrics import Metrics, Value
from flowsage.pipelines.sensor import agent_settings

if TYPE_CHECKING:
    from flowsage.graph.flows import FlowBatch
    from flowsage.models.explain import Finding
    from flowsage.pipelines.outputs import FindingWriter
    from flowsage.pipelines.score import Scorer

ANOMALIES_TOPIC = "flowsage.anomalies.v1"
GROUP = "flowsage-scorer"
PROGRESS_S = 10.0
DEFAULT_ATTACKS = ("75:scan",)


def say(text: str) -> None:
    """A message for the person at the terminal."""
    click.echo(text, err=True)


def sensor_metrics(agent: Agent) -> Mapping[str, Value]:
    """Collector and ledger."""
    ledger = agent.snapshot()
    return {
        "flowsage_packets": ledger.seen.packets,
        "flowsage_packet_bytes": ledger.seen.bytes,
        "flowsage_packets_unaccounted": {reason: count.packets for reason, count in ledger.reasons.items()},
        "flowsage_packets_delivered": ledger.drained.packets,
        "flowsage_fragments": ledger.fragment_nonfirst,
        "flowsage_flow_table_flows": ledger.flows_in_table or 0,
        "flowsage_flow_table_packets": ledger.in_table.packets,
        "flowsage_ring_packets": ledger.in_ring.packets,
        "flowsage_ring_full": ledger.events.get("ring_full", 0),
        "flowsage_flow_table_full": ledger.events.get("table_full", 0),
        "flowsage_ledger_imbalance_packets": abs(ledger.balance) + abs(ledger.records_balance),
        "flowsage_records": ledger.records_drained,
        "flowsage_records_lost": ledger.records_lost,
        "flowsage_records_spooled": ledger.records_pending,
        "flowsage_interface_up": {name: float(state == "watched") for name, state in agent.interfaces().items()},
    }


class LiveScoring:
    """Consumes flow batches from the log a pane at a time, and puts findings and offsets back in one transaction."""

    def __init__(self, settings: Settings, log: Log, writer: FindingWriter, metrics: Metrics) -> None:
        from flowsage.pipelines.score import Scorer

        self.settings = settings
        self.log = log
        self.writer = writer
        self.metrics = metrics
        self.dead = 0
        self.scorer: Scorer = Scorer(settings, on_findings=self._findings)
        self._consumer = log.consumer(GROUP, FLOWS_TOPIC)
        self._reader = log.consumer("output", ANOMALIES_TOPIC)
        self._transactor = log.transactor(GROUP)
        self._told: list[Finding] = []
        self._arrived: list[FlowBatch] = []
        self._watermark_ns = 0
        self._sensor = settings.sensor.name

    def run(self, stopped: threading.Event, until: float | None) -> None:
        """Step at every pane boundary of the wall clock until told to stop, or `until` (time.monotonic)."""
        pane = self.settings.windows.pane
        next_pane = (time.time_ns() // pane + 1) * pane
        while not stopped.is_set() and (until is None or time.monotonic() < until):
            wait = (next_pane - time.time_ns()) / 1e9
            if wait > 0:
                self._take(self._consumer.poll(timeout_s=min(wait, 0.2)))
                continue
            self._take(self._consumer.poll())
            self.step(next_pane)
            next_pane = max(next_pane + pane, (time.time_ns() // pane) * pane)

    def snapshot(self) -> Mapping[str, Value]:
        """Windows, models and findings, for the metrics."""
        from flowsage.pipelines.score import scoring_metrics

        return scoring_metrics(self.scorer) | {"flowsage_flows_dead_lettered": self.dead}

    def finish(self) -> None:
        """Read the log to its end, score what is open."""
        while records := self._consumer.poll():
            self._take(records)
        self.step(time.time_ns())
        self.scorer.finish()

    def step(self, now_ns: int) -> None:
        """One pane."""
        from flowsage.graph.flows import merge
        from flowsage.pipelines.findings import to_json

        started = time.perf_counter()
        flows = merge(self._arrived) if self._arrived else _no_flows()
        self._arrived = []
        self._told = []
        windows = self.scorer.counters.window_seconds
        self.scorer.step(flows, now_ns, self._watermark_ns, self._sensor)
        with self._transactor.transaction() as transaction:
            for finding in self._told:
                transaction.append(ANOMALIES_TOPIC, finding.host.encode(), to_json(finding).encode())
            transaction.commit_offsets(self._consumer, self._consumer.position())
        for record in self._reader.poll():
            self.writer.write_json((record.value or b"").decode())
        self._reader.commit()
        closing_seconds = self.scorer.counters.window_seconds - windows
        self.metrics.pane_seconds.observe(time.perf_counter() - started - closing_seconds)
        if closing_seconds:
            self.metrics.window_seconds.observe(closing_seconds)

    def _findings(self, findings: list[Finding]) -> None:
        self._told += findings

    def _take(self, records: list[LogRecord]) -> None:
        from flowsage.graph.flows import from_table

        for record in records:
            try:
                table = deserialise(record.value or b"")
                self._watermark_ns = int((table.schema.metadata or {})[b"flowsage.watermark_ns"])
            except (pa.ArrowException, KeyError, ValueError):
                self.dead += 1
                continue
            if len(table):
                self._arrived.append(from_table(table, undirected=self.settings.model.undirected))


def _no_flows() -> FlowBatch:
    from flowsage.collector.records import FLOW_SCHEMA
    from flowsage.graph.flows import from_table

    return from_table(FLOW_SCHEMA.empty_table())


def run_live(
    settings: Settings,
    *,
    lab: bool,
    attacks: tuple[str, ...],
    duration_s: float | None,
    findings: Path | str,
    as_json: bool,
) -> None:
    """Watch interfaces (or the lab's) until SIGINT, SIGTERM or `duration_s`."""
    started = time.monotonic()
    metrics = Metrics()
    with ExitStack() as stack:
        stopped = threading.Event()
        stack.enter_context(stopped_by_signals(stopped.set))
        if settings.metrics.enabled:
            metrics.serve(settings.metrics.address, settings.metrics.port)
            stack.callback(metrics.close)
        interfaces, netns = settings.sensor.interfaces, None
        if lab:
            from flowsage.pipelines.lab import Lab, LabSettings
            from flowsage.pipelines.lab.command import describe

            network = stack.enter_context(
                Lab(LabSettings(seed=settings.model.seed), on_attack=lambda truth: say(f"lab: {describe(truth)}"))
            )
            interfaces, netns = tuple(network.interfaces), network.netns
            say(f"lab: {len(network.hosts)} hosts in network namespaces, on one bridge; truth in {network.truth_path}")
        log = MemoryLog()
        log.consumer(GROUP, FLOWS_TOPIC)
        sensor = agent_settings(settings, interfaces=interfaces, netns=netns)
        agent = Agent(
            replace(sensor, heartbeat_interval=settings.windows.pane // 2), Publisher(log, sensor=settings.sensor.name)
        )
        stack.callback(lambda: agent.stop() if agent.alive else None)
        agent.start()
        metrics.add(lambda: sensor_metrics(agent))
        watched = ", ".join(interfaces) if len(interfaces) < 5 else f"{len(interfaces)} interfaces"
        say(f"watching {watched}; Ctrl-C stops")
        if settings.metrics.enabled:
            say(f"metrics on http://{settings.metrics.address}:{settings.metrics.port}/metrics")
        from flowsage.pipelines.outputs import FindingWriter

        writer = stack.enter_context(closing(FindingWriter(findings, as_json=as_json)))
        scoring = LiveScoring(settings, log, writer, metrics)
        metrics.add(scoring.snapshot)
        if lab:
            from flowsage.pipelines.lab.lab import parse_schedule

            for entry in network.run_schedule(parse_schedule(",".join(attacks or DEFAULT_ATTACKS))):
                say(f"lab: {entry.attack} in {entry.after_s:g} s")
        progress = threading.Thread(target=_progress, args=(agent, scoring, stopped, started), daemon=True)
        progress.start()
        scoring.run(stopped, None if duration_s is None else started + duration_s)
        stopped.set()
        agent.stop()
        ledger = agent.join()
        scoring.finish()
        say(summary(ledger))


def _progress(agent: Agent, scoring: LiveScoring, stopped: threading.Event, started: float) -> None:
    """A line now and then: what came in, what has been learnt, whether alarms are ready."""
    while not stopped.wait(PROGRESS_S):
        ledger, scorer = agent.snapshot(walk=False), scoring.scorer
        counts = f"{ledger.seen.packets:,} packets, {scorer.counters.consumed:,} flows"
        learnt = f"{scorer.counters.windows} windows learnt"
        say(f"{time.monotonic() - started:5.0f} s  {counts}, {learnt}; {scorer.standing()}")


def run_file(settings: Settings, pcap: Path | None, flows: Path | None, *, findings: Path | str, as_json: bool) -> None:
    """Findings of a capture or a flow file, on the file's own clock."""
    from flowsage.pipelines.replay import Outputs, replay

    source = pcap or flows
    assert source is not None
    replay(source, settings, Outputs(findings=Path(findings)), kind="pcap" if pcap else "flows", as_json=as_json)
    sys.stdout.flush()
