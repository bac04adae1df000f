"""Network interfaces: what is there, what it can do, and what is attached to it.

Everything here speaks of the network namespace of the calling thread; `in_namespace` enters another one for a while.
"""

from __future__ import annotations

import ctypes
import difflib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flowsage.collector.errors import InterfaceError, MissingInterfaceError, PrivilegeError

ETHERNET_TYPES = {1, 772}
"""ARPHRD types whose frames begin with an Ethernet header: Ethernet itself (and veth, bridges, VLANs), loopback."""

_SIOCGIFFLAGS = 0x8913
_SIOCGIFHWADDR = 0x8927
_SIOCETHTOOL = 0x8946
_ETHTOOL_GDRVINFO = 0x03
_ETHTOOL_GFLAGS = 0x25
_RX_VLAN = 1 << 8
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
_CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Interface:
    """One interface as it is now.

    `state` is the operational state of RFC 2863 ("up", "down", "unknown" for those that do not tell); `link_type` the
    ARPHRD number; `vlan_offload` whether the receiver takes VLAN tags off before XDP sees the frame (None: it does not
    say); `xdp_mode` ("drv", "skb", "hw", "multi") and `xdp_program` (its id) of what is attached, None for nothing.
    """

    name: str
    index: int
    state: str
    up: bool
    mtu: int
    rx_queues: int
    tx_queues: int
    link_type: int
    driver: str | None
    vlan_offload: bool | None
    xdp_mode: str | None
    xdp_program: int | None

    @property
    def ethernet(self) -> bool:
        """Whether its frames begin with an Ethernet header."""
        return self.link_type in ETHERNET_TYPES


def _ethtool(name: str, request: bytearray) -> bool:
    """Fill `request` by SIOCETHTOOL; False where the interface does not answer it."""
    buffer = (ctypes.c_char * len(request)).from_buffer(request)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            fcntl.ioctl(s, _SIOCETHTOOL, struct.pack("16sP16x", name.encode(), ctypes.addressof(buffer)))
        except OSError:
            return False
    return True


def driver_of(name: str) -> str | None:
    """Kernel driver of the interface, None where it has none to speak of."""
    info = bytearray(struct.pack("I192x", _ETHTOOL_GDRVINFO))
    return info[4:36].split(b"\0")[0].decode() or None if _ethtool(name, info) else None


def vlan_offload(name: str) -> bool | None:
    """Whether VLAN tags are taken off on receipt, before XDP; None where the interface does not say."""
    flags = bytearray(struct.pack("II", _ETHTOOL_GFLAGS, 0))
    return bool(struct.unpack_from("I", flags, 4)[0] & _RX_VLAN) if _ethtool(name, flags) else None


def is_running(name: str) -> bool:
    """Whether the interface is up and has its carrier; False for one that does not exist. A microsecond or two."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            answer = fcntl.ioctl(s, _SIOCGIFFLAGS, struct.pack("16s24x", name.encode()[:15]))
        except OSError:
            return False
    flags = struct.unpack_from("H", answer, 16)[0]
    return bool(flags & _IFF_UP and flags & _IFF_RUNNING)


def index_of(name: str) -> int | None:
    """Index of the interface, None for one that does not exist."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def missing(name: str) -> MissingInterfaceError:
    """The error for an interface that does not exist: names those that do, and the one that was probably meant."""
    names = sorted(n for _, n in socket.if_nameindex())
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return MissingInterfaceError(f"there is no interface {name!r} here{hint} (there are: {', '.join(names)})")


def read_interface(name: str) -> Interface:
    """What is known of the interface called `name`.

    Raises MissingInterfaceError, which names those that exist, for one that does not.
    """
    index = index_of(name)
    if index is None:
        raise missing(name)
    # Imported here: a capture is read and a batch published without netlink.
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as netlink:
            link = netlink.get_links(index)[0]
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            raise missing(name) from error
        raise InterfaceError(f"the kernel does not describe interface {name!r}: {error}") from error
    xdp = link.get_attr("IFLA_XDP")
    program = xdp.get_attr("IFLA_XDP_PROG_ID") if xdp else None
    mode = xdp.get_attr("IFLA_XDP_ATTACHED") if xdp else None
    modes = {"xdp": "drv", "xdpgeneric": "skb", "xdpoffload": "hw", "xdpmulti": "multi", 1: "drv", 2: "skb", 3: "hw"}
    return Interface(
        name=name,
        index=index,
        state=str(link.get_attr("IFLA_OPERSTATE")).lower(),
        up=bool(link["flags"] & _IFF_UP),
        mtu=int(link.get_attr("IFLA_MTU")),
        rx_queues=int(link.get_attr("IFLA_NUM_RX_QUEUES") or 1),
        tx_queues=int(link.get_attr("IFLA_NUM_TX_QUEUES") or 1),
        link_type=int(link["ifi_type"]),
        driver=driver_of(name),
        vlan_offload=vlan_offload(name),
        xdp_mode=modes.get(mode, str(mode)) if mode else None,
        xdp_program=int(program) if program else None,
    )


def require_ethernet(name: str) -> None:
    """Raises InterfaceError for an interface that does not exist, or has no Ethernet header before its packets.

    Those are tunnels, of which every packet would be misread. Asks by ioctl: netlink's library takes 70 ms to import,
    and the first packet need not wait for it.
    """
    if index_of(name) is None:
        raise missing(name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            answer = fcntl.ioctl(s, _SIOCGIFHWADDR, struct.pack("16s24x", name.encode()))
        except OSError as error:
            raise InterfaceError(f"the kernel does not describe interface {name!r}: {error.strerror}") from error
    link_type = struct.unpack_from("H", answer, 16)[0]
    if link_type not in ETHERNET_TYPES:
        raise InterfaceError(
            f"interface {name!r} carries packets without an Ethernet header (link type {link_type}), which cannot be "
            "parsed; watch the interface beneath the tunnel"
        )


def namespace_file(name: str) -> Path:
    """File of a network namespace: a name under /run/netns (`ip netns`), or a path as it stands."""
    return Path(name) if "/" in name else Path("/run/netns") / name


@contextmanager
def in_namespace(name: str | None) -> Iterator[None]:
    """The calling thread is in the network namespace `name` (see `namespace_file`) within the block; None: stays.

    Raises InterfaceError for a namespace that does not exist, PrivilegeError without CAP_SYS_ADMIN.
    """
    if name is None:
        yield
        return
    path = namespace_file(name)
    try:
        target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InterfaceError(f"there is no network namespace {name!r} ({path}: {error.strerror})") from error
    try:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.path.sameopenfile(home, target):
                yield
                return
            _enter(target, name)
            try:
                yield
            finally:
                _enter(home, "before")
        finally:
            os.close(home)
    finally:
        os.close(target)


def enter_namespace(name: str) -> None:
    """The calling thread is in the network namespace `name` from now on. Raises what `in_namespace` raises."""
    with in_namespace(name):
        entered = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(entered, name)
    finally:
        os.close(entered)


def _enter(fd: int, name: str) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EPERM:
        raise PrivilegeError(f"entering the network namespace {name!r} needs CAP_SYS_ADMIN; run it as root")
    raise InterfaceError(f"the network namespace {name!r} cannot be entered: {os.strerror(code)}")
