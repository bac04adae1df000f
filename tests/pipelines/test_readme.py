"""What the README says is there, is there."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from flowsage.models import analytics
from flowsage.models.alarms import AlarmConfig
from flowsage.pipelines.cli import main
from flowsage.pipelines.findings import TITLES
from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.metrics import METRICS
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.status import fetch
from tests.broker import Broker, free_ports
from tests.collector.wires import eventually, ip
from tests.conftest import ROOT
from tests.pipelines.test_replay import scan_flows

README = (ROOT / "README.md").read_text()


def test_every_metric_is_in_the_table_and_nothing_else() -> None:
    suffix = {"counter": "_total", "gauge": "", "info": "_info"}
    table = set(re.findall(r"^\| `(flowsage_\w+)", README, re.M))
    assert table - {"flowsage_pane_seconds"} == {m.name + suffix[m.kind] for m in METRICS}


def test_every_analytic_is_in_the_table_as_the_code_has_it() -> None:
    words = {name: f"*{name}*" for name in ("host", "peer", "service")} | {"observed": "*n*", "count": "*n*"}
    words |= {"span": "*time*", "on": ""}
    shapes = {"beacon": "every *time*, *n* times", "session": "*time*"}
    block_s = Settings().alarms.block / 10**9
    assert block_s == 15 * 60
    assert AlarmConfig().ready_blocks * block_s == 3600
    rows = []
    for i, a in enumerate(analytics.TABLE):
        since = "at once" if analytics.FIRST[i] else "after a block" if analytics.EARLY[i] else "after an hour"
        sentence = a.words.format(**words, shape=shapes.get(a.name))
        rows.append(f"| {TITLES[a.name]} | `{a.name}` | {sentence} | {a.technique or ''} | {since} |")
    table = README[README.index("| `finding_info.title` |") :].split("\n\n")[0].splitlines()[2:]
    assert table == rows


def test_the_words_that_are_explained_have_the_lengths_that_are_set() -> None:
    settings = Settings()
    for word, length, text in (
        ("flow record", settings.sensor.active_timeout, "every 60 s"),
        ("pane", settings.windows.pane, "10 s of event time"),
        ("window", settings.windows.window, "60 s of event time"),
        ("block", settings.alarms.block, "15 min of event time"),
    ):
        (row,) = re.findall(rf"^\| {word} \| (.*) \|$", README, re.M)
        assert text in row
        assert length == int(re.findall(r"\d+", text)[0]) * (60 if "min" in text else 1) * 10**9


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Findings, JSON, of the host that sweeps in the tests' flow file."""
    folder = tmp_path_factory.mktemp("scan")
    scan_flows(folder / "scan.parquet", minutes=90)
    replay = ["replay", str(folder / "scan.parquet"), "--findings", str(folder / "findings.jsonl")]
    subprocess.run([sys.executable, "-m", "flowsage.pipelines.cli", *replay], check=True)
    return (folder / "findings.jsonl").read_text().splitlines()


def test_the_finding_that_is_shown_is_one(findings: list[str]) -> None:
    def is_part(shown: object, real: object) -> bool:
        """Fields and entries may be left out, and numbers rounded."""
        match shown, real:
            case dict(), dict():
                return all(k in real and is_part(v, real[k]) for k, v in shown.items())
            case list(), list():
                return all(is_part(*both) for both in zip(shown, real, strict=False)) and len(shown) <= len(real)
            case float(), float():
                return shown == pytest.approx(real, rel=0.02)
        return shown == real

    (text,) = re.findall(r"```json\n(.*?)```", README, re.S)
    shown = json.loads(text)
    assert is_part(shown, json.loads(findings[0]))
    for field in re.findall(r"^\| `(message|time|finding_info|observables|unmapped|evidences)", README, re.M):
        assert field in shown


def test_every_command_and_option_that_is_shown_exists() -> None:
    shown = set()
    for line in re.findall(r"^flowsage [^\n]+", README, re.M):
        words = shlex.split(line.split("#")[0].split("|")[0])
        shown.add(words[1])
        help_text = CliRunner().invoke(main, [words[1], "--help"]).output
        for option in (w for w in words if w.startswith("--")):
            assert option in help_text, line
    assert shown >= {"run", "collect", "replay", "lab", "status", "topics", "score", "watch", "unit"}


def example(words: str) -> str:
    """The one example of Python that has these words in it."""
    (found,) = [e for e in re.findall(r"```python\n(.*?)```", README, re.S) if words in e]
    return str(found)


def test_the_example_of_a_host_graph_runs(tmp_path: Path) -> None:
    scan_flows(tmp_path / "lab.parquet", minutes=12)
    subprocess.run([sys.executable, "-c", example("host_graph")], cwd=tmp_path, check=True)


def test_the_example_of_a_subscriber_prints_findings(broker: Broker, findings: list[str]) -> None:
    broker.create_topic("flowsage.anomalies.v1")
    with closing(KafkaLog(broker.settings())) as log:
        for line in findings:
            log.append("flowsage.anomalies.v1", b"host", line.encode())
    program = example("subscribe").replace("kafka1:9092", broker.bootstrap)
    with Command([sys.executable, "-uc", program]) as subscriber:
        subscriber.wait("expected")


class Command:
    """A command that runs until it is told to stop; what it says can be waited for."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said.append(line)

    def wait(self, text: str) -> None:
        eventually(lambda: text in "".join(self.said) or self._process.poll() is not None, 240)
        assert text in "".join(self.said), "".join(self.said)

    def stop(self) -> str:
        """SIGTERM; it must end well."""
        self._process.terminate()
        assert self._process.wait(240) == 0, "".join(self.said)
        self._reader.join()
        return "".join(self.said)

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def port() -> Iterator[str]:
    """A port of this machine that something can be sent to; the name of its other end is one longer."""
    name = f"fsrm{os.getpid() % 1_000_000}"
    ip("link", "add", name, "type", "veth", "peer", "name", name + "x")
    for end in (name, name + "x"):
        ip("link", "set", end, "addrgenmode", "none")
        ip("link", "set", end, "up")
    yield name
    ip("link", "delete", name)


def test_the_set_up_of_two_machines_works_as_pasted(broker: Broker, port: str, tmp_path: Path) -> None:
    (block,) = (b for b in re.findall(r"```\n(.*?)```", README, re.S) if b.startswith("flowsage topics"))
    here = {"kafka1:9092": broker.bootstrap, "eth0": port, "/var/lib/flowsage/state": str(tmp_path / "state")}
    lines = [shlex.split(line.split("#")[0]) for line in block.splitlines()]
    topics, collect, score, watch = (
        [sys.executable, "-m", "flowsage.pipelines.cli", *(here.get(word, word) for word in line[1:])] for line in lines
    )
    metrics = free_ports(1)[0]
    subprocess.run(topics, check=True)
    with (
        Command(collect, FLOWSAGE_SENSOR__NAME=port) as sensor,
        Command(score, FLOWSAGE_METRICS__PORT=str(metrics)) as scorer,
        Command(watch) as watcher,
    ):
        sensor.wait("watching")
        frames = [
            bytes(Ether() / IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1000 + n, dport=53)) for n in range(50)
        ]
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind((port + "x", 0))
            for frame in frames:
                wire.send(frame)
        scorer.wait("metrics")
        assert "the ledger closes" in sensor.stop()
        eventually(lambda: fetch("127.0.0.1", metrics).get("flowsage_flows_consumed_total", {}).get("", 0) >= 50, 240)
        scorer.stop()
        watcher.stop()
