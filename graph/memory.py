"""Large arrays from buffers that are used again once nobody looks at them any more.

Windows come every minute and want tens of megabytes each; fresh pages cost more than what is computed on them
(measured on a virtual machine: 67 ms to touch 30 MB of new memory, 1 ms to touch it again). And rows of a cache line
must begin at one.

Other arrays of megabytes go back to the system when they are gone (`_settle`): kept in the C library's heap, among
what stays, they were .4 GB of a process that had scored windows of ten million flows.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

_LINE = 64
_SMALL = 1 << 16
_FEW = 1 << 12
"""Bytes, and numbers of whatever type, that are not worth the search for a buffer."""
_LIMIT = 1 << 29
"""Buffers of at most so many bytes in all are remembered."""
_LARGEST = 1 << 25
"""Bytes from which on a buffer is not remembered: pages of that size are large and soon there, and what lies idle adds
up."""

_TRIM, _MAP = -1, -3
"""Of <malloc.h>: how much may stay free at the end of the heap, and from which size on memory is mapped by itself."""


def _glibc() -> ctypes.CDLL | None:
    """The C library, None if it is another."""
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.mallopt and libc.malloc_trim else None
    except (AttributeError, OSError):
        return None


_libc = _glibc()
_lock = threading.Lock()
_buffers: list[npt.NDArray[np.uint8]] = []


def empty(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """As np.empty, aligned to a cache line. The memory is taken again when the array and all its views are gone."""
    count = shape if isinstance(shape, int) else math.prod(shape)
    if count < _FEW:
        return np.empty(shape, dtype)
    kind = np.dtype(dtype)
    size = kind.itemsize * count
    if size < _SMALL:
        return np.empty(shape, kind)
    return _aligned(_take(size + _LINE) if size < _LARGEST else np.empty(size + _LINE, np.uint8), size, kind, shape)


def zeros(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """As np.zeros, from the same memory. What is too large to be remembered takes memory when it is touched."""
    count = shape if isinstance(shape, int) else math.prod(shape)
    if count < _FEW:
        return np.zeros(shape, dtype)
    kind = np.dtype(dtype)
    size = kind.itemsize * count
    if size >= _LARGEST:
        return _aligned(np.zeros(size + _LINE, np.uint8), size, kind, shape)
    array = empty(shape, kind)
    array.fill(0)
    return array


def sparse(count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """As np.zeros, for what stays nought but for a few places: only the small pages that are written take memory."""
    if count < _FEW or (size := np.dtype(dtype).itemsize * count) < _LARGEST:
        return np.zeros(count, dtype)
    return np.frombuffer(mmap.mmap(-1, size), dtype)


def give_back() -> None:
    """Give the system what is free in the C library's heap, between what stays: 10 ms and a tenth of a gigabyte after a
    window of ten million flows."""
    if _libc is not None:
        _libc.malloc_trim(0)


def _aligned(
    buffer: npt.NDArray[np.uint8], size: int, kind: np.dtype[Any], shape: int | tuple[int, ...]
) -> npt.NDArray[Any]:
    begin = -buffer.ctypes.data % _LINE
    return buffer[begin : begin + size].view(kind).reshape(shape)


def _settle() -> None:
    """Fix from which size on glibc maps memory by itself: left alone it learns to keep up to 32 MB in its heap."""
    if _libc is not None:
        _libc.mallopt(_MAP, 4 << 20)
        # What glibc would have learnt: its first value gives back what the next window wants.
        _libc.mallopt(_TRIM, 64 << 20)


def _take(size: int) -> npt.NDArray[np.uint8]:
    """A buffer that nobody holds, the smallest that is large enough but not wastefully so; else a new one."""
    with _lock:
        best = None
        for buffer in _buffers:
            # Held by the list, this loop and the call itself: a view of it would hold it too.
            free = sys.getrefcount(buffer) <= 3 + (buffer is best)
            if free and size <= len(buffer) <= 2 * size and (best is None or len(buffer) < len(best)):
                best = buffer
        if best is not None:
            return best
        step = 1 << max(0, size.bit_length() - 3)
        buffer = np.empty(-(-size // step) * step, np.uint8)
        _buffers.append(buffer)
        total = sum(len(b) for b in _buffers)
        if total > _LIMIT:
            # Those that nobody holds go first, the oldest before others; whoever holds one that is forgotten keeps it.
            order = sorted(range(len(_buffers) - 1), key=lambda i: sys.getrefcount(_buffers[i]) > 2)
            gone = set()
            for i in order:
                if total > _LIMIT:
                    total -= len(_buffers[i])
                    gone.add(i)
            _buffers[:] = [b for i, b in enumerate(_buffers) if i not in gone]
        return buffer


_settle()
