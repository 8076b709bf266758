# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_RWPROTECT: the request, what it refuses, and which mappings and pages it is about."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from errno import EAGAIN, EFAULT, EINVAL, ENOENT, ESRCH
from signal import SIGBUS

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, EACH_HUGETLB, FILE_BACKED, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MINOR, MINOR_FAULTS,
    MISSING, NOT_HUGETLB, PAGE_SIZE, PROT_READ, PROT_WRITE, RWP, SHARED, SYNC_RWP, UNREGISTERED, WP, WRITEPROTECT,
    Channel, Child, Context, Feature, KernelError, Pagemap, Range, RwprotectMode, Skip, Uffd, WriteprotectMode,
    bad_ranges, expect, expect_modes, expect_rwp_free, expect_rwp_trapped, expect_signals, keep_small, map_memory,
    orphaned, peek, poke, promise, protect, put_back, refuses, rwp_filled, rwp_trapped, smaps_fields, syscalls, uapi,
    unmap, unread_event,
)  # fmt: skip

PROTECT, RESOLVE, DONTWAKE = RwprotectMode.RWP, RwprotectMode(0), RwprotectMode.DONTWAKE
EACH_MODE = (PROTECT, RESOLVE, DONTWAKE)


# ---- arguments -----------------------------------------------------------------------------------------------------


@uffd_case(
    "rwprotect-errors", mem=ALL, features=SYNC_RWP, pages=3, rows=("RW-05", "RW-06"), kind=Kind.DETAIL
)
def test_rwprotect_errors(ctx: Context) -> None:
    """UFFDIO_RWPROTECT refuses a range that is not whole pages of user space and an unknown mode, and does nothing."""
    area = rwp_filled(ctx)
    ctx.uffd.rwprotect(area.page(0))
    with rwp_trapped(ctx.uffd, area, 0):
        for mode in EACH_MODE:
            for what, bad in bad_ranges(area.page(1 if mode is PROTECT else 0)).items():
                with promise("RW-06", f"{what}, mode {mode}"), refuses(EINVAL):
                    ctx.uffd.rwprotect(bad, mode)
        for bit in range(2, 64):
            for known in (0, 1):
                with promise("RW-05", f"mode bit {bit} with {known:#x}"), refuses(EINVAL):
                    ctx.uffd.rwprotect(area.range, RwprotectMode(1 << bit | known))
        with promise("RW-05", "RWP with DONTWAKE"), refuses(EINVAL):
            ctx.uffd.rwprotect(area.range, PROTECT | DONTWAKE)
        with promise("RW-06", "argument NULL"), refuses(EFAULT):
            ctx.uffd.raw_ioctl(uapi.UFFDIO_RWPROTECT, 0)
        with promise("RW-05, RW-06", "after calls that were refused"):
            Pagemap.expect_protected(area, {0}, "after them")
            ctx.uffd.expect_still_asleep(1)
        ctx.uffd.resolve(area.page(0))
    area.expect_pattern_of(area)


@uffd_case("rwprotect-argument", mem=(ANON,), features=SYNC_RWP, pages=2, rows=("RW-06",), kind=Kind.DETAIL)
def test_rwprotect_argument(ctx: Context) -> None:
    """UFFDIO_RWPROTECT writes nothing back: its argument may be in read-only memory, but must be there whole."""
    area, end = rwp_filled(ctx), ctx.src.range.end
    for mode, protected in ((PROTECT, {0}), (RESOLVE, set())):
        protect(ctx.src.range, PROT_READ | PROT_WRITE)
        argument = bytes(uapi.uffdio_rwprotect(uapi.uffdio_range(area.start, PAGE_SIZE), mode))
        poke(end - len(argument), argument)
        protect(ctx.src.range, PROT_READ)
        with promise("RW-06", f"last word of the argument not mapped, mode {mode}"):
            with refuses(EFAULT):
                ctx.uffd.raw_ioctl(uapi.UFFDIO_RWPROTECT, end - len(argument) + 8)
            Pagemap.expect_protected(area, {0} - protected, "after a call that was refused")
        with promise("RW-06", f"read-only argument, mode {mode}"):
            expect(ctx.uffd.raw_ioctl(uapi.UFFDIO_RWPROTECT, end - len(argument)), 0, "result")
            expect(peek(end - len(argument), len(argument)), argument, "the argument afterwards")
            Pagemap.expect_protected(area, protected, "after the call")
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-order", mem=(ANON,), features=SYNC_RWP | Feature.EVENT_REMOVE, pages=3, rows=("RW-07",), kind=Kind.DETAIL
)
def test_rwprotect_order(ctx: Context) -> None:
    """UFFDIO_RWPROTECT looks for a pending event, at its argument, the range, the mode, the process, the mappings."""
    area = rwp_filled(ctx)
    unaligned, unregistered = Range(area.start + 1, PAGE_SIZE), ctx.src.page(0)
    unknown = RwprotectMode(1 << 2)

    def without_argument(uffd: Uffd) -> None:
        uffd.raw_ioctl(uapi.UFFDIO_RWPROTECT, 0)

    def call(where: Range, mode: RwprotectMode = PROTECT) -> Callable[[Uffd], None]:
        return lambda uffd: uffd.rwprotect(where, mode)

    wrong: dict[str, tuple[Callable[[Uffd], None], int]] = {
        "argument NULL": (without_argument, EFAULT),
        "unaligned, not known as a mode": (call(unaligned, unknown), EINVAL),
        "unaligned": (call(unaligned), EINVAL),
        "not known as a mode, not registered": (call(unregistered, unknown), EINVAL),
        "both modes, not registered": (call(unregistered, PROTECT | DONTWAKE), EINVAL),
    }
    with unread_event(ctx.uffd, area.page(2)):
        for what, (request, _) in {**wrong, "not registered": (call(unregistered), ENOENT)}.items():
            with promise("RW-07", f"{what}, an event pending"), refuses(EAGAIN):
                request(ctx.uffd)
    for what, (request, number) in {**wrong, "not registered": (call(unregistered), ENOENT)}.items():
        with promise("RW-07", what), refuses(number):
            request(ctx.uffd)
    with orphaned(area.range, RWP, SYNC_RWP) as uffd:
        for what, (request, number) in {**wrong, "not registered": (call(unregistered), ESRCH)}.items():
            with promise("RW-07", f"{what}, the process gone"), refuses(number):
                request(uffd)
    Pagemap.expect_protected(area, (), "after calls that were refused")


@uffd_case(
    "rwprotect-eagain", mem=ALL, features=SYNC_RWP | Feature.EVENT_REMOVE, pages=3, rows=("RW-07",), kind=Kind.DETAIL
)
def test_rwprotect_eagain(ctx: Context) -> None:
    """UFFDIO_RWPROTECT says EAGAIN and does nothing until a pending event has been read."""
    area = rwp_filled(ctx)
    ctx.uffd.rwprotect(area.page(0))
    with rwp_trapped(ctx.uffd, area, 0):
        for mode, page, before, after in ((PROTECT, 1, {0}, {0, 1}), (RESOLVE, 0, {0, 1}, {1})):
            with unread_event(ctx.uffd, area.page(2)):
                with promise("RW-07", f"mode {mode}"), refuses(EAGAIN):
                    ctx.uffd.rwprotect(area.page(page), mode)
                Pagemap.expect_protected(area, before, "while the event is pending")
                ctx.uffd.expect_asleep(1)
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.rwprotect(area.page(page), mode)
            Pagemap.expect_protected(area, after, "when the event has been read")
    ctx.uffd.resolve(area.page(1))
    area.expect_pattern_of(area, 0, 2)


# ---- mappings that it does not serve -------------------------------------------------------------------------------


@uffd_case("rwprotect-no-range", mem=ALL, features=SYNC_RWP, pages=3, rows=("RW-08",), kind=Kind.DETAIL)
def test_rwprotect_no_range(ctx: Context) -> None:
    """UFFDIO_RWPROTECT says ENOENT where nothing is mapped, and where no read-write protection was registered."""
    ctx.dst.fill()
    steps: dict[str, Callable[[], object]] = {
        "not registered": lambda: None,
        "registered for missing pages": lambda: ctx.uffd.register(ctx.dst.range, MISSING),
        "not mapped": lambda: unmap(ctx.dst.range),
    }
    for what, step in steps.items():
        step()
        for mode in EACH_MODE:
            with promise("RW-08", f"{what}, mode {mode}"), refuses(ENOENT):
                ctx.uffd.rwprotect(ctx.dst.range, mode)
        Pagemap.expect_protected(ctx.dst, (), what)
        if what != "not mapped":
            expect_rwp_free(ctx.uffd, ctx.dst, 0, 1, 2)
            ctx.dst.expect_pattern_of(ctx.dst)


@uffd_case(
    "rwprotect-other-protection",
    mem=ALL,
    features=SYNC_RWP | WRITEPROTECT,
    pages=3,
    rows=("RW-08",),
    kind=Kind.DETAIL,
)
def test_rwprotect_other_protection(ctx: Context) -> None:
    """UFFDIO_RWPROTECT of a range with write protection is ENOENT, and so is the reverse; the protection stays."""
    area = ctx.dst
    area.fill()
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.page(1))
    for mode in EACH_MODE:
        with promise("RW-08", f"UFFDIO_RWPROTECT with mode {mode} of write-protected memory"), refuses(ENOENT):
            ctx.uffd.rwprotect(area.range, mode)
        Pagemap.expect_protected(area, {1}, "afterwards")
    ctx.uffd.unregister(area.range)
    ctx.uffd.register(area.range, RWP)
    ctx.uffd.rwprotect(area.page(1))
    with rwp_trapped(ctx.uffd, area, 1):
        for other in (WriteprotectMode.WP, WriteprotectMode(0), WriteprotectMode.DONTWAKE):
            with promise("RW-08", f"UFFDIO_WRITEPROTECT with mode {other} of this memory"), refuses(ENOENT):
                ctx.uffd.writeprotect(area.range, other)
            Pagemap.expect_protected(area, {1}, "afterwards")
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.resolve(area.page(1))
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-minor-only",
    mem=FILE_BACKED,
    features=SYNC_RWP | MINOR_FAULTS,
    pages=2,
    rows=("RW-08",),
    kind=Kind.DETAIL,
)
def test_rwprotect_minor_only(ctx: Context) -> None:
    """UFFDIO_RWPROTECT of a range registered for minor faults alone is ENOENT."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, MINOR)
    for mode in EACH_MODE:
        with promise("RW-08", f"mode {mode}"), refuses(ENOENT):
            ctx.uffd.rwprotect(ctx.dst.range, mode)
    Pagemap.expect_protected(ctx.dst, (), "afterwards")
    expect_rwp_free(ctx.uffd, ctx.dst, 0, 1)


@uffd_case(
    "rwprotect-all-or-nothing",
    mem=ALL,
    variants=("first", "middle", "last"),
    features=SYNC_RWP | WRITEPROTECT,
    pages=5,
    rows=("RW-09",),
    kind=Kind.DETAIL,
)
def test_rwprotect_all_or_nothing(ctx: Context, variant: str) -> None:
    """Where any mapping of the range lacks read-write protection no page is protected or resolved, and nobody wakes."""
    area, uffd = ctx.dst, ctx.uffd
    area.fill()
    bad = {"first": 0, "middle": 2, "last": 4}[variant]
    good = [page for page in range(5) if page != bad]
    for mode in (UNREGISTERED, MISSING, WP):
        for page in good:
            uffd.register(area.page(page), RWP)
        if mode:
            uffd.register(area.page(bad), mode)
        with promise("RW-09", f"page {bad} with mode {mode}, protect"):
            with refuses(ENOENT):
                uffd.rwprotect(area.range)
            Pagemap.expect_protected(area, (), "after a refused UFFDIO_RWPROTECT")
        for page in good:
            uffd.rwprotect(area.page(page))
        with promise("RW-09", f"page {bad} with mode {mode}, resolve"), ExitStack() as stack:
            for page in good:
                stack.enter_context(rwp_trapped(uffd, area, page))
            for request in (RESOLVE, DONTWAKE):
                with refuses(ENOENT):
                    uffd.rwprotect(area.range, request)
                Pagemap.expect_protected(area, good, "after a refused UFFDIO_RWPROTECT")
                uffd.expect_still_asleep(4)
            for page in good:
                uffd.resolve(area.page(page))
        uffd.unregister(area.range)
    area.expect_pattern_of(area)


# ---- several mappings ----------------------------------------------------------------------------------------------


@uffd_case("rwprotect-holes", mem=ALL, features=SYNC_RWP, pages=5, rows=("RW-10",), kind=Kind.DETAIL)
def test_rwprotect_holes(ctx: Context) -> None:
    """UFFDIO_RWPROTECT skips what is not mapped at the start, in the middle and at the end of its range."""
    area = rwp_filled(ctx)
    for page in (0, 2, 4):
        unmap(area.page(page))
    ctx.uffd.rwprotect(area.range)
    Pagemap.expect_protected(area, {1, 3}, "after protecting a range with holes")
    with rwp_trapped(ctx.uffd, area, 1), rwp_trapped(ctx.uffd, area, 3):
        ctx.uffd.resolve(area.range)
    Pagemap.expect_protected(area, (), "after resolving a range with holes")
    expect_rwp_free(ctx.uffd, area, 1, 3)
    for page in (1, 3):
        area.expect_pattern_of(area, page, 1)


@uffd_case(
    "rwprotect-many-mappings",
    mem=NOT_HUGETLB,
    features=SYNC_RWP | Feature.SIGBUS,
    pages=1,
    rows=("RW-10",),
    kind=Kind.DETAIL,
)
def test_rwprotect_many_mappings(ctx: Context) -> None:
    """One call protects and resolves what lies in 200 mappings, every other one read-only, and nothing beside it."""
    area = rwp_filled(ctx, area=ctx.allocate(204))
    for page in range(1, 203, 2):
        protect(area.page(page), PROT_READ)
    expect(len(list(smaps_fields(area.range))) >= 200, True, "200 mappings of the area, or more")
    ctx.uffd.rwprotect(area.page(1, 202))
    Pagemap.expect_protected(area, range(1, 203), "after protecting pages 1 to 202")
    for write in (False, True):
        outside = (area.page(0), area.page(203))
        for where in outside:
            expect_signals(where, PAGE_SIZE, None, "beside the range", write=write)
    expect_signals(area.page(1, 202), PAGE_SIZE, SIGBUS, "read of protected memory")
    ctx.uffd.resolve(area.page(2, 200))
    Pagemap.expect_protected(area, {1, 202}, "after resolving pages 2 to 201")
    expect_signals(area.page(2, 200), PAGE_SIZE, None, "read of resolved memory")
    for page in range(2, 202, 2):
        expect_signals(area.page(page), PAGE_SIZE, None, f"write to resolved memory, page {page}", write=True)
    ctx.uffd.resolve(area.range)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-mixed", mem=SHARED, features=SYNC_RWP, pages=6, spare_hugepages=2, rows=("RW-10",), kind=Kind.DETAIL
)
def test_rwprotect_mixed(ctx: Context) -> None:
    """One call protects and resolves anonymous memory, shared memory and private memory of a file side by side."""
    area, size = ctx.dst, ctx.page_size
    anon = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    map_memory(2 * size, at=area.start, flags=anon)
    keep_small(area.page(0, 2))
    map_memory(
        2 * size, at=area.page(4).start, flags=MAP_FIXED | MAP_PRIVATE | MAP_NORESERVE, fd=area.fd or 0, offset=4 * size
    )
    area.fill()
    for first, mode in ((0, RWP), (2, MISSING | RWP), (4, RWP)):
        ctx.uffd.register(area.page(first, 2), mode)
    ctx.uffd.rwprotect(area.page(1, 4))
    Pagemap.expect_protected(area, {1, 2, 3, 4}, "after protecting pages 1 to 4")
    expect_rwp_free(ctx.uffd, area, 0, 5)
    with ExitStack() as stack:
        accesses = ((1, True), (2, False), (3, True), (4, False))
        waiters = [stack.enter_context(rwp_trapped(ctx.uffd, area, page, write=write)) for page, write in accesses]
        ctx.uffd.expect_still_asleep(4)
        ctx.uffd.resolve(area.page(2, 3))
        for waiter in waiters[1:]:
            waiter.result()
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_protected(area, {1}, "after resolving pages 2 to 4")
        ctx.uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, range(6), "after protecting all")
        ctx.uffd.resolve(area.page(0, 2))
        Pagemap.expect_protected(area, {2, 3, 4, 5}, "after resolving pages 0 and 1")
        waiters[0].result()
        ctx.uffd.resolve(area.range)
    ctx.uffd.expect_no_message()
    expect_rwp_free(ctx.uffd, area, *range(6))
    put_back(area, 1, 3)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-hugetlb-part", mem=EACH_HUGETLB, features=SYNC_RWP, pages=4, rows=("RW-11",), kind=Kind.DETAIL
)
def test_rwprotect_hugetlb_part(ctx: Context) -> None:
    """A range that has a part of a huge page is EINVAL, also where it begins in other memory, and nothing is done."""
    area, huge = ctx.dst, ctx.page_size
    map_memory(huge, at=area.start, flags=MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
    keep_small(area.page(0))
    rwp_filled(ctx)
    parts = {
        "begins behind a huge page's start": Range(area.page(1).start + PAGE_SIZE, huge),
        "the rest of a huge page": Range(area.page(1).start + PAGE_SIZE, huge - PAGE_SIZE),
        "a base page": Range(area.page(1).start, PAGE_SIZE),
        "ends behind a huge page's start": Range(area.page(1).start, huge + PAGE_SIZE),
        "begins in other memory, ends in a huge page": Range(area.start, huge + PAGE_SIZE),
        "begins in the middle of other memory": Range(area.page(1).start - PAGE_SIZE, PAGE_SIZE + huge),
    }
    for what, part in parts.items():
        with promise("RW-11", f"{what}, protect"):
            with refuses(EINVAL):
                ctx.uffd.rwprotect(part)
            Pagemap.expect_protected(area, (), "after a refused UFFDIO_RWPROTECT")
    ctx.uffd.rwprotect(area.range)
    with rwp_trapped(ctx.uffd, area, 0), rwp_trapped(ctx.uffd, area, 1), rwp_trapped(ctx.uffd, area, 2):
        for what, part in parts.items():
            for mode in (RESOLVE, DONTWAKE):
                with promise("RW-11", f"{what}, mode {mode}"):
                    with refuses(EINVAL):
                        ctx.uffd.rwprotect(part, mode)
                    Pagemap.expect_protected(area, range(4), "after a refused UFFDIO_RWPROTECT")
            ctx.uffd.expect_still_asleep(3)
        ctx.uffd.resolve(area.page(0, 2))
        ctx.uffd.expect_still_asleep(1)
        Pagemap.expect_protected(area, {2, 3}, "after resolving other memory and a whole huge page")
        ctx.uffd.resolve(area.range)
    area.expect_pattern_of(area)


# ---- the same again ------------------------------------------------------------------------------------------------


@uffd_case("rwprotect-again", mem=ALL, features=SYNC_RWP, pages=5, rows=("RW-12", "RW-14"), kind=Kind.DETAIL)
def test_rwprotect_again(ctx: Context) -> None:
    """Protecting a page twice, or while a reader waits, changes nothing; one resolve frees it, and more do no harm."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    uffd.resolve(area.range)
    Pagemap.expect_protected(area, (), "after resolving what was never protected")
    for times in ("once", "twice"):
        uffd.rwprotect(area.page(1, 3))
        Pagemap.expect_protected(area, {1, 2, 3}, f"after protecting pages 1 to 3 {times}")
    for first in (1, 2):
        uffd.rwprotect(area.page(first, 2))
        Pagemap.expect_protected(area, {1, 2, 3}, "after protecting a part of them again")
    expect_rwp_free(uffd, area, 0, 4)
    with rwp_trapped(uffd, area, 1) as reader, rwp_trapped(uffd, area, 2, write=True), rwp_trapped(uffd, area, 3):
        uffd.rwprotect(area.page(1, 3))
        uffd.expect_still_asleep(3)
        uffd.resolve(area.page(1))
        reader.result()
        uffd.expect_still_asleep(2)
        Pagemap.expect_protected(area, {2, 3}, "after resolving page 1 once")
        expect_rwp_free(uffd, area, 1)
        uffd.resolve(area.page(1, 3))
    for times in ("again", "once more"):
        uffd.resolve(area.page(1, 3))
        Pagemap.expect_protected(area, (), f"after resolving {times}")
        expect_rwp_free(uffd, area, *range(5))
    put_back(area, 2)
    area.expect_pattern_of(area)


@uffd_case("rwprotect-range", mem=ALL, features=SYNC_RWP, pages=5, rows=("RW-14",))
def test_rwprotect_range(ctx: Context) -> None:
    """Exactly the pages of the range are protected, and exactly those of the range resolved, wherever it lies."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    for first, count in ((0, 1), (4, 1), (2, 1), (0, 3), (2, 3), (1, 3), (0, 5)):
        inside = set(range(first, first + count))
        outside = sorted(set(range(5)) - inside)
        uffd.rwprotect(area.page(first, count))
        with promise("RW-14", f"protecting pages {first} to {first + count - 1}"):
            Pagemap.expect_protected(area, inside, "afterwards")
            expect_rwp_free(uffd, area, *outside)
        uffd.rwprotect(area.range)
        with promise("RW-14", f"resolving pages {first} to {first + count - 1}"):
            uffd.resolve(area.page(first, count))
            Pagemap.expect_protected(area, outside, "afterwards")
            expect_rwp_free(uffd, area, *sorted(inside))
            expect_rwp_trapped(uffd, area, *outside)
    area.expect_pattern_of(area)


@uffd_case("rwprotect-sealed", mem=(ANON,), features=SYNC_RWP, pages=3, rows=("RW-72",), kind=Kind.DETAIL)
def test_rwprotect_sealed(ctx: Context) -> None:
    """A mapping sealed with mseal(2) can be registered, protected, resolved and unregistered."""
    area = ctx.dst
    area.fill()

    def target(_: Channel) -> None:
        syscalls.call("mseal", area.start, area.range.len, 0)
        with Uffd.open(SYNC_RWP) as uffd, promise("RW-72"):
            uffd.register(area.range, RWP)
            uffd.rwprotect(area.range)
            Pagemap.expect_protected(area, range(3), "after protecting a sealed mapping")
            expect_rwp_trapped(uffd, area, 1)
            expect_rwp_trapped(uffd, area, 0, write=True)
            Pagemap.expect_protected(area, {2}, "after resolving two pages of it")
            uffd.unregister(area.range)
            expect_modes(area.range, UNREGISTERED)
            Pagemap.expect_protected(area, (), "after unregistering it")
            area.expect_pattern_of(area, 1)

    try:
        syscalls.call("mseal", 0, 0, 0)  # seals nothing
    except KernelError as error:
        raise Skip(f"{error}: Linux 6.10 has mseal(2)") from None
    with Child(target):
        pass
