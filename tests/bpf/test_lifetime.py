"""When a flow ends, why, and what the record says then."""

from typing import Any

import pytest

from flowsage.collector.kernel_object import Loader
from flowsage.collector.program import FlowProgram, FlowSettings
from flowsage.collector.testrun import verdict

from .support import SECOND, both_loaders, check_ledger, drain_all, flows, loaded, needs_root, tcp, udp

pytestmark = needs_root

IDLE, ACTIVE, DETECTED, FORCED, RESOURCES = 1, 2, 3, 4, 5
CONTINUED = 2


def feed(program: FlowProgram, *packets: tuple[float, bytes]) -> None:
    """(second, frame) each."""
    program.feed([frame for _, frame in packets], [round(at * SECOND) for at, _ in packets])


def expire(program: FlowProgram, at: float) -> list[dict[str, Any]]:
    program.expire(round(at * SECOND))
    check_ledger(program)
    return flows(program.ring.drain())


def closed() -> list[tuple[float, bytes]]:
    """A connection from SYN to the last ACK."""
    steps = [("S", False), ("SA", True), ("A", False), ("FA", False), ("FA", True), ("A", False)]
    return [(1 + i / 10, tcp(flags, back=back)) for i, (flags, back) in enumerate(steps)]


def test_a_closed_connection_is_a_record_at_its_last_ack() -> None:
    with loaded() as program:
        feed(program, *closed()[:-1])
        assert len(program.ring.drain()) == 0
        feed(program, closed()[-1])
        (record,) = flows(program.ring.drain())
        assert program.table().flows == 0
    assert (record["end_reason"], record["packets_fwd"], record["packets_rev"]) == (DETECTED, 4, 2)
    assert (record["start_ns"], record["end_ns"], record["handshake_ns"]) == (SECOND, SECOND * 3 // 2, SECOND // 10)


def test_fins_without_the_last_ack_wait_out_their_linger() -> None:
    with loaded(linger_ns=SECOND) as program:
        feed(program, *closed()[:-1])
        assert expire(program, 2.3) == []
        (record,) = expire(program, 2.4)
    assert (record["end_reason"], record["packets_fwd"] + record["packets_rev"]) == (DETECTED, 5)


def test_an_ack_of_the_side_that_closed_last_ends_nothing() -> None:
    """The ACK that counts is that of the second FIN, from the other side."""
    with loaded() as program:
        feed(program, *closed()[:-1], (1.45, tcp("A", back=True)))
        assert len(program.ring.drain()) == 0
        feed(program, closed()[-1])
        (record,) = flows(program.ring.drain())
    assert record["packets_rev"] == 3


def test_a_reset_flow_takes_its_stragglers_and_ends_after_the_linger() -> None:
    with loaded(linger_ns=SECOND) as program:
        feed(program, (1, tcp("S")), (2, tcp("RA", back=True)), (2.5, tcp("A")))
        assert expire(program, 3.4) == []
        (record,) = expire(program, 3.5)
    assert (record["end_reason"], record["packets_fwd"], record["packets_rev"]) == (DETECTED, 2, 1)


def test_a_straggler_after_the_linger_is_another_flow_though_no_walk_came_by() -> None:
    with loaded(linger_ns=SECOND) as program:
        feed(program, (1, tcp("A")), (2, tcp("R")), (9, tcp("A")))
        (record,) = flows(program.ring.drain())
        assert (record["end_reason"], record["packets_fwd"], record["end_ns"]) == (DETECTED, 2, 2 * SECOND)
        assert program.table().packets == 1


def test_a_syn_on_an_ended_flow_begins_another_with_its_own_initiator() -> None:
    with loaded() as program:
        feed(program, (1, tcp("S")), (2, tcp("RA", back=True)), (2.1, tcp("S", back=True)))
        (first,) = flows(program.ring.drain())
        (second,) = flows(drain_all(program))
    assert (first["end_reason"], first["packets_fwd"], first["packets_rev"], first["src"]) == (
        DETECTED,
        1,
        1,
        "10.0.0.1",
    )
    assert (second["end_reason"], second["packets_fwd"], second["src"], second["start_ns"]) == (
        FORCED,
        1,
        "10.0.0.2",
        21 * SECOND // 10,
    )
    assert not second["flags"] & CONTINUED


def test_a_syn_on_an_open_flow_is_a_packet_of_it() -> None:
    with loaded() as program:
        feed(program, (1, tcp("S")), (2, tcp("SA", back=True)), (3, tcp("A")), (4, tcp("S")))
        (record,) = flows(drain_all(program))
    assert record["packets_fwd"] == 3


def test_a_silent_flow_is_idle_after_its_timeout_and_not_before() -> None:
    with loaded(idle_ns=15 * SECOND) as program:
        feed(program, (1, udp()), (3, udp(back=True)))
        assert expire(program, 17.9) == []
        (record,) = expire(program, 18)
    assert (record["end_reason"], record["start_ns"], record["end_ns"]) == (IDLE, SECOND, 3 * SECOND)


def test_one_speaking_direction_keeps_a_flow_from_being_idle() -> None:
    with loaded(idle_ns=15 * SECOND) as program:
        feed(program, (0, udp()), *((t, udp(back=True)) for t in range(10, 50, 10)))
        assert expire(program, 41) == []
        feed(program, (50, udp()))
        (record,) = flows(drain_all(program))
    assert (record["packets_fwd"], record["packets_rev"]) == (2, 4)


def test_a_packet_after_the_idle_timeout_begins_another_flow_though_no_walk_came_by() -> None:
    with loaded(idle_ns=15 * SECOND) as program:
        feed(program, (0, udp()), (20, udp(back=True)))
        (first,) = flows(program.ring.drain())
        (second,) = flows(drain_all(program))
    assert (first["end_reason"], first["packets_fwd"], first["src"]) == (IDLE, 1, "10.0.0.0")
    assert (second["packets_fwd"], second["packets_rev"], second["src"]) == (1, 0, "192.168.0.1")


def test_a_syn_without_an_answer_times_out_sooner() -> None:
    with loaded(half_open_ns=5 * SECOND, idle_ns=15 * SECOND) as program:
        feed(program, (1, tcp("S")), (2, tcp("S", sport=2)), (2.1, tcp("SA", sport=2, back=True)))
        assert expire(program, 5.9) == []
        (record,) = expire(program, 8)
        assert (record["end_reason"], record["sport"]) == (IDLE, 40000)
        (record,) = expire(program, 18)
        assert (record["end_reason"], record["sport"]) == (IDLE, 2)


def test_an_active_flow_is_cut_by_its_packets_and_keeps_its_initiator() -> None:
    with loaded(active_ns=10 * SECOND) as program:
        feed(program, (1, udp()), *((t, udp(back=True)) for t in range(2, 26)))
        first, second = flows(program.ring.drain())
        (third,) = flows(drain_all(program))
    assert [r["end_reason"] for r in (first, second, third)] == [ACTIVE, ACTIVE, FORCED]
    assert [(r["start_ns"] // SECOND, r["end_ns"] // SECOND) for r in (first, second, third)] == [
        (1, 10),
        (11, 20),
        (21, 25),
    ]
    assert [(r["packets_fwd"], r["packets_rev"]) for r in (first, second, third)] == [(1, 9), (0, 10), (0, 5)]
    assert [r["flags"] & CONTINUED for r in (first, second, third)] == [0, CONTINUED, CONTINUED]
    assert {r["src"] for r in (first, second, third)} == {"10.0.0.0"}
    assert second["length_min_fwd"] == second["last_ns_fwd"] == 0


def test_an_active_flow_is_cut_by_the_walk_and_goes_on_with_its_next_packet() -> None:
    with loaded(active_ns=10 * SECOND) as program:
        feed(program, (1, udp()), (8, udp(back=True)))
        (first,) = expire(program, 11)
        assert expire(program, 11) == []
        feed(program, (14, udp(back=True)))
        (second,) = flows(drain_all(program))
    assert (first["end_reason"], first["packets_fwd"], first["packets_rev"]) == (ACTIVE, 1, 1)
    assert (second["src"], second["packets_fwd"], second["packets_rev"]) == ("10.0.0.0", 0, 1)
    assert (second["flags"] & CONTINUED, second["start_ns"], second["end_ns"]) == (CONTINUED, 14 * SECOND, 14 * SECOND)


def test_a_cut_flow_that_stays_silent_leaves_no_empty_record() -> None:
    with loaded(active_ns=10 * SECOND, idle_ns=15 * SECOND) as program:
        feed(program, (1, udp()))
        assert len(expire(program, 11)) == 1
        assert expire(program, 30) == []
        assert program.table().flows == 0


def test_the_handshake_is_told_once() -> None:
    """In the record in which the SYN-ACK came; a continuation has none."""
    with loaded(active_ns=10 * SECOND) as program:
        feed(program, (1, tcp("S")), (1.5, tcp("S")), (2, tcp("SA", back=True)), (12, tcp("A")))
        (first,) = flows(program.ring.drain())
        (second,) = flows(drain_all(program))
    assert (first["handshake_ns"], second["handshake_ns"]) == (SECOND, 0)


def test_a_syn_ack_alone_is_no_handshake() -> None:
    with loaded() as program:
        feed(program, (1, tcp("SA", back=True)), (2, tcp("A")))
        (record,) = flows(drain_all(program))
    assert record["handshake_ns"] == 0


def test_a_flush_emits_what_is_there_as_forced() -> None:
    with loaded() as program:
        feed(program, (1, udp()), (2, tcp("A")))
        assert {r["end_reason"] for r in flows(drain_all(program))} == {FORCED}


def test_a_full_table_makes_records_of_one_packet() -> None:
    with loaded(table_entries=1) as program:
        feed(program, (1, udp(1)), (2, udp(2)), (3, udp(1)))
        (single,) = flows(program.ring.drain())
        counters = program.counters()
        (kept,) = flows(drain_all(program))
    assert (single["end_reason"], single["packets_fwd"], single["src"], single["start_ns"]) == (
        RESOURCES,
        1,
        "10.0.0.2",
        2 * SECOND,
    )
    assert (kept["packets_fwd"], counters["table_full"], counters["lost_table_packets"]) == (2, 1, 0)


def test_without_timeouts_a_five_tuple_is_one_record() -> None:
    plain = FlowSettings(external_clock=True).without_timeouts()
    with loaded(**{n: getattr(plain, n) for n in ("idle_ns", "active_ns", "half_open_ns", "tcp_ends")}) as program:
        feed(program, *closed(), (3600, tcp("S")), (7200, tcp("R")), (9000, tcp("S", back=True)))
        assert expire(program, 100_000) == []
        (record,) = flows(drain_all(program))
    assert (record["packets_fwd"], record["packets_rev"], record["end_ns"]) == (6, 3, 9000 * SECOND)


def test_a_clock_that_steps_back_ends_nothing() -> None:
    with loaded() as program:
        feed(program, (100, udp()), (50, udp()), (60, udp()))
        assert expire(program, 10) == []
        (record,) = flows(drain_all(program))
    assert (record["packets_fwd"], record["start_ns"], record["end_ns"]) == (3, 100 * SECOND, 60 * SECOND)
    assert record["iat_sum_ns_fwd"] == 10 * SECOND


@both_loaders
@pytest.mark.parametrize("mirror", [False, True])
def test_a_mirror_port_drops_what_was_counted(mirror: bool, loader: Loader) -> None:
    with loaded(mirror=mirror, loader=loader) as program:
        assert verdict(program.xdp_fd, udp()) == ("XDP_DROP" if mirror else "XDP_PASS")
        assert program.counters()["accounted_packets"] == 1
