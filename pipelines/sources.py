"""Where flows come from when they do not come from an interface: flow files and captures, as steps of event time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flowsage.collector.errors import InputError, SchemaError
from flowsage.graph.flows import FlowBatch, from_table, merge

READ = (
    "start_ns", "end_ns", "src_ip", "dst_ip", "src_port", "dst_port", "proto", "packets_fwd", "packets_rev",
    "bytes_fwd", "bytes_rev", "state", "tcp_flags_fwd", "tcp_flags_rev", "handshake_ns",
)  # fmt: skip
"""Columns of a flow file that are read. Labels are not among them."""

_THEIRS = {
    "protocol": "proto", "conn_state": "state", "tcp_flags": "tcp_flags_fwd", "sport": "src_port",
    "dport": "dst_port", "orig_bytes": "bytes_fwd", "resp_bytes": "bytes_rev", "orig_pkts": "packets_fwd",
    "resp_pkts": "packets_rev",
}  # fmt: skip
"""What others call the columns that are read."""

_YEARS = 820_454_400, 2_208_988_800
"""1996 and 2040, in seconds since 1970: between them lie the flows of every file whose unit we can tell."""

_FLOWS, _WINDOWS = 1 << 16, 1 << 10
"""Flows and windows of a file that are scored together at most."""


@dataclass(frozen=True)
class Part:
    """Flows begin:end of a batch (begin < end), cut out when they are wanted: of most panes nobody wants them alone."""

    of: FlowBatch
    begin: int
    end: int

    @classmethod
    def whole(cls, flows: FlowBatch) -> Part:
        """All of a batch."""
        return cls(flows, 0, len(flows))

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def first_ns(self) -> int:
        """When the first of them starts."""
        return int(self.of.start_ns[self.begin])

    @property
    def last_ns(self) -> int:
        """When the last of them starts."""
        return int(self.of.start_ns[self.end - 1])

    @property
    def flows(self) -> FlowBatch:
        """They themselves."""
        return self.of if len(self) == len(self.of) else self.of.take(slice(self.begin, self.end))


@dataclass(frozen=True)
class Step:
    """Flows that became known up to `now_ns`, and the time before which no more will come (`watermark_ns`)."""

    part: Part
    now_ns: int
    watermark_ns: int

    @property
    def flows(self) -> FlowBatch:
        """The flows."""
        return self.part.flows


class FlowFile:
    """A Parquet file of flows.

    Raises InputError where the file cannot be read as Parquet, SchemaError where a needed column is missing, null or
    of the wrong type. Rows out of time order are put in order (`reordered` says how many went back in time).
    `misnamed`: columns that would be read under the names beside them.
    """

    def __init__(self, path: Path, *, undirected: bool = False) -> None:
        self.path = path
        self.undirected = undirected
        try:
            self._file = pq.ParquetFile(path)
            self._columns = [c for c in self._file.schema_arrow.names if c in READ]
            theirs = [c for c in self._file.schema_arrow.names if c in _THEIRS]
            self.misnamed = {c: _THEIRS[c] for c in theirs if _THEIRS[c] not in self._columns}
            for needed in ("start_ns", "src_ip", "dst_ip"):
                if needed not in self._columns:
                    raise SchemaError(
                        f"{path} has no column {needed!r}; a flow file needs start_ns (Unix ns), src_ip and dst_ip, "
                        f"this one has {', '.join(self._file.schema_arrow.names) or 'none'}"
                    )
            from_table(self._file.schema_arrow.empty_table().select(self._columns))
            start = self._file.read(["start_ns"]).column(0)
        except SchemaError as e:
            raise SchemaError(str(e) if str(path) in str(e) else f"{path}: {e}") from e
        except FileNotFoundError as e:
            raise InputError(f"there is no file {path}; name a Parquet file of flows") from e
        except (OSError, pa.ArrowException) as e:
            raise InputError(
                f"{path} cannot be read as Parquet ({_first_line(e)}); name a Parquet file of flows"
            ) from e
        times = pc.fill_null(start, -1).to_numpy().astype(np.int64)
        self.rows = len(times)
        if self.rows and not pa.types.is_timestamp(start.type):  # a timestamp knows its unit
            _refuse_other_units(path, int(times.min()), int(times.max()))
        self.reordered = int(np.count_nonzero(times < np.maximum.accumulate(times))) if self.rows else 0

    def batches(self, rows: int = 1 << 17) -> Iterator[FlowBatch]:
        """The file in time order, `rows` flows at a time; `FlowBatch.row` is the row in the file."""
        if self.reordered:
            table = self._file.read(self._columns)
            order = np.argsort(table.column("start_ns").to_numpy(), kind="stable")
            for begin in range(0, self.rows, rows):
                part = order[begin : begin + rows]
                batch = from_table(table.take(pa.array(part)), undirected=self.undirected)
                batch.row[:] = part
                yield batch
            return
        done = 0
        for record_batch in self._file.iter_batches(rows, columns=self._columns):
            yield from_table(record_batch, undirected=self.undirected, first_row=done)
            done += len(record_batch)

    def steps(self, pane_ns: int, rows: int = 1 << 17) -> Iterator[Step]:
        """The file as panes of event time that hold at least one flow, whatever `rows` is."""
        return with_watermarks(self._panes(pane_ns, rows))

    def _panes(self, pane_ns: int, rows: int) -> Iterator[tuple[int, Part]]:
        held: list[Part] = []
        for batch in self.batches(rows):
            panes = batch.start_ns // pane_ns
            cuts = [*(np.flatnonzero(np.diff(panes)) + 1).tolist(), len(batch)]
            if held and held[0].first_ns // pane_ns != panes[0]:
                yield _pane(held, pane_ns)
                held = []
            for begin, end in zip([0, *cuts], cuts[:-1], strict=False):
                yield _pane([*held, Part(batch, begin, end)], pane_ns)
                held = []
            held.append(Part(batch, cuts[-2] if len(cuts) > 1 else 0, len(batch)))
        if held:
            yield _pane(held, pane_ns)


def _refuse_other_units(path: Path, first: int, last: int) -> None:
    """Raises SchemaError where times look like seconds, ms or µs since 1970: as ns they would all be one window."""
    for unit, factor in (("seconds", 10**9), ("milliseconds", 10**6), ("microseconds", 10**3)):
        lowest, highest = (second * 10**9 // factor for second in _YEARS)
        if lowest <= first and last <= highest:
            raise SchemaError(
                f"{path}: column 'start_ns' seems to be in {unit}; it counts nanoseconds since 1970, "
                f"so multiply it by {factor:,}"
            )


def with_watermarks(panes: Iterable[tuple[int, Part]]) -> Iterator[Step]:
    """Panes (end in ns, flows in time order) as steps.

    As live, a pane is looked at once something later has come, and by then it is known that nothing comes before that:
    a window closes with its last pane, not with the first one after it.
    """
    before: tuple[int, Part] | None = None
    for now_ns, part in panes:
        if before is not None:
            yield Step(before[1], before[0], part.first_ns)
        before = now_ns, part
    if before is not None:
        yield Step(before[1], before[0], before[0])


def whole_windows(steps: Iterable[Step], window_ns: int) -> Iterator[list[Step]]:
    """The steps one by one, but those that are each all flows of a window, with the next ones that are, together.

    At most so many of them that a person sees it move on.
    """
    together, flows, open_until = list[Step](), 0, 0
    for step in steps:
        part = step.part
        end = (part.last_ns // window_ns + 1) * window_ns
        whole = part.first_ns >= max(open_until, end - window_ns) and step.watermark_ns >= end
        if together and (not whole or flows + len(part) > _FLOWS or len(together) == _WINDOWS):
            yield together
            together, flows = [], 0
        if whole:
            together.append(step)
            flows += len(part)
        else:
            yield [step]
        open_until = max(open_until, end)
    if together:
        yield together


def joined(parts: Iterable[Part]) -> FlowBatch:
    """The flows of all parts, one after the other; of parts that are next to each other in a batch, a view of it."""
    pieces: list[Part] = []
    for part in parts:
        if pieces and pieces[-1].of is part.of and pieces[-1].end == part.begin:
            pieces[-1] = Part(part.of, pieces[-1].begin, part.end)
        else:
            pieces.append(part)
    return merge([piece.flows for piece in pieces])


def _pane(parts: list[Part], pane_ns: int) -> tuple[int, Part]:
    now = (parts[0].first_ns // pane_ns + 1) * pane_ns
    return now, Part.whole(joined(parts)) if len(parts) > 1 else parts[0]


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
