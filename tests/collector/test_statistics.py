"""What is said of a program and its maps is what the kernel counted, and it counts only while somebody asks."""

import os
import time
from pathlib import Path

import pytest

from flowsage.collector import FlowProgram, FlowSettings, UnknownProgramError, create_ebpf_loader
from flowsage.collector.statistics import counting, read_program
from flowsage.collector.testrun import verdict
from tests.bpf.support import SECOND, build, needs_root, udp, udp_frames
from tests.bpf.veth import run

pytestmark = needs_root


@pytest.fixture(scope="module", autouse=True)
def objects() -> None:
    build()


def on(program: FlowProgram, frame: bytes, times: int) -> None:
    for _ in range(times):
        verdict(program.xdp_fd, frame)


def held() -> int:
    """Descriptors of this process that keep BPF statistics on."""
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return links.count("anon_inode:bpf-stats")


def test_runs_are_counted_only_while_somebody_asks() -> None:
    with FlowProgram(FlowSettings(table_entries=64)) as program, create_ebpf_loader() as loader:
        on(program, udp(), 5)
        assert loader.get_program_stats(program.program_id, over_s=0).run_count == 0
        assert loader.get_program_stats(program.program_id, over_s=0).ns_per_run is None
        with loader.statistics():
            assert held() == 1
            on(program, udp(), 7)
            began = time.monotonic()
            stats = loader.get_program_stats(program.program_id, over_s=60)
            assert time.monotonic() - began < 30  # nobody waits for what is being counted
        on(program, udp(), 5)
        assert (stats.run_count, stats["run_count"]) == (7, 7)
        assert stats.ns_per_run == stats.run_time_ns / 7 > 0
        again = loader.get_program_stats(program.program_id, over_s=0.01)
        assert (again.run_count, again.run_time_ns) == (7, stats.run_time_ns)
        assert held() == 0


def test_maps_are_described_with_size_fill_and_memory() -> None:
    with FlowProgram(FlowSettings(table_entries=20_000, ring_bytes=1 << 20, external_clock=True)) as program:
        program.feed(udp_frames(10_000), range(1, 10_001))
        full = read_program(program.program_id)
        assert full.table == (10_000, 20_000)
        assert all(full.map(name).used for name in ("flows", "front"))
        program.expire(100 * SECOND)  # the ring takes 4,096 of them
        stats = read_program(program.program_id)
        assert stats.name == "flow_xdp"
        table, front, ring, counters = (stats.map(name) for name in ("flows", "front", "records", "counters"))
        left = program.table().flows
        assert 0 < left < 10_000
        assert (table.type, front.type, table.size + front.size) == ("hash", "array", 20_000)
        assert table.used is not None
        assert front.used is not None
        assert table.used + front.used == left
        assert stats.table == (left, 20_000)
        assert table.fill == table.used / table.size
        assert (ring.type, ring.size, ring.used) == ("ringbuf", 1 << 20, (10_000 - left) * 256)
        assert (counters.type, counters.size, counters.used) == ("percpu_array", 1, 1)
        assert table.memory >= table.size * (table.key_bytes + table.value_bytes)
        assert front.memory >= front.size * front.value_bytes
        assert ring.memory >= 1 << 20
        assert stats.memory == stats.program_memory + sum(m.memory for m in stats.maps)
        program.ring.drain()
        assert read_program(program.program_id).map("records").used == 0
        with pytest.raises(KeyError):
            stats.map("nothing")
        with pytest.raises(KeyError):
            stats["nothing"]


def test_memory_is_what_bpftool_says() -> None:
    with FlowProgram(FlowSettings(table_entries=64)) as program:
        stats = read_program(program.program_id)
        for one in stats.maps:
            told = run("bpftool", "map", "show", "id", str(one.map_id))
            assert (
                f"key {one.key_bytes}B  value {one.value_bytes}B  max_entries {one.size}  memlock {one.memory}B" in told
            )


def test_a_program_that_the_kernel_does_not_know_is_an_error_of_its_own() -> None:
    with create_ebpf_loader() as loader:
        gone = loader.load_program("xdp_counter.o")
        with pytest.raises(UnknownProgramError, match=f"program {gone} has no map flows"):
            loader.read_counters(gone, "flows")
        loader.unload_program(gone)
        for ask in (loader.get_program_stats, loader.read_counters):
            with pytest.raises(UnknownProgramError, match=f"knows no program {gone}"):
                ask(gone)


def test_two_may_ask_at_once() -> None:
    with FlowProgram(FlowSettings(table_entries=64)) as program:
        with counting():
            with counting():
                on(program, udp(), 1)
            on(program, udp(), 1)
        on(program, udp(), 1)
        assert read_program(program.program_id).run_count == 2
