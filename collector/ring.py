"""The BPF ring buffer as a NumPy structured array.

Every record is one slot of 256 bytes: the kernel's 8-byte header and `RECORD_DTYPE`. The ring's size is a multiple of
256, so what waits in it is one slice, or two where it wraps. To look at it is that slice, a glance at the busy bits and
one copy. What is mapped counts as memory of ours, so it is only a window that moves along the ring.
(Layout and protocol: Documentation/bpf/ringbuf.rst, kernel/bpf/ringbuf.c.)
"""

from __future__ import annotations

import ctypes as ct
import mmap
import select
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flowsage.collector.errors import ProgramError
from flowsage.collector.records import RECORD_DTYPE

SLOT_DTYPE = np.dtype([("length", "<u4"), ("page", "<u4"), ("record", RECORD_DTYPE)])
"""One slot: `length` is that of the record, with BUSY and DISCARDED on top."""
SLOT_BYTES = SLOT_DTYPE.itemsize
BUSY, DISCARDED = 1 << 31, 1 << 30
WINDOW_BYTES = 4 << 20
"""How much of a ring is mapped at once, at least: two batches of the agent. To move it takes 0.4 ms, 20 ns a record."""
_WORDS = RECORD_DTYPE.itemsize // 8
_PAGE = mmap.PAGESIZE

Records = npt.NDArray[np.void]

_libc = ct.CDLL(None, use_errno=True)
_libc.mmap.restype = ct.c_void_p
_libc.mmap.argtypes = (ct.c_void_p, ct.c_size_t, ct.c_int, ct.c_int, ct.c_int, ct.c_long)
_libc.munmap.argtypes = (ct.c_void_p, ct.c_size_t)


def _map(fd: int, size: int, protection: int, offset: int) -> int:
    # Python's mmap checks the length against fstat, which a map's descriptor does not have.
    # The kernel puts every page of a map in at once: to ask for that (MAP_POPULATE) would only cost as much again.
    address: int | None = _libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, offset)
    if address in {None, ct.c_void_p(-1).value}:
        raise ProgramError(f"the ring buffer cannot be mapped: errno {ct.get_errno()}")
    assert address is not None
    return address


def _view(address: int, size: int) -> npt.NDArray[np.uint8]:
    return np.ctypeslib.as_array((ct.c_uint8 * size).from_address(address))


class MappedMap:
    """The values of an array map (a program's globals) as 64-bit words that both sides see at once."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._size = -(-nbytes // _PAGE) * _PAGE
        self._address = _map(fd, self._size, mmap.PROT_READ | mmap.PROT_WRITE, 0)
        self.words = memoryview((ct.c_uint8 * nbytes).from_address(self._address)).cast("B").cast("Q")

    def close(self) -> None:
        """Unmaps: `words` is gone."""
        self.words.release()
        _libc.munmap(self._address, self._size)


class Taken(NamedTuple):
    """Records of a ring, and the position behind them."""

    records: Records
    end: int


class Ring:
    """The reader of a ring. `fd`: its map descriptor, `size`: its bytes (max_entries). One reader at a time.

    Raises ProgramError where it cannot be mapped. `waiting` is how many slots are there, `drained` how many records
    this reader has taken.
    """

    def __init__(self, fd: int, size: int) -> None:
        if size % _PAGE or size & (size - 1):
            raise ProgramError(f"a ring of {size} bytes: not a power of two of pages ({_PAGE} bytes)")
        self.size = size
        self.drained = 0
        self._fd = fd
        self._consumer_map = _map(fd, _PAGE, mmap.PROT_READ | mmap.PROT_WRITE, 0)
        self._producer_map = _map(fd, _PAGE, mmap.PROT_READ, _PAGE)
        self._consumer = _view(self._consumer_map, 8).view("<u8")
        self._producer = _view(self._producer_map, 8).view("<u8")
        self._window_map = self._window_start = self._window_end = 0
        self._look_at(0, SLOT_BYTES)
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLIN)

    @property
    def waiting(self) -> int:
        """Slots that the kernel has reserved and we have not taken."""
        return (int(self._producer[0]) - int(self._consumer[0])) // SLOT_BYTES

    @property
    def position(self) -> int:
        """Where the reader stands, in bytes since the ring was made: everything before is the kernel's again."""
        return int(self._consumer[0])

    @property
    def end(self) -> int:
        """Where the kernel will reserve next."""
        return int(self._producer[0])

    def peek(self, max_records: int | None = None, out: Records | None = None, *, to: int | None = None) -> Taken:
        """The records that wait, oldest first, as a copy [n] of RECORD_DTYPE; their slots stay taken until `release`.

        At most `max_records` slots, or as many as `out` (RECORD_DTYPE, contiguous) holds, of those before the position
        `to`. Stops where the ring wraps, and before a record that is being written. Never blocks.
        """
        taken = int(self._consumer[0])
        count = ((int(self._producer[0]) if to is None else to) - taken) // SLOT_BYTES
        if max_records is not None:
            count = min(count, max_records)
        if out is not None:
            count = min(count, len(out))
        start = taken % self.size // SLOT_BYTES
        count = min(count, self.size // SLOT_BYTES - start)
        self._look_at(start * SLOT_BYTES, (start + count) * SLOT_BYTES)
        start -= self._window_start // SLOT_BYTES
        lengths = self._lengths[start : start + count]
        kept = None
        if count and int(lengths.max()) >= DISCARDED:
            busy = lengths >= BUSY
            if busy.any():
                count = int(busy.argmax())
                lengths = lengths[:count]
            kept = np.flatnonzero(lengths < DISCARDED)
        words = self._words[start : start + count]
        records = self._copy(words if kept is None or len(kept) == count else words[kept], out)
        return Taken(records, taken + count * SLOT_BYTES)

    def _look_at(self, start: int, end: int) -> None:
        """Moves the window where these bytes of the ring are not all in it."""
        if self._window_start <= start and end <= self._window_end:
            return
        self._unmap_window()
        start -= start % _PAGE
        end = min(self.size, max(start + WINDOW_BYTES, -(-end // _PAGE) * _PAGE))
        self._window_map = _map(self._fd, end - start, mmap.PROT_READ, 2 * _PAGE + start)
        self._window_start, self._window_end = start, end
        data = _view(self._window_map, end - start)
        self._lengths = data.view("<u4")[:: SLOT_BYTES // 4]
        self._words = data.view("<u8").reshape(-1, SLOT_BYTES // 8)[:, 1:]

    def _unmap_window(self) -> None:
        if self._window_map:
            del self._lengths, self._words
            _libc.munmap(self._window_map, self._window_end - self._window_start)
            self._window_map = self._window_start = self._window_end = 0

    def release(self, position: int) -> None:
        """Everything before `position` is the kernel's again: it may write there from here on."""
        self._consumer[0] = position

    def drain(self, max_records: int | None = None, out: Records | None = None) -> Records:
        """`peek` and `release` at once, and again where the ring wraps."""
        first = self.peek(max_records, out)
        self.release(first.end)
        count = len(first.records)
        self.drained += count
        if first.end % self.size or not self.waiting or count == max_records:
            return first.records
        left = None if max_records is None else max_records - count
        second = self.peek(left, None if out is None else out[count:])
        self.release(second.end)
        self.drained += len(second.records)
        return np.concatenate([first.records, second.records]) if out is None else out[: count + len(second.records)]

    @staticmethod
    def _copy(words: npt.NDArray[np.uint64], out: Records | None) -> Records:
        if out is None:
            out = np.empty(len(words), RECORD_DTYPE)
        part = out[: len(words)]
        np.copyto(part.view("<u8").reshape(-1, _WORDS), words)
        return part

    def wait(self, timeout: float) -> bool:
        """Sleeps until the kernel wakes the reader (a threshold is passed) or `timeout` seconds went by.

        True: something waits. The kernel wakes readers only past the program's threshold, so drain in any case.
        """
        self._epoll.poll(timeout, 1)
        return self.waiting > 0

    def close(self) -> None:
        """Unmaps. What was drained stays, being copies. Idempotent."""
        if self._consumer_map:
            self._epoll.close()
            self._unmap_window()
            del self._consumer, self._producer
            _libc.munmap(self._consumer_map, _PAGE)
            _libc.munmap(self._producer_map, _PAGE)
            self._consumer_map = 0

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
