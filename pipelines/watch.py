"""`flowsage watch`: findings as they come, a line each, from the anomalies' topic."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Literal

import click

from flowsage.collector.collect import stopped_by_signals
from flowsage.collector.errors import ConfigurationError, UsageError
from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.quantities import seconds
from flowsage.pipelines.readable import finding_lines
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.subscription import DetectionFinding, Subscription


def since_of(text: str | None, now: datetime) -> datetime | Literal["earliest", "now"]:
    """ "2h" (ago), "2026-11-24T12:00", "earliest", or None for now. Raises UsageError for anything else."""
    if text is None or text in ("now", "earliest"):
        return "now" if text in (None, "now") else "earliest"
    if re.fullmatch(r"[\d.]+\s*[a-z]+", text):
        with suppress(ValueError):
            return now - timedelta(seconds=seconds(text))
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"--since {text!r} is no time; write 2h (ago), 2026-11-24T12:00 or earliest") from error
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def line(finding: DetectionFinding) -> str:
    """A finding in one line."""
    head, *rest = finding_lines(dict(finding.ocsf), 0)
    return f"{head}  {rest[0].strip()}" if rest else head


def watch(
    settings: Settings,
    *,
    as_json: bool,
    evidence: bool,
    severity: str,
    host: str | None,
    since: str | None,
    follow: bool,
) -> None:
    """Print findings until a signal, or, without `follow`, until all that are there are printed."""
    log = KafkaLog(settings.kafka)
    begin = since_of(since, datetime.now(UTC))
    try:
        subscription = Subscription(
            log, prefix=settings.kafka.prefix, since=begin, severity=severity, host=host, follow=follow
        )
    except ConfigurationError as error:
        raise UsageError(str(error)) from error
    with subscription as findings, stopped_by_signals(findings.close):
        for finding in findings:
            if as_json:
                click.echo(json.dumps(finding.ocsf, separators=(",", ":"), ensure_ascii=False))
            else:
                click.echo("\n".join(finding_lines(dict(finding.ocsf))) if evidence else line(finding))
    log.close()
