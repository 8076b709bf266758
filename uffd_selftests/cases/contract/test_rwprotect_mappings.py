# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_RWPROTECT and mappings that change: mprotect, munmap, and the events of ranges under RWP alone."""

from __future__ import annotations

from collections.abc import Callable
from errno import EAGAIN
from functools import partial
from pathlib import Path
from signal import SIGSEGV

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC_RWP, FORK, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MIXED, PROT_NONE,
    PROT_READ, PROT_WRITE, READ_TRAPPED, REMAP, REMOVE, RWP, SYNC_RWP, UNMAP, UNREGISTERED, WRITE_TRAPPED,
    AccessError, Advice, Area, Channel, Child, Context, Message, Pagemap, Trap, Uffd, Waiter, advise,
    await_child_event, await_event, await_fault, expect, expect_modes, expect_no_memory, expect_rwp_free,
    expect_rwp_trapped, faulting, huge_area, huge_mixture, map_memory, mixture, monitored, moved, peek, pmd_mapped,
    promise, protect, read_fork, refuses, remap, removed, resident, rewrite, rwp_protected, take_event, touch,
    undisturbed, unmap, unmapped,
)  # fmt: skip

READ_WRITE = PROT_READ | PROT_WRITE


# ---- mprotect ------------------------------------------------------------------------------------------------------


def access(area: Area, page: int, *, write: bool = False) -> Trap | None:
    """Read a byte of a page, or store what its pattern has there; return the signal that it gave, if any."""
    try:
        if write:
            rewrite(area, page)
        else:
            peek(area.page(page).start)
    except AccessError as error:
        return error.trap
    return None


def expect_shut(ctx: Context, area: Area, *, write: bool) -> None:
    """Assert that each access is ended by SIGSEGV, and nobody hears of it."""
    for page in range(area.nr_pages):
        trap = undisturbed(ctx.uffd, partial(access, area, page, write=write))
        expect(trap and trap.signo, SIGSEGV, f"signal of a {'write' if write else 'read'}, page {page}")


@uffd_case("rwprotect-mprotect", mem=ALL, features=SYNC_RWP, needs=("swap",), pages=MIXED, rows=("RW-48",))
def test_rwprotect_mprotect(ctx: Context) -> None:
    """Pages stay protected when their memory is made inaccessible and accessible again; meanwhile nobody is told."""
    mix = mixture(ctx)
    area = mix.area
    for what, where in (("whole", area.range), ("a part", area.page(2, 3))):
        with promise("RW-48", f"PROT_NONE, {what}"):
            protect(where, PROT_NONE)
            mix.expect_marks("under PROT_NONE")
            if where == area.range:
                for write in (False, True):
                    expect_shut(ctx, area, write=write)
            protect(where, READ_WRITE)
            mix.expect_marks("after PROT_NONE")
        with promise("RW-48", f"PROT_READ, {what}"):
            protect(where, PROT_READ)
            mix.expect_marks("under PROT_READ")
            protect(where, READ_WRITE)
            mix.expect_marks("after PROT_READ")
    expect_modes(area.range, RWP)
    with promise("RW-48", "accessible again"):
        mix.expect_trapped(ctx.uffd)


@uffd_case("rwprotect-mprotect-read", mem=ALL, features=SYNC_RWP, pages=4, rows=("RW-48",), kind=Kind.DETAIL)
def test_rwprotect_mprotect_read(ctx: Context) -> None:
    """Memory made read-only traps reads where it is protected; what is resolved there can be read, and not written."""
    area = rwp_protected(ctx)
    ctx.uffd.resolve(area.page(3))
    protect(area.range, PROT_READ)
    with promise("RW-48", "PROT_READ"):
        expect_shut(ctx, area, write=True)
        Pagemap.expect_protected(area, {0, 1, 2}, "under PROT_READ, after writes that failed")
        expect_rwp_trapped(ctx.uffd, area, 1)
        ctx.uffd.resolve(area.page(2))
        undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area, 1, 3))
        expect_shut(ctx, area, write=True)
    protect(area.range, READ_WRITE)
    with promise("RW-48", "writable again"):
        Pagemap.expect_protected(area, {0}, "when it is writable again")
        expect_rwp_free(ctx.uffd, area, 1, 2, 3)
        expect_rwp_trapped(ctx.uffd, area, 0, write=True)
    area.expect_pattern_of(area, 1, 3)


@uffd_case("rwprotect-mprotect-async", mem=ALL, features=ASYNC_RWP, pages=5, rows=("RW-48",))
def test_rwprotect_mprotect_async(ctx: Context) -> None:
    """With UFFD_FEATURE_RWP_ASYNC, too, pages are protected until accessed, whatever mprotect did meanwhile."""
    area = rwp_protected(ctx)
    for prot in (PROT_NONE, PROT_READ):
        protect(area.page(1, 3), prot)
        protect(area.page(1, 3), READ_WRITE)
        Pagemap.expect_protected(area, range(5), f"after mprotect to {prot} and back")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area, 2, 1, write_back=True))
    Pagemap.expect_protected(area, {0, 1, 3, 4}, "after an access to page 2")


@uffd_case("rwprotect-thp-mprotect", mem=(ANON,), features=SYNC_RWP, needs=("thp",), rows=("RW-48",))
def test_rwprotect_thp_mprotect(ctx: Context) -> None:
    """Huge pages stay protected when they are made inaccessible and accessible again, whole or in part."""
    mix = huge_mixture(ctx)
    area = mix.area
    for prot in (PROT_NONE, PROT_READ):
        protect(area.range, prot)
        mix.expect_marks(f"under prot {prot}")
        protect(area.range, READ_WRITE)
        mix.expect_marks(f"after prot {prot}")
    expect(pmd_mapped(area.range), 2 * mix.whole(0).len, "bytes mapped by PMD")
    for first in (3, mix.cut[1], 2 * mix.count + 5):
        protect(area.page(first, 2), PROT_NONE)
        mix.expect_marks(f"with page {first} under PROT_NONE")
        protect(area.page(first, 2), READ_WRITE)
    mix.expect_marks("after parts were under PROT_NONE")
    mix.expect_trapped(ctx.uffd)


@uffd_case("rwprotect-thp-mprotect-traps", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("RW-48",))
def test_rwprotect_thp_mprotect_traps(ctx: Context) -> None:
    """A huge page that was made inaccessible and accessible again, whole, traps at the first access to any part."""
    for prot in (PROT_NONE, PROT_READ):
        for page in (0, 5, -1):
            area = rwp_protected(ctx, area=huge_area(ctx))
            protect(area.range, prot)
            protect(area.range, READ_WRITE)
            with promise("RW-48", f"prot {prot}, page {page}"):
                expect_rwp_trapped(ctx.uffd, area, page % area.nr_pages)


@uffd_case("rwprotect-none", mem=ALL, features=SYNC_RWP, pages=6, rows=("RW-49",), kind=Kind.DETAIL)
def test_rwprotect_none(ctx: Context) -> None:
    """What is protected or resolved while it is inaccessible traps, or does not, when it is accessible again."""
    area = rwp_protected(ctx)
    ctx.uffd.resolve(area.page(0, 3))
    for write in (False, True):
        protect(area.range, PROT_NONE)
        with promise("RW-49", "while PROT_NONE"):
            ctx.uffd.rwprotect(area.page(1))
            ctx.uffd.resolve(area.page(4))
            Pagemap.expect_protected(area, {1, 3, 5}, "under PROT_NONE")
            for kind in (False, True):
                expect_shut(ctx, area, write=kind)
        protect(area.range, READ_WRITE)
        with promise("RW-49", f"accessible again, {'write' if write else 'read'}"):
            Pagemap.expect_protected(area, {1, 3, 5}, "when it is accessible again")
            expect_rwp_free(ctx.uffd, area, 0, 2, 4)
            expect_rwp_trapped(ctx.uffd, area, 1, write=write)
            ctx.uffd.rwprotect(area.page(4))
    expect_rwp_trapped(ctx.uffd, area, 3, 4, 5)
    for page in (0, 2, 3, 4, 5):
        area.expect_pattern_of(area, page, 1)


@uffd_case("rwprotect-thp-none", mem=(ANON,), features=SYNC_RWP, needs=("thp",), rows=("RW-49",), kind=Kind.DETAIL)
def test_rwprotect_thp_none(ctx: Context) -> None:
    """A huge page, too, can be protected and resolved while it is inaccessible, whole or in part."""
    mix = huge_mixture(ctx)
    area, last = mix.area, 2 * mix.count
    protect(area.range, PROT_NONE)
    ctx.uffd.resolve(mix.whole(0))
    ctx.uffd.rwprotect(mix.whole(2))
    expect(pmd_mapped(area.range), 2 * mix.whole(0).len, "bytes mapped by PMD")
    ctx.uffd.resolve(area.page(last + 5, 3))
    marked = {*mix.cut, *range(last, 3 * mix.count)} - {last + 5, last + 6, last + 7}
    mix.expect_marks("under PROT_NONE", pages=marked)
    protect(area.range, READ_WRITE)
    mix.expect_marks("when it is accessible again", pages=marked)
    expect_rwp_free(ctx.uffd, area, 0, mix.count - 1, mix.cut[0] - 1, last + 5, last + 7)
    expect_rwp_trapped(ctx.uffd, area, mix.cut[0], last, last + 4, last + 8, 3 * mix.count - 1)
    ctx.uffd.resolve(area.range)
    undisturbed(ctx.uffd, mix.expect_contents)


@uffd_case("rwprotect-none-blocked", mem=ALL, features=SYNC_RWP, pages=3, rows=("RW-50",), kind=Kind.DETAIL)
def test_rwprotect_none_blocked(ctx: Context) -> None:
    """A thread that was trapped, and whose page is inaccessible when it goes on, gets SIGSEGV, and nobody a message."""
    area = rwp_protected(ctx)
    for page, write in ((0, False), (1, True)):
        where, flags = area.page(page), WRITE_TRAPPED if write else READ_TRAPPED
        call = partial(access, area, page, write=write)
        with faulting(ctx.uffd, where.start, flags=flags, call=call) as waiter:
            protect(area.range, PROT_NONE)
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.resolve(where)
            trap = waiter.result()
        assert isinstance(trap, Trap), "expected SIGSEGV; the access went through"
        expect((trap.signo, trap.addr), (SIGSEGV, where.start), "signal of the access, and its address")
        ctx.uffd.expect_no_message()
        protect(area.range, READ_WRITE)
    expect_rwp_free(ctx.uffd, area, 0, 1)
    expect_rwp_trapped(ctx.uffd, area, 2)


# ---- memory that goes away -----------------------------------------------------------------------------------------


def free_hugepages() -> int:
    """How many huge pages of the default size are free."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return next((int(words[1]) for words in lines if words[0] == "HugePages_Free:"), 0)


def counts() -> tuple[int, int]:
    """What the kernel counts of this process's memory: pages in swap, and shared ones that are mapped."""
    return resident("VmSwap"), resident("RssShmem")


def replace(area: Area) -> None:
    """Map other memory of the same type over an area."""
    flags = MAP_FIXED | MAP_NORESERVE | (MAP_SHARED if area.mem.shared else MAP_PRIVATE)
    flags |= MAP_ANONYMOUS if area.fd is None else 0
    map_memory(area.range.len, at=area.start, flags=flags, fd=-1 if area.fd is None else area.fd)


@uffd_case(
    "rwprotect-unmapped", mem=ALL, features=SYNC_RWP, needs=("swap",), pages=MIXED, rows=("RW-58",), kind=Kind.DETAIL
)
def test_rwprotect_unmapped(ctx: Context) -> None:
    """Protected memory can be unmapped or replaced without a message; what it took is given back, no mark stays."""
    ways: dict[str, Callable[[Area], object]] = {"munmap": lambda area: unmap(area.range), "MAP_FIXED": replace}
    for what, way in ways.items():
        area = ctx.allocate(MIXED)
        before, huge_before = counts(), free_hugepages()
        mix = mixture(ctx, area=area)
        with promise("RW-58", what):
            undisturbed(ctx.uffd, partial(way, area))
            expect(counts(), before, "pages in swap and shared pages mapped, afterwards")
            if not ctx.mem.shared:  # else the file has them
                expect(free_hugepages(), huge_before, "free huge pages, afterwards")
            if what == "munmap":
                expect_no_memory(area.range)
                map_memory(area.range.len, at=area.start, flags=MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS)
            expect_modes(area.range, UNREGISTERED)
            Pagemap.expect_protected(area, (), "in what is mapped there afterwards")
            undisturbed(ctx.uffd, partial(touch, area.range, area.page_size, write=True))
            if what == "MAP_FIXED" and area.mem.shared:
                mix.expect_contents()


@uffd_case(
    "rwprotect-unmapped-part", mem=ALL, features=SYNC_RWP, pages=5, rows=("RW-58",), kind=Kind.DETAIL
)
def test_rwprotect_unmapped_part(ctx: Context) -> None:
    """Where a part of protected memory is unmapped, the rest on both sides is registered and protected as before."""
    area = rwp_protected(ctx)
    ctx.uffd.resolve(area.page(3))
    undisturbed(ctx.uffd, partial(unmap, area.page(2)))
    for part, modes in ((area.page(0, 2), [RWP, RWP]), (area.page(3, 2), [RWP, RWP])):
        expect_modes(part, *modes)
    Pagemap.expect_protected(area, {0, 1, 4}, "after page 2 was unmapped")
    expect_rwp_free(ctx.uffd, area, 3)
    expect_rwp_trapped(ctx.uffd, area, 0, 1, 4)


@uffd_case(
    "rwprotect-exit",
    mem=ALL,
    features=SYNC_RWP,
    needs=("swap",),
    pages=MIXED,
    spare_hugepages=MIXED,
    rows=("RW-58",),
    kind=Kind.DETAIL,
)
def test_rwprotect_exit(ctx: Context) -> None:
    """A process ends with protected pages, and threads or none trapped there, and gives all of its memory back."""
    before = free_hugepages()

    def life(channel: Channel) -> None:
        area = ctx.mem.allocate(MIXED)
        uffd = Uffd.open(SYNC_RWP)
        mixture(ctx, uffd=uffd, area=area)
        channel.send(area.start, uffd.fd)
        if channel.receive():
            peek(area.page(1).start)

    for trap in (False, True):
        with Child(life) as child:
            start, (fd,) = child.receive_fds()
            with Uffd(fd) as uffd:
                child.send(trap)
                if trap:
                    await_fault(uffd, child, start + ctx.page_size, READ_TRAPPED)
                    child.kill()
                else:
                    child.expect_end(uffd)
                uffd.expect_asleep(0)
                uffd.expect_no_message()
        expect(free_hugepages(), before, "free huge pages, afterwards")


@uffd_case("rwprotect-thp-unmapped", mem=(ANON,), features=SYNC_RWP, needs=("thp",), rows=("RW-58",), kind=Kind.DETAIL)
def test_rwprotect_thp_unmapped(ctx: Context) -> None:
    """Protected huge pages can be unmapped whole and in part; the rest stays protected."""
    mix = huge_mixture(ctx)
    area, gone = mix.area, mix.area.page(mix.count - 2, 8)
    undisturbed(ctx.uffd, partial(unmap, gone))
    marked = mix.protected - set(range(mix.count - 2, mix.count + 6))
    mix.expect_marks("after a part was unmapped", pages=marked)
    expect_rwp_trapped(ctx.uffd, area, 0, mix.count - 3, mix.cut[-1])
    undisturbed(ctx.uffd, partial(advise, area.page(0, 7), Advice.DONTNEED))
    mix.expect_marks("after a part was dropped", pages=marked - {*range(7), mix.count - 3, mix.cut[-1]})
    undisturbed(ctx.uffd, partial(unmap, area.range))


# ---- events --------------------------------------------------------------------------------------------------------


def held_up_by(uffd: Uffd, area: Area, call: Callable[[], object], *messages: Message) -> None:
    """Make a call that waits for its messages to be read; until then no page can be protected or resolved."""
    with Waiter(call) as waiter:
        for message in messages:
            await_event(uffd, waiter, message)
            for request in (uffd.rwprotect, uffd.resolve):
                with refuses(EAGAIN):
                    request(area.range)
            take_event(uffd, waiter, message)
        waiter.result()
    uffd.expect_no_message()
    uffd.rwprotect(area.page(0))


@uffd_case(
    "rwprotect-events",
    mem=ALL,
    features=SYNC_RWP | REMAP | REMOVE | UNMAP,
    pages=5,
    rows=("RW-59",),
    kind=Kind.DETAIL,
)
def test_rwprotect_events(ctx: Context) -> None:
    """Memory under RWP alone announces what happens to it; until that is read, protecting and resolving say EAGAIN."""
    uffd, area, place = ctx.uffd, rwp_protected(ctx), ctx.allocate(1)
    uffd.resolve(area.page(0))
    advice = Advice.REMOVE if ctx.mem.shared else Advice.DONTNEED
    with promise("RW-59", "REMOVE"):
        held_up_by(uffd, area, partial(advise, area.page(4), advice), removed(area.page(4)))
        Pagemap.expect_protected(area, {0, 1, 2, 3}, "after a page was dropped")
    uffd.resolve(area.page(0))
    with promise("RW-59", "UNMAP"):
        held_up_by(uffd, area, partial(unmap, area.page(3)), unmapped(area.page(3)))
        Pagemap.expect_protected(area, {0, 1, 2}, "after a page was unmapped")
    uffd.resolve(area.page(0))
    with promise("RW-59", "REMAP"):
        part = area.page(2)
        held_up_by(uffd, area, partial(remap, part, to=place.start), moved(part, place.start), unmapped(part))
        Pagemap.expect_protected(area, {0, 1}, "after a page was moved")
        Pagemap.expect_protected(place, {0}, "where it was moved to")
    expect_rwp_trapped(uffd, area, 0, 1)
    expect_rwp_trapped(uffd, place, 0)


@uffd_case(
    "rwprotect-events-fork",
    mem=ALL,
    features=SYNC_RWP | FORK,
    pages=3,
    spare_hugepages=4,
    rows=("RW-59",),
    kind=Kind.DETAIL,
)
def test_rwprotect_events_fork(ctx: Context) -> None:
    """While a fork of memory under RWP alone is unread, protecting and resolving say EAGAIN."""
    area = ctx.dst

    def life(channel: Channel) -> None:
        area.fill()
        channel.send()
        channel.receive()
        with Child(lambda _: Pagemap.expect_protected(area, {1}, "in the child")):
            pass
        Pagemap.expect_protected(area, {1}, "in the parent")

    with monitored(area.range, RWP, life, ctx.features) as (process, uffd):
        process.receive()
        uffd.rwprotect(area.page(1))
        process.send()
        await_child_event(uffd, process)
        for request in (uffd.rwprotect, uffd.resolve):
            with refuses(EAGAIN):
                request(area.range)
        with read_fork(uffd):
            process.expect_end(uffd)
