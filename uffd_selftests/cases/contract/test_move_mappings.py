# SPDX-License-Identifier: GPL-2.0-only
"""The two mappings of UFFDIO_MOVE: each there and in one piece, both anonymous, alike in what they allow."""

from __future__ import annotations

from contextlib import closing
from errno import EINVAL, ENOENT

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ANON, HOLES, HUGETLB, HUGETLB_PRIVATE, LONG_FILL, MISSING, MOVE, PAGE_SIZE, PROT_EXEC, PROT_READ, PROT_WRITE, SHMEM,
    SHMEM_PRIVATE, Advice, Area, Context, KernelError, MoveMode, Pagemap, Skip, Uffd, UffdError, Waiter, advise,
    errno_name, expect_errno, expect_moved, fails, faulting, keep_small, long_fill, move, poised, poke, prepare,
    promise, protect, refuses, settle, syscalls, unmap,
)  # fmt: skip

READ_WRITE = PROT_READ | PROT_WRITE


# ---- where it moves from and to ------------------------------------------------------------------------------------


@uffd_case("move-unmapped", mem=(ANON,), features=MOVE, pages=4, rows=("MV-06",))
def test_move_unmapped(ctx: Context) -> None:
    """UFFDIO_MOVE says ENOENT where the source or the destination is not mapped at all."""
    prepare(ctx)
    unmap(ctx.src.page(1))
    unmap(ctx.dst.page(2))
    for page, what in enumerate(("source", "destination"), 1):
        for mode in (MoveMode(0), HOLES):
            with promise("MV-06", f"{what}, {mode}"), refuses(ENOENT):
                move(ctx, page, mode=mode)
    ctx.src.expect_pattern_of(ctx.src, 2, 2)


@uffd_case("move-from-nowhere", mem=(ANON, SHMEM), features=MOVE, pages=3, rows=("MV-06", "MV-11"))
def test_move_from_nowhere(ctx: Context) -> None:
    """From where nothing is mapped, below or above, UFFDIO_MOVE says ENOENT; into shared memory EINVAL will do."""
    dst = ctx.dst.page(1)
    unmap(ctx.dst.page(0))
    unmap(ctx.dst.page(2))
    ctx.uffd.register(dst, MISSING)
    refused = [ENOENT, EINVAL] if ctx.mem.shared else [ENOENT]
    for what, src in ("below", dst.start - ctx.page_size), ("above", dst.end):
        for mode in (MoveMode(0), HOLES):
            with promise("MV-06", f"from {what}, {mode}"), fails(*refused):
                ctx.uffd.move(dst.start, src, ctx.page_size, mode)
    Pagemap.expect_present(ctx.dst)


@uffd_case("move-vanished", mem=(ANON,), features=MOVE, pages=1, rows=("MV-06",), kind=Kind.DETAIL)
def test_move_vanished(ctx: Context) -> None:
    """UFFDIO_MOVE says ENOENT, too, where both mappings go away while it waits for the address space.

    Three mappings in a row are unmapped, source first; then it takes until a fill of the one between is over.
    """
    area, uffd = ctx.allocate(LONG_FILL + 3), ctx.uffd
    src, between, dst = area.page(0), area.page(1, LONG_FILL), area.page(1 + LONG_FILL, 2)
    keep_small(area.range)
    for page in src.start, dst.start:
        poke(page, b"there")
    uffd.register(dst, MISSING)
    advise(dst, Advice.DONTDUMP)  # now it differs from what is between, as the source does, which is not registered

    def move_late() -> None:
        try:
            uffd.move(dst.start + PAGE_SIZE, src.start, PAGE_SIZE)
        except UffdError as error:  # none if it came before after all
            expect_errno(error, ENOENT, "errno of the move")

    with (
        poised(move_late) as (go, _),
        long_fill(uffd, between),
        Waiter(lambda: unmap(area.range)) as unmapping,
    ):
        settle(unmapping)
        go()


@uffd_case("move-not-registered", mem=(ANON,), features=MOVE, pages=2, rows=("MV-07",))
def test_move_not_registered(ctx: Context) -> None:
    """UFFDIO_MOVE wants a destination that is registered, and with this very handle."""
    ctx.src.fill()
    with promise("MV-07", "not registered"), refuses(EINVAL):
        move(ctx, 0)
    with Uffd.open() as other:
        other.register(ctx.dst.range, MISSING)
        with faulting(other, ctx.dst.start):
            with promise("MV-07", "registered with another handle"), refuses(EINVAL):
                move(ctx, 0)
            other.expect_still_asleep(1)
            expect_moved(ctx)
            other.zeropage(ctx.dst.page(0))


@uffd_case("move-past-the-end", mem=(ANON,), features=MOVE, pages=4, rows=("MV-08",))
def test_move_past_the_end(ctx: Context) -> None:
    """UFFDIO_MOVE wants all of its source in one mapping and all of its destination in one registered mapping."""
    ctx.src.fill()
    size = ctx.page_size
    ctx.uffd.register(ctx.dst.page(1, 3), MISSING)
    with promise("MV-08", "past the destination"), refuses(EINVAL):
        ctx.uffd.move(ctx.dst.page(3).start, ctx.src.start, 2 * size)
    with promise("MV-08", "past the source"), refuses(EINVAL):
        ctx.uffd.move(ctx.dst.page(1).start, ctx.src.page(3).start, 2 * size)
    ctx.uffd.unregister(ctx.dst.page(3))
    with promise("MV-08", "past the registered pages"), refuses(EINVAL):
        ctx.uffd.move(ctx.dst.page(2).start, ctx.src.start, 2 * size)
    with promise("MV-08", "before the registered pages"), refuses(EINVAL):
        ctx.uffd.move(ctx.dst.page(0).start, ctx.src.start, 2 * size)
    expect_moved(ctx)
    ctx.uffd.move(ctx.dst.page(1).start, ctx.src.page(1).start, 2 * size)
    expect_moved(ctx, 1, 2)


# ---- what the mappings are -----------------------------------------------------------------------------------------


def lock(area: Area) -> None:
    """Lock what is or comes into an area (MLOCK_ONFAULT); Skip where RLIMIT_MEMLOCK forbids it."""
    try:
        syscalls.call("mlock2", area.start, area.range.len, 1)
    except KernelError as error:
        raise Skip(f"mlock2(2): {errno_name(error.errno or 0)}: raise RLIMIT_MEMLOCK (ulimit -l)") from None


def unlock(area: Area) -> None:
    """Undo lock()."""
    syscalls.call("munlock", area.start, area.range.len)


@uffd_case("move-protections", mem=(ANON,), features=MOVE, pages=2, rows=("MV-09",))
def test_move_protections(ctx: Context) -> None:
    """UFFDIO_MOVE wants both mappings writable and with the same protection."""
    prepare(ctx)
    for what, src, dst in (
        ("source read-only", PROT_READ, READ_WRITE),
        ("destination read-only", READ_WRITE, PROT_READ),
        ("both read-only", PROT_READ, PROT_READ),
        ("source PROT_NONE", 0, READ_WRITE),
    ):
        protect(ctx.src.range, src)
        protect(ctx.dst.range, dst)
        with promise("MV-09", what), refuses(EINVAL):
            move(ctx, 0)
    for area in (ctx.src, ctx.dst):
        protect(area.range, READ_WRITE)
    expect_moved(ctx)
    move(ctx, 0)


@uffd_case("move-protection-keys", mem=(ANON,), features=MOVE, pages=2, rows=("MV-09",), kind=Kind.DETAIL)
def test_move_protection_keys(ctx: Context) -> None:
    """UFFDIO_MOVE wants both mappings to have the same protection key, too: it would let a page out of its domain."""
    prepare(ctx)
    try:
        key = syscalls.call("pkey_alloc", 0, 0)
    except KernelError as error:
        raise Skip(f"no protection keys: {errno_name(error.errno or 0)}: a processor and a kernel with them") from None
    for what, area in ("source", ctx.src), ("destination", ctx.dst):
        syscalls.call("pkey_mprotect", area.start, area.range.len, READ_WRITE, key)
        if area is ctx.src:
            with promise("MV-09", f"only the {what} with a key"), refuses(EINVAL):
                move(ctx, 0)
            expect_moved(ctx)
    with promise("MV-09", "both with the same key"):
        move(ctx, 0)
        expect_moved(ctx, 0)


@uffd_case("move-locked", mem=(ANON,), features=MOVE, pages=2, rows=("MV-09", "MV-10"))
def test_move_locked(ctx: Context) -> None:
    """UFFDIO_MOVE wants both mappings locked into memory, or none."""
    prepare(ctx)
    for what, area in (("source", ctx.src), ("destination", ctx.dst)):
        lock(area)
        with promise("MV-09", f"{what} locked"), refuses(EINVAL):
            move(ctx, 0)
        unlock(area)
    lock(ctx.src)
    lock(ctx.dst)
    with promise("MV-10", "both locked"):
        move(ctx, 0)
        expect_moved(ctx, 0)


@uffd_case("move-executable", mem=(ANON,), features=MOVE, pages=2, rows=("MV-09", "MV-10"), kind=Kind.DETAIL)
def test_move_executable(ctx: Context) -> None:
    """UFFDIO_MOVE wants both mappings executable, or none."""
    prepare(ctx)
    try:
        protect(ctx.src.range, READ_WRITE | PROT_EXEC)
    except KernelError as error:
        raise Skip(f"{error}: the security policy forbids memory that is writable and executable") from None
    with promise("MV-09", "only the source executable"), refuses(EINVAL):
        move(ctx, 0)
    protect(ctx.dst.range, READ_WRITE | PROT_EXEC)
    with promise("MV-10", "both executable"):
        move(ctx, 0)
        expect_moved(ctx, 0)


@uffd_case("move-file", mem=(SHMEM, SHMEM_PRIVATE, HUGETLB, HUGETLB_PRIVATE), features=MOVE, pages=2, rows=("MV-11",))
def test_move_file(ctx: Context) -> None:
    """UFFDIO_MOVE moves anonymous memory only, into anonymous memory only."""
    size = ctx.page_size
    with closing(ANON.allocate(size // PAGE_SIZE)) as anon, closing(ANON.allocate(size // PAGE_SIZE)) as other:
        anon.fill()
        other.fill()
        ctx.src.fill()
        ctx.uffd.register(ctx.dst.range, MISSING)
        with promise("MV-11", "destination"), refuses(EINVAL):
            ctx.uffd.move(ctx.dst.start, anon.start, size)
        with promise("MV-11", "both"), refuses(EINVAL):
            ctx.uffd.move(ctx.dst.start, ctx.src.start, size)
        anon.expect_pattern_of(anon)
        advise(anon.range, Advice.DONTNEED)
        ctx.uffd.register(anon.range, MISSING)
        with promise("MV-11", "source"), refuses(EINVAL):
            ctx.uffd.move(anon.start, ctx.src.start, size)
        Pagemap.expect_present(anon)
        Pagemap.expect_present(ctx.dst)
        ctx.src.expect_pattern_of(ctx.src)
        with promise("MV-11", "neither"):
            ctx.uffd.move(anon.start, other.start, size)
            anon.expect_pattern_of(other)
            Pagemap.expect_present(other)
