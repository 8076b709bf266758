# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_UNREGISTER of read-write-protected memory: what is left of the protection, and who wakes."""

from __future__ import annotations

from errno import EINVAL, ENOMEM
from functools import partial
from signal import SIGSEGV

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, MISSING, NEW, PROT_NONE, PROT_READ, PROT_WRITE, READ_TRAPPED, RWP, SHMEM, SYNC_RWP, UNREGISTERED, WP,
    WRITEPROTECT, Context, Pagemap, RegisterMode, Uffd, Waiter, eventually, expect, expect_modes, expect_rwp_trapped,
    expect_trapped, faulting, huge_area, mend, no_mapping_left, page_numbers, peek, pmd_mapped, promise, protect,
    refuses, rwp_protected, rwp_trapped, signals, undisturbed,
)  # fmt: skip

BOTH = SYNC_RWP | WRITEPROTECT


# ---- what is left of the protection --------------------------------------------------------------------------------


@uffd_case("unregister-clears-rwp", mem=ALL, features=SYNC_RWP, pages=6, rows=("UNR-16",))
def test_unregister_clears_rwp(ctx: Context) -> None:
    """What is unregistered is accessible at once, with its contents; pages beside it stay protected and trap."""
    for mode in (RWP, RWP | MISSING):
        for first, count in ((2, 2), (0, 1), (5, 1), (0, 6)):
            area = rwp_protected(ctx, mode)
            gone = range(first, first + count)
            left = [page for page in range(6) if page not in gone]
            with promise("UNR-16", f"{mode}, pages {page_numbers(gone)}"):
                ctx.uffd.unregister(area.page(first, count))
                expect_modes(area.range, *(UNREGISTERED if page in gone else mode for page in range(6)))
                Pagemap.expect_protected(area, left, "after UFFDIO_UNREGISTER")
                Pagemap.expect_present(area, *range(6))
                undisturbed(ctx.uffd, partial(area.expect_pattern_of, area, first, count, write_back=True))
                expect_rwp_trapped(ctx.uffd, area, *left[:1], *left[-1:])
                Pagemap.expect_protected(area, left[1:-1], "after first and last of the rest were resolved")
                ctx.uffd.unregister(area.range)
                undisturbed(ctx.uffd, partial(area.expect_pattern_of, area, write_back=True))
                Pagemap.expect_protected(area, (), "after all was unregistered")


@uffd_case("unregister-clears-rwp-huge", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("UNR-16",))
def test_unregister_clears_rwp_huge(ctx: Context) -> None:
    """Of a transparent huge page just the part that is unregistered loses its protection: all, a half, one page."""
    area = huge_area(ctx)
    count = area.nr_pages
    for first, pages in ((0, count), (0, count // 2), (count // 4, count // 2), (count - 1, 1), (0, 1)):
        if pmd_mapped(area.range) < area.range.len:
            area = huge_area(ctx)
        ctx.uffd.register(area.range, RWP)
        ctx.uffd.rwprotect(area.range)
        left = [page for page in range(count) if not first <= page < first + pages]
        with promise("UNR-16", f"{pages} pages from page {first} on"):
            ctx.uffd.unregister(area.page(first, pages))
            Pagemap.expect_protected(area, left, "after UFFDIO_UNREGISTER")
            undisturbed(ctx.uffd, partial(area.expect_pattern_of, area, first, pages, write_back=True))
            near = sorted({first - 1, first + pages, 0, count - 1} & set(left))
            expect_rwp_trapped(ctx.uffd, area, *near)
            Pagemap.expect_protected(area, set(left) - set(near), "after some of the rest were resolved")
            ctx.uffd.unregister(area.range)
            Pagemap.expect_protected(area, (), "after all was unregistered")
            undisturbed(ctx.uffd, partial(area.expect_pattern_of, area, write_back=True))


@uffd_case("unregister-clears-each", mem=ALL, features=BOTH, pages=6, rows=("UNR-16", "UNR-13", "UNR-08"))
def test_unregister_clears_each(ctx: Context) -> None:
    """One call over mappings of all modes takes each one's protection, and registration, and leaves what is outside."""
    area = ctx.dst
    modes = (RWP, MISSING | WP, RWP | MISSING, UNREGISTERED, WP, RWP)
    area.fill()
    for number, mode in enumerate(modes):
        if mode:
            ctx.uffd.register(area.page(number), mode)
        if RWP in mode:
            ctx.uffd.rwprotect(area.page(number))
        if WP in mode:
            ctx.uffd.writeprotect(area.page(number))
    protect(area.page(2), PROT_READ)
    with promise("UNR-16"):
        Pagemap.expect_protected(area, (0, 1, 2, 4, 5), "before")
        ctx.uffd.unregister(area.page(1, 4))
        expect_modes(area.range, RWP, *[UNREGISTERED] * 4, RWP)
        Pagemap.expect_protected(area, (0, 5), "after UFFDIO_UNREGISTER of pages 1 to 4")
        undisturbed(ctx.uffd, partial(area.expect_pattern_of, area, 1, 4))
        protect(area.page(2), PROT_READ | PROT_WRITE)
        undisturbed(ctx.uffd, partial(area.expect_pattern_of, area, 1, 4, write_back=True))
        expect_rwp_trapped(ctx.uffd, area, 0)
        expect_rwp_trapped(ctx.uffd, area, 5)
        undisturbed(ctx.uffd, partial(area.expect_pattern_of, area))


@uffd_case("unregister-rwp-refused", mem=ALL, features=BOTH, pages=5, rows=("UNR-06", "UNR-05"), kind=Kind.DETAIL)
def test_unregister_rwp_refused(ctx: Context) -> None:
    """With memory of another handle first, in the middle or last in it, a range stays registered and protected."""
    area = ctx.dst
    for foreign in (1, 2, 3):
        ours = [page for page in (1, 2, 3) if page != foreign]
        area.fill()
        with Uffd.open(BOTH) as owner, promise("UNR-06", f"another handle's page {foreign}"):
            for number in ours:
                mode = WP if number == ours[0] else RWP
                ctx.uffd.register(area.page(number), mode)
                (ctx.uffd.writeprotect if mode == WP else ctx.uffd.rwprotect)(area.page(number))
            owner.register(area.page(foreign), RWP)
            owner.rwprotect(area.page(foreign))
            modes = [UNREGISTERED, RWP, RWP, RWP, UNREGISTERED]
            modes[ours[0]] = WP
            for first, count in ((1, 3), (0, 5)):
                with refuses(EINVAL):
                    ctx.uffd.unregister(area.page(first, count))
            expect_modes(area.range, *modes)
            Pagemap.expect_protected(area, (1, 2, 3), "after EINVAL")
            expect_trapped(ctx.uffd, area, ours[0])
            expect_rwp_trapped(ctx.uffd, area, ours[1])
            expect_rwp_trapped(owner, area, foreign)
            ctx.uffd.expect_no_message()
            for number in ours:
                ctx.uffd.unregister(area.page(number))


@uffd_case("unregister-rwp-inaccessible", mem=ALL, features=SYNC_RWP, pages=5, rows=("UNR-18",), kind=Kind.DETAIL)
def test_unregister_rwp_inaccessible(ctx: Context) -> None:
    """Memory made inaccessible while it was protected can be unregistered; made accessible it has no trap left."""
    for mode in (RWP, RWP | MISSING):
        area = rwp_protected(ctx, mode)
        protect(area.page(1, 3), PROT_NONE)
        with promise("UNR-18", str(mode)):
            ctx.uffd.unregister(area.page(2, 2))
            expect_modes(area.range, mode, mode, UNREGISTERED, UNREGISTERED, mode)
            Pagemap.expect_protected(area, (0, 1, 4), "after UFFDIO_UNREGISTER of pages 2 and 3")
            for write in (False, True):
                expect(signals(ctx.uffd, area.page(1, 3), area.page_size, write=write), [SIGSEGV] * 3, "signals")
            protect(area.page(1, 3), PROT_READ | PROT_WRITE)
            Pagemap.expect_protected(area, (0, 1, 4), "after mprotect(2)")
            undisturbed(ctx.uffd, partial(area.expect_pattern_of, area, 2, 2, write_back=True))
            expect_rwp_trapped(ctx.uffd, area, 0, 1, 4)
            ctx.uffd.unregister(area.range)
            undisturbed(ctx.uffd, partial(area.expect_pattern_of, area, write_back=True))


# ---- who wakes -----------------------------------------------------------------------------------------------------


def slept_on(uffd: Uffd) -> int:
    """Count the threads, whose messages were read, that have not been woken; those that faulted again do not count."""
    state = uffd.fdinfo
    return state.total - state.pending


@uffd_case("unregister-wakes-rwp-missing", mem=ALL, features=SYNC_RWP, pages=4, rows=("UNR-19",), kind=Kind.DETAIL)
def test_unregister_wakes_rwp_missing(ctx: Context) -> None:
    """In a range registered as MISSING and RWP it wakes a reader and a writer of protected pages, and no others."""
    area = rwp_protected(ctx, RWP | MISSING)
    with rwp_trapped(ctx.uffd, area, 0), rwp_trapped(ctx.uffd, area, 3, write=True):
        with rwp_trapped(ctx.uffd, area, 1) as reader, rwp_trapped(ctx.uffd, area, 2, write=True):
            ctx.uffd.unregister(area.page(1, 2))
            with promise("UNR-19"):
                expect(slept_on(ctx.uffd), 2, "threads that sleep on, of those outside of the range")
            ctx.uffd.wake(area.page(1, 2))
        with promise("UNR-19"):
            expect(reader.result(), peek(area.page(1).start, len(NEW)), "what the read got")
            Pagemap.expect_protected(area, (0, 3), "after UFFDIO_UNREGISTER")
            ctx.uffd.expect_still_asleep(2)
        ctx.uffd.resolve(area.page(0))
        ctx.uffd.resolve(area.page(3))
    mend(ctx, area, 2, 3)
    undisturbed(ctx.uffd, partial(area.expect_pattern_of, area))


RWP_SLEEPS_ON = Defect(
    id="D-UNR-20",
    summary="UFFDIO_UNREGISTER of a range registered as RWP only leaves threads blocked in it asleep for good",
    kernels="7.3.4",
    advice="follow every UFFDIO_UNREGISTER with an UFFDIO_WAKE of the same range",
    shows=r"threads that sleep on: expected 0, got 2",
)


@uffd_case("unregister-wakes-rwp", mem=ALL, features=SYNC_RWP, pages=2, rows=("UNR-20",), defect=RWP_SLEEPS_ON)
def test_unregister_wakes_rwp(ctx: Context) -> None:
    """Threads that wait for a read-write-protected page wake when its range is unregistered."""
    area = rwp_protected(ctx)
    with rwp_trapped(ctx.uffd, area, 0), rwp_trapped(ctx.uffd, area, 1, write=True):
        ctx.uffd.unregister(area.range)
        asleep = slept_on(ctx.uffd)
        ctx.uffd.wake(area.range)
    expect(asleep, 0, "UNR-20: threads that sleep on")


@uffd_case("unregister-then-wake-rwp", mem=ALL, features=SYNC_RWP, pages=3, rows=("UNR-20",), kind=Kind.DETAIL)
def test_unregister_then_wake_rwp(ctx: Context) -> None:
    """Threads that wait for a read-write-protected page go on once its range is unregistered and then woken."""
    area = rwp_protected(ctx)
    with rwp_trapped(ctx.uffd, area, 2) as outside:
        with rwp_trapped(ctx.uffd, area, 0) as reader, rwp_trapped(ctx.uffd, area, 1, write=True):
            ctx.uffd.unregister(area.page(0, 2))
            ctx.uffd.wake(area.page(0, 2))
        expect(reader.result(), peek(area.start, len(NEW)), "UNR-20: what the read got")
        expect(outside.done, False, "UNR-20: the thread outside of the range goes on")
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.resolve(area.page(2))
    ctx.uffd.expect_no_message()
    mend(ctx, area, 1)
    undisturbed(ctx.uffd, partial(area.expect_pattern_of, area))


@uffd_case("unregister-rwp-drops-message", mem=ALL, features=SYNC_RWP, pages=2, rows=("UNR-16", "RW-19"))
def test_unregister_rwp_drops_message(ctx: Context) -> None:
    """The message of a trapped access that nobody has read goes with the wake; that of another range stays."""
    area = rwp_protected(ctx)
    gone, kept = area.page(0), area.page(1)
    with faulting(ctx.uffd, gone.start, read=False), Waiter(partial(peek, kept.start)):
        eventually(lambda: ctx.uffd.fdinfo.pending == 2, "two messages queued")
        ctx.uffd.unregister(gone)
        ctx.uffd.wake(gone)
        with promise("UNR-16"):
            ctx.uffd.wait_fault(kept.start, READ_TRAPPED)
        ctx.uffd.resolve(kept)
    ctx.uffd.expect_no_message()


# ---- when it fails -------------------------------------------------------------------------------------------------

HALF_UNREGISTERED = Defect(
    id="D-UNR-21",
    summary="UFFDIO_UNREGISTER of a part of a protected mapping that cannot be split says ENOMEM and leaves it "
    "registered, but has taken the protection of that part away: what is written there is not reported",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="after ENOMEM of UFFDIO_UNREGISTER take the range for written to, or protect it again",
    shows=r"after ENOMEM: expected PM_UFFD_WP in pagemap on exactly these pages: 0-2, got 1-2",
)


def expect_unregister_fails(ctx: Context, mode: RegisterMode) -> None:
    """Protect an area, and assert that unregistering a part of it without a mapping left changes nothing."""
    area = ctx.dst
    area.fill()
    ctx.uffd.register(area.range, mode)
    (ctx.uffd.rwprotect if RWP in mode else ctx.uffd.writeprotect)(area.range)
    with no_mapping_left(), promise("UNR-21"), refuses(ENOMEM):
        ctx.uffd.unregister(area.page(0))
    with promise("UNR-21"):
        expect_modes(area.range, mode, mode, mode)
        Pagemap.expect_protected(area, range(3), "after ENOMEM")
        (expect_rwp_trapped if RWP in mode else expect_trapped)(ctx.uffd, area, 0, 1, 2)


@uffd_case(
    "unregister-wp-too-many-mappings",
    mem=(ANON, SHMEM),
    features=WRITEPROTECT,
    pages=3,
    rows=("UNR-21",),
    defect=HALF_UNREGISTERED,
)
def test_unregister_wp_too_many_mappings(ctx: Context) -> None:
    """Where a mapping cannot be split, ENOMEM, all of it stays registered for write protection, and protected."""
    expect_unregister_fails(ctx, WP)


@uffd_case(
    "unregister-rwp-too-many-mappings",
    mem=(ANON, SHMEM),
    features=SYNC_RWP,
    pages=3,
    rows=("UNR-21",),
    defect=HALF_UNREGISTERED,
)
def test_unregister_rwp_too_many_mappings(ctx: Context) -> None:
    """Where a mapping cannot be split, ENOMEM, all of it stays registered for RWP, and protected."""
    expect_unregister_fails(ctx, RWP)
