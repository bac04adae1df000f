"""Our C compiled at run time by BCC, behind the interface of `libbpf.Object`.

The same sources as the shipped objects, through bpf/compat.h. BCC compiles them, makes the maps and puts their
descriptors into the code; handing programs to the kernel is ours (collector/bytecode.py), the walk over the table with
its callback among them. So it is the same walk as with libbpf, and a record is emitted exactly once.

Debian's package python3-bpfcc brings BCC, for the system's Python: a virtual environment sees it with
--system-site-packages. PyPI's `bcc` is something else.
"""

from __future__ import annotations

import atexit
import ctypes as ct
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from flowsage.collector import syscall
from flowsage.collector.bytecode import TYPES, load_program, read_program
from flowsage.collector.errors import (
    MissingLoaderError,
    ObjectError,
    PrivilegeError,
    ProgramError,
    RejectedError,
    UnknownProgramError,
)
from flowsage.collector.kernel_headers import KernelHeaders, find_headers, shown_to_bcc

_alone = threading.Lock()
"""BCC changes the working directory, reads the environment and writes to stderr."""


class BccObject:
    """One source, compiled when it is loaded; closing it frees programs and maps nobody else holds.

    `path` is the object that is shipped (flow.bpf.o, whose source lies beside it) or the source itself; `headers` where
    the kernel's headers are (see `find_headers`). `programs` and `maps` have the names that libbpf would give. Raises
    MissingLoaderError without BCC, KernelSupportError without headers, ObjectError, RejectedError, PrivilegeError.
    """

    def __init__(self, path: Path, *, headers: Path | None = None) -> None:
        self.path = path.with_suffix(".c") if path.suffix == ".o" else path
        self._headers = headers
        texts = list(_sources(self.path))
        self._text, everything = texts[0], "\n".join(reversed(texts))
        self.programs: dict[str, str] = {}
        for section, name in re.findall(r'^SEC\("([\w.]+)"\)\nint (\w+)\(', self._text, re.MULTILINE):
            if section not in TYPES:
                raise ObjectError(f'{self.path}: {name} is in section "{section}", which is not known here')
            self.programs[name] = section
        macros = dict(re.findall(r"^#define (\w+) (\d+)\b", everything, re.MULTILINE))
        self._settings = {
            name: {field: int(macros.get(value, value)) for field, value in re.findall(r"\.(\w+) = (\w+)", initial)}
            for name, initial in re.findall(r"^SETTINGS\([\w ]+, (\w+), (.*)\);", everything, re.MULTILINE)
        }
        # In order of declaration, which is how BCC numbers them.
        self._sizes: dict[str, str] = {}
        self.maps: dict[str, str] = {}
        for kind, arguments in re.findall(r"^(MAP|MAP_RINGBUF|MAPPED)\((.+)\);", everything, re.MULTILINE):
            words = arguments.split(", ")
            name = words[1 if kind == "MAPPED" else 0]
            self.maps[f".data.{name}" if kind == "MAPPED" else name] = name
            self._sizes[name] = {"MAP": words[-2], "MAP_RINGBUF": words[-1], "MAPPED": "1"}[kind]
        self._defines: dict[str, str] = {}
        self._values: dict[str, ct.Structure] = {}
        self._program_fds: dict[str, int] = {}
        self._map_fds: dict[str, int] = {}

    def resize(self, name: str, entries: int) -> None:
        """Before load: the number of entries (a ring: of bytes)."""
        macro = self._sizes[self._map(name)]
        if macro.isdecimal():
            raise ProgramError(f"{self.path}: the size of map {name} is fixed")
        self._defines[macro] = str(entries)

    def data(self, name: str, kind: type[Any]) -> Any:
        """Settings, as `kind`, as they will be compiled in: written here before load."""
        setting = name.removeprefix(".rodata.")
        if setting not in self._settings:
            raise UnknownProgramError(f"{self.path} has no {name}: it belongs to another version")
        return self._values.setdefault(setting, kind(**self._settings[setting]))

    def load(self) -> None:
        """Compiles (1-2 s), makes the maps, and hands the programs to the kernel and its verifier."""
        with self._compiled() as (module, library):
            try:
                for name in self._sizes:
                    fd = library.bpf_table_fd(module, name.encode())
                    if fd < 0:
                        raise ProgramError(f"BCC has made no map {name} of {self.path}")
                    self._map_fds[name] = os.dup(fd)
                for name, section in self.programs.items():
                    start = library.bpf_function_start(module, name.encode())
                    if not start:
                        raise ProgramError(f"BCC has compiled no program {name} of {self.path}")
                    size = library.bpf_function_size(module, name.encode())
                    program = read_program(start, size, list(self._map_fds.values()))
                    self._program_fds[name] = load_program(
                        name, section, program, f"the kernel refused {name} of {self.path}"
                    )
            except BaseException:
                self.close()
                raise

    def first_program(self, kind: int) -> str:
        """Name of the first program of that type (enum bpf_prog_type)."""
        for name, section in self.programs.items():
            if TYPES[section][0] == kind:
                return name
        raise UnknownProgramError(
            f"{self.path} has no program of type {kind}; it has {', '.join(self.programs) or 'none'}"
        )

    def program_fd(self, name: str) -> int:
        """Descriptor of a loaded program."""
        try:
            return self._program_fds[name]
        except KeyError:
            raise UnknownProgramError(f"{self.path} has no program {name}, or is not loaded") from None

    def map_fd(self, name: str) -> int:
        """Descriptor of a created map."""
        try:
            return self._map_fds[self._map(name)]
        except KeyError:
            raise ProgramError(f"map {name} of {self.path} does not exist before load") from None

    def max_entries(self, name: str) -> int:
        """What the map was made for: entries, or bytes of a ring."""
        return int(syscall.info(self.map_fd(name), syscall.MapInfo).max_entries)

    def close(self) -> None:
        """Gives everything back. Idempotent."""
        for fds in (self._program_fds, self._map_fds):
            while fds:
                os.close(fds.popitem()[1])

    def _map(self, name: str) -> str:
        try:
            return self.maps[name]
        except KeyError:
            raise UnknownProgramError(f"{self.path} has no map {name}: it belongs to another version") from None

    def _prelude(self) -> str:
        lines = [f"#define {macro} {value}" for macro, value in self._defines.items()]
        for name in self._settings:
            value = self._values.get(name)
            fields = (
                [] if value is None else [f".{f} = {getattr(value, f)}ULL" for f, *_ in value._fields_ if f != "pad"]
            )
            lines.append(f"#define SETTINGS_OF_{name} {', '.join(fields)}")
        return "\n".join([*lines, "#line 1", ""])

    def _compiled(self) -> AbstractContextManager[tuple[Any, Any]]:
        flags = ["-DFLOWSAGE_BCC", "-w", f"-I{self.path.resolve().parent}"]
        return _compile(self._prelude() + self._text, flags, find_headers(self._headers), self.path)


def _sources(path: Path) -> Iterator[str]:
    """The text of a source, then of what it includes from beside it, each once."""
    seen, waiting = set(), [path]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        try:
            text = one.read_text()
        except OSError as error:
            raise ObjectError(f"no program source at {one} ({error.strerror}): BCC compiles at run time") from error
        yield text
        waiting += [one.parent / name for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE)]


def _bcc() -> tuple[Any, Any]:
    """BCC's module class and its C library."""
    try:
        from bcc import BPF, lib
    except (ImportError, OSError) as error:
        raise MissingLoaderError(
            "BCC is not installed for this Python; install the package python3-bpfcc (PyPI's bcc is something else) "
            "and use the system's Python, or a virtual environment made with --system-site-packages"
        ) from error
    return BPF, lib


@contextmanager
def _compile(text: str, flags: list[str], headers: KernelHeaders | None, path: Path) -> Iterator[tuple[Any, Any]]:
    """BCC's compiled module and its C library, for the block."""
    bpf, library = _bcc()
    with _alone, tempfile.TemporaryFile() as said, shown_to_bcc(headers) as more:
        stderr = os.dup(2)
        sys.stderr.flush()
        os.dup2(said.fileno(), 2)
        try:
            made = bpf(text=text.encode(), cflags=[*flags, *more])
        except Exception as error:  # BCC raises nothing more special
            said.seek(0)
            raise _refusal(said.read().decode(errors="replace"), path) from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    try:
        yield made.module, library
    finally:
        atexit.unregister(made.cleanup)
        made.cleanup()


def _refusal(said: str, path: Path) -> ProgramError | PrivilegeError:
    """The exception for a compilation that failed, with the compiler's first error."""
    if "Operation not permitted" in said:
        return PrivilegeError(
            f"making the maps of {path}: not permitted; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), "; ".join(lines[:3]) or "it does not say why")
    return RejectedError(f"BCC could not compile {path}: {first.replace('/virtual/main.c', path.name)}")
