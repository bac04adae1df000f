"""The topics: their names, how they are made, and whether those that are there are as they should be.

Flow batches are stamped by the brokers when they arrive, so that every reader sees the same arrival times, and
partitioned by site, so that whoever scores a site sees all of it. Everything else has a partition of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowsage.collector.errors import LogError
from flowsage.pipelines.settings import KafkaSettings

if TYPE_CHECKING:
    from kafka import KafkaAdminClient

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
PARTITIONS = 8
"""Of the flows, where nobody says how many."""
FLOWS_RECORD_BYTES = 16 << 20
"""The largest flow batch that the topic takes; a dead letter is that with its headers."""


def flows_topic(prefix: str) -> str:
    """Flow batches."""
    return f"{prefix}.flows.v1"


def anomalies_topic(prefix: str) -> str:
    """Findings."""
    return f"{prefix}.anomalies.v1"


def embeddings_topic(prefix: str) -> str:
    """Host embeddings a window."""
    return f"{prefix}.embeddings.v1"


def dlq_topic(prefix: str) -> str:
    """What could not be read."""
    return f"{prefix}.flows.v1.dlq"


@dataclass(frozen=True)
class Topic:
    """A topic as it should be.

    partitions     0: as many as it has, and PARTITIONS where it is made
    replication    0: three, or as many brokers as there are
    """

    name: str
    partitions: int
    replication: int
    configs: dict[str, str]


def topics(
    prefix: str,
    *,
    partitions: int = PARTITIONS,
    replication: int = 0,
    flows_retention_ms: int = DAY_MS,
    findings_retention_ms: int = 365 * DAY_MS,
) -> list[Topic]:
    """All four.

    partitions               of the flows: as many sites as may ever be scored apart (to add some later moves sites)
    flows_retention_ms       what a scorer without a snapshot warms up on
    findings_retention_ms    every finding is kept for 30 days, and the latest of each host for so long
    """
    return [
        Topic(
            flows_topic(prefix),
            partitions,
            replication,
            {
                "cleanup.policy": "delete",
                "retention.ms": str(flows_retention_ms),
                "message.timestamp.type": "LogAppendTime",
                "max.message.bytes": str(FLOWS_RECORD_BYTES),
                # They are compressed as they come.
                "compression.type": "producer",
            },
        ),
        Topic(
            anomalies_topic(prefix),
            1,
            replication,
            {
                "cleanup.policy": "compact,delete",
                "min.compaction.lag.ms": str(min(30 * DAY_MS, findings_retention_ms)),
                "retention.ms": str(findings_retention_ms),
                # What every client can read; kafka-python needs more for zstd.
                "compression.type": "gzip",
            },
        ),
        Topic(
            embeddings_topic(prefix),
            1,
            replication,
            {"cleanup.policy": "delete", "retention.ms": str(DAY_MS), "max.message.bytes": str(FLOWS_RECORD_BYTES)},
        ),
        Topic(
            dlq_topic(prefix),
            1,
            replication,
            {
                "cleanup.policy": "delete",
                "retention.ms": str(14 * DAY_MS),
                "max.message.bytes": str(FLOWS_RECORD_BYTES + (1 << 20)),
            },
        ),
    ]


@dataclass(frozen=True)
class Report:
    """What is, or would be, done about a topic, and in what it differs from what it should be."""

    topic: Topic
    there: bool
    created: bool
    differences: tuple[str, ...] = ()

    def __str__(self) -> str:
        t = self.topic
        if self.there:
            return f"{t.name}: {'as it should be' if not self.differences else '; '.join(self.differences)}"
        what = "created" if self.created else "would be created"
        values = ", ".join(f"{k}={v}" for k, v in t.configs.items())
        return f"{t.name}: {what} with {t.partitions} partitions, {t.replication} replicas, {values}"


@contextmanager
def _admin(settings: KafkaSettings, timeout_s: float) -> Iterator[KafkaAdminClient]:
    from kafka import KafkaAdminClient

    from flowsage.pipelines.kafka_client import connect, translating

    client = settings.client() | {"bootstrap_timeout_ms": int(timeout_s * 1000)}
    with translating("cannot look after the topics"), connect(KafkaAdminClient, client) as admin:
        yield admin


def look_after(
    settings: KafkaSettings, wanted: list[Topic], *, create: bool = False, timeout_s: float = 30.0
) -> list[Report]:
    """Check the topics that are there, and make those that are not (`create`), or say how they would be made.

    Existing topics are never changed. Raises LogError where the brokers refuse.
    """
    with _admin(settings, timeout_s) as admin:
        known = {t["name"]: t for t in admin.describe_topics() if not t.get("error_code")}
        brokers = len(admin.describe_cluster()["brokers"])
        reports = []
        for unsized in wanted:
            found = known.get(unsized.name)
            topic = _sized(unsized, brokers, PARTITIONS if found is None else len(found["partitions"]))
            if found is not None:
                reports.append(Report(topic, True, False, tuple(_differences(admin, topic, found))))
                continue
            _create(admin, topic, validate_only=not create)
            reports.append(Report(topic, False, create))
        return reports


def _sized(topic: Topic, brokers: int, partitions: int) -> Topic:
    replication = topic.replication or min(3, brokers)
    configs = topic.configs | {"min.insync.replicas": str(max(1, replication - 1))}
    return Topic(topic.name, topic.partitions or partitions, replication, configs)


def _create(admin: KafkaAdminClient, topic: Topic, *, validate_only: bool) -> None:
    from kafka import errors

    values = {
        "num_partitions": topic.partitions,
        "replication_factor": topic.replication,
        "configs": topic.configs,
    }
    try:
        admin.create_topics({topic.name: values}, validate_only=validate_only, wait_for_metadata=not validate_only)
    except errors.TopicAlreadyExistsError:
        return
    except errors.BrokerResponseError as error:
        raise LogError(f"topic {topic.name} cannot be created: {error}") from error


def _differences(admin: KafkaAdminClient, topic: Topic, found: dict[str, Any]) -> Iterator[str]:
    from kafka.admin import ConfigResource

    partitions = found["partitions"]
    if len(partitions) != topic.partitions:
        yield f"{len(partitions)} partitions, should be {topic.partitions}"
    replicas = min(len(p["replica_nodes"]) for p in partitions)
    if replicas != topic.replication:
        yield f"{replicas} replicas, should be {topic.replication}"
    described = admin.describe_configs([ConfigResource("TOPIC", topic.name)], config_filter="all")
    values = {name: config["value"] for name, config in described["topic"][topic.name].items()}
    for name, value in topic.configs.items():
        if set(str(values.get(name)).split(",")) != set(value.split(",")):
            yield f"{name} is {values.get(name)}, should be {value}"
