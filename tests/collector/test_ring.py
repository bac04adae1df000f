"""The ring as an array: wrap-around, records that are being written, order, limits."""

import mmap
import os
import time

import numpy as np
import pytest

from flowsage.collector.errors import ProgramError
from flowsage.collector.program import FlowProgram
from flowsage.collector.records import RECORD_DTYPE
from flowsage.collector.ring import BUSY, DISCARDED, SLOT_BYTES, Ring
from tests.bpf.support import SECOND, loaded, needs_root, udp_frames

pytestmark = needs_root


def fill(program: FlowProgram, count: int) -> None:
    """`count` records of one packet each: the table has one entry, which stays."""
    if not program.table().flows:
        program.feed(udp_frames(1), [SECOND])
    program.feed(udp_frames(count + 1)[1:], range(2 * SECOND, 2 * SECOND + count))


def test_records_come_out_in_order_as_a_copy() -> None:
    with loaded(table_entries=1) as program:
        fill(program, 1000)
        assert program.ring.waiting == 1000
        records = program.ring.drain()
        fill(program, 1000)
        program.ring.drain()
    assert records.dtype == RECORD_DTYPE
    np.testing.assert_array_equal(records["start_ns"], np.arange(2 * SECOND, 2 * SECOND + 1000))
    assert (records["direction"]["packets"] == [1, 0]).all()


def test_an_empty_ring_gives_no_records() -> None:
    with loaded() as program:
        assert len(program.ring.drain()) == 0
        assert not program.ring.wait(0)


def test_a_ring_that_wraps_around_many_times_keeps_order() -> None:
    with loaded(table_entries=1, ring_bytes=4096) as program:
        starts: list[int] = []
        for _ in range(50):
            fill(program, 7)
            starts += program.ring.drain()["start_ns"].tolist()
    assert starts == list(range(2 * SECOND, 2 * SECOND + 7)) * 50


def test_a_window_that_moves_along_the_ring_shows_what_one_that_holds_it_all_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flowsage.collector.ring.WINDOW_BYTES", 2 * mmap.PAGESIZE)
    starts: list[int] = []
    with loaded(table_entries=1, ring_bytes=8 * mmap.PAGESIZE) as program:
        for count, most in [(90, 5), (100, 33), (127, 40), (127, None), (60, 32)] * 3:  # 16 slots a page
            fill(program, count)
            while program.ring.waiting:
                taken = program.ring.peek(most)
                program.ring.release(taken.end)
                starts += (taken.records["start_ns"] - 2 * SECOND).tolist()
            assert starts == list(range(count))
            starts = []


def test_a_drain_takes_no_more_than_asked_and_fills_the_array_given() -> None:
    out = np.zeros(30, RECORD_DTYPE)
    with loaded(table_entries=1) as program:
        fill(program, 100)
        first = program.ring.drain(20)
        second = program.ring.drain(out=out)
        third = program.ring.drain(1000)
        assert (len(first), len(second), len(third), program.ring.waiting, program.ring.drained) == (20, 30, 50, 0, 100)
    assert np.shares_memory(second, out)
    times = np.concatenate([first, second, third])["start_ns"]
    np.testing.assert_array_equal(times, np.arange(2 * SECOND, 2 * SECOND + 100))


class FakeRing:
    """The memory of a ring in a file: what the kernel would have written, under the test's control."""

    def __init__(self, slots: int = 16) -> None:
        self.size = slots * SLOT_BYTES
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * mmap.PAGESIZE + 2 * self.size)
        self.memory = mmap.mmap(self.fd, 2 * mmap.PAGESIZE + 2 * self.size)

    def write(self, slot: int, length: int, start_ns: int) -> None:
        record = np.zeros(1, RECORD_DTYPE)
        record["start_ns"] = start_ns
        at = 2 * mmap.PAGESIZE + slot * SLOT_BYTES
        self.memory[at : at + 4] = length.to_bytes(4, "little")
        self.memory[at + 8 : at + SLOT_BYTES] = record.tobytes()

    def produced(self, slots: int) -> None:
        self.memory[mmap.PAGESIZE : mmap.PAGESIZE + 8] = (slots * SLOT_BYTES).to_bytes(8, "little")

    def consumed(self) -> int:
        return int.from_bytes(self.memory[:8], "little") // SLOT_BYTES


class PlainRing(Ring):
    """A Ring over a FakeRing, which epoll cannot watch."""

    def __init__(self, fake: FakeRing, monkeypatch: pytest.MonkeyPatch) -> None:
        class NoEpoll:
            def register(self, fd: int, events: int) -> None: ...
            def close(self) -> None: ...

        monkeypatch.setattr("select.epoll", NoEpoll)
        super().__init__(fake.fd, fake.size)


def test_a_record_that_is_being_written_ends_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRing()
    for slot, length in enumerate((248, 248, 248 | BUSY, 248)):
        fake.write(slot, length, slot)
    fake.produced(4)
    with PlainRing(fake, monkeypatch) as ring:
        assert ring.drain()["start_ns"].tolist() == [0, 1]
        assert fake.consumed() == 2
        assert len(ring.drain()) == 0
        fake.write(2, 248, 2)
        assert ring.drain()["start_ns"].tolist() == [2, 3]
        assert fake.consumed() == 4


def test_a_discarded_record_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRing()
    for slot, length in enumerate((248, 248 | DISCARDED, 248, 248 | DISCARDED, 248 | BUSY | DISCARDED)):
        fake.write(slot, length, slot)
    fake.produced(5)
    with PlainRing(fake, monkeypatch) as ring:
        assert ring.drain()["start_ns"].tolist() == [0, 2]
        assert (fake.consumed(), ring.drained) == (4, 2)


def test_the_reader_is_woken_past_the_threshold_only() -> None:
    with loaded(table_entries=1, ring_bytes=1 << 20, wake_bytes=100 * SLOT_BYTES) as program:
        fill(program, 50)
        before = time.monotonic()
        assert program.ring.wait(0.2)  # not woken, but something is there
        program.ring.drain()
        fill(program, 150)
        assert program.ring.wait(60)
        assert time.monotonic() - before < 30


def test_a_size_that_is_not_a_power_of_two_pages_is_refused() -> None:
    with pytest.raises(ProgramError, match="power of two"):
        Ring(0, 3 * mmap.PAGESIZE)


def test_a_descriptor_that_is_no_ring_is_refused() -> None:
    with pytest.raises(ProgramError, match="cannot be mapped"):
        Ring(os.open("/dev/null", os.O_RDONLY), mmap.PAGESIZE)


def test_closing_twice_is_harmless_and_keeps_what_was_drained() -> None:
    with loaded(table_entries=1) as program:
        fill(program, 10)
        ring = program.ring
        records = ring.drain()
    ring.close()
    program.close()
    assert records["start_ns"][-1] == 2 * SECOND + 9
