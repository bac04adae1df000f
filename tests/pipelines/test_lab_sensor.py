"""The lab under FlowSAGE's own sensor: native XDP on every port, each packet counted once."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pyarrow as pa

from flowsage.collector.agent import Agent
from flowsage.collector.agent_settings import AgentSettings
from flowsage.pipelines.lab import Lab, LabSettings, in_namespace, label_flows
from tests.pipelines.lab_played import needs_root, packets_of

ATTACKS = ("worm", "beacon", "exfil")
COUNTS = ("packets_fwd", "packets_rev", "bytes_fwd", "bytes_rev")


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.batches: list[pa.RecordBatch] = []

    def put(self, batch: pa.RecordBatch, watermark_ns: int) -> None:
        self.batches.append(batch)

    def close(self) -> None:
        pass


@needs_root
def test_the_sensor_on_the_ports_counts_each_packet_of_an_attack_once(tmp_path: Path) -> None:
    kept = Kept()
    with Lab(LabSettings(prefix="fslbx", truth_path=tmp_path / "truth.jsonl")) as lab:
        agent = Agent(AgentSettings(name="lab", interfaces=tuple(lab.interfaces), netns=lab.netns, mode="drv"), kept)
        agent.start()
        with lab.record(tmp_path / "lab.pcap"):
            begun = [
                lab.start_attack("worm", rate=40.0),
                lab.start_attack("beacon", period_s=0.5, beats=5),
                lab.start_attack("exfil", bytes=3_000_000),
            ]
            truths = {truth.attack: lab.wait_attack(truth, 30) for truth in begun}
            time.sleep(1.5)  # what is in flight arrives
            agent.stop()
            snapshot = agent.join()
            with in_namespace(lab.netns):
                lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    assert snapshot.closes, snapshot.to_json()
    assert sum(line.strip().startswith("fslbx-") for line in lines) == len(lab.interfaces) + 1  # and the bridge
    flows = label_flows(pa.Table.from_batches(kept.batches), truths.values())
    attacks = [row for row in flows.to_pylist() if row["label"]]

    on_the_wire: dict[tuple[str, int, str, int], Counter[str]] = {}
    for _, src, src_port, dst, dst_port, _, _, length in packets_of(tmp_path / "lab.pcap"):
        there, back = (src, src_port, dst, dst_port), (dst, dst_port, src, src_port)
        key, way = (back, "rev") if back in on_the_wire else (there, "fwd")
        on_the_wire.setdefault(key, Counter()).update({f"packets_{way}": 1, f"bytes_{way}": length})
    counted: dict[tuple[str, int, str, int], Counter[str]] = {}
    for row in attacks:
        key = (row["src_ip"], row["src_port"], row["dst_ip"], row["dst_port"])
        counted.setdefault(key, Counter()).update({name: row[name] for name in COUNTS})

    steps = {
        (truth.address, step.source_port, step.target, step.port) for truth in truths.values() for step in truth.steps
    }
    assert len(steps) == 100 + 5 + 2
    assert set(counted) == steps
    for key in steps:
        assert {name: counted[key][name] for name in COUNTS} == {name: on_the_wire[key][name] for name in COUNTS}
    assert {row["attack"] for row in attacks} == set(ATTACKS)
