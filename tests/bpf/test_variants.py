"""What this kernel, or luck, never shows: the same source built so that it happens."""

import re
from pathlib import Path

import pytest

from flowsage.collector.program import FlowProgram, FlowSettings

from .support import ROOT, SECOND, check_ledger, drain_all, flows, needs_root, run_make, totals, udp_frames

pytestmark = needs_root


def built(folder: Path, file: str, old: str, new: str) -> Path:
    """The object, with `new` for the regular expression `old` in one of its sources."""
    for source in (ROOT / "bpf").glob("*"):
        if source.suffix in {".c", ".h"} or source.name == "Makefile":
            (folder / source.name).write_bytes(source.read_bytes())
    text, count = re.subn(old, new, (folder / file).read_text())
    assert count
    (folder / file).write_text(text)
    run_make(folder, "flow.bpf.o")
    return folder / "flow.bpf.o"


def test_flows_of_the_same_print_share_no_record_and_lose_no_packet(tmp_path: Path) -> None:
    """Prints of 3 bits: 8 flows get an entry at most in each table, the others' packets are records of their own."""
    path = built(tmp_path, "parse.h", r"return print \^ print >> 29;", "return (print ^ print >> 29) & 7;")
    frames = udp_frames(100)
    with FlowProgram(FlowSettings(external_clock=True), path=path) as program:
        program.feed(frames * 3, range(SECOND, SECOND + 300))
        counters = check_ledger(program)
        records = drain_all(program)
        check_ledger(program)
    assert totals(records) == (300, 3 * sum(map(len, frames)))
    assert counters["created"] <= 2 * 8
    assert counters["table_full"] == 300 - 3 * counters["created"]
    by_source = [(r["src"], r["packets_fwd"]) for r in flows(records)]
    assert len({source for source, _ in by_source}) == 100
    assert sorted(n for _, n in by_source) == [1] * counters["table_full"] + [3] * counters["created"]


@pytest.mark.parametrize("size", [60, 9_000, 65_000])
def test_a_kernel_without_the_function_that_shows_its_frame_is_asked_for_the_length(tmp_path: Path, size: int) -> None:
    """Linux before 6.2: the function is not there, and the enumerator by which we know it is not either."""
    path = built(tmp_path, "compat.h", r"bpf_cast_to_kern_ctx|BPF_TCX_EGRESS(?=___)", r"\g<0>_no_such")
    frame = udp_frames(1)[0].ljust(size, b"x")
    with FlowProgram(FlowSettings(external_clock=True), path=path) as program:
        program.feed([frame], [SECOND])
        assert totals(drain_all(program)) == (1, size)
