# SPDX-License-Identifier: GPL-2.0-only
"""Page faults: what their messages say, who gets a signal or an error instead, and what is no fault at all."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from errno import EAGAIN, EFAULT, ENOENT, ENOMEM, EPERM
from functools import partial
from pathlib import Path

from uffd_selftests import syscalls
from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    DEFAULT_FLAGS,
    MINOR,
    MINOR_FAULTS,
    MISSING,
    WP,
    WRITEPROTECT,
    Context,
    Fault,
    Skip,
    Uffd,
    eventually,
    expect,
    fails,
    huge_area,
    page_out,
    promise,
    swap_out,
)
from uffd_selftests.kernel import Sysctl
from uffd_selftests.mem_types import ALL, ANON, HUGETLB, HUGETLB_PRIVATE, SHMEM, SHMEM_PRIVATE
from uffd_selftests.memory import (
    PAGE_SIZE,
    Advice,
    KernelError,
    Range,
    advise,
    expect_bytes,
    peek,
    poke,
    smaps_fields,
    touch,
    touch_trapped,
)
from uffd_selftests.processes import Channel, Child, Waiter, faulting, handled, undisturbed
from uffd_selftests.uapi import Feature, PagefaultFlag

WRITE = PagefaultFlag.WRITE
KERNEL_FAULTS = os.O_CLOEXEC | os.O_NONBLOCK

BUS_ADRERR = 2
ODD = 5 * PAGE_SIZE + 7
"""An offset that is no boundary, within a huge page."""


def odd_address(ctx: Context, number: int) -> int:
    """An address within a page that is no boundary of anything."""
    return ctx.dst.page(number).start + ODD % ctx.page_size


def base_page(address: int) -> int:
    """The start of the base page."""
    return address - address % PAGE_SIZE


# ---- flags and address ---------------------------------------------------------------------------------------------


@uffd_case("faults-flags", mem=ALL, pages=3, rows=("FL-01", "FL-08"))
def test_faults_flags(ctx: Context) -> None:
    """A missing page is told with no flags when it is read, and with the write flag when it is written."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for number, write in ((1, False), (2, True), (0, False)):
        start = ctx.dst.page(number).start
        with promise("FL-01", "a write" if write else "a read"), faulting(ctx.uffd, start, write=write):
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.copy(start, ctx.src.start, ctx.page_size)
    ctx.uffd.expect_no_message()


@uffd_case("faults-flags-wp", mem=ALL, features=WRITEPROTECT, pages=2, rows=("FL-01",))
def test_faults_flags_wp(ctx: Context) -> None:
    """A write to a protected page is told with the flags for write and protection, a read is not told."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    undisturbed(ctx.uffd, partial(touch, ctx.dst.range, ctx.page_size))
    with faulting(ctx.uffd, ctx.dst.page(1).start, write=True, flags=WRITE | PagefaultFlag.WP):
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.unprotect(ctx.dst.page(1))
    ctx.dst.expect_pattern(ctx.dst.range)


@uffd_case("faults-flags-minor", mem=(SHMEM, HUGETLB), features=MINOR_FAULTS, pages=2, rows=("FL-01",))
def test_faults_flags_minor(ctx: Context) -> None:
    """A page that only lacks its mapping is told with the minor flag, and with the write flag when it is written."""
    ctx.uffd.register(ctx.dst.range, MINOR)
    ctx.dst.pattern.fill(ctx.dst.alias.start, 0, 1)
    for flags in (PagefaultFlag.MINOR, PagefaultFlag.MINOR | WRITE):
        write = WRITE in flags
        with promise("FL-01", str(flags)), faulting(ctx.uffd, ctx.dst.start, write=write, flags=flags):
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.continue_(ctx.dst.page(0))
        expect(peek(ctx.dst.start), b"\0" if write else peek(ctx.dst.alias.start), "the byte that was accessed")
        advise(ctx.dst.range, Advice.DONTNEED)


@uffd_case(
    "faults-missing-protected",
    mem=ALL,
    features=WRITEPROTECT | Feature.WP_UNPOPULATED,
    pages=2,
    rows=("FL-01",),
)
def test_faults_missing_protected(ctx: Context) -> None:
    """A page that was protected while it was missing is told as missing, and its thread sleeps."""
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    for number, write in enumerate((False, True)):
        with faulting(ctx.uffd, ctx.dst.page(number).start, write=write):
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.copy(ctx.dst.page(number).start, ctx.src.start, ctx.page_size)


@uffd_case("faults-wp-thp", mem=(ANON,), features=WRITEPROTECT, needs=("thp",), pages=1, rows=("FL-01",))
def test_faults_wp_thp(ctx: Context) -> None:
    """A write to a protected transparent huge page is told with the base page's address, and its thread sleeps."""
    area = huge_area(ctx)
    address = area.page(3).start
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    with faulting(ctx.uffd, address, write=True, flags=WRITE | PagefaultFlag.WP) as waiter:
        waiter.expect_sleeping()
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.unprotect(area.range)
    area.expect_pattern(area.range)


@uffd_case("faults-address", mem=ALL, pages=2, rows=("FL-02",), kind=Kind.VERSION)
def test_faults_address(ctx: Context) -> None:
    """The address told is the start of the page, of the huge page in hugetlb."""
    address = odd_address(ctx, 1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, address, at=ctx.dst.page(1).start):
        ctx.uffd.copy(ctx.dst.page(1).start, ctx.src.start, ctx.page_size)


@uffd_case("faults-exact-address", mem=ALL, features=Feature.EXACT_ADDRESS, pages=2, rows=("FL-03",))
def test_faults_exact_address(ctx: Context) -> None:
    """With UFFD_FEATURE_EXACT_ADDRESS the address told is the byte that was touched."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for number, write in enumerate((False, True)):
        address = odd_address(ctx, number)
        with faulting(ctx.uffd, address, at=address, write=write):
            ctx.uffd.copy(ctx.dst.page(number).start, ctx.src.start, ctx.page_size)


@uffd_case("faults-exact-address-wp", mem=ALL, features=WRITEPROTECT | Feature.EXACT_ADDRESS, pages=2, rows=("FL-03",))
def test_faults_exact_address_wp(ctx: Context) -> None:
    """With UFFD_FEATURE_EXACT_ADDRESS the address told of a protected page is the byte that was written."""
    address = odd_address(ctx, 1)
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    with faulting(ctx.uffd, address, at=address, write=True, flags=WRITE | PagefaultFlag.WP):
        ctx.uffd.unprotect(ctx.dst.page(1))


@uffd_case(
    "faults-exact-address-minor",
    mem=(SHMEM, HUGETLB),
    features=MINOR_FAULTS | Feature.EXACT_ADDRESS,
    pages=2,
    rows=("FL-03",),
)
def test_faults_exact_address_minor(ctx: Context) -> None:
    """With UFFD_FEATURE_EXACT_ADDRESS the address told of a minor fault is the byte that was touched."""
    address = odd_address(ctx, 1)
    ctx.dst.pattern.fill(ctx.dst.alias.start, 1, 1)
    ctx.uffd.register(ctx.dst.range, MINOR)
    with faulting(ctx.uffd, address, at=address, flags=PagefaultFlag.MINOR):
        ctx.uffd.continue_(ctx.dst.page(1))


@uffd_case("faults-two-handles", mem=ALL, pages=2, rows=("FL-01",))
def test_faults_two_handles(ctx: Context) -> None:
    """Of two userfaultfds each is told of the faults in its own range, and only it."""
    with Uffd.open() as other:
        ctx.uffd.register(ctx.dst.page(0), MISSING)
        other.register(ctx.dst.page(1), MISSING)
        for number, (mine, theirs) in enumerate(((ctx.uffd, other), (other, ctx.uffd))):
            with faulting(mine, ctx.dst.page(number).start):
                theirs.expect_still_asleep(0)
                mine.copy(ctx.dst.page(number).start, ctx.src.start, ctx.page_size)


# ---- which thread --------------------------------------------------------------------------------------------------


def thread_told(waiter: Waiter) -> int:
    """The thread that the message of a fault names."""
    assert waiter.fault is not None
    return waiter.fault.ptid


@uffd_case("faults-thread", mem=ALL, features=Feature.THREAD_ID, pages=1, rows=("FL-04",))
def test_faults_thread(ctx: Context) -> None:
    """With UFFD_FEATURE_THREAD_ID each message names the thread that sleeps, two of one page too."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    start = ctx.dst.start
    with faulting(ctx.uffd, start) as one, faulting(ctx.uffd, start, write=True) as two:
        ctx.uffd.expect_still_asleep(2)
        expect((thread_told(one), thread_told(two)), (one.tid, two.tid), "the threads told")
        ctx.uffd.copy(start, ctx.src.start, ctx.page_size)


@uffd_case("faults-thread-wp", mem=ALL, features=WRITEPROTECT | Feature.THREAD_ID, pages=1, rows=("FL-04",))
def test_faults_thread_wp(ctx: Context) -> None:
    """With UFFD_FEATURE_THREAD_ID the message of a protected page names the thread that writes to it."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    with faulting(ctx.uffd, ctx.dst.start, write=True, flags=WRITE | PagefaultFlag.WP) as waiter:
        expect(thread_told(waiter), waiter.tid, "the thread told")
        ctx.uffd.unprotect(ctx.dst.range)


@uffd_case(
    "faults-thread-minor",
    mem=(SHMEM, HUGETLB),
    features=MINOR_FAULTS | Feature.THREAD_ID,
    pages=1,
    rows=("FL-04",),
)
def test_faults_thread_minor(ctx: Context) -> None:
    """With UFFD_FEATURE_THREAD_ID the message of a minor fault names the thread that sleeps."""
    ctx.dst.pattern.fill(ctx.dst.alias.start, 0, 1)
    ctx.uffd.register(ctx.dst.range, MINOR)
    with faulting(ctx.uffd, ctx.dst.start, flags=PagefaultFlag.MINOR) as waiter:
        expect(thread_told(waiter), waiter.tid, "the thread told")
        ctx.uffd.continue_(ctx.dst.page(0))


@uffd_case("faults-no-thread", mem=ALL, pages=1, rows=("FL-04",))
def test_faults_no_thread(ctx: Context) -> None:
    """Without UFFD_FEATURE_THREAD_ID no thread is named."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start) as waiter:
        expect(thread_told(waiter), 0, "the thread told")
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@contextmanager
def watched_child(ctx: Context, features: Feature) -> Iterator[tuple[int, Uffd]]:
    """Yield the number of a child process whose destination is registered as missing, and its handle."""

    def target(channel: Channel) -> None:
        with Uffd.open(features, KERNEL_FAULTS) as uffd:
            uffd.register(ctx.dst.range, MISSING)
            channel.send(None, uffd.fd)
            channel.receive()

    with Child(target) as child, Uffd(child.receive_fds()[1][0]) as uffd:
        if not may_read_memory_of(child.pid):
            raise Skip("process_vm_readv(2) of a child: EPERM: set kernel.yama.ptrace_scope to 1, or run as root")
        yield child.pid, uffd
        child.send("exit")


@uffd_case("faults-thread-remote", mem=ALL, needs=("kernel_faults",), pages=1, rows=("FL-04",))
def test_faults_thread_remote(ctx: Context) -> None:
    """When another process reads a missing page with process_vm_readv(2), the message names the thread that reads."""
    start = ctx.dst.start
    ctx.src.fill()
    with (
        watched_child(ctx, Feature.THREAD_ID) as (pid, uffd),
        faulting(uffd, start, call=partial(syscalls.process_vm_readv, pid, start, 64)) as waiter,
    ):
        expect(thread_told(waiter), waiter.tid, "the thread told")
        uffd.copy(start, ctx.src.start, ctx.page_size)
        expect(waiter.result(), peek(ctx.src.start, 64), "what process_vm_readv(2) read")


@uffd_case("faults-flags-remote", mem=ALL, needs=("kernel_faults",), pages=1, rows=("FL-01", "FL-11"))
def test_faults_flags_remote(ctx: Context) -> None:
    """When another process writes to a missing page with process_vm_writev(2), the message tells of a write."""
    start = ctx.dst.start
    with (
        watched_child(ctx, Feature(0)) as (pid, uffd),
        faulting(uffd, start, flags=WRITE, call=partial(syscalls.process_vm_writev, pid, start, b"x")) as waiter,
    ):
        uffd.copy(start, ctx.src.start, ctx.page_size)
        expect(waiter.result(), 1, "result of process_vm_writev(2)")


def may_read_memory_of(pid: int) -> bool:
    """Whether process_vm_readv(2) of another process is allowed, tried on a buffer that both have."""
    buffer = ctypes.create_string_buffer(1)
    try:
        syscalls.process_vm_readv(pid, ctypes.addressof(buffer), 1)
    except KernelError as error:
        if error.errno != EPERM:
            raise
        return False
    return True


@uffd_case("faults-thread-vfork", mem=(ANON,), needs=("kernel_faults",), pages=1, rows=("FL-04",))
def test_faults_thread_vfork(ctx: Context) -> None:
    """When a vforked child that still runs in its parent's memory faults, the message names the child."""
    libc = ctypes.CDLL(None)
    arguments = (ctypes.c_char_p * 1)(None)

    def spawn() -> int:
        # The child's execve(2) is what touches the missing page: it holds the program's name, in the end an empty one.
        path = ctypes.c_void_p(ctx.dst.start)
        error: int = libc.posix_spawn(ctypes.byref(ctypes.c_int()), path, None, None, arguments, arguments)
        return error

    with Uffd.open(Feature.THREAD_ID, KERNEL_FAULTS) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        with faulting(uffd, ctx.dst.start, call=spawn) as waiter:
            status = Path(f"/proc/{thread_told(waiter)}/status").read_text()
            expect(f"\nPPid:\t{os.getpid()}\n" in status, True, "the thread told is a child process")
            uffd.zeropage(ctx.dst.range)
            expect(waiter.result(), ENOENT, "result of posix_spawn(3)")


@uffd_case(
    "faults-thread-namespace",
    mem=(ANON,),
    needs=("cap_sys_admin",),
    features=Feature.THREAD_ID,
    pages=1,
    rows=("FL-05",),
    kind=Kind.DETAIL,
)
def test_faults_thread_namespace(ctx: Context) -> None:
    """The thread is named by its number in its own PID namespace, whoever reads the message."""

    def init(channel: Channel) -> None:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        with Uffd.open(Feature.THREAD_ID) as uffd:
            uffd.register(ctx.dst.range, MISSING)
            channel.send(None, uffd.fd)
            expect_bytes(ctx.dst.range, 0)

    def target(channel: Channel) -> None:
        syscalls.call("unshare", syscalls.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            try:
                init(channel)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)

    with Child(target) as child, Uffd(child.receive_fds()[1][0]) as uffd:
        expect(uffd.wait(), Fault(ctx.dst.start, PagefaultFlag(0), ptid=1), "the message")
        uffd.zeropage(ctx.dst.range)


# ---- a signal, or an error, in place of a message ------------------------------------------------------------------


def expect_sigbus(uffd: Uffd, address: int, *, write: bool) -> None:
    """Assert that an access raises SIGBUS with BUS_ADRERR at exactly its address, and sends no message."""
    (trap,) = undisturbed(uffd, partial(touch_trapped, Range(address, 1), 1, write=write))
    seen = trap and (trap.signo, trap.code, hex(trap.addr))
    what = f"signal, si_code and si_addr of a {'write' if write else 'read'}"
    expect(seen, (signal.SIGBUS, BUS_ADRERR, hex(address)), what)


@uffd_case("faults-sigbus", mem=ALL, features=Feature.SIGBUS, pages=2, rows=("FL-06",))
def test_faults_sigbus(ctx: Context) -> None:
    """With UFFD_FEATURE_SIGBUS a missing page raises SIGBUS at the byte touched, until it is filled."""
    address = odd_address(ctx, 1)
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    for write in (False, True, False):
        expect_sigbus(ctx.uffd, address, write=write)
    ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.dst.range.len)
    ctx.dst.expect_pattern_of(ctx.src)
    ctx.uffd.expect_still_asleep(0)


@uffd_case("faults-sigbus-wp", mem=ALL, features=WRITEPROTECT | Feature.SIGBUS, pages=2, rows=("FL-06",))
def test_faults_sigbus_wp(ctx: Context) -> None:
    """With UFFD_FEATURE_SIGBUS a write to a protected page raises SIGBUS, until it is un-protected."""
    address = odd_address(ctx, 1)
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    ctx.dst.expect_pattern(ctx.dst.range)
    expect_sigbus(ctx.uffd, address, write=True)
    ctx.uffd.unprotect(ctx.dst.range)
    poke(address, b"\xee")
    expect(peek(address), b"\xee", "what was written")
    ctx.uffd.expect_still_asleep(0)


@uffd_case(
    "faults-sigbus-minor", mem=(SHMEM, HUGETLB), features=MINOR_FAULTS | Feature.SIGBUS, pages=2, rows=("FL-06",)
)
def test_faults_sigbus_minor(ctx: Context) -> None:
    """With UFFD_FEATURE_SIGBUS a page that only lacks its mapping raises SIGBUS, until UFFDIO_CONTINUE."""
    ctx.dst.pattern.fill(ctx.dst.alias.start, 0, 2)
    ctx.uffd.register(ctx.dst.range, MINOR)
    for write in (False, True):
        expect_sigbus(ctx.uffd, odd_address(ctx, 1), write=write)
    ctx.uffd.continue_(ctx.dst.range)
    ctx.dst.expect_pattern(ctx.dst.range)
    ctx.uffd.expect_still_asleep(0)


def expect_refused_syscalls(row: str, ctx: Context, uffd: Uffd) -> None:
    """Assert the error of every kind of system call that meets the missing page 1: no signal, no message, no sleep."""
    page = ctx.dst.page(1)
    file = os.memfd_create("file", os.MFD_CLOEXEC)
    os.write(file, b"file")
    os.lseek(file, 0, os.SEEK_SET)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "read": (EFAULT, lambda: syscalls.read_into(file, page.start, 4)),
        "write": (EFAULT, lambda: syscalls.write_from(file, page.start, 4)),
        "process_vm_readv": (EFAULT, lambda: syscalls.process_vm_readv(os.getpid(), page.start, 4)),
        "process_vm_writev": (EFAULT, lambda: syscalls.process_vm_writev(os.getpid(), page.start, b"1234")),
        "MADV_POPULATE_READ": (EFAULT, lambda: advise(page, Advice.POPULATE_READ)),
        "MADV_POPULATE_WRITE": (EFAULT, lambda: advise(page, Advice.POPULATE_WRITE)),
        "mlock": (ENOMEM, lambda: syscalls.call("mlock", page.start, page.len)),
    }
    with handled(signal.SIGBUS) as signals:
        for name, (number, call) in calls.items():
            with promise(row, name), fails(number):
                undisturbed(uffd, call)
        expect(signals, [], "signals")
    uffd.expect_still_asleep(0)
    os.close(file)


@uffd_case(
    "faults-sigbus-syscalls", mem=ALL, features=Feature.SIGBUS, needs=("kernel_faults",), pages=2, rows=("FL-07",)
)
def test_faults_sigbus_syscalls(ctx: Context) -> None:
    """With UFFD_FEATURE_SIGBUS a system call that meets a missing page fails, with no signal and no message."""
    with Uffd.open(Feature.SIGBUS, KERNEL_FAULTS) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        expect_refused_syscalls("FL-07", ctx, uffd)


# ---- faults of the kernel itself -----------------------------------------------------------------------------------

NO_SIGNAL = Defect(
    id="D-FL-09",
    summary="With UFFD_USER_MODE_ONLY a fault of the kernel raises no SIGBUS, against userfaultfd(2): "
    "the system call fails with EFAULT.",
    kernels="6.1.192, 6.12.117, 6.18.44",
    advice="Expect EFAULT of system calls on missing memory; the manual page is wrong, not the kernel.",
    shows=r"signals of a read\(2\) into a missing page: expected .*SIGBUS.*, got \[\]",
)


@uffd_case("faults-umo-signal", mem=(ANON,), pages=1, rows=("FL-09",), defect=NO_SIGNAL)
def test_faults_umo_signal(ctx: Context) -> None:
    """With UFFD_USER_MODE_ONLY a system call that meets a missing page raises SIGBUS."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    null = os.open("/dev/zero", os.O_RDONLY)
    with handled(signal.SIGBUS) as signals, fails(EFAULT):
        undisturbed(ctx.uffd, lambda: syscalls.read_into(null, ctx.dst.start, 1))
    os.close(null)
    expect(signals, [signal.SIGBUS], "signals of a read(2) into a missing page")


@uffd_case("faults-umo", mem=ALL, pages=2, rows=("FL-08",))
def test_faults_umo(ctx: Context) -> None:
    """With UFFD_USER_MODE_ONLY faults of user space are told as always."""
    with Uffd.open(flags=DEFAULT_FLAGS) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        for number, write in enumerate((False, True)):
            with faulting(uffd, ctx.dst.page(number).start, write=write):
                uffd.copy(ctx.dst.page(number).start, ctx.src.start, ctx.page_size)


@uffd_case("faults-umo-syscalls", mem=ALL, pages=2, rows=("FL-09", "FL-10"), kind=Kind.DETAIL)
def test_faults_umo_syscalls(ctx: Context) -> None:
    """With UFFD_USER_MODE_ONLY a system call that meets a missing page fails, and no message tells of it."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    expect_refused_syscalls("FL-09 FL-10", ctx, ctx.uffd)


@uffd_case(
    "faults-umo-syscalls-minor",
    mem=(SHMEM, HUGETLB),
    features=MINOR_FAULTS,
    pages=2,
    rows=("FL-09", "FL-10"),
    kind=Kind.DETAIL,
)
def test_faults_umo_syscalls_minor(ctx: Context) -> None:
    """With UFFD_USER_MODE_ONLY a system call that meets a page in want of its mapping fails, without a message."""
    ctx.dst.pattern.fill(ctx.dst.alias.start, 0, 2)
    ctx.uffd.register(ctx.dst.range, MINOR)
    expect_refused_syscalls("FL-09 FL-10", ctx, ctx.uffd)


@uffd_case("faults-umo-syscalls-wp", mem=ALL, features=WRITEPROTECT, pages=2, rows=("FL-09",), kind=Kind.DETAIL)
def test_faults_umo_syscalls_wp(ctx: Context) -> None:
    """With UFFD_USER_MODE_ONLY a system call that writes to a protected page fails, one that reads it does not."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    file = os.memfd_create("file", os.MFD_CLOEXEC)
    expect(undisturbed(ctx.uffd, lambda: syscalls.write_from(file, ctx.dst.start, 64)), 64, "result of write(2)")
    os.lseek(file, 0, os.SEEK_SET)
    with promise("FL-09", "read(2)"), fails(EFAULT):
        undisturbed(ctx.uffd, lambda: syscalls.read_into(file, ctx.dst.start, 64))
    os.close(file)
    ctx.dst.expect_pattern(ctx.dst.range)


@uffd_case("faults-syscalls", mem=ALL, needs=("kernel_faults",), pages=2, rows=("FL-11",))
def test_faults_syscalls(ctx: Context) -> None:
    """read(2) into a missing page is told as a write, write(2) from one as a read; both finish when it is filled."""
    ctx.src.fill()
    file = os.memfd_create("file", os.MFD_CLOEXEC)
    os.write(file, b"file")
    os.lseek(file, 0, os.SEEK_SET)
    into, out = ctx.dst.page(0).start, ctx.dst.page(1).start
    with Uffd.open(flags=KERNEL_FAULTS) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        for start, call, flags in (
            (into, partial(syscalls.read_into, file, into, 4), WRITE),
            (out, partial(syscalls.write_from, file, out, 64), PagefaultFlag(0)),
        ):
            with promise("FL-11", "read(2)" if flags else "write(2)"):
                with faulting(uffd, start, flags=flags, call=call) as waiter:
                    uffd.expect_still_asleep(1)
                    uffd.copy(start, ctx.src.page(1).start, ctx.page_size)
                expect(waiter.result(), 4 if flags else 64, "result of the system call")
    ctx.dst.expect_pattern_of(ctx.src, 1, 1)
    expect(peek(into, 64), b"file" + peek(ctx.src.page(1).start + 4, 60), "what was read")
    expect(os.pread(file, 100, 4), peek(ctx.src.page(1).start, 64), "what was written")
    os.close(file)


@uffd_case(
    "faults-syscalls-told",
    mem=ALL,
    needs=("kernel_faults",),
    features=Feature.EXACT_ADDRESS | Feature.THREAD_ID,
    pages=1,
    rows=("FL-03", "FL-04", "FL-11"),
)
def test_faults_syscalls_told(ctx: Context) -> None:
    """A fault of read(2) is told with the byte that it wants to write, and with the thread that calls it."""
    address = odd_address(ctx, 0)
    with Uffd.open(Feature.EXACT_ADDRESS | Feature.THREAD_ID, KERNEL_FAULTS) as uffd, open("/dev/zero", "rb") as zero:
        uffd.register(ctx.dst.range, MISSING)
        call = partial(syscalls.read_into, zero.fileno(), address, 1)
        with faulting(uffd, address, at=address, flags=WRITE, call=call) as waiter:
            expect(thread_told(waiter), waiter.tid, "the thread told")
            uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


FUTEX_WAIT = 0
FUTEX_PRIVATE_FLAG = 128


@uffd_case("faults-syscall-arguments", mem=(ANON,), needs=("kernel_faults",), pages=2, rows=("FL-11",))
def test_faults_syscall_arguments(ctx: Context) -> None:
    """A system call whose argument lies in a missing page sleeps until that is filled, then uses what is there."""
    mask, word = ctx.dst.page(0).start, ctx.dst.page(1).start
    with Uffd.open(flags=KERNEL_FAULTS) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        with promise("FL-11", "rt_sigprocmask"):
            block = partial(syscalls.call, "rt_sigprocmask", signal.SIG_BLOCK, mask, 0, 8)
            with faulting(uffd, mask, call=block) as waiter:
                uffd.zeropage(ctx.dst.page(0))
                expect(waiter.result(), 0, "result")
        with promise("FL-11", "futex"), fails(EAGAIN):
            wait = partial(syscalls.call, "futex", word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, 1, 0)
            with faulting(uffd, word, call=wait):
                uffd.zeropage(ctx.dst.page(1))


# ---- no fault at all -----------------------------------------------------------------------------------------------


@uffd_case(
    "faults-cached",
    mem=(SHMEM, SHMEM_PRIVATE, HUGETLB, HUGETLB_PRIVATE),
    pages=2,
    spare_hugepages=2,
    rows=("FL-21",),
    kind=Kind.DETAIL,
)
def test_faults_cached(ctx: Context) -> None:
    """A page that the file holds is not missing: touching it sends no message."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with ctx.dst.file_view() as view:
        ctx.dst.pattern.fill(view.start, 0, 2)
        for number, write in enumerate((False, True)):
            undisturbed(ctx.uffd, partial(touch, ctx.dst.page(number), ctx.page_size, write=write))
        ctx.dst.expect_pattern(ctx.dst.range)


@uffd_case(
    "faults-cached-swapped",
    mem=(SHMEM, SHMEM_PRIVATE),
    needs=("swap",),
    pages=2,
    rows=("FL-21",),
    kind=Kind.DETAIL,
)
def test_faults_cached_swapped(ctx: Context) -> None:
    """A page of shared memory that is swapped out is not missing: touching it sends no message."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with ctx.dst.file_view() as view:
        ctx.dst.pattern.fill(view.start, 0, 2)
        page_out(view, lambda: swapped(view) == view.len)
        for number, write in enumerate((False, True)):
            undisturbed(ctx.uffd, partial(touch, ctx.dst.page(number), ctx.page_size, write=write))
        ctx.dst.expect_pattern(ctx.dst.range)


def swapped(where: Range) -> int:
    """Return how many bytes of the range's mappings are in swap space, those of shared memory included."""
    return sum(int(fields["Swap"].split()[0]) * 1024 for fields in smaps_fields(where))


@uffd_case("faults-swapped", mem=(ANON,), needs=("swap",), pages=2, rows=("FL-22",), kind=Kind.DETAIL)
def test_faults_swapped(ctx: Context) -> None:
    """A page of anonymous memory that is swapped out is not missing: touching it sends no message."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.src.fill()
    ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.dst.range.len)
    swap_out(ctx.dst.range)
    for number, write in enumerate((False, True)):
        undisturbed(ctx.uffd, partial(touch, ctx.dst.page(number), PAGE_SIZE, write=write))
    ctx.dst.expect_pattern_of(ctx.src)


@uffd_case("faults-thread-exit", mem=ALL, needs=("kernel_faults",), pages=2, rows=("FL-23",), kind=Kind.DETAIL)
def test_faults_thread_exit(ctx: Context) -> None:
    """What the kernel reads and writes for a thread that exits sends no message and delays nothing."""

    def leave() -> None:
        syscalls.call("set_tid_address", ctx.dst.page(0).start)
        syscalls.call("set_robust_list", ctx.dst.page(1).start, 24)
        syscalls.call("exit", 0)

    def target(_: Channel) -> None:
        with Uffd.open(flags=KERNEL_FAULTS) as uffd:
            uffd.register(ctx.dst.range, MISSING)
            thread = threading.Thread(target=leave, daemon=True)
            thread.start()
            task = Path(f"/proc/self/task/{thread.native_id}")
            eventually(lambda: uffd.readable() or not task.exists(), "the thread to exit")
            uffd.expect_still_asleep(0)

    with Child(target):
        pass


CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
CORE_FILTER = Path("/proc/self/coredump_filter")
DUMP_SHARED, DUMP_HUGETLB_SHARED = 1 << 1, 1 << 6


@contextmanager
def dumps_here() -> Iterator[None]:
    """Have core dumps written to the working directory, a temporary one meanwhile; Skip where that cannot be had."""
    if not CORE_FILTER.exists():
        raise Skip(f"{CORE_FILTER}: ENOENT: boot a kernel with CONFIG_ELF_CORE")
    if resource.getrlimit(resource.RLIMIT_CORE)[1] != resource.RLIM_INFINITY:
        raise Skip("the hard limit of core dumps is too low: ulimit -Hc unlimited")
    with ExitStack() as stack:
        pattern = CORE_PATTERN.read_text().strip()
        if not pattern or pattern[0] in "/|@":
            try:
                stack.enter_context(Sysctl(CORE_PATTERN, "core"))
            except OSError:
                raise Skip(f"core dumps go to {pattern}: as root, sysctl kernel.core_pattern=core") from None
        stack.callback(os.chdir, os.getcwd())
        os.chdir(stack.enter_context(tempfile.TemporaryDirectory()))
        yield


@uffd_case(
    "faults-core-dump", mem=(SHMEM, HUGETLB), needs=("kernel_faults",), pages=2, rows=("FL-24",), kind=Kind.DETAIL
)
def test_faults_core_dump(ctx: Context) -> None:
    """A core dump of a process with missing pages comes to its end and sends no message."""

    def target(channel: Channel) -> None:
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        CORE_FILTER.write_text(hex(DUMP_HUGETLB_SHARED if ctx.mem.hugetlb else DUMP_SHARED))
        with Uffd.open(flags=KERNEL_FAULTS) as uffd:
            uffd.register(ctx.dst.range, MISSING)
            channel.send(None, uffd.fd)
            os.abort()

    with dumps_here(), Child(target) as child, Uffd(child.receive_fds()[1][0]) as uffd:
        ended = partial(os.waitid, os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        eventually(lambda: uffd.readable() or ended() is not None, "the process to end")
        uffd.expect_still_asleep(0)
        end = ended()
        expect(end and (end.si_status, end.si_code), (signal.SIGABRT, os.CLD_DUMPED), "how the process ended")
        expect(len(os.listdir()), 1, "core files")
        child.kill()
