"""One pass over a flow file with several budgets and several priors at once.

History is the same for all of them, so it is kept once; every prior has its own memory, and every (prior, budget) its
own alarms. The steps are those of `Detector`, on panes and windows as `flowsage replay` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from flowsage.graph.addresses import PRIVATE, Internal
from flowsage.graph.build import Contacts, contacts
from flowsage.graph.flows import FlowBatch
from flowsage.graph.window import WindowBuffer, in_order
from flowsage.models.alarms import Alarms
from flowsage.models.calibration import Calibration
from flowsage.models.detector import ALL_TIME, ClosedWindows
from flowsage.models.finding import Finding
from flowsage.models.history import History, HistoryConfig
from flowsage.models.history_scores import ContactTerms
from flowsage.models.meeting import MeetingPrior
from flowsage.pipelines.config import load
from flowsage.pipelines.scorer import detector_config
from flowsage.pipelines.sources import FlowFile

DEFAULT = "sage2-sketches"


@dataclass
class Scored:
    """What a pass says. flow_score, beacon_score f8[rows] in input order; tails: prior → f8[rows], NaN where not asked;
    hosts: columns host, window_end_ns, score; findings: (prior, budget) → one row a finding."""

    flow_score: np.ndarray
    beacon_score: np.ndarray
    tails: dict[str, np.ndarray]
    hosts: pd.DataFrame
    findings: dict[tuple[str, float], pd.DataFrame]


@dataclass(frozen=True)
class Pane:
    """What the alarms are shown of a pane: `Alarms.step` takes these."""

    now_ns: int
    contacts: Contacts
    looked: ContactTerms
    misplaced: np.ndarray


class Kept:
    """Findings as `flowsage replay --findings F.parquet` keeps them: the last word, and when the first was said."""

    def __init__(self) -> None:
        self._last: dict[str, Finding] = {}
        self._first: dict[str, int] = {}

    def add(self, findings: list[Finding]) -> None:
        for f in findings:
            self._last[f.uid] = f
            self._first.setdefault(f.uid, f.alarm_ns)

    def table(self) -> pd.DataFrame:
        rows = [
            {"host": f.host, "role": f.role, "peer": f.peer, "analytic": f.analytic, "start_ns": f.start_ns,
             "alarm_ns": self._first[uid], "p_value": f.p_value, "sentence": f.sentence}
            for uid, f in self._last.items()
        ]  # fmt: skip
        columns = ["host", "role", "peer", "analytic", "start_ns", "alarm_ns", "p_value", "sentence"]
        return pd.DataFrame(rows, columns=columns)


def score(
    path: Path,
    *,
    budgets: tuple[float, ...] = (10.0,),
    priors: tuple[str, ...] = (DEFAULT,),
    undirected: bool = False,
    scores: bool = True,
    calibrations: list[Calibration] | None = None,
    panes: list[Pane] | None = None,
    history: HistoryConfig | None = None,
) -> Scored:
    """Everything of one file with the default configuration; without `scores` only findings are kept.

    Scores are with what the alarms of the last prior say, at the budget of 10 where it is among them.
    The calibrations of all (prior, budget) are appended to `calibrations`, as they are in the end; what alarms are
    shown (by the last prior) to `panes`, for those who try other alarms.
    """
    flags = {"model": {"undirected": undirected, "threads": 1}}
    made = {p: detector_config(load(flags=flags | {"model": flags["model"] | {"prior": p}})) for p in priors}
    config = next(iter(made.values()))
    known = History(history or config.history)
    alarms = {(p, b): Alarms(replace(made[p].alarms, budget=b)) for p in priors for b in budgets}
    ranking = alarms[priors[-1], 10.0 if 10.0 in budgets else budgets[-1]]
    names = next(iter(made.values())).alarms.internal
    internal = Internal(PRIVATE if names is None else names)
    prior = {p: MeetingPrior(made[p].meeting, internal) if made[p].graph else None for p in priors}
    kept = {key: Kept() for key in alarms}
    file = FlowFile(path, undirected=undirected)
    buffer = WindowBuffer(config.window_ns)
    flow_score, beacon_score = np.full(file.rows, np.nan), np.full(file.rows, np.nan)
    tails = {p: np.full(file.rows, np.nan) for p in priors if prior[p]}
    host_parts: list[pd.DataFrame] = []

    def misplaced(p: MeetingPrior | None, seen: Contacts, first: np.ndarray) -> np.ndarray:
        return np.full(len(seen), np.nan) if p is None else p.misplaced(seen, first)

    def close(flows: FlowBatch | None) -> None:
        if flows is None or not len(flows):
            return
        run = contacts(flows, config.window_ns)
        said = known.score(flows, run)
        first = said.known == 0
        asked = np.full(len(run), np.nan)
        for name, p in prior.items():
            if p is None:
                continue
            asked = np.full(len(run), np.nan)
            for k, (begin, end) in enumerate(zip(run.offsets[:-1], run.offsets[1:], strict=True)):
                window = run.slice(k)
                asked[begin:end] = p.tail(window, first[begin:end])
                p.learn(window, first[begin:end])
            tails[name][flows.row] = asked[run.of_flow]
        if scores:
            closed = ClosedWindows(flows, run, said, asked, ranking.take(flows.hosts.hash[said.host]), undirected)
            flow_score[flows.row], beacon_score[flows.row] = closed.flow_score, said.beacon_score
            names = pc.take(flows.hosts.names, said.host).to_numpy(zero_copy_only=False).astype(str)
            end = (said.window + 1) * config.window_ns
            host_parts.append(pd.DataFrame({"host": names, "window_end_ns": end, "score": closed.host_score}))

    for step in file.steps(config.alarms.pane_ns):
        buffer.add(step.flows, "file", step.watermark_ns)
        seen = contacts(in_order(step.flows), ALL_TIME)
        looked = known.lookup(seen)
        for p in priors:
            out = misplaced(prior[p], seen, looked.known == 0)
            if panes is not None and p == priors[-1]:
                panes.append(Pane(step.now_ns, seen, looked, out))
            for b in budgets:
                kept[p, b].add(alarms[p, b].step(step.now_ns, seen, looked, out))
        close(buffer.close_ready())
    close(buffer.flush())
    if calibrations is not None:
        calibrations.extend(a.calibration for a in alarms.values())
    hosts = pd.concat(host_parts) if host_parts else pd.DataFrame({"host": [], "window_end_ns": [], "score": []})
    return Scored(flow_score, beacon_score, tails, hosts, {key: k.table() for key, k in kept.items()})
