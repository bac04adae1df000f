"""`flowsage replay` and `flowsage run --pcap/--flows` as a user calls them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from scapy.all import IP, TCP, UDP, Ether, Raw, wrpcap

from flowsage.pipelines.cli import main

SECOND = 10**9
START = 1_700_000_040


def flowsage(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "flowsage.pipelines.cli", *map(str, arguments)],
        capture_output=True, text=True, check=False, env=os.environ | environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def scan_flows(path: Path, *, minutes: int = 100) -> Path:
    """An office where everybody uses two servers, and in the last ten minutes one host tries everyone's port 445."""
    rng = np.random.default_rng(0)
    rows = []
    for minute in range(minutes):
        for host in range(12):
            for _ in range(rng.poisson(2)):
                start = (START + minute * 60) * SECOND + int(rng.integers(0, 60 * SECOND))
                rows.append((start, f"10.0.0.{host + 10}", f"10.0.0.{1 + int(rng.integers(0, 2))}", 443, 5, 900))
        if minute >= minutes - 10:
            for target in range(40):
                start = (START + minute * 60) * SECOND + target * SECOND
                rows.append((start, "10.0.0.13", f"10.0.{minute}.{target}", 445, 0, 0))
    rows.sort()
    start, src, dst, port, rev, size = (list(c) for c in zip(*rows, strict=True))
    n = len(rows)
    table = {
        "start_ns": start, "end_ns": [s + SECOND for s in start], "src_ip": src, "dst_ip": dst,
        "src_port": [40_000 + i % 20_000 for i in range(n)], "dst_port": port, "proto": [6] * n,
        "packets_fwd": [5 if r else 1 for r in rev], "packets_rev": rev, "bytes_fwd": [400] * n, "bytes_rev": size,
        "tcp_flags_fwd": pa.array([0x1B if r else 0x02 for r in rev], pa.uint8()),
        "tcp_flags_rev": pa.array([0x1B if r else 0 for r in rev], pa.uint8()),
    }  # fmt: skip
    pq.write_table(pa.table(table), path)
    return path


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scan_flows(tmp_path_factory.mktemp("flows") / "flows.parquet")


def test_a_scan_in_a_flow_file_is_found_and_explained(scanned: Path, tmp_path: Path) -> None:
    out = tmp_path / "findings.jsonl"
    done = flowsage(
        "replay", scanned, "--findings", out, "--scores", tmp_path / "s.parquet", "--hosts", tmp_path / "h.parquet"
    )
    findings = [json.loads(line) for line in out.read_text().splitlines()]
    raised = [f for f in findings if f["activity_id"] == 1]
    assert raised
    assert {f["observables"][0]["value"] for f in raised} == {"10.0.0.13"}
    targets = {e["dst_endpoint"]["ip"] for f in raised for e in f["evidences"]}
    assert all(t.startswith("10.0.9") for t in targets), targets
    assert "1 findings" in done.stderr
    rows = pq.read_metadata(scanned).num_rows
    scores = pq.read_table(tmp_path / "s.parquet")
    assert len(scores) == rows
    assert np.isfinite(scores.column("flow_score").to_numpy()).all()
    hosts = pq.read_table(tmp_path / "h.parquet").to_pandas()
    assert set(hosts.columns) >= {"host", "window_start_ns", "window_end_ns", "score", "alert"}
    assert set(hosts[hosts.alert].host) == {"10.0.0.13"}


def test_scores_and_hosts_are_the_same_whether_findings_are_asked_for_or_not(scanned: Path, tmp_path: Path) -> None:
    def run(name: str, *more: object) -> list[bytes]:
        paths = [tmp_path / f"{name}-{what}.parquet" for what in ("scores", "hosts")]
        flowsage("replay", scanned, "--scores", paths[0], "--hosts", paths[1], *more)
        return [path.read_bytes() for path in paths]

    assert run("with", "--findings", tmp_path / "f.jsonl") == run("without")


def test_two_runs_give_the_same_bytes_and_half_a_file_the_same_first_half(scanned: Path, tmp_path: Path) -> None:
    def run(source: Path, name: str) -> tuple[Path, Path]:
        paths = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.parquet"
        flowsage("replay", source, "--findings", paths[0], "--scores", paths[1])
        return paths

    first, second = run(scanned, "a"), run(scanned, "b")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    half = tmp_path / "half.parquet"
    table = pq.read_table(scanned)
    pq.write_table(table.slice(0, len(table) // 2), half)
    scores, all_scores = (pq.read_table(p).column("flow_score").to_numpy() for p in (run(half, "c")[1], first[1]))
    # The last window of the half is cut off in the middle, so its flows are other ones.
    last = table.column("start_ns")[len(scores) - 1].as_py() // (60 * SECOND) * 60 * SECOND
    whole = int(np.searchsorted(table.column("start_ns").to_numpy(), last))
    assert whole > len(scores) - 200
    assert np.array_equal(scores[:whole], all_scores[:whole])


def test_run_with_a_flow_file_prints_findings_as_json_lines(scanned: Path) -> None:
    done = flowsage("run", "--flows", scanned)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines
    assert all(line["class_uid"] == 2004 for line in lines)


def packets() -> list[Ether]:
    out = []
    for n in range(20):
        flow = {"sport": 40_000 + n, "dport": 80}
        ends = (IP(src="10.0.0.1", dst="10.0.0.2"), IP(src="10.0.0.2", dst="10.0.0.1"))
        back = {"sport": 80, "dport": 40_000 + n}
        for k, layer in enumerate(
            (
                ends[0] / TCP(flags="S", **flow), ends[1] / TCP(flags="SA", **back), ends[0] / TCP(flags="A", **flow),
                ends[0] / TCP(flags="PA", **flow) / Raw(b"x" * 100), ends[0] / TCP(flags="FA", **flow),
                ends[1] / TCP(flags="FA", **back), ends[0] / TCP(flags="A", **flow),
            )
        ):  # fmt: skip
            packet = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / layer
            packet.time = START + n * 2 + k / 100
            out.append(packet)
    return out


def test_records_that_a_capture_gives_are_flows_that_are_read(tmp_path: Path) -> None:
    capture, records, ledger = tmp_path / "c.pcap", tmp_path / "r.parquet", tmp_path / "l.json"
    wrpcap(str(capture), packets())
    flowsage("replay", capture, "--records", records, "--ledger", ledger, "--scores", tmp_path / "s.parquet")
    table = pq.read_table(records).to_pandas()
    assert len(table) == 20
    assert (table.packets_fwd == 5).all()
    assert (table.packets_rev == 2).all()
    assert (table.end_reason == 3).all()
    assert (table.src_ip.astype(str) == "10.0.0.1").all()
    account = json.loads(ledger.read_text())
    assert account["packets"] == account["accounted_packets"] == 140
    assert account["balance"] == 0
    flowsage("replay", records, "--scores", tmp_path / "again.parquet")
    again, direct = (
        pq.read_table(tmp_path / n).column("flow_score").to_numpy() for n in ("again.parquet", "s.parquet")
    )
    assert np.array_equal(again, direct)


def test_without_timeouts_a_capture_gives_one_record_a_flow(tmp_path: Path) -> None:
    capture, records = tmp_path / "c.pcap", tmp_path / "r.parquet"
    late = []
    for n in range(5):
        packet = Ether() / IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=5000, dport=53) / Raw(b"q")
        packet.time = START + n * 3600
        late.append(packet)
    wrpcap(str(capture), late)
    flowsage("replay", capture, "--records", records)
    assert pq.read_metadata(records).num_rows == 5
    flowsage("replay", capture, "--records", records, "--no-timeouts")
    table = pq.read_table(records).to_pylist()
    assert [r["packets_fwd"] for r in table] == [5]


def test_a_capture_cut_in_a_packet_gives_what_is_whole_and_exits_with_1(tmp_path: Path) -> None:
    capture, records = tmp_path / "c.pcap", tmp_path / "r.parquet"
    wrpcap(str(capture), packets())
    capture.write_bytes(capture.read_bytes()[:-10])
    done = flowsage("replay", capture, "--records", records, code=1)
    assert len(done.stderr.strip().splitlines()) == 2
    assert "139 packets seen, 139 in 20 flow records; the ledger closes" in done.stderr
    assert sum(r["packets_fwd"] + r["packets_rev"] for r in pq.read_table(records).to_pylist()) == 139


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run"], 2, "name what to watch"),
        (["run", "--flows", "x", "--pcap", "y"], 2, "name only one thing to watch"),
        (["run", "--lab", "--interface", "eth0"], 2, "brings its own interfaces"),
        (["replay", "absent.pcap", "--records", "r"], 1, "absent.pcap: No such file"),
        (["replay", "/etc/hostname", "--records", "r"], 1, "neither a capture"),
        (["collect"], 2, "name an interface"),
        (["collect", "--interface", "absent0"], 1, "absent0"),
        (["run", "--interface", "absent0", "--no-metrics"], 1, "absent0"),
        (["run", "--nonsense"], 2, "--nonsense"),
        (["run", "--interface", "lo", "--attack", "5:scan"], 2, "it goes with --lab"),
        (["run", "--interface", "lo", "--model", "absent"], 1, "there is no model directory absent"),
        (["run", "--interface", "lo", "--findings", "/absent/f"], 1, "cannot write /absent/f"),
        (["run", "--lab", "--attack", "10:foo"], 2, "no misbehaviour is called 'foo': choose from scan, "),
        (["lab", "--attack", "foo@10"], 2, "write WHEN:ATTACK"),
        (["collect", "--interface", "lo", "--duration", "5x"], 2, "'5x' is not of the form \"15s\" (ms, s, m, h, d;"),
        (["run", "--interface", "lo", "--window", "long"], 2, "'long' is not of the form"),
        (["lab", "--flows", "/absent/f"], 1, "cannot write /absent/f"),
        (["lab", "--simulate", "s", "--days", "0"], 2, "days must be above 0"),
        (["watch", "--kafka", "127.0.0.1:1", "--severity", "awful"], 2, "there is no severity 'awful'"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_its_exit_code(arguments: list[str], code: int, sentence: str) -> None:
    done = flowsage(*arguments, code=code)
    assert sentence in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("option", ["--scores", "--hosts", "--findings"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_scored(
    option: str, scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowsage.pipelines.scorer.Scorer.take", lambda *_: pytest.fail("it has begun to score"))
    target = tmp_path / "absent" / "out.parquet"
    done = CliRunner().invoke(main, ["replay", str(scanned), option, str(target)])
    assert (done.exit_code, done.stderr) == (1, f"flowsage: cannot write {target}: No such file or directory\n")


def test_who_can_keep_no_compiled_kernels_is_told_what_to_set(
    scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numba, where a function is made whose folder and whose user's home cannot be written to."""
    from numba.core.caching import FunctionCache

    def make(*_: object, **__: object) -> None:
        monkeypatch.setattr(FunctionCache._impl_class, "_locator_classes", [])
        FunctionCache(make)

    monkeypatch.setattr("flowsage.pipelines.replay.replay", make)
    done = CliRunner().invoke(main, ["replay", str(scanned), "--scores", str(tmp_path / "s.parquet")])
    assert done.exit_code == 1
    assert "set NUMBA_CACHE_DIR to a folder that this user may write to" in done.stderr


def test_a_metrics_port_in_use_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = flowsage("run", "--interface", "lo", "--metrics-port", port, code=1)
    assert f"cannot serve metrics on 127.0.0.1:{port}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_wrong_interface_is_told_before_a_port_that_is_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = flowsage("run", "--interface", "absent0", "--metrics-port", taken.getsockname()[1], code=1)
    assert done.stderr.startswith("flowsage: there is no interface 'absent0' here")


def test_a_model_that_is_not_there_is_told_before_the_file_is_read(scanned: Path, tmp_path: Path) -> None:
    """Nor is the file of findings emptied that is there."""
    kept, absent = tmp_path / "f.jsonl", tmp_path / "absent"
    kept.write_text("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowsage.pipelines.replay.kind_of", lambda _: pytest.fail("it has begun to read"))
        done = CliRunner().invoke(main, ["replay", str(scanned), "--model", str(absent), "--findings", str(kept)])
    assert done.exit_code == 1
    assert done.stderr == f"flowsage: there is no model directory {absent}; `flowsage train` makes one\n"
    assert kept.read_text() == "kept"


def test_an_unknown_configuration_key_ends_with_78(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text("[sensor]\nidle = 3\n")
    assert "unknown configuration key 'sensor.idle'" in flowsage("collect", "--config", path, code=78).stderr
    assert "sensor.idle" in flowsage("run", "--check-config", code=78, FLOWSAGE_CONFIG=str(path)).stderr
    assert "configuration is valid" in flowsage("run", "--check-config").stderr


def test_a_file_that_goes_back_in_time_is_put_in_order_and_said_so(scanned: Path, tmp_path: Path) -> None:
    table = pq.read_table(scanned)
    mixed = tmp_path / "mixed.parquet"
    pq.write_table(pa.concat_tables([table.slice(500), table.slice(0, 500)]), mixed)
    done = flowsage("replay", mixed, "--scores", tmp_path / "m.parquet")
    assert "500 rows go back in time; they were put in order" in done.stderr
    flowsage("replay", scanned, "--scores", tmp_path / "s.parquet")
    scores = pq.read_table(tmp_path / "s.parquet").column("flow_score").to_numpy()
    again = pq.read_table(tmp_path / "m.parquet").column("flow_score").to_numpy()
    assert np.array_equal(np.roll(scores, -500), again)


def test_columns_under_the_names_that_others_give_them_are_said_not_to_be_read(scanned: Path, tmp_path: Path) -> None:
    table, renamed = pq.read_table(scanned), tmp_path / "renamed.parquet"
    pq.write_table(table.rename_columns([{"proto": "protocol"}.get(c, c) for c in table.column_names]), renamed)
    done = flowsage("replay", renamed, "--scores", tmp_path / "r.parquet")
    assert "columns that are not read: protocol (here proto)" in done.stderr
    assert "are not read" not in flowsage("replay", scanned, "--scores", tmp_path / "s.parquet").stderr


def test_a_sensor_needs_neither_torch_nor_numba() -> None:
    code = (
        "import sys; import flowsage.pipelines.cli, flowsage.pipelines.sensor; "
        "print([m for m in ('torch', 'numba', 'polars', 'networkx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--interface", "lo"],
        ["score", "--kafka", "127.0.0.1:1"],
        ["train", "F", "-o", "M"],
        ["replay", "F", "--scores", "S"],
    ],
)
def test_what_needs_the_model_says_where_it_is_not_installed_how_to_get_it(
    arguments: list[str], scanned: Path, tmp_path: Path
) -> None:
    places = {"F": str(scanned), "M": str(tmp_path / "m"), "S": str(tmp_path / "s")}
    arguments = [places.get(word, word) for word in arguments]
    code = f"import sys; sys.modules['numba'] = None; from flowsage.pipelines.cli import main; main({arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "flowsage: numba is not installed; `pip install 'flowsage[model]'` adds it\n"
    assert list(tmp_path.iterdir()) == []
