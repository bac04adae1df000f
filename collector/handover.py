"""From the ring to the sink, once: the order of steps that a kill cannot break.

    look at what waits → write the intent → the sink takes the batch → commit → give the slots back

Killed before the sink has the batch, or before it is known that it has, the next process finds the intent and hands on
the same slots under the same number, with the same times and watermark: a sink that knows what it had last
(`Sink.last_sequence`) has it skipped, any other reader can tell a repeat by its number.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from flowsage.collector.clock import UnixClock
from flowsage.collector.journal import Books, Journal
from flowsage.collector.ledger import Ledger
from flowsage.collector.records import RECORD_DTYPE, to_batch
from flowsage.collector.ring import Records, Ring, Taken
from flowsage.collector.sink import Origin, Sink

logger = logging.getLogger(__name__)

EMPTY = np.zeros(0, RECORD_DTYPE)


class Handover:
    """Hands what waits in a ring on to `sink`, in batches of at most `batch_records`, and keeps the books of it.

    lasting    what was not handed on when the sink fails stays where it is, for the next process; otherwise it is lost,
               counted
    failed     the sink has failed: it gets nothing more
    handed_on_ns    when it last got something (the program's clock)
    """

    def __init__(
        self, sensor: str, sink: Sink, ledger: Ledger, clock: UnixClock, *, batch_records: int, lasting: bool
    ) -> None:
        self.journal = Journal()
        self.failed = False
        self.handed_on_ns = 0
        self._sensor, self._sink, self._ledger, self._clock = sensor, sink, ledger, clock
        self._batch_records, self.lasting = batch_records, lasting

    @property
    def watermark_ns(self) -> int:
        """Of the latest batch."""
        return self.journal.books.watermark_ns

    def begin(self, journal: Journal, watermark_ns: int) -> None:
        """Fresh books: no flow has begun before now."""
        self.journal = journal
        journal.write(replace(journal.books, watermark_ns=watermark_ns))

    def resume(self, journal: Journal, ring: Ring) -> None:
        """Goes on with the books of an earlier process, and finishes what it was doing."""
        self.journal = journal
        books, intent = journal.books, journal.intent
        self._ledger.settle(books)
        self._ledger.acknowledge(books.records)
        if books.offset_ns:
            self._clock.offset_ns = books.offset_ns
        if ring.position != books.position:
            ring.release(books.position)
        if intent is None:
            return
        taken = ring.peek(to=intent.position)
        last = self._sink.last_sequence(journal.boot)
        if last is not None and last >= books.sequence:
            logger.info("batch %d had arrived before the sensor was killed", books.sequence)
            self._close(ring, intent, taken.records)
        else:
            logger.info("batch %d is handed on again: the sensor was killed meanwhile", books.sequence)
            self._hand_on(ring, taken.records, intent)

    def drain(self, ring: Ring, watermark_ns: int = 0) -> int:
        """Hand on what is in the ring by now; returns how many records. `watermark_ns` holds once that is done."""
        end, count = ring.end, 0
        while ring.position < end:
            taken = ring.peek(self._batch_records, to=end)
            if taken.end == ring.position:
                break  # the next is being written
            self._take(ring, taken, watermark_ns if taken.end == end else 0)
            count += len(taken.records)
        return count

    def _take(self, ring: Ring, taken: Taken, watermark_ns: int) -> None:
        if len(taken.records):
            self._hand_on(ring, taken.records, self._after(taken.records, taken.end, watermark_ns))
        else:  # discarded, all of them
            self.journal.write(replace(self.journal.books, position=taken.end))
            ring.release(taken.end)

    def heartbeat(self, ring: Ring, watermark_ns: int) -> None:
        """The watermark alone."""
        self._hand_on(ring, EMPTY, self._after(EMPTY, ring.position, watermark_ns))

    def _after(self, records: Records, end: int, watermark_ns: int) -> Books:
        before, ways = self.journal.books, records["direction"]
        return replace(
            before,
            sequence=before.sequence + 1,
            position=end,
            records=before.records + len(records),
            packets=before.packets + int(ways["packets"].sum(dtype=np.uint64)),
            bytes=before.bytes + int(ways["bytes"].sum(dtype=np.uint64)),
            watermark_ns=max(before.watermark_ns, watermark_ns),
            drained_ns=self._clock.monotonic_ns() + self._clock.offset_ns,
            offset_ns=self._clock.offset_ns,
        )

    def _hand_on(self, ring: Ring, records: Records, after: Books) -> None:
        self.journal.begin(after)
        failure: BaseException | None = None
        if not self.failed:
            try:
                self._put(records, after)
            except BaseException as error:
                self.failed, failure = True, error
        if self.failed and self.lasting:
            raise failure or RuntimeError("the sink has failed before")
        self._close(ring, after, records, lost=self.failed)
        if failure is not None:
            raise failure

    def _put(self, records: Records, after: Books) -> None:
        origin = Origin(
            sensor=self._sensor,
            boot=self.journal.boot,
            sequence=after.sequence - 1,
            watermark_ns=after.watermark_ns,
            drained_ns=after.drained_ns,
        )
        batch = to_batch(records, clock_offset_ns=after.offset_ns, sensor=self._sensor)
        self._sink.put(batch, origin)
        self.handed_on_ns = self._clock.monotonic_ns()

    def _close(self, ring: Ring, after: Books, records: Records, *, lost: bool = False) -> None:
        self.journal.commit()
        ring.release(after.position)
        self._ledger.settle(after)
        if lost:
            self._ledger.lose("sink failed", len(records))
        else:
            self._ledger.acknowledge(len(records))
