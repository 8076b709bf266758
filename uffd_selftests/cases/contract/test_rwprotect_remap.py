# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_RWPROTECT and mremap(2): what of the protection is in the new place, and what is left in the old one."""

from __future__ import annotations

from functools import partial
from signal import SIGSEGV

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, ALL, ANON, MIXED, MREMAP_DONTUNMAP, NOT_HUGETLB, READ_TRAPPED, REMAP, RWP, SHMEM, SYNC_RWP, UNMAP,
    UNREGISTERED, Area, Context, Mixture, Pagemap, Range, announced, expect, expect_bytes, expect_modes,
    expect_no_memory, expect_rwp_free, expect_rwp_trapped, faulting, huge_mixture, mixture, moved, peek, pmd_mapped,
    promise, remap, rwp_protected, touch, touch_trapped, two_tables, undisturbed, unmap, unmapped,
)  # fmt: skip


@uffd_case(
    "rwprotect-remap",
    mem=ALL,
    features=SYNC_RWP,
    needs=("swap",),
    pages=MIXED,
    rows=("RW-56",),
    kind=Kind.DETAIL,
)
def test_rwprotect_remap(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_REMAP no page is protected in the new place, whatever it was, nor registered."""
    mix, place = mixture(ctx), ctx.allocate()
    undisturbed(ctx.uffd, partial(remap, mix.area.range, to=place.start))
    expect_no_memory(mix.area.range)
    expect_modes(place.range, UNREGISTERED)
    mix.expect_unmarked("in the new place", place)
    mix.expect_accessible(place, ctx.uffd)


@uffd_case("rwprotect-remap-part", mem=ALL, features=SYNC_RWP, pages=6, rows=("RW-56",), kind=Kind.DETAIL)
def test_rwprotect_remap_part(ctx: Context) -> None:
    """What moves away without UFFD_FEATURE_EVENT_REMAP is free; what remains on both sides is protected as it was."""
    area, place = rwp_protected(ctx), ctx.allocate(4)
    ctx.uffd.resolve(area.page(0))
    undisturbed(ctx.uffd, partial(remap, area.page(2, 2), to=place.page(1).start))
    expect_modes(place.range, UNREGISTERED)
    for part in (area.page(0, 2), area.page(4, 2)):
        expect_modes(part, RWP)
    Pagemap.expect_protected(place, (), "in the new place")
    Pagemap.expect_protected(area, {1, 4, 5}, "in the old place")
    undisturbed(ctx.uffd, lambda: area.pattern.verify(place.start - area.page_size, 2, 2, write_back=True))
    expect_rwp_free(ctx.uffd, area, 0)
    expect_rwp_trapped(ctx.uffd, area, 1, 4, 5)


@uffd_case(
    "rwprotect-remap-event", mem=ALL, features=SYNC_RWP | REMAP, needs=("swap",), pages=MIXED, rows=("RW-57", "RW-59")
)
def test_rwprotect_remap_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_REMAP a moved mapping is announced, and registered and protected in the new place."""
    mix, place = mixture(ctx), ctx.allocate()
    announced(ctx.uffd, partial(remap, mix.area.range, to=place.start), moved(mix.area.range, place.start))
    expect_no_memory(mix.area.range)
    expect_modes(place.range, RWP)
    mix.expect_marks("in the new place", place)
    mix.expect_trapped(ctx.uffd, place)


@uffd_case("rwprotect-remap-event-part", mem=ALL, features=SYNC_RWP | REMAP | UNMAP, pages=6, rows=("RW-57",))
def test_rwprotect_remap_event_part(ctx: Context) -> None:
    """A part of a mapping that moves away, and moves back, is protected page by page as it was, and so is the rest."""
    area, place = rwp_protected(ctx), ctx.allocate(4)
    for page in (0, 3):
        ctx.uffd.resolve(area.page(page))
    part, there = area.page(2, 2), place.page(1, 2)
    announced(ctx.uffd, partial(remap, part, to=there.start), moved(part, there.start), unmapped(part))
    expect_modes(place.range, UNREGISTERED, *[RWP] * 2, UNREGISTERED)
    Pagemap.expect_protected(place, {1}, "in the new place")
    Pagemap.expect_protected(area, {1, 4, 5}, "in the old place")
    announced(ctx.uffd, partial(remap, there, to=part.start), moved(there, part.start), unmapped(there))
    expect_modes(area.range, RWP)
    Pagemap.expect_protected(area, {1, 2, 4, 5}, "when it is back")
    expect_rwp_free(ctx.uffd, area, 0, 3)
    expect_rwp_trapped(ctx.uffd, area, 1, 2, 4, 5)
    area.expect_pattern_of(area)


@uffd_case("rwprotect-remap-blocked", mem=ALL, features=SYNC_RWP | REMAP, pages=3, rows=("RW-57",), kind=Kind.DETAIL)
def test_rwprotect_remap_blocked(ctx: Context) -> None:
    """A thread trapped in a mapping that moves away sleeps on until woken at the old place, where it finds nothing."""
    area, place = rwp_protected(ctx), ctx.allocate()
    where = area.page(1)
    call = partial(touch_trapped, where, area.page_size)
    with faulting(ctx.uffd, where.start, flags=READ_TRAPPED, call=call) as waiter:
        announced(ctx.uffd, partial(remap, area.range, to=place.start), moved(area.range, place.start))
        ctx.uffd.resolve(place.page(1))
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(where)
        traps = waiter.result()
    assert isinstance(traps, list)
    expect([trap and trap.signo for trap in traps], [SIGSEGV], "signal of the access to the old place")
    Pagemap.expect_protected(place, {0, 2}, "in the new place")
    expect_rwp_trapped(ctx.uffd, place, 0, 2)


def dontunmap(ctx: Context, event: bool) -> tuple[Mixture, Area]:
    """Move a mixture away with MREMAP_DONTUNMAP, and return it and its new place; the old one must be as it should."""
    mix, place = mixture(ctx), ctx.allocate()
    area = mix.area
    call = partial(remap, area.range, to=place.start, flags=MREMAP_DONTUNMAP)
    announced(ctx.uffd, call, *[moved(area.range, place.start)] * event)
    expect_modes(area.range, RWP)
    with promise("RW-56", "the old place"):
        Pagemap.expect_present(area)
        Pagemap.expect_protected(area, (), "in the old place")
        ctx.uffd.rwprotect(area.range)
        if ctx.mem == ANON:
            undisturbed(ctx.uffd, lambda: expect_bytes(area.range, 0, "the old place"))
        else:
            undisturbed(ctx.uffd, lambda: peek(area.page(1).start))
        Pagemap.expect_protected(area, (), "after holes were protected and filled")
        ctx.uffd.rwprotect(area.page(1))
        expect_rwp_trapped(ctx.uffd, area, 1)
    return mix, place


@uffd_case(
    "rwprotect-remap-dontunmap",
    mem=NOT_HUGETLB,
    features=SYNC_RWP,
    needs=("swap",),
    pages=MIXED,
    rows=("RW-56",),
    kind=Kind.DETAIL,
)
def test_rwprotect_remap_dontunmap(ctx: Context) -> None:
    """MREMAP_DONTUNMAP leaves the old place registered with nothing in it, and the pages free in the new one."""
    mix, place = dontunmap(ctx, event=False)
    expect_modes(place.range, UNREGISTERED)
    mix.expect_unmarked("in the new place", place)
    mix.expect_accessible(place, ctx.uffd)


@uffd_case(
    "rwprotect-remap-dontunmap-event",
    mem=NOT_HUGETLB,
    features=SYNC_RWP | REMAP,
    needs=("swap",),
    pages=MIXED,
    rows=("RW-57",),
    kind=Kind.DETAIL,
)
def test_rwprotect_remap_dontunmap_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_REMAP, MREMAP_DONTUNMAP takes the protection to the new place, out of the old one."""
    mix, place = dontunmap(ctx, event=True)
    expect_modes(place.range, RWP)
    mix.expect_marks("in the new place", place)
    mix.expect_trapped(ctx.uffd, place)


def move_tables(ctx: Context) -> None:
    """Move what two page tables map to such a place."""
    uffd, event = ctx.uffd, REMAP in ctx.features
    area, pages = two_tables(ctx, AGAINST_ACCESS)
    place = ctx.allocate(area.nr_pages)
    announced(uffd, partial(remap, area.range, to=place.start), *[moved(area.range, place.start)] * event)
    if event:
        Pagemap.expect_protected(place, pages[::2], "in the new place")
        expect_modes(place.range, RWP)
        expect_rwp_free(uffd, place, *pages[1::2])
        expect_rwp_trapped(uffd, place, *pages[::2])
    else:
        Pagemap.expect_protected(place, (), "in the new place")
        expect_modes(place.range, UNREGISTERED)
        expect_rwp_free(uffd, place, *pages)
    for page in pages:
        area.pattern.verify(place.start, page, 1)


@uffd_case("rwprotect-remap-tables", mem=NOT_HUGETLB, features=SYNC_RWP, pages=1, rows=("RW-56",), kind=Kind.DETAIL)
def test_rwprotect_remap_tables(ctx: Context) -> None:
    """Memory that would move by whole page tables is as free in the new place as that which moves by pages."""
    move_tables(ctx)


@uffd_case("rwprotect-remap-event-tables", mem=NOT_HUGETLB, features=SYNC_RWP | REMAP, pages=1, rows=("RW-57",))
def test_rwprotect_remap_event_tables(ctx: Context) -> None:
    """Memory that moves by whole page tables takes its protection along page by page."""
    move_tables(ctx)


@uffd_case("rwprotect-thp-remap", mem=(ANON,), features=SYNC_RWP, needs=("thp",), rows=("RW-56",), kind=Kind.DETAIL)
def test_rwprotect_thp_remap(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_REMAP huge pages are free in the new place, whether they fit there or are split."""
    for what, shift in (("aligned", 0), ("not aligned", 1)):
        mix = huge_mixture(ctx)
        place = ctx.allocate(mix.area.nr_pages + shift)
        with promise("RW-56", what):
            undisturbed(ctx.uffd, partial(remap, mix.area.range, to=place.page(shift).start))
            expect_modes(place.range, UNREGISTERED)
            Pagemap.expect_protected(place, (), "in the new place")
            if not shift:
                expect(pmd_mapped(place.range), 2 * mix.whole(0).len, "bytes mapped by PMD in the new place")
            verify = partial(mix.area.pattern.verify, place.page(shift).start, 0, mix.area.nr_pages, write_back=True)
            undisturbed(ctx.uffd, verify)


@uffd_case("rwprotect-thp-remap-event", mem=(ANON,), features=SYNC_RWP | REMAP, needs=("thp",), rows=("RW-57",))
def test_rwprotect_thp_remap_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_REMAP huge pages are protected in the new place, whether they fit or are split."""
    for what, shift in (("aligned", 0), ("not aligned", 1)):
        mix = huge_mixture(ctx)
        place = ctx.allocate(mix.area.nr_pages + shift)
        to = place.page(shift).start
        with promise("RW-57", what):
            announced(ctx.uffd, partial(remap, mix.area.range, to=to), moved(mix.area.range, to))
            marked = {page + shift for page in mix.protected}
            Pagemap.expect_protected(place, marked, "in the new place")
            if not shift:
                expect(pmd_mapped(place.range), 2 * mix.whole(0).len, "bytes mapped by PMD in the new place")
            chosen = {page + shift for page in (0, 9, mix.count - 1, mix.cut[0], mix.cut[-1])}
            expect_rwp_free(ctx.uffd, place, mix.cut[0] - 1 + shift, 2 * mix.count + shift)
            expect_rwp_trapped(ctx.uffd, place, *sorted(chosen))
            Pagemap.expect_protected(place, marked - chosen, "after some were resolved")
            ctx.uffd.resolve(place.page(shift, mix.area.nr_pages))
            undisturbed(ctx.uffd, partial(mix.area.pattern.verify, to, 0, mix.area.nr_pages))


# ---- mappings that grow, shrink or are doubled ---------------------------------------------------------------------


@uffd_case(
    "rwprotect-remap-resized", mem=NOT_HUGETLB, features=SYNC_RWP | REMAP | UNMAP, pages=6, rows=("RW-57",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_remap_resized(ctx: Context) -> None:
    """A mapping that grows or shrinks where it is keeps its protection; what is added is registered, not protected."""
    area = ctx.dst
    kept, tail = area.page(0, 3), area.page(3, 3)
    area.fill(0, 3)
    unmap(tail)
    ctx.uffd.register(kept, RWP)
    ctx.uffd.rwprotect(area.page(1, 2))
    undisturbed(ctx.uffd, lambda: remap(kept, area.range.len, flags=0))
    with promise("RW-57", "grown"):
        expect_modes(area.range, RWP)
        undisturbed(ctx.uffd, partial(touch, tail, area.page_size, write=True))
        Pagemap.expect_protected(area, {1, 2}, "after the mapping has grown and the added pages are there")
        ctx.uffd.rwprotect(area.range)
        expect_rwp_trapped(ctx.uffd, area, 3, 5)
    shrunk = area.page(0, 2)
    with promise("RW-57", "shrunk"):
        announced(ctx.uffd, lambda: remap(area.range, shrunk.len, flags=0), unmapped(area.page(2, 4)))
        Pagemap.expect_protected(area, {0, 1}, "after the mapping has shrunk")
        expect_rwp_trapped(ctx.uffd, area, 0, 1)
    area.expect_pattern_of(area, 0, 2)


@uffd_case(
    "rwprotect-remap-doubled", mem=(SHMEM,), features=SYNC_RWP | REMAP, pages=3, rows=("RW-57",), kind=Kind.DETAIL
)
def test_rwprotect_remap_doubled(ctx: Context) -> None:
    """Shared memory mapped a second time by an mremap from length 0 is registered there, and protected in one place."""
    area, place = rwp_protected(ctx), ctx.allocate()
    twice = partial(remap, Range(area.start, 0), area.range.len, to=place.start)
    announced(ctx.uffd, twice, moved(area.range, place.start, 0))
    expect_modes(area.range, RWP)
    expect_modes(place.range, RWP)
    undisturbed(ctx.uffd, lambda: area.expect_pattern(place.range))
    Pagemap.expect_protected(place, (), "in the second place")
    Pagemap.expect_protected(area, range(3), "in the first place")
    ctx.uffd.rwprotect(place.page(1))
    ctx.uffd.resolve(area.page(1))
    expect_rwp_free(ctx.uffd, area, 1)
    expect_rwp_trapped(ctx.uffd, place, 1)
    expect_rwp_trapped(ctx.uffd, area, 0, 2)
