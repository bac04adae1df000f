"""The contract of the log, which the one in memory and Kafka both meet."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from flowsage.collector.errors import FencedError, LogFullError
from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.log import Committed, Consumer, Log, LogRecord, after
from flowsage.pipelines.memory_log import MemoryLog


class Place:
    """A log, and topics in it that nobody else uses."""

    def __init__(self, log: Log, create: Callable[[str, int], object]) -> None:
        self.log = log
        self._create = create
        self._consumers: list[Consumer] = []

    def topic(self, partitions: int = 1) -> str:
        name = f"test-{uuid.uuid4().hex}"
        self._create(name, partitions)
        return name

    def consumer(self, group: str | None, topic: str, **callbacks) -> Consumer:
        self._consumers.append(self.log.consumer(group, topic, **callbacks))
        return self._consumers[-1]

    def read(self, topic: str, count: int) -> list[LogRecord]:
        return read(self.consumer(None, topic), count)

    def close(self) -> None:
        for consumer in self._consumers:
            # Its last commit may come in the middle of a rebalance.
            with suppress(FencedError):
                consumer.close()
        self.log.close()


def read(consumer: Consumer, count: int, limit: int = 500) -> list[LogRecord]:
    """`count` records, or what there is after a minute."""
    found: list[LogRecord] = []
    deadline = time.monotonic() + 60
    while len(found) < count and time.monotonic() < deadline:
        found += consumer.poll(limit, 0.5)
    return found


@pytest.fixture(params=["memory", "kafka"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "memory":
        log = MemoryLog()
        place = Place(log, log.create_topic)
    else:
        broker = request.getfixturevalue("broker")
        place = Place(KafkaLog(broker.settings(), session_timeout_s=5), broker.create_topic)
    yield place
    place.close()


def group() -> str:
    return f"group-{uuid.uuid4().hex}"


def test_a_record_is_read_as_it_was_appended_with_the_time_at_which_the_log_took_it(place: Place) -> None:
    topic, before = place.topic(), time.time_ns()
    where = place.log.append(topic, b"key", b"value", [("a", b"1"), ("a", b"2")])
    assert where == (0, 0)
    place.log.append(topic, b"gone", None)
    record, tombstone = place.read(topic, 2)
    assert (record.topic, record.partition, record.offset) == (topic, 0, 0)
    assert (record.key, record.value, record.headers) == (b"key", b"value", (("a", b"1"), ("a", b"2")))
    assert before - 10**6 <= record.timestamp_ns <= time.time_ns()
    assert (tombstone.key, tombstone.value) == (b"gone", None)


def test_records_of_one_key_share_a_partition_and_are_read_in_the_order_they_were_appended(place: Place) -> None:
    topic = place.topic(3)
    for n in range(30):
        place.log.append(topic, b"ab"[n % 2 : n % 2 + 1], b"%d" % n)
    records = place.read(topic, 30)
    assert len(records) == 30
    for key in (b"a", b"b"):
        numbers = [int(r.value or b"") for r in records if r.key == key]
        assert numbers == sorted(numbers)
        assert len({r.partition for r in records if r.key == key}) == 1


def test_a_partition_key_puts_different_keys_on_one_partition(place: Place) -> None:
    topic = place.topic(8)
    together = {place.log.append(topic, b"sensor%d" % n, b"", partition_key=b"site")[0] for n in range(12)}
    apart = {place.log.append(topic, b"sensor", b"", partition_key=b"site%d" % n)[0] for n in range(40)}
    assert len(together) == 1
    assert len(apart) > 4


def test_a_group_reads_on_from_what_it_committed_and_a_new_group_from_the_earliest_record(place: Place) -> None:
    topic, name = place.topic(), group()
    for n in range(10):
        place.log.append(topic, None, b"%d" % n)
    first, other = place.consumer(name, topic), place.consumer(group(), topic)
    assert [r.offset for r in read(first, 4, limit=4)] == [0, 1, 2, 3]
    first.commit()
    read(first, 3, limit=3)
    assert first.position() == {0: 7}
    assert first.committed() == {0: Committed(4)}
    first.commit({0: Committed(5, "pane 12")})
    first.close()
    assert place.log.committed(name, topic) == {0: Committed(5, "pane 12")}
    second = place.consumer(name, topic)
    assert [r.offset for r in read(second, 2, limit=2)] == [5, 6]
    assert second.committed() == {0: Committed(5, "pane 12")}
    assert [r.offset for r in read(other, 2, limit=2)] == [0, 1]
    assert place.log.committed(group(), topic) == {}


def test_poll_limits_across_partitions_lose_and_repeat_nothing(place: Place) -> None:
    topic = place.topic(4)
    for n in range(101):
        place.log.append(topic, b"%d" % n, b"%d" % n)
    consumer = place.consumer(group(), topic)
    seen: list[int] = []
    while len(seen) < 101:
        got = consumer.poll(7, 60)
        assert 0 < len(got) <= 7
        seen += [int(r.value or b"") for r in got]
    assert sorted(seen) == list(range(101))


def test_a_consumer_reads_on_from_where_it_is_told_to(place: Place) -> None:
    topic = place.topic()
    for n in range(6):
        place.log.append(topic, None, b"%d" % n)
    consumer = place.consumer(group(), topic, on_assigned=lambda _: consumer.seek({0: 4}))
    assert [r.offset for r in read(consumer, 2)] == [4, 5]
    consumer.seek({0: 1})
    assert consumer.position() == {0: 1}
    assert [r.offset for r in read(consumer, 5)] == [1, 2, 3, 4, 5]


def test_a_reader_without_a_group_sees_every_partition_and_starts_at_a_time_or_at_the_end(place: Place) -> None:
    topic = place.topic(2)
    for n in range(4):
        place.log.append(topic, b"%d" % n, b"old")
    # Times in the log may be whole milliseconds.
    time.sleep(0.005)
    now = (time.time_ns() // 10**6) * 10**6
    new = place.log.append(topic, b"9", b"new")
    reader = place.consumer(None, topic)
    assert reader.assignment() == {0, 1}
    assert len(read(reader, 5)) == 5
    reader.seek(place.log.offsets_at(topic, now))
    assert [(r.partition, r.offset) for r in read(reader, 1)] == [new]
    assert place.log.first_offsets(topic) == {0: 0, 1: 0}
    reader.seek(place.log.end_offsets(topic))
    assert reader.poll(10, 0.2) == []
    assert place.log.offsets_at(topic, time.time_ns() + 10**9) == place.log.end_offsets(topic)
    with pytest.raises(FencedError, match="without a group"):
        reader.commit()


def test_a_transaction_shows_its_records_and_offsets_together(place: Place) -> None:
    flows, findings, name = place.topic(), place.topic(), group()
    place.log.append(flows, None, b"in")
    source, reader = place.consumer(name, flows), place.consumer(None, findings)
    position = after(read(source, 1))
    transactor = place.log.transactor(name)
    for n in range(3):
        with transactor.transaction() as transaction:
            transaction.append(findings, b"host", b"finding %d" % n)
            transaction.append(findings, b"host", b"another")
            assert reader.poll(10, 0.2) == []
            assert place.log.committed(name, flows) == ({0: Committed(1, f"pane {n - 1}")} if n else {})
            transaction.commit_offsets(source, {0: Committed(position[0], f"pane {n}")})
            assert reader.poll(10, 0.2) == []
        assert [r.value for r in read(reader, 2)] == [b"finding %d" % n, b"another"]
        assert place.log.committed(name, flows) == {0: Committed(1, f"pane {n}")}


def test_a_transaction_that_fails_shows_nothing_and_the_next_one_works(place: Place) -> None:
    flows, findings, name = place.topic(), place.topic(), group()
    place.log.append(flows, None, b"in")
    source, reader = place.consumer(name, flows), place.consumer(None, findings)
    read(source, 1)
    transactor = place.log.transactor(name)

    def fail() -> None:
        with transactor.transaction() as transaction:
            transaction.append(findings, None, b"never")
            transaction.commit_offsets(source, source.position())
            raise RuntimeError("scorer died")

    with pytest.raises(RuntimeError):
        fail()
    assert place.log.committed(name, flows) == {}
    with transactor.transaction() as transaction:
        transaction.append(findings, None, b"finding")
    assert [r.value for r in read(reader, 1)] == [b"finding"]


def test_a_later_transactor_of_the_same_name_fences_the_earlier_one_and_aborts_what_it_left_open(place: Place) -> None:
    findings, name = place.topic(), group()
    zombie = place.log.transactor(name)

    def overtaken() -> None:
        with zombie.transaction() as transaction:
            transaction.append(findings, b"host", b"of a zombie")
            successors.append(place.log.transactor(name))

    def again() -> None:
        with zombie.transaction() as transaction:
            transaction.append(findings, b"host", b"of a zombie")

    successors: list = []
    with pytest.raises(FencedError):
        overtaken()
    with pytest.raises(FencedError):
        again()
    with successors[0].transaction() as transaction:
        transaction.append(findings, b"host", b"of its successor")
    assert [r.value for r in read(place.consumer(None, findings), 1)] == [b"of its successor"]


def test_poll_waits_for_a_record_that_another_thread_appends(place: Place) -> None:
    topic = place.topic()
    consumer = place.consumer(None, topic)
    timer = threading.Timer(0.05, lambda: place.log.append(topic, None, b"late"))
    timer.start()
    assert [r.value for r in consumer.poll(timeout_s=60)] == [b"late"]
    timer.join()


class Member:
    """A member of a group that keeps what it was told, and commits what it has read before it lets go."""

    def __init__(self, place: Place, group: str, topic: str) -> None:
        self.read: list[bytes | None] = []
        self.told: list[tuple[str, frozenset[int]]] = []
        self.consumer = place.consumer(group, topic, on_assigned=self._assigned, on_revoked=self._revoked)

    def _assigned(self, partitions: frozenset[int]) -> None:
        self.told.append(("assigned", partitions))
        assert partitions <= self.consumer.assignment()

    def _revoked(self, partitions: frozenset[int]) -> None:
        self.told.append(("revoked", partitions))
        self.consumer.commit({n: o for n, o in self.consumer.position().items() if n in partitions})

    def poll(self, limit: int = 3, timeout_s: float = 0.05) -> None:
        self.read += [r.value for r in self.consumer.poll(limit, timeout_s)]


def until(condition: Callable[[], bool], *members: Member, timeout_s: float = 0.05) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        for member in members:
            member.poll(timeout_s=timeout_s)
    assert condition()


def test_members_of_a_group_share_the_partitions_and_hand_them_over_without_loss_or_repeat(place: Place) -> None:
    topic, name = place.topic(4), group()
    values = [b"%d" % n for n in range(60)]
    first = Member(place, name, topic)
    for value in values[:30]:
        place.log.append(topic, value, value)
    until(lambda: len(first.read) > 3, first)
    assert first.told == [("assigned", frozenset(range(4)))]
    second = Member(place, name, topic)
    until(lambda: len(second.consumer.assignment()) == len(first.consumer.assignment()) == 2, first, second)
    assert first.told[1][0] == "revoked"
    assert first.told[1][1] == second.consumer.assignment()
    for value in values[30:]:
        place.log.append(topic, value, value)
    until(lambda: len(first.read) + len(second.read) >= 50, first, second)
    second.consumer.close()
    until(lambda: first.consumer.assignment() == set(range(4)), first)
    until(lambda: len(first.read) + len(second.read) >= 60, first)
    assert sorted(first.read + second.read) == sorted(values)


def test_members_that_do_other_things_between_short_polls_share_the_partitions_too(place: Place) -> None:
    topic, name = place.topic(4), group()
    first, second = Member(place, name, topic), Member(place, name, topic)

    def settled() -> bool:
        time.sleep(0.2)
        return len(first.consumer.assignment()) == len(second.consumer.assignment()) == 2

    until(settled, first, second, timeout_s=0)
    told = len(first.told), len(second.told)
    for n in range(20):
        place.log.append(topic, b"%d" % n, b"%d" % n)

    def read_all() -> bool:
        time.sleep(0.2)
        return len(first.read) + len(second.read) >= 20

    until(read_all, first, second, timeout_s=0)
    assert (len(first.told), len(second.told)) == told


def test_what_a_member_has_lost_it_can_neither_commit_nor_write_in_a_transaction(place: Place) -> None:
    topic, findings, name = place.topic(2), place.topic(), group()
    for n in range(10):
        place.log.append(topic, b"%d" % n, b"%d" % n)
    first = Member(place, name, topic)
    until(lambda: len(first.read) == 10, first)
    second = Member(place, name, topic)
    until(lambda: len(second.consumer.assignment()) == 1 == len(first.consumer.assignment()), first, second)
    [lost] = second.consumer.assignment()
    transactor = place.log.transactor(f"{name}-1")

    def write() -> None:
        with transactor.transaction() as transaction:
            transaction.append(findings, None, b"never")
            transaction.commit_offsets(first.consumer, {lost: 1})

    with pytest.raises(FencedError):
        first.consumer.commit({lost: 1})
    with pytest.raises(FencedError):
        write()
    assert place.consumer(None, findings).poll(10, 0.2) == []


def test_the_log_in_memory_refuses_when_it_is_full_and_takes_records_again_once_they_are_consumed() -> None:
    log = MemoryLog(max_bytes=1000)
    consumer = log.consumer("g", "flows")

    def append_for_ever() -> None:
        while True:
            log.append("flows", None, b"x" * 100)

    with pytest.raises(LogFullError, match="nobody has consumed"):
        append_for_ever()
    kept = log.end_offsets("flows")[0]
    assert kept == 1000 // 164
    consumer.poll()
    consumer.commit()
    assert log.append("flows", None, b"x" * 100) == (0, kept)


def test_a_transaction_that_does_not_fit_into_memory_leaves_nothing_behind() -> None:
    log = MemoryLog(max_bytes=300)
    source = log.consumer("scorer", "flows")
    log.append("flows", None, b"in")
    source.poll()
    reader = log.consumer("soc", "anomalies")

    def commit_too_much() -> None:
        with log.transactor("scorer").transaction() as transaction:
            transaction.append("anomalies", None, b"finding")
            transaction.append("anomalies", None, b"x" * 400)
            transaction.commit_offsets(source, source.position())

    with pytest.raises(LogFullError):
        commit_too_much()
    assert reader.poll() == []
    assert log.committed("scorer", "flows") == {}
