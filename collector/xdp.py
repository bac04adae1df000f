"""Attaching an XDP program to an interface, checked against the kernel.

Attachment is by link: it ends with its descriptor, so a process that dies leaves nothing on the interface, and nobody
else can replace the program by accident.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from dataclasses import dataclass, field
from enum import StrEnum

from flowsage.collector import libbpf
from flowsage.collector.errors import AttachmentError, AttachModeError, BusyInterfaceError
from flowsage.collector.interface import index_of, missing

log = logging.getLogger(__name__)

_FLAGS = {"skb": 2, "drv": 4, "hw": 8}
"""XDP_FLAGS_*_MODE of linux/if_link.h."""
_ATTACHED = {1: "drv", 2: "skb", 3: "hw", 4: "multi"}
"""XDP_ATTACHED_* of linux/if_link.h."""
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ERANGE}
"""How drivers refuse native mode: no XDP at all; or a frame size or feature that is on."""


class EBPFAttachMode(StrEnum):
    """Where on the way of a packet the program runs."""

    SKB = "skb"
    """Generic: any interface, after the kernel has made an skb."""
    DRV = "drv"
    """Native: in the driver."""
    HW = "hw"
    """On the network card."""
    AUTO = "auto"
    """Native where the driver can, otherwise generic; the log says so."""


def interface_index(interface: str) -> int:
    """Index in this thread's network namespace. Raises MissingInterfaceError for one that does not exist."""
    index = index_of(interface)
    if index is None:
        raise missing(interface)
    return index


def attached_program(interface: str) -> tuple[str, int] | None:
    """Mode and id of the program that the kernel runs on `interface`, None where it runs none."""
    query = libbpf.xdp_query(interface_index(interface))
    if not query.attach_mode:
        return None
    ids = (query.prog_id, query.drv_prog_id, query.skb_prog_id, query.hw_prog_id)
    return _ATTACHED.get(query.attach_mode, "unknown"), next(i for i in ids if i)


def programs_on(interface: str) -> set[int]:
    """Ids of the programs that the kernel runs on `interface`, in whichever modes."""
    return _ids(interface_index(interface))


def _namespace() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


@dataclass
class Attachment:
    """A program on an interface, until `detach`."""

    interface: str
    ifindex: int
    mode: EBPFAttachMode
    program_id: int
    link_fd: int
    namespace: int = field(default_factory=_namespace)

    def present(self) -> bool:
        """Whether the kernel runs this program on the interface now (asked in the namespace it was attached in)."""
        try:
            return socket.if_indextoname(self.ifindex) is not None and self.program_id in _ids(self.ifindex)
        except OSError:
            return False

    def release(self) -> None:
        """Closes the link: where it is pinned, the program stays attached. Idempotent."""
        if self.link_fd >= 0:
            os.close(self.link_fd)
            self.link_fd = -1

    def detach(self) -> None:
        """Takes the program off. Idempotent; raises AttachmentError where the kernel still runs it afterwards."""
        if self.link_fd < 0:
            return
        libbpf.link_detach(self.link_fd)
        self.release()
        # From another namespace its index means nothing; the link itself is gone in any case.
        if _namespace() == self.namespace and self.present():
            raise AttachmentError(
                f"program {self.program_id} is still attached to {self.interface} after its link was closed"
            )


def _ids(ifindex: int) -> set[int]:
    query = libbpf.xdp_query(ifindex)
    return {query.prog_id, query.drv_prog_id, query.skb_prog_id, query.hw_prog_id} - {0}


def attach(program_fd: int, interface: str, mode: EBPFAttachMode, *, replace: bool = False) -> Attachment:
    """Attaches a loaded program to `interface` of this thread's namespace.

    Raises MissingInterfaceError, BusyInterfaceError where it already runs a program (unless `replace`), AttachModeError
    for a mode that it cannot do, AttachmentError where the kernel then shows something else; PrivilegeError without
    CAP_NET_ADMIN.
    """
    ifindex = interface_index(interface)
    _make_room(interface, ifindex, replace)
    modes = (EBPFAttachMode.DRV, EBPFAttachMode.SKB) if mode is EBPFAttachMode.AUTO else (mode,)
    program_id = int(libbpf.program_info(program_fd).id)
    for candidate in modes:
        fd = libbpf.xdp_link(program_fd, ifindex, _FLAGS[candidate])
        if fd >= 0:
            attachment = Attachment(interface, ifindex, candidate, program_id, fd)
            there = attached_program(interface)
            if there != (candidate.value, program_id):
                attachment.detach()
                shown = f"program {there[1]} in mode {there[0]}" if there else "no program"
                raise AttachmentError(
                    f"{interface} should run program {program_id} in mode {candidate}, and the kernel shows {shown}"
                )
            return attachment
        if -fd in _UNSUPPORTED and candidate is not modes[-1]:
            log.warning("%s cannot run XDP natively (%s): falling back to generic mode", interface, os.strerror(-fd))
            continue
        raise _refusal(-fd, interface, candidate)
    raise AssertionError("unreachable")


def _make_room(interface: str, ifindex: int, replace: bool) -> None:
    there = attached_program(interface)
    if there is None:
        return
    mode, other = there
    if not replace:
        raise BusyInterfaceError(
            f"{interface} already runs XDP program {other} ({mode}), which somebody else attached; "
            "detach that first (a FlowSAGE that runs: stop it), or take its place with --replace"
        )
    code = -libbpf.xdp_detach(ifindex, _FLAGS.get(mode, 0))
    if code or _ids(ifindex):
        raise BusyInterfaceError(
            f"XDP program {other} on {interface} is held by another process and cannot be replaced "
            f"({os.strerror(code or errno.EBUSY)}); stop that process (see `bpftool link`)"
        )
    log.warning("replaced XDP program %d (%s) on %s", other, mode, interface)


def _refusal(code: int, interface: str, mode: EBPFAttachMode) -> Exception:
    if code in {errno.EBUSY, errno.EEXIST}:
        return BusyInterfaceError(f"another XDP program was attached to {interface} in the meantime; detach that first")
    if code in _UNSUPPORTED:
        hint = {
            EBPFAttachMode.DRV: "its driver, MTU or queues do not allow native mode; use skb or auto",
            EBPFAttachMode.HW: "its card cannot run XDP programs; use drv or skb",
        }.get(mode, "the kernel does not allow it there")
        return AttachModeError(f"{interface} cannot run XDP in mode {mode}: {hint} ({os.strerror(code)})")
    return libbpf.failure(code, f"attaching to {interface} in mode {mode}")
