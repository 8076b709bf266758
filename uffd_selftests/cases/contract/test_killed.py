# SPDX-License-Identifier: GPL-2.0-only
"""SIGKILL of a caller in the middle of a request that fills or moves many pages."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EEXIST, EINTR
from functools import partial
from io import FileIO
from signal import SIGKILL

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ANON, FILLED, HUGETLB, HUGETLB_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MINOR, MINOR_FAULTS,
    MISSING, PAGE_SIZE, PROT_READ, SHMEM, SHMEM_PRIVATE, UNTOUCHED, Advice, Channel, Child, Context, Feature, Pagemap,
    Range, Skip, Uffd, Waiter, advise, errno_name, eventually, expect, keep_small, long_fill, mapped, peek, poised,
    poke, protect, settle, touch, uapi,
)  # fmt: skip

TRIES = 20
MANY = 65536
"""Pages that take no memory each: with fewer the request would be over before it can be interrupted."""


def _filled(pagemap: FileIO, address: int) -> bool:
    raw = os.pread(pagemap.fileno(), 8, address // PAGE_SIZE * 8)  # empty when the process has come to its end
    return not raw or bool(int.from_bytes(raw, sys.byteorder) & FILLED)


def killed_request(
    uffd: Uffd, request: int, arg: ctypes.Structure, where: Range, prepare: Callable[[], Uffd] | None = None
) -> int:
    """Have a child make a request and kill it when the first page of the range is there; return the output field.

    That must be the argument's last word. A child that has a handle of its own to ``prepare`` works on its own memory.
    """
    with mapped(PAGE_SIZE, flags=MAP_SHARED | MAP_ANONYMOUS) as shared:
        poke(shared.start, bytes(arg))

        def caller(_: Channel) -> None:
            (prepare() if prepare else uffd).raw_ioctl(request, shared.start)

        with Child(caller) as child:
            path = f"/proc/{child.pid}/pagemap" if prepare else "/proc/self/pagemap"
            with open(path, "rb", buffering=0) as pagemap:
                eventually(lambda: child.ended or _filled(pagemap, where.start), "the first page to be there")
            child.kill()
        (output,) = struct.unpack("=q", peek(shared.start + ctypes.sizeof(arg) - 8, 8))
        return int(output)


def expect_killed(uffd: Uffd, request: int, arg: ctypes.Structure, where: Range, unit: int) -> None:
    """Assert that SIGKILL ends a request between two pages, and that its output field counts those that are done."""
    for _ in range(TRIES):
        output = killed_request(uffd, request, arg, where)
        done = output // unit
        expect(output % unit, 0, "output field, modulo the page size")
        Pagemap.expect_first(where, done, f"when the output is {output}", unit)
        if output < where.len:
            return
        advise(where, Advice.DONTNEED)
    raise AssertionError(f"SIGKILL did not end any of {TRIES} requests before the last page")


@uffd_case("copy-killed", mem=(ANON,), pages=16384, rows=("CP-51",), kind=Kind.DETAIL, smp=True)
def test_copy_killed(ctx: Context) -> None:
    """A copier that is killed leaves the pages that it has filled, and their number in the output field."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    arg = uapi.uffdio_copy(ctx.dst.start, ctx.src.start, ctx.dst.range.len, 0, UNTOUCHED)
    expect_killed(ctx.uffd, uapi.UFFDIO_COPY, arg, ctx.dst.range, ctx.page_size)


@uffd_case("copy-killed-huge", mem=(HUGETLB,), pages=8, spare_hugepages=1, rows=("CP-51",), kind=Kind.DETAIL, smp=True)
def test_copy_killed_huge(ctx: Context) -> None:
    """The same with huge pages: none is filled after the kill."""
    for _ in range(TRIES):
        ctx.uffd.register(ctx.dst.range, MISSING)
        arg = uapi.uffdio_copy(ctx.dst.start, ctx.src.start, ctx.dst.range.len, 0, UNTOUCHED)
        output = killed_request(ctx.uffd, uapi.UFFDIO_COPY, arg, ctx.dst.range)
        Pagemap.expect_present(ctx.dst, *range(output // ctx.page_size))
        if output < ctx.dst.range.len:
            return
        ctx.uffd.unregister(ctx.dst.range)
        ctx.dst.release()
    raise AssertionError(f"SIGKILL did not end any of {TRIES} copies before its last page")


@uffd_case("zeropage-killed", mem=(ANON,), pages=1, rows=("CP-51",), kind=Kind.DETAIL, smp=True)
def test_zeropage_killed(ctx: Context) -> None:
    """A process that is killed in UFFDIO_ZEROPAGE leaves the pages that it has filled, and their number."""
    with mapped(MANY * PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE) as where:
        ctx.uffd.register(where, MISSING)
        arg = uapi.uffdio_zeropage(uapi.uffdio_range(where.start, where.len), 0, UNTOUCHED)
        expect_killed(ctx.uffd, uapi.UFFDIO_ZEROPAGE, arg, where, PAGE_SIZE)


@uffd_case("poison-killed", mem=(ANON,), features=Feature.POISON, pages=1, rows=("CP-51",), kind=Kind.DETAIL, smp=True)
def test_poison_killed(ctx: Context) -> None:
    """A process that is killed in UFFDIO_POISON leaves the pages that it has poisoned, and their number."""
    with mapped(MANY * PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE) as where:
        ctx.uffd.register(where, MISSING)
        arg = uapi.uffdio_poison(uapi.uffdio_range(where.start, where.len), 0, UNTOUCHED)
        expect_killed(ctx.uffd, uapi.UFFDIO_POISON, arg, where, PAGE_SIZE)


@uffd_case(
    "continue-killed",
    mem=(SHMEM, SHMEM_PRIVATE),
    features=MINOR_FAULTS,
    pages=16384,
    rows=("CP-51",),
    kind=Kind.DETAIL,
    smp=True,
)
def test_continue_killed(ctx: Context) -> None:
    """A process that is killed in UFFDIO_CONTINUE leaves the pages that it has mapped, and their number."""
    with ctx.dst.file_view() as where:
        ctx.dst.pattern.fill(where.start, 0, ctx.nr_pages)
    ctx.uffd.register(ctx.dst.range, MINOR)
    arg = uapi.uffdio_continue(uapi.uffdio_range(ctx.dst.start, ctx.dst.range.len), 0, UNTOUCHED)
    expect_killed(ctx.uffd, uapi.UFFDIO_CONTINUE, arg, ctx.dst.range, ctx.page_size)


@uffd_case("move-killed", mem=(ANON,), features=Feature.MOVE, pages=1, rows=("CP-51",), kind=Kind.DETAIL, smp=True)
def test_move_killed(ctx: Context) -> None:
    """A process that is killed in UFFDIO_MOVE moves no page any more: the output field counts those that it had.

    Pages of zeroes are moved: they take no memory, and one by one, so long enough to be interrupted.
    """
    length, flags = MANY * PAGE_SIZE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    with mapped(length, flags=flags) as src, mapped(length, flags=flags) as dst:
        keep_small(src)

        def prepare() -> Uffd:
            touch(src, PAGE_SIZE)
            uffd = Uffd.open()
            uffd.register(dst, MISSING)
            return uffd

        arg = uapi.uffdio_move(dst.start, src.start, length, 0, UNTOUCHED)
        for _ in range(TRIES):
            output = killed_request(ctx.uffd, uapi.UFFDIO_MOVE, arg, dst, prepare)
            if output == -EINTR:
                return
            if output < 0:
                raise AssertionError(f"expected a count of pages, or -EINTR; got {errno_name(output)}")
            expect(output % PAGE_SIZE, 0, "output field, modulo the page size")
            if output < length:
                return
    raise AssertionError(f"SIGKILL did not end any of {TRIES} moves before its last page")


# ---- killed before it could begin ----------------------------------------------------------------------------------


@contextmanager
def address_space_busy(uffd: Uffd) -> Iterator[None]:
    """Keep the lock of the address space taken: a thread changes a mapping in which another one fills many pages."""
    with long_fill(uffd) as where, Waiter(lambda: protect(where, PROT_READ)) as changing:
        settle(changing)
        yield


def killed_waiting(prepare: Callable[[Uffd], tuple[int, ctypes.Structure]]) -> int | None:
    """Kill a process whose request waits for the lock of its address space; return the output field.

    ``prepare`` returns the request and its argument, whose last word that is. What waits for a lock cannot be
    interrupted: the request is made, by a process that is dead already. None stands for one that did not wait.
    """
    with mapped(PAGE_SIZE, flags=MAP_SHARED | MAP_ANONYMOUS) as shared:
        flag = shared.end - 1

        def caller(channel: Channel) -> None:
            uffd = Uffd.open()
            request, arg = prepare(uffd)
            poke(shared.start, bytes(arg))
            channel.send(ctypes.sizeof(arg))
            call = partial(uffd.raw_ioctl, request, shared.start)
            with poised(call) as (go, [waiter]), address_space_busy(uffd):
                go()
                poke(flag, b"\1" if waiter.asleep else b"\0")
                os.kill(os.getpid(), SIGKILL)

        with Child(caller) as child:
            size = child.receive()
            eventually(lambda: child.ended, "the child process to be killed")
            child.kill()
        (output,) = struct.unpack("=q", peek(shared.start + size - 8, 8))
        return int(output) if peek(flag) == b"\1" else None


def expect_one(attempt: Callable[[], int | None], wanted: int, all_of_it: int) -> None:
    """Assert what a killed request has put into its output field; a few may be over just before the kill."""
    outputs = set()
    for _ in range(TRIES):
        output = attempt()
        outputs.add(output)
        if output not in (None, all_of_it):
            expect(errno_name(output or 0), errno_name(wanted), "output field of the request of a killed process")
            return
    if outputs == {None}:
        raise Skip(f"none of {TRIES} requests had to wait: is the machine busy?")
    raise AssertionError(f"SIGKILL did not end any of {TRIES} requests before the last page")


@uffd_case(
    "fills-killed-waiting",
    mem=(HUGETLB_PRIVATE,),
    variants=("poison", "continue"),
    features=MINOR_FAULTS | Feature.POISON,
    pages=2,
    rows=("CP-51",),
    kind=Kind.DETAIL,
)
def test_fills_killed_waiting(ctx: Context, variant: str) -> None:
    """A process that is killed while its request for two huge pages waits to begin fills one of them, and no more."""
    dst = ctx.dst.range
    if variant == "continue":
        with ctx.dst.file_view() as where:
            ctx.dst.pattern.fill(where.start, 0, ctx.nr_pages)

    def prepare(uffd: Uffd) -> tuple[int, ctypes.Structure]:
        uffd.register(dst, MINOR if variant == "continue" else MISSING)
        some = uapi.uffdio_range(dst.start, dst.len)
        if variant == "continue":
            return uapi.UFFDIO_CONTINUE, uapi.uffdio_continue(some, 0, UNTOUCHED)
        return uapi.UFFDIO_POISON, uapi.uffdio_poison(some, 0, UNTOUCHED)

    expect_one(lambda: killed_waiting(prepare), ctx.page_size, dst.len)


@uffd_case(
    "move-killed-waiting",
    mem=(ANON,),
    variants=("free", "taken"),
    features=Feature.MOVE,
    pages=2,
    rows=("CP-51", "MV-03"),
    kind=Kind.DETAIL,
)
def test_move_killed_waiting(ctx: Context, variant: str) -> None:
    """UFFDIO_MOVE likewise says EINTR, but where its first page cannot be moved anyway it says why: EEXIST."""
    src, dst = ctx.src, ctx.dst

    def prepare(uffd: Uffd) -> tuple[int, ctypes.Structure]:
        src.fill()
        if variant == "taken":
            touch(dst.page(0), PAGE_SIZE)  # by the page of zeroes
        uffd.register(dst.range, MISSING)
        return uapi.UFFDIO_MOVE, uapi.uffdio_move(dst.start, src.start, dst.range.len, 0, UNTOUCHED)

    expect_one(lambda: killed_waiting(prepare), -EEXIST if variant == "taken" else -EINTR, dst.range.len)
