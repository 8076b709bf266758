# SPDX-License-Identifier: GPL-2.0-only
"""Requests that wait for the address space while mremap(2) has it: they find an event unread when they get it.

A mapping of many pages is moved one by one, for source and destination lie differently to their page tables. All that
time the move holds the lock of the address space, and only then it announces itself.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EAGAIN
from typing import cast

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ANON, FILLED, LONG_FILL, MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, MINOR, MISSING, MREMAP_DONTUNMAP, MREMAP_FIXED,
    MREMAP_MAYMOVE, PAGE_SIZE, PROT_NONE, REMAP, SHMEM, SUCCESS, WP, Context, Feature, Pagemap, Race, Racer, Range,
    Uffd, UffdError, Waiter, copier, expect, expect_modes, held_up, keep_small, lib, long_fill, mapped, moved, mover,
    peek, pmd_size, poised, poke, promise, protector, remap, settle, syscalls, touch, uapi, unmap, zeroer,
)  # fmt: skip

MANY = 16384
"""Pages of the mapping that is moved."""
PLACES = 500
"""Mappings of one page each; the first fill of each needs the lock."""


@contextmanager
def big_mapping(uffd: Uffd) -> Iterator[tuple[Range, int]]:
    """Yield a registered mapping of many pages, and where it is to be moved."""
    length = MANY * PAGE_SIZE
    space = length + 2 * pmd_size()
    with (
        mapped(length, flags=MAP_PRIVATE | MAP_ANONYMOUS) as big,
        mapped(space, prot=PROT_NONE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE) as room,
    ):
        keep_small(big)
        touch(big, PAGE_SIZE, write=True)
        uffd.register(big, MISSING)
        offset = (big.start - room.start + PAGE_SIZE) % pmd_size()
        yield big, room.start + offset


def remapping(big: Range, to: int, flags: int = 0) -> Racer:
    """mremap(2) of the mapping, once."""
    args = (big.start, big.len, big.len, MREMAP_MAYMOVE | MREMAP_FIXED | flags, to)
    return Racer(f"mremap(2) of {big}", lib.UFFD_RACE_SYSCALL, syscalls.number("mremap"), args, (), 1)


def overtaken(uffd: Uffd, big: Range, to: int, racer: Racer, flags: int = 0) -> int:
    """Move the mapping while a racer makes its requests, read the event when these are done; return how many were met.

    These must be the first ones; all others must have been refused with EAGAIN.
    """
    with Race(remapping(big, to, flags), racer) as race:
        race.reached(1, racer.count)
        expect(uffd.wait("UFFD_EVENT_REMAP"), moved(big, to), "the event")
    moving, requests = race.outcomes
    moving.expect_only(SUCCESS)
    requests.expect_only(SUCCESS, EAGAIN)
    return requests[SUCCESS]


@contextmanager
def places(uffd: Uffd, fd: int = -1) -> Iterator[Range]:
    """Yield a range of which each second page is a mapping of its own, of the file if any, registered and untouched."""
    anonymous = MAP_ANONYMOUS if fd < 0 else 0
    with mapped(2 * PLACES * PAGE_SIZE, flags=MAP_PRIVATE | anonymous, fd=fd) as where:
        for place in range(PLACES):
            unmap(Range(where.start + (2 * place + 1) * PAGE_SIZE, PAGE_SIZE))
        uffd.register(where, MISSING if fd < 0 else MINOR)
        yield where


def each_place(racer: Racer) -> Racer:
    """Return the racer that makes its first request for every place once, and no request again."""
    strides = tuple(2 * stride for stride in racer.strides)
    return dataclasses.replace(racer, strides=strides, count=PLACES, again=())


@uffd_case(
    "fills-beside-remap",
    mem=(ANON,),
    variants=("copy", "zeropage", "poison"),
    features=REMAP | Feature.POISON,
    pages=PLACES,
    rows=("EV-04",),
    bugs=(6,),
    kind=Kind.DETAIL,
    smp=True,
)
def test_fills_beside_remap(ctx: Context, variant: str) -> None:
    """A fill that waits for the address space while a move is under way is done before its event, or says EAGAIN."""
    with big_mapping(ctx.uffd) as (big, to), places(ctx.uffd) as where:
        poisoner = Racer(
            "UFFDIO_POISON", lib.UFFD_RACE_IOCTL, uapi.UFFDIO_POISON, (where.start, PAGE_SIZE, 0, 0), (PAGE_SIZE,),
            PLACES, fd=ctx.uffd.fd, output=3,
        )  # fmt: skip
        racer = {
            "copy": copier(ctx.uffd, where, ctx.src.start, PAGE_SIZE),
            "zeropage": zeroer(ctx.uffd, where, PAGE_SIZE),
            "poison": poisoner,
        }[variant]
        racer = each_place(racer)
        if variant == "copy":
            racer = dataclasses.replace(racer, strides=(2 * PAGE_SIZE, PAGE_SIZE))
        done = overtaken(ctx.uffd, big, to, racer)
        Pagemap.expect_first(where, done, f"when {done} requests succeeded", 2 * PAGE_SIZE)


@uffd_case(
    "continue-beside-remap",
    mem=(ANON,),
    features=REMAP | Feature.MINOR_SHMEM,
    pages=1,
    rows=("EV-04",),
    bugs=(6,),
    kind=Kind.DETAIL,
    smp=True,
)
def test_continue_beside_remap(ctx: Context) -> None:
    """The same for UFFDIO_CONTINUE of a private mapping of shared memory."""
    fd = os.memfd_create("cached")
    os.write(fd, bytes(2 * PLACES * PAGE_SIZE))
    with big_mapping(ctx.uffd) as (big, to), places(ctx.uffd, fd) as where:
        racer = Racer(
            "UFFDIO_CONTINUE", lib.UFFD_RACE_IOCTL, uapi.UFFDIO_CONTINUE, (where.start, PAGE_SIZE, 0, 0),
            (2 * PAGE_SIZE,), PLACES, fd=ctx.uffd.fd, output=3,
        )  # fmt: skip
        done = overtaken(ctx.uffd, big, to, racer)
        Pagemap.expect_first(where, done, f"when {done} requests succeeded", 2 * PAGE_SIZE)
    os.close(fd)


@uffd_case(
    "writeprotect-beside-remap",
    mem=(ANON,),
    features=REMAP | Feature.PAGEFAULT_FLAG_WP,
    pages=PLACES,
    rows=("EV-04", "WP-31"),
    kind=Kind.DETAIL,
    smp=True,
)
def test_writeprotect_beside_remap(ctx: Context) -> None:
    """The same for UFFDIO_WRITEPROTECT: of the pages just those are protected whose request succeeded."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    with big_mapping(ctx.uffd) as (big, to):
        done = overtaken(ctx.uffd, big, to, protector(ctx.uffd, ctx.dst.range, PAGE_SIZE))
    marks = Pagemap.have(ctx.dst.range, uapi.PM_UFFD_WP)
    wanted = [page < done for page in range(ctx.nr_pages)]
    expect(marks, wanted, f"protected pages, after {done} requests that succeeded")


@uffd_case(
    "move-beside-remap",
    mem=(ANON,),
    features=REMAP | Feature.MOVE,
    pages=PLACES,
    rows=("EV-04", "MV-26"),
    bugs=(6,),
    kind=Kind.DETAIL,
    smp=True,
)
def test_move_beside_remap(ctx: Context) -> None:
    """UFFDIO_MOVE out of a mapping that is being moved takes a page before that, or says EAGAIN and leaves it to it."""
    poke(ctx.dst.page(PLACES - 1).start, b"\0")  # the destination is ready: only the source has to be waited for
    ctx.uffd.register(ctx.dst.range, MISSING)
    count = PLACES - 1
    with big_mapping(ctx.uffd) as (big, to):
        for page in range(count):
            poke(big.start + page * PAGE_SIZE, page.to_bytes(4, "little"))
        racer = mover(ctx.uffd, ctx.dst.start, big.start, PAGE_SIZE, count)
        done = overtaken(ctx.uffd, big, to, racer, MREMAP_DONTUNMAP)
        Pagemap.expect_present(ctx.dst, *range(done), PLACES - 1)
        there = Pagemap.filled(Range(to, count * PAGE_SIZE))
        expect(there, [page >= done for page in range(count)], f"pages at the new place, after {done} moves")
        for page in range(count):
            at = ctx.dst.page(page).start if page < done else to + page * PAGE_SIZE
            expect(int.from_bytes(peek(at, 4), "little"), page, f"contents of page {page}")


# ---- behind a fill -------------------------------------------------------------------------------------------------

TRIES = 5


@dataclass(frozen=True)
class Request:
    """A request that somebody makes, and what it does."""

    what: str
    call: Callable[[], object]
    page: int
    """The address of the page that it changes."""
    mark: uapi.PagemapBit
    """What one of in pagemap tells of it."""

    def refused(self) -> bool:
        """Make it; returns whether it was refused, which must be with EAGAIN."""
        try:
            self.call()
        except UffdError as error:
            with promise("EV-04", self.what), held_up():
                raise error
            return True
        return False

    def done(self) -> bool:
        """Whether the page shows it."""
        return bool(Pagemap.entry(self.page) & self.mark)


def refused_behind(uffd: Uffd, where: Range, requests: list[Request]) -> tuple[int, list[Request]]:
    """Have a mapping moved while a fill is under way, and make requests meanwhile: that is their order.

    The old place stays mapped. Returns the new one, and which requests were refused; these must have done nothing.
    """
    with (
        poised(*(request.refused for request in requests)) as (go, waiters),
        long_fill(uffd),
        Waiter(lambda: remap(where, flags=MREMAP_MAYMOVE | MREMAP_DONTUNMAP)) as moving,
    ):
        settle(moving)
        go()
        refused = [request for request, waiter in zip(requests, waiters, strict=True) if waiter.result()]
        event = uffd.wait("UFFD_EVENT_REMAP")
        to = cast(int, moving.result())
        expect(event, moved(where, to), "the event")
    for request in refused:
        expect(request.done(), False, f"whether {request.what} has been done though it said EAGAIN")
    return to, refused


def expect_refused(uffd: Uffd, prepare: Callable[[], tuple[Range, list[Request]]]) -> None:
    """Assert that each of the requests is refused behind a move, and works afterwards.

    One can be made before the move after all, while that waits for something else; then all are made once more.
    """
    left: set[str] | None = None
    for _ in range(TRIES):
        where, requests = prepare()
        to, refused = refused_behind(uffd, where, requests)
        for request in refused:
            if not request.what.startswith("UFFDIO_MOVE"):  # what it was to move is elsewhere
                request.call()
                expect(request.done(), True, f"whether {request.what} has been done afterwards")
        unmap(Range(to, where.len))
        left = {request.what for request in requests if left is None or request.what in left}
        left -= {request.what for request in refused}
        if not left:
            return
    raise AssertionError(f"EV-04: behind a move expected EAGAIN; {', '.join(sorted(left or ()))} did what was asked")


@uffd_case(
    "requests-behind-move",
    mem=(ANON,),
    features=REMAP | Feature.MOVE | Feature.POISON | Feature.PAGEFAULT_FLAG_WP,
    pages=8,
    rows=("EV-04", "MV-26", "WP-31"),
    kind=Kind.DETAIL,
)
def test_requests_behind_move(ctx: Context) -> None:
    """What is asked for while a move of a mapping waits for its turn says EAGAIN behind it, and does nothing."""
    ctx.src.fill()
    uffd, size = ctx.uffd, PAGE_SIZE

    def prepare() -> tuple[Range, list[Request]]:
        below, area, above = (ctx.allocate(8) for _ in range(3))
        area.fill(0, 2)
        for other in below, above:
            other.fill(0, 1)
        for one in below, area, above:
            uffd.register(one.range, MISSING | WP)
        low, high, old = below.page, above.page, area.page
        requests = [
            Request("UFFDIO_COPY", lambda: uffd.copy(low(1).start, ctx.src.start, size), low(1).start, FILLED),
            Request("UFFDIO_ZEROPAGE", lambda: uffd.zeropage(low(2)), low(2).start, FILLED),
            Request("UFFDIO_POISON", lambda: uffd.poison(low(3)), low(3).start, FILLED),
            Request("UFFDIO_MOVE upwards", lambda: uffd.move(low(4).start, old(0).start, size), low(4).start, FILLED),
            Request("UFFDIO_MOVE down", lambda: uffd.move(high(1).start, old(1).start, size), high(1).start, FILLED),
            Request("UFFDIO_WRITEPROTECT", lambda: uffd.writeprotect(high(0)), high(0).start, uapi.PM_UFFD_WP),
            Request("UFFDIO_ZEROPAGE at the old place", lambda: uffd.zeropage(old(2)), old(2).start, FILLED),
        ]
        return area.range, requests

    expect_refused(uffd, prepare)


@uffd_case(
    "continue-behind-move",
    mem=(SHMEM,),
    features=REMAP | Feature.MINOR_SHMEM,
    pages=4,
    rows=("EV-04", "CT-22"),
    kind=Kind.DETAIL,
)
def test_continue_behind_move(ctx: Context) -> None:
    """The same for UFFDIO_CONTINUE, and for shared memory."""
    uffd = ctx.uffd

    def prepare() -> tuple[Range, list[Request]]:
        area, other = ctx.allocate(4), ctx.allocate(4)
        for one in area, other:
            one.pattern.fill(one.alias.start, 0, 2)
            uffd.register(one.range, MISSING | MINOR)
        new, old = other.page, area.page
        requests = [
            Request("UFFDIO_CONTINUE", lambda: uffd.continue_(new(0)), new(0).start, FILLED),
            Request("UFFDIO_CONTINUE at the old place", lambda: uffd.continue_(old(1)), old(1).start, FILLED),
            Request("UFFDIO_ZEROPAGE at the old place", lambda: uffd.zeropage(old(3)), old(3).start, FILLED),
        ]
        return area.range, requests

    expect_refused(uffd, prepare)


@uffd_case(
    "move-behind-neighbour",
    mem=(ANON,),
    features=REMAP | Feature.MOVE,
    pages=1,
    rows=("EV-04", "MV-26"),
    kind=Kind.DETAIL,
)
def test_move_behind_neighbour(ctx: Context) -> None:
    """UFFDIO_MOVE whose source becomes part of the destination's mapping while it waits says EAGAIN, and works later.

    What is moved there replaces the source and what is being filled. The kernel must not lock one mapping twice.
    """
    uffd = ctx.uffd

    def refused() -> bool:
        area, new = ctx.allocate(LONG_FILL + 3), ctx.allocate(LONG_FILL + 1)
        for one in area.range, new.range:
            keep_small(one)
        dst, src = area.page(0, 2), area.page(2)
        for page in dst.start, src.start:
            poke(page, b"there")
        for one in dst, new.range:
            uffd.register(one, MISSING)
        to = Range(src.start, new.range.len)
        request = Request("UFFDIO_MOVE", lambda: uffd.move(area.page(1).start, src.start, PAGE_SIZE), 0, FILLED)
        with (
            poised(request.refused) as (go, [waiter]),
            long_fill(uffd, area.page(3, LONG_FILL)),
            Waiter(lambda: remap(new.range, to=to.start)) as moving,
        ):
            settle(moving)
            go()
            waiter.result()
            expect(uffd.wait("UFFD_EVENT_REMAP"), moved(new.range, to.start), "the event")
        expect_modes(area.range, MISSING)
        uffd.zeropage(src)
        if waiter.result():
            request.call()
        return bool(waiter.result())

    if not any(refused() for _ in range(TRIES)):
        raise AssertionError("EV-04: behind a move expected EAGAIN; UFFDIO_MOVE did what was asked")
