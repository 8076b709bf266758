# SPDX-License-Identifier: GPL-2.0-only
"""Threads asleep in a page fault: signals, and memory that changes under them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from errno import EEXIST
from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, DEFAULT_FLAGS, HUGETLB, KERNEL_FAULTS, MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MISSING, PAGE_SIZE,
    PROT_NONE, PROT_READ, PROT_WRITE, SHMEM, WRITE, AccessError, Advice, Channel, Child, Context, PagefaultFlag, Range,
    Trap, Uffd, Waiter, advise, eventually, expect, expect_bytes, faulting, handled, knows_advice, map_memory, peek,
    poke, promise, protect, refuses, remap, syscalls, unmap,
)  # fmt: skip

SEGV_MAPERR, SEGV_ACCERR = 1, 2


# ---- signals to a thread that faults in user space -----------------------------------------------------------------


@uffd_case("faults-signal", mem=ALL, pages=1, rows=("FL-12",))
def test_faults_signal(ctx: Context) -> None:
    """A thread asleep in a fault runs the handler of a signal, then faults again, which a new message tells."""
    start = ctx.dst.start
    ctx.uffd.register(ctx.dst.range, MISSING)
    for write in (False, True):
        with handled(signal.SIGUSR1) as notes, faulting(ctx.uffd, start, write=write) as waiter:
            for times in (1, 2):
                waiter.signal(signal.SIGUSR1)
                ctx.uffd.wait_fault(start, WRITE if write else PagefaultFlag(0))
                eventually(lambda: len(notes) == times, "the handler to run")  # noqa: B023 - at once
                ctx.uffd.expect_still_asleep(1)
            ctx.uffd.copy(start, ctx.src.start, ctx.page_size)
        advise(ctx.dst.range, Advice.REMOVE if ctx.mem.shared else Advice.DONTNEED)
    ctx.uffd.expect_no_message()


@uffd_case("faults-signal-unread", mem=ALL, pages=1, rows=("FL-12",))
def test_faults_signal_unread(ctx: Context) -> None:
    """When a thread asleep in a fault handles a signal, its unread message gives way to a new one."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with handled(signal.SIGUSR1) as notes, faulting(ctx.uffd, ctx.dst.start, read=False) as waiter:
        waiter.signal(signal.SIGUSR1)
        eventually(lambda: bool(notes), "the handler to run")
        waiter.expect_sleeping()
        ctx.uffd.wait_fault(ctx.dst.start)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@uffd_case("faults-signal-blocked", mem=ALL, pages=1, rows=("FL-13",), kind=Kind.DETAIL)
def test_faults_signal_blocked(ctx: Context) -> None:
    """A signal that the thread blocks leaves it asleep."""
    ctx.uffd.register(ctx.dst.range, MISSING)

    def touch_with_blocked_signal() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        peek(ctx.dst.start)

    with handled(signal.SIGUSR1) as notes, faulting(ctx.uffd, ctx.dst.start, call=touch_with_blocked_signal) as waiter:
        expect_signal_ignored(ctx.uffd, waiter)
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
    expect(notes, [], "signals handled")


def expect_signal_ignored(uffd: Uffd, waiter: Waiter) -> None:
    """Send SIGUSR1 to a thread asleep in a fault; it must not wake, not even to fall asleep again."""
    waiter.expect_sleeping()
    before = waiter.cpu_time
    waiter.signal(signal.SIGUSR1)
    expect((waiter.asleep, waiter.cpu_time), (True, before), "asleep, and seconds run, after the signal")
    uffd.expect_still_asleep(1)


def expect_killed(child: Child, number: signal.Signals) -> None:
    """Assert that a signal to the process ends it."""
    os.kill(child.pid, number)
    ended = partial(os.waitid, os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    eventually(lambda: ended() is not None, f"the process to die of {number.name}")
    end = ended()
    expect(end and (end.si_code, end.si_status), (os.CLD_KILLED, number), "how the process ended")
    child.kill()


def fatal_signals(ctx: Context, flags: int, call: Callable[[], object]) -> None:
    """Kill processes that sleep in a fault; their messages must go with them."""

    def target(channel: Channel) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with Uffd.open(flags=flags) as uffd:
            uffd.register(ctx.dst.range, MISSING)
            channel.send(None, uffd.fd)
            call()

    for number in (signal.SIGTERM, signal.SIGKILL):
        for read in (False, True):
            with (
                promise("FL-14", f"{number.name}, message {'read' if read else 'unread'}"),
                Child(target) as child,
                Uffd(child.receive_fds()[1][0]) as uffd,
            ):
                eventually(uffd.readable, "a page fault")
                if read:
                    expect(len(uffd.read()), 1, "messages")
                expect_killed(child, number)
                uffd.expect_still_asleep(0)


@uffd_case("faults-fatal-signal", mem=(ANON, HUGETLB), pages=1, rows=("FL-14",))
def test_faults_fatal_signal(ctx: Context) -> None:
    """A fatal signal ends a process that sleeps in a fault, and its message is gone."""
    fatal_signals(ctx, DEFAULT_FLAGS, partial(peek, ctx.dst.start))


@uffd_case("faults-fatal-signal-syscall", mem=(ANON, HUGETLB), needs=("kernel_faults",), pages=1, rows=("FL-14",))
def test_faults_fatal_signal_syscall(ctx: Context) -> None:
    """A fatal signal ends a process that sleeps in a fault of a system call, and its message is gone."""
    zero = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    fatal_signals(ctx, KERNEL_FAULTS, partial(syscalls.read_into, zero, ctx.dst.start, 1))
    fatal_signals(ctx, KERNEL_FAULTS, lambda: syscalls.process_vm_readv(os.getpid(), ctx.dst.start, 1))
    os.close(zero)


@uffd_case("faults-stop", mem=(ANON, HUGETLB), pages=1, rows=("FL-15",))
def test_faults_stop(ctx: Context) -> None:
    """A process that sleeps in a fault can be stopped; continued, it faults again and goes on when that is resolved."""

    def target(channel: Channel) -> None:
        with Uffd.open() as uffd:
            uffd.register(ctx.dst.range, MISSING)
            channel.send(None, uffd.fd)
            ctx.dst.expect_zero()

    start = ctx.dst.start
    with Child(target) as child, Uffd(child.receive_fds()[1][0]) as uffd:
        uffd.wait_fault(start)
        os.kill(child.pid, signal.SIGSTOP)
        stopped = partial(os.waitid, os.P_PID, child.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        eventually(lambda: stopped() is not None, "the process to stop")
        uffd.expect_still_asleep(0)
        os.kill(child.pid, signal.SIGCONT)
        uffd.wait_fault(start)
        uffd.copy(start, ctx.src.start, ctx.page_size)
        child.wait()


# ---- signals to a thread that faults in a system call --------------------------------------------------------------

SPINS = Defect(
    id="D-FL-16",
    summary="A handled signal to a thread whose system call sleeps in a fault makes it spin, all its time in the "
    "kernel, until the fault is resolved; poll(2) of the userfaultfd says readable while read(2) says EAGAIN.",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="Resolve faults soon, read until EAGAIN and poll again, block signals in threads that make system calls "
    "on registered memory, or touch it before.",
    shows=r"sleeps again after a signal: expected True, got False",
)


def read_with_signal(ctx: Context, uffd: Uffd, notes: list[int]) -> bool:
    """Signal a thread whose read(2) sleeps in a fault, then fill the page; returns whether the thread slept again."""
    zero = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    uffd.register(ctx.dst.range, MISSING)
    call = partial(syscalls.read_into, zero, ctx.dst.start, 64)
    with faulting(uffd, ctx.dst.start, flags=WRITE, call=call) as waiter:
        waiter.expect_sleeping()
        enough = waiter.cpu_time + 0.02
        waiter.signal(signal.SIGUSR1)
        eventually(lambda: waiter.asleep or waiter.cpu_time > enough, "the thread to sleep, or to run on")
        slept = waiter.asleep
        expect((waiter.done, notes), (False, []), "ended, and signals handled, before the page is there")
        uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
        expect(waiter.result(), 64, "result of the system call")
    eventually(lambda: notes == [signal.SIGUSR1], "the handler to run after the system call")
    os.close(zero)
    return slept


@uffd_case(
    "faults-syscall-signal-sleeps", mem=(ANON,), needs=("kernel_faults",), pages=1, rows=("FL-16",), defect=SPINS
)
def test_faults_syscall_signal_sleeps(ctx: Context) -> None:
    """A thread whose system call sleeps in a fault sleeps on when a signal comes."""
    with Uffd.open(flags=KERNEL_FAULTS) as uffd, handled(signal.SIGUSR1) as notes:
        slept = read_with_signal(ctx, uffd, notes)
    expect(slept, True, "the thread sleeps again after a signal")


@uffd_case("faults-syscall-signal", mem=ALL, needs=("kernel_faults",), pages=1, rows=("FL-16",), kind=Kind.DETAIL)
def test_faults_syscall_signal(ctx: Context) -> None:
    """A signal does not interrupt a system call that sleeps in a fault: it finishes when the page is there."""
    ctx.src.fill()
    with Uffd.open(flags=KERNEL_FAULTS) as uffd, handled(signal.SIGUSR1) as notes:
        read_with_signal(ctx, uffd, notes)
        uffd.expect_still_asleep(0)
    expect_bytes(Range(ctx.dst.start, 64), 0, "what was read")
    expect(peek(ctx.dst.start + 64, 64), peek(ctx.src.start + 64, 64), "what UFFDIO_COPY left behind it")


FUTEX_WAKE = 1


@uffd_case("faults-gup-signal", mem=(ANON, SHMEM), needs=("kernel_faults",), pages=5, rows=("FL-17",), kind=Kind.DETAIL)
def test_faults_gup_signal(ctx: Context) -> None:
    """A system call that sleeps in a fault while it looks pages up sleeps on when a signal comes, and finishes."""
    page = [ctx.dst.page(number) for number in range(5)]
    locks = PagefaultFlag(0) if ctx.mem.shared else WRITE
    with Uffd.open(flags=KERNEL_FAULTS) as uffd, handled(signal.SIGUSR1) as notes:
        uffd.register(ctx.dst.range, MISSING)
        for where, name, flags, call, result in (
            (page[0], "process_vm_readv", PagefaultFlag(0), partial(own_memory, page[0].start), bytes(8)),
            (page[1], "mlock", locks, partial(syscalls.call, "mlock", page[1].start, PAGE_SIZE), 0),
            (page[2], "MADV_POPULATE_READ", PagefaultFlag(0), partial(advise, page[2], Advice.POPULATE_READ), None),
            (page[3], "MADV_POPULATE_WRITE", WRITE, partial(advise, page[3], Advice.POPULATE_WRITE), None),
            (page[4], "futex", WRITE, partial(syscalls.call, "futex", page[4].start, FUTEX_WAKE, 1), 0),
        ):
            if "POPULATE" in name and not knows_advice(Advice.POPULATE_READ):
                continue
            with promise("FL-17", name), faulting(uffd, where.start, flags=flags, call=call) as waiter:
                expect_signal_ignored(uffd, waiter)
                expect(notes, [], "signals handled before the page is there")
                uffd.copy(where.start, ctx.src.start, PAGE_SIZE)
                expect(waiter.result(), result, "result of the system call")
                eventually(lambda: notes == [signal.SIGUSR1], "the handler to run after the system call")
                notes.clear()


def own_memory(address: int) -> bytes:
    """process_vm_readv(2) of eight bytes of this process."""
    return syscalls.process_vm_readv(os.getpid(), address, 8)


# ---- memory that changes -------------------------------------------------------------------------------------------


def trapped(access: Callable[[], object]) -> Trap | None:
    """Make an access; returns the signal that ended it, if any."""
    try:
        access()
    except AccessError as error:
        return error.trap
    return None


def expect_segv(waiter: Waiter, address: int, code: int, what: str) -> None:
    """Assert that the thread's access ended in SIGSEGV."""
    expect(waiter.result(), Trap(signal.SIGSEGV, code, address, 0), f"signal that ends the access after {what}")


@uffd_case("faults-unmapped", mem=ALL, pages=2, rows=("FL-18",), bugs=(25,), kind=Kind.DETAIL)
def test_faults_unmapped(ctx: Context) -> None:
    """A thread asleep in a fault sleeps on when the page is unmapped; woken, it gets SIGSEGV."""
    page = ctx.dst.page(1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, page.start, call=partial(trapped, partial(peek, page.start))) as waiter:
        unmap(page)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(page)
        expect_segv(waiter, page.start, SEGV_MAPERR, "munmap(2)")


@uffd_case("faults-moved", mem=ALL, pages=2, rows=("FL-18",), kind=Kind.DETAIL)
def test_faults_moved(ctx: Context) -> None:
    """A thread asleep in a fault sleeps on when mremap(2) moves the page; woken at its old place, it gets SIGSEGV."""
    page = ctx.dst.page(1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, page.start, call=partial(trapped, partial(peek, page.start))) as waiter:
        remap(page, to=ctx.src.page(1).start)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(page)
        expect_segv(waiter, page.start, SEGV_MAPERR, "mremap(2)")


@uffd_case("faults-mapped-over", mem=ALL, pages=2, rows=("FL-18",), kind=Kind.DETAIL)
def test_faults_mapped_over(ctx: Context) -> None:
    """A thread asleep in a fault sleeps on when something else is mapped there; woken, it finds that."""
    page = ctx.dst.page(1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, page.start) as waiter:
        prot, flags = PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS
        map_memory(page.len, at=page.start, prot=prot, flags=flags)
        ctx.uffd.expect_still_asleep(1)
        poke(page.start, b"n")
        ctx.uffd.wake(page)
        expect(waiter.result(), b"n", "what the thread read")
    ctx.uffd.expect_no_message()


@uffd_case("faults-mprotect", mem=ALL, pages=2, rows=("FL-19",), kind=Kind.DETAIL)
def test_faults_mprotect(ctx: Context) -> None:
    """A thread asleep in a fault whose page mprotect(2) takes away gets SIGSEGV when the fault is resolved."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    for number, (write, prot) in enumerate(((False, PROT_NONE), (True, PROT_READ))):
        page = ctx.dst.page(number)
        call = partial(poke, page.start, b"\0") if write else partial(peek, page.start)
        with faulting(ctx.uffd, page.start, write=write, call=partial(trapped, call)) as waiter:
            protect(page, prot)
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.copy(page.start, ctx.src.page(number).start, page.len)
            expect_segv(waiter, page.start, SEGV_ACCERR, f"mprotect(2) to {prot}")
        protect(page, PROT_READ | PROT_WRITE)
    ctx.dst.expect_pattern_of(ctx.src)


@uffd_case("faults-filled-elsewhere", mem=(SHMEM, HUGETLB), pages=2, rows=("FL-20",), kind=Kind.DETAIL)
def test_faults_filled_elsewhere(ctx: Context) -> None:
    """A thread asleep in a fault sleeps on when the page comes into being elsewhere: UFFDIO_WAKE must free it."""
    page = ctx.dst.page(1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, page.start) as waiter:
        poke(ctx.dst.alias_page(1).start, b"e")
        ctx.uffd.expect_still_asleep(1)
        with refuses(EEXIST):
            ctx.uffd.copy(page.start, ctx.src.start, page.len)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.wake(page)
        expect(waiter.result(), b"e", "what the thread read")
    ctx.uffd.expect_no_message()
