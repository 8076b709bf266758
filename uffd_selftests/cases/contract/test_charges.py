# SPDX-License-Identifier: GPL-2.0-only
"""Which cgroup pays for what is filled, and what it may not have any more."""

from __future__ import annotations

from errno import EEXIST, ENOMEM
from signal import SIGBUS

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    EACH_HUGETLB, MISSING, Advice, Channel, Child, Context, Pagemap, Range, UffdError, advise, expect, expect_errno,
    faulting, monitored, own_hugetlb_group, promise, touch_trapped,
)  # fmt: skip


@uffd_case("charge-hugetlb", mem=EACH_HUGETLB, pages=4, rows=("CG-02",), kind=Kind.DETAIL)
def test_charge_hugetlb(ctx: Context) -> None:
    """A huge page is charged to the cgroup of who copies it; at its limit nothing is filled, and later it can be.

    What the owner of the memory may have does not count.
    """
    area, size, uffd = ctx.dst, ctx.page_size, ctx.uffd
    ctx.src.fill()
    uffd.register(area.range, MISSING)
    with own_hugetlb_group() as group:
        limit, usage = group.files(size)

        def pays(pages: int, when: str) -> None:
            expect(int(usage.read_text()) // size, pages, f"huge pages charged to the monitor's cgroup, {when}")

        def monitor(_: Channel) -> None:
            limit.write_text(str(2 * size))
            group.join()
            uffd.copy(area.page(0).start, ctx.src.page(0).start, 2 * size)
            pays(2, "after two were copied")
            for turn in range(3):
                try:
                    uffd.copy(area.page(2).start, ctx.src.page(2).start, size)
                except UffdError as error:
                    expect_errno(error, (ENOMEM, EEXIST), "errno at the limit")
                else:
                    raise AssertionError("expected a refusal at the limit; the call succeeded")
                pays(2, f"at its limit, turn {turn}")
            limit.write_text(group.unlimited)
            uffd.copy(area.page(2).start, ctx.src.page(2).start, size)
            pays(3, "with its limit raised")

        with promise("CG-02"):
            with Child(monitor):
                pass
            Pagemap.expect_present(area, 0, 1, 2)
            area.expect_pattern_of(ctx.src, 0, 3)
            with faulting(uffd, area.page(3).start):
                uffd.copy(area.page(3).start, ctx.src.page(3).start, size)
            pays(3, "after one that somebody else copied")
            advise(area.range, Advice.REMOVE if ctx.mem.shared else Advice.DONTNEED)
            pays(0, "when all were dropped")


@uffd_case("charge-hugetlb-owner", mem=EACH_HUGETLB, pages=3, rows=("CG-02", "CG-03"), kind=Kind.DETAIL)
def test_charge_hugetlb_owner(ctx: Context) -> None:
    """Who may have no huge page gets those that a monitor outside copies; what it touches itself is SIGBUS."""
    area = ctx.dst
    ctx.src.fill()
    with own_hugetlb_group() as group:
        limit, usage = group.files(ctx.page_size)
        limit.write_text("0")

        def life(channel: Channel) -> None:
            group.join()
            channel.send()
            channel.receive()
            area.expect_pattern_of(ctx.src, 0, 1)
            (trap,) = touch_trapped(Range(area.page(2).start, 1), 1, write=True)
            expect(trap and trap.signo, SIGBUS, "the signal of a touch beyond the limit")

        with promise("CG-02, CG-03"), monitored(area.page(0, 2), MISSING, life) as (child, uffd):
            child.receive()
            uffd.copy(area.page(0).start, ctx.src.page(0).start, ctx.page_size)
            expect(int(usage.read_text()), 0, "bytes charged to the owner")
            child.send()
