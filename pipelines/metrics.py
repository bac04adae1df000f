"""Prometheus metrics: one table of them, filled from snapshots when somebody asks.

No label ever holds an address or a flow; the values of each label are few and known. Counters that live elsewhere (in
the kernel, in the ledger, in the model) are read there at scrape time, so that nothing is counted twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from flowsage.collector.errors import FlowsageError

Value = float | Mapping[str, float]
Source = Callable[[], Mapping[str, Value]]


class MetricsServerError(FlowsageError):
    """The HTTP endpoint cannot be served."""


@dataclass(frozen=True)
class Metric:
    """One metric: its name (counters without _total), kind, help, and its label where it has one."""

    name: str
    kind: Literal["counter", "gauge", "info"]
    help: str
    label: str | None = None


METRICS = (
    Metric("flowsage_build", "info", "Version of FlowSAGE.", "version"),
    Metric("flowsage_packets", "counter", "Packets the XDP program has seen."),
    Metric("flowsage_packet_bytes", "counter", "Bytes of the packets seen, Ethernet headers included."),
    Metric("flowsage_protocol_packets", "counter", "Packets seen, by protocol.", "protocol"),
    Metric("flowsage_protocol_bytes", "counter", "Bytes of the packets seen, by protocol.", "protocol"),
    Metric("flowsage_packets_unaccounted", "counter", "Packets that are in no flow, by reason.", "reason"),
    Metric("flowsage_packets_delivered", "counter", "Packets in the flow records that were drained."),
    Metric("flowsage_fragments", "counter", "Packets that were non-first fragments (they are in flows)."),
    Metric("flowsage_flow_table_flows", "gauge", "Flows in the kernel's table."),
    Metric("flowsage_flow_table_packets", "gauge", "Packets of the flows in the kernel's table."),
    Metric("flowsage_ring_packets", "gauge", "Packets in records that wait in the ring buffer."),
    Metric(
        "flowsage_ring_full", "counter", "Times a record found the ring buffer full (its flow stayed in the table)."
    ),
    Metric("flowsage_flow_table_full", "counter", "Packets that found the table full and became records of their own."),
    Metric("flowsage_ledger_imbalance_packets", "gauge", "Packets nobody can account for: 0, or there is a bug."),
    Metric("flowsage_records", "counter", "Flow records drained from the ring buffer."),
    Metric("flowsage_records_lost", "counter", "Flow records lost after the drain, by reason.", "reason"),
    Metric("flowsage_records_spooled", "gauge", "Flow records that wait on disk for the log to take them."),
    Metric("flowsage_interface_up", "gauge", "Whether the program is attached to the interface.", "interface"),
    Metric(
        "flowsage_interface_unwatched_seconds", "gauge", "How long changing its mode left it unwatched.", "interface"
    ),
    Metric("flowsage_flows_consumed", "counter", "Flow records the scorer has consumed."),
    Metric("flowsage_flows_scored", "counter", "Flow records scored in a closed window."),
    Metric("flowsage_flows_late", "counter", "Flow records that came after their window had closed."),
    Metric("flowsage_flows_refused", "counter", "Flow records of a sensor whose clock is ahead, too far to be used."),
    Metric("flowsage_flows_known", "counter", "Flow records that the model had learnt from before: not scored."),
    Metric("flowsage_flows_open", "gauge", "Flow records in open windows."),
    Metric("flowsage_flows_dead_lettered", "counter", "Batches that could not be read."),
    Metric("flowsage_partitions", "gauge", "Partitions (sites) that this process scores."),
    Metric("flowsage_batches_consumed", "counter", "Records of the flows' topic that were read, of these partitions."),
    Metric("flowsage_batches_duplicate", "counter", "Batches that came again and were dropped."),
    Metric("flowsage_batches_lost", "counter", "Batches that never came: gaps in the sensors' numbers."),
    Metric("flowsage_sensors_left_out", "counter", "Times a sensor was not waited for, by reason.", "reason"),
    Metric("flowsage_scorer_fenced", "counter", "Times that another scorer had taken over."),
    Metric("flowsage_snapshots", "counter", "Snapshots written."),
    Metric("flowsage_snapshots_failed", "counter", "Snapshots that could not be written."),
    Metric("flowsage_snapshot_bytes", "gauge", "Size of the last snapshot."),
    Metric("flowsage_windows_closed", "counter", "Windows scored and learnt from."),
    Metric("flowsage_panes", "counter", "Panes the alarms have looked at."),
    Metric("flowsage_watermark_timestamp_seconds", "gauge", "Event time up to which all flows are known."),
    Metric("flowsage_history_keys", "gauge", "Keys that history remembers, by level.", "level"),
    Metric("flowsage_history_evicted", "counter", "Keys that left history for want of room, by level.", "level"),
    Metric("flowsage_graph_hosts", "gauge", "Hosts in the graph's memory."),
    Metric("flowsage_graph_ready", "gauge", "Whether the GraphSAGE prior speaks yet."),
    Metric("flowsage_graph_training_steps", "counter", "Training steps of the GraphSAGE prior."),
    Metric("flowsage_graph_training_loss", "gauge", "Cross-entropy of its last training step, nats."),
    Metric("flowsage_graph_mixture_weight", "gauge", "Weight of the graph against popularity in the prior, 0 to 1."),
    Metric("flowsage_calibration_ready", "gauge", "Whether alarms are calibrated and can be raised."),
    Metric("flowsage_calibration_blocks", "gauge", "Blocks that the calibration has seen."),
    Metric("flowsage_calibration_blocks_needed", "gauge", "Blocks that it needs."),
    Metric("flowsage_calibration_host_blocks", "gauge", "Host-blocks the calibration rests on."),
    Metric("flowsage_calibration_host_blocks_needed", "gauge", "Host-blocks that it needs."),
    Metric(
        "flowsage_calibration_expected_timestamp_seconds",
        "gauge",
        "Event time when it is likely to carry; 0: it does, or nobody knows.",
    ),
    Metric("flowsage_budget_ratio", "gauge", "Part of the budget that is in force: it grows over the first day."),
    Metric("flowsage_model_loads", "counter", "Model directories taken in, at the start and while running."),
    Metric("flowsage_model_refused", "counter", "Model directories that were damaged or of another feature schema."),
    Metric("flowsage_findings", "counter", "Findings raised, by severity.", "severity"),
    Metric("flowsage_findings_open", "gauge", "Findings that go on."),
)
"""Every metric but the two histograms, `flowsage_pane_seconds` and `flowsage_window_seconds`."""

BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class _Snapshots(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing: known only when asked."""
        return iter(())

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | InfoMetricFamily]:
        """One family a metric that some source knows."""
        values = self._metrics.snapshot()
        for metric in METRICS:
            if metric.name in values:
                yield _family(metric, values[metric.name])


def _family(metric: Metric, value: Value) -> CounterMetricFamily | GaugeMetricFamily | InfoMetricFamily:
    labels = [metric.label] if metric.label else None
    if metric.kind == "info":
        info = InfoMetricFamily(metric.name, metric.help, labels=[])
        info.add_metric([], {str(metric.label): next(iter(value)) if isinstance(value, Mapping) else str(value)})
        return info
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=labels)
    for label, number in value.items() if isinstance(value, Mapping) else (("", value),):
        family.add_metric([label] if labels else [], number)
    return family


class Metrics:
    """The registry of one process. Sources are asked at scrape time; a later one adds to what an earlier one said."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._sources: list[Source] = []
        self._lock = threading.Lock()
        self.registry.register(_Snapshots(self))
        self.pane_seconds = Histogram(
            "flowsage_pane_seconds", "Time to look at a pane.", registry=self.registry, buckets=BUCKETS
        )
        self.window_seconds = Histogram(
            "flowsage_window_seconds",
            "Time to score and learn a run of windows.",
            registry=self.registry,
            buckets=BUCKETS,
        )
        self._server: WSGIServer | None = None

    def add(self, source: Source) -> None:
        """Ask `source` at every scrape: a mapping of metric name to number, or to label → number."""
        with self._lock:
            self._sources.append(source)

    def snapshot(self) -> dict[str, Value]:
        """What all sources say now."""
        with self._lock:
            sources = list(self._sources)
        values: dict[str, Value] = {}
        for source in sources:
            values |= source()
        unknown = values.keys() - {m.name for m in METRICS}
        if unknown:
            raise KeyError(f"not in the table of metrics: {sorted(unknown)}")
        return values

    def serve(self, address: str, port: int) -> None:
        """Serve /metrics from a thread. Raises MetricsServerError where the port is taken or the address not ours."""
        try:
            self._server, _ = start_http_server(port, address, self.registry)
        except OSError as e:
            raise MetricsServerError(
                f"cannot serve metrics on {address}:{port} ({e.strerror}); choose another port with --metrics-port, "
                "or switch it off with --no-metrics"
            ) from e

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
