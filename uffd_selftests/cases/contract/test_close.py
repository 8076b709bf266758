# SPDX-License-Identifier: GPL-2.0-only
"""close(2): the last one unregisters everything, wakes everybody and leaves ordinary memory behind."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from errno import EBUSY
from functools import partial
from signal import SIGCHLD, SIGKILL

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, DEADLINE, DEFAULT_FLAGS, HUGETLB, KERNEL_FAULTS, MINOR, MISSING, PROT_READ, SHMEM, SHMEM_PRIVATE,
    UNREGISTERED, WP, WRITEPROTECT, Advice, Channel, Child, Context, Fault, Feature, Forked, PagefaultFlag, Pagemap,
    Skip, Uffd, Waiter, advise, expect, expect_bytes, expect_mappings, expect_modes, faulting, huge_area, long_fill,
    peek, pmd_mapped, poised, poke, promise, protect, refuses, remap, settle, smaps_fields, swap_out, syscalls, touch,
    touch_trapped, undisturbed, unmap,
)  # fmt: skip

BLOCKING = DEFAULT_FLAGS & ~os.O_NONBLOCK
EVENTS = Feature.EVENT_REMOVE | Feature.EVENT_REMAP | Feature.EVENT_UNMAP
WRITE_TO_PROTECTED = PagefaultFlag.WRITE | PagefaultFlag.WP


# ---- who sleeps in a fault -----------------------------------------------------------------------------------------


@uffd_case("close-missing", mem=ALL, pages=2, spare_hugepages=2, rows=("CL-01",))
def test_close_missing(ctx: Context) -> None:
    """The last close unregisters every range and wakes every thread, its message read or not; the pages are zero."""
    other, uffd = ctx.allocate(), ctx.uffd
    for area in (ctx.dst, other):
        uffd.register(area.range, MISSING)
    with (
        faulting(uffd, ctx.dst.page(1).start, write=True) as read,
        faulting(uffd, other.start, read=False) as unread,
    ):
        uffd.close()
        expect_modes(ctx.dst.range, UNREGISTERED)
        expect_modes(other.range, UNREGISTERED)
        read.result()
        expect(unread.result(), b"\0", "the byte that the other thread read")
    ctx.dst.expect_zero()
    other.expect_zero()


@uffd_case("close-under-way", mem=ALL, pages=1, rows=("CL-01",), bugs=(59,), kind=Kind.DETAIL, smp=True)
def test_close_under_way(ctx: Context) -> None:
    """A fault that comes while the last close waits for the address space is over with it: nobody hears of it."""
    if len(os.sched_getaffinity(0)) < 2:
        raise Skip("one processor, which a kernel with bug 59 would keep: let the run have another one")
    uffd, page = ctx.uffd, ctx.dst.page(0)
    uffd.register(page, MISSING)
    with (
        Uffd.open() as other,
        poised(lambda: peek(page.start)) as (fault, [waiter]),
        poised(uffd.close) as (close, _),
        long_fill(other, nice=0) as busy,
        Waiter(lambda: protect(busy, PROT_READ)) as changing,  # has the address space until the fill is over
    ):
        settle(changing)
        close()
        fault()
    expect(waiter.result(), b"\0", "the byte that the thread read")
    expect_modes(page, UNREGISTERED)


@uffd_case("close-wp", mem=ALL, features=WRITEPROTECT, pages=2, rows=("CL-02",))
def test_close_wp(ctx: Context) -> None:
    """The last close wakes threads that write to protected pages; the writes go through and the marks are gone."""
    uffd, (first, second) = ctx.uffd, (ctx.dst.page(0).start, ctx.dst.page(1).start)
    ctx.dst.fill()
    uffd.register(ctx.dst.range, WP)
    uffd.writeprotect(ctx.dst.range)
    with (
        faulting(uffd, first, flags=WRITE_TO_PROTECTED, call=lambda: poke(first, b"\xaa")),
        faulting(uffd, second, read=False, call=lambda: poke(second, b"\xbb")),
    ):
        uffd.close()
        expect_modes(ctx.dst.range, UNREGISTERED)
        Pagemap.expect_protected(ctx.dst, [], "after the last close")
    expect((peek(first), peek(second)), (b"\xaa", b"\xbb"), "what was written")


@uffd_case(
    "close-minor",
    mem=(SHMEM, HUGETLB),
    features=Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS,
    pages=2,
    rows=("CL-02",),
)
def test_close_minor(ctx: Context) -> None:
    """The last close wakes threads that sleep in minor faults; they find what the page cache holds."""
    uffd = ctx.uffd
    ctx.dst.pattern.fill(ctx.dst.alias.start, 0, 2)
    uffd.register(ctx.dst.range, MINOR)
    with (
        faulting(uffd, ctx.dst.start, flags=PagefaultFlag.MINOR),
        faulting(uffd, ctx.dst.page(1).start, read=False),
    ):
        uffd.close()
        expect_modes(ctx.dst.range, UNREGISTERED)
    ctx.dst.expect_pattern(ctx.dst.range)


@uffd_case("close-syscall", mem=ALL, needs=("kernel_faults",), pages=3, rows=("CL-04",), kind=Kind.DETAIL)
def test_close_syscall(ctx: Context) -> None:
    """A system call that sleeps in a fault completes after the last close as if nothing had been registered."""
    file = os.memfd_create("file", os.MFD_CLOEXEC)
    os.write(file, b"1234file")
    os.lseek(file, 4, os.SEEK_SET)
    read_to, write_from, copy_from = (ctx.dst.page(number).start for number in range(3))
    for name, address, call, flags, result in (
        ("read", read_to, partial(syscalls.read_into, file, read_to, 4), PagefaultFlag.WRITE, 4),
        ("write", write_from, partial(syscalls.write_from, file, write_from, 4), PagefaultFlag(0), 4),
        ("process_vm_readv", copy_from, partial(process_vm_readv, copy_from), PagefaultFlag(0), bytes(4)),
    ):
        with promise("CL-04", name), Uffd.open(flags=KERNEL_FAULTS) as uffd:
            uffd.register(ctx.dst.range, MISSING)
            with faulting(uffd, address, flags=flags, call=call) as waiter:
                uffd.close()
                expect(waiter.result(), result, "result of the system call")
    expect(peek(read_to, 5), b"file\0", "what was read")
    expect(os.pread(file, 16, 0), b"1234file" + bytes(4), "the file written to")
    os.close(file)


def process_vm_readv(address: int) -> bytes:
    """process_vm_readv(2) of four bytes of this process."""
    return syscalls.process_vm_readv(os.getpid(), address, 4)


@uffd_case("close-race", mem=(ANON, SHMEM), pages=32, rows=("CL-01",), smp=True)
def test_close_race(ctx: Context) -> None:
    """Threads that fault while the last close goes on meet neither a signal nor an endless sleep."""
    for _ in range(20):
        with Uffd.open() as uffd, ExitStack() as stack:
            uffd.register(ctx.dst.range, MISSING)
            call = partial(touch_trapped, ctx.dst.range, ctx.page_size)
            waiters = [stack.enter_context(Waiter(call)) for _ in range(3)]
            expect(uffd.readable(DEADLINE), True, "readable")
            uffd.close()
            for waiter in waiters:
                expect(waiter.result(), [None] * ctx.nr_pages, "signals")
        expect_modes(ctx.dst.range, UNREGISTERED)
        ctx.dst.release()


# ---- who waits for an event ----------------------------------------------------------------------------------------


@uffd_case("close-event-madvise", mem=ALL, features=EVENTS, pages=2, rows=("CL-05",))
def test_close_event_madvise(ctx: Context) -> None:
    """madvise(2) calls that wait for their events to be read go on after the last close, and drop the pages."""
    uffd = ctx.uffd
    ctx.dst.fill()
    uffd.register(ctx.dst.range, MISSING)
    advice = Advice.REMOVE if ctx.mem.shared else Advice.DONTNEED
    with (
        Waiter(partial(advise, ctx.dst.page(0), advice)) as one,
        Waiter(partial(advise, ctx.dst.page(1), advice)) as two,
    ):
        one.expect_in_event()
        two.expect_in_event()
        uffd.close()
        expect_modes(ctx.dst.range, UNREGISTERED)
    ctx.dst.expect_zero()


@uffd_case("close-event-munmap", mem=ALL, features=EVENTS, pages=2, rows=("CL-05",))
def test_close_event_munmap(ctx: Context) -> None:
    """munmap(2) that waits for its event to be read goes on after the last close; the rest stays mapped."""
    uffd = ctx.uffd
    uffd.register(ctx.dst.range, MISSING)
    with Waiter(partial(unmap, ctx.dst.page(0))) as waiter:
        waiter.expect_in_event()
        uffd.close()
    expect(list(smaps_fields(ctx.dst.page(0))), [], "mappings of the page that was unmapped")
    expect_modes(ctx.dst.page(1), UNREGISTERED)
    expect_bytes(ctx.dst.page(1), 0)


@uffd_case("close-event-mremap", mem=ALL, features=EVENTS, pages=2, rows=("CL-05",))
def test_close_event_mremap(ctx: Context) -> None:
    """mremap(2) that waits for its event to be read goes on after the last close; the contents have moved."""
    uffd, target = ctx.uffd, ctx.src.range
    ctx.dst.fill()
    uffd.register(ctx.dst.range, MISSING)
    with Waiter(partial(remap, ctx.dst.range, to=target.start)) as waiter:
        waiter.expect_in_event()
        uffd.close()
        expect(waiter.result(), target.start, "result of mremap(2)")
    expect_modes(target, UNREGISTERED)
    ctx.dst.expect_pattern(target)
    expect(list(smaps_fields(ctx.dst.range)), [], "mappings of the old place")


@uffd_case("close-event-fork", mem=ALL, features=Feature.EVENT_FORK, pages=2, spare_hugepages=4, rows=("CL-08",))
def test_close_event_fork(ctx: Context) -> None:
    """fork(2) that waits for its event to be read goes on when another process closes the last descriptor."""
    other = ctx.allocate()

    def monitor(channel: Channel) -> None:
        _, (fd,) = channel.receive_fds()
        channel.send()
        with Uffd(fd) as uffd:
            expect(uffd.readable(DEADLINE), True, "readable, with the event of the fork")

    def forked(_: Channel) -> None:
        for area in (ctx.dst, other):
            expect_modes(area.range, UNREGISTERED)
            area.expect_zero()

    with Child(monitor) as reader:
        with Uffd.open(Feature.EVENT_FORK) as uffd:
            uffd.register(ctx.dst.range, MISSING)
            uffd.register(other.range, MISSING)
            reader.send(None, uffd.fd)
            reader.receive()
        with Child(forked):
            expect_modes(ctx.dst.range, UNREGISTERED)
            expect_modes(other.range, UNREGISTERED)


FORK_HOLDS = Defect(
    id="D-CL-07",
    summary="fork(2) that waits for its event hangs when its process closes the last userfaultfd: "
    "the child, not even born, holds a copy that nobody can read or close.",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="With UFFD_FEATURE_EVENT_FORK keep the descriptor in a monitor process, or read events until fork returns.",
    shows=r"expected 0, got UFFDIO_REGISTER_MODE_MISSING$",
)


@uffd_case(
    "close-event-fork-own", mem=(ANON,), features=Feature.EVENT_FORK, pages=1, rows=("CL-07",), defect=FORK_HOLDS
)
def test_close_event_fork_own(ctx: Context) -> None:
    """fork(2) that waits for its event to be read goes on when another thread of its process closes the last one."""

    def target(channel: Channel) -> None:
        uffd = Uffd.open(Feature.EVENT_FORK)
        uffd.register(ctx.dst.range, MISSING)
        with Waiter(fork_without_lock) as forker:
            forker.expect_in_event()
            uffd.close()
            channel.send()
            pid = forker.result()
            assert isinstance(pid, int)
            os.kill(pid, SIGKILL)
            os.waitpid(pid, 0)

    where = ctx.dst.range
    with Child(target) as child:  # a failure kills it, and with it what hangs there
        child.receive()
        expect_modes(where, UNREGISTERED, pid=child.pid)


def fork_without_lock() -> int:
    """fork(2), for once without the interpreter's lock, of a child that is of no use; returns its process ID."""
    pid = syscalls.call("clone", SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    return pid


# ---- which close is the last ---------------------------------------------------------------------------------------


@uffd_case("close-duplicate", mem=(ANON, HUGETLB), pages=1, rows=("CL-03",))
def test_close_duplicate(ctx: Context) -> None:
    """While a duplicate of the descriptor is open, close changes nothing."""
    uffd = ctx.uffd
    uffd.register(ctx.dst.range, MISSING)
    with Uffd(os.dup(uffd.fd)) as duplicate, faulting(uffd, ctx.dst.start) as waiter:
        uffd.close()
        duplicate.expect_asleep(1)
        expect_modes(ctx.dst.range, MISSING)
        duplicate.close()
        expect(waiter.result(), b"\0", "the byte read after the last close")
    expect_modes(ctx.dst.range, UNREGISTERED)


@uffd_case("close-in-flight", mem=(ANON, HUGETLB), pages=1, rows=("CL-03",))
def test_close_in_flight(ctx: Context) -> None:
    """While the descriptor is on its way to another process, close changes nothing; when it gets lost, all ends."""
    uffd = ctx.uffd
    uffd.register(ctx.dst.range, MISSING)
    with faulting(uffd, ctx.dst.start) as waiter:
        here, there = socket.socketpair()
        with here, there:
            socket.send_fds(here, [b"x"], [uffd.fd])
            uffd.close()
            expect_modes(ctx.dst.range, MISSING)
            waiter.expect_sleeping()
        expect(waiter.result(), b"\0", "the byte read when the descriptor is lost")
    expect_modes(ctx.dst.range, UNREGISTERED)


@uffd_case("close-passed", mem=(ANON, HUGETLB), pages=1, rows=("CL-03",))
def test_close_passed(ctx: Context) -> None:
    """While another process holds the descriptor, close changes nothing."""

    def holder(channel: Channel) -> None:
        with Uffd(channel.receive_fds()[1][0]) as passed:
            channel.receive()
            passed.expect_asleep(1)
            channel.send()
            channel.receive()

    with Child(holder) as child:
        uffd = ctx.uffd
        uffd.register(ctx.dst.range, MISSING)
        with faulting(uffd, ctx.dst.start) as waiter:
            child.send(None, uffd.fd)
            uffd.close()
            child.send("closed here")
            child.receive()
            expect_modes(ctx.dst.range, MISSING)
            child.send("close there")
            expect(waiter.result(), b"\0", "the byte read after the last close")
    expect_modes(ctx.dst.range, UNREGISTERED)


@uffd_case("close-inherited", mem=(ANON, HUGETLB), pages=1, rows=("CL-03",))
def test_close_inherited(ctx: Context) -> None:
    """While a forked child lives that inherited the descriptor, close changes nothing."""
    uffd = ctx.uffd
    uffd.register(ctx.dst.range, MISSING)

    def heir(channel: Channel) -> None:
        channel.receive()
        uffd.expect_asleep(1)
        channel.send()
        channel.receive()

    with Child(heir) as child, faulting(uffd, ctx.dst.start) as waiter:
        uffd.close()
        child.send("closed here")
        child.receive()
        expect_modes(ctx.dst.range, MISSING)
        child.send("exit")
        expect(waiter.result(), b"\0", "the byte read after the child's exit")
    expect_modes(ctx.dst.range, UNREGISTERED)


@uffd_case("close-monitor-killed", mem=(ANON, HUGETLB), pages=1, rows=("CL-06",))
def test_close_monitor_killed(ctx: Context) -> None:
    """When the process that holds the last descriptor is killed, threads that wait for it go on."""

    def monitor(channel: Channel) -> None:
        with Uffd(channel.receive_fds()[1][0]) as uffd:
            uffd.wait_fault(ctx.dst.start)
            channel.send()
            channel.receive()

    with Child(monitor) as child:
        with ctx.uffd as uffd:
            uffd.register(ctx.dst.range, MISSING)
            child.send(None, uffd.fd)
        with Waiter(partial(peek, ctx.dst.start)) as waiter:
            child.receive()
            waiter.expect_sleeping()
            child.kill()
            expect(waiter.result(), b"\0", "the byte read after the monitor's end")
    expect_modes(ctx.dst.range, UNREGISTERED)


@uffd_case("close-reading", mem=(ANON,), pages=1, rows=("CL-03",), kind=Kind.DETAIL)
def test_close_reading(ctx: Context) -> None:
    """A userfaultfd that is closed while a thread sleeps in read(2) lives on until the read ends."""
    uffd = Uffd.open(flags=BLOCKING)
    uffd.register(ctx.dst.range, MISSING)
    with Waiter(uffd.read) as reader:
        reader.expect_sleeping()
        uffd.close()
        expect_modes(ctx.dst.range, MISSING)
        with Waiter(partial(peek, ctx.dst.start)) as waiter:
            expect(reader.result(), [Fault(ctx.dst.start, PagefaultFlag(0))], "messages read")
            expect(waiter.result(), b"\0", "the byte read after the read's end")
    expect_modes(ctx.dst.range, UNREGISTERED)


@uffd_case(
    "close-forked-handle",
    mem=ALL,
    features=Feature.EVENT_FORK,
    pages=2,
    spare_hugepages=2,
    rows=("CL-11",),
    kind=Kind.DETAIL,
)
def test_close_forked_handle(ctx: Context) -> None:
    """The last close of the descriptor that a fork event brought frees the child, and does nothing to its parent."""
    uffd = ctx.uffd

    def monitor(_: Channel) -> None:
        message = uffd.wait("UFFD_EVENT_FORK")
        assert isinstance(message, Forked), f"expected UFFD_EVENT_FORK, got {message}"
        with Uffd(message.ufd) as child:
            child.wait_fault(ctx.dst.start)

    def forked(_: Channel) -> None:
        ctx.dst.expect_zero()
        expect_modes(ctx.dst.range, UNREGISTERED)

    with Child(monitor):
        uffd.register(ctx.dst.range, MISSING)
        with Child(forked):
            pass
        expect_modes(ctx.dst.range, MISSING)


# ---- what is left --------------------------------------------------------------------------------------------------


@uffd_case("close-merges", mem=(ANON, SHMEM, SHMEM_PRIVATE), pages=3, rows=("CL-09",), kind=Kind.DETAIL)
def test_close_merges(ctx: Context) -> None:
    """After the last close a mapping that registration had cut is whole again."""
    ctx.uffd.register(ctx.dst.page(1), MISSING)
    expect_modes(ctx.dst.range, UNREGISTERED, MISSING, UNREGISTERED)
    expect_mappings(ctx.dst, 1, 1, 1)
    ctx.uffd.close()
    expect_modes(ctx.dst.range, UNREGISTERED)
    expect_mappings(ctx.dst, 3)


@uffd_case("close-others", mem=ALL, pages=3, rows=("CL-09",), kind=Kind.DETAIL)
def test_close_others(ctx: Context) -> None:
    """The last close of one userfaultfd frees its ranges for others, and leaves alone what those have registered."""
    uffd = ctx.uffd
    uffd.register(ctx.dst.page(1), MISSING)
    with Uffd.open() as other, refuses(EBUSY):
        other.register(ctx.dst.range, MISSING)
    with Uffd.open() as other:
        for number in (0, 2):
            other.register(ctx.dst.page(number), MISSING)
        with faulting(other, ctx.dst.start):
            uffd.close()
            other.expect_still_asleep(1)
            expect_modes(ctx.dst.range, MISSING, UNREGISTERED, MISSING)
            other.register(ctx.dst.range, MISSING)
            other.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


def close_protected(ctx: Context) -> None:
    """Close, and look for what protection may have left: marks, and faults of the next one who registers."""
    ctx.uffd.close()
    Pagemap.expect_protected(ctx.dst, [], "after the last close")
    with Uffd.open(WRITEPROTECT) as again:
        again.register(ctx.dst.range, WP)
        Pagemap.expect_protected(ctx.dst, [], "registered anew")
        undisturbed(again, partial(touch, ctx.dst.range, ctx.page_size, write=True))


@uffd_case("close-wp-marks", mem=ALL, features=WRITEPROTECT, pages=3, rows=("CL-10",), bugs=(23,))
def test_close_wp_marks(ctx: Context) -> None:
    """The last close takes the protection off pages, and off places that were protected while empty."""
    ctx.dst.fill(0, 1)
    ctx.dst.fill(2, 1)
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.page(0, 2))
    Pagemap.expect_protected(ctx.dst, [0] if ctx.mem is ANON else [0, 1], "before the last close")
    close_protected(ctx)
    for number in (0, 2):
        ctx.dst.expect_pattern_of(ctx.dst, number, 1)
    ctx.dst.expect_zero(1, 1)


@uffd_case(
    "close-wp-unpopulated",
    mem=(ANON,),
    features=WRITEPROTECT | Feature.WP_UNPOPULATED,
    pages=2,
    rows=("CL-10",),
    bugs=(23,),
)
def test_close_wp_unpopulated(ctx: Context) -> None:
    """The last close takes the protection off places of anonymous memory that were protected while empty."""
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    Pagemap.expect_protected(ctx.dst, [0, 1], "before the last close")
    close_protected(ctx)


@uffd_case(
    "close-wp-swapped", mem=(ANON,), features=WRITEPROTECT, needs=("swap",), pages=2, rows=("CL-10",), bugs=(23,)
)
def test_close_wp_swapped(ctx: Context) -> None:
    """The last close takes the protection off pages that are swapped out."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    swap_out(ctx.dst.range)
    Pagemap.expect_protected(ctx.dst, [0, 1], "before the last close")
    close_protected(ctx)
    ctx.dst.expect_pattern(ctx.dst.range)


@uffd_case("close-wp-thp", mem=(ANON,), features=WRITEPROTECT, needs=("thp",), pages=1, rows=("CL-10",), bugs=(23,))
def test_close_wp_thp(ctx: Context) -> None:
    """The last close takes the protection off a transparent huge page."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    expect(pmd_mapped(area.range), area.range.len, "bytes mapped as a huge page, protected")
    ctx.uffd.close()
    Pagemap.expect_protected(area, [], "after the last close")
    area.expect_pattern(area.range)
