"""A time range of the flows' topic as a flow file: what training from Kafka reads, however often it is interrupted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flowsage.collector.errors import InputError, LogError
from flowsage.collector.sink import Origin
from flowsage.pipelines.log import Log
from flowsage.pipelines.site import read_columns

ROWS = 1 << 17
"""Rows of a row group, about."""

PATIENCE_S = 30.0
"""The log may be silent for so long before the end is reached."""


@dataclass
class Copied:
    """What was found in the topic: flows written, and batches left out for being repeats or unreadable."""

    flows: int = 0
    batches: int = 0
    repeats: int = 0
    unreadable: int = 0


def copy_range(
    log: Log, topic: str, target: Path, begin_ns: int, end_ns: int, *, partition: int | None = None
) -> Copied:
    """Write the flows of `topic` that start in [begin_ns, end_ns) to the Parquet file `target`, whole or not at all.

    It reads what was published since begin_ns and is there by now; a flow is published after it has begun. partition:
    that one alone (a network of its own, where there are several). Raises InputError where no flow is found, LogError
    where the log cannot be read to its end.
    """
    consumer = log.consumer(None, topic)
    part = target.with_name(target.name + ".part")
    copied, writer, held, seen = Copied(), None, list[pa.Table](), set[tuple[str, str, int]]()
    try:
        ends = log.end_offsets(topic)
        if partition is not None and partition not in ends:
            raise InputError(f"{topic} has no partition {partition}; it has {', '.join(map(str, sorted(ends)))}")
        at = log.offsets_at(topic, begin_ns)
        consumer.seek({n: at[n] if partition in (None, n) else ends[n] for n in ends})
        silent = 0.0
        while any(consumer.position().get(n, at[n]) < end for n, end in ends.items() if partition in (None, n)):
            records = consumer.poll(timeout_s=1.0)
            silent = 0.0 if records else silent + 1.0
            if silent > PATIENCE_S:
                raise LogError(f"{topic} cannot be read to its end: nothing came for {PATIENCE_S:g} s; try again")
            for record in records:
                if partition not in (None, record.partition) or record.offset >= ends[record.partition]:
                    continue
                try:
                    table = read_columns(record.value or b"")
                    origin = Origin.of(table)
                except (pa.ArrowException, OSError, KeyError, ValueError):
                    copied.unreadable += 1
                    continue
                key = origin.sensor, origin.boot, origin.sequence
                if key in seen:
                    copied.repeats += 1
                    continue
                seen.add(key)
                copied.batches += 1
                start = table.column("start_ns").to_numpy()
                table = table.filter(pa.array((start >= begin_ns) & (start < end_ns))).replace_schema_metadata(None)
                copied.flows += len(table)
                if len(table):
                    held.append(table)
            if held and sum(map(len, held)) >= ROWS:
                writer = _write(writer, part, held)
        if held:
            writer = _write(writer, part, held)
    finally:
        consumer.close()
        if writer is not None:
            writer.close()
    if not copied.flows:
        times = (np.datetime64(ns, "ns").astype("datetime64[s]") for ns in (begin_ns, end_ns))
        raise InputError(f"{topic} has no flows from {' to '.join(map(str, times))} UTC; name another range")
    part.replace(target)
    return copied


def _write(writer: pq.ParquetWriter | None, path: Path, held: list[pa.Table]) -> pq.ParquetWriter:
    table = pa.concat_tables(held, promote_options="default")
    held.clear()
    if writer is None:
        writer = pq.ParquetWriter(path, table.schema, compression="zstd")
    writer.write_table(table.cast(writer.schema))
    return writer
