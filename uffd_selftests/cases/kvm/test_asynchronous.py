# SPDX-License-Identifier: GPL-2.0-only
"""A virtual processor that takes interrupts is not held by a missing page: a thread of the kernel waits for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from errno import EFAULT, EINTR, ESRCH
from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, KERNEL_FAULTS, KVM_PAGING, MISSING, NEW, PAGE_NOT_PRESENT, SYNC_RWP, WRITE, WRITEPROTECT, Channel, Child,
    Context, Feature, Interruptible, PagefaultFlag, Pagemap, Range, Skip, Uffd, UffdError, Waiter, copy, eventually,
    expect, expect_errno, expect_vcpu_sees, filled, handled, interruptible, peek, prepare, promise, reports_kvm,
    rwp_filled, thread_told, undisturbed, vcpu_faulting,
)  # fmt: skip

PAGES = 5


def _begun(guest: Interruptible, access: str, address: int) -> None:
    value = int.from_bytes(NEW[:4], "little")
    guest.begin("load" if access == "read" else "store", address, value)


def _await_message(ctx: Context, page: int, waiter: Waiter) -> None:
    """Wait for the message of a fault that is asynchronous: KVM's thread asks for a page that can be written."""
    fault = ctx.uffd.wait_fault(ctx.dst.page(page).start, WRITE)
    ctx.uffd.expect_still_asleep(1)
    expect(fault.ptid != waiter.tid, True, "whether the message names another thread than the processor's")


@uffd_case(
    "kvm-async", mem=ALL, variants=("read", "write"), needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES,
    features=Feature.THREAD_ID, rows=("KV-13",), kind=Kind.DETAIL,
)  # fmt: skip
def test_kvm_async(ctx: Context, variant: str) -> None:
    """While its page is missing a processor takes interrupts; when it is there the access is made, once."""
    prepare(ctx)
    with interruptible(ctx.dst) as guest, promise("KV-13"):
        for turn, page in enumerate((2, 0, PAGES - 1), 1):
            _begun(guest, variant, ctx.dst.page(page).start)
            with Waiter(guest.cpu.go_on) as waiter:
                _await_message(ctx, page, waiter)
                for number in (2 * turn - 1, 2 * turn):
                    guest.interrupt()
                    eventually(lambda number=number: guest.interrupts == number, "interrupt")  # type: ignore[misc]
                ctx.uffd.expect_still_asleep(1)
                copy(ctx, page)
            there = peek(ctx.src.page(page).start, 64)
            if variant == "read":
                expect(waiter.result(), int.from_bytes(there[:4], "little"), "what the processor read")
            else:
                there = NEW[:4] + there[4:]
            ctx.uffd.expect_no_message()
            expect_vcpu_sees(guest.cpu, ctx.uffd, Range(ctx.dst.page(page).start, 64), there)
        expect(guest.interrupts, 6, "interrupts taken")
        expect(Pagemap.filled(ctx.dst.range, ctx.page_size), [True, False, True, False, True], "pages that are there")


@uffd_case(
    "kvm-async-off", mem=ALL, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES, features=Feature.THREAD_ID,
    rows=("KV-13",), kind=Kind.DETAIL,
)  # fmt: skip
def test_kvm_async_off(ctx: Context) -> None:
    """A processor that takes no interrupts now sleeps in the fault itself, whose message is as its access was."""
    prepare(ctx)
    with interruptible(ctx.dst) as guest, promise("KV-13"):
        for page, access in enumerate(("read", "write", "read")):
            with vcpu_faulting(guest.cpu, ctx.uffd, ctx.dst.page(page).start, access) as waiter:
                expect(thread_told(waiter), waiter.tid, "pagefault.feat.ptid")
                ctx.uffd.expect_still_asleep(1)
                copy(ctx, page)


@uffd_case(
    "kvm-async-signal", mem=ALL, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES, features=Feature.THREAD_ID,
    rows=("KV-13", "KV-08"), kind=Kind.DETAIL,
)  # fmt: skip
def test_kvm_async_signal(ctx: Context) -> None:
    """A signal ends KVM_RUN of a processor whose page is missing; the fault stays, and has one message in all."""
    prepare(ctx)
    with interruptible(ctx.dst) as guest, handled(signal.SIGUSR1), promise("KV-13"):
        _begun(guest, "read", ctx.dst.page(2).start)

        def interrupted() -> bool:
            try:
                guest.cpu.go_on()
            except OSError as error:
                return error.errno == EINTR
            return False

        for turn in range(3):
            with Waiter(interrupted) as waiter:
                if not turn:
                    _await_message(ctx, 2, waiter)
                eventually(lambda: waiter.asleep, "the processor to be halted")
                waiter.signal(signal.SIGUSR1)
                expect(waiter.result(), True, f"whether the signal ended KVM_RUN, turn {turn}")
            ctx.uffd.expect_still_asleep(1)
        with Waiter(guest.cpu.go_on) as waiter:
            copy(ctx, 2)
        expect(waiter.result(), int.from_bytes(peek(ctx.src.page(2).start, 4), "little"), "what the processor read")
        ctx.uffd.expect_no_message()


@uffd_case(
    "kvm-async-let-go", mem=ALL, variants=("close", "unregister"), needs=KVM_PAGING, post_alloc=reports_kvm,
    pages=PAGES, features=Feature.THREAD_ID, rows=("KV-13", "KV-11"), kind=Kind.DETAIL,
)  # fmt: skip
def test_kvm_async_let_go(ctx: Context, variant: str) -> None:
    """A halted processor goes on with zeroes when the handle is closed, or the memory unregistered."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with interruptible(ctx.dst) as guest, promise("KV-13"):
        _begun(guest, "read", ctx.dst.page(2).start)
        with Waiter(guest.cpu.go_on) as waiter:
            _await_message(ctx, 2, waiter)
            if variant == "close":
                ctx.uffd.close()
            else:
                ctx.uffd.release(ctx.dst.range)
        expect(waiter.result(), 0, "what the processor read")


@uffd_case(
    "kvm-async-protected", mem=ALL, variants=("wp", "rwp"), needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES,
    rows=("KV-13", "KV-04"), kind=Kind.DETAIL,
)  # fmt: skip
def test_kvm_async_protected(ctx: Context, variant: str) -> None:
    """A processor that is trapped at a protected page takes interrupts, and its write is made when it is let go on."""
    features = SYNC_RWP if variant == "rwp" else WRITEPROTECT
    if lacking := features & ~ctx.uffd.offered:
        raise Skip(f"kernel lacks {lacking}")
    ctx.uffd.close()
    ctx.features = features
    reports_kvm(ctx)
    area = rwp_filled(ctx) if variant == "rwp" else filled(ctx)
    protect = ctx.uffd.rwprotect if variant == "rwp" else ctx.uffd.writeprotect
    resolve: Callable[[Range], None] = ctx.uffd.resolve if variant == "rwp" else ctx.uffd.unprotect
    flags = WRITE | (PagefaultFlag.RWP if variant == "rwp" else PagefaultFlag.WP)
    with interruptible(area) as guest, promise("KV-13"):
        undisturbed(ctx.uffd, partial(guest.cpu.poke, area.page(2).start, b"used"))
        protect(area.page(1, 3))
        _begun(guest, "write", area.page(2).start)
        with Waiter(guest.cpu.go_on):
            ctx.uffd.wait_fault(area.page(2).start, flags)
            guest.interrupt()
            eventually(lambda: guest.interrupts == 1, "the interrupt to be taken")
            ctx.uffd.expect_still_asleep(1)
            Pagemap.expect_protected(area, {1, 2, 3}, "while the processor is trapped")
            resolve(area.page(2))
        ctx.uffd.expect_no_message()
        expect(peek(area.page(2).start, 4), NEW[:4], "what the processor wrote")
        Pagemap.expect_protected(area, {1, 3}, "when it was let go on")


@uffd_case(
    "kvm-async-told", mem=ALL, needs=KVM_PAGING, post_alloc=reports_kvm, pages=PAGES, features=Feature.THREAD_ID,
    rows=("KV-13",), kind=Kind.DETAIL,
)  # fmt: skip
def test_kvm_async_told(ctx: Context) -> None:
    """A processor that has asked for it is told of a missing page by an exception, and of it when it is there."""
    prepare(ctx)
    with interruptible(ctx.dst, told=True) as guest, promise("KV-13"):
        for page in (2, 0):
            _begun(guest, "read", ctx.dst.page(page).start)
            with Waiter(guest.run_to_exception) as waiter:
                ctx.uffd.wait_fault(ctx.dst.page(page).start, WRITE)
                expect(waiter.result(), PAGE_NOT_PRESENT, "the reason that KVM gives with the exception")
            ctx.uffd.expect_still_asleep(1)
            with Waiter(guest.idle) as waiter:
                expect(waiter.done, False, "whether the page is told as ready while it is missing")
                copy(ctx, page)
                expect(
                    waiter.result(),
                    (1, guest.token),
                    "interrupts that tell of ready pages, and the last one's token",
                )
            expect_vcpu_sees(
                guest.cpu, ctx.uffd, Range(ctx.dst.page(page).start, 64), peek(ctx.src.page(page).start, 64)
            )
        ctx.uffd.expect_no_message()


# ---- ends ----------------------------------------------------------------------------------------------------------


@uffd_case(
    "kvm-async-killed", mem=ALL, variants=("filled", "closed"), needs=KVM_PAGING, pages=PAGES, rows=("KV-13", "KV-08"),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_kvm_async_killed(ctx: Context, variant: str) -> None:
    """SIGKILL ends a process whose page is missing; the kernel's thread waits on, until the fault is answered."""

    def life(channel: Channel) -> None:
        with Uffd.open(Feature(0), KERNEL_FAULTS) as uffd:
            uffd.register(ctx.dst.range, MISSING)
            channel.send(None, uffd.fd)
        with interruptible(ctx.dst) as guest:
            _begun(guest, "read", ctx.dst.page(2).start)
            guest.cpu.go_on()

    ctx.src.fill()
    ctx.dst  # noqa: B018  # mapped here, for both
    with Child(life) as child:
        _, (fd,) = child.receive_fds()
        with promise("KV-13"), Uffd(fd) as uffd:
            uffd.wait_fault(ctx.dst.page(2).start, WRITE)
            os.kill(child.pid, signal.SIGKILL)
            eventually(lambda: child.ended, "the killed process to end")
            child.kill()
            if variant == "filled":
                _fill_of_the_dead(ctx, uffd)
                eventually(lambda: uffd.fdinfo.total == 0, "the kernel's thread not to wait any more")
            uffd.expect_no_message()


def _fill_of_the_dead(ctx: Context, uffd: Uffd) -> None:
    """Fill the page of a process that is gone: its memory is there while the kernel's thread waits, and not after."""
    try:
        uffd.copy(ctx.dst.page(2).start, ctx.src.page(2).start, ctx.page_size)
    except UffdError as error:
        expect_errno(error, ESRCH, "errno of UFFDIO_COPY")


@uffd_case(
    "kvm-async-killed-alone", mem=(ANON,), variants=("handle first", "machine first"), needs=KVM_PAGING, pages=PAGES,
    rows=("KV-13", "KV-08"), kind=Kind.DETAIL, deadline=20,
)  # fmt: skip
def test_kvm_async_killed_alone(ctx: Context, variant: str) -> None:
    """SIGKILL ends a process whose page is missing and that nobody but itself could fill, whatever it opened first."""

    def life(channel: Channel) -> None:
        early = Uffd.open(Feature(0), KERNEL_FAULTS) if variant == "handle first" else None
        with interruptible(ctx.dst) as guest:
            uffd = early or Uffd.open(Feature(0), KERNEL_FAULTS)
            uffd.register(ctx.dst.range, MISSING)
            _begun(guest, "read", ctx.dst.page(2).start)
            with Waiter(guest.cpu.go_on):
                uffd.wait_fault(ctx.dst.page(2).start, WRITE)
                channel.send("asleep")

    ctx.dst  # noqa: B018  # mapped here, for both
    with Child(life) as child, promise("KV-13"):
        expect(child.receive(), "asleep", "what the child says")
        os.kill(child.pid, signal.SIGKILL)
        eventually(lambda: child.ended, "the killed process to end")
        child.kill()


# ---- what fails ----------------------------------------------------------------------------------------------------

SPINS = Defect(
    id="D-KV-14",
    summary="where KVM has the interrupt controllers and the processor takes interrupts, KVM_RUN spins at a page whose "
    "fault fails (UFFD_FEATURE_SIGBUS, UFFD_USER_MODE_ONLY), instead of failing with EFAULT",
    kernels="6.1.192, 6.12.117, 7.3.4",
    advice="Register a machine's memory with a handle that reports the kernel's faults; do not expect EFAULT.",
    shows="KVM_RUN: expected EFAULT; it runs on, on its processor",
)


@uffd_case(
    "kvm-async-refused", mem=ALL, variants=("sigbus", "user-mode-only"), needs=(*KVM_PAGING, "user_mode_only"),
    pages=PAGES, rows=("KV-14",), defect=SPINS,
)  # fmt: skip
def test_kvm_async_refused(ctx: Context, variant: str) -> None:
    """A processor that takes interrupts, too, has KVM_RUN fail with EFAULT at a page that nobody is told of."""
    _refused(ctx, variant, patient=False)


@uffd_case(
    "kvm-async-refused-or-not", mem=ALL, variants=("sigbus", "user-mode-only"),
    needs=(*KVM_PAGING, "user_mode_only"), pages=PAGES, rows=("KV-14",), kind=Kind.DETAIL,
)  # fmt: skip
def test_kvm_async_refused_or_not(ctx: Context, variant: str) -> None:
    """At a page that nobody is told of KVM_RUN fails with EFAULT or runs on, until a signal; filled, it is read."""
    _refused(ctx, variant, patient=True)


def _refused(ctx: Context, variant: str, *, patient: bool) -> None:
    if variant == "sigbus":
        if not Feature.SIGBUS & ctx.uffd.offered:
            raise Skip(f"kernel lacks {Feature.SIGBUS}")
        ctx.uffd.close()
        ctx.features = Feature.SIGBUS
        reports_kvm(ctx)
    prepare(ctx)

    def refused() -> int:
        try:
            return guest.cpu.go_on()
        except OSError as error:
            return -(error.errno or 0)

    with interruptible(ctx.dst) as guest, handled(signal.SIGUSR1), promise("KV-14"):
        _begun(guest, "read", ctx.dst.page(2).start)
        with Waiter(refused) as waiter:
            eventually(lambda: waiter.done or waiter.cpu_time > SPIN_SECONDS, "KVM_RUN to fail, or to spin")
            spins = not waiter.done
            if spins:
                waiter.signal(signal.SIGUSR1)
        ctx.uffd.expect_no_message()
        expect(waiter.result(), -EINTR if spins else -EFAULT, "result of KVM_RUN")
        if spins and not patient:
            raise AssertionError("KVM_RUN: expected EFAULT; it runs on, on its processor")
        copy(ctx, 2)
        value = undisturbed(ctx.uffd, guest.cpu.go_on)
        expect(value, int.from_bytes(peek(ctx.src.page(2).start, 4), "little"), "what the processor read at last")


SPIN_SECONDS = 0.1
"""How long a processor runs before it counts as one that spins: a fault takes a hundredth of that."""
