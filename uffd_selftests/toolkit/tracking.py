# SPDX-License-Identifier: GPL-2.0-only
"""Write protection, UFFD_FEATURE_WP_ASYNC and PAGEMAP_SCAN: track memory, write to it, ask what was written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from uffd_selftests.abi.uapi import Feature, PageCategory, PmScanFlag
from uffd_selftests.mem_types import Area
from uffd_selftests.toolkit.access import touch
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.faulting import undisturbed
from uffd_selftests.toolkit.handle import WP, WRITEPROTECT, Uffd
from uffd_selftests.toolkit.memory import PAGE_SIZE, Range
from uffd_selftests.toolkit.pagemap import Pagemap, Region, Scan

__all__ = [
    "ASYNC",
    "SCAN",
    "WRITTEN",
    "PRESENT",
    "WPALLOWED",
    "NONE",
    "CHECK",
    "WP_MATCHING",
    "RESTART",
    "SHOWN",
    "Pages",
    "filled",
    "tracked",
    "two_page_tables",
    "write",
    "regions",
    "pages_in",
    "expect_scan",
    "expect_written",
]

ASYNC = WRITEPROTECT | Feature.WP_ASYNC
SCAN = ("pagemap_scan",)
"""What a case needs that asks PAGEMAP_SCAN."""

WRITTEN = PageCategory.WRITTEN
PRESENT = PageCategory.PRESENT
WPALLOWED = PageCategory.WPALLOWED
NONE = PageCategory(0)

CHECK = PmScanFlag.CHECK_WPASYNC
WP_MATCHING = PmScanFlag.WP_MATCHING
RESTART = WP_MATCHING | CHECK
"""Report what was written, and protect it again in the same step."""

SHOWN = 12
"""How many regions a message names."""


@dataclass(frozen=True)
class Pages:
    """A mapping of whatever memory, in pages of ``page_size`` bytes: for PAGEMAP_SCAN as good as an Area."""

    range: Range
    page_size: int

    @property
    def nr_pages(self) -> int:
        """How many pages there are."""
        return self.range.len // self.page_size

    def page(self, number: int, count: int = 1) -> Range:
        """The range of ``count`` pages from page ``number`` on."""
        return Range(self.range.start + number * self.page_size, count * self.page_size)


def filled(ctx: Context) -> Area:
    """Return the destination area, registered for write protection, every page present."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    return ctx.dst


def tracked(ctx: Context) -> Area:
    """Return the destination area, its pages present, registered and protected."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.range)
    return area


def two_page_tables(ctx: Context) -> tuple[Area, int]:
    """Map an empty area of huge pages that needs two page tables; return it and its first page in the second.

    A page table can be there for a neighbour's sake, but not this one: all of its memory is the area's.
    """
    per_table = PAGE_SIZE // 8
    area = ctx.allocate(2 * per_table)
    return area, -(area.start // area.page_size) % per_table


def write(uffd: Uffd, area: Area, *pages: int) -> None:
    """Write to pages, changing nothing; nobody may hear of it."""
    for page in pages:
        undisturbed(uffd, partial(touch, area.page(page), area.page_size, write=True))


def regions(area: Area | Pages, pages: Iterable[int], categories: PageCategory = WRITTEN) -> list[Region]:
    """Return what PAGEMAP_SCAN must report for pages of the same categories."""
    found: list[Region] = []
    for page in sorted(pages):
        start, end = area.page(page).start, area.page(page).end
        if found and found[-1].end == start:
            found[-1] = Region(found[-1].start, end, categories)
        else:
            found.append(Region(start, end, categories))
    return found


def pages_in(area: Area | Pages, found: Iterable[Region]) -> list[int]:
    """Return the numbers of the pages in regions, in their order, whatever their categories."""
    pages: list[int] = []
    for start, end, _ in found:
        pages += range((start - area.range.start) // area.page_size, (end - area.range.start) // area.page_size)
    return pages


def expect_scan(area: Area | Pages, found: Scan, expected: Scan, what: str) -> None:
    """Assert what PAGEMAP_SCAN has found in an area; a failure tells it in pages of the area."""
    if found != expected:
        raise AssertionError(f"{what}: expected {_in_pages(area, expected)}; got {_in_pages(area, found)}")


def _in_pages(area: Area | Pages, scan: Scan) -> str:
    """Say what was found where: ``1-3 PAGE_IS_WRITTEN, up to page 6``."""

    def number(address: int) -> str:
        page, rest = divmod(address - area.range.start, area.page_size)
        return f"{page}+{rest:#x}" if rest else str(page)

    def name(region: Region) -> str:
        first, last = number(region.start), number(region.end - area.page_size)
        return f"{first if first == last else f'{first}-{last}'} {region.categories}"

    some = [name(region) for region in scan.regions[:SHOWN]]
    if len(scan.regions) > SHOWN:
        some.append(f"{len(scan.regions) - SHOWN} more")
    return f"{', '.join(some) or 'none'}, up to page {number(scan.walk_end)}"


def expect_written(area: Area | Pages, pages: Iterable[int], when: str, flags: PmScanFlag = CHECK) -> None:
    """Assert that PAGEMAP_SCAN reports exactly these pages of the area as written, and looks at the whole."""
    found = Pagemap.scan(area.range, WRITTEN, flags=flags, room=max(64, area.nr_pages))
    expect_scan(area, found, Scan(regions(area, pages), area.range.end), when)
