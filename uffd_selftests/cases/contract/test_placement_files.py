# SPDX-License-Identifier: GPL-2.0-only
"""On which memory node huge pages and pages of files lie that a handle has filled or mapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    EACH_HUGETLB, MINOR, MINOR_FAULTS, MISSING, SHARED, SHMEM, Context, Range, Skip, expect, expect_same, ffi, promise,
    syscalls, touch, two_memory_nodes,
)  # fmt: skip

MPOL_DEFAULT, MPOL_BIND = 0, 2  # include/uapi/linux/mempolicy.h
NODE_BITS = 64


def bind(where: Range, node: int) -> None:
    """Have the pages of a mapping come from one node (mbind(2))."""
    mask = ffi.new("uint64_t *", 1 << node)
    syscalls.call("mbind", where.start, where.len, MPOL_BIND, int(ffi.cast("uintptr_t", mask)), NODE_BITS, 0)


@contextmanager
def bound_to(node: int) -> Iterator[None]:
    """Have what this thread takes without a mapping's own policy come from one node (set_mempolicy(2))."""
    mask = ffi.new("uint64_t *", 1 << node)
    syscalls.call("set_mempolicy", MPOL_BIND, int(ffi.cast("uintptr_t", mask)), NODE_BITS)
    try:
        yield
    finally:
        syscalls.call("set_mempolicy", MPOL_DEFAULT, 0, 0)


def nodes_of(where: Range, step: int) -> list[int]:
    """Return on which node each page of a range is (move_pages(2) without a destination)."""
    addresses = list(range(where.start, where.end, step))
    pages, status = ffi.new("uint64_t[]", addresses), ffi.new("int[]", len(addresses))
    at = [int(ffi.cast("uintptr_t", array)) for array in (pages, status)]
    syscalls.call("move_pages", 0, len(addresses), at[0], 0, at[1], 0)
    return list(status)


def need_free(nodes: list[int], size: int, pages: int) -> None:
    """Skip unless each node has so many free huge pages."""
    for node in nodes:
        pool = Path(f"/sys/devices/system/node/node{node}/hugepages/hugepages-{size >> 10}kB")
        free = int((pool / "free_hugepages").read_text())
        if free < pages:
            raise Skip(f"memory node {node} has {free} free huge pages, {pages} wanted: echo N > {pool}/nr_hugepages")


@uffd_case("placement-fills-hugetlb", mem=EACH_HUGETLB, pages=4, rows=("NU-01",), kind=Kind.DETAIL)
def test_placement_fills_hugetlb(ctx: Context) -> None:
    """A huge page that is copied lies where the mapping's policy says, not that of the thread which asks."""
    nodes, size = two_memory_nodes(), ctx.page_size
    ctx.src.fill(0, 1)
    need_free(nodes, size, 3)
    ctx.uffd.register(ctx.dst.range, MISSING)
    for here, there, first in ((*nodes, 0), (*reversed(nodes), 2)):
        part = ctx.dst.page(first, 2)
        bind(part, here)
        with bound_to(there), promise("NU-01", f"mapping on node {here}, caller on {there}"):
            for page in (first, first + 1):
                ctx.uffd.copy(ctx.dst.page(page).start, ctx.src.start, size)
            expect(nodes_of(part, size), [here] * 2, "nodes of the huge pages copied")
    for page in range(4):
        expect_same(ctx.src.start, ctx.dst.page(page).start, size)


@uffd_case("placement-zeroes", mem=(SHMEM,), pages=8, rows=("NU-01",), kind=Kind.DETAIL)
def test_placement_zeroes(ctx: Context) -> None:
    """Pages of zeroes in shared memory lie where the file's policy says, not that of the thread which asks."""
    nodes, size = two_memory_nodes(), ctx.page_size
    ctx.uffd.register(ctx.dst.range, MISSING)
    for here, there, first in ((*nodes, 0), (*reversed(nodes), 4)):
        part = ctx.dst.page(first, 4)
        bind(part, here)
        with bound_to(there), promise("NU-01", f"mapping on node {here}, caller on {there}"):
            ctx.uffd.zeropage(part)
            expect(nodes_of(part, size), [here] * 4, "nodes of the pages of zeroes")
    ctx.dst.expect_zero()


@uffd_case("placement-continue-bound", mem=SHARED, features=MINOR_FAULTS, pages=4, rows=("NU-02",), kind=Kind.DETAIL)
def test_placement_continue_bound(ctx: Context) -> None:
    """UFFDIO_CONTINUE maps a page where it lies, also where mapping and thread would have it on another node."""
    nodes, size = two_memory_nodes(), ctx.page_size
    if ctx.mem.hugetlb:
        need_free(nodes, size, 3)
    ctx.uffd.register(ctx.dst.range, MINOR)
    with ctx.dst.file_view() as view:
        for here, there, first in ((*nodes, 0), (*reversed(nodes), 2)):
            part = ctx.dst.page(first, 2)
            with bound_to(here):
                ctx.dst.pattern.fill(view.start, first, 2)
            cached = Range(view.start + first * size, 2 * size)
            expect(nodes_of(cached, size), [here] * 2, "nodes of the pages in the file")
            bind(part, there)
            with bound_to(there), promise("NU-02", f"pages on node {here}, mapping and caller on {there}"):
                ctx.uffd.continue_(part)
                touch(part, size, write=True)
                expect(nodes_of(part, size), [here] * 2, "nodes of the pages continued")
                expect(nodes_of(cached, size), [here] * 2, "nodes of the pages in the file afterwards")
    ctx.dst.expect_pattern_of(ctx.dst)
