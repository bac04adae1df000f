"""`flowsage score`: flows from Kafka in, findings to Kafka out, until somebody stops it."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import click

from flowsage.collector.collect import stopped_by_signals
from flowsage.collector.service import Service
from flowsage.pipelines.kafka import KafkaLog
from flowsage.pipelines.metrics import Metrics
from flowsage.pipelines.scoring import Scoring
from flowsage.pipelines.settings import Settings
from flowsage.pipelines.state import SnapshotStore
from flowsage.pipelines.topics import flows_topic

PROGRESS_S = 60.0


def run_score(settings: Settings, *, duration_s: float | None = None) -> None:
    """`flowsage score`: until a signal, or for `duration_s`."""
    started = time.monotonic()
    log = KafkaLog(settings.kafka, session_timeout_s=settings.score.session_timeout / 1e9)
    store = SnapshotStore(settings.score.state, keep=settings.score.snapshots) if settings.score.state else None
    metrics, stopped, service = Metrics(), threading.Event(), Service()
    with ExitStack() as stack:
        stack.enter_context(stopped_by_signals(stopped.set, service.stopping))
        stack.callback(log.close)
        scoring = Scoring(settings, log, store=store, metrics=metrics, say=_say, alive=service.alive)
        stack.callback(scoring.close)
        metrics.add(scoring.snapshot)
        if settings.metrics.enabled:
            metrics.serve(settings.metrics.address, settings.metrics.port)
            stack.callback(metrics.close)
            _say(f"metrics on http://{settings.metrics.address}:{settings.metrics.port}/metrics")
        working = f"scoring {flows_topic(settings.kafka.prefix)} in group {settings.score.group}"
        _say(f"{working}; Ctrl-C stops")
        threading.Thread(target=_progress, args=(scoring, stopped, service), daemon=True).start()
        service.ready(working)
        scoring.run(stopped, None if duration_s is None else started + duration_s)
        stopped.set()
        _say(scoring.standing())


def _say(text: str) -> None:
    click.echo(text, err=True)


def _progress(scoring: Scoring, stopped: threading.Event, service: Service) -> None:
    while not stopped.wait(PROGRESS_S):
        standing = scoring.standing()
        _say(standing)
        service.status(standing)
