# SPDX-License-Identifier: GPL-2.0-only
"""Protection of pages that the kernel merges, has merged, or makes two of again (KSM)."""

from __future__ import annotations

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, AGAINST_WRITES, ANON, NEW, SYNC_RWP, WRITEPROTECT, Advice, Area, Context, Pagemap, Protection, Skip,
    advise, alike, expect, expect_sweep, faulting, frames, let_merge, merged, merging, peek, poke, undisturbed,
)  # fmt: skip

NEEDS = ("cap_sys_admin", "pagemap")
EQUAL = (1, 2, 4)
"""Pages of six that hold the same."""


def equal_pages(ctx: Context) -> Area:
    """Fill an area of which some pages hold the same as page 1."""
    area = ctx.dst
    area.fill()
    alike(area, EQUAL)
    return area


def expect_contents(area: Area) -> None:
    """Assert what equal_pages() has written, to the last byte."""
    for page in range(area.nr_pages):
        same_as = 1 if page in EQUAL else page
        area.pattern.verify(area.page(page).start - same_as * area.page_size, same_as, 1, what=f"page {page}")


def expect_kept(ctx: Context, area: Area, pages: set[int], guard: Protection) -> None:
    """Assert that just these pages trap, and that all hold what equal_pages() has written."""
    if guard.trapped_read is None:
        undisturbed(ctx.uffd, lambda: expect_contents(area))
        expect_sweep(ctx.uffd, area, pages, guard)
    else:
        expect_sweep(ctx.uffd, area, pages, guard, write=False)
        expect_contents(area)


def merged_area(ctx: Context) -> Area:
    """Return an area of which the kernel has made one page of some; Skip where it does not."""
    area = equal_pages(ctx)
    if not let_merge(area, lambda: merged(area, *EQUAL)):
        raise Skip("the kernel merges no equal pages here")
    return area


# ---- protected, then merged ----------------------------------------------------------------------------------------

MERGED_AWAY = Defect(
    id="D-KS-01",
    summary="a protected page that is merged with an equal one (KSM) loses its protection: nobody is told of writes",
    kernels="6.1.192, 6.12.117, 6.18.15, 7.3.4",
    advice="advise memory that is watched MADV_UNMERGEABLE before it is registered",
    shows=r"after merging: expected PM_UFFD_WP in pagemap on exactly these pages: 1-2, 4-5, got ",
)


def check_merging(ctx: Context, guard: Protection) -> None:
    """Protect equal pages and others, let the kernel merge, and look at each."""
    area, uffd = equal_pages(ctx), ctx.uffd
    uffd.register(area.range, guard.mode)
    pages = {1, 2, 4, 5}
    guard.set(uffd, area, pages)
    Pagemap.expect_protected(area, pages, "before merging")
    with merging(ctx):
        let_merge(area, lambda: merged(area, *EQUAL))
        uffd.expect_no_message()
        Pagemap.expect_protected(area, pages, "after merging")
        expect_kept(ctx, area, pages, guard)


@uffd_case(
    "ksm-merge-writeprotected", mem=(ANON,), features=WRITEPROTECT, needs=NEEDS, pages=6, rows=("KS-01", "WP-38"),
    kind=Kind.DETAIL, defect=MERGED_AWAY,
)  # fmt: skip
def test_ksm_merge_writeprotected(ctx: Context) -> None:
    """Equal pages that are protected against writes stay so when the kernel merges them."""
    check_merging(ctx, AGAINST_WRITES)


@uffd_case(
    "ksm-merge-rwprotected", mem=(ANON,), features=SYNC_RWP, needs=NEEDS, pages=6, rows=("KS-01", "WP-38"),
    kind=Kind.DETAIL, defect=MERGED_AWAY,
)  # fmt: skip
def test_ksm_merge_rwprotected(ctx: Context) -> None:
    """Equal pages that are protected against access stay so when the kernel merges them."""
    check_merging(ctx, AGAINST_ACCESS)


# ---- merged, then protected ----------------------------------------------------------------------------------------


def check_merged(ctx: Context, guard: Protection) -> None:
    """Protect two of three merged pages and another, and access all; then write to one."""
    uffd, pages = ctx.uffd, {1, 4, 5}
    with merging(ctx):
        area = merged_area(ctx)
        uffd.register(area.range, guard.mode)
        guard.set(uffd, area, pages)
        expect(merged(area, *EQUAL), True, "whether the pages are still one, when some are protected")
        Pagemap.expect_protected(area, pages, "after protecting some merged pages")
        if guard.trapped_read is None:
            undisturbed(uffd, lambda: expect_contents(area))
        else:
            expect_sweep(uffd, area, pages, guard, write=False)
            expect(merged(area, *EQUAL), True, "whether the pages are still one, when they were read")
            expect_contents(area)
            guard.set(uffd, area, pages)
        start = area.page(4).start
        with faulting(uffd, start, call=lambda: poke(start, NEW), flags=guard.trapped_write):
            uffd.expect_still_asleep(1)
            guard.lift(uffd, area, (4,))
        Pagemap.expect_protected(area, pages - {4}, "after a write to page 4, which was let go")
        expect(merged(area, 4, 2), False, "whether page 4 is still page 2")
        expect(peek(start, len(NEW)), NEW, "what was written")
        expect(merged(area, 1, 2), True, "whether pages 1 and 2 are still one")
        guard.lift(uffd, area, pages)
        poke(start, peek(area.page(2).start, len(NEW)))
        undisturbed(uffd, lambda: expect_contents(area))


@uffd_case(
    "ksm-page-writeprotected", mem=(ANON,), features=WRITEPROTECT, needs=NEEDS, pages=6, rows=("WP-01", "WP-07"),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_ksm_page_writeprotected(ctx: Context) -> None:
    """A merged page is protected against writes in one place, and free in another."""
    check_merged(ctx, AGAINST_WRITES)


@uffd_case(
    "ksm-page-rwprotected", mem=(ANON,), features=SYNC_RWP, needs=NEEDS, pages=6, rows=("RW-47",), kind=Kind.DETAIL
)
def test_ksm_page_rwprotected(ctx: Context) -> None:
    """A merged page can be protected, traps, and holds what it held when it is let go."""
    check_merged(ctx, AGAINST_ACCESS)


# ---- made two of again ---------------------------------------------------------------------------------------------

STAYS_MERGED = Defect(
    id="D-RW-73",
    summary="MADV_UNMERGEABLE says success, and leaves pages merged that are protected against access",
    kernels="7.3.4",
    advice="resolve the range before MADV_UNMERGEABLE, and protect it again",
    shows=r"whether pages are still one after MADV_UNMERGEABLE: expected False, got True",
)


def check_unmerging(ctx: Context, guard: Protection) -> None:
    """Protect merged pages, and take the permission to merge back."""
    uffd, pages = ctx.uffd, {1, 2, 4, 5}
    with merging(ctx):
        area = merged_area(ctx)
        uffd.register(area.range, guard.mode)
        guard.set(uffd, area, pages)
        undisturbed(uffd, lambda: advise(area.range, Advice.UNMERGEABLE))
        places = frames(area, *EQUAL)
        expect(len(set(places)) < len(EQUAL), False, "whether pages are still one after MADV_UNMERGEABLE")
        Pagemap.expect_protected(area, pages, "after MADV_UNMERGEABLE")
        expect_kept(ctx, area, pages, guard)


@uffd_case(
    "ksm-unmerge-writeprotected", mem=(ANON,), features=WRITEPROTECT, needs=NEEDS, pages=6, rows=("KS-02", "WP-07"),
    bugs=(63,), kind=Kind.DETAIL,
)  # fmt: skip
def test_ksm_unmerge_writeprotected(ctx: Context) -> None:
    """MADV_UNMERGEABLE makes separate pages of merged ones that are protected against writes, and they stay so."""
    check_unmerging(ctx, AGAINST_WRITES)


@uffd_case(
    "ksm-unmerge-rwprotected", mem=(ANON,), features=SYNC_RWP, needs=NEEDS, pages=6, rows=("RW-73",),
    kind=Kind.DETAIL, defect=STAYS_MERGED,
)  # fmt: skip
def test_ksm_unmerge_rwprotected(ctx: Context) -> None:
    """MADV_UNMERGEABLE makes separate pages of merged ones that are protected against access, and they stay so."""
    check_unmerging(ctx, AGAINST_ACCESS)
