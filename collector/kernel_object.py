"""What the flow program is loaded from: the object that is shipped, or its source, by libbpf or by BCC."""

from __future__ import annotations

import ctypes as ct
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import flowsage.bpf
from flowsage.collector import libbpf

OBJECT = Path(flowsage.bpf.__file__).resolve().parent / "flow.bpf.o"
"""Where the object that belongs to this code lies."""

Loader = Literal["auto", "libbpf", "bcc"]


class KernelObject(Protocol):
    """Programs and maps in the kernel: a loaded object, or what an earlier process has pinned."""

    def program_fd(self, name: str) -> int:
        """Descriptor of a program. Raises ProgramError where there is none of that name."""

    def map_fd(self, name: str) -> int:
        """Descriptor of a map. Raises ProgramError where there is none of that name."""

    def close(self) -> None:
        """Give the descriptors back. Idempotent."""


class LoadableObject(KernelObject, Protocol):
    """One that is not in the kernel yet: `libbpf.Object`, `bcc_object.BccObject`."""

    def resize(self, name: str, entries: int) -> None:
        """Before load: the number of entries of a map (a ring: of bytes)."""

    def data(self, name: str, kind: type[ct.Structure]) -> Any:
        """Before load: the memory of a global, to be written."""

    def load(self) -> None:
        """Hands everything to the kernel and its verifier."""


def open_object(path: Path = OBJECT, loader: Loader = "auto") -> LoadableObject:
    """The object at `path` by libbpf, or, for "bcc", its source beside it compiled now.

    "auto" prefers the object, where there is one (BCC needs libbpf too). Raises ObjectError, KernelSupportError.
    """
    if loader == "bcc" or (loader == "auto" and not path.is_file() and find_spec("bcc") is not None):
        compiled: LoadableObject = import_module("flowsage.collector.bcc_object").BccObject(path)
        return compiled
    return libbpf.Object(path)
