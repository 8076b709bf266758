# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_SET_MODE: UFFD_FEATURE_RWP_ASYNC is switched on and off while the handle is in use."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import ExitStack
from errno import EFAULT, EINVAL, ESRCH
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC_RWP, CACHED, KERNEL_FAULTS, MINOR, MINOR_FAULTS, MISSING, NEW, PAGE_SIZE, READ_TRAPPED, RWP,
    SHARED, SYNC_RWP, TRAPPED, WP, WRITEPROTECT, WRITE_TRAPPED, Advice, Area, Channel, Child, Context, Feature,
    Pagemap, Uffd, Waiter, advise, eventually, expect, expect_rwp_free, expect_rwp_trapped, fails, faulting,
    huge_area, mend, monitored, orphaned, peek, poke, promise, refuses, rwp_filled, rwp_protected, rwp_trapped, saw,
    syscalls, touch, uapi, undisturbed, unread_event,
)  # fmt: skip

RWP_ASYNC = Feature.RWP_ASYNC


def enable(uffd: Uffd) -> None:
    """Let the kernel resolve read-write-protect faults by itself, from now on."""
    uffd.set_mode(enable=RWP_ASYNC)


def disable(uffd: Uffd) -> None:
    """Have read-write-protect faults reported, from now on."""
    uffd.set_mode(disable=RWP_ASYNC)


def expect_silent(uffd: Uffd, area: Area, page: int, *, write: bool) -> None:
    """Assert that an access to a protected page goes through without a message, and frees it and no other."""
    before = Pagemap.have(area.range, uapi.PM_UFFD_WP, area.page_size)
    expect(before[page], True, f"whether page {page} is protected")
    undisturbed(uffd, partial(touch, area.page(page), area.page_size, write=write))
    left = {number for number, mark in enumerate(before) if mark and number != page}
    Pagemap.expect_protected(area, left, f"after a {'write to' if write else 'read of'} page {page}")


# ---- the switch ----------------------------------------------------------------------------------------------------


@uffd_case("set-mode", mem=ALL, features=ASYNC_RWP, pages=5, spare_hugepages=1, rows=("SM-01",))
def test_set_mode(ctx: Context) -> None:
    """Disabled, pages that are still protected trap; enabled, they do not; nothing is registered or protected anew."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    for number in range(2):
        for write in (False, True):
            with promise("SM-01", f"enabled, round {number}"):
                expect_silent(uffd, area, 1, write=write)
            disable(uffd)
            with promise("SM-01", f"disabled, round {number}"):
                Pagemap.expect_protected(area, {0, 2, 3, 4}, "after UFFDIO_SET_MODE")
                expect_rwp_trapped(uffd, area, 2, 4, write=write)
                expect_rwp_free(uffd, area, 1, 2, 4)
                Pagemap.expect_protected(area, {0, 3}, "after accesses to pages 1, 2 and 4")
            enable(uffd)
            with promise("SM-01", f"enabled again, round {number}"):
                Pagemap.expect_protected(area, {0, 3}, "after UFFDIO_SET_MODE")
                expect_silent(uffd, area, 3, write=write)
            uffd.rwprotect(area.range)
    mend(ctx, area, 2, 4)
    undisturbed(uffd, lambda: area.expect_pattern_of(area))


@uffd_case("set-mode-later", mem=ALL, features=SYNC_RWP, pages=4, rows=("SM-01",))
def test_set_mode_later(ctx: Context) -> None:
    """A handle that did not ask for RWP_ASYNC can enable it later."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    expect_rwp_trapped(uffd, area, 0)
    enable(uffd)
    for page in (1, 2):
        with promise("SM-01", "enabled"):
            expect_silent(uffd, area, page, write=page == 2)
    disable(uffd)
    with promise("SM-01", "disabled"):
        expect_rwp_trapped(uffd, area, 3)
    area.expect_pattern_of(area)


@uffd_case("set-mode-thp", mem=(ANON,), features=ASYNC_RWP, needs=("thp",), pages=1, rows=("SM-01",))
def test_set_mode_thp(ctx: Context) -> None:
    """The same of transparent huge pages, which lose their protection as a whole or page by page."""
    area, uffd = huge_area(ctx, 2), ctx.uffd
    half = area.nr_pages // 2
    uffd.register(area.range, RWP)
    uffd.rwprotect(area.range)
    disable(uffd)
    with promise("SM-01", "disabled"):
        expect_rwp_trapped(uffd, area, 3)
        Pagemap.expect_protected(area, set(range(2 * half)) - {3}, "after page 3 was resolved")
        expect_rwp_trapped(uffd, area, half - 1)
    enable(uffd)
    with promise("SM-01", "enabled"):
        undisturbed(uffd, partial(touch, area.page(half + 5), PAGE_SIZE))
        Pagemap.expect_protected(area, set(range(half - 1)) - {3}, "after an access to the second huge page")
        undisturbed(uffd, lambda: area.expect_pattern_of(area))
        Pagemap.expect_protected(area, (), "after accesses to all")


# ---- the request ---------------------------------------------------------------------------------------------------


@uffd_case("set-mode-bits", mem=(ANON,), features=SYNC_RWP, pages=4, rows=("SM-02",))
def test_set_mode_bits(ctx: Context) -> None:
    """Any bit but RWP_ASYNC in either field is invalid, and one in both; the mode stays what it was."""
    area, uffd = rwp_filled(ctx), ctx.uffd
    others = [Feature(1 << bit) for bit in range(64) if 1 << bit != RWP_ASYNC]
    calls = [(RWP_ASYNC, RWP_ASYNC)]
    for other in others:
        calls += [(other, Feature(0)), (Feature(0), other), (other, other)]
        calls += [(RWP_ASYNC | other, Feature(0)), (Feature(0), RWP_ASYNC | other)]
        calls += [(RWP_ASYNC, other), (other, RWP_ASYNC)]
    for switch, what in (disable, "disabled"), (enable, "enabled"):
        switch(uffd)
        shown = uffd.fdinfo.features
        for on, off in calls:
            with promise("SM-02", f"{what}; enable {on:#x}, disable {off:#x}"):
                with refuses(EINVAL):
                    uffd.set_mode(on, off)
                if RWP_ASYNC in on | off:  # else it takes long to ask
                    expect(f"{uffd.fdinfo.features:#x}", f"{shown:#x}", "features in fdinfo")
        uffd.rwprotect(area.range)
        with promise("SM-02", what):
            if switch is enable:
                expect_silent(uffd, area, 1, write=False)
            else:
                expect_rwp_trapped(uffd, area, 1)


@uffd_case("set-mode-without-rwp", features=SYNC_RWP, rows=("SM-03",), kind=Kind.DETAIL)
def test_set_mode_without_rwp() -> None:
    """A handle that did not ask for RWP cannot enable RWP_ASYNC; to disable it there is no error."""
    for features in (Feature(0), WRITEPROTECT | Feature.WP_ASYNC):
        with promise("SM-03", f"features {features}"), Uffd.open(features) as uffd:
            shown = uffd.fdinfo.features
            with refuses(EINVAL):
                enable(uffd)
            expect(f"{uffd.fdinfo.features:#x}", f"{shown:#x}", "features in fdinfo")
            disable(uffd)
            expect(f"{uffd.fdinfo.features:#x}", f"{shown:#x}", "features in fdinfo, after disabling")


@uffd_case("set-mode-again", mem=(ANON,), features=SYNC_RWP, pages=6, rows=("SM-04",), kind=Kind.DETAIL)
def test_set_mode_again(ctx: Context) -> None:
    """To switch nothing, or what is so already, is no error and has no effect."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    for page, disablings in enumerate((0, 1, 2)):
        uffd.set_mode()
        for _ in range(disablings):
            disable(uffd)
        with promise("SM-04", "disabled"):
            expect_rwp_trapped(uffd, area, page)
    for page, enablings in enumerate((1, 2, 0), start=3):
        for _ in range(enablings):
            enable(uffd)
        uffd.set_mode()
        with promise("SM-04", "enabled"):
            expect_silent(uffd, area, page, write=False)


@uffd_case("set-mode-errors", mem=(ANON,), features=SYNC_RWP, pages=3, rows=("SM-05",), kind=Kind.DETAIL)
def test_set_mode_errors(ctx: Context) -> None:
    """Of several errors the argument's address comes first, then its bits, then that the target is gone."""
    area = rwp_protected(ctx)
    beyond = area.range.end - ctypes.sizeof(uapi.uffdio_set_mode) // 2
    ctx.uffd.resolve(area.range)
    both = (uapi.uffdio_set_mode * 1)(uapi.uffdio_set_mode(RWP_ASYNC, RWP_ASYNC))
    with orphaned(area.range, RWP, SYNC_RWP) as gone, orphaned(area.range, MISSING) as plain:
        for what, uffd in ("alive", ctx.uffd), ("gone", gone), ("gone, without RWP", plain):
            for address in (0, beyond):
                with promise("SM-05", f"target {what}, argument at {address:#x}"), fails(EFAULT):
                    uffd.raw_ioctl(uapi.UFFDIO_SET_MODE, address)
            with promise("SM-05", f"target {what}, a bit in both fields"), refuses(EINVAL):
                uffd.raw_ioctl(uapi.UFFDIO_SET_MODE, ctypes.addressof(both))
            with promise("SM-05", f"target {what}, an unknown bit"), refuses(EINVAL):
                uffd.set_mode(Feature.WP_ASYNC)
        with promise("SM-05", "target gone, without RWP: enable"), refuses(EINVAL):
            enable(plain)
        for what, call in (
            ("enable", partial(enable, gone)),
            ("disable", partial(disable, gone)),
            ("nothing", gone.set_mode),
            ("disable, without RWP", partial(disable, plain)),
        ):
            with promise("SM-05", f"target gone: {what}"), refuses(ESRCH):
                call()


# ---- who waits -----------------------------------------------------------------------------------------------------


def expect_all_pass(ctx: Context, area: Area, pages: tuple[int, int, int, int]) -> None:
    """Assert that threads that sleep on protected pages, told of or not, go on when the switch is enabled."""
    uffd, (told, twice, unread, other) = ctx.uffd, pages
    with ExitStack() as stack:
        stack.enter_context(rwp_trapped(uffd, area, told))
        writer = stack.enter_context(rwp_trapped(uffd, area, twice, write=True))
        second = stack.enter_context(Waiter(partial(peek, area.page(twice).start + 64, 8)))
        third = stack.enter_context(Waiter(partial(peek, area.page(unread).start, 8)))
        fourth = stack.enter_context(Waiter(partial(poke, area.page(other).end - len(NEW), NEW)))
        eventually(lambda: uffd.fdinfo.pending == 3, "three unread faults")
        uffd.expect_asleep(5)
        enable(uffd)
        uffd.expect_asleep(0)
        expect(uffd.readable(), False, "POLLIN after the switch")
        uffd.expect_no_message()
        for waiter in (writer, second, third, fourth):
            waiter.result()
    uffd.expect_no_message()
    expect(peek(area.page(other).end - len(NEW), len(NEW)), NEW, "what a thread wrote whose message was unread")


@uffd_case("set-mode-wakes", mem=ALL, features=SYNC_RWP, pages=6, rows=("SM-06",), kind=Kind.DETAIL)
def test_set_mode_wakes(ctx: Context) -> None:
    """To enable RWP_ASYNC lets every thread go on that sleeps on a protected page, and takes its message back."""
    area = rwp_protected(ctx)
    with promise("SM-06"):
        expect_all_pass(ctx, area, (0, 2, 3, 5))
        Pagemap.expect_protected(area, {1, 4}, "after accesses to the other pages")
    mend(ctx, area, 2)
    area.expect_pattern_of(area, 0, 5)


@uffd_case("set-mode-wakes-thp", mem=(ANON,), features=SYNC_RWP, needs=("thp",), rows=("SM-06",), kind=Kind.DETAIL)
def test_set_mode_wakes_thp(ctx: Context) -> None:
    """The same of threads that sleep on transparent huge pages."""
    area = huge_area(ctx, 3)
    half = area.nr_pages // 3
    ctx.uffd.register(area.range, RWP)
    ctx.uffd.rwprotect(area.range)
    with promise("SM-06"):
        expect_all_pass(ctx, area, (0, 7, half + 1, half - 1))
        Pagemap.expect_protected(area, range(2 * half, 3 * half), "after accesses to two of three huge pages")


@uffd_case(
    "set-mode-wakes-kernel",
    mem=ALL,
    features=SYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    rows=("SM-06",),
    kind=Kind.DETAIL,
)
def test_set_mode_wakes_kernel(ctx: Context) -> None:
    """A system call that sleeps on a protected page completes as well, be it reading there or writing."""
    ctx.uffd = Uffd.open(SYNC_RWP, KERNEL_FAULTS)
    area, uffd = rwp_protected(ctx), ctx.uffd
    written, read = area.page(1).start, area.page(2).start
    with open("/dev/zero", "rb") as zero:
        call: Callable[[], object] = partial(syscalls.read_into, zero.fileno(), written, 8)
        with promise("SM-06", "read(2)"):
            with faulting(uffd, written, call=call, flags=WRITE_TRAPPED) as waiter:
                enable(uffd)
                expect(waiter.result(), 8, "bytes read into page 1")
            expect(peek(written, 8), bytes(8), "what read(2) wrote")
            Pagemap.expect_protected(area, {0, 2, 3}, "after read(2) into page 1")
    disable(uffd)
    call = partial(syscalls.process_vm_readv, os.getpid(), read, 8)
    with promise("SM-06", "process_vm_readv(2)"):
        with faulting(uffd, read, call=call, flags=READ_TRAPPED) as waiter:
            enable(uffd)
            expect(waiter.result(), peek(read, 8), "what it read")
        Pagemap.expect_protected(area, {0, 3}, "after process_vm_readv(2) from page 2")
    uffd.expect_no_message()
    uffd.expect_asleep(0)


def expect_asleep_or_again(uffd: Uffd, waiter: Waiter, what: str) -> None:
    """Assert that a thread whose message was read sleeps on, or has woken to fault once more in just the same way."""
    fault = waiter.fault
    assert fault is not None
    told = uffd.fdinfo[:2] != (0, 1) or uffd.readable()
    saw(f"{what}: {'reported once more' if told else 'sleeps on'}")
    if told:
        uffd.wait_fault(fault.address, fault.flags)
    uffd.expect_still_asleep(1)


@uffd_case(
    "set-mode-others",
    mem=ALL,
    features=ASYNC_RWP | WRITEPROTECT,
    pages=4,
    spare_hugepages=1,
    rows=("SM-07", "SM-08"),
    kind=Kind.VERSION,
)
def test_set_mode_others(ctx: Context) -> None:
    """A thread that waits for a missing page, or to write to a protected one, may be told of again, and is not lost."""
    area, uffd = ctx.dst, ctx.uffd
    ctx.src.fill()
    area.fill(2, 2)
    uffd.register(area.page(0, 2), MISSING | RWP)
    uffd.register(area.page(2, 2), WP)
    uffd.writeprotect(area.page(2, 2))
    disable(uffd)
    with promise("SM-07", "a missing page"), faulting(uffd, area.page(1).start) as waiter:
        disable(uffd)
        uffd.expect_still_asleep(1)
        enable(uffd)
        expect_asleep_or_again(uffd, waiter, "a missing page")
        disable(uffd)
        with promise("SM-08"):
            uffd.expect_still_asleep(1)
        uffd.copy(area.page(1).start, ctx.src.page(1).start, area.page_size)
        expect(waiter.result(), peek(ctx.src.page(1).start), "what it read")
    writing = partial(poke, area.page(2).start, NEW)
    with promise("SM-07", "a write-protected page"):
        with faulting(uffd, area.page(2).start, call=writing, flags=TRAPPED) as waiter:
            enable(uffd)
            expect_asleep_or_again(uffd, waiter, "a write-protected page")
            Pagemap.expect_protected(area, {2, 3}, "while it sleeps")
            uffd.unprotect(area.page(2))
        expect(peek(area.page(2).start, len(NEW)), NEW, "what it wrote")
    Pagemap.expect_protected(area, {3}, "SM-07: after all")
    uffd.expect_no_message()


@uffd_case(
    "set-mode-others-minor",
    mem=SHARED,
    features=SYNC_RWP | MINOR_FAULTS,
    pages=3,
    rows=("SM-07",),
    kind=Kind.VERSION,
)
def test_set_mode_others_minor(ctx: Context) -> None:
    """A thread that waits for a cached page may be told of again, and is not lost."""
    area, uffd = ctx.dst, ctx.uffd
    area.fill()
    uffd.register(area.range, MINOR | RWP)
    advise(area.page(1), Advice.DONTNEED)
    with promise("SM-07", "a cached page"):
        with faulting(uffd, area.page(1).start, flags=CACHED) as waiter:
            enable(uffd)
            expect_asleep_or_again(uffd, waiter, "a cached page")
            uffd.continue_(area.page(1))
        uffd.expect_no_message()
    area.expect_pattern_of(area)


@uffd_case(
    "set-mode-wakes-nobody",
    mem=ALL,
    features=SYNC_RWP | Feature.THREAD_ID,
    pages=3,
    rows=("SM-08",),
    kind=Kind.DETAIL,
)
def test_set_mode_wakes_nobody(ctx: Context) -> None:
    """To disable what is disabled wakes nobody and keeps the messages; other features go on."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    with rwp_trapped(uffd, area, 0) as first, Waiter(partial(peek, area.page(1).start)) as second:
        eventually(lambda: uffd.fdinfo.pending == 1, "an unread fault")
        disable(uffd)
        uffd.set_mode()
        with promise("SM-08"):
            expect(uffd.fdinfo[:2], (1, 2), "pending and total in fdinfo")
            message = uffd.wait_fault(area.page(1).start, READ_TRAPPED)
            told = first.fault.ptid if first.fault else 0
            expect((told, message.ptid), (first.tid, second.tid), "threads that the messages name")
        uffd.resolve(area.range)
    enable(uffd)
    disable(uffd)
    uffd.rwprotect(area.range)
    with rwp_trapped(uffd, area, 2) as third:
        expect(third.fault and third.fault.ptid, third.tid, "SM-08: the thread that a message names, after all that")
        uffd.resolve(area.range)


@uffd_case("set-mode-one-handle", mem=ALL, features=SYNC_RWP, pages=6, rows=("SM-08",), kind=Kind.DETAIL)
def test_set_mode_one_handle(ctx: Context) -> None:
    """The switch of one handle is no other's: neither their modes nor their sleeping threads change."""
    area, uffd = ctx.dst, ctx.uffd
    area.fill()
    with Uffd.open(SYNC_RWP) as other:
        uffd.register(area.page(0, 3), RWP)
        other.register(area.page(3, 3), RWP)
        uffd.rwprotect(area.page(0, 3))
        other.rwprotect(area.page(3, 3))
        with promise("SM-08"), rwp_trapped(other, area, 3):
            enable(uffd)
            other.expect_still_asleep(1)
            expect_silent(uffd, area, 0, write=False)
            other.resolve(area.page(3))
        with promise("SM-08", "a handle that is disabled, beside one that is enabled"):
            expect_rwp_trapped(other, area, 4)
        disable(uffd)
        enable(other)
        with promise("SM-08", "a handle that is enabled, beside one that is disabled"):
            expect_silent(other, area, 5, write=True)
            expect_rwp_trapped(uffd, area, 1, 2)
        expect(uffd.fdinfo.features & RWP_ASYNC, 0, "SM-08: RWP_ASYNC in fdinfo of the disabled one")
        expect(other.fdinfo.features & RWP_ASYNC, int(RWP_ASYNC), "SM-08: RWP_ASYNC in fdinfo of the enabled one")
    area.expect_pattern_of(area)


@uffd_case(
    "set-mode-fork",
    mem=ALL,
    features=SYNC_RWP | Feature.EVENT_FORK,
    pages=4,
    spare_hugepages=8,
    rows=("SM-08",),
    kind=Kind.DETAIL,
)
def test_set_mode_fork(ctx: Context) -> None:
    """A forked child's handle begins in the mode of its parent's, and from then on has its own."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    enable(uffd)

    def child(channel: Channel) -> None:
        for page in range(4):
            channel.receive()
            touch(area.page(page), area.page_size)
            marks = Pagemap.have(area.range, uapi.PM_UFFD_WP, area.page_size)
            channel.send([number for number, mark in enumerate(marks) if mark])

    with ExitStack() as stack:
        with ctx.handler(src=None) as handler:
            process = stack.enter_context(Child(child))
            theirs = handler.only_child
            fd = os.dup(theirs.fd)
        heir = stack.enter_context(Uffd(fd, uffd.features))
        for page, switch, silent in (
            (0, uffd.set_mode, True),
            (1, partial(disable, uffd), True),
            (2, partial(disable, heir), False),
            (3, partial(enable, uffd), False),
        ):
            switch()
            process.send()
            with promise("SM-08", f"page {page} in the child"):
                if not silent:
                    heir.wait_fault(area.page(page).start, READ_TRAPPED)
                    heir.resolve(area.page(page))
                expect(process.receive(), list(range(page + 1, 4)), "protected pages in the child")
                heir.expect_no_message()
                uffd.expect_no_message()
        process.wait()
    Pagemap.expect_protected(area, range(4), "SM-08: in the parent")


@uffd_case(
    "set-mode-unread-event",
    mem=(ANON,),
    features=SYNC_RWP | Feature.EVENT_REMOVE,
    pages=4,
    rows=("SM-09",),
    kind=Kind.DETAIL,
)
def test_set_mode_unread_event(ctx: Context) -> None:
    """The switch does not wait for an event to be read, nor fail because of it."""
    area, uffd = rwp_protected(ctx), ctx.uffd
    with unread_event(uffd, area.page(3)):
        for switch, state in (enable, RWP_ASYNC), (disable, Feature(0)), (enable, RWP_ASYNC):
            with promise("SM-09", switch.__name__), Waiter(partial(switch, uffd)) as waiter:
                waiter.result()
            expect(uffd.fdinfo.features & RWP_ASYNC, int(state), "SM-09: RWP_ASYNC in fdinfo")
    with promise("SM-09", "after the event"):
        expect_silent(uffd, area, 1, write=True)


@uffd_case("set-mode-remote", mem=ALL, features=SYNC_RWP, pages=4, spare_hugepages=4, rows=("SM-10",), kind=Kind.DETAIL)
def test_set_mode_remote(ctx: Context) -> None:
    """Another process switches, at once, also while the owner's thread sleeps on a protected page, which then wakes."""
    area = ctx.dst
    area.fill()

    def life(channel: Channel) -> None:
        touch(area.range, area.page_size)  # fork(2) has left out what it can map again
        channel.send()
        for page in range(4):
            channel.receive()
            channel.send(peek(area.page(page).start, 8))

    ctx.src.fill()
    pages = [peek(ctx.src.page(page).start, 8) for page in range(4)]
    with monitored(area.range, RWP, life, SYNC_RWP) as (child, uffd):
        child.receive()
        uffd.rwprotect(area.range)
        child.send()
        with promise("SM-10", "a thread blocked"):
            uffd.wait_fault(area.page(0).start, READ_TRAPPED)
            with Waiter(partial(enable, uffd)) as waiter:
                waiter.result()
            expect(child.receive(), pages[0], "what it read when it was enabled")
            uffd.expect_asleep(0)
        for page, switch in (1, enable), (2, disable), (3, enable):
            switch(uffd)
            child.send()
            with promise("SM-10", f"{switch.__name__} by another process"):
                if switch is disable:
                    uffd.wait_fault(area.page(page).start, READ_TRAPPED)
                    uffd.resolve(area.page(page))
                expect(child.receive(), pages[page], "what it read")
                uffd.expect_no_message()
