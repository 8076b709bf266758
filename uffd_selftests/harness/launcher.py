# SPDX-License-Identifier: GPL-2.0-only
"""An Isolator in a process of its own, which has nothing to do but to fork.

A fork copies the page tables of the whole process and makes its pages copy-on-write on both sides.  pytest has four
times the memory that a case needs, and writes to much of it between two cases, if only by counting references: forking
pytest itself costs several times what most cases do.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol

from uffd_selftests.harness import proc
from uffd_selftests.harness.channel import Channel, two_way
from uffd_selftests.harness.isolation import Ending, How, Isolator, end_with, fork, kill

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffd_selftests.harness.isolation import Child, Work

LATE_SECONDS = 60.0
"""How long after the deadline it may still look into what hung and kill it, before it is given up itself."""
OOM_KILL = "killed by SIGKILL"
"""What becomes of a process that waits when the kernel is short of memory: nobody's fault."""
CLOSE_SECONDS = 15.0
"""How long it may take to clear away what is running: longer than the Isolator tries."""


class Jobs(Protocol):
    """What a launcher does not know about the tasks that it is given, which are plain data."""

    def preload(self) -> None:
        """Load what all tasks need, while nobody has said anything yet."""

    def set_up(self, settings: object) -> None:
        """Get ready in the launcher's process, with what set_up was given."""

    def begin(self, task: object, *, early: bool) -> bool:
        """Do what is to be done before a task begins; early, when nobody has asked yet, return whether it may."""

    def find(self, task: object) -> Work:
        """Return the work of a task; called in the process that is to do it."""

    def get_ready(self, task: object) -> None:
        """Do what there is time for while a task runs, for what is forked next: for this task, or what comes then."""

    def end(self, task: object, ending: Ending) -> None:
        """Complete what is told of the end of a task."""


@dataclass(frozen=True)
class Order:
    """What a launcher is to run."""

    task: object
    deadline: float
    """In seconds from its begin."""
    apart: bool = False
    """The process of the order before does not do it, although it may wait for more."""
    more: bool = False
    """Its process waits for the next order, if this one went well and has left it as it was."""


class Launcher:
    """Runs tasks one after the other, as Isolator.run does."""

    def __init__(self, channel: Channel, pid: int) -> None:
        """Take over a process that serves the other end of a channel."""
        self.pid = pid
        self._channel = channel
        self._pidfd = os.pidfd_open(pid)
        self._answers = select.poll()
        self._answers.register(channel.fileno(), select.POLLIN)
        self.alive = True
        """False when it died on its own: it is of no use then."""

    @classmethod
    def start(cls, jobs: Jobs, guarded: Iterable[int] = ()) -> Launcher:
        """Start the process, as a child of this one; nobody in it or below it may write to guarded."""
        channel, theirs = two_way()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = fork()
        if not pid:
            channel.close()
            serve(theirs, jobs, guarded, parent)
        theirs.close()
        return cls(channel, pid)

    def set_up(self, settings: object) -> None:
        """Tell it once, before it runs anything, what Jobs.set_up is to know."""
        with contextlib.suppress(OSError):
            self._channel.send(settings)

    def run(self, order: Order, then: Order | None = None) -> Ending:
        """Run an order and return how that ended.

        Then is what comes next, if anything is to: it begins at once when the first has come to a good end (followed),
        and it is what this has to be called with next.
        """
        started = time.monotonic()
        with contextlib.suppress(OSError, EOFError):
            self._channel.send((order, then))
            if self._answers.poll((order.deadline + LATE_SECONDS) * 1000):
                ending: Ending = self._channel.receive()
                return ending
        self.alive = False
        seconds = time.monotonic() - started
        what = "died" if seconds < order.deadline + LATE_SECONDS else "does not answer"
        return Ending(How.ERROR, f"the process that starts the cases {what}", [], [], [], seconds)

    def dismiss(self) -> None:
        """End the process that would do the next work, or does it already, so that this gets a new one."""
        with contextlib.suppress(OSError):
            self._channel.send(None)

    def close(self) -> None:
        """End the process, and through it what it runs; once."""
        if self._pidfd < 0:
            return
        self._channel.close()
        if not kill(self.pid, time.monotonic() + CLOSE_SECONDS, signal.SIGTERM, pidfd=self._pidfd):
            kill(self.pid, time.monotonic() + CLOSE_SECONDS, pidfd=self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1


def serve(channel: Channel, jobs: Jobs, guarded: Iterable[int], parent: int) -> NoReturn:
    """Be a launcher, in a process that was forked for it by its parent, and end with it."""
    status = 1
    try:
        _Server(channel, jobs, [*guarded, *channel.descriptors], parent).serve()
        status = 0
    finally:
        os._exit(status)


class _Server:
    """What the launcher's process does."""

    def __init__(self, channel: Channel, jobs: Jobs, guarded: Iterable[int], parent: int) -> None:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, leave)
        end_with(parent, signal.SIGTERM)  # not SIGKILL: what a case has started would be left behind
        self._channel = channel
        self._jobs = jobs
        self._guarded = guarded
        # Forking takes longer than most cases do.  The next child is made while one works, if there is a CPU for that
        # and the kernel says at once that it is the only child left behind.
        self._early = len(os.sched_getaffinity(0)) > 1 and proc.lists_children()
        self._fresh: Child | None = None
        self._resting: Child | None = None
        """The child that did the last work, if it can do more."""
        self._working: Child | None = None
        self._died = ""
        """How the last resting child died, if it did."""

    def serve(self) -> None:
        """Run what is asked for until nobody asks any more or SIGTERM comes."""
        self._jobs.preload()
        try:
            self._jobs.set_up(self._channel.receive())
        except EOFError:
            return
        self._isolator = Isolator()
        for fd in self._guarded:
            self._isolator.guard(fd)
        try:
            while True:
                if not self._fresh:
                    self._fresh = self._isolator.prepare(self._jobs.find)
                orders = self._channel.receive()
                if isinstance(orders, tuple):
                    self._channel.send(self._run(*orders))
                else:
                    self._dismiss()
        except EOFError:
            pass
        finally:
            try:  # noqa: SIM105  # to make a suppress() would give it time to come before
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            except SystemExit:  # SIGTERM comes right behind the end of the channel
                pass
            self._isolator.close()

    def _run(self, order: Order, then: Order | None) -> Ending:
        if not self._working:
            self._jobs.begin(order.task, early=False)
            self._working = self._begin(order)
        child, self._working = self._working, None
        for task in (order.task, *([then.task] if then else [])):
            self._jobs.get_ready(task)
        if self._early and not self._fresh:
            self._fresh = self._isolator.prepare(self._jobs.find)
        ending = self._isolator.see_through(child, order.deadline)
        self._jobs.end(order.task, ending)
        if self._died and self._died != OOM_KILL:
            ending.leftovers.append(f"the process of the results before was {self._died} while it waited")
        self._resting = child if ending.rests else None
        if then and ending.how is How.DONE and not ending.leftovers and self._jobs.begin(then.task, early=True):
            self._working = self._begin(then)
            ending.followed = True
        return ending

    def _begin(self, order: Order) -> Child:
        self._died = ""
        if self._resting and order.apart:
            self._isolator.end(self._resting)
            self._resting = None
        child = self._resting or self._take_fresh()
        try:
            child.begin(order.task, order.deadline, may_rest=order.more)
        except BrokenPipeError:
            self._died = self._isolator.see_through(child, 0).reason
            child = self._take_fresh()
            child.begin(order.task, order.deadline, may_rest=order.more)
        self._resting = None
        return child

    def _take_fresh(self) -> Child:
        child, self._fresh = self._fresh or self._isolator.prepare(self._jobs.find), None
        return child

    def _dismiss(self) -> None:
        for child in (self._working, self._resting):
            if child:
                self._isolator.end(child)
        self._working = self._resting = None


def leave(number: int, _frame: object) -> NoReturn:
    """End in order because of a signal."""
    signal.signal(number, signal.SIG_IGN)  # nothing is to interrupt the clean-up
    raise SystemExit(number)
