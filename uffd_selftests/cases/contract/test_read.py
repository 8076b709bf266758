# SPDX-License-Identifier: GPL-2.0-only
"""read(2): which messages come, in which order, what they look like, and when a read waits."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from errno import EAGAIN, EFAULT, EINTR, EINVAL, EOPNOTSUPP
from functools import partial
from signal import SIGUSR1

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, DEADLINE, DEFAULT_FLAGS, HUGETLB, IORING_OP_READ, IOSQE_ASYNC, MESSAGE_SIZE, MINOR, MISSING, PAGE_SIZE,
    SHMEM, WP, Advice, Channel, Child, Context, Event, Fault, Feature, Forked, IoUring, PagefaultFlag, Removed, Uffd,
    Waiter, advise, errno_name, eventually, expect, expect_bytes, fails, faulting, handled, parse_message, peek, poke,
    promise, remap, syscalls, unmap,
)  # fmt: skip

BLOCKING = DEFAULT_FLAGS & ~os.O_NONBLOCK
REMOVE = Feature.EVENT_REMOVE
RWF_NOWAIT = 8

_CANARY = 0xA5


def read_raw(uffd: Uffd, length: int) -> bytes:
    """read(2) of ``length`` bytes; what follows the bytes read, in the buffer and behind it, must be left alone."""
    buffer = ctypes.create_string_buffer(bytes([_CANARY]) * (length + MESSAGE_SIZE), length + MESSAGE_SIZE)
    count = syscalls.read_into(uffd.fd, ctypes.addressof(buffer), length)
    rest = buffer.raw[count:]
    if rest.strip(bytes([_CANARY])):
        raise AssertionError(f"read of {length} bytes returned {count} and wrote more: {rest.hex()}")
    return buffer.raw[:count]


@contextmanager
def faults(ctx: Context, *numbers: int, uffd: Uffd | None = None) -> Iterator[list[Fault]]:
    """Have a thread fault at each of these pages, in this order; yields the messages, which the block may read.

    At the end of the block the pages are filled and the threads end.
    """
    uffd = uffd or ctx.uffd
    messages: list[Fault] = []
    with ExitStack() as stack:
        for number in numbers:
            address = ctx.dst.page(number).start
            stack.enter_context(Waiter(partial(peek, address)))
            messages.append(Fault(address, PagefaultFlag(0)))
            eventually(lambda: uffd.fdinfo.total == len(messages), f"{len(messages)} threads asleep in a fault")
        yield messages
        for message in messages:
            uffd.copy(message.address, ctx.src.start, ctx.page_size)


# ---- how much ------------------------------------------------------------------------------------------------------


@uffd_case("read-before-api", rows=("RD-01",))
def test_read_before_api() -> None:
    """A userfaultfd cannot be read before UFFDIO_API, whatever the size."""
    for flags in (DEFAULT_FLAGS, BLOCKING):
        with Uffd.create(flags) as uffd:
            for length in (0, 1, 31, 32, 33, 64, 4096):
                with promise("RD-01", f"{length} bytes, flags {flags:#x}"), fails(EINVAL):
                    read_raw(uffd, length)


@uffd_case("read-too-small", mem=(ANON,), features=REMOVE, pages=2, rows=("RD-02",))
def test_read_too_small(ctx: Context) -> None:
    """A read that has no room for a whole message is refused and consumes nothing."""

    def refused(when: str) -> None:
        for length in (0, 1, 31):
            with promise("RD-02", f"{length} bytes, {when}"), fails(EINVAL):
                read_raw(ctx.uffd, length)

    refused("nothing pending")
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start, read=False):
        refused("a fault pending")
        ctx.uffd.wait_fault(ctx.dst.start)
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE)
    with Waiter(lambda: advise(ctx.dst.range, Advice.DONTNEED)) as waiter:
        waiter.expect_in_event()
        refused("an event pending")
        expect(ctx.uffd.wait(), Removed(ctx.dst.start, ctx.dst.range.end), "the event")


@uffd_case("read-too-small-blocking", rows=("RD-02",))
def test_read_too_small_blocking() -> None:
    """A read that has no room for a whole message is refused at once even where reads wait."""
    with Uffd.open(flags=BLOCKING) as uffd:
        for length in (0, 1, 31):
            with promise("RD-02", f"{length} bytes"), fails(EINVAL):
                read_raw(uffd, length)


@uffd_case("read-empty", mem=(ANON,), pages=1, rows=("RD-03",))
def test_read_empty(ctx: Context) -> None:
    """With O_NONBLOCK and nothing to read a read says EAGAIN, whatever its buffer."""
    for what, address in {"NULL": 0, "inaccessible": ctx.src.range.end, "good": ctx.src.start}.items():
        for length in (32, 64):
            with promise("RD-03", f"{what} buffer, {length} bytes"), fails(EAGAIN):
                syscalls.read_into(ctx.uffd.fd, address, length)


@uffd_case("read-nonblock-later", rows=("RD-03", "RD-07"))
def test_read_nonblock_later() -> None:
    """O_NONBLOCK set by fcntl(2) counts as one set at creation."""
    with Uffd.open(flags=BLOCKING) as uffd:
        fcntl.fcntl(uffd.fd, fcntl.F_SETFL, os.O_NONBLOCK)
        with fails(EAGAIN):
            read_raw(uffd, MESSAGE_SIZE)


@uffd_case("read-count", mem=(ANON,), pages=3, rows=("RD-04",))
def test_read_count(ctx: Context) -> None:
    """A read returns as many whole messages as are there and fit, and touches nothing behind them."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faults(ctx, 0, 1, 2) as messages:
        for room in (1, 2, 3, 4, 5):
            for extra in (0, 1, 31):
                with promise("RD-04", f"{room} messages and {extra} bytes"):
                    raw = read_raw(ctx.uffd, room * MESSAGE_SIZE + extra)
                    expect(len(raw), min(room, 3) * MESSAGE_SIZE, "bytes read of three messages")
                    expect(ctx.uffd.fdinfo[:2], (3 - min(room, 3), 3), "pending and total faults")
                    read = {parse_message(raw[at : at + MESSAGE_SIZE]) for at in range(0, len(raw), MESSAGE_SIZE)}
                    expect(len(read & set(messages)), min(room, 3), "different messages among those read")
                ctx.uffd.wake(ctx.dst.range)
                eventually(lambda: ctx.uffd.fdinfo.pending == 3, "three faults again")


@uffd_case("read-many", mem=(ANON,), pages=40, rows=("RD-04",))
def test_read_many(ctx: Context) -> None:
    """One read returns all messages that are there, if they fit, and they are many."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faults(ctx, *range(40)) as messages:
        expect(ctx.uffd.read(len(messages)), messages, "the messages of one read")


# ---- in which order ------------------------------------------------------------------------------------------------


@uffd_case("read-fifo", mem=ALL, pages=4, rows=("RD-05",), kind=Kind.DETAIL)
def test_read_fifo(ctx: Context) -> None:
    """Page faults are read in the order in which they happened."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faults(ctx, 2, 0, 3, 1) as messages:
        expect(ctx.uffd.read(), messages[:1], "the first message")
        expect(ctx.uffd.read(4), messages[1:], "the others")
        ctx.uffd.expect_no_message()


@uffd_case("read-faults-first", mem=(ANON,), features=REMOVE, pages=4, rows=("RD-06",), kind=Kind.DETAIL)
def test_read_faults_first(ctx: Context) -> None:
    """Page faults are read before events, events in the order in which they happened."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with ExitStack() as stack:
        events, waiters = [], []
        for page in (ctx.dst.page(2), ctx.dst.page(1)):
            waiters.append(stack.enter_context(Waiter(partial(advise, page, Advice.DONTNEED))))
            waiters[-1].expect_in_event()
            events.append(Removed(page.start, page.end))
        with faults(ctx, 0) as messages:
            expect(ctx.uffd.read(4), messages + events, "messages of one read")
            for waiter in waiters:
                waiter.result()  # while an event is under way, pages cannot be filled


@uffd_case("read-once", mem=ALL, pages=2, rows=("RD-15",))
def test_read_once(ctx: Context) -> None:
    """A fault that was read is not told again while its thread waits."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faults(ctx, 0) as messages:
        expect(ctx.uffd.read(2), messages, "messages")
        ctx.uffd.expect_no_message()
        expect(ctx.uffd.fdinfo[:2], (0, 1), "pending and total faults")
    ctx.uffd.expect_no_message()


@uffd_case("read-resolved", mem=ALL, pages=2, rows=("RD-16",))
def test_read_resolved(ctx: Context) -> None:
    """A fault that is filled before its message was read leaves nothing to read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start, read=False):
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
        ctx.uffd.expect_no_message()
    ctx.uffd.expect_no_message()
    expect(ctx.uffd.fdinfo[:2], (0, 0), "pending and total faults")


@uffd_case("read-resolved-zeropage", mem=tuple(mem for mem in ALL if not mem.hugetlb), pages=2, rows=("RD-16",))
def test_read_resolved_zeropage(ctx: Context) -> None:
    """A fault that UFFDIO_ZEROPAGE fills before its message was read leaves nothing to read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start, read=False):
        ctx.uffd.zeropage(ctx.dst.page(0))
        ctx.uffd.expect_no_message()
    ctx.uffd.expect_no_message()


@uffd_case("read-resolved-unregister", mem=ALL, pages=2, rows=("RD-16",))
def test_read_resolved_unregister(ctx: Context) -> None:
    """A fault whose range is unregistered before its message was read leaves nothing to read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start, read=False):
        ctx.uffd.release(ctx.dst.range)
        ctx.uffd.expect_no_message()
    ctx.uffd.expect_no_message()


@uffd_case(
    "read-resolved-unprotect",
    mem=ALL,
    features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM,
    pages=2,
    rows=("RD-16",),
)
def test_read_resolved_unprotect(ctx: Context) -> None:
    """A fault whose page is un-protected before its message was read leaves nothing to read."""
    poke(ctx.dst.start, b"\1")
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.page(0))
    with faulting(ctx.uffd, ctx.dst.start, write=True, read=False):
        ctx.uffd.unprotect(ctx.dst.page(0))
        ctx.uffd.expect_no_message()
    ctx.uffd.expect_no_message()


@uffd_case(
    "read-resolved-continue",
    mem=(SHMEM, HUGETLB),
    features=Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS,
    pages=2,
    rows=("RD-16",),
)
def test_read_resolved_continue(ctx: Context) -> None:
    """A minor fault that is continued before its message was read leaves nothing to read."""
    ctx.uffd.register(ctx.dst.range, MINOR)
    poke(ctx.dst.alias.start, b"\1")
    with faulting(ctx.uffd, ctx.dst.start, read=False):
        ctx.uffd.continue_(ctx.dst.page(0))
        ctx.uffd.expect_no_message()
    ctx.uffd.expect_no_message()


# ---- what a message looks like -------------------------------------------------------------------------------------


@uffd_case("read-layout-fault", mem=ALL, pages=2, rows=("RD-08",))
def test_read_layout_fault(ctx: Context) -> None:
    """The message of a page fault is 32 bytes: event, flags at 8, address at 16, thread at 24, the rest zero."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start + PAGE_SIZE - 1, write=True, read=False):
        expected = struct.pack("=B7xQQI4x", Event.PAGEFAULT, PagefaultFlag.WRITE, ctx.dst.start, 0)
        expect(read_raw(ctx.uffd, MESSAGE_SIZE).hex(" ", 8), expected.hex(" ", 8), "the message")
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@uffd_case(
    "read-layout-events",
    mem=(ANON, SHMEM),
    features=Feature.EVENT_REMOVE | Feature.EVENT_REMAP | Feature.EVENT_UNMAP,
    pages=2,
    rows=("RD-08",),
)
def test_read_layout_events(ctx: Context) -> None:
    """The message of an event is 32 bytes: event, its addresses from byte 8 on, the rest zero."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    old, new = ctx.dst.range, ctx.src.range
    remove, unmapped = (struct.pack("=B7xQQ8x", event, old.start, old.end) for event in (Event.REMOVE, Event.UNMAP))
    remapped = struct.pack("=B7xQQQ", Event.REMAP, old.start, new.start, old.len)
    gone = struct.pack("=B7xQQ8x", Event.UNMAP, new.start, new.end)
    for name, call, messages in (
        ("madvise", lambda: advise(old, Advice.DONTNEED), (remove,)),
        ("mremap", lambda: remap(old, to=new.start), (remapped, unmapped)),
        ("munmap", lambda: unmap(new), (gone,)),
    ):
        with promise("RD-08", name), Waiter(call):
            for message in messages:
                expect(ctx.uffd.readable(DEADLINE), True, "readable")
                expect(read_raw(ctx.uffd, MESSAGE_SIZE).hex(" ", 8), message.hex(" ", 8), "the message")


# ---- waiting for the first -----------------------------------------------------------------------------------------


@uffd_case("read-blocking", mem=ALL, features=REMOVE, pages=3, rows=("RD-07",))
def test_read_blocking(ctx: Context) -> None:
    """A read waits until there is a message, fault or event, and then for no further one."""
    with Uffd.open(REMOVE, BLOCKING) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        with Waiter(lambda: uffd.read(4)) as reader:
            reader.expect_sleeping()
            with promise("RD-07", "a fault comes"), faults(ctx, 0, uffd=uffd) as messages:
                expect(reader.result(), messages, "messages read")
        with promise("RD-07", "faults are there"), faults(ctx, 2, 1, uffd=uffd) as messages:
            expect(uffd.read(4), messages, "messages read")
        with Waiter(lambda: uffd.read(4)) as reader:
            reader.expect_sleeping()
            with promise("RD-07", "an event comes"), Waiter(lambda: advise(ctx.dst.page(1), Advice.DONTNEED)):
                expect(reader.result(), [Removed(ctx.dst.page(1).start, ctx.dst.page(1).end)], "messages read")


@uffd_case("read-two-readers", mem=(ANON,), pages=2, rows=("RD-10",), kind=Kind.DETAIL)
def test_read_two_readers(ctx: Context) -> None:
    """Of two readers that wait, one gets the message and the other one the next."""
    with Uffd.open(flags=BLOCKING) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        with Waiter(lambda: uffd.read(2)) as one, Waiter(lambda: uffd.read(2)) as two:
            one.expect_sleeping()
            two.expect_sleeping()
            with faults(ctx, 0, uffd=uffd) as messages:
                eventually(lambda: one.done or two.done, "one of the readers to return")
                first, second = (one, two) if one.done else (two, one)
                expect(first.result(), messages, "messages of the first")
                second.expect_sleeping()
            with faults(ctx, 1, uffd=uffd) as messages:
                expect(second.result(), messages, "messages of the second")


@uffd_case("read-signal", mem=(ANON,), pages=1, rows=("RD-09",), kind=Kind.DETAIL)
def test_read_signal(ctx: Context) -> None:
    """A handled signal ends a waiting read with EINTR, or restarts it with SA_RESTART."""
    with Uffd.open(flags=BLOCKING) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        with handled(SIGUSR1), fails(EINTR), Waiter(partial(read_raw, uffd, MESSAGE_SIZE)) as reader:
            reader.expect_sleeping()
            reader.signal(SIGUSR1)
        # Not Uffd.read: Python repeats a read that a signal has ended.
        restarted = Waiter(lambda: parse_message(read_raw(uffd, MESSAGE_SIZE)))
        with handled(SIGUSR1, restart=True) as notes, restarted as reader:
            reader.expect_sleeping()
            reader.signal(SIGUSR1)
            eventually(lambda: notes == [SIGUSR1], "the handler to run")
            reader.expect_sleeping()
            with faults(ctx, 0, uffd=uffd) as messages:
                expect([reader.result()], messages, "the message of the restarted read")


# ---- bad buffers ---------------------------------------------------------------------------------------------------

EATEN = Defect(
    id="D-RD-11",
    summary="read(2) into a bad buffer fails with EFAULT, but the message is gone: it is never told again.",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="Read into memory that is there; after EFAULT wake the whole registered area, which brings new messages.",
    shows=r"after read\(2\) failed with EFAULT: expected 1, got 0",
)

SECOND_EATEN = Defect(
    id="D-RD-12",
    summary="read(2) whose buffer is bad from the second message on returns the first, but the second is gone.",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="Read into memory that is there for the whole length that is asked for.",
    shows=r"after read\(2\) returned one of two: expected 1, got 0",
)


@uffd_case("read-efault-keeps", mem=(ANON,), pages=1, rows=("RD-11",), defect=EATEN)
def test_read_efault_keeps(ctx: Context) -> None:
    """A read that fails with EFAULT consumes no message."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faults(ctx, 0):
        with fails(EFAULT):
            syscalls.read_into(ctx.uffd.fd, ctx.src.range.end, MESSAGE_SIZE)
        pending = ctx.uffd.fdinfo.pending
    expect(pending, 1, "unread faults after read(2) failed with EFAULT")


@uffd_case("read-efault", mem=(ANON,), pages=1, rows=("RD-11",), kind=Kind.DETAIL)
def test_read_efault(ctx: Context) -> None:
    """A read into a bad buffer fails with EFAULT; its message can be read again, at the latest after UFFDIO_WAKE."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for what, buffer in {"NULL": 0, "inaccessible": ctx.src.range.end, "half": ctx.src.range.end - 16}.items():
        with promise("RD-11", f"{what} buffer"), faulting(ctx.uffd, ctx.dst.start, read=False):
            with fails(EFAULT):
                syscalls.read_into(ctx.uffd.fd, buffer, MESSAGE_SIZE)
            ctx.uffd.expect_asleep(1)
            ctx.uffd.wake(ctx.dst.range)
            ctx.uffd.wait_fault(ctx.dst.start)
            ctx.uffd.expect_no_message()
            ctx.uffd.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE)
        advise(ctx.dst.range, Advice.DONTNEED)


def read_two_with_room_for_one(ctx: Context) -> None:
    """read(2) of two messages into a buffer of which only the first half is there: the first one is returned."""
    buffer = ctx.src.range.end - MESSAGE_SIZE
    expect(syscalls.read_into(ctx.uffd.fd, buffer, 2 * MESSAGE_SIZE), MESSAGE_SIZE, "bytes read")
    expect(parse_message(peek(buffer, MESSAGE_SIZE)), Fault(ctx.dst.start, PagefaultFlag(0)), "the first message")


@uffd_case("read-efault-second-keeps", mem=(ANON,), pages=2, rows=("RD-12",), defect=SECOND_EATEN)
def test_read_efault_second_keeps(ctx: Context) -> None:
    """A read consumes only the messages that it returns."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faults(ctx, 0, 1):
        read_two_with_room_for_one(ctx)
        pending = ctx.uffd.fdinfo.pending
    expect(pending, 1, "unread faults after read(2) returned one of two")


@uffd_case("read-efault-second", mem=(ANON,), pages=2, rows=("RD-12",), kind=Kind.DETAIL)
def test_read_efault_second(ctx: Context) -> None:
    """A read whose buffer is bad from the second message on returns the first; UFFDIO_WAKE brings the second back."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faults(ctx, 0, 1) as messages:
        read_two_with_room_for_one(ctx)
        ctx.uffd.expect_asleep(2)
        ctx.uffd.wake(ctx.dst.page(1))
        expect(ctx.uffd.wait(), messages[1], "the second message")
        ctx.uffd.expect_no_message()


# ---- other ways to read --------------------------------------------------------------------------------------------


def read_vector(name: str, uffd: Uffd, size: int, count: int, *arguments: int) -> bytes:
    """readv(2) or preadv2(2) into ``count`` segments of ``size`` bytes, with a gap behind each."""
    buffer = ctypes.create_string_buffer(bytes([_CANARY]) * 2 * size * count, 2 * size * count)
    segments = [(ctypes.addressof(buffer) + 2 * size * i, size) for i in range(count)]
    vector = (ctypes.c_uint64 * (2 * count))(*itertools.chain(*segments))
    done = syscalls.call(name, uffd.fd, ctypes.addressof(vector), count, *arguments)
    parts = [buffer.raw[2 * size * i : 2 * size * (i + 1)] for i in range(count)]
    expect([part[size:] for part in parts], [bytes([_CANARY]) * size] * count, "bytes between the segments")
    return b"".join(part[:size] for part in parts)[:done]


def read_without_waiting(uffd: Uffd) -> bytes:
    """preadv2(2) with RWF_NOWAIT at the current position."""
    return read_vector("preadv2", uffd, MESSAGE_SIZE, 1, -1, -1, RWF_NOWAIT)


@uffd_case("read-vector", mem=(ANON,), pages=2, rows=("RD-13", "RD-14"), kind=Kind.VERSION)
def test_read_vector(ctx: Context) -> None:
    """A message is split over the segments of readv(2), and RWF_NOWAIT never waits; before Linux 6.10 neither works."""
    with Uffd.open(flags=BLOCKING) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        try:
            with promise("RD-14", "nothing pending"), fails(EAGAIN):
                read_without_waiting(uffd)
            supported = True
        except AssertionError:
            with promise("RD-14", "before Linux 6.10"), fails(EOPNOTSUPP):
                read_without_waiting(uffd)
            supported = False
        with faults(ctx, 0, 1, uffd=uffd) as messages:
            if supported:
                with promise("RD-13"):
                    expect(parse_message(read_vector("readv", uffd, 16, 2)), messages[0], "readv(2) of two halves")
                with promise("RD-14", "a fault pending"):
                    expect(parse_message(read_without_waiting(uffd)), messages[1], "the message")
            else:
                with promise("RD-13", "before Linux 6.10"), fails(EINVAL):
                    read_vector("readv", uffd, 16, 2)
                expect(uffd.read(2), messages, "messages, still there")


@uffd_case("read-dup", mem=(ANON,), pages=2, rows=("RD-18",))
def test_read_dup(ctx: Context) -> None:
    """A duplicate of the descriptor reads from the same queue."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with Uffd(os.dup(ctx.uffd.fd)) as duplicate, faults(ctx, 0, 1) as messages:
        expect(duplicate.read(), messages[:1], "the message read from the duplicate")
        expect(ctx.uffd.read(2), messages[1:], "the message read from the original")
        duplicate.expect_no_message()


@uffd_case("read-other-process", mem=(ANON,), pages=2, rows=("RD-18",))
def test_read_other_process(ctx: Context) -> None:
    """Another process that has the descriptor reads from the same queue."""
    uffd = ctx.uffd

    def monitor(channel: Channel) -> None:
        while channel.receive():
            channel.send(uffd.read())

    with Child(monitor) as child:
        uffd.register(ctx.dst.range, MISSING)
        with faults(ctx, 0, 1) as messages:
            child.send(True)
            expect(child.receive(), messages[:1], "the message read in the other process")
            expect(uffd.read(2), messages[1:], "the message read here")
            child.send(True)
            expect(child.receive(), [], "messages left for the other process")
        child.send(False)


@uffd_case("read-fork-elsewhere", mem=(ANON,), features=Feature.EVENT_FORK, pages=1, rows=("RD-18",))
def test_read_fork_elsewhere(ctx: Context) -> None:
    """The descriptor of a fork event lands in the process that reads it, and nowhere else."""
    uffd, address, source = ctx.uffd, ctx.dst.start, ctx.src.start

    def monitor(channel: Channel) -> None:
        before = userfaultfds()
        channel.send()
        message = uffd.wait("UFFD_EVENT_FORK")
        assert isinstance(message, Forked), f"expected UFFD_EVENT_FORK, got {message}"
        expect(userfaultfds() - before, {message.ufd}, "descriptors that the reader got")
        with Uffd(message.ufd) as child:
            child.wait_fault(address)
            child.copy(address, source, PAGE_SIZE)

    with Child(monitor) as reader:
        uffd.register(ctx.dst.range, MISSING)
        reader.receive()
        before = userfaultfds()
        with Child(lambda _: expect_bytes(ctx.dst.range, 0)):
            pass
        expect(userfaultfds(), before, "descriptors of the process that forked")


def userfaultfds() -> set[int]:
    """Return the descriptors of this process that are userfaultfds."""
    links = {fd: f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")}
    return {int(fd) for fd, link in links.items() if os.path.lexists(link) and "[userfaultfd]" in os.readlink(link)}


# ---- io_uring ------------------------------------------------------------------------------------------------------

INTERRUPTED = Defect(
    id="D-RD-17",
    summary="IORING_OP_READ of a userfaultfd without O_NONBLOCK completes at once with -EINTR, or with the "
    "kernel's own -ERESTARTSYS.",
    kernels="6.12.117, 6.18.44, 7.3.4; with -ERESTARTSYS (512) 6.16.12, 6.17.13, 6.18.15; not 6.1.192",
    advice="Give the descriptor O_NONBLOCK, or the request IOSQE_ASYNC.",
    shows=r"result of the request: expected 32, got -(EINTR|512)",
)


def read_by_io_uring(ctx: Context, flags: int, sqe_flags: int = 0) -> None:
    """Submit a read when nothing is pending; it must complete with the fault that comes then."""
    buffer = ctypes.create_string_buffer(2 * MESSAGE_SIZE)
    with IoUring() as ring, Uffd.open(flags=flags) as uffd:
        uffd.register(ctx.dst.range, MISSING)
        ring.submit(IORING_OP_READ, uffd.fd, ctypes.addressof(buffer), len(buffer), flags=sqe_flags)
        with faults(ctx, 0, uffd=uffd) as messages:
            result = ring.complete()
    expect(errno_name(result) if result < 0 else result, MESSAGE_SIZE, "result of the request")
    expect(parse_message(buffer.raw[:MESSAGE_SIZE]), messages[0], "the message")


@uffd_case("read-iouring-blocking", mem=(ANON,), pages=1, rows=("RD-17",), defect=INTERRUPTED)
def test_read_iouring_blocking(ctx: Context) -> None:
    """A read by io_uring waits for a message."""
    read_by_io_uring(ctx, BLOCKING)


@uffd_case("read-iouring-nonblock", mem=(ANON,), pages=1, rows=("RD-17",), kind=Kind.DETAIL)
def test_read_iouring_nonblock(ctx: Context) -> None:
    """A read by io_uring waits for a message on a descriptor with O_NONBLOCK too."""
    read_by_io_uring(ctx, DEFAULT_FLAGS)


@uffd_case("read-iouring-async", mem=(ANON,), pages=1, rows=("RD-17",), kind=Kind.DETAIL)
def test_read_iouring_async(ctx: Context) -> None:
    """A read by io_uring with IOSQE_ASYNC waits for a message on a descriptor without O_NONBLOCK."""
    read_by_io_uring(ctx, BLOCKING, IOSQE_ASYNC)
