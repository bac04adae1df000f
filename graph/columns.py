"""Columns of Arrow tables as NumPy arrays that kernels take: writable, contiguous, the unknown as `UNKNOWN`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flowsage.collector.errors import SchemaError

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

UNKNOWN = -1
"""Value of a count, port or protocol that the source of the flows does not know."""


def names(table: pa.Table, column: str) -> pa.ChunkedArray:
    """A column of host names, dictionary encoded. Raises SchemaError where it is missing, not text, or has nulls."""
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


def numbers(table: pa.Table, column: str, *, low: int | None = 0, high: int | None = None) -> Int64:
    """A column as integers [n], writable and contiguous (a kernel is compiled once); unknown where out of range."""
    if column not in table.column_names or pa.types.is_null(table.column(column).type):
        return np.full(len(table), UNKNOWN, np.int64)
    values = table.column(column)
    if pa.types.is_timestamp(values.type):
        try:
            values = values.cast(pa.timestamp("ns")).cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise SchemaError(f"column {column!r} has times beyond what nanoseconds since 1970 can tell") from error
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_finite(values), values, None).cast(pa.float64())
        values = pc.if_else(pc.less(pc.abs(values), 2.0**63), values, None).cast(pa.int64(), safe=False)
    elif pa.types.is_uint64(values.type):
        values = pc.if_else(pc.less(values, pa.scalar(2**63, pa.uint64())), values, None)
    elif not pa.types.is_integer(values.type):
        raise SchemaError(f"column {column!r} is {values.type}, expected integers")
    if values.null_count:
        values = pc.fill_null(values.cast(pa.int64()), UNKNOWN)
    numbers: Int64 = np.require(values.to_numpy().astype(np.int64, copy=False), requirements=("C", "W"))
    if len(numbers) and low is not None and numbers.min() < low:
        numbers[numbers < low] = UNKNOWN
    if len(numbers) and high is not None and numbers.max() > high:
        numbers[numbers > high] = UNKNOWN
    return numbers


def bools(values: pa.ChunkedArray) -> Bool:
    """Truth values of an Arrow array without nulls, writable and contiguous."""
    return np.require(values.to_numpy().astype(np.bool_), requirements=("C", "W"))


def text(values: pa.Array) -> tuple[npt.NDArray[np.uint8], Int64]:
    """Bytes and offsets [n + 1] of an array of strings, read-only wherever they come from: one type for kernels."""
    if not len(values):
        return _read_only(np.empty(0, np.uint8)), _read_only(np.zeros(1, np.int64))
    values = values.cast(pa.large_string())
    _, offsets, data = values.buffers()
    start = np.frombuffer(offsets, np.int64, len(values) + 1, values.offset * 8)
    return _read_only(np.frombuffer(data or b"", np.uint8)), _read_only(start)


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.flags.writeable = False
    return array
