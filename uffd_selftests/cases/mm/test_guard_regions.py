# SPDX-License-Identifier: GPL-2.0-only
"""guard-regions: pages of MADV_GUARD_INSTALL in a range that is watched."""

from __future__ import annotations

from errno import EINVAL
from functools import partial
from signal import SIGSEGV

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    MISSING, NOT_HUGETLB, UNREGISTERED, Advice, Area, Context, Feature, KernelError, Skip, Trap, Uffd, advise, expect,
    expect_modes, faulting, promise, touch_trapped, undisturbed,
)  # fmt: skip


def expect_guarded(uffd: Uffd, area: Area, *pages: int) -> None:
    """Assert that every access to these pages is SIGSEGV, and that nobody is told."""
    for page in pages:
        for write in (False, True):
            traps: list[Trap | None] = []
            access = partial(touch_trapped, area.page(page), area.page_size, write=write)
            undisturbed(uffd, lambda access=access, traps=traps: traps.extend(access()))  # type: ignore[misc]
            with promise("FL-25", f"page {page}, {'write' if write else 'read'}"):
                expect([trap and trap.signo for trap in traps], [SIGSEGV], "signals of an access")


@uffd_case(
    "guard-regions",
    mem=NOT_HUGETLB,
    features=Feature.EVENT_REMOVE,
    pages=6,
    rows=("FL-25",),
    kind=Kind.DETAIL,
)
def test_guard_regions(ctx: Context) -> None:
    """A guard page in a watched range is SIGSEGV, and never a message; missing pages beside it are reported as ever."""
    area = ctx.dst
    ctx.src.fill()
    area.fill(1, 1)
    ctx.uffd.register(area.range, MISSING)
    try:
        undisturbed(ctx.uffd, lambda: advise(area.page(1, 4), Advice.GUARD_INSTALL))
    except KernelError as error:
        if error.errno != EINVAL:
            raise
        raise Skip("MADV_GUARD_INSTALL: EINVAL (Linux 6.13, for shared memory 6.15)") from None
    expect_guarded(ctx.uffd, area, 1, 2, 3, 4)
    undisturbed(ctx.uffd, lambda: advise(area.page(2), Advice.GUARD_REMOVE))
    for page in (0, 2, 5):
        with promise("FL-25", f"page {page}, no guard"), faulting(ctx.uffd, area.page(page).start):
            ctx.uffd.copy(area.page(page).start, ctx.src.page(page).start, area.page_size)
    ctx.uffd.unregister(area.range)
    expect_modes(area.range, UNREGISTERED)
    expect_guarded(ctx.uffd, area, 1, 3, 4)
    for page in (0, 2, 5):
        area.expect_pattern_of(ctx.src, page, 1)
