"""Flow records: their layout in the ring, their columns in Arrow, and the way from one to the other.

`RECORD_DTYPE` mirrors `struct flow_record` of bpf/flow.h, `FLOW_SCHEMA` is version 1 of the columns that everything
downstream reads. A batch of n records becomes columns without a Python loop over records: one gather a column, and only
the distinct addresses of a batch are formatted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flowsage.collector.addresses import encode_addresses

SCHEMA_VERSION = 1

DIRECTION_DTYPE = np.dtype(
    [
        ("packets", "<u8"),
        ("bytes", "<u8"),
        ("length_sumsq", "<u8"),
        ("iat_sum_ns", "<u8"),
        ("iat_sumsq_us2", "<u8"),
        ("last_ns", "<u8"),
        ("length_min", "<u4"),
        ("length_max", "<u4"),
        ("tcp_flags", "u1"),
        ("ttl_min", "u1"),
        ("ttl_max", "u1"),
        ("pad", "u1"),
        ("fragments", "<u4"),
    ]
)
"""`struct flow_direction`: 64 bytes."""

RECORD_DTYPE = np.dtype(
    [
        ("initiator", "u1", (16,)),
        ("responder", "u1", (16,)),
        ("initiator_port", "<u2"),
        ("responder_port", "<u2"),
        ("proto", "u1"),
        ("ip_version", "u1"),
        ("end_reason", "u1"),
        ("flags", "u1"),
        ("start_ns", "<u8"),
        ("end_ns", "<u8"),
        ("handshake_ns", "<u8"),
        ("ifindex", "<u4"),
        ("vlan", "<u2"),
        ("icmp_type", "u1"),
        ("icmp_code", "u1"),
        ("icmp_valid", "u1"),
        ("pad", "u1", (7,)),
        ("direction", DIRECTION_DTYPE, (2,)),
        ("sequence", "<u8"),
        ("reserved", "u1", (32,)),
    ]
)
"""`struct flow_record`: 248 bytes; addresses are 16 bytes as on the wire (IPv4 as ::ffff:a.b.c.d)."""

VLAN_CHANGED, CONTINUED = 1 << 0, 1 << 1
"""Bits of `flags` (enum flow_flags)."""

END_REASONS = {
    1: "idle timeout",
    2: "active timeout",
    3: "end of flow",
    4: "forced end",
    5: "lack of resources",
}
"""flowEndReason, IANA information element 136."""

_NAMES = pa.dictionary(pa.int32(), pa.string())
_BOTH_WAYS: tuple[tuple[str, pa.DataType], ...] = (
    ("length_min", pa.uint32()),
    ("length_max", pa.uint32()),
    ("length_sumsq", pa.uint64()),
    ("iat_sum_ns", pa.uint64()),
    ("iat_sumsq_us2", pa.uint64()),
    ("ttl_min", pa.uint8()),
    ("ttl_max", pa.uint8()),
    ("fragments", pa.uint32()),
)

FLOW_SCHEMA = pa.schema(
    [
        pa.field("start_ns", pa.int64(), nullable=False),
        pa.field("end_ns", pa.int64(), nullable=False),
        pa.field("src_ip", _NAMES, nullable=False),
        pa.field("dst_ip", _NAMES, nullable=False),
        pa.field("src_port", pa.int32(), nullable=False),
        pa.field("dst_port", pa.int32(), nullable=False),
        pa.field("proto", pa.int32(), nullable=False),
        pa.field("packets_fwd", pa.int64(), nullable=False),
        pa.field("packets_rev", pa.int64(), nullable=False),
        pa.field("bytes_fwd", pa.int64(), nullable=False),
        pa.field("bytes_rev", pa.int64(), nullable=False),
        pa.field("sensor", _NAMES, nullable=False),
        pa.field("ip_version", pa.uint8(), nullable=False),
        pa.field("tcp_flags_fwd", pa.uint8(), nullable=False),
        pa.field("tcp_flags_rev", pa.uint8(), nullable=False),
        pa.field("vlan", pa.uint16(), nullable=False),
        pa.field("vlan_changed", pa.bool_(), nullable=False),
        pa.field("icmp_type", pa.int16(), nullable=False),
        pa.field("icmp_code", pa.int16(), nullable=False),
        pa.field("end_reason", pa.uint8(), nullable=False),
        pa.field("continued", pa.bool_(), nullable=False),
        pa.field("ifindex", pa.uint32(), nullable=False),
        pa.field("handshake_ns", pa.int64(), nullable=True),
        *(pa.field(f"{name}_{way}", kind, nullable=False) for name, kind in _BOTH_WAYS for way in ("fwd", "rev")),
    ],
    metadata={"flowsage.schema": str(SCHEMA_VERSION)},
)
"""Columns of flow records, version 1. Times are Unix ns; `_fwd` is initiator to responder; bytes are frame lengths;
icmp_type and icmp_code are −1 where they do not apply; handshake_ns is null unless SYN and SYN-ACK were both seen."""


def fixed(values: npt.NDArray[Any], kind: pa.DataType, valid: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """`values` [n], contiguous, of the width of `kind`, as an Arrow array over the same memory; null where not `valid`.

    What `pa.array` does, but that imports pandas where it is installed: 0.3 s and 50 MB that a sensor has no use for.
    """
    data = np.packbits(values, bitorder="little") if pa.types.is_boolean(kind) else values
    assert data.flags.c_contiguous, "a column is copied out of the records first"
    bitmap = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [bitmap, pa.py_buffer(data)])


def to_batch(records: npt.NDArray[Any], *, clock_offset_ns: int, sensor: str) -> pa.RecordBatch:
    """n records (`RECORD_DTYPE`) as a record batch of `FLOW_SCHEMA`, in the same order.

    `clock_offset_ns` is added to every time: Unix time minus the program's clock (0 for a capture's own clock).
    """
    n = len(records)
    offset = np.int64(clock_offset_ns)
    name = sensor.encode()
    flags = records["flags"]
    icmp = records["icmp_valid"] != 0
    ends = np.empty((2 * n, 16), np.uint8)
    ends[:n] = records["initiator"]
    ends[n:] = records["responder"]
    version = np.ascontiguousarray(records["ip_version"])
    both = encode_addresses(ends, np.concatenate([version, version]))
    handshake = records["handshake_ns"].astype(np.int64)
    ways = records["direction"][:, 0], records["direction"][:, 1]
    columns: list[Any] = [
        records["start_ns"].astype(np.int64) + offset,
        records["end_ns"].astype(np.int64) + offset,
        both[:n],
        both[n:],
        records["initiator_port"].astype(np.int32),
        records["responder_port"].astype(np.int32),
        records["proto"].astype(np.int32),
        *(way["packets"].astype(np.int64) for way in ways),
        *(way["bytes"].astype(np.int64) for way in ways),
        pa.DictionaryArray.from_arrays(
            fixed(np.zeros(n, np.int32), pa.int32()),
            pa.Array.from_buffers(
                pa.string(), 1, [None, pa.py_buffer(np.array([0, len(name)], np.int32)), pa.py_buffer(name)]
            ),
        ),
        version,
        *(np.ascontiguousarray(way["tcp_flags"]) for way in ways),
        np.ascontiguousarray(records["vlan"]),
        (flags & VLAN_CHANGED) != 0,
        np.where(icmp, records["icmp_type"].astype(np.int16), np.int16(-1)),
        np.where(icmp, records["icmp_code"].astype(np.int16), np.int16(-1)),
        np.ascontiguousarray(records["end_reason"]),
        (flags & CONTINUED) != 0,
        np.ascontiguousarray(records["ifindex"]),
        fixed(handshake, pa.int64(), handshake != 0),
        *(np.ascontiguousarray(way[name]) for name, _ in _BOTH_WAYS for way in ways),
    ]
    arrays = [
        column if isinstance(column, pa.Array) else fixed(column, field.type)
        for column, field in zip(columns, FLOW_SCHEMA, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=FLOW_SCHEMA)


def _reduce(table: pa.Table, name: str, group: npt.NDArray[np.int64], first: npt.NDArray[np.int64]) -> Any:
    """Column `name` of the groups [g]: rows are sorted by group, `first` [g] is where each begins."""
    import pyarrow.compute as pc

    column = table.column(name)
    kind = column.type
    stem = name.removesuffix("_fwd").removesuffix("_rev")
    if stem in ("packets", "bytes", "length_sumsq", "iat_sum_ns", "iat_sumsq_us2", "fragments"):
        return pa.array(np.add.reduceat(column.to_numpy(), first), kind)
    if stem in ("tcp_flags", "vlan_changed"):
        return pa.array(np.bitwise_or.reduceat(column.to_numpy(), first), kind)
    if stem in ("length_min", "ttl_min"):
        # A direction without packets has no smallest packet: it must not win against one that has.
        packets = table.column("packets" + name[-4:]).to_numpy()
        values = column.to_numpy()
        highest = np.iinfo(values.dtype).max
        lowest = np.minimum.reduceat(np.where(packets > 0, values, highest), first)
        return pa.array(np.where(np.add.reduceat(packets, first) > 0, lowest, values[first]), kind)
    if stem in ("length_max", "ttl_max", "end_ns"):
        return pa.array(np.maximum.reduceat(column.to_numpy(), first), kind)
    if stem == "handshake_ns":
        known = np.where(pc.is_valid(column).to_numpy(), pc.fill_null(column, 0).to_numpy(), np.iinfo(np.int64).max)
        least = np.minimum.reduceat(known, first)
        return pa.array(least, kind, mask=least == np.iinfo(np.int64).max)
    last = np.append(first[1:], len(group)) - 1
    return column.take(pa.array(last if stem == "end_reason" else first)).combine_chunks()


_MIRRORED = [(name, name[:-3] + "rev") for name in FLOW_SCHEMA.names if name.endswith("_fwd")]


def merge_same_flow(table: pa.Table) -> pa.Table:
    """One row a flow (IP version, protocol, unordered pair of address and port), in order of first packet.

    Counts and sums are added, flags or-ed, extremes kept; the initiator, VLAN, interface and ICMP type are those of the
    earliest record, the end reason that of the latest. A table in which every flow has one record comes back as it was.
    """
    import pyarrow.compute as pc

    n = len(table)
    table = table.unify_dictionaries().combine_chunks()
    if not n:
        return table
    both = pa.chunked_array([*table.column("src_ip").chunks, *table.column("dst_ip").chunks]).unify_dictionaries()
    host = np.concatenate([chunk.indices.to_numpy() for chunk in both.chunks]).astype(np.uint64)
    port = np.concatenate([table.column(c).to_numpy() for c in ("src_port", "dst_port")]).astype(np.uint64)
    end = (host << np.uint64(16)) | port
    low, high = np.minimum(end[:n], end[n:]), np.maximum(end[:n], end[n:])
    kind = (table.column("proto").to_numpy().astype(np.uint64) << np.uint64(8)) | table.column("ip_version").to_numpy()
    key = np.column_stack([low, high, kind])
    words = pa.Array.from_buffers(pa.binary(24), n, [None, pa.py_buffer(np.ascontiguousarray(key))])
    group = words.dictionary_encode().indices.to_numpy().astype(np.int64)
    if group[-1] == n - 1 and np.array_equal(group, np.arange(n)):
        return table
    order = np.lexsort((table.column("start_ns").to_numpy(), group))
    table, group = table.take(pa.array(order)), group[order]
    first = np.flatnonzero(np.diff(group, prepend=-1))
    swapped = end[:n][order] != np.repeat(end[:n][order][first], np.diff(np.append(first, n)))
    for fwd, rev in _MIRRORED:
        a, b = table.column(fwd), table.column(rev)
        for name, yes, no in ((fwd, b, a), (rev, a, b)):
            field = table.schema.field(name)
            values = pc.if_else(pa.array(swapped), yes, no)
            table = table.set_column(table.schema.get_field_index(name), field, values)
    merged = pa.table([_reduce(table, name, group, first) for name in table.column_names], schema=table.schema)
    return merged.take(pa.array(np.argsort(merged.column("start_ns").to_numpy(), kind="stable")))


def packets_in(batch: pa.RecordBatch | pa.Table) -> int:
    """Packets that the records of `batch` account for, both ways."""
    return sum(int(np.sum(batch.column(name).to_numpy(), dtype=np.int64)) for name in ("packets_fwd", "packets_rev"))
