# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_WRITEPROTECT of transparent huge pages: protected whole and in part, split, and made meanwhile."""

from __future__ import annotations

from contextlib import suppress
from errno import EINVAL
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ANON, MISSING, NEW, PAGE_SIZE, PROT_READ, PROT_WRITE, SHMEM, TRAPPED, WP, WRITEPROTECT, Advice, Context, Feature,
    KernelError, Pagemap, Skip, advise, collapse, expect, expect_free, expect_trapped, fails, faulting, huge_area, peek,
    pmd_mapped, pmd_size, poke, promise, protect, require_collapse, small_area, trapped, undisturbed,
)  # fmt: skip


# ---- huge pages ----------------------------------------------------------------------------------------------------


@uffd_case(
    "writeprotect-thp-part",
    mem=(ANON, SHMEM),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-24",),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_part(ctx: Context) -> None:
    """One base page of a transparent huge page is protected alone; its neighbours stay free."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(7))
    Pagemap.expect_protected(area, {7}, "after protecting page 7")
    expect_free(ctx.uffd, area, 0, 6, 8, area.nr_pages - 1)
    expect_trapped(ctx.uffd, area, 7)
    area.expect_pattern_of(area, 0, 7)
    area.expect_pattern_of(area, 8)


@uffd_case(
    "writeprotect-thp",
    mem=(ANON, SHMEM),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-25",),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp(ctx: Context) -> None:
    """A transparent huge page protected whole traps by base page, and base page by base page it is un-protected."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    Pagemap.expect_protected(area, range(area.nr_pages), "of a huge page")
    with promise("WP-25", "read"):
        undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))
    page = area.page(7)
    write = partial(poke, page.start + 9, NEW)
    with faulting(ctx.uffd, page.start + 9, call=write, flags=TRAPPED) as waiter:
        waiter.expect_sleeping()  # a writer that the kernel lets try again and again is on the list, too, now and then
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.unprotect(page)
    Pagemap.expect_protected(area, set(range(area.nr_pages)) - {7}, "after un-protecting page 7")
    expect_trapped(ctx.uffd, area, 0, 6, 8, area.nr_pages - 1)
    ctx.uffd.unprotect(area.range)
    Pagemap.expect_protected(area, (), "after un-protecting the rest")
    area.expect_pattern_of(area, 9, area.nr_pages - 10)


@uffd_case(
    "writeprotect-thp-whole",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-25",),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_whole(ctx: Context) -> None:
    """A writer to a huge page that is protected and un-protected whole goes on, and the whole page is free."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    with trapped(ctx.uffd, area, 7):
        ctx.uffd.unprotect(area.range)
        Pagemap.expect_protected(area, (), "after un-protecting the huge page")
    expect_free(ctx.uffd, area, 0, 8, area.nr_pages - 1)
    area.expect_pattern_of(area, 0, 7)
    area.expect_pattern_of(area, 8)


@uffd_case(
    "writeprotect-thp-mprotect",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-20", "WP-25"),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_mprotect(ctx: Context) -> None:
    """A huge page that mprotect(2) makes read-only and writable again is protected as it was."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    protect(area.range, PROT_READ)
    protect(area.range, PROT_READ | PROT_WRITE)
    expect(pmd_mapped(area.range), area.range.len, "bytes mapped by a huge page")
    Pagemap.expect_protected(area, range(area.nr_pages), "after mprotect back")
    expect_trapped(ctx.uffd, area, 7, 0)


@uffd_case(
    "writeprotect-thp-split",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-24", "REG-40"),
    bugs=(61,),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_split(ctx: Context) -> None:
    """A huge page that the kernel splits stays protected and there, with the unused parts that become zero pages.

    MADV_COLD of a part splits it; since Linux 6.12 a page that holds zeros alone is then given up.
    """
    area, used = ctx.allocate(pmd_size() // PAGE_SIZE), (3, 9)
    advise(area.range, Advice.HUGEPAGE)
    for page in used:
        poke(area.page(page).start, NEW)
    if pmd_mapped(area.range) < area.range.len:
        raise Skip("no transparent huge page to be had: is memory short or fragmented?")
    ctx.uffd.register(area.range, MISSING | WP)
    ctx.uffd.writeprotect(area.range)
    advise(area.page(used[0]), Advice.COLD)
    Pagemap.expect_protected(area, range(area.nr_pages), "after MADV_COLD of one page")
    undisturbed(ctx.uffd, lambda: area.expect_zero(10))
    expect([peek(area.page(page).start, len(NEW)) for page in used], [NEW, NEW], "what was written before")
    expect_trapped(ctx.uffd, area, 0, *used, area.nr_pages - 1)


@uffd_case(
    "writeprotect-thp-zeropage",
    mem=(ANON,),
    features=Feature.PAGEFAULT_FLAG_WP,
    needs=("thp",),
    pages=1,
    rows=("WP-13", "WP-25"),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_zeropage(ctx: Context) -> None:
    """The huge zero page is protected whole and in part like any other, and traps by base page."""
    for whole in (True, False):
        area = ctx.allocate(pmd_size() // PAGE_SIZE)
        advise(area.range, Advice.HUGEPAGE)
        area.expect_zero()
        ctx.uffd.register(area.range, WP)
        ctx.uffd.writeprotect(area.range if whole else area.page(7))
        protected = set(range(area.nr_pages)) if whole else {7}
        Pagemap.expect_protected(area, protected, "of zero pages")
        expect_trapped(ctx.uffd, area, 7)
        Pagemap.expect_protected(area, protected - {7}, "after un-protecting page 7")
        (expect_trapped if whole else expect_free)(ctx.uffd, area, 8)
        area.expect_zero(9)


# ---- MADV_COLLAPSE -------------------------------------------------------------------------------------------------


@uffd_case(
    "writeprotect-collapse",
    mem=(ANON, SHMEM),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-26",),
    bugs=(30,),
    kind=Kind.DETAIL,
)
def test_writeprotect_collapse(ctx: Context) -> None:
    """MADV_COLLAPSE refuses a range with a protected page, which stays protected."""
    require_collapse(ctx)
    area = small_area(ctx)
    ctx.uffd.register(area.range, WP)
    for number in (0, 7, area.nr_pages - 1):
        ctx.uffd.writeprotect(area.page(number))
        with promise("WP-26", f"page {number} protected"), fails(EINVAL):
            collapse(area.range)
        advise(area.range, Advice.NOHUGEPAGE)
        Pagemap.expect_protected(area, {number}, "after MADV_COLLAPSE")
        expect_trapped(ctx.uffd, area, number)
    area.expect_pattern_of(area, 1, 6)


@uffd_case(
    "writeprotect-collapse-missing",
    mem=(ANON,),
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED,
    needs=("thp",),
    pages=1,
    rows=("WP-26",),
    kind=Kind.DETAIL,
)
def test_writeprotect_collapse_missing(ctx: Context) -> None:
    """MADV_COLLAPSE refuses a range with a page that is protected though not there, which stays protected."""
    require_collapse(ctx)
    area = small_area(ctx)
    advise(area.page(7), Advice.DONTNEED)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(7))
    with promise("WP-26"), fails(EINVAL):
        collapse(area.range)
    Pagemap.expect_protected(area, {7}, "after MADV_COLLAPSE")
    expect_trapped(ctx.uffd, area, 7)


@uffd_case(
    "writeprotect-collapse-file",
    mem=(SHMEM,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-26",),
    kind=Kind.DETAIL,
)
def test_writeprotect_collapse_file(ctx: Context) -> None:
    """Whatever MADV_COLLAPSE makes of a file, a range watched for writes maps it by base page, protected as before."""
    require_collapse(ctx)
    area = small_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(7))
    with suppress(KernelError):
        collapse(area.range)
    expect(pmd_mapped(area.range), 0, "bytes mapped by huge pages")
    Pagemap.expect_protected(area, {7}, "after MADV_COLLAPSE")
    expect_free(ctx.uffd, area, 0, area.nr_pages - 1)
    expect_trapped(ctx.uffd, area, 7)
    area.expect_pattern_of(area, 8)
