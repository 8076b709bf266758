# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_WRITEPROTECT: what is protected, who is trapped, and what the protection survives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import EAGAIN, EFAULT, EINVAL, EIO, ENOENT, ESRCH
from functools import partial
from pathlib import Path
from signal import SIGBUS, SIGSEGV

from uffd_selftests import syscalls, uapi
from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    MISSING,
    WP,
    WRITEPROTECT,
    Action,
    Context,
    Fault,
    Forked,
    Pagemap,
    Remapped,
    Skip,
    Uffd,
    bad_ranges,
    collapse,
    eventually,
    expect,
    fails,
    huge_area,
    own_swap,
    page_out,
    promise,
    refuses,
    require_collapse,
    require_soft_dirty,
    small_area,
    swap_out,
)
from uffd_selftests.hwpoison import declared_sound
from uffd_selftests.mem_types import (
    ALL,
    ANON,
    FILE_BACKED,
    HUGETLB,
    HUGETLB_PRIVATE,
    NOT_HUGETLB,
    PRIVATE,
    SHARED,
    SHMEM,
    SHMEM_PRIVATE,
    Area,
    pmd_size,
)
from uffd_selftests.memory import (
    MAP_SHARED,
    PAGE_SIZE,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    Advice,
    KernelError,
    Range,
    Trap,
    advise,
    map_memory,
    peek,
    pmd_mapped,
    poke,
    protect,
    remap,
    smaps_bytes,
    smaps_fields,
    touch,
    touch_trapped,
    unmap,
)
from uffd_selftests.processes import Channel, Child, Waiter, faulting, undisturbed, unread_event
from uffd_selftests.uapi import PM_PFN_MASK, CopyMode, Feature, PagefaultFlag, WriteprotectMode

SEVERAL_MAPPINGS = WRITEPROTECT | Feature.WP_UNPOPULATED
"""Since the release that brought this feature the range of one call may span several mappings (mwriteprotect_range)."""
TRAPPED = PagefaultFlag.WRITE | PagefaultFlag.WP
PROTECT, UNPROTECT = WriteprotectMode.WP, WriteprotectMode(0)
NEW = b"\xa5\x5a new"


def filled(ctx: Context) -> Area:
    """Return the destination area, registered for write protection, every page present."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    return ctx.dst


@contextmanager
def trapped(uffd: Uffd, area: Area, page: int) -> Iterator[Waiter]:
    """Have a thread write NEW to the start of a page and be trapped; somebody has to let it go on."""
    start = area.page(page).start
    with faulting(uffd, start, call=lambda: poke(start, NEW), flags=TRAPPED) as waiter:
        yield waiter
    expect(peek(start, len(NEW)), NEW, "what was written, after the write was let go on")


def expect_trapped(uffd: Uffd, area: Area, *pages: int) -> None:
    """Assert that a write to each of the pages is trapped, and goes on when the page is un-protected."""
    for page in pages:
        with promise(f"page {page}"):
            with trapped(uffd, area, page):
                uffd.unprotect(area.page(page))
            uffd.expect_no_message()


def expect_free(uffd: Uffd, area: Area, *pages: int) -> None:
    """Assert that nothing stops a write to any of the pages, which changes nothing."""
    for page in pages:
        with promise(f"page {page}"):
            undisturbed(uffd, partial(touch, area.page(page), area.page_size, write=True))


def signals(uffd: Uffd, where: Range, step: int, *, write: bool) -> list[int | None]:
    """Access each page, without a message; return the signals that it gave, None for an access that went through."""
    traps: list[Trap | None] = []
    undisturbed(uffd, lambda: traps.extend(touch_trapped(where, step, write=write)))
    return [trap.signo if trap else None for trap in traps]


def mend(ctx: Context, area: Area, *pages: int) -> None:
    """Put back what trapped() overwrote in pages that held the area's pattern."""
    ctx.src.fill()
    for page in pages:
        poke(area.page(page).start, peek(ctx.src.page(page).start, len(NEW)))


def registered_for_wp(where: Range) -> bool:
    """Whether /proc/self/smaps shows any mapping in the range as registered for write protection."""
    return any("uw" in fields["VmFlags"].split() for fields in smaps_fields(where))


# ---- arguments -----------------------------------------------------------------------------------------------------


@uffd_case("writeprotect-errors", mem=ALL, features=WRITEPROTECT, pages=2, rows=("WP-01",))
def test_writeprotect_errors(ctx: Context) -> None:
    """UFFDIO_WRITEPROTECT refuses a range that is not whole pages of user space, and a mode that it does not know."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0))
    for what, bad in bad_ranges(area.page(1)).items():
        for mode in (PROTECT, UNPROTECT):
            with promise("WP-01", f"{what}, mode {mode}"), refuses(EINVAL):
                ctx.uffd.writeprotect(bad, mode)
    for bit in range(2, 64):
        for known in range(4):
            with promise("WP-01", f"mode bit {bit} with {known:#x}"), refuses(EINVAL):
                ctx.uffd.writeprotect(area.range, WriteprotectMode(1 << bit | known))
    with promise("WP-01", "WP with DONTWAKE"), refuses(EINVAL):
        ctx.uffd.writeprotect(area.range, WriteprotectMode.WP | WriteprotectMode.DONTWAKE)
    with promise("WP-01", "argument NULL"), refuses(EFAULT):
        ctx.uffd.raw_ioctl(uapi.UFFDIO_WRITEPROTECT, 0)
    Pagemap.expect_protected(area, {0}, "after calls that were refused")


@uffd_case("writeprotect-argument", mem=(ANON,), features=WRITEPROTECT, pages=2, rows=("WP-34",), kind=Kind.DETAIL)
def test_writeprotect_argument(ctx: Context) -> None:
    """UFFDIO_WRITEPROTECT writes nothing back: its argument may be in read-only memory, but must be there whole."""
    area, end = filled(ctx), ctx.src.range.end
    argument = bytes(uapi.uffdio_writeprotect(uapi.uffdio_range(area.start, PAGE_SIZE), PROTECT))
    poke(end - len(argument), argument)
    protect(ctx.src.range, PROT_READ)
    with promise("WP-34"):
        expect(ctx.uffd.raw_ioctl(uapi.UFFDIO_WRITEPROTECT, end - len(argument)), 0, "result")
        expect(peek(end - len(argument), len(argument)), argument, "the argument afterwards")
        Pagemap.expect_protected(area, {0}, "with a read-only argument")
    with promise("WP-01", "last word of the argument not mapped"), refuses(EFAULT):
        ctx.uffd.raw_ioctl(uapi.UFFDIO_WRITEPROTECT, end - len(argument) + 8)


@uffd_case("writeprotect-no-range", mem=ALL, features=WRITEPROTECT, pages=2, rows=("WP-02",))
def test_writeprotect_no_range(ctx: Context) -> None:
    """UFFDIO_WRITEPROTECT says ENOENT where nothing is mapped, and where no write protection was registered."""
    ctx.dst.fill()
    steps: dict[str, Callable[[], object]] = {
        "not registered": lambda: None,
        "registered, but not for write protection": lambda: ctx.uffd.register(ctx.dst.range, MISSING),
        "not mapped": lambda: unmap(ctx.dst.range),
    }
    for what, step in steps.items():
        step()
        for mode in (PROTECT, UNPROTECT):
            with promise("WP-02", f"{what}, mode {mode}"), refuses(ENOENT):
                ctx.uffd.writeprotect(ctx.dst.range, mode)
        Pagemap.expect_protected(ctx.dst, (), what)


@uffd_case("writeprotect-partial", mem=ALL, features=SEVERAL_MAPPINGS, pages=3, rows=("WP-03",), kind=Kind.DETAIL)
def test_writeprotect_partial(ctx: Context) -> None:
    """Where a later part of the range is not registered the earlier part is done all the same, and nobody is woken."""
    area = ctx.dst
    area.fill()
    for number in (0, 2):
        ctx.uffd.register(area.page(number), WP)
    with promise("WP-03", "protect"):
        with refuses(ENOENT):
            ctx.uffd.writeprotect(area.range)
        Pagemap.expect_protected(area, {0}, "after a partial UFFDIO_WRITEPROTECT")
    with promise("WP-03", "earlier part not registered"):
        with refuses(ENOENT):
            ctx.uffd.writeprotect(area.page(1, 2))
        Pagemap.expect_protected(area, {0}, "after a refused UFFDIO_WRITEPROTECT")
    with promise("WP-03", "un-protect"), trapped(ctx.uffd, area, 0):
        with refuses(ENOENT):
            ctx.uffd.unprotect(area.range)
        Pagemap.expect_protected(area, (), "after un-protecting in part")
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(area.page(0))


@uffd_case("writeprotect-holes", mem=ALL, features=SEVERAL_MAPPINGS, pages=5, rows=("WP-04",), kind=Kind.DETAIL)
def test_writeprotect_holes(ctx: Context) -> None:
    """UFFDIO_WRITEPROTECT skips what is not mapped at the start, in the middle and at the end of its range."""
    area = filled(ctx)
    for number in (0, 2, 4):
        unmap(area.page(number))
    ctx.uffd.writeprotect(area.range)
    Pagemap.expect_protected(area, {1, 3}, "after protecting a range with holes")
    ctx.uffd.unprotect(area.range)
    Pagemap.expect_protected(area, (), "after un-protecting a range with holes")


@uffd_case("writeprotect-mappings", mem=ALL, features=SEVERAL_MAPPINGS, pages=5, rows=("WP-05",))
def test_writeprotect_mappings(ctx: Context) -> None:
    """UFFDIO_WRITEPROTECT works across several mappings, up to the end of its range and no further."""
    area = ctx.dst
    area.fill()
    ctx.uffd.register(area.page(0, 2), WP)
    ctx.uffd.register(area.page(2, 2), MISSING | WP)
    expect(len(list(smaps_fields(area.range))), 3, "mappings of the area, page 4 not registered")
    ctx.uffd.writeprotect(area.page(1, 3))
    Pagemap.expect_protected(area, {1, 2, 3}, "after protecting pages 1 to 3 of two mappings")
    ctx.uffd.unprotect(area.page(0, 3))
    Pagemap.expect_protected(area, {3}, "after un-protecting pages 0 to 2 of two mappings")
    area.expect_pattern_of(area)


@uffd_case("writeprotect-hugetlb-part", mem=(HUGETLB, HUGETLB_PRIVATE), features=WRITEPROTECT, pages=2, rows=("WP-06",))
def test_writeprotect_hugetlb_part(ctx: Context) -> None:
    """UFFDIO_WRITEPROTECT of a part of a huge page is EINVAL."""
    area, huge = filled(ctx), ctx.page_size
    ctx.uffd.writeprotect(area.page(0))
    for offset, length in ((PAGE_SIZE, huge), (PAGE_SIZE, huge - PAGE_SIZE), (0, PAGE_SIZE), (0, huge + PAGE_SIZE)):
        for mode in (PROTECT, UNPROTECT):
            with promise("WP-06", f"offset {offset}, len {length}, mode {mode}"), refuses(EINVAL):
                ctx.uffd.writeprotect(Range(area.start + offset, length), mode)
    Pagemap.expect_protected(area, {0}, "after calls that were refused")


@uffd_case("writeprotect-eagain", mem=ALL, features=WRITEPROTECT | Feature.EVENT_REMOVE, pages=2, rows=("WP-31",))
def test_writeprotect_eagain(ctx: Context) -> None:
    """UFFDIO_WRITEPROTECT says EAGAIN and does nothing until a pending event has been read."""
    area = filled(ctx)
    for mode, before, after in ((PROTECT, (), {0}), (UNPROTECT, {0}, ())):
        with unread_event(ctx.uffd, area.page(1)):
            with promise("WP-31", f"mode {mode}"), refuses(EAGAIN):
                ctx.uffd.writeprotect(area.page(0), mode)
            Pagemap.expect_protected(area, before, "while the event is pending")
        ctx.uffd.writeprotect(area.page(0), mode)
        Pagemap.expect_protected(area, after, "when the event has been read")


@uffd_case("writeprotect-dead-target", mem=(ANON,), features=WRITEPROTECT, pages=2, rows=("WP-31",))
def test_writeprotect_dead_target(ctx: Context) -> None:
    """UFFDIO_WRITEPROTECT says ESRCH when the process whose memory it is has exited."""

    def target(channel: Channel) -> None:
        with Uffd.open() as uffd:
            uffd.register(ctx.dst.range, WP)
            channel.send(None, uffd.fd)

    with Child(target) as child:
        _, (fd,) = child.receive_fds()
        child.wait()
        with Uffd(fd) as uffd:
            for mode in (PROTECT, UNPROTECT):
                with promise("WP-31", f"mode {mode}"), refuses(ESRCH):
                    uffd.writeprotect(ctx.dst.range, mode)


# ---- pages that are there ------------------------------------------------------------------------------------------


@uffd_case("writeprotect-present", mem=ALL, features=WRITEPROTECT, pages=4, rows=("WP-07",))
def test_writeprotect_present(ctx: Context) -> None:
    """Exactly the pages of the range are protected, once and again; nobody notices who only reads them."""
    area = filled(ctx)
    for times in ("once", "twice"):
        ctx.uffd.writeprotect(area.page(1, 2))
        Pagemap.expect_protected(area, {1, 2}, f"after protecting pages 1 and 2 {times}")
    with promise("WP-07", "read"):
        undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))
    with promise("WP-07", "write beside the range"):
        expect_free(ctx.uffd, area, 0, 3)
    Pagemap.expect_protected(area, {1, 2}, "after reads, and writes beside them")
    for times in ("once", "twice"):
        ctx.uffd.unprotect(area.page(1, 2))
        Pagemap.expect_protected(area, (), f"after un-protecting them {times}")
    expect_free(ctx.uffd, area, 1, 2)
    area.expect_pattern_of(area)


@uffd_case("writeprotect-write", mem=ALL, features=WRITEPROTECT, pages=3, rows=("WP-08",))
def test_writeprotect_write(ctx: Context) -> None:
    """A write to a protected page sends one message with WRITE and WP and waits, with the page as it was."""
    area, page = filled(ctx), ctx.dst.page(1)
    for offset in (0, page.len // 2 + 3, page.len - 1):
        address = page.start + offset
        old = peek(address)
        new = bytes([old[0] ^ 0xFF])
        write = partial(poke, address, new)
        ctx.uffd.writeprotect(page)
        with promise("WP-08", f"byte {offset}"):
            with faulting(ctx.uffd, address, at=page.start, call=write, flags=TRAPPED):
                ctx.uffd.expect_still_asleep(1)
                area.expect_pattern_of(area)
                Pagemap.expect_protected(area, {1}, "while the write waits")
                ctx.uffd.unprotect(page)
            expect(peek(address), new, "the byte that was written")
        poke(address, old)
    area.expect_pattern_of(area)


@uffd_case(
    "writeprotect-exact-address",
    mem=ALL,
    features=WRITEPROTECT | Feature.EXACT_ADDRESS | Feature.THREAD_ID,
    pages=2,
    rows=("WP-08", "FL-03", "FL-04"),
)
def test_writeprotect_exact_address(ctx: Context) -> None:
    """UFFD_FEATURE_EXACT_ADDRESS and UFFD_FEATURE_THREAD_ID hold for write-protect faults too."""
    area, address = filled(ctx), ctx.dst.page(1).end - 5
    ctx.uffd.writeprotect(area.range)
    with faulting(ctx.uffd, address, at=address, write=True, flags=TRAPPED) as waiter:
        expect(waiter.fault, Fault(address, TRAPPED, waiter.tid), "message")
        ctx.uffd.unprotect(area.page(0))
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.unprotect(area.page(1))
    area.expect_pattern_of(area)


@uffd_case("writeprotect-wakes", mem=ALL, features=WRITEPROTECT, pages=4, rows=("WP-09",))
def test_writeprotect_wakes(ctx: Context) -> None:
    """Un-protecting wakes every writer in its range, and nobody beside it."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.range)
    with ExitStack() as stack:
        waiters = [stack.enter_context(trapped(ctx.uffd, area, page)) for page in (1, 1, 2, 0, 3)]
        ctx.uffd.expect_still_asleep(5)
        ctx.uffd.unprotect(area.page(1, 2))
        ctx.uffd.expect_asleep(2)
        for waiter in waiters[:3]:
            waiter.result()
        ctx.uffd.expect_still_asleep(2)
        Pagemap.expect_protected(area, {0, 3}, "after un-protecting pages 1 and 2")
        ctx.uffd.unprotect(area.range)
    ctx.uffd.expect_no_message()


@uffd_case("writeprotect-dontwake", mem=ALL, features=WRITEPROTECT, pages=2, rows=("WP-09",))
def test_writeprotect_dontwake(ctx: Context) -> None:
    """Un-protecting with DONTWAKE leaves the writer asleep, with nothing written, until UFFDIO_WAKE."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.range)
    with trapped(ctx.uffd, area, 0):
        ctx.uffd.writeprotect(area.page(0), WriteprotectMode.DONTWAKE)
        Pagemap.expect_protected(area, {1}, "after un-protecting page 0 with DONTWAKE")
        ctx.uffd.expect_still_asleep(1)
        area.expect_pattern_of(area)
        ctx.uffd.wake(area.page(0))
    ctx.uffd.expect_no_message()


@uffd_case("writeprotect-again", mem=ALL, features=WRITEPROTECT, pages=2, rows=("WP-10",))
def test_writeprotect_again(ctx: Context) -> None:
    """Protecting a page again does not wake its writer; one that is only woken is trapped anew."""
    area, page = filled(ctx), ctx.dst.page(0)
    ctx.uffd.writeprotect(page)
    with trapped(ctx.uffd, area, 0):
        ctx.uffd.writeprotect(page)
        ctx.uffd.expect_still_asleep(1)
        for _ in range(2):
            ctx.uffd.wake(page)
            ctx.uffd.wait_fault(page.start, TRAPPED)
        area.expect_pattern_of(area)
        ctx.uffd.unprotect(page)


@uffd_case("writeprotect-race", mem=ALL, features=WRITEPROTECT, pages=1, rows=("WP-09",), smp=True)
def test_writeprotect_race(ctx: Context) -> None:
    """A writer that meets the protection just when it is dropped goes on, or says once more that it waits."""
    area, uffd = filled(ctx), ctx.uffd

    def drop_protection(writer: Waiter) -> None:
        uffd.unprotect(area.range)
        while not writer.done:
            eventually(lambda: writer.done or uffd.readable(), "the writer to go on, or a message")
            for message in uffd.read():
                expect(message, Fault(area.start, TRAPPED), "message")
                uffd.unprotect(area.range)

    for _ in range(50):
        uffd.writeprotect(area.range)
        with Waiter(partial(touch, area.range, area.page_size, write=True)) as writer:
            drop_protection(writer)
        uffd.expect_asleep(0)


# ---- pages that are not there --------------------------------------------------------------------------------------


@uffd_case("writeprotect-missing-anon", mem=(ANON,), features=Feature.PAGEFAULT_FLAG_WP, pages=4, rows=("WP-11",))
def test_writeprotect_missing_anon(ctx: Context) -> None:
    """Without UFFD_FEATURE_WP_UNPOPULATED protecting anonymous memory passes over pages that are not there."""
    area = ctx.dst
    area.fill(1, 2)
    ctx.uffd.register(area.range, WP)
    advise(area.page(2), Advice.DONTNEED)
    ctx.uffd.writeprotect(area.range)
    Pagemap.expect_protected(area, {1}, "of pages that are not there but for page 1")
    expect_free(ctx.uffd, area, 0, 2, 3)
    Pagemap.expect_protected(area, {1}, "after writes to the others")
    expect_trapped(ctx.uffd, area, 1)


def expect_missing_protected(ctx: Context) -> None:
    """Protect pages 1 and 2 of an untouched area: page 1 is written first, page 2 read first."""
    area, uffd = ctx.dst, ctx.uffd
    uffd.register(area.range, WP)
    uffd.writeprotect(area.page(1, 2))
    Pagemap.expect_protected(area, {1, 2}, "of pages that are not there")
    with promise("write"):
        expect_trapped(uffd, area, 1)
    with promise("read, then write"):
        undisturbed(uffd, lambda: area.expect_zero(2, 1))
        Pagemap.expect_protected(area, {2}, "after a read")
        expect_trapped(uffd, area, 2)
    expect_free(uffd, area, 0, 3)
    for page in (1, 2):
        poke(area.page(page).start, bytes(len(NEW)))
    area.expect_zero()


@uffd_case(
    "writeprotect-missing-marked",
    mem=(ANON,),
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED,
    pages=4,
    rows=("WP-12",),
)
def test_writeprotect_missing_marked(ctx: Context) -> None:
    """With UFFD_FEATURE_WP_UNPOPULATED anonymous pages that are not there are protected too; a read leaves them so."""
    expect_missing_protected(ctx)


@uffd_case("writeprotect-missing-file", mem=FILE_BACKED, features=WRITEPROTECT, pages=4, rows=("WP-14",))
def test_writeprotect_missing_file(ctx: Context) -> None:
    """Pages of shared memory and huge pages that are not there are protected like those that are."""
    expect_missing_protected(ctx)


@uffd_case("writeprotect-missing-dropped", mem=FILE_BACKED, features=WRITEPROTECT, pages=3, rows=("WP-14",))
def test_writeprotect_missing_dropped(ctx: Context) -> None:
    """Un-protecting a page that is not there leaves nothing behind."""
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    ctx.uffd.unprotect(ctx.dst.page(1))
    Pagemap.expect_protected(ctx.dst, {0, 2}, "after un-protecting page 1")
    expect_free(ctx.uffd, ctx.dst, 1)
    Pagemap.expect_protected(ctx.dst, {0, 2}, "after a write to page 1")


@uffd_case("writeprotect-cached", mem=FILE_BACKED, features=WRITEPROTECT, pages=3, spare_hugepages=3, rows=("WP-14",))
def test_writeprotect_cached(ctx: Context) -> None:
    """A page in the page cache that is not mapped is protected; a reader sees the file's data, a writer is trapped."""
    area = ctx.dst
    elsewhere = Range(map_memory(area.range.len, flags=MAP_SHARED, fd=area.fd or 0), area.range.len)
    area.pattern.fill(elsewhere.start, 0, 3)
    unmap(elsewhere)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(0, 2))
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area, 1, 1))
    Pagemap.expect_protected(area, {0, 1}, "after a read of page 1")
    expect_trapped(ctx.uffd, area, 0, 1)
    expect_free(ctx.uffd, area, 2)
    mend(ctx, area, 0, 1)
    area.expect_pattern_of(area)


@uffd_case("writeprotect-zeropage", mem=(ANON,), features=Feature.PAGEFAULT_FLAG_WP, pages=3, rows=("WP-13",))
def test_writeprotect_zeropage(ctx: Context) -> None:
    """An anonymous page that was only read so far, the zero page, is protected, and keeps out of the writer's way."""
    area = ctx.dst
    area.expect_zero()
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(1))
    Pagemap.expect_protected(area, {1}, "of zero pages")
    expect_trapped(ctx.uffd, area, 1)
    area.expect_zero(0, 1)
    area.expect_zero(2, 1)
    expect_free(ctx.uffd, area, 0, 2)
    poke(area.page(1).start, bytes(len(NEW)))
    area.expect_zero()


@uffd_case(
    "writeprotect-missing-registered",
    mem=ALL,
    features=WRITEPROTECT | Feature.WP_UNPOPULATED,
    pages=2,
    rows=("WP-22",),
    kind=Kind.DETAIL,
)
def test_writeprotect_missing_registered(ctx: Context) -> None:
    """A write to a page both missing and protected is a missing fault first, then a write-protect fault."""
    area, page = ctx.dst, ctx.dst.page(0)
    ctx.src.fill()
    ctx.uffd.register(area.range, MISSING | WP)
    ctx.uffd.writeprotect(page)
    Pagemap.expect_protected(area, {0}, "of a page that is not there")
    write = partial(poke, page.start, peek(ctx.src.start, 8))
    with faulting(ctx.uffd, page.start, call=write, flags=PagefaultFlag.WRITE):
        ctx.uffd.copy(page.start, ctx.src.start, page.len, CopyMode.WP)
        ctx.uffd.wait_fault(page.start, TRAPPED)
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_protected(area, {0}, "after UFFDIO_COPY with WP")
        ctx.uffd.unprotect(page)
    area.expect_pattern_of(ctx.src, 0, 1)
    ctx.uffd.expect_no_message()


@uffd_case(
    "writeprotect-tables", mem=(ANON, SHMEM), features=WRITEPROTECT | Feature.WP_UNPOPULATED, pages=1, rows=("WP-14",)
)
def test_writeprotect_tables(ctx: Context) -> None:
    """Pages are protected where no page table exists yet, in as many tables as it takes."""
    per_table = PAGE_SIZE // 8
    area = ctx.allocate(2 * per_table + 2)
    ctx.uffd.register(area.range, WP)
    inside = range(per_table - 1, 2 * per_table + 1)
    ctx.uffd.unprotect(area.range)
    ctx.uffd.writeprotect(area.page(inside.start, len(inside)))
    Pagemap.expect_protected(area, inside, "of pages in three page tables")
    expect_trapped(ctx.uffd, area, inside.start, inside.stop - 1)
    expect_free(ctx.uffd, area, inside.start - 1, inside.stop)


# ---- what the protection survives ----------------------------------------------------------------------------------


@uffd_case("writeprotect-dontneed", mem=ALL, features=WRITEPROTECT, pages=2, spare_hugepages=2, rows=("WP-15",))
def test_writeprotect_dontneed(ctx: Context) -> None:
    """MADV_DONTNEED drops the protection of anonymous memory with the page; other memory stays protected."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.range)
    kept = {1} if ctx.mem is ANON else {0, 1}
    for times in ("once", "twice"):
        advise(area.page(0), Advice.DONTNEED)
        Pagemap.expect_protected(area, kept, f"after dropping page 0 {times}")
    (expect_free if ctx.mem is ANON else expect_trapped)(ctx.uffd, area, 0)
    expect_trapped(ctx.uffd, area, 1)
    mend(ctx, area, 1)
    area.expect_pattern_of(area, 1, 1)
    if ctx.mem.shared:
        mend(ctx, area, 0)
        area.expect_pattern_of(area, 0, 1)
    else:
        if ctx.mem is not ANON:
            poke(area.start, bytes(len(NEW)))
        area.expect_zero(0, 1)


@uffd_case(
    "writeprotect-dontneed-missing",
    mem=(ANON,),
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED,
    pages=2,
    rows=("WP-12", "WP-15"),
)
def test_writeprotect_dontneed_missing(ctx: Context) -> None:
    """MADV_DONTNEED also drops the protection of an anonymous page that is not there."""
    area = ctx.dst
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    advise(area.page(0), Advice.DONTNEED)
    Pagemap.expect_protected(area, {1}, "after dropping page 0")
    expect_free(ctx.uffd, area, 0)
    expect_trapped(ctx.uffd, area, 1)


@uffd_case(
    "writeprotect-dontneed-swapped",
    mem=(SHMEM_PRIVATE,),
    features=WRITEPROTECT,
    needs=("swap",),
    pages=2,
    rows=("WP-15", "WP-23"),
    kind=Kind.DETAIL,
)
def test_writeprotect_dontneed_swapped(ctx: Context) -> None:
    """MADV_DONTNEED of a private page that is swapped out leaves its place in the file's mapping protected."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0))
    swap_out(area.range)
    advise(area.range, Advice.DONTNEED)
    Pagemap.expect_protected(area, {0}, "after dropping both pages")
    expect_free(ctx.uffd, area, 1)
    expect_trapped(ctx.uffd, area, 0)


@uffd_case(
    "writeprotect-dontneed-zeropage",
    mem=(SHMEM_PRIVATE,),
    features=WRITEPROTECT,
    pages=2,
    rows=("WP-15",),
    kind=Kind.DETAIL,
)
def test_writeprotect_dontneed_zeropage(ctx: Context) -> None:
    """MADV_DONTNEED of what UFFDIO_ZEROPAGE has put into a private mapping of a file leaves its place protected."""
    area = ctx.dst
    ctx.uffd.register(area.range, MISSING | WP)
    ctx.uffd.zeropage(area.range)
    ctx.uffd.writeprotect(area.page(0))
    advise(area.range, Advice.DONTNEED)
    Pagemap.expect_protected(area, {0}, "after dropping both pages")


KEPT_BY_REMOVE = Defect(
    id="D-WP-16",
    summary="MADV_REMOVE leaves the pages that it drops protected: the next write to each is trapped",
    kernels="6.1.192, 6.12.117, 6.18.44",
    advice="un-protect a range of shared memory after removing it, or expect one more write-protect fault a page",
    shows=r"after removing page 1: .* on exactly these pages: 0, got 0-1;",
)


@uffd_case("writeprotect-remove", mem=SHARED, features=WRITEPROTECT, pages=2, rows=("WP-16",), defect=KEPT_BY_REMOVE)
def test_writeprotect_remove(ctx: Context) -> None:
    """MADV_REMOVE drops the protection of shared memory with its pages."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.range)
    advise(area.page(1), Advice.REMOVE)
    Pagemap.expect_protected(area, {0}, "after removing page 1")


FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2


@uffd_case("writeprotect-punch", mem=SHARED, features=WRITEPROTECT, pages=2, rows=("WP-16",), kind=Kind.DETAIL)
def test_writeprotect_punch(ctx: Context) -> None:
    """A page removed from its file is zero; while it shows as protected a write to it is trapped, else it is free."""
    area, fd = filled(ctx), ctx.dst.fd or 0
    size, mode = ctx.page_size, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

    def truncate() -> None:
        os.ftruncate(fd, size)
        os.ftruncate(fd, 2 * size)

    removals: dict[str, Callable[[], object]] = {
        "MADV_REMOVE": lambda: advise(area.page(1), Advice.REMOVE),
        "FALLOC_FL_PUNCH_HOLE": lambda: syscalls.call("fallocate", fd, mode, size, size),
        "ftruncate": truncate,
    }
    for what, remove in removals.items():
        area.fill()
        ctx.uffd.writeprotect(area.range)
        with promise("WP-16", what):
            remove()
            kept = Pagemap.uffd_wp(area.page(1).start)
            Pagemap.expect_protected(area, {0, 1} if kept else {0}, "after removing page 1")
            (expect_trapped if kept else expect_free)(ctx.uffd, area, 1)
            poke(area.page(1).start, bytes(len(NEW)))
            area.expect_zero(1, 1)
            area.expect_pattern_of(area, 0, 1)
        ctx.uffd.unprotect(area.range)


@uffd_case(
    "writeprotect-mprotect", mem=ALL, features=WRITEPROTECT, pages=2, rows=("WP-20",), bugs=(32,), kind=Kind.DETAIL
)
def test_writeprotect_mprotect(ctx: Context) -> None:
    """mprotect(2) comes first, with SIGSEGV and no message, and leaves the protection underneath as it was."""
    area = filled(ctx)
    for prot, name in ((PROT_READ, "PROT_READ"), (PROT_NONE, "PROT_NONE")):
        ctx.uffd.writeprotect(area.page(0))
        with promise("WP-20", name):
            protect(area.range, prot)
            Pagemap.expect_protected(area, {0}, "after mprotect")
            observed = signals(ctx.uffd, area.range, area.page_size, write=True)
            expect(observed, [SIGSEGV] * 2, "signals of a write to each page")
            protect(area.range, PROT_READ | PROT_WRITE)
            Pagemap.expect_protected(area, {0}, "after mprotect back")
            expect_free(ctx.uffd, area, 1)
            expect_trapped(ctx.uffd, area, 0)
            mend(ctx, area, 0)
            area.expect_pattern_of(area)


def expect_soft_dirty_tracked(ctx: Context, area: Area, *pages: int) -> None:
    """Assert that these pages, protected and un-protected, are soft-dirty when they are written, and not before."""
    require_soft_dirty(area.start)
    Path("/proc/self/clear_refs").write_text("4")
    ctx.uffd.writeprotect(area.range)
    ctx.uffd.unprotect(area.range)
    for page in pages:
        for written in False, True:
            expect_free(ctx.uffd, area, *([page] if written else []))
            dirty = bool(Pagemap.entry(area.page(page).start) & uapi.PM_SOFT_DIRTY)
            expect(dirty, written, f"soft-dirty, page {page}, {'' if written else 'not '}written since")


@uffd_case(
    "writeprotect-soft-dirty",
    mem=NOT_HUGETLB,
    features=WRITEPROTECT,
    pages=2,
    rows=("WP-07",),
    bugs=(56,),
    kind=Kind.DETAIL,
)
def test_writeprotect_soft_dirty(ctx: Context) -> None:
    """A page that was protected and un-protected again still counts as written, soft-dirty, from its next write on."""
    expect_soft_dirty_tracked(ctx, filled(ctx), 0, 1)


@uffd_case(
    "writeprotect-thp-soft-dirty",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-07",),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_soft_dirty(ctx: Context) -> None:
    """A huge page that was protected and un-protected whole counts as written, soft-dirty, from its next write on."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    expect_soft_dirty_tracked(ctx, area, 7)


@uffd_case(
    "writeprotect-mprotect-meanwhile", mem=ALL, features=WRITEPROTECT, pages=1, rows=("WP-21",), kind=Kind.DETAIL
)
def test_writeprotect_mprotect_meanwhile(ctx: Context) -> None:
    """A writer that waits while its page is made read-only by mprotect(2) gets SIGSEGV when it is un-protected."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.range)
    traps: list[Trap | None] = []

    def write() -> None:
        traps.extend(touch_trapped(area.range, area.page_size, write=True))

    with faulting(ctx.uffd, area.start, call=write, flags=TRAPPED):
        protect(area.range, PROT_READ)
        ctx.uffd.unprotect(area.range)
    expect([trap.signo if trap else None for trap in traps], [SIGSEGV], "signals of the write")
    ctx.uffd.expect_no_message()
    area.expect_pattern_of(area)


@uffd_case("writeprotect-mremap", mem=ALL, features=WRITEPROTECT, pages=3, rows=("WP-27",), bugs=(1,), kind=Kind.DETAIL)
def test_writeprotect_mremap(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_REMAP what mremap(2) moves is neither protected nor registered any more."""
    area, moved = ctx.dst, ctx.allocate()
    area.fill(0, 2)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(0))
    ctx.uffd.writeprotect(area.page(2))
    remap(area.range, to=moved.start)
    Pagemap.expect_protected(moved, (), "after mremap")
    expect(registered_for_wp(moved.range), False, "whether the new place is registered")
    with promise("WP-27", "new place"), refuses(ENOENT):
        ctx.uffd.writeprotect(moved.range)
    expect_free(ctx.uffd, moved, 0, 1, 2)
    moved.expect_pattern_of(area, 0, 2)
    moved.expect_zero(2, 1)


def move_with_event(uffd: Uffd, area: Area, moved: Area) -> None:
    """Move an area with mremap(2), reading the event for which that waits."""
    with Waiter(lambda: remap(area.range, to=moved.start)):
        expect(uffd.wait(), Remapped(area.start, moved.start, area.range.len), "the event")


@uffd_case(
    "writeprotect-mremap-event",
    mem=ALL,
    features=WRITEPROTECT | Feature.WP_UNPOPULATED | Feature.EVENT_REMAP,
    pages=3,
    rows=("WP-28",),
    kind=Kind.DETAIL,
)
def test_writeprotect_mremap_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_REMAP what mremap(2) moves stays protected, and registered."""
    area, moved = ctx.dst, ctx.allocate()
    area.fill(0, 2)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(0))
    ctx.uffd.writeprotect(area.page(2))
    move_with_event(ctx.uffd, area, moved)
    Pagemap.expect_protected(moved, {0, 2}, "after mremap")
    expect(registered_for_wp(moved.range), True, "whether the new place is registered")
    expect_trapped(ctx.uffd, moved, 0, 2)
    expect_free(ctx.uffd, moved, 1)
    mend(ctx, moved, 0)
    poke(moved.page(2).start, bytes(len(NEW)))
    moved.expect_pattern_of(area, 0, 2)
    moved.expect_zero(2, 1)


@uffd_case(
    "writeprotect-mremap-tables",
    mem=(ANON, SHMEM),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-27",),
    bugs=(1,),
    kind=Kind.DETAIL,
)
def test_writeprotect_mremap_tables(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_REMAP the protection is gone when mremap(2) moves whole page tables and huge pages."""
    for kind in (small_area, huge_area):
        area, moved = kind(ctx), ctx.allocate(pmd_size() // PAGE_SIZE)
        ctx.uffd.register(area.range, WP)
        ctx.uffd.writeprotect(area.range)
        Pagemap.expect_protected(area, range(area.nr_pages), "before mremap")
        remap(area.range, to=moved.start)
        with promise("WP-27", kind.__name__):
            Pagemap.expect_protected(moved, (), "after mremap")
            expect_free(ctx.uffd, moved, 0, moved.nr_pages - 1)
            moved.expect_pattern_of(area)


@uffd_case(
    "writeprotect-mremap-tables-event",
    mem=(ANON, SHMEM),
    features=WRITEPROTECT | Feature.EVENT_REMAP,
    needs=("thp",),
    pages=1,
    rows=("WP-28",),
    kind=Kind.DETAIL,
)
def test_writeprotect_mremap_tables_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_REMAP the protection comes along when whole page tables and huge pages are moved."""
    for kind in (small_area, huge_area):
        area, moved = kind(ctx), ctx.allocate(pmd_size() // PAGE_SIZE)
        ctx.uffd.register(area.range, WP)
        ctx.uffd.writeprotect(area.range)
        move_with_event(ctx.uffd, area, moved)
        with promise("WP-28", kind.__name__):
            Pagemap.expect_protected(moved, range(moved.nr_pages), "after mremap")
            moved.expect_pattern_of(area)
            expect_trapped(ctx.uffd, moved, 0, moved.nr_pages - 1)


@uffd_case(
    "writeprotect-poisoned", mem=ALL, features=WRITEPROTECT | Feature.POISON, pages=2, rows=("PO-12",), kind=Kind.DETAIL
)
def test_writeprotect_poisoned(ctx: Context) -> None:
    """A poisoned page in the range stays poisoned, and is never protected."""
    area = ctx.dst
    ctx.uffd.register(area.range, MISSING | WP)
    ctx.uffd.poison(area.page(0))
    ctx.uffd.copy(area.page(1).start, ctx.src.start, ctx.page_size)
    for mode, protected in ((PROTECT, {1}), (UNPROTECT, set())):
        ctx.uffd.writeprotect(area.range, mode)
        Pagemap.expect_protected(area, protected, f"after mode {mode}")
        observed = signals(ctx.uffd, area.page(0), area.page_size, write=True)
        expect(observed, [SIGBUS], "signals of a write to the poisoned page")


@uffd_case("writeprotect-guard", mem=(ANON, SHMEM), features=WRITEPROTECT, pages=3, rows=("WP-36",), kind=Kind.DETAIL)
def test_writeprotect_guard(ctx: Context) -> None:
    """A guard page in the range stays one, with the pages beside it protected and un-protected."""
    area = filled(ctx)
    try:
        advise(area.page(1), Advice.GUARD_INSTALL)
    except KernelError as error:
        raise Skip(f"{error} (Linux 6.13; for shared memory 6.15)") from None
    for mode, protected in ((PROTECT, {0, 2}), (UNPROTECT, set())):
        ctx.uffd.writeprotect(area.range, mode)
        Pagemap.expect_protected(area, protected, f"after mode {mode}")
        observed = signals(ctx.uffd, area.page(1), area.page_size, write=False)
        expect(observed, [SIGSEGV], "signals of a read of the guard page")


@uffd_case(
    "writeprotect-swap", mem=(ANON, SHMEM_PRIVATE), features=WRITEPROTECT, needs=("swap",), pages=5, rows=("WP-23",)
)
def test_writeprotect_swap(ctx: Context) -> None:
    """Swapped-out pages stay protected; pages are protected and un-protected while they are swapped out."""
    area, uffd = filled(ctx), ctx.uffd
    uffd.writeprotect(area.page(0, 3))
    swap_out(area.range)
    Pagemap.expect_protected(area, {0, 1, 2}, "of pages swapped out")
    with promise("WP-23", "read, which swaps in"):
        undisturbed(uffd, lambda: area.expect_pattern_of(area, 0, 1))
        Pagemap.expect_protected(area, {0, 1, 2}, "after a read of page 0")
        expect_trapped(uffd, area, 0)
    with promise("WP-23", "write to a swapped-out page"):
        expect_trapped(uffd, area, 1)
    with promise("WP-23", "un-protected while swapped out"):
        uffd.unprotect(area.page(2))
        Pagemap.expect_protected(area, (), "after un-protecting pages 0 to 2")
        expect_free(uffd, area, 2)
    with promise("WP-23", "protected while swapped out"):
        uffd.writeprotect(area.page(3))
        Pagemap.expect_protected(area, {3}, "after protecting page 3")
        expect_trapped(uffd, area, 3)
    expect_free(uffd, area, 4)
    mend(ctx, area, 0, 1, 3)
    area.expect_pattern_of(area)


@uffd_case(
    "writeprotect-swapoff",
    mem=NOT_HUGETLB,
    features=WRITEPROTECT,
    needs=("cap_sys_admin",),
    pages=3,
    rows=("WP-23",),
)
def test_writeprotect_swapoff(ctx: Context) -> None:
    """Pages that are read back because their swap space goes away are as protected as before."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0, 2))
    with own_swap() as swap:
        page_out(area.range, lambda: smaps_bytes(area.range, "Swap") == area.range.len)
        Pagemap.expect_protected(area, {0, 1}, "of pages swapped out")
        with promise("WP-23", "swapoff"):
            swap.off()
            expect(smaps_bytes(area.range, "Swap"), 0, "bytes in swap, after swapoff")
            Pagemap.expect_protected(area, {0, 1}, "after swapoff")
            undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))
            expect_free(ctx.uffd, area, 2)
            expect_trapped(ctx.uffd, area, 0, 1)
    mend(ctx, area, 0, 1)
    area.expect_pattern_of(area)


@uffd_case(
    "writeprotect-swap-mprotect",
    mem=(ANON, SHMEM_PRIVATE),
    features=WRITEPROTECT,
    needs=("swap",),
    pages=2,
    rows=("WP-20", "WP-23"),
    kind=Kind.DETAIL,
)
def test_writeprotect_swap_mprotect(ctx: Context) -> None:
    """What mprotect(2) does to pages that are swapped out leaves their protection as it was."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0))
    swap_out(area.range)
    for prot in PROT_READ, PROT_READ | PROT_WRITE:
        protect(area.range, prot)
        Pagemap.expect_protected(area, {0}, "after mprotect of pages swapped out")
    expect_free(ctx.uffd, area, 1)
    expect_trapped(ctx.uffd, area, 0)


@uffd_case(
    "writeprotect-migrated",
    mem=NOT_HUGETLB,
    features=WRITEPROTECT,
    needs=("cap_sys_admin",),
    pages=2,
    rows=("WP-07", "WP-08"),
    bugs=(32,),
    kind=Kind.DETAIL,
)
def test_writeprotect_migrated(ctx: Context) -> None:
    """A page that the kernel moves to other memory, which the memory's user never notices, stays protected."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0))
    with declared_sound(area.page(0)) as frame:
        advise(area.page(0), Advice.SOFT_OFFLINE)
    expect(Pagemap.entry(area.start) & PM_PFN_MASK == frame, False, "whether the page is where it was")
    Pagemap.expect_protected(area, {0}, "after MADV_SOFT_OFFLINE")
    area.expect_pattern_of(area)
    expect_free(ctx.uffd, area, 1)
    expect_trapped(ctx.uffd, area, 0)


@uffd_case(
    "writeprotect-thp-migrated",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("cap_sys_admin", "thp"),
    pages=1,
    rows=("WP-24",),
    bugs=(32,),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_migrated(ctx: Context) -> None:
    """A huge page of which the kernel moves one page to other memory, and splits it for that, stays protected."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    with declared_sound(area.page(7)) as frame:
        advise(area.page(7), Advice.SOFT_OFFLINE)
    expect(Pagemap.entry(area.page(7).start) & PM_PFN_MASK == frame, False, "whether the page is where it was")
    Pagemap.expect_protected(area, range(area.nr_pages), "after MADV_SOFT_OFFLINE of page 7")
    area.expect_pattern_of(area)
    expect_trapped(ctx.uffd, area, 7, 8)


@uffd_case("writeprotect-swap-shared", mem=(SHMEM,), features=WRITEPROTECT, needs=("swap",), pages=3, rows=("WP-23",))
def test_writeprotect_swap_shared(ctx: Context) -> None:
    """Pages of shared memory stay protected when they are swapped out, which takes them out of the mapping."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0, 2))

    def gone() -> bool:
        advise(area.range, Advice.PAGEOUT)
        return not any(Pagemap.have(area.range, uapi.PM_PRESENT))

    eventually(gone, "MADV_PAGEOUT to take the pages out of the mapping")
    Pagemap.expect_protected(area, {0, 1}, "of pages swapped out")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area, 0, 1))
    Pagemap.expect_protected(area, {0, 1}, "after a read of page 0")
    expect_trapped(ctx.uffd, area, 0, 1)
    expect_free(ctx.uffd, area, 2)
    mend(ctx, area, 0, 1)
    area.expect_pattern_of(area)


# ---- fork ----------------------------------------------------------------------------------------------------------


def expect_free_in_child(ctx: Context, area: Area, *pages: int) -> None:
    """Fork a child, in which nothing is protected or registered; it writes NEW to the start of each page."""

    def child(channel: Channel) -> None:
        Pagemap.expect_protected(area, (), "in the child")
        expect(registered_for_wp(area.range), False, "whether the child's memory is registered")
        for page in pages:
            poke(area.page(page).start, NEW)
        channel.send()

    with Child(child) as process:
        process.receive()
    ctx.uffd.expect_no_message()


@uffd_case(
    "writeprotect-fork", mem=ALL, features=WRITEPROTECT, pages=2, spare_hugepages=4, rows=("WP-18",), bugs=(58,)
)
def test_writeprotect_fork(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_FORK a child writes freely where its parent stays trapped."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.range)
    expect_free_in_child(ctx, area, 0)
    Pagemap.expect_protected(area, {0, 1}, "in the parent")
    seen = peek(area.start, len(NEW)) == NEW
    expect(seen, ctx.mem.shared, "whether the parent sees what the child wrote")
    expect_trapped(ctx.uffd, area, 0, 1)
    mend(ctx, area, 0, 1)
    area.expect_pattern_of(area)


@uffd_case(
    "writeprotect-fork-missing",
    mem=ALL,
    features=WRITEPROTECT | Feature.WP_UNPOPULATED,
    pages=3,
    spare_hugepages=4,
    rows=("WP-18",),
    bugs=(20,),
)
def test_writeprotect_fork_missing(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_FORK a child writes freely to pages that its parent protected while missing."""
    area = ctx.dst
    area.fill(2, 1)  # where no page is private, fork does not copy page tables
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(0, 2))
    expect_free_in_child(ctx, area, 0)
    Pagemap.expect_protected(area, {0, 1}, "in the parent")
    expect_trapped(ctx.uffd, area, 0, 1)


@uffd_case(
    "writeprotect-fork-event",
    mem=ALL,
    features=WRITEPROTECT | Feature.EVENT_FORK,
    pages=2,
    spare_hugepages=4,
    rows=("WP-19",),
)
def test_writeprotect_fork_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_FORK a child is trapped where its parent is, and its own descriptor says so."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0))

    def child(channel: Channel) -> None:
        Pagemap.expect_protected(area, {0}, "in the child")
        expect(registered_for_wp(area.range), True, "whether the child's memory is registered")
        touch(area.page(1), area.page_size, write=True)
        poke(area.start, NEW)
        channel.send()

    with ctx.handler(src=None, wp=Action.RECORD) as handler, Child(child) as process:
        eventually(lambda: handler.stats.wp > 0, "a write-protect fault of the child")
        (forked,) = handler.children
        expect(handler.messages, [Forked(forked.fd), Fault(area.start, TRAPPED)], "messages")
        forked.expect_asleep(1)
        ctx.uffd.expect_asleep(0)
        forked.unprotect(area.page(0))
        process.receive()
    Pagemap.expect_protected(area, {0}, "in the parent")
    seen = peek(area.start, len(NEW)) == NEW
    expect(seen, ctx.mem.shared, "whether the parent sees what the child wrote")
    expect_trapped(ctx.uffd, area, 0)
    mend(ctx, area, 0)
    area.expect_pattern_of(area)


@uffd_case(
    "writeprotect-fork-event-missing",
    mem=ALL,
    features=WRITEPROTECT | Feature.WP_UNPOPULATED | Feature.EVENT_FORK,
    pages=3,
    spare_hugepages=4,
    rows=("WP-19",),
)
def test_writeprotect_fork_event_missing(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_FORK pages that the parent protected while missing are protected in the child, too."""
    area = ctx.dst
    area.fill(2, 1)  # where no page is private, fork does not copy page tables
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(0, 2))
    look = partial(Pagemap.expect_protected, area, {0, 1})
    with ctx.handler(src=None), Child(lambda _: look("in the child")):
        pass
    look("in the parent")


@uffd_case(
    "writeprotect-fork-copy",
    mem=PRIVATE,
    features=WRITEPROTECT,
    pages=2,
    spare_hugepages=4,
    rows=("WP-33",),
    kind=Kind.DETAIL,
)
def test_writeprotect_fork_copy(ctx: Context) -> None:
    """A writer that was trapped on a page shared with a child writes to a copy; the child keeps the page as it was."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.page(0))

    def child(channel: Channel) -> None:
        channel.receive()
        area.expect_pattern_of(area)

    with Child(child) as process:
        expect_trapped(ctx.uffd, area, 0)
        process.send()
    mend(ctx, area, 0)
    area.expect_pattern_of(area)


# ---- transparent huge pages ----------------------------------------------------------------------------------------


@uffd_case(
    "writeprotect-thp-part",
    mem=(ANON, SHMEM),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-24",),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_part(ctx: Context) -> None:
    """One base page of a transparent huge page is protected alone; its neighbours stay free."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(7))
    Pagemap.expect_protected(area, {7}, "after protecting page 7")
    expect_free(ctx.uffd, area, 0, 6, 8, area.nr_pages - 1)
    expect_trapped(ctx.uffd, area, 7)
    area.expect_pattern_of(area, 0, 7)
    area.expect_pattern_of(area, 8)


@uffd_case(
    "writeprotect-thp",
    mem=(ANON, SHMEM),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-25",),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp(ctx: Context) -> None:
    """A transparent huge page protected whole traps by base page, and base page by base page it is un-protected."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    Pagemap.expect_protected(area, range(area.nr_pages), "of a huge page")
    with promise("WP-25", "read"):
        undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))
    page = area.page(7)
    write = partial(poke, page.start + 9, NEW)
    with faulting(ctx.uffd, page.start + 9, call=write, flags=TRAPPED) as waiter:
        waiter.expect_sleeping()  # a writer that the kernel lets try again and again is on the list, too, now and then
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.unprotect(page)
    Pagemap.expect_protected(area, set(range(area.nr_pages)) - {7}, "after un-protecting page 7")
    expect_trapped(ctx.uffd, area, 0, 6, 8, area.nr_pages - 1)
    ctx.uffd.unprotect(area.range)
    Pagemap.expect_protected(area, (), "after un-protecting the rest")
    area.expect_pattern_of(area, 9, area.nr_pages - 10)


@uffd_case(
    "writeprotect-thp-whole",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-25",),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_whole(ctx: Context) -> None:
    """A writer to a huge page that is protected and un-protected whole goes on, and the whole page is free."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    with trapped(ctx.uffd, area, 7):
        ctx.uffd.unprotect(area.range)
        Pagemap.expect_protected(area, (), "after un-protecting the huge page")
    expect_free(ctx.uffd, area, 0, 8, area.nr_pages - 1)
    area.expect_pattern_of(area, 0, 7)
    area.expect_pattern_of(area, 8)


@uffd_case(
    "writeprotect-thp-mprotect",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-20", "WP-25"),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_mprotect(ctx: Context) -> None:
    """A huge page that mprotect(2) makes read-only and writable again is protected as it was."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    protect(area.range, PROT_READ)
    protect(area.range, PROT_READ | PROT_WRITE)
    expect(pmd_mapped(area.range), area.range.len, "bytes mapped by a huge page")
    Pagemap.expect_protected(area, range(area.nr_pages), "after mprotect back")
    expect_trapped(ctx.uffd, area, 7, 0)


@uffd_case(
    "writeprotect-thp-split",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-24", "REG-40"),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_split(ctx: Context) -> None:
    """A huge page that the kernel splits stays protected and there, with the unused parts that become zero pages.

    MADV_COLD of a part splits it; since Linux 6.12 a page that holds zeros alone is then given up.
    """
    area, used = ctx.allocate(pmd_size() // PAGE_SIZE), (3, 9)
    advise(area.range, Advice.HUGEPAGE)
    for page in used:
        poke(area.page(page).start, NEW)
    if pmd_mapped(area.range) < area.range.len:
        raise Skip("no transparent huge page to be had: is memory short or fragmented?")
    ctx.uffd.register(area.range, MISSING | WP)
    ctx.uffd.writeprotect(area.range)
    advise(area.page(used[0]), Advice.COLD)
    Pagemap.expect_protected(area, range(area.nr_pages), "after MADV_COLD of one page")
    undisturbed(ctx.uffd, lambda: area.expect_zero(10))
    expect([peek(area.page(page).start, len(NEW)) for page in used], [NEW, NEW], "what was written before")
    expect_trapped(ctx.uffd, area, 0, *used, area.nr_pages - 1)


@uffd_case(
    "writeprotect-thp-zeropage",
    mem=(ANON,),
    features=Feature.PAGEFAULT_FLAG_WP,
    needs=("thp",),
    pages=1,
    rows=("WP-13", "WP-25"),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_zeropage(ctx: Context) -> None:
    """The huge zero page is protected whole and in part like any other, and traps by base page."""
    for whole in (True, False):
        area = ctx.allocate(pmd_size() // PAGE_SIZE)
        advise(area.range, Advice.HUGEPAGE)
        area.expect_zero()
        ctx.uffd.register(area.range, WP)
        ctx.uffd.writeprotect(area.range if whole else area.page(7))
        protected = set(range(area.nr_pages)) if whole else {7}
        Pagemap.expect_protected(area, protected, "of zero pages")
        expect_trapped(ctx.uffd, area, 7)
        Pagemap.expect_protected(area, protected - {7}, "after un-protecting page 7")
        (expect_trapped if whole else expect_free)(ctx.uffd, area, 8)
        area.expect_zero(9)


@uffd_case(
    "writeprotect-thp-fork",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-18",),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_fork(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_FORK a child writes freely to a huge page that its parent protected."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    expect_free_in_child(ctx, area, 0, 7)
    Pagemap.expect_protected(area, range(area.nr_pages), "in the parent")
    area.expect_pattern_of(area)
    expect_trapped(ctx.uffd, area, 7)


@uffd_case(
    "writeprotect-thp-fork-copy",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-33",),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_fork_copy(ctx: Context) -> None:
    """A huge page shared with a child, protected and un-protected whole, is not the writer's own: the child's stays."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)

    def child(channel: Channel) -> None:
        channel.receive()
        area.expect_pattern_of(area)

    with Child(child) as process:
        ctx.uffd.writeprotect(area.range)
        ctx.uffd.unprotect(area.range)
        undisturbed(ctx.uffd, partial(poke, area.page(7).start, NEW))
        process.send()
    expect(peek(area.page(7).start, len(NEW)), NEW, "what was written")


@uffd_case(
    "writeprotect-thp-fork-event",
    mem=(ANON,),
    features=WRITEPROTECT | Feature.EVENT_FORK,
    needs=("thp",),
    pages=1,
    rows=("WP-19",),
    kind=Kind.DETAIL,
)
def test_writeprotect_thp_fork_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_FORK a huge page that the parent protected is protected in the child."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    look = partial(Pagemap.expect_protected, area, range(area.nr_pages))
    with ctx.handler(src=None, where=area.range), Child(lambda _: look("in the child")):
        pass
    look("in the parent")


@uffd_case(
    "writeprotect-collapse",
    mem=(ANON, SHMEM),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-26",),
    bugs=(30,),
    kind=Kind.DETAIL,
)
def test_writeprotect_collapse(ctx: Context) -> None:
    """MADV_COLLAPSE refuses a range with a protected page, which stays protected."""
    require_collapse(ctx)
    area = small_area(ctx)
    ctx.uffd.register(area.range, WP)
    for number in (0, 7, area.nr_pages - 1):
        ctx.uffd.writeprotect(area.page(number))
        with promise("WP-26", f"page {number} protected"), fails(EINVAL):
            collapse(area.range)
        advise(area.range, Advice.NOHUGEPAGE)
        Pagemap.expect_protected(area, {number}, "after MADV_COLLAPSE")
        expect_trapped(ctx.uffd, area, number)
    area.expect_pattern_of(area, 1, 6)


@uffd_case(
    "writeprotect-collapse-missing",
    mem=(ANON,),
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED,
    needs=("thp",),
    pages=1,
    rows=("WP-26",),
    kind=Kind.DETAIL,
)
def test_writeprotect_collapse_missing(ctx: Context) -> None:
    """MADV_COLLAPSE refuses a range with a page that is protected though not there, which stays protected."""
    require_collapse(ctx)
    area = small_area(ctx)
    advise(area.page(7), Advice.DONTNEED)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(7))
    with promise("WP-26"), fails(EINVAL):
        collapse(area.range)
    Pagemap.expect_protected(area, {7}, "after MADV_COLLAPSE")
    expect_trapped(ctx.uffd, area, 7)


@uffd_case(
    "writeprotect-collapse-file",
    mem=(SHMEM,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-26",),
    kind=Kind.DETAIL,
)
def test_writeprotect_collapse_file(ctx: Context) -> None:
    """Whatever MADV_COLLAPSE makes of a file, a range watched for writes maps it by base page, protected as before."""
    require_collapse(ctx)
    area = small_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(7))
    with suppress(KernelError):
        collapse(area.range)
    expect(pmd_mapped(area.range), 0, "bytes mapped by huge pages")
    Pagemap.expect_protected(area, {7}, "after MADV_COLLAPSE")
    expect_free(ctx.uffd, area, 0, area.nr_pages - 1)
    expect_trapped(ctx.uffd, area, 7)
    area.expect_pattern_of(area, 8)


# ---- other ways to the same page -----------------------------------------------------------------------------------


@uffd_case("writeprotect-alias", mem=SHARED, features=WRITEPROTECT, pages=2, rows=("WP-17",), kind=Kind.DETAIL)
def test_writeprotect_alias(ctx: Context) -> None:
    """Protection is of one mapping: a write through another, or through the file, passes and is seen at once."""
    area = filled(ctx)
    ctx.uffd.writeprotect(area.range)
    undisturbed(ctx.uffd, partial(poke, area.alias_page(0).start, NEW))
    expect(peek(area.start, len(NEW)), NEW, "what was written through the other mapping")
    if ctx.mem is SHMEM:
        os.pwrite(area.fd or 0, NEW, area.page_size)
        expect(peek(area.page(1).start, len(NEW)), NEW, "what was written to the file")
    Pagemap.expect_protected(area, {0, 1}, "after writes elsewhere")
    ctx.uffd.expect_no_message()
    expect_trapped(ctx.uffd, area, 0, 1)


@uffd_case("writeprotect-kernel", mem=ALL, features=WRITEPROTECT, needs=("kernel_faults",), pages=2, rows=("WP-29",))
def test_writeprotect_kernel(ctx: Context) -> None:
    """The kernel that writes for a process, by read(2) or process_vm_writev(2), is trapped; when it reads it is not."""
    area = ctx.dst
    area.fill()
    reader, writer = os.pipe()
    with Uffd.open(WRITEPROTECT, os.O_CLOEXEC | os.O_NONBLOCK) as uffd:
        uffd.register(area.range, WP)
        os.write(writer, NEW)
        writes: dict[str, Callable[[], object]] = {
            "read(2)": lambda: syscalls.read_into(reader, area.start, len(NEW)),
            "process_vm_writev(2)": lambda: syscalls.process_vm_writev(os.getpid(), area.start, NEW),
        }
        for what, write in writes.items():
            uffd.writeprotect(area.page(0))
            with promise("WP-29", what):
                with faulting(uffd, area.start, call=write, flags=TRAPPED) as waiter:
                    uffd.expect_still_asleep(1)
                    area.expect_pattern_of(area)
                    uffd.unprotect(area.page(0))
                expect(waiter.result(), len(NEW), "bytes written")
                expect(peek(area.start, len(NEW)), NEW, "what was written")
            mend(ctx, area, 0)
        uffd.writeprotect(area.range)
        undisturbed(uffd, lambda: syscalls.write_from(writer, area.start, len(NEW)))
        undisturbed(uffd, lambda: syscalls.process_vm_readv(os.getpid(), area.start, len(NEW)))
        Pagemap.expect_protected(area, {0, 1}, "after reads by the kernel")
    os.close(reader)
    os.close(writer)


@uffd_case(
    "writeprotect-proc-mem",
    mem=ALL,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=2,
    rows=("WP-30",),
    kind=Kind.DETAIL,
)
def test_writeprotect_proc_mem(ctx: Context) -> None:
    """A write to a protected page through /proc/PID/mem is EIO, without a message and with the page as it was."""
    area = ctx.dst
    area.fill()
    mem = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
    with Uffd.open(WRITEPROTECT, os.O_CLOEXEC | os.O_NONBLOCK) as uffd:
        uffd.register(area.range, WP)
        uffd.writeprotect(area.page(0))
        with promise("WP-30", "write"), fails(EIO):
            undisturbed(uffd, lambda: os.pwrite(mem, NEW, area.start))
        with promise("WP-30", "read"):
            expect(undisturbed(uffd, lambda: os.pread(mem, 8, area.start)), peek(area.start, 8), "what was read")
        Pagemap.expect_protected(area, {0}, "afterwards")
        area.expect_pattern_of(area)
    os.close(mem)


@uffd_case(
    "writeprotect-proc-mem-read-only",
    mem=(ANON, SHMEM_PRIVATE),
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=2,
    rows=("WP-30",),
    kind=Kind.DETAIL,
)
def test_writeprotect_proc_mem_read_only(ctx: Context) -> None:
    """/proc/PID/mem, which may write to a read-only mapping, cannot write to a protected page of it: EIO."""
    area = ctx.dst
    area.fill()
    mem = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
    with Uffd.open(WRITEPROTECT, os.O_CLOEXEC | os.O_NONBLOCK) as uffd:
        uffd.register(area.range, WP)
        uffd.writeprotect(area.page(0))
        protect(area.range, PROT_READ)
        with promise("WP-30", "read-only mapping"), fails(EIO):
            undisturbed(uffd, lambda: os.pwrite(mem, NEW, area.start))
        Pagemap.expect_protected(area, {0}, "afterwards")
        area.expect_pattern_of(area)
    os.close(mem)


SHOWN_AS_SWAPPED = Defect(
    id="D-WP-32",
    summary="pagemap shows a page that is protected but not there as swapped out, though nothing is in swap",
    kernels="6.12.117, 6.18.44",
    advice="do not take PM_SWAP, or PAGE_IS_SWAPPED, of a page with PM_UFFD_WP for a sign of swapping",
    shows=r"PM_SWAP in the page's entry: expected 0, got PM_SWAP",
)


def protect_missing(ctx: Context) -> int:
    """Protect a page that is not there; return its entry in pagemap."""
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.page(0))
    return Pagemap.entry(ctx.dst.start)


@uffd_case(
    "writeprotect-missing-swapped",
    mem=(ANON, SHMEM, SHMEM_PRIVATE),
    features=WRITEPROTECT | Feature.WP_UNPOPULATED,
    pages=2,
    rows=("WP-32",),
    defect=SHOWN_AS_SWAPPED,
)
def test_writeprotect_missing_swapped(ctx: Context) -> None:
    """A page that is protected but not there does not show as swapped out in pagemap."""
    expect(uapi.PagemapBit(protect_missing(ctx)) & uapi.PM_SWAP, uapi.PagemapBit(0), "PM_SWAP in the page's entry")


@uffd_case(
    "writeprotect-missing-shown",
    mem=ALL,
    features=WRITEPROTECT | Feature.WP_UNPOPULATED,
    pages=2,
    rows=("WP-32",),
    kind=Kind.DETAIL,
)
def test_writeprotect_missing_shown(ctx: Context) -> None:
    """A page that is protected but not there has PM_UFFD_WP in pagemap, maybe PM_SWAP, and neither PRESENT nor FILE."""
    state = uapi.PM_UFFD_WP | uapi.PM_SWAP | uapi.PM_PRESENT | uapi.PM_FILE | uapi.PM_GUARD
    shown = uapi.PagemapBit(protect_missing(ctx) & state)
    accepted = [uapi.PM_UFFD_WP] if ctx.mem.hugetlb else [uapi.PM_UFFD_WP, uapi.PM_UFFD_WP | uapi.PM_SWAP]
    if shown not in accepted:
        raise AssertionError(f"expected {' or '.join(map(str, accepted))} in the page's entry, got {shown}")
