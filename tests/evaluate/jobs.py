"""The measurements, as jobs that a pool of processes runs: each takes a data folder and gives plain numbers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from flowsage.graph.addresses import Internal
from flowsage.pipelines.enterprise import Simulation, simulate
from tests.evaluate import measures
from tests.evaluate.bars import BUDGETS, FULL, INJECTED, SMALL, UNDIRECTED
from tests.evaluate.injections import CONFOUNDERS, disturb, injected, recording
from tests.evaluate.measures import Area, Found
from tests.evaluate.passes import DEFAULT, score

ENTERPRISE = Simulation(days=4, hosts=300, seed=11, repeats=2)
RELATIONS = Simulation(
    days=2, hosts=200, seed=12, repeats=12, quiet=0.3, attacks=("lateral", "credentials", "slow-scan", "beacon-5min")
)
"""Where the ablation of the prior is measured: meetings count, so most attacks are of kinds that only meet."""
PRIORS = ("none", "popularity", "mlp", "sage1", "sage2", DEFAULT)


@dataclass(frozen=True)
class Result:
    """What one job found, by name; seconds by the clock, and of CPU."""

    job: str
    seconds: float
    cpu: float
    values: dict[str, Any] = field(default_factory=dict)


def _whole(path: Path) -> pd.DataFrame:
    columns = ["start_ns", "src_ip", "dst_ip", "dst_port", "label", "attack"]
    kept = [c for c in columns if c in pq.read_schema(path).names]
    return pq.read_table(path, columns=kept).to_pandas()


def _benign(path: Path, folder: Path) -> Path:
    table = pq.read_table(path)
    out = folder / f"benign_{path.stem}.parquet"
    pq.write_table(table.filter(table.column("label").to_numpy() == 0), out)
    return out


def file(data: Path, name: str) -> dict[str, Any]:
    """Ranking of one labelled file."""
    path, undirected = data / f"{name}.parquet", name in UNDIRECTED
    flows = _whole(path)
    # The prior is left out of the largest: in ranking it says little, and takes as long as the rest.
    said = score(path, undirected=undirected, priors=("none" if name in FULL else DEFAULT,), budgets=(10.0,))
    return ranking(flows, said, undirected=undirected, rows=slice(None) if name in FULL else None) | (
        {"macro": measures.macro_auc(flows, said.flow_score)} if name in FULL else {}
    )


def ranking(flows: pd.DataFrame, said: Any, *, undirected: bool = False, rows: slice | None = None) -> dict[str, Any]:
    """Areas of flows and host-windows, and of the beacon channel."""
    part = measures.late(len(flows)) if rows is None else rows
    y = flows.label.to_numpy()[part]
    frame = flows.assign(beacon_score=said.beacon_score)
    return {
        "flow": measures.area(y, measures.finite(said.flow_score)[part]),
        "host": measures.host_area(flows, said.hosts, undirected=undirected),
        "flow by beacon": measures.area(y, measures.finite(said.beacon_score)[part]),
        "host by beacon": measures.host_area(frame, said.hosts, undirected=undirected, beacon=True),
    }


def benign(data: Path, name: str, prior: str = DEFAULT) -> dict[str, Any]:
    """Findings on the benign rows of a file, at each budget."""
    with tempfile.TemporaryDirectory() as folder:
        path = _benign(data / f"{name}.parquet", Path(folder))
        flows = _whole(path)
        said = score(path, budgets=BUDGETS, priors=(prior,), undirected=name in UNDIRECTED, scores=False)
    undirected = name in UNDIRECTED
    return {"found": {b: measures.match(flows, said.findings[prior, b], undirected=undirected) for b in BUDGETS}}


def enterprise(data: Path | None = None, settings: Simulation = ENTERPRISE, prior: str = DEFAULT) -> dict[str, Any]:
    """Ranking and findings of a simulated enterprise."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "enterprise.parquet"
        table, _ = simulate(settings)
        pq.write_table(table, path)
        flows = _whole(path)
        said = score(path, budgets=BUDGETS, priors=(prior,))
    found = {b: measures.match(flows, said.findings[prior, b]) for b in BUDGETS}
    return ranking(flows, said) | {"found": found, "findings": said.findings[prior, 10.0], "flows": len(flows)}


def ablation(data: Path | None = None, priors: tuple[str, ...] = PRIORS) -> dict[str, Any]:
    """First meetings of a simulated enterprise by each prior: average precision, and what is found with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "relations.parquet"
        table, _ = simulate(RELATIONS)
        pq.write_table(table, path)
        flows = _whole(path)
        said = score(path, budgets=(10.0,), priors=priors, scores=False)
    return {"meetings": {p: meetings(flows, said.tails.get(p)) for p in priors},
            "found": {p: measures.match(flows, said.findings[p, 10.0]) for p in priors}}  # fmt: skip


def meetings(flows: pd.DataFrame, tails: np.ndarray | None) -> dict[str, Area]:
    """Area of −tail over what was asked about: "all", those with hosts of our own ("inside"), and among these each
    kind of attack against everything benign."""
    if tails is None:
        return {}
    asked = np.isfinite(tails)
    kind = flows.attack.fillna("").str.partition("#")[0].to_numpy()
    part = flows.assign(plausible=tails, kind=kind)[asked]
    # The flows of one window to one contact are one meeting.
    part = part.assign(w=part.start_ns // measures.MINUTE_NS)
    once = part.drop_duplicates(["w", "src_ip", "dst_ip", "dst_port"])
    y, s = once.label.to_numpy(), -once.plausible.to_numpy()
    names = once.dst_ip.astype(str)
    ours = {n: Internal().one(n) for n in names.unique()}
    inside = names.map(ours).to_numpy(np.bool_)
    out = {"all": measures.area(y, s), "inside": measures.area(y[inside], s[inside])}
    for name in sorted(set(once.kind[inside]) - {""}):
        chosen = inside & ((y == 0) | (once.kind == name).to_numpy())
        out[name] = measures.area(y[chosen], s[chosen])
    return out


def ablate_file(data: Path, name: str) -> dict[str, Any]:
    """The same on a labelled file."""
    flows = _whole(data / f"{name}.parquet")
    said = score(data / f"{name}.parquet", priors=PRIORS[1:], undirected=name in UNDIRECTED, scores=False)
    return {"meetings": {p: meetings(flows, said.tails[p]) for p in PRIORS[1:]}}


def injections(data: Path, name: str, seeds: int = 3) -> dict[str, Any]:
    """Attacks of every kind in the benign rows of a file, as many passes as it takes to place `seeds` of each."""
    r = recording(data / f"{name}.parquet")
    found: dict[float, list[Found]] = {b: [] for b in BUDGETS}
    passes = 0
    for table in injected(r, seeds):
        for b, one in _matched(table).items():
            found[b].append(one)
        passes += 1
    return {"found": found, "passes": passes}


def _matched(table: pa.Table) -> dict[float, Found]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "injected.parquet"
        pq.write_table(table, path)
        flows = _whole(path)
        said = score(path, budgets=BUDGETS, scores=False)
    return {b: measures.match(flows, said.findings[DEFAULT, b]) for b in BUDGETS}


def confounders(data: Path, name: str, seeds: int = 2) -> dict[str, Any]:
    """Findings, while each harmless disturbance lasts and an hour after, more than without it, at budget 10."""
    r = recording(data / f"{name}.parquet")
    plain = _alarms(r.table)
    extra: dict[str, list[int]] = {c: [] for c in CONFOUNDERS}
    for c in CONFOUNDERS:
        for seed in range(seeds):
            table, begin, end = disturb(r, c, seed)
            with_it, without = (np.sum((a >= begin) & (a <= end + measures.HOUR_NS)) for a in (_alarms(table), plain))
            extra[c].append(int(with_it) - int(without))
    return {"extra": extra}


def _alarms(table: pa.Table) -> np.ndarray:
    """When findings were raised at budget 10, ns."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disturbed.parquet"
        pq.write_table(table, path)
        alarms: np.ndarray = score(path, scores=False).findings[DEFAULT, 10.0].alarm_ns.to_numpy()
        return alarms


JOBS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "ablation": ablation,
    "enterprise": enterprise,
    **{f"ablate {n}": lambda data, n=n: ablate_file(data, n) for n in ("ctu50_sensors", "dapt2020", "ctu_sme11")},  # type: ignore[misc]
    **{f"rank {n}": lambda data, n=n: file(data, n) for n in ("darpa98", "rita_beacon", "ctu50_sensors")},  # type: ignore[misc]
    "benign darpa98": lambda data: benign(data, "darpa98", "none"),
    **{f"inject {n}": lambda data, n=n: injections(data, n) for n in INJECTED},  # type: ignore[misc]
    **{f"confound {n}": lambda data, n=n: confounders(data, n) for n in INJECTED},  # type: ignore[misc]
    **{f"rank {n}": lambda data, n=n: file(data, n) for n in ("westermo", "dapt2020", "iot23_34_1", "ctu_sme11")},  # type: ignore[misc]
    **{f"benign {n}": lambda data, n=n: benign(data, n) for n in SMALL},  # type: ignore[misc]
}
"""Longest first."""


def run(job: str, data: Path) -> Result:
    """One job, in a process of its own thread."""
    torch.set_num_threads(1)
    started, busy = time.perf_counter(), time.process_time()
    values = JOBS[job](data)
    return Result(job, time.perf_counter() - started, time.process_time() - busy, values)
