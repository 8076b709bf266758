# SPDX-License-Identifier: GPL-2.0-only
"""UFFD_EVENT_REMOVE: what dropping pages announces, and what it does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from ctypes import addressof, c_uint64
from errno import EAGAIN, EINVAL, ENOMEM, EPERM
from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, HUGETLB, HUGETLB_PRIVATE, MISSING, NOT_HUGETLB, PAGE_SIZE, REMOVE, SHMEM, SHMEM_PRIVATE, UNREGISTERED,
    Advice, Context, KernelError, Message, Pagemap, Range, Skip, Waiter, advise, announced, await_event, expect,
    expect_bytes, expect_modes, expect_one_of, expect_served, fails, modes_offered, outcome, promise, recorder,
    removed, saw, syscalls, take_event, undisturbed, unmap,
)  # fmt: skip

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


def lock(where: Range) -> None:
    """Lock pages into memory; Skip where RLIMIT_MEMLOCK forbids it."""
    try:
        syscalls.call("mlock", where.start, where.len)
    except KernelError as error:
        if error.errno in (ENOMEM, EPERM, EAGAIN):
            raise Skip("mlock(2): raise RLIMIT_MEMLOCK (ulimit -l)") from None
        raise


def announced_drop(ctx: Context, advice: Advice) -> None:
    """Drop pages 0 to 4 of 6, of which 1, 2, 4 and 5 are registered."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.page(1, 2), MISSING)
    ctx.uffd.register(ctx.dst.page(4, 2), MISSING)
    with Waiter(lambda: advise(ctx.dst.page(0, 5), advice)) as waiter:
        for first, count in ((1, 2), (4, 1)):
            await_event(ctx.uffd, waiter)
            ctx.dst.expect_pattern_of(ctx.dst, first, count)
            take_event(ctx.uffd, waiter, removed(ctx.dst.page(first, count)))
    ctx.uffd.expect_no_message()
    Pagemap.expect_present(ctx.dst, 5)
    ctx.dst.expect_pattern_of(ctx.dst, 5, 1)
    expect_modes(ctx.dst.range, UNREGISTERED, MISSING, MISSING, UNREGISTERED, MISSING, MISSING)


@uffd_case("remove-event", mem=ALL, features=REMOVE, pages=6, rows=("EV-02", "EV-05"))
def test_remove_event(ctx: Context) -> None:
    """MADV_DONTNEED announces each registered mapping, clipped to it, before its pages go; it stays registered."""
    announced_drop(ctx, Advice.DONTNEED)
    if ctx.mem in (ANON, HUGETLB_PRIVATE):  # shmem stays in the page cache
        expect_served(ctx, ctx.dst.page(2))


@uffd_case("remove-event-file", mem=(SHMEM, HUGETLB), features=REMOVE, pages=6, rows=("EV-02", "EV-08"))
def test_remove_event_file(ctx: Context) -> None:
    """MADV_REMOVE announces each registered mapping, clipped to it, before its pages leave the file."""
    announced_drop(ctx, Advice.REMOVE)
    expect_served(ctx, ctx.dst.page(2))
    expect_bytes(ctx.dst.alias_page(0), 0, "the second mapping of a page that was dropped", ctx.page_size)


@uffd_case("remove-event-locked", mem=ALL, features=REMOVE, pages=6, rows=("EV-06",), kind=Kind.DETAIL)
def test_remove_event_locked(ctx: Context) -> None:
    """MADV_DONTNEED_LOCKED is announced like MADV_DONTNEED, of memory locked and not."""
    announced_drop(ctx, Advice.DONTNEED_LOCKED)
    page = ctx.dst.page(5)
    lock(page)
    announced(ctx.uffd, lambda: advise(page, Advice.DONTNEED_LOCKED), removed(page))
    Pagemap.expect_present(ctx.dst)


@uffd_case("remove-event-free", mem=(ANON,), features=REMOVE, pages=3, rows=("EV-06",), kind=Kind.DETAIL)
def test_remove_event_free(ctx: Context) -> None:
    """MADV_FREE of anonymous memory is announced."""
    page = ctx.dst.page(1)
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    announced(ctx.uffd, lambda: advise(page, Advice.FREE), removed(page))


@uffd_case("remove-event-modes", mem=ALL, features=REMOVE, pages=3, rows=("EV-42",), kind=Kind.DETAIL)
def test_remove_event_modes(ctx: Context) -> None:
    """Dropped pages are announced in whichever mode the memory is registered."""
    page = ctx.dst.page(1)
    for mode in modes_offered(ctx):
        with promise("EV-42", f"registered for {mode}"):
            ctx.uffd.register(ctx.dst.range, mode)
            announced(ctx.uffd, lambda: advise(page, Advice.DONTNEED), removed(page))
            ctx.uffd.unregister(ctx.dst.range)


SPURIOUS = Defect(
    id="D-EV-07",
    summary="MADV_FREE of shmem fails with EINVAL, but only after it has announced UFFD_EVENT_REMOVE",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="Treat UFFD_EVENT_REMOVE of shmem as a hint: its pages may still be there.",
    shows=r"events of a MADV_FREE that failed: expected \[\], got \[Removed\([^\[]*\]",
)


def free_shmem(ctx: Context) -> list[Message]:
    """Call MADV_FREE where it must fail, and return what it announced."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with recorder(ctx, ctx.uffd) as reader, fails(EINVAL):
        advise(ctx.dst.page(1), Advice.FREE)
    ctx.dst.expect_pattern_of(ctx.dst)
    return reader.messages


@uffd_case("remove-spurious", mem=(SHMEM, SHMEM_PRIVATE), features=REMOVE, pages=3, rows=("EV-07",), defect=SPURIOUS)
def test_remove_spurious(ctx: Context) -> None:
    """A MADV_FREE that fails, as it does on shmem, announces nothing."""
    expect(free_shmem(ctx), [], "EV-07: events of a MADV_FREE that failed")


@uffd_case(
    "remove-spurious-or-not", mem=(SHMEM, SHMEM_PRIVATE), features=REMOVE, pages=3, rows=("EV-07",), kind=Kind.DETAIL
)
def test_remove_spurious_or_not(ctx: Context) -> None:
    """MADV_FREE on shmem fails and drops nothing; if it announces anything, then that page."""
    messages = free_shmem(ctx)
    expect(messages, [removed(ctx.dst.page(1))] if messages else [], "EV-07: events of a MADV_FREE that failed")


@uffd_case("remove-silent", mem=ALL, features=REMOVE, pages=2, rows=("EV-09",), kind=Kind.DETAIL)
def test_remove_silent(ctx: Context) -> None:
    """Advice that drops no page, or is refused, is not announced."""
    page, nothing = ctx.dst.page(0), Range(ctx.dst.start, 0)
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)

    def expect_silent(advice: Advice, where: Range, *results: object) -> None:
        with promise("EV-09", f"{advice} of {where}"):
            result = undisturbed(ctx.uffd, lambda: outcome(lambda: advise(where, advice)))
            if results:
                expect(result, results[0], "result")

    for advice in (Advice.COLD, Advice.PAGEOUT, Advice.WILLNEED, Advice.COLLAPSE):
        expect_silent(advice, page)
    for advice in (Advice.DONTNEED, Advice.DONTNEED_LOCKED, Advice.FREE, Advice.REMOVE):
        expect_silent(advice, nothing, None)
        expect_silent(advice, Range(page.start + 1, page.len), "EINVAL")
    if not ctx.mem.shared:
        expect_silent(Advice.REMOVE, page, "EINVAL" if ctx.mem == ANON else "EACCES")
    if ctx.mem.hugetlb:
        expect_silent(Advice.FREE, page, "EINVAL")
    ctx.dst.expect_pattern_of(ctx.dst)


@uffd_case("remove-silent-locked", mem=NOT_HUGETLB, features=REMOVE, pages=2, rows=("EV-09",), kind=Kind.DETAIL)
def test_remove_silent_locked(ctx: Context) -> None:
    """Locked pages cannot be dropped, and nothing is announced."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    lock(ctx.dst.range)
    for advice in (Advice.DONTNEED, Advice.FREE, Advice.REMOVE):
        with promise("EV-09", str(advice)), fails(EINVAL):
            undisturbed(ctx.uffd, partial(advise, ctx.dst.page(0), advice))
    ctx.dst.expect_pattern_of(ctx.dst)


@uffd_case(
    "remove-silent-file",
    mem=(SHMEM, SHMEM_PRIVATE, HUGETLB),
    features=REMOVE,
    pages=2,
    rows=("EV-10",),
    kind=Kind.DETAIL,
)
def test_remove_silent_file(ctx: Context) -> None:
    """Pages that leave through the file, punched out or truncated, are not announced."""
    fd, page = ctx.dst.fd, ctx.dst.page(0)
    assert fd is not None
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    changes: dict[str, Callable[[], object]] = {
        "a hole punched": lambda: syscalls.call(
            "fallocate", fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, page.len
        ),
        "the file truncated": lambda: os.ftruncate(fd, page.len),
    }
    for what, change in changes.items():
        with promise("EV-10", what):
            undisturbed(ctx.uffd, change)
    if ctx.mem.shared:
        Pagemap.expect_present(ctx.dst)


@uffd_case(
    "remove-hugetlb-part", mem=(HUGETLB, HUGETLB_PRIVATE), features=REMOVE, pages=2, rows=("EV-11",), kind=Kind.DETAIL
)
def test_remove_hugetlb_part(ctx: Context) -> None:
    """MADV_DONTNEED of huge pages and a part of one announces and drops the whole ones, and wants them aligned."""
    start, huge = ctx.dst.start, ctx.page_size
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("EV-11", "a part of a huge page"):
        undisturbed(ctx.uffd, lambda: advise(Range(start, huge - PAGE_SIZE), Advice.DONTNEED))
    with promise("EV-11", "start inside a huge page"), fails(EINVAL):
        undisturbed(ctx.uffd, lambda: advise(Range(start + PAGE_SIZE, huge), Advice.DONTNEED))
    Pagemap.expect_present(ctx.dst, 0, 1)
    with promise("EV-11", "one huge page and a part"):
        longer = Range(start, huge + PAGE_SIZE)
        announced(ctx.uffd, lambda: advise(longer, Advice.DONTNEED), removed(ctx.dst.page(0)))
    Pagemap.expect_present(ctx.dst, 1)


@uffd_case("remove-process-madvise", mem=ALL, features=REMOVE, pages=4, rows=("EV-12",), kind=Kind.VERSION)
def test_remove_process_madvise(ctx: Context) -> None:
    """process_madvise(MADV_DONTNEED) of the caller announces each of its ranges; before Linux 6.13 it was refused."""
    first, second, probe = ctx.dst.page(0), ctx.dst.page(2), ctx.src.page(0)
    try:
        own = syscalls.call("pidfd_open", os.getpid(), 0)
    except KernelError as error:
        raise Skip(f"pidfd_open(2): {error}") from None

    def drop(*ranges: Range) -> object:
        vector = (c_uint64 * 8)(*(number for part in ranges for number in (part.start, part.len)))
        call = ("process_madvise", own, addressof(vector), len(ranges), Advice.DONTNEED, 0)
        return outcome(lambda: syscalls.call(*call))

    ctx.uffd.register(ctx.dst.range, MISSING)
    known = drop(probe)
    if known in ("EINVAL", "ENOSYS", "EPERM"):
        saw(str(known))
        expect(undisturbed(ctx.uffd, lambda: drop(first, second)), known, "result where it is refused")
    else:
        result = announced(ctx.uffd, lambda: drop(first, second), removed(first), removed(second))
        saw("success")
        expect(result, 2 * ctx.page_size, "bytes advised")
    os.close(own)


@uffd_case("remove-raced", mem=ALL, features=REMOVE, pages=4, rows=("EV-05",), kind=Kind.DETAIL)
def test_remove_raced(ctx: Context) -> None:
    """MADV_DONTNEED drops what of its range is left once its event was read, and says ENOMEM if that is nothing."""
    part, tail, single = ctx.dst.page(0, 3), ctx.dst.page(2), ctx.dst.page(1)
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    result = drop_while_unmapping(ctx, part, tail)
    expect_one_of(result, (None, "ENOMEM"), "EV-05: no error, or one for the part that is missing")
    Pagemap.expect_present(ctx.dst, 3)
    expect(drop_while_unmapping(ctx, single, single), "ENOMEM", "EV-05: result when all was unmapped meanwhile")
    Pagemap.expect_present(ctx.dst, 3)


def drop_while_unmapping(ctx: Context, where: Range, gone: Range) -> object:
    """Drop the range's pages, unmap a part before the event is read, and return the result."""
    with Waiter(partial(outcome, drop(where))) as waiter:
        await_event(ctx.uffd, waiter)
        unmap(gone)
        take_event(ctx.uffd, waiter, removed(where))
        result = waiter.result()
    ctx.uffd.expect_no_message()
    return result


def drop(where: Range) -> Callable[[], None]:
    """Return the call that drops the range's pages."""
    return lambda: advise(where, Advice.DONTNEED)


@uffd_case("remove-raced-lock", mem=NOT_HUGETLB, features=REMOVE, pages=2, rows=("EV-05",), kind=Kind.DETAIL)
def test_remove_raced_lock(ctx: Context) -> None:
    """MADV_DONTNEED leaves pages alone that were locked by the time its event has been read, and says EINVAL."""
    page = ctx.dst.page(0)
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with Waiter(partial(outcome, drop(page))) as waiter:
        await_event(ctx.uffd, waiter)
        lock(page)
        take_event(ctx.uffd, waiter, removed(page))
        expect(waiter.result(), "EINVAL", "EV-05: result of MADV_DONTNEED")
    Pagemap.expect_present(ctx.dst, 0, 1)
    ctx.dst.expect_pattern_of(ctx.dst)
