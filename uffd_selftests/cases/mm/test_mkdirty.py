# SPDX-License-Identifier: GPL-2.0-only
"""mkdirty: a page table entry of a read-only mapping that gets dirty must not get writable with it.

The program's case of UFFDIO_COPY is copy-protected-mapping; UFFDIO_ZEROPAGE and UFFDIO_CONTINUE have cases like it.
"""

from __future__ import annotations

from functools import partial
from signal import SIGSEGV

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC, MISSING, PAGE_SIZE, PROT_READ, PROT_WRITE, RESTART, SCAN, SHMEM, WP, WRITEPROTECT, Advice, Area,
    Context, KernelError, Range, Skip, Trap, advise, collapse, expect, expect_written, huge_area, pmd_mapped, pmd_size,
    promise, protect, require_collapse, touch_trapped, tracked, undisturbed, write,
)  # fmt: skip


def expect_read_only(ctx: Context, area: Area, *pages: int) -> None:
    """Assert that a write to each page is SIGSEGV and no message, and that the area still holds its contents."""
    for page in pages:
        traps: list[Trap | None] = []
        call = partial(touch_trapped, area.page(page), area.page_size, write=True)
        undisturbed(ctx.uffd, lambda call=call, traps=traps: traps.extend(call()))  # type: ignore[misc]
        expect([trap and trap.signo for trap in traps], [SIGSEGV], f"signals of a write to page {page}")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


@uffd_case("mkdirty-unprotect", mem=ALL, features=WRITEPROTECT, pages=2, rows=("WP-20",), kind=Kind.DETAIL)
def test_mkdirty_unprotect(ctx: Context) -> None:
    """Un-protecting a dirty page of a read-only mapping, or a whole range, leaves it read-only."""
    area = ctx.dst
    area.fill()
    ctx.uffd.register(area.range, WP)
    protect(area.range, PROT_READ)
    for when, where in (("page 0", area.page(0)), ("both pages", area.range)):
        ctx.uffd.writeprotect(area.range)
        ctx.uffd.unprotect(where)
        with promise("WP-20", f"{when} un-protected"):
            expect_read_only(ctx, area, 0, 1)
    protect(area.range, PROT_READ | PROT_WRITE)
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area, write_back=True))


@uffd_case(
    "mkdirty-unprotect-thp",
    mem=(ANON, SHMEM),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-20", "WP-25"),
    kind=Kind.DETAIL,
)
def test_mkdirty_unprotect_thp(ctx: Context) -> None:
    """Un-protecting a dirty transparent huge page of a read-only mapping, whole or in part, leaves it read-only."""
    for what, first, count in (("whole", 0, pmd_size() // PAGE_SIZE), ("in part", 7, 2)):
        area = huge_area(ctx)
        ctx.uffd.register(area.range, WP)
        protect(area.range, PROT_READ)
        ctx.uffd.writeprotect(area.range)
        ctx.uffd.unprotect(area.page(first, count))
        with promise("WP-20, WP-25", what):
            expect_read_only(ctx, area, 0, 6, 7, 8, 9, area.nr_pages - 1)


@uffd_case("mkdirty-async", mem=ALL, features=ASYNC, needs=SCAN, pages=3, rows=("AS-17",), kind=Kind.DETAIL)
def test_mkdirty_async(ctx: Context) -> None:
    """A write that a read-only mapping forbids is SIGSEGV in tracked memory too, and does not count as written."""
    area = tracked(ctx)
    write(ctx.uffd, area, 1)
    protect(area.range, PROT_READ)
    expect_read_only(ctx, area, 0, 1, 2)
    expect_written(area, {1}, "pages written, and asked again to be protected", flags=RESTART)
    expect_read_only(ctx, area, 0, 1, 2)
    expect_written(area, (), "pages written, after writes that were forbidden")
    protect(area.range, PROT_READ | PROT_WRITE)
    write(ctx.uffd, area, 0)
    expect_written(area, {0}, "pages written, after one that is allowed")


@uffd_case("mkdirty-collapse", mem=(ANON,), needs=("thp",), pages=1, rows=("CP-19", "TH-03"), kind=Kind.DETAIL)
def test_mkdirty_collapse(ctx: Context) -> None:
    """What UFFDIO_COPY has put into a read-only mapping stays read-only when it becomes a transparent huge page."""
    require_collapse(ctx)
    source, area = ctx.allocate(pmd_size() // PAGE_SIZE), ctx.allocate(pmd_size() // PAGE_SIZE)
    source.fill()
    advise(area.range, Advice.NOHUGEPAGE)
    ctx.uffd.register(area.range, MISSING)
    protect(area.range, PROT_READ)
    ctx.uffd.copy(area.start, source.start, area.range.len)
    try:
        collapse(area.range)
    except KernelError as error:
        raise Skip(f"no huge page of pages that cannot be written: {error} (Linux 6.18)") from None
    expect(pmd_mapped(area.range), area.range.len, "bytes mapped by a huge page")
    [trap] = touch_trapped(Range(area.start, 1), 1, write=True)
    expect(trap and trap.signo, SIGSEGV, "the signal of a write")
    area.expect_pattern_of(source)
