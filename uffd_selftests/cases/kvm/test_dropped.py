# SPDX-License-Identifier: GPL-2.0-only
"""Memory that goes while a virtual processor has it mapped: dropped, moved away, unmapped, mapped elsewhere."""

from __future__ import annotations

import os
from errno import EFAULT
from functools import partial

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, ANON, KVM, KVM_PAGING, MINOR, MINOR_FAULTS, MISSING, MOVE, MREMAP_DONTUNMAP, NOT_HUGETLB, PAGE_SIZE, REMAP,
    REMOVE, SHARED, UNMAP, Advice, Context, Feature, PagefaultFlag, Pagemap, Processor, Range, advise, announced,
    collapse, copy, expect, expect_vcpu_sees, fails, guest, huge_area, moved, peek, poke, prepare, promise, remap,
    removed, reports_kvm, require_collapse, small_area, syscalls, undisturbed, unmap, unmapped, vcpu_faulting,
)  # fmt: skip

PAGES = 5
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


def _used(ctx: Context, cpu: Processor) -> None:
    """Have a processor write to every page of the destination, which comes from the source."""
    prepare(ctx)
    copy(ctx, 0, PAGES)
    for page in range(PAGES):
        undisturbed(ctx.uffd, partial(cpu.poke, ctx.dst.page(page).start, b"used"))


def _expect_served(ctx: Context, cpu: Processor, *pages: int) -> None:
    """Assert that a processor finds each of the pages missing, and goes on with what comes then."""
    for page in pages:
        for access in ("read", "write") if page == pages[0] else ("write",):
            with promise(f"page {page}, {access}"):
                with vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(page).start, access) as waiter:
                    ctx.uffd.expect_still_asleep(1)
                    copy(ctx, page)
                ctx.uffd.expect_no_message()
                there = peek(ctx.src.page(page).start, PAGE_SIZE)
                if access == "read":
                    expect(waiter.result(), there[:4], "what the processor read")
                    expect_vcpu_sees(cpu, ctx.uffd, Range(ctx.dst.page(page).start, PAGE_SIZE), there)
                    _drop(ctx, ctx.dst.page(page))


def _expect_kept(ctx: Context, cpu: Processor, *pages: int) -> None:
    for page in pages:
        with promise(f"page {page}, which stays"):
            kept = b"used" + peek(ctx.src.page(page).start + 4, PAGE_SIZE - 4)
            expect_vcpu_sees(cpu, ctx.uffd, Range(ctx.dst.page(page).start, PAGE_SIZE), kept)


def _drop(ctx: Context, where: Range) -> None:
    """Have pages missing again; where that is announced, with the announcement read."""
    call = partial(advise, where, Advice.REMOVE if ctx.mem.shared else Advice.DONTNEED)
    if ctx.features & Feature.EVENT_REMOVE:
        announced(ctx.uffd, call, removed(where))
    else:
        call()


@uffd_case("kvm-dropped", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, rows=("KV-09",))
def test_kvm_dropped(ctx: Context) -> None:
    """Pages that a processor has mapped are missing to it once MADV_DONTNEED, or MADV_REMOVE, has dropped them."""
    with guest(ctx.dst) as cpu, promise("KV-09"):
        _used(ctx, cpu)
        _drop(ctx, ctx.dst.page(1, 3))
        expect(Pagemap.filled(ctx.dst.range, ctx.page_size), [True, False, False, False, True], "pages that are there")
        _expect_kept(ctx, cpu, 0, 4)
        _expect_served(ctx, cpu, 2, 1, 3)
        _expect_kept(ctx, cpu, 0, 4)


@uffd_case(
    "kvm-dropped-event", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=REMOVE, rows=("KV-09",)
)
def test_kvm_dropped_event(ctx: Context) -> None:
    """Where UFFD_EVENT_REMOVE is asked for it comes before a processor's messages of the pages that went."""
    with guest(ctx.dst) as cpu, promise("KV-09"):
        _used(ctx, cpu)
        _drop(ctx, ctx.dst.page(2, 2))
        _expect_kept(ctx, cpu, 0, 1, 4)
        _expect_served(ctx, cpu, 3, 2)


@uffd_case("kvm-hole-punched", mem=SHARED, needs=KVM, post_alloc=reports_kvm, pages=PAGES, rows=("KV-09",))
def test_kvm_hole_punched(ctx: Context) -> None:
    """Pages that a processor has mapped are missing to it once fallocate(2) has punched a hole into the file."""
    with guest(ctx.dst) as cpu, promise("KV-09"):
        _used(ctx, cpu)
        fd, unit = ctx.dst.fd, ctx.page_size
        syscalls.call("fallocate", fd or 0, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, unit, 2 * unit)
        _expect_kept(ctx, cpu, 0, 3, 4)
        _expect_served(ctx, cpu, 2, 1)


@uffd_case("kvm-truncated", mem=SHARED, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES, rows=("KV-09",))
def test_kvm_truncated(ctx: Context) -> None:
    """Beyond the new end of a file KVM_RUN fails with EFAULT; when the file is longer again its pages are missing."""
    with guest(ctx.dst) as cpu, promise("KV-09"):
        _used(ctx, cpu)
        os.ftruncate(ctx.dst.fd or 0, 2 * ctx.page_size)
        _expect_kept(ctx, cpu, 0, 1)
        with fails(EFAULT):
            undisturbed(ctx.uffd, partial(cpu.peek, ctx.dst.page(2).start))
        os.ftruncate(ctx.dst.fd or 0, PAGES * ctx.page_size)
        _expect_served(ctx, cpu, 2, 4)


@uffd_case(
    "kvm-dropped-minor", mem=SHARED, needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=MINOR_FAULTS,
    rows=("KV-09", "KV-03"),
)  # fmt: skip
def test_kvm_dropped_minor(ctx: Context) -> None:
    """After MADV_DONTNEED of shared memory a processor causes minor faults, for its pages are still in the file."""
    with guest(ctx.dst) as cpu, promise("KV-09"):
        for page in range(PAGES):
            cpu.poke(ctx.dst.page(page).start, b"used")
        ctx.uffd.register(ctx.dst.range, MINOR)
        advise(ctx.dst.page(1, 3), Advice.DONTNEED)
        for page, access in ((2, "read"), (1, "write"), (3, "read")):
            where = ctx.dst.page(page)
            flags = PagefaultFlag.MINOR | (PagefaultFlag.WRITE if access == "write" else PagefaultFlag(0))
            with vcpu_faulting(cpu, ctx.uffd, where.start, access, flags=flags) as waiter:
                ctx.uffd.continue_(where)
            if access == "read":
                expect(waiter.result(), b"used", "what the processor read")
        ctx.uffd.expect_no_message()
        for page in (0, 4):
            expect_vcpu_sees(cpu, ctx.uffd, Range(ctx.dst.page(page).start, 8), b"used" + bytes(4))


@uffd_case(
    "kvm-moved-away", mem=(ANON,), needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=MOVE, rows=("KV-09",)
)
def test_kvm_moved_away(ctx: Context) -> None:
    """A page that UFFDIO_MOVE takes from a processor is missing to it, and what it has written goes along."""
    ctx.dst.fill()
    other = ctx.allocate()
    for area in (ctx.dst, other):
        ctx.uffd.register(area.range, MISSING)
    with guest(ctx.dst, other) as cpu, promise("KV-09"):
        for page in range(PAGES):
            undisturbed(ctx.uffd, partial(cpu.poke, ctx.dst.page(page).start, b"used"))
        contents = peek(ctx.dst.start, ctx.dst.range.len)
        ctx.uffd.move(other.page(1).start, ctx.dst.page(1).start, 3 * PAGE_SIZE)
        expect_vcpu_sees(cpu, ctx.uffd, other.page(1, 3), contents[PAGE_SIZE : 4 * PAGE_SIZE])
        undisturbed(ctx.uffd, partial(cpu.poke, other.page(3).start + 8, b"here"))
        with vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(2).start, "write"):
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.zeropage(ctx.dst.page(2))
        expect(peek(other.page(2).start, 4), b"used", "the page that was moved, after a write where it was")
        with vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(3).start + 8) as waiter:
            ctx.uffd.move(ctx.dst.page(3).start, other.page(3).start, PAGE_SIZE)
        expect(waiter.result(), b"here", "what the processor reads of the page that came back")
        with vcpu_faulting(cpu, ctx.uffd, other.page(3).start):
            ctx.uffd.zeropage(other.page(3))
        for page in (0, 4):
            part = contents[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            expect_vcpu_sees(cpu, ctx.uffd, ctx.dst.page(page), part)
        ctx.uffd.expect_no_message()


@uffd_case(
    "kvm-moved-away-huge", mem=(ANON,), variants=("page", "all"), needs=(*KVM, "thp"), post_alloc=reports_kvm,
    pages=PAGES, features=MOVE, rows=("KV-09",),
)  # fmt: skip
def test_kvm_moved_away_huge(ctx: Context, variant: str) -> None:
    """A huge page that a processor has mapped is missing to it when UFFDIO_MOVE takes it, or a page of it."""
    area = huge_area(ctx)
    other = ctx.allocate(area.nr_pages)
    for each in (area, other):
        ctx.uffd.register(each.range, MISSING)
    with guest(area, other) as cpu, promise("KV-09"):
        for page in (0, 7, area.nr_pages - 1):
            undisturbed(ctx.uffd, partial(cpu.poke, area.page(page).start, b"used"))
        where = area.page(7) if variant == "page" else area.range
        there = other.page(7).start
        ctx.uffd.move(there if variant == "page" else other.start, where.start, where.len)
        expect(undisturbed(ctx.uffd, partial(cpu.peek, there)), b"used", "what the processor reads where it went")
        with vcpu_faulting(cpu, ctx.uffd, area.page(7).start, "write"):
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.zeropage(area.page(7))
        expect(peek(there, 4), b"used", "what was moved, after a write where it was")
        if variant == "page":
            for page in (0, 6, 8, area.nr_pages - 1):
                expect_vcpu_sees(cpu, ctx.uffd, Range(area.page(page).start, 64))
        else:
            with vcpu_faulting(cpu, ctx.uffd, area.page(0).start):
                ctx.uffd.zeropage(area.page(0))
        ctx.uffd.expect_no_message()


@uffd_case("kvm-unmapped", mem=ALL, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES, rows=("KV-09",))
def test_kvm_unmapped(ctx: Context) -> None:
    """Of memory that is unmapped a processor sees nothing: KVM_RUN fails with EFAULT; what stays is as it was."""
    with guest(ctx.dst) as cpu, promise("KV-09"):
        _used(ctx, cpu)
        unmap(ctx.dst.page(1, 2))
        for page in (1, 2):
            with fails(EFAULT):
                undisturbed(ctx.uffd, partial(cpu.peek, ctx.dst.page(page).start))
        _expect_kept(ctx, cpu, 0, 3, 4)
        _drop(ctx, ctx.dst.page(3))
        _expect_served(ctx, cpu, 3)


@uffd_case(
    "kvm-unmapped-event", mem=ALL, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES, features=UNMAP,
    rows=("KV-09",),
)  # fmt: skip
def test_kvm_unmapped_event(ctx: Context) -> None:
    """munmap(2) of what a processor uses is announced, and the processor gets EFAULT then."""
    with guest(ctx.dst) as cpu, promise("KV-09"):
        _used(ctx, cpu)
        where = ctx.dst.page(1, 2)
        announced(ctx.uffd, partial(unmap, where), unmapped(where))
        with fails(EFAULT):
            undisturbed(ctx.uffd, partial(cpu.peek, where.start))
        _expect_kept(ctx, cpu, 0, 3, 4)


def _remapped(ctx: Context, cpu: Processor, flags: int) -> tuple[Range, Range]:
    """Move three pages that a processor has used, and return where they were and are."""
    _used(ctx, cpu)
    target = ctx.allocate()
    where, there = ctx.dst.page(1, 3), target.page(1, 3)
    announced(ctx.uffd, partial(remap, where, to=there.start, flags=flags), moved(where, there.start))
    _expect_kept(ctx, cpu, 0, 4)
    poke(there.start, b"else")
    return where, there


def _expect_elsewhere(ctx: Context, there: Range) -> None:
    expect(peek(there.start, 4), b"else", "what is in the page that went")
    with guest(there) as second:
        seen = undisturbed(ctx.uffd, partial(second.peek, there.start))
        expect(seen, b"else", "what a processor reads where the page is now")


@uffd_case(
    "kvm-remapped", mem=ALL, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES, spare_hugepages=PAGES,
    features=REMAP, rows=("KV-09",),
)  # fmt: skip
def test_kvm_remapped(ctx: Context) -> None:
    """Where mremap(2) took its pages from a processor gets EFAULT, and never the old bytes."""
    with guest(ctx.dst) as cpu, promise("KV-09"):
        where, there = _remapped(ctx, cpu, 0)
        with fails(EFAULT):
            undisturbed(ctx.uffd, partial(cpu.peek, where.start))
        _expect_elsewhere(ctx, there)


@uffd_case(
    "kvm-remapped-dontunmap", mem=NOT_HUGETLB, needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=REMAP,
    rows=("KV-09",),
)  # fmt: skip
def test_kvm_remapped_dontunmap(ctx: Context) -> None:
    """Where MREMAP_DONTUNMAP took a processor's pages from they are missing to it, but those of a shared file."""
    with guest(ctx.dst) as cpu, promise("KV-09"):
        where, there = _remapped(ctx, cpu, MREMAP_DONTUNMAP)
        if ctx.mem.shared:
            seen = undisturbed(ctx.uffd, partial(cpu.peek, where.start))
            expect(seen, b"else", "what the processor reads of the page in the file")
        else:
            with vcpu_faulting(cpu, ctx.uffd, where.start, "write"):
                copy(ctx, 1)
        _expect_elsewhere(ctx, there)


@uffd_case(
    "kvm-mapped-over", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, spare_hugepages=PAGES, rows=("KV-09",)
)
def test_kvm_mapped_over(ctx: Context) -> None:
    """Where other memory is mapped over what a processor used it sees that, and no message comes of it."""
    with guest(ctx.dst) as cpu, promise("KV-09"):
        _used(ctx, cpu)
        other = ctx.allocate()
        poke(other.page(2).start, b"over")
        remap(other.page(2), to=ctx.dst.page(2).start)
        seen = undisturbed(ctx.uffd, partial(cpu.peek, ctx.dst.page(2).start))
        expect(seen, b"over", "what the processor reads")
        undisturbed(ctx.uffd, partial(cpu.poke, ctx.dst.page(2).start, b"both"))
        expect(peek(ctx.dst.page(2).start, 4), b"both", "what it wrote")
        _expect_kept(ctx, cpu, 0, 1, 3, 4)


@uffd_case("kvm-collapsed", mem=(ANON,), needs=(*KVM, "thp"), post_alloc=reports_kvm, pages=PAGES, rows=("KV-09",))
def test_kvm_collapsed(ctx: Context) -> None:
    """Small pages that a processor has written and the kernel makes one huge page of are neither lost nor reported."""
    require_collapse(ctx)
    area = small_area(ctx)
    ctx.uffd.register(area.range, MISSING)
    with guest(area) as cpu, promise("KV-09"):
        for page in (0, 7, area.nr_pages - 1):
            undisturbed(ctx.uffd, partial(cpu.poke, area.page(page).start, b"used"))
        collapse(area.range)
        for page in (0, 7, area.nr_pages - 1):
            expect(undisturbed(ctx.uffd, partial(cpu.peek, area.page(page).start)), b"used", "what the processor reads")
            undisturbed(ctx.uffd, partial(cpu.poke, area.page(page).start, b"more"))
            expect(peek(area.page(page).start, 4), b"more", "what it wrote")
        advise(area.page(7), Advice.DONTNEED)
        with vcpu_faulting(cpu, ctx.uffd, area.page(7).start):
            ctx.uffd.zeropage(area.page(7))
        expect(undisturbed(ctx.uffd, partial(cpu.peek, area.page(8).start, 8)), peek(area.page(8).start, 8), "page 8")
