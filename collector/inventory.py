"""What of FlowSAGE is in the kernel now, asked of the kernel alone, whether or not a process of ours runs."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flowsage.collector import libbpf, statistics, syscall
from flowsage.collector.errors import FlowsageError
from flowsage.collector.pins import ROOT
from flowsage.collector.program import COUNTERS
from flowsage.collector.statistics import ProgramStats
from flowsage.collector.xdp import attached_program

_ON_PACKETS = {3, 6}  # enum bpf_prog_type: SCHED_CLS (of which TCX is one), XDP


@dataclass(frozen=True, kw_only=True)
class Present:
    """A program of ours that is attached or pinned.

    `interfaces` of this network namespace with the mode ("drv", "skb", "hw"; "tcx" for egress), `elsewhere` how many
    it runs on in others; `sensors` directories under which it is pinned, with the process that has each of them (None:
    no process, it goes on alone); `recent_runs` and `recent_ns`, the mean time of one, while we
    looked; `counters` by name (flow program: see `COUNTERS`; counter: packets and bytes by protocol), in the kernel
    since it was loaded.
    """

    stats: ProgramStats
    interfaces: tuple[tuple[str, str], ...]
    elsewhere: int
    sensors: dict[Path, int | None]
    recent_runs: int
    recent_ns: float | None
    counters: dict[str, int]


def inventory(*, root: Path = ROOT, over_s: float = 0.2) -> list[Present]:
    """Programs of ours, by id. Counts runs for `over_s` seconds. Raises PrivilegeError without CAP_SYS_ADMIN."""
    try:
        ours = [number for number in syscall.ids("program") if _is_ours(number)]
        linked = syscall.linked_programs()
    except OSError as error:
        raise libbpf.failure(error.errno or errno.EINVAL, "asking the kernel for its programs") from error
    pins = _pinned_programs(root)
    here = list(_here())
    running = {number for _, _, number in here}
    wanted = [number for number in ours if number in linked or number in pins or number in running]
    before = _runs(wanted)
    if wanted and over_s > 0:
        with statistics.counting():
            time.sleep(over_s)
    found = []
    for number in wanted:
        try:
            stats = statistics.read_program(number)
            counters = _counters(stats)
        except FlowsageError:  # it went while we looked
            continue
        runs, ns = (
            after - was for after, was in zip((stats.run_count, stats.run_time_ns), before[number], strict=True)
        )
        interfaces = tuple((name, mode) for name, mode, running_there in here if running_there == number)
        found.append(
            Present(
                stats=stats,
                interfaces=interfaces,
                elsewhere=max(0, len(linked.get(number, [])) - len(interfaces)),
                sensors={directory: _holder(directory) for directory in sorted(pins.get(number, ()))},
                recent_runs=runs,
                recent_ns=ns / runs if runs else None,
                counters=counters,
            )
        )
    return found


def _here() -> Iterator[tuple[str, str, int]]:
    """Interface, mode and program of this namespace. (A link knows an index, which may be that of another one.)"""
    for index, name in socket.if_nameindex():
        there = attached_program(name)
        if there is not None:
            yield name, *there
        for number in syscall.tcx_egress(index):
            yield name, "tcx", number


def _is_ours(number: int) -> bool:
    info = _info(number)
    name = info.name.decode() if info else ""
    return info is not None and info.type in _ON_PACKETS and (name.startswith("flow_") or name == "xdp_counter")


def _info(number: int) -> syscall.ProgramInfo | None:
    fd = syscall.by_id("program", number)
    if fd < 0:
        return None
    try:
        return syscall.info(fd, syscall.ProgramInfo)
    finally:
        os.close(fd)


def _runs(numbers: list[int]) -> dict[int, tuple[int, int]]:
    infos = ((number, _info(number)) for number in numbers)
    return {number: (info.run_cnt, info.run_time_ns) if info else (0, 0) for number, info in infos}


def _counters(stats: ProgramStats) -> dict[str, int]:
    names = {m.name for m in stats.maps}
    if "protocols" in names:
        rows = statistics.read_pairs(stats.program_id, "protocols")
        values = zip(statistics.PROTOCOLS, rows, strict=True)
        return {f"{unit}_{name.lower()}": row[i] for name, row in values for i, unit in enumerate(("packets", "bytes"))}
    if "counters" in names:
        (row,) = statistics.read_rows(stats.program_id, "counters")
        # A program of another version may count other things: then they have no names here.
        return dict(zip(COUNTERS, row, strict=True)) if len(row) == len(COUNTERS) else {}
    return {}


def _pinned_programs(root: Path) -> dict[int, set[Path]]:
    """Programs that are pinned under `root`, or held by a link pinned there, with the directories of their sensors."""
    found: dict[int, set[Path]] = {}
    for path in _files(root):
        fd = syscall.pinned(path)
        if fd < 0:
            continue
        try:
            kind = os.readlink(f"/proc/self/fd/{fd}")
            if "bpf-prog" in kind:
                number = int(syscall.info(fd, syscall.ProgramInfo).id)
            elif "bpf_link" in kind or "bpf-link" in kind:
                number = int(syscall.info(fd, syscall.LinkInfo).prog_id)
            else:
                continue
        except OSError:
            continue
        finally:
            os.close(fd)
        found.setdefault(number, set()).add(root / path.relative_to(root).parts[0])
    return found


def _holder(directory: Path) -> int | None:
    """Process that has locked a sensor's directory (`pins.Pins`), as /proc/locks tells: to try would be to take it."""
    try:
        there = directory.stat()
    except OSError:
        return None
    mine = f"{os.major(there.st_dev):02x}:{os.minor(there.st_dev):02x}:{there.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if "FLOCK" in fields and fields[-3] == mine:
            return int(fields[-4])
    return None


def _files(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        yield from (Path(folder) / name for name in sorted(names))
