# SPDX-License-Identifier: GPL-2.0-only
"""Write protection of pages that the kernel takes away behind everybody's back: to swap, or to other memory."""

from __future__ import annotations

from pathlib import Path

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ANON, NOT_HUGETLB, PM_PFN_MASK, PROT_READ, PROT_WRITE, SHMEM, SHMEM_PRIVATE, WP, WRITEPROTECT, Advice, Context,
    Pagemap, advise, declared_sound, eventually, expect, expect_free, expect_trapped, filled, huge_area, mend, own_swap,
    page_out, promise, protect, require_soft_dirty, smaps_bytes, swap_out, uapi, undisturbed,
)  # fmt: skip


@uffd_case(
    "writeprotect-swap", mem=(ANON, SHMEM_PRIVATE), features=WRITEPROTECT, needs=("swap",), pages=5, rows=("WP-23",)
)
def test_writeprotect_swap(ctx: Context) -> None:
    """Swapped-out pages stay protected; pages are protected and un-protected while they are swapped out."""
    area, uffd = filled(ctx), ctx.uffd
    uffd.writeprotect(area.page(0, 3))
    swap_out(area.range)
    Pagemap.expect_protected(area, {0, 1, 2}, "of pages swapped out")
    with promise("WP-23", "read, which swaps in"):
        undisturbed(uffd, lambda: area.expect_pattern_of(area, 0, 1))
        Pagemap.expect_protected(area, {0, 1, 2}, "after a read of page 0")
        expect_trapped(uffd, area, 0)
    with promise("WP-23", "write to a swapped-out page"):
        expect_trapped(uffd, area, 1)
    with promise("WP-23", "un-protected while swapped out"):
        uffd.unprotect(area.page(2))
        Pagemap.expect_protected(area, (), "after un-protecting pages 0 to 2")
        expect_free(uffd, area, 2)
    with promise("WP-23", "protected while swapped out"):
        uffd.writeprotect(area.page(3))
        Pagemap.expect_protected(area, {3}, "after protecting page 3")
        expect_trapped(uffd, area, 3)
    expect_free(uffd, area, 4)
    mend(ctx, area, 0, 1, 3)
    area.expect_pattern_of(area)


@uffd_case(
    "writeprotect-swapoff",
    mem=NOT_HUGETLB,
    features=WRITEPROTECT,
    needs=("cap_sys_admin",),
    pages=3,
    rows=("WP-23",),
)
def test_writeprotect_swapoff(ctx: Context) -> None:
    """Pages that are read back because their swap space goes away are as protected as before."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0, 2))
    with own_swap() as swap:
        page_out(area.range, lambda: smaps_bytes(area.range, "Swap") == area.range.len)
        Pagemap.expect_protected(area, {0, 1}, "of pages swapped out")
        with promise("WP-23", "swapoff"):
            swap.off()
            expect(smaps_bytes(area.range, "Swap"), 0, "bytes in swap, after swapoff")
            Pagemap.expect_protected(area, {0, 1}, "after swapoff")
            undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))
            expect_free(ctx.uffd, area, 2)
            expect_trapped(ctx.uffd, area, 0, 1)
    mend(ctx, area, 0, 1)
    area.expect_pattern_of(area)


@uffd_case(
    "writeprotect-swap-mprotect",
    mem=(ANON, SHMEM_PRIVATE),
    features=WRITEPROTECT,
    needs=("swap",),
    pages=2,
    rows=("WP-20", "WP-23"),
    kind=Kind.DETAIL,
)
def test_writeprotect_swap_mprotect(ctx: Context) -> None:
    """What mprotect(2) does to pages that are swapped out leaves their protection as it was."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0))
    swap_out(area.range)
    for prot in PROT_READ, PROT_READ | PROT_WRITE:
        protect(area.range, prot)
        Pagemap.expect_protected(area, {0}, "after mprotect of pages swapped out")
    expect_free(ctx.uffd, area, 1)
    expect_trapped(ctx.uffd, area, 0)


@uffd_case(
    "writeprotect-migrated",
    mem=NOT_HUGETLB,
    features=WRITEPROTECT,
    needs=("cap_sys_admin",),
    pages=2,
    rows=("WP-07", "WP-08"),
    bugs=(32,),
    kind=Kind.DETAIL,
)
def test_writeprotect_migrated(ctx: Context) -> None:
    """A page that the kernel moves to other memory, which the memory's user never notices, stays protected."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0))
    with declared_sound(area.page(0)) as frame:
        advise(area.page(0), Advice.SOFT_OFFLINE)
    expect(Pagemap.entry(area.start) & PM_PFN_MASK == frame, False, "whether the page is where it was")
    Pagemap.expect_protected(area, {0}, "after MADV_SOFT_OFFLINE")
    area.expect_pattern_of(area)
    expect_free(ctx.uffd, area, 1)
    expect_trapped(ctx.uffd, area, 0)


@uffd_case(
    "writeprotect-thp-migrated",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("cap_sys_admin", "thp"),
    pages=1,
    rows=("WP-24",),
    bugs=(32,),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_migrated(ctx: Context) -> None:
    """A huge page of which the kernel moves one page to other memory, and splits it for that, stays protected."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    with declared_sound(area.page(7)) as frame:
        advise(area.page(7), Advice.SOFT_OFFLINE)
    expect(Pagemap.entry(area.page(7).start) & PM_PFN_MASK == frame, False, "whether the page is where it was")
    Pagemap.expect_protected(area, range(area.nr_pages), "after MADV_SOFT_OFFLINE of page 7")
    area.expect_pattern_of(area)
    expect_trapped(ctx.uffd, area, 7, 8)


@uffd_case("writeprotect-swap-shared", mem=(SHMEM,), features=WRITEPROTECT, needs=("swap",), pages=3, rows=("WP-23",))
def test_writeprotect_swap_shared(ctx: Context) -> None:
    """Pages of shared memory stay protected when they are swapped out, which takes them out of the mapping."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0, 2))

    def gone() -> bool:
        advise(area.range, Advice.PAGEOUT)
        return not any(Pagemap.have(area.range, uapi.PM_PRESENT))

    eventually(gone, "MADV_PAGEOUT to take the pages out of the mapping")
    Pagemap.expect_protected(area, {0, 1}, "of pages swapped out")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area, 0, 1))
    Pagemap.expect_protected(area, {0, 1}, "after a read of page 0")
    expect_trapped(ctx.uffd, area, 0, 1)
    expect_free(ctx.uffd, area, 2)
    mend(ctx, area, 0, 1)
    area.expect_pattern_of(area)


@uffd_case(
    "writeprotect-swap-clear-refs", mem=(ANON, SHMEM_PRIVATE), features=WRITEPROTECT, needs=("swap",), pages=4,
    rows=("WP-23",), kind=Kind.DETAIL,
)  # fmt: skip
def test_writeprotect_swap_clear_refs(ctx: Context) -> None:
    """Swapped-out pages stay protected when soft-dirty tracking begins anew (4 in /proc/PID/clear_refs)."""
    area = filled(ctx)
    require_soft_dirty(area.start)
    ctx.uffd.writeprotect(area.page(1, 2))
    swap_out(area.range)
    Path("/proc/self/clear_refs").write_text("4")
    Pagemap.expect_protected(area, {1, 2}, "after clear_refs, swapped out")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))
    Pagemap.expect_protected(area, {1, 2}, "after reads, which swap in")
    expect_free(ctx.uffd, area, 0, 3)
    expect_trapped(ctx.uffd, area, 1, 2)
