# SPDX-License-Identifier: GPL-2.0-only
"""What a case is given to work on, and how many begin: fill the source, register the destination, copy or move."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

from uffd_selftests.abi.errors import KernelError
from uffd_selftests.abi.uapi import CopyMode, Feature, MoveMode, RegisterMode
from uffd_selftests.machine.swap import release_swap
from uffd_selftests.mem_types import Area, MemType
from uffd_selftests.toolkit.expectations import DEADLINE, Skip
from uffd_selftests.toolkit.handle import MINOR, MISSING, Uffd
from uffd_selftests.toolkit.handler import FaultHandler
from uffd_selftests.toolkit.memory import PAGE_SIZE, Range, drops_hugepages, moves_hugepages
from uffd_selftests.toolkit.threads import waiting_threads

__all__ = ["ContextHook", "MODEST_BYTES", "Context", "prepare", "copy", "move", "cached", "odd_address"]


class ContextHook(Protocol):
    """Called while a context is made; may raise Skip."""

    def __call__(self, ctx: Context, /) -> None:
        """Prepare the context."""


MODEST_BYTES = 1 << 30
"""An area of this size, which no case takes by itself, can be mapped on every machine."""


class Context:
    """What a case works on: a userfaultfd, a source area and a destination area of one memory type.

    Both areas are mapped at first use, empty. Leaving the block closes and unmaps everything.
    """

    def __init__(
        self,
        mem: MemType,
        *,
        features: Feature = Feature(0),
        nr_pages: int = 2,
        pre_alloc: ContextHook | None = None,
        post_alloc: ContextHook | None = None,
    ) -> None:
        self.mem = mem
        self.features = features
        self.nr_pages = nr_pages
        self.page_size = mem.page_size
        self._hooks = (pre_alloc, post_alloc)
        self._areas: list[Area] = []

    @cached_property
    def uffd(self) -> Uffd:
        """The handle, with the context's features."""
        return Uffd.open(self.features)

    @cached_property
    def src(self) -> Area:
        """Where the data come from; never registered unless a case does it."""
        return self.allocate(reserve=True)

    @cached_property
    def dst(self) -> Area:
        """Where the faults happen."""
        return self.allocate()

    def allocate(self, nr_pages: int | None = None, *, reserve: bool = False) -> Area:
        """Map a further area, unmapped with the context."""
        try:
            area = self.mem.allocate(nr_pages or self.nr_pages, reserve=reserve)
        except KernelError as error:
            if error.errno == errno.ENOMEM and self.mem.hugetlb:
                raise Skip(f"{nr_pages or self.nr_pages} huge pages cannot be reserved: {error}") from None
            size = (nr_pages or self.nr_pages) * self.page_size
            if error.errno == errno.ENOMEM and size > MODEST_BYTES:
                raise Skip(f"{size >> 20} MiB cannot be mapped: {error}: choose a smaller --area-mib") from None
            raise
        self._areas.append(area)
        return area

    def handler(self, **options: Any) -> FaultHandler:
        """A fault handler for the destination area, taking its data from the source area; options as FaultHandler."""
        options.setdefault("src", self.src.range)
        return FaultHandler(self.uffd, options.pop("where", self.dst.range), self.page_size, **options)

    def __enter__(self) -> Context:
        pre_alloc, post_alloc = self._hooks
        if self.mem.hugetlb and self.features & Feature.EVENT_REMOVE and not drops_hugepages():
            raise Skip("kernel cannot drop huge pages (Linux 5.18)")
        if self.mem.hugetlb and self.features & Feature.EVENT_REMAP and not moves_hugepages():
            raise Skip("kernel cannot move huge pages (Linux 5.16)")
        try:
            if pre_alloc:
                pre_alloc(self)
            if post_alloc:
                post_alloc(self)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the handle, then unmap the areas: nobody waits for an event then.

        A case that failed may have left threads asleep in the areas. The close wakes them; until they have ended,
        their memory stays, else the failure would end as a crash.
        """
        if "uffd" in self.__dict__:
            self.uffd.close()
        end = time.monotonic() + DEADLINE / 10
        for thread in waiting_threads:
            thread.join(max(0, end - time.monotonic()))
        if not any(thread.is_alive() for thread in waiting_threads):
            for area in self._areas:
                area.close()
        self._areas.clear()
        release_swap()


def prepare(ctx: Context, mode: RegisterMode = MISSING) -> None:
    """Fill the source and register the destination."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.range, mode)


def copy(ctx: Context, first: int, count: int = 1, mode: CopyMode = CopyMode(0)) -> None:
    """Fill pages of the destination with the same pages of the source."""
    ctx.uffd.copy(ctx.dst.page(first).start, ctx.src.page(first).start, count * ctx.page_size, mode)


def move(ctx: Context, first: int, count: int = 1, mode: MoveMode = MoveMode(0)) -> None:
    """Move pages of the source to the same pages of the destination."""
    ctx.uffd.move(ctx.dst.page(first).start, ctx.src.page(first).start, count * ctx.page_size, mode)


@contextmanager
def cached(ctx: Context, *pages: int, mode: RegisterMode = MINOR) -> Iterator[Range]:
    """Register the area, and put these pages (none given: all) into the page cache through the mapping yielded."""
    ctx.uffd.register(ctx.dst.range, mode)
    with ctx.dst.file_view() as where:
        for page in pages or range(ctx.nr_pages):
            ctx.dst.pattern.fill(where.start, page, 1)
        yield where


_ODD = 5 * PAGE_SIZE + 7
"""An offset that is no boundary, within a huge page."""


def odd_address(ctx: Context, number: int) -> int:
    """An address within a page that is no boundary of anything."""
    return ctx.dst.page(number).start + _ODD % ctx.page_size
