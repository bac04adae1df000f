"""The sensor from the one configuration: its agent, and `flowsage collect`. No model, no torch."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import click

from flowsage.collector.agent import Agent, AgentSettings
from flowsage.collector.ledger import Snapshot
from flowsage.collector.output import LinesOutput, OutputClosedError, ParquetOutput
from flowsage.collector.program import FlowSettings
from flowsage.collector.publish import Sink
from flowsage.pipelines.config import Settings


def agent_settings(settings: Settings, *, interfaces: tuple[str, ...] = (), netns: str | None = None) -> AgentSettings:
    """How the sensor works, for these interfaces (default: those of the configuration) in `netns`."""
    s = settings.sensor
    return AgentSettings(
        name=s.name,
        interfaces=interfaces or s.interfaces,
        netns=netns,
        mode=s.mode,
        mirror=s.mirror,
        replace=s.replace,
        table_entries=s.table_entries,
        ring_bytes=s.ring_bytes,
        idle_timeout=s.idle_timeout,
        active_timeout=s.active_timeout,
        half_open_timeout=s.half_open_timeout,
        linger=s.linger,
        sweep_interval=s.sweep_interval,
        poll_interval=s.poll_interval,
    )


def flow_settings(settings: Settings) -> FlowSettings:
    """What the kernel program is loaded with to read a capture."""
    s = settings.sensor
    return FlowSettings(
        table_entries=s.table_entries,
        ring_bytes=s.ring_bytes,
        idle_ns=s.idle_timeout,
        active_ns=s.active_timeout,
        half_open_ns=s.half_open_timeout,
        linger_ns=s.linger,
    )


@contextmanager
def stop_signals(stop: Callable[[], object]) -> Iterator[None]:
    """SIGINT and SIGTERM call `stop` while the block runs."""

    def handle(number: int, frame: FrameType | None) -> None:
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ledger_line(ledger: Snapshot) -> str:
    """The final balance in one line."""
    reasons = ", ".join(f"{r} {c.packets:,}" for r, c in ledger.reasons.items() if c.packets) or "nothing"
    verdict = "closes exactly" if ledger.closes else f"DOES NOT CLOSE by {ledger.balance:,} packets"
    return (
        f"ledger {verdict}: {ledger.seen.packets:,} packets seen = {ledger.drained.packets:,} in "
        f"{ledger.records_drained:,} flow records + {ledger.in_table.packets:,} in the table + not in flows: {reasons}"
    )


def collect(settings: Settings, *, output: str, duration_s: float | None) -> None:
    """`flowsage collect`: flow records to a folder of Parquet files, or (`-`) as readable lines on stdout."""
    sink: Sink = LinesOutput(sys.stdout) if output == "-" else ParquetOutput(output, sensor=settings.sensor.name)
    agent = Agent(agent_settings(settings), sink)
    timer = threading.Timer(duration_s, agent.stop) if duration_s is not None else None
    with stop_signals(agent.stop):
        agent.open()
        click.echo(f"watching {', '.join(agent.settings.interfaces)}; Ctrl-C stops", err=True)
        if timer:
            timer.start()
        try:
            ledger = agent.run()
        except OutputClosedError:
            ledger = agent.close()
        finally:
            if timer:
                timer.cancel()
    click.echo(ledger_line(ledger), err=True)
