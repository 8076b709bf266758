# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_RWPROTECT from another process, for a process that is gone, and through a handle that is not the memory's."""

from __future__ import annotations

from errno import ENOENT, ESRCH
from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, READ_TRAPPED, RWP, SYNC_RWP, WRITE_TRAPPED, Channel, Context, Pagemap, Uffd, UffdError, await_fault,
    expect, expect_modes, expect_rwp_free, expect_rwp_trapped, monitored, orphaned, promise, refuses, rewrite,
    rwp_protected, rwp_trapped, touch,
)  # fmt: skip


@uffd_case("rwprotect-orphaned", mem=(ANON,), features=SYNC_RWP, pages=2, rows=("RW-60",), kind=Kind.DETAIL)
def test_rwprotect_orphaned(ctx: Context) -> None:
    """When the process whose memory it is has exited, or runs another program, protecting and resolving say ESRCH."""
    for what, by_exec in (("exited", False), ("another program", True)):
        with promise("RW-60", what), orphaned(ctx.dst.range, RWP, SYNC_RWP, by_exec=by_exec) as uffd:
            for request in (uffd.rwprotect, uffd.resolve):
                with refuses(ESRCH):
                    request(ctx.dst.range)
            uffd.expect_no_message()


@uffd_case(
    "rwprotect-remote", mem=ALL, features=SYNC_RWP, pages=5, spare_hugepages=5, rows=("RW-60",), kind=Kind.DETAIL
)
def test_rwprotect_remote(ctx: Context) -> None:
    """Whoever holds a handle protects and resolves the memory of the process that made it, not memory of its own."""
    area = ctx.dst
    if not ctx.mem.shared:  # at the same addresses, to be left alone
        area.fill()

    def life(channel: Channel) -> None:
        expect_modes(area.range, RWP)
        area.fill()
        channel.send()
        channel.receive()
        Pagemap.expect_protected(area, {1, 2, 3}, "in the process, when another one had protected them")
        touch(area.page(0), area.page_size, write=True)
        touch(area.page(1), area.page_size)
        rewrite(area, 3)
        Pagemap.expect_protected(area, {2}, "in the process, when another one had resolved two")
        channel.send()
        channel.receive()
        area.expect_pattern_of(area)

    with monitored(area.range, RWP, life, SYNC_RWP) as (child, uffd):
        child.receive()
        uffd.rwprotect(area.page(1, 3))
        Pagemap.expect_protected(area, (), "in the process that asked")
        child.send()
        for page, flags in ((1, READ_TRAPPED), (3, WRITE_TRAPPED)):
            await_fault(uffd, child, area.page(page).start, flags)
            uffd.resolve(area.page(page))
        child.receive()
        uffd.resolve(area.range)
        child.send()


FOREIGN = Defect(
    id="D-RW-61",
    summary="UFFDIO_RWPROTECT protects and resolves memory that is registered with another handle, whose owner is not "
    "told and whose threads sleep on",
    kernels="7.3.4",
    advice="Use a handle for the memory that it was registered for only.",
    shows=r"RW-61.*expected ENOENT; the call succeeded",
)


@uffd_case("rwprotect-foreign", mem=ALL, features=SYNC_RWP, pages=3, rows=("RW-61",), defect=FOREIGN)
def test_rwprotect_foreign(ctx: Context) -> None:
    """Memory registered with one handle cannot be protected or resolved through another one."""
    area = rwp_protected(ctx)
    ctx.uffd.resolve(area.page(0))
    with Uffd.open(SYNC_RWP) as other:
        for what, request in ("protect", other.rwprotect), ("resolve", other.resolve):
            with promise("RW-61", what), refuses(ENOENT):
                request(area.range)
            Pagemap.expect_protected(area, {1, 2}, f"after another handle tried to {what}")


def refused(request: partial[None]) -> bool:
    """Make a request that may be refused with ENOENT; return whether it was."""
    try:
        request()
    except UffdError as error:
        expect(error.errno, ENOENT, "errno of the request")
        return True
    return False


@uffd_case("rwprotect-foreign-or-refused", mem=ALL, features=SYNC_RWP, pages=3, rows=("RW-61",), kind=Kind.DETAIL)
def test_rwprotect_foreign_or_refused(ctx: Context) -> None:
    """A handle that may resolve another one's pages wakes nobody there; messages of both come to the owner alone."""
    area = rwp_protected(ctx)
    with Uffd.open(SYNC_RWP) as other:
        with rwp_trapped(ctx.uffd, area, 1):
            no = refused(partial(other.resolve, area.page(1)))
            Pagemap.expect_protected(area, {0, 1, 2} if no else {0, 2}, "after another handle tried to resolve page 1")
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.resolve(area.page(1))
        no = refused(partial(other.rwprotect, area.page(1)))
        Pagemap.expect_protected(area, {0, 2} if no else {0, 1, 2}, "after another handle tried to protect page 1")
        if no:
            expect_rwp_free(ctx.uffd, area, 1)
        else:
            expect_rwp_trapped(ctx.uffd, area, 1)
        expect_rwp_trapped(ctx.uffd, area, 0, 2)
        other.expect_no_message()


@uffd_case("rwprotect-two-handles", mem=ALL, features=SYNC_RWP, pages=6, rows=("RW-61", "CL-12"), kind=Kind.DETAIL)
def test_rwprotect_two_handles(ctx: Context) -> None:
    """Of two handles with memory side by side each gets the messages of its own; closing one frees its memory alone."""
    area = ctx.dst
    area.fill()
    with Uffd.open(SYNC_RWP) as other:
        for uffd, first in (ctx.uffd, 0), (other, 3):
            uffd.register(area.page(first, 3), RWP)
            uffd.rwprotect(area.page(first, 3))
        with rwp_trapped(ctx.uffd, area, 2), rwp_trapped(other, area, 3):
            other.wake(area.page(0, 3))
            ctx.uffd.wake(area.page(3, 3))
            for uffd in (ctx.uffd, other):
                uffd.expect_still_asleep(1)
            ctx.uffd.resolve(area.page(2))
            other.expect_still_asleep(1)
            other.close()
        Pagemap.expect_protected(area, {0, 1}, "after one handle was closed")
        expect_modes(area.range, *[RWP] * 3, *[RWP ^ RWP] * 3)
    expect_rwp_free(ctx.uffd, area, 3, 4, 5)
    expect_rwp_trapped(ctx.uffd, area, 0, 1)
    area.expect_pattern_of(area)
