"""What history says: terms of contacts, scores of flows, scores of hosts' windows."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from flowsage.graph import memory
from flowsage.graph.columns import Bool, Int64
from flowsage.graph.flows import Int32
from flowsage.models.terms import B_S, K_SS, TERMS, D
from flowsage.models.weights import CONSTANTS, Weights

Float64 = npt.NDArray[np.float64]

NAMES = (*TERMS, "V_rev", "V_fwd", "LLR", "Z", "Zc", "T", "V_log", "beat", "fail")
"""Terms of a flow, by name."""


@dataclass(frozen=True)
class ContactTerms:
    """What is known of each of c contacts (undirected: of its own way), f8[c], as of the windows before."""

    known: Float64
    """Earlier windows of (source, target, service); 0: a first meeting."""
    pair_known: Float64
    """Earlier windows of (source, target)."""
    service_known: Float64
    """Earlier windows of (source, service)."""
    C_ss: Float64
    """How unusual this service is for the source, nats."""
    sources: Float64
    """Distinct sources of (target, service) so far."""
    settled: Float64
    """How settled the clients of (target, service) are: −ln of the chance that the next answered (client, window) of it
    is of a new client, nats."""

    def __len__(self) -> int:
        return len(self.known)

    def some(self, part: slice) -> ContactTerms:
        """Of some of the contacts, as views."""
        return ContactTerms(*(getattr(self, f.name)[part] for f in fields(ContactTerms)))


L_KNOWN, L_PAIR, L_SERVICE, L_C_SS, L_SOURCES, L_SETTLED = range(len(fields(ContactTerms)))
"""Rows of the array that kernels fill for `ContactTerms`."""


@dataclass(frozen=True)
class HistoryScores:
    """Scores of a run: c contacts, n flows in the run's order, k windows of hosts."""

    known: Float64
    """[c] earlier windows of (source, target, service); 0: a first meeting."""
    flow_score: Float64
    """[n] max(S, 4 min(Zc − 4, B of es)), nats."""
    beacon_score: Float64
    """[n] Z + Zc."""
    host: Int32
    """[k] index into the run's hosts."""
    window: Int64
    """[k]"""
    score: Float64
    """[k] ¾ of the highest, ¼ of the mean of the distinct peers' highest flow scores."""
    parts: Parts | None = field(repr=False)
    """None where only the scores were kept."""
    looked: ContactTerms | None = field(default=None, repr=False)
    """[c] what `History.lookup` would have said of each contact just before its window, where that was asked for."""

    @cached_property
    def terms(self) -> dict[str, Float64]:
        """Every term of each flow f8[n], by name; S is "history". Made when asked for, none where none were kept."""
        return {} if self.parts is None else dict(zip((*NAMES, "history"), self.parts.table(), strict=True))


class Outputs(NamedTuple):
    """What the kernels write: of c contacts, n flows; directed ones are `ways` times as many (`key_levels.Run`)."""

    known: Float64
    """[c] earlier windows."""
    terms: Float64
    """[20, c·ways] `terms.TERMS`, or [20, 0]."""
    v_rev: Float64
    """[n·ways], and so on."""
    v_fwd: Float64
    llr: Float64
    z: Float64
    zc: Float64
    flow_score: Float64
    """[n]"""
    beacon_score: Float64
    looked: Float64
    """[6, c] by `L_KNOWN` and the others, or [6, 0]."""

    @classmethod
    def empty(cls, c: int, n: int, ways: int, *, terms: bool, looked: bool) -> Outputs:
        """Room for a run, with or without the terms of contacts, and what was known of them before.

        Sparse zeros where only what is not zero gets written, which is rare: most of it is never touched, and takes no
        memory. Volumes that nobody asks for are where the scores will be, which are made of them flow by flow.
        """
        known, lines = memory.empty(c, np.float64), memory.empty((len(TERMS), c * ways * terms), np.float64)
        v_rev, v_fwd = (memory.empty(n * ways, np.float64) for _ in range(2))
        flow_score, beacon_score = v_rev, v_fwd
        if terms or ways > 1:
            flow_score, beacon_score = (memory.empty(n, np.float64) for _ in range(2))
        llr, z, zc = (memory.sparse(n * ways, np.float64) for _ in range(3))
        before = memory.empty((len(fields(ContactTerms)), c * looked), np.float64)
        return cls(known, lines, v_rev, v_fwd, llr, z, zc, flow_score, beacon_score, before)

    def part(self, of_c: slice, of_f: slice, ways: int) -> Outputs:
        """Of some contacts and their flows: views, but for tables, which kernels want in one piece (`keep`)."""
        v, j = (slice(s.start * ways, s.stop * ways) for s in (of_c, of_f))
        return Outputs(
            self.known[of_c], _piece(self.terms[:, v]),
            self.v_rev[j], self.v_fwd[j], self.llr[j], self.z[j], self.zc[j],
            self.flow_score[of_f], self.beacon_score[of_f], _piece(self.looked[:, of_c]),
        )  # fmt: skip

    def keep(self, part: Outputs, of_c: slice, ways: int) -> None:
        """The tables of a part, back where they belong."""
        if len(part.known) < len(self.known) and self.terms.shape[1]:
            self.terms[:, of_c.start * ways : of_c.stop * ways] = part.terms
        if len(part.known) < len(self.known) and self.looked.shape[1]:
            self.looked[:, of_c] = part.looked


def _piece(view: Float64) -> Float64:
    return view if view.flags.c_contiguous else memory.empty(view.shape, np.float64)


@dataclass(frozen=True)
class Parts:
    """From which the terms of flows are made."""

    ways: int
    of_flow: Int32
    capped: Bool
    """[n] B_s, B_ss, K_ss are at most D."""
    failed: Bool
    out: Outputs
    weights: Weights

    def table(self) -> Float64:
        """Each term as a row f64[29, n], undirected the mean over both ways, and last "history": their weighted sum."""
        out, table = self.out, np.empty((len(NAMES) + 1, len(self.of_flow)))
        regular = np.log1p(np.maximum(0.0, out.llr - CONSTANTS.regular_above) / 10.0)
        little = np.maximum(0.0, np.log1p(out.v_rev) - out.v_rev / 3.0) * (self.weights.V_log != 0.0)
        beat = np.maximum(0.0, out.zc - CONSTANTS.beacon_floor) * (self.weights.beat != 0.0)
        own = out.v_rev, out.v_fwd, out.llr, out.z, out.zc, regular, little, beat
        _tabulate(self.ways, self.of_flow, self.capped, self.failed, out.terms, own, _weighted(self.weights), table)
        return table


@numba.njit(cache=True, nogil=True)
def _tabulate(ways, of_flow, capped, failed, terms, own, weights, table):  # type: ignore[no-untyped-def]
    """Terms of contacts f8[20, c·ways] and what is a flow's own, 8 of f8[n·ways] and whether it failed, to `table`."""
    count, last = len(TERMS), len(NAMES)
    for i in range(len(of_flow)):
        for way in range(ways):
            v, j = of_flow[i] * ways + way, i * ways + way
            limit = terms[D, v] if capped[i] else np.inf
            for k in range(count):
                value = min(terms[k, v], limit) if B_S <= k <= K_SS else terms[k, v]
                table[k, i] = value if way == 0 else (table[k, i] + value) / ways
            for k in range(len(own)):
                table[count + k, i] = own[k][j] if way == 0 else (table[count + k, i] + own[k][j]) / ways
        table[last - 1, i] = failed[i]
        total = 0.0
        for k in range(last):
            total += weights[k] * table[k, i]
        table[last, i] = total


@cache
def _weighted(weights: Weights) -> Float64:
    return np.array([getattr(weights, name, 0.0) for name in NAMES])
