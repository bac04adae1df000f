"""Flows in memory: the one form in which graph and models see them.

Hosts are names of any kind (addresses, MAC addresses, labels). Within a batch they are dense indices into a `HostTable`;
across batches they are 64-bit hashes of their names, which need no dictionary that grows for ever, mean the same in
every process and after every restart, and collide among ten million keys with probability 3e-6.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flowsage.collector.errors import SchemaError

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]

UNKNOWN = -1
"""Value of a count, port or protocol that the source of the flows does not know."""

EPHEMERAL = 32_768
"""Lowest port that counts as a client's own choice (DETECTION: service)."""

FAILED_STATES = ("S0", "REJ", "RSTOS0", "RSTRH", "SH")
"""Zeek conn_state values of a connection that was never established."""

SERVICE_BITS = 20
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10


@dataclass(frozen=True)
class HostTable:
    """The hosts of a batch. `names` [h] strings, `hash` [h] uint64, stable across processes."""

    names: pa.Array
    hash: UInt64

    def __len__(self) -> int:
        return len(self.hash)


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

    def __len__(self) -> int:
        return len(self.start_ns)

    def take(self, index: npt.NDArray[np.intp] | slice) -> FlowBatch:
        """The flows at `index`, with the same host table."""
        columns = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "hosts"}
        return FlowBatch(hosts=self.hosts, **columns)


def service_code(proto: Int32, src_port: Int32, dst_port: Int32) -> Int32:
    """(protocol, port) as one number [n]: the port that was offered, as well as the flow tells.

    A port at the source side only (dst >= 32768 > src) is a reversed service, both >= 32768 are one class.
    """
    port = dst_port.astype(np.int32, copy=True)
    known = src_port >= 0
    reverse = known & (dst_port >= EPHEMERAL) & (src_port < EPHEMERAL)
    port[reverse] = src_port[reverse] + 100_000
    port[known & (dst_port >= EPHEMERAL) & (src_port >= EPHEMERAL)] = 200_000
    code: Int32 = ((proto.astype(np.int32) + 1) << SERVICE_BITS) | (port + 1)
    return code


def service_name(code: int) -> str:
    """Readable form of a `service_code`: "tcp/445", "udp/53 (reversed)", "tcp/ephemeral", "icmp"."""
    proto, port = (code >> SERVICE_BITS) - 1, (code & ((1 << SERVICE_BITS) - 1)) - 1
    name = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp", UNKNOWN: "any"}.get(proto, f"proto-{proto}")
    if port == 200_000:
        return f"{name}/ephemeral"
    if port >= 100_000:
        return f"{name}/{port - 100_000} (reversed)"
    return name if port < 0 or proto in (1, 58) else f"{name}/{port}"


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
    names = names.cast(pa.large_string())
    _, offsets, data = names.buffers()
    out = np.empty(len(names), np.uint64)
    if len(names):
        start = np.frombuffer(offsets, np.int64, len(names) + 1, names.offset * 8)
        _hash_strings(np.frombuffer(data or b"", np.uint8), start, out)
    return out


def _names(table: pa.Table, column: str) -> pa.ChunkedArray:
    if column not in table.column_names:
        raise SchemaError(f"the flows have no column {column!r}; a flow file needs start_ns, src_ip and dst_ip")
    values = table.column(column)
    value_type = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_string(value_type) or pa.types.is_large_string(value_type)):
        raise SchemaError(f"column {column!r} is {values.type}, expected strings")
    if values.null_count:
        raise SchemaError(f"column {column!r} has {values.null_count} empty values; every flow needs both hosts")
    return (
        values.cast(pa.dictionary(pa.int32(), pa.string()))
        if pa.types.is_dictionary(values.type)
        else (values.cast(pa.string()).dictionary_encode())
    )


def _numbers(table: pa.Table, column: str, dtype: type[np.generic]) -> npt.NDArray[np.int64]:
    if column not in table.column_names:
        return np.full(len(table), UNKNOWN, dtype)
    values = table.column(column)
    if pa.types.is_null(values.type):
        return np.full(len(table), UNKNOWN, dtype)
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise SchemaError(f"column {column!r} is {values.type}, expected integers")
    if values.null_count:
        values = pc.fill_null(values, UNKNOWN)
    return values.to_numpy().astype(dtype, copy=False)


def _tcp_failed(table: pa.Table, proto: Int32) -> Bool:
    """From the flags of our own records: a SYN never met by SYN-ACK, or refused."""
    fwd, rev = (_numbers(table, c, np.int32) for c in ("tcp_flags_fwd", "tcp_flags_rev"))
    opened = (proto == 6) & (fwd > 0) & (fwd & SYN != 0) & (rev >= 0)
    return np.asarray(opened & ((rev & SYN) == 0), np.bool_)


def from_table(table: pa.Table | pa.RecordBatch, *, undirected: bool = False, first_row: int = 0) -> FlowBatch:
    """Columns of a flow file, or of record batches, as a `FlowBatch`.

    Needs start_ns, src_ip, dst_ip; everything else may be missing or null (see the module's `UNKNOWN`).
    Raises SchemaError for a needed column that is missing, null or of the wrong type.
    """
    if isinstance(table, pa.RecordBatch):
        table = pa.Table.from_batches([table])
    n = len(table)
    src, dst = _names(table, "src_ip"), _names(table, "dst_ip")
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
    start = _numbers(table, "start_ns", np.int64)
    end = _numbers(table, "end_ns", np.int64)
    proto, src_port, dst_port = (_numbers(table, c, np.int32) for c in ("proto", "src_port", "dst_port"))
    packets_fwd, packets_rev = (_numbers(table, c, np.int64) for c in ("packets_fwd", "packets_rev"))
    bytes_fwd, bytes_rev = (_numbers(table, c, np.int64) for c in ("bytes_fwd", "bytes_rev"))
    failed = _tcp_failed(table, proto)
    told = (packets_rev >= 0) | (bytes_rev >= 0)
    if "state" in table.column_names and not pa.types.is_null(table.column("state").type):
        state = table.column("state").cast(pa.string())
        known = pc.is_valid(state).to_numpy().astype(np.bool_)
        refused = pc.is_in(state, value_set=pa.array(FAILED_STATES)).to_numpy().astype(np.bool_)
        failed = np.where(known, refused, failed)
        told = told | known
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
    )
