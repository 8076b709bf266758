# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_RWPROTECT: signals, in place of messages, for want of a right, and to who is trapped."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from errno import EFAULT
from functools import partial
from signal import SIGBUS, SIGSEGV

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, KERNEL_FAULTS, NEW, PROT_READ, PROT_WRITE, READ_TRAPPED, RWP, SYNC_RWP, WRITE_TRAPPED, AccessError,
    Advice, Area, Channel, Child, Context, Feature, KernelError, Pagemap, Skip, Trap, Uffd, advise, eventually, expect,
    expect_rwp_free, expect_rwp_trapped, fails, handled, peek, poke, promise, protect, put_back, rwp_filled,
    rwp_protected, rwp_trapped, signals, syscalls, undisturbed,
)  # fmt: skip

BUS_ADRERR, SEGV_ACCERR, SEGV_PKUERR = 2, 2, 4
DISABLE_ACCESS, DISABLE_WRITE = 1, 2


# ---- signals in place of messages ----------------------------------------------------------------------------------


def signal_of(call: Callable[[], object]) -> Trap | None:
    """Make an access; return the signal that ended it, if any."""
    try:
        call()
    except AccessError as error:
        return error.trap
    return None


@uffd_case("rwprotect-sigbus", mem=ALL, features=SYNC_RWP | Feature.SIGBUS, pages=5, rows=("RW-21",))
def test_rwprotect_sigbus(ctx: Context) -> None:
    """With UFFD_FEATURE_SIGBUS an access to a protected page is a SIGBUS at its address, without a message."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    uffd.rwprotect(area.page(1, 3))
    for page in (1, 2, 3):
        where = area.page(page)
        for address in (where.start, where.start + where.len // 2 + 3, where.end - 1):
            for access in (partial(peek, address), partial(poke, address, b"\x5a")):
                trap = undisturbed(uffd, partial(signal_of, access))
                expect(trap, Trap(SIGBUS, BUS_ADRERR, address, 0), f"the end of {access.func.__name__}, page {page}")
    Pagemap.expect_protected(area, {1, 2, 3}, "after accesses that were signalled")
    expect_rwp_free(uffd, area, 0, 4)
    uffd.expect_still_asleep(0)
    uffd.resolve(area.page(2))
    expect_rwp_free(uffd, area, 2)
    for page in (1, 3):
        expect(signals(uffd, area.page(page), ctx.page_size, write=False), [SIGBUS], f"signals, page {page}")
    uffd.resolve(area.range)
    expect_rwp_free(uffd, area, *range(5))
    area.expect_pattern_of(area)


def expect_system_calls_fail(uffd: Uffd, area: Area, page: int) -> None:
    """Assert that a system call that reads or writes a protected page is EFAULT, without a message."""
    start = area.page(page).start
    reader, writer = os.pipe()
    os.write(writer, NEW)
    calls: dict[str, Callable[[], object]] = {
        "read(2)": lambda: syscalls.read_into(reader, start, len(NEW)),
        "write(2)": lambda: syscalls.write_from(writer, start, len(NEW)),
        "process_vm_readv(2)": lambda: syscalls.process_vm_readv(os.getpid(), start, len(NEW)),
        "process_vm_writev(2)": lambda: syscalls.process_vm_writev(os.getpid(), start, NEW),
        "MADV_POPULATE_READ": lambda: advise(area.page(page), Advice.POPULATE_READ),
        "MADV_POPULATE_WRITE": lambda: advise(area.page(page), Advice.POPULATE_WRITE),
    }
    for what, call in calls.items():
        with promise(what), fails(EFAULT):
            undisturbed(uffd, call)
        Pagemap.expect_protected(area, {page}, f"after {what}")
    expect(os.read(reader, 64), NEW, "what is in the pipe afterwards")
    uffd.expect_still_asleep(0)
    os.close(reader)
    os.close(writer)


@uffd_case(
    "rwprotect-sigbus-syscall",
    mem=ALL,
    features=SYNC_RWP | Feature.SIGBUS,
    needs=("kernel_faults",),
    pages=3,
    rows=("RW-21",),
)
def test_rwprotect_sigbus_syscall(ctx: Context) -> None:
    """With UFFD_FEATURE_SIGBUS a system call that meets a protected page says EFAULT."""
    area = ctx.dst
    area.fill()
    with Uffd.open(SYNC_RWP | Feature.SIGBUS, KERNEL_FAULTS) as uffd:
        uffd.register(area.range, RWP)
        uffd.rwprotect(area.page(1))
        with promise("RW-21"):
            expect_system_calls_fail(uffd, area, 1)
        uffd.resolve(area.page(1))
        expect(syscalls.process_vm_readv(os.getpid(), area.page(1).start, 8), peek(area.page(1).start, 8), "bytes read")
        area.expect_pattern_of(area)


@uffd_case("rwprotect-user-mode-only", mem=ALL, features=SYNC_RWP, pages=3, rows=("RW-22",), kind=Kind.DETAIL)
def test_rwprotect_user_mode_only(ctx: Context) -> None:
    """A handle for faults of user space reports those; a system call that meets a protected page says EFAULT."""
    area = rwp_filled(ctx)
    ctx.uffd.rwprotect(area.page(1))
    with promise("RW-22"):
        expect_system_calls_fail(ctx.uffd, area, 1)
    expect_rwp_trapped(ctx.uffd, area, 1)
    area.expect_pattern_of(area)
    start = area.page(1).start
    expect(syscalls.process_vm_readv(os.getpid(), start, 8), peek(start, 8), "bytes read when it was resolved")


# ---- what the mapping allows ---------------------------------------------------------------------------------------


@uffd_case("rwprotect-read-only", mem=ALL, features=SYNC_RWP, pages=3, rows=("RW-16",), kind=Kind.DETAIL)
def test_rwprotect_read_only(ctx: Context) -> None:
    """In a read-only mapping a read is trapped; a write is SIGSEGV without a message, protected or not."""
    area, uffd = ctx.dst, ctx.uffd
    area.fill()
    protect(area.range, PROT_READ)
    uffd.register(area.range, RWP)

    def expect_segv(when: str) -> None:
        for page in (0, 1, 2):
            address = area.page(page).start + 9
            trap = undisturbed(uffd, partial(signal_of, partial(poke, address, b"\x5a")))
            expect(trap, Trap(SIGSEGV, SEGV_ACCERR, address, 0), f"the end of a write to page {page}, {when}")

    expect_segv("not protected")
    uffd.rwprotect(area.page(1, 2))
    Pagemap.expect_protected(area, {1, 2}, "of a read-only mapping")
    expect_segv("protected")
    expect_rwp_trapped(uffd, area, 1)
    Pagemap.expect_protected(area, {2}, "after resolving page 1")
    expect_segv("after page 1 was resolved")
    uffd.resolve(area.range)
    Pagemap.expect_protected(area, (), "after resolving all")
    expect_segv("after all were resolved")
    undisturbed(uffd, partial(area.expect_pattern_of, area))
    protect(area.range, PROT_READ | PROT_WRITE)
    expect_rwp_free(uffd, area, 0, 1, 2)
    area.expect_pattern_of(area)


@uffd_case("rwprotect-protection-keys", mem=(ANON,), features=SYNC_RWP, pages=3, rows=("RW-89",), kind=Kind.DETAIL)
def test_rwprotect_protection_keys(ctx: Context) -> None:
    """The protection key of a mapping denies access whether its pages are protected, or were, without a message."""
    area, uffd, right = ctx.dst, ctx.uffd, PROT_READ | PROT_WRITE
    area.fill()
    set_rights = key_rights()
    try:
        key = syscalls.call("pkey_alloc", 0, 0)
    except KernelError as error:
        raise Skip(f"no protection keys: {error}: a processor and a kernel with them") from None
    syscalls.call("pkey_mprotect", area.start, area.range.len, right, key)
    uffd.register(area.range, RWP)

    def access(rights: int, call: Callable[[], object]) -> Trap | None:
        set_rights(key, rights)
        return signal_of(call)

    def expect_denied(when: str) -> None:
        for page in (0, 1, 2):
            start = area.page(page).start
            for rights, call in ((DISABLE_ACCESS, partial(peek, start)), (DISABLE_WRITE, partial(poke, start, b"n"))):
                trap = undisturbed(uffd, partial(access, rights, call))
                what = f"the end of {call.func.__name__}, page {page}, {when}"
                expect(trap, Trap(SIGSEGV, SEGV_PKUERR, start, 0), what)

    expect_denied("not protected")
    uffd.rwprotect(area.page(1, 2))
    expect_denied("protected")
    expect_rwp_trapped(uffd, area, 1)
    expect_denied("after page 1 was resolved")
    uffd.resolve(area.range)
    expect_denied("after all were resolved")
    expect_rwp_free(uffd, area, 0, 1, 2)
    syscalls.call("pkey_mprotect", area.start, area.range.len, right, 0)
    syscalls.call("pkey_free", key)
    area.expect_pattern_of(area)


def key_rights() -> Callable[[int, int], int]:
    """Return pkey_set(3), which sets what this thread may do with the memory of a protection key."""
    try:
        function: Callable[[int, int], int] = ctypes.CDLL(None).pkey_set
    except AttributeError:
        raise Skip("the C library has no pkey_set(3)") from None
    return function


# ---- signals to who waits ------------------------------------------------------------------------------------------


@uffd_case("rwprotect-signal", mem=ALL, features=SYNC_RWP, pages=3, rows=("RW-23",), kind=Kind.DETAIL)
def test_rwprotect_signal(ctx: Context) -> None:
    """A thread that is trapped runs the handler of a signal and is trapped anew; a message unread gives way to it."""
    area, uffd, start = rwp_protected(ctx), ctx.uffd, ctx.dst.page(1).start
    for write, flags in ((False, READ_TRAPPED), (True, WRITE_TRAPPED)):
        with handled(signal.SIGUSR1) as notes, rwp_trapped(uffd, area, 1, write=write) as waiter:
            for times in (1, 2):
                waiter.signal(signal.SIGUSR1)
                uffd.wait_fault(start, flags)
                eventually(lambda: len(notes) == times, "the handler to run")  # noqa: B023 - at once
                uffd.expect_still_asleep(1)
            waiter.signal(signal.SIGUSR1)
            eventually(lambda: len(notes) == 3, "the handler to run")
            waiter.expect_sleeping()
            waiter.signal(signal.SIGUSR1)  # with the message of the last time unread
            eventually(lambda: len(notes) == 4, "the handler to run")
            waiter.expect_sleeping()
            uffd.wait_fault(start, flags)
            uffd.expect_still_asleep(1)
            Pagemap.expect_protected(area, {0, 1, 2}, "while it waits")
            uffd.resolve(area.page(1))
        uffd.expect_still_asleep(0)
        uffd.rwprotect(area.range)
    uffd.resolve(area.range)
    put_back(area, 1)
    area.expect_pattern_of(area)


@uffd_case("rwprotect-killed", mem=ALL, features=SYNC_RWP, pages=3, rows=("RW-23",), kind=Kind.DETAIL)
def test_rwprotect_killed(ctx: Context) -> None:
    """SIGKILL ends a process that is trapped, and its message is gone; SIGSTOP and SIGCONT have it try again."""
    start = ctx.dst.page(1).start

    def life(channel: Channel) -> None:
        ctx.dst.fill()
        with Uffd.open(SYNC_RWP) as uffd:
            uffd.register(ctx.dst.range, RWP)
            uffd.rwprotect(ctx.dst.range)
            channel.send(None, uffd.fd)
        ctx.dst.expect_pattern_of(ctx.dst, 1, 1)

    for read in (False, True):
        with (
            promise("RW-23", f"SIGKILL, message {'read' if read else 'unread'}"),
            Child(life) as child,
            Uffd(child.receive_fds()[1][0]) as uffd,
        ):
            eventually(uffd.readable, "a page fault")
            if read:
                uffd.wait_fault(start, READ_TRAPPED)
            child.kill()
            uffd.expect_still_asleep(0)
    with Child(life) as child, Uffd(child.receive_fds()[1][0]) as uffd:
        uffd.wait_fault(start, READ_TRAPPED)
        os.kill(child.pid, signal.SIGSTOP)
        stopped = partial(os.waitid, os.P_PID, child.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        eventually(lambda: stopped() is not None, "the process to stop")
        uffd.expect_still_asleep(0)
        os.kill(child.pid, signal.SIGCONT)
        uffd.wait_fault(start, READ_TRAPPED)
        uffd.resolve(ctx.dst.page(1))
        child.wait()
        uffd.expect_no_message()
