# SPDX-License-Identifier: GPL-2.0-only
"""Requests over pages of every kind: the odd page in the middle is treated as the others are."""

from __future__ import annotations

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, FILE_BACKED, MOST_HUGE_KINDS, RWP, SYNC_RWP, WP, WRITEPROTECT, Context, Feature, Kinds, Pagemap, Skip,
    expect_free, expect_rwp_free, expect_rwp_trapped, expect_trapped, pages_of_all_kinds, promise,
)  # fmt: skip


def each(kinds: Kinds, pages: list[int]) -> list[tuple[int, str]]:
    """Return pages with what a message calls them."""
    return [(page, f"{kinds.kinds[page]} ({page})") for page in pages]


@uffd_case(
    "writeprotect-kinds", mem=ALL, features=WRITEPROTECT, pages=1, spare_hugepages=MOST_HUGE_KINDS,
    rows=("WP-07", "WP-12"), kind=Kind.DETAIL,
)  # fmt: skip
def test_writeprotect_kinds(ctx: Context) -> None:
    """One UFFDIO_WRITEPROTECT protects every page of its range, whatever its kind, and another one frees them all."""
    if Feature.WP_UNPOPULATED not in ctx.uffd.offered:  # which came with the release that this came with
        raise Skip("a range of several mappings is ENOENT (Linux 6.4)")
    with pages_of_all_kinds(ctx) as kinds:
        area = kinds.area
        marked = kinds.pages() if area.mem in FILE_BACKED else kinds.there  # of a file what is not there, too
        ctx.uffd.register(area.range, WP)
        ctx.uffd.writeprotect(area.range)
        Pagemap.expect_protected(area, marked, f"after UFFDIO_WRITEPROTECT of {kinds.kinds}")
        ctx.uffd.unprotect(area.range)
        Pagemap.expect_protected(area, (), f"after it was taken back, of {kinds.kinds}")
        for page, name in each(kinds, kinds.there):
            with promise("WP-12", name):
                expect_free(ctx.uffd, area, page)
        ctx.uffd.writeprotect(area.range)
        for page, name in each(kinds, kinds.there):
            with promise("WP-07", name):
                expect_trapped(ctx.uffd, area, page)


@uffd_case(
    "rwprotect-kinds", mem=ALL, features=SYNC_RWP, pages=1, spare_hugepages=MOST_HUGE_KINDS,
    rows=("RW-01", "RW-02", "RW-13"), kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_kinds(ctx: Context) -> None:
    """One UFFDIO_RWPROTECT protects every page that is there, whatever its kind, and another one frees them all."""
    with pages_of_all_kinds(ctx) as kinds:
        area = kinds.area
        ctx.uffd.register(area.range, RWP)
        ctx.uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, kinds.there, f"after UFFDIO_RWPROTECT of {kinds.kinds}")
        ctx.uffd.resolve(area.range)
        Pagemap.expect_protected(area, (), f"after it was resolved, of {kinds.kinds}")
        for page, name in each(kinds, kinds.there):
            with promise("RW-02", name):
                expect_rwp_free(ctx.uffd, area, page)
        ctx.uffd.rwprotect(area.range)
        for number, (page, name) in enumerate(each(kinds, kinds.there)):
            with promise("RW-01", name):
                expect_rwp_trapped(ctx.uffd, area, page, write=bool(number % 2))
        for page, name in each(kinds, sorted(set(kinds.pages()) - set(kinds.there))):
            with promise("RW-13", name):
                expect_rwp_free(ctx.uffd, area, page)
