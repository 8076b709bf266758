# SPDX-License-Identifier: GPL-2.0-only
"""The five memory types that userfaultfd serves: how each allocates, aliases and releases memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from uffd_selftests.abi.errors import KernelError
from uffd_selftests.toolkit.contents import Pattern, expect_bytes
from uffd_selftests.toolkit.memory import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    PROT_NONE,
    Advice,
    Range,
    advise,
    default_hugepage_size,
    drops_hugepages,
    knows_advice,
    map_memory,
    unmap,
)

__all__ = [
    "Backing",
    "default_hugepage_size",
    "pmd_size",
    "POPULATE_PAGES",
    "MemType",
    "ANON",
    "SHMEM",
    "SHMEM_PRIVATE",
    "HUGETLB",
    "HUGETLB_PRIVATE",
    "ALL",
    "NOT_HUGETLB",
    "EACH_HUGETLB",
    "FILE_BACKED",
    "SHARED",
    "PRIVATE",
    "Area",
]


class Backing(Enum):
    """What the pages come from."""

    ANON = "anon"
    SHMEM = "shmem"
    HUGETLB = "hugetlb"


def pmd_size() -> int:
    """Return the size in bytes that one PMD maps, the size of a transparent huge page; 0 without THP."""
    try:
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except OSError:
        return 0


POPULATE_PAGES = 64
"""From how many pages on it pays to populate them before they are filled."""

_HUGEPAGE_SIZE = default_hugepage_size()
_ALIGNMENT = max(pmd_size(), _HUGEPAGE_SIZE, PAGE_SIZE)


@dataclass(frozen=True)
class MemType:
    """A memory type, under the name it has in upstream's results."""

    name: str
    backing: Backing
    shared: bool
    huge_size: int = 0
    """Bytes of its huge pages where they are not of the default size."""

    @property
    def hugetlb(self) -> bool:
        """Whether it takes pages from the huge page pool."""
        return self.backing is Backing.HUGETLB

    @property
    def page_size(self) -> int:
        """The unit of a fault, in bytes: a base page, or a huge page."""
        return (self.huge_size or _HUGEPAGE_SIZE) if self.hugetlb else PAGE_SIZE

    @property
    def memfd_flags(self) -> int:
        """Flags of memfd_create(2) for the file behind it."""
        if not self.hugetlb:
            return os.MFD_CLOEXEC
        size = (self.huge_size.bit_length() - 1) << os.MFD_HUGE_SHIFT if self.huge_size else 0
        return os.MFD_CLOEXEC | os.MFD_HUGETLB | size

    def allocate(self, nr_pages: int, *, reserve: bool = False) -> Area:
        """Map an empty area. With ``reserve``, hugetlb promises its pages now: ENOMEM here, not SIGBUS later."""
        return Area(self, nr_pages, reserve=reserve)

    def __str__(self) -> str:
        return self.name


ANON = MemType("anon", Backing.ANON, shared=False)
SHMEM = MemType("shmem", Backing.SHMEM, shared=True)
SHMEM_PRIVATE = MemType("shmem-private", Backing.SHMEM, shared=False)
HUGETLB = MemType("hugetlb", Backing.HUGETLB, shared=True)
HUGETLB_PRIVATE = MemType("hugetlb-private", Backing.HUGETLB, shared=False)
ALL = (ANON, SHMEM, SHMEM_PRIVATE, HUGETLB, HUGETLB_PRIVATE)
NOT_HUGETLB = (ANON, SHMEM, SHMEM_PRIVATE)
EACH_HUGETLB = (HUGETLB, HUGETLB_PRIVATE)
FILE_BACKED = (SHMEM, SHMEM_PRIVATE, HUGETLB, HUGETLB_PRIVATE)
SHARED = (SHMEM, HUGETLB)
PRIVATE = (ANON, SHMEM_PRIVATE, HUGETLB_PRIVATE)


class Area:
    """A mapping of ``nr_pages`` pages of one memory type, PMD aligned, with unmapped gaps around it.

    ``fd`` is its memfd, None for anonymous memory.
    """

    def __init__(self, mem: MemType, nr_pages: int, *, reserve: bool = False) -> None:
        self.mem = mem
        self.page_size = mem.page_size
        self.nr_pages = nr_pages
        self.pattern = Pattern(self.page_size)
        self.fd: int | None = None
        self._reserve = reserve
        self._reservations: list[Range] = []
        self._alias: Range | None = None
        if mem.backing is not Backing.ANON:
            self.fd = os.memfd_create(f"uffd-{mem.name}", mem.memfd_flags)
            os.ftruncate(self.fd, nr_pages * self.page_size)
        try:
            self.start = self._map()
        except OSError:
            self.close()
            raise

    def _map(self) -> int:
        """Map the object at a fresh PMD-aligned place, with more around it: neighbours must not merge with it."""
        length = self.nr_pages * self.page_size
        alignment = max(_ALIGNMENT, self.page_size)
        room = length + 2 * alignment
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        reservation = Range(map_memory(room, prot=PROT_NONE, flags=flags), room)
        self._reservations.append(reservation)
        start = -(-(reservation.start + PAGE_SIZE) // alignment) * alignment
        flags = MAP_FIXED | (MAP_SHARED if self.mem.shared else MAP_PRIVATE)
        if self.fd is None:
            flags |= MAP_ANONYMOUS
        if not self._reserve:
            flags |= MAP_NORESERVE
        return map_memory(length, at=start, flags=flags, fd=-1 if self.fd is None else self.fd)

    @property
    def range(self) -> Range:
        """The whole area."""
        return Range(self.start, self.nr_pages * self.page_size)

    @property
    def alias(self) -> Range:
        """A second mapping of the same pages, made at first use; only shared memory has one."""
        if not self.mem.shared:
            raise ValueError(f"{self.mem.name} memory has no second mapping of its pages")
        if self._alias is None:
            self._alias = Range(self._map(), self.nr_pages * self.page_size)
        return self._alias

    @contextmanager
    def file_view(self) -> Iterator[Range]:
        """Map the area's file once more, shared even if the area is private: what is written there is in the file."""
        if self.fd is None:
            raise ValueError("anonymous memory has no file")
        length = self.nr_pages * self.page_size
        view = Range(map_memory(length, flags=MAP_SHARED | MAP_NORESERVE, fd=self.fd), length)
        try:
            yield view
        finally:
            unmap(view)

    def page(self, number: int, count: int = 1) -> Range:
        """The range of ``count`` pages from page ``number`` on."""
        return Range(self.start + number * self.page_size, count * self.page_size)

    def alias_page(self, number: int, count: int = 1) -> Range:
        """The same pages in the second mapping."""
        return Range(self.alias.start + number * self.page_size, count * self.page_size)

    def fill(self, first: int = 0, count: int | None = None) -> None:
        """Write the area's pattern into pages ``first`` to ``first + count - 1``; by default all."""
        count = self.nr_pages - first if count is None else count
        if count >= POPULATE_PAGES and knows_advice(Advice.POPULATE_WRITE):
            with suppress(KernelError):  # one call instead of a fault a page, if the range allows
                advise(self.page(first, count), Advice.POPULATE_WRITE)
        self.pattern.fill(self.start, first, count)

    def expect_pattern_of(
        self, other: Area, first: int = 0, count: int | None = None, *, write_back: bool = False
    ) -> None:
        """Assert that pages hold what ``other`` was filled with; each is read, then with ``write_back`` written."""
        count = self.nr_pages - first if count is None else count
        what = f"{self.mem.name} area"
        other.pattern.verify(self.start, first, count, write_back=write_back, what=what)

    def expect_pattern(self, where: Range, *, flipped: bool = False) -> None:
        """Assert that a mapping of the whole area holds the area's own pattern, bit flipped or not."""
        pattern = replace(self.pattern, flipped=flipped)
        pattern.verify(where.start, 0, self.nr_pages, what=f"{self.mem.name} area")

    def expect_zero(self, first: int = 0, count: int | None = None) -> None:
        """Assert that pages read as zero."""
        count = self.nr_pages - first if count is None else count
        expect_bytes(self.page(first, count), 0, f"{self.mem.name} area", self.page_size)

    def release(self) -> None:
        """Free the pages, so that every one is missing again: MADV_REMOVE on shared memory, else MADV_DONTNEED."""
        if self.mem.hugetlb and not self.mem.shared and self.fd is not None and not drops_hugepages():
            self._empty_file()  # which takes a private mapping's own huge pages along
            return
        try:
            advise(self.range, Advice.REMOVE if self.mem.shared else Advice.DONTNEED)
        except KernelError as error:  # of what is mapped to be read only, as some kernels have it
            if error.errno != errno.EACCES:
                raise
            self._empty_file()

    def _empty_file(self) -> None:
        if self.fd is not None:
            os.ftruncate(self.fd, 0)
            os.ftruncate(self.fd, self.range.len)

    def close(self) -> None:
        """Unmap everything and close the memfd."""
        for reservation in self._reservations:
            unmap(reservation)
        self._reservations.clear()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
