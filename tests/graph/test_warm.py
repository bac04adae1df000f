"""Kernels are compiled ahead, all of them, for whatever form flows come in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import importlib, io, sys
import numpy as np, pyarrow as pa, pyarrow.ipc
from numba.core.dispatcher import Dispatcher
from flowsage.graph import warm, hostgraph, memory
from flowsage.graph.build import contacts
from flowsage.graph.flows import from_table, merge
from flowsage.graph.window import WindowBuffer

MODULES = "addresses aggregate build features flows fold watermark window".split()

def compiled():
    found = {}
    for name in MODULES:
        module = importlib.import_module("flowsage.graph." + name)
        for key, value in vars(module).items():
            if isinstance(value, Dispatcher) and value.targetoptions.get("inline") != "always":
                found[value.py_func.__qualname__] = len(value.signatures)
    return found

warm.compile_kernels()
before = compiled()
assert len(before) > 10 and all(before.values()), before

def batches(**more):
    table = pa.table({"src_ip": ["10.0.0.1", "fe80::2"] * 50, "dst_ip": ["x", "8.8.8.8"] * 50,
                      "start_ns": np.arange(100) * 10**9, **more})
    yield table
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    yield pa.ipc.open_stream(pa.BufferReader(sink.getvalue())).read_all()
    yield table.slice(3, 60)

hostgraph._THREADED = 10
known = {"handshake_ns": pa.array([None, 5] * 50, pa.uint64()), "state": ["S0", None] * 50, "proto": [6] * 100}
for more in ({}, known):
    buffer = WindowBuffer(60 * 10**9, clock=lambda: 10**12)
    for table in batches(**more):
        flows = from_table(table)
        buffer.add(flows, "a")
        run = contacts(flows, 60 * 10**9)
        for k in range(len(run.windows)):
            hostgraph.host_graph(flows.take(slice(*run.flow_offsets[k:k + 2])), run.slice(k))
        contacts(flows.take(np.arange(5)), 7)
        contacts(flows, 10**18)
    closed = buffer.flush()
    contacts(closed, 10**9)
    merge([closed, flows])
after = compiled()
assert before == after, {k: (v, after[k]) for k, v in before.items() if after[k] != v}
print(len(before), "kernels")
"""


def test_after_warming_up_nothing_is_compiled_any_more() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("kernels\n")
