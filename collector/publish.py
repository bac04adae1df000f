"""Flow batches on their way out: to consumers in this process as they are, or to a log as Arrow IPC.

A `Sink` takes record batches, each with its `Origin`: the agent numbers them. In one process the consumer is the sink
and nothing is serialised. `Publisher` is the sink that appends to a `Log` (the in-memory one, Kafka): a batch becomes
one record, keyed by sensor, described by CloudEvents headers. What the log does not take goes to the spool, and follows
in order once the log takes again.

Every record that is handed in is acknowledged, spooled, or lost for a named reason: `PublishCounts`.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from flowsage.collector.records import SCHEMA_VERSION
from flowsage.collector.spool import Spool, SpoolError

logger = logging.getLogger(__name__)

FLOWS_TOPIC = "flowsage.flows.v1"
CONTENT_TYPE = "application/vnd.apache.arrow.stream"
EVENT_TYPE = "flowsage.flows.v1"
DATA_SCHEMA = f"urn:flowsage:flows:{SCHEMA_VERSION}"

Headers = Sequence[tuple[str, bytes]]


class Log(Protocol):
    """Where records are appended: `flowsage.pipelines.memory_log.MemoryLog`, or Kafka.

    When `append` returns, the record is the log's responsibility; when it raises, nothing was appended.
    """

    def append(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()) -> object:
        """Append one record."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Whose batch it is, and which.

    sensor        its name
    boot          one life of the program in the kernel; a restart of the collector that adopts it goes on with the same
    sequence      of the batch in that life, from 0, without gaps, heartbeats (empty batches) included: a gap is a lost
                  batch, a number seen before is a repeat of the same batch
    watermark_ns  no flow that began before it (Unix time) follows after this batch
    drained_ns    when the batch left the ring, by the sensor's clock (Unix time), however long it is spooled after;
                  0: not known
    """

    sensor: str
    boot: str
    sequence: int
    watermark_ns: int
    drained_ns: int = 0

    @classmethod
    def of(cls, table: pa.Table) -> Origin:
        """From the metadata of a deserialised batch; raises KeyError or ValueError where it is not there."""
        return cls.read(table.schema.metadata or {})

    @classmethod
    def read(cls, metadata: Mapping[bytes, bytes]) -> Origin:
        """From what `metadata` gave; raises KeyError or ValueError for anything else."""
        return cls(
            sensor=metadata[b"flowsage.sensor"].decode(),
            boot=metadata[b"flowsage.boot"].decode(),
            sequence=int(metadata[b"flowsage.sequence"]),
            watermark_ns=int(metadata[b"flowsage.watermark_ns"]),
            drained_ns=int(metadata.get(b"flowsage.drained_ns", 0)),
        )

    def metadata(self) -> dict[bytes, bytes]:
        """As metadata of an Arrow schema."""
        return {b"flowsage." + name.encode(): str(getattr(self, name)).encode() for name in self.__annotations__}

    def headers(self) -> list[tuple[str, bytes]]:
        """As CloudEvents headers (binary content mode)."""
        return [
            ("ce_specversion", b"1.0"),
            ("ce_id", f"{self.boot}/{self.sequence}".encode()),
            ("ce_type", EVENT_TYPE.encode()),
            ("ce_source", f"/flowsage/sensor/{self.sensor}".encode()),
            ("ce_dataschema", DATA_SCHEMA.encode()),
            ("ce_sequence", b"%d" % self.sequence),
            ("ce_watermark", b"%d" % self.watermark_ns),
            ("content-type", CONTENT_TYPE.encode()),
        ]


class Sink(ABC):
    """Who takes an agent's batches."""

    @abstractmethod
    def put(self, batch: pa.RecordBatch, origin: Origin) -> None:
        """Take `batch` (empty: a heartbeat). Once it returns, the batch is the sink's; where it raises, it is not."""

    def ready(self) -> bool:
        """Asked when a heartbeat is due: does it make sense to send one? A sink with a backlog works on it here."""
        return True

    def last_sequence(self, boot: str) -> int | None:
        """Number of the last batch of `boot` that this sink took in any process; None: it has none, or cannot tell."""
        del boot
        return None

    def close(self) -> None:  # noqa: B027
        """Nothing follows."""


def serialise(batch: pa.RecordBatch, origin: Origin, *, compression: str | None = "zstd") -> bytes:
    """`batch` as an Arrow IPC stream with its origin in the schema's metadata: its bytes alone tell everything."""
    batch = batch.replace_schema_metadata({**(batch.schema.metadata or {}), **origin.metadata()})
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(batch)
    value: bytes = out.getvalue().to_pybytes()
    return value


def deserialise(value: bytes) -> pa.Table:
    """What `serialise` wrote; the schema's metadata says whose it is. Raises pa.ArrowInvalid for anything else."""
    with pa.ipc.open_stream(value) as reader:
        return reader.read_all()


def _check(value: bytes, records: int) -> Origin:
    """Origin of a batch that was spooled, from its bytes; raises pa.ArrowInvalid or KeyError for a damaged one."""
    table = deserialise(value)
    if len(table) != records:
        raise pa.ArrowInvalid(f"{len(table)} flow records where {records} were spooled")
    return Origin.of(table)


@dataclass
class PublishCounts:
    """Flow records handed in, by what became of them. `resumed` were in the spool when the publisher started."""

    handed: int = 0
    resumed: int = 0
    acknowledged: int = 0
    pending: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    batches: int = 0
    failures: int = 0
    """Appends that the log refused."""

    @property
    def balance(self) -> int:
        """0, or a bug."""
        return self.handed + self.resumed - self.acknowledged - self.pending - sum(self.lost.values())


class Publisher(Sink):
    """The sink that appends to a log, with a spool behind it.

    log         where to; whatever it raises means that it did not take the record
    spool       where batches wait when it does not; None: they are lost, counted
    retry_s     how long to leave the log alone after a refusal
    """

    def __init__(
        self,
        log: Log,
        *,
        sensor: str,
        topic: str = FLOWS_TOPIC,
        spool: Spool | None = None,
        retry_s: float = 1.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._topic = topic
        self._sensor = sensor
        self._spool = spool
        self._retry_s = retry_s
        self._monotonic = monotonic
        self._retry_at = float("-inf")
        self.counts = PublishCounts()
        if spool is not None:
            self.counts.resumed = self.counts.pending = spool.pending_records
            self._dropped = spool.dropped_records

    def ready(self) -> bool:
        """Nothing waits in the spool, or everything has just left it: a heartbeat would not have to wait."""
        self.drain()
        return self._monotonic() >= self._retry_at and not (self._spool and self._spool.pending_batches)

    def put(self, batch: pa.RecordBatch, origin: Origin) -> None:
        """Append `batch`, or spool it. Never raises for what the log or the disk does."""
        self.drain()
        value = serialise(batch, origin)
        self.counts.handed += len(batch)
        # Nothing overtakes what waits: a newer watermark before older records would make them late.
        waiting = self._spool is not None and self._spool.pending_batches > 0
        if not waiting and self._append(value, origin):
            self.counts.acknowledged += len(batch)
        elif self._spool is None:
            self._lose("log refused, no spool", len(batch))
        else:
            try:
                self._spool.append(value, len(batch))
            except SpoolError as error:
                logger.error("%s; %d flow records are lost", error, len(batch))
                self._lose("spool failed", len(batch))
        self.counts.batches += 1
        self._settle()

    def drain(self) -> None:
        """Append what waits in the spool, in order, as far as the log takes it."""
        spool = self._spool
        while spool is not None and spool.pending_batches and self._monotonic() >= self._retry_at:
            records = 0
            try:
                found = spool.first()
                if found is None:
                    break
                item, value = found
                records = item.records
                origin = _check(value, records)
            except (SpoolError, pa.ArrowException, KeyError, ValueError) as error:
                logger.error("a spooled batch is unusable and given up: %s", error)
                self._give_up(spool)
                continue
            if not self._append(value, origin):
                break
            # A kill between the two sends it twice, under the same boot and sequence: a reader can tell.
            spool.remove()
            self.counts.acknowledged += records
        self._settle()

    def _give_up(self, spool: Spool) -> None:
        before = spool.dropped_records
        spool.remove(delivered=False)
        self._dropped += spool.dropped_records - before
        self._lose("spool damaged", spool.dropped_records - before)

    def _append(self, value: bytes, origin: Origin) -> bool:
        now = self._monotonic()
        if now < self._retry_at:
            return False
        try:
            self._log.append(self._topic, self._sensor.encode(), value, origin.headers())
        except Exception as error:
            if self._retry_at == float("-inf"):
                logger.warning("the log takes no flow records (%s); %s", error, self._fate())
            self.counts.failures += 1
            self._retry_at = now + self._retry_s
            return False
        if self._retry_at > float("-inf"):
            logger.info("the log takes flow records again")
            self._retry_at = float("-inf")
        return True

    def _fate(self) -> str:
        return "they are spooled" if self._spool is not None else "there is no spool, so they are lost and counted"

    def _lose(self, reason: str, records: int) -> None:
        if records:
            self.counts.lost[reason] = self.counts.lost.get(reason, 0) + records

    def _settle(self) -> None:
        """Take over what the spool has counted."""
        if self._spool is None:
            return
        self._lose("spool full", self._spool.dropped_records - self._dropped)
        self._dropped = self._spool.dropped_records
        self.counts.pending = self._spool.pending_records

    def close(self) -> None:
        """A last attempt at the spool; what remains in it is there for the next start."""
        self._retry_at = min(self._retry_at, self._monotonic())
        self.drain()
        if self._spool is not None:
            self._spool.close()
