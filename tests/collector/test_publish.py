"""Batches reach the log in order, once, or are accounted for: in the spool, or lost for a named reason."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flowsage.collector.errors import ConfigurationError, LogUnavailableError, RecordTooLargeError
from flowsage.collector.publish import FLOWS_TOPIC, Publisher
from flowsage.collector.records import FLOW_SCHEMA, RECORD_DTYPE, to_batch
from flowsage.collector.sink import Origin, deserialise, serialise
from flowsage.collector.spool import Spool
from flowsage.graph.flows import from_table
from flowsage.pipelines.memory_log import MemoryLog


def batch(n: int, first: int = 0) -> pa.RecordBatch:
    records = np.zeros(n, RECORD_DTYPE)
    records["ip_version"], records["start_ns"] = 4, np.arange(first, first + n)
    records["initiator"][:, 10:12] = records["responder"][:, 10:12] = 255
    return to_batch(records, clock_offset_ns=0, sensor="edge")


def noise(n: int, first: int = 0) -> pa.RecordBatch:
    """Records that do not compress well."""
    records = np.frombuffer(np.random.default_rng(first).bytes(n * RECORD_DTYPE.itemsize), RECORD_DTYPE).copy()
    records["ip_version"], records["start_ns"] = 6, np.arange(first, first + n)
    return to_batch(records, clock_offset_ns=0, sensor="edge")


class Agent:
    """Hands batches to a sink as an agent does: numbered."""

    def __init__(self, sink: Publisher, boot: str = "b00t") -> None:
        self._sink, self._boot, self.sequence = sink, boot, 0

    def put(self, batch: pa.RecordBatch, watermark_ns: int = 0) -> None:
        origin = Origin(sensor="edge", boot=self._boot, sequence=self.sequence, watermark_ns=watermark_ns)
        self._sink.put(batch, origin)
        self.sequence += 1


class Log(MemoryLog):
    """The in-memory log with a switch: the real contract, and an outage on request."""

    up = True

    def append(self, *args, **kwargs):
        if not self.up:
            raise ConnectionError("broker unreachable")
        return super().append(*args, **kwargs)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def spooled(folder: Path) -> list[Path]:
    """What is in the spool, oldest first."""
    return sorted(p for p in folder.iterdir() if p.name != "last-batch")


def delivered(log: MemoryLog) -> list[int]:
    """start_ns of all flow records in the log, in its order."""
    records = log.consumer("test", FLOWS_TOPIC).poll(10_000)
    return [t for r in records for t in deserialise(r.value)["start_ns"].to_pylist()]


def test_a_batch_is_one_log_record_that_tells_whose_it_is():
    log = Log()
    publisher = Publisher(log, sensor="edge")
    agent = Agent(publisher)
    agent.put(batch(3), 42)
    agent.put(batch(2, 3), 43)
    first, second = log.consumer("test", FLOWS_TOPIC).poll()
    assert first.key == b"edge"
    headers = dict(first.headers)
    assert headers["ce_id"] == b"b00t/0"
    assert dict(second.headers)["ce_id"] == b"b00t/1"
    assert {"ce_type", "ce_source", "ce_specversion", "ce_dataschema", "content-type"} <= set(headers)
    table = deserialise(second.value)
    assert table.schema.equals(FLOW_SCHEMA, check_metadata=False)
    assert table.schema.metadata[b"flowsage.sequence"] == b"1"
    assert table.schema.metadata[b"flowsage.watermark_ns"] == b"43"
    assert table["start_ns"].to_pylist() == [3, 4]
    assert publisher.counts.acknowledged == 5
    assert publisher.counts.balance == 0


def test_a_reader_of_version_1_reads_what_a_later_writer_adds():
    later = pa.Table.from_batches([batch(3)]).append_column("process", pa.array(["a", "b", None]))
    [widened] = later.combine_chunks().to_batches()
    value = serialise(widened, Origin(sensor="edge", boot="b00t", sequence=7, watermark_ns=42))
    table = deserialise(value)
    table = table.replace_schema_metadata({**table.schema.metadata, b"flowsage.schema": b"2", b"flowsage.new": b"1"})
    assert Origin.of(table) == Origin(sensor="edge", boot="b00t", sequence=7, watermark_ns=42)
    read, known = from_table(table), from_table(batch(3))
    assert read.start_ns.tolist() == known.start_ns.tolist() == [0, 1, 2]
    assert read.hosts.names.equals(known.hosts.names)


def test_an_outage_is_spooled_and_follows_in_order(tmp_path):
    log, clock = Log(), Clock()
    publisher = Publisher(log, sensor="edge", spool=Spool(tmp_path), monotonic=clock)
    agent = Agent(publisher)
    agent.put(batch(2, 0))
    log.up = False
    for i in range(5):
        clock.now += 0.4
        agent.put(batch(2, 2 + 2 * i))
    assert publisher.counts.pending == 10
    assert publisher.counts.balance == 0
    log.up = True
    agent.put(batch(2, 12))
    assert publisher.counts.pending == 12, "the log is left alone for a moment, and nothing overtakes what waits"
    clock.now += 2
    agent.put(batch(2, 14))
    assert publisher.counts.pending == 0
    assert delivered(log) == list(range(16))
    assert publisher.counts.acknowledged == 16
    assert publisher.counts.balance == 0


def test_a_heartbeat_keeps_its_place_and_is_not_asked_for_while_it_would_wait(tmp_path):
    log, clock = Log(), Clock()
    publisher = Publisher(log, sensor="edge", spool=Spool(tmp_path), monotonic=clock)
    agent = Agent(publisher)
    assert publisher.ready()
    agent.put(batch(0), 7)
    log.up = False
    agent.put(batch(1), 8)
    assert not publisher.ready()
    clock.now += 5
    assert not publisher.ready(), "it tried, and the log refuses still"
    agent.put(batch(0), 9)
    log.up = True
    clock.now += 5
    assert publisher.ready(), "asking sent what waited"
    agent.put(batch(0), 10)
    records = log.consumer("test", FLOWS_TOPIC).poll()
    assert [dict(r.headers)["ce_id"] for r in records] == [b"b00t/%d" % i for i in range(4)]
    assert [dict(r.headers)["ce_watermark"] for r in records] == [b"7", b"8", b"9", b"10"]


def test_without_a_spool_a_refused_batch_is_a_named_loss():
    log = Log()
    log.up = False
    publisher = Publisher(log, sensor="edge")
    agent = Agent(publisher)
    agent.put(batch(4))
    assert publisher.counts.lost == {"log refused, no spool": 4}
    assert publisher.counts.balance == 0


def test_the_spool_keeps_its_bound_by_giving_up_the_oldest_which_are_counted(tmp_path):
    log, clock = Log(), Clock()
    log.up = False
    size = len(batch(100).serialize())
    spool = Spool(tmp_path, max_bytes=5 * size)
    publisher = Publisher(log, sensor="edge", spool=spool, monotonic=clock)
    agent = Agent(publisher)
    for i in range(40):
        agent.put(batch(100, 100 * i))
    assert sum(f.stat().st_size for f in spooled(tmp_path)) == spool.bytes <= 5 * size
    lost = publisher.counts.lost["spool full"]
    assert lost > 0
    assert publisher.counts.balance == 0
    log.up, clock.now = True, 10
    publisher.drain()
    assert delivered(log) == list(range(lost, 4000))
    assert publisher.counts.balance == 0


def test_a_batch_larger_than_the_whole_spool_is_lost_and_nothing_else(tmp_path):
    log = Log()
    log.up = False
    publisher = Publisher(log, sensor="edge", spool=Spool(tmp_path, max_bytes=100))
    agent = Agent(publisher)
    agent.put(batch(50))
    assert publisher.counts.lost == {"spool full": 50}
    assert publisher.counts.balance == 0


def test_a_damaged_file_in_the_spool_is_given_up_and_the_rest_follows(tmp_path):
    log, clock = Log(), Clock()
    log.up = False
    publisher = Publisher(log, sensor="edge", spool=Spool(tmp_path), monotonic=clock)
    agent = Agent(publisher)
    for i in range(3):
        agent.put(batch(10, 10 * i))
    middle = spooled(tmp_path)[1]
    middle.write_bytes(middle.read_bytes()[:200])
    log.up, clock.now = True, 10
    publisher.drain()
    assert delivered(log) == [*range(10), *range(20, 30)]
    assert publisher.counts.lost == {"spool damaged": 10}
    assert publisher.counts.balance == 0


def test_a_disk_that_takes_nothing_is_a_named_loss(tmp_path, monkeypatch):
    log = Log()
    log.up = False
    publisher = Publisher(log, sensor="edge", spool=Spool(tmp_path))
    agent = Agent(publisher)

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    agent.put(batch(3))
    assert publisher.counts.lost == {"spool failed": 3}
    assert publisher.counts.balance == 0
    assert spooled(tmp_path) == []


KILLED = """
    import itertools, sys
    sys.path.insert(0, sys.argv[2])
    from flowsage.collector.publish import Publisher
    from flowsage.collector.spool import Spool
    from tests.collector.test_publish import Agent, batch

    class Down:
        def append(self, *args, **kwargs):
            raise ConnectionError("down")

    publisher = Publisher(Down(), sensor="edge", spool=Spool(sys.argv[1]))
    agent = Agent(publisher, "first")
    for i in itertools.count():
        agent.put(batch(20, 20 * i))
        print(i, flush=True)
"""


def test_a_sensor_killed_while_it_spools_loses_no_batch_that_was_in_the_spool(tmp_path, request):
    root = request.config.rootpath
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path, root], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    seen = [int(process.stdout.readline()) for _ in range(30)]
    process.send_signal(signal.SIGKILL)
    seen += [int(line) for line in process.stdout.read().split()]
    process.wait()
    process.stdout.close()
    log = Log()
    publisher = Publisher(log, sensor="edge", spool=Spool(tmp_path))
    agent = Agent(publisher, "second")
    assert publisher.counts.resumed >= 20 * len(seen)
    agent.put(batch(1, -1))
    times = delivered(log)
    assert times[: 20 * len(seen)] == list(range(20 * len(seen)))
    assert times[-1] == -1
    assert publisher.counts.balance == 0
    ids = [dict(r.headers)["ce_id"] for r in log.consumer("again", FLOWS_TOPIC).poll(10_000)]
    assert ids[: len(seen)] == [b"first/%d" % i for i in seen]
    assert ids[-1] == b"second/0"
    assert spooled(tmp_path) == []


def test_the_sink_knows_the_last_batch_of_a_boot_that_it_took_in_any_process(tmp_path):
    log = Log()
    publisher = Publisher(log, sensor="edge", spool=Spool(tmp_path))
    agent = Agent(publisher, "first")
    assert publisher.last_sequence("first") is None
    for _ in range(3):
        agent.put(batch(1))
    log.up = False
    agent.put(batch(1))
    publisher.close()
    successor = Publisher(log, sensor="edge", spool=Spool(tmp_path))
    assert successor.last_sequence("first") == 3
    assert successor.last_sequence("another boot") is None
    (tmp_path / "last-batch").write_bytes(b"\xff\xfe")
    assert successor.last_sequence("first") is None
    assert Publisher(log, sensor="edge").last_sequence("first") is None


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


class SlowLog(MemoryLog):
    """Takes records, or hangs until told to go on, or for as long as the caller waits."""

    def __init__(self) -> None:
        super().__init__()
        self.goes = threading.Event()
        self.goes.set()
        self.asked: list[float | None] = []

    def append(self, *args, timeout_s=None, **kwargs):
        self.asked.append(timeout_s)
        if not self.goes.wait(timeout_s):
            raise LogUnavailableError("no answer in time")
        return super().append(*args, **kwargs)


def test_a_log_that_hangs_holds_the_sensor_up_once_and_everything_follows_in_order(tmp_path):
    log = SlowLog()
    publisher = Publisher(log, sensor="edge", spool=Spool(tmp_path), retry_s=0.05, patience_s=0.05).start()
    agent = Agent(publisher)
    agent.put(batch(2, 0))
    until(lambda: publisher.counts.pending == 0)
    agent.put(batch(2, 2))
    assert log.asked == [None, 0.05], "the first is sent by the patient thread, and then directly"
    log.goes.clear()
    agent.put(batch(2, 4))
    for i in range(200):
        agent.put(batch(2, 6 + 2 * i))
    assert log.asked.count(0.05) == 2, "only the first of them waited"
    assert publisher.counts.pending == 402
    assert publisher.counts.balance == 0
    assert not publisher.ready()
    log.goes.set()
    until(publisher.ready)
    agent.put(batch(2, 406))
    assert log.asked[-1] == 0.05
    publisher.close()
    assert delivered(log) == list(range(408))
    assert publisher.counts.acknowledged == 408
    assert publisher.counts.balance == 0


def test_before_it_has_met_the_log_a_patient_publisher_spools_and_asks_nothing_of_it(tmp_path):
    log = SlowLog()
    publisher = Publisher(log, sensor="edge", spool=Spool(tmp_path), patience_s=0.05)
    agent = Agent(publisher)
    for i in range(3):
        agent.put(batch(2, 2 * i))
    assert not publisher.ready()
    assert log.asked == []
    assert publisher.counts.pending == 6
    publisher.start()
    until(publisher.ready)
    publisher.close()
    assert delivered(log) == list(range(6))


def test_a_batch_that_is_being_sent_is_not_the_one_that_makes_room(tmp_path):
    log = SlowLog()
    log.goes.clear()
    size = len(serialise(batch(100), Origin(sensor="edge", boot="b00t", sequence=0, watermark_ns=0)))
    spool = Spool(tmp_path, max_bytes=3 * size + 100)
    publisher = Publisher(log, sensor="edge", spool=spool, retry_s=0.05, patience_s=0.05).start()
    agent = Agent(publisher)
    agent.put(batch(100, 0))
    until(lambda: bool(log.asked))
    for i in range(1, 10):
        agent.put(batch(100, 100 * i))
    assert publisher.counts.lost == {"spool full": 700}
    log.goes.set()
    until(publisher.ready)
    publisher.close()
    assert delivered(log) == [*range(100), *range(800, 1000)]
    assert publisher.counts.balance == 0


def test_a_batch_that_the_log_will_never_take_is_a_named_loss_and_holds_nothing_up(tmp_path):
    class Narrow(Log):
        def append(self, topic, key, value, *args, **kwargs):
            if len(value) > 20_000:
                raise RecordTooLargeError("a record of this size is refused")
            return super().append(topic, key, value, *args, **kwargs)

    log, clock = Narrow(), Clock()
    publisher = Publisher(log, sensor="edge", spool=Spool(tmp_path), monotonic=clock)
    agent = Agent(publisher)
    agent.put(batch(10, 0))
    agent.put(noise(1000))
    log.up = False
    agent.put(batch(10, 10))
    agent.put(noise(1000))
    agent.put(batch(10, 20))
    log.up, clock.now = True, 10
    publisher.drain()
    assert delivered(log) == list(range(30))
    assert publisher.counts.lost == {"too large for the log": 2000}
    assert publisher.counts.balance == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "flowsage-test", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_on_a_full_disk_the_oldest_batches_make_room_and_every_record_is_accounted_for(small_disk):
    log, clock = Log(), Clock()
    log.up = False
    publisher = Publisher(log, sensor="edge", spool=Spool(small_disk), monotonic=clock)
    agent = Agent(publisher)
    for i in range(60):
        agent.put(noise(1000, 1000 * i))
    counts = publisher.counts
    assert 0 < counts.lost["spool full"] < 60_000
    assert counts.pending > 0
    assert counts.balance == 0
    (small_disk / "somebody else's").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
    agent.put(noise(1000, 60_000))
    assert publisher.counts.balance == 0
    assert not list(small_disk.glob(".*.tmp"))
    log.up, clock.now = True, 10
    publisher.drain()
    lost = publisher.counts.lost["spool full"]
    assert delivered(log) == list(range(lost, 61_000))
    assert publisher.counts.balance == 0
    publisher.close()


def test_two_processes_never_share_a_spool_and_a_bad_directory_is_named(tmp_path):
    spool = Spool(tmp_path / "spool")
    with pytest.raises(ConfigurationError, match="in use by another process"):
        Spool(tmp_path / "spool")
    spool.close()
    Spool(tmp_path / "spool").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Spool(tmp_path / "file")


def test_leftovers_of_a_write_that_was_cut_are_cleared_away(tmp_path):
    (tmp_path / ".0000000000000000-5.arrows.tmp").write_bytes(b"half")
    (tmp_path / "README").write_text("not ours")
    spool = Spool(tmp_path)
    assert spool.pending_batches == 0
    assert [p.name for p in tmp_path.iterdir()] == ["README"]
