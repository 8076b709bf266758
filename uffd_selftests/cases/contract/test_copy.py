# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_COPY: what it fills, what it refuses, how far it gets, whom it wakes."""

from __future__ import annotations

from contextlib import ExitStack
from errno import EAGAIN, EEXIST, EFAULT, EINVAL, ENOENT
from signal import SIGSEGV

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, MAP_ANONYMOUS, MAP_PRIVATE, MISSING, PAGE_SIZE, PROT_NONE, PROT_READ, PROT_WRITE, UNTOUCHED, WP, WRITE,
    WRITEPROTECT, Context, CopyMode, Feature, PagefaultFlag, Pagemap, Range, UffdError, bad_ranges, copy, expect,
    expect_failed, expect_same, expect_trapped, faulting, faulting_pages, lowest_start, map_memory, peek, poke, prepare,
    promise, protect, read_only, refuses, touch, touch_trapped, uapi, undisturbed, unmap, user_space_end,
)  # fmt: skip


# ---- what it does --------------------------------------------------------------------------------------------------


@uffd_case("copy-pages", mem=ALL, pages=4, rows=("CP-01", "CP-27"), bugs=(47,))
def test_copy_pages(ctx: Context) -> None:
    """UFFDIO_COPY fills its pages with the bytes of the source and wakes the threads that wait there, no others."""
    prepare(ctx)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1, 2, 3) as waiters:
        for first, count, asleep, present in (1, 1, 3, (1,)), (2, 2, 1, (1, 2, 3)), (0, 1, 0, (0, 1, 2, 3)):
            with promise("CP-01", f"{count} page(s) from page {first} on"):
                copy(ctx, first, count)
                ctx.uffd.expect_still_asleep(asleep)
                Pagemap.expect_present(ctx.dst, *present)
                ctx.dst.expect_pattern_of(ctx.src, first, count)
                for page in range(first, first + count):
                    expect(waiters[page].result(), peek(ctx.src.page(page).start), f"what thread {page} has read")


@uffd_case("copy-whole-area", mem=ALL, pages=3, rows=("CP-01",))
def test_copy_whole_area(ctx: Context) -> None:
    """One UFFDIO_COPY can fill a mapping from its first page to its last; writes go on without a further message."""
    prepare(ctx)
    copy(ctx, 0, 3)
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_pattern_of(ctx.src, write_back=True))


@uffd_case("copy-struct", mem=(ANON,), pages=2, rows=("CP-01",))
def test_copy_struct(ctx: Context) -> None:
    """UFFDIO_COPY writes the output field of its argument and nothing else, whether it succeeds or fails."""
    prepare(ctx)
    arg = uapi.uffdio_copy(ctx.dst.start, ctx.src.start, ctx.page_size, CopyMode.DONTWAKE)
    before = bytes(arg)[:-8]
    ctx.uffd.ioctl(uapi.UFFDIO_COPY, arg, "UFFDIO_COPY", "copy")
    expect((bytes(arg)[:-8], arg.copy), (before, ctx.page_size), "the argument after success")
    with refuses(EEXIST):
        ctx.uffd.ioctl(uapi.UFFDIO_COPY, arg, "UFFDIO_COPY", "copy")
    expect(bytes(arg)[:-8], before, "the argument after EEXIST")


@uffd_case("copy-unaligned-source", mem=ALL, pages=3, rows=("CP-03", "CP-27"), kind=Kind.DETAIL)
def test_copy_unaligned_source(ctx: Context) -> None:
    """The source of UFFDIO_COPY may start at any byte."""
    prepare(ctx)
    for page, offset in enumerate((1, ctx.page_size - 1)):
        with promise("CP-03", f"source at byte {offset} of a page"):
            source = ctx.src.start + offset
            ctx.uffd.copy(ctx.dst.page(page).start, source, ctx.page_size)
            expect_same(source, ctx.dst.page(page).start, ctx.page_size, "the page copied")


@uffd_case("copy-dontwake", mem=ALL, pages=3, rows=("CP-13", "CP-11"))
def test_copy_dontwake(ctx: Context) -> None:
    """With DONTWAKE the page is filled, and nobody wakes before UFFDIO_WAKE, not even when the copy stops early."""
    prepare(ctx)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1):
        with promise("CP-13"):
            copy(ctx, 1, mode=CopyMode.DONTWAKE)
            ctx.uffd.expect_still_asleep(2)
        with promise("CP-11", "with DONTWAKE"), refuses(EAGAIN, output=ctx.page_size):
            copy(ctx, 0, 3, CopyMode.DONTWAKE)
        ctx.uffd.expect_still_asleep(2)
        ctx.dst.expect_pattern_of(ctx.src, 0, 2)
        Pagemap.expect_present(ctx.dst, 0, 1)
        ctx.uffd.wake(ctx.dst.range)
    ctx.uffd.expect_no_message()


@uffd_case("copy-dontwake-unread", mem=ALL, pages=2, rows=("CP-13", "CP-42"))
def test_copy_dontwake_unread(ctx: Context) -> None:
    """With DONTWAKE a message that nobody has read stays to be read, though its page is there."""
    prepare(ctx)
    page = ctx.dst.page(0)
    with faulting(ctx.uffd, page.start, read=False):
        copy(ctx, 0, mode=CopyMode.DONTWAKE)
        expect((ctx.uffd.fdinfo.pending, ctx.uffd.fdinfo.total), (1, 1), "pending and total of fdinfo")
        ctx.uffd.wait_fault(page.start)
        ctx.uffd.wake(page)
    ctx.uffd.expect_no_message()


@uffd_case("copy-unread", mem=ALL, pages=2, rows=("CP-42",))
def test_copy_unread(ctx: Context) -> None:
    """UFFDIO_COPY takes away the message of a fault that it resolves before anybody has read it."""
    prepare(ctx)
    with faulting(ctx.uffd, ctx.dst.start, read=False):
        copy(ctx, 0)
        expect(ctx.uffd.readable(), False, "POLLIN after the copy")
        ctx.uffd.expect_no_message()
        expect((ctx.uffd.fdinfo.pending, ctx.uffd.fdinfo.total), (0, 0), "pending and total of fdinfo")


@uffd_case("copy-eight-threads", mem=ALL, pages=1, rows=("CP-41",))
def test_copy_eight_threads(ctx: Context) -> None:
    """Each of eight threads that touch one missing page gets a message of its own, and one copy wakes them all."""
    prepare(ctx)
    with ExitStack() as stack:
        waiters = [stack.enter_context(faulting(ctx.uffd, ctx.dst.start + 8 * i)) for i in range(8)]
        ctx.uffd.expect_still_asleep(8)
        copy(ctx, 0)
        ctx.uffd.expect_asleep(0)
        for i, waiter in enumerate(waiters):
            expect(waiter.result(), peek(ctx.src.start + 8 * i), f"what thread {i} has read")
    ctx.uffd.expect_no_message()


# ---- what it refuses -----------------------------------------------------------------------------------------------


@uffd_case("copy-bad-range", mem=ALL, pages=2, rows=("CP-02", "CP-06"))
def test_copy_bad_range(ctx: Context) -> None:
    """UFFDIO_COPY takes whole pages at a page's start, in user space; else EINVAL, and it touches nothing."""
    prepare(ctx)
    page = ctx.dst.page(0)
    with faulting(ctx.uffd, page.start):
        for what, bad in {**bad_ranges(page), "dst leaves user space": Range(page.start, 1 << 62)}.items():
            with promise("CP-02 CP-06", what), refuses(EINVAL, output=UNTOUCHED):
                ctx.uffd.copy(bad.start, ctx.src.start, bad.len)
        end = user_space_end() or 1 << 63
        with promise("CP-02 CP-06", "dst reaches beyond user space"), refuses(EINVAL, output=UNTOUCHED):
            ctx.uffd.copy(end - 2 * page.len, ctx.src.start, 4 * page.len)
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_present(ctx.dst)
        copy(ctx, 0)


@uffd_case("copy-bad-source-range", mem=(ANON,), pages=2, rows=("CP-06",))
def test_copy_bad_source_range(ctx: Context) -> None:
    """UFFDIO_COPY refuses a source whose end wraps; since POISON one anywhere beyond user space as a bad range too."""
    prepare(ctx)
    page = ctx.dst.page(0)
    with promise("CP-06", "src + len wraps"), refuses(EINVAL, output=UNTOUCHED):
        ctx.uffd.copy(page.start, (1 << 64) - PAGE_SIZE, page.len)
    checked = Feature.POISON in ctx.uffd.offered  # Linux 6.6; before, the source was looked at when it was read
    end = user_space_end() or 1 << 63
    for what, source in ("beyond user space", 1 << 63), ("at its end", end), ("across its end", end - PAGE_SIZE + 1):
        with promise("CP-06", f"src {what}"), refuses(EINVAL, output=UNTOUCHED) if checked else refuses(EFAULT):
            ctx.uffd.copy(page.start, source, page.len)
    if checked:
        with promise("CP-06", "src reaches beyond its end"), refuses(EINVAL, output=UNTOUCHED):
            ctx.uffd.copy(page.start, end - 2 * PAGE_SIZE, 4 * PAGE_SIZE)
    if end < 1 << 63:
        with promise("CP-06", "src ends with user space"), refuses(EFAULT):
            ctx.uffd.copy(page.start, end - PAGE_SIZE, page.len)
    Pagemap.expect_present(ctx.dst)


@uffd_case("copy-mode-bits", mem=(ANON,), pages=2, rows=("CP-04",))
def test_copy_mode_bits(ctx: Context) -> None:
    """UFFDIO_COPY knows two mode bits and refuses every other one, alone and together with a good one."""
    prepare(ctx)
    with faulting(ctx.uffd, ctx.dst.start):
        for bit in range(2, 64):
            for mode in CopyMode(1 << bit), CopyMode(1 << bit | 1):
                with promise("CP-04", f"mode {int(mode):#x}"), refuses(EINVAL, output=UNTOUCHED):
                    copy(ctx, 0, mode=mode)
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_present(ctx.dst)
        copy(ctx, 0)


@uffd_case("copy-wp-unregistered", mem=ALL, pages=2, rows=("CP-05",))
def test_copy_wp_unregistered(ctx: Context) -> None:
    """UFFDIO_COPY cannot protect a page of a range that is not registered for write protection."""
    prepare(ctx)
    with faulting(ctx.uffd, ctx.dst.start):
        for mode in CopyMode.WP, CopyMode.WP | CopyMode.DONTWAKE:
            with promise("CP-05", str(mode)), refuses(EINVAL):
                copy(ctx, 0, mode=mode)
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_present(ctx.dst)
        copy(ctx, 0)


def expect_null_refused(ctx: Context) -> None:
    """Assert what UFFDIO_COPY from address 0 says: EFAULT, or EINVAL where no range may begin there."""
    try:
        ctx.uffd.copy(ctx.dst.start, 0, ctx.page_size)
    except UffdError as error:
        if not ((error.errno, error.output) == (EINVAL, UNTOUCHED) and lowest_start()):
            expect_failed(error, EFAULT)
    else:
        raise AssertionError("expected EFAULT; the call succeeded")


@uffd_case("copy-bad-source", mem=ALL, pages=3, spare_hugepages=1, rows=("CP-07",), kind=Kind.DETAIL)
def test_copy_bad_source(ctx: Context) -> None:
    """UFFDIO_COPY answers a source that cannot be read with EFAULT; the page stays missing and nobody wakes.

    Some kernels before 2026 refuse one below vm.mmap_min_addr with EINVAL before they look at it.
    """
    prepare(ctx)
    unmap(ctx.src.page(1))
    protect(ctx.src.page(2), PROT_NONE)
    with faulting(ctx.uffd, ctx.dst.start):
        with promise("CP-07", "source NULL"):
            expect_null_refused(ctx)
        for what, source in ("unmapped", ctx.src.page(1).start), ("PROT_NONE", ctx.src.page(2).start):
            with promise("CP-07", f"source {what}"), refuses(EFAULT):
                ctx.uffd.copy(ctx.dst.start, source, ctx.page_size)
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_present(ctx.dst)
        copy(ctx, 0)
    ctx.dst.expect_pattern_of(ctx.src, 0, 1)


@uffd_case("copy-partial-source", mem=ALL, pages=3, spare_hugepages=1, rows=("CP-12",))
def test_copy_partial_source(ctx: Context) -> None:
    """A source that ends midway stops UFFDIO_COPY with EAGAIN after the pages done, whose threads alone wake."""
    prepare(ctx)
    protect(ctx.src.page(1), PROT_NONE)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1) as waiters:
        with refuses(EAGAIN, output=ctx.page_size):
            copy(ctx, 0, 3)
        waiters[0].result()
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_present(ctx.dst, 0)
        protect(ctx.src.page(1), PROT_READ)
        copy(ctx, 1)
    ctx.dst.expect_pattern_of(ctx.src, 0, 2)


@uffd_case("copy-nowhere", mem=ALL, pages=3, rows=("CP-08",))
def test_copy_nowhere(ctx: Context) -> None:
    """UFFDIO_COPY finds no entry where nothing is registered, not any more, or nothing is mapped."""
    ctx.src.fill()
    with promise("CP-08", "never registered"), refuses(ENOENT):
        copy(ctx, 0)
    ctx.uffd.register(ctx.dst.page(1, 2), MISSING)
    with promise("CP-08", "before a registered range"), refuses(ENOENT):
        copy(ctx, 0)
    ctx.uffd.unregister(ctx.dst.page(1))
    with promise("CP-08", "unregistered"), refuses(ENOENT):
        copy(ctx, 1)
    unmap(ctx.dst.page(2))
    with promise("CP-08", "unmapped"), refuses(ENOENT):
        copy(ctx, 2)
    ctx.dst.expect_zero(0, 2)


@uffd_case("copy-beyond-mapping", mem=ALL, pages=4, rows=("CP-09",), kind=Kind.DETAIL)
def test_copy_beyond_mapping(ctx: Context) -> None:
    """UFFDIO_COPY fills one mapping a call: nothing when the range leaves it, be it for another registered one."""
    prepare(ctx)
    protect(ctx.dst.page(2, 2), PROT_READ)
    for what, first in ("starts before", -1), ("over two registered mappings", 1), ("ends behind", 3):
        with promise("CP-09", what), refuses(ENOENT):
            ctx.uffd.copy(ctx.dst.page(first).start, ctx.src.start, 2 * ctx.page_size)
    Pagemap.expect_present(ctx.dst)
    copy(ctx, 0, 2)
    copy(ctx, 2, 2)
    ctx.dst.expect_pattern_of(ctx.src)


@uffd_case("copy-eexist", mem=ALL, pages=3, rows=("CP-10", "CP-27"))
def test_copy_eexist(ctx: Context) -> None:
    """UFFDIO_COPY leaves a page alone that is there, copied or written before, and whoever still sleeps on it."""
    ctx.dst.fill(1, 1)
    prepare(ctx)
    with faulting(ctx.uffd, ctx.dst.start):
        copy(ctx, 0, mode=CopyMode.DONTWAKE)
        for page in 0, 1:
            with promise("CP-10", f"page {page}"), refuses(EEXIST):
                ctx.uffd.copy(ctx.dst.page(page).start, ctx.src.page(2).start, ctx.page_size)
        ctx.uffd.expect_still_asleep(1)
        ctx.dst.expect_pattern_of(ctx.src, 0, 2)
        ctx.uffd.wake(ctx.dst.page(0))


@uffd_case("copy-partial", mem=ALL, pages=4, rows=("CP-11",))
def test_copy_partial(ctx: Context) -> None:
    """UFFDIO_COPY stops at a page that is there: EAGAIN counts the bytes done; threads behind them sleep on."""
    ctx.dst.fill(2, 1)
    prepare(ctx)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1, 3) as waiters:
        with refuses(EAGAIN, output=2 * ctx.page_size):
            copy(ctx, 0, 4)
        for waiter in waiters[:2]:
            waiter.result()
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_present(ctx.dst, 0, 1, 2)
        copy(ctx, 3)
    ctx.dst.expect_pattern_of(ctx.src)


@uffd_case("copy-argument-fault", mem=(ANON,), pages=2, rows=("CP-18", "CP-17"))
def test_copy_argument_fault(ctx: Context) -> None:
    """UFFDIO_COPY answers an argument that it cannot read with EFAULT, and has done nothing."""
    prepare(ctx)
    length = 2 * PAGE_SIZE
    with promise("CP-18", "NULL"), refuses(EFAULT):
        ctx.uffd.raw_ioctl(uapi.UFFDIO_COPY, 0)
    with promise("CP-18", "the second half of the input beyond the end of a mapping"), refuses(EFAULT):
        pages = Range(map_memory(length, flags=MAP_PRIVATE | MAP_ANONYMOUS), length)
        protect(Range(pages.start + PAGE_SIZE, PAGE_SIZE), PROT_NONE)
        poke(pages.start + PAGE_SIZE - 16, bytes(uapi.uffdio_copy(ctx.dst.start, ctx.src.start, ctx.page_size))[:16])
        ctx.uffd.raw_ioctl(uapi.UFFDIO_COPY, pages.start + PAGE_SIZE - 16)
    Pagemap.expect_present(ctx.dst)
    unmap(pages)


@uffd_case("copy-output-fault", mem=ALL, pages=2, rows=("CP-17",), kind=Kind.DETAIL)
def test_copy_output_fault(ctx: Context) -> None:
    """When UFFDIO_COPY cannot write its output field, the page is filled all the same, but nobody wakes: EFAULT."""
    prepare(ctx)
    arg = bytes(uapi.uffdio_copy(ctx.dst.start, ctx.src.start, ctx.page_size, 0, UNTOUCHED))
    with faulting(ctx.uffd, ctx.dst.start), read_only(arg) as address:
        with refuses(EFAULT):
            ctx.uffd.raw_ioctl(uapi.UFFDIO_COPY, address)
        ctx.uffd.expect_still_asleep(1)
        expect(peek(address, len(arg)), arg, "the argument")
        ctx.dst.expect_pattern_of(ctx.src, 0, 1)
        ctx.uffd.wake(ctx.dst.page(0))


@uffd_case("copy-protected-mapping", mem=ALL, pages=2, rows=("CP-19",), kind=Kind.DETAIL)
def test_copy_protected_mapping(ctx: Context) -> None:
    """UFFDIO_COPY fills a page that the process may only read, or not even that, and gives it no more rights."""
    for page, prot in enumerate((PROT_READ, PROT_NONE)):
        protect(ctx.dst.page(page), prot)
    prepare(ctx)
    for page, when in enumerate(("PROT_READ", "PROT_NONE")):
        with promise("CP-19", when):
            copy(ctx, page)
            (trap,) = touch_trapped(ctx.dst.page(page), ctx.page_size, write=True)
            expect(trap and trap.signo, SIGSEGV, "the signal that a write gets")
    with promise("CP-19", "made writable"):
        protect(ctx.dst.range, PROT_READ | PROT_WRITE)
        undisturbed(ctx.uffd, lambda: ctx.dst.expect_pattern_of(ctx.src, write_back=True))


# ---- write protection ----------------------------------------------------------------------------------------------


@uffd_case("copy-wp", mem=ALL, features=WRITEPROTECT, pages=3, rows=("CP-35",))
def test_copy_wp(ctx: Context) -> None:
    """With MODE_WP the pages can be read, and the first write to each waits until its protection is dropped."""
    prepare(ctx, MISSING | WP)
    copy(ctx, 0, 2, CopyMode.WP)
    copy(ctx, 2)
    Pagemap.expect_protected(ctx.dst, (0, 1), "after a copy of two pages with MODE_WP and one without")
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_pattern_of(ctx.src))
    undisturbed(ctx.uffd, lambda: touch(ctx.dst.page(2), ctx.page_size, write=True))
    for page in 1, 0:
        with faulting(ctx.uffd, ctx.dst.page(page).start, write=True, flags=WRITE | PagefaultFlag.WP):
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.unprotect(ctx.dst.page(page))
    ctx.dst.expect_pattern_of(ctx.src)


@uffd_case(
    "copy-wp-mixed-source",
    mem=ALL,
    features=WRITEPROTECT,
    pages=4,
    spare_hugepages=1,
    rows=("CP-35", "CP-30"),
    kind=Kind.DETAIL,
)
def test_copy_wp_mixed_source(ctx: Context) -> None:
    """MODE_WP protects every page, also one whose source had to be faulted first, and those behind it."""
    for page in 0, 2:
        ctx.src.fill(page, 1)
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.dst.range.len, CopyMode.WP)
    Pagemap.expect_protected(ctx.dst, (0, 1, 2, 3), "after a copy with MODE_WP")
    undisturbed(ctx.uffd, lambda: expect_same(ctx.src.start, ctx.dst.start, ctx.dst.range.len, "the pages copied"))
    ctx.dst.expect_zero(1, 1)
    expect_trapped(ctx.uffd, ctx.dst, 0, 1, 2, 3)


@uffd_case("copy-wp-read-only", mem=ALL, features=WRITEPROTECT, pages=1, rows=("CP-35",), kind=Kind.DETAIL)
def test_copy_wp_read_only(ctx: Context) -> None:
    """MODE_WP protects in a read-only mapping too: when mprotect(2) makes it writable, the first write waits."""
    protect(ctx.dst.range, PROT_READ)
    prepare(ctx, MISSING | WP)
    copy(ctx, 0, 1, CopyMode.WP)
    Pagemap.expect_protected(ctx.dst, (0,), "after a copy with MODE_WP into a read-only mapping")
    protect(ctx.dst.range, PROT_READ | PROT_WRITE)
    with faulting(ctx.uffd, ctx.dst.start, write=True, flags=WRITE | PagefaultFlag.WP):
        ctx.uffd.unprotect(ctx.dst.range)
    ctx.dst.expect_pattern_of(ctx.src)


@uffd_case("copy-wp-wakes", mem=ALL, features=WRITEPROTECT, pages=2, rows=("CP-35", "CP-13"))
def test_copy_wp_wakes(ctx: Context) -> None:
    """MODE_WP wakes readers like any copy; a thread that wanted to write faults again, for the protection now."""
    prepare(ctx, MISSING | WP)
    start, first_byte = ctx.dst.start, peek(ctx.src.start)
    with faulting(ctx.uffd, start), faulting(ctx.uffd, start, call=lambda: poke(start, first_byte), flags=WRITE):
        copy(ctx, 0, mode=CopyMode.WP | CopyMode.DONTWAKE)
        ctx.uffd.expect_still_asleep(2)
        ctx.uffd.wake(ctx.dst.page(0))
        ctx.uffd.wait_fault(start, WRITE | PagefaultFlag.WP)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.unprotect(ctx.dst.page(0))
    ctx.uffd.expect_no_message()


@uffd_case("copy-wp-only", mem=ALL, features=WRITEPROTECT, pages=2, rows=("CP-36",), kind=Kind.DETAIL)
def test_copy_wp_only(ctx: Context) -> None:
    """UFFDIO_COPY fills a range that is registered for write protection alone, protected or not."""
    prepare(ctx, WP)
    copy(ctx, 0)
    copy(ctx, 1, mode=CopyMode.WP)
    Pagemap.expect_protected(ctx.dst, (1,), "after copies without and with MODE_WP")
    undisturbed(ctx.uffd, lambda: touch(ctx.dst.page(0), ctx.page_size, write=True))
    ctx.dst.expect_pattern_of(ctx.src)


@uffd_case(
    "copy-wp-marker",
    mem=ALL,
    features=WRITEPROTECT | Feature.WP_UNPOPULATED,
    pages=2,
    rows=("CP-37", "CP-38"),
    kind=Kind.DETAIL,
)
def test_copy_wp_marker(ctx: Context) -> None:
    """A copy replaces the protection of a page that was missing by its own: none, unless MODE_WP is given."""
    prepare(ctx, MISSING | WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    with promise("CP-37"):
        copy(ctx, 0)
        Pagemap.expect_protected(ctx.dst, (1,), "after a copy without MODE_WP")
        undisturbed(ctx.uffd, lambda: touch(ctx.dst.page(0), ctx.page_size, write=True))
    with promise("CP-38"):
        copy(ctx, 1, mode=CopyMode.WP)
        Pagemap.expect_protected(ctx.dst, (1,), "after a copy with MODE_WP")
    ctx.dst.expect_pattern_of(ctx.src)
