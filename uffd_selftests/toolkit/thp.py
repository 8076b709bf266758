# SPDX-License-Identifier: GPL-2.0-only
"""Transparent huge pages: where there are some, and where there must be none."""

from __future__ import annotations

import errno

from uffd_selftests.abi.errors import KernelError
from uffd_selftests.mem_types import Area, pmd_size
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import Skip, eventually
from uffd_selftests.toolkit.memory import PAGE_SIZE, Advice, Range, advise, keep_small
from uffd_selftests.toolkit.smaps import pmd_mapped

__all__ = [
    "prevent_hugepages",
    "request_hugepages",
    "small_pages",
    "small_area",
    "collapse",
    "require_collapse",
    "huge_area",
]


def prevent_hugepages(ctx: Context) -> None:
    """Keep transparent huge pages out of the source area, which is empty yet; fine without THP."""
    try:
        advise(ctx.src.range, Advice.NOHUGEPAGE)
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise


def request_hugepages(ctx: Context) -> None:
    """Have the source area, which is empty yet, filled with transparent huge pages."""
    if pmd_size() > ctx.src.range.len:
        raise Skip(f"a transparent huge page is {pmd_size()} bytes, the area only {ctx.src.range.len}: --area-mib")
    try:
        advise(ctx.src.range, Advice.HUGEPAGE)
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise
        raise Skip("the kernel lacks CONFIG_TRANSPARENT_HUGEPAGE") from None


def small_pages(ctx: Context) -> None:
    """Keep transparent huge pages out of the destination area: what is done to one page would be done to others."""
    if not ctx.mem.hugetlb:
        keep_small(ctx.dst.range)


def small_area(ctx: Context) -> Area:
    """Map an area that one transparent huge page would fill, filled with small pages, and none else until advised."""
    area = ctx.allocate(pmd_size() // PAGE_SIZE)
    advise(area.range, Advice.NOHUGEPAGE)
    area.fill()
    return area


def collapse(where: Range) -> None:
    """MADV_COLLAPSE, repeated while the kernel says that something is in its way for the moment (EAGAIN)."""

    def collapsed() -> bool:
        try:
            advise(where, Advice.COLLAPSE)
        except KernelError as error:
            if error.errno != errno.EAGAIN:
                raise
            return False
        return True

    advise(where, Advice.HUGEPAGE)
    eventually(collapsed, "MADV_COLLAPSE not to say EAGAIN")


def require_collapse(ctx: Context) -> None:
    """Skip where not even memory that nobody watches can be collapsed into a transparent huge page."""
    area = small_area(ctx)
    try:
        collapse(area.range)
    except KernelError as error:
        raise Skip(f"no transparent huge page of {ctx.mem} memory to be had: {error} (Linux 6.1)") from None


def huge_area(ctx: Context, count: int = 1) -> Area:
    """Map an area that so many transparent huge pages fill, mapped as such; Skip where none can be had."""
    area = ctx.allocate(count * pmd_size() // PAGE_SIZE)
    try:
        advise(area.range, Advice.HUGEPAGE)
        area.fill()
        if pmd_mapped(area.range) < area.range.len:
            collapse(area.range)
    except KernelError as error:
        raise Skip(f"no transparent huge page of {ctx.mem} memory to be had: {error}") from None
    return area
