"""What a replay writes: scores in the order of the input, host-windows, findings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flowsage.collector.errors import InputError
from flowsage.models.detector import ClosedWindows
from flowsage.models.finding import Finding
from flowsage.pipelines.findings import SEVERITIES, to_json
from flowsage.pipelines.readable import finding_lines


class ScoreTable:
    """A row for each input row: flow_score, beacon_score, first_meeting (tail), and a column a term of history."""

    def __init__(self) -> None:
        self._rows: list[npt.NDArray[np.int64]] = []
        self._columns: dict[str, list[npt.NDArray[Any]]] = {}

    def add(self, closed: ClosedWindows) -> None:
        """The flows of a run of windows."""
        self._rows.append(closed.flows.row)
        columns: dict[str, npt.NDArray[Any]] = {
            "flow_score": closed.scores.flow_score,
            "beacon_score": closed.scores.beacon_score,
            "first_meeting_tail": closed.tails[closed.contacts.of_flow].astype(np.float32),
        }
        columns.update((name, values.astype(np.float32)) for name, values in closed.scores.terms.items())
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values)

    def write(self, path: Path, rows: int) -> None:
        """`rows` rows in input order; NaN where a flow was never scored (late)."""
        index = np.concatenate(self._rows) if self._rows else np.empty(0, np.int64)
        table = {}
        for name, parts in self._columns.items():
            column = np.full(rows, np.nan, parts[0].dtype)
            column[index] = np.concatenate(parts)
            table[name] = column
        write_parquet(pa.table(table or {"flow_score": np.full(rows, np.nan)}), path)


class HostTableWriter:
    """A row a host and window: host, window_start_ns, window_end_ns, score, p_value, alert."""

    def __init__(self, window_ns: int) -> None:
        self._window_ns = window_ns
        self._parts: list[tuple[pa.Array, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]] = []
        self._findings: dict[str, Finding] = {}

    def add(self, closed: ClosedWindows) -> None:
        """The host-windows of a run of windows; p_value is null while alarms are not ready."""
        hosts = pc.take(closed.flows.hosts.names, pa.array(closed.scores.host))
        self._parts.append((hosts, closed.scores.window * self._window_ns, closed.scores.score, closed.p_values))

    def raised(self, findings: list[Finding]) -> None:
        """Remember who was raised and when: the last word on each finding counts."""
        self._findings |= {f.uid: f for f in findings}

    def write(self, path: Path) -> None:
        """Write the file; `alert` is whether a finding on the host was open in the window."""
        hosts = pa.chunked_array([p[0] for p in self._parts], None if self._parts else pa.string())
        start = np.concatenate([np.empty(0, np.int64), *(p[1] for p in self._parts)])
        score, p_value = (np.concatenate([np.empty(0), *(p[k] for p in self._parts)]) for k in (2, 3))
        table = pa.table(
            {
                "host": hosts, "window_start_ns": start, "window_end_ns": start + self._window_ns, "score": score,
                "p_value": pa.array(p_value, from_pandas=True),
            }
        )  # fmt: skip
        alert = np.zeros(len(table), np.bool_)
        begin, end = table.column("window_start_ns").to_numpy(), table.column("window_end_ns").to_numpy()
        for finding in self._findings.values():
            mine = pc.equal(table.column("host"), finding.host).to_numpy()
            alert |= mine & (begin <= (finding.end_ns or finding.told_ns)) & (end > finding.alarm_ns - self._window_ns)
        write_parquet(table.append_column("alert", pa.array(alert)), path)


class FindingWriter:
    """Findings to a file of JSON lines, to a Parquet file (one row a finding), or to stdout.

    Where stdout is a terminal and nobody asked for JSON, a person gets readable lines there.
    """

    def __init__(self, target: Path | str, *, as_json: bool = False) -> None:
        self._target = Path(target)
        self._parquet = self._target.suffix == ".parquet"
        self._rows: dict[str, dict[str, Any]] = {}
        self._stream: IO[str] | None = None
        self._readable = False
        if str(target) == "-":
            self._stream = sys.stdout
            self._readable = sys.stdout.isatty() and not as_json
        elif not self._parquet:
            self._stream = open_for_writing(self._target)

    @property
    def readable(self) -> bool:
        """Whether a person at the terminal reads the findings where they are written."""
        return self._readable

    def write(self, findings: list[Finding]) -> None:
        """Write these now."""
        for finding in findings:
            if self._stream is not None:
                self.write_json(to_json(finding))
            else:
                first = self._rows.get(finding.uid, {"alarm_ns": finding.alarm_ns, "p_value": 1.0})
                self._rows[finding.uid] = {
                    "host": finding.host, "role": finding.role, "peer": finding.peer, "analytic": finding.analytic,
                    "start_ns": finding.start_ns, "alarm_ns": first["alarm_ns"],
                    "end_ns": finding.end_ns or finding.told_ns,
                    "p_value": min(first["p_value"], finding.p_value),
                    "severity": SEVERITIES[finding.severity], "sentence": finding.sentence, "uid": finding.uid,
                }  # fmt: skip

    def write_json(self, line: str) -> None:
        """Write a finding that is JSON already (one that came from a log)."""
        if self._stream is not None:
            self._stream.write(("\n".join(finding_lines(json.loads(line))) if self._readable else line) + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._parquet:
            text, number = pa.string(), pa.int64()
            schema = pa.schema(
                {"host": text, "role": text, "peer": text, "analytic": text, "start_ns": number, "alarm_ns": number,
                 "end_ns": number, "p_value": pa.float64(), "severity": text, "sentence": text, "uid": text}
            )  # fmt: skip
            write_parquet(pa.Table.from_pylist(list(self._rows.values()), schema=schema), self._target)
        elif self._stream is not None and self._stream is not sys.stdout:
            self._stream.close()


def open_for_writing(path: Path) -> IO[str]:
    """A text file to write, or an InputError that says why not."""
    try:
        return path.open("w", encoding="utf-8")
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror}") from e


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a Parquet file under its name only once it is whole."""
    part = path.with_name(path.name + ".part")
    try:
        pq.write_table(table, part, compression="zstd")
        part.replace(path)
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from e
