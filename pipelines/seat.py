"""A seat: a partition that is ours, and what its site found that is not published yet.

What a site found and the offset up to which it has read become visible in one transaction. The offset is that of the
oldest record with flows in an open window; beside it stands how far findings are out (`Progress`), so that who reads
those records again publishes nothing twice. A snapshot is written once everything is out that was found before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from flowsage.collector.errors import LogUnavailableError
from flowsage.pipelines.log import Consumer, Log, LogRecord, Transactor
from flowsage.pipelines.outcome import Outcome, Progress
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.site import Site
from flowsage.pipelines.state import Snapshot, SnapshotWriter
from flowsage.pipelines.topics import flows_topic

COMMIT_S = 1.0
RETRY_S = 1.0

Say = Callable[[str], None]


def source_of(settings: Settings, number: int) -> tuple[str, str, int]:
    """Whose a partition's snapshots are: group, topic, partition."""
    return settings.score.group, flows_topic(settings.kafka.prefix), number


def take_over(log: Log, settings: Settings, number: int) -> Transactor:
    """Who writes for a partition from now on: whoever held it before can write nothing more."""
    return log.transactor("{}-{}-{}".format(*source_of(settings, number)))


@dataclass(kw_only=True)
class Seat:
    """Takes the records of a partition and publishes what comes of them.

    site        what scores them
    transactor  what `take_over` gave, before it was asked what is committed
    writer      who writes snapshots; None: nobody
    restarts    whether somebody may read again what is in open windows; if not, the log need not keep it
    warming     whether it works out again what is out already, and has said so
    say         told what a person ought to know
    wait        waits so many seconds, less where the process is stopped; returns whether it is
    """

    number: int
    site: Site
    transactor: Transactor
    settings: Settings
    log: Log
    consumer: Consumer
    writer: SnapshotWriter | None
    restarts: bool
    warming: bool
    say: Say
    wait: Callable[[float], bool]
    _outcome: Outcome = field(default_factory=Outcome, init=False)
    _committed_s: float = field(default=float("-inf"), init=False)
    _unwritten: Snapshot | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.site.on_found = self.publish

    def take(self, record: LogRecord) -> None:
        """Score a record."""
        self.site.take(record)
        if self.site.saved is not None:
            arrays, values = self.site.saved
            source = source_of(self.settings, self.number)
            self._unwritten, self.site.saved = Snapshot(source, values["position"], arrays, values), None

    def publish(self, *, force: bool = False) -> None:
        """Findings, dead letters and offsets in one transaction, if it is time for one; then the snapshot.

        Raises FencedError where another has taken over, LogUnavailableError where we are stopped while Kafka is away.
        """
        self._outcome.extend(self.site.outcome())
        if not self.site.caught_up:
            return
        if self.warming:
            self.warming = False
            self.say(f"partition {self.number}: has caught up with what was out; publishing again")
        now = time.monotonic()
        if not (self._outcome or self._unwritten or force or now - self._committed_s >= COMMIT_S):
            return
        if self.site.position == self.site.out.next and not self._outcome:
            return
        self._transact()
        self._committed_s = now
        if self.writer is not None and self._unwritten is not None:
            self.writer.write(self._unwritten)
        self._unwritten = None

    def close(self) -> None:
        """Give the transactor back. What is not published is not: another reads it again."""
        self.transactor.close()

    def _transact(self) -> None:
        """One transaction; where its outcome is not known, what is committed says whether it has to be tried again."""
        commit = self.site.commit()
        if not self.restarts:
            commit = commit._replace(offset=self.site.position)
        complained = False
        while True:
            try:
                with self.transactor.transaction() as transaction:
                    self._outcome.write(transaction, self.settings.kafka.prefix, self.number)
                    transaction.commit_offsets(self.consumer, {self.number: commit})
                break
            except LogUnavailableError as error:
                if not complained:
                    self.say(f"partition {self.number}: findings wait for Kafka: {error}")
                complained = True
            if self._is_out():
                break
        self._outcome = Outcome()

    def _is_out(self) -> bool:
        """Take the transactor over anew, which ends what was open, and see what is committed."""
        while True:
            if self.wait(RETRY_S):
                raise LogUnavailableError("stopped while Kafka was away; what was not published is read again")
            with suppress(LogUnavailableError):
                self.transactor.close()
                self.transactor = take_over(self.log, self.settings, self.number)
                group, topic, _ = source_of(self.settings, self.number)
                committed = self.log.committed(group, topic).get(self.number)
                return Progress.of(committed).next >= self.site.out.next
