"""What an agent hands on, and who takes it: batches that say whose they are, as they are or as Arrow IPC.

A `Sink` takes record batches, each with its `Origin`: the agent numbers them. In one process the consumer is the sink
and nothing is serialised. Serialised, a batch is an Arrow IPC stream whose bytes alone tell everything, and whose
CloudEvents headers tell whose it is without opening it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import pyarrow as pa

from flowsage.collector.records import SCHEMA_VERSION

CONTENT_TYPE = "application/vnd.apache.arrow.stream"
EVENT_TYPE = "flowsage.flows.v1"
DATA_SCHEMA = f"urn:flowsage:flows:{SCHEMA_VERSION}"

Headers = Sequence[tuple[str, bytes]]


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

    def start(self) -> Self:
        """The sensor is attached and has given up its privileges: threads are started here."""
        return self

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


def origin_of(value: bytes, records: int) -> Origin:
    """Origin of a batch that was spooled, from its bytes; raises pa.ArrowInvalid or KeyError for a damaged one."""
    table = deserialise(value)
    if len(table) != records:
        raise pa.ArrowInvalid(f"{len(table)} flow records where {records} were spooled")
    return Origin.of(table)
