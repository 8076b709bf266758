# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_COPY into other processes, and into those that have gone; beside events; through another handle."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from errno import EAGAIN, EEXIST, EINVAL, ENOENT, EPERM, ESRCH
from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, DEADLINE, MISSING, PAGE_SIZE, UNTOUCHED, WP, Advice, Channel, Child, Context, Feature, Forked, Pagemap,
    Range, Remapped, Removed, Uffd, UffdError, Unmapped, Waiter, advise, copy, eventually, expect, expect_errno,
    faulting, held_up, monitored, orphaned, peek, poke, prepare, promise, refuses, remap, saw, unmap,
)  # fmt: skip


# ---- into another process ------------------------------------------------------------------------------------------


@uffd_case("copy-remote", mem=ALL, pages=2, rows=("CP-44",))
def test_copy_remote(ctx: Context) -> None:
    """A monitor in another process fills the memory of the handle's process, and from its own, not the other's."""
    ctx.src.fill()
    with closing(ANON.allocate(ctx.page_size // PAGE_SIZE)) as source:
        poke(source.start, peek(ctx.src.start, ctx.page_size))

        def life(_: Channel) -> None:
            poke(source.start, bytes(ctx.page_size))
            ctx.dst.expect_pattern_of(ctx.src, 0, 1)

        with monitored(ctx.dst.range, MISSING, life) as (child, uffd):
            uffd.wait_fault(ctx.dst.start)
            uffd.copy(ctx.dst.start, source.start, ctx.page_size)
            uffd.expect_asleep(0)
            child.wait()
    Pagemap.expect_present(ctx.dst)


@uffd_case("copy-inherited", mem=ALL, pages=2, rows=("CP-45",), kind=Kind.DETAIL)
def test_copy_inherited(ctx: Context) -> None:
    """A handle inherited by fork serves the parent's memory still; the child's copies take the child's source."""
    prepare(ctx)
    uffd, page = ctx.uffd, ctx.dst.page(0)
    with closing(ANON.allocate(ctx.page_size // PAGE_SIZE)) as source:

        def copier(_: Channel) -> None:
            poke(source.start, peek(ctx.src.start, page.len))
            uffd.copy(page.start, source.start, page.len)

        with faulting(uffd, page.start), Child(copier):
            pass
    ctx.dst.expect_pattern_of(ctx.src, 0, 1)


# ---- events and processes that have gone ---------------------------------------------------------------------------


def copied_after_event(uffd: Uffd, dst: int, src: int, length: int) -> Callable[[], bool]:
    """Return an attempt to copy once an event was read: until its thread has run on, EAGAIN says so."""

    def attempt() -> bool:
        try:
            uffd.copy(dst, src, length)
        except UffdError as error:
            if error.errno != EAGAIN:
                raise
            return False
        return True

    return attempt


@uffd_case(
    "copy-during-event",
    mem=ALL,
    features=Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.EVENT_REMAP,
    pages=2,
    rows=("CP-14", "CP-15"),
    bugs=(8,),
)
def test_copy_during_event(ctx: Context) -> None:
    """UFFDIO_COPY says EAGAIN while an event of its handle waits to be read; afterwards a repetition succeeds."""
    ctx.src.fill()
    place = ctx.dst.start
    changes: dict[Feature, Callable[[Range], object]] = {
        Feature.EVENT_REMOVE: lambda page: advise(page, Advice.DONTNEED),
        Feature.EVENT_UNMAP: unmap,
        Feature.EVENT_REMAP: lambda page: remap(page, to=place),
    }
    for feature, change in changes.items():
        with promise("CP-14 CP-15", str(feature)), closing(ctx.mem.allocate(2)) as area, Uffd.open(feature) as uffd:
            arguments = (area.start, ctx.src.start, ctx.page_size)
            uffd.register(area.range, MISSING)
            with Waiter(partial(change, area.page(1))):
                expect(uffd.readable(DEADLINE), True, "a readable event")
                for attempt in arguments, (0, 0, 0):
                    with held_up():
                        uffd.copy(*attempt)
                expect(isinstance(uffd.read()[0], Removed | Unmapped | Remapped), True, "an event")
                eventually(copied_after_event(uffd, *arguments), "a copy")
            area.expect_pattern_of(ctx.src, 0, 1)


@uffd_case("copy-during-fork", mem=(ANON,), features=Feature.EVENT_FORK, pages=2, rows=("CP-14", "CP-15"))
def test_copy_during_fork(ctx: Context) -> None:
    """While a fork waits for its event to be read, UFFDIO_COPY says EAGAIN; afterwards a repetition succeeds."""
    ctx.src.fill()
    uffd, dst, src = ctx.uffd, ctx.dst.start, ctx.src.start

    def monitor(channel: Channel) -> None:
        channel.receive()
        try:
            expect(uffd.readable(DEADLINE), True, "a readable event while fork waits")
            with held_up():
                uffd.copy(dst, src, PAGE_SIZE)
        finally:  # else fork waits for ever
            messages = uffd.read()
        expect(isinstance(messages[0], Forked), True, "UFFD_EVENT_FORK")
        eventually(copied_after_event(uffd, dst, src, PAGE_SIZE), "a copy")

    with Child(monitor) as child:
        uffd.register(ctx.dst.range, MISSING)
        child.send()
        with Child(lambda _: None):
            pass
    ctx.dst.expect_pattern_of(ctx.src, 0, 1)


@uffd_case("copy-target-gone", mem=ALL, pages=2, rows=("CP-16",))
def test_copy_target_gone(ctx: Context) -> None:
    """UFFDIO_COPY into a process that has exited, or runs another program now, says ESRCH and writes no output."""
    for by_exec in False, True:
        gone = orphaned(ctx.dst.range, MISSING, by_exec=by_exec)
        with gone as uffd, promise("CP-16", "exec" if by_exec else "exit"), refuses(ESRCH, output=UNTOUCHED):
            uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@uffd_case("copy-keeps-nobody-alive", mem=ALL, pages=2, rows=("CP-16",))
def test_copy_keeps_nobody_alive(ctx: Context) -> None:
    """Copies, done and refused, leave no hold on the memory of a process: it goes when the process exits."""
    arguments = (ctx.dst.start, ctx.src.start, ctx.page_size)
    with monitored(ctx.dst.range, MISSING, Channel.receive) as (child, uffd):
        uffd.copy(*arguments)
        with refuses(EEXIST):
            uffd.copy(*arguments)
        child.send()
        child.wait()
        with refuses(ESRCH, output=UNTOUCHED):
            uffd.copy(*arguments)


# ---- a handle that does not own the range --------------------------------------------------------------------------

FOREIGN = Defect(
    id="D-CP-43",
    summary="Any userfaultfd of a process may fill, poison or protect a range that another one owns, and does not wake "
    "the threads that sleep there; only UFFDIO_MOVE asks who the owner is.",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="Send each request through the handle that registered the range.",
    shows=r"UFFDIO_\w+: expected a refusal; the call succeeded",
)


def foreign_requests(ctx: Context, other: Uffd) -> dict[str, Callable[[], object]]:
    """What another handle of the process can try on the destination: a request for each page."""
    requests: dict[str, Callable[[], object]] = {
        "UFFDIO_COPY": lambda: other.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE),
        "UFFDIO_ZEROPAGE": lambda: other.zeropage(ctx.dst.page(1)),
        "UFFDIO_WRITEPROTECT": lambda: other.writeprotect(ctx.dst.page(2)),
    }
    if Feature.POISON in ctx.uffd.offered:
        requests["UFFDIO_POISON"] = lambda: other.poison(ctx.dst.page(3))
    return requests


@uffd_case("copy-foreign", mem=(ANON,), features=Feature.PAGEFAULT_FLAG_WP, pages=4, rows=("CP-43",), defect=FOREIGN)
def test_copy_foreign(ctx: Context) -> None:
    """A range answers to the handle that registered it: through another one of the process nothing happens to it."""
    ctx.dst.fill(2, 1)
    prepare(ctx, MISSING | WP)
    with Uffd.open() as other:
        for name, request in foreign_requests(ctx, other).items():
            with promise("CP-43", name):
                try:
                    request()
                except UffdError:
                    continue
                raise AssertionError("expected a refusal; the call succeeded through a handle that is not the owner")
    Pagemap.expect_present(ctx.dst, 2)


@uffd_case("copy-foreign-sleepers", mem=ALL, pages=1, rows=("CP-43",), kind=Kind.DETAIL)
def test_copy_foreign_sleepers(ctx: Context) -> None:
    """A copy through a handle that does not own the range is refused, or fills the page but wakes nobody there."""
    prepare(ctx)
    with Uffd.open() as other, faulting(ctx.uffd, ctx.dst.start):
        try:
            other.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
        except UffdError as error:
            expect_errno(error, (EINVAL, ENOENT, EPERM), "a refusal for want of ownership")
            copy(ctx, 0)
        else:
            saw("success")
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.wake(ctx.dst.page(0))
    ctx.dst.expect_pattern_of(ctx.src, 0, 1)
