# SPDX-License-Identifier: GPL-2.0-only
"""An Isolator in a process of its own, which has nothing to do but to fork, on the kernel under test.

A fork copies the page tables of the whole process and makes its pages copy-on-write on both sides.  pytest has four
times the memory that a case needs, and writes to much of it between two cases, if only by counting references: forking
pytest itself costs several times what most cases do.

What is said through the channel is plain data, so the launcher may as well stand on another machine:

    ["ask", name, arguments]       answered by ["answer", value] or ["failure", text]
    ["run", order, order or null]  answered by ["ending", ...]
    ["dismiss"]                    not answered

SIGTERM ends it, after ["farewell", what Jobs.close says].
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from uffd_selftests.harness import proc
from uffd_selftests.harness.channel import Channel, Nonsense, two_way
from uffd_selftests.harness.isolation import Ending, How, Isolator, end_with, fork, kill

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffd_selftests.harness.isolation import Child, Work

LATE_SECONDS = 60.0
"""How long after the deadline it may still look into what hung and kill it, before it is given up itself."""
ANSWER_SECONDS = 120.0
"""How long an answer may take."""
OOM_KILL = "killed by SIGKILL"
"""What becomes of a process that waits when the kernel is short of memory: nobody's fault."""
CLOSE_SECONDS = 15.0
"""How long it may take to clear away what is running: longer than the Isolator tries."""


class Jobs(Protocol):
    """What a launcher does not know about the tasks that it is given, which are plain data."""

    ready: bool
    """Whether tasks can be done now: what they need has been asked for."""
    fragile: bool
    """Whether a task can be the end of the machine, so that the one before has to be told of before it begins."""

    def preload(self) -> None:
        """Load what all tasks need, while nobody has said anything yet."""

    def answer(self, name: str, *arguments: Any) -> object:
        """Do what else can be asked for on this machine, and return plain data; raises OSError."""

    def begin(self, task: Any, *, early: bool) -> Ending | None:
        """Do what is to be done before a task begins; return why it cannot, or, when nobody has asked yet, may not."""

    def find(self, task: Any) -> Work:
        """Return the work of a task; called in the process that is to do it."""

    def get_ready(self, task: Any) -> None:
        """Do what there is time for while a task runs, for what is forked next: for this task, or what comes then."""

    def end(self, task: Any, ending: Ending) -> None:
        """Complete what is told of the end of a task."""

    def close(self) -> object:
        """Undo what was done on this machine; return plain data about it all."""


class Order(NamedTuple):
    """What a launcher is to run."""

    task: Any
    """Plain data."""
    deadline: float
    """In seconds from its begin."""
    apart: bool = False
    """The process of the order before does not do it, although it may wait for more."""
    more: bool = False
    """Its process waits for the next order, if this one went well and has left it as it was."""


class Launcher:
    """Runs tasks one after the other, as Isolator.run does."""

    name = ""
    """What results call the machine, where there are several."""
    patience = ANSWER_SECONDS

    def __init__(self, channel: Channel, pid: int) -> None:
        """Take over a process that serves the other end of a channel."""
        self.pid = pid
        self.alive = True
        """False when it died on its own: it is of no use then."""
        self._channel = channel
        self._pidfd = os.pidfd_open(pid)
        self._busy = False
        """Something was sent whose answer has not been read: an exception came in between."""

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

    def own_setting(self) -> dict[str, Any]:
        """Return what it alone is to be told when it is set up."""
        return {}

    def ask(self, name: str, *arguments: object) -> Any:
        """Return the answer of Jobs.answer; raises OSError with what failed there, EOFError when there is none."""
        if self._busy:  # and the answer would be that to what was asked before
            raise EOFError("an exception came in the middle of its work")
        until = time.monotonic() + self.patience
        self._busy = True
        try:
            self._channel.send(["ask", name, arguments], until)
            kind, value = self._channel.receive(until)
        except (OSError, EOFError, TypeError, ValueError) as error:
            self.alive = False
            raise EOFError(self.last_words(_what(error))) from None
        self._busy = False
        if kind == "failure":
            raise OSError(str(value))
        return value

    def run(self, order: Order, then: Order | None = None) -> Ending:
        """Run an order and return how that ended.

        Then is what comes next, if anything is to: it begins at once when the first has come to a good end (followed),
        and it is what this has to be called with next.
        """
        started = time.monotonic()
        until = started + order.deadline + LATE_SECONDS
        self._busy = True
        try:
            self._channel.send(["run", order, then], until)
            _, ending = self._channel.receive(until)
            self._busy = False
            return Ending.of(ending)
        except (OSError, EOFError, TypeError, ValueError) as error:
            what = _what(error)
        self.alive = False
        return self.obituary(what, order, time.monotonic() - started)

    def finish(self, seconds: float | None = None) -> Any:
        """Have the machine put back, and return what Jobs.close says; raises EOFError when nobody says it in time."""
        if not self._busy:
            self.patience = seconds or self.patience
            return self.ask("finish")
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)  # as the answer to what was asked may take long
        until = time.monotonic() + CLOSE_SECONDS
        try:
            while True:
                kind, *values = self._channel.receive(until)
                if kind == "farewell":
                    return values[0]
        except (OSError, TypeError, ValueError):
            raise EOFError from None

    def last_words(self, what: str) -> str:
        """Say what became of it."""
        return f"the process that starts the cases {what}"

    def obituary(self, what: str, order: Order, seconds: float) -> Ending:  # others say more
        """Return the ending of an order of which nobody tells any more."""
        return Ending(How.ERROR, self.last_words(what), [], [], [], seconds)

    def dismiss(self) -> None:
        """End the process that would do the next work, or does it already, so that this gets a new one."""
        with contextlib.suppress(OSError):
            self._channel.send(["dismiss"])

    def close(self) -> None:
        """End the process, and through it what it runs; once."""
        if self._pidfd < 0:
            return
        self._channel.close()
        self._end()
        os.close(self._pidfd)
        self._pidfd = -1

    def _end(self) -> None:
        if not kill(self.pid, time.monotonic() + CLOSE_SECONDS, signal.SIGTERM, pidfd=self._pidfd):
            kill(self.pid, time.monotonic() + CLOSE_SECONDS, pidfd=self._pidfd)


def _what(error: Exception) -> str:
    """Say what was wrong with an answer."""
    if isinstance(error, TimeoutError):
        return "does not answer"
    if isinstance(error, (Nonsense, TypeError, ValueError)):
        return f"sent nonsense: {error}"
    return "died"


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
        self._isolator: Isolator | None = None
        self._fresh: Child | None = None
        self._resting: Child | None = None
        """The child that did the last work, if it can do more."""
        self._working: Child | None = None
        self._died = ""
        """How the last resting child died, if it did."""

    def serve(self) -> None:
        """Do what is asked for until nobody asks any more or SIGTERM comes."""
        try:
            self._jobs.preload()
            while True:
                if self._jobs.ready and not self._fresh:
                    self._fresh = self._fork()
                kind, *arguments = self._channel.receive()
                if kind == "run":
                    self._run(*(order and Order(*order) for order in arguments))
                elif kind == "ask":
                    self._answer(*arguments)
                else:
                    self._dismiss()
        except (EOFError, SystemExit):
            pass
        finally:
            try:  # noqa: SIM105  # to make a suppress() would give it time to come before
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            except SystemExit:  # SIGTERM comes right behind the end of the channel
                pass
            if self._isolator:
                self._isolator.close()
            with contextlib.suppress(OSError):
                self._channel.send(["farewell", self._jobs.close()])

    def _answer(self, name: str, arguments: list[Any]) -> None:
        if self._fresh and self._isolator:
            self._isolator.end(self._fresh)  # what it inherited may not hold any more
            self._fresh = None
        try:
            self._channel.send(["answer", self._jobs.answer(name, *arguments)])
        except OSError as error:
            self._channel.send(["failure", f"{error.filename or name}: {error.strerror or error}"])

    def _fork(self) -> Child:
        if not self._isolator:
            self._isolator = Isolator()
            for fd in self._guarded:
                self._isolator.guard(fd)
        return self._isolator.prepare(self._jobs.find)

    def _run(self, order: Order, then: Order | None) -> None:
        """Run an order and tell its ending."""
        if not self._working:
            if refusal := self._jobs.begin(order.task, early=False):
                self._channel.send(["ending", refusal.to_plain()])
                return
            self._working = self._begin(order)
        child, self._working = self._working, None
        for task in (order.task, *([then.task] if then else [])):
            self._jobs.get_ready(task)
        if self._early and not self._fresh:
            self._fresh = self._fork()
        assert self._isolator
        ending = self._isolator.see_through(child, order.deadline)
        if self._died and self._died != OOM_KILL:
            ending.leftovers.append(f"the process of the results before was {self._died} while it waited")
        self._jobs.end(order.task, ending)
        self._resting = child if ending.rests else None
        if then and ending.how is How.DONE and not ending.leftovers and not ending.complaints:
            ending.followed = not self._jobs.begin(then.task, early=True)
        if then and ending.followed and not self._jobs.fragile:  # who is told may take this process's CPU
            self._working = self._begin(then)
        self._channel.send(["ending", ending.to_plain()])
        if then and ending.followed and self._jobs.fragile:
            self._working = self._begin(then)

    def _begin(self, order: Order) -> Child:
        assert self._isolator
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
        child, self._fresh = self._fresh or self._fork(), None
        return child

    def _dismiss(self) -> None:
        for child in (self._working, self._resting):
            if child and self._isolator:
                self._isolator.end(child)
        self._working = self._resting = None


def leave(number: int, _frame: object) -> NoReturn:
    """End in order because of a signal."""
    signal.signal(number, signal.SIG_IGN)  # nothing is to interrupt the clean-up
    raise SystemExit(number)
