# SPDX-License-Identifier: GPL-2.0-only
"""Neighbours: whatever becomes of a mapping, those beside it keep their handle, their modes and their protection.

The kernel cuts mappings in parts and puts parts together as it likes. Each case takes three neighbours, of one handle,
of two handles or not registered, in all pairs of modes, changes the one in the middle, and looks at the others: their
modes, the marks of protection, and which handle is told of an access to each of their pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, CACHED, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MINOR, MINOR_FAULTS, MISSING,
    NOT_HUGETLB, PAGE_SIZE, PROT_NONE, PROT_READ, PROT_WRITE, READ_TRAPPED, RWP, TRAPPED, UNREGISTERED, WP,
    WRITEPROTECT, Advice, Area, Context, Feature, Pagemap, Range, RegisterMode, Uffd, advise, announced, expect,
    expect_modes, faulting, in_modes, keep_small, map_memory, moved, new_mapping, peek, promise, protect, remap, saw,
    uapi, undisturbed, unmap,
)  # fmt: skip

FREE = UNREGISTERED


@dataclass(frozen=True)
class Part:
    """One of the neighbours."""

    first: int
    """Its first page in the area."""
    count: int
    mode: RegisterMode
    uffd: Uffd
    """Its handle; if it is not registered, one that must not be told."""


@dataclass(frozen=True)
class Row:
    """Three neighbours in an area of their own, each page in the state that its mode can report."""

    ctx: Context
    area: Area
    handles: Sequence[Uffd]
    parts: tuple[Part, Part, Part]

    @property
    def middle(self) -> Range:
        """Where the neighbour in the middle is."""
        return self.area.page(self.parts[1].first, self.parts[1].count)

    def with_middle(self, mode: RegisterMode, uffd: Uffd | None = None) -> Row:
        """Return how it is when the one in the middle is registered otherwise."""
        left, middle, right = self.parts
        return replace(self, parts=(left, replace(middle, mode=mode, uffd=uffd or middle.uffd), right))

    def expect_modes(self, *which: int) -> None:
        """Assert how these parts (none given: all) are registered, and what of them is protected."""
        for part in (self.parts[number] for number in which or (0, 1, 2)):
            where = self.area.page(part.first, part.count)
            expect_modes(where, *[part.mode] * part.count)
            marks = Pagemap.have(where, uapi.PM_UFFD_WP)
            expect(marks.count(True), len(marks) if part.mode & (WP | RWP) else 0, f"base pages protected in {where}")

    def expect_told(self, *which: int) -> None:
        """Assert of each page of these parts (none given: all) that its handle, and no other, hears of an access."""
        for part in (self.parts[number] for number in which or (0, 1, 2)):
            for number in range(part.first, part.first + part.count):
                with promise(f"page {number} in mode {part.mode}"):
                    expect_told(self, part, number)

    def expect_kept(self, *which: int) -> None:
        """Assert all of it; the pages are without protection, or filled, afterwards."""
        self.expect_modes(*which)
        self.expect_told(*which)


def expect_told(row: Row, part: Part, number: int) -> None:
    """Assert that the handle of a page, and no other, hears of an access to it."""
    page, uffd = row.area.page(number), part.uffd
    if not part.mode:
        undisturbed(uffd, partial(peek, page.start))
    elif RWP in part.mode:
        with faulting(uffd, page.start, flags=READ_TRAPPED):
            uffd.resolve(page)
    elif WP in part.mode:
        with faulting(uffd, page.start, write=True, flags=TRAPPED):
            uffd.unprotect(page)
    elif MINOR in part.mode:
        with faulting(uffd, page.start, flags=CACHED):
            uffd.continue_(page)
    else:
        with faulting(uffd, page.start):
            uffd.copy(page.start, row.ctx.src.start, page.len)
    for handle in row.handles:
        handle.expect_no_message()


def modes_to_try(ctx: Context) -> list[RegisterMode]:
    """Return the modes that the kernel and the memory offer, RWP among them; each page can report in one way."""
    modes = [MISSING, WP]
    modes += [MINOR] if ctx.mem.shared and MINOR_FAULTS & ctx.uffd.offered == MINOR_FAULTS else []
    modes += [RWP, RWP | MISSING] if Feature.RWP in ctx.uffd.offered else []
    return modes


def arrangements(ctx: Context) -> Iterator[tuple[str, tuple[int, int, int], tuple[RegisterMode, ...]]]:
    """Yield names, numbers of handles and modes of three neighbours."""
    modes = modes_to_try(ctx)
    for number, mode in enumerate(modes):
        other = modes[(number + 1) % len(modes)]
        yield f"one handle, {mode}", (0, 0, 0), (mode, mode, mode)
        yield f"one handle, {mode}, {other} in the middle", (0, 0, 0), (mode, other, mode)
        yield f"two handles, {mode}, the other one in the middle", (0, 1, 0), (mode, mode, mode)
        yield f"two handles, {mode}, the other one behind", (0, 0, 1), (mode, mode, mode)
        yield f"one handle, {mode}, the middle free", (0, 0, 0), (mode, FREE, mode)


@contextmanager
def neighbours(
    ctx: Context, handles: tuple[int, int, int], modes: tuple[RegisterMode, ...], features: Feature = Feature(0)
) -> Iterator[Row]:
    """Have three neighbours registered, their pages filled and protected, missing, or in the page cache only."""
    count = 1 if ctx.mem.hugetlb else 2
    wanted = ctx.features | features | Feature.RWP & ctx.uffd.offered | MINOR_FAULTS & ctx.uffd.offered
    with ExitStack() as stack:
        opened = [stack.enter_context(Uffd.open(wanted)) for _ in range(2)]
        area = stack.enter_context(closing(ctx.mem.allocate(3 * count)))
        keep_small(area.range)
        parts = [
            Part(place * count, count, mode, opened[handle])
            for place, (handle, mode) in enumerate(zip(handles, modes, strict=True))
        ]
        for part in parts:
            where = area.page(part.first, part.count)
            if part.mode & (WP | RWP) or not part.mode:
                area.fill(part.first, part.count)
            elif MINOR in part.mode:
                with area.file_view() as view:
                    area.pattern.fill(view.start, part.first, part.count)
            if part.mode:
                part.uffd.register(where, part.mode)
            if RWP in part.mode:
                part.uffd.rwprotect(where)
            elif WP in part.mode:
                part.uffd.writeprotect(where)
        row = Row(ctx, area, opened, (parts[0], parts[1], parts[2]))
        row.expect_modes()
        yield row


def each(ctx: Context, row: str, features: Feature = Feature(0)) -> Iterator[Row]:
    """Go through all arrangements; a failure names the row of the contract and the arrangement."""
    for name, handles, modes in arrangements(ctx):
        with promise(row, name), neighbours(ctx, handles, modes, features) as made:
            yield made


# ---- unmapped, mapped, protected -----------------------------------------------------------------------------------


@uffd_case(
    "neighbours-unmapped", mem=ALL, features=WRITEPROTECT, pages=3, rows=("REG-36", "EV-13"), kind=Kind.DETAIL
)
def test_neighbours_unmapped(ctx: Context) -> None:
    """What lies beside memory that is unmapped keeps its registration, and what is mapped there anew has none."""
    for row in each(ctx, "REG-36"):
        unmap(row.middle)
        row.expect_modes(0, 2)
        new_mapping(row.middle.len, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, at=row.middle.start)
        expect_modes(row.middle, UNREGISTERED)
        row.with_middle(FREE).expect_kept()


@uffd_case("neighbours-mprotect", mem=ALL, features=WRITEPROTECT, pages=3, rows=("REG-36", "REG-41"), kind=Kind.DETAIL)
def test_neighbours_mprotect(ctx: Context) -> None:
    """The mprotect of a mapping, there and back, changes neither its registration nor that of those beside it."""
    for row in each(ctx, "REG-36"):
        for prot in (PROT_READ, PROT_NONE):
            protect(row.middle, prot)
            row.expect_modes()
            protect(row.middle, PROT_READ | PROT_WRITE)
        row.expect_kept()


@uffd_case("neighbours-madvise", mem=NOT_HUGETLB, features=WRITEPROTECT, pages=3, rows=("REG-36",), kind=Kind.DETAIL)
def test_neighbours_madvise(ctx: Context) -> None:
    """Advice that cuts a mapping off and joins it again changes no registration."""
    for row in each(ctx, "REG-36"):
        advise(row.middle, Advice.DONTFORK)
        row.expect_modes()
        advise(row.middle, Advice.DOFORK)
        row.expect_kept()


# ---- registered and unregistered -----------------------------------------------------------------------------------


@uffd_case("neighbours-unregistered", mem=ALL, features=WRITEPROTECT, pages=3, rows=("UNR-08",), kind=Kind.DETAIL)
def test_neighbours_unregistered(ctx: Context) -> None:
    """What lies beside memory that is unregistered, then registered again with the same or another handle, stays so."""
    for row in each(ctx, "UNR-08"):
        row.parts[1].uffd.unregister(row.middle)
        bare = row.with_middle(FREE)
        bare.expect_modes()
        for uffd in row.handles:
            uffd.register(row.middle, MISSING)
            with_mode = row.with_middle(MISSING, uffd)
            expect_modes(row.middle, MISSING)
            with_mode.expect_modes(0, 2)
            uffd.unregister(row.middle)
            bare.expect_modes()
        bare.expect_kept()


@uffd_case("neighbours-registered", mem=ALL, features=WRITEPROTECT, pages=3, rows=("REG-36",), kind=Kind.DETAIL)
def test_neighbours_registered(ctx: Context) -> None:
    """A page in the middle that gets a mode more, or is registered between two others, leaves these what they are."""
    for row in each(ctx, "REG-36"):
        middle = row.parts[1]
        wider = middle.mode | MISSING
        middle.uffd.register(row.middle, wider)
        row.with_middle(wider).expect_modes()
        row.with_middle(wider).expect_told(0, 2)


# ---- moved ---------------------------------------------------------------------------------------------------------


@uffd_case(
    "neighbours-moved-away",
    mem=ALL,
    features=WRITEPROTECT,
    pages=3,
    rows=("EV-24",),
    kind=Kind.DETAIL,
)
def test_neighbours_moved_away(ctx: Context) -> None:
    """A mapping moved away and back without its event is free then, without a mark; those beside it stay as ever."""
    for row in each(ctx, "EV-24"):
        place = ctx.allocate(row.parts[1].count)
        remap(row.middle, to=place.start)
        row.expect_modes(0, 2)
        expect_modes(place.range, UNREGISTERED)
        marks = Pagemap.have(place.range, uapi.PM_UFFD_WP)
        expect(any(marks), False, "pages marked as protected at the new place")
        remap(place.range, to=row.middle.start)
        row.with_middle(FREE).expect_kept()


@uffd_case("neighbours-moved-beside", mem=ALL, features=WRITEPROTECT, pages=3, rows=("EV-43",), kind=Kind.VERSION)
def test_neighbours_moved_beside(ctx: Context) -> None:
    """A registered mapping that is moved in between others of its handle and modes, without its event, leaves them be.

    Old kernels put it together with them, and the whole was registered no more. Those that offer UFFD_FEATURE_RWP
    must not; of others each neighbour is registered as before, or not at all.
    """
    old = Feature.RWP not in ctx.uffd.offered
    for row in each(ctx, "EV-43"):
        middle, place = row.parts[1], ctx.allocate(row.parts[1].count)
        remap(row.middle, to=place.start)
        row.parts[0].uffd.register(place.range, row.parts[0].mode)
        remap(place.range, to=row.middle.start)
        expect_modes(row.middle, UNREGISTERED)
        lost = [
            number
            for number in (0, 2)
            if old and not in_modes(row.area.page(row.parts[number].first, middle.count))
        ]
        saw(f"the neighbours are {'not all ' if lost else ''}registered as before")
        row.with_middle(FREE).expect_kept(*sorted({0, 1, 2} - set(lost)))


@uffd_case(
    "neighbours-moved-untouched", mem=NOT_HUGETLB, features=WRITEPROTECT, pages=4, rows=("EV-43",), kind=Kind.VERSION
)
def test_neighbours_moved_untouched(ctx: Context) -> None:
    """A registered mapping that nobody has touched, moved behind another of its handle without its event, leaves it be.

    Anonymous memory that was never touched can be put together with whatever it comes beside. Old kernels did that,
    and the neighbour was not registered any more; those that offer UFFD_FEATURE_RWP must not.
    """
    area, place = ctx.dst, ctx.allocate()
    unmap(area.page(2, 2))
    for mode in modes_to_try(ctx):
        if mode & (RWP | MINOR) and not ctx.features & Feature.RWP:
            continue
        ctx.uffd.register(area.page(0, 2), mode)
        ctx.uffd.register(place.page(2, 2), mode)
        remap(place.page(2, 2), to=area.page(2).start)
        with promise("EV-43", str(mode)):
            expect_modes(area.page(2, 2), UNREGISTERED)
            seen = in_modes(area.page(0, 2))
            saw(f"the neighbour is {'registered as before' if seen else 'not registered any more'}")
            if Feature.RWP in ctx.uffd.offered or seen:
                expect(seen, mode, "the neighbour's modes")
        remap(area.page(2, 2), to=place.page(2).start)
        ctx.uffd.unregister(area.page(0, 2))


@uffd_case(
    "neighbours-moved-event",
    mem=ALL,
    features=WRITEPROTECT | Feature.EVENT_REMAP,
    pages=3,
    rows=("EV-19", "EV-26"),
    kind=Kind.DETAIL,
)
def test_neighbours_moved_event(ctx: Context) -> None:
    """A mapping that is moved away and back, each time announced, keeps handle, modes and protection, as do others."""
    for row in each(ctx, "EV-26", Feature.EVENT_REMAP):
        middle, place = row.parts[1], ctx.allocate(row.parts[1].count)
        for start, where in ((place.start, row.middle), (row.middle.start, place.range)):
            call = partial(remap, where, to=start)
            if middle.mode:
                announced(middle.uffd, call, moved(where, start))
            else:
                undisturbed(middle.uffd, call)
            row.expect_modes(0, 2)
        row.expect_kept()


@uffd_case("neighbours-mapped-beside", mem=NOT_HUGETLB, features=WRITEPROTECT, pages=4, rows=("REG-36",))
def test_neighbours_mapped_beside(ctx: Context) -> None:
    """Memory mapped right before or behind registered memory, like it in everything else, is not registered."""
    area = ctx.dst
    for mode in (MISSING, WP, MISSING | WP):
        ctx.uffd.register(area.page(1, 2), mode)
        for number in (0, 3):
            flags = MAP_FIXED | MAP_NORESERVE | (MAP_SHARED if ctx.mem.shared else MAP_PRIVATE)
            flags |= MAP_ANONYMOUS if area.fd is None else 0
            fd = -1 if area.fd is None else area.fd
            map_memory(PAGE_SIZE, at=area.page(number).start, flags=flags, fd=fd, offset=number * PAGE_SIZE)
        with promise("REG-36", str(mode)):
            expect_modes(area.range, UNREGISTERED, mode, mode, UNREGISTERED)
            for number in (0, 3):
                undisturbed(ctx.uffd, partial(area.expect_zero, number, 1))
        ctx.uffd.unregister(area.range)
