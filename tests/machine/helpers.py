# SPDX-License-Identifier: GPL-2.0-only
"""A machine of plain files, and children that are killed while they change it."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uffd_selftests.machine.hugepages import HugepagePool
from uffd_selftests.machine.journal import TURN

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 2 << 20
NOTICE = "restored {} huge pages of 2048 kB left by an interrupted run"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes the machine: run as root")


class Pool:
    """A huge page pool of plain files: what is written to nr_hugepages is granted, and free as long as nobody says."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / f"hugepages-{SIZE // 1024}kB"
        self.directory.mkdir(parents=True)
        for name in ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages"):
            self[name] = 0

    def __getitem__(self, name: str) -> int:
        return int((self.directory / name).read_text())

    def __setitem__(self, name: str, count: int) -> None:
        (self.directory / name).write_text(str(count))

    @property
    def size(self) -> int:
        """nr_hugepages, in pages."""
        return self["nr_hugepages"]

    @size.setter
    def size(self, pages: int) -> None:
        self["nr_hugepages"] = pages


class Child:
    """A forked process that runs a function; ends with status 0, or 1 when an exception escaped."""

    def __init__(self, function: Callable[[Child], object]) -> None:
        self._ready, self._tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            with suppress(BaseException):
                function(self)
                status = 0
            os._exit(status)
        os.close(self._tell)

    def hold(self) -> None:
        """In the child: say that the time has come, then wait for a signal."""
        os.write(self._tell, b"!")
        signal.pause()

    def wait_until_it_holds(self) -> None:
        """In the parent."""
        assert os.read(self._ready, 1) == b"!"

    def end(self, signo: int | None = None) -> int:
        """Kill it, if a signal is given, and return its exit code (-N when signal N killed it)."""
        if signo:
            os.kill(self.pid, signo)
        os.close(self._ready)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def in_pool(wanted: int) -> Child:
    """Return a process that is inside of a pool."""

    def hold(child: Child) -> None:
        with HugepagePool(SIZE, wanted):
            child.hold()

    child = Child(hold)
    child.wait_until_it_holds()
    return child


def records(journal: Path) -> list[str]:
    """Return the names of the records in the journal."""
    return [path.name for path in journal.iterdir() if path.suffix != TURN]


def leave_record(journal: Path, **values: object) -> Path:
    """Write what a killed run would have left in the journal."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    journal.mkdir(0o700, exist_ok=True)
    path = journal / "1-1.json"
    path.write_text(json.dumps({"boot": boot, "kind": "hugepages", "size": SIZE, "wanted": 9, **values}))
    return path
