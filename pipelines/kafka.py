"""The log in Kafka: the contract of `pipelines/log.py` by kafka-python 3.

What its producer has to be talked out of: it gives up a record after two minutes while later ones go on, and creates
topics that are not there. One that has failed is replaced, since what it still holds would overtake what is sent again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kafka import KafkaConsumer as Client
from kafka import KafkaProducer, TopicPartition
from kafka import errors as kafka_errors
from kafka.partitioner import murmur2

from flowsage.collector.errors import ConfigurationError, LogError, LogUnavailableError
from flowsage.collector.sink import Headers
from flowsage.pipelines.kafka_client import NO_TOPIC, abandon, connect, translated, translating
from flowsage.pipelines.kafka_consumer import KafkaConsumer, committed_of, kafka_offsets, partitions_of
from flowsage.pipelines.log import Committed, Consumer, Log, Offsets, OnPartitions, Transaction, Transactor
from flowsage.pipelines.settings import KafkaSettings

MAX_RECORD_BYTES = 64 << 20
"""The largest record that we send; what each topic takes is its own affair."""
FOREVER_MS = 7 * 86_400_000
TRANSACTION_MS = 60_000


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
                return committed_of(client, partitions_of(client, topic, self.timeout_s), self.timeout_s)
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


def _partition(producer: KafkaProducer, topic: str, partition_key: bytes | None) -> int | None:
    """Where Kafka itself would put a record of this key; None: let it."""
    try:
        partitions = sorted(producer.partitions_for(topic))
    except kafka_errors.KafkaTimeoutError as error:
        raise LogUnavailableError(f"{NO_TOPIC.format(topic)}, or wait for its brokers") from error
    if partition_key is None:
        return None
    return int(partitions[(murmur2(partition_key) & 0x7FFFFFFF) % len(partitions)])


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
                values = kafka_offsets(consumer.topic, offsets)
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
