# SPDX-License-Identifier: GPL-2.0-only
"""PAGEMAP_SCAN over transparent huge pages: whole, in part, several of them, and beside other pages."""

from __future__ import annotations


from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ANON, ASYNC, CHECK, NONE, PAGE_SIZE, PRESENT, RESTART, SCAN, SHMEM, THP, WP, WRITTEN, Advice, Context, PageCategory,
    Pagemap, Scan, Skip, advise, expect, expect_scan, expect_written, huge_area, pages_in, pmd_mapped, pmd_size,
    promise, regions, touch, undisturbed, unmap, write,
)  # fmt: skip

FILE, HUGE = PageCategory.FILE, PageCategory.HUGE


def require_small_thp() -> None:
    """Skip where three huge pages would take too long to fill."""
    if pmd_size() > 32 << 20:
        raise Skip(f"three transparent huge pages of {pmd_size() >> 20} MiB would take too long to fill")


def each_of(whole: int, number: int) -> range:
    """Return the base pages of one of several huge pages."""
    return range(number * whole, (number + 1) * whole)


@uffd_case("scan-thp-parts", mem=(ANON,), features=ASYNC, needs=("thp", *SCAN), pages=1, rows=("AS-04", "AS-07"))
def test_scan_thp_parts(ctx: Context) -> None:
    """Only what a scan protects in part is cut: huge pages beside it stay whole, and as they were."""
    require_small_thp()
    whole = pmd_size() // PAGE_SIZE
    for what, begin, length, limit in (
        ("the end of one and the beginning of the next", 2 * whole - 5, 9, 0),
        ("one and a part of the next", whole, 2 * whole, whole + 3),
        ("the first page", whole, 1, 0),
        ("the last page", 2 * whole - 1, 1, 0),
        ("all but the first and the last page", whole + 1, whole - 2, 0),
        ("one as a whole, and a page on both sides", whole - 1, whole + 2, 0),
    ):
        area = huge_area(ctx, 3)
        ctx.uffd.register(area.range, WP)
        found = Pagemap.scan(area.page(begin, length), WRITTEN, flags=RESTART, max_pages=limit)
        done = set(range(begin, begin + (limit or length)))
        with promise("AS-04", what):
            wanted = Scan(regions(area, done), area.page(max(done) + 1).start)
            expect_scan(area, found, wanted, "pages written, protecting them")
            Pagemap.expect_protected(area, done, "after that")
            expect_written(area, set(range(area.nr_pages)) - done, "pages written, after that")
            cut = [number for number in range(3) if 0 < len(done & set(each_of(whole, number))) < whole]
            expect(pmd_mapped(area.range), (3 - len(cut)) * pmd_size(), "bytes still mapped as huge pages")
            write(ctx.uffd, area, min(done), max(done))
            expect_written(area, set(range(area.nr_pages)) - done | {min(done), max(done)}, "after writes to two pages")
        undisturbed(ctx.uffd, lambda area=area: area.expect_pattern_of(area))  # type: ignore[misc]
        unmap(area.range)


@uffd_case("scan-thp-look", mem=(ANON, SHMEM), features=ASYNC, needs=("thp", *SCAN), pages=1, rows=("AS-07",))
def test_scan_thp_look(ctx: Context) -> None:
    """A scan that only looks reports any part of a huge page, and leaves it in one piece and unprotected."""
    require_small_thp()
    area = huge_area(ctx, 2)
    whole = area.nr_pages // 2
    ctx.uffd.register(area.range, WP)
    size = pmd_mapped(area.range)
    for first, count, limit in ((0, 2 * whole, whole + 3), (whole - 2, 4, 0), (7, 1, 0), (0, 2 * whole, 5), (1, 9, 4)):
        found = Pagemap.scan(area.page(first, count), WRITTEN, flags=CHECK, max_pages=limit)
        done = range(first, first + (limit or count))
        with promise("AS-07", f"{count} pages from page {first} on, max_pages {limit}"):
            expect_scan(area, found, Scan(regions(area, done), area.page(done.stop).start), "pages written")
    Pagemap.expect_protected(area, (), "AS-07: after scans that only looked")
    expect(pmd_mapped(area.range), size, "AS-07: bytes mapped as huge pages, after scans that only looked")


@uffd_case("scan-thp-room", mem=(ANON,), features=ASYNC, needs=("thp", *SCAN), pages=1, rows=("AS-07",))
def test_scan_thp_room(ctx: Context) -> None:
    """Where the room ends in front of a huge page, that is neither protected nor cut, and the next scan has it."""
    require_small_thp()
    area = huge_area(ctx, 3)
    whole = area.nr_pages // 3
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(whole, whole))
    for number, (first, stop) in enumerate(((0, 2 * whole), (2 * whole, 3 * whole))):
        found = Pagemap.scan(area.page(first, 3 * whole - first), WRITTEN, flags=RESTART, room=1)
        part = range(first, first + whole)
        with promise("AS-07", f"scan {number}"):
            expect_scan(area, found, Scan(regions(area, part), area.start + stop * PAGE_SIZE), "pages written")
            Pagemap.expect_protected(area, range(first + whole if number else 2 * whole), "after that")
            expect(pmd_mapped(area.range), area.range.len, "bytes mapped as huge pages")
    write(ctx.uffd, area, 2 * whole + 1, 5)
    expect_written(area, {2 * whole + 1, 5}, "AS-07: pages written, after writes to two huge pages")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


@uffd_case(
    "scan-thp-mixed", mem=(ANON,), features=ASYNC, needs=("thp", *SCAN), pages=1, rows=("AS-03", "AS-04"), bugs=(36,),
)  # fmt: skip
def test_scan_thp_mixed(ctx: Context) -> None:
    """In one scan, a huge page, one cut into small ones, one that is dropped and one of zeroes are each told right."""
    require_small_thp()
    area = huge_area(ctx, 4)
    whole, uffd = area.nr_pages // 4, ctx.uffd
    last = area.page(3 * whole, whole)
    advise(last, Advice.DONTNEED)
    if (THP / "use_zero_page").read_text().strip() == "1":
        touch(last, last.len)
    uffd.register(area.range, WP)
    uffd.writeprotect(area.range)
    advise(area.page(2 * whole, whole), Advice.DONTNEED)
    write(uffd, area, whole + 3, 4 * whole - 1)
    dropped = set(range(2 * whole, 3 * whole))
    changed = {whole + 3, 4 * whole - 1} | dropped
    for flags in (CHECK, RESTART):
        with promise("AS-03", str(flags)):
            found = Pagemap.scan(area.range, WRITTEN, flags=flags, returned=WRITTEN | PRESENT)
            expect(pages_in(area, found.regions), sorted(changed), "pages written")
    Pagemap.expect_protected(area, range(4 * whole), "AS-04: after a scan that protects")
    expect_written(area, (), "AS-04: pages written, after that")
    uffd.unprotect(area.page(whole - 2, 4))
    write(uffd, area, 2 * whole + 9)
    changed = {*range(whole - 2, whole + 2), 2 * whole + 9}
    expect_written(area, changed, "AS-03: pages written, on the edge of two and in the dropped one", flags=RESTART)
    Pagemap.expect_protected(area, range(4 * whole), "AS-04: after that")
    undisturbed(uffd, lambda: area.expect_pattern_of(area, 0, 2 * whole))
    undisturbed(uffd, lambda: area.expect_zero(2 * whole))


@uffd_case("scan-thp-file", mem=(ANON, SHMEM), features=ASYNC, needs=("thp", *SCAN), pages=1, rows=("AS-03", "AS-04"))
def test_scan_thp_file(ctx: Context) -> None:
    """A huge page is told to be of a file or not, whatever else is asked, and protected by such a scan as by others."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    every = range(area.nr_pages)
    kind = HUGE | PRESENT | (FILE if ctx.mem.shared else NONE)
    asked = WRITTEN | FILE | PRESENT | HUGE
    found = Pagemap.scan(area.range, WRITTEN, returned=asked, flags=CHECK)
    expect_scan(area, found, Scan(regions(area, every, kind | WRITTEN), area.range.end), "AS-03: categories")
    of_file = Pagemap.scan(area.range, FILE)
    expect(pages_in(area, of_file.regions), list(every) if ctx.mem.shared else [], "AS-03: pages of a file")
    of_none = Pagemap.scan(area.range, FILE, inverted=FILE)
    expect(pages_in(area, of_none.regions), [] if ctx.mem.shared else list(every), "AS-03: pages of no file")
    found = Pagemap.scan(area.range, WRITTEN, returned=asked, flags=RESTART)
    expect_scan(area, found, Scan(regions(area, every, kind | WRITTEN), area.range.end), "AS-04: while protecting")
    Pagemap.expect_protected(area, every, "AS-04: after that")
    with promise("AS-04", "of protected pages, which are asked for as well"):
        part = area.page(3, area.nr_pages - 5)
        for where in (area.range, part):
            size = pmd_mapped(area.range)
            found = Pagemap.scan(where, anyof=PRESENT | WRITTEN, returned=PRESENT | WRITTEN | FILE, flags=RESTART)
            inside = every if where == area.range else range(3, area.nr_pages - 2)
            expect_scan(area, found, Scan(regions(area, inside, kind & ~HUGE), where.end), "categories")
            Pagemap.expect_protected(area, every, "after that")
            expect(pmd_mapped(area.range), size, "bytes mapped as huge pages, as nothing was to be done")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))
    Pagemap.expect_protected(area, every, "AS-04: after reads")
