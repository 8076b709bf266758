# SPDX-License-Identifier: GPL-2.0-only
"""An Isolator in a process of its own, which has nothing to do but to fork.

A fork makes the pages of both sides copy-on-write.  pytest writes to so many between two cases, if only by counting
references, that forking pytest itself costs several times what most cases do.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Any

from uffd_selftests.harness.isolation import Ending, How, Isolator, die_with, fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from uffd_selftests.harness.isolation import Work

LENGTH = struct.Struct("=Q")
"""Before each message."""

CLOSE_SECONDS = 15.0
"""How long it may take to clear away what is running: longer than the Isolator tries."""


class Launcher:
    """Runs pieces of work that are known by a name, one after the other, as Isolator.run does."""

    def __init__(self, find: Callable[[str], Work], guarded: Iterable[int] = ()) -> None:
        """Start the process; find(name) is called in it and returns the work; nobody may write to guarded."""
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = fork()
        if not self.pid:
            status = 1
            try:
                ours.close()
                _serve(theirs, find, [*guarded, theirs.fileno()], parent)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        self._socket = ours
        self.alive = True
        """False when it died on its own: it is of no use then."""

    def run(self, name: str, *, deadline: float) -> Ending:
        """Run the work of this name and return how that ended; deadline is in seconds from now."""
        started = time.monotonic()
        with contextlib.suppress(OSError):
            _send(self._socket, (name, deadline))
            ending = _receive(self._socket)
            if isinstance(ending, Ending):
                return ending
        self.alive = False
        seconds = time.monotonic() - started
        return Ending(How.ERROR, "the process that starts the cases died", [], [], [], seconds)

    def close(self) -> None:
        """End the process, and through it what it runs."""
        self._socket.close()
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(self.pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
                if not _wait(pidfd, CLOSE_SECONDS):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    _wait(pidfd, CLOSE_SECONDS)
            finally:
                os.close(pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)


def _serve(channel: socket.socket, find: Callable[[str], Work], guarded: Iterable[int], parent: int) -> None:
    """Run what is asked for until nobody asks any more or SIGTERM comes."""
    die_with(parent)
    signal.signal(signal.SIGTERM, _leave)
    isolator = Isolator()
    for fd in guarded:
        isolator.guard(fd)
    try:
        while (request := _receive(channel)) is not None:
            name, deadline = request
            _send(channel, isolator.run(find(name), deadline=deadline))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        isolator.close()


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(number)


def _send(channel: socket.socket, message: object) -> None:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    channel.sendall(LENGTH.pack(len(body)) + body)


def _receive(channel: socket.socket) -> Any:
    """Return the next message; None when there will be none."""
    header = _exactly(channel, LENGTH.size)
    body = _exactly(channel, *LENGTH.unpack(header)) if header else b""
    return pickle.loads(body) if body else None


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = channel.recv(min(size - len(data), 1 << 20))
        if not chunk:
            return b""
        data += chunk
    return bytes(data)


def _wait(pidfd: int, seconds: float) -> bool:
    """Wait until a process has ended; False when it does not in this time."""
    return bool(select.select([pidfd], [], [], seconds)[0])
