# SPDX-License-Identifier: GPL-2.0-only
"""Address ranges and what is done to them, all of it without the interpreter's lock.

A thread that touches registered memory sleeps in the kernel until the fault is resolved. Were it to hold the lock
meanwhile, no Python thread could resolve it. So no case dereferences a pointer: it calls these functions.
"""

from __future__ import annotations

import errno
import mmap as _mmap
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from uffd_selftests.native import ffi, lib

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


EHWPOISON: int = getattr(errno, "EHWPOISON", 133)
"""The standard library has the name since Python 3.14; a few old architectures have another number."""


def errno_name(number: int) -> str:
    """Return the symbolic name of an error number of either sign: ``EEXIST``, ``-EEXIST``; others as they are."""
    name = {EHWPOISON: "EHWPOISON", **errno.errorcode}.get(abs(number))
    if name is None:
        return str(number)
    return name if number > 0 else f"-{name}"


class KernelError(OSError):
    """A system call failed. ``errno`` as usual; the text names the call, its arguments and the symbolic errno."""

    def __init__(self, number: int, call: str) -> None:
        super().__init__(number, os.strerror(number))
        self.call = call

    def __str__(self) -> str:
        return f"{self.call}: {errno_name(self.errno or 0)}"


def checked(result: int, call: str) -> int:
    """Return the result of a native call, or raise KernelError when it is -errno."""
    if -4096 < result < 0:
        raise KernelError(-result, call)
    return result


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


# ---- mappings ------------------------------------------------------------------------------------------------------


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
    """mremap(2); returns the new address. ``to`` adds MREMAP_FIXED."""
    new_len = where.len if new_len is None else new_len
    if to is not None:
        flags |= MREMAP_MAYMOVE | MREMAP_FIXED
    call = f"mremap({where.start:#x}, {where.len}, {new_len}, {flags:#x}, {to or 0:#x})"
    return checked(lib.uffd_mremap(where.start, where.len, new_len, flags, to or 0), call)


def advise(where: Range, advice: Advice) -> None:
    """madvise(2). Waits for the event to be read where UFFD_FEATURE_EVENT_REMOVE is on and pages are dropped."""
    call = f"madvise({where.start:#x}, {where.len}, {advice})"
    checked(lib.uffd_madvise(where.start, where.len, advice), call)


def keep_small(where: Range) -> None:
    """Have no transparent huge page there (MADV_NOHUGEPAGE): it would fill what a case leaves empty."""
    with suppress(KernelError):  # EINVAL without CONFIG_TRANSPARENT_HUGEPAGE
        advise(where, Advice.NOHUGEPAGE)


def protect(where: Range, prot: int) -> None:
    """mprotect(2)."""
    checked(
        lib.uffd_mprotect(where.start, where.len, prot), f"mprotect({where.start:#x}, {where.len}, prot={prot:#x})"
    )


@contextmanager
def read_only(data: bytes) -> Iterator[int]:
    """Yield the address of a copy of the data in a page that nobody can write."""
    page = Range(map_memory(PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS), PAGE_SIZE)
    try:
        poke(page.start, data)
        protect(page, PROT_READ)
        yield page.start
    finally:
        unmap(page)


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


# ---- access --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Trap:
    """The signal that ended an access: siginfo_t's fields."""

    signo: signal.Signals
    code: int
    addr: int
    addr_lsb: int

    def __repr__(self) -> str:
        lost = f" si_addr_lsb={self.addr_lsb}" if self.addr_lsb else ""
        return f"{self.signo.name} si_code={self.code} si_addr={self.addr:#x}{lost}"


class AccessError(Exception):
    """A guarded access ended in SIGBUS or SIGSEGV; ``trap`` tells which."""

    def __init__(self, trap: Trap) -> None:
        super().__init__(str(trap))
        self.trap = trap


def _trap(c: Any) -> Trap:
    return Trap(signal.Signals(c.signo), c.code, c.addr, c.addr_lsb)


def peek(address: int, length: int = 1) -> bytes:
    """Read bytes; raises AccessError when a signal ends the access."""
    buf, trap = ffi.new("char[]", length), ffi.new("struct uffd_trap *")
    if lib.uffd_peek(address, buf, length, trap):
        raise AccessError(_trap(trap))
    return bytes(ffi.buffer(buf, length))


def poke(address: int, data: bytes) -> None:
    """Write bytes; raises AccessError when a signal ends the access."""
    trap = ffi.new("struct uffd_trap *")
    if lib.uffd_poke(address, data, len(data), trap):
        raise AccessError(_trap(trap))


def touch(where: Range, step: int, *, write: bool = False) -> None:
    """Access one byte every ``step`` bytes: a load, or a write access that changes nothing."""
    lib.uffd_touch(where.start, step, where.len // step, lib.UFFD_WRITE if write else lib.UFFD_READ, ffi.NULL)


def touch_trapped(where: Range, step: int, *, write: bool = False) -> list[Trap | None]:
    """Like touch, but survive the signals: for each access, the signal that ended it or None."""
    count = where.len // step
    traps = ffi.new("struct uffd_trap[]", count)
    lib.uffd_touch(where.start, step, count, lib.UFFD_WRITE if write else lib.UFFD_READ, traps)
    return [_trap(trap) if trap.signo else None for trap in traps]


# ---- contents ------------------------------------------------------------------------------------------------------


class ContentError(AssertionError):
    """Memory does not hold what was promised; the text says where, with the expected and the observed byte."""


def _content_error(what: str, mismatch: Any, page_size: int) -> ContentError:
    page, offset = divmod(mismatch.offset, page_size)
    return ContentError(
        f"{what}, page {page} byte {offset:#x}: expected {mismatch.expected:#04x}, got {mismatch.observed:#04x}"
    )


def expect_bytes(where: Range, value: int, what: str = "memory", page_size: int = PAGE_SIZE) -> None:
    """Assert that every byte of the range equals ``value``; pages are counted from its start."""
    mismatch = ffi.new("struct uffd_mismatch *")
    if lib.uffd_verify_byte(where.start, where.len, value, mismatch):
        raise _content_error(what, mismatch, page_size)


def expect_same(expected: int, observed: int, length: int, what: str = "memory") -> None:
    """Assert that two ranges hold the same bytes."""
    mismatch = ffi.new("struct uffd_mismatch *")
    if lib.uffd_compare(expected, observed, length, mismatch):
        raise _content_error(what, mismatch, PAGE_SIZE)


@dataclass(frozen=True)
class Pattern:
    """Contents by which every page and every word of it can be told: see struct uffd_pattern."""

    page_size: int
    seed: int = 1
    flipped: bool = False

    def _native(self) -> Any:
        return ffi.new("struct uffd_pattern *", [self.page_size, self.seed, (1 << 64) - 1 if self.flipped else 0])

    def fill(self, address: int, first: int, count: int) -> None:
        """Write pages ``first`` to ``first + count - 1`` of an area whose page 0 is at ``address``."""
        lib.uffd_fill(address, self._native(), first, count)

    def verify(self, address: int, first: int, count: int, *, write_back: bool = False, what: str = "area") -> None:
        """Assert the contents of these pages to the last byte; then, if asked, write each first word back.

        The first access to each page is a read.
        """
        mismatch = ffi.new("struct uffd_mismatch *")
        flags = lib.UFFD_WRITE_BACK if write_back else 0
        if lib.uffd_verify(address, self._native(), first, count, flags, mismatch):
            raise _content_error(what, mismatch, self.page_size)


# ---- what /proc says of it -----------------------------------------------------------------------------------------


def smaps_fields(where: Range, pid: int | str = "self") -> Iterator[dict[str, str]]:
    """Yield, for each mapping that overlaps the range, its fields in /proc/PID/smaps; sizes read like "2048 kB"."""
    fields: dict[str, str] | None = None
    with Path(f"/proc/{pid}/smaps").open() as lines:
        for line in lines:
            first, _, rest = line.partition(" ")
            if first.endswith(":"):
                if fields is not None:
                    fields[first[:-1]] = rest.strip()
                continue
            if fields is not None:
                yield fields
                fields = None
            start, _, end = first.partition("-")
            if int(start, 16) >= where.end:  # the kernel makes the rest only when asked for, and that takes long
                break
            if int(end, 16) > where.start:
                fields = {"start": start, "end": end}
        if fields is not None:
            yield fields


def smaps_bytes(where: Range, *fields: str) -> int:
    """Return the sum of these fields, in bytes, over all mappings that overlap the range; absent ones count as 0."""
    return sum(int(entry.get(field, "0").split()[0]) * 1024 for entry in smaps_fields(where) for field in fields)


def pmd_mapped(where: Range) -> int:
    """Return how many bytes of the range's mappings the page tables map by PMD, of any kind of memory."""
    return smaps_bytes(where, "AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")


def resident(field: str) -> int:
    """Return a field of /proc/self/status, such as RssAnon, in base pages."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) * 1024 // PAGE_SIZE for words in lines if words and words[0] == f"{field}:")
