# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_MOVE where the source has holes, or the destination pages: what moves, and how far it gets."""

from __future__ import annotations

from errno import EAGAIN, ENOENT

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ANON, HOLES, MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, MISSING, MOVE, PAGE_SIZE, Advice, Context, MoveMode,
    Pagemap, Range, advise, faulting, faulting_pages, keep_small, mapped, move, pmd_size, poke, prepare, promise,
    refuses,
)  # fmt: skip


@uffd_case("move-hole", mem=(ANON,), features=MOVE, pages=2, rows=("MV-04",))
def test_move_hole(ctx: Context) -> None:
    """A hole cannot be moved; with ALLOW_SRC_HOLES it counts as moved, and the destination stays missing."""
    ctx.src.fill(1, 1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start):
        with promise("MV-04"), refuses(ENOENT):
            move(ctx, 0)
        ctx.uffd.expect_still_asleep(1)
        with promise("MV-04", "ALLOW_SRC_HOLES"):
            move(ctx, 0, mode=HOLES)
            ctx.uffd.wait_fault(ctx.dst.start)  # woken for nothing
        Pagemap.expect_present(ctx.dst)
        ctx.uffd.move(ctx.dst.start, ctx.src.page(1).start, ctx.page_size)
    ctx.uffd.expect_no_message()


@uffd_case("move-holes-among-pages", mem=(ANON,), features=MOVE, pages=4, rows=("MV-04",))
def test_move_holes_among_pages(ctx: Context) -> None:
    """With ALLOW_SRC_HOLES the pages of a range move and its holes do not matter."""
    ctx.src.fill(0, 1)
    ctx.src.fill(2, 1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("MV-04", "ALLOW_SRC_HOLES"):
        move(ctx, 0, 4, HOLES)
    Pagemap.expect_present(ctx.dst, 0, 2)
    Pagemap.expect_present(ctx.src)
    for page in (0, 2):
        ctx.dst.expect_pattern_of(ctx.src, page, 1)
    with faulting_pages(ctx.uffd, ctx.dst, 1, 3):
        ctx.uffd.zeropage(ctx.dst.page(1))
        ctx.uffd.zeropage(ctx.dst.page(3))


@uffd_case("move-holes-dontwake", mem=(ANON,), features=MOVE, pages=2, rows=("MV-04",))
def test_move_holes_dontwake(ctx: Context) -> None:
    """ALLOW_SRC_HOLES and DONTWAKE together do what each does alone: the hole does not matter, and nobody wakes."""
    ctx.src.fill(0, 1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start), promise("MV-04"):
        ctx.uffd.move(ctx.dst.start, ctx.src.start, ctx.dst.range.len, HOLES | MoveMode.DONTWAKE)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(ctx.dst.page(0))
    Pagemap.expect_present(ctx.dst, 0)


@uffd_case("move-nothing", mem=(ANON,), features=MOVE, pages=1, rows=("MV-28",), bugs=(39,), kind=Kind.DETAIL)
def test_move_nothing(ctx: Context) -> None:
    """Megabytes of nothing, without any page table, are a hole too; few pages in the midst of them move."""
    length = 4 * (pmd_size() or 1 << 21)
    src, dst = ctx.allocate(length // PAGE_SIZE), ctx.allocate(length // PAGE_SIZE)
    ctx.uffd.register(dst.range, MISSING)
    with promise("MV-28"), refuses(ENOENT):
        ctx.uffd.move(dst.start, src.start, length)
    with promise("MV-28", "ALLOW_SRC_HOLES"):
        ctx.uffd.move(dst.start, src.start, length, HOLES)
    Pagemap.expect_present(dst)
    pages = (1, src.nr_pages // 2 + 7, src.nr_pages - 1)
    for page in pages:
        src.fill(page, 1)
    with promise("MV-28", "ALLOW_SRC_HOLES, with some pages"):
        ctx.uffd.move(dst.start, src.start, length, HOLES)
    Pagemap.expect_present(dst, *pages)
    Pagemap.expect_present(src)
    for page in pages:
        dst.expect_pattern_of(src, page, 1)


@uffd_case("move-nowhere", mem=(ANON,), features=MOVE, pages=1, rows=("MV-28",), kind=Kind.DETAIL)
def test_move_nowhere(ctx: Context) -> None:
    """A hole in a corner of the address space that has no page tables at all is a hole like any other."""
    entries = PAGE_SIZE // 8
    corner = min(PAGE_SIZE * entries**2, 1 << 36)  # what one page table of PMDs spans: a gibibyte with pages of 4 kB
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    ctx.uffd.register(ctx.dst.range, MISSING)
    with mapped(2 * corner, flags=flags) as place:
        hole = Range(-(-place.start // corner) * corner, PAGE_SIZE)
        with promise("MV-28", "no page tables"), refuses(ENOENT):
            ctx.uffd.move(ctx.dst.start, hole.start, PAGE_SIZE)
        with promise("MV-28", "no page tables, ALLOW_SRC_HOLES"):
            ctx.uffd.move(ctx.dst.start, hole.start, PAGE_SIZE, HOLES)
        keep_small(place)
        other = hole.start + pmd_size()
        poke(other + pmd_size(), b"x")
        with promise("MV-28", "only the page table is missing"), refuses(ENOENT):
            ctx.uffd.move(ctx.dst.start, other, PAGE_SIZE)
        Pagemap.expect_present(ctx.dst)


@uffd_case("move-partial", mem=(ANON,), features=MOVE, pages=4, rows=("MV-05",))
def test_move_partial(ctx: Context) -> None:
    """UFFDIO_MOVE stops at a hole or a page in its way, says how far it came, and wakes the threads up to there."""
    prepare(ctx)
    advise(ctx.src.page(2), Advice.DONTNEED)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1, 2, 3):
        with promise("MV-05", "hole"), refuses(EAGAIN, output=ctx.page_size):
            move(ctx, 1, 3)
        ctx.uffd.expect_still_asleep(3)
        Pagemap.expect_present(ctx.dst, 1)
        Pagemap.expect_present(ctx.src, 0, 3)
        ctx.src.fill(1, 1)
        with promise("MV-05", "page in the way"), refuses(EAGAIN, output=ctx.page_size):
            move(ctx, 0, 2)
        ctx.uffd.expect_still_asleep(2)
        Pagemap.expect_present(ctx.dst, 0, 1)
        Pagemap.expect_present(ctx.src, 1, 3)
        ctx.uffd.zeropage(ctx.dst.page(2))
        move(ctx, 3)
    for page in (0, 1, 3):
        ctx.dst.expect_pattern_of(ctx.src, page, 1)


@uffd_case("move-partial-dontwake", mem=(ANON,), features=MOVE, pages=4, rows=("MV-05",), kind=Kind.DETAIL)
def test_move_partial_dontwake(ctx: Context) -> None:
    """With MODE_DONTWAKE a move that stops midway wakes nobody either."""
    prepare(ctx)
    advise(ctx.src.page(2), Advice.DONTNEED)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1, 2):
        with promise("MV-05"), refuses(EAGAIN, output=2 * ctx.page_size):
            move(ctx, 0, 4, MoveMode.DONTWAKE)
        ctx.uffd.expect_still_asleep(3)
        Pagemap.expect_present(ctx.dst, 0, 1)
        ctx.uffd.wake(ctx.dst.page(0, 2))
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.zeropage(ctx.dst.page(2))
    ctx.dst.expect_pattern_of(ctx.src, 0, 2)
