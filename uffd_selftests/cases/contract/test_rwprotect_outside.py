# SPDX-License-Identifier: GPL-2.0-only
"""Read-write protection and who comes from outside: debuggers, /proc, core dumps, a thread's end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC_RWP, HUGETLB, HUGETLB_PRIVATE, KERNEL_FAULTS, NEW, PAGE_SIZE, READ_TRAPPED, RWP, SHMEM,
    SHMEM_PRIVATE, SYNC_RWP, WP, WRITEPROTECT, WRITE_TRAPPED, Advice, Area, Channel, Child, Context, Fault, Feature,
    Pagemap, Range, RegisterMode, Skip, Uffd, Waiter, advise, collapse, core_bytes, core_dump, eventually, expect,
    expect_accessed, expect_rwp_trapped, faulting, huge_area, peek, pmd_mapped, poke, promise, rwp_protected, syscalls,
    through_proc, through_ptrace,
)  # fmt: skip


# ---- debuggers -----------------------------------------------------------------------------------------------------


def served(uffd: Uffd, call: Callable[[], object], unit: int) -> tuple[int, object]:
    """Make a call, resolving each page whose fault is told meanwhile; return how many, and the result."""
    faults = 0
    with Waiter(call) as waiter:
        while not waiter.done:
            eventually(lambda: waiter.done or uffd.readable(), "a fault or the end of the call")
            for message in uffd.read():
                assert isinstance(message, Fault)
                faults += 1
                uffd.resolve(Range(message.address - message.address % unit, unit))
        return faults, waiter.result()


DEBUGGER = Defect(
    id="D-RW-66",
    summary="Pages under synchronous read-write protection, which are all in memory, cannot be reached through "
    "/proc/PID/mem and ptrace(2): EIO, and whoever could resolve them is not told.",
    kernels="7.3.4",
    advice="Resolve the pages before a debugger looks, switch to RWP_ASYNC, or use process_vm_readv(2).",
    shows=r"RW-66, .*: expected .*, got EIO",
)


@uffd_case(
    "rwprotect-proc-mem",
    mem=ALL,
    features=SYNC_RWP,
    variants=("read", "write"),
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-66",),
    defect=DEBUGGER,
)
def test_rwprotect_proc_mem(ctx: Context, variant: str) -> None:
    """/proc/PID/mem has the bytes of protected pages, at once or when they have been resolved, and takes new ones."""
    area = ctx.dst
    area.fill()
    across = area.page(1).end - 4
    there = peek(across, 8)
    with Uffd.open(ctx.features, KERNEL_FAULTS) as uffd:
        uffd.register(area.range, RWP)
        uffd.rwprotect(area.range)
        new = b"" if variant == "read" else NEW
        _, result = served(uffd, partial(through_proc, "self", across, 8, new), area.page_size)
        with promise("RW-66", f"{variant} through /proc/self/mem"):
            expect(result, len(NEW) if new else there, "result")
        uffd.expect_still_asleep(0)
        uffd.resolve(area.range)
        expect(peek(across, 8), NEW + there[len(NEW) :] if new else there, "the bytes afterwards")


@uffd_case(
    "rwprotect-ptrace",
    mem=ALL,
    features=SYNC_RWP,
    variants=("read", "write"),
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-66",),
    defect=DEBUGGER,
)
def test_rwprotect_ptrace(ctx: Context, variant: str) -> None:
    """A debugger gets at words of protected pages, at once or when they have been resolved."""
    outcome = debugged(ctx, SYNC_RWP, variant)
    with promise("RW-66", f"{variant} by ptrace(2)"):
        expect(*outcome, "result")


def debugged(ctx: Context, features: Feature, variant: str) -> tuple[object, object]:
    """Have a child protect all pages, look at its page 1 as a debugger; return what that got, and should have got."""
    area = ctx.dst

    def life(channel: Channel) -> None:
        area.fill()
        with Uffd.open(features, KERNEL_FAULTS) as uffd:
            uffd.register(area.range, RWP)
            uffd.rwprotect(area.range)
            channel.send(peek(ctx.src.page(1).start, 8), uffd.fd)
            channel.receive()
            if Feature.RWP_ASYNC in features:
                Pagemap.expect_protected(area, {0, 2, 3}, "after the debugger's access")
            uffd.resolve(area.range)
            channel.send(peek(area.page(1).start, 8))

    ctx.src.fill()
    with Child(life) as child:
        there, (fd,) = child.receive_fds()
        with Uffd(fd, features) as uffd:
            new = None if variant == "read" else int.from_bytes(b"debugger", "little")
            _, result = served(uffd, partial(through_ptrace, child.pid, area.page(1).start, new), area.page_size)
            child.send()
            after = child.receive()
        refused = result == "EIO"
        expect(after, there if new is None or refused else b"debugger", "the bytes afterwards")
    return result, there if new is None else 0


@uffd_case(
    "rwprotect-debugger-refused",
    mem=ALL,
    features=SYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-66",),
    kind=Kind.DETAIL,
)
def test_rwprotect_debugger_refused(ctx: Context) -> None:
    """Where a debugger is refused a protected page, the page keeps bytes and protection, and nobody is told."""
    area = ctx.dst
    with Uffd.open(ctx.features, KERNEL_FAULTS) as uffd:
        area.fill()
        uffd.register(area.range, RWP)
        uffd.rwprotect(area.range)
        for data in (b"", NEW):
            faults, result = served(uffd, partial(through_proc, "self", area.page(1).start, 8, data), area.page_size)
            with promise("RW-66", "write" if data else "read"):
                if result == "EIO":
                    expect(faults, 0, "messages of an access that was refused")
                    Pagemap.expect_protected(area, range(4), "after it was refused")
        if result == "EIO":
            expect_rwp_trapped(uffd, area, 1)
            area.expect_pattern_of(area, 1, 1)
        # the pages beside the refused one can be reached as ever
        uffd.resolve(area.page(2))
        expect(through_proc("self", area.page(2).start, 8), peek(area.page(2).start, 8), "bytes of a resolved page")


@uffd_case("rwprotect-debugger-async", mem=ALL, features=ASYNC_RWP, pages=4, rows=("RW-66", "RW-78"), kind=Kind.DETAIL)
def test_rwprotect_debugger_async(ctx: Context) -> None:
    """With RWP_ASYNC debuggers reach protected pages, which count as accessed then."""
    area = rwp_protected(ctx)
    ctx.src.fill()
    across = area.page(1).end - 4
    there = peek(ctx.src.page(1).end - 4, 8)
    with promise("RW-66", "read"):
        expect(through_proc("self", across, 8), there, "bytes read through /proc/self/mem")
        Pagemap.expect_protected(area, {0, 3}, "after pages 1 and 2 were read")
        expect_accessed(area, {1, 2}, "after pages 1 and 2 were read")
    with promise("RW-66", "write"):
        expect(through_proc("self", area.page(3).start, 0, NEW), len(NEW), "bytes written through /proc/self/mem")
        Pagemap.expect_protected(area, {0}, "after page 3 was written to")
        expect(peek(area.page(3).start, len(NEW)), NEW, "what was written")
    for variant in ("read", "write"):
        with promise("RW-66", f"{variant} by ptrace(2)"):
            expect(*debugged(ctx, ASYNC_RWP, variant), "result")
    ctx.uffd.expect_no_message()


@uffd_case(
    "rwprotect-remote-calls",
    mem=ALL,
    features=SYNC_RWP,
    variants=("read", "write"),
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-63",),
    kind=Kind.DETAIL,
)
def test_rwprotect_remote_calls(ctx: Context, variant: str) -> None:
    """process_vm_readv(2) and process_vm_writev(2) by another process wait at each protected page."""
    area, write = ctx.dst, variant == "write"

    def life(channel: Channel) -> None:
        area.fill()
        across = area.page(1).end - 4
        with Uffd.open(ctx.features, KERNEL_FAULTS) as uffd:
            uffd.register(area.range, RWP)
            uffd.rwprotect(area.range)
            channel.send(None, uffd.fd)
            channel.receive()
            Pagemap.expect_protected(area, {0, 3}, "after the call")
            expect(peek(across, 8)[: len(NEW)] == NEW, write, "whether the new bytes are there")
            uffd.resolve(area.range)
            area.expect_pattern_of(area, 0, 1)
            area.expect_pattern_of(area, 3, 1)

    ctx.src.fill()
    there = peek(ctx.src.page(1).end - 4, 8)
    with Child(life) as child:
        _, (fd,) = child.receive_fds()
        with Uffd(fd, ctx.features) as uffd, promise("RW-63", variant):
            across = area.page(1).end - 4
            reading = partial(syscalls.process_vm_readv, child.pid, across, 8)
            call = partial(syscalls.process_vm_writev, child.pid, across, NEW) if write else reading
            at = area.page(1).start if area.mem.hugetlb else area.page(2).start - PAGE_SIZE
            flags = WRITE_TRAPPED if write else READ_TRAPPED
            with faulting(uffd, across, at=at, flags=flags, call=call) as waiter:
                uffd.expect_still_asleep(1)
                uffd.resolve(area.page(1))
                uffd.wait_fault(area.page(2).start, flags)
                uffd.expect_still_asleep(1)
                uffd.resolve(area.page(2))
                expect(waiter.result(), len(NEW) if write else there, "result of the call")
            uffd.expect_still_asleep(0)
            child.send()
            child.expect_end(uffd)


CMDLINE = replace(DEBUGGER, shows=r"RW-66, .*: expected b'.+', got b''")


@uffd_case(
    "rwprotect-cmdline",
    mem=(ANON,),
    features=SYNC_RWP,
    needs=("kernel_faults",),
    pages=1,
    rows=("RW-66",),
    defect=CMDLINE,
)
def test_rwprotect_cmdline(ctx: Context) -> None:
    """/proc/PID/cmdline shows the arguments of a process whose page with them is protected."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start = int(fields[48 - 3])  # arg_start of proc_pid_stat(5), shown to who may trace
    if not start:
        raise Skip("/proc/self/stat does not tell where the arguments are: run as root")
    page = Range(start - start % PAGE_SIZE, PAGE_SIZE)

    def life(channel: Channel) -> None:
        with Uffd.open(ctx.features, KERNEL_FAULTS) as uffd:
            uffd.register(page, RWP)
            channel.send(None, uffd.fd)
            channel.receive()

    first = Path("/proc/self/cmdline").read_bytes()[: page.end - start]
    with Child(life) as child:
        _, (fd,) = child.receive_fds()
        with Uffd(fd, ctx.features) as uffd:
            # Asleep it touches nothing; else it might look for a variable of its environment, which is there, too.
            stat = Path(f"/proc/{child.pid}/stat")
            eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S", "the child to sleep")
            uffd.rwprotect(page)
            _, result = served(uffd, Path(f"/proc/{child.pid}/cmdline").read_bytes, PAGE_SIZE)
            uffd.resolve(page)
            child.send()
            with promise("RW-66", "/proc/PID/cmdline"):
                expect(result[: len(first)] if isinstance(result, bytes) else result, first, "arguments")


# ---- core dumps ----------------------------------------------------------------------------------------------------


CORE = Defect(
    id="D-RW-67",
    summary="Pages under synchronous read-write protection are zeroes in a core dump, as if they were not there.",
    kernels="7.3.4",
    advice="Do not trust zeroes in core dumps of processes with read-write-protected memory.",
    shows=r"RW-67.*: what the core dump has of each page: expected .*, got .*: 'zeroes'",
)


def expect_core(ctx: Context, area: Area, features: Feature, mode: RegisterMode, protected: set[int]) -> None:
    """Assert that a core dump has the first pages of an area, as many as a case has, and is made without a message.

    Some pages are protected, one by one; if none is named, all are, at once. An area of more pages is to be one
    transparent huge page, which the child makes: one of its parent's would be split at the first write.
    """
    ctx.src.fill()  # the same bytes

    def life(channel: Channel) -> None:
        if area.nr_pages > ctx.nr_pages:
            advise(area.range, Advice.HUGEPAGE)
        area.fill()
        if area.nr_pages > ctx.nr_pages and pmd_mapped(area.range) < area.range.len:
            collapse(area.range)
        uffd = Uffd.open(features, KERNEL_FAULTS)
        uffd.register(area.range, mode)
        for where in [area.page(page) for page in protected] or [area.range]:
            (uffd.rwprotect if mode == RWP else uffd.writeprotect)(where)
        channel.send(None, uffd.fd)

    with core_dump(life) as core:
        found = {page: dumped(core, area.page(page), ctx.src.page(page).start) for page in range(ctx.nr_pages)}
    expect(found, dict.fromkeys(range(ctx.nr_pages), "its bytes"), "what the core dump has of each page")


def huge_place(ctx: Context) -> Area:
    """Map an area that one transparent huge page would fill, and leave it empty; Skip where none can be had."""
    return ctx.allocate(huge_area(ctx).nr_pages)


def dumped(core: Path, page: Range, like: int) -> str:
    """Say what a core file has of a page that ought to be like another one."""
    data = core_bytes(core, page)
    if data == peek(like, page.len):
        return "its bytes"
    return "other bytes" if any(data) else "zeroes" if data else "nothing"


@uffd_case(
    "rwprotect-core-dump", mem=ALL, features=SYNC_RWP, needs=("kernel_faults",), pages=4, rows=("RW-67",), defect=CORE
)
def test_rwprotect_core_dump(ctx: Context) -> None:
    """A core dump has the bytes of protected pages."""
    with promise("RW-67"):
        expect_core(ctx, ctx.dst, SYNC_RWP, RWP, {1, 2})


@uffd_case(
    "rwprotect-core-dump-thp",
    mem=(ANON,),
    features=SYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-67",),
    defect=CORE,
)
def test_rwprotect_core_dump_thp(ctx: Context) -> None:
    """A core dump has the bytes of a transparent huge page that is protected as a whole."""
    with promise("RW-67"):
        expect_core(ctx, huge_place(ctx), SYNC_RWP, RWP, set())


@uffd_case(
    "rwprotect-core-dump-async",
    mem=(ANON, SHMEM, SHMEM_PRIVATE, HUGETLB),
    features=ASYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-67",),
    kind=Kind.DETAIL,
)
def test_rwprotect_core_dump_async(ctx: Context) -> None:
    """A core dump has the bytes of pages that are protected with RWP_ASYNC, and of those beside protected ones."""
    with promise("RW-67"):
        expect_core(ctx, ctx.dst, ASYNC_RWP, RWP, {1, 2})


CORE_HUGE = replace(
    CORE,
    summary="Private huge pages, transparent ones too, that are protected with RWP_ASYNC are zeroes in a core dump: "
    "the kernel takes what it cannot follow for a hole (no_page_table).",
)


@uffd_case(
    "rwprotect-core-dump-async-hugetlb",
    mem=(HUGETLB_PRIVATE,),
    features=ASYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-67",),
    defect=CORE_HUGE,
)
def test_rwprotect_core_dump_async_hugetlb(ctx: Context) -> None:
    """The same for huge pages of a private mapping."""
    with promise("RW-67"):
        expect_core(ctx, ctx.dst, ASYNC_RWP, RWP, {1, 2})


@uffd_case(
    "rwprotect-core-dump-async-thp",
    mem=(ANON,),
    features=ASYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    rows=("RW-67",),
    defect=CORE_HUGE,
)
def test_rwprotect_core_dump_async_thp(ctx: Context) -> None:
    """The same for a transparent huge page that is protected as a whole."""
    with promise("RW-67"):
        expect_core(ctx, huge_place(ctx), ASYNC_RWP, RWP, set())


@uffd_case(
    "writeprotect-core-dump",
    mem=ALL,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    rows=("FL-24",),
    kind=Kind.DETAIL,
)
def test_writeprotect_core_dump(ctx: Context) -> None:
    """A core dump has the bytes of write-protected pages, for it only reads them."""
    with promise("FL-24"):
        expect_core(ctx, ctx.dst, WRITEPROTECT, WP, {1, 2})


# ---- the end of a thread -------------------------------------------------------------------------------------------


EXIT = Defect(
    id="D-RW-68",
    summary="When a thread ends, the word that says so (CLONE_CHILD_CLEARTID, robust futexes) is not written if it "
    "lies in a page under synchronous protection, and whoever joins the thread waits for ever.",
    kernels="7.3.4",
    advice="Keep stacks and thread descriptors out of protected memory, or use the asynchronous modes.",
    shows=r"RW-68.*word of a thread that has ended: expected 0, got",
)


def thread_word(features: Feature, mode: RegisterMode) -> tuple[int, int]:
    """Have a thread end whose word lies in a protected page of the process; return the word, and the messages.

    In a child, for the interpreter knows nothing of the thread's end.
    """

    def target(channel: Channel) -> None:
        area = ANON.allocate(3)
        area.fill()
        word = area.page(1).start
        poke(word, (77).to_bytes(4, "little"))
        ready = threading.Event()

        def leave() -> None:
            syscalls.call("set_tid_address", word)
            ready.wait()
            syscalls.call("exit", 0)

        with Uffd.open(features, KERNEL_FAULTS) as uffd:
            uffd.register(area.range, mode)
            thread = threading.Thread(target=leave, daemon=True)
            thread.start()
            (uffd.rwprotect if mode == RWP else uffd.writeprotect)(area.range)
            task = Path(f"/proc/self/task/{thread.native_id}")
            ready.set()
            told = 0

            def gone() -> bool:
                nonlocal told
                for message in uffd.read():
                    assert isinstance(message, Fault)
                    told += 1
                    (uffd.resolve if mode == RWP else uffd.unprotect)(Range(message.address, PAGE_SIZE))
                return not task.exists()

            eventually(gone, "the thread to end")
            uffd.expect_still_asleep(0)
            (uffd.resolve if mode == RWP else uffd.unprotect)(area.range)
            channel.send((int.from_bytes(peek(word, 4), "little"), told))
            area.expect_pattern_of(area, 2, 1)

    with Child(target) as child:
        result: tuple[int, int] = child.receive()
    return result


@uffd_case(
    "protected-thread-exit",
    variants=("RWP", "WP"),
    needs=("kernel_faults",),
    features=SYNC_RWP | WRITEPROTECT,
    rows=("RW-68",),
    defect=EXIT,
)
def test_protected_thread_exit(variant: str) -> None:
    """The kernel clears the word of a thread that ends, also where the word lies in a protected page."""
    word, _ = thread_word(SYNC_RWP, RWP) if variant == "RWP" else thread_word(WRITEPROTECT, WP)
    with promise("RW-68", variant):
        expect(word, 0, "the word of a thread that has ended")


@uffd_case(
    "protected-thread-exit-async",
    variants=("RWP", "WP"),
    needs=("kernel_faults",),
    features=ASYNC_RWP | WRITEPROTECT | Feature.WP_ASYNC,
    rows=("RW-68",),
    kind=Kind.DETAIL,
)
def test_protected_thread_exit_async(variant: str) -> None:
    """The same with asynchronous protection, where nobody is told."""
    if variant == "RWP":
        word, told = thread_word(ASYNC_RWP, RWP)
    else:
        word, told = thread_word(WRITEPROTECT | Feature.WP_ASYNC, WP)
    with promise("RW-68", variant):
        expect((word, told), (0, 0), "the word of a thread that has ended, and messages")
