"""Windows by event time: what closes when, what is late, and that nothing is lost on the way."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowsage.graph.flows import FlowBatch, merge
from flowsage.graph.watermark import _WITNESSES
from flowsage.graph.window import WindowBuffer, WindowCounters
from tests.graph.generate import START_NS, handmade, power_law

W = 100
S = 10**9


def flows(*starts: int, rows: int = 0) -> FlowBatch:
    """Flows that start then; destination ports number them from `rows`, so that they can be told apart."""
    return handmade(
        [{"src": f"s{t % 7}", "dst": f"d{i % 3}", "start_ns": t, "dst_port": rows + i} for i, t in enumerate(starts)]
    )


def starts(batch: FlowBatch | None) -> list[int]:
    return [] if batch is None else batch.start_ns.tolist()


def hosts(batch: FlowBatch) -> list[tuple[str, str]]:
    names = batch.hosts.names.to_pylist()
    return [(names[s], names[d]) for s, d in zip(batch.src.tolist(), batch.dst.tolist(), strict=True)]


def balanced(buffer: WindowBuffer) -> bool:
    c = buffer.counters
    return c.received == c.closed + c.late + c.future + buffer.open_flows()


def test_a_window_closes_when_the_watermark_is_lateness_past_its_end() -> None:
    buffer = WindowBuffer(W, lateness_ns=30)
    buffer.add(flows(10, 120, 90))
    assert buffer.close_ready() is None
    buffer.add(flows(129))
    assert buffer.close_ready() is None
    buffer.add(flows(50, 130))
    assert starts(buffer.close_ready()) == [10, 50, 90]
    assert buffer.open_flows() == 3
    assert buffer.close_ready() is None
    assert starts(buffer.flush()) == [120, 129, 130]
    assert buffer.flush() is None
    assert balanced(buffer)


def test_flows_come_by_start_and_within_it_by_arrival() -> None:
    buffer = WindowBuffer(W)
    buffer.add(flows(30, 10, 30, rows=0))
    buffer.add(flows(30, 10, 20, rows=3))
    closed = buffer.flush()
    assert closed is not None
    assert closed.dst_port.tolist() == [1, 4, 5, 0, 2, 3]


def test_hosts_of_many_batches_share_one_table_of_those_that_occur() -> None:
    buffer = WindowBuffer(W)
    buffer.add(handmade([{"src": "a", "dst": "b", "start_ns": 1}]))
    buffer.add(handmade([{"src": "b", "dst": "c", "start_ns": 2}]))
    buffer.add(handmade([{"src": "c", "dst": "a", "start_ns": 3}, {"src": "z", "dst": "y", "start_ns": 250}]))
    closed = buffer.close_ready()
    assert closed is not None
    assert hosts(closed) == [("a", "b"), ("b", "c"), ("c", "a")]
    assert closed.hosts.names.to_pylist() == ["a", "b", "c"]


def test_a_late_record_is_used_while_its_window_is_open_and_counted_after() -> None:
    buffer = WindowBuffer(W, lateness_ns=50)
    buffer.add(flows(140))
    buffer.add(flows(20))
    assert (buffer.counters.behind, buffer.counters.late) == (1, 0)
    buffer.add(flows(150))
    assert starts(buffer.close_ready()) == [20]
    buffer.add(flows(30, 160))
    assert (buffer.counters.behind, buffer.counters.late) == (1, 1)
    assert starts(buffer.flush()) == [140, 150, 160]
    assert balanced(buffer)


def test_the_slowest_sensor_holds_windows_open() -> None:
    buffer = WindowBuffer(W)
    buffer.add(flows(10), "a")
    buffer.add(flows(20), "b")
    buffer.add(flows(500), "a")
    assert buffer.close_ready() is None
    buffer.add(flows(99), "b")
    assert buffer.close_ready() is None
    buffer.add(flows(205), "b")
    assert starts(buffer.close_ready()) == [10, 20, 99]


def test_an_idle_sensor_does_not_hold_windows_for_ever_and_is_waited_for_when_it_speaks_again() -> None:
    now = [1_000]
    buffer = WindowBuffer(W, clock=lambda: now[0], idle_timeout_ns=1_000)
    buffer.add(flows(10), "a")
    buffer.add(flows(20), "b")
    now[0] = 1_500
    buffer.add(flows(250), "a")
    assert buffer.close_ready() is None
    now[0] = 2_001
    assert starts(buffer.close_ready()) == [10, 20]
    assert buffer.counters.idled == 1
    buffer.add(flows(210, 40), "b")
    assert buffer.counters.late == 1
    buffer.add(flows(399), "a")
    assert buffer.close_ready() is None
    buffer.add(flows(300), "b")
    assert starts(buffer.close_ready()) == [210, 250]
    assert balanced(buffer)


def test_a_quiet_sensor_is_not_waited_for_when_it_says_how_far_it_is() -> None:
    buffer = WindowBuffer(W)
    buffer.add(flows(10), "a", watermark_ns=5)
    buffer.add(flows(150), "b", watermark_ns=140)
    assert buffer.close_ready() is None
    buffer.add(flows(), "a", watermark_ns=100)
    assert starts(buffer.close_ready()) == [10]
    buffer.add(flows(120), "a", watermark_ns=190)
    assert (buffer.counters.late, buffer.open_flows()) == (0, 2)


def test_records_of_a_batch_are_not_late_by_the_watermark_that_comes_with_it() -> None:
    buffer = WindowBuffer(W)
    buffer.add(flows(10, 150), watermark_ns=300)
    assert buffer.counters.late == 0
    assert starts(buffer.close_ready()) == [10, 150]
    buffer.add(flows(299, 300), watermark_ns=300)
    assert buffer.counters.late == 1


HOUR = 3_600_000_000_000


def test_a_sensor_an_hour_ahead_closes_nobodys_windows() -> None:
    buffer = WindowBuffer(60_000_000_000)
    for k in range(50):
        buffer.add(flows(k * 1_000_000_000), "right")
        buffer.add(flows(HOUR + k * 1_000_000_000), "ahead")
    assert buffer.close_ready() is None
    now = [59_000_000_000]
    buffer = WindowBuffer(60_000_000_000, clock=lambda: now[0], max_ahead_ns=2 * HOUR)
    buffer.add(flows(1, HOUR), "ahead")
    buffer.add(flows(), "ahead", watermark_ns=5 * HOUR)
    assert buffer.close_ready() is None
    now[0] = 61_000_000_000
    buffer.add(flows(5 * HOUR), "ahead", watermark_ns=5 * HOUR)
    assert buffer.counters.future == 1
    assert starts(buffer.close_ready()) == [1]
    assert balanced(buffer)


def test_a_single_wrong_time_moves_nothing_and_a_gap_is_passed_over() -> None:
    buffer = WindowBuffer(60_000_000_000)
    second = 1_000_000_000
    buffer.add(flows(*(k * second for k in range(20))))
    buffer.add(flows(10_000 * HOUR, 20 * second))
    assert buffer.watermark_ns == 20 * second
    assert buffer.counters.jumps == 1
    monday = [70 * HOUR + k * second for k in range(_WITNESSES)]
    for t in monday[:-1]:
        buffer.add(flows(t))
        assert buffer.watermark_ns == 20 * second
    buffer.add(flows(monday[-1]))
    assert buffer.watermark_ns == monday[0]
    assert len(starts(buffer.close_ready())) == 21
    buffer.add(flows(monday[0] + 90 * second))
    assert starts(buffer.close_ready()) == monday
    assert buffer.open_flows() == 2
    assert starts(buffer.flush())[-1] == 10_000 * HOUR


def test_a_wrong_time_at_the_very_start_moves_nothing() -> None:
    buffer = WindowBuffer(60_000_000_000)
    buffer.add(flows(10_000 * HOUR, 5, 7))
    assert buffer.watermark_ns == 7


stream = st.lists(
    st.tuples(
        st.lists(st.integers(-300, 900), max_size=8),
        st.sampled_from("ab"),
        st.one_of(st.none(), st.none(), st.integers(-300, 900)),
        st.integers(0, 40),
        st.booleans(),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(stream, st.integers(0, 150), st.booleans())
def test_every_record_is_closed_late_refused_or_open_at_any_moment(
    steps: list[tuple[Any, ...]], lateness: int, clocked: bool
) -> None:
    now = [0]
    buffer = WindowBuffer(
        W, lateness, clock=(lambda: now[0]) if clocked else None, idle_timeout_ns=60, max_ahead_ns=400
    )
    seen: list[int] = []
    taken: list[int] = []
    last_window = -(10**9)
    count = 0
    for times, sensor, watermark, tick, close in steps:
        now[0] += tick
        batch = flows(*times, rows=count)
        count += len(times)
        kept = buffer.add(batch, sensor, watermark)
        assert starts(kept) == [t for t in times if not clocked or t <= now[0] + 400]
        taken += kept.dst_port.tolist()
        assert balanced(buffer)
        if close:
            closed = buffer.close_ready()
            if closed is not None:
                assert np.all(np.diff(closed.start_ns) >= 0)
                assert closed.start_ns[0] // W > last_window
                last_window = int(closed.start_ns[-1]) // W
                seen += closed.dst_port.tolist()
        assert balanced(buffer)
    closed = buffer.flush()
    seen += [] if closed is None else closed.dst_port.tolist()
    assert buffer.open_flows() == 0
    assert balanced(buffer)
    assert len(seen) == len(set(seen)) == buffer.counters.closed
    assert len(taken) == len(set(taken)) == count - buffer.counters.future
    assert len(taken) - len(seen) == buffer.counters.late
    assert set(seen) <= set(taken) <= set(range(count))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=40), st.integers(0, 150), st.randoms(use_true_random=False))
def test_it_does_not_matter_how_records_were_cut_into_batches(
    times: list[int], lateness: int, chance: random.Random
) -> None:
    def run(sizes: list[int]) -> tuple[list[int], list[int], int | None, WindowCounters]:
        buffer = WindowBuffer(W, lateness)
        whole, at, out, taken = flows(*times), 0, [], []
        for size in sizes:
            taken += buffer.add(whole.take(slice(at, at + size))).dst_port.tolist()
            at += size
            out.append(buffer.close_ready())
        reached = buffer.watermark_ns
        out.append(buffer.flush())
        return [p for b in out if b is not None for p in b.dst_port.tolist()], taken, reached, buffer.counters

    sizes: list[int] = []
    while sum(sizes) < len(times):
        sizes.append(chance.randint(1, len(times)))
    assert run(sizes) == run([len(times)])


def test_who_takes_steps_of_arrival_gets_late_records_too_and_the_time_of_the_slowest_clock() -> None:
    buffer = WindowBuffer(W)
    assert buffer.arrival_ns is None
    buffer.hear("a", 310)
    assert starts(buffer.add(flows(305), "a", 300)) == [305]
    assert buffer.arrival_ns == 310
    assert starts(buffer.add(flows(2, 31), "a", 300)) == [2, 31]
    assert buffer.counters.late == 2
    buffer.hear("b", 290)
    assert buffer.arrival_ns == 310
    buffer.hear("b", 330)
    assert buffer.arrival_ns == 310
    buffer.hear("a", 340)
    assert buffer.arrival_ns == 330
    buffer.hear("b", 320)
    assert buffer.arrival_ns == 330


def test_thousands_of_small_batches_with_hosts_of_their_own_are_put_together_right() -> None:
    whole = power_law(20_000, 700, 3_000, windows=3, seed=5)
    names = whole.hosts.names.to_pylist()
    buffer, parts, order = WindowBuffer(60_000_000_000, 10**9), [], random.Random(1)
    for at in range(0, len(whole), 10):
        piece = whole.take(slice(at, at + 10))
        rows = [
            {"src": names[s], "dst": names[d], "start_ns": int(t), "dst_port": int(p)}
            for s, d, t, p in zip(piece.src, piece.dst, piece.start_ns, piece.dst_port, strict=True)
        ]
        order.shuffle(rows)
        buffer.add(handmade(rows))
        closed = buffer.close_ready()
        parts += [] if closed is None else [closed]
    closed = buffer.flush()
    assert closed is not None
    together = merge([*parts, closed])
    expected = sorted(
        zip(whole.start_ns.tolist(), hosts(whole), whole.dst_port.tolist(), strict=True),
    )
    assert sorted(zip(together.start_ns.tolist(), hosts(together), together.dst_port.tolist(), strict=True)) == expected
    assert len(parts) == 2
    assert np.all(np.diff(together.start_ns) >= 0)
    assert len(set(together.hosts.names.to_pylist())) == len(together.hosts)


def test_flows_in_order_are_handed_on_without_being_copied() -> None:
    whole = power_law(1_000, 50, 200, windows=2)
    buffer = WindowBuffer(60_000_000_000)
    buffer.add(whole)
    closed = buffer.close_ready()
    assert closed is not None
    assert np.shares_memory(closed.start_ns, whole.start_ns)
    assert closed.hosts is whole.hosts
    assert closed.start_ns[-1] < START_NS + 60_000_000_000


def test_lengths_that_make_no_windows_are_refused() -> None:
    for bad in ((0, 0), (-1, 0), (1, -1)):
        with pytest.raises(ValueError, match="positive"):
            WindowBuffer(*bad)


def test_merging_keeps_the_order_of_flows_and_what_only_some_know() -> None:
    plain = handmade([{"src": "a", "dst": "b", "start_ns": 1}])
    detailed = handmade(
        [{"src": "b", "dst": "c", "start_ns": 2, "proto": 6, "tcp_flags_fwd": 2, "tcp_flags_rev": 0, "handshake_ns": 7}]
    )
    both = merge([plain, detailed, plain])
    assert hosts(both) == [("a", "b"), ("b", "c"), ("a", "b")]
    assert both.detail is not None
    assert both.detail.handshake_ns.tolist() == [-1, 7, -1]
    assert both.detail.half_open.tolist() == [False, True, False]
    assert both.hosts.hash.tolist() == [*plain.hosts.hash.tolist(), detailed.hosts.hash.tolist()[1]]
    assert merge([plain]) is plain
    assert merge([plain, plain.take(slice(0, 0))]) is plain
    assert isinstance(both.hosts.names, pa.Array)
    with pytest.raises(ValueError, match="nothing"):
        merge([])


class Wall:
    def __init__(self, now: int) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def test_a_sensor_whose_clock_is_an_hour_behind_is_not_waited_for_and_its_records_are_late() -> None:
    wall = Wall(HOUR * 10)
    buffer = WindowBuffer(60 * S, clock=wall)
    for _ in range(600):
        wall.now += S
        for sensor, offset in (("right", 0), ("slow", -HOUR)):
            buffer.hear(sensor, wall.now + offset)
            buffer.add(flows(wall.now + offset), sensor, wall.now + offset - 60 * S)
        buffer.close_ready()
    assert buffer.counters.fell_behind == 1
    assert buffer.arrival_ns == wall.now
    assert buffer.counters.late > 500
    assert buffer.counters.closed > 450
    assert balanced(buffer)


def test_a_sensor_that_works_through_a_backlog_is_waited_for() -> None:
    wall = Wall(HOUR * 10)
    buffer = WindowBuffer(60 * S, clock=wall)
    for k in range(90):
        for sensor, time in (("spooled", wall.now - HOUR + k * 40 * S), ("right", wall.now)):
            buffer.hear(sensor, time)
            buffer.add(flows(time), sensor, time - S)
        wall.now += S
        buffer.close_ready()
    assert (buffer.counters.fell_behind, buffer.counters.late) == (0, 0)
    assert balanced(buffer)


def test_who_is_alone_is_waited_for_whatever_the_clock_says() -> None:
    wall = Wall(HOUR * 10)
    buffer = WindowBuffer(60 * S, clock=wall)
    for _ in range(600):
        wall.now += S
        buffer.hear("slow", wall.now - HOUR)
        buffer.add(flows(wall.now - HOUR), "slow", wall.now - HOUR - S)
        buffer.close_ready()
    assert buffer.arrival_ns == wall.now - HOUR
    assert buffer.counters.late == 0


def test_a_buffer_goes_on_from_its_state_and_the_flows_that_were_open() -> None:
    rng = np.random.default_rng(3)
    batches = [flows(*(k * 20 * S + rng.integers(-150 * S, 90 * S, 5)).tolist()) for k in range(60)]
    wall = Wall(0)

    def step(buffer: WindowBuffer, k: int) -> list[int]:
        wall.now = k * 20 * S
        buffer.hear("a", wall.now)
        buffer.add(batches[k], "a", wall.now - 30 * S)
        return starts(buffer.close_ready())

    buffer = WindowBuffer(60 * S, clock=wall, max_ahead_ns=60 * S)
    for k in range(30):
        step(buffer, k)
    other = WindowBuffer(60 * S, clock=wall, max_ahead_ns=60 * S)
    other.restore(json.loads(json.dumps(buffer.state())))
    for k in range(20, 30):
        other.hold_again(batches[k], k * 20 * S)
    assert other.open_flows() == buffer.open_flows() > 0
    assert [step(buffer, k) for k in range(30, 60)] == [step(other, k) for k in range(30, 60)]
    assert buffer.counters == other.counters
    assert buffer.counters.future > 0
    assert buffer.counters.late > 0
