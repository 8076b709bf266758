# SPDX-License-Identifier: GPL-2.0-only
"""UFFD_EVENT_REMAP: moved, grown and shrunk mappings, and what of them stays registered."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EFAULT
from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, HUGETLB, MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MISSING, MREMAP_DONTUNMAP,
    MREMAP_FIXED, NOT_HUGETLB, PAGE_SIZE, PROT_NONE, PROT_READ, REMAP, REMOVE, SHMEM, SHMEM_PRIVATE, UNMAP,
    UNREGISTERED, Advice, Context, Feature, Range, Remapped, Waiter, advise, announced, await_event, expect,
    expect_contents, expect_modes, expect_no_memory, expect_one_of, expect_served, fails, mapped, modes_offered,
    moved, outcome, peek, promise, protect, recorder, remap, saw, smaps_fields, take_event, undisturbed, unmap,
    unmapped,
)  # fmt: skip


UNRESERVED = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE


@uffd_case("remap-event", mem=ALL, features=REMAP, pages=3, rows=("EV-02", "EV-18", "EV-28"))
def test_remap_event(ctx: Context) -> None:
    """A mapping that was moved is announced with its old and new place and length, and is registered there."""
    old, place = ctx.dst.range, ctx.allocate()
    ctx.dst.fill(0, 2)
    ctx.uffd.register(old, MISSING)
    with Waiter(lambda: remap(old, to=place.start)) as waiter:
        await_event(ctx.uffd, waiter)
        expect_contents(ctx, place.page(0, 2))
        expect_no_memory(old)
        take_event(ctx.uffd, waiter, moved(old, place.start))
        expect(waiter.result(), place.start, "the new address")
    expect_modes(place.range, MISSING)
    expect_served(ctx, place.page(2))


@uffd_case("remap-unwatched", mem=NOT_HUGETLB, features=REMAP | UNMAP, pages=2, rows=("EV-18",), kind=Kind.DETAIL)
def test_remap_unwatched(ctx: Context) -> None:
    """A mapping that nobody watches moves without an event, and is watched no more than before."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    old, place = ctx.allocate(), ctx.allocate()
    old.fill()
    undisturbed(ctx.uffd, lambda: remap(old.range, to=place.start))
    expect_modes(place.range, UNREGISTERED)
    place.expect_pattern_of(old)


@uffd_case("remap-event-order", mem=ALL, features=REMAP | UNMAP | REMOVE, pages=2, rows=("EV-19",), kind=Kind.DETAIL)
def test_remap_event_order(ctx: Context) -> None:
    """A mapping moved over registered memory announces what it replaces, then its move, then its old place."""
    old, place = ctx.dst.range, ctx.allocate()
    ctx.uffd.register(old, MISSING)
    ctx.uffd.register(place.page(1), MISSING)
    events = unmapped(place.range), moved(old, place.start), unmapped(old)
    announced(ctx.uffd, lambda: remap(old, to=place.start), *events)
    expect_modes(place.range, MISSING)


@uffd_case("remap-event-anywhere", mem=NOT_HUGETLB, features=REMAP | UNMAP, pages=2, rows=("EV-19", "EV-21"))
def test_remap_event_anywhere(ctx: Context) -> None:
    """A mapping that the kernel moves because it cannot grow is announced at the place that the kernel chose."""
    old = ctx.dst.range
    ctx.uffd.register(old, MISSING)
    with Waiter(lambda: remap(old, 2 * old.len)) as waiter:
        await_event(ctx.uffd, waiter)
        event = ctx.uffd.read()
        take_event(ctx.uffd, waiter, unmapped(old))
        to = waiter.result()
    assert isinstance(to, int)
    expect(event, [moved(old, to)], "the first event")
    expect_modes(Range(to, 2 * old.len), MISSING)
    announced(ctx.uffd, lambda: unmap(Range(to, 2 * old.len)), unmapped(Range(to, 2 * old.len)))


@uffd_case("remap-event-grown", mem=NOT_HUGETLB, features=REMAP, pages=3, rows=("EV-21",), kind=Kind.DETAIL)
def test_remap_event_grown(ctx: Context) -> None:
    """A mapping that grows as it moves is announced with its old length; the added tail is registered too."""
    old, place = ctx.dst.page(0, 2), ctx.allocate()
    unmap(ctx.dst.page(2))
    ctx.uffd.register(old, MISSING)
    announced(ctx.uffd, lambda: remap(old, place.range.len, to=place.start), moved(old, place.start))
    expect_modes(place.range, MISSING)
    expect_served(ctx, place.page(2))


SHRUNK = Defect(
    id="D-EV-20",
    summary="a mapping that shrinks as it moves is announced with its new length, where older kernels and "
    "userfaultfd(2) have its original one",
    kernels="6.18.44, 7.3.4; not 6.1.192, 6.12.117",
    advice="Take what lies behind the announced length at the old place for gone as well; UFFD_EVENT_UNMAP tells.",
    shows=r"remap\.len: expected",
)


def shrink(ctx: Context) -> tuple[int, int, int]:
    """Move two pages of four elsewhere, and return the announced, the old and the new length."""
    old, place = ctx.dst.range, ctx.allocate()
    kept, tail = ctx.dst.page(0, 2), ctx.dst.page(2, 2)
    ctx.dst.fill()
    ctx.uffd.register(old, MISSING)
    with recorder(ctx, ctx.uffd) as reader:
        remap(old, kept.len, to=place.start)
    expect_contents(ctx, place.page(0, 2))
    expect_modes(place.range, MISSING, UNREGISTERED)
    expect_no_memory(kept)
    expect_no_memory(tail)
    [length] = [message.len for message in reader.messages if isinstance(message, Remapped)]
    expect(reader.messages, [moved(old, place.start, length), unmapped(tail), unmapped(kept)], "events")
    return length, old.len, kept.len


@uffd_case("remap-event-shrunk", mem=ALL, features=REMAP | UNMAP, pages=4, rows=("EV-20",), defect=SHRUNK)
def test_remap_event_shrunk(ctx: Context) -> None:
    """A mapping that shrinks as it moves is announced with its original length."""
    length, old, _ = shrink(ctx)
    expect(length, old, "EV-20: remap.len")


@uffd_case("remap-event-shrunk-or-old", mem=ALL, features=REMAP | UNMAP, pages=4, rows=("EV-20",), kind=Kind.DETAIL)
def test_remap_event_shrunk_or_old(ctx: Context) -> None:
    """A mapping that shrinks as it moves is announced with its old or its new length, then what was cut and moved."""
    length, old, new = shrink(ctx)
    expect(length in (old, new), True, f"EV-20: remap.len {length} is the old or the new length")
    saw(f"remap.len is the {'old' if length == old else 'new'} length")


TOO_LONG = Defect(
    id="D-EV-47",
    summary="mremap(2) of huge pages says ENOMEM for most lengths from 4 GiB on: what was moved is counted in an int",
    kernels="6.12.117, 6.18.44, 7.3.4",
    advice="Move mappings of huge pages in pieces below 2 GiB.",
    shows=r"mremap\(.*\): ENOMEM",
)


@uffd_case(
    "remap-event-long", mem=(HUGETLB,), features=REMAP, pages=1, rows=("EV-47",), kind=Kind.DETAIL, defect=TOO_LONG
)
def test_remap_event_long(ctx: Context) -> None:
    """A mapping of huge pages of any length can be moved, is announced with that length, and registered there."""
    for gib in (1, 3, 4, 5, 8):
        with promise("EV-47", f"{gib} GiB"), mapped(2 * gib << 30, prot=PROT_NONE, flags=UNRESERVED) as place:
            where = Range(-(-place.start // ctx.page_size) * ctx.page_size, gib << 30)
            fd = os.memfd_create("uffd-long", os.MFD_CLOEXEC | os.MFD_HUGETLB)
            os.ftruncate(fd, where.len)
            with mapped(where.len, flags=MAP_SHARED | MAP_NORESERVE, fd=fd) as old:
                ctx.uffd.register(old, MISSING)
                announced(ctx.uffd, partial(remap, old, to=where.start), moved(old, where.start))
                expect_modes(where, MISSING)
                ctx.uffd.unregister(where)
            os.close(fd)


@uffd_case("remap-grow-in-place", mem=NOT_HUGETLB, features=REMAP | UNMAP, pages=3, rows=("EV-22",), kind=Kind.DETAIL)
def test_remap_grow_in_place(ctx: Context) -> None:
    """A mapping that grows where it is announces nothing; the added tail is registered."""
    old = ctx.dst.page(0, 2)
    unmap(ctx.dst.page(2))
    ctx.uffd.register(old, MISSING)
    expect(undisturbed(ctx.uffd, lambda: remap(old, ctx.dst.range.len, flags=0)), old.start, "the address")
    expect_modes(ctx.dst.range, MISSING)
    expect_served(ctx, ctx.dst.page(2))


@uffd_case("remap-dontunmap", mem=NOT_HUGETLB, features=REMAP | UNMAP, pages=2, rows=("EV-23",), kind=Kind.DETAIL)
def test_remap_dontunmap(ctx: Context) -> None:
    """MREMAP_DONTUNMAP announces the move alone; the pages are in the new place, and both places are registered."""
    old, place = ctx.dst.range, ctx.allocate()
    ctx.dst.fill()
    ctx.uffd.register(old, MISSING)
    announced(ctx.uffd, lambda: remap(old, to=place.start, flags=MREMAP_DONTUNMAP), moved(old, place.start))
    expect_contents(ctx, place.range)
    expect_modes(place.range, MISSING)
    expect_modes(old, MISSING)
    if ctx.mem == ANON:
        expect_served(ctx, ctx.dst.page(1))


@uffd_case("remap-off", mem=ALL, features=UNMAP | REMOVE, pages=2, rows=("EV-24",), kind=Kind.DETAIL)
def test_remap_off(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_REMAP a moved mapping is not registered any more; its missing pages are zeroes."""
    old, place = ctx.dst.range, ctx.allocate()
    ctx.dst.fill(0, 1)
    ctx.uffd.register(old, MISSING)
    announced(ctx.uffd, lambda: remap(old, to=place.start), unmapped(old))
    expect_modes(place.range, UNREGISTERED)
    expect_contents(ctx, place.page(0))
    expect(undisturbed(ctx.uffd, lambda: peek(place.page(1).start)), b"\0", "a missing page of the moved mapping")


@uffd_case("remap-off-modes", mem=ALL, pages=1, spare_hugepages=6, rows=("EV-24",), kind=Kind.DETAIL)
def test_remap_off_modes(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_REMAP a moved mapping is not registered any more in whichever mode it was."""
    for mode in modes_offered(ctx):
        area, place = ctx.allocate(), ctx.allocate()
        with promise("EV-24", f"registered for {mode}"):
            ctx.uffd.register(area.range, mode)
            undisturbed(ctx.uffd, partial(remap, area.range, to=place.start))
            expect_modes(place.range, UNREGISTERED)


@uffd_case("remap-event-modes", mem=ALL, features=REMAP, pages=1, spare_hugepages=6, rows=("EV-19",))
def test_remap_event_modes(ctx: Context) -> None:
    """A mapping that was moved is announced in whichever mode it is registered, and stays in that mode."""
    for mode in modes_offered(ctx):
        area, place = ctx.allocate(), ctx.allocate()
        with promise("EV-19", f"registered for {mode}"):
            ctx.uffd.register(area.range, mode)
            announced(ctx.uffd, partial(remap, area.range, to=place.start), moved(area.range, place.start))
            expect_modes(place.range, mode)


@uffd_case("remap-off-dontunmap", mem=NOT_HUGETLB, pages=2, rows=("EV-24",), kind=Kind.DETAIL)
def test_remap_off_dontunmap(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_REMAP, MREMAP_DONTUNMAP leaves the old place registered, and only that."""
    old, place = ctx.dst.range, ctx.allocate()
    ctx.uffd.register(old, MISSING)
    undisturbed(ctx.uffd, lambda: remap(old, to=place.start, flags=MREMAP_DONTUNMAP))
    expect_modes(place.range, UNREGISTERED)
    expect_modes(old, MISSING)
    expect(undisturbed(ctx.uffd, lambda: peek(place.start)), b"\0", "a missing page of the new place")
    expect_served(ctx, ctx.dst.page(1))


@uffd_case("remap-duplicate", mem=(SHMEM,), features=REMAP | UNMAP, pages=2, rows=("EV-25",), kind=Kind.DETAIL)
def test_remap_duplicate(ctx: Context) -> None:
    """An mremap from length 0 maps shared memory a second time: announced with length 0, and registered in both."""
    old, place = ctx.dst.range, ctx.allocate()
    ctx.dst.fill(0, 1)
    ctx.uffd.register(old, MISSING)
    twice = partial(remap, Range(old.start, 0), old.len, to=place.start)
    announced(ctx.uffd, twice, moved(old, place.start, 0))
    expect_modes(old, MISSING)
    expect_modes(place.range, MISSING)
    expect_contents(ctx, place.page(0))
    expect_served(ctx, place.page(1))


@uffd_case("remap-part", mem=ALL, features=REMAP | UNMAP, pages=3, rows=("EV-26",), kind=Kind.DETAIL)
def test_remap_part(ctx: Context) -> None:
    """A part of a mapping can move away: it and what remains on both sides stay registered."""
    part, place = ctx.dst.page(1), ctx.allocate(1)
    ctx.dst.fill(1, 1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    announced(ctx.uffd, lambda: remap(part, to=place.start), moved(part, place.start), unmapped(part))
    expect_contents(ctx, place.range, first=1)
    expect_no_memory(part)
    for where in (place.range, ctx.dst.page(0), ctx.dst.page(2)):
        expect_modes(where, MISSING)
    expect_served(ctx, ctx.dst.page(2))


@contextmanager
def little_address_space() -> Iterator[None]:
    """Leave this process 64 MiB of address space beyond what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * PAGE_SIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def grow_too_far(where: Range) -> None:
    """Grow a mapping by a gibibyte where there is no room for that."""
    with little_address_space():
        remap(where, where.len + (1 << 30))


@uffd_case("remap-fails", mem=ALL, features=REMAP | UNMAP, pages=3, rows=("EV-27",), kind=Kind.DETAIL)
def test_remap_fails(ctx: Context) -> None:
    """An mremap that fails announces nothing, leaves the memory registered, and holds nothing up afterwards."""
    where, whole, to = ctx.dst.page(0, 2), ctx.dst.range, ctx.allocate().start
    ctx.uffd.register(where, MISSING)
    failing: dict[str, Callable[[], object]] = {
        "old address not page aligned": lambda: remap(Range(where.start + 1, where.len), to=to),
        "new address not page aligned": lambda: remap(where, to=to + 1),
        "places overlap": lambda: remap(where, to=where.start + ctx.page_size),
        "new length 0": lambda: remap(where, 0),
        "unknown flag": lambda: remap(where, flags=8),
        "MREMAP_FIXED without MREMAP_MAYMOVE": lambda: remap(where, flags=MREMAP_FIXED),
        "MREMAP_DONTUNMAP that grows": lambda: remap(where, whole.len, to=to, flags=MREMAP_DONTUNMAP),
        "longer than the mapping": lambda: remap(whole, 2 * whole.len),
        "nothing mapped there": lambda: remap(Range(0, where.len), to=to),
        "no room to grow": lambda: remap(where, whole.len, flags=0),
        "beyond RLIMIT_AS": lambda: grow_too_far(where),
    }
    if ctx.mem.hugetlb:
        failing["MREMAP_DONTUNMAP of huge pages"] = lambda: remap(where, to=to, flags=MREMAP_DONTUNMAP)
        failing["part of a huge page"] = lambda: remap(Range(where.start + PAGE_SIZE, where.len), to=to)
    for what, call in failing.items():
        with promise("EV-27", what):
            result = undisturbed(ctx.uffd, partial(outcome, call))
            expect(result in ("EINVAL", "EFAULT", "ENOMEM"), True, f"mremap fails (result {result})")
    expect_modes(whole, MISSING, MISSING, UNREGISTERED)
    expect_served(ctx, ctx.dst.page(1))


@uffd_case("remap-several", mem=ALL, features=REMAP, pages=3, rows=("EV-27",), kind=Kind.VERSION)
def test_remap_several(ctx: Context) -> None:
    """Registered mappings cannot be moved in one mremap with others; that announces nothing and moves none of them."""
    place = ctx.allocate()
    ctx.uffd.register(ctx.dst.page(0), MISSING)
    ctx.uffd.register(ctx.dst.page(2), MISSING)
    with promise("EV-27", "several mappings"), fails(EFAULT):
        undisturbed(ctx.uffd, lambda: remap(ctx.dst.range, to=place.start))
    expect_modes(ctx.dst.range, MISSING, UNREGISTERED, MISSING)
    expect_served(ctx, ctx.dst.page(0))


@uffd_case(
    "remap-several-later", mem=ALL, features=REMAP, pages=4, spare_hugepages=2, rows=("EV-27",), kind=Kind.VERSION
)
def test_remap_several_later(ctx: Context) -> None:
    """An mremap of several mappings, of which a later one is registered, fails before that one, and announces nothing.

    Old kernels move none of them; since Linux 6.17 those in front of it are moved. Which it is, is tried; kernels that
    offer UFFD_FEATURE_RWP must do the latter. The registered one, and what is behind it, stay where they are.
    """
    place, pages = ctx.allocate(), range(4)
    ctx.dst.fill()
    protect(ctx.dst.page(1), PROT_READ)
    ctx.uffd.register(ctx.dst.page(2), MISSING)
    with promise("EV-27"):
        with fails(EFAULT):
            undisturbed(ctx.uffd, lambda: remap(ctx.dst.range, to=place.start))
        gone = [page for page in pages if not list(smaps_fields(ctx.dst.page(page)))]
        allowed = ([0, 1],) if Feature.RWP in ctx.uffd.offered else ([0, 1], [])
        expect_one_of(gone, allowed, "the pages moved, of those in front of the registered one")
        expect_modes(ctx.dst.page(2), MISSING)
        expect_modes(ctx.dst.page(3), UNREGISTERED)
        for page in pages:
            here = (place if page in gone else ctx.dst).page(page)
            if page in gone:
                expect_modes(here, UNREGISTERED)
            undisturbed(ctx.uffd, partial(expect_contents, ctx, here, first=page))
        advise(ctx.dst.page(2), Advice.REMOVE if ctx.mem.shared else Advice.DONTNEED)
        if ctx.mem is not SHMEM_PRIVATE:  # whose file has got a page by the write to the copy
            expect_served(ctx, ctx.dst.page(2))
