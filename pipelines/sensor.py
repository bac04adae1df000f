"""The sensor from the one configuration: its agent, and `flowsage collect`. No model, no torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click

from flowsage.collector.agent import Agent
from flowsage.collector.agent_settings import AgentSettings
from flowsage.collector.collect import collect, summary
from flowsage.collector.errors import FlowsageError
from flowsage.collector.program import FlowSettings
from flowsage.collector.publish import Publisher
from flowsage.collector.spool import Spool
from flowsage.pipelines.settings import Settings


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
        egress=s.egress,
        dedupe=s.dedupe,
        loader=s.loader,
        table_entries=s.table_entries,
        ring_bytes=s.ring_bytes,
        idle_timeout=s.idle_timeout,
        active_timeout=s.active_timeout,
        half_open_timeout=s.half_open_timeout,
        linger=s.linger,
        sweep_interval=s.sweep_interval,
        poll_interval=s.poll_interval,
    )


def collector_settings(settings: Settings) -> AgentSettings:
    """The same for a process that may be killed: what it has in the kernel is pinned."""
    pins = settings.sensor.pins
    return replace(agent_settings(settings), pins=Path(pins) if pins else None)


def detach(settings: Settings, interfaces: tuple[str, ...]) -> None:
    """Take the sensor out of the kernel, or whatever sensors are on `interfaces`, and say what that was."""
    from flowsage.collector.pins import ROOT
    from flowsage.collector.removal import remove_from, remove_sensor

    root = Path(settings.sensor.pins or ROOT)
    one = None if interfaces else remove_sensor(settings.sensor.name, root)
    removed = remove_from(interfaces, root) if interfaces else [one] if one else []
    for each in removed:
        click.echo(str(each), err=True)
    if not removed:
        what = f"on {', '.join(interfaces)}" if interfaces else f"of sensor {settings.sensor.name}"
        click.echo(_nothing(what, root), err=True)


def _nothing(what: str, root: Path) -> str:
    """For who wanted to remove what is not there: what is there instead."""
    from flowsage.collector.inventory import inventory
    from flowsage.collector.pins import sensors

    here = f"nothing {what} is pinned under {root}"
    if others := sensors(root):
        return f"{here}; these sensors are, and --name names the one to remove: {', '.join(others)}"
    try:
        present = inventory(root=root, over_s=0)
    except FlowsageError:  # it takes more privilege than to remove
        return here
    if not present:
        return f"nothing of FlowSAGE is in the kernel, so there is nothing to remove ({here})"
    programs = ", ".join(str(p.stats.program_id) for p in present)
    return f"{here}; what is in the kernel (program {programs}) ends with the process that runs it: `flowsage status`"


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


CONNECT_S = 10.0
"""How long one attempt to find the brokers may take; the sensor does not wait for it."""


@contextmanager
def kafka_publisher(settings: Settings) -> Iterator[Publisher]:
    """Where a sensor's batches go with Kafka: its topic, or meanwhile the spool. Raises ConfigurationError."""
    from flowsage.pipelines.kafka import KafkaLog
    from flowsage.pipelines.topics import flows_topic

    kafka = settings.kafka
    log = KafkaLog(kafka, timeout_s=CONNECT_S)
    spool = Spool(kafka.spool, max_bytes=kafka.spool_bytes)
    publisher = Publisher(
        log,
        sensor=settings.sensor.name,
        site=kafka.site,
        topic=flows_topic(kafka.prefix),
        spool=spool,
        patience_s=kafka.patience / 1e9,
    )
    try:
        yield publisher
    finally:
        publisher.close()
        log.close()


def run_collect(settings: Settings, *, output: str | None, duration_s: float | None) -> None:
    """`flowsage collect`: flow records to a folder of Parquet files, as lines on stdout (`-`), or (None) to Kafka.

    Without Kafka in the configuration, None is `-`.
    """

    def ready(agent: Agent) -> None:
        where = f" and sending to {', '.join(settings.kafka.bootstrap_servers)}" if to_kafka else ""
        click.echo(f"watching {', '.join(agent.settings.interfaces)}{where}; Ctrl-C stops", err=True)
        if duration_s is not None:
            timer = threading.Timer(duration_s, agent.stop)
            timer.daemon = True
            timer.start()

    to_kafka = output is None and bool(settings.kafka.bootstrap_servers)
    if to_kafka:
        with kafka_publisher(settings) as publisher:
            ledger = collect(
                collector_settings(settings),
                publisher,
                drop_privileges=not settings.sensor.keep_privileges,
                on_ready=ready,
            )
    else:
        ledger = collect(
            collector_settings(settings),
            output or "-",
            drop_privileges=not settings.sensor.keep_privileges,
            on_ready=ready,
        )
    click.echo(summary(ledger), err=True)
