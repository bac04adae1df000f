"""A cable for tests: two network namespaces joined by a veth pair, and raw sockets to put frames on it."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from flowsage.collector.interface import in_namespace, read_interface

_numbers = itertools.count()
MACS = bytes.fromhex("020000000002020000000001")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def eventually(what: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until `what` is true; fail where it never is."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


@dataclass
class Wire:
    """`near` is the namespace in which `port` is watched; what is sent on `far`'s end arrives there."""

    near: str
    far: str
    port: str
    other: str

    def add(self) -> None:
        """The pair itself; both ends up, without addresses of their own, so that nothing but the test sends."""
        ip("link", "add", self.port, "netns", self.near, "type", "veth", "peer", "name", self.other, "netns", self.far)
        for namespace, end in ((self.near, self.port), (self.far, self.other)):
            ip("-n", namespace, "link", "set", end, "addrgenmode", "none")
            ip("-n", namespace, "link", "set", end, "up")

    def delete(self) -> None:
        ip("-n", self.near, "link", "delete", self.port)

    @contextmanager
    def sender(self) -> Iterator[socket.socket]:
        with in_namespace(self.far):
            s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            s.bind((self.other, 0))
        with s:
            yield s

    def send(self, *frames: bytes) -> int:
        with self.sender() as s:
            for frame in frames:
                s.send(frame)
        return len(frames)


@contextmanager
def wire(*, beside: Wire | None = None) -> Iterator[Wire]:
    """A cable for the length of a block, `beside` another in its near namespace; needs root."""
    tag = f"fsse{os.getpid() % 100_000}{next(_numbers) % 100:02d}"
    made = Wire(near=beside.near if beside else f"{tag}n", far=f"{tag}f", port=f"{tag}n", other=f"{tag}f")
    own = [made.far] if beside else [made.near, made.far]
    for namespace in own:
        ip("netns", "add", namespace)
    try:
        made.add()
        yield made
    finally:
        for namespace in own:
            subprocess.run(["ip", "netns", "delete", namespace], check=False)


def attached(cable: Wire) -> bool:
    """Whether the kernel runs any XDP program on the watched end."""
    with in_namespace(cable.near):
        return read_interface(cable.port).xdp_program is not None


def udp(src: str, dst: str, sport: int = 1000, dport: int = 53, payload: bytes = b"x") -> bytes:
    """An Ethernet frame with a UDP datagram, packed by hand (scapy takes half a millisecond a frame), no checksums."""
    size = 28 + len(payload)
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, size, 1, 0, 64, 17, 0, socket.inet_aton(src), socket.inet_aton(dst))
    return MACS + b"\x08\x00" + head + struct.pack("!HHHH", sport, dport, size - 20, 0) + payload


def tcp(src: str, dst: str, sport: int, dport: int, flags: str, payload: bytes = b"") -> bytes:
    ends = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / IP(src=src, dst=dst)
    return bytes(ends / TCP(sport=sport, dport=dport, flags=flags) / payload)


def conversation(client: str, server: str, sport: int, dport: int = 80) -> list[bytes]:
    """A whole TCP connection, both ways: 8 packets with FIN from both."""
    there, back = (client, server, sport, dport), (server, client, dport, sport)
    return [
        tcp(*there, "S"),
        tcp(*back, "SA"),
        tcp(*there, "A"),
        tcp(*there, "PA", b"request"),
        tcp(*back, "PA", b"answer"),
        tcp(*there, "FA"),
        tcp(*back, "FA"),
        tcp(*there, "A"),
    ]


def blast(cable: Wire, *, flows: int, packets: int, rate: int) -> int:
    """`packets` datagrams of `flows` flows onto the wire, `rate` a second; returns how many were sent."""
    frames = [udp(f"10.{i % 200}.{i // 200 % 250}.1", "10.0.0.2", 1 + i % 60_000) for i in range(flows)]
    sent, began = 0, time.monotonic()
    with cable.sender() as s:
        while sent < packets:
            for frame in itertools.islice(itertools.cycle(frames), sent % flows, sent % flows + rate // 100):
                s.send(frame)
            sent += rate // 100
            time.sleep(max(0.0, began + sent / rate - time.monotonic()))
    return sent


def start_blast(cable: Wire, *, flows: int, packets: int, rate: int) -> subprocess.Popen[str]:
    """`blast` in a process of its own, so that it shares no interpreter lock with the sensor; it prints the count."""
    words = [cable.near, cable.far, cable.port, cable.other, str(flows), str(packets), str(rate)]
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.collector.wires", *words], cwd=root, stdout=subprocess.PIPE, text=True
    )


if __name__ == "__main__":
    print(blast(Wire(*sys.argv[1:5]), flows=int(sys.argv[5]), packets=int(sys.argv[6]), rate=int(sys.argv[7])))
