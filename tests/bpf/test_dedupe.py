"""One packet on two interfaces is counted once, whichever sees it first, and its other copy is called a duplicate.

Arriving and leaving are two places, as two interfaces are, and both can be had without an interface.
"""

import threading
from collections.abc import Callable

import numpy as np
import pytest

from flowsage.collector.kernel_object import Loader
from flowsage.collector.program import FlowProgram

from .support import SECOND, both_loaders, check_ledger, drain_all, flows, leaving, loaded, needs_root, tcp, udp
from .test_lifetime import closed

pytestmark = needs_root

MS = 1_000_000
Feed = Callable[[float, bytes], object]


def ways(program: FlowProgram) -> tuple[Feed, Feed]:
    """(second, frame): arriving, and leaving."""
    arrives, leaves = program.feeder(), leaving(program)
    return (
        lambda at, frame: arrives.feed([frame], [round(at * SECOND)]),
        lambda at, frame: leaves.feed([frame], [round(at * SECOND)]),
    )


@both_loaders
def test_a_forwarded_connection_is_counted_once(loader: Loader) -> None:
    """Seen on its way in and, 20 us later, on its way out; or the other way round, as queues have it."""
    with loaded(dedupe=True, loader=loader) as program:
        first, second = ways(program)
        for number, (at, frame) in enumerate(closed()):
            (first if number % 3 else second)(at, frame)
            (second if number % 3 else first)(at + 20e-6, frame)
        program.expire(4 * SECOND)
        (record,) = flows(program.ring.drain())
        counters = check_ledger(program)
        assert program.table().flows == 0
    frames = [frame for _, frame in closed()]
    assert (record["packets_fwd"], record["packets_rev"], record["end_reason"]) == (4, 2, 3)
    assert counters["accounted_packets"] == counters["duplicate_packets"] == len(frames)
    assert counters["duplicate_bytes"] == sum(map(len, frames))


def test_without_dedupe_both_copies_count() -> None:
    with loaded() as program:
        for feed in ways(program):
            feed(1, udp())
        (record,) = flows(drain_all(program))
        assert record["packets_fwd"] == 2
        assert program.counters()["duplicate_packets"] == 0


def test_directions_that_take_different_interfaces_are_both_counted() -> None:
    with loaded(dedupe=True) as program:
        first, second = ways(program)
        for at in range(1, 5):
            first(at / 10, udp())
            second(at / 10 + 0.05, udp(back=True))
        (record,) = flows(drain_all(program))
    assert (record["packets_fwd"], record["packets_rev"]) == (4, 4)


def test_another_interface_takes_over_after_a_second_of_silence() -> None:
    """A path that fails over; the copies on the way back to the old interface are duplicates then."""
    with loaded(dedupe=True) as program:
        first, second = ways(program)
        first(1, udp())
        second(1.5, udp())
        second(2.5, udp())
        first(2.6, udp())
        counters = check_ledger(program)
        (record,) = flows(drain_all(program))
    assert (record["packets_fwd"], counters["duplicate_packets"]) == (2, 2)
    assert record["length_sumsq_fwd"] == 2 * len(udp()) ** 2


def test_copies_of_the_last_packets_of_a_connection_make_no_flow_of_their_own() -> None:
    with loaded(dedupe=True) as program:
        first, second = ways(program)
        for at, frame in (*closed(), (2, tcp("S", sport=7)), (2.1, tcp("R", sport=7, back=True))):
            first(at, frame)
            second(at + 1e-4, frame)
        program.expire(9 * SECOND)
        assert sorted(r["packets_fwd"] + r["packets_rev"] for r in flows(program.ring.drain())) == [2, 6]
        check_ledger(program)


@pytest.mark.parametrize("gap_ms", [1, 2000], ids=["owned", "to be taken over"])
def test_copies_that_come_at_the_same_moment_on_two_cpus_are_counted_once(gap_ms: int) -> None:
    rounds, flows_at_once = 150, 40
    frames = [udp(number) for number in range(flows_at_once)]
    with loaded(dedupe=True, idle_ns=0, active_ns=0) as program:
        runners = (program.feeder(), leaving(program))
        for runner in runners:
            runner.feed(frames, [SECOND] * flows_at_once)
        barrier = threading.Barrier(2)

        def feed(which: int) -> None:
            for number in range(rounds):
                barrier.wait()
                at = SECOND + (number + 1) * gap_ms * MS
                runners[which].feed(frames if number % 2 else frames[::-1], [at] * flows_at_once)

        threads = [threading.Thread(target=feed, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counters = check_ledger(program)
        records = drain_all(program)
    assert counters["accounted_packets"] == counters["duplicate_packets"] == (rounds + 1) * flows_at_once
    assert (np.sort(records["direction"]["packets"].sum(axis=1)) == rounds + 1).all()
