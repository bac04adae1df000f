"""FlowSAGE under systemd: the units are right, and what they wait for is told over a real socket."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from flowsage.collector.agent import Agent
from flowsage.collector.errors import FlowsageError
from flowsage.collector.service import Service
from flowsage.pipelines.cli import main
from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.scoring import Scoring
from flowsage.pipelines.settings import KafkaSettings, Settings
from flowsage.pipelines.unit import KINDS, closed_to_others, unit
from tests.broker import Broker
from tests.conftest import ROOT

COMMAND = [sys.executable, "-m", "flowsage.pipelines.cli"]
BEAT_S = 0.2


class Manager:
    """A service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address[0] == "@" else address)

    def environment(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": str(round(2 * BEAT_S * 1e6))}

    def told(self, word: str, within_s: float = 60) -> str:
        """The next message that has `word` in it; those before it are forgotten."""
        until = time.monotonic() + within_s
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            message = self._socket.recv(4096).decode()
            if word in message:
                return message
        raise AssertionError(f"nobody told {word}")

    def silent(self, for_s: float) -> bool:
        self._socket.settimeout(for_s)
        try:
            self._socket.recv(4096)
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    there = Manager(str(tmp_path / "notify") if request.param == "path" else f"@flowsage-{os.getpid()}")
    yield there
    there.close()


def test_life_is_told_no_more_often_than_the_watchdog_asks(manager: Manager) -> None:
    now = [100.0]
    service = Service(manager.environment(), clock=lambda: now[0])
    service.ready("watching eth0")
    assert manager.told("READY=1") == "READY=1\nSTATUS=watching eth0"
    for _ in range(3):
        service.alive()
    assert manager.told("WATCHDOG=1") == "WATCHDOG=1"
    assert manager.silent(0.05)
    now[0] += BEAT_S
    service.alive()
    assert manager.told("WATCHDOG=1")
    service.stopping()
    assert manager.told("STOPPING=1")


def test_a_child_of_the_service_and_one_without_a_manager_tell_nothing(manager: Manager) -> None:
    child = Service(manager.environment() | {"WATCHDOG_PID": "1"})
    child.alive()
    assert manager.silent(0.05)
    for address in ("", "/absent/socket", "vsock:2:1234"):
        service = Service({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1"})
        service.ready("here")
        service.alive()
        service.stopping()


def test_a_manager_that_does_not_listen_holds_up_no_work(manager: Manager) -> None:
    service = Service(manager.environment(), clock=iter(range(100_000)).__next__)
    began = time.monotonic()
    for _ in range(5_000):  # far more than a socket holds
        service.alive()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("manager", ["abstract"], indirect=True)
def test_the_sensor_tells_that_it_is_ready_alive_and_stopping(manager: Manager, tmp_path: Path) -> None:
    collect = [
        *COMMAND,
        "collect",
        "--interface",
        "lo",
        "--name",
        f"fsun{os.getpid()}",
        "--output",
        str(tmp_path / "f"),
    ]
    with subprocess.Popen(collect, env=os.environ | manager.environment()) as sensor:
        assert manager.told("READY=1") == "READY=1\nSTATUS=watching lo"
        began = time.monotonic()
        for _ in range(4):
            assert manager.told("WATCHDOG=1", 5)
        assert time.monotonic() - began > 2 * BEAT_S  # and it has no privilege any more
        sensor.terminate()
        assert manager.told("STOPPING=1", 5)
        assert sensor.wait(30) == 0


@pytest.mark.parametrize("manager", ["path"], indirect=True)
def test_the_scorer_tells_that_it_is_ready_alive_and_stopping(manager: Manager, broker: Broker) -> None:
    broker.create_topic("unit.flows.v1")
    score = [*COMMAND, "score", "--kafka", broker.bootstrap, "--prefix", "unit", "--no-metrics"]
    with subprocess.Popen(score, env=os.environ | manager.environment()) as scorer:
        assert "STATUS=scoring unit.flows.v1 in group flowsage-scorer" in manager.told("READY=1", 120)
        for _ in range(3):
            assert manager.told("WATCHDOG=1", 60)
        scorer.terminate()
        assert manager.told("STOPPING=1", 60)
        assert scorer.wait(120) == 0


def test_a_scorer_whose_kafka_is_away_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, beats = threading.Event(), []

    def alive() -> None:
        beats.append(time.monotonic())
        if len(beats) == 3:
            stopped.set()

    monkeypatch.setattr("flowsage.pipelines.scoring.RETRY_S", 0.01)
    log = KafkaLog(KafkaSettings(bootstrap_servers=("127.0.0.1:1",)), timeout_s=0.1)
    Scoring(Settings(), log, alive=alive).run(stopped, time.monotonic() + 60)
    assert len(beats) == 3


def test_run_ends_when_its_sensor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than wait for ever for packets that nobody counts any more."""
    steps = iter(range(3))

    def step(_: Agent) -> int:
        if next(steps, None) is None:
            raise FlowsageError("the ring is broken")
        return 0

    monkeypatch.setattr(Agent, "step", step)
    done = CliRunner().invoke(main, ["run", "--interface", "lo", "--no-metrics", "--duration", "5m"])
    assert done.exit_code == 1
    assert done.stderr.endswith("flowsage: the ring is broken\n")


@pytest.mark.parametrize("kind", KINDS)
def test_systemd_has_nothing_against_the_unit(kind: str, tmp_path: Path) -> None:
    assert shutil.which("systemd-analyze"), "set-up installs it (Debian package systemd)"
    path = tmp_path / f"flowsage-{kind}.service"
    done = CliRunner().invoke(main, ["unit", kind])
    assert done.exit_code == 0
    path.write_text(done.stdout)
    verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=one", str(path)]
    verified = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    security = ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(path)]
    assert subprocess.run(security, capture_output=True, check=False).returncode == 0  # "OK": 3.0 of 10


def test_a_unit_names_this_installation_as_systemd_reads_paths(tmp_path: Path) -> None:
    (tmp_path / "50% of it").mkdir()
    python = tmp_path / "50% of it" / "python"
    text = unit("score", Path("/etc/50%.toml"), python=python)
    assert f'ExecStartPre="{tmp_path}/50%% of it/python" -m flowsage.models.warm\n' in text
    assert f'ExecStart="{tmp_path}/50%% of it/python" -m flowsage.pipelines.cli score --config $' in text
    assert "LoadCredential=flowsage.toml:/etc/50%%.toml\n" in text
    python.with_name("flowsage").touch()
    assert f'ExecStart="{tmp_path}/50%% of it/flowsage" collect ' in unit("collect", Path("c"), python=python)


def test_an_installation_that_the_scorers_user_cannot_get_to_is_told(tmp_path: Path) -> None:
    """As a virtual environment is that lies in root's home, or whose interpreter does."""
    home = tmp_path / "home"
    (home / "venv").mkdir(parents=True)
    python = home / "venv" / "python"
    python.touch()
    home.chmod(0o700)
    (tmp_path / "python").symlink_to(python)
    assert closed_to_others(tmp_path / "python") in (home, *home.parents)
    assert closed_to_others(Path("/usr/bin/env")) is None


def test_every_option_in_the_units_exists() -> None:
    for kind in KINDS:
        text = (ROOT / "pipelines" / f"{kind}.service").read_text()
        (start,) = (line for line in text.splitlines() if line.startswith("ExecStart="))
        assert start == f"ExecStart=@FLOWSAGE@ {kind} --config ${{CREDENTIALS_DIRECTORY}}/flowsage.toml"
        assert "--config" in CliRunner().invoke(main, [kind, "--help"]).output
