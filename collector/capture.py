"""Captures: classic pcap and pcapng, read through a memory map, with times exact to the nanosecond.

Packets are never copied: a `PacketBatch` is where they lie in the map. Existing readers either round times to a float
(dpkt) or build an object a packet; this one costs a header a packet.

Format: draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from flowsage.collector.errors import CaptureError

ETHERNET = 1
LINK_TYPES = {
    0: "BSD loopback",
    12: "raw IP",
    14: "raw IP",
    101: "raw IP",
    105: "IEEE 802.11",
    108: "OpenBSD loopback",
    113: "Linux cooked capture (SLL)",
    127: "IEEE 802.11 with radiotap",
    192: "PPI",
    228: "raw IPv4",
    229: "raw IPv6",
    276: "Linux cooked capture v2 (SLL2)",
}
"""The link types that people meet most (https://www.tcpdump.org/linktypes.html)."""

LARGEST_PACKET = 256 * 1024
"""libpcap's MAXIMUM_SNAPLEN: a longer packet means that the file is damaged."""

_CLASSIC = {
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
    b"\xa1\xb2\x3c\x4d": (">", 1),
}
_SECTION = b"\x0a\x0d\x0d\x0a"
_ORDERS = {b"\x4d\x3c\x2b\x1a": "<", b"\x1a\x2b\x3c\x4d": ">"}
_COMPRESSED = {b"\x1f\x8b": "gzip -dc", b"\x28\xb5\x2f\xfd": "zstd -dc", b"\xfd7zXZ": "xz -dc", b"BZh": "bzip2 -dc"}


@dataclass(frozen=True)
class PacketBatch:
    """n packets of a capture.

    `times_ns` [n] int64 Unix time; `offsets` [n] int64 and `lengths` [n] int64: packet i is
    `data[offsets[i] : offsets[i] + lengths[i]]`, as captured (a snapped packet is as short as it was snapped).
    """

    data: memoryview
    times_ns: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.times_ns)

    def __getitem__(self, part: slice) -> PacketBatch:
        return PacketBatch(self.data, self.times_ns[part], self.offsets[part], self.lengths[part])

    def packets(self) -> list[memoryview]:
        """The packets themselves, as views into the map."""
        data = self.data
        return [data[at : at + length] for at, length in zip(self.offsets.tolist(), self.lengths.tolist(), strict=True)]


class Capture:
    """An open capture file: iterate over it for `PacketBatch`es, once.

    Raises CaptureError when opened for what is not a capture or not Ethernet, and at the end of the iteration (after
    all packets before) for a file that is damaged or stops in the middle of a packet. `packets` is how many came.
    """

    def __init__(self, path: str | os.PathLike[str], *, batch_packets: int = 16_384) -> None:
        self.path = os.fspath(path)
        self.packets = 0
        self._batch = batch_packets
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self._map: bytes | mmap.mmap = (
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else file.read()
                )
        except OSError as error:
            raise CaptureError(f"{self.path} cannot be read: {error.strerror}") from error
        self._data = memoryview(self._map)
        self._times: list[int] = []
        self._offsets: list[int] = []
        self._lengths: list[int] = []
        magic = bytes(self._data[:6])
        if magic[:4] in _CLASSIC and len(self._data) >= 24:
            self._order, self._unit = _CLASSIC[magic[:4]]
            (link,) = struct.unpack_from(self._order + "I", self._data, 20)
            self._require_ethernet(link & 0xFFFF)
            self._walk = self._classic()
        elif magic[:4] == _SECTION and len(self._data) >= 28:
            self._walk = self._blocks()
            self._first_interface()
        else:
            self._refuse(magic)

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the map; batches that are still held keep it alive."""
        self._walk.close()
        self._data = memoryview(b"")
        self._map = b""

    def __iter__(self) -> Iterator[PacketBatch]:
        return self._walk

    def _refuse(self, magic: bytes) -> NoReturn:
        self._data.release()
        for start, command in _COMPRESSED.items():
            if magic.startswith(start):
                raise CaptureError(f"{self.path} is compressed; unpack it first: {command} {self.path} > capture.pcap")
        if not magic:
            raise CaptureError(f"{self.path} is empty; expected a pcap or pcapng capture")
        if magic[:4] in (*_CLASSIC, _SECTION):
            raise CaptureError(f"{self.path} ends within its file header; copy or record the capture again")
        raise CaptureError(f"{self.path} is not a pcap or pcapng capture (it begins with {magic[:4].hex(' ')})")

    def _require_ethernet(self, link: int) -> None:
        if link == ETHERNET:
            return
        name = LINK_TYPES.get(link)
        what = f"{name}, link type {link}" if name else f"link type {link}"
        raise CaptureError(
            f"{self.path} holds {what}, and only Ethernet (link type 1) can be read; record on an Ethernet interface "
            "(tcpdump -i eth0, not -i any), or, where the frames are Ethernet all the same, relabel the file with "
            "editcap -T ether",
            packets=self.packets,
        )

    def _cut(self, what: str) -> CaptureError:
        return CaptureError(
            f"{self.path} {what} after {self.packets} whole packets, which were used; "
            "copy or record the capture again for the rest",
            packets=self.packets,
        )

    def _take(self) -> PacketBatch:
        """What has been collected, as a batch."""
        batch = PacketBatch(
            self._data,
            np.array(self._times, np.int64),
            np.array(self._offsets, np.int64),
            np.array(self._lengths, np.int64),
        )
        self.packets += len(batch)
        self._times, self._offsets, self._lengths = [], [], []
        return batch

    def _classic(self) -> Generator[PacketBatch, None, None]:
        data, unit, end = self._data, self._unit, len(self._data)
        unpack = struct.Struct(self._order + "IIII").unpack_from
        at, problem = 24, ""
        while at < end:
            stop = at + 16
            if stop > end:
                problem = "stops in the middle of a packet header"
                break
            seconds, fraction, length, _ = unpack(data, at)
            at = stop + length
            if length > LARGEST_PACKET:
                problem = f"is damaged: it claims a packet of {length} bytes"
                break
            if at > end:
                problem = "stops in the middle of a packet"
                break
            self._times.append(seconds * 1_000_000_000 + fraction * unit)
            self._offsets.append(stop)
            self._lengths.append(length)
            if len(self._times) == self._batch:
                yield self._take()
        if self._times:
            yield self._take()
        if problem:
            raise self._cut(problem)

    def _first_interface(self) -> None:
        """Look ahead to the first interface, so that a capture of something else is refused at once."""
        order = _ORDERS.get(bytes(self._data[8:12]), "<")
        at = 0
        while at + 12 <= len(self._data):
            kind, size = struct.unpack_from(order + "II", self._data, at)
            if kind == 1 and at + 10 <= len(self._data):
                self._require_ethernet(struct.unpack_from(order + "H", self._data, at + 8)[0])
                return
            if kind in (2, 3, 6) or size < 12:
                return
            at += size

    def _blocks(self) -> Generator[PacketBatch, None, None]:
        """Blocks of a pcapng file: sections, interfaces and the three kinds of packet; all others are passed over."""
        data, end = self._data, len(self._data)
        interfaces: list[_Interface] = []
        order, at, problem, last_ns = "<", 0, "", 0
        while at < end and not problem:
            if data[at : at + 4] == _SECTION:
                order = _ORDERS.get(bytes(data[at + 8 : at + 12]), "")
                interfaces = []
                if not order:
                    problem = "is damaged: a section of unknown byte order begins"
                    break
            if at + 12 > end:
                problem = "stops in the middle of a block"
                break
            kind, size = struct.unpack_from(order + "II", data, at)
            body, at = at + 8, at + size
            if size < 12 or size % 4:
                problem = f"is damaged: it claims a block of {size} bytes"
                break
            if at > end:
                problem = "stops in the middle of a packet" if kind in (2, 3, 6) else "stops in the middle of a block"
                break
            if kind == 1 and size >= 20:
                interfaces.append(_Interface.read(data[body : at - 4], order))
                continue
            if kind == 6 and size >= 32:
                which, high, low, length, _ = struct.unpack_from(order + "IIIII", data, body)
                start = body + 20
            elif kind == 2 and size >= 32:
                which, _, high, low, length, _ = struct.unpack_from(order + "HHIIII", data, body)
                start = body + 20
            elif kind == 3 and size >= 16:
                which, high, low, start = 0, -1, 0, body + 4
                snap = interfaces[0].snap if interfaces else 0
                length = min(struct.unpack_from(order + "I", data, body)[0], size - 16, snap or size)
            elif kind in (2, 3, 6):
                problem = "is damaged: it has a packet block without a packet"
                break
            else:
                continue
            if which >= len(interfaces) or start + length > at - 4 or length > LARGEST_PACKET:
                problem = "is damaged: a packet does not fit its block, or names an interface that is not described"
                break
            interface = interfaces[which]
            if interface.link != ETHERNET:
                if self._times:
                    yield self._take()
                self._require_ethernet(interface.link)
            if high >= 0:
                last_ns = interface.to_ns(high << 32 | low)
                if not 0 <= last_ns < 1 << 63:
                    problem = "is damaged: a packet's time lies outside the years 1970 to 2262"
                    break
            # A simple packet block has no time: it is given that of the packet before it.
            self._times.append(last_ns)
            self._offsets.append(start)
            self._lengths.append(length)
            if len(self._times) == self._batch:
                yield self._take()
        if self._times:
            yield self._take()
        if problem:
            raise self._cut(problem)


@dataclass(frozen=True)
class _Interface:
    """An Interface Description Block: link type, snap length (0: none), and how its times become nanoseconds."""

    link: int
    snap: int
    multiply: int
    divide: int
    offset_ns: int

    def to_ns(self, units: int) -> int:
        return units * self.multiply // self.divide + self.offset_ns

    @classmethod
    def read(cls, body: memoryview, order: str) -> _Interface:
        """From the body of the block; if_tsresol (9) and if_tsoffset (14) default to microseconds and none."""
        link, _, snap = struct.unpack_from(order + "HHI", body, 0)
        per_second, offset, at = 1_000_000, 0, 8
        while at + 4 <= len(body):
            code, size = struct.unpack_from(order + "HH", body, at)
            value = body[at + 4 : at + 4 + size]
            if code == 0:
                break
            if code == 9 and size == 1:
                per_second = 1 << (value[0] & 0x7F) if value[0] & 0x80 else 10 ** value[0]
            elif code == 14 and size == 8:
                (offset,) = struct.unpack(order + "q", value)
            at += 4 + (size + 3) // 4 * 4
        return cls(link, snap, 1_000_000_000, per_second, offset * 1_000_000_000)
