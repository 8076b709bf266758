# SPDX-License-Identifier: GPL-2.0-only
"""Pages that another processor has just used, and may know the way to, when they are protected, moved or tracked.

A machine with one processor shows it, too, if the kernel forgets nothing but to make that one forget.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, AGAINST_WRITES, ALL, ANON, ASYNC_RWP, COMPANION, MISSING, MOVE, NOT_HUGETLB, PAGE_SIZE, PROT_READ,
    PROT_WRITE, RWP, SYNC_RWP, TRAPPED, WP, WRITEPROTECT, WRITTEN, Area, Context, Fault, Feature, PagefaultFlag,
    Pagemap, PmScanFlag, Protection, Race, Range, Skip, Uffd, expect, huge_area, keep_small, pmd_mapped, promise,
    protect, toucher, unmap,
)  # fmt: skip

MANY = 48
"""Pages of an area of small ones: enough for several to be taken in one step, few enough to be through in a moment."""


def racing_area(ctx: Context) -> Area:
    """Map an area of so many pages as a race gets through in a moment, filled."""
    area = ctx.dst if ctx.mem.hugetlb else ctx.allocate(MANY)
    area.fill()
    return area


def corners(area: Area) -> list[int]:
    """The first page, one in the middle, and the last."""
    return [0, area.nr_pages // 2, area.nr_pages - 1]


@contextmanager
def elsewhere() -> Iterator[None]:
    """Keep this thread off the first processor, where a race has its first thread; with one processor, as it is."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextmanager
def in_use(area: Area, page: int, *, write: bool) -> Iterator[Race]:
    """Have a thread on another processor access a page of an area over and over again, before the block and on."""
    with Race(toucher(area.page(page), area.page_size, write=write, rounds=COMPANION)) as race, elsewhere():
        race.reached(0, 50)
        yield race


def expect_stopped(uffd: Uffd, race: Race, request: Callable[[], object], page: Range) -> PagefaultFlag:
    """Assert that the thread's accesses stop when a request returns; return what the message of the next one says.

    One access may have been made before that, and not yet been counted.
    """
    request()
    before = race.steps(0)
    message = uffd.wait("the fault of a page that is still in use")
    assert isinstance(message, Fault), f"expected a fault, got {message}"
    expect(message.address, page.start, "address of the fault")
    uffd.expect_still_asleep(1)
    after = race.steps(0)
    if after > before + 1:
        raise AssertionError(f"accesses that went through after the request: expected 1 at most, got {after - before}")
    return message.flags


@uffd_case("rwprotect-in-use", mem=ALL, features=SYNC_RWP, pages=4, rows=("RW-75", "RW-14"), smp=True)
def test_rwprotect_in_use(ctx: Context) -> None:
    """When UFFDIO_RWPROTECT has returned no access goes through, also of a processor that used the page just before."""
    uffd, area = ctx.uffd, racing_area(ctx)
    uffd.register(area.range, RWP)
    inner = area.page(1, area.nr_pages - 2)
    for page in sorted({1, area.nr_pages // 2, area.nr_pages - 2}):
        for write in (False, True):
            with promise("RW-75", f"page {page}, {'written' if write else 'read'} all the time"):
                with in_use(area, page, write=write) as race:
                    flags = expect_stopped(uffd, race, partial(uffd.rwprotect, inner), area.page(page))
                    expect(bool(flags & PagefaultFlag.RWP), True, "RWP in the flags")
                    Pagemap.expect_protected(area, range(1, area.nr_pages - 1), "after UFFDIO_RWPROTECT")
                    uffd.resolve(inner)
                uffd.expect_still_asleep(0)
    for page in (0, area.nr_pages - 1):
        with promise("RW-75", f"page {page} beside the range"), in_use(area, page, write=True) as race:
            uffd.rwprotect(inner)
            race.reached(0, race.steps(0) + 100)
            uffd.expect_still_asleep(0)
            uffd.resolve(inner)
    area.expect_pattern_of(area)


@uffd_case("rwprotect-in-use-thp", mem=(ANON,), features=SYNC_RWP, pages=4, rows=("RW-75",), smp=True)
def test_rwprotect_in_use_thp(ctx: Context) -> None:
    """The same for a transparent huge page, protected as a whole."""
    for write in (False, True):
        area = huge_area(ctx)
        ctx.uffd.register(area.range, RWP)
        for page in corners(area):
            what = f"page {page}, {'written' if write else 'read'} all the time"
            with promise("RW-75", what), in_use(area, page, write=write) as race:
                expect_stopped(ctx.uffd, race, partial(ctx.uffd.rwprotect, area.range), area.page(page))
                Pagemap.expect_protected(area, range(area.nr_pages), "after UFFDIO_RWPROTECT")
                ctx.uffd.resolve(area.range)
        area.expect_pattern_of(area)


def expect_part_stopped(ctx: Context, guard: Protection, row: str) -> None:
    """Assert that accesses stop to pages of a part of a large folio, mapped by its base pages, that is protected."""
    area = huge_area(ctx)
    protect(area.page(0), PROT_READ)
    protect(area.page(0), PROT_READ | PROT_WRITE)
    expect(pmd_mapped(area.range), 0, "bytes mapped by PMD, of a huge page of which a part was read-only")
    ctx.uffd.register(area.range, guard.mode)
    first, count = area.nr_pages // 4, area.nr_pages // 8
    part = range(first, first + count)
    for page in (part[0], part[count // 2], part[-1]):
        with promise(row, f"page {page}"), in_use(area, page, write=True) as race:
            expect_stopped(ctx.uffd, race, partial(guard.set, ctx.uffd, area, part), area.page(page))
            Pagemap.expect_protected(area, part, "after the request")
            guard.lift(ctx.uffd, area, range(area.nr_pages))
    area.expect_pattern_of(area)


@uffd_case("rwprotect-in-use-folio", mem=(ANON,), features=SYNC_RWP, pages=4, rows=("RW-75", "RW-44"), smp=True)
def test_rwprotect_in_use_folio(ctx: Context) -> None:
    """The same for a part of a large folio that is mapped by its base pages."""
    expect_part_stopped(ctx, AGAINST_ACCESS, "RW-75")


@uffd_case("writeprotect-in-use-folio", mem=(ANON,), features=WRITEPROTECT, pages=4, rows=("WP-07",), smp=True)
def test_writeprotect_in_use_folio(ctx: Context) -> None:
    """When UFFDIO_WRITEPROTECT of a part of a large folio has returned no write goes through there."""
    expect_part_stopped(ctx, AGAINST_WRITES, "WP-07")


@uffd_case("rwprotect-in-use-tables", mem=NOT_HUGETLB, features=SYNC_RWP, pages=4, rows=("RW-75",), smp=True)
def test_rwprotect_in_use_tables(ctx: Context) -> None:
    """The same for a range that two page tables map, with nothing but holes around the pages in use."""
    per_table = PAGE_SIZE // 8
    area = ctx.allocate(2 * per_table)
    keep_small(area.range)
    edge = -(area.start // PAGE_SIZE) % per_table or per_table
    there = range(edge - 2, edge + 2)
    area.fill(there.start, len(there))
    ctx.uffd.register(area.range, RWP)
    for page in there:
        with promise("RW-75", f"page {page - edge} from the second table on"), in_use(area, page, write=True) as race:
            expect_stopped(ctx.uffd, race, partial(ctx.uffd.rwprotect, area.range), area.page(page))
            Pagemap.expect_protected(area, there, "after UFFDIO_RWPROTECT")
            ctx.uffd.resolve(area.range)
    area.expect_pattern_of(area, there.start, len(there))


@uffd_case("rwprotect-in-use-mappings", mem=ALL, features=SYNC_RWP, pages=4, rows=("RW-75", "RW-10"), smp=True)
def test_rwprotect_in_use_mappings(ctx: Context) -> None:
    """The same where one request takes several mappings with a hole between them."""
    area = racing_area(ctx)
    hole = 1
    unmap(area.page(hole))
    for part in (area.page(0), area.page(2, area.nr_pages - 2)):
        ctx.uffd.register(part, RWP)
    for page in (0, 2, area.nr_pages - 1):
        with promise("RW-75", f"page {page}"), in_use(area, page, write=True) as race:
            expect_stopped(ctx.uffd, race, partial(ctx.uffd.rwprotect, area.range), area.page(page))
            Pagemap.expect_protected(area, set(range(area.nr_pages)) - {hole}, "after UFFDIO_RWPROTECT")
            ctx.uffd.resolve(area.range)


@uffd_case("writeprotect-in-use", mem=ALL, features=WRITEPROTECT, pages=4, rows=("WP-07",), smp=True)
def test_writeprotect_in_use(ctx: Context) -> None:
    """When UFFDIO_WRITEPROTECT has returned no write goes through, also of a processor that wrote just before."""
    area = racing_area(ctx)
    ctx.uffd.register(area.range, WP)
    for page in corners(area):
        with promise("WP-07", f"page {page}"), in_use(area, page, write=True) as race:
            flags = expect_stopped(ctx.uffd, race, partial(ctx.uffd.writeprotect, area.range), area.page(page))
            expect(flags, TRAPPED, "flags")
            Pagemap.expect_protected(area, range(area.nr_pages), "after UFFDIO_WRITEPROTECT")
            ctx.uffd.unprotect(area.range)
    area.expect_pattern_of(area)


@uffd_case(
    "writeprotect-in-use-thp", mem=(ANON,), features=WRITEPROTECT, pages=4, rows=("WP-07",), smp=True
)
def test_writeprotect_in_use_thp(ctx: Context) -> None:
    """The same for a transparent huge page, protected as a whole."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    for page in corners(area):
        with promise("WP-07", f"page {page}"), in_use(area, page, write=True) as race:
            expect_stopped(ctx.uffd, race, partial(ctx.uffd.writeprotect, area.range), area.page(page))
            ctx.uffd.unprotect(area.range)
    area.expect_pattern_of(area)


@uffd_case(
    "move-in-use", mem=(ANON,), features=MOVE, variants=("small", "huge"), pages=MANY, rows=("MV-01",), smp=True
)
def test_move_in_use(ctx: Context, variant: str) -> None:
    """When UFFDIO_MOVE has returned the old place is a hole, also for a processor that used the page just before."""
    uffd = ctx.uffd
    for number in range(3):
        for write in (False, True):
            source = huge_area(ctx) if variant == "huge" else ctx.allocate(MANY)
            source.fill()
            place = ctx.allocate(source.nr_pages)
            page = corners(source)[number]
            for area in (source, place):
                uffd.register(area.range, MISSING)
            with promise("MV-01", f"page {page}, {'written' if write else 'read'} all the time"):
                with in_use(source, page, write=write) as race:
                    move = partial(uffd.move, place.start, source.start, source.range.len)
                    expect_stopped(uffd, race, move, source.page(page))
                    Pagemap.expect_present(source)
                    Pagemap.expect_present(place, *range(place.nr_pages))
                    uffd.zeropage(source.page(page))
                place.expect_pattern_of(source)
                for area in (source, place):
                    uffd.unregister(area.range)
                    unmap(area.range)


TRACKERS = {
    "UFFDIO_RWPROTECT": (ASYNC_RWP, RWP),
    "UFFDIO_WRITEPROTECT": (WRITEPROTECT | Feature.WP_ASYNC, WP),
    "PAGEMAP_SCAN": (WRITEPROTECT | Feature.WP_ASYNC, WP),
}


def track(uffd: Uffd, area: Area, variant: str) -> None:
    """Protect an area in one of three ways."""
    if variant == "UFFDIO_RWPROTECT":
        uffd.rwprotect(area.range)
    elif variant == "UFFDIO_WRITEPROTECT":
        uffd.writeprotect(area.range)
    else:
        Pagemap.scan(area.range, WRITTEN, flags=PmScanFlag.WP_MATCHING | PmScanFlag.CHECK_WPASYNC)


@uffd_case(
    "tracking-in-use", mem=ALL, variants=tuple(TRACKERS), needs=("pagemap_scan",), pages=4,
    rows=("RW-77", "RW-75", "AS-01", "AS-04"), smp=True,
)  # fmt: skip
def test_tracking_in_use(ctx: Context, variant: str) -> None:
    """Asynchronous tracking misses no access, also of a processor that used the page just before it was protected."""
    features, mode = TRACKERS[variant]
    require(features)
    area = racing_area(ctx)
    with Uffd.open(features) as uffd:
        uffd.register(area.range, mode)
        for page in corners(area):
            for write in (False, True) if mode == RWP else (True,):
                with promise("RW-75 AS-01", f"page {page}, {'written' if write else 'read'} all the time"):
                    with in_use(area, page, write=write) as race:
                        track(uffd, area, variant)
                        race.reached(0, race.steps(0) + 2)  # so one access was made since, as a whole
                        left = set(range(area.nr_pages)) - {page}
                        Pagemap.expect_protected(area, left, "after one page was used")
                    uffd.expect_still_asleep(0)
        area.expect_pattern_of(area)


@uffd_case(
    "tracking-in-use-thp", mem=(ANON,), variants=tuple(TRACKERS), needs=("pagemap_scan",), pages=4,
    rows=("RW-80", "RW-75", "AS-01", "AS-04"), smp=True,
)  # fmt: skip
def test_tracking_in_use_thp(ctx: Context, variant: str) -> None:
    """The same for a transparent huge page: the page used is not protected any more."""
    features, mode = TRACKERS[variant]
    require(features)
    for number in range(3):
        area = huge_area(ctx)
        page = corners(area)[number]
        with Uffd.open(features) as uffd:
            uffd.register(area.range, mode)
            with promise("RW-75 AS-01", f"page {page}"), in_use(area, page, write=True) as race:
                track(uffd, area, variant)
                race.reached(0, race.steps(0) + 2)
                Pagemap.expect_uffd_wp(area.page(page).start, False, "after it was used")
        area.expect_pattern_of(area)
        unmap(area.range)


def require(features: Feature) -> None:
    """Skip where the kernel does not offer the features."""
    with Uffd.open() as uffd:
        if features & ~uffd.offered:
            raise Skip(f"the kernel lacks {features & ~uffd.offered} (Linux 6.7; UFFD_FEATURE_RWP: Linux 7.3)")
