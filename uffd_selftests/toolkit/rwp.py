# SPDX-License-Identifier: GPL-2.0-only
"""Read-write protection (UFFDIO_RWPROTECT): pages that stay in memory and that every access stops at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

from uffd_selftests.abi.uapi import PM_PFN_MASK, Feature, PageCategory, PagefaultFlag, RegisterMode
from uffd_selftests.mem_types import Area
from uffd_selftests.toolkit.access import peek, poke, touch
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import expect, promise
from uffd_selftests.toolkit.faulting import NEW, faulting, undisturbed
from uffd_selftests.toolkit.handle import RWP, Uffd
from uffd_selftests.toolkit.memory import Range
from uffd_selftests.toolkit.pagemap import Pagemap, Scan
from uffd_selftests.toolkit.threads import Waiter
from uffd_selftests.toolkit.tracking import Pages, expect_scan, regions

__all__ = [
    "SYNC_RWP",
    "ASYNC_RWP",
    "ACCESSED",
    "READ_TRAPPED",
    "WRITE_TRAPPED",
    "rwp_filled",
    "rwp_protected",
    "rwp_trapped",
    "expect_rwp_trapped",
    "expect_rwp_free",
    "expect_accessed",
    "trapped_at",
    "page_frames",
    "put_back",
    "fill_otherwise",
    "rewrite",
]

SYNC_RWP = Feature.RWP
"""Every access to a protected page is reported, and waits to be let go on."""
ASYNC_RWP = Feature.RWP | Feature.RWP_ASYNC
"""The kernel lets every access go on by itself, and takes the page's protection away with it."""

ACCESSED = PageCategory.ACCESSED
"""What PAGEMAP_SCAN calls pages of memory registered for read-write protection that are not protected."""

READ_TRAPPED = PagefaultFlag.RWP
"""What the message of a read of a protected page says."""
WRITE_TRAPPED = PagefaultFlag.RWP | PagefaultFlag.WRITE
"""What the message of a write to a protected page says."""


def rwp_filled(ctx: Context, mode: RegisterMode = RWP, area: Area | None = None) -> Area:
    """Return the destination area (or another one), its pages present, registered, none of them protected."""
    area = area or ctx.dst
    area.fill()
    ctx.uffd.register(area.range, mode)
    return area


def rwp_protected(ctx: Context, mode: RegisterMode = RWP, area: Area | None = None) -> Area:
    """Return the destination area (or another one), its pages present, registered and protected."""
    area = rwp_filled(ctx, mode, area)
    ctx.uffd.rwprotect(area.range)
    Pagemap.expect_protected(area, range(area.nr_pages), "after UFFDIO_RWPROTECT")
    return area


@contextmanager
def rwp_trapped(uffd: Uffd, area: Area, page: int, *, write: bool = False, at: int | None = None) -> Iterator[Waiter]:
    """Have a thread read the first bytes of a page, or with ``write`` store NEW there, and be trapped.

    Exactly the one message of such an access is read. Somebody has to let the thread go on: at the end of the block its
    access must come to an end, and a store must be found there.
    """
    start = area.page(page).start
    call = partial(poke, start, NEW) if write else partial(peek, start, len(NEW))
    with faulting(uffd, start, call=call, flags=WRITE_TRAPPED if write else READ_TRAPPED, at=at) as waiter:
        yield waiter
    if write:
        expect(peek(start, len(NEW)), NEW, "what was written, after the write was let go on")


def expect_rwp_trapped(uffd: Uffd, area: Area, *pages: int, write: bool = False) -> None:
    """Assert that a read of each of the pages (or a write) is trapped, and goes on when its protection is resolved.

    The pages are accessible afterwards. A read must see what was there before; a write leaves NEW.
    """
    for page in pages:
        with promise(f"page {page}"):
            with rwp_trapped(uffd, area, page, write=write) as waiter:
                uffd.resolve(area.page(page))
            uffd.expect_no_message()
            if not write:
                expect(waiter.result(), peek(area.page(page).start, len(NEW)), "what the read got")


def expect_rwp_free(uffd: Uffd, area: Area, *pages: int) -> None:
    """Assert that nothing stops a read of any of the pages, nor a write, which changes nothing."""
    for page in pages:
        for write in (False, True):
            with promise(f"page {page}, {'write' if write else 'read'}"):
                undisturbed(uffd, partial(touch, area.page(page), area.page_size, write=write))


def expect_accessed(area: Area | Pages, pages: Iterable[int], when: str) -> None:
    """Assert that PAGEMAP_SCAN reports exactly these pages of the area as accessed, and looks at the whole."""
    found = Pagemap.scan(area.range, ACCESSED, room=max(64, area.nr_pages))
    expect_scan(area, found, Scan(regions(area, pages, ACCESSED), area.range.end), when)


def trapped_at(
    uffd: Uffd, address: int, page: Range, *, write: bytes = b"", told: int | None = None
) -> AbstractContextManager[Waiter]:
    """Have a thread read one byte at any address of a page, or store ``write`` there, and be trapped.

    The message must name the start of the page, or the address ``told``.
    """
    call = partial(poke, address, write) if write else partial(peek, address)
    flags = WRITE_TRAPPED if write else READ_TRAPPED
    return faulting(uffd, address, call=call, flags=flags, at=page.start if told is None else told)


def page_frames(where: Range) -> list[str]:
    """Return of each base page which memory is behind it; all alike where that is not told, without CAP_SYS_ADMIN."""
    return [hex(entry & PM_PFN_MASK) for entry in Pagemap.entries(where)]


def put_back(area: Area, *pages: int) -> None:
    """Write the area's own pattern over pages where something else was written; they must be accessible."""
    for page in pages:
        area.fill(page, 1)


def fill_otherwise(area: Area) -> None:
    """Fill an area with other bytes than fill() does: what comes from there is not taken for what was there."""
    replace(area.pattern, flipped=True).fill(area.start, 0, area.nr_pages)


def rewrite(area: Area, page: int) -> None:
    """Store in the first bytes of a page what the area's pattern has there.

    It changes nothing, and is a write alone: of the access that touch() makes, an emulator may make a read at first.
    """
    poke(area.page(page).start, area.pattern.head(page))
