# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's own accesses to memory, for system calls: each way that one can take, told and served like any fault.

A call copies in small steps, looks pages up to reach their frames, holds them for a device, or changes a word at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ETIMEDOUT
from functools import partial

from uffd_selftests.abi import syscalls
from uffd_selftests.abi.errors import KernelError
from uffd_selftests.abi.uapi import PagefaultFlag
from uffd_selftests.machine.swap import Swap
from uffd_selftests.mem_types import Area
from uffd_selftests.toolkit.access import peek, poke
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import Skip, expect, promise
from uffd_selftests.toolkit.faulting import faulting, undisturbed
from uffd_selftests.toolkit.folios import Protection
from uffd_selftests.toolkit.handle import KERNEL_FAULTS, Uffd
from uffd_selftests.toolkit.iouring import IORING_OP_READ, IORING_OP_WRITE, IOSQE_ASYNC, IoUring
from uffd_selftests.toolkit.memory import PAGE_SIZE, Range
from uffd_selftests.toolkit.pagemap import Pagemap

__all__ = [
    "KernelAccess",
    "KERNEL_ACCESSES",
    "FUTEX_CHANGE",
    "prepared",
    "expect_told",
    "expect_untold",
    "expect_calls_trapped",
    "direct_disk",
    "direct_accesses",
]

STORED = b"\xa5kernel\x5a"
"""What a call writes to memory, to be found there."""
SPAN = len(STORED)
"""Bytes that a call reads or writes."""


@dataclass(frozen=True)
class KernelAccess:
    """A system call that reaches for memory at an address."""

    name: str
    call: Callable[[int], bytes]
    """Makes it, with the address; returns what it has read there."""
    writes: bool = False
    """Whether its fault is told as a write."""
    stores: bytes = b""
    """What it leaves there."""
    crosses: bool = False
    """Whether the bytes may lie on two pages; else they are a word, or a struct, of one page."""
    length: int = SPAN
    """How many bytes."""
    wants: bytes = b""
    """What has to be there before."""

    def address(self, area: Area, *pages: int) -> int:
        """Where to make the access: at the start of the one page, or where the first of two ends."""
        first = area.page(pages[0])
        return first.end - SPAN // 2 if len(pages) == 2 else first.start

    def pages(self, *pages: int) -> list[tuple[int, ...]]:
        """Each of two neighbouring pages by itself, then, if it can be, both at a time."""
        return [(page,) for page in pages] + ([pages] if self.crosses else [])


@contextmanager
def _file(data: bytes = b"") -> Iterator[int]:
    fd = os.memfd_create("kernelside", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, data, 0)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _pipe(data: bytes = b"") -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(ends[1], data)
        yield ends
    finally:
        for fd in ends:
            os.close(fd)


def _write(address: int) -> bytes:
    with _file() as fd:
        count = syscalls.write_from(fd, address, SPAN)
        return os.pread(fd, count + 1, 0)


def _read(address: int) -> bytes:
    with _file(STORED) as fd:
        expect(syscalls.read_into(fd, address, SPAN), SPAN, "result of read(2)")
    return b""


def _vm_write(address: int) -> bytes:
    expect(syscalls.process_vm_writev(os.getpid(), address, STORED), SPAN, "result of process_vm_writev(2)")
    return b""


def _splice(fd: int, address: int) -> int:
    vector = (ctypes.c_uint64 * 2)(address, SPAN)
    return syscalls.call("vmsplice", fd, ctypes.addressof(vector), 1, 0)


def _splice_out(address: int) -> bytes:
    with _pipe() as (out, into):
        return os.read(out, _splice(into, address))


def _splice_in(address: int) -> bytes:
    with _pipe(STORED) as (out, _):
        expect(_splice(out, address), SPAN, "result of vmsplice(2)")
    return b""


def _ring_write(address: int, flags: int = 0) -> bytes:
    with _file() as fd, IoUring() as ring:
        ring.submit(IORING_OP_WRITE, fd, address, SPAN, offset=0, flags=flags)
        return os.pread(fd, max(ring.complete(), 0) + 1, 0)


def _ring_read(address: int, flags: int = 0) -> bytes:
    with _file(STORED) as fd, IoUring() as ring:
        ring.submit(IORING_OP_READ, fd, address, SPAN, offset=0, flags=flags)
        expect(ring.complete(), SPAN, "result of the io_uring request")
    return b""


def _ring_pin(address: int) -> bytes:
    with IoUring() as ring:
        ring.register_buffer(Range(address, SPAN))
        ring.unregister_buffer()
    return b""


_FUTEX_WAIT, _FUTEX_WAKE, _FUTEX_WAKE_OP, _FUTEX_PRIVATE = 0, 1, 5, 128
_FUTEX_NEW = 0x5A5
"""Twelve bits at most: FUTEX_OP_SET has no more."""
_FUTEX_WORD = struct.pack("=I", _FUTEX_NEW)


def _futex_wait(address: int) -> bytes:
    """Wait for no time at all, which the kernel comes to only if the word is the one told."""
    timeout = (ctypes.c_int64 * 2)(0, 0)
    try:
        syscalls.call("futex", address, _FUTEX_WAIT | _FUTEX_PRIVATE, _FUTEX_NEW, ctypes.addressof(timeout))
    except KernelError as error:
        if error.errno != ETIMEDOUT:
            raise
    return _FUTEX_WORD


def _futex_wake(address: int) -> bytes:
    expect(syscalls.call("futex", address, _FUTEX_WAKE, 1), 0, "threads that were woken")
    return b""


def _futex_change(address: int) -> bytes:
    """Have the kernel change the word: FUTEX_OP_SET, compared with FUTEX_OP_CMP_EQ."""
    other = ctypes.c_uint32(0)
    where = (ctypes.addressof(other), _FUTEX_WAKE_OP | _FUTEX_PRIVATE, 0, 0)
    expect(syscalls.call("futex", *where, address, _FUTEX_NEW << 12), 0, "threads that were woken")
    return b""


_SIGNAL = signal.SIGUSR2
_ACTION = 32
"""Bytes of struct sigaction as the kernel has it."""


def _new_action(address: int) -> bytes:
    """Take a struct sigaction from there, which nobody uses, and put the old one back."""
    old, new = (ctypes.create_string_buffer(64) for _ in range(2))
    syscalls.call("rt_sigaction", _SIGNAL, address, ctypes.addressof(old), 8)
    syscalls.call("rt_sigaction", _SIGNAL, ctypes.addressof(old), ctypes.addressof(new), 8)
    return new.raw[:SPAN]


def _old_action(address: int) -> bytes:
    """Have a struct sigaction written there that begins with SIG_IGN."""
    ignore, old = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    struct.pack_into("=Q", ignore, 0, 1)
    syscalls.call("rt_sigaction", _SIGNAL, ctypes.addressof(ignore), ctypes.addressof(old), 8)
    try:
        syscalls.call("rt_sigaction", _SIGNAL, 0, address, 8)
    finally:
        syscalls.call("rt_sigaction", _SIGNAL, ctypes.addressof(old), 0, 8)
    return b""


FUTEX_CHANGE = KernelAccess("FUTEX_WAKE_OP", _futex_change, writes=True, stores=_FUTEX_WORD, length=4)
"""The kernel changes a word as an atomic instruction would; it has a way of its own to a page that it cannot reach."""

KERNEL_ACCESSES: dict[str, tuple[KernelAccess, ...]] = {
    "copies": (
        KernelAccess("write(2)", _write, crosses=True),
        KernelAccess("read(2)", _read, writes=True, stores=STORED, crosses=True),
        KernelAccess("vmsplice(2) from a pipe", _splice_in, writes=True, stores=STORED, crosses=True),
    ),
    "look-ups": (
        KernelAccess(
            "process_vm_readv(2)", lambda address: syscalls.process_vm_readv(os.getpid(), address, SPAN), crosses=True
        ),
        KernelAccess("process_vm_writev(2)", _vm_write, writes=True, stores=STORED, crosses=True),
        KernelAccess("vmsplice(2) to a pipe", _splice_out, crosses=True),
    ),
    "io_uring": (
        KernelAccess("IORING_OP_WRITE", _ring_write, crosses=True),
        KernelAccess("IORING_OP_READ", _ring_read, writes=True, stores=STORED, crosses=True),
        KernelAccess("IORING_OP_WRITE by a worker", partial(_ring_write, flags=IOSQE_ASYNC), crosses=True),
        KernelAccess(
            "IORING_OP_READ by a worker",
            partial(_ring_read, flags=IOSQE_ASYNC),
            writes=True,
            stores=STORED,
            crosses=True,
        ),
        KernelAccess("IORING_REGISTER_BUFFERS", _ring_pin, writes=True, crosses=True),
    ),
    "words": (
        KernelAccess("FUTEX_WAIT", _futex_wait, length=4, wants=_FUTEX_WORD),
        KernelAccess("FUTEX_WAKE, shared", _futex_wake, writes=True, length=4),
        KernelAccess("rt_sigaction(2), the new one", _new_action),
        KernelAccess(
            "rt_sigaction(2), the old one", _old_action, writes=True, stores=struct.pack("=Q", 1), length=_ACTION
        ),
    ),
}
"""The accesses, by their kind."""

_DISK = 4 << 20


@contextmanager
def direct_disk() -> Iterator[int]:
    """Have a disk of the case's own, opened with O_DIRECT; Skip where none can be had."""
    try:
        swap = Swap(_DISK, own=True)
        swap.__enter__()
    except OSError as error:
        raise Skip(f"no disk of its own to be had, which takes root and zram: {error}") from None
    try:
        swap.off()
        fd = os.open(swap.device, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        swap.__exit__(None, None, None)


def direct_accesses(fd: int) -> tuple[KernelAccess, ...]:
    """O_DIRECT reads and writes of a base page; what is read from the disk begins with STORED."""
    stored = STORED * (PAGE_SIZE // SPAN)

    def write(address: int) -> bytes:
        os.lseek(fd, PAGE_SIZE, os.SEEK_SET)
        expect(syscalls.write_from(fd, address, PAGE_SIZE), PAGE_SIZE, "result of write(2)")
        with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as disk:
            return os.pread(disk.fileno(), PAGE_SIZE, PAGE_SIZE)

    def read(address: int) -> bytes:
        with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as disk:
            os.pwrite(disk.fileno(), stored, 0)
            os.fsync(disk.fileno())
        os.lseek(fd, 0, os.SEEK_SET)
        expect(syscalls.read_into(fd, address, PAGE_SIZE), PAGE_SIZE, "result of read(2)")
        return b""

    return (
        KernelAccess("O_DIRECT write(2)", write, length=PAGE_SIZE),
        KernelAccess("O_DIRECT read(2)", read, writes=True, stores=stored, length=PAGE_SIZE),
    )


@contextmanager
def prepared(access: KernelAccess, address: int) -> Iterator[bytes]:
    """Have at an address what an access wants there; the block gets what was there, which is put back after it."""
    before = peek(address, access.length)
    poke(address, access.wants or before)
    yield before
    poke(address, before)


def expect_told(
    uffd: Uffd,
    area: Area,
    access: KernelAccess,
    pages: tuple[int, ...],
    flags: PagefaultFlag,
    *,
    serve: Callable[[int], object],
) -> None:
    """Assert that a call waits at each of one or two pages, told with these flags, and goes on when it is served.

    What it has read must be what is there afterwards, and what it wrote as well.
    """
    address = access.address(area, *pages)
    unit = area.page_size if area.mem.hugetlb else PAGE_SIZE
    at = address - (address - area.start) % unit
    with faulting(uffd, address, at=at, flags=flags, call=partial(access.call, address)) as waiter:
        uffd.expect_still_asleep(1)
        serve(pages[0])
        for page in pages[1:]:
            uffd.wait_fault(area.page(page).start, flags)
            uffd.expect_still_asleep(1)
            serve(page)
        read = waiter.result()
    uffd.expect_still_asleep(0)
    _expect_done(access, address, read)


def expect_untold(uffd: Uffd, area: Area, access: KernelAccess, pages: tuple[int, ...]) -> None:
    """Assert that a call goes through at one or two pages without a message, with the right bytes."""
    address = access.address(area, *pages)
    read = undisturbed(uffd, partial(access.call, address))
    _expect_done(access, address, read)


def _expect_done(access: KernelAccess, address: int, read: object) -> None:
    if access.stores:
        expect(peek(address, len(access.stores)), access.stores, "what the call wrote")
    if not access.writes:
        expect(read, peek(address, access.length), "what the call read")


def expect_calls_trapped(row: str, ctx: Context, area: Area, guard: Protection, *accesses: KernelAccess) -> None:
    """Assert that each access to pages 1 and 2 of an area that is protected as a whole waits at just these pages.

    Each keeps its protection until it is un-protected itself, and the others keep theirs. What the protection is not
    against goes through.
    """
    with Uffd.open(ctx.features, KERNEL_FAULTS) as uffd:
        area.fill()
        uffd.register(area.range, guard.mode)
        for access in accesses:
            for pages in access.pages(1, 2):
                with promise(row, f"{access.name} at {pages}"), prepared(access, access.address(area, *pages)):
                    left = set(range(area.nr_pages))
                    guard.set(uffd, area, left)

                    def serve(page: int, uffd: Uffd = uffd, left: set[int] = left) -> None:
                        Pagemap.expect_protected(area, left, "while the call waits")
                        guard.lift(uffd, area, (page,))
                        left.discard(page)

                    flags = guard.trapped_write if access.writes else guard.trapped_read
                    if flags is None:
                        expect_untold(uffd, area, access, pages)
                    else:
                        expect_told(uffd, area, access, pages, flags, serve=serve)
                    Pagemap.expect_protected(area, left, "after the call")
                    guard.lift(uffd, area, range(area.nr_pages))
        undisturbed(uffd, partial(area.expect_pattern_of, area))
