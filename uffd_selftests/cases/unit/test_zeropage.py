# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_ZEROPAGE."""

from __future__ import annotations

from errno import EEXIST, EINVAL

from uffd_selftests.case import uffd_case
from uffd_selftests.common import ALL, MISSING, Context, RangeIoctls, expect, refuses


@uffd_case("zeropage", mem=ALL, pages=2, rows=("ZP-01", "ZP-03", "ZP-05", "ZP-06"))
def test_zeropage(ctx: Context) -> None:
    """UFFDIO_ZEROPAGE maps a page of zeroes once, wherever UFFDIO_REGISTER offered it, and nowhere else."""
    page = ctx.dst.page(0)
    offered = RangeIoctls.ZEROPAGE in ctx.uffd.register(page, MISSING)
    expect(offered, not ctx.mem.hugetlb, f"_UFFDIO_ZEROPAGE offered on {ctx.mem}")

    if not offered:
        with refuses(EINVAL):
            ctx.uffd.zeropage(page)
        return

    ctx.uffd.zeropage(page)
    ctx.dst.expect_zero(0, 1)
    with refuses(EEXIST):
        ctx.uffd.zeropage(page)
    if ctx.mem.shared:
        # Not mapped there, but present in the page cache.
        ctx.uffd.register(ctx.dst.alias_page(0), MISSING)
        with refuses(EEXIST):
            ctx.uffd.zeropage(ctx.dst.alias_page(0))
