# SPDX-License-Identifier: GPL-2.0-only
"""UFFD_EVENT_UNMAP: what unmapping announces, and what it does not."""

from __future__ import annotations

import os
import sys
from errno import EINVAL, EPERM
from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, HUGETLB, IPC_CREAT, IPC_RMID, MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MISSING, PAGE_SIZE, REMAP, REMOVE,
    SHM_HUGETLB, UNMAP, UNREGISTERED, Channel, Child, Context, KernelError, Message, Range, Skip, Uffd, UffdError,
    Waiter, announced, await_child_event, await_event, expect, expect_errno, expect_modes, expect_no_memory,
    expect_served, fails, map_memory, modes_offered, monitored, peek, promise, recorder, remap, syscalls, take_event,
    undisturbed, unmap, unmapped,
)  # fmt: skip


@uffd_case("unmap-event", mem=ALL, features=UNMAP, pages=4, rows=("EV-02", "EV-13"))
def test_unmap_event(ctx: Context) -> None:
    """Munmap announces its range when the mapping has gone already; the neighbours stay as they were."""
    page = ctx.dst.page(1)
    ctx.dst.fill(0, 3)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with Waiter(lambda: unmap(page)) as waiter:
        await_event(ctx.uffd, waiter)
        expect_no_memory(page)
        take_event(ctx.uffd, waiter, unmapped(page))
    ctx.uffd.expect_no_message()
    ctx.dst.expect_pattern_of(ctx.dst, 0, 1)
    ctx.dst.expect_pattern_of(ctx.dst, 2, 1)
    expect_modes(ctx.dst.page(0), MISSING)
    expect_served(ctx, ctx.dst.page(3))


@uffd_case("unmap-event-whole", mem=ALL, features=UNMAP, pages=6, rows=("EV-14",), kind=Kind.DETAIL)
def test_unmap_event_whole(ctx: Context) -> None:
    """One munmap sends a handle one message with the whole range, whatever of it was registered in how many pieces."""
    where = ctx.dst.page(0, 5)
    ctx.uffd.register(ctx.dst.page(1, 2), MISSING)
    ctx.uffd.register(ctx.dst.page(4, 2), MISSING)
    announced(ctx.uffd, lambda: unmap(where), unmapped(where))
    expect_no_memory(where)
    expect_modes(ctx.dst.page(5), MISSING)


@uffd_case("unmap-event-modes", mem=ALL, features=UNMAP, pages=1, spare_hugepages=2, rows=("EV-13",))
def test_unmap_event_modes(ctx: Context) -> None:
    """Munmap is announced in whichever mode the memory is registered."""
    for mode in modes_offered(ctx):
        where = ctx.allocate().range
        with promise("EV-13", f"registered for {mode}"):
            ctx.uffd.register(where, mode)
            announced(ctx.uffd, partial(unmap, where), unmapped(where))


@uffd_case("unmap-event-nobody", mem=ALL, features=UNMAP, pages=3, rows=("EV-14",), kind=Kind.DETAIL)
def test_unmap_event_nobody(ctx: Context) -> None:
    """Unmapping memory that is not registered is not announced, next to registered memory and once it was."""
    ctx.uffd.register(ctx.dst.page(1, 2), MISSING)
    ctx.uffd.unregister(ctx.dst.page(2))
    for number in (0, 2):
        undisturbed(ctx.uffd, partial(unmap, ctx.dst.page(number)))
    expect_served(ctx, ctx.dst.page(1))


@uffd_case("unmap-event-mapped-over", mem=ALL, features=UNMAP, pages=3, rows=("EV-15",))
def test_unmap_event_mapped_over(ctx: Context) -> None:
    """A mapping put over registered memory announces what it replaces, and is not registered itself."""
    page = ctx.dst.page(1)
    ctx.uffd.register(ctx.dst.range, MISSING)

    def map_over() -> int:
        return map_memory(page.len, at=page.start, flags=MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS)

    expect(announced(ctx.uffd, map_over, unmapped(page)), page.start, "address of the new mapping")
    expect_modes(ctx.dst.range, MISSING, UNREGISTERED, MISSING)
    expect(undisturbed(ctx.uffd, lambda: peek(page.start)), b"\0", "contents of the new mapping")


@uffd_case("unmap-event-shrunk", mem=ALL, features=UNMAP, pages=3, rows=("EV-15",))
def test_unmap_event_shrunk(ctx: Context) -> None:
    """An mremap that shrinks registered memory announces the part cut off."""
    whole, rest, tail = ctx.dst.range, ctx.dst.page(0), ctx.dst.page(1, 2)
    ctx.uffd.register(whole, MISSING)
    result = announced(ctx.uffd, lambda: remap(whole, rest.len, flags=0), unmapped(tail))
    expect(result, whole.start, "address of the rest")
    expect_no_memory(tail)
    expect_served(ctx, rest)


@uffd_case("unmap-event-brk", mem=(ANON,), features=UNMAP, pages=1, rows=("EV-15",))
def test_unmap_event_brk(ctx: Context) -> None:
    """A brk that shrinks a registered heap announces the part cut off."""
    page = PAGE_SIZE

    def target(channel: Channel) -> None:
        start = -(-syscalls.call("brk", 0) // page) * page
        end = start + 4 * page
        expect(syscalls.call("brk", end), end, "brk(2) that grows the heap")
        with Uffd.open(UNMAP) as uffd:
            uffd.register(Range(start + page, 3 * page), MISSING)
            channel.send(start, uffd.fd)
        undisputed = syscalls.call("brk", 0) == end
        channel.send(undisputed)
        if undisputed:
            channel.send(syscalls.call("brk", start + 2 * page) - start)

    with Child(target) as child:
        start, (fd,) = child.receive_fds()
        with Uffd(fd) as uffd:
            if not child.receive():
                raise Skip("the C library has grown the heap meanwhile: run the case again")
            await_child_event(uffd, child)
            expect(uffd.read(), [unmapped(Range(start + 2 * page, 2 * page))], "the event")
            expect(child.receive(), 2 * page, "new end of the heap")
            child.expect_end(uffd)


@uffd_case("unmap-event-two-handles", mem=ALL, features=UNMAP, pages=2, rows=("EV-16",), kind=Kind.DETAIL)
def test_unmap_event_two_handles(ctx: Context) -> None:
    """A munmap of memory of two handles announces itself to each, and waits for both."""
    ctx.uffd.register(ctx.dst.page(0), MISSING)
    with Uffd.open(UNMAP) as other:
        other.register(ctx.dst.page(1), MISSING)
        with Waiter(lambda: unmap(ctx.dst.range)) as waiter:
            take_event(ctx.uffd, waiter, unmapped(ctx.dst.range))
            take_event(other, waiter, unmapped(ctx.dst.range))
        other.expect_no_message()
    ctx.uffd.expect_no_message()


@uffd_case("unmap-event-shmdt", mem=(HUGETLB,), features=UNMAP | REMOVE, pages=1, rows=("EV-17",), kind=Kind.DETAIL)
def test_unmap_event_shmdt(ctx: Context) -> None:
    """Shmdt is not announced."""
    try:
        segment = syscalls.call("shmget", 0, ctx.page_size, IPC_CREAT | SHM_HUGETLB | 0o600)
    except KernelError as error:
        raise Skip(f"no System V segment of huge pages: {error}") from None
    where = Range(syscalls.call("shmat", segment, 0, 0), ctx.page_size)
    syscalls.call("shmctl", segment, IPC_RMID, 0)
    try:
        ctx.uffd.register(where, MISSING)
    except UffdError as error:
        expect_errno(error, EINVAL, "errno of UFFDIO_REGISTER")
        syscalls.call("shmdt", where.start)
        raise Skip("this kernel registers no System V segment: D-REG-56, see register-sysv-hugetlb") from None
    undisturbed(ctx.uffd, lambda: syscalls.call("shmdt", where.start))
    expect_no_memory(where)


@uffd_case(
    "unmap-event-end", mem=(ANON, HUGETLB), features=UNMAP | REMOVE | REMAP, pages=2, rows=("EV-17",), kind=Kind.DETAIL
)
def test_unmap_event_end(ctx: Context) -> None:
    """Neither exit nor execve is announced, though the memory goes."""
    ends = {
        "exit": lambda _: ctx.dst.fill(0, 1),
        "execve": lambda _: os.execv(sys.executable, [sys.executable, "-ISc", ""]),
    }
    for name, end in ends.items():
        with (
            promise("EV-17", name),
            monitored(ctx.dst.page(1), MISSING, end, ctx.features) as (child, uffd),
            recorder(ctx, uffd) as reader,
        ):
            child.wait()
            expect(reader.messages, [], "messages")


@uffd_case("unmap-fails", mem=ALL, features=UNMAP, pages=2, rows=("EV-13",), kind=Kind.DETAIL)
def test_unmap_fails(ctx: Context) -> None:
    """A munmap that is refused for its arguments announces nothing, and holds nothing up afterwards."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for what, bad in {
        "start not page aligned": Range(ctx.dst.start + 1, ctx.page_size),
        "len 0": Range(ctx.dst.start, 0),
        "start + len wraps": Range(ctx.dst.start, (1 << 64) - PAGE_SIZE),
    }.items():
        with promise("EV-13", what), fails(EINVAL):
            undisturbed(ctx.uffd, partial(unmap, bad))
    expect_served(ctx, ctx.dst.page(0))


SEALED = Defect(
    id="D-EV-13",
    summary="munmap of registered and then of sealed memory fails with EPERM and unmaps nothing, yet announces "
    "UFFD_EVENT_UNMAP for the whole range",
    kernels="6.12.117, 6.18.44, 7.3.4",
    advice="Do not seal mappings beside registered ones; else look into /proc/PID/maps when UFFD_EVENT_UNMAP comes.",
    shows=r"events of a munmap that failed: expected \[\], got \[Unmapped\([^\[]*\]",
)


def unmap_sealed(ctx: Context) -> tuple[list[Message], Message]:
    """Unmap a registered page and a sealed one, which must fail; return what was announced, and of success would be."""
    where = Range(map_memory(2 * PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS), 2 * PAGE_SIZE)
    page = Range(where.start, PAGE_SIZE)
    try:
        syscalls.call("mseal", page.end, PAGE_SIZE, 0)
    except KernelError as error:
        raise Skip(f"mseal(2) (Linux 6.10): {error}") from None
    ctx.uffd.register(page, MISSING)
    with recorder(ctx, ctx.uffd) as reader, fails(EPERM):
        unmap(where)
    expect_modes(where, MISSING, UNREGISTERED)
    expect_served(ctx, page)
    return reader.messages, unmapped(where)


@uffd_case("unmap-sealed", mem=(ANON,), features=UNMAP, pages=1, rows=("EV-13",), defect=SEALED)
def test_unmap_sealed(ctx: Context) -> None:
    """A munmap that fails because part of the range is sealed announces nothing."""
    messages, _ = unmap_sealed(ctx)
    expect(messages, [], "EV-13: events of a munmap that failed")


@uffd_case("unmap-sealed-or-not", mem=(ANON,), features=UNMAP, pages=1, rows=("EV-13",), kind=Kind.DETAIL)
def test_unmap_sealed_or_not(ctx: Context) -> None:
    """A munmap that fails because part of the range is sealed leaves all mapped and registered, and fills go on."""
    messages, message = unmap_sealed(ctx)
    expect(messages, [message] if messages else [], "EV-13: events of a munmap that failed")
