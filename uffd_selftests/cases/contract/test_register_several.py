# SPDX-License-Identifier: GPL-2.0-only
"""Several mappings in one UFFDIO_REGISTER or UFFDIO_UNREGISTER: some registered already, otherwise, by others, or not.

What is asked for comes true of every page in the range, first and last, and of none outside; what is refused for one
mapping's sake, wherever in the range it lies, changes nothing of any.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from errno import EBUSY, EINVAL, EPERM
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, MAP_FIXED, MAP_NORESERVE, MAP_SHARED, MISSING, PM_UFFD_WP, PROT_READ, RWP, SYNC_RWP, UNREGISTERED, WP,
    WRITEPROTECT, Area, Context, Pagemap, Range, RegisterMode, Uffd, expect, expect_free, expect_modes,
    expect_rwp_trapped, expect_same, expect_served, expect_trapped, faulting, in_modes, mend, new_mapping, plain_file,
    promise, protect, refuses, smaps_fields, undisturbed, unmap,
)  # fmt: skip

FREE = UNREGISTERED
WAITED_FOR = 2
"""A missing page of which the state before says that a thread waits for it."""
READ_ONLY = 4


@dataclass(frozen=True)
class Mix:
    """Eight pages, most of them a mapping of its own; pages 1 to 6 are what requests are about."""

    ctx: Context
    uffd: Uffd
    protection: RegisterMode
    """WP or RWP."""
    area: Area

    @property
    def range(self) -> Range:
        """Pages 1 to 6."""
        return self.area.page(1, 6)

    @property
    def modes(self) -> list[RegisterMode]:
        """In which modes the pages are: 3 and 5 are protected, 2 is missing and waited for, 4 read-only."""
        return [MISSING, FREE, MISSING, self.protection, FREE, MISSING | self.protection, FREE, FREE]

    def protect(self, number: int) -> None:
        """Protect a page, as its mode says."""
        (self.uffd.rwprotect if self.protection == RWP else self.uffd.writeprotect)(self.area.page(number))

    def expect_trapped(self, *numbers: int) -> None:
        """Assert that an access to each of the pages is trapped, and put back what was written."""
        if self.protection == RWP:
            expect_rwp_trapped(self.uffd, self.area, *numbers)
        else:
            expect_trapped(self.uffd, self.area, *numbers)
            mend(self.ctx, self.area, *numbers)


@contextmanager
def mix(ctx: Context, protection: RegisterMode) -> Iterator[Mix]:
    """Have pages of all kinds, with a thread asleep in one that is missing; what is left must wake or serve it."""
    area = ctx.mem.allocate(8)
    made = Mix(ctx, ctx.uffd, protection, area)
    for number in (3, READ_ONLY, 5):
        area.fill(number, 1)
    for number, mode in enumerate(made.modes):
        if mode:
            ctx.uffd.register(area.page(number), mode)
        if mode & protection:
            made.protect(number)
    protect(area.page(READ_ONLY), PROT_READ)
    expect_modes(area.range, *made.modes)
    with faulting(ctx.uffd, area.page(WAITED_FOR).start):
        yield made
    area.close()


def serve(on: Mix, number: int) -> None:
    """Fill a missing page."""
    page = on.area.page(number)
    on.uffd.copy(page.start, on.ctx.src.page(number).start, page.len)
    expect_same(on.ctx.src.page(number).start, page.start, page.len, f"page {number} filled")


def register_several(ctx: Context, protection: RegisterMode) -> None:
    """Register the mix as a whole, and look at each page."""
    ctx.src.fill()
    both = MISSING | protection
    with mix(ctx, protection) as on, promise("REG-37"):
        ctx.uffd.register(on.range, both)
        expect_modes(on.area.range, MISSING, *[both] * 6, FREE)
        Pagemap.expect_protected(on.area, (3, 5), "after UFFDIO_REGISTER")
        ctx.uffd.expect_still_asleep(1)
        serve(on, WAITED_FOR)
        for number in (0, 1, 6):
            with promise(f"page {number}"), faulting(ctx.uffd, on.area.page(number).start):
                serve(on, number)
        on.expect_trapped(3, 5)
        undisturbed(ctx.uffd, partial(on.area.expect_zero, 7, 1))
        undisturbed(ctx.uffd, partial(on.area.expect_pattern_of, on.area, 3, 3))
        for number in (1, READ_ONLY, 6):
            on.protect(number)
        Pagemap.expect_protected(on.area, (1, READ_ONLY, 6), "when pages newly registered were protected")
        on.expect_trapped(1, 6)


@uffd_case("register-several", mem=ALL, features=WRITEPROTECT, pages=8, rows=("REG-37", "REG-24"), kind=Kind.DETAIL)
def test_register_several(ctx: Context) -> None:
    """One call gives every page of the range its modes, whatever they were; protection and sleepers stay as before."""
    register_several(ctx, WP)


@uffd_case("register-several-rwp", mem=ALL, features=SYNC_RWP, pages=8, rows=("REG-37", "REG-50"), kind=Kind.DETAIL)
def test_register_several_rwp(ctx: Context) -> None:
    """One call gives every page of the range RWP, whatever it was; protection and sleepers stay as they are."""
    register_several(ctx, RWP)


@uffd_case("register-cuts-both-ends", mem=ALL, features=WRITEPROTECT, pages=8, rows=("REG-36",), kind=Kind.DETAIL)
def test_register_cuts_both_ends(ctx: Context) -> None:
    """A range from inside of one mapping to inside of another changes just the parts of them that lie in it."""
    area, both = ctx.dst, MISSING | WP
    ctx.uffd.register(area.page(0, 3), MISSING)
    ctx.uffd.register(area.page(4, 4), WP)
    with promise("REG-36", "UFFDIO_REGISTER"):
        ctx.uffd.register(area.page(2, 4), both)
        expect_modes(area.range, MISSING, MISSING, both, both, both, both, WP, WP)
        for number in (0, 1, 2, 5):
            expect_served(ctx, area.page(number))
        undisturbed(ctx.uffd, partial(area.expect_zero, 6, 2))
        for first, count in ((2, 1), (5, 1), (6, 2)):  # Linux 6.1 wants each within one mapping
            ctx.uffd.writeprotect(area.page(first, count))
        Pagemap.expect_protected(area, (2, 5, 6, 7), "after UFFDIO_WRITEPROTECT")
    with promise("REG-36", "UFFDIO_UNREGISTER"):
        ctx.uffd.unregister(area.page(1, 6))
        expect_modes(area.range, MISSING, *[FREE] * 6, WP)
        Pagemap.expect_protected(area, (7,), "after UFFDIO_UNREGISTER")
        expect_trapped(ctx.uffd, area, 7)
        expect_free(ctx.uffd, area, 1, 2, 3, 4, 5, 6)


@uffd_case("register-over-holes", mem=ALL, features=WRITEPROTECT, pages=8, rows=("REG-10", "REG-24"), kind=Kind.DETAIL)
def test_register_over_holes(ctx: Context) -> None:
    """Behind a hole in the range, too, a mapping registered in one of the modes gets the others."""
    ctx.src.fill()
    area, both = ctx.dst, MISSING | WP
    area.fill(6, 1)
    before = {0: MISSING, 2: MISSING, 4: FREE, 6: WP}
    for hole in (1, 3, 5):
        unmap(area.page(hole))
    for number, mode in before.items():
        if mode:
            ctx.uffd.register(area.page(number), mode)
    ctx.uffd.writeprotect(area.page(6))
    with promise("REG-10"):
        ctx.uffd.register(area.page(0, 7), both)
        for number in before:
            with promise(f"page {number}"):
                expect_modes(area.page(number), both)
        expect_modes(area.page(7), FREE)
        for number in (0, 2, 4):
            expect_served(ctx, area.page(number))
            ctx.uffd.writeprotect(area.page(number))
        for number in before:
            expect(any(Pagemap.have(area.page(number), PM_UFFD_WP)), True, f"whether page {number} is protected")
            expect_trapped(ctx.uffd, area, number)
        undisturbed(ctx.uffd, partial(area.expect_zero, 7, 1))


# ---- one that is in the way ----------------------------------------------------------------------------------------


def in_the_way(ctx: Context, stack: ExitStack) -> Iterator[tuple[str, int, Callable[[Mix, Range], object]]]:
    """Yield what makes a page one that cannot be registered: its name, the errno, and how it is done."""

    def foreign(on: Mix, page: Range) -> None:
        on.uffd.unregister(page)
        stack.enter_context(Uffd.open()).register(page, MISSING)

    def file(_: Mix, page: Range) -> None:
        fd = stack.enter_context(plain_file(page.len))
        new_mapping(page.len, MAP_SHARED | MAP_FIXED, fd=fd, at=page.start)

    def sealed(on: Mix, page: Range) -> None:
        fd = os.open(f"/proc/self/fd/{on.area.fd}", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        new_mapping(page.len, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, prot=PROT_READ, fd=fd, at=page.start)

    yield "another handle's memory", EBUSY, foreign
    yield "a file", EINVAL, file
    if ctx.mem.shared:
        yield "a mapping that can never be written", EPERM, sealed


def refuse_several(ctx: Context, protection: RegisterMode) -> None:
    """Put what cannot be registered first, in the middle and last in the range, and assert that nothing changes."""
    ctx.src.fill()
    with ExitStack() as unused:
        kinds = len(list(in_the_way(ctx, unused)))
    for number in (1, READ_ONLY, 6):
        for kind in range(kinds):
            with ExitStack() as stack:
                name, wanted, make = list(in_the_way(ctx, stack))[kind]
                with promise("REG-22, REG-11, REG-13", f"{name} is page {number}"), mix(ctx, protection) as on:
                    make(on, on.area.page(number))
                    refuse_one(on, wanted)


def refuse_one(on: Mix, wanted: int) -> None:
    """Try to register a mix that has one page in the way, and look at each page afterwards."""
    area = on.area
    before = [in_modes(area.page(number)) for number in range(area.nr_pages)]
    mappings = [fields["start"] for fields in smaps_fields(area.range)]
    for where in (on.range, area.range):
        with refuses(wanted):
            on.uffd.register(where, MISSING | on.protection)
    expect_modes(area.range, *before)
    expect([fields["start"] for fields in smaps_fields(area.range)], mappings, "mappings of the area")
    Pagemap.expect_protected(area, (3, 5), "after the refusal")
    on.uffd.expect_still_asleep(1)
    serve(on, WAITED_FOR)
    with faulting(on.uffd, area.start):
        serve(on, 0)
    on.expect_trapped(3, 5)
    undisturbed(on.uffd, partial(area.expect_zero, 7, 1))
    undisturbed(on.uffd, partial(area.expect_pattern_of, area, 3, 1))


@uffd_case(
    "register-several-refused",
    mem=ALL,
    features=WRITEPROTECT,
    pages=8,
    rows=("REG-11", "REG-13", "REG-22"),
    kind=Kind.DETAIL,
)
def test_register_several_refused(ctx: Context) -> None:
    """A mapping that cannot be registered, first, in the middle or last in the range, leaves all others as before."""
    refuse_several(ctx, WP)


@uffd_case(
    "register-several-refused-rwp", mem=ALL, features=SYNC_RWP, pages=8, rows=("REG-49", "REG-53"), kind=Kind.DETAIL
)
def test_register_several_refused_rwp(ctx: Context) -> None:
    """For RWP, too, one mapping that cannot be registered leaves all others of the range as they were."""
    refuse_several(ctx, RWP)


# ---- UFFDIO_UNREGISTER ---------------------------------------------------------------------------------------------


def unregister_several(ctx: Context, protection: RegisterMode) -> None:
    """Unregister the mix as a whole, and look at each page; with a file in the way nothing may change."""
    ctx.src.fill()
    for number in (1, 6, None):
        with ExitStack() as stack, promise("UNR-05, UNR-08"), mix(ctx, protection) as on:
            area = on.area
            if number is not None:
                _, _, put_file = list(in_the_way(ctx, stack))[1]
                put_file(on, area.page(number))
                with refuses(EINVAL):
                    ctx.uffd.unregister(on.range)
                expect_modes(area.range, *on.modes)
                Pagemap.expect_protected(area, (3, 5), "after the refusal")
                ctx.uffd.expect_still_asleep(1)
                on.expect_trapped(3, 5)
                serve(on, WAITED_FOR)
                continue
            with faulting(ctx.uffd, area.start):
                ctx.uffd.unregister(on.range)
                expect_modes(area.range, MISSING, *[FREE] * 7)
                Pagemap.expect_protected(area, (), "after UFFDIO_UNREGISTER")
                state = ctx.uffd.fdinfo
                expect(state.total - state.pending, 1, "threads that sleep on, of one inside and one outside")
                ctx.uffd.wake(on.range)
                serve(on, 0)
            undisturbed(ctx.uffd, partial(area.expect_zero, 1, 2))
            undisturbed(ctx.uffd, partial(area.expect_pattern_of, area, 3, 3))
            expect_free(ctx.uffd, area, 1, 2, 3, 5, 6, 7)


@uffd_case("unregister-several", mem=ALL, features=WRITEPROTECT, pages=8, rows=("UNR-08", "UNR-13"), kind=Kind.DETAIL)
def test_unregister_several(ctx: Context) -> None:
    """One call takes registration and protection of every page of the range, or with a file in it, of none."""
    unregister_several(ctx, WP)


@uffd_case("unregister-several-rwp", mem=ALL, features=SYNC_RWP, pages=8, rows=("UNR-16", "UNR-08"), kind=Kind.DETAIL)
def test_unregister_several_rwp(ctx: Context) -> None:
    """One call takes RWP and its protection of every page of the range, or with a file in it, of none."""
    unregister_several(ctx, RWP)


@uffd_case("unregister-over-holes", mem=ALL, features=WRITEPROTECT, pages=8, rows=("UNR-02",), kind=Kind.DETAIL)
def test_unregister_over_holes(ctx: Context) -> None:
    """Behind a hole in the range, too, registration and protection are taken, in whatever modes it is."""
    area = ctx.dst
    area.fill()
    modes = {0: WP, 2: WP, 4: MISSING | WP, 6: WP, 7: WP}
    for hole in (1, 3, 5):
        unmap(area.page(hole))
    for number, mode in modes.items():
        ctx.uffd.register(area.page(number), mode)
        ctx.uffd.writeprotect(area.page(number))
    ctx.uffd.unregister(area.page(0, 7))
    for number in modes:
        with promise("UNR-02", f"page {number}"):
            left = number == 7
            expect_modes(area.page(number), WP if left else FREE)
            expect(any(Pagemap.have(area.page(number), PM_UFFD_WP)), left, "whether it is protected")
    expect_free(ctx.uffd, area, 0, 2, 4, 6)
    expect_trapped(ctx.uffd, area, 7)
