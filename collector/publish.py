"""Flow batches on their way to a log.

`Publisher` is the sink that appends to a `Log` (the in-memory one, Kafka): a batch becomes one record, keyed by sensor,
described by CloudEvents headers. What the log does not take goes to the spool, and follows in order once the log takes
again. A batch that `put` has taken is the log's or on disk, whatever is killed then.

Every record that is handed in is acknowledged, spooled, or lost for a named reason: `PublishCounts`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, Self

import pyarrow as pa

from flowsage.collector.errors import RecordTooLargeError
from flowsage.collector.sink import Headers, Origin, Sink, origin_of, serialise
from flowsage.collector.spool import Spool, SpoolError

logger = logging.getLogger(__name__)

FLOWS_TOPIC = "flowsage.flows.v1"
TOO_LARGE = "too large for the log"


class Log(Protocol):
    """Where records are appended: `flowsage.pipelines.memory_log.MemoryLog`, or `flowsage.pipelines.kafka.KafkaLog`.

    What else a log does is said where it is read: `flowsage.pipelines.log.Log`.
    """

    def append(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        *,
        partition_key: bytes | None = None,
        timeout_s: float | None = None,
    ) -> tuple[int, int]:
        """Append one record; returns its (partition, offset) once the log will not lose it.

        Records of one `partition_key` (default: `key`) share a partition, in order. When it raises, the record was not
        appended, with one exception: LogUnavailableError, after which it may have been. LogFullError,
        RecordTooLargeError (it never will be taken) and LogUnavailableError (after `timeout_s` at most; None: as long
        as the log waits by itself) are LogErrors.
        """


@dataclass
class PublishCounts:
    """Flow records handed in, by what became of them. `resumed` were in the spool when the publisher started."""

    handed: int = 0
    resumed: int = 0
    acknowledged: int = 0
    pending: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    batches: int = 0
    failures: int = 0
    """Appends that the log refused."""

    @property
    def balance(self) -> int:
        """0, or a bug."""
        return self.handed + self.resumed - self.acknowledged - self.pending - sum(self.lost.values())


class Publisher(Sink):
    """The sink that appends to a log, with a spool behind it.

    log         where to; whatever it raises means that it did not take the record, except that what it raises
                RecordTooLargeError for it will never take
    site        sensors of one site share a partition, and so a scorer; default: every sensor by itself
    spool       where batches wait that the log does not take; None: they are lost, counted
    retry_s     how long to leave the log alone after a refusal
    patience_s  how long `put` waits for a log that takes its time, before it spools

    With `patience_s` a thread (`start`) sends what waits: nothing that a log does holds the sensor up for longer, and
    that once an outage; until the thread has met the log, everything is spooled. Without it (a log in this process)
    there is no thread, and what waits is sent by `put` and `ready`.
    """

    def __init__(
        self,
        log: Log,
        *,
        sensor: str,
        site: str | None = None,
        topic: str = FLOWS_TOPIC,
        spool: Spool | None = None,
        retry_s: float = 1.0,
        patience_s: float | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._topic = topic
        self._key = sensor.encode()
        self._site = self._key if site is None else site.encode()
        self._spool = spool
        self._retry_s = retry_s
        self._patience_s = patience_s
        self._monotonic = monotonic
        self._retry_at = float("-inf")
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._direct = patience_s is None
        self._counts = PublishCounts()
        self._dropped = 0
        if spool is not None:
            self._counts.resumed = self._counts.pending = spool.pending_records
            self._dropped = spool.dropped_records

    @property
    def counts(self) -> PublishCounts:
        """As of now; every record is in one place."""
        with self._changed:
            return replace(self._counts, lost=dict(self._counts.lost))

    @property
    def directory(self) -> Path | None:
        """Where it has to be able to write."""
        return self._spool.directory if self._spool is not None else None

    def start(self) -> Self:
        """Send what waits from a thread, if the log is one to be patient with."""
        if self._patience_s is not None and self._thread is None:
            assert self._spool is not None, "what would wait has nowhere to wait"
            self._thread = threading.Thread(target=self._work, name="flowsage-publisher", daemon=True)
            self._thread.start()
        return self

    def ready(self) -> bool:
        """Nothing waits in the spool, or everything has just left it: a heartbeat would not have to wait."""
        if self._patience_s is None:
            self.drain()
        return self._monotonic() >= self._retry_at and not self._waiting()

    def last_sequence(self, boot: str) -> int | None:
        """Number of the last batch of `boot` that is in the log or in the spool, as far as the spool knows."""
        return self._spool.last_sequence(boot) if self._spool is not None else None

    def put(self, batch: pa.RecordBatch, origin: Origin) -> None:
        """Append `batch`, or spool it. Never raises for what the log or the disk does."""
        if self._patience_s is None:
            self.drain()
        value, records = serialise(batch, origin), len(batch)
        fate: str | None = "log refused, no spool"
        # Nothing overtakes what waits: a newer watermark before older records would make them late.
        if self._direct and not self._waiting():
            fate = self._append(value, origin, self._patience_s)
        with self._changed:
            self._counts.handed += records
            self._counts.batches += 1
            if fate is None:
                self._counts.acknowledged += records
            elif self._spool is None or fate == TOO_LARGE:
                self._lose(fate, records)
            else:
                self._keep(self._spool, value, records)
            if self._spool is not None:
                self._spool.note(origin.boot, origin.sequence)
            self._settle()
            self._changed.notify_all()

    def _keep(self, spool: Spool, value: bytes, records: int) -> None:
        try:
            spool.append(value, records)
        except SpoolError as error:
            logger.error("%s; %d flow records are lost", error, records)
            self._lose("spool failed", records)

    def _waiting(self) -> bool:
        return self._spool is not None and self._spool.pending_batches > 0

    def drain(self, timeout_s: float | None = None, until: float = float("inf")) -> None:
        """Append what waits in the spool, in order, as far as the log takes it; begin none after `until`."""
        while self._waiting() and self._retry_at <= self._monotonic() < until and self._send_first(timeout_s):
            pass

    def _send_first(self, timeout_s: float | None) -> bool:
        """Send the oldest batch that waits; True: it is done with."""
        spool = self._spool
        assert spool is not None
        with self._changed:
            try:
                item, value = spool.hold()
            except SpoolError as error:
                return self._give_up(spool, str(error), "spool damaged")
        try:
            origin = origin_of(value, item.records)
        except (pa.ArrowException, KeyError, ValueError) as error:
            with self._changed:
                return self._give_up(spool, str(error), "spool damaged")
        fate = self._append(value, origin, timeout_s)
        with self._changed:
            if fate == TOO_LARGE:
                return self._give_up(spool, "the log takes no record of its size", fate)
            if fate is not None:
                spool.release()
                return False
            # A kill between the two sends it twice, under the same boot and sequence: a reader can tell.
            spool.remove()
            self._counts.acknowledged += item.records
            self._settle()
            self._direct = True
        return True

    def _give_up(self, spool: Spool, why: str, reason: str) -> bool:
        logger.error("a spooled batch is unusable and given up: %s", why)
        before = spool.dropped_records
        spool.remove(delivered=False)
        self._dropped += spool.dropped_records - before
        self._lose(reason, spool.dropped_records - before)
        self._settle()
        return True

    def _append(self, value: bytes, origin: Origin, timeout_s: float | None) -> str | None:
        """None: the log has it; otherwise what becomes of it without a spool."""
        if self._monotonic() < self._retry_at:
            return "log refused, no spool"
        try:
            self._log.append(
                self._topic, self._key, value, origin.headers(), partition_key=self._site, timeout_s=timeout_s
            )
        except RecordTooLargeError as error:
            logger.error("%s; its flow records are lost", error)
            return TOO_LARGE
        except Exception as error:
            if self._retry_at == float("-inf"):
                logger.warning("the log takes no flow records (%s); %s", error, self._fate())
            with self._changed:
                self._counts.failures += 1
                self._retry_at = self._monotonic() + self._retry_s
                self._direct = self._patience_s is None
            return "log refused, no spool"
        if self._retry_at > float("-inf"):
            logger.info("the log takes flow records again")
            self._retry_at = float("-inf")
        return None

    def _fate(self) -> str:
        return "they are spooled" if self._spool is not None else "there is no spool, so they are lost and counted"

    def _lose(self, reason: str, records: int) -> None:
        if records:
            self._counts.lost[reason] = self._counts.lost.get(reason, 0) + records

    def _settle(self) -> None:
        """Take over what the spool has counted."""
        if self._spool is None:
            return
        self._lose("spool full", self._spool.dropped_records - self._dropped)
        self._dropped = self._spool.dropped_records
        self._counts.pending = self._spool.pending_records

    def _work(self) -> None:
        """The thread: send what waits, and where the log refuses, wait a little."""
        while True:
            with self._changed:
                while not self._stopping and not (self._waiting() and self._monotonic() >= self._retry_at):
                    left = self._retry_at - self._monotonic()
                    self._changed.wait(left if self._waiting() and left > 0 else None)
                if self._stopping:
                    return
            self._send_first(None)

    def close(self, timeout_s: float = 5.0) -> None:
        """A last attempt at the spool, of `timeout_s`; what remains in it is there for the next start. Idempotent."""
        with self._changed:
            if self._stopping:
                return
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            # It may be in the middle of an append, which a log ends in time of its own.
            self._thread.join(timeout_s)
        if self._thread is None or not self._thread.is_alive():
            self._retry_at = min(self._retry_at, self._monotonic())
            self.drain(None if self._patience_s is None else timeout_s, self._monotonic() + timeout_s)
        if self._spool is not None:
            self._spool.close()
