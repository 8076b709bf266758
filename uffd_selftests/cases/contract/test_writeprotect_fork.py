# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_WRITEPROTECT and fork(2): what of the protection a child has, and that its pages stay its own."""

from __future__ import annotations

from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, NEW, PRIVATE, TRAPPED, WP, WRITEPROTECT, Action, Area, Channel, Child, Context, Fault, Feature, Forked,
    Pagemap, eventually, expect, expect_trapped, filled, huge_area, mend, peek, poke, registered_for_wp, touch,
    undisturbed,
)  # fmt: skip


def expect_free_in_child(ctx: Context, area: Area, *pages: int) -> None:
    """Fork a child, in which nothing is protected or registered; it writes NEW to the start of each page."""

    def child(channel: Channel) -> None:
        Pagemap.expect_protected(area, (), "in the child")
        expect(registered_for_wp(area.range), False, "whether the child's memory is registered")
        for page in pages:
            poke(area.page(page).start, NEW)
        channel.send()

    with Child(child) as process:
        process.receive()
    ctx.uffd.expect_no_message()


@uffd_case("writeprotect-fork", mem=ALL, features=WRITEPROTECT, pages=2, spare_hugepages=4, rows=("WP-18",), bugs=(58,))
def test_writeprotect_fork(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_FORK a child writes freely where its parent stays trapped."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.range)
    expect_free_in_child(ctx, area, 0)
    Pagemap.expect_protected(area, {0, 1}, "in the parent")
    seen = peek(area.start, len(NEW)) == NEW
    expect(seen, ctx.mem.shared, "whether the parent sees what the child wrote")
    expect_trapped(ctx.uffd, area, 0, 1)
    mend(ctx, area, 0, 1)
    area.expect_pattern_of(area)


@uffd_case(
    "writeprotect-fork-missing",
    mem=ALL,
    features=WRITEPROTECT | Feature.WP_UNPOPULATED,
    pages=3,
    spare_hugepages=4,
    rows=("WP-18",),
    bugs=(20,),
)
def test_writeprotect_fork_missing(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_FORK a child writes freely to pages that its parent protected while missing."""
    area = ctx.dst
    area.fill(2, 1)  # where no page is private, fork does not copy page tables
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(0, 2))
    expect_free_in_child(ctx, area, 0)
    Pagemap.expect_protected(area, {0, 1}, "in the parent")
    expect_trapped(ctx.uffd, area, 0, 1)


@uffd_case(
    "writeprotect-fork-event",
    mem=ALL,
    features=WRITEPROTECT | Feature.EVENT_FORK,
    pages=2,
    spare_hugepages=4,
    rows=("WP-19",),
)
def test_writeprotect_fork_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_FORK a child is trapped where its parent is, and its own descriptor says so."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0))

    def child(channel: Channel) -> None:
        Pagemap.expect_protected(area, {0}, "in the child")
        expect(registered_for_wp(area.range), True, "whether the child's memory is registered")
        touch(area.page(1), area.page_size, write=True)
        poke(area.start, NEW)
        channel.send()

    with ctx.handler(src=None, wp=Action.RECORD) as handler, Child(child) as process:
        eventually(lambda: handler.stats.wp > 0, "a write-protect fault of the child")
        forked = handler.only_child
        expect(handler.messages, [Forked(forked.fd), Fault(area.start, TRAPPED)], "messages")
        forked.expect_asleep(1)
        ctx.uffd.expect_asleep(0)
        forked.unprotect(area.page(0))
        process.receive()
    Pagemap.expect_protected(area, {0}, "in the parent")
    seen = peek(area.start, len(NEW)) == NEW
    expect(seen, ctx.mem.shared, "whether the parent sees what the child wrote")
    expect_trapped(ctx.uffd, area, 0)
    mend(ctx, area, 0)
    area.expect_pattern_of(area)


@uffd_case(
    "writeprotect-fork-event-missing",
    mem=ALL,
    features=WRITEPROTECT | Feature.WP_UNPOPULATED | Feature.EVENT_FORK,
    pages=3,
    spare_hugepages=4,
    rows=("WP-19",),
)
def test_writeprotect_fork_event_missing(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_FORK pages that the parent protected while missing are protected in the child, too."""
    area = ctx.dst
    area.fill(2, 1)  # where no page is private, fork does not copy page tables
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(0, 2))
    look = partial(Pagemap.expect_protected, area, {0, 1})
    with ctx.handler(src=None), Child(lambda _: look("in the child")):
        pass
    look("in the parent")


@uffd_case(
    "writeprotect-fork-copy",
    mem=PRIVATE,
    features=WRITEPROTECT,
    pages=2,
    spare_hugepages=4,
    rows=("WP-33",),
    kind=Kind.DETAIL,
)
def test_writeprotect_fork_copy(ctx: Context) -> None:
    """A writer that was trapped on a page shared with a child writes to a copy; the child keeps the page as it was."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0))

    def child(channel: Channel) -> None:
        channel.receive()
        area.expect_pattern_of(area)

    with Child(child) as process:
        expect_trapped(ctx.uffd, area, 0)
        process.send()
    mend(ctx, area, 0)
    area.expect_pattern_of(area)


@uffd_case(
    "writeprotect-thp-fork",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-18",),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_fork(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_FORK a child writes freely to a huge page that its parent protected."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    expect_free_in_child(ctx, area, 0, 7)
    Pagemap.expect_protected(area, range(area.nr_pages), "in the parent")
    area.expect_pattern_of(area)
    expect_trapped(ctx.uffd, area, 7)


@uffd_case(
    "writeprotect-thp-fork-copy",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-33",),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_fork_copy(ctx: Context) -> None:
    """A huge page shared with a child, protected and un-protected whole, is not the writer's own: the child's stays."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)

    def child(channel: Channel) -> None:
        channel.receive()
        area.expect_pattern_of(area)

    with Child(child) as process:
        ctx.uffd.writeprotect(area.range)
        ctx.uffd.unprotect(area.range)
        undisturbed(ctx.uffd, partial(poke, area.page(7).start, NEW))
        process.send()
    expect(peek(area.page(7).start, len(NEW)), NEW, "what was written")


@uffd_case(
    "writeprotect-thp-fork-event",
    mem=(ANON,),
    features=WRITEPROTECT | Feature.EVENT_FORK,
    needs=("thp",),
    pages=1,
    rows=("WP-19",),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_fork_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_FORK a huge page that the parent protected is protected in the child."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    look = partial(Pagemap.expect_protected, area, range(area.nr_pages))
    with ctx.handler(src=None, where=area.range), Child(lambda _: look("in the child")):
        pass
    look("in the parent")
