# SPDX-License-Identifier: GPL-2.0-only
"""PAGEMAP_SCAN: tells what was written where UFFD_FEATURE_WP_ASYNC tracks it, and starts anew."""

from __future__ import annotations

import os
from ctypes import addressof, sizeof
from errno import EFAULT, EINVAL, EPERM
from functools import partial
from pathlib import Path

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC, CHECK, EACH_HUGETLB, HUGETLB, HUGETLB_PRIVATE, MAP_ANONYMOUS, MAP_PRIVATE, NEW, NONE,
    NOT_HUGETLB, PAGE_SIZE, PRESENT, PROT_READ, RESTART, SCAN, SHMEM, SHMEM_PRIVATE, WP, WPALLOWED, WP_MATCHING,
    WRITTEN, Channel, Child, Context, Feature, PageCategory, Pagemap, Range, Region, Scan, Uffd, Waiter, checked,
    expect, expect_scan, expect_written, fails, huge_area, lib, mapped, poke, promise, protect, regions,
    require_soft_dirty, saw, swap_out, touch, tracked, two_page_tables, uapi, undisturbed, write,
)  # fmt: skip


@uffd_case("async-scan", mem=ALL, features=ASYNC, needs=SCAN, pages=6, rows=("AS-03", "AS-12"))
def test_async_scan(ctx: Context) -> None:
    """PAGEMAP_SCAN reports every page before the first protection, none after it, and then exactly what is written."""
    area = ctx.dst
    area.fill()
    ctx.uffd.register(area.range, WP)
    for returned in (WRITTEN, WRITTEN | PRESENT):
        expected = regions(area, range(6), returned)
        found = Pagemap.scan(area.range, WRITTEN, returned=returned, flags=CHECK)
        expect_scan(area, found, Scan(expected, area.range.end), "pages written, before the first protection")
    ctx.uffd.writeprotect(area.range)
    expect_written(area, (), "pages written, after UFFDIO_WRITEPROTECT")
    write(ctx.uffd, area, 1, 2, 4)
    for times in ("once", "twice"):
        expect_written(area, {1, 2, 4}, f"pages written, after writes to pages 1, 2 and 4, asked {times}")
    inside = Pagemap.scan(area.page(2, 2), WRITTEN, flags=CHECK)
    expect(inside, Scan(regions(area, {2}), area.page(4).start), "pages written among pages 2 and 3")


@uffd_case(
    "async-scan-holes",
    mem=(ANON, SHMEM),
    features=ASYNC,
    needs=SCAN,
    pages=1,
    rows=("AS-03",),
    bugs=(36,),
    kind=Kind.DETAIL,
)
def test_async_scan_holes(ctx: Context) -> None:
    """A page that is not there and not protected counts as written, with a page table or without, and is protected."""
    per_table = PAGE_SIZE // 8
    area = ctx.allocate(3 * per_table)
    poke(area.page(per_table + 3).start, NEW)
    ctx.uffd.register(area.range, WP)
    everything = Scan(regions(area, range(area.nr_pages)), area.range.end)
    for anyof in (NONE, WRITTEN | PRESENT):
        found = Pagemap.scan(area.range, WRITTEN, anyof=anyof, flags=CHECK)
        expect(found, everything, f"pages written, before the first protection, any of {anyof}")
    for anyof in (NONE, WRITTEN | PRESENT):
        found = Pagemap.scan(area.range, WRITTEN, anyof=anyof, flags=RESTART)
        expect(found, everything, f"pages written, protecting them, any of {anyof}")
        Pagemap.expect_protected(area, range(area.nr_pages), "after that")
        ctx.uffd.unprotect(area.range)


@uffd_case("async-scan-restart", mem=ALL, features=ASYNC, needs=SCAN, pages=6, rows=("AS-04",))
def test_async_scan_restart(ctx: Context) -> None:
    """PM_SCAN_WP_MATCHING reports what was written and protects it again; the next scan reports only what is new."""
    area = tracked(ctx)
    for returned in (WRITTEN, WRITTEN | PRESENT):
        write(ctx.uffd, area, 1, 2, 4)
        found = Pagemap.scan(area.range, WRITTEN, returned=returned, flags=RESTART)
        expect_scan(area, found, Scan(regions(area, {1, 2, 4}, returned), area.range.end), "pages written")
        Pagemap.expect_protected(area, range(6), "after that")
        expect_written(area, (), "pages written, the next time", flags=RESTART)
        write(ctx.uffd, area, 2)
        expect_written(area, {2}, "pages written, after a write to page 2", flags=RESTART)
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


@uffd_case("async-scan-remote", mem=ALL, features=ASYNC, needs=SCAN, pages=3, rows=("AS-03", "AS-04"))
def test_async_scan_remote(ctx: Context) -> None:
    """PAGEMAP_SCAN through the pagemap of another process reports and protects that process's pages."""
    area, owner = tracked(ctx), os.getpid()
    write(ctx.uffd, area, 1)

    def scan(_channel: Channel) -> None:
        found = Pagemap.scan(area.range, WRITTEN, flags=RESTART, pid=owner)
        expect_scan(area, found, Scan(regions(area, {1}), area.range.end), "pages that the parent has written")

    with Child(scan):
        pass
    expect_written(area, set(), "pages written since the child has protected them")


@uffd_case("async-scan-concurrent", mem=(ANON,), features=ASYNC, needs=SCAN, pages=1024, rows=("AS-04",), smp=True)
def test_async_scan_concurrent(ctx: Context) -> None:
    """No write is lost between two PAGEMAP_SCANs that protect, whenever it happens."""
    area = tracked(ctx)
    found: set[int] = set()

    def collect() -> None:
        for region in Pagemap.scan(area.range, WRITTEN, flags=RESTART, room=1024).regions:
            found.update(range((region.start - area.start) // PAGE_SIZE, (region.end - area.start) // PAGE_SIZE))

    with Waiter(partial(touch, area.range, PAGE_SIZE, write=True)) as writer:
        while not writer.done:
            collect()
    collect()
    expect(sorted(set(range(1024)) - found), [], "pages written but never reported")
    ctx.uffd.expect_no_message()


@uffd_case("async-scan-eperm", mem=ALL, features=ASYNC, needs=SCAN, pages=3, rows=("AS-05", "AS-06"))
def test_async_scan_eperm(ctx: Context) -> None:
    """PM_SCAN_CHECK_WPASYNC is EPERM if any part of the range is not tracked; without it that part is passed over."""
    area = ctx.dst
    area.fill()
    with Uffd.open(ASYNC.without(Feature.WP_ASYNC)) as synchronous:
        ctx.uffd.register(area.page(0), WP)
        synchronous.register(area.page(1), WP)
        for pages in ((1, 1), (2, 1), (0, 2), (0, 3)):
            for flags in (CHECK, RESTART):
                with promise("AS-05", f"{pages[1]} pages from page {pages[0]} on, {flags}"), fails(EPERM):
                    Pagemap.scan(area.page(*pages), WRITTEN, flags=flags)
        ctx.uffd.unprotect(area.page(0))
        with promise("AS-06"):
            for where, expected in ((area.range, {0}), (area.page(1, 2), ())):
                found = Pagemap.scan(where, WRITTEN, flags=WP_MATCHING)
                expect_scan(area, found, Scan(regions(area, expected), where.end), "pages written, protecting them")
            Pagemap.expect_protected(area, {0}, "after that")


@uffd_case("async-scan-room", mem=ALL, features=ASYNC, needs=SCAN, pages=6, rows=("AS-07",))
def test_async_scan_room(ctx: Context) -> None:
    """PAGEMAP_SCAN stops where its vector is full, says where to go on, and protects no more than it reports."""
    area, end = tracked(ctx), ctx.dst.range.end
    write(ctx.uffd, area, 1, 2, 4)
    for flags in (CHECK, RESTART):
        found = Pagemap.scan(area.range, WRITTEN, flags=flags, room=1)
        with promise("AS-07", f"room for one region, {flags}"):
            expect_scan(area, found, Scan(regions(area, {1, 2}), area.page(4).start), "pages written")
    Pagemap.expect_protected(area, {0, 1, 2, 3, 5}, "after protecting what was reported")
    rest = Pagemap.scan(Range(found.walk_end, end - found.walk_end), WRITTEN, flags=RESTART, room=1)
    expect(rest, Scan(regions(area, {4}), end), "pages written, going on from there")


@uffd_case(
    "async-scan-max-pages", mem=(ANON, SHMEM, SHMEM_PRIVATE), features=ASYNC, needs=SCAN, pages=6, rows=("AS-07",)
)
def test_async_scan_max_pages(ctx: Context) -> None:
    """PAGEMAP_SCAN reports max_pages pages at most, says where to go on, and protects no more than it reports."""
    area = tracked(ctx)
    write(ctx.uffd, area, 1, 2, 4)
    for returned in (WRITTEN, WRITTEN | PRESENT):
        for limit, expected, stop in ((1, {1}, 2), (2, {1, 2}, 4), (3, {1, 2, 4}, 6), (4, {1, 2, 4}, 6)):
            with promise("AS-07", f"max_pages {limit}"):
                found = Pagemap.scan(area.range, WRITTEN, returned=returned, flags=CHECK, max_pages=limit)
                wanted = Scan(regions(area, expected, returned), area.start + stop * PAGE_SIZE)
                expect(found, wanted, "pages written")
                found = Pagemap.scan(area.range, WRITTEN, returned=returned, flags=RESTART, max_pages=limit)
                expect(found, wanted, "pages written, protecting them")
                expect_written(area, {1, 2, 4} - expected, "pages written, after that")
                write(ctx.uffd, area, *expected)


@uffd_case(
    "async-scan-hugetlb-part",
    mem=(HUGETLB, HUGETLB_PRIVATE),
    features=ASYNC,
    needs=SCAN,
    pages=2,
    rows=("AS-07", "AS-12"),
    kind=Kind.DETAIL,
)
def test_async_scan_hugetlb_part(ctx: Context) -> None:
    """Of a huge page max_pages can report a part, but none is protected in part: the scan stops before it."""
    area, base_pages = tracked(ctx), ctx.page_size // PAGE_SIZE
    write(ctx.uffd, area, 0, 1)
    part = Scan([Region(area.start, area.start + 3 * PAGE_SIZE, WRITTEN)], area.start + 3 * PAGE_SIZE)
    expect(Pagemap.scan(area.range, WRITTEN, flags=CHECK, max_pages=3), part, "pages written, 3 at most")
    for pages, limit, whole in ((1, 3, 0), (2, base_pages + 3, 1)):
        found = Pagemap.scan(area.page(0, pages), WRITTEN, flags=RESTART, max_pages=limit)
        wanted = Scan(regions(area, range(whole)), area.page(whole).start)
        expect(found, wanted, f"pages written, protecting them, {limit} at most")
        Pagemap.expect_protected(area, range(whole), "after that")


PASSED_OVER = Defect(
    id="D-AS-07",
    summary="PAGEMAP_SCAN with max_pages goes on behind a huge page that it cannot protect whole, "
    "and does not say so in walk_end",
    kernels="6.12.117, 6.18.44, 7.3.4",
    advice="with PM_SCAN_WP_MATCHING on huge pages make max_pages a multiple of their size in base pages, or 0",
    shows=r"\d+ at most: expected \[\], looking until 0x\w+, got \[\], looking until 0x\w+",
)


@uffd_case(
    "async-scan-hugetlb-stops",
    mem=(HUGETLB, HUGETLB_PRIVATE),
    features=ASYNC,
    needs=SCAN,
    pages=3,
    rows=("AS-07", "AS-12"),
    defect=PASSED_OVER,
)
def test_async_scan_hugetlb_stops(ctx: Context) -> None:
    """A scan that stops before a huge page says so, so that the next one goes on with that page."""
    area = tracked(ctx)
    write(ctx.uffd, area, 0, 1, 2)
    found = Pagemap.scan(area.range, WRITTEN, flags=RESTART, max_pages=3)
    with promise("AS-07"):
        expect(found, Scan([], area.start), "pages written, protecting them, 3 at most")


@uffd_case(
    "async-scan-hugetlb-holes",
    mem=EACH_HUGETLB,
    features=ASYNC,
    needs=SCAN,
    pages=1,
    rows=("AS-03", "AS-12"),
    kind=Kind.DETAIL,
)
def test_async_scan_hugetlb_holes(ctx: Context) -> None:
    """A huge page that is not there never counts as written, with a page table or without."""
    area, table = two_page_tables(ctx)
    poke(area.start, NEW)
    ctx.uffd.register(area.range, WP)
    holes, end = range(1, area.nr_pages), area.range.end
    expect_written(area, {0}, "pages written, before the first protection")
    found = Pagemap.scan(area.range, WRITTEN, inverted=WRITTEN)
    expect_scan(area, found, Scan(regions(area, holes, NONE), end), "pages not written")
    found = Pagemap.scan(area.range, WPALLOWED, returned=PRESENT | WRITTEN | WPALLOWED)
    expected = regions(area, {0}, PRESENT | WRITTEN | WPALLOWED) + regions(area, holes, WPALLOWED)
    expect_scan(area, found, Scan(expected, end), "pages with PAGE_IS_WPALLOWED, and which are there")
    for page, what in (1, "there"), (table, "not there"):
        start, limit = area.page(page).start, area.page_size // PAGE_SIZE + 3
        stop = start + limit * PAGE_SIZE
        found = Pagemap.scan(area.page(page, 3), WPALLOWED, max_pages=limit)
        wanted = Scan([Region(start, stop, WPALLOWED)], stop)
        expect(found, wanted, f"pages with PAGE_IS_WPALLOWED, {limit} at most, the page table {what}")


@uffd_case(
    "async-scan-hugetlb-hole-protected",
    mem=(HUGETLB_PRIVATE,),
    features=ASYNC,
    needs=SCAN,
    pages=1,
    rows=("AS-04", "AS-12"),
    kind=Kind.DETAIL,
)
def test_async_scan_hugetlb_hole_protected(ctx: Context) -> None:
    """PM_SCAN_WP_MATCHING also protects a huge page that has no page table, and the next write to it is noted.

    The mapping is private and reserves nothing, so it has no lock of its own. With one, kernels before 7.1 never
    return from such a scan (see scan-huge-hole).
    """
    area, table = two_page_tables(ctx)
    hole = area.page(table)
    ctx.uffd.register(area.range, WP)
    with promise("AS-04"):
        found = Pagemap.scan(hole, WPALLOWED, flags=RESTART)
        expect(found, Scan(regions(area, {table}, WPALLOWED), hole.end), "pages found, protecting them")
        Pagemap.expect_uffd_wp(hole.start, True, "a page without page table, after the scan")
    write(ctx.uffd, area, table)
    Pagemap.expect_uffd_wp(hole.start, False, "after a write to it")
    found = Pagemap.scan(hole, WRITTEN, flags=CHECK)
    expect(found, Scan(regions(area, {table}), hole.end), "pages written, after a write to that page")


@uffd_case("async-scan-thp", mem=(ANON,), features=ASYNC, needs=("thp", *SCAN), pages=1, rows=("AS-04", "AS-07"))
def test_async_scan_thp(ctx: Context) -> None:
    """A transparent huge page is reported and protected whole, or only as far as max_pages and the range go."""
    whole = huge_area(ctx)
    ctx.uffd.register(whole.range, WP)
    expect_written(whole, range(whole.nr_pages), "pages written, protecting them", flags=RESTART)
    Pagemap.expect_protected(whole, range(whole.nr_pages), "after that")
    expect_written(whole, (), "pages written, the next time")
    write(ctx.uffd, whole, 7)
    expect_written(whole, {7}, "pages written, after a write to page 7")

    part = huge_area(ctx)
    ctx.uffd.register(part.range, WP)
    found = Pagemap.scan(part.range, WRITTEN, flags=RESTART, max_pages=3)
    expect(found, Scan(regions(part, range(3)), part.page(3).start), "pages written, protecting them, 3 at most")
    Pagemap.expect_protected(part, range(3), "after that")
    found = Pagemap.scan(part.page(9, 2), WRITTEN, flags=RESTART)
    expect(found, Scan(regions(part, {9, 10}), part.page(11).start), "pages written among two, protecting them")
    Pagemap.expect_protected(part, {0, 1, 2, 9, 10}, "after that")
    undisturbed(ctx.uffd, lambda: part.expect_pattern_of(part))


@uffd_case("async-scan-many", mem=(ANON,), features=ASYNC, needs=SCAN, pages=1200, rows=("AS-07",))
def test_async_scan_many(ctx: Context) -> None:
    """PAGEMAP_SCAN returns more regions than the kernel buffers at a time, and stops where the vector is full."""
    area = tracked(ctx)
    undisturbed(ctx.uffd, partial(touch, area.range, 2 * PAGE_SIZE, write=True))
    odd = regions(area, range(0, 1200, 2))
    for flags in (CHECK, RESTART):
        stopped = Pagemap.scan(area.range, WRITTEN, flags=flags, room=550)
        expect(stopped, Scan(odd[:550], odd[550].start), f"550 regions written, {flags}")
    found = Pagemap.scan(area.range, WRITTEN, flags=RESTART, room=600)
    expect(found, Scan(odd[550:], area.range.end), "the regions left")


@uffd_case("async-scan-no-vector", mem=ALL, features=ASYNC, needs=SCAN, pages=4, rows=("AS-08",))
def test_async_scan_no_vector(ctx: Context) -> None:
    """Without a vector PM_SCAN_WP_MATCHING protects all pages and reports none; without it nothing happens."""
    area = tracked(ctx)
    write(ctx.uffd, area, 1, 3)
    for flags, protected in ((CHECK, {0, 2}), (RESTART, range(4)), (WP_MATCHING, range(4))):
        found = Pagemap.scan(area.range, WRITTEN, flags=flags, room=0)
        with promise("AS-08", str(flags)):
            expect(found, Scan([], area.range.end), "pages written")
            Pagemap.expect_protected(area, protected, "after that")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


@uffd_case(
    "async-scan-no-vector-swap",
    mem=(ANON, SHMEM_PRIVATE),
    features=ASYNC,
    needs=("swap", *SCAN),
    pages=3,
    rows=("AS-08",),
)
def test_async_scan_no_vector_swap(ctx: Context) -> None:
    """Without a vector PM_SCAN_WP_MATCHING also protects pages that are swapped out."""
    area = tracked(ctx)
    write(ctx.uffd, area, 1, 2)
    swap_out(area.range)
    Pagemap.scan(area.range, WRITTEN, flags=RESTART, room=0)
    with promise("AS-08"):
        Pagemap.expect_protected(area, range(3), "after that")
        expect_written(area, (), "pages written, after that")


@uffd_case(
    "async-scan-no-vector-holes",
    mem=NOT_HUGETLB,
    features=ASYNC,
    needs=SCAN,
    pages=4,
    rows=("AS-08",),
    bugs=(36,),
)
def test_async_scan_no_vector_holes(ctx: Context) -> None:
    """Without a vector PM_SCAN_WP_MATCHING also protects pages that are not there, whether others are there or not."""
    area = ctx.dst
    ctx.uffd.register(area.range, WP)
    for first, what in (0, "no page there"), (2, "page 1 there"):
        with promise("AS-08", what):
            found = Pagemap.scan(area.page(first, 2), WRITTEN, flags=RESTART, room=0)
            expect(found, Scan([], area.page(first, 2).end), "pages written")
            Pagemap.expect_protected(area, range(first + 2), "after that")
        undisturbed(ctx.uffd, lambda: touch(area.page(1), area.page_size))


@uffd_case("async-scan-errors", mem=(ANON,), features=ASYNC, needs=SCAN, pages=2, rows=("AS-09",))
def test_async_scan_errors(ctx: Context) -> None:
    """PAGEMAP_SCAN refuses flags, categories and sizes that it does not know, and an unaligned or missing address."""
    area = tracked(ctx)
    vector = (uapi.page_region * 4)()
    good = {
        "size": sizeof(uapi.pm_scan_arg),
        "start": area.start,
        "end": area.range.end,
        "vec": addressof(vector),
        "vec_len": 4,
        "category_mask": WRITTEN,
        "return_mask": WRITTEN,
    }
    categories = ("category_inverted", "category_mask", "category_anyof_mask", "return_mask")
    bad = [("flags", 1 << bit) for bit in range(2, 64)]
    bad += [(field, 1 << bit) for field in categories for bit in range(10, 64)]
    bad += [("size", size) for size in (0, good["size"] - 8, good["size"] + 8)]
    bad += [("start", area.start + 1), ("vec", 0)]
    for field, value in bad:
        with promise("AS-09", f"{field} {value:#x}"), fails(EINVAL):
            Pagemap.scan_ioctl(uapi.pm_scan_arg(**(good | {field: value})))


@uffd_case("async-scan-efault", mem=(ANON,), features=ASYNC, needs=SCAN, pages=2, rows=("AS-09",), kind=Kind.DETAIL)
def test_async_scan_efault(ctx: Context) -> None:
    """PAGEMAP_SCAN says EFAULT when its range, its vector or its argument is no memory of the caller's."""
    area = tracked(ctx)
    write(ctx.uffd, area, 1)
    above = (1 << 64) - (1 << 30)  # not 1 << 63: arm64 takes the top byte for a tag and leaves it out
    ranges = {"start in the kernel": (above, above + PAGE_SIZE), "end before start": (area.range.end, area.start)}
    vectors = {"vector in the kernel": above, "vector not mapped": area.start - PAGE_SIZE}
    arguments = [(what, start, end, 0, 0) for what, (start, end) in ranges.items()]
    arguments += [(what, area.start, area.range.end, vec, 4) for what, vec in vectors.items()]
    for what, start, end, vec, room in arguments:
        arg = uapi.pm_scan_arg(size=sizeof(uapi.pm_scan_arg), start=start, end=end, vec=vec, vec_len=room)
        arg.category_mask = arg.return_mask = WRITTEN
        with promise("AS-09", what), fails(EFAULT):
            Pagemap.scan_ioctl(arg)
    good = uapi.pm_scan_arg(size=sizeof(uapi.pm_scan_arg), start=area.start, end=area.range.end)
    with mapped(PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS) as page:
        poke(page.start, bytes(good))
        protect(page, PROT_READ)
        for what, address in (("argument that cannot be written", page.start), ("argument in nothing", 0)):
            with promise("AS-09", what), fails(EFAULT):
                scan_at(address)
    found = Pagemap.scan(area.range, WRITTEN, flags=CHECK)
    expect_scan(area, found, Scan(regions(area, {1}), area.range.end), "AS-09: pages written, after all that")


def scan_at(address: int) -> None:
    """PAGEMAP_SCAN with an argument anywhere."""
    with open("/proc/self/pagemap", "rb") as file:
        checked(lib.uffd_ioctl(file.fileno(), uapi.PAGEMAP_SCAN, address), "PAGEMAP_SCAN")


@uffd_case("async-scan-end", mem=(ANON,), features=ASYNC, needs=SCAN, pages=3, rows=("AS-09",), kind=Kind.DETAIL)
def test_async_scan_end(ctx: Context) -> None:
    """PAGEMAP_SCAN rounds the end of its range up to a page, and of an empty range reports nothing."""
    area = tracked(ctx)
    write(ctx.uffd, area, 0, 1, 2)
    found = Pagemap.scan(Range(area.start, PAGE_SIZE + 1), WRITTEN, flags=CHECK)
    expect(found, Scan(regions(area, {0, 1}), area.page(2).start), "pages written, of a page and a byte")
    found = Pagemap.scan(Range(area.start, 0), WRITTEN, flags=CHECK)
    expect(found, Scan([], area.start), "pages written, of no page")


@uffd_case("async-scan-wpallowed", mem=ALL, features=ASYNC, needs=SCAN, pages=4, rows=("AS-10",))
def test_async_scan_wpallowed(ctx: Context) -> None:
    """PAGE_IS_WPALLOWED is all memory that is tracked, written or not, and no other."""
    area = ctx.dst
    area.fill()
    with Uffd.open(ASYNC.without(Feature.WP_ASYNC)) as synchronous:
        ctx.uffd.register(area.page(0, 2), WP)
        synchronous.register(area.page(2), WP)
        ctx.uffd.writeprotect(area.page(0))
        found = Pagemap.scan(area.range, WPALLOWED)
        expect_scan(area, found, Scan(regions(area, {0, 1}, WPALLOWED), area.range.end), "pages with PAGE_IS_WPALLOWED")
        found = Pagemap.scan(area.range, WPALLOWED, inverted=WPALLOWED, returned=PRESENT)
        expect_scan(area, found, Scan(regions(area, {2, 3}, PRESENT), area.range.end), "pages without that")
        found = Pagemap.scan(area.range, PRESENT, returned=PRESENT | WPALLOWED)
        both = regions(area, {0, 1}, PRESENT | WPALLOWED) + regions(area, {2, 3}, PRESENT)
        expect_scan(area, found, Scan(both, area.range.end), "present pages, and which have PAGE_IS_WPALLOWED")
    found = Pagemap.scan(area.page(0, 2), WPALLOWED, returned=WPALLOWED | WRITTEN)
    expected = regions(area, {0}, WPALLOWED) + regions(area, {1}, WPALLOWED | WRITTEN)
    expect(found.regions, expected, "pages with PAGE_IS_WPALLOWED, and which of them are written")


@uffd_case("async-scan-categories", mem=ALL, features=ASYNC, needs=SCAN, pages=4, rows=("AS-03",), kind=Kind.DETAIL)
def test_async_scan_categories(ctx: Context) -> None:
    """PAGEMAP_SCAN selects by categories that must be there, one of which must be there, and that must not be there."""
    area = ctx.dst
    file_backed = PageCategory.FILE if ctx.mem.shared else NONE
    always = PRESENT | file_backed | (PageCategory.HUGE if ctx.mem.hugetlb else NONE)
    area.fill(0, 3)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(1))
    zero = PageCategory.PFNZERO
    every = PRESENT | PageCategory.FILE | PageCategory.HUGE | zero | WRITTEN
    protected, written = regions(area, {1}, always), always | WRITTEN
    present = regions(area, {0}, written) + protected + regions(area, {2}, written)
    scan = partial(Pagemap.scan, area.range)
    for what, expected, found in (
        ("PRESENT", present, scan(PRESENT, returned=every)),
        ("PRESENT or PFNZERO", present, scan(anyof=PRESENT | zero, returned=every)),
        ("PRESENT and not WRITTEN", protected, scan(PRESENT | WRITTEN, inverted=WRITTEN, returned=every)),
        ("PFNZERO", [], scan(zero, returned=every)),
        ("PRESENT, whatever else", regions(area, range(3), NONE), scan(PRESENT, returned=NONE)),
    ):
        expect_scan(area, found, Scan(expected, area.range.end), f"pages with {what}")


@uffd_case("async-scan-zeropage", mem=(ANON,), features=ASYNC, needs=SCAN, pages=3, rows=("AS-03",), kind=Kind.DETAIL)
def test_async_scan_zeropage(ctx: Context) -> None:
    """PAGE_IS_PFNZERO is a page that was only read so far; a write that is tracked makes it a page of its own."""
    area, zero = ctx.dst, PageCategory.PFNZERO
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    undisturbed(ctx.uffd, partial(touch, area.page(0, 2), PAGE_SIZE))
    expect(Pagemap.scan(area.range, zero).regions, regions(area, {0, 1}, zero), "zero pages, after reads")
    write(ctx.uffd, area, 1)
    expect(Pagemap.scan(area.range, zero).regions, regions(area, {0}, zero), "zero pages, after a write")
    expect_written(area, {1}, "pages written")


@uffd_case("async-scan-soft-dirty", mem=(ANON,), needs=(*SCAN, "swap"), pages=3, rows=("AS-03",), kind=Kind.DETAIL)
def test_async_scan_soft_dirty(ctx: Context) -> None:
    """PAGE_IS_SOFT_DIRTY is what was written since clear_refs, be it swapped out or not."""
    area, dirty = ctx.dst, PageCategory.SOFT_DIRTY
    area.fill()
    require_soft_dirty(area.start)
    Path("/proc/self/clear_refs").write_text("4")
    poke(area.page(1).start, b"x")
    for when in ("present", "swapped out"):
        found = Pagemap.scan(area.range, dirty)
        expect_scan(area, found, Scan(regions(area, {1}, dirty), area.range.end), f"soft-dirty pages, {when}")
        swap_out(area.range)


@uffd_case("async-scan-matching", mem=ALL, features=ASYNC, needs=SCAN, pages=4, rows=("AS-04",), kind=Kind.DETAIL)
def test_async_scan_matching(ctx: Context) -> None:
    """PM_SCAN_WP_MATCHING protects the pages that match and no others."""
    area = tracked(ctx)
    write(ctx.uffd, area, 0, 1, 2)
    found = Pagemap.scan(area.page(1, 3), PRESENT | WRITTEN, returned=WRITTEN, flags=RESTART)
    expect(found.regions, regions(area, {1, 2}), "pages written, protecting them")
    Pagemap.expect_protected(area, {1, 2, 3}, "after protecting pages 1 to 3 as far as they were written")
    found = Pagemap.scan(area.range, PageCategory.PFNZERO, flags=RESTART)
    expect(found.regions, [], "pages with PFNZERO")
    Pagemap.expect_protected(area, {1, 2, 3}, "after protecting pages of which none matched")


@uffd_case("async-scan-unregistered", mem=ALL, needs=SCAN, pages=3, rows=("AS-15",), kind=Kind.VERSION)
def test_async_scan_unregistered(ctx: Context) -> None:
    """Memory that no userfaultfd watches counts as written where it is present (until Linux 7.2), or not at all."""
    area = ctx.dst
    area.fill()
    found = Pagemap.scan(area.range, WRITTEN)
    if found.regions not in ([], regions(area, range(3))):
        raise AssertionError(f"pages written: expected all three or none, got {found}")
    saw(f"{'all pages count' if found.regions else 'none counts'} as written")
    expect(found.walk_end, area.range.end, "walk_end")
