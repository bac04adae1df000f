"""Captures what crosses the lab's bridge into a pcap file: the process behind `Recording`.

A packet socket on the bridge in promiscuous mode sees every forwarded frame once, after XDP let it pass. The file is
classic pcap with nanoseconds (magic 0xa1b23c4d); kernel drops are counted and told.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowsage.collector.errors import FlowsageError
from flowsage.collector.interface import in_namespace
from flowsage.pipelines.lab.record import Recorded

_ETH_P_ALL = 0x0003
_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, _PACKET_STATISTICS, _PACKET_MR_PROMISC = 263, 1, 6, 1
_SO_RCVBUFFORCE, _SO_TIMESTAMPNS = 33, 35
_SNAPLEN = 262_144
_BUFFER_BYTES = 64 << 20


def _open(netns: str, bridge: str) -> socket.socket:
    with in_namespace(netns):
        channel = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        index = socket.if_nametoindex(bridge)
    channel.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    channel.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    channel.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, struct.pack("IHH8s", index, _PACKET_MR_PROMISC, 0, b""))
    channel.bind((bridge, _ETH_P_ALL))
    channel.setblocking(False)
    return channel


def capture(path: Path, netns: str, bridge: str) -> Recorded:
    """Capture until standard input ends."""
    packets = 0
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_NONBLOCK)
    with _open(netns, bridge) as channel, path.open("wb", buffering=1 << 18) as file:
        file.write(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, _SNAPLEN, 1))
        file.flush()
        print("ready", flush=True)
        flushed = time.monotonic()
        ending = False
        sources: list[Any] = [channel, 0]
        while True:
            # With the end ordered, what the socket already holds is still written.
            ready, _, _ = select.select(sources[: 1 if ending else 2], [], [], 0 if ending else 0.5)
            if not ready and ending:
                break
            ending = ending or 0 in ready
            if channel in ready:
                with suppress(BlockingIOError):
                    for _ in range(1024):
                        frame, ancillary, _, _ = channel.recvmsg(_SNAPLEN, 64)
                        seconds, nanoseconds = struct.unpack("qq", ancillary[0][2][:16])
                        file.write(struct.pack("<IIII", seconds, nanoseconds, len(frame), len(frame)))
                        file.write(frame)
                        packets += 1
            if time.monotonic() - flushed > 0.5:
                file.flush()
                flushed = time.monotonic()
        _, dropped = struct.unpack("II", channel.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
    return Recorded(packets, dropped)


if __name__ == "__main__":
    try:
        done = capture(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    except (FlowsageError, OSError) as problem:
        print(problem, flush=True)
        sys.exit(1)
    print(json.dumps({"packets": done.packets, "dropped": done.dropped}), flush=True)
