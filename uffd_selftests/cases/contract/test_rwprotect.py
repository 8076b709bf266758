# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_RWPROTECT: the request, who is trapped by the protection, and who is let go on."""

from __future__ import annotations

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, SYNC_RWP, Context, Pagemap, expect_rwp_free, expect_rwp_trapped, promise, rwp_protected,
)  # fmt: skip


@uffd_case("rwprotect-traps", mem=ALL, features=SYNC_RWP, pages=4, rows=("RW-01", "RW-02"))
def test_rwprotect_traps(ctx: Context) -> None:
    """Every access to a protected page waits until it is resolved, and every byte is what it was."""
    area = rwp_protected(ctx)
    with promise("RW-01", "read"):
        expect_rwp_trapped(ctx.uffd, area, 0, 2)
        Pagemap.expect_protected(area, {1, 3}, "after two pages were resolved")
    with promise("RW-02", "after it was resolved"):
        expect_rwp_free(ctx.uffd, area, 0, 2)
    with promise("RW-01", "write"):
        expect_rwp_trapped(ctx.uffd, area, 1, write=True)
    ctx.uffd.resolve(area.page(3))
    area.expect_pattern_of(area, 2, 2)
