# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_COPY overtaken: by its own source, by changes of the destination meanwhile, by readers.

A source page that is not in memory makes the kernel let go of the destination and look it up again afterwards. To
stay there for as long as a case likes, the source is a missing page of another userfaultfd.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack
from errno import EAGAIN, EEXIST, EINVAL, ENOENT, ENOMEM
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, DEADLINE, HUGETLB, HUGETLB_PRIVATE, KERNEL_FAULTS, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE,
    MAP_SHARED, MISSING, NOT_HUGETLB, PAGE_SIZE, PM_PRESENT, PROT_NONE, PROT_READ, SHMEM, WP, Advice, Context, CopyMode,
    Feature, MemType, Pagemap, Range, Removed, Skip, Uffd, Waiter, advise, copy_held, default_hugepage_size, expect,
    expect_same, faulting_pages, free_bytes, held_up, hugepage_sizes, limited_file, map_memory, mapped, may_refuse,
    peek, poke, promise, protect, refuses, stored_bytes, unmap,
)  # fmt: skip

HUGEPAGE = default_hugepage_size()


def page_held(
    ctx: Context, page: int = 0, outcome: AbstractContextManager[object] | None = None, mode: CopyMode = CopyMode(0)
) -> AbstractContextManager[None]:
    """Hold a copy of one page of the source to the same page of the destination."""
    return copy_held(ctx.uffd, ctx.dst.page(page).start, ctx.src.page(page), mode=mode, outcome=outcome)


# ---- the source ----------------------------------------------------------------------------------------------------


@uffd_case(
    "copy-source-fault",
    mem=ALL,
    needs=("kernel_faults",),
    pages=3,
    spare_hugepages=1,
    rows=("CP-31",),
    kind=Kind.DETAIL,
)
def test_copy_source_fault(ctx: Context) -> None:
    """A copy waits for a source page that is missing itself, goes on where it was, and wakes its threads at the end."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1, 2):
        with copy_held(ctx.uffd, ctx.dst.start, ctx.src.page(0, 3), at=ctx.page_size):
            Pagemap.expect_present(ctx.dst, 0)
            ctx.uffd.expect_still_asleep(3)
        ctx.uffd.expect_asleep(0)
    ctx.dst.expect_pattern_of(ctx.src)
    ctx.uffd.expect_no_message()


@uffd_case(
    "copy-onto-itself",
    mem=ALL,
    needs=("kernel_faults",),
    pages=1,
    spare_hugepages=1,
    rows=("CP-33",),
    kind=Kind.DETAIL,
)
def test_copy_onto_itself(ctx: Context) -> None:
    """A missing page that is to be copied onto itself faults as source; when that is resolved it is there: EEXIST."""
    ctx.src.fill()

    def copy_onto_itself() -> None:
        with refuses(EEXIST):
            uffd.copy(ctx.dst.start, ctx.dst.start, ctx.page_size)

    with Uffd.open(Feature(0), KERNEL_FAULTS) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        with Waiter(copy_onto_itself):
            uffd.wait_fault(ctx.dst.start)
            uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
        uffd.expect_no_message()
    ctx.dst.expect_pattern_of(ctx.src)


# ---- the destination, while the source is waited for ---------------------------------------------------------------


@uffd_case(
    "copy-overtaken",
    mem=ALL,
    needs=("kernel_faults",),
    pages=3,
    spare_hugepages=1,
    rows=("CP-32",),
    kind=Kind.DETAIL,
)
def test_copy_overtaken(ctx: Context) -> None:
    """A copy looks again where its page goes: EEXIST when another one was faster, ENOENT when the range has gone."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("CP-32", "filled meanwhile"), page_held(ctx, 0, refuses(EEXIST)):
        ctx.uffd.copy(ctx.dst.start, ctx.src.page(2).start, ctx.page_size)
    expect_same(ctx.src.page(2).start, ctx.dst.start, ctx.page_size, "the page filled by the other copy")
    with promise("CP-32", "unregistered meanwhile"), page_held(ctx, 1, refuses(ENOENT)):
        ctx.uffd.unregister(ctx.dst.page(1))
    Pagemap.expect_present(ctx.dst, 0)
    with promise("CP-32", "unmapped meanwhile"), page_held(ctx, 2, refuses(ENOENT)):
        unmap(ctx.dst.page(2))


@uffd_case(
    "copy-overtaken-in-file",
    mem=(SHMEM, HUGETLB),
    needs=("kernel_faults",),
    pages=2,
    spare_hugepages=1,
    rows=("CP-32", "CP-22"),
    bugs=(11,),
    kind=Kind.DETAIL,
)
def test_copy_overtaken_in_file(ctx: Context) -> None:
    """A page that comes into the file by another way while a copy waits for its source stays as it is: EEXIST."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with ctx.dst.file_view() as view, page_held(ctx, 0, refuses(EEXIST)):
        poke(view.start, b"\xee")
    Pagemap.expect_present(ctx.dst)
    expect(peek(ctx.dst.start, 2), b"\xee\0", "the page's first bytes")


@uffd_case(
    "copy-overtaken-midway",
    mem=ALL,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=1,
    rows=("CP-32", "CP-09"),
    kind=Kind.DETAIL,
)
def test_copy_overtaken_midway(ctx: Context) -> None:
    """A copy whose range is not one mapping any more stops with what is done: ENOENT for nothing, EAGAIN for a part."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    size = ctx.page_size
    with promise("CP-32", "half unmapped after the first page"):
        with copy_held(ctx.uffd, ctx.dst.start, ctx.src.page(0, 2), at=size, outcome=refuses(EAGAIN, output=size)):
            unmap(ctx.dst.page(1))
        ctx.dst.expect_pattern_of(ctx.src, 0, 1)
    with promise("CP-32", "cut in two before the first page"):
        with copy_held(ctx.uffd, ctx.dst.page(2).start, ctx.src.page(2, 2), outcome=refuses(ENOENT)):
            protect(ctx.dst.page(3), PROT_READ)
        Pagemap.expect_present(ctx.dst, 0)


@uffd_case(
    "copy-overtaken-mode",
    mem=NOT_HUGETLB,
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM,
    needs=("kernel_faults",),
    pages=1,
    rows=("CP-05", "CP-32"),
    kind=Kind.DETAIL,
)
def test_copy_overtaken_mode(ctx: Context) -> None:
    """A copy with MODE_WP whose range is not registered for it any more fills nothing: EINVAL."""
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    with page_held(ctx, 0, refuses(EINVAL), CopyMode.WP):
        ctx.uffd.unregister(ctx.dst.range)
        ctx.uffd.register(ctx.dst.range, MISSING)
    Pagemap.expect_present(ctx.dst)


@uffd_case(
    "copy-overtaken-by-event",
    mem=ALL,
    features=Feature.EVENT_REMOVE,
    needs=("kernel_faults",),
    pages=2,
    spare_hugepages=1,
    rows=("CP-14", "CP-32"),
)
def test_copy_overtaken_by_event(ctx: Context) -> None:
    """An event that is raised while a copy waits for its source makes it fill nothing: EAGAIN."""
    dropped = ctx.dst.page(1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with ExitStack() as stack:
        with page_held(ctx, 0, held_up()):
            stack.enter_context(Waiter(lambda: advise(dropped, Advice.DONTNEED)))
            expect(ctx.uffd.readable(DEADLINE), True, "a readable event")
        expect(ctx.uffd.read(), [Removed(dropped.start, dropped.end)], "the event")
    Pagemap.expect_present(ctx.dst)


def replacement(mem: MemType, length: int) -> tuple[int, int]:
    """Return mmap flags and a memfd (or -1) for memory of another kind or object than ``mem``, to be its successor."""
    if mem in (SHMEM, HUGETLB, HUGETLB_PRIVATE):
        return MAP_PRIVATE | MAP_ANONYMOUS, -1
    fd = os.memfd_create("successor", os.MFD_CLOEXEC)
    os.ftruncate(fd, length)
    return MAP_SHARED, fd


@uffd_case(
    "copy-overtaken-by-another-mapping",
    mem=ALL,
    needs=("kernel_faults",),
    pages=1,
    spare_hugepages=1,
    rows=("CP-34",),
    bugs=(45,),
    kind=Kind.DETAIL,
)
def test_copy_overtaken_by_another_mapping(ctx: Context) -> None:
    """A copy whose mapping is replaced by another registered one goes wholly there, or says that it went nowhere."""
    ctx.src.fill()
    length = ctx.page_size
    ctx.uffd.register(ctx.dst.range, MISSING)
    # The successor gets the data, until Linux 7.1, from which on EAGAIN says to look again; huge pages were asked for.
    outcome = refuses(ENOENT) if ctx.mem.hugetlb else may_refuse(EAGAIN)
    with page_held(ctx, 0, outcome):
        flags, fd = replacement(ctx.mem, length)
        map_memory(length, at=ctx.dst.start, flags=flags | MAP_FIXED | MAP_NORESERVE, fd=fd)
        ctx.uffd.register(ctx.dst.range, MISSING)
    if Pagemap.entry(ctx.dst.start) & PM_PRESENT:
        ctx.dst.expect_pattern_of(ctx.src)
        if fd >= 0:
            expect(os.pread(fd, length, 0) == peek(ctx.src.start, length), True, "the new file's bytes as the source's")
    elif fd >= 0:
        expect(stored_bytes(fd), 0, "bytes stored in the new file")
    if ctx.dst.fd is not None:
        expect(stored_bytes(ctx.dst.fd), 0, "bytes stored in the old file")


def map_huge(where: Range, size: int) -> None:
    """Map huge pages of any size at a place, none of them reserved."""
    log = size.bit_length() - 1
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB | log << os.MFD_HUGE_SHIFT)
    os.ftruncate(fd, where.len)
    map_memory(where.len, at=where.start, flags=MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd=fd)
    os.close(fd)


@uffd_case(
    "copy-overtaken-by-larger-pages",
    mem=(HUGETLB,),
    needs=("kernel_faults",),
    pages=1,
    spare_hugepages=1,
    rows=("CP-34", "CP-26"),
    kind=Kind.DETAIL,
)
def test_copy_overtaken_by_larger_pages(ctx: Context) -> None:
    """A copy whose huge pages are replaced by larger ones fills nothing: EINVAL."""
    larger = max(hugepage_sizes())
    if larger == HUGEPAGE:
        raise Skip(f"no huge pages larger than {HUGEPAGE // 1024} kB: run on a processor that has them")
    with mapped(2 * larger, prot=PROT_NONE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE) as room:
        dst = Range(-(-room.start // larger) * larger, larger)
        map_huge(Range(dst.start, HUGEPAGE), HUGEPAGE)
        ctx.uffd.register(Range(dst.start, HUGEPAGE), MISSING)
        with copy_held(ctx.uffd, dst.start, ctx.src.page(0), outcome=refuses(EINVAL)):
            map_huge(dst, larger)
            ctx.uffd.register(dst, MISSING)
        expect(Pagemap.entry(dst.start) & PM_PRESENT, 0, "PM_PRESENT of the larger page")


@uffd_case(
    "copy-overtaken-by-full-tmpfs",
    mem=(ANON,),
    needs=("kernel_faults", "cap_sys_admin"),
    pages=2,
    rows=("CP-25", "CP-32"),
    bugs=(14,),
    kind=Kind.DETAIL,
)
def test_copy_overtaken_by_full_tmpfs(ctx: Context) -> None:
    """A tmpfs that fills up while a copy waits for its source refuses the page, ENOMEM, and has lost no room."""
    ctx.src.fill()
    with limited_file("tmpfs", PAGE_SIZE, 2 * PAGE_SIZE) as fd:
        with mapped(2 * PAGE_SIZE, flags=MAP_SHARED, fd=fd) as where:
            ctx.uffd.register(where, MISSING)
            with copy_held(ctx.uffd, where.start, ctx.src.page(0), outcome=refuses(ENOMEM)):
                os.pwrite(fd, b"1", PAGE_SIZE)
        expect((stored_bytes(fd), free_bytes(fd)), (PAGE_SIZE, 0), "bytes stored and bytes free")
        os.ftruncate(fd, 0)
        expect((stored_bytes(fd), free_bytes(fd)), (0, PAGE_SIZE), "bytes stored and bytes free in the empty file")


@uffd_case(
    "copy-overtaken-by-empty-pool",
    mem=(HUGETLB,),
    needs=("kernel_faults", "cap_sys_admin"),
    pages=1,
    spare_hugepages=1,
    rows=("CP-28", "CP-32"),
    bugs=(12,),
    kind=Kind.DETAIL,
)
def test_copy_overtaken_by_empty_pool(ctx: Context) -> None:
    """A copy whose huge page another one took while it waited for its source fills nothing: ENOMEM, or EEXIST."""
    ctx.src.fill()
    size, flags = 2 * HUGEPAGE, MAP_SHARED | MAP_NORESERVE
    with limited_file("hugetlbfs", HUGEPAGE, size) as fd, mapped(size, flags=flags, fd=fd) as where:
        ctx.uffd.register(where, MISSING)
        with copy_held(ctx.uffd, where.start, ctx.src.page(0), outcome=may_refuse(ENOMEM, EEXIST)):
            ctx.uffd.copy(where.start + HUGEPAGE, ctx.src.start, HUGEPAGE)
        expect(Pagemap.entry(where.start) & PM_PRESENT, 0, "PM_PRESENT of the page refused")
        expect((stored_bytes(fd), free_bytes(fd)), (HUGEPAGE, 0), "bytes stored and bytes free")
        advise(Range(where.start + HUGEPAGE, HUGEPAGE), Advice.REMOVE)
        expect((stored_bytes(fd), free_bytes(fd)), (0, HUGEPAGE), "bytes stored and bytes free in the empty file")


# ---- readers and other copies at the same time ---------------------------------------------------------------------


@uffd_case("copy-never-torn", mem=NOT_HUGETLB, pages=512, rows=("CP-50",), smp=True)
def test_copy_never_torn(ctx: Context) -> None:
    """A thread that reads along with the copies, page by page, never sees a page that is not filled to the end."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with Waiter(lambda: ctx.dst.expect_pattern_of(ctx.src)):
        for page in range(ctx.nr_pages):
            ctx.uffd.copy(ctx.dst.page(page).start, ctx.src.page(page).start, ctx.page_size)


@uffd_case("copy-never-torn-huge", mem=(HUGETLB, HUGETLB_PRIVATE), pages=4, rows=("CP-50",), smp=True)
def test_copy_never_torn_huge(ctx: Context) -> None:
    """A thread that comes while a huge page is being copied waits until all of it is there."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    for page in range(ctx.nr_pages):
        with Waiter(partial(ctx.dst.expect_pattern_of, ctx.src, page, 1)):
            ctx.uffd.copy(ctx.dst.page(page).start, ctx.src.page(page).start, ctx.page_size)


@uffd_case("copy-twice-at-once", mem=ALL, pages=8, spare_hugepages=2, rows=("CP-10",), smp=True)
def test_copy_twice_at_once(ctx: Context) -> None:
    """Of two copies to one page at the same time exactly one succeeds and the other says EEXIST."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    winners: list[list[int]] = [[] for _ in range(ctx.nr_pages)]

    def fill_all(other: int) -> None:
        for page, won in enumerate(winners):
            with may_refuse(EEXIST):
                ctx.uffd.copy(ctx.dst.page(page).start, ctx.src.page(page ^ other).start, ctx.page_size)
                won.append(page ^ other)

    with Waiter(lambda: fill_all(1)):
        fill_all(0)
    for page, won in enumerate(winners):
        expect(len(won), 1, f"copies to page {page} that succeeded")
        expect_same(ctx.src.page(won[0]).start, ctx.dst.page(page).start, ctx.page_size, f"page {page}")
