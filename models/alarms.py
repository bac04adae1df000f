"""Alarms: analytics over what arrives, calibrated, within a budget of false findings that the operator sets.

`Alarms.step` takes the contacts of one pane and returns the findings that it created, updated or closed. Every record
enters once, when it arrives; nothing said is taken back; the same steps give the same findings.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from flowsage.collector.errors import ConfigurationError
from flowsage.graph.addresses import PRIVATE, Internal
from flowsage.graph.build import Contacts
from flowsage.graph.flows import UInt64
from flowsage.models import analytics as an
from flowsage.models.alarm_config import AlarmConfig
from flowsage.models.calibration import Calibration, Readiness
from flowsage.models.cells import Memory, by_group
from flowsage.models.episodes import Episodes, Offer
from flowsage.models.finding import Evidence, Finding
from flowsage.models.history_scores import ContactTerms
from flowsage.models.reasons import Asked, Log, Reasons
from flowsage.models.surprise import take
from flowsage.models.watch import GRANDFATHERED, THREADED, Panes, Rules, Watch

__all__ = ["AlarmConfig", "Alarms", "Evidence", "Finding"]

Array = npt.NDArray[Any]
PIECE = 1 << 19
"""Contacts of a pane that are looked at together: bounds the memory of a flood."""

VERSION = 13

NOBODY: UInt64 = np.empty(0, np.uint64)
NOTHING = np.empty((0, 2))

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
        return self._tried(self._now)

    def _tried(self, now: float) -> bool:
        return now >= self._block_ns / 1e9 and self.calibration.blocks >= 1

    @property
    def allowed(self) -> float:
        """The largest p of a host in a block that is raised."""
        return self._allowed(0)

    def _allowed(self, more: int) -> float:
        """The same, when `more` hosts have become active."""
        c, untried = self.config, 0 if self.tried else max(1, sum(map(len, self._active[0])) + more)
        settled = c.settle_ns / c.block_ns
        return self.calibration.allowed(c.budget, c.least_a_day, self._blocks_a_day, settled, untried)

    def step(self, now_ns: int, contacts: Contacts, looked: ContactTerms, misplaced: Array) -> list[Finding]:
        """Findings created, updated or closed by the c contacts that arrived until `now_ns` (ns, the end of the pane).

        misplaced f8[c]: how much first meetings are out of place, 0 to 1 (NaN: not asked, or not ready).
        """
        self._enter(now_ns)
        self.steps += 1
        self.contacts_seen += len(contacts)
        told: list[Finding] = []
        for begin in range(0, max(1, len(contacts)), PIECE):
            part = slice(begin, begin + PIECE)
            some = contacts if len(contacts) <= PIECE else contacts.some(begin, part.stop)
            told += self._look([now_ns], some, np.array([0, len(some)]), looked.some(part), misplaced[part])
        return told + self.episodes.close(now_ns)

    def step_each(
        self, ends_ns: Sequence[int], windows: Contacts, looked: ContactTerms, misplaced: Array, hosts: UInt64,
        of_hosts: Sequence[int],
    ) -> tuple[list[Finding], Array]:  # fmt: skip
        """`step` of each of `windows`, that are each all of the pane that ends at its time of `ends_ns`, and after it
        `take` of its hosts[of_hosts[k]:of_hosts[k + 1]]. It says the same, but many are looked at together."""
        told, said, k = list[Finding](), np.empty((len(hosts), 2)), 0
        while k < len(ends_ns):
            end = self._together(ends_ns, windows.offsets, k)
            part = slice(int(windows.offsets[k]), int(windows.offsets[end]))
            these = windows.some(part.start, part.stop), looked.some(part), misplaced[part]
            theirs = slice(of_hosts[k], of_hosts[end])
            if end == k + 1:
                told += self.step(ends_ns[k], *these)
                said[theirs] = self.take(hosts[theirs])
            else:
                self.steps += end - k
                self.contacts_seen += len(these[0])
                offsets, asked = (np.asarray(o[k : end + 1]) - o[k] for o in (windows.offsets, of_hosts))
                told += self._look(ends_ns[k:end], these[0], offsets, *these[1:], hosts[theirs], asked, said[theirs])
                told += self.episodes.close(ends_ns[end - 1])
            k = end
        return told, said

    def _enter(self, now_ns: int) -> None:
        """A pane that ends at now_ns comes."""
        if self._origin_ns is None:
            self._origin_ns = (now_ns - 1) // self.config.pane_ns * self.config.pane_ns
        block = (now_ns - 1) // self._block_ns
        if block > self._block:
            self._roll(block)

    def _together(self, ends_ns: Sequence[int], offsets: Array, k: int) -> int:
        """Panes k to the one that it returns can be looked at together: within a block that is not the first, and as
        few contacts as one thread looks at and memory has room for."""
        self._enter(ends_ns[k])
        assert self._origin_ns is not None
        if self.memory.crowded(self.config.max_keys, THREADED) or not self._tried((ends_ns[k] - self._origin_ns) / 1e9):
            return k + 1
        few = int(np.searchsorted(offsets, offsets[k] + THREADED)) - 1
        return max(k + 1, min(few, bisect_right(ends_ns, (self._block + 1) * self._block_ns, k)))

    def _look(
        self, ends_ns: Sequence[int], contacts: Contacts, offsets: Array, looked: ContactTerms, misplaced: Array,
        hosts: UInt64 = NOBODY, of_hosts: Array | None = None, said: Array = NOTHING,
    ) -> list[Finding]:  # fmt: skip
        """Findings created or updated by contacts of panes, no more than a `PIECE` of them, and closed before the last.

        Contacts offsets[k]:offsets[k + 1] are of the pane that ends at ends_ns[k]; said f8[·, 2] is written of hosts.
        """
        assert self._origin_ns is not None
        now, nows = self._now, list[float]()
        for end_ns in ends_ns:
            # Two looks at one time would be one touch: the later one counts as a moment later.
            nows.append(now := max((end_ns - self._origin_ns) / 1e9, now + 1e-6))
        self._now = nows[0]
        if not len(contacts):
            return []
        if self.memory.crowded(self.config.max_keys):
            self._forget()
        watch = Watch(
            self.memory, contacts, offsets, looked, misplaced, block=self._block, origin_ns=self._origin_ns,
            internal=self.internal, thread=self._thread,
        )  # fmt: skip
        asked = self.memory.hosts.table.find(hosts)
        of_hosts = np.zeros(len(nows) + 1, np.int64) if of_hosts is None else of_hosts
        panes = Panes(np.array(nows), asked, of_hosts, self._ready_at >= 0)
        told, done = list[Finding](), 0
        while done < len(nows):
            self._now = nows[done]
            seen = watch.look(done, panes, self._rules(watch), self._log, said)
            for active, new in zip(self._active, (seen.sources, seen.targets), strict=True):
                active.append(new)
            for end_ns in ends_ns[done : seen.done - 1]:
                told += self.episodes.close(end_ns)
            last, done = seen.done - 1, seen.done
            self._now = nows[last]
            if len(seen.found):
                seen.found[:, 2] += offsets[last]
                offers = self._offers(contacts, seen.found, seen.values)
                told += self.episodes.offer(ends_ns[last], offers, self.allowed)
                self._note(self.episodes)
            if done < len(nows):
                told += self.episodes.close(ends_ns[last])
        return told

    def _rules(self, watch: Watch) -> Rules:
        """By what the panes are judged that come next."""
        scale = self.config.time_scale
        return Rules(
            self._parameters, self._floors, self._open if self.tried else self._open & an.FIRST,
            self._allowed(0 if self.tried else watch.newly_active()), self._block_ns / 1e9, scale,
            max(GRANDFATHERED / scale, self._ready_at if self._ready_at >= 0 else np.inf),
            self._tau, self._span, self._fade,
        )  # fmt: skip

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

    def take(self, hosts: UInt64) -> Array:
        """What is said f8[n, 2] of hosts (hashes u64[n]), since this was last asked: see `surprise.take`."""
        h, said = self.memory.hosts.arrays, np.empty((len(hosts), 2))
        slots, day = self.memory.hosts.table.find(hosts), an.DAY / self.config.time_scale
        take(slots, h["smallest"], h["usual"], self._now, day, self._ready_at >= 0, said)
        return said

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
