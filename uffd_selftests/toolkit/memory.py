# SPDX-License-Identifier: GPL-2.0-only
"""Address ranges, and how they are mapped, moved, advised and protected; without the interpreter's lock.

A call that makes an event sleeps in the kernel until it is read, and so must not hold the lock that its reader needs.
"""

from __future__ import annotations

import errno
import mmap as _mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

from uffd_selftests.abi.errors import KernelError, checked
from uffd_selftests.abi.native import lib
from uffd_selftests.toolkit.expectations import Skip

__all__ = [
    "PAGE_SIZE",
    "PROT_NONE",
    "PROT_READ",
    "PROT_WRITE",
    "PROT_EXEC",
    "MAP_SHARED",
    "MAP_PRIVATE",
    "MAP_ANONYMOUS",
    "MAP_FIXED",
    "MAP_FIXED_NOREPLACE",
    "MAP_NORESERVE",
    "MREMAP_MAYMOVE",
    "MREMAP_FIXED",
    "MREMAP_DONTUNMAP",
    "Advice",
    "Range",
    "TABLE_BYTES",
    "FIRST_PLACE",
    "LAST_PLACE",
    "map_memory",
    "new_mapping",
    "unmap",
    "mapped",
    "remap",
    "advise",
    "keep_small",
    "protect",
    "default_hugepage_size",
    "drops_hugepages",
    "knows_advice",
    "moves_hugepages",
    "mmap_min_addr",
    "user_space_end",
]


PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
"""Size of a base page in bytes."""
PROT_NONE = 0
PROT_READ = _mmap.PROT_READ
PROT_WRITE = _mmap.PROT_WRITE
PROT_EXEC = _mmap.PROT_EXEC
MAP_SHARED = _mmap.MAP_SHARED
MAP_PRIVATE = _mmap.MAP_PRIVATE
MAP_ANONYMOUS = _mmap.MAP_ANONYMOUS
MAP_FIXED = 0x10
MAP_FIXED_NOREPLACE = 0x100000
MAP_HUGETLB = 0x40000
MAP_NORESERVE = getattr(_mmap, "MAP_NORESERVE", 0x4000)
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MREMAP_DONTUNMAP = 4


class Advice(IntEnum):
    """MADV_* of madvise(2); the newer ones have the same number on every architecture but parisc."""

    DONTNEED = 4
    FREE = 8
    REMOVE = 9
    DONTFORK = 10
    DOFORK = 11
    MERGEABLE = 12
    UNMERGEABLE = 13
    HUGEPAGE = 14
    NOHUGEPAGE = 15
    DONTDUMP = 16
    WIPEONFORK = 18
    KEEPONFORK = 19
    COLD = 20
    PAGEOUT = 21
    POPULATE_READ = 22
    POPULATE_WRITE = 23
    DONTNEED_LOCKED = 24
    COLLAPSE = 25
    HWPOISON = 100
    SOFT_OFFLINE = 101
    GUARD_INSTALL = 102
    GUARD_REMOVE = 103
    WILLNEED = 3

    def __str__(self) -> str:
        return f"MADV_{self.name}"


NEW_ADVICE = (Advice.POPULATE_READ, Advice.POPULATE_WRITE, Advice.DONTNEED_LOCKED)
"""What a page of anonymous memory can be given, and not every kernel knows (Linux 5.14 and 5.18)."""


@dataclass(frozen=True)
class Range:
    """An address range, in bytes."""

    start: int
    len: int

    @property
    def end(self) -> int:
        """The address behind the last byte."""
        return self.start + self.len

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.end

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"


TABLE_BYTES = PAGE_SIZE * PAGE_SIZE // 8
"""What one page table maps."""

FIRST_PLACE, LAST_PLACE = 1 << 36, 1 << 38
"""Where the cases' own mappings lie: far below everything that the kernel places itself.

It gives the highest gap that is large enough. A hole that a case makes in memory up there would soon be the
interpreter's, or a thread's stack, and the case would find it mapped again, or unmap it.
"""
_place = FIRST_PLACE


def map_memory(
    length: int, *, at: int = 0, prot: int = PROT_READ | PROT_WRITE, flags: int, fd: int = -1, offset: int = 0
) -> int:
    """mmap(2); returns the address, which is none used before in this process, unless ``at`` says where."""
    global _place  # noqa: PLW0603  # per process, as addresses are
    if not at:
        at, _place = _place, _place + (length // TABLE_BYTES + 2) * TABLE_BYTES
        if _place > LAST_PLACE:
            _place = FIRST_PLACE
    call = f"mmap({at:#x}, {length}, prot={prot:#x}, flags={flags:#x}, fd={fd})"
    return checked(lib.uffd_mmap(at, length, prot, flags, fd, offset), call)


def new_mapping(length: int, flags: int, *, prot: int = PROT_READ | PROT_WRITE, fd: int = -1, at: int = 0) -> Range:
    """Map memory for the rest of the case."""
    return Range(map_memory(length, flags=flags, prot=prot, fd=fd, at=at), length)


def unmap(where: Range) -> None:
    """munmap(2). Waits for the event to be read where UFFD_FEATURE_EVENT_UNMAP is on."""
    checked(lib.uffd_munmap(where.start, where.len), f"munmap({where.start:#x}, {where.len})")


@contextmanager
def mapped(
    length: int, *, prot: int = PROT_READ | PROT_WRITE, flags: int, fd: int = -1, offset: int = 0
) -> Iterator[Range]:
    """Have memory mapped for as long as the block runs."""
    where = Range(map_memory(length, prot=prot, flags=flags, fd=fd, offset=offset), length)
    try:
        yield where
    finally:
        unmap(where)


def remap(where: Range, new_len: int | None = None, *, to: int | None = None, flags: int = MREMAP_MAYMOVE) -> int:
    """mremap(2); returns the new address. ``to`` adds MREMAP_FIXED.

    Raises Skip where that fails because the kernel has none for huge pages.
    """
    new_len = where.len if new_len is None else new_len
    if to is not None:
        flags |= MREMAP_MAYMOVE | MREMAP_FIXED
    call = f"mremap({where.start:#x}, {where.len}, {new_len}, {flags:#x}, {to or 0:#x})"
    try:
        return checked(lib.uffd_mremap(where.start, where.len, new_len, flags, to or 0), call)
    except KernelError as error:
        if error.errno in (errno.EINVAL, errno.EFAULT) and not moves_hugepages() and is_hugetlb(where.start):
            raise Skip(f"{error}: kernel cannot move huge pages (Linux 5.16)") from None
        if flags & MREMAP_DONTUNMAP and error.errno == errno.EINVAL and not keeps_shared_place():
            raise Skip(f"{error}: kernel has MREMAP_DONTUNMAP for anonymous memory alone (Linux 5.13)") from None
        raise


def advise(where: Range, advice: Advice) -> None:
    """madvise(2). Waits for the event to be read where UFFD_FEATURE_EVENT_REMOVE is on and pages are dropped.

    Raises Skip where the kernel does not know that advice, or has no MADV_DONTNEED for huge pages.
    """
    call = f"madvise({where.start:#x}, {where.len}, {advice})"
    try:
        checked(lib.uffd_madvise(where.start, where.len, advice), call)
    except KernelError as error:
        if (
            advice == Advice.DONTNEED
            and error.errno == errno.EINVAL
            and not drops_hugepages()
            and is_hugetlb(where.start)
        ):
            raise Skip(f"{error}: kernel cannot drop huge pages (Linux 5.18)") from None
        if error.errno == errno.EINVAL and not knows_advice(advice):
            raise Skip(f"{error}: kernel lacks {advice}") from None
        raise


@cache
def knows_advice(advice: Advice) -> bool:
    """Whether the kernel knows an advice that a page of anonymous memory can be given, as tried on one."""
    with mapped(PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS) as page:
        return advice not in NEW_ADVICE or lib.uffd_madvise(page.start, page.len, advice) == 0


@cache
def keeps_shared_place() -> bool:
    """Whether MREMAP_DONTUNMAP moves shared memory, as tried."""
    with mapped(PAGE_SIZE, flags=MAP_SHARED | MAP_ANONYMOUS) as where:
        answer = lib.uffd_mremap(where.start, where.len, where.len, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0)
        if answer > 0:
            lib.uffd_munmap(answer, where.len)
        return bool(answer > 0)


def is_hugetlb(address: int) -> bool:
    """Whether the mapping at an address has pages of the huge page pool, as /proc tells."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            start, _, end = name.partition("-")
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and name == "KernelPageSize:":
            return int(values[0]) * 1024 > PAGE_SIZE
    return False


@contextmanager
def no_hugepages() -> Iterator[Range]:
    """Map one huge page of private memory that has none yet, and takes none from the pool."""
    length = default_hugepage_size()
    if not length:
        raise KernelError(errno.ENOSYS, "mmap: no huge pages")
    with mapped(length, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_HUGETLB) as where:
        yield where


@cache
def drops_hugepages() -> bool:
    """Whether MADV_DONTNEED takes huge pages, as tried where there are none: kernels before 5.18 say EINVAL."""
    with suppress(KernelError), no_hugepages() as where:
        return bool(lib.uffd_madvise(where.start, where.len, Advice.DONTNEED) == 0)
    return True


@cache
def moves_hugepages() -> bool:
    """Whether mremap(2) moves huge pages, as tried where there are none: kernels before 5.16 say EINVAL."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    with suppress(KernelError), no_hugepages() as where, mapped(2 * where.len, prot=PROT_NONE, flags=flags) as place:
        to = -(-place.start // where.len) * where.len
        answer = lib.uffd_mremap(where.start, where.len, where.len, MREMAP_MAYMOVE | MREMAP_FIXED, to)
        if answer > 0:
            lib.uffd_munmap(answer, where.len)
        return bool(answer > 0)
    return True


def keep_small(where: Range) -> None:
    """Have no transparent huge page there (MADV_NOHUGEPAGE): it would fill what a case leaves empty."""
    with suppress(KernelError):  # EINVAL without CONFIG_TRANSPARENT_HUGEPAGE
        advise(where, Advice.NOHUGEPAGE)


def protect(where: Range, prot: int) -> None:
    """mprotect(2)."""
    checked(lib.uffd_mprotect(where.start, where.len, prot), f"mprotect({where.start:#x}, {where.len}, prot={prot:#x})")


def default_hugepage_size() -> int:
    """Return the default huge page size in bytes, ``Hugepagesize`` of /proc/meminfo; 0 without hugetlb."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) * 1024
    return 0


def mmap_min_addr() -> int:
    """Return the lowest address that a process without privileges may map."""
    return int(Path("/proc/sys/vm/mmap_min_addr").read_text())


def user_space_end() -> int:
    """Return the first address beyond user space, TASK_SIZE of a 64-bit kernel; 0 where it cannot be found."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    for bits in range(63, 32, -1):
        for end in (1 << bits, (1 << bits) - PAGE_SIZE):  # x86 keeps the very last page free
            try:
                map_memory(PAGE_SIZE, at=end - PAGE_SIZE, prot=PROT_NONE, flags=flags)
            except KernelError as error:
                if error.errno == errno.EEXIST:
                    return end
            else:
                unmap(Range(end - PAGE_SIZE, PAGE_SIZE))
                return end
    return 0
