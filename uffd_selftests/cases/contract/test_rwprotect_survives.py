# SPDX-License-Identifier: GPL-2.0-only
"""What read-write protection survives: migration, advice, soft-dirty tracking; and that it leaves all counts alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from errno import EFAULT, ENOMEM
from functools import partial
from pathlib import Path

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, ALL, ANON, ASYNC_RWP, EACH_HUGETLB, FILLED, HUGETLB, KERNEL_FAULTS, MAP_NORESERVE, MAP_PRIVATE,
    MAP_SHARED, NEW, NOT_HUGETLB, PAGE_SIZE, READ_TRAPPED, RWP, SHMEM, SYNC_RWP, WRITE_TRAPPED, Advice, Area, Channel,
    Child, Context, Feature, PagefaultFlag, Pagemap, Range, Skip, Uffd, advise, eventually, expect, expect_rwp_free,
    expect_rwp_trapped, expect_sweep, fails, faulting, ffi, folios, frames, huge_area, hugepage_file, hugepage_sizes,
    hugepages, mapped, migrate, monitored, outcome, own_memory_group, page_numbers, peek, pmd_mapped, poke, promise,
    require_soft_dirty, resident, rwp_filled, rwp_protected, rwp_trapped, smaps_bytes, syscalls, uapi, undisturbed,
)  # fmt: skip

MCL_CURRENT = 1


# ---- other memory --------------------------------------------------------------------------------------------------


@uffd_case(
    "rwprotect-migrated",
    mem=ALL,
    features=SYNC_RWP,
    needs=("cap_sys_admin",),
    pages=4,
    spare_hugepages=4,
    rows=("RW-36",),
)
def test_rwprotect_migrated(ctx: Context) -> None:
    """Pages that the kernel moves to other memory stay protected, or free, and keep every byte."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    uffd.rwprotect(area.page(1, 2))
    with migrate(area, 1, 3):
        uffd.expect_no_message()
        Pagemap.expect_protected(area, {1, 2}, "after the migration of pages 1 and 3")
        expect_rwp_trapped(uffd, area, 1)
        with rwp_trapped(uffd, area, 2, write=True):
            uffd.resolve(area.page(2))
        expect_rwp_free(uffd, area, 0, 3)
        Pagemap.expect_protected(area, (), "at the end")
        area.expect_pattern_of(area, 0, 2)
        area.expect_pattern_of(area, 3)


@uffd_case(
    "rwprotect-migrated-waiter",
    mem=ALL,
    features=SYNC_RWP,
    needs=("cap_sys_admin",),
    pages=3,
    spare_hugepages=4,
    rows=("RW-36",),
    kind=Kind.DETAIL,
)
def test_rwprotect_migrated_waiter(ctx: Context) -> None:
    """Who waits on a page that the kernel moves waits on, and goes on when it is resolved, with what it wrote."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    with rwp_trapped(uffd, area, 1, write=True), migrate(area, 1):
        uffd.expect_still_asleep(1)
        Pagemap.expect_protected(area, range(3), "after the migration of page 1")
        uffd.resolve(area.page(1))
    expect_sweep(uffd, area, {0, 2}, AGAINST_ACCESS, write=False)
    area.expect_pattern_of(area, 0, 1)
    area.expect_pattern_of(area, 2)


@uffd_case(
    "rwprotect-thp-migrated",
    mem=(ANON,),
    features=SYNC_RWP,
    needs=("cap_sys_admin", "thp"),
    pages=1,
    rows=("RW-36",),
    kind=Kind.DETAIL,
)
def test_rwprotect_thp_migrated(ctx: Context) -> None:
    """A huge page that the kernel moves, or splits to move a part of it, stays protected in each of its pages."""
    area = rwp_protected(ctx, area=huge_area(ctx))
    with migrate(area, 7):
        Pagemap.expect_protected(area, range(area.nr_pages), "after the migration")
        expect_sweep(ctx.uffd, area, range(area.nr_pages), AGAINST_ACCESS)
        area.expect_pattern_of(area)


# ---- advice --------------------------------------------------------------------------------------------------------


@uffd_case(
    "rwprotect-advice", mem=NOT_HUGETLB, features=SYNC_RWP, pages=5, rows=("RW-37",), kind=Kind.DETAIL
)  # fmt: skip
def test_rwprotect_advice(ctx: Context) -> None:
    """MADV_COLD and MADV_WILLNEED send no message and change neither protection nor bytes."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    uffd.rwprotect(area.page(1, 3))
    before = frames(area, *range(5))
    for advice in (Advice.COLD, Advice.WILLNEED, Advice.COLD):
        with promise("RW-37", str(advice)):
            undisturbed(uffd, partial(advise, area.range, advice))
            Pagemap.expect_protected(area, {1, 2, 3}, "after the advice")
            expect(Pagemap.have(area.range, uapi.PM_PRESENT), [True] * 5, "which pages are there")
    expect(frames(area, *range(5)) == before, True, "whether the frames are the same")
    expect_sweep(uffd, area, {1, 2, 3}, AGAINST_ACCESS)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-folio-cold",
    mem=(ANON,),
    variants=("16 pages", "huge page"),
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-37", "RW-44"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_cold(ctx: Context, variant: str) -> None:
    """MADV_COLD of a part of a protected folio, which splits it, leaves each of its pages protected."""
    area, uffd = rwp_protected(ctx, area=folios(ctx, variant)), ctx.uffd
    undisturbed(uffd, partial(advise, area.page(3, area.nr_pages // 2), Advice.COLD))
    Pagemap.expect_protected(area, range(area.nr_pages), "after MADV_COLD of a part")
    expect_sweep(uffd, area, range(area.nr_pages), AGAINST_ACCESS)
    area.expect_pattern_of(area)


@uffd_case("rwprotect-free", mem=(ANON,), features=SYNC_RWP, pages=5, rows=("RW-37",), kind=Kind.DETAIL)
def test_rwprotect_free(ctx: Context) -> None:
    """Pages given up by MADV_FREE stay protected until the kernel takes them; a write keeps the page."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    uffd.rwprotect(area.page(1, 3))
    undisturbed(uffd, partial(advise, area.range, Advice.FREE))
    there = [page for page, here in enumerate(Pagemap.have(area.range, FILLED)) if here]
    Pagemap.expect_protected(area, {1, 2, 3} & set(there), "after MADV_FREE")
    if {1, 2} - set(there):
        raise Skip("the kernel took the pages at once: memory is short")
    with rwp_trapped(uffd, area, 1, write=True):
        uffd.resolve(area.page(1))
    expect_rwp_trapped(uffd, area, 2)
    expect_rwp_free(uffd, area, 0, 1, 2, 4)
    Pagemap.expect_protected(area, {3} & set(there), "when pages 1 and 2 were let go")


@uffd_case(
    "rwprotect-thp-free", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("RW-37",), kind=Kind.DETAIL
)
def test_rwprotect_thp_free(ctx: Context) -> None:
    """A huge page given up whole or in part by MADV_FREE stays protected in each of its pages until it is taken."""
    for whole in (True, False):
        area = rwp_protected(ctx, area=huge_area(ctx))
        undisturbed(ctx.uffd, partial(advise, area.range if whole else area.page(3, 9), Advice.FREE))
        if not all(Pagemap.have(area.range, FILLED)):
            raise Skip("the kernel took the pages at once: memory is short")
        Pagemap.expect_protected(area, range(area.nr_pages), "after MADV_FREE")
        expect_sweep(ctx.uffd, area, range(area.nr_pages), AGAINST_ACCESS)
        area.expect_pattern_of(area)


# ---- pages that somebody wants in memory, or locked there ------------------------------------------------------------


def _mlock(where: Range) -> None:
    syscalls.call("mlock", where.start, where.len)


def populating(area: Area) -> dict[str, tuple[Callable[[Range], object], PagefaultFlag]]:
    """Return calls that get at every page of a range without an access, and what their messages say.

    mlock(2) writes where the mapping is private, for the pages to be its own.
    """
    return {
        "MADV_POPULATE_READ": (partial(_advise, Advice.POPULATE_READ), READ_TRAPPED),
        "MADV_POPULATE_WRITE": (partial(_advise, Advice.POPULATE_WRITE), WRITE_TRAPPED),
        "mlock": (_mlock, READ_TRAPPED if area.mem.shared else WRITE_TRAPPED),
    }


def _advise(advice: Advice, where: Range) -> None:
    advise(where, advice)


def _unlock(where: Range) -> None:
    syscalls.call("munlock", where.start, where.len)


@uffd_case(
    "rwprotect-populate", mem=ALL, features=SYNC_RWP, needs=("kernel_faults",), pages=5, rows=("RW-38",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_populate(ctx: Context) -> None:
    """MADV_POPULATE_READ, _WRITE and mlock(2) wait at each protected page, with its message, and then succeed."""
    area = ctx.dst
    area.fill()
    with Uffd.open(SYNC_RWP, KERNEL_FAULTS) as uffd:
        uffd.register(area.range, RWP)
        for name, (call, flags) in populating(area).items():
            where = area.page(1, 3)
            uffd.rwprotect(area.page(0))
            uffd.rwprotect(area.page(2, 2))
            with promise("RW-38", name):
                with faulting(uffd, area.page(2).start, call=partial(call, where), flags=flags) as waiter:
                    uffd.expect_still_asleep(1)
                    uffd.resolve(area.page(2))
                    uffd.wait_fault(area.page(3).start, flags)
                    Pagemap.expect_protected(area, {0, 3}, "when page 2 was let go")
                    expect(waiter.done, False, "whether the call has returned")
                    uffd.resolve(area.page(3))
                uffd.expect_no_message()
                Pagemap.expect_protected(area, {0}, "after the call")
                if name == "mlock":
                    _unlock(where)
        uffd.resolve(area.range)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-populate-refused", mem=ALL, variants=("user mode only", "SIGBUS"), features=SYNC_RWP | Feature.SIGBUS,
    pages=4, rows=("RW-21", "RW-22", "RW-38"), kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_populate_refused(ctx: Context, variant: str) -> None:
    """MADV_POPULATE_* is EFAULT, mlock(2) ENOMEM at a protected page that nobody is told of, which stays protected."""
    area = ctx.dst
    area.fill()
    features = SYNC_RWP | Feature.SIGBUS if variant == "SIGBUS" else SYNC_RWP
    with Uffd.open(features) as uffd:
        uffd.register(area.range, RWP)
        uffd.rwprotect(area.page(1, 2))
        for name, (call, _) in populating(area).items():
            with promise("RW-38", name):
                with fails(ENOMEM if name == "mlock" else EFAULT):
                    call(area.range)
                uffd.expect_no_message()
                Pagemap.expect_protected(area, {1, 2}, "after the call")
            if name == "mlock":
                _unlock(area.range)
        with promise("RW-38", "pages that are free"):
            for call, _ in populating(area).values():
                call(area.page(0))
                call(area.page(3))
        _unlock(area.range)
        uffd.resolve(area.range)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-mlockall", mem=(ANON, SHMEM), features=SYNC_RWP, needs=("kernel_faults",), pages=3, rows=("RW-38",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_mlockall(ctx: Context) -> None:
    """mlockall(2) waits at a protected page, with its message, and then succeeds."""
    area = ctx.dst

    def life(channel: Channel) -> None:
        area.fill()
        channel.send()
        channel.receive()
        result = outcome(lambda: syscalls.call("mlockall", MCL_CURRENT))
        syscalls.call("munlockall")
        channel.send(result)

    with monitored(area.range, RWP, life, SYNC_RWP, KERNEL_FAULTS) as (child, uffd):
        child.receive()
        uffd.rwprotect(area.page(1))
        child.send()
        flags = READ_TRAPPED if ctx.mem.shared else WRITE_TRAPPED
        eventually(lambda: child.ended or uffd.readable(), "a fault or the end of the process")
        if child.ended and child.receive() in ("ENOMEM", "EPERM"):
            raise Skip("mlockall(2): raise RLIMIT_MEMLOCK (ulimit -l)")
        uffd.wait_fault(area.page(1).start, flags)
        uffd.expect_still_asleep(1)
        uffd.resolve(area.page(1))
        expect(child.receive(), 0, "RW-38: result of mlockall")


# ---- what is not changed -------------------------------------------------------------------------------------------


def resident_pages(where: Range) -> list[bool]:
    """Return of each base page whether mincore(2) finds it in memory."""
    count = where.len // PAGE_SIZE
    found = ffi.new("unsigned char[]", count)
    syscalls.call("mincore", where.start, where.len, int(ffi.cast("uintptr_t", found)))
    return [bool(found[page] & 1) for page in range(count)]


STATUS = ("RssShmem", "VmSwap", "HugetlbPages")
SMAPS = ("Rss", "Pss", "Swap", "Anonymous", "AnonHugePages", "Shared_Hugetlb", "Private_Hugetlb", "Locked")


def counts(where: Range) -> dict[str, object]:
    """Return what the kernel counts of a range, and of shared and huge memory of the process."""
    found: dict[str, object] = {field: smaps_bytes(where, field) for field in SMAPS}
    found |= {field: resident(field) for field in STATUS}
    return found | {"mincore": resident_pages(where).count(True), "pool": hugepages(HUGETLB.page_size)}


@uffd_case(
    "rwprotect-counts", mem=ALL, features=SYNC_RWP, pages=5, rows=("RW-71",), kind=Kind.DETAIL
)  # fmt: skip
def test_rwprotect_counts(ctx: Context) -> None:
    """Protecting and resolving pages changes nothing that the kernel counts of memory, nor the frames."""
    area, uffd = ctx.dst, ctx.uffd
    area.fill(0, 4)  # the last page is missing
    uffd.register(area.range, RWP)
    before, places = counts(area.range), frames(area, *range(5))
    steps: dict[str, tuple[Callable[[], None], set[int]]] = {
        "protect": (lambda: uffd.rwprotect(area.page(1, 4)), {1, 2, 3}),
        "protect again": (lambda: uffd.rwprotect(area.range), {0, 1, 2, 3}),
        "resolve": (lambda: uffd.resolve(area.page(2, 3)), {0, 1}),
        "resolve the rest": (lambda: uffd.resolve(area.range), set()),
        "protect all": (lambda: uffd.rwprotect(area.range), {0, 1, 2, 3}),
        "unregister": (lambda: uffd.unregister(area.range), set()),
    }
    for what, (step, protected) in steps.items():
        step()
        with promise("RW-71", what):
            Pagemap.expect_protected(area, protected, "pages")
            expect(counts(area.range), before, "counts")
            expect(frames(area, *range(5)) == places, True, "whether the frames are the same")
    area.expect_pattern_of(area, 0, 4)


@uffd_case(
    "rwprotect-thp-counts", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("RW-71",), kind=Kind.DETAIL
)
def test_rwprotect_thp_counts(ctx: Context) -> None:
    """Protecting huge pages whole leaves all counts alone, in part all but the bytes that huge pages map."""
    area, uffd = huge_area(ctx, 2), ctx.uffd
    uffd.register(area.range, RWP)
    before = counts(area.range)
    uffd.rwprotect(area.range)
    expect(counts(area.range), before, "counts, after protecting them whole")
    uffd.resolve(area.range)
    expect(counts(area.range), before, "counts, after resolving them")
    uffd.rwprotect(area.page(area.nr_pages // 2 + 3, 2))
    uffd.resolve(area.range)
    after = counts(area.range)
    after["AnonHugePages"] = before["AnonHugePages"]
    expect(after, before, "counts but AnonHugePages, after protecting a part of one")
    expect(pmd_mapped(area.range), area.range.len // 2, "bytes mapped by huge pages, after that")
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-charged", mem=(ANON, SHMEM), features=SYNC_RWP, pages=2048, rows=("RW-71",), kind=Kind.DETAIL
)  # fmt: skip
def test_rwprotect_charged(ctx: Context) -> None:
    """What is charged to the memory cgroup stays charged when it is protected or resolved, and is charged once."""
    area = ctx.dst
    with own_memory_group() as group:

        def life(_: Channel) -> None:
            group.join()
            area.fill()
            with Uffd.open(SYNC_RWP) as uffd:
                uffd.register(area.range, RWP)
                before = group.usage
                expect(before >= area.range.len, True, f"RW-71: whether {before} bytes charged are all of the area")
                for step in (uffd.rwprotect, uffd.rwprotect, uffd.resolve, uffd.rwprotect, uffd.unregister):
                    step(area.range)
                    change = group.usage - before  # a processor takes and gives back some pages at a time
                    expect(abs(change) < area.range.len // 4, True, f"RW-71: {change} bytes more, {step.__name__}")
            area.expect_pattern_of(area)

        with Child(life):
            pass


@uffd_case(
    "rwprotect-soft-dirty",
    mem=(ANON, SHMEM),
    features=SYNC_RWP,
    needs=("pagemap",),
    pages=5,
    rows=("RW-70",),
    kind=Kind.DETAIL,
)
def test_rwprotect_soft_dirty(ctx: Context) -> None:
    """A page is not soft-dirty by being protected, resolved or read; a write, also one that waited, makes it so."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    require_soft_dirty(area.start)
    uffd.rwprotect(area.page(4))
    Path("/proc/self/clear_refs").write_text("4")
    Pagemap.expect_protected(area, {4}, "after clear_refs")

    def dirty() -> list[int]:
        return [page for page, mark in enumerate(Pagemap.have(area.range, uapi.PM_SOFT_DIRTY)) if mark]

    uffd.rwprotect(area.page(1, 3))
    expect(dirty(), [], "pages that are soft-dirty, after protecting some")
    uffd.resolve(area.page(1))
    expect_rwp_trapped(uffd, area, 2, 4)
    expect(dirty(), [], "pages that are soft-dirty, after resolving and reading some")
    with rwp_trapped(uffd, area, 3, write=True):
        expect(dirty(), [], "pages that are soft-dirty, while a writer waits")
        uffd.resolve(area.page(3))
    undisturbed(uffd, partial(poke, area.page(1).start, NEW))
    expect(dirty(), [1, 3], "pages that are soft-dirty, after writes to pages 1 and 3")
    uffd.rwprotect(area.range)
    uffd.resolve(area.range)
    expect(dirty(), [1, 3], "pages that are soft-dirty, after protecting and resolving all")


DIRTY_WITH_OTHERS = Defect(
    id="D-RW-70",
    summary="of a large folio mapped by page, all pages of a request turn soft-dirty when one of them was written",
    kernels="7.3.4",
    advice="take soft-dirty pages of memory in large folios for a superset of those written",
    shows=r"pages that are soft-dirty, after protecting and resolving all: expected 5, got ",
)


@uffd_case(
    "rwprotect-thp-soft-dirty",
    mem=(ANON,),
    variants=("16 pages", "huge page"),
    features=ASYNC_RWP,
    needs=("thp", "pagemap"),
    pages=1,
    rows=("RW-70",),
    kind=Kind.DETAIL,
    defect=DIRTY_WITH_OTHERS,
)
def test_rwprotect_thp_soft_dirty(ctx: Context, variant: str) -> None:
    """Of a folio of which one page was written just that page is soft-dirty when all were protected and resolved."""
    area, uffd = rwp_protected(ctx, area=folios(ctx, variant)), ctx.uffd
    require_soft_dirty(area.start)
    Path("/proc/self/clear_refs").write_text("4")
    Pagemap.expect_protected(area, range(area.nr_pages), "after clear_refs")
    uffd.resolve(area.page(2, area.nr_pages - 3))
    undisturbed(uffd, partial(poke, area.page(5).start, NEW))
    uffd.rwprotect(area.range)
    uffd.resolve(area.range)
    dirty = [page for page, mark in enumerate(Pagemap.have(area.range, uapi.PM_SOFT_DIRTY)) if mark]
    expect(page_numbers(dirty), "5", "pages that are soft-dirty, after protecting and resolving all")
    undisturbed(uffd, lambda: area.expect_pattern_of(area, 6))


# ---- huge pages ----------------------------------------------------------------------------------------------------


@uffd_case(
    "rwprotect-hugetlb-counts",
    mem=EACH_HUGETLB,
    features=SYNC_RWP,
    pages=3,
    spare_hugepages=4,
    rows=("RW-45",),
    kind=Kind.DETAIL,
)
def test_rwprotect_hugetlb_counts(ctx: Context) -> None:
    """Reserved and free huge pages are what they are without protection, page by page, and after a copy on write."""
    area, uffd = ctx.allocate(reserve=True), ctx.uffd
    area.fill(0, 2)
    uffd.register(area.range, RWP)
    before = hugepages(ctx.page_size)
    uffd.rwprotect(area.range)
    expect(hugepages(ctx.page_size), before, "huge pages in the pool, after protecting all")

    def child(channel: Channel) -> None:
        channel.send()
        channel.receive()
        if not ctx.mem.shared:
            area.expect_pattern_of(area, 0, 2)

    with Child(child) as process:
        process.receive()
        with rwp_trapped(uffd, area, 1, write=True):
            uffd.resolve(area.page(1))
        copied = hugepages(ctx.page_size)
        expect(before.free - copied.free, 0 if ctx.mem.shared else 1, "huge pages that the write took")
        expect_rwp_trapped(uffd, area, 0)
        expect(hugepages(ctx.page_size), copied, "huge pages in the pool, after a read that waited")
        Pagemap.expect_protected(area, (), "at the end")
        process.send()
    undisturbed(uffd, partial(poke, area.page(2).start, NEW))
    after = hugepages(ctx.page_size)
    expect((before.free - after.free, before.reserved - after.reserved), (1, 1), "free, reserved pages less at the end")
    area.expect_pattern_of(area, 0, 1)


SHARINGS = {"shared": MAP_SHARED, "private": MAP_PRIVATE}


@uffd_case(
    "rwprotect-hugetlb-sizes",
    variants=tuple(SHARINGS),
    features=SYNC_RWP,
    needs=("hugetlb", "pagemap"),
    rows=("RW-45",),
    kind=Kind.DETAIL,
)
def test_rwprotect_hugetlb_sizes(variant: str) -> None:
    """A huge page of any size is protected whole, traps at its start, and is resolved whole."""
    flags, done = SHARINGS[variant], 0
    reasons = []
    for size in hugepage_sizes():
        try:
            with promise("RW-45", f"{size >> 10} kB"):
                check_one_hugepage(size, flags)
            done += 1
        except Skip as skip:
            reasons.append(str(skip))
    if not done:
        raise Skip("; ".join(reasons) or "the kernel has no huge pages")


def check_one_hugepage(size: int, flags: int) -> None:
    """Protect one huge page of a size, read and write to it in the middle and at its end."""
    marks = {offset: bytes([number + 1]) for number, offset in enumerate((0, size // 2 + 7, size - 1))}
    with ExitStack() as stack:
        fd = stack.enter_context(hugepage_file(size))
        page = stack.enter_context(mapped(size, flags=flags | MAP_NORESERVE, fd=fd))
        uffd = stack.enter_context(Uffd.open(SYNC_RWP))
        for offset, mark in marks.items():
            poke(page.start + offset, mark)
        uffd.register(page, RWP)
        free = hugepages(size)
        for offset, write in ((size // 2 + 7, False), (size - len(NEW), True)):
            uffd.rwprotect(page)
            expect(sum(Pagemap.have(page, uapi.PM_UFFD_WP)), size // PAGE_SIZE, "base pages that are protected")
            call = partial(poke, page.start + offset, NEW) if write else partial(peek, page.start + offset)
            told = WRITE_TRAPPED if write else READ_TRAPPED
            with faulting(uffd, page.start + offset, call=call, flags=told, at=page.start):
                uffd.expect_still_asleep(1)
                uffd.resolve(page)
            expect(any(Pagemap.have(page, uapi.PM_UFFD_WP)), False, "whether a base page is protected when resolved")
        expect(hugepages(size), free, "huge pages in the pool")
        expect(peek(page.start), marks[0], "the first byte")
        expect(peek(page.start + size // 2 + 7), marks[size // 2 + 7], "a byte in the middle")
        expect(peek(page.start + size - len(NEW), len(NEW)), NEW, "what was written at the end")
        uffd.expect_no_message()
