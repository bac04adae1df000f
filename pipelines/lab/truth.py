"""What really happened: the truth about each misbehaviour, as a file and as labels on flow records."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flowsage.collector.errors import InputError, SchemaError

Status = Literal["running", "done", "stopped", "failed"]

_SLACK_NS = 3_000_000_000
"""Retransmitted handshakes outlast the last step; a flow may begin this long after the attack's end."""
_CLOCK_NS = 50_000_000
"""What the clocks of a recorder and of the attacker may differ."""
_PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1}


@dataclass(frozen=True)
class Step:
    """One connection, probe or beat: when it began, towards whom, from which port (0: unknown)."""

    time_ns: int
    target: str
    port: int
    source_port: int = 0


@dataclass(frozen=True)
class Truth:
    """One misbehaviour. Times are Unix nanoseconds; `end_ns` is None while it runs."""

    id: str
    attack: str
    attacker: str
    """Host name in the lab."""
    address: str
    """The attacker's address, as flow records show it."""
    proto: str
    targets: tuple[str, ...]
    """Addresses that it goes for, in order where there is one."""
    ports: tuple[int, ...]
    """Destination ports; empty: many."""
    start_ns: int
    end_ns: int | None = None
    status: Status = "running"
    error: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    """In order of time. An nmap scan has the first probe of each target here."""
    source_ports: tuple[int, ...] = ()
    """Every source port used, where known: tells the attack's flows from the host's own to the same service."""

    def nth_target_ns(self, n: int) -> int | None:
        """When the n-th distinct target was first reached for (from 1), None if it never was."""
        seen: set[str] = set()
        for step in self.steps:
            seen.add(step.target)
            if len(seen) == n:
                return step.time_ns
        return None

    def nth_step_ns(self, n: int) -> int | None:
        """When the n-th step (beat, guess, probe; from 1) began, None if it never did."""
        return self.steps[n - 1].time_ns if 0 < n <= len(self.steps) else None


def to_json(truth: Truth) -> dict[str, Any]:
    """The truth as JSON types; `from_json` is its inverse."""
    return asdict(truth)


def from_json(document: dict[str, Any]) -> Truth:
    """A truth from its JSON form. Raises InputError where it is none."""
    try:
        values = dict(document)
        values["steps"] = tuple(Step(**step) for step in values.get("steps", ()))
        for name in ("targets", "ports", "source_ports"):
            values[name] = tuple(values.get(name, ()))
        return Truth(**values)
    except TypeError as error:
        raise InputError(f"not a misbehaviour's truth: {error}") from error


def write_truth(path: Path, truths: Iterable[Truth]) -> None:
    """Replace the file by one line a misbehaviour, atomically: a reader always finds whole lines."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text("".join(json.dumps(to_json(truth)) + "\n" for truth in truths), encoding="utf-8")
    scratch.replace(path)


def read_truth(path: Path) -> list[Truth]:
    """Every misbehaviour of a truth file, in order of start. Raises InputError where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [from_json(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the truth file {path}: {error}") from error


def _column(table: pa.Table, name: str) -> npt.NDArray[np.int64] | None:
    if name not in table.column_names:
        return None
    values: npt.NDArray[np.int64] = pc.fill_null(pc.cast(table.column(name), pa.int64()), -1).to_numpy()
    return values


def label_flows(table: pa.Table, truths: Iterable[Truth]) -> pa.Table:
    """Add `label` (int8, 1 = attack) and `attack` (string, "" where none) to a table of flows.

    A flow belongs to a misbehaviour when it joins the attacker to one of its targets on its protocol and ports, from
    one of its source ports where those are known, and began while it lasted. Either end may be written first.
    Raises SchemaError where start_ns, src_ip or dst_ip is missing.
    """
    missing = {"start_ns", "src_ip", "dst_ip"} - set(table.column_names)
    if missing:
        raise SchemaError(f"the flows have no column {', '.join(sorted(missing))}: they cannot be labelled")
    start = _column(table, "start_ns")
    assert start is not None
    proto, src_port, dst_port = (_column(table, name) for name in ("proto", "src_port", "dst_port"))
    ends = [pc.cast(table.column(name), pa.string()) for name in ("src_ip", "dst_ip")]
    attack = np.full(len(table), "", dtype=object)
    for truth in truths:
        last = (truth.end_ns if truth.end_ns is not None else np.iinfo(np.int64).max - _SLACK_NS) + _SLACK_NS
        wanted = (start >= truth.start_ns - _CLOCK_NS) & (start <= last)
        if proto is not None:
            wanted &= (proto == _PROTOCOLS[truth.proto]) | (proto < 0)
        targets = pa.array(truth.targets, pa.string())
        either = np.zeros(len(table), bool)
        for here, there, local, remote in ((0, 1, src_port, dst_port), (1, 0, dst_port, src_port)):
            way = pc.equal(ends[here], truth.address).to_numpy() & pc.is_in(ends[there], targets).to_numpy()
            if truth.ports and remote is not None:
                way &= np.isin(remote, truth.ports) | (remote < 0)
            if truth.source_ports and local is not None:
                way &= np.isin(local, truth.source_ports) | (local < 0)
            either |= way
        attack[wanted & either & (attack == "")] = truth.attack
    label = pa.array((attack != "").astype(np.int8))
    for name, column in (("label", label), ("attack", pa.array(attack, pa.string()))):
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, column)
    return table


def label_file(flows: Path, truth: Path, out: Path) -> int:
    """Read a Parquet file of flows, add the labels of a truth file, write it to `out`. Returns the flows labelled 1.

    Raises InputError where a file cannot be read or written.
    """
    try:
        labelled = label_flows(pq.read_table(flows), read_truth(truth))
        pq.write_table(labelled, out)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot label the flows of {flows}: {error}") from error
    return int(pc.sum(labelled.column("label")).as_py() or 0)
