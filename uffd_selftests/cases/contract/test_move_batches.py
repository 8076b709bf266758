# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_MOVE of many small pages in one request, of pages that move twice, and of locked ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from errno import EAGAIN, EBUSY, EEXIST, ENOENT, errorcode
from functools import partial
from pathlib import Path

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ANON, HOLES, MISSING, MOVE, NEW, PAGE_SIZE, PM_PRESENT, PM_SOFT_DIRTY, PM_SWAP, TABLE_BYTES, Advice, Area, Child,
    Context, KernelError, Pagemap, Skip, UffdError, Waiter, advise, errno_name, eventually, expect, expect_bytes, ffi,
    fixed_buffer, huge_area, keep_small, mended, page_numbers, peek, pmd_mapped, poke, promise, refuses, resident,
    smaps_bytes, swap_out, syscalls, touch, undisturbed,
)  # fmt: skip

PFN = (1 << 55) - 1
"""What pagemap says of a page's place: its frame, which is 0 without CAP_SYS_ADMIN, or where in swap it is."""

TABLE = TABLE_BYTES // PAGE_SIZE
"""Pages of a page table."""
COUNT = min(TABLE, 512)
"""Pages that are moved, spread over two page tables."""
FIRST, TO = TABLE - 3 * COUNT // 4 + 1, TABLE - COUNT // 2 + 3
"""Where they begin in the source, and in the destination: not at the same place of their page tables."""


def kind(number: int) -> str:
    """What the page of this number is."""
    if number % 7 == 3 or number in (COUNT - 2, COUNT // 2):
        return "hole"
    if number % 11 == 5:
        return "zero"
    return "swap" if number % 29 == 6 else "page"


def two_tables(ctx: Context) -> tuple[Area, Area]:
    """Map a source and a registered destination of two page tables each, for small pages."""
    src, dst = ctx.allocate(2 * TABLE), ctx.allocate(2 * TABLE)
    for area in (src, dst):
        keep_small(area.range)
    ctx.uffd.register(dst.range, MISSING)
    return src, dst


def mixed_source(ctx: Context) -> tuple[Area, Area]:
    """Return such areas, of which the source has COUNT pages of mixed kinds, and one more on both sides."""
    src, dst = two_tables(ctx)
    for number in range(-1, COUNT + 1):
        page = FIRST + number
        if number in (-1, COUNT) or kind(number) in ("page", "swap"):
            src.fill(page, 1)
        elif kind(number) == "zero":
            peek(src.page(page).start)
    for number in range(COUNT):
        if kind(number) == "swap":
            swap_out(src.page(FIRST + number))
    return src, dst


def expect_mixed(ctx: Context, src: Area, dst: Area, before: list[int]) -> None:
    """Assert that all of a mixed source has moved, each page the same as before, and its neighbours have not."""
    after = Pagemap.entries(dst.page(TO, COUNT))
    places = {page: after[page] & PFN for page in range(COUNT) if kind(page) in ("page", "swap")}
    wrong = [page for page, place in places.items() if place != before[page] & PFN]
    expect(page_numbers(wrong), "none", "pages that are in another frame or place in swap")
    for name, bit, kinds in ("mapped", PM_PRESENT, ("page", "zero")), ("in swap", PM_SWAP, ("swap",)):
        found = [page for page in range(COUNT) if after[page] & bit]
        wanted = [page for page in range(COUNT) if kind(page) in kinds]
        expect(page_numbers(found), page_numbers(wanted), f"pages {name} at the destination")
    Pagemap.expect_present(src, FIRST - 1, FIRST + COUNT)
    expect(any(Pagemap.have(src.page(FIRST, COUNT), PM_SWAP)), False, "whether any page in swap is at the source")
    expect(any(Pagemap.filled(dst.page(0, TO))), False, "whether any page is before the destination")
    expect(any(Pagemap.filled(dst.page(TO + COUNT, 2 * TABLE - TO - COUNT))), False, "whether any page is behind it")
    for page in range(COUNT):
        if kind(page) == "zero":
            expect_bytes(dst.page(TO + page), 0, f"page {page}")
        elif kind(page) != "hole":
            undisturbed(ctx.uffd, partial(src.pattern.verify, dst.page(TO).start - FIRST * PAGE_SIZE, FIRST + page, 1))
    for page in (FIRST - 1, FIRST + COUNT):
        src.expect_pattern_of(src, page, 1)


@uffd_case("move-batch", mem=(ANON,), features=MOVE, needs=("swap",), pages=1, rows=("MV-33",), kind=Kind.DETAIL)
def test_move_batch(ctx: Context) -> None:
    """Pages, zero pages, swapped ones and holes arrive alike whether one request moves them all or one moves each."""
    for what, step in (("at once", COUNT), ("page by page", 1)):
        src, dst = mixed_source(ctx)
        before = Pagemap.entries(src.page(FIRST, COUNT))
        tracks = bool(before[0] & PM_SOFT_DIRTY)
        if tracks:
            Path("/proc/self/clear_refs").write_text("4")
        with promise("MV-33", what):
            for first in range(0, COUNT, step):
                ctx.uffd.move(dst.page(TO + first).start, src.page(FIRST + first).start, step * PAGE_SIZE, HOLES)
            if tracks:
                dirty = Pagemap.have(dst.page(TO, COUNT), PM_SOFT_DIRTY)
                clean = [page for page in range(COUNT) if kind(page) in ("page", "swap") and not dirty[page]]
                expect(page_numbers(clean), "none", "moved pages that are not soft-dirty")
            expect_mixed(ctx, src, dst, before)


@contextmanager
def shared_with_child(page: int, src: Area) -> Iterator[None]:
    """Share one page of the area with a child, and no other one."""
    with Child(lambda channel: channel.receive()) as child:
        for other in set(range(FIRST, FIRST + COUNT)) - {page}:
            touch(src.page(other), PAGE_SIZE, write=True)
        yield
        child.send()


def obstacles(ctx: Context, src: Area, dst: Area, place: int) -> dict[str, tuple[int, AbstractContextManager[object]]]:
    """What can be in the way of one page: the errno, and the block in which it is."""
    page = src.page(FIRST + place)

    @contextmanager
    def hole() -> Iterator[None]:
        advise(page, Advice.DONTNEED)
        yield

    @contextmanager
    def taken() -> Iterator[None]:
        ctx.uffd.zeropage(dst.page(TO + place))
        yield

    return {
        "a hole": (ENOENT, hole()),
        "a page at the destination": (EEXIST, taken()),
        "a pinned page": (EBUSY, fixed_buffer(page)),
        "a page shared with a child": (EBUSY, shared_with_child(FIRST + place, src)),
    }


@uffd_case("move-batch-stopped", mem=(ANON,), features=MOVE, pages=1, rows=("MV-33", "MV-05"), kind=Kind.DETAIL)
def test_move_batch_stopped(ctx: Context) -> None:
    """What is in the way of one page of many stops the move just there, at whichever place; the others stay."""
    last_of_table = TABLE - max(FIRST, TO) - 1
    for place in (0, 1, last_of_table, last_of_table + 1, COUNT - 1):
        for what in ("a hole", "a page at the destination", "a pinned page", "a page shared with a child"):
            src, dst = two_tables(ctx)
            src.fill(FIRST, COUNT)
            number, block = obstacles(ctx, src, dst, place)[what]
            with promise("MV-33", f"{what}, at {place}"), block:
                result = (0, COUNT * PAGE_SIZE)
                try:
                    ctx.uffd.move(dst.page(TO).start, src.page(FIRST).start, COUNT * PAGE_SIZE)
                except UffdError as error:
                    result = (error.errno or 0, error.output or 0)
                wanted = (EAGAIN, place * PAGE_SIZE) if place else (number, -number)
                expect(name(result), name(wanted), "errno and move of UFFDIO_MOVE")
                at_dst, at_src = Pagemap.have(dst.range, PM_PRESENT), Pagemap.have(src.range, PM_PRESENT)
                found = page_numbers(page - TO for page in range(2 * TABLE) if at_dst[page])
                taken = {place} if number == EEXIST else set[int]()
                expect(found, page_numbers({*range(place), *taken}), "pages at the destination")
                found = page_numbers(page - FIRST for page in range(2 * TABLE) if at_src[page])
                stayed = set(range(place, COUNT)) - ({place} if number == ENOENT else set())
                expect(found, page_numbers(stayed), "pages at the source")
                src.pattern.verify(dst.page(TO).start - FIRST * PAGE_SIZE, FIRST, place)
                for first, count in (FIRST + place + 1, COUNT - place - 1), (FIRST + place, int(number != ENOENT)):
                    src.expect_pattern_of(src, first, count)
            ctx.uffd.unregister(dst.range)
            for area in (src, dst):
                advise(area.range, Advice.DONTNEED)


def name(result: tuple[int, int]) -> tuple[str, object]:
    """Name the errno and the output field of a request."""
    number, output = result
    return errorcode.get(number, "success"), errno_name(output) if output < 0 else output


@uffd_case("move-twice", mem=(ANON,), features=MOVE, needs=("swap",), pages=4, rows=("MV-01",), kind=Kind.DETAIL)
def test_move_twice(ctx: Context) -> None:
    """Pages that move on, and back, are the same pages with the same bytes, and can be shared and swapped then."""
    src, between, last = ctx.src, ctx.allocate(), ctx.allocate()
    keep_small(src.range)
    for page in (0, 1, 3):
        src.fill(page, 1)
    peek(src.page(2).start)
    swap_out(src.page(3))
    frames = [entry & PFN for entry in Pagemap.entries(src.range)]
    for area in (src, between, last):
        ctx.uffd.register(area.range, MISSING)
    at = src
    for to in (between, last, src, last):
        ctx.uffd.move(to.start, at.start, to.range.len)
        at, left = to, at
        entries = Pagemap.entries(at.range)
        expect([entry & PFN for entry in entries], frames, "frames and places in swap of the pages")
        expect([bool(entry & PM_SWAP) for entry in entries], [False, False, False, True], "whether pages are in swap")
        expect(any(Pagemap.filled(left.range)), False, "whether any page is left behind")

    def look(_: object = None) -> None:
        for page in (0, 1, 3):
            src.pattern.verify(at.start, page, 1)
        expect_bytes(at.page(2), 0, "the zero page")

    def write_in_child(_: object) -> None:
        look()
        ctx.uffd.close()
        for page in range(4):
            poke(at.page(page).start, NEW)

    with promise("MV-01", "shared with a child"), Child(write_in_child):
        pass
    undisturbed(ctx.uffd, look)
    with promise("MV-01", "swapped out"):
        swap_out(at.page(0, 2))
        undisturbed(ctx.uffd, look)


@uffd_case(
    "move-huge-twice",
    mem=(ANON,),
    features=MOVE,
    needs=("thp", "swap"),
    pages=1,
    rows=("MV-19",),
    kind=Kind.DETAIL,
)
def test_move_huge_twice(ctx: Context) -> None:
    """A huge page that moves on stays in one piece; then a part of it moves on in turn, and can be swapped out."""
    src = huge_area(ctx)
    between, last = ctx.allocate(src.nr_pages), ctx.allocate(src.nr_pages)
    for area in (between, last):
        advise(area.range, Advice.HUGEPAGE)
        ctx.uffd.register(area.range, MISSING)
    ctx.uffd.move(between.start, src.start, src.range.len)
    ctx.uffd.move(last.start, between.start, src.range.len)
    expect(pmd_mapped(last.range), src.range.len, "bytes mapped by PMD where the page is")
    ctx.uffd.move(between.page(5).start, last.page(5).start, 3 * PAGE_SIZE)
    Pagemap.expect_present(between, 5, 6, 7)
    Pagemap.expect_present(src)
    gone = {5, 6, 7}
    Pagemap.expect_present(last, *sorted(set(range(src.nr_pages)) - gone))
    swap_out(between.page(5, 3))
    undisturbed(ctx.uffd, lambda: src.pattern.verify(between.start, 5, 3, write_back=True))
    undisturbed(ctx.uffd, lambda: src.pattern.verify(last.start, 0, 5, write_back=True))
    undisturbed(ctx.uffd, lambda: src.pattern.verify(last.start, 8, src.nr_pages - 8, write_back=True))


@uffd_case(
    "move-locked-counts",
    mem=(ANON,),
    features=MOVE,
    needs=("swap",),
    pages=6,
    rows=("MV-10",),
    kind=Kind.DETAIL,
)
def test_move_locked_counts(ctx: Context) -> None:
    """Locked pages that move are locked where they arrive, counted once, and can be swapped out when unlocked."""
    src, dst = ctx.src, ctx.dst
    for area in (src, dst):
        keep_small(area.range)
        try:
            syscalls.call("mlock2", area.start, area.range.len, 1)
        except KernelError as error:
            raise Skip(f"mlock2(2): {errno_name(error.errno or 0)}: raise RLIMIT_MEMLOCK (ulimit -l)") from None
    src.fill()
    ctx.uffd.register(dst.range, MISSING)
    before = resident("VmLck")
    ctx.uffd.move(dst.page(1).start, src.page(1).start, 4 * PAGE_SIZE)
    expect(resident("VmLck"), before, "VmLck, in pages, after UFFDIO_MOVE")
    locked = [smaps_bytes(area.range, "Locked") // PAGE_SIZE for area in (src, dst)]
    expect(locked, [2, 4], "pages locked at the source and at the destination (smaps)")
    Pagemap.expect_present(dst, 1, 2, 3, 4)
    for area in (src, dst):
        syscalls.call("munlock", area.start, area.range.len)
    expect(resident("VmLck"), before - 2 * src.nr_pages, "VmLck, in pages, when both are unlocked")
    for where in (dst.page(1, 4), src.page(0), src.page(5)):
        swap_out(where)
    undisturbed(ctx.uffd, lambda: src.pattern.verify(dst.start, 1, 4))
    for page in (0, 5):
        src.expect_pattern_of(src, page, 1)


SPINS = Defect(
    id="D-MV-32",
    summary="UFFDIO_MOVE of a part of a transparent huge page to which somebody has a reference, as by vmsplice(2), "
    "spins in the kernel until that is given back",
    kernels="6.12.117, 6.18.15; not 6.18.44",
    advice="Use MADV_NOHUGEPAGE on a source of which pages may be spliced.",
    shows=r"UFFDIO_MOVE did not return before the page was given back",
)


@uffd_case(
    "move-huge-spliced", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-32",), kind=Kind.VERSION,
    defect=SPINS,
)  # fmt: skip
def test_move_huge_spliced(ctx: Context) -> None:
    """A part of a huge page to which a pipe has a reference cannot be moved: the kernel says so at once."""
    src = huge_area(ctx)
    dst = ctx.allocate(src.nr_pages)
    advise(dst.range, Advice.HUGEPAGE)
    ctx.uffd.register(dst.range, MISSING)

    def refused() -> None:
        with refuses(EBUSY):
            ctx.uffd.move(dst.page(5).start, src.page(5).start, 3 * PAGE_SIZE)

    reader, writer = os.pipe2(os.O_CLOEXEC)
    vector = ffi.new("uint64_t[]", [src.page(7).start, 16])
    syscalls.call("vmsplice", writer, int(ffi.cast("uintptr_t", vector)), 1, 0)
    with mended(ctx.uffd), promise("MV-32"), Waiter(refused) as waiter:
        eventually(lambda: waiter.done or waiter.cpu_time > 0.5, "UFFDIO_MOVE to return or to spin")
        spins = not waiter.done
        for fd in (reader, writer):
            os.close(fd)
        if spins:
            with suppress(AssertionError):  # it has moved the pages after all
                waiter.result()
            raise AssertionError("expected EBUSY; UFFDIO_MOVE did not return before the page was given back")
    Pagemap.expect_present(dst)
    src.expect_pattern_of(src)
    with promise("MV-32", "given back"):
        ctx.uffd.move(dst.page(5).start, src.page(5).start, 3 * PAGE_SIZE)
    src.pattern.verify(dst.start, 5, 3)
