"""Capabilities are given up once everything is attached (man 7 capabilities).

Draining, counters, the walk over the table, even attaching again work on descriptors that are open by then, and take no
privilege on the kernels since 5.19; before that bpf(2) itself asks for CAP_BPF. So all of them go, unless the sensor
does not work without: then CAP_BPF stays, and nothing else.
"""

from __future__ import annotations

import ctypes as ct
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from flowsage.collector.errors import FlowsageError, PrivilegeError

CAP_BPF = 39
_VERSION_3 = 0x20080522
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _CLEAR_ALL = 24, 38, 47, 4

logger = logging.getLogger(__name__)

_libc = ct.CDLL(None, use_errno=True)


class _Header(ct.Structure):
    _fields_ = (("version", ct.c_uint32), ("pid", ct.c_int))


class _Data(ct.Structure):
    _fields_ = (("effective", ct.c_uint32), ("permitted", ct.c_uint32), ("inheritable", ct.c_uint32))


def held(which: str = "CapEff") -> int:
    """Capabilities of the calling thread as a mask (bit n: capability n), from /proc/thread-self/status."""
    return _mask(Path("/proc/thread-self"), which)


def _mask(task: Path, which: str) -> int:
    lines = (task / "status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith(f"{which}:"))


def without_early_threads() -> None:
    """NumPy and Arrow start no threads when they are imported: those would keep the privileges of that time.

    To be called before either is imported; what is set already stays. Arrow allocates as everybody else does, too: its
    own allocator keeps some 40 MB of what the last Parquet file took.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")


def drop(works: Callable[[], object]) -> int:
    """The calling thread, and every thread it starts from here on, gives up all capabilities; returns what it keeps.

    A thread that has been started before keeps its own, which is logged: see `without_early_threads`.

    `works` does what has to work without them. Where it raises a FlowsageError for the lack of them, CAP_BPF stays.
    Nothing that is executed later gets any back. Raises PrivilegeError where the kernel refuses.
    """
    keep = held() & (0 if _would_work(works) else 1 << CAP_BPF)
    for number in range(64):
        if not keep >> number & 1 and _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) and ct.get_errno() != errno.EPERM:
            break  # the kernel knows no more; without CAP_SETPCAP the bounding set stays, and means nothing below
    _libc.prctl(_PR_CAP_AMBIENT, _CLEAR_ALL, 0, 0, 0)
    _set(keep)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if others := sum(mask & ~keep != 0 for mask in _of_all_threads()):
        logger.warning("%d threads were started before capabilities were given up, and keep theirs", others)
    return keep


def _of_all_threads() -> Iterator[int]:
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it ends just now
            yield _mask(task, "CapPrm")


def _would_work(works: Callable[[], object]) -> bool:
    """Tried in a thread of its own: capabilities are a thread's, and what it gives up ends with it."""
    answer: list[bool] = []

    def attempt() -> None:
        _set(0)
        with suppress(FlowsageError, OSError):
            works()
            answer.append(True)

    thread = threading.Thread(target=attempt, name="flowsage-privileges")
    thread.start()
    thread.join()
    return bool(answer)


def _set(mask: int) -> None:
    halves = (_Data * 2)()
    for place, half in enumerate(halves):
        half.effective = half.permitted = mask >> 32 * place & 0xFFFF_FFFF
    if _libc.capset(ct.byref(_Header(_VERSION_3, 0)), halves):
        raise PrivilegeError(f"capabilities cannot be given up: {os.strerror(ct.get_errno())}")
