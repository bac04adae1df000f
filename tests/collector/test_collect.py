"""`collect` as a process: ended by signals, killed, refused, or left by its reader, it leaves nothing attached."""

import json
import os
import re
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from flowsage.collector.records import packets_in
from flowsage.graph.flows import from_table
from tests.collector.wires import Wire, attached, conversation, eventually, udp, wire


@pytest.fixture
def cable():
    with wire() as made:
        yield made


COLLECT = """
import sys
from flowsage.collector.collect import collect, summary
from flowsage.collector.agent_settings import AgentSettings
from flowsage.collector.errors import FlowsageError
assert not {"torch", "numba", "polars", "pyroute2"} & set(sys.modules)
try:
    ledger = collect(
        AgentSettings(name="edge", interfaces=(sys.argv[1],), netns=sys.argv[2] or None, table_entries=4096),
        sys.argv[3],
        on_ready=lambda agent: print("ready", file=sys.stderr, flush=True),
    )
except FlowsageError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
print(ledger.to_json() if sys.argv[3] != "-" else "", end="")
print(summary(ledger), file=sys.stderr)
"""


def start_collect(cable: Wire, output: object, *prefix: str) -> subprocess.Popen[str]:
    """In its namespace by itself, or, after a `prefix`, put there by `ip netns exec`."""
    words = ["ip", "netns", "exec", cable.near, *prefix] if prefix else []
    namespace = "" if prefix else cable.near
    return subprocess.Popen(
        [*words, sys.executable, "-c", COLLECT, cable.port, namespace, str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_collect_ended_by_a_signal_flushes_to_parquet_that_equals_its_ledger(cable, tmp_path, number):
    process = start_collect(cable, tmp_path / "out")
    assert process.stderr
    assert process.stderr.readline() == "ready\n"
    sent = cable.send(*(f for i in range(40) for f in conversation("10.0.0.1", "10.0.0.2", 2000 + i)))
    sent += cable.send(*(udp("10.0.0.1", "10.0.0.2", i) for i in range(1, 100)))
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "the ledger closes" in err
    assert not attached(cable)
    ledger = json.loads(out)
    assert (ledger["packets"], ledger["balance"], ledger["records_balance"]) == (sent, 0, 0)
    files = list((tmp_path / "out").iterdir())
    assert [f.suffix for f in files] == [".parquet"]
    table = pq.read_table(files[0])
    assert packets_in(table) == ledger["accounted_packets"] == sent
    assert 4 in table["end_reason"].to_pylist(), "forced end"
    flows = from_table(table)
    assert int(flows.packets_fwd.sum() + flows.packets_rev.sum()) == sent


def test_collect_writes_readable_lines_and_ends_quietly_when_nobody_reads(cable):
    process = start_collect(cable, "-")
    assert process.stderr
    assert process.stdout
    process.stderr.readline()
    cable.send(*conversation("10.0.0.1", "10.0.0.2", 2000))
    line = process.stdout.readline()
    assert "tcp 10.0.0.1:2000 → 10.0.0.2:80  5/3 packets" in line
    assert line.endswith("end of flow\n")
    process.stdout.close()
    cable.send(*conversation("10.0.0.1", "10.0.0.2", 2001))
    assert process.wait(120) == 0
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert not attached(cable)


def test_a_sensor_that_is_killed_leaves_nothing_attached(cable, tmp_path):
    process = start_collect(cable, tmp_path / "out")
    assert process.stderr
    process.stderr.readline()
    assert attached(cable)
    process.kill()
    process.communicate()
    eventually(lambda: not attached(cable))


def refused(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was said; a process that does not end by itself is killed, and fails the test."""
    try:
        _, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, err


def test_no_privilege_is_one_sentence_and_its_exit_code(cable, tmp_path):
    code, err = refused(start_collect(cable, tmp_path / "out", "setpriv", "--bounding-set=-all", "--inh-caps=-all"))
    assert code == 77, err
    assert re.search(r"run as root, or with CAP_BPF", err)
    assert len(err.strip().splitlines()) == 1
    assert os.listdir(tmp_path / "out") == []
    assert not attached(cable)


def test_a_kernel_without_btf_is_one_sentence_that_says_what_to_boot(cable, tmp_path):
    hide = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /sys/kernel/btf && exec "$@"', "sh")
    code, err = refused(start_collect(cable, tmp_path / "out", *hide))
    assert code == 1
    assert "This kernel has no BTF" in err
    assert "boot one built with CONFIG_DEBUG_INFO_BTF=y" in err
    assert len(err.strip().splitlines()) == 1
    assert not attached(cable)


def test_a_missing_interface_ends_collect_with_one_sentence(cable, tmp_path):
    absent = replace_port(cable, "fsnothing")
    code, err = refused(start_collect(absent, tmp_path / "out"))
    assert code == 1
    assert re.fullmatch(rf"there is no interface 'fsnothing' here.*{cable.port}.*\n", err)
    code, err = refused(start_collect(replace_port(cable, cable.port, near="fsnowhere"), tmp_path / "out"))
    assert code == 1
    assert "no network namespace 'fsnowhere'" in err


def replace_port(cable: Wire, port: str, near: str | None = None) -> Wire:
    return Wire(near=near or cable.near, far=cable.far, port=port, other=cable.other)
