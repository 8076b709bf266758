# SPDX-License-Identifier: GPL-2.0-only
"""close(2) with read-write-protected memory: every page is accessible again, every thread goes on."""

from __future__ import annotations

import os
from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, DEADLINE, FORK, KERNEL_FAULTS, MISSING, MIXED, NEW, READ_TRAPPED, RWP, SYNC_RWP, UNREGISTERED, WP,
    WRITEPROTECT, WRITE_TRAPPED, Channel, Child, Context, Feature, Mixture, Pagemap, RegisterMode, Uffd, Waiter,
    eventually, expect, expect_modes, faulting, huge_mixture, mixture, peek, poke, rewrite, rwp_protected, syscalls,
    touch, undisturbed,
)  # fmt: skip


def close_with_trapped(ctx: Context, mode: RegisterMode) -> None:
    """Close the handle while threads are trapped, their messages read or not; then all of a mixture is accessible."""
    mix, uffd = mixture(ctx, mode), ctx.uffd
    area = mix.area
    write = area.page(5).start
    with (
        faulting(uffd, area.page(1).start, flags=READ_TRAPPED) as read,
        faulting(uffd, write, flags=WRITE_TRAPPED, call=partial(mix.rewrite, 5)),
        faulting(uffd, area.page(2).start, read=False),
    ):
        first = area.page(1).start
        uffd.close()
        expect_modes(area.range, UNREGISTERED)
        Pagemap.expect_protected(area, (), "after the last close")
        expect(read.result(), peek(first), "the byte that was read")
    mix.expect_accessible()


@uffd_case("close-rwp", mem=ALL, features=SYNC_RWP, needs=("swap",), pages=MIXED, rows=("CL-12",))
def test_close_rwp(ctx: Context) -> None:
    """The last close makes every protected page accessible, with its bytes, and lets every trapped thread go on."""
    close_with_trapped(ctx, RWP)


@uffd_case("close-rwp-missing", mem=ALL, features=SYNC_RWP, needs=("swap",), pages=MIXED, rows=("CL-12",))
def test_close_rwp_missing(ctx: Context) -> None:
    """So it does where the memory is registered for missing pages as well."""
    close_with_trapped(ctx, MISSING | RWP)


@uffd_case("close-rwp-thp", mem=(ANON,), features=SYNC_RWP, needs=("thp",), rows=("CL-12",))
def test_close_rwp_thp(ctx: Context) -> None:
    """The last close makes huge pages accessible that were protected whole or in part."""
    mix, uffd = huge_mixture(ctx), ctx.uffd
    area = mix.area
    with (
        faulting(uffd, area.page(7).start, flags=READ_TRAPPED),
        faulting(uffd, area.page(mix.cut[0]).start, flags=WRITE_TRAPPED, call=partial(rewrite, area, mix.cut[0])),
    ):
        uffd.close()
        expect_modes(area.range, UNREGISTERED)
        mix.expect_marks("after the last close", pages=())
    mix.expect_contents()
    touch(area.range, area.page_size, write=True)


@uffd_case("close-rwp-syscall", mem=ALL, features=SYNC_RWP, needs=("kernel_faults",), pages=3, rows=("CL-12",))
def test_close_rwp_syscall(ctx: Context) -> None:
    """System calls that wait at protected pages complete after the last close."""
    with Uffd.open(SYNC_RWP, KERNEL_FAULTS) as uffd:
        area = ctx.dst
        area.fill()
        uffd.register(area.range, RWP)
        uffd.rwprotect(area.range)
        source, sink = os.memfd_create("source", os.MFD_CLOEXEC), os.memfd_create("sink", os.MFD_CLOEXEC)
        os.pwrite(source, NEW, 0)
        read = partial(syscalls.read_into, source, area.page(0).start, len(NEW))
        write = partial(syscalls.write_from, sink, area.page(2).start, 64)
        with (
            faulting(uffd, area.page(0).start, flags=WRITE_TRAPPED, call=read) as reader,
            faulting(uffd, area.page(2).start, flags=READ_TRAPPED, call=write) as writer,
        ):
            uffd.close()
            expect(reader.result(), len(NEW), "result of read(2)")
            expect(writer.result(), 64, "result of write(2)")
    expect(peek(area.page(0).start, len(NEW)), NEW, "what was read into page 0")
    expect(os.pread(sink, 100, 0), peek(area.page(2).start, 64), "what was written from page 2")
    area.expect_pattern_of(area, 1, 2)
    for fd in (source, sink):
        os.close(fd)


@uffd_case("close-rwp-monitor-killed", mem=ALL, features=SYNC_RWP, pages=3, rows=("CL-13",), kind=Kind.DETAIL)
def test_close_rwp_monitor_killed(ctx: Context) -> None:
    """When the process that holds the last descriptor is killed, protected pages are accessible, and threads go on."""
    area = ctx.dst

    def monitor(channel: Channel) -> None:
        with Uffd(channel.receive_fds()[1][0]) as uffd:
            uffd.wait_fault(area.page(1).start, WRITE_TRAPPED)
            channel.send()
            channel.receive()

    with Child(monitor) as child:
        rwp_protected(ctx)
        child.send(None, ctx.uffd.fd)
        with Waiter(partial(poke, area.page(1).start, NEW)) as waiter:
            child.receive()
            ctx.uffd.expect_asleep(1)
            ctx.uffd.close()
            waiter.expect_sleeping()
            Pagemap.expect_protected(area, range(3), "while the monitor lives")
            child.kill()
            waiter.result()
    eventually(lambda: not any(Pagemap.uffd_wp(area.page(page).start) for page in range(3)), "every mark to be gone")
    expect_modes(area.range, UNREGISTERED)
    expect(peek(area.page(1).start, len(NEW)), NEW, "what was written")
    area.expect_pattern_of(area, 2, 1)
    area.expect_pattern_of(area, 0, 1)
    touch(area.range, area.page_size, write=True)


# ---- a fork that nobody was told of --------------------------------------------------------------------------------


STALE = Defect(
    id="D-CL-14",
    summary="a child whose FORK event was dropped, because its monitor closed the handle, is not registered, and its "
    "pages carry the marks of protection all the same: when it registers them itself it is trapped where it "
    "protected nothing",
    kernels="6.1.192, 6.12.117, 6.18.15, 7.3.4",
    advice="Read FORK events for as long as the monitored process lives; in the child, un-protect what you register.",
    shows=r"in the child: expected PM_UFFD_WP in pagemap on exactly these pages: none",
)


def dropped_fork(ctx: Context, mode: RegisterMode, features: Feature) -> None:
    """Fork while another process has the only descriptor, and closes it without reading the message."""
    protect_features = features | FORK

    def monitor(channel: Channel) -> None:
        with Uffd(channel.receive_fds()[1][0]) as uffd:
            channel.send()
            expect(uffd.readable(DEADLINE), True, "readable, with the event of the fork")

    def forked(mix: Mixture, _: Channel) -> None:
        expect_modes(mix.area.range, UNREGISTERED)
        mix.expect_unmarked("in the child")
        mix.expect_accessible()
        with Uffd.open(features) as own:
            own.register(mix.area.range, WP if mode & WP else RWP)
            undisturbed(own, partial(touch, mix.area.range, mix.area.page_size, write=True))

    with Child(monitor) as reader:
        with Uffd.open(protect_features) as uffd:
            mix = mixture(ctx, mode, uffd=uffd)
            reader.send(None, uffd.fd)
            reader.receive()
        with Child(partial(forked, mix)):
            expect_modes(mix.area.range, UNREGISTERED)
            mix.expect_unmarked("in the parent")
        mix.expect_contents()


@uffd_case(
    "close-event-fork-rwp",
    mem=ALL,
    features=SYNC_RWP | FORK,
    needs=("swap",),
    pages=MIXED,
    spare_hugepages=MIXED,
    rows=("CL-14",),
    defect=STALE,
)
def test_close_event_fork_rwp(ctx: Context) -> None:
    """A child whose FORK event was dropped has no page marked as read-write-protected."""
    dropped_fork(ctx, RWP, SYNC_RWP)


@uffd_case(
    "close-event-fork-wp",
    mem=ALL,
    features=WRITEPROTECT | FORK,
    needs=("swap",),
    pages=MIXED,
    spare_hugepages=MIXED,
    rows=("CL-14",),
    defect=STALE,
)
def test_close_event_fork_wp(ctx: Context) -> None:
    """A child whose FORK event was dropped has no page marked as write-protected."""
    dropped_fork(ctx, WP, WRITEPROTECT)
