# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_WAKE: who wakes, who sleeps on, and what a thread does that wakes for nothing."""

from __future__ import annotations

from errno import EFAULT, EINVAL

from uffd_selftests import uapi
from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import MISSING, Context, Uffd, bad_ranges, promise, refuses
from uffd_selftests.mem_types import ALL, ANON, HUGETLB, HUGETLB_PRIVATE
from uffd_selftests.memory import PAGE_SIZE, Range, unmap
from uffd_selftests.processes import Channel, Child, faulting
from uffd_selftests.uapi import CopyMode, Feature


@uffd_case("wake-errors", mem=(ANON,), pages=2, rows=("WK-01",))
def test_wake_errors(ctx: Context) -> None:
    """UFFDIO_WAKE refuses a range that is not whole pages of user space, and an argument it cannot read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for what, bad in bad_ranges(ctx.dst.page(0)).items():
        with promise("WK-01", what), refuses(EINVAL):
            ctx.uffd.wake(bad)
    with promise("WK-01", "argument NULL"), refuses(EFAULT):
        ctx.uffd.raw_ioctl(uapi.UFFDIO_WAKE, 0)


@uffd_case("wake-nobody", mem=(ANON,), pages=2, rows=("WK-02",), kind=Kind.DETAIL)
def test_wake_nobody(ctx: Context) -> None:
    """UFFDIO_WAKE succeeds where nobody waits, nothing is registered, or nothing is mapped."""
    ctx.uffd.wake(ctx.dst.range)
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.wake(ctx.dst.range)
    ctx.uffd.wake(Range(0, 1 << 46))
    unmap(ctx.dst.range)
    ctx.uffd.wake(ctx.dst.range)


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
    """UFFDIO_WAKE wakes a thread whose message nobody has read yet too; its new fault is queued in place of the old."""
    page = ctx.dst.page(0)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, page.start, read=False):
        ctx.uffd.wake(page)
        ctx.uffd.wait_fault(page.start)
        ctx.uffd.expect_no_message()
        ctx.uffd.copy(page.start, ctx.src.start, page.len)


@uffd_case("wake-other-page", mem=ALL, pages=3, rows=("WK-04",))
def test_wake_other_page(ctx: Context) -> None:
    """UFFDIO_WAKE leaves a thread asleep that waits outside its range."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.page(1).start):
        for number in (0, 2):
            ctx.uffd.wake(ctx.dst.page(number))
            ctx.uffd.expect_asleep(1)
        ctx.uffd.copy(ctx.dst.page(1).start, ctx.src.start, ctx.page_size)


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


@uffd_case("wake-dead-target", mem=(ANON,), pages=2, rows=("WK-06",), kind=Kind.DETAIL)
def test_wake_dead_target(ctx: Context) -> None:
    """UFFDIO_WAKE needs no address space: it succeeds after the target has exited."""

    def target(channel: Channel) -> None:
        with Uffd.open() as uffd:
            uffd.register(ctx.dst.range, MISSING)
            channel.send(None, uffd.fd)

    with Child(target) as child:
        _, (fd,) = child.receive_fds()
        child.wait()
        with Uffd(fd) as uffd:
            uffd.wake(ctx.dst.range)


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
