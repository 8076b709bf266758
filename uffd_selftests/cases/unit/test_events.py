# SPDX-License-Identifier: GPL-2.0-only
"""The events of a process that does not cooperate: fork, mremap and madvise in a child that knows nothing of it."""

from __future__ import annotations

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, MISSING, WP, Child, Context, CopyMode, Feature, Forked, Remapped, Removed, expect, remap,
)  # fmt: skip

EVENTS = Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE


def live(ctx: Context) -> None:
    """Read and write the first half, move the area, go on with the second half, then drop it all and find zeroes."""
    half = (ctx.nr_pages + 1) // 2
    ctx.dst.expect_pattern_of(ctx.src, 0, half, write_back=True)
    ctx.dst.start = remap(ctx.dst.range, to=ctx.src.start)
    ctx.dst.expect_pattern_of(ctx.src, half, write_back=True)
    ctx.dst.release()
    ctx.dst.expect_zero()


def events(ctx: Context, *, wp: bool = False) -> None:
    """Serve a child through its whole life, following it by its events."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, MISSING | WP if wp else MISSING)
    before, after = ctx.dst.range, ctx.src.range

    mode = CopyMode.WP if wp else CopyMode(0)
    handler = ctx.handler(copy_mode=mode, unregister_removed=True, log_events_only=True)
    with handler, Child(lambda _: live(ctx)):
        pass

    match handler.messages:
        case [Forked(), *rest]:
            moved = Remapped(before.start, after.start, before.len)
            expect(rest, [moved, Removed(after.start, after.end)], "events after UFFD_EVENT_FORK")
        case messages:
            raise AssertionError(f"expected UFFD_EVENT_FORK first, got {messages}")
    seen = handler.stats
    expect(
        (seen.missing, seen.write, seen.wp),
        (ctx.nr_pages, 0, ctx.nr_pages if wp else 0),
        "missing faults, writes among them, write-protect faults",
    )


@uffd_case("events", mem=ALL, features=EVENTS, rows=("EV-02", "EV-05", "EV-08", "EV-18", "EV-28", "EV-29", "EV-32"))
def test_events(ctx: Context) -> None:
    """A child's fork, mremap and madvise are announced, and its faults can be resolved all along."""
    events(ctx)


@uffd_case(
    "events-wp",
    mem=ALL,
    features=EVENTS | Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM,
    rows=("EV-02", "EV-05", "EV-08", "EV-18", "EV-28", "EV-29", "EV-32", "WP-19", "WP-28"),
)
def test_events_wp(ctx: Context) -> None:
    """The same holds for a child whose pages are write-protected as they arrive."""
    events(ctx, wp=True)
