"""The lab as its user sees it: a context manager that owns a small company's network."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from flowsage.collector import errors
from flowsage.collector.errors import ConfigurationError, FlowsageError, PrivilegeError, UsageError
from flowsage.pipelines.lab import network
from flowsage.pipelines.lab.misbehaviour import prepare
from flowsage.pipelines.lab.plan import HOSTS
from flowsage.pipelines.lab.record import Recording
from flowsage.pipelines.lab.truth import Truth, from_json, read_truth
from flowsage.pipelines.quantities import seconds

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
_NEEDED = ("aiohttp", "asyncssh", "dnslib", "pyroute2")


@dataclass(frozen=True, kw_only=True)
class LabSettings:
    """How a lab is made. Two labs may run side by side under different prefixes."""

    prefix: str = "fslab"
    """Start of every name it makes: 1 to 5 lower-case letters and digits."""
    seed: int = 0
    """Of every host's dice and of the attacks' targets."""
    pace: float = 1.0
    """Factor on all benign pauses: 0.5 is twice as busy."""
    truth_path: Path | None = None
    """Where the truth is kept; None: a file in the temporary directory that is kept afterwards."""


@dataclass(frozen=True)
class LabHost:
    """A host: its `interface` is its port of the bridge, in the lab's `netns`, not in the host's own `namespace`."""

    name: str
    role: str
    department: str
    address: str
    interface: str
    namespace: str
    outside: bool


class Scheduled(NamedTuple):
    """A misbehaviour to come: seconds after the lab's start, its name, and optionally another attacker."""

    after_s: float
    attack: str
    attacker: str | None = None


def parse_schedule(text: str) -> list[Scheduled]:
    """ "75:scan,2m:worm@office1" as a list. Raises UsageError for anything else."""
    entries = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        found = re.fullmatch(r"([^:]+):([a-z-]+)(?:@([a-z0-9]+))?", part)
        try:
            after = seconds(found[1]) if found else None
        except ValueError:
            after = None
        if found is None or after is None:
            raise UsageError(
                f"cannot read {part!r} in the schedule: write WHEN:ATTACK or WHEN:ATTACK@HOST, such as 75:scan or "
                "2m:worm@office1"
            )
        entries.append(Scheduled(after, found[2], found[3]))
    return sorted(entries, key=lambda entry: entry.after_s)


def read_schedule(schedule: str | Sequence[Scheduled], seed: int) -> list[Scheduled]:
    """The misbehaviours of a schedule, all of which a lab of this seed can play.

    Raises UsageError where it cannot be read or names what does not exist, FlowsageError where nmap is missing.
    """
    entries = parse_schedule(schedule) if isinstance(schedule, str) else list(schedule)
    for entry in entries:
        prepare(entry.attack, entry.attacker, seed, {})
    return entries


class Lab:
    """Hosts on a bridge, alive from `start` to `stop` (or in a `with` block).

    `interfaces` are the bridge's ports, one a host, in the network namespace at `netns`: XDP attached to all of them
    sees every packet once. Attach inside `in_namespace(lab.netns)`.

    `on_attack` is called (from a thread of the lab's) when a misbehaviour starts and again when it has ended.
    """

    def __init__(
        self, settings: LabSettings | None = None, *, on_attack: Callable[[Truth], None] | None = None
    ) -> None:
        self.settings = settings or LabSettings()
        if not re.fullmatch(r"[a-z][a-z0-9]{0,4}", self.settings.prefix):
            raise ConfigurationError(
                f"the lab's prefix {self.settings.prefix!r} is not 1 to 5 lower-case letters and digits"
            )
        if not self.settings.pace > 0:
            raise ConfigurationError(f"the lab's pace is {self.settings.pace}: it must be above 0")
        prefix = self.settings.prefix
        self.hosts = [
            LabHost(
                plan.name,
                plan.role,
                plan.department,
                plan.address,
                network.port_name(prefix, plan.name),
                str(network.namespace_path(network.host_namespace(prefix, plan.name))),
                plan.outside,
            )
            for plan in HOSTS
        ]
        self.interfaces = [host.interface for host in self.hosts]
        self.netns = str(network.namespace_path(network.switch_name(prefix)))
        self.bridge = f"{prefix}-br"
        self.truth_path = (
            self.settings.truth_path or Path(tempfile.gettempdir()) / f"{prefix}-truth-{os.getpid()}.jsonl"
        )
        self.started_ns: int | None = None
        """When traffic began, Unix nanoseconds."""
        self.processes: dict[str, int] = {}
        """Host to process id, for the curious and for tests."""
        self.lost_hosts: list[str] = []
        """Hosts whose process ended while the lab ran: always a bug, told on stderr."""
        self._on_attack = on_attack
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._ready: Future[dict[str, Any]] = Future()
        self._pending: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._ended: dict[str, Truth] = {}
        self._news = threading.Condition()
        self._stopping = False

    # Life

    def start(self) -> Lab:
        """Build the network, start every host, return when traffic flows (about a second).

        What an earlier lab of the same prefix left behind after being killed is removed first.
        Raises PrivilegeError without root, FlowsageError where a lab of this prefix runs or a package is missing.
        """
        if os.geteuid() != 0:
            raise PrivilegeError("the lab makes network namespaces: run it as root (sudo flowsage lab)")
        if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
            raise FlowsageError(f"the lab needs {', '.join(missing)}: pip install 'flowsage[lab]'")
        if not self.truth_path.parent.is_dir():
            raise ConfigurationError(f"the truth cannot be kept at {self.truth_path}: make its directory first")
        order = {
            "prefix": self.settings.prefix,
            "seed": self.settings.seed,
            "pace": self.settings.pace,
            "truth_path": str(self.truth_path.resolve()),
        }
        # A session of its own: a terminal's Ctrl-C reaches only us, and we decide how the lab ends.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "flowsage.pipelines.lab.supervisor", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self._thread = threading.Thread(target=self._listen, name="lab", daemon=True)
        self._thread.start()
        try:
            ready = self._ready.result(START_TIMEOUT_S)
        except BaseException as error:
            self.stop()
            if isinstance(error, TimeoutError):
                raise FlowsageError(f"the lab did not start within {START_TIMEOUT_S:.0f} s") from error
            raise
        self.started_ns = ready["time_ns"]
        self.processes = ready["processes"]
        return self

    def stop(self) -> None:
        """End every process, remove every namespace and interface. May be called twice."""
        if self._process is None:
            return
        self._stopping = True
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode < 0:  # it was killed and could not clean up
            network.remove(self.settings.prefix)
        assert self._thread is not None
        self._thread.join(STOP_TIMEOUT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None

    def __enter__(self) -> Lab:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Orders

    def start_attack(self, name: str, *, attacker: str | None = None, **parameters: Any) -> Truth:
        """Start a misbehaviour now. Returns its truth as of its start (targets, parameters in full).

        Raises UsageError for an unknown attack, host or parameter, FlowsageError where nmap is missing.
        """
        answer = self._ask("attack", attack=name, attacker=attacker, parameters=parameters)
        return from_json(answer["truth"])

    def stop_attack(self, truth: Truth) -> None:
        """Cut a misbehaviour short; its truth says "stopped"."""
        self._send(do="cancel", id=truth.id)

    def wait_attack(self, truth: Truth, timeout_s: float) -> Truth:
        """The whole truth, once the misbehaviour has ended. Raises TimeoutError."""
        with self._news:
            if not self._news.wait_for(lambda: truth.id in self._ended, timeout_s):
                raise TimeoutError(f"{truth.id} has not ended within {timeout_s:g} s")
            return self._ended[truth.id]

    def run_schedule(self, schedule: str | Sequence[Scheduled]) -> list[Scheduled]:
        """Let misbehaviours start by themselves, so many seconds after the lab's start. Returns the schedule as read.

        Raises what `read_schedule` does.
        """
        entries = read_schedule(schedule, self.settings.seed)
        began = (self.started_ns or time.time_ns()) / 1e9
        orders = [{"at": began + e.after_s, "attack": e.attack, "attacker": e.attacker} for e in entries]
        self._send(do="schedule", entries=orders)
        return entries

    def truths(self) -> list[Truth]:
        """Every misbehaviour so far with its steps (up to a quarter of a second late), also after the lab's end."""
        return read_truth(self.truth_path) if self.truth_path.exists() else []

    def counters(self) -> dict[str, dict[str, int]]:
        """What each host has done so far (`http_ok`, `dns_ok`, `ssh_ok`, `transfers_ok`, `…_failed`), by host name."""
        counted: dict[str, dict[str, int]] = self._ask("counters")["hosts"]
        return counted

    def record(self, path: Path) -> Recording:
        """Capture the bridge's traffic as pcap from now on; every frame once."""
        return Recording(path, self.netns, self.bridge)

    # The supervisor's line

    def _send(self, **message: Any) -> None:
        if self._process is None or self._process.stdin is None:
            raise FlowsageError("the lab does not run: start it first")
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise FlowsageError("the lab has ended by itself: see the messages above, start it again") from error

    def _ask(self, do: str, **message: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer: Future[dict[str, Any]] = Future()
        self._pending[number] = answer
        self._send(do=do, id=number, **message)
        try:
            return answer.result(STOP_TIMEOUT_S)
        except TimeoutError as error:
            raise FlowsageError(f"the lab did not answer within {STOP_TIMEOUT_S:.0f} s") from error

    def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._take(json.loads(line))
        gone = FlowsageError("the lab has ended by itself: see the messages above, start it again")
        for waiting in (self._ready, *self._pending.values()):
            if not waiting.done():
                waiting.set_exception(gone)

    def _take(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "ready":
                self._ready.set_result(event)
            case "failed":
                self._ready.set_exception(_error(event))
            case "attack":
                self._tell(from_json(event["truth"]))
                if event["id"] is not None:
                    self._pending.pop(event["id"]).set_result(event)
            case "refused" if event["id"] is not None:
                self._pending.pop(event["id"]).set_exception(_error(event))
            case "refused":
                print(f"lab: {event['error']}", file=sys.stderr)
            case "counters":
                self._pending.pop(event["id"]).set_result(event)
            case "ended":
                truth = from_json(event["truth"])
                with self._news:
                    self._ended[truth.id] = truth
                    self._news.notify_all()
                self._tell(truth)
            case "gone" if not self._stopping:
                self.lost_hosts.append(event["host"])
                print(f"lab: the host {event['host']} has ended by itself", file=sys.stderr)

    def _tell(self, truth: Truth) -> None:
        if self._on_attack is None:
            return
        try:
            self._on_attack(truth)
        except Exception:  # the caller's bug must not deafen the lab
            traceback.print_exc()


def _error(event: dict[str, Any]) -> FlowsageError:
    """The error that the supervisor met, as the class it was there."""
    kind = getattr(errors, event["kind"], FlowsageError)
    built: FlowsageError = kind(event["error"])
    return built
