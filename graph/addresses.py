"""Which hosts are our own: a host is internal if its name is an address of a private network, or no address at all."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flowsage.collector.errors import ConfigurationError
from flowsage.graph import columns
from flowsage.graph.flows import Bool, HostTable, Int32, Int64

PRIVATE = (
    "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16", "127.0.0.0/8",
    "fc00::/7", "fe80::/10", "::1/128",
)  # fmt: skip
"""RFC 1918, 6598, 3927, 1122; RFC 4193, 4291."""

_WHOLE = 1 << 12
"""Hosts of a table up to which all are read, once, when some are asked about: to cut those out costs as much each
time."""

_CACHE_LIMIT = 1 << 18
_NO_ADDRESS, _ASK = -1, -2


class Internal:
    """Tells internal hosts from others.

    IPv4 addresses are read in compiled code; what may be IPv6 is parsed once and remembered.
    `networks`: those that count as internal, as CIDR; names that are not addresses always do.
    """

    def __init__(self, networks: Sequence[str] = PRIVATE) -> None:
        """Raises ConfigurationError for a network that is none."""
        self._ranges: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
        for text in networks:
            try:
                network = ipaddress.ip_network(text)
            except ValueError as error:
                message = f"internal network {text!r} is not a network ({error}); write it like 10.0.0.0/8"
                raise ConfigurationError(message) from error
            self._ranges[network.version].append((int(network.network_address), int(network.netmask)))
        self._known: dict[str, bool] = {}
        self._latest: tuple[HostTable, Bool] | None = None

    def one(self, name: str) -> bool:
        """Whether the host of this name is internal."""
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return True
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        value = int(address)
        return any(value & mask == network for network, mask in self._ranges[address.version])

    def __call__(self, hosts: HostTable) -> Bool:
        """Whether each host is internal [h]."""
        if self._latest is not None and self._latest[0] is hosts:
            return self._latest[1]
        value = np.empty(len(hosts), np.int64)
        data, offsets = columns.text(hosts.names)
        _read_ipv4(data, offsets, value)
        result: Bool = value == _NO_ADDRESS
        for network, mask in self._ranges[4]:
            result |= (value >= 0) & (value & mask == network)
        for i in np.flatnonzero(value == _ASK).tolist():
            name = hosts.names[i].as_py()
            if name not in self._known:
                if len(self._known) >= _CACHE_LIMIT:
                    self._known.clear()
                self._known[name] = self.one(name)
            result[i] = self._known[name]
        self._latest = (hosts, result)
        return result


def some_inside(inside: Callable[[HostTable], Bool], hosts: HostTable, index: Int32) -> Bool:
    """What `inside` says of hosts[index], bool[n]; of a small table it is asked about all, and may remember it."""
    if len(hosts) <= _WHOLE:
        return inside(hosts)[index]
    return inside(HostTable(hosts.names.take(pa.array(index)), hosts.hash[index]))


@numba.njit(cache=True, nogil=True)
def _read_ipv4(data: npt.NDArray[np.uint8], offsets: Int64, out: Int64) -> None:
    """Each string as an IPv4 address; _ASK where it has a colon, _NO_ADDRESS where it is something else.

    Strict, as Python's ipaddress: four decimal numbers to 255, no leading zeros.
    """
    for i in range(len(out)):
        begin, end = offsets[i], offsets[i + 1]
        value, part, digits, dots = 0, 0, 0, 0
        result = 0
        for j in range(begin, end):
            byte = data[j]
            if byte == 58:  # a colon
                result = _ASK
                break
            if byte == 46:  # a dot
                if digits == 0:
                    result = _NO_ADDRESS
                value, part, digits, dots = value * 256 + part, 0, 0, dots + 1
            elif 48 <= byte <= 57 and not (digits > 0 and part == 0) and digits < 3:
                part, digits = part * 10 + byte - 48, digits + 1
                if part > 255:
                    result = _NO_ADDRESS
            else:
                result = _NO_ADDRESS
        if result == 0 and dots == 3 and digits > 0:
            out[i] = value * 256 + part
        elif result == _ASK:
            out[i] = _ASK
        else:
            out[i] = _NO_ADDRESS
