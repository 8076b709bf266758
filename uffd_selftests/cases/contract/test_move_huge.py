# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_MOVE of transparent huge pages: whole, in part, split, and those that stay."""

from __future__ import annotations

from contextlib import ExitStack
from errno import EAGAIN, EBUSY, EEXIST
from functools import partial
from pathlib import Path

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ANON, MISSING, MOVE, PAGE_SIZE, PM_SOFT_DIRTY, WP, Advice, Area, Child, Context, Feature, Pagemap, Skip, Waiter,
    advise, eventually, expect, expect_bytes, faulting_pages, fixed_buffer, huge_area, mended, peek, pmd_mapped,
    pmd_size, poke, promise, refuses, require_soft_dirty, swap_out, uapi, undisturbed,
)  # fmt: skip


def huge_page(ctx: Context) -> tuple[Area, Area]:
    """Return an area that is one transparent huge page, and a registered one with room for two."""
    src, dst = huge_area(ctx), ctx.allocate(2 * pmd_size() // PAGE_SIZE)
    advise(dst.range, Advice.HUGEPAGE)  # else the first fault brings a page table
    ctx.uffd.register(dst.range, MISSING)
    return src, dst


@uffd_case(
    "move-huge-soft-dirty", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-01",), kind=Kind.DETAIL
)
def test_move_huge_soft_dirty(ctx: Context) -> None:
    """A transparent huge page that has moved, and a part of one, counts as written since they were cleared."""
    for what, count in (("whole", pmd_size() // PAGE_SIZE), ("a part", 2)):
        src, dst = huge_page(ctx)
        require_soft_dirty(src.start)
        Path("/proc/self/clear_refs").write_text("4")
        with promise("MV-01", f"huge page, {what}"):
            ctx.uffd.move(dst.start, src.start, count * PAGE_SIZE)
            dirty = [page for page in range(count) if Pagemap.entry(dst.page(page).start) & PM_SOFT_DIRTY]
            expect(len(dirty), count, "pages that are soft-dirty after UFFDIO_MOVE")


@uffd_case("move-huge", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-19",))
def test_move_huge(ctx: Context) -> None:
    """A transparent huge page moves in one piece to a place where one fits."""
    src, dst = huge_page(ctx)
    with promise("MV-19", "2 MiB, aligned"), faulting_pages(ctx.uffd, dst, 0, src.nr_pages - 1, src.nr_pages):
        ctx.uffd.move(dst.start, src.start, src.range.len)
        ctx.uffd.expect_still_asleep(1)
        expect(pmd_mapped(dst.range), src.range.len, "bytes of the destination mapped by PMD")
        ctx.uffd.zeropage(dst.page(src.nr_pages))
    dst.expect_pattern_of(src, 0, src.nr_pages)
    Pagemap.expect_present(src)
    undisturbed(ctx.uffd, lambda: dst.expect_pattern_of(src, 0, src.nr_pages, write_back=True))
    src.expect_zero()


@uffd_case("move-huge-split", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-19",))
def test_move_huge_split(ctx: Context) -> None:
    """A transparent huge page is split when a part of it moves, or it moves to where it does not fit as a whole."""
    n, huge = pmd_size() // PAGE_SIZE, pmd_size()
    for what, first, to, count, huge_left, huge_there in (
        ("a page from the middle", 5, 5, 1, huge, 0),
        ("all but the last page", 0, 0, n - 1, huge, 0),
        ("from the middle of one to that of the next", 5, 0, n, 0, 0),
        ("to where it is not aligned", 0, 1, n, huge, 0),
        ("one and a part of the next", 0, 0, n + 5, 0, huge),
    ):
        src, dst = ctx.allocate(2 * n), ctx.allocate(3 * n)
        for area in (src, dst):
            advise(area.range, Advice.HUGEPAGE)
        src.fill()
        if pmd_mapped(src.range) < src.range.len:
            raise Skip("no transparent huge pages to be had: memory is fragmented")
        ctx.uffd.register(dst.range, MISSING)
        with promise("MV-19", what):
            ctx.uffd.move(dst.page(to).start, src.page(first).start, count * PAGE_SIZE)
            expect((pmd_mapped(src.range), pmd_mapped(dst.range)), (huge_left, huge_there), "bytes mapped by PMD")
            Pagemap.expect_present(dst, *range(to, to + count))
            Pagemap.expect_present(src, *range(first), *range(first + count, 2 * n))
            src.pattern.verify(dst.start + (to - first) * PAGE_SIZE, first, count)
            src.pattern.verify(src.start, 0, first)
            src.pattern.verify(src.start, first + count, 2 * n - first - count)


@uffd_case("move-huge-onto-table", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-05", "MV-19"))
def test_move_huge_onto_table(ctx: Context) -> None:
    """A transparent huge page is split when it moves to where pages were mapped before; one in its way stops it."""
    src, dst = huge_page(ctx)
    n = src.nr_pages
    for page in (7, n + 7):
        ctx.uffd.zeropage(dst.page(page))
    with promise("MV-05", "page in the way of a huge page"), refuses(EAGAIN, output=7 * PAGE_SIZE):
        ctx.uffd.move(dst.page(n).start, src.start, src.range.len)
    Pagemap.expect_present(dst, 7, *range(n, n + 8))
    ctx.uffd.move(dst.page(0).start, dst.page(n).start, 7 * PAGE_SIZE)
    dst.expect_pattern_of(src, 0, 7)
    src.pattern.verify(src.start, 7, n - 7)

    src = huge_area(ctx)
    for half in (dst.page(0, n // 2), dst.page(n // 2, n // 2)):  # as a whole, its page table could go too
        advise(half, Advice.DONTNEED)
    with promise("MV-19", "empty page table"):
        ctx.uffd.move(dst.start, src.start, src.range.len)
    dst.expect_pattern_of(src, 0, n)
    Pagemap.expect_present(src)


@uffd_case("move-huge-shared", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-12",))
def test_move_huge_shared(ctx: Context) -> None:
    """A transparent huge page shared with a forked child cannot be moved, nor can a part of it."""
    src, dst = huge_page(ctx)
    with Child(lambda channel: channel.receive()) as child:
        for what, length in (("whole", src.range.len), ("a part", PAGE_SIZE)):
            with promise("MV-12", f"huge page, {what}"), refuses(EBUSY):
                ctx.uffd.move(dst.start, src.start, length)
        child.send()
    expect(pmd_mapped(src.range), src.range.len, "bytes of the source mapped by PMD")
    src.expect_pattern_of(src)
    Pagemap.expect_present(dst)


@uffd_case("move-huge-pinned", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-14",))
def test_move_huge_pinned(ctx: Context) -> None:
    """A transparent huge page with a long-term pin cannot be moved until it is unpinned."""
    src, dst = huge_page(ctx)
    with fixed_buffer(src.range), promise("MV-14", "huge page, pinned"), refuses(EBUSY):
        ctx.uffd.move(dst.start, src.start, src.range.len)
    src.expect_pattern_of(src)
    with promise("MV-14", "huge page, unpinned"):
        ctx.uffd.move(dst.start, src.start, src.range.len)
    dst.expect_pattern_of(src, 0, src.nr_pages)


D_PINNED_PART = Defect(
    id="D-MV-14",
    summary="UFFDIO_MOVE of a part of a pinned transparent huge page spins in the kernel until it is unpinned",
    kernels="6.12.117; not 6.18.44, 7.3.4",
    advice="Use MADV_NOHUGEPAGE on a source of which pages may be pinned.",
    shows=r"UFFDIO_MOVE did not return before the page was unpinned",
)


@uffd_case(
    "move-huge-pinned-part",
    mem=(ANON,),
    features=MOVE,
    needs=("thp",),
    pages=1,
    rows=("MV-14",),
    defect=D_PINNED_PART,
)
def test_move_huge_pinned_part(ctx: Context) -> None:
    """A part of a transparent huge page with a long-term pin cannot be moved, and the kernel says so at once."""
    src, dst = huge_page(ctx)

    def refused() -> None:
        with refuses(EBUSY):
            ctx.uffd.move(dst.start, src.start, PAGE_SIZE)

    with ExitStack() as pin, mended(ctx.uffd), promise("MV-14", "a part of a huge page, pinned"):
        pin.enter_context(fixed_buffer(src.range))
        with Waiter(refused) as waiter:
            eventually(lambda: waiter.done or waiter.cpu_time > 0.5, "UFFDIO_MOVE to return or to spin")
            spins = not waiter.done
            pin.close()
            if spins:
                eventually(lambda: waiter.done, "UFFDIO_MOVE to return once the page is unpinned")
                raise AssertionError("expected EBUSY; UFFDIO_MOVE did not return before the page was unpinned")
    src.expect_pattern_of(src)


@uffd_case("move-onto-huge", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-03",))
def test_move_onto_huge(ctx: Context) -> None:
    """UFFDIO_MOVE does not replace a part of a transparent huge page, nor split it."""
    dst = huge_area(ctx)
    poke(ctx.src.start, b"data")
    ctx.uffd.register(dst.range, MISSING)
    for page in (0, 5):
        with promise("MV-03", f"page {page} of a huge page"), refuses(EEXIST):
            ctx.uffd.move(dst.page(page).start, ctx.src.start, PAGE_SIZE)
    expect(pmd_mapped(dst.range), dst.range.len, "bytes of the destination mapped by PMD")
    dst.expect_pattern_of(dst)
    expect(peek(ctx.src.start, 5), b"data\0", "the source")


@uffd_case(
    "move-huge-zeropage",
    mem=(ANON,),
    features=MOVE,
    needs=("thp",),
    pages=1,
    rows=("MV-20",),
    bugs=(60,),
    kind=Kind.DETAIL,
    deadline=5,
)
def test_move_huge_zeropage(ctx: Context) -> None:
    """The huge zero page can be moved as a whole or in part."""
    count = pmd_size() // PAGE_SIZE
    for what, first, length in (("whole", 0, count), ("a part", 5, 2)):
        src, dst = ctx.allocate(count), ctx.allocate(count)
        advise(src.range, Advice.HUGEPAGE)
        peek(src.start)
        if not all(entry & uapi.PM_PRESENT for entry in Pagemap.entries(src.range)) or pmd_mapped(src.range):
            raise Skip("no huge zero page: echo 1 > /sys/kernel/mm/transparent_hugepage/use_zero_page")
        ctx.uffd.register(dst.range, MISSING)
        with promise("MV-20", what):
            ctx.uffd.move(dst.page(first).start, src.page(first).start, length * PAGE_SIZE)
            moved = range(first, first + length)
            Pagemap.expect_present(dst, *moved)
            Pagemap.expect_present(src, *(set(range(count)) - set(moved)))
        expect_bytes(dst.page(first, length), 0)
        undisturbed(ctx.uffd, partial(poke, dst.page(first).start, b"new"))


@uffd_case(
    "move-huge-protected",
    mem=(ANON,),
    features=MOVE | Feature.PAGEFAULT_FLAG_WP,
    needs=("thp",),
    pages=1,
    rows=("MV-21",),
    kind=Kind.DETAIL,
)
def test_move_huge_protected(ctx: Context) -> None:
    """Write protection of a transparent huge page does not come along to a range that is not registered for it."""
    src, dst = huge_page(ctx)
    ctx.uffd.register(src.range, WP)
    ctx.uffd.writeprotect(src.range)
    with promise("MV-21", "huge page"):
        ctx.uffd.move(dst.start, src.start, src.range.len)
        Pagemap.expect_protected(dst, [], "after UFFDIO_MOVE")
        undisturbed(ctx.uffd, lambda: poke(dst.start, peek(dst.start)))
    dst.expect_pattern_of(src, 0, src.nr_pages)


@uffd_case(
    "move-huge-then-swap", mem=(ANON,), features=MOVE, needs=("swap", "thp"), pages=1, rows=("MV-19",), kind=Kind.DETAIL
)
def test_move_huge_then_swap(ctx: Context) -> None:
    """A transparent huge page that has moved can be swapped out and comes back at its new place."""
    src, dst = huge_page(ctx)
    ctx.uffd.move(dst.start, src.start, src.range.len)
    swap_out(dst.page(0, src.nr_pages))
    undisturbed(ctx.uffd, lambda: dst.expect_pattern_of(src, 0, src.nr_pages))
