# SPDX-License-Identifier: GPL-2.0-only
"""Operations that wait until their event has been read, and what the reader finds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from uffd_selftests.abi.errors import KernelError, errno_name
from uffd_selftests.abi.uapi import Feature, PagefaultFlag, RegisterMode
from uffd_selftests.mem_types import ANON
from uffd_selftests.toolkit.access import AccessError, peek
from uffd_selftests.toolkit.contents import expect_same
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import eventually, expect
from uffd_selftests.toolkit.faulting import faulting
from uffd_selftests.toolkit.handle import MINOR, MISSING, WP, Uffd
from uffd_selftests.toolkit.handler import Action, FaultHandler
from uffd_selftests.toolkit.memory import Range
from uffd_selftests.toolkit.messages import Forked, Message, Remapped, Removed, Unmapped
from uffd_selftests.toolkit.processes import Channel, Child, ChildError
from uffd_selftests.toolkit.threads import Waiter

__all__ = [
    "FORK",
    "REMAP",
    "REMOVE",
    "UNMAP",
    "removed",
    "unmapped",
    "moved",
    "await_event",
    "take_event",
    "announced",
    "await_child_event",
    "read_fork",
    "forked_child",
    "await_fault",
    "recorder",
    "outcome",
    "expect_killed",
    "expect_no_memory",
    "expect_contents",
    "expect_served",
    "modes_offered",
    "open_userfaultfds",
]

FORK = Feature.EVENT_FORK
REMAP = Feature.EVENT_REMAP
REMOVE = Feature.EVENT_REMOVE
UNMAP = Feature.EVENT_UNMAP


# ---- messages ------------------------------------------------------------------------------------------------------


def removed(where: Range) -> Removed:
    """The message for a range whose pages are about to go."""
    return Removed(where.start, where.end)


def unmapped(where: Range) -> Unmapped:
    """The message for a range that is gone."""
    return Unmapped(where.start, where.end)


def moved(where: Range, to: int, length: int | None = None) -> Remapped:
    """The message for a range that is elsewhere now; ``length`` where it is not that of the range."""
    return Remapped(where.start, to, where.len if length is None else length)


# ---- reading them --------------------------------------------------------------------------------------------------


def await_event(uffd: Uffd, waiter: Waiter, what: object = "its event") -> None:
    """Wait until the thread sleeps because its event, which is queued, has not been read."""
    eventually(lambda: waiter.done or uffd.readable(), "an event, or the end of the call")
    if not uffd.readable():
        waiter.result()
        raise AssertionError(f"expected the call to wait until {what} is read; it has returned, nothing is queued")
    waiter.expect_in_event()


def take_event(uffd: Uffd, waiter: Waiter, message: Message) -> None:
    """Wait until the thread sleeps because its event has not been read, and read it."""
    await_event(uffd, waiter, message)
    expect(uffd.read(), [message], "the event")


def announced(uffd: Uffd, call: Callable[[], object], *messages: Message) -> object:
    """Make a call that must wait until each of these messages is read, in this order, and return its result."""
    with Waiter(call) as waiter:
        for message in messages:
            take_event(uffd, waiter, message)
        result = waiter.result()
    uffd.expect_no_message()
    return result


def await_child_event(uffd: Uffd, child: Child) -> None:
    """Wait until the child process sleeps because its event, which is queued, has not been read."""
    eventually(lambda: child.ended or uffd.readable(), "an event, or the end of the child process")
    child.expect_in_event()
    expect(uffd.readable(), True, "POLLIN while the child process waits")


def read_fork(uffd: Uffd) -> Uffd:
    """Read the next message, which must be UFFD_EVENT_FORK, and return the handle that it brought."""
    message = uffd.wait("UFFD_EVENT_FORK")
    if not isinstance(message, Forked):
        raise AssertionError(f"expected UFFD_EVENT_FORK, got {message}")
    return Uffd(message.ufd, uffd.features)


@contextmanager
def forked_child(
    ctx: Context, life: Callable[[Channel], object], uffd: Uffd | None = None
) -> Iterator[tuple[Child, Uffd]]:
    """Fork this process, which is announced to the handle; the block has the child and its handle.

    ``life`` begins when the message has been read. At the end of the block the child must come to its end, without a
    further message to either handle.
    """
    uffd = uffd or ctx.uffd

    def later(channel: Channel) -> None:
        channel.receive()
        life(channel)

    with ExitStack() as stack:
        with recorder(ctx, uffd) as reader:
            child = stack.enter_context(Child(later))
            theirs = reader.only_child  # which is noted behind the message
            expect([type(message) for message in reader.messages], [Forked], "messages of the fork")
            child_uffd = stack.enter_context(Uffd(os.dup(theirs.fd), uffd.features))
        child.send()
        yield child, child_uffd
        child.expect_end(uffd, child_uffd)


def await_fault(uffd: Uffd, child: Child, where: Range | int, flags: PagefaultFlag = PagefaultFlag(0)) -> None:
    """Wait for a fault of a child process, and read it: the only one, with these flags.

    ChildError, with its own words, when the child fails instead.
    """
    eventually(lambda: child.ended or uffd.readable(), f"a fault with flags {flags}, or the end of the child process")
    if child.ended:
        child.wait()
        raise AssertionError(f"expected a fault with flags {flags}; the child process ended without")
    uffd.wait_fault(where, flags)
    uffd.expect_still_asleep(1)


def recorder(ctx: Context, uffd: Uffd) -> FaultHandler:
    """A thread that reads whatever comes and resolves nothing, so that nobody waits for an event to be read."""
    return FaultHandler(uffd, ctx.dst.range, ctx.page_size, missing=Action.RECORD)


# ---- what else happens ---------------------------------------------------------------------------------------------


def outcome(call: Callable[[], object]) -> object:
    """Make a call and return what it returned, or the name of the errno where it failed."""
    try:
        return call()
    except KernelError as error:
        return errno_name(error.errno or 0)


def expect_killed(uffd: Uffd, child: Child, number: signal.Signals) -> None:
    """Kill a child process that waits for its event to be read: it must die, and its message must be gone."""
    await_child_event(uffd, child)
    os.kill(child.pid, number)
    eventually(lambda: child.ended, f"the process to die of {number.name}")
    try:
        child.wait()
    except ChildError as error:
        expect(str(error), f"the child process was killed by {number.name}", "end of the process")
    uffd.expect_no_message()
    expect(uffd.readable(), False, "POLLIN after its death")


def expect_no_memory(where: Range) -> None:
    """Assert that nothing is mapped at the start of the range."""
    try:
        peek(where.start)
    except AccessError as error:
        expect(error.trap.signo, signal.SIGSEGV, f"the signal for an access at {where.start:#x}")
    else:
        raise AssertionError(f"expected nothing to be mapped at {where.start:#x}; it can be read")


def expect_contents(ctx: Context, where: Range, first: int = 0) -> None:
    """Assert that the range, wherever it is now, holds the destination's pattern from page ``first`` on."""
    page_zero = where.start - first * ctx.page_size
    ctx.dst.pattern.verify(page_zero, first, where.len // ctx.page_size, what="moved area")


def expect_served(ctx: Context, page: Range) -> None:
    """Assert that the page is missing, that its fault is announced, and that it can be filled."""
    with faulting(ctx.uffd, page.start):
        ctx.uffd.copy(page.start, ctx.src.start, page.len)
    expect_same(ctx.src.start, page.start, page.len, "the filled page")
    ctx.uffd.expect_no_message()


def modes_offered(ctx: Context) -> list[RegisterMode]:
    """Return modes in which the memory can be registered: each alone where it can be, and MISSING with WP."""
    offered = ctx.uffd.offered
    wp = Feature.PAGEFAULT_FLAG_WP if ctx.mem == ANON else Feature.WP_HUGETLBFS_SHMEM
    minor = Feature.MINOR_HUGETLBFS if ctx.mem.hugetlb else Feature.MINOR_SHMEM
    modes = [MISSING]
    modes += [WP, MISSING | WP] if wp in offered else []
    modes += [MINOR] if ctx.mem.shared and minor in offered else []
    return modes


def open_userfaultfds() -> set[int]:
    """Return the descriptors of this process that are userfaultfds."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[userfaultfd]":
                found.add(int(name))
        except FileNotFoundError:  # the descriptor that listed the directory
            pass
    return found
