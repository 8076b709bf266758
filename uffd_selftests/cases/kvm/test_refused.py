# SPDX-License-Identifier: GPL-2.0-only
"""A virtual processor whose fault nobody is told of: UFFD_FEATURE_SIGBUS, UFFD_USER_MODE_ONLY, poison, no memory."""

from __future__ import annotations

import signal
from errno import EFAULT, EINTR
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, DEFAULT_FLAGS, KVM_PAGING, MISSING, NEW, PAGE_SIZE, PROT_NONE, SYNC_RWP, USER_MODE_ONLY, WRITEPROTECT, Advice,
    Context, Feature, Pagemap, Processor, Range, Uffd, advise, copy, expect, expect_vcpu_sees, fails, faulting, guest,
    peek, prepare, promise, protect, reports_kvm, rwp_protected, signals_of_kvm, tracked, undisturbed, vcpu_access,
    vcpu_faulting,
)  # fmt: skip

PAGES = 5
ACCESSES = ("read", "write")


def _expect_refused(cpu: Processor, uffd: Uffd, access: str, address: int, *, times: int = 2) -> None:
    """Assert that KVM_RUN fails with EFAULT, again and again, without a message and without having gone on."""

    def refused() -> None:
        with fails(EFAULT):
            vcpu_access(cpu, access, address)()
        for _ in range(1, times):
            with fails(EFAULT):
                cpu.go_on()

    undisturbed(uffd, refused)
    uffd.expect_asleep(0)


def _go_on(ctx: Context, cpu: Processor, access: str, page: int, expected: bytes) -> None:
    """Assert that the processor makes its access now, at the instruction at which it was stopped."""
    value = undisturbed(ctx.uffd, cpu.go_on)
    if access == "read":
        expect(value.to_bytes(4, "little"), expected, "what the processor read when it went on")
    else:
        expect(peek(ctx.dst.page(page).start, 4), NEW[:4], "what the processor wrote when it went on")


@uffd_case(
    "kvm-sigbus", mem=ALL, variants=ACCESSES, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES,
    features=Feature.SIGBUS, rows=("KV-07",),
)  # fmt: skip
def test_kvm_sigbus(ctx: Context, variant: str) -> None:
    """With UFFD_FEATURE_SIGBUS a processor at a missing page has KVM_RUN fail with EFAULT, until the page is filled."""
    prepare(ctx)
    _refused_until_filled(ctx, variant)


@uffd_case(
    "kvm-user-mode-only", mem=ALL, variants=ACCESSES, needs=(*KVM_PAGING, "user_mode_only"), pages=PAGES,
    rows=("KV-07",),
)  # fmt: skip
def test_kvm_user_mode_only(ctx: Context, variant: str) -> None:
    """With UFFD_USER_MODE_ONLY a processor at a missing page has KVM_RUN fail with EFAULT, until the page is filled."""
    expect(DEFAULT_FLAGS & USER_MODE_ONLY, USER_MODE_ONLY, "the flag of the handle")
    prepare(ctx)
    _refused_until_filled(ctx, variant)


def _refused_until_filled(ctx: Context, access: str) -> None:
    with guest(ctx.dst) as cpu, promise("KV-07"):
        for page in (2, 0, PAGES - 1):
            _expect_refused(cpu, ctx.uffd, access, ctx.dst.page(page).start, times=3)
            expect(Pagemap.filled(ctx.dst.page(page), ctx.page_size), [False], "whether the page is there")
            copy(ctx, page)
            _go_on(ctx, cpu, access, page, peek(ctx.src.page(page).start, 4))
        _expect_refused(cpu, ctx.uffd, access, ctx.dst.page(1).start)


@uffd_case(
    "kvm-wp-user-mode-only", mem=ALL, needs=(*KVM_PAGING, "user_mode_only"), pages=PAGES, features=WRITEPROTECT,
    rows=("KV-07", "KV-04"),
)  # fmt: skip
def test_kvm_wp_user_mode_only(ctx: Context) -> None:
    """With UFFD_USER_MODE_ONLY a write to a protected page has KVM_RUN fail with EFAULT, and changes nothing."""
    area = tracked(ctx)
    before = peek(area.page(2).start, 4)
    with guest(area) as cpu, promise("KV-07"):
        expect_vcpu_sees(cpu, ctx.uffd, Range(area.page(2).start, PAGE_SIZE))
        _expect_refused(cpu, ctx.uffd, "write", area.page(2).start)
        expect(peek(area.page(2).start, 4), before, "what is in the page")
        Pagemap.expect_protected(area, range(PAGES), "after a write that failed")
        ctx.uffd.unprotect(area.page(2))
        _go_on(ctx, cpu, "write", 2, b"")


@uffd_case(
    "kvm-rwp-user-mode-only", mem=ALL, needs=(*KVM_PAGING, "user_mode_only"), pages=PAGES, features=SYNC_RWP,
    rows=("KV-07", "KV-05"),
)  # fmt: skip
def test_kvm_rwp_user_mode_only(ctx: Context) -> None:
    """With UFFD_USER_MODE_ONLY an access to a read-write-protected page has KVM_RUN fail with EFAULT."""
    area = rwp_protected(ctx)
    with guest(area) as cpu, promise("KV-07"):
        for page, access in ((2, "read"), (3, "write")):
            _expect_refused(cpu, ctx.uffd, access, area.page(page).start)
            Pagemap.expect_protected(
                area, {0, 1, 2, 3, 4} if page == 2 else {0, 1, 3, 4}, "after an access that failed"
            )
            ctx.uffd.resolve(area.page(page))
            _go_on(ctx, cpu, access, page, peek(area.page(page).start, 4))


@uffd_case(
    "kvm-protect-none", mem=ALL, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES, rows=("KV-07",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_kvm_protect_none(ctx: Context) -> None:
    """Registered memory that may not be accessed at all has KVM_RUN fail with EFAULT, not a message."""
    prepare(ctx)
    copy(ctx, 2)
    with guest(ctx.dst) as cpu, promise("KV-07"):
        undisturbed(ctx.uffd, partial(cpu.peek, ctx.dst.page(2).start))
        protect(ctx.dst.range, PROT_NONE)
        for page in (2, 3):
            _expect_refused(cpu, ctx.uffd, "read", ctx.dst.page(page).start)


def _drop(where: Range) -> None:
    """Have a page missing again, without an event."""
    advise(where, Advice.DONTNEED)


# ---- poison --------------------------------------------------------------------------------------------------------


def _expect_poisoned(cpu: Processor, uffd: Uffd, area_page: Range, access: str) -> None:
    """Assert that an access ends KVM_RUN with EFAULT, or with SIGBUS to the thread that names the page, and no message.

    A message of the kernel about memory that failed has the signal BUS_MCEERR_AR (4).
    """

    def poisoned() -> None:
        with signals_of_kvm(cpu, signal.SIGBUS) as taken:
            for attempt in range(2):
                try:
                    cpu.go_on() if attempt else vcpu_access(cpu, access, area_page.start)()
                except OSError as error:
                    if error.errno == EINTR:
                        trap = taken()
                        expect((trap.signo, trap.code), (signal.SIGBUS, BUS_MCEERR_AR), "the signal")
                        expect(trap.addr in area_page, True, f"whether si_addr {trap.addr:#x} is in the page")
                    elif error.errno != EFAULT:
                        raise
                else:
                    raise AssertionError("expected SIGBUS or EFAULT from KVM_RUN; the access went through")

    undisturbed(uffd, poisoned)


BUS_MCEERR_AR = 4


@uffd_case(
    "kvm-poison", mem=ALL, variants=ACCESSES, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES,
    features=Feature.POISON, rows=("KV-10",), kind=Kind.VERSION,
)  # fmt: skip
def test_kvm_poison(ctx: Context, variant: str) -> None:
    """A processor that meets a poisoned page gets nowhere: SIGBUS for the page, or EFAULT; its neighbours it reads."""
    prepare(ctx)
    for page in (1, 3):
        copy(ctx, page)
    ctx.uffd.poison(ctx.dst.page(2))
    with guest(ctx.dst) as cpu, promise("KV-10"):
        for page in (1, 3):
            expect_vcpu_sees(cpu, ctx.uffd, Range(ctx.dst.page(page).start, PAGE_SIZE))
        _expect_poisoned(cpu, ctx.uffd, ctx.dst.page(2), variant)
        _drop(ctx.dst.page(2))
        with vcpu_faulting(cpu, ctx.uffd, ctx.dst.page(2).start, variant):
            copy(ctx, 2)
        ctx.uffd.expect_no_message()


@uffd_case(
    "kvm-poison-used", mem=ALL, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES, features=Feature.POISON,
    rows=("KV-10",), kind=Kind.VERSION,
)  # fmt: skip
def test_kvm_poison_used(ctx: Context) -> None:
    """Of a page that it had mapped a processor never sees the old bytes once it is dropped and poisoned."""
    prepare(ctx)
    for page in range(PAGES):
        copy(ctx, page)
    with guest(ctx.dst) as cpu, promise("KV-10"):
        for page in range(PAGES):
            undisturbed(ctx.uffd, partial(cpu.poke, ctx.dst.page(page).start, b"used"))
        _drop(ctx.dst.page(2))
        ctx.uffd.poison(ctx.dst.page(2))
        for access in ACCESSES:
            _expect_poisoned(cpu, ctx.uffd, ctx.dst.page(2), access)
        for page in (1, 3):
            expect_vcpu_sees(cpu, ctx.uffd, Range(ctx.dst.page(page).start, PAGE_SIZE))


@uffd_case(
    "kvm-poison-fault", mem=ALL, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES, features=Feature.POISON,
    rows=("KV-10",), kind=Kind.VERSION,
)  # fmt: skip
def test_kvm_poison_fault(ctx: Context) -> None:
    """A processor that sleeps in a fault ends with SIGBUS for the page, or EFAULT, when UFFDIO_POISON answers it."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    where = ctx.dst.page(2)

    with guest(ctx.dst) as cpu, promise("KV-10"):

        def access() -> str:
            with signals_of_kvm(cpu, signal.SIGBUS) as taken:
                try:
                    cpu.peek(where.start)
                except OSError as error:
                    if error.errno == EINTR:
                        trap = taken()
                        return f"SIGBUS {trap.code} in the page: {trap.addr in where}"
                    return f"errno {error.errno}"
            return "went through"

        with faulting(ctx.uffd, where.start, call=access) as waiter:
            ctx.uffd.poison(where)
        allowed = (f"SIGBUS {BUS_MCEERR_AR} in the page: True", f"errno {EFAULT}")
        expect(waiter.result() in allowed, True, f"whether {waiter.result()} is one of {allowed}")
        ctx.uffd.expect_no_message()
