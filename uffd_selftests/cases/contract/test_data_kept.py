# SPDX-License-Identifier: GPL-2.0-only
"""What was filled, then protected, let go or tracked, and then taken out of memory, comes back as it was.

That a page which UFFDIO_COPY filled has been changed is known from its page table entry alone. A request that makes a
new entry of it and leaves that out loses the data of shared memory when memory gets short.
"""

from __future__ import annotations

from collections.abc import Callable

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ASYNC, ASYNC_RWP, MISSING, NOT_HUGETLB, PM_PRESENT, RWP, SCAN, SYNC_RWP, WP, WP_MATCHING, WRITEPROTECT, WRITTEN,
    Context, Pagemap, Range, RegisterMode, expect, keep_small, page_out, promise, touch, undisturbed,
)  # fmt: skip

PAGES = 6


def expect_kept(ctx: Context, mode: RegisterMode, what: str, *requests: Callable[[Range], object]) -> None:
    """Assert that pages come back as UFFDIO_COPY filled them when requests for the inner ones were made meanwhile."""
    with promise(what):
        area = ctx.allocate(PAGES)
        keep_small(area.range)
        ctx.src.fill()
        ctx.uffd.register(area.range, MISSING | mode)
        ctx.uffd.copy(area.start, ctx.src.start, area.range.len)
        for request in requests:
            request(area.page(1, PAGES - 2))
        page_out(area.range, lambda: not any(Pagemap.have(area.range, PM_PRESENT)))
        ctx.uffd.expect_no_message()
        ctx.uffd.unregister(area.range)
        undisturbed(ctx.uffd, lambda: area.expect_pattern_of(ctx.src))


@uffd_case(
    "kept-writeprotect", mem=NOT_HUGETLB, features=WRITEPROTECT, needs=("swap",), pages=PAGES, rows=("WP-23",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_kept_writeprotect(ctx: Context) -> None:
    """Filled pages come back from swap as they were when they were protected, let go or unregistered meanwhile."""
    uffd = ctx.uffd
    expect_kept(ctx, WP, "protected", uffd.writeprotect)
    expect_kept(ctx, WP, "protected and let go", uffd.writeprotect, uffd.unprotect)
    expect_kept(ctx, WP, "protected and unregistered", uffd.writeprotect, uffd.unregister)


@uffd_case(
    "kept-rwprotect", mem=NOT_HUGETLB, features=SYNC_RWP, needs=("swap",), pages=PAGES, rows=("RW-31",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_kept_rwprotect(ctx: Context) -> None:
    """Filled pages come back from swap as they were when they were read-write protected or let go meanwhile."""
    uffd = ctx.uffd
    expect_kept(ctx, RWP, "protected", uffd.rwprotect)
    expect_kept(ctx, RWP, "protected and let go", uffd.rwprotect, uffd.resolve)
    expect_kept(ctx, RWP, "protected and unregistered", uffd.rwprotect, uffd.unregister)


@uffd_case(
    "kept-accessed", mem=NOT_HUGETLB, features=ASYNC_RWP, needs=("swap",), pages=PAGES, rows=("RW-77", "RW-31"),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_kept_accessed(ctx: Context) -> None:
    """Filled pages come back from swap as they were when an asynchronous protection ended with a read of them."""

    def read(where: Range) -> None:
        undisturbed(ctx.uffd, lambda: touch(where, ctx.page_size))

    expect_kept(ctx, RWP, "protected and read", ctx.uffd.rwprotect, read)


@uffd_case(
    "kept-scan", mem=NOT_HUGETLB, features=ASYNC, needs=("swap", *SCAN), pages=PAGES, rows=("AS-04", "WP-23"),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_kept_scan(ctx: Context) -> None:
    """Filled pages come back from swap as they were when PM_SCAN_WP_MATCHING protected them meanwhile."""

    def scan(where: Range) -> None:
        found = Pagemap.scan(where, WRITTEN, flags=WP_MATCHING)
        expect([(region.start, region.end) for region in found.regions], [(where.start, where.end)], "pages written")

    expect_kept(ctx, WP, "protected by a scan", scan)
    expect_kept(ctx, WP, "protected, and let go", scan, ctx.uffd.unprotect)
