"""One host: a process inside its namespace that offers its role's services and follows its role's habits.

The supervisor forks it after everything is imported, so a host costs milliseconds to start. It talks to the supervisor
in JSON lines over a socket pair and dies with it.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import math
import os
import random
import signal
import socket
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import asyncssh
from dnslib import DNSError, DNSRecord

from flowsage.pipelines.lab.network import enter
from flowsage.pipelines.lab.plan import ADDRESS, HostPlan

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)

NETWORK_ERRORS = (OSError, asyncio.TimeoutError, EOFError, aiohttp.ClientError, asyncssh.Error, DNSError)
"""What a habit may meet on a real network: counted, and the next attempt made after the next pause."""


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Node:
    """The running host: its plan, its dice, its counters, and what every service and habit needs."""

    def __init__(self, plan: HostPlan, *, seed: int, pace: float, control: socket.socket, filler: bytes) -> None:
        self.plan = plan
        self.rng = random.Random(f"{seed}:{plan.name}")
        self.pace = pace
        self.filler = filler
        """1 MiB of random bytes, shared by all hosts: the content of every file."""
        self.counters: Counter[str] = Counter()
        self.keep: list[object] = []
        """Servers and transports that must live as long as the host."""
        self.control = control
        self.writer: asyncio.StreamWriter | None = None
        self._names: dict[str, tuple[str, float]] = {}
        self._ping_sequence = 0
        self.attacks: dict[str, asyncio.Task[None]] = {}

    def send(self, message: dict[str, Any]) -> None:
        """Tell the supervisor something."""
        assert self.writer is not None
        self.writer.write(json.dumps(message).encode() + b"\n")

    async def pause(self, median: float, sigma: float = 0.6) -> None:
        """A log-normal think time with the median in seconds, at most eight medians, scaled by the lab's pace."""
        await asyncio.sleep(min(self.rng.lognormvariate(math.log(median), sigma), 8 * median) * self.pace)

    def size(self, median: int, sigma: float = 1.0, most: int = 1 << 22) -> int:
        """A log-normal number of bytes."""
        return min(int(self.rng.lognormvariate(math.log(median), sigma)) + 1, most)

    def bulk(self, size: int) -> list[bytes]:
        """`size` bytes as pieces of the shared filler."""
        whole, rest = divmod(size, len(self.filler))
        return [self.filler] * whole + [self.filler[:rest]]

    async def datagram(self, address: str, port: int, payload: bytes, *, patience: float = 2.0) -> bytes:
        """Send a datagram from a new port and wait for the answer. Raises TimeoutError when none comes."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
            await loop.sock_connect(channel, (address, port))
            await loop.sock_sendall(channel, payload)
            return await asyncio.wait_for(loop.sock_recv(channel, 4096), patience)

    async def resolve(self, name: str, server: str = ADDRESS["dns"]) -> str:
        """Ask the network's DNS server for an address; answers are kept for their time to live.

        Raises DNSError where the name does not exist.
        """
        known = self._names.get(name)
        if known and known[1] > time.monotonic():
            return known[0]
        answer = DNSRecord.parse(await self.datagram(server, 53, DNSRecord.question(name).pack()))
        if not answer.rr:
            self.counters["dns_unknown"] += 1
            raise DNSError(f"{name} does not exist")
        self.counters["dns_ok"] += 1
        address = str(answer.rr[0].rdata)
        self._names[name] = (address, time.monotonic() + answer.rr[0].ttl)
        return address

    async def ping(self, address: str, *, patience: float = 1.0) -> bool:
        """One ICMP echo of 56 bytes; whether it was answered in time."""
        loop = asyncio.get_running_loop()
        self._ping_sequence = (self._ping_sequence + 1) & 0xFFFF
        ident = os.getpid() & 0xFFFF
        body = struct.pack("!BBHHH", 8, 0, 0, ident, self._ping_sequence) + self.filler[:56]
        total = sum(struct.unpack(f"!{len(body) // 2}H", body))
        total = (total >> 16) + (total & 0xFFFF)
        checksum = ~(total + (total >> 16)) & 0xFFFF
        body = body[:2] + struct.pack("!H", checksum) + body[4:]
        wanted = struct.pack("!HH", ident, self._ping_sequence)
        with socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP) as channel:
            channel.connect((address, 0))
            await loop.sock_sendall(channel, body)
            try:
                async with asyncio.timeout(patience):
                    while True:
                        reply = await loop.sock_recv(channel, 2048)
                        if reply[20:21] == b"\0" and reply[24:28] == wanted:
                            self.counters["ping_ok"] += 1
                            return True
            except (TimeoutError, OSError):
                self.counters["ping_unanswered"] += 1
                return False

    async def habit(self, what: Callable[[Node], Awaitable[None]]) -> None:
        """Live a habit for ever: what the network does to it is counted, what we did wrong is reported."""
        name = what.__name__
        await asyncio.sleep(self.rng.uniform(0, 5) * self.pace)  # or all would keep step for minutes
        while True:
            try:
                await what(self)
            except NETWORK_ERRORS as error:
                self.counters[f"{name}_failed"] += 1
                if os.environ.get("FLOWSAGE_LAB_DEBUG"):
                    print(f"lab: {self.plan.name}: {name}: {error!r}", file=sys.stderr, flush=True)
                await asyncio.sleep(1.0)


async def _live(node: Node) -> None:
    # Here, not at the top: these modules build on Node.
    from flowsage.pipelines.lab.attacks import Report, run_attack
    from flowsage.pipelines.lab.habits import HABITS
    from flowsage.pipelines.lab.services import SERVICES

    for service in SERVICES.get(node.plan.role, ()):
        await service(node)
    reader, node.writer = await asyncio.open_unix_connection(sock=node.control)
    node.send({"event": "ready"})
    tasks: list[asyncio.Task[None]] = []
    while line := await reader.readline():
        message = json.loads(line)
        match message["do"]:
            case "go":
                tasks += [asyncio.create_task(node.habit(habit)) for habit in HABITS.get(node.plan.role, ())]
                for task in tasks:
                    task.add_done_callback(_report_bug)
            case "attack":
                report = Report(node, message["id"])
                task = asyncio.create_task(run_attack(node, report, message["attack"], message["parameters"]))
                node.attacks[message["id"]] = task
            case "cancel":
                if message["id"] in node.attacks:
                    node.attacks[message["id"]].cancel()
            case "counters":
                node.send({"event": "counters", "id": message["id"], "counters": dict(node.counters)})


def _report_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        traceback.print_exception(error, file=sys.stderr)


def become_host(
    plan: HostPlan, namespace: str, *, seed: int, pace: float, control: socket.socket, filler: bytes
) -> None:
    """Turn the calling (freshly forked) process into the host. Does not return."""
    code = 1
    try:
        die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        enter(namespace)
        node = Node(plan, seed=seed, pace=pace, control=control, filler=filler)
        asyncio.run(_live(node))
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)
