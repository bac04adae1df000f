"""The sensor's loop: attach, drain the ring, sweep the table, hand on; then detach and leave nothing behind.

Order of a start: look at the interfaces → load, or adopt (collector/lifetime.py) → finish what was interrupted
(collector/handover.py) → attach → drain. Order of a stop: detach → flush the table (end reason: forced end) → drain to
the end → close the sink.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from flowsage.collector.agent_settings import AgentSettings
from flowsage.collector.clock import SECOND, UnixClock
from flowsage.collector.errors import ConfigurationError, FlowsageError
from flowsage.collector.handover import Handover
from flowsage.collector.interface import in_namespace
from flowsage.collector.ledger import Ledger, Snapshot
from flowsage.collector.lifetime import Lifetime
from flowsage.collector.program import FlowProgram
from flowsage.collector.publish import PublishCounts
from flowsage.collector.sink import Sink
from flowsage.collector.watch import Watch
from flowsage.collector.xdp import EBPFAttachMode

logger = logging.getLogger(__name__)

GRACE_S = 0.002
SWEEP_ATTEMPTS = 8


def _is_an_end(error: BaseException) -> bool:
    """Whoever read our records has gone: an end like any other, and nobody will come back for the rest."""
    return isinstance(error, FlowsageError) and error.exit_code == 0


class Agent:
    """One sensor: a flow table, the interfaces that feed it, and the sink that its records go to.

    `run` works in the caller's thread until `stop`; `start` does the same in a thread of its own, and `join` waits for
    it; or call `open`, `step` (as often as you like) and `close` by hand. `stop` may be called from anywhere, a signal
    handler included. An interface that goes away is forgotten, and attached again when it is back.

    Pinned (`settings.pins`), a sensor that is killed, or whose sink fails, goes on counting in the kernel, and the next
    `open` goes on where it was; `close` leaves nothing.
    """

    def __init__(self, settings: AgentSettings, sink: Sink, *, clock: UnixClock | None = None) -> None:
        if not settings.interfaces:
            raise ConfigurationError("no interface is named; name at least one to watch (--interface eth0)")
        self.settings = settings
        self.sink = sink
        self.clock = clock or UnixClock()
        self.lifetime = Lifetime(
            settings.name,
            settings.flow_settings(),
            settings.pins,
            path=settings.program,
            loader=settings.loader,
            monotonic_ns=self.clock.monotonic_ns,
        )
        self.ledger = Ledger(self.lifetime.program)
        self._watch = Watch(
            self.lifetime,
            settings.interfaces,
            EBPFAttachMode(settings.mode),
            replace=settings.replace,
            egress=settings.egress,
        )
        self._handover = Handover(
            settings.name,
            sink,
            self.ledger,
            self.clock,
            batch_records=settings.batch_records,
            lasting=settings.pins is not None,
        )
        self._lock = threading.RLock()
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._open = False
        self._next_sweep_ns = 0
        self._final: Snapshot | None = None

    @property
    def program(self) -> FlowProgram:
        """The program that is attached."""
        return self.lifetime.program

    # ---- start and stop ----

    def open(self) -> None:
        """Load, or adopt what an earlier process left, and attach. Raises what is wrong with an interface, a privilege
        or the kernel, with nothing attached that was not before.
        """
        life, settings = self.lifetime, self.settings
        try:
            with in_namespace(settings.netns):
                self._watch.check()
                life.open()
                now = self.clock.monotonic_ns()
                if life.adopted:
                    self._handover.resume(life.journal, (life.retiring or life.program).ring)
                else:
                    self._handover.begin(life.journal, now + self.clock.offset_ns)
                self.clock.update()
                self._take_over()
        except BaseException:
            if life.adopted:
                life.release()
            else:
                life.remove()
            raise
        self._next_sweep_ns = now + settings.sweep_interval
        self._open = True
        self._ready.set()

    def _take_over(self) -> None:
        """Every interface runs our program, and what it replaces is empty."""
        life = self.lifetime
        while True:
            self._watch.attach()
            if life.retiring is not None:
                time.sleep(GRACE_S)
                self._flush(life.retiring)
            life.settle()
            if not life.outdated:
                break
            life.upgrade()
        self.ledger.follow(life.program)

    def run(self, alive: Callable[[], None] | None = None) -> Snapshot:
        """Open, work until `stop`, close; returns the final ledger. Raises what ends it otherwise, after closing.

        alive   called after each step
        """
        if not self._open:
            self.open()
        try:
            while not self._wait():
                self.step()
                if alive is not None:
                    alive()
        except BaseException as error:
            self._handover.lasting &= not _is_an_end(error)
            if self._handover.lasting:
                self.leave()
            else:
                self.close()
            raise
        return self.close()

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
        with suppress(OSError, ValueError):  # ValueError: it has ended already
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
        """Detach, flush the table, drain to the end, close the sink. Idempotent; returns the final ledger.

        Where the sink fails at that, and the sensor is pinned, what was not handed on stays for the next start.
        """
        with self._lock:
            if self._final is not None:
                return self._final
            failure: BaseException | None = None
            try:
                with in_namespace(self.settings.netns):
                    self._watch.detach()
                # A packet may still be under way on another CPU.
                time.sleep(GRACE_S)
                failure = self._finish()
                self._final = self.snapshot()
            finally:
                self._open = False
                if self._handover.failed and self._handover.lasting:
                    self.lifetime.release()
                else:
                    self.lifetime.remove()
                os.close(self._stop_fd)
                self._stop_fd = -1
            if failure is not None:
                raise failure
            return self._final

    def _finish(self) -> BaseException | None:
        """Everything that is left to the sink, and its end; returns what went wrong first."""
        failure: BaseException | None = None
        ring = self.program.ring
        while True:
            try:
                self._flush(self.program)
                if not self._handover.failed:
                    self._handover.heartbeat(ring, self.clock.monotonic_ns() + self.clock.offset_ns)
                break
            except Exception as error:
                failure = failure or error
                self._handover.lasting &= not _is_an_end(error)
                if self._handover.lasting:
                    break
        try:
            self.sink.close()
        except Exception as error:
            failure = failure or error
        return failure

    def leave(self) -> None:
        """Go without a word: what is pinned stays attached and counting, for the next start. Idempotent."""
        with self._lock:
            if self._final is not None:
                return
            self._final = self.snapshot()
            self._open = False
            undecided = self.lifetime.journal.intent is not None
            self.lifetime.release()
            logger.warning(
                "the program stays attached to %s and counts on: start again to go on where this ended, or remove it "
                "with `flowsage collect --detach`",
                ", ".join(self.settings.interfaces),
            )
            # Whether the sink has the last batch is for the next process to ask: it has to find it as it is now.
            if not undecided:
                with suppress(Exception):
                    self.sink.close()
            os.close(self._stop_fd)
            self._stop_fd = -1

    # ---- work ----

    def step(self) -> int:
        """Drain, sweep if it is due, hand on; returns how many records there were."""
        with self._lock:
            now = self.clock.monotonic_ns()
            self.clock.update()
            # What is in the ring goes first, so that a sweep finds room in it.
            count = self._handover.drain(self.program.ring)
            if now >= self._next_sweep_ns:
                self._next_sweep_ns = max(self._next_sweep_ns + self.settings.sweep_interval, now)
                with in_namespace(self.settings.netns):
                    self._watch.look_after()
                count += self._sweep()
            return count

    def _sweep(self) -> int:
        """Emit and hand on what has ended; where the ring was too small for all of it, again."""
        ring, count = self.program.ring, 0
        for _ in range(SWEEP_ATTEMPTS):
            swept = self.clock.monotonic_ns()
            if not self.program.expire(swept).failed:
                break
            count += self._handover.drain(ring)
        else:
            return count
        # What remains in the table began within the active timeout: see the walk in bpf/.
        active = self.settings.active_timeout
        watermark = swept - active + self.clock.offset_ns if active else 0
        drained = self._handover.drain(ring, watermark)
        if not drained and self._heartbeat_due(swept) and not ring.waiting:
            self._handover.heartbeat(ring, watermark)
        return count + drained

    def _heartbeat_due(self, now_ns: int) -> bool:
        # Sweeps come a little early or late.
        silence = now_ns - self._handover.handed_on_ns + self.settings.sweep_interval // 2
        return silence >= self.settings.heartbeat_interval and self.sink.ready()

    def _flush(self, program: FlowProgram) -> None:
        """Everything in a table to the sink, as forced ends."""
        while True:
            failed = program.flush().failed
            if not self._handover.drain(program.ring) and not failed:
                return

    @property
    def watermark_ns(self) -> int:
        """No flow that began before this Unix time is still in the table or the ring."""
        return self._handover.watermark_ns

    def snapshot(self, *, walk: bool = True) -> Snapshot:
        """The ledger now; see `Ledger.snapshot`. After the end: the final one."""
        with self._lock:
            if self._final is not None:
                return self._final
            counts = getattr(self.sink, "counts", None)
            now = self.ledger.snapshot(counts if isinstance(counts, PublishCounts) else None, walk=walk)
            return replace(now, unwatched_ns=dict(self.lifetime.unwatched_ns))

    def interfaces(self) -> dict[str, str]:
        """State of each interface: "watched", "down" (attached, no carrier) or "missing"."""
        return self._watch.states()

    @property
    def interfaces_lost(self) -> int:
        """How often an interface went away, or lost our program."""
        return self._watch.lost
