# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_UNREGISTER: what becomes of the range, of its pages, and of the threads that sleep in its faults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EFAULT, EINVAL, ENOENT, ENOMEM
from functools import partial
from signal import SIGBUS

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, EACH_HUGETLB, HUGETLB, MAP_FIXED, MAP_SHARED, MINOR, MISSING, NOT_HUGETLB, PAGE_SIZE, PROT_READ, RWP,
    SHMEM, SHMEM_PRIVATE, SYNC_RWP, UNREGISTERED, WP, WRITEPROTECT, Advice, Context, CopyMode, Feature, PagefaultFlag,
    Pagemap, Range, RegisterMode, Uffd, UffdError, Waiter, advise, bad_ranges, eventually, expect, expect_errno,
    expect_mappings, expect_modes, expect_same, faulting, faulting_pages, huge_area, keep_small, map_memory,
    no_mapping_left, orphaned, peek, plain_file, poke, promise, protect, refuses, saw, swap_out, touch, touch_trapped,
    uapi, undisturbed, unmap, unread_event,
)  # fmt: skip


def slept_on(uffd: Uffd) -> int:
    """Count the threads, whose messages were read, that have not been woken.

    One that was woken may have faulted again on the way and sleep once more, behind a message that is not read yet:
    see D-UNR-09. It does not count.
    """
    state = uffd.fdinfo
    return state.total - state.pending


def expect_slept_on(uffd: Uffd, threads: int) -> None:
    """Assert how many threads have not been woken."""
    expect(slept_on(uffd), threads, "threads that sleep on (total: less pending: of fdinfo)")


# ---- arguments -----------------------------------------------------------------------------------------------------


@uffd_case("unregister-errors", mem=ALL, pages=2, rows=("UNR-03",))
def test_unregister_errors(ctx: Context) -> None:
    """UFFDIO_UNREGISTER refuses what is not whole pages of user space, and an argument that it cannot read."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for what, bad in bad_ranges(ctx.dst.page(0)).items():
        with promise("UNR-03", what), refuses(EINVAL):
            ctx.uffd.unregister(bad)
    with promise("UNR-03", "argument NULL"), refuses(EFAULT):
        ctx.uffd.raw_ioctl(uapi.UFFDIO_UNREGISTER, 0)
    expect_modes(ctx.dst.range, MISSING, MISSING)


@uffd_case("unregister-nothing-mapped", mem=(ANON,), pages=5, rows=("UNR-04",))
def test_unregister_nothing_mapped(ctx: Context) -> None:
    """A range without any mapping is refused, also right before and right behind one."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    for number in (1, 3):
        unmap(ctx.dst.page(number))
        with promise("UNR-04", f"hole at page {number}"), refuses(EINVAL):
            ctx.uffd.unregister(ctx.dst.page(number))
    for number in (0, 2, 4):
        expect_modes(ctx.dst.page(number), MISSING)


@uffd_case("unregister-hugetlb-alignment", mem=EACH_HUGETLB, pages=2, rows=("UNR-07",))
def test_unregister_hugetlb_alignment(ctx: Context) -> None:
    """A range must not start or end inside of a huge page."""
    start, huge = ctx.dst.start, ctx.page_size
    ctx.uffd.register(ctx.dst.range, MISSING)
    for what, bad in {
        "start inside": Range(start + PAGE_SIZE, huge),
        "start inside, end aligned": Range(start + PAGE_SIZE, 2 * huge - PAGE_SIZE),
        "one base page": Range(start, PAGE_SIZE),
        "end inside": Range(start, huge - PAGE_SIZE),
        "end inside of the second": Range(start, huge + PAGE_SIZE),
    }.items():
        with promise("UNR-07", what), refuses(EINVAL):
            ctx.uffd.unregister(bad)
        expect_modes(ctx.dst.range, MISSING, MISSING)


@uffd_case("unregister-hugetlb-hole", mem=EACH_HUGETLB, pages=1, rows=("UNR-07",), kind=Kind.DETAIL)
def test_unregister_hugetlb_hole(ctx: Context) -> None:
    """Where huge pages come first in it, a range must start at one, even if it starts in the hole before them."""
    hole = Range(ctx.dst.start - PAGE_SIZE, PAGE_SIZE)
    unmap(hole)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("UNR-07"), refuses(EINVAL):
        ctx.uffd.unregister(Range(hole.start, hole.len + ctx.page_size))
    expect_modes(ctx.dst.range, MISSING)


@uffd_case("unregister-orphaned", mem=(ANON,), pages=1, rows=("UNR-14",), kind=Kind.DETAIL)
def test_unregister_orphaned(ctx: Context) -> None:
    """When the process has exited or runs another program, UFFDIO_UNREGISTER says ENOMEM."""
    for by_exec in (False, True):
        when = "after exec" if by_exec else "after exit"
        with orphaned(ctx.dst.range, MISSING, by_exec=by_exec) as uffd, promise("UNR-14", when), refuses(ENOMEM):
            uffd.unregister(ctx.dst.range)


@uffd_case("unregister-file", mem=(ANON,), pages=3, rows=("UNR-05",))
def test_unregister_file(ctx: Context) -> None:
    """A range that holds what can never be registered is refused as a whole."""
    with plain_file(PAGE_SIZE) as fd:
        file = map_memory(PAGE_SIZE, at=ctx.dst.page(1).start, flags=MAP_SHARED | MAP_FIXED, fd=fd)
        for number in (0, 2):
            ctx.uffd.register(ctx.dst.page(number), MISSING)
        for where in (Range(file, PAGE_SIZE), ctx.dst.page(0, 2), ctx.dst.page(1, 2), ctx.dst.range):
            with promise("UNR-05", str(where)), refuses(EINVAL):
                ctx.uffd.unregister(where)
        expect_modes(ctx.dst.range, MISSING, UNREGISTERED, MISSING)


@uffd_case("unregister-too-many-mappings", mem=(ANON,), pages=3, rows=("UNR-08",), kind=Kind.DETAIL)
def test_unregister_too_many_mappings(ctx: Context) -> None:
    """Where a mapping cannot be split UFFDIO_UNREGISTER says ENOMEM, and all of it stays registered."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with no_mapping_left(), promise("UNR-08"), refuses(ENOMEM):
        ctx.uffd.unregister(ctx.dst.page(0))
    expect_modes(ctx.dst.range, MISSING, MISSING, MISSING)


# ---- what is registered afterwards ---------------------------------------------------------------------------------


@uffd_case("unregister", mem=ALL, pages=3, rows=("UNR-01",))
def test_unregister(ctx: Context) -> None:
    """UFFDIO_UNREGISTER ends the reporting of faults, keeps the pages, and leaves missing ones to the kernel."""
    ctx.dst.fill(0, 1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.copy(ctx.dst.page(1).start, ctx.dst.start, ctx.page_size)
    ctx.uffd.unregister(ctx.dst.range)
    with promise("UNR-01"):
        expect_modes(ctx.dst.range, UNREGISTERED)
        ctx.dst.expect_pattern_of(ctx.dst, 0, 1, write_back=True)
        undisturbed(ctx.uffd, lambda: ctx.dst.expect_zero(2, 1))
        expect_same(ctx.dst.start, ctx.dst.page(1).start, ctx.page_size, "the page that COPY filled")
        with refuses(ENOENT):
            ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@uffd_case("unregister-every-mode", mem=ALL, features=WRITEPROTECT, pages=1, rows=("UNR-01",))
def test_unregister_every_mode(ctx: Context) -> None:
    """Whatever the modes, no flag is left, and the range can be registered again, in other modes or by others."""
    minor = (MINOR, MISSING | MINOR, WP | MINOR, MISSING | WP | MINOR)
    for mode in (MISSING, WP, MISSING | WP, *(minor if ctx.mem is not ANON else ())):
        with promise("UNR-01", str(mode)), Uffd.open() as other:
            ctx.uffd.register(ctx.dst.range, mode)
            ctx.uffd.unregister(ctx.dst.range)
            expect_modes(ctx.dst.range, UNREGISTERED)
            other.register(ctx.dst.range, MISSING)


@uffd_case("unregister-part", mem=ALL, pages=5, rows=("UNR-08",), bugs=(48,))
def test_unregister_part(ctx: Context) -> None:
    """Unregistering a part, in the middle, at the start or at the end, affects exactly that part."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    left = [MISSING] * 5
    for number in (2, 0, 4):
        ctx.uffd.unregister(ctx.dst.page(number))
        left[number] = UNREGISTERED
        with promise("UNR-08", f"page {number}"):
            expect_modes(ctx.dst.range, *left)
            undisturbed(ctx.uffd, partial(ctx.dst.expect_zero, number, 1))
    for number in (1, 3):
        with promise("UNR-08", f"page {number}, still registered"), faulting(ctx.uffd, ctx.dst.page(number).start):
            ctx.uffd.copy(ctx.dst.page(number).start, ctx.src.start, ctx.page_size)


@uffd_case("unregister-merges", mem=NOT_HUGETLB, pages=4, rows=("UNR-01", "UNR-08"))
def test_unregister_merges(ctx: Context) -> None:
    """What registering has cut into several mappings becomes one again."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.unregister(ctx.dst.page(1, 2))
    expect_mappings(ctx.dst, 1, 2, 1)
    ctx.uffd.unregister(ctx.dst.page(0))
    expect_mappings(ctx.dst, 3, 1)
    ctx.uffd.unregister(ctx.dst.range)
    expect_mappings(ctx.dst, 4)


@uffd_case("unregister-nothing", mem=ALL, pages=2, rows=("UNR-02",), kind=Kind.DETAIL)
def test_unregister_nothing(ctx: Context) -> None:
    """Memory that never was registered, or is no more, can be unregistered."""
    with promise("UNR-02", "never registered"):
        ctx.uffd.unregister(ctx.dst.range)
    ctx.uffd.register(ctx.dst.range, MISSING)
    for _ in range(2):
        with promise("UNR-02", "twice"):
            ctx.uffd.unregister(ctx.dst.range)
            expect_modes(ctx.dst.range, UNREGISTERED)


@uffd_case("unregister-rest", mem=ALL, pages=5, rows=("UNR-02", "UNR-08"), kind=Kind.DETAIL)
def test_unregister_rest(ctx: Context) -> None:
    """One call unregisters all that is registered in the range, over holes and what is not, and nothing behind it."""
    for number in (1, 3, 4):
        ctx.uffd.register(ctx.dst.page(number), MISSING)
    with promise("UNR-02"):
        ctx.uffd.unregister(ctx.dst.page(0, 4))
        expect_modes(ctx.dst.range, *[UNREGISTERED] * 4, MISSING)
    ctx.uffd.register(ctx.dst.range, MISSING)
    unmap(ctx.dst.page(2))
    with promise("UNR-02", "with a hole"):
        ctx.uffd.unregister(ctx.dst.page(1, 3))
        expect_modes(ctx.dst.page(0, 2), MISSING, UNREGISTERED)
        expect_modes(ctx.dst.page(3, 2), UNREGISTERED, MISSING)


@uffd_case("unregister-protections", mem=ALL, features=WRITEPROTECT, pages=3, rows=("UNR-08",), kind=Kind.DETAIL)
def test_unregister_protections(ctx: Context) -> None:
    """One call unregisters neighbouring mappings whatever their protection and modes."""
    protect(ctx.dst.page(1), PROT_READ)
    for number, mode in enumerate((MISSING, MISSING | WP, WP)):
        ctx.uffd.register(ctx.dst.page(number), mode)
    ctx.uffd.unregister(ctx.dst.range)
    expect_modes(ctx.dst.range, UNREGISTERED, UNREGISTERED, UNREGISTERED)


@uffd_case("unregister-foreign", mem=ALL, pages=2, rows=("UNR-06",), kind=Kind.VERSION)
def test_unregister_foreign(ctx: Context) -> None:
    """What another handle has registered cannot be unregistered; kernels before that was checked do it."""
    with Uffd.open() as owner, promise("UNR-06"):
        owner.register(ctx.dst.page(0), MISSING)
        try:
            ctx.uffd.unregister(ctx.dst.range)
        except UffdError as error:
            expect_errno(error, EINVAL, "errno")
            saw("EINVAL")
            expect_modes(ctx.dst.range, MISSING, UNREGISTERED)
            with faulting(owner, ctx.dst.start):
                owner.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
        else:
            expect(Feature.RWP in ctx.uffd.offered, False, "success on a kernel with UFFD_FEATURE_RWP, as of Linux 7.3")
            saw("success")
            expect_modes(ctx.dst.range, UNREGISTERED, UNREGISTERED)
            undisturbed(owner, lambda: ctx.dst.expect_zero(0, 1))


@uffd_case("unregister-file-async", mem=(ANON,), features=Feature.WP_ASYNC, pages=3, rows=("UNR-01", "REG-20"))
def test_unregister_file_async(ctx: Context) -> None:
    """A file registered with UFFD_FEATURE_WP_ASYNC can be unregistered, also together with other memory."""
    with plain_file(PAGE_SIZE) as fd:
        map_memory(PAGE_SIZE, at=ctx.dst.page(1).start, flags=MAP_SHARED | MAP_FIXED, fd=fd)
        ctx.uffd.register(ctx.dst.range, WP)
        with promise("UNR-01"):
            ctx.uffd.unregister(ctx.dst.range)
            expect_modes(ctx.dst.range, UNREGISTERED, UNREGISTERED, UNREGISTERED)


@uffd_case(
    "unregister-unread-event",
    mem=(ANON,),
    features=Feature.EVENT_REMOVE,
    pages=2,
    rows=("UNR-02",),
    kind=Kind.DETAIL,
)
def test_unregister_unread_event(ctx: Context) -> None:
    """While an event waits to be read, its range can be unregistered all the same, and the event stays."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with unread_event(ctx.uffd, ctx.dst.range):
        ctx.uffd.unregister(ctx.dst.range)
        expect_modes(ctx.dst.range, UNREGISTERED)


# ---- who wakes -----------------------------------------------------------------------------------------------------


@uffd_case("unregister-wakes", mem=ALL, pages=5, rows=("UNR-09", "UNR-10"), kind=Kind.DETAIL)
def test_unregister_wakes(ctx: Context) -> None:
    """Threads that wait for missing pages of the range wake and find zeroes; those outside of it sleep on."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1, 2, 3, 4) as threads:
        ctx.uffd.unregister(ctx.dst.page(1, 3))
        with promise("UNR-09, UNR-10"):
            expect_slept_on(ctx.uffd, 2)
        ctx.uffd.wake(ctx.dst.page(1, 3))
        with promise("UNR-09"):
            expect([thread.result() for thread in threads[1:4]], [b"\0"] * 3, "bytes read in the range")
        with promise("UNR-10"):
            ctx.uffd.expect_still_asleep(2)
        for number in (0, 4):
            ctx.uffd.copy(ctx.dst.page(number).start, ctx.src.start, ctx.page_size)


@uffd_case("unregister-wakes-writer", mem=ALL, pages=1, rows=("UNR-09",), kind=Kind.DETAIL)
def test_unregister_wakes_writer(ctx: Context) -> None:
    """A thread that waits to write wakes too, and its write gets done."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    write = PagefaultFlag.WRITE
    with faulting(ctx.uffd, ctx.dst.start, flags=write, call=lambda: poke(ctx.dst.start, b"\1")), promise("UNR-09"):
        ctx.uffd.unregister(ctx.dst.range)
        expect_slept_on(ctx.uffd, 0)
        ctx.uffd.wake(ctx.dst.range)
    expect(peek(ctx.dst.start, 2), b"\1\0", "UNR-09: the bytes written")


@uffd_case("unregister-drops-message", mem=ALL, pages=2, rows=("UNR-09", "RD-16"), kind=Kind.DETAIL)
def test_unregister_drops_message(ctx: Context) -> None:
    """A message that nobody has read goes with the range; those of other ranges stay."""
    gone, kept = ctx.dst.page(0), ctx.dst.page(1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, gone.start, read=False), Waiter(lambda: peek(kept.start)):
        eventually(lambda: ctx.uffd.fdinfo.pending == 2, "two messages queued")
        ctx.uffd.unregister(gone)
        with promise("UNR-09"):
            ctx.uffd.wait_fault(kept.start)
        ctx.uffd.wake(gone)
        ctx.uffd.copy(kept.start, ctx.src.start, kept.len)
    ctx.uffd.expect_no_message()


@uffd_case("unregister-wakes-mappings", mem=ALL, pages=4, rows=("UNR-09", "UNR-10"), kind=Kind.DETAIL)
def test_unregister_wakes_mappings(ctx: Context) -> None:
    """One call over several mappings wakes the threads of each."""
    protect(ctx.dst.page(1), PROT_READ)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting_pages(ctx.uffd, ctx.dst, 0, 1, 2, 3):
        ctx.uffd.unregister(ctx.dst.page(0, 3))
        with promise("UNR-09, UNR-10"):
            expect_slept_on(ctx.uffd, 1)
        ctx.uffd.wake(ctx.dst.page(0, 3))
        ctx.uffd.copy(ctx.dst.page(3).start, ctx.src.start, ctx.page_size)


@contextmanager
def blocked_on_wp(ctx: Context) -> Iterator[None]:
    """Have a thread wait for a write-protected page of a range registered as WP."""
    ctx.uffd.register(ctx.dst.range, WP)
    poke(ctx.dst.start, b"\1")
    ctx.uffd.writeprotect(ctx.dst.page(0))
    with faulting(ctx.uffd, ctx.dst.start, write=True, flags=PagefaultFlag.WRITE | PagefaultFlag.WP):
        yield


@contextmanager
def blocked_on_minor(ctx: Context) -> Iterator[None]:
    """Have a thread wait for a page of the page cache in a range registered as MINOR."""
    poke(ctx.dst.alias.start, b"\1")
    ctx.uffd.register(ctx.dst.range, MINOR)
    with faulting(ctx.uffd, ctx.dst.start, flags=PagefaultFlag.MINOR):
        yield


def unregister(ctx: Context) -> int:
    """Unregister the range and return how many threads sleep on; these are woken, to be out of the way."""
    ctx.uffd.unregister(ctx.dst.range)
    asleep = slept_on(ctx.uffd)
    ctx.uffd.wake(ctx.dst.range)
    return asleep


WP_SLEEPS_ON = Defect(
    id="D-UNR-11",
    summary="UFFDIO_UNREGISTER of a range registered as WP only leaves threads blocked in it asleep for good",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="follow every UFFDIO_UNREGISTER with an UFFDIO_WAKE of the same range",
    shows=r"threads that sleep on: expected 0, got 1",
)
MINOR_SLEEPS_ON = Defect(
    id="D-UNR-12",
    summary="UFFDIO_UNREGISTER of a range registered as MINOR only leaves threads blocked in it asleep for good",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="follow every UFFDIO_UNREGISTER with an UFFDIO_WAKE of the same range",
    shows=r"threads that sleep on: expected 0, got 1",
)


@uffd_case("unregister-wakes-wp", mem=ALL, features=WRITEPROTECT, pages=1, rows=("UNR-11",), defect=WP_SLEEPS_ON)
def test_unregister_wakes_wp(ctx: Context) -> None:
    """A thread that waits for a write-protected page wakes when its range is unregistered."""
    with blocked_on_wp(ctx):
        asleep = unregister(ctx)
    expect(asleep, 0, "UNR-11: threads that sleep on")


@uffd_case(
    "unregister-wakes-minor",
    mem=(SHMEM, HUGETLB),
    features=Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS,
    pages=1,
    rows=("UNR-12",),
    defect=MINOR_SLEEPS_ON,
)
def test_unregister_wakes_minor(ctx: Context) -> None:
    """A thread that waits in a minor fault wakes when its range is unregistered."""
    with blocked_on_minor(ctx):
        asleep = unregister(ctx)
    expect(asleep, 0, "UNR-12: threads that sleep on")


@uffd_case("unregister-then-wake-wp", mem=ALL, features=WRITEPROTECT, pages=1, rows=("UNR-11",), kind=Kind.DETAIL)
def test_unregister_then_wake_wp(ctx: Context) -> None:
    """A thread that waits for a write-protected page writes once its range is unregistered and then woken."""
    with blocked_on_wp(ctx), promise("UNR-11"):
        ctx.uffd.release(ctx.dst.range)
    expect(peek(ctx.dst.start), b"\1", "UNR-11: the byte written")
    ctx.uffd.expect_no_message()


@uffd_case(
    "unregister-then-wake-minor",
    mem=(SHMEM, HUGETLB),
    features=Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS,
    pages=1,
    rows=("UNR-12",),
    kind=Kind.DETAIL,
)
def test_unregister_then_wake_minor(ctx: Context) -> None:
    """A thread that waits in a minor fault goes on once its range is unregistered and then woken."""
    with blocked_on_minor(ctx), promise("UNR-12"):
        ctx.uffd.release(ctx.dst.range)
    ctx.uffd.expect_no_message()


@uffd_case(
    "unregister-wakes-both", mem=ALL, features=WRITEPROTECT, pages=2, rows=("UNR-09",), kind=Kind.DETAIL
)
def test_unregister_wakes_both(ctx: Context) -> None:
    """In a range registered as MISSING and WP, threads wake from either kind of fault."""
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size, CopyMode.WP)
    flags = PagefaultFlag.WRITE | PagefaultFlag.WP
    with faulting(ctx.uffd, ctx.dst.start, write=True, flags=flags), faulting(ctx.uffd, ctx.dst.page(1).start):
        asleep = unregister(ctx)
    expect(asleep, 0, "UNR-09: threads that sleep on")


RACE = Defect(
    id="D-UNR-09",
    summary="UFFDIO_UNREGISTER wakes the waiters before it locks the mapping: a fault that comes in between sleeps on "
    "for good, its message stays readable, and to UFFDIO_COPY its page is ENOENT",
    kernels="6.12.117, 6.18.44, 7.3.4; not 6.1, where faults take mmap_lock",
    advice="follow every UFFDIO_UNREGISTER with an UFFDIO_WAKE of the same range, also on ENOENT of a fill",
    shows=r"threads asleep in a range that is not registered any more .* expected 0, got 1",
)
ROUNDS = 40
LEAD = 256


def race_unregister(ctx: Context, mode: RegisterMode) -> None:
    """Unregister a range again and again while a thread is about to fault in it, and count who sleeps on.

    The protected pages are there to make UFFDIO_UNREGISTER take long between the wake and the lock; the thread's way
    through the pages before the range makes it arrive in the meantime, one time in three.
    """
    where = ctx.dst.page(LEAD, ctx.nr_pages - LEAD)
    keep_small(ctx.dst.range)
    ctx.dst.fill()
    for _ in range(ROUNDS):
        advise(ctx.dst.page(0, LEAD + 1), Advice.DONTNEED)
        ctx.uffd.register(where, mode)
        if RWP in mode:
            ctx.uffd.rwprotect(where)
        with Waiter(lambda: touch(ctx.dst.page(0, LEAD + 1), PAGE_SIZE)):
            ctx.uffd.unregister(where)
            asleep = ctx.uffd.fdinfo.total
            ctx.uffd.wake(where)
        expect(asleep, 0, "UNR-09: threads asleep in a range that is not registered any more (total: of fdinfo)")
        ctx.uffd.read(8)


@uffd_case("unregister-race", mem=(ANON,), pages=(32 << 20) // PAGE_SIZE, rows=("UNR-09",), defect=RACE, smp=True)
def test_unregister_race(ctx: Context) -> None:
    """A fault that comes while its range is being unregistered does not sleep on."""
    race_unregister(ctx, MISSING | WP)


@uffd_case(
    "unregister-race-rwp",
    mem=(ANON,),
    features=SYNC_RWP,
    pages=(32 << 20) // PAGE_SIZE,
    rows=("UNR-09", "UNR-19"),
    defect=RACE,
    smp=True,
)
def test_unregister_race_rwp(ctx: Context) -> None:
    """A fault that comes while its range, read-write-protected, is being unregistered does not sleep on."""
    race_unregister(ctx, MISSING | RWP)


# ---- what is left of protection and poison -------------------------------------------------------------------------


@uffd_case("unregister-clears-wp", mem=ALL, features=WRITEPROTECT, pages=4, rows=("UNR-13",))
def test_unregister_clears_wp(ctx: Context) -> None:
    """The protection of present pages goes with the part that is unregistered, and stays everywhere else."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    ctx.uffd.unregister(ctx.dst.page(1, 2))
    with promise("UNR-13"):
        Pagemap.expect_protected(ctx.dst, (0, 3), "after unregistering pages 1 and 2")
        undisturbed(ctx.uffd, lambda: ctx.dst.fill(1, 2))
        for number in (0, 3):
            page, flags = ctx.dst.page(number), PagefaultFlag.WRITE | PagefaultFlag.WP
            with faulting(ctx.uffd, page.start, write=True, flags=flags):
                ctx.uffd.unprotect(page)
    ctx.uffd.unregister(ctx.dst.range)
    ctx.dst.expect_pattern_of(ctx.dst)


@uffd_case(
    "unregister-clears-markers",
    mem=ALL,
    features=WRITEPROTECT | Feature.WP_UNPOPULATED,
    pages=4,
    rows=("UNR-13",),
)
def test_unregister_clears_markers(ctx: Context) -> None:
    """The protection of pages that are not there goes and stays in the same way."""
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    Pagemap.expect_protected(ctx.dst, range(4), "after protecting")
    ctx.uffd.unregister(ctx.dst.page(1, 2))
    with promise("UNR-13"):
        Pagemap.expect_protected(ctx.dst, (0, 3), "after unregistering pages 1 and 2")
        undisturbed(ctx.uffd, lambda: poke(ctx.dst.page(1).start, b"\1"))
    ctx.uffd.unregister(ctx.dst.range)
    Pagemap.expect_protected(ctx.dst, (), "after unregistering everything")


@uffd_case(
    "unregister-clears-swapped",
    mem=(ANON, SHMEM_PRIVATE),
    features=WRITEPROTECT,
    needs=("swap",),
    pages=2,
    rows=("UNR-13",),
)
def test_unregister_clears_swapped(ctx: Context) -> None:
    """The protection of pages that are swapped out goes and stays in the same way."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    swap_out(ctx.dst.range)
    ctx.uffd.unregister(ctx.dst.page(1))
    with promise("UNR-13"):
        Pagemap.expect_protected(ctx.dst, (0,), "after unregistering page 1, swapped out")
        undisturbed(ctx.uffd, lambda: ctx.dst.fill(1, 1))


@uffd_case(
    "unregister-clears-huge", mem=(ANON,), features=WRITEPROTECT, needs=("thp",), pages=1, rows=("UNR-13",)
)
def test_unregister_clears_huge(ctx: Context) -> None:
    """The protection of a transparent huge page goes as a whole, or with the part that is unregistered."""
    for unregistered in (1, 2):
        area = huge_area(ctx)
        part = area.page(0, area.nr_pages // unregistered)
        ctx.uffd.register(area.range, WP)
        ctx.uffd.writeprotect(area.range)
        ctx.uffd.unregister(part)
        with promise("UNR-13", f"one of {unregistered} parts unregistered"):
            Pagemap.expect_protected(area, range(part.len // PAGE_SIZE, area.nr_pages), "after that")
            undisturbed(ctx.uffd, partial(area.fill, 0, part.len // PAGE_SIZE))
        ctx.uffd.unregister(area.range)
        area.expect_pattern_of(area, write_back=True)


@uffd_case("unregister-poison", mem=ALL, features=Feature.POISON, pages=2, rows=("UNR-15",), kind=Kind.DETAIL)
def test_unregister_poison(ctx: Context) -> None:
    """Poisoned pages stay poisoned."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.poison(ctx.dst.page(0))
    ctx.uffd.unregister(ctx.dst.range)
    with promise("UNR-15"):
        for write in (False, True):
            (trap,) = touch_trapped(ctx.dst.page(0), ctx.page_size, write=write)
            expect(trap and trap.signo, SIGBUS, f"signal of {'a write' if write else 'a read'}")
        undisturbed(ctx.uffd, lambda: ctx.dst.expect_zero(1, 1))
