# SPDX-License-Identifier: GPL-2.0-only
"""Virtual processors that count without a pause while their memory is protected, moved, dropped and filled.

What they have counted must add up: an increment that went to a page no longer there, or that was made twice, shows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from errno import EAGAIN, EBUSY
from functools import partial

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC, KVM, MISSING, MOVE, PAGE_SIZE, READ_TRAPPED, RESTART, RWP, SCAN, SYNC_RWP, TRAPPED, WP, WRITE,
    WRITEPROTECT, WRITE_TRAPPED, WRITTEN, Action, Advice, Area, Context, Fault, FaultHandler, Machine, PagefaultFlag,
    Pagemap, Range, Uffd, UffdError, Waiter, advise, copy, eventually, expect, guest, huge_area, pages_in, peek, poke,
    prepare, promise, reports_kvm, sweeping,
)  # fmt: skip

PAGES = 4
TURNS = 12
"""How often a page is taken from a processor at work."""
SWEEPS = 1500
"""How often a processor goes over all pages, where it comes to an end by itself."""


def _zeroed(area: Area) -> None:
    """Have all pages there, the counters 0."""
    for page in range(area.nr_pages):
        poke(area.page(page).start, bytes(8))


def _value(address: int) -> int:
    return int.from_bytes(peek(address, 4), "little")


def _expect_counts(area: Area, times: int, pages: tuple[int, ...] | None = None) -> None:
    """Assert that each page was counted up so many times."""
    pages = pages or tuple(range(area.nr_pages))
    counts = [_value(area.page(page).start) for page in pages]
    expect(counts, [times] * len(pages), f"counters of pages {', '.join(map(str, pages))}")


def _await_stop(uffd: Uffd, where: Range, *flags: PagefaultFlag) -> None:
    """Wait for the message of the processor that counts, which stands still then.

    An increment is a write; where KVM emulates it, a load comes first.
    """
    message = uffd.wait("the message of the processor that counts")
    fits = isinstance(message, Fault) and message.address in where and message.flags in flags
    expect(fits, True, f"whether {message} is of a page in {where}, with the flags {' or '.join(map(str, flags))}")
    uffd.expect_still_asleep(1)


def _move(uffd: Uffd, to: Range, where: Range) -> None:
    """UFFDIO_MOVE, again while KVM has the page in its hands (EBUSY, EAGAIN)."""

    def done() -> bool:
        try:
            uffd.move(to.start, where.start, where.len)
        except UffdError as error:
            if error.errno not in (EBUSY, EAGAIN):
                raise
            return False
        return True

    eventually(done, f"UFFDIO_MOVE of {where} to succeed")


MISSED = (WRITE, PagefaultFlag(0))
"""Flags of an increment's message at a missing page."""


# ---- a page at a time: once a call has returned no increment may come through ---------------------------------------


@uffd_case(
    "kvm-counting-wp", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=WRITEPROTECT, smp=True,
    rows=("KV-04",),
)  # fmt: skip
def test_kvm_counting_wp(ctx: Context) -> None:
    """Once UFFDIO_WRITEPROTECT has returned a processor that counts there counts no further, and loses nothing."""
    ctx.uffd.register(ctx.dst.range, WP)
    _zeroed(ctx.dst)
    _counting_wp(ctx, ctx.dst, ctx.dst.range, ctx.page_size)
    _expect_equal(ctx.dst)


@uffd_case(
    "kvm-counting-wp-huge", mem=(ANON,), needs=(*KVM, "thp"), post_alloc=reports_kvm, pages=PAGES,
    features=WRITEPROTECT, smp=True, rows=("KV-04",),
)  # fmt: skip
def test_kvm_counting_wp_huge(ctx: Context) -> None:
    """The same where the pages are of a transparent huge page, which the first protection splits."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    where = area.page(5, PAGES)
    _counting_wp(ctx, area, where, PAGE_SIZE, zero=True)
    ctx.uffd.unprotect(area.range)


def _counting_wp(ctx: Context, area: Area, where: Range, unit: int, *, zero: bool = False) -> None:
    if zero:
        for start in range(where.start, where.end, unit):
            poke(start, bytes(8))
    with guest(area) as cpu, promise("KV-04"), sweeping(cpu, where, unit) as work:
        for turn in range(TURNS):
            work.await_sweeps(2)
            page = Range(where.start + turn % (where.len // unit) * unit, unit)
            ctx.uffd.writeprotect(page)
            frozen = _value(page.start)
            _await_stop(ctx.uffd, page, TRAPPED)
            expect(_value(page.start), frozen, f"the counter when its processor is trapped, turn {turn}")
            ctx.uffd.unprotect(page)


def _expect_equal(area: Area) -> None:
    """Assert that all counters are alike, and that a processor has counted at all."""
    counts = {_value(area.page(page).start) for page in range(area.nr_pages)}
    expect((len(counts), min(counts) > TURNS), (1, True), f"how many different counters there are, and some: {counts}")


@uffd_case(
    "kvm-counting-rwp", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=SYNC_RWP, smp=True,
    rows=("KV-05",),
)  # fmt: skip
def test_kvm_counting_rwp(ctx: Context) -> None:
    """Once UFFDIO_RWPROTECT has returned a processor at work in the page stops before it, and loses nothing."""
    ctx.uffd.register(ctx.dst.range, RWP)
    _zeroed(ctx.dst)
    with guest(ctx.dst) as cpu, promise("KV-05"), sweeping(cpu, ctx.dst.range, ctx.page_size) as work:
        for turn in range(TURNS):
            work.await_sweeps(2)
            page = ctx.dst.page(turn % PAGES)
            ctx.uffd.rwprotect(page)
            _await_stop(ctx.uffd, page, WRITE_TRAPPED, READ_TRAPPED)
            ctx.uffd.resolve(page)
    _expect_equal(ctx.dst)


@uffd_case(
    "kvm-counting-moved", mem=(ANON,), needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=MOVE, smp=True,
    rows=("KV-09",),
)  # fmt: skip
def test_kvm_counting_moved(ctx: Context) -> None:
    """Once UFFDIO_MOVE has taken a page a processor that counts in it counts no further there, and loses nothing."""
    other = ctx.allocate()
    _zeroed(ctx.dst)
    for area in (ctx.dst, other):
        ctx.uffd.register(area.range, MISSING)
    with guest(ctx.dst) as cpu, promise("KV-09"), sweeping(cpu, ctx.dst.range, PAGE_SIZE) as work:
        for turn in range(TURNS):
            work.await_sweeps(2)
            page = ctx.dst.page(turn % PAGES)
            there = other.page(turn % PAGES)
            _move(ctx.uffd, there, page)
            frozen = _value(there.start)
            _await_stop(ctx.uffd, page, *MISSED)
            expect(_value(there.start), frozen, f"the counter that was moved, turn {turn}")
            _move(ctx.uffd, page, there)
    _expect_equal(ctx.dst)


@uffd_case(
    "kvm-counting-moved-huge", mem=(ANON,), needs=(*KVM, "thp"), post_alloc=reports_kvm, pages=PAGES, features=MOVE,
    smp=True, rows=("KV-09",),
)  # fmt: skip
def test_kvm_counting_moved_huge(ctx: Context) -> None:
    """The same where a whole transparent huge page is moved away and back."""
    area = huge_area(ctx)
    other = ctx.allocate(area.nr_pages)
    for each in (area, other):
        ctx.uffd.register(each.range, MISSING)
    where = area.page(5, PAGES)
    for page in range(5, 5 + PAGES):
        poke(area.page(page).start, bytes(8))
    with guest(area) as cpu, promise("KV-09"), sweeping(cpu, where, PAGE_SIZE) as work:
        for turn in range(TURNS):
            work.await_sweeps(2)
            _move(ctx.uffd, other.range, area.range)
            frozen = [_value(other.page(page).start) for page in range(5, 5 + PAGES)]
            _await_stop(ctx.uffd, where, *MISSED)
            counters = [_value(other.page(page).start) for page in range(5, 5 + PAGES)]
            expect(counters, frozen, f"the counters that were moved, turn {turn}")
            _move(ctx.uffd, area.range, other.range)


@uffd_case("kvm-counting-dropped", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, smp=True, rows=("KV-09",))
def test_kvm_counting_dropped(ctx: Context) -> None:
    """Once a page is dropped a processor that counts in it stops, and counts on from what UFFDIO_COPY brings."""
    prepare(ctx)
    _zeroed(ctx.src)
    copy(ctx, 0, PAGES)
    with guest(ctx.dst) as cpu, promise("KV-09"), sweeping(cpu, ctx.dst.range, ctx.page_size) as work:
        for turn in range(TURNS):
            work.await_sweeps(2)
            number = turn % PAGES
            page = ctx.dst.page(number)
            _drop(ctx, page)
            _await_stop(ctx.uffd, page, *MISSED)
            expect(Pagemap.filled(page, ctx.page_size), [False], "whether the page is there while nobody has filled it")
            poke(ctx.src.page(number).start, work.steps.to_bytes(4, "little"))
            copy(ctx, number)
    _expect_equal(ctx.dst)


def _drop(ctx: Context, page: Range) -> None:
    """Have a page missing again."""
    advise(page, Advice.REMOVE if ctx.mem.shared else Advice.DONTNEED)


# ---- several processors, and others that race with them -------------------------------------------------------------

PROCESSORS = 3


def _all_count(machine: Machine, where: Range, unit: int, stack: ExitStack, times: int = SWEEPS) -> list[Waiter]:
    """Have each processor go over all pages so many times."""
    return [stack.enter_context(Waiter(cpu.sweeping(where, unit, times))) for cpu in machine.processors]


def _until_done(waiters: list[Waiter], act: Callable[[], object]) -> int:
    """Do something again and again until all processors are done; return how often."""
    turns = 0
    while not all(waiter.done for waiter in waiters):
        act()
        turns += 1
    return turns


@uffd_case(
    "kvm-race-protected", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=WRITEPROTECT, smp=True,
    rows=("KV-04", "KV-11"),
)  # fmt: skip
def test_kvm_race_protected(ctx: Context) -> None:
    """Processors that count in pages which are protected over and over, and let go on by a handler, lose nothing."""
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    ctx.src.fill()
    _zeroed(ctx.src)
    with Machine(ctx.dst, processors=PROCESSORS) as machine, promise("KV-04"), ctx.handler() as handler:
        with ExitStack() as stack:
            waiters = _all_count(machine, ctx.dst.range, ctx.page_size, stack)
            _until_done(waiters, partial(ctx.uffd.writeprotect, ctx.dst.range))
            ctx.uffd.unprotect(ctx.dst.range)
        expect(handler.stats.missing >= PAGES, True, "whether each page was missing once")
    _expect_counts(ctx.dst, PROCESSORS * SWEEPS)


@uffd_case(
    "kvm-race-rwprotected", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=SYNC_RWP, smp=True,
    rows=("KV-05", "KV-11"),
)  # fmt: skip
def test_kvm_race_rwprotected(ctx: Context) -> None:
    """Processors that count in pages which are read-write-protected over and over lose nothing."""
    ctx.uffd.register(ctx.dst.range, RWP)
    _zeroed(ctx.dst)
    with Machine(ctx.dst, processors=PROCESSORS) as machine, promise("KV-05"), ctx.handler() as handler:
        with ExitStack() as stack:
            waiters = _all_count(machine, ctx.dst.range, ctx.page_size, stack)
            _until_done(waiters, partial(ctx.uffd.rwprotect, ctx.dst.range))
            ctx.uffd.resolve(ctx.dst.range)
        expect(handler.stats.missing, 0, "messages of missing pages")
    _expect_counts(ctx.dst, PROCESSORS * SWEEPS)


@uffd_case(
    "kvm-race-moved", mem=(ANON,), needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=MOVE, smp=True,
    rows=("KV-09", "KV-11"),
)  # fmt: skip
def test_kvm_race_moved(ctx: Context) -> None:
    """Processors that count in pages which are moved away, and back by a handler at their faults, lose nothing."""
    other = ctx.allocate()
    _zeroed(ctx.dst)
    for area in (ctx.dst, other):
        ctx.uffd.register(area.range, MISSING)
    handler = FaultHandler(ctx.uffd, ctx.dst.range, PAGE_SIZE, src=other.range, missing=Action.MOVE)
    with Machine(ctx.dst, processors=PROCESSORS) as machine, promise("KV-09"), handler, ExitStack() as stack:
        waiters = _all_count(machine, ctx.dst.range, PAGE_SIZE, stack)
        turn = 0

        def take() -> None:
            """Take a page, and wait until it is back, or nobody there to miss it."""
            nonlocal turn
            turn, page = turn + 1, ctx.dst.page(turn % PAGES)
            _move(ctx.uffd, other.page((turn - 1) % PAGES), page)
            eventually(lambda: Pagemap.filled(page) == [True] or all(w.done for w in waiters), "the page to come back")

        _until_done(waiters, take)
    for number in range(PAGES):
        if Pagemap.filled(ctx.dst.page(number)) == [False]:
            _move(ctx.uffd, ctx.dst.page(number), other.page(number))
    _expect_counts(ctx.dst, PROCESSORS * SWEEPS)


@uffd_case(
    "kvm-race-dropped", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, smp=True, rows=("KV-09", "KV-01")
)
def test_kvm_race_dropped(ctx: Context) -> None:
    """Processors that read pages which are dropped over and over, and filled by a handler, see what it brings alone."""
    prepare(ctx)
    for page in range(PAGES):
        poke(ctx.src.page(page).start, MARK.to_bytes(4, "little"))
    with Machine(ctx.dst, processors=PROCESSORS) as machine, promise("KV-09"), ctx.handler() as handler:
        with ExitStack() as stack:
            times = SWEEPS // 5 if ctx.mem.hugetlb else SWEEPS  # to clear and copy these takes long
            calls = [cpu.checking(ctx.dst.range, ctx.page_size, times, MARK) for cpu in machine.processors]
            waiters = [stack.enter_context(Waiter(call)) for call in calls]
            _until_done(waiters, partial(_drop, ctx, ctx.dst.page(0, PAGES)))
        expect([cpu.wrong for cpu in machine.processors], [0] * PROCESSORS, "reads of something else, by processor")
        expect(handler.stats.missing >= PAGES, True, "whether each page was missing once")


MARK = 0x5AA51234


@uffd_case(
    "kvm-race-tracked", mem=ALL, variants=("scan", "scan and log"), needs=(*KVM, *SCAN), post_alloc=reports_kvm,
    pages=PAGES, features=ASYNC, smp=True, rows=("KV-06",),
)  # fmt: skip
def test_kvm_race_tracked(ctx: Context, variant: str) -> None:
    """A page that PAGEMAP_SCAN, or KVM's log, does not tell as written has not changed since it was asked before."""
    _zeroed(ctx.dst)
    ctx.uffd.register(ctx.dst.range, WP)
    logs = variant == "scan and log"
    unit = ctx.page_size // PAGE_SIZE
    with Machine(ctx.dst, log_dirty=logs) as machine, promise("KV-06"), ExitStack() as stack:

        def asked() -> tuple[set[int], set[int]]:
            found = Pagemap.scan(ctx.dst.range, WRITTEN, flags=RESTART).regions
            logged = {page // unit for page in machine.dirty_pages()} if logs else set()
            return set(pages_in(ctx.dst, found)), logged

        def values() -> list[int]:
            return [_value(ctx.dst.page(page).start) for page in range(PAGES)]

        asked()
        waiters = _all_count(machine, ctx.dst.range, ctx.page_size, stack)
        before = [0] * PAGES

        def look() -> None:
            nonlocal before
            after = values()
            changed = {page for page in range(PAGES) if after[page] != before[page]}
            written, logged = asked()
            expect(sorted(changed - written), [], "pages that have changed and are not told by PAGEMAP_SCAN")
            if logs:
                expect(sorted(changed - logged), [], "pages that have changed and are not in KVM's log")
            before = values()

        _until_done(waiters, look)
        look()
        _expect_counts(ctx.dst, SWEEPS)
        expect(asked()[0], set(), "pages told as written when the processor has come to its end")


@uffd_case("kvm-race-filled", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=16, smp=True, rows=("KV-11", "KV-01"))
def test_kvm_race_filled(ctx: Context) -> None:
    """Processors that count in missing pages which several fill at once count on from what was brought first."""
    prepare(ctx)
    for page in range(ctx.nr_pages):
        poke(ctx.src.page(page).start, (1000).to_bytes(4, "little"))
    with Machine(ctx.dst, processors=PROCESSORS) as machine, promise("KV-11"), ctx.handler() as handler:
        with ExitStack() as stack:
            for waiter in _all_count(machine, ctx.dst.range, ctx.page_size, stack, 200):
                waiter.result()
        expect(handler.stats.missing >= ctx.nr_pages, True, "whether each page was missing once")
    _expect_counts(ctx.dst, 1000 + PROCESSORS * 200)
