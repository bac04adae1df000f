"""XDP programs by netlink, where there is no libbpf to ask for them: pyroute2 takes 0.1 s to import."""

from __future__ import annotations

import errno
from typing import Any

_XDP_ATTACHED = {"xdp": 1, "xdpgeneric": 2, "xdpoffload": 3, "xdpmulti": 4}


def xdp(ifindex: int) -> tuple[int, int, int, int, int]:
    """XDP_ATTACHED_*, then ids (0: none): the program where there is one, and those in native, generic, card mode.

    Raises OSError.
    """
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as socket:
            nested: Any = socket.get_links(ifindex)[0].get_attr("IFLA_XDP")
    except NetlinkError as error:
        raise OSError(error.code, str(error)) from error
    if nested is None:
        return 0, 0, 0, 0, 0
    mode = nested.get_attr("IFLA_XDP_ATTACHED")
    only, native, generic, card = (
        int(nested.get_attr(f"IFLA_XDP_{name}") or 0)
        for name in ("PROG_ID", "DRV_PROG_ID", "SKB_PROG_ID", "HW_PROG_ID")
    )
    return int(_XDP_ATTACHED.get(mode, mode or 0)), only, native, generic, card


def xdp_off(ifindex: int, flags: int) -> int:
    """Detaches what netlink attached, in the mode of `flags` (XDP_FLAGS_*). Returns 0 or −errno."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    off = {"attrs": [("IFLA_XDP_FD", -1), ("IFLA_XDP_FLAGS", flags)]}
    try:
        with IPRoute() as socket:
            socket.link("set", index=ifindex, xdp=off)
    except NetlinkError as error:
        return -int(error.code or errno.EIO)
    return 0
