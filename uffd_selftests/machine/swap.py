# SPDX-License-Identifier: GPL-2.0-only
"""Swap: a disk for a while, and the turns of those who need it as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from uffd_selftests.machine.journal import TURN, Change, Journal, undoable
from uffd_selftests.machine.swapfile import make_swap, swap_off, swap_on
from uffd_selftests.machine.system import run

if TYPE_CHECKING:
    from uffd_selftests.machine.journal import Entry


ZRAM = Path("/sys/class/zram-control")
BLOCK = Path("/sys/block")
SWAPS = Path("/proc/swaps")
NO_SWAP = "no swap space: swapon a file or a zram device"
"""Why what needs swap cannot run, and the remedy."""
SWAP_SECONDS = 5.0
"""How long to wait for others who have memory in swap."""
FIRST = 32767
"""The priority of a swap disk that is used before all others (swapon(2))."""


class Swap(Change):
    """Swap for as long as the context lasts, on a compressed RAM disk of ``size`` bytes.

    There is a disk only where the machine has no swap, but an ``own`` one is there in any case, goes before all others,
    and can be switched off. It waits until no other process keeps swap as it is (keep_swap).
    Raises OSError when there is none to be had: ENOENT without zram in the kernel, EACCES or EPERM without privilege,
    EBUSY when others do not let go of swap.
    """

    def __init__(self, size: int, *, own: bool = False) -> None:
        self.size = size
        self.own = own

    def __enter__(self) -> Swap:
        if self.own or not _has_swap():
            with self._changing() as journal:
                self._entry = journal.add(_SwapRecord(self.size, _disks(), module=not ZRAM.exists()))
                self._make(journal, self._entry)
        return self

    def _take_turn(self) -> None:
        if self.own:
            _take_swap()

    def _release_turn(self) -> None:
        if self.own:
            release_swap()

    @property
    def used(self) -> int:
        """Bytes of the disk in use."""
        lines = (line.split() for line in SWAPS.read_text().splitlines()[1:])
        return sum(int(fields[3]) * 1024 for fields in lines if fields[0] == self.device)

    def off(self) -> None:
        """Switch the disk off: the kernel reads back what is on it."""
        swap_off(self.device)

    @property
    def device(self) -> str:
        """The disk's special file."""
        record = self._entry and self._entry.record
        assert isinstance(record, _SwapRecord)
        return f"/dev/zram{record.disk}"

    def _make(self, journal: Journal, entry: Entry) -> None:
        if not ZRAM.exists():
            with contextlib.suppress(OSError):
                run("modprobe", "zram", "num_devices=0")
        number = int((ZRAM / "hot_add").read_text())
        assert isinstance(entry.record, _SwapRecord)
        journal.update(entry, dataclasses.replace(entry.record, disk=number))
        (BLOCK / f"zram{number}/disksize").write_text(str(self.size))
        make_swap(f"/dev/zram{number}")
        swap_on(f"/dev/zram{number}", FIRST if self.own else None)


@dataclass
class _SwapTurn:
    """The file by which the processes of all runs agree on swap: many keep it, or one has it for itself."""

    fd: int = -1
    alone: bool = False

    def file(self) -> int:
        """Return the file's descriptor, the only one of this process: it can exchange one lock for the other."""
        if self.fd < 0:
            with Journal.open() as journal:
                self.fd = journal.open_file("swap" + TURN)
        return self.fd


_swap_turn = _SwapTurn()


def keep_swap() -> None:
    """Let no other process read back what is in swap, until release_swap(); one that is at it may finish first."""
    if not _swap_turn.alone:
        with contextlib.suppress(OSError):  # without the privilege: those who have it are another user's
            fcntl.flock(_swap_turn.file(), fcntl.LOCK_SH)


def _take_swap() -> None:
    """Wait until no other process keeps swap, and keep them from it; raises OSError."""
    until = time.monotonic() + SWAP_SECONDS
    while True:
        try:
            fcntl.flock(_swap_turn.file(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise OSError(errno.EBUSY, "other tests have memory in swap") from None
            time.sleep(0.01)
        else:
            _swap_turn.alone = True
            return


def release_swap() -> None:
    """Undo keep_swap()."""
    if _swap_turn.fd >= 0:
        fcntl.flock(_swap_turn.fd, fcntl.LOCK_UN)  # a child may have the file open, too
        os.close(_swap_turn.fd)
        _swap_turn.fd, _swap_turn.alone = -1, False


def _has_swap() -> bool:
    """Whether the machine has swap, disks apart that others have for a moment only."""
    keep_swap()
    try:
        return bool(swap_files())
    finally:
        release_swap()


def swap_files() -> list[str]:
    """Return the files and devices that the machine swaps to."""
    return [line.split()[0] for line in SWAPS.read_text().splitlines()[1:]]


def _disks() -> list[int]:
    """Return the numbers of all compressed RAM disks."""
    return sorted(int(path.name.removeprefix("zram")) for path in BLOCK.glob("zram[0-9]*"))


def _disk_size(number: int) -> int:
    return int((BLOCK / f"zram{number}/disksize").read_text())


@undoable
@dataclass(frozen=True)
class _SwapRecord:
    """A compressed RAM disk to swap to, of a size; without a number it is not there yet, or has no size."""

    kind: ClassVar[str] = "swap"
    size: int
    before: list[int]
    """The disks that were there already."""
    disk: int | None = None
    module: bool = False
    """The kernel's module was not loaded."""

    def __post_init__(self) -> None:
        if not all(isinstance(number, int) for number in (self.size, *self.before, self.disk or 0)):
            raise TypeError

    def undo(self, _journal: Journal, _entry: Entry) -> str | None:
        """Take the disk away unless someone has made another of it; says what was done."""
        disks = _disks() if self.disk is None else [self.disk]
        ours = [number for number in disks if number not in self.before and _disk_size(number) in (0, self.size)]
        for number in ours:
            device = f"/dev/zram{number}"
            if device in swap_files():
                swap_off(device)
            (ZRAM / "hot_remove").write_text(str(number))
        if self.module:
            with contextlib.suppress(OSError):
                run("modprobe", "-r", "zram")
        return f"removed {', '.join(f'zram{number}' for number in ours)}" if ours else None
