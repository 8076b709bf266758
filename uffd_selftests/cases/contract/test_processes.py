# SPDX-License-Identifier: GPL-2.0-only
"""Handles that work on another process's memory, or on none that is left, and other users of it in the kernel."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from ctypes import Structure, addressof
from errno import EINVAL, ENOMEM, ESRCH
from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, HUGETLB, KERNEL_FAULTS, MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MINOR_FAULTS, MISSING, NOT_HUGETLB, SHMEM,
    UNREGISTERED, UNTOUCHED, USER_MODE_ONLY, WP, WRITE, Advice, Channel, Child, Context, Feature, IoUring, MemType,
    PagefaultFlag, Range, Skip, Uffd, UffdError, Waiter, advise, errno_name, eventually, expect, expect_bytes,
    expect_modes, expect_served, faulting, knows_advice, map_memory, monitored, orphaned, outcome, peek, poke, promise,
    refuses, syscalls, through_proc, through_ptrace, touch, uapi, undisturbed, unmap,
)  # fmt: skip

MCL_CURRENT = 1
MLOCK_ONFAULT = 1


# ---- a handle passed on --------------------------------------------------------------------------------------------


def wp_offered(ctx: Context) -> bool:
    """Whether this memory can be write-protected."""
    feature = Feature.PAGEFAULT_FLAG_WP if ctx.mem == ANON else Feature.WP_HUGETLBFS_SHMEM
    return feature in ctx.uffd.offered


@uffd_case("process-remote", mem=ALL, pages=4, rows=("PR-01", "CP-44"))
def test_process_remote(ctx: Context) -> None:
    """Whoever gets a handle works with it on the memory of the process that made it: all requests and messages."""
    ctx.src.fill()

    def target(channel: Channel) -> None:
        area = ctx.mem.allocate(ctx.nr_pages)
        with Uffd.open() as uffd:
            channel.send(area.start, uffd.fd)
        channel.receive()
        area.expect_pattern_of(ctx.src, 0, 1)
        area.expect_pattern_of(ctx.src, 1, 1) if ctx.mem.hugetlb else area.expect_zero(1, 1)
        channel.receive()
        touch(area.page(0), ctx.page_size, write=True)
        channel.receive()
        area.expect_zero(2)

    with Child(target) as child:
        start, (fd,) = child.receive_fds()
        where, page = Range(start, ctx.nr_pages * ctx.page_size), Range(start, ctx.page_size)
        with Uffd(fd) as uffd:
            uffd.register(where, MISSING)
            expect_modes(where, MISSING, pid=child.pid)
            child.send()
            serve_remotely(ctx, uffd, page)
            if wp_offered(ctx):
                uffd.register(page, WP)
                uffd.writeprotect(page)
            child.send()
            if wp_offered(ctx):
                uffd.wait_fault(page.start, PagefaultFlag.WRITE | PagefaultFlag.WP)
                uffd.unprotect(page)
            uffd.unregister(where)
            expect_modes(where, UNREGISTERED, pid=child.pid)
            child.send()
            child.expect_end(uffd)


def serve_remotely(ctx: Context, uffd: Uffd, page: Range) -> None:
    """Fill the page that faults, and then the next one, with zeroes where there are zero pages."""
    second = Range(page.end, page.len)
    uffd.wait_fault(page.start)
    uffd.copy(page.start, ctx.src.start, page.len)
    uffd.wait_fault(second.start)
    uffd.wake(second)
    uffd.wait_fault(second.start)
    if ctx.mem.hugetlb:
        uffd.copy(second.start, ctx.src.page(1).start, second.len)
    else:
        uffd.zeropage(second)


# ---- a handle whose memory is gone ---------------------------------------------------------------------------------


def requests(ctx: Context) -> list[tuple[int, Structure, int]]:
    """Every request on a page, with the errno that it has where the address space is gone; 0 is success."""
    start, length, src = ctx.dst.start, ctx.page_size, ctx.src.start
    where = uapi.uffdio_range(start, length)
    found: list[tuple[int, Structure, int]] = [
        (uapi.UFFDIO_COPY, uapi.uffdio_copy(start, src, length, 0, UNTOUCHED), ESRCH),
        (uapi.UFFDIO_ZEROPAGE, uapi.uffdio_zeropage(where, 0, UNTOUCHED), ESRCH),
        (uapi.UFFDIO_WRITEPROTECT, uapi.uffdio_writeprotect(where, uapi.WriteprotectMode.WP), ESRCH),
        (uapi.UFFDIO_WRITEPROTECT, uapi.uffdio_writeprotect(where, 0), ESRCH),
        (uapi.UFFDIO_REGISTER, uapi.uffdio_register(where, MISSING, UNTOUCHED & (1 << 64) - 1), ENOMEM),
        (uapi.UFFDIO_UNREGISTER, where, ENOMEM),
        (uapi.UFFDIO_WAKE, where, 0),
    ]
    if ctx.uffd.offered & MINOR_FAULTS:
        found.append((uapi.UFFDIO_CONTINUE, uapi.uffdio_continue(where, 0, UNTOUCHED), ESRCH))
    if Feature.POISON in ctx.uffd.offered:
        found.append((uapi.UFFDIO_POISON, uapi.uffdio_poison(where, 0, UNTOUCHED), ESRCH))
    if Feature.MOVE in ctx.uffd.offered:  # it looks first whether the memory is the caller's own
        found.append((uapi.UFFDIO_MOVE, uapi.uffdio_move(start, src, length, 0, UNTOUCHED), EINVAL))
    return found


GONE = ("CP-16", "ZP-14", "CT-22", "PO-17", "WP-31", "MV-26", "UNR-14", "WK-06")


def expect_answer(request: int, given: Structure, number: int, answer: int, after: bytes) -> None:
    """Assert how a request was answered, and that it left its argument alone."""
    expect(errno_name(answer), errno_name(number), f"{uapi.IOCTL_NAMES[request]}: errno")
    expect(after.hex(), bytes(given).hex(), f"{uapi.IOCTL_NAMES[request]}: its argument afterwards")


@uffd_case("process-exited", mem=(ANON,), pages=1, rows=("PR-02", *GONE, "PL-11"), kind=Kind.DETAIL)
def test_process_exited(ctx: Context) -> None:
    """When the process has exited, fills say ESRCH, registration ENOMEM, waking nothing; arguments stay untouched."""
    with orphaned(ctx.dst.range, MISSING) as uffd:
        for request, given, number in requests(ctx):
            argument = type(given).from_buffer_copy(given)
            answer = 0
            try:
                uffd.raw_ioctl(request, addressof(argument))
            except UffdError as error:
                answer = error.errno or 0
            with promise("PR-02"):
                expect_answer(request, given, number, answer, bytes(argument))
        uffd.expect_no_message()
        expect(uffd.readable(), False, "PL-11: POLLIN when the process has exited")


PROGRAM = """
import fcntl, os, sys
for word in sys.argv[3:]:
    number, _, data = word.partition(":")
    argument, answer = bytearray.fromhex(data), 0
    try:
        fcntl.ioctl(int(sys.argv[1]), int(number), argument)
    except OSError as error:
        answer = error.errno
    os.write(int(sys.argv[2]), f"{answer}:{argument.hex()} ".encode())
"""


@uffd_case("process-exec", mem=(ANON,), pages=1, rows=("PR-03", *GONE), kind=Kind.DETAIL)
def test_process_exec(ctx: Context) -> None:
    """A handle kept through execve serves the old memory, not the new: it answers the new program as after an exit."""
    result, report = os.pipe()
    script = requests(ctx)

    def target(channel: Channel) -> None:
        uffd = Uffd.open(flags=os.O_NONBLOCK | USER_MODE_ONLY)
        uffd.register(ctx.dst.range, MISSING)
        os.set_inheritable(report, True)
        words = [f"{request}:{bytes(given).hex()}" for request, given, _ in script]
        os.execv(sys.executable, [sys.executable, "-ISc", PROGRAM, str(uffd.fd), str(report), *words])

    with Child(target) as child:
        child.wait()
    os.close(report)
    with open(result, "rb") as file:
        answers = [word.split(":") for word in file.read().decode().split()]
    expect(len(answers), len(script), "requests that were answered")
    for (request, given, number), (answer, after) in zip(script, answers, strict=True):
        with promise("PR-03"):
            expect_answer(request, given, number, int(answer), bytes.fromhex(after))


@uffd_case("process-inherited", mem=(ANON,), pages=2, rows=("PR-04", "CP-45"), kind=Kind.DETAIL)
def test_process_inherited(ctx: Context) -> None:
    """A child that inherits a handle serves its parent with it: the parent's faults and memory, its own data."""
    page, elsewhere = ctx.dst.page(0), ctx.dst.page(1)
    ctx.src.fill()
    unmap(elsewhere)
    ctx.uffd.register(page, MISSING)

    def serve(_: Channel) -> None:
        map_memory(elsewhere.len, at=elsewhere.start, flags=MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS)
        with promise("PR-04", "an address that only the child has"), refuses(EINVAL):
            ctx.uffd.register(elsewhere, MISSING)
        poke(ctx.src.start, b"c" * page.len)
        ctx.uffd.wait_fault(page.start)
        ctx.uffd.copy(page.start, ctx.src.start, page.len)
        expect_bytes(page, 0, "the child's own page")

    with faulting(ctx.uffd, page.start, read=False), Child(serve):
        pass
    expect_bytes(page, ord("c"), "the parent's page")
    ctx.uffd.expect_no_message()


# ---- the same memory in two processes ------------------------------------------------------------------------------


@uffd_case("process-shared", mem=(SHMEM, HUGETLB), pages=2, rows=("PR-09",))
def test_process_shared(ctx: Context) -> None:
    """Two processes with shared memory and a handle each: a page filled by one is there for the other."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)

    def life(channel: Channel) -> None:
        channel.receive()
        ctx.dst.expect_pattern_of(ctx.src)

    with monitored(ctx.dst.range, MISSING, life) as (child, uffd):
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
        child.send()
        page = ctx.dst.page(1)
        uffd.wait_fault(page.start)
        ctx.uffd.expect_no_message()
        uffd.copy(page.start, ctx.src.page(1).start, page.len)
        child.expect_end(uffd, ctx.uffd)
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_pattern_of(ctx.src))


@uffd_case("process-shared-child", mem=(SHMEM, HUGETLB), pages=1, rows=("PR-10",), kind=Kind.DETAIL)
def test_process_shared_child(ctx: Context) -> None:
    """A shared page that a child touched first, where it is not registered, is no missing page for the parent."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with Child(lambda _: ctx.dst.fill()):
        pass
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_pattern_of(ctx.dst))


# ---- the kernel's own access ---------------------------------------------------------------------------------------

KernelUser = tuple[str, PagefaultFlag, Callable[[Range], object]]


def kernel_users(mem: MemType) -> list[KernelUser]:
    """What reaches for a page in the kernel: name, flags of its fault, and the call."""
    locking = PagefaultFlag(0) if mem.shared else WRITE
    users: list[KernelUser] = [
        ("process_vm_readv", PagefaultFlag(0), lambda page: syscalls.process_vm_readv(os.getpid(), page.start + 7, 8)),
        ("process_vm_writev", WRITE, lambda page: syscalls.process_vm_writev(os.getpid(), page.start + 7, b"x")),
        ("MADV_POPULATE_READ", PagefaultFlag(0), lambda page: advise(page, Advice.POPULATE_READ)),
        ("MADV_POPULATE_WRITE", WRITE, lambda page: advise(page, Advice.POPULATE_WRITE)),
        ("mlock", locking, lambda page: syscalls.call("mlock", page.start, page.len)),
    ]
    return [user for user in users if "POPULATE" not in user[0] or knows_advice(Advice.POPULATE_READ)]


def expect_waits(ctx: Context, uffd: Uffd, page: Range, flags: PagefaultFlag, call: Callable[[], object]) -> object:
    """Assert that a call faults at the page with these flags, sleeps until it is filled, and return its result."""
    with faulting(uffd, page.start, flags=flags, call=call) as waiter:
        waiter.expect_sleeping()
        uffd.expect_asleep(1)
        uffd.copy(page.start, ctx.src.start, page.len)
        result = waiter.result()
    uffd.expect_no_message()
    return result


@uffd_case("process-kernel-users", mem=ALL, needs=("kernel_faults",), pages=5, rows=("PR-05",), kind=Kind.DETAIL)
def test_process_kernel_users(ctx: Context) -> None:
    """Calls that reach for missing pages in the kernel are announced, sleep until they are filled, and succeed then."""
    with Uffd.open(flags=KERNEL_FAULTS) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        for number, (name, flags, call) in enumerate(kernel_users(ctx.mem)):
            page = ctx.dst.page(number)
            poke(ctx.src.start, bytes([number + 1]) * 16)
            with promise("PR-05", name):
                result = expect_waits(ctx, uffd, page, flags, partial(call, page))
            wanted = {"process_vm_readv": bytes([number + 1]) * 8, "process_vm_writev": 1}
            if name in wanted:
                expect(result, wanted[name], f"PR-05: result of {name}")
            written = b"x" if name == "process_vm_writev" else bytes([number + 1])
            expect(peek(page.start + 7), written, f"PR-05: byte 7 after {name}")


@uffd_case(
    "process-long-term-pin",
    mem=ALL,
    features=Feature.WP_UNPOPULATED,  # not used: before the release that brought it such pins could not wait
    needs=("kernel_faults",),
    pages=1,
    rows=("PR-05",),
    kind=Kind.VERSION,
)
def test_process_long_term_pin(ctx: Context) -> None:
    """A long-term pin of a missing page is announced as a write, sleeps until it is filled, and succeeds then.

    Before Linux 6.3 it failed at once, with EFAULT (mm/gup.c, __gup_longterm_locked).
    """
    page = ctx.dst.page(0)
    with Uffd.open(flags=KERNEL_FAULTS) as uffd, IoUring() as ring:
        uffd.register(page, MISSING)
        expect_waits(ctx, uffd, page, WRITE, lambda: ring.register_buffer(page))
        ring.unregister_buffer()


@uffd_case("process-mlockall", mem=(ANON, SHMEM), needs=("kernel_faults",), pages=1, rows=("PR-05",), kind=Kind.DETAIL)
def test_process_mlockall(ctx: Context) -> None:
    """Mlockall is announced at each missing page, and succeeds when they are filled."""

    def life(channel: Channel) -> None:
        result = outcome(lambda: syscalls.call("mlockall", MCL_CURRENT))
        syscalls.call("munlockall")
        channel.send(result)

    with monitored(ctx.dst.range, MISSING, life, flags=KERNEL_FAULTS) as (child, uffd):
        eventually(lambda: child.ended or uffd.readable(), "a fault or the end of the process")
        if child.ended and child.receive() in ("ENOMEM", "EPERM"):
            raise Skip("mlockall(2): raise RLIMIT_MEMLOCK (ulimit -l)")
        uffd.wait_fault(ctx.dst.start, PagefaultFlag(0) if ctx.mem.shared else WRITE)
        uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
        expect(child.receive(), 0, "PR-05: result of mlockall")


DEBUGGER = Defect(
    id="D-PR-06",
    summary="a missing or protected page cannot be reached through /proc/PID/mem and ptrace(2): EIO, and whoever could "
    "provide it is not told",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="Have the page filled or released first, or use process_vm_readv(2).",
    shows=r"got \(0, 'EIO'\)",
)


def debug(ctx: Context, uffd: Uffd, access: Callable[[], object]) -> tuple[int, object]:
    """Make an access and fill each page whose fault is announced meanwhile; return how many, and the result."""
    faults = 0
    with Waiter(access) as waiter:
        while not waiter.done:
            eventually(lambda: waiter.done or uffd.readable(), "a fault or the end of the access")
            if uffd.read():
                faults += 1
                uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
        return faults, waiter.result()


@uffd_case("process-debugger", mem=ALL, needs=("kernel_faults",), pages=1, rows=("PR-06",), defect=DEBUGGER)
def test_process_debugger(ctx: Context) -> None:
    """A missing page that a debugger reads through /proc/PID/mem is announced, and read when it has been filled."""
    with Uffd.open(flags=KERNEL_FAULTS) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        result = debug(ctx, uffd, partial(through_proc, "self", ctx.dst.start, 1))
        expect(result, (1, b"\0"), "PR-06: faults announced and byte read")


def expect_refused_or_served(result: tuple[int, object], what: str) -> None:
    """Assert that an access was refused without a message, or succeeded after one."""
    faults, value = result
    expect((faults > 0, value == "EIO") in ((False, True), (True, False)), True, f"{what}: {faults} faults, {value}")


@uffd_case("process-debugger-refused", mem=ALL, needs=("kernel_faults",), pages=1, rows=("PR-06",), kind=Kind.DETAIL)
def test_process_debugger_refused(ctx: Context) -> None:
    """Debuggers get EIO for a missing page, or wait until it is filled."""
    with Uffd.open(flags=KERNEL_FAULTS) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        for what, data in (("read", b""), ("write", b"x")):
            result = debug(ctx, uffd, partial(through_proc, "self", ctx.dst.start, 1, data))
            expect_refused_or_served(result, f"PR-06: {what} through /proc/self/mem")
    life = Channel.receive
    with monitored(ctx.dst.range, MISSING, life, flags=KERNEL_FAULTS) as (child, uffd):

        def read_and_write() -> object:
            read = through_ptrace(child.pid, ctx.dst.start)
            return read if isinstance(read, str) else through_ptrace(child.pid, ctx.dst.start, 0)

        result = debug(ctx, uffd, read_and_write)
        expect_refused_or_served(result, "PR-06: ptrace")
        child.send()


@uffd_case("process-willneed", mem=ALL, pages=2, rows=("PR-07",), kind=Kind.DETAIL)
def test_process_willneed(ctx: Context) -> None:
    """MADV_WILLNEED of a missing page is not announced, and leaves it missing."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    undisturbed(ctx.uffd, lambda: outcome(lambda: advise(ctx.dst.range, Advice.WILLNEED)))
    expect_served(ctx, ctx.dst.page(1))


@uffd_case("process-lock-on-fault", mem=NOT_HUGETLB, pages=2, rows=("PR-08",), kind=Kind.DETAIL)
def test_process_lock_on_fault(ctx: Context) -> None:
    """Memory under MLOCK_ONFAULT faults at the first touch as ever, and can be filled in every way."""
    zero, page = ctx.dst.page(0), ctx.dst.page(1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    locked = undisturbed(
        ctx.uffd, lambda: outcome(lambda: syscalls.call("mlock2", zero.start, ctx.dst.range.len, MLOCK_ONFAULT))
    )
    if locked in ("ENOMEM", "EPERM", "EAGAIN"):
        raise Skip("mlock2(2): raise RLIMIT_MEMLOCK (ulimit -l)")
    expect(locked, 0, "PR-08: result of mlock2")
    with faulting(ctx.uffd, zero.start):
        ctx.uffd.zeropage(zero)
    expect_bytes(zero, 0, "the zero page")
    expect_served(ctx, page)
