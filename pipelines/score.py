"""Flows in, findings out: the loop between two topics of a log, Kafka or the one in memory.

One partition of the flows' topic is one site, and has one `Site` in the process that the group has given it to. What a
site found and the offset up to which it has read become visible in one transaction. The offset is that of the oldest
record with flows in an open window; beside it stands how far findings are out (`Progress`), so that who reads those
records again publishes nothing twice. What was learnt is in snapshots, and whoever takes a partition over

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
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

import click

from flowsage.collector.collect import stopped_by_signals
from flowsage.collector.errors import ConfigurationError, FencedError, LogError, LogUnavailableError
from flowsage.pipelines.config import Settings
from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.log import Consumer, Log, LogRecord, Transactor
from flowsage.pipelines.metrics import Metrics, Value
from flowsage.pipelines.outcome import Outcome, Progress
from flowsage.pipelines.scorer import scoring_metrics
from flowsage.pipelines.site import Site
from flowsage.pipelines.state import Snapshot, SnapshotStore, SnapshotWriter
from flowsage.pipelines.topics import flows_topic

logger = logging.getLogger(__name__)

POLL = 500
"""Records a poll: a bound on what is decoded before findings are told."""
COMMIT_S = 1.0
RETRY_S = 1.0
PROGRESS_S = 60.0

Say = Callable[[str], None]


@dataclass
class Seat:
    """A partition that is ours: its site, who writes for it, and what has not been published yet."""

    site: Site
    transactor: Transactor
    outcome: Outcome = field(default_factory=Outcome)
    committed_s: float = float("-inf")
    warming: bool = False
    unwritten: Snapshot | None = None


class Scoring:
    """A process's part in scoring a topic.

    log       where flows come from and findings go to
    store     where snapshots are; None: there are none
    restarts  whether somebody may read again what is in open windows; if not, the log need not keep it
    say       told what a person ought to know

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
    ) -> None:
        self.settings = settings
        self.log = log
        self.seats: dict[int, Seat] = {}
        self.published = 0
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

    def turn(self, timeout_s: float) -> int:
        """Read what there is, waiting for it at most `timeout_s`, and publish; returns the number of records."""
        if self._consumer is None:
            self._consumer = self.log.consumer(
                self.settings.score.group, self._topic, on_assigned=self._assigned, on_revoked=self._revoked
            )
        records = self._consumer.poll(POLL, timeout_s)
        self._take(records)
        for number in list(self.seats):
            self._publish(number)
        return len(records)

    def _take(self, records: list[LogRecord]) -> None:
        for record in records:
            seat = self.seats.get(record.partition)
            if seat is None:
                continue
            counters = seat.site.scorer.counters
            panes, seconds = (counters.panes, counters.pane_seconds), (counters.windows, counters.window_seconds)
            seat.site.take(record)
            if self._metrics is not None:
                if counters.panes > panes[0]:
                    self._metrics.pane_seconds.observe(counters.pane_seconds - panes[1])
                if counters.windows > seconds[0]:
                    self._metrics.window_seconds.observe(counters.window_seconds - seconds[1])
            if seat.site.saved is not None:
                seat.unwritten, seat.site.saved = self._snapshot_of(record.partition, seat.site), None

    def leave(self) -> None:
        """Give every partition up and leave the group. What was not published is not: another reads it again."""
        if self._consumer is not None:
            with suppress(LogError):
                self._consumer.close()
        self._consumer = None
        for seat in self.seats.values():
            seat.transactor.close()
        self.seats.clear()

    def close(self) -> None:
        """Publish what there is, leave, and wait for the snapshot that is being written."""
        with suppress(LogError):
            for number in list(self.seats):
                self._publish(number)
        self.leave()
        if self._writer is not None:
            self._writer.close()

    def finish(self) -> None:
        """Nothing will be appended any more: read to the end, look at the last pane, close every window, publish."""
        while self.turn(0.0):
            pass
        for number, seat in self.seats.items():
            seat.site.finish()
            self._publish(number)

    # ---- partitions that come and go ----

    def _assigned(self, partitions: frozenset[int]) -> None:
        assert self._consumer is not None
        for number in sorted(partitions):
            # First the transactor: only then is what is committed the last word of whoever had the partition before.
            transactor = self.log.transactor(f"{self.settings.score.group}-{self._topic}-{number}")
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
            site.on_found = partial(self._publish, number)
            self.seats[number] = Seat(site, transactor, warming=warming and not site.caught_up)
            self._say(f"partition {number}: reading from offset {site.reading_from}")

    def _tell_of_warm_up(self, number: int, out: Progress, first: int, end: int) -> None:
        if end <= first:
            return
        why = "no state is configured" if self._store is None else "there is no snapshot of it"
        again = f"; findings up to offset {out.next} are out already" if out.next else ""
        self._say(
            f"partition {number}: {why}, so it warms up on what the topic holds: offsets {first} to {end - 1}{again}"
        )

    def _source(self, number: int) -> tuple[str, str, int]:
        return self.settings.score.group, self._topic, number

    def _restored(self, number: int, out: Progress, end: int) -> Site | None:
        """The site as the newest snapshot has it that can be used."""
        if self._store is None:
            return None
        source = self._source(number)
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
                self._publish(number, force=True)
            seat.transactor.close()
            del self.seats[number]

    # ---- what goes out ----

    def _publish(self, number: int, *, force: bool = False) -> None:
        """Findings, dead letters and offsets in one transaction, if it is time for one; then the snapshot."""
        seat = self.seats[number]
        found = seat.site.outcome()
        seat.outcome.extend(found)
        if not seat.site.caught_up:
            return
        if seat.warming:
            seat.warming = False
            self._say(f"partition {number}: has caught up with what was out; publishing again")
        now = time.monotonic()
        if not (seat.outcome or seat.unwritten or force or now - seat.committed_s >= COMMIT_S):
            return
        if seat.site.position == seat.site.out.next and not seat.outcome:
            return
        self._transact(number, seat)
        seat.committed_s = now
        if self._writer is not None and seat.unwritten is not None:
            self._writer.write(seat.unwritten)
        seat.unwritten = None

    def _transact(self, number: int, seat: Seat) -> None:
        """One transaction; where its outcome is not known, what is committed says whether it has to be tried again."""
        assert self._consumer is not None
        commit = seat.site.commit()
        if not self._restarts:
            commit = commit._replace(offset=seat.site.position)
        complained = False
        while True:
            try:
                with seat.transactor.transaction() as transaction:
                    seat.outcome.write(transaction, self.settings.kafka.prefix, number)
                    transaction.commit_offsets(self._consumer, {number: commit})
                break
            except FencedError:
                raise
            except LogUnavailableError as error:
                if not complained:
                    self._say(f"partition {number}: findings wait for Kafka: {error}")
                complained = True
            if self._is_out(number, seat):
                break
        self.published += len(seat.outcome.findings)
        seat.outcome = Outcome()

    def _is_out(self, number: int, seat: Seat) -> bool:
        """Take the transactor over anew, which ends what was open, and see what is committed."""
        while True:
            if self._stopped.wait(RETRY_S):
                raise LogUnavailableError("stopped while Kafka was away; what was not published is read again")
            with suppress(LogUnavailableError):
                seat.transactor.close()
                seat.transactor = self.log.transactor(f"{self.settings.score.group}-{self._topic}-{number}")
                committed = self.log.committed(self.settings.score.group, self._topic).get(number)
                return Progress.of(committed).next >= seat.site.out.next

    def _snapshot_of(self, number: int, site: Site) -> Snapshot:
        assert site.saved is not None
        arrays, values = site.saved
        return Snapshot(self._source(number), values["position"], arrays, values)

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
    return f"{counters.consumed:,} flows, {counters.windows} windows learnt; {site.scorer.standing()}"


def run_score(settings: Settings, *, duration_s: float | None = None) -> None:
    """`flowsage score`: until a signal, or for `duration_s`."""
    started = time.monotonic()
    log = KafkaLog(settings.kafka, session_timeout_s=settings.score.session_timeout / 1e9)
    store = SnapshotStore(settings.score.state, keep=settings.score.snapshots) if settings.score.state else None
    metrics, stopped = Metrics(), threading.Event()
    with ExitStack() as stack:
        stack.enter_context(stopped_by_signals(stopped.set))
        stack.callback(log.close)
        scoring = Scoring(settings, log, store=store, metrics=metrics, say=_say)
        stack.callback(scoring.close)
        metrics.add(scoring.snapshot)
        if settings.metrics.enabled:
            metrics.serve(settings.metrics.address, settings.metrics.port)
            stack.callback(metrics.close)
            _say(f"metrics on http://{settings.metrics.address}:{settings.metrics.port}/metrics")
        _say(f"scoring {flows_topic(settings.kafka.prefix)} in group {settings.score.group}; Ctrl-C stops")
        threading.Thread(target=_progress, args=(scoring, stopped), daemon=True).start()
        scoring.run(stopped, None if duration_s is None else started + duration_s)
        stopped.set()


def _say(text: str) -> None:
    click.echo(text, err=True)


def _progress(scoring: Scoring, stopped: threading.Event) -> None:
    while not stopped.wait(PROGRESS_S):
        _say(scoring.standing())
