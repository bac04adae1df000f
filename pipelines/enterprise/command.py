"""`flowsage lab --simulate`: the simulated enterprise as a flow file."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import click

from flowsage.collector.errors import ConfigurationError, UsageError
from flowsage.pipelines.enterprise.simulate import MONDAY, Simulation, simulate
from flowsage.pipelines.files import require_writable, write_parquet
from flowsage.pipelines.lab.truth import write_truth


def write_simulation(
    path: Path,
    *,
    days: float,
    hosts: int,
    repeats: int,
    seed: int,
    start: date | None = None,
    truth: Path | None = None,
) -> None:
    """Simulate and write the flows to `path`, the truth to `truth`; a summary goes to stderr.

    start   the first day; None: a Monday, the same each time
    """
    try:
        wanted = Simulation(start=start or MONDAY, days=days, hosts=hosts, repeats=repeats, seed=seed)
    except ConfigurationError as error:
        raise UsageError(str(error)) from error
    for target in filter(None, (path, truth)):
        require_writable(target)
    table, truths = simulate(wanted)
    write_parquet(table, path)
    if truth is not None:
        write_truth(truth, truths)
    bad = sum(table.column("label").to_pylist())
    click.echo(f"{len(table):,} flows, {bad:,} of them of {len(truths)} incidents, in {path}", err=True)
