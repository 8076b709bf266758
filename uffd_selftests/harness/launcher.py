# SPDX-License-Identifier: GPL-2.0-only
"""An Isolator in a process of its own, which has nothing to do but to fork.

A fork makes the pages of both sides copy-on-write.  pytest writes to so many between two cases, if only by counting
references, that forking pytest itself costs several times what most cases do.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from multiprocessing import Pipe
from typing import TYPE_CHECKING

from uffd_selftests.harness import proc
from uffd_selftests.harness.isolation import Ending, How, Isolator, end_with, fork, kill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from multiprocessing.connection import Connection

    from uffd_selftests.harness.isolation import Child, Work

LATE_SECONDS = 60.0
"""How long after the deadline it may still look into what hung and kill it, before it is given up itself."""
OOM_KILL = "killed by SIGKILL"
"""What becomes of a process that waits when the kernel is short of memory: nobody's fault."""
CLOSE_SECONDS = 15.0
"""How long it may take to clear away what is running: longer than the Isolator tries."""


class Launcher:
    """Runs pieces of work that are known by a name, one after the other, as Isolator.run does."""

    def __init__(self, find: Callable[[str], Work], guarded: Iterable[int] = ()) -> None:
        """Start the process; find(name) is called in it and returns the work; nobody may write to guarded."""
        self._channel, theirs = Pipe()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = fork()
        if not self.pid:
            status = 1
            try:
                self._channel.close()
                _serve(theirs, find, [*guarded, theirs.fileno()], parent)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        self._answers = select.poll()
        self._answers.register(self._channel.fileno(), select.POLLIN)
        self.alive = True
        """False when it died on its own: it is of no use then."""

    def run(self, name: str, *, deadline: float, more: bool = False) -> Ending:
        """Run the work of this name and return how that ended; deadline is in seconds from now.

        With more, its process does the next work as well, if this one went well and has left it as it was.
        """
        started = time.monotonic()
        with contextlib.suppress(OSError, EOFError):
            self._channel.send((name, deadline, more))
            if self._answers.poll((deadline + LATE_SECONDS) * 1000):
                ending: Ending = self._channel.recv()
                return ending
        self.alive = False
        seconds = time.monotonic() - started
        what = "died" if seconds < deadline + LATE_SECONDS else "does not answer"
        return Ending(How.ERROR, f"the process that starts the cases {what}", [], [], [], seconds)

    def dismiss(self) -> None:
        """End the process that would do the next work, so that this gets a new one."""
        with contextlib.suppress(OSError):
            self._channel.send(None)

    def close(self) -> None:
        """End the process, and through it what it runs."""
        self._channel.close()
        if not kill(self.pid, time.monotonic() + CLOSE_SECONDS, signal.SIGTERM):
            kill(self.pid, time.monotonic() + CLOSE_SECONDS)


def _serve(channel: Connection, find: Callable[[str], Work], guarded: Iterable[int], parent: int) -> None:
    """Run what is asked for until nobody asks any more or SIGTERM comes."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, _leave)
    end_with(parent, signal.SIGTERM)  # not SIGKILL: what a case has started would be left behind
    isolator = Isolator()
    for fd in guarded:
        isolator.guard(fd)
    # Forking takes longer than most cases do.  The next child is made while one works, if there is a CPU for that and
    # the kernel says at once that it is the only child left behind.
    early = len(os.sched_getaffinity(0)) > 1 and proc.lists_children()
    resting: Child | None = None
    """The child that did the last work, if it can do more."""
    try:
        fresh = isolator.prepare(find)
        while True:
            order = channel.recv()
            if order is None:
                if resting:
                    isolator.end(resting)
                resting = None
                continue
            name, deadline, more = order
            child, forks = resting or fresh, not resting
            died = ""
            try:
                child.begin(name, deadline, may_rest=more)
            except BrokenPipeError:
                died = isolator.see_through(child, 0).reason
                child = isolator.prepare(find)
                child.begin(name, deadline, may_rest=more)
            if forks and early:
                fresh = isolator.prepare(find)
            ending = isolator.see_through(child, deadline)
            resting = child if ending.rests else None
            if died and died != OOM_KILL:
                ending.leftovers.append(f"the process of the results before was {died} while it waited")
            channel.send(ending)
            if forks and not early:
                fresh = isolator.prepare(find)
    except EOFError:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        isolator.close()


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(number)
