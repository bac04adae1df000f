"""Addresses of 16 bytes as the names that everyone writes, without a Python loop over them.

IPv4 is dotted, IPv6 as RFC 5952 says (and the C library does). Only the distinct addresses of a batch are formatted.
"""

from __future__ import annotations

import socket
from functools import cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

VECTOR_FROM = 256
"""Fewer IPv6 addresses than this are formatted one by one: the table of words costs a millisecond, once."""

_DIGITS = np.zeros((256, 4), np.uint8)
for _value in range(256):
    _text = f"{_value}.".encode()
    _DIGITS[_value, : len(_text)] = np.frombuffer(_text, np.uint8)
_LENGTHS = (_DIGITS != 0).sum(axis=1).astype(np.int32)


def _ipv4_names(octets: npt.NDArray[np.uint8]) -> pa.Array:
    """Dotted names [n] of n IPv4 addresses, `octets` [n, 4]: digits by table, then squeezed together."""
    text = _DIGITS[octets]
    last = text[:, 3]
    last[last == ord(".")] = 0
    offsets = np.zeros(len(octets) + 1, np.int32)
    np.cumsum(_LENGTHS[octets].sum(axis=1) - 1, out=offsets[1:])
    flat = text.reshape(-1)
    return pa.Array.from_buffers(pa.string(), len(octets), [None, pa.py_buffer(offsets), pa.py_buffer(flat[flat != 0])])


@cache
def _hex_words() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Every 16-bit word in lower-case hexadecimal: digits [65536, 4], and which of them are written [65536, 4]."""
    words = np.arange(1 << 16, dtype=np.uint32)[:, None]
    nibbles = (words >> np.array([12, 8, 4, 0], np.uint32)) & 15
    written = words >= np.array([1 << 12, 1 << 8, 1 << 4, 0], np.uint32)
    return np.frombuffer(b"0123456789abcdef", np.uint8)[nibbles], written


def _zero_run(zero: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first longest run of two or more in `zero` [n, 8]: its beginning [n] and end [n]; 8 and 8 for none."""
    length = np.zeros(len(zero), np.int64)
    best, begin = np.ones(len(zero), np.int64), np.full(len(zero), 8, np.int64)
    for i in range(8):
        length = np.where(zero[:, i], length + 1, 0)
        longer = length > best
        best[longer], begin[longer] = length[longer], i + 1 - length[longer]
    return begin, np.where(begin < 8, begin + best, 8)


def _ipv6_names(addresses: npt.NDArray[np.uint8]) -> pa.Array:
    """RFC 5952 names [n] of n IPv6 addresses [n, 16].

    A word is ':' and up to four digits. The longest run of zeros is left out, but for '::' at its beginning; the word
    after it needs no ':' of its own, nor does the first.
    """
    if len(addresses) < VECTOR_FROM:
        wire = addresses.tobytes()
        return pa.array(
            [socket.inet_ntop(socket.AF_INET6, wire[i : i + 16]) for i in range(0, len(wire), 16)], pa.string()
        )
    digits, written = _hex_words()
    n = len(addresses)
    words = np.ascontiguousarray(addresses).view(">u2").astype(np.uint16)
    begin, end = _zero_run(words == 0)
    place = np.arange(8)
    text = np.full((n, 8, 6), ord(":"), np.uint8)
    keep = np.zeros((n, 8, 6), np.bool_)
    text[:, :, 2:], keep[:, :, 2:] = digits[words], written[words]
    keep[:, 1:, 1] = True
    keep[(place >= begin[:, None]) & (place < end[:, None])] = False
    has = np.flatnonzero(begin < 8)
    keep[has, begin[has], :2] = True
    after = has[end[has] < 8]
    keep[after, end[after], 1] = False
    offsets = np.zeros(n + 1, np.int32)
    np.cumsum(keep.sum(axis=(1, 2)), out=offsets[1:])
    return pa.Array.from_buffers(pa.string(), n, [None, pa.py_buffer(offsets), pa.py_buffer(text[keep])])


def _mapped(addresses: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which of `addresses` [n, 16], contiguous, are ::ffff:a.b.c.d [n]."""
    words = addresses.view("<u8").reshape(-1, 2)
    result: npt.NDArray[np.bool_] = (words[:, 0] == 0) & (
        (words[:, 1] & np.uint64(0xFFFFFFFF)) == np.uint64(0xFFFF0000)
    )
    return result


def format_addresses(addresses: npt.NDArray[np.uint8], ip_version: npt.NDArray[np.uint8]) -> pa.Array:
    """Names [n] of n addresses of 16 bytes [n, 16]; those of `ip_version` 4 are IPv4-mapped and come out dotted.

    IPv6 is written as RFC 5952 says.
    """
    v4 = ip_version == 4
    if v4.all():
        return _ipv4_names(addresses[:, 12:])
    # Those that begin with 80 zeros the C library writes with a dotted end (::ffff:192.0.2.1), as it has to be.
    low = ~v4 & (addresses[:, :10] == 0).all(axis=1)
    v6 = ~v4 & ~low
    lows = [socket.inet_ntop(socket.AF_INET6, address.tobytes()) for address in addresses[low]]
    parts = [_ipv4_names(addresses[v4][:, 12:]), _ipv6_names(addresses[v6]), pa.array(lows, pa.string())]
    names = pa.concat_arrays(parts)
    place = np.empty(len(addresses), np.int64)
    place[np.concatenate([np.flatnonzero(which) for which in (v4, v6, low)])] = np.arange(len(addresses))
    return names.take(pa.array(place))


def encode_addresses(addresses: npt.NDArray[np.uint8], ip_version: npt.NDArray[np.uint8]) -> pa.DictionaryArray:
    """`addresses` [n, 16] as dictionary<int32, string> [n] in order of first appearance.

    Mapped addresses that came in IPv6 packets stay apart from IPv4 ones: they are other hosts.
    """
    addresses = np.ascontiguousarray(addresses)
    n = len(addresses)
    mapped = _mapped(addresses)
    if mapped.all() and (ip_version == 4).all():
        # The common case: IPv4 only, and four bytes hash twice as fast as sixteen.
        words = np.ascontiguousarray(addresses.view("<u4")[:, 3])
        # Not `pa.array`, nor `to_numpy`: they import pandas where it is installed.
        encoded = pa.Array.from_buffers(pa.uint32(), n, [None, pa.py_buffer(words)]).dictionary_encode()
        distinct = encoded.dictionary
        octets = np.frombuffer(distinct.buffers()[1], np.uint8, 4 * len(distinct)).reshape(-1, 4)
        return pa.DictionaryArray.from_arrays(encoded.indices, _ipv4_names(octets))
    ambiguous = bool((mapped & (ip_version == 6)).any())
    keys = np.column_stack([addresses, ip_version]) if ambiguous else addresses
    width = keys.shape[1]
    flat = pa.Array.from_buffers(pa.binary(width), n, [None, pa.py_buffer(np.ascontiguousarray(keys))])
    encoded = flat.dictionary_encode()
    distinct = np.frombuffer(encoded.dictionary.buffers()[1], np.uint8, len(encoded.dictionary) * width)
    distinct = distinct.reshape(-1, width)
    forms = np.ascontiguousarray(distinct[:, :16])
    version = distinct[:, 16] if ambiguous else np.where(_mapped(forms), 4, 6).astype(np.uint8)
    return pa.DictionaryArray.from_arrays(encoded.indices, format_addresses(forms, version))
