# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_MOVE and swap: pages that are there when they move, and pages that go there afterwards."""

from __future__ import annotations

from errno import EBUSY

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ANON, MOVE, WP, Advice, Child, Context, Feature, Pagemap, advise, move, prepare, prevent_hugepages, promise,
    refuses, swap_out, undisturbed,
)  # fmt: skip


@uffd_case(
    "move-swapped",
    mem=(ANON,),
    features=MOVE,
    needs=("swap",),
    pages=3,
    post_alloc=prevent_hugepages,
    rows=("MV-23",),
    kind=Kind.DETAIL,
)
def test_move_swapped(ctx: Context) -> None:
    """A page in swap can be moved, and one that was read back without being mapped or written; its bytes arrive."""
    prepare(ctx)
    swap_out(ctx.src.range)
    with promise("MV-23", "in swap"):
        move(ctx, 0)
    advise(ctx.src.page(1), Advice.WILLNEED)
    with promise("MV-23", "in the swap cache"):
        move(ctx, 1)
    ctx.src.expect_pattern_of(ctx.src, 2, 1)
    with promise("MV-23", "mapped, not written since"):
        move(ctx, 2)
    Pagemap.expect_present(ctx.src)
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_pattern_of(ctx.src, write_back=True))
    ctx.src.expect_zero()


@uffd_case(
    "move-swapped-shared",
    mem=(ANON,),
    features=MOVE,
    needs=("swap",),
    pages=2,
    post_alloc=prevent_hugepages,
    rows=("MV-12", "MV-23"),
    kind=Kind.DETAIL,
)
def test_move_swapped_shared(ctx: Context) -> None:
    """A page in swap that is shared with a forked child cannot be moved."""
    prepare(ctx)
    swap_out(ctx.src.range)
    with Child(lambda channel: channel.receive()) as child:
        with promise("MV-12", "in swap"), refuses(EBUSY):
            move(ctx, 0)
        child.send()
    ctx.src.expect_pattern_of(ctx.src)
    Pagemap.expect_present(ctx.dst)


@uffd_case(
    "move-then-swap",
    mem=(ANON,),
    features=MOVE,
    needs=("swap",),
    pages=2,
    post_alloc=prevent_hugepages,
    rows=("MV-01",),
    kind=Kind.DETAIL,
)
def test_move_then_swap(ctx: Context) -> None:
    """A page that has moved can be swapped out and comes back at its new place."""
    prepare(ctx)
    move(ctx, 0, 2)
    swap_out(ctx.dst.range)
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_pattern_of(ctx.src))


@uffd_case(
    "move-freed",
    mem=(ANON,),
    features=MOVE,
    needs=("swap",),
    pages=2,
    post_alloc=prevent_hugepages,
    rows=("MV-01",),
    kind=Kind.DETAIL,
)
def test_move_freed(ctx: Context) -> None:
    """A page that was written again after MADV_FREE keeps its bytes when it has moved: the kernel may not drop it."""
    prepare(ctx)
    advise(ctx.src.range, Advice.FREE)
    ctx.src.fill()
    move(ctx, 0, 2)
    advise(ctx.dst.range, Advice.PAGEOUT)
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_pattern_of(ctx.src))


D_SWAPPED_WP = Defect(
    id="D-MV-22",
    summary="UFFDIO_MOVE of a write-protected page in swap takes the uffd-wp bit into a range not registered for it",
    kernels="6.12.117, 6.18.44, 7.3.4",
    advice="Un-protect a source range before pages are moved out of it.",
    shows=r"after UFFDIO_MOVE: expected PM_UFFD_WP .* pages: none, got 0",
)


@uffd_case(
    "move-swapped-protected",
    mem=(ANON,),
    features=MOVE | Feature.PAGEFAULT_FLAG_WP,
    needs=("swap",),
    pages=2,
    post_alloc=prevent_hugepages,
    rows=("MV-22",),
    defect=D_SWAPPED_WP,
)
def test_move_swapped_protected(ctx: Context) -> None:
    """Write protection of a page in swap does not come along to a range that is not registered for it."""
    prepare(ctx)
    ctx.uffd.register(ctx.src.range, WP)
    ctx.uffd.writeprotect(ctx.src.range)
    swap_out(ctx.src.range)
    move(ctx, 0)
    with promise("MV-22"):
        Pagemap.expect_protected(ctx.dst, [], "after UFFDIO_MOVE")
