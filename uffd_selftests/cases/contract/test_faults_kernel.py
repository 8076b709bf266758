# SPDX-License-Identifier: GPL-2.0-only
"""Page faults that the kernel has in system calls, and faults that end in a signal or an error, without a message."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable
from errno import EAGAIN, EFAULT, ENOMEM
from functools import partial
from pathlib import Path

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, CORE_FILTER, DEFAULT_FLAGS, HUGETLB, KERNEL_FAULTS, MINOR, MINOR_FAULTS, MISSING, SHMEM, WP, WRITE,
    WRITEPROTECT, Advice, Channel, Child, Context, Feature, PagefaultFlag, Range, Uffd, advise, dumps_here,
    eventually, expect, fails, faulting, handled, knows_advice, odd_address, peek, poke, promise, syscalls, thread_told,
    touch_trapped,
    undisturbed,
)  # fmt: skip

BUS_ADRERR = 2


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
    if not knows_advice(Advice.POPULATE_READ):
        calls = {name: call for name, call in calls.items() if "POPULATE" not in name}
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
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="Expect EFAULT of system calls on missing memory; the manual page is wrong, not the kernel.",
    shows=r"signals of a read\(2\) into a missing page: expected .*SIGBUS.*, got \[\]",
)


@uffd_case("faults-umo-signal", mem=(ANON,), needs=("user_mode_only",), pages=1, rows=("FL-09",), defect=NO_SIGNAL)
def test_faults_umo_signal(ctx: Context) -> None:
    """With UFFD_USER_MODE_ONLY a system call that meets a missing page raises SIGBUS."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    null = os.open("/dev/zero", os.O_RDONLY)
    with handled(signal.SIGBUS) as signals, fails(EFAULT):
        undisturbed(ctx.uffd, lambda: syscalls.read_into(null, ctx.dst.start, 1))
    os.close(null)
    expect(signals, [signal.SIGBUS], "signals of a read(2) into a missing page")


@uffd_case("faults-umo", mem=ALL, needs=("user_mode_only",), pages=2, rows=("FL-08",))
def test_faults_umo(ctx: Context) -> None:
    """With UFFD_USER_MODE_ONLY faults of user space are told as always."""
    with Uffd.open(flags=DEFAULT_FLAGS) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        for number, write in enumerate((False, True)):
            with faulting(uffd, ctx.dst.page(number).start, write=write):
                uffd.copy(ctx.dst.page(number).start, ctx.src.start, ctx.page_size)


@uffd_case(
    "faults-umo-syscalls",
    mem=ALL,
    needs=("user_mode_only",),
    pages=2,
    rows=("FL-09", "FL-10"),
    kind=Kind.DETAIL,
)
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


DUMP_SHARED, DUMP_HUGETLB_SHARED = 1 << 1, 1 << 6


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
