# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_API: the handshake before everything else, and the features that it enables."""

from __future__ import annotations

import ctypes
import os
from errno import EFAULT, EINVAL, EPERM
from functools import partial
from signal import SIGBUS
from termios import FIONREAD

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, DEFAULT_FLAGS, HUGETLB, KERNEL_FAULTS, MINOR, MISSING, PAGE_SIZE, SHMEM, UFFDIO_API, UFFD_API,
    UNREGISTERED, UNTOUCHED, WP, ApiIoctls, Context, Feature, MemType, PagefaultFlag, Pagemap, Range, RangeIoctls,
    Skip, Uffd, UffdError, Waiter, become_nobody, errno_name, eventually, expect, expect_bytes, expect_errno,
    expect_modes, expect_one_of, faulting, lib, outcome, peek, poke, promise, read_only, refuses, run_as,
    touch_trapped, uapi, without_cap_sys_ptrace,
)  # fmt: skip

STRUCT = ctypes.sizeof(uapi.uffdio_api)

SINCE_4_14 = Feature(0x1FE)
"""The features that every kernel since Linux 4.14 offers: events, missing pages, SIGBUS, THREAD_ID."""

INITIALIZED = 1 << 31
"""What fdinfo shows among the features once the handshake has been made; no feature."""


# ---- features ------------------------------------------------------------------------------------------------------


def each(features: Feature) -> list[Feature]:
    """Return the single features of several."""
    return [Feature(1 << bit) for bit in range(64) if features.value >> bit & 1]


def offered() -> Feature:
    """Return what the kernel offers."""
    with Uffd.open() as uffd:
        return uffd.offered


def unknown_features() -> list[Feature]:
    """Return each feature that the kernel does not offer."""
    return each(Feature(0xFFFF_FFFF_FFFF_FFFF).without(offered()))


def permitted() -> Feature:
    """Return what the kernel offers to this process: UFFD_FEATURE_EVENT_FORK wants a privilege."""
    features = offered()
    try:
        Uffd.open(Feature.EVENT_FORK).close()
    except UffdError as error:
        expect_errno(error, EPERM, f"errno of {error.call}")
        return features.without(Feature.EVENT_FORK)
    return features


def with_companions(feature: Feature) -> Feature:
    """Return a feature and what must be asked for beside it."""
    return feature | Feature.RWP if feature == Feature.RWP_ASYNC else feature


def with_implied(features: Feature) -> Feature:
    """Return features and those that they switch on."""
    return features | Feature.WP_UNPOPULATED if Feature.WP_ASYNC in features else features


def shown(uffd: Uffd) -> Feature:
    """Return the features of a handle, as fdinfo tells them."""
    return Feature(uffd.fdinfo.features & ~INITIALIZED)


def require(uffd: Uffd, wanted: Feature) -> None:
    """Skip where the kernel does not offer a feature that the case does not enable, for that is what it is about."""
    if missing := wanted.without(uffd.offered):
        raise Skip(f"kernel lacks {missing} (Linux {missing.since})")


# ---- refusals ------------------------------------------------------------------------------------------------------


def expect_refused(uffd: Uffd, number: int, features: Feature = Feature(0), api: int = UFFD_API) -> None:
    """Assert that UFFDIO_API is refused with this errno and leaves the struct all zero."""
    arg = uapi.uffdio_api(api, features, 0xFFFF_FFFF_FFFF_FFFF)
    with refuses(number):
        uffd.ioctl(UFFDIO_API, arg, f"UFFDIO_API(api={api:#x}, features={features})")
    expect((arg.api, arg.features, arg.ioctls), (0, 0, 0), "api, features and ioctls afterwards")


def expect_uninitialized(uffd: Uffd) -> None:
    """Assert that the handle is as before its handshake, that is, takes no other request."""
    with refuses(EINVAL):
        uffd.wake(Range(0, PAGE_SIZE))


@uffd_case("api-answer", rows=("API-01",))
def test_api_answer() -> None:
    """UFFDIO_API answers with its version, every feature of the kernel, and its requests: no more, no less."""
    for flags in (DEFAULT_FLAGS, DEFAULT_FLAGS & ~os.O_NONBLOCK):
        with Uffd.create(flags) as uffd:
            answer = uffd.api()
            expect(answer.api, 0xAA, "API-01: api")
            expect(Feature(answer.features) & SINCE_4_14, SINCE_4_14, "API-01: features since Linux 4.14")
            ioctls = ApiIoctls(answer.ioctls)
            if uffd.knows(uapi.UFFDIO_SET_MODE):  # Linux 7.3
                ioctls = ioctls.without(ApiIoctls.SET_MODE)
            expect(ioctls, ApiIoctls.API | ApiIoctls.REGISTER | ApiIoctls.UNREGISTER, "API-01: ioctls")


@uffd_case("api-version", rows=("API-02",))
def test_api_version() -> None:
    """UFFDIO_API knows no version but 0xAA; it refuses all others and zeroes the struct."""
    with Uffd.create() as uffd:
        for api in (0, 1, 0xAB, (1 << 64) - 1, *(UFFD_API ^ 1 << bit for bit in range(64))):
            with promise("API-02", f"api {api:#x}"):
                expect_refused(uffd, EINVAL, api=api)
                expect_refused(uffd, EINVAL, Feature.THREAD_ID, api)
                expect_uninitialized(uffd)


@uffd_case("api-unknown-features", rows=("API-03",), bugs=(28,))
def test_api_unknown_features() -> None:
    """UFFDIO_API refuses each feature that it does not offer, alone or among good ones, and zeroes the struct."""
    good = permitted()
    with Uffd.create() as uffd:
        for feature in unknown_features():
            with promise("API-03", str(feature)):
                expect_refused(uffd, EINVAL, feature)
                expect_refused(uffd, EINVAL, feature | good)
                expect_uninitialized(uffd)


@uffd_case("api-twice", mem=(ANON,), features=Feature.THREAD_ID, pages=1, rows=("API-04",))
def test_api_twice(ctx: Context) -> None:
    """A second UFFDIO_API is refused, good or bad, and the handle goes on with the features of the first."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for features, api in (
        (Feature.THREAD_ID, UFFD_API),
        (Feature(0), UFFD_API),
        (Feature.SIGBUS, UFFD_API),
        (unknown_features()[0], UFFD_API),
        (Feature.THREAD_ID, 0xAB),
    ):
        with promise("API-04", f"api {api:#x}, features {features}"), refuses(EINVAL):
            ctx.uffd.ioctl(UFFDIO_API, uapi.uffdio_api(api, features), "the second UFFDIO_API")
    with promise("API-04"), faulting(ctx.uffd, ctx.dst.start) as waiter:
        expect(waiter.fault and waiter.fault.ptid, waiter.tid, "ptid of the message")
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE)


@uffd_case("api-twice-struct", rows=("API-04",), kind=Kind.DETAIL)
def test_api_twice_struct() -> None:
    """A second UFFDIO_API zeroes its struct and changes no feature."""
    for first in each(permitted()):
        features = with_companions(first)
        with promise("API-04", f"first {features}"), Uffd.open(features) as uffd:
            for second in (features, Feature(0), Feature.EVENT_REMOVE | Feature.EXACT_ADDRESS, Feature(1 << 63)):
                expect_refused(uffd, EINVAL, second)
                expect_refused(uffd, EINVAL, second, 0xAB)
            expect(shown(uffd), with_implied(features), "features in fdinfo")


@uffd_case("api-again", mem=(ANON,), pages=1, rows=("API-05",), kind=Kind.DETAIL)
def test_api_again(ctx: Context) -> None:
    """A handshake that failed, in whichever way, leaves a handle for a good one."""
    with Uffd.create() as uffd:
        with promise("API-05"):
            expect_refused(uffd, EINVAL, api=0xAB)
            expect_refused(uffd, EINVAL, unknown_features()[-1])
            with refuses(EFAULT):
                uffd.raw_ioctl(UFFDIO_API, 0)
            expect(uffd.fdinfo.features, 0, "features in fdinfo")
            uffd.api(Feature.THREAD_ID)
            expect(shown(uffd), Feature.THREAD_ID, "features in fdinfo")
        uffd.register(ctx.dst.range, MISSING)
        with faulting(uffd, ctx.dst.start):
            uffd.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE)


@uffd_case("api-pointer", mem=(ANON,), pages=1, rows=("API-06",))
def test_api_pointer(ctx: Context) -> None:
    """UFFDIO_API says EFAULT where it cannot read the whole struct, and the handle stays as it was."""
    good = bytes(uapi.uffdio_api(UFFD_API))
    with Uffd.create() as uffd:
        for address in (0, 1, (1 << 63), (1 << 64) - STRUCT, ctx.src.range.end):
            with promise("API-06", f"struct at {address:#x}"), refuses(EFAULT):
                uffd.raw_ioctl(UFFDIO_API, address)
        for inside in range(1, STRUCT):
            address = ctx.src.range.end - inside
            poke(address, good[:inside])
            with promise("API-06", f"{inside} bytes of the struct readable"):
                with refuses(EFAULT):
                    uffd.raw_ioctl(UFFDIO_API, address)
                expect(peek(address, inside), good[:inside], "these bytes afterwards")
                expect_uninitialized(uffd)
        with promise("API-06"):
            uffd.api()


@uffd_case("api-read-only", rows=("API-07",), kind=Kind.DETAIL)
def test_api_read_only() -> None:
    """UFFDIO_API says EFAULT where it cannot write its answer, good or bad, and the handle stays as it was."""
    with Uffd.create() as uffd:
        for what, arg in {
            "good": uapi.uffdio_api(UFFD_API),
            "another api": uapi.uffdio_api(0xAB),
            "an unknown feature": uapi.uffdio_api(UFFD_API, unknown_features()[0]),
        }.items():
            with promise("API-07", what), read_only(bytes(arg)) as address:
                with refuses(EFAULT):
                    uffd.raw_ioctl(UFFDIO_API, address)
                expect_uninitialized(uffd)
        with promise("API-07"):
            uffd.api()


# ---- the privilege -------------------------------------------------------------------------------------------------


@uffd_case("api-event-fork", needs=("cap_sys_ptrace",), rows=("API-08",))
def test_api_event_fork() -> None:
    """With CAP_SYS_PTRACE a handle can have UFFD_FEATURE_EVENT_FORK, alone or with all the others."""
    for features in (Feature.EVENT_FORK, offered()):
        with promise("API-08", str(features)), Uffd.open(features):
            pass


def expect_no_event_fork() -> None:
    """Assert that UFFD_FEATURE_EVENT_FORK is refused, and everything else to be had."""
    for features in (Feature.EVENT_FORK, offered()):
        with promise("API-08", f"features {features}"), Uffd.create() as uffd:
            expect_refused(uffd, EPERM, features)
            expect_uninitialized(uffd)
            answer = uffd.api(features.without(Feature.EVENT_FORK))
            expect(Feature(answer.features), offered(), "features offered")


@uffd_case("api-event-fork-unprivileged", rows=("API-08",))
def test_api_event_fork_unprivileged() -> None:
    """Without CAP_SYS_PTRACE UFFD_FEATURE_EVENT_FORK is EPERM, the struct is zeroed, and all else can be had."""
    run_as(without_cap_sys_ptrace, expect_no_event_fork)


@uffd_case("api-event-fork-nobody", needs=("cap_sys_ptrace", "syscall"), rows=("API-08",))
def test_api_event_fork_nobody() -> None:
    """An ordinary user gets EPERM for UFFD_FEATURE_EVENT_FORK, and everything else."""
    run_as(become_nobody, expect_no_event_fork)


@uffd_case("api-event-fork-order", rows=("API-09",), kind=Kind.DETAIL)
def test_api_event_fork_order() -> None:
    """Without CAP_SYS_PTRACE EVENT_FORK is EINVAL with another api, and EPERM (once EINVAL) with an unknown feature."""

    def life() -> None:
        with Uffd.create() as uffd:
            with promise("API-09", "another api"):
                expect_refused(uffd, EINVAL, Feature.EVENT_FORK, 0xAB)
            arg = uapi.uffdio_api(UFFD_API, Feature.EVENT_FORK | unknown_features()[0])
            result = shake(uffd, ctypes.addressof(arg))
            expect_one_of(result, ("EPERM", "EINVAL"), "API-09: EVENT_FORK with an unknown feature")
            expect(bytes(arg), bytes(STRUCT), "API-09: the struct afterwards")

    run_as(without_cap_sys_ptrace, life)


# ---- before and after ----------------------------------------------------------------------------------------------


def requests() -> dict[str, int]:
    """Return every request of a userfaultfd but UFFDIO_API."""
    return {name: code for code, name in uapi.IOCTL_NAMES.items() if name.startswith("UFFDIO_") and code != UFFDIO_API}


@uffd_case("api-first", mem=(ANON,), pages=2, rows=("API-10",))
def test_api_first(ctx: Context) -> None:
    """Before UFFDIO_API every other request is refused with EINVAL and does not look at its argument."""
    canary = bytes(range(0xA0, 0xE0))
    argument = ctypes.create_string_buffer(canary, len(canary))
    with Uffd.create() as uffd:
        for name, request in requests().items():
            for address in (0, ctx.src.range.end, ctypes.addressof(argument)):
                with promise("API-10", f"{name} at {address:#x}"), refuses(EINVAL):
                    uffd.raw_ioctl(request, address)
            expect(argument.raw, canary, f"API-10: the argument of {name}")
        with promise("API-10", "a good UFFDIO_REGISTER"), refuses(EINVAL):
            uffd.register(ctx.dst.range, MISSING)
        expect_modes(ctx.dst.range, UNREGISTERED)
        with promise("API-10", "a good UFFDIO_COPY"), refuses(EINVAL, output=UNTOUCHED):
            uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@uffd_case("api-unknown-request", mem=(ANON,), pages=1, rows=("API-16",), kind=Kind.DETAIL)
def test_api_unknown_request(ctx: Context) -> None:
    """A request that there is not, or of another size or direction than there is, is EINVAL and not ENOTTY."""
    known = {UFFDIO_API, *requests().values()}
    unknown = {FIONREAD, *(0xAA00 | number for number in range(0x30, 0x3F)), *(code ^ 0x100 for code in known)}
    for code in known:
        unknown |= {code ^ direction << 30 for direction in (1, 2, 3)}
        unknown |= {code ^ size << 16 for size in (1, 4, 8, 16, 32)}
    argument = ctypes.create_string_buffer(64)
    for code in unknown - known:
        for address in (0, ctypes.addressof(argument)):
            with promise("API-16", f"ioctl {code:#x}"), refuses(EINVAL):
                ctx.uffd.raw_ioctl(code, address)
    expect(argument.raw, bytes(64), "API-16: the argument afterwards")


@uffd_case("api-two-steps", rows=("API-13",))
def test_api_two_steps() -> None:
    """Who asks a handle what there is must enable it on another: the first has had its handshake."""
    with Uffd.create() as probe:
        features = Feature(probe.api().features)
        with promise("API-13"), refuses(EINVAL):
            probe.api(features.without(Feature.EVENT_FORK))
    with promise("API-13"), Uffd.open(features & permitted()) as uffd:
        expect(uffd.offered, features, "features offered")


# ---- what is enabled -----------------------------------------------------------------------------------------------


@uffd_case("api-features", rows=("API-11",))
def test_api_features() -> None:
    """Each feature can be enabled alone, and all together; the answer is always what the kernel offers."""
    every, mine = offered(), permitted()
    for features in [Feature(0), *map(with_companions, each(mine)), mine]:
        with promise("API-11", f"features {features}"), Uffd.open(features) as uffd:
            expect(uffd.offered, every, "features offered")


@uffd_case("api-features-shown", rows=("API-11", "API-12"), kind=Kind.DETAIL)
def test_api_features_shown() -> None:
    """Fdinfo shows the features that were asked for, and no others but WP_UNPOPULATED beside WP_ASYNC."""
    mine = permitted()
    for features in [Feature(0), *map(with_companions, each(mine)), mine]:
        row = "API-12" if features == Feature.WP_ASYNC else "API-11"
        with promise(row, f"features {features}"), Uffd.open(features) as uffd:
            expect(shown(uffd), with_implied(features), "features in fdinfo")


@uffd_case("api-wp-async", mem=(ANON,), features=Feature.WP_ASYNC, needs=("pagemap",), pages=2, rows=("API-12",))
def test_api_wp_async(ctx: Context) -> None:
    """UFFD_FEATURE_WP_ASYNC implies UFFD_FEATURE_WP_UNPOPULATED: anonymous memory is protected without pages too."""
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.page(1))
    with promise("API-12"):
        Pagemap.expect_protected(ctx.dst, [1], "protected without a page")


@uffd_case("api-feature-effects", mem=(ANON,), pages=1, rows=("API-14",), kind=Kind.DETAIL)
def test_api_feature_effects(ctx: Context) -> None:
    """What the message of a missing page looks like is up to THREAD_ID, EXACT_ADDRESS and SIGBUS, each by itself."""
    touched = ctx.dst.start + 5
    for features in [Feature(0), *map(with_companions, each(permitted().without(Feature.SIGBUS)))]:
        with promise("API-14", f"features {features}"), Uffd.open(features) as uffd:
            uffd.register(ctx.dst.range, MISSING)
            at = touched if Feature.EXACT_ADDRESS in features else ctx.dst.start
            with faulting(uffd, touched, at=at) as waiter:
                tid = waiter.tid if Feature.THREAD_ID in features else 0
                expect(waiter.fault and waiter.fault.ptid, tid, "ptid of the message")
                uffd.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE)
        ctx.dst.release()


@uffd_case("api-unasked-missing", mem=ALL, pages=2, rows=("API-14",), kind=Kind.DETAIL)
def test_api_unasked_missing(ctx: Context) -> None:
    """Missing pages of shmem and hugetlb are served without UFFD_FEATURE_MISSING_SHMEM and _HUGETLBFS."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("API-14"), faulting(ctx.uffd, ctx.dst.start):
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
    ctx.dst.expect_pattern_of(ctx.src, 0, 1)


@uffd_case("api-unasked-minor", mem=(SHMEM, HUGETLB), pages=1, rows=("API-14",), kind=Kind.DETAIL)
def test_api_unasked_minor(ctx: Context) -> None:
    """Minor faults are served without UFFD_FEATURE_MINOR_SHMEM and _HUGETLBFS."""
    require(ctx.uffd, Feature.MINOR_HUGETLBFS if ctx.mem.hugetlb else Feature.MINOR_SHMEM)
    poke(ctx.dst.alias.start, b"\1")
    ctx.uffd.register(ctx.dst.range, MINOR)
    with promise("API-14"), faulting(ctx.uffd, ctx.dst.start, flags=PagefaultFlag.MINOR) as waiter:
        ctx.uffd.continue_(ctx.dst.page(0))
        expect(waiter.result(), b"\1", "the byte read")


@uffd_case("api-unasked-wp", mem=ALL, pages=1, spare_hugepages=1, rows=("API-14",), kind=Kind.DETAIL)
def test_api_unasked_wp(ctx: Context) -> None:
    """Protected pages are served without UFFD_FEATURE_PAGEFAULT_FLAG_WP and _WP_HUGETLBFS_SHMEM."""
    require(ctx.uffd, wp_feature(ctx.mem))
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    with promise("API-14"), faulting(ctx.uffd, ctx.dst.start, write=True, flags=PagefaultFlag.WRITE | PagefaultFlag.WP):
        ctx.uffd.unprotect(ctx.dst.range)
    ctx.dst.expect_pattern(ctx.dst.range)


@uffd_case("api-unasked-poison", mem=ALL, pages=2, rows=("API-14",), kind=Kind.DETAIL)
def test_api_unasked_poison(ctx: Context) -> None:
    """Pages can be poisoned without UFFD_FEATURE_POISON."""
    require(ctx.uffd, Feature.POISON)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("API-14"):
        ctx.uffd.poison(ctx.dst.page(0))
        (trap,) = touch_trapped(ctx.dst.page(0), ctx.page_size)
        expect(trap and trap.signo, SIGBUS, "the signal")


@uffd_case("api-unasked-move", mem=(ANON,), pages=1, rows=("API-14",), kind=Kind.DETAIL)
def test_api_unasked_move(ctx: Context) -> None:
    """Pages can be moved without UFFD_FEATURE_MOVE."""
    require(ctx.uffd, Feature.MOVE)
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("API-14"):
        ctx.uffd.move(ctx.dst.start, ctx.src.start, PAGE_SIZE)
        ctx.dst.expect_pattern_of(ctx.src)
        expect_bytes(ctx.src.range, 0, "the source")


# ---- what is offered -----------------------------------------------------------------------------------------------


def wp_feature(mem: MemType) -> Feature:
    """Return the feature that says that this memory can be protected."""
    return Feature.PAGEFAULT_FLAG_WP if mem is ANON else Feature.WP_HUGETLBFS_SHMEM


@uffd_case("api-offer", rows=("API-17",), kind=Kind.VERSION)
def test_api_offer() -> None:
    """Whoever finds a feature offered finds those of earlier releases too."""
    offers, f = offered(), Feature
    expect(offers & SINCE_4_14, SINCE_4_14, "API-17: features since Linux 4.14")
    for later, earlier in (
        (f.WP_HUGETLBFS_SHMEM, f.EXACT_ADDRESS | f.PAGEFAULT_FLAG_WP),
        (f.WP_UNPOPULATED, f.WP_HUGETLBFS_SHMEM),
        (f.POISON, f.EXACT_ADDRESS),
        (f.WP_ASYNC, f.WP_UNPOPULATED | f.POISON),
        (f.MOVE, f.POISON),
        (f.RWP, f.MOVE | f.WP_ASYNC),
        (f.RWP_ASYNC, f.RWP),
    ):
        if later in offers:
            expect(offers & earlier, earlier, f"API-17: what is offered, {later} being so")
    expect(f.MINOR_SHMEM in offers, f.MINOR_HUGETLBFS in offers, "API-17: MINOR_SHMEM is offered, as MINOR_HUGETLBFS")
    if f.MOVE in offers:
        expect(f.WP_ASYNC in offers, f.WP_HUGETLBFS_SHMEM in offers, "API-17: WP_ASYNC is offered, as WP elsewhere is")


@uffd_case("api-offer-kept", mem=ALL, pages=1, rows=("API-17",), kind=Kind.VERSION)
def test_api_offer_kept(ctx: Context) -> None:
    """A feature is offered where what it stands for can be had, and nowhere else."""
    offers, where = ctx.uffd.offered, ctx.dst.range
    ioctls = ctx.uffd.register(where, MISSING)
    expect(RangeIoctls.POISON in ioctls, Feature.POISON in offers, "API-17: UFFDIO_POISON, as its feature")
    if not ctx.mem.hugetlb:
        expect(RangeIoctls.MOVE in ioctls, Feature.MOVE in offers, "API-17: UFFDIO_MOVE, as its feature")
    ctx.uffd.unregister(where)
    modes = {WP: wp_feature(ctx.mem)}
    if ctx.mem is not ANON:
        modes[MINOR] = Feature.MINOR_HUGETLBFS if ctx.mem.hugetlb else Feature.MINOR_SHMEM
    for mode, feature in modes.items():
        with Uffd.open() as uffd:
            result = outcome(partial(uffd.register, where, mode))
            expect(result != "EINVAL", feature in offers, f"API-17: {mode} can be had, as {feature}")


# ---- races ---------------------------------------------------------------------------------------------------------

LATE, EARLY = Feature.EXACT_ADDRESS, Feature.THREAD_ID


def shake(uffd: Uffd, address: int) -> str:
    """Make a UFFDIO_API with the struct at an address; return the errno's name, or "success"."""
    result = lib.uffd_ioctl(uffd.fd, UFFDIO_API, address)
    return errno_name(-result) if result else "success"


def expect_too_late(uffd: Uffd, late: Waiter, struct: int) -> None:
    """Assert that the thread's handshake has been refused, and that it has taken nothing from the first one."""
    with promise("API-15"):
        expect(late.result(), "EINVAL", "result of the later UFFDIO_API")
        expect(shown(uffd), EARLY, "features in fdinfo")
        expect(peek(struct, STRUCT), bytes(STRUCT), "the struct of the later UFFDIO_API")


@uffd_case(
    "api-overtaken-reading",
    mem=(ANON,),
    pages=1,
    needs=("kernel_faults",),
    rows=("API-15",),
    bugs=(27,),
    kind=Kind.DETAIL,
)
def test_api_overtaken_reading(ctx: Context) -> None:
    """A UFFDIO_API that is overtaken while it reads its argument is refused."""
    struct = ctx.dst.start
    poke(ctx.src.start, bytes(uapi.uffdio_api(UFFD_API, LATE)))
    with Uffd.open(flags=KERNEL_FAULTS) as pager, Uffd.create() as uffd:
        pager.register(ctx.dst.range, MISSING)
        with faulting(pager, struct, call=partial(shake, uffd, struct)) as late:
            uffd.api(EARLY)
            pager.copy(struct, ctx.src.start, PAGE_SIZE)
            expect_too_late(uffd, late, struct)


@uffd_case(
    "api-overtaken-writing",
    mem=(ANON,),
    pages=1,
    needs=("kernel_faults",),
    rows=("API-15",),
    bugs=(27,),
    kind=Kind.DETAIL,
)
def test_api_overtaken_writing(ctx: Context) -> None:
    """A UFFDIO_API that is overtaken while it writes its answer is refused, and the answer taken back."""
    struct = ctx.dst.start
    poke(struct, bytes(uapi.uffdio_api(UFFD_API, LATE)))
    with Uffd.open(flags=KERNEL_FAULTS) as pager, Uffd.create() as uffd:
        require(pager, Feature.PAGEFAULT_FLAG_WP)
        pager.register(ctx.dst.range, WP)
        pager.writeprotect(ctx.dst.range)
        flags = PagefaultFlag.WRITE | PagefaultFlag.WP
        with faulting(pager, struct, flags=flags, call=partial(shake, uffd, struct)) as late:
            uffd.api(EARLY)
            pager.unprotect(ctx.dst.range)
            expect_too_late(uffd, late, struct)


ROUNDS = 100


@uffd_case(
    "api-race", mem=(ANON,), pages=1, needs=("kernel_faults",), rows=("API-15",), bugs=(27,), kind=Kind.DETAIL, smp=True
)
def test_api_race(ctx: Context) -> None:
    """Of two UFFDIO_API at a time one is taken, with its features, and the other refused."""
    sets = (LATE, EARLY)
    poke(ctx.src.start, b"".join(bytes(uapi.uffdio_api(UFFD_API, features)) for features in sets))
    with Uffd.open(flags=KERNEL_FAULTS) as pager:
        pager.register(ctx.dst.range, MISSING)
        for attempt in range(ROUNDS):
            with promise("API-15", f"attempt {attempt}"), Uffd.create() as uffd:
                results = race(ctx, pager, uffd)
                expect(sorted(results), ["EINVAL", "success"], "results")
                expect(shown(uffd), sets[results.index("success")], "features in fdinfo")
            ctx.dst.release()


def race(ctx: Context, pager: Uffd, uffd: Uffd) -> list[str]:
    """Make two UFFDIO_API from structs in one missing page, and let both go on at once; return their results."""
    one_struct, other_struct = ctx.dst.start, ctx.dst.start + STRUCT
    with Waiter(partial(shake, uffd, one_struct)) as one, Waiter(partial(shake, uffd, other_struct)) as other:
        eventually(lambda: pager.fdinfo.pending == 2, "both to read their argument")
        pager.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE)
        results = [str(one.result()), str(other.result())]
    pager.expect_no_message()
    return results
