"""Flow tables of many kinds as one form in memory."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowsage.collector.errors import SchemaError
from flowsage.graph.flows import (
    UNKNOWN,
    FlowBatch,
    FlowDetail,
    from_table,
    hash_names,
    merge,
)
from flowsage.graph.services import service_code, service_name
from tests.graph.generate import handmade

MINIMAL = {"src_ip": ["a", "b"], "dst_ip": ["b", "c"], "start_ns": [5, 6]}


HASHES = [
    0x3E36DE4C54FF0458,
    0x877E2011D918DD23,
    0x8B6EC13C34D55B8C,
    0xA84D5BF699F7F383,
    0x79EDB6A652CBB7C1,
]
"""Pinned: snapshots of what was learnt are keyed by them."""


def one(**columns: Any) -> FlowBatch:
    return handmade([{"src": "a", "dst": "b", "start_ns": 0, **columns}])


def test_three_columns_are_enough_and_everything_else_is_unknown() -> None:
    flows = from_table(pa.table(MINIMAL))
    assert flows.hosts.names.to_pylist() == ["a", "b", "c"]
    assert (flows.src.tolist(), flows.dst.tolist()) == ([0, 1], [1, 2])
    assert flows.end_ns.tolist() == [5, 6]
    for name in ("src_port", "dst_port", "proto", "packets_fwd", "packets_rev", "bytes_fwd", "bytes_rev"):
        assert getattr(flows, name).tolist() == [UNKNOWN, UNKNOWN], name
    assert flows.answered.all()
    assert not flows.failed.any()
    assert not flows.told.any()
    assert flows.detail is None
    assert flows.row.tolist() == [0, 1]
    assert from_table(pa.table(MINIMAL), first_row=7).row.tolist() == [7, 8]


def test_columns_are_writable_and_contiguous_so_that_kernels_are_compiled_once() -> None:
    columns = {name: pa.array([1, 2], pa.int64()) for name in ("end_ns", "proto", "packets_fwd", "handshake_ns")}
    flows = from_table(pa.table({**MINIMAL, **columns, "state": ["S0", None]}))
    assert flows.detail is not None
    for part in (flows, flows.detail):
        for f in fields(part):
            array = getattr(part, f.name)
            if isinstance(array, np.ndarray):
                assert array.flags.writeable, f.name
                assert array.flags.c_contiguous, f.name


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"src_ip": ["a"], "dst_ip": ["b"]}, "no column 'start_ns'"),
        ({"src_ip": ["a"], "start_ns": [1]}, "no column 'dst_ip'"),
        ({"src_ip": [1], "dst_ip": ["b"], "start_ns": [1]}, "'src_ip' is int64, expected strings"),
        ({"src_ip": ["a", None], "dst_ip": ["b", "c"], "start_ns": [1, 2]}, "'src_ip' has 1 empty values"),
        ({"src_ip": ["a"], "dst_ip": ["b"], "start_ns": [None]}, "empty values; every flow needs its start"),
        ({"src_ip": ["a"], "dst_ip": ["b"], "start_ns": ["now"]}, "'start_ns' is string, expected integers"),
        ({**MINIMAL, "bytes_fwd": ["1", "2"]}, "'bytes_fwd' is string, expected integers"),
        ({**MINIMAL, "start_ns": pa.array([0, 1 << 62], pa.timestamp("us"))}, "beyond what nanoseconds"),
        ({**MINIMAL, "start_ns": [0, (1 << 63) - 1]}, "nanoseconds since 1970"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        from_table(pa.table(columns))


def test_numbers_out_of_range_missing_or_not_finite_are_unknown() -> None:
    table = pa.table(
        {
            "src_ip": ["a"] * 5,
            "dst_ip": ["b"] * 5,
            "start_ns": pa.array([1] * 5, pa.timestamp("us")),
            "dst_port": [80.0, float("nan"), float("inf"), -7.0, 70_000.0],
            "proto": pa.array([6, None, 256, 17, 0], pa.int32()),
            "bytes_fwd": pa.array([1, 2**63, 2**63 - 1, None, 0], pa.uint64()),
        }
    )
    flows = from_table(table)
    assert flows.start_ns.tolist() == [1_000] * 5
    assert flows.dst_port.tolist() == [80, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN]
    assert flows.proto.tolist() == [6, UNKNOWN, UNKNOWN, 17, 0]
    assert flows.bytes_fwd.tolist() == [1, UNKNOWN, 2**63 - 1, UNKNOWN, 0]


@pytest.mark.parametrize(
    ("columns", "failed", "half_open", "answered"),
    [
        ({"state": "S0", "packets_rev": 0}, True, True, False),
        ({"state": "SH", "packets_rev": 0}, True, True, False),
        ({"state": "REJ", "packets_rev": 1}, True, False, False),
        ({"state": "RSTOS0", "packets_rev": 0}, True, False, False),
        ({"state": "SF", "packets_rev": 3}, False, False, True),
        ({"proto": 6, "tcp_flags_fwd": 0x02, "tcp_flags_rev": 0x00, "packets_rev": 0}, True, True, False),
        ({"proto": 6, "tcp_flags_fwd": 0x02, "tcp_flags_rev": 0x14, "packets_rev": 1}, True, False, False),
        ({"proto": 6, "tcp_flags_fwd": 0x1B, "tcp_flags_rev": 0x1B, "packets_rev": 9}, False, False, True),
        ({"proto": 6, "tcp_flags_fwd": 0x10, "tcp_flags_rev": 0x10, "packets_rev": 9}, False, False, True),
        ({"proto": 17, "tcp_flags_fwd": 0, "tcp_flags_rev": 0, "packets_rev": 0}, False, False, False),
        ({"state": "SF", "proto": 6, "tcp_flags_fwd": 2, "tcp_flags_rev": 0, "packets_rev": 2}, False, False, True),
    ],
)
def test_what_became_of_a_connection(columns: dict[str, Any], failed: bool, half_open: bool, answered: bool) -> None:
    flows = one(**columns)
    assert flows.detail is not None
    assert (flows.failed[0], flows.detail.half_open[0], flows.answered[0]) == (failed, half_open, answered)
    assert flows.told[0]


@pytest.mark.parametrize(
    ("columns", "continued"),
    [
        ({"proto": 6, "tcp_flags_fwd": 0x18, "tcp_flags_rev": 0x10}, True),
        ({"proto": 6, "tcp_flags_fwd": 0x1A, "tcp_flags_rev": 0x1A}, False),
        ({"proto": 6, "tcp_flags_fwd": 0x10, "tcp_flags_rev": 0x12}, False),
        ({"proto": 17, "tcp_flags_fwd": 0, "tcp_flags_rev": 0}, False),
        ({"proto": 6, "state": "SF"}, False),
    ],
)
def test_a_record_without_its_opening_goes_on_with_a_connection(columns: dict[str, Any], continued: bool) -> None:
    detail = one(**columns).detail
    assert detail is not None
    assert detail.continued[0] == continued


def test_a_reply_is_told_by_packets_else_by_bytes() -> None:
    assert not one(packets_rev=0, bytes_rev=5).answered[0]
    assert not one(bytes_rev=0).answered[0]
    assert one(bytes_rev=5).answered[0]
    table = pa.table({"src_ip": ["a"], "dst_ip": ["b"], "start_ns": [0], "packets_fwd": [0], "packets_rev": [4]})
    assert from_table(table).answered[0]
    assert not from_table(table, undirected=True).answered[0]


def test_a_service_is_the_port_that_was_offered() -> None:
    def code(proto: int, src: int, dst: int) -> str:
        arrays = (np.array([x], np.int32) for x in (proto, src, dst))
        return service_name(int(service_code(*arrays)[0]))

    assert code(6, 50_000, 445) == "tcp/445"
    assert code(17, 53, 40_000) == "udp/53 (reversed)"
    assert code(6, 40_000, 50_000) == "tcp/ephemeral"
    assert code(6, UNKNOWN, 50_000) == "tcp/50000"
    assert code(1, 0, 0) == "icmp"
    assert code(UNKNOWN, UNKNOWN, UNKNOWN) == "any"
    assert code(47, UNKNOWN, UNKNOWN) == "proto-47"


def test_a_host_has_the_same_hash_in_every_process_and_slice() -> None:
    names = pa.array(["10.0.0.1", "", "ab", "fe80::1", "a longer name than eight bytes"])
    assert hash_names(names).tolist() == HASHES
    assert hash_names(names[2:4]).tolist() == HASHES[2:4]
    assert hash_names(names.cast(pa.large_string())).tolist() == HASHES
    assert len(set(hash_names(pa.array([f"10.{i >> 8}.{i & 255}.1" for i in range(60_000)])).tolist())) == 60_000


def test_a_table_in_pieces_is_the_table(shared: Path) -> None:
    table = pq.read_table(shared / "data" / "ctu_sme11.parquet").slice(0, 5_000)
    whole = from_table(table)
    pieces = [from_table(table.slice(at, 37), first_row=at) for at in range(0, 5_000, 37)]
    together = merge(pieces)
    for f in fields(FlowBatch):
        a, b = getattr(whole, f.name), getattr(together, f.name)
        if isinstance(a, np.ndarray) and f.name not in ("src", "dst"):
            assert np.array_equal(a, b), f.name
    assert whole.detail is not None
    assert together.detail is not None
    for f in fields(FlowDetail):
        assert np.array_equal(getattr(whole.detail, f.name), getattr(together.detail, f.name))
    for side in ("src", "dst"):
        a, b = getattr(whole, side), getattr(together, side)
        assert np.array_equal(whole.hosts.hash[a], together.hosts.hash[b])
        assert together.hosts.names.take(pa.array(b)).to_pylist() == table[f"{side}_ip"].to_pylist()
