"""A sensor on real interfaces: every packet is accounted for, whatever goes away, and nothing stays behind."""

import json
import os
import socket
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from flowsage.collector import syscall
from flowsage.collector.agent import Agent
from flowsage.collector.agent_settings import AgentSettings
from flowsage.collector.clock import CLOCK_STEP_NS, UnixClock
from flowsage.collector.errors import ConfigurationError, InterfaceError
from flowsage.collector.interface import in_namespace, read_interface
from flowsage.collector.publish import FLOWS_TOPIC, Publisher
from flowsage.collector.records import FLOW_SCHEMA, packets_in
from flowsage.collector.sink import Origin, Sink, deserialise
from flowsage.pipelines.memory_log import MemoryLog
from tests.collector.wires import Wire, attached, conversation, eventually, ip, udp, wire

MS = 1_000_000


@pytest.fixture
def cable():
    with wire() as made:
        yield made


class Keep(Sink):
    """A sink that keeps everything, and checks the watermark's promise and the numbers as it goes."""

    def __init__(self) -> None:
        self.batches: list[pa.RecordBatch] = []
        self.watermarks: list[int] = []
        self.closed = 0

    def put(self, batch: pa.RecordBatch, origin: Origin) -> None:
        assert origin.sequence == len(self.batches), "numbered without gaps, heartbeats included"
        if self.watermarks and len(batch):
            assert min(batch["start_ns"].to_pylist()) >= self.watermarks[-1]
        self.batches.append(batch)
        self.watermarks.append(origin.watermark_ns)

    def close(self) -> None:
        self.closed += 1

    @property
    def table(self) -> pa.Table:
        return pa.Table.from_batches(self.batches, FLOW_SCHEMA)


def settings(*wires: Wire, **other: object) -> AgentSettings:
    base = AgentSettings(
        name="test",
        interfaces=tuple(w.port for w in wires),
        netns=wires[0].near,
        table_entries=4096,
        ring_bytes=1 << 20,
        poll_interval=10 * MS,
        sweep_interval=50 * MS,
    )
    return replace(base, **other)


def test_every_frame_on_the_wire_is_in_the_ledger_and_the_records(cable):
    sink = Keep()
    agent = Agent(settings(cable), sink)
    agent.open()
    assert attached(cable)
    frames = [f for i in range(50) for f in conversation("10.0.0.1", "10.0.0.2", 2000 + i)]
    frames += [udp("10.0.0.3", "10.0.0.4", 5000 + i) for i in range(100)] + [
        b"\xff" * 12 + b"\x08\x06" + b"\0" * 46
    ] * 7
    sent = cable.send(*frames)
    agent.step()
    live = agent.snapshot()
    assert (live.closes, live.quiet, live.seen.packets) == (True, True, sent)
    assert live.in_table.packets > 0
    final = agent.close()
    assert not attached(cable)
    assert final.closes
    assert final.seen.packets == sent
    assert final.seen.bytes == sum(map(len, frames))
    assert final.reasons["non_ip"].packets == 7
    assert (final.in_table.packets, final.in_ring.packets) == (0, 0)
    assert packets_in(sink.table) == final.drained.packets == sent - 7
    assert sink.closed == 1
    table = sink.table.filter(pa.compute.equal(sink.table["proto"], 6))
    assert len(table) == 50
    assert set(table["packets_fwd"].to_pylist()) == {5}
    assert set(table["packets_rev"].to_pylist()) == {3}
    assert all(ns > 0 for ns in table["handshake_ns"].to_pylist())
    assert agent.close() is final


def test_times_are_unix_times_of_the_packets(cable):
    sink = Keep()
    agent = Agent(settings(cable), sink)
    agent.open()
    before = time.time_ns()
    cable.send(udp("10.0.0.1", "10.0.0.2"))
    after = time.time_ns()
    agent.close()
    (start,) = sink.table["start_ns"].to_pylist()
    assert before - CLOCK_STEP_NS <= start <= after + CLOCK_STEP_NS


def test_flows_that_time_out_arrive_while_it_runs_and_the_watermark_follows(cable):
    sink = Keep()
    agent = Agent(settings(cable, idle_timeout=500 * MS, active_timeout=900 * MS, half_open_timeout=0), sink)
    agent.start()
    began = time.time_ns()
    sent = 0
    for i in range(60):
        sent += cable.send(udp("10.0.0.1", "10.0.0.2", 1), udp("10.0.0.1", "10.0.0.9", 1000 + i))
        time.sleep(0.02)
    eventually(lambda: packets_in(sink.table) == sent)
    reasons = sink.table["end_reason"].to_pylist()
    assert {1, 2} <= set(reasons), "idle and active timeouts"
    assert 5 not in reasons
    assert sink.watermarks[-1] > began
    assert sink.watermarks == sorted(sink.watermarks)
    agent.stop()
    assert agent.join().closes


def test_the_ledger_closes_under_traffic_too(cable):
    sink = Keep()
    agent = Agent(settings(cable, idle_timeout=50 * MS), sink)
    agent.start()
    frames = [udp("10.0.0.1", f"10.0.{i % 200}.2", 1000 + i) for i in range(2000)]
    done = threading.Event()
    sent = []

    def traffic() -> None:
        with cable.sender() as s:
            while not done.is_set():
                for frame in frames:
                    s.send(frame)
                sent.append(len(frames))

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        for _ in range(20):
            assert agent.snapshot().closes
            assert agent.snapshot(walk=False).closes
            time.sleep(0.03)
    finally:
        done.set()
        thread.join()
    agent.stop()
    final = agent.join()
    assert final.closes
    assert final.seen.packets == sum(sent) == packets_in(sink.table)


def test_a_table_of_64_entries_degrades_and_loses_nothing(cable):
    sink = Keep()
    agent = Agent(settings(cable, table_entries=64), sink)
    agent.start()
    sent = cable.send(*(udp("10.0.0.1", f"10.1.{i // 200}.{i % 200 + 1}", 1000 + i) for i in range(3000)))
    agent.stop()
    final = agent.join()
    assert final.closes
    assert final.events["table_full"] > 0
    assert packets_in(sink.table) == sent == final.seen.packets
    assert {4, 5} <= set(sink.table["end_reason"].to_pylist())


def test_two_interfaces_share_a_table_and_each_flow_says_where_it_came_in(cable):
    with wire(beside=cable) as second:
        sink = Keep()
        agent = Agent(settings(cable, second), sink)
        agent.start()
        sent = cable.send(udp("10.0.0.1", "10.0.0.2", 1)) + second.send(udp("10.0.0.3", "10.0.0.2", 1))
        agent.stop()
        assert agent.join().seen.packets == sent
        with in_namespace(cable.near):
            want = {"10.0.0.1": read_interface(cable.port).index, "10.0.0.3": read_interface(second.port).index}
        assert dict(zip(sink.table["src_ip"].to_pylist(), sink.table["ifindex"].to_pylist(), strict=True)) == want
        assert not attached(cable)
        assert not attached(second)


def test_an_interface_that_vanishes_is_watched_again_when_it_returns(cable, caplog):
    sink = Keep()
    agent = Agent(settings(cable), sink)
    agent.start()
    cable.send(udp("10.0.0.1", "10.0.0.2"))
    cable.delete()
    eventually(lambda: agent.interfaces() == {cable.port: "missing"})
    assert agent.alive
    cable.add()
    eventually(lambda: agent.interfaces() == {cable.port: "watched"})
    cable.send(udp("10.0.0.5", "10.0.0.6"))
    agent.stop()
    final = agent.join()
    assert final.closes
    assert final.seen.packets == 2
    assert agent.interfaces_lost == 1
    assert f"interface {cable.port} is gone" in caplog.text
    assert not attached(cable)


def test_a_program_that_somebody_takes_off_is_put_back(cable, caplog):
    sink = Keep()
    agent = Agent(settings(cable), sink)
    agent.start()
    shown = subprocess.run(["bpftool", "--json", "link"], check=True, capture_output=True)
    ours = [link["id"] for link in json.loads(shown.stdout) if link.get("prog_id") == agent.program.program_id]
    assert len(ours) == 1
    subprocess.run(["bpftool", "link", "detach", "id", str(ours[0])], check=True)
    eventually(lambda: agent.interfaces_lost == 1 and attached(cable))
    eventually(lambda: agent.interfaces() == {cable.port: "watched"})
    cable.send(udp("10.0.0.1", "10.0.0.2"))
    agent.stop()
    assert agent.join().seen.packets == 1
    assert "lost our program" in caplog.text
    assert not attached(cable)


def test_an_interface_that_goes_down_is_said_and_stays_watched(cable, caplog):
    agent = Agent(settings(cable), Keep())
    agent.start()
    ip("-n", cable.far, "link", "set", cable.other, "down")
    eventually(lambda: agent.interfaces() == {cable.port: "down"})
    ip("-n", cable.far, "link", "set", cable.other, "up")
    eventually(lambda: agent.interfaces() == {cable.port: "watched"})
    cable.send(udp("10.0.0.1", "10.0.0.2"))
    agent.stop()
    assert agent.join().seen.packets == 1
    assert f"interface {cable.port} is down" in caplog.text


def test_one_bad_interface_among_good_ones_leaves_nothing_attached(cable):
    agent = Agent(settings(cable, interfaces=(cable.port, "fsnothing")), Keep())
    with pytest.raises(InterfaceError, match=rf"no interface 'fsnothing'.*{cable.port}"):
        agent.open()
    assert not attached(cable)
    with pytest.raises(InterfaceError):
        Agent(settings(cable, interfaces=("fsnothing",)), Keep()).start()
    with pytest.raises(ConfigurationError, match="no interface is named"):
        Agent(settings(cable, interfaces=()), Keep())


@pytest.mark.parametrize("mirror", [False, True])
def test_a_mirror_port_drops_what_it_has_counted_and_any_other_passes_it_on(cable, mirror):
    with in_namespace(cable.near):
        host = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        host.bind((cable.port, 3))
    with host:
        host.settimeout(0.3)
        agent = Agent(settings(cable, mirror=mirror), Keep())
        agent.open()
        cable.send(*[udp("10.0.0.1", "10.0.0.2")] * 5)
        assert agent.close().seen.packets == 5
        received = 0
        with suppress(TimeoutError):
            while host.recv(2000):
                received += 1
        assert received == (0 if mirror else 5)


def test_a_sink_that_fails_ends_the_sensor_with_its_error_and_every_record_named(cable):
    class Broken(Keep):
        def put(self, batch: pa.RecordBatch, origin: Origin) -> None:
            if len(batch):
                raise RuntimeError("no more")

    sink = Broken()
    agent = Agent(settings(cable, idle_timeout=50 * MS), sink)
    agent.start()
    cable.send(*(udp("10.0.0.1", "10.0.0.2", i) for i in range(1, 30)))
    eventually(lambda: not agent.alive)
    with pytest.raises(RuntimeError, match="no more"):
        agent.join()
    final = agent.snapshot()
    assert final.closes
    assert final.records_lost == {"sink failed": 29}
    assert not attached(cable)


def test_a_quiet_wire_sends_heartbeats_at_the_rate_that_is_set_while_the_sink_wants_them(cable):
    class Behind(Keep):
        def ready(self) -> bool:
            return False

    sinks = Keep(), Behind(), Keep()
    agents = [
        Agent(settings(cable, heartbeat_interval=interval, active_timeout=MS, replace=True), sink)
        for interval, sink in zip((50 * MS, 50 * MS, 3_600_000 * MS), sinks, strict=True)
    ]
    for agent, least, most in zip(agents, (3, 0, 0), (6000, 0, 1), strict=True):
        sink = agent.sink
        agent.open()
        began = time.monotonic()
        while len(sink.batches) < least or time.monotonic() < began + 0.4:
            assert time.monotonic() < began + 60
            agent.step()
            time.sleep(0.01)
        assert len(sink.batches) <= most
        assert all(watermark > 0 for watermark in sink.watermarks)
        agent.close()
        assert len(sink.batches) - least >= 1, "the last word is a watermark too"


def test_published_records_are_those_of_the_ledger(cable):
    log = MemoryLog()
    agent = Agent(settings(cable, idle_timeout=50 * MS), Publisher(log, sensor="test"))
    agent.start()
    sent = cable.send(*(udp("10.0.0.1", "10.0.0.2", i) for i in range(1, 300)))
    eventually(lambda: agent.snapshot().records_acknowledged > 0)
    agent.stop()
    final = agent.join()
    tables = [deserialise(r.value) for r in log.consumer("c", FLOWS_TOPIC).poll(1000)]
    assert final.closes
    assert final.records_acknowledged == final.records_drained == sum(map(len, tables))
    assert sum(map(packets_in, tables)) == sent


def test_a_clock_that_is_set_is_followed_and_one_that_trembles_is_not():
    unix, noise = [1_000_000_000_000], [0]
    clock = UnixClock(lambda: 5_000, lambda: unix[0] + noise[0])
    first = clock.offset_ns
    for noise[0] in (100, -100, CLOCK_STEP_NS // 2, -CLOCK_STEP_NS // 2):
        assert clock.update() == first
    noise[0] = 0
    unix[0] += 3_600_000_000_000
    assert clock.update() == first + 3_600_000_000_000
    assert clock.steps == 1


def test_egress_counts_what_the_host_itself_sends_and_leaves_nothing(cable):
    sink = Keep()
    agent = Agent(settings(cable, egress=True), sink)
    agent.open()
    sent = cable.send(udp("10.0.0.1", "10.0.0.2", 5, 6))
    with in_namespace(cable.near), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind((cable.port, 0))
        s.send(udp("10.0.0.2", "10.0.0.1", 6, 5))
        s.send(udp("10.0.0.9", "10.0.0.1", 7, 8))
    final = agent.close()
    assert (final.closes, final.seen.packets) == (True, sent + 2)
    flows = {row["src_ip"]: (row["packets_fwd"], row["packets_rev"]) for row in sink.table.to_pylist()}
    assert flows == {"10.0.0.1": (1, 1), "10.0.0.9": (1, 0)}, "both ways are one flow"
    with in_namespace(cable.near):
        index = read_interface(cable.port).index
        assert syscall.tcx_egress(index) == []


def test_dedupe_counts_a_packet_that_two_interfaces_see_once(cable):
    with wire(beside=cable) as second:
        sink = Keep()
        agent = Agent(settings(cable, second, dedupe=True), sink)
        agent.start()
        for _ in range(20):
            cable.send(udp("10.0.0.1", "10.0.0.2", 1))
            second.send(udp("10.0.0.1", "10.0.0.2", 1))
        agent.stop()
        final = agent.join()
        assert final.closes
        assert (final.seen.packets, final.reasons["duplicate"].packets) == (40, 20)
        assert packets_in(sink.table) == 20


def test_a_program_compiled_by_bcc_is_pinned_adopted_and_removed_like_any_other(cable):
    root = Path(f"/sys/fs/bpf/fstest{os.getpid()}c")
    sink = Keep()
    for end in (Agent.leave, Agent.close):
        agent = Agent(settings(cable, loader="bcc", pins=root), sink)
        agent.open()
        assert agent.lifetime.adopted == (end is Agent.close)
        cable.send(udp("10.0.0.1", "10.0.0.2", 1))
        agent.step()
        end(agent)
    assert packets_in(sink.table) == 2
    assert agent.snapshot().closes
    assert not root.exists()
    assert not attached(cable)
