# SPDX-License-Identifier: GPL-2.0-only
"""What monitors ran into: what is dropped, what comes back, what nobody tells them, and what stays in one piece."""

from __future__ import annotations

import os
from errno import EAGAIN
from functools import partial
from pathlib import Path
from signal import SIGBUS

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, AGAINST_WRITES, ALL, ANON, ASYNC, CACHED, COMPANION, HUGETLB, MAP_ANONYMOUS, MAP_FIXED,
    MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MINOR, MINOR_FAULTS, MISSING, PAGE_SIZE, PROT_NONE, REMOVE, SCAN, SHMEM,
    SYNC_RWP, UNREGISTERED, WP, WRITEPROTECT, WRITTEN, Advice, Context, Pagemap, Protection, Race, Range, Skip,
    advise, announced, cached, drops_hugepages, expect, expect_bytes, expect_same, expect_served, faulting,
    free_bytes, in_modes, limited_file, map_memory, mapped, page_numbers, pages_in, peek, pmd_size, poke, promise,
    refuses, removed, stored_bytes, syscalls, touch_trapped, toucher, undisturbed, unmap, unread_event,
)  # fmt: skip

MAP_GROWSDOWN = 0x100  # include/uapi/asm-generic/mman.h
STACK_GAP = 256
"""Pages below a stack that the kernel keeps free (stack_guard_gap of the kernel's command line)."""


# ---- dropped and asked for again -----------------------------------------------------------------------------------


@uffd_case(
    "remove-hugetlb-unaligned", mem=(HUGETLB,), features=REMOVE, pages=3, spare_hugepages=2, rows=("EV-44",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_remove_hugetlb_unaligned(ctx: Context) -> None:
    """MADV_REMOVE from within a huge page to within another announces just that, drops the whole ones and clears parts.

    Who forgets the whole of the first and of the last huge page loses data.
    """
    area, huge = ctx.dst, ctx.page_size
    area.fill()
    where = Range(area.start + PAGE_SIZE, 3 * huge - 2 * PAGE_SIZE)
    ends = [(start, peek(start, PAGE_SIZE)) for start in (area.start, area.range.end - PAGE_SIZE)]
    ctx.uffd.register(area.range, MISSING)
    announced(ctx.uffd, lambda: advise(where, Advice.REMOVE), removed(where))
    with promise("EV-44"):
        Pagemap.expect_present(area, 0, 2)
        for start, data in ends:
            expect(peek(start, PAGE_SIZE) == data, True, f"the bytes at {start:#x}, outside of the range, as before")
        expect_bytes(Range(where.start, huge - PAGE_SIZE), 0, "the part of the first huge page")
        expect_bytes(Range(area.page(2).start, huge - PAGE_SIZE), 0, "the part of the last huge page")
        expect_served(ctx, area.page(1))


@uffd_case(
    "continue-then-dropped", mem=(SHMEM, HUGETLB), features=MINOR_FAULTS, pages=3, rows=("EV-45",), kind=Kind.DETAIL
)
def test_continue_then_dropped(ctx: Context) -> None:
    """A page that was continued is a minor fault again after MADV_DONTNEED, and missing after MADV_REMOVE."""
    page, uffd = ctx.dst.page(1), ctx.uffd
    ctx.src.fill()
    if ctx.mem.hugetlb and not drops_hugepages():
        raise Skip("MADV_DONTNEED of huge pages: EINVAL (Linux 5.18)")
    with cached(ctx, mode=MISSING | MINOR):
        for _ in range(2):
            with promise("EV-45", "cached, or dropped from the mapping"), faulting(uffd, page.start, flags=CACHED):
                uffd.continue_(page)
            advise(page, Advice.DONTNEED)
        advise(page, Advice.REMOVE)
        with promise("EV-45", "dropped from the file"), faulting(uffd, page.start):
            uffd.copy(page.start, ctx.src.page(1).start, page.len)
        advise(page, Advice.DONTNEED)
        with promise("EV-45", "copied, and dropped from the mapping"), faulting(uffd, page.start, flags=CACHED):
            uffd.continue_(page)
        for other in (0, 2):
            with promise("EV-45", f"page {other} beside it"), faulting(uffd, ctx.dst.page(other).start, flags=CACHED):
                uffd.continue_(ctx.dst.page(other))
        ctx.dst.expect_pattern_of(ctx.src, 1, 1)


@uffd_case("poll-eagain-over", mem=(ANON,), features=REMOVE, pages=2, rows=("PL-15",), kind=Kind.DETAIL)
def test_poll_eagain_over(ctx: Context) -> None:
    """When EAGAIN ends nothing becomes readable: who waits in poll(2) for that sleeps on, and must try by itself."""
    page = ctx.dst.page(0)
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("PL-15"):
        with unread_event(ctx.uffd, page), refuses(EAGAIN, or_untouched=True):
            ctx.uffd.copy(page.start, ctx.src.start, page.len)
        expect(ctx.uffd.readable(), False, "whether the handle is readable when the operation is over")
        ctx.uffd.copy(page.start, ctx.src.start, page.len)
    ctx.dst.expect_pattern_of(ctx.src, 0, 1)


# ---- a mapping that grows ------------------------------------------------------------------------------------------


@uffd_case("register-stack", mem=(ANON,), pages=2, rows=("EV-46",), kind=Kind.DETAIL)
def test_register_stack(ctx: Context) -> None:
    """A stack mapping that grows is registered where it has grown, and each of its new pages is reported."""
    ctx.src.fill()
    size = 2 * STACK_GAP * PAGE_SIZE
    room = Range(map_memory(size, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, prot=PROT_NONE), size)
    top = Range(room.end - 2 * PAGE_SIZE, 2 * PAGE_SIZE)
    unmap(room)
    map_memory(top.len, at=top.start, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED)
    ctx.uffd.register(top, MISSING)
    grown = Range(top.start - 4 * PAGE_SIZE, 4 * PAGE_SIZE)
    with promise("EV-46"):
        for number in (0, 3, 1):
            page = Range(grown.start + number * PAGE_SIZE, PAGE_SIZE)
            with faulting(ctx.uffd, page.start):
                ctx.uffd.copy(page.start, ctx.src.start, PAGE_SIZE)
            expect_same(ctx.src.start, page.start, PAGE_SIZE, f"page {number} of those that were added")
            expect(in_modes(grown), MISSING, "modes of the pages added")
        expect(in_modes(top), MISSING, "modes of the pages there were")
        ctx.uffd.unregister(Range(grown.start, grown.len + top.len))
        expect(in_modes(Range(grown.start, grown.len + top.len)), UNREGISTERED, "modes after UFFDIO_UNREGISTER")
    unmap(Range(grown.start, grown.len + top.len))


# ---- protection, and mappings that stay in one piece ---------------------------------------------------------------


def mappings(where: Range) -> int:
    """Return how many mappings lie in a range."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    starts = (int(line.partition("-")[0], 16) for line in lines)
    return sum(where.start <= start < where.end for start in starts)


@uffd_case("writeprotect-in-one-piece", mem=ALL, features=WRITEPROTECT, pages=6, rows=("WP-39",), kind=Kind.DETAIL)
def test_writeprotect_in_one_piece(ctx: Context) -> None:
    """UFFDIO_WRITEPROTECT of any pattern of pages leaves as many mappings as there were."""
    check_in_one_piece(ctx, AGAINST_WRITES)


@uffd_case("rwprotect-in-one-piece", mem=ALL, features=SYNC_RWP, pages=6, rows=("WP-39",), kind=Kind.DETAIL)
def test_rwprotect_in_one_piece(ctx: Context) -> None:
    """UFFDIO_RWPROTECT of any pattern of pages leaves as many mappings as there were."""
    check_in_one_piece(ctx, AGAINST_ACCESS)


def check_in_one_piece(ctx: Context, guard: Protection) -> None:
    """Protect and free pages in patterns, and count the mappings."""
    area = ctx.dst
    area.fill()
    ctx.uffd.register(area.range, guard.mode)
    before = mappings(area.range)
    for pages in ({1}, {0, 2, 4}, {1, 2, 3}, {5}, set(range(6))):
        with promise("WP-39", f"pages {page_numbers(pages)}"):
            guard.set(ctx.uffd, area, pages)
            Pagemap.expect_protected(area, pages, "after they were protected")
            expect(mappings(area.range), before, "mappings, protected")
            guard.lift(ctx.uffd, area, pages)
            expect(mappings(area.range), before, "mappings, freed again")


@uffd_case(
    "register-while-writing", mem=ALL, features=ASYNC, needs=SCAN, pages=8, rows=("REG-57",), kind=Kind.DETAIL, smp=True
)
def test_register_while_writing(ctx: Context) -> None:
    """Tracking that ends and begins anew for a part, while threads write, misses no write that comes after it."""
    area, uffd = ctx.dst, ctx.uffd
    part, every = area.page(2, 4), range(area.nr_pages)
    area.fill()
    uffd.register(area.range, WP)
    with promise("REG-57"):
        for turn in range(5):
            with Race(toucher(area.range, area.page_size, write=True, rounds=COMPANION)) as race:
                race.reached(0, 1)
                uffd.unregister(part)
                uffd.register(part, WP)
                uffd.writeprotect(area.range)
                race.reached(0, race.steps(0) + 2 * area.nr_pages)
                found = Pagemap.scan(area.range, WRITTEN, room=64)
                pages = pages_in(area, found.regions)
                expect(page_numbers(pages), page_numbers(every), f"pages written, turn {turn}")
    uffd.expect_no_message()


# ---- what is there without a message -------------------------------------------------------------------------------


@uffd_case(
    "tmpfs-huge-untold", mem=(ANON,), needs=("thp", "cap_sys_admin"), pages=1, variants=("always", "never"),
    rows=("CP-55",), kind=Kind.DETAIL,
)  # fmt: skip
def test_tmpfs_huge_untold(ctx: Context, variant: str) -> None:
    """A byte written to a file makes its whole page present, of tmpfs with huge=always 2 MiB, and nobody is told.

    Who watches a mapping of it for missing pages gets a message for each page that is not there, and for those only.
    """
    size = pmd_size()
    root = syscalls.mount_nowhere("tmpfs", huge=variant, size=str(2 * size))
    fd = os.open("file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=root)
    os.close(root)
    os.ftruncate(fd, size)
    written, others = 7, (0, 6, 8, size // PAGE_SIZE - 1)
    ctx.src.fill()
    with mapped(size, flags=MAP_SHARED, fd=fd) as where, promise("CP-55", f"huge={variant}"):
        ctx.uffd.register(where, MISSING)
        os.pwrite(fd, b"\1", written * PAGE_SIZE)
        whole = stored_bytes(fd) == size
        if variant == "always" and not whole:
            raise Skip("no huge page of tmpfs to be had")
        expect(stored_bytes(fd), size if variant == "always" else PAGE_SIZE, "bytes stored in the file")
        first = where.start + written * PAGE_SIZE
        expect(undisturbed(ctx.uffd, lambda: peek(first)), b"\1", "the byte written")
        for number in others:
            page = Range(where.start + number * PAGE_SIZE, PAGE_SIZE)
            if whole:
                undisturbed(ctx.uffd, partial(expect_bytes, page, 0, "what nobody has written"))
            else:
                with faulting(ctx.uffd, page.start):
                    ctx.uffd.copy(page.start, ctx.src.start, PAGE_SIZE)
                expect_same(ctx.src.start, page.start, PAGE_SIZE, f"page {number}")
    os.close(fd)


@uffd_case(
    "continue-copy-on-write-empty", mem=(HUGETLB,), features=MINOR_FAULTS, needs=("cap_sys_admin",), pages=1,
    rows=("CP-56",), kind=Kind.DETAIL,
)  # fmt: skip
def test_continue_copy_on_write_empty(ctx: Context) -> None:
    """A private huge page that was continued takes a second one when it is written: without one, SIGBUS and no loss."""
    size = ctx.page_size
    with limited_file("hugetlbfs", size, size) as fd, mapped(size, flags=MAP_SHARED, fd=fd) as view:
        poke(view.start, b"data")
        with mapped(size, flags=MAP_PRIVATE | MAP_NORESERVE, fd=fd) as where, promise("CP-56"):
            ctx.uffd.register(where, MINOR)
            with faulting(ctx.uffd, where.start, flags=CACHED):
                ctx.uffd.continue_(where)
            (trap,) = touch_trapped(Range(where.start, 1), 1, write=True)
            expect(trap and trap.signo, SIGBUS, "the signal of a write with no huge page left")
            expect(undisturbed(ctx.uffd, lambda: peek(where.start, 4)), b"data", "what the mapping reads")
            expect(peek(view.start, 4), b"data", "what the file has")
        expect((stored_bytes(fd), free_bytes(fd)), (size, 0), "bytes stored and bytes free")
