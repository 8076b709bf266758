# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_MOVE as the answer to missing faults: by page, by transparent huge page, and with a split on the way."""

from __future__ import annotations

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ANON, MISSING, Action, Advice, Context, Feature, MoveMode, advise, expect, pmd_mapped, pmd_size, prevent_hugepages,
    request_hugepages,
)  # fmt: skip


def move_all(ctx: Context, unit: int) -> None:
    """Fault the destination in, each fault answered by a move of ``unit`` bytes; nothing may stay behind."""
    advise(ctx.src.range, Advice.DONTFORK)  # pages that are mapped once only can be moved
    ctx.src.fill()
    ctx.src.expect_pattern_of(ctx.src)
    ctx.uffd.register(ctx.dst.range, MISSING)

    with ctx.handler(missing=Action.MOVE, move_mode=MoveMode.ALLOW_SRC_HOLES, unit=unit) as handler:
        ctx.dst.expect_pattern_of(ctx.src)

    ctx.src.expect_zero()
    faults = ctx.dst.range.len // unit
    seen = handler.stats
    expect((seen.messages, seen.missing, seen.write), (faults, faults, 0), "messages, missing faults, write faults")


@uffd_case("move", mem=(ANON,), features=Feature.MOVE, post_alloc=prevent_hugepages, rows=("MV-01", "MV-13"))
def test_move(ctx: Context) -> None:
    """UFFDIO_MOVE takes each page out of the source and maps it, with its contents, at the destination."""
    move_all(ctx, ctx.page_size)


@uffd_case("move-pmd", mem=(ANON,), features=Feature.MOVE, post_alloc=request_hugepages, rows=("MV-19",))
def test_move_pmd(ctx: Context) -> None:
    """UFFDIO_MOVE moves an aligned transparent huge page in one piece."""
    advise(ctx.dst.range, Advice.HUGEPAGE)
    ctx.src.fill()
    huge = pmd_mapped(ctx.src.range)
    move_all(ctx, pmd_size())
    expect(pmd_mapped(ctx.dst.range), huge, "bytes of the destination mapped by PMD")


@uffd_case("move-pmd-split", mem=(ANON,), features=Feature.MOVE, post_alloc=request_hugepages, rows=("MV-19",))
def test_move_pmd_split(ctx: Context) -> None:
    """UFFDIO_MOVE splits a transparent huge page where the destination is mapped by pages."""
    advise(ctx.dst.range, Advice.NOHUGEPAGE)
    move_all(ctx, pmd_size())
    expect(pmd_mapped(ctx.dst.range), 0, "bytes of the destination mapped by PMD")
