# SPDX-License-Identifier: GPL-2.0-only
"""Read-write protection of pages that are written to swap, and read back."""

from __future__ import annotations

from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, ANON, NEW, RWP, SHMEM, SHMEM_PRIVATE, SYNC_RWP, UNREGISTERED, Advice, Channel, Child, Context,
    Pagemap, advise, eventually, expect, expect_modes, expect_rwp_free, expect_rwp_trapped, expect_sweep, huge_area,
    own_swap, page_out, peek, poke, promise, resident, rwp_filled, rwp_protected, rwp_trapped, smaps_bytes, swap_out,
    uapi, undisturbed,
)  # fmt: skip

NOT_SHARED = (ANON, SHMEM_PRIVATE)
"""Private memory that can be swapped out; each page has an entry of its own then."""


@uffd_case(
    "rwprotect-swap", mem=NOT_SHARED, features=SYNC_RWP, needs=("swap",), pages=6, rows=("RW-31", "RW-32", "RW-14")
)
def test_rwprotect_swap(ctx: Context) -> None:
    """Swapped-out pages stay protected, and trap when they are read back; others of the range stay free."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    uffd.rwprotect(area.page(1, 3))
    swap_out(area.range)
    with promise("RW-31", "swapped out"):
        uffd.expect_no_message()
        Pagemap.expect_protected(area, {1, 2, 3}, "of pages swapped out")
        expect(Pagemap.have(area.range, uapi.PM_PRESENT), [False] * 6, "which pages are in memory")
    with promise("RW-31", "read"):
        expect_rwp_trapped(uffd, area, 1)
        Pagemap.expect_protected(area, {2, 3}, "when page 1 was let go")
    with promise("RW-31", "write"), rwp_trapped(uffd, area, 2, write=True):
        uffd.expect_still_asleep(1)
        uffd.resolve(area.page(2))
    with promise("RW-31", "resolved while it waits, and swapped out again"):
        with rwp_trapped(uffd, area, 3) as waiter:
            swap_out(area.page(3))
            Pagemap.expect_uffd_wp(area.page(3).start, True, "while its reader waits")
            uffd.expect_still_asleep(1)
            uffd.resolve(area.page(3))
        expect(waiter.result(), peek(area.page(3).start, len(NEW)), "what the read got")
    expect_rwp_free(uffd, area, 0, 4, 5)
    Pagemap.expect_protected(area, (), "at the end")
    area.expect_pattern_of(area, 0, 2)
    area.expect_pattern_of(area, 3)


@uffd_case("rwprotect-swap-requests", mem=NOT_SHARED, features=SYNC_RWP, needs=("swap",), pages=6, rows=("RW-32",))
def test_rwprotect_swap_requests(ctx: Context) -> None:
    """Pages are protected and resolved while they are swapped out, just those named, and stay swapped out."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    uffd.rwprotect(area.page(0, 2))
    swap_out(area.range)
    with promise("RW-32", "protect"):
        uffd.rwprotect(area.page(2, 2))
        Pagemap.expect_protected(area, {0, 1, 2, 3}, "after protecting pages 2 and 3")
    with promise("RW-32", "resolve"):
        uffd.resolve(area.page(1, 2))
        Pagemap.expect_protected(area, {0, 3}, "after resolving pages 1 and 2")
    expect(Pagemap.have(area.range, uapi.PM_SWAP), [True] * 6, "which pages are in swap")
    uffd.expect_no_message()
    expect_sweep(uffd, area, {0, 3}, AGAINST_ACCESS)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-swap-unregister", mem=NOT_SHARED, features=SYNC_RWP, needs=("swap",), pages=5, rows=("UNR-17",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_swap_unregister(ctx: Context) -> None:
    """Swapped-out pages that are unregistered are free when they are read back; those beside them still trap."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    swap_out(area.range)
    uffd.unregister(area.page(1, 3))
    Pagemap.expect_protected(area, {0, 4}, "after unregistering pages 1 to 3")
    expect_modes(area.range, RWP, UNREGISTERED, UNREGISTERED, UNREGISTERED, RWP)
    expect_rwp_free(uffd, area, 1, 2, 3)
    expect_rwp_trapped(uffd, area, 0, 4)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-thp-swap", mem=(ANON,), features=SYNC_RWP, needs=("swap", "thp"), pages=1, rows=("RW-31", "RW-32"),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_thp_swap(ctx: Context) -> None:
    """A transparent huge page protected whole is in swap, and comes back, with each of its pages protected."""
    area, uffd = rwp_protected(ctx, area=huge_area(ctx)), ctx.uffd
    swap_out(area.range)
    Pagemap.expect_protected(area, range(area.nr_pages), "of pages swapped out")
    uffd.resolve(area.page(7, 2))
    expect_sweep(uffd, area, set(range(area.nr_pages)) - {7, 8}, AGAINST_ACCESS)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-swapoff", mem=NOT_SHARED, features=SYNC_RWP, needs=("cap_sys_admin",), pages=4, rows=("RW-33",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_swapoff(ctx: Context) -> None:
    """Pages that are read back because their swap space goes away are as protected as before."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    uffd.rwprotect(area.page(1, 2))
    with own_swap() as swap:
        page_out(area.range, lambda: smaps_bytes(area.range, "Swap") == area.range.len)
        Pagemap.expect_protected(area, {1, 2}, "of pages swapped out")
        with promise("RW-33", "swapoff"):
            swap.off()
            expect(smaps_bytes(area.range, "Swap"), 0, "bytes in swap, after swapoff")
            expect(Pagemap.have(area.range, uapi.PM_PRESENT), [True] * 4, "which pages are in memory")
            Pagemap.expect_protected(area, {1, 2}, "after swapoff")
            uffd.expect_no_message()
            expect_sweep(uffd, area, {1, 2}, AGAINST_ACCESS)
    area.expect_pattern_of(area)


@uffd_case("rwprotect-swap-cow", mem=(ANON,), features=SYNC_RWP, needs=("swap",), pages=4, rows=("RW-34", "RW-17"))
def test_rwprotect_swap_cow(ctx: Context) -> None:
    """A write to a protected page that is in swap, and is a child's, too, traps; it then goes to a copy."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    uffd.rwprotect(area.page(0, 3))

    def child(channel: Channel) -> None:
        Pagemap.expect_protected(area, (), "in the child")
        channel.send()
        channel.receive()
        area.expect_pattern_of(area)

    swap_out(area.range)
    with Child(child) as process:
        process.receive()
        Pagemap.expect_protected(area, {0, 1, 2}, "in the parent, after fork")
        with rwp_trapped(uffd, area, 1, write=True):
            Pagemap.expect_uffd_wp(area.page(1).start, True, "while the writer waits")
            uffd.expect_still_asleep(1)
            uffd.resolve(area.page(1))
        with promise("RW-34", "read"):
            expect_rwp_trapped(uffd, area, 0)
        undisturbed(uffd, partial(poke, area.page(0).start, NEW))
        undisturbed(uffd, partial(poke, area.page(3).start, NEW))
        process.send()
    uffd.expect_no_message()
    Pagemap.expect_protected(area, {2}, "in the parent, at the end")
    expect_rwp_trapped(uffd, area, 2)
    expect([peek(area.page(page).start, len(NEW)) for page in (0, 1, 3)], [NEW] * 3, "what the parent wrote")
    area.expect_pattern_of(area, 2, 1)


@uffd_case(
    "rwprotect-swap-counts", mem=(ANON,), features=SYNC_RWP, needs=("swap",), pages=16, rows=("RW-58", "RW-71"),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_swap_counts(ctx: Context) -> None:
    """Protecting, resolving and reading back pages in swap counts each page once, in memory or in swap."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    swap_out(area.range)
    rss, swap = resident("RssAnon"), resident("VmSwap")
    uffd.rwprotect(area.range)
    uffd.resolve(area.page(12, 4))
    expect(smaps_bytes(area.range, "Swap"), area.range.len, "bytes of the area in swap")
    expect(resident("VmSwap"), swap, "pages in swap (VmSwap), after protecting them")
    expect_sweep(uffd, area, range(12), AGAINST_ACCESS, write=False)
    expect(smaps_bytes(area.range, "Swap"), 0, "bytes of the area in swap, when all were read")
    expect(smaps_bytes(area.range, "Rss"), area.range.len, "bytes of the area in memory, when all were read")
    expect(swap - resident("VmSwap"), 16, "pages that left swap (VmSwap)")
    expect(resident("RssAnon") - rss >= 16, True, "whether RssAnon has grown by all of them")
    area.expect_pattern_of(area)


# ---- shared memory -------------------------------------------------------------------------------------------------

LOST_IN_RECLAIM = Defect(
    id="D-RW-35",
    summary="shared memory that is swapped out loses its protection against access: the next one is not trapped",
    kernels="7.3.4",
    advice="keep watched shared memory out of swap (mlock, no swap), or watch it for minor faults as well",
    shows=r"of pages swapped out: expected PM_UFFD_WP in pagemap on exactly these pages: 1-2, got none",
)


@uffd_case(
    "rwprotect-swap-shared",
    mem=(SHMEM,),
    features=SYNC_RWP,
    needs=("swap",),
    pages=4,
    rows=("RW-35",),
    defect=LOST_IN_RECLAIM,
)
def test_rwprotect_swap_shared(ctx: Context) -> None:
    """Pages of shared memory stay protected when they are swapped out, which takes them out of the mapping."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    uffd.rwprotect(area.page(1, 2))
    Pagemap.expect_protected(area, {1, 2}, "of pages in memory")

    def gone() -> bool:
        advise(area.range, Advice.PAGEOUT)
        return not any(Pagemap.have(area.range, uapi.PM_PRESENT))

    eventually(gone, "MADV_PAGEOUT to take the pages out of the mapping")
    Pagemap.expect_protected(area, {1, 2}, "of pages swapped out")
    expect_sweep(uffd, area, {1, 2}, AGAINST_ACCESS)
    area.expect_pattern_of(area)
