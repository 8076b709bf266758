# SPDX-License-Identifier: GPL-2.0-only
"""Huge pages beyond what a MemType has: of other sizes, and with page tables that mappings share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from uffd_selftests.machine.hugepages import lack_of_hugepages
from uffd_selftests.toolkit.access import peek, poke
from uffd_selftests.toolkit.expectations import Skip, expect
from uffd_selftests.toolkit.memory import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    PROT_NONE,
    Range,
    map_memory,
    mapped,
)

__all__ = ["MFD_HUGE_SHIFT", "hugepage_file", "shared_page_table"]

MFD_HUGE_SHIFT = 26


@contextmanager
def hugepage_file(size: int) -> Iterator[int]:
    """Yield a file of one huge page of ``size`` bytes; Skip unless its pool has one, for making one can take long."""
    if reason := lack_of_hugepages(size, 1):
        raise Skip(reason)
    fd = os.memfd_create("uffd-huge", os.MFD_CLOEXEC | os.MFD_HUGETLB | (size.bit_length() - 1) << MFD_HUGE_SHIFT)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def shared_page_table(page_size: int) -> Iterator[tuple[Range, Range]]:
    """Map a file of huge pages twice so that both mappings use one page table, where the architecture does that.

    Behind the second one there is room for a third. The first page of the file is there, with 1 in its first byte.
    """
    length = page_size * (PAGE_SIZE // 8)  # what one page table full of huge pages maps
    fd = os.memfd_create("uffd-pmd", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    try:
        os.ftruncate(fd, length)
        with mapped(4 * length, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, prot=PROT_NONE) as place:
            first = -(-place.start // length) * length
            flags = MAP_SHARED | MAP_NORESERVE | MAP_FIXED
            one, other = (
                Range(map_memory(length, flags=flags, fd=fd, at=at), length) for at in (first, first + length)
            )
            poke(one.start, b"\1")
            expect(peek(other.start), b"\1", "a byte written through the first mapping")
            yield one, other
    finally:
        os.close(fd)
