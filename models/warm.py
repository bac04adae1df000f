"""Compile every kernel of graph/ and models/ into numba's cache, so that no packet waits for a compiler.

    python -m flowsage.models.warm

Kernels compile once a signature, so a little made-up traffic through the real functions is all it takes. A part that
has kernels of its own adds a line to `STEPS`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from flowsage import graph, models
from flowsage.graph.build import Contacts, contacts
from flowsage.graph.flows import FlowBatch, from_table
from flowsage.graph.warm import compile_kernels
from flowsage.models.alarms import AlarmConfig, Alarms
from flowsage.models.history import History
from flowsage.models.keys import KeyTable
from flowsage.models.meeting import MeetingPrior
from flowsage.models.meeting_config import MeetingConfig
from flowsage.models.surprise import of_flows

_MINUTE = 60_000_000_000


def traffic() -> pa.Table:
    """A few flows in two windows, with every column that a flow file may have."""
    n = 8
    ports = {"src_port": 40_000, "dst_port": 443, "proto": 6}
    counts = {"packets_fwd": 3, "packets_rev": 2, "bytes_fwd": 500, "bytes_rev": 900}
    start = np.arange(n, dtype=np.int64) * (_MINUTE // 4)
    return pa.table(
        {
            "start_ns": start,
            "end_ns": start + 1,
            "src_ip": [f"10.0.0.{k % 3}" for k in range(n)],
            "dst_ip": [f"10.0.1.{k % 2}" for k in range(n)],
            **{name: np.full(n, value, np.int64) for name, value in (ports | counts).items()},
            "state": ["SF"] * n,
        }
    )


def forget_stale() -> int:
    """Throw out caches older than any source of either package; returns the number of files.

    numba looks at the age of a kernel's own file only, not at what is inlined or read as a constant from others.
    """
    thrown = 0
    folders = [Path(package.__path__[0]) for package in (graph, models)]
    newest = max(source.stat().st_mtime for folder in folders for source in folder.glob("*.py"))
    for folder in folders:
        for cached in (folder / "__pycache__").glob("*.nb[ci]"):
            if cached.stat().st_mtime < newest:
                cached.unlink(missing_ok=True)
                thrown += 1
    return thrown


def warm_keys(flows: FlowBatch, run: Contacts) -> None:
    """Tables of keys."""
    table = KeyTable()
    table.find(flows.hosts.hash)
    table.find_or_insert(np.arange(100, dtype=np.uint64), 0)  # more than fit: it grows
    table.evict(50)


def warm_history(flows: FlowBatch, run: Contacts) -> None:
    """History: scores, provisional lookups, snapshots."""
    history = History()
    history.score(flows, run)
    History.restore(history.state()).lookup(run)


def warm_meeting(flows: FlowBatch, run: Contacts) -> None:
    """The prior of first meetings, in a small and in a large network, and as it forgets."""
    pairs = [(s, t) for s in range(12) for t in range(12)]
    table = pa.table(
        {
            "start_ns": np.zeros(len(pairs), np.int64),
            "src_ip": [f"10.0.0.{s}" for s, _ in pairs],
            "dst_ip": [f"10.0.1.{t}" for _, t in pairs],
            "dst_port": np.arange(len(pairs)) // 2,
        }
    )
    met = contacts(from_table(table), _MINUTE)
    first = np.ones(len(met), np.bool_)
    for exact, hosts in ((2_500, 1_000), (2, 1_000), (2, 16)):
        prior = MeetingPrior(
            MeetingConfig(
                exact_hosts=exact, max_hosts=hosts, replayed=256, ready_meetings=1, ready_windows=1, ready_steps=1,
                step_meetings=1, refreshed=8,
            )
        )  # fmt: skip
        for _ in range(2):
            prior.learn(met, first)
            prior.tail(met, first)
        prior.evidence(int(met.hosts.hash[0]), int(met.hosts.hash[1]), 0)


def warm_graph(flows: FlowBatch, run: Contacts) -> None:
    """Windows, host graphs and their features."""
    compile_kernels()


def warm_alarms(flows: FlowBatch, run: Contacts) -> None:
    """Alarms, over two blocks, so that the calibration takes the first one in."""
    alarms = Alarms(AlarmConfig(ready_blocks=1, ready_host_blocks=1))
    seen = History().lookup(run)
    for step in range(3):
        alarms.step((step + 1) * AlarmConfig().block_ns, run, seen, np.full(len(run), np.nan))
    alarms.take(flows.hosts.hash)
    of_flows(run, run.src[:1], run.windows[:1], np.ones(1), undirected=True)


STEPS: tuple[Callable[[FlowBatch, Contacts], None], ...] = (
    warm_graph, warm_keys, warm_history, warm_meeting, warm_alarms,
)  # fmt: skip


def main() -> None:
    """Compile everything; says on stderr what took how long."""
    began = time.perf_counter()
    forget_stale()
    flows = from_table(traffic())
    run = contacts(flows, _MINUTE)
    print(f"flows and contacts: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    for step in STEPS:
        began = time.perf_counter()
        step(flows, run)
        print(f"{step.__name__.removeprefix('warm_')}: {time.perf_counter() - began:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
