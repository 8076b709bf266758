# SPDX-License-Identifier: GPL-2.0-only
"""Requests for which the kernel finds no memory: ENOMEM, nothing done, and nothing in the way of another try."""

from __future__ import annotations

import os

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, AGAINST_WRITES, ANON, DEFAULT_FLAGS, HUGETLB, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE,
    MAP_PRIVATE, MAP_SHARED, MINOR, MINOR_FAULTS, MISSING, PAGE_SIZE, PROT_NONE, PROT_READ, PROT_WRITE, SHMEM,
    SYNC_RWP, UNTOUCHED, WP, WRITEPROTECT, Context, Feature, KernelError, MoveMode, Pagemap, Protection, Range,
    Request, Skip, Uffd, checked, expect, expect_refused, in_modes, keep_small, lib, map_memory, pmd_size, poke,
    remap, syscalls, touch, uapi,
)  # fmt: skip

READ_WRITE = PROT_READ | PROT_WRITE
DIRECTORY = pmd_size() * (PAGE_SIZE // 8)
"""What a middle directory maps; a page table maps pmd_size()."""


MOST_HANDLES = 500
"""So many have room in the memory that a processor charges beforehand, and more."""


class Wilderness:
    """Address space without page tables, in which each place that it gives is far from all others."""

    def __init__(self, places: int) -> None:
        length = (2 * places + 1) * DIRECTORY
        try:
            start = map_memory(length, prot=PROT_NONE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
        except KernelError as error:
            raise Skip(f"{length >> 20} MiB of address space: {error}") from None
        self._next = start + -start % DIRECTORY

    def place(self, fd: int = -1, *, length: int = PAGE_SIZE, directory: bool = False, used: bool = True) -> Range:
        """Return a place without a page table or, unless there is to be one, even without a middle directory.

        It is the end of an anonymous mapping that is in use at its start, if ``used``, or the start of a file.
        """
        start, self._next = self._next, self._next + 2 * DIRECTORY
        there = start + (pmd_size() if directory else DIRECTORY)
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        around = Range(start, there + length - start)
        map_memory(around.len, at=start, flags=flags)
        keep_small(around)
        poke(start, b"x")
        if fd >= 0:
            map_memory(length, at=there, flags=MAP_SHARED | MAP_FIXED, fd=fd)
        elif not used:
            map_memory(length, at=there, flags=flags)
        return Range(there, length)


def copy(uffd: Uffd, where: Range, src: int, what: str) -> Request:
    """UFFDIO_COPY, as a request to come."""
    arg = uapi.uffdio_copy(where.start, src, where.len, 0, UNTOUCHED)
    return Request(f"UFFDIO_COPY {what}", uffd, uapi.UFFDIO_COPY, arg)


def zeropage(uffd: Uffd, where: Range, what: str) -> Request:
    """UFFDIO_ZEROPAGE."""
    arg = uapi.uffdio_zeropage(uapi.uffdio_range(where.start, where.len), 0, UNTOUCHED)
    return Request(f"UFFDIO_ZEROPAGE {what}", uffd, uapi.UFFDIO_ZEROPAGE, arg)


def poison(uffd: Uffd, where: Range, what: str) -> Request:
    """UFFDIO_POISON."""
    arg = uapi.uffdio_poison(uapi.uffdio_range(where.start, where.len), 0, UNTOUCHED)
    return Request(f"UFFDIO_POISON {what}", uffd, uapi.UFFDIO_POISON, arg)


def continue_(uffd: Uffd, where: Range, what: str) -> Request:
    """UFFDIO_CONTINUE."""
    arg = uapi.uffdio_continue(uapi.uffdio_range(where.start, where.len), 0, UNTOUCHED)
    return Request(f"UFFDIO_CONTINUE {what}", uffd, uapi.UFFDIO_CONTINUE, arg)


TABLES = {"where there is no page table": True, "where there is no middle directory": False}


@uffd_case("copy-no-memory", mem=(ANON, SHMEM), features=Feature.MINOR_SHMEM, pages=2, rows=("NM-01",))
def test_copy_no_memory(ctx: Context) -> None:
    """UFFDIO_COPY says ENOMEM when the process may have no more memory, and fills the page when it may."""

    def prepare() -> list[Request]:
        ctx.src.fill()
        ctx.dst.release()
        poke(ctx.dst.page(1).start, b"x")
        uffd = Uffd.open()
        uffd.register(ctx.dst.range, MISSING)
        return [copy(uffd, ctx.dst.page(0), ctx.src.start, "where there is a page table")]

    expect_refused(prepare, ctx.dst.range)


@uffd_case(
    "fills-no-table",
    mem=(ANON,),
    features=Feature.MINOR_SHMEM | Feature.POISON,
    pages=1,
    rows=("NM-02",),
    kind=Kind.DETAIL,
)
def test_fills_no_table(ctx: Context) -> None:
    """A request that fills a page says ENOMEM when there is no memory for the page table, and fills it later."""

    def prepare() -> list[Request]:
        ctx.src.fill()
        uffd = Uffd.open(Feature.MINOR_SHMEM)
        wilderness = Wilderness(9)
        fd = os.memfd_create("cached")
        os.write(fd, bytes(PAGE_SIZE))
        fresh = wilderness.place(used=False)
        uffd.register(fresh, MISSING)
        requests = [zeropage(uffd, fresh, "in a mapping that was never used")]
        for what, directory in TABLES.items():
            one, two, three = (wilderness.place(directory=directory) for _ in range(3))
            cached = wilderness.place(fd, directory=directory)
            for where in one, two, three:
                uffd.register(where, MISSING)
            uffd.register(cached, MINOR)
            requests += [
                copy(uffd, one, ctx.src.start, what),
                zeropage(uffd, two, what),
                poison(uffd, three, what),
                continue_(uffd, cached, what),
            ]
        return requests

    expect_refused(prepare, ctx.dst.range)


@uffd_case(
    "fills-no-table-huge",
    mem=(HUGETLB,),
    features=MINOR_FAULTS | Feature.POISON,
    pages=2,
    rows=("NM-02",),
    kind=Kind.DETAIL,
)
def test_fills_no_table_huge(ctx: Context) -> None:
    """The same with huge pages."""
    fd = ctx.dst.fd
    assert fd is not None

    def prepare() -> list[Request]:
        ctx.dst.release()
        poke(ctx.dst.start, b"x")
        uffd = Uffd.open(MINOR_FAULTS)
        wilderness = Wilderness(3)
        what = "where there is no middle directory"
        requests = []
        for make in continue_, poison:
            where = wilderness.place(fd, length=ctx.page_size)
            uffd.register(where, MINOR)
            requests.append(make(uffd, where, what))
        where = wilderness.place(fd, length=2 * ctx.page_size)
        uffd.register(where, MISSING)
        page = Range(where.start + ctx.page_size, ctx.page_size)
        return [*requests, copy(uffd, page, ctx.dst.start, what)]

    expect_refused(prepare, ctx.dst.range)


@uffd_case(
    "move-no-table",
    mem=(ANON,),
    features=Feature.MINOR_SHMEM | Feature.MOVE,
    pages=4,
    rows=("NM-03",),
    kind=Kind.DETAIL,
)
def test_move_no_table(ctx: Context) -> None:
    """UFFDIO_MOVE says ENOMEM when there is no memory for a page table of either range, and moves the page later."""

    def prepare() -> list[Request]:
        ctx.src.fill()
        poke(ctx.dst.page(3).start, b"x")
        uffd = Uffd.open(Feature.MINOR_SHMEM)
        uffd.register(ctx.dst.range, MISSING)
        wilderness = Wilderness(4)
        requests = []
        for page, (what, directory) in enumerate(TABLES.items()):
            dst, src = (wilderness.place(directory=directory) for _ in range(2))
            uffd.register(dst, MISSING)
            move = uapi.uffdio_move(dst.start, ctx.src.page(page).start, PAGE_SIZE, 0, UNTOUCHED)
            requests.append(Request(f"UFFDIO_MOVE to {what}", uffd, uapi.UFFDIO_MOVE, move))
            hole = uapi.uffdio_move(
                ctx.dst.page(page).start, src.start, PAGE_SIZE, MoveMode.ALLOW_SRC_HOLES, UNTOUCHED
            )
            requests.append(Request(f"UFFDIO_MOVE of a hole from {what}", uffd, uapi.UFFDIO_MOVE, hole))
        return requests

    expect_refused(prepare, ctx.dst.range)


@uffd_case(
    "writeprotect-no-table",
    mem=(SHMEM,),
    features=Feature.MINOR_SHMEM | Feature.WP_HUGETLBFS_SHMEM,
    pages=1,
    rows=("NM-04",),
    bugs=(57,),
    kind=Kind.DETAIL,
)
def test_writeprotect_no_table(ctx: Context) -> None:
    """UFFDIO_WRITEPROTECT of a page that is not there says ENOMEM when there is no memory to note it."""
    fd = ctx.dst.fd
    assert fd is not None

    def prepare() -> list[Request]:
        uffd = Uffd.open(Feature.MINOR_SHMEM | Feature.WP_HUGETLBFS_SHMEM)
        wilderness = Wilderness(2)
        requests = []
        for what, directory in TABLES.items():
            where = wilderness.place(fd, directory=directory)
            uffd.register(where, WP)
            arg = uapi.uffdio_writeprotect(uapi.uffdio_range(where.start, where.len), uapi.WriteprotectMode.WP)
            requests.append(Request(f"UFFDIO_WRITEPROTECT {what}", uffd, uapi.UFFDIO_WRITEPROTECT, arg))
        return requests

    expect_refused(prepare, ctx.dst.range)


@uffd_case(
    "creation-no-memory", mem=(ANON,), features=Feature.MINOR_SHMEM, needs=("syscall",), pages=1, rows=("CR-13",)
)
def test_creation_no_memory(ctx: Context) -> None:
    """userfaultfd(2) says ENOMEM when the process may have no more memory."""
    made = [-1] * MOST_HANDLES
    userfaultfd = syscalls.number("userfaultfd")

    def create() -> None:
        for number in range(MOST_HANDLES):
            made[number] = lib.uffd_syscall(userfaultfd, DEFAULT_FLAGS, 0, 0, 0, 0, 0)
            if made[number] < 0:
                break
        last = made[number]
        for fd in made[: number + (last >= 0)]:
            os.close(fd)
        checked(last, "userfaultfd(2)")

    def prepare() -> list[Request]:
        uffd = Uffd.open(Feature.MINOR_SHMEM)
        arg = uapi.uffdio_range(ctx.dst.start, PAGE_SIZE)
        return [Request("userfaultfd(2)", uffd, uapi.UFFDIO_WAKE, arg, create)]

    expect_refused(prepare, ctx.dst.range)


# ---- an mremap that has to give up ---------------------------------------------------------------------------------


def check_given_up(ctx: Context, guard: Protection) -> None:
    """Move four pages to where the last two find no page table, and look at what has come back."""
    table = pmd_size() // PAGE_SIZE
    pages = range(table - 2, table + 2)

    def prepare() -> list[Request]:
        uffd = Uffd.open(ctx.features)
        area, place = ANON.allocate(2 * table), ANON.allocate(2 * table)
        here, there = (each.page(pages[0], len(pages)) for each in (area, place))
        gave_up = False
        for each in (area, place):
            keep_small(each.range)
        touch(here, PAGE_SIZE, write=True)
        poke(place.page(pages[0] - 1).start, b"x")  # the first two have a page table there

        def watch() -> None:
            uffd.register(here, guard.mode)
            guard.set(uffd, area, pages)

        def move() -> None:
            nonlocal gave_up
            if gave_up:  # there is memory again
                expect(in_modes(here), guard.mode, "modes of the mapping that could not be moved")
                Pagemap.expect_protected(area, pages, "after the move was given up")
            try:
                remap(here, to=there.start)
            except KernelError:
                gave_up = True
                raise
            remap(there, to=here.start)
            watch()

        watch()
        arg = uapi.uffdio_range(here.start, PAGE_SIZE)
        return [Request("mremap(2)", uffd, uapi.UFFDIO_WAKE, arg, move)]

    expect_refused(prepare, ctx.dst.range)


@uffd_case(
    "remap-given-up-writeprotected", mem=(ANON,), features=WRITEPROTECT | MINOR_FAULTS, pages=1, rows=("WP-40",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_remap_given_up_writeprotected(ctx: Context) -> None:
    """An mremap(2) that finds no memory leaves the mapping where it is, registered, and its pages protected."""
    check_given_up(ctx, AGAINST_WRITES)


@uffd_case(
    "remap-given-up-rwprotected", mem=(ANON,), features=SYNC_RWP | MINOR_FAULTS, pages=1, rows=("WP-40",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_remap_given_up_rwprotected(ctx: Context) -> None:
    """The same of pages that are protected against access."""
    check_given_up(ctx, AGAINST_ACCESS)
