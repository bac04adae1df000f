"""The statistics of a record against NumPy over the same packets."""

import numpy as np
import pytest

from .support import SECOND, drain_all, flows, loaded, needs_root, tcp

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
