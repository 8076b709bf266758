# SPDX-License-Identifier: GPL-2.0-only
"""Calls in which an allocation fails, each in turn (Documentation/fault-injection/fault-injection.rst)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, AGAINST_WRITES, ANON, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE_SIZE, SYNC_RWP, WRITEPROTECT, Context,
    KernelError, Pagemap, Protection, Skip, Sysctl, checked, errno_name, expect, in_modes, keep_small, lib, pmd_size,
    poke, promise, remap, syscalls, touch,
)  # fmt: skip

DEBUGFS = Path("/sys/kernel/debug")
SETTINGS = {
    "fail_page_alloc": {"min-order": "0", "ignore-gfp-wait": "N", "ignore-gfp-highmem": "N", "verbose": "0"},
    "failslab": {"ignore-gfp-wait": "N", "verbose": "0"},
}
"""What lets every allocation fail, and says nothing in the log."""
ROUNDS = 8
MOST = 60
"""Allocations of one call, and more."""


@contextmanager
def injection() -> Iterator[int]:
    """Yield /proc/thread-self/fail-nth; Skip without CONFIG_FAULT_INJECTION and its parts, or debugfs."""
    with ExitStack() as stack:
        try:
            fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            for folder, settings in SETTINGS.items():
                for name, value in settings.items():
                    stack.enter_context(Sysctl(DEBUGFS / folder / name, value))
        except OSError as error:
            raise Skip(f"no fault injection: {error}: CONFIG_FAULT_INJECTION_DEBUG_FS, CONFIG_FAILSLAB") from None
        yield fd


def each_failure(fd: int, call: Callable[[], object]) -> Iterator[tuple[str, str]]:
    """Make the call with its first allocation failing, its second, and so on; yield which it was, and the outcome.

    How many there are depends on what the allocators have at hand, so that is done several times. The last call of each
    time, in which none fails any more, is told, too.
    """
    for again in range(ROUNDS):
        for number in range(1, MOST):
            os.pwrite(fd, str(number).encode(), 0)
            try:
                call()
                outcome = "success"
            except KernelError as error:
                outcome = errno_name(error.errno or 0)
            left = int(os.pread(fd, 16, 0))
            os.pwrite(fd, b"0", 0)
            yield f"round {again}, allocation {number}", outcome
            if left:
                break
        else:
            raise AssertionError(f"expected less than {MOST} allocations in one call")


def check_moves(ctx: Context, guard: Protection) -> None:
    """Move protected pages, over the end of a page table, with each allocation failing in turn."""
    table = pmd_size() // PAGE_SIZE
    pages = range(table - 2, table + 2)
    area, place = ctx.allocate(2 * table), ctx.allocate(2 * table)
    here, there = (each.page(pages[0], len(pages)) for each in (area, place))
    for each in (area, place):
        keep_small(each.range)
    touch(here, PAGE_SIZE, write=True)
    poke(place.page(pages[0] - 1).start, b"x")  # the first two have a page table there
    number, outcomes = syscalls.number("mremap"), []

    def watch() -> None:
        ctx.uffd.register(here, guard.mode)
        guard.set(ctx.uffd, area, pages)

    def move() -> None:
        flags = MREMAP_MAYMOVE | MREMAP_FIXED
        checked(lib.uffd_syscall(number, here.start, here.len, here.len, flags, there.start, 0), "mremap(2)")

    watch()
    with injection() as fd:
        for which, outcome in each_failure(fd, move):
            outcomes.append(outcome)
            if outcome == "success":
                remap(there, to=here.start)
                watch()
                continue
            with promise("WP-40", f"{which} fails, {outcome}"):
                expect(in_modes(here), guard.mode, "modes of the mapping that could not be moved")
                Pagemap.expect_protected(area, pages, "after the move was given up")
                Pagemap.expect_present(area, *pages)
    expect(outcomes.count("ENOMEM") >= ROUNDS, True, f"ENOMEM, in each round ({outcomes})")


@uffd_case("remap-fails-writeprotected", mem=(ANON,), features=WRITEPROTECT, pages=1, rows=("WP-40",), kind=Kind.DETAIL)
def test_remap_fails_writeprotected(ctx: Context) -> None:
    """An mremap(2) that fails, wherever it does, leaves its pages registered and protected against writes."""
    check_moves(ctx, AGAINST_WRITES)


@uffd_case("remap-fails-rwprotected", mem=(ANON,), features=SYNC_RWP, pages=1, rows=("WP-40",), kind=Kind.DETAIL)
def test_remap_fails_rwprotected(ctx: Context) -> None:
    """An mremap(2) that fails, wherever it does, leaves its pages registered and protected against access."""
    check_moves(ctx, AGAINST_ACCESS)
