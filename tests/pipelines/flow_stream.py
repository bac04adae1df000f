"""A small office with attacks in it as batches of one or several sensors, as they go to the flows' topic: seeded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from flowsage.collector.sink import Origin, serialise
from flowsage.pipelines.cli import LAB_DEFAULTS
from flowsage.pipelines.config import load
from flowsage.pipelines.log import Log
from flowsage.pipelines.memory_log import MemoryLog
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.topics import flows_topic
from tests.models.alarm_streams import START, S, office, port_scan, table, worm

QUIET_S = 75.0
"""Seconds until the alarms are calibrated, and the first attack comes."""
ACTIVE_S = 3.0
"""How long after its start a flow is drained, at most."""


@dataclass(frozen=True)
class Batch:
    """One record of the topic: bytes, and what is in them."""

    origin: Origin
    value: bytes
    flows: int

    @property
    def time_ns(self) -> int:
        """When it is drained."""
        return self.origin.drained_ns


def settings(graph: bool = False, **sections: dict[str, object]) -> Settings:
    """The lab's: windows of 6 s, panes of 1 s, a day in 24 minutes."""
    flags = {k: dict(v) for k, v in LAB_DEFAULTS.items() if k != "sensor"}
    flags["model"] |= {"prior": "sage2-sketches" if graph else "none"}
    for section, values in sections.items():
        flags[section] = flags.get(section, {}) | values
    return load(flags=flags)


def stream(
    seconds: float = 150.0, *, sensors: Sequence[str] = ("edge",), seed: int = 0, step_s: float = 0.5,
    begin_ns: int = START, skew_s: dict[str, float] | None = None, attacks: int = 0,
) -> list[Batch]:  # fmt: skip
    """Batches of `seconds`, in the order in which they are drained: office work, a worm and a port scan.

    Every host belongs to one of the sensors; skew_s: by how much a sensor's clock is ahead; attacks: so many more
    hosts scan, one every two seconds.
    """
    rng = np.random.default_rng(seed)
    rows = [*office(seconds, seed), *worm(QUIET_S, rng), *port_scan(QUIET_S + 30, rng)]
    for n in range(attacks):
        at = QUIET_S + 2.0 * n
        rows += [(at + p * 0.002, f"10.77.1.{n + 1}", f"10.77.2.{n + 1}", p + 1, 0, 60, 54) for p in range(200)]
    rows = sorted(row for row in rows if 0 <= row[0] < seconds)
    flows = table(rows)
    start = flows.column("start_ns").to_numpy() - START
    drained = start + rng.uniform(0, ACTIVE_S * S, len(start)).astype(np.int64)
    of = np.array([hash_of(row[1]) % len(sensors) for row in rows])
    order = np.argsort(drained, kind="stable")
    out = []
    for k in range(1, int((seconds + ACTIVE_S) / step_s) + 2):
        until = int(k * step_s * S)
        among = order[np.searchsorted(drained[order], until - int(step_s * S)) : np.searchsorted(drained[order], until)]
        for n, sensor in enumerate(sensors):
            skew = int((skew_s or {}).get(sensor, 0.0) * S)
            part = flows.take(pa.array(among[of[among] == n]))
            times = pa.array(part.column("start_ns").to_numpy() - START + begin_ns + skew)
            for name in ("start_ns", "end_ns"):
                part = part.set_column(part.column_names.index(name), name, times)
            time = begin_ns + until + skew
            origin = Origin(
                sensor=sensor, boot="b00t", sequence=k - 1, watermark_ns=time - int(ACTIVE_S * S), drained_ns=time
            )
            batch = part.combine_chunks().to_batches()[0] if len(part) else pa.RecordBatch.from_pylist([], part.schema)
            out.append(Batch(origin, serialise(batch, origin), len(part)))
    return out


def hash_of(name: str) -> int:
    """A number of a name that is the same in every process."""
    return sum(name.encode())


def again(batch: Batch, **values: object) -> Batch:
    """The same flows with another origin."""
    origin = replace(batch.origin, **values)  # type: ignore[arg-type]
    with pa.ipc.open_stream(batch.value) as reader:
        return Batch(origin, serialise(reader.read_next_batch(), origin), batch.flows)


def heartbeat(batch: Batch, **values: object) -> Batch:
    """A batch without flows that comes after another."""
    origin = replace(batch.origin, sequence=batch.origin.sequence + 1, **values)  # type: ignore[arg-type]
    with pa.ipc.open_stream(batch.value) as reader:
        return Batch(origin, serialise(reader.read_next_batch().slice(0, 0), origin), 0)


class LogClock:
    """The clock of a log in memory: a record is appended a moment after it was drained."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def publish(log: Log, batches: Sequence[Batch], clock: LogClock | None = None, prefix: str = "flowsage") -> None:
    """Append them in order."""
    for batch in batches:
        if clock is not None:
            clock.now_ns = max(clock.now_ns, batch.time_ns + 50_000_000)
        log.append(flows_topic(prefix), batch.origin.sensor.encode(), batch.value, batch.origin.headers())


def memory(partitions: int = 1) -> tuple[MemoryLog, LogClock]:
    """A log in memory and its clock."""
    clock = LogClock()
    return MemoryLog(partitions=partitions, clock_ns=clock), clock


def read_all(log: Log, topic: str) -> Iterator[tuple[bytes | None, bytes | None, dict[str, bytes]]]:
    """Key, value and headers of everything that a reader on its own finds in a topic."""
    reader = log.consumer(None, topic)
    try:
        ends = log.end_offsets(topic)
        while any(reader.position()[n] < end for n, end in ends.items()):
            for record in reader.poll(500, 1.0):
                yield record.key, record.value, dict(record.headers)
    finally:
        reader.close()
