"""History: against itself cut in other ways, and against sums done by hand."""

import math
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scipy.stats import t as student

from flowsage.graph.build import Contacts, contacts
from flowsage.graph.flows import FlowBatch, from_table
from flowsage.models import history as module
from flowsage.models.history import History, HistoryConfig
from flowsage.models.history_scores import HistoryScores
from flowsage.models.terms import C_SS
from flowsage.models.volume import log_tail
from flowsage.models.weights import CONSTANTS, WEIGHTS

MINUTE = 60_000_000_000
UNDIRECTED = HistoryConfig(undirected=True)


def flow_table(rows: list[dict[str, Any]]) -> pa.Table:
    names = ("start_ns", "src_ip", "dst_ip", "src_port", "dst_port", "proto", "packets_fwd", "packets_rev", "bytes_fwd")
    kinds = {"src_ip": pa.string(), "dst_ip": pa.string(), "state": pa.string()}
    columns = {
        n: pa.array([row.get(n) for row in rows], kinds.get(n, pa.int64())) for n in (*names, "bytes_rev", "state")
    }
    return pa.table(columns)


def traffic(seed: int, minutes: int = 40, flows: int = 60) -> pa.Table:
    """Clients of servers, beats, a scan that is never answered, flows of which little is known, and quiet minutes."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for minute in range(minutes):
        if rng.random() < 0.15:
            continue
        begin = (1_000_000 + minute) * MINUTE
        for _ in range(rng.poisson(flows)):
            proto, port = [(6, 443), (6, 22), (17, 53), (6, 8080), (1, None)][rng.integers(5)]
            answered = bool(rng.random() < 0.85)
            row = {"start_ns": begin + int(rng.integers(MINUTE)), "src_ip": f"c{rng.zipf(1.6) % 30}"}
            row |= {"dst_ip": f"s{rng.zipf(1.8) % 12}", "proto": proto, "dst_port": port}
            row |= {"src_port": int(rng.integers(32_768, 60_000)) if port else None, "packets_fwd": 3}
            row |= {"packets_rev": 3 * answered, "bytes_fwd": int(rng.lognormal(6, 1 + 2 * (rng.random() < 0.05)))}
            row |= {"bytes_rev": int(rng.lognormal(7, 2)) * answered, "state": None if answered else "S0"}
            if rng.random() < 0.1:
                row |= {"packets_rev": None, "bytes_rev": None, "bytes_fwd": None, "state": None}
            rows.append(row)
        for k in range(3):
            row = {"src_ip": f"c{k}", "dst_ip": "beacon" if k else "clock", "proto": 6, "dst_port": 80 + k}
            row |= {"start_ns": begin + 7 * 10**9 + int(rng.normal(0, 1e8)), "src_port": 40_000, "packets_fwd": 2}
            rows.append(row | {"packets_rev": 2, "bytes_fwd": 200 + k, "bytes_rev": 100})
        if minute > minutes // 2:
            for k in range(15):
                row = {"src_ip": "c4", "dst_ip": f"s{minute}.{k}", "proto": 6, "dst_port": 445, "state": "REJ"}
                rows.append(row | {"start_ns": begin + k * 10**9, "src_port": 50_000, "packets_fwd": 1})
    return flow_table(sorted(rows, key=lambda row: int(row["start_ns"])))


def windows(flows: FlowBatch, run: Contacts, begin: int, end: int) -> tuple[FlowBatch, Contacts]:
    part = flows.take(slice(int(run.flow_offsets[begin]), int(run.flow_offsets[end])))
    return part, contacts(part, MINUTE)


def whole(table: pa.Table, config: HistoryConfig | None = None) -> tuple[HistoryScores, History]:
    history = History(config)
    flows = from_table(table, undirected=history.config.undirected)
    return history.score(flows, contacts(flows, MINUTE)), history


def in_runs(table: pa.Table, cuts: list[int] | None, config: HistoryConfig | None = None) -> tuple[Any, History]:
    """Scores of runs that end at `cuts` (None: every window), put together, and the history."""
    history = History(config)
    flows = from_table(table, undirected=history.config.undirected)
    run = contacts(flows, MINUTE)
    n = len(run.windows)
    edges = list(range(n + 1)) if cuts is None else [0, *cuts, n]
    parts = [history.score(*windows(flows, run, a, b)) for a, b in pairwise(edges)]
    return together(parts), history


def together(parts: list[HistoryScores]) -> dict[str, Any]:
    names = ("flow_score", "beacon_score", "window", "score", "known")
    columns = {name: np.concatenate([getattr(p, name) for p in parts]) for name in names}
    return columns | {f"term {k}": np.concatenate([p.terms[k] for p in parts]) for k in parts[0].terms}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name], err_msg=name)


@pytest.mark.parametrize("config", [HistoryConfig(), UNDIRECTED, HistoryConfig(max_keys=150)])
def test_scores_do_not_depend_on_how_windows_are_cut_into_runs(config: HistoryConfig) -> None:
    table = traffic(1)
    at_once, one_history = in_runs(table, [], config)
    n = len(np.unique(table.column("start_ns").to_numpy() // MINUTE))
    rng = np.random.default_rng(5)
    for cuts in (None, [1], sorted(rng.choice(np.arange(1, n), 6, replace=False).tolist())):
        scores, history = in_runs(table, cuts, config)
        assert_same(at_once, scores)
        assert_same(one_history.state(), history.state())


def test_scores_do_not_depend_on_chunks_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = in_runs(traffic(2), [])
    monkeypatch.setattr(module, "_CHUNK", 200)
    assert_same(expected, in_runs(traffic(2), [])[0])
    monkeypatch.setattr(module, "_THREADED", 0)
    assert_same(expected, in_runs(traffic(2), [])[0])


@pytest.mark.parametrize("config", [HistoryConfig(), UNDIRECTED])
def test_half_a_file_scores_as_the_first_half_of_the_whole(config: HistoryConfig) -> None:
    table = traffic(3)
    half = pc.less(table.column("start_ns"), (1_000_000 + 20) * MINUTE)
    first, _ = in_runs(table.filter(half), [], config)
    both, _ = in_runs(table, [], config)
    assert_same(first, {name: column[: len(first[name])] for name, column in both.items()})


def test_a_restored_history_goes_on_bit_for_bit() -> None:
    flows = from_table(traffic(4))
    run = contacts(flows, MINUTE)
    middle, end = len(run.windows) // 2, len(run.windows)
    history = History()
    history.score(*windows(flows, run, 0, middle))
    again = History.restore({name: array.copy() for name, array in history.state().items()})
    rest = windows(flows, run, middle, end)
    assert_same(together([history.score(*rest)]), together([again.score(*rest)]))
    assert_same(history.state(), again.state())


def test_a_history_is_not_restored_into_the_other_way_of_counting() -> None:
    with pytest.raises(ValueError, match="undirected=False"):
        History.restore(History().state(), UNDIRECTED)


@pytest.mark.parametrize("config", [HistoryConfig(), UNDIRECTED])
def test_a_lookup_says_what_the_next_window_will_be_told_and_learns_nothing(config: HistoryConfig) -> None:
    flows = from_table(traffic(5), undirected=config.undirected)
    run = contacts(flows, MINUTE)
    history = History(config)
    windows_of: Counter[tuple[int, ...]] = Counter()
    sources: dict[tuple[int, int], set[int]] = defaultdict(set)
    for k in range(len(run.windows)):
        part, these = windows(flows, run, k, k + 1)
        before = history.state()
        looked = history.lookup(these)
        assert_same(before, history.state())
        scored = history.score(part, these)
        np.testing.assert_array_equal(looked.known, scored.known)
        surprise = scored.parts.out.terms[C_SS, :: 1 + config.undirected]
        np.testing.assert_allclose(looked.C_ss, surprise, atol=1e-12)
        ways = list(zip(these.src.tolist(), these.dst.tolist(), these.service.tolist(), strict=True))
        assert looked.pair_known.tolist() == [windows_of[0, s, t] for s, t, _ in ways]
        assert looked.service_known.tolist() == [windows_of[1, s, svc] for s, _, svc in ways]
        assert looked.sources.tolist() == [len(sources[t, svc]) for _, t, svc in ways]
        ways += [(t, s, svc) for s, t, svc in ways] if config.undirected else []
        windows_of.update({(0, s, t) for s, t, _ in ways} | {(1, s, svc) for s, _, svc in ways})
        for s, t, svc in ways:
            sources[t, svc].add(s)


def visits(names: list[str], minutes: range, stranger: bool) -> pa.Table:
    """Regulars who come every minute to one server, and as many strangers who come once."""
    rows = []
    for minute in minutes:
        for k, name in enumerate(names):
            common = {"dst_port": 443, "proto": 6, "src_port": 40_000, "packets_fwd": 2, "packets_rev": 2}
            at = (5_000 + minute) * MINUTE + k * 10**8
            rows.append(common | {"start_ns": at, "src_ip": name, "dst_ip": "server", "bytes_fwd": 100 + k})
            if stranger:
                rows.append(common | {"start_ns": at + 1, "src_ip": f"{name} of {minute}", "dst_ip": "other"})
    return flow_table(rows)


def test_the_longest_unseen_leave_and_those_who_stay_score_as_if_nobody_had_left() -> None:
    names = [f"regular {k}" for k in range(20)]
    table = visits(names, range(30), stranger=True)
    free, bounded = (in_runs(table, None, HistoryConfig(max_keys=limit)) for limit in (10**6, 70))
    assert sum(free[1].evicted.values()) == 0
    assert bounded[1].evicted["es"] > 400
    assert max(bounded[1].keys.values()) <= 70
    for level in ("s", "ss", "e", "es"):
        assert bounded[1].evicted[level] + bounded[1].keys[level] == free[1].keys[level] == 20 + 20 * 30
    assert_same(free[0], bounded[0])


def test_who_left_and_comes_back_is_a_first_meeting_again() -> None:
    history = History(HistoryConfig(max_keys=30))
    come = visits(["early"], range(1), stranger=False)
    crowd = visits([f"crowd {k}" for k in range(40)], range(1, 2), stranger=False)
    back = visits(["early"], range(2, 3), stranger=False)
    known = []
    for table in (come, crowd, back):
        flows = from_table(table)
        scores = history.score(flows, contacts(flows, MINUTE))
        known.append(scores.known[0])
    assert known == [0, 0, 0]
    assert history.evicted["es"] >= 11


def test_a_flood_is_one_window_of_familiarity() -> None:
    flood = [
        {"start_ns": 9 * MINUTE + k, "src_ip": "a", "dst_ip": "b", "proto": 6, "dst_port": 80} for k in range(5_000)
    ]
    once = {"start_ns": 10 * MINUTE, "src_ip": "a", "dst_ip": "b", "proto": 6, "dst_port": 80}
    scores, history = whole(flow_table([*flood, once]))
    assert scores.known.tolist() == [0, 1]
    assert history.windows == 2


def test_what_is_never_answered_earns_no_familiarity() -> None:
    def knocks(state: str | None) -> HistoryScores:
        common = {"src_ip": "a", "dst_ip": "b", "proto": 6, "dst_port": 22, "state": state}
        return whole(flow_table([common | {"start_ns": k * MINUTE} for k in range(20)]))[0]

    refused, accepted = knocks("REJ").terms, knocks("SF").terms
    assert refused["B_s"][-1] == pytest.approx(math.log(20 / 0.5))
    assert accepted["B_s"][-1] == pytest.approx(math.log(20 / 19.5))


def test_the_first_windows_terms_are_those_done_by_hand() -> None:
    common = {"proto": 6, "dst_port": 80, "packets_fwd": 1, "packets_rev": 1, "bytes_fwd": 0, "bytes_rev": 0}
    rows = [common | {"src_ip": "a", "dst_ip": "b"}, common | {"src_ip": "a", "dst_ip": "c"}]
    rows += [common | {"src_ip": "d", "dst_ip": "b", "state": "S0"}]
    terms = whole(flow_table([row | {"start_ns": k} for k, row in enumerate(rows)]))[0].terms
    half, d = math.log(2), math.log(2)
    # Nothing was seen before: every B is −ln ½, so is D; a has two flows, d one; ss likewise (one service).
    for name in ("B_s", "B_ss", "K_ss", "B_svc"):
        assert terms[name] == pytest.approx([half] * 3)
    assert terms["D"] == pytest.approx([d] * 3)
    assert terms["F_s"] == pytest.approx([math.log(3) - math.log(2)] * 2 + [math.log(2) - math.log(3)])
    assert terms["F_ss"] == pytest.approx(terms["F_s"])
    assert terms["C_ss"] == pytest.approx([0] * 3)
    assert terms["P_ss"] == pytest.approx([math.log(2)] * 3)
    # All tokens of −ln p: p = 10 · (20 e^−D/20)/10 = e^−D.
    assert terms["dc"] == pytest.approx([d] * 3)
    assert terms["F_0"] == pytest.approx(1.5 * np.maximum(0, terms["F_s"]))
    assert terms["fail"].tolist() == [0, 0, 1]
    assert terms["A_0"].tolist() == [0, 0, 1]
    # Of three flows one is of a source that has no more: r = −ln((1 + 1½)/(3 + 1½)), that of the other is nought.
    assert terms["R_0"] == pytest.approx([0, 0, -math.log(2.5 / 4.5) / 2])
    weights = {"B_s": 1, "B_ss": 0.5, "K_ss": 0.25, "B_svc": 0.5, "F_s": 0.5, "F_ss": 1, "P_ss": 0.7, "dc": 0.5}
    weights |= {"F_0": 1, "R_0": 3, "A_0": 2}
    expected = sum(w * terms[name] for name, w in weights.items()) + 1.5 * terms["fail"]
    assert terms["history"] == pytest.approx(expected)


def test_a_beat_counts_no_more_than_its_pair_is_unusual() -> None:
    table = traffic(6, minutes=90)
    flows = from_table(table)
    run = contacts(flows, MINUTE)
    scores = whole(table)[0]
    earlier = np.repeat(np.arange(len(run.windows)), np.diff(run.flow_offsets))
    unusual = np.log((earlier + 1) / (scores.known[run.of_flow] + 0.5))
    beyond = scores.terms["Zc"] - CONSTANTS.beacon_floor
    limited, always = (np.maximum(scores.terms["history"], 4 * x) for x in (np.minimum(beyond, unusual), beyond))
    np.testing.assert_allclose(scores.flow_score, limited, atol=1e-9)
    unlimited = whole(table, HistoryConfig(weights=replace(WEIGHTS, B_es=math.inf)))[0].flow_score
    np.testing.assert_allclose(unlimited, always, atol=1e-9)
    np.testing.assert_array_equal(scores.terms["beat"], np.maximum(0.0, beyond))
    none = whole(table, HistoryConfig(weights=replace(WEIGHTS, beat=0.0)))[0]
    np.testing.assert_allclose(scores.terms["history"] - none.terms["history"], np.maximum(0.0, beyond), atol=1e-9)
    assert not none.terms["beat"].any()
    # Both beats are as old as the stream.
    assert (limited < always - 1).sum() > 50
    assert (limited > scores.terms["history"]).any()


def test_who_tries_port_after_port_by_the_clock_has_no_beat_on_any() -> None:
    common = {"src_ip": "a", "dst_ip": "b", "proto": 6, "src_port": 40_000, "bytes_fwd": 60, "packets_fwd": 1}
    others = [
        {"start_ns": k * MINUTE, "src_ip": f"x{k}", "dst_ip": f"y{k}", "proto": 6, "dst_port": 7} for k in range(60)
    ]
    many = [common | {"start_ns": k * MINUTE + 1, "dst_port": 1_000 + k} for k in range(60)]
    one = [common | {"start_ns": k * MINUTE + 1, "dst_port": 1_000} for k in range(60)]
    for tries, times in ((many, np.ones(60)), (one, np.arange(1, 61))):
        rows = sorted(tries + others, key=lambda row: int(row["start_ns"]))
        mine = np.array([row["src_ip"] == "a" for row in rows])
        table = flow_table(rows)
        terms = whole(table)[0].terms
        bare = whole(table, HistoryConfig(weights=replace(WEIGHTS, once=0.0)))[0].terms
        assert terms["LLR"][mine][-1] > 50
        assert bare["Z"][mine][-1] > 4
        np.testing.assert_allclose(terms["Z"][mine], bare["Z"][mine] * (1 - 1 / times), atol=1e-9)


def test_where_there_are_no_services_a_burst_counts_once() -> None:
    table = traffic(6, minutes=8)
    bare = table.select(["start_ns", "src_ip", "dst_ip"])
    for known, terms in ((True, whole(table)[0].terms), (False, whole(bare)[0].terms)):
        assert np.abs(terms["F_s"]).max() > 0.3
        np.testing.assert_array_equal(terms["F_1"], 0.0 if known else -terms["F_s"])
    np.testing.assert_allclose(terms["F_s"], terms["F_ss"], atol=1e-12)


@pytest.mark.parametrize("config", [HistoryConfig(), UNDIRECTED])
def test_who_sends_to_itself_is_unusual_unless_it_always_does(config: HistoryConfig) -> None:
    rows = [{"start_ns": k * MINUTE, "src_ip": "lo", "dst_ip": "lo"} for k in range(30)]
    rows += [{"start_ns": k * MINUTE + 1, "src_ip": "a", "dst_ip": "b"} for k in range(30)]
    rows += [{"start_ns": k * MINUTE + 2, "src_ip": "a", "dst_ip": "a"} for k in (20, 25)]
    rows.sort(key=lambda row: int(row["start_ns"]))
    terms = whole(flow_table(rows), config)[0].terms
    own, src = terms["B_self"], np.array([row["src_ip"] for row in rows])
    itself = np.array([row["src_ip"] == row["dst_ip"] for row in rows])
    assert not own[~itself].any()
    assert own[src == "lo"] == pytest.approx([math.log((k + 1) / (k + 0.5)) for k in range(30)])
    assert own[(src == "a") & itself] == pytest.approx([math.log(21 / 0.5), math.log(26 / 1.5)])


def test_what_is_a_little_beyond_the_usual_volume_counts_most() -> None:
    table = traffic(6, minutes=30)
    scores, _ = whole(table)
    off, _ = whole(table, HistoryConfig(weights=replace(WEIGHTS, V_log=0.0)))
    v = scores.terms["V_rev"]
    assert ((v > 0) & (v < 3)).any()
    together = np.maximum(v / 2, 1.5 * np.log1p(v))
    np.testing.assert_allclose(scores.terms["history"] - off.terms["history"], together - v / 2, atol=1e-9)
    assert not off.terms["V_log"].any()
    np.testing.assert_allclose(scores.flow_score, np.maximum(scores.terms["history"], scores.flow_score), atol=1e-9)


def test_a_hosts_window_is_the_highest_of_its_peers_and_a_quarter_of_how_all_are() -> None:
    table = traffic(6, minutes=6)
    scores, _ = whole(table)
    frame = table.select(["start_ns", "src_ip", "dst_ip"]).to_pandas().assign(score=scores.flow_score)
    frame["window"] = frame.start_ns // MINUTE
    best = frame.groupby(["window", "src_ip", "dst_ip"]).score.max()
    per_host = best.groupby(["window", "src_ip"])
    expected = 0.75 * per_host.max() + 0.25 * per_host.mean()
    names = np.asarray(from_table(table).hosts.names.to_pylist(), object)
    ours = pd.Series(scores.score, pd.MultiIndex.from_arrays([scores.window, names[scores.host]]))
    assert len(ours) == len(expected)
    np.testing.assert_allclose(ours.sort_index(), expected.sort_index())


def test_unknown_volumes_say_nothing_and_teach_nothing() -> None:
    common = {"src_ip": "a", "dst_ip": "b", "proto": 6, "dst_port": 80}
    rows = [common | {"start_ns": k * MINUTE, "bytes_fwd": 500 if k % 2 else None} for k in range(40)]
    rows += [common | {"start_ns": 40 * MINUTE, "bytes_fwd": 10**9}]
    known = [row for row in rows if row.get("bytes_fwd") is not None]
    mixed, clean = whole(flow_table(rows))[0].terms["V_fwd"], whole(flow_table(known))[0].terms["V_fwd"]
    assert mixed[-1] == clean[-1] > 10
    assert np.all(mixed[:-1:2] == 0)


def test_a_regular_pair_gathers_evidence_and_an_irregular_one_does_not() -> None:
    rng = np.random.default_rng(7)
    regular = np.cumsum(rng.normal(90, 1, 100))
    poisson = np.cumsum(rng.exponential(90, 100))
    rows = [{"start_ns": int(t * 1e9), "src_ip": "beats", "dst_ip": "x"} for t in regular]
    rows += [{"start_ns": int(t * 1e9), "src_ip": "wanders", "dst_ip": "y"} for t in poisson]
    rows = [row | {"proto": 6, "dst_port": 443} for row in sorted(rows, key=lambda row: int(row["start_ns"]))]
    terms = whole(flow_table(rows))[0].terms
    beats = np.array([row["src_ip"] == "beats" for row in rows])
    assert terms["LLR"][beats].max() > 100
    assert terms["LLR"][~beats].max() < 10
    assert terms["Z"][beats].max() > 5 > terms["Z"][~beats].max()


def test_windows_are_learnt_once_and_in_order() -> None:
    flows = from_table(traffic(8, minutes=3))
    run = contacts(flows, MINUTE)
    history = History()
    history.score(flows, run)
    with pytest.raises(ValueError, match="not later than"):
        history.score(flows, run)
    with pytest.raises(ValueError, match="same run"):
        History().score(flows.take(slice(0, 3)), run)


def test_no_flows_are_no_windows() -> None:
    flows = from_table(flow_table([]))
    scores = History().score(flows, contacts(flows, MINUTE))
    assert len(scores.flow_score) == len(scores.score) == len(scores.known) == 0


def test_the_tail_of_student_is_scipys() -> None:
    for nu in (*range(2, 53), 2.5, 7.3, 200.0):
        z = np.concatenate([np.linspace(0.1, 8, 80), np.geomspace(9, 1e4, 40)])
        ours, theirs = np.array([log_tail(float(x), float(nu)) for x in z]), student.logsf(z, nu)
        told = np.isfinite(theirs)  # scipy takes the logarithm of a tail that underflows
        np.testing.assert_allclose(ours[told], theirs[told], rtol=1e-9)
        assert np.all(np.isfinite(ours))
        assert np.all(np.diff(ours) < 0)
