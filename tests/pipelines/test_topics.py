"""Topics are made as they should be, and those that are there are compared with that."""

import uuid

import pytest
from click.testing import CliRunner

from flowsage.collector.errors import LogError
from flowsage.pipelines.cli import main
from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.topics import flows_topic, look_after, topics
from tests.broker import Broker


def prefix() -> str:
    return f"test-{uuid.uuid4().hex}"


def test_topics_are_described_made_and_then_found_as_they_should_be(broker: Broker) -> None:
    name = prefix()
    arguments = ["topics", "--kafka", broker.bootstrap, "--prefix", name, "--partitions", "3"]
    dry = CliRunner().invoke(main, [*arguments, "--create", "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert f"{name}.flows.v1: would be created with 3 partitions, 1 replicas" in dry.stdout
    assert "message.timestamp.type=LogAppendTime" in dry.stdout
    made = CliRunner().invoke(main, [*arguments, "--create"])
    assert made.exit_code == 0, made.output
    lines = made.stdout.splitlines()
    assert [line.partition(": ")[0].removeprefix(name) for line in lines] == [
        ".flows.v1",
        ".anomalies.v1",
        ".embeddings.v1",
        ".flows.v1.dlq",
    ]
    assert all(": created with" in line for line in lines)
    again = CliRunner().invoke(main, [*arguments, "--create"])
    assert [line.partition(": ")[2] for line in again.stdout.splitlines()] == ["as it should be"] * 4
    assert set(KafkaLog(broker.settings()).end_offsets(flows_topic(name))) == {0, 1, 2}


def test_what_differs_is_told_and_left_alone(broker: Broker) -> None:
    name = prefix()
    broker.create_topic(flows_topic(name), partitions=2, retention_ms=1000)
    [report] = look_after(broker.settings(), topics(name, partitions=4)[:1], create=True)
    assert report.differences[:2] == ("2 partitions, should be 4", "retention.ms is 1000, should be 86400000")
    assert any("message.timestamp.type is CreateTime, should be LogAppendTime" in d for d in report.differences)
    [again] = look_after(broker.settings(), topics(name, partitions=4)[:1])
    [unsaid] = look_after(broker.settings(), topics(name, partitions=0)[:1])
    assert unsaid.differences == report.differences[1:], "nobody has said how many partitions there should be"
    assert again == report


def test_arrival_times_are_the_brokers(broker: Broker) -> None:
    [wanted, *_] = topics(prefix())
    look_after(broker.settings(), [wanted], create=True)
    log = KafkaLog(broker.settings())
    producer = log.new_producer()
    producer.send(wanted.name, b"x", b"sensor", timestamp_ms=1_000).get(10)
    producer.close()
    reader = log.consumer(None, wanted.name)
    [record] = reader.poll(1, 10)
    assert record.timestamp_ns > 1_700_000_000 * 10**9
    reader.close()
    log.close()


def test_brokers_that_refuse_or_are_not_there_are_one_clear_sentence(broker: Broker) -> None:
    with pytest.raises(LogError, match="cannot be created"):
        look_after(broker.settings(), topics(prefix(), replication=9)[:1], create=True)
    nobody = CliRunner().invoke(main, ["topics", "--kafka", "127.0.0.1:1", "--timeout", "1"])
    assert nobody.exit_code == 1
    assert "no broker answers at 127.0.0.1:1" in nobody.stderr
    missing = CliRunner().invoke(main, ["topics"])
    assert missing.exit_code == 2
    assert "--kafka" in missing.stderr
