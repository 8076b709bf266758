# SPDX-License-Identifier: GPL-2.0-only
"""Filling memory while its layout changes."""

from __future__ import annotations

from collections.abc import Callable
from errno import EAGAIN

from uffd_selftests.case import uffd_case
from uffd_selftests.common import MISSING, SHMEM, Context, Feature, Range, Removed, Waiter, expect, refuses


@uffd_case(
    "mmap-changing",
    mem=(SHMEM,),
    features=Feature.EVENT_REMOVE | Feature.MOVE | Feature.POISON | Feature.MINOR_SHMEM,
    pages=2,
    rows=("CP-14", "ZP-14", "CT-22", "PO-17", "MV-26", "EV-04"),
    bugs=(6, 7),
)
def test_mmap_changing(ctx: Context) -> None:
    """Until a pending event is read every fill ioctl says EAGAIN, in errno and in its output field."""
    uffd, nothing = ctx.uffd, Range(0, 0)
    fills: list[Callable[[], int]] = [
        lambda: uffd.copy(0, 0, 0),
        lambda: uffd.zeropage(nothing),
        lambda: uffd.move(0, 0, 0),
        lambda: uffd.poison(nothing),
        lambda: uffd.continue_(nothing),
    ]
    uffd.register(ctx.dst.range, MISSING)

    with Waiter(ctx.dst.release):
        expect(uffd.readable(10), True, "a readable event while madvise waits")
        for fill in fills:
            with refuses(EAGAIN):
                fill()
        expect(uffd.read(), [Removed(ctx.dst.range.start, ctx.dst.range.end)], "the event")
