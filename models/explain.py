"""Explanations: what a person is shown of an alarm, from the analytic's own sums.

A level is a sum of what contacts added to it, so the contacts that were logged *are* its decomposition: evidence is
those that added most, as of now, with what they added. Removing them from the input removes that much from the level.
Where what was added is itself a statement of the model (how unlikely a first use or a first meeting is), the evidence
says that too, and of first meetings a witness (`testimony.py`) tells what the graph holds for and against them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from flowsage.graph.services import parts_of, service_name
from flowsage.models.analytics import (
    ANSWERED,
    CONTACT,
    DRIP,
    EXFIL,
    FAN_IN,
    IS_TARGET,
    JOINT,
    MINUTE,
    NAMES,
    PAIR,
    SERVICE,
    SHAPED,
    SURPRISE,
    SURPRISE_MOST,
    TABLE,
    UNANSWERED,
    Analytic,
)
from flowsage.models.finding import Evidence

Array = npt.NDArray[Any]

MOST = 10
"""Contacts that a finding shows."""

BEGUN = 0.05
"""A finding begins when this share of what raised the level had come: a level remembers much that is harmless."""

FEW_TAUS = 3.0
"""What is older than this many time constants has faded to a twentieth."""

RESOLVED = 256
"""Contacts by whose times it is told whether seconds are known."""

META = 7
"""Columns of the log: source slot, target slot, service, first ns, last ns, flows, ns after the origin (-1: unused)."""


@dataclass(frozen=True)
class Explained:
    """What `explain` found out about one alarm."""

    sentence: str
    peer: str | None
    start_ns: int
    observed: float
    expected: float
    evidence: tuple[Evidence, ...] = field(default_factory=tuple)
    lead: str = ""
    """The analytic that it is told by, where that is not the one that raised the alarm."""
    on: int | None = None
    """Code of the service that at least half of it is on."""


@dataclass(frozen=True)
class Shape:
    """What a beat or a session looks like, which no count of contacts says.

    words for the sentence, text for the evidence (with {on}); observed, in units of `unit`; facts for a program; lasted
    s.
    """

    words: str
    text: str
    observed: float
    unit: str
    facts: dict[str, Any]
    lasted: float


def amount(value: float, unit: str) -> str:
    """A number as a person reads it: whole counts, bytes by SI prefix.

    >>> amount(412.2, "flows"), amount(2.5e9, "bytes")
    ('412', '2.5 GB')
    """
    if unit != "bytes":
        return f"{value:,.0f}" if value >= 10 or abs(value - round(value)) < 0.05 else f"{value:.1f}"
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            return f"{value:.3g} {prefix}B"
        value /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _resolution(meta: Array) -> float:
    """Seconds of which all times are multiples: a minute, or 0 where they are finer or too few to say."""
    starts = meta[meta[:, 6] >= 0, 3][:RESOLVED]
    return MINUTE if len(starts) >= 16 and not (starts % int(MINUTE * 1e9)).any() else 0.0


def select(
    meta: Array, inc: Array, analytic: int, source: int, target: int, service: int, now_ns: int, tau: float
) -> Array:
    """Indices into the log of the contacts that raised a key's level, from the newest log rows back `FEW_TAUS` τ."""
    a = TABLE[analytic]
    mask = (meta[:, 6] >= 0) & (meta[:, 6] >= now_ns - FEW_TAUS * tau * 1e9)
    if IS_TARGET[analytic]:
        mask &= meta[:, 1] == target
    else:
        mask &= meta[:, 0] == source
        if a.kind in (PAIR, CONTACT):
            mask &= meta[:, 1] == target
        if a.kind in (SERVICE, CONTACT):
            mask &= meta[:, 2] == service
    if analytic == JOINT:
        mask[len(mask) // 2 :] = False
    elif analytic not in SHAPED:
        mask &= inc[:, analytic] > 0
    return np.flatnonzero(mask)


def explain(
    log: tuple[Array, Array],
    names: Array,
    analytic: int,
    key: tuple[int, int, int],
    x: float,
    record: float,
    now_ns: int,
    origin_ns: int,
    tau: float,
    shape: Shape | None = None,
) -> Explained:
    """Evidence and sentence of one alarm.

    log (meta i64[·, 7], inc f4[·, A]); names [h] by host slot; key (source slot, target slot, service) of the contact
    that was judged last; x, record as judged; times are ns since the origin (`now_ns`) and of the epoch (`origin_ns`);
    tau s, scaled; shape of a beat or a session.
    """
    meta, inc = log
    a = TABLE[analytic]
    rows = select(meta, inc, analytic, *key, now_ns=now_ns, tau=tau)
    rows = rows[np.argsort(meta[rows, 6], kind="stable")]
    added = inc[rows].astype(np.float64)
    weight = np.ones(len(rows)) if shape is not None else added.sum(1) if analytic == JOINT else added[:, analytic]
    if a.tau:
        weight = weight * np.exp((meta[rows, 6] - now_ns) / 1e9 / tau)
    direct = a.tau == 0.0
    observed, expected = (
        v if direct else v / math.log(2) if a.doubles else math.expm1(v) * a.scale for v in (x, record)
    )
    if analytic in (EXFIL, DRIP) and observed > 0:
        # Levels count less where others send to as well; the log has the bytes. What was expected is told by the same
        # measure.
        real = max(observed, float(weight.sum()) * a.scale)
        observed, expected = real, expected * real / observed
    of, first_row = np.unique(meta[rows, :3], axis=0, return_inverse=True)
    total = np.bincount(first_row.ravel(), weights=weight, minlength=len(of))
    order = np.argsort(-total, kind="stable")[:MOST]
    evidence = []
    for g in order:
        mine = rows[first_row.ravel() == g]
        service = int(of[g, 2])
        proto, port = parts_of(service)
        share = total[g] / max(float(total.sum()), 1e-12)
        evidence.append(
            Evidence(
                name=a.name,
                src=str(names[of[g, 0]]),
                dst=str(names[of[g, 1]]),
                service=service,
                proto=proto,
                dst_port=port,
                observed=float(total[g]) * a.scale if shape is None else shape.observed,
                expected=expected * float(share) if shape is None else 0.0,
                unit=a.unit if shape is None else shape.unit,
                first_ns=int(meta[mine, 3].min()),
                last_ns=int(meta[mine, 4].max()),
                flows=int(meta[mine, 5].sum()),
                share=float(share),
                **_told(a, added[first_row.ravel() == g], service, int(meta[mine, 5].sum()), shape),
            )
        )
    peer = _peer(meta, rows, weight, names, analytic, key)
    begun = int(np.searchsorted(np.cumsum(weight), BEGUN * weight.sum()))
    start = int(meta[rows[begun], 3]) if len(rows) else origin_ns + now_ns
    on = _share(meta[rows, 2], weight, 0.8)
    # A flow is known when it begins, so what it carried may take longer than until now.
    last = int(meta[rows[begun:], 4].max(initial=0)) if a.unit == "bytes" else 0
    end = max(origin_ns + now_ns, last)
    span = max(1e-3, (end - start) / 1e9)
    step = _resolution(meta)
    span = math.ceil(span / step) * step if step else span
    if direct:
        sentence = a.words.format(
            host=_host(names, analytic, key),
            peer=names[key[1]],
            service=service_name(key[2]),
            shape="" if shape is None else shape.words,
        )
    else:
        # Since it began, that is without the fading: what is told is what happened.
        happened = max(observed, float(added[begun:, analytic].sum())) if a.scale == 1.0 else observed
        counted = len(np.unique(meta[rows, 1])) if a.name != "novelty" else len(np.unique(meta[rows, 2]))
        sentence = a.words.format(
            host=_host(names, analytic, key),
            peer=peer or names[key[1]],
            service=service_name(key[2]),
            on="" if on is None else f" on {service_name(on)}",
            observed=amount(happened, a.unit),
            count=amount(counted, "peers"),
            span=duration(span),
        )
        # A sentence that counts peers expects peers, though the level weighs them.
        counts = "{count}" in a.words
        most = expected * counted / max(observed, 1e-9) if counts else expected
        most = math.ceil(most) if counts or a.scale == 1.0 else most
        sentence += (
            f"; expected at most {amount(most, 'peers' if counts else a.unit)}"
            if most >= 1
            else "; nothing like it before"
        )
    return Explained(
        ONE.sub(lambda m: f"1 {m[1]}{m[2][:-1]}", sentence),
        peer,
        start,
        observed,
        expected,
        tuple(evidence),
        on=_share(meta[rows, 2], weight, 0.5),
    )


ONE = re.compile(r"\b1 ((?:new )?(?:internal )?(?:brief )?)(peers|services|sources|sessions|flows)\b")
"""Where a sentence about many speaks of one."""


def _told(a: Analytic, added: Array, service: int, flows: int, shape: Shape | None) -> dict[str, Any]:
    """text and facts of one piece of evidence: contacts of one (source, target, service), added f8[n, A] by each."""
    on = service_name(service)
    mine = added[:, NAMES.index(a.name)]
    if shape is not None:
        facts = {name: _figures(value) if isinstance(value, float) else value for name, value in shape.facts.items()}
        return {"text": shape.text.format(on=on), "facts": facts}
    if a.name == "meeting":
        out = float(mine.max(initial=0.0))
        return {"text": f"first meeting on {on}, {out:.0%} out of place", "facts": {"misplaced": _figures(out)}}
    if a.name == "novelty":
        nats = min(float(mine.max(initial=0.0)), SURPRISE_MOST) + SURPRISE
        capped = "at most " if nats >= SURPRISE + SURPRISE_MOST else ""
        facts = {"nats": _figures(nats), "probability": _figures(math.exp(-nats))}
        what = f"first use of {on}: {capped}1 of {math.exp(nats):,.0f} of what it does is so new"
        return {"text": what, "facts": facts}
    if a.name == "sweep":
        answers = {ANSWERED: "answered", UNANSWERED: "not answered"}
        seen = answers.get(round(float(mine.max(initial=0.0)), 6), "refused or not answered")
        return {"text": f"first meeting on {on}, {seen}"}
    if a.name == "joint":
        sums = np.where(IS_TARGET, 0, added.sum(0))
        causes = [TABLE[k].family for k in np.argsort(-sums, kind="stable") if sums[k] > 0]
        return {"text": f"{_flows(flows)} on {on} ({', '.join(dict.fromkeys(causes))})"}
    value = amount(float(mine.sum()) * a.scale, a.unit)
    return {"text": PIECES[a.name].format(value=value, on=on, flows=_flows(flows))}


PIECES = {
    "burst": "{flows} on {on}",
    "chatter": "{flows} on {on}",
    "fan": "first meeting, on {on}",
    "fan-in": "first meeting, on {on}",
    "ports": "first use of {on} there",
    "guess": "{flows} on {on} count as {value} brief sessions",
    "fail": "{value} of {flows} on {on} failed",
    "fail-in": "{value} of {flows} on {on} failed",
    "lateral": "first meeting, on {on}",
    "newcomer": "first use of {on}, at settled clients: one visit of {value} is so new",
    "exfil": "{value} more sent than received on {on}",
    "drip": "{value} more sent than received on {on}",
    "haul": "{value} moved on {on}",
    "flood": "{flows} on {on}",
}
"""What one piece of evidence says, where it is a count."""


def _flows(count: int) -> str:
    return f"{count:,} flow{'s' if count != 1 else ''}"


def _figures(value: float) -> float:
    """Four significant figures: what is said beyond them is noise."""
    return float(f"{value:.4g}")


def _host(names: Array, analytic: int, key: tuple[int, int, int]) -> str:
    return str(names[key[1 if IS_TARGET[analytic] else 0]])


def _share(values: Array, weight: Array, least: float) -> int | None:
    """The value that has at least this share of the weight, if one has."""
    if not len(values):
        return None
    unique, index = np.unique(values, return_inverse=True)
    sums = np.bincount(index.ravel(), weights=weight)
    best = int(np.argmax(sums))
    return int(unique[best]) if sums[best] >= least * sums.sum() else None


def _peer(
    meta: Array, rows: Array, weight: Array, names: Array, analytic: int, key: tuple[int, int, int]
) -> str | None:
    """The one other host that it is about: by its key, or because most of the weight is towards it."""
    if TABLE[analytic].kind in (PAIR, CONTACT):
        return str(names[key[1]])
    if analytic == FAN_IN:
        return None
    slot = _share(meta[rows, 0 if IS_TARGET[analytic] else 1], weight, 0.8)
    return None if slot is None else str(names[slot])
