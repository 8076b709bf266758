# SPDX-License-Identifier: GPL-2.0-only
"""Which memory cgroup pays for what a monitor in another process fills, and for what is written into a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    MISSING, NOT_HUGETLB, PAGE_SIZE, SHMEM, Channel, Child, Context, MemoryGroup, Pagemap, expect, monitored,
    own_memory_group, promise, touch,
)  # fmt: skip

PAGES = 2048
"""As many as tell what is charged from what each processor has charged beforehand, and from page tables."""
USAGE = {2: "memory.current", 1: "memory.usage_in_bytes"}


def expect_paid(group: MemoryGroup, call: Callable[[], object], *, all_of_it: bool, what: str) -> None:
    """Assert that a call has the group pay for PAGES pages, more or less, or for none.

    Not memory.stat is read: on a machine of many processors that is some seconds old.
    """
    file = group.path / USAGE[group.version]
    before = int(file.read_text())
    call()
    grown = (int(file.read_text()) - before) // PAGE_SIZE
    told = f"{what}: that of {PAGES} pages {grown} are charged, which is {'most' if all_of_it else 'few'}"
    expect(grown > PAGES * 3 // 4 if all_of_it else grown < PAGES // 4, True, told)


@uffd_case("charge-monitor", mem=NOT_HUGETLB, pages=PAGES, rows=("CG-01",), kind=Kind.DETAIL)
def test_charge_monitor(ctx: Context) -> None:
    """A monitor's cgroup pays for nothing that it copies into the memory of another process."""
    area, uffd = ctx.dst, ctx.uffd
    ctx.src.fill()
    uffd.register(area.range, MISSING)
    with own_memory_group() as group, promise("CG-01", "UFFDIO_COPY"):

        def monitor(_: Channel) -> None:
            group.join()
            touch(ctx.src.range, PAGE_SIZE)  # so that its page tables are there
            copy = partial(uffd.copy, area.start, ctx.src.start, area.range.len)
            expect_paid(group, copy, all_of_it=False, what="the monitor's cgroup, after UFFDIO_COPY")

        with Child(monitor):
            pass
    area.expect_pattern_of(ctx.src)


@uffd_case("charge-zeropage", mem=(SHMEM,), pages=PAGES, rows=("CG-01",), kind=Kind.DETAIL)
def test_charge_zeropage(ctx: Context) -> None:
    """Who owns shared memory pays for the pages of zeroes that a monitor outside of its cgroup puts there."""
    area = ctx.dst
    with own_memory_group() as group, promise("CG-01", "UFFDIO_ZEROPAGE"):

        def life(channel: Channel) -> None:
            group.join()
            channel.send()
            channel.receive()

        with monitored(area.range, MISSING, life) as (child, uffd):
            child.receive()
            zero = partial(uffd.zeropage, area.range)
            expect_paid(group, zero, all_of_it=True, what="the owner's cgroup, after UFFDIO_ZEROPAGE")
            child.send()
    area.expect_zero()


@uffd_case("charge-writer", mem=(SHMEM,), pages=PAGES, rows=("CG-01",), kind=Kind.DETAIL)
def test_charge_writer(ctx: Context) -> None:
    """What a monitor writes into the file of the memory with write(2) its own cgroup pays for, not that of the owner.

    They stay charged to the writer when the owner touches them.
    """
    area = ctx.dst
    assert area.fd is not None
    fd, data = area.fd, os.urandom(PAGE_SIZE) * PAGES

    with own_memory_group() as group, promise("CG-01", "write(2)"):

        def life(channel: Channel) -> None:
            group.join()
            channel.send()
            channel.receive()
            touched = partial(touch, area.range, PAGE_SIZE, write=True)
            expect_paid(group, touched, all_of_it=False, what="the owner's cgroup, after a touch of what was written")
            other = ctx.allocate().fd
            assert other is not None
            written = partial(os.pwrite, other, data, 0)
            expect_paid(group, written, all_of_it=True, what="the writer's cgroup, after write(2)")

        def pages_written() -> None:
            expect(os.pwrite(fd, data, 0), len(data), "bytes written")

        with monitored(area.range, MISSING, life) as (child, _):
            child.receive()
            expect_paid(group, pages_written, all_of_it=False, what="the owner's cgroup, after another's write(2)")
            child.send()
    touch(area.range, PAGE_SIZE)
    Pagemap.expect_present(area, *range(PAGES))
