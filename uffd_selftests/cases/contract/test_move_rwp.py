# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_MOVE into memory registered for read-write protection, and out of it."""

from __future__ import annotations

from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ANON, ASYNC_RWP, MISSING, MOVE, PAGE_SIZE, PM_SWAP, READ_TRAPPED, RWP, SYNC_RWP, TABLE_BYTES, WRITE_TRAPPED, Advice,
    Area, Context, Pagemap, Range, RegisterMode, Skip, advise, expect, expect_bytes, expect_rwp_free,
    expect_rwp_trapped, faulting, huge_area, huge_mixture, keep_small, peek, pmd_mapped, pmd_size, promise, rwp_trapped,
    swap_out, uapi, undisturbed,
)  # fmt: skip

INTO = MISSING | RWP


def destination(ctx: Context, pages: int, mode: RegisterMode = INTO, *, huge: bool = False) -> Area:
    """Map an empty area, registered in this mode, for small pages or for huge ones."""
    area = ctx.allocate(pages)
    if huge:
        advise(area.range, Advice.HUGEPAGE)
    else:
        keep_small(area.range)
    ctx.uffd.register(area.range, mode)
    return area


def small_source(ctx: Context, *, swapped: bool = True) -> Area:
    """Return five pages, not registered: two with a pattern, one of zeroes, one in swap if wanted, one that is not."""
    area = ctx.src
    keep_small(area.range)
    for page in (0, 1, 3, 4):
        area.fill(page, 1)
    peek(area.page(2).start)
    if swapped:
        swap_out(area.page(3))
    return area


def expect_arrived(source: Area, at: int) -> None:
    """Assert what the pages of small_source() hold, wherever they are now."""
    source.pattern.verify(at, 0, 2)
    expect_bytes(Range(at + 2 * PAGE_SIZE, PAGE_SIZE), 0, "the zero page")
    source.pattern.verify(at, 3, 2)


@uffd_case(
    "move-into-rwp",
    mem=(ANON,),
    features=MOVE | SYNC_RWP,
    needs=("swap",),
    pages=5,
    rows=("MV-29",),
    kind=Kind.DETAIL,
)
def test_move_into_rwp(ctx: Context) -> None:
    """Pages that are moved into memory registered for read-write protection are protected there, of whatever kind."""
    src, dst = small_source(ctx), destination(ctx, 7, RWP)
    ctx.uffd.move(dst.page(1).start, src.start, 5 * PAGE_SIZE)
    Pagemap.expect_protected(dst, range(1, 6), "after UFFDIO_MOVE")
    expect(Pagemap.have(dst.range, PM_SWAP), [False] * 4 + [True] + [False] * 2, "pages in swap after UFFDIO_MOVE")
    Pagemap.expect_present(src)
    with promise("MV-29", "trapped"):
        expect_rwp_trapped(ctx.uffd, dst, 1, 2, 3, 4)
        with rwp_trapped(ctx.uffd, dst, 5, write=True):
            ctx.uffd.resolve(dst.page(5))
    expect_rwp_free(ctx.uffd, dst, *range(1, 6))
    src.pattern.verify(dst.page(1).start, 0, 2)
    expect_bytes(dst.page(3), 0, "the zero page")
    src.pattern.verify(dst.page(1).start, 3, 1)


@uffd_case("move-into-rwp-waiting", mem=(ANON,), features=MOVE | SYNC_RWP, pages=2, rows=("MV-29",), kind=Kind.DETAIL)
def test_move_into_rwp_waiting(ctx: Context) -> None:
    """A thread that waits for a missing page, and gets it by UFFDIO_MOVE, is then trapped at it: a second message."""
    ctx.src.fill()
    for page, write in enumerate((False, True)):
        dst, wanted = destination(ctx, 3), peek(ctx.src.page(page).start, PAGE_SIZE)
        start = dst.page(1).start
        with promise("MV-29", "write" if write else "read"):
            with faulting(ctx.uffd, start, write=write):
                ctx.uffd.move(start, ctx.src.page(page).start, PAGE_SIZE)
                ctx.uffd.wait_fault(start, WRITE_TRAPPED if write else READ_TRAPPED)
                ctx.uffd.expect_still_asleep(1)
                Pagemap.expect_protected(dst, {1}, "after UFFDIO_MOVE")
                ctx.uffd.resolve(dst.page(1))
            ctx.uffd.expect_no_message()
            Pagemap.expect_protected(dst, (), "after it was resolved")
            first = int(write)  # a byte is what the thread wrote
            expect(peek(start, PAGE_SIZE)[first:], wanted[first:], "bytes of the page")


@uffd_case("move-into-rwp-batch", mem=(ANON,), features=MOVE | SYNC_RWP, pages=1, rows=("MV-29",), kind=Kind.DETAIL)
def test_move_into_rwp_batch(ctx: Context) -> None:
    """Of many pages that one request moves every one is protected, in each page table."""
    table = TABLE_BYTES // PAGE_SIZE
    count = min(table, 512)
    src, dst = ctx.allocate(count + 2), destination(ctx, 2 * table)
    keep_small(src.range)
    src.fill()
    first = table - count // 2 + 3
    ctx.uffd.move(dst.page(first).start, src.page(1).start, count * PAGE_SIZE)
    moved = range(first, first + count)
    Pagemap.expect_protected(dst, moved, "after UFFDIO_MOVE")
    Pagemap.expect_present(src, 0, count + 1)
    some = (first, first + 1, table - 1, table, first + count - 1)
    expect_rwp_trapped(ctx.uffd, dst, *some)
    Pagemap.expect_protected(dst, set(moved) - set(some), "after some were resolved")
    ctx.uffd.resolve(dst.range)
    undisturbed(ctx.uffd, partial(src.pattern.verify, dst.page(first - 1).start, 1, count, write_back=True))


@uffd_case("move-into-rwp-async", mem=(ANON,), features=MOVE | ASYNC_RWP, pages=3, rows=("MV-29",), kind=Kind.DETAIL)
def test_move_into_rwp_async(ctx: Context) -> None:
    """With UFFD_FEATURE_RWP_ASYNC the thread that waited goes on; its page counts as accessed, others do not."""
    ctx.src.fill()
    dst = destination(ctx, 5)
    with faulting(ctx.uffd, dst.page(2).start) as waiter:
        ctx.uffd.move(dst.page(1).start, ctx.src.start, 3 * PAGE_SIZE)
        waiter.result()
    ctx.uffd.expect_no_message()
    Pagemap.expect_protected(dst, {1, 3}, "after UFFDIO_MOVE and one access")
    undisturbed(ctx.uffd, lambda: ctx.src.pattern.verify(dst.page(1).start, 0, 3, write_back=True))
    Pagemap.expect_protected(dst, (), "after an access to each page")


@uffd_case(
    "move-into-rwp-huge", mem=(ANON,), features=MOVE | SYNC_RWP, needs=("thp",), pages=1, rows=("MV-29",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_move_into_rwp_huge(ctx: Context) -> None:
    """A transparent huge page, whole or a part of it, and the huge zero page are protected where they arrive."""
    n = pmd_size() // PAGE_SIZE
    for what, first, count in (("whole", 0, n), ("a part", 5, 3), ("huge zero page", 0, n), ("part of that", 5, 3)):
        zero = "zero" in what or "that" in what
        src, dst = huge_zero_page(ctx) if zero else huge_area(ctx), destination(ctx, 2 * n, huge=True)
        with promise("MV-29", what):
            ctx.uffd.move(dst.page(first).start, src.page(first).start, count * PAGE_SIZE)
            marked = set(range(first, first + count))
            Pagemap.expect_protected(dst, marked, "after UFFDIO_MOVE")
            Pagemap.expect_present(src, *sorted(set(range(n)) - marked))
            some = sorted({first, first + 1, first + count - 1})
            expect_rwp_trapped(ctx.uffd, dst, *some)
            Pagemap.expect_protected(dst, marked - set(some), "after some were resolved")
            ctx.uffd.resolve(dst.page(first, count))
            if zero:
                undisturbed(ctx.uffd, partial(expect_bytes, dst.page(first, count), 0))
            else:
                undisturbed(ctx.uffd, partial(src.pattern.verify, dst.start, first, count))
            expect_rwp_free(ctx.uffd, dst, *some)


def huge_zero_page(ctx: Context) -> Area:
    """Map an area in which the huge zero page is; Skip where there is none."""
    area = ctx.allocate(pmd_size() // PAGE_SIZE)
    advise(area.range, Advice.HUGEPAGE)
    peek(area.start)
    if not all(Pagemap.have(area.range, uapi.PM_PRESENT)) or pmd_mapped(area.range):
        raise Skip("no huge zero page: echo 1 > /sys/kernel/mm/transparent_hugepage/use_zero_page")
    return area


# ---- out of it -----------------------------------------------------------------------------------------------------


@uffd_case("move-out-of-rwp", mem=(ANON,), features=MOVE | SYNC_RWP, pages=5, rows=("MV-30",), kind=Kind.DETAIL)
def test_move_out_of_rwp(ctx: Context) -> None:
    """A protected page, or zero page, that moves to where nothing is protected is free there; all others stay."""
    src, dst = small_source(ctx, swapped=False), destination(ctx, 5, MISSING)
    ctx.uffd.register(src.range, RWP)
    ctx.uffd.rwprotect(src.page(0, 4))
    ctx.uffd.move(dst.page(1).start, src.page(1).start, 2 * PAGE_SIZE)
    Pagemap.expect_protected(dst, (), "at the destination after UFFDIO_MOVE")
    Pagemap.expect_protected(src, {0, 3}, "at the source after UFFDIO_MOVE")
    Pagemap.expect_present(src, 0, 3, 4)
    undisturbed(ctx.uffd, lambda: src.pattern.verify(dst.start, 1, 1, write_back=True))
    undisturbed(ctx.uffd, lambda: expect_bytes(dst.page(2), 0))
    expect_rwp_free(ctx.uffd, dst, 1, 2)
    undisturbed(ctx.uffd, lambda: expect_bytes(src.page(1, 2), 0, "what is at the source afterwards"))
    expect_rwp_free(ctx.uffd, src, 1, 2, 4)
    expect_rwp_trapped(ctx.uffd, src, 0, 3)


@uffd_case(
    "move-out-of-rwp-huge",
    mem=(ANON,),
    features=MOVE | SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("MV-30",),
    kind=Kind.DETAIL,
)
def test_move_out_of_rwp_huge(ctx: Context) -> None:
    """Huge pages that were protected whole or in part are free where they arrive, in one piece or split."""
    mix = huge_mixture(ctx)
    src, dst = mix.area, destination(ctx, mix.area.nr_pages, MISSING, huge=True)
    n = mix.count
    ctx.uffd.move(dst.start, src.start, 2 * n * PAGE_SIZE)
    expect(pmd_mapped(dst.range), n * PAGE_SIZE, "bytes mapped by PMD at the destination")
    Pagemap.expect_protected(dst, (), "at the destination after UFFDIO_MOVE")
    Pagemap.expect_protected(src, (), "at the source after UFFDIO_MOVE")
    undisturbed(ctx.uffd, lambda: src.pattern.verify(dst.start, 0, 2 * n, write_back=True))
    expect_rwp_free(ctx.uffd, dst, 0, 7, n - 1, n, mix.cut[0], 2 * n - 1)
    ctx.uffd.rwprotect(src.page(2 * n, n))
    ctx.uffd.move(dst.page(2 * n).start + 5 * PAGE_SIZE, src.page(2 * n + 5).start, 3 * PAGE_SIZE)
    Pagemap.expect_protected(dst, (), "at the destination after a part was moved")
    marked = set(range(2 * n, 3 * n)) - {2 * n + 5, 2 * n + 6, 2 * n + 7}
    Pagemap.expect_protected(src, marked, "at the source after a part was moved")
    undisturbed(ctx.uffd, lambda: src.pattern.verify(dst.start, 2 * n + 5, 3, write_back=True))
    expect_rwp_trapped(ctx.uffd, src, 2 * n + 4, 2 * n + 8)


def move_swapped(ctx: Context, protected: Range) -> tuple[Area, Area]:
    """Move three of four pages in swap, some protected, to where nothing is; return the source and the destination."""
    src, dst = ctx.src, destination(ctx, 4, MISSING)
    keep_small(src.range)
    src.fill()
    ctx.uffd.register(src.range, RWP)
    ctx.uffd.rwprotect(protected)
    swap_out(src.range)
    ctx.uffd.move(dst.start, src.start, 3 * PAGE_SIZE)
    return src, dst


SWAPPED = Defect(
    id="D-MV-31",
    summary="UFFDIO_MOVE of a read-write-protected page in swap takes the mark into a range not registered for it: who "
    "registers that for protection later is trapped where nothing was protected",
    kernels="7.3.4",
    advice="Resolve a source range before pages are moved out of it.",
    shows=r"MV-31.*after UFFDIO_MOVE: expected PM_UFFD_WP .* pages: none, got 1",
)


@uffd_case(
    "move-out-of-rwp-swapped",
    mem=(ANON,),
    features=MOVE | SYNC_RWP,
    needs=("swap",),
    pages=4,
    rows=("MV-31",),
    defect=SWAPPED,
)
def test_move_out_of_rwp_swapped(ctx: Context) -> None:
    """Protection of a page in swap does not come along to a range that is not registered for it."""
    _, dst = move_swapped(ctx, ctx.src.page(1))
    with promise("MV-31"):
        Pagemap.expect_protected(dst, (), "after UFFDIO_MOVE")


@uffd_case(
    "move-out-of-rwp-swapped-bytes",
    mem=(ANON,),
    features=MOVE | SYNC_RWP,
    needs=("swap",),
    pages=4,
    rows=("MV-31",),
    kind=Kind.DETAIL,
)
def test_move_out_of_rwp_swapped_bytes(ctx: Context) -> None:
    """Protected pages in swap that are moved to where nothing is protected have their bytes there, and stop nobody."""
    src, dst = move_swapped(ctx, ctx.src.page(1, 2))
    undisturbed(ctx.uffd, lambda: src.pattern.verify(dst.start, 0, 3, write_back=True))
    expect_rwp_free(ctx.uffd, dst, 0, 1, 2)
    Pagemap.expect_protected(src, (), "at the source after UFFDIO_MOVE")
    expect_rwp_free(ctx.uffd, src, 3)


@uffd_case(
    "move-between-rwp",
    mem=(ANON,),
    features=MOVE | SYNC_RWP,
    needs=("swap",),
    pages=5,
    rows=("MV-29",),
    kind=Kind.DETAIL,
)
def test_move_between_rwp(ctx: Context) -> None:
    """A page that moves through memory registered for read-write protection is protected there, and only there."""
    src, between, last = small_source(ctx), destination(ctx, 5), destination(ctx, 5, MISSING)
    ctx.uffd.move(between.start, src.start, 5 * PAGE_SIZE)
    Pagemap.expect_protected(between, range(5), "after the first UFFDIO_MOVE")
    ctx.uffd.resolve(between.page(3))
    ctx.uffd.move(last.start, between.start, 5 * PAGE_SIZE)
    Pagemap.expect_protected(between, (), "at the source of the second UFFDIO_MOVE")
    Pagemap.expect_present(between)
    Pagemap.expect_protected(last, (), "after the second UFFDIO_MOVE")
    undisturbed(ctx.uffd, lambda: expect_arrived(src, last.start))
    expect_rwp_free(ctx.uffd, last, *range(5))
