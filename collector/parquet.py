"""Flow records as Parquet files that rotate, written so that a kill loses nothing that was taken.

A Parquet file is worth nothing before its footer. So the open file is an Arrow IPC stream, `.flows-….arrows`: a batch
is appended whole, with its origin beside it, and once it is there it survives the process. When the file is full, or
the sensor ends, the stream becomes `flows-….parquet`, under a temporary name until it is whole: whoever watches the
directory for `*.parquet` only ever sees files that can be read. What a killed process left is taken over by the next.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from flowsage.collector.errors import UsageError
from flowsage.collector.output import OutputError
from flowsage.collector.records import FLOW_SCHEMA
from flowsage.collector.sink import Origin, Sink

if TYPE_CHECKING:
    import pyarrow.parquet as pq

logger = logging.getLogger(__name__)


class ParquetOutput(Sink):
    """Parquet files in a directory: zstd, addresses dictionary-encoded, `FLOW_SCHEMA`.

    rotate_bytes, rotate_s    a file is finished once its stream has this size (some 200 bytes a record), or this long
                              after it was begun
    row_group                 rows of a row group, at least (fewer in the last): a batch of the agent, since two at once
                              take 10 MB more

    `files` names those that this process has finished, in order; `cut_bytes` is what a killed process had written of a
    batch that was not whole. Raises UsageError for a directory that cannot be used, OutputError when the disk takes no
    more: what had been written before stays in the stream, for the next start.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        sensor: str,
        rotate_bytes: int = 256 << 20,
        rotate_s: float = 300.0,
        row_group: int = 8192,
        monotonic: Callable[[], float] = time.monotonic,
        realtime: Callable[[], float] = time.time,
    ) -> None:
        self.directory = Path(directory)
        self.files: list[Path] = []
        self.cut_bytes = 0
        self._sensor = re.sub(r"[^A-Za-z0-9._-]", "_", sensor)
        self._rotate_bytes = rotate_bytes
        self._rotate_s = rotate_s
        self._row_group = row_group
        self._monotonic = monotonic
        self._realtime = realtime
        self._stream: _Stream | None = None
        self._last: dict[str, int] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the output directory {directory} cannot be made: {error.strerror}") from error
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise UsageError(
                f"the output directory {directory} cannot be written to; choose another, or change its mode"
            )
        self._left = [left for path in sorted(self.directory.glob(".flows-*.arrows")) if (left := self._take_up(path))]

    def _take_up(self, path: Path) -> _Stream | None:
        """The stream of a killed process of this sensor, locked; None: it is not ours, or somebody writes it still."""
        if not re.fullmatch(rf"\.flows-\d{{8}}T\d{{6}}Z-{re.escape(self._sensor)}-\d{{3,}}\.arrows", path.name):
            return None
        try:
            left = _Stream(path)
        except BlockingIOError:
            return None
        for origin, _ in left.batches():
            self._last[origin.boot] = max(origin.sequence, self._last.get(origin.boot, -1))
        self.cut_bytes += left.cut_bytes
        if left.cut_bytes:
            logger.info("%s ends in %d bytes of a batch that was not whole", path, left.cut_bytes)
        return left

    def last_sequence(self, boot: str) -> int | None:
        """Of the last batch with records that is in a stream of this sensor, as far as it is not finished."""
        return self._last.get(boot)

    def put(self, batch: pa.RecordBatch, origin: Origin) -> None:
        """Append `batch`; before that, finish the file where it is due."""
        try:
            # Not before a batch follows: until then the next process may have to ask what came last.
            self._finish_left()
            if self._stream is not None and self._due(self._stream):
                self._finish(self._stream)
                self._stream = None
            if not len(batch):
                return
            if self._stream is None:
                self._stream = _Stream(self._new_path(), began=self._monotonic())
            self._stream.append(batch, origin)
            self._last[origin.boot] = origin.sequence
        except (OSError, pa.ArrowException) as error:
            raise self._broke(error) from error

    def _due(self, stream: _Stream) -> bool:
        return stream.size >= self._rotate_bytes or self._monotonic() - stream.began >= self._rotate_s

    def _new_path(self) -> Path:
        stamp = datetime.fromtimestamp(self._realtime(), UTC).strftime("%Y%m%dT%H%M%SZ")
        number = 0
        while True:
            path = self.directory / f".flows-{stamp}-{self._sensor}-{number:03d}.arrows"
            if not path.exists() and not _final(path).exists():
                return path
            number += 1

    def _finish_left(self) -> None:
        while self._left:
            self._finish(self._left[0])
            del self._left[0]

    def _finish(self, stream: _Stream) -> None:
        """From stream to Parquet. Killed in between, the stream is still there, or the Parquet file is whole."""
        import pyarrow.parquet as pq

        stream.end()
        final = _final(stream.path)
        if not final.exists():
            temporary = final.with_name(f".{final.name}.tmp")
            rows: list[pa.RecordBatch] = []
            with pq.ParquetWriter(temporary, FLOW_SCHEMA, compression="zstd", use_dictionary=_DICTIONARIES) as writer:
                for _, batch in stream.batches():
                    rows.append(batch)
                    if sum(map(len, rows)) >= self._row_group:
                        _write(writer, rows)
                        rows = []
                if rows:
                    _write(writer, rows)
            if stream.count:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                temporary.rename(final)
                self.files.append(final)
            else:
                temporary.unlink()
        stream.path.unlink()
        stream.close()

    def _broke(self, error: Exception) -> OutputError:
        kept = "" if self._stream is None else "; what was written before becomes Parquet at the next start"
        return OutputError(f"flow records cannot be written to {self.directory} ({error}){kept}")

    def close(self) -> None:
        """Finish the last file."""
        try:
            self._finish_left()
            if self._stream is not None:
                self._finish(self._stream)
                self._stream = None
        except (OSError, pa.ArrowException) as error:
            raise self._broke(error) from error
        finally:
            for stream in (*self._left, self._stream):
                if stream is not None:
                    stream.close()


class _Stream:
    """An Arrow IPC stream, ours to write or to take over: locked until `close`. Raises BlockingIOError otherwise."""

    def __init__(self, path: Path, *, began: float | None = None) -> None:
        self.path = path
        self.began = began or 0.0
        self.count = 0
        self.cut_bytes = 0
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (0 if began is None else os.O_CREAT | os.O_EXCL)
        self._lock = os.open(path, flags, 0o644)
        self._writer: pa.RecordBatchStreamWriter | None = None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if began is not None:
                self._file = _Appender(self._lock)
                self._writer = pa.ipc.new_stream(pa.PythonFile(self._file, mode="w"), FLOW_SCHEMA)
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def size(self) -> int:
        """Bytes so far."""
        return os.fstat(self._lock).st_size

    def append(self, batch: pa.RecordBatch, origin: Origin) -> None:
        """Once this returns, the batch is the kernel's: it survives the process. Where it raises, nothing is there."""
        assert self._writer is not None
        self._writer.write_batch(batch, custom_metadata=origin.metadata())
        self._file.append()
        self.count += 1

    def batches(self) -> Iterator[tuple[Origin, pa.RecordBatch]]:
        """Those that are whole, in order; then `count` and `cut_bytes` say how many, and what follows them."""
        self.count, self.cut_bytes, end = 0, self.size, 0
        if self.size:
            with pa.OSFile(str(self.path)) as file, suppress(pa.ArrowException, OSError, StopIteration):
                reader = pa.ipc.open_stream(file)
                end = file.tell()
                while True:
                    batch, metadata = reader.read_next_batch_with_custom_metadata()
                    end = file.tell()
                    self.count += 1
                    yield Origin.read(dict(metadata)), batch
        # A stream that was closed ends with a mark of 8 bytes.
        self.cut_bytes = self.size - end if self.size - end != _END_BYTES else 0

    def end(self) -> None:
        """Nothing follows. (The mark at the end is not needed, should the disk not take it.)"""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            with suppress(OSError):
                self._file.append()

    def close(self) -> None:
        """Let another process have it. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class _Appender(io.RawIOBase):
    """Gathers what is written, to be appended to a file at once, or not at all."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Keep it for `append`."""
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def append(self) -> None:
        """Raises OSError with the file as it was."""
        size, data = os.fstat(self._fd).st_size, memoryview(b"".join(self._parts))
        self._parts = []
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            os.ftruncate(self._fd, size)
            raise


_END_BYTES = 8
_DICTIONARIES = [field.name for field in FLOW_SCHEMA if pa.types.is_dictionary(field.type)]
"""Dictionaries for columns of numbers too would take 10 MB more and make the file a quarter larger."""


def _final(path: Path) -> Path:
    """`.flows-….arrows` → `flows-….parquet`."""
    return path.with_name(path.name.removeprefix(".").removesuffix(".arrows") + ".parquet")


def _write(writer: pq.ParquetWriter, rows: list[pa.RecordBatch]) -> None:
    """One row group, with one dictionary, whatever the batches had."""
    table = pa.Table.from_batches(rows, FLOW_SCHEMA).unify_dictionaries()
    writer.write_table(table, row_group_size=len(table))
