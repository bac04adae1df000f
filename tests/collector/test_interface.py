"""What is said of interfaces is what the kernel says, and what cannot be watched is refused by name."""

import os
import subprocess
import threading

import pytest

from flowsage.collector.errors import InterfaceError
from flowsage.collector.interface import (
    driver_of,
    in_namespace,
    index_of,
    is_running,
    read_interface,
    require_ethernet,
    vlan_offload,
)
from flowsage.collector.program import FlowProgram, FlowSettings
from flowsage.collector.xdp import EBPFAttachMode
from tests.collector.wires import eventually, ip, wire


@pytest.fixture(scope="module")
def cable():
    with wire() as made:
        yield made


def test_an_interface_is_described_as_it_is(cable):
    ip("-n", cable.near, "link", "set", cable.port, "mtu", "1400")
    with in_namespace(cable.near):
        found = read_interface(cable.port)
        assert found.index == index_of(cable.port)
        offload = vlan_offload(cable.port)
    assert (found.name, found.mtu, found.driver, found.ethernet) == (cable.port, 1400, "veth", True)
    assert (found.state, found.up, found.rx_queues >= 1) == ("up", True, True)
    assert (found.xdp_mode, found.xdp_program) == (None, None)
    features = subprocess.run(
        ["ip", "netns", "exec", cable.near, "ethtool", "-k", cable.port], capture_output=True, text=True, check=True
    ).stdout
    assert offload == ("rx-vlan-offload: on" in features)
    assert found.vlan_offload == offload


@pytest.mark.parametrize("mode", ["skb", "drv"])
def test_an_attached_program_and_its_mode_are_seen(cable, mode):
    with in_namespace(cable.near), FlowProgram(FlowSettings(table_entries=64)) as program:
        program.attach(cable.port, EBPFAttachMode(mode))
        found = read_interface(cable.port)
        assert (found.xdp_mode, found.xdp_program) == (mode, program.program_id)
        program.detach(cable.port)
        assert read_interface(cable.port).xdp_program is None


def test_carrier_is_followed(cable):
    with in_namespace(cable.near):
        assert is_running(cable.port)
        ip("-n", cable.far, "link", "set", cable.other, "down")
        eventually(lambda: not is_running(cable.port))
        assert read_interface(cable.port).state != "up"
        ip("-n", cable.far, "link", "set", cable.other, "up")
        eventually(lambda: is_running(cable.port))
        assert not is_running("fsnothing")


def test_a_missing_interface_is_named_with_those_that_exist(cable):
    with in_namespace(cable.near):
        for look in (read_interface, require_ethernet):
            with pytest.raises(InterfaceError, match=rf"no interface '{cable.port}9'.*did you mean {cable.port}\?.*lo"):
                look(cable.port + "9")
        assert driver_of("fsnothing") is None


def test_an_interface_without_ethernet_headers_is_refused(cable):
    ip("-n", cable.near, "tuntap", "add", "mode", "tun", "name", "fssetun")
    with in_namespace(cable.near):
        with pytest.raises(InterfaceError, match="without an Ethernet header"):
            require_ethernet("fssetun")
        require_ethernet("lo")


def test_another_namespace_is_entered_by_one_thread_and_left_again(cable):
    here = os.readlink("/proc/thread-self/ns/net")
    entered, seen = threading.Event(), []

    def look() -> None:
        entered.wait(60)
        seen.append(os.readlink("/proc/thread-self/ns/net"))

    other = threading.Thread(target=look)
    other.start()
    with in_namespace(cable.near):
        assert index_of(cable.port)
        assert os.readlink("/proc/thread-self/ns/net") != here
        entered.set()
        other.join()
    assert seen == [here]
    assert os.readlink("/proc/thread-self/ns/net") == here
    assert index_of(cable.port) is None
    with pytest.raises(InterfaceError, match="no network namespace 'fsnowhere'"), in_namespace("fsnowhere"):
        pass
