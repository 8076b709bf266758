# SPDX-License-Identifier: GPL-2.0-only
"""What UFFDIO_REGISTER says can be done with a range."""

from __future__ import annotations

from errno import EINVAL

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, ANON, MINOR, MISSING, WP, Context, Feature, RangeIoctls, RegisterMode, expect, refuses,
)  # fmt: skip


def offered_ioctls(ctx: Context, mode: RegisterMode) -> RangeIoctls:
    """What this kernel must offer for a range of this memory type registered in this mode."""
    ioctls = RangeIoctls.WAKE | RangeIoctls.COPY
    if not ctx.mem.hugetlb:
        ioctls |= RangeIoctls.ZEROPAGE
    if Feature.POISON in ctx.uffd.offered:
        ioctls |= RangeIoctls.POISON
    if Feature.MOVE in ctx.uffd.offered and not ctx.mem.hugetlb:
        ioctls |= RangeIoctls.MOVE
    if WP in mode:
        ioctls |= RangeIoctls.WRITEPROTECT
    if MINOR in mode:
        ioctls |= RangeIoctls.CONTINUE
    return ioctls


@uffd_case(
    "register-ioctls",
    mem=ALL,
    features=Feature.MISSING_HUGETLBFS
    | Feature.MISSING_SHMEM
    | Feature.PAGEFAULT_FLAG_WP
    | Feature.WP_HUGETLBFS_SHMEM
    | Feature.MINOR_HUGETLBFS
    | Feature.MINOR_SHMEM,
    pages=2,
    rows=("REG-01", "REG-17", "REG-18", "REG-21", "REG-31", "REG-32"),
)
def test_register_ioctls(ctx: Context) -> None:
    """UFFDIO_REGISTER offers exactly the ioctls that mode and memory type allow, and refuses impossible modes."""
    page = ctx.dst.page(0)
    known = RangeIoctls(sum(RangeIoctls))
    for mode in map(RegisterMode, range(MISSING | WP | MINOR | 1)):
        if not mode or (MINOR in mode and ctx.mem is ANON):
            with refuses(EINVAL):
                ctx.uffd.register(page, mode)
            continue
        ioctls = ctx.uffd.register(page, mode)
        expect(ioctls & known, offered_ioctls(ctx, mode), f"ioctls of a range registered with {mode}")
        ctx.uffd.unregister(page)
