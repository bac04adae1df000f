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
from pathlib import Path
from typing import Any

import pytest

from flowsage.collector import libbpf
from flowsage.collector.errors import (
    ConfigurationError,
    InterfaceError,
    KernelSupportError,
    PrivilegeError,
    ProgramError,
)
from flowsage.collector.interface import in_namespace
from flowsage.collector.loader import (
    EBPFAttachMode,
    EBPFProgramType,
    FlowProgram,
    FlowSettings,
    attached_program,
    create_ebpf_loader,
)
from flowsage.collector.testrun import verdict
from tests.bpf.support import ROOT, build, needs_root, tcp, udp
from tests.bpf.veth import VethPair, run, veth_pair

pytestmark = needs_root
COUNTER = ROOT / "bpf" / "counter.bpf.o"
FLOW = ROOT / "bpf" / "flow.bpf.o"


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


def test_a_program_lives_from_load_to_unload() -> None:
    with create_ebpf_loader() as loader:
        program_id = loader.load_program(COUNTER, EBPFProgramType.XDP)
        assert loader.verify_program_loaded(program_id)
        assert loader.verify_program_detached(program_id)
        (program,) = loader.list_loaded_programs()
        assert (program.program_id, program.name, program.path) == (program_id, "xdp_counter", COUNTER)
        loader.unload_program(program_id)
        assert not loader.verify_program_loaded(program_id)
        assert loader.list_loaded_programs() == []
        with pytest.raises(ProgramError, match=f"program {program_id} was not loaded here"):
            loader.unload_program(program_id)


@pytest.mark.parametrize("mode", [EBPFAttachMode.SKB, EBPFAttachMode.DRV])
def test_attach_and_detach_are_what_the_kernel_says(wire: str, mode: EBPFAttachMode) -> None:
    with create_ebpf_loader() as loader:
        program_id = loader.load_program(COUNTER)
        assert loader.attach_to_interface(program_id, wire, mode).mode is mode
        assert attached_program(wire) == (mode.value, program_id)
        assert not loader.verify_program_detached(program_id)
        loader.detach_from_interface(program_id, wire)
        assert attached_program(wire) is None
        assert loader.verify_program_detached(program_id)
        with pytest.raises(InterfaceError, match="not attached"):
            loader.detach_from_interface(program_id, wire)


def test_leaving_the_context_leaves_nothing(wire: str) -> None:
    with create_ebpf_loader() as loader:
        program_id = loader.load_program(COUNTER)
        loader.attach_to_interface(program_id, wire)
    assert attached_program(wire) is None
    assert not loader.verify_program_loaded(program_id)


def test_a_killed_process_leaves_nothing_attached(pair: VethPair) -> None:
    code = (
        "import sys, time\n"
        "from flowsage.collector.loader import create_ebpf_loader\n"
        "loader = create_ebpf_loader()\n"
        f"loader.attach_to_interface(loader.load_program({str(COUNTER)!r}), {pair.receiver!r})\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with pair.inside():
        victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert victim.stdout is not None
        assert victim.stdout.readline() == "ready\n"
        assert attached_program(pair.receiver) is not None
        victim.kill()
        victim.wait()
        victim.stdout.close()
        assert attached_program(pair.receiver) is None


def test_somebody_elses_program_is_named_and_not_replaced_unless_asked(wire: str, tmp_path: Path) -> None:
    pin = Path(f"/sys/fs/bpf/fskl{os.getpid()}")
    run("bpftool", "prog", "load", str(COUNTER), str(pin), "type", "xdp")
    try:
        run("bpftool", "net", "attach", "xdpgeneric", "pinned", str(pin), "dev", wire)
        other = attached_program(wire)
        assert other is not None
        with create_ebpf_loader() as loader:
            program_id = loader.load_program(COUNTER)
            for mode in (EBPFAttachMode.SKB, EBPFAttachMode.AUTO):
                with pytest.raises(InterfaceError, match=f"runs XDP program {other[1]} "):
                    loader.attach_to_interface(program_id, wire, mode)
            assert attached_program(wire) == other
            loader.attach_to_interface(program_id, wire, EBPFAttachMode.DRV, replace=True)
            assert attached_program(wire) == ("drv", program_id)
    finally:
        subprocess.run(["ip", "link", "set", wire, "xdpgeneric", "off"], capture_output=True, check=False)
        pin.unlink()


def test_a_program_held_by_another_link_cannot_be_replaced(wire: str) -> None:
    with FlowProgram() as mine, create_ebpf_loader() as loader:
        mine.attach(wire, EBPFAttachMode.SKB)
        program_id = loader.load_program(COUNTER)
        with pytest.raises(InterfaceError, match="held by another process"):
            loader.attach_to_interface(program_id, wire, replace=True)
        assert attached_program(wire) == ("skb", mine.program_id)


def test_auto_takes_native_where_it_can(wire: str, caplog: pytest.LogCaptureFixture) -> None:
    with FlowProgram() as program:
        assert program.attach(wire, EBPFAttachMode.AUTO).mode is EBPFAttachMode.DRV
    assert caplog.records == []


def test_auto_falls_back_to_generic_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A bridge has no native XDP."""
    with veth_pair("fskd") as pair, pair.inside(), FlowProgram() as program:
        run("ip", "link", "add", "fskd9", "type", "bridge")
        with caplog.at_level(logging.WARNING):
            assert program.attach("fskd9", EBPFAttachMode.AUTO).mode is EBPFAttachMode.SKB
        assert "fskd9 cannot run XDP natively" in caplog.text
        program.detach("fskd9")
        for mode in (EBPFAttachMode.DRV, EBPFAttachMode.HW):
            with pytest.raises(InterfaceError, match=f"fskd9 cannot run XDP in mode {mode}: .*use"):
                program.attach("fskd9", mode)


def test_a_missing_interface_is_named_with_those_there_are(wire: str) -> None:
    with FlowProgram() as program, pytest.raises(InterfaceError, match=f"no interface 'fsnone0' here .*there are: .*{wire}"):
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


def test_the_counter_program_counts_by_protocol() -> None:
    with create_ebpf_loader() as loader:
        program_id = loader.load_program(COUNTER)
        fd = loader._held(program_id)[2]
        for frame in (tcp("S"), tcp("A"), udp(), udp()[:20]):
            assert verdict(fd, frame) == "XDP_PASS"
        assert loader.read_counters(program_id) == [
            (2, len(tcp("S")) * 2),
            (1, len(udp())),
            (0, 0),
            (1, 20),
        ]


def test_an_object_that_is_not_there_or_not_one_is_refused(tmp_path: Path) -> None:
    with create_ebpf_loader() as loader:
        with pytest.raises(ProgramError, match=r"no program object at .*make bpf"):
            loader.load_program(tmp_path / "absent.bpf.o")
        for name, content in (("text", b"no object\n"), ("cut", FLOW.read_bytes()[:5000]), ("empty", b"")):
            path = tmp_path / f"{name}.bpf.o"
            path.write_bytes(content)
            with pytest.raises(ProgramError, match=f"{name}.bpf.o is not a program object"):
                loader.load_program(path)
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


def test_what_the_verifier_refuses_is_told_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "bad.bpf.c").write_text(REJECTED)
    for name in ("flow.h", "parse.h"):
        (tmp_path / name).touch()
    shutil.copy(ROOT / "bpf" / "Makefile", tmp_path)
    run("make", "-s", "-C", str(tmp_path), "bad.bpf.o")
    with create_ebpf_loader() as loader, pytest.raises(ProgramError, match="invalid access to packet") as caught:
        loader.load_program(tmp_path / "bad.bpf.o")
    assert not isinstance(caught.value, KernelSupportError | PrivilegeError)


def test_without_privilege_the_sentence_says_which(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "from flowsage.collector.loader import FlowProgram\n"
        "from flowsage.collector.errors import PrivilegeError\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try:\n    FlowProgram().load()\n"
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


def test_without_libbpf_the_sentence_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError("libbpf.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    libbpf.library.cache_clear()
    try:
        with pytest.raises(KernelSupportError, match="libbpf1"):
            create_ebpf_loader()
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
