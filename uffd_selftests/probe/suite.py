# SPDX-License-Identifier: GPL-2.0-only
"""What a lack costs: which of the suite's results depend on what, from the declarations and the code of the cases."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

from uffd_selftests.abi.uapi import Feature
from uffd_selftests.case import Case
from uffd_selftests.catalog.contract import functions
from uffd_selftests.harness.gating import HUGEPAGES, Missing, hugepages_needed, missing
from uffd_selftests.machine.facts import Facts
from uffd_selftests.machine.hugepages import HUGEPAGES as POOLS
from uffd_selftests.machine.hugepages import lack_of_hugepages
from uffd_selftests.mem_types import Backing, MemType

PACKAGE = __name__.partition(".")[0]
OPTION = re.compile(r"\bCONFIG_([A-Z0-9_]+)")

MARKERS = Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED | Feature.WP_ASYNC
"""Features that UFFDIO_API offers with CONFIG_PTE_MARKER_UFFD_WP alone."""
OPTIONS_OF_NEED = {
    "gup_test": ("GUP_TEST", "DEBUG_FS"),
    "hugetlb": ("HUGETLBFS",),
    "kvm": ("KVM",),
    "kvm_paging": ("KVM",),
    "pagemap": ("PROC_PAGE_MONITOR",),
    "pagemap_scan": ("PROC_PAGE_MONITOR",),
    "swap": ("SWAP",),
    "thp": ("TRANSPARENT_HUGEPAGE",),
}
"""The options behind what a case can need (REQUIREMENTS of machine/requirements.py)."""
OPTIONS_OF_MEMORY = {Backing.SHMEM: "SHMEM", Backing.HUGETLB: "HUGETLBFS"}


@dataclass(frozen=True)
class Expected:
    """One result that a run would produce."""

    case: Case
    function: FunctionType
    mem: MemType | None

    @property
    def options(self) -> frozenset[str]:
        """The kernel's options that it depends on, without CONFIG_.

        A gate that it declares does, or the code that it runs names the option as the reason of a skip.
        """
        found = {"USERFAULTFD", *_named_by(self.function), *_named_by(self.case.pre_alloc, self.case.post_alloc)}
        if self.case.features & MARKERS:
            found.add("PTE_MARKER_UFFD_WP")
        for need in self.case.needs:
            found.update(OPTIONS_OF_NEED.get(need, ()))
        if self.mem and self.mem.backing in OPTIONS_OF_MEMORY:
            found.add(OPTIONS_OF_MEMORY[self.mem.backing])
        return frozenset(found)


def expected() -> Iterator[Expected]:
    """Yield every result; imports all cases."""
    for case, function in functions():
        for _ in case.variants or ("",):
            yield from (Expected(case, function, mem) for mem in case.mem or (None,))


@dataclass(frozen=True)
class Shortage:
    """Something that is missing here, and how many results are skipped for lack of it."""

    name: str
    """As --require takes it."""
    reason: str
    results: int


@dataclass(frozen=True)
class Prospect:
    """What a run would do here."""

    results: int
    skipped: int
    """Results that something declared is missing for."""
    perhaps: int
    """Further results whose case may find, when it runs, that the kernel lacks an option."""
    shortages: tuple[Shortage, ...]
    """The most expensive first; a result that lacks two things counts in both."""
    dependent: dict[str, int]
    """Each kernel option with the number of results that depend on it."""


def prospect(facts: Facts, area_bytes: int, lacking: Collection[str] = ()) -> Prospect:
    """Return what a run with areas of this size would do on this machine, whose kernel lacks some options."""
    results = skipped = perhaps = 0
    reasons: dict[str, str] = {}
    counts: dict[str, int] = {}
    dependent: dict[str, int] = {}
    for each in expected():
        results += 1
        lacks = list(dict.fromkeys(_lacks(each, facts, area_bytes)))
        skipped += bool(lacks)
        perhaps += not lacks and not each.options.isdisjoint(lacking)
        for lack in lacks:
            reasons.setdefault(lack.name, lack.reason)
            counts[lack.name] = counts.get(lack.name, 0) + 1
        for option in each.options:
            dependent[option] = dependent.get(option, 0) + 1
    shortages = sorted((Shortage(name, reasons[name], count) for name, count in counts.items()), key=_price)
    return Prospect(results, skipped, perhaps, tuple(shortages), dependent)


def _price(shortage: Shortage) -> tuple[int, str]:
    return -shortage.results, shortage.name


def _lacks(each: Expected, facts: Facts, area_bytes: int) -> list[Missing]:
    lacks = missing(each.case, each.mem, facts)
    needed = 0 if lacks else hugepages_needed(each.case, each.mem, area_bytes)
    if needed and not _can_grow(facts.hugepage_size) and (reason := _hugepage_reason(facts.hugepage_size, needed)):
        lacks.append(Missing(HUGEPAGES, reason))
    return lacks


@functools.cache
def _can_grow(size: int) -> bool:
    """Whether a run may add huge pages itself."""
    return os.access(POOLS / f"hugepages-{size // 1024}kB" / "nr_hugepages", os.W_OK)


@functools.cache
def _hugepage_reason(size: int, needed: int) -> str | None:
    return lack_of_hugepages(size, needed)


# ---- what code says -------------------------------------------------------------------------------------------------


def _named_by(*functions: Any) -> set[str]:
    """Return the options that the strings of functions name, and of all that they can call in this package."""
    return {option for function in functions for option in _reachable_options(function)}


@functools.cache
def _reachable_options(function: Any) -> frozenset[str]:
    found: set[str] = set()
    seen: set[int] = set()
    waiting = [function]
    while waiting:
        thing = waiting.pop()
        if id(thing) not in seen:
            seen.add(id(thing))
            options, used = _direct(thing)
            found |= options
            waiting += used
    return frozenset(found)


@functools.cache
def _direct(thing: Any) -> tuple[frozenset[str], tuple[Any, ...]]:
    """Return the options that one function names, and the functions and classes of this package that it uses."""
    thing = inspect.unwrap(getattr(thing, "__func__", thing))  # what contextmanager and classmethod have wrapped
    if not str(getattr(thing, "__module__", "")).startswith(PACKAGE):
        return frozenset(), ()
    if isinstance(thing, type):
        return frozenset(), tuple(member for member in vars(thing).values() if callable(getattr(member, "__get__", 0)))
    if not isinstance(thing, FunctionType):
        return frozenset(), ()
    strings, names = set(), set()
    for code in _codes(thing.__code__):
        strings |= {const for const in code.co_consts if isinstance(const, str) and const != thing.__doc__}
        names |= {*code.co_names}
    space = [thing.__globals__, *(vars(each) for each in map(thing.__globals__.get, names) if _is_ours(each))]
    used = [each[name] for each in space for name in names if name in each]
    return frozenset(OPTION.findall(" ".join(strings))), tuple(each for each in used if callable(each))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function, and of the functions inside."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _codes(const)


def _is_ours(thing: object) -> bool:
    """Whether it is a module of this package."""
    return isinstance(thing, ModuleType) and thing.__name__.startswith(PACKAGE)
