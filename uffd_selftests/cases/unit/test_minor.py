# SPDX-License-Identifier: GPL-2.0-only
"""Minor faults: the page is in the page cache, only its page table entry is missing."""

from __future__ import annotations

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    HUGETLB, MINOR, SHMEM, WP, Advice, Context, ContinueMode, Feature, KernelError, Pagemap, Skip, advise, errno_name,
    expect, pmd_mapped,
)  # fmt: skip


def minor(ctx: Context, *, wp: bool = False) -> None:
    """Fill one mapping, read the other, registered one; the handler flips each page, then lets it be mapped."""
    area = ctx.dst
    ctx.uffd.register(area.alias, MINOR | WP if wp else MINOR)
    area.fill()
    ctx.uffd.expect_no_message()

    mode = ContinueMode.WP if wp else ContinueMode(0)
    with ctx.handler(
        where=area.alias, src=None, flip=area.range, continue_mode=mode, retry=True, retry_at=area.alias
    ) as handler:
        area.expect_pattern(area.alias, flipped=True)

    seen = handler.stats
    expect((seen.minor, seen.messages), (ctx.nr_pages, ctx.nr_pages), "minor faults, messages")


@uffd_case(
    "minor",
    mem=(SHMEM, HUGETLB),
    features=Feature.MINOR_HUGETLBFS | Feature.MINOR_SHMEM,
    rows=("CT-01", "CT-02", "CT-04", "CT-24"),
)
def test_minor(ctx: Context) -> None:
    """The first touch of a cached page is one minor fault; UFFDIO_CONTINUE maps what the page cache holds by then."""
    minor(ctx)


@uffd_case(
    "minor-wp",
    mem=(SHMEM, HUGETLB),
    # No bit of its own says that UFFDIO_CONTINUE can protect; it came with WP_UNPOPULATED.
    features=Feature.MINOR_HUGETLBFS
    | Feature.MINOR_SHMEM
    | Feature.PAGEFAULT_FLAG_WP
    | Feature.WP_UNPOPULATED,
    rows=("CT-01", "CT-10"),
)
def test_minor_wp(ctx: Context) -> None:
    """UFFDIO_CONTINUE_MODE_WP maps the cached page write-protected."""
    minor(ctx, wp=True)
    for page in (0, ctx.nr_pages - 1):
        Pagemap.expect_uffd_wp(ctx.dst.alias_page(page).start, True, f"page {page} after UFFDIO_CONTINUE_MODE_WP")


@uffd_case("minor-collapse", mem=(SHMEM,), features=Feature.MINOR_SHMEM, rows=("CT-23",))
def test_minor_collapse(ctx: Context) -> None:
    """MADV_COLLAPSE makes huge pages of a range that minor faults have mapped, and keeps its contents."""
    minor(ctx)
    try:
        advise(ctx.dst.alias, Advice.COLLAPSE)
    except KernelError as error:
        raise Skip(f"MADV_COLLAPSE: {errno_name(error.errno or 0)}") from None
    expect(pmd_mapped(ctx.dst.alias), ctx.dst.range.len, "bytes mapped by PMD after MADV_COLLAPSE")
    ctx.dst.expect_pattern(ctx.dst.alias, flipped=True)
