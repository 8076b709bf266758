# SPDX-License-Identifier: GPL-2.0-only
"""Settings under /proc/sys and /sys."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from uffd_selftests.machine.journal import TURN, Change, Journal, undoable

if TYPE_CHECKING:
    from uffd_selftests.machine.journal import Entry


class Sysctl(Change):
    """A setting under /proc/sys or /sys has another value for as long as the context lasts.

    The old value is put back if the setting still has ours. Processes that change the same setting take turns.
    Raises OSError when the setting is not there (ENOENT) or must not be changed (EACCES, EPERM, EROFS).
    """

    def __init__(self, path: str | Path, value: object) -> None:
        self.path = Path(path)
        self.value = str(value)
        self._turn = -1

    def __enter__(self) -> Sysctl:
        with self._changing() as journal:
            self._entry = journal.add(_SettingRecord(str(self.path), _setting(self.path), self.value))
            self.path.write_text(self.value)
        return self

    def _take_turn(self) -> None:
        with Journal.open() as journal:
            self._turn = journal.open_file(str(self.path).strip("/").replace("/", "-") + TURN)
        fcntl.lockf(self._turn, fcntl.LOCK_EX)

    def _release_turn(self) -> None:
        if self._turn >= 0:
            os.close(self._turn)
            self._turn = -1


def _setting(path: Path) -> str:
    """Return the value of a setting, the one in brackets where all are listed: ``always [madvise] never``."""
    text = path.read_text()
    return text.partition("[")[2].partition("]")[0] or " ".join(text.split())


@undoable
@dataclass(frozen=True)
class _SettingRecord:
    """A setting with its old value and the new one."""

    kind: ClassVar[str] = "setting"
    path: str
    old: str
    new: str

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in (self.path, self.old, self.new)):
            raise TypeError

    def undo(self, _journal: Journal, _entry: Entry) -> str | None:
        """Put the old value back unless someone has changed ours; says what was done."""
        path = Path(self.path)
        if self.old == self.new or _setting(path) != self.new:
            return None
        path.write_text(self.old)
        return f"restored {self.path} to {self.old}"
