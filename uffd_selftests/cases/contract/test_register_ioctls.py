# SPDX-License-Identifier: GPL-2.0-only
"""What UFFDIO_REGISTER answers: which ioctls it offers, by memory and mode."""

from __future__ import annotations

from errno import EINVAL

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ANON, EACH_HUGETLB, MINOR, MINOR_FAULTS, MISSING, PAGE_SIZE, SHMEM, SHMEM_PRIVATE, WP, WRITEPROTECT, Context,
    Feature, Range, RangeIoctls, RegisterMode, expect, expect_modes, promise, refuses,
)  # fmt: skip

KNOWN_BITS = (1 << 11) - 1 | 1 << 63
"""The bits of all requests up to Linux 7.3; a newer kernel may offer more."""


def expect_offers(ctx: Context, offers: dict[RegisterMode, int], optional: int = 0) -> None:
    """Assert exactly which ioctls the destination area is offered in each mode; POISON and MOVE where they exist."""
    lacking = (0 if Feature.POISON in ctx.uffd.offered else RangeIoctls.POISON) | (
        0 if Feature.MOVE in ctx.uffd.offered else RangeIoctls.MOVE
    )
    for mode, ioctls in offers.items():
        seen = ctx.uffd.register(ctx.dst.range, mode) & KNOWN_BITS
        if seen | optional != (ioctls & ~lacking) | optional:
            raise AssertionError(f"{mode}: expected ioctls {RangeIoctls(ioctls & ~lacking)}, got {seen}")
        ctx.uffd.unregister(ctx.dst.range)


@uffd_case("register-offers-anon", mem=(ANON,), features=WRITEPROTECT, pages=1, rows=("REG-29", "REG-32"))
def test_register_offers_anon(ctx: Context) -> None:
    """Anonymous memory is offered WAKE, COPY, ZEROPAGE, POISON and MOVE, and WRITEPROTECT in mode WP."""
    with promise("REG-29, REG-32"):
        expect_offers(ctx, {MISSING: 0x13C, WP: 0x17C, MISSING | WP: 0x17C})


@uffd_case(
    "register-offers-shmem",
    mem=(SHMEM, SHMEM_PRIVATE),
    features=WRITEPROTECT | MINOR_FAULTS,
    pages=1,
    rows=("REG-30", "REG-32"),
)
def test_register_offers_shmem(ctx: Context) -> None:
    """Shared memory is offered WAKE, COPY, ZEROPAGE and POISON, WRITEPROTECT in mode WP and CONTINUE in mode MINOR."""
    with promise("REG-30, REG-32"):
        offers = {MISSING: 0x13C, WP: 0x17C, MINOR: 0x1BC, MINOR | WP: 0x1FC, MISSING | WP | MINOR: 0x1FC}
        expect_offers(ctx, offers, optional=RangeIoctls.MOVE)


@uffd_case(
    "register-offers-hugetlb",
    mem=EACH_HUGETLB,
    features=WRITEPROTECT | MINOR_FAULTS,
    pages=1,
    rows=("REG-31", "REG-32"),
)
def test_register_offers_hugetlb(ctx: Context) -> None:
    """Huge pages are offered the same without ZEROPAGE and MOVE."""
    with promise("REG-31, REG-32"):
        expect_offers(ctx, {MISSING: 0x10C, WP: 0x14C, MINOR: 0x18C, MINOR | WP: 0x1CC, MISSING | WP | MINOR: 0x1CC})


MOVE_ON_SHMEM = Defect(
    id="D-REG-30",
    summary="UFFDIO_MOVE is offered for shared memory, where it always fails with EINVAL",
    kernels="6.12.117, 6.18.44, 7.3.4",
    advice="do not take the _UFFDIO_MOVE bit for a promise: use UFFDIO_MOVE on private anonymous memory only",
    shows=r"MOVE offered: expected False, got True",
)


@uffd_case(
    "register-offers-no-move",
    mem=(SHMEM, SHMEM_PRIVATE),
    features=Feature.MOVE,
    pages=1,
    rows=("REG-30",),
    defect=MOVE_ON_SHMEM,
)
def test_register_offers_no_move(ctx: Context) -> None:
    """Shared memory is not offered UFFDIO_MOVE, which does not work there."""
    offered = ctx.uffd.register(ctx.dst.range, MISSING)
    with refuses(EINVAL):
        ctx.uffd.move(ctx.dst.start, ctx.src.start, PAGE_SIZE)
    expect(RangeIoctls.MOVE in offered, False, "REG-30: MOVE offered")


@uffd_case("register-mixed-offer", mem=EACH_HUGETLB, pages=1, rows=("REG-33",), kind=Kind.DETAIL)
def test_register_mixed_offer(ctx: Context) -> None:
    """One call over huge pages and others registers both and offers what holds for both, in either order."""
    before, behind = Range(ctx.dst.start - PAGE_SIZE, PAGE_SIZE), Range(ctx.dst.range.end, PAGE_SIZE)
    alone = ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.unregister(ctx.dst.range)
    for where, other in (
        (Range(before.start, PAGE_SIZE + ctx.page_size), before),
        (Range(ctx.dst.start, PAGE_SIZE + ctx.page_size), behind),
    ):
        with promise("REG-33", f"the other page at {other.start:#x}"):
            expect(ctx.uffd.register(where, MISSING), alone, "ioctls offered")
            expect_modes(ctx.dst.range, MISSING)
            expect_modes(other, MISSING)
            ctx.uffd.unregister(where)
