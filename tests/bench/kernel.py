"""Nanoseconds a packet of the XDP program, beside a bare XDP_PASS of the same object in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from scapy.all import IP, TCP, Ether, Raw

from flowsage.collector.program import FlowSettings, flow_program
from tests.bench.rows import Row

REPEAT = 1_000_000
RUNS = 7


def rows() -> Iterator[Row]:
    """One established TCP flow, full record; median of 7 x 1 M."""
    frame = bytes(
        Ether() / IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=40_000, dport=443, flags="A") / Raw(b"x" * 400)
    )
    with flow_program(FlowSettings(ring_bytes=1 << 20)) as program:
        program.feed([frame])
        pairs = [program.measure(frame, REPEAT) for _ in range(RUNS)]
    ours, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
    yield Row(
        name="a packet of one established flow, BPF_PROG_TEST_RUN", value=ours, unit="ns",
        reference="bare XDP_PASS", reference_value=bare, bar="≤ 5 x bare", met=ours <= 5 * bare,
    )  # fmt: skip
