# SPDX-License-Identifier: GPL-2.0-only
"""A virtual processor that meets a missing page: its message, and what lets it go on."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, KVM, KVM_PAGING, MINOR_FAULTS, MISSING, NEW, NOT_HUGETLB, PAGE_SIZE, SHARED, WRITE, Cap, Context,
    CopyMode, Feature, Machine, PagefaultFlag, Pagemap, Range, Waiter, cached, copy, expect, expect_vcpu_sees, faulting,
    fetched, guest, move, peek, poke, prepare, promise, reports_kvm, require_cap, thread_told, undisturbed,
    vcpu_faulting,
)  # fmt: skip

PAGES = 5
FILLS = ("read", "write", "fetch")
CODE = fetched(b"\x11\x22\x33\x44")


def _looked_at(page: Range) -> list[Range]:
    """Return the base pages of a page that are read whole: three of a huge page."""
    last = page.len // PAGE_SIZE - 1
    return [Range(page.start + at * PAGE_SIZE, PAGE_SIZE) for at in sorted({0, last // 2, last})]


@uffd_case("kvm-missing", mem=ALL, variants=FILLS, needs=KVM, post_alloc=reports_kvm, pages=PAGES, rows=("KV-01",))
def test_kvm_missing(ctx: Context, variant: str) -> None:
    """A processor that meets a missing page causes one message, and goes on with what UFFDIO_COPY brings."""
    prepare(ctx)
    for page in range(PAGES):
        poke(ctx.src.page(page).start, CODE)
    with guest(ctx.dst) as cpu:
        for page in (2, 0, PAGES - 1, 1):
            with promise("KV-01", f"page {page}"):
                start = ctx.dst.page(page).start
                with vcpu_faulting(cpu, ctx.uffd, start, variant) as waiter:
                    ctx.uffd.expect_still_asleep(1)
                    copy(ctx, page)
                ctx.uffd.expect_no_message()
                brought = peek(ctx.src.page(page).start, ctx.page_size)
                if variant == "write":
                    brought = NEW[:4] + brought[4:]
                else:
                    expect(waiter.result(), CODE[1:5] if variant == "fetch" else CODE[:4], f"result of the {variant}")
                for where in _looked_at(ctx.dst.page(page)):
                    at = where.start - start
                    expect_vcpu_sees(cpu, ctx.uffd, where, brought[at : at + where.len])
                expect(peek(start, ctx.page_size) == brought, True, "whether the page is what was brought and written")
        expect(Pagemap.filled(ctx.dst.range, ctx.page_size), [True, True, True, False, True], "pages that are there")


@uffd_case(
    "kvm-missing-address",
    mem=ALL,
    needs=KVM_PAGING,
    post_alloc=reports_kvm,
    pages=PAGES,
    rows=("KV-01",),
    kind=Kind.DETAIL,
)
def test_kvm_missing_address(ctx: Context) -> None:
    """The message of a processor names the page, wherever in it the access is."""
    _at_addresses(ctx, ctx.page_size)


@uffd_case(
    "kvm-missing-exact-address", mem=ALL, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES,
    features=Feature.EXACT_ADDRESS, rows=("KV-01",), kind=Kind.DETAIL,
)  # fmt: skip
def test_kvm_missing_exact_address(ctx: Context) -> None:
    """With EXACT_ADDRESS the message of a processor names the base page, no byte in it: KVM asks for pages."""
    _at_addresses(ctx, PAGE_SIZE)


def _at_addresses(ctx: Context, unit: int) -> None:
    prepare(ctx)
    with guest(ctx.dst) as cpu:
        last = ctx.page_size - PAGE_SIZE
        for page, within, access in (
            (1, 8, "read"),
            (3, last + PAGE_SIZE - 4, "write"),
            (2, last // 2 + 0x123, "read"),
        ):
            address = ctx.dst.page(page).start + within
            with promise("KV-01", f"{access} at byte {within} of page {page}"):
                with vcpu_faulting(cpu, ctx.uffd, address, access, at=address & -unit):
                    copy(ctx, page)
                ctx.uffd.expect_no_message()


@uffd_case(
    "kvm-missing-crossing", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, rows=("KV-01",), kind=Kind.DETAIL
)
def test_kvm_missing_crossing(ctx: Context) -> None:
    """A load that lies in two missing pages causes a message for each, and gets the bytes of both."""
    prepare(ctx)
    border = ctx.dst.page(2).start
    with guest(ctx.dst) as cpu, promise("KV-01"), Waiter(partial(cpu.peek, border - 2)) as waiter:
        seen = []
        for _ in range(2):
            fault = ctx.uffd.wait_fault(ctx.dst.range)
            seen.append((fault.address - ctx.dst.start) // ctx.page_size)
            copy(ctx, seen[-1])
        expect(waiter.result(), peek(ctx.src.page(2).start - 2, 4), "what the load got")
        expect(sorted(seen), [1, 2], "pages with a message")
        ctx.uffd.expect_no_message()


@uffd_case("kvm-increment", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, rows=("KV-01",))
def test_kvm_increment(ctx: Context) -> None:
    """A processor's read-modify-write of a missing page is done once, on what a handler brings."""
    prepare(ctx)
    poke(ctx.src.page(2).start, b"\xff\xff\x00\x00")
    with guest(ctx.dst) as cpu, promise("KV-01"):
        with ctx.handler() as handler:
            cpu.increment(ctx.dst.page(2).start)
        expect(handler.stats.missing in (1, 2), True, "whether there is one message, or one for the read and the write")
        expect(peek(ctx.dst.page(2).start, 4), b"\x00\x00\x01\x00", "the word")
        undisturbed(ctx.uffd, partial(cpu.increment, ctx.dst.page(2).start))
        expect(peek(ctx.dst.page(2).start, 4), b"\x01\x00\x01\x00", "the word after another one")


@uffd_case(
    "kvm-zeropage",
    mem=NOT_HUGETLB,
    variants=("read", "write"),
    needs=KVM,
    post_alloc=reports_kvm,
    pages=PAGES,
    rows=("KV-01",),
)
def test_kvm_zeropage(ctx: Context, variant: str) -> None:
    """A processor goes on with zeroes that UFFDIO_ZEROPAGE maps, and whatever is written afterwards both sides see."""
    prepare(ctx)
    where = ctx.dst.page(2)
    with guest(ctx.dst) as cpu, promise("KV-01"):
        with vcpu_faulting(cpu, ctx.uffd, where.start, variant):
            ctx.uffd.zeropage(where)
        if variant == "read":
            expect_vcpu_sees(cpu, ctx.uffd, where, bytes(PAGE_SIZE))
        undisturbed(ctx.uffd, partial(cpu.poke, where.start + 8, b"both"))
        written = NEW[:4] if variant == "write" else bytes(4)
        expect(peek(where.start, 16), written + bytes(4) + b"both" + bytes(4), "the page's beginning")
        poke(where.start + 12, b"here")
        expect_vcpu_sees(cpu, ctx.uffd, where, written + bytes(4) + b"bothhere" + bytes(PAGE_SIZE - 16))


@uffd_case(
    "kvm-thread-id",
    mem=ALL,
    needs=KVM,
    post_alloc=reports_kvm,
    pages=2,
    features=Feature.THREAD_ID,
    rows=("KV-02",),
    kind=Kind.DETAIL,
)
def test_kvm_thread_id(ctx: Context) -> None:
    """UFFD_FEATURE_THREAD_ID names the thread in KVM_RUN, also where another thread has made the processor."""
    prepare(ctx)
    with guest(ctx.dst) as cpu:
        for page, access in enumerate(("read", "write")):
            with promise("KV-02", access), vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(page).start, access) as waiter:
                expect(thread_told(waiter), waiter.tid, "pagefault.feat.ptid")
                copy(ctx, page)


@uffd_case(
    "kvm-minor",
    mem=SHARED,
    variants=("read", "write"),
    needs=KVM,
    post_alloc=reports_kvm,
    pages=PAGES,
    features=MINOR_FAULTS,
    rows=("KV-03",),
)
def test_kvm_minor(ctx: Context, variant: str) -> None:
    """A processor that meets a page of the cache causes a minor fault, and after UFFDIO_CONTINUE sees what is there."""
    flags = PagefaultFlag.MINOR | (WRITE if variant == "write" else PagefaultFlag(0))
    with cached(ctx) as view, guest(ctx.dst) as cpu:
        for page in (2, 0, PAGES - 1):
            with promise("KV-03", f"page {page}"):
                where, at = ctx.dst.page(page), view.start + page * ctx.page_size
                with vcpu_faulting(cpu, ctx.uffd, where.start, variant, flags=flags):
                    poke(at + 4, b"written before")
                    ctx.uffd.expect_still_asleep(1)
                    ctx.uffd.continue_(where)
                ctx.uffd.expect_no_message()
                for part in _looked_at(where):
                    there = peek(at + part.start - where.start, part.len)
                    expect_vcpu_sees(cpu, ctx.uffd, part, there)
                expect(peek(at + 4, 14), b"written before", "what the file has")
                undisturbed(ctx.uffd, partial(cpu.poke, where.start + 32, b"after"))
                expect(peek(at + 32, 5), b"after", "what the file has of the processor's write")
        expect(Pagemap.filled(ctx.dst.range, ctx.page_size), [True, False, True, False, True], "pages that are mapped")


@uffd_case(
    "kvm-filled-by-move",
    mem=(ANON,),
    needs=KVM,
    post_alloc=reports_kvm,
    pages=PAGES,
    features=Feature.MOVE,
    rows=("KV-01",),
)
def test_kvm_filled_by_move(ctx: Context) -> None:
    """A processor goes on with a page that UFFDIO_MOVE brings, and its writes go to that one."""
    prepare(ctx)
    brought = peek(ctx.src.page(2).start, PAGE_SIZE)
    with guest(ctx.dst) as cpu, promise("KV-01"):
        with vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(2).start, "write"):
            move(ctx, 2)
        expect_vcpu_sees(cpu, ctx.uffd, ctx.dst.page(2), NEW[:4] + brought[4:])
        expect(peek(ctx.dst.page(2).start, PAGE_SIZE), NEW[:4] + brought[4:], "the page here")


@uffd_case("kvm-dontwake", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, rows=("KV-01",))
def test_kvm_dontwake(ctx: Context) -> None:
    """A processor sleeps on after UFFDIO_COPY with DONTWAKE and a wake beside it, until it is woken."""
    prepare(ctx)
    with guest(ctx.dst) as cpu, promise("KV-01"):
        with vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(2).start) as waiter:
            copy(ctx, 2, 1, CopyMode.DONTWAKE)
            copy(ctx, 1)
            copy(ctx, 3)
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.wake(ctx.dst.page(1))
            ctx.uffd.expect_still_asleep(1)
            ctx.uffd.wake(ctx.dst.page(2))
        expect(waiter.result(), peek(ctx.src.page(2).start, 4), "what the processor read")
        ctx.uffd.expect_no_message()


@uffd_case(
    "kvm-prefault", mem=ALL, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES, rows=("KV-15",), kind=Kind.DETAIL
)
def test_kvm_prefault(ctx: Context) -> None:
    """KVM_PRE_FAULT_MEMORY waits for missing pages as a processor does, with a message for each."""
    prepare(ctx)
    with guest(ctx.dst) as cpu, promise("KV-15"):
        require_cap(cpu.machine, Cap.PRE_FAULT_MEMORY, "6.11")
        where = ctx.dst.page(1, 3)
        with Waiter(partial(cpu.vcpu.prefault, cpu.machine.gpa(where.start), where.len)):
            for page in (1, 2, 3):
                ctx.uffd.wait_fault(ctx.dst.page(page).start)
                ctx.uffd.expect_still_asleep(1)
                copy(ctx, page)
        ctx.uffd.expect_no_message()
        expect(Pagemap.filled(ctx.dst.range, ctx.page_size), [False, True, True, True, False], "pages that are there")
        for page in (1, 2, 3):
            start = ctx.dst.page(page).start
            expect_vcpu_sees(cpu, ctx.uffd, Range(start, PAGE_SIZE), peek(ctx.src.page(page).start, PAGE_SIZE))


# ---- several processors --------------------------------------------------------------------------------------------

SEVERAL = 3


@uffd_case(
    "kvm-several-on-a-page", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, rows=("KV-11",), kind=Kind.DETAIL
)
def test_kvm_several_on_a_page(ctx: Context) -> None:
    """Several processors and a thread that wait for one page all go on after one fill."""
    prepare(ctx)
    start = ctx.dst.page(2).start
    with Machine(ctx.dst, processors=SEVERAL) as machine, ExitStack() as stack, promise("KV-11"):
        waiters = [
            stack.enter_context(vcpu_faulting(cpu, ctx.uffd, start, access))
            for cpu, access in zip(machine.processors, ("read", "write", "read"), strict=True)
        ]
        waiters.append(stack.enter_context(faulting(ctx.uffd, start)))
        ctx.uffd.expect_still_asleep(SEVERAL + 1)
        copy(ctx, 2)
        for waiter in waiters:
            waiter.result()
        ctx.uffd.expect_no_message()
        for cpu in machine.processors:
            expect_vcpu_sees(cpu, ctx.uffd, Range(start, 16), NEW[:4] + peek(ctx.src.page(2).start + 4, 12))


@uffd_case(
    "kvm-several-pages", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, rows=("KV-11",), kind=Kind.DETAIL
)
def test_kvm_several_pages(ctx: Context) -> None:
    """Of processors that wait for a page each, a fill wakes the one whose page it brings."""
    prepare(ctx)
    with Machine(ctx.dst, processors=SEVERAL) as machine, ExitStack() as stack, promise("KV-11"):
        waiters = [
            stack.enter_context(vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(page).start))
            for page, cpu in enumerate(machine.processors, 1)
        ]
        for left, number in ((2, 1), (1, 2), (0, 0)):
            copy(ctx, number + 1)
            expect(waiters[number].result(), peek(ctx.src.page(number + 1).start, 4), "what a processor read")
            ctx.uffd.expect_still_asleep(left)


@uffd_case(
    "kvm-let-go",
    mem=ALL,
    variants=("close", "unregister"),
    needs=KVM,
    post_alloc=reports_kvm,
    pages=PAGES,
    rows=("KV-11",),
    kind=Kind.DETAIL,
)
def test_kvm_let_go(ctx: Context, variant: str) -> None:
    """Processors that sleep in faults go on with zeroes when the handle is closed, or the memory unregistered."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with Machine(ctx.dst, processors=SEVERAL) as machine, ExitStack() as stack, promise("KV-11"):
        waiters = [
            stack.enter_context(vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(page).start, access))
            for cpu, page, access in zip(machine.processors, (2, 0, 2), ("read", "write", "read"), strict=True)
        ]
        ctx.uffd.expect_still_asleep(SEVERAL)
        if variant == "close":
            ctx.uffd.close()
        else:
            ctx.uffd.release(ctx.dst.range)
        for waiter, result in zip(waiters, (bytes(4), None, bytes(4)), strict=True):
            expect(waiter.result(), result, "what the access got")
        expect(peek(ctx.dst.start, 4), NEW[:4], "what was written")
        machine.processors[0].poke(ctx.dst.page(3).start, b"free")
        expect(peek(ctx.dst.page(3).start, 4), b"free", "what is written to another page")


@uffd_case("kvm-registered-later", mem=ALL, needs=KVM, post_alloc=reports_kvm, pages=PAGES, rows=("KV-01",))
def test_kvm_registered_later(ctx: Context) -> None:
    """Memory that a processor has used before it is registered reports the pages that it lacks, and no others."""
    ctx.src.fill()
    with guest(ctx.dst) as cpu, promise("KV-01"):
        for page in (1, 3):
            cpu.poke(ctx.dst.page(page).start, b"used")
        ctx.uffd.register(ctx.dst.range, MISSING)
        for page in (1, 3):
            expect_vcpu_sees(cpu, ctx.uffd, Range(ctx.dst.page(page).start, 8), b"used" + bytes(4))
        for page in (0, 2, 4):
            with vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(page).start):
                copy(ctx, page)
        ctx.uffd.expect_no_message()
