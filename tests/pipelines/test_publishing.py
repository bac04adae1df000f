"""A sensor and real brokers that die, hang, refuse and come back: every flow record is in the topic, or accounted for.

What is in the topic is counted by a plain kafka-python consumer that knows nothing of ours but the headers.
"""

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import kafka
import pyarrow as pa
import pytest

from flowsage.collector.errors import LogError, LogUnavailableError, RecordTooLargeError
from flowsage.collector.publish import Publisher
from flowsage.collector.records import packets_in
from flowsage.collector.sink import Origin
from flowsage.collector.spool import Spool
from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.settings import KafkaSettings
from flowsage.pipelines.topics import flows_topic, look_after, topics
from tests.broker import PASSWORD, Broker, make_brokers
from tests.collector.test_publish import batch, noise
from tests.collector.wires import Wire, eventually, start_blast, wire

ROWS = 200
PATIENCE_S = 0.3
TIMEOUT_S = 10.0
"""How long the log tries, far longer than the sensor may wait for it, on a busy machine too."""


class Sensor:
    """A publisher to Kafka, and the batches that an agent would hand it."""

    def __init__(
        self, settings: KafkaSettings, topic: str, spool: Path, *, boot: str = "b00t", timeout_s: float = TIMEOUT_S
    ) -> None:
        self.log = KafkaLog(settings, timeout_s=timeout_s)
        self.publisher = Publisher(
            self.log, sensor="edge", site="here", topic=topic, spool=Spool(spool), retry_s=0.2, patience_s=PATIENCE_S
        ).start()
        self.boot, self.sequence = boot, 0
        self.slowest_s = 0.0

    def put(self, rows: int = ROWS, *, make: Callable[[int, int], pa.RecordBatch] = batch) -> None:
        origin = Origin(sensor="edge", boot=self.boot, sequence=self.sequence, watermark_ns=0)
        data = make(rows, ROWS * self.sequence)
        started = time.monotonic()
        self.publisher.put(data, origin)
        self.slowest_s = max(self.slowest_s, time.monotonic() - started)
        self.sequence += 1

    def put_until(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """A batch every few milliseconds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline
            self.put()
            time.sleep(0.005)

    def settle(self, timeout_s: float = 120) -> None:
        """Until nothing waits."""
        self.wait_for(lambda: self.publisher.counts.pending == 0, timeout_s)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.publisher.counts
            time.sleep(0.01)

    def close(self) -> None:
        self.publisher.close()
        self.log.close()


def arrivals(bootstrap: str, topic: str, **security: object) -> Iterator[tuple[str, int, pa.Table]]:
    """What an independent reader finds, repeats left out: boot, number and flows of each batch.

    Batches have to be in order and whole: repeats of earlier ones aside, numbers go up by one.
    """
    consumer = kafka.KafkaConsumer(
        bootstrap_servers=bootstrap, isolation_level="read_committed", enable_auto_commit=False, **security
    )
    parts = [kafka.TopicPartition(topic, n) for n in sorted(consumer.partitions_for_topic(topic))]
    consumer.assign(parts)
    consumer.seek_to_beginning(*parts)
    ends = consumer.end_offsets(parts)
    following: dict[str, int] = {}
    while any(consumer.position(p) < ends[p] for p in parts):
        for record in itertools.chain.from_iterable(consumer.poll(timeout_ms=1000).values()):
            boot, _, number = dict(record.headers)["ce_id"].decode().partition("/")
            expected = following.setdefault(boot, 0)
            assert record.key == b"edge"
            assert int(number) <= expected, f"batch {expected} of {boot} is missing before {number}"
            if int(number) == expected:
                following[boot] += 1
                with pa.ipc.open_stream(record.value) as reader:
                    yield boot, expected, reader.read_all()
    consumer.close()


def audit(bootstrap: str, topic: str, **security: object) -> dict[str, list[int]]:
    """How many flows are in each batch of each boot; they are the flows that `Sensor.put` made."""
    found: dict[str, list[int]] = {}
    for boot, number, table in arrivals(bootstrap, topic, **security):
        found.setdefault(boot, []).append(len(table))
        assert table["start_ns"].to_pylist() == list(range(ROWS * number, ROWS * number + len(table)))
    return found


def topic_of(broker: Broker, copies: int = 1, **configs: object) -> str:
    return broker.create_topic(f"test-{uuid.uuid4().hex}", 3, copies, **configs)


@pytest.fixture(scope="module")
def mortal(kafka_jars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker that tests may kill, and that they leave running."""
    [broker] = make_brokers(kafka_jars, tmp_path_factory.mktemp("mortal"))
    try:
        yield broker.start()
    finally:
        broker.kill()


def test_a_broker_that_is_killed_and_comes_back_gets_every_batch_in_order(mortal: Broker, tmp_path: Path) -> None:
    topic = topic_of(mortal)
    sensor = Sensor(mortal.settings(), topic, tmp_path)
    sensor.put_until(lambda: sensor.publisher.counts.acknowledged > 20 * ROWS)
    mortal.kill()
    sensor.put_until(lambda: sensor.publisher.counts.pending > 100 * ROWS)
    mortal.start(wait=False)
    sensor.put_until(lambda: sensor.publisher.counts.pending == 0)
    sensor.put()
    sensor.settle()
    counts = sensor.publisher.counts
    sensor.close()
    assert counts.acknowledged == counts.handed == sensor.sequence * ROWS
    assert (counts.lost, counts.balance) == ({}, 0)
    assert sensor.slowest_s < TIMEOUT_S - 2, "the outage held the sensor up for longer than it is patient"
    assert audit(mortal.bootstrap, topic) == {"b00t": [ROWS] * sensor.sequence}


def test_a_broker_that_is_not_there_at_first_is_waited_for_and_then_gets_everything(
    mortal: Broker, tmp_path: Path
) -> None:
    topic = topic_of(mortal)
    mortal.kill()
    sensor = Sensor(mortal.settings(), topic, tmp_path)
    sensor.put_until(lambda: sensor.publisher.counts.failures > 0)
    assert sensor.publisher.counts.acknowledged == 0
    assert sensor.slowest_s < TIMEOUT_S - 2, "nobody waits for a broker that is not there"
    mortal.start()
    sensor.settle()
    counts = sensor.publisher.counts
    sensor.close()
    assert (counts.acknowledged, counts.lost, counts.balance) == (sensor.sequence * ROWS, {}, 0)
    assert audit(mortal.bootstrap, topic) == {"b00t": [ROWS] * sensor.sequence}


KILLED = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from pathlib import Path
    from flowsage.pipelines.settings import KafkaSettings
    from tests.pipelines.test_publishing import Sensor

    sensor = Sensor(KafkaSettings(bootstrap_servers=(sys.argv[2],)), sys.argv[3], Path(sys.argv[4]), boot="first")
    for n in range(10**6):
        sensor.put()
        print(n, flush=True)
"""


def test_a_sensor_that_is_killed_with_batches_on_disk_is_followed_by_one_that_sends_them_first(
    mortal: Broker, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    topic = topic_of(mortal)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(request.config.rootpath), mortal.bootstrap]
    process = subprocess.Popen([*command, topic, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for line in process.stdout:
        if int(line) == 100:
            mortal.kill()
        if int(line) > 100 and len(list(tmp_path.glob("*.arrows"))) > 210:
            process.kill()
            break
    taken = [int(line), *map(int, process.stdout.read().split())][-1] + 1
    process.wait()
    process.stdout.close()
    successor = Sensor(mortal.settings(), topic, tmp_path, boot="second")
    resumed = successor.publisher.counts.resumed
    assert resumed > 200 * ROWS
    # The last one may have been taken, and the sensor killed before it said so.
    assert successor.publisher.last_sequence("first") in (taken - 1, taken)
    successor.put()
    mortal.start()
    successor.settle()
    counts = successor.publisher.counts
    successor.close()
    assert (counts.acknowledged, counts.lost, counts.balance) == (resumed + ROWS, {}, 0)
    found = audit(mortal.bootstrap, topic)
    assert found["second"] == [ROWS]
    assert found["first"] in ([ROWS] * taken, [ROWS] * (taken + 1))


COLLECTED = """
    import json, sys
    from pathlib import Path
    from flowsage.collector.agent_settings import AgentSettings
    from flowsage.collector.collect import collect
    from flowsage.pipelines.config import load
    from flowsage.pipelines.sensor import kafka_publisher

    told = json.loads(sys.argv[1])
    agent = AgentSettings(
        name="edge", interfaces=(told["port"],), netns=told["netns"], pins=Path(told["pins"]), table_entries=65_536,
        ring_bytes=4 << 20, idle_timeout=200_000_000, poll_interval=10_000_000, sweep_interval=50_000_000,
    )
    settings = load(None, {"sensor": {"name": "edge"}, "kafka": told["kafka"]})
    with kafka_publisher(settings) as publisher:
        ledger = collect(agent, publisher, on_ready=lambda _: print("ready", file=sys.stderr, flush=True))
    print(ledger.to_json())
"""


def test_packets_of_a_sensor_that_is_killed_during_an_outage_are_all_in_the_topic_once(
    mortal: Broker, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = f"test-{uuid.uuid4().hex}"
    look_after(mortal.settings(), topics(name), create=True)
    flows, each = 4_000, 15
    pins = Path(f"/sys/fs/bpf/fskafka{os.getpid()}")

    def start(cable: Wire) -> subprocess.Popen[str]:
        where = {"bootstrap_servers": mortal.bootstrap, "prefix": name, "spool": str(tmp_path)}
        told = json.dumps({"port": cable.port, "netns": cable.near, "pins": str(pins), "kafka": where})
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(COLLECTED), told],
            cwd=request.config.rootpath,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr
        assert "ready\n" in iter(process.stderr.readline, "")
        return process

    with wire() as cable:
        process = start(cable)
        blast = start_blast(cable, flows=flows, packets=flows * each, rate=10_000)
        log = KafkaLog(mortal.settings())
        eventually(lambda: any(log.end_offsets(flows_topic(name)).values()))
        log.close()
        mortal.kill()
        eventually(lambda: len(list(tmp_path.glob("*.arrows"))) > 5)
        process.kill()
        process.communicate()
        process = start(cable)
        assert blast.stdout
        sent = int(blast.stdout.read())
        blast.stdout.close()
        blast.wait()
        mortal.start()
        eventually(lambda: not list(tmp_path.glob("*.arrows")), 120)
        process.terminate()
        out, said = process.communicate(timeout=120)
    ledger = json.loads(out)
    assert process.returncode == 0, said
    assert sent == flows * each == ledger["packets"] == ledger["delivered"]["packets"]
    assert (ledger["balance"], ledger["records_balance"], ledger["records"]["pending"]) == (0, 0, 0)
    assert not any(ledger["records"]["lost"].values())
    assert sum(packets_in(table) for _, _, table in arrivals(mortal.bootstrap, flows_topic(name))) == sent


def test_a_broker_that_accepts_and_says_nothing_holds_the_sensor_up_no_longer_than_it_is_patient(
    mortal: Broker, tmp_path: Path
) -> None:
    topic = topic_of(mortal)
    sensor = Sensor(mortal.settings(), topic, tmp_path)
    sensor.put_until(lambda: sensor.publisher.counts.acknowledged > 10 * ROWS)
    mortal.signal(signal.SIGSTOP)
    try:
        sensor.put_until(lambda: sensor.publisher.counts.pending > 200 * ROWS)
    finally:
        mortal.signal(signal.SIGCONT)
    sensor.settle()
    counts = sensor.publisher.counts
    sensor.close()
    assert sensor.slowest_s < TIMEOUT_S - 2
    assert (counts.acknowledged, counts.lost, counts.balance) == (sensor.sequence * ROWS, {}, 0)
    assert audit(mortal.bootstrap, topic) == {"b00t": [ROWS] * sensor.sequence}


def test_a_batch_that_the_topic_does_not_take_is_a_named_loss_and_the_others_go_on(
    broker: Broker, tmp_path: Path
) -> None:
    topic = topic_of(broker, max_message_bytes=20_000)
    sensor = Sensor(broker.settings(), topic, tmp_path)
    sensor.put()
    sensor.put(1000, make=noise)
    sensor.settle()
    sensor.put()
    sensor.put(1000, make=noise)
    sensor.put()
    sensor.settle()
    counts = sensor.publisher.counts
    assert counts.lost == {"too large for the log": 2000}
    assert (counts.acknowledged, counts.balance) == (3 * ROWS, 0)
    with pytest.raises(RecordTooLargeError, match="no record of this size"):
        sensor.log.append(topic, b"edge", os.urandom(30_000))
    sensor.close()


def test_a_topic_that_does_not_exist_is_said_to_be_missing_and_is_not_made_by_accident(broker: Broker) -> None:
    log = KafkaLog(broker.settings(), timeout_s=1.5)
    with pytest.raises(LogUnavailableError, match="flowsage topics --create"):
        log.append("no-such-topic", b"k", b"v")
    with pytest.raises(LogUnavailableError, match="flowsage topics --create"):
        log.end_offsets("no-such-topic")
    log.close()
    with kafka.KafkaAdminClient(bootstrap_servers=broker.bootstrap) as admin:
        assert "no-such-topic" not in admin.list_topics()


FAILING = """
    import gc, os, threading
    from flowsage.collector.errors import LogUnavailableError
    from flowsage.pipelines.settings import KafkaSettings
    from flowsage.pipelines.kafka import KafkaLog

    def held():
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    log = KafkaLog(KafkaSettings(bootstrap_servers=("127.0.0.1:1",)), timeout_s=1)
    calls = [lambda: log.append("t", b"k", b"v"), lambda: log.consumer("g", "t"), lambda: log.end_offsets("t")]
    before = held()
    for call in calls:
        try:
            call()
        except LogUnavailableError as error:
            print(error)
    print(before, held())
"""


def test_attempts_that_fail_say_why_and_leave_nothing_behind() -> None:
    # In a process of its own: pytest keeps what is logged, and with it errors, and with them sockets.
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(FAILING)], capture_output=True, text=True, check=True)
    *errors, held = done.stdout.splitlines()
    assert len(errors) == 3
    assert all(
        e.startswith("no broker answers at 127.0.0.1:1 (KafkaConnectionError: 111 ECONNREFUSED)") for e in errors
    )
    before, after = held.split(") (")
    assert before.strip("()") == after.strip("()")


def test_over_tls_with_scram_everything_arrives_and_the_secret_is_in_no_message(
    broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    topic = topic_of(broker)
    sensor = Sensor(broker.tls_settings(), topic, tmp_path / "right")
    for _ in range(20):
        sensor.put()
    sensor.settle()
    counts = sensor.publisher.counts
    assert (counts.acknowledged, counts.lost, counts.balance) == (20 * ROWS, {}, 0)
    assert sensor.log.end_offsets(topic)
    sensor.close()
    wrong = "wr0ng-and-secret"
    refused = Sensor(broker.tls_settings(sasl_plain_password=wrong), topic, tmp_path / "wrong", timeout_s=1.5)
    refused.put()
    refused.wait_for(lambda: refused.publisher.counts.failures > 0)
    assert (refused.publisher.counts.pending, refused.publisher.counts.balance) == (ROWS, 0)
    refused.close()
    # kafka-python throws the refusal away where the end of the connection has come with it, which is chance.
    log, said = KafkaLog(broker.tls_settings(sasl_plain_password=wrong), timeout_s=1.5), ""
    for _ in range(80):
        with pytest.raises(LogError) as raised:
            log.append(topic, b"k", b"v")
        said = str(raised.value)
        assert "settings for TLS and SASL" in said or "settings for SASL" in said
        if "refuses us" in said:
            break
    log.close()
    assert "refuses us" in said
    untrusted = KafkaLog(broker.tls_settings(ssl_cafile=""), timeout_s=1)
    with pytest.raises(LogUnavailableError, match="settings for TLS"):
        untrusted.append(topic, b"k", b"v")
    untrusted.close()
    security = broker.tls_settings().client()
    servers = security.pop("bootstrap_servers")
    assert audit(servers, topic, **security) == {"b00t": [ROWS] * 20}
    assert PASSWORD not in caplog.text
    assert wrong not in caplog.text


def test_of_three_brokers_one_may_die_and_while_two_are_gone_batches_wait(kafka_jars: Path, tmp_path: Path) -> None:
    brokers = make_brokers(kafka_jars, tmp_path / "brokers", 3)
    try:
        for broker in brokers:
            broker.start(wait=False)
        for broker in brokers:
            broker.wait()
        topic = topic_of(brokers[0], 3, min_insync_replicas=2)
        settings = brokers[0].settings(bootstrap_servers=tuple(b.bootstrap for b in brokers))
        sensor = Sensor(settings, topic, tmp_path / "spool")
        sensor.put_until(lambda: sensor.publisher.counts.acknowledged > 20 * ROWS)
        [where] = {n for n, end in sensor.log.end_offsets(topic).items() if end}
        with kafka.KafkaAdminClient(bootstrap_servers=settings.client()["bootstrap_servers"]) as admin:
            [described] = admin.describe_topics([topic])
        leader = next(p["leader_id"] for p in described["partitions"] if p["partition_index"] == where)
        brokers[leader - 1].kill()
        before = sensor.publisher.counts.acknowledged
        sensor.put_until(lambda: sensor.publisher.counts.acknowledged > before + 100 * ROWS)
        sensor.settle()
        second = brokers[leader % 3]
        second.kill()
        sensor.put_until(lambda: sensor.publisher.counts.pending > 100 * ROWS)
        second.start(wait=False)
        brokers[leader - 1].start(wait=False)
        sensor.settle()
        counts = sensor.publisher.counts
        sensor.close()
        assert (counts.acknowledged, counts.lost, counts.balance) == (sensor.sequence * ROWS, {}, 0)
        assert audit(brokers[leader % 3].bootstrap, topic) == {"b00t": [ROWS] * sensor.sequence}
    finally:
        for broker in brokers:
            broker.kill()
