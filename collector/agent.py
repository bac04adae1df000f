"""The sensor's loop: attach, drain the ring, sweep the table, hand on; then detach and leave nothing behind.

Order of a start: look at the interfaces → load → attach → drain. Order of a stop: detach → flush the table (end reason:
forced end) → drain to the end → close the sink. Whatever happens in between, the interfaces are let go.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flowsage.collector.clock import SECOND, UnixClock
from flowsage.collector.errors import ConfigurationError, FlowsageError
from flowsage.collector.interface import driver_of, in_namespace, index_of, is_running, require_ethernet, vlan_offload
from flowsage.collector.ledger import Ledger, Snapshot
from flowsage.collector.program import FlowProgram, FlowSettings
from flowsage.collector.publish import Origin, PublishCounts, Sink
from flowsage.collector.records import RECORD_DTYPE, to_batch
from flowsage.collector.xdp import EBPFAttachMode

logger = logging.getLogger(__name__)

GRACE_S = 0.002
EMPTY = np.zeros(0, RECORD_DTYPE)


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """How a sensor works. Durations are nanoseconds; a timeout of 0 never fires.

    name              of the sensor
    interfaces        to watch; they share one flow table
    netns             network namespace that they are in (a name of `ip netns`, or a path); None: that of the caller
    mode              "drv" (native), "skb" (generic), or "auto": native where the driver can, else generic
    mirror            the interfaces carry copies of traffic: drop packets once they are counted
    replace           put our program in the place of one that somebody else attached
    table_entries     flows in the kernel's table; 256 bytes each, preallocated
    ring_bytes        the ring between kernel and agent, a power of two; 256 bytes a record
    idle_timeout, active_timeout, half_open_timeout, linger    see bpf/flow.h
    sweep_interval    how often the table is searched for flows that ended or timed out
    poll_interval     how often the ring is drained
    heartbeat_interval  a sweep that finds nothing to hand on sends the watermark alone, at most so often
    """

    name: str
    interfaces: tuple[str, ...]
    netns: str | None = None
    mode: Literal["auto", "drv", "skb"] = "auto"
    mirror: bool = False
    replace: bool = False
    table_entries: int = 262_144
    ring_bytes: int = 64 << 20
    idle_timeout: int = 15 * SECOND
    active_timeout: int = 60 * SECOND
    half_open_timeout: int = 5 * SECOND
    linger: int = 1 * SECOND
    sweep_interval: int = 1 * SECOND
    poll_interval: int = SECOND // 10
    heartbeat_interval: int = 1 * SECOND


@dataclass
class _Watched:
    """An interface: its index where we are attached (None: we are not), and whether it has its carrier."""

    name: str
    index: int | None = None
    running: bool = True
    complaint: str = ""


class Agent:
    """One sensor: a flow table, the interfaces that feed it, and the sink that its records go to.

    `run` works in the caller's thread until `stop`; `start` does the same in a thread of its own, and `join` waits for
    it; or call `open`, `step` (as often as you like) and `close` by hand. `stop` may be called from anywhere, a signal
    handler included. An interface that goes away is forgotten, and attached again when it is back.
    """

    def __init__(self, settings: AgentSettings, sink: Sink, *, clock: UnixClock | None = None) -> None:
        if not settings.interfaces:
            raise ConfigurationError("no interface is named; name at least one to watch (--interface eth0)")
        self.settings = settings
        self.sink = sink
        self.clock = clock or UnixClock()
        self.program = FlowProgram(
            FlowSettings(
                table_entries=settings.table_entries,
                ring_bytes=settings.ring_bytes,
                idle_ns=settings.idle_timeout,
                active_ns=settings.active_timeout,
                half_open_ns=settings.half_open_timeout,
                linger_ns=settings.linger,
                wake_bytes=settings.ring_bytes // 2,
                mirror=settings.mirror,
            )
        )
        self.ledger = Ledger(self.program)
        self.incomplete_sweeps = 0
        self.interfaces_lost = 0
        self._watched = [_Watched(name) for name in dict.fromkeys(settings.interfaces)]
        self._lock = threading.RLock()
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._open = False
        self._sink_failed = False
        self._next_sweep_ns = 0
        self._watermark_ns = 0
        self._boot = ""
        self._sequence = 0
        self._handed_on_ns = 0
        self._final: Snapshot | None = None

    # ---- start and stop ----

    def open(self) -> None:
        """Load and attach. Raises what is wrong with an interface, a privilege or the kernel, with nothing attached."""
        settings = self.settings
        try:
            with in_namespace(settings.netns):
                for watched in self._watched:
                    require_ethernet(watched.name)
                self.program.load()
                self._boot = uuid.uuid4().hex
                now = self.clock.monotonic_ns()
                for watched in self._watched:
                    self._attach(watched)
        except BaseException:
            self.program.close()
            raise
        self._watermark_ns = now + self.clock.update()
        self._next_sweep_ns = now + settings.sweep_interval
        self._open = True
        self._ready.set()

    def _attach(self, watched: _Watched) -> None:
        attachment = self.program.attach(
            watched.name, EBPFAttachMode(self.settings.mode), replace=self.settings.replace
        )
        watched.index, watched.complaint = attachment.ifindex, ""
        logger.info("watching %s (%s mode)", watched.name, attachment.mode.value)
        if vlan_offload(watched.name) and driver_of(watched.name) != "veth":
            logger.warning(
                "%s takes VLAN tags off before they can be seen, so flows carry no VLAN; `ethtool -K %s rxvlan off` "
                "leaves them on",
                watched.name,
                watched.name,
            )

    def run(self) -> Snapshot:
        """Open, work until `stop`, close; returns the final ledger. Raises what ends it otherwise, after closing."""
        if not self._open:
            self.open()
        try:
            while not self._wait():
                self.step()
        finally:
            final = self.close()
        return final

    def start(self, timeout_s: float = 30.0) -> None:
        """`run` in a thread of its own; returns once packets are counted. Raises what `open` raises."""

        def work() -> None:
            try:
                self.run()
            except BaseException as error:
                self._failure = error
                logger.debug("the sensor ends", exc_info=True)
            finally:
                self._ready.set()

        self._thread = threading.Thread(target=work, name=f"flowsage-{self.settings.name}", daemon=True)
        self._thread.start()
        if not self._ready.wait(timeout_s):
            raise FlowsageError(f"the sensor has not started within {timeout_s:g} s; see the log for what it waits for")
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ask it to end. Safe in a signal handler: it takes no lock."""
        self._stopping = True
        with suppress(BlockingIOError, OSError):
            os.eventfd_write(self._stop_fd, 1)

    def join(self) -> Snapshot:
        """Wait for the thread of `start` to end; returns the final ledger. Raises what ended it, if not `stop`."""
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self._final is not None
        return self._final

    @property
    def alive(self) -> bool:
        """Whether the thread of `start` works."""
        return self._thread is not None and self._thread.is_alive()

    def _wait(self) -> bool:
        """Sleep for the poll interval; True: it is time to end."""
        if not self._stopping:
            select.select([self._stop_fd], [], [], self.settings.poll_interval / SECOND)
        return self._stopping

    def close(self) -> Snapshot:
        """Detach, flush the table, drain to the end, close the sink. Idempotent; returns the final ledger."""
        with self._lock:
            if self._final is not None:
                return self._final
            failure: BaseException | None = None
            try:
                with in_namespace(self.settings.netns):
                    for watched in self._watched:
                        self._detach(watched)
                # A packet may still be under way on another CPU.
                time.sleep(GRACE_S)
                for records in self.program.flush_all():
                    try:
                        self._hand_on(records)
                    except Exception as error:
                        failure = failure or error
                self._watermark_ns = max(self._watermark_ns, self.clock.monotonic_ns() + self.clock.offset_ns)
                try:
                    if not self._sink_failed:
                        self._hand_on(EMPTY)
                    self.sink.close()
                except Exception as error:
                    failure = failure or error
                self.ledger.take_back("not written", getattr(self.sink, "unwritten", 0))
                self._final = self.snapshot()
            finally:
                self._open = False
                self.program.close()
                os.close(self._stop_fd)
                self._stop_fd = -1
            if failure is not None:
                raise failure
            return self._final

    def _detach(self, watched: _Watched) -> None:
        if watched.index is None:
            return
        watched.index = None
        try:
            self.program.detach(watched.name)
        except FlowsageError as error:
            logger.warning("%s", error)

    # ---- work ----

    def step(self) -> int:
        """Drain, sweep if it is due, hand on; returns how many records there were."""
        with self._lock:
            now = self.clock.monotonic_ns()
            self.clock.update()
            count = 0
            if now >= self._next_sweep_ns:
                self._next_sweep_ns = max(self._next_sweep_ns + self.settings.sweep_interval, now)
                self._look_after_interfaces()
                # What is in the ring goes first, so that the sweep finds room in it.
                count += self._drain()
                swept = self.clock.monotonic_ns()
                failed = self.program.expire(swept).failed
                count += self._drain(swept if not failed else None)
                self.incomplete_sweeps += bool(failed)
            else:
                count += self._drain()
            return count

    def _drain(self, swept_ns: int | None = None) -> int:
        """Hand on what waits in the ring. `swept_ns`: a sweep at that time was complete, and is in the ring by now."""
        records = self.program.ring.drain()
        if swept_ns is not None and self.settings.active_timeout:
            # What remains in the table began within the active timeout: see the walk in bpf/flow.bpf.c.
            watermark = swept_ns - self.settings.active_timeout + self.clock.offset_ns
            self._watermark_ns = max(self._watermark_ns, watermark)
        if len(records) or (swept_ns is not None and self._heartbeat_due(swept_ns)):
            self._hand_on(records)
        return len(records)

    def _heartbeat_due(self, now_ns: int) -> bool:
        # Sweeps come a little early or late.
        silence = now_ns - self._handed_on_ns + self.settings.sweep_interval // 2
        return silence >= self.settings.heartbeat_interval and self.sink.ready()

    def _hand_on(self, records: npt.NDArray[Any]) -> None:
        self.ledger.drain(records)
        if self._sink_failed:
            self.ledger.lose("sink failed", len(records))
            return
        batch = to_batch(records, clock_offset_ns=self.clock.offset_ns, sensor=self.settings.name)
        origin = Origin(
            sensor=self.settings.name,
            boot=self._boot,
            sequence=self._sequence,
            watermark_ns=self._watermark_ns,
            drained_ns=self.clock.monotonic_ns() + self.clock.offset_ns,
        )
        try:
            self.sink.put(batch, origin)
        except BaseException:
            self._sink_failed = True
            self.ledger.lose("sink failed", len(records))
            raise
        self._sequence += 1
        self._handed_on_ns = self.clock.monotonic_ns()
        self.ledger.acknowledge(len(records))

    @property
    def watermark_ns(self) -> int:
        """No flow that began before this Unix time is still in the table or the ring."""
        return self._watermark_ns

    def snapshot(self, *, walk: bool = True) -> Snapshot:
        """The ledger now; see `Ledger.snapshot`. After the end: the final one."""
        with self._lock:
            if self._final is not None:
                return self._final
            counts = getattr(self.sink, "counts", None)
            return self.ledger.snapshot(counts if isinstance(counts, PublishCounts) else None, walk=walk)

    # ---- interfaces that come and go ----

    def interfaces(self) -> dict[str, str]:
        """State of each interface: "watched", "down" (attached, no carrier) or "missing"."""
        return {w.name: "missing" if w.index is None else "watched" if w.running else "down" for w in self._watched}

    def _look_after_interfaces(self) -> None:
        with in_namespace(self.settings.netns):
            for watched in self._watched:
                index = index_of(watched.name)
                if watched.index is not None and index != watched.index:
                    self._lost(watched, "is gone; it is watched again when it returns")
                elif watched.index is not None and not self.program.attachments[watched.name].present():
                    self._lost(watched, "lost our program to somebody else; attaching it again")
                if watched.index is None and index is not None:
                    self._attach_again(watched)
                running = index is not None and is_running(watched.name)
                if watched.index is not None and running != watched.running:
                    logger.warning("interface %s is %s", watched.name, "up" if running else "down")
                    watched.running = running

    def _lost(self, watched: _Watched, how: str) -> None:
        self.interfaces_lost += 1
        logger.warning("interface %s %s", watched.name, how)
        self._detach(watched)

    def _attach_again(self, watched: _Watched) -> None:
        try:
            self._attach(watched)
        except FlowsageError as error:
            if str(error) != watched.complaint:
                watched.complaint = str(error)
                logger.warning("interface %s is back and cannot be watched: %s", watched.name, error)
