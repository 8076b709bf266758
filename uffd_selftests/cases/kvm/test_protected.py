# SPDX-License-Identifier: GPL-2.0-only
"""A virtual processor and protected pages: what it had mapped before it has to fault in again."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC_RWP, KVM, MISSING, NEW, PAGE_SIZE, READ_TRAPPED, RWP, SYNC_RWP, TRAPPED, WP, WRITEPROTECT,
    WRITE_TRAPPED, Area, Context, CopyMode, Feature, Machine, Pagemap, Processor, Range, Uffd, copy, expect,
    expect_accessed, expect_vcpu_free, expect_vcpu_sees, expect_vcpu_trapped, fetched, filled, guest, huge_area, peek,
    poke, prepare, promise, reports_kvm, rwp_filled, undisturbed, vcpu_faulting, vcpu_trapped,
)  # fmt: skip

PAGES = 5
BEFORE = ("untouched", "read", "written")
"""What a processor has done with the pages before they are protected."""
UNPOPULATED = WRITEPROTECT | Feature.WP_UNPOPULATED


def _use(cpu: Processor, uffd: Uffd, area: Area, before: str) -> None:
    """Have a processor map all pages, or none."""
    if before != "untouched":
        expect_vcpu_free(cpu, uffd, area, range(area.nr_pages), "read", *(["write"] if before == "written" else []))


@uffd_case(
    "kvm-wp", mem=ALL, variants=BEFORE, needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=WRITEPROTECT,
    rows=("KV-04",),
)  # fmt: skip
def test_kvm_wp(ctx: Context, variant: str) -> None:
    """A processor's next write to a page traps once UFFDIO_WRITEPROTECT has returned, whatever it had mapped before."""
    area = filled(ctx)
    with guest(area) as cpu, promise("KV-04"):
        _use(cpu, ctx.uffd, area, variant)
        ctx.uffd.writeprotect(area.page(1, 3))
        Pagemap.expect_protected(area, {1, 2, 3}, "after UFFDIO_WRITEPROTECT of three pages")
        for page in (1, 2, 3):
            expect_vcpu_sees(cpu, ctx.uffd, Range(area.page(page).start, PAGE_SIZE))
        expect_vcpu_free(cpu, ctx.uffd, area, (0, 4), "read", "write")
        Pagemap.expect_protected(area, {1, 2, 3}, "after reads of a processor, and writes beside them")
        for page in (1, 3, 2):
            expect_vcpu_trapped(cpu, ctx.uffd, area, page, flags=TRAPPED, resolve=ctx.uffd.unprotect)
            expect_vcpu_free(cpu, ctx.uffd, area, (page,), "write")
        Pagemap.expect_protected(area, (), "when all have been let go on")
        ctx.uffd.writeprotect(area.range)
        expect_vcpu_trapped(cpu, ctx.uffd, area, 2, 0, flags=TRAPPED, resolve=ctx.uffd.unprotect, access="increment")
        Pagemap.expect_protected(area, {1, 3, 4}, "after an increment of the others")


@uffd_case(
    "kvm-wp-released", mem=ALL, variants=("unregister", "close", "unprotect"), needs=KVM, post_alloc=reports_kvm,
    pages=PAGES, features=WRITEPROTECT, rows=("KV-04",),
)  # fmt: skip
def test_kvm_wp_released(ctx: Context, variant: str) -> None:
    """Processors that wait before protected pages all go on when the protection ends, and nothing stops them again."""
    area = filled(ctx)
    with Machine(area, processors=2) as machine, ExitStack() as stack, promise("KV-04"):
        for cpu in machine.processors:
            _use(cpu, ctx.uffd, area, "written")
        ctx.uffd.writeprotect(area.range)
        waiters = [
            stack.enter_context(vcpu_faulting(cpu, ctx.uffd, area.page(page).start + 4, "write", flags=TRAPPED))
            for page, cpu in enumerate(machine.processors, 1)
        ]
        ctx.uffd.expect_still_asleep(2)
        if variant == "close":
            ctx.uffd.close()
        elif variant == "unregister":
            ctx.uffd.release(area.range)
        else:
            ctx.uffd.unprotect(area.range)
        for page, waiter in enumerate(waiters, 1):
            waiter.result()
            expect(peek(area.page(page).start + 4, 4), NEW[:4], "what was written")
        Pagemap.expect_protected(area, (), f"after {variant}")
        for cpu in machine.processors:
            cpu.poke(area.page(0).start, b"free")
            cpu.poke(area.page(4).start, b"free")


@uffd_case(
    "kvm-wp-filled", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=WRITEPROTECT, rows=("KV-04",)
)
def test_kvm_wp_filled(ctx: Context) -> None:
    """A page that UFFDIO_COPY brings protected a processor reads, and its write to it traps."""
    prepare(ctx, MISSING | WP)
    with guest(ctx.dst) as cpu:
        for page in (2, 0, 4):
            with promise("KV-04", f"page {page}"):
                with vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(page).start):
                    copy(ctx, page, 1, CopyMode.WP)
                expect_vcpu_sees(cpu, ctx.uffd, Range(ctx.dst.page(page).start, PAGE_SIZE))
                Pagemap.expect_protected(ctx.dst, {page}, "after a processor's read")
                expect_vcpu_trapped(cpu, ctx.uffd, ctx.dst, page, flags=TRAPPED, resolve=ctx.uffd.unprotect)
        with promise("KV-04", "a write to a missing page that comes protected"):
            with vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(1).start, "write"):
                copy(ctx, 1, 1, CopyMode.WP)
                ctx.uffd.wait_fault(ctx.dst.page(1).start, TRAPPED)
                ctx.uffd.unprotect(ctx.dst.page(1))
            expect(peek(ctx.dst.page(1).start, 4), NEW[:4], "what was written")


@uffd_case(
    "kvm-wp-hole", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=UNPOPULATED, rows=("KV-04",)
)
def test_kvm_wp_hole(ctx: Context) -> None:
    """A processor's write traps where the protected page is not there, too; it reads zeroes without a message."""
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.page(1, 3))
    with guest(ctx.dst) as cpu, promise("KV-04"):
        expect_vcpu_free(cpu, ctx.uffd, ctx.dst, (0, 4), "read", "write")
        expect_vcpu_sees(cpu, ctx.uffd, Range(ctx.dst.page(2).start, 64), bytes(64))
        for page in (2, 1, 3):
            with promise(f"page {page}"), vcpu_trapped(cpu, ctx.uffd, ctx.dst, page, flags=TRAPPED):
                ctx.uffd.unprotect(ctx.dst.page(page))
        expect_vcpu_free(cpu, ctx.uffd, ctx.dst, range(PAGES), "read", "write")


@uffd_case(
    "kvm-wp-huge", mem=(ANON,), variants=("page", "all"), needs=(*KVM, "thp"), post_alloc=reports_kvm, pages=PAGES,
    features=WRITEPROTECT, rows=("KV-04",),
)  # fmt: skip
def test_kvm_wp_huge(ctx: Context, variant: str) -> None:
    """Of a transparent huge page that a processor has mapped, a page or the whole traps its writes when protected."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    last = area.nr_pages - 1
    with guest(area) as cpu, promise("KV-04"):
        expect_vcpu_free(cpu, ctx.uffd, area, (0, 7, last), "read", "write")
        protected = (7,) if variant == "page" else (0, 7, last)
        ctx.uffd.writeprotect(area.page(7) if variant == "page" else area.range)
        Pagemap.expect_protected(area, {7} if variant == "page" else range(area.nr_pages), "after UFFDIO_WRITEPROTECT")
        expect_vcpu_free(cpu, ctx.uffd, area, (0, 6, 7, 8, last), "read")
        if variant == "page":
            expect_vcpu_free(cpu, ctx.uffd, area, (0, 6, 8, last), "write")
        for page in protected:
            expect_vcpu_trapped(cpu, ctx.uffd, area, page, flags=TRAPPED, resolve=ctx.uffd.unprotect)
        ctx.uffd.unprotect(area.range)
        expect_vcpu_free(cpu, ctx.uffd, area, (0, 1, 6, 7, 8, last), "read", "write")


# ---- read-write protection -----------------------------------------------------------------------------------------


def _rwp(area: Area) -> None:
    """Put code into each page, behind what is looked at otherwise."""
    for page in range(area.nr_pages):
        poke(area.page(page).start + 64, fetched(bytes([page, 1, 2, 3])))


@uffd_case(
    "kvm-rwp", mem=ALL, variants=BEFORE, needs=KVM, post_alloc=reports_kvm, pages=PAGES, features=SYNC_RWP,
    rows=("KV-05",),
)  # fmt: skip
def test_kvm_rwp(ctx: Context, variant: str) -> None:
    """A processor's next access to a page traps once UFFDIO_RWPROTECT has returned, whatever it had mapped before."""
    area = rwp_filled(ctx)
    _rwp(area)
    with guest(area) as cpu, promise("KV-05"):
        _use(cpu, ctx.uffd, area, variant)
        ctx.uffd.rwprotect(area.page(1, 3))
        Pagemap.expect_protected(area, {1, 2, 3}, "after UFFDIO_RWPROTECT of three pages")
        expect_vcpu_free(cpu, ctx.uffd, area, (0, 4), "read", "write")
        Pagemap.expect_protected(area, {1, 2, 3}, "after accesses beside them")
        for page, access, flags in ((1, "read", READ_TRAPPED), (3, "write", WRITE_TRAPPED)):
            expect_vcpu_trapped(cpu, ctx.uffd, area, page, flags=flags, resolve=ctx.uffd.resolve, access=access)
            expect_vcpu_free(cpu, ctx.uffd, area, (page,), "read", "write")
        Pagemap.expect_protected(area, {2}, "when two have been let go on")
        start = area.page(2).start
        with vcpu_faulting(cpu, ctx.uffd, start + 64, "fetch", flags=READ_TRAPPED, at=start) as waiter:
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.resolve(area.page(2))
        expect(waiter.result(), b"\x02\x01\x02\x03", "what the code returned")
        ctx.uffd.expect_no_message()
        for page in range(PAGES):
            expect_vcpu_sees(cpu, ctx.uffd, Range(area.page(page).start, PAGE_SIZE))


@uffd_case(
    "kvm-rwp-released", mem=ALL, variants=("unregister", "close"), needs=KVM, post_alloc=reports_kvm, pages=PAGES,
    features=SYNC_RWP, rows=("KV-05",),
)  # fmt: skip
def test_kvm_rwp_released(ctx: Context, variant: str) -> None:
    """Processors that wait before read-write-protected pages go on when they are unregistered or the handle closed."""
    area = rwp_filled(ctx)
    with Machine(area, processors=2) as machine, ExitStack() as stack, promise("KV-05"):
        for cpu in machine.processors:
            _use(cpu, ctx.uffd, area, "written")
        before = peek(area.page(1).start, 4)
        ctx.uffd.rwprotect(area.range)
        reader, writer = machine.processors
        read = stack.enter_context(vcpu_faulting(reader, ctx.uffd, area.page(1).start, flags=READ_TRAPPED))
        write = stack.enter_context(vcpu_faulting(writer, ctx.uffd, area.page(3).start, "write", flags=WRITE_TRAPPED))
        ctx.uffd.expect_still_asleep(2)
        if variant == "close":
            ctx.uffd.close()
        else:
            ctx.uffd.release(area.range)
        expect(read.result(), before, "what was read")
        write.result()
        expect(peek(area.page(3).start, 4), NEW[:4], "what was written")
        Pagemap.expect_protected(area, (), f"after {variant}")
        reader.poke(area.page(0).start, b"free")
        expect(writer.peek(area.page(0).start), b"free", "what the other processor reads")


@uffd_case(
    "kvm-rwp-huge", mem=(ANON,), variants=("page", "all"), needs=(*KVM, "thp"), post_alloc=reports_kvm, pages=PAGES,
    features=SYNC_RWP, rows=("KV-05",),
)  # fmt: skip
def test_kvm_rwp_huge(ctx: Context, variant: str) -> None:
    """Of a transparent huge page that a processor has mapped, a page or the whole traps accesses when protected."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, RWP)
    last = area.nr_pages - 1
    with guest(area) as cpu, promise("KV-05"):
        expect_vcpu_free(cpu, ctx.uffd, area, (0, 7, last), "read", "write")
        ctx.uffd.rwprotect(area.page(7) if variant == "page" else area.range)
        Pagemap.expect_protected(area, {7} if variant == "page" else range(area.nr_pages), "after UFFDIO_RWPROTECT")
        if variant == "page":
            expect_vcpu_free(cpu, ctx.uffd, area, (0, 6, 8, last), "read", "write")
        for page in (7,) if variant == "page" else (0, 7, last):
            access, flags = ("write", WRITE_TRAPPED) if page == 7 else ("read", READ_TRAPPED)
            expect_vcpu_trapped(cpu, ctx.uffd, area, page, flags=flags, resolve=ctx.uffd.resolve, access=access)
        ctx.uffd.resolve(area.range)
        expect_vcpu_free(cpu, ctx.uffd, area, (0, 1, 6, 7, 8, last), "read", "write")


@uffd_case(
    "kvm-rwp-async", mem=ALL, needs=(*KVM, "pagemap_scan"), post_alloc=reports_kvm, pages=PAGES, features=ASYNC_RWP,
    rows=("KV-05",),
)  # fmt: skip
def test_kvm_rwp_async(ctx: Context) -> None:
    """With RWP_ASYNC a processor goes on by itself, and PAGEMAP_SCAN tells each page that it has accessed since."""
    area = rwp_filled(ctx)
    _rwp(area)
    with guest(area) as cpu, promise("KV-05"):
        _use(cpu, ctx.uffd, area, "written")
        for accesses in ({1: "read", 3: "write"}, {2: "fetch"}, {0: "write", 1: "fetch", 4: "read"}):
            ctx.uffd.rwprotect(area.range)
            Pagemap.expect_protected(area, range(PAGES), "after UFFDIO_RWPROTECT")
            for page, access in accesses.items():
                start = area.page(page).start
                if access == "fetch":
                    undisturbed(ctx.uffd, partial(cpu.fetch, start + 64))
                else:
                    _go_free(cpu, ctx.uffd, start, access)
            told = ", ".join(f"{access} of page {page}" for page, access in accesses.items())
            expect_accessed(area, accesses, f"after a processor's {told}")


def _go_free(cpu: Processor, uffd: Uffd, start: int, access: str) -> None:
    """Assert that nothing stops a single access, with none of this process before it."""
    undisturbed(uffd, partial(cpu.poke, start, b"one!") if access == "write" else partial(cpu.peek, start))
