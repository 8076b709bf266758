# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_ZEROPAGE: where it maps zeroes, what it refuses, whom it wakes."""

from __future__ import annotations

import os
from errno import EAGAIN, EEXIST, EFAULT, EINVAL, ENOENT, ENOMEM, ESRCH
from signal import SIGBUS, SIGSEGV

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, HUGETLB, HUGETLB_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MINOR, MISSING,
    NOT_HUGETLB, PAGE_SIZE, PROT_NONE, PROT_READ, PROT_WRITE, SHMEM, SHMEM_PRIVATE, UNTOUCHED, WP, Advice, Channel,
    Context, Feature, KernelError, PagefaultFlag, Pagemap, Range, Skip, UffdError, ZeropageMode, advise, bad_ranges,
    errno_name, eventually, expect, expect_bytes, expect_errno, expect_failed, faulting, faulting_pages, free_bytes,
    held_up, limited_file, mapped, monitored, orphaned, peek, poke, promise, protect, read_only, refuses, saw,
    smaps_bytes, stored_bytes, touch, touch_trapped, uapi, undisturbed, unmap, unread_event,
)  # fmt: skip

PRIVATE = (ANON, SHMEM_PRIVATE)
MARKERS = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED


def file_of(ctx: Context) -> int:
    """Return the memfd behind the destination."""
    assert ctx.dst.fd is not None
    return ctx.dst.fd


# ---- what it does --------------------------------------------------------------------------------------------------


@uffd_case("zeropage-pages", mem=NOT_HUGETLB, pages=4, rows=("ZP-01",))
def test_zeropage_pages(ctx: Context) -> None:
    """UFFDIO_ZEROPAGE fills its pages, one or several, with zeroes and wakes the threads that wait there, no others."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1, 2, 3) as waiters:
        for first, count, asleep, present in (1, 1, 3, (1,)), (2, 2, 1, (1, 2, 3)), (0, 1, 0, (0, 1, 2, 3)):
            with promise("ZP-01", f"{count} page(s) from page {first} on"):
                ctx.uffd.zeropage(ctx.dst.page(first, count))
                ctx.uffd.expect_still_asleep(asleep)
                Pagemap.expect_present(ctx.dst, *present)
                ctx.dst.expect_zero(first, count)
                for page in range(first, first + count):
                    expect(waiters[page].result(), b"\0", f"what thread {page} has read")


@uffd_case("zeropage-struct", mem=(ANON,), pages=1, rows=("ZP-01",))
def test_zeropage_struct(ctx: Context) -> None:
    """UFFDIO_ZEROPAGE writes the output field of its argument and nothing else, whether it succeeds or fails."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    page = uapi.uffdio_range(ctx.dst.start, PAGE_SIZE)
    arg = uapi.uffdio_zeropage(page, ZeropageMode.DONTWAKE)
    before = bytes(arg)[:-8]
    ctx.uffd.ioctl(uapi.UFFDIO_ZEROPAGE, arg, "UFFDIO_ZEROPAGE", "zeropage")
    expect((bytes(arg)[:-8], arg.zeropage), (before, PAGE_SIZE), "the argument after success")
    with refuses(EEXIST):
        ctx.uffd.ioctl(uapi.UFFDIO_ZEROPAGE, arg, "UFFDIO_ZEROPAGE", "zeropage")
    expect(bytes(arg)[:-8], before, "the argument after EEXIST")


@uffd_case("zeropage-write", mem=NOT_HUGETLB, pages=2, rows=("ZP-10",))
def test_zeropage_write(ctx: Context) -> None:
    """A write that UFFDIO_ZEROPAGE answers raises one message, and is seen in its own page alone."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    start = ctx.dst.page(1).start
    with faulting(ctx.uffd, start, call=lambda: poke(start, b"\xee"), flags=PagefaultFlag.WRITE):
        ctx.uffd.zeropage(ctx.dst.range)
    ctx.uffd.expect_no_message()
    ctx.dst.expect_zero(0, 1)
    expect(peek(start), b"\xee", "the byte written")
    expect_bytes(Range(start + 1, PAGE_SIZE - 1), 0, "the rest of its page")


@uffd_case("zeropage-no-memory", mem=PRIVATE, pages=4, rows=("ZP-01", "ZP-07"), kind=Kind.DETAIL)
def test_zeropage_no_memory(ctx: Context) -> None:
    """In private memory the zeroes take no memory before they are written over."""
    if os.uname().machine == "s390x":
        raise Skip("s390 guests may have to do without the shared zero page: run on another architecture")
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.zeropage(ctx.dst.range)
    expect(smaps_bytes(ctx.dst.range, "Rss"), 0, "Rss of the area")
    undisturbed(ctx.uffd, lambda: touch(ctx.dst.page(0), PAGE_SIZE, write=True))
    expect(smaps_bytes(ctx.dst.range, "Rss"), PAGE_SIZE, "Rss of the area after a write to one page")


@uffd_case("zeropage-dontwake", mem=NOT_HUGETLB, pages=3, rows=("ZP-09", "ZP-03"))
def test_zeropage_dontwake(ctx: Context) -> None:
    """With DONTWAKE nobody wakes before UFFDIO_WAKE, not even when the call stops early."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1):
        with promise("ZP-09"):
            ctx.uffd.zeropage(ctx.dst.page(1), ZeropageMode.DONTWAKE)
            ctx.uffd.expect_still_asleep(2)
        with promise("ZP-03", "with DONTWAKE"), refuses(EAGAIN, output=PAGE_SIZE):
            ctx.uffd.zeropage(ctx.dst.range, ZeropageMode.DONTWAKE)
        ctx.uffd.expect_still_asleep(2)
        Pagemap.expect_present(ctx.dst, 0, 1)
        ctx.uffd.wake(ctx.dst.range)
    ctx.uffd.expect_no_message()
    ctx.dst.expect_zero(0, 2)


@uffd_case("zeropage-unread", mem=NOT_HUGETLB, pages=2, rows=("ZP-01", "ZP-09"))
def test_zeropage_unread(ctx: Context) -> None:
    """A fault resolved before anybody has read its message leaves none, unless its thread sleeps on with DONTWAKE."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("ZP-09"), faulting(ctx.uffd, ctx.dst.start, read=False):
        ctx.uffd.zeropage(ctx.dst.page(0), ZeropageMode.DONTWAKE)
        ctx.uffd.wait_fault(ctx.dst.start)
        ctx.uffd.wake(ctx.dst.page(0))
    with promise("ZP-01"), faulting(ctx.uffd, ctx.dst.page(1).start, read=False):
        ctx.uffd.zeropage(ctx.dst.page(1))
        expect((ctx.uffd.readable(), ctx.uffd.fdinfo.pending), (False, 0), "POLLIN and pending of fdinfo")
        ctx.uffd.expect_no_message()


@uffd_case("zeropage-remote", mem=NOT_HUGETLB, pages=2, rows=("ZP-01",))
def test_zeropage_remote(ctx: Context) -> None:
    """A monitor in another process zeroes the memory of the handle's process, not its own."""

    def life(_: Channel) -> None:
        ctx.dst.expect_zero(0, 1)

    with monitored(ctx.dst.range, MISSING, life) as (_, uffd):
        uffd.wait_fault(ctx.dst.start)
        uffd.zeropage(ctx.dst.page(0))
        uffd.expect_asleep(0)
    Pagemap.expect_present(ctx.dst)


# ---- what it refuses -----------------------------------------------------------------------------------------------


@uffd_case("zeropage-bad-range", mem=ALL, pages=2, rows=("ZP-02",))
def test_zeropage_bad_range(ctx: Context) -> None:
    """UFFDIO_ZEROPAGE takes whole pages at a page's start, in user space; else EINVAL, and it touches nothing."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    page = ctx.dst.page(0)
    with faulting(ctx.uffd, page.start):
        for what, bad in {**bad_ranges(page), "leaves user space": Range(page.start, 1 << 62)}.items():
            with promise("ZP-02", what), refuses(EINVAL, output=UNTOUCHED):
                ctx.uffd.zeropage(bad)
        with promise("ZP-02", "argument NULL"), refuses(EFAULT):
            ctx.uffd.raw_ioctl(uapi.UFFDIO_ZEROPAGE, 0)
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_present(ctx.dst)
        ctx.uffd.copy(page.start, ctx.src.start, page.len)


@uffd_case("zeropage-mode-bits", mem=(ANON,), pages=1, rows=("ZP-02",))
def test_zeropage_mode_bits(ctx: Context) -> None:
    """UFFDIO_ZEROPAGE knows one mode bit and refuses every other one, alone and together with the good one."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start):
        for bit in range(1, 64):
            for mode in ZeropageMode(1 << bit), ZeropageMode(1 << bit | 1):
                with promise("ZP-02", f"mode {int(mode):#x}"), refuses(EINVAL, output=UNTOUCHED):
                    ctx.uffd.zeropage(ctx.dst.range, mode)
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_present(ctx.dst)
        ctx.uffd.zeropage(ctx.dst.range)


@uffd_case("zeropage-argument-fault", mem=(ANON,), pages=1, rows=("ZP-02",))
def test_zeropage_argument_fault(ctx: Context) -> None:
    """An argument that ends in unreadable memory is answered with EFAULT, and nothing was done."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with mapped(2 * PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS) as pages:
        protect(Range(pages.start + PAGE_SIZE, PAGE_SIZE), PROT_NONE)
        address = pages.start + PAGE_SIZE - 16
        poke(address, bytes(uapi.uffdio_range(ctx.dst.start, PAGE_SIZE)))
        with refuses(EFAULT):
            ctx.uffd.raw_ioctl(uapi.UFFDIO_ZEROPAGE, address)
    Pagemap.expect_present(ctx.dst)


@uffd_case("zeropage-output-fault", mem=NOT_HUGETLB, pages=1, rows=("ZP-01", "CP-17"), kind=Kind.DETAIL)
def test_zeropage_output_fault(ctx: Context) -> None:
    """When UFFDIO_ZEROPAGE cannot write its output field, the page is there all the same, but nobody wakes: EFAULT."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    arg = bytes(uapi.uffdio_zeropage(uapi.uffdio_range(ctx.dst.start, PAGE_SIZE), 0, UNTOUCHED))
    with faulting(ctx.uffd, ctx.dst.start), read_only(arg) as address:
        with refuses(EFAULT):
            ctx.uffd.raw_ioctl(uapi.UFFDIO_ZEROPAGE, address)
        ctx.uffd.expect_still_asleep(1)
        expect(peek(address, len(arg)), arg, "the argument")
        Pagemap.expect_present(ctx.dst, 0)
        ctx.uffd.wake(ctx.dst.range)


@uffd_case("zeropage-nowhere", mem=NOT_HUGETLB, pages=3, rows=("ZP-04",), kind=Kind.DETAIL)
def test_zeropage_nowhere(ctx: Context) -> None:
    """UFFDIO_ZEROPAGE finds no entry where nothing is registered, not any more, or nothing is mapped."""
    with promise("ZP-04", "never registered"), refuses(ENOENT):
        ctx.uffd.zeropage(ctx.dst.page(0))
    ctx.uffd.register(ctx.dst.page(1, 2), MISSING)
    with promise("ZP-04", "before a registered range"), refuses(ENOENT):
        ctx.uffd.zeropage(ctx.dst.page(0))
    ctx.uffd.unregister(ctx.dst.page(1))
    with promise("ZP-04", "unregistered"), refuses(ENOENT):
        ctx.uffd.zeropage(ctx.dst.page(1))
    unmap(ctx.dst.page(2))
    with promise("ZP-04", "unmapped"), refuses(ENOENT):
        ctx.uffd.zeropage(ctx.dst.page(2))
    Pagemap.expect_present(ctx.dst)


@uffd_case("zeropage-beyond-mapping", mem=NOT_HUGETLB, pages=4, rows=("ZP-04",), kind=Kind.DETAIL)
def test_zeropage_beyond_mapping(ctx: Context) -> None:
    """UFFDIO_ZEROPAGE fills one mapping a call: nothing when the range leaves it, be it for another registered one."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    protect(ctx.dst.page(2, 2), PROT_READ)
    for what, first in ("starts before", -1), ("over two registered mappings", 1), ("ends behind", 3):
        with promise("ZP-04", what), refuses(ENOENT):
            ctx.uffd.zeropage(ctx.dst.page(first, 2))
    Pagemap.expect_present(ctx.dst)
    ctx.uffd.zeropage(ctx.dst.page(0, 2))
    ctx.uffd.zeropage(ctx.dst.page(2, 2))
    ctx.dst.expect_zero()


@uffd_case("zeropage-eexist", mem=NOT_HUGETLB, pages=3, rows=("ZP-03",))
def test_zeropage_eexist(ctx: Context) -> None:
    """UFFDIO_ZEROPAGE leaves a page alone that is there, copied, written or read before, and who still sleeps on it."""
    ctx.src.fill()
    ctx.dst.fill(1, 1)
    peek(ctx.dst.page(2).start)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start):
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE, uapi.CopyMode.DONTWAKE)
        for page, how in enumerate(("copied", "written", "read")):
            with promise("ZP-03", f"{how} before"), refuses(EEXIST):
                ctx.uffd.zeropage(ctx.dst.page(page))
        ctx.uffd.expect_still_asleep(1)
        ctx.dst.expect_pattern_of(ctx.src, 0, 2)
        ctx.uffd.wake(ctx.dst.page(0))


@uffd_case("zeropage-partial", mem=NOT_HUGETLB, pages=4, rows=("ZP-03",))
def test_zeropage_partial(ctx: Context) -> None:
    """UFFDIO_ZEROPAGE stops at a page that is there: EAGAIN counts the bytes done; threads behind them sleep on."""
    ctx.dst.fill(2, 1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1, 3) as waiters:
        with refuses(EAGAIN, output=2 * PAGE_SIZE):
            ctx.uffd.zeropage(ctx.dst.range)
        for waiter in waiters[:2]:
            waiter.result()
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_present(ctx.dst, 0, 1, 2)
        ctx.uffd.zeropage(ctx.dst.page(3))
    ctx.dst.expect_zero(0, 2)
    ctx.dst.expect_pattern_of(ctx.dst, 2, 1)


@uffd_case("zeropage-hugetlb", mem=(HUGETLB, HUGETLB_PRIVATE), pages=1, rows=("ZP-05",))
def test_zeropage_hugetlb(ctx: Context) -> None:
    """Huge pages cannot be filled by UFFDIO_ZEROPAGE: EINVAL, in the output field too, for a part as for all of one."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start):
        for length in ctx.page_size, PAGE_SIZE:
            with promise("ZP-05", f"{length} bytes"), refuses(EINVAL):
                ctx.uffd.zeropage(Range(ctx.dst.start, length))
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_present(ctx.dst)
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@uffd_case("zeropage-protected-mapping", mem=NOT_HUGETLB, pages=2, rows=("ZP-13",), kind=Kind.DETAIL)
def test_zeropage_protected_mapping(ctx: Context) -> None:
    """UFFDIO_ZEROPAGE fills a page that the process may only read, or not even that, and gives it no more rights."""
    for page, prot in enumerate((PROT_READ, PROT_NONE)):
        protect(ctx.dst.page(page), prot)
    ctx.uffd.register(ctx.dst.range, MISSING)
    for page, when in enumerate(("PROT_READ", "PROT_NONE")):
        with promise("ZP-13", when):
            ctx.uffd.zeropage(ctx.dst.page(page))
            (trap,) = touch_trapped(ctx.dst.page(page), PAGE_SIZE, write=True)
            expect(trap and trap.signo, SIGSEGV, "the signal that a write gets")
    with promise("ZP-13", "made writable"):
        protect(ctx.dst.range, PROT_READ | PROT_WRITE)
        undisturbed(ctx.uffd, lambda: touch(ctx.dst.range, PAGE_SIZE, write=True))
        ctx.dst.expect_zero()


# ---- files ---------------------------------------------------------------------------------------------------------


@uffd_case("zeropage-shared-file", mem=(SHMEM,), pages=3, rows=("ZP-06",))
def test_zeropage_shared_file(ctx: Context) -> None:
    """In shared memory the page of zeroes is the file's, which grows by it; what is written there is in the file."""
    fd = file_of(ctx)
    with mapped(2 * PAGE_SIZE, flags=MAP_SHARED, fd=fd, offset=PAGE_SIZE) as where:
        ctx.uffd.register(where, MISSING)
        ctx.uffd.zeropage(Range(where.start + PAGE_SIZE, PAGE_SIZE))
        expect(stored_bytes(fd), PAGE_SIZE, "bytes stored in the file")
        expect(os.lseek(fd, 0, os.SEEK_DATA), 2 * PAGE_SIZE, "offset of the file's first data")
        expect(os.pread(fd, PAGE_SIZE, 2 * PAGE_SIZE), bytes(PAGE_SIZE), "what the file holds there")
        undisturbed(ctx.uffd, lambda: poke(where.start + PAGE_SIZE, b"\xee"))
        expect(os.pread(fd, 1, 2 * PAGE_SIZE), b"\xee", "the byte written, read from the file")


@uffd_case("zeropage-cached", mem=(SHMEM,), pages=2, rows=("ZP-06", "ZP-03"), kind=Kind.DETAIL)
def test_zeropage_cached(ctx: Context) -> None:
    """A page that the file has is not missing, though this mapping has not touched it: EEXIST, and it stays."""
    os.pwrite(file_of(ctx), b"\xee", PAGE_SIZE)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with refuses(EEXIST):
        ctx.uffd.zeropage(ctx.dst.page(1))
    with refuses(EAGAIN, output=PAGE_SIZE):
        ctx.uffd.zeropage(ctx.dst.range)
    Pagemap.expect_present(ctx.dst, 0)
    expect(undisturbed(ctx.uffd, lambda: peek(ctx.dst.page(1).start)), b"\xee", "the byte in the file")


@uffd_case("zeropage-private-file", mem=(SHMEM_PRIVATE,), pages=2, rows=("ZP-07",), kind=Kind.DETAIL)
def test_zeropage_private_file(ctx: Context) -> None:
    """In a private mapping of a file the zeroes are the process's own, over a hole as over data; the file stays."""
    fd = file_of(ctx)
    os.pwrite(fd, b"\xee" * PAGE_SIZE, 0)
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.zeropage(ctx.dst.range)
    ctx.dst.expect_zero()
    undisturbed(ctx.uffd, lambda: poke(ctx.dst.start, b"\1"))
    expect(os.pread(fd, PAGE_SIZE, 0), b"\xee" * PAGE_SIZE, "what the file holds")
    expect(stored_bytes(fd), PAGE_SIZE, "bytes stored in the file")


@uffd_case("zeropage-beyond-file", mem=(SHMEM, SHMEM_PRIVATE), pages=4, rows=("ZP-08",), bugs=(16,), kind=Kind.DETAIL)
def test_zeropage_beyond_file(ctx: Context) -> None:
    """Zeroes reach as far as the file, its last page begun included; beyond, nothing is stored and nothing mapped."""
    fd = file_of(ctx)
    os.ftruncate(fd, PAGE_SIZE + 1)
    # Since Linux 7.1 shared memory has no page to offer there: ENOMEM.
    refusals = (EFAULT, ENOMEM) if ctx.mem.shared else EFAULT
    flags = (MAP_SHARED if ctx.mem.shared else MAP_PRIVATE) | MAP_NORESERVE
    with mapped(3 * PAGE_SIZE, flags=flags, fd=fd, offset=PAGE_SIZE) as where:
        ctx.uffd.register(where, MISSING)
        for start in where.start + PAGE_SIZE, where.start + 2 * PAGE_SIZE:
            try:
                ctx.uffd.zeropage(Range(start, PAGE_SIZE))
            except UffdError as error:
                expect_errno(error, refusals, "beyond the end of the file")
                expect_failed(error, error.errno or 0)
            else:
                raise AssertionError("expected a refusal beyond the end of the file; the call succeeded")
        expect(stored_bytes(fd), 0, "bytes stored in the file")
        with refuses(EAGAIN, output=PAGE_SIZE):
            ctx.uffd.zeropage(where)
        expect_bytes(Range(where.start, PAGE_SIZE), 0, "the file's last page")
    expect(stored_bytes(fd), PAGE_SIZE if ctx.mem.shared else 0, "bytes stored in the file")


@uffd_case("zeropage-full-tmpfs", mem=(ANON,), needs=("cap_sys_admin",), pages=1, rows=("ZP-08",), kind=Kind.DETAIL)
def test_zeropage_full_tmpfs(ctx: Context) -> None:
    """A tmpfs that is full stops the call, then refuses it with ENOMEM; nothing refused stays accounted."""
    room, size = 2 * PAGE_SIZE, 4 * PAGE_SIZE
    with limited_file("tmpfs", room, size) as fd, mapped(size, flags=MAP_SHARED, fd=fd) as where:
        ctx.uffd.register(where, MISSING)
        with refuses(EAGAIN, output=room):
            ctx.uffd.zeropage(where)
        for _ in range(3):
            with refuses(ENOMEM):
                ctx.uffd.zeropage(Range(where.start + room, PAGE_SIZE))
        expect((stored_bytes(fd), free_bytes(fd)), (room, 0), "bytes stored and bytes free")
        advise(where, Advice.REMOVE)
        expect((stored_bytes(fd), free_bytes(fd)), (0, room), "bytes stored and bytes free once the file is emptied")
        ctx.uffd.zeropage(Range(where.start + room, room))


# ---- other registrations, and markers ------------------------------------------------------------------------------


@uffd_case(
    "zeropage-wp",
    mem=NOT_HUGETLB,
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM,
    pages=1,
    rows=("ZP-10", "ZP-01"),
    kind=Kind.DETAIL,
)
def test_zeropage_wp(ctx: Context) -> None:
    """Zeroes come unprotected, into a range registered for write protection, too, or for that alone."""
    for mode in MISSING | WP, WP:
        with promise("ZP-10", str(mode)):
            ctx.uffd.register(ctx.dst.range, mode)
            ctx.uffd.zeropage(ctx.dst.range)
            Pagemap.expect_protected(ctx.dst, (), "after UFFDIO_ZEROPAGE")
            undisturbed(ctx.uffd, lambda: touch(ctx.dst.range, PAGE_SIZE, write=True))
            ctx.dst.expect_zero()
            ctx.uffd.unregister(ctx.dst.range)
            ctx.dst.release()


@uffd_case(
    "zeropage-minor", mem=(SHMEM,), features=Feature.MINOR_SHMEM, pages=2, rows=("ZP-06", "CP-46"), kind=Kind.DETAIL
)
def test_zeropage_minor(ctx: Context) -> None:
    """A hole in a range that is registered for minor faults alone can be filled with zeroes."""
    ctx.uffd.register(ctx.dst.range, MINOR)
    ctx.uffd.zeropage(ctx.dst.page(1))
    Pagemap.expect_present(ctx.dst, 1)
    expect(stored_bytes(file_of(ctx)), PAGE_SIZE, "bytes stored in the file")


MARKER_REFUSED = Defect(
    id="D-ZP-11",
    summary="UFFDIO_ZEROPAGE says EEXIST where a missing page of private memory is write-protected, as if the page "
    "were there; UFFDIO_COPY fills it, and drops the protection.",
    kernels="6.12.117, 6.18.44, 7.3.4",
    advice="Fill protected missing pages with UFFDIO_COPY from a page of zeroes, with MODE_WP to keep them protected.",
    shows=r"UFFDIO_ZEROPAGE\(.*\): EEXIST with zeropage = -EEXIST",
)


@uffd_case("zeropage-wp-marker", mem=PRIVATE, features=MARKERS, pages=1, rows=("ZP-11",), defect=MARKER_REFUSED)
def test_zeropage_wp_marker(ctx: Context) -> None:
    """A page that is missing can be filled with zeroes, protected or not."""
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    with promise("ZP-11"):
        ctx.uffd.zeropage(ctx.dst.range)
    ctx.dst.expect_zero()


@uffd_case(
    "zeropage-wp-marker-either-way", mem=NOT_HUGETLB, features=MARKERS, pages=1, rows=("ZP-11",), kind=Kind.DETAIL
)
def test_zeropage_wp_marker_either_way(ctx: Context) -> None:
    """On a protected missing page zeroes either come, or EEXIST wakes nobody and keeps the protection."""
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    with faulting(ctx.uffd, ctx.dst.start):
        try:
            ctx.uffd.zeropage(ctx.dst.range)
        except UffdError as error:
            expect_failed(error, EEXIST)
            expect(ctx.mem.shared, False, "EEXIST in shared memory")
            saw("EEXIST")
            ctx.uffd.expect_still_asleep(1)
            Pagemap.expect_protected(ctx.dst, (0,), "after EEXIST")
            ctx.uffd.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE)
        else:
            saw("zeroes")
    ctx.dst.expect_zero()


@uffd_case("zeropage-poisoned", mem=NOT_HUGETLB, features=Feature.POISON, pages=1, rows=("ZP-12",), kind=Kind.DETAIL)
def test_zeropage_poisoned(ctx: Context) -> None:
    """In private memory a poisoned page stays so, EEXIST; in shared memory zeroes replace the poison as copies do."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.range)
    if ctx.mem.shared:
        ctx.uffd.zeropage(ctx.dst.range)
        ctx.dst.expect_zero()
        return
    with refuses(EEXIST):
        ctx.uffd.zeropage(ctx.dst.range)
    (trap,) = touch_trapped(ctx.dst.range, PAGE_SIZE)
    expect(trap and trap.signo, SIGBUS, "the signal of an access")


@uffd_case("zeropage-onto-guard", mem=NOT_HUGETLB, pages=1, rows=("ZP-12", "CP-48"), bugs=(50,), kind=Kind.DETAIL)
def test_zeropage_onto_guard(ctx: Context) -> None:
    """A guard page holds against UFFDIO_ZEROPAGE, EEXIST; in shared memory older kernels overwrite it."""
    try:
        advise(ctx.dst.range, Advice.GUARD_INSTALL)
    except KernelError as error:
        expect(errno_name(error.errno or 0), "EINVAL", "errno of a kernel without MADV_GUARD_INSTALL")
        raise Skip("MADV_GUARD_INSTALL: EINVAL (Linux 6.13, for shared memory 6.15)") from None
    ctx.uffd.register(ctx.dst.range, MISSING)
    try:
        ctx.uffd.zeropage(ctx.dst.range)
    except UffdError as error:
        expect_failed(error, EEXIST)
        saw("EEXIST")
        (trap,) = touch_trapped(ctx.dst.range, PAGE_SIZE)
        expect(trap and trap.signo, SIGSEGV, "the signal of an access")
    else:
        saw("zeroes overwrite the guard page")
        expect(ctx.mem.shared, True, "zeroes only in shared memory")
        expect(Feature.RWP in ctx.uffd.offered, False, "zeroes on a kernel with UFFD_FEATURE_RWP, as of Linux 7.3")
        ctx.dst.expect_zero()


# ---- events and processes that have gone ---------------------------------------------------------------------------


@uffd_case("zeropage-during-event", mem=NOT_HUGETLB, features=Feature.EVENT_REMOVE, pages=2, rows=("ZP-14",))
def test_zeropage_during_event(ctx: Context) -> None:
    """UFFDIO_ZEROPAGE says EAGAIN while an event of its handle waits to be read; afterwards a repetition succeeds."""
    uffd, page = ctx.uffd, ctx.dst.page(0)
    uffd.register(ctx.dst.range, MISSING)

    def attempt() -> bool:
        try:
            uffd.zeropage(page)
        except UffdError as error:
            if error.errno != EAGAIN:
                raise
            return False
        return True

    with unread_event(uffd, ctx.dst.page(1)):
        for where in page, Range(0, 0):
            with promise("ZP-14", f"event waits, range {where}"), held_up():
                uffd.zeropage(where)
        Pagemap.expect_present(ctx.dst)
    eventually(attempt, "zeroes once the event is read")
    ctx.dst.expect_zero(0, 1)


@uffd_case("zeropage-target-gone", mem=NOT_HUGETLB, pages=1, rows=("ZP-14",))
def test_zeropage_target_gone(ctx: Context) -> None:
    """UFFDIO_ZEROPAGE in a process that has exited, or runs another program now, says ESRCH and writes no output."""
    for by_exec in False, True:
        gone = orphaned(ctx.dst.range, MISSING, by_exec=by_exec)
        with gone as uffd, promise("ZP-14", "exec" if by_exec else "exit"), refuses(ESRCH, output=UNTOUCHED):
            uffd.zeropage(ctx.dst.range)


@uffd_case("zeropage-keeps-nobody-alive", mem=NOT_HUGETLB, pages=1, rows=("ZP-14",))
def test_zeropage_keeps_nobody_alive(ctx: Context) -> None:
    """Zeroes, mapped and refused, leave no hold on the memory of a process: it goes when the process exits."""
    with monitored(ctx.dst.range, MISSING, Channel.receive) as (child, uffd):
        uffd.zeropage(ctx.dst.range)
        with refuses(EEXIST):
            uffd.zeropage(ctx.dst.range)
        child.send()
        child.wait()
        with refuses(ESRCH, output=UNTOUCHED):
            uffd.zeropage(ctx.dst.range)
