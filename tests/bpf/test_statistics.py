"""The statistics of a record against NumPy over the same packets."""

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import or_

import numpy as np
import pytest

from flowsage.collector.kernel_object import Loader

from .support import SECOND, both_loaders, drain_all, flows, loaded, needs_root, tcp

pytestmark = needs_root


def test_lengths_gaps_ttl_and_flags_of_both_directions_are_those_of_the_packets() -> None:
    rng = np.random.default_rng(7)
    n = 500
    back = rng.random(n) < 0.4
    back[0] = False
    loads = rng.integers(0, 1400, n)
    ttls = rng.integers(1, 255, n)
    flags = rng.choice(["A", "PA", "UA", "AEC"], n)
    gaps = rng.choice([1, 999, 1_000, 123_456, 4_294_967_295, 4_294_967_296, 7 * SECOND, 90 * SECOND], n)
    times = 5 * SECOND + np.cumsum(gaps)
    frames = [
        tcp(f, back=bool(b), load=int(s), ttl=int(t)) for f, b, s, t in zip(flags, back, loads, ttls, strict=True)
    ]
    with loaded(idle_ns=0, active_ns=0) as program:
        program.feed(frames, times.tolist())
        (record,) = flows(drain_all(program))
    bits = {"A": 16, "PA": 24, "UA": 48, "AEC": 16 | 64 | 128}
    for way, mine in (("fwd", ~back), ("rev", back)):
        lengths = np.array([len(f) for f in frames])[mine]
        gap = np.diff(times[mine])
        assert record[f"packets_{way}"] == mine.sum()
        assert record[f"bytes_{way}"] == lengths.sum()
        assert (record[f"length_min_{way}"], record[f"length_max_{way}"]) == (lengths.min(), lengths.max())
        assert record[f"length_sumsq_{way}"] == (lengths.astype(np.int64) ** 2).sum()
        assert record[f"iat_sum_ns_{way}"] == gap.sum()
        assert record[f"iat_sumsq_us2_{way}"] == (np.minimum(gap // 1000, 2**26) ** 2).sum()
        assert (record[f"ttl_min_{way}"], record[f"ttl_max_{way}"]) == (ttls[mine].min(), ttls[mine].max())
        assert record[f"tcp_flags_{way}"] == np.bitwise_or.reduce([bits[f] for f in flags[mine]])
        assert record[f"last_ns_{way}"] == times[mine][-1]
    assert (record["start_ns"], record["end_ns"]) == (times[0], times[-1])


def test_every_record_of_a_cut_flow_has_the_statistics_of_its_own_packets() -> None:
    times = [SECOND * t for t in (1, 4, 6, 12, 13, 19)]
    frames = [tcp("A", load=load) for load in (100, 10, 50, 30, 20, 40)]
    with loaded(active_ns=10 * SECOND) as program:
        program.feed(frames, times)
        records = flows(drain_all(program))
    assert [r["packets_fwd"] for r in records] == [3, 3]
    for record, part in zip(records, (slice(0, 3), slice(3, 6)), strict=True):
        lengths, gaps = np.array([len(f) for f in frames[part]]), np.diff(times[part])
        assert (record["length_min_fwd"], record["length_max_fwd"]) == (lengths.min(), lengths.max())
        assert record["length_sumsq_fwd"] == (lengths**2).sum()
        assert (record["iat_sum_ns_fwd"], record["iat_sumsq_us2_fwd"]) == (gaps.sum(), ((gaps // 1000) ** 2).sum())


@pytest.mark.parametrize("gap", [0, 1, 500])
def test_a_handshake_faster_than_the_clock_is_still_seen(gap: int) -> None:
    with loaded() as program:
        program.feed([tcp("S"), tcp("SA", back=True)], [SECOND, SECOND + gap])
        (record,) = flows(drain_all(program))
    assert record["handshake_ns"] == max(gap, 1)


FLAGS = {letter: 1 << bit for bit, letter in enumerate("FSRPAUEC")}


@dataclass
class Packet:
    """One packet of a conversation, and what a frame made of it says."""

    at: int
    back: bool
    flags: str
    load: int
    ttl: int
    vlan: int

    def frame(self) -> bytes:
        plain = tcp(self.flags, back=self.back, load=self.load, ttl=self.ttl)
        return plain[:12] + b"\x81\x00" + self.vlan.to_bytes(2, "big") + plain[12:] if self.vlan else plain


def expected(packets: list[Packet], *, reason: int, continued: bool) -> dict[str, int]:
    """A record of these packets, by plain arithmetic. The first packet of all came from the initiator."""
    syn = next((p.at for p in packets if "S" in p.flags and "A" not in p.flags), None)
    answer = next((p.at for p in packets if "S" in p.flags and "A" in p.flags), None)
    told: dict[str, int] = {
        "start_ns": packets[0].at,
        "end_ns": packets[-1].at,
        "end_reason": reason,
        "vlan": packets[0].vlan,
        "flags": any(p.vlan != packets[0].vlan for p in packets) | continued << 1,
        "handshake_ns": answer - syn if syn is not None and answer is not None and answer > syn else 0,
        "ifindex": 1,  # BPF_PROG_TEST_RUN's is the loopback
        "icmp_valid": 0,
    }
    for way, mine in (("fwd", [p for p in packets if not p.back]), ("rev", [p for p in packets if p.back])):
        sizes = [len(p.frame()) for p in mine]
        gaps = [b.at - a.at for a, b in pairwise(mine)]
        told |= {
            f"packets_{way}": len(mine),
            f"bytes_{way}": sum(sizes),
            f"length_min_{way}": min(sizes, default=0),
            f"length_max_{way}": max(sizes, default=0),
            f"length_sumsq_{way}": sum(size**2 for size in sizes),
            f"iat_sum_ns_{way}": sum(gaps),
            f"iat_sumsq_us2_{way}": sum(min(gap // 1000, 1 << 26) ** 2 for gap in gaps),
            f"last_ns_{way}": mine[-1].at if mine else 0,
            f"ttl_min_{way}": min((p.ttl for p in mine), default=0),
            f"ttl_max_{way}": max((p.ttl for p in mine), default=0),
            f"tcp_flags_{way}": reduce(or_, (FLAGS[letter] for p in mine for letter in p.flags), 0),
            f"fragments_{way}": 0,
        }
    return told


def conversation(rng: np.random.Generator) -> list[Packet]:
    """SYN, SYN-ACK, some data with any flags that end nothing; in another VLAN now and then."""
    at, packets = SECOND, []
    for number in range(rng.integers(3, 40)):
        at += int(rng.choice([1, 700, 1_500, 250_000, 40_000_000, 900_000_000]))
        back, flags = bool(rng.random() < 0.4), "".join(c for c in "PAUEC" if rng.random() < 0.4) or "A"
        if number < 2:
            back, flags = bool(number), ("SEC", "SAE")[number]
        vlan = int(rng.choice([0, 7, 4095])) if rng.random() < 0.1 else 5
        packets.append(Packet(at, back, flags, int(rng.integers(0, 1400)), int(rng.integers(1, 256)), vlan))
    return packets


@both_loaders
@pytest.mark.parametrize("ending", ["idle", "reset", "flush"])
def test_every_field_of_a_record_is_what_its_packets_say(loader: Loader, ending: str) -> None:
    rng, reason = np.random.default_rng(20261124), {"idle": 1, "reset": 3, "flush": 4}[ending]
    with loaded(loader=loader, active_ns=0) as program:
        for _ in range(30):
            packets = conversation(rng)
            if ending == "reset":
                packets.append(Packet(packets[-1].at + 5, True, "RA", 0, 64, 5))
            program.feed([p.frame() for p in packets], [p.at for p in packets])
            if ending == "flush":
                program.flush()
            else:
                program.expire(packets[-1].at + 15 * SECOND)
            (record,) = flows(program.ring.drain())
            told = expected(packets, reason=reason, continued=False)
            assert {name: record[name] for name in told} == told


def test_every_field_of_each_part_of_a_long_flow_is_what_its_own_packets_say() -> None:
    """Cut by the active timeout: minima and moments begin anew, the initiator stays who sent the very first packet."""
    rng = np.random.default_rng(3)
    packets = [
        Packet(SECOND + number * 400_000_000, bool(number % 3 == 2), "A", int(rng.integers(0, 1400)), 60 + number, 5)
        for number in range(60)
    ]
    with loaded(active_ns=10 * SECOND) as program:
        program.feed([p.frame() for p in packets], [p.at for p in packets])
        records = flows(drain_all(program))
    parts: list[list[Packet]] = []
    for packet in packets:
        if not parts or packet.at - parts[-1][0].at >= 10 * SECOND:
            parts.append([])
        parts[-1].append(packet)
    assert len(records) == len(parts) == 3
    for number, (record, part) in enumerate(zip(records, parts, strict=True)):
        told = expected(part, reason=2 if number < 2 else 4, continued=number > 0)
        assert {name: record[name] for name in told} == told
