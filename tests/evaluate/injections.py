"""Attacks and harmless disturbances, put into recordings of real networks at test time.

Attacks are those of the simulated enterprise, by a host of the recording, at a time at which it is active; they are put
one after the other, so that no host does two things at once and a finding belongs to one of them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from flowsage.pipelines.enterprise import ATTACKS, Flows, Scene
from flowsage.pipelines.enterprise.flows import ICMP, REFUSED, sizes

HOUR = 3_600.0
QUIET = 0.2
"""Share of a recording before the first injection."""

APART = 1.25 * HOUR
"""Between the end of an injection and the next one of the same attacker: a finding closes after an hour."""


@dataclass(frozen=True)
class Recording:
    """Benign rows of a flow file, and who is in it."""

    table: pa.Table
    begin_ns: int
    span_s: float
    sources: list[str]
    """Internal hosts that open flows, the busiest first."""
    active: dict[str, np.ndarray]
    """Starts of each source's flows, s."""
    inside: list[str]
    services: list[tuple[str, int]]
    """Internal (host, port) with at least three clients, else with any."""
    sites: list[tuple[str, int]]
    """The same outside."""
    met: set[tuple[str, str]]


def _internal(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_private
    except ValueError:
        return True


def recording(path: Path, sources: int = 8) -> Recording:
    """The rows labelled 0 of a flow file."""
    table = pq.read_table(path)
    table = table.filter(table.column("label").to_numpy() == 0)
    frame = table.select(["start_ns", "src_ip", "dst_ip", "dst_port"]).to_pandas()
    frame = frame.astype({"src_ip": str, "dst_ip": str})
    begin = int(frame.start_ns.iloc[0])
    ours = {h: _internal(h) for h in pd.unique(pd.concat([frame.src_ip, frame.dst_ip])).tolist()}
    by_flows = frame.src_ip.value_counts().index.tolist()
    if not any(ours[h] for h in by_flows):  # public addresses throughout: whoever was watched opens most flows
        ours |= dict.fromkeys(by_flows[:4], True)
    busy = [h for h in by_flows if ours[h]][:sources]
    clients = (
        frame[frame.dst_port < 32_768].groupby(["dst_ip", "dst_port"]).src_ip.nunique().sort_values(ascending=False)
    )
    offers = [(str(h), int(p)) for (h, p) in clients.index]
    active = {h: (rows.start_ns.to_numpy() - begin) / 1e9 for h, rows in frame.groupby("src_ip") if h in busy}
    return Recording(
        table, begin, (int(frame.start_ns.iloc[-1]) - begin) / 1e9, busy, active, [h for h, own in ours.items() if own],
        [o for o in offers if ours[o[0]]][:20], [o for o in offers if not ours[o[0]]][:20],
        set(zip(frame.src_ip, frame.dst_ip, strict=True)),
    )  # fmt: skip


def scene(f: Flows, r: Recording, attacker: str, begin_s: float) -> Scene:
    """Who is where for an attack by `attacker` at `begin_s` of a recording."""
    rng = f.rng
    inside = [h for h in r.inside if h != attacker] or ["10.250.0.1"]
    victim = str(rng.choice([h for h, _ in r.services if h != attacker] or inside))
    foreign = [(h, p) for h, p in r.services if h != attacker and (attacker, h) not in r.met]
    foreign = foreign or [(str(h), 445) for h in rng.permutation(inside)[:4]]
    known = [(h, p) for h, p in r.sites if (attacker, h) not in r.met] or r.sites or [("203.0.113.80", 443)]
    site, port = known[int(rng.integers(len(known)))]
    n = int(rng.integers(0, 200))
    return Scene(
        attacker=f.host(attacker), victim=f.host(victim), inside=f.hosts([str(h) for h in inside[:200]]),
        silent=f.hosts([f"10.251.{k // 200}.{k % 200 + 1}" for k in range(240)]),
        foreign=f.hosts([h for h, _ in foreign]), foreign_ports=np.array([p for _, p in foreign]),
        outside=f.host(f"203.0.113.{n + 1}"),
        crowd=f.hosts([f"198.51.{k // 200 + 100}.{k % 200 + 1}" for k in range(1_000)]),
        known=f.host(site), known_port=port, begin_s=begin_s, end_s=r.span_s,
    )  # fmt: skip


def inject(r: Recording, kinds: list[str], seed: int) -> tuple[pa.Table, list[str]]:
    """The recording with as many of `kinds` in it as find a place, in this order; returns those left over as well."""
    f = Flows(np.random.default_rng(seed), r.begin_ns)
    free = dict.fromkeys(r.sources, QUIET * r.span_s)
    left: list[str] = []
    for kind in kinds:
        for attacker in sorted(free, key=lambda h: (free[h], h)):
            starts = r.active[attacker]
            at = int(np.searchsorted(starts, free[attacker] + f.rng.uniform(0, 0.5 * HOUR)))
            if at < len(starts) and starts[at] < r.span_s - 0.5 * HOUR:
                break
        else:
            left.append(kind)
            continue
        begin = float(starts[at])
        i = f.attack(f"{kind}#{seed}")
        before = len(f)
        ATTACKS[kind](f, scene(f, r, attacker, begin), i)
        free[attacker] = min(f.latest(before), r.span_s) + APART
    return merged(r, f), left


def injected(r: Recording, seeds: int) -> Iterator[pa.Table]:
    """Recordings with attacks in them, as many as it takes to place `seeds` of every kind."""
    for seed in range(seeds):
        left = np.random.default_rng([seed, 20]).permutation(list(ATTACKS)).tolist()
        for again in range(8):
            table, rest = inject(r, left, 100 * seed + again)
            if len(rest) == len(left):
                break
            left = rest
            yield table


def merged(r: Recording, f: Flows) -> pa.Table:
    """The recording and the flows `f`, in order of time, with the recording's columns."""
    new = f.table(r.span_s)
    columns = [c for c in r.table.column_names if c in new.column_names]
    parts = []
    for part in (r.table, new):
        values = []
        for c in columns:
            kind = r.table.schema.field(c).type
            kind = pa.string() if pa.types.is_dictionary(kind) or c == "attack" else kind
            column = part.column(c)
            values.append(column.cast(pa.string()).cast(kind) if pa.types.is_string(kind) else column.cast(kind))
        parts.append(pa.table(values, names=columns))
    # What the recording does not know of its flows nobody knows of these.
    for c in columns:
        if parts[0].column(c).null_count == len(parts[0]) and c not in ("attack",):
            k = columns.index(c)
            parts[1] = parts[1].set_column(k, c, pa.nulls(len(parts[1]), parts[0].column(c).type))
    whole = pa.concat_tables(parts)
    return whole.take(pa.array(np.argsort(whole.column("start_ns").to_numpy(), kind="stable")))


def update_day(f: Flows, r: Recording, begin_s: float) -> None:
    """Everybody fetches hundreds of megabytes from a server that nobody has met, within an hour."""
    server = f.host("203.0.113.240")
    for host in r.sources:
        at = begin_s + f.rng.random(12) * HOUR
        f.add(at, f.host(host), server, 443, out=3e5, back=sizes(f.rng, 4e7, 12, 0.4), lasts=20.0)


def backup(f: Flows, r: Recording, begin_s: float) -> None:
    """One host sends gigabytes to a store inside, every day at the same hour from now on."""
    host, store = f.host(r.sources[0]), f.host("10.250.0.9")
    for day in range(int((r.span_s - begin_s) // (24 * HOUR)) + 1):
        at = begin_s + day * 24 * HOUR + f.rng.random(4) * 600.0
        f.add(at, host, store, 10_000, out=sizes(f.rng, 1e9, 4, 0.3), back=1e6, lasts=300.0)


def heartbeats(f: Flows, r: Recording, begin_s: float) -> None:
    """Everybody gets an agent that reports to one server once a minute."""
    server = f.host("10.250.0.10")
    for host in r.sources:
        at = np.arange(begin_s + f.rng.random() * 300.0, min(r.span_s, begin_s + 12 * HOUR), 60.0)
        f.add(
            at + f.rng.normal(0, 1, len(at)),
            f.host(host),
            server,
            8_443,
            out=sizes(f.rng, 700, len(at), 0.05),
            back=400.0,
        )


def monitoring(f: Flows, r: Recording, begin_s: float) -> None:
    """A new host asks everybody how they are, every minute and by two services; a few refuse."""
    server = f.host("10.250.0.11")
    for k, host in enumerate(r.inside[:100]):
        at = np.arange(begin_s + k * 0.3, min(r.span_s, begin_s + 6 * HOUR), 60.0)
        f.add(at, server, f.host(host), 9_100, out=300.0, back=9_000.0, state=REFUSED if k % 10 == 9 else 0)
        f.add(at[::5], server, f.host(host), 0, proto=ICMP, out=84.0, back=84.0, src_port=8)


CONFOUNDERS = {"update day": update_day, "backup": backup, "heartbeats": heartbeats, "monitoring": monitoring}


def disturb(r: Recording, name: str, seed: int) -> tuple[pa.Table, int, int]:
    """The recording with one harmless disturbance in it, and when it begins and ends, ns."""
    f = Flows(np.random.default_rng(seed), r.begin_ns)
    starts = r.active[r.sources[0]]
    begin = float(starts[int(np.searchsorted(starts, r.span_s * f.rng.uniform(0.3, 0.5))) - 1])
    CONFOUNDERS[name](f, r, begin)
    return merged(r, f), r.begin_ns + int(begin * 1e9), r.begin_ns + int(f.latest(0) * 1e9)
