# SPDX-License-Identifier: GPL-2.0-only
"""PAGEMAP_SCAN's categories one by one: whether the kernel knows each, and tells who has it from who has not.

CRIU and Wine rest on some of them; a kernel that lacks one says EINVAL to the whole scan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from errno import EINVAL
from functools import partial
from pathlib import Path

from uffd_selftests.abi.errors import KernelError
from uffd_selftests.abi.uapi import Feature, PageCategory
from uffd_selftests.mem_types import ANON, HUGETLB, SHMEM, Area
from uffd_selftests.probe.trials import RWP_ASYNC, WP_ASYNC, Stage, Trial
from uffd_selftests.toolkit.access import peek, poke
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import Skip
from uffd_selftests.toolkit.handle import RWP, WP, Uffd
from uffd_selftests.toolkit.memory import PAGE_SIZE, Advice, Range, advise, keep_small
from uffd_selftests.toolkit.pagemap import Pagemap, require_soft_dirty
from uffd_selftests.toolkit.swap import swap_out
from uffd_selftests.toolkit.thp import huge_area

__all__ = ["CATEGORIES"]

Pages = tuple[Range, Range]
"""A page that has what a category asks for, and one that has not."""


def write(*pages: Range) -> None:
    """Write to pages."""
    for page in pages:
        poke(page.start, b"\1")


def tracked(uffd: Uffd, area: Area) -> Pages:
    """Write to one of two pages that are tracked."""
    write(area.page(0), area.page(1))
    uffd.register(area.range, WP)
    uffd.writeprotect(area.range)
    write(area.page(0))
    return area.page(0), area.page(1)


def watched(uffd: Uffd, area: Area) -> Pages:
    """Register one of two pages."""
    uffd.register(area.page(0), WP)
    return area.page(0), area.page(1)


def accessed(uffd: Uffd, area: Area) -> Pages:
    """Read one of two pages that are protected against access."""
    write(area.page(0), area.page(1))
    uffd.register(area.range, RWP)
    uffd.rwprotect(area.range)
    peek(area.start)
    return area.page(0), area.page(1)


def of_file(_: Uffd, area: Area) -> Pages:
    """Write to a page of shared memory, and to one of anonymous memory."""
    shared = SHMEM.allocate(1).range
    write(shared, area.page(1))
    return shared, area.page(1)


def present(_: Uffd, area: Area) -> Pages:
    """Write to one of two pages."""
    keep_small(area.range)
    write(area.page(0))
    return area.page(0), area.page(1)


def swapped(_: Uffd, area: Area) -> Pages:
    """Have one of two pages swapped out."""
    write(area.page(0), area.page(1))
    swap_out(area.page(0))
    return area.page(0), area.page(1)


def zero(_: Uffd, area: Area) -> Pages:
    """Read one of two pages and write to the other."""
    keep_small(area.range)
    peek(area.start)
    write(area.page(1))
    return area.page(0), area.page(1)


def huge(_: Uffd, area: Area) -> Pages:
    """Write to a huge page, transparent or not, and to a small one."""
    write(area.page(1))
    with contextlib.suppress(Skip):
        return huge_area(Context(ANON, nr_pages=1)).range, area.page(1)
    with contextlib.suppress(KernelError):
        page = HUGETLB.allocate(1).range
        write(page)
        return page, area.page(1)
    raise Skip("no huge page to be had")


def soft_dirty(_: Uffd, area: Area) -> Pages:
    """Write to one of two pages since they were last called clean."""
    write(area.page(0), area.page(1))
    require_soft_dirty(area.start)
    Path("/proc/self/clear_refs").write_text("4")
    write(area.page(0))
    return area.page(0), area.page(1)


def guard(_: Uffd, area: Area) -> Pages:
    """Make one of two pages a guard page."""
    write(area.page(1))
    advise(area.page(0), Advice.GUARD_INSTALL)
    return area.page(0), area.page(1)


MAKERS: dict[PageCategory, tuple[Callable[[Uffd, Area], Pages], Feature]] = {
    PageCategory.WPALLOWED: (watched, WP_ASYNC),
    PageCategory.WRITTEN: (tracked, WP_ASYNC),
    PageCategory.FILE: (of_file, Feature(0)),
    PageCategory.PRESENT: (present, Feature(0)),
    PageCategory.SWAPPED: (swapped, Feature(0)),
    PageCategory.PFNZERO: (zero, Feature(0)),
    PageCategory.HUGE: (huge, Feature(0)),
    PageCategory.SOFT_DIRTY: (soft_dirty, Feature(0)),
    PageCategory.GUARD: (guard, Feature(0)),
    PageCategory.ACCESSED: (accessed, RWP_ASYNC),
}
"""What makes pages for each category, and what their handle needs."""


def known(category: PageCategory) -> bool:
    """Whether a scan takes a category."""
    try:
        Pagemap.scan(Range(0, 0), category)
    except KernelError as error:
        if error.errno != EINVAL:
            raise
        return False
    return True


def ask(_: Stage, category: PageCategory) -> str:
    """Return whether a scan tells a page that has the category from one that has not."""
    if not known(category):
        return "EINVAL: not known"
    make, features = MAKERS[category]
    with contextlib.closing(ANON.allocate(2)) as area, Uffd.open(features) as uffd:
        try:
            pages = make(uffd, area)
        except KernelError as error:
            raise Skip(f"no such page to be had: {error}") from None
        having, lacking = (bool(Pagemap.scan(Range(page.start, PAGE_SIZE), category).regions) for page in pages)
    if having and not lacking:
        return "tells it"
    return "tells it of others, too" if having else "never tells it"


CATEGORIES = tuple(
    (
        f"scan-{str(category).removeprefix(PageCategory.prefix).lower().replace('_', '-')}",
        category,
        Trial("PAGEMAP_SCAN", partial(ask, category=category)),
    )
    for category in MAKERS
)
"""The key, the category and the trial of each."""
