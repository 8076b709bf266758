# SPDX-License-Identifier: GPL-2.0-only
"""A cgroup that limits memory, or huge pages."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from uffd_selftests.machine.hugetlb_cgroup import hugepage_label
from uffd_selftests.machine.journal import Change, Journal, undoable
from uffd_selftests.machine.system import number, numbers

if TYPE_CHECKING:
    from uffd_selftests.machine.journal import Entry


GROUP = "uffd-selftests-{}"
"""Name of a cgroup, with the process that made it."""
EXHAUST_TRIES = 20
KILL_SECONDS = 30.0
"""How long the processes of a cgroup may take to die."""


class MemoryGroup(Change):
    """A memory cgroup for as long as the context lasts, of version 2 or 1, whichever has the memory on this machine.

    At its end all processes in it are killed. Raises OSError when it cannot be had.
    """

    FILES: ClassVar = {
        2: {"limit": "memory.max", "usage": "memory.current", "peak": "memory.peak"},
        1: {"limit": "memory.limit_in_bytes", "usage": "memory.usage_in_bytes", "peak": "memory.max_usage_in_bytes"},
    }

    controller: ClassVar = "memory"

    def __init__(self) -> None:
        self.version = 0
        self.path = Path()

    def __enter__(self) -> MemoryGroup:
        root, self.version = _hierarchy(self.controller)
        self.path = root / GROUP.format(os.getpid())
        control = root / "cgroup.subtree_control"
        with self._changing() as journal:
            enable = self.version == 2 and self.controller not in control.read_text().split()
            ours = enable or _controlled(journal, str(control), self.controller)
            self._entry = journal.add(_GroupRecord(str(self.path), str(control) if ours else "", self.controller))
            if enable:
                control.write_text(f"+{self.controller}")
            self.path.mkdir()
        return self

    def command(self, *words: str) -> list[str]:
        """Return a command that runs another one in the group."""
        return ["/bin/sh", "-c", 'echo 0 >"$0" && exec "$@"', str(self.path / "cgroup.procs"), *words]

    def processes(self) -> list[int]:
        """Return the processes in the group, and in those that were made below it."""
        return _members(self.path)

    def limit(self, size: int) -> None:
        """Let the processes have so many bytes of memory; what they have beyond them goes to swap."""
        (self.path / self.FILES[self.version]["limit"]).write_text(str(size))

    @property
    def usage(self) -> int:
        """How many bytes are charged to the group, with what its processors have charged beforehand."""
        return int((self.path / self.FILES[self.version]["usage"]).read_text())

    @property
    def kills(self) -> bool:
        """Whether a process is killed when nothing more can be charged (oom_score_adj says which)."""
        return self.version == 2

    def join(self) -> None:
        """Move this process into the group, for good."""
        (self.path / "cgroup.procs").write_text("0")

    def exhaust(self) -> None:
        """Let nothing more be charged to the group: whatever needs it fails with ENOMEM, in its own processes."""
        if self.version == 2:
            with contextlib.suppress(FileNotFoundError):  # without CONFIG_SWAP
                (self.path / "memory.swap.max").write_text("0")
            for _ in range(2):  # what the first time frees, the processors keep charged
                self.limit(0)
        else:
            self._exhaust_old()

    def _exhaust_old(self) -> None:
        (self.path / "memory.oom_control").write_text("1")
        (self.path / "memory.swappiness").write_text("0")
        for _ in range(2):  # as above
            with contextlib.suppress(OSError):  # EBUSY
                self.limit(0)
        for _ in range(EXHAUST_TRIES):
            with contextlib.suppress(OSError):  # EBUSY: there was more meanwhile
                self.limit(number(self.path / "memory.usage_in_bytes"))
                return
        raise OSError(errno.EBUSY, "the cgroup's memory grows on")

    def relieve(self) -> None:
        """End that, and all limits."""
        if self.version == 2:
            (self.path / "memory.max").write_text("max")
        else:
            self.limit(-1)

    def peak(self) -> int:
        """Return the most bytes that the group ever had; 0 where the kernel does not say (before Linux 5.19)."""
        return number(self.path / self.FILES[self.version]["peak"])

    def statistics(self) -> dict[str, int]:
        """Return what happened in the group, and the bytes that it has now.

        ``pgfault``, ``pgmajfault`` and ``oom_kill`` are counted from its making on; ``used`` is what processes have in
        memory and swap, ``kernel`` what the kernel has for them.
        """
        stat = numbers(self.path / "memory.stat")
        if self.version == 1:
            used = stat["total_rss"] + stat["total_shmem"] + stat.get("total_swap", 0)
            kernel = number(self.path / "memory.kmem.usage_in_bytes")
            kills = numbers(self.path / "memory.oom_control")
        else:
            used = stat["anon"] + stat["shmem"] + number(self.path / "memory.swap.current")
            kernel = stat.get("kernel", 0) - stat.get("slab_reclaimable", 0)  # Linux 5.18
            kills = numbers(self.path / "memory.events")
        total = "total_" if self.version == 1 else ""
        faults = {name: stat[total + name] for name in ("pgfault", "pgmajfault")}
        return {**faults, "oom_kill": kills.get("oom_kill", 0), "used": used, "kernel": kernel}


class HugetlbGroup(MemoryGroup):
    """A cgroup that limits huge pages, in the same way."""

    controller: ClassVar = "hugetlb"
    NAMES: ClassVar = {2: ("max", "current"), 1: ("limit_in_bytes", "usage_in_bytes")}

    def files(self, size: int) -> tuple[Path, Path]:
        """Return the files of the limit and of the usage of huge pages of size bytes, both in bytes."""
        limit, usage = (self.path / f"hugetlb.{hugepage_label(size)}.{name}" for name in self.NAMES[self.version])
        return limit, usage

    @property
    def unlimited(self) -> str:
        """What stands for no limit."""
        return "max" if self.version == 2 else "-1"


def _controlled(journal: Journal, path: str, controller: str) -> bool:
    """Whether the controller was put in force in this file for the cgroup of a running process."""
    return any((each.control, each.controller) == (path, controller) for each in journal.records(_GroupRecord))


def _hierarchy(controller: str) -> tuple[Path, int]:
    """Return where the cgroups with a controller are mounted, and their version; raises OSError."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        place, (kind, _, options) = Path(fields.split()[4]), rest.split()
        if kind == "cgroup" and controller in options.split(","):
            return place, 1
        with contextlib.suppress(OSError):
            if kind == "cgroup2" and controller in (place / "cgroup.controllers").read_text().split():
                return place, 2
    option = {"memory": "CONFIG_MEMCG", "hugetlb": "CONFIG_CGROUP_HUGETLB"}[controller]
    raise OSError(errno.ENOENT, f"no {controller} cgroup: {option}, and mount -t cgroup2 none /sys/fs/cgroup")


def _members(group: Path) -> list[int]:
    return [int(pid) for procs in group.rglob("cgroup.procs") for pid in procs.read_text().split()]


@undoable
@dataclass(frozen=True)
class _GroupRecord:
    """A cgroup, where its controller was put in force for it, if anywhere, and which one that is."""

    kind: ClassVar[str] = "cgroup"
    path: str
    control: str = ""
    controller: str = "memory"

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in (self.path, self.control, self.controller)):
            raise TypeError

    def undo(self, _journal: Journal, _entry: Entry) -> str | None:
        """Kill what is in the group and remove it; says what was done."""
        group = Path(self.path)
        there = group.is_dir()
        if there:
            _clear(group)
        if self.control and not any(group.parent.glob(GROUP.format("*"))):
            with contextlib.suppress(OSError):  # somebody else uses it by now
                Path(self.control).write_text(f"-{self.controller}")
        return f"removed the cgroup {group}" if there else None


def _clear(group: Path) -> None:
    """Kill the processes of a cgroup and remove it; raises OSError when one of them cannot be killed."""
    until = time.monotonic() + KILL_SECONDS
    while members := _members(group):
        if time.monotonic() > until:
            raise OSError(errno.EBUSY, f"cannot kill {members}")
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    for folder in sorted((path.parent for path in group.rglob("cgroup.procs")), reverse=True):
        folder.rmdir()
