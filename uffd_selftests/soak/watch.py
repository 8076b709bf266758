# SPDX-License-Identifier: GPL-2.0-only
"""What a soak does on the machine under test: short memory and swap for the cases, and a look at what they leave."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, Protocol

from uffd_selftests.harness import proc
from uffd_selftests.harness.health import KernelHealth
from uffd_selftests.machine.cgroup import MemoryGroup
from uffd_selftests.machine.repair import repair
from uffd_selftests.machine.swap import Swap
from uffd_selftests.soak.traces import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SWAP_BYTES = 1 << 30
SLACK_BYTES = {"used": 1 << 20, "kernel": 4 << 20}
"""How much more memory than after the first round may seem to be in use: the kernel counts for each CPU and adds up
later, and keeps some objects for later use."""
BACK_SECONDS = 10.0
"""How long processes and memory may take to be gone when a round is over."""


class Watch(Protocol):
    """The machine, as a soak sees it; plain data, for it may be another one."""

    def begin(self) -> None:
        """Have a group for all that runs cases, and swap; raises OSError when they cannot be had."""

    def statistics(self) -> dict[str, int]:
        """Return the group's counters."""

    def peak(self) -> int:
        """Return the most bytes that the group has had."""

    def limit(self, size: int) -> None:
        """Let the group have no more memory than so many bytes."""

    def settle(self) -> None:
        """Take what is in use now for what is to be in use after a round."""

    def left(self) -> list[str]:
        """Say what is left behind, although nothing runs."""


class Here:
    """The machine on which this process runs."""

    def __init__(self, *, join: bool = False) -> None:
        """Join: this process belongs to the group, as do all that it starts from then on."""
        self._join = join
        self._cleanup = contextlib.ExitStack()
        self._settled: dict[str, int] = {}

    def begin(self) -> None:
        """Have a group for all that runs cases, and swap; raises OSError when they cannot be had."""
        repair()
        self._cleanup.enter_context(Swap(SWAP_BYTES))
        self.group = self._cleanup.enter_context(MemoryGroup())
        self._health = self._cleanup.enter_context(contextlib.closing(KernelHealth()))
        self._before = Machine.now()
        if self._join:
            self.group.join()

    def close(self) -> None:
        """Put the machine back."""
        self._cleanup.close()

    def statistics(self) -> dict[str, int]:
        """Return the group's counters."""
        return dict(self.group.statistics())

    def peak(self) -> int:
        """Return the most bytes that the group has had."""
        return self.group.peak()

    def limit(self, size: int) -> None:
        """Let the group have no more memory than so many bytes."""
        self.group.limit(size)

    def settle(self) -> None:
        """Take what is in use now for what is to be in use after a round."""
        self._settled = self.statistics()

    def left(self) -> list[str]:
        """Say what is left behind, although nothing runs."""
        until = time.monotonic() + BACK_SECONDS
        while lines := [*self._remains(), *Machine.now().changes(self._before)]:
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        return lines + self._health.complaints()

    def _remains(self) -> Iterator[str]:
        """Say what is still in the cgroup."""
        everyone = proc.processes()
        for pid in self.group.processes():
            if pid != os.getpid():
                yield f"process {everyone.get(pid, pid)}"
        statistics = self.statistics()
        for name, what in (("used", "memory and swap that belong to no process"), ("kernel", "memory of the kernel")):
            if self._settled and (more := statistics[name] - self._settled[name]) > SLACK_BYTES[name]:
                yield f"{more >> 10} kB more {what}"
        for path in self.group.path.iterdir():
            if path.is_dir():
                yield f"cgroup {path}"


class Elsewhere:
    """The machine of a launcher that answers for it."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask

    def begin(self) -> None:
        """Have a group for all that runs cases, and swap; raises OSError when they cannot be had."""
        self._ask("soak", "begin")

    def statistics(self) -> dict[str, int]:
        """Return the group's counters."""
        return dict(self._ask("soak", "statistics"))

    def peak(self) -> int:
        """Return the most bytes that the group has had."""
        return int(self._ask("soak", "peak"))

    def limit(self, size: int) -> None:
        """Let the group have no more memory than so many bytes."""
        self._ask("soak", "limit", size)

    def settle(self) -> None:
        """Take what is in use now for what is to be in use after a round."""
        self._ask("soak", "settle")

    def left(self) -> list[str]:
        """Say what is left behind, although nothing runs."""
        return list(self._ask("soak", "left"))
