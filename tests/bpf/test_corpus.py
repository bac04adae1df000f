"""120 real captures: every flow and every counter, by BPF_PROG_TEST_RUN, and over veth in both modes."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowsage.collector.capture import Capture
from flowsage.collector.kernel_object import Loader
from flowsage.collector.program import FlowProgram, FlowSettings
from flowsage.collector.xdp import EBPFAttachMode

from .support import both_loaders, build, check_ledger, drain_all, flows, needs_root
from .veth import VethPair, veth_pair

pytestmark = needs_root

Rows = Counter[tuple[Any, ...]]
NAMES = {
    "ip_version": "ip_version",
    "proto": "proto",
    "src": "src",
    "dst": "dst",
    "sport": "sport",
    "dport": "dport",
    "packets_fwd": "packets_fwd",
    "packets_rev": "packets_rev",
    "bytes_fwd": "bytes_fwd",
    "bytes_rev": "bytes_rev",
    "tcp_flags_fwd": "tcp_flags_fwd",
    "tcp_flags_rev": "tcp_flags_rev",
    "vlan": "vlan",
    "vlan_multi": "vlan_changed",
    "frag_nonfirst": "fragments",
}
TIMES = {"first_ns": "start_ns", "last_ns": "end_ns"}
REASONS = ("non_ip", "malformed", "truncated")


def captures(shared: Path) -> list[Path]:
    found = sorted((shared / "pcaps").glob("*.pcap"))
    assert len(found) == 120
    return found


def expected(capture: Path, names: dict[str, str]) -> Rows:
    with capture.with_suffix(".flows.csv").open() as file:
        return Counter(
            tuple(row[n] if n in {"src", "dst"} else int(row[n]) for n in names) for row in csv.DictReader(file)
        )


def measured(program: FlowProgram, names: dict[str, str]) -> Rows:
    rows: Rows = Counter()
    for record in flows(drain_all(program)):
        record |= {"vlan_changed": record["flags"] & 1, "fragments": record["fragments_fwd"] + record["fragments_rev"]}
        rows[tuple(record[n] for n in names.values())] += 1
    return rows


def check_summary(capture: Path, before: dict[str, int], after: dict[str, int]) -> None:
    summary = json.loads(capture.with_suffix(".summary.json").read_text())
    got = {name: after[name] - before[name] for name in after}
    assert (got["seen_packets"], got["seen_bytes"]) == (summary["packets"], summary["bytes_cap"])
    assert (got["accounted_packets"], got["accounted_bytes"]) == (
        summary["accounted_packets"],
        summary["accounted_bytes"],
    )
    assert got["fragment_nonfirst"] == summary["fragment_nonfirst"]
    for reason in REASONS:
        assert (got[f"{reason}_packets"], got[f"{reason}_bytes"]) == (
            summary[reason],
            summary["unaccounted_bytes"][reason],
        )


@both_loaders
def test_every_flow_and_counter_of_120_captures_is_exact(shared: Path, loader: Loader) -> None:
    build()
    with FlowProgram(FlowSettings(external_clock=True).without_timeouts(), loader=loader) as program:
        feeder = program.feeder()
        for capture in captures(shared):
            before = program.counters()
            with Capture(capture) as packets:
                for batch in packets:
                    feeder.feed_buffer(batch.data, batch.offsets, batch.lengths, batch.times_ns)
            got = measured(program, NAMES | TIMES)
            assert got == expected(capture, NAMES | TIMES), capture.name
            check_summary(capture, before, program.counters())
        check_ledger(program)


# What a wire carries: no frame below 14 bytes, none beyond the MTU.
LONGEST = 65_535 + 14
REPLAYED, PACKETS_MOST = 24, 1500


@pytest.fixture(scope="module")
def pair() -> Iterator[VethPair]:
    with veth_pair("fskc") as made:
        yield made


@pytest.mark.parametrize("mode", [EBPFAttachMode.DRV, EBPFAttachMode.SKB])
def test_captures_replayed_over_veth_are_exact(shared: Path, pair: VethPair, mode: EBPFAttachMode) -> None:
    """Per flow: key, initiator, packets, bytes, flags, VLAN; times are the live clock's."""
    build()
    replayed = 0
    with FlowProgram(FlowSettings().without_timeouts()) as program, pair.inside():
        attachment = program.attach(pair.receiver, mode)
        assert attachment.mode is mode
        for capture in captures(shared):
            with Capture(capture) as packets:
                lengths = np.concatenate([batch.lengths for batch in packets])
            if len(lengths) > PACKETS_MOST or lengths.min() < 14 or lengths.max() > LONGEST:
                continue
            before = program.counters()
            pair.replay(capture)
            pair.settle(program, before["seen_packets"] + len(lengths))
            assert measured(program, NAMES) == expected(capture, NAMES), (capture.name, mode)
            check_summary(capture, before, program.counters())
            replayed += 1
            if replayed == REPLAYED:
                break
        check_ledger(program)
    assert replayed == REPLAYED
