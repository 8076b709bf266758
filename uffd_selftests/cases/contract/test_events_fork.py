# SPDX-License-Identifier: GPL-2.0-only
"""UFFD_EVENT_FORK: the handle it brings, whom that serves, and forks that come to nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EFAULT, EINVAL, EMFILE, ESRCH
from pathlib import Path

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, FORK, KERNEL_FAULTS, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MINOR, MISSING, PAGE_SIZE,
    PROT_NONE, REMAP, REMOVE, UNREGISTERED, UNTOUCHED, USER_MODE_ONLY, WP, Advice, Channel, Child, Context, Feature,
    Forked, Range, RegisterMode, Skip, Trap, Uffd, advise, await_child_event, expect, expect_killed, expect_modes,
    fails, held_up, map_memory, monitored, open_userfaultfds, out_of_descriptors, peek, promise, read_fork, recorder,
    refuses, syscalls, touch_trapped, uapi,
)  # fmt: skip

Life = Callable[[Channel], object]

BUS_ADRERR = 2
CLONE_NEWPID = 0x2000_0000


def forks(child: Life) -> Life:
    """The life of a process that forks once; ``child`` is the life of its child, on the same channel."""

    def life(channel: Channel) -> None:
        with Child(lambda _: child(channel)):
            pass

    return life


def passes(_: Channel) -> None:
    """The life of a process that does nothing."""


@contextmanager
def forked(ctx: Context, child: Life, features: Feature = FORK) -> Iterator[tuple[Child, Uffd, Uffd]]:
    """Have a process that registered the destination fork; the block has it, its handle and that of its child."""
    with monitored(ctx.dst.range, MISSING, forks(child), features) as (parent, uffd), read_fork(uffd) as child_uffd:
        yield parent, uffd, child_uffd
        parent.expect_end(uffd, child_uffd)


# ---- the message and what it brings --------------------------------------------------------------------------------


@uffd_case("fork-event", mem=ALL, features=FORK, pages=3, rows=("EV-02", "EV-29", "EV-30"))
def test_fork_event(ctx: Context) -> None:
    """A fork is announced once, however much is registered, waits to be read, and brings the reader one descriptor."""

    def life(channel: Channel) -> None:
        channel.receive()
        forks(passes)(channel)

    with monitored(ctx.dst.page(0), MISSING, life, FORK) as (child, uffd):
        uffd.register(ctx.dst.page(2), MISSING)
        before = open_userfaultfds()
        child.send()
        await_child_event(uffd, child)
        expect(open_userfaultfds(), before, "userfaultfds before the message is read")
        with read_fork(uffd) as child_uffd:
            expect(open_userfaultfds() - before, {child_uffd.fd}, "userfaultfds that reading it added")
            child.expect_end(uffd, child_uffd)


@uffd_case("fork-handle", mem=(ANON,), features=FORK, pages=1, rows=("EV-31",), kind=Kind.DETAIL)
def test_fork_handle(ctx: Context) -> None:
    """The new handle has the flags that the old one was created with, its features, and its handshake behind it."""
    for flags in (0, os.O_CLOEXEC, os.O_NONBLOCK, os.O_CLOEXEC | os.O_NONBLOCK):
        for features in (FORK, ctx.uffd.offered):
            with (
                promise("EV-31", f"flags {flags:#x}, features {features}"),
                monitored(ctx.dst.range, MISSING, forks(passes), features, flags | USER_MODE_ONLY) as (
                    _,
                    uffd,
                ),
            ):
                os.set_blocking(uffd.fd, False)
                with read_fork(uffd) as child_uffd:
                    expect_like(child_uffd, uffd, flags)


def expect_like(child_uffd: Uffd, uffd: Uffd, flags: int) -> None:
    """Assert what a handle from a FORK message has in common with its origin, which was created with these flags."""
    status = fcntl.fcntl(child_uffd.fd, fcntl.F_GETFL)
    expect(status & os.O_NONBLOCK, flags & os.O_NONBLOCK, "O_NONBLOCK of F_GETFL")
    expect(status & os.O_ACCMODE, fcntl.fcntl(uffd.fd, fcntl.F_GETFL) & os.O_ACCMODE, "access mode of F_GETFL")
    cloexec = fcntl.FD_CLOEXEC if flags & os.O_CLOEXEC else 0
    expect(fcntl.fcntl(child_uffd.fd, fcntl.F_GETFD), cloexec, "FD_CLOEXEC of F_GETFD")
    expect(child_uffd.fdinfo, uffd.fdinfo, "fdinfo")
    with refuses(EINVAL):
        child_uffd.api()


@uffd_case(
    "fork-user-mode-only",
    mem=(ANON,),
    features=FORK,
    needs=("user_mode_only",),
    pages=1,
    rows=("EV-31",),
    kind=Kind.DETAIL,
)
def test_fork_user_mode_only(ctx: Context) -> None:
    """UFFD_USER_MODE_ONLY holds for the child too: the kernel's access to its missing page fails with EFAULT."""

    def fails_in_kernel(_: Channel) -> None:
        with fails(EFAULT):
            read_from_pipe(ctx.dst.start)

    with forked(ctx, fails_in_kernel):
        pass


@uffd_case(
    "fork-kernel-faults",
    mem=ALL,
    features=FORK,
    needs=("kernel_faults",),
    pages=1,
    rows=("EV-31", "EV-32"),
    kind=Kind.DETAIL,
)
def test_fork_kernel_faults(ctx: Context) -> None:
    """Without UFFD_USER_MODE_ONLY the kernel's access to a missing page of the child is announced to its handle."""
    flags = KERNEL_FAULTS
    life = forks(lambda _: read_from_pipe(ctx.dst.start))
    with monitored(ctx.dst.range, MISSING, life, FORK, flags) as (child, uffd), read_fork(uffd) as child_uffd:
        child_uffd.wait_fault(ctx.dst.start, uapi.PagefaultFlag.WRITE)
        child_uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
        child.expect_end(uffd, child_uffd)


def read_from_pipe(address: int) -> None:
    """Read one byte from a pipe to the address, where it must arrive."""
    end, other = os.pipe()
    os.write(other, b"x")
    syscalls.read_into(end, address, 1)
    expect(peek(address), b"x", "the byte read")


@uffd_case("fork-child-faults", mem=ALL, features=FORK, pages=2, rows=("EV-32",))
def test_fork_child_faults(ctx: Context) -> None:
    """Faults of the child come to its own handle alone, and what fills them does not fill the parent's private page."""
    ctx.src.fill()
    page, other = ctx.dst.page(0), ctx.src.page(1).start

    def life(channel: Channel) -> None:
        with Child(lambda _: ctx.dst.expect_pattern_of(ctx.src, 0, 1)):
            pass
        first = peek(page.start, 64)
        expected = ctx.src.start if ctx.mem.shared else other
        expect(first, peek(expected, 64), "what the parent finds in its page")

    with monitored(ctx.dst.range, MISSING, life, FORK) as (parent, uffd), read_fork(uffd) as child_uffd:
        child_uffd.wait_fault(page.start)
        uffd.expect_asleep(0)
        uffd.expect_no_message()
        child_uffd.copy(page.start, ctx.src.start, page.len)
        if not ctx.mem.shared:
            uffd.wait_fault(page.start)
            uffd.copy(page.start, other, page.len)
        parent.expect_end(uffd, child_uffd)


@uffd_case("fork-child-unregister", mem=ALL, features=FORK, pages=2, rows=("EV-32",))
def test_fork_child_unregister(ctx: Context) -> None:
    """UFFDIO_UNREGISTER through the child's handle, and its end, concern the child alone."""

    def stay(channel: Channel) -> None:
        channel.send(os.getpid())
        channel.receive()

    def life(channel: Channel) -> None:
        forks(stay)(channel)
        expect_modes(ctx.dst.range, MISSING, MISSING)

    with monitored(ctx.dst.range, MISSING, life, FORK) as (parent, uffd):
        with read_fork(uffd) as child_uffd:
            pid = parent.receive()
            expect_modes(ctx.dst.range, MISSING, MISSING, pid=pid)
            child_uffd.unregister(ctx.dst.page(0))
            expect_modes(ctx.dst.range, UNREGISTERED, MISSING, pid=pid)
            expect_modes(ctx.dst.range, MISSING, MISSING, pid=parent.pid)
        with promise("CL-09", "the child's handle closed"):
            expect_modes(ctx.dst.range, UNREGISTERED, UNREGISTERED, pid=pid)
            expect_modes(ctx.dst.range, MISSING, MISSING, pid=parent.pid)
        parent.send()


def modes_offered(ctx: Context) -> list[RegisterMode]:
    """The modes in which this memory can be registered, with a missing page at least."""
    offered = ctx.uffd.offered
    wp = Feature.PAGEFAULT_FLAG_WP if ctx.mem == ANON else Feature.WP_HUGETLBFS_SHMEM
    minor = Feature.MINOR_HUGETLBFS if ctx.mem.hugetlb else Feature.MINOR_SHMEM
    modes = [MISSING]
    if wp in offered:
        modes += [WP, MISSING | WP]
    if ctx.mem.shared and minor in offered:
        modes += [MINOR]
    return modes


def modes_in_child(ctx: Context, features: Feature, *modes: RegisterMode) -> None:
    """Register each page in a mode of its own, fork, and look in which modes they are registered in the child."""
    registered = modes_offered(ctx)
    where = ctx.dst.page(0, len(registered))

    def life(channel: Channel) -> None:
        channel.receive()
        with Child(lambda _: expect_modes(where, *(modes or registered))):
            pass
        expect_modes(where, *registered)

    with monitored(ctx.dst.page(0), MISSING, life, features) as (child, uffd):
        for page, mode in enumerate(registered):
            uffd.register(ctx.dst.page(page), mode)
        with recorder(ctx, uffd) as reader:
            child.send()
            child.wait()
            expect(reader.stats.messages, int(FORK in features), "messages")


@uffd_case("fork-modes", mem=ALL, features=FORK, pages=4, rows=("EV-29",))
def test_fork_modes(ctx: Context) -> None:
    """The child's memory is registered in the parent's modes."""
    modes_in_child(ctx, FORK)


@uffd_case("fork-off", mem=ALL, features=REMAP | REMOVE, pages=4, rows=("EV-41",))
def test_fork_off(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_FORK the child's memory is not registered; the parent's stays so."""
    modes_in_child(ctx, ctx.features, *[UNREGISTERED] * len(modes_offered(ctx)))


@uffd_case("fork-off-contents", mem=ALL, pages=2, rows=("EV-41",))
def test_fork_off_contents(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_FORK the child finds the parent's pages, and zeroes where the parent has none."""
    ctx.dst.fill(0, 1)

    def look(_: Channel) -> None:
        ctx.dst.expect_pattern_of(ctx.dst, 0, 1)
        ctx.dst.expect_zero(1)

    with monitored(ctx.dst.range, MISSING, forks(look)):
        pass


@uffd_case("fork-features", mem=ALL, features=FORK | Feature.THREAD_ID, pages=1, rows=("EV-31",), kind=Kind.DETAIL)
def test_fork_features(ctx: Context) -> None:
    """The child's handle reports faults as the parent's features want it: here with the thread's ID."""

    def touch(channel: Channel) -> None:
        channel.send(os.getpid())
        peek(ctx.dst.start)

    with forked(ctx, touch, ctx.features) as (parent, _, child_uffd):
        fault = child_uffd.wait_fault(ctx.dst.start)
        expect(fault.ptid, parent.receive(), "pagefault.feat.ptid")
        child_uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@uffd_case("fork-sigbus", mem=ALL, features=FORK | Feature.SIGBUS, pages=2, rows=("EV-39",))
def test_fork_sigbus(ctx: Context) -> None:
    """With UFFD_FEATURE_SIGBUS the child gets the signal too, and no handle a message; what is filled can be read."""
    ctx.src.fill()

    def look(channel: Channel) -> None:
        traps = touch_trapped(ctx.dst.range, ctx.page_size)
        expect(traps, [bus_error(ctx.dst.page(page).start) for page in (0, 1)], "signals in the child")
        channel.send()
        channel.receive()
        ctx.dst.expect_pattern_of(ctx.src)

    with forked(ctx, look, ctx.features) as (parent, _, child_uffd):
        parent.receive()
        child_uffd.copy(ctx.dst.start, ctx.src.start, ctx.dst.range.len)
        parent.send()


def bus_error(address: int) -> Trap:
    """SIGBUS for an access at the address."""
    return Trap(signal.SIGBUS, BUS_ADRERR, address, 0)


@uffd_case("fork-grandchild", mem=ALL, features=FORK, pages=1, rows=("EV-38",), kind=Kind.DETAIL)
def test_fork_grandchild(ctx: Context) -> None:
    """A child that forks in turn is announced to its own handle, which brings the handle of the grandchild."""
    ctx.src.fill()
    with (
        forked(ctx, forks(lambda _: ctx.dst.expect_pattern_of(ctx.src))) as (_, uffd, child_uffd),
        read_fork(child_uffd) as grandchild_uffd,
    ):
        grandchild_uffd.wait_fault(ctx.dst.start)
        uffd.expect_no_message()
        child_uffd.expect_no_message()
        grandchild_uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@uffd_case("fork-wiped", mem=(ANON,), features=FORK, pages=1, rows=("EV-37",), kind=Kind.DETAIL)
def test_fork_wiped(ctx: Context) -> None:
    """Memory under MADV_WIPEONFORK is registered and missing in the child, though the parent has the page."""
    ctx.dst.fill()
    advise(ctx.dst.range, Advice.WIPEONFORK)
    with forked(ctx, lambda _: ctx.dst.expect_zero()) as (_, _, child_uffd):
        child_uffd.wait_fault(ctx.dst.start)
        child_uffd.zeropage(ctx.dst.range)


# ---- when there is no message --------------------------------------------------------------------------------------


@uffd_case("fork-silent", mem=ALL, features=FORK, pages=2, rows=("EV-36",), kind=Kind.DETAIL)
def test_fork_silent(ctx: Context) -> None:
    """Neither a new thread, nor vfork, nor a fork without registered memory in the child is announced."""

    def start_thread() -> None:
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()

    def spawn() -> None:
        with fails(errno.ENOENT):
            os.posix_spawn("/nonexistent/program", ["program"], {})

    def keep_and_fork() -> None:
        advise(ctx.dst.range, Advice.DONTFORK)
        forks(passes)(None)  # type: ignore[arg-type]

    def life(_: Channel) -> None:
        start_thread()
        spawn()
        keep_and_fork()

    with monitored(ctx.dst.range, MISSING, life, FORK) as (child, uffd), recorder(ctx, uffd) as reader:
        child.wait()
        expect(reader.messages, [], "EV-36: messages")
    with Uffd.open(FORK) as unused, recorder(ctx, unused) as reader:
        with Child(passes):
            pass
        expect(reader.messages, [], "EV-36: messages to a handle with which nothing is registered")


@uffd_case("fork-two-handles", mem=ALL, features=FORK, pages=2, rows=("EV-35", "EV-04"), kind=Kind.DETAIL)
def test_fork_two_handles(ctx: Context) -> None:
    """A fork of memory of two handles is announced to one after the other, and holds the fills of both up at once."""

    def target(channel: Channel) -> None:
        with Uffd.open(FORK) as one, Uffd.open(FORK) as two:
            two.register(ctx.dst.page(1), MISSING)
            one.register(ctx.dst.page(0), MISSING)
            channel.send(None, one.fd, two.fd)
        forks(passes)(channel)

    with Child(target) as child:
        _, fds = child.receive_fds()
        with Uffd(fds[0], FORK) as one, Uffd(fds[1], FORK) as two:
            await_child_event(one, child)
            expect(two.readable(), False, "POLLIN of the second handle before the first message is read")
            with promise("EV-04", "the second handle"), held_up():
                two.copy(ctx.dst.page(1).start, ctx.src.start, ctx.page_size)
            read_fork(one).close()
            read_fork(two).close()
            child.expect_end(one, two)


# ---- messages that cannot be delivered -----------------------------------------------------------------------------


@uffd_case("fork-no-descriptor", mem=(ANON,), features=FORK, pages=1, rows=("EV-33",), kind=Kind.DETAIL)
def test_fork_no_descriptor(ctx: Context) -> None:
    """A reader out of descriptors gets EMFILE and the message stays; it can be read when there is one again."""
    with monitored(ctx.dst.range, MISSING, forks(passes), FORK) as (child, uffd):
        await_child_event(uffd, child)
        with out_of_descriptors():
            for _ in range(2):
                with fails(EMFILE):
                    uffd.read()
        expect(uffd.readable(), True, "POLLIN after EMFILE")
        await_child_event(uffd, child)
        with read_fork(uffd) as child_uffd:
            child.expect_end(uffd, child_uffd)


LOST = Defect(
    id="D-EV-34",
    summary="a read of UFFD_EVENT_FORK into memory that cannot be written fails with EFAULT, yet takes the message "
    "away and leaves a userfaultfd open that nobody was told of",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="Read into memory that is there; it happens to a monitor with a defect only.",
    shows=r"expected \(True, 0\), got \(False, 1\)",
)


def read_badly(ctx: Context) -> tuple[bool, int]:
    """Read FORK into nowhere; return whether it could be read again, and how many descriptors came up untold."""
    with monitored(ctx.dst.range, MISSING, forks(passes), FORK) as (child, uffd):
        await_child_event(uffd, child)
        before = open_userfaultfds()
        with fails(EFAULT):
            syscalls.read_into(uffd.fd, 0, 32)
        leaked = open_userfaultfds() - before
        for fd in leaked:
            os.close(fd)
        kept = uffd.readable()
        if kept:
            read_fork(uffd).close()
        child.expect_end(uffd)
    return kept, len(leaked)


@uffd_case("fork-bad-buffer", mem=(ANON,), features=FORK, pages=1, rows=("EV-34",), defect=LOST)
def test_fork_bad_buffer(ctx: Context) -> None:
    """A FORK message that could not be copied to its reader stays queued, and no descriptor is left behind."""
    expect(read_badly(ctx), (True, 0), "EV-34: message kept, descriptors left behind")


@uffd_case("fork-bad-buffer-or-lost", mem=(ANON,), features=FORK, pages=1, rows=("EV-34",), kind=Kind.DETAIL)
def test_fork_bad_buffer_or_lost(ctx: Context) -> None:
    """A FORK message that could not be copied to its reader stays queued, or is lost and the fork goes on."""
    kept, leaked = read_badly(ctx)
    expect(leaked, 0 if kept else 1, f"EV-34: descriptors left behind, the message {'kept' if kept else 'lost'}")


# ---- forks that come to nothing ------------------------------------------------------------------------------------


@uffd_case("fork-kill", mem=ALL, features=FORK, pages=1, rows=("EV-40", "EV-03"))
def test_fork_kill(ctx: Context) -> None:
    """A fork that is killed while its message is unread takes the message back."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        with (
            promise("EV-40", number.name),
            monitored(ctx.dst.range, MISSING, forks(passes), FORK) as (child, uffd),
        ):
            expect_killed(uffd, child, number)


def fork_errno() -> int:
    """Fork a child that ends at once, and return 0, or the errno where that fails."""
    try:
        pid = os.fork()
    except OSError as error:
        return error.errno or 0
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return 0


def failing_fork(ctx: Context, prepare: Callable[[], int]) -> None:
    """Fork a process where that must fail with ENOMEM; ``prepare`` sees to that and returns an address to register."""

    def target(channel: Channel) -> None:
        page = Range(prepare(), PAGE_SIZE)
        with Uffd.open(FORK) as uffd:
            uffd.register(page, MISSING)
            channel.send(page.start, uffd.fd)
        channel.receive()
        channel.send(fork_errno())
        channel.receive()
        expect(peek(page.start, PAGE_SIZE), peek(ctx.src.start, PAGE_SIZE), "the page filled afterwards")

    with Child(target) as child:
        address, (fd,) = child.receive_fds()
        with Uffd(fd, FORK) as uffd, recorder(ctx, uffd) as reader:
            child.send()
            number = child.receive()
            if not number:
                raise Skip("fork(2) succeeds where it should run out of memory: set vm.overcommit_memory to 0")
            expect(errno.errorcode[number], "ENOMEM", "errno of fork")
            expect_harmless(ctx, uffd, [type(message) for message in reader.messages], reader.children)
            uffd.copy(address, ctx.src.start, PAGE_SIZE)
            child.send()
            child.wait()


def expect_harmless(ctx: Context, uffd: Uffd, messages: list[type], children: list[Uffd]) -> None:
    """Assert that a fork that failed has sent nothing, or one message whose handle serves nobody."""
    expect(messages, [Forked] * len(messages), "messages of a fork that failed")
    expect(len(messages) <= 1, True, f"at most one message ({len(messages)})")
    for stale in children:
        with refuses(ESRCH, output=UNTOUCHED):
            stale.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@uffd_case("fork-fails", mem=(ANON,), features=FORK, pages=1, rows=("EV-40",), bugs=(18,))
def test_fork_fails(ctx: Context) -> None:
    """A fork that fails while it copies the memory sends no message, or one whose handle is dead; fills go on."""

    def exhaust_memory() -> int:
        """Map more, behind the page to be registered, than a fork may copy: two halves that grow together."""
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total = sum(int(meminfo[name].split()[0]) << 10 for name in ("MemTotal", "SwapTotal"))
        half = total * 3 // 4 // PAGE_SIZE * PAGE_SIZE
        flags = MAP_PRIVATE | MAP_ANONYMOUS
        base = map_memory(2 * half + 2 * PAGE_SIZE, prot=PROT_NONE, flags=flags | MAP_NORESERVE)
        for at in (base + 2 * PAGE_SIZE, base + 2 * PAGE_SIZE + half):
            map_memory(half, at=at, flags=flags | MAP_FIXED)
        return map_memory(PAGE_SIZE, at=base, flags=flags | MAP_FIXED)

    failing_fork(ctx, exhaust_memory)


@uffd_case(
    "fork-fails-late", mem=(ANON,), features=FORK, needs=("cap_sys_admin",), pages=1, rows=("EV-40",), bugs=(18,)
)
def test_fork_fails_late(ctx: Context) -> None:
    """A fork that fails after it has copied the memory sends no message, or one whose handle is dead; fills go on."""

    def lose_init() -> int:
        """Enter a PID namespace whose first process has ended already: no process can be born there."""
        syscalls.call("unshare", CLONE_NEWPID)
        fork_errno()
        return map_memory(PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS)

    failing_fork(ctx, lose_init)
