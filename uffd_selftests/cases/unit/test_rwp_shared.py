# SPDX-License-Identifier: GPL-2.0-only
"""Read-write protection of pages shared with a child, and of memory that is write-protected already."""

from __future__ import annotations

from errno import EBUSY, EINVAL

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC_RWP, MISSING, NEW, PM_PFN_MASK, READ_TRAPPED, RWP, SYNC_RWP, UNREGISTERED, WP, WRITE_TRAPPED,
    WRITEPROTECT, Action, Channel, Child, Context, Fault, Feature, Forked, Pagemap, eventually, expect, expect_modes,
    expect_rwp_trapped, expect_trapped, mend, peek, pinned, poke, promise, refuses, rwp_protected, rwp_trapped,
    small_pages, swap_out, touch,
)  # fmt: skip


@uffd_case(
    "rwp-fork",
    mem=ALL,
    features=SYNC_RWP | Feature.EVENT_FORK,
    spare_hugepages=4,
    post_alloc=small_pages,
    rows=("RW-53",),
)
def test_rwp_fork(ctx: Context) -> None:
    """A child forked with UFFD_FEATURE_EVENT_FORK is trapped where its parent is, on a descriptor of its own."""
    area = ctx.dst
    half = area.nr_pages // 2
    last = half - 1
    area.fill()
    ctx.uffd.register(area.range, RWP)
    ctx.uffd.rwprotect(area.page(0, half))
    Pagemap.expect_protected(area, range(half), "in the parent, before the fork")

    def child(channel: Channel) -> None:
        Pagemap.expect_protected(area, range(half), "in the child")
        expect_modes(area.range, RWP)
        area.expect_pattern_of(area, half)
        data = peek(area.start, area.page_size)
        expect(data == peek(area.start, area.page_size), True, "whether the first read got the bytes of page 0")
        channel.send()
        poke(area.page(last).start, NEW)
        Pagemap.expect_protected(area, range(1, last), "in the child, of which two pages were resolved")
        channel.send()

    with ctx.handler(src=None, rwp=Action.RECORD) as handler, Child(child) as process:
        eventually(lambda: handler.stats.rwp > 0 or process.ended, "a message of the child's read")
        expect(handler.stats.messages, 2, "UFFD_EVENT_FORK, and messages of the child's read")
        forked = handler.only_child
        forked.expect_asleep(1)
        ctx.uffd.expect_asleep(0)
        forked.resolve(area.page(0))
        process.receive()
        if last:
            eventually(lambda: handler.stats.rwp > 1 or process.ended, "a message of the child's write")
            expect(handler.stats.rwp, 2, "messages of the child's read and of its write")
            forked.resolve(area.page(last))
        process.receive()
        wanted = [Forked(forked.fd), Fault(area.start, READ_TRAPPED), Fault(area.page(last).start, WRITE_TRAPPED)]
        expect(handler.messages, wanted if last else wanted[:2], "messages")
    Pagemap.expect_protected(area, range(half), "in the parent, whose child is gone")
    expect_rwp_trapped(ctx.uffd, area, *{0, last})
    seen = peek(area.page(last).start, len(NEW)) == NEW
    expect(seen, ctx.mem.shared, "whether the parent sees what the child wrote")
    ctx.uffd.resolve(area.range)
    if ctx.mem.shared:
        mend(ctx, area, last)
    area.expect_pattern_of(area)


@uffd_case(
    "rwp-fork-pin",
    mem=(ANON,),
    features=ASYNC_RWP | Feature.EVENT_FORK,
    needs=("gup_test",),
    post_alloc=small_pages,
    rows=("RW-54",),
)
def test_rwp_fork_pin(ctx: Context) -> None:
    """The copy that a child gets of a pinned page is protected as well, until it is read."""
    area = ctx.dst
    area.fill(0, 4)
    ctx.uffd.register(area.range, RWP)

    def frame() -> int:
        return Pagemap.entry(area.page(1).start) & PM_PFN_MASK

    def child(_: Channel) -> None:
        Pagemap.expect_protected(area, {0, 1, 2}, "in the child")
        if own:
            expect(frame() == own, False, "whether the child has the page that its parent has pinned")
        touch(area.page(1), area.page_size)
        Pagemap.expect_protected(area, {0, 2}, "in the child, after a read of the copied page")
        area.expect_pattern_of(area, 0, 4)
        Pagemap.expect_protected(area, (), "in the child, after a read of all")

    with pinned(area.page(1)):
        ctx.uffd.rwprotect(area.page(0, 3))
        Pagemap.expect_protected(area, {0, 1, 2}, "with a page pinned")
        own = frame()  # zero without CAP_SYS_ADMIN
        with ctx.handler(src=None, rwp=Action.RECORD) as handler, Child(child):
            pass
        expect((handler.stats.messages, handler.stats.fork), (1, 1), "messages, UFFD_EVENT_FORK among them")
        expect(frame(), own, "page frame of the pinned page, in the parent")
    Pagemap.expect_protected(area, {0, 1, 2}, "in the parent, whose child is gone")
    area.expect_pattern_of(area, 0, 4)
    Pagemap.expect_protected(area, (), "in the parent, after a read of all")


@uffd_case(
    "rwp-swap-cow", mem=(ANON,), features=SYNC_RWP, needs=("swap",), post_alloc=small_pages, rows=("RW-34", "RW-31")
)
def test_rwp_swap_cow(ctx: Context) -> None:
    """A write to a protected page that is in swap, shared with a child, is reported, and the child keeps the old bytes.

    The page is swapped out before the fork: one that two processes have is not.
    """
    area = ctx.dst
    area.fill(0, 4)
    ctx.uffd.register(area.range, RWP)
    ctx.uffd.rwprotect(area.page(0, 3))
    swap_out(area.page(0, 3))
    Pagemap.expect_protected(area, {0, 1, 2}, "after they were swapped out")

    def child(channel: Channel) -> None:
        channel.receive()
        Pagemap.expect_protected(area, (), "in a child that is not watched")
        area.expect_pattern_of(area, 0, 4)

    with Child(child) as process:
        expect_rwp_trapped(ctx.uffd, area, 0, write=True)
        Pagemap.expect_protected(area, {1, 2}, "after page 0 was written")
        expect_rwp_trapped(ctx.uffd, area, 1)
        with rwp_trapped(ctx.uffd, area, 2, write=True):
            ctx.uffd.expect_asleep(1)
            ctx.uffd.resolve(area.page(2))
        Pagemap.expect_protected(area, (), "after all were accessed")
        process.send()
    ctx.uffd.expect_no_message()
    mend(ctx, area, 0, 2)
    area.expect_pattern_of(area, 0, 4)


@uffd_case(
    "rwp-wp-exclusive", mem=ALL, features=SYNC_RWP | WRITEPROTECT, post_alloc=small_pages, rows=("REG-46", "REG-48")
)
def test_rwp_wp_exclusive(ctx: Context) -> None:
    """Memory is registered for write protection or for read-write protection, never for both, and keeps what it has."""
    area = ctx.dst
    for mode in (WP | RWP, MISSING | WP | RWP):
        with promise("REG-46", f"{mode}"), refuses(EINVAL):
            ctx.uffd.register(area.range, mode)
        expect_modes(area.range, UNREGISTERED)

    rwp_protected(ctx)
    for mode, number in ((WP, EBUSY), (MISSING | WP, EBUSY), (MISSING, EBUSY), (WP | RWP, EINVAL)):
        with promise("REG-48", f"{mode} on {RWP}"), refuses(number):
            ctx.uffd.register(area.range, mode)
    expect_modes(area.range, RWP)
    Pagemap.expect_protected(area, range(area.nr_pages), "after other modes were refused")
    expect_rwp_trapped(ctx.uffd, area, 0, area.nr_pages - 1)

    ctx.uffd.release(area.range)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    for mode, number in ((RWP, EBUSY), (WP | RWP, EINVAL)):
        with promise("REG-48", f"{mode} on {WP}"), refuses(number):
            ctx.uffd.register(area.range, mode)
    expect_modes(area.range, WP)
    Pagemap.expect_protected(area, range(area.nr_pages), "write-protected, after other modes were refused")
    expect_trapped(ctx.uffd, area, 0)
    ctx.uffd.unprotect(area.range)
    mend(ctx, area, 0)
    area.expect_pattern_of(area)
