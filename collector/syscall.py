"""bpf(2) itself: what needs no library (linux/bpf.h, man 2 bpf).

Loading an object takes libbpf or bpftool, which know ELF and relocations. Everything after that, links, descriptions,
maps and statistics, is one system call with a small struct, the same with either.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

NUMBER = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}.get(os.uname().machine, 280)
"""Of the call, by architecture; the newer ones share the last."""

(_LOOKUP, _OBJ_GET, _PROGRAM_NEXT, _MAP_NEXT, _PROGRAM_FD, _MAP_FD, _INFO, _LOOKUP_BATCH) = (
    1,
    7,
    11,
    12,
    13,
    14,
    15,
    24,
)
_LINK_CREATE, _LINK_FD, _LINK_NEXT, _ENABLE_STATS, _LINK_DETACH = 28, 30, 31, 32, 34
_QUERY = 16
_ATTACH_XDP, _TCX_EGRESS = 37, 47  # enum bpf_attach_type
_LINKS = {6, 11}  # enum bpf_link_type: XDP, TCX
_NEXT = {"program": _PROGRAM_NEXT, "map": _MAP_NEXT, "link": _LINK_NEXT}
_BY_ID = {"program": _PROGRAM_FD, "map": _MAP_FD, "link": _LINK_FD}

Kind = Literal["program", "map", "link"]


class ProgramInfo(ct.Structure):
    """`struct bpf_prog_info` up to the run statistics; older kernels leave zeros at its end."""

    _fields_ = (
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("tag", ct.c_uint8 * 8),
        ("jited_prog_len", ct.c_uint32),
        ("xlated_prog_len", ct.c_uint32),
        ("jited_prog_insns", ct.c_uint64),
        ("xlated_prog_insns", ct.c_uint64),
        ("load_time", ct.c_uint64),
        ("created_by_uid", ct.c_uint32),
        ("nr_map_ids", ct.c_uint32),
        ("map_ids", ct.c_uint64),
        ("name", ct.c_char * 16),
        ("ifindex", ct.c_uint32),
        ("gpl_compatible", ct.c_uint32),
        ("netns_dev", ct.c_uint64),
        ("netns_ino", ct.c_uint64),
        ("nr_jited_ksyms", ct.c_uint32),
        ("nr_jited_func_lens", ct.c_uint32),
        ("jited_ksyms", ct.c_uint64),
        ("jited_func_lens", ct.c_uint64),
        ("btf_id", ct.c_uint32),
        ("func_info_rec_size", ct.c_uint32),
        ("func_info", ct.c_uint64),
        ("nr_func_info", ct.c_uint32),
        ("nr_line_info", ct.c_uint32),
        ("line_info", ct.c_uint64),
        ("jited_line_info", ct.c_uint64),
        ("nr_jited_line_info", ct.c_uint32),
        ("line_info_rec_size", ct.c_uint32),
        ("jited_line_info_rec_size", ct.c_uint32),
        ("nr_prog_tags", ct.c_uint32),
        ("prog_tags", ct.c_uint64),
        ("run_time_ns", ct.c_uint64),
        ("run_cnt", ct.c_uint64),
    )


class MapInfo(ct.Structure):
    """`struct bpf_map_info` up to the name."""

    _fields_ = (
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("key_size", ct.c_uint32),
        ("value_size", ct.c_uint32),
        ("max_entries", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("name", ct.c_char * 16),
    )


class LinkInfo(ct.Structure):
    """`struct bpf_link_info` of an XDP or TCX link: `ifindex` 0 once it is detached."""

    _fields_ = (
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("prog_id", ct.c_uint32),
        ("pad", ct.c_uint32),
        ("ifindex", ct.c_uint32),
    )


Info = TypeVar("Info", ProgramInfo, MapInfo, LinkInfo)


class _InfoOf(ct.Structure):
    _fields_ = (("fd", ct.c_uint32), ("length", ct.c_uint32), ("info", ct.c_uint64))


class _Identifier(ct.Structure):
    _fields_ = (("id", ct.c_uint32), ("next_id", ct.c_uint32), ("open_flags", ct.c_uint32))


class _Path(ct.Structure):
    _fields_ = (("pathname", ct.c_uint64), ("fd", ct.c_uint32), ("file_flags", ct.c_uint32))


class _Element(ct.Structure):
    _fields_ = (("map_fd", ct.c_uint64), ("key", ct.c_uint64), ("value", ct.c_uint64), ("flags", ct.c_uint64))


class _Batch(ct.Structure):
    _fields_ = (
        ("in_batch", ct.c_uint64),
        ("out_batch", ct.c_uint64),
        ("keys", ct.c_uint64),
        ("values", ct.c_uint64),
        ("count", ct.c_uint32),
        ("map_fd", ct.c_uint32),
        ("elem_flags", ct.c_uint64),
        ("flags", ct.c_uint64),
    )


class _Link(ct.Structure):
    _fields_ = (
        ("program_fd", ct.c_uint32),
        ("target", ct.c_uint32),
        ("attach_type", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("rest", ct.c_uint64 * 6),
    )


class _Query(ct.Structure):
    _fields_ = (
        ("target", ct.c_uint32),
        ("attach_type", ct.c_uint32),
        ("query_flags", ct.c_uint32),
        ("attach_flags", ct.c_uint32),
        ("prog_ids", ct.c_uint64),
        ("count", ct.c_uint32),
        ("rest", ct.c_uint32 * 9),
    )


class _Word(ct.Structure):
    _fields_ = (("value", ct.c_uint32),)


_syscall: Any = ct.CDLL(None, use_errno=True).syscall
_syscall.argtypes, _syscall.restype = (ct.c_long, ct.c_int, ct.c_void_p, ct.c_uint), ct.c_long


def call(command: int, attributes: ct.Structure) -> int:
    """What the kernel answers, or −errno."""
    result: int = _syscall(NUMBER, command, ct.byref(attributes), ct.sizeof(attributes))
    return result if result >= 0 else -ct.get_errno()


def info(fd: int, kind: type[Info]) -> Info:
    """Description of the program or map behind a descriptor. Raises OSError."""
    found = kind()
    _raise(call(_INFO, _InfoOf(fd, ct.sizeof(found), ct.addressof(found))))
    return found


def map_ids(program_fd: int) -> list[int]:
    """Ids of the maps that a program uses, in the order of its object. Raises OSError."""
    count = info(program_fd, ProgramInfo).nr_map_ids
    ids = (ct.c_uint32 * max(count, 1))()
    asked = ProgramInfo(nr_map_ids=count, map_ids=ct.addressof(ids))
    _raise(call(_INFO, _InfoOf(program_fd, ct.sizeof(asked), ct.addressof(asked))))
    return list(ids[: min(count, asked.nr_map_ids)])


def by_id(kind: Kind, number: int) -> int:
    """A descriptor for what the kernel knows by this id, or −errno (−ENOENT: it knows none)."""
    return call(_BY_ID[kind], _Identifier(number))


def ids(kind: Kind) -> Iterator[int]:
    """Every id of the kind, ascending. Raises OSError (without CAP_SYS_ADMIN)."""
    at = _Identifier()
    while (result := call(_NEXT[kind], at)) == 0:
        yield at.next_id
        at = _Identifier(at.next_id)
    if result != -errno.ENOENT:
        _raise(result)


def pinned(path: Path) -> int:
    """A descriptor for what is pinned there, or −errno."""
    name = ct.create_string_buffer(os.fsencode(path))
    return call(_OBJ_GET, _Path(ct.addressof(name)))


def possible_cpus() -> int:
    """How many values a per-CPU map has for one key: the kernel writes "0-3", or "0,2-3"."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")[-1]
    return int(last.split("-")[-1]) + 1


def lookup(map_fd: int, key: int, value: Any) -> int:
    """Fills `value` (a ctypes object) with the row `key` of an array. Returns 0 or −errno."""
    row = ct.c_uint32(key)
    return call(_LOOKUP, _Element(map_fd, ct.addressof(row), ct.addressof(value)))


def count_entries(map_fd: int, key_bytes: int, value_bytes: int) -> int:
    """How many entries a hash holds; `value_bytes` for all CPUs. Copies every one: 75 ms for 262,144 flows.

    Raises OSError (on a kernel before 5.6, which has no batches).
    """
    chunk, entries = 8192, 0
    keys, values = (ct.c_uint8 * (chunk * key_bytes))(), (ct.c_uint8 * (chunk * value_bytes))()
    at, following = ct.c_uint64(), ct.c_uint64()
    first = True
    while True:
        asked = _Batch(
            0 if first else ct.addressof(at),
            ct.addressof(following),
            ct.addressof(keys),
            ct.addressof(values),
            chunk,
            map_fd,
        )
        result = call(_LOOKUP_BATCH, asked)
        if result not in {0, -errno.ENOENT}:
            _raise(result)
        entries += int(asked.count)
        if result:
            return entries
        at.value, first = following.value, False


def link_xdp(program_fd: int, ifindex: int, flags: int) -> int:
    """Attaches by a link, which lasts as long as its descriptor. Returns that, or −errno (−EBUSY: another is there)."""
    return call(_LINK_CREATE, _Link(program_fd, ifindex, _ATTACH_XDP, flags))


def link_egress(program_fd: int, ifindex: int) -> int:
    """The same for what leaves an interface (TCX), behind what is there. −EINVAL: a kernel before 6.6."""
    return call(_LINK_CREATE, _Link(program_fd, ifindex, _TCX_EGRESS))


def link_detach(fd: int) -> int:
    """Detaches a link at once, whoever else holds it. Returns 0 or −errno."""
    return call(_LINK_DETACH, _Word(fd))


def linked_programs() -> dict[int, list[int]]:
    """Programs that run on interfaces by a link, in whatever network namespace: id → indices, each in its own.

    Raises OSError (without CAP_SYS_ADMIN).
    """
    found: dict[int, list[int]] = {}
    for number in ids("link"):
        fd = by_id("link", number)
        if fd < 0:  # went between two questions
            continue
        try:
            link = info(fd, LinkInfo)
        finally:
            os.close(fd)
        if link.type in _LINKS and link.ifindex:
            found.setdefault(int(link.prog_id), []).append(int(link.ifindex))
    return found


def tcx_egress(ifindex: int) -> list[int]:
    """Ids of the TCX programs that see what leaves an interface; none on a kernel that has no TCX (before 6.6)."""
    numbers = (ct.c_uint32 * 64)()
    asked = _Query(ifindex, _TCX_EGRESS, 0, 0, ct.addressof(numbers), len(numbers))
    return list(numbers[: asked.count]) if call(_QUERY, asked) == 0 else []


def enable_statistics() -> int:
    """Run count and run time are kept, for every program, while the descriptor is open. Returns it, or −errno."""
    return call(_ENABLE_STATS, _Word(0))


def _raise(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
