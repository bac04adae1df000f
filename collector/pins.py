"""A sensor's directory on bpffs: what is pinned there outlives the process that put it there.

    /sys/fs/bpf/flowsage/<sensor>/state                 the journal
                                 /link-<interface>      what is attached where
                                 /<generation>/…        programs and maps of one load

One process at a time: the directory itself is locked (flock), and the lock goes with the process.
"""

from __future__ import annotations

import ctypes as ct
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote

from flowsage.collector import libbpf, syscall
from flowsage.collector.errors import BusySensorError, KernelSupportError, PrivilegeError, ProgramError

logger = logging.getLogger(__name__)

ROOT = Path("/sys/fs/bpf/flowsage")
"""Where sensors pin by default."""
_BPFFS = Path("/sys/fs/bpf")

_MAP_CREATE, _OBJ_PIN, _LINK_UPDATE = 0, 6, 29
_ARRAY, _MMAPABLE = 2, 1 << 10

_libc = ct.CDLL(None, use_errno=True)


class _Pin(ct.Structure):
    _fields_ = (("pathname", ct.c_uint64), ("fd", ct.c_uint32), ("file_flags", ct.c_uint32))


class _Update(ct.Structure):
    _fields_ = (("link", ct.c_uint32), ("program", ct.c_uint32), ("flags", ct.c_uint32), ("old", ct.c_uint32))


class _Map(ct.Structure):
    _fields_ = (
        ("type", ct.c_uint32),
        ("key_size", ct.c_uint32),
        ("value_size", ct.c_uint32),
        ("max_entries", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("inner", ct.c_uint32),
        ("node", ct.c_uint32),
        ("name", ct.c_char * 16),
    )


def shared_array(name: str, nbytes: int) -> int:
    """Descriptor of a new array map with one value of `nbytes`, zeros, which can be mapped into memory."""
    what = _Map(type=_ARRAY, key_size=4, value_size=nbytes, max_entries=1, flags=_MMAPABLE, name=name.encode())
    return libbpf.check(syscall.call(_MAP_CREATE, what), f"creating the map {name}")


def link_update(link_fd: int, program_fd: int) -> None:
    """The link runs another program from now on: no packet passes between the two."""
    libbpf.check(syscall.call(_LINK_UPDATE, _Update(link_fd, program_fd)), "replacing the program of a link")


def pinned_name(name: str) -> str:
    """`name` as a file of bpffs, which takes no dots."""
    return quote(name, safe="").replace(".", "%2E")


class Pins:
    """The directory of `sensor` under `root`, made where it is missing, locked until `close`.

    Raises BusySensorError where another process has it, KernelSupportError where there is no bpffs and it cannot be
    mounted, PrivilegeError where it may not be used.
    """

    def __init__(self, sensor: str, root: Path = ROOT) -> None:
        self.sensor = sensor
        self.directory = root / pinned_name(sensor)
        self._fd = -1
        _require_bpffs(root)
        while not self._lock():
            pass

    def _lock(self) -> bool:
        """False: the directory was removed by its last user meanwhile."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except PermissionError as error:
            raise PrivilegeError(f"{self.directory} may not be used: run as root, or as its owner") from error
        except OSError as error:
            raise KernelSupportError(f"{self.directory} cannot be made: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.stat(self.directory).st_ino == os.fstat(fd).st_ino
        except BlockingIOError as error:
            os.close(fd)
            raise BusySensorError(
                f"another process runs the sensor {self.sensor!r}; stop it first, or give this one a name of its own"
            ) from error
        except FileNotFoundError:
            same = False
        if not same:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def path(self, name: str, generation: int | None = None) -> Path:
        """Where `name` is pinned."""
        folder = self.directory if generation is None else self.directory / str(generation)
        return folder / pinned_name(name)

    def put(self, fd: int, name: str, generation: int | None = None) -> None:
        """Pin what the descriptor stands for."""
        path = self.path(name, generation)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        text = ct.create_string_buffer(os.fsencode(path))
        libbpf.check(syscall.call(_OBJ_PIN, _Pin(ct.addressof(text), fd)), f"pinning {path}")

    def get(self, name: str, generation: int | None = None) -> int | None:
        """A descriptor of what is pinned as `name`, None where nothing is."""
        fd = syscall.pinned(self.path(name, generation))
        if fd == -errno.ENOENT:
            return None
        return libbpf.check(fd, f"opening {self.path(name, generation)}")

    def remove(self, name: str) -> None:
        """Unpin; where nothing else holds it, it is gone. Nothing is wrong where it is not there."""
        self.path(name).unlink(missing_ok=True)

    def links(self) -> Iterator[str]:
        """Names of the pinned links."""
        names = sorted(os.listdir(self.directory))
        yield from (unquote(name) for name in names if name.startswith("link-") or name.startswith("egress-"))

    def keep_only(self, *generations: int) -> None:
        """Unpin every other load."""
        for folder in self.directory.iterdir():
            if folder.is_dir() and folder.name not in {str(g) for g in generations}:
                _remove_tree(folder)

    def clear(self) -> None:
        """Unpin everything. The state goes last: as long as it is there, the next process goes on from it."""
        self.keep_only()
        for name in self.links():
            self.remove(name)
        self.remove("state")

    def close(self) -> None:
        """Let another process have it; an empty directory goes. Idempotent."""
        if self._fd < 0:
            return
        for folder in (self.directory, self.directory.parent):
            try:
                folder.rmdir()
            except OSError:
                break
        os.close(self._fd)
        self._fd = -1


class PinnedObject:
    """What one load has left pinned, with the descriptors of `libbpf.Object` after its load."""

    def __init__(self, pins: Pins, generation: int) -> None:
        self.path = pins.directory / str(generation)
        self._pins, self._generation = pins, generation
        self._fds: dict[str, int] = {}

    def _descriptor(self, name: str) -> int:
        if name not in self._fds:
            fd = self._pins.get(name, self._generation)
            if fd is None:
                raise ProgramError(f"nothing is pinned at {self._pins.path(name, self._generation)}")
            self._fds[name] = fd
        return self._fds[name]

    def program_fd(self, name: str) -> int:
        """Descriptor of a program. Raises ProgramError where it is not pinned."""
        return self._descriptor(f"program-{name}")

    def map_fd(self, name: str) -> int:
        """Descriptor of a map. Raises ProgramError where it is not pinned."""
        return self._descriptor(f"map-{name}")

    def close(self) -> None:
        """Close the descriptors; what is pinned stays. Idempotent."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}


def _remove_tree(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink(missing_ok=True)
    folder.rmdir()


def sensors(root: Path = ROOT) -> list[str]:
    """Names of the sensors that have something pinned."""
    try:
        return sorted(unquote(name) for name in os.listdir(root))
    except FileNotFoundError:
        return []
    except PermissionError as error:
        raise _not_ours(root) from error


def _not_ours(root: Path) -> PrivilegeError:
    return PrivilegeError(f"what is pinned under {root} may not be seen: run as root, or as its owner")


def _is_bpffs(path: Path) -> bool:
    """Whether `path`, or the nearest parent that exists, is on a BPF file system."""
    try:
        while not path.exists():
            path = path.parent
    except PermissionError as error:
        raise _not_ours(path) from error
    best, kind = 0, ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        mounted = fields[4].encode().decode("unicode_escape")
        if path.is_relative_to(mounted) and len(mounted) >= best:
            best, kind = len(mounted), fields[fields.index("-") + 1]
    return kind == "bpf"


def _require_bpffs(root: Path) -> None:
    if _is_bpffs(root):
        return
    if root.is_relative_to(_BPFFS) and _BPFFS.is_dir():
        if _libc.mount(b"bpf", os.fsencode(_BPFFS), b"bpf", 0, b"mode=700") == 0:
            with suppress(OSError):  # who 1 is may be hidden from us
                if not os.path.samefile("/proc/self/ns/mnt", "/proc/1/ns/mnt"):
                    logger.warning("%s is mounted for this mount namespace only: what is pinned ends with it", _BPFFS)
            return
        number = ct.get_errno()
        kind = PrivilegeError if number in (errno.EPERM, errno.EACCES) else KernelSupportError
        raise kind(
            f"no BPF file system is mounted at {_BPFFS}, and it cannot be mounted ({os.strerror(number)}); as root, "
            f"`mount -t bpf bpf {_BPFFS}`, or work without pins (--no-pin)"
        )
    raise KernelSupportError(f"{root} is not on a BPF file system; pin under {_BPFFS}, or work without pins (--no-pin)")
