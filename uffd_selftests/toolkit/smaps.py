# SPDX-License-Identifier: GPL-2.0-only
"""What /proc says of memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from uffd_selftests.toolkit.memory import PAGE_SIZE, Range

__all__ = ["smaps_fields", "smaps_bytes", "pmd_mapped", "resident"]


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
