"""What the kernel says of programs and maps: runs, time, memory, fill.

The kernel counts runs only while a descriptor that asks for it is open (BPF_ENABLE_STATS), since counting costs every
BPF program of the machine two clock readings a run; `counting` holds one for the length of a block and no longer.
"""

from __future__ import annotations

import ctypes as ct
import errno
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowsage.collector import libbpf, syscall
from flowsage.collector.errors import UnknownProgramError

MAP_TYPES = {
    1: "hash", 2: "array", 3: "prog_array", 4: "perf_event_array", 5: "percpu_hash", 6: "percpu_array",
    9: "lru_hash", 10: "lru_percpu_hash", 11: "lpm_trie", 14: "devmap", 16: "cpumap", 17: "xskmap", 27: "ringbuf",
}  # fmt: skip
"""enum bpf_map_type, those that XDP programs use."""
PROTOCOLS = ("TCP", "UDP", "ICMP", "OTHER")
"""Rows of the map `protocols` of counter.bpf.o, in order; ICMPv6 is ICMP, what is not IP or malformed is OTHER."""
_HASHES = {"hash", "percpu_hash", "lru_hash", "lru_percpu_hash"}
_ARRAYS = {"array", "percpu_array"}
TABLE = ("flows", "front")
"""The maps that together are the flow table: bpf/entry.h."""
_PLACE_WORDS = 32  # struct place, of which the first says whether it is held
_PAGE = mmap.PAGESIZE

_libc = ct.CDLL(None, use_errno=True)
_libc.mmap.restype = ct.c_void_p
_libc.mmap.argtypes = (ct.c_void_p, ct.c_size_t, ct.c_int, ct.c_int, ct.c_int, ct.c_long)
_libc.munmap.argtypes = (ct.c_void_p, ct.c_size_t)


@dataclass(frozen=True, kw_only=True)
class MapStats:
    """One map: `size` and `used` in entries, of a ring in bytes (used: what waits for its reader); None: not countable.

    An array has all its entries always, but for the front of the flow table, whose places may be free. `memory` is what
    the kernel charges for it, in bytes.
    """

    map_id: int
    name: str
    type: str
    key_bytes: int
    value_bytes: int
    size: int
    used: int | None
    memory: int

    @property
    def fill(self) -> float | None:
        """Used of size, 0 to 1."""
        return None if self.used is None or not self.size else self.used / self.size


@dataclass(frozen=True, kw_only=True)
class ProgramStats:
    """One program. `run_count` and `run_time_ns` since it was loaded, of the time that statistics were on; `memory` of
    program and maps together, in bytes. Values can be had by name too: `stats["run_count"]`.
    """

    program_id: int
    name: str
    run_count: int
    run_time_ns: int
    program_memory: int
    maps: tuple[MapStats, ...]

    @property
    def ns_per_run(self) -> float | None:
        """Mean time of a run; None where none was counted."""
        return self.run_time_ns / self.run_count if self.run_count else None

    @property
    def memory(self) -> int:
        """Bytes of the program and its maps."""
        return self.program_memory + sum(m.memory for m in self.maps)

    @property
    def table(self) -> tuple[int, int] | None:
        """Entries of the flow table, in both its maps: used, and all; None where the program has none."""
        maps = [m for m in self.maps if m.name in TABLE and m.used is not None]
        return (sum(m.used or 0 for m in maps), sum(m.size for m in maps)) if maps else None

    def map(self, name: str) -> MapStats:
        """The map of that name. Raises KeyError."""
        return next((m for m in self.maps if m.name == name), None) or _no(name)

    def __getitem__(self, name: str) -> Any:
        """A value by name."""
        return _no(name) if name.startswith("_") or not hasattr(self, name) else getattr(self, name)


def _no(name: str) -> Any:
    raise KeyError(name)


def by_protocol(counters: Mapping[str, int]) -> list[tuple[int, int]]:
    """Packets and bytes by PROTOCOLS of what the flow program has seen (`FlowProgram.counters`).

    Exact where no packet comes meanwhile; one that does may be in one counter and not in the other yet.
    """
    rows = [(counters[f"packets_{name.lower()}"], counters[f"bytes_{name.lower()}"]) for name in PROTOCOLS[:-1]]
    named = [sum(column) for column in zip(*rows, strict=True)]
    return [*rows, (max(0, counters["seen_packets"] - named[0]), max(0, counters["seen_bytes"] - named[1]))]


@contextmanager
def counting() -> Iterator[None]:
    """Runs are counted within the block. Raises PrivilegeError without CAP_SYS_ADMIN."""
    with _descriptor(syscall.enable_statistics(), "switching BPF statistics on"):
        yield


def read_program(program_id: int) -> ProgramStats:
    """What the kernel says of a program now. Raises UnknownProgramError, PrivilegeError."""
    with program_descriptor(program_id) as fd:
        info = syscall.info(fd, syscall.ProgramInfo)
        return ProgramStats(
            program_id=program_id,
            name=info.name.decode(),
            run_count=info.run_cnt,
            run_time_ns=info.run_time_ns,
            program_memory=_memory(fd),
            maps=tuple(stats for number in syscall.map_ids(fd) if (stats := _read_map(number)) is not None),
        )


@contextmanager
def program_descriptor(program_id: int) -> Iterator[int]:
    """A descriptor of the program for the block. Raises UnknownProgramError for one that the kernel does not know."""
    fd = syscall.by_id("program", program_id)
    if fd == -errno.ENOENT:
        raise UnknownProgramError(f"the kernel knows no program {program_id}; `bpftool prog` lists those it knows")
    with _descriptor(fd, f"asking for program {program_id}"):
        yield fd


@contextmanager
def map_descriptor(program_id: int, name: str) -> Iterator[tuple[int, syscall.MapInfo]]:
    """A descriptor of the program's map of that name, and its description. Raises UnknownProgramError for no such."""
    with program_descriptor(program_id) as program:
        for number in syscall.map_ids(program):
            with _descriptor(syscall.by_id("map", number), f"asking for map {number}") as fd:
                info = syscall.info(fd, syscall.MapInfo)
                if info.name.decode() == name[:15]:
                    yield fd, info
                    return
    raise UnknownProgramError(f"program {program_id} has no map {name}")


def read_pairs(program_id: int, name: str) -> list[tuple[int, int]]:
    """Rows of a program's per-CPU array of two 64-bit counters, each summed over CPUs. Raises UnknownProgramError."""
    return [(packets, octets) for packets, octets in read_rows(program_id, name)]


def read_rows(program_id: int, name: str) -> list[list[int]]:
    """Rows of a program's per-CPU array of 64-bit counters, summed over CPUs. Raises UnknownProgramError."""
    with map_descriptor(program_id, name) as (fd, info):
        width = info.value_size // 8
        rows, value = [], (ct.c_uint64 * (width * syscall.possible_cpus()))()
        for row in range(info.max_entries):
            libbpf.check(syscall.lookup(fd, row, value), f"reading {name} of program {program_id}")
            rows.append([sum(value[column::width]) for column in range(width)])
        return rows


@contextmanager
def _descriptor(fd: int, what: str) -> Iterator[int]:
    if fd < 0:
        raise libbpf.failure(-fd, what)
    try:
        yield fd
    finally:
        os.close(fd)


def _read_map(map_id: int) -> MapStats | None:
    fd = syscall.by_id("map", map_id)
    if fd == -errno.ENOENT:  # went between two questions
        return None
    with _descriptor(fd, f"asking for map {map_id}"):
        info = syscall.info(fd, syscall.MapInfo)
        kind = MAP_TYPES.get(info.type, f"type {info.type}")
        return MapStats(
            map_id=map_id,
            name=info.name.decode(),
            type=kind,
            key_bytes=info.key_size,
            value_bytes=info.value_size,
            size=info.max_entries,
            used=_used(fd, info, kind),
            memory=_memory(fd),
        )


def _used(fd: int, info: syscall.MapInfo, kind: str) -> int | None:
    if kind in _ARRAYS:
        front = info.name.decode() == TABLE[1] and info.value_size == 8 * _PLACE_WORDS
        return _held(fd, int(info.max_entries)) if front else int(info.max_entries)
    if kind in _HASHES:
        copies = syscall.possible_cpus() if "percpu" in kind else 1
        with suppress(OSError):
            return syscall.count_entries(fd, info.key_size, -(-info.value_size // 8) * 8 * copies)
        return None
    return _waiting(fd) if kind == "ringbuf" else None


def _held(fd: int, places: int) -> int | None:
    """Places of the front that are not free."""
    nbytes = 8 * _PLACE_WORDS * places
    address = _libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address in {None, ct.c_void_p(-1).value}:
        return None
    with memoryview((ct.c_uint64 * (_PLACE_WORDS * places)).from_address(address)) as words:
        held = sum(map(bool, words.cast("B").cast("Q")[::_PLACE_WORDS]))
    _libc.munmap(address, nbytes)
    return held


def _waiting(fd: int) -> int | None:
    """Bytes between the reader's position (first page of a ring) and the writer's (the next)."""
    positions = []
    for page in (0, 1):
        address = _libc.mmap(None, _PAGE, mmap.PROT_READ, mmap.MAP_SHARED, fd, page * _PAGE)
        if address in {None, ct.c_void_p(-1).value}:
            return None
        positions.append(ct.c_uint64.from_address(address).value)
        _libc.munmap(address, _PAGE)
    return max(0, positions[1] - positions[0])


def _memory(fd: int) -> int:
    """Bytes that the kernel charges, as it says in /proc."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("memlock:"):
            return int(line.split()[1])
    return 0
