"""Scoring on a real broker: killed, replaced, joined, poisoned; what an independent read_committed consumer reads is
what an undisturbed run finds, byte for byte."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import kafka
import pytest

from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.outcome import Progress
from flowsage.pipelines.scoring import Scoring
from flowsage.pipelines.settings import KafkaSettings, Settings
from flowsage.pipelines.state import SnapshotStore
from flowsage.pipelines.subscription import SEVERITIES, Subscription
from flowsage.pipelines.topics import anomalies_topic, dlq_topic, embeddings_topic, flows_topic, look_after, topics
from flowsage.pipelines.watch import since_of
from tests.broker import Broker
from tests.pipelines.flow_stream import START, Batch, memory, publish, read_all, settings, stream
from tests.pipelines.test_score import balanced, poison, site

GROUP = "flowsage-scorer"
LIVES, GRAPH_LIVES = 20, 8
"""A scorer with the graph takes longer to start."""


def configuration(broker: Broker, prefix: str, **sections: dict[str, object]) -> Settings:
    """The lab's, on this broker; a scorer that dies is missed after a second."""
    server = {"bootstrap_servers": broker.bootstrap, "prefix": prefix}
    return settings(**{"kafka": server, "metrics": {"enabled": False}, **sections,
                       "score": {"session_timeout": "1s"} | sections.get("score", {})})  # fmt: skip


def make_topics(config: KafkaSettings, partitions: int = 1) -> None:
    look_after(config, topics(config.prefix, partitions=partitions, replication=1), create=True)


@pytest.fixture
def log(broker: Broker) -> Iterator[KafkaLog]:
    log = KafkaLog(broker.settings())
    yield log
    log.close()


def independent(broker: Broker, topic: str) -> list[tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]]:
    """Key, value and headers of all that a plain kafka-python consumer reads, read_committed, in order a partition."""
    consumer = kafka.KafkaConsumer(
        bootstrap_servers=broker.bootstrap, isolation_level="read_committed", auto_offset_reset="earliest",
        enable_auto_commit=False, fetch_max_bytes=100 << 20, max_partition_fetch_bytes=70 << 20,
    )  # fmt: skip
    partitions = [kafka.TopicPartition(topic, n) for n in sorted(consumer.partitions_for_topic(topic) or ())]
    consumer.assign(partitions)
    consumer.seek_to_beginning()
    ends, found = consumer.end_offsets(partitions), []
    while any(consumer.position(p) < ends[p] for p in partitions):
        for records in consumer.poll(timeout_ms=500).values():
            found += [(r.key, r.value, list(r.headers)) for r in records]
    consumer.close()
    return found


def values(broker: Broker, topic: str) -> list[bytes | None]:
    return [value for _, value, _ in independent(broker, topic)]


def score_to_the_end(scoring: Scoring, log: KafkaLog, prefix: str) -> None:
    """Until everything that is in the topic is scored and committed."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        scoring.turn(0.2)
        # Before somebody takes over from one that stopped within a transaction, nobody can say what is committed.
        if scoring.seats and out_until(log, prefix) >= log.end_offsets(flows_topic(prefix))[0]:
            return
    raise AssertionError(f"not scored within 240 s: {scoring.snapshot()}")


def out_until(log: KafkaLog, prefix: str) -> int:
    return Progress.of(log.committed(GROUP, flows_topic(prefix)).get(0)).next


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """150 s that ended a moment ago: the broker stamps what it gets."""
    return stream(begin_ns=(time.time_ns() // 10**9 - 200) * 10**9)


@pytest.fixture(scope="module")
def undisturbed(broker: Broker, batches: list[Batch]) -> list[bytes | None]:
    """What one scorer finds that nothing happens to, on this broker; the same as over the log in memory."""
    config = configuration(broker, "undisturbed")
    make_topics(config.kafka)
    log = KafkaLog(config.kafka)
    publish(log, batches, prefix="undisturbed")
    scoring = Scoring(config, log)
    score_to_the_end(scoring, log, "undisturbed")
    assert balanced(site(scoring))
    assert site(scoring).counters.taken == len(batches)
    assert site(scoring).scorer.counters.consumed == sum(b.flows for b in batches)
    scoring.close()
    log.close()
    found = values(broker, anomalies_topic("undisturbed"))
    here, clock = memory()
    publish(here, batches, clock)
    other = Scoring(settings(), here)
    while other.turn(0.0):
        pass
    assert [value for _, value, _ in read_all(here, anomalies_topic("flowsage"))] == found
    assert len(found) >= 5
    return found


class Process:
    """`flowsage score` as a process of its own; what it says is there to be waited for."""

    def __init__(self, config: Settings, folder: Path, *options: str) -> None:
        path = folder / "flowsage.toml"
        path.write_text(config.to_toml())
        command = [sys.executable, "-m", "flowsage.pipelines.cli", "score", "--config", str(path), *options]
        self.said: list[str] = []
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.said.append(line.rstrip())

    def wait(self, until: Callable[[], bool], seconds: float = 120.0, pause_s: float = 0.005) -> None:
        """Until something is so; fails where the process ends or it takes too long."""
        deadline = time.monotonic() + seconds
        while not until():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("\n".join(self.said))
            time.sleep(pause_s)

    def says(self, text: str) -> bool:
        return any(text in line for line in self.said)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stopped_if(self, condition: Callable[[], bool]) -> bool:
        """Hold the process where it is if something is so, and still is when it has come to a halt."""
        if not condition():
            return False
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if condition():
            return True
        self._process.send_signal(signal.SIGCONT)
        return False

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def stop(self) -> int:
        """As the operator does; returns its exit code."""
        self._process.terminate()
        return self._process.wait(120)


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def unfinished(folder: Path) -> set[str]:
    """Snapshots that are being written, or were when the writer died."""
    return {name for name in names(folder) if name.startswith(".writing-")}


def kill_and_restart(
    config: Settings, log: KafkaLog, folder: Path, batches: list[Batch], lives: int
) -> tuple[int, int]:
    """So many scorers killed one after another, at moments of four kinds, while batches come; the last one ends as it
    should. Returns how many died while they wrote a snapshot, and how many went on from one."""
    rng, prefix = random.Random(20), config.kafka.prefix
    snapshots = Path(config.score.state) / GROUP / flows_topic(prefix) / "0"
    left, torn, restored = list(batches), 0, 0
    for life in range(lives):
        count = -(-len(left) // (lives - life))
        publish(log, left[:count], prefix=prefix)
        left = left[count:]
        before = names(snapshots)
        process = Process(config, folder)
        moment = ("written", "writing", "reading", "any")[life % 4]
        if moment == "any":
            time.sleep(rng.uniform(0.0, 2.0))
        else:
            process.wait(lambda process=process: process.says("reading from offset"))  # type: ignore[misc]
        if moment == "written":
            process.wait(lambda before=before: any(n.endswith(".json") for n in names(snapshots) - before))  # type: ignore[misc]
        if moment == "writing":
            until = time.monotonic() + 10
            process.wait(
                lambda process=process, before=before, until=until: (  # type: ignore[misc]
                    process.stopped_if(lambda: bool(unfinished(snapshots) - before)) or time.monotonic() > until
                ),
                pause_s=0.0,
            )
        else:
            time.sleep(rng.uniform(0.0, 0.4))
        process.kill()
        torn += bool(unfinished(snapshots) - before)
        restored += process.says("goes on from the snapshot")
    process = Process(config, folder)
    process.wait(lambda: out_until(log, prefix) >= log.end_offsets(flows_topic(prefix))[0])
    assert process.stop() == 0
    return torn, restored


def test_a_scorer_that_is_killed_twenty_times_leaves_the_findings_of_one_that_is_not(
    broker: Broker, log: KafkaLog, tmp_path: Path, batches: list[Batch], undisturbed: list[bytes | None]
) -> None:
    config = configuration(broker, "killed", score={"state": str(tmp_path / "state"), "snapshot_interval": "1s"})
    make_topics(config.kafka)
    torn, restored = kill_and_restart(config, log, tmp_path, batches, LIVES)
    assert values(broker, anomalies_topic("killed")) == undisturbed
    assert torn >= 1
    assert restored >= 5


def test_with_the_graph_too_a_scorer_that_is_killed_leaves_findings_and_embeddings_of_one_that_is_not(
    broker: Broker, log: KafkaLog, tmp_path: Path, batches: list[Batch]
) -> None:
    model: dict[str, object] = {"prior": "sage2-sketches", "ready_windows": 3, "ready_meetings": 10, "ready_steps": 1}
    score: dict[str, object] = {"snapshot_interval": "1s", "embeddings": True}
    here, clock = memory()
    publish(here, batches, clock)
    # Who saves embeds everybody anew, so he who is not disturbed saves too.
    alone = Scoring(settings(model=model, score=score), here, store=SnapshotStore(str(tmp_path / "alone")))
    while alone.turn(0.0):
        pass
    alone.close()
    config = configuration(broker, "graph", model=model, score=score | {"state": str(tmp_path / "state")})
    make_topics(config.kafka)
    torn, restored = kill_and_restart(config, log, tmp_path, batches, GRAPH_LIVES)
    for topic in (anomalies_topic, embeddings_topic):
        expected = [value for _, value, _ in read_all(here, topic("flowsage"))]
        assert len(expected) >= 5
        assert values(broker, topic("graph")) == expected
    assert torn >= 1
    assert restored >= 3


def test_a_zombie_that_wakes_up_is_fenced_and_joins_again(
    broker: Broker, log: KafkaLog, tmp_path: Path, batches: list[Batch], undisturbed: list[bytes | None]
) -> None:
    config = configuration(broker, "zombie")
    make_topics(config.kafka)
    half = len(batches) * 3 // 5
    publish(log, batches[:half], prefix="zombie")
    zombie = Process(config, tmp_path)
    try:
        zombie.wait(lambda: out_until(log, "zombie") > 0)
        zombie.send(signal.SIGSTOP)
        heir = Scoring(config, log)
        publish(log, batches[half:], prefix="zombie")
        score_to_the_end(heir, log, "zombie")
        assert values(broker, anomalies_topic("zombie")) == undisturbed
        zombie.send(signal.SIGCONT)
        # It comes back while the other works, and gets the partition when that leaves.
        heir.turn(2.0)
        heir.close()
        zombie.wait(lambda: sum("reading from offset" in line for line in zombie.said) >= 2)
        assert zombie.stop() == 0
    finally:
        zombie.kill()
    assert values(broker, anomalies_topic("zombie")) == undisturbed


def by_host(broker: Broker, topic: str) -> dict[bytes | None, list[bytes | None]]:
    found: dict[bytes | None, list[bytes | None]] = {}
    for key, value, _ in independent(broker, topic):
        found.setdefault(key, []).append(value)
    return found


def test_a_second_scorer_joins_and_leaves_and_nothing_is_found_twice_or_not_at_all(
    broker: Broker, tmp_path: Path
) -> None:
    begin_ns = (time.time_ns() // 10**9 - 200) * 10**9
    sites = [stream(seed=n, sensors=(name,), begin_ns=begin_ns) for n, name in enumerate(("east", "west"))]
    expected: dict[bytes | None, list[bytes | None]] = {}
    config = configuration(broker, "rebalanced", score={"snapshot_interval": "5s", "session_timeout": "15s"})
    make_topics(config.kafka, partitions=2)
    # One topic with a partition a site: keys that land on different ones.
    logs = [KafkaLog(config.kafka) for _ in range(3)]
    for n, of_site in enumerate(sites):
        here, clock = memory()
        publish(here, of_site, clock)
        alone = Scoring(settings(), here)
        while alone.turn(0.0):
            pass
        for key, value, _ in read_all(here, anomalies_topic("flowsage")):
            # Alone it was partition 0, here it is n.
            expected.setdefault(key, []).append(bytes_of(value).replace(b'"uid":"0-', b'"uid":"%d-' % n))
    store = SnapshotStore(str(tmp_path))
    scorers = [Scoring(config, logs[1], store=store)]
    stops = [threading.Event(), threading.Event()]
    threads = [threading.Thread(target=scorers[0].run, args=(stops[0],))]
    threads[0].start()
    count = len(sites[0])
    keys = site_keys(logs[0], flows_topic("rebalanced"))
    shares = []
    for k in range(0, count, 10):
        for n, of_site in enumerate(sites):
            for batch in of_site[k : k + 10]:
                logs[0].append(
                    flows_topic("rebalanced"), batch.origin.sensor.encode(), batch.value, partition_key=keys[n]
                )
        if k == 100:
            scorers.append(Scoring(config, logs[2], store=store))
            threads.append(threading.Thread(target=scorers[1].run, args=(stops[1],)))
            threads[1].start()
            wait_for(lambda: [len(s.seats) for s in scorers] == [1, 1])
        if k == 200:
            shares = [len(s.seats) for s in scorers]
            stops[1].set()
            threads[1].join()
            scorers[1].close()
            wait_for(lambda: len(scorers[0].seats) == 2)
    topic = flows_topic("rebalanced")
    ends = logs[0].end_offsets(topic)
    wait_for(lambda: {n: Progress.of(c).next for n, c in logs[0].committed(GROUP, topic).items()} == ends)
    stops[0].set()
    threads[0].join()
    scorers[0].close()
    assert shares == [1, 1]
    assert {k: sorted(map(bytes_of, v)) for k, v in by_host(broker, anomalies_topic("rebalanced")).items()} == {
        k: sorted(map(bytes_of, v)) for k, v in expected.items()
    }
    for log in logs:
        log.close()


def bytes_of(value: bytes | None) -> bytes:
    return value or b""


def site_keys(log: KafkaLog, topic: str) -> list[bytes]:
    """A partition key for each of two partitions."""
    found: dict[int, bytes] = {}
    for n in range(100):
        partition, _ = log.append(topic, b"nobody", b"", partition_key=b"site%d" % n)
        found.setdefault(partition, b"site%d" % n)
        if len(found) == 2:
            return [found[0], found[1]]
    raise AssertionError("one partition only")


def wait_for(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_poison_every_few_records_goes_to_the_dead_letters_and_the_stream_goes_on(
    broker: Broker, batches: list[Batch], undisturbed: list[bytes | None]
) -> None:
    config = configuration(broker, "poisoned")
    broker.create_topic(flows_topic("poisoned"), message_timestamp_type="LogAppendTime", max_message_bytes=64 << 20)
    make_topics(config.kafka)
    huge = random.Random(1).randbytes(50 << 20)
    bad = [*poison(max(batches, key=lambda b: b.flows)), huge]
    producer = kafka.KafkaProducer(bootstrap_servers=broker.bootstrap, max_request_size=64 << 20, acks="all")
    sent: list[bytes | None] = []
    for k, batch in enumerate(batches):
        if k % 8 == 0:
            value = bad[k // 8 % (len(bad) - 1)] if k != 80 else huge
            producer.send(flows_topic("poisoned"), value, b"edge")
            sent.append(value)
        producer.send(flows_topic("poisoned"), batch.value, b"edge")
    producer.flush()
    producer.close()
    log = KafkaLog(config.kafka)
    scoring = Scoring(config, log)
    score_to_the_end(scoring, log, "poisoned")
    assert site(scoring).counters.dead == len(sent)
    assert site(scoring).counters.consumed == len(sent) + len(batches)
    assert balanced(site(scoring))
    scoring.close()
    log.close()
    assert values(broker, anomalies_topic("poisoned")) == undisturbed
    dead = independent(broker, dlq_topic("poisoned"))
    assert len(dead) == len(sent)
    for (_, value, told), original in zip(dead, sent, strict=True):
        headers = dict(told)
        if original is huge:
            assert headers["dlq_truncated_from"] == str(len(huge)).encode()
            assert value == huge[: len(value or b"")]
        else:
            assert value == original
        assert headers["dlq_topic"] == flows_topic("poisoned").encode()
        assert headers["dlq_error"]


def test_sensors_with_clocks_an_hour_off_change_nothing_for_the_one_that_is_right(broker: Broker) -> None:
    windows = {"idle_timeout": "5s", "max_ahead": "60s", "max_behind": "60s"}
    config = configuration(broker, "clocks", windows=windows)
    # Times of appending that are told with the records, so that hours need not pass.
    broker.create_topic(flows_topic("clocks"), message_timestamp_type="CreateTime")
    make_topics(config.kafka)
    skew = {"ahead": 3600.0, "behind": -3600.0}
    streamed = stream(sensors=("right", "ahead", "behind"), skew_s=skew)
    producer = kafka.KafkaProducer(bootstrap_servers=broker.bootstrap)
    here, clock = memory()
    for batch in streamed:
        now_ms = batch.time_ns // 10**6 - int(skew.get(batch.origin.sensor, 0.0) * 1000)
        sensor = batch.origin.sensor.encode()
        producer.send(flows_topic("clocks"), batch.value, sensor, timestamp_ms=now_ms)
        clock.now_ns = now_ms * 10**6
        here.append(flows_topic("flowsage"), sensor, batch.value)
    producer.flush()
    producer.close()
    expected = Scoring(settings(windows=windows), here)
    while expected.turn(0.0):
        pass
    log = KafkaLog(config.kafka)
    scoring = Scoring(config, log)
    score_to_the_end(scoring, log, "clocks")
    truth = {s: sum(b.flows for b in streamed if b.origin.sensor == s) for s in ("right", "ahead", "behind")}
    buffer = site(scoring).scorer.buffer
    assert buffer.counters == site(expected).scorer.buffer.counters
    assert buffer.counters.future == truth["ahead"]
    assert buffer.counters.late > 0.7 * truth["behind"]
    assert buffer.counters.closed >= 0.95 * truth["right"]
    assert balanced(site(scoring))
    scoring.close()
    log.close()
    found = [value for _, value, _ in read_all(here, anomalies_topic("flowsage"))]
    assert found
    assert values(broker, anomalies_topic("clocks")) == found


def flowsage(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowsage.pipelines.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_watch_shows_a_line_a_finding_and_a_program_gets_objects(
    broker: Broker, log: KafkaLog, undisturbed: list[bytes | None]
) -> None:
    where = ("--kafka", broker.bootstrap, "--prefix", "undisturbed", "--since", "earliest", "--no-follow")
    lines = flowsage("watch", *where)
    assert lines.returncode == 0, lines.stderr
    assert len(lines.stdout.splitlines()) == len(undisturbed)
    assert "RAISED" in lines.stdout.splitlines()[0]
    assert flowsage("watch", *where, "--json").stdout.encode() == b"".join((v or b"") + b"\n" for v in undisturbed)
    detailed = flowsage("watch", *where, "--evidence", "--host", "10.77.0.25").stdout
    assert "10.77.0.23" not in [line.split()[2] for line in detailed.splitlines() if " RAISED " in line]
    assert "expected at most" in detailed
    assert flowsage("watch", *where, "--severity", "critical").stdout == ""
    assert flowsage("watch", *where[:4], "--since", "yesterday").returncode == 2
    with Subscription(log, prefix="undisturbed", since="earliest", follow=False) as findings:
        told = list(findings)
    raw = [json.loads(v or b"") for v in undisturbed]
    assert [f.ocsf for f in told] == raw
    assert [f.uid for f in told] == [r["finding_info"]["uid"] for r in raw]
    assert {f.activity for f in told} == {"create", "update", "close"}
    assert all(f.severity in SEVERITIES and f.host in f.hosts for f in told)
    created = next(f for f in told if f.activity == "create")
    assert created.evidence
    assert created.time > datetime.fromtimestamp(START / 1e9, UTC)


def test_a_subscription_waits_for_what_comes_and_ends_when_it_is_closed(
    broker: Broker, log: KafkaLog, undisturbed: list[bytes | None]
) -> None:
    make_topics(configuration(broker, "followed").kafka)
    topic = anomalies_topic("followed")
    old = undisturbed[0]
    log.append(topic, b"x", old)
    subscription = Subscription(KafkaLog(broker.settings()), prefix="followed", since="now")
    seen: list[str] = []

    def follow() -> None:
        with subscription as findings:
            seen.extend(finding.uid for finding in findings)

    thread = threading.Thread(target=follow)
    thread.start()
    log.append(topic, b"x", b"not a finding")
    log.append(topic, b"x", old)
    wait_for(lambda: len(seen) == 1)
    subscription.close()
    thread.join(120)
    assert not thread.is_alive()
    assert subscription.skipped == 1


def test_a_group_of_subscribers_goes_on_where_it_was(broker: Broker, undisturbed: list[bytes | None]) -> None:
    taken: list[str] = []
    for count in (2, len(undisturbed) - 2):
        log = KafkaLog(broker.settings())
        with Subscription(log, prefix="undisturbed", group="soc") as findings:
            for finding in findings:
                taken.append(finding.uid)
                if len(taken) == (2 if count == 2 else len(undisturbed) + 1):
                    findings.close()
        log.close()
    # The one that it was busy with when it left comes again.
    uids = [json.loads(v or b"")["finding_info"]["uid"] for v in undisturbed]
    assert taken == [*uids[:2], *uids[1:]]


def test_times_are_told_by_how_long_ago_or_by_the_clock() -> None:
    now = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
    assert since_of("2h", now) == datetime(2026, 11, 24, 10, 0, tzinfo=UTC)
    assert since_of("1.5d", now) == datetime(2026, 11, 23, 0, 0, tzinfo=UTC)
    assert since_of("2026-11-24T09:30", now) == datetime(2026, 11, 24, 9, 30, tzinfo=UTC)
    assert (since_of(None, now), since_of("earliest", now)) == ("now", "earliest")
