"""Loading, attaching, detaching, against the kernel; and what is said when it does not work."""

import ctypes
import errno
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import ARP, Ether

from flowsage.collector import EBPFAttachMode, EBPFLoader, EBPFProgramType, bpftool, create_ebpf_loader, libbpf, xdp
from flowsage.collector.errors import (
    AttachmentError,
    AttachModeError,
    BusyInterfaceError,
    ConfigurationError,
    InterfaceError,
    KernelSupportError,
    MissingInterfaceError,
    MissingLoaderError,
    ObjectError,
    ProgramError,
    RejectedError,
    UnknownProgramError,
)
from flowsage.collector.interface import in_namespace, read_interface
from flowsage.collector.program import FlowProgram, FlowSettings
from flowsage.collector.statistics import by_protocol, program_descriptor
from flowsage.collector.testrun import verdict
from flowsage.collector.xdp import attached_program
from tests.bpf.support import ROOT, build, needs_root, tcp, udp
from tests.bpf.veth import VethPair, run, veth_pair
from tests.collector.wires import eventually

pytestmark = needs_root
COUNTER = ROOT / "bpf" / "counter.bpf.o"
FLOW = ROOT / "bpf" / "flow.bpf.o"
LOAD_BY = [f"create_ebpf_loader('{backend}').load_program('xdp_counter.o')" for backend in ("libbpf", "bpftool")]


@pytest.fixture(scope="module", autouse=True)
def objects() -> None:
    build()


@pytest.fixture(scope="module")
def pair() -> Iterator[VethPair]:
    with veth_pair("fskl") as made:
        yield made


@pytest.fixture
def wire(pair: VethPair) -> Iterator[str]:
    """An interface in whose namespace the test runs."""
    with pair.inside():
        yield pair.receiver


@pytest.fixture(params=["libbpf", "bpftool"])
def loader(request: pytest.FixtureRequest) -> Iterator[EBPFLoader]:
    """One loader of each kind; it must leave no pin behind."""
    with create_ebpf_loader(request.param) as made:
        assert made.backend == request.param
        yield made
    assert list(bpftool.BPFFS.glob(f"flowsage-load-{os.getpid()}-*")) == []


def test_a_program_lives_from_load_to_unload(loader: EBPFLoader) -> None:
    program_id = loader.load_program(COUNTER, EBPFProgramType.XDP)
    assert loader.verify_program_loaded(program_id)
    assert loader.verify_program_detached(program_id)
    (program,) = loader.list_loaded_programs()
    assert (program.program_id, program.name, program.path) == (program_id, "xdp_counter", COUNTER)
    assert loader.unload_program(program_id) is True
    assert not loader.verify_program_loaded(program_id)
    assert loader.list_loaded_programs() == []
    with pytest.raises(UnknownProgramError, match=f"program {program_id} was not loaded here"):
        loader.unload_program(program_id)


@pytest.mark.parametrize("mode", [EBPFAttachMode.SKB, EBPFAttachMode.DRV])
def test_attach_and_detach_are_what_the_kernel_says(loader: EBPFLoader, wire: str, mode: EBPFAttachMode) -> None:
    program_id = loader.load_program(COUNTER)
    assert loader.attach_to_interface(program_id, wire, mode).mode is mode
    assert attached_program(wire) == (mode.value, program_id)
    interface = read_interface(wire)
    assert (interface.xdp_mode, interface.xdp_program) == (mode.value, program_id)
    assert loader.get_interface_programs(wire) == [program_id]
    assert not loader.verify_program_detached(program_id)
    with pytest.raises(AttachmentError, match=f"attached to {wire} already"):
        loader.attach_to_interface(program_id, wire, mode)
    assert loader.detach_from_interface(program_id, wire) is True
    assert attached_program(wire) is None
    assert loader.get_interface_programs(wire) == []
    assert loader.verify_program_detached(program_id)
    with pytest.raises(AttachmentError, match="not attached"):
        loader.detach_from_interface(program_id, wire)


@pytest.mark.parametrize(("shown", "words"), [(None, "no program"), (("skb", 7), "program 7 in mode skb")])
def test_what_the_kernel_does_not_show_after_attaching_is_an_error_and_taken_off(
    wire: str, monkeypatch: pytest.MonkeyPatch, shown: tuple[str, int] | None, words: str
) -> None:
    answers = iter([None, shown])
    with create_ebpf_loader() as loader:
        program_id = loader.load_program(COUNTER)
        with monkeypatch.context() as patch:
            patch.setattr(xdp, "attached_program", lambda _: next(answers))
            with pytest.raises(
                AttachmentError, match=f"program {program_id} in mode drv, and the kernel shows {words}"
            ):
                loader.attach_to_interface(program_id, wire)
        assert attached_program(wire) is None
        assert loader.verify_program_detached(program_id)
        loader.attach_to_interface(program_id, wire)


def test_a_program_that_stays_after_detaching_is_an_error(wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with create_ebpf_loader() as loader:
        program_id = loader.load_program(COUNTER)
        link = os.dup(loader.attach_to_interface(program_id, wire).link_fd)  # somebody else holds the link
        with monkeypatch.context() as patch:
            patch.setattr(libbpf, "link_detach", lambda _: None)
            with pytest.raises(AttachmentError, match=f"{program_id} is still attached to {wire}"):
                loader.detach_from_interface(program_id, wire)
        assert not loader.verify_program_detached(program_id)
        os.close(link)


def test_a_card_that_runs_no_programs_is_a_clear_refusal(loader: EBPFLoader, wire: str) -> None:
    program_id = loader.load_program(COUNTER)
    with pytest.raises(AttachModeError, match=f"{wire} cannot run XDP in mode hw: its card cannot .*use drv or skb"):
        loader.attach_to_interface(program_id, wire, EBPFAttachMode.HW)
    assert attached_program(wire) is None


def test_a_program_attached_in_another_namespace_is_not_detached(loader: EBPFLoader, pair: VethPair) -> None:
    program_id = loader.load_program(COUNTER)
    with pair.inside():
        loader.attach_to_interface(program_id, pair.receiver)
    assert not loader.verify_program_detached(program_id)
    loader.unload_program(program_id)
    assert loader.verify_program_detached(program_id)


def test_a_script_for_the_original_system_runs_unchanged(pair: VethPair) -> None:
    """As its users wrote them: an object by its bare name, the functions by their second names, statistics by key."""
    script = (
        "from flowsage.collector.loader import EBPFAttachMode, EBPFProgramType, create_ebpf_loader\n"
        "loader = create_ebpf_loader()\n"
        'program_id = loader.load_program("xdp_counter.o", EBPFProgramType.XDP)\n'
        f'assert loader.attach_to_interface_complete(program_id, "{pair.receiver}", mode=EBPFAttachMode.SKB)\n'
        f'assert program_id in loader.get_interface_programs("{pair.receiver}")\n'
        'assert loader.get_program_stats(program_id)["program_id"] == program_id\n'
        f'assert loader.detach_from_interface_complete(program_id, "{pair.receiver}") is True\n'
        "assert loader.verify_program_detached(program_id)\n"
        "assert loader.unload_program_complete(program_id) is True\n"
        "assert not loader.verify_program_loaded(program_id)\n"
        'print("done")\n'
    )
    with pair.inside():
        assert run(sys.executable, "-c", script) == "done\n"
    assert EBPFLoader.attach_to_interface_complete is EBPFLoader.attach_to_interface
    assert EBPFLoader.detach_from_interface_complete is EBPFLoader.detach_from_interface
    assert EBPFLoader.unload_program_complete is EBPFLoader.unload_program


def test_an_object_is_found_by_the_name_of_its_program_and_one_in_the_working_directory_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with create_ebpf_loader() as loader:
        for name, program in (("xdp_counter.o", "xdp_counter"), ("flow.bpf.o", "flow_xdp")):
            loader.load_program(name)
            assert loader.list_loaded_programs()[-1].name == program
        loader.load_program(ROOT / "bpf" / "xdp_counter.o")
        assert loader.list_loaded_programs()[-1].path == COUNTER
        shutil.copy(FLOW, tmp_path / "xdp_counter.o")
        loader.load_program("xdp_counter.o")
        assert loader.list_loaded_programs()[-1].name == "flow_xdp"


def test_without_libbpf_all_of_it_works_by_bpftool(pair: VethPair) -> None:
    """In a mount namespace where libbpf.so.1 is an empty file, so that nothing in the process can open it."""
    script = (
        "import ctypes\n"
        "from flowsage.collector import BusyInterfaceError, EBPFAttachMode, FlowProgram, KernelSupportError\n"
        "from flowsage.collector import create_ebpf_loader, read_interface\n"
        "try:\n    ctypes.CDLL('libbpf.so.1')\nexcept OSError:\n    pass\nelse:\n    raise SystemExit('it is there')\n"
        "with create_ebpf_loader() as loader:\n"
        "    assert loader.backend == 'bpftool', loader.backend\n"
        "    program_id = loader.load_program('xdp_counter.o')\n"
        f"    mode = loader.attach_to_interface(program_id, '{pair.receiver}', EBPFAttachMode.AUTO).mode\n"
        f"    now = read_interface('{pair.receiver}')\n"
        "    assert (now.xdp_mode, now.xdp_program) == (mode.value, program_id) == ('drv', program_id)\n"
        "    assert not loader.verify_program_detached(program_id)\n"
        "    other = loader.load_program('xdp_counter.o')\n"
        f"    try:\n        loader.attach_to_interface(other, '{pair.receiver}')\n"
        "    except BusyInterfaceError as error:\n        print(error)\n"
        "    assert loader.read_counters(program_id) == [(0, 0)] * 4\n"
        "    assert loader.get_program_stats(program_id).map('protocols').size == 4\n"
        f"    loader.detach_from_interface(program_id, '{pair.receiver}')\n"
        f"    assert read_interface('{pair.receiver}').xdp_program is None\n"
        "try:\n    FlowProgram().load()\nexcept KernelSupportError as error:\n    print(error)\n"
    )
    library = next(Path("/usr/lib").glob("*/libbpf.so.1")).resolve()
    hide = f'mount --bind /dev/null {library} && exec "$0" -c "$1"'
    with pair.inside():
        said = run("unshare", "--mount", "sh", "-c", hide, sys.executable, script)
    assert f"{pair.receiver} already runs XDP program" in said
    assert "libbpf.so.1 is not installed; install the package libbpf1" in said


def test_without_libbpf_a_program_attached_by_netlink_is_replaced_only_when_asked(
    pair: VethPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libbpf, "available", lambda: False)
    with pair.inside(), somebody_elses(pair.receiver) as other, create_ebpf_loader() as loader:
        assert loader.backend == "bpftool"
        assert attached_program(pair.receiver) == ("skb", other)
        program_id = loader.load_program(COUNTER)
        with pytest.raises(BusyInterfaceError, match=f"runs XDP program {other} "):
            loader.attach_to_interface(program_id, pair.receiver)
        loader.attach_to_interface(program_id, pair.receiver, replace=True)
        assert attached_program(pair.receiver) == ("drv", program_id)


def test_leaving_the_context_leaves_nothing(wire: str) -> None:
    with create_ebpf_loader() as loader:
        programs = [loader.load_program(COUNTER), loader.load_program(FLOW)]
        loader.attach_to_interface(programs[0], wire)
    assert attached_program(wire) is None
    assert not any(loader.verify_program_loaded(program_id) for program_id in programs)


@pytest.mark.parametrize("backend", ["libbpf", "bpftool"])
def test_a_killed_process_leaves_nothing_behind(pair: VethPair, backend: str) -> None:
    code = (
        "import sys, time\n"
        "from flowsage.collector.loader import create_ebpf_loader\n"
        f"loader = create_ebpf_loader({backend!r})\n"
        f"loader.attach_to_interface(loader.load_program({str(COUNTER)!r}), {pair.receiver!r})\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with pair.inside():
        victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert victim.stdout is not None
        assert victim.stdout.readline() == "ready\n"
        there = attached_program(pair.receiver)
        assert there is not None
        victim.kill()
        victim.wait()
        victim.stdout.close()
        assert attached_program(pair.receiver) is None
    eventually(lambda: not libbpf.program_exists(there[1]))  # the kernel frees it after a grace period


@contextmanager
def somebody_elses(interface: str) -> Iterator[int]:
    """A program that bpftool attached, in generic mode; its id."""
    pin = bpftool.BPFFS / f"fskl{os.getpid()}"
    run("bpftool", "prog", "load", str(COUNTER), str(pin), "type", "xdp")
    try:
        run("bpftool", "net", "attach", "xdpgeneric", "pinned", str(pin), "dev", interface)
        there = attached_program(interface)
        assert there is not None
        yield there[1]
    finally:
        subprocess.run(["ip", "link", "set", interface, "xdpgeneric", "off"], capture_output=True, check=False)
        pin.unlink()


def test_somebody_elses_program_is_named_and_not_replaced_unless_asked(wire: str) -> None:
    with somebody_elses(wire) as other, create_ebpf_loader() as loader:
        program_id = loader.load_program(COUNTER)
        for mode in EBPFAttachMode:
            with pytest.raises(BusyInterfaceError, match=f"runs XDP program {other} "):
                loader.attach_to_interface(program_id, wire, mode)
        assert attached_program(wire) == ("skb", other)
        loader.attach_to_interface(program_id, wire, EBPFAttachMode.DRV, replace=True)
        assert attached_program(wire) == ("drv", program_id)


def test_a_program_held_by_another_link_cannot_be_replaced(wire: str) -> None:
    with FlowProgram() as mine, create_ebpf_loader() as loader:
        mine.attach(wire, EBPFAttachMode.SKB)
        program_id = loader.load_program(COUNTER)
        with pytest.raises(BusyInterfaceError, match="held by another process"):
            loader.attach_to_interface(program_id, wire, replace=True)
        assert attached_program(wire) == ("skb", mine.program_id)


def test_auto_takes_native_where_it_can(wire: str, caplog: pytest.LogCaptureFixture) -> None:
    with FlowProgram() as program:
        assert program.attach(wire, EBPFAttachMode.AUTO).mode is EBPFAttachMode.DRV
    assert caplog.records == []


def test_only_auto_falls_back_to_generic_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A bridge has no native XDP."""
    with veth_pair("fskd") as pair, pair.inside(), FlowProgram() as program:
        run("ip", "link", "add", "fskd9", "type", "bridge")
        with caplog.at_level(logging.WARNING):
            assert program.attach("fskd9", EBPFAttachMode.AUTO).mode is EBPFAttachMode.SKB
        assert "fskd9 cannot run XDP natively" in caplog.text
        program.detach("fskd9")
        for mode in (EBPFAttachMode.DRV, EBPFAttachMode.HW):
            with pytest.raises(AttachModeError, match=f"fskd9 cannot run XDP in mode {mode}: .*use"):
                program.attach("fskd9", mode)
            assert attached_program("fskd9") is None
        with create_ebpf_loader() as loader, pytest.raises(AttachModeError, match="use skb or auto"):
            loader.attach_to_interface(loader.load_program(COUNTER), "fskd9")  # native, unless asked otherwise


def test_a_missing_interface_is_named_with_those_there_are(wire: str) -> None:
    there = f"no interface 'fsnone0' here .*there are: .*{wire}"
    with FlowProgram() as program, pytest.raises(MissingInterfaceError, match=there):
        program.attach("fsnone0")


def test_several_interfaces_share_one_table(pair: VethPair) -> None:
    with FlowProgram() as program:
        with pair.inside():
            program.attach(pair.receiver, EBPFAttachMode.SKB)
            with pytest.raises(InterfaceError, match="watched already"):
                program.attach(pair.receiver)
            sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            sender.bind((pair.receiver, 0))
            index = socket.if_nametoindex(pair.receiver)
        with in_namespace(pair.outside):
            program.attach(pair.sender, EBPFAttachMode.SKB)
            other = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            other.bind((pair.sender, 0))
        other.send(tcp("S"))  # arrives at the receiver
        VethPair.settle(program, 1)
        sender.send(tcp("SA", back=True))  # and its answer at the sender
        VethPair.settle(program, 2)
        sender.close()
        other.close()
        (records,) = program.flush_all()
        assert len(records) == 1
        assert records[0]["direction"]["packets"].tolist() == [1, 1]
        assert records[0]["ifindex"] == index
    with pair.inside():
        assert attached_program(pair.receiver) is None


def test_an_interface_that_vanished_is_let_go_of() -> None:
    with FlowProgram() as program:
        with veth_pair("fskv") as pair, pair.inside():
            program.attach(pair.receiver, EBPFAttachMode.SKB)
            run("ip", "link", "del", pair.receiver)
            assert not program.attachments[pair.receiver].present()
            program.detach(pair.receiver)
        assert program.attachments == {}


def test_the_counter_and_the_flow_program_count_by_protocol_alike(loader: EBPFLoader) -> None:
    tcp_fragment = tcp("A", load=64)[:14] + b"\x45\x00\x00\x54\x00\x01\x00\x10" + tcp("A", load=64)[22:]
    icmp, icmp6 = (
        bytes(Ether() / IP() / ICMP()),
        bytes(Ether() / IPv6() / ICMPv6EchoRequest()),
    )
    gre, arp = bytes(Ether() / IP(proto=47) / b"1234"), bytes(Ether() / ARP())
    frames = [tcp("S"), tcp("A"), tcp_fragment, udp(), icmp, icmp6, icmp6, gre, arp, udp()[:20]]
    want = [
        (3, len(tcp("S")) * 2 + len(tcp_fragment)),
        (1, len(udp())),
        (3, len(icmp) + 2 * len(icmp6)),
        (3, len(gre) + len(arp) + 20),
    ]
    program_id = loader.load_program(COUNTER)
    with program_descriptor(program_id) as fd:
        for frame in frames:
            assert verdict(fd, frame) == "XDP_PASS"
    assert loader.read_counters(program_id) == want
    with FlowProgram(FlowSettings(table_entries=64)) as program:
        program.feed(frames)
        counters = program.counters()
    assert by_protocol(counters) == want


def test_an_object_that_is_not_there_or_not_one_is_refused(loader: EBPFLoader, tmp_path: Path) -> None:
    for absent in (tmp_path / "absent.bpf.o", "absent.o"):
        with pytest.raises(ObjectError, match=r"no program object at .*absent.*make bpf"):
            loader.load_program(absent)
    for name, content in (("text", b"no object\n"), ("cut", FLOW.read_bytes()[:5000]), ("empty", b"")):
        path = tmp_path / f"{name}.bpf.o"
        path.write_bytes(content)
        with pytest.raises(ObjectError, match=f"{name}.bpf.o is not a program object"):
            loader.load_program(path)
    for name in ("nothing_xdp", "flow_expire"):
        with pytest.raises(ProgramError, match=f"has no program {name}"):
            loader.load_program(FLOW, name=name)
    assert loader.list_loaded_programs() == []


def test_an_object_for_another_version_is_refused() -> None:
    with pytest.raises(ProgramError, match="has no map flows: it was built for another version"):
        FlowProgram(path=COUNTER).load()


REJECTED = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
SEC("xdp") int beyond(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	return *(int *)(data + 100);
}
char LICENSE[] SEC("license") = "GPL";
"""


def test_what_the_verifier_refuses_is_told_in_its_own_words(loader: EBPFLoader, tmp_path: Path) -> None:
    (tmp_path / "bad.bpf.c").write_text(REJECTED)
    for name in ("flow.h", "parse.h"):
        (tmp_path / name).touch()
    shutil.copy(ROOT / "bpf" / "Makefile", tmp_path)
    run("make", "-s", "-C", str(tmp_path), "bad.bpf.o")
    with pytest.raises(RejectedError, match="invalid access to packet"):
        loader.load_program(tmp_path / "bad.bpf.o")


@pytest.mark.parametrize("how", ["FlowProgram().load()", *LOAD_BY])
def test_without_privilege_the_sentence_says_which(how: str) -> None:
    code = (
        "import os\n"
        "from flowsage.collector import FlowProgram, PrivilegeError, create_ebpf_loader\n"
        "os.setgid(65534); os.setuid(65534)\n"
        f"try:\n    {how}\n"
        "except PrivilegeError as error:\n    print(error.exit_code, error)\n"
    )
    said = run(sys.executable, "-c", code)
    assert said.startswith("77 ")
    assert "CAP_BPF" in said


def test_without_btf_the_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbpf, "BTF", Path("/nowhere/vmlinux"))
    error = libbpf.failure(errno.EINVAL, "the kernel refused it")
    assert isinstance(error, KernelSupportError)
    assert "CONFIG_DEBUG_INFO_BTF" in str(error)


def test_without_libbpf_and_bpftool_the_sentence_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError("libbpf.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    libbpf.library.cache_clear()
    try:
        with pytest.raises(MissingLoaderError, match="libbpf1"):
            create_ebpf_loader()
        with pytest.raises(MissingLoaderError, match="package bpftool"):
            create_ebpf_loader("bpftool")
        with pytest.raises(KernelSupportError, match="libbpf1"):
            create_ebpf_loader("libbpf")
    finally:
        monkeypatch.undo()
        libbpf.library()


@pytest.mark.parametrize(
    "wrong", [{"table_entries": 0}, {"ring_bytes": 5000}, {"ring_bytes": 2048}, {"idle_ns": -1}], ids=str
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong)).split("_")[0]):
        FlowSettings(**wrong)


def test_a_program_that_is_not_loaded_says_so() -> None:
    program = FlowProgram()
    for ask in (program.counters, program.table, program.flush, lambda: program.ring):
        with pytest.raises(ProgramError, match="not loaded"):
            ask()
    program.close()


def test_loading_again_after_closing_starts_from_zero() -> None:
    program = FlowProgram(FlowSettings(external_clock=True))
    for _ in range(2):
        with program:
            program.feed([udp()], [1])
            assert program.counters()["seen_packets"] == 1
