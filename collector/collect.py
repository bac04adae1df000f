"""`flowsage collect`: records of one or several interfaces to Parquet files or lines, until SIGTERM.

Imports nothing that the first packet need not wait for.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flowsage.collector.agent import Agent, AgentSettings
from flowsage.collector.ledger import Snapshot
from flowsage.collector.output import LinesOutput, OutputClosedError
from flowsage.collector.parquet import ParquetOutput
from flowsage.collector.publish import Sink

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP call `stop` within the block. In another thread than the main one: changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop()) for number in STOP_SIGNALS}
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
    on_ready: Callable[[Agent], None] | None = None,
) -> Snapshot:
    """Watch `settings.interfaces` until a signal; records go to `output`: a directory, "-" for lines on stdout, or a sink.

    At the end the table is flushed (end reason: forced end), nothing stays attached, and the final ledger is returned.
    `on_ready` is called once packets are counted. Raises the errors of `Agent.open` and of the outputs.
    """
    if isinstance(output, Sink):
        sink = output
    elif str(output) == "-":
        sink = LinesOutput()
    else:
        sink = ParquetOutput(output, sensor=settings.name, rotate_bytes=rotate_bytes, rotate_s=rotate_s)
    agent = Agent(settings, sink)
    with stopped_by_signals(agent.stop):
        agent.open()
        if on_ready is not None:
            on_ready(agent)
        try:
            return agent.run()
        except OutputClosedError:
            # `flowsage collect | head`: nothing is wrong.
            return agent.snapshot()


def summary(ledger: Snapshot) -> str:
    """The final ledger in one line, for standard error."""
    reasons = [f"{count.packets:,} {name.replace('_', ' ')}" for name, count in ledger.reasons.items() if count.packets]
    lost = sum(ledger.records_lost.values())
    return (
        f"{ledger.seen.packets:,} packets seen, {ledger.drained.packets:,} in {ledger.records_drained:,} flow records"
        + (f", {', '.join(reasons)}" if reasons else "")
        + (f"; {ledger.records_pending:,} records wait in the spool" if ledger.records_pending else "")
        + (f"; {lost:,} records lost ({', '.join(ledger.records_lost)})" if lost else "")
        + ("; the ledger closes" if ledger.closes else f"; the ledger does NOT close: {ledger.balance} packets")
    )
