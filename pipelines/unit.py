"""`flowsage unit`: the systemd units of the sensor and of the scorer, for this installation."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

KINDS = ("collect", "score")


def unit(kind: str, config: Path, *, python: Path | None = None) -> str:
    """The unit file of `flowsage KIND`, with the configuration at `config`.

    python   the interpreter of the environment that FlowSAGE is in; None: this one's
    """
    python = python or Path(sys.executable)
    script = python.with_name("flowsage")
    command = _word(script) if script.exists() else f"{_word(python)} -m flowsage.pipelines.cli"
    text = (files("flowsage.pipelines") / f"{kind}.service").read_text()
    for name, value in (("FLOWSAGE", command), ("PYTHON", _word(python)), ("CONFIG", _escaped(config.absolute()))):
        text = text.replace(f"@{name}@", value)
    return text


def closed_to_others(path: Path) -> Path | None:
    """The first folder on the way to `path`, links followed, that a service's own user may not pass; None: it may."""
    return next((folder for folder in reversed(path.resolve().parents) if not folder.stat().st_mode & 0o001), None)


def _word(path: Path) -> str:
    """A path as one word of a command line, as systemd.service(5) reads it."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$").replace("%", "%%")
    return f'"{text}"' if any(c in text for c in " \t'\";") else text


def _escaped(path: Path) -> str:
    """A path as a setting: specifiers begin with %."""
    return str(path).replace("%", "%%")
