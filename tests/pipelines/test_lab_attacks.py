"""The lab's misbehaviour: what the truth says is what is on the wire, and labels follow it."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowsage.collector.errors import InputError, SchemaError
from flowsage.pipelines.lab import ATTACKS, Truth, label_file, label_flows, read_truth
from flowsage.pipelines.lab.truth import write_truth
from tests.pipelines.lab_played import Played, flows_of, from_attacker, handshakes, needs_nmap, needs_root, play

LEAST_STEPS = {"worm": 99, "slow-scan": 12, "guess": 10, "beacon": 8, "exfil": 2, "flood": 200}


@pytest.fixture(name="played", scope="module")
def fixture_played() -> Played:
    return play()


@needs_nmap
@needs_root
def test_the_scan_sends_bare_syns_from_the_attacker_to_every_inside_host(played: Played) -> None:
    truth = played.truths["scan"]
    assert (truth.attacker, truth.status) == ("office2", "done")
    probes = [p for p in handshakes(from_attacker(played, "scan")) if p[2] in truth.source_ports]
    assert len({(p[3], p[4]) for p in probes}) == 20 * len(truth.targets)
    assert {step.target for step in truth.steps} == set(truth.targets) == {p[3] for p in probes}
    assert len(truth.targets) == 17
    for step in truth.steps:
        seen = min(p[0] for p in probes if p[3] == step.target)
        assert abs(seen - step.time_ns) < 500_000_000


@needs_root
@pytest.mark.parametrize("name", ["worm", "slow-scan", "guess", "beacon", "exfil", "flood"])
def test_each_step_of_the_truth_is_a_handshake_on_the_wire_at_that_time(played: Played, name: str) -> None:
    truth = played.truths[name]
    assert truth.attacker == ATTACKS[name].attacker
    assert truth.status == ("stopped" if name == "slow-scan" else "done")
    assert truth.error is None
    # A port may serve twice: a key has the times of all its SYNs.
    on_the_wire: dict[tuple[int, str, int], list[int]] = {}
    for packet in from_attacker(played, name):
        if packet[6] & 0x12 == 0x02:
            on_the_wire.setdefault((packet[2], packet[3], packet[4]), []).append(packet[0])
    assert len(truth.steps) >= LEAST_STEPS[name]
    for step in truth.steps:
        seen = on_the_wire[step.source_port, step.target, step.port]
        assert any(0 <= at - step.time_ns < 500_000_000 for at in seen)


@needs_root
def test_the_worm_tries_one_port_of_many_hosts_most_of_which_do_not_answer(played: Played) -> None:
    truth = played.truths["worm"]
    tried = {p[3] for p in handshakes(from_attacker(played, "worm")) if p[2] in truth.source_ports}
    answered = {p[1] for p in played.packets if p[3] == truth.address and p[2] == 445 and p[6] & 0x12 == 0x12}
    assert len(tried) == 100
    assert truth.nth_target_ns(10) is not None
    assert truth.nth_target_ns(101) is None
    assert 1 <= len(answered & tried) < 20


@needs_root
def test_guessing_exchanges_keys_and_is_refused_each_time(played: Played) -> None:
    assert played.counters["fin1"]["guesses_refused"] == 10
    assert played.counters["jump"]["ssh_refused"] >= 10
    truth = played.truths["guess"]
    back = sum(p[7] for p in played.packets if p[1] == truth.targets[0] and p[4] in truth.source_ports)
    assert back > 10 * 1_000  # a key exchange and a refusal are more than a kilobyte


@needs_root
def test_beats_keep_their_period_within_the_jitter(played: Played) -> None:
    times = [step.time_ns for step in played.truths["beacon"].steps]
    gaps = [(after - before) / 1e9 for before, after in pairwise(times)]
    assert all(0.8 * 0.9 - 0.01 < gap < 0.8 * 1.1 + 0.3 for gap in gaps)
    assert played.truths["beacon"].nth_step_ns(8) == times[7]
    assert played.truths["beacon"].nth_step_ns(9) is None


@needs_root
def test_the_exfiltration_leaves_the_network_whole(played: Played) -> None:
    out = sum(packet[7] for packet in from_attacker(played, "exfil"))
    assert out > 6_000_000
    assert played.counters["dropzone"]["upload_bytes"] == 6_000_000


@needs_root
def test_the_truth_can_be_read_while_attacks_run(played: Played) -> None:
    assert played.live["slow-scan"].end_ns is None
    assert played.live["slow-scan"].steps
    assert played.live["exfil"].end_ns is not None
    lines = [json.loads(line) for line in played.truth_lines]
    assert [line["attack"] for line in lines] == list(played.truths)
    assert ("worm", "running") in played.told
    assert ("worm", "done") in played.told


@needs_root
def test_labels_are_exactly_the_attacks_connections(played: Played) -> None:
    flows = flows_of(played.packets)
    labelled = label_flows(flows, played.truths.values()).to_pylist()
    by_attack = Counter(row["attack"] for row in labelled if row["label"])
    for name in ("worm", "slow-scan", "guess", "beacon", "exfil", "flood"):
        steps = {(step.source_port, step.target, step.port) for step in played.truths[name].steps}
        assert by_attack[name] == len(steps), name
    attackers = {truth.address for truth in played.truths.values()}
    assert all(row["src_ip"] in attackers for row in labelled if row["label"])
    assert all(row["attack"] == "" for row in labelled if not row["label"])
    # The attackers' own business stays unlabelled.
    assert any(row["src_ip"] in attackers and row["dst_port"] in (80, 443) and not row["label"] for row in labelled)


# Labels


def a_truth(**changes: object) -> Truth:
    values: dict[str, object] = {
        "id": "worm-1",
        "attack": "worm",
        "attacker": "office3",
        "address": "10.0.0.3",
        "proto": "tcp",
        "targets": ("10.0.0.7", "10.0.0.8"),
        "ports": (445,),
        "start_ns": 10_000_000_000,
        "end_ns": 20_000_000_000,
    }
    return Truth(**{**values, **changes})  # type: ignore[arg-type]


def test_a_flow_is_labelled_by_attacker_target_port_and_time() -> None:
    rows = [
        (12_000_000_000, "10.0.0.3", "10.0.0.7", 50_000, 445),  # the attack
        (12_000_000_000, "10.0.0.7", "10.0.0.3", 445, 50_000),  # the same, seen from the other end
        (12_000_000_000, "10.0.0.3", "10.0.0.7", 50_000, 80),  # another port
        (12_000_000_000, "10.0.0.3", "10.0.0.9", 50_000, 445),  # another target
        (12_000_000_000, "10.0.0.4", "10.0.0.7", 50_000, 445),  # another source
        (9_000_000_000, "10.0.0.3", "10.0.0.7", 50_000, 445),  # before
        (24_000_000_000, "10.0.0.3", "10.0.0.7", 50_000, 445),  # after
    ]
    names = ("start_ns", "src_ip", "dst_ip", "src_port", "dst_port")
    flows = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])
    assert label_flows(flows, [a_truth()]).column("label").to_pylist() == [1, 1, 0, 0, 0, 0, 0]
    assert label_flows(flows, [a_truth(source_ports=(50_001,))]).column("label").to_pylist() == [0] * 7
    assert label_flows(flows, [a_truth(end_ns=None)]).column("label").to_pylist() == [1, 1, 0, 0, 0, 0, 1]
    assert label_flows(flows, []).column("attack").to_pylist() == [""] * 7


def test_labels_need_only_times_and_addresses() -> None:
    flows = pa.table(
        {"start_ns": [11_000_000_000], "src_ip": pa.array(["10.0.0.3"]).dictionary_encode(), "dst_ip": ["10.0.0.8"]}
    )
    assert label_flows(flows, [a_truth()]).column("attack").to_pylist() == ["worm"]
    with pytest.raises(SchemaError, match="dst_ip"):
        label_flows(flows.drop_columns(["dst_ip"]), [a_truth()])


def test_a_flow_file_is_labelled_from_a_truth_file(tmp_path: Path) -> None:
    flows = pa.table({"start_ns": [11_000_000_000, 0], "src_ip": ["10.0.0.3"] * 2, "dst_ip": ["10.0.0.8"] * 2})
    pq.write_table(flows, tmp_path / "flows.parquet")
    write_truth(tmp_path / "truth.jsonl", [a_truth()])
    assert read_truth(tmp_path / "truth.jsonl") == [a_truth()]
    assert label_file(tmp_path / "flows.parquet", tmp_path / "truth.jsonl", tmp_path / "out.parquet") == 1
    assert pq.read_table(tmp_path / "out.parquet").column("label").to_pylist() == [1, 0]
    (tmp_path / "truth.jsonl").write_text("not json\n")
    with pytest.raises(InputError, match="cannot read the truth file"):
        label_file(tmp_path / "flows.parquet", tmp_path / "truth.jsonl", tmp_path / "out.parquet")
