# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_SET_MODE against threads that access protected pages: each access meets one mode or the other."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC_RWP, NOT_HUGETLB, PAGE_SIZE, READ_TRAPPED, RWP, WRITE_TRAPPED, Area, Context, Fault, Feature,
    Pagemap, Waiter, expect, huge_area, peek, promise, rwp_filled, touch, uapi, undisturbed,
)  # fmt: skip

THREADS = 4
ROUNDS = 24


def toggle_round(ctx: Context, area: Area, *, write: bool, drain: bool) -> tuple[int, int]:
    """Switch under threads that access each page once; return how many were passed silently, and how many reported.

    Once the switch is disabled, a page that is protected then must be reported, and no other; once it is enabled no
    message may be queued any more.
    """
    uffd, each = ctx.uffd, area.nr_pages // THREADS
    uffd.set_mode(enable=Feature.RWP_ASYNC)
    uffd.rwprotect(area.range)
    reported: list[int] = []
    with ExitStack() as stack:
        firsts = range(0, area.nr_pages, each)
        if write:  # stores alone: an access that changes nothing may begin with a load, in an emulator
            calls = [partial(area.pattern.fill, area.start, first, each) for first in firsts]
        else:
            calls = [partial(touch, area.page(first, each), area.page_size) for first in firsts]
        threads = [stack.enter_context(Waiter(call)) for call in calls]
        uffd.set_mode(disable=Feature.RWP_ASYNC)
        marks = Pagemap.have(area.range, uapi.PM_UFFD_WP, area.page_size)
        left = {page for page, mark in enumerate(marks) if mark}
        wanted = len(left) if drain else len(left) // 2
        while len(reported) < wanted:
            message = uffd.wait("the fault of a page that was protected when the switch was disabled")
            if not isinstance(message, Fault):
                raise AssertionError(f"expected a page fault, got {message}")
            expect(str(message.flags), str(WRITE_TRAPPED if write else READ_TRAPPED), "flags of a message")
            page = (message.address - area.start) // area.page_size
            expect((page in left, page in reported), (True, False), f"page {page}: protected then, reported already")
            reported.append(page)
            uffd.resolve(area.page(page))
        if not drain:
            uffd.set_mode(enable=Feature.RWP_ASYNC)
            uffd.expect_no_message()
        for thread in threads:
            thread.result()
            uffd.expect_no_message()
    Pagemap.expect_protected(area, (), "after accesses to all")
    uffd.expect_asleep(0)
    return area.nr_pages - len(left), len(reported)


def toggle_rounds(ctx: Context, area: Area) -> None:
    """Do many rounds, and say what they met."""
    silent = told = 0
    for number in range(ROUNDS):
        with promise("SM-11", f"round {number}"):
            passed, reported = toggle_round(ctx, area, write=number % 2 == 0, drain=number % 4 < 2)
        silent, told = silent + passed, told + reported
    print(f"{silent} pages accessed before the switch was disabled, {told} reported after it")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))


@uffd_case("set-mode-race", mem=ALL, features=ASYNC_RWP, pages=16, rows=("SM-11",), smp=True)
def test_set_mode_race(ctx: Context) -> None:
    """Once disabled no protected page is passed silently; once enabled no message is queued, whoever is under way."""
    toggle_rounds(ctx, rwp_filled(ctx))


@uffd_case("set-mode-race-many", mem=NOT_HUGETLB, features=ASYNC_RWP, pages=2048, rows=("SM-11",), smp=True)
def test_set_mode_race_many(ctx: Context) -> None:
    """The same with many small pages, some of which the threads are past when the switch comes."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    for number in range(ROUNDS):
        uffd.set_mode(enable=Feature.RWP_ASYNC)
        uffd.rwprotect(area.range)
        calls = [partial(touch, area.page(first, 512), PAGE_SIZE, write=True) for first in range(0, 2048, 512)]
        with ExitStack() as stack, promise("SM-11", f"round {number}"):
            threads = [stack.enter_context(Waiter(call)) for call in calls]
            for _ in range(3):
                uffd.set_mode(disable=Feature.RWP_ASYNC)
                before = Pagemap.have(area.range, uapi.PM_UFFD_WP)
                messages = uffd.read(8)
                after = Pagemap.have(area.range, uapi.PM_UFFD_WP)
                expect(before == after, True, "whether the same pages are protected while the switch is disabled")
                for message in messages:
                    inside = isinstance(message, Fault) and before[(message.address - area.start) // PAGE_SIZE]
                    expect(inside, True, f"whether {message} tells of a protected page")
                uffd.set_mode(enable=Feature.RWP_ASYNC)
                uffd.expect_no_message()
            for thread in threads:
                thread.result()
            uffd.expect_no_message()
            Pagemap.expect_protected(area, (), "after accesses to all")
    area.expect_pattern_of(area)


@uffd_case("set-mode-race-thp", mem=(ANON,), features=ASYNC_RWP, needs=("thp",), rows=("SM-11",), smp=True)
def test_set_mode_race_thp(ctx: Context) -> None:
    """The same of transparent huge pages, mapped as such when the threads begin."""
    area, uffd = huge_area(ctx, THREADS), ctx.uffd
    step = area.range.len // THREADS
    uffd.register(area.range, RWP)
    for number in range(ROUNDS):
        uffd.set_mode(enable=Feature.RWP_ASYNC)
        uffd.rwprotect(area.range)
        with ExitStack() as stack, promise("SM-11", f"round {number}"):
            starts = range(area.start, area.range.end, step)
            threads = [stack.enter_context(Waiter(partial(peek, start + step // 2))) for start in starts]
            uffd.set_mode(disable=Feature.RWP_ASYNC)
            left = [start for start in starts if Pagemap.uffd_wp(start)]
            told = []
            for _ in left:
                message = uffd.wait("the fault of a huge page that was protected when the switch was disabled")
                told.append(message.address - step // 2 if isinstance(message, Fault) else 0)
            expect(sorted(told), left, "huge pages reported")
            uffd.set_mode(enable=Feature.RWP_ASYNC)
            for thread in threads:
                thread.result()
            uffd.expect_no_message()
            Pagemap.expect_protected(area, (), "after accesses to all")
    area.expect_pattern_of(area)
