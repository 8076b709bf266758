# SPDX-License-Identifier: GPL-2.0-only
"""What the tools for PAGEMAP_SCAN say, without asking the kernel."""

from __future__ import annotations

import pytest

from uffd_selftests.toolkit.memory import PAGE_SIZE, Range
from uffd_selftests.toolkit.pagemap import Region, Scan
from uffd_selftests.toolkit.tracking import WRITTEN, Pages, expect_scan, regions

PAGES = Pages(Range(16 * PAGE_SIZE, 6 * PAGE_SIZE), PAGE_SIZE)


def test_neighbours_are_one_region() -> None:
    """Pages that follow each other make one region."""
    start = PAGES.range.start
    two = Region(start + PAGE_SIZE, start + 3 * PAGE_SIZE, WRITTEN)
    assert regions(PAGES, (5, 2, 1)) == [two, Region(start + 5 * PAGE_SIZE, start + 6 * PAGE_SIZE, WRITTEN)]
    assert regions(PAGES, ()) == []


def test_a_wrong_scan_is_told_in_pages() -> None:
    """A failure names pages, categories and the place where the scan stopped, each once expected and once observed."""
    expected = Scan(regions(PAGES, (1, 2, 5)), PAGES.range.end)
    expect_scan(PAGES, expected, expected, "pages written")
    found = Scan([], PAGES.page(3).start + 0x10)
    with pytest.raises(AssertionError) as failure:
        expect_scan(PAGES, found, expected, "pages written")
    wanted = "expected 1-2 PAGE_IS_WRITTEN, 5 PAGE_IS_WRITTEN, up to page 6; got none, up to page 3+0x10"
    assert str(failure.value) == f"pages written: {wanted}"
