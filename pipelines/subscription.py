"""Follow the anomalies' topic from a program: findings as objects, as they come.

    from flowsage.pipelines import subscribe

    with subscribe("kafka1:9092", severity="medium") as findings:
        for finding in findings:
            print(finding.time, finding.host, finding.title, finding.sentence)

Needs no model: what a sensor installs is enough. A finding comes more than once: created, updated when it gets worse,
closed; `uid` stays the same.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, Self

from flowsage.collector.errors import ConfigurationError, LogUnavailableError
from flowsage.pipelines.log import Consumer, Log, LogRecord
from flowsage.pipelines.topics import anomalies_topic

logger = logging.getLogger(__name__)

SEVERITIES = ("unknown", "informational", "low", "medium", "high", "critical")
"""By OCSF severity_id."""
ACTIVITIES: Mapping[int, Literal["create", "update", "close"]] = {1: "create", 2: "update", 3: "close"}
POLL_S = 0.2
RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class FlowEvidence:
    """One piece of what made a finding: `observed` beside what was to be `expected`, in `unit`."""

    name: str
    source: str
    destination: str | None
    """None: several."""
    service: str | None
    protocol: str | None
    community_id: str | None
    """Community ID v1, where it is one flow: finds it in Zeek's and Suricata's logs."""
    observed: float
    expected: float
    unit: str
    flows: int
    first_seen: datetime
    last_seen: datetime
    text: str
    """What it adds, for a person."""
    facts: Mapping[str, Any]
    """What the model holds of it: rank among possible peers, what speaks against it, the period of a beat."""

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> FlowEvidence:
        """From an OCSF evidence object."""
        data, connection = raw["data"], raw.get("connection_info", {})
        return cls(
            name=raw["name"],
            source=_name(raw["src_endpoint"]),
            destination=_name(raw["dst_endpoint"]) if "dst_endpoint" in raw else None,
            service=data.get("service"),
            protocol=connection.get("protocol_name"),
            community_id=connection.get("community_uid"),
            observed=data["observed"],
            expected=data["expected"],
            unit=data["unit"],
            flows=data["flows"],
            first_seen=_time(data["first_seen_time"]),
            last_seen=_time(data["last_seen_time"]),
            text=data.get("text", ""),
            facts=data.get("facts", {}),
        )


@dataclass(frozen=True, slots=True)
class DetectionFinding:
    """One change in the life of a finding. Times are UTC; `ocsf` is all of it, as published."""

    uid: str
    activity: Literal["create", "update", "close"]
    host: str
    role: str
    """Of the host in what happened: "source" or "target"."""
    peer: str | None
    hosts: tuple[str, ...]
    """All that are named, `host` first."""
    severity: str
    """One of `SEVERITIES`."""
    title: str
    sentence: str
    analytic: str
    family: str
    techniques: tuple[str, ...]
    """MITRE ATT&CK."""
    p_value: float
    observed: float
    expected: float
    unit: str
    start: datetime
    time: datetime
    end: datetime | None
    """None while it goes on."""
    evidence: tuple[FlowEvidence, ...]
    ocsf: Mapping[str, Any]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> DetectionFinding:
        """From an OCSF Detection Finding of ours. Raises KeyError, TypeError or ValueError for anything else."""
        info, own, observables = raw["finding_info"], raw["unmapped"], raw["observables"]
        names = tuple(o["value"] for o in observables)
        return cls(
            uid=info["uid"],
            activity=ACTIVITIES[raw["activity_id"]],
            host=names[0],
            role=own["role"],
            peer=next((o["value"] for o in observables if o["name"] == "peer"), None),
            hosts=names,
            severity=SEVERITIES[raw["severity_id"]],
            title=info["title"],
            sentence=info["desc"],
            analytic=info["analytic"]["uid"],
            family=own["family"],
            techniques=tuple(a["technique"]["uid"] for a in info.get("attacks", [])),
            p_value=own["p_value"],
            observed=own["observed"],
            expected=own["expected"],
            unit=own["unit"],
            start=_time(raw["start_time"]),
            time=_time(raw["time"]),
            end=_time(raw["end_time"]) if "end_time" in raw else None,
            evidence=tuple(FlowEvidence.of(e) for e in raw["evidences"]),
            ocsf=raw,
        )


class Subscription:
    """An iterator of findings that waits for those to come; a context manager. See `subscribe`.

    `close` ends it from any thread, or a signal handler.
    """

    def __init__(
        self,
        log: Log,
        *,
        prefix: str = "flowsage",
        group: str | None = None,
        since: datetime | Literal["earliest", "now"] = "now",
        severity: str = "unknown",
        host: str | None = None,
        follow: bool = True,
    ) -> None:
        if severity.lower() not in SEVERITIES:
            raise ConfigurationError(f"there is no severity {severity!r}; there are {', '.join(SEVERITIES)}")
        self.skipped = 0
        """Records that are no findings of ours."""
        self._log = log
        self._topic = anomalies_topic(prefix)
        self._least = SEVERITIES.index(severity.lower())
        self._host = host
        self._network = _network(host)
        self._follow = follow
        self._closed = threading.Event()
        self._consumer: Consumer = log.consumer(group, self._topic)
        self._ends = log.end_offsets(self._topic)
        if group is None and since != "earliest":
            at = self._ends if since == "now" else log.offsets_at(self._topic, round(since.timestamp() * 1e9))
            self._consumer.seek(at)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
        self._consumer.close()

    def close(self) -> None:
        """End the iteration."""
        self._closed.set()

    def __iter__(self) -> Iterator[DetectionFinding]:
        """Findings as they come. In a group, those that were handed out before the next is asked for are committed."""
        while not self._closed.is_set():
            try:
                records = self._consumer.poll(timeout_s=POLL_S)
            except LogUnavailableError as error:
                logger.warning("%s; trying again", error)
                self._closed.wait(RETRY_S)
                continue
            for record in records:
                finding = self._finding(record)
                if finding is not None:
                    yield finding
                    if self._closed.is_set():
                        return
                if self._consumer.group is not None:
                    self._consumer.commit({record.partition: record.offset + 1})
            if not records and not self._follow and self._read_all():
                return

    def _read_all(self) -> bool:
        position = self._consumer.position()
        return all(position.get(n, end) >= end for n, end in self._ends.items())

    def _finding(self, record: LogRecord) -> DetectionFinding | None:
        try:
            finding = DetectionFinding.of(json.loads(record.value or b""))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            self.skipped += 1
            logger.warning("%s, offset %d: no finding of ours (%r)", record.topic, record.offset, error)
            return None
        wanted = SEVERITIES.index(finding.severity) >= self._least and self._names(finding)
        return finding if wanted else None

    def _names(self, finding: DetectionFinding) -> bool:
        if self._host is None:
            return True
        return any(name == self._host or _within(name, self._network) for name in finding.hosts)


def subscribe(
    bootstrap_servers: str | None = None,
    *,
    prefix: str | None = None,
    group: str | None = None,
    since: datetime | Literal["earliest", "now"] = "now",
    severity: str = "unknown",
    host: str | None = None,
) -> Subscription:
    """Findings of the anomalies' topic, as they come.

    bootstrap_servers, prefix   default: those of the configuration ($FLOWSAGE_CONFIG, FLOWSAGE_KAFKA__…), where
                security settings are taken from too
    group       a consumer group: several programs share the findings, and one that is started again goes on where it
                was (a finding that it was busy with comes again). None: all findings, from `since` on
    since       when the first one was published; "now" and "earliest" too. With a group: where it has left off
    severity    the least that is wanted: low, medium, high, critical
    host        only findings that name this host, or one of this network (10.1.0.0/16)

    Raises ConfigurationError, and LogUnavailableError where Kafka or the topic is not there.
    """
    from flowsage.pipelines.config import load
    from flowsage.pipelines.kafka import KafkaLog

    given = {"bootstrap_servers": bootstrap_servers, "prefix": prefix}
    settings = load(flags={"kafka": {k: v for k, v in given.items() if v is not None}}).kafka
    log = KafkaLog(settings)
    return Subscription(log, prefix=settings.prefix, group=group, since=since, severity=severity, host=host)


def _name(endpoint: Mapping[str, Any]) -> str:
    return str(endpoint.get("ip") or endpoint["hostname"])


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1e3, UTC)


def _network(host: str | None) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(host or "", strict=False)
    except ValueError:
        return None


def _within(name: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network | None) -> bool:
    try:
        return network is not None and ipaddress.ip_address(name) in network
    except ValueError:
        return False
