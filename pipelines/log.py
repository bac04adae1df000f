"""The log between the rooms, in memory: what Kafka promises, for one process.

Topics of one or more partitions; records are appended, numbered by offset from 0 and never change. A consumer group
has one committed offset a partition, and a record stays until every group that reads its topic has committed past it.
A transaction appends records and moves a group's offsets together: a reader sees all of it or nothing.

The log is bounded. Where nobody consumes, `append` raises `LogFullError` and the producer keeps what it has (the
publisher spools it), so that back-pressure is seen rather than suffered.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from flowsage.collector.errors import FlowsageError

Headers = Sequence[tuple[str, bytes]]


class LogFullError(FlowsageError):
    """A topic holds as many bytes as it may: consume and commit, or raise its bound."""


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One record as a consumer sees it. `timestamp_ns` is when it was appended."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    timestamp_ns: int


@dataclass
class _Partition:
    first: int = 0
    records: deque[LogRecord] = field(default_factory=deque)
    bytes: int = 0

    @property
    def end(self) -> int:
        return self.first + len(self.records)


def _size(key: bytes | None, value: bytes | None) -> int:
    return len(key or b"") + len(value or b"") + 64


class MemoryLog:
    """Topics in memory, safe to use from several threads.

    partitions    number of partitions of a topic that is created by its first use
    max_bytes     bound on what one topic holds, keys and values
    clock_ns      where `LogRecord.timestamp_ns` comes from
    """

    def __init__(
        self, *, partitions: int = 1, max_bytes: int = 256 * 2**20, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._partitions = partitions
        self._max_bytes = max_bytes
        self._clock_ns = clock_ns
        self._changed = threading.Condition(threading.RLock())
        self._topics: dict[str, list[_Partition]] = {}
        self._committed: dict[tuple[str, str, int], int] = {}
        self._readers: dict[str, set[str]] = {}

    def _topic(self, topic: str) -> list[_Partition]:
        return self._topics.setdefault(topic, [_Partition() for _ in range(self._partitions)])

    def append(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()) -> tuple[int, int]:
        """Append one record; returns its (partition, offset). Records of one key share a partition, in order.

        Raises LogFullError, and appends nothing, where the topic is at its bound.
        """
        with self._changed:
            partitions = self._topic(topic)
            size = _size(key, value)
            if sum(p.bytes for p in partitions) + size > self._max_bytes:
                raise LogFullError(
                    f"topic {topic!r} holds {self._max_bytes} bytes and nobody has consumed them; "
                    "start a consumer or raise the bound"
                )
            number = zlib.crc32(key or b"") % len(partitions)
            partition = partitions[number]
            record = LogRecord(topic, number, partition.end, key, value, tuple(headers), self._clock_ns())
            partition.records.append(record)
            partition.bytes += size
            self._changed.notify_all()
            return number, record.offset

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Records and offsets that become visible together when the block ends, or, where it raises, not at all."""
        transaction = Transaction(self)
        yield transaction
        with self._changed:
            marks = {t: [(p, len(p.records), p.bytes) for p in self._topic(t)] for t, *_ in transaction.appended}
            try:
                for topic, key, value, headers in transaction.appended:
                    self.append(topic, key, value, headers)
            except LogFullError:
                for partition, count, size in (m for marked in marks.values() for m in marked):
                    while len(partition.records) > count:
                        partition.records.pop()
                    partition.bytes = size
                raise
            for group, topic, offsets in transaction.offsets:
                self._commit(group, topic, offsets)

    def consumer(self, group: str, topic: str) -> MemoryConsumer:
        """A consumer of all partitions of `topic`, at the group's committed offsets (or the earliest record)."""
        with self._changed:
            self._topic(topic)
            self._readers.setdefault(topic, set()).add(group)
            return MemoryConsumer(self, group, topic)

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """The group's committed offset a partition: the offset of the next record to read after a restart."""
        with self._changed:
            return {n: self._committed.get((group, topic, n), p.first) for n, p in enumerate(self._topic(topic))}

    def end_offsets(self, topic: str) -> dict[int, int]:
        """The offset that the next record of each partition will have."""
        with self._changed:
            return {n: p.end for n, p in enumerate(self._topic(topic))}

    def _commit(self, group: str, topic: str, offsets: dict[int, int]) -> None:
        for number, offset in offsets.items():
            key = (group, topic, number)
            self._committed[key] = max(self._committed.get(key, 0), offset)
            partition = self._topic(topic)[number]
            keep = min(self._committed.get((reader, topic, number), 0) for reader in self._readers[topic])
            while partition.records and partition.first < keep:
                gone = partition.records.popleft()
                partition.bytes -= _size(gone.key, gone.value)
                partition.first += 1

    def _read(self, topic: str, positions: dict[int, int], limit: int, timeout_s: float) -> list[LogRecord]:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                out: list[LogRecord] = []
                for number, partition in enumerate(self._topic(topic)):
                    start = max(positions[number], partition.first)
                    for offset in range(start, min(partition.end, start + limit - len(out))):
                        out.append(partition.records[offset - partition.first])
                    positions[number] = max(start, out[-1].offset + 1 if out and out[-1].partition == number else start)
                left = deadline - time.monotonic()
                if out or left <= 0:
                    return out
                self._changed.wait(left)


class Transaction:
    """What a transaction will do when it is committed."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self.appended: list[tuple[str, bytes | None, bytes | None, Headers]] = []
        self.offsets: list[tuple[str, str, dict[int, int]]] = []

    def append(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()) -> None:
        """Append at commit."""
        self.appended.append((topic, key, value, headers))

    def commit_offsets(self, group: str, topic: str, offsets: dict[int, int]) -> None:
        """Move the group's offsets at commit: partition → offset of the next record to read."""
        self.offsets.append((group, topic, offsets))


class MemoryConsumer:
    """One member of a consumer group that reads all partitions of a topic."""

    def __init__(self, log: MemoryLog, group: str, topic: str) -> None:
        self._log = log
        self.group = group
        self.topic = topic
        self._positions = log.committed(group, topic)

    def poll(self, limit: int = 500, timeout_s: float = 0.0) -> list[LogRecord]:
        """Up to `limit` records after the last ones, in order a partition; waits at most `timeout_s` for the first."""
        return self._log._read(self.topic, self._positions, limit, timeout_s)

    def position(self) -> dict[int, int]:
        """Partition → offset of the next record that `poll` returns."""
        return dict(self._positions)

    def seek(self, offsets: dict[int, int]) -> None:
        """Read on from these offsets (those that are gone: from the earliest that is there)."""
        self._positions.update(offsets)

    def commit(self, offsets: dict[int, int] | None = None) -> None:
        """Commit `offsets`, or everything that has been polled."""
        with self._log.transaction() as transaction:
            transaction.commit_offsets(self.group, self.topic, offsets or self.position())
