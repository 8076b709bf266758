# SPDX-License-Identifier: GPL-2.0-only
"""UFFD_FEATURE_WP_ASYNC and PAGEMAP_SCAN as the cases use them: track memory, write to it, ask what was written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from uffd_selftests.common import WP, Context, Pagemap, Region, Scan, Uffd, expect
from uffd_selftests.mem_types import Area
from uffd_selftests.memory import Range, touch
from uffd_selftests.processes import undisturbed
from uffd_selftests.uapi import Feature, PageCategory, PmScanFlag

ASYNC = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_ASYNC
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


def tracked(ctx: Context) -> Area:
    """Return the destination area, its pages present, registered and protected."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    return ctx.dst


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


def expect_written(area: Area | Pages, pages: Iterable[int], when: str, flags: PmScanFlag = CHECK) -> None:
    """Assert that PAGEMAP_SCAN reports exactly these pages of the area as written, and looks at the whole."""
    found = Pagemap.scan(area.range, WRITTEN, flags=flags, room=max(64, area.nr_pages))
    expect(found, Scan(regions(area, pages), area.range.end), when)
