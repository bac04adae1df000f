"""Packets through the real program without an interface: BPF_PROG_TEST_RUN (Documentation/bpf/bpf_prog_run.rst).

The kernel takes frames of 14 bytes up to a linear page and 17 fragments. A shorter one (a runt in a capture) is filled
up, of a longer one its beginning is run, which holds every header; the program is told the frame's own length.
"""

from __future__ import annotations

import ctypes as ct
import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flowsage.collector import libbpf, syscall
from flowsage.collector.errors import InputError, KernelSupportError

if TYPE_CHECKING:
    from flowsage.collector.program import FlowProgram

RUNT_BYTES = 14
"""Frames shorter than an Ethernet header are refused by the kernel (EINVAL)."""
OVERSIZE_BYTES = 69_632
"""17 fragments of a page (MAX_SKB_FRAGS); the linear part, some 3.5 KB, comes on top and is left as a margin."""

VERDICTS = ("XDP_ABORTED", "XDP_DROP", "XDP_PASS", "XDP_TX", "XDP_REDIRECT")
"""enum xdp_action."""

_OWN_LENGTH = 1 << 63  # FLOW_INPUT_LENGTH of bpf/flow.h
_BPF, _TEST_RUN = syscall.NUMBER, 10
ATTRIBUTES = np.dtype(
    {
        "names": [
            "program",
            "retval",
            "data_size_in",
            "data_size_out",
            "data_in",
            "repeat",
            "duration",
            "ctx_size_in",
            "ctx_in",
        ],
        "formats": ["<u4", "<u4", "<u4", "<u4", "<u8", "<u4", "<u4", "<u4", "<u8"],
        "offsets": [0, 4, 8, 12, 16, 32, 36, 40, 48],
        "itemsize": 80,
    }
)
"""`union bpf_attr`.test of linux/bpf.h, the fields that we set."""

# CDLL lets go of the interpreter's lock, so that several threads run packets at the same time.
_syscall: Any = ct.CDLL(None).syscall
_syscall.argtypes = (ct.c_long, ct.c_int, ct.c_void_p, ct.c_uint)
_syscall.restype = ct.c_long
_syscall_errno: Any = ct.CDLL(None, use_errno=True).syscall
_syscall_errno.argtypes, _syscall_errno.restype = _syscall.argtypes, ct.c_long

_CHUNK = 8192


class TestRunner:
    """Feeds frames to one loaded FlowProgram: to what sees them arrive, or to the program behind `fd`. Keeps its memory
    between calls; one thread each."""

    __test__ = False  # not a test, whatever its name begins with

    def __init__(self, program: FlowProgram, fd: int | None = None) -> None:
        self._program = program
        self._attributes = np.zeros(_CHUNK, ATTRIBUTES)
        self._attributes["program"] = program.xdp_fd if fd is None else fd
        self._attributes["repeat"] = 1

    def feed(self, frames: Sequence[bytes | memoryview], times_ns: Sequence[int] | None = None) -> int:
        """Runs each frame once, at its time (ns) where the program's clock is external. Returns how many."""
        lengths = np.fromiter(map(len, frames), np.int64, len(frames))
        offsets = np.cumsum(lengths) - lengths
        return self.feed_buffer(b"".join(frames), offsets, lengths, times_ns)

    def feed_buffer(
        self,
        data: bytes | memoryview,
        offsets: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        times_ns: npt.NDArray[np.int64] | Sequence[int] | None = None,
    ) -> int:
        """The same for frames `data[offsets[i] : offsets[i] + lengths[i]]` (a PacketBatch), without copying them."""
        base = np.frombuffer(data, np.uint8).ctypes.data if len(data) else 0
        addresses = (base + offsets).astype(np.uint64)
        # Lists: what is handed to ctypes and memoryview has to be a Python integer.
        times = None if times_ns is None else np.asarray(times_ns, np.int64).astype(np.uint64).tolist()
        start = 0
        for odd in np.flatnonzero((lengths < RUNT_BYTES) | (lengths > OVERSIZE_BYTES)).tolist():
            self._run(addresses, lengths, times, start, odd)
            self._run_odd(
                bytes(data[offsets[odd] : offsets[odd] + lengths[odd]]), None if times is None else times[odd]
            )
            start = odd + 1
        self._run(addresses, lengths, times, start, len(lengths))
        return len(lengths)

    def _run(
        self,
        addresses: npt.NDArray[np.uint64],
        sizes: npt.NDArray[np.int64],
        times: list[int] | None,
        start: int,
        stop: int,
    ) -> None:
        call, size, clock = _syscall, ATTRIBUTES.itemsize, self._program.clock
        first = self._attributes.ctypes.data
        for begin in range(start, stop, _CHUNK):
            part = slice(begin, min(begin + _CHUNK, stop))
            rows = self._attributes[: part.stop - begin]
            rows["data_in"], rows["data_size_in"] = addresses[part], sizes[part]
            rows["data_size_out"] = 0  # the kernel wrote here, and would take it for the size of a buffer
            where = range(first, first + len(rows) * size, size)
            if times is None:
                for at in where:
                    if call(_BPF, _TEST_RUN, at, size):
                        self._explain(at)
                continue
            for at, now in zip(where, times[part], strict=True):
                clock[0] = now
                if call(_BPF, _TEST_RUN, at, size):
                    self._explain(at)

    def _run_odd(self, frame: bytes, now: int | None) -> None:
        """A frame that the kernel does not carry as it is."""
        if not self._program.settings.external_clock:
            raise InputError(
                f"a frame of {len(frame)} bytes can be run only by a program that was loaded with external_clock"
            )
        carried = np.frombuffer(frame[:OVERSIZE_BYTES].ljust(RUNT_BYTES, b"\0"), np.uint8)
        self._program.clock[1] = _OWN_LENGTH | len(frame)
        try:
            self._run(
                np.array([carried.ctypes.data], np.uint64),
                np.array([len(carried)]),
                None if now is None else [now],
                0,
                1,
            )
        finally:
            self._program.clock[1] = 0

    def _explain(self, at: int) -> None:
        """The run failed before the program saw the packet: again, for the reason."""
        while _syscall_errno(_BPF, _TEST_RUN, at, ATTRIBUTES.itemsize):
            code = ct.get_errno()
            if code == errno.EINVAL:
                raise KernelSupportError(
                    "this kernel does not run XDP programs on a frame of this length by BPF_PROG_TEST_RUN"
                )
            if code not in {errno.EAGAIN, errno.EINTR, errno.ENOMEM}:
                raise libbpf.failure(code, "running a packet through the program")


def _run_once(program_fd: int, frame: bytes, repeat: int) -> npt.NDArray[np.void]:
    data = ct.create_string_buffer(frame, len(frame))
    attributes = np.zeros(1, ATTRIBUTES)
    attributes["program"], attributes["repeat"] = program_fd, repeat
    attributes["data_in"], attributes["data_size_in"] = ct.addressof(data), len(frame)
    if _syscall_errno(_BPF, _TEST_RUN, attributes.ctypes.data, ATTRIBUTES.itemsize):
        raise libbpf.failure(ct.get_errno(), "running a packet through the program")
    return attributes


def measure(program_fd: int, frame: bytes, repeat: int = 1_000_000) -> int:
    """Mean ns that the program takes for `frame`, over `repeat` runs inside the kernel."""
    return int(_run_once(program_fd, frame, repeat)["duration"][0])


def verdict(program_fd: int, frame: bytes) -> str:
    """What an XDP program says of `frame`: the name of its verdict."""
    return VERDICTS[int(_run_once(program_fd, frame, 1)["retval"][0])]


def call_program(program_fd: int, context: ct.Structure) -> None:
    """Runs a SEC("syscall") program on `context`, in place. Raises ProgramError where it returns anything but 0."""
    attributes = np.zeros(1, ATTRIBUTES)
    attributes["program"] = program_fd
    attributes["ctx_in"], attributes["ctx_size_in"] = ct.addressof(context), ct.sizeof(context)
    if _syscall_errno(_BPF, _TEST_RUN, attributes.ctypes.data, ATTRIBUTES.itemsize):
        raise libbpf.failure(ct.get_errno(), "running a syscall program")
    if attributes["retval"][0]:
        raise libbpf.failure(errno.EINVAL, "a syscall program refused what it was asked for")
