# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_CONTINUE by the page and its mapping: huge, shared or private, write-protected, swapped, broken."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EEXIST, EINVAL, EIO
from signal import SIGBUS, SIGSEGV

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    CACHED, FILE_BACKED, HUGETLB, HUGETLB_PRIVATE, MINOR, MINOR_FAULTS, PROT_READ, PROT_WRITE, SHMEM, SHMEM_PRIVATE, WP,
    Advice, Area, Context, ContinueMode, Feature, PagefaultFlag, Pagemap, Range, advise, cached, declared_sound, expect,
    expect_mapped, faulting, handled, huge_area, page_out, peek, pmd_mapped, poke, promise, protect, refuses, resident,
    smaps_bytes, touch_trapped, undisturbed,
)  # fmt: skip

# No bit of its own says that UFFDIO_CONTINUE can protect; it came with WP_UNPOPULATED.
MINOR_WP = MINOR_FAULTS | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED


# ---- huge pages ----------------------------------------------------------------------------------------------------


@uffd_case(
    "continue-eexist-huge",
    mem=(SHMEM,),
    features=MINOR_FAULTS,
    needs=("thp",),
    pages=1,
    rows=("CT-04",),
    kind=Kind.DETAIL,
)
def test_continue_eexist_huge(ctx: Context) -> None:
    """UFFDIO_CONTINUE refuses a part of a transparent huge page that is mapped as a whole, and does not split it."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, MINOR)
    with promise("CT-04", "a part of a huge page"), refuses(EEXIST):
        ctx.uffd.continue_(area.page(5))
    expect(pmd_mapped(area.range), area.range.len, "bytes mapped by PMD")


@uffd_case(
    "continue-huge-part",
    mem=(SHMEM,),
    features=MINOR_FAULTS,
    needs=("thp",),
    pages=1,
    rows=("CT-18",),
    kind=Kind.DETAIL,
)
def test_continue_huge_part(ctx: Context) -> None:
    """Of a transparent huge page in the page cache too, UFFDIO_CONTINUE maps just the pages that it is asked for."""
    area = huge_area(ctx)
    advise(area.range, Advice.DONTNEED)  # of the mapping; the page cache keeps it
    ctx.uffd.register(area.range, MINOR)
    with promise("CT-18", "huge page"), faulting(ctx.uffd, area.page(6).start, flags=CACHED):
        ctx.uffd.continue_(area.page(5, 2))
    Pagemap.expect_present(area, 5, 6)
    area.expect_pattern_of(area, 5, 2)


# ---- what the mapping allows ---------------------------------------------------------------------------------------


@uffd_case("continue-shared-write", mem=(SHMEM, HUGETLB), features=MINOR_FAULTS, pages=2, rows=("CT-03",))
def test_continue_shared_write(ctx: Context) -> None:
    """A write to a shared mapping that UFFDIO_CONTINUE lets through reaches the file."""
    start = ctx.dst.start
    with cached(ctx) as where:
        write = CACHED | PagefaultFlag.WRITE
        with promise("CT-03"), faulting(ctx.uffd, start, call=lambda: poke(start, b"new"), flags=write):
            ctx.uffd.continue_(ctx.dst.page(0))
        expect((peek(start, 3), peek(where.start, 3)), (b"new", b"new"), "the mapping, the file")
    ctx.uffd.expect_no_message()


@uffd_case(
    "continue-private-write",
    mem=(SHMEM_PRIVATE, HUGETLB_PRIVATE),
    features=MINOR_FAULTS,
    pages=2,
    rows=("CT-13",),
    kind=Kind.DETAIL,
)
def test_continue_private_write(ctx: Context) -> None:
    """A write to a private mapping that UFFDIO_CONTINUE lets through changes a copy; the file keeps its bytes."""
    start = ctx.dst.start
    with cached(ctx) as where:
        write = CACHED | PagefaultFlag.WRITE
        with promise("CT-13"), faulting(ctx.uffd, start, call=lambda: poke(start, b"new"), flags=write):
            ctx.uffd.continue_(ctx.dst.page(0))
        expect(peek(start, 3), b"new", "the mapping")
        ctx.dst.pattern.verify(where.start, 0, 2, what="the file")
        ctx.uffd.continue_(ctx.dst.page(1))
        undisturbed(ctx.uffd, lambda: poke(ctx.dst.page(1).start, b"new"))
        ctx.dst.pattern.verify(where.start, 0, 2, what="the file")
    ctx.uffd.expect_no_message()


@uffd_case("continue-read-only", mem=FILE_BACKED, features=MINOR_FAULTS, pages=2, rows=("CT-13",), kind=Kind.DETAIL)
def test_continue_read_only(ctx: Context) -> None:
    """UFFDIO_CONTINUE maps into a read-only mapping too, and that stays read-only."""
    with cached(ctx) as where:
        protect(ctx.dst.range, PROT_READ)
        with promise("CT-13", "PROT_READ"):
            ctx.uffd.continue_(ctx.dst.page(0))
            expect_mapped(ctx, 0)
            traps = touch_trapped(ctx.dst.page(0), ctx.page_size, write=True)
            expect([trap and trap.signo for trap in traps], [SIGSEGV], "signals on write")
        ctx.dst.pattern.verify(where.start, 0, 2, what="the file")


@uffd_case(
    "continue-counted", mem=(SHMEM, SHMEM_PRIVATE), features=MINOR_FAULTS, pages=2048, rows=("CT-01",), kind=Kind.DETAIL
)
def test_continue_counted(ctx: Context) -> None:
    """Pages that UFFDIO_CONTINUE maps count as memory of the process, of the file's kind, until they are unmapped."""
    blur = 2 * max(32, 2 * (os.cpu_count() or 1))  # pages that the kernel may count on a CPU before it tells
    with cached(ctx) as where:
        advise(where, Advice.DONTNEED)
        before = resident("RssShmem")
        ctx.uffd.continue_(ctx.dst.range)
        grown = resident("RssShmem") - before
        expect(grown > ctx.nr_pages - blur, True, f"RssShmem grown by {grown} pages, {ctx.nr_pages} mapped, as")
        advise(ctx.dst.range, Advice.DONTNEED)
        left = resident("RssShmem") - before
        expect(abs(left) < blur, True, f"RssShmem {left} pages from where it was, all of them unmapped, as")


@uffd_case("continue-wp", mem=FILE_BACKED, features=MINOR_WP, pages=2, rows=("CT-10",))
def test_continue_wp(ctx: Context) -> None:
    """With UFFDIO_CONTINUE_MODE_WP the page can be read, and the first write waits; without, nothing is protected."""
    start = ctx.dst.start
    with cached(ctx, mode=MINOR | WP), promise("CT-10"):
        with faulting(ctx.uffd, start, flags=CACHED):
            ctx.uffd.continue_(ctx.dst.page(0), ContinueMode.WP | ContinueMode.DONTWAKE)
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.wake(ctx.dst.page(0))
        ctx.uffd.continue_(ctx.dst.page(1))
        expect_mapped(ctx, 0, 1)
        Pagemap.expect_protected(ctx.dst, [0], "after UFFDIO_CONTINUE, of page 0 with MODE_WP")
        undisturbed(ctx.uffd, lambda: poke(ctx.dst.page(1).start, b"new"))
        trapped = PagefaultFlag.WRITE | PagefaultFlag.WP
        with faulting(ctx.uffd, start, call=lambda: poke(start, b"new"), flags=trapped):
            ctx.uffd.unprotect(ctx.dst.page(0))
    expect(peek(start, 3), b"new", "what was written")
    ctx.uffd.expect_no_message()


@uffd_case("continue-wp-read-only", mem=FILE_BACKED, features=MINOR_WP, pages=1, rows=("CT-10",), kind=Kind.DETAIL)
def test_continue_wp_read_only(ctx: Context) -> None:
    """MODE_WP protects in a read-only mapping too: when mprotect(2) makes it writable, the first write waits."""
    with cached(ctx, mode=MINOR | WP), promise("CT-10", "PROT_READ"):
        protect(ctx.dst.range, PROT_READ)
        ctx.uffd.continue_(ctx.dst.range, ContinueMode.WP)
        Pagemap.expect_protected(ctx.dst, [0], "after UFFDIO_CONTINUE with MODE_WP into a read-only mapping")
        protect(ctx.dst.range, PROT_READ | PROT_WRITE)
        with faulting(ctx.uffd, ctx.dst.start, write=True, flags=PagefaultFlag.WRITE | PagefaultFlag.WP):
            ctx.uffd.unprotect(ctx.dst.range)
        ctx.dst.expect_pattern_of(ctx.dst)


@uffd_case("continue-wp-marker", mem=FILE_BACKED, features=MINOR_WP, pages=2, rows=("CT-10",), kind=Kind.DETAIL)
def test_continue_wp_marker(ctx: Context) -> None:
    """On a page protected before it was mapped the minor fault comes first, and UFFDIO_CONTINUE decides anew."""
    with cached(ctx, mode=MINOR | WP), promise("CT-10"):
        ctx.uffd.writeprotect(ctx.dst.range)
        Pagemap.expect_protected(ctx.dst, [0, 1], "after UFFDIO_WRITEPROTECT of unmapped pages")
        for page, mode in enumerate((ContinueMode.WP, ContinueMode(0))):
            with faulting(ctx.uffd, ctx.dst.page(page).start, flags=CACHED):
                ctx.uffd.continue_(ctx.dst.page(page), mode)
        expect_mapped(ctx, 0, 1)
        Pagemap.expect_protected(ctx.dst, [0], "after UFFDIO_CONTINUE, of page 0 with MODE_WP")
    ctx.uffd.expect_no_message()


@uffd_case("continue-wp-unregistered", mem=FILE_BACKED, features=MINOR_WP, pages=2, rows=("CT-10",))
def test_continue_wp_unregistered(ctx: Context) -> None:
    """UFFDIO_CONTINUE_MODE_WP needs a range registered for write-protect faults."""
    with cached(ctx), promise("CT-10"), faulting(ctx.uffd, ctx.dst.start, flags=CACHED):
        with refuses(EINVAL):
            ctx.uffd.continue_(ctx.dst.page(0), ContinueMode.WP)
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_present(ctx.dst)
        ctx.uffd.continue_(ctx.dst.page(0))


@uffd_case(
    "continue-poison",
    mem=FILE_BACKED,
    features=MINOR_FAULTS | Feature.POISON,
    pages=2,
    rows=("CT-20",),
    kind=Kind.DETAIL,
)
def test_continue_poison(ctx: Context) -> None:
    """UFFDIO_CONTINUE puts the cached page in the place of a poison marker."""
    with cached(ctx):
        ctx.uffd.poison(ctx.dst.page(0))
        with promise("CT-20"):
            ctx.uffd.continue_(ctx.dst.page(0))
            expect_mapped(ctx, 0)


# ---- pages that are not simply in memory ---------------------------------------------------------------------------


@uffd_case(
    "continue-swapped",
    mem=(SHMEM, SHMEM_PRIVATE),
    features=MINOR_FAULTS,
    needs=("swap",),
    pages=2,
    rows=("CT-19",),
    kind=Kind.DETAIL,
)
def test_continue_swapped(ctx: Context) -> None:
    """A page of the file that is in swap counts as cached: a minor fault, and UFFDIO_CONTINUE brings it back."""
    with cached(ctx) as where:
        page_out(where, lambda: smaps_bytes(where, "Swap") == where.len)
        with promise("CT-19"), faulting(ctx.uffd, ctx.dst.start, flags=CACHED):
            ctx.uffd.continue_(ctx.dst.page(0))
        expect_mapped(ctx, 0)


@contextmanager
def hardware_poisoned(area: Area, page: Range) -> Iterator[None]:
    """Have the kernel believe that the memory of a page of the file is broken (MADV_HWPOISON).

    Afterwards the file is emptied, for only a page that nobody uses can be declared sound again.
    """
    with declared_sound(page):
        try:
            with handled(SIGBUS):  # sent to whoever has it mapped
                advise(page, Advice.HWPOISON)
            yield
        finally:
            os.ftruncate(area.fd or -1, 0)


@uffd_case(
    "continue-hardware-poison",
    mem=FILE_BACKED,
    features=MINOR_FAULTS,
    needs=("cap_sys_admin",),
    pages=2,
    rows=("CT-21",),
    kind=Kind.DETAIL,
)
def test_continue_hardware_poison(ctx: Context) -> None:
    """UFFDIO_CONTINUE does not map a cached page whose memory is broken."""
    with cached(ctx) as where, hardware_poisoned(ctx.dst, Range(where.start, ctx.page_size)):
        with promise("CT-21"), refuses(EIO):
            ctx.uffd.continue_(ctx.dst.page(0))
        Pagemap.expect_present(ctx.dst)
