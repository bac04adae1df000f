"""Records are written as files that are whole whenever they can be seen, or as lines that a person can read."""

import io
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowsage.collector.errors import UsageError
from flowsage.collector.output import (
    LinesOutput,
    OutputClosedError,
    OutputError,
    format_lines,
    human_bytes,
)
from flowsage.collector.parquet import ParquetOutput
from flowsage.collector.records import FLOW_SCHEMA, RECORD_DTYPE, to_batch
from flowsage.collector.sink import Origin
from flowsage.graph.flows import from_table

START = 1_795_507_201_123_000_000
NEXT = Origin(sensor="edge", boot="b00t", sequence=0, watermark_ns=0)


def batch(n: int, first: int = 0, **fields: object) -> pa.RecordBatch:
    r = np.zeros(n, RECORD_DTYPE)
    r["ip_version"], r["proto"], r["end_reason"], r["start_ns"] = 4, 6, 3, START + np.arange(first, first + n)
    r["initiator"][:] = np.frombuffer(b"\0" * 10 + b"\xff\xff\x0a\0\0\1", np.uint8)
    r["responder"][:] = r["initiator"]
    r["responder"][:, 14] = np.arange(first, first + n) % 251
    r["responder"][:, 15] = 2
    r["initiator_port"], r["responder_port"] = 1234, 80
    r["direction"]["packets"], r["direction"]["bytes"] = [12, 8], [1234, 3400]
    for name, value in fields.items():
        r[name] = value
    return to_batch(r, clock_offset_ns=0, sensor="edge/1")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_line_says_when_who_to_whom_how_much_and_how_it_ended():
    assert format_lines(batch(1)) == [
        "2026-11-24T08:00:01.123Z tcp 10.0.0.1:1234 → 10.0.0.2:80  12/8 packets 1.2 kB/3.4 kB  end of flow"
    ]
    icmp = batch(1, proto=1, icmp_valid=1, icmp_type=8, vlan=7, end_reason=4)
    assert format_lines(icmp) == [
        "2026-11-24T08:00:01.123Z icmp 10.0.0.1 → 10.0.0.2  type 8 code 0  vlan 7"
        "  12/8 packets 1.2 kB/3.4 kB  forced end"
    ]
    v6 = batch(1, ip_version=6, initiator=np.frombuffer(b"\x20\1\x0d\xb8" + b"\0" * 11 + b"\1", np.uint8))
    assert " [2001:db8::1]:1234 → [::ffff:10.0.0.2]:80 " in format_lines(v6)[0]


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_400, "99.4 kB"), (123_456, "123 kB"), (999_600, "1.0 MB")],
)
def test_bytes_are_written_in_few_digits(n, text):
    assert human_bytes(n) == text


def test_files_are_seen_only_when_whole_and_hold_every_record(tmp_path):
    clock = Clock()
    out = ParquetOutput(
        tmp_path, sensor="edge/1", row_group=100, rotate_s=60, monotonic=clock, realtime=lambda: START / 1e9
    )
    for i in range(10):
        out.put(batch(50, 50 * i), NEXT)
        clock.now += 20
        assert all(len(pq.read_table(f)) for f in tmp_path.glob("*.parquet"))
    out.close()
    files = sorted(tmp_path.iterdir())
    assert files == out.files
    assert len(files) >= 3
    assert files[0].name == "flows-20261124T080001Z-edge_1-000.parquet"
    table = pa.concat_tables([pq.read_table(f) for f in files])
    assert table["start_ns"].to_pylist() == [START + i for i in range(500)]
    assert table.schema.metadata[b"flowsage.schema"] == b"1"
    assert pa.types.is_dictionary(pq.read_table(files[0]).schema.field("src_ip").type)


def test_a_file_is_finished_at_its_size(tmp_path):
    out = ParquetOutput(tmp_path, sensor="s", row_group=1000, rotate_bytes=10_000)
    for i in range(20):
        out.put(batch(1000, 1000 * i), NEXT)
    out.close()
    assert len(out.files) > 2
    assert sum(len(pq.read_table(f)) for f in out.files) == 20_000


def test_what_is_written_is_read_as_flows(tmp_path):
    out = ParquetOutput(tmp_path, sensor="s")
    out.put(batch(300), NEXT)
    out.close()
    flows = from_table(pq.read_table(out.files[0]))
    assert len(flows) == 300
    assert int(flows.packets_fwd.sum() + flows.packets_rev.sum()) == 300 * 20
    assert bool(flows.answered.all())
    assert pq.read_table(out.files[0]).schema.names == FLOW_SCHEMA.names


def test_nothing_seen_writes_no_file_and_an_existing_file_is_never_replaced(tmp_path):
    ParquetOutput(tmp_path, sensor="s").close()
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        out = ParquetOutput(tmp_path, sensor="s", realtime=lambda: 0.0)
        out.put(batch(1), NEXT)
        out.close()
    assert [f.name[-11:] for f in sorted(tmp_path.iterdir())] == ["000.parquet", "001.parquet"]


def origin(sequence: int, boot: str = "b00t") -> Origin:
    return Origin(sensor="s", boot=boot, sequence=sequence, watermark_ns=0)


def started(folder: Path, batches: int) -> tuple[ParquetOutput, Path]:
    """An output that has taken so many batches of 10 records, and its stream; it is never closed: as if killed."""
    out = ParquetOutput(folder, sensor="s")
    for i in range(batches):
        out.put(batch(10, 10 * i), origin(i))
    (stream,) = folder.glob(".*.arrows")
    return out, stream


def test_what_a_killed_process_wrote_is_taken_over_whole_up_to_where_it_was_cut(tmp_path):
    killed, stream = started(tmp_path / "killed", 3)
    ends = []
    whole = stream.read_bytes()
    for kept in range(3):
        _, shorter = started(tmp_path / f"{kept}", kept + 1)
        ends.append(shorter.stat().st_size)
    assert ends[-1] == len(whole)
    rng = np.random.default_rng(0)
    for cut in [*ends, 0, 1, ends[0] - 1, ends[0] + 1, *rng.integers(0, len(whole), 12).tolist()]:
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / stream.name).write_bytes(whole[:cut])
        there = sum(end <= cut for end in ends)
        out = ParquetOutput(folder, sensor="s")
        assert out.last_sequence("b00t") == (there - 1 if there else None)
        assert out.last_sequence("another") is None
        assert (out.cut_bytes > 0) == (cut not in {0, *ends})
        assert [p.name for p in folder.iterdir()] == [stream.name], "who asks again gets the same answer"
        out.put(batch(1, 1000), origin(there))
        out.close()
        tables = [pq.read_table(f) for f in sorted(folder.glob("flows-*.parquet"))]
        assert len(list(folder.iterdir())) == len(tables)
        assert pa.concat_tables(tables)["start_ns"].to_pylist() == [
            *(START + i for i in range(10 * there)),
            START + 1000,
        ]
    killed.close()


def test_a_stream_that_somebody_writes_is_left_alone_and_so_is_that_of_another_sensor(tmp_path):
    alive, stream = started(tmp_path, 1)
    other = tmp_path / stream.name.replace("-s-", "-t-s-")
    other.write_bytes(stream.read_bytes())
    second = ParquetOutput(tmp_path, sensor="s")
    assert second.last_sequence("b00t") is None
    second.close()
    assert stream.exists()
    alive.close()
    assert other.exists()
    assert [len(pq.read_table(f)) for f in tmp_path.glob("*.parquet")] == [10]


def test_a_disk_that_fills_up_keeps_what_was_taken_and_gives_it_to_the_next(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], check=True)
    try:
        out, taken = ParquetOutput(small, sensor="s"), 0
        with suppress(OutputError):
            while True:
                out.put(batch(500, 500 * taken), origin(taken))
                taken += 1
        assert taken > 3
        with pytest.raises(OutputError, match=r"No space left on device.*becomes Parquet at the next start"):
            out.put(batch(500, 500 * taken), origin(taken))
        with suppress(OutputError):
            out.close()
        again = ParquetOutput(small, sensor="s")
        assert again.cut_bytes == 0, "nothing of the batch that did not fit"
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        again.put(batch(500, 500 * taken), origin(taken))
        again.close()
        table = pa.concat_tables([pq.read_table(f) for f in sorted(small.iterdir())])
        assert table["start_ns"].to_pylist() == [START + i for i in range(500 * (taken + 1))]
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_directory_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"output directory .*file.* cannot be made"):
        ParquetOutput(tmp_path / "file", sensor="s")


def test_a_disk_that_is_full_is_said_in_a_sentence(tmp_path):
    out = ParquetOutput(tmp_path, sensor="s", row_group=10)
    tmp_path.rename(tmp_path.with_name("gone"))
    with pytest.raises(OutputError, match="flow records cannot be written to"):
        out.put(batch(20), NEXT)


def test_lines_stop_quietly_when_the_reader_has_gone():
    read, write = os.pipe()
    stream = os.fdopen(write, "w")
    lines = LinesOutput(stream)
    lines.put(batch(2), NEXT)
    assert os.read(read, 65536).count(b"\n") == 2
    os.close(read)
    with pytest.raises(OutputClosedError) as caught:
        lines.put(batch(2), NEXT)
    assert caught.value.exit_code == 0
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_an_empty_batch_writes_nothing():
    text = io.StringIO()
    LinesOutput(text).put(batch(0), NEXT)
    assert text.getvalue() == ""
