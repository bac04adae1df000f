"""A collector in a process of its own, to be killed: `python -m tests.collector.sensor_process`, settings as JSON.

What it is told to die of is a real SIGKILL, at a place that a random one seldom hits.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from flowsage.collector.agent import Agent
from flowsage.collector.agent_settings import AgentSettings
from flowsage.collector.collect import collect, summary
from flowsage.collector.errors import FlowsageError
from flowsage.collector.handover import Handover
from flowsage.collector.lifetime import Lifetime
from flowsage.collector.parquet import ParquetOutput
from flowsage.collector.ring import Ring

ROOT = Path(__file__).resolve().parents[2]
DEATHS: dict[str, tuple[type[Any], str, bool]] = {
    "before the batch is written": (ParquetOutput, "put", False),
    "after the batch is written": (ParquetOutput, "put", True),
    "before the commit": (Handover, "_close", False),
    "after the commit": (Ring, "release", False),
    "after the slots are released": (Handover, "_close", True),
    "before a file is finished": (ParquetOutput, "_finish", False),
    "after a file is finished": (ParquetOutput, "_finish", True),
    "before the new program is loaded": (Lifetime, "upgrade", False),
    "after the new program is loaded": (Lifetime, "upgrade", True),
    "while the old program is flushed": (Handover, "_close", True),
    "before the old program is left": (Lifetime, "settle", False),
    "after the old program is left": (Lifetime, "settle", True),
    "while everything is removed": (Lifetime, "remove", False),
}
"""Where to die: in which method, before it or after."""


def die(where: str, times: int) -> None:
    """Be killed at `where`, when it is reached for the `times`-th time."""
    owner, name, after = DEATHS[where]
    method: Callable[..., Any] = getattr(owner, name)
    left = times

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(*args, **kwargs)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def start(settings: AgentSettings, output: object, *prefix: str, **more: Any) -> subprocess.Popen[str]:
    """The process; it says "ready" on stderr, at the end the ledger on stdout and its summary on stderr.

    `more`: `death` (where, how often), and keywords of `collect`.
    """
    told = {f.name: getattr(settings, f.name) for f in fields(settings)}
    words = json.dumps([told, str(output), more], default=str)
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "tests.collector.sensor_process", words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ready(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """Once packets are counted."""
    assert process.stderr
    said = ""
    while (line := process.stderr.readline()) != "ready\n":
        said += line
        assert line, said
    return process


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL, and wait until it is gone."""
    process.kill()
    process.communicate()


def end(process: subprocess.Popen[str], seconds: float = 120) -> dict[str, Any]:
    """SIGTERM; its last ledger."""
    process.terminate()
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    ledger: dict[str, Any] = json.loads(out)
    assert ledger["balance"] == ledger["bytes_balance"] == ledger["records_balance"] == 0, err
    return ledger


def main() -> None:
    """Collect as told."""
    told, output, more = json.loads(sys.argv[1])
    told |= {"interfaces": tuple(told["interfaces"]), "program": Path(told["program"])}
    told["pins"] = told["pins"] and Path(told["pins"])
    if death := more.pop("death", None):
        die(*death)

    def say(_: Agent) -> None:
        print("ready", file=sys.stderr, flush=True)

    try:
        ledger = collect(AgentSettings(**told), output, on_ready=say, **more)
    except FlowsageError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(ledger.to_json() if output != "-" else "", end="")
    print(summary(ledger), file=sys.stderr)


if __name__ == "__main__":
    main()
