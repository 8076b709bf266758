# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_RWPROTECT and pages that go: dropped, or removed from their file, also under a thread that waits."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, ANON, MISSING, NEW, RWP, SHARED, SHMEM_PRIVATE, SYNC_RWP, WRITE, Advice, Area, Context, PagefaultFlag, Pagemap,
    Range, RegisterMode, advise, copy, expect, expect_bytes, expect_rwp_free, expect_rwp_trapped, expect_same, faulting,
    fill_otherwise, huge_area, peek, poke, promise, rwp_protected, rwp_trapped, syscalls, touch, undisturbed,
)  # fmt: skip

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2


# ---- pages that go -------------------------------------------------------------------------------------------------


@uffd_case("rwprotect-dontneed", mem=ALL, features=SYNC_RWP, pages=6, rows=("RW-28",))
def test_rwprotect_dontneed(ctx: Context) -> None:
    """MADV_DONTNEED drops the protection with the page: what is mapped there next is free; neighbours are not."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    advise(area.page(1, 3), Advice.DONTNEED)
    Pagemap.expect_protected(area, {0, 4, 5}, "after MADV_DONTNEED of pages 1 to 3")
    Pagemap.expect_present(area, 0, 4, 5)

    def read() -> None:
        if ctx.mem.shared:
            area.expect_pattern_of(area, 1, 2)
        else:
            area.expect_zero(1, 2)

    with promise("RW-28", "read"):
        undisturbed(uffd, read)
    with promise("RW-28", "write"):
        undisturbed(uffd, partial(poke, area.page(3).start, NEW))
    Pagemap.expect_protected(area, {0, 4, 5}, "after accesses to pages 1 to 3")
    expect_rwp_free(uffd, area, 1, 2, 3)
    expect_rwp_trapped(uffd, area, 0, 5)
    expect_rwp_trapped(uffd, area, 4, write=True)
    uffd.rwprotect(area.range)
    Pagemap.expect_protected(area, range(6), "after protecting all anew")
    uffd.resolve(area.range)
    for page in (3, 4):
        expect(peek(area.page(page).start, len(NEW)), NEW, f"what was written to page {page}")
    for page in (0, 5):
        area.expect_pattern_of(area, page, 1)


@uffd_case("rwprotect-dontneed-missing", mem=ALL, features=SYNC_RWP, pages=5, rows=("RW-28",))
def test_rwprotect_dontneed_missing(ctx: Context) -> None:
    """A page that MADV_DONTNEED dropped is told as missing, if no file has it; it is never told as protected."""
    area, uffd = rwp_protected(ctx, MISSING | RWP), ctx.uffd
    fill_otherwise(ctx.src)
    advise(area.page(1, 3), Advice.DONTNEED)
    for page, write in ((1, False), (2, True)):
        start = area.page(page).start
        if ctx.mem.shared or ctx.mem is SHMEM_PRIVATE:  # a write to private memory left a page of zeroes in the file
            undisturbed(uffd, partial(touch, area.page(page), area.page_size, write=write))
            if ctx.mem.shared:
                area.expect_pattern_of(area, page, 1)
            else:
                area.expect_zero(page, 1)
        else:
            call = partial(poke, start, peek(ctx.src.page(page).start, 8)) if write else partial(peek, start)
            with promise("RW-28", f"page {page}"):
                with faulting(uffd, start, call=call, flags=WRITE if write else PagefaultFlag(0)):
                    copy(ctx, page)
                uffd.expect_no_message()
            expect_same(ctx.src.page(page).start, start, ctx.page_size, "the page that was filled")
        expect_rwp_free(uffd, area, page)
    Pagemap.expect_protected(area, {0, 4}, "afterwards")
    Pagemap.expect_present(area, 0, 1, 2, 4)
    expect_rwp_trapped(uffd, area, 0, 4)
    for page in (0, 4):
        area.expect_pattern_of(area, page, 1)


@uffd_case("rwprotect-thp-dontneed", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=2, rows=("RW-28",))
def test_rwprotect_thp_dontneed(ctx: Context) -> None:
    """Of a transparent huge page a part can be dropped; the rest stays protected, and the new pages are free to use."""
    area, uffd = huge_area(ctx), ctx.uffd
    last = area.nr_pages - 1
    uffd.register(area.range, MISSING | RWP)
    uffd.rwprotect(area.range)
    with rwp_trapped(uffd, area, 8), rwp_trapped(uffd, area, 9):
        advise(area.page(7, 2), Advice.DONTNEED)
        left = [page for page in range(area.nr_pages) if page not in (7, 8)]
        Pagemap.expect_protected(area, left, "after MADV_DONTNEED of pages 7 and 8")
        uffd.expect_still_asleep(2)
        uffd.resolve(area.page(8))
        uffd.wait_fault(area.page(8).start)
        uffd.expect_still_asleep(2)
        uffd.zeropage(area.page(8))
        uffd.expect_asleep(1)
        Pagemap.expect_protected(area, left, "after UFFDIO_ZEROPAGE of page 8")
        uffd.resolve(area.page(9))
    with faulting(uffd, area.page(7).start):
        uffd.zeropage(area.page(7))
    area.expect_zero(7, 2)
    expect_rwp_free(uffd, area, 7, 8, 9)
    expect_rwp_trapped(uffd, area, 0, 6, 10, last)
    uffd.resolve(area.range)
    area.expect_pattern_of(area, 0, 7)
    area.expect_pattern_of(area, 9)


def removals(area: Area) -> dict[str, tuple[Callable[[], object], set[int]]]:
    """Return the ways to take pages from the file of an area of five pages, and which pages each takes."""
    fd, size = area.fd or 0, area.page_size
    punch = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

    def truncate() -> None:
        os.ftruncate(fd, 3 * size)
        os.ftruncate(fd, 5 * size)

    return {
        "MADV_REMOVE": (lambda: advise(area.page(1, 2), Advice.REMOVE), {1, 2}),
        "MADV_REMOVE of one page": (lambda: advise(area.page(4), Advice.REMOVE), {4}),
        "FALLOC_FL_PUNCH_HOLE": (lambda: syscalls.call("fallocate", fd, punch, size, 2 * size), {1, 2}),
        "ftruncate": (truncate, {3, 4}),
    }


@uffd_case("rwprotect-removed", mem=SHARED, features=SYNC_RWP, pages=5, rows=("RW-29",))
def test_rwprotect_removed(ctx: Context) -> None:
    """A page removed from its file takes its protection along; the page of zeroes that follows it is free to use."""
    area, uffd = ctx.dst, ctx.uffd
    for what, (remove, gone) in removals(area).items():
        area.fill()
        uffd.register(area.range, RWP)
        uffd.rwprotect(area.range)
        left = sorted(set(range(5)) - gone)
        with promise("RW-29", what):
            remove()
            Pagemap.expect_protected(area, left, "afterwards")
            Pagemap.expect_present(area, *left)
            first, last = min(gone), max(gone)
            undisturbed(uffd, partial(poke, area.page(last).start, NEW))
            if first != last:
                undisturbed(uffd, partial(area.expect_zero, first, 1))
            Pagemap.expect_protected(area, left, "after accesses to the pages that were removed")
            expect_rwp_free(uffd, area, *gone)
            expect_rwp_trapped(uffd, area, *left)
            poke(area.page(last).start, bytes(len(NEW)))
            for page in range(5):
                if page in gone:
                    area.expect_zero(page, 1)
                else:
                    area.expect_pattern_of(area, page, 1)
        uffd.unregister(area.range)


@uffd_case("rwprotect-removed-missing", mem=SHARED, features=SYNC_RWP, pages=5, rows=("RW-29",))
def test_rwprotect_removed_missing(ctx: Context) -> None:
    """A page removed from its file is told as missing, not as protected, and filled it is free to use."""
    area, uffd = ctx.dst, ctx.uffd
    fill_otherwise(ctx.src)
    for what, (remove, gone) in removals(area).items():
        area.fill()
        uffd.register(area.range, MISSING | RWP)
        uffd.rwprotect(area.range)
        left = sorted(set(range(5)) - gone)
        with promise("RW-29", what):
            remove()
            for page in sorted(gone):
                with faulting(uffd, area.page(page).start):
                    copy(ctx, page)
                uffd.expect_no_message()
                expect_same(ctx.src.page(page).start, area.page(page).start, ctx.page_size, "the page filled")
            Pagemap.expect_protected(area, left, "after filling what was removed")
            expect_rwp_free(uffd, area, *gone)
            expect_rwp_trapped(uffd, area, *left)
        uffd.unregister(area.range)


@uffd_case("rwprotect-dropped-under-thread", mem=ALL, features=SYNC_RWP, pages=5, rows=("RW-30",))
def test_rwprotect_dropped_under_thread(ctx: Context) -> None:
    """Who waits for a protected page sleeps on when it is dropped; woken or resolved, he finds it missing."""
    area, uffd = ctx.dst, ctx.uffd

    def dontneed() -> None:
        if area.fd is not None:
            removals(area)["FALLOC_FL_PUNCH_HOLE"][0]()  # of the page cache; what was written is private
        advise(area.page(1, 2), Advice.DONTNEED)

    drops: dict[str, Callable[[], object]] = {"MADV_DONTNEED": dontneed}
    if ctx.mem.shared:
        drops = {what: removals(area)[what][0] for what in ("MADV_REMOVE", "FALLOC_FL_PUNCH_HOLE")}
    ends: dict[str, Callable[[Range], None]] = {"UFFDIO_WAKE": uffd.wake, "UFFDIO_RWPROTECT with mode 0": uffd.resolve}
    ctx.src.fill()
    for mode, write in ((RWP, False), (RWP, True), (MISSING | RWP, False), (MISSING | RWP, True)):
        for how, drop in drops.items():
            for what, end in ends.items():
                area.fill()
                uffd.register(area.range, mode)
                uffd.rwprotect(area.range)
                with promise("RW-30", f"mode {mode}, {'write' if write else 'read'}, {how}, {what}"):
                    expect_dropped_under_thread(ctx, mode, drop, end, write=write)
                uffd.unregister(area.range)


def expect_dropped_under_thread(
    ctx: Context, mode: RegisterMode, drop: Callable[[], object], end: Callable[[Range], None], *, write: bool
) -> None:
    """Drop pages 1 and 2 of a protected area while a thread waits for each, and let that of page 2 go on first."""
    area, uffd = ctx.dst, ctx.uffd
    with (
        rwp_trapped(uffd, area, 0),
        rwp_trapped(uffd, area, 2, write=write) as waiter,
        rwp_trapped(uffd, area, 1) as other,
    ):
        drop()
        uffd.expect_still_asleep(3)
        Pagemap.expect_protected(area, {0, 3, 4}, "after pages 1 and 2 were dropped")
        Pagemap.expect_present(area, 0, 3, 4)
        for page, thread in ((2, waiter), (1, other)):
            asleep = page  # threads but this one: that of page 0, and first that of page 1, too
            end(area.page(page))
            if MISSING in mode:
                uffd.wait_fault(area.page(page).start, WRITE if write and page == 2 else PagefaultFlag(0))
                uffd.expect_still_asleep(asleep + 1)
                copy(ctx, page)
            result = thread.result()
            if page == 1 or not write:
                expected = peek(ctx.src.page(page).start, len(NEW)) if MISSING in mode else bytes(len(NEW))
                expect(result, expected, "what the thread read")
            uffd.expect_still_asleep(asleep)
            expect_rwp_free(uffd, area, page)
        Pagemap.expect_protected(area, {0, 3, 4}, "when those threads have gone on")
        uffd.resolve(area.range)
    uffd.expect_no_message()
    behind = Range(area.page(2).start + len(NEW), area.page_size - len(NEW))
    if MISSING in mode:
        area.expect_pattern_of(ctx.src, 1, 1)
        expect_same(ctx.src.page(2).start + len(NEW), behind.start, behind.len, "the page filled")
    else:
        area.expect_zero(1, 1)
        expect_bytes(behind, 0, "the page that came anew")
    for page in (0, 3, 4):
        area.expect_pattern_of(area, page, 1)
