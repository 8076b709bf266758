# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_WAKE: who wakes, who sleeps on, and what a thread does that wakes for nothing."""

from __future__ import annotations

from errno import EFAULT, EINVAL
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, HUGETLB, HUGETLB_PRIVATE, MINOR, MISSING, NOT_HUGETLB, PAGE_SIZE, SHMEM, WP, WRITEPROTECT, Context,
    CopyMode, Feature, PagefaultFlag, Range, Skip, Uffd, Waiter, bad_ranges, eventually, expect, faulting,
    faulting_pages, lowest_start, orphaned, peek, poke, promise, refuses, uapi, unmap, unread_event, user_space_end,
)  # fmt: skip

FOUR_GIB = 1 << 32
"""A length that is nothing to who counts in 32 bits; for the kernel's own wakes, length 0 is everybody."""


@uffd_case("wake-errors", mem=(ANON,), pages=2, rows=("WK-01",))
def test_wake_errors(ctx: Context) -> None:
    """UFFDIO_WAKE refuses a range that is not whole pages of user space, and an argument it cannot read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for what, bad in bad_ranges(ctx.dst.page(0)).items():
        with promise("WK-01", what), refuses(EINVAL):
            ctx.uffd.wake(bad)
    with promise("WK-01", "argument NULL"), refuses(EFAULT):
        ctx.uffd.raw_ioctl(uapi.UFFDIO_WAKE, 0)


@uffd_case("wake-errors-keep-asleep", mem=ALL, pages=2, rows=("WK-01",))
def test_wake_errors_keep_asleep(ctx: Context) -> None:
    """An UFFDIO_WAKE that is refused wakes nobody."""
    page = ctx.dst.page(0)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, page.start):
        for what, bad in bad_ranges(page).items():
            with promise("WK-01", what):
                with refuses(EINVAL):
                    ctx.uffd.wake(bad)
                ctx.uffd.expect_still_asleep(1)
        ctx.uffd.copy(page.start, ctx.src.start, page.len)


@uffd_case("wake-nobody", mem=(ANON,), pages=2, rows=("WK-02",), kind=Kind.DETAIL)
def test_wake_nobody(ctx: Context) -> None:
    """UFFDIO_WAKE succeeds where nobody waits, nothing is registered, or nothing is mapped."""
    with promise("WK-02", "not registered"):
        ctx.uffd.wake(ctx.dst.range)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("WK-02", "nobody waits"):
        ctx.uffd.wake(ctx.dst.range)
    unmap(ctx.dst.range)
    with promise("WK-02", "not mapped"):
        ctx.uffd.wake(ctx.dst.range)


@uffd_case("wake-everything", mem=(ANON,), pages=2, rows=("WK-02",), kind=Kind.DETAIL)
def test_wake_everything(ctx: Context) -> None:
    """UFFDIO_WAKE takes all of user space as one range, and not a page more.

    Kernels before 2026 have that begin at vm.mmap_min_addr.
    """
    end = user_space_end()
    if not end:
        raise Skip("the end of user space cannot be found")
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start), promise("WK-02"):
        ctx.uffd.wake(Range(end - PAGE_SIZE, PAGE_SIZE))
        for bad in (Range(0, end + PAGE_SIZE), Range(end, PAGE_SIZE), Range(end - PAGE_SIZE, 2 * PAGE_SIZE)):
            with refuses(EINVAL):
                ctx.uffd.wake(bad)
        ctx.uffd.expect_still_asleep(1)
        start = lowest_start()
        ctx.uffd.expect_still_asleep(1)
        if start:
            with refuses(EINVAL):
                ctx.uffd.wake(Range(start - PAGE_SIZE, end - start + PAGE_SIZE))
            ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(Range(start, end - start))
        ctx.uffd.wait_fault(ctx.dst.start)
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE)


@uffd_case("wake-refault", mem=ALL, pages=2, rows=("WK-03",))
def test_wake_refault(ctx: Context) -> None:
    """A thread that wakes with its page still missing faults again, and a new message says so."""
    page = ctx.dst.page(0)
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, page.start):
        for _ in range(3):
            ctx.uffd.wake(page)
            ctx.uffd.wait_fault(page.start)
        ctx.uffd.copy(page.start, ctx.src.start, page.len)
    ctx.dst.expect_pattern_of(ctx.src, 0, 1)
    ctx.uffd.expect_no_message()


@uffd_case("wake-unread", mem=ALL, pages=2, rows=("WK-05",), kind=Kind.DETAIL)
def test_wake_unread(ctx: Context) -> None:
    """UFFDIO_WAKE wakes a thread whose message nobody has read yet too; its new fault queues behind the others."""
    first, second = ctx.dst.page(0), ctx.dst.page(1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, first.start, read=False), Waiter(lambda: peek(second.start)):
        eventually(lambda: ctx.uffd.fdinfo.pending == 2, "two messages queued")
        ctx.uffd.wake(first)
        eventually(lambda: ctx.uffd.fdinfo.pending == 2, "two messages queued again")
        with promise("WK-05"):
            ctx.uffd.wait_fault(second.start)
            ctx.uffd.wait_fault(first.start)
            ctx.uffd.expect_no_message()
        ctx.uffd.copy(first.start, ctx.src.start, 2 * ctx.page_size)


@uffd_case("wake-all-of-a-page", mem=ALL, pages=2, rows=("WK-05", "WK-09"), kind=Kind.DETAIL)
def test_wake_all_of_a_page(ctx: Context) -> None:
    """One UFFDIO_WAKE wakes every thread that waits for the page, whether its message was read or not."""
    page = ctx.dst.page(0)
    ctx.uffd.register(ctx.dst.range, MISSING)
    read, unread = partial(faulting, ctx.uffd, page.start), partial(Waiter, partial(peek, page.start))
    with read(), read(), unread(), unread():
        eventually(lambda: ctx.uffd.fdinfo.pending == 2, "two messages queued")
        ctx.uffd.copy(page.start, ctx.src.start, page.len, CopyMode.DONTWAKE)
        with promise("WK-05, WK-09"):
            ctx.uffd.expect_asleep(4)
            ctx.uffd.wake(page)
            ctx.uffd.expect_still_asleep(0)


@uffd_case("wake-beside-unread", mem=ALL, pages=4, rows=("WK-04", "WK-05"), kind=Kind.DETAIL)
def test_wake_beside_unread(ctx: Context) -> None:
    """Of two threads on different pages, one message read and one not, a fill wakes the one it is for, whichever."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for number, when in ((0, "its message read, the other not"), (3, "its message not read, the other read")):
        read, unread = ctx.dst.page(number & 2), ctx.dst.page(number & 2 | 1)
        with faulting(ctx.uffd, read.start) as first, faulting(ctx.uffd, unread.start, read=False) as second:
            with promise("WK-04, WK-05", when):
                ctx.uffd.copy(ctx.dst.page(number).start, ctx.src.start, ctx.page_size)
                (second if number & 1 else first).result()
                ctx.uffd.expect_asleep(1)
            ctx.uffd.copy(ctx.dst.page(number ^ 1).start, ctx.src.start, ctx.page_size)


@uffd_case("wake-other-page", mem=ALL, pages=3, rows=("WK-04",))
def test_wake_other_page(ctx: Context) -> None:
    """UFFDIO_WAKE leaves a thread asleep that waits outside its range."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.page(1).start):
        for number in (0, 2):
            ctx.uffd.wake(ctx.dst.page(number))
            ctx.uffd.expect_asleep(1)
        ctx.uffd.copy(ctx.dst.page(1).start, ctx.src.start, ctx.page_size)


@uffd_case("wake-elsewhere", mem=(ANON,), pages=3, rows=("WK-04",))
def test_wake_elsewhere(ctx: Context) -> None:
    """UFFDIO_WAKE leaves a thread asleep that waits outside its range, however large that is."""
    page = ctx.dst.page(1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, page.start):
        for length in (PAGE_SIZE, FOUR_GIB, FOUR_GIB + PAGE_SIZE, page.start - lowest_start()):
            with promise("WK-04", f"the {length:#x} bytes before the page"):
                ctx.uffd.wake(Range(page.start - length, length))
                ctx.uffd.expect_still_asleep(1)
        ctx.uffd.copy(page.start, ctx.src.start, page.len)


@uffd_case("wake-pages", mem=ALL, pages=4, rows=("WK-03", "WK-04"))
def test_wake_pages(ctx: Context) -> None:
    """UFFDIO_WAKE of several pages wakes the threads of each of them and no others."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1, 2, 3):
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.dst.range.len, CopyMode.DONTWAKE)
        with promise("WK-03, WK-04"):
            ctx.uffd.wake(ctx.dst.page(1, 2))
            ctx.uffd.expect_still_asleep(2)
            ctx.uffd.wake(ctx.dst.page(3))
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.wake(ctx.dst.page(0))
            ctx.uffd.expect_still_asleep(0)


@uffd_case("wake-exact", mem=NOT_HUGETLB, features=Feature.EXACT_ADDRESS, pages=5, rows=("WK-03", "WK-04"))
def test_wake_exact(ctx: Context) -> None:
    """With UFFD_FEATURE_EXACT_ADDRESS the first byte of a page belongs to that page, and the last one too."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for number, touched in ((1, ctx.dst.page(1).start), (3, ctx.dst.page(3).end - 1)):
        page = ctx.dst.page(number)
        with faulting(ctx.uffd, touched, at=touched), promise("WK-03, WK-04", f"byte {touched - page.start:#x}"):
            for other in (number - 1, number + 1):
                ctx.uffd.wake(ctx.dst.page(other))
                ctx.uffd.expect_still_asleep(1)
            ctx.uffd.wake(page)
            ctx.uffd.wait_fault(touched)
            ctx.uffd.copy(page.start, ctx.src.start, page.len)


@uffd_case("wake-wp", mem=ALL, features=WRITEPROTECT, pages=2, rows=("WK-03", "WK-04"))
def test_wake_wp(ctx: Context) -> None:
    """A thread that waits for a write-protected page, and wakes with it still protected, faults again likewise."""
    page, flags = ctx.dst.page(0), PagefaultFlag.WRITE | PagefaultFlag.WP
    ctx.uffd.register(ctx.dst.range, WP)
    poke(page.start, b"\1")
    ctx.uffd.writeprotect(page)
    with faulting(ctx.uffd, page.start, flags=flags, call=lambda: poke(page.start, b"\2")):
        ctx.uffd.wake(ctx.dst.page(1))
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(page)
        ctx.uffd.wait_fault(page.start, flags)
        expect(peek(page.start), b"\1", "WK-03: the byte, still protected")
        ctx.uffd.unprotect(page)
    expect(peek(page.start), b"\2", "the byte written")


@uffd_case(
    "wake-minor",
    mem=(SHMEM, HUGETLB),
    features=Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS,
    pages=2,
    rows=("WK-03", "WK-04"),
)
def test_wake_minor(ctx: Context) -> None:
    """A thread that waits in a minor fault, and wakes with its page still not mapped, faults again likewise."""
    page = ctx.dst.page(0)
    poke(ctx.dst.alias.start, b"\1")
    ctx.uffd.register(ctx.dst.range, MINOR)
    with faulting(ctx.uffd, page.start, flags=PagefaultFlag.MINOR) as waiter:
        ctx.uffd.wake(ctx.dst.page(1))
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(page)
        ctx.uffd.wait_fault(page.start, PagefaultFlag.MINOR)
        ctx.uffd.continue_(page)
        expect(waiter.result(), b"\1", "the byte read")


@uffd_case("wake-other-handle", mem=ALL, pages=2, rows=("WK-02", "WK-04"), kind=Kind.DETAIL)
def test_wake_other_handle(ctx: Context) -> None:
    """UFFDIO_WAKE through another handle wakes nobody."""
    page = ctx.dst.page(0)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with Uffd.open() as other, faulting(ctx.uffd, page.start):
        other.wake(page)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.copy(page.start, ctx.src.start, page.len)


@uffd_case("wake-after-dontwake", mem=ALL, pages=2, rows=("WK-09", "CP-13"))
def test_wake_after_dontwake(ctx: Context) -> None:
    """A page filled with DONTWAKE is there, its thread sleeps on until UFFDIO_WAKE and then faults no more."""
    page = ctx.dst.page(0)
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, page.start):
        ctx.uffd.copy(page.start, ctx.src.start, page.len, CopyMode.DONTWAKE)
        ctx.dst.expect_pattern_of(ctx.src, 0, 1)
        ctx.uffd.expect_asleep(1)
        ctx.uffd.wake(page)
    ctx.uffd.expect_no_message()


@uffd_case("wake-orphaned", mem=(ANON,), pages=2, rows=("WK-06",), kind=Kind.DETAIL)
def test_wake_orphaned(ctx: Context) -> None:
    """UFFDIO_WAKE needs no address space: it succeeds after the process has exited or runs another program."""
    for by_exec in (False, True):
        when = "after exec" if by_exec else "after exit"
        with orphaned(ctx.dst.range, MISSING, by_exec=by_exec) as uffd, promise("WK-06", when):
            uffd.wake(ctx.dst.range)


@uffd_case("wake-unread-event", mem=(ANON,), features=Feature.EVENT_REMOVE, pages=2, rows=("WK-06",), kind=Kind.DETAIL)
def test_wake_unread_event(ctx: Context) -> None:
    """UFFDIO_WAKE does its work while an event waits to be read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start), promise("WK-06"):
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE, CopyMode.DONTWAKE)
        with unread_event(ctx.uffd, ctx.dst.page(1)):
            ctx.uffd.wake(ctx.dst.page(0))
            ctx.uffd.expect_asleep(0)


@uffd_case("wake-hugetlb-part", mem=(HUGETLB, HUGETLB_PRIVATE), pages=1, rows=("WK-07",), kind=Kind.DETAIL)
def test_wake_hugetlb_part(ctx: Context) -> None:
    """A thread that waits for a huge page is found at the start of that page, wherever it touched it."""
    start, touched = ctx.dst.start, ctx.dst.start + 5 * PAGE_SIZE
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, touched, at=start):
        ctx.uffd.wake(Range(touched, PAGE_SIZE))
        ctx.uffd.expect_asleep(1)
        ctx.uffd.wake(Range(start, PAGE_SIZE))
        ctx.uffd.wait_fault(start)
        ctx.uffd.copy(start, ctx.src.start, ctx.page_size)


@uffd_case(
    "wake-hugetlb-exact",
    mem=(HUGETLB, HUGETLB_PRIVATE),
    features=Feature.EXACT_ADDRESS,
    pages=1,
    rows=("WK-08",),
    kind=Kind.DETAIL,
)
def test_wake_hugetlb_exact(ctx: Context) -> None:
    """With UFFD_FEATURE_EXACT_ADDRESS a thread that waits for a huge page is found at the byte it touched."""
    start, touched = ctx.dst.start, ctx.dst.start + 5 * PAGE_SIZE + 7
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, touched, at=touched):
        ctx.uffd.wake(Range(start, PAGE_SIZE))
        ctx.uffd.expect_asleep(1)
        ctx.uffd.wake(Range(start + 5 * PAGE_SIZE, PAGE_SIZE))
        ctx.uffd.wait_fault(touched)
        ctx.uffd.copy(start, ctx.src.start, ctx.page_size)
