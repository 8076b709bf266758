# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_REGISTER of what is registered: again, with more modes, with fewer, with others."""

from __future__ import annotations

from errno import EBUSY

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, EACH_HUGETLB, MISSING, NOT_HUGETLB, UNREGISTERED, WP, WRITEPROTECT, Context, Feature, PagefaultFlag, Pagemap,
    RangeIoctls, RegisterMode, UffdError, Waiter, eventually, expect, expect_errno, expect_modes, expect_one_of,
    expect_served, expect_trapped, faulting, in_modes, poke, promise, saw, undisturbed,
)  # fmt: skip


@uffd_case("register-again", mem=ALL, pages=2, rows=("REG-24",), kind=Kind.DETAIL)
def test_register_again(ctx: Context) -> None:
    """Registering the same again changes nothing: neither mode nor offer, and who waits goes on waiting."""
    ioctls = ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start), promise("REG-24"):
        expect(ctx.uffd.register(ctx.dst.range, MISSING), ioctls, "ioctls offered")
        expect_modes(ctx.dst.range, MISSING, MISSING)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@uffd_case("register-rest", mem=ALL, pages=5, rows=("REG-24", "REG-37"), kind=Kind.DETAIL)
def test_register_rest(ctx: Context) -> None:
    """A range that is registered in parts gets registered as a whole."""
    ctx.uffd.register(ctx.dst.page(0), MISSING)
    ctx.uffd.register(ctx.dst.page(2), MISSING)
    ctx.uffd.register(ctx.dst.page(0, 4), MISSING)
    expect_modes(ctx.dst.range, MISSING, MISSING, MISSING, MISSING, UNREGISTERED)


@uffd_case("register-wider", mem=ALL, features=WRITEPROTECT, pages=2, rows=("REG-25",), kind=Kind.DETAIL)
def test_register_wider(ctx: Context) -> None:
    """Registering with a mode more adds that mode, and its ioctl is offered."""
    page = ctx.dst.page(0)
    ctx.uffd.register(ctx.dst.range, MISSING)
    ioctls = ctx.uffd.register(page, MISSING | WP)
    with promise("REG-25"):
        expect(RangeIoctls.WRITEPROTECT in ioctls, True, "WRITEPROTECT offered")
        expect_modes(ctx.dst.range, MISSING | WP, MISSING)
        with faulting(ctx.uffd, page.start):
            ctx.uffd.copy(page.start, ctx.src.start, page.len)
        ctx.uffd.writeprotect(page)
        with faulting(ctx.uffd, page.start, write=True, flags=PagefaultFlag.WRITE | PagefaultFlag.WP):
            ctx.uffd.unprotect(page)


NARROWER = Defect(
    id="D-REG-26",
    summary="registering a range again with fewer modes succeeds but leaves it in all of its modes",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4; since 7.3 only where WP stays, for to drop that is refused with EBUSY",
    advice="unregister the range first, then register it with the modes wanted",
    shows=r"expected UFFDIO_REGISTER_MODE_(MISSING|WP), got UFFDIO_REGISTER_MODE_MISSING\|UFFDIO_REGISTER_MODE_WP",
)


def refused_to_drop(ctx: Context, mode: RegisterMode) -> bool:
    """Register the area in a mode without the WP that it is registered for; whether the kernel refuses that: EBUSY.

    Linux 7.3 and later do. They offer UFFD_FEATURE_RWP, where the processor allows it, and then must refuse; the
    output field is left alone, and the area keeps its modes.
    """
    before = in_modes(ctx.dst.range)
    try:
        ctx.uffd.register(ctx.dst.range, mode)
    except UffdError as error:
        expect_errno(error, EBUSY, "errno of dropping WP by UFFDIO_REGISTER")
        saw("EBUSY, for WP would be dropped")
        expect(in_modes(ctx.dst.range), before, "modes in which the area is registered, after EBUSY")
        return True
    expect(Feature.RWP in ctx.uffd.offered, False, "dropping WP succeeds on a kernel with UFFD_FEATURE_RWP")
    saw("success, which drops WP")
    return False


@uffd_case("register-narrower", mem=ALL, features=WRITEPROTECT, pages=1, rows=("REG-26",), defect=NARROWER)
def test_register_narrower(ctx: Context) -> None:
    """After registering with fewer modes a range has those modes only; since Linux 7.3 to drop WP so is EBUSY."""
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    with promise("REG-26"):
        if not refused_to_drop(ctx, MISSING):
            expect_modes(ctx.dst.range, MISSING)


@uffd_case("register-narrower-wp", mem=ALL, features=WRITEPROTECT, pages=1, rows=("REG-26",), defect=NARROWER)
def test_register_narrower_wp(ctx: Context) -> None:
    """After MISSING and WP were registered again as WP, missing pages are reported no more."""
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    ctx.uffd.register(ctx.dst.range, WP)
    with promise("REG-26"):
        expect_modes(ctx.dst.range, WP)


@uffd_case("register-narrower-mode", mem=ALL, features=WRITEPROTECT, pages=3, rows=("REG-26",), kind=Kind.VERSION)
def test_register_narrower_mode(ctx: Context) -> None:
    """Fewer modes than before are refused, and nothing changes, or leave the old or the new ones, offering the new.

    Without WP: EBUSY since Linux 7.3, told apart by trying. With WP kept: always success.
    """
    ctx.dst.fill(0, 1)
    alone = {}
    for mode in (MISSING, WP):
        alone[mode] = ctx.uffd.register(ctx.dst.range, mode)
        ctx.uffd.unregister(ctx.dst.range)
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    ctx.uffd.writeprotect(ctx.dst.page(0))
    with promise("REG-26", "WP kept"):
        expect(ctx.uffd.register(ctx.dst.range, WP), alone[WP], "ioctls offered")
        expect_one_of(in_modes(ctx.dst.range), (MISSING | WP, WP), "modes in smaps, WP kept")
        Pagemap.expect_protected(ctx.dst, (0,), "after registering as WP")
        expect_trapped(ctx.uffd, ctx.dst, 0)
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    ctx.uffd.writeprotect(ctx.dst.page(0))
    with promise("REG-26", "WP dropped"):
        if refused_to_drop(ctx, MISSING):
            Pagemap.expect_protected(ctx.dst, (0,), "after EBUSY")
            expect_trapped(ctx.uffd, ctx.dst, 0)
            expect_served(ctx, ctx.dst.page(1))
            ctx.uffd.unregister(ctx.dst.range)
            expect(ctx.uffd.register(ctx.dst.range, MISSING), alone[MISSING], "ioctls offered after UFFDIO_UNREGISTER")
            expect_modes(ctx.dst.range, MISSING, MISSING, MISSING)
        else:
            expect_one_of(in_modes(ctx.dst.range), (MISSING, MISSING | WP), "modes in smaps, WP dropped")
            ctx.uffd.register(ctx.dst.range, MISSING | WP)
            expect(ctx.uffd.register(ctx.dst.range, MISSING), alone[MISSING], "ioctls offered")


@uffd_case("register-other-mode", mem=ALL, features=WRITEPROTECT, pages=2, rows=("REG-27",), kind=Kind.DETAIL)
def test_register_other_mode(ctx: Context) -> None:
    """Registering with another mode puts it in place of the old: missing pages are reported no more."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.register(ctx.dst.page(0), WP)
    with promise("REG-27"):
        expect_modes(ctx.dst.range, WP, MISSING)
        undisturbed(ctx.uffd, lambda: poke(ctx.dst.start, b"\1"))
        ctx.uffd.writeprotect(ctx.dst.page(0))
        with faulting(ctx.uffd, ctx.dst.start, write=True, flags=PagefaultFlag.WRITE | PagefaultFlag.WP):
            ctx.uffd.unprotect(ctx.dst.page(0))


def drop_wp(ctx: Context) -> bool:
    """Protect page 0, then register it as MISSING instead of WP; False when the kernel refuses that (Linux 7.3)."""
    ctx.uffd.register(ctx.dst.range, WP)
    poke(ctx.dst.start, b"\1")
    ctx.uffd.writeprotect(ctx.dst.page(0))
    with promise("REG-28"):
        if refused_to_drop(ctx, MISSING):
            Pagemap.expect_uffd_wp(ctx.dst.start, True, "after EBUSY")
            return False
        expect_modes(ctx.dst.page(0), MISSING)
        return True


STALE_WP = Defect(
    id="D-REG-28",
    summary="registering a WP range as MISSING leaves its pages marked as protected; nothing is reported any more: a "
    "write to such a page gets done, but on hugetlb it spins for ever in the fault",
    kernels="6.1.192, 6.12.117, 6.18.44; not 7.3.4, which refuses it with EBUSY",
    advice="un-protect or unregister the range before registering it without WP",
    shows=r"expected PM_UFFD_WP clear in pagemap|again and again, without end: expected False, got True",
)


ENOUGH = 0.05
"""Seconds on the processor that no single write takes."""


@uffd_case("register-drops-wp", mem=ALL, features=WRITEPROTECT, pages=1, rows=("REG-28",), bugs=(3,), defect=STALE_WP)
def test_register_drops_wp(ctx: Context) -> None:
    """When a range is registered without WP, the protection of its pages goes; or the kernel refuses to."""
    if drop_wp(ctx):
        Pagemap.expect_uffd_wp(ctx.dst.start, False, "REG-28: after registering as MISSING")


@uffd_case(
    "register-dropped-wp-hugetlb",
    mem=EACH_HUGETLB,
    features=WRITEPROTECT,
    pages=1,
    rows=("REG-28",),
    bugs=(3,),
    defect=STALE_WP,
)
def test_register_dropped_wp_hugetlb(ctx: Context) -> None:
    """When huge pages are registered without WP, a write to one that was protected gets done."""
    if not drop_wp(ctx):
        return
    with Waiter(lambda: poke(ctx.dst.start, b"\2")) as waiter:
        eventually(lambda: waiter.done or waiter.cpu_time > ENOUGH, "the thread to write or to waste its time")
        spins = not waiter.done
        if spins:
            ctx.uffd.register(ctx.dst.range, WP)
            ctx.uffd.unprotect(ctx.dst.page(0))
    expect(spins, False, "REG-28: the thread that writes faults again and again, without end")


@uffd_case(
    "register-dropped-wp-writable",
    mem=NOT_HUGETLB,
    features=WRITEPROTECT,
    pages=1,
    rows=("REG-28",),
    bugs=(3,),
    kind=Kind.DETAIL,
)
def test_register_dropped_wp_writable(ctx: Context) -> None:
    """When a range is registered without WP, its once protected pages can be written, and nothing is reported."""
    if drop_wp(ctx):
        with promise("REG-28"):
            undisturbed(ctx.uffd, lambda: poke(ctx.dst.start, b"\2"))
