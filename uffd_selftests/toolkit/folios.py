# SPDX-License-Identifier: GPL-2.0-only
"""Large folios that are protected in part: what becomes of each of their pages, protected against writes or all access.

A folio is memory that the kernel handles as one: a transparent huge page of any size, however it is mapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from uffd_selftests.abi.uapi import PM_PRESENT, PagefaultFlag, RegisterMode
from uffd_selftests.machine.facts import THP
from uffd_selftests.machine.settings import Sysctl
from uffd_selftests.mem_types import Area, MemType, pmd_size
from uffd_selftests.toolkit.access import peek, poke, touch
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import Skip, expect, promise
from uffd_selftests.toolkit.faulting import NEW, TRAPPED, undisturbed
from uffd_selftests.toolkit.handle import RWP, WP, Uffd
from uffd_selftests.toolkit.memory import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    Advice,
    advise,
    mapped,
    protect,
    remap,
)
from uffd_selftests.toolkit.messages import Fault, Forked, Message
from uffd_selftests.toolkit.migration import memory_nodes, migrate
from uffd_selftests.toolkit.pagemap import Pagemap, page_numbers
from uffd_selftests.toolkit.processes import Channel, Child
from uffd_selftests.toolkit.registered import UNREGISTERED, expect_modes
from uffd_selftests.toolkit.rwp import READ_TRAPPED, WRITE_TRAPPED
from uffd_selftests.toolkit.swap import swap_out
from uffd_selftests.toolkit.thp import huge_area
from uffd_selftests.toolkit.threads import Waiter

__all__ = [
    "SMALL_FOLIOS",
    "FOLIOS",
    "AGAINST_WRITES",
    "AGAINST_ACCESS",
    "Protection",
    "folios",
    "expect_sweep",
    "expect_bytes_kept",
    "halves_protected",
    "folio_parts",
    "folio_zapped",
    "folio_forked",
    "folio_forked_event",
    "folio_swapped",
    "folio_remapped",
    "folio_remapped_event",
    "folio_mprotected",
    "folio_unregistered",
    "folio_migrated",
    "folio_async",
]

SMALL_FOLIOS = ("4 pages", "16 pages")
FOLIOS = (*SMALL_FOLIOS, "huge page")
"""The variants of a case that looks at folios of several sizes."""


@dataclass(frozen=True)
class Protection:
    """One of the two protections of pages, so that what holds for both is written once."""

    mode: RegisterMode
    trapped_write: PagefaultFlag
    trapped_read: PagefaultFlag | None
    """What the message of a read says; None where reads go through."""

    def set(self, uffd: Uffd, area: Area, pages: Iterable[int]) -> None:
        """Protect pages, in one request for each run of them."""
        self._ask(uffd.rwprotect if self.mode is RWP else uffd.writeprotect, area, pages)

    def lift(self, uffd: Uffd, area: Area, pages: Iterable[int]) -> None:
        """Take the protection of pages away, and let those go on who wait there; one request for each run."""
        self._ask(uffd.resolve if self.mode is RWP else uffd.unprotect, area, pages)

    @staticmethod
    def _ask(request: object, area: Area, pages: Iterable[int]) -> None:
        numbers = sorted(pages)
        first = 0
        for i, page in enumerate(numbers):
            if i + 1 == len(numbers) or numbers[i + 1] != page + 1:
                assert callable(request)
                request(area.page(numbers[first], i + 1 - first))
                first = i + 1


AGAINST_WRITES = Protection(WP, TRAPPED, None)
AGAINST_ACCESS = Protection(RWP, WRITE_TRAPPED, READ_TRAPPED)


# ---- folios --------------------------------------------------------------------------------------------------------


def _setting(mem: MemType, size: int) -> Path:
    """Return where transparent huge pages of a size are switched on; Skip where the kernel has none of that size."""
    name = "shmem_enabled" if mem.shared else "enabled"
    path = THP / f"hugepages-{size >> 10}kB" / name
    if path.exists():
        return path
    if size == pmd_size():
        return THP / name
    raise Skip(f"no transparent huge pages of {size >> 10} kB ({path}: ENOENT; Linux 6.8, shared memory 6.11)")


def folios(ctx: Context, variant: str, count: int = 2) -> Area:
    """Map an area that so many folios of a size fill, written to the last byte; Skip where there are none.

    That each is one shows when the first write to it makes all of its pages present.
    """
    if variant == "huge page":
        return huge_area(ctx, count)
    pages = int(variant.partition(" ")[0])
    size = pages * PAGE_SIZE
    if size >= pmd_size():
        raise Skip(f"a folio of {variant} is as large as a huge page here, or there are none")
    path = _setting(ctx.mem, size)
    value = "advise" if ctx.mem.shared else "madvise"
    area = ctx.allocate(count * pages)
    advise(area.range, Advice.HUGEPAGE)
    with ExitStack() as stack:
        with suppress(OSError):  # without the privilege: what is there
            stack.enter_context(Sysctl(path, value))
        for first in range(0, area.nr_pages, pages):
            poke(area.page(first).start, b"\1")
            if not all(Pagemap.have(area.page(first, pages), PM_PRESENT)):
                remedy = f"run as root, or echo {value} > {path}" if os.geteuid() else "memory is short or fragmented"
                raise Skip(f"no transparent huge page of {size >> 10} kB to be had: {remedy}")
    area.fill()
    return area


# ---- each page looked at -------------------------------------------------------------------------------------------


MOST = 64
"""So many faults of a sweep tell enough, where a huge page would have several hundred."""


def expect_sweep(
    uffd: Uffd, area: Area, pages: Iterable[int], guard: Protection, *, write: bool = True, most: int = MOST
) -> None:
    """Assert that of all pages of an area, accessed one after another, exactly these are trapped, each once.

    Each is let go on by itself. Afterwards no page is protected, nothing is queued, and nobody waits. A write stores
    the first bytes of the area's pattern. Where there are more than ``most`` pages, those in the middle are let go
    first, in one request.
    """
    pages = sorted(pages)
    if len(pages) > most:
        guard.lift(uffd, area, pages[most // 2 : len(pages) - most // 2])
        pages = pages[: most // 2] + pages[len(pages) - most // 2 :]
        Pagemap.expect_protected(area, pages, "when those in the middle were let go")
    flags = guard.trapped_write if write else guard.trapped_read
    access = "write" if write else "read"
    trapped: list[int] = []
    call = partial(_store, area, _first_bytes(area)) if write else partial(touch, area.range, area.page_size)
    with Waiter(call) as waiter:
        while not waiter.done:
            if not uffd.readable(0.01):
                if len(trapped) > area.nr_pages:
                    break
                continue
            for message in uffd.read():
                page = _page_of(area, message, flags, access)
                if trapped and page == trapped[-1]:
                    raise AssertionError(f"page {page}: expected a {access} to go on when let go; it is trapped again")
                trapped.append(page)
                guard.lift(uffd, area, (page,))
    expect(page_numbers(trapped), page_numbers(pages), f"pages on which a {access} is trapped")
    uffd.expect_still_asleep(0)
    Pagemap.expect_protected(area, (), "when each page was let go")


def _first_bytes(area: Area) -> list[bytes]:
    """Return how each page of the area's pattern begins."""
    found = []
    with mapped(area.page_size, flags=MAP_PRIVATE | MAP_ANONYMOUS) as page:
        for number in range(area.nr_pages):
            area.pattern.fill(page.start - number * area.page_size, number, 1)
            found.append(peek(page.start, 8))
    return found


def _store(area: Area, data: list[bytes]) -> None:
    """Store to the start of each page; a write access that changes nothing may begin with a load (emulators)."""
    for number, some in enumerate(data):
        poke(area.page(number).start, some)


def _page_of(area: Area, message: Message, flags: PagefaultFlag | None, access: str) -> int:
    """Return the page that a message is of, which must be a fault with these flags, at the page's start."""
    if not isinstance(message, Fault) or message.address not in area.range:
        raise AssertionError(f"{access}: expected a page fault in {area.range}, got {message}")
    page, rest = divmod(message.address - area.start, area.page_size)
    expect((message.flags, rest), (flags, 0), f"flags told of a {access} of page {page}, and the offset in the page")
    return page


def expect_bytes_kept(area: Area, of: Area, *, but: Iterable[int] = ()) -> None:
    """Assert that every page but these holds what ``of`` was filled with, to the last byte."""
    out = set(but)
    if not out:
        area.expect_pattern_of(of)
        return
    for page in range(area.nr_pages):
        if page not in out:
            area.expect_pattern_of(of, page, 1)


def halves_protected(ctx: Context, area: Area, guard: Protection) -> set[int]:
    """Register an area of two folios; protect the second half of the first and the first half of the second.

    Returns the pages that are protected.
    """
    ctx.uffd.register(area.range, guard.mode)
    pages = set(range(area.nr_pages // 4, 3 * area.nr_pages // 4))
    guard.set(ctx.uffd, area, pages)
    Pagemap.expect_protected(area, pages, "after protecting from the middle of one folio to the middle of the next")
    return pages


# ---- what can become of a folio that is protected in part ----------------------------------------------------------


def folio_parts(ctx: Context, area: Area, guard: Protection) -> None:
    """Protect and un-protect parts of two folios: halves, single pages at the ends, all but the middle."""
    uffd, half = ctx.uffd, area.nr_pages // 2
    pages = halves_protected(ctx, area, guard)
    with promise("a half of each"):
        expect_sweep(uffd, area, pages, guard)
        expect_bytes_kept(area, area)
    ends = {0, half - 1, half, area.nr_pages - 1}
    with promise("the first and the last page of each"):
        for page in ends:
            guard.set(uffd, area, (page,))
        Pagemap.expect_protected(area, ends, "after protecting the ends")
        expect_sweep(uffd, area, ends, guard, write=guard.trapped_read is None)
    every = set(range(area.nr_pages))
    middle = set(range(half - half // 2, half + half // 4))
    with promise("all but a middle that cuts both"):
        guard.set(uffd, area, every)
        Pagemap.expect_protected(area, every, "after protecting all")
        guard.lift(uffd, area, middle)
        Pagemap.expect_protected(area, every - middle, "after un-protecting the middle")
        expect_sweep(uffd, area, every - middle, guard)
    expect_bytes_kept(area, area)


def folio_zapped(ctx: Context, area: Area, guard: Protection) -> None:
    """Drop pages of folios protected in part (MADV_DONTNEED): all others stay, with their protection.

    Of shared memory write protection outlasts the pages; that against all access goes with them.
    """
    uffd, quarter = ctx.uffd, area.nr_pages // 4
    pages = halves_protected(ctx, area, guard)
    dropped = {0, *range(quarter + 1, 2 * quarter + 1), area.nr_pages - 1}
    for first, count in ((0, 1), (quarter + 1, quarter), (area.nr_pages - 1, 1)):
        advise(area.page(first, count), Advice.DONTNEED)
    kept = pages if ctx.mem.shared and guard.mode is WP else pages - dropped
    Pagemap.expect_protected(area, kept, "after dropping some pages")
    if not ctx.mem.shared:
        for page in dropped:
            area.expect_zero(page, 1)
    expect_sweep(uffd, area, kept, guard)
    expect_bytes_kept(area, area, but=() if ctx.mem.shared else dropped)


def folio_forked(ctx: Context, area: Area, guard: Protection) -> None:
    """Fork without UFFD_FEATURE_EVENT_FORK: the child's pages are free, all of them, and the parent's as before.

    What the child writes to private memory the parent does not see, and the other way round.
    """
    uffd = ctx.uffd
    pages = halves_protected(ctx, area, guard)

    def child(channel: Channel) -> None:
        Pagemap.expect_protected(area, (), "in the child")
        expect_modes(area.range, UNREGISTERED)
        area.expect_pattern_of(area)
        channel.send()
        channel.receive()  # the parent has written to every page
        if not ctx.mem.shared:
            area.expect_pattern_of(area)
            for page in _some(area):
                poke(area.page(page).start, bytes([page & 0xFF]) * 8)

    with Child(child) as process:
        process.receive()
        uffd.expect_no_message()
        Pagemap.expect_protected(area, pages, "in the parent, after fork")
        expect_sweep(uffd, area, pages, guard)
        for page in _some(area):
            poke(area.page(page).start, NEW)
        process.send()
        process.wait()
    seen = [page for page in _some(area) if peek(area.page(page).start, len(NEW)) != NEW]
    expect(page_numbers(seen), "none", "pages of the parent without what it wrote")
    uffd.expect_no_message()


def folio_forked_event(ctx: Context, area: Area, guard: Protection) -> None:
    """Fork with UFFD_FEATURE_EVENT_FORK: exactly the parent's protected pages are protected in the child, and trap.

    The child's handle is told, and lifts the child's protection; the parent's stays.
    """
    pages = halves_protected(ctx, area, guard)

    data, used = _first_bytes(area), set(_some(area))

    def child(_: Channel) -> None:
        Pagemap.expect_protected(area, pages, "in the child")
        expect_modes(area.range, guard.mode)
        for page in used:
            poke(area.page(page).start, data[page])
        Pagemap.expect_protected(area, pages - used, "in the child, when each page that it used was let go")
        for page in used:
            area.expect_pattern_of(area, page, 1)

    with ctx.handler(src=None, where=area.range, log_size=area.nr_pages + 8) as handler, Child(child):
        pass
    forked, *faults = handler.messages
    expect(isinstance(forked, Forked), True, "whether the first message is UFFD_EVENT_FORK")
    trapped = [_page_of(area, message, guard.trapped_write, "write in the child") for message in faults]
    expect(page_numbers(trapped), page_numbers(pages & used), "pages on which a write in the child is trapped")
    Pagemap.expect_protected(area, pages, "in the parent, after the child's end")
    expect_sweep(ctx.uffd, area, pages, guard)
    area.expect_pattern_of(area)


def folio_swapped(ctx: Context, area: Area, guard: Protection) -> None:
    """Write folios protected in part to swap, and read them back page by page."""
    uffd, quarter = ctx.uffd, area.nr_pages // 4
    pages = halves_protected(ctx, area, guard)
    swap_out(area.range)
    uffd.expect_no_message()
    Pagemap.expect_protected(area, pages, "of pages swapped out")
    lifted, more = {quarter + 1}, {0, area.nr_pages - 1}
    guard.lift(uffd, area, lifted)
    guard.set(uffd, area, more)
    pages = (pages | more) - lifted
    Pagemap.expect_protected(area, pages, "after changing some while swapped out")
    expect_sweep(uffd, area, pages, guard, write=guard.trapped_read is None)
    area.expect_pattern_of(area)
    guard.set(uffd, area, pages)
    swap_out(area.range)
    expect_sweep(uffd, area, pages, guard)
    area.expect_pattern_of(area)


def _moved_part(area: Area) -> tuple[int, int]:
    """Return the first page and the count of a part that cuts both folios, and the protected half of the first."""
    first = area.nr_pages // 4 + area.nr_pages // 8
    return first, area.nr_pages - area.nr_pages // 8 - first


def _some(area: Area) -> list[int]:
    """Return all pages of an area, or of a large one some, its ends and those around its middle among them."""
    half, step = area.nr_pages // 2, max(1, area.nr_pages // MOST)
    chosen = {*range(0, area.nr_pages, step), half - 2, half - 1, half + 1, area.nr_pages - 1}
    return sorted(chosen)


def folio_remapped(ctx: Context, area: Area, guard: Protection) -> None:
    """Move a part of folios protected in part with mremap(2), without UFFD_FEATURE_EVENT_REMAP: it is free there."""
    uffd, (first, count) = ctx.uffd, _moved_part(area)
    pages, place = halves_protected(ctx, area, guard), ctx.allocate(area.nr_pages)
    remap(area.page(first, count), to=place.page(first).start)
    Pagemap.expect_protected(place, (), "at the new place")
    expect_sweep(uffd, place, (), guard)
    place.expect_pattern_of(area, first, count)
    expect_modes(place.page(first, count), UNREGISTERED)
    rest = set(range(area.nr_pages)) - set(range(first, first + count))
    for page in rest:
        Pagemap.expect_uffd_wp(area.page(page).start, page in pages, f"page {page}, left behind")
    uffd.expect_no_message()
    guard.lift(uffd, area, (page for page in rest if page < first))
    area.expect_pattern_of(area, 0, first)


def folio_remapped_event(ctx: Context, area: Area, guard: Protection) -> None:
    """Move a part of folios protected in part with mremap(2), with UFFD_FEATURE_EVENT_REMAP: all comes along."""
    uffd, (first, count) = ctx.uffd, _moved_part(area)
    pages, place = halves_protected(ctx, area, guard), ctx.allocate(area.nr_pages)
    with Waiter(lambda: remap(area.page(first, count), to=place.page(first).start)):
        uffd.wait("UFFD_EVENT_REMAP")
    moved = set(range(first, first + count))
    Pagemap.expect_protected(place, pages & moved, "at the new place")
    expect_modes(place.page(first, count), guard.mode)
    expect_sweep(uffd, place, pages & moved, guard)
    place.expect_pattern_of(area, first, count)
    for page in set(range(area.nr_pages)) - moved:
        Pagemap.expect_uffd_wp(area.page(page).start, page in pages, f"page {page}, left behind")


def folio_mprotected(ctx: Context, area: Area, guard: Protection) -> None:
    """Take access away from folios protected in part, and from parts of them, and give it back (mprotect(2))."""
    pages = halves_protected(ctx, area, guard)
    part = area.page(1, area.nr_pages // 2)
    for where, what in ((area.range, "the whole"), (part, "a part")):
        for prot, name in ((PROT_NONE, "PROT_NONE"), (PROT_READ, "PROT_READ")):
            with promise(f"{name} of {what}"):
                protect(where, prot)
                Pagemap.expect_protected(area, pages, "after mprotect")
                protect(where, PROT_READ | PROT_WRITE)
                Pagemap.expect_protected(area, pages, "after mprotect back")
    expect_sweep(ctx.uffd, area, pages, guard)
    area.expect_pattern_of(area)


def folio_unregistered(ctx: Context, area: Area, guard: Protection) -> None:
    """Unregister a part that cuts both folios: it is free, the rest is as it was; then the rest."""
    uffd, (first, count) = ctx.uffd, _moved_part(area)
    pages = halves_protected(ctx, area, guard)
    guard.set(uffd, area, range(area.nr_pages))
    pages = set(range(area.nr_pages)) - set(range(first, first + count))
    uffd.unregister(area.page(first, count))
    Pagemap.expect_protected(area, pages, "after unregistering a part")
    expect_sweep(uffd, area, pages, guard, write=guard.trapped_read is None)
    guard.set(uffd, area, range(first))
    uffd.unregister(area.range)
    Pagemap.expect_protected(area, (), "after unregistering all")
    expect_sweep(uffd, area, (), guard)
    area.expect_pattern_of(area)


def folio_migrated(ctx: Context, area: Area, guard: Protection) -> None:
    """Have the kernel move a page of each folio, or both as they are, to other memory; each stays as it was."""
    if ctx.mem.shared and len(memory_nodes()) < 2:
        raise Skip("one memory node only, where a folio of shared memory is split first: boot with numa=fake=2")
    pages = halves_protected(ctx, area, guard)
    if guard.trapped_read is None:
        touch(area.range, PAGE_SIZE)  # write-protecting a huge page of shared memory leaves its pages unmapped
    with migrate(area, 1, area.nr_pages // 2):
        Pagemap.expect_protected(area, pages, "after the migration")
        ctx.uffd.expect_no_message()
        expect_sweep(ctx.uffd, area, pages, guard)
        area.expect_pattern_of(area)


def folio_async(ctx: Context, area: Area, guard: Protection) -> None:
    """Access pages of folios protected in part where the kernel lets everybody go on: each gives up its own mark.

    The handle has RWP_ASYNC, or WP_ASYNC.
    """
    pages, write = halves_protected(ctx, area, guard), guard.trapped_read is None
    data = _first_bytes(area)
    for page in (area.nr_pages // 2, min(pages), max(pages)):
        start = area.page(page).start
        undisturbed(ctx.uffd, partial(poke, start, data[page]))
        pages.discard(page)
        Pagemap.expect_protected(area, pages, f"after a write to page {page}")
    if not write:
        undisturbed(ctx.uffd, partial(peek, area.page(area.nr_pages // 2 - 1).start))
        pages.discard(area.nr_pages // 2 - 1)
        Pagemap.expect_protected(area, pages, f"after a read of page {area.nr_pages // 2 - 1}")
    for page in (0, area.nr_pages - 1):
        undisturbed(ctx.uffd, partial(poke, area.page(page).start, data[page]))
    Pagemap.expect_protected(area, pages, "after writes to pages that were free")
    undisturbed(ctx.uffd, partial(_store, area, data))
    Pagemap.expect_protected(area, (), "after a write to each page")
    area.expect_pattern_of(area)
