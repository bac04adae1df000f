"""Load, attach, detach, unload, and check each against the kernel: the small public API.

`FlowProgram` (collector/program.py) is what a sensor runs; `EBPFLoader` handles any built object, by program id.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import TracebackType

from flowsage.collector import libbpf
from flowsage.collector.errors import InterfaceError, ProgramError
from flowsage.collector.program import COUNTERS, FlowProgram, FlowSettings, TableTotals, Walk, flow_program
from flowsage.collector.xdp import Attachment, EBPFAttachMode, attach, attached_program

__all__ = [
    "COUNTERS",
    "Attachment",
    "EBPFAttachMode",
    "EBPFLoader",
    "EBPFProgramType",
    "FlowProgram",
    "FlowSettings",
    "LoadedProgram",
    "TableTotals",
    "Walk",
    "attached_program",
    "create_ebpf_loader",
    "flow_program",
]


class EBPFProgramType(IntEnum):
    """Program types that we load; the values are enum bpf_prog_type."""

    XDP = 6


@dataclass
class LoadedProgram:
    """A program that this loader holds: its id and name in the kernel, and where it is attached."""

    program_id: int
    name: str
    path: Path
    attachments: dict[str, Attachment] = field(default_factory=dict)


class EBPFLoader:
    """Loads built objects and attaches their programs. A context manager: leaves nothing behind.

    Errors: ProgramError (and KernelSupportError), PrivilegeError, InterfaceError; see collector/errors.py.
    """

    def __init__(self) -> None:
        self._objects: dict[int, tuple[LoadedProgram, libbpf.Object, int]] = {}

    def load_program(
        self,
        path: str | os.PathLike[str],
        program_type: EBPFProgramType = EBPFProgramType.XDP,
        *,
        name: str | None = None,
    ) -> int:
        """Loads the object at `path`; returns the kernel's id of its first program of that type (or of `name`)."""
        loaded = libbpf.Object(Path(path))
        try:
            name = name or loaded.first_program(program_type)
            loaded.load()
            fd = loaded.program_fd(name)
            program_id = int(libbpf.program_info(fd).id)
        except BaseException:
            loaded.close()
            raise
        self._objects[program_id] = (LoadedProgram(program_id, name, Path(path)), loaded, fd)
        return program_id

    def attach_to_interface(
        self, program_id: int, interface: str, mode: EBPFAttachMode = EBPFAttachMode.AUTO, *, replace: bool = False
    ) -> Attachment:
        """Attaches and verifies. AUTO tries native, then generic, and logs it. `replace` takes others' programs off."""
        program, _, fd = self._held(program_id)
        if interface in program.attachments:
            raise InterfaceError(f"program {program_id} is attached to {interface} already")
        attachment = program.attachments[interface] = attach(fd, interface, mode, replace=replace)
        return attachment

    def detach_from_interface(self, program_id: int, interface: str) -> None:
        """Detaches and verifies."""
        attachments = self._held(program_id)[0].attachments
        if interface not in attachments:
            raise InterfaceError(f"program {program_id} is not attached to {interface}")
        attachments.pop(interface).detach()

    def unload_program(self, program_id: int) -> None:
        """Detaches everywhere and lets go of the program; the kernel frees it unless somebody else holds it."""
        program, loaded, _ = self._held(program_id)
        try:
            for interface in list(program.attachments):
                self.detach_from_interface(program_id, interface)
        finally:
            del self._objects[program_id]
            loaded.close()

    def verify_program_loaded(self, program_id: int) -> bool:
        """Whether the kernel knows the program."""
        return libbpf.program_exists(program_id)

    def verify_program_detached(self, program_id: int) -> bool:
        """Whether the kernel runs the program on none of the interfaces of this network namespace."""
        return not any(program_id == running for _, (_, running) in _running())

    def list_loaded_programs(self) -> list[LoadedProgram]:
        """What this loader holds."""
        return [program for program, _, _ in self._objects.values()]

    def read_counters(self, program_id: int, map_name: str = "protocols") -> list[tuple[int, int]]:
        """Packets and bytes of each row of a per-CPU array, summed over CPUs (counter.bpf.o: TCP, UDP, ICMP, other)."""
        loaded = self._held(program_id)[1]
        return libbpf.read_pairs(loaded.map_fd(map_name), loaded.max_entries(map_name))

    def close(self) -> None:
        """Unloads everything. Idempotent."""
        for program_id in list(self._objects):
            self.unload_program(program_id)

    def _held(self, program_id: int) -> tuple[LoadedProgram, libbpf.Object, int]:
        try:
            return self._objects[program_id]
        except KeyError:
            raise ProgramError(f"program {program_id} was not loaded here") from None

    def __enter__(self) -> EBPFLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _running() -> Iterator[tuple[str, tuple[str, int]]]:
    """Interfaces of this namespace that run an XDP program, with mode and id."""
    for _, name in socket.if_nameindex():
        there = attached_program(name)
        if there is not None:
            yield name, there


def create_ebpf_loader() -> EBPFLoader:
    """A loader, once libbpf is there and speaks. Raises KernelSupportError where it is not installed."""
    libbpf.library()
    return EBPFLoader()
