# SPDX-License-Identifier: GPL-2.0-only
"""/proc/PID/fdinfo of a userfaultfd: who sleeps, and what was agreed upon."""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC_RWP, DEFAULT_FLAGS, FORK, HUGETLB, MINOR, MISSING, REMAP, REMOVE, SHMEM, SYNC_RWP, UNMAP, WP,
    WRITEPROTECT, Advice, ApiIoctls, Channel, Child, Context, CopyMode, Feature, Message, PagefaultFlag, RangeIoctls,
    Uffd, Waiter, advise, await_child_event, await_event, eventually, expect, faulting, faulting_pages, monitored,
    moved, peek, poke, promise, read_fork, remap, removed, take_event, uapi, unmap, unmapped,
)  # fmt: skip

INITIALIZED = 1 << 31
"""What fdinfo shows among the features once the handshake has been made."""

RWP_IOCTLS = RangeIoctls.RWPROTECT | ApiIoctls.SET_MODE
"""Linux 7.3 shows them on machines too that cannot read-write protect."""


NONE, SWITCH = Feature(0), Feature.RWP_ASYNC

FORMAT = re.compile(r"pending:\t(\d+)\ntotal:\t(\d+)\nAPI:\t([0-9a-f]+):([0-9a-f]+):([0-9a-f]+)\n")


def await_pending(uffd: Uffd, count: int) -> None:
    """Wait until so many faults are unread."""
    eventually(lambda: uffd.fdinfo.pending == count, f"{count} unread faults")


def expect_counts(uffd: Uffd, pending: int, total: int, when: str) -> None:
    """Assert how many threads sleep in a fault: with their message unread, and all."""
    with promise("FI-02", when):
        expect(uffd.fdinfo[:2], (pending, total), "pending and total")


# ---- the text ------------------------------------------------------------------------------------------------------


def expect_text(uffd: Uffd, pending: int, total: int) -> None:
    """Assert what the file says, to the letter; numbers of features and requests may be any."""
    text = Path(f"/proc/self/fdinfo/{uffd.fd}").read_text()
    generic, _, own = text.rpartition("pending:")
    own = "pending:" + own
    found = FORMAT.fullmatch(own)
    expect(found is not None, True, f"FI-01: the lines pending:, total: and API:, in {own!r}")
    expect(found and found.group(1, 2, 3), (str(pending), str(total), "aa"), "FI-01: pending, total and API")
    lines = dict(line.split(":\t", 1) for line in generic.splitlines())
    expect({"pos", "flags", "mnt_id"} - set(lines), set(), "FI-01: generic lines missing")
    flags = fcntl.fcntl(uffd.fd, fcntl.F_GETFL) | (os.O_CLOEXEC if fcntl.fcntl(uffd.fd, fcntl.F_GETFD) else 0)
    expect(int(lines["flags"], 8), flags, "FI-01: flags")


@uffd_case("fdinfo-format", mem=(ANON,), pages=12, rows=("FI-01",), kind=Kind.DETAIL)
def test_fdinfo_format(ctx: Context) -> None:
    """Fdinfo has the lines of every file, then pending: and total:, decimal, and API: with three hex numbers."""
    for flags in (DEFAULT_FLAGS, DEFAULT_FLAGS & ~os.O_CLOEXEC, DEFAULT_FLAGS & ~os.O_NONBLOCK):
        with Uffd.create(flags) as uffd:
            expect_text(uffd, 0, 0)
            uffd.api()
            expect_text(uffd, 0, 0)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start), ExitStack() as stack:
        for page in range(1, 12):
            stack.enter_context(Waiter(partial(peek, ctx.dst.page(page).start)))
        await_pending(ctx.uffd, 11)
        expect_text(ctx.uffd, 11, 12)
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.dst.range.len)


# ---- who sleeps ----------------------------------------------------------------------------------------------------


@uffd_case("fdinfo-counts", mem=ALL, pages=3, rows=("FI-02",), kind=Kind.DETAIL)
def test_fdinfo_counts(ctx: Context) -> None:
    """A thread asleep in a fault counts as pending until its message is read, and in the total until it wakes."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    expect_counts(ctx.uffd, 0, 0, "nobody faulted")
    with ExitStack() as stack:
        for page in range(3):
            stack.enter_context(Waiter(partial(peek, ctx.dst.page(page).start)))
            await_pending(ctx.uffd, page + 1)
            expect_counts(ctx.uffd, page + 1, page + 1, f"{page + 1} threads faulted")
        for unread in (2, 1, 0):
            ctx.uffd.read()
            expect_counts(ctx.uffd, unread, 3, f"{unread} messages unread")
        for asleep in (2, 1, 0):
            ctx.uffd.copy(ctx.dst.page(asleep).start, ctx.src.start, ctx.page_size)
            expect_counts(ctx.uffd, 0, asleep, f"{asleep} threads asleep")


@uffd_case("fdinfo-same-page", mem=ALL, pages=1, rows=("FI-02",), kind=Kind.DETAIL)
def test_fdinfo_same_page(ctx: Context) -> None:
    """Threads that wait for the same page count one by one."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    touch = partial(peek, ctx.dst.start)
    with faulting(ctx.uffd, ctx.dst.start), Waiter(touch), Waiter(touch):
        await_pending(ctx.uffd, 2)
        expect_counts(ctx.uffd, 2, 3, "three threads, one message read")
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
        expect_counts(ctx.uffd, 0, 0, "the page filled")


@uffd_case("fdinfo-wake", mem=ALL, pages=1, rows=("FI-02",), kind=Kind.DETAIL)
def test_fdinfo_wake(ctx: Context) -> None:
    """A fill with DONTWAKE leaves a thread in the total, UFFDIO_WAKE takes it out."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start):
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size, CopyMode.DONTWAKE)
        expect_counts(ctx.uffd, 0, 1, "filled with DONTWAKE")
        ctx.uffd.wake(ctx.dst.range)
        expect_counts(ctx.uffd, 0, 0, "woken")


@uffd_case("fdinfo-refault", mem=ALL, pages=1, rows=("FI-02",), kind=Kind.DETAIL)
def test_fdinfo_refault(ctx: Context) -> None:
    """A thread that wakes and faults again is pending again."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start):
        ctx.uffd.wake(ctx.dst.range)
        eventually(ctx.uffd.readable, "another message")
        expect_counts(ctx.uffd, 1, 1, "faulted again")
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@uffd_case("fdinfo-wp", mem=ALL, features=WRITEPROTECT, pages=1, rows=("FI-02",), kind=Kind.DETAIL)
def test_fdinfo_wp(ctx: Context) -> None:
    """A thread that writes to a protected page counts like any other."""
    ctx.dst.fill()
    ctx.uffd.register(ctx.dst.range, WP)
    ctx.uffd.writeprotect(ctx.dst.range)
    with Waiter(lambda: poke(ctx.dst.start, b"\1")):
        eventually(ctx.uffd.readable, "a message")
        expect_counts(ctx.uffd, 1, 1, "the message unread")
        ctx.uffd.read()
        expect_counts(ctx.uffd, 0, 1, "the message read")
        ctx.uffd.unprotect(ctx.dst.range)
        expect_counts(ctx.uffd, 0, 0, "un-protected")


@uffd_case(
    "fdinfo-minor",
    mem=(SHMEM, HUGETLB),
    features=Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS,
    pages=1,
    rows=("FI-02",),
    kind=Kind.DETAIL,
)
def test_fdinfo_minor(ctx: Context) -> None:
    """A thread in a minor fault counts like any other."""
    poke(ctx.dst.alias.start, b"\1")
    ctx.uffd.register(ctx.dst.range, MINOR)
    with faulting(ctx.uffd, ctx.dst.start, flags=PagefaultFlag.MINOR):
        expect_counts(ctx.uffd, 0, 1, "the message read")
        ctx.uffd.continue_(ctx.dst.range)
        expect_counts(ctx.uffd, 0, 0, "continued")


@uffd_case("fdinfo-other-handle", mem=ALL, pages=2, rows=("FI-02",), kind=Kind.DETAIL)
def test_fdinfo_other_handle(ctx: Context) -> None:
    """A handle counts its own faults alone; every duplicate of it shows the same."""
    ctx.uffd.register(ctx.dst.page(0), MISSING)
    with Uffd.open() as other, Uffd(os.dup(ctx.uffd.fd)) as duplicate:
        other.register(ctx.dst.page(1), MISSING)
        with faulting(ctx.uffd, ctx.dst.start), Waiter(lambda: peek(ctx.dst.page(1).start)):
            eventually(other.readable, "a message")
            for uffd, pending in ((ctx.uffd, 0), (duplicate, 0), (other, 1)):
                expect_counts(uffd, pending, 1, "a thread asleep at each of two handles")
            for uffd, page in ((ctx.uffd, ctx.dst.page(0)), (other, ctx.dst.page(1))):
                uffd.copy(page.start, ctx.src.start, ctx.page_size)


@uffd_case("fdinfo-events", mem=ALL, features=REMOVE | REMAP | UNMAP, pages=2, rows=("FI-02",), kind=Kind.DETAIL)
def test_fdinfo_events(ctx: Context) -> None:
    """Events, and the threads that wait for them to be read, do not count."""
    page, other, place = ctx.dst.page(0), ctx.dst.page(1), ctx.src.page(1)
    steps: list[tuple[Callable[[], object], list[Message]]] = [
        (lambda: advise(other, Advice.DONTNEED), [removed(other)]),
        (lambda: remap(other, to=place.start), [moved(other, place.start), unmapped(other)]),
        (lambda: unmap(place), [unmapped(place)]),
    ]
    ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, page.start):
        for call, messages in steps:
            with Waiter(call) as waiter:
                for message in messages:
                    await_event(ctx.uffd, waiter)
                    expect_counts(ctx.uffd, 0, 1, f"a fault read, {message} unread")
                    take_event(ctx.uffd, waiter, message)
        ctx.uffd.copy(page.start, ctx.src.start, ctx.page_size)


@uffd_case("fdinfo-fork", mem=(ANON,), features=FORK, pages=1, rows=("FI-02",), kind=Kind.DETAIL)
def test_fdinfo_fork(ctx: Context) -> None:
    """A fork that waits for its event to be read does not count."""

    def life(_: Channel) -> None:
        with Child(lambda _: None):
            pass

    with monitored(ctx.dst.range, MISSING, life, FORK) as (child, uffd):
        await_child_event(uffd, child)
        expect_counts(uffd, 0, 0, "UFFD_EVENT_FORK unread")
        with read_fork(uffd) as child_uffd:
            expect_counts(child_uffd, 0, 0, "the new handle")


@uffd_case("fdinfo-other-process", mem=(ANON,), pages=2, rows=("FI-02",), kind=Kind.DETAIL)
def test_fdinfo_other_process(ctx: Context) -> None:
    """Fdinfo says the same of a handle in whichever process it is open."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with Child(lambda channel: channel.receive()) as child:
        with faulting_pages(ctx.uffd, ctx.dst, 0), Waiter(lambda: peek(ctx.dst.page(1).start)):
            eventually(ctx.uffd.readable, "an unread fault")
            own, theirs = (Path(f"/proc/{pid}/fdinfo/{ctx.uffd.fd}").read_text() for pid in ("self", child.pid))
            expect(theirs, own, "FI-02: fdinfo in the child process")
            ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.dst.range.len)
        child.send()


# ---- the target ends -----------------------------------------------------------------------------------------------


def exits(child: Child) -> None:
    """Have the process exit."""
    child.send("exit")
    child.wait()


def executes(child: Child) -> None:
    """Have the process run another program."""
    child.send("exec")
    child.wait_exec()


@uffd_case("fdinfo-target-ends", mem=ALL, pages=2, rows=("FI-05",), kind=Kind.DETAIL)
def test_fdinfo_target_ends(ctx: Context) -> None:
    """When the target exits, is killed or runs another program, its threads count no more and their messages go."""

    def life(channel: Channel) -> None:
        for page in range(2):
            threading.Thread(target=peek, args=(ctx.dst.page(page).start,), daemon=True).start()
        if channel.receive() == "exec":
            channel.become_stdin()
            os.execlp("cat", "cat")

    for end in (exits, Child.kill, executes):
        with promise("FI-05", end.__name__), monitored(ctx.dst.range, MISSING, life) as (child, uffd):
            eventually(lambda: uffd.fdinfo.pending == 2, "two unread faults")
            uffd.read()
            expect(uffd.fdinfo[:2], (1, 2), "pending and total while it lives")
            end(child)
            expect(uffd.fdinfo[:2], (0, 0), "pending and total after its end")
            uffd.expect_no_message()
            child.kill()


# ---- what was agreed upon ------------------------------------------------------------------------------------------

INTERNAL_BIT = Defect(
    id="D-FI-03",
    summary="fdinfo shows bit 31 among the features once the handshake is made, a mark of the kernel's own.",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4 (since 5.15)",
    advice="Take bit 31 out before you look at the features that fdinfo shows.",
    shows=r"features in fdinfo: expected 0x0, got 0x80000000$",
)


@uffd_case("fdinfo-features-exact", rows=("FI-03",), defect=INTERNAL_BIT)
def test_fdinfo_features_exact() -> None:
    """Fdinfo shows the features that were asked for and no further bit."""
    for features in (Feature(0), Feature.THREAD_ID | Feature.EVENT_REMAP):
        with Uffd.open(features) as uffd:
            expect(f"{uffd.fdinfo.features:#x}", f"{features:#x}", "FI-03: features in fdinfo")


@uffd_case("fdinfo-features", rows=("FI-03",), kind=Kind.DETAIL)
def test_fdinfo_features() -> None:
    """Fdinfo shows no feature before the handshake, and after it those asked for; bit 31 may tell of the handshake."""
    features = Feature.THREAD_ID | Feature.EVENT_REMAP
    with Uffd.create() as uffd:
        expect(uffd.fdinfo.features, 0, "FI-03: features before UFFDIO_API")
        uffd.api(features)
        expect(uffd.fdinfo.features & ~INITIALIZED, features, "FI-03: features after UFFDIO_API, but for bit 31")


@uffd_case("fdinfo-ioctls", rows=("FI-04",), kind=Kind.DETAIL)
def test_fdinfo_ioctls() -> None:
    """Fdinfo shows every request of the kernel, before the handshake as after it."""
    with Uffd.create() as uffd:
        before = uffd.fdinfo
        uffd.api()
        expect(before.ioctls, uffd.fdinfo.ioctls, "FI-04: ioctls before UFFDIO_API, as after it")
        requests = [code for code, name in uapi.IOCTL_NAMES.items() if name.startswith("UFFDIO_") and uffd.knows(code)]
        unsure = RWP_IOCTLS if uapi.UFFDIO_SET_MODE in requests else 0
        known = sum(uapi.ioctl_bit(code) for code in requests)
        expect(f"{before.ioctls & ~unsure:#x}", f"{known & ~unsure:#x}", "FI-04: ioctls")


@uffd_case("fdinfo-rwp", features=ASYNC_RWP, rows=("FI-06",), kind=Kind.DETAIL)
def test_fdinfo_rwp() -> None:
    """Fdinfo shows RWP and RWP_ASYNC as asked for, RWP_ASYNC as UFFDIO_SET_MODE has left it, and both requests."""
    other = Feature.THREAD_ID
    for asked in (SYNC_RWP, ASYNC_RWP, ASYNC_RWP | other):
        with Uffd.open(asked) as uffd, Uffd.open(SYNC_RWP) as second:
            wanted = asked
            for enable, disable in ((NONE, NONE), (SWITCH, NONE), (SWITCH, NONE), (NONE, SWITCH), (SWITCH, NONE)):
                uffd.set_mode(enable, disable)
                wanted = (wanted | enable).without(disable)
                with promise("FI-06", f"asked for {asked}, enable {enable}, disable {disable}"):
                    expect(f"{uffd.fdinfo.features & ~INITIALIZED:#x}", f"{wanted:#x}", "features, but for bit 31")
                    expect(uffd.fdinfo.ioctls & RWP_IOCTLS, int(RWP_IOCTLS), "ioctls RWPROTECT and SET_MODE")
            expect(second.fdinfo.features & ~INITIALIZED, int(SYNC_RWP), "FI-06: features of another handle")
    with Uffd.open() as plain:
        plain.set_mode(disable=SWITCH)
        expect(plain.fdinfo.features & ~INITIALIZED, 0, "FI-06: features of a handle that asked for none")
        expect(plain.fdinfo.ioctls & RWP_IOCTLS, int(RWP_IOCTLS), "FI-06: its ioctls")
