"""The kernel alone tells which programs of ours it runs, where, how full their maps are and what they have counted."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from flowsage.collector import (
    EBPFAttachMode,
    FlowProgram,
    FlowSettings,
    create_ebpf_loader,
    in_namespace,
    libbpf,
)
from flowsage.collector.inventory import Present, inventory
from flowsage.collector.pins import ROOT, Pins, _require_bpffs
from flowsage.pipelines.cli import main
from tests.bpf.support import build, needs_root, tcp, udp
from tests.bpf.veth import VethPair, run, veth_pair

pytestmark = needs_root


@pytest.fixture(scope="module", autouse=True)
def objects() -> None:
    build()


@pytest.fixture(scope="module")
def pair() -> Iterator[VethPair]:
    with veth_pair("fsin") as made:
        yield made


def send(pair: VethPair, *frames: bytes) -> None:
    with in_namespace(pair.outside):
        sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sender.bind((pair.sender, 0))
    with sender:
        for frame in frames:
            sender.send(frame)


def found(program_id: int, **how: float) -> Present | None:
    """What is said of a program; other programs of ours may be there too."""
    return next((p for p in inventory(over_s=how.get("over_s", 0)) if p.stats.program_id == program_id), None)


def test_a_program_is_told_with_its_interfaces_here_and_elsewhere(pair: VethPair) -> None:
    with create_ebpf_loader() as loader:
        counter = loader.load_program("xdp_counter.o")
        assert found(counter) is None  # neither attached nor pinned
        with pair.inside():
            loader.attach_to_interface(counter, pair.receiver, EBPFAttachMode.SKB)
            send(pair, udp(), udp(), tcp("S"))
            here = found(counter)
            assert here is not None
            assert (here.interfaces, here.elsewhere, here.sensors) == (((pair.receiver, "skb"),), 0, {})
            assert [here.counters[f"packets_{name}"] for name in ("tcp", "udp", "icmp", "other")] == [1, 2, 0, 0]
        from_outside = found(counter)
        assert from_outside is not None
        assert (from_outside.interfaces, from_outside.elsewhere) == ((), 1)


def test_speed_is_that_of_the_packets_of_this_moment(pair: VethPair) -> None:
    with pair.inside(), FlowProgram(FlowSettings(table_entries=64)) as program:
        program.attach(pair.receiver)
        send(pair, *[udp()] * 5)
        quiet = found(program.program_id)
        assert quiet is not None
        assert (quiet.recent_runs, quiet.recent_ns) == (0, None)
        stop = threading.Event()

        def keep_sending() -> None:
            while not stop.wait(0.01):
                send(pair, udp())

        traffic = threading.Thread(target=keep_sending)
        traffic.start()
        try:
            busy = found(program.program_id, over_s=0.5)
        finally:
            stop.set()
            traffic.join()
        assert busy is not None
        assert busy.recent_runs > 0
        assert busy.recent_ns is not None
        assert 0 < busy.recent_ns < 1e6


@pytest.fixture
def left_behind(pair: VethPair) -> Iterator[tuple[int, Path]]:
    """The flow program, attached and pinned, with no process that holds it."""
    _require_bpffs(ROOT)
    folder = ROOT / f"fsin{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        with pair.inside(), FlowProgram(FlowSettings(table_entries=100)) as program:
            run("bpftool", "prog", "pin", "id", str(program.program_id), str(folder / "program"))
            egress = libbpf.program_info(program._loaded().program_fd("flow_egress")).id
            run("bpftool", "prog", "pin", "id", str(egress), str(folder / "egress"))
            program.attach(pair.receiver)
            link = next(
                entry["id"]
                for entry in json.loads(run("bpftool", "-j", "link", "show"))
                if entry.get("prog_id") == program.program_id
            )
            run("bpftool", "link", "pin", "id", str(link), str(folder / "link"))
            send(pair, udp(1), udp(2), udp(3), udp(3), b"\x02" * 12 + b"\x08\x06" + bytes(28))
            VethPair.settle(program, 5)
            program_id = program.program_id
            program.attachments.pop(pair.receiver).release()  # as if the process had died
        yield program_id, folder
    finally:
        for pin in folder.iterdir():
            pin.unlink()
        folder.rmdir()
        with suppress(OSError):  # other sensors pin there too
            folder.parent.rmdir()


def test_what_goes_on_without_a_process_is_found_and_status_shows_it(
    pair: VethPair, left_behind: tuple[int, Path]
) -> None:
    program_id, folder = left_behind
    with pair.inside():
        alone = found(program_id)
        assert alone is not None
        assert alone.interfaces == ((pair.receiver, "drv"),)
        assert alone.sensors == {folder: None}
        assert alone.stats.table == (3, 100)
        assert (alone.counters["seen_packets"], alone.counters["accounted_packets"]) == (5, 4)
        shown = CliRunner().invoke(main, ["status", "--port", "1"])
        told = CliRunner().invoke(main, ["status", "--port", "1", "--json"])
    assert shown.exit_code == told.exit_code == 0
    assert "is `flowsage run` running" in shown.output
    assert f"flow_xdp (program {program_id}) on {pair.receiver} (drv, up, veth, MTU 65535)" in shown.output
    assert shown.output.count("flows: 3 of 100") == 1  # of the one table, and the unused egress program says nothing
    assert "flows: 3 of 100 entries (3.0%)" in shown.output
    assert "5 packets seen, 4 in flows, 0 of them sent in 0 records; not in flows: non_ip 1" in shown.output
    assert f"pinned in {folder}: no process runs it, it counts on" in shown.output
    (row,) = (row for row in json.loads(told.output)["kernel"] if row["program_id"] == program_id)
    table = [row["maps"][name] for name in ("flows", "front")]
    assert [(m["type"], m["size"]) for m in table] == [("hash", 68), ("array", 32)]
    assert sum(m["used"] for m in table) == 3
    assert row["interfaces"] == {pair.receiver: "drv"}
    assert row["sensors"] == {str(folder): None}


def test_the_process_that_has_a_sensor_is_named(pair: VethPair) -> None:
    with FlowProgram(FlowSettings(table_entries=64)) as program:
        pins = Pins(f"fsin-{os.getpid()}")
        try:
            pins.put(program.xdp_fd, "program-flow_xdp", 1)
            here = found(program.program_id)
            shown = CliRunner().invoke(main, ["status", "--port", "1"]).stdout
        finally:
            pins.clear()
            pins.close()
        assert here is not None
        assert here.sensors == {pins.directory: os.getpid()}
    assert re.match(rf"process    .*{os.getpid()}.* only collects and serves no metrics; ", shown)


def test_without_privilege_the_sentence_says_what_it_takes() -> None:
    code = (
        "import os\n"
        "from flowsage.collector import PrivilegeError\n"
        "from flowsage.collector.inventory import inventory\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try:\n    inventory()\nexcept PrivilegeError as error:\n    print(error)\n"
    )
    assert "CAP_BPF" in run(sys.executable, "-c", code)


def test_status_without_process_and_privilege_says_both() -> None:
    code = (
        "import os\n"
        "from flowsage.pipelines.cli import main\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "main(['status', '--port', '1'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"is `flowsage run` running.*nor could the kernel be asked.*CAP_BPF", done.stderr)


def test_who_removes_what_is_not_there_is_told_what_is(
    pair: VethPair, left_behind: tuple[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = left_behind

    def said(*more: str) -> str:
        done = CliRunner().invoke(main, ["collect", "--detach", *more])
        assert (done.exit_code, done.stdout) == (0, "")
        (line,) = done.stderr.splitlines()
        return line

    here = "nothing of sensor absent is pinned under "
    there = said("--name", "absent")
    assert there.startswith(f"{here}/sys/fs/bpf/flowsage; these sensors are, and --name names the one to remove: ")
    assert folder.name in there
    # Another root has no sensors, but the kernel has our program, and then it has none.
    monkeypatch.setenv("FLOWSAGE_SENSOR__PINS", "/sys/fs/bpf/fsabsent")
    assert re.search(r"; what is in the kernel \(program [\d, ]+\) ends with the process", said("--name", "absent"))
    monkeypatch.setattr("flowsage.collector.inventory.inventory", lambda **_: [])
    nothing = "nothing of FlowSAGE is in the kernel, so there is nothing to remove"
    assert said("--name", "absent") == f"{nothing} ({here}/sys/fs/bpf/fsabsent)"


@pytest.mark.parametrize("more", [["--detach"], ["--interface", "lo"]])
def test_a_stranger_to_the_pins_is_told_so(more: list[str], tmp_path: Path) -> None:
    """bpffs is mounted for root alone; so is this folder."""
    root = tmp_path / "root alone"
    root.mkdir(mode=0o700)
    code = (
        "import os; from flowsage.pipelines.cli import main; import flowsage.pipelines.sensor\n"
        "os.setgid(65534); os.setuid(65534)\n"
        f"main({['collect', *more]!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"FLOWSAGE_SENSOR__PINS": str(root / "flowsage")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr.startswith("flowsage: what is pinned under ")
    assert done.stderr.endswith("may not be seen: run as root, or as its owner\n")
