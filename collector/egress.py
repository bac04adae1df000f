"""What leaves an interface: a TCX program on its egress, with the same parser and table as the XDP program.

A link, as there: it ends with its descriptor, or lasts as long as its pin. No qdisc is made, none is left behind, and
whoever else is attached there stays.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from flowsage.collector import libbpf, syscall
from flowsage.collector.errors import AttachmentError, KernelSupportError
from flowsage.collector.xdp import interface_index


@dataclass
class EgressAttachment:
    """A program on the egress of an interface, until `detach`."""

    interface: str
    ifindex: int
    program_id: int
    link_fd: int

    def present(self) -> bool:
        """Whether the kernel runs this program there now."""
        link = syscall.info(self.link_fd, syscall.LinkInfo)
        return bool(link.ifindex == self.ifindex and link.prog_id == self.program_id)

    def release(self) -> None:
        """Closes the link: where it is pinned, the program stays attached. Idempotent."""
        if self.link_fd >= 0:
            os.close(self.link_fd)
            self.link_fd = -1

    def detach(self) -> None:
        """Takes the program off. Idempotent."""
        if self.link_fd >= 0:
            libbpf.link_detach(self.link_fd)
            self.release()


def attach_egress(program_fd: int, interface: str) -> EgressAttachment:
    """Attaches a loaded SCHED_CLS program to the egress of `interface` of this thread's namespace, behind all others.

    Raises MissingInterfaceError, KernelSupportError before Linux 6.6, AttachmentError, PrivilegeError.
    """
    ifindex = interface_index(interface)
    fd = syscall.link_egress(program_fd, ifindex)
    if fd == -errno.EINVAL:
        raise KernelSupportError(
            f"what leaves {interface} cannot be watched: that needs Linux 6.6 (TCX), and this is {os.uname().release}"
        )
    libbpf.check(fd, f"attaching to the egress of {interface}")
    attached = EgressAttachment(interface, ifindex, int(libbpf.program_info(program_fd).id), fd)
    if not attached.present():
        attached.detach()
        raise AttachmentError(f"the kernel does not show our program on the egress of {interface} after attaching it")
    return attached
