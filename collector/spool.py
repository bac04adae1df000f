"""Batches that the log would not take, on disk until it does: bounded, in order, and whole after a kill.

A batch is one file, `<number>-<records>.arrows`, which holds the bytes that will be the log record's value (an Arrow
IPC stream that pyarrow opens as it is). It is written under another name, fsynced, renamed, and its directory fsynced:
after a kill or a power cut a batch is there whole or not at all. Above `max_bytes`, or where the disk is full, the
oldest go first, counted.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from flowsage.collector.errors import ConfigurationError, FlowsageError

logger = logging.getLogger(__name__)

SUFFIX = ".arrows"
LAST = "last-batch"
"""Which batch was the last that was taken, spooled or not: `BOOT SEQUENCE`, for whoever is started after a kill."""
FULL = (errno.ENOSPC, errno.EDQUOT)


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

    dropped_records                            left to make room, since this object was made
    pending_records, pending_batches, bytes    what is in it now, what an earlier process left included

    Raises ConfigurationError for a directory that cannot be used or that another process uses.
    """

    def __init__(self, directory: str | os.PathLike[str], *, max_bytes: int = 1 << 30) -> None:
        self.directory = Path(directory)
        self.max_bytes = max_bytes
        self.bytes = 0
        self.pending_records = 0
        self.dropped_records = 0
        self._queue: deque[Spooled] = deque()
        self._held = False
        self._last_fd = -1
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
        """Keep `value`, a batch of `records` flow records, behind all others; the oldest go where there is no room.

        A batch that does not fit even so is dropped itself. Raises SpoolError where the disk does not take it.
        """
        number = self._next
        while self.bytes + len(value) > self.max_bytes:
            if not self._make_room():
                self._dropped(records)
                return
        while True:
            try:
                path = self._write(f"{number:016d}-{records}{SUFFIX}", value)
                break
            except OSError as error:
                if error.errno not in FULL or not self._make_room():
                    raise SpoolError(f"the spool {self.directory} does not take a batch: {error.strerror}") from error
        self._next = number + 1
        self._push(Spooled(number, records, len(value), path))

    def _write(self, name: str, value: bytes) -> Path:
        path, temporary = self.directory / name, self.directory / f".{name}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            os.fsync(self._fd)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return path

    def _make_room(self) -> bool:
        """Drop the oldest batch that nobody holds; False: there is none."""
        if len(self._queue) <= self._held:
            return False
        self._dropped(self._remove(int(self._held)))
        return True

    def hold(self) -> tuple[Spooled, bytes]:
        """The oldest batch and its bytes. It stays, whatever comes, until `remove` or `release`.

        Raises SpoolError for one that cannot be read back, IndexError where the spool is empty.
        """
        item = self._queue[0]
        self._held = True
        try:
            return item, item.path.read_bytes()
        except OSError as error:
            raise SpoolError(f"the spooled batch {item.path} cannot be read: {error.strerror}") from error

    def release(self) -> None:
        """The oldest batch is not held any more."""
        self._held = False

    def remove(self, *, delivered: bool = True) -> None:
        """The oldest batch is done with: delivered, or given up (then it counts as dropped)."""
        self._held = False
        records = self._remove(0)
        if not delivered:
            self._dropped(records)

    def _remove(self, index: int) -> int:
        item = self._queue[index]
        del self._queue[index]
        self.bytes -= item.size
        self.pending_records -= item.records
        try:
            item.path.unlink(missing_ok=True)
        except OSError as error:
            # It is done with for this process; a later one would send it again, under the number it had.
            logger.warning("the spooled batch %s cannot be removed: %s", item.path, error.strerror)
        return item.records

    def note(self, boot: str, sequence: int) -> None:
        """Batch `sequence` of `boot` is taken. Outlives the process, not a power cut (nor does the boot)."""
        try:
            if self._last_fd < 0:
                self._last_fd = os.open(self.directory / LAST, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.pwrite(self._last_fd, f"{boot} {sequence}".ljust(128).encode(), 0)
        except OSError as error:
            logger.warning("the spool %s does not keep its notes: %s", self.directory, error.strerror)

    def last_sequence(self, boot: str) -> int | None:
        """The number that `note` was told last for `boot`; None: it was told of none."""
        try:
            noted, _, sequence = (self.directory / LAST).read_text().strip().partition(" ")
        except (OSError, UnicodeDecodeError):
            return None
        return int(sequence) if noted == boot and sequence.isdecimal() else None

    def _dropped(self, records: int) -> None:
        self.dropped_records += records

    def close(self) -> None:
        """Let another process have the directory."""
        for fd in (self._fd, self._last_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._last_fd = -1
