"""`flowsage status`: what a running process says of itself, and the kernel of our programs, on one screen.

The kernel is asked whether or not a process runs: what is attached or pinned goes on counting without one.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import click
from prometheus_client.parser import text_string_to_metric_families

from flowsage.collector.errors import FlowsageError
from flowsage.collector.interface import read_interface
from flowsage.collector.inventory import Present, inventory
from flowsage.collector.ledger import reasons_of
from flowsage.collector.statistics import PROTOCOLS
from flowsage.pipelines.quantities import moment

NOTHING = "nothing of FlowSAGE is in the kernel"
GO_ON = "`flowsage collect` goes on with it, `flowsage collect --detach` removes it"
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
        reason = getattr(reason, "strerror", None) or reason
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
    """Print it. Raises NotRunningError where there is neither a process nor a program of ours in the kernel."""
    samples: Samples = {}
    silent: NotRunningError | None = None
    try:
        samples = fetch(address, port)
    except NotRunningError as error:
        silent = error
    try:
        present, unasked = inventory(), ""
    except FlowsageError as error:
        present, unasked = [], str(error)
    if silent is not None and not present:
        raise NotRunningError(
            f"{silent}; nor could the kernel be asked: {unasked}" if unasked else f"{NOTHING}, and {silent}"
        )
    if as_json:
        click.echo(json.dumps({"process": samples, "kernel": [as_dict(p) for p in present]}, indent=1, sort_keys=True))
        return
    out = lines(samples) or ["process    it has only begun: nothing is counted yet"]
    if silent is not None:
        alone = sorted({process for p in present for process in p.sensors.values() if process is not None})
        only = f"{', '.join(map(str, alone))} only collects and serves no metrics; this is what the kernel says"
        out = [f"process    {only if alone else silent}"]
    click.echo("\n".join(out + kernel_lines(present) + ([f"kernel     {unasked}"] if unasked else [])))


def as_dict(program: Present) -> dict[str, Any]:
    """A program in the kernel, as JSON."""
    return {
        "program_id": program.stats.program_id,
        "name": program.stats.name,
        "interfaces": dict(program.interfaces),
        "interfaces_elsewhere": program.elsewhere,
        "sensors": {str(path): process for path, process in program.sensors.items()},
        "recent_runs": program.recent_runs,
        "recent_ns_per_run": program.recent_ns,
        "memory_bytes": program.stats.memory,
        "maps": {m.name: {"type": m.type, "size": m.size, "used": m.used} for m in program.stats.maps},
        "counters": program.counters,
    }


def _interface_words(name: str) -> list[str]:
    """Its state, driver, MTU, and whether it hides VLAN tags; nothing where it has gone."""
    try:
        interface = read_interface(name)
    except FlowsageError:
        return []
    words = [interface.state, interface.driver or "no driver", f"MTU {interface.mtu}"]
    hides = interface.vlan_offload and interface.driver != "veth"
    return [*words, "takes VLAN tags off before XDP"] if hides else words


def kernel_lines(present: list[Present]) -> list[str]:
    """The programs in the kernel; what several of them share (one table for both directions) is told once."""
    out: list[str] = []
    told: set[int] = set()
    for program in sorted(present, key=lambda p: (not (p.interfaces or p.elsewhere), p.stats.program_id)):
        maps = {m.map_id for m in program.stats.maps if m.type in {"hash", "ringbuf"}}
        if maps & told and not (program.interfaces or program.elsewhere):
            continue  # the other end of a sensor that does not use it
        out.append(_where_it_runs(program))
        if not maps & told:
            out += _what_it_holds(program)
        told |= maps
    return out


def _where_it_runs(program: Present) -> str:
    stats = program.stats
    where = [f"{name} ({', '.join([mode, *_interface_words(name)])})" for name, mode in program.interfaces]
    where += [f"{program.elsewhere} in other network namespaces"] if program.elsewhere else []
    speed = "no packet just now" if program.recent_ns is None else f"{program.recent_ns:,.0f} ns a packet just now"
    on = f"on {', '.join(where)}" if where else "attached to nothing"
    return f"kernel     {stats.name} (program {stats.program_id}) {on}: {speed}, {stats.memory / 1e6:,.1f} MB"


def _what_it_holds(program: Present) -> list[str]:
    """Fill of table and ring, what became of the packets, who has it."""
    out, counters = [], program.counters
    if program.stats.table is not None:
        used, size = program.stats.table
        out.append(f"           flows: {used:,} of {size:,} entries ({used / size:.1%})")
    for m in program.stats.maps:
        if m.type == "ringbuf" and m.used is not None:
            out.append(f"           {m.name}: {m.used:,} of {m.size:,} bytes wait in the ring")
    if "seen_packets" in counters:
        lost = ", ".join(f"{name} {n:,}" for name in reasons_of(counters) if (n := counters[f"{name}_packets"]))
        sent = f"{counters['emitted_packets']:,} of them sent in {counters['emitted_records']:,} records"
        seen = f"{counters['seen_packets']:,} packets seen, {counters['accounted_packets']:,} in flows"
        out.append(f"           {seen}, {sent}; not in flows: {lost or 'none'}")
    elif counters:
        named = ", ".join(f"{n} {counters[f'packets_{n.lower()}']:,}" for n in PROTOCOLS)
        out.append(f"           packets: {named}")
    for path, process in program.sensors.items():
        who = f"process {process} runs it" if process else "no process runs it, it counts on; " + GO_ON
        out.append(f"           pinned in {path}: {who}")
    return out


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
        gaps = samples.get("flowsage_interface_unwatched_seconds", {})
        out += [
            f"           {name} was not watched for {seconds * 1e3:,.1f} ms while its mode changed"
            for name, seconds in sorted(gaps.items())
        ]
    if one("flows_consumed_total") is not None:
        mark = one("watermark_timestamp_seconds")
        when = moment(mark) if mark else "none yet"
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
        out += _alarms({name: one(name) or 0.0 for name in _ALARMS})
        out.append(f"findings   {number('findings_open')} open; raised: {by('findings_total')}")
    return out


_ALARMS = (
    "calibration_ready", "calibration_blocks", "calibration_blocks_needed", "calibration_host_blocks",
    "calibration_host_blocks_needed", "calibration_expected_timestamp_seconds", "budget_ratio",
)  # fmt: skip


def _alarms(value: dict[str, float]) -> list[str]:
    """Whether they are raised, and how much of what that takes is there."""
    if value["calibration_ready"]:
        seen = f"calibrated on {value['calibration_host_blocks']:,.0f} host-blocks"
        return [f"alarms     ready: {seen}; {value['budget_ratio']:.0%} of the budget is in force"]
    missing = [
        f"{value[f'calibration_{name}']:,.0f} of {value[f'calibration_{name}_needed']:,.0f} {name.replace('_', '-')}"
        for name in ("blocks", "host_blocks")
        if value[f"calibration_{name}"] < value[f"calibration_{name}_needed"]
    ]
    at = value["calibration_expected_timestamp_seconds"]
    return [
        f"alarms     not ready: {' and '.join(missing) or 'none'} of calibration seen"
        + (f", ready at about {moment(at)}" if at else ""),
        "           until then only scans, guessing and floods are raised, at first where they are beyond doubt",
    ]
