# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_RWPROTECT of transparent huge pages: protected whole and in part, split, collapsed, punched."""

from __future__ import annotations

from contextlib import suppress
from errno import EINVAL

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    AGAINST_ACCESS, ANON, MISSING, NEW, PAGE_SIZE, RWP, SHMEM, SMALL_FOLIOS, SYNC_RWP, UNREGISTERED, Advice, Area,
    Context, KernelError, Pagemap, Skip, advise, collapse, expect, expect_modes, expect_rwp_free, expect_rwp_trapped,
    expect_same, expect_sweep, fails, folios, frames, huge_area, peek, pmd_mapped, pmd_size, poke, promise,
    require_collapse, rwp_protected, rwp_trapped, small_area, smaps_bytes, swap_out, syscalls, uapi, undisturbed,
)  # fmt: skip

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


def ends(area: Area) -> tuple[int, ...]:
    """Return pages of an area that tell where something stopped: the first, some inside, the last."""
    return (0, 1, area.nr_pages // 2 - 1, area.nr_pages // 2, area.nr_pages - 1)


# ---- anonymous memory ----------------------------------------------------------------------------------------------


@uffd_case(
    "rwprotect-thp", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("RW-01", "RW-43"), kind=Kind.DETAIL
)
def test_rwprotect_thp(ctx: Context) -> None:
    """A huge page protected whole stays one; an access tells its base page, and page by page all are let go."""
    area, uffd = rwp_protected(ctx, area=huge_area(ctx)), ctx.uffd
    every = set(range(area.nr_pages))
    expect(pmd_mapped(area.range), area.range.len, "bytes mapped by huge pages, after UFFDIO_RWPROTECT")
    with promise("RW-43", "read of page 7"), rwp_trapped(uffd, area, 7):
        uffd.expect_still_asleep(1)
        uffd.resolve(area.page(7))
    Pagemap.expect_protected(area, every - {7}, "when page 7 was let go")
    with promise("RW-43", "write to page 9"), rwp_trapped(uffd, area, 9, write=True):
        uffd.resolve(area.page(9))
    Pagemap.expect_protected(area, every - {7, 9}, "when page 9 was let go")
    expect_rwp_free(uffd, area, 7, 9)
    expect_sweep(uffd, area, every - {7, 9}, AGAINST_ACCESS, write=False, most=area.nr_pages)
    area.expect_pattern_of(area, 0, 9)
    area.expect_pattern_of(area, 10)


@uffd_case(
    "rwprotect-thp-whole", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("RW-02", "RW-43"),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_thp_whole(ctx: Context) -> None:
    """A huge page protected and resolved whole stays one, in the same frames, and all who wait there go on."""
    area, uffd = huge_area(ctx), ctx.uffd
    before = frames(area, *ends(area))
    rwp_protected(ctx, area=area)
    with rwp_trapped(uffd, area, 3), rwp_trapped(uffd, area, area.nr_pages - 1, write=True):
        uffd.expect_still_asleep(2)
        uffd.resolve(area.range)
        Pagemap.expect_protected(area, (), "after resolving the huge page")
    uffd.expect_no_message()
    expect(pmd_mapped(area.range), area.range.len, "bytes mapped by huge pages, when it was resolved")
    expect(frames(area, *ends(area)) == before, True, "whether the frames are the same")
    expect_rwp_free(uffd, area, *ends(area))
    area.expect_pattern_of(area, 0, area.nr_pages - 1)


@uffd_case(
    "rwprotect-thp-two", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("RW-14", "RW-43", "RW-44"),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_thp_two(ctx: Context) -> None:
    """Of three huge pages, a range from inside the first to inside the third splits these two, and not the second."""
    area, uffd = huge_area(ctx, 3), ctx.uffd
    per = area.nr_pages // 3
    uffd.register(area.range, RWP)
    pages = set(range(per - 2, 2 * per + 3))
    uffd.rwprotect(area.page(per - 2, per + 5))
    Pagemap.expect_protected(area, pages, "after protecting the second huge page and some around it")
    whole = per * PAGE_SIZE
    expect(smaps_bytes(area.range, "AnonHugePages") % (2 * whole), whole, "bytes mapped by huge pages, modulo two")
    uffd.resolve(area.page(per, 1))
    Pagemap.expect_protected(area, pages - {per}, "after resolving one page of the second")
    expect_sweep(uffd, area, pages - {per}, AGAINST_ACCESS)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-thp-zeropage-cut", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("RW-15", "UNR-17"),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_thp_zeropage_cut(ctx: Context) -> None:
    """The huge zero page is protected whole and in part, traps by base page, and is unregistered like any other."""
    uffd = ctx.uffd
    for whole in (True, False):
        area = ctx.allocate(pmd_size() // PAGE_SIZE)
        advise(area.range, Advice.HUGEPAGE)
        area.expect_zero()
        uffd.register(area.range, RWP)
        pages = set(range(area.nr_pages)) if whole else {6, 7, 8}
        uffd.rwprotect(area.range if whole else area.page(6, 3))
        with promise("RW-15", "whole" if whole else "in part"):
            Pagemap.expect_protected(area, pages, "of zero pages")
            expect_rwp_trapped(uffd, area, 7)
            with rwp_trapped(uffd, area, 8, write=True):
                uffd.resolve(area.page(8))
            Pagemap.expect_protected(area, pages - {7, 8}, "when pages 7 and 8 were let go")
        with promise("UNR-17", "whole" if whole else "in part"):
            uffd.unregister(area.page(1, area.nr_pages - 2))
            Pagemap.expect_protected(area, pages & {0, area.nr_pages - 1}, "after unregistering all but the ends")
            expect_rwp_free(uffd, area, 1, 6)
            (expect_rwp_trapped if whole else expect_rwp_free)(uffd, area, 0, area.nr_pages - 1)
        area.expect_zero(0, 8)
        area.expect_zero(9)


@uffd_case(
    "rwprotect-thp-zeropage-unregister", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("UNR-17",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_thp_zeropage_unregister(ctx: Context) -> None:
    """The huge zero page, and a huge page with data, that are unregistered whole are free at once."""
    zeroes, data = ctx.allocate(pmd_size() // PAGE_SIZE), huge_area(ctx)
    advise(zeroes.range, Advice.HUGEPAGE)
    zeroes.expect_zero()
    for area in (zeroes, data):
        ctx.uffd.register(area.range, RWP)
        ctx.uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, range(area.nr_pages), "after UFFDIO_RWPROTECT")
        ctx.uffd.unregister(area.range)
        Pagemap.expect_protected(area, (), "after UFFDIO_UNREGISTER")
        expect_modes(area.range, UNREGISTERED)
    expect_sweep(ctx.uffd, data, (), AGAINST_ACCESS)
    undisturbed(ctx.uffd, zeroes.expect_zero)
    undisturbed(ctx.uffd, lambda: data.expect_pattern_of(data))


@uffd_case(
    "rwprotect-thp-unregister-part", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("UNR-16", "UNR-17"),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_thp_unregister_part(ctx: Context) -> None:
    """A huge page of which a middle part is unregistered is free there, and traps before and behind it."""
    area, uffd = rwp_protected(ctx, area=huge_area(ctx)), ctx.uffd
    first, count = area.nr_pages // 4 + 1, area.nr_pages // 2
    uffd.unregister(area.page(first, count))
    pages = set(range(area.nr_pages)) - set(range(first, first + count))
    Pagemap.expect_protected(area, pages, "after unregistering the middle")
    expect_modes(area.page(first - 1, 1), RWP)
    expect_modes(area.page(first, count), UNREGISTERED)
    expect_modes(area.page(first + count, 1), RWP)
    expect_sweep(uffd, area, pages, AGAINST_ACCESS)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-thp-split", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("RW-37", "RW-44"),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_thp_split(ctx: Context) -> None:
    """A huge page that the kernel splits stays protected and there, with the unused parts that become zero pages."""
    area, uffd, used = ctx.allocate(pmd_size() // PAGE_SIZE), ctx.uffd, (3, 9)
    advise(area.range, Advice.HUGEPAGE)
    for page in used:
        poke(area.page(page).start, NEW)
    if pmd_mapped(area.range) < area.range.len:
        raise Skip("no transparent huge page to be had: is memory short or fragmented?")
    uffd.register(area.range, MISSING | RWP)
    uffd.rwprotect(area.range)
    advise(area.page(used[0]), Advice.COLD)
    Pagemap.expect_protected(area, range(area.nr_pages), "after MADV_COLD of one page")
    expect_sweep(uffd, area, range(area.nr_pages), AGAINST_ACCESS, write=False)
    expect([peek(area.page(page).start, len(NEW)) for page in used], [NEW, NEW], "what was written before")
    area.expect_zero(10)
    uffd.rwprotect(area.range)
    expect_rwp_trapped(uffd, area, 0, *used, area.nr_pages - 1, write=True)


@uffd_case(
    "rwprotect-collapse", mem=(ANON,), features=SYNC_RWP, needs=("thp",), pages=1, rows=("RW-39",), kind=Kind.DETAIL
)
def test_rwprotect_collapse(ctx: Context) -> None:
    """MADV_COLLAPSE refuses a range with a protected page, which stays so; a resolved one it takes, to be protected."""
    require_collapse(ctx)
    area, uffd = small_area(ctx), ctx.uffd
    uffd.register(area.range, RWP)
    for number in (0, 7, area.nr_pages - 1):
        uffd.rwprotect(area.page(number))
        with promise("RW-39", f"page {number} protected"), fails(EINVAL):
            collapse(area.range)
        advise(area.range, Advice.NOHUGEPAGE)
        expect(pmd_mapped(area.range), 0, "bytes mapped by huge pages")
        Pagemap.expect_protected(area, {number}, "after MADV_COLLAPSE")
        expect_rwp_trapped(uffd, area, number)
    with promise("RW-39", "all protected"):
        uffd.rwprotect(area.range)
        with fails(EINVAL):
            collapse(area.range)
        Pagemap.expect_protected(area, range(area.nr_pages), "after MADV_COLLAPSE")
    with promise("RW-39", "all resolved"):
        uffd.resolve(area.range)
        collapse(area.range)
        expect(pmd_mapped(area.range), area.range.len, "bytes mapped by huge pages")
        undisturbed(uffd, lambda: area.expect_pattern_of(area))
        uffd.rwprotect(area.range)
        Pagemap.expect_protected(area, range(area.nr_pages), "after protecting the huge page")
        expect_sweep(uffd, area, range(area.nr_pages), AGAINST_ACCESS)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-collapse-swapped",
    mem=(ANON,),
    features=SYNC_RWP,
    needs=("thp", "swap"),
    pages=1,
    rows=("RW-31", "RW-39"),
    kind=Kind.DETAIL,
)
def test_rwprotect_collapse_swapped(ctx: Context) -> None:
    """MADV_COLLAPSE refuses a range with a protected page that is in swap, which stays protected and there."""
    require_collapse(ctx)
    area, uffd = small_area(ctx), ctx.uffd
    uffd.register(area.range, RWP)
    uffd.rwprotect(area.page(7, 2))
    swap_out(area.page(6, 4))
    with fails(EINVAL):
        collapse(area.range)
    expect(pmd_mapped(area.range), 0, "bytes mapped by huge pages")
    Pagemap.expect_protected(area, {7, 8}, "after MADV_COLLAPSE")
    expect_sweep(uffd, area, {7, 8}, AGAINST_ACCESS)
    area.expect_pattern_of(area)


# ---- shared memory -------------------------------------------------------------------------------------------------

MARKS = r"expected PM_UFFD_WP in pagemap on exactly these pages: "

LOST_IN_COLLAPSE = Defect(
    id="D-RW-40",
    summary="collapsing a file through any mapping takes the protection against access off others, unannounced",
    kernels="7.3.4",
    advice="let nobody else map watched shared memory, or advise it MADV_NOHUGEPAGE in every mapping",
    shows=rf"after MADV_COLLAPSE of the (other|watched) mapping: {MARKS}",
)
HUGE_UNPROTECTED = Defect(
    id="D-RW-41",
    summary="a huge page of shared memory is unmapped where it should be protected: the next access is not trapped",
    kernels="7.3.4",
    advice="advise watched shared memory MADV_NOHUGEPAGE before its pages come",
    shows=rf"after UFFDIO_RWPROTECT of a huge page: {MARKS}",
)
LOST_IN_PUNCH = Defect(
    id="D-RW-42",
    summary="punching one page of a large folio of shared memory takes the protection against access off the others",
    kernels="7.3.4",
    advice="protect the rest of a large folio again after punching a part of it, or keep shared memory in small pages",
    shows=rf"after punching page \d+: {MARKS}",
)


@uffd_case(
    "rwprotect-thp-shared",
    mem=(SHMEM,),
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-41",),
    defect=HUGE_UNPROTECTED,
)
def test_rwprotect_thp_shared(ctx: Context) -> None:
    """A huge page of shared memory in the range is protected like other pages that are there."""
    area, uffd = huge_area(ctx), ctx.uffd
    uffd.register(area.range, RWP)
    uffd.rwprotect(area.range)
    Pagemap.expect_protected(area, range(area.nr_pages), "after UFFDIO_RWPROTECT of a huge page")
    expect_sweep(uffd, area, range(area.nr_pages), AGAINST_ACCESS)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-thp-shared-part",
    mem=(SHMEM,),
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-41", "RW-44"),
    kind=Kind.DETAIL,
)
def test_rwprotect_thp_shared_part(ctx: Context) -> None:
    """What UFFDIO_RWPROTECT does to a huge page of shared memory changes no byte, and pages it maps it protects.

    The rest of it may be unmapped, to be found in the file again.
    """
    area, uffd = huge_area(ctx), ctx.uffd
    uffd.register(area.range, RWP)
    uffd.rwprotect(area.page(5, 3))
    undisturbed(uffd, lambda: area.expect_pattern_of(area, 8))
    uffd.rwprotect(area.page(8, 3))
    marks = Pagemap.have(area.range, uapi.PM_UFFD_WP)
    there = Pagemap.have(area.range, uapi.PM_PRESENT)
    for page in (8, 9, 10):
        if there[page] and not pmd_mapped(area.range):
            expect(marks[page], True, f"whether page {page}, mapped by itself, is protected")
    expect(marks[11:], [False] * (area.nr_pages - 11), "which pages behind the range are protected")
    uffd.resolve(area.range)
    expect(any(Pagemap.have(area.range, uapi.PM_UFFD_WP)), False, "whether a page is protected, after resolving all")
    undisturbed(uffd, lambda: area.expect_pattern_of(area))


@uffd_case(
    "rwprotect-collapse-file",
    mem=(SHMEM,),
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-39", "RW-40"),
    kind=Kind.DETAIL,
    defect=LOST_IN_COLLAPSE,
)
def test_rwprotect_collapse_file(ctx: Context) -> None:
    """MADV_COLLAPSE of watched shared memory is EINVAL, and leaves a page as protected as it was."""
    require_collapse(ctx)
    uffd = ctx.uffd
    for page in (0, 7, pmd_size() // PAGE_SIZE - 1):
        area = small_area(ctx)
        uffd.register(area.range, RWP)
        uffd.rwprotect(area.page(page))
        Pagemap.expect_protected(area, {page}, "after protecting a page")
        with fails(EINVAL):
            collapse(area.range)
        expect(pmd_mapped(area.range), 0, "bytes mapped by huge pages")
        Pagemap.expect_protected(area, {page}, "after MADV_COLLAPSE of the watched mapping")
        expect_sweep(uffd, area, {page}, AGAINST_ACCESS)
        area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-collapse-free",
    mem=(SHMEM,),
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-39",),
    kind=Kind.DETAIL,
)
def test_rwprotect_collapse_free(ctx: Context) -> None:
    """MADV_COLLAPSE of watched shared memory without a protected page maps no huge page, and changes no byte."""
    require_collapse(ctx)
    area, uffd = small_area(ctx), ctx.uffd
    uffd.register(area.range, RWP)
    with fails(EINVAL):
        collapse(area.range)
    expect(pmd_mapped(area.range), 0, "bytes mapped by huge pages")
    undisturbed(uffd, lambda: area.expect_pattern_of(area))
    uffd.rwprotect(area.page(5, 3))
    Pagemap.expect_protected(area, {5, 6, 7}, "after protecting pages 5 to 7")
    expect_sweep(uffd, area, {5, 6, 7}, AGAINST_ACCESS)


@uffd_case(
    "rwprotect-collapse-alias",
    mem=(SHMEM,),
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-40",),
    kind=Kind.DETAIL,
    defect=LOST_IN_COLLAPSE,
)
def test_rwprotect_collapse_alias(ctx: Context) -> None:
    """MADV_COLLAPSE through another mapping of the file leaves the watched one as protected as it was."""
    require_collapse(ctx)
    area, uffd = small_area(ctx), ctx.uffd
    uffd.register(area.range, RWP)
    pages = {3, 4, area.nr_pages - 1}
    AGAINST_ACCESS.set(uffd, area, pages)
    Pagemap.expect_protected(area, pages, "after protecting some pages")
    with suppress(KernelError):  # it may be refused
        collapse(area.alias)
    expect_same(area.alias.start + 8 * PAGE_SIZE, area.page(8).start, PAGE_SIZE, "page 8 through either mapping")
    Pagemap.expect_protected(area, pages, "after MADV_COLLAPSE of the other mapping")
    expect_sweep(uffd, area, pages, AGAINST_ACCESS)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-folio-punch",
    mem=(SHMEM,),
    variants=SMALL_FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-29", "RW-42"),
    kind=Kind.DETAIL,
    defect=LOST_IN_PUNCH,
)
def test_rwprotect_folio_punch(ctx: Context, variant: str) -> None:
    """Punching one page of a large folio of shared memory leaves the other pages as protected as they were."""
    area = rwp_protected(ctx, area=folios(ctx, variant))
    uffd, punched = ctx.uffd, area.nr_pages // 4
    where, mode = punched * PAGE_SIZE, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    syscalls.call("fallocate", area.fd or 0, mode, where, PAGE_SIZE)
    uffd.expect_no_message()
    pages = set(range(area.nr_pages)) - {punched}
    Pagemap.expect_protected(area, pages, f"after punching page {punched}")
    undisturbed(uffd, lambda: area.expect_zero(punched, 1))
    expect_sweep(uffd, area, pages, AGAINST_ACCESS, write=False)


@uffd_case(
    "rwprotect-folio-punch-neighbour",
    mem=(SHMEM,),
    variants=SMALL_FOLIOS,
    features=SYNC_RWP,
    needs=("thp",),
    pages=1,
    rows=("RW-29", "RW-42"),
    kind=Kind.DETAIL,
)
def test_rwprotect_folio_punch_neighbour(ctx: Context, variant: str) -> None:
    """Punching a part of one folio of shared memory leaves the next folio protected, and drops no byte of either."""
    area = rwp_protected(ctx, area=folios(ctx, variant))
    uffd, half = ctx.uffd, area.nr_pages // 2
    mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    syscalls.call("fallocate", area.fd or 0, mode, PAGE_SIZE, PAGE_SIZE)
    marks = Pagemap.have(area.range, uapi.PM_UFFD_WP)
    expect(marks[half:], [True] * half, "which pages of the next folio are protected")
    expect(marks[1], False, "whether the punched page is protected")
    uffd.resolve(area.range)
    undisturbed(uffd, lambda: area.expect_zero(1, 1))
    area.expect_pattern_of(area, 0, 1)
    area.expect_pattern_of(area, 2)
