# SPDX-License-Identifier: GPL-2.0-only
"""Whether a result can be had on this machine: everything that is missing for it, and how to get it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from uffd_selftests.abi.uapi import Feature
from uffd_selftests.machine.requirements import REQUIREMENTS, missing_features, no_userfaultfd

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffd_selftests.case import Case
    from uffd_selftests.machine.facts import Facts
    from uffd_selftests.mem_types import MemType

HUGEPAGES = "hugepages"
"""The name under which free huge pages can be required."""


@dataclass(frozen=True)
class Missing:
    """One thing that a result wants and that is not there."""

    name: str
    """The name under which it can be required."""
    reason: str
    """A clause that says what is missing and how to get it."""


NOT_ASKED_FOR = Missing(
    "may-hang-kernel",
    "a kernel with this bug is left with a process that nothing can end: --may-hang-kernel, on a machine to spare",
)
"""What a case lacks that may hang the kernel, unless it was asked for."""


def missing(case: Case, mem: MemType | None, facts: Facts) -> list[Missing]:
    """Return everything that a case on a memory type lacks; huge pages apart, which come and go during a run."""
    if nothing := no_userfaultfd(facts):
        return [Missing("userfaultfd", nothing)]
    found = []
    there = not int(case.features) & ~int(facts.features) and not facts.event_fork  # most are: to look costs more
    for feature in [] if there else _bits(case.features):
        found += [Missing(requirement_name(feature), reason) for reason in missing_features(facts, feature)]
    needs = list(case.needs)
    if (mem.hugetlb if mem else case.spare_hugepages) and "hugetlb" not in needs:
        needs.append("hugetlb")
    for name in needs:
        if reason := REQUIREMENTS[name](facts):
            found.append(Missing(_dashed(name), reason))
    return found


def hugepages_needed(case: Case, mem: MemType | None, area_bytes: int, hugepage_size: int = 0) -> int:
    """Return how many huge pages of the default size a result takes: source, destination and what the case adds.

    The size is that of the kernel under test, if it is not the running one.
    """
    areas = 2 * area_pages(case, mem, area_bytes, hugepage_size) if mem and mem.hugetlb else 0
    return areas + case.spare_hugepages if areas or not mem else 0


def area_pages(case: Case, mem: MemType, area_bytes: int, page_size: int = 0) -> int:
    """Return how many pages of the memory type each of the two areas of a result has."""
    if case.pages is not None:
        return case.pages
    size = page_size or mem.page_size
    return max(2, area_bytes // size) if size else 2


def requirement_name(feature: Feature) -> str:
    """Return the name under which a feature can be required: UFFD_FEATURE_MINOR_SHMEM is minor-shmem."""
    return _dashed(str(feature).removeprefix(Feature.prefix)).removeprefix("pagefault-flag-")


def requirement_names() -> list[str]:
    """Return all names that can be required."""
    others = {"userfaultfd", HUGEPAGES, NOT_ASKED_FOR.name}
    return sorted({*others, *map(requirement_name, Feature), *map(_dashed, REQUIREMENTS)})


def parse_requirements(text: str) -> frozenset[str]:
    """Read a list like ``wp,minor-shmem``; raises ValueError that names the names there are."""
    wanted = {_dashed(name.strip()) for name in text.split(",") if name.strip()}
    if unknown := sorted(wanted - set(requirement_names())):
        raise ValueError(f"unknown requirement {', '.join(unknown)}; there are {', '.join(requirement_names())}")
    return frozenset(wanted)


def sentence(things: Iterable[Missing]) -> str:
    """Return one skip reason that names everything missing, once."""
    return "; ".join(dict.fromkeys(thing.reason for thing in things))


def _dashed(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")


def _bits(features: Feature) -> list[Feature]:
    return [Feature(1 << bit) for bit in range(int(features).bit_length()) if int(features) >> bit & 1]
