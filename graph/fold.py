"""Folding: each flow finds its contact, and leaves its sums there.

One pass in compiled code: a small hash table finds the contact of each flow, and a row of 64 bytes (one cache line)
takes its sums. The table is never cleared between windows: an entry carries the epoch it was written in, and an older
one is empty.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numba
import numpy as np

from flowsage.graph import memory
from flowsage.graph.flows import FlowBatch, Int32, Int64, UInt64
from flowsage.graph.prefetch import prefetch
from flowsage.graph.services import TCP, protocol_of

_TABLE, _ROWS = 1 << 10, 1 << 9
_KEEP_ROWS = 1 << 18
"""Scratch for up to this many contacts (16 MiB) is kept for the next call; more is given back."""


class Folded(NamedTuple):
    """c contacts of w windows and n flows, as `build.Contacts` says; rows and first hold until the thread's next."""

    contacts: int
    rows: Int64
    """[≥ c, 8] for `unpack`."""
    first: Int64
    """[≥ c]"""
    of_flow: Int32
    """[n]"""
    windows: Int64
    """[w]"""
    offsets: Int64
    """[w + 1]"""
    flow_offsets: Int64
    """[w + 1]"""


@numba.njit(cache=True, nogil=True, inline="always")
def _hash(pair: np.int64, service: np.int64) -> np.uint64:
    h = (np.uint64(pair) ^ (np.uint64(service) * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xFF51AFD7ED558CCD)
    h ^= h >> np.uint64(32)
    h *= np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(29))


# Where a call of _add stands, so that it can stop for more memory and go on.
_FLOW, _CONTACT, _WINDOW, _BEGIN, _MASK, _EPOCH, _STATUS = range(7)
_DONE, _MORE_ROWS, _MORE_TABLE, _NOT_ORDERED = range(4)
_AHEAD = 12
_LAST_EPOCH = 0xFFFFFF


@numba.njit(cache=True, nogil=True)
def _add(  # type: ignore[no-untyped-def]
    state, window_ns, start, end, src, dst, service, pf, pr, bf, br, answered, failed, told,
    table, rows, of_flow, first, windows, offsets, flow_offsets,
):  # fmt: skip
    """Give each flow its contact and add it there; stops where memory is short (see `_STATUS`).

    table u64[2^k]: epoch (24 bits) | tag of the hash (8) | contact (32). rows i64[., 8]: source and destination;
    service and flows; told, answered and failed; four sums; latest end. first i64[.]: start of the first flow.
    """
    n = len(start)
    c, w, begin, mask, epoch = state[_CONTACT], state[_WINDOW], state[_BEGIN], np.uint64(state[_MASK]), state[_EPOCH]
    status = _DONE
    i = state[_FLOW]
    current = windows[w - 1] if w > 0 else np.int64(0)
    upper = (current + 1) * window_ns
    while i < n:
        t = start[i]
        if w == 0 or t >= upper:
            if w == len(windows):
                status = _NOT_ORDERED
                break
            current = t // window_ns
            upper = (current + 1) * window_ns
            windows[w] = current
            offsets[w] = c
            flow_offsets[w] = i
            w += 1
            begin = c
            mask = np.uint64(255)
            epoch += 1
        elif t < start[i - 1]:
            status = _NOT_ORDERED
            break
        # Room for one contact more, before anything is changed: at most half of the table is in use.
        if c == len(rows):
            status = _MORE_ROWS
            break
        if np.uint64(2 * (c - begin) + 2) > mask:
            if 4 * (mask + np.uint64(1)) > np.uint64(len(table)):
                status = _MORE_TABLE
                break
            mask = mask * np.uint64(4) + np.uint64(3)
            epoch += 1
            rehash = True
        else:
            rehash = False
        if epoch >= _LAST_EPOCH:
            table[:] = 0
            epoch = 1
            rehash = True
        if rehash:
            for j in range(begin, c):
                h = _hash(rows[j, 0], rows[j, 1] >> 32)
                slot = h & mask
                while (table[slot] >> np.uint64(40)) == np.uint64(epoch):
                    slot = (slot + np.uint64(1)) & mask
                stamp = (np.uint64(epoch) << np.uint64(8)) | (h >> np.uint64(56))
                table[slot] = (stamp << np.uint64(32)) | np.uint64(j)
        # What later flows will touch: their slot of the table, and then the row that the slot names.
        if mask > np.uint64(4095) and i + 2 * _AHEAD < n:
            q = i + 2 * _AHEAD
            h = _hash((np.int64(src[q]) << 32) | np.int64(dst[q]), np.int64(service[q]))
            prefetch(table, np.int64(h & mask))
            q = i + _AHEAD
            h = _hash((np.int64(src[q]) << 32) | np.int64(dst[q]), np.int64(service[q]))
            prefetch(rows, min(np.int64(table[h & mask] & np.uint64(0xFFFFFFFF)), c))
        pair = (np.int64(src[i]) << 32) | np.int64(dst[i])
        svc = np.int64(service[i])
        h = _hash(pair, svc)
        stamp = (np.uint64(epoch) << np.uint64(8)) | (h >> np.uint64(56))
        slot = h & mask
        k: Any = np.int64(-1)
        while True:
            entry = table[slot]
            if (entry >> np.uint64(40)) != np.uint64(epoch):
                break
            if (entry >> np.uint64(32)) == stamp:
                found = np.int64(entry & np.uint64(0xFFFFFFFF))
                if rows[found, 0] == pair and (rows[found, 1] >> 32) == svc:
                    k = found
                    break
            slot = (slot + np.uint64(1)) & mask
        if k < 0:
            k = c
            c += 1
            table[slot] = (stamp << np.uint64(32)) | np.uint64(k)
            first[k] = t
            rows[k, 0] = pair
            rows[k, 1] = svc << 32
            for column in range(2, 7):
                rows[k, column] = 0
            rows[k, 7] = end[i]
        of_flow[i] = k
        rows[k, 1] += 1
        counted = rows[k, 2] + (np.int64(answered[i]) << 32) + np.int64(failed[i])
        rows[k, 2] = counted | (np.int64(told[i]) << 62)
        rows[k, 3] += max(pf[i], 0)
        rows[k, 4] += max(pr[i], 0)
        rows[k, 5] += max(bf[i], 0)
        rows[k, 6] += max(br[i], 0)
        rows[k, 7] = max(rows[k, 7], end[i])
        i += 1
    offsets[w] = c
    flow_offsets[w] = i
    state[_FLOW], state[_CONTACT], state[_WINDOW], state[_BEGIN], state[_EPOCH] = i, c, w, begin, epoch
    state[_MASK] = np.int64(mask)
    state[_STATUS] = status


@numba.njit(cache=True, nogil=True)
def unpack(  # type: ignore[no-untyped-def]
    rows, windows, offsets, window, src, dst, service, flows, answered, failed, pf, pr, bf, br, last, kept, told
):
    """`Folded.rows` as the columns of `Contacts`."""
    low32 = np.int64(0xFFFFFFFF)
    for k in range(len(windows)):
        window[offsets[k] : offsets[k + 1]] = windows[k]
    for j in range(len(src)):
        src[j] = rows[j, 0] >> 32
        dst[j] = rows[j, 0] & low32
        svc = rows[j, 1] >> 32
        service[j] = svc
        flows[j] = rows[j, 1] & low32
        replies = (rows[j, 2] >> 32) & 0x3FFFFFFF
        answered[j] = replies
        failed[j] = rows[j, 2] & low32
        pf[j], pr[j], bf[j], br[j], last[j] = rows[j, 3], rows[j, 4], rows[j, 5], rows[j, 6], rows[j, 7]
        told[j] = (rows[j, 2] >> 62) & 1
        kept[j] = replies > 0 or protocol_of(svc) != TCP


class _Scratch(threading.local):
    """Table and rows that calls of one thread reuse."""

    def __init__(self) -> None:
        self.fresh()

    def fresh(self) -> None:
        self.table: UInt64 = memory.zeros(_TABLE, np.uint64)
        self.rows: Int64 = memory.empty((_ROWS, 8), np.int64)
        self.first: Int64 = memory.empty(_ROWS, np.int64)
        self.epoch = 0

    def keep(self, table: UInt64, rows: Int64, first: Int64, epoch: int) -> None:
        """What a call leaves. The epoch belongs to the table: an entry of a later epoch would pass for a live one."""
        if len(rows) > _KEEP_ROWS:
            self.fresh()
        else:
            self.table, self.rows, self.first, self.epoch = table, rows, first, epoch


_scratch = _Scratch()


def fold(flows: FlowBatch, window_ns: int) -> Folded:
    """The contacts of flows that are ordered by start_ns. Raises ValueError where times go backwards."""
    s, n = _scratch, len(flows)
    span = int(flows.start_ns[-1]) // window_ns - int(flows.start_ns[0]) // window_ns + 1 if n else 0
    room = max(0, min(span, n))
    windows, offsets, flow_offsets = (memory.empty(room + k, np.int64) for k in (0, 1, 1))
    of_flow = memory.empty(n, np.int32)
    table, rows, first = s.table, s.rows, s.first
    state = np.array([0, 0, 0, 0, 255, s.epoch, _DONE], np.int64)
    while True:
        _add(
            state, window_ns, flows.start_ns, flows.end_ns, flows.src, flows.dst, flows.service,
            flows.packets_fwd, flows.packets_rev, flows.bytes_fwd, flows.bytes_rev,
            flows.answered, flows.failed, flows.told, table, rows, of_flow, first, windows, offsets, flow_offsets,
        )  # fmt: skip
        if state[_STATUS] == _MORE_ROWS:
            # Allocated here and not in the kernel: NumPy asks for huge pages, which rows touched at random need.
            held, wanted = len(rows), max(2 * len(rows), min(n // 4, 8 * len(rows)))
            rows, first = _longer(rows, held, wanted), _longer(first, held, wanted)
        elif state[_STATUS] == _MORE_TABLE:
            table = memory.zeros(4 * len(table), np.uint64)
            state[_EPOCH] = 0
        else:
            break
    s.keep(table, rows, first, int(state[_EPOCH]))
    if state[_STATUS] == _NOT_ORDERED:
        raise ValueError("flows are not in time order; sort them by start_ns, as WindowBuffer hands them over")
    c, w = int(state[_CONTACT]), int(state[_WINDOW])
    return Folded(c, rows, first, of_flow, windows[:w], offsets[: w + 1], flow_offsets[: w + 1])


def _longer(array: Int64, held: int, length: int) -> Int64:
    longer = memory.empty((length, *array.shape[1:]), np.int64)
    longer[:held] = array[:held]
    return longer
