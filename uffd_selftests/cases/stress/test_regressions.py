# SPDX-License-Identifier: GPL-2.0-only
"""Bugs that broken kernels show every time (docs/regressions.md), as far as no case of the contract shows them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EBUSY, EFAULT, EINVAL, EOPNOTSUPP
from functools import partial
from pathlib import Path
from signal import SIGBUS

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ANON, ASYNC, EACH_HUGETLB, EHWPOISON, MAP_SHARED, MISSING, PAGE_SIZE, PM_SOFT_DIRTY, PRIVATE, RESTART,
    SHMEM_PRIVATE, TRAPPED, WP, WRITEPROTECT, Advice, Area, Channel, Child, Context, Feature, KernelError, PageCategory,
    Pagemap, Range, Skip, Uffd, advise, declared_sound, default_hugepage_size, errno_name, expect, fails, faulting,
    fixed_buffer, handled, hugepage_file, hugepage_sizes, lack_of_hugepages, mapped, peek, pmd_size, poke, promise,
    refuses, require_soft_dirty, swap_out, syscalls, touch_trapped, two_page_tables, undisturbed, unmap,
)  # fmt: skip

HUGEPAGE = default_hugepage_size()


# ---- write protection ----------------------------------------------------------------------------------------------


@uffd_case(
    "protect-after-fork",
    mem=PRIVATE,
    features=WRITEPROTECT,
    pages=1,
    rows=("WP-08",),
    bugs=(31,),
)
def test_protect_after_fork(ctx: Context) -> None:
    """A write to a protected page is trapped although the page was once shared with a child, which is gone.

    Before "mm/hugetlb: fix uffd wr-protection for CoW optimization path" the kernel reused a huge page that nobody else
    mapped any more without asking for its protection: the write was missed.
    """
    area = ctx.dst
    area.fill()
    with Child(lambda _: None):
        pass
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    with faulting(ctx.uffd, area.start, write=True, flags=TRAPPED):
        Pagemap.expect_protected(area, (0,), "while the writer is trapped")
        ctx.uffd.unprotect(area.range)
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


# ---- registration --------------------------------------------------------------------------------------------------


SHADOW_STACK = {
    "x86_64": "CONFIG_X86_USER_SHADOW_STACK (Linux 6.6)",
    "aarch64": "Guarded Control Stack (Linux 6.13)",
}.get(platform.machine(), f"none on {platform.machine()}")


@uffd_case("register-shadow-stack", rows=("REG-11",), bugs=(4,))
def test_register_shadow_stack() -> None:
    """A shadow stack cannot be registered, in no mode.

    Before "userfaultfd: prevent registration of special VMAs" it could be, and filled with return addresses.
    """
    try:
        start = syscalls.call("map_shadow_stack", 0, PAGE_SIZE, 0)
    except KernelError as error:
        if error.errno == EOPNOTSUPP:
            raise Skip(f"no shadow stack: {SHADOW_STACK} on a processor that has it") from None
        raise Skip(f"map_shadow_stack(2): {errno_name(error.errno or 0)}: {SHADOW_STACK}") from None
    stack = Range(start, PAGE_SIZE)
    with Uffd.open(ASYNC) as uffd:
        for mode in MISSING, WP, MISSING | WP:
            with promise("REG-11", str(mode)), refuses(EINVAL):
                uffd.register(stack, mode)
    unmap(stack)


# ---- PAGEMAP_SCAN --------------------------------------------------------------------------------------------------


@uffd_case(
    "scan-keeps-written",
    mem=(ANON, SHMEM_PRIVATE),
    features=ASYNC,
    needs=("swap", "pagemap_scan"),
    pages=4,
    rows=("AS-04",),
    bugs=(33,),
)
def test_scan_keeps_written(ctx: Context) -> None:
    """A page that is written, protected by PAGEMAP_SCAN and swapped out again comes back as it was written.

    Before "fs/proc/task_mmu: fix loss of young/dirty bits during pagemap scan" the kernel could take it for unchanged
    and drop it: what came back was the content of the first time that it was swapped out.
    """
    area = ctx.dst
    area.fill()
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    swap_out(area.range)
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))  # back, and clean: swap has the same
    new = [b"new content of page %d" % page for page in range(area.nr_pages)]
    for page, content in enumerate(new):
        undisturbed(ctx.uffd, partial(poke, area.page(page).start, content))
    Pagemap.scan(area.range, PageCategory.WRITTEN, flags=RESTART)
    swap_out(area.range)
    Pagemap.scan(area.range, PageCategory.WPALLOWED, flags=RESTART)
    for page, content in enumerate(new):
        expect(peek(area.page(page).start, len(content)), content, f"what page {page} holds")


@uffd_case("scan-huge-sizes", features=ASYNC, needs=("pagemap_scan", "hugetlb"), rows=("AS-03",), bugs=(35,))
def test_scan_huge_sizes() -> None:
    """PAGEMAP_SCAN reports a huge page of every size with its whole length, and protects all of it.

    Before "use huge_page_size() in pagemap_scan_hugetlb_entry()" it took every huge page for one of the default size.
    """
    sizes = [size for size in hugepage_sizes() if size != HUGEPAGE and not lack_of_hugepages(size, 1)]
    if not sizes:
        raise Skip("no free huge page but of the default size: nr_hugepages in /sys/kernel/mm/hugepages/hugepages-*kB")
    for size in sizes:
        with (
            promise("AS-03", f"{size >> 10} kB"),
            hugepage_file(size) as fd,
            mapped(size, flags=MAP_SHARED, fd=fd) as where,
        ):
            poke(where.start, b"\1")
            with Uffd.open(ASYNC) as uffd:
                uffd.register(where, WP)
                found = Pagemap.scan(where, PageCategory.WRITTEN, flags=RESTART).regions
                expect([(one.start, one.end) for one in found], [(where.start, where.end)], "what was written")
                expect(Pagemap.scan(where, PageCategory.WRITTEN).regions, [], "what was written since")


@uffd_case(
    "scan-huge-hole",
    mem=EACH_HUGETLB,
    features=ASYNC,
    needs=("pagemap_scan",),
    pages=1,
    rows=("AS-04",),
    bugs=(34,),
    deadline=5,
    may_hang_kernel=True,
)
def test_scan_huge_hole(ctx: Context) -> None:
    """A PAGEMAP_SCAN that protects huge pages returns, from memory without any page table too.

    Before "fs/proc/task_mmu: fix hugetlb self-deadlock in pagemap_scan_pte_hole()" it waits for a lock that it holds
    itself, and no signal ends that.
    """
    area, table = two_page_tables(ctx)
    poke(area.start, b"\1")
    ctx.uffd.register(area.range, WP)
    scan = Pagemap.scan(area.range, PageCategory.WPALLOWED, flags=RESTART)
    expect(scan.walk_end, area.range.end, "where the scan stopped looking")
    Pagemap.expect_uffd_wp(area.start, True, "page 0, which is there, after the scan")
    Pagemap.expect_uffd_wp(area.page(table).start, True, f"page {table}, which has no page table, after the scan")


# ---- memory that is broken -----------------------------------------------------------------------------------------


@contextmanager
def broken_hugepage(area: Area) -> Iterator[None]:
    """Have the kernel believe that the first base page of the area's huge page is broken (MADV_HWPOISON).

    Afterwards the file is emptied, for only memory that nobody uses can be declared sound again.
    """
    first = Range(area.start, PAGE_SIZE)
    with declared_sound(first):
        try:
            with handled(SIGBUS):  # sent to whoever has it mapped
                advise(first, Advice.HWPOISON)
            yield
        finally:
            advise(area.range, Advice.DONTNEED)
            os.ftruncate(area.fd or -1, 0)


@uffd_case(
    "fork-broken-hugepage",
    mem=EACH_HUGETLB,
    features=WRITEPROTECT,
    needs=("cap_sys_admin",),
    pages=1,
    rows=("WP-18",),
    bugs=(22,),
    kind=Kind.DETAIL,
)
def test_fork_broken_hugepage(ctx: Context) -> None:
    """A forked child knows, as its parent does, that the memory of a protected huge page is broken: SIGBUS, and EFAULT.

    Before "mm/hugetlb: fix swap entry corruption when clearing uffd-wp at fork()" the child's entry said something
    else: memory of somebody, or nothing at all.
    """
    area = ctx.dst
    area.fill()
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)

    def look(_: Channel) -> None:
        traps = touch_trapped(Range(area.start, 1), 1)
        expect([trap.signo if trap else None for trap in traps], [SIGBUS], "signal in the child")
        reader, writer = os.pipe()
        with fails(EFAULT, EHWPOISON):
            syscalls.write_from(writer, area.start, 1)
        os.close(reader)
        os.close(writer)

    with broken_hugepage(area), Child(look):
        pass


# ---- UFFDIO_MOVE ---------------------------------------------------------------------------------------------------


@uffd_case(
    "move-refused-then-swap", mem=(ANON,), features=Feature.MOVE, needs=("swap",), pages=2, rows=("MV-14",), bugs=(37,)
)
def test_move_refused_then_swap(ctx: Context) -> None:
    """A page that could not be moved, because it was pinned, can be swapped out afterwards, and comes back as it was.

    Before "mm: userfaultfd: fix unexpected change to src_folio when UFFDIO_MOVE fails" it already counted as a page of
    the destination: the kernel could not find its mapping any more.
    """
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with fixed_buffer(ctx.src.page(0)), refuses(EBUSY):
        ctx.uffd.move(ctx.dst.start, ctx.src.start, ctx.page_size)
    swap_out(ctx.src.range)
    ctx.src.expect_pattern_of(ctx.src)
    ctx.uffd.move(ctx.dst.start, ctx.src.start, ctx.page_size)
    ctx.dst.expect_pattern_of(ctx.src, 0, 1)


@uffd_case(
    "move-swapped-soft-dirty",
    mem=(ANON,),
    features=Feature.MOVE,
    needs=("swap",),
    pages=2,
    rows=("MV-01",),
    bugs=(43,),
    kind=Kind.DETAIL,
)
def test_move_swapped_soft_dirty(ctx: Context) -> None:
    """A page that moves while it is in swap, or unchanged since, counts as written since soft-dirty bits were cleared.

    Before "mm: userfaultfd: correct dirty flags set for both present and swap pte" it did not, and a checkpoint missed
    it.
    """
    ctx.src.fill()
    require_soft_dirty(ctx.src.start)
    ctx.uffd.register(ctx.dst.range, MISSING)
    swap_out(ctx.src.range)
    Path("/proc/self/clear_refs").write_text("4")
    ctx.src.expect_pattern_of(ctx.src, 1, 1)  # read back, and clean therefore
    expect(bool(Pagemap.entry(ctx.src.page(1).start) & PM_SOFT_DIRTY), False, "soft-dirty after a read")
    for number, state in enumerate(("in swap", "read back")):
        with promise("MV-01", state):
            ctx.uffd.move(ctx.dst.page(number).start, ctx.src.page(number).start, ctx.page_size)
            moved = Pagemap.entry(ctx.dst.page(number).start)
            expect(bool(moved & PM_SOFT_DIRTY), True, "soft-dirty after UFFDIO_MOVE")


UNPROTECTED = Defect(
    id="D-MV-21",
    summary="UFFDIO_MOVE drops the write protection of a page, also between ranges that are both registered for it: "
    "the next write is missed.",
    kernels="6.12.117, 6.18.44, 7.3.4; by their source all since 6.8, the first with UFFDIO_MOVE",
    advice="Protect the destination again before anybody can write to it, or do not move protected pages.",
    shows=r"after UFFDIO_MOVE: expected PM_UFFD_WP .*, got none;",
)


@uffd_case(
    "move-keeps-protection",
    mem=(ANON,),
    features=Feature.MOVE | Feature.PAGEFAULT_FLAG_WP,
    needs=("thp",),
    variants=("page", "huge page"),
    pages=1,
    rows=("MV-21",),
    bugs=(44,),
    defect=UNPROTECTED,
)
def test_move_keeps_protection(ctx: Context, variant: str) -> None:
    """A protected page that moves to a range which is registered for protection as well is protected there.

    "userfaultfd: preserve write protection across UFFDIO_MOVE" was posted for that, and is not merged.
    """
    src, dst = (ctx.allocate(pmd_size() // PAGE_SIZE) for _ in range(2))
    count = 1 if variant == "page" else src.nr_pages
    advise(src.range, Advice.NOHUGEPAGE if variant == "page" else Advice.HUGEPAGE)
    src.fill(0, count)
    ctx.uffd.register(src.range, WP)
    ctx.uffd.register(dst.range, MISSING | WP)
    ctx.uffd.writeprotect(src.page(0, count))
    ctx.uffd.move(dst.start, src.start, count * PAGE_SIZE)
    dst.expect_pattern_of(src, 0, count)
    Pagemap.expect_protected(dst, range(count), "after UFFDIO_MOVE")
