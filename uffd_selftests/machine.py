# SPDX-License-Identifier: GPL-2.0-only
"""What a run changes on the machine, and how that is put back, whatever ends the run.

Every change is written down before it is made: in a file of a directory that only root can enter, locked by the
process that makes the change. The kernel drops such a lock with its process, so a file whose lock is free was left by
a run that was killed: the next run undoes what the file says. The directory itself is locked while anything changes.
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
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HugepageCounts", "HugepagePool", "Sysctl", "hugepage_sizes", "hugepages", "lack_of_hugepages", "repair"]

HUGEPAGES = Path("/sys/kernel/mm/hugepages")
COMPACT_MEMORY = Path("/proc/sys/vm/compact_memory")

JOURNAL_PARENTS = ("/run", "/dev/shm", "/tmp")
"""The journal's directory is made in the first of these that exists."""
JOURNAL_NAME = "uffd-selftests"
RECORD = ".json"
DRAFT = ".new"
TURN = ".turn"


# ---- huge pages ----------------------------------------------------------------------------------------------------


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
        return HugepageCounts(*(int((pool / name).read_text()) for name in names))
    except OSError:
        return HugepageCounts(0, 0, 0, 0)


def lack_of_hugepages(size: int, wanted: int, *, claimed: int = 0, why: str = "") -> str | None:
    """Return the reason why a new mapping cannot have this many huge pages of size bytes, None when it can.

    claimed pages are free but spoken for; why says what kept the pool from growing.
    """
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


class HugepagePool:
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
        self._entry: _Entry | None = None

    def __enter__(self) -> HugepagePool:
        claimed, why = 0, ""
        if self.wanted and self.size in hugepage_sizes():
            try:
                with _Journal.open() as journal:
                    _say(journal.repair())
                    claimed = journal.claimed(self.size)
                    self._entry = journal.add(_PoolRecord(self.size, self.wanted, added=0))
                    self._grow(journal, self._entry, claimed)
            except OSError as error:
                why = _errno_name(error)
            except BaseException:  # Ctrl-C
                self.__exit__(None, None, None)
                raise
        self.shortage = lack_of_hugepages(self.size, self.wanted, claimed=claimed, why=why)
        return self

    def __exit__(self, *_: object) -> None:
        if self._entry:
            _undo(self._entry)

    def _grow(self, journal: _Journal, entry: _Entry, claimed: int) -> None:
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


def _memory_to_spare() -> int:
    """Return half of the available memory in bytes: huge pages must not starve the rest of the machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // 2
    return sys.maxsize


# ---- settings ------------------------------------------------------------------------------------------------------


class Sysctl:
    """A setting under /proc/sys or /sys has another value for as long as the context lasts.

    The old value is put back if the setting still has ours. Processes that change the same setting take turns.
    Raises OSError when the setting is not there (ENOENT) or must not be changed (EACCES, EPERM, EROFS).
    """

    def __init__(self, path: str | Path, value: object) -> None:
        self.path = Path(path)
        self.value = str(value)
        self._entry: _Entry | None = None
        self._turn = -1

    def __enter__(self) -> Sysctl:
        try:
            with _Journal.open() as journal:
                self._turn = journal.open_file(str(self.path).strip("/").replace("/", "-") + TURN)
            fcntl.lockf(self._turn, fcntl.LOCK_EX)
            with _Journal.open() as journal:
                _say(journal.repair())
                self._entry = journal.add(_SettingRecord(str(self.path), _setting(self.path), self.value))
                self.path.write_text(self.value)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._entry:
            _undo(self._entry)
        if self._turn >= 0:
            os.close(self._turn)
            self._turn = -1


def _setting(path: Path) -> str:
    """Return the value of a setting, the one in brackets where all are listed: ``always [madvise] never``."""
    text = path.read_text()
    return text.partition("[")[2].partition("]")[0] or " ".join(text.split())


# ---- the journal ---------------------------------------------------------------------------------------------------


def repair() -> list[str]:
    """Undo what killed runs left changed, say so on stderr and return what was said.

    Does nothing without the privilege to do it.
    """
    try:
        with _Journal.open(create=False) as journal:
            notices = journal.repair()
    except OSError:
        return []
    _say(notices)
    return notices


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

    def undo(self, journal: _Journal, entry: _Entry) -> str | None:
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

    def undo(self, _journal: _Journal, _entry: _Entry) -> str | None:
        """Put the old value back unless someone has changed ours; says what was done."""
        path = Path(self.path)
        if self.old == self.new or _setting(path) != self.new:
            return None
        path.write_text(self.old)
        return f"restored {self.path} to {self.old}"


_Record = _PoolRecord | _SettingRecord


@dataclass
class _Entry:
    """A record in its file, which this process has locked."""

    name: str
    record: _Record | None
    fd: int
    owner: int = dataclasses.field(default_factory=os.getpid)


_own: dict[str, _Entry] = {}
# A process loses its lock of a file when it closes any descriptor of that file, so its own files are never reopened.


class _Journal:
    """The journal's directory, locked against all other processes."""

    def __init__(self, directory: int) -> None:
        self.directory = directory

    @classmethod
    @contextlib.contextmanager
    def open(cls, *, create: bool = True) -> Iterator[_Journal]:
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

    def add(self, record: _Record) -> _Entry:
        """Write a new record down."""
        entry = _Entry(f"{os.getpid()}-{time.monotonic_ns()}{RECORD}", record, fd=-1)
        self.update(entry, record)
        _own[entry.name] = entry
        return entry

    def update(self, entry: _Entry, record: _Record) -> None:
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

    def remove(self, entry: _Entry) -> None:
        """Forget an entry."""
        os.unlink(entry.name, dir_fd=self.directory)
        _own.pop(entry.name, None)
        os.close(entry.fd)

    def claimed(self, size: int) -> int:
        """Return how many huge pages of size bytes the running pools want."""
        records = [entry.record for entry in _own.values()]
        for name in self._names():
            fd = self.open_file(name)
            records.append(_parse(fd))
            os.close(fd)
        return sum(record.wanted for record in records if isinstance(record, _PoolRecord) and record.size == size)

    def repair(self) -> list[str]:
        """Undo and forget the entries of dead processes; returns a line for whatever was done."""
        notices = []
        for draft in self._names(DRAFT):
            os.unlink(draft, dir_fd=self.directory)
        for name in self._names():
            fd = self.open_file(name)
            if _lock(fd):
                notices.append(self._undo_dead(_Entry(name, _parse(fd), fd)))
            else:
                os.close(fd)
        return [notice for notice in notices if notice]

    def _undo_dead(self, entry: _Entry) -> str | None:
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


def _parse(fd: int) -> _Record | None:
    """Read a record; None when it says nothing, or was written before the machine was booted, which undid it all."""
    try:
        values = json.loads(os.pread(fd, 65536, 0))
        kind = {cls.kind: cls for cls in (_PoolRecord, _SettingRecord)}[values.pop("kind")]
        return kind(**values) if values.pop("boot") == _boot_id() else None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _undo(entry: _Entry) -> None:
    """Undo an own change and forget it; says so when that is not possible. A child that a case forked does nothing."""
    if entry.owner != os.getpid() or entry.name not in _own:
        return
    try:
        with _Journal.open() as journal:
            if entry.record:
                entry.record.undo(journal, entry)
            journal.remove(entry)
    except OSError as error:
        _say([f"could not undo {entry.record}: {error}"])
    except BaseException:  # a second Ctrl-C must not leave the change behind
        _undo(entry)
        raise


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _errno_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def _say(notices: list[str]) -> None:
    for notice in notices:
        print(f"uffd-selftests: {notice}", file=sys.stderr)
