# SPDX-License-Identifier: GPL-2.0-only
"""Minor faults and UFFDIO_CONTINUE: the page is in the page cache, only its page table entry is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from errno import EAGAIN, EEXIST, EFAULT, EINVAL, ENOENT, ESRCH
from signal import SIGSEGV

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ANON, CACHED, FILE_BACKED, HUGETLB, HUGETLB_PRIVATE, MINOR, MINOR_FAULTS, MISSING, PAGE_SIZE, SHMEM,
    SHMEM_PRIVATE, UNTOUCHED, Advice, Context, ContinueMode, Feature, KernelError, PagefaultFlag, Pagemap, Range,
    Skip, UffdError, advise, bad_ranges, cached, errno_name, expect, expect_errno, expect_failed, expect_mapped,
    faulting, held_up, mended, orphaned, peek, poke, promise, read_only, refuses, saw, touch_trapped, uapi,
    undisturbed, unmap, unread_event,
)  # fmt: skip

HOLE = PagefaultFlag(0)


@contextmanager
def faulting_pages(ctx: Context, *flags: PagefaultFlag) -> Iterator[None]:
    """Have a thread asleep on each page, the message of the first having the first of these flags, and so on."""
    with ExitStack() as stack:
        for page, flag in enumerate(flags):
            stack.enter_context(faulting(ctx.uffd, ctx.dst.page(page).start, flags=flag))
        yield


# ---- what it does --------------------------------------------------------------------------------------------------


@uffd_case("continue-maps", mem=FILE_BACKED, features=MINOR_FAULTS, pages=3, rows=("CT-01", "CT-02", "CT-18", "CT-24"))
def test_continue_maps(ctx: Context) -> None:
    """UFFDIO_CONTINUE maps that one page as the page cache holds it by then; filling the cache raised no fault."""
    flipped = replace(ctx.dst.pattern, flipped=True)
    page = ctx.dst.page(1)
    with cached(ctx) as where:
        with promise("CT-24"):
            ctx.uffd.expect_no_message()
        with promise("CT-01"), faulting(ctx.uffd, page.start, flags=CACHED) as waiter:
            flipped.fill(where.start, 1, 1)
            ctx.uffd.continue_(page)
        with promise("CT-18"):
            Pagemap.expect_present(ctx.dst, 1)
        with promise("CT-02"):
            expect(waiter.result(), peek(page.start), "what the thread read")
            flipped.verify(ctx.dst.start, 1, 1)
            flipped.verify(where.start, 1, 1)
    ctx.uffd.expect_no_message()


@uffd_case("continue-flags", mem=FILE_BACKED, features=MINOR_FAULTS, pages=2, rows=("CT-01", "CT-03"))
def test_continue_flags(ctx: Context) -> None:
    """A read of a cached page is announced with MINOR alone, a write with MINOR and WRITE."""
    first, second = ctx.dst.page(0), ctx.dst.page(1)
    with cached(ctx) as where:
        with promise("CT-01"), faulting(ctx.uffd, first.start, flags=CACHED):
            ctx.uffd.continue_(first)
        same = peek(where.start + ctx.page_size)
        write = CACHED | PagefaultFlag.WRITE
        with promise("CT-03"), faulting(ctx.uffd, second.start, call=lambda: poke(second.start, same), flags=write):
            ctx.uffd.continue_(second)
        expect_mapped(ctx, 0, 1)
    ctx.uffd.expect_no_message()


@uffd_case("continue-wakes", mem=FILE_BACKED, features=MINOR_FAULTS, pages=4, rows=("CT-01",))
def test_continue_wakes(ctx: Context) -> None:
    """UFFDIO_CONTINUE wakes who waits for one of its pages, and nobody on the pages beside them."""
    with cached(ctx), faulting_pages(ctx, CACHED, CACHED, CACHED, CACHED):
        ctx.uffd.continue_(ctx.dst.page(1, 2))
        ctx.uffd.expect_still_asleep(2)
        expect_mapped(ctx, 1, 2)
        for page, asleep in ((0, 1), (3, 0)):
            ctx.uffd.continue_(ctx.dst.page(page))
            ctx.uffd.expect_still_asleep(asleep)


@uffd_case("continue-dontwake", mem=FILE_BACKED, features=MINOR_FAULTS, pages=2, rows=("CT-04", "CT-11"))
def test_continue_dontwake(ctx: Context) -> None:
    """With DONTWAKE the page is there and its thread sleeps on, through an UFFDIO_CONTINUE that finds it there too."""
    page = ctx.dst.page(0)
    with cached(ctx), faulting(ctx.uffd, page.start, flags=CACHED):
        ctx.uffd.continue_(page, ContinueMode.DONTWAKE)
        with promise("CT-11"):
            ctx.uffd.expect_still_asleep(1)
            expect_mapped(ctx, 0)
        with promise("CT-04"), refuses(EEXIST):
            ctx.uffd.continue_(page)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(page)
    expect_mapped(ctx, 0)
    ctx.uffd.expect_no_message()


@uffd_case("continue-eexist", mem=FILE_BACKED, features=MINOR_FAULTS, pages=3, rows=("CT-04",), bugs=(13,))
def test_continue_eexist(ctx: Context) -> None:
    """UFFDIO_CONTINUE refuses a page that is mapped already, be it from the page cache or a private copy."""
    with ctx.dst.file_view() as where:
        ctx.dst.pattern.fill(where.start, 0, 3)
        peek(ctx.dst.start)
        poke(ctx.dst.page(1).start, b"own")
        ctx.uffd.register(ctx.dst.range, MINOR)
        for page, how in enumerate(("read before registration", "written before registration")):
            with promise("CT-04", how), refuses(EEXIST):
                ctx.uffd.continue_(ctx.dst.page(page))
    expect(peek(ctx.dst.page(1).start, 3), b"own", "what was written")
    ctx.dst.expect_pattern_of(ctx.dst, 0, 1)


@uffd_case("continue-hole", mem=FILE_BACKED, features=MINOR_FAULTS, pages=2, rows=("CT-05", "CT-16"))
def test_continue_hole(ctx: Context) -> None:
    """UFFDIO_CONTINUE refuses a page that is not in the page cache, fills no hole, and wakes nobody."""
    hole = ctx.dst.page(1)
    with cached(ctx, 0, mode=MISSING | MINOR), faulting(ctx.uffd, hole.start):
        blocks = os.fstat(ctx.dst.fd or -1).st_blocks
        with promise("CT-05, CT-16"), refuses(EFAULT):
            ctx.uffd.continue_(hole)
        ctx.uffd.expect_still_asleep(1)
        expect(os.fstat(ctx.dst.fd or -1).st_blocks, blocks, "blocks of the file")
        ctx.uffd.copy(hole.start, ctx.src.start, hole.len)


@uffd_case("continue-partial", mem=FILE_BACKED, features=MINOR_FAULTS, pages=4, rows=("CT-06",))
def test_continue_partial(ctx: Context) -> None:
    """UFFDIO_CONTINUE stops at a page that it cannot map, says how far it came, and wakes the threads up to there."""
    with cached(ctx, 0, 1, 3, mode=MISSING | MINOR), faulting_pages(ctx, CACHED, CACHED, HOLE, CACHED):
        with promise("CT-06", "hole"), refuses(EAGAIN, output=ctx.page_size):
            ctx.uffd.continue_(ctx.dst.page(1, 3))
        ctx.uffd.expect_still_asleep(3)
        expect_mapped(ctx, 1)
        with promise("CT-06", "mapped page"), refuses(EAGAIN, output=ctx.page_size):
            ctx.uffd.continue_(ctx.dst.page(0, 2))
        ctx.uffd.expect_still_asleep(2)
        ctx.uffd.copy(ctx.dst.page(2).start, ctx.src.start, ctx.page_size)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.continue_(ctx.dst.page(3))


@uffd_case("continue-missing-and-minor", mem=FILE_BACKED, features=MINOR_FAULTS, pages=2, rows=("CT-15",))
def test_continue_missing_and_minor(ctx: Context) -> None:
    """A range registered for both reports a cached page as minor and a hole as missing."""
    ctx.src.fill()
    with cached(ctx, 0, mode=MISSING | MINOR):
        with promise("CT-15", "cached page"), faulting(ctx.uffd, ctx.dst.start, flags=CACHED):
            ctx.uffd.continue_(ctx.dst.page(0))
        with promise("CT-15", "hole"), faulting(ctx.uffd, ctx.dst.page(1).start, flags=HOLE):
            ctx.uffd.copy(ctx.dst.page(1).start, ctx.src.page(1).start, ctx.page_size)
    ctx.dst.expect_pattern_of(ctx.src)
    ctx.uffd.expect_no_message()


@uffd_case("continue-not-copy", mem=(SHMEM, HUGETLB), features=MINOR_FAULTS, pages=2, rows=("CT-16",), kind=Kind.DETAIL)
def test_continue_not_copy(ctx: Context) -> None:
    """A minor fault of shared memory cannot be answered with other contents: the page cache has the page."""
    page = ctx.dst.page(0)
    with cached(ctx, mode=MISSING | MINOR), faulting(ctx.uffd, page.start, flags=CACHED):
        with promise("CT-16", "UFFDIO_COPY"), refuses(EEXIST):
            ctx.uffd.copy(page.start, ctx.src.start, page.len)
        with promise("CT-16", "UFFDIO_ZEROPAGE"), refuses(EINVAL if ctx.mem.hugetlb else EEXIST):
            ctx.uffd.zeropage(page)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.continue_(page)
    expect_mapped(ctx, 0)


@uffd_case("continue-minor-hole", mem=FILE_BACKED, features=MINOR_FAULTS, pages=2, rows=("CT-17",), kind=Kind.DETAIL)
def test_continue_minor_hole(ctx: Context) -> None:
    """In a range registered for minor faults only, a hole becomes a zero page without a message."""
    ctx.uffd.register(ctx.dst.range, MINOR)
    with promise("CT-17", "read"):
        expect(undisturbed(ctx.uffd, lambda: peek(ctx.dst.start, ctx.page_size)), bytes(ctx.page_size), "the page")
    with promise("CT-17", "write"):
        undisturbed(ctx.uffd, lambda: poke(ctx.dst.page(1).start, b"own"))
    expect(peek(ctx.dst.page(1).start, 4), b"own\0", "what was written")


# ---- what it refuses -----------------------------------------------------------------------------------------------


@uffd_case("continue-errors", mem=FILE_BACKED, features=MINOR_FAULTS, pages=2, rows=("CT-07",))
def test_continue_errors(ctx: Context) -> None:
    """UFFDIO_CONTINUE refuses ranges that are not whole pages, unknown modes, and an argument it cannot read."""
    with cached(ctx):
        for what, bad in bad_ranges(ctx.dst.page(0)).items():
            with promise("CT-07", what), refuses(EINVAL, output=UNTOUCHED):
                ctx.uffd.continue_(bad)
        for bit in range(2, 64):
            with promise("CT-07", f"mode bit {bit}"), refuses(EINVAL, output=UNTOUCHED):
                ctx.uffd.continue_(ctx.dst.page(0), ContinueMode(1 << bit))
        with promise("CT-07", "argument NULL"), refuses(EFAULT):
            ctx.uffd.raw_ioctl(uapi.UFFDIO_CONTINUE, 0)
        Pagemap.expect_present(ctx.dst)


@uffd_case(
    "continue-output-read-only", mem=FILE_BACKED, features=MINOR_FAULTS, pages=2, rows=("CT-07",), kind=Kind.DETAIL
)
def test_continue_output_read_only(ctx: Context) -> None:
    """UFFDIO_CONTINUE that cannot write its result has mapped the page but woken nobody."""
    page = ctx.dst.page(0)
    arg = uapi.uffdio_continue(uapi.uffdio_range(page.start, page.len))
    with cached(ctx), faulting(ctx.uffd, page.start, flags=CACHED):
        with promise("CT-07", "mapped not writable"), read_only(bytes(arg)) as address, refuses(EFAULT):
            ctx.uffd.raw_ioctl(uapi.UFFDIO_CONTINUE, address)
        ctx.uffd.expect_still_asleep(1)
        expect_mapped(ctx, 0)
        ctx.uffd.wake(page)


@uffd_case("continue-elsewhere", mem=FILE_BACKED, features=MINOR_FAULTS, pages=4, rows=("CT-09",))
def test_continue_elsewhere(ctx: Context) -> None:
    """UFFDIO_CONTINUE wants its whole range in one registered mapping, else it maps nothing."""
    with ctx.dst.file_view() as where:
        ctx.dst.pattern.fill(where.start, 0, 4)
        with promise("CT-09", "not registered"), refuses(ENOENT):
            ctx.uffd.continue_(ctx.dst.page(0))
        ctx.uffd.register(ctx.dst.page(0, 2), MINOR)
        with promise("CT-09", "behind the registered pages"), refuses(ENOENT):
            ctx.uffd.continue_(ctx.dst.page(2))
        with promise("CT-09", "registered and not"), refuses(ENOENT):
            ctx.uffd.continue_(ctx.dst.page(1, 2))
        ctx.uffd.register(ctx.dst.page(2), MINOR | MISSING)
        with promise("CT-09", "two registered mappings"), refuses(ENOENT):
            ctx.uffd.continue_(ctx.dst.page(1, 2))
        unmap(ctx.dst.page(3))
        with promise("CT-09", "nothing mapped"), refuses(ENOENT):
            ctx.uffd.continue_(ctx.dst.page(3))
        Pagemap.expect_present(ctx.dst)
        ctx.uffd.continue_(ctx.dst.page(0, 2))


@uffd_case("continue-anon", mem=(ANON,), features=MINOR_FAULTS, pages=2, rows=("CT-09",))
def test_continue_anon(ctx: Context) -> None:
    """UFFDIO_CONTINUE refuses anonymous memory, which has no page cache."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start):
        with promise("CT-09", "anonymous memory"), refuses(EINVAL):
            ctx.uffd.continue_(ctx.dst.page(0))
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.zeropage(ctx.dst.page(0))


@uffd_case("continue-hugetlb-part", mem=(HUGETLB, HUGETLB_PRIVATE), features=MINOR_FAULTS, pages=2, rows=("CT-14",))
def test_continue_hugetlb_part(ctx: Context) -> None:
    """UFFDIO_CONTINUE takes whole huge pages only."""
    start, size = ctx.dst.start, ctx.page_size
    with cached(ctx, 0):
        for what, bad in {
            "a part": Range(start, PAGE_SIZE),
            "start inside": Range(start + PAGE_SIZE, size),
            "end inside": Range(start, size + PAGE_SIZE),
        }.items():
            with promise("CT-14", what), refuses(EINVAL):
                ctx.uffd.continue_(bad)
        Pagemap.expect_present(ctx.dst)
        with promise("CT-14", "hole"), refuses(EFAULT):
            ctx.uffd.continue_(ctx.dst.page(1))
        with promise("CT-14", "the whole page"):
            ctx.uffd.continue_(ctx.dst.page(0))
            expect_mapped(ctx, 0)


D_BEYOND_EOF = Defect(
    id="D-CT-08",
    summary="UFFDIO_CONTINUE of shmem beyond the end of the file says EINVAL, like to a bad argument",
    kernels="6.1.192, 6.12.117, 6.18.44; not 7.3.4",
    advice="Where the file may be truncated meanwhile, take EINVAL of UFFDIO_CONTINUE like EFAULT.",
    shows=r"expected EFAULT .*: EINVAL with mapped = -EINVAL",
)


def continue_beyond_eof(ctx: Context) -> None:
    """Truncate the file in front of page 1, which is registered, and continue there."""
    with cached(ctx):
        os.ftruncate(ctx.dst.fd or -1, ctx.page_size)
        ctx.uffd.continue_(ctx.dst.page(1))


@uffd_case(
    "continue-beyond-eof",
    mem=(SHMEM, SHMEM_PRIVATE),
    features=MINOR_FAULTS,
    pages=2,
    rows=("CT-08",),
    defect=D_BEYOND_EOF,
)
def test_continue_beyond_eof(ctx: Context) -> None:
    """UFFDIO_CONTINUE says EFAULT beyond the end of the file, where the page cache has no page."""
    with mended(ctx.uffd), promise("CT-08"), refuses(EFAULT):
        continue_beyond_eof(ctx)


@uffd_case(
    "continue-beyond-eof-refused",
    mem=FILE_BACKED,
    features=MINOR_FAULTS,
    pages=2,
    rows=("CT-08",),
    bugs=(13, 16),
    kind=Kind.DETAIL,
)
def test_continue_beyond_eof_refused(ctx: Context) -> None:
    """UFFDIO_CONTINUE beyond the end of the file is refused in any case, with EFAULT or, of shmem, EINVAL."""
    with promise("CT-08"):
        try:
            continue_beyond_eof(ctx)
        except UffdError as error:
            expect(error.output, -(error.errno or 0), "mapped")
            expect_errno(error, EFAULT if ctx.mem.hugetlb else (EFAULT, EINVAL), "errno")
        else:
            raise AssertionError("expected EFAULT or EINVAL; the call succeeded")
    Pagemap.expect_present(ctx.dst)


D_NOT_OFFERED = Defect(
    id="D-CT-12",
    summary="UFFDIO_CONTINUE works on a range registered for missing faults only, which did not offer it",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="Nothing breaks; do not rely on it.",
    shows=r"expected EINVAL; the call succeeded",
)


@uffd_case(
    "continue-not-offered", mem=FILE_BACKED, features=MINOR_FAULTS, pages=2, rows=("CT-12",), defect=D_NOT_OFFERED
)
def test_continue_not_offered(ctx: Context) -> None:
    """UFFDIO_CONTINUE is refused where UFFDIO_REGISTER did not offer it."""
    with cached(ctx, mode=MISSING), promise("CT-12"), refuses(EINVAL):
        ctx.uffd.continue_(ctx.dst.page(0))


@uffd_case("continue-missing-only", mem=FILE_BACKED, features=MINOR_FAULTS, pages=2, rows=("CT-12",), kind=Kind.DETAIL)
def test_continue_missing_only(ctx: Context) -> None:
    """Where it was not offered UFFDIO_CONTINUE is either refused or does all of its work."""
    with cached(ctx, mode=MISSING), promise("CT-12"):
        try:
            ctx.uffd.continue_(ctx.dst.page(0))
        except UffdError as error:
            expect_failed(error, EINVAL)
            Pagemap.expect_present(ctx.dst)
        else:
            expect_mapped(ctx, 0)


@uffd_case(
    "continue-unread-event", mem=FILE_BACKED, features=MINOR_FAULTS | Feature.EVENT_REMOVE, pages=2, rows=("CT-22",)
)
def test_continue_unread_event(ctx: Context) -> None:
    """Until an event is read UFFDIO_CONTINUE says EAGAIN, before it looks at anything else, and maps nothing."""
    page = ctx.dst.page(0)
    with cached(ctx):
        with promise("CT-22"), unread_event(ctx.uffd, ctx.dst.page(1)):
            for where in (page, Range(0, 0)):
                with held_up():
                    ctx.uffd.continue_(where)
            Pagemap.expect_present(ctx.dst)
        ctx.uffd.continue_(page)
        expect_mapped(ctx, 0)


@uffd_case("continue-orphaned", mem=FILE_BACKED, features=MINOR_FAULTS, pages=2, rows=("CT-22",))
def test_continue_orphaned(ctx: Context) -> None:
    """UFFDIO_CONTINUE says ESRCH when the address space is gone."""
    with orphaned(ctx.dst.range, MINOR) as uffd, promise("CT-22"), refuses(ESRCH, output=UNTOUCHED):
        uffd.continue_(ctx.dst.page(0))


@uffd_case(
    "continue-onto-guard", mem=(SHMEM,), features=MINOR_FAULTS, pages=3, rows=("CT-04", "CP-48"), kind=Kind.VERSION
)
def test_continue_onto_guard(ctx: Context) -> None:
    """A guard page holds against UFFDIO_CONTINUE, EEXIST, and the pages beside it can be mapped.

    Older kernels may overwrite it; those that offer UFFD_FEATURE_RWP must not.
    """
    with cached(ctx), promise("CT-04"):
        try:
            advise(ctx.dst.page(1), Advice.GUARD_INSTALL)
        except KernelError as error:
            raise Skip(f"MADV_GUARD_INSTALL: {errno_name(error.errno or 0)} (Linux 6.15)") from None
        try:
            ctx.uffd.continue_(ctx.dst.page(1))
        except UffdError as error:
            expect_failed(error, EEXIST)
            saw("EEXIST")
            (trap,) = touch_trapped(ctx.dst.page(1), ctx.page_size)
            expect(trap and trap.signo, SIGSEGV, "the signal of an access to the guard page")
            kept: tuple[int, ...] = (0, 2)
        else:
            expect(Feature.RWP in ctx.uffd.offered, False, "success on a kernel with UFFD_FEATURE_RWP, as of Linux 7.3")
            saw("success, the guard page is overwritten")
            kept = (0, 1, 2)
        for page in (0, 2):
            ctx.uffd.continue_(ctx.dst.page(page))
        expect_mapped(ctx, *kept)
