# SPDX-License-Identifier: GPL-2.0-only
"""Faults of the kernel itself, by every way that a system call can take to memory, in each mode of registration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, CACHED, KERNEL_ACCESSES, KERNEL_FAULTS, MINOR, MINOR_FAULTS, MISSING, SHARED, TRAPPED, WP, WRITE, WRITEPROTECT,
    Advice, Area, Context, KernelAccess, PagefaultFlag, Pagemap, Range, Uffd, advise, cached, direct_accesses,
    direct_disk, expect_told, expect_untold, peek, poke, promise,
)  # fmt: skip

KINDS = tuple(KERNEL_ACCESSES)


def served(request: Callable[[Range], object], area: Area, page: int) -> None:
    """Make a request on one page of an area."""
    request(area.page(page))


@uffd_case("faults-calls", mem=ALL, variants=KINDS, needs=("kernel_faults",), pages=4, rows=("FL-11", "PR-05"))
def test_faults_calls(ctx: Context, variant: str) -> None:
    """A system call that reads a missing page is told as a read, one that writes it as a write; filled, it goes on."""
    missing(ctx, *KERNEL_ACCESSES[variant])


def missing(ctx: Context, *accesses: KernelAccess) -> None:
    """Make accesses to pages 1 and 2 of the destination, which are missing."""
    ctx.src.fill()
    with Uffd.open(flags=KERNEL_FAULTS) as uffd:

        def copied(page: int) -> None:
            uffd.copy(ctx.dst.page(page).start, ctx.src.page(page).start, ctx.page_size)

        uffd.register(ctx.dst.range, MISSING)
        for access in accesses:
            for pages in access.pages(1, 2):
                with promise("FL-11", f"{access.name} at {pages}"):
                    source = access.address(ctx.src, *pages)
                    before = peek(source, access.length)
                    poke(source, access.wants or before)
                    flags = WRITE if access.writes else PagefaultFlag(0)
                    expect_told(uffd, ctx.dst, access, pages, flags, serve=copied)
                    Pagemap.expect_present(ctx.dst, *pages)
                    poke(source, before)
                    poke(access.address(ctx.dst, *pages), before)
                    ctx.dst.expect_pattern_of(ctx.src, pages[0], len(pages))
                    ctx.dst.release()


@uffd_case(
    "faults-calls-wp",
    mem=ALL,
    variants=KINDS,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    rows=("WP-14", "FL-11"),
)
def test_faults_calls_wp(ctx: Context, variant: str) -> None:
    """A system call that writes to a protected page waits until that is un-protected; one that reads it does not."""
    protected(ctx, *KERNEL_ACCESSES[variant])


def protected(ctx: Context, *accesses: KernelAccess) -> None:
    """Make accesses to pages 1 and 2 of the destination, which is write-protected as a whole."""
    area, everything = ctx.dst, set(range(ctx.nr_pages))
    area.fill()
    with Uffd.open(ctx.features, KERNEL_FAULTS) as uffd:
        uffd.register(area.range, WP)
        for access in accesses:
            for pages in access.pages(1, 2):
                with promise("FL-11", f"{access.name} at {pages}"):
                    address = access.address(area, *pages)
                    before = peek(address, access.length)
                    poke(address, access.wants or before)
                    uffd.writeprotect(area.range)
                    if access.writes:
                        serve = partial(served, uffd.unprotect, area)
                        expect_told(uffd, area, access, pages, TRAPPED, serve=serve)
                    else:
                        expect_untold(uffd, area, access, pages)
                    freed = set(pages) if access.writes else set()
                    Pagemap.expect_protected(area, everything - freed, "after the call")
                    uffd.unprotect(area.range)
                    poke(address, before)
        area.expect_pattern_of(area)


@uffd_case(
    "faults-calls-minor",
    mem=SHARED,
    variants=KINDS,
    features=MINOR_FAULTS,
    needs=("kernel_faults",),
    pages=4,
    rows=("FL-11",),
)
def test_faults_calls_minor(ctx: Context, variant: str) -> None:
    """A system call that meets a page in want of its mapping alone waits until UFFDIO_CONTINUE."""
    area = ctx.dst
    with Uffd.open(ctx.features, KERNEL_FAULTS) as uffd, cached(ctx) as view:
        ctx.uffd.unregister(area.range)
        uffd.register(area.range, MINOR)
        for access in KERNEL_ACCESSES[variant]:
            for pages in access.pages(1, 2):
                with promise("FL-11", f"{access.name} at {pages}"):
                    address = access.address(area, *pages)
                    behind = view.start + address - area.start
                    before = peek(behind, access.length)
                    poke(behind, access.wants or before)
                    flags = CACHED | WRITE if access.writes else CACHED
                    serve = partial(served, uffd.continue_, area)
                    expect_told(uffd, area, access, pages, flags, serve=serve)
                    Pagemap.expect_present(area, *pages)
                    poke(behind, before)
                    advise(area.range, Advice.DONTNEED)
        area.expect_pattern(view)


@uffd_case(
    "faults-calls-direct",
    mem=ALL,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    rows=("FL-11", "PR-05"),
    kind=Kind.DETAIL,
)
def test_faults_calls_direct(ctx: Context) -> None:
    """O_DIRECT waits for missing and for protected pages before the disk reaches them."""
    with direct_disk() as disk:
        accesses = direct_accesses(disk)
        missing(ctx, *accesses)
        protected(ctx, *accesses)
