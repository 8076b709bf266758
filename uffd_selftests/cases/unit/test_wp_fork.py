# SPDX-License-Identifier: GPL-2.0-only
"""What becomes of write protection in a forked child: kept with UFFD_FEATURE_EVENT_FORK, dropped without."""

from __future__ import annotations

from contextlib import suppress

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, WP, WRITEPROTECT, Advice, Channel, Child, Context, Feature, KernelError, Pagemap, advise, expect, pinned, poke,
)  # fmt: skip


def expect_in_child(ctx: Context, when: str, *, pin: bool = False) -> None:
    """Fork a child, which looks for the mark of page 0 in its own pagemap, with a pin of its own if asked."""
    address = ctx.dst.start
    inherited = Feature.EVENT_FORK in ctx.features

    def look(_: Channel) -> None:
        if pin:
            with pinned(ctx.dst.page(0)):
                Pagemap.expect_uffd_wp(address, inherited, when)
        else:
            Pagemap.expect_uffd_wp(address, inherited, when)

    if not inherited:
        with Child(look):
            return
    with ctx.handler(src=None) as handler, Child(look):
        pass
    expect((handler.stats.messages, handler.stats.fork), (1, 1), "messages, UFFD_EVENT_FORK among them")


def protect_page(ctx: Context) -> None:
    """Fill page 0 and protect it."""
    ctx.uffd.register(ctx.dst.range, WP)
    poke(ctx.dst.start, b"\1")
    ctx.uffd.writeprotect(ctx.dst.page(0))
    Pagemap.expect_uffd_wp(ctx.dst.start, True, "after UFFDIO_WRITEPROTECT")


def wp_fork(ctx: Context) -> None:
    """Fork with a protected page present, and again with it zapped or swapped out."""
    protect_page(ctx)
    expect_in_child(ctx, "in the child, of a present page")

    if ctx.mem.shared:
        advise(ctx.dst.page(0), Advice.DONTNEED)  # zaps the entry, the page stays in the page cache
    else:
        with suppress(KernelError):  # there may be no swap, and hugetlb has none
            advise(ctx.dst.page(0), Advice.PAGEOUT)
    Pagemap.expect_uffd_wp(ctx.dst.start, True, "after the page was zapped or swapped out")
    expect_in_child(ctx, "in the child, of a zapped or swapped-out page")

    ctx.uffd.unprotect(ctx.dst.page(0))
    Pagemap.expect_uffd_wp(ctx.dst.start, False, "after un-protecting it there")
    poke(ctx.dst.start, b"\2")
    Pagemap.expect_uffd_wp(ctx.dst.start, False, "after a write that nobody resolved")


def wp_fork_pin(ctx: Context) -> None:
    """Fork with the protected page pinned (a private one is copied at once), then pin it in the child (unshared)."""
    protect_page(ctx)
    with pinned(ctx.dst.page(0)):
        expect_in_child(ctx, "in the child, of a page pinned at fork")
    expect_in_child(ctx, "in the child, of a page pinned there", pin=True)


@uffd_case("wp-fork", mem=ALL, features=WRITEPROTECT, pages=2, rows=("WP-15", "WP-18", "WP-23"), bugs=(20, 21, 58))
def test_wp_fork(ctx: Context) -> None:
    """Write protection does not reach a child forked without UFFD_FEATURE_EVENT_FORK."""
    wp_fork(ctx)


@uffd_case(
    "wp-fork-with-event",
    mem=ALL,
    features=WRITEPROTECT | Feature.EVENT_FORK,
    pages=2,
    rows=("WP-15", "WP-19", "WP-23"),
    bugs=(21,),
)
def test_wp_fork_with_event(ctx: Context) -> None:
    """Write protection is inherited by a child forked with UFFD_FEATURE_EVENT_FORK."""
    wp_fork(ctx)


@uffd_case(
    "wp-fork-pin",
    mem=ALL,
    features=WRITEPROTECT,
    needs=("gup_test",),
    pages=2,
    spare_hugepages=2,
    rows=("WP-35",),
    bugs=(21, 58),
)
def test_wp_fork_pin(ctx: Context) -> None:
    """Write protection of a pinned page does not reach a child forked without UFFD_FEATURE_EVENT_FORK."""
    wp_fork_pin(ctx)


@uffd_case(
    "wp-fork-pin-with-event",
    mem=ALL,
    features=WRITEPROTECT | Feature.EVENT_FORK,
    needs=("gup_test",),
    pages=2,
    spare_hugepages=2,
    rows=("WP-35",),
    bugs=(21, 58),
)
def test_wp_fork_pin_with_event(ctx: Context) -> None:
    """Write protection of a pinned page is inherited by a child forked with UFFD_FEATURE_EVENT_FORK."""
    wp_fork_pin(ctx)
