# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_RWPROTECT: who is trapped by the protection, what the message says, and who is let go on."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, HUGETLB_PRIVATE, MISSING, NEW, PROT_EXEC, PROT_READ, PROT_WRITE, READ_TRAPPED, RWP, SHMEM_PRIVATE,
    SYNC_RWP, WRITE_TRAPPED, Area, Channel, Child, Context, Fault, Feature, KernelError, Pagemap, Range, RwprotectMode,
    Skip, Uffd, cached, eventually, expect, expect_rwp_free, expect_rwp_trapped, faulting, ffi, huge_area, page_frames,
    peek, pmd_mapped, poke, promise, protect, put_back, rwp_filled, rwp_protected, rwp_trapped, trapped_at, undisturbed,
)  # fmt: skip

DONTWAKE = RwprotectMode.DONTWAKE


# ---- one access ----------------------------------------------------------------------------------------------------


def expect_each_access(ctx: Context, area: Area, page: int, *, protected: set[int]) -> None:
    """Read and write the first, a middle and the last byte of a protected page, and resolve it each time."""
    uffd, where = ctx.uffd, area.page(page)
    for offset in (0, where.len // 2 + 3, where.len - 1):
        for write in (False, True):
            address = where.start + offset
            old = peek(area.alias_page(page).start + offset) if area.mem.shared else b""
            new = b"\x5a" if write else b""
            with promise("RW-01", f"page {page}, byte {offset}, {'write' if write else 'read'}"):
                with trapped_at(uffd, address, where, write=new) as waiter:
                    uffd.expect_still_asleep(1)
                    Pagemap.expect_protected(area, protected, "while the access waits")
                    if area.mem.shared:
                        area.expect_pattern(area.alias)
                    expect(waiter.done, False, "the access has ended, before it is resolved")
                    uffd.resolve(where)
                uffd.expect_still_asleep(0)
            with promise("RW-02", f"page {page}, byte {offset}, {'write' if write else 'read'}"):
                Pagemap.expect_protected(area, protected - {page}, "after the page was resolved")
                if write:
                    expect(peek(address), new, "the byte that was written")
                    put_back(area, page)
                else:
                    expect(waiter.result(), peek(address), "the byte that was read")
                    expect(waiter.result(), old or waiter.result(), "the byte that was read")
                area.expect_pattern_of(area, page, 1)
                expect_rwp_free(uffd, area, page)
            uffd.rwprotect(where)


@uffd_case("rwprotect-traps", mem=ALL, features=SYNC_RWP, pages=5, rows=("RW-01", "RW-02", "RW-14"))
def test_rwprotect_traps(ctx: Context) -> None:
    """An access to a protected page is told in one message and waits; resolved it goes on, to the same page."""
    area = rwp_filled(ctx)
    before = page_frames(area.range)
    ctx.uffd.rwprotect(area.page(1, 3))
    for page in (1, 2, 3):
        expect_each_access(ctx, area, page, protected={1, 2, 3})
    expect_rwp_free(ctx.uffd, area, 0, 4)
    expect(page_frames(area.range), before, "page frames")
    ctx.uffd.resolve(area.page(2))
    Pagemap.expect_protected(area, {1, 3}, "after page 2 was resolved, which nobody touches")
    expect_rwp_free(ctx.uffd, area, 2)
    ctx.uffd.resolve(area.range)
    area.expect_pattern_of(area)
    expect(page_frames(area.range), before, "page frames, afterwards")


@uffd_case("rwprotect-thp-traps", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("RW-01", "RW-02"))
def test_rwprotect_thp_traps(ctx: Context) -> None:
    """A transparent huge page is protected and resolved whole, as it is: same memory, same bytes, and in one piece."""
    area = huge_area(ctx, 2)
    count = area.nr_pages // 2
    first, second = area.page(0, count), area.page(count, count)
    ctx.uffd.register(area.range, RWP)
    before = page_frames(area.range)
    for page in (0, 7, count - 1):
        for write in (False, True):
            ctx.uffd.rwprotect(first)
            expect(pmd_mapped(area.range), area.range.len, "bytes mapped by huge pages, protected")
            Pagemap.expect_protected(area, range(count), "after protecting the first huge page")
            undisturbed(ctx.uffd, partial(area.expect_pattern_of, area, count))
            address = area.page(page).end - 1
            with promise("RW-01", f"base page {page}, {'write' if write else 'read'}"):
                with trapped_at(ctx.uffd, address, area.page(page), write=b"\x5a" if write else b""):
                    ctx.uffd.expect_still_asleep(1)
                    Pagemap.expect_protected(area, range(count), "while the access waits")
                    ctx.uffd.resolve(first)
                ctx.uffd.expect_still_asleep(0)
            with promise("RW-02", f"base page {page}, {'write' if write else 'read'}"):
                Pagemap.expect_protected(area, (), "after resolving the huge page")
                expect(pmd_mapped(area.range), area.range.len, "bytes mapped by huge pages, resolved")
                if write:
                    expect(peek(address), b"\x5a", "the byte that was written")
                    put_back(area, page)
                area.expect_pattern_of(area)
                expect(page_frames(area.range), before, "page frames")
    ctx.uffd.rwprotect(area.range)
    ctx.uffd.resolve(second)
    Pagemap.expect_protected(area, range(count), "after resolving the second huge page of two")
    expect_rwp_free(ctx.uffd, area, count, area.nr_pages - 1)
    expect(pmd_mapped(area.range), area.range.len, "bytes mapped by huge pages")


RETURNS = {"x86_64": b"\xc3"}
"""The instruction that returns from a function, where what is written can be run at once."""


@uffd_case("rwprotect-fetch", mem=ALL, features=SYNC_RWP, pages=3, rows=("RW-01", "RW-02"))
def test_rwprotect_fetch(ctx: Context) -> None:
    """To run code in a protected page waits as well; the message says no more than that of a read."""
    if platform.machine() not in RETURNS:
        raise Skip(f"no code to run on {platform.machine()}")
    area = ctx.dst
    area.fill()
    code = RETURNS[platform.machine()]
    at = area.page(1).start + 64
    poke(at, code)
    try:
        protect(area.range, PROT_READ | PROT_WRITE | PROT_EXEC)
    except KernelError as error:
        raise Skip(f"{error}: memory that can be both written and run is forbidden here") from None
    ctx.uffd.register(area.range, RWP)
    run = ffi.cast("void (*)(void)", at)
    run()
    ctx.uffd.rwprotect(area.range)
    with promise("RW-01"), faulting(ctx.uffd, at, at=area.page(1).start, call=run, flags=READ_TRAPPED):
        for other in (0, 2):
            ctx.uffd.resolve(area.page(other))
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_protected(area, {1}, "while it waits")
        ctx.uffd.resolve(area.page(1))
    with promise("RW-02"):
        undisturbed(ctx.uffd, run)
        expect(peek(at), code, "the code")
        Pagemap.expect_protected(area, (), "after it was resolved")


@uffd_case(
    "rwprotect-address",
    mem=ALL,
    variants=("page", "page, thread", "exact", "exact, thread"),
    features=SYNC_RWP | Feature.EXACT_ADDRESS | Feature.THREAD_ID,
    pages=3,
    rows=("RW-20",),
)
def test_rwprotect_address(ctx: Context, variant: str) -> None:
    """The message names the page, on huge pages the huge one, or the exact address; and the thread, if asked to."""
    features = SYNC_RWP
    features |= Feature.EXACT_ADDRESS if "exact" in variant else Feature(0)
    features |= Feature.THREAD_ID if "thread" in variant else Feature(0)
    area = ctx.dst
    area.fill()
    with Uffd.open(features) as uffd:
        uffd.register(area.range, RWP)
        for page in (0, 1, 2):
            expect_told(uffd, area, area.page(page), features, unit=area.page(page).start)
        area.expect_pattern_of(area)


def expect_told(uffd: Uffd, area: Area, where: Range, features: Feature, *, unit: int) -> None:
    """Access bytes of a page, which is protected before and resolved each time, and look at all of the message."""
    for offset in (0, where.len // 2 + 5, where.len - 1):
        for write in (b"", b"\x5a"):
            address = where.start + offset
            told = address if Feature.EXACT_ADDRESS in features else unit
            old = peek(address)
            uffd.rwprotect(area.range)
            with promise("RW-20", f"byte {offset}, {'write' if write else 'read'}"):
                with trapped_at(uffd, address, where, write=write, told=told) as waiter:
                    tid = waiter.tid if Feature.THREAD_ID in features else 0
                    flags = WRITE_TRAPPED if write else READ_TRAPPED
                    expect(waiter.fault, Fault(told, flags, tid), "message")
                    uffd.expect_still_asleep(1)
                    uffd.resolve(area.range)
                uffd.expect_no_message()
            poke(address, old)


@uffd_case(
    "rwprotect-thp-address",
    mem=(ANON,),
    features=SYNC_RWP | Feature.EXACT_ADDRESS | Feature.THREAD_ID,
    needs=("thp",),
    pages=1,
    rows=("RW-20",),
)
def test_rwprotect_thp_address(ctx: Context) -> None:
    """In a transparent huge page the message names the base page, or the exact address."""
    area = huge_area(ctx)
    for features in (SYNC_RWP, SYNC_RWP | Feature.EXACT_ADDRESS | Feature.THREAD_ID):
        with Uffd.open(features) as uffd:
            uffd.register(area.range, RWP)
            for page in (0, 7, area.nr_pages - 1):
                expect_told(uffd, area, area.page(page), features, unit=area.page(page).start)
        expect(pmd_mapped(area.range), area.range.len, "bytes mapped by huge pages")
    area.expect_pattern_of(area)


# ---- waking --------------------------------------------------------------------------------------------------------


@uffd_case("rwprotect-dontwake", mem=ALL, features=SYNC_RWP, pages=5, rows=("RW-03",))
def test_rwprotect_dontwake(ctx: Context) -> None:
    """Resolving with DONTWAKE makes pages accessible and leaves threads asleep, until UFFDIO_WAKE of just theirs."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    with ExitStack() as stack:
        accesses = ((1, False), (2, True), (3, False), (0, False))
        waiters = [stack.enter_context(rwp_trapped(uffd, area, page, write=write)) for page, write in accesses]
        uffd.rwprotect(area.page(1, 3), DONTWAKE)
        Pagemap.expect_protected(area, {0, 4}, "after resolving pages 1 to 3 with DONTWAKE")
        uffd.expect_still_asleep(4)
        expect_rwp_free(uffd, area, 1, 2, 3)
        area.expect_pattern_of(area, 1, 3)
        uffd.expect_still_asleep(4)
        uffd.wake(area.page(2))
        waiters[1].result()
        uffd.expect_still_asleep(3)
        uffd.wake(area.page(1, 3))
        for waiter in waiters[:3]:
            waiter.result()
        uffd.expect_still_asleep(1)
        Pagemap.expect_protected(area, {0, 4}, "after UFFDIO_WAKE")
        uffd.resolve(area.page(0))
    uffd.expect_no_message()
    uffd.resolve(area.page(4))
    put_back(area, 2)
    area.expect_pattern_of(area)


@uffd_case("rwprotect-wake-alone", mem=ALL, features=SYNC_RWP, pages=3, rows=("RW-04",))
def test_rwprotect_wake_alone(ctx: Context) -> None:
    """A thread that is only woken is trapped anew, by a message like the first; to protect again wakes nobody."""
    area, uffd, page = rwp_protected(ctx), ctx.uffd, ctx.dst.page(1)
    for write, flags in ((False, READ_TRAPPED), (True, WRITE_TRAPPED)):
        with promise("RW-04", "write" if write else "read"), rwp_trapped(uffd, area, 1, write=write):
            for again in (page, area.range, area.page(0, 2), area.page(1, 2)):
                uffd.rwprotect(again)
                uffd.expect_still_asleep(1)
            for beside in (area.page(0), area.page(2)):
                uffd.wake(beside)
                uffd.expect_still_asleep(1)
            for where in (page, area.range):
                uffd.wake(where)
                uffd.wait_fault(page.start, flags)
                uffd.expect_still_asleep(1)
            Pagemap.expect_protected(area, {0, 1, 2}, "while it waits")
            uffd.resolve(page)
        uffd.expect_no_message()
        uffd.rwprotect(page)
    uffd.resolve(area.range)
    put_back(area, 1)
    area.expect_pattern_of(area)


@uffd_case("rwprotect-wakes", mem=ALL, features=SYNC_RWP, pages=5, rows=("RW-18",))
def test_rwprotect_wakes(ctx: Context) -> None:
    """Each thread that is trapped sends a message of its own; resolving wakes all of its range, and nobody beside."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    with ExitStack() as stack:
        # Of two threads in a page one is at its end: on huge pages far away from the start.
        inside = [stack.enter_context(rwp_trapped(uffd, area, page)) for page in (1, 2, 3)]
        inside += [
            stack.enter_context(trapped_at(uffd, area.page(page).end - 1, area.page(page))) for page in (1, 2, 3)
        ]
        inside.append(stack.enter_context(rwp_trapped(uffd, area, 2, write=True)))
        outside = [stack.enter_context(trapped_at(uffd, area.page(0).end - 1, area.page(0)))]
        outside.append(stack.enter_context(rwp_trapped(uffd, area, 4)))
        uffd.expect_still_asleep(9)
        uffd.resolve(area.page(1, 3))
        uffd.expect_asleep(2)
        for waiter in inside:
            waiter.result()
        uffd.expect_still_asleep(2)
        Pagemap.expect_protected(area, {0, 4}, "after resolving pages 1 to 3")
        for waiter, page in zip(outside, (0, 4), strict=True):
            uffd.resolve(area.page(page))
            waiter.result()
    uffd.expect_still_asleep(0)
    put_back(area, 2)
    area.expect_pattern_of(area)


@uffd_case("rwprotect-threads", mem=ALL, features=SYNC_RWP, pages=3, rows=("RW-18",))
def test_rwprotect_threads(ctx: Context) -> None:
    """Of threads in one page each sends a message; resolving another page wakes none of them, resolving theirs all."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    for page in (0, 1, 2):
        with promise("RW-18", f"page {page}"), ExitStack() as stack:
            for write in (False, True, False, False):
                stack.enter_context(rwp_trapped(uffd, area, page, write=write))
            for other in {0, 1, 2} - {page}:
                uffd.resolve(area.page(other))
                uffd.expect_still_asleep(4)
            uffd.resolve(area.page(page))
            uffd.expect_asleep(0)
        uffd.expect_no_message()
        put_back(area, page)
        area.expect_pattern_of(area)
        uffd.rwprotect(area.range)


@uffd_case("rwprotect-thp-wakes", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("RW-18",))
def test_rwprotect_thp_wakes(ctx: Context) -> None:
    """Of threads in two transparent huge pages exactly those wake whose base page, or huge page, is resolved."""
    area, uffd = huge_area(ctx, 2), ctx.uffd
    count = area.nr_pages // 2
    uffd.register(area.range, RWP)
    uffd.rwprotect(area.range)
    with ExitStack() as stack:
        places = (0, 7, count - 1, count, area.nr_pages - 1)
        waiters = {page: stack.enter_context(rwp_trapped(uffd, area, page)) for page in places}
        uffd.expect_still_asleep(5)
        uffd.resolve(area.page(0, count))
        for page in (0, 7, count - 1):
            waiters[page].result()
        uffd.expect_still_asleep(2)
        Pagemap.expect_protected(area, range(count, 2 * count), "after resolving the first huge page")
        uffd.resolve(area.page(2 * count - 1))
        waiters[2 * count - 1].result()
        uffd.expect_still_asleep(1)
        Pagemap.expect_protected(area, range(count, 2 * count - 1), "after resolving the last base page")
        uffd.resolve(area.page(count + 1, count - 2))
        uffd.expect_still_asleep(1)
        Pagemap.expect_protected(area, {count}, "after resolving all but the second huge page's first base page")
        uffd.resolve(area.page(count))
    area.expect_pattern_of(area)


@uffd_case("rwprotect-unread", mem=ALL, features=SYNC_RWP, pages=3, rows=("RW-19",), kind=Kind.DETAIL)
def test_rwprotect_unread(ctx: Context) -> None:
    """A message that was not read yet is gone when its page is resolved, or unregistered; only before poll tells it."""
    area, uffd = rwp_protected(ctx, MISSING | RWP), ctx.uffd
    ends: dict[str, Callable[[], object]] = {
        "resolved": lambda: uffd.resolve(area.page(1)),
        "resolved with its neighbours": lambda: uffd.resolve(area.range),
        "unregistered": lambda: uffd.release(area.range),
    }
    for what, end in ends.items():
        uffd.rwprotect(area.range)
        with promise("RW-19", what):
            expect(uffd.readable(), False, "POLLIN before the access")
            with faulting(uffd, area.page(1).start, read=False):
                expect(uffd.readable(), True, "POLLIN while the message is unread")
                expect(uffd.fdinfo.pending, 1, "unread messages (pending: of fdinfo)")
                uffd.resolve(area.page(0))
                expect(uffd.readable(), True, "POLLIN after another page was resolved")
                end()
            expect(uffd.readable(), False, "POLLIN afterwards")
            uffd.expect_still_asleep(0)
        if what == "resolved":
            uffd.rwprotect(area.range)
            expect_one_unread(uffd, area)
    area.expect_pattern_of(area)


def expect_one_unread(uffd: Uffd, area: Area) -> None:
    """Assert that of three unread messages just that one is gone whose page is resolved, in the middle of the queue."""
    with (
        faulting(uffd, area.page(0).start, read=False),
        faulting(uffd, area.page(1).start, read=False) as waiter,
        faulting(uffd, area.page(2).start, read=False) as last,
    ):
        for thread in (waiter, last):
            thread.expect_sleeping()
        eventually(lambda: uffd.fdinfo.pending == 3, "three unread messages (pending: of fdinfo)")
        uffd.resolve(area.page(1))
        waiter.result()
        told = sorted((message for message in uffd.read(8) if isinstance(message, Fault)), key=lambda m: m.address)
        expect(told, [Fault(area.page(page).start, READ_TRAPPED) for page in (0, 2)], "messages left")
        uffd.expect_still_asleep(2)
        uffd.resolve(area.range)


@uffd_case(
    "rwprotect-unread-async",
    mem=(ANON,),
    features=SYNC_RWP | Feature.RWP_ASYNC,
    pages=3,
    rows=("RW-19",),
    kind=Kind.DETAIL,
)
def test_rwprotect_unread_async(ctx: Context) -> None:
    """A message that was not read yet is gone when UFFDIO_SET_MODE lets accesses go on by themselves."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    uffd.set_mode(disable=Feature.RWP_ASYNC)
    uffd.rwprotect(area.range)
    with faulting(uffd, area.page(1).start, read=False):
        expect(uffd.readable(), True, "POLLIN while the message is unread")
        uffd.set_mode(enable=Feature.RWP_ASYNC)
    expect(uffd.readable(), False, "POLLIN afterwards")
    uffd.expect_still_asleep(0)
    Pagemap.expect_protected(area, {0, 2}, "after the access went on")
    area.expect_pattern_of(area)


# ---- pages shared with a child process -----------------------------------------------------------------------------


@uffd_case(
    "rwprotect-shared-with-child",
    mem=(ANON, SHMEM_PRIVATE, HUGETLB_PRIVATE),
    variants=("protected after fork", "protected before fork"),
    features=SYNC_RWP,
    pages=5,
    spare_hugepages=6,
    rows=("RW-17",),
    kind=Kind.DETAIL,
)
def test_rwprotect_shared_with_child(ctx: Context, variant: str) -> None:
    """A page shared with a child process until written stays so when resolved: who writes gets a copy of his own."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    if "before" in variant:
        uffd.rwprotect(area.range)

    def life(channel: Channel) -> None:
        channel.receive()
        area.expect_pattern_of(area, 0, 3)  # page 1 was written by the parent, page 2 only after it was resolved
        poke(area.page(3).start, NEW)
        channel.send()
        channel.receive()
        area.expect_pattern_of(area, 0, 3)
        expect(peek(area.page(3).start, len(NEW)), NEW, "what the child wrote")
        area.expect_pattern_of(area, 4, 1)

    with Child(life) as child:
        if "after" in variant:
            uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, range(5), "of the parent")
        expect_rwp_trapped(uffd, area, 1, write=True)
        uffd.resolve(area.page(2))
        undisturbed(uffd, partial(poke, area.page(2).start, NEW))
        Pagemap.expect_protected(area, {0, 3, 4}, "after resolving pages 1 and 2")
        child.send()
        child.receive()
        with promise("RW-17", "written by the child, read by the parent"):
            expect_rwp_trapped(uffd, area, 3)
            area.expect_pattern_of(area, 3, 1)
        expect_rwp_trapped(uffd, area, 4)
        undisturbed(uffd, partial(poke, area.page(4).start, NEW))
        Pagemap.expect_protected(area, {0}, "after resolving pages 3 and 4, too")
        for page in (1, 2, 4):
            expect(peek(area.page(page).start, len(NEW)), NEW, f"what the parent wrote to page {page}")
            put_back(area, page)
        child.send()
    uffd.resolve(area.range)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-thp-shared-with-child",
    mem=(ANON,),
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-17",),
    kind=Kind.DETAIL,
)
def test_rwprotect_thp_shared_with_child(ctx: Context) -> None:
    """A huge page shared with a child process until written stays so when resolved, whole or in part."""
    uffd = ctx.uffd
    for whole in (True, False):
        area = huge_area(ctx)
        uffd.register(area.range, RWP)

        def life(channel: Channel, area: Area = area) -> None:
            channel.receive()
            area.expect_pattern_of(area)
            poke(area.page(9).start, NEW)

        with promise("RW-17", "whole" if whole else "in part"), Child(life) as child:
            uffd.rwprotect(area.range)
            Pagemap.expect_protected(area, range(area.nr_pages), "of the parent")
            resolved = area.range if whole else area.page(7, 3)
            with rwp_trapped(uffd, area, 7, write=True):
                uffd.resolve(resolved)
            left = [] if whole else [page for page in range(area.nr_pages) if page not in (7, 8, 9)]
            Pagemap.expect_protected(area, left, "after resolving")
            undisturbed(uffd, partial(poke, area.page(8).start, NEW))
            child.send()
            child.wait()
            undisturbed(uffd, partial(area.expect_pattern_of, area, 9, 1))
            uffd.resolve(area.range)
            put_back(area, 7, 8)
            area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-private-file",
    mem=(SHMEM_PRIVATE, HUGETLB_PRIVATE),
    features=SYNC_RWP,
    pages=4,
    spare_hugepages=4,
    rows=("RW-17",),
    kind=Kind.DETAIL,
)
def test_rwprotect_private_file(ctx: Context) -> None:
    """A page that a private mapping shares with its file stays so when resolved: a write makes a private copy."""
    area, uffd = ctx.dst, ctx.uffd
    with cached(ctx, mode=RWP) as where:
        undisturbed(uffd, partial(area.expect_pattern_of, area))
        uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, range(4), "of pages of the file")
        expect_rwp_trapped(uffd, area, 0)
        with promise("RW-17", "written when resolved"):
            expect_rwp_trapped(uffd, area, 1, write=True)
            area.expect_pattern(where)
        with promise("RW-17", "resolved, then written"):
            uffd.resolve(area.range)
            for page in (0, 2, 3):
                undisturbed(uffd, partial(poke, area.page(page).start, NEW))
            area.expect_pattern(where)
        Pagemap.expect_protected(area, (), "after all were resolved")
        for page in range(4):
            expect(peek(area.page(page).start, len(NEW)), NEW, f"what was written to page {page}")
            put_back(area, page)
        area.expect_pattern_of(area)
