"""Taking a sensor out of the kernel without running it: `flowsage collect --detach`."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flowsage.collector import libbpf, syscall
from flowsage.collector.errors import AttachmentError, FlowsageError
from flowsage.collector.journal import JOURNAL_BYTES, Journal
from flowsage.collector.pins import ROOT, PinnedObject, Pins, sensors
from flowsage.collector.program import FlowProgram
from flowsage.collector.ring import MappedMap

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What was taken away of a sensor: the links' names, and what its table and ring still held; `whole`: all of it."""

    sensor: str
    links: tuple[str, ...]
    whole: bool
    flows: int = 0
    packets: int = 0
    records: int = 0

    def __str__(self) -> str:
        where = ", ".join(name.partition("-")[2] + (" (egress)" if name[0] == "e" else "") for name in self.links)
        text = f"sensor {self.sensor}: taken off {where or 'no interface'}"
        if not self.whole:
            return text + "; it still watches others"
        text += "; nothing of it is left in the kernel"
        if self.flows or self.records:
            text += f"; {self.packets:,} packets of {self.flows:,} flows"
            text += f" and {self.records:,} records that waited were never collected"
        return text


def remove_sensor(sensor: str, root: Path = ROOT) -> Removed | None:
    """Everything that is pinned for `sensor`: links, programs, maps; None where nothing is.

    Raises BusySensorError while a process runs it, PrivilegeError, AttachmentError where the kernel keeps a link.
    """
    return _remove(sensor, root, None) if sensor in sensors(root) else None


def remove_from(interfaces: tuple[str, ...], root: Path = ROOT) -> list[Removed]:
    """Whatever sensors pinned on `interfaces`; a sensor that watches nothing else goes as a whole. Raises the same."""
    removed = (_remove(sensor, root, interfaces) for sensor in sensors(root))
    return [one for one in removed if one is not None]


def _remove(sensor: str, root: Path, interfaces: tuple[str, ...] | None) -> Removed | None:
    pins = Pins(sensor, root)
    try:
        links = list(pins.links())
        taken = [name for name in links if interfaces is None or name.partition("-")[2] in interfaces]
        if interfaces is not None and not taken:
            return None
        for name in taken:
            _take_off(pins, name)
        if len(taken) < len(links):
            return Removed(sensor=sensor, links=tuple(taken), whole=False)
        flows, packets, records = _held(pins)
        pins.clear()
        return Removed(sensor=sensor, links=tuple(taken), whole=True, flows=flows, packets=packets, records=records)
    finally:
        pins.close()


def _take_off(pins: Pins, name: str) -> None:
    fd = pins.get(name)
    if fd is None:
        return
    try:
        libbpf.link_detach(fd)
        if syscall.info(fd, syscall.LinkInfo).ifindex:
            raise AttachmentError(f"the kernel still shows {pins.path(name)} attached after it was detached")
    finally:
        os.close(fd)
    pins.remove(name)


def _held(pins: Pins) -> tuple[int, int, int]:
    """Flows and packets in the table, records in the ring; zeros where what is there is of another version."""
    state = pins.get("state")
    if state is None:
        return 0, 0, 0
    program = FlowProgram()
    with suppress(FlowsageError, KeyError):
        try:
            mapped = MappedMap(state, JOURNAL_BYTES)
            journal = Journal(mapped.words)
            generation = journal.books.generation
            program.adopt(PinnedObject(pins, generation), journal.description(generation))
            table = program.table()
            return table.flows, table.packets, program.ring.waiting
        finally:
            program.release()
            os.close(state)
    return 0, 0, 0
