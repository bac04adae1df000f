"""Reasons: why an alarm was raised, told from the levels, the log and what the graph has to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flowsage.graph.build import Contacts
from flowsage.graph.flows import hash_names
from flowsage.models import analytics as an
from flowsage.models import beacon, levels, records
from flowsage.models.cells import Memory
from flowsage.models.explain import META, Explained, Shape, duration, explain
from flowsage.models.judgement import LEAST_EXCESS

Array = npt.NDArray[Any]


class Said(Protocol):
    """What a witness says of a first meeting (`testimony.Testimony` is one)."""

    @property
    def text(self) -> str:
        """For a person: goes on where the evidence's own text ends."""

    @property
    def facts(self) -> dict[str, Any]:
        """For a program."""


Asked = Callable[[int, int, int], Said | None]
"""A witness: asked about source hash, target hash, service code."""


class Log(NamedTuple):
    """The contacts seen last, half of them new or failed ones (`levels.remember`)."""

    meta: Array
    """i64[log, META] what each was; -1: none."""
    inc: Array
    """f32[log, analytics] what it added to every level."""
    at: Array
    """i64[2] how many of each half there were."""

    @classmethod
    def empty(cls, size: int) -> Log:
        """Of about so many."""
        half = max(1, size // 2)
        inc = np.zeros((2 * half, levels.A), np.float32)
        return cls(np.full((2 * half, META), -1, np.int64), inc, np.zeros(2, np.int64))

    def follow(self, remap: Array) -> None:
        """Hosts have moved; those of hosts that left are dropped."""
        used = self.meta[:, 6] >= 0
        for column in (0, 1):
            self.meta[used, column] = remap[self.meta[used, column]]
        self.meta[(self.meta[:, :2] < 0).any(1)] = -1


@dataclass(frozen=True)
class Reasons:
    """What explains the alarms of one look at a pane, while its levels are as they were then."""

    memory: Memory
    log: Log
    origin_ns: int
    now: float
    """s since the origin, and from here on s as well."""
    block: float
    tau: Array
    """[analytics]"""
    span: Array
    fade: Array
    """[analytics], by how much a record fades in a second."""
    witness: Asked | None

    def of(self, c: Contacts, a: int, row: int, contact: int, x: float, record: float) -> Callable[[], Explained]:
        """How to explain one alarm, when somebody is to be told: that of analytic `a` at `row` of its cells, which the
        contact raised to x over its record."""

        def why() -> Explained:
            m = self.memory
            names = m.hosts.arrays["name"]
            source, target = (int(v) for v in m.hosts.table.find(c.hosts.hash[[c.src[contact], c.dst[contact]]]))
            key = source, target, int(c.service[contact])
            log, times = (self.log.meta, self.log.inc), (int(self.now * 1e9), self.origin_ns)
            if a == an.JOINT:
                causes = m.hosts.arrays["causes"][source]
                told = ", ".join(an.FAMILIES[f] for f in np.argsort(-causes, kind="stable") if causes[f] > 0)
                lead = self._lead(c, contact, source)
                if lead is None:
                    tau = float(self.block)
                    found = explain(log, names, a, key, x, record, *times, tau)
                    return replace(found, sentence=f"{found.sentence}: {told}")
                found = explain(log, names, lead[0], key, lead[1], lead[2], *times, float(self.tau[lead[0]]))
                sentence = f"{found.sentence}; unusual at once in {told}"
                return replace(found, sentence=sentence, lead=an.NAMES[lead[0]])
            if a in an.SHAPED:
                slot = row // int(an.WIDTH[an.CONTACT])
                shape = self._beat(slot) if a == an.BEACON else self._session(slot)
                return explain(log, names, a, key, x, record, *times, max(shape.lasted, 1.0), shape)
            return explain(log, names, a, key, x, record, *times, float(self.tau[a]))

        return lambda: self._testified(why())

    def _beat(self, slot: int) -> Shape:
        s = self.memory.contacts.arrays["beat"][slot]
        period, beats = float(np.exp(s[beacon.MEAN])), int(s[beacon.BEATS])
        spread = float(np.sqrt(max(0.0, s[beacon.SQUARES]) / max(1.0, s[beacon.GAPS])))
        facts = {"period_s": period, "jitter": spread, "beats": beats}
        said = f"every {duration(period)} ± {100 * spread:.0f} %", f"{beats} times"
        return Shape(
            ", ".join(said), f"{said[0]} on {{on}}, {said[1]}", float(beats), "beats", facts, period * (beats + 1)
        )

    def _session(self, slot: int) -> Shape:
        seen, begun = (float(t) for t in self.memory.contacts.arrays["visits"][slot])
        lasted = seen - begun
        said = duration(lasted)
        return Shape(said, f"{said} on {{on}} without a pause", lasted, "seconds", {"lasted_s": lasted}, lasted)

    def _testified(self, found: Explained) -> Explained:
        """With what the witness has to say of the first meetings in it."""
        if self.witness is None:
            return found
        evidence = list(found.evidence)
        for i, e in enumerate(evidence):
            if e.name != an.NAMES[an.MEETING] or e.dst is None or e.service is None:
                continue
            source, target = (int(h) for h in hash_names(pa.array([e.src, e.dst])))
            said = self.witness(source, target, e.service)
            if said is not None:
                evidence[i] = replace(
                    e, text=f"{e.text}; {said.text}" if said.text else e.text, facts=e.facts | said.facts
                )
        return replace(found, evidence=tuple(evidence))

    def _lead(self, c: Contacts, contact: int, source: int) -> tuple[int, float, float] | None:
        """Of the analytics behind a joint alarm the one to tell it by: (analytic, x, record), None if none is summed.

        It is the one of the strongest family whose level, at a key of the contact judged last, exceeds its record most;
        the next family's where that family has none.
        """
        m, now = self.memory, self.now
        keys = np.empty((3, 1), np.uint64)
        source_hash, target_hash = c.hosts.hash[c.src[[contact]]], c.hosts.hash[c.dst[[contact]]]
        levels.key_hashes(source_hash, target_hash, np.ascontiguousarray(c.service[[contact]]), keys)
        stores = m.hosts, m.services, m.pairs, m.contacts
        slots = [source, *(int(store.table.find(key)[0]) for store, key in zip(stores[1:], keys, strict=True))]
        causes = m.hosts.arrays["causes"][source]
        best: dict[int, tuple[float, int, float, float]] = {}
        for a, analytic in enumerate(an.TABLE):
            slot = slots[analytic.kind]
            if analytic.tau == 0.0 or analytic.role != "source" or slot < 0 or causes[an.FAMILY[a]] <= 0:
                continue
            cell, past = (stores[analytic.kind].arrays[name][slot][an.COLUMN[a]] for name in ("cells", "past"))
            x = float(np.log1p(cell["level"] * np.exp((cell["at"] - now) / self.tau[a])))
            record = max(0.0, float(past[records.RECORD]) - self.fade[a] * now)
            born = float(m.hosts.arrays["born"][source])
            first = records.first_span(an.STEADY[a], born, self.block)
            record += float(records.growth(now - born, first, self.tau[a], self.span[a]))
            if x - record >= LEAST_EXCESS and x >= an.LEAST[a]:
                told = (x - record, a, x, record)
                best[int(an.FAMILY[a])] = max(best.get(int(an.FAMILY[a]), told), told)
        for family in np.argsort(-causes, kind="stable"):
            if causes[family] > 0 and int(family) in best:
                return best[int(family)][1:]
        return None
