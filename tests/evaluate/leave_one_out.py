"""`python -m tests.evaluate.leave_one_out DATA [NAME …]`: what the other files would choose for every constant.

Constants of the alarms, and the weights of the ranking, were chosen by people who looked at labels. Here each is moved
alone, over a small grid around its value; for every file in turn the *other* files choose, and the file that was left
out says what it gets with their choice, beside what it gets now. A constant whose default only its own file would
choose shows up as a loss.

- Alarms, at a budget of 10: of the values with which the other files have no more false findings than with the default,
  the one with which most of their attacks are found; of equals the one with fewest false findings, then the nearest.
  Files: the small ones' benign rows, attacks injected into them, a small simulated enterprise.
- Ranking: the weight with the highest mean average precision of flows over the other small files.

Panes are recorded once and alarms replayed over them. What is compiled in as a constant is tried in a process of its
own with its own cache. Not tried: `THRESHOLD` and the prior (`priors.py` measures the one under the other), what
defines a finding (`QUIET`, `TOGETHER`), the graph's own constants (`ablation` compares whole priors), and the constants
inside the terms of history, which DETECTION.md's prototypes fixed before this program was.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from flowsage.models import alarms, beacon, calibration, judgement
from flowsage.models import analytics as an
from flowsage.models.history import HistoryConfig
from flowsage.models.weights import WEIGHTS, Weights
from flowsage.pipelines.config import load
from flowsage.pipelines.enterprise import Simulation, simulate
from flowsage.pipelines.scorer import detector_config
from tests.evaluate import bars, jobs, measures, passes
from tests.evaluate.injections import injected, recording
from tests.evaluate.tables import grid

OFFICE = Simulation(days=1.6, hosts=100, seed=13, repeats=2, quiet=0.4)
SEEDS = 2
"""Of the injections."""

Outcome = tuple[int, int, int]
"""(attacks found, attacks, false findings)."""


@dataclass(frozen=True)
class Constant:
    """One constant and the values to try, the default among them.

    kind  "attribute" of a module in `path` ("calibration.YOUNG"), "compiled" the same but a constant of compiled code,
          "config" a field of `AlarmConfig`, "array" entries of one of the arrays of `analytics` ("SHARE[beacon]")
    """

    name: str
    kind: str
    default: float
    others: tuple[float, ...]

    @property
    def values(self) -> tuple[float, ...]:
        """All of them, in order."""
        return tuple(sorted((self.default, *self.others)))


def _around(name: str, kind: str, default: float, *factors: float) -> Constant:
    return Constant(name, kind, default, tuple(float(f"{default * f:.4g}") for f in factors or (0.5, 2.0)))


def constants() -> tuple[Constant, ...]:
    """Every constant of the alarms that is tried."""
    shares = {n: float(an.SHARE[an.NAMES.index(n)]) for n in ("beacon", "sweep", "exfil", "fail")}
    least = [_around(f"LEAST[{a.name}]", "array", a.least) for a in an.TABLE]
    config = detector_config(load()).alarms
    return (
        _around("SHARE[beacon]", "array", shares["beacon"], 0.375, 0.5, 0.75, 1.5),
        *(_around(f"SHARE[{n}]", "array", v) for n, v in shares.items() if n != "beacon"),
        _around("SHARE[others]", "array", float(an.SHARE[an.BURST]), 0.67, 1.5),
        *least,
        Constant("TAU[4 h]", "array", 4 * an.HOUR, (2 * an.HOUR, 8 * an.HOUR)),
        Constant("TAU[1 h]", "array", an.HOUR, (0.5 * an.HOUR, 2 * an.HOUR)),
        _around("calibration.YOUNG", "attribute", calibration.YOUNG, 0.5, 2.0, 5.0),
        _around("calibration.UNTRIED", "attribute", calibration.UNTRIED, 0.1, 0.3, 3.0),
        _around("calibration.USUAL", "attribute", calibration.USUAL),
        _around("calibration.ALIKE", "attribute", calibration.ALIKE, 0.25, 0.5, 2.0),
        Constant("calibration.TOLERATED[0]", "attribute", calibration.TOLERATED[0], (0.0, 2.0, 3.0)),
        Constant("calibration.TOLERATED[1]", "attribute", calibration.TOLERATED[1], (1.0, 3.0)),
        _around("calibration.N0", "attribute", calibration.N0),
        _around("alarms.GRANDFATHERED", "attribute", alarms.GRANDFATHERED),
        _around("settle_ns", "config", config.settle_ns),
        _around("ready_blocks", "config", config.ready_blocks),
        _around("ready_host_blocks", "config", config.ready_host_blocks),
        _around("calibration.A0", "compiled", calibration.A0),
        _around("calibration.WINSOR", "compiled", calibration.WINSOR),
        _around("calibration.BRIDGE", "compiled", calibration.BRIDGE),
        _around("judgement.LEAST_EXCESS", "compiled", judgement.LEAST_EXCESS, 0.75, 1.5),
        _around("judgement.JOINT_P", "compiled", judgement.JOINT_P),
        _around("judgement.JOINT_MOST", "compiled", judgement.JOINT_MOST, 0.67, 1.5),
        _around("analytics.ANSWERED", "compiled", an.ANSWERED),
        _around("analytics.UNANSWERED", "compiled", an.UNANSWERED),
        _around("analytics.SHARED_MOST", "compiled", an.SHARED_MOST),
        _around("analytics.SURPRISE", "compiled", an.SURPRISE, 0.5, 1.5),
        _around("analytics.SURPRISE_MOST", "compiled", an.SURPRISE_MOST, 0.75, 1.5),
        _around("beacon.JITTER", "compiled", beacon.JITTER),
    )


@contextlib.contextmanager
def using(c: Constant, value: float) -> Iterator[alarms.AlarmConfig]:
    """The configuration of alarms while the constant has this value."""
    config = detector_config(load()).alarms
    name, _, entry = c.name.rstrip("]").partition("[")
    if c.kind == "config":
        yield replace(config, **{c.name: type(getattr(config, c.name))(value)})
        return
    if c.kind == "array":
        array: np.ndarray = getattr(an, name)
        before = array.copy()
        array[:] = _entries(name, entry, value, before)
        yield config
        array[:] = before
        return
    module_name, _, name = name.partition(".")
    module = importlib.import_module(f"flowsage.models.{module_name}")
    old = getattr(module, name)
    new = type(old)(value) if not entry else tuple(value if k == int(entry) else v for k, v in enumerate(old))
    setattr(module, name, new)
    yield config
    setattr(module, name, old)


def _entries(name: str, entry: str, value: float, array: np.ndarray) -> np.ndarray:
    """The array of `analytics` with the value in those entries that are meant."""
    if name == "TAU":
        return np.where(array == {"4 h": 4 * an.HOUR, "1 h": an.HOUR}[entry], value, array)
    if entry == "others":
        return np.where(array == array[an.BURST], value, array)
    a = an.TABLE[an.NAMES.index(entry)]
    if name == "LEAST" and a.tau > 0:
        value = float(np.log1p(value / a.scale))
    return np.where(np.arange(len(array)) == an.NAMES.index(entry), value, array)


@dataclass(frozen=True)
class Case:
    """One recording as alarms see it, and its truth."""

    file: str
    panes: list[passes.Pane]
    flows: pd.DataFrame
    undirected: bool


def _case(table: pa.Table, file: str) -> Case:
    panes: list[passes.Pane] = []
    undirected = file in bars.UNDIRECTED
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.parquet"
        pq.write_table(table, path)
        passes.score(path, budgets=(), undirected=undirected, scores=False, panes=panes)
        return Case(file, panes, jobs._whole(path), undirected)


def record(data: Path) -> list[Case]:
    """Benign rows of every small file, these with attacks in them, and the simulated office."""
    cases = [_case(simulate(OFFICE)[0], "office")]
    for name in bars.SMALL:
        table = pq.read_table(data / f"{name}.parquet")
        cases.append(_case(table.filter(table.column("label").to_numpy() == 0), name))
        if name not in bars.INJECTED:
            continue
        cases += [_case(table, name) for table in injected(recording(data / f"{name}.parquet"), SEEDS)]
    return cases


def judge(cases: list[Case], config: alarms.AlarmConfig) -> dict[str, Outcome]:
    """What is found, and false, in each file. False findings count where nothing was put in."""
    out: dict[str, Outcome] = {}
    for case in cases:
        a, kept = alarms.Alarms(config), passes.Kept()
        for p in case.panes:
            kept.add(a.step(p.now_ns, p.contacts, p.looked, p.misplaced))
        m = measures.match(case.flows, kept.table(), undirected=case.undirected)
        found, n, false = out.get(case.file, (0, 0, 0))
        counts = case.file == "office" or not m.incidents
        out[case.file] = (found + m.found, n + m.incidents, false + m.false * counts)
    return out


def point(c: Constant, value: float, recorded: Path, cases: list[Case] | None) -> dict[str, Outcome]:
    """The outcome with one value; of a compiled constant in a fresh process that compiles anew."""
    if c.kind != "compiled" or cases is None:
        with using(c, value) as config:
            return judge(cases if cases is not None else pickle.loads(recorded.read_bytes()), config)
    with tempfile.TemporaryDirectory() as cache:
        arguments = [sys.executable, "-m", "tests.evaluate.leave_one_out", str(recorded), c.name, "--at", repr(value)]
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}
        said = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True).stdout
    return {file: (o[0], o[1], o[2]) for file, o in json.loads(said).items()}


def choose(c: Constant, points: Mapping[float, Mapping[str, Outcome]], without: str) -> float:
    """The value that the files other than `without` choose."""

    def total(value: float, k: int) -> int:
        return sum(o[k] for file, o in points[value].items() if file != without)

    allowed = [v for v in c.values if total(v, 2) <= total(c.default, 2)]
    return min(allowed, key=lambda v: (-total(v, 0), total(v, 2), abs(v - c.default)))


def row(c: Constant, points: Mapping[float, Mapping[str, Outcome]]) -> list[str]:
    """A line of the table: every value on all files, what the others choose for each file, and what it gets."""
    files = list(points[c.default])
    all_of = {v: [sum(o[k] for o in points[v].values()) for k in (0, 2)] for v in c.values}
    chosen = {f: choose(c, points, f) for f in files}
    got = [sum(points[chosen[f]][f][k] for f in files) for k in (0, 2)]
    other = ", ".join(f"{f} {v:g}" for f, v in chosen.items() if v != c.default)
    return [c.name, f"{c.default:g}", "  ".join(f"{v:g}: {a}/{b}" for v, (a, b) in all_of.items()), other or "the same",
            "{}/{}".format(*all_of[c.default]), "{}/{}".format(*got)]  # fmt: skip


def weights(data: Path, names: list[str]) -> list[list[str]]:
    """The same for the weights of the ranking: flow AP on the last 70 % of each small file."""
    flows = {n: jobs._whole(data / f"{n}.parquet") for n in bars.SMALL}

    def ap(w: Weights) -> dict[str, float]:
        out = {}
        for n in bars.SMALL:
            u = n in bars.UNDIRECTED
            said = passes.score(
                data / f"{n}.parquet", undirected=u, priors=("none",), budgets=(),
                history=HistoryConfig(undirected=u, weights=w, threads=1),
            )  # fmt: skip
            late = measures.late(len(flows[n]))
            out[n] = measures.area(flows[n].label.to_numpy()[late], measures.finite(said.flow_score)[late]).ap
        return out

    now, rows = ap(WEIGHTS), []
    for f in fields(Weights):
        if names and f.name not in names:
            continue
        default = float(getattr(WEIGHTS, f.name))
        tried = {default: now} | {v: ap(replace(WEIGHTS, **{f.name: v})) for v in (default / 2, 2 * default)}

        def others(v: float, without: str, tried: dict[float, dict[str, float]] = tried) -> float:
            return sum(a for n, a in tried[v].items() if n != without)

        chosen = {n: max(tried, key=lambda v, n=n: others(v, n)) for n in bars.SMALL}  # type: ignore[misc]
        means = "  ".join(f"{v:g}: {np.mean(list(t.values())):.4f}" for v, t in sorted(tried.items()))
        told = ", ".join(f"{n} {v:g} ({now[n]:.3f} → {tried[v][n]:.3f})" for n, v in chosen.items() if v != default)
        ours, got = np.mean(list(now.values())), np.mean([tried[v][n] for n, v in chosen.items()])
        rows.append([f.name, f"{default:g}", means, told or "the same", f"{ours:.4f}", f"{got:.4f}"])
    return rows


def main() -> None:
    """Record, try every value, print the tables."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of the labelled flow files")
    parser.add_argument("names", nargs="*", metavar="NAME", help="constants or weights; default all")
    parser.add_argument("--recorded", type=Path, help="keep what was recorded in this file, or take it from there")
    parser.add_argument("--at", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    chosen = [c for c in constants() if not arguments.names or c.name in arguments.names]
    if arguments.at is not None:  # the data are a recording: this is the process of one compiled value
        print(json.dumps(point(chosen[0], arguments.at, arguments.data, None)))
        return
    with tempfile.TemporaryDirectory() as folder:
        recorded: Path = arguments.recorded or Path(folder) / "cases"
        if not recorded.exists():
            recorded.write_bytes(pickle.dumps(record(arguments.data)))
        cases: list[Case] = pickle.loads(recorded.read_bytes())
        default = judge(cases, detector_config(load()).alarms)
        rows = []
        for c in chosen:
            started = time.perf_counter()
            points = {v: default if v == c.default else point(c, v, recorded, cases) for v in c.values}
            rows.append(row(c, points))
            print(f"{c.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    head = ["constant", "default", "each value: found/false on all", "the others choose", "now", "left out"]
    n = sum(o[1] for o in default.values())
    print(grid(f"Alarms at budget 10, {n} attacks: {default}", head, rows))
    head = ["weight", "default", "mean flow AP", "the others choose (AP of that file)", "now", "left out"]
    print("\n" + grid("Ranking: the small files", head, weights(arguments.data, arguments.names)))


if __name__ == "__main__":
    main()
