# SPDX-License-Identifier: GPL-2.0-only
"""Read-write protection beside NUMA balancing, which makes pages inaccessible for a moment by the same means."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ANON, PAGE_SIZE, READ_TRAPPED, RWP, SHMEM, SYNC_RWP, Area, Channel, Context, Pagemap, Skip, Sysctl, expect, folios,
    frames, memory_nodes, monitored, touch,
)  # fmt: skip

BALANCING = Path("/sys/kernel/debug/sched/numa_balancing")
SETTINGS = {
    Path("/proc/sys/kernel/numa_balancing"): 1,
    BALANCING / "scan_delay_ms": 1,
    BALANCING / "scan_period_min_ms": 1,
    BALANCING / "scan_period_max_ms": 10,
}
ENOUGH = 200
"""Hints after which some were of the pages that are being used."""
PATIENCE = 4.0
"""Seconds after which the kernel is taken not to give any; then the case is skipped."""


def hints() -> int:
    """Return how many hinting faults there were on this machine (/proc/vmstat)."""
    lines = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return next((int(count) for name, count in lines if name == "numa_hint_faults"), 0)


def use(area: Area, pages: list[int]) -> bool:
    """Use pages until the kernel has hinted at many; returns whether it has."""
    begun, end = hints(), time.monotonic() + PATIENCE
    while hints() < begun + ENOUGH:
        if time.monotonic() > end:
            return False
        for _ in range(20):
            for page in pages:
                touch(area.page(page), PAGE_SIZE)
    return True


@uffd_case(
    "rwprotect-numa", mem=(ANON, SHMEM), variants=("small pages", "16 pages"), features=SYNC_RWP,
    needs=("cap_sys_admin", "pagemap"), pages=1, rows=("RW-51",), kind=Kind.DETAIL,
)  # fmt: skip
def test_rwprotect_numa(ctx: Context, variant: str) -> None:
    """NUMA balancing sends no message, lifts no protection, moves no protected page; its hints can be protected."""
    if len(memory_nodes()) < 2:
        raise Skip("one memory node only: boot with numa=fake=2, or run on a machine with several")
    area = ctx.allocate(128) if variant == "small pages" else folios(ctx, variant, 8)
    guarded = [page for page in range(area.nr_pages) if page % 4 == 1]
    used = [page for page in range(area.nr_pages) if page % 4 in (0, 2)]
    more = used[3]

    def life(channel: Channel) -> None:
        area.fill()
        channel.send()
        channel.receive()
        before = frames(area, *guarded)
        hinted = use(area, used)
        Pagemap.expect_protected(area, guarded, "after NUMA balancing")
        expect(frames(area, *guarded) == before, True, "whether the protected pages are where they were")
        channel.send(hinted)
        channel.receive()
        touch(area.page(more), PAGE_SIZE)
        touch(area.page(guarded[5]), PAGE_SIZE)
        channel.receive()
        area.expect_pattern_of(area)

    with ExitStack() as stack:
        try:
            for path, value in SETTINGS.items():
                stack.enter_context(Sysctl(path, value))
        except OSError as error:
            raise Skip(f"{error.filename}: {error.strerror}: CONFIG_NUMA_BALANCING, and debugfs") from None
        child, uffd = stack.enter_context(monitored(area.range, RWP, life, SYNC_RWP))
        child.receive()
        for page in guarded:
            uffd.rwprotect(area.page(page))
        child.send()
        hinted = child.receive()
        uffd.expect_no_message()
        uffd.rwprotect(area.range)
        child.send()
        for page in (more, guarded[5]):
            uffd.wait_fault(area.page(page).start, READ_TRAPPED)
            uffd.expect_still_asleep(1)
            uffd.resolve(area.page(page))
        uffd.resolve(area.range)
        child.send()
    if not hinted:
        raise Skip("the kernel gives no hints here (numa_hint_faults of /proc/vmstat)")
