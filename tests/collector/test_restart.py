"""Killed at any moment and started again, a sensor loses nothing and tells nothing twice."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flowsage.bpf
from flowsage.collector.agent_settings import AgentSettings
from flowsage.collector.interface import in_namespace
from flowsage.collector.records import FLOW_SCHEMA
from flowsage.collector.xdp import attached_program
from tests.collector.sensor_process import DEATHS, end, kill, ready, start
from tests.collector.wires import Wire, attached, eventually, start_blast, udp, wire

MS = 1_000_000


@pytest.fixture
def cable() -> Iterator[Wire]:
    with wire() as made:
        yield made


@pytest.fixture
def pins() -> Iterator[Path]:
    root = Path(f"/sys/fs/bpf/fstest{os.getpid()}")
    yield root
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if root.exists():
        root.rmdir()


def settings(cable: Wire, pins: Path, **other: object) -> AgentSettings:
    base = AgentSettings(
        name="edge.example",
        interfaces=(cable.port,),
        netns=cable.near,
        pins=pins,
        table_entries=65_536,
        ring_bytes=4 << 20,
        idle_timeout=200 * MS,
        poll_interval=10 * MS,
        sweep_interval=50 * MS,
    )
    return replace(base, **other)


def written(folder: Path) -> pa.Table:
    """Everything in the finished files; nothing else is left in the folder."""
    files = sorted(folder.iterdir())
    assert [f.name for f in files if f.suffix != ".parquet"] == []
    return pa.concat_tables([pq.read_table(f) for f in files]) if files else FLOW_SCHEMA.empty_table()


def packets_of_flows(table: pa.Table) -> dict[tuple[str, int], int]:
    """Packets of each source address and port: a flow of `blast`."""
    counted = pa.table(
        {
            "ip": table["src_ip"].combine_chunks().cast(pa.string()) if len(table) else pa.array([], pa.string()),
            "port": table["src_port"],
            "packets": pa.compute.add(table["packets_fwd"], table["packets_rev"]),
        }
    )
    sums = counted.group_by(["ip", "port"]).aggregate([("packets", "sum")])
    names = zip(sums["ip"].to_pylist(), sums["port"].to_pylist(), strict=True)
    return dict(zip(names, sums["packets_sum"].to_pylist(), strict=True))


def objects_of(pins: Path) -> set[str]:
    """What is pinned, as paths below the root."""
    return {str(p.relative_to(pins)) for p in pins.rglob("*") if not p.is_dir()} if pins.exists() else set()


def test_killed_again_and_again_under_load_every_packet_is_in_exactly_one_record(cable, pins, tmp_path):
    seed = random.Random(4)
    watching = settings(cable, pins)
    flows, each = 5_000, 60
    process = ready(start(watching, tmp_path))
    kills = blasts = sent = 0
    # How often it is killed during one depends on how fast a process starts here.
    while kills < 5:
        blast = start_blast(cable, flows=flows, packets=flows * each, rate=30_000)
        blasts += 1
        while blast.poll() is None:
            time.sleep(seed.uniform(0.05, 0.6))
            kill(process)
            kills += 1
            process = ready(start(watching, tmp_path, rotate_bytes=4 << 20))
        sent += int(blast.communicate()[0])
    ledger = end(process)
    assert sent == blasts * flows * each == ledger["packets"] == ledger["delivered"]["packets"]
    told = packets_of_flows(written(tmp_path))
    assert len(told) == flows
    assert set(told.values()) == {blasts * each}, "none lost, none twice"
    assert objects_of(pins) == set()
    assert not attached(cable)


@pytest.mark.parametrize("where", [w for w in DEATHS if "program" not in w])
def test_killed_at_the_worst_places_it_goes_on_exactly_there(cable, pins, tmp_path, where):
    watching = settings(cable, pins, idle_timeout=30 * MS)
    process = ready(start(watching, tmp_path, rotate_s=0.05, death=(where, 1 if "removed" in where else 2)))
    sent, began = 0, time.monotonic()
    while process.poll() is None:
        sent += cable.send(*(udp("10.0.0.1", "10.0.0.2", 1 + (sent + i) % 60_000) for i in range(20)))
        time.sleep(0.02)
        if "removed" in where and sent > 200 and process.poll() is None:
            process.terminate()
            process.wait(60)
        assert time.monotonic() - began < 120
    assert process.returncode == -9
    process.communicate()
    sent += cable.send(*(udp("10.0.0.7", "10.0.0.2", i) for i in range(1, 50)))
    counted = attached(cable)
    ledger = end(ready(start(watching, tmp_path)))
    told = packets_of_flows(written(tmp_path))
    if counted:
        assert ledger["packets"] == sent == sum(told.values())
    else:  # it had detached before it died: the last packets were nobody's
        assert "removed" in where
        assert sum(told.values()) == sent - 49
    assert set(told.values()) == {1}
    assert objects_of(pins) == set()


def test_another_mode_leaves_a_gap_which_is_told_and_one_that_cannot_be_had_leaves_none(cable, pins, tmp_path):
    generic = settings(cable, pins, mode="skb", idle_timeout=60_000 * MS)
    kill(ready(start(generic, tmp_path)))
    sent = cable.send(*[udp("10.0.0.1", "10.0.0.2", 7)] * 3)
    _, err = start(replace(generic, mode="hw"), tmp_path).communicate(timeout=20)
    assert "cannot run XDP in mode hw" in err
    sent += cable.send(*[udp("10.0.0.1", "10.0.0.2", 7)] * 4)
    process = ready(start(replace(generic, mode="drv"), tmp_path))
    sent += cable.send(*[udp("10.0.0.1", "10.0.0.2", 7)] * 5)
    process.terminate()
    out, err = process.communicate(timeout=20)
    ledger = json.loads(out)
    assert ledger["packets"] == sent == 12
    assert ledger["unwatched_ns"].keys() == {cable.port}
    assert (
        f"{cable.port} was not watched for {ledger['unwatched_ns'][cable.port] / 1e6:.1f} ms; the ledger closes" in err
    )
    assert written(tmp_path)["packets_fwd"].to_pylist() == [12]


def test_killed_without_a_pin_it_leaves_nothing_and_pinned_it_goes_on_counting(cable, pins, tmp_path):
    kill(ready(start(replace(settings(cable, pins), pins=None), tmp_path)))
    eventually(lambda: not attached(cable))
    kill(ready(start(settings(cable, pins), tmp_path)))
    assert attached(cable)
    cable.send(*(udp("10.0.0.1", "10.0.0.2", i) for i in range(1, 101)))
    ledger = end(ready(start(settings(cable, pins), tmp_path)))
    assert ledger["packets"] == 100
    assert not attached(cable)


@pytest.fixture(scope="module")
def other_layout(tmp_path_factory) -> Path:
    """The program with another layout, as a later version may have it."""
    folder = tmp_path_factory.mktemp("bpf")
    for source in Path(flowsage.bpf.__file__).resolve().parent.iterdir():
        if source.suffix in {".c", ".h"} or source.name == "Makefile":
            (folder / source.name).write_bytes(source.read_bytes())
    header = folder / "flow.h"
    header.write_text(header.read_text().replace("define FLOW_LAYOUT_VERSION 2", "define FLOW_LAYOUT_VERSION 3"))
    subprocess.run(["make", "-s", "-C", folder, "flow.bpf.o"], check=True)
    return folder / "flow.bpf.o"


def running(cable: Wire) -> int:
    with in_namespace(cable.near):
        there = attached_program(cable.port)
    assert there
    return there[1]


def arrived(cable: Wire) -> int:
    """Packets that the watched end has received."""
    with in_namespace(cable.near):
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    (line,) = (line for line in lines if line.strip().startswith(f"{cable.port}:"))
    return int(line.partition(":")[2].split()[1])


def test_changed_settings_are_a_new_program_with_the_same_table(cable, pins, tmp_path):
    patient = settings(cable, pins, idle_timeout=60_000 * MS)
    kill(ready(start(patient, tmp_path)))
    before = running(cable)
    cable.send(*[udp("10.0.0.1", "10.0.0.2", 7)] * 3)
    process = ready(start(replace(patient, idle_timeout=30_000 * MS), tmp_path))
    assert running(cable) != before
    cable.send(*[udp("10.0.0.1", "10.0.0.2", 7)] * 4)
    kill(process)
    again = running(cable)
    process = ready(start(replace(patient, idle_timeout=30_000 * MS), tmp_path))
    assert running(cable) == again, "what is there is what it would load"
    ledger = end(process)
    table = written(tmp_path)
    assert table["packets_fwd"].to_pylist() == [7], "one flow, through both programs"
    assert ledger["packets"] == 7


@pytest.mark.parametrize("where", ["", *(w for w in DEATHS if "program" in w)])
def test_another_layout_flushes_the_old_table_and_counts_on_and_can_be_killed_at_it(
    cable, pins, tmp_path, other_layout, where
):
    old = settings(cable, pins, idle_timeout=60_000 * MS)
    new = replace(old, program=other_layout, ring_bytes=8 << 20)
    kill(ready(start(old, tmp_path)))
    before = running(cable)
    blast = start_blast(cable, flows=4000, packets=40_000, rate=20_000)
    eventually(lambda: arrived(cable) >= 4000)
    if where:
        process = start(new, tmp_path, death=(where, 1))
        process.communicate(timeout=120)
        assert process.returncode == -9
    process = ready(start(new, tmp_path))
    assert running(cable) != before
    sent = int(blast.communicate()[0])
    # Whether or not the first had ended by then, each flow goes on under the new program.
    sent += int(start_blast(cable, flows=4000, packets=4000, rate=20_000).communicate()[0])
    ledger = end(process)
    table = written(tmp_path)
    told = packets_of_flows(table)
    assert sent == ledger["packets"] == sum(told.values())
    assert set(told.values()) == {11}
    assert len(table) >= 8000, "the old table was flushed"
    assert objects_of(pins) == set()


def test_an_older_program_comes_back_the_same_way(cable, pins, tmp_path, other_layout):
    old = settings(cable, pins, idle_timeout=60_000 * MS)
    sent = 0
    for program in (other_layout, old.program, other_layout):
        process = ready(start(replace(old, program=program), tmp_path))
        sent += cable.send(*(udp("10.0.0.1", "10.0.0.2", 1 + i) for i in range(100)))
        kill(process)
    ledger = end(ready(start(old, tmp_path)))
    assert ledger["packets"] == sent == sum(packets_of_flows(written(tmp_path)).values())


def test_a_second_collector_of_the_same_sensor_or_interface_refuses(cable, pins, tmp_path):
    process = ready(start(settings(cable, pins), tmp_path))
    for other, why in (
        (settings(cable, pins), "another process runs the sensor 'edge.example'"),
        (settings(cable, pins, name="second"), "already runs XDP program"),
    ):
        second = start(other, tmp_path / "second")
        _, err = second.communicate(timeout=120)
        assert (second.returncode, why in err, len(err.splitlines())) == (1, True, 1), err
    sent = cable.send(udp("10.0.0.1", "10.0.0.2"))
    assert end(process)["packets"] == sent
    assert objects_of(pins) == set()
