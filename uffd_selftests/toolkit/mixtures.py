# SPDX-License-Identifier: GPL-2.0-only
"""Areas with a page of every kind, some of them protected: what has to cross a fork, an mremap, an mprotect."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from uffd_selftests.abi import uapi
from uffd_selftests.abi.uapi import RegisterMode
from uffd_selftests.mem_types import ANON, PRIVATE, Area, pmd_size
from uffd_selftests.toolkit.access import peek, poke, touch
from uffd_selftests.toolkit.contents import expect_bytes
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import Skip, expect
from uffd_selftests.toolkit.faulting import expect_trapped, undisturbed
from uffd_selftests.toolkit.folios import Protection
from uffd_selftests.toolkit.handle import RWP, WP, Uffd
from uffd_selftests.toolkit.memory import PAGE_SIZE, TABLE_BYTES, Advice, Range, advise, keep_small
from uffd_selftests.toolkit.pagemap import Pagemap
from uffd_selftests.toolkit.rwp import expect_rwp_trapped
from uffd_selftests.toolkit.smaps import pmd_mapped
from uffd_selftests.toolkit.swap import swap_out

__all__ = ["MIXED", "Mixture", "mixture", "HugeMixture", "huge_mixture", "two_tables"]

MIXED = 9
"""Pages of a mixture."""


class Mixture:
    """Nine pages of an area, of which those from 1 to 6 were protected in one request, by RWP or by WP.

    The pages 1 and 5 are mapped; 2 was in swap when it was protected, and 6 went there afterwards; 3 is the zero page;
    4 is missing. Of the neighbours 0 and 8 are mapped, and 7 is in swap. Only private memory is swapped out, only
    anonymous memory has a zero page; elsewhere these pages are mapped, and page 3 is zero all the same.
    """

    RANGE = (1, 6)
    """The first page that was protected, and how many were."""

    def __init__(self, area: Area, mode: RegisterMode) -> None:
        self.area = area
        self.mode = mode
        marked = [] if mode & RWP or area.mem == ANON else [4]  # UFFDIO_WRITEPROTECT leaves markers in files
        self.protected = {1, 2, 3, 5, 6, *marked}
        """The pages that carry the protection."""
        self.swapped = {2, 6, 7} if area.mem in PRIVATE and not area.mem.hugetlb else set[int]()
        """The pages in swap."""
        self.free = {0, 4, 7, 8} - self.protected
        """The pages at which nobody is trapped."""

    def expect_contents(self, area: Area | None = None) -> None:
        """Read every byte, in this area or in another that has the pages now; pages 3 and 4 must read as zero."""
        area = area or self.area
        for page in range(MIXED):
            if page in (3, 4):
                expect_bytes(area.page(page), 0, f"page {page}")
            else:
                self.area.pattern.verify(area.start, page, 1)

    def expect_marks(self, when: str, area: Area | None = None) -> None:
        """Assert that exactly the protected pages are marked, and that what is in swap is still there."""
        area = area or self.area
        Pagemap.expect_protected(area, self.protected, when)
        self.expect_swapped(when, area)

    def expect_swapped(self, when: str, area: Area | None = None) -> None:
        """Assert which pages are in swap: those of the beginning, in whichever area has them now."""
        area = area or self.area
        if self.swapped:
            marks = Pagemap.have(area.range, uapi.PM_SWAP)
            swapped = {page for page in range(MIXED) if marks[page]} - (self.protected & {4})  # a marker shows as one
            expect(swapped, self.swapped, f"pages in swap {when}")

    def expect_unmarked(self, when: str, area: Area | None = None) -> None:
        """Assert that no page is marked, and that what is in swap is still there."""
        Pagemap.expect_protected(area or self.area, (), when)
        self.expect_swapped(when, area)

    def expect_accessible(self, area: Area | None = None, uffd: Uffd | None = None) -> None:
        """Read every byte and write to every page, which must not be announced to the handle."""

        def access() -> None:
            self.expect_contents(area)
            touch((area or self.area).range, self.area.page_size, write=True)

        undisturbed(uffd, access) if uffd else access()

    def expect_trapped(self, uffd: Uffd, area: Area | None = None) -> None:
        """Assert that each protected page traps, and goes on when resolved, and that no other one does."""
        area = area or self.area
        for page in sorted(self.free - {4}):  # which would be there then
            for write in (False, True):
                undisturbed(uffd, partial(touch, area.page(page), area.page_size, write=write))
        for page in sorted(self.protected):
            if self.mode & RWP:
                expect_rwp_trapped(uffd, area, page, write=page in (5, 6))
            else:
                expect_trapped(uffd, area, page)
            if self.mode & WP or page in (5, 6):
                self.rewrite(page, area)
        Pagemap.expect_protected(area, (), "after every page was resolved")
        undisturbed(uffd, lambda: self.expect_contents(area))

    def rewrite(self, page: int, area: Area | None = None) -> None:
        """Store in the first bytes of a page what is there: a write alone, which changes nothing."""
        poke((area or self.area).page(page).start, self.area.pattern.head(page) if page not in (3, 4) else bytes(8))


def mixture(
    ctx: Context,
    mode: RegisterMode = RWP,
    *,
    uffd: Uffd | None = None,
    area: Area | None = None,
    before: Callable[[Area], object] = lambda area: None,
) -> Mixture:
    """Make a mixture of pages in the destination area (or another one), registered and protected in this mode.

    ``before`` is called with the area when its pages are there, and nothing is registered yet.
    """
    area, uffd = area or ctx.dst, uffd or ctx.uffd
    mix = Mixture(area, mode)
    if not area.mem.hugetlb:
        keep_small(area.range)
    for page in set(range(MIXED)) - {3, 4}:
        area.fill(page, 1)
    peek(area.page(3).start)
    before(area)
    if mix.swapped:
        for page in (2, 7):
            swap_out(area.page(page))
    uffd.register(area.range, mode)
    first, count = Mixture.RANGE
    (uffd.rwprotect if mode & RWP else uffd.writeprotect)(area.page(first, count))
    if mix.swapped:
        swap_out(area.page(6))
    mix.expect_marks("at the beginning")
    return mix


class HugeMixture:
    """Three transparent huge pages' worth of anonymous memory.

    The first huge page is protected as a whole, of the second only the pages that ``cut`` names, the third not at all.
    """

    def __init__(self, area: Area, mode: RegisterMode) -> None:
        self.area = area
        self.mode = mode
        self.count = pmd_size() // PAGE_SIZE
        self.cut = range(self.count + 5, self.count + 9)
        self.protected = {*range(self.count), *self.cut}

    def whole(self, number: int) -> Range:
        """The range of one of the huge pages."""
        return self.area.page(number * self.count, self.count)

    def expect_marks(self, when: str, area: Area | None = None, pages: Iterable[int] | None = None) -> None:
        """Assert that exactly the protected pages (or these) are marked."""
        Pagemap.expect_protected(area or self.area, self.protected if pages is None else pages, when)

    def expect_contents(self, area: Area | None = None) -> None:
        """Read every byte."""
        self.area.pattern.verify((area or self.area).start, 0, 3 * self.count)

    def expect_trapped(self, uffd: Uffd, area: Area | None = None) -> None:
        """Assert that pages trap where they are protected, and that their neighbours do not; then resolve all."""
        area = area or self.area
        for page in (self.cut[0] - 1, self.cut[-1] + 1, 2 * self.count, 3 * self.count - 1):
            for write in (False, True):
                undisturbed(uffd, partial(touch, area.page(page), area.page_size, write=write))
        chosen = {0, 7, self.count - 1, self.cut[0], self.cut[-1]}
        for page in sorted(chosen):
            written = self.mode == WP or page in (7, self.cut[-1])
            if self.mode == WP:
                expect_trapped(uffd, area, page)
            else:
                expect_rwp_trapped(uffd, area, page, write=written)
            if written:
                poke(area.page(page).start, self.area.pattern.head(page))
        self.expect_marks("after some were resolved", area, self.protected - chosen)
        (uffd.unprotect if self.mode == WP else uffd.resolve)(area.range)
        self.expect_marks("after all were resolved", area, ())
        undisturbed(uffd, lambda: self.expect_contents(area))


def huge_mixture(
    ctx: Context, mode: RegisterMode = RWP, *, before: Callable[[Area], object] = lambda area: None
) -> HugeMixture:
    """Make such an area, registered for RWP or WP; Skip where there are no huge pages to be had.

    ``before`` is called with the area when its pages are there, and nothing is registered yet.
    """
    size = pmd_size()
    area = ctx.allocate(3 * size // PAGE_SIZE)
    advise(area.range, Advice.HUGEPAGE)
    area.fill()
    if pmd_mapped(area.range) < area.range.len:
        raise Skip("no transparent huge pages to be had: memory is fragmented")
    mix = HugeMixture(area, mode)
    before(area)
    ctx.uffd.register(area.range, mode)
    protect = ctx.uffd.writeprotect if mode == WP else ctx.uffd.rwprotect
    protect(mix.whole(0))
    expect(pmd_mapped(area.range), 3 * size, "bytes mapped by PMD after a whole huge page was protected")
    protect(area.page(mix.cut[0], len(mix.cut)))
    mix.expect_marks("at the beginning")
    return mix


def two_tables(ctx: Context, guard: Protection) -> tuple[Area, list[int]]:
    """Map an area as large as what two page tables map, registered, with a page here and there; return which pages.

    They are at both ends of each table and between. Every second of them is protected, from the first on.
    """
    count = TABLE_BYTES // PAGE_SIZE
    area = ctx.allocate(2 * count)
    keep_small(area.range)
    pages = sorted({0, 1, 2, 7, count // 2, count - 2, count - 1, count, count + 1, 2 * count - 2, 2 * count - 1})
    for page in pages:
        area.fill(page, 1)
    ctx.uffd.register(area.range, guard.mode)
    guard.set(ctx.uffd, area, pages[::2])
    return area, pages
