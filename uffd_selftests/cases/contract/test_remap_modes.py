# SPDX-License-Identifier: GPL-2.0-only
"""mremap(2) of write-protected pages of every kind, and beside mappings of other modes and handles."""

from __future__ import annotations

from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_WRITES, ALL, ANON, MISSING, MIXED, MREMAP_DONTUNMAP, NOT_HUGETLB, PAGE_SIZE, REMAP, UNREGISTERED, WP,
    WRITEPROTECT, Context, Pagemap, Range, Uffd, announced, expect, expect_free, expect_modes, expect_no_memory,
    expect_served, expect_trapped, huge_mixture, mended, mixture, moved, peek, pmd_mapped, promise, remap, touch,
    two_tables, undisturbed,
)  # fmt: skip


@uffd_case(
    "remap-wp-kinds", mem=ALL, features=WRITEPROTECT, needs=("swap",), pages=MIXED, rows=("WP-20",), kind=Kind.DETAIL
)
def test_remap_wp_kinds(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_REMAP nothing is write-protected in the new place: no page, nor swap, nor marker."""
    mix, place = mixture(ctx, WP), ctx.allocate()
    undisturbed(ctx.uffd, partial(remap, mix.area.range, to=place.start))
    expect_no_memory(mix.area.range)
    expect_modes(place.range, UNREGISTERED)
    mix.expect_unmarked("in the new place", place)
    mix.expect_accessible(place, ctx.uffd)


@uffd_case(
    "remap-event-wp-kinds",
    mem=ALL,
    features=WRITEPROTECT | REMAP,
    needs=("swap",),
    pages=MIXED,
    rows=("WP-20",),
    kind=Kind.DETAIL,
)
def test_remap_event_wp_kinds(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_REMAP every kind of page is write-protected in the new place as it was in the old one."""
    mix, place = mixture(ctx, WP), ctx.allocate()
    announced(ctx.uffd, partial(remap, mix.area.range, to=place.start), moved(mix.area.range, place.start))
    expect_modes(place.range, WP)
    mix.expect_marks("in the new place", place)
    mix.expect_trapped(ctx.uffd, place)


@uffd_case(
    "remap-dontunmap-wp-kinds",
    mem=NOT_HUGETLB,
    features=WRITEPROTECT,
    needs=("swap",),
    pages=MIXED,
    rows=("WP-20", "EV-24"),
    kind=Kind.DETAIL,
)
def test_remap_dontunmap_wp_kinds(ctx: Context) -> None:
    """MREMAP_DONTUNMAP leaves the old place registered, without a page or marker, and nothing protected in the new."""
    mix, place = mixture(ctx, WP), ctx.allocate()
    undisturbed(ctx.uffd, partial(remap, mix.area.range, to=place.start, flags=MREMAP_DONTUNMAP))
    expect_modes(mix.area.range, WP)
    expect_modes(place.range, UNREGISTERED)
    Pagemap.expect_present(mix.area)
    Pagemap.expect_protected(mix.area, (), "in the old place")
    mix.expect_unmarked("in the new place", place)
    mix.expect_accessible(place, ctx.uffd)
    undisturbed(ctx.uffd, partial(touch, mix.area.range, PAGE_SIZE, write=True))


def move_tables(ctx: Context, *, event: bool) -> None:
    """Move what two page tables map to where they would fit as they are; every second page there is protected."""
    area, pages = two_tables(ctx, AGAINST_WRITES)
    place = ctx.allocate(area.nr_pages)
    announced(ctx.uffd, partial(remap, area.range, to=place.start), *[moved(area.range, place.start)] * event)
    expect_modes(place.range, WP if event else UNREGISTERED)
    Pagemap.expect_protected(place, pages[::2] if event else (), "in the new place")
    for page in pages:
        undisturbed(ctx.uffd, partial(area.pattern.verify, place.start, page, 1))
    expect_free(ctx.uffd, place, *(pages[1::2] if event else pages))
    if event:
        expect_trapped(ctx.uffd, place, *pages[::2])


@uffd_case("remap-wp-tables", mem=NOT_HUGETLB, features=WRITEPROTECT, pages=1, rows=("WP-20",), kind=Kind.DETAIL)
def test_remap_wp_tables(ctx: Context) -> None:
    """Memory that would move by whole page tables loses its protection, too, without UFFD_FEATURE_EVENT_REMAP."""
    move_tables(ctx, event=False)


@uffd_case(
    "remap-event-wp-tables", mem=NOT_HUGETLB, features=WRITEPROTECT | REMAP, pages=1, rows=("WP-20",), kind=Kind.DETAIL
)
def test_remap_event_wp_tables(ctx: Context) -> None:
    """Memory that moves by whole page tables takes its protection along page by page."""
    move_tables(ctx, event=True)


def move_huge(ctx: Context, *, event: bool) -> None:
    """Move huge pages, protected whole or in part or not, to where they fit."""
    mix = huge_mixture(ctx, WP)
    area, place = mix.area, ctx.allocate(mix.area.nr_pages)
    announced(ctx.uffd, partial(remap, area.range, to=place.start), *[moved(area.range, place.start)] * event)
    expect_modes(place.range, WP if event else UNREGISTERED)
    expect(pmd_mapped(place.range), 2 * mix.whole(0).len, "bytes mapped by PMD in the new place")
    mix.expect_marks("in the new place", place, None if event else ())
    if event:
        mix.expect_trapped(ctx.uffd, place)
    else:
        undisturbed(ctx.uffd, partial(area.pattern.verify, place.start, 0, area.nr_pages, write_back=True))


@uffd_case("remap-wp-huge", mem=(ANON,), features=WRITEPROTECT, needs=("thp",), rows=("WP-20",), kind=Kind.DETAIL)
def test_remap_wp_huge(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_REMAP huge pages are not write-protected in the new place, nor split."""
    move_huge(ctx, event=False)


@uffd_case(
    "remap-event-wp-huge", mem=(ANON,), features=WRITEPROTECT | REMAP, needs=("thp",), rows=("WP-20",), kind=Kind.DETAIL
)
def test_remap_event_wp_huge(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_REMAP huge pages are write-protected in the new place, whole or in part, as they were."""
    move_huge(ctx, event=True)


@uffd_case(
    "remap-modes-side-by-side",
    mem=ALL,
    features=WRITEPROTECT | REMAP,
    pages=4,
    rows=("EV-19", "EV-24", "WP-20"),
    kind=Kind.DETAIL,
)
def test_remap_modes_side_by_side(ctx: Context) -> None:
    """A mapping that moves keeps or loses its mode by its own handle; those beside it stay as they are."""
    area, place = ctx.dst, ctx.allocate()
    area.fill(0, 3)
    place.fill(0, 1)
    with Uffd.open(WRITEPROTECT) as other:
        for uffd, where in (ctx.uffd, area.page(0, 2)), (other, area.page(2)), (other, place.page(0)):
            uffd.register(where, WP)
            uffd.writeprotect(where)
        ctx.uffd.register(area.page(3), MISSING)
        first, second = (area.page(1), place.page(1)), (area.page(2), place.page(2))
        announced(ctx.uffd, partial(remap, first[0], to=first[1].start), moved(first[0], first[1].start))
        undisturbed(ctx.uffd, partial(remap, second[0], to=second[1].start))
        other.expect_no_message()
        expect_modes(area.page(0), WP)
        expect_no_memory(area.page(1, 2))
        expect_modes(area.page(3), MISSING)
        expect_modes(place.range, WP, WP, UNREGISTERED, UNREGISTERED)
        Pagemap.expect_protected(place, {0, 1}, "in the new place")
        Pagemap.expect_protected(area, {0}, "in the old place")
        expect_trapped(ctx.uffd, area, 0)
        expect_trapped(other, place, 0)
        expect_trapped(ctx.uffd, place, 1)
        expect_free(ctx.uffd, place, 2)
        area.pattern.verify(place.start, 2, 1)
        if ctx.mem == ANON:
            expect_served(ctx, area.page(3))


LOST = Defect(
    id="D-EV-43",
    summary="a registered mapping that moves beside another one of the same handle and modes, without "
    "UFFD_FEATURE_EVENT_REMAP, takes the other one's registration away",
    kernels="6.1.192, 6.12.117, 6.18.44; not 7.3.4",
    advice="Enable UFFD_FEATURE_EVENT_REMAP, or register again what lies beside memory that was moved.",
    shows=r"EV-43: modes in which .* is registered, by part",
)


@uffd_case("remap-beside", mem=(ANON,), pages=6, rows=("EV-43",), kind=Kind.VERSION, defect=LOST)
def test_remap_beside(ctx: Context) -> None:
    """A mapping that loses its registration by moving leaves that of its new neighbours, on both sides, alone."""
    area, place = ctx.dst, ctx.allocate()
    for where in (area.page(0, 2), place.page(0, 2), place.page(4, 2)):
        ctx.uffd.register(where, MISSING)
    undisturbed(ctx.uffd, partial(remap, area.page(0, 2), to=place.page(2).start))
    with mended(ctx.uffd), promise("EV-43"):
        expect_modes(place.range, *[MISSING] * 2, *[UNREGISTERED] * 2, *[MISSING] * 2)
    for page in (0, 1, 4, 5):
        expect_served(ctx, place.page(page))
    undisturbed(ctx.uffd, lambda: peek(place.page(2).start))


@uffd_case("remap-event-beside", mem=(ANON,), features=WRITEPROTECT | REMAP, pages=6, rows=("EV-19",), kind=Kind.DETAIL)
def test_remap_event_beside(ctx: Context) -> None:
    """A mapping that moves between two of the same handle stays registered, and protected page by page, as they do."""
    area, place = ctx.dst, ctx.allocate()
    for one, pages in ((area, (0, 1)), (place, (0, 1, 4, 5))):
        for page in pages:
            one.fill(page, 1)
    for where in (area.page(0, 2), place.page(0, 2), place.page(4, 2)):
        ctx.uffd.register(where, WP)
        ctx.uffd.writeprotect(Range(where.start, PAGE_SIZE))
    announced(
        ctx.uffd, partial(remap, area.page(0, 2), to=place.page(2).start), moved(area.page(0, 2), place.page(2).start)
    )
    expect_modes(place.range, WP)
    Pagemap.expect_protected(place, {0, 2, 4}, "after a mapping has moved between two")
    expect_free(ctx.uffd, place, 1, 3, 5)
    expect_trapped(ctx.uffd, place, 0, 2, 4)
