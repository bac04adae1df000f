"""Walks over the flow table, by the programs that do it in the kernel: one for each of its two maps (bpf/walk.h)."""

from __future__ import annotations

import ctypes as ct
from collections.abc import Iterable
from dataclasses import dataclass

from flowsage.collector.testrun import call_program

WALKS = ("flow_expire", "flow_front")
"""The programs that walk over the table, each over one of its maps."""

EXPIRE, FLUSH, COUNT = range(3)
"""enum flow_walk_mode: emit what has ended or timed out; emit everything; add up what is there."""


class WalkContext(ct.Structure):
    """struct flow_walk."""

    _fields_ = (
        ("now_ns", ct.c_uint64),
        ("mode", ct.c_uint32),
        ("pad", ct.c_uint32),
        ("emitted", ct.c_uint64),
        ("removed", ct.c_uint64),
        ("failed", ct.c_uint64),
        ("flows", ct.c_uint64),
        ("packets", ct.c_uint64),
        ("bytes", ct.c_uint64),
    )


@dataclass(frozen=True)
class Walk:
    """What a walk over the table did: records `emitted`, entries `removed`, entries that should have been emitted but
    `failed` (the ring is full: drain and walk again), entries seen that stay (`kept`)."""

    emitted: int
    removed: int
    failed: int
    kept: int


@dataclass(frozen=True)
class TableTotals:
    """What the table holds: exact when no packet arrives meanwhile."""

    flows: int
    packets: int
    bytes: int


def walk_table(programs: Iterable[int], mode: int, now_ns: int = 0) -> WalkContext:
    """Runs the walks (descriptors) one after the other; returns their sums. Raises ProgramError."""
    total = WalkContext(mode=mode)
    for fd in programs:
        walk = WalkContext(mode=mode, now_ns=now_ns)
        call_program(fd, walk)
        for field in ("emitted", "removed", "failed", "flows", "packets", "bytes"):
            setattr(total, field, getattr(total, field) + getattr(walk, field))
    return total
