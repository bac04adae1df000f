"""`python -m tests.evaluate.priors DATA`: the prior of the calibration, measured anew, and leaving one file out.

The prior is the one place where labels enter the detector: how often, and by how much, the rows labelled benign of
several networks exceed what a key did before (`models/prior.py` says how they are put together). Leaving a file out
says what its own part in the prior is worth to it, that is, what a network never seen can expect.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flowsage.models import analytics as an
from flowsage.models.calibration import Calibration
from flowsage.models.prior import GROUPS, PRIOR
from tests.evaluate import bars, jobs, passes
from tests.evaluate.passes import DEFAULT

MOST, RATE_AT, MEAN_AT = 1_000.0, (1.0, 500.0), (1.5, 3.0)
"""Host-blocks that one file may count; what stands in front of the rates, and of the mean excesses."""

LEFT_OUT = {"guess": ("darpa98", "westermo", "rita_beacon"), "chatter": ("darpa98", "westermo")}
"""Files that say nothing of an analytic: no ports, or what it is to find is labelled benign (`models/prior.py`)."""

AGELESS = ("exfil", "drip", "haul", "session", "newcomer")
"""Analytics with one mean excess for all ages: a handful of exceedances."""

Sums = tuple[np.ndarray, np.ndarray, np.ndarray]
Table = dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
NEVER = 1e-30
"""A budget that raises nothing."""


def sums(data: Path, name: str) -> Sums:
    """(k, E, N) [A, 4] of one file's benign rows, nothing raised, each file counting at most `MOST` host-blocks."""
    kept: list[Calibration] = []
    prior = DEFAULT if name in ("dapt2020", "ctu50_sensors", "ctu_sme11") else "none"
    with tempfile.TemporaryDirectory() as folder:
        path = jobs._benign(data / f"{name}.parquet", Path(folder))
        passes.score(
            path, budgets=(NEVER,), priors=(prior,), undirected=name in bars.UNDIRECTED, scores=False, calibrations=kept
        )
    c = kept[0]
    n = c.host_blocks()
    weight = np.minimum(1.0, MOST / np.maximum(n, 1.0))
    return weight * c.k, weight * c.e, weight * n


def together(parts: Mapping[str, Sums]) -> Table:
    """The prior that these files give, by name."""
    k, e, n = (np.sum(v, 0) for v in zip(*parts.values(), strict=True))
    for analytic, files in LEFT_OUT.items():
        a = an.NAMES.index(analytic)
        for part in (parts[f] for f in files if f in parts):
            for total, own in zip((k, e, n), part, strict=True):
                total[a] -= own[a]
    rate, mean = (k + RATE_AT[0]) / (n + RATE_AT[1]), (e + MEAN_AT[0]) / (k + MEAN_AT[1])
    for a in map(an.NAMES.index, AGELESS):
        mean[a] = (e[a].sum() + MEAN_AT[0]) / (k[a].sum() + MEAN_AT[1])
    return {
        name: tuple(tuple(float(f"{v:.2g}") for v in column[a]) for column in (rate, mean))  # type: ignore[misc]
        for a, name in enumerate(an.NAMES)
    }


def findings(data: Path, name: str, table: Table) -> list[int]:
    """Findings on a file's benign rows at each budget under a prior."""
    PRIOR.update(table)
    return [f.false for f in jobs.benign(data, name)["found"].values()]


def main() -> None:
    """Measure, print the table as `models/prior.py` has it, and leave each small file out in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    data: Path = parser.parse_args().data
    now = dict(PRIOR)
    found = {name: sums(data, name) for name in bars.FILES}
    new = together(found)
    print("groups:", ", ".join(GROUPS))
    for name, (rate, mean) in new.items():
        print(f'    "{name}": ({rate}, {mean}),')
    print(f"\n{'benign findings at budgets 1, 10, 100':40s} as it stands, measured anew, without the file's own part")
    total = np.zeros((3, 3), np.int64)
    for name in bars.SMALL:
        without = together({other: v for other, v in found.items() if other != name})
        row = [findings(data, name, t) for t in (now, new, without)]
        total += np.array(row)
        print(f"{name:40s} {row}")
    print(f"{'all':40s} {total.tolist()}")


if __name__ == "__main__":
    main()
