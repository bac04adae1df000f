"""Files that a command is asked to write: refused at once where they cannot be, and whole or not there at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from flowsage.collector.errors import InputError

ROW_GROUP = 1 << 20
"""Rows of a row group."""


def open_for_writing(path: Path) -> IO[str]:
    """A text file to write, or an InputError that says why not."""
    try:
        return path.open("w", encoding="utf-8")
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror}") from e


def require_writable(path: Path) -> None:
    """Raises InputError where `write_parquet` would: now, rather than when all the work is done."""
    part = path.with_name(path.name + ".part")
    try:
        part.open("ab").close()
        part.unlink()
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror}") from e


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a Parquet file under its name only once it is whole."""
    file = ParquetFile(path)
    try:
        file.write(table)
        file.finish()
    finally:
        file.close()


class ParquetFile:
    """A Parquet file that is written table by table, under its name only once it is whole."""

    def __init__(self, path: Path) -> None:
        self._path, self._part = path, path.with_name(path.name + ".part")
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Add rows, at least one row group of them. Raises InputError where they cannot be written."""
        with self._told():
            self._writer = self._writer or pq.ParquetWriter(self._part, table.schema, compression="zstd")
            self._writer.write_table(table, row_group_size=ROW_GROUP)

    def finish(self) -> None:
        """It is whole."""
        assert self._writer is not None
        with self._told():
            self._writer.close()
            self._part.replace(self._path)
        self._writer = None

    def close(self) -> None:
        """Take away what is not whole."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
            self._part.unlink(missing_ok=True)
            self._writer = None

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise InputError(f"cannot write {self._path}: {e.strerror or e}") from e
