"""Programs as instructions, handed to the kernel without libbpf: what BCC compiles (Documentation/bpf/, linux/bpf.h).

BCC's own loader has no program flags (xdp.frags, sleepable), and knows nothing of functions. Here the callback of a
walk, which compat.h places behind its program, is marked as one and described to the kernel in a few bytes of BTF.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

from flowsage.collector import syscall
from flowsage.collector.errors import PrivilegeError, ProgramError, RejectedError
from flowsage.collector.libbpf import last_words

TYPES = {
    "xdp.frags": (6, 1 << 5, 37),
    "tc": (3, 0, 0),
    "syscall": (31, 1 << 4, 0),
}
"""Of SEC(…): enum bpf_prog_type, BPF_F_XDP_HAS_FRAGS or BPF_F_SLEEPABLE, enum bpf_attach_type (linux/bpf.h)."""

_PROG_LOAD, _BTF_LOAD = 5, 18  # enum bpf_cmd
_LOG_BYTES = 1 << 24
_LOAD_64, _JUMP, _CALL, _EXIT = 0x18, 0x05, 0x85, 0x95
_JUMP_CLASSES = {5, 6}  # BPF_JMP, BPF_JMP32
_PSEUDO_MAP_FD, _PSEUDO_FUNC = 1, 4
_STRUCT = struct.Struct("<BBhi")


class Instruction(NamedTuple):
    """8 bytes; `registers`: destination in the low half, source in the high."""

    code: int
    registers: int
    offset: int
    immediate: int

    @property
    def source(self) -> int:
        """The source register, or what kind of number the immediate is (BPF_PSEUDO_*)."""
        return self.registers >> 4


class _Load(ct.Structure):
    """`union bpf_attr` of BPF_PROG_LOAD."""

    _fields_ = (
        ("type", ct.c_uint32),
        ("insn_cnt", ct.c_uint32),
        ("insns", ct.c_void_p),
        ("license", ct.c_char_p),
        ("log_level", ct.c_uint32),
        ("log_size", ct.c_uint32),
        ("log_buf", ct.c_void_p),
        ("kern_version", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("name", ct.c_char * 16),
        ("ifindex", ct.c_uint32),
        ("attach_type", ct.c_uint32),
        ("btf_fd", ct.c_uint32),
        ("func_info_rec_size", ct.c_uint32),
        ("func_info", ct.c_void_p),
        ("func_info_cnt", ct.c_uint32),
        ("rest", ct.c_uint32 * 9),
    )


class _Types(ct.Structure):
    """`union bpf_attr` of BPF_BTF_LOAD."""

    _fields_ = (
        ("btf", ct.c_char_p),
        ("log_buf", ct.c_void_p),
        ("size", ct.c_uint32),
        ("log_size", ct.c_uint32),
        ("log_level", ct.c_uint32),
    )


def read_program(start: int, size: int, map_fds: Sequence[int]) -> list[Instruction]:
    """The `size` bytes of instructions at address `start`, and behind them those of the callback where there is one.

    BCC has put descriptors for the numbers of maps (−1, −2, …, in order of declaration) into the program, and not into
    the callback, where it happens here.
    """

    def at(number: int) -> Instruction:
        return Instruction(*_STRUCT.unpack(ct.string_at(start + number * _STRUCT.size, _STRUCT.size)))

    count = size // _STRUCT.size
    program = [at(number) for number in range(count)]
    # It loads the callback's address, in bytes from its own beginning, as if it were a number.
    places = [
        number
        for number, one in enumerate(program)
        if one.code == _LOAD_64
        and not one.source
        and one.immediate == size
        and (not number or program[number - 1].code != _LOAD_64)
    ]
    if not places:
        return program
    for number in places:
        one = program[number]
        program[number] = one._replace(registers=one.registers | _PSEUDO_FUNC << 4, immediate=count - number - 1)
    behind: list[Instruction] = []
    furthest = count
    while True:
        number = count + len(behind)
        one = at(number)
        if one.code == _LOAD_64:
            fd = one.source == _PSEUDO_MAP_FD and one.immediate < 0
            behind += [one._replace(immediate=map_fds[-1 - one.immediate]) if fd else one, at(number + 1)]
            continue
        behind.append(one)
        if one.code & 7 in _JUMP_CLASSES and one.code not in {_CALL, _EXIT}:
            furthest = max(furthest, number + 1 + one.offset)
        leaves = one.code == _EXIT or (one.code == _JUMP and one.offset < 0)
        if leaves and furthest <= number:  # no jump leads beyond: the function ends here
            return program + behind


def load_program(name: str, section: str, program: Sequence[Instruction], what: str) -> int:
    """Hands a program to the kernel; returns its descriptor. Raises PrivilegeError, RejectedError (with the verifier's
    last words)."""
    kind, flags, attach_type = TYPES[section]
    instructions = ct.create_string_buffer(b"".join(_STRUCT.pack(*one) for one in program))
    asked = _Load(
        type=kind,
        insn_cnt=len(program),
        insns=ct.addressof(instructions),
        license=b"Dual BSD/GPL",
        flags=flags,
        name=name.encode()[:15],
        attach_type=attach_type,
    )
    calls = (
        number + 1 + one.immediate
        for number, one in enumerate(program)
        if one.code == _LOAD_64 and one.source == _PSEUDO_FUNC
    )
    starts = [0, *sorted(set(calls))]
    types = _describe(name, len(starts)) if len(starts) > 1 else -1
    try:
        if types >= 0:
            functions = (ct.c_uint32 * (2 * len(starts)))()
            for place, start in enumerate(starts):
                functions[2 * place], functions[2 * place + 1] = start, _FIRST_FUNCTION + place
            asked.btf_fd, asked.func_info = types, ct.addressof(functions)
            asked.func_info_rec_size, asked.func_info_cnt = 8, len(starts)
        fd = syscall.call(_PROG_LOAD, asked)
        if fd >= 0:
            return fd
        if fd == -errno.EPERM:
            raise PrivilegeError(f"{what}: not permitted; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")
        log = ct.create_string_buffer(_LOG_BYTES)
        asked.log_level, asked.log_size, asked.log_buf = 1, len(log), ct.addressof(log)
        syscall.call(_PROG_LOAD, asked)
        raise RejectedError(f"{what}: {os.strerror(-fd)}: {last_words(log.value.decode(errors='replace'))}")
    finally:
        if types >= 0:
            os.close(types)


_FIRST_FUNCTION = 3  # after int, and the prototype


def _describe(name: str, functions: int) -> int:
    """BTF that says no more than that there are so many static functions (Documentation/bpf/btf.rst): a descriptor."""
    strings = b"\0int\0"
    types = struct.pack("<IIII", 1, 1 << 24, 4, 1 << 24 | 32)  # int
    types += struct.pack("<III", 0, 13 << 24, 1)  # int f()
    for number in range(functions):
        types += struct.pack("<III", len(strings), 12 << 24, 2)
        strings += (f"{name}_{number}" if number else name).encode() + b"\0"
    header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    fd = syscall.call(_BTF_LOAD, _Types(btf=header + types + strings, size=len(header + types + strings)))
    if fd == -errno.EPERM:
        raise PrivilegeError("describing functions to the kernel: not permitted; run as root, or with CAP_BPF")
    if fd < 0:
        raise ProgramError(f"the kernel does not take a description of functions (BTF): {os.strerror(-fd)}")
    return fd
