"""From the topic to findings: closing windows, catching up, how long a finding takes, one scorer and two."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowsage.collector.records import RECORD_DTYPE, to_batch
from flowsage.collector.sink import Origin, serialise
from flowsage.graph.flows import from_table
from flowsage.graph.window import WindowBuffer
from flowsage.pipelines.config import load
from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.outcome import Progress
from flowsage.pipelines.scoring import Scoring
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.site import read_columns
from flowsage.pipelines.subscription import Subscription
from flowsage.pipelines.topics import flows_topic, look_after, topics
from tests.bench.rows import Row, median_seconds
from tests.broker import Broker, find_jars, make_brokers
from tests.pipelines.flow_stream import settings, stream

S = 10**9
RATE = 100_000
"""Flows a second of the sensor."""
BATCH = 10_000
"""Flows a batch: a tenth of a second of them, as the agent drains its ring."""
HOSTS = 20_000
PAIRS = 60_000


def records(batches: int, seed: int = 0) -> list[npt.NDArray[Any]]:
    """Flow records of the kernel, BATCH at a time: pairs of hosts that talk again and again, few of them often."""
    rng = np.random.default_rng(seed)
    hosts = np.zeros((HOSTS, 16), np.uint8)
    hosts[:, 10:12] = 255
    hosts[:, 12] = 10
    hosts[:, 13:16] = rng.integers(0, 256, (HOSTS, 3))
    pairs = np.stack([rng.integers(0, HOSTS, PAIRS), (rng.pareto(1.1, PAIRS) * 20).astype(np.int64) % HOSTS], 1)
    port = rng.choice([53, 80, 443, 445, 22, 8080, 3306, 123], PAIRS)
    out = []
    for _ in range(batches):
        which = (rng.pareto(0.9, BATCH) * 200).astype(np.int64) % PAIRS
        r = np.zeros(BATCH, RECORD_DTYPE)
        r["initiator"], r["responder"] = hosts[pairs[which, 0]], hosts[pairs[which, 1]]
        r["ip_version"], r["proto"] = 4, np.where(port[which] % 2 == 1, 6, 17)
        r["initiator_port"], r["responder_port"] = rng.integers(32_768, 61_000, BATCH), port[which]
        length = (rng.pareto(1.5, BATCH) * 3 * S).astype(np.int64) % (55 * S)
        r["end_ns"] = 60 * S + rng.integers(0, S // 10, BATCH)
        r["start_ns"] = r["end_ns"] - length.astype(np.uint64)
        for k in (0, 1):
            way = r["direction"][:, k]
            way["packets"] = 1 + rng.geometric(0.1, BATCH)
            way["bytes"] = way["packets"] * rng.integers(60, 1500, BATCH)
            way["tcp_flags"] = np.where(r["proto"] == 6, 0x1B, 0)
        out.append(r)
    return out


@dataclass(frozen=True)
class Sent:
    """A batch as it goes to the topic."""

    value: bytes
    origin: Origin


def batches(seconds: float, begin_ns: int, sensor: str = "edge", seed: int = 0) -> Iterator[Sent]:
    """RATE flows a second, drained every tenth of a second from `begin_ns` on."""
    drained = records(50, seed)
    for k in range(int(seconds * RATE / BATCH)):
        time_ns = begin_ns + (k + 1) * S // 10
        batch = to_batch(drained[k % len(drained)], clock_offset_ns=time_ns - 60 * S - S // 10, sensor=sensor)
        origin = Origin(sensor=sensor, boot="bench", sequence=k, watermark_ns=time_ns - 60 * S, drained_ns=time_ns)
        yield Sent(serialise(batch, origin), origin)


@contextmanager
def a_broker() -> Iterator[Broker]:
    """A broker of its own, gone with the block."""
    with tempfile.TemporaryDirectory(prefix="flowsage-bench-") as folder:
        jars = find_jars(Path(os.environ.get("FLOWSAGE_SHARED", Path(__file__).parents[3] / "shared")))
        [broker] = make_brokers(jars, Path(folder))
        try:
            yield broker.start()
        finally:
            broker.kill()


def configured(broker: Broker, prefix: str, partitions: int = 1, **sections: dict[str, object]) -> Settings:
    """Defaults, on this broker; the topics are there."""
    config = load(flags={"kafka": {"bootstrap_servers": broker.bootstrap, "prefix": prefix},
                         "metrics": {"enabled": False}, **sections})  # fmt: skip
    look_after(config.kafka, topics(prefix, partitions=partitions, replication=1), create=True)
    return config


def send(log: KafkaLog, prefix: str, sent: Sequence[Sent] | Iterator[Sent], partition_key: bytes | None = None) -> int:
    """Append batches as fast as the log takes them; returns their number."""
    producer = log.new_producer(linger_ms=5)
    futures = []
    partition = None
    if partition_key is not None:
        partition = log.append(flows_topic(prefix), b"nobody", b"", partition_key=partition_key)[0]
    for each in sent:
        futures.append(producer.send(flows_topic(prefix), each.value, each.origin.sensor.encode(), partition=partition))
    for future in futures:
        future.get(timeout=60)
    producer.close()
    return len(futures)


def to_closed_windows(broker: Broker) -> Row:
    """Flow records a second from the topic into windows that close, without a model."""
    config = configured(broker, "windows")
    log = KafkaLog(config.kafka)
    begin_ns = (time.time_ns() // S - 200) * S
    count = send(log, "windows", batches(60.0, begin_ns))

    def read() -> None:
        reader = log.consumer(None, flows_topic("windows"))
        buffer, taken, flows = WindowBuffer(config.windows.window), 0, 0
        while taken < count:
            for record in reader.poll(timeout_s=1.0):
                table = read_columns(record.value or b"")
                origin = Origin.of(table)
                buffer.add(from_table(table), origin.sensor, origin.watermark_ns)
                closed = buffer.close_ready()
                flows += 0 if closed is None else len(closed)
                taken += 1
        closed = buffer.flush()
        flows += 0 if closed is None else len(closed)
        reader.close()
        assert flows == count * BATCH

    rate = count * BATCH / median_seconds(read, repeats=3, warmup=1)
    log.close()
    return Row(
        name="topic to closed windows, one process, broker beside it", value=rate / 1e6, unit="M/s",
        bar="≥ 2 M flow records/s", met=rate >= 2e6,
    )  # fmt: skip


def catch_up(broker: Broker) -> Row:
    """Seconds until a scorer that was away for 60 s at RATE has read everything, while RATE goes on coming."""
    config = configured(broker, "outage")
    log = KafkaLog(config.kafka)
    before_s, away_s = 70.0, 60.0
    begin_ns = time.time_ns() - int((before_s + away_s) * S)
    every = batches(before_s + away_s + 60.0, begin_ns)
    scoring = Scoring(config, log)
    send(log, "outage", [next(every) for _ in range(int(before_s * RATE / BATCH))])
    while scoring.turn(1.0):
        pass
    send(log, "outage", [next(every) for _ in range(int(away_s * RATE / BATCH))])
    stopped = threading.Event()
    started = time.perf_counter()

    def live() -> None:
        due = time.perf_counter()
        for each in every:
            log.append(flows_topic("outage"), each.origin.sensor.encode(), each.value)
            due += BATCH / RATE
            if stopped.wait(max(0.0, due - time.perf_counter())):
                return

    thread = threading.Thread(target=live)
    thread.start()
    while True:
        scoring.turn(0.05)
        if scoring.seats[0].site.position >= log.end_offsets(flows_topic("outage"))[0] - 3:
            break
    seconds = time.perf_counter() - started
    stopped.set()
    thread.join()
    scoring.close()
    log.close()
    return Row(
        name="catch-up after a 60 s outage at 100 k flows/s, scored", value=seconds, unit="s", bar="< 15 s",
        met=seconds < 15,
    )  # fmt: skip


def finding_latency(broker: Broker) -> Row:
    """From the append that ends a pane to its finding in a subscriber's hands, 99th percentile.

    An office with a worm at work, told with every update, four times as fast as life; panes of 1 s.
    """
    begin_ns = (time.time_ns() // S - 300) * S
    sent = stream(200.0, begin_ns=begin_ns, attacks=60)
    config = settings(kafka={"bootstrap_servers": broker.bootstrap, "prefix": "latency"},
                      alarms={"budget": 50_000.0}, metrics={"enabled": False})  # fmt: skip
    look_after(config.kafka, topics("latency", partitions=1, replication=1), create=True)
    logs = [KafkaLog(config.kafka) for _ in range(3)]
    stopped = threading.Event()
    scoring = Scoring(config, logs[1])
    read: dict[tuple[str, int], float] = {}
    subscription = Subscription(logs[2], prefix="latency", since="earliest")

    def subscribe() -> None:
        for finding in subscription:
            if finding.activity == "create":
                read[finding.uid, round(finding.time.timestamp() * 1e9)] = time.perf_counter()

    threads = [threading.Thread(target=scoring.run, args=(stopped,)), threading.Thread(target=subscribe)]
    for thread in threads:
        thread.start()
    ended: dict[int, float] = {}
    due = time.perf_counter()
    for batch in sent:
        pane_ns = batch.time_ns // S * S
        ended.setdefault(pane_ns, time.perf_counter())
        logs[0].append(flows_topic("latency"), b"edge", batch.value)
        due += 0.5 / 8
        time.sleep(max(0.0, due - time.perf_counter()))
    time.sleep(2.0)
    subscription.close()
    stopped.set()
    for thread in threads:
        thread.join()
    scoring.close()
    for log in logs:
        log.close()
    seconds = sorted(at - ended[pane_ns] for (_, pane_ns), at in read.items() if pane_ns in ended)
    p99 = float(np.percentile(seconds, 99))
    return Row(
        name=f"pane's end to finding read by a subscriber, p99 of {len(seconds)}", value=p99, unit="s", bar="< 1 s",
        met=p99 < 1.0, reference="median", reference_value=float(np.median(seconds)),
    )  # fmt: skip


def scale(broker: Broker) -> Row:
    """Flows a second that one and two processes score, of two sites on two partitions of one topic."""
    rates = []
    for processes in (1, 2):
        prefix = f"scale{processes}"
        config = configured(broker, prefix, partitions=2, model={"threads": 2 // processes})
        log = KafkaLog(config.kafka)
        begin_ns = (time.time_ns() // S - 200) * S
        partitions = two_keys(log, flows_topic(prefix))
        count = sum(send(log, prefix, batches(20.0, begin_ns, f"site{n}", n), key) for n, key in enumerate(partitions))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "flowsage.toml"
            path.write_text(config.to_toml())
            command = [sys.executable, "-m", "flowsage.pipelines.cli", "score", "--config", str(path)]
            running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(processes)]
            seen = [wait_for_line(process, "reading from offset") for process in running]
            started = max(seen)
            ends = log.end_offsets(flows_topic(prefix))
            while True:
                committed = log.committed(config.score.group, flows_topic(prefix))
                if {n: Progress.of(c).next for n, c in committed.items()} == ends:
                    break
                time.sleep(0.1)
            rates.append(count * BATCH / (time.perf_counter() - started))
            for process in running:
                process.terminate()
                process.wait()
        log.close()
    return Row(
        name="two sites, scored by two processes", value=rates[1] / 1e6, unit="M/s", reference="by one",
        reference_value=rates[0] / 1e6,
    )  # fmt: skip


def two_keys(log: KafkaLog, topic: str) -> list[bytes]:
    """Partition keys of two partitions, each of which gets a record that is none."""
    keys: dict[int, bytes] = {}
    for n in range(100):
        partition, _ = log.append(topic, b"nobody", b"", partition_key=b"site%d" % n)
        keys.setdefault(partition, b"site%d" % n)
    return [keys[n] for n in sorted(keys)]


def wait_for_line(process: subprocess.Popen[str], text: str) -> float:
    """When a process says `text`; what it says after that is read and left."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return time.perf_counter()
    raise RuntimeError("the scorer has ended")


def rows() -> Iterator[Row]:
    """All of it."""
    with a_broker() as broker:
        yield to_closed_windows(broker)
        yield catch_up(broker)
        yield finding_latency(broker)
        yield scale(broker)
