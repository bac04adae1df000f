"""Episodes: alarms of one host and one cause as one finding, with a beginning and an end.

- The same host and family: one finding while it lasts, and until it has been quiet for an hour; but what begins long
  after it last grew, of another peer or service, is news (`parts.py`).
- Another family of a host whose finding began within the last quarter of an hour: the same finding.
- A target whose trouble comes from one host that has a finding which still grows (and the reverse): the same finding.
- The same cause towards one peer at several hosts: one finding, the first; the others join it.

A finding is created, updated when it is materially worse (at most once in five minutes), and closed. uids are hashes of
what began it, so two runs over the same flows give the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flowsage.models.analytics import SHARE, TABLE, Analytic
from flowsage.models.explain import Explained
from flowsage.models.finding import Evidence, Finding, severity
from flowsage.models.habits import Habits
from flowsage.models.parts import Part

MINUTE = 60.0
QUIET, TOGETHER, THROTTLE = 60 * MINUTE, 15 * MINUTE, 5 * MINUTE
"""Seconds, divided by time_scale: until a finding closes, within which causes join, between updates."""

WORSE = 10.0
"""A finding is materially worse when its p has fallen by this factor, or a cause or host has joined."""

OPPOSITE = {"source": "target", "target": "source"}


@dataclass(frozen=True)
class Offer:
    """An alarm of one pane: host, analytic (index), p, excess, and how to find out more when somebody is to be told."""

    host: str
    analytic: int
    p: float
    explain: Callable[[], Explained]
    excess: float = 0.0
    x: float = 0.0
    """Level that it was raised by, as ln(1 + level)."""
    tau: float = 0.0
    """Time constant of the level, s, scaled; 0: none."""
    about: str = ""
    """Which of its host's keys it is of, where the analytic looks at pairs or services."""


def _order(o: Offer) -> tuple[bool, float, str, int]:
    """Who does comes before to whom it is done, so that a finding names the one who does; then by p."""
    return TABLE[o.analytic].role == "target", o.p / float(SHARE[o.analytic]), o.host, o.analytic


def _alike(part: Part, o: Offer) -> bool:
    """Whether a part is of the alarm's host, role and cause."""
    a = TABLE[o.analytic]
    return (part.host, part.role) == (o.host, a.role) and TABLE[part.analytic].family == a.family


def _told(a: Analytic, why: Explained) -> dict[str, Any]:
    """The fields of a finding that say what was seen, in the words of the analytic that leads."""
    lead = next((b for b in TABLE if b.name == why.lead), a)
    return {
        "technique": lead.technique, "evidence": why.evidence, "observed": why.observed, "expected": why.expected,
        "unit": lead.unit, "lead": lead.name,
    }  # fmt: skip


JOINED = re.compile("; (?:with it|felt by|done by|earlier): ")
"""Begins what a sentence says of the hosts that joined, and of what it told before."""


def _joined(f: Finding, others: list[tuple[str, str]]) -> str:
    """The hosts that joined a finding, by what they have to do with it, ten of each."""
    text = ""
    for words, role in (("with it", f.role), ("felt by" if f.role == "source" else "done by", OPPOSITE[f.role])):
        names = [host for host in dict.fromkeys(h for h, r in others if r == role) if host != f.host]
        if names:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            text += f"; {words}: {', '.join(names[:10])}{more}"
    return text


@dataclass
class Episode:
    """A finding that is open, and when it was last seen, last told and as what; `others` are the hosts that joined."""

    finding: Finding
    families: list[str]
    last_ns: int
    told_ns: int
    told_p: float
    others: list[tuple[str, str]] = field(default_factory=list)
    """(host, role) of those that joined: who was scanned may yet do something of its own."""
    grew: bool = False
    own_p: float = 1.0
    """p of what its sentence tells."""
    also: str = ""
    """What the strongest of `others` does, where that is rarer."""
    earlier: str = ""
    """What it was before it turned to something else."""
    parts: list[Part] = field(default_factory=list)
    peer: str | None = None
    alone: tuple[int, float] | None = None
    """Analytic and excess that it began with, while no other family has joined."""

    @property
    def grew_ns(self) -> int:
        """When any part of it last grew."""
        return max(part.grew_ns for part in self.parts)


class Episodes:
    """Open findings. `offer` alarms pane by pane, in time; `close` what has been quiet."""

    def __init__(self, time_scale: float = 1.0) -> None:
        self.quiet_ns, self.together_ns, self.throttle_ns = (
            int(s * 1e9 / time_scale) for s in (QUIET, TOGETHER, THROTTLE)
        )
        self.open: list[Episode] = []
        """Oldest first."""
        self.created = self.joined = 0
        self.habits = Habits(time_scale)
        self.begun: list[Offer] = []
        """The offers of the last pane that became findings, or would have but for what is known of their hosts."""
        self.borne_out: list[tuple[int, float]] = []
        """Analytic and excess of those findings that another family has joined in the last pane."""

    def offer(self, now_ns: int, offers: Iterable[Offer], allowed: float) -> list[Finding]:
        """Findings created or updated by alarms `offers` at `now_ns`; `allowed` is the budget's p of a host."""
        told: list[Finding] = []
        self.begun, self.borne_out = [], []
        for o in sorted(offers, key=_order):
            part, of = self._of(o)
            if part is not None:
                part.see(now_ns, o.x, o.tau)
            why, fresh = self._news(now_ns, part, of, o)
            if of is None or (fresh and of.finding.host != o.host):
                if part is not None and of is not None:
                    of.parts.remove(part)
                told += self._begin(now_ns, o, allowed, why, of)
                continue
            if part is None or fresh:
                of.parts = [p for p in of.parts if p is not part] + [self._part(now_ns, o, why)]
            told += self._go_on(now_ns, of, o, allowed, why, turned=fresh)
        return told

    def close(self, now_ns: int) -> list[Finding]:
        """Findings that have been quiet for long enough, as "close"."""
        done = [e for e in self.open if now_ns - e.last_ns > self.quiet_ns]
        if not done:
            return []
        self.open = [e for e in self.open if now_ns - e.last_ns <= self.quiet_ns]
        return [self._closed(now_ns, e, e.finding.sentence) for e in done]

    def _of(self, o: Offer) -> tuple[Part | None, Episode | None]:
        """The part that this alarm goes on with, and the open episode that speaks of this host, role and cause."""
        best = None
        for e in self.open:
            for part in e.parts:
                if not _alike(part, o):
                    continue
                if (part.analytic, part.about) == (o.analytic, o.about):
                    return part, e
                if best is None or part.grew_ns >= best[0]:
                    best = part.grew_ns, e
        return None, None if best is None else best[1]

    def _part(self, now_ns: int, o: Offer, why: Explained | None) -> Part:
        """A part that begins now; its cause is not known where nobody asked."""
        a = TABLE[o.analytic]
        cause = None if why is None else (why.peer, why.on)
        return Part(o.host, a.role, o.analytic, o.about, cause, o.x, now_ns)

    def _news(self, now_ns: int, part: Part | None, e: Episode | None, o: Offer) -> tuple[Explained | None, bool]:
        """Whether an alarm of what an episode speaks of is something else than it tells, and its explanation if asked.

        It is where none of this cause has grown for long, and it is of a peer or service that none of them was of.
        """
        if e is None:
            return None, False
        mine = [p for p in e.parts if _alike(p, o)]
        if any(p is not part and now_ns - p.grew_ns <= self.together_ns for p in mine):
            return None, False
        if part is not None and not part.again(now_ns, self.together_ns, self.throttle_ns):
            return None, False
        why = o.explain()
        cause = why.peer, why.on
        if (part is None or not o.about) and all(p.differs(cause) for p in mine):
            return why, True
        # As long as no service stands out, what is new may be hidden in what is left of the old.
        if part is not None and (part.cause is None or why.on is not None):
            part.goes_on(now_ns, cause)
        return why, False

    def _begin(
        self, now_ns: int, o: Offer, allowed: float, why: Explained | None = None, left: Episode | None = None
    ) -> list[Finding]:
        """A cause that no open episode of the host has, or that `left` its own: it joins one, or is a new finding."""
        a = TABLE[o.analytic]
        others = [e for e in self.open if e is not left]
        recent = [e for e in others if e.finding.host == o.host and now_ns - e.finding.alarm_ns <= self.together_ns]
        why = why or o.explain()
        other_end, same = [], []
        if why.peer is not None and not recent:
            other_end = [e for e in others if e.finding.host == why.peer and e.finding.role != a.role and
                         now_ns - e.grew_ns <= self.together_ns]  # fmt: skip
            same = [e for e in others if e.peer == why.peer and a.family in e.families and e.finding.role == a.role]
        for keeper in (*recent, *other_end, *same):
            self._join(keeper, a)
            keeper.others.append((o.host, a.role))
            keeper.grew = True
            keeper.parts.append(self._part(now_ns, o, why))
            self.joined += not recent
            return self._go_on(now_ns, keeper, o, allowed, why)
        if self.habits.usual(o.host, o.analytic, o.excess, now_ns):
            # An analytic that keeps raising is wrong about what is rare, whether or not it is told.
            if self.habits.again(o.host, o.analytic, now_ns, self.quiet_ns):
                self.begun.append(o)
            return []
        self.habits.told(o.host, o.analytic, o.excess, now_ns)
        text = f"{o.host}\0{a.role}\0{a.name}\0{why.peer or ''}\0{now_ns}"
        p = min(1.0, o.p / float(SHARE[o.analytic]))
        finding = Finding(
            uid=hashlib.sha256(text.encode()).hexdigest()[:32],
            activity="create",
            host=o.host,
            role=a.role,
            peer=why.peer,
            analytic=a.name,
            family=a.family,
            start_ns=why.start_ns,
            alarm_ns=now_ns,
            told_ns=now_ns,
            end_ns=None,
            p_value=p,
            severity=severity(p, allowed),
            sentence=why.sentence,
            **_told(a, why),
            analytics=(a.name,),
            hosts=(o.host,),
        )
        alone = (o.analytic, o.excess)
        parts = [self._part(now_ns, o, why)]
        self.open.append(
            Episode(finding, [a.family], now_ns, now_ns, p, own_p=p, parts=parts, peer=why.peer, alone=alone)
        )
        self.created += 1
        self.begun.append(o)
        return [finding]

    def _join(self, e: Episode, a: Analytic) -> None:
        """An alarm of another analytic is of this episode."""
        if a.family in e.families:
            return
        e.families.append(a.family)
        if e.alone is not None:
            self.borne_out.append(e.alone)
            self.habits.bear_out(e.finding.host, e.alone[0])
            e.alone = None

    @staticmethod
    def _closed(now_ns: int, e: Episode, sentence: str) -> Finding:
        return replace(e.finding, activity="close", told_ns=now_ns, end_ns=e.last_ns, sentence=sentence)

    def _go_on(
        self, now_ns: int, e: Episode, o: Offer, allowed: float, why: Explained | None = None, turned: bool = False
    ) -> list[Finding]:
        """The episode lasts; it is told again if it is materially worse and was not told just now.

        Where it has `turned` to something else, it is told by that, and what it was before is said after it.
        """
        a, p = TABLE[o.analytic], min(1.0, o.p / float(SHARE[o.analytic]))
        e.last_ns = now_ns
        f = e.finding
        if a.name not in f.analytics:
            e.finding = f = replace(f, analytics=(*f.analytics, a.name))
        worse = p < e.told_p / WORSE
        if not (worse or e.grew or turned) or now_ns - e.told_ns < self.throttle_ns:
            return []
        hosts = tuple(dict.fromkeys([f.host, *(other for other, _ in e.others)]))
        if o.host == f.host and (p <= e.own_p or turned):
            why, e.own_p = why or o.explain(), p
            e.earlier = JOINED.split(f.sentence)[0] if turned else e.earlier
            f = replace(
                f, peer=why.peer, analytic=a.name, family=a.family, sentence=why.sentence,
                start_ns=min(f.start_ns, why.start_ns), **_told(a, why),
            )  # fmt: skip
        elif o.host != f.host and p < f.p_value:
            e.also = (why or o.explain()).sentence
        p_value = min(p, f.p_value)
        f = replace(f, p_value=p_value, severity=severity(p_value, allowed))
        more = (f"; {e.also}" if e.also else "") + (f"; earlier: {e.earlier}" if e.earlier else "")
        sentence = f"{JOINED.split(f.sentence)[0]}{_joined(f, e.others)}{more}"
        e.finding = replace(f, activity="update", told_ns=now_ns, sentence=sentence, hosts=hosts)
        e.told_ns, e.told_p, e.grew = now_ns, min(e.told_p, p), False
        return [e.finding]

    def state(self) -> dict[str, Any]:
        """What is open, as plain values for JSON."""
        return {"open": [asdict(e) for e in self.open], "created": self.created, "joined": self.joined,
                "habits": self.habits.state()}  # fmt: skip

    @classmethod
    def restore(cls, state: dict[str, Any], time_scale: float) -> Episodes:
        """The episodes that `state` describes."""
        episodes = cls(time_scale)
        episodes.created, episodes.joined = state["created"], state["joined"]
        episodes.habits.restore(state["habits"])
        for raw in state["open"]:
            f = raw["finding"]
            f = f | {k: tuple(f[k]) for k in ("analytics", "hosts")}
            f["evidence"] = tuple(Evidence(**e) for e in f["evidence"])
            others = [(host, role) for host, role in raw["others"]]
            parts = [Part(**(part | {"cause": part["cause"] and tuple(part["cause"])})) for part in raw["parts"]]
            alone = None if raw["alone"] is None else tuple(raw["alone"])
            of = {"finding": Finding(**f), "others": others, "parts": parts, "alone": alone}
            episodes.open.append(Episode(**(raw | of)))
        return episodes
