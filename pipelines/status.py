"""`flowsage status`: what a running process says of itself, on one screen."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from datetime import UTC, datetime

import click
from prometheus_client.parser import text_string_to_metric_families

from flowsage.collector.errors import FlowsageError

Samples = dict[str, dict[str, float]]


class NotRunningError(FlowsageError):
    """Nobody answers where the metrics should be."""


def fetch(address: str, port: int) -> Samples:
    """Metric name (with _total) → label value ("" where it has none) → number."""
    url = f"http://{address}:{port}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            text = reply.read().decode()
    except (urllib.error.URLError, OSError) as e:
        reason = getattr(e, "reason", e)
        raise NotRunningError(
            f"no FlowSAGE answers at {url} ({reason}); is `flowsage run` running, and with this port?"
        ) from e
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.name.startswith("flowsage_") and "le" not in sample.labels:
                samples.setdefault(sample.name, {})[next(iter(sample.labels.values()), "")] = sample.value
    if not samples:
        raise NotRunningError(f"what answers at {url} is not FlowSAGE; name its port with --port")
    return samples


def show(address: str, port: int, *, as_json: bool = False) -> None:
    """Print it. Raises NotRunningError."""
    samples = fetch(address, port)
    if as_json:
        click.echo(json.dumps(samples, indent=1, sort_keys=True))
        return
    click.echo("\n".join(lines(samples)))


def lines(samples: Samples) -> list[str]:
    """The screen, line by line; a part that the process does not have is left out."""

    def one(name: str) -> float | None:
        values = samples.get(f"flowsage_{name}")
        return sum(values.values()) if values else None

    def number(name: str) -> str:
        return f"{one(name) or 0:,.0f}"

    def by(name: str) -> str:
        values = samples.get(f"flowsage_{name}", {})
        return ", ".join(f"{label} {value:,.0f}" for label, value in sorted(values.items()) if value) or "none"

    out = []
    if one("packets_total") is not None:
        up = samples.get("flowsage_interface_up", {})
        out.append(
            f"sensor     {number('packets_total')} packets on {sum(up.values()):.0f} of {len(up)} interfaces, "
            f"{number('flow_table_flows')} flows in the table, {number('records_total')} records drained"
        )
        imbalance = one("ledger_imbalance_packets") or 0
        out.append(
            f"ledger     {'closes exactly' if imbalance == 0 else f'{imbalance:,.0f} PACKETS UNEXPLAINED'}: "
            f"{number('packets_delivered_total')} in records + {number('flow_table_packets')} in the table + "
            f"{number('ring_packets')} in the ring + not in flows ({by('packets_unaccounted_total')})"
        )
    if one("flows_consumed_total") is not None:
        mark = one("watermark_timestamp_seconds")
        when = datetime.fromtimestamp(mark, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if mark else "none yet"
        out.append(
            f"windows    {number('windows_closed_total')} closed, {number('flows_open')} flows in open ones, "
            f"{number('flows_late_total')} late; watermark {when}"
        )
        out.append(f"history    {by('history_keys')}")
    if one("graph_hosts") is not None:
        ready = "ready" if one("graph_ready") else "not ready"
        out.append(
            f"graph      {ready}: {number('graph_hosts')} hosts, {number('graph_training_steps_total')} steps, "
            f"weight {one('graph_mixture_weight') or 0:.2f}"
        )
    if one("calibration_host_blocks") is not None:
        ready = "ready" if one("calibration_ready") else "not ready"
        out.append(f"alarms     {ready}: calibrated on {number('calibration_host_blocks')} host-blocks")
        out.append(f"findings   {number('findings_open')} open; raised: {by('findings_total')}")
    return out
