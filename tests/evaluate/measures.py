"""The measures: areas over scores, findings against incidents (the protocol of the labelled flow files)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score  # type: ignore[import-untyped]

MINUTE_NS, HOUR_NS = 60 * 10**9, 3_600 * 10**9
LATE = 0.3
"""Scores are measured on the rows after this share."""

LEAST_ROWS = 20
"""Rows that an attack type needs to count in the macro mean."""


@dataclass(frozen=True)
class Area:
    """Area under the ROC curve, average precision, share of positives."""

    auc: float
    ap: float
    base: float

    def __str__(self) -> str:
        return f"{self.auc:.3f}/{self.ap:.3f}"


def finite(score: np.ndarray) -> np.ndarray:
    """Scores to rank: not ready (NaN) is the least anomalous of all."""
    s = np.asarray(score, np.float64).copy()
    known = np.isfinite(s)
    low, high = (s[known].min() - 1, s[known].max() + 1) if known.any() else (0.0, 0.0)
    s[np.isnan(s) | np.isneginf(s)] = low
    s[np.isposinf(s)] = high
    return s


def area(y: np.ndarray, score: np.ndarray) -> Area:
    """Of labels 0 and 1 and scores [n]; NaN where there is only one label."""
    y = np.asarray(y)
    if not len(y) or y.min() == y.max():
        return Area(np.nan, np.nan, float(y.mean()) if len(y) else np.nan)
    return Area(float(roc_auc_score(y, score)), float(average_precision_score(y, score)), float(y.mean()))


def late(rows: int) -> slice:
    """The rows on which scores are measured."""
    return slice(int(rows * LATE), rows)


def macro_auc(flows: pd.DataFrame, score: np.ndarray) -> float:
    """Mean over attack types of the AUC of each against all benign rows."""
    y, s = flows.label.to_numpy(), finite(score)
    benign = np.sort(s[y == 0])
    if not len(benign):
        return float("nan")
    areas = []
    for rows in flows[y == 1].groupby("attack").indices.values():
        if len(rows) >= LEAST_ROWS:
            own = s[np.flatnonzero(y == 1)[rows]]
            below = np.searchsorted(benign, own, "left") + np.searchsorted(benign, own, "right")
            areas.append(float(below.mean() / 2 / len(benign)))
    return float(np.mean(areas)) if areas else float("nan")


def host_area(flows: pd.DataFrame, hosts: pd.DataFrame, *, undirected: bool = False, beacon: bool = False) -> Area:
    """Of late host-windows: positive if the host sent a flow labelled 1 in that minute.

    hosts: columns host, window_end_ns, score. beacon: flows carry a column beacon_score that is used instead, the
    highest of what the host sent.
    """
    part = flows.iloc[late(len(flows))]
    ends = ["src_ip", "dst_ip"] if undirected else ["src_ip"]
    columns = ["label", "beacon_score"] if beacon else ["label"]
    w = part.start_ns.to_numpy() // MINUTE_NS
    parts = [
        pd.DataFrame({"host": part[e].astype(str), "w": w} | {c: part[c].to_numpy() for c in columns}) for e in ends
    ]
    truth = pd.concat(parts).groupby(["host", "w"], as_index=False).max()
    if beacon:
        return area(truth.label.to_numpy(), finite(truth.beacon_score.to_numpy()))
    scored = hosts.assign(w=(hosts.window_end_ns - 1) // MINUTE_NS).groupby(["host", "w"], as_index=False).score.max()
    truth = truth.merge(scored, on=["host", "w"], how="left")
    return area(truth.label.to_numpy(), finite(truth.score.to_numpy()))


def host_days(flows: pd.DataFrame, *, undirected: bool = False) -> float:
    """Distinct (source, hour) pairs over 24."""
    ends = ["src_ip", "dst_ip"] if undirected else ["src_ip"]
    hour = flows.start_ns.to_numpy() // HOUR_NS
    seen = pd.concat([pd.DataFrame({"host": flows[e], "hour": hour}) for e in ends]).drop_duplicates()
    return len(seen) / 24


@dataclass(frozen=True)
class Incident:
    """Attack rows of one name and one attacker (one victim where the sources outnumber the targets three to one)."""

    kind: str
    first_ns: int
    last_ns: int
    attackers: frozenset[str]
    victims: frozenset[str]


def incidents(flows: pd.DataFrame) -> list[Incident]:
    """A name with '#' is one incident; others are split by attacker or victim, and at gaps over an hour."""
    found: list[Incident] = []
    for name, rows in flows[flows.label == 1].groupby("attack", dropna=False):
        parts = [rows]
        if "#" not in str(name):
            by = "dst_ip" if rows.src_ip.nunique() > 3 * rows.dst_ip.nunique() else "src_ip"
            parts = []
            for _, one in rows.groupby(by, observed=True):
                cut = np.flatnonzero(np.diff(one.start_ns.to_numpy()) > HOUR_NS) + 1
                parts += [one.iloc[i:j] for i, j in zip([0, *cut], [*cut, len(one)], strict=True)]
        found += [
            Incident(
                str(name).partition("#")[0], int(p.start_ns.min()), int(p.start_ns.max()),
                frozenset(p.src_ip.astype(str)), frozenset(p.dst_ip.astype(str)),
            )
            for p in parts
        ]  # fmt: skip
    return found


def is_on(incident: Incident, f: pd.DataFrame, *, undirected: bool = False) -> np.ndarray:
    """Which findings (host, role, peer, alarm_ns) speak of an incident, from its first row to a minute after its last:
    an attacker as source, a victim as target, or either with the other as peer."""
    begin = incident.first_ns // MINUTE_NS * MINUTE_NS
    when = f.alarm_ns.between(begin, incident.last_ns + 2 * MINUTE_NS)
    bad, hit = f.host.isin(incident.attackers), f.host.isin(incident.victims)
    does = bad & ((f.role == "source") | undirected | f.peer.isin(incident.victims))
    suffers = hit & ((f.role == "target") | undirected | f.peer.isin(incident.attackers))
    on: np.ndarray = (when & (does | suffers)).to_numpy()
    return on


@dataclass(frozen=True)
class Found:
    """Findings against incidents. `by_kind`: kind → (incidents, found, delays in minutes of those found)."""

    host_days: float
    findings: int
    false: int
    incidents: int
    found: int
    by_kind: dict[str, tuple[int, int, list[float]]]
    false_by: dict[str, int]
    """False findings by analytic."""

    @property
    def false_rate(self) -> float:
        """False findings per 100 host-days."""
        return 100 * self.false / max(self.host_days, 1e-9)

    @property
    def recall(self) -> float:
        return self.found / self.incidents if self.incidents else float("nan")


def match(flows: pd.DataFrame, findings: pd.DataFrame, *, undirected: bool = False) -> Found:
    """What was found, and what was false."""
    matched = np.zeros(len(findings), np.bool_)
    by_kind: dict[str, tuple[int, int, list[float]]] = {}
    cases = incidents(flows)
    found = 0
    for case in cases:
        hits = is_on(case, findings, undirected=undirected)
        matched |= hits
        n, k, delays = by_kind.get(case.kind, (0, 0, []))
        if hits.any():
            found += 1
            k += 1
            delays.append((findings.alarm_ns.to_numpy()[hits].min() - case.first_ns) / MINUTE_NS)
        by_kind[case.kind] = (n + 1, k, delays)
    return Found(
        host_days(flows, undirected=undirected), len(findings), int((~matched).sum()), len(cases), found, by_kind,
        {str(k): int(v) for k, v in findings.analytic[~matched].value_counts().items()},
    )  # fmt: skip
