"""A capture of the lab's traffic, made by a process of its own (`capture`)."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from flowsage.collector.errors import FlowsageError


@dataclass(frozen=True)
class Recorded:
    """What a finished capture holds: frames written, and frames the kernel had to drop."""

    packets: int
    dropped: int


class Recording:
    """A running capture: a context manager, or `stop()`."""

    def __init__(self, path: Path, netns: str, bridge: str) -> None:
        self.path = path
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "flowsage.pipelines.lab.capture", str(path), netns, bridge],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        if first.strip() != "ready":
            self._process.wait()
            raise FlowsageError(f"the lab's traffic cannot be recorded to {path}: {first.strip() or 'see above'}")
        self._result: Recorded | None = None

    def stop(self) -> Recorded:
        """End the capture; the file is whole afterwards. Raises FlowsageError where it broke off (a full disk)."""
        if self._result is None:
            out, _ = self._process.communicate(timeout=30)  # closes its stdin, which is the order to stop
            if self._process.returncode:
                raise FlowsageError(f"the recording to {self.path} broke off: {out.strip() or 'it was killed'}")
            self._result = Recorded(**json.loads(out))
        return self._result

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
