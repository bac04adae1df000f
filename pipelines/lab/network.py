"""The lab's wires: a bridge in a namespace of its own, one namespace a host, one veth pair between the two.

The machine's own network is never touched: the bridge and the bridge-side ends live in `<prefix>-switch`. XDP attached
to those ends sees every frame exactly once, where it enters the bridge. Segmentation and checksum offloads are off, so
a frame is what it would be on Ethernet: at most 1,514 bytes with a true checksum.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from flowsage.collector.errors import FlowsageError, InterfaceError, PrivilegeError
from flowsage.collector.interface import in_namespace
from flowsage.pipelines.lab.plan import DARK_NETWORK, GATEWAY, HostPlan

NAMESPACES = Path("/run/netns")
PREFIX_LENGTH = 24

_CLONE_NEWNET = 0x40000000
_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_SHARED = 0x1000, 0x4000, 1 << 18, 1 << 20
_MNT_DETACH = 2
_ON_LINK = 253  # RT_SCOPE_LINK
_SIOCETHTOOL = 0x8946
# ethtool legacy "set" commands: tx checksum, scatter-gather, TSO, GSO, GRO (linux/ethtool.h).
_OFFLOADS = (0x17, 0x19, 0x1F, 0x24, 0x2C)

_libc = ctypes.CDLL(None, use_errno=True)


def namespace_path(name: str) -> Path:
    """Where the namespace called `name` is mounted."""
    return NAMESPACES / name


def switch_name(prefix: str) -> str:
    """Namespace of the bridge and its ports."""
    return f"{prefix}-switch"


def host_namespace(prefix: str, host: str) -> str:
    """Namespace of one host."""
    return f"{prefix}-{host}"


def port_name(prefix: str, host: str) -> str:
    """Interface at the bridge's side of a host's cable, within the switch's namespace (at most 15 characters)."""
    return f"{prefix}-{host}"


def _call(result: int, what: str) -> None:
    if result == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EPERM:
        raise PrivilegeError(f"the kernel refused to {what}: run as root (or with CAP_SYS_ADMIN and CAP_NET_ADMIN)")
    raise InterfaceError(f"cannot {what}: {os.strerror(code)}")


def enter(path: Path | str) -> None:
    """Move the calling thread into the network namespace mounted at `path`, for good.

    Raises InterfaceError where there is none, PrivilegeError without CAP_SYS_ADMIN.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InterfaceError(f"no network namespace at {path}: start the lab first") from error
    try:
        _call(_libc.setns(fd, _CLONE_NEWNET), f"enter the network namespace {path}")
    finally:
        os.close(fd)


def _write(path: str, value: str) -> None:
    """Set a kernel parameter where there is one and /proc/sys may be written; the lab can do without each of them."""
    with suppress(OSError):
        Path(path).write_text(value)


def _prepare_directory() -> None:
    """Make /run/netns a shared mount of its own, as iproute2 does before its first namespace.

    Else the next `ip netns add` of anybody mounts the directory over itself, and our mounts get a hidden twin below.
    """
    NAMESPACES.mkdir(parents=True, exist_ok=True)
    path = str(NAMESPACES).encode()
    if _libc.mount(b"", path, b"none", _MS_SHARED | _MS_REC, None):
        _call(_libc.mount(path, path, b"none", _MS_BIND | _MS_REC, None), f"mount {NAMESPACES}")
        _call(_libc.mount(b"", path, b"none", _MS_SHARED | _MS_REC, None), f"share the mount {NAMESPACES}")


def create_namespace(name: str) -> Path:
    """Make a namespace that outlives its processes, as `ip netns add` does. IPv6 is off in it."""
    _prepare_directory()
    path = namespace_path(name)
    back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        path.touch(mode=0o444, exist_ok=False)
        _call(_libc.unshare(_CLONE_NEWNET), "make a network namespace")
        try:
            source = f"/proc/self/task/{_libc.gettid()}/ns/net".encode()
            _call(_libc.mount(source, str(path).encode(), b"none", _MS_BIND, None), f"mount {path}")
            for which in ("all", "default"):
                _write(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6", "1")
        finally:
            _call(_libc.setns(back, _CLONE_NEWNET), "return to the outer network namespace")
    except PermissionError as error:
        raise PrivilegeError(f"cannot write {path}: run the lab as root") from error
    finally:
        os.close(back)
    return path


def disable_offloads(interface: str) -> None:
    """Make an interface of the current namespace send frames of wire size with full checksums, and merge none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command in _OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            with suppress(OSError):  # a kernel without the offload has nothing to switch off
                fcntl.ioctl(control, _SIOCETHTOOL, request)


def build(prefix: str, hosts: Sequence[HostPlan]) -> None:
    """Make the switch, the hosts' namespaces and the cables, all up and addressed. About 60 ms for 20 hosts.

    Raises InterfaceError where the kernel lacks bridges or veth.
    """
    try:
        _build(prefix, hosts)
    except NetlinkError as error:
        raise InterfaceError(
            f"the kernel refused the lab's network ({error}): it needs network namespaces, veth and bridges"
        ) from error


def _build(prefix: str, hosts: Sequence[HostPlan]) -> None:
    switch = create_namespace(switch_name(prefix))
    paths = {host.name: create_namespace(host_namespace(prefix, host.name)) for host in hosts}
    bridge = f"{prefix}-br"
    with in_namespace(str(switch)), IPRoute() as ip:
        ip.link("set", index=1, state="up")
        ip.link("add", ifname=bridge, kind="bridge", br_stp_state=0, br_forward_delay=0, br_mcast_snooping=0)
        master = ip.link_lookup(ifname=bridge)[0]
        ip.link("set", index=master, state="up")
        for host in hosts:
            port = port_name(prefix, host.name)
            target = os.open(paths[host.name], os.O_RDONLY | os.O_CLOEXEC)
            try:
                ip.link("add", ifname=port, kind="veth", peer={"ifname": "eth0", "net_ns_fd": target})
            finally:
                os.close(target)
            ip.link("set", index=ip.link_lookup(ifname=port)[0], master=master, state="up")
            disable_offloads(port)
    for host in hosts:
        with in_namespace(str(paths[host.name])), IPRoute() as ip:
            _configure_host(ip, host)


def _configure_host(ip: IPRoute, host: HostPlan) -> None:
    """Addresses and routes of a host: all the world on link, unused networks through the gateway."""
    device = ip.link_lookup(ifname="eth0")[0]
    disable_offloads("eth0")
    ip.link("set", index=1, state="up")
    ip.link("set", index=device, state="up")
    for number, address in enumerate(host.addresses):
        ip.addr("add", index=device, address=address, prefixlen=PREFIX_LENGTH if number == 0 else 32)
    ip.route("add", dst="0.0.0.0/0", oif=device, scope=_ON_LINK)
    if host.address != GATEWAY and not host.outside:
        ip.route("add", dst=DARK_NETWORK, gateway=GATEWAY)
    # The gateway does not forward: what is sent to an unused network is dropped without a word, as a firewall would.
    _write("/proc/sys/net/ipv4/ip_forward", "0")


def namespaces(prefix: str) -> list[str]:
    """Names of the namespaces that belong to the lab called `prefix`, whether a lab runs or not."""
    if not NAMESPACES.is_dir():
        return []
    return sorted(path.name for path in NAMESPACES.iterdir() if path.name.startswith(f"{prefix}-"))


def processes_in(paths: Sequence[Path]) -> list[int]:
    """Processes that live in one of the namespaces mounted at `paths`, never those of the caller's own."""
    own = os.stat("/proc/self/ns/net")
    wanted = set()
    for path in paths:
        with suppress(OSError):
            entry = os.stat(path)
            wanted.add((entry.st_dev, entry.st_ino))
    wanted.discard((own.st_dev, own.st_ino))
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):
                entry = os.stat(process / "ns/net")
                if (entry.st_dev, entry.st_ino) in wanted:
                    found.append(int(process.name))
    return found


def remove(prefix: str) -> list[str]:
    """Take the lab called `prefix` off the machine: processes in its namespaces, then all that these hold.

    Returns the names of the namespaces removed. Cables go first, by name, so that none outlives the call.
    """
    names = namespaces(prefix)
    paths = [namespace_path(name) for name in names]
    for attempt in range(20):
        living = processes_in(paths)
        if not living:
            break
        for process in living:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01 * (attempt + 1))
    if namespace_path(switch_name(prefix)).exists():
        with suppress(FlowsageError), in_namespace(str(namespace_path(switch_name(prefix)))), IPRoute() as ip:
            for link in ip.get_links():
                if link.get_attr("IFLA_IFNAME", "").startswith(f"{prefix}-"):
                    with suppress(Exception):  # a veth that went with its peer
                        ip.link("del", index=link["index"])
    for path in paths:
        _libc.umount2(str(path).encode(), _MNT_DETACH)
        try:
            path.unlink(missing_ok=True)
        except OSError:  # mounted below a later mount of the directory, where no path leads
            _unlink_hidden(path)
    return names


def _unlink_hidden(path: Path) -> None:
    """Remove a file with mounts on it that are covered by another mount.

    The kernel refuses to unlink what is mounted on in the caller's mount namespace, and detaches it everywhere else:
    so a child takes its own copies away first.
    """
    pid = os.fork()
    if pid == 0:
        try:
            _libc.unshare(_CLONE_NEWNS)
            _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
            while _libc.umount2(str(NAMESPACES).encode(), _MNT_DETACH) == 0:
                pass
            while _libc.umount2(str(path).encode(), _MNT_DETACH) == 0:
                pass
            os.unlink(path)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def lock(prefix: str) -> socket.socket:
    """Claim the lab's name on this machine for as long as the returned socket is open in some process.

    The claim is a Unix socket in the abstract namespace: the kernel frees it with its last holder, and no file stays.
    Raises FlowsageError where a lab of that name runs.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0flowsage-lab-{prefix}")
    except OSError as error:
        claim.close()
        raise FlowsageError(
            f"a lab called {prefix!r} already runs on this machine: stop it, or choose another prefix"
        ) from error
    return claim
