"""Batches that the log would not take, on disk until it does: bounded, in order, and whole after a kill.

A batch is one file, `<number>-<records>.arrows`, which holds the bytes that will be the log record's value (an Arrow
IPC stream that pyarrow opens as it is). It is written under another name, fsynced, renamed, and its directory fsynced:
after a kill or a power cut a batch is there whole or not at all. Above `max_bytes` the oldest go first, counted.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from flowsage.collector.errors import ConfigurationError, FlowsageError

logger = logging.getLogger(__name__)

SUFFIX = ".arrows"


class SpoolError(FlowsageError):
    """The disk did not take, or did not give back, a batch."""


@dataclass(frozen=True)
class Spooled:
    """A batch in the spool: its number, how many flow records it has, its size, its file."""

    number: int
    records: int
    size: int
    path: Path


class Spool:
    """A directory of batches, first in first out; one process at a time.

    dropped_records, dropped_batches    left to make room, since this object was made
    pending_records, pending_batches, bytes    what is in it now, what an earlier process left included

    Raises ConfigurationError for a directory that cannot be used or that another process uses.
    """

    def __init__(self, directory: str | os.PathLike[str], *, max_bytes: int = 1 << 30) -> None:
        self.directory = Path(directory)
        self.max_bytes = max_bytes
        self.bytes = 0
        self.pending_records = 0
        self.dropped_records = 0
        self.dropped_batches = 0
        self._queue: deque[Spooled] = deque()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigurationError(f"the spool directory {directory} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise ConfigurationError(
                f"the spool directory {directory} is in use by another process; give every sensor its own"
            ) from error
        for path in sorted(self.directory.iterdir()):
            if path.name.startswith(".") and path.name.endswith(".tmp"):
                path.unlink()
            elif path.name.endswith(SUFFIX):
                self._resume(path)
        self._next = self._queue[-1].number + 1 if self._queue else 0

    def _resume(self, path: Path) -> None:
        number, _, records = path.name.removesuffix(SUFFIX).partition("-")
        if number.isdecimal() and records.isdecimal():
            self._push(Spooled(int(number), int(records), path.stat().st_size, path))

    def _push(self, item: Spooled) -> None:
        self._queue.append(item)
        self.bytes += item.size
        self.pending_records += item.records

    @property
    def pending_batches(self) -> int:
        """Batches that wait."""
        return len(self._queue)

    def append(self, value: bytes, records: int) -> None:
        """Keep `value`, a batch of `records` flow records, behind all others; the oldest go where the bound is met.

        A batch larger than the bound is dropped itself. Raises SpoolError where the disk does not take it.
        """
        if len(value) > self.max_bytes:
            self._dropped(records)
            return
        number = self._next
        path = self.directory / f"{number:016d}-{records}{SUFFIX}"
        temporary = self.directory / f".{path.name}.tmp"
        try:
            while self.bytes + len(value) > self.max_bytes:
                self._dropped(self._remove_first())
            with open(temporary, "wb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            os.fsync(self._fd)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise SpoolError(f"the spool {self.directory} does not take a batch: {error.strerror}") from error
        self._next = number + 1
        self._push(Spooled(number, records, len(value), path))

    def first(self) -> tuple[Spooled, bytes] | None:
        """The oldest batch and its bytes, None where the spool is empty. It stays until `remove`.

        Raises SpoolError for one that cannot be read back.
        """
        if not self._queue:
            return None
        item = self._queue[0]
        try:
            return item, item.path.read_bytes()
        except OSError as error:
            raise SpoolError(f"the spooled batch {item.path} cannot be read: {error.strerror}") from error

    def remove(self, *, delivered: bool = True) -> None:
        """The oldest batch is done with: delivered, or given up (then it counts as dropped)."""
        records = self._remove_first()
        if not delivered:
            self._dropped(records)

    def _remove_first(self) -> int:
        item = self._queue.popleft()
        self.bytes -= item.size
        self.pending_records -= item.records
        try:
            item.path.unlink(missing_ok=True)
        except OSError as error:
            # It is done with for this process; a later one would send it again, under the number it had.
            logger.warning("the spooled batch %s cannot be removed: %s", item.path, error.strerror)
        return item.records

    def _dropped(self, records: int) -> None:
        self.dropped_records += records
        self.dropped_batches += 1

    def close(self) -> None:
        """Let another process have the directory."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
