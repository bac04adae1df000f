"""GraphSAGE streaming inside a program: the sensor in a thread, the log in memory, scoring in another thread.

As `flowsage run`, but nothing of it outlives the process, and findings are kept here, the last of them.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from dataclasses import replace
from typing import Any

from flowsage.collector.agent import Agent
from flowsage.collector.publish import Publisher
from flowsage.pipelines.memory_log import MemoryLog
from flowsage.pipelines.metrics import Metrics
from flowsage.pipelines.run import LiveScoring, sensor_metrics
from flowsage.pipelines.sensor import agent_settings
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.topics import flows_topic

logger = logging.getLogger(__name__)

FINDINGS_KEPT = 100


class RecentFindings:
    """The last findings that were told (OCSF), in place of a file."""

    def __init__(self) -> None:
        self.last: deque[dict[str, Any]] = deque(maxlen=FINDINGS_KEPT)
        self.told = 0

    def write_json(self, line: str) -> None:
        """Remember it."""
        self.told += 1
        self.last.append(json.loads(line))


class Streaming:
    """Watches one interface and scores what passes, until `stop`.

    off        why nothing is scored any more; "" as long as something is
    agent      the sensor; it counts packets on where scoring has ended
    findings   the last that were told

    Raises ProgramError, InterfaceError and PrivilegeError as the sensor does, ConfigurationError of the model.
    """

    def __init__(
        self, interface: str, settings: Settings, log: MemoryLog, metrics: Metrics, *, netns: str | None
    ) -> None:
        self.off = ""
        self.findings = RecentFindings()
        self._stopped = threading.Event()
        sensor = agent_settings(settings, interfaces=(interface,), netns=netns)
        # Nothing of it outlives this process.
        sensor = replace(sensor, heartbeat_interval=settings.windows.pane // 2, pins=None)
        self.agent = Agent(sensor, Publisher(log, sensor=sensor.name, topic=flows_topic(settings.kafka.prefix)))
        self.agent.start()
        try:
            metrics.add(lambda: sensor_metrics(self.agent))
            self._scoring = LiveScoring(settings, log, self.findings, metrics)
            metrics.add(self._scoring.snapshot)
            self._thread = threading.Thread(target=self._score, name="flowsage-scoring", daemon=True)
            self._thread.start()
        except BaseException:
            self.agent.stop()
            self.agent.join()
            raise

    def _score(self) -> None:
        try:
            self._scoring.run(self._stopped, None)
        except Exception as error:  # packets are counted on; records that nobody takes are lost, counted in the ledger
            self.off = f"it has ended: {error}"
            logger.exception("GraphSAGE streaming has ended")

    def stop(self) -> None:
        """Takes the program off, scores what is open. Raises what the sensor has ended with."""
        self._stopped.set()
        self._thread.join()
        self.agent.stop()
        self.agent.join()
        if not self.off:
            self._scoring.finish()

    def ledger(self) -> dict[str, Any]:
        """Packets seen, in records, in the table, in no flow by reason; whether it closes."""
        ledger = self.agent.snapshot()
        return {
            "packets": ledger.seen.packets,
            "in_records": ledger.drained.packets,
            "in_ring": ledger.in_ring.packets,
            "in_table": ledger.in_table.packets,
            "not_in_flows": {reason: count.packets for reason, count in ledger.reasons.items()},
            "records": ledger.records_drained,
            "records_lost": ledger.records_lost,
            "closes": ledger.closes,
        }

    def readiness(self) -> dict[str, Any]:
        """Whether graph and alarms are ready, flows taken and windows closed."""
        scorer = self._scoring.scorer
        prior, alarms = scorer.detector.prior, scorer.detector.alarms.readiness()
        return {
            "graph_ready": prior is not None and prior.waiting is None,
            "alarms_ready": alarms.ready,
            "standing": scorer.standing(),
            "flows": scorer.counters.consumed,
            "windows": scorer.counters.windows,
        }


def missing_model(settings: Settings) -> str:
    """Why GraphSAGE cannot run here, "" where it can. Imports it, which takes a second or two."""
    if settings.model.prior == "none":
        return "model.prior is none in the configuration"
    try:
        import torch  # noqa: F401

        import flowsage.pipelines.scorer  # noqa: F401
    except ImportError as error:
        what = f"{error.name} is not installed" if error.name else str(error)
        return f"{what}; `pip install 'flowsage[model]'` adds it"
    return ""
