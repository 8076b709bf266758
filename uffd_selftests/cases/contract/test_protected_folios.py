# SPDX-License-Identifier: GPL-2.0-only
"""Large folios of several sizes, protected in part against writes or all access: what becomes of each page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, AGAINST_WRITES, ANON, ASYNC, ASYNC_RWP, FOLIOS, MISSING, MOST, MOVE, NEW, PAGE_SIZE, PROT_NONE,
    PROT_READ, PROT_WRITE, RWP, SHMEM, SMALL_FOLIOS, SYNC_RWP, UNREGISTERED, WP, WRITEPROTECT, Advice, Area, Channel,
    Child, Context, Feature, Forked, Pagemap, Protection, Skip, Waiter, advise, expect, expect_modes, expect_sweep,
    first_bytes, folios, memory_nodes, migrate, page_numbers, page_of_fault, peek, poke, promise, protect, remap,
    store_each, swap_out, touch, undisturbed,
)  # fmt: skip

Scenario = Callable[[Context, str], None]


def folio_cases(
    name: str,
    *,
    wp_rows: tuple[str, ...],
    rwp_rows: tuple[str, ...],
    wp: Feature = WRITEPROTECT,
    rwp: Feature = SYNC_RWP,
    event: Feature = Feature(0),
    needs: tuple[str, ...] = (),
    shared: bool = True,
) -> Callable[[Scenario], Scenario]:
    """Declare what happens to folios as a case of either protection; ``shared`` says whether to shared ones, too.

    The cases are writeprotect-NAME, rwprotect-NAME, and for shared memory, whose huge pages have cases of their own
    (rwprotect-thp-shared), rwprotect-NAME-shared.
    """

    def declare(scenario: Scenario) -> Scenario:
        for case_name, mem, variants, features, rows in (
            (f"writeprotect-{name}", (ANON, SHMEM) if shared else (ANON,), FOLIOS, wp, wp_rows),
            (f"rwprotect-{name}", (ANON,), FOLIOS, rwp, rwp_rows),
            (f"rwprotect-{name}-shared", (SHMEM,) if shared else (), SMALL_FOLIOS, rwp, rwp_rows),
        ):
            if not mem:
                continue

            @uffd_case(
                case_name,
                mem=mem,
                variants=variants,
                features=features | event,
                needs=("thp", *needs),
                pages=1,
                rows=rows,
                kind=Kind.DETAIL,
            )
            @wraps(scenario)
            def case(ctx: Context, variant: str) -> None:
                scenario(ctx, variant)

            case.__name__ = "test_" + case_name.replace("-", "_")
            globals()[case.__name__] = case
        return scenario

    return declare


def protection(ctx: Context) -> Protection:
    """Return the protection that a case is about."""
    return AGAINST_ACCESS if Feature.RWP in ctx.features else AGAINST_WRITES


def halves_protected(ctx: Context, area: Area, guard: Protection) -> set[int]:
    """Register an area of two folios; protect the second half of the first and the first half of the second.

    Returns the pages that are protected.
    """
    ctx.uffd.register(area.range, guard.mode)
    pages = set(range(area.nr_pages // 4, 3 * area.nr_pages // 4))
    guard.set(ctx.uffd, area, pages)
    Pagemap.expect_protected(area, pages, "after protecting from the middle of one folio to the middle of the next")
    return pages


def expect_bytes_kept(area: Area, of: Area, *, but: Iterable[int] = ()) -> None:
    """Assert that every page but these holds what ``of`` was filled with, to the last byte."""
    out = set(but)
    if not out:
        area.expect_pattern_of(of)
        return
    for page in range(area.nr_pages):
        if page not in out:
            area.expect_pattern_of(of, page, 1)


def moved_part(area: Area) -> tuple[int, int]:
    """Return the first page and the count of a part that cuts both folios, and the protected half of the first."""
    first = area.nr_pages // 4 + area.nr_pages // 8
    return first, area.nr_pages - area.nr_pages // 8 - first


def some_pages(area: Area) -> list[int]:
    """Return all pages of an area, or of a large one some, its ends and those around its middle among them."""
    half, step = area.nr_pages // 2, max(1, area.nr_pages // MOST)
    chosen = {*range(0, area.nr_pages, step), half - 2, half - 1, half + 1, area.nr_pages - 1}
    return sorted(chosen)


@folio_cases("folio-parts", wp_rows=("WP-24", "WP-25"), rwp_rows=("RW-43", "RW-44"))
def folio_parts(ctx: Context, variant: str) -> None:
    """Of folios protected in part exactly the pages named are protected, and trap.

    Halves, single pages at the ends, all but the middle.
    """
    area, guard = folios(ctx, variant), protection(ctx)
    uffd, half = ctx.uffd, area.nr_pages // 2
    pages = halves_protected(ctx, area, guard)
    with promise("a half of each"):
        expect_sweep(uffd, area, pages, guard)
        expect_bytes_kept(area, area)
    ends = {0, half - 1, half, area.nr_pages - 1}
    with promise("the first and the last page of each"):
        for page in ends:
            guard.set(uffd, area, (page,))
        Pagemap.expect_protected(area, ends, "after protecting the ends")
        expect_sweep(uffd, area, ends, guard, write=guard.trapped_read is None)
    every = set(range(area.nr_pages))
    middle = set(range(half - half // 2, half + half // 4))
    with promise("all but a middle that cuts both"):
        guard.set(uffd, area, every)
        Pagemap.expect_protected(area, every, "after protecting all")
        guard.lift(uffd, area, middle)
        Pagemap.expect_protected(area, every - middle, "after un-protecting the middle")
        expect_sweep(uffd, area, every - middle, guard)
    expect_bytes_kept(area, area)


@folio_cases("folio-dontneed", wp_rows=("WP-15", "WP-24"), rwp_rows=("RW-28", "RW-44"))
def folio_zapped(ctx: Context, variant: str) -> None:
    """Of folios protected in part pages that are dropped leave the others' protection as it is.

    Of shared memory write protection outlasts the pages; that against all access goes with them.
    """
    area, guard = folios(ctx, variant), protection(ctx)
    uffd, quarter = ctx.uffd, area.nr_pages // 4
    pages = halves_protected(ctx, area, guard)
    dropped = {0, *range(quarter + 1, 2 * quarter + 1), area.nr_pages - 1}
    for first, count in ((0, 1), (quarter + 1, quarter), (area.nr_pages - 1, 1)):
        advise(area.page(first, count), Advice.DONTNEED)
    kept = pages if ctx.mem.shared and guard.mode is WP else pages - dropped
    Pagemap.expect_protected(area, kept, "after dropping some pages")
    if not ctx.mem.shared:
        for page in dropped:
            area.expect_zero(page, 1)
    expect_sweep(uffd, area, kept, guard)
    expect_bytes_kept(area, area, but=() if ctx.mem.shared else dropped)


@folio_cases("folio-fork", wp_rows=("WP-18", "WP-33"), rwp_rows=("RW-17", "RW-44", "RW-52"))
def folio_forked(ctx: Context, variant: str) -> None:
    """Of folios protected in part a child without a handle of its own is free, and its parent is not.

    What the child writes to private memory the parent does not see, and the other way round.
    """
    area, guard = folios(ctx, variant), protection(ctx)
    uffd = ctx.uffd
    pages = halves_protected(ctx, area, guard)

    def child(channel: Channel) -> None:
        Pagemap.expect_protected(area, (), "in the child")
        expect_modes(area.range, UNREGISTERED)
        area.expect_pattern_of(area)
        channel.send()
        channel.receive()  # the parent has written to every page
        if not ctx.mem.shared:
            area.expect_pattern_of(area)
            for page in some_pages(area):
                poke(area.page(page).start, bytes([page & 0xFF]) * 8)

    with Child(child) as process:
        process.receive()
        uffd.expect_no_message()
        Pagemap.expect_protected(area, pages, "in the parent, after fork")
        expect_sweep(uffd, area, pages, guard)
        for page in some_pages(area):
            poke(area.page(page).start, NEW)
        process.send()
        process.wait()
    seen = [page for page in some_pages(area) if peek(area.page(page).start, len(NEW)) != NEW]
    expect(page_numbers(seen), "none", "pages of the parent without what it wrote")
    uffd.expect_no_message()


@folio_cases("folio-fork-event", wp_rows=("WP-19",), rwp_rows=("RW-44", "RW-53"), event=Feature.EVENT_FORK)
def folio_forked_event(ctx: Context, variant: str) -> None:
    """Of folios protected in part a child with a handle of its own has its parent's protected pages.

    The child's handle is told, and lifts the child's protection; the parent's stays.
    """
    area, guard = folios(ctx, variant), protection(ctx)
    pages = halves_protected(ctx, area, guard)

    data, used = first_bytes(area), set(some_pages(area))

    def child(_: Channel) -> None:
        Pagemap.expect_protected(area, pages, "in the child")
        expect_modes(area.range, guard.mode)
        for page in used:
            poke(area.page(page).start, data[page])
        Pagemap.expect_protected(area, pages - used, "in the child, when each page that it used was let go")
        for page in used:
            area.expect_pattern_of(area, page, 1)

    with ctx.handler(src=None, where=area.range, log_size=area.nr_pages + 8) as handler, Child(child):
        pass
    forked, *faults = handler.messages
    expect(isinstance(forked, Forked), True, "whether the first message is UFFD_EVENT_FORK")
    trapped = [page_of_fault(area, message, guard.trapped_write, "write in the child") for message in faults]
    expect(page_numbers(trapped), page_numbers(pages & used), "pages on which a write in the child is trapped")
    Pagemap.expect_protected(area, pages, "in the parent, after the child's end")
    expect_sweep(ctx.uffd, area, pages, guard)
    area.expect_pattern_of(area)


@folio_cases("folio-swap", wp_rows=("WP-23", "WP-24"), rwp_rows=("RW-31", "RW-32"), needs=("swap",), shared=False)
def folio_swapped(ctx: Context, variant: str) -> None:
    """Of folios protected in part each page is in swap, and comes back, as it was."""
    area, guard = folios(ctx, variant), protection(ctx)
    uffd, quarter = ctx.uffd, area.nr_pages // 4
    pages = halves_protected(ctx, area, guard)
    swap_out(area.range)
    uffd.expect_no_message()
    Pagemap.expect_protected(area, pages, "of pages swapped out")
    lifted, more = {quarter + 1}, {0, area.nr_pages - 1}
    guard.lift(uffd, area, lifted)
    guard.set(uffd, area, more)
    pages = (pages | more) - lifted
    Pagemap.expect_protected(area, pages, "after changing some while swapped out")
    expect_sweep(uffd, area, pages, guard, write=guard.trapped_read is None)
    area.expect_pattern_of(area)
    guard.set(uffd, area, pages)
    swap_out(area.range)
    expect_sweep(uffd, area, pages, guard)
    area.expect_pattern_of(area)


@folio_cases("folio-mremap", wp_rows=("WP-24", "WP-27"), rwp_rows=("RW-44", "RW-56"))
def folio_remapped(ctx: Context, variant: str) -> None:
    """Of folios protected in part what mremap(2) moves, without its event, is free, and the rest is as it was."""
    area, guard = folios(ctx, variant), protection(ctx)
    uffd, (first, count) = ctx.uffd, moved_part(area)
    pages, place = halves_protected(ctx, area, guard), ctx.allocate(area.nr_pages)
    remap(area.page(first, count), to=place.page(first).start)
    Pagemap.expect_protected(place, (), "at the new place")
    expect_sweep(uffd, place, (), guard)
    place.expect_pattern_of(area, first, count)
    expect_modes(place.page(first, count), UNREGISTERED)
    rest = set(range(area.nr_pages)) - set(range(first, first + count))
    for page in rest:
        Pagemap.expect_uffd_wp(area.page(page).start, page in pages, f"page {page}, left behind")
    uffd.expect_no_message()
    guard.lift(uffd, area, (page for page in rest if page < first))
    area.expect_pattern_of(area, 0, first)


@folio_cases("folio-mremap-event", wp_rows=("WP-24", "WP-28"), rwp_rows=("RW-44", "RW-57"), event=Feature.EVENT_REMAP)
def folio_remapped_event(ctx: Context, variant: str) -> None:
    """Of folios protected in part each page that mremap(2) moves, with its event, is as it was."""
    area, guard = folios(ctx, variant), protection(ctx)
    uffd, (first, count) = ctx.uffd, moved_part(area)
    pages, place = halves_protected(ctx, area, guard), ctx.allocate(area.nr_pages)
    with Waiter(lambda: remap(area.page(first, count), to=place.page(first).start)):
        uffd.wait("UFFD_EVENT_REMAP")
    moved = set(range(first, first + count))
    Pagemap.expect_protected(place, pages & moved, "at the new place")
    expect_modes(place.page(first, count), guard.mode)
    expect_sweep(uffd, place, pages & moved, guard)
    place.expect_pattern_of(area, first, count)
    for page in set(range(area.nr_pages)) - moved:
        Pagemap.expect_uffd_wp(area.page(page).start, page in pages, f"page {page}, left behind")


@folio_cases("folio-mprotect", wp_rows=("WP-20", "WP-24"), rwp_rows=("RW-44", "RW-48"))
def folio_mprotected(ctx: Context, variant: str) -> None:
    """Of folios protected in part each is as it was when mprotect(2) has taken access away and given it back."""
    area, guard = folios(ctx, variant), protection(ctx)
    pages = halves_protected(ctx, area, guard)
    part = area.page(1, area.nr_pages // 2)
    for where, what in ((area.range, "the whole"), (part, "a part")):
        for prot, name in ((PROT_NONE, "PROT_NONE"), (PROT_READ, "PROT_READ")):
            with promise(f"{name} of {what}"):
                protect(where, prot)
                Pagemap.expect_protected(area, pages, "after mprotect")
                protect(where, PROT_READ | PROT_WRITE)
                Pagemap.expect_protected(area, pages, "after mprotect back")
    expect_sweep(ctx.uffd, area, pages, guard)
    area.expect_pattern_of(area)


@folio_cases("folio-unregister", wp_rows=("UNR-13", "WP-24"), rwp_rows=("RW-44", "UNR-16", "UNR-17"))
def folio_unregistered(ctx: Context, variant: str) -> None:
    """Of folios protected in part what is unregistered is free, and the rest is as it was."""
    area, guard = folios(ctx, variant), protection(ctx)
    uffd, (first, count) = ctx.uffd, moved_part(area)
    pages = halves_protected(ctx, area, guard)
    guard.set(uffd, area, range(area.nr_pages))
    pages = set(range(area.nr_pages)) - set(range(first, first + count))
    uffd.unregister(area.page(first, count))
    Pagemap.expect_protected(area, pages, "after unregistering a part")
    expect_sweep(uffd, area, pages, guard, write=guard.trapped_read is None)
    guard.set(uffd, area, range(first))
    uffd.unregister(area.range)
    Pagemap.expect_protected(area, (), "after unregistering all")
    expect_sweep(uffd, area, (), guard)
    area.expect_pattern_of(area)


@folio_cases("folio-migrated", wp_rows=("WP-24",), rwp_rows=("RW-36", "RW-44"), needs=("cap_sys_admin",))
def folio_migrated(ctx: Context, variant: str) -> None:
    """Of folios protected in part each page is as it was in other memory."""
    area, guard = folios(ctx, variant), protection(ctx)
    if ctx.mem.shared and len(memory_nodes()) < 2:
        raise Skip("one memory node only, where a folio of shared memory is split first: boot with numa=fake=2")
    pages = halves_protected(ctx, area, guard)
    if guard.trapped_read is None:
        touch(area.range, PAGE_SIZE)  # write-protecting a huge page of shared memory leaves its pages unmapped
    with migrate(area, 1, area.nr_pages // 2):
        Pagemap.expect_protected(area, pages, "after the migration")
        ctx.uffd.expect_no_message()
        expect_sweep(ctx.uffd, area, pages, guard)
        area.expect_pattern_of(area)


@folio_cases("folio-async", wp_rows=("AS-01", "WP-24"), rwp_rows=("RW-77", "RW-80"), wp=ASYNC, rwp=ASYNC_RWP)
def folio_async(ctx: Context, variant: str) -> None:
    """Of folios protected in part, without anybody being told, an access that is caught frees just its page.

    The handle has RWP_ASYNC, or WP_ASYNC.
    """
    area, guard = folios(ctx, variant), protection(ctx)
    pages, write = halves_protected(ctx, area, guard), guard.trapped_read is None
    data = first_bytes(area)
    for page in (area.nr_pages // 2, min(pages), max(pages)):
        start = area.page(page).start
        undisturbed(ctx.uffd, partial(poke, start, data[page]))
        pages.discard(page)
        Pagemap.expect_protected(area, pages, f"after a write to page {page}")
    if not write:
        undisturbed(ctx.uffd, partial(peek, area.page(area.nr_pages // 2 - 1).start))
        pages.discard(area.nr_pages // 2 - 1)
        Pagemap.expect_protected(area, pages, f"after a read of page {area.nr_pages // 2 - 1}")
    for page in (0, area.nr_pages - 1):
        undisturbed(ctx.uffd, partial(poke, area.page(page).start, data[page]))
    Pagemap.expect_protected(area, pages, "after writes to pages that were free")
    undisturbed(ctx.uffd, partial(store_each, area, data))
    Pagemap.expect_protected(area, (), "after a write to each page")
    area.expect_pattern_of(area)


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
