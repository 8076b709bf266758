# SPDX-License-Identifier: GPL-2.0-only
"""Threads that sleep in the kernel, and processes of their own: what a case needs besides its own thread."""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from uffd_selftests import memory, syscalls
from uffd_selftests.common import (
    DEADLINE,
    DEFAULT_FLAGS,
    Fault,
    Pagemap,
    Removed,
    Skip,
    Uffd,
    eventually,
    expect,
    waiting_threads,
)
from uffd_selftests.machine import Sysctl
from uffd_selftests.mem_types import Area
from uffd_selftests.memory import Range
from uffd_selftests.native import lib
from uffd_selftests.uapi import PM_PRESENT, Feature, PagefaultFlag, RegisterMode

T = TypeVar("T")

NOBODY = 65534
"""User and group id without any privilege."""

WCHAN_SHOWN = os.path.exists("/proc/kallsyms")
"""Whether /proc/PID/wchan names the function in which a thread sleeps (CONFIG_KALLSYMS)."""


class Waiter:
    """A thread that makes one call which is expected to sleep in the kernel, in a ``with`` block.

    The call must release the interpreter's lock: everything in memory.py and every Uffd method does.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._result: object = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self.fault: Fault | None = None
        """The page fault that it sleeps in, where faulting() has read it."""

    def _main(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        """Whether the call has returned."""
        return not self._thread.is_alive()

    @property
    def tid(self) -> int:
        """The thread's id in the kernel."""
        return self._thread.native_id or 0

    def join(self, seconds: float) -> None:
        """Wait for the call, so long at most."""
        self._thread.join(seconds)

    def result(self) -> object:
        """Wait for the call and return its result, or raise what it raised."""
        self.join(DEADLINE)
        if self._thread.is_alive():
            raise AssertionError(f"the call did not return within {DEADLINE:g} seconds; it sleeps in {self.wchan}")
        if self._error is not None:
            raise self._error
        return self._result

    @property
    def state(self) -> str:
        """The state letter of /proc/PID/stat: R running, S or D asleep, T stopped; empty when it has ended."""
        try:
            return Path(f"/proc/self/task/{self.tid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""

    @property
    def asleep(self) -> bool:
        """Whether the thread sleeps in the kernel, other than for the interpreter's lock."""
        if not WCHAN_SHOWN:
            return self.state in ("S", "D")
        return self.wchan != "0" and "futex" not in self.wchan

    def expect_sleeping(self) -> None:
        """Wait until the thread sleeps in the kernel; AssertionError when it ends instead or runs on."""
        eventually(lambda: self.done or self.asleep, "the thread to sleep")
        if self.done:
            raise AssertionError("expected the thread to sleep; its call has returned")

    def expect_in_event(self) -> None:
        """Wait until the thread waits for its event to be read: fork, mremap, madvise or munmap."""

        def waits() -> bool:
            return "userfaultfd" in self.wchan if WCHAN_SHOWN else self.state == "D"

        eventually(lambda: self.done or waits(), "the thread to wait until its event is read")
        if self.done:
            raise AssertionError("expected the thread to wait until its event is read; its call has returned")

    @property
    def cpu_time(self) -> float:
        """Seconds that the thread has run; 0 when it has ended."""
        try:
            return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident or 0))
        except OSError:
            return 0.0

    def signal(self, number: int) -> None:
        """Send a signal to the thread itself."""
        signal.pthread_kill(self._thread.ident or 0, number)

    @property
    def wchan(self) -> str:
        """The kernel function in which the thread sleeps; "0" where it does not sleep, or not WCHAN_SHOWN."""
        try:
            return Path(f"/proc/self/task/{self.tid}/wchan").read_text()
        except OSError:
            return "0"

    def __enter__(self) -> Waiter:
        self._thread.start()
        waiting_threads.append(self._thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the thread may sleep for good; it is a daemon and goes with the process.
        if kind is None:
            self.result()


def settle(*waiters: Waiter) -> None:
    """Wait until the call of each thread has returned, or sleeps in the kernel."""
    eventually(lambda: all(waiter.done or waiter.asleep for waiter in waiters), "the calls to sleep or to return")


@contextmanager
def poised(*calls: Callable[[], object]) -> Iterator[tuple[Callable[[], None], list[Waiter]]]:
    """Have a thread for each call; the block gets what lets them make these calls, and the threads.

    Afterwards all calls have returned. A thread that is to meet a locked address space must be there before: to make
    one takes memory for its stack.
    """
    gate = threading.Event()

    def after_gate(call: Callable[[], object]) -> object:
        gate.wait()
        return call()

    def go() -> None:
        """Let all make their calls, and wait until each has returned or sleeps."""
        gate.set()
        settle(*waiters)

    with ExitStack() as stack:
        waiters = [stack.enter_context(Waiter(partial(after_gate, call))) for call in calls]
        try:
            yield go, waiters
        finally:
            gate.set()


LONG_FILL = 65536
"""Pages of zeroes, which take no memory: to map them takes milliseconds."""


@contextmanager
def long_fill(uffd: Uffd, where: Range | None = None, *, nice: int = 19) -> Iterator[Range]:
    """Have a thread map LONG_FILL zeroes, by default in a range of its own; nobody can change that mapping meanwhile.

    The block gets the range; it begins when the first page is there, and ends when all are. The thread lets all others
    go first, unless it is to be less ``nice`` because one of them does not sleep.
    """
    if where is None:
        flags = memory.MAP_PRIVATE | memory.MAP_ANONYMOUS | memory.MAP_NORESERVE
        with memory.mapped(LONG_FILL * memory.PAGE_SIZE, flags=flags) as own, long_fill(uffd, own, nice=nice):
            yield own
        return
    memory.keep_small(where)
    uffd.register(where, RegisterMode.MISSING)

    def fill() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        uffd.zeropage(where)

    with Waiter(fill) as filler:
        eventually(lambda: filler.done or bool(Pagemap.entry(where.start) & PM_PRESENT), "the first page")
        yield where


@contextmanager
def faulting(
    uffd: Uffd,
    address: int,
    *,
    write: bool = False,
    flags: PagefaultFlag | None = None,
    at: int | None = None,
    call: Callable[[], object] | None = None,
    read: bool = True,
) -> Iterator[Waiter]:
    """Have a thread fault at ``address``; the block runs while it sleeps, and leaving it waits for its end.

    By default the thread reads a byte there, which is its result, or with ``write`` stores a zero there, or where
    ``flags`` tell of a protected page makes a write access that changes nothing; ``call`` replaces that. The message is
    read, must carry ``flags`` and the address ``at`` (by default the start of the base page) and lands in
    ``waiter.fault``; with ``read`` false it is left in the queue.
    """
    if call is None:
        call = partial(memory.peek, address)
        if write and flags is not None and PagefaultFlag.WP in flags:
            call = partial(memory.touch, Range(address, 1), 1, write=True)
        elif write:
            # Not the access that changes nothing: an emulator may load first, and a load of a missing page faults.
            call = partial(memory.poke, address, b"\0")
    if flags is None:
        flags = PagefaultFlag.WRITE if write else PagefaultFlag(0)
    with Waiter(call) as waiter:
        _await_message(uffd, waiter, f"a page fault at {address:#x} with flags {flags}")
        if read:
            page = address - address % memory.PAGE_SIZE
            waiter.fault = uffd.wait_fault(page if at is None else at, flags)
        yield waiter


def _await_message(uffd: Uffd, waiter: Waiter, what: str) -> None:
    """Wait for a message that a call must cause; AssertionError also when the call ends without one."""
    end = time.monotonic() + DEADLINE
    while not uffd.readable(0.02):
        if time.monotonic() > end:
            raise AssertionError(f"expected {what}; nothing came within {DEADLINE:g} seconds")
        if waiter.done and not uffd.readable():
            try:
                waiter.result()
            except OSError as error:
                raise AssertionError(f"expected {what}; without one, the access failed: {error}") from None
            raise AssertionError(f"expected {what}; the access went through without one")


@contextmanager
def faulting_pages(uffd: Uffd, area: Area, *pages: int) -> Iterator[list[Waiter]]:
    """Have one thread a page read its first byte and sleep in the fault; the block gets the threads in that order."""
    with ExitStack() as stack:
        yield [stack.enter_context(faulting(uffd, area.page(page).start)) for page in pages]


@contextmanager
def handled(number: int, *, restart: bool = False) -> Iterator[list[int]]:
    """Have a handler that only notes the signal, in the list that the block gets; ``restart`` is SA_RESTART.

    The thread that the signal is sent to is interrupted; the note is made by the main thread, soon after.
    """
    notes: list[int] = []
    previous = signal.signal(number, lambda signo, _: notes.append(signo))
    signal.siginterrupt(number, not restart)
    try:
        yield notes
    finally:
        signal.signal(number, previous)


def undisturbed(uffd: Uffd, call: Callable[[], T]) -> T:
    """Make a call that may fault, but not in ``uffd``, and return its result; AssertionError when a message comes."""
    with Waiter(call) as waiter:
        eventually(lambda: waiter.done or uffd.readable(), "the call to return")
        uffd.expect_no_message()
        return cast(T, waiter.result())


@contextmanager
def unread_event(uffd: Uffd, where: Range) -> Iterator[None]:
    """Keep the handle waiting for its event to be read: a thread drops the range, with UFFD_FEATURE_EVENT_REMOVE.

    At the end of the block the event is read, and must be that one.
    """
    with Waiter(lambda: memory.advise(where, memory.Advice.DONTNEED)):
        if not uffd.readable(DEADLINE):
            raise AssertionError(f"expected UFFD_EVENT_REMOVE; nothing came within {DEADLINE:g} seconds")
        yield
        expect(uffd.read(), [Removed(where.start, where.end)], "the event")


class ChildError(AssertionError):
    """A child process failed; the text says how."""


class ChannelClosed(AssertionError):
    """The other end of a channel is gone."""


class Channel:
    """One end of a connection between two processes: objects (pickled), and file descriptors (SCM_RIGHTS)."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.settimeout(DEADLINE)

    def send(self, value: Any = None, *fds: int) -> None:
        """Send a value and any number of descriptors, which arrive as duplicates."""
        socket.send_fds(self._socket, [pickle.dumps(value)], fds)

    def receive(self) -> Any:
        """Receive the next value; AssertionError when none comes within the deadline or the other end has gone."""
        value, _ = self.receive_fds()
        return value

    def receive_fds(self) -> tuple[Any, list[int]]:
        """Receive the next value with its descriptors, which are close-on-exec."""
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 16, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise AssertionError(f"the other process sent nothing within {DEADLINE:g} seconds") from None
        if not data:
            raise ChannelClosed("the other process ended before it sent anything")
        return pickle.loads(data), fds

    def become_stdin(self) -> None:
        """Make this end the process's standard input, for a program that it is about to run."""
        self._socket.setblocking(True)
        os.dup2(self._socket.fileno(), 0)

    def close(self) -> None:
        """Close this end."""
        self._socket.close()


class Child:
    """A function run in a forked process, in a ``with`` block; leaving the block waits for it.

    The function is called with its end of ``channel``. fork(2) itself waits until the event is read where
    UFFD_FEATURE_EVENT_FORK is on, with the interpreter's lock held: have a FaultHandler running. The child dies with
    the process that forked it; when the block fails it is killed.
    """

    def __init__(self, target: Callable[[Channel], object]) -> None:
        self._target = target
        self.pid = 0
        self._pipe = -1

    def __enter__(self) -> Child:
        self._pipe, report = os.pipe2(os.O_CLOEXEC)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Python 3.12 warns of fork() beside threads: ours hold no lock that the child needs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            self._main(parent, report, Channel(theirs))
        os.close(report)
        theirs.close()
        self.channel = Channel(ours)
        return self

    def _main(self, parent: int, report: int, channel: Channel) -> None:
        status = 1
        try:
            lib.uffd_die_with_parent(parent)
            self._target(channel)
            status = 0
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            os.write(report, f"{error} (at {os.path.basename(last.filename)}:{last.lineno})".encode())
        finally:
            os._exit(status)

    def send(self, value: Any = None, *fds: int) -> None:
        """Send to the child."""
        self.channel.send(value, *fds)

    def receive(self) -> Any:
        """Receive from the child; ChildError with its own words when it failed instead."""
        return self.receive_fds()[0]

    def receive_fds(self) -> tuple[Any, list[int]]:
        """Receive from the child, with descriptors."""
        try:
            return self.channel.receive_fds()
        except AssertionError as error:
            if isinstance(error, ChannelClosed):  # who ends closes its files first, and is there for a moment more
                with suppress(AssertionError):
                    eventually(lambda: self.ended, "the child process to end")
            if self.ended:
                self.wait()
            raise

    def expect_in_event(self) -> None:
        """Wait until the child waits for its event to be read: fork, mremap, madvise or munmap."""

        def waits() -> bool:
            if WCHAN_SHOWN:
                return "userfaultfd" in Path(f"/proc/{self.pid}/wchan").read_text()
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"

        eventually(lambda: self.ended or waits(), "the child process to wait until its event is read")
        if self.ended:
            self.wait()
            raise AssertionError("expected the child process to wait until its event is read; it has ended")

    @property
    def ended(self) -> bool:
        """Whether the child has come to its end."""
        return self.pid <= 0 or os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> None:
        """Kill the child and wait for its end, whatever that was."""
        if self.pid > 0:
            os.kill(self.pid, signal.SIGKILL)
            self._reap()

    def _reap(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self.pid = -1
        os.close(self._pipe)
        self.channel.close()
        return status

    def wait_exec(self) -> None:
        """Wait until the child runs another program, its old memory gone; ChildError when it failed to."""
        if text := os.read(self._pipe, 65536):
            raise ChildError(f"in the child process: {text.decode(errors='replace')}")

    def wait(self) -> None:
        """Wait for the end of the child; ChildError when it failed or was killed."""
        if self.pid <= 0:
            return
        text = b""
        while part := os.read(self._pipe, 65536):
            text += part
        status = self._reap()
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            raise ChildError(f"the child process was killed by {name}")
        if status:
            raise ChildError(f"in the child process: {text.decode(errors='replace')}")

    def expect_end(self, *uffds: Uffd) -> None:
        """Wait for the end of the child, which must come without a message of these handles."""
        eventually(lambda: self.ended or any(uffd.readable() for uffd in uffds), "the child process to end")
        for uffd in uffds:
            uffd.expect_no_message()
        self.wait()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        else:
            self.kill()


@contextmanager
def monitored(
    where: Range,
    mode: RegisterMode,
    life: Callable[[Channel], object],
    features: Feature = Feature(0),
    flags: int = DEFAULT_FLAGS,
) -> Iterator[tuple[Child, Uffd]]:
    """Run ``life`` in a child process that has registered the range; the block has its handle, and nobody else.

    At the end of the block the child must come to its end by itself, without a message; then the handle is closed.
    """

    def target(channel: Channel) -> None:
        with Uffd.open(features, flags) as uffd:
            uffd.register(where, mode)
            channel.send(None, uffd.fd)
        life(channel)

    with Child(target) as child:
        _, (fd,) = child.receive_fds()
        with Uffd(fd, features) as uffd:
            yield child, uffd
            child.expect_end(uffd)


@contextmanager
def orphaned(
    where: Range, mode: RegisterMode, features: Feature = Feature(0), *, by_exec: bool = False
) -> Iterator[Uffd]:
    """Yield a handle whose address space is gone: a child registered the range there and has exited.

    Or the child lives on, ``by_exec``, and runs another program.
    """

    def target(channel: Channel) -> None:
        with Uffd.open(features) as uffd:
            uffd.register(where, mode)
            channel.send(None, uffd.fd)
        if by_exec:
            channel.become_stdin()
            os.execlp("cat", "cat")

    with Child(target) as child:
        _, (fd,) = child.receive_fds()
        with Uffd(fd) as uffd:
            if by_exec:
                child.wait_exec()
            else:
                child.wait()
            yield uffd
        child.kill()


@contextmanager
def out_of_descriptors() -> Iterator[None]:
    """Let this process open no further descriptor (RLIMIT_NOFILE)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- privileges, for a child that gives them up --------------------------------------------------------------------


def become_nobody() -> None:
    """Give up every privilege, for good; the process stays inspectable through its /proc files."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)


def drop_capability(name: str) -> None:
    """Take one capability ("cap_sys_ptrace") out of the effective, permitted and inheritable sets (capset(2))."""
    number = {"cap_sys_ptrace": 19, "cap_sys_admin": 21, "cap_ipc_lock": 14}[name]
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))  # _LINUX_CAPABILITY_VERSION_3, this process
    data = ctypes.create_string_buffer(24)
    syscalls.call("capget", ctypes.addressof(header), ctypes.addressof(data))
    words = list(struct.unpack("=6I", data.raw[:24]))
    for i in range(3):
        words[3 * (number // 32) + i] &= ~(1 << number % 32)
    data = ctypes.create_string_buffer(struct.pack("=6I", *words))
    syscalls.call("capset", ctypes.addressof(header), ctypes.addressof(data))


def enter_user_namespace() -> None:
    """Move this single-threaded process into a user namespace of its own, as its root, with every capability there."""
    uid, gid = os.geteuid(), os.getegid()
    syscalls.call("unshare", syscalls.CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def run_as(prepare: Callable[[], None], life: Callable[[], object]) -> None:
    """Run ``life`` in a child process that has prepared itself, by giving up privileges usually, and wait for its end.

    Skip where the preparation is not permitted.
    """

    def target(channel: Channel) -> None:
        try:
            prepare()
        except OSError as error:
            channel.send(str(error))
            return
        channel.send()
        life()

    with Child(target) as child:
        if reason := child.receive():
            raise Skip(f"{reason}: run as root, outside of a container")


def without_cap_sys_ptrace() -> None:
    """Give up CAP_SYS_PTRACE and keep the rest; for run_as()."""
    drop_capability("cap_sys_ptrace")


UNPRIVILEGED_USERFAULTFD = Path("/proc/sys/vm/unprivileged_userfaultfd")


@contextmanager
def unprivileged_userfaultfd(value: int) -> Iterator[None]:
    """Have vm.unprivileged_userfaultfd at this value, for all that use this function; Skip where that cannot be."""
    with ExitStack() as stack:
        try:
            stack.enter_context(Sysctl(UNPRIVILEGED_USERFAULTFD, value))
        except FileNotFoundError:
            raise Skip("no vm.unprivileged_userfaultfd (Linux 5.2)") from None
        except OSError:
            if UNPRIVILEGED_USERFAULTFD.read_text().strip() != str(value):
                raise Skip(f"vm.unprivileged_userfaultfd is not {value}: set it, or run as root") from None
        yield
