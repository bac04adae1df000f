"""The model directory that a scorer starts from, and looks at again now and then: a new one is taken in as it runs."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from flowsage.collector.errors import ModelError
from flowsage.models import artifact
from flowsage.models.artifact import Manifest
from flowsage.models.detector import Detector, DetectorConfig

logger = logging.getLogger(__name__)

Loaded = tuple[Detector, Manifest]


class ModelDirectory:
    """A model directory under one configuration. Not safe for two threads at once.

    loads, refused    models taken in, and those that were damaged or made for another schema
    digest            of the model that was taken in last, wherever it lay; None before that
    """

    def __init__(self, path: Path, config: DetectorConfig) -> None:
        self.path, self.config = path, config
        self.loads = self.refused = 0
        self.digest: str | None = None
        self._stamp = artifact.stamp(path)
        self._worker: ThreadPoolExecutor | None = None
        self._loading: Future[Loaded | None] | None = None
        self._ready: Loaded | None = None

    def load(self) -> Loaded:
        """What is there now. Raises ModelError."""
        loaded = artifact.load(self.path, self.config)
        self.loads += 1
        self.digest = loaded[1].digest
        return loaded

    def go_on_from(self, digest: str | None) -> None:
        """Who uses it has taken in the model `digest` in an earlier life; another that is there now is new."""
        self.digest, self._stamp = digest, None

    def _other(self) -> Loaded | None:
        """What is there now, unless it is the model that was taken in last: moved, copied, or put there again."""
        if artifact.read_manifest(self.path).digest == self.digest:
            return None
        return artifact.load(self.path, self.config)

    def renewed(self, now_ns: int, oldest_open_ns: int | None) -> Loaded | None:
        """A model that has taken the place of the last one, once the stream has passed what it learnt; never waits.

        now_ns: event time reached; oldest_open_ns: earliest start in a window that is still to be scored. What cannot
        be used is told in a warning, and the model that runs goes on.
        """
        if self._loading is None and (stamp := artifact.stamp(self.path)) not in (None, self._stamp):
            self._stamp = stamp
            self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="model")
            self._loading = self._worker.submit(self._other)
        if self._loading is not None and self._loading.done():
            loading, self._loading = self._loading, None
            try:
                self._ready = loading.result()
            except ModelError as e:
                self.refused += 1
                logger.warning("the new model is not used: %s", e)
        if self._ready is None:
            return None
        until = self._ready[1].until_ns
        if until > now_ns or (oldest_open_ns is not None and until > oldest_open_ns):
            return None
        ready, self._ready = self._ready, None
        self.loads += 1
        self.digest = ready[1].digest
        logger.info("took in the model %s, which has learnt up to %.0f s ago", self.path, (now_ns - until) / 1e9)
        return ready
