# SPDX-License-Identifier: GPL-2.0-only
"""Requests that wait for the address space while mremap(2) has it: they find an event unread when they get it.

A mapping of many pages is moved one by one, for source and destination lie differently to their page tables. All that
time the move holds the lock of the address space, and only then it announces itself.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EAGAIN

from uffd_selftests import syscalls, uapi
from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import MINOR, MISSING, WP, Context, Pagemap, Uffd, expect
from uffd_selftests.events import REMAP, moved
from uffd_selftests.mem_types import ANON, pmd_size
from uffd_selftests.memory import (
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE_SIZE,
    PROT_NONE,
    Advice,
    Range,
    advise,
    mapped,
    peek,
    poke,
    touch,
    unmap,
)
from uffd_selftests.native import lib
from uffd_selftests.races import SUCCESS, Race, Racer, copier, mover, protector, zeroer
from uffd_selftests.uapi import PM_PRESENT, PM_SWAP, Feature

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
        with suppress(OSError):  # without transparent huge pages
            advise(big, Advice.NOHUGEPAGE)
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


def expect_first(where: Range, done: int, what: str) -> None:
    """Assert that of the places just the first ones have a page, or what UFFDIO_POISON leaves in its place."""
    there = [bool(entry & (PM_PRESENT | PM_SWAP)) for entry in Pagemap.entries(where)[::2]]
    expect(there.count(True), done, f"pages {what}, after as many requests as succeeded")
    expect(all(there[:done]), True, "they are the first ones")


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
        expect_first(where, done, f"of UFFDIO_{variant.upper()}")


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
        expect_first(where, done, "of UFFDIO_CONTINUE")
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
    marks = [bool(entry & uapi.PM_UFFD_WP) for entry in Pagemap.entries(ctx.dst.range)]
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
        there = [bool(entry & (PM_PRESENT | PM_SWAP)) for entry in Pagemap.entries(Range(to, count * PAGE_SIZE))]
        expect(there, [page >= done for page in range(count)], f"pages at the new place, after {done} moves")
        for page in range(count):
            at = ctx.dst.page(page).start if page < done else to + page * PAGE_SIZE
            expect(int.from_bytes(peek(at, 4), "little"), page, f"contents of page {page}")
