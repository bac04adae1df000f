"""Load, attach, detach, unload, and check each against the kernel: the small public API.

    with create_ebpf_loader() as loader:
        program_id = loader.load_program("xdp_counter.o", EBPFProgramType.XDP)
        loader.attach_to_interface(program_id, "eth0", EBPFAttachMode.SKB)
        loader.get_program_stats(program_id).ns_per_run

`FlowProgram` (collector/program.py) is what a sensor runs; `EBPFLoader` handles any built object, by program id.
Objects are loaded by libbpf or, where that is not installed, by bpftool; all else is the same with either.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Literal

import flowsage.bpf
from flowsage.collector import bpftool, libbpf, statistics, syscall
from flowsage.collector.errors import AttachmentError, InterfaceError, MissingLoaderError, UnknownProgramError
from flowsage.collector.statistics import ProgramStats
from flowsage.collector.xdp import Attachment, EBPFAttachMode, attach, programs_on

PROGRAMS = Path(flowsage.bpf.__file__).resolve().parent
"""Where the objects that belong to this code lie."""
OTHER_NAMES = {"xdp_counter.o": "counter.bpf.o"}
"""Objects that we build, as scripts that think of the program call them."""
STATS_OVER_S = 0.1

Backend = Literal["libbpf", "bpftool"]


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


@dataclass
class _Held:
    program: LoadedProgram
    fd: int
    let_go: Callable[[], None]


class EBPFLoader:
    """Loads built objects and attaches their programs. A context manager: leaves nothing behind. One thread at a time.

    Attachments are links that end with this process, however it ends. `backend` says by what objects are loaded.
    Errors: ProgramError, InterfaceError and their subclasses, PrivilegeError; see collector/errors.py.
    """

    def __init__(self, backend: Literal["auto"] | Backend = "auto") -> None:
        self.backend: Backend = _available(backend)
        self.programs_dir = PROGRAMS
        self._held: dict[int, _Held] = {}
        self._asking = 0

    # ---- load and unload ----

    def load_program(
        self,
        path: str | os.PathLike[str],
        program_type: EBPFProgramType = EBPFProgramType.XDP,
        *,
        name: str | None = None,
    ) -> int:
        """Loads the object at `path`; returns the kernel's id of its first program of that type (or of `name`).

        A file name alone that is not there is looked for among the objects that we ship: `xdp_counter.o`. Raises
        ObjectError, RejectedError (with the verifier's words), UnknownProgramError, PrivilegeError, KernelSupportError.
        """
        found = self._find(Path(path))
        fd, let_go = (_load_by_libbpf if self.backend == "libbpf" else _load_by_bpftool)(found, program_type, name)
        try:
            info = libbpf.program_info(fd)
            if info.type != program_type:
                raise UnknownProgramError(f"{found} has no program {name} of type {EBPFProgramType(program_type).name}")
        except BaseException:
            let_go()
            raise
        program_id = int(info.id)
        self._held[program_id] = _Held(LoadedProgram(program_id, info.name.decode(), found), fd, let_go)
        return program_id

    def unload_program(self, program_id: int) -> bool:
        """Detaches everywhere and lets go of the program; the kernel frees it unless somebody else holds it.

        True; what goes wrong is raised: UnknownProgramError for one that was not loaded here, AttachmentError.
        """
        held = self._loaded(program_id)
        try:
            for interface in list(held.program.attachments):
                self.detach_from_interface(program_id, interface)
        finally:
            del self._held[program_id]
            held.let_go()
        return True

    # ---- attach and detach ----

    def attach_to_interface(
        self, program_id: int, interface: str, mode: EBPFAttachMode = EBPFAttachMode.DRV, *, replace: bool = False
    ) -> Attachment:
        """Attaches, and verifies by netlink that the kernel runs the program there.

        DRV is native or nothing; AUTO tries native, then generic, and logs that. `replace` takes off a program that
        somebody else attached by netlink (what a link holds cannot be taken). Raises UnknownProgramError,
        MissingInterfaceError, BusyInterfaceError, AttachModeError, AttachmentError, PrivilegeError.
        """
        held = self._loaded(program_id)
        attachments = held.program.attachments
        if interface in attachments and attachments[interface].present():
            raise AttachmentError(f"program {program_id} is attached to {interface} already")
        attachment = attach(held.fd, interface, EBPFAttachMode(mode), replace=replace)
        if interface in attachments:  # of an interface that is gone; this one has its name
            attachments.pop(interface).detach()
        attachments[interface] = attachment
        return attachment

    def detach_from_interface(self, program_id: int, interface: str) -> bool:
        """Detaches, and verifies by netlink. True; what goes wrong is raised: UnknownProgramError, AttachmentError."""
        attachments = self._loaded(program_id).program.attachments
        if interface not in attachments:
            raise AttachmentError(f"program {program_id} is not attached to {interface}")
        attachments.pop(interface).detach()
        return True

    # ---- what the kernel says ----

    def verify_program_loaded(self, program_id: int) -> bool:
        """Whether the kernel knows the program."""
        return libbpf.program_exists(program_id)

    def verify_program_detached(self, program_id: int) -> bool:
        """Whether the kernel runs the program on no interface: of this network namespace, and of any by a link."""
        if any(program_id in self.get_interface_programs(name) for _, name in socket.if_nameindex()):
            return False
        with suppress(PermissionError):  # links are listed to CAP_SYS_ADMIN alone
            return program_id not in syscall.linked_programs()
        return True

    def get_interface_programs(self, interface: str) -> list[int]:
        """Ids of the XDP programs that the kernel runs on an interface, whoever attached them."""
        try:
            return sorted(programs_on(interface))
        except InterfaceError:
            return []

    def get_program_stats(self, program_id: int, *, over_s: float = STATS_OVER_S) -> ProgramStats:
        """Run count, run time, memory, and size and fill of each map of any program that the kernel knows.

        The kernel counts runs for `over_s` seconds, in which this call waits, and while somebody else asks too; within
        `with loader.statistics():` it counts throughout and this call does not wait. Raises UnknownProgramError.
        """
        if over_s <= 0 or self._asking:
            return statistics.read_program(program_id)
        with statistics.program_descriptor(program_id), statistics.counting():
            time.sleep(over_s)
        return statistics.read_program(program_id)

    @contextmanager
    def statistics(self) -> Iterator[None]:
        """Runs are counted within the block, of all programs of the machine. Raises PrivilegeError."""
        with statistics.counting():
            self._asking += 1
            try:
                yield
            finally:
                self._asking -= 1

    def read_counters(self, program_id: int, map_name: str = "protocols") -> list[tuple[int, int]]:
        """Packets and bytes of each row of a per-CPU array, summed over CPUs (counter.bpf.o: statistics.PROTOCOLS)."""
        return statistics.read_pairs(program_id, map_name)

    def list_loaded_programs(self) -> list[LoadedProgram]:
        """What this loader holds."""
        return [held.program for held in self._held.values()]

    # Scripts written for the original system call these by other names: the same functions, nothing else.
    attach_to_interface_complete = attach_to_interface
    detach_from_interface_complete = detach_from_interface
    unload_program_complete = unload_program

    # ---- its own life ----

    def close(self) -> None:
        """Unloads everything, whatever goes wrong with one of them. Idempotent."""
        failures: list[Exception] = []
        for program_id in list(self._held):
            try:
                self.unload_program(program_id)
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _loaded(self, program_id: int) -> _Held:
        try:
            return self._held[program_id]
        except KeyError:
            raise UnknownProgramError(f"program {program_id} was not loaded here") from None

    def _find(self, path: Path) -> Path:
        names = [path.name, *([OTHER_NAMES[path.name]] if path.name in OTHER_NAMES else [])]
        folders = [path.parent, *([self.programs_dir] if path.name == str(path) else [])]
        return next((found for folder in folders for name in names if (found := folder / name).exists()), path)

    def __enter__(self) -> EBPFLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _load_by_libbpf(path: Path, program_type: EBPFProgramType, name: str | None) -> tuple[int, Callable[[], None]]:
    loaded = libbpf.Object(path)
    try:
        name = name or loaded.first_program(program_type)
        loaded.load()
        return loaded.program_fd(name), loaded.close
    except BaseException:
        loaded.close()
        raise


def _load_by_bpftool(path: Path, program_type: EBPFProgramType, name: str | None) -> tuple[int, Callable[[], None]]:
    fd = bpftool.load(path, program_type, name)
    return fd, lambda: os.close(fd)


def _available(backend: Literal["auto"] | Backend) -> Backend:
    if backend == "libbpf" or (backend == "auto" and libbpf.available()):
        libbpf.library()
        return "libbpf"
    if bpftool.find() is None:
        missing = "bpftool is not" if backend == "bpftool" else "neither libbpf.so.1 nor bpftool is"
        raise MissingLoaderError(f"{missing} installed; install the package bpftool (or libbpf1, which is enough)")
    return "bpftool"


def create_ebpf_loader(backend: Literal["auto"] | Backend = "auto") -> EBPFLoader:
    """A loader: by libbpf, or where that is not installed, by bpftool.

    Raises MissingLoaderError where there is neither, KernelSupportError where libbpf is asked for and not there.
    """
    return EBPFLoader(backend)
