"""Quantities as people write them: durations "250ms", "15s", "2m", "1h", sizes "64MiB", lists "eth0,eth1", moments."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer
from pydantic_settings import NoDecode

SECOND = 10**9
"""Nanoseconds."""
_UNITS_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86_400 * 10**9}
_UNITS_BYTES = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def _scaled(value: object, units: dict[str, int], example: str) -> object:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if not found or found[2] not in units:
        raise ValueError(f"{value!r} is not of the form {example}")
    return round(float(found[1]) * units[found[2]])


def seconds(text: str) -> float:
    """ "300" or "5m" as seconds. Raises ValueError for anything else."""
    scaled = _duration(text)
    assert isinstance(scaled, int)
    return scaled / SECOND


def moment(unix_s: float) -> str:
    """Unix time as "2026-01-05 09:30:00 UTC"."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _duration(value: object) -> object:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return round(value * 10**9)
    return _scaled(value, {"": 10**9, **_UNITS_NS}, '"15s" (ms, s, m, h, d; a bare number is seconds)')


def _size(value: object) -> object:
    return _scaled(value, _UNITS_BYTES, '"64MiB"')


def _names(value: object) -> object:
    return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value


def _seconds(value: int) -> str:
    return f"{value / 10**9:g}s"


Duration = Annotated[int, BeforeValidator(_duration), PlainSerializer(_seconds), Field(ge=0)]
"""Nanoseconds, read from "15s" or a number of seconds."""
Size = Annotated[int, BeforeValidator(_size), Field(gt=0)]
"""Bytes, read from "64MiB" or a number."""
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]
"""A list of names; "eth0,eth1" in the environment."""
