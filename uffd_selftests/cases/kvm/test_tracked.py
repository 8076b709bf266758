# SPDX-License-Identifier: GPL-2.0-only
"""What a virtual processor has written, by asynchronous write protection, PAGEMAP_SCAN and KVM's own log."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC, KVM, PAGE_SIZE, RESTART, SCAN, WP, WRITTEN, Area, Context, Feature, Machine, Pagemap, Processor,
    Scan, Uffd, expect, expect_scan, expect_vcpu_free, expect_written, guest, huge_area, peek, promise, regions,
    reports_kvm, tracked, undisturbed,
)  # fmt: skip

PAGES = 6
HOLES = ASYNC | Feature.WP_UNPOPULATED
NEEDS = (*KVM, *SCAN)


def _write(cpu: Processor, uffd: Uffd, area: Area, *pages: int, byte: int = 0) -> None:
    """Have a processor store 4 bytes in pages, in the last base page of each; nobody may hear of it."""
    for page in pages:
        undisturbed(uffd, partial(cpu.poke, area.page(page).end - 8, bytes([byte, page & 0xFF, 0x5A, 0xA5])))


def _expect_restarted(area: Area, pages: Iterable[int], when: str) -> None:
    """Assert that these pages were written; they are protected again."""
    found = Pagemap.scan(area.range, WRITTEN, flags=RESTART, room=max(64, area.nr_pages))
    expect_scan(area, found, Scan(regions(area, pages), area.range.end), when)


def _last_base_pages(area: Area, *pages: int) -> list[int]:
    """Return the base page of each page in which _write() writes, as KVM counts them."""
    unit = area.page_size // PAGE_SIZE
    return [page * unit + unit - 1 for page in sorted(pages)]


@uffd_case("kvm-written", mem=ALL, needs=NEEDS, post_alloc=reports_kvm, pages=PAGES, features=ASYNC, rows=("KV-06",))
def test_kvm_written(ctx: Context) -> None:
    """PAGEMAP_SCAN tells exactly the pages that a processor has written since it last protected them."""
    area = tracked(ctx)
    with guest(area) as cpu, promise("KV-06"):
        for page in range(PAGES):
            undisturbed(ctx.uffd, partial(cpu.peek, area.page(page).end - 8))
        expect_written(area, (), "after a processor's reads")
        for turn, pages in enumerate(((1, 3, 4), (3,), (), (0, 3, 5))):
            _write(cpu, ctx.uffd, area, *pages, byte=turn)
            for page in pages:
                undisturbed(ctx.uffd, partial(cpu.peek, area.page(page).start))
            told = ", ".join(map(str, pages)) or "none"
            expect_written(area, pages, f"after a processor's writes to pages {told}, turn {turn}")
            _expect_restarted(area, pages, f"the same again, turn {turn}")
            expect_written(area, (), f"after PM_SCAN_WP_MATCHING, turn {turn}")
        expect(peek(area.page(3).end - 8, 4), bytes([3, 3, 0x5A, 0xA5]), "what was written last")


@uffd_case(
    "kvm-written-partly", mem=ALL, needs=NEEDS, post_alloc=reports_kvm, pages=PAGES, features=ASYNC, rows=("KV-06",)
)
def test_kvm_written_partly(ctx: Context) -> None:
    """PM_SCAN_WP_MATCHING of a part has a processor's next writes counted there, and leaves what is beside it."""
    area = tracked(ctx)
    with guest(area) as cpu, promise("KV-06"):
        _write(cpu, ctx.uffd, area, *range(PAGES), byte=1)
        found = Pagemap.scan(area.page(2, 2), WRITTEN, flags=RESTART)
        expect_scan(area, found, Scan(regions(area, (2, 3)), area.page(3).end), "pages 2 and 3")
        expect_written(area, (0, 1, 4, 5), "after PM_SCAN_WP_MATCHING of pages 2 and 3")
        _write(cpu, ctx.uffd, area, 3, 5, byte=2)
        expect_written(area, (0, 1, 3, 4, 5), "after writes to pages 3 and 5")


@uffd_case(
    "kvm-written-hole", mem=ALL, needs=NEEDS, post_alloc=reports_kvm, pages=PAGES, features=HOLES, rows=("KV-06",)
)
def test_kvm_written_hole(ctx: Context) -> None:
    """A processor's write to a protected page that was never there is told; zeroes that it reads are not."""
    area = ctx.dst
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    with guest(area) as cpu, promise("KV-06"):
        expect(undisturbed(ctx.uffd, partial(cpu.peek, area.page(1).start)), bytes(4), "what the processor reads")
        expect_written(area, (), "after a processor's read")
        _write(cpu, ctx.uffd, area, 1, 4)
        expect_written(area, (1, 4), "after a processor's writes to pages 1 and 4")
        _expect_restarted(area, (1, 4), "the same again")
        _write(cpu, ctx.uffd, area, 1, 2)
        expect_written(area, (1, 2), "after writes to pages 1 and 2")


@uffd_case(
    "kvm-written-huge", mem=(ANON,), needs=(*NEEDS, "thp"), post_alloc=reports_kvm, pages=PAGES, features=ASYNC,
    rows=("KV-06",),
)  # fmt: skip
def test_kvm_written_huge(ctx: Context) -> None:
    """Of a transparent huge page that a processor had mapped, the pages that it has written are told, each time."""
    area = huge_area(ctx)
    last = area.nr_pages - 1
    ctx.uffd.register(area.range, WP)
    with guest(area) as cpu, promise("KV-06"):
        expect_vcpu_free(cpu, ctx.uffd, area, (0, last), "read", "write")
        ctx.uffd.writeprotect(area.range)
        for turn, pages in enumerate(((7, last), (0, 7), (8,))):
            _write(cpu, ctx.uffd, area, *pages, byte=turn)
            found = Pagemap.scan(area.range, WRITTEN, flags=RESTART).regions
            seen = {page for start, end, _ in found for page in range(start, end, PAGE_SIZE)}
            missed = [page for page in pages if area.page(page).start not in seen]
            expect(missed, [], f"pages that were written and are not told, turn {turn}")
            expect_written(area, (), f"after PM_SCAN_WP_MATCHING, turn {turn}")


@uffd_case(
    "kvm-written-and-logged", mem=ALL, needs=NEEDS, post_alloc=reports_kvm, pages=PAGES, features=ASYNC,
    rows=("KV-06",),
)  # fmt: skip
def test_kvm_written_and_logged(ctx: Context) -> None:
    """PAGEMAP_SCAN and KVM_GET_DIRTY_LOG each tell all writes since they were last asked, whoever was asked between."""
    area = tracked(ctx)
    with Machine(area, log_dirty=True) as machine, promise("KV-06"):
        (cpu,) = machine.processors

        def log(*pages: int) -> None:
            """Ask KVM."""
            expect(machine.dirty_pages(), _last_base_pages(area, *pages), "base pages in KVM's log")

        _write(cpu, ctx.uffd, area, 1, 3, byte=1)
        log(1, 3)
        log()
        _write(cpu, ctx.uffd, area, 3, 4, byte=2)
        log(3, 4)
        _expect_restarted(area, (1, 3, 4), "after two turns with KVM's log asked between")
        _write(cpu, ctx.uffd, area, 3, byte=3)
        _expect_restarted(area, (3,), "with KVM's log asked before")
        _write(cpu, ctx.uffd, area, 3, 5, byte=4)
        _expect_restarted(area, (3, 5), "with KVM's log not asked since")
        log(3, 5)
        _write(cpu, ctx.uffd, area, 5, 0, byte=5)
        log(0, 5)
        _write(cpu, ctx.uffd, area, 0, byte=6)
        log(0)
        expect_written(area, (0, 5), "at the end")
        expect(peek(area.page(0).end - 8, 1), b"\x06", "what was written last")
