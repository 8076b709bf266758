# SPDX-License-Identifier: GPL-2.0-only
"""MADV_GUARD_INSTALL over pages that are protected, or marked as such without a page."""

from __future__ import annotations

import os
import select
from errno import EINVAL
from functools import partial
from pathlib import Path
from signal import SIGSEGV

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, AGAINST_WRITES, ANON, NOT_HUGETLB, SHMEM, SHMEM_PRIVATE, SYNC_RWP, WRITEPROTECT, Advice, Area,
    Channel, Child, Context, Feature, KernelError, Pagemap, Protection, Skip, Uffd, advise, eventually, expect_signals,
    expect_sweep, undisturbed,
)  # fmt: skip

ENDLESS_SECONDS = 0.3
"""Processor time after which a call that takes microseconds will never end."""

NEVER_ENDS = Defect(
    id="D-WP-37",
    summary="MADV_GUARD_INSTALL over write-protected pages of a file never ends; the process can be killed",
    kernels="6.18.15, 6.18.44, 7.3.4",
    advice="un-protect and drop the pages before guards are put there",
    shows=r"expected MADV_GUARD_INSTALL to end",
)


def processor_time(pid: int) -> float:
    """Return the seconds that a process has run."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def require_guards(ctx: Context) -> None:
    """Skip where this memory cannot have guard pages."""
    area = ctx.allocate()
    try:
        advise(area.page(0), Advice.GUARD_INSTALL)
    except KernelError as error:
        if error.errno != EINVAL:
            raise
        raise Skip(f"no guard pages in {ctx.mem} memory (Linux 6.13, of files 6.15)") from None


def check_guards(ctx: Context, guard: Protection, features: Feature, *, present: bool) -> None:
    """Protect pages, and put guards over some of them, in a process that can be killed."""
    require_guards(ctx)
    area = ctx.dst
    pages, guarded = {1, 2, 3}, {2, 3, 4}

    def install(channel: Channel) -> None:
        with Uffd.open(features) as uffd:
            if present:
                area.fill()
            uffd.register(area.range, guard.mode)
            guard.set(uffd, area, pages)
            Pagemap.expect_protected(area, pages, "before the guards")
            channel.send()
            advise(area.page(2, 3), Advice.GUARD_INSTALL)
            os.write(mark, b"1")
            uffd.expect_no_message()
            Pagemap.expect_uffd_wp(area.page(1).start, True, "page 1, before the guards")
            check_installed(uffd, area, guarded)
            advise(area.page(2, 3), Advice.GUARD_REMOVE)
            undisturbed(uffd, partial(area.expect_zero, 2, 3) if ctx.mem is ANON else lambda: None)
            left = {1} | {page for page in guarded if Pagemap.uffd_wp(area.page(page).start)}
            expect_sweep(uffd, area, left, guard)

    done, mark = os.pipe2(os.O_NONBLOCK)
    try:
        with Child(install) as child:
            child.receive()
            begun = processor_time(child.pid)

            def ended() -> bool:
                return child.ended or bool(select.select([done], [], [], 0)[0])

            eventually(
                lambda: ended() or processor_time(child.pid) > begun + ENDLESS_SECONDS,
                "MADV_GUARD_INSTALL to end, or to run for long",
            )
            if not ended():
                raise AssertionError(f"expected MADV_GUARD_INSTALL to end; it runs on after {ENDLESS_SECONDS} s")
    finally:
        os.close(done)
        os.close(mark)


def check_installed(uffd: Uffd, area: Area, guarded: set[int]) -> None:
    """Assert that accesses to the guard pages are SIGSEGV, without a message."""
    for page in sorted(guarded):
        for write in (False, True):
            expect_signals(area.page(page), area.page_size, SIGSEGV, f"guard page {page}", write=write)
    uffd.expect_no_message()


@uffd_case(
    "guard-install-writeprotected", mem=(SHMEM, SHMEM_PRIVATE), variants=("pages", "no pages"), features=WRITEPROTECT,
    pages=6, rows=("WP-37",), defect=NEVER_ENDS,
)  # fmt: skip
def test_guard_install_writeprotected(ctx: Context, variant: str) -> None:
    """MADV_GUARD_INSTALL over write-protected pages of a file, there or not, ends, and the guards are there."""
    check_guards(ctx, AGAINST_WRITES, WRITEPROTECT, present=variant == "pages")


@uffd_case(
    "guard-install-writeprotected-anon", mem=(ANON,), features=WRITEPROTECT | Feature.WP_UNPOPULATED,
    variants=("pages", "no pages"), pages=6, rows=("WP-37",), kind=Kind.DETAIL,
)  # fmt: skip
def test_guard_install_writeprotected_anon(ctx: Context, variant: str) -> None:
    """MADV_GUARD_INSTALL over write-protected anonymous pages, there or not, ends, and the guards are there."""
    check_guards(ctx, AGAINST_WRITES, WRITEPROTECT | Feature.WP_UNPOPULATED, present=variant == "pages")


@uffd_case(
    "guard-install-rwprotected", mem=NOT_HUGETLB, features=SYNC_RWP, pages=6, rows=("RW-27", "WP-37"), kind=Kind.DETAIL
)
def test_guard_install_rwprotected(ctx: Context) -> None:
    """MADV_GUARD_INSTALL over pages protected against access ends, the guards are there, and the others still trap."""
    check_guards(ctx, AGAINST_ACCESS, SYNC_RWP, present=True)
