"""Flows to contacts: the distinct (window, source, destination, service) of a run of windows, with their sums.

Everything that learns counts in windows, not in flows, so this is the one place where flows become contacts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numba
import numpy as np
import numpy.typing as npt

from flowsage.graph import memory
from flowsage.graph.flows import Bool, FlowBatch, HostTable, Int32, Int64
from flowsage.graph.fold import fold, unpack
from flowsage.graph.services import LOGIN_PORTS, on_ports

Float64 = npt.NDArray[np.float64]

BRIEF_BYTES, BRIEF_PACKETS = 16_384.0, 64.0
"""Both ways, up to which a session says no more than passwords that are refused: keys are exchanged, and a few attempts
made. One that says r times as much, or has somebody typing in it, counts 1/r²."""


@dataclass(frozen=True)
class Contacts:
    """Distinct (window, src, dst, service) of a run of windows.

    c contacts, sorted by window and within a window by first flow; n flows; w distinct windows.
    """

    hosts: HostTable
    window: Int64
    """[c] start_ns // window_ns."""
    src: Int32
    """[c] index into `hosts`."""
    dst: Int32
    service: Int32
    """[c] `service_code`."""
    flows: Int32
    """[c] number of flows, and of those answered, and failed."""
    answered: Int32
    failed: Int32
    packets_fwd: Int64
    """[c] sums; what is unknown counts as 0."""
    packets_rev: Int64
    bytes_fwd: Int64
    bytes_rev: Int64
    first_ns: Int64
    """[c] start of the first flow."""
    last_ns: Int64
    """[c] latest end of a flow."""
    kept: Bool
    """[c] one flow was answered, or it is not TCP."""
    told: Bool
    """[c] of one flow it is known whether something came back."""
    tries: Float64
    """[c] how many sessions at a service that asks for a password look like no more than a try (`BRIEF_BYTES`). Only
    those in which something was said, and whose opening is in the record; 0 for other services."""
    of_flow: Int32
    """[n] contact of each flow of the run."""
    offsets: Int64
    """[w + 1] contacts offsets[k]:offsets[k + 1] are those of the k-th window."""
    windows: Int64
    """[w] index of each distinct window, ascending."""
    flow_offsets: Int64
    """[w + 1] flows flow_offsets[k]:flow_offsets[k + 1] are those of the k-th window."""

    def __len__(self) -> int:
        return len(self.src)

    def slice(self, k: int) -> Contacts:
        """The contacts of the k-th window (0 <= k < w), as views; `of_flow` counts from its first contact."""
        if not 0 <= k < len(self.windows):
            raise IndexError(f"window {k} of a run of {len(self.windows)}")
        if len(self.windows) == 1:
            return self
        a, b = int(self.offsets[k]), int(self.offsets[k + 1])
        f, g = int(self.flow_offsets[k]), int(self.flow_offsets[k + 1])
        return Contacts(
            hosts=self.hosts,
            **{name: getattr(self, name)[a:b] for name in _PER_CONTACT},
            of_flow=self.of_flow[f:g] - np.int32(a),
            offsets=np.array([0, b - a], np.int64),
            windows=self.windows[k : k + 1],
            flow_offsets=np.array([0, g - f], np.int64),
        )

    def some(self, begin: int, end: int) -> Contacts:
        """Contacts begin to end of a run of one window, as views, without their flows."""
        return Contacts(
            hosts=self.hosts,
            **{name: getattr(self, name)[begin:end] for name in _PER_CONTACT},
            of_flow=self.of_flow[:0],
            offsets=np.array([0, end - begin], np.int64),
            windows=self.windows,
            flow_offsets=np.array([0, 0], np.int64),
        )


_PER_CONTACT = tuple(
    f.name for f in fields(Contacts) if f.name not in ("hosts", "of_flow", "offsets", "windows", "flow_offsets")
)


@numba.njit(cache=True, nogil=True)
def _count_tries(service, failed, continued, pf, pr, bf, br, of_flow, tries):  # type: ignore[no-untyped-def]
    """Adds up `Contacts.tries`; continued bool[n], or bool[0] where nothing is known of it."""
    for i in range(len(service)):
        if not on_ports(service[i], LOGIN_PORTS):
            continue
        spoken = (pf[i] < 0 or pf[i] > 2) and (pr[i] < 0 or pr[i] > 1)  # more than an opening
        if spoken and not failed[i] and not (len(continued) and continued[i]):
            packets, said = max(pf[i], 0.0) + max(pr[i], 0.0), max(bf[i], 0.0) + max(br[i], 0.0)
            tries[of_flow[i]] += max(1.0, packets / BRIEF_PACKETS, said / BRIEF_BYTES) ** -2.0


def contacts(flows: FlowBatch, window_ns: int) -> Contacts:
    """Contacts of flows that are ordered by start_ns; a window is start_ns // window_ns.

    Deterministic, and the same for a window however windows are cut into calls, but for indices into `hosts`.
    Raises ValueError where times go backwards or window_ns is not positive.
    """
    if window_ns <= 0:
        raise ValueError(f"window_ns is {window_ns}, expected a positive number of nanoseconds")
    folded = fold(flows, window_ns)
    c, windows, offsets = folded.contacts, folded.windows, folded.offsets
    src, dst, service = memory.empty(c, np.int32), memory.empty(c, np.int32), memory.empty(c, np.int32)
    count, answered, failed = memory.empty(c, np.int32), memory.empty(c, np.int32), memory.empty(c, np.int32)
    packets_fwd, packets_rev = memory.empty(c, np.int64), memory.empty(c, np.int64)
    bytes_fwd, bytes_rev = memory.empty(c, np.int64), memory.empty(c, np.int64)
    of_contact, last, kept, told = (
        memory.empty(c, np.int64),
        memory.empty(c, np.int64),
        memory.empty(c, np.bool_),
        memory.empty(c, np.bool_),
    )
    unpack(
        folded.rows, windows, offsets, of_contact, src, dst, service, count, answered, failed,
        packets_fwd, packets_rev, bytes_fwd, bytes_rev, last, kept, told,
    )  # fmt: skip
    tries = np.zeros(c)  # mostly nought, and what is nought takes no memory
    continued = flows.detail.continued if flows.detail is not None else np.empty(0, np.bool_)
    _count_tries(
        flows.service, flows.failed, continued,
        flows.packets_fwd, flows.packets_rev, flows.bytes_fwd, flows.bytes_rev, folded.of_flow, tries,
    )  # fmt: skip
    return Contacts(
        flows.hosts, of_contact, src, dst, service, count, answered, failed,
        packets_fwd, packets_rev, bytes_fwd, bytes_rev, folded.first[:c].copy(), last, kept, told, tries,
        folded.of_flow, offsets, windows, folded.flow_offsets,
    )  # fmt: skip
