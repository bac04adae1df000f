"""One interface under watch from a script: packets by protocol, and GraphSAGE's findings, in this process.

    with create_ebpf_monitoring("eth0") as monitoring:
        monitoring.get_metrics()["packet_counters"]          # {'TCP': 1200, 'UDP': 31, 'ICMP': 4, 'OTHER': 2}

An interface takes one XDP program. With GraphSAGE streaming it is the flow program, which counts by protocol what it
sees, by the same rule as `xdp_counter`, exactly; without, it is `xdp_counter` alone. What is missing is left out, and
`get_metrics()["state"]` says what is off and why.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from prometheus_client import generate_latest

from flowsage.collector.errors import ConfigurationError, FlowsageError, ProgramError
from flowsage.collector.interface import in_namespace, read_interface
from flowsage.collector.statistics import PROTOCOLS
from flowsage.collector.xdp import EBPFAttachMode
from flowsage.pipelines.config import load
from flowsage.pipelines.metrics import Metrics, Value
from flowsage.pipelines.settings import Settings

if TYPE_CHECKING:
    from flowsage.collector.agent import Agent
    from flowsage.collector.loader import EBPFLoader
    from flowsage.pipelines.memory_log import MemoryLog
    from flowsage.pipelines.streaming import Streaming

logger = logging.getLogger(__name__)

NOT_ASKED = "not asked for"


class NothingToMonitorError(FlowsageError):
    """Nothing of what was asked for can run here."""


class EBPFMonitoring:
    """What `create_ebpf_monitoring` returns. A context manager: leaves nothing attached.

    An interface that goes away and comes back is watched again where GraphSAGE streaming is on (by its sensor); the
    counter alone is not attached again, and `get_metrics()["program"]["attached"]` says so.

    `netns`: network namespace of the interface (see `interface.in_namespace`). Raises ConfigurationError where both
    parts are switched off, NothingToMonitorError where what remains of them is nothing, and InterfaceError,
    ProgramError, PrivilegeError as the loader does.
    """

    def __init__(
        self,
        interface: str,
        *,
        enable_xdp_counter: bool = True,
        enable_graphsage_streaming: bool = True,
        settings: Settings | None = None,
        netns: str | None = None,
    ) -> None:
        if not enable_xdp_counter and not enable_graphsage_streaming:
            raise ConfigurationError("both the counter and GraphSAGE streaming are off; leave one of them on")
        self.interface = interface
        self.settings = settings or load()
        self._netns = netns
        self._counting = enable_xdp_counter
        self._lock = threading.RLock()
        self._streaming: Streaming | None = None
        self._loader: EBPFLoader | None = None
        self._program_id = 0
        self._log: MemoryLog | None = None
        self._streaming_off = "" if enable_graphsage_streaming else NOT_ASKED
        self._final: dict[str, tuple[int, int]] | None = None
        self.metrics = Metrics()
        with in_namespace(netns):
            read_interface(interface)  # one that is not there is an error, whatever else is missing
        try:
            self._start()
        except BaseException:
            self.shutdown()
            raise

    # ---- start and stop ----

    def _start(self) -> None:
        if not self._streaming_off:
            from flowsage.pipelines.streaming import missing_model

            self._streaming_off = missing_model(self.settings)
        if not self._streaming_off:
            try:
                self._start_streaming()
                return
            except ProgramError as error:  # the counter needs less
                self._streaming_off = str(error)
        if self._streaming_off != NOT_ASKED:
            logger.warning("GraphSAGE streaming is off: %s", self._streaming_off)
        if not self._counting:
            raise NothingToMonitorError(f"the counter is off, and GraphSAGE streaming too: {self._streaming_off}")
        self._start_counter()

    def _start_counter(self) -> None:
        from flowsage.collector.loader import create_ebpf_loader

        sensor = self.settings.sensor
        self._loader = create_ebpf_loader()
        with in_namespace(self._netns):
            self._program_id = self._loader.load_program("xdp_counter.o")
            self._loader.attach_to_interface(
                self._program_id, self.interface, EBPFAttachMode(sensor.mode), replace=sensor.replace
            )
        self.metrics.add(self._counter_metrics)

    def _start_streaming(self) -> None:
        from flowsage.pipelines.memory_log import MemoryLog
        from flowsage.pipelines.streaming import Streaming

        self._log = MemoryLog()
        self._streaming = Streaming(self.interface, self.settings, self._log, self.metrics, netns=self._netns)

    @property
    def _agent(self) -> Agent | None:
        return None if self._streaming is None else self._streaming.agent

    def shutdown(self) -> None:
        """Stops, scores what is open, takes the program off. Idempotent; the last values stay readable."""
        with self._lock:
            if self._final is not None:
                return
            try:
                if self._streaming is not None:
                    self._streaming.stop()
            finally:
                final = dict.fromkeys(PROTOCOLS, (0, 0))
                with suppress(FlowsageError):
                    final = self._by_protocol()
                self._final = final
                if self._loader is not None:
                    with in_namespace(self._netns):
                        self._loader.close()

    @property
    def running(self) -> bool:
        """Whether packets are counted."""
        if self._final is not None:
            return False
        return self._agent.alive if self._agent is not None else self._loader is not None

    def __enter__(self) -> EBPFMonitoring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.shutdown()

    # ---- what it knows ----

    def get_packet_counters(self) -> dict[str, int]:
        """Packets by protocol: TCP, UDP, ICMP (ICMPv6 with it), OTHER (what is not IP, or malformed, too).

        Empty where the counter was not asked for.
        """
        return {name: packets for name, (packets, _) in self._by_protocol().items()} if self._counting else {}

    def get_metrics(self) -> dict[str, Any]:
        """Everything, as plain values that json can write.

        interface        its name, and under `interface_state` what the kernel says of it now (None: it is gone)
        packet_counters  packets by protocol; byte_counters: bytes (Ethernet headers included)
        program          id, name and mode of the XDP program, and whether the kernel runs it now
        state            running; xdp_counter and graphsage_streaming: on, by which program, and why not
        ledger           with streaming: packets seen, in records, in the table, not in flows by reason; closes
        graphsage        with streaming: readiness of graph and alarms, flows, windows
        findings         the last of them (OCSF), oldest first, and how many were told

        """
        with self._lock:
            by_protocol = self._by_protocol() if self._counting else {}
            interface = self._interface()
            streaming = self._streaming
            return {
                "interface": self.interface,
                "interface_state": interface,
                "packet_counters": {name: packets for name, (packets, _) in by_protocol.items()},
                "byte_counters": {name: octets for name, (_, octets) in by_protocol.items()},
                "program": self._program(interface),
                "state": self._state(),
                "ledger": None if streaming is None else streaming.ledger(),
                "graphsage": None if streaming is None else streaming.readiness(),
                "findings": [] if streaming is None else list(streaming.findings.last),
                "findings_told": 0 if streaming is None else streaming.findings.told,
            }

    def export_to_prometheus(self) -> str:
        """Every metric that is known, in Prometheus' text format, as `flowsage run` serves them."""
        return generate_latest(self.metrics.registry).decode()

    def _by_protocol(self) -> dict[str, tuple[int, int]]:
        """Packets and bytes by protocol, whoever counts; once stopped, the last ones."""
        if self._final is not None:
            return self._final
        if self._agent is not None:
            protocols = self._agent.snapshot(walk=False).protocols
            return {name: (count.packets, count.bytes) for name, count in protocols.items()}
        if self._loader is not None and self._program_id:
            return dict(zip(PROTOCOLS, self._loader.read_counters(self._program_id), strict=True))
        return dict.fromkeys(PROTOCOLS, (0, 0))

    def _counter_metrics(self) -> Mapping[str, Value]:
        """What the sensor's metrics say, of the counter."""
        with self._lock:
            found = self._by_protocol()
            return {
                "flowsage_packets": sum(packets for packets, _ in found.values()),
                "flowsage_packet_bytes": sum(octets for _, octets in found.values()),
                "flowsage_protocol_packets": {name: packets for name, (packets, _) in found.items()},
                "flowsage_protocol_bytes": {name: octets for name, (_, octets) in found.items()},
                "flowsage_interface_up": {self.interface: float(self.running)},
            }

    def _interface(self) -> dict[str, Any] | None:
        with suppress(FlowsageError), in_namespace(self._netns):
            return asdict(read_interface(self.interface))
        return None

    def _program(self, interface: dict[str, Any] | None) -> dict[str, Any]:
        number, name = self._program_id, "xdp_counter"
        if self._agent is not None:
            number, name = self._agent.program.program_id, "flow_xdp"
        attached = bool(interface and number and interface["xdp_program"] == number)
        return {
            "id": number,
            "name": name,
            "mode": interface["xdp_mode"] if interface and attached else None,
            "attached": attached,
        }

    def _state(self) -> dict[str, Any]:
        by = "flow_xdp" if self._agent is not None else "xdp_counter"
        ended = "" if self.running else "shut down" if self._final is not None else "the sensor has ended: see the log"
        counter = ended if self._counting else NOT_ASKED
        scoring_ended = self._streaming.off if self._streaming is not None else ""
        streaming = self._streaming_off or scoring_ended or ended
        return {
            "running": not ended,
            "xdp_counter": {"on": not counter, "by": by if self._counting else None, "reason": counter or None},
            "graphsage_streaming": {"on": not streaming, "reason": streaming or None},
        }


def create_ebpf_monitoring(
    interface: str,
    enable_xdp_counter: bool = True,
    enable_graphsage_streaming: bool = True,
    *,
    settings: Settings | None = None,
    netns: str | None = None,
) -> EBPFMonitoring:
    """Watches `interface` until `shutdown`; see EBPFMonitoring. `settings`: default, those of file and environment."""
    return EBPFMonitoring(
        interface,
        enable_xdp_counter=enable_xdp_counter,
        enable_graphsage_streaming=enable_graphsage_streaming,
        settings=settings,
        netns=netns,
    )
