"""`flowsage collect`: records of one or several interfaces to Parquet files or lines, until SIGTERM.

Imports nothing that the first packet need not wait for.
"""

from __future__ import annotations

import logging
import os
import pwd
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flowsage.collector import privileges
from flowsage.collector.agent import Agent
from flowsage.collector.agent_settings import AgentSettings
from flowsage.collector.errors import UsageError
from flowsage.collector.interface import enter_namespace
from flowsage.collector.ledger import Snapshot
from flowsage.collector.output import LinesOutput, OutputClosedError
from flowsage.collector.parquet import ParquetOutput
from flowsage.collector.service import Service
from flowsage.collector.sink import Sink

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def stopped_by_signals(*stops: Callable[[], None]) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP call `stops` in turn within the block; but in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        for each in stops:
            each()

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def collect(
    settings: AgentSettings,
    output: str | os.PathLike[str] | Sink = "-",
    *,
    rotate_bytes: int = 256 << 20,
    rotate_s: float = 300.0,
    drop_privileges: bool = False,
    service: Service | None = None,
    on_ready: Callable[[Agent], None] | None = None,
) -> Snapshot:
    """Watch `settings.interfaces` until a signal; records go to `output`: a directory, "-" for lines, or a sink.

    At the end the table is flushed (end reason: forced end), nothing stays attached, and the final ledger is returned.
    Killed, a sensor that pins (`settings.pins`) goes on in the kernel until this is called again; see Agent.
    `on_ready` is called once packets are counted, and then `service` is told. `drop_privileges`: from then on the
    calling thread has no capability (and stays in the sensor's network namespace). Raises the errors of `Agent.open`
    and of the outputs.
    """
    if isinstance(output, Sink):
        sink = output
    elif str(output) == "-":
        sink = LinesOutput()
    else:
        sink = ParquetOutput(output, sensor=settings.name, rotate_bytes=rotate_bytes, rotate_s=rotate_s)
    agent, service = Agent(settings, sink), service or Service()
    with stopped_by_signals(agent.stop, service.stopping):
        if drop_privileges and settings.netns is not None:
            enter_namespace(settings.netns)
        agent.open()
        if drop_privileges:
            _drop_privileges(agent, sink)
        sink.start()
        if on_ready is not None:
            on_ready(agent)
        service.ready(f"watching {', '.join(settings.interfaces)}")
        try:
            return agent.run(service.alive)
        except OutputClosedError:
            # `flowsage collect | head`: nothing is wrong.
            return agent.snapshot()


def _drop_privileges(agent: Agent, sink: Sink) -> None:
    kept = privileges.drop(agent.snapshot)
    logger.info("capabilities are given up%s", " but for CAP_BPF, which this kernel asks for" if kept else "")
    directory = getattr(sink, "directory", None)
    if directory is not None and not os.access(directory, os.W_OK | os.X_OK):
        agent.close()
        raise UsageError(
            f"the output directory {directory} cannot be written to once privileges are given up: make it "
            f"{pwd.getpwuid(os.geteuid()).pw_name}'s, or keep them (--keep-privileges)"
        )


def summary(ledger: Snapshot) -> str:
    """The final ledger in one line, for standard error."""
    reasons = [f"{count.packets:,} {name.replace('_', ' ')}" for name, count in ledger.reasons.items() if count.packets]
    lost = sum(ledger.records_lost.values())
    return (
        f"{ledger.seen.packets:,} packets seen, {ledger.drained.packets:,} in {ledger.records_drained:,} flow records"
        + (f", {', '.join(reasons)}" if reasons else "")
        + (f"; {ledger.records_pending:,} records wait in the spool" if ledger.records_pending else "")
        + (f"; {lost:,} records lost ({', '.join(ledger.records_lost)})" if lost else "")
        + "".join(f"; {name} was not watched for {ns / 1e6:.1f} ms" for name, ns in ledger.unwatched_ns.items())
        + ("; the ledger closes" if ledger.closes else f"; the ledger does NOT close: {ledger.balance} packets")
    )
