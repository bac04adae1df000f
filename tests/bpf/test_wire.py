"""On real interfaces: jumbo frames in several parts, what a host itself says and hears, a port that only mirrors."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, UDP

from flowsage.collector.egress import attach_egress
from flowsage.collector.interface import in_namespace
from flowsage.collector.kernel_object import Loader
from flowsage.collector.program import FlowProgram, FlowSettings
from flowsage.collector.xdp import EBPFAttachMode

from .support import both_loaders, build, check_ledger, drain_all, ethernet, flows, needs_root
from .veth import VethPair, run, veth_pair

pytestmark = needs_root

HERE, THERE = "10.99.0.1", "10.99.0.2"


@pytest.fixture(scope="module")
def pair() -> Iterator[VethPair]:
    with veth_pair("fskw") as made:
        yield made


@pytest.fixture(scope="module")
def hosts(pair: VethPair) -> VethPair:
    """The pair with addresses, and neighbours that need not be asked for."""
    for space, end, mine, other, peer in (
        (pair.home, pair.receiver, HERE, THERE, (pair.outside, pair.sender)),
        (pair.outside, pair.sender, THERE, HERE, (pair.home, pair.receiver)),
    ):
        mac = run("ip", "netns", "exec", peer[0], "cat", f"/sys/class/net/{peer[1]}/address").strip()
        run("ip", "-n", space, "addr", "add", f"{mine}/24", "dev", end)
        run("ip", "-n", space, "neigh", "replace", other, "lladdr", mac, "dev", end)
    return pair


@contextmanager
def udp_socket(space: str, address: str, port: int) -> Iterator[socket.socket]:
    with in_namespace(space):
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with opened:
        opened.bind((address, port))
        opened.settimeout(5)
        yield opened


@pytest.mark.parametrize("mode", [EBPFAttachMode.DRV, EBPFAttachMode.SKB])
@both_loaders
def test_jumbo_frames_over_a_wire_count_whole(pair: VethPair, mode: EBPFAttachMode, loader: Loader) -> None:
    build()
    sizes = [60, 1514, 4_000, 9_014, 30_000, 65_549]
    with FlowProgram(FlowSettings().without_timeouts(), loader=loader) as program:
        with pair.inside():
            program.attach(pair.receiver, mode)
        with in_namespace(pair.outside), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind((pair.sender, 0))
            for size in sizes:
                frame = ethernet() / IP(src="10.1.0.1", dst="10.1.0.2", len=size - 14) / UDP(sport=7, dport=8)
                assert wire.send(bytes(raw(frame)).ljust(size, b"x")) == size
        pair.settle(program, len(sizes))
        (record,) = flows(drain_all(program))
        check_ledger(program)
    assert (record["packets_fwd"], record["bytes_fwd"]) == (len(sizes), sum(sizes))
    assert (record["length_min_fwd"], record["length_max_fwd"]) == (60, 65_549)
    assert record["length_sumsq_fwd"] == sum(size**2 for size in sizes)


@both_loaders
def test_a_host_that_is_its_own_sensor_is_seen_both_ways(hosts: VethPair, loader: Loader) -> None:
    """XDP for what arrives, TCX for what leaves, one flow of both."""
    build()
    with FlowProgram(FlowSettings(idle_ns=0), loader=loader) as program:
        with hosts.inside():
            program.attach(hosts.receiver)
            leaving = attach_egress(program._loaded().program_fd("flow_egress"), hosts.receiver)
        try:
            with udp_socket(hosts.home, HERE, 4000) as here, udp_socket(hosts.outside, THERE, 53) as there:
                for size in (10, 1000, 20_000):
                    here.sendto(b"q" * size, (THERE, 53))
                    question, asker = there.recvfrom(65_535)
                    there.sendto(question * 2, asker)
                    assert len(here.recv(65_535)) == 2 * size
            hosts.settle(program, 6)
        finally:
            leaving.detach()
        (record,) = flows(drain_all(program))
        counters = check_ledger(program)
    assert (record["src"], record["dst"], record["sport"], record["dport"]) == (HERE, THERE, 4000, 53)
    assert (record["packets_fwd"], record["bytes_fwd"]) == (3, 3 * 42 + 21_010)
    assert (record["packets_rev"], record["bytes_rev"]) == (3, 3 * 42 + 2 * 21_010)
    assert counters["seen_packets"] == 6


def test_a_port_that_only_mirrors_passes_nothing_on(hosts: VethPair) -> None:
    build()
    with FlowProgram(FlowSettings(idle_ns=0, mirror=True)) as program:
        with hosts.inside():
            program.attach(hosts.receiver)
        with udp_socket(hosts.home, HERE, 53) as here, udp_socket(hosts.outside, THERE, 4001) as there:
            for _ in range(20):
                there.sendto(b"copy", (HERE, 53))
            hosts.settle(program, 20)
            here.settimeout(0.05)
            with pytest.raises(TimeoutError):
                here.recv(100)
        (record,) = flows(drain_all(program))
        check_ledger(program)
    assert record["packets_fwd"] == 20
