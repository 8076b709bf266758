# SPDX-License-Identifier: GPL-2.0-only
"""UFFD_FEATURE_SIGBUS: a signal in place of a message."""

from __future__ import annotations

from signal import SIGBUS

from uffd_selftests.case import uffd_case
from uffd_selftests.common import ALL, MISSING, WP, Action, Child, Context, CopyMode, Feature, expect, expect_signals


def sigbus(ctx: Context, *, wp: bool = False) -> None:
    """Meet the signal, resolve it, and meet it in a child, without a single page-fault message."""
    half = ctx.dst.page(0, (ctx.nr_pages + 1) // 2)
    pages = half.len // ctx.page_size
    ctx.uffd.register(ctx.dst.range, MISSING | WP if wp else MISSING)
    ctx.src.fill(0, pages)

    expect_signals(half, ctx.page_size, SIGBUS, "read of a missing page")
    ctx.uffd.copy(half.start, ctx.src.start, half.len, CopyMode.WP if wp else CopyMode(0))
    ctx.dst.expect_pattern_of(ctx.src, 0, pages)
    if wp:
        expect_signals(half, ctx.page_size, SIGBUS, "write to a protected page", write=True)
        ctx.uffd.unprotect(half)
    expect_signals(half, ctx.page_size, None, "write after the fault was resolved", write=True)
    ctx.dst.expect_pattern_of(ctx.src, 0, pages)
    ctx.uffd.expect_no_message()

    ctx.dst.release()
    record = {"missing": Action.RECORD, "wp": Action.RECORD, "src": None}
    child = Child(lambda _: expect_signals(half, ctx.page_size, SIGBUS, "read in the child"))
    with ctx.handler(**record) as handler, child:
        pass
    expect((handler.stats.messages, handler.stats.fork), (1, 1), "messages, UFFD_EVENT_FORK among them")


@uffd_case("sigbus", mem=ALL, features=Feature.SIGBUS | Feature.EVENT_FORK, rows=("FL-06", "EV-39"))
def test_sigbus(ctx: Context) -> None:
    """With UFFD_FEATURE_SIGBUS a missing page raises SIGBUS, in a forked child too, and sends no message."""
    sigbus(ctx)


@uffd_case(
    "sigbus-wp",
    mem=ALL,
    features=Feature.SIGBUS | Feature.EVENT_FORK | Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM,
    rows=("FL-06", "EV-39"),
)
def test_sigbus_wp(ctx: Context) -> None:
    """With UFFD_FEATURE_SIGBUS a write to a protected page raises SIGBUS until it is un-protected."""
    sigbus(ctx, wp=True)
