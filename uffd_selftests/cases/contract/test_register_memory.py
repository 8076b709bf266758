# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_REGISTER by the kind of memory: anonymous, the kernel's own, sealed, droppable, huge pages."""

from __future__ import annotations

import os
from errno import EINVAL
from pathlib import Path

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ANON, EACH_HUGETLB, HUGETLB, MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MINOR, MINOR_FAULTS, MISSING,
    PAGE_SIZE, UNREGISTERED, WP, WRITEPROTECT, Channel, Child, Context, Feature, KernelError, PagefaultFlag, Pagemap,
    Range, RegisterMode, Skip, Uffd, expect, expect_modes, expect_same, faulting, mended, new_mapping, peek, poke,
    promise, refuses, shared_page_table, syscalls, undisturbed, unmap,
)  # fmt: skip

MAP_DROPPABLE = 0x08  # include/uapi/linux/mman.h, Linux 6.11
MAP_HUGETLB = 0x40000


# ---- what can be registered ----------------------------------------------------------------------------------------


def expect_registrable(ctx: Context, where: Range) -> None:
    """Register a new mapping, resolve a fault there, and unmap it."""
    ctx.uffd.register(where, MISSING)
    expect_modes(where, MISSING)
    with faulting(ctx.uffd, where.start) as waiter:
        ctx.uffd.copy(where.start, ctx.src.start, where.len)
        expect(waiter.result(), peek(ctx.src.start), "the byte read")
    unmap(where)


@uffd_case("register-anonymous-kinds", mem=(ANON,), pages=1, rows=("REG-18",))
def test_register_anonymous_kinds(ctx: Context) -> None:
    """Shared anonymous memory and /dev/zero can be registered, and what is shared can be filled."""
    ctx.src.fill()
    fd = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
    with promise("REG-18", "MAP_SHARED | MAP_ANONYMOUS"):
        expect_registrable(ctx, new_mapping(PAGE_SIZE, MAP_SHARED | MAP_ANONYMOUS))
    with promise("REG-18", "/dev/zero, shared"):
        expect_registrable(ctx, new_mapping(PAGE_SIZE, MAP_SHARED, fd=fd))
    with promise("REG-18", "/dev/zero, private"):
        where = new_mapping(PAGE_SIZE, MAP_PRIVATE, fd=fd)
        ctx.uffd.register(where, MISSING)
        with faulting(ctx.uffd, where.start):
            ctx.uffd.release(where)


DEV_ZERO = Defect(
    id="D-REG-18",
    summary="a private mapping of /dev/zero can be registered as MISSING, but COPY, ZEROPAGE and POISON say EFAULT",
    kernels="6.12.117, 6.18.44, 7.3.4; not 6.1.192",
    advice="map anonymous memory with MAP_ANONYMOUS instead of /dev/zero",
    shows=r"UFFDIO_\w+\(.*\): EFAULT with \w+ = -EFAULT",
)


@uffd_case("register-dev-zero", mem=(ANON,), pages=1, rows=("REG-18",), defect=DEV_ZERO)
def test_register_dev_zero(ctx: Context) -> None:
    """A private mapping of /dev/zero can be filled as it can be registered."""
    ctx.src.fill()
    where = new_mapping(PAGE_SIZE, MAP_PRIVATE, fd=os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC))
    ctx.uffd.register(where, MISSING)
    with promise("REG-18"):
        ctx.uffd.copy(where.start, ctx.src.start, PAGE_SIZE)
        expect_same(ctx.src.start, where.start, PAGE_SIZE)


@uffd_case("register-anonymous-hugetlb", mem=EACH_HUGETLB, pages=1, rows=("REG-18",))
def test_register_anonymous_hugetlb(ctx: Context) -> None:
    """Huge pages mapped without a file can be registered and filled."""
    ctx.src.fill()
    flags = MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE | (MAP_SHARED if ctx.mem.shared else MAP_PRIVATE)
    expect_registrable(ctx, new_mapping(ctx.page_size, flags))


def expect_vdso_refused(uffd: Uffd, *modes: RegisterMode, note: str = "") -> None:
    """Assert that the pages which the kernel shares with every process can be registered in none of these modes."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(("[vdso]", "[vvar]", "[vvar_vclock]")):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            for mode in modes:
                with promise("REG-11", f"{line.split()[-1]}, {mode}{note}"), refuses(EINVAL):
                    uffd.register(Range(start, end - start), mode)


@uffd_case("register-vdso", rows=("REG-11",))
def test_register_vdso() -> None:
    """The pages that the kernel shares with every process are refused."""
    with Uffd.open() as uffd:
        expect_vdso_refused(uffd, MISSING, WP, MINOR, MISSING | WP)


@uffd_case("register-vdso-async", features=Feature.WP_ASYNC, rows=("REG-11",), bugs=(4,), kind=Kind.DETAIL)
def test_register_vdso_async() -> None:
    """They are refused with UFFD_FEATURE_WP_ASYNC too; a kernel that takes them lacks the fix of CVE-2026-68166."""
    with Uffd.open(Feature.WP_ASYNC) as uffd:
        expect_vdso_refused(uffd, WP, note=" (the fix of CVE-2026-68166)")


@uffd_case("register-sealed-address", mem=(ANON,), pages=1, rows=("REG-42",), kind=Kind.DETAIL)
def test_register_sealed_address(ctx: Context) -> None:
    """A mapping sealed with mseal(2) can be registered, filled and unregistered."""

    def target(_: Channel) -> None:
        syscalls.call("mseal", ctx.dst.start, PAGE_SIZE, 0)
        with Uffd.open() as uffd, promise("REG-42"):
            uffd.register(ctx.dst.range, MISSING)
            expect_modes(ctx.dst.range, MISSING)
            with faulting(uffd, ctx.dst.start):
                uffd.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE)
            uffd.unregister(ctx.dst.range)
            expect_modes(ctx.dst.range, UNREGISTERED)

    try:
        syscalls.call("mseal", 0, 0, 0)  # seals nothing
    except KernelError as error:
        raise Skip(f"{error}: Linux 6.10 has mseal(2)") from None
    with Child(target):
        pass


DROPPABLE = Defect(
    id="D-REG-19",
    summary="MAP_DROPPABLE memory can be registered: the check tests the flag after it was masked away",
    kernels="6.12.117; not 6.18.44, 7.3.4",
    advice="do not register memory mapped MAP_DROPPABLE: the kernel may drop its pages and report them missing again",
    shows=r"expected EINVAL; the call succeeded",
)


@uffd_case("register-droppable", rows=("REG-19",), defect=DROPPABLE)
def test_register_droppable() -> None:
    """Memory that the kernel may drop under pressure cannot be registered."""
    try:
        where = new_mapping(PAGE_SIZE, MAP_DROPPABLE | MAP_ANONYMOUS)
    except KernelError as error:
        raise Skip(f"MAP_DROPPABLE: {error} (Linux 6.11)") from None
    with Uffd.open() as uffd, mended(uffd), promise("REG-19"):
        for mode in (MISSING, WP):
            with refuses(EINVAL):
                uffd.register(where, mode)
        expect_modes(where, UNREGISTERED)


# ---- huge pages ----------------------------------------------------------------------------------------------------


@uffd_case("register-hugetlb-alignment", mem=EACH_HUGETLB, pages=2, rows=("REG-35",))
def test_register_hugetlb_alignment(ctx: Context) -> None:
    """A range must not start or end inside of a huge page."""
    start, huge = ctx.dst.start, ctx.page_size
    for what, bad in {
        "start inside": Range(start + PAGE_SIZE, huge),
        "start inside, end aligned": Range(start + PAGE_SIZE, huge - PAGE_SIZE),
        "one base page": Range(start, PAGE_SIZE),
        "end inside": Range(start, huge - PAGE_SIZE),
        "end inside of the second": Range(start, huge + PAGE_SIZE),
        "from other memory into it": Range(start - PAGE_SIZE, 2 * PAGE_SIZE),
    }.items():
        with promise("REG-35", what), refuses(EINVAL):
            ctx.uffd.register(bad, MISSING)
    expect_modes(Range(start - PAGE_SIZE, PAGE_SIZE), UNREGISTERED)
    expect_modes(ctx.dst.range, UNREGISTERED, UNREGISTERED)


@uffd_case("register-hugetlb-hole", mem=EACH_HUGETLB, pages=1, rows=("REG-35",), kind=Kind.DETAIL)
def test_register_hugetlb_hole(ctx: Context) -> None:
    """Where huge pages come first in it, a range must start at one, even if it starts in the hole before them."""
    hole = Range(ctx.dst.start - PAGE_SIZE, PAGE_SIZE)
    unmap(hole)
    with promise("REG-35"), refuses(EINVAL):
        ctx.uffd.register(Range(hole.start, hole.len + ctx.page_size), MISSING)
    expect_modes(ctx.dst.range, UNREGISTERED)


@uffd_case("register-wp-unshares", mem=(HUGETLB,), features=WRITEPROTECT, pages=1, rows=("REG-21",), kind=Kind.DETAIL)
def test_register_wp_unshares(ctx: Context) -> None:
    """Protection of huge pages does not reach another mapping that has shared the page table until then."""
    with shared_page_table(ctx.page_size) as (one, other):
        ctx.uffd.register(one, WP)
        ctx.uffd.writeprotect(Range(one.start, ctx.page_size))
        Pagemap.expect_uffd_wp(other.start, False, "in the mapping that is not registered")
        undisturbed(ctx.uffd, lambda: poke(other.start, b"\2"))
        Pagemap.expect_uffd_wp(one.start, True, "in the registered mapping")


@uffd_case("register-wp-shares-not", mem=(HUGETLB,), features=WRITEPROTECT, pages=1, rows=("REG-21",), kind=Kind.DETAIL)
def test_register_wp_shares_not(ctx: Context) -> None:
    """Two mappings of the same huge pages that are both registered for write protection are protected one by one."""
    with shared_page_table(ctx.page_size) as (one, other):
        for mapping in (one, other):
            ctx.uffd.register(mapping, WP)
            expect(peek(mapping.start), b"\1", "the byte in the file")
        ctx.uffd.writeprotect(Range(one.start, ctx.page_size))
        Pagemap.expect_uffd_wp(other.start, False, "in the mapping that is not protected")
        undisturbed(ctx.uffd, lambda: poke(other.start, b"\2"))
        Pagemap.expect_uffd_wp(one.start, True, "in the protected mapping")


@uffd_case(
    "register-minor-unshares", mem=(HUGETLB,), features=MINOR_FAULTS, pages=1, rows=("REG-32",), kind=Kind.DETAIL
)
def test_register_minor_unshares(ctx: Context) -> None:
    """A minor fault comes although another mapping, which has shared the page table until then, maps the page."""
    with shared_page_table(ctx.page_size) as (one, other):
        ctx.uffd.register(one, MINOR)
        poke(other.start + ctx.page_size, b"\2")
        page = Range(one.start + ctx.page_size, ctx.page_size)
        with faulting(ctx.uffd, page.start, flags=PagefaultFlag.MINOR):
            ctx.uffd.continue_(page)
