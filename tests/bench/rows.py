"""A row of the table: what was measured, beside what, against which bar."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Row:
    """name, value in unit; the reference's value in the same unit; ratio = the larger of the two over the smaller.

    `bar` is what the value or the ratio has to reach, in words; `met` whether it does.
    """

    name: str
    value: float
    unit: str
    reference: str = ""
    reference_value: float | None = None
    bar: str = ""
    met: bool | None = None

    @property
    def ratio(self) -> float | None:
        if not self.reference_value or not self.value:
            return None
        return max(self.value, self.reference_value) / min(self.value, self.reference_value)


def median_seconds(run: Callable[[], object], repeats: int = 5, warmup: int = 1) -> float:
    """Median wall time of `run`, after `warmup` runs that are not counted."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def show(row: Row) -> str:
    """The row as a line of the table."""
    ratio = f"{row.ratio:,.1f}x" if row.ratio else ""
    beside = f"{row.reference_value:,.4g} {row.unit} {row.reference}" if row.reference_value else row.reference
    verdict = {True: "met", False: "NOT MET", None: ""}[row.met]
    return f"{row.name:58s} {row.value:>12,.4g} {row.unit:8s} {beside:44s} {ratio:>9s}  {row.bar:38s} {verdict}"


def write(rows: list[Row], path: Path) -> None:
    """All rows as JSON: name, value, unit, reference, reference_value, ratio, bar, met."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(r) | {"ratio": r.ratio} for r in rows], indent=1) + "\n")
