"""Load of offered services: against sums done plainly, and against what it is there for."""

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flowsage.graph.build import contacts
from flowsage.graph.flows import from_table
from flowsage.models.history import History, HistoryConfig
from flowsage.models.history_scores import HistoryScores
from flowsage.models.weights import WEIGHTS
from tests.models.test_history import MINUTE, flow_table, traffic

Pairs = dict[Any, list[float]]


def whole(table: pa.Table, config: HistoryConfig | None = None) -> HistoryScores:
    config = config or HistoryConfig()
    flows = from_table(table, undirected=config.undirected)
    return History(config).score(flows, contacts(flows, MINUTE))


def plainly(table: pa.Table, *, undirected: bool) -> np.ndarray:
    """F_o, N_o, G_o of each flow f8[3, n], undirected the mean of both ways."""
    flows = from_table(table, undirected=undirected)
    run = contacts(flows, MINUTE)
    ways = [(run.src, run.dst), (run.dst, run.src)] if undirected else [(run.src, run.dst)]
    past: Pairs = defaultdict(lambda: [0.0, 0.0, 0.0])
    out = np.zeros((3, len(run)))
    for k, (begin, end) in enumerate(zip(run.offsets[:-1], run.offsets[1:], strict=True)):
        count: dict[Any, int] = defaultdict(int)
        sources = defaultdict(set)
        for src, dst in ways:
            for c in range(begin, end):
                count[dst[c], run.service[c]] += int(run.flows[c])
                sources[dst[c], run.service[c]].add(src[c])
        now = {o: (math.log1p(count[o]), math.log1p(len(sources[o]))) for o in count}
        terms = {}
        for o, (x, _) in now.items():
            others = [v for other, v in past.items() if other != o] + [[1.0, *v] for p, v in now.items() if p != o]
            n = sum(v[0] for v in others)
            mx, my = (sum(v[i] for v in others) / n if n else 0.0 for i in (1, 2))
            cold = (60 / (60 + k)) ** 2 * max(0.0, x - mx - 2.5) if n else 0.0
            burst, crowd = ((now[o][i] - (past[o][1 + i] + 3 * m) / (k + 3)) for i, m in enumerate((mx, my)))
            terms[o] = max(0.0, burst - 4.0), max(0.0, crowd - 3.5), cold
        for _, dst in ways:
            for c in range(begin, end):
                out[:, c] += np.array(terms[dst[c], run.service[c]]) / len(ways)
        for o, (x, y) in now.items():
            past[o] = [past[o][0] + 1.0, past[o][1] + x, past[o][2] + y]
    return out[:, run.of_flow]


def crowd(minute: int, sources: int = 400, flows: int = 1) -> list[dict[str, Any]]:
    """Many sources at one service, in one minute."""
    common = {"dst_ip": "s1", "proto": 6, "dst_port": 443, "packets_fwd": 2, "packets_rev": 2}
    return [
        common | {"start_ns": (1_000_000 + minute) * MINUTE + k, "src_ip": f"x{k // flows}"}
        for k in range(sources * flows)
    ]


def among(table: pa.Table, rows: list[dict[str, Any]]) -> tuple[pa.Table, np.ndarray]:
    """A table with more rows in order of time, and which these are."""
    rows = [row | {"attack": False} for row in table.to_pylist()] + [row | {"attack": True} for row in rows]
    rows.sort(key=lambda row: int(row["start_ns"]))
    return flow_table(rows), np.array([row["attack"] for row in rows])


@pytest.mark.parametrize("undirected", [False, True])
def test_load_is_what_plain_sums_say(undirected: bool) -> None:
    table, _ = among(traffic(3, minutes=12), [*crowd(3), *crowd(9, sources=1, flows=900)])
    terms = whole(table, HistoryConfig(undirected=undirected)).terms
    for name, expected in zip(("F_o", "N_o", "G_o"), plainly(table, undirected=undirected), strict=True):
        np.testing.assert_allclose(terms[name], expected, atol=1e-9, err_msg=name)
        assert expected.max() > 0.3


@pytest.mark.parametrize("undirected", [False, True])
def test_bursts_count_again_while_nothing_has_a_past(undirected: bool) -> None:
    table = traffic(8, minutes=20)
    flows = from_table(table, undirected=undirected)
    seen = contacts(flows, MINUTE)
    earlier = np.repeat(np.arange(len(seen.windows)), np.diff(seen.flow_offsets))
    terms = whole(table, HistoryConfig(undirected=undirected)).terms
    if not undirected:  # else of the mean of both ways
        burst = np.maximum(0.0, terms["F_ss"]) + np.maximum(0.0, terms["F_s"]) / 2
        np.testing.assert_allclose(terms["F_0"], (60 / (60 + earlier)) ** 2 * burst, atol=1e-12)
    off = HistoryConfig(undirected=undirected, weights=replace(WEIGHTS, F_0=0.0))
    scores = whole(table, off)
    assert not scores.terms["F_0"].any()
    np.testing.assert_allclose(scores.terms["history"] + terms["F_0"], terms["history"], atol=1e-9)


def test_what_is_ordinary_bears_no_load() -> None:
    terms = whole(traffic(4)).terms
    assert not terms["F_o"].any()
    assert not terms["N_o"].any()
    assert terms["G_o"].max() < 0.5


@pytest.mark.parametrize(("minute", "least"), [(0, 0.95), (30, 0.97)])
def test_a_crowd_stands_out_from_the_first_minute_on(minute: int, least: float) -> None:
    table, attack = among(traffic(5, flows=40), crowd(minute, sources=600, flows=2))
    alone = HistoryConfig(weights=replace(WEIGHTS, F_o=0.0, N_o=0.0, G_o=0.0))

    def above(config: HistoryConfig) -> float:
        """Share of pairs of an attack's flow and another in which the attack's has the higher score."""
        scores = whole(table, config).flow_score
        others = np.sort(scores[~attack])
        return float(np.searchsorted(others, scores[attack]).mean() / len(others))

    assert above(HistoryConfig()) > max(least, above(alone))


def test_nobody_to_compare_with_is_no_load_of_the_first_minutes() -> None:
    terms = whole(flow_table(crowd(0))).terms
    assert not terms["G_o"].any()
    assert terms["N_o"] == pytest.approx([math.log1p(400) - 3.5] * 400)
