# SPDX-License-Identifier: GPL-2.0-only
"""What the events of a process that does not cooperate have in common: who waits, for what, and what waits for them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from errno import EAGAIN, EFAULT, EPERM, ESRCH

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, DEADLINE, DEFAULT_FLAGS, FORK, MINOR_FAULTS, MISSING, REMAP, REMOVE, SHMEM, UNMAP, UNTOUCHED, Advice,
    Channel, Child, Context, Feature, Forked, Message, Range, Skip, Uffd, UffdError, Waiter, advise, await_child_event,
    await_event, expect, expect_errno, expect_killed, expect_same, handled, held_up, monitored, moved, promise,
    read_fork, read_only, recorder, refuses, remap, removed, take_event, uapi, unmap, unmapped, unread_event,
)  # fmt: skip


def feature_sets() -> Iterator[Feature]:
    """No event, each event alone, and all, as far as this process may have them."""
    events = [REMOVE, UNMAP, REMAP]
    try:
        Uffd.open(FORK).close()
        events.append(FORK)
    except UffdError as error:
        expect_errno(error, EPERM, "errno of UFFD_FEATURE_EVENT_FORK for who may not have it")
    yield Feature(0)
    yield from events
    yield Feature(sum(events))


@uffd_case("event-by-feature", mem=ALL, pages=3, rows=("EV-01",))
def test_event_by_feature(ctx: Context) -> None:
    """An operation is announced if its own feature was asked for, and is else neither announced nor delayed."""
    for features in feature_sets():
        area, place = ctx.allocate(), ctx.allocate()
        first, rest = area.page(0), area.page(1, 2)
        with promise("EV-01", f"features {features}"), Uffd.open(features) as uffd:
            uffd.register(area.range, MISSING)
            with recorder(ctx, uffd) as reader:
                advise(first, Advice.DONTNEED)
                with Child(lambda _: None):
                    pass
                unmap(first)
                remap(rest, to=place.start)
            script = [
                (REMOVE, removed(first)),
                (FORK, "UFFD_EVENT_FORK"),
                (UNMAP, unmapped(first)),
                (REMAP, moved(rest, place.start)),
                (UNMAP, unmapped(rest)),
            ]
            seen = ["UFFD_EVENT_FORK" if isinstance(message, Forked) else message for message in reader.messages]
            expect(seen, [message for feature, message in script if feature in features], "events")


@uffd_case("event-wakes-reader", mem=(ANON,), features=REMOVE | UNMAP, pages=2, rows=("EV-02",))
def test_event_wakes_reader(ctx: Context) -> None:
    """An event wakes who sleeps in poll(2) or read(2), and its operation goes on as soon as it is read."""
    page = ctx.dst.page(0)
    with Uffd.open(REMOVE, DEFAULT_FLAGS & ~os.O_NONBLOCK) as blocking:
        blocking.register(page, MISSING)
        with Waiter(blocking.read) as reader:
            reader.expect_sleeping()
            with Waiter(lambda: advise(page, Advice.DONTNEED)):
                expect(reader.result(), [removed(page)], "what a read that slept returned")
    ctx.uffd.register(page, MISSING)
    with Waiter(lambda: ctx.uffd.readable(6 * DEADLINE)) as poller:
        poller.expect_sleeping()
        with Waiter(lambda: unmap(page)) as waiter:
            expect(poller.result(), True, "POLLIN from a poll that slept")
            take_event(ctx.uffd, waiter, unmapped(page))


@uffd_case("event-signal", mem=(ANON,), features=REMOVE, pages=1, rows=("EV-03",), kind=Kind.DETAIL)
def test_event_signal(ctx: Context) -> None:
    """A signal with a handler does not interrupt an operation that waits for its event to be read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with handled(signal.SIGUSR1), Waiter(lambda: advise(ctx.dst.range, Advice.DONTNEED)) as waiter:
        await_event(ctx.uffd, waiter)
        waiter.signal(signal.SIGUSR1)
        waiter.expect_in_event()
        expect(waiter.state, "D", "state of the thread while its signal is pending")
        take_event(ctx.uffd, waiter, removed(ctx.dst.range))


@uffd_case("event-kill", mem=(ANON,), features=REMOVE | UNMAP | REMAP, pages=1, rows=("EV-03",), kind=Kind.DETAIL)
def test_event_kill(ctx: Context) -> None:
    """A fatal signal ends an operation that waits for its event to be read, and takes the message back."""
    where, to = ctx.dst.range, ctx.src.start
    operations: dict[str, Callable[[Channel], object]] = {
        "madvise": lambda _: advise(where, Advice.DONTNEED),
        "munmap": lambda _: unmap(where),
        "mremap": lambda _: remap(where, to=to),
    }
    for name, operation in operations.items():
        for number in (signal.SIGKILL, signal.SIGTERM):
            with (
                promise("EV-03", f"{number.name} during {name}"),
                monitored(where, MISSING, operation, ctx.features) as (child, uffd),
            ):
                expect_killed(uffd, child, number)


# ---- what an unread event holds up ---------------------------------------------------------------------------------

HELD_UP = ("EV-04", "CP-14", "ZP-14", "CT-22", "PO-17", "WP-31", "MV-26", "WK-06", "REG-43")


def expect_held_up(ctx: Context, uffd: Uffd) -> None:
    """Assert what an unread event holds up and what not; page 1 is missing, page 2 is not registered."""
    page, other, src = ctx.dst.page(1), ctx.dst.page(2), ctx.src.start
    fills: list[tuple[str, str, Callable[[], object]]] = [
        ("CP-14", "UFFDIO_COPY", lambda: uffd.copy(page.start, src, page.len)),
        ("ZP-14", "UFFDIO_ZEROPAGE", lambda: uffd.zeropage(page)),
    ]
    if ctx.uffd.offered & MINOR_FAULTS:
        fills.append(("CT-22", "UFFDIO_CONTINUE", lambda: uffd.continue_(page)))
    if Feature.PAGEFAULT_FLAG_WP in ctx.uffd.offered:
        fills.append(("WP-31", "UFFDIO_WRITEPROTECT", lambda: uffd.writeprotect(page)))
        fills.append(("WP-31", "UFFDIO_WRITEPROTECT with mode 0", lambda: uffd.unprotect(page)))
    if Feature.POISON in ctx.uffd.offered:
        fills.append(("PO-17", "UFFDIO_POISON", lambda: uffd.poison(page)))
    if Feature.MOVE in ctx.uffd.offered:
        fills.append(("MV-26", "UFFDIO_MOVE", lambda: uffd.move(page.start, src, page.len)))
    for row, name, fill in fills:
        with promise(f"EV-04, {row}", name), held_up():
            fill()
    with promise("EV-04, WK-06", "UFFDIO_WAKE"):
        uffd.wake(page)
    with promise("EV-04, REG-43", "UFFDIO_REGISTER, UFFDIO_UNREGISTER"):
        uffd.register(other, MISSING)
        uffd.unregister(other)


def expect_let_go(ctx: Context, uffd: Uffd, page: Range) -> None:
    """Assert that nothing holds a fill up, and that the page was still missing."""
    uffd.copy(page.start, ctx.src.start, page.len)


def held_up_by(ctx: Context, call: Callable[[], object], message: Message) -> None:
    """Make a call whose event holds up the fills; it leaves the pages from 1 on alone."""
    ctx.src.fill(0, 1)
    ctx.uffd.register(ctx.dst.page(0, 2), MISSING)
    apart = ctx.allocate(1)
    with Uffd.open() as another, Waiter(call) as waiter:
        another.register(apart.range, MISSING)
        await_event(ctx.uffd, waiter)
        expect_held_up(ctx, ctx.uffd)
        with promise("EV-04", "another handle of the process"):
            expect_let_go(ctx, another, apart.range)
        take_event(ctx.uffd, waiter, message)
        waiter.result()
        expect_let_go(ctx, ctx.uffd, ctx.dst.page(1))
    expect_same(ctx.src.start, ctx.dst.page(1).start, ctx.page_size, "the page filled at last")


@uffd_case("event-holds-up-remove", mem=ALL, features=REMOVE, pages=3, rows=HELD_UP)
def test_event_holds_up_remove(ctx: Context) -> None:
    """Until UFFD_EVENT_REMOVE is read no page of that handle can be filled; waking and registering go on."""
    page = ctx.dst.page(0)
    held_up_by(ctx, lambda: advise(page, Advice.DONTNEED), removed(page))


@uffd_case("event-holds-up-unmap", mem=ALL, features=UNMAP, pages=3, rows=HELD_UP)
def test_event_holds_up_unmap(ctx: Context) -> None:
    """Until UFFD_EVENT_UNMAP is read no page of that handle can be filled; waking and registering go on."""
    page = ctx.dst.page(0)
    held_up_by(ctx, lambda: unmap(page), unmapped(page))


@uffd_case("event-holds-up-remap", mem=ALL, features=REMAP, pages=3, rows=HELD_UP)
def test_event_holds_up_remap(ctx: Context) -> None:
    """Until UFFD_EVENT_REMAP is read no page of that handle can be filled; waking and registering go on."""
    page, to = ctx.dst.page(0), ctx.allocate(1).start
    held_up_by(ctx, lambda: remap(page, to=to), moved(page, to))


@uffd_case("event-holds-up-fork", mem=ALL, features=FORK, pages=3, rows=HELD_UP)
def test_event_holds_up_fork(ctx: Context) -> None:
    """Until UFFD_EVENT_FORK is read no page of that handle can be filled; waking and registering go on."""

    def fork_and_stay(channel: Channel) -> None:
        with Child(lambda _: None):
            pass
        channel.send()
        channel.receive()

    with monitored(ctx.dst.page(0, 2), MISSING, fork_and_stay, FORK) as (child, uffd):
        await_child_event(uffd, child)
        expect_held_up(ctx, uffd)
        with read_fork(uffd) as forked:
            child.receive()
            expect_let_go(ctx, uffd, ctx.dst.page(1))
            with promise("CP-16", "the forked process has ended"), refuses(ESRCH, output=UNTOUCHED):
                forked.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
        child.send()


FILLS = {
    "UFFDIO_COPY": Feature(0),
    "UFFDIO_ZEROPAGE": Feature(0),
    "UFFDIO_CONTINUE": Feature.MINOR_HUGETLBFS,
    "UFFDIO_POISON": Feature.POISON,
    "UFFDIO_MOVE": Feature.MOVE,
}
"""Every request that says in an output field what it did, and the feature that brought it."""


@uffd_case(
    "event-output-field",
    mem=(ANON,),
    variants=tuple(FILLS),
    features=REMOVE,
    pages=2,
    rows=("EV-04", "CP-14", "ZP-14", "CT-22", "PO-17", "MV-26"),
    bugs=(6,),
)
def test_event_output_field(ctx: Context, variant: str) -> None:
    """The output field of a fill that an unread event holds up says EAGAIN, too; one that cannot be written: EFAULT.

    Kernels before 6.15 leave the field alone (mm/userfaultfd: fix uninitialized output field for -EAGAIN race): a
    user who reads it takes what it held before for the number of bytes that were filled.
    """
    if FILLS[variant] not in ctx.uffd.offered:
        raise Skip(f"kernel lacks {FILLS[variant]} (Linux {FILLS[variant].since})")
    page, request = ctx.dst.page(0), getattr(uapi, variant)
    ctx.uffd.register(ctx.dst.range, MISSING)
    fills: dict[str, Callable[[], object]] = {
        "UFFDIO_COPY": lambda: ctx.uffd.copy(page.start, ctx.src.start, page.len),
        "UFFDIO_ZEROPAGE": lambda: ctx.uffd.zeropage(page),
        "UFFDIO_CONTINUE": lambda: ctx.uffd.continue_(page),
        "UFFDIO_POISON": lambda: ctx.uffd.poison(page),
        "UFFDIO_MOVE": lambda: ctx.uffd.move(page.start, ctx.src.start, page.len),
    }
    with unread_event(ctx.uffd, ctx.dst.page(1)), read_only(bytes(64)) as address:
        with promise("EV-04", "output field"), refuses(EAGAIN):
            fills[variant]()
        for what, argument in (("NULL", 0), ("read-only", address)):
            with promise("EV-04", f"argument {what}"), refuses(EFAULT):
                ctx.uffd.raw_ioctl(request, argument)


@uffd_case("event-holds-up-null", mem=(ANON,), features=REMOVE, pages=1, rows=("EV-04",), kind=Kind.DETAIL)
def test_event_holds_up_null(ctx: Context) -> None:
    """While an event is unread, UFFDIO_WRITEPROTECT says EAGAIN before it looks at its argument."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with unread_event(ctx.uffd, ctx.dst.range), refuses(EAGAIN):
        ctx.uffd.raw_ioctl(uapi.UFFDIO_WRITEPROTECT)


@uffd_case("event-holds-up-each", mem=(ANON,), features=REMOVE, pages=3, rows=("EV-04", "CP-14"), bugs=(62,))
def test_event_holds_up_each(ctx: Context) -> None:
    """With two events unread, the fills wait for both."""
    first, second, page = (ctx.dst.page(number) for number in range(3))
    ctx.uffd.register(ctx.dst.range, MISSING)
    with Waiter(lambda: advise(first, Advice.DONTNEED)) as one:
        await_event(ctx.uffd, one)
        with Waiter(lambda: advise(second, Advice.DONTNEED)) as other:
            other.expect_in_event()
            expect(ctx.uffd.read(), [removed(first)], "the first event")
            one.result()
            with promise("EV-04, CP-14", "one of two events read"), held_up():
                ctx.uffd.copy(page.start, ctx.src.start, page.len)
            take_event(ctx.uffd, other, removed(second))
    expect_let_go(ctx, ctx.uffd, page)


@uffd_case(
    "event-read-then-fill",
    mem=(ANON, SHMEM),
    features=REMOVE,
    pages=9,
    rows=("CP-15",),
    kind=Kind.DETAIL,
    smp=True,
)
def test_event_read_then_fill(ctx: Context) -> None:
    """A fill right after an event was read may say EAGAIN until the operation runs on; repeated, it succeeds."""
    dropped = ctx.dst.page(0)
    ctx.uffd.register(ctx.dst.range, MISSING)
    for number in range(1, ctx.nr_pages):
        with Waiter(lambda: advise(dropped, Advice.DONTNEED)):
            expect(ctx.uffd.wait(), removed(dropped), "the event")
            fill_at_last(ctx, ctx.dst.page(number))


def fill_at_last(ctx: Context, page: Range) -> None:
    """Fill a page, for as long as the kernel answers EAGAIN."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        try:
            ctx.uffd.copy(page.start, ctx.src.start, page.len)
        except UffdError as error:
            expect_errno(error, EAGAIN, "CP-15: errno")
        else:
            return
    raise AssertionError(f"CP-15: UFFDIO_COPY says EAGAIN for {DEADLINE:g} seconds after the event was read")
