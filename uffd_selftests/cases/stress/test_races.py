# SPDX-License-Identifier: GPL-2.0-only
"""Many at a time: threads, readers, mappings and handles, and fills that meet faults, events and each other.

Each case does a fixed amount of work in native threads, and then accounts for all of it.
"""

from __future__ import annotations

import os
import random
import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from errno import EAGAIN, EEXIST, ENOENT

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, ANON, DEADLINE, KERNEL_FAULTS, MINOR, MINOR_FAULTS, MISSING, NOT_HUGETLB, PAGE_SIZE, PROT_READ, SHARED, SHMEM,
    SUCCESS, UNREGISTERED, USER_MODE_ONLY, WP, WRITEPROTECT, Action, Advice, Area, Channel, Child, Context,
    FaultHandler, Feature, Forked, Outcomes, Pagemap, Race, Racer, Range, Skip, Uffd, WriteprotectMode, advise, adviser,
    continuer, copier, eventually, expect, expect_mappings, expect_modes, open_userfaultfds, peek, protect, protector,
    remapper, run_race, smaps_fields, toucher, unmap, zeroer,
)  # fmt: skip


# ---- fills and fills -----------------------------------------------------------------------------------------------


@uffd_case(
    "race-copy-sources",
    mem=ALL,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=4 + 6,  # the data, and what the copies hold while they wait
    rows=("CP-31", "CP-10"),
    smp=True,
)
def test_race_copy_sources(ctx: Context) -> None:
    """Copies whose source is missing, and filled while they wait, fill each page once, with all of its bytes.

    Two threads copy in opposite directions, two more sleep on the pages, and a handler fills the source: each page is
    copied outside of the lock and looked up again, mostly while the other copier is on its way there.
    """
    data = ctx.allocate(reserve=True)
    data.fill()
    for _ in range(4):
        with Uffd.open(flags=KERNEL_FAULTS) as sources, Uffd.open() as uffd:
            sources.register(ctx.src.range, MISSING)
            uffd.register(ctx.dst.range, MISSING)
            with FaultHandler(sources, ctx.src.range, ctx.page_size, src=data.range):
                up, down, *_ = run_race(
                    copier(uffd, ctx.dst.range, ctx.src.start, ctx.page_size),
                    copier(uffd, ctx.dst.range, ctx.src.start, ctx.page_size, backwards=True),
                    toucher(ctx.dst.range, ctx.page_size),
                    toucher(ctx.dst.range, ctx.page_size, write=True, backwards=True),
                )
            for copies in up, down:
                copies.expect_only(SUCCESS, EEXIST)
            expect(up[SUCCESS] + down[SUCCESS], ctx.nr_pages, "copies that succeeded")
            uffd.expect_asleep(0)
        ctx.dst.expect_pattern_of(data)
        ctx.dst.release()
        ctx.src.release()


@uffd_case("race-fills", mem=NOT_HUGETLB, pages=512, rows=("CP-10", "ZP-03", "CP-41"), smp=True)
def test_race_fills(ctx: Context) -> None:
    """Of a copy and a page of zeroes for the same page one succeeds, wholly; the other says EEXIST."""
    ctx.src.fill()
    for _ in range(4):
        ctx.uffd.register(ctx.dst.range, MISSING)
        copies, zeroes, *_ = run_race(
            copier(ctx.uffd, ctx.dst.range, ctx.src.start, ctx.page_size),
            zeroer(ctx.uffd, ctx.dst.range, ctx.page_size, backwards=True),
            toucher(ctx.dst.range, ctx.page_size),
            toucher(ctx.dst.range, ctx.page_size, backwards=True),
        )
        for fills in copies, zeroes:
            fills.expect_only(SUCCESS, EEXIST)
        copied = [page for page in range(ctx.nr_pages) if any(peek(ctx.dst.page(page).start, 8))]
        expect(len(copied), copies[SUCCESS], "pages that hold data, for as many copies that succeeded")
        expect(zeroes[SUCCESS], ctx.nr_pages - len(copied), "pages of zeroes that succeeded")
        for page in range(ctx.nr_pages):
            if page in copied:
                ctx.dst.expect_pattern_of(ctx.src, page, 1)
            else:
                ctx.dst.expect_zero(page, 1)
        ctx.uffd.expect_asleep(0)
        ctx.uffd.release(ctx.dst.range)
        ctx.dst.release()


# ---- fills and events ----------------------------------------------------------------------------------------------


@uffd_case(
    "race-fills-events",
    mem=ALL,
    features=Feature.EVENT_REMOVE,
    pages=8,
    rows=("CP-14", "CP-15", "EV-04"),
    bugs=(6, 8),
    smp=True,
)
def test_race_fills_events(ctx: Context) -> None:
    """Between events a copy either says EAGAIN, in errno and output field, or is done; after the last one it succeeds.

    Two threads drop pages and wait for their events, one copies, a handler reads. Whatever overlaps, no event is left
    over that would hold up the fills for good. Before "mm/userfaultfd: fix uninitialized output field for -EAGAIN race"
    the output field was not always written; before "userfaultfd: fix mmap_changing checking in mfill_atomic_hugetlb"
    copies to huge pages did not wait.
    """
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    half = ctx.nr_pages // 2
    dropped, kept = ctx.dst.page(0, half), ctx.dst.page(half, half)
    with ctx.handler(missing=Action.RECORD) as handler:
        one, two, copies = run_race(
            adviser(dropped, ctx.page_size, Advice.DONTNEED, rounds=10),
            adviser(dropped, ctx.page_size, Advice.DONTNEED, rounds=10),
            copier(ctx.uffd, kept, ctx.src.page(half).start, ctx.page_size),
        )
        for calls in one, two:
            calls.expect_only(SUCCESS)
        expect(copies[SUCCESS], half, "copies that succeeded")
        copies.expect_only(SUCCESS, EAGAIN)
    expect(handler.stats.remove, 2 * 10 * half, "UFFD_EVENT_REMOVE messages")
    ctx.uffd.copy(dropped.start, ctx.src.start, dropped.len)
    ctx.dst.expect_pattern_of(ctx.src)


@uffd_case(
    "race-faults-events", mem=ALL, features=Feature.EVENT_REMOVE, pages=8, rows=("CP-15", "EV-05", "EV-42"), smp=True
)
def test_race_faults_events(ctx: Context) -> None:
    """Threads that touch pages which others drop, announced, always go on, and find the page's data."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    advice = Advice.REMOVE if ctx.mem.shared else Advice.DONTNEED
    with ctx.handler() as handler:
        outcomes = run_race(
            toucher(ctx.dst.range, ctx.page_size, rounds=20),
            toucher(ctx.dst.range, ctx.page_size, rounds=20, backwards=True, write=True),
            adviser(ctx.dst.range, ctx.page_size, advice, rounds=20),
        )
        for calls in outcomes:
            calls.expect_only(SUCCESS)
        ctx.dst.expect_pattern_of(ctx.src)
    expect(handler.stats.remove, 20 * ctx.nr_pages, "UFFD_EVENT_REMOVE messages")


@uffd_case(
    "race-fills-remaps",
    mem=ALL,
    features=Feature.EVENT_REMAP | Feature.EVENT_UNMAP,
    pages=8,
    rows=("CP-14", "EV-18", "EV-19"),
    bugs=(6,),
    smp=True,
)
def test_race_fills_remaps(ctx: Context) -> None:
    """While memory moves, two events a time, a copy either says EAGAIN or is done; after the last one it succeeds."""
    ctx.src.fill()
    moving, half = ctx.allocate(1), ctx.nr_pages // 2
    with closing(ANON.allocate(max(1, ctx.page_size // PAGE_SIZE))) as place:
        unmap(place.range)
        ctx.uffd.register(moving.range, MISSING)
        ctx.uffd.register(ctx.dst.range, MISSING)
        with ctx.handler(missing=Action.RECORD) as handler:
            moves, copies = run_race(
                remapper(moving.range, place.start, rounds=20),
                copier(ctx.uffd, ctx.dst.page(0, half), ctx.src.start, ctx.page_size),
            )
        moves.expect_only(SUCCESS)
        expect(copies[SUCCESS], half, "copies that succeeded")
        copies.expect_only(SUCCESS, EAGAIN)
        expect((handler.stats.remap, handler.stats.unmap), (40, 40), "UFFD_EVENT_REMAP and UFFD_EVENT_UNMAP messages")
        ctx.uffd.copy(ctx.dst.page(half).start, ctx.src.page(half).start, half * ctx.page_size)
        ctx.dst.expect_pattern_of(ctx.src)


# ---- forks and close -----------------------------------------------------------------------------------------------


def _close_unread(uffd: Uffd) -> None:
    """Close while the fork waits."""
    expect(uffd.readable(DEADLINE), True, "readable, with the event of the fork")
    uffd.close()


def _read_and_close(uffd: Uffd) -> None:
    """Read the event and close both handles, the child's first."""
    message = uffd.wait("UFFD_EVENT_FORK")
    assert isinstance(message, Forked), f"expected UFFD_EVENT_FORK, got {message}"
    os.close(message.ufd)
    uffd.close()


def _die(uffd: Uffd) -> None:
    """Be killed while the fork waits."""
    expect(uffd.readable(DEADLINE), True, "readable, with the event of the fork")
    os.kill(os.getpid(), signal.SIGKILL)


FATES = {"closes unread": _close_unread, "closes at any time": Uffd.close, "reads": _read_and_close, "dies": _die}


@uffd_case(
    "race-fork-close",
    mem=(ANON,),
    features=Feature.EVENT_FORK,
    variants=tuple(FATES),
    pages=1,
    rows=("CL-08", "CL-06", "EV-02"),
    bugs=(19,),
    smp=True,
)
def test_race_fork_close(ctx: Context, variant: str) -> None:
    """Forks go on, and nothing of them stays behind, whatever becomes of the monitor that is to read their event.

    Before "userfaultfd: non-cooperative: fix fork fctx->new memleak" the handle of a child that nobody read was lost;
    before "fix fork use after free" the kernel used it when it was freed.
    """

    def monitor(channel: Channel) -> None:
        _, (fd,) = channel.receive_fds()
        channel.send()
        FATES[variant](Uffd(fd))

    before = open_userfaultfds()
    for _ in range(8):
        with Child(monitor) as reader:
            with Uffd.open(Feature.EVENT_FORK) as uffd:
                uffd.register(ctx.dst.range, MISSING)
                reader.send(None, uffd.fd)
                reader.receive()
            with Child(lambda _: ctx.dst.expect_zero()):  # the reader has the last descriptor
                pass
            eventually(lambda: reader.ended, "the monitor to end")
            if variant == "dies":
                reader.kill()
        expect_modes(ctx.dst.range, UNREGISTERED)
        expect(open_userfaultfds(), before, "userfaultfds that are open")


# ---- unregistering and faults --------------------------------------------------------------------------------------


def empty(area: Area) -> None:
    """Make every page missing again, also one that a fault of private memory has left in the file."""
    area.release()
    if area.fd is not None:
        os.ftruncate(area.fd, 0)
        os.ftruncate(area.fd, area.range.len)


MOMENTS = 8
"""How often a range is unregistered in the midst of something: later each time."""


def unregister_midway(ctx: Context, area: Area, moment: int, resolver: Racer, *racers: Racer) -> Outcomes:
    """Unregister an area, and wake, while racers fault there and another one resolves; return what that one did.

    The racers must come to their end.
    """
    with Race(resolver, *racers) as race:
        race.reached(0, resolver.count * moment // MOMENTS)
        ctx.uffd.release(area.range)
    resolved, *touches = race.outcomes
    resolved.expect_only(SUCCESS, ENOENT)
    for each in touches:
        each.expect_only(SUCCESS)
    ctx.uffd.expect_asleep(0)
    ctx.uffd.expect_no_message()
    return resolved


def both_ways(area: Area, *, write: bool = False) -> tuple[Racer, Racer]:
    """Two threads that touch an area, one from its start and one from its end on."""
    forth, back = (toucher(area.range, area.page_size, write=write, backwards=way) for way in (False, True))
    return forth, back


def many_pages(ctx: Context) -> tuple[Area, Area]:
    """Map a filled source and an empty destination of as many pages as a thread gets through in a moment."""
    source, area = (ctx.src, ctx.dst) if ctx.mem.hugetlb else (ctx.allocate(1024), ctx.allocate(1024))
    source.fill()
    return source, area


@uffd_case("race-unregister", mem=ALL, pages=8, rows=("UNR-09", "CP-08"), smp=True)
def test_race_unregister(ctx: Context) -> None:
    """When a range is unregistered, and then woken, while threads fault in it and another copies, none sleeps on."""
    source, area = many_pages(ctx)
    for moment in range(MOMENTS):
        ctx.uffd.register(area.range, MISSING)
        data = copier(ctx.uffd, area.range, source.start, area.page_size)
        unregister_midway(ctx, area, moment, data, *both_ways(area))
        empty(area)


@uffd_case(
    "race-unregister-wp",
    mem=ALL,
    features=WRITEPROTECT,
    pages=8,
    rows=("UNR-11", "WP-09"),
    smp=True,
)
def test_race_unregister_wp(ctx: Context) -> None:
    """When a range is unregistered, and then woken, while threads write to its protected pages, none sleeps on."""
    _, area = many_pages(ctx)
    area.fill()
    for moment in range(MOMENTS):
        ctx.uffd.register(area.range, WP)
        ctx.uffd.writeprotect(area.range)
        mercy = protector(ctx.uffd, area.range, area.page_size, WriteprotectMode(0))
        unregister_midway(ctx, area, moment, mercy, *both_ways(area, write=True))
        Pagemap.expect_protected(area, (), "after UFFDIO_UNREGISTER")
    area.expect_pattern_of(area)


@uffd_case(
    "race-unregister-minor",
    mem=SHARED,
    features=MINOR_FAULTS,
    pages=8,
    rows=("UNR-12", "CT-09"),
    smp=True,
)
def test_race_unregister_minor(ctx: Context) -> None:
    """When a range is unregistered, and then woken, while threads meet minor faults in it, none sleeps on."""
    _, area = many_pages(ctx)
    area.pattern.fill(area.alias.start, 0, area.nr_pages)
    for moment in range(MOMENTS):
        ctx.uffd.register(area.range, MINOR)
        unregister_midway(ctx, area, moment, continuer(ctx.uffd, area.range, area.page_size), *both_ways(area))
        area.expect_pattern(area.range)
        advise(area.range, Advice.DONTNEED)  # unmapped, but still in the page cache


@uffd_case("race-fills-unregister", mem=ALL, pages=8, rows=("CP-08", "UNR-01"), smp=True)
def test_race_fills_unregister(ctx: Context) -> None:
    """Copies to a range that is being unregistered are done up to some page, and ENOENT from there on."""
    source, area = many_pages(ctx)
    for moment in range(MOMENTS):
        ctx.uffd.register(area.range, MISSING)
        copies = unregister_midway(ctx, area, moment, copier(ctx.uffd, area.range, source.start, area.page_size))
        done = copies[SUCCESS]
        Pagemap.expect_present(area, *range(done))
        area.expect_pattern_of(source, 0, done)
        area.release()


# ---- many readers, threads, mappings, handles ----------------------------------------------------------------------


@uffd_case("race-readers", mem=ALL, variants=("poll", "read"), pages=8, rows=("RD-10", "RD-15"), smp=True)
def test_race_readers(ctx: Context, variant: str) -> None:
    """Several readers of one handle get each fault once between them, whether they poll or sleep in read(2)."""
    blocking = variant == "read"
    flags = os.O_CLOEXEC | (0 if blocking else os.O_NONBLOCK)
    ctx.src.fill()
    rounds, half = 10, ctx.nr_pages // 2
    with ExitStack() as stack:
        uffd = stack.enter_context(Uffd.open(flags=flags | USER_MODE_ONLY))
        uffd.register(ctx.dst.range, MISSING)
        handlers = [
            stack.enter_context(
                FaultHandler(uffd, ctx.dst.range, ctx.page_size, src=ctx.src.range, blocking=blocking, log_size=0)
            )
            for _ in range(3)
        ]
        for _ in range(rounds):
            run_race(
                toucher(ctx.dst.page(0, half), ctx.page_size),
                toucher(ctx.dst.page(half, half), ctx.page_size, write=True),
            )
            ctx.dst.expect_pattern_of(ctx.src)
            ctx.dst.release()
    counts = [handler.stats for handler in handlers]
    expect(sum(each.missing for each in counts), rounds * ctx.nr_pages, "messages that the readers got, in all")
    expect(sum(each.resolved for each in counts), rounds * ctx.nr_pages, "faults that they resolved")


@uffd_case("race-readers-close", mem=(ANON, SHMEM), pages=64, rows=("CL-01", "CL-03", "RD-10"), smp=True)
def test_race_readers_close(ctx: Context) -> None:
    """Threads that fault wake when the handle is closed, also while others read its messages in another process."""

    def monitor(channel: Channel) -> None:
        _, (fd,) = channel.receive_fds()
        with Uffd(fd) as uffd:
            channel.send()
            messages = 0
            while messages < 32:  # leave the rest, read and unread, to the close
                expect(uffd.readable(DEADLINE), True, "readable")
                for fault in uffd.read(4):
                    messages += 1
                    if messages % 2:
                        uffd.zeropage(Range(getattr(fault, "address", 0), PAGE_SIZE))
                    else:
                        uffd.wake(Range(getattr(fault, "address", 0), PAGE_SIZE))

    for _ in range(5):
        with Child(monitor) as reader:
            with Uffd.open() as uffd:
                uffd.register(ctx.dst.range, MISSING)
                reader.send(None, uffd.fd)
                reader.receive()
                racers = [toucher(ctx.dst.page(16 * i, 16), PAGE_SIZE, write=True) for i in range(4)]
                race = Race(*racers)
                with race:
                    uffd.close()
            for touches in race.outcomes:
                touches.expect_only(SUCCESS)
        ctx.dst.expect_zero()
        expect_modes(ctx.dst.range, UNREGISTERED)
        ctx.dst.release()


THREADS = 2000


@uffd_case("race-thousand-threads", mem=(ANON,), pages=8, rows=("CP-41", "FI-02", "WK-04", "WK-05"), smp=True)
def test_race_thousand_threads(ctx: Context) -> None:
    """Of two thousand threads that sleep on eight pages each is told once, and wakes when its own page is filled."""
    ctx.src.fill()
    uffd, each = ctx.uffd, THREADS // ctx.nr_pages
    uffd.register(ctx.dst.range, MISSING)
    racers = [toucher(ctx.dst.page(number % ctx.nr_pages), PAGE_SIZE) for number in range(THREADS)]
    with Race(*racers) as race:
        eventually(lambda: uffd.fdinfo.total == THREADS, f"{THREADS} threads to sleep in a fault")
        messages = [message for _ in range(0, THREADS, 50) for message in uffd.read(50)]
        told = [sum(getattr(one, "address", 0) == ctx.dst.page(page).start for one in messages) for page in range(8)]
        expect(told, [each] * ctx.nr_pages, "messages of each page")
        for done in range(ctx.nr_pages):
            uffd.expect_still_asleep(THREADS - done * each)
            uffd.copy(ctx.dst.page(done).start, ctx.src.page(done).start, ctx.page_size)
    uffd.expect_still_asleep(0)
    expect(all(touches == {SUCCESS: 1} for touches in race.outcomes), True, "each thread has read its page")
    ctx.dst.expect_pattern_of(ctx.src)


MAPPINGS = 2048


@uffd_case(
    "race-thousand-mappings", mem=(ANON, SHMEM), needs=("pagemap",), pages=MAPPINGS, rows=("REG-37", "UNR-08"), smp=True
)
def test_race_thousand_mappings(ctx: Context) -> None:
    """Two thousand mappings are registered, served and unregistered with one call, while threads fault in them."""
    for page in range(0, MAPPINGS, 2):
        protect(ctx.dst.page(page), PROT_READ)
    ctx.src.fill()
    tail = ctx.dst.page(MAPPINGS - 256, 256)
    for _ in range(2):
        ctx.uffd.register(ctx.dst.range, MISSING)
        expect_registered(ctx.dst, MAPPINGS, {"um"})
        with ctx.handler() as handler:
            outcomes = run_race(
                toucher(tail, ctx.page_size), toucher(tail, ctx.page_size, backwards=True), toucher(tail, ctx.page_size)
            )
        for touches in outcomes:
            touches.expect_only(SUCCESS)
        expect(handler.stats.resolved, 256, "pages that were filled once")
        ctx.dst.expect_pattern_of(ctx.src, MAPPINGS - 256, 256)
        ctx.uffd.release(ctx.dst.range)
        expect_registered(ctx.dst, MAPPINGS, set())
        ctx.dst.release()


def expect_registered(area: Area, mappings: int, modes: set[str]) -> None:
    """Assert how many mappings the area is, and that all of them have these flags of registration (VmFlags)."""
    found = [{"um", "uw", "ui"} & set(fields["VmFlags"].split()) for fields in smaps_fields(area.range)]
    expect((len(found), [each for each in found if each != modes][:1]), (mappings, []), "mappings, and flags of any")


HANDLES = 500


@contextmanager
def descriptors(count: int) -> Iterator[None]:
    """Be allowed so many further descriptors (RLIMIT_NOFILE); Skip where that cannot be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count + 64:
        raise Skip(f"{count} descriptors: the hard limit is {hard}: raise RLIMIT_NOFILE (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 64), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@uffd_case("race-many-handles", mem=(ANON, SHMEM), pages=HANDLES, rows=("REG-23", "FL-01"), smp=True)
def test_race_many_handles(ctx: Context) -> None:
    """Five hundred handles, each with a page of one mapping, are told of their own page alone; closed, all merge."""
    with descriptors(HANDLES), ExitStack() as stack:
        handles = [stack.enter_context(Uffd.open()) for _ in range(HANDLES)]
        for page, uffd in enumerate(handles):
            uffd.register(ctx.dst.page(page), MISSING)
        with Race(*(toucher(ctx.dst.page(page, 20), PAGE_SIZE) for page in range(0, HANDLES, 20))) as race:
            for page, uffd in enumerate(handles):
                uffd.wait_fault(ctx.dst.page(page).start)
                uffd.zeropage(ctx.dst.page(page))
        for touches in race.outcomes:
            touches.expect_only(SUCCESS)
        random.Random(1).shuffle(handles)
        for uffd in handles:
            uffd.expect_no_message()
            uffd.close()
    expect_mappings(ctx.dst, HANDLES)
    expect_modes(ctx.dst.range, UNREGISTERED)
