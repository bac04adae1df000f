"""Mutated frames through the program, each accounted as the independent specification says."""

import runpy
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowsage.collector.capture import Capture
from flowsage.collector.kernel_object import Loader

from .support import drain_all, flows, leaving, loaded, needs_root

pytestmark = needs_root

FRAMES = 200_000
SHARE = 20_000
# Where decisions are made: Ethernet type, tags, the first bytes of IP headers, of extension headers and of L4.
SHORTEST = {b"\x08\x00": 14 + 20, b"\x86\xdd": 14 + 40}
INTERESTING = [0, 1, 4, 5, 6, 17, 33, 43, 44, 47, 50, 51, 58, 60, 64, 69, 96, 129, 132, 136, 255]


def mutated(shared: Path, rng: np.random.Generator, count: int) -> list[bytes]:
    """Frames of the captures with bytes changed, cut, or moved in their headers."""
    pool: list[bytes] = []
    for path in sorted((shared / "pcaps").glob("*.pcap")):
        with Capture(path) as capture:
            for batch in capture:
                pool += [bytes(packet[:400]) for packet in batch[:40].packets()]
                break
    frames = []
    for number in rng.integers(0, len(pool), count).tolist():
        frame = bytearray(pool[number])
        for _ in range(rng.integers(0, 4)):
            if len(frame) > 12:
                at = int(rng.integers(12, min(len(frame), 90)))
                frame[at] = INTERESTING[rng.integers(len(INTERESTING))] if rng.random() < 0.6 else rng.integers(256)
        if rng.random() < 0.2:
            del frame[int(rng.integers(0, len(frame) + 1)) :]
        if rng.random() < 0.1 and len(frame) >= 14:
            frame[12:12] = bytes([0x81, 0, rng.integers(16), rng.integers(256)])
        frames.append(bytes(frame))
    return frames


@pytest.mark.parametrize(
    ("loader", "out", "count"),
    [("libbpf", False, FRAMES), ("bcc", False, SHARE), ("libbpf", True, SHARE), ("bcc", True, SHARE // 4)],
    ids=["libbpf", "bcc", "on the way out", "on the way out, bcc"],
)
def test_mutated_frames_are_accounted_as_the_specification_says(
    shared: Path, loader: Loader, out: bool, count: int
) -> None:
    # run_path leaves no bytecode beside it.
    oracle = runpy.run_path(str(shared / "tools" / "flow_oracle.py"), run_name="flow_oracle")
    parse, refused, rng = oracle["parse"], oracle["Bad"], np.random.default_rng(20261124)
    frames = mutated(shared, rng, count)
    if out:  # the kernel makes no skb of a frame that says IP and does not hold the header
        frames = [frame for frame in frames if len(frame) >= SHORTEST.get(frame[12:14].ljust(2, b"\0"), 0)]
    reasons: Counter[str] = Counter()
    expected: dict[Any, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for frame in frames:
        try:
            version, proto, src, dst, sport, dport, _, _, flags, _, fragment, _ = parse(frame)
        except refused as bad:
            reasons[bad.reason] += 1
            continue
        row = expected[(version, proto, *sorted([(src, sport), (dst, dport)]))]
        row[0] += 1
        row[1] += len(frame)
        row[2] |= flags
        row[3] += fragment
    untimed = {"idle_ns": 0, "active_ns": 0, "half_open_ns": 0, "tcp_ends": False, "table_entries": 1 << 18}
    with loaded(loader=loader, **untimed) as program:
        (leaving(program) if out else program.feeder()).feed(frames, range(1, len(frames) + 1))
        counters = program.counters()
        got = {}
        records = drain_all(program)
    for record, told in zip(records, flows(records), strict=True):
        ends = [
            (bytes(record[end])[12 if told["ip_version"] == 4 else 0 :], told[port])
            for end, port in (("initiator", "sport"), ("responder", "dport"))
        ]
        got[(told["ip_version"], told["proto"], *sorted(ends))] = [
            told["packets_fwd"] + told["packets_rev"],
            told["bytes_fwd"] + told["bytes_rev"],
            told["tcp_flags_fwd"] | told["tcp_flags_rev"],
            told["fragments_fwd"] + told["fragments_rev"],
        ]
    assert {reason: counters[f"{reason}_packets"] for reason in ("non_ip", "malformed", "truncated")} == reasons
    assert min(reasons.values()) > count // 100  # each way out is taken often
    assert len(got) == len(records)
    assert got == expected
