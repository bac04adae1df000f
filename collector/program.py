"""The flow program: loaded with typed settings, attached to interfaces, asked for its counters, walked, drained.

`FlowProgram` is the one owner of the kernel objects of a sensor. Several interfaces share one program, one flow table
and one ring. What it is loaded from, or adopts (collector/lifetime.py), is a `KernelObject`.
"""

from __future__ import annotations

import ctypes as ct
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from flowsage.collector import libbpf, syscall
from flowsage.collector.errors import ConfigurationError, InterfaceError, ProgramError
from flowsage.collector.kernel_object import OBJECT, KernelObject, LoadableObject, Loader, open_object
from flowsage.collector.ring import MappedMap, Records, Ring
from flowsage.collector.testrun import TestRunner, measure
from flowsage.collector.walk import COUNT, EXPIRE, FLUSH, WALKS, TableTotals, Walk, WalkContext, walk_table
from flowsage.collector.xdp import Attachment, EBPFAttachMode, attach

COUNTERS = (
    "seen_packets", "seen_bytes",
    "accounted_packets", "accounted_bytes",
    "non_ip_packets", "non_ip_bytes",
    "malformed_packets", "malformed_bytes",
    "truncated_packets", "truncated_bytes",
    "lost_table_packets", "lost_table_bytes",
    "lost_closed_packets", "lost_closed_bytes",
    "emitted_records",
    "emitted_packets", "emitted_bytes",
    "fragment_nonfirst", "created", "table_full", "closed_race", "retries", "misattributed",
    "ring_full",
    "packets_tcp", "bytes_tcp",
    "packets_udp", "bytes_udp",
    "packets_icmp", "bytes_icmp",
    "duplicate_packets", "duplicate_bytes",
)  # fmt: skip
"""enum flow_counter of bpf/flow.h, in order, in lower case and without its prefix."""

KEPT = ("flows", "front", "cells", "records", "counters")
"""The maps that hold what has been counted: an upgrade either keeps them all, or empties them."""

_SECOND = 1_000_000_000
_PAGE = 4096
_FRONT_LEAST = 4
_CELLS_PER_PLACE = 2  # of bpf/entry.h


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """What the program is loaded with. Times in ns, 0: never.

    `external_clock`: time is what `FlowProgram.clock[0]` holds (captures, tests), and a frame's length `clock[1]` where
    its top bit is set; `mirror`: packets are dropped after they were counted; `dedupe`: one that several interfaces see
    is counted on one of them (a copy may be a second late; each direction of a flow has an interface, which another
    takes over from after a second of silence); `tcp_ends`: FIN, RST and a new SYN end a flow; `egress`: with one for
    what leaves an interface (the verifier takes 0.2 s for it); `wake_bytes`: wake the reader when so much waits.
    """

    table_entries: int = 262_144
    ring_bytes: int = 16 << 20
    idle_ns: int = 15 * _SECOND
    active_ns: int = 60 * _SECOND
    half_open_ns: int = 5 * _SECOND
    linger_ns: int = 1 * _SECOND
    wake_bytes: int | None = None
    mirror: bool = False
    dedupe: bool = False
    egress: bool = True
    external_clock: bool = False
    tcp_ends: bool = True

    def __post_init__(self) -> None:
        if self.table_entries < 1:
            raise ConfigurationError(f"a flow table of {self.table_entries} entries: it needs at least 1")
        if self.ring_bytes < _PAGE or self.ring_bytes & (self.ring_bytes - 1):
            raise ConfigurationError(
                f"a ring of {self.ring_bytes} bytes: it must be a power of two of at least {_PAGE}"
            )
        for name in ("idle_ns", "active_ns", "half_open_ns", "linger_ns"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}: it must be 0 (never) or more")

    @property
    def front_entries(self) -> int:
        """How many of the table's entries are places of the front (bpf/entry.h): a quarter to a half, a power of two; 0
        in a table of less than 8."""
        half = self.table_entries // 2
        return 1 << half.bit_length() - 1 if half >= _FRONT_LEAST else 0

    def without_timeouts(self) -> FlowSettings:
        """The same, with one record a 5-tuple, ended by nothing but a flush."""
        return replace(self, idle_ns=0, active_ns=0, half_open_ns=0, tcp_ends=False)


class _Settings(ct.Structure):
    """struct flow_settings."""

    _fields_ = (
        ("idle_ns", ct.c_uint64),
        ("active_ns", ct.c_uint64),
        ("half_open_ns", ct.c_uint64),
        ("linger_ns", ct.c_uint64),
        ("soonest_ns", ct.c_uint64),
        ("wake_bytes", ct.c_uint32),
        ("front_entries", ct.c_uint32),
        ("mirror", ct.c_uint8),
        ("external_clock", ct.c_uint8),
        ("tcp_ends", ct.c_uint8),
        ("layout", ct.c_uint8),
        ("dedupe", ct.c_uint8),
        ("pad", ct.c_uint8 * 3),
    )


class FlowProgram:
    """The flow program in the kernel. Use as a context manager: leaves nothing behind.

    Loading raises PrivilegeError, KernelSupportError or ProgramError (see collector/libbpf.py).
    """

    def __init__(self, settings: FlowSettings | None = None, *, path: Path = OBJECT, loader: Loader = "auto") -> None:
        self.settings = settings or FlowSettings()
        self.path = path
        self.loader = loader
        self.attachments: dict[str, Attachment] = {}
        self.carried: Mapping[str, int] = {}
        self._names: Sequence[str] = COUNTERS
        self._walks: Sequence[str] = WALKS
        self._object: KernelObject | None = None
        self._ring: Ring | None = None

    # ---- life ----

    def open(self) -> tuple[LoadableObject, int]:
        """The object with our settings in it, not yet in the kernel, and the version of its layout."""
        s, opened = self.settings, open_object(self.path, self.loader)
        try:
            opened.resize("flows", s.table_entries - s.front_entries)
            opened.resize("front", s.front_entries or 1)
            opened.resize("cells", s.front_entries * _CELLS_PER_PLACE or 1)
            opened.resize("records", s.ring_bytes)
            constants: _Settings = opened.data(".rodata.settings", _Settings)
            self._fill(constants)
            if not s.egress and isinstance(opened, libbpf.Object):
                opened.skip("flow_egress")
        except BaseException:
            opened.close()
            raise
        return opened, int(constants.layout)

    def _fill(self, constants: _Settings) -> None:
        s = self.settings
        constants.idle_ns, constants.active_ns = s.idle_ns, s.active_ns
        constants.half_open_ns, constants.linger_ns = s.half_open_ns, s.linger_ns
        # Ended flows exist only where TCP ends them.
        timeouts = (s.idle_ns, s.half_open_ns, s.linger_ns if s.tcp_ends else 0)
        constants.soonest_ns = min(filter(None, timeouts), default=0)
        constants.front_entries = s.front_entries
        constants.wake_bytes = s.ring_bytes // 8 if s.wake_bytes is None else s.wake_bytes
        constants.mirror, constants.external_clock, constants.tcp_ends = s.mirror, s.external_clock, s.tcp_ends
        constants.dedupe = s.dedupe

    def identity(self) -> str:
        """What would be loaded, in one word: the same settings and the same object have the same."""
        constants = _Settings()
        self._fill(constants)
        digest = hashlib.sha256(bytes(constants))
        s = self.settings
        digest.update(f"{s.table_entries} {s.ring_bytes} {s.egress} {self.loader}".encode())
        if self.path.is_file():
            digest.update(self.path.read_bytes())
        return digest.hexdigest()

    def load(self) -> FlowProgram:
        """Hands program and maps to the kernel. Returns itself."""
        if self._object is not None:
            return self
        opened, _ = self.open()
        try:
            opened.load()
            return self.adopt(opened)
        except BaseException:
            opened.close()  # and with it every descriptor; what was mapped goes with the process
            raise

    def adopt(self, kernel: KernelObject, what: Mapping[str, Any] | None = None) -> FlowProgram:
        """Works with what is in the kernel already; `what` an earlier version said of it: the names of its "counters"
        and of its "walks" (None: it is our own). Returns itself."""
        self.xdp_fd = kernel.program_fd("flow_xdp")
        self.ring_fd = kernel.map_fd("records")
        self.program_id = int(libbpf.program_info(self.xdp_fd).id)
        ring_bytes = syscall.info(self.ring_fd, syscall.MapInfo).max_entries
        self._input = MappedMap(kernel.map_fd(".data.input"), 16)
        self.clock = self._input.words
        self._cpus = syscall.possible_cpus()
        if what is not None:
            self._names, self._walks = what["counters"], what.get("walks", WALKS[:1])
        self._ring = Ring(self.ring_fd, ring_bytes)
        self._object = kernel
        return self

    @property
    def ring(self) -> Ring:
        """The reader of the program's ring."""
        if self._ring is None:
            raise ProgramError("the flow program is not loaded; call load() first")
        return self._ring

    def close(self) -> None:
        """Detaches everywhere and frees everything; the flows in the table go with it, so flush and drain first."""
        try:
            for interface in list(self.attachments):
                self.detach(interface)
        finally:
            self.release()

    def release(self) -> None:
        """Lets go of everything: what is pinned goes on, the rest is gone. Idempotent."""
        for attachment in self.attachments.values():
            attachment.release()
        self.attachments = {}
        try:
            if self._ring is not None:
                self._ring.close()
                self._ring = None
        finally:
            if self._object is not None:
                self._input.close()
                self._object.close()
                self._object = None

    def __enter__(self) -> FlowProgram:
        return self.load()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ---- interfaces ----

    def attach(
        self, interface: str, mode: EBPFAttachMode = EBPFAttachMode.AUTO, *, replace: bool = False
    ) -> Attachment:
        """Watches `interface` of this thread's network namespace. Raises InterfaceError, PrivilegeError."""
        self.load()
        if interface in self.attachments:
            raise InterfaceError(f"{interface} is watched already")
        attachment = self.attachments[interface] = attach(self.xdp_fd, interface, mode, replace=replace)
        return attachment

    def detach(self, interface: str) -> None:
        """Watches it no more."""
        if interface not in self.attachments:
            raise InterfaceError(f"{interface} is not watched")
        self.attachments.pop(interface).detach()

    def program_fd(self, name: str) -> int:
        """Descriptor of one of its programs. Raises ProgramError."""
        return self._loaded().program_fd(name)

    def map_fd(self, name: str) -> int:
        """Descriptor of one of its maps. Raises ProgramError."""
        return self._loaded().map_fd(name)

    # ---- what it knows ----

    def counters(self) -> dict[str, int]:
        """Every counter of COUNTERS, summed over CPUs, with what earlier programs of this sensor counted (`carried`).

        seen = accounted + non_ip + malformed + truncated + lost.
        """
        fd = self._loaded().map_fd("counters")
        width = syscall.info(fd, syscall.MapInfo).value_size // 8
        values = np.zeros((self._cpus, width), np.uint64)
        libbpf.check(syscall.lookup(fd, 0, np.ctypeslib.as_ctypes(values)), "reading the program's counters")
        counted = dict(zip(self._names, values.sum(axis=0, dtype=np.uint64).tolist(), strict=True))
        return {name: counted.get(name, 0) + self.carried.get(name, 0) for name in (*counted, *self.carried)}

    def table(self) -> TableTotals:
        """Flows, packets and bytes that the table holds now."""
        walk = self._walk(COUNT)
        return TableTotals(walk.flows, walk.packets, walk.bytes)

    # ---- records ----

    def expire(self, now_ns: int = 0) -> Walk:
        """Emits what has ended or timed out at `now_ns` of the program's clock (0: what its clock says)."""
        walk = self._walk(EXPIRE, now_ns)
        return Walk(walk.emitted, walk.removed, walk.failed, walk.flows)

    def flush(self) -> Walk:
        """Emits everything that fits the ring; `failed` says whether to drain and flush again (see `flush_all`)."""
        walk = self._walk(FLUSH)
        return Walk(walk.emitted, walk.removed, walk.failed, walk.flows)

    def flush_all(self) -> Iterator[Records]:
        """Flushes and drains until the table and the ring are empty, in batches."""
        while True:
            failed = self.flush().failed
            records = self.ring.drain()
            if len(records):
                yield records
            if not failed and not len(records):
                return

    # ---- without an interface ----

    def feeder(self) -> TestRunner:
        """Packets without an interface; one for each thread that feeds."""
        self.load()
        return TestRunner(self)

    def feed(self, frames: Sequence[bytes | memoryview], times_ns: Sequence[int] | None = None) -> int:
        """Runs frames through the program once, here and now. See TestRunner."""
        return self.feeder().feed(frames, times_ns)

    def measure(self, frame: bytes, repeat: int = 1_000_000) -> tuple[int, int]:
        """ns a packet for `frame`: of this program, and of a bare XDP_PASS."""
        loaded = self._loaded()
        return measure(loaded.program_fd("flow_xdp"), frame, repeat), measure(
            loaded.program_fd("pass_xdp"), frame, repeat
        )

    def _loaded(self) -> KernelObject:
        if self._object is None:
            raise ProgramError("the flow program is not loaded; call load() first")
        return self._object

    def _walk(self, mode: int, now_ns: int = 0) -> WalkContext:
        return walk_table(map(self._loaded().program_fd, self._walks), mode, now_ns)


@contextmanager
def flow_program(settings: FlowSettings | None = None) -> Iterator[FlowProgram]:
    """A loaded program for the length of a block."""
    with FlowProgram(settings) as program:
        yield program
