"""A site: one partition of the flows' topic, scored in the order of its offsets.

Everything here follows from the records: the clock is the log's own (when each record was appended), panes end when the
time that all sensors have reached passes their end, windows by their watermarks. Whoever reads the same records from
the same state gets the same findings, byte for byte, however they were cut into polls. Nothing here reads or writes the
log; `pipelines/scoring.py` does.

Of every record exactly one thing becomes: its flows are taken, it repeats a batch that was taken (*duplicate*), or it
cannot be read (*dead letter*). Of every flow taken: scored, late, refused, or in an open window.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flowsage.collector.errors import ConfigurationError, SchemaError
from flowsage.collector.sink import Origin
from flowsage.graph.flows import FlowBatch, from_table
from flowsage.models.detector import ClosedWindows, Detector
from flowsage.models.finding import Finding
from flowsage.pipelines.embeddings import embeddings_of
from flowsage.pipelines.log import Committed, LogRecord
from flowsage.pipelines.outcome import DeadLetter, Outcome, Progress
from flowsage.pipelines.scorer import Scorer, detector_config
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.sources import READ

VERSION = 2
BOOTS = 8
"""Boots of a sensor whose sequences are remembered: a spool holds no more than a few."""

COLUMNS = {*READ, "iat_sum_ns_fwd", "iat_sumsq_us2_fwd", "length_sumsq_fwd", "ttl_max_fwd"}
"""Columns of a batch that are read."""

UNREADABLE = (pa.ArrowException, SchemaError, KeyError, ValueError, TypeError, OverflowError, OSError)


@dataclass
class SiteCounters:
    """Records since the start of the site's state. consumed = taken + duplicates + dead."""

    consumed: int = 0
    taken: int = 0
    duplicates: int = 0
    dead: int = 0
    lost: int = 0
    """Batches that never came: gaps in a sensor's numbers."""


class Site:
    """Scores the records of one partition.

    out         what is out already, of an earlier life: it is worked out again, and not told again
    saves       keep the state in `saved` when it is due (settings: score.snapshot_interval, snapshot_windows)
    """

    def __init__(
        self,
        settings: Settings,
        *,
        out: Progress | None = None,
        saves: bool = False,
        detector: Detector | None = None,
    ) -> None:
        self.settings = settings
        self.out = out or Progress()
        self.counters = SiteCounters()
        self.position = 0
        """Offset of the next record to take."""
        self.pane_ns = -1
        """End of the last pane that was looked at, and of the last after which windows have closed."""
        self.windows_ns = -1
        self.on_found: Callable[[], None] | None = None
        """Called when a pane has findings, before windows close, which may take longer: they may be published then."""
        self.scorer = Scorer(
            settings,
            on_findings=self._findings,
            on_closed=self._closed if settings.score.embeddings else None,
            clock=lambda: self._now_ns,
            detector=detector,
        )
        self.saved: tuple[dict[str, npt.NDArray[Any]], dict[str, Any]] | None = None
        """The state when it was last due; whoever writes it sets it to None."""
        self._saves = saves
        self._looked_at: tuple[int, int] | None = None
        """End of the last pane, and the windows that had closed by then."""
        self._now_ns = 0
        self._pane: int | None = None
        self._outcome = Outcome()
        self._held: list[tuple[int, int, int]] = []
        """Records that have flows in open windows: (offset, latest start, the clock when it was taken)."""
        self._again: dict[int, int] = {}
        """Those of them that are to be read again after `restore`: offset → the clock then."""
        self._seen: dict[str, dict[str, int]] = {}
        """Sensor → boot → number of the last batch."""

    # ---- records in ----

    @property
    def reading_from(self) -> int:
        """Offset from which records have to be handed to `take`."""
        return min(self._again, default=self.position)

    @property
    def oldest_open(self) -> int:
        """Offset of the first record that has flows in an open window; `position` where none has."""
        return self._held[0][0] if self._held else self.position

    @property
    def caught_up(self) -> bool:
        """Whether all that is out has been worked out again: from here on things are new, and may be committed."""
        return self.position >= self.out.next and not self._again

    def take(self, record: LogRecord) -> None:
        """The next record of the partition. Never raises for what is in it."""
        if record.offset < self.position:
            self._take_again(record)
            return
        self._again.clear()
        self._now_ns = max(self._now_ns, record.timestamp_ns)
        try:
            flows, origin = self._read(record)
        except UNREADABLE as error:
            self._dead(record, _sentence(error))
            return
        new = self._is_new(origin)
        if new:
            self.scorer.buffer.hear(origin.sensor, origin.drained_ns or None)
            # Between two records: what is saved here has to see this one again.
            self._step()
        self.position = record.offset + 1
        self.counters.consumed += 1
        if not new:
            self.counters.duplicates += 1
            return
        self.counters.taken += 1
        self._count_lost(origin)
        taken = self.scorer.take(flows, origin.watermark_ns, origin.sensor)
        if len(taken):
            self._held.append((record.offset, int(taken.start_ns.max()), self._now_ns))

    def _dead(self, record: LogRecord, error: str) -> None:
        self.position = record.offset + 1
        self.counters.consumed += 1
        self.counters.dead += 1
        if record.offset >= self.out.next:
            self._outcome.dead.append(DeadLetter(record, error))

    def outcome(self) -> Outcome:
        """What there is to publish since this was last asked."""
        told, self._outcome = self._outcome, Outcome()
        return told

    def commit(self) -> Committed:
        """What to commit once the outcome so far is out. Raises ValueError before `caught_up`."""
        if not self.caught_up:
            raise ValueError("what is out already has not been worked out again; nothing may be committed yet")
        pane_ns, windows_ns = max(self.pane_ns, self.out.pane_ns), max(self.windows_ns, self.out.windows_ns)
        self.out = Progress(pane_ns, windows_ns, self.position)
        return Committed(self.oldest_open, self.out.metadata())

    def finish(self) -> None:
        """No more records will come, ever: look at the last pane and close every window."""
        if self._pane is not None:
            self._look(self._pane)
        self.scorer.finish()
        self._held = []

    def _read(self, record: LogRecord) -> tuple[FlowBatch, Origin]:
        if record.value is None:
            raise ValueError("the record has no value")
        table = read_columns(record.value)
        return from_table(table, undirected=self.settings.model.undirected), Origin.of(table)

    def _take_again(self, record: LogRecord) -> None:
        now = self._again.pop(record.offset, None)
        if now is not None:
            flows = self._read(record)[0]
            unknown = np.flatnonzero(flows.start_ns >= self.scorer.known_until_ns)
            self.scorer.buffer.hold_again(flows.take(unknown), now)

    def _is_new(self, origin: Origin) -> bool:
        """Whether the batch was not taken before. Batches of a sensor come in order, so the last number tells."""
        return origin.sequence > self._seen.get(origin.sensor, {}).get(origin.boot, -1)

    def _count_lost(self, origin: Origin) -> None:
        boots = self._seen.setdefault(origin.sensor, {})
        # Of a sensor that was never heard of nobody knows what came before.
        if boots:
            self.counters.lost += origin.sequence - boots.get(origin.boot, -1) - 1
        boots[origin.boot] = origin.sequence
        if len(boots) > BOOTS:
            del boots[next(iter(boots))]

    # ---- panes ----

    def _step(self) -> None:
        """Look at the pane, if the time that all sensors have reached has left it."""
        arrival = self.scorer.buffer.arrival_ns
        assert arrival is not None
        before, self._pane = self._pane, arrival // self.settings.windows.pane
        if before is not None and self._pane > before:
            self._look(before)
            if self._save_due():
                self.saved = self.state()

    def _look(self, pane: int) -> None:
        self.pane_ns = (pane + 1) * self.settings.windows.pane
        self.scorer.look(self.pane_ns)
        if self._outcome.findings and self.on_found is not None:
            self.on_found()
        self.scorer.close_windows()
        self.windows_ns = self.pane_ns
        bound = self.scorer.buffer.closed_until_ns
        self._held = [held for held in self._held if held[1] >= bound]

    def _save_due(self) -> bool:
        """Whether to save after this pane: at fixed times of the site's clock, or after every so many windows."""
        every, windows = self.settings.score.snapshot_interval, self.settings.score.snapshot_windows
        now, closed = self.pane_ns, self.scorer.counters.windows
        before, self._looked_at = self._looked_at, (now, closed)
        if before is None or not self._saves:
            return False
        due = bool(every) and now // every > before[0] // every
        return due or (bool(windows) and closed // windows > before[1] // windows)

    def _findings(self, findings: list[Finding]) -> None:
        if self.pane_ns > self.out.pane_ns:
            self._outcome.findings += findings

    def _closed(self, closed: ClosedWindows) -> None:
        prior = self.scorer.detector.prior
        if prior is not None:
            # Worked out even where it is out already: to ask the graph may make it embed hosts anew.
            batches = list(embeddings_of(closed, prior, self.settings.windows.window))
            if self.pane_ns > self.out.windows_ns:
                self._outcome.embeddings += batches

    # ---- what has been learnt ----

    def state(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """(arrays, values for JSON): all that goes on, but for the flows in open windows, which are in the log.

        Saving touches the model (`Detector.state`), so it is done at moments that follow from the records. Raises
        ValueError within a pane: flows that the alarms have not looked at are in no state.
        """
        if self.scorer.pending:
            raise ValueError("flows wait for the end of their pane; save after one")
        arrays, detector = self.scorer.detector.state()
        arrays["site/held"] = np.array(self._held, np.int64).reshape(-1, 3)
        return arrays, {
            "version": VERSION, "fingerprint": fingerprint(self.settings), "detector": detector,
            "buffer": self.scorer.buffer.state(), "position": self.position, "pane_ns": self.pane_ns,
            "known_until_ns": self.scorer.known_until_ns,
            "model": None if self.scorer.model is None else self.scorer.model.digest,
            "pane": self._pane, "now_ns": self._now_ns, "seen": copy.deepcopy(self._seen),
            "counters": asdict(self.counters), "scorer": asdict(self.scorer.counters),
            "raised": dict(self.scorer.raised), "looked_at": self._looked_at,
        }  # fmt: skip

    @classmethod
    def restore(
        cls,
        settings: Settings,
        arrays: dict[str, npt.NDArray[Any]],
        values: dict[str, Any],
        *,
        out: Progress | None = None,
    ) -> Site:
        """The site that `state` describes; `take` wants the records from `reading_from` on.

        Raises ConfigurationError where the state is of another version, or was learnt under other settings.
        """
        if values.get("version") != VERSION:
            raise ConfigurationError(f"it has version {values.get('version')}, this program reads {VERSION}")
        if different := different_settings(values["fingerprint"], fingerprint(settings)):
            raise ConfigurationError(
                f"it was learnt under other settings ({different}): set them as they were to go on from it, or name "
                "another --state to begin anew"
            )
        try:
            detector = Detector.restore(detector_config(settings), arrays, values["detector"])
            site = cls(settings, out=out, saves=True, detector=detector)
            site._restore(arrays, values)
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigurationError(f"it is not what this program wrote: {_sentence(error)}") from error
        return site

    def _restore(self, arrays: dict[str, npt.NDArray[Any]], values: dict[str, Any]) -> None:
        self.scorer.buffer.restore(values["buffer"])
        self.position, self.pane_ns, self._pane = values["position"], values["pane_ns"], values["pane"]
        self.windows_ns, self.scorer.known_until_ns = self.pane_ns, values["known_until_ns"]
        if self.scorer.model is not None:
            self.scorer.model.go_on_from(values["model"])
        self._now_ns, self._seen, self._looked_at = values["now_ns"], values["seen"], tuple(values["looked_at"])
        self.counters = SiteCounters(**values["counters"])
        self.scorer.counters = type(self.scorer.counters)(**values["scorer"])
        self.scorer.raised.update(values["raised"])
        self._held = [(int(o), int(last), int(now)) for o, last, now in arrays["site/held"]]
        self._again = {offset: now for offset, _, now in self._held}
        # What is in a snapshot is out: it was written after the commit.
        self.out = Progress(
            max(self.out.pane_ns, self.pane_ns),
            max(self.out.windows_ns, self.windows_ns),
            max(self.out.next, self.position),
        )


def read_columns(value: bytes) -> pa.Table:
    """Of a batch (`publish.serialise`) the columns that are scored, checked. Raises pa.ArrowException, OSError."""
    buffer = pa.py_buffer(value)
    with pa.ipc.open_stream(buffer) as reader:
        fields = [i for i, name in enumerate(reader.schema.names) if name in COLUMNS]
    options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    with pa.ipc.open_stream(buffer, options=options) as reader:
        table = reader.read_all()
    # Foreign bytes may be Arrow with indices that point nowhere.
    table.validate(full=True)
    return table


def fingerprint(settings: Settings) -> dict[str, str]:
    """The settings under which a state has its meaning. Which model it began with, `ModelDirectory.digest` says."""
    windows, model, alarms = settings.windows, settings.model, settings.alarms
    values = {f"windows.{k}": getattr(windows, k) for k in ("window", "pane", "lateness")}
    values |= {f"model.{k}": v for k, v in model.model_dump().items() if k not in ("threads", "directory")}
    values |= {f"alarms.{k}": getattr(alarms, k) for k in ("block", "time_scale", "internal")}
    return {k: json.dumps(v, default=str) for k, v in values.items()}


def different_settings(one: dict[str, str], other: dict[str, str]) -> str:
    """The settings in which two fingerprints differ, as words; empty where they do not."""
    names = sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
    return ", ".join(f"{n} was {one.get(n, 'not there')}, is {other.get(n, 'not there')}" for n in names)


def _sentence(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300] if not isinstance(error, KeyError) else f"{text} is missing"
