# SPDX-License-Identifier: GPL-2.0-only
"""poll(2), select(2), epoll(7): when a userfaultfd is readable, and when that cannot be said."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from errno import ENOSYS
from functools import partial
from select import EPOLLET, POLLERR, POLLIN, POLLNVAL, POLLOUT, POLLPRI, POLLRDNORM

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, DEADLINE, DEFAULT_FLAGS, HUGETLB, MINOR, MINOR_FAULTS, MISSING, SHMEM, UNREGISTERED, WP, WRITEPROTECT,
    Channel, Child, Context, Feature, KernelError, Skip, Uffd, Waiter, eventually, expect, expect_modes, faulting,
    orphaned, peek, poke, promise, syscalls, unread_event,
)  # fmt: skip

BLOCKING = DEFAULT_FLAGS & ~os.O_NONBLOCK

# EPOLLIN and its like have the values of POLLIN and its like.
_NAMES = {POLLIN: "POLLIN", POLLOUT: "POLLOUT", POLLPRI: "POLLPRI", POLLERR: "POLLERR", POLLNVAL: "POLLNVAL"}
_NAMES |= {select.POLLHUP: "POLLHUP", POLLRDNORM: "POLLRDNORM"}
_ASKED = POLLIN | POLLOUT | POLLPRI


def named(events: int) -> str:
    """Return the names of poll(2)'s event bits."""
    known = [name for bit, name in _NAMES.items() if events & bit]
    rest = events & ~sum(_NAMES)
    return "|".join(known + ([hex(rest)] if rest else [])) or "0"


def by_poll(uffd: Uffd, timeout: float | None, asked: int = _ASKED) -> int:
    """poll(2); returns revents, 0 when the timeout (in seconds; None: never) passed."""
    poller = select.poll()
    poller.register(uffd.fd, asked)
    return sum(events for _, events in poller.poll(None if timeout is None else timeout * 1000))


def by_epoll(uffd: Uffd, timeout: float | None, asked: int = _ASKED) -> int:
    """epoll_wait(2), level triggered."""
    with select.epoll() as epoll:
        epoll.register(uffd.fd, asked)
        return sum(events for _, events in epoll.poll(timeout))


def by_select(uffd: Uffd, timeout: float | None, asked: int = _ASKED) -> int:
    """select(2); readable, writable and exceptional count as POLLIN, POLLOUT and POLLPRI."""
    events = (POLLIN, POLLOUT, POLLPRI)
    readable, writable, exceptional = ([uffd] if asked & event else [] for event in events)
    sets = select.select(readable, writable, exceptional, timeout)
    return sum(event for event, ready in zip(events, sets, strict=True) if ready)


WAYS: dict[str, Callable[[Uffd, float | None, int], int]] = {"poll": by_poll, "epoll": by_epoll, "select": by_select}


def expect_events(row: str, uffd: Uffd, expected: int, when: str) -> None:
    """Assert what poll, epoll and select say at once; an error counts as readable and writable for select."""
    for way, ask in WAYS.items():
        wanted = POLLIN | POLLOUT if way == "select" and expected & POLLERR else expected
        with promise(row, f"{way}, {when}"):
            expect(named(ask(uffd, 0, _ASKED)), named(wanted), "events")


@contextmanager
def sleeping_in(way: str, uffd: Uffd) -> Iterator[Waiter]:
    """Have a thread sleep in poll, epoll or select until POLLIN wakes it; its result is what it was told.

    Without a timeout: at its end the kernel would look once more, and nobody would miss the wake-up.
    """
    with Waiter(lambda: named(WAYS[way](uffd, None, POLLIN))) as sleeper:
        sleeper.expect_sleeping()
        yield sleeper


# ---- no answer -----------------------------------------------------------------------------------------------------


@uffd_case("poll-before-api", rows=("PL-01",))
def test_poll_before_api() -> None:
    """Before UFFDIO_API a userfaultfd is in error for poll, epoll and select."""
    for flags in (DEFAULT_FLAGS, BLOCKING):
        with Uffd.create(flags) as uffd:
            expect_events("PL-01", uffd, POLLERR, f"flags {flags:#x}")
            with promise("PL-01", "nothing asked for"):
                expect(named(by_poll(uffd, 0, 0)), "POLLERR", "events")


@uffd_case("poll-blocking", mem=ALL, pages=1, rows=("PL-02",))
def test_poll_blocking(ctx: Context) -> None:
    """Without O_NONBLOCK a userfaultfd is in error for poll, epoll and select, with a message pending or not."""
    with Uffd.open(flags=BLOCKING) as uffd:
        expect_events("PL-02", uffd, POLLERR, "nothing pending")
        uffd.register(ctx.dst.range, MISSING)
        with Waiter(lambda: peek(ctx.dst.start)):
            eventually(lambda: uffd.fdinfo.pending == 1, "an unread fault")
            expect_events("PL-02", uffd, POLLERR, "a fault pending")
            fcntl.fcntl(uffd.fd, fcntl.F_SETFL, os.O_NONBLOCK)
            expect_events("PL-02", uffd, POLLIN, "a fault pending, O_NONBLOCK set meanwhile")
            fcntl.fcntl(uffd.fd, fcntl.F_SETFL, 0)
            expect_events("PL-02", uffd, POLLERR, "a fault pending, O_NONBLOCK taken away")
            uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


# ---- readable ------------------------------------------------------------------------------------------------------


@uffd_case("poll-idle", mem=(ANON,), pages=1, rows=("PL-03",))
def test_poll_idle(ctx: Context) -> None:
    """With O_NONBLOCK and nothing pending a userfaultfd is neither readable nor writable nor in error."""
    expect_events("PL-03", ctx.uffd, 0, "nothing registered")
    ctx.uffd.register(ctx.dst.range, MISSING)
    expect_events("PL-03", ctx.uffd, 0, "nobody faulted")


@uffd_case("poll-fault", mem=ALL, pages=3, rows=("PL-04", "PL-05"))
def test_poll_fault(ctx: Context) -> None:
    """A fault makes a userfaultfd readable, and wakes who waits for that, until its message is read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for number, way in enumerate(WAYS):
        address = ctx.dst.page(number).start
        with sleeping_in(way, ctx.uffd) as sleeper, faulting(ctx.uffd, address, read=False):
            with promise("PL-04", f"asleep in {way} when a fault comes"):
                expect(sleeper.result(), "POLLIN", "events")
            expect_events("PL-04", ctx.uffd, POLLIN, "the fault not read")
            expect_events("PL-04", ctx.uffd, POLLIN, "the fault still not read")
            ctx.uffd.wait_fault(address)
            expect_events("PL-05", ctx.uffd, 0, "the fault read, not resolved")
            ctx.uffd.copy(address, ctx.src.start, ctx.page_size)
        expect_events("PL-05", ctx.uffd, 0, "the fault resolved")


@uffd_case("poll-fault-minor", mem=(SHMEM, HUGETLB), features=MINOR_FAULTS, pages=1, rows=("PL-04",))
def test_poll_fault_minor(ctx: Context) -> None:
    """A minor fault wakes who waits for a userfaultfd to be readable."""
    ctx.dst.pattern.fill(ctx.dst.alias.start, 0, 1)
    ctx.uffd.register(ctx.dst.range, MINOR)
    with sleeping_in("poll", ctx.uffd) as sleeper, Waiter(lambda: peek(ctx.dst.start)):
        expect(sleeper.result(), "POLLIN", "events")
        ctx.uffd.continue_(ctx.dst.range)


@uffd_case("poll-fault-wp", mem=ALL, features=WRITEPROTECT, pages=1, rows=("PL-04",))
def test_poll_fault_wp(ctx: Context) -> None:
    """A write to a protected page wakes who waits for a userfaultfd to be readable."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    with sleeping_in("poll", ctx.uffd) as sleeper, Waiter(lambda: poke(ctx.dst.start, b"x")):
        expect(sleeper.result(), "POLLIN", "events")
        ctx.uffd.unprotect(ctx.dst.range)


@uffd_case("poll-event", mem=ALL, features=Feature.EVENT_REMOVE, pages=1, rows=("PL-04",))
def test_poll_event(ctx: Context) -> None:
    """An event makes a userfaultfd readable, and wakes who waits for that, until it is read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for way in WAYS:
        with sleeping_in(way, ctx.uffd) as sleeper, unread_event(ctx.uffd, ctx.dst.range):
            with promise("PL-04", f"asleep in {way} when an event comes"):
                expect(sleeper.result(), "POLLIN", "events")
            expect_events("PL-04", ctx.uffd, POLLIN, "the event not read")
            expect_events("PL-04", ctx.uffd, POLLIN, "the event still not read")
        expect_events("PL-04", ctx.uffd, 0, "the event read")


@uffd_case("poll-second-fault", mem=(ANON,), pages=2, rows=("PL-04",))
def test_poll_second_fault(ctx: Context) -> None:
    """A userfaultfd stays readable until the last of several messages is read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start, read=False), Waiter(lambda: peek(ctx.dst.page(1).start)):
        eventually(lambda: ctx.uffd.fdinfo.pending == 2, "two unread faults")
        for unread in (1, 0):
            expect(len(ctx.uffd.read()), 1, "messages of one read")
            expect_events("PL-04", ctx.uffd, POLLIN if unread else 0, f"{unread} faults not read")
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.dst.range.len)


@uffd_case("poll-resolved", mem=ALL, pages=1, rows=("PL-06",))
def test_poll_resolved(ctx: Context) -> None:
    """A userfaultfd that was readable is not any more when the fault is resolved before it was read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start, read=False):
        expect_events("PL-06", ctx.uffd, POLLIN, "the fault not resolved")
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
        expect_events("PL-06", ctx.uffd, 0, "the fault resolved")
        with promise("PL-06"):
            ctx.uffd.expect_no_message()


# ---- further ways to ask -------------------------------------------------------------------------------------------


@uffd_case("poll-edge", mem=(ANON,), pages=3, rows=("PL-07",), kind=Kind.DETAIL)
def test_poll_edge(ctx: Context) -> None:
    """With EPOLLET each fault is told once, though none of them is read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with select.epoll() as epoll, ExitStack() as stack:
        epoll.register(ctx.uffd.fd, _ASKED | EPOLLET)
        for number in range(3):
            with promise("PL-07", f"fault {number}"):
                expect(epoll.poll(0), [], "events before it")
                stack.enter_context(Waiter(partial(peek, ctx.dst.page(number).start)))
                expect(epoll.poll(DEADLINE), [(ctx.uffd.fd, POLLIN)], "events")
        expect(epoll.poll(0), [], "events after the last fault")
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.dst.range.len)


NO_RDNORM = Defect(
    id="D-PL-08",
    summary="poll(2) for POLLRDNORM alone is never answered: the kernel reports POLLIN without it.",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="Ask for POLLIN.",
    shows=r"for POLLRDNORM: expected POLLRDNORM, got 0",
)


@uffd_case("poll-rdnorm", mem=(ANON,), pages=1, rows=("PL-08",), defect=NO_RDNORM)
def test_poll_rdnorm(ctx: Context) -> None:
    """A readable userfaultfd answers POLLRDNORM as it answers POLLIN."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start, read=False):
        events = by_poll(ctx.uffd, 0, POLLRDNORM)
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
    expect(named(events), "POLLRDNORM", "events of poll(2) for POLLRDNORM")


IOCB_CMD_POLL = 5


@contextmanager
def polled_by_aio(uffd: Uffd) -> Iterator[Callable[[], str]]:
    """Submit IOCB_CMD_POLL (io_submit(2)); yields a function that waits for its completion and names the events."""
    context = ctypes.c_uint64(0)
    try:
        syscalls.call("io_setup", 1, ctypes.addressof(context))
    except KernelError as error:
        if error.errno != ENOSYS:
            raise
        raise Skip("io_setup(2): ENOSYS: boot a kernel with CONFIG_AIO") from None
    try:
        request = struct.pack("=QIiHhIQQqQII", 0, 0, 0, IOCB_CMD_POLL, 0, uffd.fd, _ASKED, 0, 0, 0, 0, 0)
        buffer = ctypes.create_string_buffer(request, len(request))
        pointers = ctypes.c_uint64(ctypes.addressof(buffer))
        expect(syscalls.call("io_submit", context.value, 1, ctypes.addressof(pointers)), 1, "requests submitted")

        def complete() -> str:
            event, timeout = (ctypes.c_int64 * 4)(), (ctypes.c_int64 * 2)(int(DEADLINE), 0)
            addresses = ctypes.addressof(event), ctypes.addressof(timeout)
            expect(syscalls.call("io_getevents", context.value, 1, 1, *addresses), 1, "requests completed")
            return named(event[2])

        yield complete
    finally:
        syscalls.call("io_destroy", context.value)


@uffd_case("poll-aio", mem=(ANON,), pages=2, rows=("PL-09",), kind=Kind.DETAIL)
def test_poll_aio(ctx: Context) -> None:
    """IOCB_CMD_POLL completes with POLLIN when a fault comes, and at once when one is there."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with polled_by_aio(ctx.uffd) as early, faulting(ctx.uffd, ctx.dst.start, read=False):
        with promise("PL-09", "the fault comes later"):
            expect(early(), "POLLIN", "events")
        with promise("PL-09", "the fault is there"), polled_by_aio(ctx.uffd) as late:
            expect(late(), "POLLIN", "events")
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


# ---- the end -------------------------------------------------------------------------------------------------------


@uffd_case("poll-holds", mem=(ANON,), pages=1, rows=("PL-10",), kind=Kind.DETAIL)
def test_poll_holds(ctx: Context) -> None:
    """A userfaultfd that is closed while a thread sleeps in poll lives on until the poll ends, with POLLNVAL."""
    uffd, fd = ctx.uffd, ctx.uffd.fd
    uffd.register(ctx.dst.range, MISSING)
    end, other_end = os.pipe()
    poller = select.poll()
    poller.register(fd, _ASKED)
    poller.register(end, POLLIN)
    with faulting(uffd, ctx.dst.start) as faulter, Waiter(lambda: poller.poll(DEADLINE * 1000)) as sleeper:
        sleeper.expect_sleeping()
        uffd.close()
        expect_modes(ctx.dst.range, MISSING)
        for thread in (faulter, sleeper):
            thread.expect_sleeping()
        os.write(other_end, b"x")
        expect(sleeper.result(), [(fd, POLLNVAL), (end, POLLIN)], "events")
        expect_modes(ctx.dst.range, UNREGISTERED)
    os.close(end)
    os.close(other_end)


@uffd_case("poll-target-exited", mem=ALL, pages=1, rows=("PL-11",), kind=Kind.DETAIL)
def test_poll_target_exited(ctx: Context) -> None:
    """After the target has exited there is nothing to poll for and nothing to read: no hang-up tells of it."""
    with orphaned(ctx.dst.range, MISSING) as uffd:
        expect_events("PL-11", uffd, 0, "the target has exited")
        with promise("PL-11"):
            uffd.expect_no_message()


@uffd_case("poll-target-killed", mem=(ANON,), pages=1, rows=("PL-11", "FI-05"), kind=Kind.DETAIL)
def test_poll_target_killed(ctx: Context) -> None:
    """A target that is killed while it sleeps in a fault takes its message away."""

    def target(channel: Channel) -> None:
        with Uffd.open() as uffd:
            uffd.register(ctx.dst.range, MISSING)
            channel.send(None, uffd.fd)
            peek(ctx.dst.start)

    with Child(target) as child, Uffd(child.receive_fds()[1][0]) as uffd:
        expect(named(by_poll(uffd, DEADLINE)), "POLLIN", "events while it sleeps")
        child.kill()
        expect_events("PL-11", uffd, 0, "the target was killed")
        expect(uffd.fdinfo[:2], (0, 0), "pending and total faults")
        uffd.expect_no_message()
