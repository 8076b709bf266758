# SPDX-License-Identifier: GPL-2.0-only
"""One fork that copies mappings of several modes and handles side by side, and pages of every kind."""

from __future__ import annotations

from dataclasses import dataclass

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, FORK, MISSING, MIXED, READ_TRAPPED, RWP, SHMEM_PRIVATE, SYNC_RWP, TRAPPED, UNREGISTERED, WP,
    WRITEPROTECT, Channel, Child, Context, Feature, Pagemap, RegisterMode, Uffd, await_fault, expect_modes,
    expect_rwp_trapped, expect_trapped, faulting, forked_child, huge_mixture, mixture, promise, rewrite, touch,
    undisturbed,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A page that is a mapping of its own."""

    mode: RegisterMode
    told: bool = True
    """Whether its handle has UFFD_FEATURE_EVENT_FORK: the other one has not."""
    protected: bool = False

    @property
    def hole(self) -> bool:
        """Whether it is left empty."""
        return self.mode == MISSING


def across_fork(ctx: Context, features: Feature, parts: list[Part]) -> None:
    """Fork a process with such mappings side by side; look at each of them, on both sides."""
    area = ctx.dst
    inherited = {page: part for page, part in enumerate(parts) if part.told and part.mode}
    marked = {page for page, part in enumerate(parts) if part.protected}
    ctx.src.fill()

    def child(_: Channel) -> None:
        expect_modes(area.range, *[part.mode if part.told else UNREGISTERED for part in parts])
        Pagemap.expect_protected(area, marked & set(inherited), "in the child")
        for page, part in enumerate(parts):
            write = part.mode != RWP or page not in inherited or not part.protected
            touch(area.page(page), area.page_size, write=write and not part.hole)
        Pagemap.expect_protected(area, (), "in the child, when it has touched every page")

    with Uffd.open(features) as other:
        for page, part in enumerate(parts):
            if not part.hole:
                area.fill(page, 1)
            uffd = ctx.uffd if part.told else other
            if part.mode:
                uffd.register(area.page(page), part.mode)
            if part.protected:
                (uffd.rwprotect if part.mode & RWP else uffd.writeprotect)(area.page(page))
        with promise("EV-29", "child"), forked_child(ctx, child) as (process, uffd):
            for page, part in inherited.items():
                if part.hole:
                    await_fault(uffd, process, area.page(page).start)
                    uffd.copy(area.page(page).start, ctx.src.page(page).start, area.page_size)
                elif part.protected:
                    await_fault(uffd, process, area.page(page).start, READ_TRAPPED if part.mode & RWP else TRAPPED)
                    (uffd.resolve if part.mode & RWP else uffd.unprotect)(area.page(page))
            other.expect_no_message()
        with promise("EV-29", "parent"):
            expect_modes(area.range, *[part.mode for part in parts])
            Pagemap.expect_protected(area, marked, "in the parent")
            for page, part in enumerate(parts):
                uffd = ctx.uffd if part.told else other
                if part.protected:
                    (expect_rwp_trapped if part.mode & RWP else expect_trapped)(uffd, area, page)
                elif part.hole and not (ctx.mem.shared or (ctx.mem == SHMEM_PRIVATE and not part.told)):
                    # what the child brought into the page cache is not missing
                    with faulting(uffd, area.page(page).start):
                        uffd.copy(area.page(page).start, ctx.src.page(page).start, area.page_size)
                else:
                    undisturbed(uffd, lambda page=page: touch(area.page(page), area.page_size, write=True))  # type: ignore[misc]
            for uffd in (ctx.uffd, other):
                uffd.expect_no_message()


@uffd_case(
    "fork-modes-side-by-side",
    mem=ALL,
    features=WRITEPROTECT | FORK,
    pages=8,
    spare_hugepages=8,
    rows=("EV-29", "WP-18", "WP-19"),
    bugs=(58,),
    kind=Kind.DETAIL,
)
def test_fork_modes_side_by_side(ctx: Context) -> None:
    """Of mappings side by side those of the handle with UFFD_FEATURE_EVENT_FORK keep mode and protection, no others."""
    parts = [
        Part(WP, protected=True),
        Part(MISSING),
        Part(WP, told=False, protected=True),
        Part(UNREGISTERED),
        Part(WP),
        Part(MISSING, told=False),
        Part(MISSING | WP, protected=True),
        Part(MISSING | WP, told=False, protected=True),
    ]
    across_fork(ctx, WRITEPROTECT, parts)


@uffd_case(
    "fork-modes-side-by-side-rwp",
    mem=ALL,
    features=WRITEPROTECT | SYNC_RWP | FORK,
    pages=8,
    spare_hugepages=8,
    rows=("RW-52", "RW-53", "EV-29"),
    kind=Kind.DETAIL,
)
def test_fork_modes_side_by_side_rwp(ctx: Context) -> None:
    """So it is with mappings for read-write protection among others for write protection."""
    parts = [
        Part(RWP, told=False, protected=True),
        Part(RWP, protected=True),
        Part(WP, protected=True),
        Part(RWP, told=False),
        Part(MISSING | RWP, protected=True),
        Part(WP, told=False, protected=True),
        Part(RWP),
        Part(MISSING),
    ]
    across_fork(ctx, WRITEPROTECT | SYNC_RWP, parts)


@uffd_case(
    "fork-wp-kinds",
    mem=ALL,
    features=WRITEPROTECT,
    needs=("swap",),
    pages=MIXED,
    spare_hugepages=MIXED,
    rows=("WP-18",),
    bugs=(58,),
    kind=Kind.DETAIL,
)
def test_fork_wp_kinds(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_FORK no page is write-protected in the child: not in swap, nor zero, nor a marker."""
    mix = mixture(ctx, WP)

    def child(_: Channel) -> None:
        expect_modes(mix.area.range, UNREGISTERED)
        mix.expect_unmarked("in the child")
        mix.expect_accessible()

    with Child(child) as process:
        process.expect_end(ctx.uffd)
    mix.expect_marks("in the parent")
    mix.expect_trapped(ctx.uffd)


@uffd_case(
    "fork-event-wp-kinds",
    mem=ALL,
    features=WRITEPROTECT | FORK,
    needs=("swap",),
    pages=MIXED,
    spare_hugepages=MIXED,
    rows=("WP-19",),
    kind=Kind.DETAIL,
)
def test_fork_event_wp_kinds(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_FORK every kind of page is write-protected in the child as in the parent."""
    mix = mixture(ctx, WP)
    area = mix.area

    def child(_: Channel) -> None:
        expect_modes(area.range, WP)
        mix.expect_marks("in the child")
        mix.expect_contents()
        touch(area.range, area.page_size, write=True)
        Pagemap.expect_protected(area, (), "in the child, when it has written to every page")

    with forked_child(ctx, child) as (process, uffd):
        for page in sorted(mix.protected):
            await_fault(uffd, process, area.page(page).start, TRAPPED)
            uffd.unprotect(area.page(page))
            ctx.uffd.expect_no_message()
    mix.expect_marks("in the parent")
    mix.expect_trapped(ctx.uffd)


@uffd_case(
    "fork-event-wp-huge",
    mem=(ANON,),
    features=WRITEPROTECT | FORK,
    needs=("thp",),
    rows=("WP-19",),
    kind=Kind.DETAIL,
)
def test_fork_event_wp_huge(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_FORK huge pages are write-protected in the child page by page as in the parent."""
    mix = huge_mixture(ctx, WP)
    pages = (3, mix.count - 1, mix.cut[1])

    def child(_: Channel) -> None:
        mix.expect_marks("in the child")
        mix.expect_contents()
        for page in (*pages, mix.cut[0] - 1, 2 * mix.count):
            rewrite(mix.area, page)
        mix.expect_marks("in the child, some un-protected", pages=mix.protected - set(pages))

    with forked_child(ctx, child) as (process, uffd):
        for page in pages:
            await_fault(uffd, process, mix.area.page(page).start, TRAPPED)
            uffd.unprotect(mix.area.page(page))
    mix.expect_marks("in the parent")
    mix.expect_trapped(ctx.uffd)
