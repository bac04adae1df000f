"""Batches reach the log in order, once, or are accounted for: in the spool, or lost for a named reason."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pytest

from flowsage.collector.errors import ConfigurationError
from flowsage.collector.publish import FLOWS_TOPIC, Origin, Publisher, deserialise
from flowsage.collector.records import FLOW_SCHEMA, RECORD_DTYPE, to_batch
from flowsage.collector.spool import Spool
from flowsage.pipelines.memory_log import MemoryLog


def batch(n: int, first: int = 0) -> pa.RecordBatch:
    records = np.zeros(n, RECORD_DTYPE)
    records["ip_version"], records["start_ns"] = 4, np.arange(first, first + n)
    records["initiator"][:, 10:12] = records["responder"][:, 10:12] = 255
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

    def append(self, topic, key, value, headers=()):
        if not self.up:
            raise ConnectionError("broker unreachable")
        return super().append(topic, key, value, headers)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


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
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) == spool.bytes <= 5 * size
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
    middle = sorted(tmp_path.iterdir())[1]
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
    assert list(tmp_path.iterdir()) == []


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
    assert list(tmp_path.iterdir()) == []


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
