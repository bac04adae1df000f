"""`flowsage replay`: a capture or a flow file through exactly the code of the live stream, as fast as it can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import pyarrow as pa
import pyarrow.parquet as pq

from flowsage.collector.collect import summary
from flowsage.collector.errors import CaptureError, InputError, UsageError
from flowsage.collector.feed import CaptureFeed, capture_settings
from flowsage.collector.ledger import Snapshot
from flowsage.collector.program import FlowProgram
from flowsage.collector.records import FLOW_SCHEMA, merge_same_flow
from flowsage.pipelines.files import require_writable
from flowsage.pipelines.sensor import flow_settings
from flowsage.pipelines.settings import Settings

CAPTURE_MAGICS = (
    b"\xd4\xc3\xb2\xa1",
    b"\xa1\xb2\xc3\xd4",
    b"\x4d\x3c\xb2\xa1",
    b"\xa1\xb2\x3c\x4d",
    b"\x0a\x0d\x0d\x0a",
)
Kind = Literal["pcap", "flows"]


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a replay writes what; None: not."""

    records: Path | None = None
    ledger: Path | None = None
    scores: Path | None = None
    hosts: Path | None = None
    findings: Path | None = None

    @property
    def scored(self) -> bool:
        """Whether anything is asked for that needs the model."""
        return bool(self.scores or self.hosts or self.findings)


def kind_of(path: Path) -> Kind:
    """Whether it is a capture or a Parquet file, by its first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}") from e
    if start == b"PAR1":
        return "flows"
    if start in CAPTURE_MAGICS:
        return "pcap"
    raise InputError(f"{path} is neither a capture (pcap, pcapng) nor a Parquet file of flows; convert it first")


class RecordWriter:
    """Flow records to a Parquet file, batch by batch, under its name only once it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        try:
            self._writer = pq.ParquetWriter(self._part, FLOW_SCHEMA, compression="zstd")
        except OSError as e:
            raise InputError(f"cannot write {path}: {e.strerror or e}") from e

    def write(self, table: pa.Table) -> None:
        """Add records."""
        self._writer.write_table(table)

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()
        self._part.replace(self._path)


class _Captured:
    """A capture's records, batch by batch; afterwards the ledger, and what was wrong with the file."""

    def __init__(self, path: Path, settings: Settings, *, no_timeouts: bool, fine: bool) -> None:
        self.path = path
        self.problem: CaptureError | None = None
        self.ledger: Snapshot | None = None
        self._program = FlowProgram(capture_settings(flow_settings(settings), no_timeouts=no_timeouts))
        self.feed = CaptureFeed(
            path, self._program, sensor=settings.sensor.name, sweep_ns=settings.sensor.sweep_interval,
            batch_records=1 if fine else 65_536,
        )  # fmt: skip

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Records as the sensor would have sent them."""
        with self._program:
            try:
                yield from self.feed
            except CaptureError as e:
                self.problem = e
            self.ledger = self.feed.ledger


def replay(
    source: Path,
    settings: Settings,
    outputs: Outputs,
    *,
    no_timeouts: bool = False,
    kind: Kind | None = None,
    as_json: bool = False,
) -> None:
    """Replay `source`. Raises InputError and its kin; a damaged capture is replayed as far as it goes, then raised."""
    kind = kind or kind_of(source)
    if outputs == Outputs():
        raise UsageError("say what to write: --records, --ledger, --scores, --hosts or --findings")
    if kind == "pcap":
        _replay_capture(source, settings, outputs, no_timeouts=no_timeouts, as_json=as_json)
        return
    if outputs.records or outputs.ledger or no_timeouts:
        raise UsageError("--records, --ledger and --no-timeouts are of packets; a flow file has none")
    _replay_flows(source, settings, outputs, as_json=as_json)


def _replay_flows(source: Path, settings: Settings, outputs: Outputs, *, as_json: bool) -> None:
    from flowsage.pipelines.sources import FlowFile

    file = FlowFile(source, undirected=settings.model.undirected)
    if file.misnamed:
        names = ", ".join(f"{theirs} (here {ours})" for theirs, ours in file.misnamed.items())
        click.echo(
            f"{source}: columns that are not read: {names}; rename them, or less is known of the flows", err=True
        )
    if file.reordered:
        click.echo(f"{source}: {file.reordered:,} rows go back in time; they were put in order", err=True)
    with ScoredRun(settings, outputs, as_json=as_json) as run:
        for _ in run.scorer.run(file.steps(settings.windows.pane)):
            pass
        run.finish(file.rows)
    click.echo(f"{source}: {file.rows:,} flows; {run.summary()}", err=True)


def _replay_capture(source: Path, settings: Settings, outputs: Outputs, *, no_timeouts: bool, as_json: bool) -> None:
    captured = _Captured(source, settings, no_timeouts=no_timeouts, fine=outputs.scored)
    with ExitStack() as stack:
        run = stack.enter_context(ScoredRun(settings, outputs, as_json=as_json)) if outputs.scored else None
        records = RecordWriter(outputs.records) if outputs.records else None
        kept: list[pa.RecordBatch] = []
        rows = 0
        panes = _Panes(settings, run) if run else None
        for batch in captured.batches():
            if no_timeouts:
                kept.append(batch)
            elif records:
                records.write(pa.Table.from_batches([batch]))
            if panes:
                panes.add(batch, rows, captured.feed)
            rows += len(batch)
        if panes and run:
            panes.finish()
            run.finish(rows)
        if records:
            if no_timeouts:
                records.write(merge_same_flow(pa.Table.from_batches(kept, FLOW_SCHEMA)))
            records.close()
    ledger = captured.ledger
    if ledger is not None:
        if outputs.ledger:
            _write_ledger(outputs.ledger, ledger)
        click.echo(f"{source}: {summary(ledger)}" + (f"; {run.summary()}" if run else ""), err=True)
    if captured.problem is not None:
        raise captured.problem


def _write_ledger(path: Path, ledger: Snapshot) -> None:
    try:
        path.write_text(ledger.to_json() + "\n")
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror}") from e


class ScoredRun:
    """A scorer whose scores, host-windows and findings are written to files."""

    def __init__(self, settings: Settings, outputs: Outputs, *, as_json: bool) -> None:
        from flowsage.pipelines.outputs import FindingWriter, HostTableWriter, ScoreTable
        from flowsage.pipelines.scorer import Scorer

        self._outputs = outputs
        for path in filter(None, (outputs.scores, outputs.hosts)):
            require_writable(path)
        self._scores = ScoreTable(outputs.scores) if outputs.scores else None
        self._hosts = HostTableWriter(settings.windows.window) if outputs.hosts else None
        self._findings = FindingWriter(outputs.findings, as_json=as_json) if outputs.findings else None
        self.scorer = Scorer(
            settings, on_findings=self._on_findings, on_closed=self._on_closed, terms=outputs.scores is not None,
            testimony=outputs.findings is not None,
        )  # fmt: skip

    def __enter__(self) -> ScoredRun:
        return self

    def __exit__(self, *_: object) -> None:
        if self._scores:
            self._scores.close()
        if self._findings:
            self._findings.close()

    def _on_findings(self, findings: list[Any]) -> None:
        if self._findings:
            self._findings.write(findings)
        if self._hosts:
            self._hosts.raised(findings)

    def _on_closed(self, closed: Any) -> None:
        if self._scores:
            self._scores.add(closed)
        if self._hosts:
            self._hosts.add(closed)

    def finish(self, rows: int) -> None:
        """Close what is open, write the tables."""
        self.scorer.finish()
        if self._scores:
            self._scores.write(rows)
        if self._hosts and self._outputs.hosts:
            self._hosts.write(self._outputs.hosts)

    def summary(self) -> str:
        """What was found, and what it rests on."""
        counters = self.scorer.counters
        late = self.scorer.buffer.counters.late
        return (
            f"{counters.windows:,} windows, {counters.findings:,} findings"
            + (f", {late:,} flows came after their window had closed" if late else "")
            + f"; {self.scorer.standing()}"
        )


class _Panes:
    """Gathers a capture's batches into panes of the capture's clock."""

    def __init__(self, settings: Settings, run: ScoredRun) -> None:
        self._pane_ns = settings.windows.pane
        self._undirected = settings.model.undirected
        self._run = run
        self._held: list[Any] = []
        self._now_ns = 0
        self._watermark_ns = 0

    def add(self, batch: pa.RecordBatch, first_row: int, feed: CaptureFeed) -> None:
        """Take a batch that came out at `feed.clock_ns`."""
        from flowsage.graph.flows import from_table

        pane_end = (feed.clock_ns // self._pane_ns + 1) * self._pane_ns
        if self._held and pane_end > self._now_ns:
            self.finish()
        self._now_ns, self._watermark_ns = max(pane_end, self._now_ns), feed.watermark_ns
        self._held.append(from_table(batch, undirected=self._undirected, first_row=first_row))

    def finish(self) -> None:
        """Step over what is held."""
        from flowsage.graph.flows import merge

        if self._held:
            self._run.scorer.take(merge(self._held), self._watermark_ns)
            self._run.scorer.step(self._now_ns)
        self._held = []
