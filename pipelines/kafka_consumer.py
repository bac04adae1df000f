"""A consumer in Kafka: a member of a group, or a reader on its own.

What kafka-python's has to be talked out of: it commits by itself, reads what may yet be aborted, and begins at the end.
Where it has to be helped: it tells of rebalances on its network thread, where nothing may be done about them. So its
`poll` runs in a thread of its own, a rebalance waits there, and our `poll` tells of it. And it forgets a join that
completes between two polls and joins anew, which makes all others join anew: members that do more than poll would do so
for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from kafka import KafkaConsumer as Client
from kafka import TopicPartition
from kafka import errors as kafka_errors
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.coordinator.consumer import ConsumerCoordinator
from kafka.structs import OffsetAndMetadata

from flowsage.collector.errors import FencedError, LogUnavailableError
from flowsage.pipelines.kafka_client import NO_TOPIC, translating
from flowsage.pipelines.log import Committed, Consumer, LogRecord, Offsets, OnPartitions, after, offsets_of

if TYPE_CHECKING:
    from flowsage.pipelines.kafka import KafkaLog

KNOWN_S = 3.0
"""A topic that no broker speaks of for so long does not exist."""


def partitions_of(client: Client, topic: str, timeout_s: float) -> list[TopicPartition]:
    """All partitions of `topic`; raises LogUnavailableError where it does not exist."""
    deadline = time.monotonic() + min(timeout_s, KNOWN_S)
    while True:
        numbers = client.partitions_for_topic(topic)
        if numbers:
            return [TopicPartition(topic, n) for n in sorted(numbers)]
        if time.monotonic() > deadline:
            raise LogUnavailableError(NO_TOPIC.format(topic))
        time.sleep(0.05)


def committed_of(client: Client, partitions: list[TopicPartition], timeout_s: float) -> dict[int, Committed]:
    """What the client's group has committed for `partitions`, of those that it has."""
    found = {p: client.committed(p, metadata=True, timeout_ms=timeout_s * 1000) for p in partitions}
    return {p.partition: Committed(c.offset, c.metadata or "") for p, c in found.items() if c is not None}


def kafka_offsets(topic: str, offsets: Offsets) -> dict[TopicPartition, OffsetAndMetadata]:
    """`offsets` in kafka-python's words."""
    return {TopicPartition(topic, n): OffsetAndMetadata(o, m, -1) for n, (o, m) in offsets_of(offsets).items()}


class _Rebalances(AsyncConsumerRebalanceListener):
    """Hears of rebalances on kafka-python's network thread, and makes them wait until the consumer's has told of them.

    On that thread nothing could be done about them; heartbeats go on meanwhile.
    """

    def __init__(self, consumer: KafkaConsumer) -> None:
        self._consumer = consumer

    async def on_partitions_revoked(self, revoked: Any) -> None:
        """Given up once told."""
        await self._tell("revoked", revoked)

    async def on_partitions_assigned(self, assigned: Any) -> None:
        """Read once told."""
        await self._tell("assigned", assigned)

    async def _tell(self, what: str, partitions: Any) -> None:
        numbers = frozenset(p.partition for p in partitions)
        if numbers:
            event = self._consumer.announce(what, numbers)
            while not event.is_set():
                await self._consumer.pause(0.005)


class _Coordinator(ConsumerCoordinator):
    """kafka-python's, but a join that nobody waited for is kept for the next poll to take up."""

    _joined: tuple[Any, bytes] | None = None

    async def _do_join_and_sync_async(self) -> bytes:
        if self._joined is None or self._joined[0] != self._generation:
            assignment = await super()._do_join_and_sync_async()
            self._joined = self._generation, assignment
        return self._joined[1]

    async def _on_join_complete_async(self, *args: Any) -> None:
        self._joined = None
        await super()._on_join_complete_async(*args)


class KafkaConsumer(Consumer):
    """See `Consumer`."""

    def __init__(
        self,
        log: KafkaLog,
        group: str | None,
        topic: str,
        on_assigned: OnPartitions | None,
        on_revoked: OnPartitions | None,
    ) -> None:
        self.topic = topic
        self._group = group
        self._log = log
        self._on_assigned, self._on_revoked = on_assigned, on_revoked
        self._events: SimpleQueue[tuple[str, frozenset[int], threading.Event] | None] = SimpleQueue()
        self._mine: set[int] = set()
        self._read: dict[int, int] = {}
        self._closed = False
        self._worker = ThreadPoolExecutor(1, f"kafka-{topic}")
        if group is None:
            self._client = log.new_client()
            try:
                partitions = partitions_of(self._client, topic, log.timeout_s)
            except BaseException:
                self._client.close()
                raise
            self._client.assign(partitions)
            self._client.seek_to_beginning(*partitions)
            self._mine = {p.partition for p in partitions}
            return
        self._client = log.new_client(
            group_id=group,
            session_timeout_ms=int(log.session_timeout_s * 1000),
            # Members hear of a rebalance by their next heartbeat, and one often takes several rounds.
            heartbeat_interval_ms=int(log.session_timeout_s * 100),
            partition_assignment_strategy=(CooperativeStickyAssignor,),
        )
        self._client._coordinator.__class__ = _Coordinator
        self._client.subscribe([topic], listener=_Rebalances(self))

    @property
    def group(self) -> str | None:
        """The group it is a member of."""
        return self._group

    def poll(self, limit: int = 500, timeout_s: float = 0.0) -> list[LogRecord]:
        """Up to `limit` records after the last ones, in order a partition; waits at most `timeout_s` for the first."""
        with translating(f"cannot read {self.topic}"):
            batches = self._attended(lambda: self._client.poll(timeout_ms=int(timeout_s * 1000), max_records=limit))
        out = [_record(r) for p, records in batches.items() if p.partition in self._mine for r in records]
        self._read |= after(out)
        return out

    def _attended(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, made by another thread, while this one tells of the rebalances that it brings about."""
        future = self._worker.submit(call)
        future.add_done_callback(lambda _: self._events.put(None))
        problem: BaseException | None = None
        while (event := self._events.get()) is not None:
            what, partitions, told = event
            try:
                if what == "assigned":
                    self._mine |= partitions
                    if self._on_assigned is not None:
                        self._on_assigned(partitions)
                elif self._on_revoked is not None:
                    self._on_revoked(partitions)
            except BaseException as error:
                problem = error
            finally:
                if what == "revoked":
                    self._mine -= partitions
                    self._read = {n: o for n, o in self._read.items() if n in self._mine}
                told.set()
        # What was read is not lost: without a commit it is read again.
        if problem is not None:
            raise problem
        return future.result()

    def announce(self, what: str, partitions: frozenset[int]) -> threading.Event:
        """To be told of by the thread that polls; returns what is set when it has."""
        told = threading.Event()
        self._events.put((what, partitions, told))
        return told

    def pause(self, seconds: float) -> Any:
        """To await on kafka-python's network thread."""
        return self._client._net.sleep(seconds)

    def assignment(self) -> frozenset[int]:
        """The partitions that are this consumer's now."""
        return frozenset(self._mine)

    def _partitions(self) -> list[TopicPartition]:
        return [TopicPartition(self.topic, n) for n in sorted(self._mine)]

    def position(self) -> dict[int, int]:
        """Partition → offset of the next record that `poll` returns."""
        with translating(f"cannot tell the position in {self.topic}"):
            found = dict(self._read)
            for p in self._partitions():
                # In `on_revoked` kafka-python knows it no more.
                with suppress(kafka_errors.IllegalStateError):
                    offset = self._client.position(p, timeout_ms=self._log.timeout_s * 1000)
                    if offset is not None:
                        found[p.partition] = offset
            return found

    def seek(self, offsets: Mapping[int, int]) -> None:
        """Read on from these offsets."""
        with translating(f"cannot seek in {self.topic}"):
            for number, offset in offsets.items():
                if number in self._mine:
                    self._client.seek(TopicPartition(self.topic, number), offset)
                    self._read[number] = offset

    def committed(self) -> dict[int, Committed]:
        """What the group has committed for the consumer's partitions."""
        if self._group is None:
            return {}
        with translating(f"cannot ask about group {self._group!r}"):
            return committed_of(self._client, self._partitions(), self._log.timeout_s)

    def commit(self, offsets: Offsets | None = None) -> None:
        """Commit `offsets`, or everything that has been polled."""
        if self._group is None:
            raise FencedError("a reader without a group has nothing to commit to")
        offsets = self.position() if offsets is None else offsets
        self.check(offsets)
        with translating(f"cannot commit for group {self._group!r}"):
            if offsets:
                self._client.commit(kafka_offsets(self.topic, offsets), timeout_ms=self._log.timeout_s * 1000)

    def check(self, offsets: Offsets) -> None:
        """Raises FencedError where some partition of `offsets` is not this consumer's."""
        lost = sorted(set(offsets) - self._mine)
        if lost:
            raise FencedError(f"partitions {lost} of {self.topic!r} are not this member's any more; poll, begin anew")

    def group_metadata(self) -> Any:
        """What tells the broker whether this member is still one."""
        return self._client.group_metadata()

    def close(self) -> None:
        """Leave the group."""
        if self._closed:
            return
        self._closed = True
        try:
            with translating(f"cannot leave group {self._group!r}"):
                self._attended(lambda: self._client.close(timeout_ms=5000))
        finally:
            self._worker.shutdown(wait=False)
            self._mine = set()


def _record(record: Any) -> LogRecord:
    return LogRecord(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=record.key,
        value=record.value,
        headers=tuple((k, v) for k, v in record.headers),
        timestamp_ns=record.timestamp * 10**6,
    )
