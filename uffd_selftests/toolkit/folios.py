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
from uffd_selftests.toolkit.expectations import Skip, expect
from uffd_selftests.toolkit.faulting import TRAPPED
from uffd_selftests.toolkit.handle import RWP, WP, Uffd
from uffd_selftests.toolkit.memory import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    PAGE_SIZE,
    Advice,
    advise,
    mapped,
)
from uffd_selftests.toolkit.messages import Fault, Message
from uffd_selftests.toolkit.pagemap import Pagemap, page_numbers
from uffd_selftests.toolkit.rwp import READ_TRAPPED, WRITE_TRAPPED
from uffd_selftests.toolkit.thp import huge_area
from uffd_selftests.toolkit.threads import Waiter

__all__ = [
    "SMALL_FOLIOS",
    "FOLIOS",
    "MOST",
    "AGAINST_WRITES",
    "AGAINST_ACCESS",
    "Protection",
    "folio_settings",
    "folios_of",
    "folios",
    "expect_sweep",
    "first_bytes",
    "store_each",
    "page_of_fault",
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


def folio_settings(mem: MemType) -> dict[int, Path]:
    """Return the sizes in bytes of the transparent huge pages that the kernel has, and where each is switched on.

    A kernel without a setting for each size (before Linux 6.8, of shared memory 6.11) has that of a PMD alone.
    """
    name = "shmem_enabled" if mem.shared else "enabled"
    found = {}
    for path in THP.glob(f"hugepages-*kB/{name}"):
        found[int(path.parent.name.removeprefix("hugepages-").removesuffix("kB")) << 10] = path
    if not found and pmd_size():
        found[pmd_size()] = THP / name
    return found


def folios_of(ctx: Context, size: int, count: int) -> Area:
    """Map an area that so many folios of a size in bytes fill, written to the last byte; Skip where there are none.

    That each is one shows when the first write to it makes all of its pages present.
    """
    path = folio_settings(ctx.mem).get(size)
    if not path:
        raise Skip(f"no transparent huge pages of {size >> 10} kB (each size: Linux 6.8, shared memory 6.11)")
    value = "advise" if ctx.mem.shared else "madvise"
    pages = size // PAGE_SIZE
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


def folios(ctx: Context, variant: str) -> Area:
    """Map an area that two folios of one of FOLIOS fill, written to the last byte; Skip where there are none."""
    if variant == "huge page":
        return huge_area(ctx, 2)
    pages = int(variant.partition(" ")[0])
    if pages * PAGE_SIZE >= pmd_size():
        raise Skip(f"a folio of {variant} is as large as a huge page here, or there are none")
    return folios_of(ctx, pages * PAGE_SIZE, 2)


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
    call = partial(store_each, area, first_bytes(area)) if write else partial(touch, area.range, area.page_size)
    with Waiter(call) as waiter:
        while not waiter.done:
            if not uffd.readable(0.01):
                if len(trapped) > area.nr_pages:
                    break
                continue
            for message in uffd.read():
                page = page_of_fault(area, message, flags, access)
                if trapped and page == trapped[-1]:
                    raise AssertionError(f"page {page}: expected a {access} to go on when let go; it is trapped again")
                trapped.append(page)
                guard.lift(uffd, area, (page,))
    expect(page_numbers(trapped), page_numbers(pages), f"pages on which a {access} is trapped")
    uffd.expect_still_asleep(0)
    Pagemap.expect_protected(area, (), "when each page was let go")


def first_bytes(area: Area) -> list[bytes]:
    """Return how each page of the area's pattern begins."""
    found = []
    with mapped(area.page_size, flags=MAP_PRIVATE | MAP_ANONYMOUS) as page:
        for number in range(area.nr_pages):
            area.pattern.fill(page.start - number * area.page_size, number, 1)
            found.append(peek(page.start, 8))
    return found


def store_each(area: Area, data: list[bytes]) -> None:
    """Store to the start of each page; a write access that changes nothing may begin with a load (emulators)."""
    for number, some in enumerate(data):
        poke(area.page(number).start, some)


def page_of_fault(area: Area, message: Message, flags: PagefaultFlag | None, access: str) -> int:
    """Return the page that a message is of, which must be a fault with these flags, at the page's start."""
    if not isinstance(message, Fault) or message.address not in area.range:
        raise AssertionError(f"{access}: expected a page fault in {area.range}, got {message}")
    page, rest = divmod(message.address - area.start, area.page_size)
    expect((message.flags, rest), (flags, 0), f"flags told of a {access} of page {page}, and the offset in the page")
    return page
