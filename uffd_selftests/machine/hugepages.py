# SPDX-License-Identifier: GPL-2.0-only
"""The pools of huge pages."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from uffd_selftests.abi.errors import errno_name
from uffd_selftests.machine.hugetlb_cgroup import hugetlb_limit
from uffd_selftests.machine.journal import Change, Journal, say, undoable
from uffd_selftests.machine.system import available_memory, number

if TYPE_CHECKING:
    from uffd_selftests.machine.journal import Entry


HUGEPAGES = Path("/sys/kernel/mm/hugepages")
COMPACT_MEMORY = Path("/proc/sys/vm/compact_memory")


@dataclass(frozen=True)
class HugepageCounts:
    """The pool of one huge page size, in pages (Documentation/admin-guide/mm/hugetlbpage.rst)."""

    total: int
    """All pages, surplus included."""
    free: int
    """Not in use, reserved ones included."""
    reserved: int
    """Promised to mappings that have not touched them yet."""
    surplus: int
    """Beyond nr_hugepages; each goes away when it is given back."""

    @property
    def persistent(self) -> int:
        """The pages that nr_hugepages stands for."""
        return self.total - self.surplus

    @property
    def available(self) -> int:
        """The pages that a new mapping can have."""
        return max(0, self.free - self.reserved)


def hugepage_sizes() -> tuple[int, ...]:
    """Return the huge page sizes of this kernel in bytes, smallest first."""
    try:
        names = os.listdir(HUGEPAGES)
    except OSError:
        return ()
    return tuple(sorted(int(name.removeprefix("hugepages-").removesuffix("kB")) * 1024 for name in names))


def hugepages(size: int) -> HugepageCounts:
    """Return the counts of the pool of huge pages of size bytes; all 0 when the kernel has no such pool."""
    pool = _pool(size)
    names = ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages")
    try:
        return HugepageCounts(*(number(f"{pool}/{name}") for name in names))
    except OSError:
        return HugepageCounts(0, 0, 0, 0)


def lack_of_hugepages(size: int, wanted: int, *, claimed: int = 0, why: str = "") -> str | None:
    """Return the reason why a new mapping cannot have this many huge pages of size bytes, None when it can.

    claimed pages are free but spoken for; why says what kept the pool from growing.
    """
    limit = hugetlb_limit(size) if wanted else None
    if limit and limit.pages < wanted:
        allowed = f"the cgroup allows {limit.pages} more: raise {limit.file}"
        return f"needs {wanted} huge pages of {size // 1024} kB, {allowed}"
    counts = hugepages(size)
    available = max(0, counts.available - claimed)
    if available >= wanted:
        return None
    why = f" ({why})" if why else ""
    root = "as root, " if os.geteuid() else ""
    remedy = f"{root}echo {counts.total + wanted - available} > {_pool(size)}/nr_hugepages"
    return f"needs {wanted} free huge pages of {size // 1024} kB, {available} free{why}: {remedy}"


def _pool(size: int) -> Path:
    return HUGEPAGES / f"hugepages-{size // 1024}kB"


def _resize(size: int, persistent: int) -> None:
    """Set nr_hugepages. The kernel may give fewer pages than asked for, and says nothing then."""
    (_pool(size) / "nr_hugepages").write_text(str(persistent))


class HugepagePool(Change):
    """As many free huge pages as wanted, for as long as the context lasts, if the machine and the privileges allow.

    What is missing is added to the pool and taken away again at the end, by relative change, so that several runs and
    changes made meanwhile by others add up. Pages that other running pools want do not count as free.
    """

    def __init__(self, size: int, wanted: int) -> None:
        self.size = size
        """Bytes of a huge page."""
        self.wanted = wanted
        """Free pages wanted."""
        self.added = 0
        """Pages added to the machine's pool."""
        self.shortage: str | None = None
        """Why there are fewer free pages than wanted, and what to do."""

    def __enter__(self) -> HugepagePool:
        claimed, why = 0, ""
        if self.wanted and self.size in hugepage_sizes():
            try:
                with Journal.open() as journal:
                    say(journal.repair())
                    claimed = _claimed(journal, self.size)
                    self._entry = journal.add(_PoolRecord(self.size, self.wanted, added=0))
                    self._grow(journal, self._entry, claimed)
            except OSError as error:
                why = errno_name(error.errno or 0)
            except BaseException:  # Ctrl-C
                self.__exit__(None, None, None)
                raise
        self.shortage = lack_of_hugepages(self.size, self.wanted, claimed=claimed, why=why)
        return self

    def _grow(self, journal: Journal, entry: Entry, claimed: int) -> None:
        counts = hugepages(self.size)
        missing = self.wanted - max(0, counts.available - claimed)
        missing = min(missing, _memory_to_spare() // self.size)
        if missing <= 0:
            return
        # The kernel turns surplus pages into persistent ones before it allocates any.
        low, high = counts.persistent, counts.total + missing
        journal.update(entry, _PoolRecord(self.size, self.wanted, low=low, high=high))
        _resize(self.size, high)
        if hugepages(self.size).persistent < high:
            with contextlib.suppress(OSError):
                COMPACT_MEMORY.write_text("1")
            _resize(self.size, high)
        self.added = hugepages(self.size).persistent - low
        journal.update(entry, _PoolRecord(self.size, self.wanted, added=self.added))


def _claimed(journal: Journal, size: int) -> int:
    """Return how many huge pages of size bytes the running pools want."""
    return sum(record.wanted for record in journal.records(_PoolRecord) if record.size == size)


def _memory_to_spare() -> int:
    """Return half of the available memory in bytes: huge pages must not starve the rest of the machine."""
    available = available_memory()
    return sys.maxsize if available is None else available // 2


@undoable
@dataclass(frozen=True)
class _PoolRecord:
    """Pages added to a pool; or, while the pool is being resized, the sizes it is between."""

    kind: ClassVar[str] = "hugepages"
    size: int
    wanted: int
    added: int | None = None
    low: int = 0
    high: int = 0

    def __post_init__(self) -> None:
        if not all(isinstance(count, int) for count in (self.size, self.wanted, self.added or 0, self.low, self.high)):
            raise TypeError

    def undo(self, journal: Journal, entry: Entry) -> str | None:
        """Take the added pages away; says what was done."""
        counts = hugepages(self.size)
        added = self.added
        if added is None:
            added = min(max(0, counts.persistent - self.low), self.high - self.low)
        if not added:
            return None
        target = max(0, counts.persistent - added)
        journal.update(entry, dataclasses.replace(self, added=None, low=target, high=counts.persistent))
        _resize(self.size, target)
        return f"restored {counts.persistent - target} huge pages of {self.size // 1024} kB"
