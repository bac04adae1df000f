"""The sensor from the one configuration: its agent, and `flowsage collect`. No model, no torch."""

from __future__ import annotations

import threading

import click

from flowsage.collector.agent import Agent, AgentSettings
from flowsage.collector.collect import collect, summary
from flowsage.collector.program import FlowSettings
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


def run_collect(settings: Settings, *, output: str, duration_s: float | None) -> None:
    """`flowsage collect`: flow records to a folder of Parquet files, or (`-`) as readable lines on stdout."""

    def ready(agent: Agent) -> None:
        click.echo(f"watching {', '.join(agent.settings.interfaces)}; Ctrl-C stops", err=True)
        if duration_s is not None:
            timer = threading.Timer(duration_s, agent.stop)
            timer.daemon = True
            timer.start()

    click.echo(summary(collect(agent_settings(settings), output, on_ready=ready)), err=True)
