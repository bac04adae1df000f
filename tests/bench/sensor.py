"""What a sensor costs: its CPU and memory for a million packets on a veth pair, its start, a record's way to Arrow."""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flowsage.collector.program import FlowSettings, flow_program
from flowsage.collector.records import to_batch
from tests.bench.rows import Row
from tests.bench.startup import busy_interface
from tests.collector.wires import Wire, start_blast, udp, wire

FLOWS, PACKETS, RATE = 100_000, 1_000_000, 100_000
RECORDS = 65_536
BATCH = 8192
RUNS = 5
"""Of the drain; the load runs once, the start RUNS times."""
_TICKS = os.sysconf("SC_CLK_TCK")


def collect(interface: str, namespace: str | None, output: str) -> tuple[subprocess.Popen[str], float]:
    """`flowsage collect` once it counts, and how long that took from its exec, in seconds."""
    within = ["ip", "netns", "exec", namespace] if namespace else []
    command = [*within, sys.executable, "-m", "flowsage.pipelines.cli", "collect", "--no-pin", "-i", interface]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "-o", output], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    elapsed = time.perf_counter() - started
    if "watching" not in line:
        raise RuntimeError(line)
    return process, elapsed


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def peak_megabytes(pid: int) -> float:
    """The most that was ever resident, in MB; 0 for a process that has ended."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def load(cable: Wire, output: str) -> tuple[float, float]:
    """CPU seconds, start-up left out, and peak MB of a collector that sees the load, up to its last record written."""
    process, _ = collect(cable.port, cable.near, output)
    before = cpu_seconds(process.pid)
    blast = start_blast(cable, flows=FLOWS, packets=PACKETS, rate=RATE)
    sent, _ = blast.communicate()
    # The last flows time out, or are flushed: either way they are written before it ends. What the kernel tells of an
    # ended process counts this one's memory too, from before the exec: so it is asked until the end.
    peak = now = peak_megabytes(process.pid)
    process.send_signal(signal.SIGTERM)
    while now:
        peak = max(peak, now)
        time.sleep(0.001)
        now = peak_megabytes(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    assert process.stderr is not None
    told = process.stderr.read()
    if status or f"{int(sent):,} packets seen" not in told or "the ledger closes" not in told:
        raise RuntimeError(told)
    return usage.ru_utime + usage.ru_stime - before, peak


def drained() -> tuple[float, float]:
    """Nanoseconds a record: of the drain alone, and with the Arrow batch."""
    frames = [udp(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", "10.255.0.1") for n in range(RECORDS)]
    drain, both = [], []
    with flow_program(FlowSettings(ring_bytes=32 << 20, table_entries=1 << 17)) as program:
        for _ in range(RUNS):
            program.feed(frames)
            program.flush()
            ring, took, all_of_it = program.ring, 0, time.perf_counter_ns()
            while ring.waiting:
                began = time.perf_counter_ns()
                taken = ring.peek(BATCH)
                ring.release(taken.end)
                took += time.perf_counter_ns() - began
                to_batch(taken.records, clock_offset_ns=0, sensor="bench")
            both.append((time.perf_counter_ns() - all_of_it) / RECORDS)
            drain.append(took / RECORDS)
    return statistics.median(drain), statistics.median(both)


def rows() -> Iterator[Row]:
    """The numbers of the sensor, each beside its bar."""
    with wire() as cable, tempfile.TemporaryDirectory() as output:
        seconds, megabytes = load(cable, output)
    what = f"collect, {PACKETS / 1e6:g} M packets / {FLOWS // 1000} k flows at {RATE // 1000} kpps"
    yield Row(name=f"{what}: CPU", value=seconds, unit="s", bar="≤ 0.6 s", met=seconds <= 0.6)
    yield Row(name=f"{what}: resident", value=megabytes, unit="MB", bar="≤ 120 MB", met=megabytes <= 120)
    with busy_interface() as interface:
        times = []
        for _ in range(RUNS):
            process, elapsed = collect(interface, None, "-")
            times.append(elapsed)
            process.terminate()
            process.communicate()
    start = statistics.median(times)
    yield Row(name="collect, import + attach to first packet", value=start, unit="s", bar="≤ 0.5 s", met=start <= 0.5)
    drain, both = drained()
    yield Row(name="ring drain, a record, 8192 a batch", value=drain, unit="ns", bar="≤ 100 ns", met=drain <= 100)
    yield Row(name="drain + Arrow batch, a record", value=both, unit="ns", bar="≤ 250 ns", met=both <= 250)
