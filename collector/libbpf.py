"""The part of libbpf.so.1 that we use, through ctypes, with its errors turned into our tree.

libbpf returns −errno or NULL and prints why; here its words are kept per thread and end up in the exception:
PrivilegeError for EPERM, KernelSupportError where the kernel has no BTF, ProgramError (ObjectError, RejectedError)
otherwise.
"""

from __future__ import annotations

import ctypes as ct
import ctypes.util
import errno
import os
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from flowsage.collector import syscall
from flowsage.collector.errors import KernelSupportError, ObjectError, PrivilegeError, ProgramError, RejectedError

BTF = Path("/sys/kernel/btf/vmlinux")
"""Where a kernel built with CONFIG_DEBUG_INFO_BTF describes itself."""

_LAST_WORDS = 5
_NOT_TOLD = ("processed ", "verification time", "stack depth")
_said = threading.local()


class XdpQuery(ct.Structure):
    """`struct bpf_xdp_query_opts` up to attach_mode."""

    _fields_ = (
        ("sz", ct.c_size_t),
        ("prog_id", ct.c_uint32),
        ("drv_prog_id", ct.c_uint32),
        ("hw_prog_id", ct.c_uint32),
        ("skb_prog_id", ct.c_uint32),
        ("attach_mode", ct.c_uint8),
    )


_PRINT = ct.CFUNCTYPE(ct.c_int, ct.c_int, ct.c_char_p, ct.c_void_p)
_libc = ct.CDLL(None, use_errno=True)


def _listen(level: int, pattern: bytes, arguments: int) -> int:
    """libbpf's log: warnings are kept for the exception, the rest is dropped."""
    if level == 0:
        buffer = ct.create_string_buffer(1 << 20)
        _libc.vsnprintf(buffer, ct.c_size_t(len(buffer)), pattern, ct.c_void_p(arguments))
        _words().append(buffer.value.decode(errors="replace"))
    return 0


def _words() -> list[str]:
    if not hasattr(_said, "words"):
        _said.words = []
    words: list[str] = _said.words
    return words


_listener = _PRINT(_listen)


_POINTER, _FD, _TEXT = ct.c_void_p, ct.c_int, ct.c_char_p
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "bpf_object__open_file": (_POINTER, (_TEXT, _POINTER)),
    "bpf_object__load": (ct.c_int, (_POINTER,)),
    "bpf_object__close": (None, (_POINTER,)),
    "bpf_object__next_program": (_POINTER, (_POINTER, _POINTER)),
    "bpf_object__next_map": (_POINTER, (_POINTER, _POINTER)),
    "bpf_program__name": (_TEXT, (_POINTER,)),
    "bpf_program__fd": (_FD, (_POINTER,)),
    "bpf_program__type": (ct.c_int, (_POINTER,)),
    "bpf_program__set_autoload": (ct.c_int, (_POINTER, ct.c_bool)),
    "bpf_map__name": (_TEXT, (_POINTER,)),
    "bpf_map__fd": (_FD, (_POINTER,)),
    "bpf_map__set_max_entries": (ct.c_int, (_POINTER, ct.c_uint32)),
    "bpf_map__max_entries": (ct.c_uint32, (_POINTER,)),
    "bpf_map__type": (ct.c_int, (_POINTER,)),
    "bpf_map__key_size": (ct.c_uint32, (_POINTER,)),
    "bpf_map__value_size": (ct.c_uint32, (_POINTER,)),
    "bpf_map__reuse_fd": (ct.c_int, (_POINTER, _FD)),
    "bpf_map__initial_value": (_POINTER, (_POINTER, ct.POINTER(ct.c_size_t))),
    "bpf_xdp_detach": (ct.c_int, (ct.c_int, ct.c_uint32, _POINTER)),
    "bpf_xdp_query": (ct.c_int, (ct.c_int, ct.c_int, ct.POINTER(XdpQuery))),
    "libbpf_set_print": (_POINTER, (_PRINT,)),
}


@cache
def library() -> Any:
    """libbpf.so.1, loaded once. Raises KernelSupportError where it is not installed."""
    try:
        lib = ct.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise KernelSupportError("libbpf.so.1 is not installed; install the package libbpf1") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def _listen_anew() -> None:
    """Before what may fail: libbpf's words come to us from here on. BCC, in the same process, takes them for itself."""
    if available():
        library().libbpf_set_print(_listener)
    _words().clear()


def available() -> bool:
    """Whether libbpf is installed. What needs no library works without: see collector/syscall.py."""
    try:
        library()
    except KernelSupportError:
        return False
    return True


def failure(code: int, what: str, kind: type[ProgramError] = ProgramError) -> ProgramError | PrivilegeError:
    """The exception for `what` having failed with errno `code`, with the last words of libbpf and the verifier."""
    told = last_words("".join(_words()))
    _words().clear()
    if code == errno.EPERM or (code == errno.EACCES and not _may_load()):  # EACCES may be the verifier
        return PrivilegeError(f"{what}: not permitted; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")
    reason = os.strerror(code) + (f": {told}" if told else "")
    if not BTF.exists():
        return KernelSupportError(
            f"{what}: {reason}. This kernel has no BTF ({BTF} is missing): boot one built with CONFIG_DEBUG_INFO_BTF=y"
        )
    return kind(f"{what}: {reason}")


def last_words(log: str) -> str:
    """What libbpf and the verifier object to: the verifier ends with its statistics, that comes just before."""
    lines = [line.strip().removeprefix("libbpf: ") for line in log.splitlines()]
    told = [line for line in lines if line and "LOG --" not in line and "failed to load" not in line]
    return "; ".join([line for line in told if not line.startswith(_NOT_TOLD)][-_LAST_WORDS:])


def _may_load() -> bool:
    """Whether this process has CAP_BPF (39) or CAP_SYS_ADMIN (21), as /proc tells: EACCES may be the verifier."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            held = int(line.split()[1], 16)
            return bool(held & (1 << 39 | 1 << 21))
    return True


def check(result: int, what: str, kind: type[ProgramError] = ProgramError) -> int:
    """`result` of a libbpf call, or the exception for it."""
    if result < 0:
        raise failure(-result, what, kind)
    return result


class Object:
    """One compiled object: opened, adjusted, loaded; closing it frees programs and maps nobody else holds."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ObjectError(f"no program object at {path}; build it with `make bpf`")
        self.path = path
        self._lib = library()
        _listen_anew()
        pointer = self._lib.bpf_object__open_file(os.fsencode(path), None)
        if not pointer:
            raise failure(ct.get_errno(), f"{path} is not a program object that libbpf can open", ObjectError)
        self._object: int | None = pointer
        self.programs = {self._lib.bpf_program__name(p).decode(): p for p in self._each("program")}
        self.maps = {self._lib.bpf_map__name(m).decode(): m for m in self._each("map")}

    def _each(self, kind: str) -> Iterator[int]:
        following, at = getattr(self._lib, f"bpf_object__next_{kind}"), None
        while at := following(self._object, at):
            yield at

    def _map(self, name: str) -> int:
        try:
            return self.maps[name]
        except KeyError:
            raise ProgramError(f"{self.path} has no map {name}: it was built for another version") from None

    def shape(self, name: str) -> tuple[int, int, int, int]:
        """Before load: type, key size, value size and entries of a map, as `reuse` needs them to be."""
        pointer = self._map(name)
        asked = ("type", "key_size", "value_size", "max_entries")
        kind, key, value, entries = (int(getattr(self._lib, f"bpf_map__{what}")(pointer)) for what in asked)
        return kind, key, value, entries

    def reuse(self, name: str, fd: int) -> None:
        """Before load: the programs use this map, which is there already, for theirs of that name."""
        check(self._lib.bpf_map__reuse_fd(self._map(name), fd), f"keeping {name} for {self.path}")

    def skip(self, name: str) -> None:
        """Before load: leave a program out; nothing is wrong where there is none of that name."""
        if name in self.programs:
            check(self._lib.bpf_program__set_autoload(self.programs[name], False), f"leaving out {name}")

    def resize(self, name: str, entries: int) -> None:
        """Before load: the number of entries (a ring: of bytes)."""
        check(self._lib.bpf_map__set_max_entries(self._map(name), entries), f"sizing {name} of {self.path}")

    def data(self, name: str, kind: type[ct.Structure] | type[ct._SimpleCData[int]]) -> Any:
        """A global's memory, as `kind`, as it will be when the program is loaded: settings are written here before."""
        size = ct.c_size_t()
        address = self._lib.bpf_map__initial_value(self._map(name), ct.byref(size))
        if not address or size.value < ct.sizeof(kind):
            raise ProgramError(
                f"{self.path}: {name} has {size.value} bytes, not {ct.sizeof(kind)}: built for another version"
            )
        return kind.from_address(address)

    def load(self) -> None:
        """Hands everything to the kernel and its verifier."""
        _listen_anew()
        check(self._lib.bpf_object__load(self._object), f"the kernel refused {self.path}", RejectedError)

    def first_program(self, kind: int) -> str:
        """Name of the first program of that type (enum bpf_prog_type)."""
        for name, program in self.programs.items():
            if self._lib.bpf_program__type(program) == kind:
                return str(name)
        raise ProgramError(f"{self.path} has no program of type {kind}; it has {', '.join(self.programs) or 'none'}")

    def program_fd(self, name: str) -> int:
        """Descriptor of a loaded program."""
        try:
            return check(self._lib.bpf_program__fd(self.programs[name]), f"program {name} of {self.path}")
        except KeyError:
            raise ProgramError(f"{self.path} has no program {name}: it was built for another version") from None

    def map_fd(self, name: str) -> int:
        """Descriptor of a created map."""
        return check(self._lib.bpf_map__fd(self._map(name)), f"map {name} of {self.path}")

    def max_entries(self, name: str) -> int:
        """What the map was made for: entries, or bytes of a ring."""
        return int(self._lib.bpf_map__max_entries(self._map(name)))

    def close(self) -> None:
        """Gives everything back. Idempotent."""
        if self._object is not None:
            self._lib.bpf_object__close(self._object)
            self._object = None


def program_info(fd: int) -> syscall.ProgramInfo:
    """What the kernel says of a program."""
    try:
        return syscall.info(fd, syscall.ProgramInfo)
    except OSError as error:
        raise failure(error.errno or errno.EINVAL, "asking for a program's description") from error


def program_exists(program_id: int) -> bool:
    """Whether the kernel still knows a program by this id."""
    fd = syscall.by_id("program", program_id)
    if fd == -errno.ENOENT:
        return False
    os.close(check(fd, f"looking for program {program_id}"))
    return True


def xdp_query(ifindex: int) -> XdpQuery:
    """Which programs the kernel runs on an interface, by mode (ids, 0: none)."""
    query = XdpQuery(sz=ct.sizeof(XdpQuery))
    if available():
        check(
            library().bpf_xdp_query(ifindex, 0, ct.byref(query)), f"asking for the XDP program of interface {ifindex}"
        )
        return query
    from flowsage.collector import netlink

    try:
        query.attach_mode, query.prog_id, query.drv_prog_id, query.skb_prog_id, query.hw_prog_id = netlink.xdp(ifindex)
    except OSError as error:
        raise failure(error.errno or errno.EINVAL, f"asking for the XDP program of interface {ifindex}") from error
    return query


def xdp_detach(ifindex: int, flags: int) -> int:
    """Detaches what netlink attached, in the mode of `flags`. Returns 0 or −errno (a link's program stays)."""
    _listen_anew()
    if available():
        return int(library().bpf_xdp_detach(ifindex, flags, None))
    from flowsage.collector import netlink

    return netlink.xdp_off(ifindex, flags)


def link_detach(fd: int) -> None:
    """Detaches a link at once, whoever else holds it. Nothing is wrong where its interface is gone."""
    syscall.link_detach(fd)


def xdp_link(program_fd: int, ifindex: int, flags: int) -> int:
    """Attaches by a link, which lasts as long as its descriptor. Returns that, or −errno."""
    _listen_anew()
    return syscall.link_xdp(program_fd, ifindex, flags)
