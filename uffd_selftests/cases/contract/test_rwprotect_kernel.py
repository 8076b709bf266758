# SPDX-License-Identifier: GPL-2.0-only
"""Read-write protection and the kernel's own accesses: system calls, arguments of requests; other programs' handles."""

from __future__ import annotations

from contextlib import ExitStack
from ctypes import addressof, sizeof, string_at
from errno import EINVAL, ENOENT
from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ACCESSED, AGAINST_ACCESS, ALL, ANON, ASYNC_RWP, DEFAULT_FLAGS, FUTEX_CHANGE, KERNEL_ACCESSES, KERNEL_FAULTS,
    MISSING, MOVE, NEW, PAGE_SIZE, READ_TRAPPED, RWP, SYNC_RWP, WP, WRITE, WRITEPROTECT, WRITE_TRAPPED, Advice, Area,
    Context, Fault, Feature, Ia32, PagefaultFlag, Pagemap, Removed, RwprotectMode, Uffd, Waiter, advise, become_nobody,
    direct_accesses, direct_disk, eventually, expect, expect_accessed, expect_calls_trapped, expect_rwp_free,
    expect_rwp_trapped, expect_untold, fails, faulting, huge_area, parse_message, peek, poke, prepared, promise,
    refuses, run_as, rwp_protected, touch, trapped, uapi, undisturbed,
)  # fmt: skip

KINDS = tuple(KERNEL_ACCESSES)
CALLS = "RW-62 RW-63"


# ---- system calls --------------------------------------------------------------------------------------------------


@uffd_case(
    "rwprotect-calls",
    mem=ALL,
    variants=KINDS,
    features=SYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-62", "RW-63"),
)
def test_rwprotect_calls(ctx: Context, variant: str) -> None:
    """A system call that reaches for a protected page is told as a read or a write, waits, and ends with its bytes."""
    expect_calls_trapped(CALLS, ctx, ctx.dst, AGAINST_ACCESS, *KERNEL_ACCESSES[variant])


@uffd_case(
    "rwprotect-calls-thp",
    mem=(ANON,),
    variants=KINDS,
    features=SYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-62", "RW-63"),
    kind=Kind.DETAIL,
)
def test_rwprotect_calls_thp(ctx: Context, variant: str) -> None:
    """The same in a transparent huge page, of which the one base page is resolved and the others stay protected."""
    for access in KERNEL_ACCESSES[variant]:
        expect_calls_trapped(CALLS, ctx, huge_area(ctx), AGAINST_ACCESS, access)


@uffd_case(
    "rwprotect-calls-direct",
    mem=ALL,
    features=SYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-63",),
    kind=Kind.DETAIL,
)
def test_rwprotect_calls_direct(ctx: Context) -> None:
    """O_DIRECT waits for a protected page before the disk reaches it, both ways."""
    with direct_disk() as disk:
        expect_calls_trapped(CALLS, ctx, ctx.dst, AGAINST_ACCESS, *direct_accesses(disk))


@uffd_case(
    "rwprotect-calls-async",
    mem=ALL,
    variants=KINDS,
    features=ASYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-78",),
    kind=Kind.DETAIL,
)
def test_rwprotect_calls_async(ctx: Context, variant: str) -> None:
    """With RWP_ASYNC a system call goes through untold, and takes the protection of just the pages it reached."""
    area, everything = ctx.dst, set(range(ctx.nr_pages))
    area.fill()
    with Uffd.open(ctx.features, KERNEL_FAULTS) as uffd:
        uffd.register(area.range, RWP)
        for access in KERNEL_ACCESSES[variant]:
            for pages in access.pages(1, 2):
                address = access.address(area, *pages)
                with promise("RW-78", f"{access.name} at {pages}"), prepared(access, address):
                    uffd.rwprotect(area.range)
                    read = undisturbed(uffd, partial(access.call, address))
                    # before anybody else looks there
                    Pagemap.expect_protected(area, everything - set(pages), "after the call")
                    expect_accessed(area, pages, "after the call")
                    if not access.writes:
                        expect(read, peek(address, access.length), "what the call read")
                    expect(peek(address, len(access.stores)), access.stores, "what the call wrote")
        area.expect_pattern_of(area)


FUTEX = Defect(
    id="D-RW-62",
    summary="A futex that the kernel itself changes (FUTEX_WAKE_OP, FUTEX_LOCK_PI) cannot lie in a protected page: the "
    "call fails with EFAULT, and whoever could resolve it is not told.",
    kernels="7.3.4",
    advice="Keep such futexes out of memory with synchronous read-write protection.",
    shows="without one, the access failed: futex.*EFAULT",
)


@uffd_case(
    "rwprotect-futex",
    mem=ALL,
    features=SYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-62",),
    defect=FUTEX,
)
def test_rwprotect_futex(ctx: Context) -> None:
    """A futex in a protected page that the kernel changes waits until the page is resolved."""
    expect_calls_trapped(CALLS, ctx, ctx.dst, AGAINST_ACCESS, FUTEX_CHANGE)


@uffd_case(
    "rwprotect-futex-async",
    mem=ALL,
    features=ASYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-62", "RW-78"),
    kind=Kind.DETAIL,
)
def test_rwprotect_futex_async(ctx: Context) -> None:
    """With RWP_ASYNC a futex in a protected page is changed by the kernel at once."""
    area = rwp_protected(ctx)
    with promise("RW-78"):
        expect_untold(ctx.uffd, area, FUTEX_CHANGE, (1,))
        Pagemap.expect_protected(area, {0, 2, 3}, "after the call")


# ---- requests ------------------------------------------------------------------------------------------------------


@uffd_case(
    "rwprotect-copy-source",
    mem=ALL,
    features=SYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=1,
    rows=("RW-69", "CP-31"),
    kind=Kind.DETAIL,
)
def test_rwprotect_copy_source(ctx: Context) -> None:
    """UFFDIO_COPY waits at each protected page of its source, and goes on where it was when that is resolved."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with Uffd.open(ctx.features, KERNEL_FAULTS) as monitor:
        ctx.src.fill()
        monitor.register(ctx.src.range, RWP)
        monitor.rwprotect(ctx.src.range)
        with Waiter(lambda: ctx.uffd.copy(ctx.dst.start, ctx.src.start, 3 * ctx.page_size)):
            for page in range(3):
                with promise("RW-69", f"page {page}"):
                    monitor.wait_fault(ctx.src.page(page).start, READ_TRAPPED)
                    monitor.expect_still_asleep(1)
                    Pagemap.expect_present(ctx.dst, *range(page))
                    Pagemap.expect_protected(ctx.src, range(page, 4), "while the copy waits")
                    monitor.resolve(ctx.src.page(page))
        monitor.expect_still_asleep(0)
        Pagemap.expect_present(ctx.dst, 0, 1, 2)
        Pagemap.expect_protected(ctx.src, {3}, "after the copy")
        ctx.dst.expect_pattern_of(ctx.src, 0, 3)


@uffd_case(
    "rwprotect-arguments",
    mem=(ANON,),
    features=SYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-69",),
    kind=Kind.DETAIL,
)
def test_rwprotect_arguments(ctx: Context) -> None:
    """A request whose argument lies in a protected page waits until that is resolved, and writes its output there."""
    src, dst, length = ctx.src.page(1), ctx.dst.page(2), PAGE_SIZE
    where = uapi.uffdio_range(dst.start, length)
    requests = {
        uapi.UFFDIO_COPY: uapi.uffdio_copy(dst.start, src.start, length, 0, 0),
        uapi.UFFDIO_ZEROPAGE: uapi.uffdio_zeropage(where, 0, 0),
    }
    if Feature.MOVE in ctx.uffd.offered:
        requests[uapi.UFFDIO_MOVE] = uapi.uffdio_move(dst.start, src.start, length, 0, 0)
    struct_at = ctx.allocate(3)
    struct_at.fill()
    moving = MOVE if uapi.UFFDIO_MOVE in requests else Feature(0)
    with Uffd.open(ctx.features | moving, KERNEL_FAULTS) as monitor, Uffd.open(moving) as uffd:
        monitor.register(struct_at.range, RWP)
        uffd.register(ctx.dst.range, MISSING)
        for request, argument in requests.items():
            with promise("RW-69", uapi.IOCTL_NAMES[request]):
                ctx.src.fill()
                given = string_at(addressof(argument), sizeof(argument))
                address = struct_at.page(1).end - len(given) + 8  # its last word, the output, is the next page's first
                poke(address, given)
                monitor.rwprotect(struct_at.range)
                with Waiter(partial(uffd.raw_ioctl, request, address)):
                    monitor.wait_fault(struct_at.page(1).start, READ_TRAPPED)
                    monitor.resolve(struct_at.page(1))
                    monitor.wait_fault(struct_at.page(2).start, WRITE_TRAPPED)
                    Pagemap.expect_protected(struct_at, {0, 2}, "while the request waits")
                    monitor.resolve(struct_at.page(2))
                monitor.expect_still_asleep(0)
                after = peek(address, len(given))
                expect(after[:-8], given[:-8], "the argument but its output")
                expect(int.from_bytes(after[-8:], "little"), length, "the output")
                expect(any(peek(dst.start, length)), request != uapi.UFFDIO_ZEROPAGE, "whether there is data")
                monitor.resolve(struct_at.range)
                advise(ctx.dst.range, Advice.DONTNEED)


# ---- messages of several kinds -------------------------------------------------------------------------------------


@uffd_case(
    "rwprotect-queue",
    mem=(ANON,),
    features=SYNC_RWP | Feature.EVENT_REMOVE,
    variants=("one by one", "at once"),
    pages=6,
    rows=("RW-88",),
    kind=Kind.DETAIL,
)
def test_rwprotect_queue(ctx: Context, variant: str) -> None:
    """Messages of protected pages queue with all others: first come, first served, faults before events."""
    uffd, area = ctx.uffd, ctx.dst
    area.fill(0, 4)
    uffd.register(area.range, RWP | MISSING)
    uffd.rwprotect(area.range)
    Pagemap.expect_protected(area, range(4), "after UFFDIO_RWPROTECT")
    accesses = ((4, False, 0), (0, False, READ_TRAPPED), (1, True, WRITE_TRAPPED), (5, True, WRITE), (2, False, 8))
    expected = [Fault(area.page(page).start, PagefaultFlag(flags)) for page, _, flags in accesses]
    with ExitStack() as stack:
        for number, (page, write, _) in enumerate(accesses, 1):
            start = area.page(page).start
            stack.enter_context(Waiter(partial(poke, start, NEW) if write else partial(peek, start)))
            eventually(lambda number=number: uffd.fdinfo.pending == number, f"{number} faults to be pending")  # type: ignore[misc]
        stack.enter_context(Waiter(lambda: advise(area.page(3), Advice.DONTNEED)))
        eventually(lambda: refused(uffd, area), "the event")
        expect((uffd.fdinfo.pending, uffd.fdinfo.total), (5, 5), "pending and total faults beside an event")
        messages = []
        if variant == "at once":
            messages = uffd.read(10)
        else:
            for number in range(5):
                expect(uffd.readable(), True, f"POLLIN with {5 - number} faults unread")
                messages += uffd.read()
                expect((uffd.fdinfo.pending, uffd.fdinfo.total), (4 - number, 5), "pending and total faults")
            expect(uffd.readable(), True, "POLLIN with an event unread")
            messages += uffd.read()
        expect(messages, [*expected, Removed(area.page(3).start, area.page(3).end)], "messages, in their order")
        expect(uffd.readable(), False, "POLLIN with nothing unread")
        uffd.expect_still_asleep(5)
        eventually(lambda: not refused(uffd, area), "the event to be over")
        uffd.resolve(area.page(0))
        uffd.expect_still_asleep(4)
        uffd.zeropage(area.page(4, 2))
        uffd.expect_still_asleep(2)
        uffd.resolve(area.page(1, 2))
        uffd.expect_still_asleep(0)
    expect((peek(area.page(1).start, len(NEW)), peek(area.page(5).start, len(NEW))), (NEW, NEW), "what was written")


def refused(uffd: Uffd, area: Area) -> bool:
    """Whether requests are held up by an event: of a page that is protected already."""
    try:
        uffd.rwprotect(area.page(2))
    except OSError:
        return True
    return False


@uffd_case(
    "rwprotect-beside-wp",
    mem=ALL,
    features=SYNC_RWP | WRITEPROTECT,
    variants=("both told", "WP_ASYNC", "RWP_ASYNC", "WP_ASYNC, RWP_ASYNC"),
    pages=6,
    rows=("RW-85",),
    kind=Kind.DETAIL,
)
def test_rwprotect_beside_wp(ctx: Context, variant: str) -> None:
    """Write-protected and read-write-protected ranges of one handle keep their own rules, each told or not."""
    features, area = ctx.features, ctx.dst
    wp_told, rwp_told = "WP_ASYNC" not in variant.replace("RWP_ASYNC", ""), "RWP_ASYNC" not in variant
    features |= Feature(0) if wp_told else Feature.WP_ASYNC
    features |= Feature(0) if rwp_told else Feature.RWP_ASYNC
    if features & ~ctx.uffd.offered:
        raise AssertionError("features that are offered together with RWP")
    area.fill()
    with Uffd.open(features) as uffd:
        uffd.register(area.page(0, 3), WP)
        uffd.register(area.page(3, 3), RWP)
        for refusal, where in ((uffd.rwprotect, area.page(0)), (uffd.writeprotect, area.page(5))):
            with refuses(ENOENT):
                refusal(where)
        uffd.writeprotect(area.page(0, 3))
        uffd.rwprotect(area.page(3, 3))
        left = set(range(6))
        Pagemap.expect_protected(area, left, "after both")
        with promise("RW-85", "read of a write-protected page"):
            undisturbed(uffd, partial(touch, area.page(1), area.page_size))
            Pagemap.expect_protected(area, left, "after it was read")
        with promise("RW-85", "write to a write-protected page"):
            if wp_told:
                with trapped(uffd, area, 1):
                    uffd.unprotect(area.page(1))
            else:
                undisturbed(uffd, partial(poke, area.page(1).start, NEW))
            uffd.expect_still_asleep(0)
            left -= {1}
            Pagemap.expect_protected(area, left, "after it was written to")
        for page, write in ((4, False), (5, True)):
            with promise("RW-85", f"{'write to' if write else 'read of'} a read-write-protected page"):
                if rwp_told:
                    expect_rwp_trapped(uffd, area, page, write=write)
                else:
                    undisturbed(uffd, partial(touch, area.page(page), area.page_size, write=write))
                left -= {page}
                Pagemap.expect_protected(area, left, "after it")
        expect(peek(area.page(1).start, len(NEW)), NEW, "what was written")
        if not rwp_told:
            uffd.set_mode(disable=Feature.RWP_ASYNC)
            expect_rwp_trapped(uffd, area, 3, write=True)
            if not wp_told:
                undisturbed(uffd, partial(touch, area.page(0), area.page_size, write=True))


# ---- whose program -------------------------------------------------------------------------------------------------


@uffd_case("rwprotect-unprivileged", mem=(ANON,), features=SYNC_RWP, pages=4, rows=("RW-86",))
def test_rwprotect_unprivileged(ctx: Context) -> None:
    """A user without any privilege protects own memory, resolves, switches modes and asks what was accessed."""

    def life() -> None:
        area = ANON.allocate(4)
        area.fill()
        with Uffd.open(ASYNC_RWP) as uffd, promise("RW-86"):
            uffd.register(area.range, RWP | MISSING)
            uffd.set_mode(disable=Feature.RWP_ASYNC)
            uffd.rwprotect(area.range)
            Pagemap.expect_protected(area, range(4), "after UFFDIO_RWPROTECT")
            expect_rwp_trapped(uffd, area, 1)
            expect_rwp_trapped(uffd, area, 2, write=True)
            uffd.set_mode(enable=Feature.RWP_ASYNC)
            undisturbed(uffd, partial(touch, area.page(3), PAGE_SIZE))
            expect_accessed(area, {1, 2, 3}, "after three pages were accessed")
            uffd.unregister(area.range)
            Pagemap.expect_protected(area, (), "after UFFDIO_UNREGISTER")

    run_as(become_nobody, life)


@uffd_case(
    "rwprotect-ia32",
    mem=(ANON,),
    features=ASYNC_RWP,
    needs=("syscall",),
    pages=4,
    rows=("RW-87",),
    kind=Kind.DETAIL,
)
def test_rwprotect_ia32(ctx: Context) -> None:
    """A 32-bit program protects, is told, resolves and switches modes as a 64-bit one does."""
    area = ctx.dst
    area.fill()
    with Uffd.create() as other:
        answer = other.api(ASYNC_RWP)
    with Ia32() as ia32, Uffd(ia32.call("userfaultfd", DEFAULT_FLAGS)) as uffd, promise("RW-87"):
        api = uapi.uffdio_api(uapi.UFFD_API, int(ASYNC_RWP))
        reply = ia32.ioctl(uffd.fd, uapi.UFFDIO_API, api)
        expect(bytes(reply).hex(), bytes(answer).hex(), "the struct of UFFDIO_API")
        where = uapi.uffdio_range(area.start, area.range.len)
        registered = ia32.ioctl(uffd.fd, uapi.UFFDIO_REGISTER, uapi.uffdio_register(where, RWP))
        ctx.uffd.register(ctx.src.range, RWP)
        expect(registered.ioctls, int(ctx.uffd.register(ctx.src.range, RWP)), "ioctls of UFFDIO_REGISTER")
        ia32.ioctl(uffd.fd, uapi.UFFDIO_SET_MODE, uapi.uffdio_set_mode(0, int(Feature.RWP_ASYNC)))
        middle = uapi.uffdio_range(area.page(1).start, 2 * PAGE_SIZE)
        ia32.ioctl(uffd.fd, uapi.UFFDIO_RWPROTECT, uapi.uffdio_rwprotect(middle, RwprotectMode.RWP))
        Pagemap.expect_protected(area, {1, 2}, "after UFFDIO_RWPROTECT")
        with faulting(uffd, area.page(1).start, read=False):
            expect(parse_message(ia32.read(uffd.fd, PAGE_SIZE)), Fault(area.page(1).start, READ_TRAPPED), "the message")
            page = uapi.uffdio_range(area.page(1).start, PAGE_SIZE)
            ia32.ioctl(uffd.fd, uapi.UFFDIO_RWPROTECT, uapi.uffdio_rwprotect(page, 0))
        Pagemap.expect_protected(area, {2}, "after it was resolved")
        with fails(EINVAL):
            ia32.ioctl(uffd.fd, uapi.UFFDIO_RWPROTECT, uapi.uffdio_rwprotect(middle, 4))
        both = uapi.uffdio_set_mode(int(Feature.RWP_ASYNC), int(Feature.RWP_ASYNC))
        with fails(EINVAL):
            ia32.ioctl(uffd.fd, uapi.UFFDIO_SET_MODE, both)
        ia32.ioctl(uffd.fd, uapi.UFFDIO_SET_MODE, uapi.uffdio_set_mode(int(Feature.RWP_ASYNC), 0))
        expect_rwp_free(uffd, area, 2)
        Pagemap.expect_protected(area, (), "after an access that was not told")
        found = Pagemap.scan(area.range, ACCESSED)
        expect([(each.start, each.end) for each in found.regions], [(area.start, area.range.end)], "accessed pages")
    area.expect_pattern_of(area)
