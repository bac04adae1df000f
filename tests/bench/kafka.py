"""A drained batch to acknowledged by a broker, beside one JSON record a flow; and what a flow takes in the topic.

Needs the broker of the tests (tests/broker.py) and, for the bytes, the captures beside the checkout.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kafka
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flowsage.collector.agent_settings import AgentSettings
from flowsage.collector.errors import CaptureError
from flowsage.collector.feed import capture_settings, feed_capture
from flowsage.collector.program import FlowSettings, flow_program
from flowsage.collector.publish import Publisher
from flowsage.collector.records import RECORD_DTYPE, to_batch
from flowsage.collector.sink import Origin
from flowsage.collector.spool import Spool
from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.topics import look_after, topics
from tests.bench.rows import Row
from tests.broker import Broker, find_jars, make_brokers

RECORDS = 2_000_000
JSON_RECORDS = 40_000
RATE = 100_000
RUNS = 3
SHARED = Path(os.environ.get("FLOWSAGE_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def flows(n: int) -> npt.NDArray[Any]:
    """n records as they leave the ring: clients of some servers, every count and time of its own."""
    rng = np.random.default_rng(0)
    records = np.zeros(n, RECORD_DTYPE)
    for end, hosts in (("initiator", 4096), ("responder", 256)):
        address = np.zeros((n, 16), np.uint8)
        host = rng.integers(0, hosts, n)
        address[:, 10:12], address[:, 12] = 255, 10
        address[:, 14], address[:, 15] = host >> 8, host & 255
        records[end] = address
    records["ip_version"], records["proto"], records["end_reason"] = 4, 6, 3
    records["initiator_port"] = rng.integers(32_768, 61_000, n)
    records["responder_port"] = rng.choice([443, 80, 53, 445], n)
    records["start_ns"] = 1_700_000_000 * 10**9 + np.sort(rng.integers(0, 10**9, n))
    records["end_ns"] = records["start_ns"] + rng.integers(0, 10**9, n).astype(np.uint64)
    way = records["direction"]
    way["packets"] = rng.integers(1, 40, (n, 2))
    way["bytes"] = way["packets"] * rng.integers(60, 1400, (n, 2)).astype(np.uint64)
    way["length_sumsq"] = way["bytes"] ** 2 // way["packets"]
    way["iat_sum_ns"], way["iat_sumsq_us2"] = rng.integers(0, 10**9, (n, 2)), rng.integers(0, 10**10, (n, 2))
    way["length_min"], way["length_max"] = 60, 1400
    way["tcp_flags"], way["ttl_min"], way["ttl_max"] = 27, 64, 64
    return records


@contextmanager
def running() -> Iterator[tuple[Broker, Path]]:
    """A broker with our topics, and a folder."""
    with tempfile.TemporaryDirectory() as folder:
        [broker] = make_brokers(find_jars(SHARED), Path(folder) / "kafka")
        try:
            look_after(broker.start().settings(), topics("bench"), create=True)
            yield broker, Path(folder)
        finally:
            broker.kill()


class Sensor:
    """What stands behind the ring in an agent: Arrow, Publisher, KafkaLog."""

    def __init__(self, broker: Broker, spool: Path, site: str, *, start: bool = True) -> None:
        self.log = KafkaLog(broker.settings())
        self.sequence = 0
        self.publisher = Publisher(
            self.log, sensor="edge", site=site, topic="bench.flows.v1", spool=Spool(spool), patience_s=10
        )
        if start:
            self.publisher.start()

    def send(self, batch: pa.RecordBatch) -> None:
        origin = Origin(sensor="edge", boot="b00t" * 8, sequence=self.sequence, watermark_ns=0)
        self.publisher.put(batch, origin)
        self.sequence += 1

    def meet(self, batch: pa.RecordBatch) -> None:
        """The first batch goes by the spool: wait until the broker has it."""
        self.send(batch)
        while self.publisher.counts.pending:
            time.sleep(0.01)

    def close(self) -> None:
        counts = self.publisher.counts
        assert counts.acknowledged == counts.handed, counts
        self.publisher.close()
        self.log.close()


def published(broker: Broker, spool: Path) -> float:
    """Flow records a second from RECORD_DTYPE to acknowledged, in batches of the agent's size; best of some runs."""
    size = AgentSettings(name="edge", interfaces=("none",)).batch_records
    records = flows(size)
    sensor = Sensor(broker, spool, "speed")
    sensor.meet(to_batch(records, clock_offset_ns=0, sensor="edge"))
    rates = []
    for _ in range(RUNS):
        started = time.perf_counter()
        for _ in range(RECORDS // size):
            sensor.send(to_batch(records, clock_offset_ns=0, sensor="edge"))
        rates.append(RECORDS // size * size / (time.perf_counter() - started))
    sensor.close()
    return max(rates)


def caught_up(broker: Broker, spool: Path) -> float:
    """Seconds until a broker that is back has all of an outage of 60 s at 100 k flows/s, while as many go on coming."""
    size = AgentSettings(name="edge", interfaces=("none",)).batch_records
    batch = to_batch(flows(size), clock_offset_ns=0, sensor="edge")
    sensor = Sensor(broker, spool, "outage", start=False)
    outage = 60 * RATE // size
    for _ in range(outage):
        sensor.send(batch)
    started = time.perf_counter()
    sensor.publisher.start()
    while sensor.publisher.counts.pending:
        if (sensor.sequence - outage) * size < (time.perf_counter() - started) * RATE:
            sensor.send(batch)
        else:
            time.sleep(0.002)
    elapsed = time.perf_counter() - started
    sensor.close()
    return elapsed


def as_json(broker: Broker) -> float:
    """The same by one JSON record a flow: the same client and settings, pipelined as far as it can."""
    rows = to_batch(flows(JSON_RECORDS), clock_offset_ns=0, sensor="edge").to_pylist()
    producer = KafkaLog(broker.settings()).new_producer(linger_ms=20)
    producer.send("bench.flows.v1", b"{}", b"edge").get(30)
    rates = []
    for _ in range(RUNS):
        started = time.perf_counter()
        for row in rows:
            producer.send("bench.flows.v1", json.dumps(row).encode(), b"edge")
        producer.flush()
        rates.append(JSON_RECORDS / (time.perf_counter() - started))
    producer.close()
    return max(rates)


def corpus() -> list[pa.RecordBatch]:
    """The flow records of every capture, as one sensor would have sent them one after the other."""
    batches: list[pa.RecordBatch] = []
    with flow_program(capture_settings(FlowSettings(ring_bytes=16 << 20))) as program:
        for path in sorted(p for p in (SHARED / "pcaps").iterdir() if p.suffix in (".pcap", ".pcapng", ".cap")):
            try:
                batches += feed_capture(path, program, sensor="edge")
            except CaptureError:
                continue
    table = pa.Table.from_batches(batches).unify_dictionaries().combine_chunks()
    size = AgentSettings(name="edge", interfaces=("none",)).batch_records
    return [only_own_names(b) for b in table.to_batches(max_chunksize=size)]


def only_own_names(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch as `to_batch` would have made it: no addresses in its dictionaries but its own."""
    columns = [c.cast(pa.string()).dictionary_encode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def in_topic(broker: Broker, spool: Path, batches: list[pa.RecordBatch]) -> float:
    """Bytes a flow record that the batches take in the brokers' log."""
    before = log_bytes(broker)
    sensor = Sensor(broker, spool, "bytes")
    sensor.meet(batches[0])
    for batch in batches[1:]:
        sensor.send(batch)
    sensor.close()
    return (log_bytes(broker) - before) / sum(map(len, batches))


def log_bytes(broker: Broker) -> int:
    """What the topic takes on the broker's disk, by the broker's own account."""
    with kafka.KafkaAdminClient(bootstrap_servers=broker.bootstrap) as admin:
        described = admin.describe_log_dirs()
    return sum(
        partition["partition_size"]
        for node in described
        for folder in node["log_dirs"]
        for topic in folder["topics"]
        if topic["name"] == "bench.flows.v1"
        for partition in topic["partitions"]
    )


def rows() -> Iterator[Row]:
    """Speed and size of what a sensor sends."""
    with running() as (broker, folder):
        ours, theirs = published(broker, folder / "speed"), as_json(broker)
        yield Row(
            name="drained batch to acknowledged by Kafka", value=ours, unit="flows/s",
            reference="one JSON record a flow", reference_value=theirs,
            bar="≥ 1 M/s and ≥ 20 x", met=ours >= 1e6 and ours >= 20 * theirs,
        )  # fmt: skip
        seconds = caught_up(broker, folder / "outage")
        yield Row(
            name="an outage of 60 s at 100 k flows/s sent after", value=seconds, unit="s", bar="≤ 15 s",
            met=seconds <= 15,
        )  # fmt: skip
        size = in_topic(broker, folder / "bytes", corpus())
        yield Row(
            name="a flow record in the topic, capture corpus", value=size, unit="bytes", bar="≤ 40", met=size <= 40
        )
