"""The contract of the log between the rooms: what Kafka promises, in the few words that the rest needs.

Topics have partitions, partitions have records, a record has an offset and never changes. Consumers of one group share
a topic's partitions and commit, a partition, the offset to go on from, with a word of metadata. A transaction appends
records and moves a group's offsets together: a `read_committed` reader (every consumer here is one) sees all of it or
nothing. Two things meet the contract and pass one test suite: `MemoryLog` for one process, `KafkaLog` for many.

    log.consumer(group, topic)        a member of a group       .poll → work → .commit
    log.consumer(None, topic)         a reader on its own: all partitions, from the earliest, commits nothing
    log.transactor(name)              who may write transactions under a name: a later one of the same name fences it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from flowsage.collector import publish
from flowsage.collector.sink import Headers

OnPartitions = Callable[[frozenset[int]], None]
Offsets = Mapping[int, "int | Committed"]
"""Partition → offset of the next record to read after a restart, with metadata or without."""


class Committed(NamedTuple):
    """What a group has committed for a partition: the next record to read, and a word of its own."""

    offset: int
    metadata: str = ""


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One record as a consumer sees it. `timestamp_ns`: when the log took it, by the log's clock."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    timestamp_ns: int


class Consumer(Protocol):
    """A member of a consumer group, or, without a group, a reader of all partitions. One thread at a time.

    A member's partitions change only within `poll` (and `close`): there `on_revoked` is called with what it is about to
    lose, while it may still commit, then `on_assigned` with what it has gained, positioned at the committed offsets
    (the earliest record where there are none); `on_assigned` may `seek`. Partitions that a member lost by its own fault
    (it did not poll in time) are told to `on_revoked` too; what it commits for them then raises FencedError.
    """

    topic: str

    @property
    def group(self) -> str | None:
        """The group it is a member of."""

    def poll(self, limit: int = 500, timeout_s: float = 0.0) -> list[LogRecord]:
        """Up to `limit` records after the last ones, in order a partition; waits at most `timeout_s` for the first.

        A topic that does not exist yet has no partitions to assign; the consumer gets them once it does.
        """

    def assignment(self) -> frozenset[int]:
        """The partitions that are this consumer's now."""

    def position(self) -> dict[int, int]:
        """Partition → offset of the next record that `poll` returns, for the partitions that are this consumer's."""

    def seek(self, offsets: Mapping[int, int]) -> None:
        """Read on from these offsets (those that are gone: from the earliest that is there)."""

    def committed(self) -> dict[int, Committed]:
        """What the group has committed for the consumer's partitions; one without a commit is not in it."""

    def commit(self, offsets: Offsets | None = None) -> None:
        """Commit `offsets` (default: what has been polled). Raises FencedError where they are not this member's."""

    def close(self) -> None:
        """Leave: `on_revoked` is called a last time, and others get the partitions at once."""


class Transaction(Protocol):
    """What becomes visible together. Only within the block of `Transactor.transaction`."""

    def append(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()) -> None:
        """Append a record."""

    def commit_offsets(self, consumer: Consumer, offsets: Offsets) -> None:
        """Move the group of `consumer` to `offsets`, if `consumer` still has the partitions: else FencedError."""


class Transactor(Protocol):
    """Who may write transactions under a name."""

    def transaction(self) -> AbstractContextManager[Transaction]:
        """Records and offsets that become visible together when the block ends, or, where it raises, not at all.

        Raises FencedError where a later transactor has the name, or where the consumer's partitions are somebody
        else's by now; LogUnavailableError where the outcome is not known: read back what is committed.
        """

    def close(self) -> None:
        """No more transactions; an open one is aborted."""


class Log(publish.Log, Protocol):
    """Topics, as one process sees them. Safe to use from several threads; its consumers are not."""

    def consumer(
        self,
        group: str | None,
        topic: str,
        *,
        on_assigned: OnPartitions | None = None,
        on_revoked: OnPartitions | None = None,
    ) -> Consumer:
        """A member of `group`, or for None a reader on its own. A member gets its partitions in `poll`."""

    def transactor(self, name: str) -> Transactor:
        """Take over `name`: a transaction that an earlier holder left open is aborted, and its later ones fenced."""

    def committed(self, group: str, topic: str) -> dict[int, Committed]:
        """What the group has committed, of all partitions that it has committed."""

    def first_offsets(self, topic: str) -> dict[int, int]:
        """The offset of the earliest record of each partition that is still there."""

    def end_offsets(self, topic: str) -> dict[int, int]:
        """The offset that the next record of each partition will have."""

    def offsets_at(self, topic: str, timestamp_ns: int) -> dict[int, int]:
        """The first offset of each partition that was appended at or after a time; its end where there is none."""

    def close(self) -> None:
        """Let go of everything. What was appended stays."""


def offsets_of(offsets: Offsets) -> dict[int, Committed]:
    """`offsets` with metadata everywhere."""
    return {n: o if isinstance(o, Committed) else Committed(o) for n, o in offsets.items()}


def after(records: Iterable[LogRecord]) -> dict[int, int]:
    """Partition → the offset after the last of `records`."""
    return {r.partition: r.offset + 1 for r in records}
