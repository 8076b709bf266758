# SPDX-License-Identifier: GPL-2.0-only
"""Bugs that broken kernels show in a race (docs/regressions.md): each with as much work as fits into a moment."""

from __future__ import annotations

import os
from dataclasses import replace
from errno import EAGAIN, EBADF, EBUSY, EEXIST, ENOENT, ESRCH

from uffd_selftests.case import Defect, uffd_case
from uffd_selftests.common import (
    ANON, ASYNC, COMPANION, HUGETLB, HUGETLB_PRIVATE, KERNEL_FAULTS, MISSING, NOT_HUGETLB, PAGE_SIZE, RESTART, SHMEM,
    SUCCESS, UNREGISTERED, WP, WRITEPROTECT, Advice, Area, Channel, Child, Context, Feature, Outcomes, PageCategory,
    Pagemap, Race, Racer, Uffd, UffdError, advise, adviser, copier, eventually, expect, expect_modes, huge_area, lib,
    mended, migrator, mover, page_out, peek, pmd_size, protector, require_collapse, run_race, small_area,
    stored_bytes, syscalls, toucher, undisturbed, vm_reader, waker, zeroer,
)  # fmt: skip


# ---- write protection ----------------------------------------------------------------------------------------------


@uffd_case(
    "unprotect-against-swap",
    mem=NOT_HUGETLB,
    features=WRITEPROTECT,
    needs=("swap",),
    pages=16,
    rows=("WP-09", "WP-23"),
    bugs=(5,),
    smp=True,
)
def test_unprotect_against_swap(ctx: Context) -> None:
    """Writers to pages that are protected, un-protected and swapped out all the time always go on.

    Before "userfaultfd: gate must_wait writability check on pte_present()" a writer that found its page swapped out
    took it for protected, and slept with nobody left to wake it.
    """
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    page_out(ctx.dst.range, lambda: True)
    with ctx.handler():
        writes, backwards, *_ = run_race(
            toucher(ctx.dst.range, PAGE_SIZE, write=True, rounds=50),
            toucher(ctx.dst.range, PAGE_SIZE, write=True, rounds=50, backwards=True),
            protector(ctx.uffd, ctx.dst.range, PAGE_SIZE, rounds=50),
            adviser(ctx.dst.range, ctx.dst.range.len, Advice.PAGEOUT, rounds=COMPANION),
        )
    for touches in writes, backwards:
        touches.expect_only(SUCCESS)
    ctx.uffd.expect_asleep(0)
    ctx.dst.expect_pattern_of(ctx.dst)


@uffd_case(
    "protect-against-collapse",
    mem=(ANON,),
    features=WRITEPROTECT,
    needs=("thp",),
    pages=1,
    rows=("WP-26",),
    bugs=(30,),
    smp=True,
)
def test_protect_against_collapse(ctx: Context) -> None:
    """A page stays protected while the kernel makes huge pages of its neighbourhood, from the moment on that it is.

    Before "mm/khugepaged: check again on anon uffd-wp during isolation" a page that was protected in the midst of it
    lost its protection, and the next write was missed.
    """
    require_collapse(ctx)
    area = small_area(ctx)
    ctx.uffd.register(area.range, WP)
    advise(area.range, Advice.HUGEPAGE)
    collapser = adviser(area.range, area.range.len, Advice.COLLAPSE, rounds=COMPANION)
    with Race(collapser):
        for turn in range(100):
            page = turn * 37 % area.nr_pages
            ctx.uffd.writeprotect(area.page(page))
            for _ in range(2):
                Pagemap.expect_protected(area, (page,), f"turn {turn}")
            ctx.uffd.unprotect(area.page(page))
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area, write_back=True))


@uffd_case(
    "protect-against-exit",
    mem=(ANON, SHMEM),
    features=WRITEPROTECT,
    pages=512,
    rows=("WP-31", "PR-02"),
    bugs=(26,),
    smp=True,
)
def test_protect_against_exit(ctx: Context) -> None:
    """A monitor that changes the protection of a process which exits is told ENOENT or ESRCH, and harms nobody.

    Before "userfaultfd: fix a race between writeprotect and exit_mmap()" it worked on page tables that were freed.
    """

    def target(channel: Channel) -> None:
        uffd = Uffd.open(WRITEPROTECT)
        ctx.dst.fill()
        uffd.register(ctx.dst.range, WP)
        channel.send(None, uffd.fd)
        channel.receive()

    for _ in range(8):
        with Child(target) as child:
            _, (fd,) = child.receive_fds()
            with Uffd(fd) as uffd:
                # One thread: two would keep the memory alive, for one is always in the midst of a call.
                on = protector(uffd, ctx.dst.range, ctx.dst.range.len, rounds=COMPANION)
                on_and_off = replace(on, strides=(0, 0, -1), count=2)
                with Race(on_and_off) as race:
                    race.reached(0, 10)
                    child.send()
                    child.wait()
                    race.reached(0, race.outcomes[0].total() + 10)
                (calls,) = race.outcomes
                calls.expect_only(SUCCESS, ENOENT, ESRCH)
                expect(calls[ESRCH] > 0, True, "ESRCH when the process has gone")


@uffd_case(
    "scan-against-writers",
    mem=(SHMEM, HUGETLB, HUGETLB_PRIVATE),
    features=ASYNC,
    needs=("pagemap_scan",),
    pages=12,
    rows=("AS-04",),
    bugs=(35,),
    smp=True,
)
def test_scan_against_writers(ctx: Context) -> None:
    """Who copies what each PAGEMAP_SCAN reports, and protects, has a true copy when the writers rest.

    Before "fix make_uffd_wp_huge_pte() prot-update race" the entry of a huge page that was written at that moment was
    put back as it had been, clean: that write was never reported.
    """
    area = ctx.dst
    area.fill()
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    copy = [peek(area.page(page).start, 8) for page in range(area.nr_pages)]

    def collect() -> None:
        for region in Pagemap.scan(area.range, PageCategory.WRITTEN, flags=RESTART).regions:
            for address in range(region.start, region.end, area.page_size):
                copy[(address - area.start) // area.page_size] = peek(address, 8)

    urandom = os.open("/dev/urandom", os.O_RDONLY | os.O_CLOEXEC)
    write = Racer(
        "read(2) of random bytes", lib.UFFD_RACE_SYSCALL, syscalls.number("read"), (urandom, area.start, 8),
        (0, area.page_size), area.nr_pages, rounds=200,
    )  # fmt: skip
    backwards = replace(write, args=(urandom, area.page(area.nr_pages - 1).start, 8), strides=(0, -area.page_size))
    with Race(write, backwards) as race:
        while not race.run:
            collect()
    collect()
    os.close(urandom)
    for writes in race.outcomes:
        writes.expect_only(SUCCESS)
    stale = [page for page in range(area.nr_pages) if copy[page] != peek(area.page(page).start, 8)]
    expect(stale, [], "pages of which the copy is not true")
    ctx.uffd.expect_no_message()


# ---- close ---------------------------------------------------------------------------------------------------------


@uffd_case(
    "close-against-lookups",
    mem=(ANON, SHMEM),
    needs=("kernel_faults",),
    pages=1024,
    rows=("CL-04",),
    bugs=(24,),
    smp=True,
)
def test_close_against_lookups(ctx: Context) -> None:
    """The last close comes to its end, and system calls that look up missing pages meanwhile do, too.

    Before "mm/userfaultfd: fix release hang over concurrent GUP" such a call went round with the lock that the close
    waits for, for ever and at full speed.
    """
    ctx.src.fill()
    rounds = 16
    for moment in range(rounds):
        with Uffd.open(flags=KERNEL_FAULTS) as uffd:
            uffd.register(ctx.dst.range, MISSING)
            copies = copier(uffd, ctx.dst.range, ctx.src.start, PAGE_SIZE)
            with Race(copies, *(vm_reader(ctx.dst.range, PAGE_SIZE) for _ in range(3))) as race:
                race.reached(0, copies.count * moment // rounds)
                uffd.close()
            copied, *lookups = race.outcomes
            copied.expect_only(SUCCESS, EBADF)
            for calls in lookups:
                calls.expect_only(SUCCESS)
        expect_modes(ctx.dst.range, UNREGISTERED)
        ctx.dst.release()


# ---- huge pages ----------------------------------------------------------------------------------------------------


@uffd_case("copy-against-touch", mem=(HUGETLB,), pages=8, rows=("CP-22", "CP-27"), bugs=(9, 12), smp=True)
def test_copy_against_touch(ctx: Context) -> None:
    """A huge page that is copied here and touched through another mapping at the same time is in the file once.

    Before "fix hugetlb fault mutex hash calculation" the two did not exclude each other, and before "fix racy
    resv_huge_pages underflow on UFFDIO_COPY" the loser gave back a reservation that it did not have.
    """
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING)
    for _ in range(5):
        copies, touches = run_race(
            copier(ctx.uffd, ctx.dst.range, ctx.src.start, ctx.page_size),
            toucher(ctx.dst.alias, ctx.page_size, write=True),
        )
        copies.expect_only(SUCCESS, EEXIST)
        touches.expect_only(SUCCESS)
        copied = [page for page in range(ctx.nr_pages) if any(peek(ctx.dst.alias_page(page).start, 8))]
        expect(len(copied), copies[SUCCESS], "pages that hold data, for as many copies that succeeded")
        for page in copied:
            ctx.src.pattern.verify(ctx.dst.alias.start, page, 1, what="copied page")
        expect(stored_bytes(ctx.dst.fd or -1), ctx.dst.range.len, "bytes stored in the file")
        ctx.dst.release()
        expect(stored_bytes(ctx.dst.fd or -1), 0, "bytes stored in the file when it is empty")


# ---- transparent huge pages ----------------------------------------------------------------------------------------


@uffd_case(
    "copy-against-collapse",
    mem=(ANON, SHMEM),
    needs=("thp",),
    pages=1,
    rows=("CP-39", "TH-02"),
    bugs=(29,),
    smp=True,
)
def test_copy_against_collapse(ctx: Context) -> None:
    """Fills that meet the kernel at work on a huge page there are done, or EEXIST: each page is data or zeroes.

    Before "userfaultfd: don't BUG_ON() if khugepaged yanks our page table" the kernel crashed, before "fix checks for
    huge PMDs" it wrote into the huge page as if that were a page table.
    """
    require_collapse(ctx)
    source = small_area(ctx)
    for _ in range(4):
        area = ctx.allocate(pmd_size() // PAGE_SIZE)
        where = area.alias if ctx.mem.shared else area.range
        ctx.uffd.register(area.range, MISSING)
        ctx.uffd.copy(area.start, source.start, area.range.len - 8 * PAGE_SIZE)  # a few holes keep a huge page away
        copies, zeroes, *_ = run_race(
            copier(ctx.uffd, area.range, source.start, PAGE_SIZE, backwards=True, rounds=4),
            zeroer(ctx.uffd, area.range, PAGE_SIZE, backwards=True),
            adviser(area.page(100), PAGE_SIZE, Advice.DONTNEED, rounds=100),
            adviser(where, where.len, Advice.COLLAPSE, rounds=COMPANION),
        )
        for fills in copies, zeroes:
            fills.expect_only(SUCCESS, EEXIST, EAGAIN)
        ctx.uffd.release(area.range)
        for page in range(area.nr_pages):
            if any(peek(area.page(page).start, 8)):
                area.expect_pattern_of(source, page, 1)
            else:
                area.expect_zero(page, 1)


PIECES = 6
"""Threads that move pieces of one huge page."""


def move_pieces(ctx: Context, count: int) -> tuple[Area, Area, list[Outcomes]]:
    """Have threads move every sixth page each of a huge page, ``count`` pages; return source, destination, outcomes."""
    src, dst = huge_area(ctx), ctx.allocate(pmd_size() // PAGE_SIZE)
    advise(src.range, Advice.NOHUGEPAGE)  # else khugepaged may make a huge page of what is left there
    ctx.uffd.register(dst.range, MISSING)
    step = PIECES * PAGE_SIZE
    movers = [
        mover(
            ctx.uffd, dst.page(first).start, src.page(first).start, PAGE_SIZE, count, stride=step, again=(EAGAIN, EBUSY)
        )
        for first in range(PIECES)
    ]
    return src, dst, run_race(*movers)


@uffd_case(
    "move-pieces", mem=(ANON,), features=Feature.MOVE, needs=("thp",), pages=1, rows=("MV-19",), bugs=(41,), smp=True
)
def test_move_pieces(ctx: Context) -> None:
    """Threads that move pieces of one transparent huge page all come to their end, and the pieces arrive.

    Before "userfaultfd: do not block on locking a large folio with raised refcount" they could wait for each other's
    lock for ever. What the calls say is looked at by move-pieces-said.
    """
    count = pmd_size() // PAGE_SIZE // PIECES
    for _ in range(4):
        src, dst, _ = move_pieces(ctx, count)
        dst.expect_pattern_of(src, 0, count * PIECES)
        Pagemap.expect_present(src, *range(count * PIECES, src.nr_pages))


RETRIED = Defect(
    id="D-MV-03",
    summary="UFFDIO_MOVE that had to try again, because the page was just being split or swapped, says EEXIST for a "
    "page that it has then moved itself, and wakes nobody.",
    kernels="6.18.44; not 6.12.117, 7.3.4",
    advice="After EEXIST wake the range, and let pagemap tell whether the source page has gone.",
    shows=r"expected success or EAGAIN or EBUSY; got .* EEXIST",
)


@uffd_case(
    "move-pieces-said",
    mem=(ANON,),
    features=Feature.MOVE,
    needs=("thp",),
    pages=1,
    rows=("MV-03", "MV-19"),
    bugs=(53,),
    defect=RETRIED,
    smp=True,
)
def test_move_pieces_said(ctx: Context) -> None:
    """UFFDIO_MOVE says EEXIST only where a page was in its way, and not for the page that it has moved.

    With the batched moves of Linux 6.18 the kernel forgot, when it tried again and succeeded, that it had failed
    before, and tried once more.
    """
    for _ in range(30):
        _, _, outcomes = move_pieces(ctx, 8)
        with mended(ctx.uffd):
            for moves in outcomes:
                moves.expect_only(SUCCESS, EAGAIN, EBUSY)


def move_whole(uffd: Uffd, dst: int, src: int, length: int) -> None:
    """UFFDIO_MOVE, repeated where it stopped for as long as pages are busy for the moment."""
    done = 0

    def moved() -> bool:
        nonlocal done
        try:
            uffd.move(dst + done, src + done, length - done)
        except UffdError as error:
            if error.errno not in (EAGAIN, EBUSY):
                raise
            done += max(0, error.output or 0)
            return done == length
        return True

    eventually(moved, "UFFDIO_MOVE to move all")


@uffd_case(
    "move-against-migration",
    mem=(ANON,),
    features=Feature.MOVE,
    needs=("thp",),
    pages=1,
    rows=("MV-19",),
    bugs=(39, 40),
    smp=True,
)
def test_move_against_migration(ctx: Context) -> None:
    """A transparent huge page that is moved while the kernel migrates it arrives with all of its bytes.

    Before "userfaultfd: fix a crash in UFFDIO_MOVE when PMD is a migration entry" the kernel took a page that was being
    migrated for one that is there; before "wait on source PMD during UFFDIO_MOVE" it waited for the wrong thing.
    """
    src, dst = huge_area(ctx), ctx.allocate(pmd_size() // PAGE_SIZE)
    for area in src, dst:
        ctx.uffd.register(area.range, MISSING)
    length = src.range.len
    with Race(migrator(src.start, dst.start)):
        for _ in range(100):
            move_whole(ctx.uffd, dst.start, src.start, length)
            move_whole(ctx.uffd, src.start, dst.start, length)
    src.expect_pattern_of(src)
    Pagemap.expect_present(dst)


@uffd_case(
    "move-against-swap",
    mem=(ANON,),
    features=Feature.MOVE,
    needs=("swap",),
    pages=64,
    rows=("MV-23", "MV-01"),
    bugs=(38,),
    smp=True,
)
def test_move_against_swap(ctx: Context) -> None:
    """Pages that are moved while they are swapped out and read back arrive with their own bytes.

    Before "mm: userfaultfd: fix race of userfaultfd_move and swap cache" the one that came back from swap could be
    mapped in the place of another; the kernel reported a bad page map.
    """
    for _ in range(6):
        ctx.src.fill()
        with Uffd.open(Feature.MOVE) as uffd:
            uffd.register(ctx.dst.range, MISSING)
            moves, reads, *_ = run_race(
                mover(uffd, ctx.dst.start, ctx.src.start, PAGE_SIZE, ctx.nr_pages, again=(EAGAIN, EBUSY)),
                toucher(ctx.dst.range, PAGE_SIZE),
                waker(uffd, ctx.dst.range),  # D-MV-03 can leave the reader asleep, with the page there
                adviser(ctx.src.range, ctx.src.range.len, Advice.PAGEOUT, rounds=COMPANION),
                adviser(ctx.dst.range, ctx.dst.range.len, Advice.PAGEOUT, rounds=COMPANION),
            )
            moves.expect_only(SUCCESS, EAGAIN, EBUSY, EEXIST)
            reads.expect_only(SUCCESS)
            ctx.dst.expect_pattern_of(ctx.src)
        ctx.dst.release()
