"""Flows in memory: the one form in which graph and models see them.

Hosts are names of any kind (addresses, MAC addresses, labels). Within a batch they are indices into a `HostTable`;
across batches they are 64-bit hashes of their names, which need no dictionary that grows for ever, mean the same in
every process and after every restart, and collide among ten million keys with probability 3e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flowsage.collector.errors import SchemaError
from flowsage.graph import columns, memory
from flowsage.graph.columns import UNKNOWN, Bool, Int64
from flowsage.graph.services import TCP, service_code

__all__ = [
    "ACK", "FAILED_STATES", "FIN", "HALF_OPEN_STATES", "LATEST_NS", "RST", "SYN", "UNKNOWN",
    "Bool", "FlowBatch", "FlowDetail", "HostTable", "Int32", "Int64", "UInt64", "from_table", "hash_names", "merge",
]  # fmt: skip

Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]

FAILED_STATES = ("S0", "REJ", "RSTOS0", "RSTRH", "SH")
"""Zeek conn_state values of a connection that was never established."""

HALF_OPEN_STATES = ("S0", "SH")
"""Those of them in which the responder never said anything."""

LATEST_NS = 1 << 62
"""Times beyond this, either way, are not times: windows could not be counted in 64 bits."""

_LARGE = 1 << 15
"""Flows from which memory is taken from what was used before."""

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10


@dataclass(frozen=True)
class HostTable:
    """The hosts of a batch. `names` [h] strings, `hash` [h] uint64, stable across processes."""

    names: pa.Array
    hash: UInt64

    def __len__(self) -> int:
        return len(self.hash)


@dataclass(frozen=True)
class FlowDetail:
    """What only some sources know of a flow, as columns [n]; `UNKNOWN` where it is not known."""

    half_open: Bool
    """A TCP opening that nothing answered: SYN without SYN-ACK and without refusal."""
    handshake_ns: Int64
    """First SYN to first SYN-ACK."""
    gap_sum_ns: Int64
    """Sum of the gaps between the initiator's packets, in ns, and of their squares, in us^2."""
    gap_sumsq_us2: Int64
    length_sumsq: Int64
    """Sum of squared lengths of the initiator's packets, in bytes^2."""
    ttl: Int32
    """Largest TTL or hop limit of the initiator's packets."""
    continued: Bool
    """A TCP connection that was there before: by its flags, without its opening."""

    def take(self, index: npt.NDArray[np.intp] | slice) -> FlowDetail:
        """The rows at `index`."""
        return FlowDetail(**{name: _rows(getattr(self, name), index) for name in _DETAIL})


_DETAIL = tuple(f.name for f in fields(FlowDetail))


@dataclass(frozen=True)
class FlowBatch:
    """n flows as columns, ordered as they came.

    All arrays have length n. `UNKNOWN` (-1) marks what the source does not know.
    """

    hosts: HostTable
    start_ns: Int64
    end_ns: Int64
    """start_ns where unknown."""
    src: Int32
    """Index of the initiator in `hosts`."""
    dst: Int32
    service: Int32
    """`service_code(proto, src_port, dst_port)`."""
    src_port: Int32
    dst_port: Int32
    proto: Int32
    packets_fwd: Int64
    packets_rev: Int64
    bytes_fwd: Int64
    bytes_rev: Int64
    failed: Bool
    """Known never to have been established: a TCP handshake refused or left unanswered."""
    answered: Bool
    """Something came back (unknown counts as answered), and not failed. With `undirected`, both ways."""
    told: Bool
    """Whether anything is known about replies at all."""
    row: Int64
    """Position in the input, for those who want scores in its order."""

    detail: FlowDetail | None = None
    """None: no flow of the batch has any."""

    def __len__(self) -> int:
        return len(self.start_ns)

    def take(self, index: npt.NDArray[np.intp] | slice) -> FlowBatch:
        """The flows at `index`, with the same host table; views where `index` is a slice."""
        values = {name: _rows(getattr(self, name), index) for name in _COLUMNS}
        return FlowBatch(hosts=self.hosts, detail=self.detail and self.detail.take(index), **values)


_COLUMNS = tuple(f.name for f in fields(FlowBatch) if f.name not in ("hosts", "detail"))


def _rows(column: npt.NDArray[Any], index: npt.NDArray[np.intp] | slice) -> npt.NDArray[Any]:
    """`column` at `index`. Many rows go where memory was used before: new pages cost more than what is copied."""
    if isinstance(index, slice) or len(index) < _LARGE:
        return column[index]
    # "clip" spares a buffer; every index is in range.
    out: npt.NDArray[Any] = np.take(column, index, out=memory.empty(len(index), column.dtype), mode="clip")
    return out


def _joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """One after the other."""
    return np.concatenate(parts, out=memory.empty(sum(len(p) for p in parts), parts[0].dtype))


@numba.njit(cache=True)
def _hash_strings(data: npt.NDArray[np.uint8], offsets: Int64, out: UInt64) -> None:
    """64-bit hash of each string: multiply-xorshift over 8-byte words, finalised as in MurmurHash3."""
    for i in range(len(out)):
        h = np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(offsets[i + 1] - offsets[i])
        word = np.uint64(0)
        shift = np.uint64(0)
        for j in range(offsets[i], offsets[i + 1]):
            word |= np.uint64(data[j]) << shift
            shift += np.uint64(8)
            if shift == np.uint64(64) or j == offsets[i + 1] - 1:
                h = (h ^ word) * np.uint64(0xFF51AFD7ED558CCD)
                h ^= h >> np.uint64(32)
                word = np.uint64(0)
                shift = np.uint64(0)
        h ^= h >> np.uint64(33)
        h *= np.uint64(0xC4CEB9FE1A85EC53)
        h ^= h >> np.uint64(33)
        out[i] = h


def hash_names(names: pa.Array) -> UInt64:
    """Stable 64-bit hashes [n] of an array of strings."""
    out = np.empty(len(names), np.uint64)
    data, offsets = columns.text(names)
    _hash_strings(data, offsets, out)
    return out


_OWN_DETAIL = ("handshake_ns", "iat_sum_ns_fwd", "iat_sumsq_us2_fwd", "length_sumsq_fwd", "ttl_max_fwd")
"""Columns of our own records (collector/records.py) that `FlowDetail` reads, in its order."""


def _detail(table: pa.Table, half_open: Bool | None, continued: Bool | None) -> FlowDetail | None:
    if half_open is None and not any(c in table.column_names for c in _OWN_DETAIL):
        return None
    handshake, gap_sum, gap_sumsq, length_sumsq, ttl = (columns.numbers(table, c) for c in _OWN_DETAIL)
    return FlowDetail(
        half_open=half_open if half_open is not None else np.zeros(len(table), np.bool_),
        handshake_ns=handshake,
        gap_sum_ns=gap_sum,
        gap_sumsq_us2=gap_sumsq,
        length_sumsq=length_sumsq,
        ttl=ttl.astype(np.int32),
        continued=continued if continued is not None else np.zeros(len(table), np.bool_),
    )


def _tcp(table: pa.Table, proto: Int32) -> tuple[Bool, Bool | None, Bool | None]:
    """Failed, half open and continued [n]: from Zeek's state, else from the flags of our own records.

    By flags: a SYN never met by a SYN-ACK has failed, and is half open unless refused by RST; where there is no SYN
    either way an earlier record had it.
    """
    failed, half_open, continued = np.zeros(len(table), np.bool_), None, None
    if "tcp_flags_fwd" in table.column_names and "tcp_flags_rev" in table.column_names:
        fwd, rev = columns.numbers(table, "tcp_flags_fwd"), columns.numbers(table, "tcp_flags_rev")
        failed = (proto == TCP) & (fwd > 0) & (fwd & SYN != 0) & (rev >= 0) & (rev & SYN == 0)
        half_open = failed & (rev & RST == 0)
        continued = (proto == TCP) & (fwd > 0) & (rev >= 0) & ((fwd | rev) & SYN == 0)
    if "state" in table.column_names and not pa.types.is_null(table.column("state").type):
        state = table.column("state").cast(pa.string())
        known = columns.bools(pc.is_valid(state))
        failed = np.where(known, columns.bools(pc.is_in(state, value_set=pa.array(FAILED_STATES))), failed)
        silent = columns.bools(pc.is_in(state, value_set=pa.array(HALF_OPEN_STATES)))
        half_open = silent if half_open is None else np.where(known, silent, half_open)
    return failed, half_open, continued


def _ports(table: pa.Table, column: str, high: int) -> Int32:
    return columns.numbers(table, column, high=high).astype(np.int32)


def from_table(table: pa.Table | pa.RecordBatch, *, undirected: bool = False, first_row: int = 0) -> FlowBatch:
    """Columns of a flow file, or of record batches, as a `FlowBatch`.

    Needs start_ns, src_ip, dst_ip; everything else may be missing or null (see the module's `UNKNOWN`).
    Raises SchemaError for a needed column that is missing, null or of the wrong type.
    """
    if isinstance(table, pa.RecordBatch):
        table = pa.Table.from_batches([table])
    n = len(table)
    src, dst = columns.names(table, "src_ip"), columns.names(table, "dst_ip")
    both = pa.chunked_array([*src.chunks, *dst.chunks], type=src.type).unify_dictionaries()
    names = both.chunk(0).dictionary if both.num_chunks else pa.array([], pa.string())
    index = (
        np.concatenate([c.indices.to_numpy(zero_copy_only=False) for c in both.chunks]).astype(np.int32, copy=False)
        if n
        else np.empty(0, np.int32)
    )
    if "start_ns" not in table.column_names:
        raise SchemaError("the flows have no column 'start_ns'; a flow file needs start_ns, src_ip and dst_ip")
    if table.column("start_ns").null_count:
        raise SchemaError("column 'start_ns' has empty values; every flow needs its start")
    start, end = columns.numbers(table, "start_ns", low=None), columns.numbers(table, "end_ns")
    if n and (start.min() < -LATEST_NS or start.max() > LATEST_NS):
        raise SchemaError("column 'start_ns' has times beyond the years 1823 to 2116; it is in nanoseconds since 1970")
    # Some sources number what is not IP by its negative EtherType.
    proto = columns.numbers(table, "proto", low=-0xFFFF, high=255).astype(np.int32)
    src_port, dst_port = _ports(table, "src_port", 65_535), _ports(table, "dst_port", 65_535)
    packets_fwd, packets_rev = columns.numbers(table, "packets_fwd"), columns.numbers(table, "packets_rev")
    bytes_fwd, bytes_rev = columns.numbers(table, "bytes_fwd"), columns.numbers(table, "bytes_rev")
    failed, half_open, continued = _tcp(table, proto)
    told = (packets_rev >= 0) | (bytes_rev >= 0)
    if "state" in table.column_names:
        told |= columns.bools(pc.is_valid(table.column("state")))
    forward, reverse = (
        np.where(packets_rev >= 0, packets_fwd, bytes_fwd),
        np.where(packets_rev >= 0, packets_rev, bytes_rev),
    )
    answered = (reverse != 0) & ~failed
    if undirected:
        answered &= (forward != 0) | (reverse < 0)
    return FlowBatch(
        hosts=HostTable(names, hash_names(names)),
        start_ns=start,
        end_ns=np.where(end >= 0, end, start),
        src=index[:n],
        dst=index[n:],
        service=service_code(proto, src_port, dst_port),
        src_port=src_port,
        dst_port=dst_port,
        proto=proto,
        packets_fwd=packets_fwd,
        packets_rev=packets_rev,
        bytes_fwd=bytes_fwd,
        bytes_rev=bytes_rev,
        failed=failed,
        answered=answered,
        told=told,
        row=np.arange(first_row, first_row + n, dtype=np.int64),
        detail=_detail(table, half_open, continued),
    )


@numba.njit(cache=True, nogil=True)
def _unify(hashes: UInt64, src: Int32, dst: Int32, table: Int32, seen: Int32, first: Int32) -> int:
    """Replace host indices into `hashes` by dense ones, in order of appearance; returns how many there are.

    hashes u64[H]: those of all tables, one after the other; table i32[2^k] of -1, more than twice as many as hosts;
    seen i32[H] of -1; first i32[H] takes the position in `hashes` of each dense index.
    """
    count = 0
    mask = np.uint64(len(table) - 1)
    for i in range(len(src)):
        for side in range(2):
            old = src[i] if side == 0 else dst[i]
            new = seen[old]
            if new < 0:
                h = hashes[old]
                slot = (h ^ (h >> np.uint64(32))) & mask
                while table[slot] >= 0 and hashes[first[table[slot]]] != h:
                    slot = (slot + np.uint64(1)) & mask
                new = table[slot]
                if new < 0:
                    new = np.int32(count)
                    first[count] = old
                    table[slot] = new
                    count += 1
                seen[old] = new
            if side == 0:
                src[i] = new
            else:
                dst[i] = new
    return count


def merge(batches: Sequence[FlowBatch]) -> FlowBatch:
    """Flows of all batches, one after the other, with one table of the hosts that occur, in order of appearance.

    One batch is returned as it is. Batches that share a host table (the same object) share it here too.
    """
    batches = [b for b in batches if len(b)] or list(batches[:1])
    if not batches:
        raise ValueError("nothing to merge; give at least one batch of flows")
    if len(batches) == 1:
        return batches[0]
    values = {name: _joined([getattr(b, name) for b in batches]) for name in _COLUMNS}
    detail = None
    if any(b.detail is not None for b in batches):
        parts = [b.detail or _no_detail(len(b)) for b in batches]
        detail = FlowDetail(**{name: _joined([getattr(p, name) for p in parts]) for name in _DETAIL})
    tables = {id(b.hosts): b.hosts for b in batches}
    if len(tables) == 1:
        return FlowBatch(hosts=batches[0].hosts, detail=detail, **values)
    sizes = [len(t) for t in tables.values()]
    start = dict(zip(tables, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
    shift = np.repeat(np.array([start[id(b.hosts)] for b in batches], np.int32), [len(b) for b in batches])
    values["src"] += shift
    values["dst"] += shift
    hashes = np.concatenate([t.hash for t in tables.values()])
    most = min(len(hashes), 2 * len(shift))
    table = np.full(1 << (2 * most).bit_length(), -1, np.int32)
    seen, first = np.full(len(hashes), -1, np.int32), np.empty(len(hashes), np.int32)
    count = _unify(hashes, values["src"], values["dst"], table, seen, first)
    names = pa.concat_arrays([t.names for t in tables.values()]).take(pa.array(first[:count]))
    return FlowBatch(hosts=HostTable(names, hashes[first[:count]]), detail=detail, **values)


def _no_detail(n: int) -> FlowDetail:
    unknown, no = np.full(n, UNKNOWN, np.int64), np.zeros(n, np.bool_)
    return FlowDetail(no, unknown, unknown, unknown, unknown, np.full(n, UNKNOWN, np.int32), no)
