"""A capture through the kernel: each packet by BPF_PROG_TEST_RUN, with the capture's own clock.

What comes out is what the sensor would have seen on the wire at that time: timeouts and sweeps run by the capture's
clock too. Times that step back are the program's to handle; sweeps follow the latest time so far.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa

from flowsage.collector.capture import Capture, PacketBatch
from flowsage.collector.errors import CaptureError, ConfigurationError
from flowsage.collector.ledger import Ledger, Snapshot
from flowsage.collector.program import FlowProgram, FlowSettings
from flowsage.collector.records import to_batch
from flowsage.collector.ring import SLOT_BYTES, Records

SECOND = 1_000_000_000
RECORDS_A_PACKET = 4
"""More records than one packet can cause."""
PACKETS_A_SWEEP = 1024
PATIENCE = 15
"""A capture with less than PACKETS_A_SWEEP packets a sweep interval is swept every PATIENCE intervals: a walk over the
table costs as much as a thousand packets."""


def capture_settings(settings: FlowSettings | None = None, *, no_timeouts: bool = False) -> FlowSettings:
    """`settings` as a capture needs them: with its own clock, and, for `no_timeouts`, one record a 5-tuple."""
    settings = replace(settings or FlowSettings(ring_bytes=64 << 20), external_clock=True)
    return settings.without_timeouts() if no_timeouts else settings


class CaptureFeed:
    """Record batches of a capture, in the order in which the program emits them; iterate once.

    path, program     the capture, and a program loaded with `capture_settings`
    sensor            goes into the records
    sweep_ns          how often, by the capture's clock, the table is searched for flows that ended
    batch_records     records that are gathered for a batch (the last one and those at a sweep may be smaller)

    While iterating: `packets` fed so far, `clock_ns` the latest time so far, `watermark_ns`: no flow that began before
    it follows, unless the capture's times step back. After it: `ledger`, the final balance. A capture that is damaged,
    or ends in the middle of a packet, gives all its records and the ledger first, and CaptureError at the end.

    Raises CaptureError at once for what is no capture, ConfigurationError for a program on the kernel's clock.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        program: FlowProgram,
        *,
        sensor: str = "capture",
        sweep_ns: int = SECOND,
        batch_records: int = 65_536,
    ) -> None:
        settings = program.settings
        if not settings.external_clock:
            raise ConfigurationError("a capture needs a program with its own clock; load it with capture_settings()")
        self._capture = Capture(path)
        self._program = program.load()
        self._feeder = program.feeder()
        self._sensor = sensor
        self._sweep_ns = sweep_ns if settings.idle_ns or settings.active_ns or settings.tcp_ends else 0
        self._batch_records = batch_records
        self._piece = max(1, settings.ring_bytes // SLOT_BYTES // RECORDS_A_PACKET)
        self._ledger = Ledger(program)
        self._waiting: list[Records] = []
        self._count = 0
        self._swept_ns = 0
        self._since_sweep = 0
        self.packets = 0
        self.clock_ns = 0
        self.watermark_ns = 0
        self.ledger: Snapshot | None = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        problem: CaptureError | None = None
        packets = iter(self._capture)
        while problem is None:
            try:
                batch = next(packets)
            except StopIteration:
                break
            except CaptureError as error:
                problem = error
                break
            yield from self._feed(batch)
        for records in self._program.flush_all():
            self._keep(records)
            if self._count >= self._batch_records:
                yield self._take()
        self.watermark_ns = max(self.watermark_ns, self.clock_ns)
        if self._count:
            yield self._take()
        self.ledger = self._ledger.snapshot()
        self._capture.close()
        if problem is not None:
            raise problem

    def _feed(self, batch: PacketBatch) -> Iterator[pa.RecordBatch]:
        """Feeds `batch` in pieces that end where a sweep is due or where the ring might fill."""
        latest = np.maximum.accumulate(np.maximum(batch.times_ns, self.clock_ns))
        if not self.packets:
            self._swept_ns = int(latest[0])
        at, n = 0, len(batch)
        while at < n:
            stop = min(at + self._piece, n)
            if self._sweep_ns:
                due = self._due(latest, at)
                if due == at:
                    yield from self._sweep(int(latest[at]))
                    due = self._due(latest, at)
                stop = min(stop, max(due, at + 1))
            piece = batch[at:stop]
            self._feeder.feed_buffer(piece.data, piece.offsets, piece.lengths, piece.times_ns)
            self.packets += stop - at
            self._since_sweep += stop - at
            self.clock_ns = int(latest[stop - 1])
            at = stop
            self._keep(self._program.ring.drain())
            if self._count >= self._batch_records:
                yield self._take()

    def _due(self, latest: np.ndarray[tuple[int], np.dtype[np.int64]], at: int) -> int:
        """Index of the first packet, from `at`, before which a sweep is due."""
        first = int(np.searchsorted(latest, self._swept_ns + self._sweep_ns))
        patient = int(np.searchsorted(latest, self._swept_ns + PATIENCE * self._sweep_ns))
        return max(at, min(patient, max(first, at + PACKETS_A_SWEEP - self._since_sweep)))

    def _sweep(self, now_ns: int) -> Iterator[pa.RecordBatch]:
        while True:
            walk = self._program.expire(now_ns)
            self._keep(self._program.ring.drain())
            if self._count >= self._batch_records:
                yield self._take()
            if not walk.failed:
                break
        self._swept_ns, self._since_sweep = now_ns, 0
        self.watermark_ns = now_ns - self._program.settings.active_ns if self._program.settings.active_ns else 0

    def _keep(self, records: Records) -> None:
        if len(records):
            self._ledger.drain(records)
            self._waiting.append(records)
            self._count += len(records)

    def _take(self) -> pa.RecordBatch:
        records = np.concatenate(self._waiting)
        self._waiting, self._count = [], 0
        self._ledger.acknowledge(len(records))
        return to_batch(records, clock_offset_ns=0, sensor=self._sensor)


def feed_capture(
    path: str | os.PathLike[str], program: FlowProgram, *, sensor: str = "capture", sweep_ns: int = SECOND
) -> CaptureFeed:
    """Feeds a capture through `program` (loaded with `capture_settings`): see `CaptureFeed`."""
    return CaptureFeed(path, program, sensor=sensor, sweep_ns=sweep_ns)
