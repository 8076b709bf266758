# SPDX-License-Identifier: GPL-2.0-only
"""PAGE_IS_ACCESSED of PAGEMAP_SCAN: what was accessed since it was read-write protected."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from errno import EPERM
from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ACCESSED, ALL, ANON, ASYNC_RWP, CHECK, MINOR, MINOR_FAULTS, MISSING, MOVE, NEW, NONE, NOT_HUGETLB, PAGE_SIZE,
    PRESENT, RESTART, RWP, SCAN, SHARED, SHMEM_PRIVATE, SYNC_RWP, WP, WPALLOWED, WP_MATCHING, WRITEPROTECT, WRITTEN,
    Advice, Area, Context, Feature, KernelError, PageCategory, Pagemap, Pages, Range, Region, Scan, Skip, Uffd, Waiter,
    advise, cached, copy, expect, expect_accessed, expect_rwp_trapped, expect_scan, fails, huge_area, pages_in, poke,
    promise, regions, rwp_filled, rwp_protected, swap_out, touch, undisturbed,
)  # fmt: skip

SWAPPED = PageCategory.SWAPPED
HUGE = PageCategory.HUGE
BOTH = ACCESSED | WRITTEN


def scanned(area: Area | Pages, returned: PageCategory, expected: dict[int, PageCategory], what: str) -> None:
    """Assert which of these categories each page of an area has; pages that are not named have none."""
    found: dict[int, PageCategory] = {}
    for page in range(area.nr_pages):
        seen = Pagemap.scan(area.page(page), returned=returned).regions
        found[page] = seen[0].categories if seen else NONE
    wanted = {page: expected.get(page, NONE) for page in found}
    wrong = [page for page in found if found[page] != wanted[page]]
    if wrong:
        first = wrong[0]
        raise AssertionError(f"{what}, page {first}: expected {wanted[first] or 'none'}, got {found[first] or 'none'}")


# ---- what was accessed ---------------------------------------------------------------------------------------------


@uffd_case("accessed", mem=ALL, features=ASYNC_RWP, needs=SCAN, pages=8, rows=("AS-19",))
def test_accessed(ctx: Context) -> None:
    """All pages that are there count as accessed before the first protection, none after it, then those touched."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    with promise("AS-19"):
        expect_accessed(area, range(8), "pages accessed, before the first protection")
        uffd.rwprotect(area.range)
        expect_accessed(area, (), "pages accessed, after it")
        for pages, write, seen in (
            ((1,), False, {1}),
            ((3, 5), True, {1, 3, 5}),
            ((4,), False, {1, 3, 4, 5}),
            ((7, 0), True, {0, 1, 3, 4, 5, 7}),
        ):
            for page in pages:
                undisturbed(uffd, partial(touch, area.page(page), area.page_size, write=write))
            for times in ("once", "twice"):
                expect_accessed(area, seen, f"pages accessed, {sorted(seen)} being touched, asked {times}")
            Pagemap.expect_protected(area, set(range(8)) - seen, "after the scan")
        inside = Pagemap.scan(area.page(2, 3), ACCESSED)
        expect_scan(area, inside, Scan(regions(area, {3, 4}, ACCESSED), area.page(5).start), "accessed among 2 to 4")
        uffd.rwprotect(area.page(3, 2))
        expect_accessed(area, {0, 1, 5, 7}, "pages accessed, 3 and 4 being protected again")
        uffd.resolve(area.page(2))
        expect_accessed(area, {0, 1, 2, 5, 7}, "pages accessed, 2 being resolved")
        uffd.unregister(area.page(0, 2))
        expect_accessed(area, {2, 5, 7}, "pages accessed, 0 and 1 being unregistered")
    area.expect_pattern_of(area)


@uffd_case("accessed-sync", mem=ALL, features=SYNC_RWP, needs=SCAN, pages=5, rows=("AS-19",))
def test_accessed_sync(ctx: Context) -> None:
    """Where accesses are reported, a page counts as accessed once its fault was resolved, and not before."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    with promise("AS-19"):
        with Waiter(partial(touch, area.page(2), area.page_size)):
            uffd.wait("the fault of page 2")
            expect_accessed(area, (), "pages accessed, a thread waiting for page 2")
            uffd.resolve(area.page(2))
        expect_accessed(area, {2}, "pages accessed, page 2 being resolved")
        expect_rwp_trapped(uffd, area, 3, write=True)
        expect_accessed(area, {2, 3}, "pages accessed, page 3 being written to")


@uffd_case("accessed-holes", mem=ALL, features=ASYNC_RWP, needs=SCAN, pages=6, rows=("AS-20",))
def test_accessed_holes(ctx: Context) -> None:
    """A page that is not there is neither accessed nor written, and no page registered for RWP is ever written."""
    area, uffd = ctx.dst, ctx.uffd
    every = PRESENT | SWAPPED | BOTH | WPALLOWED
    uffd.register(area.range, RWP)
    with promise("AS-20"):
        expect_accessed(area, (), "pages accessed, none there")
        scanned(area, every, {}, "categories, none there")
        area.fill(1, 1)
        area.fill(3, 2)
        uffd.rwprotect(area.range)
        undisturbed(uffd, partial(touch, area.page(4), area.page_size, write=True))
        expected = {1: PRESENT, 3: PRESENT, 4: PRESENT | ACCESSED}
        scanned(area, every, expected, "categories, pages 1, 3 and 4 there and protected, 4 written to")
        found = Pagemap.scan(area.range, WRITTEN)
        expect_scan(area, found, Scan([], area.range.end), "pages written")
        found = Pagemap.scan(area.range, anyof=BOTH, returned=BOTH)
        expect_scan(area, found, Scan(regions(area, {4}, ACCESSED), area.range.end), "pages accessed or written")
    if ctx.mem is ANON:
        advise(area.page(4), Advice.DONTNEED)
        expect_accessed(area, (), "AS-20: pages accessed, page 4 being dropped")


@uffd_case("accessed-holes-table", mem=NOT_HUGETLB, features=ASYNC_RWP, needs=SCAN, pages=1, rows=("AS-20",))
def test_accessed_holes_table(ctx: Context) -> None:
    """The same of pages without a page table, before, between and behind those that have one."""
    per_table = PAGE_SIZE // 8
    area = ctx.allocate(4 * per_table)
    advise(area.range, Advice.NOHUGEPAGE)
    there = {per_table - 1, per_table, 3 * per_table + 5}
    for page in there:
        poke(area.page(page).start, NEW)
    ctx.uffd.register(area.range, RWP)
    with promise("AS-20"):
        expect_accessed(area, there, "pages accessed, before the first protection")
        ctx.uffd.rwprotect(area.range)
        expect_accessed(area, (), "pages accessed, after it")
        undisturbed(ctx.uffd, partial(touch, area.page(per_table), PAGE_SIZE))
        expect_accessed(area, {per_table}, "pages accessed, after a read")
        found = Pagemap.scan(area.range, WRITTEN, returned=BOTH)
        expect_scan(area, found, Scan([], area.range.end), "pages written")


# ---- mappings of several modes -------------------------------------------------------------------------------------


@uffd_case(
    "accessed-elsewhere", mem=ALL, features=ASYNC_RWP | WRITEPROTECT, needs=SCAN, pages=15, rows=("AS-21",)
)
def test_accessed_elsewhere(ctx: Context) -> None:
    """Only memory registered for RWP is accessed and only that registered for WP is written, in one scan over all."""
    area, uffd = ctx.dst, ctx.uffd
    area.fill()
    with Uffd.open(WRITEPROTECT | Feature.WP_ASYNC) as tracker:
        uffd.register(area.page(3, 3), MISSING)
        uffd.register(area.page(6, 3), WP)
        tracker.register(area.page(9, 3), WP)
        uffd.register(area.page(12, 3), RWP)
        uffd.writeprotect(area.page(7))
        tracker.writeprotect(area.page(10))
        uffd.rwprotect(area.page(13))
        written, accessed = {6, 8, 9, 11}, {12, 14}
        expected = dict.fromkeys(written, WRITTEN) | dict.fromkeys(accessed, ACCESSED)
        with promise("AS-21"):
            scanned(area, BOTH, expected, "plain pages 0-2, MISSING 3-5, WP 6-8, async WP 9-11, RWP 12-14")
            for category, pages in (ACCESSED, accessed), (WRITTEN, written):
                found = Pagemap.scan(area.range, category)
                expect_scan(area, found, Scan(regions(area, pages, category), area.range.end), f"pages with {category}")
            found = Pagemap.scan(area.range, PRESENT, returned=BOTH)
            runs = [((0, 6), NONE), ((6, 7), WRITTEN), ((7, 8), NONE), ((8, 10), WRITTEN), ((10, 11), NONE)]
            runs += [((11, 12), WRITTEN), ((12, 13), ACCESSED), ((13, 14), NONE), ((14, 15), ACCESSED)]
            wanted = [Region(area.page(a).start, area.page(b - 1).end, kind) for (a, b), kind in runs]
            expect_scan(area, found, Scan(wanted, area.range.end), "all pages, and what they are")
            found = Pagemap.scan(area.range, ACCESSED, inverted=ACCESSED, returned=NONE)
            rest = regions(area, set(range(15)) - accessed, NONE)
            expect_scan(area, found, Scan(rest, area.range.end), "pages not accessed")


@uffd_case(
    "accessed-not-tracked", mem=ALL, features=ASYNC_RWP | WRITEPROTECT | Feature.WP_ASYNC, needs=SCAN, pages=6,
    rows=("AS-25",), kind=Kind.DETAIL,
)  # fmt: skip
def test_accessed_not_tracked(ctx: Context) -> None:
    """PM_SCAN_CHECK_WPASYNC is EPERM where memory is registered for RWP; PM_SCAN_WP_MATCHING alone passes it over."""
    area, uffd = ctx.dst, ctx.uffd
    area.fill()
    uffd.register(area.page(0, 3), WP)
    uffd.register(area.page(3, 3), RWP)
    uffd.rwprotect(area.page(4))
    for flags in (CHECK, RESTART):
        for pages in ((3, 3), (2, 2), (0, 6), (4, 1)) if flags == CHECK else ((3, 3), (4, 1)):
            with promise("AS-25", f"{pages[1]} pages from page {pages[0]} on, {flags}"), fails(EPERM):
                Pagemap.scan(area.page(*pages), WRITTEN, flags=flags)
    with promise("AS-25"):
        Pagemap.expect_protected(area, {4}, "after scans that were refused")
        for category in (ACCESSED, PRESENT):
            found = Pagemap.scan(area.page(3, 3), category, flags=WP_MATCHING)
            expect_scan(area, found, Scan([], area.range.end), f"pages with {category}, protecting them")
            Pagemap.expect_protected(area, {4}, "after that")
        Pagemap.scan(area.page(3, 3), flags=WP_MATCHING, room=0)
        Pagemap.expect_protected(area, {4}, "after a scan without a vector")
        found = Pagemap.scan(area.page(1, 4), WRITTEN, flags=WP_MATCHING)
        wanted = Scan(regions(area, {1, 2}), area.page(4).end)
        expect_scan(area, found, wanted, "pages written, protecting them, of both mappings")
        Pagemap.expect_protected(area, {1, 2, 4}, "after that")
        expect_accessed(Pages(area.page(3, 3), area.page_size), {0, 2}, "pages accessed, from page 3 on")


# ---- swap ----------------------------------------------------------------------------------------------------------


@uffd_case(
    "accessed-swap", mem=(ANON, SHMEM_PRIVATE), features=ASYNC_RWP, needs=("swap", *SCAN), pages=6, rows=("AS-22",)
)
def test_accessed_swap(ctx: Context) -> None:
    """A page keeps in swap whether it was accessed, and an inverted scan finds the protected ones there."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    for page in (1, 2, 4):
        undisturbed(uffd, partial(touch, area.page(page), PAGE_SIZE))
    swap_out(area.range)
    kinds = PRESENT | SWAPPED | BOTH
    hot, cold = SWAPPED | ACCESSED, SWAPPED
    expected = {page: hot if page in (1, 2, 4) else cold for page in range(6)}
    with promise("AS-22"):
        scanned(area, kinds, expected, "categories, swapped out")
        expect_accessed(area, {1, 2, 4}, "pages accessed, swapped out")
        found = Pagemap.scan(area.range, SWAPPED | ACCESSED)
        expect_scan(area, found, Scan(regions(area, {1, 2, 4}, hot), area.range.end), "pages accessed and swapped out")
        cold_scan = partial(Pagemap.scan, area.range, SWAPPED | ACCESSED, inverted=ACCESSED, returned=kinds)
        found = cold_scan()
        expect_scan(area, found, Scan(regions(area, {0, 3, 5}, cold), area.range.end), "pages cold, in swap")
        uffd.rwprotect(area.page(1, 2))
        expect_accessed(area, {4}, "pages accessed, 1 and 2 being protected in swap")
        undisturbed(uffd, partial(touch, area.page(5), PAGE_SIZE, write=True))
        expect_accessed(area, {4, 5}, "pages accessed, page 5 being swapped in by a write")
        found = cold_scan()
        wanted = Scan(regions(area, {0, 1, 2, 3}, cold), area.range.end)
        expect_scan(area, found, wanted, "pages cold, in swap, page 5 being swapped in")
    undisturbed(uffd, lambda: area.expect_pattern_of(area))
    expect_accessed(area, range(6), "AS-22: pages accessed, all being read")


# ---- what fills pages ----------------------------------------------------------------------------------------------


@uffd_case("accessed-filled", mem=ALL, features=ASYNC_RWP, needs=SCAN, pages=5, rows=("AS-23",), kind=Kind.DETAIL)
def test_accessed_filled(ctx: Context) -> None:
    """What UFFDIO_COPY or UFFDIO_ZEROPAGE has filled counts as accessed at once, and only that."""
    area, uffd = ctx.dst, ctx.uffd
    ctx.src.fill()
    uffd.register(area.range, MISSING | RWP)
    copy(ctx, 1, 2)
    with promise("AS-23"):
        expect_accessed(area, {1, 2}, "pages accessed, 1 and 2 being filled")
        uffd.rwprotect(area.range)
        expect_accessed(area, (), "pages accessed, all being protected")
        copy(ctx, 3)
        filled = {3}
        if not ctx.mem.hugetlb:
            uffd.zeropage(area.page(4))
            filled.add(4)
        expect_accessed(area, filled, "pages accessed, those behind them being filled")
        Pagemap.expect_protected(area, {1, 2}, "after that")


@uffd_case(
    "accessed-continued", mem=SHARED, features=ASYNC_RWP | MINOR_FAULTS, needs=SCAN, pages=4, rows=("AS-23",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_accessed_continued(ctx: Context) -> None:
    """What UFFDIO_CONTINUE has mapped counts as accessed at once; what is cached and not mapped does not."""
    area, uffd = ctx.dst, ctx.uffd
    with cached(ctx, mode=MINOR | RWP), promise("AS-23"):
        expect_accessed(area, (), "pages accessed, all cached and none mapped")
        uffd.continue_(area.page(1, 2))
        expect_accessed(area, {1, 2}, "pages accessed, 1 and 2 being mapped")
        uffd.rwprotect(area.page(0, 2))
        expect_accessed(area, {2}, "pages accessed, 1 being protected")


@uffd_case(
    "accessed-moved", mem=(ANON,), features=ASYNC_RWP | MOVE, needs=SCAN, pages=4, rows=("AS-23",), kind=Kind.DETAIL
)
def test_accessed_moved(ctx: Context) -> None:
    """What UFFDIO_MOVE has brought is protected, and so does not count as accessed before it is touched."""
    area, uffd = ctx.dst, ctx.uffd
    ctx.src.fill()
    uffd.register(area.range, MISSING | RWP)
    uffd.move(area.page(1).start, ctx.src.page(1).start, 2 * PAGE_SIZE)
    with promise("AS-23"):
        expect_accessed(area, (), "pages accessed, 1 and 2 being moved there")
        undisturbed(uffd, partial(touch, area.page(2), PAGE_SIZE))
        expect_accessed(area, {2}, "pages accessed, 2 being read")
        Pagemap.expect_protected(area, {1}, "after that")
    undisturbed(uffd, lambda: area.expect_pattern_of(ctx.src, 1, 2))


# ---- huge pages ----------------------------------------------------------------------------------------------------


@uffd_case("accessed-thp", mem=(ANON,), features=ASYNC_RWP, needs=("thp", *SCAN), rows=("AS-19", "AS-24"))
def test_accessed_thp(ctx: Context) -> None:
    """A transparent huge page counts as accessed as a whole, with PAGE_IS_HUGE, and page by page where it is cut."""
    area, uffd = huge_area(ctx, 3), ctx.uffd
    count = area.nr_pages // 3
    uffd.register(area.range, RWP)
    both = ACCESSED | HUGE
    scan = partial(Pagemap.scan, area.range, ACCESSED, returned=both)
    with promise("AS-24"):
        uffd.rwprotect(area.range)
        expect_scan(area, scan(), Scan([], area.range.end), "pages accessed, all being protected")
        undisturbed(uffd, partial(touch, area.page(count + 7), PAGE_SIZE))
        second = range(count, 2 * count)
        expect_scan(area, scan(), Scan(regions(area, second, both), area.range.end), "pages accessed, one being read")
        limited = Pagemap.scan(area.range, ACCESSED, max_pages=10)
        part = Scan(regions(area, range(count, count + 10), ACCESSED), area.page(count + 10).start)
        expect_scan(area, limited, part, "pages accessed, 10 at most")
        inside = Pagemap.scan(area.page(count + 3, 5), ACCESSED)
        part = Scan(regions(area, range(count + 3, count + 8), ACCESSED), area.page(count + 8).start)
        expect_scan(area, inside, part, "pages accessed, of five in the middle")
        cold = Pagemap.scan(area.range, ACCESSED, inverted=ACCESSED, returned=both)
        rest = regions(area, range(count), HUGE) + regions(area, range(2 * count, 3 * count), HUGE)
        expect_scan(area, cold, Scan(rest, area.range.end), "pages cold")
        uffd.rwprotect(area.page(count + 20, 4))
        hot = regions(area, set(second) - set(range(count + 20, count + 24)), ACCESSED)
        expect_scan(area, scan(), Scan(hot, area.range.end), "pages accessed, four of them being protected again")


@uffd_case(
    "accessed-hugetlb", mem=tuple(m for m in ALL if m.hugetlb), features=ASYNC_RWP, needs=SCAN, pages=4,
    rows=("AS-24",), kind=Kind.DETAIL,
)  # fmt: skip
def test_accessed_hugetlb(ctx: Context) -> None:
    """A huge page counts as accessed as a whole, with PAGE_IS_HUGE; max_pages can report a part of it."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    both = ACCESSED | HUGE
    undisturbed(uffd, partial(touch, Range(area.page(1).start + 5 * PAGE_SIZE, 1), 1))
    undisturbed(uffd, partial(touch, Range(area.page(2).start, 1), 1, write=True))
    with promise("AS-24"):
        found = Pagemap.scan(area.range, ACCESSED, returned=both)
        expect_scan(area, found, Scan(regions(area, {1, 2}, both), area.range.end), "pages accessed, 1 and 2 touched")
        limit = area.page_size // PAGE_SIZE + 3
        stop = area.page(2).start + 3 * PAGE_SIZE
        found = Pagemap.scan(area.range, ACCESSED, max_pages=limit)
        expect_scan(area, found, Scan([Region(area.page(1).start, stop, ACCESSED)], stop), f"accessed, {limit} at most")
        found = Pagemap.scan(area.range, ACCESSED, inverted=ACCESSED, returned=both)
        expect_scan(area, found, Scan(regions(area, {0, 3}, HUGE), area.range.end), "pages cold")


# ---- the scan's options --------------------------------------------------------------------------------------------


@uffd_case("accessed-limits", mem=(ANON,), features=ASYNC_RWP, needs=SCAN, pages=8, rows=("AS-26",), kind=Kind.DETAIL)
def test_accessed_limits(ctx: Context) -> None:
    """Room and max_pages end a scan for accessed pages as for written ones, and walk_end says where."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    for page in (1, 2, 4, 6):
        undisturbed(uffd, partial(touch, area.page(page), PAGE_SIZE))
    for returned, anyof in (ACCESSED, NONE), (ACCESSED | PRESENT, NONE), (ACCESSED, ACCESSED | WRITTEN):
        for limits, pages, stop in (
            ({"room": 1}, {1, 2}, 4),
            ({"room": 2}, {1, 2, 4}, 6),
            ({"room": 3}, {1, 2, 4, 6}, 8),
            ({"max_pages": 1}, {1}, 2),
            ({"max_pages": 2}, {1, 2}, 4),
            ({"max_pages": 3}, {1, 2, 4}, 6),
            ({"max_pages": 4}, {1, 2, 4, 6}, 8),
            ({"max_pages": 9}, {1, 2, 4, 6}, 8),
            ({"max_pages": 3, "room": 1}, {1, 2}, 4),
            ({"room": 0}, set(), 8),
        ):
            with promise("AS-26", f"{limits}, returned {returned}, any of {anyof}"):
                required = ACCESSED if not anyof else NONE
                room, limit = limits.get("room", 64), limits.get("max_pages", 0)
                ask = partial(Pagemap.scan, area.range, required, returned=returned, anyof=anyof)
                found = ask(room=room, max_pages=limit)
                wanted = Scan(regions(area, pages, returned), area.start + stop * PAGE_SIZE)
                expect_scan(area, found, wanted, "pages accessed")
    found = Pagemap.scan(area.range, anyof=WRITTEN | PageCategory.PFNZERO, returned=ACCESSED)
    expect_scan(area, found, Scan([], area.range.end), "AS-26: pages written or of zeroes")
    Pagemap.expect_protected(area, {0, 3, 5, 7}, "after all these scans")


COUNTED = Defect(
    id="D-AS-27",
    summary="PAGEMAP_SCAN reports poison markers and guard pages of memory registered for RWP as accessed",
    kernels="7.3.4",
    advice="ask for PAGE_IS_PRESENT or PAGE_IS_SWAPPED as well, and leave out pages that pagemap shows as guard pages "
    "or that you have poisoned",
    shows=r"AS-27: pages accessed.*expected none, up to page 4; got .*PAGE_IS_ACCESSED",
)


@uffd_case(
    "accessed-markers",
    mem=NOT_HUGETLB,
    variants=("poison", "guard page"),
    features=ASYNC_RWP | Feature.POISON,
    needs=SCAN,
    pages=4,
    rows=("AS-27",),
    defect=COUNTED,
)
def test_accessed_markers(ctx: Context, variant: str) -> None:
    """Where UFFDIO_POISON or MADV_GUARD_INSTALL has left nothing that could be accessed, nothing was."""
    area, uffd = ctx.dst, ctx.uffd
    uffd.register(area.range, MISSING | RWP)
    if variant == "poison":
        uffd.poison(area.page(1, 2))
    else:
        try:
            advise(area.page(1, 2), Advice.GUARD_INSTALL)
        except KernelError as error:
            raise Skip(f"MADV_GUARD_INSTALL: {error} (Linux 6.13, for shared memory 6.15)") from None
    expect_accessed(area, (), f"AS-27: pages accessed, 1 and 2 being a {variant}")


# ---- scans against threads -----------------------------------------------------------------------------------------

THREADS = 4


def harvest_kept(ctx: Context, area: Area) -> list[int]:
    """Return what was accessed since, and protect just that again; no thread is ever held up."""
    found = Pagemap.scan(area.range, ACCESSED, room=area.nr_pages)
    for start, end, _ in found.regions:
        ctx.uffd.rwprotect(Range(start, end - start))
    return pages_in(area, found.regions)


def harvest_frozen(ctx: Context, area: Area) -> list[int]:
    """Return what was accessed since, and protect all again, threads being stopped meanwhile by the sync mode."""
    ctx.uffd.set_mode(disable=Feature.RWP_ASYNC)
    found = Pagemap.scan(area.range, ACCESSED, room=area.nr_pages)
    ctx.uffd.rwprotect(area.range)
    ctx.uffd.set_mode(enable=Feature.RWP_ASYNC)
    return pages_in(area, found.regions)


HARVESTS: dict[str, Callable[[Context, Area], list[int]]] = {
    "protecting what was found": harvest_kept,
    "accesses held up": harvest_frozen,
}


@uffd_case(
    "accessed-concurrent",
    mem=ALL,
    variants=tuple(HARVESTS),
    features=ASYNC_RWP,
    needs=SCAN,
    pages=16,
    rows=("AS-28",),
    smp=True,
)
def test_accessed_concurrent(ctx: Context, variant: str) -> None:
    """Each access is found by the scan under way or by the next, however many threads make them meanwhile."""
    area = ctx.dst if ctx.mem.hugetlb else ctx.allocate(512)
    rwp_filled(ctx, area=area)
    harvest, each = HARVESTS[variant], area.nr_pages // THREADS
    for number in range(6):
        ctx.uffd.rwprotect(area.range)
        found: set[int] = set()
        with ExitStack() as stack, promise("AS-28", f"round {number}"):
            calls = [
                partial(touch, area.page(first, each), area.page_size, write=number % 2 == 0)
                for first in range(0, area.nr_pages, each)
            ]
            threads = [stack.enter_context(Waiter(call)) for call in calls]
            while not all(thread.done for thread in threads):
                found.update(harvest(ctx, area))
            found.update(harvest(ctx, area))
            expect(sorted(set(range(area.nr_pages)) - found), [], "pages accessed and never found")
            expect_accessed(area, (), "pages accessed, after the last scan")
        ctx.uffd.expect_no_message()
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))
