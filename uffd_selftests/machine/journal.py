# SPDX-License-Identifier: GPL-2.0-only
"""The journal of what a run changes on the machine, so that it is put back whatever ends the run.

Every change is written down before it is made: in a file of a directory that only root can enter, locked by the
process that makes the change. The kernel drops such a lock with its process, so a file whose lock is free was left by
a run that was killed: the next run undoes what the file says. The directory itself is locked while anything changes.

What there is to change, the journal does not know: each resource registers its records, which know how to undo it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator


JOURNAL_PARENTS = ("/run", "/dev/shm", "/tmp")
"""The journal's directory is made in the first of these that exists."""
JOURNAL_NAME = "uffd-selftests"
RECORD = ".json"
DRAFT = ".new"
TURN = ".turn"


class Record(Protocol):
    """What is written down of a change: a frozen dataclass of plain values; TypeError when they are of wrong types."""

    kind: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def undo(self, journal: Journal, entry: Entry) -> str | None:
        """Undo the change, what there is of it; says what was done."""


R = TypeVar("R", bound=Record)

_kinds: dict[str, type[Any]] = {}


def undoable(cls: type[R]) -> type[R]:
    """Register a kind of records: its entries are undone when their process is dead."""
    _kinds[cls.kind] = cls
    return cls


@dataclass(frozen=True)
class _Anothers:
    """Stands for a record that is not for this process to undo: its own process lives, or others know its kind."""

    kind: ClassVar[str] = ""

    def undo(self, journal: Journal, entry: Entry) -> str | None:
        """Leave it alone."""


_ANOTHERS = _Anothers()


class Change:
    """Something on the machine is different for as long as the context lasts; the journal knows what to undo."""

    _entry: Entry | None = None

    def _take_turn(self) -> None:
        """Wait until no other process changes the same, if only one may at a time."""

    def _release_turn(self) -> None:
        """Undo that."""

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Journal]:
        """Have the journal, in order, while the change is made in the block; undo what there is of it if that fails."""
        try:
            self._take_turn()
            with Journal.open() as journal:
                say(journal.repair())
                yield journal
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, *_: object) -> None:
        if self._entry:
            undo(self._entry)
        self._release_turn()


@dataclass
class Entry:
    """A record in its file, which this process has locked."""

    name: str
    record: Record | None
    fd: int
    owner: int = dataclasses.field(default_factory=os.getpid)


_own: dict[str, Entry] = {}


class Journal:
    """The journal's directory, locked against all other processes."""

    def __init__(self, directory: int) -> None:
        self.directory = directory

    @classmethod
    @contextlib.contextmanager
    def open(cls, *, create: bool = True) -> Iterator[Journal]:
        """Open the directory and wait for its lock. Raises OSError; EPERM when it is not ours alone."""
        path = next((Path(parent) / JOURNAL_NAME for parent in JOURNAL_PARENTS if os.path.isdir(parent)), None)
        if path is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), " ".join(JOURNAL_PARENTS))
        if create:
            with contextlib.suppress(FileExistsError):
                path.mkdir(0o700)
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(directory)
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise PermissionError(errno.EPERM, "not a directory of this user alone", str(path))
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield cls(directory)
        finally:
            os.close(directory)

    def open_file(self, name: str) -> int:
        """Open a file for writing, and make it when it is not there."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self.directory)

    def add(self, record: Record) -> Entry:
        """Write a new record down."""
        entry = Entry(f"{os.getpid()}-{time.monotonic_ns()}{RECORD}", record, fd=-1)
        self.update(entry, record)
        _own[entry.name] = entry
        return entry

    def update(self, entry: Entry, record: Record) -> None:
        """Write another record over the entry's, in one step."""
        draft = entry.name + DRAFT
        text = json.dumps({"boot": _boot_id(), "kind": record.kind, **dataclasses.asdict(record)})
        fd = self.open_file(draft)
        try:
            if not _lock(fd):  # a file system without locks: nobody could tell that this process lives
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), draft)
            with open(fd, "w", closefd=False) as file:
                file.write(text + "\n")
            os.rename(draft, entry.name, src_dir_fd=self.directory, dst_dir_fd=self.directory)
        except BaseException:
            os.close(fd)
            raise
        old, entry.fd, entry.record = entry.fd, fd, record
        if old >= 0:
            os.close(old)

    def remove(self, entry: Entry) -> None:
        """Forget an entry."""
        os.unlink(entry.name, dir_fd=self.directory)
        _own.pop(entry.name, None)
        os.close(entry.fd)

    def records(self, cls: type[R]) -> list[R]:
        """Return the records of one kind of all processes: of those that died, too, until they are undone."""
        found: list[Record | None] = [entry.record for entry in _own.values()]
        for name in self._names():
            fd = self.open_file(name)
            found.append(_parse(fd))
            os.close(fd)
        return [record for record in found if isinstance(record, cls)]

    def others(self) -> bool:
        """Whether another process that is alive has entries."""
        fds = [self.open_file(name) for name in self._names()]
        locked = [fd for fd in fds if not _lock(fd)]
        for fd in fds:
            os.close(fd)
        return bool(locked)

    def repair(self) -> list[str]:
        """Undo and forget the entries of dead processes; returns a line for whatever was done."""
        notices = []
        for draft in self._names(DRAFT):
            os.unlink(draft, dir_fd=self.directory)
        for name in self._names():
            fd = self.open_file(name)
            record = _parse(fd) if _lock(fd) else _ANOTHERS
            if record is _ANOTHERS:
                os.close(fd)
            else:
                notices.append(self._undo_dead(Entry(name, record, fd)))
        return [notice for notice in notices if notice]

    def _undo_dead(self, entry: Entry) -> str | None:
        notice = None
        try:
            if entry.record:
                notice = entry.record.undo(self, entry)
        except FileNotFoundError:
            pass  # nothing there any more that could be put back
        except OSError as error:
            os.close(entry.fd)
            return f"could not undo {entry.record} of an interrupted run: {error}"
        self.remove(entry)
        return notice and f"{notice} left by an interrupted run"

    def _names(self, ending: str = RECORD) -> list[str]:
        """Return the names of files that are not this process's."""
        return [name for name in os.listdir(self.directory) if name.endswith(ending) and name not in _own]


def _lock(fd: int) -> bool:
    """Lock a file unless another process has done so."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _parse(fd: int) -> Record | None:
    """Read a record; _ANOTHERS when its kind is not registered here.

    None when it says nothing, or was written before the machine was booted, which undid it all.
    """
    try:
        values = json.loads(os.pread(fd, 65536, 0))
        kind, boot = values.pop("kind"), values.pop("boot")
        if boot != _boot_id():
            return None
        if kind not in _kinds and isinstance(kind, str):
            return _ANOTHERS
        record: Record = _kinds[kind](**values)
        return record
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def undo(entry: Entry) -> None:
    """Undo an own change and forget it; says so when that is not possible. A child that a case forked does nothing."""
    if entry.owner != os.getpid() or entry.name not in _own:
        return
    try:
        with Journal.open() as journal:
            if entry.record:
                entry.record.undo(journal, entry)
            journal.remove(entry)
    except OSError as error:
        say([f"could not undo {entry.record}: {error}"])
    except BaseException:  # a second Ctrl-C must not leave the change behind
        undo(entry)
        raise


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def say(notices: list[str]) -> None:
    """Say on stderr what was undone."""
    for notice in notices:
        print(f"uffd-selftests: {notice}", file=sys.stderr)
