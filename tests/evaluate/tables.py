"""The tables as text."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping

from tests.evaluate import bars
from tests.evaluate.jobs import PRIORS, Result
from tests.evaluate.measures import Area, Found
from tests.evaluate.passes import DEFAULT


def render(results: Mapping[str, Result]) -> str:
    """All tables of which there is something to show."""
    parts = [_ranking(results), _false(results), _recall(results), _kinds(results), _confounders(results)]
    return "\n\n".join(p for p in [*parts, _ablation(results)] if p)


def grid(title: str, head: list[str], rows: list[list[str]]) -> str:
    """A table as text, its columns aligned; nothing where there are no rows."""
    if not rows:
        return ""
    width = [max(len(r[k]) for r in [head, *rows]) for k in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, width, strict=True)).rstrip() for r in [head, *rows]]
    return "\n".join([title, "", lines[0], "  ".join("-" * w for w in width), *lines[1:]])


def _pair(cell: tuple[float, float]) -> str:
    return f"{cell[0]:.3f}/{cell[1]:.3f}" if cell[0] else f"AP {cell[1]:.2f}"


def _against(ours: Area, floor: tuple[float, float], goal: tuple[float, float]) -> str:
    def reached(bar: tuple[float, float]) -> bool:
        return round(ours.auc, 3) >= bar[0] and round(ours.ap, 3) >= bar[1]

    return "goal" if reached(goal) else "floor" if reached(floor) else "SHORT"


def _ranking(results: Mapping[str, Result]) -> str:
    rows = []
    for name in (*bars.FILES, "enterprise"):
        found = results.get(f"rank {name}") or results.get(name)
        if found is None:
            continue
        beacon = " by beacon" if name == "rita_beacon" else ""
        others = bars.BASELINES.get(name, ("", ""))
        for what, table, best in (("flow", bars.FLOW, others[0]), ("host", bars.HOST, others[1])):
            ours: Area = found.values[what + beacon]
            floor, goal = table[name]
            rows.append(
                [f"{name} {what}{beacon}", best, _pair(floor), _pair(goal), str(ours), _against(ours, floor, goal)]
            )
        if "macro" in found.values:
            floor_m, goal_m = bars.MACRO[name]
            m = found.values["macro"]
            verdict = "goal" if m >= goal_m else "floor" if m >= floor_m else "SHORT"
            rows.append([f"{name} macro AUC", "MIDAS-F .745", f"{floor_m}", f"{goal_m}", f"{m:.3f}", verdict])
    head = ["ranking, AUC/AP", "best tuned baseline", "floor", "goal", "ours", ""]
    return grid("Ranking: the last 70 % of rows (darpa98 flows: all)", head, rows)


def _at_most(value: float, bar: float | None) -> str:
    return "" if bar is None else "met" if value <= bar else "SHORT"


def _false(results: Mapping[str, Result]) -> str:
    rows = []
    for name in ("darpa98", "enterprise"):
        done = results.get(f"benign {name}") or results.get(name)
        if done is None:
            continue
        for b, found in done.values["found"].items():
            bar = bars.FALSE_RATE[name].get(b)
            rows.append(
                [f"{name}, budget {b:g}", f"{found.host_days:,.0f} host-days: {found.false} false",
                 f"{found.false_rate:.1f} per 100", "" if bar is None else f"≤ {bar:g}",
                 _at_most(found.false_rate, bar), _spoken(Counter(found.false_by))]
            )  # fmt: skip
    small = [results[f"benign {n}"].values["found"] for n in bars.SMALL if f"benign {n}" in results]
    if small:
        for b in bars.BUDGETS:
            count = sum(s[b].false for s in small)
            floor = bars.FALSE_SMALL.get(b)
            by: Counter[str] = Counter()
            for s in small:
                by.update(s[b].false_by)
            verdict = "" if floor is None else "goal" if count <= floor[1] else _at_most(count, floor[0])
            rows.append(
                [f"{len(small)} small files, budget {b:g}", f"{sum(s[b].host_days for s in small):.0f} host-days",
                 f"{count} findings", "" if floor is None else f"≤ {floor[0]}, goal {floor[1]}", verdict, _spoken(by)]
            )  # fmt: skip
    return grid("False findings", ["where", "", "ours", "bar", "", "by"], rows)


def _spoken(by: Counter[str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in by.most_common(6))


def _injected(results: Mapping[str, Result]) -> dict[float, list[Found]]:
    gathered: dict[float, list[Found]] = {b: [] for b in bars.BUDGETS}
    for name in bars.INJECTED:
        if f"inject {name}" in results:
            for b, found in results[f"inject {name}"].values["found"].items():
                gathered[b] += found
    return gathered


def _recall(results: Mapping[str, Result]) -> str:
    rows = []
    injected = _injected(results)
    for b in bars.BUDGETS:
        for where, found in (("injected", injected[b]), ("enterprise", _of(results, b))):
            n = sum(f.incidents for f in found)
            if not n:
                continue
            recall = sum(f.found for f in found) / n
            floor, goal = bars.RECALL[where][b]
            verdict = "goal" if recall >= goal else "floor" if recall >= floor else "SHORT"
            rows.append([f"{where}, budget {b:g}", f"{n} attacks", f"{recall:.2f}", f"≥ {floor}, goal {goal}", verdict])
    rows.sort()
    done = results.get("ablation")
    if done is not None:
        n, k, _ = done.values["found"][DEFAULT].by_kind["credentials"]
        verdict = "met" if k >= bars.CREDENTIALS * n else "SHORT"
        where = "another department's credentials, budget 10"
        rows.append([where, f"{n} attacks", f"{k / n:.2f}", f"≥ {bars.CREDENTIALS:g}", verdict])
    return grid("Attacks found", ["where", "", "ours", "bar", ""], rows)


def _of(results: Mapping[str, Result], budget: float) -> list[Found]:
    return [results["enterprise"].values["found"][budget]] if "enterprise" in results else []


def _kinds(results: Mapping[str, Result]) -> str:
    rows = []
    injected, where = _injected(results), _of(results, 10.0)
    kinds = {k for f in [*injected[10.0], *where] for k in f.by_kind}
    for kind in sorted(kinds):
        cells = [kind]
        for found in (injected[1.0], injected[10.0], injected[100.0], _of(results, 1.0), where, _of(results, 100.0)):
            n, k, delays = 0, 0, []
            for f in found:
                one = f.by_kind.get(kind, (0, 0, []))
                n, k, delays = n + one[0], k + one[1], delays + one[2]
            delay = f" {statistics.median(delays):.0f} min" if delays else ""
            cells.append(f"{k}/{n}{delay}" if n else "")
        rows.append(cells)
    head = ["kind", "injected, 1", "10", "100", "enterprise, 1", "10", "100"]
    return grid("Found by kind and budget, and the median delay", head, rows)


def _confounders(results: Mapping[str, Result]) -> str:
    extra: dict[str, list[int]] = {}
    for name in bars.INJECTED:
        if f"confound {name}" in results:
            for confounder, counts in results[f"confound {name}"].values["extra"].items():
                extra.setdefault(confounder, []).extend(counts)
    rows = [
        [c, f"{len(v)} runs", f"{statistics.mean(v):.1f}", f"≤ {bars.CONFOUNDED:g}",
         _at_most(statistics.mean(v), bars.CONFOUNDED), " ".join(map(str, v))]
        for c, v in extra.items()
    ]  # fmt: skip
    return grid("Findings that a harmless disturbance causes at budget 10", ["", "", "mean", "bar", "", "each"], rows)


def _ablation(results: Mapping[str, Result]) -> str:
    parts = []
    done = results.get("ablation")
    if done is not None:
        kinds = list(done.values["meetings"]["popularity"])
        rows = []
        for p in PRIORS:
            areas, found = done.values["meetings"].get(p, {}), done.values["found"][p]
            shares = [f"{k}/{n}" for n, k, _ in found.by_kind.values()]
            rows.append([p, *[str(areas[k]) if k in areas else "" for k in kinds], *shares, str(found.false)])
        head = ["prior", *kinds, *[f"found {k}" for k in done.values["found"]["none"].by_kind], "false"]
        title = "What the prior adds, simulated enterprise: first meetings, all and inside the network, AUC/AP of −tail"
        parts.append(grid(f"{title}; found, and false, at budget 10", head, rows))
    files = [n for n in bars.FILES if f"ablate {n}" in results]
    rows = []
    for p in PRIORS[1:]:
        cells = [results[f"ablate {n}"].values["meetings"][p] for n in files]
        told = [str(c[k]) if c[k].base == c[k].base else "not ready" for c in cells for k in ("all", "inside")]
        rows.append([p, *told])
    if files:
        head = ["prior", *[f"{n} {k}" for n in files for k in ("all", "inside")]]
        parts.append(grid("The same on labelled files", head, rows))
    return "\n\n".join(parts)
