"""Flow records for people and for other tools: Parquet files that rotate, or readable lines.

Both are sinks (collector/publish.py). A Parquet file has a temporary name until it is whole, so whoever watches the
directory for `*.parquet` only ever sees files that can be read.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import pyarrow as pa

from flowsage.collector.errors import FlowsageError, UsageError
from flowsage.collector.publish import Origin, Sink
from flowsage.collector.records import END_REASONS, FLOW_SCHEMA

if TYPE_CHECKING:
    import pyarrow.parquet as pq

PROTOCOLS = {1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 33: "dccp", 47: "gre", 50: "esp", 58: "icmpv6", 132: "sctp"}
_WITH_PORTS = {6, 17, 33, 132, 136}

_LINE_COLUMNS = (
    *("start_ns", "src_ip", "dst_ip", "src_port", "dst_port", "proto"),
    *("packets_fwd", "packets_rev", "bytes_fwd", "bytes_rev", "end_reason", "vlan", "icmp_type", "icmp_code"),
)


class OutputError(FlowsageError):
    """Records cannot be written where they should go."""


class OutputClosedError(OutputError):
    """Whoever read our standard output has gone away: time to stop, not a failure."""

    exit_code = 0


class ParquetOutput(Sink):
    """Parquet files in a directory: zstd, addresses dictionary-encoded, `FLOW_SCHEMA`.

    rotate_bytes, rotate_s    a file is finished at this size, or this long after it was begun
    row_group      rows that are gathered before they are written (in memory until then, at most for rotate_s)

    `files` names those that are whole, in order; `unwritten` records are in none of them yet. Raises
    UsageError for a directory that cannot be used, OutputError when the disk takes no more.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        sensor: str,
        rotate_bytes: int = 256 << 20,
        rotate_s: float = 300.0,
        row_group: int = 65_536,
        monotonic: Callable[[], float] = time.monotonic,
        realtime: Callable[[], float] = time.time,
    ) -> None:
        self.directory = Path(directory)
        self.files: list[Path] = []
        self.unwritten = 0
        self._sensor = re.sub(r"[^A-Za-z0-9._-]", "_", sensor)
        self._rotate_bytes = rotate_bytes
        self._rotate_s = rotate_s
        self._row_group = row_group
        self._monotonic = monotonic
        self._realtime = realtime
        self._writer: pq.ParquetWriter | None = None
        self._temporary = self._final = Path()
        self._began = 0.0
        self._waiting: list[pa.RecordBatch] = []
        self._rows = 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the output directory {directory} cannot be made: {error.strerror}") from error
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise UsageError(
                f"the output directory {directory} cannot be written to; choose another, or change its mode"
            )

    def put(self, batch: pa.RecordBatch, origin: Origin) -> None:
        """Take `batch`; finish the file where it is due."""
        del origin
        if not self._rows and self._writer is None:
            self._began = self._monotonic()
        if len(batch):
            self._waiting.append(batch)
            self._rows += len(batch)
        self.unwritten += len(batch)
        try:
            if self._rows >= self._row_group:
                self._write()
            due = (self._rows or self._writer is not None) and self._monotonic() - self._began >= self._rotate_s
            if due or (self._writer is not None and os.path.getsize(self._temporary) >= self._rotate_bytes):
                self._finish()
        except (OSError, pa.ArrowException) as error:
            self.unwritten -= len(batch)  # the caller knows of this one
            raise self._broke(error) from error

    def _broke(self, error: Exception) -> OutputError:
        """Give up the unfinished file."""
        self._writer, self._waiting, self._rows = None, [], 0
        self._temporary.unlink(missing_ok=True)
        return OutputError(
            f"flow records cannot be written to {self.directory} ({error}); {self.unwritten} earlier ones of an "
            "unfinished file are lost with it"
        )

    def _write(self) -> None:
        import pyarrow.parquet as pq

        if self._writer is None:
            stamp = datetime.fromtimestamp(self._realtime(), UTC).strftime("%Y%m%dT%H%M%SZ")
            number = 0
            while True:
                self._final = self.directory / f"flows-{stamp}-{self._sensor}-{number:03d}.parquet"
                self._temporary = self.directory / f".{self._final.name}.tmp"
                if not self._final.exists() and not self._temporary.exists():
                    break
                number += 1
            self._writer = pq.ParquetWriter(self._temporary, FLOW_SCHEMA, compression="zstd")
        # One dictionary for the row group, whatever the batches had.
        table = pa.Table.from_batches(self._waiting, FLOW_SCHEMA).unify_dictionaries()
        self._writer.write_table(table, row_group_size=max(len(table), 1))
        self._waiting, self._rows = [], 0

    def _finish(self) -> None:
        if self._waiting:
            self._write()
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
        self._temporary.rename(self._final)
        self.files.append(self._final)
        self.unwritten = 0

    def close(self) -> None:
        """Finish the last file."""
        try:
            self._finish()
        except (OSError, pa.ArrowException) as error:
            raise self._broke(error) from error


def human_bytes(n: int) -> str:
    """`n` bytes in at most four digits: "60 B", "1.2 kB", "3.4 MB"."""
    size, unit = float(n), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if size < 999.5 or unit == "PB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"


def _endpoint(address: str, port: int, with_port: bool) -> str:
    if not with_port:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def format_lines(batch: pa.RecordBatch) -> list[str]:
    """A line a record: when, what, who → whom, packets and bytes there/back, how it ended."""
    lines = []
    for start, src, dst, sport, dport, proto, pf, pr, bf, br, reason, vlan, kind, code in zip(
        *(batch.column(name).to_pylist() for name in _LINE_COLUMNS), strict=True
    ):
        when = datetime.fromtimestamp(start // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        ports = proto in _WITH_PORTS
        extra = f"  type {kind} code {code}" if kind >= 0 else ""
        extra += f"  vlan {vlan}" if vlan else ""
        lines.append(
            f"{when}.{start // 1_000_000 % 1000:03d}Z {PROTOCOLS.get(proto, f'proto-{proto}')} "
            f"{_endpoint(src, sport, ports)} → {_endpoint(dst, dport, ports)}{extra}  {pf}/{pr} packets "
            f"{human_bytes(bf)}/{human_bytes(br)}  {END_REASONS.get(reason, f'reason {reason}')}"
        )
    return lines


class LinesOutput(Sink):
    """A readable line a record on a text stream. Raises OutputClosedError once nobody reads any more."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def put(self, batch: pa.RecordBatch, origin: Origin) -> None:
        """Write the lines of `batch`."""
        del origin
        if not len(batch):
            return
        try:
            self._stream.write("\n".join(format_lines(batch)) + "\n")
            self._stream.flush()
        except BrokenPipeError as error:
            raise OutputClosedError("nobody reads the standard output any more") from error
        except OSError as error:
            raise OutputError(f"flow records cannot be written to the standard output: {error.strerror}") from error

    def close(self) -> None:
        """Nothing is held back."""
