# SPDX-License-Identifier: GPL-2.0-only
"""Signals to a thread whose virtual processor sleeps in a fault."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from errno import EINTR
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, KERNEL_FAULTS, KVM_PAGING, MISSING, NEW, SYNC_RWP, TRAPPED, WRITE, WRITEPROTECT, WRITE_TRAPPED, Cap, Channel,
    Context, Machine, Pagemap, Processor, Range, Skip, Uffd, Waiter, copy, eventually, expect, expect_vcpu_sees, guest,
    handled, monitored, peek, prepare, promise, reports_kvm, rwp_protected, tracked, undisturbed, vcpu_access,
)  # fmt: skip

PAGES = 3
TURNS = 4


def _interrupted(call: Callable[[], object]) -> bool:
    """Make a call, and return whether a signal has ended it."""
    try:
        call()
    except OSError as error:
        if error.errno != EINTR:
            raise
        return True
    return False


def _end_with_signal(ctx: Context, cpu: Processor, call: Callable[[], object], what: str, **fault: object) -> None:
    """Have a processor sleep in a fault at page 1, and a signal end KVM_RUN; the fault must be gone then.

    Skip where a kernel does not let that happen, which is so before Linux 6.3: there is no sign of that but of 6.8.
    """
    with Waiter(partial(_interrupted, call)) as waiter:
        ctx.uffd.wait_fault(ctx.dst.page(1).start, **fault)  # type: ignore[arg-type]
        ctx.uffd.expect_still_asleep(1)
        waiter.signal(signal.SIGUSR1)
        if not cpu.machine.vm.has(Cap.USER_MEMORY2):
            waiter.join(0.2)
            if not waiter.done:
                ctx.uffd.close()
                waiter.result()
                raise Skip("a signal does not end KVM_RUN that sleeps in a fault (Linux 6.3)")
        expect(waiter.result(), True, f"whether a signal ended KVM_RUN, {what}")
    ctx.uffd.expect_asleep(0)
    ctx.uffd.expect_no_message()


@uffd_case(
    "kvm-signal", mem=ALL, variants=("read", "write"), needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES,
    rows=("KV-08",), kind=Kind.DETAIL,
)  # fmt: skip
def test_kvm_signal(ctx: Context, variant: str) -> None:
    """A signal ends KVM_RUN that sleeps in a fault with EINTR, again and again; then the access is made once."""
    prepare(ctx)
    start = ctx.dst.page(1).start
    flags = {"flags": WRITE} if variant == "write" else {}
    with guest(ctx.dst) as cpu, handled(signal.SIGUSR1) as notes, promise("KV-08"):
        call = vcpu_access(cpu, variant, start)
        for turn in range(TURNS):
            _end_with_signal(ctx, cpu, call, f"turn {turn}", **flags)
            eventually(lambda turn=turn: len(notes) > turn, "the handler to run")  # type: ignore[misc]
            call = cpu.go_on
        expect(Pagemap.filled(ctx.dst.range, ctx.page_size), [False] * PAGES, "pages that are there")
        copy(ctx, 1)
        undisturbed(ctx.uffd, cpu.go_on)
        there = peek(ctx.src.page(1).start, 64)
        expect_vcpu_sees(cpu, ctx.uffd, Range(start, 64), NEW[:4] + there[4:] if flags else there)


@uffd_case(
    "kvm-signal-protected", mem=ALL, variants=("wp", "rwp"), needs=KVM_PAGING, pages=PAGES, rows=("KV-08",),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_kvm_signal_protected(ctx: Context, variant: str) -> None:
    """A signal ends KVM_RUN that is trapped at a protected page, which stays protected and is not written."""
    features = SYNC_RWP if variant == "rwp" else WRITEPROTECT
    with Uffd.open() as handle:
        handle_offers = handle.offered
    if features & ~handle_offers:
        raise Skip(f"kernel lacks {features & ~handle_offers}")
    ctx.uffd = Uffd.open(features, KERNEL_FAULTS)
    area = rwp_protected(ctx) if variant == "rwp" else tracked(ctx)
    before = area.pattern.head(1)[:4]
    with guest(area) as cpu, handled(signal.SIGUSR1), promise("KV-08"):
        call: Callable[[], object] = partial(cpu.poke, area.page(1).start, NEW[:4])
        for turn in range(TURNS):
            flags = WRITE_TRAPPED if variant == "rwp" else TRAPPED
            _end_with_signal(ctx, cpu, call, f"turn {turn}", flags=flags)
            Pagemap.expect_protected(area, range(PAGES), "after a write that a signal has ended")
            call = cpu.go_on
        if variant == "wp":
            expect(peek(area.page(1).start, 4), before, "what is in the page")
        (ctx.uffd.resolve if variant == "rwp" else ctx.uffd.unprotect)(area.page(1))
        undisturbed(ctx.uffd, cpu.go_on)
        expect(peek(area.page(1).start, 4), NEW[:4], "what the processor wrote at last")
        Pagemap.expect_protected(area, (0, 2), "at the end")


@uffd_case(
    "kvm-killed", mem=ALL, variants=("missing", "two"), needs=KVM_PAGING, pages=PAGES, rows=("KV-08",), kind=Kind.DETAIL
)
def test_kvm_killed(ctx: Context, variant: str) -> None:
    """SIGKILL ends a process whose processors sleep in faults that nobody answers, and their messages are gone."""
    count = 2 if variant == "two" else 1

    def life(_: Channel) -> None:
        machine = Machine(ctx.dst, processors=count)
        waiters = [Waiter(partial(cpu.peek, ctx.dst.page(1).start)) for cpu in machine.processors]
        for waiter in waiters:
            waiter.__enter__()
        waiters[0].result()

    ctx.dst  # noqa: B018  # mapped here, for both
    with promise("KV-08"), monitored(ctx.dst.range, MISSING, life, flags=KERNEL_FAULTS) as (child, uffd):
        for _ in range(count):
            uffd.wait_fault(ctx.dst.page(1).start)
        uffd.expect_still_asleep(count)
        os.kill(child.pid, signal.SIGKILL)
        eventually(lambda: child.ended, "the killed process to end")
        expect(uffd.read(), [], "messages of the process that was killed")
        uffd.expect_asleep(0)
        child.kill()
