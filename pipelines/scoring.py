"""Flows in, findings out: the loop between two topics of a log, Kafka or the one in memory.

One partition of the flows' topic is one site, and has one `Seat` in the process that the group has given it to. What
was learnt is in snapshots, and whoever takes a partition over

1. takes over its transactor (an earlier holder can write nothing more),
2. asks what is committed, and so knows what is out,
3. loads the newest snapshot that is whole and learnt under these settings, or begins at the earliest record,
4. reads on, working out again what is out already: the same records give the same findings,
5. and publishes from there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from flowsage.collector.errors import ConfigurationError, FencedError, LogError, LogUnavailableError
from flowsage.pipelines.log import Consumer, Log, LogRecord
from flowsage.pipelines.metrics import Metrics, Value
from flowsage.pipelines.outcome import Progress
from flowsage.pipelines.scorer import scoring_metrics
from flowsage.pipelines.seat import RETRY_S, Say, Seat, source_of, take_over
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.site import Site
from flowsage.pipelines.state import SnapshotStore, SnapshotWriter
from flowsage.pipelines.topics import flows_topic

logger = logging.getLogger(__name__)

POLL = 500
"""Records a poll: a bound on what is decoded before findings are told."""


class Scoring:
    """A process's part in scoring a topic.

    log       where flows come from and findings go to
    store     where snapshots are; None: there are none
    restarts  whether somebody may read again what is in open windows; if not, the log need not keep it
    say       told what a person ought to know
    alive     called whenever something was done, or waited for

    `run` works in the caller's thread; `snapshot` and `standing` may be called from others.
    """

    def __init__(
        self,
        settings: Settings,
        log: Log,
        *,
        store: SnapshotStore | None = None,
        metrics: Metrics | None = None,
        restarts: bool = True,
        say: Say = logger.info,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.log = log
        self._alive = alive
        self.seats: dict[int, Seat] = {}
        self.fenced = 0
        self._metrics = metrics
        self._restarts = restarts
        self._say = say
        self._store = store
        self._writer = None if store is None else SnapshotWriter(store)
        self._topic = flows_topic(settings.kafka.prefix)
        self._consumer: Consumer | None = None
        self._stopped = threading.Event()

    # ---- the loop ----

    def run(self, stopped: threading.Event, until: float | None = None) -> None:
        """Score until `stopped` is set, or until `until` (time.monotonic). An outage of the log is waited out.

        Raises LogError where the log refuses what is asked (and would again), ConfigurationError for what is wrong
        with the state.
        """
        self._stopped = stopped
        complained = False
        while not stopped.is_set() and (until is None or time.monotonic() < until):
            try:
                self.turn(0.2)
                complained = False
            except FencedError as error:
                self.fenced += 1
                self._say(f"taken over by another scorer: {error}; joining again")
                self.leave()
            except LogUnavailableError as error:
                if not complained:
                    self._say(f"Kafka is not there: {error}; trying again")
                complained = True
                stopped.wait(RETRY_S)
            self._alive()

    def turn(self, timeout_s: float) -> int:
        """Read what there is, waiting for it at most `timeout_s`, and publish; returns the number of records."""
        if self._consumer is None:
            self._consumer = self.log.consumer(
                self.settings.score.group, self._topic, on_assigned=self._assigned, on_revoked=self._revoked
            )
        records = self._consumer.poll(POLL, timeout_s)
        for record in records:
            if (seat := self.seats.get(record.partition)) is not None:
                self._take(seat, record)
        for seat in list(self.seats.values()):
            seat.publish()
        return len(records)

    def _take(self, seat: Seat, record: LogRecord) -> None:
        counters = seat.site.scorer.counters
        panes, windows = (counters.panes, counters.pane_seconds), (counters.windows, counters.window_seconds)
        seat.take(record)
        self._alive()
        if self._metrics is not None:
            if counters.panes > panes[0]:
                self._metrics.pane_seconds.observe(counters.pane_seconds - panes[1])
            if counters.windows > windows[0]:
                self._metrics.window_seconds.observe(counters.window_seconds - windows[1])

    def leave(self) -> None:
        """Give every partition up and leave the group. What was not published is not: another reads it again."""
        if self._consumer is not None:
            with suppress(LogError):
                self._consumer.close()
        self._consumer = None
        for seat in self.seats.values():
            seat.close()
        self.seats.clear()

    def close(self) -> None:
        """Publish what there is, leave, and wait for the snapshot that is being written."""
        with suppress(LogError):
            for seat in list(self.seats.values()):
                seat.publish()
        self.leave()
        if self._writer is not None:
            self._writer.close()

    def finish(self) -> None:
        """Nothing will be appended any more: read to the end, look at the last pane, close every window, publish."""
        while self.turn(0.0):
            pass
        for seat in self.seats.values():
            seat.site.finish()
            seat.publish()

    # ---- partitions that come and go ----

    def _assigned(self, partitions: frozenset[int]) -> None:
        assert self._consumer is not None
        for number in sorted(partitions):
            # First the transactor: only then is what is committed the last word of whoever had the partition before.
            transactor = take_over(self.log, self.settings, number)
            try:
                out = Progress.of(self._consumer.committed().get(number))
                first, end = self.log.first_offsets(self._topic)[number], self.log.end_offsets(self._topic)[number]
                site = self._restored(number, out, end)
                warming = site is None
                if site is None:
                    site = Site(self.settings, out=out, saves=self._store is not None)
                    site.position = first
                    self._tell_of_warm_up(number, out, first, end)
                self._consumer.seek({number: site.reading_from})
            except BaseException:
                transactor.close()
                raise
            self.seats[number] = Seat(
                number=number, site=site, transactor=transactor, settings=self.settings, log=self.log,
                consumer=self._consumer, writer=self._writer, restarts=self._restarts,
                warming=warming and not site.caught_up, say=self._say, wait=self._wait,
            )  # fmt: skip
            self._say(f"partition {number}: reading from offset {site.reading_from}")

    def _tell_of_warm_up(self, number: int, out: Progress, first: int, end: int) -> None:
        if end <= first:
            return
        why = "no state is configured" if self._store is None else "there is no snapshot of it"
        again = f"; findings up to offset {out.next} are out already" if out.next else ""
        self._say(
            f"partition {number}: {why}, so it warms up on what the topic holds: offsets {first} to {end - 1}{again}"
        )

    def _restored(self, number: int, out: Progress, end: int) -> Site | None:
        """The site as the newest snapshot has it that can be used."""
        if self._store is None:
            return None
        source = source_of(self.settings, number)
        for snapshot in self._store.newest(source):
            if snapshot.position > end:
                why = f"it reaches to offset {snapshot.position}, the topic ends at {end}: it was made anew"
                self._store.refuse(source, snapshot.position, why)
                continue
            try:
                site = Site.restore(self.settings, snapshot.arrays, snapshot.values, out=out)
            except ConfigurationError as error:
                self._store.refuse(source, snapshot.position, str(error))
                continue
            self._say(f"partition {number}: goes on from the snapshot at offset {snapshot.position} of {end}")
            return site
        return None

    def _revoked(self, partitions: frozenset[int]) -> None:
        for number in sorted(partitions):
            seat = self.seats.get(number)
            if seat is None:
                continue
            with suppress(LogError):
                seat.publish(force=True)
            seat.close()
            del self.seats[number]

    def _wait(self, seconds: float) -> bool:
        self._alive()
        return self._stopped.wait(seconds)

    # ---- how it is ----

    def snapshot(self) -> Mapping[str, Value]:
        """Records, windows, models and findings of all partitions, for the metrics."""
        values = scoring_metrics([seat.site.scorer for seat in list(self.seats.values())])
        counters = [seat.site.counters for seat in list(self.seats.values())]
        values |= {
            "flowsage_partitions": len(counters),
            "flowsage_batches_consumed": sum(c.consumed for c in counters),
            "flowsage_flows_dead_lettered": sum(c.dead for c in counters),
            "flowsage_batches_duplicate": sum(c.duplicates for c in counters),
            "flowsage_batches_lost": sum(c.lost for c in counters),
            "flowsage_scorer_fenced": self.fenced,
        }
        if self._writer is not None:
            values |= {
                "flowsage_snapshots": self._writer.written,
                "flowsage_snapshots_failed": self._writer.failed,
                "flowsage_snapshot_bytes": self._writer.bytes,
            }
        return values

    def standing(self) -> str:
        """Windows learnt, and whether graph and alarms are ready, in words."""
        seats = sorted(self.seats.items())
        if not seats:
            return "no partition yet"
        told = [_told(seat.site) for _, seat in seats]
        return (
            told[0]
            if len(told) == 1
            else "; ".join(f"partition {n}: {t}" for (n, _), t in zip(seats, told, strict=True))
        )


def _told(site: Site) -> str:
    counters = site.scorer.counters
    standing = site.scorer.standing() + site.scorer.expected()
    return f"{counters.consumed:,} flows, {counters.windows} windows learnt; {standing}"
