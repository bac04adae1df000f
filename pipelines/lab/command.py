"""The lab by itself, for `flowsage lab`: starts, says who is there and what happens, runs until told to stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TextIO

from flowsage.pipelines.lab.lab import Lab, LabSettings, Scheduled, read_schedule
from flowsage.pipelines.lab.truth import Truth


def describe(truth: Truth) -> str:
    """One line about a misbehaviour that has just started or ended."""
    where = truth.targets[0] if len(truth.targets) == 1 else f"{len(truth.targets)} hosts"
    if truth.end_ns is None:
        return f"{truth.id}: {truth.attacker} ({truth.address}) begins, towards {where}"
    seconds = (truth.end_ns - truth.start_ns) / 1e9
    end = f"{truth.id}: {truth.status} after {seconds:.1f} s and {len(truth.steps)} steps"
    return f"{end}: {truth.error}" if truth.error else end


def run_lab(
    settings: LabSettings,
    *,
    schedule: str | Sequence[Scheduled] = (),
    duration_s: float | None = None,
    record: Path | None = None,
    out: TextIO | None = None,
    on_started: Callable[[Lab], None] | None = None,
    on_ending: Callable[[Lab], None] | None = None,
) -> list[Truth]:
    """Run a lab until `duration_s` is over, or SIGINT or SIGTERM comes; messages go to `out` (None: stderr).

    `record` is a pcap file of everything that crosses the bridge. `on_started` is called with the running lab (to
    attach a sensor, say), `on_ending` while its interfaces still exist (to flush and detach it). Call from the main
    thread. Returns the truth about every misbehaviour. Raises what `read_schedule` does before anything is built.
    """
    entries = read_schedule(schedule, settings.seed)
    stream = out or sys.stderr
    over = threading.Event()

    def say(line: str) -> None:
        print(f"lab: {line}", file=stream, flush=True)

    def stop(number: int, frame: FrameType | None) -> None:
        over.set()

    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, stop))
        lab = stack.enter_context(Lab(settings, on_attack=lambda truth: say(describe(truth))))
        say(f"{len(lab.hosts)} hosts on the bridge {lab.bridge} in the network namespace {lab.netns}")
        for host in lab.hosts:
            say(f"  {host.name:<9} {host.address:<15} {host.role:<10} {host.department:<12} port {host.interface}")
        say(f"truth goes to {lab.truth_path}")
        if record is not None:
            recording = stack.enter_context(lab.record(record))
            say(f"recording to {record}")
        for entry in lab.run_schedule(entries):
            say(f"  {entry.attack} at {entry.after_s:g} s")
        if on_started is not None:
            on_started(lab)
        over.wait(duration_s)
        if record is not None:
            done = recording.stop()
            say(f"recorded {done.packets} packets ({done.dropped} dropped) to {record}")
        say("stopping")
        if on_ending is not None:
            on_ending(lab)
    return lab.truths()
