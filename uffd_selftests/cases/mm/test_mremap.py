# SPDX-License-Identifier: GPL-2.0-only
"""mremap_test and hugetlb-mremap: what mremap(2) does with several mappings, and with a shared page table."""

from __future__ import annotations

from errno import EFAULT

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    HUGETLB, MISSING, NOT_HUGETLB, UNREGISTERED, Area, Context, Range, expect, expect_modes, fails, peek, poke, promise,
    remap, shared_page_table, touch_trapped, undisturbed, unmap,
)  # fmt: skip

MAPPINGS = (0, 2, 4, 6, 8)
"""The pages that are mapped, each by itself."""


def mapped_pages(area: Area) -> list[int]:
    """Return which of the pages can be read."""
    return [page for page in MAPPINGS if touch_trapped(area.page(page), area.page_size) == [None]]


@uffd_case(
    "mremap-invalid-vmas",
    mem=NOT_HUGETLB,
    variants=("last", "all but the first"),
    pages=9,
    rows=("EV-27",),
    kind=Kind.VERSION,
)
def test_mremap_invalid_vmas(ctx: Context, variant: str) -> None:
    """An mremap of several mappings says EFAULT if one is registered, and has moved those before it, or none."""
    area, place = ctx.dst, ctx.allocate()
    area.fill()
    registered = MAPPINGS[-1:] if variant == "last" else MAPPINGS[1:]
    for page in MAPPINGS:
        if page in registered:
            ctx.uffd.register(area.page(page), MISSING)
    for page in range(1, 9, 2):
        unmap(area.page(page))
    unmap(place.range)
    with promise("EV-27"), fails(EFAULT):
        undisturbed(ctx.uffd, lambda: remap(area.range, to=place.start))
    before = [page for page in MAPPINGS if page not in registered]
    moved = mapped_pages(place)
    expect(moved in ([], before), True, f"moved {moved}: the mappings before the first registered one, or none")
    expect(mapped_pages(area), [page for page in MAPPINGS if page not in moved], "mappings at the old place")
    for page in MAPPINGS:
        (place if page in moved else area).expect_pattern_of(area, page, 1)
        if page in registered:
            expect_modes(area.page(page), MISSING)


TOO_LONG = Defect(
    id="D-EV-47",
    summary="mremap(2) of huge pages says ENOMEM for most lengths from 4 GiB on: what was moved is counted in an int",
    kernels="6.12.117, 7.3.4, where a page table of huge pages maps so much: arm64 with pages of 16 kB",
    advice="Move mappings of huge pages in pieces below 2 GiB.",
    shows=r"mremap\(.*\): ENOMEM",
)


@uffd_case(
    "hugetlb-mremap",
    mem=(HUGETLB,),
    pages=1,
    rows=("EV-24", "EV-47"),
    bugs=(54,),
    defect=TOO_LONG,
    kind=Kind.DETAIL,
    may_hang_kernel=True,  # where the page table is not shared after all
)
def test_hugetlb_mremap(ctx: Context) -> None:
    """Watched huge pages keep their contents when they move away from a page table that another mapping shares."""
    with shared_page_table(ctx.page_size) as (old, other):
        ctx.uffd.register(old, MISSING)
        new = Range(other.end, old.len)
        with promise("EV-47"):
            undisturbed(ctx.uffd, lambda: remap(old, to=new.start))
        expect_modes(new, UNREGISTERED)
        expect(peek(new.start), b"\1", "a byte of the moved mapping")
        poke(new.start + ctx.page_size, b"\2")
        expect(peek(other.start + ctx.page_size), b"\2", "a byte written to it, in the other mapping")
        expect([trap is None for trap in touch_trapped(Range(old.start, 1), 1)], [False], "the old place is readable")
    ctx.uffd.expect_no_message()
