"""Model artefacts: a directory with all that a detector has learnt, and what it is of.

    model.safetensors        GraphSAGE: weights, optimiser, memory of hosts, neighbours and meetings
    history.safetensors      history: keys and their counts
    calibration.safetensors  alarms: levels, records, calibration
    config.json              feature schema, units, what it was made of, size and checksum of every other file
    README.md                model card

A directory is written beside its place and put there in one step, so a reader finds the old one or the new one, whole.
Nothing in it is ever unpickled: arrays are safetensors, everything else is JSON. Open findings are not part of a model.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flowsage.collector.errors import ModelError
from flowsage.models.analytics import TABLE
from flowsage.models.arrays import write_arrays
from flowsage.models.card import card
from flowsage.models.columns import Array
from flowsage.models.detector import Detector, DetectorConfig
from flowsage.models.episodes import Episodes
from flowsage.models.profiles import feature_names
from flowsage.models.terms import TERMS

FORMAT = 1
"""Version of the directory's layout."""

CONFIG, CARD = "config.json", "README.md"
PARTS = {"prior": "model.safetensors", "history": "history.safetensors", "alarms": "calibration.safetensors"}
"""Which file holds which part of `Detector.state`."""

_AT_FDCWD, _EXCHANGE = -100, 2


@dataclass(frozen=True)
class Manifest:
    """What `config.json` says.

    schema: what must be the same where the model is used (`schema_of`). trained: what it was made of: flows, windows,
    hosts, first_ns and until_ns (event time; Unix ns), and whatever training adds. digest: of all this, and by the
    checksums of the files of what is in them; two directories that have the same hold the same model.
    """

    schema: dict[str, Any]
    trained: dict[str, Any]
    files: dict[str, dict[str, Any]]
    state: dict[str, Any]
    digest: str

    @property
    def until_ns(self) -> int:
        """Event time up to which it has learnt, Unix ns: what it scores has to come after."""
        return int(self.trained["until_ns"])


def schema_of(config: DetectorConfig) -> dict[str, Any]:
    """What a model and its user must agree on: keys are names of settings where there is one."""
    meeting, alarms = config.meeting, config.alarms
    return {
        "windows.window": f"{config.window_ns / 1e9:g}s",
        "model.undirected": config.history.undirected,
        "a prior of first meetings": config.graph,
        "alarms.block": f"{alarms.block_ns / 1e9:g}s",
        "alarms.time_scale": alarms.time_scale,
        "alarms.internal": list(alarms.internal or ()),
        "architecture": {
            "encoder": "directed GraphSAGE, mean aggregation, jumping knowledge"
            if meeting.graph
            else "popularity alone",
            "width": meeting.width,
            "layers": meeting.layers,
            "neighbour slots": meeting.slots,
            "overlaps": meeting.overlaps,
            "replayed meetings": meeting.replayed,
        },
        "features": {
            "host": feature_names(),
            "history": list(TERMS),
            "analytics": [a.name for a in TABLE],
        },
    }


UNITS = {
    "host": "half the natural log of 1 + distinct (peer, service), or a presence from 0 to 1",
    "history": "nats",
    "analytics": {a.name: a.unit for a in TABLE},
    "times": "ns since the Unix epoch",
}


def save(path: Path, detector: Detector, *, trained: dict[str, Any]) -> Manifest:
    """Write the model directory `path`, in one step; an older one there is replaced, anything else is left alone.

    `trained` must hold "until_ns" (see `Manifest`). The same detector gives the same bytes. Raises ModelError.
    """
    part = path.with_name(f".{path.name}.part")
    if path.exists() and not (path / CONFIG).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ModelError(f"{path} exists and is no model directory; name another place for the model")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        manifest = _write(part, detector, trained)
        _sync(part)
        _put(part, path)
        _sync(path.absolute().parent)
    except OSError as e:
        raise ModelError(f"cannot write the model directory {path}: {e.strerror or e}") from e
    return manifest


def _write(folder: Path, detector: Detector, trained: dict[str, Any]) -> Manifest:
    arrays, values = detector.state()
    values = values | {"alarms": values["alarms"] | {"episodes": Episodes().state()}}
    files = {}
    for part, name in PARTS.items():
        mine = {k.removeprefix(f"{part}/"): a for k, a in arrays.items() if k.startswith(f"{part}/")}
        if mine:
            write_arrays(mine, folder / name)
            files[name] = _measure(folder / name)
    (folder / CARD).write_text(card(detector, schema_of(detector.config), trained), encoding="utf-8")
    files[CARD] = _measure(folder / CARD)
    body: dict[str, Any] = {
        "format": FORMAT, "schema": schema_of(detector.config), "units": UNITS, "trained": trained, "files": files,
        "state": values,
    }  # fmt: skip
    body["sha256"] = _digest(body)
    (folder / CONFIG).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return Manifest(body["schema"], trained, files, values, body["sha256"])


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps({k: v for k, v in body.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(part: Path, path: Path) -> None:
    """Put a directory in its place; where one is already, exchange the two (Linux, renameat2) and drop the old one."""
    if not path.exists():
        part.rename(path)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(part), _AT_FDCWD, os.fsencode(path), _EXCHANGE) != 0:
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        # A file system that cannot exchange: for a moment there is nothing, and readers try again.
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        part.rename(path)
        part = old
    shutil.rmtree(part)


def read_manifest(path: Path) -> Manifest:
    """What the model directory `path` says it is. Raises ModelError where it is none, or its config.json is damaged."""
    with _Folder(path) as folder:
        return folder.manifest()


def load(path: Path, config: DetectorConfig) -> tuple[Detector, Manifest]:
    """The detector in the model directory `path`, to be used under `config`.

    Raises ModelError: no model there, a file damaged or missing (by name), or made for another feature schema. A
    configuration without the graph leaves the graph of a model aside.
    """
    for attempt in (0, 1):
        try:
            with _Folder(path) as folder:
                manifest = folder.manifest()
                check(path, manifest, config)
                arrays: dict[str, Array] = {}
                for part, name in PARTS.items():
                    if part != "prior" or config.graph:
                        arrays |= {f"{part}/{k}": a for k, a in folder.arrays(name, manifest).items()}
            break
        except FileNotFoundError as e:
            # Somebody has put a new model in its place while this one was read.
            if attempt:
                raise ModelError(f"{path}: {e.filename} is missing; restore the directory, or train anew") from e
    try:
        return Detector.restore(config, arrays, manifest.state | {"graph": config.graph}), manifest
    except (KeyError, ValueError, IndexError) as e:
        raise ModelError(f"{path} does not hold what this version of FlowSAGE reads ({e}); train it anew") from e


def check(path: Path, manifest: Manifest, config: DetectorConfig) -> None:
    """Refuse (ModelError) a model that was made for another feature schema than `config` asks for."""
    wanted = schema_of(config)
    for key, value in wanted.items():
        mine = manifest.schema.get(key)
        if mine == value or (key == "a prior of first meetings" and mine and not value):
            continue
        difference = f"{key} {_said(mine)}, here it is {_said(value)}"
        if isinstance(value, dict) and isinstance(mine, dict):
            name = next(k for k in {**value, **mine} if value.get(k) != mine.get(k))
            difference = f"{key} ({name}) {_first(mine.get(name), value.get(name))}"
        raise ModelError(f"{path} was made with {difference}; configure it so, or train a model for this configuration")


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _first(mine: Any, value: Any) -> str:
    """Where two lists, or two values, part."""
    if isinstance(mine, list) and isinstance(value, list):
        at = next((i for i, (a, b) in enumerate(zip(mine, value, strict=False)) if a != b), min(len(mine), len(value)))
        mine, value = ((v[at] if at < len(v) else "nothing") for v in (mine, value))
        return f"{mine!r} at place {at + 1}, here it is {value!r}"
    return f"{_said(mine)}, here it is {_said(value)}"


class _Folder:
    """An open model directory: what is read through it is of one directory, whatever takes its name meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as e:
            raise ModelError(
                f"cannot read the model directory {path} ({e.strerror}); `flowsage train` makes one"
            ) from e

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def _open(self, name: str) -> int:
        try:
            return os.open(name, os.O_RDONLY, dir_fd=self._handle)
        except FileNotFoundError:
            raise
        except OSError as e:
            raise ModelError(f"cannot read {self.path / name}: {e.strerror}") from e

    def manifest(self) -> Manifest:
        try:
            handle = self._open(CONFIG)
        except FileNotFoundError as e:
            raise ModelError(
                f"{self.path} is no model directory: it has no {CONFIG}; `flowsage train` makes one"
            ) from e
        with os.fdopen(handle, "rb") as file:
            text = file.read()
        try:
            body = json.loads(text)
            version = body["format"]
            if version != FORMAT:
                raise ModelError(
                    f"{self.path} is a model directory of format {version}, this version of FlowSAGE reads {FORMAT}; "
                    "train it anew"
                )
            if body["sha256"] != _digest(body):
                raise ModelError(f"{self.path / CONFIG} does not match its checksum; restore the file, or train anew")
            return Manifest(body["schema"], body["trained"], body["files"], body["state"], body["sha256"])
        except (ValueError, KeyError, TypeError) as e:
            raise ModelError(f"{self.path / CONFIG} is damaged; restore the file, or train anew") from e

    def arrays(self, name: str, manifest: Manifest) -> dict[str, Array]:
        """All arrays of a file, once its size and checksum are right."""
        if name not in manifest.files:
            raise ModelError(f"{self.path / CONFIG} names no {name}; train the model anew")
        with os.fdopen(self._open(name), "rb") as file:
            size, said = os.fstat(file.fileno()).st_size, manifest.files[name]
            if size != said["bytes"]:
                raise ModelError(
                    f"{self.path / name} has {size:,} bytes and should have {said['bytes']:,}; restore the file, or "
                    "train anew"
                )
            if hashlib.file_digest(file, "sha256").hexdigest() != said["sha256"]:
                raise ModelError(f"{self.path / name} does not match its checksum; restore the file, or train anew")
            try:
                with safe_open(f"/proc/self/fd/{file.fileno()}", framework="numpy") as tensors:
                    return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
            except SafetensorError as e:
                raise ModelError(f"{self.path / name} is no safetensors file ({e}); train the model anew") from e


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever another model takes the place of this one; None while there is none."""
    try:
        found = (path / CONFIG).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
