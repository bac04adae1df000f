"""History against the reference program and the measured table, on the labelled flow files."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from flowsage.graph.build import contacts
from flowsage.graph.flows import from_table
from flowsage.models.history import History, HistoryConfig, HistoryScores
from flowsage.models.weights import WEIGHTS

MINUTE = 60_000_000_000
BEYOND = {"F_o", "N_o", "G_o", "F_0", "F_1", "B_self", "R_0", "A_0", "V_log", "beat"}
"""Terms that the reference has not."""
REFERENCE = replace(
    WEIGHTS, **dict.fromkeys(BEYOND, 0.0), C_ss=0.6, C_e=0.25, P_ss=0.5, V_fwd=0.5, B_es=math.inf, once=0.0
)
"""The weights that it has."""


def whole(table: pa.Table, config: HistoryConfig) -> HistoryScores:
    flows = from_table(table, undirected=config.undirected)
    return History(config).score(flows, contacts(flows, MINUTE))


def load(path: Path, scratch: Path, patch: pytest.MonkeyPatch) -> ModuleType:
    """A program that lies beside the checkout, as a module; nothing is written there (bytecode, numba's cache)."""
    patch.setattr(sys, "dont_write_bytecode", True)
    patch.setattr(numba.config, "CACHE_DIR", str(scratch))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


@pytest.fixture(scope="module")
def reference(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        return load(shared / "tools" / "history_reference.py", tmp_path_factory.mktemp("numba"), patch)


def known_protocols(table: pa.Table) -> pa.Table:
    """Protocol numbers that are none (one file has its EtherTypes there) as unknown, for both programs."""
    at = table.column_names.index("proto")
    proto = table.column("proto")
    return table.set_column(at, "proto", pc.if_else(pc.less(proto, 0), pa.scalar(None, proto.type), proto))


@pytest.mark.parametrize(
    ("name", "rows", "undirected"),
    [
        ("ctu_sme11", 8_000, False),
        ("dapt2020", 18_000, False),
        ("dapt2020", 5_000, True),
        ("iot23_34_1", 12_000, False),
        ("ctu50_sensors", 12_000, False),
        ("westermo", 15_000, True),
        ("rita_beacon", 40_000, False),
        ("darpa98", 150_000, False),
    ],
)
def test_every_term_and_score_equals_the_reference(
    shared: Path, reference: ModuleType, name: str, rows: int, undirected: bool
) -> None:
    table = known_protocols(pq.read_table(shared / "data" / f"{name}.parquet").slice(0, rows))
    scores = whole(table, HistoryConfig(undirected=undirected, weights=REFERENCE))
    flow, hosts, expected = reference.detect(table.to_pandas(), undirected)
    np.testing.assert_allclose(scores.flow_score, flow, atol=1e-8)
    np.testing.assert_allclose(scores.beacon_score, expected["Z"] + expected["Zc"], atol=1e-8)
    assert scores.terms.keys() == expected.keys() - {"flow"} | BEYOND
    for term, values in scores.terms.items():
        np.testing.assert_allclose(values, 0.0 if term in BEYOND else expected[term], atol=1e-8, err_msg=term)
    names = np.asarray(from_table(table).hosts.names.to_pylist(), object)
    ours = pd.DataFrame({"host": names[scores.host], "window_start_ns": scores.window * MINUTE, "ours": scores.score})
    merged = hosts.merge(ours, on=["host", "window_start_ns"], how="outer")
    assert len(merged) == len(hosts) == len(ours)
    # The reference sums over peers; of each one's highest flow we take the highest and the mean.
    ends = table.select(["start_ns", "src_ip", "dst_ip"]).to_pandas().set_axis(["start_ns", "host", "peer"], axis=1)
    ends = ends.assign(flow=flow, window_start_ns=ends.start_ns // MINUTE * MINUTE)
    if undirected:
        ends = pd.concat([ends, ends.rename(columns={"host": "peer", "peer": "host"})])
    peers = ends.groupby(["host", "window_start_ns", "peer"]).flow.max().groupby(["host", "window_start_ns"])
    plainly = (0.75 * peers.max() + 0.25 * peers.mean()).rename("plainly").reset_index()
    merged = merged.merge(plainly, on=["host", "window_start_ns"], how="outer")
    assert len(merged) == len(ours)
    np.testing.assert_allclose(merged.ours, merged.plainly, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "undirected", "flow", "host"),
    [
        ("ctu_sme11", False, (1.0, 0.998), (0.999, 0.954)),
        ("dapt2020", False, (0.987, 0.972), (0.864, 0.281)),
        ("iot23_34_1", False, (0.993, 1.0), (0.998, 1.0)),
        ("ctu50_sensors", False, (0.984, 0.981), (0.988, 0.997)),
        ("westermo", True, (0.970, 0.944), (0.924, 0.811)),
    ],
)
def test_the_measured_table_is_reached_on_the_small_files(
    shared: Path, tmp_path: Path, name: str, undirected: bool, flow: tuple[float, float], host: tuple[float, float]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        tool = load(shared / "tools" / "evaluate_detection.py", tmp_path, patch)
    table = pq.read_table(shared / "data" / f"{name}.parquet")
    scores = whole(table, HistoryConfig(undirected=undirected))
    names = np.asarray(from_table(table).hosts.names.to_pylist(), object)
    hosts = pd.DataFrame({"host": names[scores.host], "window_start_ns": scores.window * MINUTE, "score": scores.score})
    hosts = hosts.assign(window_end_ns=hosts.window_start_ns + MINUTE, alert=False)
    measured = tool.evaluate(table.to_pandas(), scores.flow_score, hosts, undirected)
    for cell, expected in (("flow_late", flow), ("host_window_late", host)):
        assert (measured[cell]["auc"], measured[cell]["ap"]) == pytest.approx(expected, abs=0.01)
