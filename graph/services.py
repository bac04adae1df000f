"""Services: protocol and offered port as one number, and what that number says."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from flowsage.graph.columns import UNKNOWN

Int32 = npt.NDArray[np.int32]

TCP = 6
EPHEMERAL = 32_768
"""Lowest port that counts as a client's own choice (DETECTION: service)."""

LOGIN_PORTS = (21, 22, 23, 1433, 3306, 3389, 5432, 5900)
"""TCP services that ask for a password."""

_BITS = 20
"""Of the port's part of a code; both parts are one more than what they stand for, which may be unknown (-1)."""
_PORT = (1 << _BITS) - 1
_REVERSED, _CLASS = 100_000, 200_000
"""What is added to the port of a reversed service, and what stands for two ports that are nobody's service."""


def service_code(proto: Int32, src_port: Int32, dst_port: Int32) -> Int32:
    """(protocol, port) as one number [n]: the port that was offered, as well as the flow tells.

    A port at the source side only (dst >= 32768 > src) is a reversed service, both >= 32768 are one class.
    """
    port = dst_port.astype(np.int32, copy=True)
    known = src_port >= 0
    reverse = known & (dst_port >= EPHEMERAL) & (src_port < EPHEMERAL)
    port[reverse] = src_port[reverse] + _REVERSED
    port[known & (dst_port >= EPHEMERAL) & (src_port >= EPHEMERAL)] = _CLASS
    code: Int32 = (((proto.astype(np.int64) + 1) << _BITS) | (port + 1)).astype(np.int32)
    return code


@numba.njit(cache=True, nogil=True, inline="always")
def protocol_of(service):  # type: ignore[no-untyped-def]
    """IP protocol of a code, -1 where it is unknown."""
    return (service >> _BITS) - 1


@numba.njit(cache=True, nogil=True, inline="always")
def port_part(service):  # type: ignore[no-untyped-def]
    """Port of a code as it stands there, -1 where it is unknown or there is none."""
    return (service & _PORT) - 1


@numba.njit(cache=True, nogil=True, inline="always")
def is_reversed(service):  # type: ignore[no-untyped-def]
    """Whether the offered port of a code is the source's: such flows are answers."""
    return _REVERSED <= port_part(service) < _CLASS


@numba.njit(cache=True, nogil=True, inline="always")
def on_ports(service, ports):  # type: ignore[no-untyped-def]
    """Whether a service, by its code, is TCP on one of these ports."""
    port, found = port_part(service), False
    if protocol_of(service) == TCP:
        for p in ports:
            found |= port == p
    return found


def parts_of(code: int) -> tuple[int, int | None]:
    """Protocol and port of a code; no port for a class of ports and for what has none."""
    proto, port = (code >> _BITS) - 1, (code & _PORT) - 1
    port = port - _REVERSED if _REVERSED <= port < _CLASS else port
    return proto, port if 0 <= port < 65_536 else None


def service_name(code: int) -> str:
    """Readable form of a code: "tcp/445", "udp/53 (reversed)", "tcp/ephemeral", "icmp"."""
    proto, port = (code >> _BITS) - 1, (code & _PORT) - 1
    name = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp", UNKNOWN: "any"}.get(proto, f"proto-{proto}")
    if port == _CLASS:
        return f"{name}/ephemeral"
    if port >= _REVERSED:
        return f"{name}/{port - _REVERSED} (reversed)"
    return name if port < 0 or proto in (1, 58) else f"{name}/{port}"
