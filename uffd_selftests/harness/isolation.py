# SPDX-License-Identifier: GPL-2.0-only
"""Run a piece of work in a child process that can hang, crash and misbehave as it likes.

The child reports through a pipe, record by record; the parent waits for its end with a deadline, kills it from outside
and clears away what it left.  Nothing here knows pytest.

Why a process and why SIGKILL: a fault on registered memory sleeps in the kernel until somebody resolves it and Python's
signal handlers never run meanwhile; while an event waits to be read, even SIGTERM can be put off
(fs/userfaultfd.c: handle_userfault, userfaultfd_event_wait_completion).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import math
import os
import select
import signal
import stat
import struct
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any, Protocol

from uffd_selftests.command.interrupts import ENDING
from uffd_selftests.harness import proc
from uffd_selftests.harness.channel import Channel, encode, one_way


class Send(Protocol):
    """Sends a record to the parent: at once, or else together with what is sent next."""

    def __call__(self, record: object, *, at_once: bool = True) -> None:
        """Send a record: plain data."""


Work = Callable[[Send], object]
"""Returns True when it went well, so that its process may do more."""
Order = tuple[Work, float, bool]
"""What a child is to do, the deadline in seconds, and whether the child may rest then until it is told to do more."""

PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36

KILL_SECONDS = 5.0
"""How long a killed process may take to vanish before it is given up and left behind."""
LOOK_SECONDS = 5.0
"""How long looking into a hung process may take: on a broken kernel even reading /proc can block."""
TRACEBACK_SHARE = 0.9
"""The child writes its Python stacks down when this share of the deadline has passed."""
MAX_TRACEBACK_LINES = 30
MAX_LINE = 200
MACHINERY = ("/_pytest/", "/pluggy/", "/xdist/", "/execnet/", "/uffd_selftests/harness/", "/uffd_selftests/cli.py")
"""Parts of the paths of what calls a case: the same in every stack."""
MAX_REPORT_BYTES = 64 << 20

HEADER = struct.Struct("=4sII")
"""Before each record: magic, length and CRC-32 of the JSON that follows."""
MAGIC = b"uffd"

_prctl = ctypes.CDLL(None).prctl


class How(Enum):
    """How a child came to its end."""

    DONE = auto()
    TIMEOUT = auto()
    ERROR = auto()


@dataclass
class Ending:
    """What is known when the child is gone."""

    how: How
    reason: str
    """"30 seconds" of a timeout; of an error a clause like "killed by SIGSEGV"; else empty."""
    records: list[object]
    """What the child sent, in this order; all of it when it is done."""
    evidence: list[str]
    """Lines that say where it hung or crashed."""
    leftovers: list[str]
    """The processes it left behind: when it is done, all, and they are killed; else those that could not be."""
    seconds: float
    rests: bool = False
    """Whether the child waits for more work: then what it would take along to its end may still show."""
    printed: list[tuple[str, str]] = field(default_factory=list)
    """Titles and texts of what was written to stdout and stderr, if somebody caught that."""
    complaints: list[str] = field(default_factory=list)
    """What the kernel said meanwhile that it should not have to say, if somebody listened."""
    followed: bool = False
    """Whether what comes next has begun already."""
    damaged: bool = False
    """Whether the kernel may not be as it was before."""
    died: bool = False
    """Whether the machine is gone on which this ran."""

    def to_plain(self) -> dict[str, Any]:
        """Return plain data, from which of() makes the same again."""
        return {name: value for name, value in vars(self).items() if value} | {"how": self.how.name}

    @classmethod
    def of(cls, plain: Any) -> Ending:
        """Return the ending that somebody tells who need not be trusted; raises ValueError when it is none."""
        try:
            empty: dict[str, Any] = {"reason": "", "records": [], "evidence": [], "leftovers": [], "seconds": 0.0}
            ending = cls(**{**empty, **plain, "how": How[plain["how"]]})
            ending.reason = str(ending.reason)
            ending.seconds = float(ending.seconds)
            ending.records = list(ending.records)
            for lines in (ending.evidence, ending.leftovers, ending.complaints):
                lines[:] = map(str, lines)
            ending.printed = [(str(title), str(text)) for title, text in ending.printed]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no ending: {error!r}") from None
        return ending


class _Tag(Enum):
    """What a record on the pipe means."""

    RECORD = auto()
    RAISED = auto()  # the work itself raised: the traceback
    ESCAPED = auto()  # a process that the work forked came back into the harness: its ID
    DONE = auto()
    RESTING = auto()  # done, and ready for more


class Isolator:
    """Runs work in child processes, one after the other; one for a session.

    While it is open, this process is the reaper of orphaned descendants (PR_SET_CHILD_SUBREAPER), so that not even a
    daemon can get away.
    """

    def __init__(self) -> None:
        self._spared = set(proc.children(os.getpid()))  # not ours: they were here before
        self._guarded = _talking_descriptors()
        self._own: dict[int, Child] = {}
        """Children that have not been seen through, by process ID."""
        _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        gc.freeze()  # a collection in a child would copy every page that holds an object's header

    def close(self) -> None:
        """Stop being the reaper, after having cleared away what an exception may have left in the middle of run."""
        for child in list(self._own.values()):
            self.end(child)
        self._clear_strays()
        _prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def guard(self, fd: int) -> None:
        """Keep children from writing to this descriptor."""
        self._guarded.append(fd)

    def spare(self, pid: int) -> None:
        """Take this process for none that a case left behind."""
        self._spared.add(pid)

    def run(self, work: Work, *, deadline: float) -> Ending:
        """Run work in a child process and return how that ended; whatever happens, the child is gone afterwards.

        work gets what sends a record to the parent.  The deadline is in seconds from now.  An exception here (Ctrl-C)
        ends the child, too.
        """
        self._spared.update(stray.pid for stray in self._strays())  # what came before is not left by this work
        return self.see_through(self._fork(lambda: (work, deadline, False)), deadline)

    def prepare(self, find: Callable[[object], Work]) -> Child:
        """Fork a child for work that will be known later; find is called in the child with what begin is told."""
        theirs, ours = one_way()

        def take() -> Order:
            ours.close()
            task, deadline, may_rest = theirs.receive()
            return find(task), deadline, may_rest

        child = self._fork(take)
        theirs.close()
        child.orders = ours
        return child

    def see_through(self, child: Child, deadline: float) -> Ending:
        """Wait until a child ends or rests, or end it at its deadline; return how that went."""
        started = child.begun
        leftovers: list[str] = []
        immortal: list[str] = []
        hang = None
        rests = False
        try:
            if not child.wait(started + deadline):
                hang = self._look(child.pid)
            records, problem = child.verdict()
            rests = child.rests and not problem and not self._strays()
        finally:
            if not rests:
                if not self.end(child):
                    immortal.append(f"process {child.pid} cannot be killed")
                for stray, died in self._clear_strays():
                    (leftovers if died else immortal).append(f"process {stray}" + ("" if died else " cannot be killed"))
        seconds = time.monotonic() - started
        if hang is not None:
            return Ending(How.TIMEOUT, f"{deadline:g} seconds", records, hang + child.traceback, immortal, seconds)
        if problem:
            return Ending(How.ERROR, problem, records, child.traceback, immortal, seconds)
        return Ending(How.DONE, "", records, [], leftovers + immortal, seconds, rests)

    def end(self, child: Child) -> bool:
        """Kill a child unless it has ended by itself, and release it; False when it does not die."""
        died = child.kill()
        if not died:
            self._spared.add(child.pid)
        child.close()
        del self._own[child.pid]
        return died

    def _fork(self, take: Callable[[], Order]) -> Child:
        """Fork a child, which calls take and does what that returns, again and again as long as it may rest."""
        reports, sink = os.pipe()  # both are close-on-exec
        notes = os.memfd_create("tracebacks")
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = fork()
        if not pid:
            os.close(reports)
            try:
                # One that has been closed since may have lent its number to the child's own descriptors.
                orders = [fd for child in self._own.values() if child.orders for fd in child.orders.descriptors]
                _settle(parent, {*self._guarded, *orders} - {sink, notes})
                faulthandler.enable(file=notes)
                before = None
                rests = True
                while rests:
                    work, deadline, may_rest = take()
                    faulthandler.dump_traceback_later(TRACEBACK_SHARE * deadline, file=notes)
                    if may_rest and not before:
                        before = proc.State()
                    rests = _perform(work, sink, notes, before if may_rest else None)
            finally:
                os._exit(0)
        os.close(sink)
        with contextlib.suppress(OSError):  # both sides do it, so that it holds from here on and from there on
            os.setpgid(pid, pid)
        self._own[pid] = Child(pid, reports, notes)
        return self._own[pid]

    def _look(self, pid: int) -> list[str]:
        """Say what a hung child and its family are doing; from a child of its own, for this can hang as well."""
        adopted = [stray.pid for stray in self._strays()]
        looker = self._fork(lambda: (lambda send: send(proc.describe(proc.family(pid, adopted))), LOOK_SECONDS, False))
        try:
            looker.wait(time.monotonic() + LOOK_SECONDS)
        finally:
            self.end(looker)
        records, _ = looker.verdict()
        for lines in records:
            if isinstance(lines, list):
                return lines
        return [f"reading /proc/{pid} did not come back within {LOOK_SECONDS:g} seconds"]

    def _strays(self) -> list[proc.Process]:
        """Return the children of this process that are neither its own nor to be spared."""
        if not self._own and not proc.has_children():  # which takes one system call
            return []
        return list(proc.children(os.getpid(), but=self._spared | self._own.keys()).values())

    def _clear_strays(self) -> list[tuple[proc.Process, bool]]:
        """Kill the orphans of a child that is gone, and theirs; return each, and whether it died."""
        found = []
        until = time.monotonic() + KILL_SECONDS
        while (strays := self._strays()) and time.monotonic() < until:  # they may fork faster than this can kill
            for stray in strays:
                died = kill(stray.pid, until)
                found.append((stray, died))
                if not died:
                    self._spared.add(stray.pid)
        return found


@dataclass
class Child:
    """The parent's view of a child process."""

    pid: int
    reports: int
    notes: int
    pidfd: int = field(init=False)
    received: bytearray = field(default_factory=bytearray)
    status: int | None = None
    """As of waitpid(2); None as long as it runs, and when this side killed it."""
    reaped: bool = False
    rests: bool = False
    """Whether it is done and waits for more."""
    orders: Channel | None = None
    """Where to tell it what to do, if it was prepared."""
    begun: float = field(default_factory=time.monotonic)
    """When it was told."""
    traceback: list[str] = field(default_factory=list)
    """What faulthandler wrote: the Python stacks at a crash or shortly before the deadline; known when closed."""

    def __post_init__(self) -> None:
        self.pidfd = os.pidfd_open(self.pid)
        os.set_blocking(self.reports, False)

    def begin(self, task: object, deadline: float, *, may_rest: bool = False) -> None:
        """Have it, prepared or resting, do the work of a task; raises BrokenPipeError when it has died."""
        assert self.orders
        self.received.clear()
        self.rests = False
        self.begun = time.monotonic()
        self.orders.send((task, deadline, may_rest))

    def wait(self, until: float) -> bool:
        """Take its records until it ends or rests (True) or time.monotonic() says until (False)."""
        poll = select.poll()
        poll.register(self.reports, select.POLLIN)
        poll.register(self.pidfd, select.POLLIN)
        while True:
            left = max(0.0, until - time.monotonic())
            ready = [fd for fd, _ in poll.poll(min(math.ceil(left * 1000), 1 << 30))]
            if not ready and not left:
                return False
            if self.reports in ready and not self._receive():
                poll.unregister(self.reports)
            if self.rests:
                return True
            if self.pidfd in ready:
                self._receive()
                _, self.status = os.waitpid(self.pid, 0)
                self.reaped = True
                return True

    def _receive(self) -> bool:
        """Take what is in the pipe; False when nothing more can come or a child gone mad has sent too much."""
        while len(self.received) < MAX_REPORT_BYTES:
            try:
                chunk = os.read(self.reports, 1 << 16)
            except BlockingIOError:
                self.rests = self.received.endswith(RESTING)
                return True
            if not chunk:
                break
            self.received += chunk
        return False

    def kill(self) -> bool:
        """Kill its process group unless it has ended by itself; False when it does not die."""
        if not self.reaped:  # else its process ID may be somebody else's by now
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)
            self.reaped = kill(self.pid, time.monotonic() + KILL_SECONDS)
        return self.reaped

    def verdict(self) -> tuple[list[object], str]:
        """Return its records and what went wrong with it, if anything."""
        messages, garbage = _unpack(self.received)
        by_tag: dict[_Tag, list[object]] = {tag: [] for tag in _Tag}
        for tag, payload in messages:
            by_tag[tag].append(payload)
        problem = ""
        if self.status is not None and os.WIFSIGNALED(self.status):
            problem = f"killed by {_signal_name(os.WTERMSIG(self.status))}"
        elif by_tag[_Tag.ESCAPED]:
            problem = f"process {by_tag[_Tag.ESCAPED][0]}, forked by the case, returned into the harness"
        elif garbage:
            problem = "something wrote into the pipe of the harness"
        elif by_tag[_Tag.RAISED]:
            problem = str(by_tag[_Tag.RAISED][0])
        elif not by_tag[_Tag.DONE] and not by_tag[_Tag.RESTING]:
            problem = f"exited with status {os.waitstatus_to_exitcode(self.status or 0)} before its reports"
        return by_tag[_Tag.RECORD], problem

    def close(self) -> None:
        """Release the descriptors."""
        self.traceback = _traceback_lines(os.pread(self.notes, 1 << 16, 0))
        for fd in (self.reports, self.notes, self.pidfd):
            os.close(fd)
        if self.orders:
            self.orders.close()


def fork() -> int:
    """Fork as os.fork does, without its warning.

    A signal that ends a run waits until it is over: what a handler raises while os.fork() calls what modules have
    registered with it (logging's locks) is printed and forgotten. And the child has none of this process's handlers:
    what they raise would have it go on as if it were this process.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        pid = _fork_quietly()
        if not pid:
            for number in ENDING:
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _fork_quietly() -> int:
    if sys.version_info < (3, 12):
        return os.fork()
    with warnings.catch_warnings():
        # xdist's workers have a second thread, which holds no lock that the child needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def end_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent has died."""
    _prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above took effect
        os._exit(1)


def _settle(parent: int, guarded: Iterable[int]) -> None:
    """Make this process, a fresh child, one that dies with its parent and disturbs nobody."""
    os.setpgid(0, 0)
    end_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    gc.disable()
    _offer_to_oom_killer()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in guarded:
        os.dup2(null, fd, inheritable=False)
    os.close(null)


def _perform(work: Work, sink: int, notes: int, before: proc.State | None) -> bool:
    """Do the work in the child and send what comes of it; return whether the child can do more.

    That is when all went well and has left the process as it was before, if it is to be compared with that.
    """
    send = _sender(sink)
    last, payload = _Tag.DONE, ""
    try:
        if work(partial(send, _Tag.RECORD)) is True and before and before.lasts():
            last = _Tag.RESTING
    except BaseException as error:
        stack = reversed(traceback.extract_tb(error.__traceback__))
        os.write(notes, "".join(f'  File "{at.filename}", line {at.lineno} in {at.name}\n' for at in stack).encode())
        last, payload = _Tag.RAISED, f"{type(error).__name__} left the case: {error}"
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if last is _Tag.RESTING:  # what was noted belongs to this work, not to the next
        faulthandler.cancel_dump_traceback_later()
        os.ftruncate(notes, 0)
        os.lseek(notes, 0, os.SEEK_SET)
    send(last, payload)
    return last is _Tag.RESTING


def _offer_to_oom_killer() -> None:
    """Let the kernel, if memory runs out, kill this process instead of the harness (proc(5))."""
    with contextlib.suppress(OSError):
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, b"1000")
        os.close(fd)


def _sender(sink: int) -> Callable[..., None]:
    """Return the function that writes records for this process, and for this process only."""
    owner = os.getpid()
    waiting = bytearray()

    def send(tag: _Tag, payload: object, *, at_once: bool = True) -> None:
        pid = os.getpid()
        if pid != owner:
            # A process that the case forked fell out of the case and now walks through the harness's code.
            _write(sink, _pack(_Tag.ESCAPED, pid))
            os._exit(1)
        waiting.extend(_pack(tag, payload))
        if at_once:  # each record wakes the parent
            _write(sink, bytes(waiting))
            waiting.clear()

    return send


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _pack(tag: _Tag, payload: object) -> bytes:
    body = encode([tag.value, payload]).encode()
    return HEADER.pack(MAGIC, len(body), zlib.crc32(body)) + body


RESTING = _pack(_Tag.RESTING, "")
"""The end of what a child sends that will rest."""


def _unpack(data: bytes | bytearray) -> tuple[list[tuple[_Tag, object]], bool]:
    """Return the records at the start of data, and whether something else follows them."""
    messages = []
    rest = memoryview(data)
    while len(rest) >= HEADER.size:
        magic, length, checksum = HEADER.unpack_from(rest)
        body = rest[HEADER.size : HEADER.size + length]
        if magic != MAGIC or len(body) != length or zlib.crc32(body) != checksum:
            break
        tag, payload = json.loads(bytes(body))
        messages.append((_Tag(tag), payload))
        rest = rest[HEADER.size + length :]
    return messages, len(rest) > 0


def kill(pid: int, until: float, number: int = signal.SIGKILL, *, pidfd: int | None = None) -> bool:
    """Send a signal to a process, and reap it if it is a child of this one; False when it does not die in time.

    With the pidfd of one that is none, whose ID may be somebody else's by now.
    """
    if pidfd is None:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return True
        try:
            return kill(pid, until, number, pidfd=pidfd)
        finally:
            os.close(pidfd)
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(pidfd, number)
    if not select.select([pidfd], [], [], max(0, until - time.monotonic()))[0]:
        return False
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    return True


def _talking_descriptors() -> list[int]:
    """Return the open descriptors above stderr that somebody else listens to: pipes, sockets, terminals."""
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the one with which the folder was read
            mode = os.fstat(fd).st_mode
            if fd > 2 and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)):
                found.append(fd)
    return found


def _traceback_lines(text: bytes) -> list[str]:
    """Return what faulthandler wrote without what is the same for every case: who called it, what is loaded."""
    lines: list[str] = []
    stack: list[str] = []
    for line in [*text.decode(errors="replace").splitlines(), ""]:
        if line.startswith("  File"):
            stack.append(line)
            continue
        lines += _above_machinery(stack)
        stack = []
        if line.startswith("Timeout ("):
            lines.append("Python stacks shortly before the deadline:")
        elif line and not line.startswith("Extension modules:"):
            lines.append(line)
    return [line[:MAX_LINE] for line in lines[:MAX_TRACEBACK_LINES]]


def _above_machinery(stack: list[str]) -> list[str]:
    """Return the frames of the case from a stack, innermost first; all when none is the case's."""
    is_case = [not any(part in line for part in MACHINERY) for line in stack]
    if True not in is_case:
        return stack
    first = is_case.index(True)
    last = is_case.index(False, first) if False in is_case[first:] else len(stack)
    return stack[first:last]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
