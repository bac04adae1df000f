"""A sensor gives its privileges up once it is attached, and works on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flowsage.collector import privileges
from flowsage.collector.errors import PrivilegeError
from flowsage.collector.records import packets_in
from tests.collector.wires import Wire, attached, eventually, udp, wire


@pytest.fixture
def cable() -> Iterator[Wire]:
    with wire() as made:
        yield made


def capabilities(pid: int) -> set[str]:
    """Of every thread of the process: each line of its status that speaks of capabilities, but the inheritable ones."""
    lines: list[str] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it ends just now
            lines += (task / "status").read_text().splitlines()
    return {line.split()[1] for line in lines if line.startswith(("CapPrm", "CapEff", "CapBnd", "CapAmb"))}


def test_collect_has_no_capability_once_it_is_attached_and_counts_drains_and_attaches_again(cable, tmp_path):
    command = [sys.executable, "-m", "flowsage.pipelines.cli", "collect", "-v", "-i", cable.port, "-o", str(tmp_path)]
    process = subprocess.Popen(
        ["ip", "netns", "exec", cable.near, *command, "--name", cable.port],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"FLOWSAGE_SENSOR__IDLE_TIMEOUT": "0.1s", "FLOWSAGE_SENSOR__SWEEP_INTERVAL": "0.05s"},
    )
    assert process.stderr
    said = ""
    while "Ctrl-C stops" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    # The thread in which it was tried may still be on its way out: nothing of it runs any more.
    eventually(lambda: capabilities(process.pid) == {"0" * 16})
    sent = cable.send(*(udp("10.0.0.1", "10.0.0.2", i) for i in range(1, 51)))
    eventually(lambda: list(tmp_path.glob(".*.arrows")))
    cable.delete()
    assert "is gone" in process.stderr.readline()
    cable.add()
    assert "watching" in process.stderr.readline()
    sent += cable.send(*(udp("10.0.0.3", "10.0.0.2", i) for i in range(1, 51)))
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"{sent} packets seen, {sent} in " in said
    assert "the ledger closes" in said
    assert sum(packets_in(pq.read_table(f)) for f in tmp_path.iterdir()) == sent
    assert not attached(cable)


DROP = """
import threading
from flowsage.collector import privileges
from flowsage.collector.errors import ProgramError

def works():
    assert privileges.held() == 0, "it is tried without"
    if {needed}:
        raise ProgramError("not without")

early = threading.Event()
if {early}:
    threading.Thread(target=early.wait).start()
print(hex(privileges.drop(works)), hex(privileges.held()), hex(privileges.held("CapBnd")))
try:
    privileges._set(1 << 21)
except Exception as error:
    print(type(error).__name__)
early.set()
"""


@pytest.mark.parametrize(("needed", "kept"), [(False, "0x0"), (True, "0x8000000000")])
def test_what_does_not_work_without_keeps_one_and_nothing_brings_the_rest_back(needed, kept):
    script = DROP.format(needed=needed, early=False)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [kept, kept, kept, PrivilegeError.__name__]
    assert done.stderr == ""


def test_an_earlier_thread_that_keeps_its_own_is_not_passed_over_in_silence():
    script = DROP.format(needed=False, early=True)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "1 threads were started before" in done.stderr


def test_a_directory_that_only_privilege_could_write_is_named_and_nothing_stays(cable, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 12_345, 12_345)
    command = [sys.executable, "-m", "flowsage.pipelines.cli", "collect", "-i", cable.port, "-o", str(theirs)]
    done = subprocess.run(
        ["ip", "netns", "exec", cable.near, *command, "--name", cable.port],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "once privileges are given up: make it root's, or keep them (--keep-privileges)" in done.stderr
    assert not attached(cable)
    assert privileges.held() != 0
