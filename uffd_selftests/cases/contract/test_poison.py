# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_POISON: pages whose every access ends in SIGBUS, as if their memory were broken."""

from __future__ import annotations

import os
from contextlib import ExitStack
from errno import EAGAIN, EEXIST, EFAULT, EINVAL, ENOENT, ENOMEM, ESRCH
from functools import partial
from signal import SIGBUS, SIGSEGV

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, EHWPOISON, FILE_BACKED, HUGETLB, HUGETLB_PRIVATE, MINOR, MISSING, PAGE_SIZE, PRIVATE, PROT_NONE,
    PROT_READ, PROT_WRITE, SHMEM, SHMEM_PRIVATE, UNTOUCHED, WP, AccessError, Advice, Child, Context, Feature,
    KernelError, PagefaultFlag, Pagemap, PoisonMode, Range, Skip, Trap, Uffd, advise, bad_ranges, errno_name, expect,
    fails, faulting, held_up, huge_area, orphaned, peek, pmd_mapped, poke, promise, protect, read_only, refuses, remap,
    syscalls, uapi, undisturbed, unmap, unread_event,
)  # fmt: skip

MARKERS = Feature.POISON | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED

# si_code of SIGBUS, <asm-generic/siginfo.h>.
BUS_ADRERR = 2
BUS_MCEERR_AR = 4


def access(address: int, *, write: bool = False) -> Trap | None:
    """Access one byte; the signal that ended it, if one did."""
    try:
        if write:
            poke(address, b"w")
        else:
            peek(address)
    except AccessError as error:
        return error.trap
    return None


def expect_trap(trap: object, address: int, what: str) -> None:
    """Assert that an access was ended by SIGBUS at exactly its address."""
    seen = (trap.signo, hex(trap.addr)) if isinstance(trap, Trap) else None
    expect(seen, (SIGBUS, hex(address)), f"signal and si_addr {what}")


def expect_sigbus(uffd: Uffd, *addresses: int) -> None:
    """Assert that a read of and a write to each address raise SIGBUS there, without a message."""
    for address in addresses:
        for write in (False, True):
            trap = undisturbed(uffd, partial(access, address, write=write))
            expect_trap(trap, address, f"of a {'write' if write else 'read'}")


# ---- what it does --------------------------------------------------------------------------------------------------


@uffd_case("poison-pages", mem=ALL, features=Feature.POISON, pages=4, rows=("PO-01", "PO-09"))
def test_poison_pages(ctx: Context) -> None:
    """Every access to a poisoned page, anywhere in it and each time, raises SIGBUS; those beside it stay missing."""
    size = ctx.page_size
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.page(1, 2))
    with promise("PO-01, PO-09" if ctx.mem.hugetlb else "PO-01"):
        for start in (ctx.dst.page(1).start, ctx.dst.page(2).start):
            expect_sigbus(ctx.uffd, start, start + size // 2 + 1, start + size - 1, start)
    for page in (0, 3):
        with promise("PO-01", f"page {page} beside"), faulting(ctx.uffd, ctx.dst.page(page).start):
            ctx.uffd.copy(ctx.dst.page(page).start, ctx.src.page(page).start, size)
        ctx.dst.expect_pattern_of(ctx.src, page, 1)
    ctx.uffd.expect_no_message()


@uffd_case("poison-wakes", mem=ALL, features=Feature.POISON, pages=4, rows=("PO-07",))
def test_poison_wakes(ctx: Context) -> None:
    """A thread that waits for a page gets SIGBUS when it is poisoned; those beside it wait on."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with ExitStack() as stack:
        starts = [ctx.dst.page(page).start for page in range(4)]
        waiters = [stack.enter_context(faulting(ctx.uffd, at, call=partial(access, at))) for at in starts]
        ctx.uffd.poison(ctx.dst.page(1, 2))
        ctx.uffd.expect_still_asleep(2)
        for page, asleep in ((0, 1), (3, 0)):
            ctx.uffd.poison(ctx.dst.page(page))
            ctx.uffd.expect_still_asleep(asleep)
    for waiter, start in zip(waiters, starts, strict=True):
        expect_trap(waiter.result(), start, "of the thread that waited")


@uffd_case("poison-unread", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-07", "RD-16"))
def test_poison_unread(ctx: Context) -> None:
    """UFFDIO_POISON takes away the message of a fault that it answers before anybody has read it."""
    start = ctx.dst.start
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, start, call=partial(access, start), read=False) as waiter:
        ctx.uffd.poison(ctx.dst.page(0))
        expect(ctx.uffd.readable(), False, "POLLIN after UFFDIO_POISON")
        ctx.uffd.expect_no_message()
        expect((ctx.uffd.fdinfo.pending, ctx.uffd.fdinfo.total), (0, 0), "pending and total of fdinfo")
    expect_trap(waiter.result(), start, "of the thread that waited")


@uffd_case("poison-dontwake", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-04", "PO-07"))
def test_poison_dontwake(ctx: Context) -> None:
    """With DONTWAKE the thread sleeps on, through a refused second UFFDIO_POISON too, and gets SIGBUS when it wakes."""
    page = ctx.dst.page(0)
    ctx.uffd.register(ctx.dst.range, MISSING)
    write = partial(access, page.start, write=True)
    with faulting(ctx.uffd, page.start, call=write, flags=PagefaultFlag.WRITE) as waiter:
        ctx.uffd.poison(page, PoisonMode.DONTWAKE)
        ctx.uffd.expect_still_asleep(1)
        with promise("PO-04", "poisoned already"), refuses(EEXIST):
            ctx.uffd.poison(page)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(page)
        expect_trap(waiter.result(), page.start, "of the thread that waited")
    ctx.uffd.expect_no_message()


@uffd_case("poison-si-code", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-02",), kind=Kind.VERSION)
def test_poison_si_code(ctx: Context) -> None:
    """The signal is that of broken memory, with the size of the loss, where the kernel can handle broken memory."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.page(0))
    broken = (BUS_MCEERR_AR, ctx.page_size.bit_length() - 1)
    allowed = [broken]
    try:
        advise(Range(ctx.dst.start, 0), Advice.HWPOISON)  # of nothing: asks whether the kernel knows this advice
    except KernelError:
        allowed.append((BUS_ADRERR, 0))  # without CONFIG_MEMORY_FAILURE, depending on the architecture
    with promise("PO-02"):
        trap = undisturbed(ctx.uffd, partial(access, ctx.dst.start))
        seen = (trap.code, trap.addr_lsb) if trap else None
        if seen not in allowed:
            raise AssertionError(f"si_code and si_addr_lsb: expected {' or '.join(map(str, allowed))}, got {seen}")


@uffd_case("poison-kernel-access", mem=ALL, features=Feature.POISON, needs=("kernel_faults",), pages=2, rows=("PO-03",))
def test_poison_kernel_access(ctx: Context) -> None:
    """A system call that touches a poisoned page fails with EFAULT, without a signal or a message."""
    reader, writer = os.pipe()
    os.write(writer, b"data")
    start = ctx.dst.start
    with Uffd.open(flags=os.O_CLOEXEC | os.O_NONBLOCK) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        uffd.poison(ctx.dst.page(0))
        with promise("PO-03", "write(2) from it"), fails(EFAULT):
            undisturbed(uffd, lambda: syscalls.write_from(writer, start, 1))
        with promise("PO-03", "read(2) into it"), fails(EFAULT):
            undisturbed(uffd, lambda: syscalls.read_into(reader, start, 1))
        expect_sigbus(uffd, start)
    os.close(reader)
    os.close(writer)


@uffd_case("poison-populate", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-14",), kind=Kind.DETAIL)
def test_poison_populate(ctx: Context) -> None:
    """Poisoned pages cannot be populated (EHWPOISON) or locked (ENOMEM)."""
    page = ctx.dst.page(0)
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(page)
    for advice in (Advice.POPULATE_READ, Advice.POPULATE_WRITE):
        with promise("PO-14", str(advice)), fails(EHWPOISON):
            undisturbed(ctx.uffd, partial(advise, page, advice))
    with promise("PO-14", "mlock"), fails(ENOMEM):
        undisturbed(ctx.uffd, lambda: syscalls.call("mlock", page.start, page.len))
    syscalls.call("munlock", page.start, page.len)
    expect_sigbus(ctx.uffd, page.start)


@uffd_case(
    "poison-minor",
    mem=FILE_BACKED,
    features=Feature.POISON | Feature.MINOR_HUGETLBFS | Feature.MINOR_SHMEM,
    pages=2,
    rows=("PO-08",),
)
def test_poison_minor(ctx: Context) -> None:
    """A page that is in the page cache can be poisoned, in answer to a minor fault too; the file keeps its bytes."""
    ctx.uffd.register(ctx.dst.range, MINOR)
    start = ctx.dst.start
    with ctx.dst.file_view() as view:
        ctx.dst.pattern.fill(view.start, 0, 2)
        with promise("PO-08"):
            with faulting(ctx.uffd, start, call=partial(access, start), flags=PagefaultFlag.MINOR) as waiter:
                ctx.uffd.poison(ctx.dst.page(0))
            expect_trap(waiter.result(), start, "of the thread that waited")
            expect_sigbus(ctx.uffd, start)
        ctx.dst.pattern.verify(view.start, 0, 2, what="the file")


@uffd_case("poison-local", mem=(SHMEM, HUGETLB), features=Feature.POISON, pages=2, rows=("PO-13",))
def test_poison_local(ctx: Context) -> None:
    """Poison is a matter of one mapping: another one of the same page can be read and written."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.page(0))
    with promise("PO-13"):
        ctx.dst.pattern.fill(ctx.dst.alias.start, 0, 1)
        ctx.dst.pattern.verify(ctx.dst.alias.start, 0, 1, what="the other mapping")
        expect_sigbus(ctx.uffd, ctx.dst.start)


# ---- what becomes of it --------------------------------------------------------------------------------------------


@uffd_case("poison-dropped", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-10",), bugs=(49,), kind=Kind.DETAIL)
def test_poison_dropped(ctx: Context) -> None:
    """MADV_DONTNEED takes the poison away: the page is missing again."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.range)
    advise(ctx.dst.page(0), Advice.DONTNEED)
    with promise("PO-10"), faulting(ctx.uffd, ctx.dst.start):
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
    ctx.dst.expect_pattern_of(ctx.src, 0, 1)
    expect_sigbus(ctx.uffd, ctx.dst.page(1).start)


@uffd_case("poison-freed", mem=(ANON,), features=Feature.POISON, pages=2, rows=("PO-10",), kind=Kind.DETAIL)
def test_poison_freed(ctx: Context) -> None:
    """MADV_FREE takes the poison away too."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.range)
    advise(ctx.dst.page(0), Advice.FREE)
    with promise("PO-10", "MADV_FREE"), faulting(ctx.uffd, ctx.dst.start):
        ctx.uffd.zeropage(ctx.dst.page(0))
    expect_sigbus(ctx.uffd, ctx.dst.page(1).start)


@uffd_case("poison-fork", mem=PRIVATE, features=Feature.POISON, pages=2, rows=("PO-11",), bugs=(49,), kind=Kind.DETAIL)
def test_poison_fork(ctx: Context) -> None:
    """A child forked without UFFD_FEATURE_EVENT_FORK inherits the poison of private memory; the parent keeps it."""
    start = ctx.dst.start
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.page(0))

    def look(_: object) -> None:
        with promise("PO-11", "in the child"):
            expect_trap(access(start), start, "of a read")

    with Child(look):
        pass
    expect_sigbus(ctx.uffd, start)


@uffd_case("poison-mremap", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-12",), bugs=(49,), kind=Kind.DETAIL)
def test_poison_mremap(ctx: Context) -> None:
    """Poison moves with its page in mremap(2)."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.page(0))
    ctx.dst.start = remap(ctx.dst.range, to=ctx.src.start)
    with promise("PO-12", "mremap"):
        expect_sigbus(ctx.uffd, ctx.dst.start)


@uffd_case("poison-mprotect", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-12", "PO-16"), kind=Kind.DETAIL)
def test_poison_mprotect(ctx: Context) -> None:
    """Poison outlives mprotect(2); while the mapping forbids the access, that counts first (SIGSEGV)."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.page(0))
    for prot, what, read, write in (
        (PROT_READ, "PROT_READ", SIGBUS, SIGSEGV),
        (PROT_READ | PROT_WRITE, "PROT_READ | PROT_WRITE", SIGBUS, SIGBUS),
        (PROT_NONE, "PROT_NONE", SIGSEGV, SIGSEGV),
    ):
        protect(ctx.dst.range, prot)
        with promise("PO-12" if prot else "PO-16", what):
            traps = [undisturbed(ctx.uffd, partial(access, ctx.dst.start, write=w)) for w in (False, True)]
            signals = [trap.signo if trap else None for trap in traps]
            expect(signals, [read, write], "signals on read, on write")


@uffd_case("poison-writeprotect", mem=ALL, features=MARKERS, pages=2, rows=("PO-12",), kind=Kind.DETAIL)
def test_poison_writeprotect(ctx: Context) -> None:
    """Poison outlives write protection, put on and taken off."""
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    ctx.uffd.poison(ctx.dst.page(0))
    with promise("PO-12", "UFFDIO_WRITEPROTECT"):
        ctx.uffd.writeprotect(ctx.dst.range)
        expect_sigbus(ctx.uffd, ctx.dst.start)
        ctx.uffd.unprotect(ctx.dst.range)
        expect_sigbus(ctx.uffd, ctx.dst.start)


@uffd_case("poison-outlives-handle", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-12",), kind=Kind.DETAIL)
def test_poison_outlives_handle(ctx: Context) -> None:
    """Poison outlives UFFDIO_UNREGISTER, and the handle that made it."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.range)
    ctx.uffd.unregister(ctx.dst.page(0))
    with promise("PO-12", "UFFDIO_UNREGISTER"):
        expect_sigbus(ctx.uffd, ctx.dst.start)
    with Uffd.open() as other:
        ctx.uffd.close()
        with promise("PO-12", "close"):
            expect_sigbus(other, ctx.dst.page(1).start)


D_PAGEMAP = Defect(
    id="D-PO-15",
    summary="/proc/PID/pagemap shows a poisoned base page as swapped out, with an offset that means nothing",
    kernels="6.12.117, 6.18.44, 7.3.4",
    advice="Do not count pages as swapped out by PM_SWAP of pagemap alone where UFFDIO_POISON is in use.",
    shows=r"PM_SWAP in pagemap: expected 0, got PM_SWAP",
)


@uffd_case(
    "poison-not-swapped",
    mem=(ANON, SHMEM, SHMEM_PRIVATE),
    features=Feature.POISON,
    pages=2,
    rows=("PO-15",),
    defect=D_PAGEMAP,
)
def test_poison_not_swapped(ctx: Context) -> None:
    """A poisoned page does not look swapped out in /proc/PID/pagemap."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.page(0))
    with promise("PO-15"):
        expect(uapi.PagemapBit(Pagemap.entry(ctx.dst.start)) & uapi.PM_SWAP, uapi.PagemapBit(0), "PM_SWAP in pagemap")


@uffd_case("poison-pagemap", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-15",), kind=Kind.DETAIL)
def test_poison_pagemap(ctx: Context) -> None:
    """In /proc/PID/pagemap a poisoned page is neither present nor protected nor a guard, in none of its parts."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.page(0))
    bits = uapi.PM_PRESENT | uapi.PM_UFFD_WP | uapi.PM_GUARD
    entries = Pagemap.entries(ctx.dst.page(0))
    expect({str(uapi.PagemapBit(entry) & bits) for entry in entries}, {"0"}, "these bits in pagemap")


# ---- what it refuses -----------------------------------------------------------------------------------------------


@uffd_case("poison-eexist", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-04",), kind=Kind.DETAIL)
def test_poison_eexist(ctx: Context) -> None:
    """UFFDIO_POISON refuses a page that is mapped, and leaves its bytes alone."""
    poke(ctx.dst.start, b"data")
    peek(ctx.dst.page(1).start)
    ctx.uffd.register(ctx.dst.range, MISSING)
    for page, how in enumerate(("written", "read only")):
        with promise("PO-04", how), refuses(EEXIST):
            ctx.uffd.poison(ctx.dst.page(page))
    expect(peek(ctx.dst.start, 5), b"data\0", "the page")
    ctx.dst.expect_zero(1)


@uffd_case("poison-eexist-marker", mem=ALL, features=MARKERS, pages=2, rows=("PO-04",), kind=Kind.DETAIL)
def test_poison_eexist_marker(ctx: Context) -> None:
    """UFFDIO_POISON refuses a missing page that is write-protected, and its protection stays."""
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    ctx.uffd.writeprotect(ctx.dst.page(0))
    with promise("PO-04", "protected"), refuses(EEXIST):
        ctx.uffd.poison(ctx.dst.page(0))
    Pagemap.expect_protected(ctx.dst, [0], "after the refusal")
    ctx.uffd.poison(ctx.dst.page(1))


@uffd_case(
    "poison-eexist-guard",
    mem=(ANON, SHMEM, SHMEM_PRIVATE),
    features=Feature.POISON,
    pages=2,
    rows=("PO-04",),
    kind=Kind.DETAIL,
)
def test_poison_eexist_guard(ctx: Context) -> None:
    """UFFDIO_POISON refuses a guard page, and it stays one."""
    try:
        advise(ctx.dst.page(0), Advice.GUARD_INSTALL)
    except KernelError as error:
        raise Skip(f"MADV_GUARD_INSTALL: {errno_name(error.errno or 0)} (Linux 6.13, 6.15 for files)") from None
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("PO-04", "guard"), refuses(EEXIST):
        ctx.uffd.poison(ctx.dst.page(0))
    trap = undisturbed(ctx.uffd, partial(access, ctx.dst.start))
    expect(trap and trap.signo, SIGSEGV, "signal at the guard page")


@uffd_case(
    "poison-eexist-huge",
    mem=(ANON, SHMEM),
    features=Feature.POISON,
    needs=("thp",),
    pages=1,
    rows=("PO-04",),
    kind=Kind.DETAIL,
)
def test_poison_eexist_huge(ctx: Context) -> None:
    """UFFDIO_POISON refuses a part of a transparent huge page, and does not split it."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, MISSING)
    for page in (0, 5):
        with promise("PO-04", f"page {page} of a huge page"), refuses(EEXIST):
            ctx.uffd.poison(area.page(page))
    expect(pmd_mapped(area.range), area.range.len, "bytes mapped by PMD")
    area.expect_pattern_of(area)


@uffd_case("poison-partial", mem=ALL, features=Feature.POISON, pages=4, rows=("PO-05",), kind=Kind.DETAIL)
def test_poison_partial(ctx: Context) -> None:
    """UFFDIO_POISON stops at a mapped page, says how far it came, and wakes the threads up to there."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.copy(ctx.dst.page(2).start, ctx.src.page(2).start, ctx.page_size)
    with ExitStack() as stack:
        starts = [ctx.dst.page(page).start for page in (0, 1, 3)]
        waiters = [stack.enter_context(faulting(ctx.uffd, at, call=partial(access, at))) for at in starts]
        with promise("PO-05"), refuses(EAGAIN, output=ctx.page_size):
            ctx.uffd.poison(ctx.dst.page(1, 3))
        ctx.uffd.expect_still_asleep(2)
        expect_trap(waiters[1].result(), starts[1], "of the thread on page 1")
        for page in (0, 3):
            ctx.uffd.copy(ctx.dst.page(page).start, ctx.src.page(page).start, ctx.page_size)
    expect_sigbus(ctx.uffd, ctx.dst.page(1).start)
    for page in (0, 2, 3):
        ctx.dst.expect_pattern_of(ctx.src, page, 1)


@uffd_case(
    "poison-partial-dontwake", mem=ALL, features=Feature.POISON, pages=3, rows=("PO-05", "PO-04"), kind=Kind.DETAIL
)
def test_poison_partial_dontwake(ctx: Context) -> None:
    """With DONTWAKE a UFFDIO_POISON that stops midway wakes nobody either."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.copy(ctx.dst.page(2).start, ctx.src.page(2).start, ctx.page_size)
    with ExitStack() as stack:
        starts = [ctx.dst.page(page).start for page in (0, 1)]
        waiters = [stack.enter_context(faulting(ctx.uffd, at, call=partial(access, at))) for at in starts]
        with promise("PO-05"), refuses(EAGAIN, output=2 * ctx.page_size):
            ctx.uffd.poison(ctx.dst.range, PoisonMode.DONTWAKE)
        ctx.uffd.expect_still_asleep(2)
        ctx.uffd.wake(ctx.dst.page(0, 2))
        for at, waiter in zip(starts, waiters, strict=True):
            expect_trap(waiter.result(), at, "of a thread that waited")
    ctx.dst.expect_pattern_of(ctx.src, 2, 1)


@uffd_case("poison-errors", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-06",), kind=Kind.DETAIL)
def test_poison_errors(ctx: Context) -> None:
    """UFFDIO_POISON refuses ranges that are not whole pages, unknown modes, and an argument it cannot read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for what, bad in bad_ranges(ctx.dst.page(0)).items():
        with promise("PO-06", what), refuses(EINVAL, output=UNTOUCHED):
            ctx.uffd.poison(bad)
    for bit in range(1, 64):
        with promise("PO-06", f"mode bit {bit}"), refuses(EINVAL, output=UNTOUCHED):
            ctx.uffd.poison(ctx.dst.page(0), PoisonMode(1 << bit))
    with promise("PO-06", "argument NULL"), refuses(EFAULT):
        ctx.uffd.raw_ioctl(uapi.UFFDIO_POISON, 0)
    ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@uffd_case("poison-output-read-only", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-06",), kind=Kind.DETAIL)
def test_poison_output_read_only(ctx: Context) -> None:
    """UFFDIO_POISON that cannot write its result has poisoned the page but woken nobody."""
    page = ctx.dst.page(0)
    arg = uapi.uffdio_poison(uapi.uffdio_range(page.start, page.len))
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, page.start, call=partial(access, page.start)):
        with promise("PO-06", "updated not writable"), read_only(bytes(arg)) as address, refuses(EFAULT):
            ctx.uffd.raw_ioctl(uapi.UFFDIO_POISON, address)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(page)
    expect_sigbus(ctx.uffd, page.start)


@uffd_case("poison-elsewhere", mem=ALL, features=Feature.POISON, pages=4, rows=("PO-06",), kind=Kind.DETAIL)
def test_poison_elsewhere(ctx: Context) -> None:
    """UFFDIO_POISON wants its whole range in one registered mapping, else it poisons nothing."""
    with promise("PO-06", "not registered"), refuses(ENOENT):
        ctx.uffd.poison(ctx.dst.page(0))
    ctx.uffd.register(ctx.dst.page(0, 2), MISSING)
    with promise("PO-06", "behind the registered pages"), refuses(ENOENT):
        ctx.uffd.poison(ctx.dst.page(2))
    with promise("PO-06", "registered and not"), refuses(ENOENT):
        ctx.uffd.poison(ctx.dst.page(1, 2))
    unmap(ctx.dst.page(3))
    with promise("PO-06", "nothing mapped"), refuses(ENOENT):
        ctx.uffd.poison(ctx.dst.page(3))
    ctx.uffd.unregister(ctx.dst.page(0, 2))
    ctx.dst.expect_zero(0, 3)


@uffd_case("poison-hugetlb-part", mem=(HUGETLB, HUGETLB_PRIVATE), features=Feature.POISON, pages=2, rows=("PO-09",))
def test_poison_hugetlb_part(ctx: Context) -> None:
    """UFFDIO_POISON takes whole huge pages only."""
    start, size = ctx.dst.start, ctx.page_size
    ctx.uffd.register(ctx.dst.range, MISSING)
    for what, bad in {
        "a part": Range(start, PAGE_SIZE),
        "start inside": Range(start + PAGE_SIZE, size),
        "end inside": Range(start, size + PAGE_SIZE),
    }.items():
        with promise("PO-09", what), refuses(EINVAL):
            ctx.uffd.poison(bad)
    ctx.uffd.copy(start, ctx.src.start, 2 * size)


@uffd_case(
    "poison-beyond-eof",
    mem=(SHMEM, SHMEM_PRIVATE),
    features=Feature.POISON,
    pages=2,
    rows=("PO-06",),
    kind=Kind.DETAIL,
)
def test_poison_beyond_eof(ctx: Context) -> None:
    """UFFDIO_POISON refuses a page beyond the end of the file, and takes the last one."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    os.ftruncate(ctx.dst.fd or -1, ctx.page_size - 1)
    with promise("PO-06", "beyond the end"), refuses(EFAULT):
        ctx.uffd.poison(ctx.dst.page(1))
    with promise("PO-06", "up to beyond the end"), refuses(EAGAIN, output=ctx.page_size):
        ctx.uffd.poison(ctx.dst.range)


@uffd_case("poison-unread-event", mem=ALL, features=Feature.POISON | Feature.EVENT_REMOVE, pages=2, rows=("PO-17",))
def test_poison_unread_event(ctx: Context) -> None:
    """Until an event is read UFFDIO_POISON says EAGAIN, before it looks at anything else, and poisons nothing."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("PO-17"), unread_event(ctx.uffd, ctx.dst.page(1)):
        for where in (ctx.dst.page(0), Range(0, 0)):
            with held_up():
                ctx.uffd.poison(where)
    ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
    ctx.uffd.poison(ctx.dst.page(1))


@uffd_case("poison-orphaned", mem=ALL, features=Feature.POISON, pages=2, rows=("PO-17",))
def test_poison_orphaned(ctx: Context) -> None:
    """UFFDIO_POISON says ESRCH when the address space is gone."""
    with orphaned(ctx.dst.range, MISSING) as uffd, promise("PO-17"), refuses(ESRCH, output=UNTOUCHED):
        uffd.poison(ctx.dst.page(0))
