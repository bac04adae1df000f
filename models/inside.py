"""Which hosts are ours: by the networks that they are in."""

from __future__ import annotations

import ipaddress
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flowsage.collector.errors import ConfigurationError

PRIVATE = (
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "169.254.0.0/16",
    "127.0.0.0/8",
    "fc00::/7",
    "fe80::/10",
    "::1/128",
)
"""RFC 1918, 3927, 4193, 4291."""

_V4 = r"^\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}$"
_V6 = r"^[0-9a-fA-F:.]*::[0-9a-fA-F:.]*$|^([0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}$"


class Inside:
    """Names of hosts to whether they are internal. What is no address (a label, a MAC address) is.

    Raises ConfigurationError for a network that is none.

    >>> Inside(None)(pa.array(["10.1.2.3", "8.8.8.8", "printer"]))
    array([ True, False,  True])
    """

    def __init__(self, networks: tuple[str, ...] | None) -> None:
        try:
            parsed = [ipaddress.ip_network(n) for n in (PRIVATE if networks is None else networks)]
        except ValueError as error:
            raise ConfigurationError(f"alarms: internal: {error}; give networks such as 10.0.0.0/8") from error
        v4 = [n for n in parsed if isinstance(n, ipaddress.IPv4Network)]
        self._net = np.array([int(n.network_address) for n in v4], np.int64)
        self._mask = np.array([int(n.netmask) for n in v4], np.int64)
        self._v6 = [n for n in parsed if isinstance(n, ipaddress.IPv6Network)]

    def __call__(self, names: pa.Array) -> npt.NDArray[np.bool_]:
        """bool[n] of n names."""
        out = np.ones(len(names), np.bool_)
        v4 = np.flatnonzero(pc.match_substring_regex(names, _V4).to_numpy(zero_copy_only=False))
        if len(v4):
            parts = pc.split_pattern(names.take(pa.array(v4)), ".").flatten()
            number = pc.cast(parts, pa.int64()).to_numpy().reshape(-1, 4) @ np.array([1 << 24, 1 << 16, 1 << 8, 1])
            out[v4] = ((number[:, None] & self._mask) == self._net).any(1)
        rest = np.ones(len(names), np.bool_)
        rest[v4] = False
        if rest.any():
            v6 = np.flatnonzero(rest & pc.match_substring_regex(names, _V6).to_numpy(zero_copy_only=False))
            # Few and once a host: the standard library knows all the ways to write an IPv6 address.
            for i in v6.tolist():
                out[i] = self._is_v6(names[i].as_py())
        return out

    def _is_v6(self, name: Any) -> bool:
        try:
            address = ipaddress.IPv6Address(name)
        except ValueError:
            return True
        return any(address in n for n in self._v6)
