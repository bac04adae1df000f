"""A capture through the kernel gives what the sensor would have seen on the wire, and its ledger always closes."""

import csv
import json
import struct
from collections import Counter

import pyarrow as pa
import pytest

from flowsage.collector.errors import CaptureError, ConfigurationError
from flowsage.collector.feed import CaptureFeed, capture_settings, feed_capture
from flowsage.collector.program import FlowProgram, FlowSettings
from flowsage.collector.records import FLOW_SCHEMA, merge_same_flow, packets_in
from tests.collector.wires import conversation, tcp, udp

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND


def write(tmp_path, packets, cut=0):
    """A nanosecond capture of (time, frame) pairs, without its last `cut` bytes."""
    data = struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 65535, 1)
    for time, frame in packets:
        data += struct.pack("<IIII", *divmod(time, SECOND), len(frame), len(frame)) + frame
    path = tmp_path / "capture.pcap"
    path.write_bytes(data[: len(data) - cut])
    return path


def replay(path, settings=None, *, no_timeouts=False, **options):
    """The records of a capture as one table, and its feed."""
    small = settings or FlowSettings(table_entries=4096, ring_bytes=1 << 20)
    with FlowProgram(capture_settings(small, no_timeouts=no_timeouts)) as program:
        feed = CaptureFeed(path, program, **options)
        return pa.Table.from_batches(list(feed), FLOW_SCHEMA), feed


def test_a_connection_is_one_record_with_its_own_times(tmp_path):
    frames = conversation("10.0.0.1", "10.0.0.2", 2000)
    path = write(tmp_path, [(START + i * 1_000_001, frame) for i, frame in enumerate(frames)])
    table, feed = replay(path, sensor="tap")
    (row,) = table.to_pylist()
    assert (row["start_ns"], row["end_ns"], row["handshake_ns"]) == (START, START + 7 * 1_000_001, 1_000_001)
    assert (row["packets_fwd"], row["packets_rev"], row["sensor"], row["end_reason"]) == (5, 3, "tap", 3)
    assert feed.packets == 8
    assert feed.ledger is not None
    assert feed.ledger.closes


def test_timeouts_run_by_the_clock_of_the_capture(tmp_path):
    talk = [(START + s * SECOND // 2, udp("10.0.0.1", "10.0.0.2", 1)) for s in range(400)]
    once = [(START + 10, udp("10.0.0.3", "10.0.0.2", 1)), (START + 150 * SECOND, udp("10.0.0.3", "10.0.0.2", 1))]
    table, _ = replay(write(tmp_path, sorted(talk + once)))
    rows = table.to_pylist()
    assert [r["end_reason"] for r in rows if r["src_ip"] == "10.0.0.3"] == [1, 1]
    pieces = [r for r in rows if r["src_ip"] == "10.0.0.1"]
    assert [r["end_reason"] for r in pieces] == [2, 2, 2, 4]
    assert all(r["end_ns"] - r["start_ns"] <= 60 * SECOND for r in pieces)
    assert packets_in(table) == 402
    assert [r["continued"] for r in pieces] == [False, True, True, True]


def test_without_timeouts_a_flow_is_one_record_however_long_it_lasts(tmp_path):
    frames = conversation("10.0.0.1", "10.0.0.2", 2000) * 3
    table, _ = replay(write(tmp_path, [(START + i * 100 * SECOND, f) for i, f in enumerate(frames)]), no_timeouts=True)
    (row,) = table.to_pylist()
    assert (row["packets_fwd"], row["packets_rev"], row["end_ns"]) == (15, 9, START + 2300 * SECOND)
    assert merge_same_flow(table).equals(table)


def test_times_that_go_backwards_lose_nothing(tmp_path):
    times = [START + s * SECOND for s in (0, 100, 3, 99, 200, 1, 0, 300, 299)]
    packets = [(t, udp("10.0.0.1", f"10.0.0.{i}", 1)) for t in times for i in (2, 3)]
    table, feed = replay(write(tmp_path, packets))
    assert packets_in(table) == len(packets)
    assert feed.ledger is not None
    assert feed.ledger.closes


@pytest.mark.parametrize("batch_records", [1, 7, 65_536])
def test_how_batches_are_cut_changes_no_record_and_the_watermark_keeps_its_promise(tmp_path, batch_records):
    packets = [(START + i * SECOND // 50, udp("10.0.0.1", f"10.0.{i % 7}.{i % 40}", 1 + i % 3)) for i in range(12_000)]
    path = write(tmp_path, packets)
    whole, _ = replay(path)
    with FlowProgram(capture_settings(FlowSettings(table_entries=4096, ring_bytes=1 << 20))) as program:
        feed = feed_capture(path, program)
        feed._batch_records = batch_records
        batches, watermark = [], 0
        for batch in feed:
            assert min(batch["start_ns"].to_pylist()) >= watermark
            watermark = feed.watermark_ns
            batches.append(batch)
    assert 0 < watermark <= feed.watermark_ns == packets[-1][0]
    rows = [tuple(r.items()) for r in pa.Table.from_batches(batches).to_pylist()]
    assert Counter(rows) == Counter(tuple(r.items()) for r in whole.to_pylist())


@pytest.mark.parametrize(("entries", "ring"), [(64, 1 << 20), (4096, 4096), (64, 4096)])
def test_small_tables_and_rings_degrade_and_account_for_every_packet(tmp_path, entries, ring):
    packets = [(START + i * 1_000_000, udp("10.0.0.1", f"10.{i % 50}.0.{i % 200}", 1 + i)) for i in range(10_000)]
    table, feed = replay(write(tmp_path, packets), FlowSettings(table_entries=entries, ring_bytes=ring))
    assert feed.ledger is not None
    assert feed.ledger.closes
    lost = sum(count.packets for count in feed.ledger.lost.values())
    assert packets_in(table) + lost == 10_000
    assert lost == 0, "the feed never lets the ring overflow"
    assert len(table) == 10_000


def test_a_cut_capture_gives_everything_before_the_cut_and_the_ledger_and_then_its_error(tmp_path):
    packets = [(START + i, udp("10.0.0.1", "10.0.0.2", 1 + i)) for i in range(100)]
    with FlowProgram(capture_settings(FlowSettings(table_entries=4096, ring_bytes=1 << 20))) as program:
        feed = feed_capture(write(tmp_path, packets, cut=5), program)
        batches: list[pa.RecordBatch] = []
        with pytest.raises(CaptureError, match="after 99 whole packets"):
            batches.extend(feed)
    assert sum(map(packets_in, batches)) == 99
    assert feed.ledger is not None
    assert (feed.ledger.seen.packets, feed.ledger.closes) == (99, True)


def test_the_ledger_is_written_under_the_names_of_the_specification(tmp_path):
    packets = [
        (START, udp("10.0.0.1", "10.0.0.2", 1)),
        (START + 1, b"\xff" * 12 + b"\x08\x06" + b"\0" * 46),
        (START + 2, tcp("10.0.0.1", "10.0.0.2", 1, 2, "S")[:40]),
        (START + 3, b"\0" * 12 + b"\x08\x00\x65" + b"\0" * 40),
        (START + 4, b"\0" * 9),
    ]
    _, feed = replay(write(tmp_path, packets))
    assert feed.ledger is not None
    out = json.loads(feed.ledger.to_json())
    want = {"packets": 5, "accounted_packets": 1, "accounted_bytes": 43, "non_ip": 1, "malformed": 1, "truncated": 2}
    assert {name: out[name] for name in want} == want
    assert (out["fragment_nonfirst"], out["balance"], out["records_balance"], out["lost_packets"]) == (0, 0, 0, 0)
    assert out["unaccounted_bytes"]["truncated"] == 49


def test_what_is_no_capture_or_no_capture_program_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "text").write_text("not a capture, and longer than a header")
    with FlowProgram(capture_settings(FlowSettings(table_entries=64, ring_bytes=4096))) as program:
        with pytest.raises(CaptureError, match="is not a pcap"):
            feed_capture(tmp_path / "text", program)
        assert program.counters()["seen_packets"] == 0
    with pytest.raises(ConfigurationError, match="needs a program with its own clock"):
        feed_capture(write(tmp_path, []), FlowProgram(FlowSettings()))


def test_an_empty_capture_gives_no_batch_and_a_ledger_of_zeros(tmp_path):
    table, feed = replay(write(tmp_path, []))
    assert len(table) == 0
    assert feed.ledger is not None
    assert (feed.ledger.seen.packets, feed.ledger.closes) == (0, True)


ORACLE = (
    ("ip_version", "ip_version"), ("proto", "proto"), ("src", "src_ip"), ("dst", "dst_ip"), ("sport", "src_port"),
    ("dport", "dst_port"), ("packets_fwd", "packets_fwd"), ("packets_rev", "packets_rev"), ("bytes_fwd", "bytes_fwd"),
    ("bytes_rev", "bytes_rev"), ("first_ns", "start_ns"), ("last_ns", "end_ns"), ("tcp_flags_fwd", "tcp_flags_fwd"),
    ("tcp_flags_rev", "tcp_flags_rev"), ("vlan", "vlan"),
)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["ndpi__fuzz-2006-06-26-2594", "suri__frag-12", "suri__defrag-af-confusion-spray-h8", "ndpi__badpackets"]
)
def test_flows_and_ledger_of_real_captures_are_those_of_the_oracle(shared, name):
    path = shared / "pcaps" / f"{name}.pcap"
    table, feed = replay(path, FlowSettings(), no_timeouts=True)
    assert feed.ledger is not None
    out, want = json.loads(feed.ledger.to_json()), json.loads(path.with_suffix(".summary.json").read_text())
    for key in ("packets", "accounted_packets", "accounted_bytes", "non_ip", "malformed", "truncated"):
        assert out[key] == want[key], key
    assert out["fragment_nonfirst"] == want["fragment_nonfirst"]
    columns = [map(str, table[ours].to_pylist()) for _, ours in ORACLE]
    with path.with_suffix(".flows.csv").open() as file:
        rows = Counter(tuple(row[theirs] for theirs, _ in ORACLE) for row in csv.DictReader(file))
    assert Counter(zip(*columns, strict=True)) == rows
