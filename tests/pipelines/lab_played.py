"""One run of the lab for all of its tests, and readers of what it leaves behind."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from flowsage.pipelines.lab import Lab, LabSettings, in_namespace
from flowsage.pipelines.lab.network import namespaces

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
needs_nmap = pytest.mark.skipif(shutil.which("nmap") is None, reason="nmap is not installed (apt install nmap)")


def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def remains(prefix: str) -> list[str]:
    """Whatever a lab of this prefix still has on the machine."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if f"/{prefix}-" in line]
    links = [name for name in os.listdir("/sys/class/net") if name.startswith(prefix)]
    return [*namespaces(prefix), *mounts, *links]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


Packet = tuple[int, str, int, str, int, int, int, int]
"""time_ns, source, source port, destination, destination port, protocol, TCP flags, frame length."""


def packets_of(path: Path) -> list[Packet]:
    """IPv4 packets of a nanosecond pcap; checks that each is whole, of wire size, with a true IP checksum."""
    data = path.read_bytes()
    assert struct.unpack_from("<I", data) == (0xA1B23C4D,)
    found: list[Packet] = []
    at = 24
    while at < len(data):
        seconds, nanoseconds, kept, length = struct.unpack_from("<IIII", data, at)
        frame = data[at + 16 : at + 16 + kept]
        at += 16 + kept
        assert kept == length <= 1514
        if frame[12:14] != b"\x08\x00":
            assert frame[12:14] == b"\x08\x06", "only IPv4 and ARP live in the lab"
            continue
        header = (frame[14] & 15) * 4
        total = sum(struct.unpack_from(f"!{header // 2}H", frame, 14))
        assert total % 0xFFFF == 0
        proto = frame[23]
        ports = struct.unpack_from("!HH", frame, 14 + header) if proto in (6, 17) else (0, 0)
        flags = frame[14 + header + 13] if proto == 6 else 0
        ends = socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34])
        when = seconds * 1_000_000_000 + nanoseconds
        found.append((when, ends[0], ports[0], ends[1], ports[1], proto, flags, length))
    assert at == len(data)
    return found


def flows_of(packets: list[Packet]) -> pa.Table:
    """One row a 5-tuple, the first packet's source first."""
    first: dict[tuple[object, ...], dict[str, object]] = {}
    for when, src, src_port, dst, dst_port, proto, _, _ in packets:
        ends = sorted(((src, src_port), (dst, dst_port)))
        row = {"start_ns": when, "src_ip": src, "dst_ip": dst, "src_port": src_port, "dst_port": dst_port}
        first.setdefault((*ends, proto), {**row, "proto": proto})
    return pa.Table.from_pylist(list(first.values()))


def port_packets(lab: Lab) -> int:
    """Packets that have entered the bridge through the hosts' ports, by the kernel's count."""
    with in_namespace(lab.netns):
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    counts = {}
    for line in lines[2:]:
        name, _, rest = line.partition(":")
        counts[name.strip()] = int(rest.split()[1])
    return sum(counts[interface] for interface in lab.interfaces)


class Played:
    """One run of the lab in which all misbehave at once, recorded; what was seen, for many tests."""

    def __init__(self, directory: Path) -> None:
        self.capture = directory / "lab.pcap"
        self.told: list[tuple[str, str]] = []
        settings = LabSettings(prefix="fslbt", seed=3, truth_path=directory / "truth.jsonl")
        began = time.monotonic()
        with Lab(settings, on_attack=lambda truth: self.told.append((truth.attack, truth.status))) as lab:
            self.lab = lab
            until(lambda: port_packets(lab) > 0, 60)
            self.first_packet_s = time.monotonic() - began
            self.processes = dict(lab.processes)
            self.namespace_count = len(namespaces("fslbt"))
            with lab.record(self.capture) as recording:
                before = port_packets(lab)
                began_cpu, began_at = self.cpu_s(), time.monotonic()
                time.sleep(8)
                self.quiet_cpu = (self.cpu_s() - began_cpu) / (time.monotonic() - began_at)
                begun = [
                    *([lab.start_attack("scan", top_ports=20)] if shutil.which("nmap") else []),
                    lab.start_attack("worm", rate=10.0),
                    lab.start_attack("guess", attempts=10, period_s=0.2),
                    lab.start_attack("exfil", bytes=6_000_000),
                    lab.start_attack("flood", connections=200),
                    lab.start_attack("slow-scan", period_s=0.5),
                    lab.start_attack("beacon", period_s=0.8, beats=8),
                ]
                slow = next(truth for truth in begun if truth.attack == "slow-scan")
                for truth in begun:
                    if truth is not slow:
                        lab.wait_attack(truth, 120)
                self.live = {truth.attack: truth for truth in lab.truths()}
                lab.stop_attack(slow)
                lab.wait_attack(slow, 60)
                self.counters = lab.counters()
                self.recorded_ports = port_packets(lab) - before
            self.recorded = recording.stop()
            self.lost_hosts = list(lab.lost_hosts)
        self.remains = remains("fslbt")
        self.living = [name for name, pid in self.processes.items() if alive(pid)]
        self.truths = {truth.attack: truth for truth in lab.truths()}
        self.truth_lines = lab.truth_path.read_text().splitlines()
        self.packets = packets_of(self.capture)

    def cpu_s(self) -> float:
        """CPU time of all hosts so far, seconds."""
        ticks = 0
        for pid in self.processes.values():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def from_attacker(played: Played, name: str) -> list[Packet]:
    """TCP packets from the attacker to the attack's targets (and ports), while it lasted."""
    truth = played.truths[name]
    assert truth.end_ns is not None
    return [
        packet
        for packet in played.packets
        if truth.start_ns <= packet[0] <= truth.end_ns
        and packet[1] == truth.address
        and packet[3] in truth.targets
        and packet[5] == 6
        and (not truth.ports or packet[4] in truth.ports)
    ]


def handshakes(packets: list[Packet]) -> list[Packet]:
    """The first SYN of each connection attempt."""
    first: dict[tuple[object, ...], Packet] = {}
    for packet in packets:
        if packet[6] & 0x12 == 0x02:
            first.setdefault(packet[1:5], packet)
    return list(first.values())


@functools.cache
def play() -> Played:
    """The one run, made when the first test asks for it."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with tempfile.TemporaryDirectory() as directory:
        return Played(Path(directory))
