# SPDX-License-Identifier: GPL-2.0-only
"""Large folios of several sizes, protected in part against writes or all access: what becomes of each page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, AGAINST_WRITES, ANON, ASYNC, ASYNC_RWP, FOLIOS, MISSING, MOST, MOVE, NEW, PAGE_SIZE, PROT_NONE,
    PROT_READ, PROT_WRITE, RWP, SHMEM, SMALL_FOLIOS, SYNC_RWP, UNREGISTERED, WP, WRITEPROTECT, Advice, Area, Channel,
    Child, Context, Feature, Forked, MemType, Pagemap, Protection, Skip, Waiter, advise, expect, expect_modes,
    expect_sweep, first_bytes, folios, memory_nodes, migrate, page_numbers, page_of_fault, peek, poke, promise, protect,
    remap, store_each, swap_out, touch, undisturbed,
)  # fmt: skip

Scenario = Callable[[Context, str], None]


def folio_uffd_case(
    name: str,
    features: Feature,
    *mem: MemType,
    rows: tuple[str, ...],
    variants: tuple[str, ...] = FOLIOS,
    needs: tuple[str, ...] = (),
) -> Callable[[Scenario], Scenario]:
    """Declare what happens to folios as a case of this file; several stand one above the other."""

    def declare(scenario: Scenario) -> Scenario:
        @wraps(scenario)
        def case(ctx: Context, variant: str) -> None:
            scenario(ctx, variant)

        case.__name__ = "test_" + name.replace("-", "_")
        needed = ("thp", *needs)
        declared = uffd_case(
            name, mem=mem, variants=variants, features=features, needs=needed, pages=1, rows=rows, kind=Kind.DETAIL
        )
        globals()[case.__name__] = declared(case)
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


@folio_uffd_case("writeprotect-folio-parts", WRITEPROTECT, ANON, SHMEM, rows=("WP-24", "WP-25"))
@folio_uffd_case("rwprotect-folio-parts", SYNC_RWP, ANON, rows=("RW-43", "RW-44"))
@folio_uffd_case("rwprotect-folio-parts-shared", SYNC_RWP, SHMEM, variants=SMALL_FOLIOS, rows=("RW-43", "RW-44"))
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


@folio_uffd_case("writeprotect-folio-dontneed", WRITEPROTECT, ANON, SHMEM, rows=("WP-15", "WP-24"))
@folio_uffd_case("rwprotect-folio-dontneed", SYNC_RWP, ANON, rows=("RW-28", "RW-44"))
@folio_uffd_case("rwprotect-folio-dontneed-shared", SYNC_RWP, SHMEM, variants=SMALL_FOLIOS, rows=("RW-28", "RW-44"))
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


@folio_uffd_case("writeprotect-folio-fork", WRITEPROTECT, ANON, SHMEM, rows=("WP-18", "WP-33"))
@folio_uffd_case("rwprotect-folio-fork", SYNC_RWP, ANON, rows=("RW-17", "RW-44", "RW-52"))
@folio_uffd_case(
    "rwprotect-folio-fork-shared", SYNC_RWP, SHMEM, variants=SMALL_FOLIOS, rows=("RW-17", "RW-44", "RW-52")
)
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


@folio_uffd_case("writeprotect-folio-fork-event", WRITEPROTECT | Feature.EVENT_FORK, ANON, SHMEM, rows=("WP-19",))
@folio_uffd_case("rwprotect-folio-fork-event", SYNC_RWP | Feature.EVENT_FORK, ANON, rows=("RW-44", "RW-53"))
@folio_uffd_case(
    "rwprotect-folio-fork-event-shared",
    SYNC_RWP | Feature.EVENT_FORK,
    SHMEM,
    variants=SMALL_FOLIOS,
    rows=("RW-44", "RW-53"),
)
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


@folio_uffd_case("writeprotect-folio-swap", WRITEPROTECT, ANON, needs=("swap",), rows=("WP-23", "WP-24"))
@folio_uffd_case("rwprotect-folio-swap", SYNC_RWP, ANON, needs=("swap",), rows=("RW-31", "RW-32"))
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


@folio_uffd_case("writeprotect-folio-mremap", WRITEPROTECT, ANON, SHMEM, rows=("WP-24", "WP-27"))
@folio_uffd_case("rwprotect-folio-mremap", SYNC_RWP, ANON, rows=("RW-44", "RW-56"))
@folio_uffd_case("rwprotect-folio-mremap-shared", SYNC_RWP, SHMEM, variants=SMALL_FOLIOS, rows=("RW-44", "RW-56"))
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


@folio_uffd_case(
    "writeprotect-folio-mremap-event", WRITEPROTECT | Feature.EVENT_REMAP, ANON, SHMEM, rows=("WP-24", "WP-28")
)
@folio_uffd_case("rwprotect-folio-mremap-event", SYNC_RWP | Feature.EVENT_REMAP, ANON, rows=("RW-44", "RW-57"))
@folio_uffd_case(
    "rwprotect-folio-mremap-event-shared",
    SYNC_RWP | Feature.EVENT_REMAP,
    SHMEM,
    variants=SMALL_FOLIOS,
    rows=("RW-44", "RW-57"),
)
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


@folio_uffd_case("writeprotect-folio-mprotect", WRITEPROTECT, ANON, SHMEM, rows=("WP-20", "WP-24"))
@folio_uffd_case("rwprotect-folio-mprotect", SYNC_RWP, ANON, rows=("RW-44", "RW-48"))
@folio_uffd_case("rwprotect-folio-mprotect-shared", SYNC_RWP, SHMEM, variants=SMALL_FOLIOS, rows=("RW-44", "RW-48"))
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


@folio_uffd_case("writeprotect-folio-unregister", WRITEPROTECT, ANON, SHMEM, rows=("UNR-13", "WP-24"))
@folio_uffd_case("rwprotect-folio-unregister", SYNC_RWP, ANON, rows=("RW-44", "UNR-16", "UNR-17"))
@folio_uffd_case(
    "rwprotect-folio-unregister-shared", SYNC_RWP, SHMEM, variants=SMALL_FOLIOS, rows=("RW-44", "UNR-16", "UNR-17")
)
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


@folio_uffd_case("writeprotect-folio-migrated", WRITEPROTECT, ANON, SHMEM, needs=("cap_sys_admin",), rows=("WP-24",))
@folio_uffd_case("rwprotect-folio-migrated", SYNC_RWP, ANON, needs=("cap_sys_admin",), rows=("RW-36", "RW-44"))
@folio_uffd_case(
    "rwprotect-folio-migrated-shared",
    SYNC_RWP,
    SHMEM,
    variants=SMALL_FOLIOS,
    needs=("cap_sys_admin",),
    rows=("RW-36", "RW-44"),
)
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


@folio_uffd_case("writeprotect-folio-async", ASYNC, ANON, SHMEM, rows=("AS-01", "WP-24"))
@folio_uffd_case("rwprotect-folio-async", ASYNC_RWP, ANON, rows=("RW-77", "RW-80"))
@folio_uffd_case("rwprotect-folio-async-shared", ASYNC_RWP, SHMEM, variants=SMALL_FOLIOS, rows=("RW-77", "RW-80"))
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
