"""`python -m tests.evaluate.cold DATA`: a sensor that has just started, and the attack is already there, or almost.

Two kinds of runs, each seen by a detector that knows nothing, for `HOURS`:

- *injected*: the benign rows of a recording (the small files, a simulated office) from a random moment on, with one
  attack, of each of the twenty kinds in turn, that begins between minute 0 and 30, several seeds;
- *labelled*: a labelled file from 0 to 30 minutes before one of its own attacks on.

Area of flows (mean over runs), and attacks found and false findings at each budget.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from flowsage.pipelines.enterprise import ATTACKS, Flows, Simulation, simulate
from tests.evaluate import bars, jobs, measures
from tests.evaluate.injections import Recording, merged, recording, scene
from tests.evaluate.measures import Area, Found
from tests.evaluate.passes import DEFAULT, score
from tests.evaluate.tables import grid

HOURS = 4.0
LEAD_S = 1_800.0
"""An attack begins at most so long after the sensor has started."""

OFFICE = Simulation(days=1, hosts=100, seed=17, repeats=0)
LABELLED = ("dapt2020", "ctu50_sensors", "iot23_34_1", "ctu_sme11", "westermo")


@dataclass(frozen=True)
class Run:
    """What one run gave. `kind` of the attack, `after_s` how long after the start it began."""

    where: str
    kind: str
    after_s: float
    area: Area
    found: dict[float, Found]


def early(r: Recording, kind: str, seed: int) -> tuple[pa.Table, float]:
    """The recording for some hours, with an attack that begins in the first half hour, and how late it begins, s."""
    rng = np.random.default_rng([seed, list(ATTACKS).index(kind), len(r.table), 21])
    attacker = str(rng.choice(r.sources))
    starts = r.active[attacker]
    enough = starts[(starts > 0) & (starts < max(r.span_s - HOURS * 3_600.0, 0.5 * r.span_s))]
    at = float(rng.choice(enough if len(enough) else starts[: 1 + len(starts) // 2]))
    after = min(at, float(rng.uniform(0.0, LEAD_S)))
    cut = window(r.table, r.begin_ns + int((at - after) * 1e9))
    here = replace(r, table=cut, begin_ns=int(cut.column("start_ns")[0].as_py()), span_s=HOURS * 3_600.0)
    f = Flows(rng, here.begin_ns)
    begin = r.begin_ns / 1e9 + at - here.begin_ns / 1e9
    i = f.attack(f"{kind}#{seed}")
    ATTACKS[kind](f, scene(f, here, attacker, begin), i)
    return merged(here, f), begin


def window(table: pa.Table, begin_ns: int) -> pa.Table:
    """The rows of `HOURS` from a moment on."""
    start = table.column("start_ns").to_numpy()
    return table.filter((start >= begin_ns) & (start < begin_ns + int(HOURS * 3_600e9)))


def labelled(path: Path, seeds: int) -> Iterator[tuple[pa.Table, float]]:
    """A labelled file from before a random attack row on, and how much later that comes, s."""
    table = pq.read_table(path)
    start, label = table.column("start_ns").to_numpy(), table.column("label").to_numpy()
    for seed in range(seeds):
        rng = np.random.default_rng([seed, 22])
        # Attack rows come in bursts: an hour with some is as likely as any other.
        hours = np.unique(start[label == 1] // measures.HOUR_NS)
        begin = int(start[(label == 1) & (start // measures.HOUR_NS == rng.choice(hours))][0])
        after = float(rng.uniform(0.0, LEAD_S))
        yield window(table, begin - int(after * 1e9)), after


def run(table: pa.Table, where: str, kind: str, after: float) -> Run:
    """One run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cold.parquet"
        pq.write_table(table, path)
        flows, undirected = jobs._whole(path), where in bars.UNDIRECTED
        said = score(path, budgets=bars.BUDGETS, undirected=undirected)
    found = {b: measures.match(flows, said.findings[DEFAULT, b], undirected=undirected) for b in bars.BUDGETS}
    return Run(where, kind, after, measures.area(flows.label.to_numpy(), measures.finite(said.flow_score)), found)


def tables(where: str, data: Path, seeds: int) -> Iterator[tuple[str, pa.Table, float]]:
    """All runs in one place: kind, "labelled" or one of ATTACKS, flows, seconds until the attack."""
    if where in LABELLED:
        yield from (("labelled", *one) for one in labelled(data / f"{where}.parquet", seeds))
    if where not in bars.INJECTED and where != "office":
        return
    with tempfile.TemporaryDirectory() as folder:
        path = data / f"{where}.parquet"
        if where == "office":
            path = Path(folder) / "office.parquet"
            table = simulate(OFFICE)[0]
            hour = (table.column("start_ns").to_numpy() // measures.HOUR_NS) % 24
            pq.write_table(table.filter((hour >= 8) & (hour < 19)), path)
        r = recording(path)
    for kind in ATTACKS:
        yield from ((kind, *early(r, kind, seed)) for seed in range(seeds))


def place(where: str, data: Path, seeds: int) -> list[Run]:
    """All runs in one place."""
    torch.set_num_threads(1)
    return [run(table, where, kind, after) for kind, table, after in tables(where, data, seeds)]


def row(name: str, runs: list[Run]) -> list[str]:
    """A line of the table."""
    areas = [r.area for r in runs if np.isfinite(r.area.auc)]
    cells = [name, str(len(runs))]
    cells.append(f"{np.mean([a.auc for a in areas]):.3f}/{np.mean([a.ap for a in areas]):.3f}" if areas else "")
    for b in bars.BUDGETS:
        found = [r.found[b] for r in runs]
        delays = [d for f in found for _, _, each in f.by_kind.values() for d in each]
        late = f" {np.median(delays):.0f} min" if delays else ""
        hits, all_of = sum(f.found for f in found), sum(f.incidents for f in found)
        cells.append(f"{hits}/{all_of}{late}, {sum(f.false for f in found)}")
    return cells


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of the labelled flow files")
    parser.add_argument("places", nargs="*", metavar="PLACE", help="files, or office; default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_intermixed_args()
    places = arguments.places or [*LABELLED, "office"]
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        done = list(pool.map(partial(place, data=arguments.data, seeds=arguments.seeds), places))
    runs = [r for part in done for r in part]
    head = ["", "runs", "flow AUC/AP", *(f"found and false at {b:g}" for b in bars.BUDGETS)]
    for title, part in (
        ("A new sensor, attacks of a file's own", [r for r in runs if r.kind == "labelled"]),
        ("A new sensor, injected attacks", [r for r in runs if r.kind != "labelled"]),
    ):
        if part:
            rows = [row(w, [r for r in part if r.where == w]) for w in places]
            rows += [row(k, [r for r in part if r.kind == k]) for k in ATTACKS]
            early_ones = [r for r in part if r.after_s < 900.0]
            rows += [row("begins before minute 15", early_ones), row("all", part)]
            print(grid(title, head, [r for r in rows if r[1] != "0"]), end="\n\n")


if __name__ == "__main__":
    main()
