# SPDX-License-Identifier: GPL-2.0-only
"""What write protection survives: pages dropped and removed, mprotect(2), mremap(2)."""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import ENOENT
from signal import SIGSEGV

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, MISSING, NEW, PAGE_SIZE, PROT_NONE, PROT_READ, PROT_WRITE, SHARED, SHMEM, SHMEM_PRIVATE, TRAPPED, WP,
    WRITEPROTECT, Advice, Area, Context, Feature, Pagemap, Remapped, Trap, Uffd, Waiter, advise, expect, expect_free,
    expect_trapped, faulting, filled, huge_area, mend, pmd_size, poke, promise, protect, refuses, registered_for_wp,
    remap, signals, small_area, swap_out, syscalls, touch_trapped,
)  # fmt: skip


# ---- pages dropped and removed -------------------------------------------------------------------------------------


@uffd_case("writeprotect-dontneed", mem=ALL, features=WRITEPROTECT, pages=2, spare_hugepages=2, rows=("WP-15",))
def test_writeprotect_dontneed(ctx: Context) -> None:
    """MADV_DONTNEED drops the protection of anonymous memory with the page; other memory stays protected."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.range)
    kept = {1} if ctx.mem is ANON else {0, 1}
    for times in ("once", "twice"):
        advise(area.page(0), Advice.DONTNEED)
        Pagemap.expect_protected(area, kept, f"after dropping page 0 {times}")
    (expect_free if ctx.mem is ANON else expect_trapped)(ctx.uffd, area, 0)
    expect_trapped(ctx.uffd, area, 1)
    mend(ctx, area, 1)
    area.expect_pattern_of(area, 1, 1)
    if ctx.mem.shared:
        mend(ctx, area, 0)
        area.expect_pattern_of(area, 0, 1)
    else:
        if ctx.mem is not ANON:
            poke(area.start, bytes(len(NEW)))
        area.expect_zero(0, 1)


@uffd_case(
    "writeprotect-dontneed-missing",
    mem=(ANON,),
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED,
    pages=2,
    rows=("WP-12", "WP-15"),
)
def test_writeprotect_dontneed_missing(ctx: Context) -> None:
    """MADV_DONTNEED also drops the protection of an anonymous page that is not there."""
    area = ctx.dst
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    advise(area.page(0), Advice.DONTNEED)
    Pagemap.expect_protected(area, {1}, "after dropping page 0")
    expect_free(ctx.uffd, area, 0)
    expect_trapped(ctx.uffd, area, 1)


@uffd_case(
    "writeprotect-dontneed-swapped",
    mem=(SHMEM_PRIVATE,),
    features=WRITEPROTECT,
    needs=("swap",),
    pages=2,
    rows=("WP-15", "WP-23"),
    kind=Kind.DETAIL,
)
def test_writeprotect_dontneed_swapped(ctx: Context) -> None:
    """MADV_DONTNEED of a private page that is swapped out leaves its place in the file's mapping protected."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0))
    swap_out(area.range)
    advise(area.range, Advice.DONTNEED)
    Pagemap.expect_protected(area, {0}, "after dropping both pages")
    expect_free(ctx.uffd, area, 1)
    expect_trapped(ctx.uffd, area, 0)


@uffd_case(
    "writeprotect-dontneed-zeropage",
    mem=(SHMEM_PRIVATE,),
    features=WRITEPROTECT,
    pages=2,
    rows=("WP-15",),
    kind=Kind.DETAIL,
)
def test_writeprotect_dontneed_zeropage(ctx: Context) -> None:
    """MADV_DONTNEED of what UFFDIO_ZEROPAGE has put into a private mapping of a file leaves its place protected."""
    area = ctx.dst
    ctx.uffd.register(area.range, MISSING | WP)
    ctx.uffd.zeropage(area.range)
    ctx.uffd.writeprotect(area.page(0))
    advise(area.range, Advice.DONTNEED)
    Pagemap.expect_protected(area, {0}, "after dropping both pages")


KEPT_BY_REMOVE = Defect(
    id="D-WP-16",
    summary="MADV_REMOVE leaves the pages that it drops protected: the next write to each is trapped",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="un-protect a range of shared memory after removing it, or expect one more write-protect fault a page",
    shows=r"after removing page 1: .* on exactly these pages: 0, got 0-1;",
)


@uffd_case("writeprotect-remove", mem=SHARED, features=WRITEPROTECT, pages=2, rows=("WP-16",), defect=KEPT_BY_REMOVE)
def test_writeprotect_remove(ctx: Context) -> None:
    """MADV_REMOVE drops the protection of shared memory with its pages."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.range)
    advise(area.page(1), Advice.REMOVE)
    Pagemap.expect_protected(area, {0}, "after removing page 1")


FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2


@uffd_case("writeprotect-punch", mem=SHARED, features=WRITEPROTECT, pages=2, rows=("WP-16",), kind=Kind.DETAIL)
def test_writeprotect_punch(ctx: Context) -> None:
    """A page removed from its file is zero; while it shows as protected a write to it is trapped, else it is free."""
    area, fd = filled(ctx), ctx.dst.fd or 0
    size, mode = ctx.page_size, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

    def truncate() -> None:
        os.ftruncate(fd, size)
        os.ftruncate(fd, 2 * size)

    removals: dict[str, Callable[[], object]] = {
        "MADV_REMOVE": lambda: advise(area.page(1), Advice.REMOVE),
        "FALLOC_FL_PUNCH_HOLE": lambda: syscalls.call("fallocate", fd, mode, size, size),
        "ftruncate": truncate,
    }
    for what, remove in removals.items():
        area.fill()
        ctx.uffd.writeprotect(area.range)
        with promise("WP-16", what):
            remove()
            kept = Pagemap.uffd_wp(area.page(1).start)
            Pagemap.expect_protected(area, {0, 1} if kept else {0}, "after removing page 1")
            (expect_trapped if kept else expect_free)(ctx.uffd, area, 1)
            poke(area.page(1).start, bytes(len(NEW)))
            area.expect_zero(1, 1)
            area.expect_pattern_of(area, 0, 1)
        ctx.uffd.unprotect(area.range)


# ---- mprotect ------------------------------------------------------------------------------------------------------


@uffd_case(
    "writeprotect-mprotect", mem=ALL, features=WRITEPROTECT, pages=2, rows=("WP-20",), bugs=(32,), kind=Kind.DETAIL
)
def test_writeprotect_mprotect(ctx: Context) -> None:
    """mprotect(2) comes first, with SIGSEGV and no message, and leaves the protection underneath as it was."""
    area = filled(ctx)
    for prot, name in ((PROT_READ, "PROT_READ"), (PROT_NONE, "PROT_NONE")):
        ctx.uffd.writeprotect(area.page(0))
        with promise("WP-20", name):
            protect(area.range, prot)
            Pagemap.expect_protected(area, {0}, "after mprotect")
            observed = signals(ctx.uffd, area.range, area.page_size, write=True)
            expect(observed, [SIGSEGV] * 2, "signals of a write to each page")
            protect(area.range, PROT_READ | PROT_WRITE)
            Pagemap.expect_protected(area, {0}, "after mprotect back")
            expect_free(ctx.uffd, area, 1)
            expect_trapped(ctx.uffd, area, 0)
            mend(ctx, area, 0)
            area.expect_pattern_of(area)


@uffd_case(
    "writeprotect-mprotect-meanwhile", mem=ALL, features=WRITEPROTECT, pages=1, rows=("WP-21",), kind=Kind.DETAIL
)
def test_writeprotect_mprotect_meanwhile(ctx: Context) -> None:
    """A writer that waits while its page is made read-only by mprotect(2) gets SIGSEGV when it is un-protected."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.range)
    traps: list[Trap | None] = []

    def write() -> None:
        traps.extend(touch_trapped(area.range, area.page_size, write=True))

    with faulting(ctx.uffd, area.start, call=write, flags=TRAPPED):
        protect(area.range, PROT_READ)
        ctx.uffd.unprotect(area.range)
    expect([trap.signo if trap else None for trap in traps], [SIGSEGV], "signals of the write")
    ctx.uffd.expect_no_message()
    area.expect_pattern_of(area)


# ---- mremap --------------------------------------------------------------------------------------------------------


@uffd_case("writeprotect-mremap", mem=ALL, features=WRITEPROTECT, pages=3, rows=("WP-27",), bugs=(1,), kind=Kind.DETAIL)
def test_writeprotect_mremap(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_REMAP what mremap(2) moves is neither protected nor registered any more."""
    area, moved = ctx.dst, ctx.allocate()
    area.fill(0, 2)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(0))
    ctx.uffd.writeprotect(area.page(2))
    remap(area.range, to=moved.start)
    Pagemap.expect_protected(moved, (), "after mremap")
    expect(registered_for_wp(moved.range), False, "whether the new place is registered")
    with promise("WP-27", "new place"), refuses(ENOENT):
        ctx.uffd.writeprotect(moved.range)
    expect_free(ctx.uffd, moved, 0, 1, 2)
    moved.expect_pattern_of(area, 0, 2)
    moved.expect_zero(2, 1)


def move_with_event(uffd: Uffd, area: Area, moved: Area) -> None:
    """Move an area with mremap(2), reading the event for which that waits."""
    with Waiter(lambda: remap(area.range, to=moved.start)):
        expect(uffd.wait(), Remapped(area.start, moved.start, area.range.len), "the event")


@uffd_case(
    "writeprotect-mremap-event",
    mem=ALL,
    features=WRITEPROTECT | Feature.WP_UNPOPULATED | Feature.EVENT_REMAP,
    pages=3,
    rows=("WP-28",),
    kind=Kind.DETAIL,
)
def test_writeprotect_mremap_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_REMAP what mremap(2) moves stays protected, and registered."""
    area, moved = ctx.dst, ctx.allocate()
    area.fill(0, 2)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(0))
    ctx.uffd.writeprotect(area.page(2))
    move_with_event(ctx.uffd, area, moved)
    Pagemap.expect_protected(moved, {0, 2}, "after mremap")
    expect(registered_for_wp(moved.range), True, "whether the new place is registered")
    expect_trapped(ctx.uffd, moved, 0, 2)
    expect_free(ctx.uffd, moved, 1)
    mend(ctx, moved, 0)
    poke(moved.page(2).start, bytes(len(NEW)))
    moved.expect_pattern_of(area, 0, 2)
    moved.expect_zero(2, 1)


@uffd_case(
    "writeprotect-mremap-tables",
    mem=(ANON, SHMEM),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-27",),
    bugs=(1,),
    kind=Kind.DETAIL,
)
def test_writeprotect_mremap_tables(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_REMAP the protection is gone when mremap(2) moves whole page tables and huge pages."""
    for kind in (small_area, huge_area):
        area, moved = kind(ctx), ctx.allocate(pmd_size() // PAGE_SIZE)
        ctx.uffd.register(area.range, WP)
        ctx.uffd.writeprotect(area.range)
        Pagemap.expect_protected(area, range(area.nr_pages), "before mremap")
        remap(area.range, to=moved.start)
        with promise("WP-27", kind.__name__):
            Pagemap.expect_protected(moved, (), "after mremap")
            expect_free(ctx.uffd, moved, 0, moved.nr_pages - 1)
            moved.expect_pattern_of(area)


@uffd_case(
    "writeprotect-mremap-tables-event",
    mem=(ANON, SHMEM),
    features=WRITEPROTECT | Feature.EVENT_REMAP,
    needs=("thp",),
    pages=1,
    rows=("WP-28",),
    kind=Kind.DETAIL,
)
def test_writeprotect_mremap_tables_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_REMAP the protection comes along when whole page tables and huge pages are moved."""
    for kind in (small_area, huge_area):
        area, moved = kind(ctx), ctx.allocate(pmd_size() // PAGE_SIZE)
        ctx.uffd.register(area.range, WP)
        ctx.uffd.writeprotect(area.range)
        move_with_event(ctx.uffd, area, moved)
        with promise("WP-28", kind.__name__):
            Pagemap.expect_protected(moved, range(moved.nr_pages), "after mremap")
            moved.expect_pattern_of(area)
            expect_trapped(ctx.uffd, moved, 0, moved.nr_pages - 1)
