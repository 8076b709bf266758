# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_REGISTER for read-write protection: the modes, what they offer, what is refused, what a change leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import EBUSY, EINVAL, EPERM
from pathlib import Path

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC_RWP, EACH_HUGETLB, HUGETLB, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED,
    MINOR, MINOR_FAULTS, MISSING, PAGE_SIZE, PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE, READ_TRAPPED, RWP, SYNC_RWP,
    TRAPPED, UNREGISTERED, WP, WRITEPROTECT, Context, Feature, KernelError, Pagemap, Range, RangeIoctls, RegisterMode,
    Skip, Uffd, combinations, expect, expect_modes, expect_rwp_free, expect_rwp_trapped, expect_served, expect_trapped,
    faulting, in_modes, new_mapping, peek, plain_file, poke, promise, protect, refuses, rwp_protected, rwp_trapped,
    shared_page_table, smaps_fields, syscalls, sysv_segment, undisturbed,
)  # fmt: skip

RWP_MINOR = SYNC_RWP | MINOR_FAULTS
RWP_AND_WP = RWP_MINOR | WRITEPROTECT
MAP_DROPPABLE = 0x08  # include/uapi/linux/mman.h, Linux 6.11


def modes_with_rwp(ctx: Context) -> list[RegisterMode]:
    """Return every combination of modes that has RWP in it and can be registered."""
    others = (MISSING,) if ctx.mem is ANON else (MISSING, MINOR)
    return [RWP | RegisterMode(some) for some in combinations(*others)]


# ---- the modes -----------------------------------------------------------------------------------------------------


@uffd_case("register-rwp-modes", mem=ALL, features=RWP_MINOR, pages=5, rows=("REG-45",))
def test_register_rwp_modes(ctx: Context) -> None:
    """RWP can be registered alone, with MISSING and with MINOR: nothing is protected by that, and pages can be then."""
    area, inside, outside = ctx.dst, (1, 2, 3), (0, 4)
    area.fill()
    for mode in modes_with_rwp(ctx):
        with promise("REG-45", str(mode)):
            ctx.uffd.register(area.page(1, 3), mode)
            expect_modes(area.range, UNREGISTERED, mode, mode, mode, UNREGISTERED)
            Pagemap.expect_protected(area, (), "after UFFDIO_REGISTER")
            expect_rwp_free(ctx.uffd, area, *range(5))
            ctx.uffd.rwprotect(area.page(1, 2))
            Pagemap.expect_protected(area, (1, 2), "after UFFDIO_RWPROTECT")
            expect_rwp_free(ctx.uffd, area, 3, *outside)
            expect_rwp_trapped(ctx.uffd, area, 1, 2)
            ctx.uffd.unregister(area.range)
            expect_modes(area.range, *[UNREGISTERED] * 5)
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))
    if ctx.mem is ANON:
        for mode in (RWP | MINOR, RWP | MISSING | MINOR):
            with promise("REG-45", str(mode)), refuses(EINVAL):
                ctx.uffd.register(area.page(*inside[:1]), mode)
        expect_modes(area.range, *[UNREGISTERED] * 5)


@uffd_case("register-rwp-missing", mem=ALL, features=RWP_MINOR, pages=3, rows=("REG-45",))
def test_register_rwp_missing(ctx: Context) -> None:
    """RWP alone reports no missing page; with MISSING the page is reported, and filled it can be used at once."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.page(0), RWP)
    with promise("REG-45", "RWP alone"):
        undisturbed(ctx.uffd, lambda: ctx.dst.expect_zero(0, 1))
    ctx.uffd.register(ctx.dst.page(1), RWP | MISSING)
    with promise("REG-45", "RWP with MISSING"):
        expect_served(ctx, ctx.dst.page(1))
        Pagemap.expect_protected(ctx.dst, (), "after UFFDIO_COPY")
        expect_rwp_free(ctx.uffd, ctx.dst, 1)
        ctx.uffd.rwprotect(ctx.dst.page(0, 2))
        expect_rwp_trapped(ctx.uffd, ctx.dst, 0, 1)
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_zero(2, 1))


@uffd_case("register-rwp-unasked", mem=ALL, features=Feature(0), pages=2, rows=("REG-02", "API-19"))
def test_register_rwp_unasked(ctx: Context) -> None:
    """A handle that did not ask for UFFD_FEATURE_RWP cannot register for it: EINVAL, on every kernel."""
    for mode in (RWP, RWP | MISSING, RWP | WP):
        with promise("REG-02", str(mode)), refuses(EINVAL):
            ctx.uffd.register(ctx.dst.range, mode)
        expect_modes(ctx.dst.range, UNREGISTERED, UNREGISTERED)
    with promise("REG-02", "memory that is registered"):
        ctx.uffd.register(ctx.dst.range, MISSING)
        with refuses(EINVAL):
            ctx.uffd.register(ctx.dst.range, MISSING | RWP)
        expect_modes(ctx.dst.range, MISSING, MISSING)


@uffd_case("register-rwp-with-wp", mem=ALL, features=RWP_AND_WP, pages=3, rows=("REG-46",))
def test_register_rwp_with_wp(ctx: Context) -> None:
    """WP and RWP cannot be had together, whatever else is asked for: EINVAL, and nothing is registered or changed."""
    for kept in (UNREGISTERED, MISSING, WP, RWP):
        ctx.uffd.unregister(ctx.dst.range)
        if kept:
            ctx.uffd.register(ctx.dst.page(1), kept)
        for some in combinations(MISSING, MINOR):
            mode = WP | RWP | RegisterMode(some)
            for where in (ctx.dst.range, ctx.dst.page(0), ctx.dst.page(1)):
                with promise("REG-46", f"{mode}, {where} with {kept} in page 1"), refuses(EINVAL):
                    ctx.uffd.register(where, mode)
            expect_modes(ctx.dst.range, UNREGISTERED, kept, UNREGISTERED)


@uffd_case("register-rwp-with-wp-async", mem=ALL, features=ASYNC_RWP | Feature.WP_ASYNC, pages=1, rows=("REG-46",))
def test_register_rwp_with_wp_async(ctx: Context) -> None:
    """WP and RWP cannot be had together with a handle that resolves both by itself, either."""
    for mode in (WP | RWP, MISSING | WP | RWP):
        with promise("REG-46", str(mode)), refuses(EINVAL):
            ctx.uffd.register(ctx.dst.range, mode)
    expect_modes(ctx.dst.range, UNREGISTERED)


# ---- what is offered -----------------------------------------------------------------------------------------------

OF_RWP = 0x33C, 0x3BC
"""What memory is offered in mode RWP, and in mode RWP with MINOR: WAKE, COPY, ZEROPAGE, MOVE, POISON, RWPROTECT."""
OF_RWP_HUGETLB = 0x30C, 0x38C
NEWER = ~((1 << 11) - 1)
"""Bits of requests that Linux 7.3 does not know."""


def expect_offered(ctx: Context, where: Range, mode: RegisterMode, offers: tuple[int, int]) -> None:
    """Register a range, assert exactly what it is offered, and unregister it; of shared memory MOVE may be missing."""
    seen = int(ctx.uffd.register(where, mode)) & ~NEWER
    lacking = 0 if Feature.MOVE in ctx.uffd.offered else RangeIoctls.MOVE
    optional = int(RangeIoctls.MOVE) if ctx.mem is not ANON else 0
    expect(
        RangeIoctls(seen | optional),
        RangeIoctls(offers[MINOR in mode] & ~lacking | optional),
        f"ioctls offered in mode {mode}",
    )
    ctx.uffd.unregister(where)


@uffd_case("register-rwp-offers", mem=ALL, features=RWP_AND_WP, pages=1, rows=("REG-47", "REG-29", "REG-30", "REG-31"))
def test_register_rwp_offers(ctx: Context) -> None:
    """RWPROTECT is offered in mode RWP and in no other, beside what the memory is offered as ever."""
    with promise("REG-47"):
        for mode in modes_with_rwp(ctx):
            expect_offered(ctx, ctx.dst.range, mode, OF_RWP_HUGETLB if ctx.mem.hugetlb else OF_RWP)
        others = (MISSING, WP) if ctx.mem is ANON else (MISSING, WP, MINOR)
        for mode in map(RegisterMode, combinations(*others)[1:]):
            offered = ctx.uffd.register(ctx.dst.range, mode)
            expect(RangeIoctls.RWPROTECT in offered, False, f"RWPROTECT offered in mode {mode}")
            ctx.uffd.unregister(ctx.dst.range)


@uffd_case("register-rwp-mixed-offer", mem=EACH_HUGETLB, features=RWP_MINOR, pages=1, rows=("REG-47", "REG-33"))
def test_register_rwp_mixed_offer(ctx: Context) -> None:
    """One call over huge pages and others registers both for RWP and offers what holds for both, in either order."""
    before, behind = (
        new_mapping(PAGE_SIZE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, at=start)
        for start in (ctx.dst.start - PAGE_SIZE, ctx.dst.range.end)
    )
    for start, end in (before.start, ctx.dst.range.end), (ctx.dst.start, behind.end), (before.start, behind.end):
        where = Range(start, end - start)
        with promise("REG-47", str(where)):
            expect_offered(ctx, where, RWP | MISSING, OF_RWP_HUGETLB)
            ctx.uffd.register(where, RWP)
            expect_modes(ctx.dst.range, RWP)
            expect_modes(before, RWP if start == before.start else UNREGISTERED)
            expect_modes(behind, RWP if end == behind.end else UNREGISTERED)
            ctx.uffd.unregister(where)


# ---- registered again ----------------------------------------------------------------------------------------------


def drops(ctx: Context) -> Iterator[tuple[RegisterMode, RegisterMode]]:
    """Yield modes, and others that lack the WP or the RWP that is in them."""
    everything = [mode for mode in map(RegisterMode, combinations(MISSING, WP, MINOR, RWP)) if mode]
    possible = [mode for mode in everything if not (WP | RWP in mode or (ctx.mem is ANON and MINOR in mode))]
    for old in possible:
        for new in possible:
            if (old & (WP | RWP)).without(new):
                yield old, new


@contextmanager
def protected_and_asleep(ctx: Context, mode: RegisterMode) -> Iterator[Range]:
    """Register and protect pages 1 to 3 of five, and have a thread trapped in page 2 while the block runs."""
    area, where, started = ctx.dst, ctx.dst.page(1, 3), ctx.dst.page(2)
    area.fill()
    ctx.uffd.register(where, mode)
    if RWP in mode:
        ctx.uffd.rwprotect(where)
        with rwp_trapped(ctx.uffd, area, 2):
            yield where
            ctx.uffd.resolve(started)
    else:
        ctx.uffd.writeprotect(where)
        with faulting(ctx.uffd, started.start, write=True, flags=TRAPPED):
            yield where
            ctx.uffd.unprotect(started)


@uffd_case(
    "register-rwp-drops", mem=ALL, features=RWP_AND_WP, pages=5, rows=("REG-48", "REG-26", "REG-28"), bugs=(3,)
)
def test_register_rwp_drops(ctx: Context) -> None:
    """Modes that lack the WP or RWP of before are refused, EBUSY: mode, protection and sleepers stay as they are.

    After UFFDIO_UNREGISTER they can be registered.
    """
    area = ctx.dst
    for old, new in drops(ctx):
        with promise("REG-48", f"{old}, then {new}"):
            with protected_and_asleep(ctx, old) as where:
                for part in (where, area.page(1), area.page(3), area.range, area.page(0, 2), area.page(3, 2)):
                    with refuses(EBUSY):
                        ctx.uffd.register(part, new)
                expect_modes(area.range, UNREGISTERED, old, old, old, UNREGISTERED)
                Pagemap.expect_protected(area, (1, 2, 3), "after EBUSY")
                ctx.uffd.expect_still_asleep(1)
            check = expect_rwp_trapped if RWP in old else expect_trapped
            check(ctx.uffd, area, 1)
            Pagemap.expect_protected(area, (3,), "after EBUSY, and two pages resolved")
            ctx.uffd.unregister(area.range)
            ctx.uffd.register(where, new)
            expect_modes(area.range, UNREGISTERED, new, new, new, UNREGISTERED)
            Pagemap.expect_protected(area, (), "when registered anew")
            ctx.uffd.unregister(area.range)


@uffd_case(
    "register-rwp-drops-one", mem=ALL, features=RWP_AND_WP, pages=6, rows=("REG-49",), kind=Kind.DETAIL
)
def test_register_rwp_drops_one(ctx: Context) -> None:
    """Over several mappings it is EBUSY if one of them would lose WP or RWP, wherever it lies: all stay as before."""
    area = ctx.dst
    for kept in (WP, RWP, RWP | MISSING):
        new = RWP if kept == WP else WP
        for number in (1, 2, 4):
            area.fill(number, 1)
            ctx.uffd.register(area.page(number), kept)
            (ctx.uffd.writeprotect if kept == WP else ctx.uffd.rwprotect)(area.page(number))
            other = 3  # registered otherwise, and lacking nothing
            ctx.uffd.register(area.page(other), MISSING)
            before = [UNREGISTERED] * 6
            before[number], before[other] = kept, MISSING
            mappings = [fields["start"] for fields in smaps_fields(area.range)]
            with promise("REG-49", f"page {number} is {kept}"):
                for mode in (MISSING, new, new | MISSING):
                    for first, count in ((0, 6), (0, number + 1), (number, 6 - number), (1, 4)):
                        with refuses(EBUSY):
                            ctx.uffd.register(area.page(first, count), mode)
                expect_modes(area.range, *before)
                expect([fields["start"] for fields in smaps_fields(area.range)], mappings, "mappings of the area")
                Pagemap.expect_protected(area, (number,), "after EBUSY")
                (expect_trapped if kept == WP else expect_rwp_trapped)(ctx.uffd, area, number)
                expect_served(ctx, area.page(other))
            ctx.uffd.unregister(area.range)
            area.release()


@uffd_case("register-rwp-wider", mem=ALL, features=RWP_AND_WP, pages=5, spare_hugepages=5, rows=("REG-50", "REG-27"))
def test_register_rwp_wider(ctx: Context) -> None:
    """A mode more leaves protected pages and their sleepers as they are; RWP in place of MISSING reports no hole."""
    area = ctx.dst
    for mode in modes_with_rwp(ctx)[1:]:
        with promise("REG-50", f"RWP, then {mode}"):
            with protected_and_asleep(ctx, RWP):
                ctx.uffd.register(area.page(2, 2), mode)
                expect_modes(area.range, UNREGISTERED, RWP, mode, mode, UNREGISTERED)
                Pagemap.expect_protected(area, (1, 2, 3), "after a mode was added")
                ctx.uffd.expect_still_asleep(1)
            expect_rwp_trapped(ctx.uffd, area, 1, 3)
            ctx.uffd.unregister(area.range)
    area = ctx.allocate()
    with promise("REG-50", "MISSING, then RWP"):
        ctx.uffd.register(area.range, MISSING)
        ctx.uffd.register(area.page(1, 2), RWP)
        expect_modes(area.range, MISSING, RWP, RWP, MISSING, MISSING)
        undisturbed(ctx.uffd, lambda: area.expect_zero(1, 2))
        ctx.uffd.rwprotect(area.page(1, 2))
        Pagemap.expect_protected(area, (1, 2), "after UFFDIO_RWPROTECT")
        expect_rwp_trapped(ctx.uffd, area, 1, 2)
        expect_served(ctx, area.page(0))
        expect_served(ctx, area.page(3))


NARROWER = Defect(
    id="D-REG-51",
    summary="registering a MISSING and RWP range again as RWP succeeds but leaves it MISSING as well",
    kernels="7.3.4",
    advice="unregister the range first, then register it with the modes wanted",
    shows=r"expected UFFDIO_REGISTER_MODE_RWP, got UFFDIO_REGISTER_MODE_MISSING\|UFFDIO_REGISTER_MODE_RWP",
)


@uffd_case("register-rwp-narrower", mem=ALL, features=SYNC_RWP, pages=1, rows=("REG-51",), defect=NARROWER)
def test_register_rwp_narrower(ctx: Context) -> None:
    """After registering a MISSING and RWP range as RWP it has that mode only."""
    ctx.uffd.register(ctx.dst.range, MISSING | RWP)
    ctx.uffd.register(ctx.dst.range, RWP)
    with promise("REG-51"):
        expect_modes(ctx.dst.range, RWP)


@uffd_case("register-rwp-narrower-mode", mem=ALL, features=SYNC_RWP, pages=3, rows=("REG-51",), kind=Kind.DETAIL)
def test_register_rwp_narrower_mode(ctx: Context) -> None:
    """Registering a MISSING and RWP range as RWP succeeds, offers what RWP does, and keeps what is protected."""
    alone = ctx.uffd.register(ctx.dst.range, RWP)
    ctx.dst.fill(1, 1)
    ctx.uffd.register(ctx.dst.range, RWP | MISSING)
    ctx.uffd.rwprotect(ctx.dst.range)
    with promise("REG-51"):
        expect(ctx.uffd.register(ctx.dst.range, RWP), alone, "ioctls offered")
        expect(in_modes(ctx.dst.range) in (RWP, RWP | MISSING), True, "RWP, with MISSING or without, in smaps")
        Pagemap.expect_protected(ctx.dst, (1,), "after registering as RWP")
        expect_rwp_trapped(ctx.uffd, ctx.dst, 1)


# ---- what is refused -----------------------------------------------------------------------------------------------


@uffd_case("register-rwp-inaccessible", mem=ALL, features=SYNC_RWP, pages=5, rows=("REG-52",), kind=Kind.DETAIL)
def test_register_rwp_inaccessible(ctx: Context) -> None:
    """A mapping that nobody may access cannot be registered for RWP, nor others with it: EINVAL, nothing changed."""
    area = ctx.dst
    protect(area.page(2), PROT_NONE)
    for mode in (RWP, RWP | MISSING):
        for first, count in ((2, 1), (0, 5), (0, 3), (2, 3), (1, 2), (2, 2)):
            with promise("REG-52", f"{mode}, pages {first} to {first + count - 1}"), refuses(EINVAL):
                ctx.uffd.register(area.page(first, count), mode)
        expect_modes(area.range, *[UNREGISTERED] * 5)
    for prot in (PROT_READ, PROT_WRITE, PROT_EXEC):
        protect(area.page(2), prot)
        with promise("REG-52", f"prot {prot}"):
            ctx.uffd.register(area.range, RWP)
            expect_modes(area.range, *[RWP] * 5)
            ctx.uffd.unregister(area.range)


@uffd_case("register-rwp-now-inaccessible", mem=ALL, features=SYNC_RWP, pages=3, rows=("REG-52",), kind=Kind.DETAIL)
def test_register_rwp_now_inaccessible(ctx: Context) -> None:
    """Memory made inaccessible stays registered for RWP, protected as it is, but cannot be registered again: EINVAL."""
    area = rwp_protected(ctx)
    protect(area.page(1), PROT_NONE)
    for mode in (RWP, RWP | MISSING):
        for where in (area.page(1), area.range):
            with promise("REG-52", f"{mode}, {where}"), refuses(EINVAL):
                ctx.uffd.register(where, mode)
    with promise("REG-52"):
        expect_modes(area.range, RWP, RWP, RWP)
        protect(area.page(1), PROT_READ | PROT_WRITE)
        Pagemap.expect_protected(area, range(3), "after mprotect(2) there and back")
        expect_rwp_trapped(ctx.uffd, area, 0, 1, 2)
    area.expect_pattern_of(area)


def other_mappings(stack: ExitStack) -> Iterator[tuple[str, Range]]:
    """Yield mappings that cannot be registered for RWP, of what kinds this machine has."""
    fd = stack.enter_context(plain_file(PAGE_SIZE))
    yield "shared file", new_mapping(PAGE_SIZE, MAP_SHARED, fd=fd)
    yield "private file", new_mapping(PAGE_SIZE, MAP_PRIVATE, fd=fd)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(("[vdso]", "[vvar]", "[vvar_vclock]")):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            yield line.split()[-1], Range(start, end - start)
    with suppress(KernelError):
        yield "droppable memory", new_mapping(PAGE_SIZE, MAP_DROPPABLE | MAP_ANONYMOUS)
    with suppress(KernelError):
        secret = syscalls.call("memfd_secret", os.O_CLOEXEC)
        where = new_mapping(PAGE_SIZE, MAP_SHARED, fd=secret)
        os.ftruncate(secret, PAGE_SIZE)
        yield "secret memory", where
    with suppress(KernelError):
        yield "shadow stack", Range(syscalls.call("map_shadow_stack", 0, PAGE_SIZE, 0), PAGE_SIZE)
    with suppress(Skip):
        yield "System V segment", stack.enter_context(sysv_segment(PAGE_SIZE))


@uffd_case("register-rwp-other-memory", features=ASYNC_RWP | Feature.WP_ASYNC, rows=("REG-53",), kind=Kind.DETAIL)
def test_register_rwp_other_memory() -> None:
    """What is neither anonymous nor shared memory nor huge pages cannot be registered for RWP, asynchronous or not."""
    with ExitStack() as stack:
        handles = [stack.enter_context(Uffd.open(some)) for some in (SYNC_RWP, ASYNC_RWP | Feature.WP_ASYNC)]
        for what, where in other_mappings(stack):
            for uffd in handles:
                for mode in (RWP, RWP | MISSING, RWP | MINOR):
                    with promise("REG-53", f"{what}, {mode}"), refuses(EINVAL):
                        uffd.register(where, mode)
            with promise("REG-53", what):
                expect_modes(where, UNREGISTERED)


@uffd_case("register-rwp-beside-file", mem=ALL, features=SYNC_RWP, pages=3, rows=("REG-53",), kind=Kind.DETAIL)
def test_register_rwp_beside_file(ctx: Context) -> None:
    """With a file first, in the middle or last in the range nothing of it is registered for RWP: EINVAL."""
    area = ctx.dst
    area.fill()
    with plain_file(area.page_size) as fd:
        new_mapping(area.page_size, MAP_SHARED | MAP_FIXED, fd=fd, at=area.page(1).start)
        for first, count in ((0, 2), (1, 2), (0, 3)):
            with promise("REG-53", f"pages {first} to {first + count - 1}, page 1 is a file"), refuses(EINVAL):
                ctx.uffd.register(area.page(first, count), RWP)
        expect_modes(area.range, *[UNREGISTERED] * 3)


@uffd_case("register-rwp-errnos", mem=ALL, features=SYNC_RWP, pages=4, rows=("REG-54", "REG-22"), kind=Kind.DETAIL)
def test_register_rwp_errnos(ctx: Context) -> None:
    """RWP is refused as other modes are: EBUSY for memory of another handle, EPERM and EINVAL before that."""
    area = ctx.dst
    area.fill()
    with Uffd.open(SYNC_RWP) as owner:
        owner.register(area.page(1), RWP)
        owner.rwprotect(area.page(1))
        for first, count in ((1, 1), (0, 4), (0, 2), (1, 3)):
            for mode in (RWP, RWP | MISSING, MISSING):
                with promise("REG-54", f"pages {first} to {first + count - 1}, {mode}"), refuses(EBUSY):
                    ctx.uffd.register(area.page(first, count), mode)
        expect_modes(area.range, UNREGISTERED, RWP, UNREGISTERED, UNREGISTERED)
        Pagemap.expect_protected(area, (1,), "after EBUSY")
        with promise("REG-54", "the owner's trap"), rwp_trapped(owner, area, 1):
            ctx.uffd.expect_no_message()
            owner.resolve(area.page(1))
        protect(area.page(1), PROT_NONE)
        with promise("REG-54", "inaccessible, and of another handle"), refuses(EINVAL):
            ctx.uffd.register(area.page(1), RWP)
        protect(area.page(1), PROT_READ | PROT_WRITE)
        if ctx.mem.hugetlb:
            with promise("REG-54", "part of a huge page, of another handle"), refuses(EINVAL):
                ctx.uffd.register(Range(area.page(1).start, PAGE_SIZE), RWP)
            with promise("REG-54", "start inside of a huge page"), refuses(EINVAL):
                ctx.uffd.register(Range(area.page(1).start + PAGE_SIZE, area.page_size - PAGE_SIZE), RWP)
    if area.fd is not None and ctx.mem.shared:
        fd = os.open(f"/proc/self/fd/{area.fd}", os.O_RDONLY | os.O_CLOEXEC)
        sealed = new_mapping(area.page_size, MAP_SHARED | MAP_NORESERVE, prot=PROT_READ, fd=fd)
        with promise("REG-54", "shared, from a descriptor for reading only"), refuses(EPERM):
            ctx.uffd.register(sealed, RWP)
        protect(sealed, PROT_NONE)
        with promise("REG-54", "the same, inaccessible"), refuses(EINVAL):
            ctx.uffd.register(sealed, RWP)
        expect_modes(sealed, UNREGISTERED)


# ---- page tables that mappings of huge pages share -----------------------------------------------------------------


@uffd_case("register-rwp-unshares", mem=(HUGETLB,), features=SYNC_RWP, pages=1, rows=("REG-55",), kind=Kind.DETAIL)
def test_register_rwp_unshares(ctx: Context) -> None:
    """RWP of huge pages does not reach another mapping that has shared the page table until then, registered or not."""
    for both in (False, True):
        with shared_page_table(ctx.page_size) as (one, other), promise("REG-55", f"both registered: {both}"):
            for mapping in (one, other)[: 1 + both]:
                ctx.uffd.register(mapping, RWP)
                expect(peek(mapping.start), b"\1", "the byte in the file")
            ctx.uffd.rwprotect(Range(one.start, ctx.page_size))
            Pagemap.expect_uffd_wp(one.start, True, "in the protected mapping")
            Pagemap.expect_uffd_wp(other.start, False, "in the other mapping")
            undisturbed(ctx.uffd, lambda: poke(other.start, b"\1"))
            Pagemap.expect_uffd_wp(one.start, True, "in the protected mapping, after an access to the other")
            with faulting(ctx.uffd, one.start, flags=READ_TRAPPED):
                ctx.uffd.resolve(Range(one.start, ctx.page_size))
            ctx.uffd.unregister(one)
            if both:
                ctx.uffd.unregister(other)
