"""The lab's parent process: builds the network, forks the hosts, passes orders on, keeps the truth file, cleans up.

It is a process of its own so that the caller may have any threads and libraries it likes, and so that everything goes
when the caller goes: it reads its orders from a pipe, and the end of the pipe (even the caller's SIGKILL) is the order
to leave. Orders and events are JSON lines.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowsage.collector.errors import FlowsageError
from flowsage.pipelines.lab import attacks, habits, network, services  # noqa: F401  # imported before the hosts fork
from flowsage.pipelines.lab.misbehaviour import prepare
from flowsage.pipelines.lab.node import become_host
from flowsage.pipelines.lab.plan import BY_NAME, HOSTS
from flowsage.pipelines.lab.truth import Step, Truth, to_json, write_truth

FILLER_BYTES = 1 << 20
_WRITE_EVERY_S = 0.25


class Supervisor:
    """State of the running lab: hosts' processes and their sockets, and the truth so far."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.prefix: str = settings["prefix"]
        self.seed: int = settings["seed"]
        self.pace: float = settings["pace"]
        self.truth_path = Path(settings["truth_path"])
        self.processes: dict[str, int] = {}
        self.sockets: dict[str, socket.socket] = {}
        self.writers: dict[str, asyncio.StreamWriter] = {}
        self.truths: dict[str, Truth] = {}
        self._caller = os.getppid()
        self._dirty = False
        self._done = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = len(HOSTS)
        self._counters: dict[str, dict[str, Any]] = {}

    def fork_hosts(self, claim: socket.socket) -> None:
        """One process a host. Must come before the event loop exists: a forked loop is not to be shared."""
        filler = random.Random(self.seed).randbytes(FILLER_BYTES)
        gc.collect()
        gc.freeze()  # the hosts' collectors then leave the shared pages alone
        for plan in HOSTS:
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                for other in (claim, ours, *self.sockets.values()):
                    other.close()
                with open(os.devnull, "r+b") as nothing:  # stdin and stdout carry the supervisor's orders and events
                    os.dup2(nothing.fileno(), 0)
                    os.dup2(nothing.fileno(), 1)
                namespace = str(network.namespace_path(network.host_namespace(self.prefix, plan.name)))
                become_host(plan, namespace, seed=self.seed, pace=self.pace, control=theirs, filler=filler)
            theirs.close()
            self.processes[plan.name] = pid
            self.sockets[plan.name] = ours

    def tell(self, **event: Any) -> None:
        """Send an event to the caller."""
        with suppress(BrokenPipeError):
            print(json.dumps(event), flush=True)

    def order(self, host: str, **message: Any) -> None:
        """Send an order to a host."""
        if host in self.writers:
            self.writers[host].write(json.dumps(message).encode() + b"\n")

    async def run(self) -> None:
        """Serve orders and events until the caller leaves or stops the lab."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._done.set)
        for name in self.sockets:
            self._spawn(self._listen_to_host(name))
        self._spawn(self._listen_to_caller())
        self._spawn(self._keep_truth())
        await self._done.wait()
        for task in self._tasks:
            task.cancel()
        self._finish_truth()

    def _spawn(self, work: Any) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def _listen_to_caller(self) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        while line := await reader.readline():
            message = json.loads(line)
            match message["do"]:
                case "attack":
                    self._start_attack(message)
                case "schedule":
                    for entry in message["entries"]:
                        self._spawn(self._later(entry))
                case "cancel":
                    if truth := self.truths.get(message["id"]):
                        self.order(truth.attacker, do="cancel", id=truth.id)
                case "counters":
                    self._counters[message["id"]] = {}
                    for host in self.sockets:
                        self.order(host, do="counters", id=message["id"])
                case "stop":
                    break
        self._done.set()

    async def _later(self, entry: dict[str, Any]) -> None:
        await asyncio.sleep(max(0.0, entry["at"] - time.time()))
        self._start_attack({"id": None, **entry})

    def _start_attack(self, message: dict[str, Any]) -> None:
        try:
            attack, host, parameters = prepare(
                message["attack"], message.get("attacker"), self.seed, message.get("parameters") or {}
            )
        except FlowsageError as error:
            self.tell(event="refused", id=message["id"], kind=type(error).__name__, error=str(error))
            return
        count = sum(truth.attack == attack.name for truth in self.truths.values())
        ports = (parameters["port"],) if "port" in parameters else tuple(parameters["ports"])
        truth = Truth(
            id=f"{attack.name}-{count + 1}",
            attack=attack.name,
            attacker=host,
            address=BY_NAME[host].address,
            proto=attack.proto,
            targets=tuple(parameters["targets"]),
            ports=ports,
            start_ns=time.time_ns(),
            parameters={name: value for name, value in parameters.items() if name not in ("targets", "ports")},
        )
        self.truths[truth.id] = truth
        self._write_now()
        self.order(host, do="attack", id=truth.id, attack=attack.name, parameters=parameters)
        self.tell(event="attack", id=message["id"], truth=to_json(truth))

    async def _listen_to_host(self, name: str) -> None:
        reader, self.writers[name] = await asyncio.open_unix_connection(sock=self.sockets[name])
        while line := await reader.readline():
            message = json.loads(line)
            match message["event"]:
                case "ready":
                    self._waiting -= 1
                    if self._waiting == 0:
                        for host in self.sockets:
                            self.order(host, do="go")
                        self.tell(event="ready", time_ns=time.time_ns(), processes=self.processes)
                case "counters":
                    got = self._counters[message["id"]]
                    got[name] = message["counters"]
                    if len(got) == len(self.sockets):
                        self.tell(event="counters", id=message["id"], hosts=self._counters.pop(message["id"]))
                case _:
                    self._note(message)
        self.tell(event="gone", host=name)
        if self._waiting:
            self._done.set()

    def _note(self, message: dict[str, Any]) -> None:
        """Write what an attacker reported into its truth."""
        truth = self.truths[message["id"]]
        match message["event"]:
            case "step":
                step = Step(*message["step"])
                ports = {*truth.source_ports, step.source_port} - {0}
                truth = replace(truth, steps=(*truth.steps, step), source_ports=tuple(sorted(ports)))
            case "source_ports":
                truth = replace(truth, source_ports=tuple(sorted({*truth.source_ports, *message["ports"]})))
            case "end":
                truth = replace(truth, end_ns=message["time_ns"], status=message["status"], error=message["error"])
        self.truths[truth.id] = truth
        self._dirty = True
        if message["event"] == "end":
            self._write_now()
            self.tell(event="ended", truth=to_json(truth))

    async def _keep_truth(self) -> None:
        """Write the truth while it grows, and see whether anybody is left to read it."""
        while True:
            await asyncio.sleep(_WRITE_EVERY_S)
            if os.getppid() != self._caller:  # killed, and somebody else still holds its end of the pipe
                self._done.set()
            if self._dirty:
                self._write_now()

    def _write_now(self) -> None:
        write_truth(self.truth_path, self.truths.values())
        self._dirty = False

    def _finish_truth(self) -> None:
        """What still runs ends with the lab."""
        for truth in self.truths.values():
            if truth.end_ns is None:
                self.truths[truth.id] = replace(truth, end_ns=time.time_ns(), status="stopped")
        self._write_now()

    def reap(self) -> None:
        """End the hosts' processes and wait for them."""
        for pid in self.processes.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self.processes.values():
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def main(settings: dict[str, Any]) -> int:
    """Run a lab until told to stop or left alone; 0, or the exit code of the error that was told to the caller."""
    # Until the loop takes over, a signal must still pass through the clean-up below.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    claim = None
    supervisor = Supervisor(settings)
    try:
        claim = network.lock(supervisor.prefix)
        if stale := network.remove(supervisor.prefix):
            supervisor.tell(event="cleaned", namespaces=stale)
        network.build(supervisor.prefix, HOSTS)
        supervisor.fork_hosts(claim)
        write_truth(supervisor.truth_path, ())
        asyncio.run(supervisor.run())
    except FlowsageError as error:
        supervisor.tell(event="failed", kind=type(error).__name__, error=str(error))
        return error.exit_code
    finally:
        supervisor.reap()
        if claim is not None:
            network.remove(supervisor.prefix)
            claim.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
