"""What scoring the records of a partition comes to: what is to be published, and how far that is out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from flowsage.collector.sink import Headers
from flowsage.models.finding import Finding
from flowsage.pipelines.embeddings import embedding_records
from flowsage.pipelines.findings import at_site, event_uid, to_json
from flowsage.pipelines.log import Committed, LogRecord, Transaction
from flowsage.pipelines.topics import anomalies_topic, dlq_topic, embeddings_topic

PROGRESS_VERSION = 1
DEAD_BYTES = 8 << 20
"""A dead letter keeps so much of a record; what is longer is no batch of ours."""


@dataclass(frozen=True)
class DeadLetter:
    """A record that cannot be read, and why."""

    record: LogRecord
    error: str

    def message(self) -> tuple[bytes | None, bytes | None, Headers]:
        """Key, value and headers: the record's own, and where it was and what is wrong with it."""
        record = self.record
        value: bytes | None = record.value
        headers: list[tuple[str, bytes]] = [
            *record.headers,
            ("dlq_topic", record.topic.encode()),
            ("dlq_partition", b"%d" % record.partition),
            ("dlq_offset", b"%d" % record.offset),
            ("dlq_timestamp", b"%d" % (record.timestamp_ns // 10**6)),
            ("dlq_error", self.error.encode()),
        ]
        if value is not None and len(value) > DEAD_BYTES:
            headers.append(("dlq_truncated_from", b"%d" % len(value)))
            value = value[:DEAD_BYTES]
        return record.key, value, headers


@dataclass
class Outcome:
    """What is to be published: findings, dead letters, embeddings if wanted."""

    findings: list[Finding] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)
    embeddings: list[pa.RecordBatch] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.findings or self.dead or self.embeddings)

    def extend(self, other: Outcome) -> None:
        """What came after, to be published with it."""
        self.findings += other.findings
        self.dead += other.dead
        self.embeddings += other.embeddings

    def write(self, transaction: Transaction, prefix: str, site: int) -> None:
        """Append it all, each to its topic, as of a site: a partition of the flows' topic."""
        for finding in (at_site(found, site) for found in self.findings):
            value = to_json(finding).encode()
            transaction.append(anomalies_topic(prefix), finding.host.encode(), value, _headers(finding))
        for dead in self.dead:
            transaction.append(dlq_topic(prefix), *dead.message())
        for record in embedding_records(self.embeddings, site):
            transaction.append(embeddings_topic(prefix), *record)


@dataclass(frozen=True)
class Progress:
    """What a commit says beside its offset: findings of panes that end until `pane_ns` are out, what the windows that
    closed then gave (until `windows_ns`), and dead letters of records before `next`."""

    pane_ns: int = -1
    windows_ns: int = -1
    next: int = 0

    def metadata(self) -> str:
        """As the metadata of a commit."""
        return json.dumps({"v": PROGRESS_VERSION, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def of(cls, committed: Committed | None) -> Progress:
        """What was committed; without a commit, or one of somebody else's, nothing is out."""
        if committed is None:
            return cls()
        try:
            told = json.loads(committed.metadata)
            return cls(int(told["pane_ns"]), int(told["windows_ns"]), int(told["next"]))
        except (ValueError, KeyError, TypeError):
            return cls(next=committed.offset)


def _headers(finding: Finding) -> Headers:
    """CloudEvents headers (binary content mode) of a finding."""
    return [
        ("ce_specversion", b"1.0"),
        ("ce_id", event_uid(finding).encode()),
        ("ce_type", b"flowsage.anomalies.v1"),
        ("ce_source", b"/flowsage/scorer"),
        ("ce_dataschema", b"urn:flowsage:anomalies:1"),
        ("content-type", b"application/json"),
    ]
