"""Kernel headers for compiling at run time: found, or as given.

Programs of ours use uapi headers alone, so the headers of another version serve. BCC itself looks only below
/lib/modules/RELEASE, where a distribution puts those of its own kernels; BCC_KERNEL_SOURCE sends it elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flowsage.collector.errors import KernelSupportError

MARK = Path("include/linux/kconfig.h")
"""What a source tree has and a tree of generated headers has not; BCC asks for the same file."""
SOURCE_VARIABLE = "BCC_KERNEL_SOURCE"
IN_KERNEL = Path("/sys/kernel/kheaders.tar.xz")
"""Headers that the kernel carries (CONFIG_IKHEADERS); BCC unpacks them below /tmp."""


@dataclass(frozen=True)
class KernelHeaders:
    """`source`: a tree with include/linux; `build`: where its generated headers lie, often the same."""

    source: Path
    build: Path

    def flags(self) -> list[str]:
        """Compiler flags for the generated headers, where they lie apart."""
        if self.build == self.source:
            return []
        folders = [self.build / "include", self.build / "include/generated/uapi"]
        for arch in sorted((self.build / "arch").glob("*/include/generated")):
            folders += [arch, arch / "uapi"]
        return [f"-I{folder}" for folder in folders]


def find_headers(given: Path | None = None, *, root: Path = Path("/")) -> KernelHeaders | None:
    """Headers at `given` (a source tree, or a build tree like /lib/modules/RELEASE/build), or where BCC_KERNEL_SOURCE
    says; without either those of the running kernel, else the newest below /usr/src. None where only the kernel itself
    has them (BCC takes those).

    Raises KernelSupportError, which names the package, where there are none. `root` is where the file system begins.
    """
    if given is None and SOURCE_VARIABLE in os.environ:
        given = Path(os.environ[SOURCE_VARIABLE])
    if given is not None:
        found = _tree(given, given.parent / "source")
        if found is None:
            raise KernelSupportError(
                f"there are no kernel headers at {given} (a kernel's source tree has {MARK}); "
                "name the directory that /lib/modules/RELEASE/build points to"
            )
        return found
    home = root / "lib/modules" / os.uname().release
    installed = [p for p in (root / "usr/src").glob("linux-headers-*") if not p.name.endswith("-common")]
    installed += (root / "usr/src/kernels").glob("*")
    for build in (home / "build", *sorted(installed, key=_version, reverse=True)):
        found = _tree(build, home / "source")
        if found is not None:
            return found
    if (root / IN_KERNEL.relative_to("/")).exists():
        return None
    raise KernelSupportError(
        "compiling for the kernel at run time needs kernel headers, and none are below /lib/modules or /usr/src; "
        "install the package linux-headers-amd64 (or that of your architecture; another version's will do), "
        f"or say in {SOURCE_VARIABLE} where they are"
    )


@contextmanager
def shown_to_bcc(headers: KernelHeaders | None) -> Iterator[list[str]]:
    """BCC finds the headers within the block, by an environment variable; yields the compiler flags that it needs."""
    if headers is None:
        yield []
        return
    before = os.environ.get(SOURCE_VARIABLE)
    os.environ[SOURCE_VARIABLE] = str(headers.source)
    try:
        yield headers.flags()
    finally:
        if before is None:
            del os.environ[SOURCE_VARIABLE]
        else:
            os.environ[SOURCE_VARIABLE] = before


def _tree(build: Path, beside: Path) -> KernelHeaders | None:
    """The pair that `build` belongs to: itself, the common tree that Debian's Makefile names, or `beside`."""
    if (build / MARK).is_file():
        return KernelHeaders(build, build)
    if not (build / "include/generated").is_dir():
        return None
    makefile = build / "Makefile"
    named = re.search(r"^include (\S+)/Makefile", makefile.read_text(), re.MULTILINE) if makefile.is_file() else None
    for source in ([Path(named[1])] if named else []) + [beside]:
        if (source / MARK).is_file():
            return KernelHeaders(source, build)
    return None


def _version(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder.name)]
