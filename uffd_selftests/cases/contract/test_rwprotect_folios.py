# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_RWPROTECT of parts of large folios, of several sizes, each of their pages looked at."""

from __future__ import annotations

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, ANON, ASYNC_RWP, FOLIOS, MISSING, MOVE, RWP, SHMEM, SMALL_FOLIOS, SYNC_RWP, Advice, Context,
    Feature, Pagemap, advise, expect_sweep, folio_async, folio_forked, folio_forked_event, folio_migrated,
    folio_mprotected, folio_parts, folio_remapped, folio_remapped_event, folio_swapped, folio_unregistered,
    folio_zapped, folios, halves_protected, promise,
)  # fmt: skip


@uffd_case(
    "rwprotect-folio-parts",
    mem=(ANON,),
    variants=FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-43", "RW-44"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_parts(ctx: Context, variant: str) -> None:
    """Of folios protected in part exactly the pages named are protected, and trap."""
    folio_parts(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-parts-shared",
    mem=(SHMEM,),
    variants=SMALL_FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-43", "RW-44"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_parts_shared(ctx: Context, variant: str) -> None:
    """Of shared folios protected in part exactly the pages named are protected, and trap."""
    folio_parts(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-dontneed",
    mem=(ANON,),
    variants=FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-28", "RW-44"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_dontneed(ctx: Context, variant: str) -> None:
    """Of folios protected in part pages that are dropped leave the others' protection as it is."""
    folio_zapped(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-dontneed-shared",
    mem=(SHMEM,),
    variants=SMALL_FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-28", "RW-44"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_dontneed_shared(ctx: Context, variant: str) -> None:
    """Of shared folios protected in part pages that are dropped leave the others' protection as it is."""
    folio_zapped(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-fork",
    mem=(ANON,),
    variants=FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-17", "RW-44", "RW-52"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_fork(ctx: Context, variant: str) -> None:
    """Of folios protected in part a child without a handle of its own is free, and its parent is not."""
    folio_forked(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-fork-shared",
    mem=(SHMEM,),
    variants=SMALL_FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-17", "RW-44", "RW-52"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_fork_shared(ctx: Context, variant: str) -> None:
    """Of shared folios protected in part a child without a handle of its own is free, and its parent is not."""
    folio_forked(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-fork-event",
    mem=(ANON,),
    variants=FOLIOS,
    features=SYNC_RWP | Feature.EVENT_FORK,
    needs=("thp",),
    pages=1,
    rows=("RW-44", "RW-53"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_fork_event(ctx: Context, variant: str) -> None:
    """Of folios protected in part a child with a handle of its own has its parent's protected pages."""
    folio_forked_event(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-fork-event-shared",
    mem=(SHMEM,),
    variants=SMALL_FOLIOS,
    features=SYNC_RWP | Feature.EVENT_FORK,
    needs=("thp",),
    pages=1,
    rows=("RW-44", "RW-53"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_fork_event_shared(ctx: Context, variant: str) -> None:
    """Of shared folios protected in part a child with a handle of its own has its parent's protected pages."""
    folio_forked_event(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-swap",
    mem=(ANON,),
    variants=FOLIOS,
    features=SYNC_RWP,
    needs=("thp", "swap"),
    pages=1,
    rows=("RW-31", "RW-32"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_swap(ctx: Context, variant: str) -> None:
    """Of folios protected in part each page is in swap, and comes back, as it was."""
    folio_swapped(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-mremap",
    mem=(ANON,),
    variants=FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-44", "RW-56"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_mremap(ctx: Context, variant: str) -> None:
    """Of folios protected in part what mremap(2) moves, without its event, is free, the rest as it was."""
    folio_remapped(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-mremap-shared",
    mem=(SHMEM,),
    variants=SMALL_FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-44", "RW-56"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_mremap_shared(ctx: Context, variant: str) -> None:
    """Of shared folios protected in part what mremap(2) moves, without its event, is free, the rest as it was."""
    folio_remapped(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-mremap-event",
    mem=(ANON,),
    variants=FOLIOS,
    features=SYNC_RWP | Feature.EVENT_REMAP,
    needs=("thp",),
    pages=1,
    rows=("RW-44", "RW-57"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_mremap_event(ctx: Context, variant: str) -> None:
    """Of folios protected in part each page that mremap(2) moves, with its event, is as it was."""
    folio_remapped_event(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-mremap-event-shared",
    mem=(SHMEM,),
    variants=SMALL_FOLIOS,
    features=SYNC_RWP | Feature.EVENT_REMAP,
    needs=("thp",),
    pages=1,
    rows=("RW-44", "RW-57"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_mremap_event_shared(ctx: Context, variant: str) -> None:
    """Of shared folios protected in part each page that mremap(2) moves, with its event, is as it was."""
    folio_remapped_event(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-mprotect",
    mem=(ANON,),
    variants=FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-44", "RW-48"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_mprotect(ctx: Context, variant: str) -> None:
    """Of folios protected in part each is as it was when mprotect(2) took access away and gave it back."""
    folio_mprotected(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-mprotect-shared",
    mem=(SHMEM,),
    variants=SMALL_FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-44", "RW-48"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_mprotect_shared(ctx: Context, variant: str) -> None:
    """Of shared folios protected in part each is as it was when mprotect(2) took access away and gave it back."""
    folio_mprotected(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-unregister",
    mem=(ANON,),
    variants=FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-44", "UNR-16", "UNR-17"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_unregister(ctx: Context, variant: str) -> None:
    """Of folios protected in part what is unregistered is free, and the rest is as it was."""
    folio_unregistered(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-unregister-shared",
    mem=(SHMEM,),
    variants=SMALL_FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-44", "UNR-16", "UNR-17"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_unregister_shared(ctx: Context, variant: str) -> None:
    """Of shared folios protected in part what is unregistered is free, and the rest is as it was."""
    folio_unregistered(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-migrated",
    mem=(ANON,),
    variants=FOLIOS,
    features=SYNC_RWP,
    needs=("thp", "cap_sys_admin"),
    pages=1,
    rows=("RW-36", "RW-44"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_migrated(ctx: Context, variant: str) -> None:
    """Of folios protected in part each page is as it was in other memory."""
    folio_migrated(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-migrated-shared",
    mem=(SHMEM,),
    variants=SMALL_FOLIOS,
    features=SYNC_RWP,
    needs=("thp", "cap_sys_admin"),
    pages=1,
    rows=("RW-36", "RW-44"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_migrated_shared(ctx: Context, variant: str) -> None:
    """Of shared folios protected in part each page is as it was in other memory."""
    folio_migrated(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-async",
    mem=(ANON,),
    variants=FOLIOS,
    features=ASYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-77", "RW-80"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_async(ctx: Context, variant: str) -> None:
    """Of folios protected in part, without anybody being told, an access frees just its page."""
    folio_async(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-async-shared",
    mem=(SHMEM,),
    variants=SMALL_FOLIOS,
    features=ASYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-77", "RW-80"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_async_shared(ctx: Context, variant: str) -> None:
    """Of shared folios protected in part, without anybody being told, an access frees just its page."""
    folio_async(ctx, folios(ctx, variant), AGAINST_ACCESS)


@uffd_case(
    "rwprotect-folio-uffd-move",
    mem=(ANON,),
    variants=FOLIOS,
    features=SYNC_RWP | MOVE,
    needs=("thp",),
    pages=1,
    rows=("MV-29", "MV-30", "RW-44"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_uffd_move(ctx: Context, variant: str) -> None:
    """Of folios protected in part UFFDIO_MOVE takes a part: free where nothing is watched, else all of it protected."""
    for mode in (MISSING, MISSING | RWP):
        area, uffd = folios(ctx, variant), ctx.uffd
        place = ctx.allocate(area.nr_pages)
        advise(place.range, Advice.NOHUGEPAGE)
        pages = halves_protected(ctx, area, AGAINST_ACCESS)
        uffd.register(place.range, mode)
        first, count = area.nr_pages // 4 + area.nr_pages // 8, area.nr_pages // 2
        uffd.move(place.page(first).start, area.page(first).start, count * area.page_size)
        taken = set(range(first, first + count))
        with promise("MV-30" if mode is MISSING else "MV-29"):
            Pagemap.expect_protected(place, taken if RWP in mode else (), "at the new place")
            Pagemap.expect_present(place, *taken)
            Pagemap.expect_present(area, *set(range(area.nr_pages)) - taken)
            Pagemap.expect_protected(area, pages - taken, "left behind")
            uffd.zeropage(place.page(0, first))
            uffd.zeropage(place.page(first + count, area.nr_pages - first - count))
            expect_sweep(uffd, place, taken if RWP in mode else (), AGAINST_ACCESS, write=False)
            place.expect_pattern_of(area, first, count)
        uffd.resolve(area.range)
        area.expect_pattern_of(area, 0, first)
        area.expect_pattern_of(area, first + count)
