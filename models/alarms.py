"""Alarms: analytics over what arrives, calibrated, within a budget of false findings that the operator sets.

`Alarms.step` takes the contacts of one pane and returns the findings that it created, updated or closed. Every record
enters once, when it arrives; nothing said is taken back; the same steps give the same findings.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from flowsage.collector.errors import ConfigurationError
from flowsage.graph.addresses import PRIVATE, Internal
from flowsage.graph.build import Contacts
from flowsage.graph.flows import UInt64
from flowsage.models import analytics as an
from flowsage.models import beacon, levels, uploads
from flowsage.models.alarm_config import AlarmConfig
from flowsage.models.calibration import Calibration, Readiness
from flowsage.models.cells import PAST, Memory, Store, by_group
from flowsage.models.episodes import QUIET, Episodes, Offer
from flowsage.models.finding import Evidence, Finding
from flowsage.models.history_scores import ContactTerms
from flowsage.models.judgement import judge, take_smallest
from flowsage.models.reasons import Asked, Log, Reasons

__all__ = ["AlarmConfig", "Alarms", "Evidence", "Finding"]

Array = npt.NDArray[Any]
_First = TypeVar("_First")
_Second = TypeVar("_Second")

GRANDFATHERED = 30 * an.MINUTE
"""A beat that was there before this much of the stream, or of its source's life, is how they are."""

THREADED = 1 << 14
"""Contacts of a pane from which a second thread is worth its while."""

PIECE = 1 << 19
"""Contacts of a pane that are looked at together: bounds the memory of a flood."""

VERSION = 10

_BEST, _RUN = by_group("best"), by_group("run")


class Alarms:
    """The alarms' memory, calibration and episodes. Steps must come in the order of their times."""

    def __init__(self, config: AlarmConfig | None = None) -> None:
        self.config = c = config or AlarmConfig()
        self.memory = Memory()
        self.calibration = Calibration()
        self.episodes = Episodes(c.time_scale)
        self.steps = 0
        self.contacts_seen = 0
        self._block_ns = max(1, int(c.block_ns / c.time_scale))
        self._blocks_a_day = an.DAY * 1e9 / c.block_ns
        self._origin_ns: int | None = None
        self._now = -1.0
        self._block = -1
        self._ready_at = -1.0
        self._open = an.EARLY
        self._active: tuple[list[Array], list[Array]] = ([], [])
        self._log = Log.empty(c.log)
        self._tau = np.where(an.TAU > 0, an.TAU / c.time_scale, 0.0)
        self._span = np.maximum(self._block_ns / 1e9, self._tau)
        self._fade = np.log(2.0) / (an.HABIT / c.time_scale)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="alarms")
        self.witness: Asked | None = None
        """Asked about the first meetings that a finding shows."""
        self.internal = Internal(PRIVATE if c.internal is None else c.internal)
        self._judge_by_what_was_seen()

    def readiness(self) -> Readiness:
        """Whether alarms are raised yet, and why not."""
        return self.calibration.readiness(self.config.ready_blocks, self.config.ready_host_blocks)

    @property
    def expected_ns(self) -> int | None:
        """When they are likely to be ready; None: they are, or nobody knows."""
        c, active = self.config, sum(map(len, self._active[0]))
        left = self.calibration.blocks_left(c.ready_blocks, c.ready_host_blocks, active)
        return (self._block + left) * self._block_ns if left and self._block >= 0 else None

    @property
    def grown(self) -> float:
        """Part of the budget that is in force, 0 to 1."""
        return self.calibration.grown(self.config.settle_ns / self.config.block_ns)

    @property
    def tried(self) -> bool:
        """Whether a block of this network has been seen; before, only what is in `analytics.FIRST` is raised."""
        return self._now >= self._block_ns / 1e9 and self.calibration.blocks >= 1

    @property
    def allowed(self) -> float:
        """The largest p of a host in a block that is raised."""
        c, untried = self.config, 0 if self.tried else max(1, sum(map(len, self._active[0])))
        settled = c.settle_ns / c.block_ns
        return self.calibration.allowed(c.budget, c.least_a_day, self._blocks_a_day, settled, untried)

    def step(self, now_ns: int, contacts: Contacts, looked: ContactTerms, misplaced: Array) -> list[Finding]:
        """Findings created, updated or closed by the c contacts that arrived until `now_ns` (ns, the end of the pane).

        misplaced f8[c]: how much first meetings are out of place, 0 to 1 (NaN: not asked, or not ready).
        """
        if self._origin_ns is None:
            self._origin_ns = (now_ns - 1) // self.config.pane_ns * self.config.pane_ns
        block = (now_ns - 1) // self._block_ns
        if block > self._block:
            self._roll(block)
        self.steps += 1
        self.contacts_seen += len(contacts)
        told: list[Finding] = []
        if len(contacts) <= PIECE:
            told += self._look(now_ns, contacts, looked, misplaced)
        else:
            for begin in range(0, len(contacts), PIECE):
                part = slice(begin, begin + PIECE)
                told += self._look(now_ns, contacts.some(begin, part.stop), looked.some(part), misplaced[part])
        return told + self.episodes.close(now_ns)

    def _look(self, now_ns: int, contacts: Contacts, looked: ContactTerms, misplaced: Array) -> list[Finding]:
        """Findings created or updated by contacts of a pane, no more than a `PIECE` of them."""
        assert self._origin_ns is not None
        # Two looks at one time would be one touch: the later one counts as a moment later.
        self._now = now = max((now_ns - self._origin_ns) / 1e9, self._now + 1e-6)
        if not len(contacts):
            return []
        if self.memory.crowded(self.config.max_keys):
            self._forget()
        found, values = self._measure(now, contacts, looked, np.ascontiguousarray(misplaced, np.float64))
        if not len(found):
            return []
        told = self.episodes.offer(now_ns, self._offers(contacts, found, values), self.allowed)
        self._note(self.episodes)
        return told

    def _note(self, e: Episodes) -> None:
        """Findings that have begun count against their analytics' p-values, until another family bears them out."""
        for o in e.begun:
            self.calibration.note(o.analytic, o.excess)
        for analytic, excess in e.borne_out:
            self.calibration.bear_out(analytic, excess)
        if e.begun or e.borne_out:
            self._judge_by_what_was_seen()

    def _judge_by_what_was_seen(self) -> None:
        """Take the parameters and floors of p from the calibration as it is now."""
        self._parameters = self.calibration.parameters()
        self._floors = self.calibration.floors(self.config.budget, self._blocks_a_day)

    def take_p_values(self, hosts: UInt64) -> Array:
        """The smallest p f8[n] of each host (hashes u64[n]) in any pane since this was last asked; NaN: not ready."""
        smallest = self.memory.hosts.arrays["smallest"]
        slots = self.memory.hosts.table.find(hosts)
        p = np.empty(len(hosts))
        take_smallest(slots, smallest, p)
        if self._ready_at < 0:
            p[:] = np.nan
        return p

    def _roll(self, block: int) -> None:
        """A block has ended (or several, of which all but one were empty)."""
        if self._block >= 0:
            empty = np.empty(0, np.int64)
            active = tuple(np.concatenate(a) if a else empty for a in self._active)
            h, scale = self.memory.hosts.arrays, self.config.time_scale
            self.calibration.flush(
                (active[0], active[1]), tuple(h[name] for name in _BEST),
                tuple(h[name] for name in _RUN), h["last"], h["excluded"], h["born"], self._now,
                self._block, (an.HOUR / scale, an.DAY / scale),
            )  # fmt: skip
            causes, sources = h["causes"], active[0]  # nobody else has any
            causes[sources[causes[sources].any(1)]] = 0.0  # what is nought stays unwritten, and takes no memory
            self._forget()
            self.calibration.fade((block - self._block) * self._block_ns / 1e9 / (an.WEEK / self.config.time_scale))
        self._block, self._active = block, ([], [])
        self._judge_by_what_was_seen()
        if self._ready_at < 0 and self.readiness().ready:
            self._ready_at = self._now
        self._open = an.EARLY | (self._ready_at >= 0)

    def _forget(self) -> None:
        """Keep to `max_keys`, between looks when nobody holds a slot but the log and the list of who is active."""
        moved = self.memory.forget(self.config.max_keys)
        if moved is not None:
            self._log.follow(moved)
            for parts in self._active:
                parts[:] = (at[at >= 0] for at in [moved[part].astype(np.int64) for part in parts])

    def _measure(self, now: float, c: Contacts, looked: ContactTerms, misplaced: Array) -> tuple[Array, Array]:
        """Raise every level and judge it: found i64[·, 5], values f8[·, 4] as `judgement.judge` writes them."""
        n, m, config = len(c), self.memory, self.config
        service, told = np.ascontiguousarray(c.service), np.ascontiguousarray(c.told)
        slots, keys, before = np.empty((6, n), np.int32), np.empty((6, n), np.uint64), len(m.hosts.table)
        levels.all_keys(c.hosts.hash, c.src, c.dst, service, keys)
        stores = m.hosts, m.services, m.pairs, m.contacts, m.codes
        into, of = ([both[:2].reshape(-1), *both[2:]] for both in (slots, keys))

        def find(*which: int) -> None:
            Store.slots_each([stores[k] for k in which], [of[k] for k in which], [into[k] for k in which], self._block)

        if n < THREADED:
            find(*range(len(stores)))
        else:
            self._both(n, lambda: find(0, 1, 4), lambda: find(2, 3))
        h = m.hosts.arrays
        if len(m.hosts.table) > before:
            h["born"][before : len(m.hosts.table)] = now
            m.name_hosts(before, slots[:2], c, self.internal)
        born = (m.contacts.arrays["born"], m.pairs.arrays["born"], m.services.arrays["born"])
        cells = tuple(s.arrays["cells"].reshape(-1) for s in stores[:4])
        past = tuple(s.arrays["past"].reshape(-1, PAST) for s in stores[:4])
        best = tuple(h[name] for name in _BEST)
        known, counts, sent = np.empty((3, n), np.bool_), np.empty((3, n), np.int32), np.empty(n, np.int64)
        levels.facts(
            looked.known, looked.pair_known, looked.service_known, c.flows, c.answered, c.failed,
            c.bytes_fwd, c.bytes_rev, known, counts, sent,
        )  # fmt: skip
        fresh, active = np.empty((n, 3), np.bool_), np.empty((2, n), np.int64)
        shared, surprise = (np.ascontiguousarray(v, np.float64) for v in (looked.sources, looked.C_ss))

        def register() -> int:
            sources, targets, news = levels.register(
                slots, counts[2], known, h["born"], born, h["active"], now, self._block, fresh, active
            )
            self._active[0].append(active[0, :sources].copy())  # of much room little is taken
            self._active[1].append(active[1, :targets].copy())
            return int(news)

        news, strength = self._both(n, register, lambda: self._beats(c, slots, looked))
        # Who logs in by the clock is a program; whether its beat is a beacon's is asked elsewhere.
        tries = np.where(m.contacts.arrays["beat"][slots[4], beacon.REGULAR] > 0.0, 0.0, c.tries)
        what = service, counts, told, sent, tries, shared, fresh, surprise, misplaced
        levels.remember(
            slots, *what, c.first_ns, c.last_ns, h["inside"], now, news, self._log.inc, self._log.meta, self._log.at,
        )  # fmt: skip
        scale, step, kinds = config.time_scale, self._block_ns / 1e9, (an.COLUMN, an.KIND, an.WIDTH)
        usual = uploads.usual(
            slots, sent, shared, cells[2], past[2], h["inside"], h["born"], h["received"], h["received_past"],
            self._tau[an.DRIP], self._span[an.DRIP], step, self._fade[an.DRIP], now,
        )  # fmt: skip
        allowed, open_ = self.allowed, self._open if self.tried else self._open & an.FIRST

        def judged(part: int, parts: int) -> tuple[Array, Array]:
            touched = np.empty((n * levels.A + n, 3), np.int32)
            raised = levels.raise_levels(
                part, parts, slots, *what, usual, cells, past, h["born"], h["inside"], h["record"],
                self._tau, self._span, step, *kinds, an.IS_TARGET, self._fade, now, touched,
            )  # fmt: skip
            raised = levels.set_statistic(
                part, parts, slots[0], cells[3], slots[4], strength, an.BEACON, 1, 0, now, touched, raised
            )
            found, values = np.empty((raised + n, 5), np.int64), np.empty((raised + n, 4))
            count = judge(
                touched, raised, slots, service, cells, past, h["born"], born, h["record"], *self._parameters,
                self._floors, self._tau, self._span, step, *kinds, an.FAMILY, an.IS_TARGET,
                np.arange(levels.A) == an.BEACON, an.LEARNS, an.LEAST, an.SHARE, an.JOINT, open_, best, h["causes"],
                h["excluded"], h["smallest"], self._fade, now, an.HOUR / scale, an.DAY / scale, QUIET / scale, allowed,
                found, values,
            )  # fmt: skip
            return found[:count], values[:count]

        if n < THREADED:
            return judged(0, 1)
        mine, theirs = self._both(n, lambda: judged(0, 2), lambda: judged(1, 2))
        return np.concatenate((mine[0], theirs[0])), np.concatenate((mine[1], theirs[1]))

    def _both(self, size: int, first: Callable[[], _First], second: Callable[[], _Second]) -> tuple[_First, _Second]:
        """Two things that do not depend on each other: at once where that is worth a second thread."""
        if size < THREADED:
            return first(), second()
        other = self._thread.submit(second)
        return first(), other.result()

    def _beats(self, c: Contacts, slots: Array, looked: ContactTerms) -> Array:
        """Strength f8[c] of the beat of each contact's key, after the pane's contacts."""
        m, scale = self.memory, self.config.time_scale
        assert self._origin_ns is not None
        strength = np.empty(len(c))
        settled = max(GRANDFATHERED / scale, self._ready_at if self._ready_at >= 0 else np.inf)
        beacon.beats(
            slots[4], slots[5], (c.first_ns - self._origin_ns) / 1e9, np.log1p(c.bytes_fwd / c.flows),
            np.ascontiguousarray(looked.sources, np.float64), m.contacts.arrays["visits"],
            m.contacts.arrays["beat"], m.codes.arrays["tally"],
            m.contacts.arrays["born"], np.maximum(settled, m.hosts.arrays["born"][slots[0]] + GRANDFATHERED / scale),
            scale, strength,
        )  # fmt: skip
        return strength

    def _offers(self, c: Contacts, found: Array, values: Array) -> list[Offer]:
        """The smallest p of each host and analytic, as offers to the episodes."""
        order = np.lexsort((found[:, 2], values[:, 3], found[:, 0], found[:, 4]))
        found, values = found[order], values[order]
        first = np.r_[True, (np.diff(found[:, [4, 0]], axis=0) != 0).any(1)]
        names = self.memory.hosts.arrays["name"]
        assert self._origin_ns is not None
        reasons = Reasons(
            self.memory, self._log, self._origin_ns, self._now, self._block_ns / 1e9, self._tau,
            self._span, self._fade, self.witness,
        )  # fmt: skip
        offers = []
        for (a, row, contact, _, host), (excess, x, record, p) in zip(found[first], values[first], strict=True):
            why = reasons.of(c, int(a), int(row), int(contact), x, record)
            key = f"{c.hosts.hash[c.dst[contact]]:x}" if an.KIND[a] >= an.PAIR else ""
            about = key + (f"/{c.service[contact]}" if an.KIND[a] in (an.SERVICE, an.CONTACT) else "")
            host_name, tau = str(names[host]), float(self._tau[a])
            offers.append(Offer(host_name, int(a), float(p), why, float(excess), float(x), tau, about))
        return offers

    def host_name(self, host: int) -> str | None:
        """Name of the host with this hash, None where it is not remembered."""
        slot = int(self.memory.hosts.table.find(np.array([host], np.uint64))[0])
        return str(self.memory.hosts.arrays["name"][slot]) if slot >= 0 else None

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """(arrays, values for JSON): all that goes on. `restore` goes on bit for bit."""
        arrays = {f"memory/{k}": v for k, v in self.memory.state().items()}
        arrays |= {f"calibration/{k}": v for k, v in self.calibration.state().items()}
        arrays |= {f"log/{k}": v.copy() for k, v in self._log._asdict().items()}
        for role, parts in enumerate(self._active):
            arrays[f"active/{role}"] = np.concatenate(parts) if parts else np.empty(0, np.int64)
        values = {
            "version": VERSION, "origin_ns": self._origin_ns, "now": self._now, "block": self._block,
            "ready_at": self._ready_at, "steps": self.steps, "contacts_seen": self.contacts_seen,
            "episodes": self.episodes.state(),
        }  # fmt: skip
        return arrays, values

    @classmethod
    def restore(cls, config: AlarmConfig, arrays: dict[str, Array], values: dict[str, Any]) -> Alarms:
        """The alarms that `state` describes, under the same configuration."""
        if values.get("version") != VERSION:
            raise ConfigurationError(
                f"alarms: the saved state has version {values.get('version')}, this program reads {VERSION}"
            )
        alarms = cls(config)

        def part(name: str) -> dict[str, Array]:
            return {k.removeprefix(name): v for k, v in arrays.items() if k.startswith(name)}

        alarms.memory = Memory.restore(part("memory/"))
        alarms.calibration = Calibration.restore(part("calibration/"))
        alarms.episodes = Episodes.restore(values["episodes"], config.time_scale)
        alarms._log = Log(*(arrays[f"log/{k}"].copy() for k in Log._fields))
        alarms._active = ([arrays["active/0"]], [arrays["active/1"]])
        alarms._origin_ns, alarms._now, alarms._block = values["origin_ns"], values["now"], values["block"]
        alarms._ready_at, alarms.steps, alarms.contacts_seen = (
            values[k] for k in ("ready_at", "steps", "contacts_seen")
        )
        alarms._open = an.EARLY | (alarms._ready_at >= 0)
        alarms._judge_by_what_was_seen()
        return alarms
