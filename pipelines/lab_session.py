"""`flowsage lab`: the lab by itself, and what FlowSAGE's sensor sees of it as labelled flows."""

from __future__ import annotations

from pathlib import Path

import click
import pyarrow as pa

from flowsage.collector.agent import Agent
from flowsage.collector.collect import summary
from flowsage.collector.records import FLOW_SCHEMA
from flowsage.collector.sink import Origin, Sink
from flowsage.pipelines.files import require_writable, write_parquet
from flowsage.pipelines.lab import Lab, LabSettings, label_flows, run_lab
from flowsage.pipelines.sensor import agent_settings
from flowsage.pipelines.settings import Settings


class Kept(Sink):
    """A sink that keeps the batches."""

    def __init__(self) -> None:
        self.batches: list[pa.RecordBatch] = []

    def put(self, batch: pa.RecordBatch, origin: Origin) -> None:
        """Keep `batch`."""
        del origin
        if len(batch):
            self.batches.append(batch)

    def table(self) -> pa.Table:
        """Everything, in order of start."""
        return pa.Table.from_batches(self.batches, FLOW_SCHEMA).unify_dictionaries().sort_by("start_ns")


def lab_session(
    settings: Settings,
    *,
    attacks: tuple[str, ...],
    duration_s: float | None,
    record: Path | None,
    flows: Path | None,
    truth: Path | None,
) -> None:
    """Run the lab until it is stopped; write the wire (`record`), the labelled flows (`flows`), the truth (`truth`)."""
    for path in filter(None, (record, flows, truth)):
        require_writable(path)
    kept = Kept()
    agents: list[Agent] = []

    def watch(lab: Lab) -> None:
        if flows is None:
            return
        agent = Agent(agent_settings(settings, interfaces=tuple(lab.interfaces), netns=lab.netns), kept)
        agent.start()
        agents.append(agent)

    def leave(lab: Lab) -> None:
        for agent in agents:
            agent.stop()
            click.echo(summary(agent.join()), err=True)

    truths = run_lab(
        LabSettings(seed=settings.model.seed, truth_path=truth),
        schedule=",".join(attacks),
        duration_s=duration_s,
        record=record,
        on_started=watch,
        on_ending=leave,
    )
    if flows is not None:
        table = label_flows(kept.table(), truths)
        write_parquet(table, flows)
        click.echo(
            f"{len(table):,} flows, {sum(table.column('label').to_pylist()):,} of misbehaviour, in {flows}", err=True
        )
