"""What can go wrong on a machine: one sentence that says what to do, the right exit code, and a ledger that closes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flowsage.collector import syscall
from flowsage.collector.interface import in_namespace, read_interface
from flowsage.collector.kernel_object import OBJECT
from tests.collector.sensor_process import end, ready, start
from tests.collector.test_restart import MS, objects_of, packets_of_flows, settings, written
from tests.collector.wires import Wire, attached, eventually, ip, start_blast, udp, wire


@pytest.fixture
def cable() -> Iterator[Wire]:
    with wire() as made:
        yield made


@pytest.fixture
def pins() -> Iterator[Path]:
    root = Path(f"/sys/fs/bpf/fstest{os.getpid()}b")
    yield root
    assert not root.exists(), "nothing stays pinned, whatever went wrong"


def refusal(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and the one sentence."""
    _, err = process.communicate(timeout=120)
    assert len(err.splitlines()) == 1, err
    return process.returncode, err


IN_ITS_OWN_MOUNTS = ("unshare", "--mount", "--propagation", "private", "sh", "-c")
WITHOUT_BPFFS = (*IN_ITS_OWN_MOUNTS, 'umount /sys/fs/bpf && exec "$@"', "sh")


def test_without_bpffs_it_is_mounted_where_that_is_allowed(cable, pins, tmp_path):
    process = ready(start(settings(cable, pins), tmp_path, *WITHOUT_BPFFS))
    cable.send(udp("10.0.0.1", "10.0.0.2"))
    assert not pins.exists(), "it was mounted in there, not here"
    assert end(process)["packets"] == 1


def test_without_bpffs_where_it_may_not_be_mounted_says_how_to_mount_it_or_do_without(cable, pins, tmp_path):
    # Without CAP_SYS_ADMIN it cannot enter a namespace either: it is started there, where nothing is mounted.
    inside = replace(settings(cable, pins), netns=None)
    within = ("ip", "netns", "exec", cable.near, "setpriv", "--bounding-set", "-sys_admin")
    code, said = refusal(start(inside, tmp_path, *within))
    assert (code, "mount -t bpf bpf /sys/fs/bpf" in said, "--no-pin" in said) == (77, True, True), said
    code, said = refusal(start(replace(inside, pins=tmp_path, netns=cable.near), tmp_path))
    assert (code, f"{tmp_path} is not on a BPF file system" in said) == (1, True), said


def test_no_privilege_with_pins_is_one_sentence_and_77(cable, pins, tmp_path):
    code, said = refusal(start(settings(cable, pins), "-", "setpriv", "--reuid", "12345", "--clear-groups"))
    assert code == 77, said


def test_a_limit_on_locked_memory_does_not_matter(cable, pins, tmp_path):
    process = ready(start(settings(cable, pins), tmp_path, "prlimit", "--memlock=0:0"))
    sent = cable.send(udp("10.0.0.1", "10.0.0.2"))
    assert end(process)["packets"] == sent


@pytest.mark.parametrize("cut", [0, 100, 30_000])
def test_a_truncated_object_is_refused_by_name(cable, pins, tmp_path, cut):
    half = tmp_path / "half.bpf.o"
    half.write_bytes(OBJECT.read_bytes()[:cut])
    code, said = refusal(start(settings(cable, pins, program=half), tmp_path / "out"))
    assert code == 1
    assert str(half) in said
    assert not attached(cable)


def test_an_upgrade_to_a_truncated_object_leaves_the_old_program_counting(cable, pins, tmp_path):
    process = ready(start(settings(cable, pins), tmp_path))
    process.kill()
    process.communicate()
    half = tmp_path / "half.bpf.o"
    half.write_bytes(OBJECT.read_bytes()[:30_000])
    code, _ = refusal(start(settings(cable, pins, program=half), tmp_path / "out"))
    assert code == 1
    sent = cable.send(udp("10.0.0.1", "10.0.0.2"))
    half.unlink()
    assert end(ready(start(settings(cable, pins), tmp_path)))["packets"] == sent


def test_an_object_of_something_else_is_refused_by_what_it_lacks(cable, pins, tmp_path):
    counter = OBJECT.with_name("xdp_counter.bpf.o")
    if not counter.exists():
        counter = OBJECT.with_name("counter.bpf.o")
    code, said = refusal(start(settings(cable, pins, program=counter), tmp_path))
    assert code == 1
    assert "built for another version" in said


def test_jumbo_frames_are_counted_whole_natively(cable, pins, tmp_path):
    for namespace, end_of in ((cable.near, cable.port), (cable.far, cable.other)):
        ip("-n", namespace, "link", "set", end_of, "mtu", "9000")
    process = ready(start(settings(cable, pins, mode="drv"), tmp_path))
    sent = cable.send(udp("10.0.0.1", "10.0.0.2", payload=bytes(8000)))
    ledger = end(process)
    assert (ledger["packets"], ledger["bytes"]) == (sent, 8042)


def test_where_native_mode_is_not_possible_auto_falls_back_and_drv_says_what_to_use(cable, pins, tmp_path):
    ip("-n", cable.near, "link", "add", "fsnonative", "type", "bridge")
    ip("-n", cable.near, "link", "set", "fsnonative", "up")
    code, said = refusal(start(settings(cable, pins, interfaces=("fsnonative",), mode="drv"), tmp_path))
    assert (code, "MTU or queues do not allow native mode; use skb or auto" in said) == (1, True), said
    process = ready(start(settings(cable, pins, interfaces=("fsnonative",)), tmp_path))
    with in_namespace(cable.near):
        assert read_interface("fsnonative").xdp_mode == "skb"
    end(process)


def test_the_card_mode_is_refused_on_an_interface_without_a_card(cable, pins, tmp_path):
    code, said = refusal(start(settings(cable, pins, mode="hw"), tmp_path))
    assert code == 1
    assert "its card cannot run XDP programs; use drv or skb" in said


def test_an_interface_that_is_down_is_watched_and_counts_once_it_is_up(cable, pins, tmp_path):
    ip("-n", cable.near, "link", "set", cable.port, "down")
    process = ready(start(settings(cable, pins), tmp_path))
    ip("-n", cable.near, "link", "set", cable.port, "up")
    time.sleep(0.1)
    sent = cable.send(udp("10.0.0.1", "10.0.0.2"))
    assert end(process)["packets"] == sent


def test_an_interface_that_was_made_anew_while_the_sensor_was_dead_is_watched_again(cable, pins, tmp_path):
    process = ready(start(settings(cable, pins, idle_timeout=60_000 * MS), tmp_path))
    cable.send(udp("10.0.0.1", "10.0.0.2"))
    process.kill()
    process.communicate()
    cable.delete()
    cable.add()
    process = ready(start(settings(cable, pins), tmp_path))
    cable.send(udp("10.0.0.1", "10.0.0.3"))
    assert end(process)["packets"] == 2
    assert sum(packets_of_flows(written(tmp_path)).values()) == 2


@pytest.mark.parametrize("ring_bytes", [4096, 1 << 20])
def test_a_dead_sensor_whose_ring_and_table_fill_up_can_say_every_packet_it_lost(cable, pins, tmp_path, ring_bytes):
    small = settings(cable, pins, table_entries=64, ring_bytes=ring_bytes)
    process = ready(start(small, tmp_path))
    process.kill()
    process.communicate()
    sent = cable.send(*(udp("10.0.0.1", f"10.1.{i // 200}.{i % 200}", 1 + i) for i in range(8000)))
    ledger = end(ready(start(small, tmp_path)))
    lost = ledger["lost_table"] + ledger["lost_closed"]
    assert lost > 0
    assert sent == ledger["packets"] == lost + sum(packets_of_flows(written(tmp_path)).values())


def test_sigterm_in_the_middle_of_a_drain_finishes_it(cable, pins, tmp_path):
    busy = settings(cable, pins, idle_timeout=20 * MS, sweep_interval=20 * MS, batch_records=50)
    process = ready(start(busy, tmp_path))
    blast = start_blast(cable, flows=20_000, packets=60_000, rate=30_000)
    eventually(lambda: list(tmp_path.glob(".*.arrows")))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    blast.communicate()
    counted = int(re.search(r"([\d,]+) packets seen", err)[1].replace(",", ""))
    assert "the ledger closes" in err
    assert 0 < counted == sum(packets_of_flows(written(tmp_path)).values())


def test_a_disk_that_is_full_leaves_the_sensor_counting_and_the_next_start_has_everything(cable, pins, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", small], check=True)
    try:
        watching = settings(cable, pins, idle_timeout=20 * MS)
        process, sent = ready(start(watching, small)), 0
        while process.poll() is None:
            sent += cable.send(*(udp("10.0.0.1", "10.0.0.2", 1 + (sent + i) % 60_000) for i in range(200)))
            time.sleep(0.05)
        _, err = process.communicate()
        assert process.returncode == 1
        assert "No space left on device" in err
        assert attached(cable)
        sent += cable.send(udp("10.0.0.9", "10.0.0.2"))
        subprocess.run(["mount", "-o", "remount,size=16m", small], check=True)
        ledger = end(ready(start(watching, small)))
        told = packets_of_flows(written(small))
        assert sent == ledger["packets"] == sum(told.values())
        assert set(told.values()) == {1}
    finally:
        subprocess.run(["umount", small], check=True)


def flowsage(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowsage.pipelines.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("by", ["name", "interface"])
def test_detach_leaves_no_program_map_link_or_pin_and_says_what_was_never_collected(cable, pins, tmp_path, by):
    watching = settings(cable, pins, egress=True, idle_timeout=60_000 * MS)
    process = ready(start(watching, tmp_path))
    kinds = {"program": "prog", "map": "map", "link": "link", "egress": "link"}
    ours = {(kinds[p.name.partition("-")[0]], number_of(p)) for p in pins.rglob("*-*") if p.is_file()}
    assert len(ours) == 4 + 6 + 2
    assert all(exists(*one) for one in ours)
    os.environ["FLOWSAGE_SENSOR__PINS"] = str(pins)
    try:
        what = ("--name", watching.name) if by == "name" else ("-i", cable.port)
        busy = flowsage("collect", "--detach", *what)
        assert (busy.returncode, "another process runs the sensor" in busy.stderr) == (1, True)
        process.kill()
        process.communicate()
        cable.send(*(udp("10.0.0.1", "10.0.0.2", i) for i in range(1, 31)))
        done = flowsage("collect", "--detach", *what)
        assert done.returncode == 0
        assert "30 packets of 30 flows" in done.stderr
        assert objects_of(pins) == set()
        assert not attached(cable)
        eventually(lambda: not any(exists(*one) for one in ours))
        nothing = flowsage("collect", "--detach", *what)
        assert (nothing.returncode, "nothing" in nothing.stderr) == (0, True)
    finally:
        del os.environ["FLOWSAGE_SENSOR__PINS"]
    qdiscs = subprocess.run(["tc", "-n", cable.near, "qdisc"], capture_output=True, text=True, check=True).stdout
    assert "clsact" not in qdiscs


def number_of(pin: Path) -> int:
    """Id of what is pinned there."""
    fd = syscall.pinned(pin)
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(("prog_id", "map_id", "link_id")))
    finally:
        os.close(fd)


def exists(kind: str, number: int) -> bool:
    return (
        subprocess.run(["bpftool", kind, "show", "id", str(number)], capture_output=True, check=False).returncode == 0
    )
