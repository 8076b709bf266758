# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_MOVE: a page changes its place without being copied."""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack, closing
from errno import EAGAIN, EBUSY, EEXIST, EFAULT, EINVAL, ENOENT
from functools import partial
from pathlib import Path
from signal import SIGBUS, SIGSEGV

from uffd_selftests import syscalls, uapi
from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    MISSING,
    UNTOUCHED,
    WP,
    Context,
    Pagemap,
    Skip,
    Uffd,
    UffdError,
    bad_ranges,
    eventually,
    expect,
    expect_errno,
    fails,
    held_up,
    huge_area,
    prevent_hugepages,
    promise,
    refuses,
    require_soft_dirty,
    swap_out,
)
from uffd_selftests.iouring import fixed_buffer
from uffd_selftests.mem_types import ANON, HUGETLB, HUGETLB_PRIVATE, SHMEM, SHMEM_PRIVATE, Area, pmd_size
from uffd_selftests.memory import (
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    AccessError,
    Advice,
    KernelError,
    Range,
    advise,
    errno_name,
    expect_bytes,
    keep_small,
    mapped,
    peek,
    pmd_mapped,
    poke,
    protect,
    read_only,
    unmap,
    user_space_end,
)
from uffd_selftests.processes import (
    LONG_FILL,
    Channel,
    Child,
    Waiter,
    faulting,
    faulting_pages,
    long_fill,
    orphaned,
    poised,
    settle,
    undisturbed,
    unread_event,
)
from uffd_selftests.uapi import PM_PFN_MASK, PM_SOFT_DIRTY, Feature, MoveMode, RegisterMode

MOVE = Feature.MOVE
HOLES = MoveMode.ALLOW_SRC_HOLES
READ_WRITE = PROT_READ | PROT_WRITE


def prepare(ctx: Context, mode: RegisterMode = MISSING) -> None:
    """Fill the source and register the destination."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, mode)


def move(ctx: Context, first: int, count: int = 1, mode: MoveMode = MoveMode(0)) -> None:
    """Move pages of the source to the same pages of the destination."""
    ctx.uffd.move(ctx.dst.page(first).start, ctx.src.page(first).start, count * ctx.page_size, mode)


def expect_moved(ctx: Context, *pages: int) -> None:
    """Assert that these pages have moved, and that all others are where they were, with their bytes."""
    stayed = sorted(set(range(ctx.nr_pages)) - set(pages))
    Pagemap.expect_present(ctx.dst, *pages)
    Pagemap.expect_present(ctx.src, *stayed)
    for area, numbers in (ctx.dst, pages), (ctx.src, stayed):
        for page in numbers:
            area.expect_pattern_of(ctx.src, page, 1)


# ---- what it does --------------------------------------------------------------------------------------------------


@uffd_case("move-pages", mem=(ANON,), features=MOVE, pages=4, rows=("MV-01",))
def test_move_pages(ctx: Context) -> None:
    """UFFDIO_MOVE moves its pages and no others, and wakes the threads that wait for these and no others."""
    prepare(ctx)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1, 2, 3) as waiters:
        move(ctx, 1, 2)
        ctx.uffd.expect_still_asleep(2)
        expect_moved(ctx, 1, 2)
        for page, asleep in ((0, 1), (3, 0)):
            move(ctx, page)
            ctx.uffd.expect_still_asleep(asleep)
    expect_moved(ctx, 0, 1, 2, 3)
    for page, waiter in enumerate(waiters):
        expect(waiter.result(), peek(ctx.dst.page(page).start), f"what the thread on page {page} has read")
    ctx.uffd.expect_no_message()


@uffd_case("move-not-copy", mem=(ANON,), features=MOVE, pages=2, rows=("MV-01",))
def test_move_not_copy(ctx: Context) -> None:
    """What arrives, at whatever place, is the same physical page; it can be written, and the old place is empty."""
    prepare(ctx)
    pfn = Pagemap.entry(ctx.src.start) & PM_PFN_MASK  # zero without CAP_SYS_ADMIN
    ctx.uffd.move(ctx.dst.page(1).start, ctx.src.start, ctx.page_size)
    expect(hex(Pagemap.entry(ctx.dst.page(1).start) & PM_PFN_MASK), hex(pfn), "page frame number")
    ctx.src.pattern.verify(ctx.dst.page(1).start, 0, 1)
    undisturbed(ctx.uffd, lambda: poke(ctx.dst.page(1).start, b"new"))
    expect(peek(ctx.dst.page(1).start, 3), b"new", "what was written")
    Pagemap.expect_present(ctx.src, 1)
    ctx.src.expect_zero(0, 1)


@uffd_case("move-source-missing", mem=(ANON,), features=MOVE, pages=2, rows=("MV-01",))
def test_move_source_missing(ctx: Context) -> None:
    """A page that has left a registered range is missing there, and announced when it is touched."""
    prepare(ctx)
    with Uffd.open() as other:
        other.register(ctx.src.range, MISSING)
        move(ctx, 0)
        with faulting(other, ctx.src.start):
            other.zeropage(ctx.src.page(0))
    ctx.src.expect_zero(0, 1)
    ctx.src.expect_pattern_of(ctx.src, 1)


@uffd_case("move-dontwake", mem=(ANON,), features=MOVE, pages=2, rows=("MV-03", "MV-16"))
def test_move_dontwake(ctx: Context) -> None:
    """With DONTWAKE the page is there and its thread sleeps on, through a refused second move too, until woken."""
    prepare(ctx)
    with faulting(ctx.uffd, ctx.dst.start):
        with promise("MV-16"):
            move(ctx, 0, mode=MoveMode.DONTWAKE)
            ctx.uffd.expect_still_asleep(1)
            expect_moved(ctx, 0)
        with promise("MV-03", "moved already"), refuses(EEXIST):
            ctx.uffd.move(ctx.dst.start, ctx.src.page(1).start, ctx.page_size)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(ctx.dst.page(0))
    expect_moved(ctx, 0)
    ctx.uffd.expect_no_message()


@uffd_case("move-unread", mem=(ANON,), features=MOVE, pages=2, rows=("MV-01", "RD-16"))
def test_move_unread(ctx: Context) -> None:
    """UFFDIO_MOVE takes away the message of a fault that it resolves before anybody has read it."""
    prepare(ctx)
    with faulting(ctx.uffd, ctx.dst.start, read=False):
        move(ctx, 0)
        expect(ctx.uffd.readable(), False, "POLLIN after the move")
        ctx.uffd.expect_no_message()
        expect((ctx.uffd.fdinfo.pending, ctx.uffd.fdinfo.total), (0, 0), "pending and total of fdinfo")
    expect_moved(ctx, 0)


@uffd_case("move-within", mem=(ANON,), features=MOVE, pages=4, rows=("MV-17",))
def test_move_within(ctx: Context) -> None:
    """UFFDIO_MOVE works inside of one mapping, page by page: down onto itself, but not up."""
    area, size = ctx.src, ctx.page_size
    area.fill(1, 2)
    ctx.uffd.register(area.range, MISSING)
    with promise("MV-17", "onto itself"), refuses(EEXIST):
        ctx.uffd.move(area.page(1).start, area.page(1).start, size)
    with promise("MV-17", "up by a page"), refuses(EEXIST):
        ctx.uffd.move(area.page(2).start, area.page(1).start, 2 * size)
    Pagemap.expect_present(area, 1, 2)
    with promise("MV-17", "down by a page"):
        ctx.uffd.move(area.page(0).start, area.page(1).start, 2 * size)
        Pagemap.expect_present(area, 0, 1)
        area.pattern.verify(area.start - size, 1, 2)
    with promise("MV-17", "elsewhere"):
        ctx.uffd.move(area.page(2).start, area.page(0).start, 2 * size)
        Pagemap.expect_present(area, 2, 3)
        area.pattern.verify(area.start + size, 1, 2)


@uffd_case("move-zeropage", mem=(ANON,), features=MOVE, pages=2, rows=("MV-18",), kind=Kind.DETAIL)
def test_move_zeropage(ctx: Context) -> None:
    """The shared zero page can be moved: zeroes at the destination, which can be written, and an empty source."""
    peek(ctx.src.start)
    pfn = Pagemap.entry(ctx.src.start) & PM_PFN_MASK
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("MV-18"), faulting(ctx.uffd, ctx.dst.start):
        move(ctx, 0)
    Pagemap.expect_present(ctx.dst, 0)
    Pagemap.expect_present(ctx.src)
    expect(hex(Pagemap.entry(ctx.dst.start) & PM_PFN_MASK), hex(pfn), "page frame number")
    ctx.dst.expect_zero(0, 1)
    undisturbed(ctx.uffd, lambda: poke(ctx.dst.start, b"new"))
    expect(peek(ctx.dst.start, 4), b"new\0", "what was written")
    ctx.src.expect_zero()


@uffd_case(
    "move-wp-only", mem=(ANON,), features=MOVE | Feature.PAGEFAULT_FLAG_WP, pages=2, rows=("MV-25",), kind=Kind.DETAIL
)
def test_move_wp_only(ctx: Context) -> None:
    """The destination may be registered in any mode."""
    prepare(ctx, WP)
    with promise("MV-25"):
        move(ctx, 1)
        expect_moved(ctx, 1)


@uffd_case(
    "move-protected", mem=(ANON,), features=MOVE | Feature.PAGEFAULT_FLAG_WP, pages=2, rows=("MV-21",), kind=Kind.DETAIL
)
def test_move_protected(ctx: Context) -> None:
    """Write protection does not come along to a range that is not registered for it."""
    prepare(ctx)
    ctx.uffd.register(ctx.src.range, WP)
    ctx.uffd.writeprotect(ctx.src.range)
    with promise("MV-21"):
        move(ctx, 0)
        Pagemap.expect_protected(ctx.dst, [], "after UFFDIO_MOVE")
        undisturbed(ctx.uffd, lambda: poke(ctx.dst.start, b"new"))
    expect(peek(ctx.dst.start, 3), b"new", "what was written")
    Pagemap.expect_protected(ctx.src, [1], "after UFFDIO_MOVE of page 0")


@uffd_case("move-soft-dirty", mem=(ANON,), features=MOVE, pages=2, rows=("MV-01",), bugs=(43,), kind=Kind.DETAIL)
def test_move_soft_dirty(ctx: Context) -> None:
    """A page that has moved counts as written since the soft-dirty bits were cleared."""
    prepare(ctx)
    require_soft_dirty(ctx.src.start)
    Path("/proc/self/clear_refs").write_text("4")
    expect(bool(Pagemap.entry(ctx.src.start) & PM_SOFT_DIRTY), False, "soft-dirty after clear_refs")
    move(ctx, 0)
    expect(bool(Pagemap.entry(ctx.dst.start) & PM_SOFT_DIRTY), True, "soft-dirty after UFFDIO_MOVE")


@uffd_case(
    "move-huge-soft-dirty", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-01",), kind=Kind.DETAIL
)
def test_move_huge_soft_dirty(ctx: Context) -> None:
    """A transparent huge page that has moved, and a part of one, counts as written since they were cleared."""
    for what, count in (("whole", pmd_size() // PAGE_SIZE), ("a part", 2)):
        src, dst = huge_page(ctx)
        require_soft_dirty(src.start)
        Path("/proc/self/clear_refs").write_text("4")
        with promise("MV-01", f"huge page, {what}"):
            ctx.uffd.move(dst.start, src.start, count * PAGE_SIZE)
            dirty = [page for page in range(count) if Pagemap.entry(dst.page(page).start) & PM_SOFT_DIRTY]
            expect(len(dirty), count, "pages that are soft-dirty after UFFDIO_MOVE")


# ---- holes and partial results -------------------------------------------------------------------------------------


@uffd_case("move-hole", mem=(ANON,), features=MOVE, pages=2, rows=("MV-04",))
def test_move_hole(ctx: Context) -> None:
    """A hole cannot be moved; with ALLOW_SRC_HOLES it counts as moved, and the destination stays missing."""
    ctx.src.fill(1, 1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start):
        with promise("MV-04"), refuses(ENOENT):
            move(ctx, 0)
        ctx.uffd.expect_still_asleep(1)
        with promise("MV-04", "ALLOW_SRC_HOLES"):
            move(ctx, 0, mode=HOLES)
            ctx.uffd.wait_fault(ctx.dst.start)  # woken for nothing
        Pagemap.expect_present(ctx.dst)
        ctx.uffd.move(ctx.dst.start, ctx.src.page(1).start, ctx.page_size)
    ctx.uffd.expect_no_message()


@uffd_case("move-holes-among-pages", mem=(ANON,), features=MOVE, pages=4, rows=("MV-04",))
def test_move_holes_among_pages(ctx: Context) -> None:
    """With ALLOW_SRC_HOLES the pages of a range move and its holes do not matter."""
    ctx.src.fill(0, 1)
    ctx.src.fill(2, 1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("MV-04", "ALLOW_SRC_HOLES"):
        move(ctx, 0, 4, HOLES)
    Pagemap.expect_present(ctx.dst, 0, 2)
    Pagemap.expect_present(ctx.src)
    for page in (0, 2):
        ctx.dst.expect_pattern_of(ctx.src, page, 1)
    with faulting_pages(ctx.uffd, ctx.dst, 1, 3):
        ctx.uffd.zeropage(ctx.dst.page(1))
        ctx.uffd.zeropage(ctx.dst.page(3))


@uffd_case("move-holes-dontwake", mem=(ANON,), features=MOVE, pages=2, rows=("MV-04",))
def test_move_holes_dontwake(ctx: Context) -> None:
    """ALLOW_SRC_HOLES and DONTWAKE together do what each does alone: the hole does not matter, and nobody wakes."""
    ctx.src.fill(0, 1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start), promise("MV-04"):
        ctx.uffd.move(ctx.dst.start, ctx.src.start, ctx.dst.range.len, HOLES | MoveMode.DONTWAKE)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(ctx.dst.page(0))
    Pagemap.expect_present(ctx.dst, 0)


@uffd_case("move-nothing", mem=(ANON,), features=MOVE, pages=1, rows=("MV-28",), bugs=(39,), kind=Kind.DETAIL)
def test_move_nothing(ctx: Context) -> None:
    """Megabytes of nothing, without any page table, are a hole too; few pages in the midst of them move."""
    length = 4 * (pmd_size() or 1 << 21)
    src, dst = ctx.allocate(length // PAGE_SIZE), ctx.allocate(length // PAGE_SIZE)
    ctx.uffd.register(dst.range, MISSING)
    with promise("MV-28"), refuses(ENOENT):
        ctx.uffd.move(dst.start, src.start, length)
    with promise("MV-28", "ALLOW_SRC_HOLES"):
        ctx.uffd.move(dst.start, src.start, length, HOLES)
    Pagemap.expect_present(dst)
    pages = (1, src.nr_pages // 2 + 7, src.nr_pages - 1)
    for page in pages:
        src.fill(page, 1)
    with promise("MV-28", "ALLOW_SRC_HOLES, with some pages"):
        ctx.uffd.move(dst.start, src.start, length, HOLES)
    Pagemap.expect_present(dst, *pages)
    Pagemap.expect_present(src)
    for page in pages:
        dst.expect_pattern_of(src, page, 1)


@uffd_case("move-nowhere", mem=(ANON,), features=MOVE, pages=1, rows=("MV-28",), kind=Kind.DETAIL)
def test_move_nowhere(ctx: Context) -> None:
    """A hole in a corner of the address space that has no page tables at all is a hole like any other."""
    entries = PAGE_SIZE // 8
    corner = min(PAGE_SIZE * entries**2, 1 << 36)  # what one page table of PMDs spans: a gibibyte with pages of 4 kB
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    ctx.uffd.register(ctx.dst.range, MISSING)
    with mapped(2 * corner, flags=flags) as place:
        hole = Range(-(-place.start // corner) * corner, PAGE_SIZE)
        with promise("MV-28", "no page tables"), refuses(ENOENT):
            ctx.uffd.move(ctx.dst.start, hole.start, PAGE_SIZE)
        with promise("MV-28", "no page tables, ALLOW_SRC_HOLES"):
            ctx.uffd.move(ctx.dst.start, hole.start, PAGE_SIZE, HOLES)
        keep_small(place)
        other = hole.start + pmd_size()
        poke(other + pmd_size(), b"x")
        with promise("MV-28", "only the page table is missing"), refuses(ENOENT):
            ctx.uffd.move(ctx.dst.start, other, PAGE_SIZE)
        Pagemap.expect_present(ctx.dst)


@uffd_case("move-partial", mem=(ANON,), features=MOVE, pages=4, rows=("MV-05",))
def test_move_partial(ctx: Context) -> None:
    """UFFDIO_MOVE stops at a hole or a page in its way, says how far it came, and wakes the threads up to there."""
    prepare(ctx)
    advise(ctx.src.page(2), Advice.DONTNEED)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1, 2, 3):
        with promise("MV-05", "hole"), refuses(EAGAIN, output=ctx.page_size):
            move(ctx, 1, 3)
        ctx.uffd.expect_still_asleep(3)
        Pagemap.expect_present(ctx.dst, 1)
        Pagemap.expect_present(ctx.src, 0, 3)
        ctx.src.fill(1, 1)
        with promise("MV-05", "page in the way"), refuses(EAGAIN, output=ctx.page_size):
            move(ctx, 0, 2)
        ctx.uffd.expect_still_asleep(2)
        Pagemap.expect_present(ctx.dst, 0, 1)
        Pagemap.expect_present(ctx.src, 1, 3)
        ctx.uffd.zeropage(ctx.dst.page(2))
        move(ctx, 3)
    for page in (0, 1, 3):
        ctx.dst.expect_pattern_of(ctx.src, page, 1)


# ---- pages that cannot be moved ------------------------------------------------------------------------------------


@uffd_case("move-shared", mem=(ANON,), features=MOVE, pages=2, rows=("MV-12",))
def test_move_shared(ctx: Context) -> None:
    """A page shared with a forked child cannot be moved, not even when the child is gone, until it is written again."""
    prepare(ctx)
    with faulting(ctx.uffd, ctx.dst.start):
        with Child(lambda channel: channel.receive()) as child:
            with promise("MV-12", "with the child"), refuses(EBUSY):
                move(ctx, 0)
            child.send()
        with promise("MV-12", "after the child"), refuses(EBUSY):
            move(ctx, 0)
        ctx.uffd.expect_still_asleep(1)
        expect_moved(ctx)
        ctx.src.fill(0, 1)
        with promise("MV-12", "written again"), refuses(EAGAIN, output=ctx.page_size):
            move(ctx, 0, 2)
    expect_moved(ctx, 0)


@uffd_case("move-dontfork", mem=(ANON,), features=MOVE, pages=2, rows=("MV-13",))
def test_move_dontfork(ctx: Context) -> None:
    """A source that children do not inherit (MADV_DONTFORK) can be moved while they live."""
    advise(ctx.src.range, Advice.DONTFORK)
    prepare(ctx)
    with Child(lambda channel: channel.receive()) as child:
        with promise("MV-13"):
            move(ctx, 0, 2)
            expect_moved(ctx, 0, 1)
        child.send()


@uffd_case("move-pinned", mem=(ANON,), features=MOVE, pages=2, rows=("MV-14",), bugs=(37,))
def test_move_pinned(ctx: Context) -> None:
    """A page that a device may write to (a long-term pin) cannot be moved until it is unpinned."""
    prepare(ctx)
    with faulting(ctx.uffd, ctx.dst.start):
        with fixed_buffer(ctx.src.page(0)):
            with promise("MV-14", "pinned"), refuses(EBUSY):
                move(ctx, 0)
            ctx.uffd.expect_still_asleep(1)
            move(ctx, 1)
            expect_moved(ctx, 1)
        with promise("MV-14", "unpinned"):
            move(ctx, 0)
    expect_moved(ctx, 0, 1)


@uffd_case("move-spliced", mem=(ANON,), features=MOVE, pages=2, rows=("MV-27",), kind=Kind.DETAIL)
def test_move_spliced(ctx: Context) -> None:
    """A page that a pipe refers to (vmsplice(2)) can be moved, and the pipe keeps its bytes."""
    prepare(ctx)
    reader, writer = os.pipe()
    vector = (ctypes.c_uint64 * 2)(ctx.src.start, ctx.page_size)
    syscalls.call("vmsplice", writer, ctypes.addressof(vector), 1, 0)
    with promise("MV-27"):
        move(ctx, 0)
        expect_moved(ctx, 0)
        expect(os.read(reader, ctx.page_size) == peek(ctx.dst.start, ctx.page_size), True, "the pipe has the bytes")
    os.close(reader)
    os.close(writer)


@uffd_case(
    "move-marker",
    mem=(ANON,),
    features=MOVE | Feature.WP_UNPOPULATED | Feature.POISON,
    pages=2,
    rows=("MV-24",),
    kind=Kind.DETAIL,
)
def test_move_marker(ctx: Context) -> None:
    """A missing page that is poisoned or write-protected cannot be moved, and is no hole either."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.register(ctx.src.range, MISSING | WP)
    ctx.uffd.writeprotect(ctx.src.page(0))
    ctx.uffd.poison(ctx.src.page(1))
    for page, marker in enumerate(("protected", "poisoned")):
        for mode in (MoveMode(0), HOLES):
            with promise("MV-24", f"{marker}, {mode}"), refuses(EFAULT):
                move(ctx, page, mode=mode)
    Pagemap.expect_protected(ctx.src, [0], "after the refusal")
    expect(signal_at(ctx.src.page(1).start), SIGBUS, "signal on the poisoned page")
    Pagemap.expect_present(ctx.dst)


def signal_at(address: int) -> int:
    """Read a byte; the number of the signal that ended it, 0 if none did."""
    try:
        peek(address)
    except AccessError as error:
        return error.trap.signo
    return 0


def guard(page: Range) -> None:
    """Make it a guard page; Skip where the kernel cannot."""
    try:
        advise(page, Advice.GUARD_INSTALL)
    except KernelError as error:
        raise Skip(f"MADV_GUARD_INSTALL: {errno_name(error.errno or 0)} (Linux 6.13)") from None


# ---- what it refuses -----------------------------------------------------------------------------------------------


@uffd_case("move-errors", mem=(ANON,), features=MOVE, pages=2, rows=("MV-02",))
def test_move_errors(ctx: Context) -> None:
    """UFFDIO_MOVE refuses ranges that are not whole pages, unknown modes, and an argument it cannot read."""
    prepare(ctx)
    good, size = ctx.src.start, ctx.page_size
    for what, bad in bad_ranges(ctx.dst.page(0)).items():
        with promise("MV-02", f"destination: {what}"), refuses(EINVAL, output=UNTOUCHED):
            ctx.uffd.move(bad.start, good, bad.len)
    for what, bad in bad_ranges(ctx.src.page(0)).items():
        with promise("MV-02", f"source: {what}"), refuses(EINVAL, output=UNTOUCHED):
            ctx.uffd.move(ctx.dst.start, bad.start, bad.len)
    end = user_space_end() or 1 << 63
    with promise("MV-02", "source: reaches beyond user space"), refuses(EINVAL, output=UNTOUCHED):
        ctx.uffd.move(ctx.dst.start, end - 2 * size, 4 * size)
    for bit in range(2, 64):
        with promise("MV-02", f"mode bit {bit}"), refuses(EINVAL, output=UNTOUCHED):
            ctx.uffd.move(ctx.dst.start, good, size, MoveMode(1 << bit))
    with promise("MV-02", "argument NULL"), refuses(EFAULT):
        ctx.uffd.raw_ioctl(uapi.UFFDIO_MOVE, 0)
    expect_moved(ctx)


@uffd_case("move-output-read-only", mem=(ANON,), features=MOVE, pages=2, rows=("MV-02",), kind=Kind.DETAIL)
def test_move_output_read_only(ctx: Context) -> None:
    """UFFDIO_MOVE that cannot write its result has moved the page but woken nobody."""
    prepare(ctx)
    arg = uapi.uffdio_move(ctx.dst.start, ctx.src.start, ctx.page_size)
    with faulting(ctx.uffd, ctx.dst.start):
        with promise("MV-02", "move not writable"), read_only(bytes(arg)) as address, refuses(EFAULT):
            ctx.uffd.raw_ioctl(uapi.UFFDIO_MOVE, address)
        ctx.uffd.expect_still_asleep(1)
        expect_moved(ctx, 0)
        ctx.uffd.wake(ctx.dst.page(0))


@uffd_case("move-eexist", mem=(ANON,), features=MOVE, pages=2, rows=("MV-03",))
def test_move_eexist(ctx: Context) -> None:
    """UFFDIO_MOVE does not replace a page, be it a written one or zeroes that were only read."""
    poke(ctx.dst.start, b"data")
    peek(ctx.dst.page(1).start)
    prepare(ctx)
    for page, how in enumerate(("written", "read only")):
        for mode in (MoveMode(0), HOLES):
            with promise("MV-03", f"{how}, {mode}"), refuses(EEXIST):
                move(ctx, page, mode=mode)
    ctx.src.expect_pattern_of(ctx.src)
    expect(peek(ctx.dst.start, 5), b"data\0", "the page")
    ctx.dst.expect_zero(1)


@uffd_case(
    "move-eexist-marker", mem=(ANON,), features=MOVE | Feature.WP_UNPOPULATED | Feature.POISON, pages=2, rows=("MV-03",)
)
def test_move_eexist_marker(ctx: Context) -> None:
    """UFFDIO_MOVE does not replace a marker, of write protection or of poison, though its page is missing."""
    prepare(ctx, MISSING | WP)
    ctx.uffd.writeprotect(ctx.dst.page(0))
    ctx.uffd.poison(ctx.dst.page(1))
    with faulting(ctx.uffd, ctx.dst.start):
        for page, marker in enumerate(("protected", "poisoned")):
            with promise("MV-03", marker), refuses(EEXIST):
                move(ctx, page)
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_protected(ctx.dst, [0], "after the refusal")
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
    expect(undisturbed(ctx.uffd, partial(signal_at, ctx.dst.page(1).start)), SIGBUS, "signal on the poisoned page")
    ctx.src.expect_pattern_of(ctx.src)


@uffd_case("move-guard", mem=(ANON,), features=MOVE, pages=2, rows=("MV-03", "MV-24"), kind=Kind.DETAIL)
def test_move_guard(ctx: Context) -> None:
    """UFFDIO_MOVE neither replaces a guard page nor moves one, and it stays one."""
    prepare(ctx)
    guard(ctx.dst.page(0))
    guard(ctx.src.page(1))
    with promise("MV-03", "guard"), refuses(EEXIST):
        move(ctx, 0)
    for mode in (MoveMode(0), HOLES):
        with promise("MV-24", f"guard, {mode}"), refuses(EFAULT):
            move(ctx, 1, mode=mode)
    for address in (ctx.dst.start, ctx.src.page(1).start):
        expect(undisturbed(ctx.uffd, partial(signal_at, address)), SIGSEGV, "signal at the guard page")
    ctx.src.expect_pattern_of(ctx.src, 0, 1)


@uffd_case("move-unmapped", mem=(ANON,), features=MOVE, pages=4, rows=("MV-06",))
def test_move_unmapped(ctx: Context) -> None:
    """UFFDIO_MOVE says ENOENT where the source or the destination is not mapped at all."""
    prepare(ctx)
    unmap(ctx.src.page(1))
    unmap(ctx.dst.page(2))
    for page, what in enumerate(("source", "destination"), 1):
        for mode in (MoveMode(0), HOLES):
            with promise("MV-06", f"{what}, {mode}"), refuses(ENOENT):
                move(ctx, page, mode=mode)
    ctx.src.expect_pattern_of(ctx.src, 2, 2)


@uffd_case("move-from-nowhere", mem=(ANON, SHMEM), features=MOVE, pages=3, rows=("MV-06", "MV-11"))
def test_move_from_nowhere(ctx: Context) -> None:
    """From where nothing is mapped, below or above, UFFDIO_MOVE says ENOENT; into shared memory EINVAL will do."""
    dst = ctx.dst.page(1)
    unmap(ctx.dst.page(0))
    unmap(ctx.dst.page(2))
    ctx.uffd.register(dst, MISSING)
    refused = [ENOENT, EINVAL] if ctx.mem.shared else [ENOENT]
    for what, src in ("below", dst.start - ctx.page_size), ("above", dst.end):
        for mode in (MoveMode(0), HOLES):
            with promise("MV-06", f"from {what}, {mode}"), fails(*refused):
                ctx.uffd.move(dst.start, src, ctx.page_size, mode)
    Pagemap.expect_present(ctx.dst)


@uffd_case("move-vanished", mem=(ANON,), features=MOVE, pages=1, rows=("MV-06",), kind=Kind.DETAIL)
def test_move_vanished(ctx: Context) -> None:
    """UFFDIO_MOVE says ENOENT, too, where both mappings go away while it waits for the address space.

    Three mappings in a row are unmapped, source first; then it takes until a fill of the one between is over.
    """
    area, uffd = ctx.allocate(LONG_FILL + 3), ctx.uffd
    src, between, dst = area.page(0), area.page(1, LONG_FILL), area.page(1 + LONG_FILL, 2)
    keep_small(area.range)
    for page in src.start, dst.start:
        poke(page, b"there")
    uffd.register(dst, MISSING)
    advise(dst, Advice.DONTDUMP)  # now it differs from what is between, as the source does, which is not registered

    def move_late() -> None:
        try:
            uffd.move(dst.start + PAGE_SIZE, src.start, PAGE_SIZE)
        except UffdError as error:  # none if it came before after all
            expect_errno(error, ENOENT, "errno of the move")

    with (
        poised(move_late) as (go, _),
        long_fill(uffd, between),
        Waiter(lambda: unmap(area.range)) as unmapping,
    ):
        settle(unmapping)
        go()


@uffd_case("move-not-registered", mem=(ANON,), features=MOVE, pages=2, rows=("MV-07",))
def test_move_not_registered(ctx: Context) -> None:
    """UFFDIO_MOVE wants a destination that is registered, and with this very handle."""
    ctx.src.fill()
    with promise("MV-07", "not registered"), refuses(EINVAL):
        move(ctx, 0)
    with Uffd.open() as other:
        other.register(ctx.dst.range, MISSING)
        with faulting(other, ctx.dst.start):
            with promise("MV-07", "registered with another handle"), refuses(EINVAL):
                move(ctx, 0)
            other.expect_still_asleep(1)
            expect_moved(ctx)
            other.zeropage(ctx.dst.page(0))


@uffd_case("move-past-the-end", mem=(ANON,), features=MOVE, pages=4, rows=("MV-08",))
def test_move_past_the_end(ctx: Context) -> None:
    """UFFDIO_MOVE wants all of its source in one mapping and all of its destination in one registered mapping."""
    ctx.src.fill()
    size = ctx.page_size
    ctx.uffd.register(ctx.dst.page(1, 3), MISSING)
    with promise("MV-08", "past the destination"), refuses(EINVAL):
        ctx.uffd.move(ctx.dst.page(3).start, ctx.src.start, 2 * size)
    with promise("MV-08", "past the source"), refuses(EINVAL):
        ctx.uffd.move(ctx.dst.page(1).start, ctx.src.page(3).start, 2 * size)
    ctx.uffd.unregister(ctx.dst.page(3))
    with promise("MV-08", "past the registered pages"), refuses(EINVAL):
        ctx.uffd.move(ctx.dst.page(2).start, ctx.src.start, 2 * size)
    with promise("MV-08", "before the registered pages"), refuses(EINVAL):
        ctx.uffd.move(ctx.dst.page(0).start, ctx.src.start, 2 * size)
    expect_moved(ctx)
    ctx.uffd.move(ctx.dst.page(1).start, ctx.src.page(1).start, 2 * size)
    expect_moved(ctx, 1, 2)


def lock(area: Area) -> None:
    """Lock what is or comes into an area (MLOCK_ONFAULT); Skip where RLIMIT_MEMLOCK forbids it."""
    try:
        syscalls.call("mlock2", area.start, area.range.len, 1)
    except KernelError as error:
        raise Skip(f"mlock2(2): {errno_name(error.errno or 0)}: raise RLIMIT_MEMLOCK (ulimit -l)") from None


def unlock(area: Area) -> None:
    """Undo lock()."""
    syscalls.call("munlock", area.start, area.range.len)


@uffd_case("move-protections", mem=(ANON,), features=MOVE, pages=2, rows=("MV-09",))
def test_move_protections(ctx: Context) -> None:
    """UFFDIO_MOVE wants both mappings writable and with the same protection."""
    prepare(ctx)
    for what, src, dst in (
        ("source read-only", PROT_READ, READ_WRITE),
        ("destination read-only", READ_WRITE, PROT_READ),
        ("both read-only", PROT_READ, PROT_READ),
        ("source PROT_NONE", 0, READ_WRITE),
    ):
        protect(ctx.src.range, src)
        protect(ctx.dst.range, dst)
        with promise("MV-09", what), refuses(EINVAL):
            move(ctx, 0)
    for area in (ctx.src, ctx.dst):
        protect(area.range, READ_WRITE)
    expect_moved(ctx)
    move(ctx, 0)


@uffd_case("move-protection-keys", mem=(ANON,), features=MOVE, pages=2, rows=("MV-09",), kind=Kind.DETAIL)
def test_move_protection_keys(ctx: Context) -> None:
    """UFFDIO_MOVE wants both mappings to have the same protection key, too: it would let a page out of its domain."""
    prepare(ctx)
    try:
        key = syscalls.call("pkey_alloc", 0, 0)
    except KernelError as error:
        raise Skip(f"no protection keys: {errno_name(error.errno or 0)}: a processor and a kernel with them") from None
    for what, area in ("source", ctx.src), ("destination", ctx.dst):
        syscalls.call("pkey_mprotect", area.start, area.range.len, READ_WRITE, key)
        if area is ctx.src:
            with promise("MV-09", f"only the {what} with a key"), refuses(EINVAL):
                move(ctx, 0)
            expect_moved(ctx)
    with promise("MV-09", "both with the same key"):
        move(ctx, 0)
        expect_moved(ctx, 0)


@uffd_case("move-locked", mem=(ANON,), features=MOVE, pages=2, rows=("MV-09", "MV-10"))
def test_move_locked(ctx: Context) -> None:
    """UFFDIO_MOVE wants both mappings locked into memory, or none."""
    prepare(ctx)
    for what, area in (("source", ctx.src), ("destination", ctx.dst)):
        lock(area)
        with promise("MV-09", f"{what} locked"), refuses(EINVAL):
            move(ctx, 0)
        unlock(area)
    lock(ctx.src)
    lock(ctx.dst)
    with promise("MV-10", "both locked"):
        move(ctx, 0)
        expect_moved(ctx, 0)


@uffd_case("move-executable", mem=(ANON,), features=MOVE, pages=2, rows=("MV-09", "MV-10"), kind=Kind.DETAIL)
def test_move_executable(ctx: Context) -> None:
    """UFFDIO_MOVE wants both mappings executable, or none."""
    prepare(ctx)
    try:
        protect(ctx.src.range, READ_WRITE | PROT_EXEC)
    except KernelError as error:
        raise Skip(f"{error}: the security policy forbids memory that is writable and executable") from None
    with promise("MV-09", "only the source executable"), refuses(EINVAL):
        move(ctx, 0)
    protect(ctx.dst.range, READ_WRITE | PROT_EXEC)
    with promise("MV-10", "both executable"):
        move(ctx, 0)
        expect_moved(ctx, 0)


@uffd_case("move-file", mem=(SHMEM, SHMEM_PRIVATE, HUGETLB, HUGETLB_PRIVATE), features=MOVE, pages=2, rows=("MV-11",))
def test_move_file(ctx: Context) -> None:
    """UFFDIO_MOVE moves anonymous memory only, into anonymous memory only."""
    size = ctx.page_size
    with closing(ANON.allocate(size // PAGE_SIZE)) as anon, closing(ANON.allocate(size // PAGE_SIZE)) as other:
        anon.fill()
        other.fill()
        ctx.src.fill()
        ctx.uffd.register(ctx.dst.range, MISSING)
        with promise("MV-11", "destination"), refuses(EINVAL):
            ctx.uffd.move(ctx.dst.start, anon.start, size)
        with promise("MV-11", "both"), refuses(EINVAL):
            ctx.uffd.move(ctx.dst.start, ctx.src.start, size)
        anon.expect_pattern_of(anon)
        advise(anon.range, Advice.DONTNEED)
        ctx.uffd.register(anon.range, MISSING)
        with promise("MV-11", "source"), refuses(EINVAL):
            ctx.uffd.move(anon.start, ctx.src.start, size)
        Pagemap.expect_present(anon)
        Pagemap.expect_present(ctx.dst)
        ctx.src.expect_pattern_of(ctx.src)
        with promise("MV-11", "neither"):
            ctx.uffd.move(anon.start, other.start, size)
            anon.expect_pattern_of(other)
            Pagemap.expect_present(other)


@uffd_case("move-other-process", mem=(ANON,), features=MOVE, pages=2, rows=("MV-15",))
def test_move_other_process(ctx: Context) -> None:
    """UFFDIO_MOVE works only for the process to which the memory belongs: not for its child, nor for its monitor."""
    prepare(ctx)

    def target(channel: Channel) -> None:
        with promise("MV-15", "child"), refuses(EINVAL, output=UNTOUCHED):
            move(ctx, 0)
        with Uffd.open() as uffd:
            uffd.register(ctx.dst.range, MISSING)
            channel.send(None, uffd.fd)
            channel.receive()

    with Child(target) as child:
        _, (fd,) = child.receive_fds()
        with Uffd(fd) as monitor, promise("MV-15", "monitor"), refuses(EINVAL, output=UNTOUCHED):
            monitor.move(ctx.dst.start, ctx.src.start, ctx.page_size)
        child.send()
    expect_moved(ctx)


@uffd_case("move-unread-event", mem=(ANON,), features=MOVE | Feature.EVENT_REMOVE, pages=2, rows=("MV-26",), bugs=(7,))
def test_move_unread_event(ctx: Context) -> None:
    """Until an event is read UFFDIO_MOVE says EAGAIN, before it looks at anything else, and moves nothing."""
    prepare(ctx)
    with promise("MV-26"), unread_event(ctx.uffd, ctx.dst.page(1)):
        with held_up():
            move(ctx, 0)
        with held_up():
            ctx.uffd.move(0, 0, 0)
        expect_moved(ctx)
    move(ctx, 0)
    expect_moved(ctx, 0)


@uffd_case("move-orphaned", mem=(ANON,), features=MOVE, pages=2, rows=("MV-26",))
def test_move_orphaned(ctx: Context) -> None:
    """UFFDIO_MOVE says EINVAL when the address space is gone: it is not the caller's."""
    with orphaned(ctx.dst.range, MISSING) as uffd, promise("MV-26"), refuses(EINVAL, output=UNTOUCHED):
        uffd.move(ctx.dst.start, ctx.src.start, ctx.page_size)


# ---- transparent huge pages ----------------------------------------------------------------------------------------


def huge_page(ctx: Context) -> tuple[Area, Area]:
    """Return an area that is one transparent huge page, and a registered one with room for two."""
    src, dst = huge_area(ctx), ctx.allocate(2 * pmd_size() // PAGE_SIZE)
    advise(dst.range, Advice.HUGEPAGE)  # else the first fault brings a page table
    ctx.uffd.register(dst.range, MISSING)
    return src, dst


@uffd_case("move-huge", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-19",))
def test_move_huge(ctx: Context) -> None:
    """A transparent huge page moves in one piece to a place where one fits."""
    src, dst = huge_page(ctx)
    with promise("MV-19", "2 MiB, aligned"), faulting_pages(ctx.uffd, dst, 0, src.nr_pages - 1, src.nr_pages):
        ctx.uffd.move(dst.start, src.start, src.range.len)
        ctx.uffd.expect_still_asleep(1)
        expect(pmd_mapped(dst.range), src.range.len, "bytes of the destination mapped by PMD")
        ctx.uffd.zeropage(dst.page(src.nr_pages))
    dst.expect_pattern_of(src, 0, src.nr_pages)
    Pagemap.expect_present(src)
    undisturbed(ctx.uffd, lambda: dst.expect_pattern_of(src, 0, src.nr_pages, write_back=True))
    src.expect_zero()


@uffd_case("move-huge-split", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-19",))
def test_move_huge_split(ctx: Context) -> None:
    """A transparent huge page is split when a part of it moves, or it moves to where it does not fit as a whole."""
    n, huge = pmd_size() // PAGE_SIZE, pmd_size()
    for what, first, to, count, huge_left, huge_there in (
        ("a page from the middle", 5, 5, 1, huge, 0),
        ("all but the last page", 0, 0, n - 1, huge, 0),
        ("from the middle of one to that of the next", 5, 0, n, 0, 0),
        ("to where it is not aligned", 0, 1, n, huge, 0),
        ("one and a part of the next", 0, 0, n + 5, 0, huge),
    ):
        src, dst = ctx.allocate(2 * n), ctx.allocate(3 * n)
        for area in (src, dst):
            advise(area.range, Advice.HUGEPAGE)
        src.fill()
        if pmd_mapped(src.range) < src.range.len:
            raise Skip("no transparent huge pages to be had: memory is fragmented")
        ctx.uffd.register(dst.range, MISSING)
        with promise("MV-19", what):
            ctx.uffd.move(dst.page(to).start, src.page(first).start, count * PAGE_SIZE)
            expect((pmd_mapped(src.range), pmd_mapped(dst.range)), (huge_left, huge_there), "bytes mapped by PMD")
            Pagemap.expect_present(dst, *range(to, to + count))
            Pagemap.expect_present(src, *range(first), *range(first + count, 2 * n))
            src.pattern.verify(dst.start + (to - first) * PAGE_SIZE, first, count)
            src.pattern.verify(src.start, 0, first)
            src.pattern.verify(src.start, first + count, 2 * n - first - count)


@uffd_case("move-huge-onto-table", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-05", "MV-19"))
def test_move_huge_onto_table(ctx: Context) -> None:
    """A transparent huge page is split when it moves to where pages were mapped before; one in its way stops it."""
    src, dst = huge_page(ctx)
    n = src.nr_pages
    for page in (7, n + 7):
        ctx.uffd.zeropage(dst.page(page))
    with promise("MV-05", "page in the way of a huge page"), refuses(EAGAIN, output=7 * PAGE_SIZE):
        ctx.uffd.move(dst.page(n).start, src.start, src.range.len)
    Pagemap.expect_present(dst, 7, *range(n, n + 8))
    ctx.uffd.move(dst.page(0).start, dst.page(n).start, 7 * PAGE_SIZE)
    dst.expect_pattern_of(src, 0, 7)
    src.pattern.verify(src.start, 7, n - 7)

    src = huge_area(ctx)
    for half in (dst.page(0, n // 2), dst.page(n // 2, n // 2)):  # as a whole, its page table could go too
        advise(half, Advice.DONTNEED)
    with promise("MV-19", "empty page table"):
        ctx.uffd.move(dst.start, src.start, src.range.len)
    dst.expect_pattern_of(src, 0, n)
    Pagemap.expect_present(src)


@uffd_case("move-huge-shared", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-12",))
def test_move_huge_shared(ctx: Context) -> None:
    """A transparent huge page shared with a forked child cannot be moved, nor can a part of it."""
    src, dst = huge_page(ctx)
    with Child(lambda channel: channel.receive()) as child:
        for what, length in (("whole", src.range.len), ("a part", PAGE_SIZE)):
            with promise("MV-12", f"huge page, {what}"), refuses(EBUSY):
                ctx.uffd.move(dst.start, src.start, length)
        child.send()
    expect(pmd_mapped(src.range), src.range.len, "bytes of the source mapped by PMD")
    src.expect_pattern_of(src)
    Pagemap.expect_present(dst)


@uffd_case("move-huge-pinned", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-14",))
def test_move_huge_pinned(ctx: Context) -> None:
    """A transparent huge page with a long-term pin cannot be moved until it is unpinned."""
    src, dst = huge_page(ctx)
    with fixed_buffer(src.range), promise("MV-14", "huge page, pinned"), refuses(EBUSY):
        ctx.uffd.move(dst.start, src.start, src.range.len)
    src.expect_pattern_of(src)
    with promise("MV-14", "huge page, unpinned"):
        ctx.uffd.move(dst.start, src.start, src.range.len)
    dst.expect_pattern_of(src, 0, src.nr_pages)


D_PINNED_PART = Defect(
    id="D-MV-14",
    summary="UFFDIO_MOVE of a part of a pinned transparent huge page spins in the kernel until it is unpinned",
    kernels="6.12.117; not 6.18.44",
    advice="Use MADV_NOHUGEPAGE on a source of which pages may be pinned.",
    shows=r"UFFDIO_MOVE did not return before the page was unpinned",
)


@uffd_case(
    "move-huge-pinned-part",
    mem=(ANON,),
    features=MOVE,
    needs=("thp",),
    pages=1,
    rows=("MV-14",),
    defect=D_PINNED_PART,
)
def test_move_huge_pinned_part(ctx: Context) -> None:
    """A part of a transparent huge page with a long-term pin cannot be moved, and the kernel says so at once."""
    src, dst = huge_page(ctx)

    def refused() -> None:
        with refuses(EBUSY):
            ctx.uffd.move(dst.start, src.start, PAGE_SIZE)

    with ExitStack() as pin, promise("MV-14", "a part of a huge page, pinned"):
        pin.enter_context(fixed_buffer(src.range))
        with Waiter(refused) as waiter:
            eventually(lambda: waiter.done or waiter.cpu_time > 0.5, "UFFDIO_MOVE to return or to spin")
            spins = not waiter.done
            pin.close()
            if spins:
                eventually(lambda: waiter.done, "UFFDIO_MOVE to return once the page is unpinned")
                raise AssertionError("expected EBUSY; UFFDIO_MOVE did not return before the page was unpinned")
    src.expect_pattern_of(src)


@uffd_case("move-onto-huge", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-03",))
def test_move_onto_huge(ctx: Context) -> None:
    """UFFDIO_MOVE does not replace a part of a transparent huge page, nor split it."""
    dst = huge_area(ctx)
    poke(ctx.src.start, b"data")
    ctx.uffd.register(dst.range, MISSING)
    for page in (0, 5):
        with promise("MV-03", f"page {page} of a huge page"), refuses(EEXIST):
            ctx.uffd.move(dst.page(page).start, ctx.src.start, PAGE_SIZE)
    expect(pmd_mapped(dst.range), dst.range.len, "bytes of the destination mapped by PMD")
    dst.expect_pattern_of(dst)
    expect(peek(ctx.src.start, 5), b"data\0", "the source")


@uffd_case("move-huge-zeropage", mem=(ANON,), features=MOVE, needs=("thp",), pages=1, rows=("MV-20",), kind=Kind.DETAIL)
def test_move_huge_zeropage(ctx: Context) -> None:
    """The huge zero page can be moved as a whole or in part."""
    count = pmd_size() // PAGE_SIZE
    for what, first, length in (("whole", 0, count), ("a part", 5, 2)):
        src, dst = ctx.allocate(count), ctx.allocate(count)
        advise(src.range, Advice.HUGEPAGE)
        peek(src.start)
        if not all(entry & uapi.PM_PRESENT for entry in Pagemap.entries(src.range)) or pmd_mapped(src.range):
            raise Skip("no huge zero page: echo 1 > /sys/kernel/mm/transparent_hugepage/use_zero_page")
        ctx.uffd.register(dst.range, MISSING)
        with promise("MV-20", what):
            ctx.uffd.move(dst.page(first).start, src.page(first).start, length * PAGE_SIZE)
            moved = range(first, first + length)
            Pagemap.expect_present(dst, *moved)
            Pagemap.expect_present(src, *(set(range(count)) - set(moved)))
        expect_bytes(dst.page(first, length), 0)
        undisturbed(ctx.uffd, partial(poke, dst.page(first).start, b"new"))


@uffd_case(
    "move-huge-protected",
    mem=(ANON,),
    features=MOVE | Feature.PAGEFAULT_FLAG_WP,
    needs=("thp",),
    pages=1,
    rows=("MV-21",),
    kind=Kind.DETAIL,
)
def test_move_huge_protected(ctx: Context) -> None:
    """Write protection of a transparent huge page does not come along to a range that is not registered for it."""
    src, dst = huge_page(ctx)
    ctx.uffd.register(src.range, WP)
    ctx.uffd.writeprotect(src.range)
    with promise("MV-21", "huge page"):
        ctx.uffd.move(dst.start, src.start, src.range.len)
        Pagemap.expect_protected(dst, [], "after UFFDIO_MOVE")
        undisturbed(ctx.uffd, lambda: poke(dst.start, peek(dst.start)))
    dst.expect_pattern_of(src, 0, src.nr_pages)


# ---- swap ----------------------------------------------------------------------------------------------------------


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


@uffd_case(
    "move-huge-then-swap", mem=(ANON,), features=MOVE, needs=("swap", "thp"), pages=1, rows=("MV-19",), kind=Kind.DETAIL
)
def test_move_huge_then_swap(ctx: Context) -> None:
    """A transparent huge page that has moved can be swapped out and comes back at its new place."""
    src, dst = huge_page(ctx)
    ctx.uffd.move(dst.start, src.start, src.range.len)
    swap_out(dst.page(0, src.nr_pages))
    undisturbed(ctx.uffd, lambda: dst.expect_pattern_of(src, 0, src.nr_pages))


D_SWAPPED_WP = Defect(
    id="D-MV-22",
    summary="UFFDIO_MOVE of a write-protected page in swap takes the uffd-wp bit into a range not registered for it",
    kernels="6.12.117, 6.18.44",
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
