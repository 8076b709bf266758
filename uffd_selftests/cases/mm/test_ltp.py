# SPDX-License-Identifier: GPL-2.0-only
"""LTP's userfaultfd01 to 07, by their names there: a fault is resolved, and the handle closed in the same breath.

What each request does is checked one by one in contract/; here the close comes before the thread runs again. It may
then find nothing but what it waited for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from signal import SIGBUS

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, ANON, MINOR, MISSING, NOT_HUGETLB, PROT_READ, SHMEM, SHMEM_PRIVATE, UNREGISTERED, USER_MODE_ONLY, WP,
    WRITEPROTECT, Advice, Context, Fault, Feature, PagefaultFlag, Pagemap, Uffd, Waiter, advise, expect, expect_modes,
    faulting, peek, poke, protect, touch_trapped,
)  # fmt: skip

OFFSET = 0xF
"""Of the byte in page 1 that is accessed."""


@contextmanager
def closed_at_once(ctx: Context, uffd: Uffd) -> Iterator[Waiter]:
    """Have a thread read a byte of page 1 and sleep in the fault, which the block resolves; then close the handle."""
    address = ctx.dst.page(1).start + OFFSET
    with faulting(uffd, address) as waiter:
        yield waiter
        uffd.close()
    expect(waiter.result(), peek(address), "the byte that the thread read")
    expect_modes(ctx.dst.range, UNREGISTERED)


@uffd_case("userfaultfd01", mem=ALL, pages=2, rows=("CP-01", "CL-02"))
def test_userfaultfd01(ctx: Context) -> None:
    """A thread reads what UFFDIO_COPY has put there, although the handle is closed at once."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    page = ctx.dst.page(1)
    with closed_at_once(ctx, ctx.uffd):
        ctx.uffd.copy(page.start, ctx.src.page(1).start, page.len)
    ctx.dst.expect_pattern_of(ctx.src, 1, 1)
    ctx.dst.expect_zero(0, 1)


@uffd_case("userfaultfd02", mem=(ANON,), features=Feature.MOVE, pages=2, rows=("MV-01", "CL-02"))
def test_userfaultfd02(ctx: Context) -> None:
    """A thread reads what UFFDIO_MOVE has put there, the message of its fault read without poll(2)."""
    ctx.src.fill()
    page = ctx.dst.page(1)
    with Uffd.open(flags=os.O_CLOEXEC | USER_MODE_ONLY) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        with Waiter(partial(peek, page.start + OFFSET)) as waiter:
            expect(uffd.read(), [Fault(page.start, PagefaultFlag(0))], "the message")
            uffd.move(page.start, ctx.src.page(1).start, page.len)
            uffd.close()
    expect(waiter.result(), peek(page.start + OFFSET), "the byte that the thread read")
    ctx.dst.expect_pattern_of(ctx.src, 1, 1)
    ctx.src.expect_zero(1, 1)


@uffd_case("userfaultfd03", mem=ALL, needs=("device",), pages=2, rows=("DEV-02", "CL-02"))
def test_userfaultfd03(ctx: Context) -> None:
    """A thread reads what UFFDIO_COPY has put there through a handle of /dev/userfaultfd that is closed at once."""
    ctx.src.fill()
    page = ctx.dst.page(1)
    with Uffd.open(via="device") as uffd:
        uffd.register(ctx.dst.range, MISSING)
        with closed_at_once(ctx, uffd):
            uffd.copy(page.start, ctx.src.page(1).start, page.len)
    ctx.dst.expect_pattern_of(ctx.src, 1, 1)


@uffd_case("userfaultfd04", mem=NOT_HUGETLB, pages=2, rows=("ZP-01", "CL-02"))
def test_userfaultfd04(ctx: Context) -> None:
    """A thread reads zero from where UFFDIO_ZEROPAGE has put a page, although the handle is closed at once."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with closed_at_once(ctx, ctx.uffd) as waiter:
        ctx.uffd.zeropage(ctx.dst.page(1))
        Pagemap.expect_present(ctx.dst, 1)
    expect(waiter.result(), b"\0", "the byte that the thread read")
    ctx.dst.expect_zero()


@uffd_case("userfaultfd05", mem=ALL, features=WRITEPROTECT, pages=2, rows=("WP-08", "CL-02"))
def test_userfaultfd05(ctx: Context) -> None:
    """A write to a protected page is seen only once it is un-protected, although the handle is closed at once."""
    address = ctx.dst.page(1).start + OFFSET
    ctx.dst.fill()
    old = peek(address)
    new = bytes([old[0] ^ 0xFF])
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    trapped = PagefaultFlag.WRITE | PagefaultFlag.WP
    with faulting(ctx.uffd, address, call=partial(poke, address, new), flags=trapped):
        ctx.dst.expect_pattern_of(ctx.dst)
        ctx.uffd.unprotect(ctx.dst.page(1))
        Pagemap.expect_protected(ctx.dst, {0}, "after un-protecting page 1")
        ctx.uffd.close()
    expect(peek(address), new, "the byte that was written")
    poke(address, old)
    ctx.dst.expect_pattern_of(ctx.dst)


@uffd_case("userfaultfd06", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-01", "PO-12", "CL-02"))
def test_userfaultfd06(ctx: Context) -> None:
    """A thread that waits for a page gets SIGBUS when it is poisoned, although the handle is closed at once."""
    page = ctx.dst.page(1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, page.start, call=partial(touch_trapped, page, page.len)) as waiter:
        ctx.uffd.poison(page)
        ctx.uffd.close()
    traps = waiter.result()
    assert isinstance(traps, list)
    expect([trap and trap.signo for trap in traps], [SIGBUS], "signals of the thread's access")
    ctx.dst.expect_zero(0, 1)


@uffd_case("userfaultfd07", mem=(SHMEM, SHMEM_PRIVATE), features=Feature.MINOR_SHMEM, pages=2, rows=("CT-01", "CL-02"))
def test_userfaultfd07(ctx: Context) -> None:
    """What write(2) puts into the file while a minor fault waits is what the thread reads after UFFDIO_CONTINUE."""
    page, fd = ctx.dst.page(1), ctx.dst.fd or 0
    os.pwrite(fd, b"A" * ctx.page_size, ctx.page_size)
    protect(ctx.dst.range, PROT_READ)
    ctx.uffd.register(ctx.dst.range, MINOR)
    advise(ctx.dst.range, Advice.DONTNEED)
    with faulting(ctx.uffd, page.start, flags=PagefaultFlag.MINOR) as waiter:
        os.pwrite(fd, b"Z" * ctx.page_size, ctx.page_size)
        ctx.uffd.continue_(page)
        ctx.uffd.close()
    expect(waiter.result(), b"Z", "the byte that the thread read")
    expect(peek(page.start, page.len), b"Z" * page.len, "the page")
