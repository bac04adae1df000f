"""From the start of a process to its first packet counted, on a veth pair that always carries packets."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flowsage.collector.xdp import attached_program
from tests.bench.rows import Row

SPACE, OUTSIDE, INSIDE = "fsbench", "fsbench0", "fsbench1"
RUNS = 3


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)


@contextmanager
def busy_interface() -> Iterator[str]:
    """An interface here on which a ping arrives every 10 ms."""
    _ip("netns", "del", SPACE, check=False)
    _ip("netns", "add", SPACE)
    try:
        _ip("link", "add", OUTSIDE, "type", "veth", "peer", "name", INSIDE, "netns", SPACE)
        _ip("addr", "add", "10.213.0.1/24", "dev", OUTSIDE)
        _ip("link", "set", OUTSIDE, "up")
        _ip("-n", SPACE, "addr", "add", "10.213.0.2/24", "dev", INSIDE)
        _ip("-n", SPACE, "link", "set", INSIDE, "up")
        chatter = subprocess.Popen(
            ["ip", "netns", "exec", SPACE, sys.executable, "-c", _CHATTER], stdout=subprocess.DEVNULL
        )
        yield OUTSIDE
        chatter.kill()
        chatter.wait()
    finally:
        _ip("netns", "del", SPACE, check=False)


_CHATTER = """
import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    s.sendto(b"x", ("10.213.0.1", 9))
    time.sleep(0.01)
"""


def until_attached(command: list[str], interface: str) -> float:
    """Seconds from exec to the program attached; with a packet every 10 ms, that is the first packet counted."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)
    assert process.stderr is not None
    drained = threading.Thread(target=process.stderr.read, daemon=True)
    drained.start()
    try:
        while attached_program(interface) is None:
            if process.poll() is not None or time.perf_counter() - started > 30:
                raise RuntimeError(f"{command} has not attached")
            time.sleep(0.002)
        return time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def rows() -> Iterator[Row]:
    """`flowsage run` and `flowsage collect`."""
    flowsage = [sys.executable, "-m", "flowsage.pipelines.cli"]
    with busy_interface() as interface:
        for name, bar in (("run", 4.0), ("collect", 1.0)):
            extra = ["--no-metrics"] if name == "run" else []
            command = [*flowsage, name, "--interface", interface, *extra]
            value = statistics.median(until_attached(command, interface) for _ in range(RUNS))
            yield Row(
                name=f"flowsage {name}, start to first packet counted", value=value, unit="s", bar=f"≤ {bar:g} s",
                met=value <= bar,
            )  # fmt: skip
