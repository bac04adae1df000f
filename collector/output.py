"""Flow records for people: readable lines, a sink (collector/sink.py). Parquet files are in collector/parquet.py."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TextIO

import pyarrow as pa

from flowsage.collector.errors import FlowsageError
from flowsage.collector.records import END_REASONS
from flowsage.collector.sink import Origin, Sink

PROTOCOLS = {1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 33: "dccp", 47: "gre", 50: "esp", 58: "icmpv6", 132: "sctp"}
_WITH_PORTS = {6, 17, 33, 132, 136}

_LINE_COLUMNS = (
    *("start_ns", "src_ip", "dst_ip", "src_port", "dst_port", "proto"),
    *("packets_fwd", "packets_rev", "bytes_fwd", "bytes_rev", "end_reason", "vlan", "icmp_type", "icmp_code"),
)


class OutputError(FlowsageError):
    """Records cannot be written where they should go."""


class OutputClosedError(OutputError):
    """Whoever read our standard output has gone away: time to stop, not a failure."""

    exit_code = 0


def human_bytes(n: int) -> str:
    """`n` bytes in at most four digits: "60 B", "1.2 kB", "3.4 MB"."""
    size, unit = float(n), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if size < 999.5 or unit == "PB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"


def _endpoint(address: str, port: int, with_port: bool) -> str:
    if not with_port:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def format_lines(batch: pa.RecordBatch) -> list[str]:
    """A line a record: when, what, who → whom, packets and bytes there/back, how it ended."""
    lines = []
    for start, src, dst, sport, dport, proto, pf, pr, bf, br, reason, vlan, kind, code in zip(
        *(batch.column(name).to_pylist() for name in _LINE_COLUMNS), strict=True
    ):
        when = datetime.fromtimestamp(start // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        ports = proto in _WITH_PORTS
        extra = f"  type {kind} code {code}" if kind >= 0 else ""
        extra += f"  vlan {vlan}" if vlan else ""
        lines.append(
            f"{when}.{start // 1_000_000 % 1000:03d}Z {PROTOCOLS.get(proto, f'proto-{proto}')} "
            f"{_endpoint(src, sport, ports)} → {_endpoint(dst, dport, ports)}{extra}  {pf}/{pr} packets "
            f"{human_bytes(bf)}/{human_bytes(br)}  {END_REASONS.get(reason, f'reason {reason}')}"
        )
    return lines


class LinesOutput(Sink):
    """A readable line a record on a text stream. Raises OutputClosedError once nobody reads any more.

    What has been written is gone: it cannot say what came last. A sensor that is killed between writing a batch and
    committing it (a few microseconds) writes the lines of that batch again when it starts.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def put(self, batch: pa.RecordBatch, origin: Origin) -> None:
        """Write the lines of `batch`."""
        del origin
        if not len(batch):
            return
        try:
            self._stream.write("\n".join(format_lines(batch)) + "\n")
            self._stream.flush()
        except BrokenPipeError as error:
            raise OutputClosedError("nobody reads the standard output any more") from error
        except OSError as error:
            raise OutputError(f"flow records cannot be written to the standard output: {error.strerror}") from error

    def close(self) -> None:
        """Nothing is held back."""
