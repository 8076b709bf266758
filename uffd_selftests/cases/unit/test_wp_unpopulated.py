# SPDX-License-Identifier: GPL-2.0-only
"""Write protection of anonymous memory that has no page yet."""

from __future__ import annotations

from uffd_selftests.case import uffd_case
from uffd_selftests.common import ANON, WP, Advice, Context, Feature, Pagemap, advise, poke


@uffd_case(
    "wp-unpopulated",
    mem=(ANON,),
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED,
    pages=2,
    rows=("WP-12", "WP-15"),
)
def test_wp_unpopulated(ctx: Context) -> None:
    """With UFFD_FEATURE_WP_UNPOPULATED a missing page is protected by a marker that un-protecting and zapping drop."""
    page = ctx.dst.page(0)
    ctx.uffd.register(ctx.dst.range, WP)

    ctx.uffd.writeprotect(page)
    Pagemap.expect_uffd_wp(page.start, True, "after protecting a missing page")
    ctx.uffd.unprotect(page)
    Pagemap.expect_uffd_wp(page.start, False, "after un-protecting it")

    ctx.uffd.writeprotect(page)
    advise(page, Advice.DONTNEED)
    Pagemap.expect_uffd_wp(page.start, False, "after MADV_DONTNEED of the marker")
    poke(page.start, b"\1")
    Pagemap.expect_uffd_wp(page.start, False, "after a fault where the marker was")
    advise(page, Advice.DONTNEED)

    ctx.uffd.writeprotect(page)
    ctx.dst.expect_zero(0, 1)
    Pagemap.expect_uffd_wp(page.start, True, "after a read, which maps the zero page")
    ctx.uffd.expect_no_message()
