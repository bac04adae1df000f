"""Calibration: from an excess to the probability that benign traffic shows one as large in a host-block.

For S > u, an analytic and an age group,

    p = (k + k0) / (N + N0) · (1 + (S − u) / (b0 + E))^−(a0 + k)

the posterior predictive of a Poisson rate of exceedances (prior k0 in N0 host-blocks) times that of an exponential
excess with a Gamma(a0, b0) prior on its rate (a Lomax tail). N counts *all* active host-blocks, not only those where
the analytic fired; k counts exceedance events, one that lasts over several blocks once, when it is over; E sums their
excess, winsorised, so that an attack that is never named cannot teach that the sky is the limit. What was raised is
left out of k and E.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from flowsage.models.analytics import HOST, IS_TARGET, KIND, SHARE, TABLE
from flowsage.models.prior import GROUPS

F8 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int64]

THRESHOLD = 0.5
"""u: an excess is looked at from here."""

N0, A0 = 400.0, 16.0
"""Prior strength: host-blocks behind the rate, exceedances behind the mean excess."""

WINSOR = 5.0
"""An exceedance counts at most this many mean excesses."""

USUAL = 10.0
"""Budget from which the smallest network may have its least number of findings a day."""

YOUNG = 0.1
"""Part of the budget that a sensor's first minutes have."""

UNTRIED = 0.1
"""Part of that for the first block, in which only other networks, by the prior, say what is rare."""

TOLERATED = 1.0, 2.0
"""Findings of an analytic that say nothing against its p-values, since attacks happen: so many at a budget of 1, and so
many more for each power of ten."""

ALIKE = 1.0
"""What was raised counts against an excess up to so many nats above its own."""

STEPS, STEP = 96, 0.25
"""Excesses of what was raised are counted in so many steps of so many nats."""

CROWD = 2000.0, 4.0, 0.125
"""Newcomers of a block count as so many at most, or so many for each host of the block that is none, or so large a part
of all that came before: what one flood of spoofed addresses does not do says little about what newcomers do."""

BRIDGE = 4
"""Exceedances of a host that are at most this many blocks apart are one event."""


DONE = -1.0
"""State of an event that goes on and will not be counted (again)."""


def _step(excess: float) -> int:
    """Step in which a finding of this excess counts: against all excesses up to `ALIKE` above it."""
    return min(STEPS - 1, int((excess + ALIKE) / STEP))


@numba.njit(cache=True, nogil=True)
def tail(excess, rate, shape, scale):  # type: ignore[no-untyped-def]
    """p of an excess S > u; rate = (k+k0)/(N+N0), shape = a0+k, scale = b0+E."""
    return min(1.0, rate * (1.0 + (excess - THRESHOLD) / scale) ** -shape)


@numba.njit(cache=True, nogil=True)
def _count(k, e, prior_b, a, g, excess, weight):  # type: ignore[no-untyped-def]
    """One exceedance event of this largest excess, winsorised, counted as `weight`."""
    most = WINSOR * (prior_b[a, g] + e[a, g]) / (A0 + k[a, g])
    k[a, g] += weight
    e[a, g] += weight * min(excess, most)


@numba.njit(cache=True, nogil=True)
def _flush(active, role, crowd, is_target, best, run, last, excluded, births, now, block, ages, k, e, prior_b, n):  # type: ignore[no-untyped-def]
    """End of a block for the hosts `active` in `role`: count it, and the exceedances in `best`, which is emptied.

    Newcomers count as `crowd` each.

    Nothing is written where nothing changes: what stays nought takes no memory.
    """
    analytics, groups = k.shape
    for host in active:
        age = now - births[host]
        weight = crowd if age < ages[0] else 1.0
        n[role, 0 if age < ages[0] else (1 if age < ages[1] else 2)] += weight
        fresh = block - last[host, role] > BRIDGE
        last[host, role] = block
        for a in range(analytics):
            if is_target[a] != (role == 1):
                continue
            for g in range(groups):
                excess = best[g][host, a] - THRESHOLD
                if best[g][host, a] != 0.0:
                    best[g][host, a] = 0.0
                before = event = run[g][host, a]
                # What goes on is not judged by itself: an event counts when it is over, except that of a new host or a
                # target, of whom many are never seen again. One that was named does not count at all.
                ended = fresh or excess <= 0.0
                if excluded[host, a] and not fresh:
                    event = DONE
                if ended and event > 0.0:
                    _count(k, e, prior_b, a, g, event, weight)
                if ended:
                    event = 0.0
                if excess > 0.0 and event >= 0.0 and not excluded[host, a]:
                    event = max(event, excess)
                    if g == 0 or role == 1:
                        _count(k, e, prior_b, a, g, event, weight)
                        event = DONE
                if event != before:
                    run[g][host, a] = event
            if excluded[host, a]:
                excluded[host, a] = False


@dataclass(frozen=True)
class Readiness:
    """Whether p-values carry yet, and if not, why. "Not ready" is a value of its own, never a p of 1."""

    ready: bool
    reason: str


class Calibration:
    """k, E [A, 4] by analytic and age group and N [2, 3] active host-blocks by role (source, target) and age of host.

    >>> c = Calibration()
    >>> c.readiness(blocks_needed=1, host_blocks_needed=10).reason
    'not ready: 0 of 1 blocks and 0 of 10 host-blocks of calibration seen'
    """

    def __init__(self) -> None:
        rates, means = (np.array([a.prior[i] for a in TABLE]) for i in (0, 1))
        self.prior_k: F8 = N0 * rates
        self.prior_b: F8 = A0 * means
        self.k: F8 = np.zeros((len(TABLE), len(GROUPS)))
        self.e: F8 = np.zeros((len(TABLE), len(GROUPS)))
        self.n: F8 = np.zeros((2, 3))
        self.raised: F8 = np.zeros((len(TABLE), STEPS))
        """Findings begun that nothing else bears out, by analytic and excess; they fade by half a week."""
        self.proven: F8 = np.zeros(len(TABLE))
        """Findings of each analytic that another family has borne out; they fade alike."""
        self.lately = 0.0
        """Active host-blocks of sources, which fade alike: what the budget is counted by."""
        self.hosts = 0
        """Host-blocks active in either role, a crowd of newcomers counted as in N."""
        self.blocks = 0
        """Blocks closed in which anything was active."""

    def host_blocks(self) -> F8:
        """Active host-blocks behind each analytic and age group [A, 4]."""
        role = IS_TARGET.astype(np.int64)
        new, young, old = self.n[role].T
        of_host = KIND == HOST
        return np.stack([new, young + old, np.where(of_host, young, young + old), old], 1)

    def parameters(self) -> tuple[F8, F8, F8]:
        """(rate, shape, scale), each [A, 4], for `tail`."""
        rate = (self.k + self.prior_k) / (self.host_blocks() + N0)
        return rate, A0 + self.k, self.prior_b + self.e

    def note(self, analytic: int, excess: float) -> None:
        """A finding has begun with this excess."""
        self.raised[analytic, _step(excess)] += 1.0

    def bear_out(self, analytic: int, excess: float) -> None:
        """What was noted as a finding with this excess has been borne out: it speaks for the analytic."""
        step = _step(excess)
        self.raised[analytic, step] = max(0.0, self.raised[analytic, step] - 1.0)
        self.proven[analytic] += 1.0

    def fade(self, weeks: float) -> None:
        """Time has passed."""
        self.raised *= 0.5**weeks
        self.proven *= 0.5**weeks
        self.lately *= 0.5**weeks

    def floors(self, budget: float, blocks_a_day: float) -> F8:
        """The least p [A, STEPS] of an excess in each step: the share of host-blocks in which as much was raised.

        What is raised is left out of k and E, lest attacks become normal. But attacks are rare: an analytic that keeps
        raising is wrong about what is rare here, and what it raised, beyond `TOLERATED` and its `SHARE` of the budget,
        which is what p-values that are right come to, is evidence of that. What analytics of another family bore out is
        none, and for each such finding one more is tolerated: who was right where others could tell is believed where
        they cannot.
        """
        tolerated = TOLERATED[0] + TOLERATED[1] * max(0.0, np.log10(budget)) + self.proven[:, None]
        tolerated = tolerated + SHARE[:, None] * budget / 100.0 / blocks_a_day * self.lately
        active = self.n.sum(1)[IS_TARGET.astype(np.int64)] + N0
        beyond: F8 = np.maximum(0.0, np.cumsum(self.raised[:, ::-1], 1)[:, ::-1] - tolerated)
        floors: F8 = beyond / active[:, None]
        return floors

    def p_value(self, analytic: int, group: int, excess: float) -> float:
        """p of one excess; 1 up to the threshold u."""
        rate, shape, scale = (float(v[analytic, group]) for v in self.parameters())
        return float(tail(excess, rate, shape, scale)) if excess > THRESHOLD else 1.0

    def flush(  # the arrays belong to `cells.Memory`
        self,
        active: tuple[I8, I8],
        best: tuple[npt.NDArray[np.float32], ...],
        run: tuple[npt.NDArray[np.float32], ...],
        last: I8,
        excluded: npt.NDArray[np.bool_],
        births: F8,
        now: float,
        block: int,
        ages: tuple[float, float],
    ) -> None:
        """A block has ended: count the `active` hosts by role, and their largest excesses, `best` [h, A] by group."""
        for role, hosts in enumerate(active):
            crowd, counted = self._crowd(now - births[hosts], ages[0], role)
            _flush(hosts, role, crowd, IS_TARGET, best, run, last, excluded, births, now, block, ages,
                   self.k, self.e, self.prior_b, self.n)  # fmt: skip
            if role == 0:
                self.lately += counted
        both = np.union1d(*active)
        self.hosts += round(self._crowd(now - births[both], ages[0], 1)[1])
        self.blocks += len(both) > 0

    def _crowd(self, ages: F8, hour: float, role: int) -> tuple[float, float]:
        """What each newcomer (younger than `hour`) among hosts of these ages counts, and what all of them come to."""
        fresh = int((ages < hour).sum())
        known = len(ages) - fresh
        least, each, part = CROWD
        crowd = min(1.0, max(least, each * known, part * float(self.n[role, 0])) / max(1, fresh))
        return crowd, known + crowd * fresh

    @property
    def seen(self) -> int:
        """Host-blocks of sources, on which p-values rest."""
        return int(self.n[0].sum())

    def readiness(self, blocks_needed: int, host_blocks_needed: int) -> Readiness:
        """Whether enough was seen, and a sentence that says how much."""
        seen = self.seen
        ready = self.blocks >= blocks_needed and seen >= host_blocks_needed
        if ready:
            return Readiness(True, f"ready, calibrated on {seen:,} host-blocks")
        parts = ((self.blocks, blocks_needed, "blocks"), (seen, host_blocks_needed, "host-blocks"))
        missing = " and ".join(f"{there} of {needed} {what}" for there, needed, what in parts if there < needed)
        return Readiness(False, f"not ready: {missing} of calibration seen")

    def blocks_left(self, blocks_needed: int, host_blocks_needed: int, active: int) -> int | None:
        """Blocks until it is ready, the one that goes on included, if those to come are as busy as those so far.

        active: sources of the block that goes on, which stand for all while it is the first. None: nothing is known.
        """
        each = self.seen / self.blocks if self.blocks else float(active)
        hosts = max(0, host_blocks_needed - self.seen)
        if hosts and not each:
            return None
        return max(0, blocks_needed - self.blocks, math.ceil(hosts / each) if hosts else 0)

    def grown(self, settled: float) -> float:
        """Part of the budget that is in force: what is first seen on the first day may happen every day, so it grows
        until `settled` blocks have been seen."""
        return max(YOUNG, min(1.0, self.blocks / settled if settled > 0 else 1.0))

    def allowed(
        self, budget: float, least: float, blocks_a_day: float, settled: float = 0.0, untried: int = 0
    ) -> float:
        """Largest p of a host in a block that keeps to `budget` false findings a day per 100 hosts that open flows.

        Hosts that are only spoken to can be named too, so they share that budget. A network may have `least` a day from
        a budget of `USUAL` on, and in proportion below; all of it grows (`grown`). In the first block, `untried` is how
        many hosts have opened flows so far; whom they open them to may be nobody, so as many others are taken to be
        there.
        """
        both = max(1.0, self.hosts / max(1, self.blocks))
        sources = max(1.0, float(self.n[0].sum()) / max(1, self.blocks))
        young = self.grown(settled)
        if untried:
            sources, both, young = float(untried), 2.0 * untried, YOUNG * UNTRIED
        return young * max(budget / 100.0 * sources, least * min(1.0, budget / USUAL)) / both / blocks_a_day

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """What was learnt, as arrays."""
        return {
            "k": self.k.copy(),
            "e": self.e.copy(),
            "n": self.n.copy(),
            "raised": self.raised.copy(),
            "proven": self.proven.copy(),
            "seen": np.array([self.blocks, self.hosts], np.int64),
            "lately": np.array(self.lately),
        }

    @classmethod
    def restore(cls, state: dict[str, npt.NDArray[np.generic]]) -> Calibration:
        """The calibration that `state` describes."""
        c = cls()
        c.k, c.e, c.n, c.raised, c.proven = (
            np.array(state[name], np.float64) for name in ("k", "e", "n", "raised", "proven")
        )
        c.blocks, c.hosts = (int(v) for v in state["seen"])
        c.lately = float(state["lately"])
        return c
