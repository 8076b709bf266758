# SPDX-License-Identifier: GPL-2.0-only
"""What a run may leave behind on the machine: settings, mounts, swap, huge pages, contexts in the kernel."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uffd_selftests.harness import proc
from uffd_selftests.machine.hugepages import HUGEPAGES, HugepageCounts, hugepage_sizes, hugepages
from uffd_selftests.machine.repair import others
from uffd_selftests.machine.swap import swap_files

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTINGS = (
    *("/proc/sys/vm", "/proc/sys/kernel", "/proc/sys/fs"),
    *("/sys/kernel/mm/transparent_hugepage", "/sys/kernel/mm/ksm"),
)
CONTEXTS = Path("/sys/kernel/slab/userfaultfd_ctx_cache")
VOLATILE = (
    *("ns_last_pid", "pages_to_scan", "nr_hugepages", "nr_hugepages_mempolicy"),
    *("perf_event_max_sample_rate", "hung_task_warnings", "tainted"),
)
"""Files among the settings that the kernel writes itself, and those that are looked at otherwise."""


@dataclass(frozen=True)
class Machine:
    """What a run may change on the machine and must put back."""

    busy: bool
    """Another run has something changed, so that huge pages and settings are not this one's alone."""
    pools: dict[int, HugepageCounts]
    settings: dict[str, str]
    mounts: frozenset[str]
    swaps: frozenset[str]
    contexts: int
    """Contexts of userfaultfds, less the open descriptors; 0 where the kernel does not count them."""

    @classmethod
    def now(cls) -> Machine:
        """Look at the machine."""
        return cls(
            others(),
            {size: hugepages(size) for size in hugepage_sizes()},
            dict(_settings()),
            frozenset(" ".join(line.split()[2:]) for line in _lines("/proc/self/mountinfo")),
            frozenset(swap_files()),
            _contexts(),
        )

    def changes(self, before: Machine) -> Iterator[str]:
        """Say in what this is not the machine that it was before."""
        for what, now, then in (("mount", self.mounts, before.mounts), ("swap", self.swaps, before.swaps)):
            yield from (f"{what} is there: {name}" for name in sorted(now - then))
            yield from (f"{what} is gone: {name}" for name in sorted(then - now))
        if self.contexts > before.contexts + _slack_contexts():
            yield f"{self.contexts - before.contexts} more contexts in the kernel than open userfaultfds"
        if self.busy or before.busy:
            return
        for size, counts in self.pools.items():
            if counts != before.pools.get(size) and not proc.hugetlb_users():
                yield f"{HUGEPAGES}: pages of {size >> 10} kB: {counts}, were {before.pools.get(size)}"
        for path, value in self.settings.items():
            if value != before.settings.get(path):
                yield f"{path} is {value!r}, was {before.settings.get(path)!r}"


def _settings() -> Iterator[tuple[str, str]]:
    """Return the settings of memory management and the kernel as they are."""
    for folder in SETTINGS:
        for path in sorted(Path(folder).rglob("*")):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if path.name not in VOLATILE and path.is_file() and path.stat().st_mode & stat.S_IWUSR:
                    yield str(path), path.read_text().strip()


def _contexts() -> int:
    try:
        (CONTEXTS / "shrink").write_text("1")  # else the kernel counts free ones, too
        count = int((CONTEXTS / "objects").read_text().split()[0])
    except OSError:
        return 0
    return count - sum(len(proc.userfaultfds(pid)) for pid in proc.processes())


def _slack_contexts() -> int:
    """Return how many contexts may seem to be there that are not: whole slabs that each CPU keeps for itself."""
    try:
        return 2 * (os.cpu_count() or 1) * int((CONTEXTS / "objs_per_slab").read_text())
    except OSError:
        return 0


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
