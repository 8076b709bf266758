# SPDX-License-Identifier: GPL-2.0-only
"""Pages of every kind that one mapping can have, side by side, so that a request over all of them meets each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from uffd_selftests.abi import syscalls
from uffd_selftests.abi.errors import KernelError, errno_name
from uffd_selftests.mem_types import Area, Backing
from uffd_selftests.toolkit.access import touch
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import Skip
from uffd_selftests.toolkit.iouring import fixed_buffer
from uffd_selftests.toolkit.memory import Advice, Range, advise
from uffd_selftests.toolkit.pagemap import Pagemap
from uffd_selftests.toolkit.processes import Channel, Child
from uffd_selftests.toolkit.swap import swap_out

__all__ = ["Kinds", "MOST_HUGE_KINDS", "pages_of_all_kinds"]

MOST_HUGE_KINDS = 11
"""Huge pages that the kinds of a hugetlb type take, and one for a copy."""

OWN, HOLE, ZERO, LOCKED, PINNED = "own page", "hole", "zero page", "locked page", "pinned page"
SHARED_PAGE, SWAPPED, CACHED_ONLY = "page shared with a child", "page in swap", "page in the page cache only"


@dataclass(frozen=True)
class Kinds:
    """An area, and of what kind each of its pages is."""

    area: Area
    kinds: dict[int, str]

    def pages(self, *, but: tuple[str, ...] = ()) -> list[int]:
        """Return the numbers of the pages of all kinds but these."""
        return [page for page, kind in self.kinds.items() if kind not in but]

    @property
    def present(self) -> list[int]:
        """The pages that are mapped."""
        return self.pages(but=(HOLE, SWAPPED, CACHED_ONLY))

    @property
    def there(self) -> list[int]:
        """The pages that are mapped or in swap."""
        return self.pages(but=(HOLE, CACHED_ONLY))


def _wanted(area: Area) -> list[str]:
    """The kinds that a memory type has, an own page before, between and behind them."""
    kinds = [HOLE, LOCKED, PINNED]
    if not area.mem.shared:
        kinds += [SHARED_PAGE] if area.mem.hugetlb else [SHARED_PAGE, SWAPPED]
    kinds.append(ZERO if area.mem.backing is Backing.ANON else CACHED_ONLY)
    return [OWN, *(name for kind in kinds for name in (kind, OWN))]


@contextmanager
def pages_of_all_kinds(ctx: Context) -> Iterator[Kinds]:
    """Map an area, of small pages, with pages of all kinds that are to be had here; it is not registered yet.

    Pages hold the area's pattern, but for holes and the zero page. A kind that this machine has not (no swap, no
    io_uring, nothing may be locked) is an own page instead.
    """
    area = ctx.allocate(len(_wanted(ctx.dst)))
    with suppress(KernelError):  # a kernel without transparent huge pages
        advise(area.range, Advice.NOHUGEPAGE)
    kinds = dict(enumerate(_wanted(area)))
    at = {kind: page for page, kind in kinds.items() if kind != OWN}
    with ExitStack() as stack:
        if SHARED_PAGE in at:
            area.fill(at[SHARED_PAGE], 1)
            child = stack.enter_context(Child(Channel.receive))
            stack.callback(child.send)
        for page, kind in kinds.items():  # after the fork, for they are this process's alone
            if kind not in (HOLE, CACHED_ONLY, ZERO, SHARED_PAGE):
                area.fill(page, 1)
        if ZERO in at:
            touch(area.page(at[ZERO]), area.page_size)
        if CACHED_ONLY in at:
            with area.file_view() as view:
                area.pattern.fill(view.start, at[CACHED_ONLY], 1)
        attempts = {
            LOCKED: lambda page: stack.enter_context(_locked(page)),
            PINNED: lambda page: stack.enter_context(fixed_buffer(page)),
            SWAPPED: swap_out,
        }
        for kind, attempt in attempts.items():
            if kind in at:
                try:
                    attempt(area.page(at[kind]))
                except (Skip, AssertionError):  # of what the kernel writes to swap nothing is promised here
                    kinds[at[kind]] = OWN
        found = Kinds(area, kinds)
        Pagemap.expect_present(area, *found.present)
        yield found


@contextmanager
def _locked(where: Range) -> Iterator[None]:
    try:
        syscalls.call("mlock", where.start, where.len)
    except KernelError as error:
        raise Skip(f"mlock(2): {errno_name(error.errno or 0)}: raise RLIMIT_MEMLOCK (ulimit -l)") from None
    try:
        yield
    finally:
        syscalls.call("munlock", where.start, where.len)
