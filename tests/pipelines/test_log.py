"""The contract of the log, which the in-memory one and (later) Kafka both meet."""

import threading

import pytest

from flowsage.pipelines.log import LogFullError, MemoryLog


def test_records_of_one_key_are_read_in_the_order_they_were_appended() -> None:
    log = MemoryLog(partitions=3)
    for n in range(50):
        log.append("flows", b"a" if n % 2 else b"b", b"%d" % n)
    records = log.consumer("g", "flows").poll(100)
    assert len(records) == 50
    for key in (b"a", b"b"):
        numbers = [int(r.value or b"") for r in records if r.key == key]
        assert numbers == sorted(numbers)
        assert len({r.partition for r in records if r.key == key}) == 1


def test_a_group_reads_on_from_its_committed_offset_and_a_new_group_from_the_earliest_record() -> None:
    log = MemoryLog()
    log.consumer("other", "flows")
    first = log.consumer("g", "flows")
    for n in range(10):
        log.append("flows", None, b"%d" % n)
    assert [r.offset for r in first.poll(4)] == [0, 1, 2, 3]
    first.commit()
    first.poll(3)
    assert [r.offset for r in log.consumer("g", "flows").poll(2)] == [4, 5]
    assert [r.offset for r in log.consumer("other", "flows").poll(2)] == [0, 1]


def test_poll_limits_across_partitions_lose_and_repeat_nothing() -> None:
    log = MemoryLog(partitions=4)
    for n in range(101):
        log.append("flows", b"%d" % n, b"%d" % n)
    consumer = log.consumer("g", "flows")
    seen: list[int] = []
    while got := consumer.poll(7):
        assert len(got) <= 7
        seen += [int(r.value or b"") for r in got]
    assert sorted(seen) == list(range(101))


def test_a_transaction_shows_its_records_and_offsets_together() -> None:
    log = MemoryLog()
    source = log.consumer("scorer", "flows")
    log.append("flows", None, b"in")
    source.poll()
    reader = log.consumer("soc", "anomalies")
    with log.transaction() as transaction:
        transaction.append("anomalies", b"host", b"finding")
        transaction.commit_offsets("scorer", "flows", source.position())
        assert reader.poll() == []
        assert log.committed("scorer", "flows") == {0: 0}
    assert [r.value for r in reader.poll()] == [b"finding"]
    assert log.committed("scorer", "flows") == {0: 1}


def test_a_transaction_that_fails_shows_nothing() -> None:
    log = MemoryLog(max_bytes=300)
    source = log.consumer("scorer", "flows")
    log.append("flows", None, b"in")
    source.poll()
    reader = log.consumer("soc", "anomalies")

    def commit_with_error() -> None:
        with log.transaction() as transaction:
            transaction.append("anomalies", None, b"finding")
            raise RuntimeError("scorer died")

    def commit_too_much() -> None:
        with log.transaction() as transaction:
            transaction.append("anomalies", None, b"finding")
            transaction.append("anomalies", None, b"x" * 400)
            transaction.commit_offsets("scorer", "flows", source.position())

    with pytest.raises(RuntimeError):
        commit_with_error()
    with pytest.raises(LogFullError):
        commit_too_much()
    assert reader.poll() == []
    assert log.committed("scorer", "flows") == {0: 0}


def test_a_full_topic_refuses_and_takes_records_again_once_they_are_consumed() -> None:
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


def test_poll_waits_for_a_record_that_another_thread_appends() -> None:
    log = MemoryLog()
    consumer = log.consumer("g", "flows")
    threading.Timer(0.05, lambda: log.append("flows", None, b"late")).start()
    assert [r.value for r in consumer.poll(timeout_s=5)] == [b"late"]
