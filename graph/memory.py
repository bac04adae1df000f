"""Large arrays from buffers that are used again once nobody looks at them any more.

Windows come every minute and want tens of megabytes each; fresh pages cost more than what is computed on them
(measured on a virtual machine: 67 ms to touch 30 MB of new memory, 1 ms to touch it again). And rows of a cache line
must begin at one.
"""

from __future__ import annotations

import math
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
    buffer = _take(size + _LINE)
    begin = -buffer.ctypes.data % _LINE
    return buffer[begin : begin + size].view(kind).reshape(shape)


def zeros(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """As np.zeros, from the same memory."""
    array = empty(shape, dtype)
    array.fill(0)
    return array


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
