"""Nanoseconds a packet, and a flow that ends, in the kernel: the same object, the same run, beside a bare XDP_PASS."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from scapy.all import IP, TCP, Ether, Raw

from flowsage.collector.kernel_object import Loader
from flowsage.collector.program import FlowProgram, FlowSettings
from flowsage.collector.testrun import measure
from tests.bench.rows import Row
from tests.bpf.support import ROOT, run_make, udp_frames

REPEAT = 1_000_000
RUNS = 7
FLOWS = 65_536
ENDING = 200_000
VARY = """
/* The next of 65,536 source addresses, in no order that memory likes; `frame` remembers where it is. */
static __always_inline void vary(struct xdp_md *ctx)
{
	__u32 *source = (__u32 *)((void *)(long)ctx->data + 26);

	if ((void *)(source + 1) <= (void *)(long)ctx->data_end)
		*source = (*source & 0xffff) | ((*source >> 16) * 25173 + 13849) << 16;
}

SEC("xdp.frags")
int vary_pass(struct xdp_md *ctx)
{
	vary(ctx);
	return XDP_PASS;
}

SEC("xdp.frags")
int vary_flow(struct xdp_md *ctx)
{
	struct packet p = {.length = frame_length(xdp_length(ctx))};

	vary(ctx);
	observe(&p, parse_xdp(ctx, &p));
	return XDP_PASS;
}
"""


def established(loader: Loader) -> tuple[float, float]:
    """(ours, bare XDP_PASS), ns: one established TCP flow, full record, the clock that a sensor has."""
    frame = bytes(
        Ether() / IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=40_000, dport=443, flags="A") / Raw(b"x" * 400)
    )
    with FlowProgram(FlowSettings(), loader=loader) as program:
        program.feed([frame])
        pairs = [program.measure(frame, REPEAT) for _ in range(RUNS)]
    ours, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
    return ours, bare


@contextmanager
def varying() -> Iterator[Path]:
    """An object with two programs more, which change the source address of their frame before they look at it."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for source in (ROOT / "bpf").glob("*"):
            if source.suffix in {".c", ".h"} or source.name == "Makefile":
                (folder / source.name).write_bytes(source.read_bytes())
        with (folder / "flow.bpf.c").open("a") as file:
            file.write(VARY)
        run_make(folder, "flow.bpf.o")
        yield folder / "flow.bpf.o"


def random_flows() -> tuple[float, float]:
    """(ours, the same frames passed), ns: a packet of another one of 65,536 flows each time, all in the table."""
    frame = udp_frames(1)[0]
    with varying() as path, FlowProgram(FlowSettings(), path=path) as program:
        flow, bare = (program._loaded().program_fd(name) for name in ("vary_flow", "vary_pass"))
        measure(flow, frame, 2 * FLOWS)
        assert program.table().flows == FLOWS
        pairs = [(measure(flow, frame, REPEAT), measure(bare, frame, REPEAT)) for _ in range(RUNS)]
    ours, passed = (statistics.median(column) for column in zip(*pairs, strict=True))
    return ours, passed


def expiry() -> tuple[float, float]:
    """(emitted and deleted, only visited), CPU ns a flow: a walk over the default table with 200,000 flows in it."""
    frames = udp_frames(ENDING)
    both = []
    with FlowProgram(FlowSettings(external_clock=True, ring_bytes=64 << 20, active_ns=0)) as program:
        for _ in range(RUNS):
            program.feed(frames, [1] * ENDING)
            started = time.thread_time_ns()
            visited = program.expire(1).kept
            between = time.thread_time_ns()
            removed = program.expire(3_600_000_000_000).removed
            both.append((time.thread_time_ns() - between, between - started))
            assert visited == removed == ENDING
            while len(program.ring.drain(8192)):
                pass
    ended, looked = (statistics.median(column) / ENDING for column in zip(*both, strict=True))
    return ended, looked


def rows() -> Iterator[Row]:
    """Medians of 7 runs, of a million packets each."""
    ours, bare = established("libbpf")
    yield Row(
        name="a packet of one established flow, BPF_PROG_TEST_RUN", value=ours, unit="ns",
        reference="bare XDP_PASS", reference_value=bare, bar="≤ 95 ns and ≤ 4.5 x bare",
        met=ours <= 95 and ours <= 4.5 * bare,
    )  # fmt: skip
    compiled, bare = established("bcc")
    yield Row(
        name="the same, compiled by BCC", value=compiled, unit="ns", reference="bare XDP_PASS", reference_value=bare
    )
    ours, passed = random_flows()
    yield Row(
        name="a packet of one of 65,536 flows at random", value=ours, unit="ns",
        reference="the same frames passed", reference_value=passed, bar="≤ 170 ns", met=ours <= 170,
    )  # fmt: skip
    ended, looked = expiry()
    yield Row(
        name="a flow that ends: walk, emit, delete", value=ended, unit="ns",
        reference="walked over only", reference_value=looked, bar="≤ 300 ns", met=ended <= 300,
    )  # fmt: skip
