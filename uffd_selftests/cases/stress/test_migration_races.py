# SPDX-License-Identifier: GPL-2.0-only
"""Protecting pages, and asking what was written to them, while the kernel moves them between memory nodes.

A page is out of its mapping then for a moment, and what is to be done to it is done to what stands in its place.
"""

from __future__ import annotations

from collections.abc import Callable

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, AGAINST_WRITES, ALL, ANON, ASYNC, EACH_HUGETLB, NOT_HUGETLB, PAGE_SIZE, PRESENT, RESTART, SCAN,
    SHMEM, SYNC_RWP, WP, WRITEPROTECT, WRITTEN, Area, Context, PageCategory, Pagemap, Protection, Race, Uffd, expect,
    expect_sweep, huge_area, migrator, page_numbers, pages_in, pmd_mapped, promise, saw, touch, uapi, undisturbed,
    write,
)  # fmt: skip

MANY = 128
"""Small pages that are moved in one go."""
ROUNDS, HUGE_ROUNDS = 150, 40
ENOUGH = 8
"""Rounds that met a page on its way; then it is enough."""
FILE, SWAPPED, HUGE = PageCategory.FILE, PageCategory.SWAPPED, PageCategory.HUGE


def moving_area(ctx: Context) -> Area:
    """Map an area of some pages of any kind, filled."""
    area = ctx.dst if ctx.mem.hugetlb else ctx.allocate(MANY)
    area.fill()
    return area


def while_migrating(area: Area, step: Callable[[], None]) -> None:
    """Call ``step`` over and over while the pages go from one memory node to the other and back.

    It ends when a page has been on its way often enough, and in any case: nobody can say how often one is met.
    """
    met = 0
    with Race(migrator(*range(area.start, area.range.end, area.page_size))) as race:
        race.reached(0, 2)
        for _ in range(HUGE_ROUNDS if area.page_size > PAGE_SIZE else ROUNDS):
            met += any(Pagemap.have(area.range, uapi.PM_SWAP, area.page_size))
            step()
            if met == ENOUGH:
                break
        race.reached(0, race.steps(0) + 2)
    saw(f"{'a' if met else 'no'} page was met on its way")


def protect_while_migrating(uffd: Uffd, area: Area, guard: Protection) -> None:
    """Protect and free all pages, and a part of them, while they are moved; each must be as it was asked for."""
    uffd.register(area.range, guard.mode)
    everything, inner = set(range(area.nr_pages)), set(range(1, area.nr_pages - 1))

    def step() -> None:
        guard.set(uffd, area, everything)
        Pagemap.expect_protected(area, everything, "after all were protected")
        guard.lift(uffd, area, inner)
        Pagemap.expect_protected(area, everything - inner, "after all but the first and the last were freed")
        guard.lift(uffd, area, everything)
        Pagemap.expect_protected(area, (), "after all were freed")
        guard.set(uffd, area, inner)
        Pagemap.expect_protected(area, inner, "after all but the first and the last were protected")

    while_migrating(area, step)
    Pagemap.expect_protected(area, inner, "when the pages are moved no more")
    uffd.expect_no_message()
    expect_sweep(uffd, area, inner, guard)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-migrating", mem=ALL, features=SYNC_RWP, pages=4, spare_hugepages=4, rows=("RW-36",), smp=True
)  # fmt: skip
def test_rwprotect_migrating(ctx: Context) -> None:
    """Pages that are protected or resolved while the kernel moves them are so when they have arrived, and trap."""
    with promise("RW-36"):
        protect_while_migrating(ctx.uffd, moving_area(ctx), AGAINST_ACCESS)


@uffd_case("rwprotect-thp-migrating", mem=(ANON,), features=SYNC_RWP, pages=4, rows=("RW-36",), smp=True)
def test_rwprotect_thp_migrating(ctx: Context) -> None:
    """The same of a transparent huge page, protected and resolved as a whole, and in part."""
    area, uffd = huge_area(ctx), ctx.uffd
    uffd.register(area.range, AGAINST_ACCESS.mode)
    everything = range(area.nr_pages)

    def step() -> None:
        uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, everything, "after it was protected")
        uffd.resolve(area.range)
        Pagemap.expect_protected(area, (), "after it was resolved")

    with promise("RW-36"):
        while_migrating(area, step)
        expect(pmd_mapped(area.range) in (0, area.range.len), True, "whether it is whole, or cut as a whole")
        uffd.unregister(area.range)
        area.expect_pattern_of(area)
        protect_while_migrating(uffd, area, AGAINST_ACCESS)


@uffd_case(
    "writeprotect-migrating", mem=ALL, features=WRITEPROTECT, pages=4, spare_hugepages=4, rows=("WP-07", "WP-08"),
    kind=Kind.DETAIL, smp=True,
)  # fmt: skip
def test_writeprotect_migrating(ctx: Context) -> None:
    """Pages that are write-protected or freed while the kernel moves them are so when they have arrived, and trap."""
    with promise("WP-07"):
        protect_while_migrating(ctx.uffd, moving_area(ctx), AGAINST_WRITES)


def track_while_migrating(ctx: Context, area: Area) -> None:
    """Ask which pages were written, and protect them in the same step, while they are moved."""
    uffd, base = ctx.uffd, area.page_size // PAGE_SIZE
    last, kind = area.nr_pages - 1, WRITTEN | PRESENT | SWAPPED | FILE | HUGE
    uffd.register(area.range, WP)
    thp = pmd_mapped(area.range) > 0

    def look(expected: set[int], what: str) -> None:
        found = Pagemap.scan(area.range, returned=kind, room=base * area.nr_pages)
        told: dict[int, PageCategory] = {}
        for start, end, categories in found.regions:
            for page in range((start - area.start) // area.page_size, (end - area.start) // area.page_size):
                told[page] = categories
        expect(page_numbers(told), page_numbers(range(area.nr_pages)), f"pages reported, {what}")
        expect(found.walk_end, area.range.end, f"walk_end, {what}")
        written = {page for page, categories in told.items() if categories & WRITTEN}
        expect(page_numbers(written), page_numbers(expected), f"pages written, {what}")
        for page, categories in told.items():
            where = f"page {page}, {what}"
            expect(bool(categories & PRESENT), not categories & SWAPPED, f"{where}: present, as it is not on its way")
            if ctx.mem.shared and not (ctx.mem.hugetlb and categories & SWAPPED):
                expect(bool(categories & FILE), True, f"{where}: of a file")
            elif not ctx.mem.shared:
                expect(bool(categories & FILE), False, f"{where}: of a file")
            if not thp:
                expect(bool(categories & HUGE), ctx.mem.hugetlb, f"{where}: huge")

    def step() -> None:
        uffd.unprotect(area.range)
        look(set(range(area.nr_pages)), "when none was protected")
        found = Pagemap.scan(area.range, WRITTEN, flags=RESTART, room=base * area.nr_pages)
        pages = pages_in(area, found.regions)
        expect(page_numbers(pages), page_numbers(range(area.nr_pages)), "pages that a scan reports and protects")
        if thp and pmd_mapped(area.range) < area.range.len:
            return  # cut for want of a huge page: it is as the cases of small pages have it
        if not thp:
            uffd.writeprotect(area.range)  # for that scan may have left some of them out: D-AS-31
        look(set(), "when all were protected")
        if not thp:
            write(uffd, area, 1, last)
            look({1, last}, "after writes to two of them")

    while_migrating(area, step)
    undisturbed(uffd, lambda: area.expect_pattern_of(area))


@uffd_case(
    "scan-migrating", mem=NOT_HUGETLB, features=ASYNC, needs=SCAN, pages=4, rows=("AS-03", "AS-04"), kind=Kind.DETAIL,
    smp=True,
)  # fmt: skip
def test_scan_migrating(ctx: Context) -> None:
    """A page that the kernel moves is reported in each scan, as written or not, and is protected on its way."""
    with promise("AS-03 AS-04"):
        track_while_migrating(ctx, moving_area(ctx))


HOLE = Defect(
    id="D-AS-32",
    summary="PAGEMAP_SCAN without PM_SCAN_WP_MATCHING looks at huge pages without their lock: one that the kernel is "
    "just moving to other memory (as compaction does) seems to be a hole, neither there nor written",
    kernels="7.3.4",
    advice="scan again, or with PM_SCAN_WP_MATCHING, before a huge page not reported counts as missing or clean",
    shows=r"AS-32: (pages reported|pages written|page \d+, .*: present)",
)


@uffd_case(
    "scan-migrating-huge", mem=EACH_HUGETLB, features=ASYNC, needs=SCAN, pages=4, spare_hugepages=4, rows=("AS-32",),
    smp=True, defect=HOLE,
)  # fmt: skip
def test_scan_migrating_huge(ctx: Context) -> None:
    """A huge page that the kernel moves is reported in each scan, as written or not, and never as a hole."""
    with promise("AS-32"):
        track_while_migrating(ctx, moving_area(ctx))


UNPROTECTED = Defect(
    id="D-AS-31",
    summary="PAGEMAP_SCAN with PM_SCAN_WP_MATCHING of pages that the kernel is moving to other memory (as compaction "
    "does) does not protect those that were writable: they stay so, and count as written in the next scan",
    kernels="7.3.4",
    advice="none needed: such pages are reported once more than they were written to, and no write is missed",
    shows=r"AS-31: after a scan that protects: expected PM_UFFD_WP in pagemap on exactly these pages: ",
)


@uffd_case(
    "scan-migrating-protects", mem=NOT_HUGETLB, features=ASYNC, needs=SCAN, pages=4, rows=("AS-31",), smp=True,
    defect=UNPROTECTED,
)  # fmt: skip
def test_scan_migrating_protects(ctx: Context) -> None:
    """A scan that protects what was written also protects the pages that the kernel moves at that moment."""
    area = moving_area(ctx)
    every = range(area.nr_pages)
    ctx.uffd.register(area.range, WP)

    def step() -> None:
        ctx.uffd.unprotect(area.range)
        undisturbed(ctx.uffd, lambda: touch(area.range, area.page_size, write=True))
        found = Pagemap.scan(area.range, WRITTEN, flags=RESTART)
        expect(page_numbers(pages_in(area, found.regions)), page_numbers(every), "AS-31: pages written")
        Pagemap.expect_protected(area, every, "AS-31: after a scan that protects")

    while_migrating(area, step)
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


@uffd_case(
    "scan-thp-migrating", mem=(ANON, SHMEM), features=ASYNC, needs=SCAN, pages=4, rows=("AS-03", "AS-04"),
    kind=Kind.DETAIL, smp=True,
)  # fmt: skip
def test_scan_thp_migrating(ctx: Context) -> None:
    """The same of a transparent huge page, as a whole."""
    with promise("AS-03 AS-04"):
        track_while_migrating(ctx, huge_area(ctx))
