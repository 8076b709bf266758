# SPDX-License-Identifier: GPL-2.0-only
"""In which modes memory is registered, and how the kernel has cut it into mappings."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from uffd_selftests.abi.native import lib
from uffd_selftests.abi.uapi import RegisterMode
from uffd_selftests.mem_types import Area
from uffd_selftests.toolkit.expectations import Skip, expect
from uffd_selftests.toolkit.handle import MINOR, MISSING, RWP, WP
from uffd_selftests.toolkit.memory import (
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_NONE,
    PROT_READ,
    Range,
    map_memory,
    unmap,
)
from uffd_selftests.toolkit.smaps import smaps_fields

__all__ = ["UNREGISTERED", "registered_for_wp", "in_modes", "expect_modes", "expect_mappings", "no_mapping_left"]


UNREGISTERED = RegisterMode(0)
_VM_FLAGS = {"um": MISSING, "uw": WP, "ui": MINOR, "ur": RWP}


def _mappings(where: Range, pid: int | str = "self") -> list[tuple[Range, RegisterMode]]:
    """Return the part of each mapping that lies in the range, and its modes (VmFlags of /proc/PID/smaps)."""
    found = []
    if not os.path.exists("/proc/self/smaps"):
        raise Skip("/proc/self/smaps: ENOENT: boot a kernel with CONFIG_PROC_PAGE_MONITOR")
    for fields in smaps_fields(where, pid):
        start, end = max(int(fields["start"], 16), where.start), min(int(fields["end"], 16), where.end)
        flags = fields["VmFlags"].split()
        mode = sum(bit for name, bit in _VM_FLAGS.items() if name in flags)
        found.append((Range(start, end - start), RegisterMode(mode)))
    return found


def registered_for_wp(where: Range) -> bool:
    """Whether /proc/self/smaps shows any mapping in the range as registered for write protection."""
    return any("uw" in fields["VmFlags"].split() for fields in smaps_fields(where))


def in_modes(where: Range, pid: int | str = "self") -> RegisterMode:
    """Return the modes in which memory is registered, with whichever handle; AssertionError unless all of it alike."""
    modes = {mode for _, mode in _mappings(where, pid)}
    if len(modes) != 1:
        raise AssertionError(f"{where}: expected one set of modes, got {sorted(map(str, modes))}")
    return modes.pop()


def expect_modes(where: Range, *modes: RegisterMode, pid: int | str = "self") -> None:
    """Assert in which modes memory is registered, with whichever handle.

    The range is looked at in as many equal parts as modes are given: pages, usually. Holes in a part do not count.
    """
    size = where.len // len(modes)
    mappings = _mappings(where, pid)
    seen = []
    for start in range(where.start, where.end, size):
        part = {mode for mapping, mode in mappings if mapping.start < start + size and start < mapping.end}
        seen.append("/".join(sorted(str(mode) for mode in part)) or "not mapped")
    expect(", ".join(seen), ", ".join(str(mode) for mode in modes), f"modes in which {where} is registered, by part")


def expect_mappings(area: Area, *pages: int) -> None:
    """Assert how the kernel has cut an area into mappings: the number of pages of each."""
    seen = [mapping.len // area.page_size for mapping, _ in _mappings(area.range)]
    expect(seen, list(pages), "pages in each mapping of the area")


@contextmanager
def no_mapping_left() -> Iterator[None]:
    """Use up vm.max_map_count: in the block no mapping of this process can be split."""
    with open("/proc/sys/vm/max_map_count") as file:
        limit = int(file.read())
    if limit > 1 << 17:
        raise Skip(f"vm.max_map_count is {limit}, so many mappings would take long to make: set it to 65530")
    length = (limit + 2) * PAGE_SIZE
    pieces = Range(map_memory(length, prot=PROT_NONE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE), length)
    try:
        for start in range(pieces.start + PAGE_SIZE, pieces.end, 2 * PAGE_SIZE):
            if lib.uffd_mprotect(start, PAGE_SIZE, PROT_READ) == -errno.ENOMEM:
                break
        yield
    finally:
        unmap(pieces)
