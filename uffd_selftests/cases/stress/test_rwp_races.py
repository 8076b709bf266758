# SPDX-License-Identifier: GPL-2.0-only
"""Races of read-write protection with accesses, and with all that takes pages away; and the loop of the document.

Each race does a fixed amount of work in native threads and then accounts for all of it: who waits, which page is still
protected, every byte.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, closing
from errno import EAGAIN, EBUSY, EINVAL, ENOENT, ENOMEM
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ACCESSED, ALL, ANON, ASYNC_RWP, MISSING, NOT_HUGETLB, PAGE_SIZE, RWP, SHARED, SUCCESS, SYNC_RWP, UNREGISTERED,
    Action, Advice, Area, Child, Context, FaultHandler, Feature, PageCategory, Pagemap, Race, Racer, Range,
    RwprotectMode, Uffd, Waiter, advise, adviser, collapse, eventually, expect, expect_modes, huge_area, peek, poke,
    remapper, run_race, rwprotector, small_area, toucher, unmap,
)  # fmt: skip

MANY = 48
"""Pages of an area of small ones: enough for several to be taken in one step, few enough to be through in a moment."""


def racing_area(ctx: Context) -> Area:
    """Map an area of so many pages as a race gets through in a moment, filled."""
    area = ctx.dst if ctx.mem.hugetlb else ctx.allocate(MANY)
    area.fill()
    return area


# ---- touches, protection and whatever else -------------------------------------------------------------------------

ROUNDS = 6
RESOLVE, PROTECT = RwprotectMode(0), RwprotectMode.RWP


def touchers(area: Area, rounds: int = ROUNDS) -> tuple[Racer, Racer]:
    """Two threads that touch an area: one reads it from its start on, one writes to it from its end on."""
    return (
        toucher(area.range, area.page_size, rounds=rounds),
        toucher(area.range, area.page_size, write=True, backwards=True, rounds=rounds),
    )


def expect_settled(uffd: Uffd, area: Area, when: str) -> None:
    """Assert that nobody waits, that a resolved area is free, and that nothing in it has changed."""
    uffd.expect_still_asleep(0)
    uffd.resolve(area.range)
    Pagemap.expect_protected(area, (), when)
    area.expect_pattern_of(area)
    uffd.expect_still_asleep(0)


@uffd_case("race-rwp", mem=ALL, features=SYNC_RWP, pages=4, rows=("RW-74", "RW-18"), kind=Kind.DETAIL, smp=True)
def test_race_rwp(ctx: Context) -> None:
    """Threads that touch pages which others protect and resolve go on in the end, each message being of a trap."""
    uffd, area = ctx.uffd, racing_area(ctx)
    uffd.register(area.range, RWP)
    with FaultHandler(uffd, area.range, area.page_size, log_size=0) as handler:
        protects, resolves, *touches = run_race(
            rwprotector(uffd, area.range, area.page_size, PROTECT, rounds=ROUNDS),
            rwprotector(uffd, area.range, area.page_size, RESOLVE, rounds=ROUNDS),
            *touchers(area),
        )
    for each in (protects, resolves, *touches):
        each.expect_only(SUCCESS)
    expect(handler.stats.resolved, handler.stats.rwp, "messages that were answered")
    # A page is protected so often at most, and two threads can be trapped each time.
    most = 2 * protects[SUCCESS]
    expect(handler.stats.messages <= most, True, f"{handler.stats.messages} messages, {most} at most")
    expect_settled(uffd, area, "after the race")


@uffd_case("race-rwp-thp", mem=(ANON,), features=SYNC_RWP, pages=4, rows=("RW-74", "RW-43"), kind=Kind.DETAIL, smp=True)
def test_race_rwp_thp(ctx: Context) -> None:
    """The same in transparent huge pages, which are protected as a whole and split while they are resolved."""
    uffd = ctx.uffd
    for _ in range(2):
        area = huge_area(ctx)
        uffd.register(area.range, RWP)
        part = Range(area.start + 100 * PAGE_SIZE, MANY * PAGE_SIZE)
        with FaultHandler(uffd, area.range, area.page_size, log_size=0):
            protects, *touches = run_race(
                rwprotector(uffd, area.range, area.range.len, PROTECT, rounds=8),
                toucher(part, PAGE_SIZE, rounds=3),
                toucher(part, PAGE_SIZE, write=True, backwards=True, rounds=3),
            )
        for each in (protects, *touches):
            each.expect_only(SUCCESS)
        expect_settled(uffd, area, "after the race")
        uffd.unregister(area.range)


@uffd_case("race-rwp-async", mem=ALL, features=ASYNC_RWP, pages=4, rows=("RW-74", "RW-77"), kind=Kind.DETAIL, smp=True)
def test_race_rwp_async(ctx: Context) -> None:
    """With RWP_ASYNC touches and protection in a race send no message and lose no byte."""
    uffd, area = ctx.uffd, racing_area(ctx)
    uffd.register(area.range, RWP)
    for each in run_race(
        rwprotector(uffd, area.range, area.page_size, PROTECT, rounds=2 * ROUNDS),
        rwprotector(uffd, area.range, area.page_size, RESOLVE, rounds=2 * ROUNDS),
        *touchers(area, 2 * ROUNDS),
    ):
        each.expect_only(SUCCESS)
    expect_settled(uffd, area, "after the race")


MOMENTS = 6


@uffd_case(
    "race-rwp-unregister", mem=ALL, features=SYNC_RWP, variants=("RWP", "MISSING, RWP"), pages=4,
    rows=("RW-74", "UNR-16"), kind=Kind.DETAIL, smp=True,
)  # fmt: skip
def test_race_rwp_unregister(ctx: Context, variant: str) -> None:
    """When a range is unregistered, and then woken, in the midst of touches, none sleeps on, and no page is trapped."""
    uffd, area = ctx.uffd, racing_area(ctx)
    for moment in range(MOMENTS):
        uffd.register(area.range, RWP | MISSING if "MISSING" in variant else RWP)
        uffd.rwprotect(area.range)
        mercy = rwprotector(uffd, area.range, area.page_size, RESOLVE)
        with Race(mercy, rwprotector(uffd, area.range, area.page_size, PROTECT), *touchers(area, 1)) as race:
            race.reached(0, mercy.count * moment // MOMENTS)
            uffd.release(area.range)
        for each, outcomes in zip(race.outcomes, ((SUCCESS, ENOENT),) * 2 + ((SUCCESS,),) * 2, strict=True):
            each.expect_only(*outcomes)
        uffd.expect_still_asleep(0)
        expect_modes(area.range, UNREGISTERED)
        Pagemap.expect_protected(area, (), "after UFFDIO_UNREGISTER")
    area.expect_pattern_of(area)


@uffd_case(
    "race-rwp-close", mem=ALL, features=SYNC_RWP, pages=4, rows=("RW-74", "CL-12"), kind=Kind.DETAIL, smp=True
)  # fmt: skip
def test_race_rwp_close(ctx: Context) -> None:
    """When the handle is closed in the midst of touches, all go on, and no page stays trapped."""
    area = racing_area(ctx)
    for moment in range(MOMENTS):
        with Uffd.open(SYNC_RWP) as uffd:
            uffd.register(area.range, RWP)
            uffd.rwprotect(area.range)
            with Race(*touchers(area, 1)) as race:
                for page in range(area.nr_pages * moment // MOMENTS):
                    uffd.resolve(area.page(page))
                uffd.close()
        for each in race.outcomes:
            each.expect_only(SUCCESS)
        expect_modes(area.range, UNREGISTERED)
        Pagemap.expect_protected(area, (), "after the handle was closed")
    area.expect_pattern_of(area)


@uffd_case("race-rwp-modes", mem=ALL, features=SYNC_RWP, pages=4, rows=("RW-74", "SM-06"), kind=Kind.DETAIL, smp=True)
def test_race_rwp_modes(ctx: Context) -> None:
    """When RWP_ASYNC is switched on in the midst of touches, all go on."""
    area = racing_area(ctx)
    with Uffd.open(ASYNC_RWP) as uffd:
        uffd.register(area.range, RWP)
        for moment in range(MOMENTS):
            uffd.set_mode(disable=Feature.RWP_ASYNC)
            uffd.rwprotect(area.range)
            with Race(*touchers(area, 1)) as race:
                for page in range(area.nr_pages * moment // MOMENTS):
                    uffd.resolve(area.page(page))
                uffd.set_mode(enable=Feature.RWP_ASYNC)
            for each in race.outcomes:
                each.expect_only(SUCCESS)
            uffd.expect_still_asleep(0)
            Pagemap.expect_protected(area, (), "after every page was touched")
    area.expect_pattern_of(area)


@uffd_case("race-rwp-fork", mem=ALL, features=SYNC_RWP, pages=4, spare_hugepages=4, rows=("RW-74", "RW-52"),
           kind=Kind.DETAIL, smp=True)  # fmt: skip
def test_race_rwp_fork(ctx: Context) -> None:
    """A child forked in the midst of touches and protection has every byte, and no page that is trapped."""
    uffd, area = ctx.uffd, racing_area(ctx)
    uffd.register(area.range, RWP)

    def life(_: object) -> None:
        Pagemap.expect_protected(area, (), "in the child")
        area.expect_pattern_of(area)
        area.fill(0, 1)

    with FaultHandler(uffd, area.range, area.page_size, log_size=0):
        with Race(rwprotector(uffd, area.range, area.page_size, PROTECT, rounds=2), *touchers(area, 2)) as race:
            for _ in range(3):
                with Child(life):
                    pass
        for each in race.outcomes:
            each.expect_only(SUCCESS)
    expect_settled(uffd, area, "after the race")


@uffd_case(
    "race-rwp-remap", mem=ALL, features=SYNC_RWP | Feature.EVENT_REMAP, pages=4, rows=("RW-74", "RW-57"),
    kind=Kind.DETAIL, smp=True,
)  # fmt: skip
def test_race_rwp_remap(ctx: Context) -> None:
    """Protection that races with a mapping which moves there and back is done, or refused, and loses no byte."""
    uffd, area = ctx.uffd, racing_area(ctx)
    with closing(ANON.allocate(area.range.len // PAGE_SIZE)) as place:
        unmap(place.range)
        uffd.register(area.range, RWP)
        with FaultHandler(uffd, area.range, area.page_size, rwp=Action.RECORD) as handler:
            moves, *others = run_race(
                remapper(area.range, place.start, rounds=ROUNDS),
                rwprotector(uffd, area.range, area.page_size, PROTECT, rounds=ROUNDS),
                rwprotector(uffd, area.range, area.page_size, RESOLVE, rounds=ROUNDS),
            )
        moves.expect_only(SUCCESS)
        for each in others:
            each.expect_only(SUCCESS, EAGAIN, ENOENT)
        expect(handler.stats.remap, 2 * ROUNDS, "UFFD_EVENT_REMAP messages")
        expect_modes(area.range, RWP)
        expect_settled(uffd, area, "after the race")


@uffd_case(
    "race-rwp-drop", mem=ALL, features=SYNC_RWP, pages=4, rows=("RW-74", "RW-28"), kind=Kind.DETAIL, smp=True
)  # fmt: skip
def test_race_rwp_drop(ctx: Context) -> None:
    """Threads that touch protected pages which are dropped meanwhile go on; what is in a file stays as it is."""
    uffd, area = ctx.uffd, racing_area(ctx)
    if area.fd is None or not area.mem.shared:
        advise(area.range, Advice.DONTNEED)  # so every page is zero whenever it is dropped
        for page in range(area.nr_pages):
            poke(area.page(page).start, b"\0")
    uffd.register(area.range, RWP)
    with FaultHandler(uffd, area.range, area.page_size, log_size=0):
        for each in run_race(
            adviser(area.range, area.page_size, Advice.DONTNEED, rounds=ROUNDS),
            rwprotector(uffd, area.range, area.page_size, PROTECT, rounds=ROUNDS),
            *touchers(area),
        ):
            each.expect_only(SUCCESS)
    uffd.expect_still_asleep(0)
    uffd.resolve(area.range)
    Pagemap.expect_protected(area, (), "after the race")
    if area.mem.shared:
        area.expect_pattern_of(area)
    else:
        area.expect_zero()
    uffd.expect_still_asleep(0)


@uffd_case("race-rwp-pageout", mem=NOT_HUGETLB, features=SYNC_RWP, needs=("swap",), pages=4, rows=("RW-74", "RW-31"),
           kind=Kind.DETAIL, smp=True)  # fmt: skip
def test_race_rwp_pageout(ctx: Context) -> None:
    """Threads that touch protected pages which are written to swap meanwhile go on, and no byte is lost."""
    uffd, area = ctx.uffd, racing_area(ctx)
    uffd.register(area.range, RWP)
    with FaultHandler(uffd, area.range, area.page_size, log_size=0):
        for each in run_race(
            adviser(area.range, 4 * area.page_size, Advice.PAGEOUT, rounds=ROUNDS),
            rwprotector(uffd, area.range, area.page_size, PROTECT, rounds=ROUNDS),
            *touchers(area),
        ):
            each.expect_only(SUCCESS)
    expect_settled(uffd, area, "after the race")


@uffd_case("race-rwp-collapse", mem=(ANON,), features=SYNC_RWP, pages=4, rows=("RW-74", "RW-39"), kind=Kind.DETAIL,
           smp=True)  # fmt: skip
def test_race_rwp_collapse(ctx: Context) -> None:
    """Threads that touch pages which others protect, resolve and collapse go on, and no byte is lost."""
    uffd, area = ctx.uffd, small_area(ctx)
    advise(area.range, Advice.HUGEPAGE)
    uffd.register(area.range, RWP)
    part = Range(area.start + 100 * PAGE_SIZE, MANY * PAGE_SIZE)
    with FaultHandler(uffd, area.range, PAGE_SIZE, log_size=0):
        collapses, *others = run_race(
            adviser(area.range, area.range.len, Advice.COLLAPSE, rounds=ROUNDS),
            rwprotector(uffd, part, PAGE_SIZE, PROTECT, rounds=3),
            rwprotector(uffd, part, PAGE_SIZE, RESOLVE, rounds=3),
            toucher(part, PAGE_SIZE, rounds=3),
            toucher(part, PAGE_SIZE, write=True, backwards=True, rounds=3),
        )
    collapses.expect_only(SUCCESS, EAGAIN, EBUSY, EINVAL, ENOMEM)
    for each in others:
        each.expect_only(SUCCESS)
    expect_settled(uffd, area, "after the race")
    collapse(area.range)
    area.expect_pattern_of(area)


# ---- the document's loop -------------------------------------------------------------------------------------------


class Writers:
    """Threads that write ever higher numbers to pages of their own, and look each time for the one before."""

    def __init__(self, area: Area, count: int) -> None:
        self._area = area
        self._over = threading.Event()
        self._threads = [Waiter(partial(self._write, number, count)) for number in range(count)]
        self.numbers = [0] * area.nr_pages
        """What was written to each page last."""
        self.spared: set[int] = set()
        """Pages to leave alone; a thread that is at one already goes on with it."""

    def _write(self, first: int, step: int) -> None:
        while not self._over.is_set():
            for page in range(first, self._area.nr_pages, step):
                if page in self.spared:
                    continue
                for offset in (0, self._area.page_size - 8):
                    address = self._area.page(page).start + offset
                    found = int.from_bytes(peek(address, 8), "little")
                    if offset == 0:
                        expect(found, self.numbers[page], f"page {page}: the number written last")
                    poke(address, (self.numbers[page] + 1).to_bytes(8, "little"))
                self.numbers[page] += 1

    def __enter__(self) -> Writers:
        self._stack = ExitStack()
        for thread in self._threads:
            self._stack.enter_context(thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._over.set()
        if kind is None:
            self._stack.close()

    def expect_going_on(self, *pages: int) -> None:
        """Wait until some number has been written to each of these pages, begun since."""
        before = list(self.numbers)
        eventually(lambda: all(self.numbers[page] > before[page] + 1 for page in pages), "the threads to write")


@uffd_case("rwp-eviction", mem=SHARED, features=ASYNC_RWP, needs=("pagemap_scan",), pages=6, rows=("RW-76",), smp=True)
def test_rwp_eviction(ctx: Context) -> None:
    """A monitor that tracks pages and evicts those that nobody touched loses nothing that threads write all the time.

    That is the loop of the document, but for one thing: evicted is what is protected, not whatever was not reported as
    accessed. A hole would be read as zeroes by way of the other mapping and stored over what has been evicted before,
    and a page that comes back after the scan is not protected.
    """
    uffd, area, length = ctx.uffd, ctx.dst, ctx.page_size
    storage = closing(ANON.allocate(area.range.len // PAGE_SIZE))
    for page in range(area.nr_pages):
        poke(area.alias_page(page).start, bytes(length))
    evicted = 0
    with storage as stored:
        uffd.register(area.range, RWP | MISSING)
        with (
            FaultHandler(uffd, area.range, length, src=stored.range, rwp=Action.RECORD, log_size=0) as handler,
            Writers(area, 2) as writers,
        ):
            for turn in range(4):
                writers.spared = {(3 * turn + page) % area.nr_pages for page in range(3)}
                uffd.rwprotect(area.range)
                writers.expect_going_on(*set(range(area.nr_pages)) - writers.spared)
                uffd.set_mode(disable=Feature.RWP_ASYNC)
                scan = Pagemap.scan(area.range, ACCESSED | PageCategory.PRESENT, inverted=ACCESSED, room=area.nr_pages)
                cold = [
                    page
                    for page in range(area.nr_pages)
                    if any(each.start <= area.page(page).start < each.end for each in scan.regions)
                ]
                Pagemap.expect_protected(area, cold, "at the scan, of what is not accessed")
                writers.spared = set()
                if cold:
                    eventually(lambda: uffd.fdinfo.total > 0, "a thread to want a page that is to go")
                for page in cold:
                    poke(stored.start + page * length, peek(area.alias_page(page).start, length))
                    advise(area.alias_page(page), Advice.REMOVE)
                    uffd.wake(area.page(page))
                    evicted += 1
                uffd.set_mode(enable=Feature.RWP_ASYNC)
            writers.expect_going_on(*range(area.nr_pages))
        for page, number in enumerate(writers.numbers):
            for offset in (0, length - 8):
                found = int.from_bytes(peek(area.page(page).start + offset, 8), "little")
                expect(found, number, f"page {page} offset {offset:#x}: the number written last")
    expect(evicted > 0, True, "whether pages were evicted")
    expect(handler.stats.missing > 0, True, "whether pages came back")

