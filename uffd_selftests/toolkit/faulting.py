# SPDX-License-Identifier: GPL-2.0-only
"""Threads that sleep in a fault of a userfaultfd, in an event of it, or in a long request."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from typing import TypeVar, cast

from uffd_selftests.abi.uapi import PM_PRESENT, CopyMode, Feature, PagefaultFlag, RegisterMode
from uffd_selftests.mem_types import ANON, Area
from uffd_selftests.toolkit.access import Trap, peek, poke, touch, touch_trapped
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import DEADLINE, eventually, expect, promise
from uffd_selftests.toolkit.handle import KERNEL_FAULTS, Uffd
from uffd_selftests.toolkit.memory import (
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    PAGE_SIZE,
    Advice,
    Range,
    advise,
    keep_small,
    mapped,
)
from uffd_selftests.toolkit.messages import Removed
from uffd_selftests.toolkit.pagemap import Pagemap
from uffd_selftests.toolkit.threads import Waiter

__all__ = [
    "LONG_FILL",
    "WRITE",
    "CACHED",
    "TRAPPED",
    "NEW",
    "long_fill",
    "faulting",
    "faulting_pages",
    "thread_told",
    "undisturbed",
    "signals",
    "trapped",
    "expect_trapped",
    "expect_free",
    "mend",
    "unread_event",
    "copy_held",
]


T = TypeVar("T")

LONG_FILL = 65536
"""Pages of zeroes, which take no memory: to map them takes milliseconds."""

WRITE = PagefaultFlag.WRITE
CACHED = PagefaultFlag.MINOR
"""What the message of a page says that is in the page cache already."""
TRAPPED = PagefaultFlag.WRITE | PagefaultFlag.WP
"""What the message of a write to a protected page says."""
NEW = b"\xa5\x5a new"
"""What is written to a page, to be found there."""


@contextmanager
def long_fill(uffd: Uffd, where: Range | None = None, *, nice: int = 19) -> Iterator[Range]:
    """Have a thread map LONG_FILL zeroes, by default in a range of its own; nobody can change that mapping meanwhile.

    The block gets the range; it begins when the first page is there, and ends when all are. The thread lets all others
    go first, unless it is to be less ``nice`` because one of them does not sleep.
    """
    if where is None:
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        with mapped(LONG_FILL * PAGE_SIZE, flags=flags) as own, long_fill(uffd, own, nice=nice):
            yield own
        return
    keep_small(where)
    uffd.register(where, RegisterMode.MISSING)

    def fill() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        uffd.zeropage(where)

    with Waiter(fill) as filler:
        eventually(lambda: filler.done or bool(Pagemap.entry(where.start) & PM_PRESENT), "the first page")
        yield where


@contextmanager
def faulting(
    uffd: Uffd,
    address: int,
    *,
    write: bool = False,
    flags: PagefaultFlag | None = None,
    at: int | None = None,
    call: Callable[[], object] | None = None,
    read: bool = True,
) -> Iterator[Waiter]:
    """Have a thread fault at ``address``; the block runs while it sleeps, and leaving it waits for its end.

    By default the thread reads a byte there, which is its result, or with ``write`` stores a zero there, or where
    ``flags`` tell of a write-protected page makes a write access that changes nothing; ``call`` replaces that. The
    message is read, must carry ``flags`` and the address ``at`` (by default the start of the base page) and lands in
    ``waiter.fault``; with ``read`` false it is left in the queue.
    """
    if call is None:
        call = partial(peek, address)
        if write and flags is not None and PagefaultFlag.WP in flags:
            call = partial(touch, Range(address, 1), 1, write=True)
        elif write:
            # Not the access that changes nothing: an emulator may load first, and a load of a missing page faults.
            call = partial(poke, address, b"\0")
    if flags is None:
        flags = PagefaultFlag.WRITE if write else PagefaultFlag(0)
    with Waiter(call) as waiter:
        _await_message(uffd, waiter, f"a page fault at {address:#x} with flags {flags}")
        if read:
            page = address - address % PAGE_SIZE
            waiter.fault = uffd.wait_fault(page if at is None else at, flags)
        yield waiter


def _await_message(uffd: Uffd, waiter: Waiter, what: str) -> None:
    """Wait for a message that a call must cause; AssertionError also when the call ends without one."""
    end = time.monotonic() + DEADLINE
    while not uffd.readable(0.02):
        if time.monotonic() > end:
            raise AssertionError(f"expected {what}; nothing came within {DEADLINE:g} seconds")
        if waiter.done and not uffd.readable():
            try:
                waiter.result()
            except OSError as error:
                raise AssertionError(f"expected {what}; without one, the access failed: {error}") from None
            raise AssertionError(f"expected {what}; the access went through without one")


@contextmanager
def faulting_pages(uffd: Uffd, area: Area, *pages: int) -> Iterator[list[Waiter]]:
    """Have one thread a page read its first byte and sleep in the fault; the block gets the threads in that order."""
    with ExitStack() as stack:
        yield [stack.enter_context(faulting(uffd, area.page(page).start)) for page in pages]


def thread_told(waiter: Waiter) -> int:
    """The thread that the message of a fault names."""
    assert waiter.fault is not None
    return waiter.fault.ptid


def undisturbed(uffd: Uffd, call: Callable[[], T]) -> T:
    """Make a call that may fault, but not in ``uffd``, and return its result; AssertionError when a message comes."""
    with Waiter(call) as waiter:
        eventually(lambda: waiter.done or uffd.readable(), "the call to return")
        uffd.expect_no_message()
        return cast(T, waiter.result())


def signals(uffd: Uffd, where: Range, step: int, *, write: bool) -> list[int | None]:
    """Access each page, without a message; return the signals that it gave, None for an access that went through."""
    traps: list[Trap | None] = []
    undisturbed(uffd, lambda: traps.extend(touch_trapped(where, step, write=write)))
    return [trap.signo if trap else None for trap in traps]


@contextmanager
def trapped(uffd: Uffd, area: Area, page: int) -> Iterator[Waiter]:
    """Have a thread write NEW to the start of a page and be trapped; somebody has to let it go on."""
    start = area.page(page).start
    with faulting(uffd, start, call=lambda: poke(start, NEW), flags=TRAPPED) as waiter:
        yield waiter
    expect(peek(start, len(NEW)), NEW, "what was written, after the write was let go on")


def expect_trapped(uffd: Uffd, area: Area, *pages: int) -> None:
    """Assert that a write to each of the pages is trapped, and goes on when the page is un-protected."""
    for page in pages:
        with promise(f"page {page}"):
            with trapped(uffd, area, page):
                uffd.unprotect(area.page(page))
            uffd.expect_no_message()


def expect_free(uffd: Uffd, area: Area, *pages: int) -> None:
    """Assert that nothing stops a write to any of the pages, which changes nothing."""
    for page in pages:
        with promise(f"page {page}"):
            undisturbed(uffd, partial(touch, area.page(page), area.page_size, write=True))


def mend(ctx: Context, area: Area, *pages: int) -> None:
    """Put back what trapped() overwrote in pages that held the area's pattern."""
    ctx.src.fill()
    for page in pages:
        poke(area.page(page).start, peek(ctx.src.page(page).start, len(NEW)))


@contextmanager
def unread_event(uffd: Uffd, where: Range) -> Iterator[None]:
    """Keep the handle waiting for its event to be read: a thread drops the range, with UFFD_FEATURE_EVENT_REMOVE.

    At the end of the block the event is read, and must be that one.
    """
    with Waiter(lambda: advise(where, Advice.DONTNEED)):
        if not uffd.readable(DEADLINE):
            raise AssertionError(f"expected UFFD_EVENT_REMOVE; nothing came within {DEADLINE:g} seconds")
        yield
        expect(uffd.read(), [Removed(where.start, where.end)], "the event")


@contextmanager
def copy_held(
    uffd: Uffd,
    dst: int,
    data: Range,
    *,
    at: int = 0,
    mode: CopyMode = CopyMode(0),
    outcome: AbstractContextManager[object] | None = None,
) -> Iterator[None]:
    """Have a thread copy ``data`` to ``dst``; the block runs while it sleeps: ``at`` bytes of the source are there.

    At the end of the block the rest of the source comes, and the copy goes on; then its ``outcome`` is judged.
    """

    def call() -> None:
        with outcome or nullcontext():
            uffd.copy(dst, source.start, data.len, mode)

    with closing(ANON.allocate(data.len // PAGE_SIZE)) as source, Uffd.open(Feature(0), KERNEL_FAULTS) as monitor:
        monitor.register(source.range, RegisterMode.MISSING)
        if at:
            monitor.copy(source.start, data.start, at)
        with Waiter(call) as waiter:
            eventually(lambda: waiter.done or monitor.readable(), "the copy to wait for its source")
            if waiter.done:
                waiter.result()
                raise AssertionError("expected the copy to wait for its source; it has returned")
            monitor.wait_fault(source.start + at)
            yield
            monitor.copy(source.start + at, data.start + at, data.len - at)
