"""Rarity: against sums done plainly, and against what it is there for."""

import math

import numpy as np
import pytest

from flowsage.models.rarity import BUCKETS, STEP, rarity
from tests.models.test_history import MINUTE, flow_table
from tests.models.test_load import whole


def step(flows: int) -> int:
    return int(math.log1p(flows) / STEP)


def surprise(flows: int, rows: list[int]) -> float:
    mean = sum(rows) / len(rows)
    below = sum(f for f in rows if step(f) <= step(flows))
    return -math.log((below + mean) / (sum(rows) + mean))


def plainly(windows: list[list[int]], worth: float) -> list[np.ndarray]:
    """R_0 of each source of each window, from its flows."""
    rows: list[int] = []
    out = []
    for window in windows:
        rows = rows + window
        usual = sum(surprise(f, rows) for f in rows) / len(rows)
        out.append(np.array([worth * max(0.0, surprise(f, rows) - usual) for f in window]))
    return out


def test_rarity_is_what_plain_sums_say() -> None:
    rng = np.random.default_rng(3)
    windows = [(1 + rng.geometric(0.02, 20) * (rng.random(20) < 0.8)).tolist() for _ in range(5)]
    peers = np.zeros((2, BUCKETS))
    for flows, expected in zip(windows, plainly(windows, 0.7), strict=True):
        x = np.log1p(np.array(flows, np.float64))
        rarity(x, 0.7, peers)
        np.testing.assert_allclose(x, expected, atol=1e-9)
        assert expected.max() > 0.5


@pytest.mark.parametrize("flows", [[5], [9, 9, 9, 9], [1, 400]])
def test_one_source_or_many_alike_or_two_say_little(flows: list[int]) -> None:
    x = np.log1p(np.array(flows, np.float64))
    rarity(x, 1.0, np.zeros((2, BUCKETS)))
    assert x.max() < math.log(3)


def generated(quiet: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores, in the first minutes, of twelve clients that ask ten servers evenly, and of `quiet` intruders' flows."""
    rng = np.random.default_rng(5)
    rows = []
    for k in range(3_000 + quiet):
        who = f"b{k % 4}" if k >= 3_000 else f"a{rng.integers(12)}"
        rows.append({
            "start_ns": int(rng.random() * 2.6 * MINUTE), "src_ip": who, "dst_ip": f"c{rng.integers(10)}", "proto": 6,
            "dst_port": int(rng.choice([25, 53, 80, 443])), "packets_fwd": 4, "packets_rev": 4,
        })  # fmt: skip
    rows.sort(key=lambda row: int(str(row["start_ns"])))
    return whole(flow_table(rows)).flow_score, np.array([str(row["src_ip"]).startswith("b") for row in rows])


def test_who_does_little_among_many_that_do_much_stands_out_from_the_first_minute_on() -> None:
    score, rare = generated(60)
    others = np.sort(score[~rare])
    assert np.searchsorted(others, score[rare]).mean() / len(others) > 0.9
