# SPDX-License-Identifier: GPL-2.0-only
"""PAGEMAP_SCAN over mappings of different modes, and the categories that not every kernel has."""

from __future__ import annotations

from errno import EINVAL
from functools import partial
from signal import SIGSEGV

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ACCESSED, ALL, ANON, ASYNC, MISSING, NONE, NOT_HUGETLB, PAGE_SIZE, PRESENT, PROT_READ, PROT_WRITE, RESTART, SCAN,
    WP, WP_MATCHING, WRITEPROTECT, WRITTEN, Advice, Area, Context, Feature, KernelError, PageCategory, Pagemap,
    PmScanFlag, Range, Scan, Skip, Uffd, advise, errno_name, expect, expect_scan, expect_signals, expect_written,
    fails, keep_small, pages_in, promise, protect, regions, saw, touch, tracked, uapi, undisturbed, unmap, write,
)  # fmt: skip

def written_unwatched(area: Area, page: int) -> bool:
    """Whether a page that is there counts as written where nobody watches it (until Linux 7.2)."""
    return bool(Pagemap.scan(area.page(page), WRITTEN).regions)


@uffd_case(
    "scan-mappings",
    mem=ALL,
    features=ASYNC,
    needs=SCAN,
    pages=12,
    rows=("AS-04", "AS-06", "AS-07", "AS-15"),
    kind=Kind.VERSION,
)
def test_scan_mappings(ctx: Context) -> None:
    """In one scan over mappings of all modes, each page is told by its own mapping, and only tracked ones protected.

    Pages that nobody watches for writes count as written until Linux 7.2, and not since.
    """
    area, uffd = ctx.dst, ctx.uffd
    area.fill()
    with Uffd.open(ASYNC.without(Feature.WP_ASYNC)) as synchronous, Uffd.open(ASYNC) as second:
        uffd.register(area.page(0, 3), WP)
        synchronous.register(area.page(3, 2), MISSING)
        synchronous.register(area.page(5, 2), WP)
        second.register(area.page(8, 4), WP)
        old = written_unwatched(area, 7)
        saw(f"pages that nobody watches {'count' if old else 'do not count'} as written")
        for flags in (PmScanFlag(0), WP_MATCHING):
            uffd.writeprotect(area.page(1))
            synchronous.writeprotect(area.page(6))
            second.unprotect(area.page(8, 4))
            second.writeprotect(area.page(9))
            tracked_pages, unwatched = {0, 2, 8, 10, 11}, {3, 4, 7}
            wanted = tracked_pages if flags else tracked_pages | {5} | (unwatched if old else set())
            found = Pagemap.scan(area.range, WRITTEN, flags=flags)
            with promise("AS-04", str(flags)):
                expect_scan(area, found, Scan(regions(area, wanted), area.range.end), "pages written")
                kept = {1, 6, 9} | (tracked_pages if flags else set())
                Pagemap.expect_protected(area, kept, "after that")
        uffd.unprotect(area.page(0, 3))
        second.unprotect(area.page(8, 4))
        base_pages = area.page_size // PAGE_SIZE
        for pages, expected in ((2, {0, 1}), (3, {0, 1, 2}), (4, {0, 1, 2, 8}), (6, {0, 1, 2, 8, 9, 10})):
            with promise("AS-07", f"{pages} pages at most"):
                limit = pages * base_pages
                found = Pagemap.scan(area.range, WRITTEN, flags=WP_MATCHING, max_pages=limit)
                expect(pages_in(area, found.regions), sorted(expected), "pages written, protecting them")
                Pagemap.expect_protected(area, {6, *expected}, "after that")
            uffd.unprotect(area.page(0, 3))
            second.unprotect(area.page(8, 4))
        found = Pagemap.scan(area.range, WRITTEN, flags=WP_MATCHING, room=1)
        with promise("AS-07", "room for one region"):
            wanted_now = Scan(regions(area, range(3)), area.page(8).start)
            expect_scan(area, found, wanted_now, "pages written, protecting them")
            Pagemap.expect_protected(area, {0, 1, 2, 6}, "after that")


@uffd_case(
    "scan-many-mappings", mem=NOT_HUGETLB, features=ASYNC, needs=SCAN, pages=12, rows=("AS-04", "AS-17", "AS-18")
)
def test_scan_many_mappings(ctx: Context) -> None:
    """A scan joins what it finds across mappings that differ in other ways, and steps over what is not mapped."""
    area, uffd = tracked(ctx), ctx.uffd
    write(uffd, area, *range(12))
    protect(area.page(2, 3), PROT_READ)
    protect(area.page(5), 0)
    unmap(area.page(8, 2))
    whole = set(range(8)) | {10, 11}
    expect_written(area, whole, "AS-04: pages written, in mappings of three protections and beside a gap")
    found = Pagemap.scan(area.page(1, 10), WRITTEN, flags=RESTART)
    wanted = Scan(regions(area, whole - {0, 11}), area.page(11).start)
    expect_scan(area, found, wanted, "AS-04: pages written, protecting them, but for the first and the last")
    marks = Pagemap.have(area.range, uapi.PM_UFFD_WP)
    expect([page for page in range(12) if marks[page]], sorted(whole - {0, 11}), "AS-04: protected pages after that")
    protect(area.page(2, 4), PROT_READ | PROT_WRITE)
    write(uffd, area, 3, 5, 10)
    expect_written(area, {0, 3, 5, 10, 11}, "AS-04: pages written, after writes to three mappings")


# ---- what depends on the kernel ------------------------------------------------------------------------------------


@uffd_case(
    "scan-holes",
    mem=NOT_HUGETLB,
    features=WRITEPROTECT,
    needs=SCAN,
    pages=6,
    rows=("AS-03", "AS-15"),
    kind=Kind.VERSION,
)
def test_scan_holes(ctx: Context) -> None:
    """A hole counts as written where memory is registered for write protection, whether it is tracked or not.

    That is so since Linux 7.3, and nothing counts elsewhere. Before, pages that are there count everywhere, and holes
    may count with them.
    """
    area, there = ctx.dst, {1, 4}
    keep_small(area.range)
    for page in there:
        area.fill(page, 1)
    if ctx.mem is not ANON:  # whatever else was mapped around them
        unmapped = [page for page in range(6) if page not in there]
        for page in unmapped:
            advise(area.page(page), Advice.DONTNEED)
    old = written_unwatched(area, 1)
    saw(f"pages that nobody watches {'count' if old else 'do not count'} as written")
    both = set(range(6))
    for registered in (False, True):
        if registered:
            ctx.uffd.register(area.range, WP)
        for returned in (WRITTEN, WRITTEN | PRESENT):
            found = Pagemap.scan(area.range, WRITTEN, returned=returned)
            seen = set(pages_in(area, found.regions))
            what = f"{'registered for WP' if registered else 'not registered'}, returned {returned}"
            saw(f"{what}: {'holes count as written, too' if seen - there else 'holes do not count as written'}")
            with promise("AS-15", what):
                if old:
                    expect(seen in (there, both), True, f"pages there, or all, are written (found {sorted(seen)})")
                else:
                    expect(sorted(seen), sorted(both if registered else ()), "pages written")
                expect(found.walk_end, area.range.end, "walk_end")


def knows(category: PageCategory) -> bool:
    """Whether PAGEMAP_SCAN takes this category; else it must say EINVAL."""
    try:
        Pagemap.scan(Range(0, 0), category)
    except KernelError as error:
        expect(errno_name(error.errno or 0), "EINVAL", f"errno of a scan for {category}")
        return False
    return True


@uffd_case(
    "scan-categories",
    mem=ALL,
    features=WRITEPROTECT,
    needs=SCAN,
    pages=4,
    rows=("AS-09", "AS-21"),
    kind=Kind.VERSION,
)
def test_scan_categories(ctx: Context) -> None:
    """A category that the kernel has not is EINVAL in every mask; PAGE_IS_ACCESSED is nothing without RWP."""
    area = ctx.dst
    area.fill()
    ctx.uffd.register(area.page(2, 2), WP)
    known = [category for category in (PageCategory.GUARD, ACCESSED) if knows(category)]
    saw(f"PAGEMAP_SCAN knows {', '.join(map(str, known)) or 'neither PAGE_IS_GUARD nor PAGE_IS_ACCESSED'}")
    if Feature.RWP in ctx.uffd.offered:
        expect(ACCESSED in known, True, "AS-09: PAGE_IS_ACCESSED is known where RWP is offered")
    for category in (PageCategory.GUARD, ACCESSED):
        scan = partial(Pagemap.scan, area.range)
        for what, ask, selects in (
            ("category_mask", partial(scan, category), True),
            ("category_anyof_mask", partial(scan, anyof=category), True),
            ("return_mask", partial(scan, returned=category), False),
            ("category_inverted", partial(scan, inverted=category), False),
        ):
            with promise("AS-09", f"{category} in {what}"):
                if category not in known:
                    with fails(EINVAL):
                        ask()
                    continue
                found = ask()
                everything = [] if selects else regions(area, range(4), NONE)
                expect_scan(area, found, Scan(everything, area.range.end), "what the scan found")


@uffd_case("scan-guard", mem=NOT_HUGETLB, features=ASYNC, needs=SCAN, pages=6, rows=("AS-09",), kind=Kind.VERSION)
def test_scan_guard(ctx: Context) -> None:
    """PAGE_IS_GUARD is guard pages and no others, where it is known; a scan that protects leaves them what they are."""
    area, guard = ctx.dst, PageCategory.GUARD
    area.fill()
    try:
        advise(area.page(1, 2), Advice.GUARD_INSTALL)
    except KernelError as error:
        expect(errno_name(error.errno or 0), "EINVAL", "errno of a kernel without MADV_GUARD_INSTALL")
        raise Skip("MADV_GUARD_INSTALL: EINVAL (Linux 6.13, for shared memory 6.15)") from None
    ctx.uffd.register(area.page(1, 5), WP)
    saw(f"PAGE_IS_GUARD is {'known' if knows(guard) else 'not known'}")
    for when in ("before", "after"):
        if knows(guard):
            found = Pagemap.scan(area.range, guard, returned=guard | PRESENT)
            guarded = Scan(regions(area, {1, 2}, guard), area.range.end)
            expect_scan(area, found, guarded, f"guard pages, {when} protecting")
            found = Pagemap.scan(area.range, guard, inverted=guard, returned=guard | PRESENT)
            rest = Scan(regions(area, {0, 3, 4, 5}, PRESENT), area.range.end)
            expect_scan(area, found, rest, f"other pages, {when} protecting")
        Pagemap.scan(area.page(1, 4), WRITTEN, flags=RESTART)
        expect_signals(area.page(1, 2), PAGE_SIZE, SIGSEGV, f"a read of a guard page, {when} protecting")
        expect_signals(area.page(1, 2), PAGE_SIZE, SIGSEGV, f"a write to a guard page, {when} protecting", write=True)
        marks = Pagemap.have(area.range, uapi.PM_UFFD_WP)
        expect([marks[page] for page in (0, 3, 4, 5)], [False, True, True, False], "whether 0, 3, 4, 5 are protected")
    advise(area.page(1, 2), Advice.GUARD_REMOVE)
    if knows(guard):
        found = Pagemap.scan(area.range, guard)
        expect_scan(area, found, Scan([], area.range.end), "guard pages, after MADV_GUARD_REMOVE")
    undisturbed(ctx.uffd, partial(touch, area.range, PAGE_SIZE, write=True))
    area.expect_pattern_of(area, 3, 3)
