"""The interfaces of a sensor: watched, down, gone, and watched again when they return."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass

from flowsage.collector.errors import FlowsageError
from flowsage.collector.interface import driver_of, index_of, is_running, require_ethernet, vlan_offload
from flowsage.collector.lifetime import Attached, Lifetime
from flowsage.collector.xdp import EBPFAttachMode

logger = logging.getLogger(__name__)


@dataclass
class _Watched:
    """An interface: its index where we are attached (None: we are not), and whether it has its carrier."""

    name: str
    index: int | None = None
    running: bool = True
    complaint: str = ""


class Watch:
    """`interfaces`, all of them in the calling thread's network namespace, which run the programs of `lifetime`.

    `egress`: what leaves them is watched too. `lost` counts how often one went away or lost our program.
    """

    def __init__(
        self, lifetime: Lifetime, interfaces: tuple[str, ...], mode: EBPFAttachMode, *, replace: bool, egress: bool
    ) -> None:
        self._lifetime = lifetime
        self._mode, self._replace, self._egress = mode, replace, egress
        self._watched = [_Watched(name) for name in dict.fromkeys(interfaces)]
        self.lost = 0

    def check(self) -> None:
        """Raises InterfaceError for an interface that is missing or has no Ethernet header before its packets."""
        for watched in self._watched:
            require_ethernet(watched.name)

    def attach(self) -> None:
        """To all of them; a link that an earlier process left runs our program from now on. Raises InterfaceError."""
        for watched in self._watched:
            self._attach(watched)
        self._lifetime.detach_others()

    def _attach(self, watched: _Watched) -> None:
        attachment = self._lifetime.attach(watched.name, self._mode, replace=self._replace)
        if self._egress:
            self._lifetime.attach_egress(watched.name)
        again = watched.index == attachment.ifindex
        watched.index, watched.complaint = attachment.ifindex, ""
        if again:
            return
        both = ", both ways" if self._egress else ""
        logger.info("watching %s (%s mode%s)", watched.name, attachment.mode.value, both)
        if vlan_offload(watched.name) and driver_of(watched.name) != "veth":
            logger.warning(
                "%s takes VLAN tags off before they can be seen, so flows carry no VLAN; `ethtool -K %s rxvlan off` "
                "leaves them on",
                watched.name,
                watched.name,
            )

    def detach(self) -> None:
        """From all of them."""
        for watched in self._watched:
            self._detach(watched)

    def _detach(self, watched: _Watched) -> None:
        if watched.index is None:
            return
        watched.index = None
        try:
            self._lifetime.detach(watched.name)
        except FlowsageError as error:
            logger.warning("%s", error)

    def states(self) -> dict[str, str]:
        """State of each interface: "watched", "down" (attached, no carrier) or "missing"."""
        return {w.name: "missing" if w.index is None else "watched" if w.running else "down" for w in self._watched}

    def look_after(self) -> None:
        """Forget those that went, attach to those that are back, say which are down."""
        for watched in self._watched:
            index = index_of(watched.name)
            if watched.index is not None and index != watched.index:
                self._lose(watched, "is gone; it is watched again when it returns")
            elif watched.index is not None and not all(a.present() for a in self._attachments(watched.name)):
                self._lose(watched, "lost our program to somebody else; attaching it again")
            if watched.index is None and index is not None:
                self._attach_again(watched)
            running = index is not None and is_running(watched.name)
            if watched.index is not None and running != watched.running:
                logger.warning("interface %s is %s", watched.name, "up" if running else "down")
                watched.running = running

    def _attachments(self, interface: str) -> list[Attached]:
        return [a for a in self._lifetime.attachments.values() if a.interface == interface]

    def _lose(self, watched: _Watched, how: str) -> None:
        self.lost += 1
        logger.warning("interface %s %s", watched.name, how)
        self._detach(watched)

    def _attach_again(self, watched: _Watched) -> None:
        try:
            self._attach(watched)
        except FlowsageError as error:
            with suppress(FlowsageError):
                self._lifetime.detach(watched.name)
            if str(error) != watched.complaint:
                watched.complaint = str(error)
                logger.warning("interface %s is back and cannot be watched: %s", watched.name, error)
