"""Scoring a topic, over the log in memory: the same findings however it is interrupted, every record accounted for."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flowsage.collector.errors import ConfigurationError
from flowsage.collector.sink import serialise
from flowsage.models import artifact
from flowsage.pipelines.embeddings import embedding_records
from flowsage.pipelines.log import Log
from flowsage.pipelines.memory_log import MemoryLog
from flowsage.pipelines.model import ModelDirectory
from flowsage.pipelines.outcome import Progress
from flowsage.pipelines.scoring import Scoring
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.site import Site
from flowsage.pipelines.state import Snapshot, SnapshotStore
from flowsage.pipelines.topics import anomalies_topic, dlq_topic, embeddings_topic, flows_topic
from tests.pipelines.flow_stream import Batch, LogClock, again, heartbeat, memory, publish, read_all, settings, stream

FLOWS, ANOMALIES, DLQ = flows_topic("flowsage"), anomalies_topic("flowsage"), dlq_topic("flowsage")
SNAPSHOTS = {"snapshot_interval": "5s"}


def findings(log: Log) -> list[bytes]:
    return [value or b"" for _, value, _ in read_all(log, ANOMALIES)]


def run(log: Log, config: Settings, store: SnapshotStore | None = None) -> Scoring:
    """Score everything there is."""
    scoring = Scoring(config, log, store=store)
    while scoring.turn(0.0):
        pass
    return scoring


def kill(scoring: Scoring) -> None:
    """As kill -9, when the group has noticed."""
    consumer = scoring._consumer
    if consumer is not None:
        consumer._on_revoked = None  # type: ignore[attr-defined]
        consumer.close()
    if scoring._writer is not None:
        scoring._writer.close()


def site(scoring: Scoring, number: int = 0) -> Site:
    return scoring.seats[number].site


def balanced(site: Site) -> bool:
    """The account of records and of flows."""
    c, flows, windows = site.counters, site.scorer.counters, site.scorer.buffer
    return (
        c.consumed == c.taken + c.duplicates + c.dead
        and flows.consumed
        == flows.scored + flows.known + windows.counters.late + windows.counters.future + windows.open_flows()
    )


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return stream()


@pytest.fixture(scope="module")
def scored(batches: list[Batch]) -> Log:
    """The log with all batches, scored by one who is not disturbed."""
    log, clock = memory()
    publish(log, batches, clock)
    scoring = run(log, settings())
    assert balanced(site(scoring))
    return log


@pytest.fixture(scope="module")
def undisturbed(scored: Log) -> list[bytes]:
    found = findings(scored)
    assert len(found) >= 5
    return found


def test_every_event_of_a_finding_has_a_time_and_an_identity_of_its_own(scored: Log) -> None:
    records = list(read_all(scored, ANOMALIES))
    events = [json.loads(value or b"") for _, value, _ in records]
    assert [dict(headers)["ce_id"].decode() for _, _, headers in records] == [e["metadata"]["uid"] for e in events]
    assert len({e["metadata"]["uid"] for e in events}) == len(events)
    lives: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        lives.setdefault(event["finding_info"]["uid"], []).append(event)
    assert max(sum(e["activity_id"] == 2 for e in life) for life in lives.values()) >= 2
    pane_ms = settings().windows.pane // 10**6
    for life in lives.values():
        times = [e["time"] for e in life]
        assert times == sorted(set(times))
        assert all(time % pane_ms == 0 for time in times)
        assert {e["finding_info"]["created_time"] for e in life} == {times[0]}
        for event, time in zip(life, times, strict=True):
            info = event["finding_info"]
            assert info["first_seen_time"] == event["start_time"] <= info["last_seen_time"] <= time
            assert max(e["data"]["last_seen_time"] for e in event["evidences"]) <= time
            if event["activity_id"] < 3:
                assert info["last_seen_time"] == time
            else:
                assert info["last_seen_time"] == event["end_time"] < time


def test_findings_do_not_depend_on_how_the_records_were_cut_into_polls(
    batches: list[Batch], undisturbed: list[bytes]
) -> None:
    log, clock = memory()
    scoring = Scoring(settings(), log)
    for batch in batches:
        publish(log, [batch], clock)
        scoring.turn(0.0)
        assert balanced(site(scoring))
    assert findings(log) == undisturbed


@pytest.mark.parametrize("seed", [1, 2])
def test_a_scorer_that_is_killed_anywhere_leaves_the_findings_of_one_that_is_not(
    tmp_path: Path, batches: list[Batch], undisturbed: list[bytes], seed: int
) -> None:
    rng = random.Random(seed)
    log, clock = memory()
    log.consumer("keeps it all", FLOWS)
    store = SnapshotStore(str(tmp_path))
    left = list(batches)
    scoring, deaths, restored = Scoring(settings(score=SNAPSHOTS), log, store=store), 0, 0
    while left:
        count = rng.randint(1, 20)
        publish(log, left[:count], clock)
        left = left[count:]
        scoring.turn(0.0)
        if rng.random() < 0.4:
            kill(scoring)
            deaths += 1
            told: list[str] = []
            scoring = Scoring(settings(score=SNAPSHOTS), log, store=store, say=told.append)
            scoring.turn(0.0)
            restored += any("goes on from the snapshot" in text for text in told)
    scoring.turn(0.0)
    assert findings(log) == undisturbed
    assert deaths > 8
    assert restored > 5
    assert balanced(site(scoring))
    scoring.close()


def test_without_a_snapshot_it_warms_up_on_the_topic_says_so_and_publishes_nothing_twice(
    batches: list[Batch], undisturbed: list[bytes]
) -> None:
    log, clock = memory()
    log.consumer("keeps it all", FLOWS)
    half = len(batches) * 2 // 3
    publish(log, batches[:half], clock)
    kill(run(log, settings()))
    out = findings(log)
    assert 0 < len(out) < len(undisturbed)
    told: list[str] = []
    scoring = Scoring(settings(), log, say=told.append)
    while scoring.turn(0.0):
        pass
    assert findings(log) == out
    publish(log, batches[half:], clock)
    scoring.turn(0.0)
    assert findings(log) == undisturbed
    assert "no state is configured, so it warms up on what the topic holds: offsets 0 to" in told[0]


def test_the_graph_is_restored_too(tmp_path: Path) -> None:
    batches = stream(110.0)
    config = settings(graph=True, score=SNAPSHOTS | {"embeddings": True}, model={"ready_windows": 3,
                      "ready_meetings": 10, "ready_steps": 1})  # fmt: skip
    store = SnapshotStore(str(tmp_path))
    logs = []
    for killed in (False, True):
        log, clock = memory()
        log.consumer("keeps it all", FLOWS)
        scoring = Scoring(config, log, store=store if killed else SnapshotStore(str(tmp_path / "other")))
        for k in range(0, len(batches), 10):
            publish(log, batches[k : k + 10], clock)
            scoring.turn(0.0)
            if killed and k % 40 == 30 and k < 200:
                kill(scoring)
                scoring = Scoring(config, log, store=store)
        scoring.turn(0.0)
        prior = site(scoring).scorer.detector.prior
        assert prior is not None
        assert prior.waiting is None
        scoring.close()
        logs.append(log)
    one, two = (list(read_all(log, embeddings_topic("flowsage"))) for log in logs)
    assert one == two
    assert 5 < len(one) < 110 / 6, "there are none before the graph has learnt anything"
    with pa.ipc.open_stream(one[-1][1]) as reader:
        table = reader.read_all()
    assert table.column_names == ["window_start_ns", "host", "embedding"]
    assert len(table) > 10


def test_two_sites_that_see_the_same_tell_it_under_identities_of_their_own() -> None:
    log, clock = memory(partitions=2)
    pairs = zip(*(stream(130.0, sensors=(name,)) for name in ("berlin", "paris")), strict=True)
    publish(log, [batch for pair in pairs for batch in pair], clock)
    run(log, settings())
    events = [json.loads(value) for value in findings(log)]
    uids = [e["finding_info"]["uid"] for e in events]
    paris, berlin = ([u.removeprefix(f"{n}-") for u in uids if u.startswith(f"{n}-")] for n in (0, 1))
    assert paris == berlin
    assert len(paris) + len(berlin) == len(events) > 0
    assert len({e["metadata"]["uid"] for e in events}) == len(events)
    window = pa.RecordBatch.from_pydict({"window_start_ns": [6 * 10**9], "host": ["a"], "embedding": [[0.0]]})
    assert [dict(headers)["ce_id"] for n in (0, 1) for _, _, headers in embedding_records([window], n)] == [
        b"0-6000000000",
        b"1-6000000000",
    ]


def test_a_repeated_batch_is_dropped_and_counted_and_a_gap_is_counted_as_lost(
    batches: list[Batch], undisturbed: list[bytes]
) -> None:
    log, clock = memory()
    rng = random.Random(3)
    repeated = [b for batch in batches for b in [batch] * rng.choice((1, 1, 1, 2, 3))]
    publish(log, repeated, clock)
    scoring = run(log, settings())
    counters = site(scoring).counters
    assert findings(log) == undisturbed
    assert (counters.taken, counters.duplicates) == (len(batches), len(repeated) - len(batches))
    assert counters.lost == 0
    publish(log, [again(batches[-1], sequence=1000), again(batches[-1], boot="other", sequence=2)], clock)
    scoring.turn(0.0)
    assert counters.lost == 1000 - batches[-1].origin.sequence - 1 + 2
    assert balanced(site(scoring))


def poison(batch: Batch) -> list[bytes | None]:
    stranger = pa.record_batch({"temperature": [21.5], "room": ["attic"]})
    ours = pa.record_batch({"start_ns": ["soon"], "src_ip": ["10.0.0.1"], "dst_ip": ["10.0.0.2"]})
    no_origin = pa.BufferOutputStream()
    with pa.ipc.new_stream(no_origin, stranger.schema) as writer:
        writer.write_batch(stranger)
    noise = random.Random(5)
    return [
        noise.randbytes(300),
        batch.value[: len(batch.value) // 2],
        batch.value[: len(batch.value) * 9 // 10],
        serialise(stranger, batch.origin),
        serialise(ours, batch.origin),
        no_origin.getvalue().to_pybytes(),
        b"",
        None,
        b'{"start_ns": 1}',
    ]


def test_poison_goes_to_the_dead_letters_and_nothing_around_it_is_lost(
    batches: list[Batch], undisturbed: list[bytes]
) -> None:
    log, clock = memory()
    bad = poison(max(batches, key=lambda b: b.flows))
    appended: list[bytes | None] = []
    for k, batch in enumerate(batches):
        if k % 3 == 0:
            value = bad[k // 3 % len(bad)]
            log.append(FLOWS, b"edge", value, [("mine", b"yes")])
            appended.append(value)
        publish(log, [batch], clock)
    scoring = run(log, settings())
    assert findings(log) == undisturbed
    assert site(scoring).counters.dead == len(appended)
    assert balanced(site(scoring))
    dead = list(read_all(log, DLQ))
    assert [value for _, value, _ in dead] == appended
    for n, (key, _, headers) in enumerate(dead):
        assert key == b"edge"
        assert headers["mine"] == b"yes"
        assert headers["dlq_topic"] == FLOWS.encode()
        assert headers["dlq_partition"] == b"0"
        assert int(headers["dlq_offset"]) == 4 * n
        assert headers["dlq_error"]


def test_bytes_turned_at_random_never_end_the_stream(batches: list[Batch]) -> None:
    rng = random.Random(11)
    log, clock = memory()
    victim = max(batches, key=lambda b: b.flows)
    for _ in range(300):
        value = bytearray(victim.value)
        for _ in range(rng.randint(1, 8)):
            value[rng.randrange(len(value))] = rng.randrange(256)
        log.append(FLOWS, b"edge", bytes(value))
    publish(log, batches[:20], clock)
    scoring = run(log, settings())
    counters = site(scoring).counters
    assert counters.consumed == 320
    assert counters.dead > 100
    assert balanced(site(scoring))


def test_a_dead_letter_is_out_once_however_often_the_scorer_dies(tmp_path: Path, batches: list[Batch]) -> None:
    log, clock = memory()
    log.consumer("keeps it all", FLOWS)
    store = SnapshotStore(str(tmp_path))
    for k in range(0, 120, 10):
        log.append(FLOWS, b"edge", b"poison %d" % k)
        publish(log, batches[k : k + 10], clock)
        kill(run(log, settings(score=SNAPSHOTS), store))
    assert [value for _, value, _ in read_all(log, DLQ)] == [b"poison %d" % k for k in range(0, 120, 10)]


def test_one_sensor_an_hour_ahead_and_one_an_hour_behind_change_nothing_for_the_right_one() -> None:
    config = settings(windows={"idle_timeout": "5s", "max_ahead": "60s", "max_behind": "60s"})
    sensors = ("right", "ahead", "behind")
    batches = stream(sensors=sensors, skew_s={"ahead": 3600.0, "behind": -3600.0})
    clock = LogClock()
    log = MemoryLog(clock_ns=clock)
    truth = {s: sum(b.flows for b in batches if b.origin.sensor == s) for s in sensors}
    for batch in batches:
        # The broker's clock is right.
        clock.now_ns = batch.time_ns - {"right": 0, "ahead": 3600, "behind": -3600}[batch.origin.sensor] * 10**9
        log.append(FLOWS, batch.origin.sensor.encode(), batch.value, batch.origin.headers())
    scoring = run(log, config)
    windows = site(scoring).scorer.buffer
    assert windows.counters.future == truth["ahead"]
    assert windows.counters.fell_behind == 1
    assert 0.7 * truth["behind"] < windows.counters.late <= truth["behind"]
    assert windows.counters.closed >= truth["right"] * 0.95
    assert balanced(site(scoring))
    assert findings(log)


def test_a_second_scorer_takes_half_the_partitions_and_gives_them_back(tmp_path: Path) -> None:
    sites = {name: stream(seed=n, sensors=(name,)) for n, name in enumerate(("paris", "berlin"))}
    together = [b for pair in zip(*sites.values(), strict=True) for b in pair]
    logs = []
    for disturbed in (False, True):
        log, clock = memory(partitions=2)
        log.consumer("keeps it all", FLOWS)
        store = SnapshotStore(str(tmp_path / str(disturbed)))
        config = settings(score=SNAPSHOTS)
        scorers = [Scoring(config, log, store=store)]
        for k in range(0, len(together), 20):
            publish(log, together[k : k + 20], clock)
            if disturbed and k == 200:
                scorers.append(Scoring(config, log, store=store))
            if disturbed and k == 440:
                scorers.pop().close()
            for _ in range(3):
                for scoring in scorers:
                    scoring.turn(0.0)
            if disturbed and k == 400:
                assert [len(s.seats) for s in scorers] == [1, 1]
        assert len(scorers[0].seats) == 2
        scorers[0].close()
        logs.append(log)
    by_host: list[dict[bytes | None, list[bytes | None]]] = []
    for log in logs:
        found: dict[bytes | None, list[bytes | None]] = {}
        for key, value, _ in read_all(log, ANOMALIES):
            found.setdefault(key, []).append(value)
        by_host.append(found)
    assert by_host[0] == by_host[1]
    assert sum(len(v) for v in by_host[0].values()) > 5


def test_a_zombie_publishes_nothing_once_somebody_has_taken_over(
    batches: list[Batch], undisturbed: list[bytes]
) -> None:
    log, clock = memory()
    log.consumer("keeps it all", FLOWS)
    publish(log, batches[:150], clock)
    zombie = run(log, settings())
    # It stops for so long that the group gives its partition to another.
    with log._changed:
        group = log._groups["flowsage-scorer", FLOWS]
        group.members.clear()
        group.owner.clear()
    publish(log, batches[150:], clock)
    run(log, settings())
    assert findings(log) == undisturbed
    stopped = threading.Event()
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        stopped.set()

    zombie._say = say
    zombie.run(stopped)
    assert zombie.fenced == 1
    assert "taken over by another scorer" in told[0]
    assert findings(log) == undisturbed


def test_offsets_move_up_to_the_oldest_open_window_and_the_commit_says_what_is_out(batches: list[Batch]) -> None:
    log, clock = memory()
    publish(log, batches, clock)
    scoring = run(log, settings())
    at = site(scoring)
    scoring.close()
    committed = log.committed("flowsage-scorer", FLOWS)[0]
    closed_until = at.scorer.buffer.closed_until_ns
    with_open = [n for n, b in enumerate(batches) if any(t >= closed_until for t in starts(b))]
    assert committed.offset == at.oldest_open == with_open[0] < at.position == len(batches)
    assert Progress.of(committed) == Progress(at.pane_ns, at.windows_ns, len(batches))
    assert at.pane_ns == at.windows_ns


def starts(batch: Batch) -> list[int]:
    with pa.ipc.open_stream(batch.value) as reader:
        times: list[int] = reader.read_all().column("start_ns").to_pylist()
        return times


def snapshots(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"flowsage-scorer/{FLOWS}/0/*.json"))


def test_a_torn_or_foreign_snapshot_is_refused_by_name_and_the_one_before_it_used(
    tmp_path: Path, batches: list[Batch], undisturbed: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    log, clock = memory()
    log.consumer("keeps it all", FLOWS)
    store = SnapshotStore(str(tmp_path), keep=10)
    config = settings(score=SNAPSHOTS)
    scoring = Scoring(config, log, store=store)
    for k in range(0, 250, 5):
        publish(log, batches[k : k + 5], clock)
        scoring.turn(0.0)
        assert scoring._writer is not None
        scoring._writer.close()
    kill(scoring)
    files = snapshots(tmp_path)
    assert len(files) == 10
    torn, emptied, foreign, older, other = files[:-6:-1]
    arrays = torn.with_suffix(".safetensors")
    arrays.write_bytes(arrays.read_bytes()[: arrays.stat().st_size // 2])
    emptied.write_bytes(b"")
    foreign.write_text(foreign.read_text().replace('"flowsage-scorer"', '"somebody else"'))
    body = json.loads(older.read_text())
    older.write_text(json.dumps(body | {"format": "flowsage-snapshot-0"}))
    body = json.loads(other.read_text())
    body["values"]["fingerprint"]["windows.window"] = "60000000000"
    store_digest(other, body)
    told: list[str] = []
    scoring = Scoring(config, log, store=store, say=told.append)
    publish(log, batches[250:], clock)
    while scoring.turn(0.0):
        pass
    assert findings(log) == undisturbed
    for path in (torn, emptied, foreign, older, other):
        assert any(f"{path.name} is refused" in r.message for r in caplog.records), path
    assert any("learnt under other settings (windows.window was" in r.message for r in caplog.records)
    assert any("name another --state to begin anew" in r.message for r in caplog.records)
    assert f"goes on from the snapshot at offset {int(files[-6].stem)}" in told[0]
    scoring.close()


def model_of(path: Path, batches: list[Batch]) -> Path:
    """A model directory that has learnt from these."""
    log, clock = memory()
    publish(log, batches, clock)
    learnt = site(run(log, settings())).scorer
    trained = {"flows": 1, "hosts": 1, "windows": 1, "first_ns": 0, "until_ns": learnt.buffer.closed_until_ns}
    artifact.save(path, learnt.detector, trained=trained)
    return path


def test_a_model_directory_that_has_moved_is_the_same_and_another_is_taken_in_where_the_snapshot_goes_on(
    tmp_path: Path, batches: list[Batch]
) -> None:
    old, moved = model_of(tmp_path / "old", batches[:80]), tmp_path / "elsewhere" / "moved"
    other = model_of(tmp_path / "other", batches[:100])
    scored = []
    for directory in (old, moved, other):
        log, clock = memory()
        log.consumer("keeps it all", FLOWS)
        store = SnapshotStore(str(tmp_path / f"state {directory.name}"))
        publish(log, batches[:200], clock)
        kill(run(log, settings(score=SNAPSHOTS, model={"directory": str(old)}), store))
        if directory == moved:
            shutil.copytree(old, moved)
            shutil.rmtree(old)
        config, told = settings(score=SNAPSHOTS, model={"directory": str(directory)}), list[str]()
        scoring = Scoring(config, log, store=store, say=told.append)
        scoring.turn(0.0)
        assert "goes on from the snapshot" in told[0]
        model = site(scoring).scorer.model
        assert model is not None
        wait_for_model(model)
        publish(log, batches[200:], clock)
        while scoring.turn(0.0):
            pass
        assert model.loads == (directory == other)
        assert model.digest == artifact.read_manifest(directory).digest
        assert balanced(site(scoring))
        scoring.close()
        scored.append(findings(log))
        if directory == moved:
            moved.rename(old)
    assert scored[0]
    assert scored[1] == scored[0] != scored[2]


def wait_for_model(model: ModelDirectory) -> None:
    """Until what is in the directory is loaded; it would be looked at when the next pane ends, and not waited for."""
    assert model.renewed(-1, None) is None
    if model._loading is not None:
        model._loading.exception(60)


def store_digest(path: Path, body: dict[str, object]) -> None:
    from flowsage.pipelines.state import _digest

    body.pop("sha256")
    path.write_text(json.dumps(body | {"sha256": _digest(body)}))


def test_snapshots_are_kept_to_a_number_and_what_a_killed_writer_left_is_swept(
    tmp_path: Path, batches: list[Batch]
) -> None:
    log, clock = memory()
    store = SnapshotStore(str(tmp_path), keep=2)
    litter = tmp_path / "flowsage-scorer" / FLOWS / "0" / ".writing-dead"
    litter.mkdir(parents=True)
    (litter / "part").write_bytes(b"x")
    scoring = Scoring(settings(score={"snapshot_interval": 0, "snapshot_windows": 2}), log, store=store)
    for k in range(0, 200, 5):
        publish(log, batches[k : k + 5], clock)
        scoring.turn(0.0)
        assert scoring._writer is not None
        scoring._writer.close()
    assert scoring._writer.written > 4
    names = Counter(p.suffix for p in litter.parent.iterdir())
    assert names == {".json": 2, ".safetensors": 2}


def test_a_snapshot_of_a_topic_that_was_made_anew_is_refused(
    tmp_path: Path, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    store = SnapshotStore(str(tmp_path))
    log, clock = memory()
    publish(log, batches, clock)
    run(log, settings(score=SNAPSHOTS), store).close()
    log, clock = memory()
    publish(log, batches[:10], clock)
    scoring = run(log, settings(score=SNAPSHOTS), store)
    assert site(scoring).counters.taken == 10
    assert "it was made anew" in caplog.text
    scoring.close()


def test_a_heartbeat_moves_the_clock_and_carries_no_flows() -> None:
    batches = [b for b in stream(20.0) if b.flows]
    log, clock = memory()
    publish(log, batches, clock)
    time = batches[-1].time_ns + 30 * 10**9
    first = heartbeat(batches[-1], watermark_ns=time, drained_ns=time)
    publish(log, [first, heartbeat(first, drained_ns=time + 10**10)], clock)
    scoring = run(log, settings())
    assert site(scoring).scorer.buffer.open_flows() == 0
    assert site(scoring).scorer.counters.scored == sum(b.flows for b in batches)


@pytest.mark.parametrize("renames", [True, False])
def test_a_snapshot_comes_back_as_it_was_from_a_folder_and_from_a_store_without_names(
    tmp_path: Path, renames: bool
) -> None:
    store = SnapshotStore(f"file://{tmp_path}/state")
    # As an object store: no file is renamed, each is put there whole.
    store._local = renames
    rng = np.random.default_rng(0)
    arrays = {
        "a/b": rng.integers(0, 2**63, 1000, np.uint64),
        "c": rng.random((3, 4)),
        "none": np.empty((0, 2), np.int32),
    }
    for position in (5, 7):
        store.write(Snapshot(("g", "t", 3), position, arrays, {"of": position, "float": 0.1}))
    found = list(store.newest(("g", "t", 3)))
    assert [s.position for s in found] == [7, 5]
    assert [s.values for s in found] == [{"of": 7, "float": 0.1}, {"of": 5, "float": 0.1}]
    assert found[0].arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[0].arrays[name].dtype == array.dtype
        assert np.array_equal(found[0].arrays[name], array)
    assert list(store.newest(("g", "t", 4))) == []
    assert list(store.newest(("other", "t", 3))) == []


def test_a_state_that_cannot_be_used_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for where in (str(tmp_path / "file" / "below"), "nowhere://x"):
        with pytest.raises(ConfigurationError, match="cannot be used"):
            SnapshotStore(where)
