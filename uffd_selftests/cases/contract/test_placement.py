# SPDX-License-Identifier: GPL-2.0-only
"""On which memory node a page lies that a handle has filled, mapped or moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ANON, MINOR, MINOR_FAULTS, MISSING, MOVE, NOT_HUGETLB, PAGE_SIZE, SHMEM, Context, Range, expect, expect_same, ffi,
    promise, syscalls, touch, two_memory_nodes,
)  # fmt: skip

MPOL_DEFAULT, MPOL_BIND = 0, 2  # include/uapi/linux/mempolicy.h
NODE_BITS = 64


def bind(where: Range, node: int) -> None:
    """Have the pages of a mapping come from one node (mbind(2))."""
    mask = ffi.new("uint64_t *", 1 << node)
    syscalls.call("mbind", where.start, where.len, MPOL_BIND, int(ffi.cast("uintptr_t", mask)), NODE_BITS, 0)


@contextmanager
def preferring(node: int) -> Iterator[None]:
    """Have what this thread takes without a mapping's own policy come from one node (set_mempolicy(2))."""
    mask = ffi.new("uint64_t *", 1 << node)
    syscalls.call("set_mempolicy", MPOL_BIND, int(ffi.cast("uintptr_t", mask)), NODE_BITS)
    try:
        yield
    finally:
        syscalls.call("set_mempolicy", MPOL_DEFAULT, 0, 0)


def nodes_of(where: Range) -> set[int]:
    """Return the nodes on which the pages of a range are (move_pages(2) without a destination)."""
    addresses = list(range(where.start, where.end, PAGE_SIZE))
    pages, status = ffi.new("uint64_t[]", addresses), ffi.new("int[]", len(addresses))
    at = [int(ffi.cast("uintptr_t", array)) for array in (pages, status)]
    syscalls.call("move_pages", 0, len(addresses), at[0], 0, at[1], 0)
    return set(status)


@uffd_case("placement-fills", mem=NOT_HUGETLB, pages=8, rows=("NU-01",), kind=Kind.DETAIL)
def test_placement_fills(ctx: Context) -> None:
    """Pages that are copied or zeroed lie where the mapping's policy says, not that of the thread which asks."""
    first, second = two_memory_nodes()
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    for here, there in ((first, second), (second, first)):
        part = ctx.dst.page(0 if here == first else 4, 4)
        copied, zeroed = Range(part.start, 2 * PAGE_SIZE), Range(part.start + 2 * PAGE_SIZE, 2 * PAGE_SIZE)
        bind(part, here)
        with preferring(there), promise("NU-01", f"mapping on node {here}, caller on {there}"):
            ctx.uffd.copy(copied.start, ctx.src.start, copied.len)
            expect(nodes_of(copied), {here}, "nodes of the pages copied")
            if ctx.mem is ANON:
                ctx.uffd.zeropage(zeroed)
                touch(zeroed, PAGE_SIZE, write=True)
            else:
                ctx.uffd.copy(zeroed.start, ctx.src.start, zeroed.len)
            expect(nodes_of(zeroed), {here}, "nodes of the other pages")
        expect_same(ctx.src.start, copied.start, copied.len)


@uffd_case("placement-move", mem=(ANON,), features=MOVE, pages=8, rows=("NU-02",), kind=Kind.DETAIL)
def test_placement_move(ctx: Context) -> None:
    """UFFDIO_MOVE takes a page along as it is: it lies where it lay, whatever the policy of its new place."""
    first, second = two_memory_nodes()
    ctx.uffd.register(ctx.dst.range, MISSING)
    for here, there, page in ((first, second, 0), (second, first, 4)):
        src, dst = ctx.src.page(page, 4), ctx.dst.page(page, 4)
        bind(src, here)
        bind(dst, there)
        ctx.src.fill(page, 4)
        expect(nodes_of(src), {here}, "nodes of the pages before")
        with promise("NU-02", "UFFDIO_MOVE"):
            ctx.uffd.move(dst.start, src.start, src.len)
            expect(nodes_of(dst), {here}, "nodes of the pages moved")
    ctx.dst.expect_pattern_of(ctx.src)


@uffd_case("placement-continue", mem=(SHMEM,), features=MINOR_FAULTS, pages=8, rows=("NU-02",), kind=Kind.DETAIL)
def test_placement_continue(ctx: Context) -> None:
    """UFFDIO_CONTINUE maps the page where it lies, whatever the policy of the thread which asks."""
    first, second = two_memory_nodes()
    ctx.uffd.register(ctx.dst.range, MINOR)
    with ctx.dst.file_view() as view:
        for here, there, page in ((first, second, 0), (second, first, 4)):
            seen, where = Range(view.start + page * PAGE_SIZE, 4 * PAGE_SIZE), ctx.dst.page(page, 4)
            with preferring(here):
                ctx.dst.pattern.fill(view.start, page, 4)
            expect(nodes_of(seen), {here}, "nodes of the pages in the file")
            with preferring(there), promise("NU-02", "UFFDIO_CONTINUE"):
                ctx.uffd.continue_(where)
                expect(nodes_of(where), {here}, "nodes of the pages continued")
    ctx.dst.expect_pattern_of(ctx.dst)
