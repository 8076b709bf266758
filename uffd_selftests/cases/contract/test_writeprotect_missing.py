# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_WRITEPROTECT of pages that are not there: which are protected, and how pagemap shows them."""

from __future__ import annotations

from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, FILE_BACKED, MAP_SHARED, MISSING, NEW, PAGE_SIZE, SHMEM, SHMEM_PRIVATE, TRAPPED, WP, WRITEPROTECT,
    Advice, Context, CopyMode, Feature, PagefaultFlag, Pagemap, Range, advise, expect, expect_free, expect_trapped,
    faulting, map_memory, mend, peek, poke, promise, uapi, undisturbed, unmap,
)  # fmt: skip


@uffd_case("writeprotect-missing-anon", mem=(ANON,), features=Feature.PAGEFAULT_FLAG_WP, pages=4, rows=("WP-11",))
def test_writeprotect_missing_anon(ctx: Context) -> None:
    """Without UFFD_FEATURE_WP_UNPOPULATED protecting anonymous memory passes over pages that are not there."""
    area = ctx.dst
    area.fill(1, 2)
    ctx.uffd.register(area.range, WP)
    advise(area.page(2), Advice.DONTNEED)
    ctx.uffd.writeprotect(area.range)
    Pagemap.expect_protected(area, {1}, "of pages that are not there but for page 1")
    expect_free(ctx.uffd, area, 0, 2, 3)
    Pagemap.expect_protected(area, {1}, "after writes to the others")
    expect_trapped(ctx.uffd, area, 1)


def expect_missing_protected(ctx: Context) -> None:
    """Protect pages 1 and 2 of an untouched area: page 1 is written first, page 2 read first."""
    area, uffd = ctx.dst, ctx.uffd
    uffd.register(area.range, WP)
    uffd.writeprotect(area.page(1, 2))
    Pagemap.expect_protected(area, {1, 2}, "of pages that are not there")
    with promise("write"):
        expect_trapped(uffd, area, 1)
    with promise("read, then write"):
        undisturbed(uffd, lambda: area.expect_zero(2, 1))
        Pagemap.expect_protected(area, {2}, "after a read")
        expect_trapped(uffd, area, 2)
    expect_free(uffd, area, 0, 3)
    for page in (1, 2):
        poke(area.page(page).start, bytes(len(NEW)))
    area.expect_zero()


@uffd_case(
    "writeprotect-missing-marked",
    mem=(ANON,),
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED,
    pages=4,
    rows=("WP-12",),
)
def test_writeprotect_missing_marked(ctx: Context) -> None:
    """With UFFD_FEATURE_WP_UNPOPULATED anonymous pages that are not there are protected too; a read leaves them so."""
    expect_missing_protected(ctx)


@uffd_case("writeprotect-missing-file", mem=FILE_BACKED, features=WRITEPROTECT, pages=4, rows=("WP-14",))
def test_writeprotect_missing_file(ctx: Context) -> None:
    """Pages of shared memory and huge pages that are not there are protected like those that are."""
    expect_missing_protected(ctx)


@uffd_case("writeprotect-missing-dropped", mem=FILE_BACKED, features=WRITEPROTECT, pages=3, rows=("WP-14",))
def test_writeprotect_missing_dropped(ctx: Context) -> None:
    """Un-protecting a page that is not there leaves nothing behind."""
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    ctx.uffd.unprotect(ctx.dst.page(1))
    Pagemap.expect_protected(ctx.dst, {0, 2}, "after un-protecting page 1")
    expect_free(ctx.uffd, ctx.dst, 1)
    Pagemap.expect_protected(ctx.dst, {0, 2}, "after a write to page 1")


@uffd_case("writeprotect-cached", mem=FILE_BACKED, features=WRITEPROTECT, pages=3, spare_hugepages=3, rows=("WP-14",))
def test_writeprotect_cached(ctx: Context) -> None:
    """A page in the page cache that is not mapped is protected; a reader sees the file's data, a writer is trapped."""
    area = ctx.dst
    elsewhere = Range(map_memory(area.range.len, flags=MAP_SHARED, fd=area.fd or 0), area.range.len)
    area.pattern.fill(elsewhere.start, 0, 3)
    unmap(elsewhere)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(0, 2))
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area, 1, 1))
    Pagemap.expect_protected(area, {0, 1}, "after a read of page 1")
    expect_trapped(ctx.uffd, area, 0, 1)
    expect_free(ctx.uffd, area, 2)
    mend(ctx, area, 0, 1)
    area.expect_pattern_of(area)


@uffd_case("writeprotect-zeropage", mem=(ANON,), features=Feature.PAGEFAULT_FLAG_WP, pages=3, rows=("WP-13",))
def test_writeprotect_zeropage(ctx: Context) -> None:
    """An anonymous page that was only read so far, the zero page, is protected, and keeps out of the writer's way."""
    area = ctx.dst
    area.expect_zero()
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(1))
    Pagemap.expect_protected(area, {1}, "of zero pages")
    expect_trapped(ctx.uffd, area, 1)
    area.expect_zero(0, 1)
    area.expect_zero(2, 1)
    expect_free(ctx.uffd, area, 0, 2)
    poke(area.page(1).start, bytes(len(NEW)))
    area.expect_zero()


@uffd_case(
    "writeprotect-missing-registered",
    mem=ALL,
    features=WRITEPROTECT | Feature.WP_UNPOPULATED,
    pages=2,
    rows=("WP-22",),
    kind=Kind.DETAIL,
)
def test_writeprotect_missing_registered(ctx: Context) -> None:
    """A write to a page both missing and protected is a missing fault first, then a write-protect fault."""
    area, page = ctx.dst, ctx.dst.page(0)
    ctx.src.fill()
    ctx.uffd.register(area.range, MISSING | WP)
    ctx.uffd.writeprotect(page)
    Pagemap.expect_protected(area, {0}, "of a page that is not there")
    write = partial(poke, page.start, peek(ctx.src.start, 8))
    with faulting(ctx.uffd, page.start, call=write, flags=PagefaultFlag.WRITE):
        ctx.uffd.copy(page.start, ctx.src.start, page.len, CopyMode.WP)
        ctx.uffd.wait_fault(page.start, TRAPPED)
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_protected(area, {0}, "after UFFDIO_COPY with WP")
        ctx.uffd.unprotect(page)
    area.expect_pattern_of(ctx.src, 0, 1)
    ctx.uffd.expect_no_message()


@uffd_case(
    "writeprotect-tables", mem=(ANON, SHMEM), features=WRITEPROTECT | Feature.WP_UNPOPULATED, pages=1, rows=("WP-14",)
)
def test_writeprotect_tables(ctx: Context) -> None:
    """Pages are protected where no page table exists yet, in as many tables as it takes."""
    per_table = PAGE_SIZE // 8
    area = ctx.allocate(2 * per_table + 2)
    ctx.uffd.register(area.range, WP)
    inside = range(per_table - 1, 2 * per_table + 1)
    ctx.uffd.unprotect(area.range)
    ctx.uffd.writeprotect(area.page(inside.start, len(inside)))
    Pagemap.expect_protected(area, inside, "of pages in three page tables")
    expect_trapped(ctx.uffd, area, inside.start, inside.stop - 1)
    expect_free(ctx.uffd, area, inside.start - 1, inside.stop)


# ---- pagemap -------------------------------------------------------------------------------------------------------


SHOWN_AS_SWAPPED = Defect(
    id="D-WP-32",
    summary="pagemap shows a page that is protected but not there as swapped out, though nothing is in swap",
    kernels="6.12.117, 6.18.44, 7.3.4",
    advice="do not take PM_SWAP, or PAGE_IS_SWAPPED, of a page with PM_UFFD_WP for a sign of swapping",
    shows=r"PM_SWAP in the page's entry: expected 0, got PM_SWAP",
)


def protect_missing(ctx: Context) -> int:
    """Protect a page that is not there; return its entry in pagemap."""
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.page(0))
    return Pagemap.entry(ctx.dst.start)


@uffd_case(
    "writeprotect-missing-swapped",
    mem=(ANON, SHMEM, SHMEM_PRIVATE),
    features=WRITEPROTECT | Feature.WP_UNPOPULATED,
    pages=2,
    rows=("WP-32",),
    defect=SHOWN_AS_SWAPPED,
)
def test_writeprotect_missing_swapped(ctx: Context) -> None:
    """A page that is protected but not there does not show as swapped out in pagemap."""
    expect(uapi.PagemapBit(protect_missing(ctx)) & uapi.PM_SWAP, uapi.PagemapBit(0), "PM_SWAP in the page's entry")


@uffd_case(
    "writeprotect-missing-shown",
    mem=ALL,
    features=WRITEPROTECT | Feature.WP_UNPOPULATED,
    pages=2,
    rows=("WP-32",),
    kind=Kind.DETAIL,
)
def test_writeprotect_missing_shown(ctx: Context) -> None:
    """A page that is protected but not there has PM_UFFD_WP in pagemap, maybe PM_SWAP, and neither PRESENT nor FILE."""
    state = uapi.PM_UFFD_WP | uapi.PM_SWAP | uapi.PM_PRESENT | uapi.PM_FILE | uapi.PM_GUARD
    shown = uapi.PagemapBit(protect_missing(ctx) & state)
    accepted = [uapi.PM_UFFD_WP] if ctx.mem.hugetlb else [uapi.PM_UFFD_WP, uapi.PM_UFFD_WP | uapi.PM_SWAP]
    if shown not in accepted:
        raise AssertionError(f"expected {' or '.join(map(str, accepted))} in the page's entry, got {shown}")
