# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_RWPROTECT and pages that are not there, not yet mapped, filled or poisoned."""

from __future__ import annotations

from collections.abc import Callable
from errno import EAGAIN, EEXIST, EINVAL
from functools import partial
from signal import SIGBUS, SIGSEGV

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, CACHED, FILE_BACKED, MINOR, MINOR_FAULTS, MISSING, NEW, PAGE_SIZE, RWP, SHMEM, SHMEM_PRIVATE, SYNC_RWP,
    WRITE, Advice, Context, ContinueMode, CopyMode, Feature, KernelError, MoveMode, PagefaultFlag, Pagemap, Range, Skip,
    advise, cached, copy, expect, expect_rwp_free, expect_rwp_trapped, expect_same, faulting, fill_otherwise, huge_area,
    keep_small, page_frames, peek, pmd_mapped, pmd_size, poke, promise, put_back, refuses, rwp_filled, rwp_protected,
    rwp_trapped, signals, swap_out, touch, uapi, undisturbed,
)  # fmt: skip


# ---- pages that are not there --------------------------------------------------------------------------------------


@uffd_case("rwprotect-missing", mem=ALL, features=SYNC_RWP, pages=5, rows=("RW-13",))
def test_rwprotect_missing(ctx: Context) -> None:
    """Protecting passes over pages that are not there; the kernel fills them as ever, and they are free."""
    area, uffd = ctx.dst, ctx.uffd
    for page in (1, 3):
        area.fill(page, 1)
    uffd.register(area.range, RWP)
    for times in ("once", "twice"):
        uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, {1, 3}, f"after protecting all {times}, pages 0, 2 and 4 missing")
        Pagemap.expect_present(area, 1, 3)
    with promise("RW-13", "read"):
        undisturbed(uffd, partial(area.expect_zero, 0, 1))
    with promise("RW-13", "write"):
        undisturbed(uffd, partial(poke, area.page(2).start, NEW))
    Pagemap.expect_protected(area, {1, 3}, "after accesses to pages 0 and 2")
    Pagemap.expect_present(area, 0, 1, 2, 3)
    expect_rwp_free(uffd, area, 0, 2)
    with rwp_trapped(uffd, area, 1), rwp_trapped(uffd, area, 3, write=True):
        uffd.resolve(area.range)
    Pagemap.expect_protected(area, (), "after resolving all")
    Pagemap.expect_present(area, 0, 1, 2, 3)
    expect_rwp_free(uffd, area, *range(5))
    expect(peek(area.page(2).start, len(NEW)), NEW, "what was written")
    put_back(area, 3)
    for page in (1, 3):
        area.expect_pattern_of(area, page, 1)
    for page in (0, 4):
        area.expect_zero(page, 1)


@uffd_case("rwprotect-cached", mem=FILE_BACKED, features=SYNC_RWP, pages=4, spare_hugepages=4, rows=("RW-13", "RW-46"))
def test_rwprotect_cached(ctx: Context) -> None:
    """Protecting passes over pages of the file that are not mapped; who touches one gets it, free to use."""
    area, uffd = ctx.dst, ctx.uffd
    with cached(ctx, mode=RWP):
        undisturbed(uffd, partial(area.expect_pattern_of, area, 2, 1))
        uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, {2}, "after protecting pages of which only page 2 is mapped")
        Pagemap.expect_present(area, 2)
        with promise("RW-13", "read"):
            undisturbed(uffd, partial(area.expect_pattern_of, area, 0, 1))
        with promise("RW-13", "write"):
            undisturbed(uffd, partial(touch, area.page(3), area.page_size, write=True))
        Pagemap.expect_protected(area, {2}, "after accesses to pages 0 and 3")
        Pagemap.expect_present(area, 0, 2, 3)
        expect_rwp_free(uffd, area, 0, 3)
        expect_rwp_trapped(uffd, area, 2)
        area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-no-fault-around",
    mem=(SHMEM, SHMEM_PRIVATE),
    features=SYNC_RWP,
    pages=64,
    rows=("RW-46",),
    kind=Kind.DETAIL,
)
def test_rwprotect_no_fault_around(ctx: Context) -> None:
    """A page of the file that is touched is mapped alone: its neighbours would look as if touched, too."""
    area, uffd, touched = ctx.dst, ctx.uffd, []
    with cached(ctx, mode=RWP):
        for page in (21, 0, 63, 32):
            undisturbed(uffd, partial(peek, area.page(page).start))
            touched.append(page)
            with promise("RW-46"):
                Pagemap.expect_present(area, *touched)
        uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, touched, "after protecting all")
        undisturbed(uffd, partial(peek, area.page(22).start))
        Pagemap.expect_present(area, *touched, 22)
        Pagemap.expect_protected(area, touched, "after a read of page 22")


@uffd_case("rwprotect-tables", mem=(ANON, SHMEM, SHMEM_PRIVATE), features=SYNC_RWP, pages=1, rows=("RW-13", "RW-14"))
def test_rwprotect_tables(ctx: Context) -> None:
    """Pages are protected and resolved in as many page tables as it takes, also behind a table that is not there."""
    per_table = PAGE_SIZE // 8
    area, uffd = ctx.allocate(4 * per_table), ctx.uffd
    keep_small(area.range)
    ends = [per_table - 1, per_table, 2 * per_table - 1]
    later = [3 * per_table, 3 * per_table + 7, 4 * per_table - 1]  # of the third table no page is there
    for page in (0, *ends, *later):
        area.fill(page, 1)
    uffd.register(area.range, RWP)
    uffd.rwprotect(area.page(1, 4 * per_table - 2))
    Pagemap.expect_protected(area, [*ends, *later[:2]], "after protecting all but the first and the last page")
    Pagemap.expect_present(area, 0, *ends, *later)
    expect_rwp_free(uffd, area, 0, 4 * per_table - 1)
    with rwp_trapped(uffd, area, ends[0]), rwp_trapped(uffd, area, ends[2]), rwp_trapped(uffd, area, later[1]):
        uffd.resolve(area.page(ends[0], later[0] - ends[0]))
        uffd.expect_asleep(1)
        Pagemap.expect_protected(area, later[:2], "after resolving what is before the last table")
        uffd.resolve(area.range)
    Pagemap.expect_protected(area, (), "after resolving all")
    for page in (0, *ends, *later):
        area.expect_pattern_of(area, page, 1)


# ---- pages of zeroes -----------------------------------------------------------------------------------------------


@uffd_case("rwprotect-zeropage", mem=(ANON,), features=SYNC_RWP, pages=5, rows=("RW-15",), kind=Kind.DETAIL)
def test_rwprotect_zeropage(ctx: Context) -> None:
    """A page that was only read so far, the zero page, is protected, and a write gets one of its own when resolved."""
    area, uffd = ctx.dst, ctx.uffd
    keep_small(area.range)
    area.expect_zero()
    zero = page_frames(area.page(4))
    uffd.register(area.range, RWP)
    uffd.rwprotect(area.page(0, 4))
    Pagemap.expect_protected(area, {0, 1, 2, 3}, "of zero pages")
    expect_rwp_trapped(uffd, area, 0)
    expect_rwp_trapped(uffd, area, 1, write=True)
    Pagemap.expect_protected(area, {2, 3}, "after resolving pages 0 and 1")
    uffd.resolve(area.page(2))
    undisturbed(uffd, partial(poke, area.page(2).start, NEW))
    expect_rwp_free(uffd, area, 4)
    Pagemap.expect_protected(area, {3}, "after resolving page 2, too")
    expect(page_frames(area.page(3)), zero, "page frame of page 3")
    uffd.resolve(area.range)
    for page in (1, 2):
        expect(peek(area.page(page).start, len(NEW)), NEW, f"what was written to page {page}")
        poke(area.page(page).start, bytes(len(NEW)))
    area.expect_zero()
    ctx.src.expect_zero()  # elsewhere, where nobody wrote


@uffd_case(
    "rwprotect-thp-zeropage",
    mem=(ANON,),
    variants=("whole", "in part", "protected whole, resolved in part"),
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-15",),
    kind=Kind.DETAIL,
)
def test_rwprotect_thp_zeropage(ctx: Context, variant: str) -> None:
    """The huge zero page is protected and resolved whole and in part, and traps by base page."""
    uffd, area = ctx.uffd, ctx.allocate(pmd_size() // PAGE_SIZE)
    advise(area.range, Advice.HUGEPAGE)
    area.expect_zero()
    uffd.register(area.range, RWP)
    every = set(range(area.nr_pages))
    protected = {7, 8, 9} if variant == "in part" else every
    resolved = every if variant == "whole" else {7, 8}
    uffd.rwprotect(area.page(min(protected), len(protected)))
    Pagemap.expect_protected(area, protected, "of the huge zero page")
    with rwp_trapped(uffd, area, 7), rwp_trapped(uffd, area, 8, write=True):
        uffd.expect_still_asleep(2)
        uffd.resolve(area.page(min(resolved), len(resolved)))
    Pagemap.expect_protected(area, protected - resolved, "after resolving pages 7 and 8")
    expect_rwp_free(uffd, area, 7, 8)
    if 9 in protected - resolved:
        expect_rwp_trapped(uffd, area, 9)
    uffd.resolve(area.range)
    Pagemap.expect_protected(area, (), "after resolving all")
    expect(peek(area.page(8).start, len(NEW)), NEW, "what was written")
    poke(area.page(8).start, bytes(len(NEW)))
    area.expect_zero()
    ctx.src.expect_zero()


# ---- missing and minor faults of the same range --------------------------------------------------------------------


@uffd_case("rwprotect-with-missing", mem=ALL, features=SYNC_RWP, pages=6, rows=("RW-24", "RW-13"))
def test_rwprotect_with_missing(ctx: Context) -> None:
    """A missing page is told as such, protected range or not; what fills it is free to use until it is protected."""
    area, uffd = ctx.dst, ctx.uffd
    ctx.src.fill()
    uffd.register(area.range, MISSING | RWP)
    uffd.rwprotect(area.range)
    Pagemap.expect_protected(area, (), "of missing pages")

    def zero(page: int) -> None:
        if ctx.mem.hugetlb:
            copy(ctx, page)
        else:
            uffd.zeropage(area.page(page))

    fills: dict[int, Callable[[int], None]] = {0: partial(copy, ctx), 1: partial(copy, ctx), 2: zero, 3: zero}
    for page, fill in fills.items():
        start, write = area.page(page).start, page in (1, 3)
        call = partial(poke, start, NEW) if write else partial(peek, start)
        with promise("RW-24", f"page {page}"):
            with faulting(uffd, start, call=call, flags=WRITE if write else PagefaultFlag(0)):
                uffd.rwprotect(area.range)
                uffd.expect_still_asleep(1)
                uffd.resolve(area.page(page + 1))
                uffd.expect_still_asleep(1)
                fill(page)
            uffd.expect_no_message()
            Pagemap.expect_protected(area, set(range(page)), f"after filling page {page}")
            expect_rwp_free(uffd, area, page)
            if write:
                expect(peek(start, len(NEW)), NEW, "what was written")
        uffd.rwprotect(area.range)
    Pagemap.expect_protected(area, {0, 1, 2, 3}, "after protecting all, pages 4 and 5 missing")
    with rwp_trapped(uffd, area, 0), faulting(uffd, area.page(4).start), rwp_trapped(uffd, area, 2):
        uffd.expect_still_asleep(3)
        copy(ctx, 4)
        uffd.resolve(area.range)
    Pagemap.expect_protected(area, (), "after resolving all")
    expect_rwp_free(uffd, area, *range(5))
    area.expect_pattern_of(ctx.src, 0, 1)
    area.expect_pattern_of(ctx.src, 4, 1)


@uffd_case(
    "rwprotect-with-minor",
    mem=FILE_BACKED,
    features=SYNC_RWP | MINOR_FAULTS,
    pages=4,
    spare_hugepages=4,
    rows=("RW-25",),
)
def test_rwprotect_with_minor(ctx: Context) -> None:
    """A cached page is told as such until it is mapped; then it is free until protected; dropped, it is as at first."""
    area, uffd = ctx.dst, ctx.uffd

    def expect_minor(page: int, *, write: bool) -> None:
        start = area.page(page).start
        call = partial(poke, start, NEW) if write else partial(peek, start, len(NEW))
        flags = CACHED | WRITE if write else CACHED
        with promise("RW-25", f"page {page}, {'write' if write else 'read'}"):
            with faulting(uffd, start, call=call, flags=flags) as waiter:
                uffd.resolve(area.page(page - 1 if page else 1))
                uffd.rwprotect(area.page(page))
                uffd.expect_still_asleep(1)
                uffd.continue_(area.page(page))
            uffd.expect_no_message()
            expect(waiter.result() or NEW, peek(start, len(NEW)), "what was read or written")
            Pagemap.expect_uffd_wp(start, False, "after UFFDIO_CONTINUE")
            expect_rwp_free(uffd, area, page)

    with cached(ctx, mode=MINOR | RWP) as where:
        uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, (), "of pages that are not mapped")
        Pagemap.expect_present(area)
        expect_minor(0, write=False)
        expect_minor(1, write=True)
        expect_minor(2, write=False)
        uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, {0, 1, 2}, "after protecting all, page 3 not mapped")
        expect_minor(3, write=False)
        uffd.rwprotect(area.range)
        expect_rwp_trapped(uffd, area, 0, 2)
        expect_rwp_trapped(uffd, area, 1, write=True)
        Pagemap.expect_protected(area, {3}, "after resolving pages 0 to 2")
        uffd.rwprotect(area.page(0, 3))
        advise(area.page(0, 2), Advice.DONTNEED)
        Pagemap.expect_protected(area, {2, 3}, "after MADV_DONTNEED of pages 0 and 1")
        expect_minor(0, write=True)
        expect_minor(1, write=False)
        uffd.resolve(area.range)
        if ctx.mem.shared:
            expect_same(where.start, area.start, area.range.len, "the mapping, compared with the file")
        for page in (2, 3):
            area.expect_pattern_of(area, page, 1)


# ---- filling pages that are there ----------------------------------------------------------------------------------


@uffd_case(
    "rwprotect-fills",
    mem=ALL,
    features=SYNC_RWP | Feature.POISON,
    pages=5,
    rows=("RW-26",),
    kind=Kind.DETAIL,
)
def test_rwprotect_fills(ctx: Context) -> None:
    """A protected page is there: to fill it is EEXIST, and leaves its bytes, its protection and who waits for it."""
    area, uffd, size = ctx.dst, ctx.uffd, ctx.page_size
    fill_otherwise(ctx.src)
    area.fill(1)
    uffd.register(area.range, MISSING | RWP)
    uffd.rwprotect(area.range)
    fills: dict[str, tuple[Callable[[Range], object], int]] = {
        "UFFDIO_COPY": (lambda where: uffd.copy(where.start, ctx.src.start, size), EEXIST),
        "UFFDIO_COPY with DONTWAKE": (
            lambda where: uffd.copy(where.start, ctx.src.start, size, CopyMode.DONTWAKE),
            EEXIST,
        ),
        "UFFDIO_COPY with WP": (lambda where: uffd.copy(where.start, ctx.src.start, size, CopyMode.WP), EINVAL),
        "UFFDIO_POISON": (uffd.poison, EEXIST),
    }
    if not ctx.mem.hugetlb:
        fills["UFFDIO_ZEROPAGE"] = (uffd.zeropage, EEXIST)
    with rwp_trapped(uffd, area, 1), rwp_trapped(uffd, area, 3, write=True):
        for what, (fill, number) in fills.items():
            for page in (1, 2, 3, 4):
                with promise("RW-26", f"{what}, page {page}"), refuses(number):
                    fill(area.page(page))
            Pagemap.expect_protected(area, {1, 2, 3, 4}, f"after {what}")
            uffd.expect_still_asleep(2)
        with promise("RW-26", "UFFDIO_COPY to a missing page and a protected one"):
            with refuses(EAGAIN, output=size):
                copy(ctx, 0, 2)
            Pagemap.expect_protected(area, {1, 2, 3, 4}, "afterwards")
            uffd.expect_still_asleep(2)
            expect_rwp_free(uffd, area, 0)
            expect_same(ctx.src.start, area.start, size, "the page that was missing")
        uffd.resolve(area.range)
    with promise("RW-26", "UFFDIO_COPY with WP to a missing page"):
        advise(area.page(2), Advice.REMOVE if ctx.mem.shared else Advice.DONTNEED)
        with refuses(EINVAL):
            copy(ctx, 2, mode=CopyMode.WP)
        Pagemap.expect_protected(area, (), "afterwards")
        Pagemap.expect_present(area, 0, 1, 3, 4)
    expect(peek(area.page(3).start, len(NEW)), NEW, "what was written")
    for page in (1, 4):
        area.expect_pattern_of(area, page, 1)


@uffd_case(
    "rwprotect-continue",
    mem=FILE_BACKED,
    features=SYNC_RWP | MINOR_FAULTS,
    pages=4,
    spare_hugepages=4,
    rows=("RW-26",),
    kind=Kind.DETAIL,
)
def test_rwprotect_continue(ctx: Context) -> None:
    """UFFDIO_CONTINUE of a protected page is EEXIST, and leaves its protection and who waits for it."""
    area, uffd = ctx.dst, ctx.uffd
    with cached(ctx, mode=MINOR | RWP):
        uffd.continue_(area.page(0, 3))
        uffd.rwprotect(area.range)
        with rwp_trapped(uffd, area, 1):
            for mode, number in ((ContinueMode(0), EEXIST), (ContinueMode.WP, EINVAL)):
                for page in (0, 1, 2):
                    with promise("RW-26", f"UFFDIO_CONTINUE with mode {mode}, page {page}"), refuses(number):
                        uffd.continue_(area.page(page), mode)
                Pagemap.expect_protected(area, {0, 1, 2}, "after a refused UFFDIO_CONTINUE")
                uffd.expect_still_asleep(1)
            with promise("RW-26", "UFFDIO_CONTINUE with WP of a page that is not mapped"), refuses(EINVAL):
                uffd.continue_(area.page(3), ContinueMode.WP)
            Pagemap.expect_present(area, 0, 1, 2)
            uffd.resolve(area.page(0, 3))
        uffd.continue_(area.page(3))
        Pagemap.expect_protected(area, (), "after UFFDIO_CONTINUE of page 3")
        area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-move-onto", mem=(ANON,), features=SYNC_RWP | Feature.MOVE, pages=3, rows=("RW-26",), kind=Kind.DETAIL
)
def test_rwprotect_move_onto(ctx: Context) -> None:
    """UFFDIO_MOVE to a protected page is EEXIST: the page stays as it was, and so does the one to be moved."""
    area, uffd = ctx.dst, ctx.uffd
    fill_otherwise(ctx.src)
    rwp_protected(ctx, MISSING | RWP)
    with rwp_trapped(uffd, area, 1):
        for mode in (MoveMode(0), MoveMode.DONTWAKE, MoveMode.ALLOW_SRC_HOLES):
            for page in (0, 1, 2):
                with promise("RW-26", f"UFFDIO_MOVE with mode {mode}, page {page}"), refuses(EEXIST):
                    uffd.move(area.page(page).start, ctx.src.page(page).start, PAGE_SIZE, mode)
            Pagemap.expect_protected(area, {0, 1, 2}, "after a refused UFFDIO_MOVE")
            uffd.expect_still_asleep(1)
        uffd.resolve(area.range)
    area.expect_pattern_of(area)
    ctx.src.expect_pattern(ctx.src.range, flipped=True)


@uffd_case(
    "rwprotect-fills-swapped",
    mem=(ANON, SHMEM_PRIVATE),
    features=SYNC_RWP | Feature.POISON,
    needs=("swap",),
    pages=4,
    rows=("RW-26",),
    kind=Kind.DETAIL,
)
def test_rwprotect_fills_swapped(ctx: Context) -> None:
    """A protected page that is in swap is there as well: to fill it is EEXIST, and it stays protected."""
    area, uffd = ctx.dst, ctx.uffd
    fill_otherwise(ctx.src)
    rwp_protected(ctx, MISSING | RWP)
    swap_out(area.range)
    fills: dict[str, Callable[[Range], object]] = {
        "UFFDIO_COPY": lambda where: uffd.copy(where.start, ctx.src.start, PAGE_SIZE),
        "UFFDIO_ZEROPAGE": uffd.zeropage,
        "UFFDIO_POISON": uffd.poison,
    }
    for what, fill in fills.items():
        for page in (0, 2, 3):
            with promise("RW-26", f"{what}, page {page}"), refuses(EEXIST):
                fill(area.page(page))
        Pagemap.expect_protected(area, range(4), f"after {what}")
        expect(Pagemap.have(area.range, uapi.PM_SWAP), [True] * 4, "pages in swap")
    expect_rwp_trapped(uffd, area, 0, 2)
    uffd.resolve(area.range)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-fills-thp",
    mem=(ANON,),
    features=SYNC_RWP | Feature.POISON,
    needs=("thp",),
    pages=2,
    rows=("RW-26",),
    kind=Kind.DETAIL,
)
def test_rwprotect_fills_thp(ctx: Context) -> None:
    """To fill a part of a protected transparent huge page is EEXIST, and leaves it protected and in one piece."""
    area, uffd = huge_area(ctx), ctx.uffd
    fill_otherwise(ctx.src)
    uffd.register(area.range, MISSING | RWP)
    uffd.rwprotect(area.range)
    last = area.nr_pages - 1
    with rwp_trapped(uffd, area, 7):
        for page in (0, 7, last):
            with promise("RW-26", f"UFFDIO_COPY, page {page}"), refuses(EEXIST):
                uffd.copy(area.page(page).start, ctx.src.start, PAGE_SIZE)
            with promise("RW-26", f"UFFDIO_ZEROPAGE, page {page}"), refuses(EEXIST):
                uffd.zeropage(area.page(page))
            with promise("RW-26", f"UFFDIO_POISON, page {page}"), refuses(EEXIST):
                uffd.poison(area.page(page))
        Pagemap.expect_protected(area, range(area.nr_pages), "after refused fills")
        expect(pmd_mapped(area.range), area.range.len, "bytes mapped by a huge page")
        uffd.expect_still_asleep(1)
        uffd.resolve(area.range)
    area.expect_pattern_of(area)


# ---- pages that are none -------------------------------------------------------------------------------------------


@uffd_case(
    "rwprotect-poisoned", mem=ALL, features=SYNC_RWP | Feature.POISON, pages=4, rows=("RW-27",), kind=Kind.DETAIL
)
def test_rwprotect_poisoned(ctx: Context) -> None:
    """A poisoned page in the range stays poisoned, and is never protected, while its neighbours are."""
    area, uffd = ctx.dst, ctx.uffd
    area.fill(0, 1)
    area.fill(2, 1)
    uffd.register(area.range, MISSING | RWP)
    uffd.poison(area.page(1))
    uffd.poison(area.page(3))
    for times in ("once", "twice"):
        for resolve, protected in ((False, {0, 2}), (True, set())):
            (uffd.resolve if resolve else uffd.rwprotect)(area.range)
            Pagemap.expect_protected(area, protected, f"after {'resolving' if resolve else 'protecting'} all {times}")
            for page in (1, 3):
                for write in (False, True):
                    observed = signals(uffd, area.page(page), area.page_size, write=write)
                    expect(observed, [SIGBUS], f"signals of an access to poisoned page {page}")
            if not resolve:
                expect_rwp_trapped(uffd, area, 0, 2)
    for page in (0, 2):
        area.expect_pattern_of(area, page, 1)


@uffd_case(
    "rwprotect-guard", mem=(ANON, SHMEM, SHMEM_PRIVATE), features=SYNC_RWP, pages=4, rows=("RW-27",), kind=Kind.DETAIL
)
def test_rwprotect_guard(ctx: Context) -> None:
    """A guard page in the range stays one, and is never protected, while its neighbours are."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    try:
        for page in (1, 3):
            advise(area.page(page), Advice.GUARD_INSTALL)
    except KernelError as error:
        raise Skip(f"{error} (Linux 6.13; for shared memory 6.15)") from None
    for resolve, protected in ((False, {0, 2}), (True, set())):
        (uffd.resolve if resolve else uffd.rwprotect)(area.range)
        Pagemap.expect_protected(area, protected, f"after {'resolving' if resolve else 'protecting'} all")
        for page in (1, 3):
            observed = signals(uffd, area.page(page), area.page_size, write=False)
            expect(observed, [SIGSEGV], f"signals of a read of guard page {page}")
        if not resolve:
            expect_rwp_trapped(uffd, area, 0, 2)
    uffd.rwprotect(area.range)
    for page in (1, 3):
        advise(area.page(page), Advice.GUARD_REMOVE)
        expect_rwp_free(uffd, area, page)
    Pagemap.expect_protected(area, {0, 2}, "after the guard pages were removed")
    uffd.resolve(area.range)
    for page in (0, 2):
        area.expect_pattern_of(area, page, 1)
