# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_WRITEPROTECT: the request, who is trapped by the protection, and on which ways to the page."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from errno import EAGAIN, EFAULT, EINVAL, ENOENT, ESRCH
from functools import partial
from pathlib import Path
from signal import SIGBUS, SIGSEGV

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, HUGETLB, HUGETLB_PRIVATE, KERNEL_FAULTS, MISSING, NEW, NOT_HUGETLB, PAGE_SIZE, PROT_READ, SHARED, SHMEM,
    SHMEM_PRIVATE, TRAPPED, WP, WRITEPROTECT, Advice, Area, Channel, Child, Context, Fault, Feature, KernelError,
    Pagemap, Range, Skip, Uffd, Waiter, WriteprotectMode, advise, bad_ranges, eventually, expect, expect_free,
    expect_trapped, faulting, filled, huge_area, mend, peek, poke, promise, protect, refuses, require_soft_dirty,
    signals, smaps_fields, syscalls, through_proc, touch, trapped, uapi, undisturbed, unmap, unread_event,
)  # fmt: skip

SEVERAL_MAPPINGS = WRITEPROTECT | Feature.WP_UNPOPULATED
"""Since the release that brought this feature the range of one call may span several mappings (mwriteprotect_range)."""
PROTECT, UNPROTECT = WriteprotectMode.WP, WriteprotectMode(0)


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


# ---- pages with other marks ----------------------------------------------------------------------------------------


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
    write = partial(through_proc, "self", area.start, 0, NEW)
    with Uffd.open(WRITEPROTECT, KERNEL_FAULTS) as uffd:
        uffd.register(area.range, WP)
        uffd.writeprotect(area.page(0))
        with promise("WP-30", "write"):
            expect(undisturbed(uffd, write), "EIO", "result")
        with promise("WP-30", "read"):
            read = undisturbed(uffd, partial(through_proc, "self", area.start, 8))
            expect(read, peek(area.start, 8), "what was read")
        Pagemap.expect_protected(area, {0}, "afterwards")
        area.expect_pattern_of(area)


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
    write = partial(through_proc, "self", area.start, 0, NEW)
    with Uffd.open(WRITEPROTECT, KERNEL_FAULTS) as uffd:
        uffd.register(area.range, WP)
        uffd.writeprotect(area.page(0))
        protect(area.range, PROT_READ)
        with promise("WP-30", "read-only mapping"):
            expect(undisturbed(uffd, write), "EIO", "result")
        Pagemap.expect_protected(area, {0}, "afterwards")
        area.expect_pattern_of(area)
