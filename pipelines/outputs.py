"""What a replay writes: scores in the order of the input, host-windows, findings."""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flowsage.models.detector import ClosedWindows
from flowsage.models.finding import Finding
from flowsage.models.history_scores import NAMES
from flowsage.pipelines.files import ROW_GROUP, ParquetFile, open_for_writing, require_writable, write_parquet
from flowsage.pipelines.findings import SEVERITIES, to_json
from flowsage.pipelines.readable import finding_lines

_SCORES = ("flow_score", "beacon_score")
_SHARES = ("first_meeting_tail", "surprise", *NAMES, "history")
"""Columns of a `ScoreTable`, f64 and f32."""

_BLOCK = 1 << 17
"""Flows whose scores are kept in one piece."""

_GROUP = ROW_GROUP // _BLOCK
"""Blocks of a row group."""

_Block = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float32]]
"""Row of each flow i64[n], then _SCORES f64[2, n] and _SHARES f32[·, n]."""


class ScoreTable:
    """A row for each input row: flow_score, beacon_score, first_meeting (tail), surprise, and a column a term of
    history.

    It is made in a thread of its own. Where flows come in the order of their rows, as those of a file mostly do, what
    is a row group is written at once.
    """

    def __init__(self, path: Path) -> None:
        self._file = ParquetFile(path)
        self._written = 0
        """Rows that are in the file, the first ones."""
        self._blocks: list[_Block] = []
        self._used = _BLOCK
        """Flows of the last block."""
        self._ordered = True
        """Whether all that came is the next rows."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scores")
        self._adding: Future[None] | None = None

    def add(self, closed: ClosedWindows) -> None:
        """The flows of a run of windows. Raises InputError where the ones before it could not be written."""
        self._wait()
        self._adding = self._thread.submit(self._add, closed)
        if len(closed.flows) > _BLOCK:  # of a flood, two windows at a time would be much memory
            self._wait()

    def write(self, rows: int) -> None:
        """`rows` rows in input order are the file; NaN where a flow was never scored (late)."""
        self._wait()
        self._file.write(self._rest(rows))
        self._file.finish()

    def close(self) -> None:
        """Leave nothing behind of a file that was not written to its end."""
        self._thread.shutdown()
        self._file.close()

    def _wait(self) -> None:
        adding, self._adding = self._adding, None
        if adding is not None:
            adding.result()

    def _add(self, closed: ClosedWindows) -> None:
        scores, n, done = closed.scores, len(closed.flows), 0
        assert scores.parts is not None  # a table wants the terms
        tails, terms = closed.tails[closed.contacts.of_flow], scores.parts.table()
        flow_score, surprise = closed.flow_score, closed.flow_surprise
        while done < n:
            if self._used == _BLOCK:
                self._used = 0
                self._blocks.append(
                    (np.empty(_BLOCK, np.int64), np.empty((2, _BLOCK)), np.empty((len(_SHARES), _BLOCK), np.float32))
                )
            count = min(n - done, _BLOCK - self._used)
            here, there = slice(self._used, self._used + count), slice(done, done + count)
            rows, wide, narrow = self._blocks[-1]
            rows[here] = closed.flows.row[there]
            wide[0, here], wide[1, here] = flow_score[there], scores.beacon_score[there]
            narrow[0, here], narrow[1, here], narrow[2:, here] = tails[there], surprise[there], terms[:, there]
            self._used += count
            done += count
            if self._used == _BLOCK and len(self._blocks) == _GROUP and self._ordered:
                self._ordered = self._in_order(self._blocks)
                if self._ordered:
                    self._file.write(_columns(self._blocks))
                    self._written += _GROUP * _BLOCK
                    self._blocks = []

    def _in_order(self, blocks: list[_Block]) -> bool:
        """As they came, where they came in the order of the rows: that of a file is the order of time."""
        begins = self._written + np.cumsum([0, *(len(block[0]) for block in blocks)])
        return all(
            np.array_equal(block[0], np.arange(begin, begin + len(block[0])))
            for begin, block in zip(begins.tolist(), blocks, strict=False)
        )

    def _rest(self, rows: int) -> pa.Table:
        """What is not in the file yet, of `rows` rows."""
        lengths = [_BLOCK] * (len(self._blocks) - 1) + [self._used]
        blocks = [(b[0][:n], b[1][:, :n], b[2][:, :n]) for b, n in zip(self._blocks, lengths, strict=False)]
        left = rows - self._written
        if blocks and sum(len(block[0]) for block in blocks) == left and self._in_order(blocks):
            return _columns(blocks)
        table: dict[str, npt.NDArray[Any]] = {}
        for kind, names in enumerate((_SCORES, _SHARES) if blocks or self._written else (_SCORES[:1],)):
            for k, name in enumerate(names):
                column = table[name] = np.full(left, np.nan, np.float32 if kind else np.float64)
                for block in blocks:
                    column[block[0] - self._written] = block[1 + kind][k]
        return pa.table(table)


def _columns(blocks: list[_Block]) -> pa.Table:
    """Blocks as they are, one after the other."""
    return pa.table(
        {
            name: pa.chunked_array([block[1 + kind][k] for block in blocks])
            for kind, names in enumerate((_SCORES, _SHARES))
            for k, name in enumerate(names)
        }
    )


class HostTableWriter:
    """A row a host and window: host, window_start_ns, window_end_ns, score, p_value, alert."""

    def __init__(self, window_ns: int) -> None:
        self._window_ns = window_ns
        self._parts: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]] = []
        self._names: list[pa.Array] = []
        self._recent: tuple[pa.Array, list[npt.NDArray[np.int32]]] | None = None
        """A host table, which many windows of a file share, and the hosts of its windows."""
        self._findings: dict[str, Finding] = {}

    def add(self, closed: ClosedWindows) -> None:
        """The host-windows of a run of windows; p_value is null while alarms are not ready."""
        names = closed.flows.hosts.names
        if self._recent is None or self._recent[0] is not names:
            self._name()
            self._recent = names, []
        self._recent[1].append(closed.scores.host)
        self._parts.append((closed.scores.window * self._window_ns, closed.host_score, closed.p_values))

    def _name(self) -> None:
        if self._recent is not None:
            names, hosts = self._recent
            self._names.append(pc.take(names, pa.array(np.concatenate(hosts))))
            self._recent = None

    def raised(self, findings: list[Finding]) -> None:
        """Remember who was raised and when: the last word on each finding counts."""
        self._findings |= {f.uid: f for f in findings}

    def write(self, path: Path) -> None:
        """Write the file; `alert` is whether a finding on the host was open in the window."""
        self._name()
        hosts = pa.chunked_array(self._names, None if self._names else pa.string())
        start = np.concatenate([np.empty(0, np.int64), *(p[0] for p in self._parts)])
        score, p_value = (np.concatenate([np.empty(0), *(p[k] for p in self._parts)]) for k in (1, 2))
        end = start + self._window_ns
        alert = np.zeros(len(hosts), np.bool_)
        for finding in self._findings.values():
            # Windows close in order, so those of a finding are a part of the table.
            first = int(np.searchsorted(start, finding.alarm_ns - 2 * self._window_ns, side="right"))
            last = int(np.searchsorted(start, finding.end_ns or finding.told_ns, side="right"))
            alert[first:last] |= pc.equal(hosts.slice(first, max(0, last - first)), finding.host).to_numpy()
        table = {
            "host": hosts, "window_start_ns": start, "window_end_ns": end, "score": score,
            "p_value": pa.array(p_value, from_pandas=True), "alert": alert,
        }  # fmt: skip
        write_parquet(pa.table(table), path)


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
        elif self._parquet:
            require_writable(self._target)
        else:
            self._stream = open_for_writing(self._target)

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
