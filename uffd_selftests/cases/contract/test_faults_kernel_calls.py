# SPDX-License-Identifier: GPL-2.0-only
"""Faults of the kernel itself, by every way that a system call can take to memory, in each mode of registration."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from errno import EINVAL
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_WRITES, ALL, ANON, CACHED, KERNEL_ACCESSES, KERNEL_FAULTS, MINOR, MINOR_FAULTS, MISSING, PAGE_SIZE, RWP,
    SHARED, TRAPPED, WP, WRITE, WRITEPROTECT, WRITE_TRAPPED, Advice, Area, Context, Fault, Feature, KernelAccess,
    KernelError, PagefaultFlag, Pagemap, Range, Skip, Uffd, Waiter, advise, cached, direct_accesses, direct_disk,
    eventually, expect, expect_calls_trapped, expect_told, handled, huge_area, poke, prepared, promise, syscalls,
)  # fmt: skip

KINDS = tuple(KERNEL_ACCESSES)


def offered() -> Feature:
    """What the kernel offers to a handle that serves its own faults."""
    with Uffd.open(flags=KERNEL_FAULTS) as uffd:
        return uffd.offered


def accesses(kind: str) -> list[KernelAccess]:
    """The accesses of a kind that can wait here: before Linux 6.3 a long-term pin failed at once, with EFAULT."""
    waits = Feature.WP_UNPOPULATED in offered()  # not used, but hardly younger
    return [each for each in KERNEL_ACCESSES[kind] if waits or each.name != "IORING_REGISTER_BUFFERS"]


@uffd_case("faults-calls", mem=ALL, variants=KINDS, needs=("kernel_faults",), pages=4, rows=("FL-11", "PR-05"))
def test_faults_calls(ctx: Context, variant: str) -> None:
    """A system call that reads a missing page is told as a read, one that writes it as a write; filled, it goes on."""
    missing(ctx, *accesses(variant))


def empty(area: Area) -> None:
    """Make all pages missing again; Skip where that cannot be."""
    try:
        area.release()
    except KernelError as error:
        if error.errno != EINVAL or not area.mem.hugetlb:
            raise
        raise Skip("MADV_DONTNEED drops no huge pages (Linux 5.18)") from None


def missing(ctx: Context, *calls: KernelAccess) -> None:
    """Make accesses to pages 1 and 2 of the destination, which are missing."""
    ctx.src.fill()
    with Uffd.open(flags=KERNEL_FAULTS) as uffd:

        def copied(page: int) -> None:
            uffd.copy(ctx.dst.page(page).start, ctx.src.page(page).start, ctx.page_size)

        uffd.register(ctx.dst.range, MISSING)
        for access in calls:
            for pages in access.pages(1, 2):
                with promise("FL-11", f"{access.name} at {pages}"):
                    with prepared(access, access.address(ctx.src, *pages)) as before:
                        flags = WRITE if access.writes else PagefaultFlag(0)
                        expect_told(uffd, ctx.dst, access, pages, flags, serve=copied)
                        Pagemap.expect_present(ctx.dst, *pages)
                    poke(access.address(ctx.dst, *pages), before)
                    ctx.dst.expect_pattern_of(ctx.src, pages[0], len(pages))
                    empty(ctx.dst)


@uffd_case(
    "faults-calls-wp",
    mem=ALL,
    variants=KINDS,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    rows=("WP-08", "FL-11"),
)
def test_faults_calls_wp(ctx: Context, variant: str) -> None:
    """A system call that writes to a protected page waits until that is un-protected; one that reads it does not."""
    expect_calls_trapped("FL-11", ctx, ctx.dst, AGAINST_WRITES, *accesses(variant))


@uffd_case(
    "faults-calls-wp-thp",
    mem=(ANON,),
    variants=KINDS,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    rows=("FL-11",),
    kind=Kind.DETAIL,
)
def test_faults_calls_wp_thp(ctx: Context, variant: str) -> None:
    """The same in a transparent huge page, of which a base page is un-protected and the others stay protected."""
    for access in accesses(variant):
        expect_calls_trapped("FL-11", ctx, huge_area(ctx), AGAINST_WRITES, access)


@uffd_case(
    "faults-calls-minor",
    mem=SHARED,
    variants=KINDS,
    features=MINOR_FAULTS,
    needs=("kernel_faults",),
    pages=4,
    rows=("FL-11",),
)
def test_faults_calls_minor(ctx: Context, variant: str) -> None:
    """A system call that meets a page in want of its mapping alone waits until UFFDIO_CONTINUE."""
    area = ctx.dst
    with Uffd.open(ctx.features, KERNEL_FAULTS) as uffd, cached(ctx) as view:
        ctx.uffd.unregister(area.range)
        uffd.register(area.range, MINOR)
        for access in accesses(variant):
            for pages in access.pages(1, 2):
                behind = view.start + access.address(area, *pages) - area.start
                with promise("FL-11", f"{access.name} at {pages}"), prepared(access, behind):
                    flags = CACHED | WRITE if access.writes else CACHED
                    expect_told(uffd, area, access, pages, flags, serve=lambda page: uffd.continue_(area.page(page)))
                    Pagemap.expect_present(area, *pages)
                advise(area.range, Advice.DONTNEED)
        area.expect_pattern(view)


@uffd_case(
    "faults-calls-direct",
    mem=ALL,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    rows=("FL-11", "PR-05"),
    kind=Kind.DETAIL,
)
def test_faults_calls_direct(ctx: Context) -> None:
    """O_DIRECT waits for missing and for protected pages before the disk reaches them."""
    with direct_disk() as disk:
        calls = direct_accesses(disk)
        missing(ctx, *calls)
        expect_calls_trapped("FL-11", ctx, ctx.dst, AGAINST_WRITES, *calls)


FRAME_PAGES = 32
"""Room for a signal frame with all registers that a processor may have."""


def interrupted(stack: Range) -> None:
    """Send this thread a signal whose handler is to run on a stack of its own."""
    where = (ctypes.c_uint64 * 3)(stack.start, 0, stack.len)  # struct stack_t
    syscalls.call("sigaltstack", ctypes.addressof(where), 0)
    syscalls.call("tgkill", os.getpid(), threading.get_native_id(), signal.SIGUSR1)


@uffd_case(
    "faults-signal-frame",
    mem=(ANON,),
    variants=("MISSING", "WP", "RWP"),
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=FRAME_PAGES,
    rows=("FL-11",),
)
def test_faults_signal_frame(ctx: Context, variant: str) -> None:
    """A signal whose handler's stack is missing or protected is handled when the kernel's writes there were served."""
    if variant == "RWP" and Feature.RWP not in offered():
        raise Skip("no read-write protection (Linux 7.3): UFFD_FEATURE_RWP is not offered")
    features = Feature.RWP if variant == "RWP" else WRITEPROTECT
    area, told = ctx.dst, list[int]()
    with Uffd.open(features, KERNEL_FAULTS) as uffd, handled(signal.SIGUSR1) as signals:
        if variant != "MISSING":
            area.fill()
        uffd.register(area.range, {"MISSING": MISSING, "WP": WP, "RWP": RWP}[variant])
        if variant != "MISSING":
            (uffd.writeprotect if variant == "WP" else uffd.rwprotect)(area.range)
        served_by: dict[str, Callable[[Range], object]] = {
            "MISSING": uffd.zeropage,
            "WP": uffd.unprotect,
            "RWP": uffd.resolve,
        }
        flags = {"MISSING": WRITE, "WP": TRAPPED, "RWP": WRITE_TRAPPED}[variant]
        with Waiter(partial(interrupted, area.range)) as waiter:
            while not waiter.done:
                eventually(lambda: waiter.done or uffd.readable(), "a fault or the end of the call")
                for message in uffd.read():
                    told.append((getattr(message, "address", 0) - area.start) // PAGE_SIZE)
                    if len(told) == 1:  # the kernel's own; later ones may be the handler's
                        expect(message, Fault(area.page(told[0]).start, flags), "the first message")
                    served_by[variant](area.page(told[-1]))
        eventually(lambda: bool(signals), "the handler to have run")
        expect(signals, [signal.SIGUSR1], "signals that were handled")
        expect(len(set(told)), len(told), "pages told, each once")
        untouched = sorted(set(range(FRAME_PAGES)) - set(told))
        if variant == "MISSING":
            Pagemap.expect_present(area, *told)
        else:
            Pagemap.expect_protected(area, untouched, "after the signal")
            uffd.unprotect(area.range) if variant == "WP" else uffd.resolve(area.range)
            for page in untouched:
                area.expect_pattern_of(area, page, 1)
