# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_API and read-write protection: what has to be asked for, and what comes before the handshake."""

from __future__ import annotations

import ctypes
from errno import EINVAL, ENOENT, EPERM
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC_RWP, MINOR, MISSING, PAGE_SIZE, RWP, SYNC_RWP, UFFDIO_API, UFFD_API, UNREGISTERED, Context,
    Feature, Pagemap, Range, Uffd, expect, expect_modes, promise, refuses, run_as, rwp_filled, touch, uapi, undisturbed,
    without_cap_sys_ptrace,
)  # fmt: skip

ALONE = Feature.RWP_ASYNC
STRUCT = ctypes.sizeof(uapi.uffdio_api)


def expect_refused(uffd: Uffd, number: int, features: Feature) -> None:
    """Assert that UFFDIO_API is refused with this errno, leaves the struct all zero and the handle as it was."""
    arg = uapi.uffdio_api(UFFD_API, features, 0xFFFF_FFFF_FFFF_FFFF)
    with promise("API-18", f"features {features}"):
        with refuses(number):
            uffd.ioctl(UFFDIO_API, arg, f"UFFDIO_API(features={features})")
        expect(bytes(arg), bytes(STRUCT), "the struct afterwards")
        with refuses(EINVAL):
            uffd.wake(Range(0, PAGE_SIZE))
        expect(uffd.fdinfo.features, 0, "features in fdinfo")


@uffd_case("api-rwp-async-alone", mem=(ANON,), features=ASYNC_RWP, pages=3, rows=("API-18",))
def test_api_rwp_async_alone(ctx: Context) -> None:
    """RWP_ASYNC without RWP is EINVAL, whatever else is asked for; the handle can then still make its handshake."""
    offered = ctx.uffd.offered.without(ASYNC_RWP)
    others = [Feature(1 << bit) for bit in range(64) if offered >> bit & 1]
    with Uffd.create() as uffd:
        expect_refused(uffd, EINVAL, ALONE)
        for other in others:
            if other != Feature.EVENT_FORK:
                expect_refused(uffd, EINVAL, ALONE | other)
        uffd.api(ASYNC_RWP)
        area = ctx.dst
        area.fill()
        uffd.register(area.range, RWP)
        uffd.rwprotect(area.range)
        with promise("API-18", "with RWP"):
            undisturbed(uffd, partial(touch, area.page(1), PAGE_SIZE))
            Pagemap.expect_protected(area, {0, 2}, "after a read of page 1")
    with Uffd.create() as uffd:
        expect_refused(uffd, EINVAL, ALONE)
        uffd.api(SYNC_RWP)
        expect(uffd.fdinfo.features & ASYNC_RWP, int(SYNC_RWP), "API-18: features in fdinfo, RWP alone asked for")


@uffd_case("api-rwp-async-order", features=ASYNC_RWP, rows=("API-18",), kind=Kind.DETAIL)
def test_api_rwp_async_order() -> None:
    """Without privilege UFFD_FEATURE_EVENT_FORK is EPERM before the rest is looked at."""

    def life() -> None:
        for features in (ALONE | Feature.EVENT_FORK, ASYNC_RWP | Feature.EVENT_FORK):
            with Uffd.create() as uffd:
                expect_refused(uffd, EPERM, features)
                uffd.api(ASYNC_RWP)

    run_as(without_cap_sys_ptrace, life)


@uffd_case("api-rwp-unasked", mem=ALL, features=SYNC_RWP, pages=3, rows=("API-19",))
def test_api_rwp_unasked(ctx: Context) -> None:
    """RWP is offered to whoever asks for nothing, and must be asked for all the same: else its mode is EINVAL."""
    area = ctx.dst
    area.fill()
    modes = [RWP, MISSING | RWP] + ([MISSING | MINOR | RWP] if ctx.mem.shared else [])
    for features in (Feature(0), Feature.WP_ASYNC, Feature.THREAD_ID):
        with Uffd.open(features) as uffd:
            expect(uffd.offered & ASYNC_RWP, int(ASYNC_RWP), f"API-19: what of RWP is offered, features {features}")
            for mode in modes:
                with promise("API-19", f"features {features}, {mode}"):
                    with refuses(EINVAL):
                        uffd.register(area.range, mode)
                    expect_modes(area.range, *[UNREGISTERED] * 3)
            ioctls = uffd.register(area.range, MISSING)
            expect(uapi.RangeIoctls.RWPROTECT in ioctls, False, "API-19: whether RWPROTECT is offered for the range")
            with promise("API-19", "UFFDIO_RWPROTECT of a range registered MISSING"), refuses(ENOENT):
                uffd.rwprotect(area.range)
            Pagemap.expect_protected(area, (), "after that")
    ioctls = ctx.uffd.register(area.range, RWP)
    expect(uapi.RangeIoctls.RWPROTECT in ioctls, True, "API-19: whether RWPROTECT is offered where RWP was asked for")
    expect_modes(area.range, *[RWP] * 3)


@uffd_case("api-rwp-first", mem=(ANON,), features=SYNC_RWP, pages=2, rows=("API-20",), kind=Kind.DETAIL)
def test_api_rwp_first(ctx: Context) -> None:
    """Before UFFDIO_API, SET_MODE and RWPROTECT are EINVAL and do not look at their argument."""
    area = rwp_filled(ctx)
    argument = ctypes.create_string_buffer(bytes(range(0xA0, 0xC0)), 32)
    with Uffd.create() as uffd:
        for name in ("UFFDIO_SET_MODE", "UFFDIO_RWPROTECT"):
            request = getattr(uapi, name)
            for address in (0, area.range.end, ctypes.addressof(argument)):
                with promise("API-20", f"{name} at {address:#x}"), refuses(EINVAL):
                    uffd.raw_ioctl(request, address)
        with promise("API-20", "a good UFFDIO_RWPROTECT"), refuses(EINVAL):
            uffd.rwprotect(area.range)
        for enable, disable in ((ALONE, Feature(0)), (Feature(0), ALONE), (Feature(0), Feature(0))):
            with promise("API-20", "a good UFFDIO_SET_MODE"), refuses(EINVAL):
                uffd.set_mode(enable, disable)
        expect(uffd.fdinfo.features, 0, "API-20: features in fdinfo")
        expect(argument.raw, bytes(range(0xA0, 0xC0)), "API-20: the argument")
        Pagemap.expect_protected(area, (), "API-20: after requests that were refused")
        uffd.api(ASYNC_RWP)
