"""What the kernel tests share: a loaded program, records as dictionaries, frames."""

import ipaddress
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from flowsage.collector.kernel_object import Loader
from flowsage.collector.program import FlowProgram, FlowSettings
from flowsage.collector.ring import Records
from flowsage.collector.testrun import TestRunner

ROOT = Path(__file__).resolve().parent.parent.parent
SECOND = 1_000_000_000
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="loading BPF programs needs root")


@cache
def build() -> None:
    """The objects, up to date with their sources."""
    run_make(ROOT / "bpf")


def run_make(folder: Path, *targets: str) -> None:
    """Builds what its Makefile says."""
    subprocess.run(["make", "-s", "-C", str(folder), *targets], check=True)


both_loaders = pytest.mark.parametrize("loader", ["libbpf", "bcc"])
"""The shipped object, and the same source compiled by BCC when it is loaded (some 2 s)."""


@contextmanager
def loaded(*, loader: Loader = "libbpf", **settings: Any) -> Iterator[FlowProgram]:
    """A program under a clock of our own, unless told otherwise; the ledger must close when the block ends."""
    build()
    with FlowProgram(FlowSettings(**{"external_clock": True, **settings}), loader=loader) as program:
        yield program
        check_ledger(program)


def leaving(program: FlowProgram) -> TestRunner:
    """Feeds frames to the program on the way out."""
    return TestRunner(program, program._loaded().program_fd("flow_egress"))


def check_ledger(program: FlowProgram) -> dict[str, int]:
    """Conservation, exactly: what was seen is in records, in the table, or under a reason."""
    c, table = program.counters(), program.table()
    for unit in ("packets", "bytes"):
        reasons = ("accounted", "non_ip", "malformed", "truncated", "duplicate", "lost_table", "lost_closed")
        assert c[f"seen_{unit}"] == sum(c[f"{reason}_{unit}"] for reason in reasons)
        assert c[f"accounted_{unit}"] == c[f"emitted_{unit}"] + getattr(table, unit)
    return c


def drain_all(program: FlowProgram) -> Records:
    """Everything, flushed."""
    batches = list(program.flush_all())
    return np.concatenate(batches) if batches else program.ring.drain()


def totals(records: Records) -> tuple[int, int]:
    """Packets and bytes in records."""
    return int(records["direction"]["packets"].sum()), int(records["direction"]["bytes"].sum())


def address(octets: Any, version: int) -> str:
    packed = bytes(octets)
    if version == 4:
        assert packed[:12] == bytes(10) + b"\xff\xff"
        packed = packed[12:]
    return str(ipaddress.ip_address(packed))


def flow(record: Any) -> dict[str, Any]:
    """A record as a dictionary, `_fwd` and `_rev` for its directions."""
    version = int(record["ip_version"])
    result: dict[str, Any] = {
        name: int(record[name]) for name in record.dtype.names if record[name].shape == () and name != "direction"
    }
    result |= {"src": address(record["initiator"], version), "dst": address(record["responder"], version)}
    result |= {"sport": result.pop("initiator_port"), "dport": result.pop("responder_port")}
    for way, side in zip(("fwd", "rev"), record["direction"], strict=True):
        result |= {f"{name}_{way}": int(side[name]) for name in side.dtype.names}
    return result


def flows(records: Records) -> list[dict[str, Any]]:
    return [flow(record) for record in records]


def ethernet(kind: int | None = None) -> Packet:
    ends: dict[str, Any] = {"src": "02:00:00:00:00:01", "dst": "02:00:00:00:00:02"}
    return Ether(**ends) if kind is None else Ether(**ends, type=kind)


def tcp(
    flags: str = "A", *, back: bool = False, sport: int = 40000, dport: int = 80, load: int = 0, ttl: int = 64
) -> bytes:
    """A TCP packet of the flow 10.0.0.1:sport → 10.0.0.2:dport, `back`: of its other direction."""
    ends, ports = (("10.0.0.2", "10.0.0.1"), (dport, sport)) if back else (("10.0.0.1", "10.0.0.2"), (sport, dport))
    ip = IP(src=ends[0], dst=ends[1], ttl=ttl)
    return bytes(raw(ethernet() / ip / TCP(sport=ports[0], dport=ports[1], flags=flags) / (b"x" * load)))


def udp(number: int = 0, *, back: bool = False, load: int = 0) -> bytes:
    """A UDP packet of flow `number`."""
    source, target = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", "192.168.0.1"
    ip = IP(src=target, dst=source) if back else IP(src=source, dst=target)
    ports: dict[str, Any] = {"sport": 53, "dport": 5000} if back else {"sport": 5000, "dport": 53}
    return bytes(raw(ethernet() / ip / UDP(**ports) / (b"x" * load)))


def udp_frames(count: int) -> list[bytes]:
    """One packet of each of `count` UDP flows, made from one template: only the source address differs."""
    template = bytearray(udp(0))
    frames = []
    for number in range(count):
        template[27:30] = number.to_bytes(3, "big")
        frames.append(bytes(template))
    return frames
