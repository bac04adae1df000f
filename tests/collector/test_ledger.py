"""The ledger sees what is missing: it closes because everything is there, not because it cannot do otherwise."""

import json

import pytest

from flowsage.collector.feed import capture_settings
from flowsage.collector.ledger import Ledger, _apart
from flowsage.collector.program import FlowProgram, FlowSettings
from flowsage.collector.publish import PublishCounts
from tests.collector.wires import udp


@pytest.fixture(scope="module")
def program():
    with FlowProgram(capture_settings(FlowSettings(table_entries=1024, ring_bytes=1 << 20))) as loaded:
        yield loaded


@pytest.fixture
def ledger(program):
    """A ledger that closes: everything before has been drained into it."""
    made = Ledger(program)
    for records in program.flush_all():
        made.drain(records)
        made.acknowledge(len(records))
    counters = program.counters()
    made.drained = type(made.drained)(packets=counters["emitted_packets"], bytes=counters["emitted_bytes"])
    made.drained_records = made.acknowledged = counters["emitted_records"]
    assert made.snapshot().closes
    return made


def feed(program, n):
    program.feed([udp("10.0.0.1", "10.0.0.2", 1 + i) for i in range(n)], [1_000_000_000 + i for i in range(n)])


def test_packets_are_in_the_table_then_in_the_ring_then_delivered(program, ledger):
    before = ledger.snapshot()
    feed(program, 20)
    in_table = ledger.snapshot()
    assert (in_table.in_table.packets, in_table.flows_in_table, in_table.in_ring.packets) == (20, 20, 0)
    assert in_table.in_table.bytes == 20 * 43
    program.flush()
    in_ring = ledger.snapshot()
    assert (in_ring.in_table.packets, in_ring.in_ring.packets, in_ring.in_ring.bytes) == (0, 20, 20 * 43)
    records = program.ring.drain()
    ledger.drain(records)
    ledger.acknowledge(len(records))
    done = ledger.snapshot()
    assert (done.in_table.packets, done.in_ring.packets) == (0, 0)
    assert done.drained.packets - before.drained.packets == 20
    assert in_table.closes
    assert in_ring.closes
    assert done.closes


def test_what_was_seen_is_told_by_protocol(program, ledger):
    before = ledger.snapshot()
    feed(program, 3)
    program.feed([b"\x02" * 12 + b"\x08\x06" + bytes(28)], [2_000_000_000])
    after = ledger.snapshot()
    assert sum(count.packets for count in after.protocols.values()) == after.seen.packets
    assert sum(count.bytes for count in after.protocols.values()) == after.seen.bytes
    grown = {name: count.packets - before.protocols[name].packets for name, count in after.protocols.items()}
    assert grown == {"TCP": 0, "UDP": 3, "ICMP": 0, "OTHER": 1}
    assert json.loads(after.to_json())["protocols"]["UDP"]["packets"] == after.protocols["UDP"].packets


def test_records_that_vanish_between_ring_and_ledger_are_missed_by_their_packets_and_bytes(program, ledger):
    feed(program, 20)
    program.flush()
    program.ring.drain()
    found = ledger.snapshot()
    assert (found.balance, found.bytes_balance, found.closes) == (20, 20 * 43, False)
    assert json.loads(found.to_json())["balance"] == 20


def test_records_drained_twice_are_seen(program, ledger):
    feed(program, 5)
    program.flush()
    records = program.ring.drain()
    ledger.drain(records)
    ledger.drain(records)
    assert ledger.snapshot().balance == -5


def test_records_that_nobody_answers_for_are_seen(program, ledger):
    feed(program, 7)
    program.flush()
    ledger.drain(program.ring.drain())
    assert ledger.snapshot().records_balance == 7
    ledger.acknowledge(4)
    ledger.lose("sink failed", 3)
    assert ledger.snapshot().records_balance == 0
    assert ledger.snapshot().records_lost == {"sink failed": 3}


def test_what_a_publisher_says_of_its_records_takes_the_place_of_our_word(program, ledger):
    counts = PublishCounts(handed=10, resumed=4, acknowledged=8, pending=5, lost={"spool full": 1})
    assert counts.balance == 0
    feed(program, 10)
    for records in program.flush_all():
        ledger.drain(records)
        ledger.acknowledge(len(records))
    found = ledger.snapshot(counts)
    assert (found.records_balance, found.records_pending, found.records_resumed) == (0, 5, 4)
    assert found.records_lost == {"spool full": 1}
    counts.pending = 4
    assert ledger.snapshot(counts).records_balance == 1


@pytest.mark.parametrize(
    ("first", "second", "apart"),
    [((5, 5), (5, 5), 0), ((1, 4), (4, 9), 0), ((1, 3), (5, 9), -2), ((7, 8), (2, 5), 2), ((1, 9), (3, 4), 0)],
)
def test_intervals_are_apart_by_what_lies_between_them(first, second, apart):
    assert _apart(*first, *second) == apart
