# SPDX-License-Identifier: GPL-2.0-only
"""UFFD_FEATURE_RWP_ASYNC: the kernel notes who accesses a page and lets nobody wait."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC_RWP, CACHED, HUGETLB_PRIVATE, MINOR, MINOR_FAULTS, MISSING, NEW, PAGE_SIZE, PRIVATE, RWP, SHARED,
    SHMEM_PRIVATE, WRITE, Advice, Area, Channel, Child, Context, Feature, Pagemap, RwprotectMode, advise, expect,
    faulting, fixed_buffer, huge_area, mend, peek, pmd_mapped, poke, promise, rwp_filled, rwp_protected, signals,
    swap_out, syscalls, through_proc, touch, uapi, undisturbed,
)  # fmt: skip


def expect_left(area: Area, pages: set[int], when: str) -> None:
    """Assert that of an area exactly these pages are still protected."""
    Pagemap.expect_protected(area, pages, when)


@uffd_case("async-rwp-touch", mem=ALL, features=ASYNC_RWP, pages=7, spare_hugepages=1, rows=("RW-77",))
def test_async_rwp_touch(ctx: Context) -> None:
    """An access to a protected page sends no message and waits for nobody; it ends that page's protection alone."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    ctx.src.fill()
    old = peek(ctx.src.page(1).start, len(NEW))
    end = area.page(4).end
    for what, call, left in (
        ("a read of page 1", partial(peek, area.page(1).start, len(NEW)), {0, 2, 3, 4, 5, 6}),
        ("a write to page 3", partial(poke, area.page(3).start, NEW), {0, 2, 4, 5, 6}),
        ("a read of the last byte of page 4", partial(peek, end - 1), {0, 2, 5, 6}),
        ("a write to the middle of page 6", partial(poke, area.page(6).start + area.page_size // 2, NEW), {0, 2, 5}),
        ("a read from page 2 into page 3", partial(peek, area.page(3).start - 4, 8), {0, 5}),
        ("more accesses to these pages", partial(touch, area.page(1, 3), area.page_size, write=True), {0, 5}),
    ):
        with promise("RW-77", what):
            got = undisturbed(uffd, call)
            expect_left(area, left, "afterwards")
        if what.startswith("a read of page 1"):
            expect(got, old, "RW-77: what the first read got")
    expect(peek(area.page(3).start, len(NEW)), NEW, "RW-77: what was written to page 3")
    expect(peek(area.page(6).start + area.page_size // 2, len(NEW)), NEW, "RW-77: what was written to page 6")
    uffd.rwprotect(area.page(1, 3))
    expect_left(area, {0, 1, 2, 3, 5}, "after protecting pages 1 to 3 again")
    undisturbed(uffd, partial(touch, area.page(2), area.page_size, write=True))
    expect_left(area, {0, 1, 3, 5}, "after a write to page 2")
    uffd.resolve(area.page(0, 2))
    expect_left(area, {3, 5}, "after pages 0 and 1 were resolved")
    undisturbed(uffd, lambda: mend(ctx, area, 3))
    undisturbed(uffd, lambda: area.expect_pattern_of(area, 0, 6))
    expect_left(area, set(), "after reads of all but page 6")
    uffd.expect_asleep(0)


# ---- the kernel's own accesses -------------------------------------------------------------------------------------


def spliced(address: int) -> bytes:
    """Give the bytes to a pipe by vmsplice(2), which takes the page itself, and read them there."""
    reader, writer = os.pipe()
    try:
        vector = struct.pack("@PN", address, len(NEW))
        buffer = ctypes.create_string_buffer(vector, len(vector))
        syscalls.call("vmsplice", writer, ctypes.addressof(buffer), 1, 0)
        return os.read(reader, len(NEW))
    finally:
        os.close(reader)
        os.close(writer)


def piped(address: int, data: bytes | None) -> bytes:
    """Have write(2) read the bytes, or read(2) write them."""
    reader, writer = os.pipe()
    try:
        if data is None:
            syscalls.write_from(writer, address, len(NEW))
            return os.read(reader, len(NEW))
        os.write(writer, data)
        syscalls.read_into(reader, address, len(data))
        return data
    finally:
        os.close(reader)
        os.close(writer)


def vm_write(address: int, data: bytes) -> bytes:
    """Write the bytes by process_vm_writev(2)."""
    syscalls.process_vm_writev(os.getpid(), address, data)
    return data


KERNEL_READS: dict[str, Callable[[int], object]] = {
    "write(2)": lambda address: piped(address, None),
    "process_vm_readv(2)": lambda address: syscalls.process_vm_readv(os.getpid(), address, len(NEW)),
    "/proc/self/mem": lambda address: through_proc("self", address, len(NEW)),
    "vmsplice(2)": spliced,
}
KERNEL_WRITES: dict[str, Callable[[int, bytes], object]] = {
    "read(2)": piped,
    "process_vm_writev(2)": vm_write,
    "/proc/self/mem": lambda address, data: through_proc("self", address, 0, data),
}


@uffd_case("async-rwp-kernel", mem=ALL, features=ASYNC_RWP, pages=5, spare_hugepages=2, rows=("RW-78", "RW-83"))
def test_async_rwp_kernel(ctx: Context) -> None:
    """What the kernel reads or writes for a process counts as accessed and is not held up; its neighbours do not."""
    area = rwp_filled(ctx)
    page = area.page(2)
    ctx.src.fill()
    old = peek(ctx.src.page(2).start, len(NEW))
    for what, call in KERNEL_READS.items():
        ctx.uffd.rwprotect(area.range)
        with promise("RW-78", f"{what} reads"):
            got = undisturbed(ctx.uffd, partial(call, page.start))
            expect_left(area, {0, 1, 3, 4}, "after an access to page 2")
            expect(got, old, "what was read")
    for number, (what, write) in enumerate(KERNEL_WRITES.items()):
        data = bytes([number + 1]) * len(NEW)
        ctx.uffd.rwprotect(area.range)
        with promise("RW-78", f"{what} writes"):
            undisturbed(ctx.uffd, partial(write, page.start, data))
            expect_left(area, {0, 1, 3, 4}, "after an access to page 2")
            expect(peek(page.start, len(NEW)), data, "what was written")
    mend(ctx, area, 2)
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


@uffd_case("async-rwp-across", mem=ALL, features=ASYNC_RWP, pages=5, rows=("RW-78",))
def test_async_rwp_across(ctx: Context) -> None:
    """A system call over several protected pages, some of them not whole, gets all its bytes and frees just those."""
    area = rwp_protected(ctx)
    start, length = area.page(1).start + 100, 2 * area.page_size
    got = undisturbed(ctx.uffd, lambda: syscalls.process_vm_readv(os.getpid(), start, length))
    expect_left(area, {0, 4}, "RW-78: after process_vm_readv(2) from page 1 into page 3")
    expect(len(got), length, "RW-78: bytes read")
    expect(got == peek(start, length), True, "RW-78: whether they are those of the memory")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


@uffd_case("async-rwp-pin", mem=ALL, features=ASYNC_RWP, pages=5, spare_hugepages=1, rows=("RW-78",))
def test_async_rwp_pin(ctx: Context) -> None:
    """To pin protected pages for long counts as an access to them, not to their neighbours."""
    area = rwp_protected(ctx)
    with fixed_buffer(area.page(1, 2)):
        expect_left(area, {0, 3, 4}, "RW-78: after pages 1 and 2 were pinned")
        ctx.uffd.expect_no_message()
        ctx.uffd.rwprotect(area.page(1, 1))
        expect_left(area, {0, 1, 3, 4}, "after page 1 was protected again, pinned")
        undisturbed(ctx.uffd, partial(touch, area.page(1), area.page_size, write=True))
        expect_left(area, {0, 3, 4}, "after a write to page 1, pinned")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


@uffd_case("async-rwp-populate", mem=ALL, features=ASYNC_RWP, pages=5, rows=("RW-78",), kind=Kind.DETAIL)
def test_async_rwp_populate(ctx: Context) -> None:
    """MADV_POPULATE_READ and MADV_POPULATE_WRITE are accesses to just the pages of their range."""
    area = rwp_filled(ctx)
    for advice in (Advice.POPULATE_READ, Advice.POPULATE_WRITE):
        ctx.uffd.rwprotect(area.range)
        with promise("RW-78", str(advice)):
            undisturbed(ctx.uffd, partial(advise, area.page(1, 3), advice))
            expect_left(area, {0, 4}, "after it was said of pages 1 to 3")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


# ---- beside other modes --------------------------------------------------------------------------------------------


@uffd_case("async-rwp-missing", mem=ALL, features=ASYNC_RWP, pages=5, spare_hugepages=1, rows=("RW-79",))
def test_async_rwp_missing(ctx: Context) -> None:
    """Missing pages are reported as ever; what fills them is accessible, and tracked once it is protected."""
    area, uffd = ctx.dst, ctx.uffd
    ctx.src.fill()
    area.fill(0, 1)
    area.fill(4, 1)
    uffd.register(area.range, MISSING | RWP)
    uffd.rwprotect(area.range)
    expect_left(area, {0, 4}, "RW-79: after pages 0 and 4, which are there, and the holes were protected")
    with promise("RW-79", "a read of page 1"), faulting(uffd, area.page(1).start):
        undisturbed(uffd, partial(touch, area.page(0), area.page_size))
        uffd.expect_still_asleep(1)
        uffd.copy(area.page(1).start, ctx.src.page(1).start, area.page_size)
    with promise("RW-79", "a write to page 2"), faulting(uffd, area.page(2).start + 8, write=True, flags=WRITE):
        uffd.copy(area.page(2).start, ctx.src.page(2).start, area.page_size)
    expect_left(area, {4}, "RW-79: after pages 1 and 2 were filled and page 0 read")
    uffd.rwprotect(area.range)
    expect_left(area, {0, 1, 2, 4}, "RW-79: after all but the hole were protected")
    undisturbed(uffd, partial(touch, area.page(1, 2), area.page_size, write=True))
    expect_left(area, {0, 4}, "RW-79: after writes to pages 1 and 2")
    with promise("RW-79", "a read of page 3"), faulting(uffd, area.page(3).start):
        uffd.copy(area.page(3).start, ctx.src.page(3).start, area.page_size)
    poke(area.page(2).start + 8, peek(ctx.src.page(2).start + 8))
    undisturbed(uffd, lambda: area.expect_pattern_of(ctx.src))


@uffd_case("async-rwp-minor", mem=SHARED, features=ASYNC_RWP | MINOR_FAULTS, pages=4, rows=("RW-79",))
def test_async_rwp_minor(ctx: Context) -> None:
    """Cached pages that are not mapped are reported as ever; what UFFDIO_CONTINUE maps is accessible."""
    area, uffd = ctx.dst, ctx.uffd
    area.fill()
    uffd.register(area.range, MINOR | RWP)
    advise(area.page(1, 2), Advice.DONTNEED)
    uffd.rwprotect(area.range)
    expect_left(area, {0, 3}, "RW-79: after mapped pages 0 and 3 and cached pages 1 and 2 were protected")
    with promise("RW-79", "a read of page 1"), faulting(uffd, area.page(1).start, flags=CACHED):
        undisturbed(uffd, partial(touch, area.page(3), area.page_size, write=True))
        uffd.continue_(area.page(1))
    write = partial(poke, area.page(2).start, NEW)
    with promise("RW-79", "a write to page 2"):
        with faulting(uffd, area.page(2).start, call=write, flags=CACHED | WRITE):
            uffd.continue_(area.page(2))
        expect(peek(area.page(2).start, len(NEW)), NEW, "what was written")
    expect_left(area, {0}, "RW-79: after pages 1 to 3 were accessed")
    mend(ctx, area, 2)
    undisturbed(uffd, lambda: area.expect_pattern_of(area))
    expect_left(area, set(), "after reads")


# ---- transparent huge pages ----------------------------------------------------------------------------------------


@uffd_case("async-rwp-thp", mem=(ANON,), features=ASYNC_RWP, needs=("thp",), pages=1, rows=("RW-80",), kind=Kind.DETAIL)
def test_async_rwp_thp(ctx: Context) -> None:
    """One access frees a transparent huge page as a whole, and no other; where it is cut, the base page alone."""
    area, uffd = huge_area(ctx, 3), ctx.uffd
    count = area.nr_pages // 3
    first, middle, last = (set(range(number * count, (number + 1) * count)) for number in range(3))
    uffd.register(area.range, RWP)
    for write in (False, True):
        uffd.rwprotect(area.range)
        expect_left(area, first | middle | last, "RW-80: after UFFDIO_RWPROTECT")
        with promise("RW-80", "write" if write else "read"):
            undisturbed(uffd, partial(touch, area.page(count + 7), PAGE_SIZE, write=write))
            expect_left(area, first | last, "after an access within the second huge page")
            expect(pmd_mapped(area.range), area.range.len, "bytes mapped as huge pages")
    uffd.rwprotect(area.page(count + 9, 2))
    expect_left(area, first | last | {count + 9, count + 10}, "RW-80: after two base pages were protected")
    undisturbed(uffd, partial(touch, area.page(count + 10), PAGE_SIZE, write=True))
    expect_left(area, first | last | {count + 9}, "RW-80: after a write to one of them")
    uffd.resolve(area.page(5))
    expect_left(area, first - {5} | last | {count + 9}, "RW-80: after one base page of a huge page was resolved")
    undisturbed(uffd, partial(touch, area.page(6), PAGE_SIZE))
    expect_left(area, first - {5, 6} | last | {count + 9}, "RW-80: after a read of the base page behind it")
    undisturbed(uffd, lambda: area.expect_pattern_of(area))
    expect_left(area, set(), "after reads of all")


# ---- copy on write -------------------------------------------------------------------------------------------------


def expect_own_copy(ctx: Context, area: Area, *, protect_first: bool) -> None:
    """Assert that what a parent writes through pages that the kernel made accessible is not seen by its child."""
    changed = area.page(area.nr_pages // 2).start

    def child(channel: Channel) -> None:
        channel.receive()
        area.expect_pattern_of(area)
        Pagemap.expect_protected(area, (), "in the child")
        channel.send()

    if protect_first:
        ctx.uffd.rwprotect(area.range)
    with Child(child) as process:
        if not protect_first:
            ctx.uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, range(area.nr_pages), "in the parent, before the write")
        undisturbed(ctx.uffd, partial(touch, area.page(0, 2), PAGE_SIZE))
        undisturbed(ctx.uffd, partial(poke, changed, NEW))
        undisturbed(ctx.uffd, partial(poke, area.page(1).start, NEW))
        process.send()
        process.receive()
    for start in (changed, area.page(1).start):
        expect(peek(start, len(NEW)), NEW, "what the parent wrote")
    mend(ctx, area, area.nr_pages // 2, 1)
    area.expect_pattern_of(area)


@uffd_case(
    "async-rwp-cow", mem=PRIVATE, features=ASYNC_RWP, pages=5, spare_hugepages=5, rows=("RW-81",), kind=Kind.DETAIL
)
def test_async_rwp_cow(ctx: Context) -> None:
    """A write through a page that an access freed is not seen by a child forked before, whichever came first."""
    area = rwp_filled(ctx)
    for protect_first in (True, False):
        with promise("RW-81", f"protected {'before' if protect_first else 'after'} fork(2)"):
            expect_own_copy(ctx, area, protect_first=protect_first)


@uffd_case("async-rwp-cow-thp", mem=(ANON,), features=ASYNC_RWP, needs=("thp",), rows=("RW-81",), kind=Kind.DETAIL)
def test_async_rwp_cow_thp(ctx: Context) -> None:
    """The same of a transparent huge page."""
    area = huge_area(ctx)
    ctx.src = ctx.allocate(area.nr_pages)
    ctx.uffd.register(area.range, RWP)
    for protect_first in (True, False):
        with promise("RW-81", f"protected {'before' if protect_first else 'after'} fork(2)"):
            expect_own_copy(ctx, area, protect_first=protect_first)


@uffd_case(
    "async-rwp-private-file",
    mem=(SHMEM_PRIVATE, HUGETLB_PRIVATE),
    features=ASYNC_RWP,
    pages=4,
    spare_hugepages=4,
    rows=("RW-81",),
    kind=Kind.DETAIL,
)
def test_async_rwp_private_file(ctx: Context) -> None:
    """A write through a page that an access freed does not reach the file behind a private mapping."""
    area = ctx.dst
    with area.file_view() as view:
        area.pattern.fill(view.start, 0, 4)
        touch(area.range, area.page_size)
        ctx.uffd.register(area.range, RWP)
        ctx.uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, range(4), "of pages of the file")
        undisturbed(ctx.uffd, partial(poke, area.page(1).start, NEW))
        undisturbed(ctx.uffd, partial(touch, area.page(2), area.page_size))
        undisturbed(ctx.uffd, partial(poke, area.page(2).start, NEW))
        expect_left(area, {0, 3}, "RW-81: after writes to pages 1 and 2")
        for page in (1, 2):
            expect(peek(area.page(page).start, len(NEW)), NEW, f"RW-81: what was written to page {page}")
        with promise("RW-81", "the file afterwards"):
            area.expect_pattern(view)
        mend(ctx, area, 1, 2)
        undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


# ---- swap ----------------------------------------------------------------------------------------------------------


@uffd_case(
    "async-rwp-swap", mem=(ANON, SHMEM_PRIVATE), features=ASYNC_RWP, needs=("swap",), pages=6, rows=("RW-82",)
)
def test_async_rwp_swap(ctx: Context) -> None:
    """A page keeps its protection in swap, and loses it by the access that brings it back."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    undisturbed(uffd, partial(touch, area.page(1), PAGE_SIZE))
    swap_out(area.range)
    expect_left(area, {0, 2, 3, 4, 5}, "RW-82: in swap, after a read of page 1")
    undisturbed(uffd, partial(touch, area.page(1), PAGE_SIZE))
    with promise("RW-82", "a read of page 2"):
        got = undisturbed(uffd, partial(peek, area.page(2).start, len(NEW)))
        expect_left(area, {0, 3, 4, 5}, "afterwards")
    with promise("RW-82", "a write to page 4"):
        undisturbed(uffd, partial(poke, area.page(4).start, NEW))
        expect_left(area, {0, 3, 5}, "afterwards")
        expect(peek(area.page(4).start, len(NEW)), NEW, "what was written")
    ctx.src.fill()
    expect(got, peek(ctx.src.page(2).start, len(NEW)), "RW-82: what the read of page 2 got")
    swapped = Pagemap.have(area.range, uapi.PM_SWAP)
    expect([swapped[page] for page in (0, 3, 5)], [True] * 3, "RW-82: whether pages 0, 3 and 5 are still in swap")
    uffd.resolve(area.page(5))
    uffd.rwprotect(area.page(1, 2))
    expect_left(area, {0, 1, 2, 3}, "RW-82: after page 5, in swap, was resolved, and pages 1 and 2 protected")
    mend(ctx, area, 4)
    undisturbed(uffd, lambda: area.expect_pattern_of(area))
    expect_left(area, set(), "RW-82: after reads of all")


# ---- what has no effect --------------------------------------------------------------------------------------------


@uffd_case(
    "async-rwp-sigbus", mem=ALL, features=ASYNC_RWP | Feature.SIGBUS, pages=4, rows=("RW-83",), kind=Kind.DETAIL
)
def test_async_rwp_sigbus(ctx: Context) -> None:
    """UFFD_FEATURE_SIGBUS sends no signal where the kernel lets accesses go on by itself."""
    area = rwp_protected(ctx)
    expect(signals(ctx.uffd, area.page(1, 2), area.page_size, write=False), [None, None], "RW-83: signals of two reads")
    expect_left(area, {0, 3}, "RW-83: after reads of pages 1 and 2")
    expect(signals(ctx.uffd, area.page(3), area.page_size, write=True), [None], "RW-83: signals of a write")
    with promise("RW-83", "read(2)"):
        undisturbed(ctx.uffd, partial(piped, area.start, None))
    expect_left(area, set(), "RW-83: after accesses to all pages")
    area.expect_pattern_of(area)


@uffd_case("async-rwp-dontwake", mem=ALL, features=ASYNC_RWP, pages=4, rows=("RW-83",), kind=Kind.DETAIL)
def test_async_rwp_dontwake(ctx: Context) -> None:
    """UFFDIO_WAKE protects nothing and frees nothing, and DONTWAKE makes no difference to who need not be woken."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    uffd.wake(area.range)
    expect_left(area, {0, 1, 2, 3}, "RW-83: after UFFDIO_WAKE")
    uffd.rwprotect(area.page(1), RwprotectMode.DONTWAKE)
    expect_left(area, {0, 2, 3}, "RW-83: after page 1 was resolved with DONTWAKE")
    undisturbed(uffd, partial(touch, area.page(1, 2), area.page_size, write=True))
    expect_left(area, {0, 3}, "RW-83: after writes to pages 1 and 2")
    uffd.wake(area.range)
    expect_left(area, {0, 3}, "RW-83: after UFFDIO_WAKE")
    undisturbed(uffd, lambda: area.expect_pattern_of(area))


# ---- fork ----------------------------------------------------------------------------------------------------------


@uffd_case("async-rwp-fork", mem=ALL, features=ASYNC_RWP, pages=4, spare_hugepages=8, rows=("RW-84",), kind=Kind.DETAIL)
def test_async_rwp_fork(ctx: Context) -> None:
    """A forked child is not tracked; its parent is as before."""
    area = rwp_protected(ctx)
    undisturbed(ctx.uffd, partial(touch, area.page(3), area.page_size))

    def child(channel: Channel) -> None:
        Pagemap.expect_protected(area, (), "in the child")
        area.expect_pattern_of(area)
        touch(area.range, area.page_size, write=True)
        channel.send()

    with Child(child) as process:
        process.receive()
        ctx.uffd.expect_no_message()
        expect_left(area, {0, 1, 2}, "RW-84: in the parent, after accesses of the child")
        undisturbed(ctx.uffd, partial(touch, area.page(1), area.page_size, write=True))
        expect_left(area, {0, 2}, "RW-84: in the parent, after a write to page 1")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


@uffd_case(
    "async-rwp-fork-event",
    mem=ALL,
    features=ASYNC_RWP | Feature.EVENT_FORK,
    pages=4,
    spare_hugepages=8,
    rows=("RW-84",),
    kind=Kind.DETAIL,
)
def test_async_rwp_fork_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_FORK the child is tracked on its own, without a message, as its parent is."""
    area = rwp_protected(ctx)
    undisturbed(ctx.uffd, partial(touch, area.page(3), area.page_size))

    def child(channel: Channel) -> None:
        Pagemap.expect_protected(area, {0, 1, 2}, "in the child")
        touch(area.page(0), area.page_size, write=True)
        Pagemap.expect_protected(area, {1, 2}, "in the child after a write to page 0")
        touch(area.page(2), area.page_size)
        Pagemap.expect_protected(area, {1}, "in the child after a read of page 2")
        area.expect_pattern_of(area)
        channel.send()

    with ctx.handler(src=None) as handler, Child(child) as process:
        process.receive()
    expect((handler.stats.messages, handler.stats.fork), (1, 1), "messages, UFFD_EVENT_FORK among them")
    expect_left(area, {0, 1, 2}, "RW-84: in the parent, after accesses of the child")
    undisturbed(ctx.uffd, partial(touch, area.page(1), area.page_size, write=True))
    expect_left(area, {0, 2}, "RW-84: in the parent, after a write to page 1")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))
