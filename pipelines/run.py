"""`flowsage run`: everything in one process, joined by the in-memory log.

Live, the agent is a thread of its own: packets are counted before torch is imported, and what it drains waits in the
log until the scorer is there.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from flowsage.collector.agent import Agent
from flowsage.collector.collect import stopped_by_signals, summary
from flowsage.collector.interface import require_ethernet
from flowsage.collector.publish import Publisher
from flowsage.collector.service import Service
from flowsage.pipelines.files import require_writable
from flowsage.pipelines.log import Log
from flowsage.pipelines.memory_log import MemoryLog
from flowsage.pipelines.metrics import Metrics, Value
from flowsage.pipelines.sensor import agent_settings
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.topics import anomalies_topic, flows_topic

if TYPE_CHECKING:
    from flowsage.pipelines.scorer import Scorer

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
        "flowsage_protocol_packets": {name: count.packets for name, count in ledger.protocols.items()},
        "flowsage_protocol_bytes": {name: count.bytes for name, count in ledger.protocols.items()},
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
        "flowsage_interface_unwatched_seconds": {name: ns / 1e9 for name, ns in ledger.unwatched_ns.items()},
    }


class LineWriter(Protocol):
    """Takes findings as they come (`outputs.FindingWriter` is one)."""

    def write_json(self, line: str) -> None:
        """One finding (OCSF), as JSON."""


class LiveScoring:
    """Scores what is in the log of this process, and writes the findings as they come."""

    def __init__(
        self,
        settings: Settings,
        log: Log,
        writer: LineWriter,
        metrics: Metrics,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        from flowsage.pipelines.scoring import Scoring

        self._scoring = Scoring(settings, log, metrics=metrics, restarts=False, alive=alive)
        self._alive = alive
        self._findings = log.consumer("output", anomalies_topic(settings.kafka.prefix))
        self._writer = writer
        self.snapshot = self._scoring.snapshot
        self.standing = self._scoring.standing
        # The log in memory has one partition, and gives it away at once.
        self._scoring.turn(0.0)
        self.scorer: Scorer = self._scoring.seats[0].site.scorer

    def run(self, stopped: threading.Event, until: float | None) -> None:
        """Score until told to stop, or `until` (time.monotonic)."""
        while not stopped.is_set() and (until is None or time.monotonic() < until):
            self._scoring.turn(0.2)
            self._write()
            self._alive()

    def finish(self) -> None:
        """Read the log to its end, score what is open."""
        self._scoring.finish()
        self._write()

    def _write(self) -> None:
        records = self._findings.poll()
        for record in records:
            self._writer.write_json((record.value or b"").decode())
        if records:
            self._findings.commit()


def run_live(
    settings: Settings,
    *,
    lab: bool,
    attacks: tuple[str, ...],
    duration_s: float | None,
    findings: Path | str,
    as_json: bool,
) -> None:
    """Watch interfaces (or the lab's) until SIGINT, SIGTERM or `duration_s`.

    What is wrong with what was asked for is raised before anything is taken: a port, a place in the kernel.
    """
    started = time.monotonic()
    if lab:
        from flowsage.pipelines.lab.lab import read_schedule

        schedule = read_schedule(",".join(attacks or DEFAULT_ATTACKS), settings.model.seed)
    for name in settings.sensor.interfaces:
        require_ethernet(name)
    if str(findings) != "-":
        require_writable(Path(findings))
    metrics = Metrics()
    service, stopped = Service(), threading.Event()
    with ExitStack() as stack:
        stack.enter_context(stopped_by_signals(stopped.set, service.stopping))
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
        sensor = agent_settings(settings, interfaces=interfaces, netns=netns)
        publisher = Publisher(log, sensor=settings.sensor.name, topic=flows_topic(settings.kafka.prefix))
        agent = Agent(replace(sensor, heartbeat_interval=settings.windows.pane // 2), publisher)
        stack.callback(lambda: agent.stop() if agent.alive else None)
        agent.start()
        metrics.add(lambda: sensor_metrics(agent))
        watched = ", ".join(interfaces) if len(interfaces) < 5 else f"{len(interfaces)} interfaces"
        say(f"watching {watched}; Ctrl-C stops")
        if settings.metrics.enabled:
            say(f"metrics on http://{settings.metrics.address}:{settings.metrics.port}/metrics")
        from flowsage.pipelines.outputs import FindingWriter

        writer = stack.enter_context(closing(FindingWriter(findings, as_json=as_json)))

        def alive() -> None:
            if agent.alive:
                service.alive()
            else:  # what ended it, `join` says
                stopped.set()

        scoring = LiveScoring(settings, log, writer, metrics, alive)
        metrics.add(scoring.snapshot)
        if lab:
            for entry in network.run_schedule(schedule):
                say(f"lab: {entry.attack} in {entry.after_s:g} s")
        progress = threading.Thread(target=_progress, args=(agent, scoring, stopped, started), daemon=True)
        progress.start()
        service.ready(f"watching {watched}")
        scoring.run(stopped, None if duration_s is None else started + duration_s)
        stopped.set()
        agent.stop()
        ledger = agent.join()
        scoring.finish()
        say(summary(ledger))


def _progress(agent: Agent, scoring: LiveScoring, stopped: threading.Event, started: float) -> None:
    """A line now and then: what came in, what has been learnt, whether alarms are ready."""
    while not stopped.wait(PROGRESS_S):
        packets = agent.snapshot(walk=False).seen.packets
        say(f"{time.monotonic() - started:5.0f} s  {packets:,} packets, {scoring.standing()}")


def run_file(settings: Settings, pcap: Path | None, flows: Path | None, *, findings: Path | str, as_json: bool) -> None:
    """Findings of a capture or a flow file, on the file's own clock."""
    from flowsage.pipelines.replay import Outputs, replay

    source = pcap or flows
    assert source is not None
    replay(source, settings, Outputs(findings=Path(findings)), kind="pcap" if pcap else "flows", as_json=as_json)
    sys.stdout.flush()
