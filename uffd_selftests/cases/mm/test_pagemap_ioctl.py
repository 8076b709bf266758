# SPDX-License-Identifier: GPL-2.0-only
"""pagemap_ioctl: writes that are tracked with UFFD_FEATURE_WP_ASYNC, and what PAGEMAP_SCAN says of them.

The promises one by one are in contract/test_async_wp_scan.py; here are the program's sequences, its kinds of memory,
its walks in parts and its race. Each case has in its name the function of the program that it stands for.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ctypes import addressof, sizeof
from errno import EPERM
from functools import partial
from itertools import product
from typing import NamedTuple

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC, CHECK, MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, NONE, NOT_HUGETLB, PAGE_SIZE, PRESENT,
    PROT_NONE, PROT_READ, PROT_WRITE, RESTART, SCAN, SHMEM, SHM_HUGETLB, THP, WP, WPALLOWED, WRITTEN, Advice, Area,
    Context, PageCategory, Pagemap, Pages, Pattern, PmScanFlag, Range, Region, Scan, Skip, Uffd, Waiter, advise,
    default_hugepage_size, expect, expect_same, expect_scan, expect_written, fails, huge_area, map_memory, mapped, peek,
    plain_file, pmd_mapped, pmd_size, poke, promise, protect, regions, sysv_segment, touch, tracked, uapi, undisturbed,
    unmap, write,
)  # fmt: skip

NO_FLAGS = PmScanFlag(0)
READ_WRITE = PROT_READ | PROT_WRITE
PROTECTIONS = {PROT_NONE: "PROT_NONE", PROT_READ: "PROT_READ", READ_WRITE: "PROT_READ | PROT_WRITE"}
MAP_HUGETLB = 0x40000


def track(uffd: Uffd, where: Range) -> None:
    """Register a range and protect it, pages present or not."""
    uffd.register(where, WP)
    uffd.writeprotect(where)


def write_each(uffd: Uffd, pages: Area | Pages, first: int, count: int) -> None:
    """Write to consecutive pages, changing nothing; nobody may hear of it."""
    undisturbed(uffd, partial(touch, pages.page(first, count), pages.page_size, write=True))


def joined(found: list[Region]) -> list[Region]:
    """Return regions of which none is continued by the next one."""
    result: list[Region] = []
    for region in found:
        if result and result[-1].end == region.start and result[-1].categories == region.categories:
            result[-1] = result[-1]._replace(end=region.end)
        else:
            result.append(region)
    return result


# ---- base_tests ----------------------------------------------------------------------------------------------------


def check_base(uffd: Uffd, pages: Pages) -> None:
    """Take memory through the program's base_tests: each write is reported where it was made, and only once."""
    count, middle = pages.nr_pages, pages.nr_pages // 2
    track(uffd, pages.range)
    expect_written(pages, (), "pages written, new and protected", flags=RESTART)
    write_each(uffd, pages, 0, count)
    expect_written(pages, range(count), "pages written, after writes to all")
    expect_written(pages, range(count), "pages written, protecting them", flags=RESTART)
    write_each(uffd, pages, 1, count - 2)
    expect_written(pages, range(1, count - 1), "pages written, all but the first and the last", flags=RESTART)
    expect_written(pages, (), "pages written, after protecting them")
    write_each(uffd, pages, middle, 1)
    expect_written(pages, {middle}, "pages written, after a write to the middle", flags=RESTART)
    write_each(uffd, pages, middle, 2)
    two = pages.page(middle, 2)
    wanted = Scan(regions(pages, (middle, middle + 1)), two.end)
    expect_scan(pages, Pagemap.scan(two, WRITTEN), wanted, "pages written, of the two in the middle")


@contextmanager
def small_memory(kind: str) -> Iterator[Range]:
    """Map memory of one of the program's kinds."""
    length = 10 * PAGE_SIZE
    if kind == "huge page":
        length = 2 * pmd_size()
    elif kind == "large page":
        length = 5120 * PAGE_SIZE
    with ExitStack() as stack:
        fd = -1
        if kind == "file":
            fd = stack.enter_context(plain_file(length))
        elif kind == "memfd":
            fd = os.memfd_create("uffd-pagemap", os.MFD_CLOEXEC)
            stack.callback(os.close, fd)
            os.ftruncate(fd, length)
        flags = MAP_PRIVATE | (MAP_ANONYMOUS if fd < 0 else 0)
        where = stack.enter_context(mapped(length, flags=flags, fd=fd))
        if kind == "huge page":
            where = Range(-(-where.start // pmd_size()) * pmd_size(), pmd_size())
            advise(where, Advice.HUGEPAGE)
            touch(where, where.len, write=True)
            if pmd_mapped(where) < where.len:
                raise Skip(f"no transparent huge page to be had: echo madvise > {THP}/enabled")
        yield where


@uffd_case(
    "pagemap-base",
    variants=("page", "large page", "huge page", "file", "memfd"),
    features=ASYNC,
    needs=SCAN,
    rows=("AS-03", "AS-04", "AS-12"),
)
def test_pagemap_base(variant: str) -> None:
    """Of private memory of any kind exactly the pages written since the last scan are reported as written."""
    if variant == "huge page" and not pmd_size():
        raise Skip("no transparent huge pages: boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
    with small_memory(variant) as where, Uffd.open(ASYNC) as uffd:
        check_base(uffd, Pages(where, PAGE_SIZE))


@contextmanager
def huge_memory(kind: str, length: int) -> Iterator[Range]:
    """Map huge pages: without a file, of a file, or of a System V segment."""
    with ExitStack() as stack:
        if kind == "System V":
            yield stack.enter_context(sysv_segment(length, SHM_HUGETLB))
            return
        fd, flags = -1, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB
        if kind == "memfd":
            fd, flags = os.memfd_create("uffd-pagemap", os.MFD_CLOEXEC | os.MFD_HUGETLB), MAP_SHARED
            stack.callback(os.close, fd)
            os.ftruncate(fd, length)
        yield stack.enter_context(mapped(length, flags=flags, fd=fd))


@uffd_case(
    "pagemap-base-hugetlb",
    variants=("System V", "anonymous", "memfd"),
    features=ASYNC,
    needs=SCAN,
    spare_hugepages=4,
    rows=("AS-03", "AS-04", "AS-12"),
)
def test_pagemap_base_hugetlb(variant: str) -> None:
    """Of huge pages, however mapped, exactly those written since the last scan are reported as written."""
    size = default_hugepage_size()
    with huge_memory(variant, 4 * size) as where, Uffd.open(ASYNC) as uffd:
        check_base(uffd, Pages(where, size))
        found = Pagemap.scan(where, WRITTEN, returned=WRITTEN | PageCategory.HUGE)
        expected = regions(Pages(where, size), (2, 3), WRITTEN | PageCategory.HUGE)
        expect(found.regions, expected, "pages written, and whether they are huge")


# ---- hpage_unit_tests ----------------------------------------------------------------------------------------------


@uffd_case(
    "pagemap-hpage",
    mem=(ANON, SHMEM),
    variants=("as a whole", "page by page"),
    features=ASYNC,
    needs=("thp", *SCAN),
    pages=1,
    rows=("AS-04", "AS-07"),
    bugs=(36,),
)
def test_pagemap_hpage(ctx: Context, variant: str) -> None:
    """Of several huge pages, mapped as a whole or page by page, any part can be reported and protected by itself.

    The kernel leaves a huge page of shared memory as a whole when it is written: all of it then counts as written.
    """
    if pmd_size() > 32 << 20:
        raise Skip(f"three transparent huge pages of {pmd_size() >> 20} MiB would take too long to fill")
    count = 3 * pmd_size() // PAGE_SIZE
    half, half_page = count // 2, count // 6

    def written_area() -> Area:
        area = huge_area(ctx, 3)
        ctx.uffd.register(area.range, WP)
        if variant == "page by page":
            ctx.uffd.writeprotect(area.range)
            expect_written(area, (), "pages written, protected")
            write_each(ctx.uffd, area, 0, count)
        return area

    with promise("AS-04", "all"):
        area = written_area()
        expect_written(area, range(count), "pages written, protecting them", flags=RESTART)
        expect_written(area, (), "pages written, after that")
        write(ctx.uffd, area, half)
        whole = range(count // 3, 2 * count // 3)
        found = Pagemap.scan(area.range, WRITTEN)
        if not (ctx.mem is SHMEM and variant == "as a whole" and found.regions == regions(area, whole)):
            expect_written(area, {half}, "pages written, after a write to the middle")
    with promise("AS-04", "first and second half"):
        area = written_area()
        Pagemap.scan(area.page(0, half), WRITTEN, flags=RESTART, room=0)
        expect_written(area, range(half, count), "pages written, after protecting the first half")
        found = Pagemap.scan(area.page(half, half), WRITTEN, flags=RESTART, max_pages=half)
        wanted = Scan(regions(area, range(half, count)), area.range.end)
        expect_scan(area, found, wanted, "pages written in the second half")
        expect_written(area, (), "pages written, after protecting that too")
    with promise("AS-07", "half a huge page, then one more"):
        area, protected = written_area(), 0
        for limit in (half_page, 2 * half_page):
            found = Pagemap.scan(area.range, WRITTEN, flags=RESTART, room=1, max_pages=limit)
            part = range(protected, protected + limit)
            wanted = Scan(regions(area, part), area.page(part.stop).start)
            expect_scan(area, found, wanted, f"pages written, {limit} at most")
            protected = part.stop
            expect_written(area, range(protected, count), "pages written, after that")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


# ---- sanity_tests_sd: walks in parts -------------------------------------------------------------------------------


@uffd_case("pagemap-two-regions", mem=ALL, features=ASYNC, needs=SCAN, pages=3, rows=("AS-04",))
def test_pagemap_two_regions(ctx: Context) -> None:
    """Of two mappings that one handle tracks, protecting one leaves the other as it is."""
    areas = ctx.dst, ctx.src
    for area in areas:
        area.fill()
        track(ctx.uffd, area.range)
        write_each(ctx.uffd, area, 0, 3)
    Pagemap.scan(ctx.dst.range, WRITTEN, flags=RESTART, room=0)
    expect_written(ctx.dst, (), "pages written, after protecting them")
    expect_written(ctx.src, range(3), "pages written in the other mapping")


class Walk(NamedTuple):
    """A scan of a thousand pages, and what must come of it."""

    room: int
    max_pages: int
    regions: int
    stop: int
    """The page at which it stops looking."""


DENSE = (
    Walk(1000, 0, 1, 1000),
    Walk(1, 0, 1, 1000),
    Walk(1, 1000, 1, 1000),
    Walk(1000, 500, 1, 500),
    Walk(1000, 1, 1, 1),
    Walk(1000, (1 << 64) - 1, 1, 1000),
    Walk(0, 0, 0, 1000),
)
SPARSE = (
    Walk(1000, 0, 500, 1000),
    Walk(1, 0, 1, 2),
    Walk(1, 1000, 1, 2),
    Walk(500, 1000, 500, 1000),
    Walk(1000, 1000, 500, 1000),
    Walk(1000, 500, 500, 1000),
    Walk(1000, 1, 1, 2),
    Walk(1000, 250, 250, 500),
)


@uffd_case("pagemap-walk-end", mem=NOT_HUGETLB, features=ASYNC, needs=SCAN, pages=1000, rows=("AS-07", "AS-09"))
def test_pagemap_walk_end(ctx: Context) -> None:
    """A scan with any room and limit says where it stopped: behind what it reported and all that need no report."""
    area = tracked(ctx)
    for step, walks in ((1, DENSE), (2, SPARSE)):
        ctx.uffd.writeprotect(area.range)
        undisturbed(ctx.uffd, partial(touch, area.range, step * PAGE_SIZE, write=True))
        written = regions(area, range(0, 1000, step))
        for walk in walks:
            found = Pagemap.scan(area.range, WRITTEN, room=walk.room, max_pages=walk.max_pages)
            stop = area.start + walk.stop * PAGE_SIZE
            cut = [region._replace(end=min(region.end, stop)) for region in written[: walk.regions]]
            with promise("AS-07", f"every page of {step} written, room {walk.room}, max_pages {walk.max_pages}"):
                expect_scan(area, found, Scan(cut, stop), "what the scan found")
    vector = (uapi.page_region * 2)()
    arg = uapi.pm_scan_arg(size=sizeof(uapi.pm_scan_arg), start=area.start, end=area.range.end, vec=addressof(vector))
    expect((Pagemap.scan_ioctl(arg), any(bytes(vector))), (0, False), "regions in a vector of length 0, bytes written")
    for room, flags in product((0, 1), (NO_FLAGS, CHECK, RESTART)):
        found = Pagemap.scan(area.page(0, 0), WRITTEN, room=room, flags=flags)
        with promise("AS-09", f"no page, room {room}, flags {flags}"):
            expect_scan(area, found, Scan([], area.start), "what the scan found")


@uffd_case("pagemap-smaller-vec", mem=NOT_HUGETLB, features=ASYNC, needs=SCAN, pages=1200, rows=("AS-07",))
def test_pagemap_smaller_vec(ctx: Context) -> None:
    """Scans with little room, each going on where the last one stopped, together report every written page once."""
    area = tracked(ctx)
    for seed in range(12):
        chance = random.Random(seed)
        written = [page for page in range(area.nr_pages) if chance.random() < 0.5]
        for page in written:
            touch(area.page(page), PAGE_SIZE, write=True)
        with promise("AS-07", f"seed {seed}"):
            found: list[Region] = []
            at = area.start
            while at < area.range.end:
                room, limit = chance.randint(1, 50), chance.choice((0, chance.randint(1, 80)))
                part = Pagemap.scan(Range(at, area.range.end - at), WRITTEN, flags=RESTART, room=room, max_pages=limit)
                expect(part.walk_end > at, True, f"walk_end {part.walk_end:#x} is behind {at:#x}")
                pages = sum(region.end - region.start for region in part.regions) // PAGE_SIZE
                expect(pages <= (limit or pages), True, f"{pages} pages reported, {limit} at most")
                found += part.regions
                at = part.walk_end
            expect_scan(area, Scan(joined(found), at), Scan(regions(area, written), area.range.end), "pages written")
            expect_written(area, (), "pages written, after that")
    ctx.uffd.expect_no_message()


# ---- sanity_tests: categories --------------------------------------------------------------------------------------

EVERY = PageCategory((1 << 7) - 1)
"""The categories of the first kernel that had PAGEMAP_SCAN, but for soft-dirty pages."""
MASKS = (NONE, WRITTEN, PRESENT, PageCategory.FILE, PageCategory.PFNZERO, WPALLOWED, EVERY)


def categories_of(area: Area) -> dict[int, PageCategory]:
    """Return the categories of each page, as a scan of that page alone without any mask gives them."""
    found = {}
    for page in range(area.nr_pages):
        [region] = Pagemap.scan(area.page(page), returned=EVERY).regions
        found[page] = region.categories
    return found


def chosen(categories: PageCategory, required: PageCategory, anyof: PageCategory) -> bool:
    """Whether a page of these categories, inverted as asked, is to be reported (struct pm_scan_arg)."""
    return categories & required == required and bool(not anyof or categories & anyof)


@uffd_case("pagemap-sanity", mem=ALL, features=ASYNC, needs=SCAN, pages=6, rows=("AS-03",), bugs=(36,))
def test_pagemap_sanity(ctx: Context) -> None:
    """Which pages a scan reports follows from their categories and its masks alone, whatever the masks are."""
    area = ctx.dst
    area.fill(0, 3)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(1, 3))
    undisturbed(ctx.uffd, partial(touch, area.page(3), area.page_size))
    ctx.uffd.writeprotect(area.page(4))
    pages = categories_of(area)
    unwritten = [1, 2, 3, 4, 5] if ctx.mem.hugetlb else [1, 2, 3, 4]  # of huge pages, what is not there never counts
    expect([page for page, categories in pages.items() if WRITTEN not in categories], unwritten, "pages not written")
    for required, anyof, inverted in product(MASKS, MASKS, MASKS):
        for returned in (WRITTEN, EVERY):
            wanted = [
                Region(area.page(page).start, area.page(page).end, categories & returned)
                for page, categories in pages.items()
                if chosen(categories ^ inverted, required, anyof)
            ]
            found = Pagemap.scan(area.range, required, anyof=anyof, inverted=inverted, returned=returned)
            what = f"category_mask {required}, anyof {anyof}, inverted {inverted}, return_mask {returned}"
            expect_scan(area, found, Scan(joined(wanted), area.range.end), what)
    if not ctx.mem.hugetlb:  # kernels before 7.1 can hang for good when they protect what is not there of huge pages
        found = Pagemap.scan(area.range, inverted=EVERY, flags=RESTART)
        expect_scan(area, found, Scan(regions(area, range(6), NONE), area.range.end), "pages, protecting all")
        expect_written(area, (), "pages written, after protecting all")


@uffd_case("pagemap-sanity-file", features=ASYNC, needs=SCAN, rows=("AS-03", "AS-12"), kind=Kind.DETAIL)
def test_pagemap_sanity_file() -> None:
    """The pages of a file are PAGE_IS_FILE when they are read, and no longer when a private write has copied them."""
    seen = PageCategory.FILE | PRESENT | WRITTEN | WPALLOWED
    with (
        plain_file(4 * PAGE_SIZE) as fd,
        mapped(4 * PAGE_SIZE, flags=MAP_PRIVATE, fd=fd) as where,
        Uffd.open(ASYNC) as uffd,
    ):
        pages = Pages(where, PAGE_SIZE)
        track(uffd, where)
        undisturbed(uffd, partial(touch, where, PAGE_SIZE))
        scan = partial(Pagemap.scan, where, returned=seen)
        read = PageCategory.FILE | PRESENT | WPALLOWED
        expect_scan(pages, scan(), Scan(regions(pages, range(4), read), where.end), "pages, after reads")
        write_each(uffd, pages, 1, 2)
        copied = PRESENT | WPALLOWED | WRITTEN
        found = regions(pages, {0}, read) + regions(pages, {1, 2}, copied) + regions(pages, {3}, read)
        expect_scan(pages, scan(), Scan(found, where.end), "pages, after writes to pages 1 and 2")
        either = scan(anyof=PageCategory.FILE | WRITTEN)
        expect_scan(pages, either, Scan(found, where.end), "pages that are written or of the file")


# ---- test_simple, mprotect_tests, userfaultfd_tests, unmapped_region_tests -----------------------------------------


@uffd_case("pagemap-simple", mem=ALL, features=ASYNC, needs=SCAN, pages=3, rows=("AS-01", "AS-04"))
def test_pagemap_simple(ctx: Context) -> None:
    """A page can be protected, written and protected again any number of times, and its neighbours stay as they are."""
    area = tracked(ctx)
    for number in range(50):
        with promise("AS-04", f"time {number}"):
            expect_written(area, (), "pages written, protected")
            touch(area.page(1), area.page_size, write=True)
            expect_written(area, {1}, "pages written, after a write to page 1")
            Pagemap.scan(area.page(1), WRITTEN, flags=RESTART, room=0)
    ctx.uffd.expect_no_message()
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


@uffd_case("pagemap-mprotect", mem=ALL, features=ASYNC, needs=SCAN, pages=3, rows=("AS-17",), kind=Kind.DETAIL)
def test_pagemap_mprotect(ctx: Context) -> None:
    """What is tracked stays so through mprotect(2): what was written counts, what was not is protected still."""
    area = tracked(ctx)
    write(ctx.uffd, area, 1)
    for first, count in ((0, 3), (1, 1), (0, 1)):
        for prot, name in PROTECTIONS.items():
            protect(area.page(first, count), prot)
            with promise("AS-17", f"{count} pages from page {first} on, {name}"):
                expect_written(area, {1}, "pages written")
                Pagemap.expect_protected(area, {0, 2}, "after mprotect")
    write(ctx.uffd, area, 2)
    expect_written(area, {1, 2}, "pages written, after a write to page 2", flags=RESTART)
    write(ctx.uffd, area, 0, 1)
    expect_written(area, {0, 1}, "pages written, after that and writes to pages 0 and 1")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


@uffd_case("pagemap-mprotect-replaced", mem=(ANON,), features=ASYNC, needs=SCAN, pages=2, rows=("AS-05", "AS-17"))
def test_pagemap_mprotect_replaced(ctx: Context) -> None:
    """A mapping that replaces a tracked one is not tracked before it is registered itself, and then is as any other."""
    area = tracked(ctx)
    write(ctx.uffd, area, 0, 1)
    Pagemap.scan(area.range, WRITTEN, flags=RESTART, room=0)
    map_memory(PAGE_SIZE, at=area.page(1).start, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
    with promise("AS-05", "page 1 replaced"), fails(EPERM):
        Pagemap.scan(area.range, WRITTEN, flags=RESTART)
    track(ctx.uffd, area.page(1))
    expect_written(area, (), "pages written, page 1 registered anew")
    for first, count, prot in ((0, 1, PROT_NONE), (0, 2, PROT_READ), (0, 2, READ_WRITE)):
        protect(area.page(first, count), prot)
    write(ctx.uffd, area, 0, 1)
    for prot in PROTECTIONS:
        protect(area.page(0), prot)
    expect_written(area, {0, 1}, "pages written, after writes to both", flags=RESTART)
    expect_written(area, (), "pages written, after that")


@uffd_case(
    "pagemap-userfaultfd", mem=NOT_HUGETLB, features=ASYNC, needs=SCAN, pages=16, rows=("AS-17",), kind=Kind.DETAIL
)
def test_pagemap_userfaultfd(ctx: Context) -> None:
    """New pages count as not written, although mprotect(2) has cut their range into mappings of all protections."""
    area = ctx.dst
    protect(area.range, PROT_NONE)
    track(ctx.uffd, area.range)
    protections = (READ_WRITE, PROT_READ, READ_WRITE, PROT_READ, READ_WRITE, PROT_NONE, READ_WRITE, PROT_READ)
    for piece, prot in enumerate(protections):
        protect(area.page(2 * piece, 2), prot)
    for where in (area.page(1, 12), area.range):
        found = Pagemap.scan(where, WRITTEN, flags=RESTART, max_pages=14)
        expect_scan(area, found, Scan([], where.end), "pages written, protecting them")
    Pagemap.expect_protected(area, range(16), "after that")
    write(ctx.uffd, area, 1, 4, 13)
    expect_written(area, {1, 4, 13}, "pages written, after writes to three mappings", flags=RESTART)


@uffd_case("pagemap-unmapped", mem=NOT_HUGETLB, features=ASYNC, needs=SCAN, pages=5, rows=("AS-18",), kind=Kind.DETAIL)
def test_pagemap_unmapped(ctx: Context) -> None:
    """Where nothing is mapped a scan reports nothing and goes on, with whatever flags."""
    area = tracked(ctx)
    unmap(area.page(1, 2))
    write(ctx.uffd, area, 0, 3, 4)
    for flags in (NO_FLAGS, CHECK, RESTART):
        for required in (NONE, WRITTEN, EVERY & ~WRITTEN):
            found = Pagemap.scan(area.page(1, 2), required, returned=EVERY, flags=flags)
            with promise("AS-18", f"category_mask {required}, flags {flags}"):
                expect_scan(area, found, Scan([], area.page(3).start), "of nothing mapped")
    expect_written(area, {0, 3, 4}, "pages written on both sides", flags=RESTART)
    expect_written(area, (), "pages written, after that")


# ---- transact_test -------------------------------------------------------------------------------------------------

ROUNDS = 30
WRITERS = 4
EACH = 16


@uffd_case(
    "pagemap-transact",
    mem=NOT_HUGETLB,
    features=ASYNC,
    needs=SCAN,
    pages=WRITERS * EACH,
    rows=("AS-04",),
    smp=True,
)
def test_pagemap_transact(ctx: Context) -> None:
    """Who copies what each scan reports has a true copy when the writers rest, whenever they wrote."""
    area, copy = tracked(ctx), ctx.src
    copy.fill()
    copied = 0
    for number in range(ROUNDS):
        pattern = Pattern(PAGE_SIZE, seed=number + 2)
        with ExitStack() as stack:
            fills = [partial(pattern.fill, area.start, first, EACH) for first in range(0, area.nr_pages, EACH)]
            writers = [stack.enter_context(Waiter(fill)) for fill in fills]
            while not all(writer.done for writer in writers):
                copied += copy_written(area, copy)
        copied += copy_written(area, copy)
        with promise("AS-04", f"round {number}"):
            expect_same(area.start, copy.start, area.range.len, "the copy")
            expect_written(area, (), "pages written, after the last scan")
    expect(copied >= ROUNDS * area.nr_pages, True, f"{copied} pages copied: every page of every round")
    ctx.uffd.expect_no_message()


def copy_written(area: Area, copy: Area) -> int:
    """Copy what was written since the last scan, and return how many pages that was."""
    found = Pagemap.scan(area.range, WRITTEN, flags=RESTART, room=area.nr_pages)
    for start, end, _ in found.regions:
        poke(copy.start + start - area.start, peek(start, end - start))
    return sum(end - start for start, end, _ in found.regions) // PAGE_SIZE


# ---- zeropfn_tests, unpopulated_thp_scan_test ----------------------------------------------------------------------


@uffd_case("pagemap-zeropfn", mem=(ANON,), needs=("thp", *SCAN), pages=1, rows=("AS-03",), kind=Kind.VERSION)
def test_pagemap_zeropfn(ctx: Context) -> None:
    """Of the huge page of zeroes PAGE_IS_PFNZERO are all pages, or, in older kernels, none."""
    area, zero = ctx.allocate(pmd_size() // PAGE_SIZE), PageCategory.PFNZERO
    if (THP / "use_zero_page").read_text().strip() != "1":
        raise Skip(f"the kernel maps no huge page of zeroes: echo 1 > {THP}/use_zero_page")
    advise(area.range, Advice.HUGEPAGE)
    touch(area.range, area.range.len)
    if Pagemap.scan(area.range, PRESENT).regions != regions(area, range(area.nr_pages), PRESENT):
        raise Skip("the kernel has mapped no huge page of zeroes: echo 1 > /proc/sys/vm/compact_memory")
    found = Pagemap.scan(area.range, zero)
    zeroes = Scan(regions(area, range(area.nr_pages) if found.regions else (), zero), area.range.end)
    expect_scan(area, found, zeroes, "pages of zeroes")


@uffd_case(
    "pagemap-unpopulated-thp",
    mem=(ANON,),
    features=ASYNC,
    needs=("thp", *SCAN),
    pages=1,
    rows=("AS-03", "AS-11"),
    bugs=(36,),
)
def test_pagemap_unpopulated_thp(ctx: Context) -> None:
    """A transparent huge page that MADV_DONTNEED has dropped counts as written, whichever way a scan looks for it."""
    area = huge_area(ctx)
    everything = Scan(regions(area, range(area.nr_pages)), area.range.end)
    track(ctx.uffd, area.range)
    advise(area.range, Advice.DONTNEED)
    for what, found in (
        ("by category_mask", Pagemap.scan(area.range, WRITTEN)),
        ("by category_anyof_mask", Pagemap.scan(area.range, anyof=WRITTEN, returned=WRITTEN)),
        ("by both", Pagemap.scan(area.range, WRITTEN, anyof=WRITTEN | PRESENT)),
        ("protecting them", Pagemap.scan(area.range, WRITTEN, flags=RESTART)),
    ):
        with promise("AS-03", what):
            expect_scan(area, found, everything, "pages written")
    expect_written(area, (), "pages written, after protecting them")
    write(ctx.uffd, area, 7)
    expect_written(area, {7}, "pages written, after a write to page 7")
