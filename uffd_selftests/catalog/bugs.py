# SPDX-License-Identifier: GPL-2.0-only
"""Bugs of userfaultfd that were met in the field, and what a user of a kernel that has one sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLES = Path(__file__).parent


@dataclass(frozen=True)
class Bug:
    """A bug that was fixed, in the kernel or at least on its mailing list."""

    number: int
    shows: str
    """D every time; R now and then, in a race; K in the kernel's log alone."""
    affected: str
    """The releases that have it."""
    fix: str
    """Titles of the changes that fix it."""
    effect: str
    """What a user of a kernel without them sees."""

    def __str__(self) -> str:
        return f"bug {self.number} ({self.affected}) looks like this: {self.effect}; fixed by: {self.fix}"


@cache
def known_bugs() -> dict[int, Bug]:
    """Return all bugs by their number."""
    rows = _rows("bugs.txt", 5)
    return {int(number): Bug(int(number), *rest) for number, *rest in rows}


def untested() -> dict[int, str]:
    """Return the bugs that no case looks for, with the reason."""
    return {int(number): reason for number, reason in _rows("bugs_untested.txt", 2)}


def _rows(name: str, columns: int) -> Iterator[list[str]]:
    for line in (TABLES / name).read_text().splitlines():
        if line and not line.startswith("#"):
            fields = line.split("\t")
            if len(fields) != columns:
                raise ValueError(f"{name}: expected {columns} columns: {line}")
            yield fields
