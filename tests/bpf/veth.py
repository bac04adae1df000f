"""A pair of namespaces with a veth between them on which nobody but the test speaks."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flowsage.collector.interface import in_namespace
from flowsage.collector.program import FlowProgram

MTU = 65_535


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
    return done.stdout


@dataclass(frozen=True)
class VethPair:
    """`sender` in namespace `outside`, `receiver` in namespace `home`."""

    outside: str
    home: str
    sender: str
    receiver: str

    def inside(self) -> AbstractContextManager[None]:
        """The calling thread is where the receiver is."""
        return in_namespace(self.home)

    def replay(self, capture: Path, *options: str) -> str:
        """Sends a capture, by default at a rate that no queue overflows at."""
        rate = options or ("--pps=20000",)
        return run(
            "ip", "netns", "exec", self.outside, "tcpreplay", "-q", *rate, f"--intf1={self.sender}", str(capture)
        )

    @staticmethod
    def settle(program: FlowProgram, packets: int, timeout: float = 5.0) -> None:
        """Until the program has seen that many packets, and no more come."""
        until = time.monotonic() + timeout
        while program.counters()["seen_packets"] < packets and time.monotonic() < until:
            time.sleep(0.005)


@contextmanager
def veth_pair(tag: str) -> Iterator[VethPair]:
    """Namespaces and interfaces named after `tag` (4 letters), gone when the block ends."""
    pair = VethPair(f"{tag}out", f"{tag}in", f"{tag}0", f"{tag}1")
    for name in (pair.outside, pair.home):
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    try:
        for name in (pair.outside, pair.home):
            run("ip", "netns", "add", name)
            # Before the interfaces exist: router solicitations and neighbour discovery are packets too.
            for which in ("all", "default"):
                run("ip", "netns", "exec", name, "sysctl", "-qw", f"net.ipv6.conf.{which}.disable_ipv6=1")
        one = ("numtxqueues", "1", "numrxqueues", "1")  # one queue: nothing overtakes
        peer = ("peer", "name", pair.receiver, "netns", pair.home, *one)
        run("ip", "-n", pair.outside, "link", "add", pair.sender, *one, "type", "veth", *peer)
        for name, interface in ((pair.outside, pair.sender), (pair.home, pair.receiver)):
            run("ip", "-n", name, "link", "set", interface, "mtu", str(MTU), "arp", "off", "multicast", "off", "up")
        yield pair
    finally:
        for name in (pair.outside, pair.home):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
