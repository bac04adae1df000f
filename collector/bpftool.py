"""Loading an object by bpftool, where libbpf is not installed: bpftool has it built in.

bpftool hands over what it loaded by pinning it. The pins are taken away at once, so that programs and maps last as long
as our descriptor, as they do with libbpf, and a killed process leaves nothing behind.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from flowsage.collector import libbpf, syscall
from flowsage.collector.errors import MissingLoaderError, ObjectError, ProgramError, RejectedError, UnknownProgramError

BPFFS = Path("/sys/fs/bpf")
"""Where the kernel's file system of BPF objects is mounted; bpftool mounts it where it is not."""
TIMEOUT_S = 60.0
_numbers = itertools.count()


def find() -> str | None:
    """Path of bpftool, None where it is not installed. Daemons and users often have no sbin in their PATH."""
    return shutil.which("bpftool", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


def load(path: Path, program_type: int, name: str | None = None) -> int:
    """Loads the object; a descriptor of its program `name`, or of its first of that type (enum bpf_prog_type).

    Raises MissingLoaderError without bpftool, ObjectError, RejectedError, UnknownProgramError, PrivilegeError.
    """
    tool = find()
    if tool is None:
        raise MissingLoaderError("neither libbpf.so.1 nor bpftool is installed; install the package libbpf1 or bpftool")
    if not path.is_file():
        raise ObjectError(f"no program object at {path}; build it with `make bpf`")
    pins = BPFFS / f"flowsage-load-{os.getpid()}-{next(_numbers)}"
    try:
        _run(tool, path, pins)
        return _choose(pins, path, program_type, name)
    finally:
        with suppress(OSError):  # bpftool has made none, or nobody may look
            for pin in list(pins.iterdir()):
                pin.unlink()
            pins.rmdir()


def _run(tool: str, path: Path, pins: Path) -> None:
    command = [tool, "--json", "prog", "loadall", str(path), str(pins)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramError(f"{tool} could not load {path}: {error}") from error
    if done.returncode == 0:
        return
    try:
        error_of = str(json.loads(done.stdout)["error"])
    except (ValueError, KeyError, TypeError):
        error_of = done.stdout.strip()
    words = libbpf.last_words(done.stderr) or error_of
    if "not permitted" in words + error_of:
        raise libbpf.failure(errno.EPERM, f"loading {path} by bpftool")
    if "failed to open object" in error_of:
        raise ObjectError(f"{path} is not a program object that bpftool can open: {words}")
    raise RejectedError(f"the kernel refused {path}: {words}")


def _choose(pins: Path, path: Path, program_type: int, name: str | None) -> int:
    """The one asked for among what is pinned; by id, which is the order of the object."""
    found: dict[int, tuple[int, str]] = {}
    for pin in pins.iterdir():
        fd = libbpf.check(syscall.pinned(pin), f"opening {pin}")
        info = syscall.info(fd, syscall.ProgramInfo)
        # Pinned under its full name; the kernel keeps 15 characters of it.
        wanted = info.type == program_type and (name is None or name in {pin.name, info.name.decode()})
        if wanted:
            found[info.id] = fd, pin.name
        else:
            os.close(fd)
    if not found:
        what = f"no program {name}" if name else f"no program of type {program_type}"
        raise UnknownProgramError(f"{path} has {what}; it has {', '.join(sorted(p.name for p in pins.iterdir()))}")
    first = min(found)
    for number, (fd, _) in found.items():
        if number != first:
            os.close(fd)
    return found[first][0]
