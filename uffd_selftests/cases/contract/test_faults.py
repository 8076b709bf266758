# SPDX-License-Identifier: GPL-2.0-only
"""Page faults: what their messages say, and what is no fault at all."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOENT, EPERM
from functools import partial
from pathlib import Path

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, HUGETLB, HUGETLB_PRIVATE, KERNEL_FAULTS, MINOR, MINOR_FAULTS, MISSING, PAGE_SIZE, SHMEM, SHMEM_PRIVATE,
    WP, WRITE, WRITEPROTECT, Advice, Channel, Child, Context, Fault, Feature, KernelError, PagefaultFlag, Range, Skip,
    Uffd, advise, expect, expect_bytes, faulting, huge_area, odd_address, page_out, peek, promise, smaps_fields,
    swap_out, syscalls, thread_told, touch, undisturbed,
)  # fmt: skip


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
