"""The log in Kafka: the contract of `pipelines/log.py` by kafka-python 3.

What it has to be talked out of: a consumer commits by itself, reads what may yet be aborted, and begins at the end; a
producer gives up a record after two minutes while later ones go on, and creates topics that are not there. And where
it has to be helped: rebalances are told on its network thread, where nothing may be done about them, so they wait for
the next `poll`; a producer that has failed is replaced, since what it still holds would overtake what is sent again.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from kafka import KafkaConsumer as Client
from kafka import KafkaProducer, TopicPartition
from kafka import errors as kafka_errors
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.net.compat import KafkaNetClient
from kafka.partitioner import murmur2
from kafka.structs import OffsetAndMetadata

from flowsage.collector.errors import (
    ConfigurationError,
    FencedError,
    LogError,
    LogUnavailableError,
    RecordTooLargeError,
)
from flowsage.pipelines.config import KafkaSettings
from flowsage.pipelines.log import (
    Committed,
    Consumer,
    Headers,
    Log,
    LogRecord,
    Offsets,
    OnPartitions,
    Transaction,
    Transactor,
    after,
    offsets_of,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)
# Its trace of the wire would show passwords (SASL PLAIN).
logging.getLogger("kafka.protocol").setLevel(logging.INFO)

MAX_RECORD_BYTES = 64 << 20
"""The largest record that we send; what each topic takes is its own affair."""
NO_TOPIC = "no topic {} is known; make it with `flowsage topics --create`"
FOREVER_MS = 7 * 86_400_000
TRANSACTION_MS = 60_000

_FENCED = (
    kafka_errors.ProducerFencedError,
    kafka_errors.InvalidProducerEpochError,
    kafka_errors.InvalidProducerIdMappingError,
    kafka_errors.IllegalGenerationError,
    kafka_errors.UnknownMemberIdError,
    kafka_errors.RebalanceInProgressError,
    kafka_errors.CommitFailedError,
    kafka_errors.FencedInstanceIdError,
    kafka_errors.TransactionCoordinatorFencedError,
)
_TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)


def translated(error: BaseException, what: str) -> LogError:
    """kafka-python's error as one of ours; `what` could not be done."""
    said = str(error) or type(error).__name__
    if isinstance(error, _FENCED):
        return FencedError(f"{what}: somebody else has taken over ({said}); begin anew from what is committed")
    if isinstance(error, _TOO_LARGE):
        return RecordTooLargeError(f"{what}: Kafka takes no record of this size ({said})")
    if isinstance(error, kafka_errors.UnknownTopicOrPartitionError):
        return LogUnavailableError(f"{what}: {NO_TOPIC.format('of this name')}")
    if isinstance(error, (kafka_errors.SaslAuthenticationFailedError, kafka_errors.AuthorizationError)):
        return LogError(f"{what}: Kafka refuses us ({said}); look at the [kafka] settings and the brokers' ACLs")
    if isinstance(error, (kafka_errors.KafkaError, OSError)):
        return LogUnavailableError(f"{what}: {said}")
    return LogError(f"{what}: {said}")


@contextmanager
def translating(what: str) -> Iterator[None]:
    """kafka-python's errors within the block become ours."""
    try:
        yield
    except LogError:
        raise
    except (kafka_errors.KafkaError, OSError, ValueError, RuntimeError) as error:
        raise translated(error, what) from error


def connect(make: Callable[..., T], config: dict[str, Any]) -> T:
    """A client of kafka-python; where it cannot connect, nothing of it is left, and the error says why.

    `make` is KafkaProducer, KafkaConsumer or KafkaAdminClient. What they raise themselves is that they had no success,
    and they leave a thread and sockets behind.
    """
    made: list[KafkaNetClient] = []
    _WHY.heard.clear()

    def client(**values: Any) -> KafkaNetClient:
        made.append(KafkaNetClient(**values))
        return made[-1]

    try:
        return make(**config, kafka_client=client)
    except kafka_errors.KafkaTimeoutError as error:
        for c in made:
            c.close()
        why, servers = _WHY.reason(), ", ".join(config["bootstrap_servers"])
        if "Authentication" in why:
            raise LogError(f"Kafka at {servers} refuses us ({why}); look at the [kafka] settings for SASL") from error
        raise LogUnavailableError(
            f"no broker answers at {servers} ({why}); is one up, and do the [kafka] settings for TLS and SASL suit it?"
        ) from error


class _Why(logging.Handler):
    """Remembers why kafka-python could not connect, which it tells its log and nobody else."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: deque[str] = deque(maxlen=16)
        own = logging.getLogger("kafka.net.manager")
        own.setLevel(logging.WARNING)
        own.propagate = False
        own.addHandler(self)

    def reason(self) -> str:
        """What says most: that we were refused, or else what came last (the last attempt is often cut short)."""
        by_weight = sorted(self.heard, key=lambda why: ("Authentication" in why) - ("timed out" in why))
        return by_weight[-1] if by_weight else "no answer"

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it, and pass it on to whoever wants to read what kafka-python says."""
        if found := _FAILED.match(record.getMessage()):
            self.heard.append(found[1])
        parent = logging.getLogger("kafka")
        if parent.isEnabledFor(record.levelno):
            parent.handle(record)


_FAILED = re.compile(r"(?:Connection|Bootstrap connection to .*?) failed: (.*?)(?: \(backoff.*)?$", re.DOTALL)
_WHY = _Why()


class KafkaLog(Log):
    """Topics in Kafka. Nothing is connected before it is needed; what fails is connected anew.

    timeout_s            how long `append` and questions wait before LogUnavailableError
    session_timeout_s    a group throws out a member that is silent for so long

    Raises ConfigurationError where no broker is named.
    """

    def __init__(self, settings: KafkaSettings, *, timeout_s: float = 30.0, session_timeout_s: float = 10.0) -> None:
        if not settings.bootstrap_servers:
            raise ConfigurationError("no Kafka broker is named; set kafka.bootstrap_servers, such as 'kafka1:9092'")
        self.settings = settings
        self.timeout_s = timeout_s
        self.session_timeout_s = session_timeout_s
        self._lock = threading.RLock()
        self._producer: KafkaProducer | None = None
        self._asking: Client | None = None
        self._transactors: list[KafkaTransactor] = []

    # ---- appending ----

    def new_producer(self, **values: Any) -> KafkaProducer:
        """A producer of kafka-python with our defaults."""
        timeout_ms = int(self.timeout_s * 1000)
        client = self.settings.client()
        return connect(
            KafkaProducer,
            client
            | {
                "acks": "all",
                "enable_idempotence": True,
                # Retried in order for as long as we wait: a record that expired would be overtaken by those behind it.
                "delivery_timeout_ms": FOREVER_MS,
                "request_timeout_ms": min(client["request_timeout_ms"], max(timeout_ms, 1000)),
                "max_block_ms": timeout_ms,
                "bootstrap_timeout_ms": timeout_ms,
                "max_request_size": MAX_RECORD_BYTES + (1 << 16),
                "batch_size": 1 << 20,
                # Of a small batch most is Arrow's description of it: 10 flows take 208 bytes each with it, 700 without.
                "compression_type": "zstd",
                "allow_auto_create_topics": False,
                "metrics_enabled": False,
            }
            | values,
        )

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
        """Append one record, acknowledged by all replicas in sync; returns its (partition, offset).

        Waits `timeout_s` at most (None: the log's own; so does a call that has to connect first). After
        LogUnavailableError the record may be in the log all the same: whoever sends it again sends it twice, and a
        reader has to be able to tell.
        """
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        with self._lock:
            try:
                with translating(f"cannot append to {topic}"):
                    if self._producer is None:
                        self._producer = self.new_producer()
                    partition = _partition(self._producer, topic, partition_key)
                    future = self._producer.send(topic, value, key, list(headers), partition)
                    done = future.get(timeout=max(0.001, deadline - time.monotonic()))
                    return done.partition, done.offset
            except BaseException:
                self._abandon()
                raise

    def _abandon(self) -> None:
        """A producer that failed goes, with what it holds."""
        producer, self._producer = self._producer, None
        if producer is not None:
            abandon(producer)

    # ---- reading ----

    def new_client(self, **values: Any) -> Client:
        """A consumer of kafka-python with our defaults."""
        return connect(
            Client,
            self.settings.client()
            | {
                "enable_auto_commit": False,
                "isolation_level": "read_committed",
                "auto_offset_reset": "earliest",
                "allow_auto_create_topics": False,
                "bootstrap_timeout_ms": int(self.timeout_s * 1000),
                "max_partition_fetch_bytes": 8 << 20,
                "metrics_enabled": False,
            }
            | values,
        )

    def consumer(
        self,
        group: str | None,
        topic: str,
        *,
        on_assigned: OnPartitions | None = None,
        on_revoked: OnPartitions | None = None,
    ) -> KafkaConsumer:
        """A consumer of `topic`; see `Consumer`."""
        with translating(f"cannot read {topic}"):
            return KafkaConsumer(self, group, topic, on_assigned, on_revoked)

    def transactor(self, name: str) -> KafkaTransactor:
        """Take over `name` (transactional.id)."""
        with translating(f"cannot take over {name!r}"):
            transactor = KafkaTransactor(self, name)
        self._transactors.append(transactor)
        return transactor

    # ---- questions ----

    @contextmanager
    def _questions(self, topic: str) -> Iterator[tuple[Client, list[TopicPartition]]]:
        with self._lock, translating(f"cannot ask about {topic}"):
            if self._asking is None:
                self._asking = self.new_client()
            yield self._asking, partitions_of(self._asking, topic, self.timeout_s)

    def committed(self, group: str, topic: str) -> dict[int, Committed]:
        """What the group has committed."""
        with translating(f"cannot ask about group {group!r}"):
            client = self.new_client(group_id=group)
            try:
                return _committed(client, partitions_of(client, topic, self.timeout_s), self.timeout_s)
            finally:
                client.close()

    def first_offsets(self, topic: str) -> dict[int, int]:
        """The offset of the earliest record of each partition that is still there."""
        with self._questions(topic) as (client, partitions):
            return {p.partition: o for p, o in client.beginning_offsets(partitions).items()}

    def end_offsets(self, topic: str) -> dict[int, int]:
        """The offset that the next record of each partition will have; before it, what is open or aborted too."""
        with self._questions(topic) as (client, partitions):
            return {p.partition: o for p, o in client.end_offsets(partitions).items()}

    def offsets_at(self, topic: str, timestamp_ns: int) -> dict[int, int]:
        """The first offset of each partition that was appended at or after a time; its end where there is none."""
        with self._questions(topic) as (client, partitions):
            found = client.offsets_for_times(dict.fromkeys(partitions, -(-timestamp_ns // 10**6)))
            ends = client.end_offsets(partitions)
            return {p.partition: found[p].offset if found.get(p) else ends[p] for p in partitions}

    def close(self) -> None:
        """Close producer and questions; consumers are their owners' to close."""
        with self._lock:
            for transactor in self._transactors:
                transactor.close()
            if self._producer is not None:
                with suppress(kafka_errors.KafkaError):
                    self._producer.close(timeout=self.timeout_s)
                self._producer = None
            if self._asking is not None:
                self._asking.close()
                self._asking = None


def abandon(producer: KafkaProducer) -> None:
    """Close at once; what is not acknowledged is not sent any more."""
    try:
        producer.close(timeout=0)
    except kafka_errors.KafkaError:
        # With anything unsent, its close stops at a flush that cannot be done in no time, and the thread lives on.
        producer._sender.force_close()


def _partition(producer: KafkaProducer, topic: str, partition_key: bytes | None) -> int | None:
    """Where Kafka itself would put a record of this key; None: let it."""
    try:
        partitions = sorted(producer.partitions_for(topic))
    except kafka_errors.KafkaTimeoutError as error:
        raise LogUnavailableError(f"{NO_TOPIC.format(topic)}, or wait for its brokers") from error
    if partition_key is None:
        return None
    return int(partitions[(murmur2(partition_key) & 0x7FFFFFFF) % len(partitions)])


def partitions_of(client: Client, topic: str, timeout_s: float) -> list[TopicPartition]:
    """All partitions of `topic`; raises LogUnavailableError where it does not exist."""
    deadline = time.monotonic() + timeout_s
    while True:
        numbers = client.partitions_for_topic(topic)
        if numbers:
            return [TopicPartition(topic, n) for n in sorted(numbers)]
        if time.monotonic() > deadline - timeout_s + min(timeout_s, 3.0):
            raise LogUnavailableError(NO_TOPIC.format(topic))
        time.sleep(0.05)


def _committed(client: Client, partitions: list[TopicPartition], timeout_s: float) -> dict[int, Committed]:
    found = {p: client.committed(p, metadata=True, timeout_ms=timeout_s * 1000) for p in partitions}
    return {p.partition: Committed(c.offset, c.metadata or "") for p, c in found.items() if c is not None}


def _offsets(topic: str, offsets: Offsets) -> dict[TopicPartition, OffsetAndMetadata]:
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
            partitions = partitions_of(self._client, topic, log.timeout_s)
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
            return _committed(self._client, self._partitions(), self._log.timeout_s)

    def commit(self, offsets: Offsets | None = None) -> None:
        """Commit `offsets`, or everything that has been polled."""
        if self._group is None:
            raise FencedError("a reader without a group has nothing to commit to")
        offsets = self.position() if offsets is None else offsets
        self.check(offsets)
        with translating(f"cannot commit for group {self._group!r}"):
            if offsets:
                self._client.commit(_offsets(self.topic, offsets), timeout_ms=self._log.timeout_s * 1000)

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


class KafkaTransaction(Transaction):
    """What is sent as it comes, and becomes visible at the commit."""

    def __init__(self, producer: KafkaProducer) -> None:
        self._producer = producer
        self._sent: list[Any] = []

    def append(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()) -> None:
        """Append a record."""
        with translating(f"cannot append to {topic}"):
            self._sent.append(self._producer.send(topic, value, key, list(headers)))

    def commit_offsets(self, consumer: Consumer, offsets: Offsets) -> None:
        """Move the group of `consumer` to `offsets`."""
        assert isinstance(consumer, KafkaConsumer)
        consumer.check(offsets)
        if offsets:
            with translating(f"cannot commit for group {consumer.group!r}"):
                values = _offsets(consumer.topic, offsets)
                self._producer.send_offsets_to_transaction(values, consumer.group_metadata())

    def settle(self) -> None:
        """Raises what became of any record that was not taken. An outage is waited out."""
        for future in self._sent:
            future.get()


class KafkaTransactor(Transactor):
    """The producer of a transactional.id. What cannot be aborted ends it: to go on, take over the name anew."""

    def __init__(self, log: KafkaLog, name: str) -> None:
        self._name = name
        self._problem: LogError | None = None
        self._producer = log.new_producer(transactional_id=name, transaction_timeout_ms=TRANSACTION_MS)
        try:
            self._producer.init_transactions()
        except BaseException:
            abandon(self._producer)
            raise

    @contextmanager
    def transaction(self) -> Iterator[KafkaTransaction]:
        """See `Transactor`. An outage is waited out, but for the 60 s after which the brokers abort it: FencedError."""
        if self._problem is not None:
            raise type(self._problem)(str(self._problem))
        with translating(f"transaction of {self._name!r}"):
            self._producer.begin_transaction()
        transaction = KafkaTransaction(self._producer)
        try:
            yield transaction
            with translating(f"transaction of {self._name!r}"):
                transaction.settle()
                self._producer.commit_transaction()
        except BaseException as error:
            self._failed(error)
            raise

    def _failed(self, error: BaseException) -> None:
        """Abort if that can be done."""
        try:
            self._producer.abort_transaction()
        except (kafka_errors.KafkaError, RuntimeError) as problem:
            ended = error if isinstance(error, LogError) else translated(problem, f"transaction of {self._name!r}")
            self._problem = ended
            abandon(self._producer)

    def close(self) -> None:
        """No more transactions."""
        self._problem = self._problem or LogError(f"the transactor {self._name!r} is closed")
        with suppress(kafka_errors.KafkaError):
            self._producer.close(timeout=5)
