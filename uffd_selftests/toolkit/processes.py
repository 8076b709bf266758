# SPDX-License-Identifier: GPL-2.0-only
"""Processes of their own: children, what they send, handles that outlive them."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from uffd_selftests.abi.native import lib
from uffd_selftests.abi.uapi import Feature, RegisterMode
from uffd_selftests.toolkit.expectations import DEADLINE, Skip, eventually
from uffd_selftests.toolkit.handle import DEFAULT_FLAGS, Uffd
from uffd_selftests.toolkit.memory import Range
from uffd_selftests.toolkit.threads import WCHAN_SHOWN

__all__ = ["ChildError", "ChannelClosed", "Channel", "Child", "monitored", "orphaned", "out_of_descriptors"]


SKIPPED = 77
"""The exit code of a child that found something missing."""


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
        except Skip as reason:
            os.write(report, str(reason).encode())
            status = SKIPPED
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
        if os.waitstatus_to_exitcode(status) == SKIPPED:
            raise Skip(text.decode(errors="replace"))
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
