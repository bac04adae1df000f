"""Draining the ring, beside a callback a record through bcc, the way most tools in Python do it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from scapy.all import IP, UDP, Ether

from flowsage.collector.kernel_headers import find_headers, shown_to_bcc
from flowsage.collector.program import FlowSettings, flow_program
from flowsage.collector.testrun import measure
from tests.bench.rows import Row

RECORDS = 100_000
RUNS = 5
BCC_SOURCE = r"""
#include <uapi/linux/bpf.h>
struct record { u64 words[31]; };
BPF_RINGBUF_OUTPUT(records, 16384);
int fill(struct xdp_md *ctx) {
    struct record *r = records.ringbuf_reserve(sizeof(struct record));
    if (!r) return XDP_ABORTED;
    for (int i = 0; i < 31; i++) r->words[i] = i;
    records.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
    return XDP_PASS;
}
"""


def drained() -> float:
    """Nanoseconds a record of `Ring.drain`, median over runs of 100 k records that wait in the ring."""
    frames = [
        bytes(Ether() / IP(src=f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", dst="10.255.0.1") / UDP(sport=9, dport=9))
        for n in range(RECORDS)
    ]
    times = []
    with flow_program(FlowSettings(ring_bytes=64 << 20, table_entries=1 << 18)) as program:
        for _ in range(RUNS):
            program.feed(frames)
            program.flush()
            started = time.perf_counter_ns()
            count = 0
            while len(records := program.ring.drain(4096)):
                count += len(records)
            times.append((time.perf_counter_ns() - started) / count)
            assert count == RECORDS
    return statistics.median(times)


def called_back() -> float:
    """Nanoseconds a record of bcc's `ring_buffer_consume` with a Python callback that casts the record."""
    from bcc import BPF

    with shown_to_bcc(find_headers()) as flags:
        bpf = BPF(text=BCC_SOURCE.encode(), cflags=["-w", *flags])
    function = bpf.load_func("fill", BPF.XDP)
    seen = 0

    def callback(context: object, data: int, size: int) -> None:
        nonlocal seen
        bpf["records"].event(data)
        seen += 1

    bpf["records"].open_ring_buffer(callback)
    times = []
    for _ in range(RUNS):
        seen = 0
        measure(function.fd, bytes(64), RECORDS)
        started = time.perf_counter_ns()
        bpf.ring_buffer_consume()
        elapsed = time.perf_counter_ns() - started
        assert seen == RECORDS, seen
        times.append(elapsed / seen)
    return statistics.median(times)


def rows() -> Iterator[Row]:
    """A record of 248 bytes, drained."""
    ours, theirs = drained(), called_back()
    yield Row(
        name="ring drain, a record", value=ours, unit="ns", reference="bcc, a callback a record",
        reference_value=theirs,
        bar="≤ 60 ns and ≥ 10 x", met=ours <= 60 and theirs >= 10 * ours,
    )  # fmt: skip
