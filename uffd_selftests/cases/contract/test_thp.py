# SPDX-License-Identifier: GPL-2.0-only
"""Transparent huge pages: a watched range gets none behind the monitor's back."""

from __future__ import annotations

from errno import EBUSY, EINVAL
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ANON, MISSING, PAGE_SIZE, SHMEM, Advice, Area, Context, PagefaultFlag, Pagemap, advise, collapse, expect, fails,
    faulting, peek, pmd_mapped, pmd_size, poke, promise, require_collapse, small_area, touch, uapi, undisturbed,
)  # fmt: skip


def empty_area(ctx: Context) -> Area:
    """Map an area, watched for missing pages, that the first access would fill with a transparent huge page."""
    area = ctx.allocate(pmd_size() // PAGE_SIZE)
    advise(area.range, Advice.HUGEPAGE)
    ctx.uffd.register(area.range, MISSING)
    return area


def present(area: Area) -> list[int]:
    """Return which pages of an area are mapped."""
    return [page for page, entry in enumerate(Pagemap.entries(area.range)) if entry & uapi.PM_PRESENT]


@uffd_case("thp-missing", mem=(ANON, SHMEM), needs=("thp",), pages=1, rows=("TH-01",))
def test_thp_missing(ctx: Context) -> None:
    """Where a huge page could be had each base page is reported, and filled, by itself."""
    ctx.src.fill()
    data = peek(ctx.src.start + 9)
    for what, access, flags in (
        ("read", peek, PagefaultFlag(0)),
        ("write", partial(poke, data=data), PagefaultFlag.WRITE),
    ):
        area = empty_area(ctx)
        with promise("TH-01", what):
            for page in (7, 8, 0, area.nr_pages - 1):
                start = area.page(page).start
                with faulting(ctx.uffd, start + 9, call=partial(access, start + 9), flags=flags):
                    ctx.uffd.copy(start, ctx.src.start, PAGE_SIZE)
            expect(present(area), [0, 7, 8, area.nr_pages - 1], "pages that are mapped")
            expect(pmd_mapped(area.range), 0, "bytes mapped by huge pages")
            ctx.src.pattern.verify(area.page(7).start, 0, 1, what="page 7")
    ctx.uffd.expect_no_message()


@uffd_case("thp-fill", mem=(ANON,), needs=("thp",), pages=1, rows=("TH-01",))
def test_thp_fill(ctx: Context) -> None:
    """A range that is filled at once is filled with the data to the last byte, in whatever pages."""
    source = small_area(ctx)
    area = empty_area(ctx)
    ctx.uffd.copy(area.start, source.start, area.range.len)
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(source))


@uffd_case(
    "thp-collapse-hole", mem=(ANON, SHMEM), needs=("thp",), pages=1, rows=("TH-02",), bugs=(55,), kind=Kind.DETAIL
)
def test_thp_collapse_hole(ctx: Context) -> None:
    """MADV_COLLAPSE is EBUSY (before Linux 6.4 EINVAL) where a watched page is missing, and the page stays missing."""
    require_collapse(ctx)
    ctx.src.fill()
    for number in (0, 7, pmd_size() // PAGE_SIZE - 1):
        area = small_area(ctx)
        hole = area.page(number)
        advise(hole, Advice.REMOVE if ctx.mem.shared else Advice.DONTNEED)
        ctx.uffd.register(area.range, MISSING)
        with promise("TH-02", f"page {number} missing"):
            with fails(EBUSY, EINVAL):
                collapse(area.range)
            expect(pmd_mapped(area.range), 0, "bytes mapped by huge pages")
            with faulting(ctx.uffd, hole.start):
                ctx.uffd.copy(hole.start, ctx.src.start, PAGE_SIZE)
        area.pattern.verify(area.start, 0, number)
        area.pattern.verify(area.start, number + 1, area.nr_pages - number - 1)


@uffd_case("thp-collapse", mem=(ANON, SHMEM), needs=("thp",), pages=1, rows=("TH-03",), kind=Kind.DETAIL)
def test_thp_collapse(ctx: Context) -> None:
    """MADV_COLLAPSE of a watched range with every page there makes a huge page of it, which nobody is told."""
    require_collapse(ctx)
    area = small_area(ctx)
    ctx.uffd.register(area.range, MISSING)
    with promise("TH-03"):
        collapse(area.range)
    expect(pmd_mapped(area.range), area.range.len, "bytes mapped by huge pages")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))
    undisturbed(ctx.uffd, partial(touch, area.range, PAGE_SIZE, write=True))
