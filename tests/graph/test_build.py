"""Contacts: what a run of windows folds to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowsage.graph import fold
from flowsage.graph.build import Contacts, contacts
from flowsage.graph.flows import FlowBatch
from tests.graph.generate import handmade, power_law

W = 1_000
ALL_TIME = 1 << 62
"""The window of who folds one pane at a time, wherever it is."""
VOLUMES = ("packets_fwd", "packets_rev", "bytes_fwd", "bytes_rev")


def naive(flows: FlowBatch, window: Sequence[int]) -> tuple[list[dict[str, Any]], list[int]]:
    """The definition, as a dictionary."""
    found: dict[tuple[int, int, int, int], dict[str, Any]] = {}
    number: dict[tuple[int, int, int, int], int] = {}
    of_flow = []
    for i in range(len(flows)):
        key = (int(window[i]), int(flows.src[i]), int(flows.dst[i]), int(flows.service[i]))
        tcp = int(flows.proto[i]) == 6
        if key not in found:
            number[key] = len(found)
            sums = dict.fromkeys(
                ("flows", "answered", "failed", "packets_fwd", "packets_rev", "bytes_fwd", "bytes_rev"), 0
            )
            found[key] = {
                **dict(zip(("window", "src", "dst", "service"), key, strict=True)),
                **sums,
                "first_ns": int(flows.start_ns[i]),
                "last_ns": -(2**63),
                "kept": not tcp,
                "told": False,
            }
        c = found[key]
        c["flows"] += 1
        c["answered"] += bool(flows.answered[i])
        c["failed"] += bool(flows.failed[i])
        for name in VOLUMES:
            c[name] += max(0, int(getattr(flows, name)[i]))
        c["last_ns"] = max(c["last_ns"], int(flows.end_ns[i]))
        c["kept"] |= bool(flows.answered[i])
        c["told"] |= bool(flows.told[i])
        of_flow.append(number[key])
    return list(found.values()), of_flow


def check(flows: FlowBatch, window: Sequence[int], result: Contacts) -> None:
    expected, of_flow = naive(flows, window)
    assert len(result) == len(expected)
    assert result.of_flow.tolist() == of_flow
    for name in expected[0] if expected else ():
        assert getattr(result, name).tolist() == [c[name] for c in expected], name
    distinct = sorted(set(window))
    assert result.windows.tolist() == distinct
    counts = [sum(c["window"] == w for c in expected) for w in distinct]
    assert result.offsets.tolist() == np.cumsum([0, *counts]).tolist()
    assert result.flow_offsets.tolist() == np.cumsum([0, *(list(window).count(w) for w in distinct)]).tolist()


def equal(a: Contacts, b: Contacts) -> None:
    for f in fields(Contacts):
        if f.name != "hosts":
            assert getattr(a, f.name).tolist() == getattr(b, f.name).tolist(), f.name
            assert getattr(a, f.name).dtype == getattr(b, f.name).dtype, f.name


row = st.fixed_dictionaries(
    {
        "src": st.sampled_from("abcd"),
        "dst": st.sampled_from("abcd"),
        "start_ns": st.integers(-5 * W, 5 * W),
        "length": st.integers(0, 3 * W),
        "proto": st.sampled_from([6, 17, None]),
        "dst_port": st.sampled_from([80, 443]),
        "src_port": st.sampled_from([50_000, 22]),
        "packets_fwd": st.one_of(st.none(), st.integers(0, 9)),
        "packets_rev": st.one_of(st.none(), st.integers(0, 2)),
        "bytes_fwd": st.one_of(st.none(), st.integers(0, 2**50)),
        "bytes_rev": st.one_of(st.none(), st.integers(0, 9)),
        "state": st.sampled_from([None, "S0", "SF", "REJ"]),
    }
)


def ordered(rows: list[dict[str, Any]]) -> FlowBatch:
    rows = sorted(rows, key=lambda r: r["start_ns"])
    return handmade([{**r, "end_ns": r["start_ns"] + r["length"]} for r in rows])


@settings(max_examples=200, deadline=None)
@given(st.lists(row, min_size=1, max_size=60), st.sampled_from([1, W // 3, W, 4 * W, ALL_TIME]))
def test_contacts_are_what_a_dictionary_says(rows: list[dict[str, Any]], window_ns: int) -> None:
    flows = ordered(rows)
    check(flows, [int(t) // window_ns for t in flows.start_ns], contacts(flows, window_ns))


@settings(max_examples=40, deadline=None)
@given(st.lists(row, min_size=1, max_size=60), st.data())
def test_windows_do_not_depend_on_the_run_they_are_in(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    flows = ordered(rows)
    whole = contacts(flows, W)
    cuts = whole.flow_offsets.tolist()
    middle = data.draw(st.sampled_from(cuts))
    parts = [contacts(flows.take(slice(a, b)), W) for a, b in ((0, middle), (middle, len(flows))) if a < b]
    of_parts = [part.slice(k) for part in parts for k in range(len(part.windows))]
    assert len(of_parts) == len(whole.windows)
    for k, (a, b, of_part) in enumerate(zip(cuts[:-1], cuts[1:], of_parts, strict=True)):
        alone = contacts(flows.take(slice(a, b)), W)
        equal(whole.slice(k), alone)
        equal(of_part, alone)
    with pytest.raises(IndexError, match="run of"):
        whole.slice(len(whole.windows))


def test_many_flows_over_many_windows_are_what_a_dictionary_says() -> None:
    flows = power_law(40_000, 900, 9_000, windows=7)
    window_ns = 60_000_000_000
    check(flows, (flows.start_ns // window_ns).tolist(), contacts(flows, window_ns))


def test_a_large_window_after_many_small_ones_is_right_and_leaves_no_trace() -> None:
    small = power_law(30, 10, 12)
    before = contacts(small, 60_000_000_000)
    large = power_law(300_000, 20_000, 290_000, seed=3)
    result = contacts(large, 60_000_000_000)
    keys = np.unique(np.stack([large.src, large.dst, large.service]), axis=1)
    assert len(result) == keys.shape[1]
    assert np.array_equal(result.src[result.of_flow], large.src)
    assert np.array_equal(result.dst[result.of_flow], large.dst)
    assert np.array_equal(result.service[result.of_flow], large.service)
    assert np.array_equal(result.flows, np.bincount(result.of_flow))
    assert np.array_equal(result.bytes_fwd, np.bincount(result.of_flow, large.bytes_fwd).astype(np.int64))
    equal(contacts(small, 60_000_000_000), before)


def test_epochs_that_run_out_start_again_with_an_empty_table() -> None:
    flows = power_law(5_000, 50, 1_500, windows=40)
    expected = contacts(flows, 60_000_000_000)
    fold._scratch.epoch = fold._LAST_EPOCH - 20
    equal(contacts(flows, 60_000_000_000), expected)
    assert fold._scratch.epoch < 1_000
    equal(contacts(flows, 60_000_000_000), expected)


def test_no_flows_have_no_contacts() -> None:
    flows = power_law(10, 5, 5).take(slice(0, 0))
    result = contacts(flows, W)
    assert (len(result), result.offsets.tolist(), result.windows.tolist()) == (0, [0], [])


def test_flows_that_go_back_in_time_are_refused() -> None:
    flows = power_law(100, 10, 20, windows=3)
    for order in (np.arange(100)[::-1], np.r_[0, 99, 1:99], np.r_[1:100, 0]):
        with pytest.raises(ValueError, match="not in time order"):
            contacts(flows.take(order), 60_000_000_000)
    with pytest.raises(ValueError, match="window_ns"):
        contacts(flows, 0)


LOGIN = {"src": "a", "dst": "b", "start_ns": 0, "proto": 6, "src_port": 50_000, "dst_port": 22}


@pytest.mark.parametrize(
    ("columns", "tries"),
    [
        ({}, 1.0),
        ({"packets_fwd": 20, "packets_rev": 18, "bytes_fwd": 5_145, "bytes_rev": 5_013}, 1.0),
        ({"dst_port": 3_389, "bytes_fwd": 30_000, "bytes_rev": 35_536}, 1 / 16),
        ({"packets_fwd": 64, "packets_rev": 64}, 1 / 4),
        ({"packets_fwd": 3, "packets_rev": 1}, 0.0),
        ({"dst_port": 443}, 0.0),
        ({"proto": 17}, 0.0),
        ({"state": "REJ"}, 0.0),
        ({"tcp_flags_fwd": 0x18, "tcp_flags_rev": 0x18}, 0.0),
        ({"tcp_flags_fwd": 0x1A, "tcp_flags_rev": 0x1A}, 1.0),
    ],
)
def test_a_try_is_a_session_that_began_and_said_little(columns: dict[str, Any], tries: float) -> None:
    rows = [LOGIN | columns, LOGIN | columns | {"start_ns": 1}]
    assert contacts(handmade(rows), W).tries.tolist() == [pytest.approx(2 * tries)]
