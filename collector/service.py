"""This process as a service of systemd's: whether it is ready, alive, stopping, as sd_notify(3) has it.

The protocol is a datagram of `NAME=value` lines to the socket in $NOTIFY_SOCKET. Without one nothing is told.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)


class Service:
    """What is told to the service manager; without one every call does nothing.

    beat_s    how often `alive` tells that we are; None: nobody watches (no WatchdogSec=). Half of what the manager
              waits, as sd_watchdog_enabled(3) asks

    `alive` belongs into the loop that does the work, so that it is silent where that hangs.
    """

    def __init__(
        self, environment: Mapping[str, str] = os.environ, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._socket = _connected(environment.get("NOTIFY_SOCKET", ""))
        self._told_s = float("-inf")
        watched = environment.get("WATCHDOG_USEC", "")
        # A child inherits the variables, and is not who is meant.
        mine = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.beat_s = int(watched) / 2e6 if watched.isdigit() and mine else None

    def ready(self, status: str) -> None:
        """What was asked for works; `status` says so in `systemctl status`."""
        self._tell(f"READY=1\nSTATUS={status}", wait=True)

    def status(self, text: str) -> None:
        """How it is, in a line."""
        self._tell(f"STATUS={text}")

    def alive(self) -> None:
        """The work goes on. May be called as often as you like."""
        now = self._clock()
        if self.beat_s is not None and now - self._told_s >= self.beat_s:
            self._told_s = now
            self._tell("WATCHDOG=1")

    def stopping(self) -> None:
        """It will end by itself, and is not watched meanwhile."""
        self._tell("STOPPING=1\nSTATUS=stopping")

    def _tell(self, message: str, *, wait: bool = False) -> None:
        """Where the manager is too busy to listen, only what it waits for is waited with."""
        if self._socket is None:
            return
        try:
            self._socket.send(message.encode(), 0 if wait else socket.MSG_DONTWAIT)
        except OSError as error:
            logger.debug("the service manager was not told %r: %s", message, error)


def _connected(address: str) -> socket.socket | None:
    if not address:
        return None
    if address[0] not in "/@":
        logger.warning("$NOTIFY_SOCKET is %r, which is no socket that we know (a path, or @ and a name)", address)
        return None
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        manager.connect("\0" + address[1:] if address[0] == "@" else address)
    except OSError as error:
        manager.close()
        logger.warning("the service manager cannot be told how we are: %s: %s", address, error.strerror)
        return None
    return manager
