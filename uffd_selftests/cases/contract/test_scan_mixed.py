# SPDX-License-Identifier: GPL-2.0-only
"""PAGEMAP_SCAN over pages and mappings of different kinds: each by itself, and protected as far as it is reported."""

from __future__ import annotations

from errno import EPERM
from functools import partial
from signal import SIGBUS

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC, CHECK, EACH_HUGETLB, MISSING, NOT_HUGETLB, PAGE_SIZE, PRESENT, RESTART, SCAN, SHMEM,
    SHMEM_PRIVATE, WP, WPALLOWED, WRITTEN, Advice, Area, Context, Feature, PageCategory, Pagemap, Range, Scan, Skip,
    advise, expect, expect_scan, expect_signals, expect_written, fails, keep_small, pages_in, promise, regions,
    swap_out, touch, tracked, uapi, undisturbed, unmap, write,
)  # fmt: skip

SWAPPED = PageCategory.SWAPPED
ZERO = PageCategory.PFNZERO

QUERIES = {
    "written": {"required": WRITTEN},
    "written, and what else they are": {"required": WRITTEN, "returned": WRITTEN | PRESENT | SWAPPED},
    "any of several": {"anyof": WRITTEN, "returned": WRITTEN},
    "allowed and written": {"required": WRITTEN | WPALLOWED, "returned": WRITTEN},
}
"""Ways to ask for the same pages, which the kernel answers in different loops."""


# ---- pages of several kinds ----------------------------------------------------------------------------------------

KINDS = ("present", "swapped", "zero", "hole")


def assorted(ctx: Context) -> tuple[Area, set[int]]:
    """Return an area with four times the same pages, each second one protected, and those that count as written.

    A present page, one in swap, one of zeroes, a hole; anonymous memory only.
    """
    area, uffd = ctx.allocate(32), ctx.uffd
    keep_small(area.range)
    uffd.register(area.range, WP)
    kinds = {page: KINDS[page // 2 % 4] for page in range(32)}
    for page, kind in kinds.items():
        if kind in ("present", "swapped"):
            area.fill(page, 1)
        elif kind == "zero":
            touch(area.page(page), PAGE_SIZE)
    swapped = [page for page, kind in kinds.items() if kind == "swapped"]
    for page in swapped:
        swap_out(area.page(page))
    protected = {page for page in kinds if page % 2}
    for page in sorted(protected):
        uffd.writeprotect(area.page(page))
    if not all(Pagemap.have(area.page(page), uapi.PM_SWAP)[0] for page in swapped):
        raise Skip("pages do not stay in swap")
    Pagemap.expect_protected(area, protected, "before the scan")
    return area, set(range(32)) - protected


@uffd_case(
    "scan-mixed",
    mem=(ANON,),
    variants=tuple(QUERIES),
    features=ASYNC,
    needs=("swap", *SCAN),
    pages=1,
    rows=("AS-04", "AS-08"), bugs=(36,),
)
def test_scan_mixed(ctx: Context, variant: str) -> None:
    """Present, swapped, zero and missing pages are each found and protected where they are, in any part of a range."""
    query = QUERIES[variant]
    for first, count in ((0, 32), (3, 20), (5, 1), (6, 1), (31, 1), (1, 30)):
        area, written = assorted(ctx)
        where = area.page(first, count)
        inside = {page for page in written if first <= page < first + count}
        with promise("AS-04", f"{count} pages from page {first} on"):
            for flags in (CHECK, RESTART):
                found = Pagemap.scan(where, flags=flags, **query)
                expect(pages_in(area, found.regions), sorted(inside), f"pages written, {flags}")
                expect(found.walk_end, where.end, f"walk_end, {flags}")
                left = set(range(32)) - written | (inside if flags == RESTART else set())
                Pagemap.expect_protected(area, left, f"after that, {flags}")
            expect_written(area, written - inside, "pages written, in all of the area, after that")
            for page in (first, first + count - 1):
                write(ctx.uffd, area, page)
            expected = written - inside | {first, first + count - 1}
            expect_written(area, expected, "pages written, the first and the last being written to")
        undisturbed(ctx.uffd, partial(check_contents, area))


def check_contents(area: Area) -> None:
    """Assert that each page of an assorted area holds what it did."""
    for page in range(32):
        if KINDS[page // 2 % 4] in ("present", "swapped"):
            area.expect_pattern_of(area, page, 1)
        else:
            area.expect_zero(page, 1)


@uffd_case("scan-mixed-limit", mem=(ANON,), features=ASYNC, needs=("swap", *SCAN), pages=1, rows=("AS-07",), bugs=(36,))
def test_scan_mixed_limit(ctx: Context) -> None:
    """Whatever kind of page max_pages or the room ends at, it is not protected, and the next scan begins with it."""
    for name, query in QUERIES.items():
        for limit, room in ((1, 64), (6, 64), (0, 5), (3, 2)):
            area, written = assorted(ctx)
            kept = set(range(32)) - written
            at, seen, all_found = area.start, set[int](), list[int]()
            with promise("AS-07", f"{name}, max_pages {limit}, room {room}"):
                while at < area.range.end:
                    rest = partial(Pagemap.scan, Range(at, area.range.end - at), flags=RESTART, **query)
                    found = rest(max_pages=limit, room=room)
                    pages = pages_in(area, found.regions)
                    expect(found.walk_end > at, True, f"walk_end {found.walk_end:#x} is behind {at:#x}")
                    expect(len(pages) <= (limit or 32), True, f"{len(pages)} pages, no more than asked for")
                    stop = (found.walk_end - area.start) // PAGE_SIZE
                    expected = [page for page in sorted(written) if (at - area.start) // PAGE_SIZE <= page < stop]
                    expect(pages, expected, f"pages reported, all up to walk_end at page {stop}")
                    seen |= set(pages)
                    Pagemap.expect_protected(area, kept | seen, "after a scan")
                    at, all_found = found.walk_end, all_found + pages
                expect(all_found, sorted(written), "pages reported by all scans")
            undisturbed(ctx.uffd, partial(check_contents, area))
            unmap(area.range)


@uffd_case(
    "scan-mixed-cached", mem=(SHMEM, SHMEM_PRIVATE), features=ASYNC, needs=SCAN, pages=12, rows=("AS-04",), bugs=(36,),
)  # fmt: skip
def test_scan_mixed_cached(ctx: Context) -> None:
    """In a file, pages mapped, only cached, protected without being there, and missing are treated alike."""
    area, uffd = ctx.dst, ctx.uffd
    with area.file_view() as view:
        area.pattern.fill(view.start, 0, 9)  # 9 to 11 are holes in the file
    touch(area.page(0, 6), PAGE_SIZE)
    uffd.register(area.range, WP)
    advise(area.page(3, 9), Advice.DONTNEED)  # what was mapped around them
    for page in (1, 4, 7, 10):
        uffd.writeprotect(area.page(page))
    kept = {1, 4, 7, 10}
    for name, query in QUERIES.items():
        with promise("AS-04", name):
            found = Pagemap.scan(area.page(2, 8), flags=RESTART, **query)
            expect(pages_in(area, found.regions), [2, 3, 5, 6, 8, 9], "pages written, protecting them, from 2 to 9")
            Pagemap.expect_protected(area, kept | set(range(2, 10)), "after that")
            expect_written(area, {0, 11}, "pages written, in all of the area")
            uffd.unprotect(area.range)
            for page in kept:
                uffd.writeprotect(area.page(page))
    Pagemap.scan(area.page(2, 8), WRITTEN, flags=RESTART, room=0)
    with promise("AS-08"):
        Pagemap.expect_protected(area, kept | set(range(2, 10)), "after a scan without a vector, from 2 to 9")
    write(uffd, area, 3, 9)
    expect_written(area, {0, 3, 9, 11}, "AS-04: pages written, after writes to 3 and 9")
    undisturbed(uffd, lambda: area.expect_pattern_of(area, 0, 9))
    undisturbed(uffd, lambda: area.expect_zero(9))


@uffd_case("scan-parts", mem=ALL, features=ASYNC, needs=SCAN, pages=7, rows=("AS-03", "AS-04"))
def test_scan_parts(ctx: Context) -> None:
    """Whichever pages were written, and whichever part is looked at, just these are reported, and protected."""
    area, uffd = tracked(ctx), ctx.uffd
    for written in ({0}, {3}, {6}, {0, 6}, {1, 2, 3}, {0, 1, 4, 6}, set(range(7))):
        for first, count in ((0, 7), (1, 5), (0, 1), (6, 1), (3, 2), (2, 4)):
            uffd.writeprotect(area.range)
            write(uffd, area, *written)
            inside = {page for page in written if first <= page < first + count}
            found = Pagemap.scan(area.page(first, count), WRITTEN, flags=RESTART)
            with promise("AS-04", f"{sorted(written)} written, {count} pages from page {first} on"):
                wanted = Scan(regions(area, inside), area.page(first, count).end)
                expect_scan(area, found, wanted, "pages written, protecting them")
                left = set(range(7)) - (written - inside)
                Pagemap.expect_protected(area, left, "after that")
    undisturbed(uffd, lambda: area.expect_pattern_of(area))


@uffd_case(
    "scan-limit-hole", mem=NOT_HUGETLB, features=ASYNC, needs=SCAN, pages=1, rows=("AS-07",), bugs=(36,),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_scan_limit_hole(ctx: Context) -> None:
    """Where there is no page table, max_pages ends the scan and the protection at the same page."""
    per_table = PAGE_SIZE // 8
    area = ctx.allocate(2 * per_table + 10)
    keep_small(area.range)
    ctx.uffd.register(area.range, WP)
    done = 0
    for limit in (3, per_table, per_table - 1):
        found = Pagemap.scan(area.page(done, area.nr_pages - done), WRITTEN, flags=RESTART, max_pages=limit)
        with promise("AS-07", f"{limit} at most, from page {done} on"):
            wanted = Scan(regions(area, range(done, done + limit)), area.page(done + limit).start)
            expect_scan(area, found, wanted, "pages written, protecting them")
            done += limit
            Pagemap.expect_protected(area, range(done), "after that")
    expect_written(area, range(done, area.nr_pages), "AS-07: pages written, after all that")


@uffd_case(
    "scan-room-hole", mem=NOT_HUGETLB, features=ASYNC, needs=SCAN, pages=1, rows=("AS-07", "AS-18"), bugs=(36,)
)
def test_scan_room_hole(ctx: Context) -> None:
    """Where the room ends in front of memory without a page table, that is not protected, and the next scan has it."""
    per_table = PAGE_SIZE // 8
    area = ctx.allocate(3 * per_table)
    keep_small(area.range)
    first = -(area.start // PAGE_SIZE) % per_table  # of a page table; the one behind it has no page
    area.fill(first, per_table)
    ctx.uffd.register(area.range, WP)
    where, there = area.page(first, per_table + 5), range(first, first + per_table)
    behind = range(there.stop, there.stop + 5)
    for scanned, told, returned in ((where, there, WRITTEN | PRESENT), (area.page(behind.start, 5), behind, WRITTEN)):
        found = Pagemap.scan(scanned, WRITTEN, returned=WRITTEN | PRESENT, flags=RESTART, room=1)
        with promise("AS-07", f"from page {told.start} on"):
            wanted = Scan(regions(area, told, returned), area.start + told.stop * PAGE_SIZE)
            expect_scan(area, found, wanted, "pages written, protecting them, with room for one region")
            Pagemap.expect_protected(area, range(first, told.stop), "after that")
    write(ctx.uffd, area, first, behind.start)
    written = {*range(area.nr_pages)} - {*there, *behind} | {first, behind.start}
    expect_written(area, written, "AS-18: pages written, after writes to the first and to one that was a hole")
    undisturbed(ctx.uffd, partial(area.expect_pattern_of, area, first, per_table))


@uffd_case("scan-poisoned", mem=ALL, features=ASYNC | Feature.POISON, needs=SCAN, pages=5, rows=("AS-04", "PO-07"))
def test_scan_poisoned(ctx: Context) -> None:
    """A scan that protects leaves poison what it is, protects what is around it, and ends."""
    area, uffd = ctx.dst, ctx.uffd
    for page in (0, 2, 4):
        area.fill(page, 1)
    uffd.register(area.range, WP | MISSING)
    for page in (1, 3):
        uffd.poison(area.page(page))
    for number in range(2):
        found = Pagemap.scan(area.range, WRITTEN, flags=RESTART)
        with promise("AS-04", f"scan {number}"):
            sound = [page for page in pages_in(area, found.regions) if page in (0, 2, 4)]
            expect(sound, [] if number else [0, 2, 4], "pages that are there and written")
            expect(found.walk_end, area.range.end, "walk_end")
            marks = Pagemap.have(area.range, uapi.PM_UFFD_WP, area.page_size)
            expect([marks[page] for page in (0, 2, 4)], [True] * 3, "whether pages 0, 2, 4 are protected")
    for page in (1, 3):
        for store in (False, True):
            expect_signals(area.page(page), area.page_size, SIGBUS, f"poisoned page {page}", write=store)
    write(uffd, area, 2)
    sound = [page for page in pages_in(area, Pagemap.scan(area.range, WRITTEN).regions) if page in (0, 2, 4)]
    expect(sound, [2], "AS-04: pages that are there and written, after a write to page 2")
    for page in (0, 2, 4):
        undisturbed(uffd, partial(area.expect_pattern_of, area, page, 1))


STALE_END = Defect(
    id="D-AS-29",
    summary="PAGEMAP_SCAN that returns more than 512 regions says in walk_end that it stopped behind the first 512, "
    "although it looked at the whole range",
    kernels="6.12.117, 6.18.44, 7.3.4",
    advice="give the vector room for 512 regions at most, or take the range for done where fewer regions came than "
    "there was room for",
    shows=r"AS-29, \d+ regions: walk_end, as a page of the area: expected 2600, got \d+",
)


@uffd_case("scan-walk-end", mem=(ANON,), features=ASYNC, needs=SCAN, pages=2600, rows=("AS-29",), defect=STALE_END)
def test_scan_walk_end(ctx: Context) -> None:
    """A scan that looked at all of its range says so in walk_end, however many regions it returned."""
    area = tracked(ctx)
    for count in (511, 512, 513, 1025, 1300):
        ctx.uffd.writeprotect(area.range)
        undisturbed(ctx.uffd, partial(touch, area.page(0, 2 * count), 2 * PAGE_SIZE, write=True))
        found = Pagemap.scan(area.range, WRITTEN, flags=CHECK, room=1500)
        with promise("AS-29", f"{count} regions"):
            written = regions(area, range(0, 2 * count, 2))
            expect_scan(area, found._replace(walk_end=0), Scan(written, 0), "pages written")
            expect((found.walk_end - area.start) // PAGE_SIZE, 2600, "walk_end, as a page of the area")


FORGOTTEN = Defect(
    id="D-AS-30",
    summary="PAGEMAP_SCAN with PM_SCAN_WP_MATCHING that ends with EPERM has protected the tracked pages before the "
    "mapping that is not tracked, and told of none: what was written to them is lost",
    kernels="6.12.117, 6.18.44, 7.3.4",
    advice="scan no range of which you do not track all, or leave out PM_SCAN_CHECK_WPASYNC",
    shows=r"AS-30: .*expected PM_UFFD_WP in pagemap on exactly these pages: 0, 4, got 0-2, 4;",
)


@uffd_case("scan-refused", mem=ALL, features=ASYNC, needs=SCAN, pages=5, rows=("AS-30",), defect=FORGOTTEN)
def test_scan_refused(ctx: Context) -> None:
    """A scan that is refused with EPERM has protected nothing, so that no write is lost between it and the next."""
    area, uffd = ctx.dst, ctx.uffd
    area.fill()
    uffd.register(area.page(0, 3), WP)
    uffd.register(area.page(4), WP)
    uffd.writeprotect(area.page(0))
    uffd.writeprotect(area.page(4))
    with promise("AS-30"):
        with fails(EPERM):
            Pagemap.scan(area.range, WRITTEN, flags=RESTART)
        Pagemap.expect_protected(area, {0, 4}, "after that")


# ---- huge pages of hugetlb -----------------------------------------------------------------------------------------


@uffd_case("scan-hugetlb-mixed", mem=EACH_HUGETLB, features=ASYNC, needs=SCAN, pages=7, rows=("AS-04", "AS-12"))
def test_scan_hugetlb_mixed(ctx: Context) -> None:
    """Of huge pages written, protected and missing, those written are reported, and protected, in any part."""
    area, uffd = ctx.dst, ctx.uffd
    base_pages = area.page_size // PAGE_SIZE
    for page in (0, 1, 3, 4, 6):
        area.fill(page, 1)
    uffd.register(area.range, WP)
    there = {0, 1, 3, 4, 6}
    for first, count in ((0, 7), (1, 5), (3, 2), (4, 1)):
        for room, limit in ((8, 0), (8, 7 * base_pages), (1, 0)):
            uffd.unprotect(area.range)
            uffd.writeprotect(area.page(3))
            written = there - {3}
            inside = sorted(page for page in written if first <= page < first + count)
            if room == 1 and inside and len(regions(area, inside)) > 1:
                stop = regions(area, inside)[1].start
                inside = pages_in(area, regions(area, inside)[:1])
            else:
                stop = area.page(first, count).end
            found = Pagemap.scan(area.page(first, count), WRITTEN, flags=RESTART, room=room, max_pages=limit)
            with promise("AS-04", f"{count} pages from page {first} on, room {room}, max_pages {limit}"):
                expect_scan(area, found, Scan(regions(area, inside), stop), "pages written, protecting them")
                marks = Pagemap.have(area.range, uapi.PM_UFFD_WP, area.page_size)
                protected = [page for page in sorted(there) if marks[page]]
                expect(protected, sorted({3, *inside}), "pages that are there and protected, after that")
                expect_written(area, written - set(inside), "pages written, after that")
                write(uffd, area, *inside)
                expect_written(area, written, "pages written, after writes to what was protected")
    for page in there:
        undisturbed(uffd, partial(area.expect_pattern_of, area, page, 1))
