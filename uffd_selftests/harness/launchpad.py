# SPDX-License-Identifier: GPL-2.0-only
"""Where xdist's workers get their launchers: from a process that was forked before pytest was loaded.

A worker is a process with pytest in it, and what it forked would have that, too. So it asks, through a Unix socket that
only this user's processes can use, for a process that is forked here, where what all cases need is loaded already.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from uffd_selftests.harness.channel import Channel
from uffd_selftests.harness.isolation import end_with, fork, kill
from uffd_selftests.harness.launcher import CLOSE_SECONDS, Launcher, leave, serve

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffd_selftests.harness.launcher import Jobs

PEER = struct.Struct("=iII")
"""struct ucred of SO_PEERCRED (unix(7)): process, user, group."""
ANSWER_SECONDS = 60.0
"""How long a launcher may take to be there before the worker does without."""


class Launchpad:
    """The process that starts launchers, for as long as a run lasts."""

    def __init__(self, jobs: Jobs, guarded: Iterable[int] = ()) -> None:
        """Start it; nobody below it may write to guarded."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        name = f"uffd-selftests-{os.getpid()}-{os.urandom(8).hex()}"
        listener.bind(f"\0{name}")  # abstract: there is no file that could be left behind
        listener.listen(1024)
        self.address = name
        """What connect() needs."""
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = fork()
        if not self.pid:
            try:
                _Server(listener, jobs, guarded, parent).run()
            finally:
                os._exit(1)
        listener.close()

    def close(self) -> None:
        """End the process, and all launchers that are still there; once."""
        if self.pid:
            kill(self.pid, time.monotonic() + 2 * CLOSE_SECONDS, signal.SIGTERM)
            self.pid = 0


def connect(address: str) -> Launcher | None:
    """Return a new launcher of the launchpad with this address; None when there is none to be had."""
    with contextlib.suppress(OSError, EOFError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(f"\0{address}")
        _, user, _ = PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
        if user == os.geteuid() and connection.recv(1, socket.MSG_PEEK):
            connection.setblocking(True)
            fd = connection.detach()
            channel = Channel(fd, fd)
            return Launcher(channel, channel.receive())
    return None


class _Server:
    """What the launchpad's process does."""

    def __init__(self, listener: socket.socket, jobs: Jobs, guarded: Iterable[int], parent: int) -> None:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, leave)
        end_with(parent, signal.SIGTERM)
        self._listener = listener
        self._jobs = jobs
        self._guarded = [*guarded, listener.fileno()]
        self._launchers: dict[int, int] = {}
        """The process ID of each launcher, by its pidfd."""
        self._workers: dict[int, int] = {}
        """The pidfd of its launcher, by that of each worker."""

    def run(self) -> None:
        """Start launchers until SIGTERM comes."""
        self._jobs.preload()
        try:
            while True:
                watched = [self._listener.fileno(), *self._launchers, *self._workers]
                for fd in select.select(watched, [], [])[0]:
                    if fd == self._listener.fileno():
                        self._welcome()
                    elif fd in self._workers:
                        self._end(self._workers.pop(fd))  # it may be waiting for a case
                        os.close(fd)
                    elif fd in self._launchers:
                        self._reap(fd)
        finally:
            for fd in list(self._launchers):
                self._end(fd)
            for fd in list(self._launchers):
                kill(self._launchers[fd], time.monotonic() + CLOSE_SECONDS)

    def _welcome(self) -> None:
        """Start a launcher for who has connected, if it is of this user."""
        connection, _ = self._listener.accept()
        with connection:
            worker, user, _ = PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
            try:
                pidfd = os.pidfd_open(worker)
            except OSError:  # it has ended meanwhile
                return
            if user != os.geteuid():
                os.close(pidfd)
                return
            parent = os.getpid()
            pid = fork()
            if not pid:
                self._be_launcher(connection.detach(), parent)
            launcher = os.pidfd_open(pid)
            self._launchers[launcher], self._workers[pidfd] = pid, launcher

    def _be_launcher(self, connection: int, parent: int) -> NoReturn:
        try:
            for fd in (*self._launchers, *self._workers):
                os.close(fd)
            channel = Channel(connection, connection)
            channel.send(os.getpid())
            serve(channel, self._jobs, self._guarded, parent)
        finally:
            os._exit(1)

    def _end(self, launcher: int) -> None:
        """Have a launcher clear away what it runs, and end."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(launcher, signal.SIGTERM)

    def _reap(self, launcher: int) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._launchers.pop(launcher), 0)
        for worker in [worker for worker, its in self._workers.items() if its == launcher]:
            os.close(worker)
            del self._workers[worker]
        os.close(launcher)
