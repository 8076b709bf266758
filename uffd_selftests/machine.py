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
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, get_args

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "HugepageCounts",
    "HugepagePool",
    "MemoryGroup",
    "Swap",
    "Sysctl",
    "hugepage_sizes",
    "hugepages",
    "keep_swap",
    "lack_of_hugepages",
    "others",
    "release_swap",
    "repair",
]

HUGEPAGES = Path("/sys/kernel/mm/hugepages")
COMPACT_MEMORY = Path("/proc/sys/vm/compact_memory")
ZRAM = Path("/sys/class/zram-control")
BLOCK = Path("/sys/block")
SWAPS = Path("/proc/swaps")

JOURNAL_PARENTS = ("/run", "/dev/shm", "/tmp")
"""The journal's directory is made in the first of these that exists."""
JOURNAL_NAME = "uffd-selftests"
RECORD = ".json"
DRAFT = ".new"
TURN = ".turn"

GROUP = "uffd-selftests-{}"
"""Name of a cgroup, with the process that made it."""
EXHAUST_TRIES = 20
KILL_SECONDS = 30.0
"""How long the processes of a cgroup may take to die."""
SWAP_SECONDS = 5.0
"""How long to wait for others who have memory in swap."""
FIRST = "32767"
"""The priority of a swap disk that is used before all others (swapon(2))."""


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
        return HugepageCounts(*(_number(f"{pool}/{name}") for name in names))
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


class _Change:
    """Something on the machine is different for as long as the context lasts; the journal knows what to undo."""

    _entry: _Entry | None = None

    def _take_turn(self) -> None:
        """Wait until no other process changes the same, if only one may at a time."""

    def _release_turn(self) -> None:
        """Undo that."""

    @contextlib.contextmanager
    def _changing(self) -> Iterator[_Journal]:
        """Have the journal, in order, while the change is made in the block; undo what there is of it if that fails."""
        try:
            self._take_turn()
            with _Journal.open() as journal:
                _say(journal.repair())
                yield journal
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, *_: object) -> None:
        if self._entry:
            _undo(self._entry)
        self._release_turn()


class HugepagePool(_Change):
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


class Sysctl(_Change):
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
        with _Journal.open() as journal:
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


# ---- swap ----------------------------------------------------------------------------------------------------------


class Swap(_Change):
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
        return sum(int(fields[3]) * 1024 for fields in lines if fields[0] == self._device)

    def off(self) -> None:
        """Switch the disk off: the kernel reads back what is on it."""
        _run("swapoff", self._device)

    @property
    def _device(self) -> str:
        record = self._entry and self._entry.record
        assert isinstance(record, _SwapRecord)
        return f"/dev/zram{record.disk}"

    def _make(self, journal: _Journal, entry: _Entry) -> None:
        if not ZRAM.exists():
            with contextlib.suppress(OSError):
                _run("modprobe", "zram", "num_devices=0")
        number = int((ZRAM / "hot_add").read_text())
        assert isinstance(entry.record, _SwapRecord)
        journal.update(entry, dataclasses.replace(entry.record, disk=number))
        (BLOCK / f"zram{number}/disksize").write_text(str(self.size))
        _run("mkswap", f"/dev/zram{number}")
        _run("swapon", *(("-p", FIRST) if self.own else ()), f"/dev/zram{number}")


@dataclass
class _SwapTurn:
    """The file by which the processes of all runs agree on swap: many keep it, or one has it for itself."""

    fd: int = -1
    alone: bool = False

    def file(self) -> int:
        """Return the file's descriptor, the only one of this process: it can exchange one lock for the other."""
        if self.fd < 0:
            with _Journal.open() as journal:
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


# ---- a memory cgroup -----------------------------------------------------------------------------------------------


class MemoryGroup(_Change):
    """A memory cgroup for as long as the context lasts, of version 2 or 1, whichever has the memory on this machine.

    At its end all processes in it are killed. Raises OSError when it cannot be had.
    """

    FILES: ClassVar = {
        2: {"limit": "memory.max", "peak": "memory.peak"},
        1: {"limit": "memory.limit_in_bytes", "peak": "memory.max_usage_in_bytes"},
    }

    def __init__(self) -> None:
        self.version = 0
        self.path = Path()

    def __enter__(self) -> MemoryGroup:
        root, self.version = _memory_hierarchy()
        self.path = root / GROUP.format(os.getpid())
        control = root / "cgroup.subtree_control"
        with self._changing() as journal:
            enable = self.version == 2 and "memory" not in control.read_text().split()
            ours = enable or journal.controls(str(control))
            self._entry = journal.add(_GroupRecord(str(self.path), str(control) if ours else ""))
            if enable:
                control.write_text("+memory")
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
                self.limit(_number(self.path / "memory.usage_in_bytes"))
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
        return _number(self.path / self.FILES[self.version]["peak"])

    def statistics(self) -> dict[str, int]:
        """Return what happened in the group, and the bytes that it has now.

        ``pgfault``, ``pgmajfault`` and ``oom_kill`` are counted from its making on; ``used`` is what processes have in
        memory and swap, ``kernel`` what the kernel has for them.
        """
        stat = _numbers(self.path / "memory.stat")
        if self.version == 1:
            used = stat["total_rss"] + stat["total_shmem"] + stat.get("total_swap", 0)
            kernel = _number(self.path / "memory.kmem.usage_in_bytes")
            kills = _numbers(self.path / "memory.oom_control")
        else:
            used = stat["anon"] + stat["shmem"] + _number(self.path / "memory.swap.current")
            kernel = stat.get("kernel", 0) - stat.get("slab_reclaimable", 0)  # Linux 5.18
            kills = _numbers(self.path / "memory.events")
        total = "total_" if self.version == 1 else ""
        faults = {name: stat[total + name] for name in ("pgfault", "pgmajfault")}
        return {**faults, "oom_kill": kills.get("oom_kill", 0), "used": used, "kernel": kernel}


def _memory_hierarchy() -> tuple[Path, int]:
    """Return where the cgroups with control of memory are mounted, and their version; raises OSError."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        place, (kind, _, options) = Path(fields.split()[4]), rest.split()
        if kind == "cgroup" and "memory" in options.split(","):
            return place, 1
        with contextlib.suppress(OSError):
            if kind == "cgroup2" and "memory" in (place / "cgroup.controllers").read_text().split():
                return place, 2
    raise OSError(errno.ENOENT, "no memory cgroup: CONFIG_MEMCG, and mount -t cgroup2 none /sys/fs/cgroup")


def _number(path: Path | str) -> int:
    """Read a number; 0 from a file that this kernel lacks."""
    try:
        with open(path, "rb", buffering=0) as file:
            return int(file.readall())
    except FileNotFoundError:
        return 0


def _numbers(path: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    return {name: int(number) for name, number in (line.split() for line in path.read_text().splitlines())}


def _members(group: Path) -> list[int]:
    return [int(pid) for procs in group.rglob("cgroup.procs") for pid in procs.read_text().split()]


def _run(*command: str) -> None:
    """Run a program of the system's administrator; raises OSError, with what it complained about."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    try:
        subprocess.run(
            command, env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise OSError(errno.EIO, f"{' '.join(command)}: {error.stderr.strip()}") from None


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


def others() -> bool:
    """Whether another run that is alive has something changed on this machine now."""
    try:
        with _Journal.open(create=False) as journal:
            return journal.others()
    except OSError:
        return False


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

    def undo(self, _journal: _Journal, _entry: _Entry) -> str | None:
        """Take the disk away unless someone has made another of it; says what was done."""
        disks = _disks() if self.disk is None else [self.disk]
        ours = [number for number in disks if number not in self.before and _disk_size(number) in (0, self.size)]
        for number in ours:
            device = f"/dev/zram{number}"
            if device in swap_files():
                _run("swapoff", device)
            (ZRAM / "hot_remove").write_text(str(number))
        if self.module:
            with contextlib.suppress(OSError):
                _run("modprobe", "-r", "zram")
        return f"removed {', '.join(f'zram{number}' for number in ours)}" if ours else None


@dataclass(frozen=True)
class _GroupRecord:
    """A memory cgroup, and where memory was put under control for it, if anywhere."""

    kind: ClassVar[str] = "cgroup"
    path: str
    control: str = ""

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in (self.path, self.control)):
            raise TypeError

    def undo(self, _journal: _Journal, _entry: _Entry) -> str | None:
        """Kill what is in the group and remove it; says what was done."""
        group = Path(self.path)
        there = group.is_dir()
        if there:
            _clear(group)
        if self.control and not any(group.parent.glob(GROUP.format("*"))):
            with contextlib.suppress(OSError):  # somebody else uses it by now
                Path(self.control).write_text("-memory")
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


_Record = _PoolRecord | _SettingRecord | _SwapRecord | _GroupRecord


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

    def controls(self, path: str) -> bool:
        """Whether memory was put under control in this file for the cgroup of a running process."""
        records = [entry.record for entry in _own.values()] + self._others_records()
        return any(isinstance(record, _GroupRecord) and record.control == path for record in records)

    def _others_records(self) -> list[_Record | None]:
        records = []
        for name in self._names():
            fd = self.open_file(name)
            records.append(_parse(fd))
            os.close(fd)
        return records

    def claimed(self, size: int) -> int:
        """Return how many huge pages of size bytes the running pools want."""
        records = [entry.record for entry in _own.values()] + self._others_records()
        return sum(record.wanted for record in records if isinstance(record, _PoolRecord) and record.size == size)

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
        kind = {cls.kind: cls for cls in get_args(_Record)}[values.pop("kind")]
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
