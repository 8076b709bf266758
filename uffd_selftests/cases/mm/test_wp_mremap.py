# SPDX-License-Identifier: GPL-2.0-only
"""uffd-wp-mremap: without UFFD_FEATURE_EVENT_REMAP mremap(2) takes the protection off, whatever the pages are.

The base page, the default huge page and the transparent huge page of a PMD are moved by writeprotect-mremap and
writeprotect-mremap-tables.
"""

from __future__ import annotations

from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ANON, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, NOT_HUGETLB, PAGE_SIZE, SHMEM, UNREGISTERED, WP, WRITEPROTECT, Area,
    Context, Feature, MemType, PagefaultFlag, Pagemap, Range, Remapped, Skip, Uffd, Waiter, default_hugepage_size,
    expect, expect_modes, faulting, folio_settings, folios_of, hugepage_file, hugepage_sizes, mapped, peek, poke, remap,
    swap_out, touch, uapi, undisturbed,
)  # fmt: skip


def move(ctx: Context, area: Area) -> None:
    """Move a wholly protected area with mremap(2), and assert that it keeps its contents and none of the protection."""
    place = ctx.allocate(area.nr_pages)
    Pagemap.expect_protected(area, range(area.nr_pages), "before mremap")
    remap(area.range, to=place.start)
    Pagemap.expect_protected(place, (), "after mremap")
    expect_modes(place.range, UNREGISTERED)
    undisturbed(ctx.uffd, partial(touch, place.range, PAGE_SIZE, write=True))
    place.expect_pattern_of(area)


def protect_all(ctx: Context, area: Area) -> None:
    """Register an area for write protection, and protect it."""
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)


@uffd_case(
    "wp-mremap-swapped",
    mem=NOT_HUGETLB,
    features=WRITEPROTECT,
    needs=("swap", "pagemap"),
    pages=3,
    rows=("WP-27",),
    bugs=(1,),
    kind=Kind.DETAIL,
)
def test_wp_mremap_swapped(ctx: Context) -> None:
    """Pages that are swapped out lose their protection when mremap(2) moves them, and nothing else."""
    ctx.dst.fill()
    protect_all(ctx, ctx.dst)
    swap_out(ctx.dst.range)
    move(ctx, ctx.dst)


@uffd_case(
    "wp-mremap-swapped-event",
    mem=NOT_HUGETLB,
    features=WRITEPROTECT | Feature.EVENT_REMAP,
    needs=("swap", "pagemap"),
    pages=3,
    rows=("WP-28",),
    kind=Kind.DETAIL,
)
def test_wp_mremap_swapped_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_REMAP the protection of pages that are swapped out comes along."""
    area, place = ctx.dst, ctx.allocate()
    area.fill()
    protect_all(ctx, area)
    swap_out(area.range)
    ctx.uffd.unprotect(area.page(2))
    with Waiter(lambda: remap(area.range, to=place.start)):
        expect(ctx.uffd.wait(), Remapped(area.start, place.start, area.range.len), "the event")
    Pagemap.expect_protected(place, {0, 1}, "after mremap")
    expect_modes(place.range, WP)
    undisturbed(ctx.uffd, partial(touch, place.page(2), PAGE_SIZE, write=True))
    with faulting(ctx.uffd, place.start, write=True, flags=PagefaultFlag.WRITE | PagefaultFlag.WP):
        ctx.uffd.unprotect(place.page(0))
    undisturbed(ctx.uffd, lambda: place.expect_pattern_of(area))


# ---- transparent huge pages ----------------------------------------------------------------------------------------


def sizes(mem: MemType) -> tuple[str, ...]:
    """Return the variants of a case that runs with each size of transparent huge page, smallest first."""
    return tuple(f"{size >> 10} kB" for size in sorted(folio_settings(mem))) or ("no size",)


def bytes_of(variant: str) -> int:
    """Return the size that a variant stands for."""
    return int(variant.partition(" ")[0]) << 10


@uffd_case(
    "wp-mremap-thp",
    mem=(ANON,),
    variants=sizes(ANON),
    features=WRITEPROTECT,
    needs=("thp", "pagemap"),
    pages=1,
    rows=("WP-27",),
    bugs=(1,),
    kind=Kind.DETAIL,
)
def test_wp_mremap_thp(ctx: Context, variant: str) -> None:
    """A transparent huge page of any size loses its protection when mremap(2) moves it, and nothing else."""
    area = folios_of(ctx, bytes_of(variant), 1)
    protect_all(ctx, area)
    move(ctx, area)


@uffd_case(
    "wp-mremap-thp-shared",
    mem=(SHMEM,),
    variants=sizes(SHMEM),
    features=WRITEPROTECT,
    needs=("thp", "pagemap"),
    pages=1,
    rows=("WP-27",),
    bugs=(1,),
    kind=Kind.DETAIL,
)
def test_wp_mremap_thp_shared(ctx: Context, variant: str) -> None:
    """A transparent huge page of shared memory, of any size, loses its protection when mremap(2) moves it."""
    area = folios_of(ctx, bytes_of(variant), 1)
    protect_all(ctx, area)
    move(ctx, area)


@uffd_case(
    "wp-mremap-thp-swapped",
    mem=(ANON,),
    variants=sizes(ANON),
    features=WRITEPROTECT,
    needs=("thp", "swap", "pagemap"),
    pages=1,
    rows=("WP-27",),
    bugs=(1,),
    kind=Kind.DETAIL,
)
def test_wp_mremap_thp_swapped(ctx: Context, variant: str) -> None:
    """A transparent huge page of any size, swapped out, loses its protection when mremap(2) moves it."""
    area = folios_of(ctx, bytes_of(variant), 1)
    protect_all(ctx, area)
    swap_out(area.range)
    move(ctx, area)


@uffd_case(
    "wp-mremap-thp-shared-swapped",
    mem=(SHMEM,),
    variants=sizes(SHMEM),
    features=WRITEPROTECT,
    needs=("thp", "swap", "pagemap"),
    pages=1,
    rows=("WP-27",),
    bugs=(1,),
    kind=Kind.DETAIL,
)
def test_wp_mremap_thp_shared_swapped(ctx: Context, variant: str) -> None:
    """A transparent huge page of shared memory, of any size and swapped out, loses its protection likewise."""
    area = folios_of(ctx, bytes_of(variant), 1)
    protect_all(ctx, area)
    swap_out(area.range)
    move(ctx, area)


# ---- huge pages of other sizes -------------------------------------------------------------------------------------

ONE_SIZE = "no other size"
SHARINGS = {"shared": MAP_SHARED, "private": MAP_PRIVATE}


def other_hugepages() -> tuple[str, ...]:
    """Return the variants of a case that runs with huge pages of each size but the default one."""
    others = [size for size in hugepage_sizes() if size != default_hugepage_size()]
    return tuple(f"{size >> 10} kB, {sharing}" for size in others for sharing in SHARINGS) or (ONE_SIZE,)


def protected_in(where: Range) -> int:
    """Return how many base pages of a range are marked as protected."""
    return sum(Pagemap.have(where, uapi.PM_UFFD_WP))


@uffd_case(
    "wp-mremap-hugetlb",
    variants=other_hugepages(),
    features=WRITEPROTECT,
    needs=("hugetlb", "pagemap"),
    rows=("WP-27",),
    bugs=(1,),
    kind=Kind.DETAIL,
)
def test_wp_mremap_hugetlb(variant: str) -> None:
    """A huge page of another size than the default loses its protection when mremap(2) moves it, and nothing else."""
    if variant == ONE_SIZE:
        raise Skip("the kernel has huge pages of one size only")
    size, flags = bytes_of(variant), SHARINGS[variant.rpartition(" ")[2]]
    marks = {offset: bytes([number + 1]) for number, offset in enumerate((0, size // 2 + 7, size - 1))}
    with (
        hugepage_file(size) as fd,
        mapped(size, flags=flags, fd=fd) as old,
        mapped(size, flags=flags | MAP_NORESERVE, fd=fd) as new,
        Uffd.open(WRITEPROTECT) as uffd,
    ):
        for offset, mark in marks.items():
            poke(old.start + offset, mark)
        uffd.register(old, WP)
        uffd.writeprotect(old)
        expect(protected_in(old), size // PAGE_SIZE, "base pages marked as protected before mremap")
        remap(old, to=new.start)
        expect(protected_in(new), 0, "base pages marked as protected after mremap")
        expect_modes(new, UNREGISTERED)
        undisturbed(uffd, partial(touch, new, size, write=True))
        expect({offset: peek(new.start + offset) for offset in marks}, marks, "bytes by offset")
