# SPDX-License-Identifier: GPL-2.0-only
"""Read-write protection (UFFDIO_RWPROTECT): who is trapped, who is let go on, and what was accessed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from signal import SIGSEGV

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ACCESSED, ALL, ASYNC_RWP, NEW, PAGE_SIZE, PROT_NONE, PROT_READ, PROT_WRITE, READ_TRAPPED, SYNC_RWP, UNREGISTERED,
    WRITE_TRAPPED, AccessError, Area, Context, Fault, Feature, PageCategory, PagefaultFlag, Pagemap, Range, Scan,
    expect, expect_accessed, expect_modes, expect_rwp_trapped, expect_scan, expect_signals, peek, poke, protect,
    regions, rwp_filled, rwp_protected, small_pages, syscalls, touch, undisturbed,
)  # fmt: skip


def touch_some(ctx: Context, area: Area, pages: Sequence[int], *, write: bool = False) -> None:
    """Access the first byte of pages that lie at equal distances; nobody may hear of it."""
    step = (pages[1] - pages[0] if len(pages) > 1 else 1) * ctx.page_size
    where = Range(area.page(pages[0]).start, len(pages) * step)
    undisturbed(ctx.uffd, partial(touch, where, step, write=write))


def overwrite(area: Area, first: int = 0, count: int | None = None) -> None:
    """Store the area's pattern with all bits flipped; no byte is read."""
    replace(area.pattern, flipped=True).fill(area.start, first, area.nr_pages - first if count is None else count)


def expect_no_write(area: Area, page: int) -> None:
    """Assert that a store to a page of a read-only mapping is SIGSEGV.

    Not expect_signals(): its access changes nothing, so an emulator may load first, and the load is an access.
    """
    try:
        poke(area.page(page).start, NEW)
    except AccessError as error:
        expect(error.trap.signo, SIGSEGV, f"signal for a write to page {page} of a PROT_READ mapping")
    else:
        raise AssertionError(f"write to page {page} of a PROT_READ mapping: expected SIGSEGV, got none")


def expect_reported(ctx: Context, area: Area, pages: range, access: Callable[[], object], flags: PagefaultFlag) -> None:
    """Assert that an access to all pages in turn is reported once for each of these, in order, with these flags.

    A handler resolves page by page, so all pages are accessible afterwards.
    """
    with ctx.handler(src=None, log_size=len(pages) + 1) as handler:
        access()
    ctx.uffd.expect_no_message()
    expect(handler.stats.messages, len(pages), f"messages with flags {flags}, one for each protected page")
    for page, message in zip(pages, handler.messages, strict=True):
        expect(message, Fault(area.page(page).start, flags), f"the message of page {page}")
    Pagemap.expect_protected(area, (), "after each page was resolved")


@uffd_case("rwp-async", mem=ALL, features=ASYNC_RWP, post_alloc=small_pages, rows=("RW-77",))
def test_rwp_async(ctx: Context) -> None:
    """With UFFD_FEATURE_RWP_ASYNC an access makes just its own page accessible again, and no message comes of it."""
    area = rwp_protected(ctx)
    every, some = set(range(area.nr_pages)), range(1, min(area.nr_pages, 32), 2)
    touch_some(ctx, area, some)
    Pagemap.expect_protected(area, every - {*some}, "after every second one of the first pages was read")
    touch_some(ctx, area, [area.nr_pages - 1], write=True)
    Pagemap.expect_protected(area, every - {*some, area.nr_pages - 1}, "after the last page was written")
    touch_some(ctx, area, range(area.nr_pages), write=True)
    Pagemap.expect_protected(area, (), "after every page was written")
    area.expect_pattern_of(area)

    ctx.uffd.rwprotect(area.range)
    Pagemap.expect_protected(area, every, "after they were protected again")
    undisturbed(ctx.uffd, partial(overwrite, area))
    Pagemap.expect_protected(area, (), "after every byte was written")
    area.expect_pattern(area.range, flipped=True)
    ctx.uffd.expect_asleep(0)


@uffd_case("rwp-sync", mem=ALL, features=SYNC_RWP, post_alloc=small_pages, rows=("RW-01", "RW-02"))
def test_rwp_sync(ctx: Context) -> None:
    """Every protected page is reported once, read or written, and goes on with its bytes when it is resolved."""
    area = rwp_protected(ctx)
    every = range(area.nr_pages)
    expect_reported(ctx, area, every, partial(area.expect_pattern_of, area), READ_TRAPPED)
    undisturbed(ctx.uffd, partial(area.expect_pattern_of, area, write_back=True))

    ctx.uffd.rwprotect(area.range)
    Pagemap.expect_protected(area, every, "after they were protected again")
    expect_reported(ctx, area, every, partial(overwrite, area), WRITE_TRAPPED)
    area.expect_pattern(area.range, flipped=True)


@uffd_case(
    "rwp-pagemap",
    mem=ALL,
    features=ASYNC_RWP,
    needs=("pagemap_scan",),
    post_alloc=small_pages,
    rows=("AS-19", "AS-20"),
)
def test_rwp_pagemap(ctx: Context) -> None:
    """PAGEMAP_SCAN finds exactly the pages accessed since they were protected, or inverted exactly all others."""
    area = rwp_filled(ctx)
    every, half = range(area.nr_pages), (area.nr_pages + 1) // 2
    expect_accessed(area, every, "before any page is protected")
    ctx.uffd.rwprotect(area.range)
    expect_accessed(area, (), "after all were protected")

    def expect_found(accessed: set[int], when: str) -> None:
        expect_accessed(area, accessed, when)
        others = Pagemap.scan(area.range, ACCESSED, inverted=ACCESSED, room=max(64, area.nr_pages))
        rest = regions(area, set(every) - accessed, PageCategory(0))
        expect_scan(area, others, Scan(rest, area.range.end), f"inverted, {when}")
        written = Pagemap.scan(area.range, PageCategory.WRITTEN)
        expect_scan(area, written, Scan([], area.range.end), f"pages that are PAGE_IS_WRITTEN, {when}")

    touch_some(ctx, area, range(half))
    expect_found(set(range(half)), "after the first half was read")
    touch_some(ctx, area, [every[-1]], write=True)
    expect_found({*range(half), every[-1]}, "after the last page was written")
    area.expect_pattern_of(area, 0, half)
    expect_found({*range(half), every[-1]}, "after the first half was read again")
    ctx.uffd.rwprotect(area.range)
    expect_found(set(), "after all were protected again")


@uffd_case("rwp-mprotect", mem=ALL, features=ASYNC_RWP, post_alloc=small_pages, rows=("RW-48",))
def test_rwp_mprotect(ctx: Context) -> None:
    """Protected pages stay so when the mapping becomes inaccessible or read-only and accessible again."""
    area = rwp_protected(ctx)
    every = set(range(area.nr_pages))
    two = Range(area.start, area.range.len), area.nr_pages // 2 * ctx.page_size

    protect(area.range, PROT_NONE)
    Pagemap.expect_protected(area, every, "while the mapping is PROT_NONE")
    expect_signals(*two, SIGSEGV, "read of a PROT_NONE mapping")
    ctx.uffd.expect_no_message()
    protect(area.range, PROT_READ | PROT_WRITE)
    Pagemap.expect_protected(area, every, "after PROT_NONE and back")

    protect(area.range, PROT_READ)
    Pagemap.expect_protected(area, every, "while the mapping is PROT_READ")
    for page in {0, area.nr_pages - 1}:
        expect_no_write(area, page)
    touch_some(ctx, area, [0])
    Pagemap.expect_protected(area, every - {0}, "after page 0 was read in a PROT_READ mapping")
    protect(area.range, PROT_READ | PROT_WRITE)
    Pagemap.expect_protected(area, every - {0}, "after PROT_READ and back")

    ctx.uffd.set_mode(disable=Feature.RWP_ASYNC)
    expect_rwp_trapped(ctx.uffd, area, area.nr_pages - 1)
    ctx.uffd.set_mode(enable=Feature.RWP_ASYNC)
    undisturbed(ctx.uffd, partial(area.expect_pattern_of, area, write_back=True))
    Pagemap.expect_protected(area, (), "after every page was read and written")


@uffd_case("rwp-gup", mem=ALL, features=ASYNC_RWP, post_alloc=small_pages, rows=("RW-78",))
def test_rwp_gup(ctx: Context) -> None:
    """A page that the kernel takes for a pipe (vmsplice(2)) counts as accessed, it alone, and has its bytes."""
    area = rwp_protected(ctx)
    cold = set(range(area.nr_pages))
    reader, writer = os.pipe()
    with closing(os.fdopen(reader, "rb", 0)) as pipe, closing(os.fdopen(writer, "wb", 0)):
        for page in sorted({0, area.nr_pages // 2, area.nr_pages - 1}):
            vector = (ctypes.c_uint64 * 2)(area.page(page).end - PAGE_SIZE, PAGE_SIZE)
            splice = partial(syscalls.call, "vmsplice", writer, ctypes.addressof(vector), 1, 0)
            expect(undisturbed(ctx.uffd, splice), PAGE_SIZE, f"bytes of page {page} that vmsplice took")
            cold.discard(page)
            Pagemap.expect_protected(area, cold, f"after vmsplice of page {page}")
            same = pipe.read(PAGE_SIZE) == peek(area.page(page).end - PAGE_SIZE, PAGE_SIZE)
            expect(same, True, f"whether the pipe has the bytes of page {page}")
    undisturbed(ctx.uffd, partial(area.expect_pattern_of, area))


@uffd_case("rwp-async-toggle", mem=ALL, features=ASYNC_RWP, post_alloc=small_pages, rows=("SM-01",))
def test_rwp_async_toggle(ctx: Context) -> None:
    """UFFDIO_SET_MODE turns RWP_ASYNC off and on: what is protected still is reported then, or silently resolved."""
    area = rwp_protected(ctx)
    half = area.nr_pages // 2
    first, second = range(half), range(half, area.nr_pages)
    touch_some(ctx, area, first)
    Pagemap.expect_protected(area, second, "asynchronous, after the first half was read")

    ctx.uffd.set_mode(disable=Feature.RWP_ASYNC)
    Pagemap.expect_protected(area, second, "after RWP_ASYNC was disabled")
    expect_reported(ctx, area, second, partial(area.expect_pattern_of, area), READ_TRAPPED)
    ctx.uffd.rwprotect(area.page(0, half))
    expect_reported(ctx, area, first, partial(overwrite, area), WRITE_TRAPPED)

    ctx.uffd.rwprotect(area.range)
    ctx.uffd.set_mode(enable=Feature.RWP_ASYNC)
    Pagemap.expect_protected(area, range(area.nr_pages), "after RWP_ASYNC was enabled again")
    touch_some(ctx, area, first, write=True)
    Pagemap.expect_protected(area, second, "asynchronous again, after the first half was written")
    undisturbed(ctx.uffd, partial(area.expect_pattern, area.range, flipped=True))
    Pagemap.expect_protected(area, (), "asynchronous again, after every byte was read")
    ctx.uffd.expect_asleep(0)


@uffd_case("rwp-close", mem=ALL, features=SYNC_RWP, post_alloc=small_pages, rows=("CL-12",))
def test_rwp_close(ctx: Context) -> None:
    """When the last descriptor is closed, every page is there, accessible, with its bytes, and marked no longer."""
    area = rwp_protected(ctx)
    expect_rwp_trapped(ctx.uffd, area, 0, area.nr_pages - 1)
    ctx.uffd.rwprotect(area.range)
    ctx.uffd.close()
    expect_modes(area.range, UNREGISTERED)
    Pagemap.expect_protected(area, (), "after the descriptor was closed")
    Pagemap.expect_present(area, *range(area.nr_pages))
    area.expect_pattern_of(area, write_back=True)
    overwrite(area)
    area.expect_pattern(area.range, flipped=True)
