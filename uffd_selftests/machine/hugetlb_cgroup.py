# SPDX-License-Identifier: GPL-2.0-only
"""How many huge pages the cgroups of a process leave it: a touch beyond that is SIGBUS, whatever the pool has.

Container runtimes set the limit to 0 for a pod that has not asked for any (Documentation/admin-guide/cgroup-v2.rst,
cgroup-v1/hugetlb.rst).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc/self")
NO_LIMIT = 1 << 60
"""Bytes; version 1 has no word for it, and some pages below 2**63 for a number."""


class Limit(NamedTuple):
    """What a cgroup still allows."""

    pages: int
    file: Path
    """Where the limit stands."""


def hugetlb_limit(size: int) -> Limit | None:
    """Return the tightest limit on huge pages of size bytes that holds for this process; None when there is none."""
    found = [limit for group in _groups() for limit in _limits(group, size)] if size else []
    return min(found, default=None, key=lambda limit: limit.pages)


def _limits(group: Path, size: int) -> Iterator[Limit]:
    """Yield what a group allows, of pages in use and of pages reserved, by whichever version it is of."""
    label = f"hugetlb.{hugepage_label(size)}"
    for limit, usage in (
        ("max", "current"),
        ("rsvd.max", "rsvd.current"),
        ("limit_in_bytes", "usage_in_bytes"),
        ("rsvd.limit_in_bytes", "rsvd.usage_in_bytes"),
    ):
        file = group / f"{label}.{limit}"
        allowed = _bytes(file)
        if allowed is not None and allowed < NO_LIMIT:
            yield Limit(max(0, allowed - (_bytes(group / f"{label}.{usage}") or 0)) // size, file)


def hugepage_label(size: int) -> str:
    """Return the size as the files are called (hugetlb_cgroup.c: mem_fmt)."""
    for shift, unit in ((30, "GB"), (20, "MB")):
        if size >> shift:
            return f"{size >> shift}{unit}"
    return f"{size >> 10}KB"


def _bytes(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:  # no such limit, or a group without it
        return None
    return int(text) if text.isdigit() else None


def _groups() -> Iterator[Path]:
    """Yield the folders of this process's cgroups that can limit huge pages, each with those above it."""
    try:
        own = [line.split(":", 2) for line in (PROC / "cgroup").read_text().splitlines()]
        mounts = (PROC / "mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        _, _, _, root, place, *_ = fields.split()
        kind, _, options = rest.split(" ", 2)
        for _, controllers, path in own:
            fits = kind == "cgroup2" and not controllers
            fits |= kind == "cgroup" and "hugetlb" in controllers.split(",") and "hugetlb" in options.split(",")
            if fits and (path + "/").startswith(root.rstrip("/") + "/"):
                below = Path(path).relative_to(root)
                yield from (Path(place, *below.parts[:depth]) for depth in range(len(below.parts), -1, -1))
