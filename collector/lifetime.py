"""A sensor's program through restarts and upgrades.

Pinned, programs, maps, links and the journal outlive the process. The next one adopts them where it would load the
same; otherwise it loads its own beside them and has every link changed over, each at once, so that no packet passes
unseen. Where the new program's maps have the layout of the old, it takes them over with what they hold; where not, the
old program is flushed through its ring after the change, and what it counted is carried into the ledger.

An upgrade that is killed goes on where it was: the journal says which program is current, and which is to be.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flowsage.collector import libbpf, pins, syscall
from flowsage.collector.egress import EgressAttachment, attach_egress
from flowsage.collector.errors import FlowsageError, ProgramError
from flowsage.collector.interface import index_of
from flowsage.collector.journal import JOURNAL_BYTES, Books, Journal
from flowsage.collector.kernel_object import OBJECT, Loader
from flowsage.collector.pins import PinnedObject, Pins
from flowsage.collector.program import COUNTERS, KEPT, FlowProgram, FlowSettings
from flowsage.collector.ring import MappedMap
from flowsage.collector.walk import WALKS
from flowsage.collector.xdp import Attachment, EBPFAttachMode, attach, attached_program

logger = logging.getLogger(__name__)

PROGRAMS = ("flow_xdp", *WALKS)
MAPS = (*KEPT, ".data.input")
STATE = "state"

Attached = Attachment | EgressAttachment


class Lifetime:
    """The program of the sensor called `name`, pinned under `root` (None: it lives and dies with this process).

    `open`, then `attach` every interface, then hand on what `retiring` still holds, then `settle`; while it is
    `outdated` after that, `upgrade` and again. At the end `remove` everything, or `release` it to go on without us.
    """

    def __init__(
        self,
        name: str,
        settings: FlowSettings,
        root: Path | None,
        *,
        path: Path = OBJECT,
        loader: Loader = "auto",
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.name = name
        self.root = root
        self._settings, self._path, self._loader = settings, path, loader
        self.program = self._own_program()
        self.retiring: FlowProgram | None = None
        self.journal = Journal()
        self.adopted = False
        self.attachments: dict[str, Attached] = {}
        self.unwatched_ns: dict[str, int] = {}
        self._monotonic_ns = monotonic_ns
        self._pins: Pins | None = None
        self._mapped: MappedMap | None = None

    def _own_program(self) -> FlowProgram:
        return FlowProgram(self._settings, path=self._path, loader=self._loader)

    # ---- programs ----

    def open(self) -> None:
        """Load, or adopt what is there; nothing is attached anew. Raises BusySensorError, and what loading raises."""
        if self.root is None:
            self.program.load()
            self.journal.write(Books(generation=1, target=1))
            return
        self._pins = Pins(self.name, self.root)
        try:
            if not self._adopt(self._pins):
                self._begin(self._pins)
        except BaseException:
            self.release()
            raise

    def _begin(self, held: Pins) -> None:
        """A new life, with a boot of its own."""
        held.clear()
        try:
            state = pins.shared_array("flowsage_state", JOURNAL_BYTES)
            held.put(state, STATE)
            self._open_journal(state)
            self.program = self._load(held, 1, None)
        except BaseException:
            held.clear()
            raise
        self.journal.write(Books(generation=1, target=1))

    def _adopt(self, held: Pins) -> bool:
        """Go on with what an earlier process left; False: it left nothing that could go on."""
        state = held.get(STATE)
        if state is None:
            return False
        self._open_journal(state)
        books = self.journal.books
        if not books.generation:
            return False
        try:
            current = self._pinned(held, books.generation)
        except ProgramError as error:
            logger.warning("%s; the sensor begins anew", error)
            return False
        held.keep_only(books.generation, books.target)
        self.adopted = True
        self.program = current
        if books.target != books.generation:
            logger.info("going on with an upgrade that was interrupted")
            self.program = self._pinned(held, books.target)
            self._retire_or_release(current)
        elif self.outdated:
            self.upgrade()
        return True

    def _open_journal(self, state: int) -> None:
        if self._mapped is not None:
            self._mapped.close()
        try:
            self._mapped = MappedMap(state, JOURNAL_BYTES)
        finally:
            os.close(state)
        self.journal = Journal(self._mapped.words)

    def _pinned(self, held: Pins, generation: int) -> FlowProgram:
        program = self._own_program()
        program.adopt(PinnedObject(held, generation), self.journal.description(generation))
        program.carried = self.journal.carried(generation)
        return program

    def _load(self, held: Pins, generation: int, current: FlowProgram | None) -> FlowProgram:
        """Our own program into the kernel, with the maps of `current` where they fit, pinned and described."""
        program = self._own_program()
        opened, layout = program.open()
        try:
            # BCC makes its maps itself.
            kept = current if isinstance(opened, libbpf.Object) and self._fits(opened, layout, current) else None
            if kept is not None and isinstance(opened, libbpf.Object):
                for name in KEPT:
                    opened.reuse(name, kept.map_fd(name))
            opened.load()
            program.adopt(opened)
            for name in (*PROGRAMS, "flow_egress") if self._settings.egress else PROGRAMS:
                held.put(opened.program_fd(name), f"program-{name}", generation)
            for name in MAPS:
                held.put(opened.map_fd(name), f"map-{name}", generation)
        except BaseException:
            opened.close()
            raise
        what = {"identity": program.identity(), "layout": layout, "counters": COUNTERS, "walks": WALKS}
        self.journal.describe(generation, what)
        program.carried = kept.carried if kept is not None else {}
        self.journal.carry(generation, program.carried)
        return program

    def _fits(self, opened: libbpf.Object, layout: int, current: FlowProgram | None) -> bool:
        """Whether a new program can take over the maps of the current one with what they hold."""
        if current is None:
            return False
        description = self.journal.description(self.journal.books.generation)
        if (layout, list(COUNTERS)) != (description["layout"], description["counters"]):
            return False
        return all(opened.shape(name) == _shape(current.map_fd(name)) for name in KEPT)

    @property
    def outdated(self) -> bool:
        """Whether the program that is to be attached is another than this process would load."""
        if self._pins is None:
            return False
        there = self.journal.description(self.journal.books.target)
        return bool(there["identity"] != self._own_program().identity())

    def upgrade(self) -> None:
        """Load our own program beside the one that is attached, which `attach` then changes over. After `settle`."""
        assert self._pins is not None
        current, books = self.program, self.journal.books
        try:
            self.program = self._load(self._pins, books.generation + 1, current)
        except BaseException:
            self._pins.keep_only(books.generation)
            raise
        self.journal.write(replace(books, target=books.generation + 1))
        self._retire_or_release(current)

    def _retire_or_release(self, current: FlowProgram) -> None:
        """Where the new program has maps of its own, what is in those of the old has to be handed on first."""
        if _number(self.program.ring_fd) != _number(current.ring_fd):
            self.retiring = current
            logger.info("the program has another layout: the flows of the old one are flushed")
        else:
            current.release()
            logger.info("the program is replaced, with its flow table")

    def settle(self) -> None:
        """Every link runs the new program, and nothing is left in the old: from now on it is the only one."""
        books = self.journal.books
        if books.target == books.generation or self._pins is None:
            return
        position = books.position
        if self.retiring is not None:
            counted = self.retiring.counters()
            self.journal.carry(books.target, counted)
            self.program.carried = counted
            position = self.program.ring.position
            self.retiring.release()
            self.retiring = None
        self.journal.write(replace(books, generation=books.target, position=position))
        self._pins.keep_only(books.target)

    # ---- interfaces ----

    def attach(self, interface: str, mode: EBPFAttachMode, *, replace: bool = False) -> Attachment:
        """Watch what arrives at `interface`; a link of an earlier process, or of another program of ours, goes on.

        Not in another `mode`: the kernel runs one program natively or one not, never both. What arrives between the two
        is not counted; `unwatched_ns` says how long that was.
        """
        name = f"link-{interface}"
        fd = self._linked(name, interface)
        there, before, since = attached_program(interface), None, self._monotonic_ns()
        if fd is not None:
            link = syscall.info(fd, syscall.LinkInfo)
            before = EBPFAttachMode(there[0]) if there is not None and there[1] == link.prog_id else None
            if before is not None and mode in {EBPFAttachMode.AUTO, before}:
                if link.prog_id != self.program.program_id:
                    pins.link_update(fd, self.program.xdp_fd)
                attachment = Attachment(interface, link.ifindex, before, self.program.program_id, fd)
                self.attachments[name] = attachment
                return attachment
            self._take_off(name, fd)
        try:
            attachment = attach(self.program.xdp_fd, interface, mode, replace=replace)
        except FlowsageError:
            if before is not None:
                self._keep(name, attach(self.program.xdp_fd, interface, before))
            raise
        self._keep(name, attachment)
        if before is not None:
            self.unwatched_ns[interface] = gap = self._monotonic_ns() - since
            what = f"{interface} changes from {before} to {attachment.mode} mode"
            logger.warning("%s, which leaves a gap: what arrived within %.1f ms is not counted", what, gap / 1e6)
        return attachment

    def attach_egress(self, interface: str) -> EgressAttachment:
        """Watch what leaves `interface`, likewise."""
        name, program_fd = f"egress-{interface}", self.program.program_fd("flow_egress")
        fd = self._linked(name, interface)
        if fd is not None:
            link, number = syscall.info(fd, syscall.LinkInfo), int(libbpf.program_info(program_fd).id)
            if link.prog_id != number:
                pins.link_update(fd, program_fd)
            attachment = EgressAttachment(interface, link.ifindex, number, fd)
            self.attachments[name] = attachment
            return attachment
        attachment = attach_egress(program_fd, interface)
        self._keep(name, attachment)
        return attachment

    def _keep(self, name: str, attachment: Attached) -> None:
        self.attachments[name] = attachment
        if self._pins is not None:
            self._pins.put(attachment.link_fd, name)

    def _linked(self, name: str, interface: str) -> int | None:
        """The link that is there already; a dead one, or one of an interface that was made anew, is taken away."""
        held = self.attachments.pop(name, None)
        if held is not None:
            held.release()
        fd = self._pins.get(name) if self._pins is not None else None
        if fd is None:
            return None
        ifindex = syscall.info(fd, syscall.LinkInfo).ifindex
        if ifindex and ifindex == index_of(interface):
            return fd
        self._take_off(name, fd)
        return None

    def _take_off(self, name: str, fd: int) -> None:
        libbpf.link_detach(fd)
        os.close(fd)
        if self._pins is not None:
            self._pins.remove(name)

    def detach(self, interface: str) -> None:
        """Watch `interface` no more, neither way. Raises AttachmentError where the kernel still runs the program."""
        for name in (f"link-{interface}", f"egress-{interface}"):
            attachment = self.attachments.pop(name, None)
            if self._pins is not None:
                self._pins.remove(name)
            if attachment is not None:
                attachment.detach()

    def detach_others(self) -> None:
        """An earlier process watched more than what is attached now: no longer."""
        if self._pins is None:
            return
        for name in sorted(set(self._pins.links()) - set(self.attachments)):
            logger.info("what an earlier process pinned as %s is taken off", name)
            fd = self._pins.get(name)
            if fd is not None:
                self._take_off(name, fd)

    # ---- the end ----

    def release(self) -> None:
        """Let go: what is pinned goes on, attached and counting; the rest is gone. Idempotent."""
        for attachment in self.attachments.values():
            attachment.release()
        self.attachments = {}
        for program in (self.program, self.retiring):
            if program is not None:
                program.release()
        if self._mapped is not None:
            self._mapped.close()
            self._mapped, self.journal = None, Journal()
        if self._pins is not None:
            self._pins.close()
            self._pins = None

    def remove(self) -> None:
        """Leave nothing: no program, map, link or pin. What was not handed on is lost. Idempotent."""
        for attachment in self.attachments.values():
            attachment.detach()
        self.attachments = {}
        if self._pins is not None:
            self.journal.write(replace(self.journal.books, generation=0, target=0))
            self._pins.clear()
        self.release()


def _number(map_fd: int) -> int:
    return int(syscall.info(map_fd, syscall.MapInfo).id)


def _shape(map_fd: int) -> tuple[int, int, int, int]:
    there = syscall.info(map_fd, syscall.MapInfo)
    return there.type, there.key_size, there.value_size, there.max_entries
