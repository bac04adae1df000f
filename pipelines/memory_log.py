"""The log in memory, for one process: `flowsage run` needs no broker.

A record stays until every group that reads its topic has committed past it. The log is bounded: where nobody consumes,
`append` raises `LogFullError` and the producer keeps what it has, so that back-pressure is seen rather than suffered.
Groups share partitions as Kafka's do, but no member is ever thrown out for being silent: there is one process.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from flowsage.collector.errors import FencedError, LogFullError
from flowsage.collector.sink import Headers
from flowsage.pipelines.log import (
    Committed,
    Consumer,
    Log,
    LogRecord,
    Offsets,
    OnPartitions,
    Transaction,
    Transactor,
    offsets_of,
)


@dataclass
class _Partition:
    first: int = 0
    records: deque[LogRecord] = field(default_factory=deque)
    bytes: int = 0

    @property
    def end(self) -> int:
        return self.first + len(self.records)


@dataclass
class _Group:
    """Members in the order in which they joined, and whose each partition is."""

    members: list[MemoryConsumer] = field(default_factory=list)
    owner: dict[int, MemoryConsumer] = field(default_factory=dict)

    def target(self, member: MemoryConsumer, partitions: int) -> set[int]:
        """The partitions that `member` ought to have."""
        place = self.members.index(member)
        return {n for n in range(partitions) if n % len(self.members) == place}


def _size(key: bytes | None, value: bytes | None) -> int:
    return len(key or b"") + len(value or b"") + 64


class MemoryLog(Log):
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
        self._committed: dict[tuple[str, str, int], Committed] = {}
        self._groups: dict[tuple[str, str], _Group] = {}
        self._epochs: dict[str, int] = {}

    def _topic(self, topic: str) -> list[_Partition]:
        return self._topics.setdefault(topic, [_Partition() for _ in range(self._partitions)])

    def create_topic(self, topic: str, partitions: int) -> None:
        """A topic with so many partitions; one that is there stays as it is."""
        with self._changed:
            self._topics.setdefault(topic, [_Partition() for _ in range(partitions)])

    def append(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        *,
        partition_key: bytes | None = None,
        timeout_s: float | None = None,
    ) -> tuple[int, int]:
        """Append one record; returns its (partition, offset).

        Raises LogFullError, and appends nothing, where the topic is at its bound. There is nothing to wait for.
        """
        del timeout_s
        with self._changed:
            partitions = self._topic(topic)
            size = _size(key, value)
            if sum(p.bytes for p in partitions) + size > self._max_bytes:
                raise LogFullError(
                    f"topic {topic!r} holds {self._max_bytes} bytes and nobody has consumed them; "
                    "start a consumer or raise the bound"
                )
            number = zlib.crc32(partition_key or key or b"") % len(partitions)
            partition = partitions[number]
            record = LogRecord(topic, number, partition.end, key, value, tuple(headers), self._clock_ns())
            partition.records.append(record)
            partition.bytes += size
            self._changed.notify_all()
            return number, record.offset

    def consumer(
        self,
        group: str | None,
        topic: str,
        *,
        on_assigned: OnPartitions | None = None,
        on_revoked: OnPartitions | None = None,
    ) -> MemoryConsumer:
        """A consumer of `topic`; see `Consumer`."""
        with self._changed:
            self._topic(topic)
            return MemoryConsumer(self, group, topic, on_assigned, on_revoked)

    def transactor(self, name: str) -> MemoryTransactor:
        """Take over `name`."""
        with self._changed:
            self._epochs[name] = self._epochs.get(name, 0) + 1
            return MemoryTransactor(self, name, self._epochs[name])

    def committed(self, group: str, topic: str) -> dict[int, Committed]:
        """What the group has committed."""
        with self._changed:
            found = {n: self._committed.get((group, topic, n)) for n in range(len(self._topic(topic)))}
            return {n: c for n, c in found.items() if c is not None}

    def first_offsets(self, topic: str) -> dict[int, int]:
        """The offset of the earliest record of each partition that is still there."""
        with self._changed:
            return {n: p.first for n, p in enumerate(self._topic(topic))}

    def end_offsets(self, topic: str) -> dict[int, int]:
        """The offset that the next record of each partition will have."""
        with self._changed:
            return {n: p.end for n, p in enumerate(self._topic(topic))}

    def offsets_at(self, topic: str, timestamp_ns: int) -> dict[int, int]:
        """The first offset of each partition that was appended at or after a time; its end where there is none."""
        with self._changed:
            return {
                n: next((r.offset for r in p.records if r.timestamp_ns >= timestamp_ns), p.end)
                for n, p in enumerate(self._topic(topic))
            }

    def close(self) -> None:
        """Nothing to let go of."""

    def _check(self, consumer: Consumer, offsets: Offsets) -> None:
        owner = self._groups[consumer.group or "", consumer.topic].owner
        lost = sorted(n for n in offsets if owner.get(n) is not consumer)
        if lost:
            raise FencedError(
                f"partitions {lost} of {consumer.topic!r} are not this member's any more; poll, begin anew"
            )

    def _commit(self, group: str, topic: str, offsets: Offsets) -> None:
        for number, committed in offsets_of(offsets).items():
            self._committed[group, topic, number] = committed
            partition = self._topic(topic)[number]
            readers = [g for g, t in self._groups if t == topic]
            keep = min(self._committed.get((g, topic, number), Committed(0)).offset for g in readers)
            while partition.records and partition.first < keep:
                gone = partition.records.popleft()
                partition.bytes -= _size(gone.key, gone.value)
                partition.first += 1


class MemoryTransaction(Transaction):
    """What a transaction will do when it is committed."""

    def __init__(self) -> None:
        self.appended: list[tuple[str, bytes | None, bytes | None, Headers]] = []
        self.offsets: list[tuple[Consumer, Offsets]] = []

    def append(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()) -> None:
        """Append at commit."""
        self.appended.append((topic, key, value, headers))

    def commit_offsets(self, consumer: Consumer, offsets: Offsets) -> None:
        """Move the group at commit."""
        self.offsets.append((consumer, dict(offsets)))


class MemoryTransactor(Transactor):
    """Who may write transactions under a name."""

    def __init__(self, log: MemoryLog, name: str, epoch: int) -> None:
        self._log, self._name, self._epoch = log, name, epoch

    @contextmanager
    def transaction(self) -> Iterator[MemoryTransaction]:
        """See `Transactor`. Raises LogFullError, and does nothing, where a topic has no room for all of it."""
        log, transaction = self._log, MemoryTransaction()
        yield transaction
        with log._changed:
            if log._epochs[self._name] != self._epoch:
                raise FencedError(f"another writer has taken over {self._name!r}; begin anew from what is committed")
            for consumer, offsets in transaction.offsets:
                log._check(consumer, offsets)
            marks = [(p, len(p.records), p.bytes) for t in {t for t, *_ in transaction.appended} for p in log._topic(t)]
            try:
                for topic, key, value, headers in transaction.appended:
                    log.append(topic, key, value, headers)
            except LogFullError:
                for partition, count, size in marks:
                    while len(partition.records) > count:
                        partition.records.pop()
                    partition.bytes = size
                raise
            for consumer, offsets in transaction.offsets:
                log._commit(consumer.group or "", consumer.topic, offsets)

    def close(self) -> None:
        """Nothing is open between transactions."""


class MemoryConsumer(Consumer):
    """See `Consumer`. It is a member from the start; its partitions come with the first `poll`."""

    def __init__(
        self,
        log: MemoryLog,
        group: str | None,
        topic: str,
        on_assigned: OnPartitions | None,
        on_revoked: OnPartitions | None,
    ) -> None:
        self._log = log
        self._group = group
        self.topic = topic
        self._on_assigned, self._on_revoked = on_assigned, on_revoked
        self._positions: dict[int, int] = {}
        if group is None:
            self._positions = log.first_offsets(topic)
        else:
            log._groups.setdefault((group, topic), _Group()).members.append(self)

    @property
    def group(self) -> str | None:
        """The group it is a member of."""
        return self._group

    def poll(self, limit: int = 500, timeout_s: float = 0.0) -> list[LogRecord]:
        """Up to `limit` records after the last ones, in order a partition; waits at most `timeout_s` for the first."""
        deadline = time.monotonic() + timeout_s
        with self._log._changed:
            while True:
                self._rebalance()
                out: list[LogRecord] = []
                partitions = self._log._topic(self.topic)
                for number, position in self._positions.items():
                    partition = partitions[number]
                    start = max(position, partition.first)
                    stop = min(partition.end, start + limit - len(out))
                    out += (partition.records[offset - partition.first] for offset in range(start, stop))
                    self._positions[number] = max(start, stop)
                left = deadline - time.monotonic()
                if out or left <= 0:
                    return out
                self._log._changed.wait(left)

    def _rebalance(self) -> None:
        """Give up what others ought to have, take what nobody has: in the order in which Kafka would say so."""
        if self._group is None:
            return
        group = self._log._groups[self._group, self.topic]
        if self not in group.members:
            return
        mine = {n for n, owner in group.owner.items() if owner is self}
        target = group.target(self, len(self._log._topic(self.topic)))
        if gone := mine - target:
            self._release(group, gone)
        if gained := {n for n in target if n not in group.owner}:
            for number in gained:
                group.owner[number] = self
                first = self._log._topic(self.topic)[number].first
                committed = self._log._committed.get((self._group, self.topic, number), Committed(first))
                self._positions[number] = committed.offset
            if self._on_assigned is not None:
                self._on_assigned(frozenset(gained))

    def _release(self, group: _Group, partitions: set[int]) -> None:
        if self._on_revoked is not None:
            self._on_revoked(frozenset(partitions))
        for number in partitions:
            del group.owner[number]
            del self._positions[number]
        self._log._changed.notify_all()

    def assignment(self) -> frozenset[int]:
        """The partitions that are this consumer's now."""
        return frozenset(self._positions)

    def position(self) -> dict[int, int]:
        """Partition → offset of the next record that `poll` returns."""
        return dict(self._positions)

    def seek(self, offsets: Mapping[int, int]) -> None:
        """Read on from these offsets."""
        self._positions.update({n: o for n, o in offsets.items() if n in self._positions})

    def committed(self) -> dict[int, Committed]:
        """What the group has committed for the consumer's partitions."""
        found = self._log.committed(self._group, self.topic) if self._group is not None else {}
        return {n: c for n, c in found.items() if n in self._positions}

    def commit(self, offsets: Offsets | None = None) -> None:
        """Commit `offsets`, or everything that has been polled."""
        if self._group is None:
            raise FencedError("a reader without a group has nothing to commit to")
        with self._log._changed:
            offsets = self.position() if offsets is None else offsets
            self._log._check(self, offsets)
            self._log._commit(self._group, self.topic, offsets)

    def close(self) -> None:
        """Leave the group."""
        with self._log._changed:
            if self._group is None:
                return
            group = self._log._groups[self._group, self.topic]
            if self in group.members:
                if mine := {n for n, owner in group.owner.items() if owner is self}:
                    self._release(group, mine)
                group.members.remove(self)
                self._log._changed.notify_all()
