# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_MOVE: a page changes its place without being copied; which pages do not, and what it refuses."""

from __future__ import annotations

import ctypes
import os
from errno import EAGAIN, EBUSY, EEXIST, EFAULT, EINVAL
from functools import partial
from pathlib import Path
from signal import SIGBUS, SIGSEGV

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ANON, HOLES, MISSING, MOVE, PM_PFN_MASK, PM_SOFT_DIRTY, UNTOUCHED, WP, AccessError, Advice, Channel, Child, Context,
    Feature, KernelError, MoveMode, Pagemap, Range, Skip, Uffd, advise, bad_ranges, errno_name, expect, expect_moved,
    faulting, faulting_pages, fixed_buffer, held_up, move, orphaned, peek, poke, prepare, promise, read_only, refuses,
    require_soft_dirty, syscalls, uapi, undisturbed, unread_event, user_space_end,
)  # fmt: skip


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
