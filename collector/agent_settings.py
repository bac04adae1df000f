"""How a sensor works: everything that can be said of it before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flowsage.collector.clock import SECOND
from flowsage.collector.kernel_object import OBJECT, Loader
from flowsage.collector.program import FlowSettings


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """How a sensor works. Durations are nanoseconds; a timeout of 0 never fires.

    name              of the sensor
    interfaces        to watch; they share one flow table
    netns             network namespace that they are in (a name of `ip netns`, or a path); None: that of the caller
    mode              "drv" (native), "skb" (generic), "hw" (on the card), or "auto": native where the driver can, else
                      generic
    mirror            the interfaces carry copies of traffic: drop packets once they are counted
    replace           put our program in the place of one that somebody else attached
    egress            what leaves the interfaces is counted too (Linux 6.6)
    dedupe            a packet that several of the interfaces see is counted once
    loader            "libbpf": the object that is shipped; "bcc": compiled here; "auto": what is shipped, if there is
    program           the object that is loaded
    pins              where on bpffs programs and maps outlive the process, in a directory for each sensor; None: not
    table_entries     flows in the kernel's table; 256 bytes each, preallocated
    ring_bytes        the ring between kernel and agent, a power of two; 256 bytes a record
    batch_records     records that are handed on at once, at most
    idle_timeout, active_timeout, half_open_timeout, linger    see bpf/flow.h
    sweep_interval    how often the table is searched for flows that ended or timed out
    poll_interval     how often the ring is drained
    heartbeat_interval  a sweep that finds nothing to hand on sends the watermark alone, at most so often
    """

    name: str
    interfaces: tuple[str, ...]
    netns: str | None = None
    mode: Literal["auto", "drv", "skb", "hw"] = "auto"
    mirror: bool = False
    replace: bool = False
    egress: bool = False
    dedupe: bool = False
    loader: Loader = "auto"
    program: Path = OBJECT
    pins: Path | None = None
    table_entries: int = 262_144
    ring_bytes: int = 32 << 20
    batch_records: int = 8192
    idle_timeout: int = 15 * SECOND
    active_timeout: int = 60 * SECOND
    half_open_timeout: int = 5 * SECOND
    linger: int = 1 * SECOND
    sweep_interval: int = 1 * SECOND
    poll_interval: int = SECOND // 10
    heartbeat_interval: int = 1 * SECOND

    def flow_settings(self) -> FlowSettings:
        """What of it the program is loaded with."""
        return FlowSettings(
            table_entries=self.table_entries,
            ring_bytes=self.ring_bytes,
            idle_ns=self.idle_timeout,
            active_ns=self.active_timeout,
            half_open_ns=self.half_open_timeout,
            linger_ns=self.linger,
            wake_bytes=self.ring_bytes // 2,
            mirror=self.mirror,
            dedupe=self.dedupe,
            egress=self.egress,
        )
