# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_COPY by the kind of memory: files and their ends, huge pages, swap, markers, and full file systems."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from errno import EAGAIN, EEXIST, EFAULT, EINVAL, ENOMEM
from functools import partial
from pathlib import Path
from signal import SIGBUS, SIGSEGV

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, HUGETLB, HUGETLB_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MINOR, MISSING,
    NOT_HUGETLB, PAGE_SIZE, PM_FILE, PM_MMAP_EXCLUSIVE, PM_PRESENT, PM_SOFT_DIRTY, PROT_NONE, PROT_READ, SHARED,
    SHMEM, SHMEM_PRIVATE, WP, Advice, Context, Feature, KernelError, Pagemap, Range, Skip, Uffd, UffdError, advise,
    default_hugepage_size, errno_name, expect, expect_bytes, expect_failed, expect_one_of, expect_same, faulting,
    free_bytes, huge_area, limited_file, mapped, mended, page_out, peek, pmd_mapped, poke, promise, protect, refuses,
    require_soft_dirty, saw, smaps_bytes, stored_bytes, swap_out, touch, touch_trapped, undisturbed,
)  # fmt: skip

HUGEPAGE = default_hugepage_size()


def file_of(ctx: Context) -> int:
    """Return the memfd behind the destination."""
    assert ctx.dst.fd is not None
    return ctx.dst.fd


def expect_stored(fd: int, where: Range, offset: int) -> None:
    """Assert that a file holds the bytes of a range at this offset."""
    expect(os.pread(fd, where.len, offset) == peek(where.start, where.len), True, "the file's bytes as the source's")


def refusal(call: Callable[[], object]) -> int:
    """Return the errno of a fill that must fail without progress: its output field says the same."""
    try:
        call()
    except UffdError as error:
        expect(error.output, -(error.errno or 0), f"output field of a fill that failed ({error})")
        return error.errno or 0
    raise AssertionError("expected a refusal; the call succeeded")


# ---- files ---------------------------------------------------------------------------------------------------------


@uffd_case("copy-shared-file", mem=SHARED, pages=4, rows=("CP-21", "CP-20"))
def test_copy_shared_file(ctx: Context) -> None:
    """A copy into a hole of shared memory is written into the file, for every other mapping and for read(2)."""
    ctx.src.fill()
    fd, size = file_of(ctx), ctx.page_size
    for number, prot in (3, PROT_READ), (1, PROT_NONE):
        before, source = stored_bytes(fd), ctx.src.page(number)
        with mapped(2 * size, prot=prot, flags=MAP_SHARED, fd=fd, offset=(number - 1) * size) as where:
            ctx.uffd.register(where, MISSING)
            ctx.uffd.copy(where.start + size, source.start, size)
        expect(stored_bytes(fd) - before, size, "growth of the file's store")
        expect_stored(fd, source, number * size)
        ctx.dst.expect_pattern_of(ctx.src, number, 1)


@uffd_case("copy-cached", mem=SHARED, pages=2, rows=("CP-22",), kind=Kind.DETAIL)
def test_copy_cached(ctx: Context) -> None:
    """A page that the file has is not missing, though this mapping has not touched it: EEXIST, and it stays."""
    ctx.src.fill()
    ctx.dst.pattern.fill(ctx.dst.alias.start, 1, 1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with refuses(EEXIST):
        ctx.uffd.copy(ctx.dst.page(1).start, ctx.src.start, ctx.page_size)
    with refuses(EAGAIN, output=ctx.page_size):
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, 2 * ctx.page_size)
    Pagemap.expect_present(ctx.dst, 0)
    expect(stored_bytes(file_of(ctx)), 2 * ctx.page_size, "bytes stored in the file")
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_pattern_of(ctx.src))


@uffd_case(
    "copy-private-file",
    mem=(SHMEM_PRIVATE, HUGETLB_PRIVATE),
    pages=2,
    spare_hugepages=1,
    rows=("CP-23", "CP-29"),
    kind=Kind.DETAIL,
)
def test_copy_private_file(ctx: Context) -> None:
    """A copy into a private mapping of a file is the process's own, over a hole as over stored data; the file stays."""
    ctx.src.fill()
    fd, size = file_of(ctx), ctx.page_size
    with mapped(size, flags=MAP_SHARED, fd=fd) as data:
        touch(data, size, write=True)
        ctx.uffd.register(ctx.dst.range, MISSING)
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, 2 * size)
        ctx.dst.expect_pattern_of(ctx.src, write_back=True)
        expect_bytes(data, 0, "the file")
    expect(stored_bytes(fd), size, "bytes stored in the file")


@uffd_case("copy-page-kind", mem=ALL, pages=1, rows=("CP-01", "CP-21", "CP-23"), kind=Kind.DETAIL)
def test_copy_page_kind(ctx: Context) -> None:
    """A copied page is mapped once, as a page of the file in shared memory and as an anonymous one elsewhere."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
    bits = Pagemap.entry(ctx.dst.start) & (PM_PRESENT | PM_FILE | PM_MMAP_EXCLUSIVE)
    expect(hex(bits), hex(PM_PRESENT | PM_MMAP_EXCLUSIVE | (PM_FILE if ctx.mem.shared else 0)), "pagemap bits")


@uffd_case("copy-soft-dirty", mem=NOT_HUGETLB, pages=2, rows=("CP-01",), kind=Kind.DETAIL)
def test_copy_soft_dirty(ctx: Context) -> None:
    """A copied page counts as written since soft-dirty tracking began."""
    ctx.src.fill()
    ctx.dst.fill(0, 1)
    require_soft_dirty(ctx.dst.start)
    ctx.uffd.register(ctx.dst.range, MISSING)
    Path("/proc/self/clear_refs").write_text("4")
    ctx.uffd.copy(ctx.dst.page(1).start, ctx.src.start, ctx.page_size)
    marks = [bool(entry & PM_SOFT_DIRTY) for entry in Pagemap.entries(ctx.dst.range)]
    expect(marks, [False, True], "soft-dirty bits of an old page and of the copied one")


@uffd_case(
    "copy-beyond-file", mem=(SHMEM, SHMEM_PRIVATE, HUGETLB), pages=4, rows=("CP-24",), bugs=(11, 16), kind=Kind.DETAIL
)
def test_copy_beyond_file(ctx: Context) -> None:
    """A copy reaches as far as the file, its last page begun included; beyond, nothing is stored and nothing mapped."""
    ctx.src.fill()
    fd, size = file_of(ctx), ctx.page_size
    # Since Linux 7.1 shared memory has no page to offer there: ENOMEM.
    refusals = ("EFAULT", "ENOMEM") if ctx.mem is SHMEM else ("EFAULT",)
    flags = (MAP_SHARED if ctx.mem.shared else MAP_PRIVATE) | MAP_NORESERVE
    with mapped(3 * size, flags=flags, fd=fd, offset=size) as where:
        os.ftruncate(fd, 2 * size if ctx.mem.hugetlb else size + 1)
        ctx.uffd.register(where, MISSING)
        for start in where.start + size, where.start + 2 * size:
            number = refusal(partial(ctx.uffd.copy, start, ctx.src.start, size))
            expect_one_of(errno_name(number), refusals, "beyond the end of the file")
        expect(stored_bytes(fd), 0, "bytes stored in the file")
        with refuses(EAGAIN, output=size):
            ctx.uffd.copy(where.start, ctx.src.start, 3 * size)
        expect_same(ctx.src.start, where.start, size, "the file's last page")
    expect(stored_bytes(fd), size if ctx.mem.shared else 0, "bytes stored in the file")


@uffd_case("copy-full-tmpfs", mem=(ANON,), needs=("cap_sys_admin",), pages=4, rows=("CP-25",), kind=Kind.DETAIL)
def test_copy_full_tmpfs(ctx: Context) -> None:
    """A tmpfs that is full stops a copy, then refuses it with ENOMEM; nothing of what was refused stays accounted."""
    ctx.src.fill()
    room, size = 2 * PAGE_SIZE, 4 * PAGE_SIZE
    with limited_file("tmpfs", room, size) as fd, mapped(size, flags=MAP_SHARED, fd=fd) as where:
        ctx.uffd.register(where, MISSING)
        with refuses(EAGAIN, output=room):
            ctx.uffd.copy(where.start, ctx.src.start, size)
        for _ in range(3):
            with refuses(ENOMEM):
                ctx.uffd.copy(where.start + room, ctx.src.start + room, PAGE_SIZE)
        expect((stored_bytes(fd), free_bytes(fd)), (room, 0), "bytes stored and bytes free")
        advise(where, Advice.REMOVE)
        expect((stored_bytes(fd), free_bytes(fd)), (0, room), "bytes stored and bytes free once the file is emptied")
        ctx.uffd.copy(where.start + room, ctx.src.start + room, room)
        expect_same(ctx.src.start + room, where.start + room, room, "the pages copied")


# ---- huge pages ----------------------------------------------------------------------------------------------------


@uffd_case("copy-hugetlb-part", mem=(HUGETLB, HUGETLB_PRIVATE), pages=2, rows=("CP-26",))
def test_copy_hugetlb_part(ctx: Context) -> None:
    """A copy into huge pages takes whole ones: EINVAL, the output field too, for any other start or length."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start):
        for start, length in (PAGE_SIZE, HUGEPAGE), (0, PAGE_SIZE), (0, HUGEPAGE + PAGE_SIZE), (HUGEPAGE // 2,) * 2:
            with promise("CP-26", f"{length} bytes from byte {start} on"), refuses(EINVAL):
                ctx.uffd.copy(ctx.dst.start + start, ctx.src.start, length)
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_present(ctx.dst)
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, HUGEPAGE)


@uffd_case("copy-hugetlb-source", mem=(HUGETLB, HUGETLB_PRIVATE), pages=1, rows=("CP-30",), kind=Kind.DETAIL)
def test_copy_hugetlb_source(ctx: Context) -> None:
    """Base pages can be copied from the middle of a huge page."""
    ctx.src.fill()
    with closing(ANON.allocate(2)) as area:
        ctx.uffd.register(area.range, MISSING)
        source = ctx.src.start + 5 * PAGE_SIZE + 7
        ctx.uffd.copy(area.start, source, 2 * PAGE_SIZE)
        expect_same(source, area.start, 2 * PAGE_SIZE, "the pages copied")


@uffd_case(
    "copy-hugetlb-gives-back",
    mem=(HUGETLB,),
    needs=("cap_sys_admin",),
    pages=1,
    spare_hugepages=2,
    rows=("CP-27", "CP-07"),
    bugs=(11,),
    kind=Kind.DETAIL,
)
def test_copy_hugetlb_gives_back(ctx: Context) -> None:
    """A copy into a huge page that fails gives the page, and its reservation, back."""
    ctx.src.fill()
    size = 2 * HUGEPAGE
    for flags in MAP_SHARED, MAP_SHARED | MAP_NORESERVE, MAP_PRIVATE, MAP_PRIVATE | MAP_NORESERVE:
        with limited_file("hugetlbfs", size, size) as fd, mapped(size, flags=flags, fd=fd) as where:
            ctx.uffd.register(where, MISSING)
            with promise("CP-27", f"mmap flags {flags:#x}"):
                for start in where.start, where.start + HUGEPAGE:
                    free = free_bytes(fd)
                    with refuses(EFAULT):
                        ctx.uffd.copy(start, ctx.src.range.end, HUGEPAGE)
                    expect(free_bytes(fd), free, "bytes free after EFAULT")
                    ctx.uffd.copy(start, ctx.src.start, HUGEPAGE)
                    free = free_bytes(fd)
                    with refuses(EEXIST):
                        ctx.uffd.copy(start, ctx.src.start, HUGEPAGE)
                    expect(free_bytes(fd), free, "bytes free after EEXIST")


@uffd_case(
    "copy-hugetlb-beyond-file-gives-back",
    mem=(HUGETLB,),
    needs=("cap_sys_admin",),
    pages=1,
    spare_hugepages=2,
    rows=("CP-24", "CP-27"),
    bugs=(11,),
    kind=Kind.DETAIL,
)
def test_copy_hugetlb_beyond_file_gives_back(ctx: Context) -> None:
    """A copy beyond the end of a file of huge pages gives the page, and its reservation, back."""
    ctx.src.fill()
    size = 2 * HUGEPAGE
    for flags in MAP_SHARED, MAP_SHARED | MAP_NORESERVE:
        with limited_file("hugetlbfs", size, size) as fd, mapped(size, flags=flags, fd=fd) as where:
            os.ftruncate(fd, HUGEPAGE)
            ctx.uffd.register(where, MISSING)
            free = free_bytes(fd)
            with promise("CP-24", f"mmap flags {flags:#x}"):
                with refuses(EFAULT):
                    ctx.uffd.copy(where.start + HUGEPAGE, ctx.src.start, HUGEPAGE)
                expect(free_bytes(fd), free, "bytes free after EFAULT")
                os.ftruncate(fd, size)
                ctx.uffd.copy(where.start + HUGEPAGE, ctx.src.start, HUGEPAGE)
                expect(free_bytes(fd), free - HUGEPAGE, "bytes free when the file reaches there and has the page")


POOL_EMPTY = Defect(
    id="D-CP-28",
    summary="UFFDIO_COPY into a huge page says EEXIST when the pool has no page left, although nothing is mapped: who "
    "answers EEXIST with UFFDIO_WAKE makes the thread fault for ever.",
    kernels="6.18.44, 7.3.4; not 6.1.192, 6.12.117",
    advice="Reserve the huge pages (mmap without MAP_NORESERVE); after EEXIST ask pagemap or mincore(2) for the page.",
    shows=r"expected ENOMEM with copy = -ENOMEM; got .*: EEXIST with copy = -EEXIST",
)


@contextmanager
def no_hugepage_left(ctx: Context) -> Iterator[Range]:
    """Yield two registered huge pages of which the first has taken all the room that their file system has."""
    size, flags = 2 * HUGEPAGE, MAP_SHARED | MAP_NORESERVE
    with limited_file("hugetlbfs", HUGEPAGE, size) as fd, mapped(size, flags=flags, fd=fd) as where:
        ctx.uffd.register(where, MISSING)
        ctx.uffd.copy(where.start, ctx.src.start, HUGEPAGE)
        yield where


@uffd_case(
    "copy-hugetlb-pool-empty", mem=(HUGETLB,), needs=("cap_sys_admin",), pages=1, rows=("CP-28",), defect=POOL_EMPTY
)
def test_copy_hugetlb_pool_empty(ctx: Context) -> None:
    """A copy for which no huge page is left says ENOMEM."""
    with no_hugepage_left(ctx) as where, refuses(ENOMEM):
        ctx.uffd.copy(where.start + HUGEPAGE, ctx.src.start, HUGEPAGE)


@uffd_case(
    "copy-hugetlb-pool-empty-then-not",
    mem=(HUGETLB,),
    needs=("cap_sys_admin",),
    pages=1,
    rows=("CP-28",),
    kind=Kind.DETAIL,
)
def test_copy_hugetlb_pool_empty_then_not(ctx: Context) -> None:
    """A copy that found no huge page, whatever it said, wakes nobody and can be repeated when there is one."""
    ctx.src.fill()
    with no_hugepage_left(ctx) as where:
        second = where.start + HUGEPAGE
        with faulting(ctx.uffd, second):
            number = refusal(lambda: ctx.uffd.copy(second, ctx.src.start, HUGEPAGE))
            expect_one_of(errno_name(number), ("ENOMEM", "EEXIST"), "when no huge page is left")
            ctx.uffd.expect_still_asleep(1)
            advise(Range(where.start, HUGEPAGE), Advice.REMOVE)
            ctx.uffd.copy(second, ctx.src.start, HUGEPAGE)
        expect_same(ctx.src.start, second, HUGEPAGE, "the page copied")


@uffd_case("copy-onto-thp", mem=(ANON, SHMEM), needs=("thp",), pages=1, rows=("CP-39",), kind=Kind.DETAIL)
def test_copy_onto_thp(ctx: Context) -> None:
    """Pages that a transparent huge page covers are there: EEXIST, and the huge page stays whole."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, MISSING)
    for page in 0, 1, area.nr_pages - 1:
        with promise("CP-39", f"UFFDIO_COPY at page {page}"), refuses(EEXIST):
            ctx.uffd.copy(area.page(page).start, ctx.src.start, PAGE_SIZE)
        with promise("CP-39", f"UFFDIO_ZEROPAGE at page {page}"), refuses(EEXIST):
            ctx.uffd.zeropage(area.page(page))
    expect(pmd_mapped(area.range), area.range.len, "bytes that a transparent huge page maps")
    area.expect_pattern_of(area)


# ---- the source, and swap ------------------------------------------------------------------------------------------


@uffd_case("copy-fresh-source", mem=ALL, pages=3, spare_hugepages=1, rows=("CP-30",), kind=Kind.DETAIL)
def test_copy_fresh_source(ctx: Context) -> None:
    """A source that nobody has touched yet is copied like any other: as zeroes, over several pages."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.page(2).start):
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, 3 * ctx.page_size)
    ctx.dst.expect_zero()


@uffd_case("copy-mixed-source", mem=ALL, pages=3, spare_hugepages=1, rows=("CP-30",), kind=Kind.DETAIL)
def test_copy_mixed_source(ctx: Context) -> None:
    """A page of the source that nobody has touched changes nothing about its neighbours."""
    ctx.src.fill(0, 1)
    ctx.src.fill(2, 1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.copy(ctx.dst.start, ctx.src.start, 3 * ctx.page_size)
    expect_same(ctx.src.start, ctx.dst.start, 3 * ctx.page_size, "the pages copied")
    ctx.dst.expect_zero(1, 1)


def send_to_swap(ctx: Context) -> None:
    """Have the destination written to swap; where the memory is shared, the page tables do not tell."""
    where = ctx.dst.range
    if ctx.mem.shared:
        page_out(where, lambda: smaps_bytes(where, "Swap") >= where.len)
    else:
        swap_out(where)


@uffd_case("copy-swapped-source", mem=ALL, needs=("swap",), pages=1, rows=("CP-30",), kind=Kind.DETAIL)
def test_copy_swapped_source(ctx: Context) -> None:
    """A source that has been swapped out comes back for the copy."""
    with closing(ANON.allocate(ctx.page_size // PAGE_SIZE)) as source:
        source.fill()
        swap_out(source.page(0, min(source.nr_pages, 4)))
        ctx.uffd.register(ctx.dst.range, MISSING)
        ctx.uffd.copy(ctx.dst.start, source.start, ctx.page_size)
        expect_same(source.start, ctx.dst.start, ctx.page_size, "the page copied")


@uffd_case("copy-onto-swapped", mem=NOT_HUGETLB, needs=("swap",), pages=2, rows=("CP-40",), kind=Kind.DETAIL)
def test_copy_onto_swapped(ctx: Context) -> None:
    """A page that has been swapped out is not missing: every fill says EEXIST, and it comes back as it was."""
    ctx.src.fill()
    ctx.dst.fill()
    send_to_swap(ctx)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("CP-40", "UFFDIO_COPY"), refuses(EEXIST):
        ctx.uffd.copy(ctx.dst.start, ctx.src.page(1).start, PAGE_SIZE)
    with promise("CP-40", "UFFDIO_ZEROPAGE"), refuses(EEXIST):
        ctx.uffd.zeropage(ctx.dst.page(0))
    # In shared memory the swap entry is the file's, not the page table's, where UFFDIO_POISON puts its marker.
    if Feature.POISON in ctx.uffd.offered and not ctx.mem.shared:
        with promise("CP-40", "UFFDIO_POISON"), refuses(EEXIST):
            ctx.uffd.poison(ctx.dst.page(0))
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_pattern_of(ctx.src))


@uffd_case(
    "copy-then-swapped",
    mem=NOT_HUGETLB,
    needs=("swap",),
    pages=2,
    rows=("CP-20", "CP-19"),
    bugs=(17,),
    kind=Kind.DETAIL,
)
def test_copy_then_swapped(ctx: Context) -> None:
    """A page copied into a mapping that cannot be written counts as changed: it survives being swapped out."""
    ctx.src.fill()
    protect(ctx.dst.range, PROT_READ)
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.copy(ctx.dst.start, ctx.src.start, 2 * PAGE_SIZE)
    send_to_swap(ctx)
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_pattern_of(ctx.src))


# ---- other registrations, and markers ------------------------------------------------------------------------------


@uffd_case(
    "copy-minor",
    mem=SHARED,
    features=Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS,
    pages=2,
    rows=("CP-46",),
    kind=Kind.DETAIL,
)
def test_copy_minor(ctx: Context) -> None:
    """A hole in a range that is registered for minor faults alone can be filled."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MINOR)
    ctx.uffd.copy(ctx.dst.page(1).start, ctx.src.page(1).start, ctx.page_size)
    Pagemap.expect_present(ctx.dst, 1)
    expect(stored_bytes(file_of(ctx)), ctx.page_size, "bytes stored in the file")
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_pattern_of(ctx.src, 1, 1))


@uffd_case("copy-poisoned", mem=ALL, features=Feature.POISON, pages=2, rows=("CP-47",), kind=Kind.DETAIL)
def test_copy_poisoned(ctx: Context) -> None:
    """A copy heals a page that UFFDIO_POISON marked; the one beside it stays poisoned."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.range)
    ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
    traps = touch_trapped(ctx.dst.range, ctx.page_size, write=True)
    expect([trap and trap.signo for trap in traps], [None, SIGBUS], "signals of accesses to the two pages")
    ctx.dst.expect_pattern_of(ctx.src, 0, 1)


GUARD_OVERWRITTEN = Defect(
    id="D-CP-48",
    summary="UFFDIO_COPY overwrites a guard page of MADV_GUARD_INSTALL, which UFFDIO_ZEROPAGE and the others respect.",
    kernels="6.18.44; not 7.3.4",
    advice="Do not fill ranges in which the process may have installed guard pages.",
    shows=r"expected EEXIST; the call succeeded",
)


def install_guard(where: Range) -> None:
    """Make a page a guard page; Skip where the kernel cannot."""
    try:
        advise(where, Advice.GUARD_INSTALL)
    except KernelError as error:
        if error.errno != EINVAL:
            raise
        raise Skip("MADV_GUARD_INSTALL: EINVAL (Linux 6.13, for shared memory 6.15)") from None


def expect_guarded(where: Range) -> None:
    """Assert that an access to the page raises SIGSEGV."""
    (trap,) = touch_trapped(where, where.len)
    expect(trap and trap.signo, SIGSEGV, "the signal of an access to the guard page")


@uffd_case("copy-onto-guard", mem=NOT_HUGETLB, pages=2, rows=("CP-48",), bugs=(50,), defect=GUARD_OVERWRITTEN)
def test_copy_onto_guard(ctx: Context) -> None:
    """A guard page holds against UFFDIO_COPY: EEXIST."""
    page = ctx.dst.page(0)
    install_guard(page)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with mended(ctx.uffd), promise("CP-48"):
        with refuses(EEXIST):
            ctx.uffd.copy(page.start, ctx.src.start, page.len)
        expect_guarded(page)


@uffd_case("copy-onto-guard-either-way", mem=NOT_HUGETLB, pages=2, rows=("CP-48",), kind=Kind.DETAIL)
def test_copy_onto_guard_either_way(ctx: Context) -> None:
    """A copy onto a guard page either says EEXIST, and the guard holds, or succeeds, and the data are there."""
    page = ctx.dst.page(0)
    ctx.src.fill()
    install_guard(page)
    ctx.uffd.register(ctx.dst.range, MISSING)
    try:
        ctx.uffd.copy(page.start, ctx.src.start, page.len)
    except UffdError as error:
        expect_failed(error, EEXIST)
        saw("EEXIST")
        expect_guarded(page)
        if ctx.mem.shared:
            expect(stored_bytes(file_of(ctx)), 0, "bytes stored in the file")
    else:
        saw("the copy overwrites the guard page")
        ctx.dst.expect_pattern_of(ctx.src, 0, 1)


@uffd_case("copy-async-wp-file", features=Feature.WP_ASYNC, rows=("CP-49",), kind=Kind.DETAIL)
def test_copy_async_wp_file() -> None:
    """A file whose writes are tracked with WP_ASYNC cannot be filled, with whatever: EINVAL."""
    executable = os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)
    with (
        mapped(PAGE_SIZE, prot=PROT_READ, flags=MAP_PRIVATE, fd=executable) as where,
        mapped(PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS) as source,
        Uffd.open(Feature.WP_ASYNC) as uffd,
    ):
        poke(source.start, b"\1")
        if refused_registration(uffd, where) != EINVAL:
            raise Skip("the Python interpreter is on tmpfs, which can be filled: move it to another file system")
        uffd.register(where, WP)
        fills: dict[str, Callable[[], object]] = {
            "UFFDIO_COPY": lambda: uffd.copy(where.start, source.start, PAGE_SIZE),
            "UFFDIO_ZEROPAGE": lambda: uffd.zeropage(where),
            "UFFDIO_POISON": lambda: uffd.poison(where),
            "UFFDIO_CONTINUE": lambda: uffd.continue_(where),
        }
        for name, fill in fills.items():
            with promise("CP-49", name), refuses(EINVAL):
                fill()
        expect(peek(where.start, 4), b"\x7fELF", "the file's first bytes")
    os.close(executable)


def refused_registration(uffd: Uffd, where: Range) -> int:
    """Try to register a range for missing faults; return the errno, or 0 and have it unregistered again."""
    try:
        uffd.register(where, MISSING)
    except UffdError as error:
        return error.errno or 0
    uffd.unregister(where)
    return 0
