"""Snapshots of what a site has learnt: in a folder or an object store, whole or not there.

    <where>/<group>/<topic>/<partition>/00000000000000012345.safetensors    arrays
    <where>/<group>/<topic>/<partition>/00000000000000012345.json           manifest: what, checksum, plain values

The number is the offset of the first record that is not in the snapshot. The arrays are put in place first, then the
manifest, each in one step (renamed in a folder; an object store shows an object once it is whole): without its manifest
a snapshot is not there. One that is damaged or somebody else's is refused by name, and the one before it is used.
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
from safetensors import SafetensorError
from safetensors.numpy import load_file

from flowsage.collector.errors import ConfigurationError, FlowsageError
from flowsage.models.arrays import write_arrays

logger = logging.getLogger(__name__)

FORMAT = "flowsage-snapshot-1"
ARRAYS, MANIFEST = ".safetensors", ".json"
DIGITS = 20
UNUSABLE = (FlowsageError, OSError, pa.ArrowException, SafetensorError, ValueError, KeyError, TypeError)


class SnapshotError(FlowsageError):
    """A snapshot cannot be written, or is not one that can be used."""


@dataclass(frozen=True)
class Snapshot:
    """What was saved: of whom (`source`: group, topic, partition), up to which offset, and what."""

    source: tuple[str, str, int]
    position: int
    arrays: dict[str, npt.NDArray[Any]]
    values: dict[str, Any]


class SnapshotStore:
    """Snapshots under a folder or a URL that pyarrow.fs knows (s3://bucket/prefix, gs://, hdfs://).

    keep    snapshots of a partition that are kept; older ones are deleted

    Raises ConfigurationError where the place cannot be used.
    """

    def __init__(self, where: str, *, keep: int = 3) -> None:
        self.where = where
        self.keep = keep
        try:
            url = where if "://" in where else str(Path(where).absolute())
            self._files, self._root = pafs.FileSystem.from_uri(url)
            self._local = isinstance(self._files, pafs.LocalFileSystem)
            self._files.create_dir(self._root, recursive=True)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise ConfigurationError(
                f"the state {where!r} cannot be used ({_first_line(error)}); name a folder or a URL such as s3://bucket/path"
            ) from error

    def _folder(self, source: tuple[str, str, int]) -> str:
        return "/".join((self._root, *(str(part) for part in source)))

    def write(self, snapshot: Snapshot) -> int:
        """Put a snapshot in its place, delete what is older than `keep`; returns its bytes. Raises SnapshotError."""
        folder, name = self._folder(snapshot.source), f"{snapshot.position:0{DIGITS}d}"
        try:
            self._files.create_dir(folder, recursive=True)
            with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder if self._local else None) as scratch:
                arrays = Path(scratch) / f"{name}{ARRAYS}"
                write_arrays(snapshot.arrays, arrays)
                manifest = Path(scratch) / f"{name}{MANIFEST}"
                body: dict[str, Any] = {
                    "format": FORMAT, "source": list(snapshot.source), "position": snapshot.position,
                    "arrays": {"bytes": arrays.stat().st_size, "sha256": _sha256(arrays)}, "values": snapshot.values,
                }  # fmt: skip
                manifest.write_text(json.dumps(body | {"sha256": _digest(body)}), encoding="utf-8")
                for path in (arrays, manifest):
                    self._put(path, f"{folder}/{path.name}")
                size = int(body["arrays"]["bytes"]) + len(json.dumps(body))
            self._prune(folder)
        except (OSError, pa.ArrowException, SafetensorError) as error:
            raise SnapshotError(f"no snapshot was written to {self.where}: {_first_line(error)}") from error
        return size

    def _put(self, path: Path, target: str) -> None:
        if not self._local:
            pafs.copy_files(str(path), target, destination_filesystem=self._files)
            return
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(target)
        handle = os.open(Path(target).parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _names(self, folder: str) -> list[tuple[str, str]]:
        """(name without suffix, suffix) of the files in a folder."""
        found = self._files.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
        split = (os.path.splitext(f.base_name) for f in found if f.type == pafs.FileType.File)
        return [(stem, suffix) for stem, suffix in split if len(stem) == DIGITS and stem.isdecimal()]

    def _prune(self, folder: str) -> None:
        """Keep the newest; a manifest goes before its arrays, and arrays without one were never finished."""
        names = self._names(folder)
        kept = sorted(stem for stem, suffix in names if suffix == MANIFEST)[-self.keep :]
        gone = [(stem, suffix) for stem, suffix in names if stem not in kept and stem < kept[-1]]
        for stem, suffix in sorted(gone, key=lambda each: each[1] != MANIFEST):
            self._files.delete_file(f"{folder}/{stem}{suffix}")
        if self._local:
            self._sweep(Path(folder))

    @staticmethod
    def _sweep(folder: Path) -> None:
        """What a killed writer left."""
        for scratch in folder.glob(".writing-*"):
            for path in scratch.iterdir():
                path.unlink(missing_ok=True)
            scratch.rmdir()

    def newest(self, source: tuple[str, str, int]) -> Iterator[Snapshot]:
        """Snapshots of a partition, the newest first; those that cannot be used are named in a warning and left out."""
        folder = self._folder(source)
        try:
            names = sorted((stem for stem, suffix in self._names(folder) if suffix == MANIFEST), reverse=True)
        except (OSError, pa.ArrowException) as error:
            raise SnapshotError(f"the state {self.where} cannot be read: {_first_line(error)}") from error
        for name in names:
            try:
                yield self._read(folder, name, source)
            except UNUSABLE as error:
                self.refuse(source, name, _first_line(error))

    def refuse(self, source: tuple[str, str, int], name: int | str, why: str) -> None:
        """Say that a snapshot is not used, and why."""
        path = f"{self.where}/{'/'.join(map(str, source))}/{int(name):0{DIGITS}d}{MANIFEST}"
        logger.warning("snapshot %s is refused: %s; trying the one before it", path, why)

    def _read(self, folder: str, name: str, source: tuple[str, str, int]) -> Snapshot:
        with self._files.open_input_stream(f"{folder}/{name}{MANIFEST}") as stream:
            body = json.loads(stream.read())
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            told = body.get("format") if isinstance(body, dict) else type(body).__name__
            raise SnapshotError(f"it is of format {told!r}, this program reads {FORMAT!r}")
        told = body.pop("sha256", None)
        if told != _digest(body):
            raise SnapshotError("its manifest is damaged (the checksum does not match)")
        if tuple(body["source"]) != source or int(body["position"]) != int(name):
            raise SnapshotError(f"it is of {body['source']}, offset {body['position']}")
        with tempfile.TemporaryDirectory(prefix="flowsage-") as scratch:
            path = Path(folder) / f"{name}{ARRAYS}" if self._local else Path(scratch) / "arrays"
            if not self._local:
                pafs.copy_files(f"{folder}/{name}{ARRAYS}", str(path), source_filesystem=self._files)
            if path.stat().st_size != body["arrays"]["bytes"] or _sha256(path) != body["arrays"]["sha256"]:
                raise SnapshotError("its arrays are damaged or incomplete (the checksum does not match)")
            arrays = load_file(path)
        return Snapshot(source, int(name), arrays, body["values"])


class SnapshotWriter:
    """Writes snapshots in a thread of its own, one at a time: while one is written, another is left out."""

    def __init__(self, store: SnapshotStore) -> None:
        self.store = store
        self.written = self.failed = self.left_out = 0
        self.bytes = 0
        """Of the last one."""
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    def write(self, snapshot: Snapshot) -> None:
        """Write `snapshot`, unless one is being written. What goes wrong is logged and counted."""
        if self.busy:
            self.left_out += 1
            return
        self._thread = threading.Thread(target=self._work, args=(snapshot,), name="snapshot")
        self._thread.start()

    def _work(self, snapshot: Snapshot) -> None:
        try:
            self.bytes = self.store.write(snapshot)
            self.written += 1
        except SnapshotError as error:
            self.failed += 1
            logger.error("%s", error)

    def close(self) -> None:
        """Wait for the one that is being written."""
        if self._thread is not None:
            self._thread.join()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{text.splitlines()[0]} is missing" if isinstance(error, KeyError) else text.splitlines()[0]
