# SPDX-License-Identifier: GPL-2.0-only
"""Huge pages and settings are put back, whatever ends the process that changed them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uffd_selftests import machine
from uffd_selftests.machine import (
    HugepagePool,
    MemoryGroup,
    Swap,
    Sysctl,
    hugepage_sizes,
    hugepages,
    keep_swap,
    lack_of_hugepages,
    repair,
    swap_files,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the journal in a folder of the test's own, and return that."""
    monkeypatch.setattr(machine, "JOURNAL_PARENTS", ("/nowhere", str(tmp_path)))
    return tmp_path / machine.JOURNAL_NAME


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: Path) -> Pool:
    """Replace the machine's huge pages by an empty pool of plain files."""
    assert not journal.exists()
    monkeypatch.setattr(machine, "HUGEPAGES", tmp_path / "hugepages")
    monkeypatch.setattr(machine, "COMPACT_MEMORY", tmp_path / "compact_memory")
    return Pool(tmp_path / "hugepages")


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
    return [path.name for path in journal.iterdir() if path.suffix != machine.TURN]


def leave_record(journal: Path, **values: object) -> Path:
    """Write what a killed run would have left in the journal."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    journal.mkdir(0o700, exist_ok=True)
    path = journal / "1-1.json"
    path.write_text(json.dumps({"boot": boot, "kind": "hugepages", "size": SIZE, "wanted": 9, **values}))
    return path


# ---- a pool --------------------------------------------------------------------------------------------------------


def test_pool_adds_what_is_missing(pool: Pool, journal: Path) -> None:
    """Reserved pages do not count as free; the old size is back at the end, and the journal is empty."""
    pool.size, pool["free_hugepages"], pool["resv_hugepages"] = 20, 10, 4
    with HugepagePool(SIZE, 9) as taken:
        assert (pool.size, taken.added) == (23, 3)
        assert len(records(journal)) == 1
    assert pool.size == 20
    assert records(journal) == []


def test_pool_that_has_enough(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is changed and nothing is said."""
    pool.size = pool["free_hugepages"] = 10
    with HugepagePool(SIZE, 10) as taken:
        assert (pool.size, taken.added, taken.shortage) == (10, 0, None)
    assert pool.size == 10
    assert capsys.readouterr().err == ""


def test_pool_with_surplus_pages(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Surplus pages become persistent before the kernel allocates any; given back in use, they are surplus again."""
    asked = []

    def resize(_size: int, pages: int) -> None:
        asked.append(pages)
        pool.size, pool["surplus_hugepages"] = max(5, pages), max(0, 5 - pages)

    monkeypatch.setattr(machine, "_resize", resize)
    pool.size, pool["surplus_hugepages"] = 5, 5
    with HugepagePool(SIZE, 3):
        pass
    assert asked == [8, 0]


def test_pools_add_up(pool: Pool) -> None:
    """What another pool wants is not free for this one; each takes away its own share, in whatever order."""
    pool.size = pool["free_hugepages"] = 4
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(HugepagePool(SIZE, 10))
        assert pool.size == 10
        pool["free_hugepages"] = 10
        second.enter_context(HugepagePool(SIZE, 3))
        assert pool.size == 13
        first.close()
        assert pool.size == 7
    assert pool.size == 4


def test_pools_of_two_processes_add_up(pool: Pool) -> None:
    """The same between processes."""
    pool.size = 4
    other = in_pool(10)
    assert pool.size == 14
    pool["free_hugepages"] = 10
    with HugepagePool(SIZE, 3):
        assert pool.size == 17
        assert other.end(signal.SIGKILL) == -signal.SIGKILL
        repair()
        assert pool.size == 7
    assert pool.size == 4


def test_pool_keeps_a_strangers_change(pool: Pool) -> None:
    """Somebody else's change while the pool is held stays."""
    with HugepagePool(SIZE, 10):
        pool.size += 5
    assert pool.size == 5


def test_pool_that_somebody_emptied(pool: Pool) -> None:
    """There is no going below nothing."""
    with HugepagePool(SIZE, 10):
        pool.size = 3
    assert pool.size == 0


def test_pool_not_granted(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is compacted once, what was granted is used and given back, and the shortage says how to get more."""

    def grant_six(_size: int, pages: int) -> None:
        pool.size = pool["free_hugepages"] = min(pages, 6)

    monkeypatch.setattr(machine, "_resize", grant_six)
    with HugepagePool(SIZE, 10) as taken:
        assert pool.size == taken.added == 6
        assert taken.shortage == (
            f"needs 10 free huge pages of 2048 kB, 6 free: "
            f"{'as root, ' if os.geteuid() else ''}echo 10 > {pool.directory}/nr_hugepages"
        )
        assert machine.COMPACT_MEMORY.read_text() == "1"
    assert pool.size == 0


def test_pool_not_permitted(pool: Pool, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the privilege there is no error but a shortage."""

    def refuse(_size: int, _pages: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(machine, "_resize", refuse)
    with HugepagePool(SIZE, 10) as taken:
        assert taken.shortage
        assert taken.shortage.startswith("needs 10 free huge pages of 2048 kB, 0 free (EROFS): ")
    assert pool.size == 0
    assert records(journal) == []


def test_pool_spares_memory(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most half of the available memory becomes huge pages."""
    monkeypatch.setattr(machine, "_memory_to_spare", lambda: 4 * SIZE + 1)
    with HugepagePool(SIZE, 10) as taken:
        assert pool.size == 4
        assert taken.shortage
    assert pool.size == 0


@pytest.mark.usefixtures("pool")
def test_pool_of_a_size_there_is_not(journal: Path) -> None:
    """A kernel without such huge pages is a shortage as well."""
    with HugepagePool(4 * SIZE, 2) as taken:
        assert taken.shortage
    assert not journal.exists()


def test_no_hugetlb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without CONFIG_HUGETLBFS has no sizes, and no pages of any size."""
    monkeypatch.setattr(machine, "HUGEPAGES", tmp_path / "missing")
    assert hugepage_sizes() == ()
    assert hugepages(SIZE) == machine.HugepageCounts(0, 0, 0, 0)
    assert lack_of_hugepages(SIZE, 1)
    assert lack_of_hugepages(SIZE, 0) is None


# ---- ends that are no ends -----------------------------------------------------------------------------------------


def test_killed_run_is_repaired(pool: Pool, journal: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """After SIGKILL of a run the next one takes the pages away and says so, once."""
    pool.size = 3
    child = in_pool(10)
    assert pool.size == 13
    assert child.end(signal.SIGKILL) == -signal.SIGKILL
    assert pool.size == 13
    assert repair() == [NOTICE.format(10)]
    assert pool.size == 3
    assert records(journal) == []
    assert repair() == []
    assert capfd.readouterr().err == f"uffd-selftests: {NOTICE.format(10)}\n"


def test_next_pool_repairs(pool: Pool) -> None:
    """A pool that is set up repairs first, and takes nothing left over for its own."""
    in_pool(10).end(signal.SIGKILL)
    assert pool.size == 10
    with HugepagePool(SIZE, 4):
        assert pool.size == 4
    assert pool.size == 0


def test_living_run_is_left_alone(pool: Pool) -> None:
    """What a living process has written down is its own business."""
    child = in_pool(10)
    assert repair() == []
    assert pool.size == 10
    child.end(signal.SIGKILL)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["growing", "giving back"])
def test_killed_while_resizing(pool: Pool, monkeypatch: pytest.MonkeyPatch, step: str, when: str) -> None:
    """A run killed just before or just after it wrote nr_hugepages is repaired, down to the page."""
    pool.size = 7
    resize = machine._resize

    def resize_and_die(size: int, pages: int) -> None:
        dying = (step == "growing") == (pages > pool.size)
        if not dying or when == "after":
            resize(size, pages)
        if dying:
            os.kill(os.getpid(), signal.SIGKILL)

    def run(_: Child) -> None:
        monkeypatch.setattr(machine, "_resize", resize_and_die)
        with HugepagePool(SIZE, 10):
            pass

    assert Child(run).end() == -signal.SIGKILL
    repair()
    assert pool.size == 7


@pytest.mark.parametrize(("found", "left"), [(10, 10), (25, 10), (40, 10), (45, 15), (8, 8)])
def test_killed_while_growing(pool: Pool, journal: Path, found: int, left: int) -> None:
    """Of a growth from 10 to 40 pages that was cut short, exactly what was added is taken away."""
    leave_record(journal, added=None, low=10, high=40)
    pool.size = found
    repair()
    assert pool.size == left
    assert records(journal) == []


def test_repair_survives_its_own_death(pool: Pool, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair that was killed is finished by the next one; nothing is taken away twice."""
    leave_record(journal, added=5)
    pool.size = 12
    resize = machine._resize

    def resize_and_die(size: int, pages: int) -> None:
        resize(size, pages)
        os.kill(os.getpid(), signal.SIGKILL)

    def run(_: Child) -> None:
        monkeypatch.setattr(machine, "_resize", resize_and_die)
        repair()

    assert Child(run).end() == -signal.SIGKILL
    assert (pool.size, len(records(journal))) == (7, 1)
    assert repair() == []
    assert (pool.size, records(journal)) == (7, [])


@pytest.mark.parametrize("step", ["growing", "giving back"])
def test_interrupt_while_resizing(pool: Pool, journal: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Ctrl-C in the middle of a change still puts everything back."""
    pool.size = 7
    resize = machine._resize
    interrupted: list[bool] = []

    def interrupt(size: int, pages: int) -> None:
        now = (step == "growing") == (pages > pool.size)
        resize(size, pages)
        if now and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(machine, "_resize", interrupt)
    with pytest.raises(KeyboardInterrupt), HugepagePool(SIZE, 10):
        pass
    assert (pool.size, records(journal)) == (7, [])


def test_forked_child_gives_nothing_back(pool: Pool) -> None:
    """A case's child that leaves the context changes nothing."""
    with HugepagePool(SIZE, 10) as taken:
        assert Child(lambda _: taken.__exit__()).end() == 0
        assert pool.size == 10
    assert pool.size == 0


# ---- the journal ---------------------------------------------------------------------------------------------------


def test_record_of_an_earlier_boot(pool: Pool, journal: Path) -> None:
    """The boot has undone it: the record goes, the pages stay."""
    leave_record(journal, added=5, boot="an earlier one")
    pool.size = 10
    assert repair() == []
    assert (pool.size, records(journal)) == (10, [])


@pytest.mark.parametrize(
    "text",
    ["", "\0\0\0", "\xff", "[]", "{}", '{"kind": "tea"}', '{"kind": ["tea"]}', '{"kind": "hugepages", "pages": 3}'],
)
def test_record_without_sense(pool: Pool, journal: Path, text: str) -> None:
    """What cannot be read is cleared away; nothing is changed for it."""
    leave_record(journal).write_text(text, encoding="latin-1")
    pool.size = 10
    assert repair() == []
    assert (pool.size, records(journal)) == (10, [])


@pytest.mark.parametrize("wrong", [{"added": "5"}, {"added": 5, "size": None}, {"low": [], "high": 7}])
def test_record_of_wrong_types(pool: Pool, journal: Path, wrong: dict[str, object]) -> None:
    """The same for numbers that are none."""
    leave_record(journal, **wrong)
    pool.size = 10
    assert repair() == []
    assert (pool.size, records(journal)) == (10, [])


def test_draft_is_cleared_away(pool: Pool, journal: Path) -> None:
    """A run killed while it wrote a record leaves a draft; it had changed nothing yet."""
    leave_record(journal).rename(journal / ("1-1.json" + machine.DRAFT))
    pool.size = 10
    repair()
    assert (pool.size, records(journal)) == (10, [])


def test_repair_without_journal(journal: Path) -> None:
    """A machine on which nothing was ever changed stays as it is."""
    assert repair() == []
    assert not journal.exists()


def test_repair_that_fails(pool: Pool, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair that is refused says so and leaves the record for a run that may."""
    leave_record(journal, added=5)
    pool.size = 10

    def refuse(_size: int, _pages: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(machine, "_resize", refuse)
        (notice,) = repair()
    assert "Read-only file system" in notice
    assert repair() == [NOTICE.format(5)]
    assert pool.size == 5


@pytest.mark.parametrize("trap", ["symlink", "file", "open to others"])
def test_journal_that_is_not_ours(pool: Pool, journal: Path, tmp_path: Path, trap: str) -> None:
    """A folder that somebody may have laid out for us is not used, and nothing is changed."""
    if trap == "symlink":
        (tmp_path / "elsewhere").mkdir(0o700)
        journal.symlink_to(tmp_path / "elsewhere")
    elif trap == "file":
        journal.touch(0o600)
    else:
        journal.mkdir()
        journal.chmod(0o777)
    with HugepagePool(SIZE, 10) as taken:
        assert taken.shortage
    assert pool.size == 0
    assert repair() == []


@needs_root
def test_journal_of_somebody_else(pool: Pool, journal: Path) -> None:
    """Nor is one that another user owns."""
    journal.mkdir(0o700)
    os.chown(journal, 65534, 65534)
    with HugepagePool(SIZE, 10) as taken:
        assert taken.shortage
        assert "(EPERM)" in taken.shortage
    assert pool.size == 0


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.fixture
def setting(tmp_path: Path, journal: Path) -> Path:
    """Return a setting that is 0."""
    assert not journal.exists()
    path = tmp_path / "setting"
    path.write_text("0\n")
    return path


def test_setting_is_put_back(setting: Path, journal: Path) -> None:
    """It has the new value inside, the old one after."""
    with Sysctl(setting, 1):
        assert setting.read_text() == "1"
    assert setting.read_text() == "0"
    assert records(journal) == []


def test_setting_among_its_choices(setting: Path) -> None:
    """Settings that list their values mark the one in force with brackets."""
    setting.write_text("always [madvise] never\n")
    with Sysctl(setting, "never"):
        pass
    assert setting.read_text() == "madvise"


def test_setting_that_somebody_changed(setting: Path) -> None:
    """Somebody else's value stays."""
    with Sysctl(setting, 1):
        setting.write_text("2\n")
    assert setting.read_text() == "2\n"


def test_setting_of_a_killed_run(setting: Path) -> None:
    """The next run puts it back."""

    def hold(child: Child) -> None:
        with Sysctl(setting, 1):
            child.hold()

    child = Child(hold)
    child.wait_until_it_holds()
    child.end(signal.SIGKILL)
    assert setting.read_text() == "1"
    assert repair() == [f"restored {setting} to 0 left by an interrupted run"]
    assert setting.read_text() == "0"


def test_settings_take_turns(setting: Path) -> None:
    """Whoever wants to change what another process has changed waits, and finds the old value."""

    def change(_: Child) -> None:
        with Sysctl(setting, 2) as mine:
            assert mine._entry
            assert mine._entry.record == machine._SettingRecord(str(setting), "0", "2")

    with Sysctl(setting, 1):
        child = Child(change)
        assert setting.read_text() == "1"
    assert child.end() == 0
    assert setting.read_text() == "0"


def test_setting_that_is_not_there(tmp_path: Path, journal: Path) -> None:
    """ENOENT, and no record."""
    with pytest.raises(FileNotFoundError), Sysctl(tmp_path / "missing", 1):
        pass
    assert records(journal) == []


def test_setting_of_a_killed_run_that_is_gone(setting: Path, journal: Path) -> None:
    """A setting that went away with its module needs no repair."""
    leave_record(journal).unlink()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    record = {"boot": boot, "kind": "setting", "path": f"{setting}.gone", "old": "0", "new": "1"}
    (journal / "1-2.json").write_text(json.dumps(record))
    assert repair() == []
    assert records(journal) == []


# ---- the real machine ----------------------------------------------------------------------------------------------


@pytest.fixture
def _alone() -> Iterator[None]:
    """Wait for other tests of the real pools on this machine."""
    try:
        directory = os.open(machine.HUGEPAGES, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        pytest.skip(f"no huge pages: {error}")
    fcntl.flock(directory, fcntl.LOCK_EX)
    yield
    os.close(directory)


@needs_root
@pytest.mark.usefixtures("_alone")
def test_real_pool_and_sigkill() -> None:
    """The kernel's own counts: pages are added, survive SIGKILL of the run, and go with the repair."""
    # Other runs use the default size: take the largest one that the machine has memory for.
    size = max((size for size in hugepage_sizes() if 2 * size < machine._memory_to_spare()), default=0)
    if not size:
        pytest.skip("no memory for huge pages")
    wanted = hugepages(size).available + 1

    def hold(child: Child) -> None:
        with HugepagePool(size, wanted) as taken:
            os._exit(3) if taken.shortage else child.hold()

    before = hugepages(size).persistent
    child = Child(hold)
    if not os.read(child._ready, 1):
        assert child.end() == 3
        pytest.skip(f"no memory for a huge page of {size // 1024} kB")
    assert hugepages(size).persistent > before
    assert child.end(signal.SIGKILL) == -signal.SIGKILL
    repair()
    assert hugepages(size).persistent == before


@needs_root
@pytest.mark.usefixtures("_alone")
def test_real_pool_without_privilege() -> None:
    """An ordinary user gets a shortage that says what root would do."""
    size = max(hugepage_sizes())

    def run(_: Child) -> None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        with HugepagePool(size, hugepages(size).total + 1) as taken:
            assert taken.shortage
            assert "as root, echo" in taken.shortage
        assert repair() == []

    before = hugepages(size).persistent
    assert Child(run).end() == 0
    assert hugepages(size).persistent == before


# ---- swap and cgroups, for real -------------------------------------------------------------------------------------


@needs_root
@pytest.mark.usefixtures("journal")
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("step", ["hot_add", "mkswap", "swapon", "held"])
def test_killed_run_leaves_no_swap(monkeypatch: pytest.MonkeyPatch, step: str, own: bool) -> None:
    """At whatever step a run is killed that makes swap, the next one takes the disk away."""
    if swap_files() or not machine.ZRAM.exists():
        pytest.skip("needs a machine without swap, and zram")
    disks = machine._disks()

    def die(*command: str) -> None:
        if command[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        run(*command)

    def hold(child: Child) -> None:
        monkeypatch.setattr(machine, "_run", die)
        if step == "hot_add":
            monkeypatch.setattr(machine._Journal, "update", update)
        with Swap(1 << 20, own=own):
            child.hold()

    def update(journal: machine._Journal, entry: machine._Entry, record: machine._SwapRecord) -> None:
        if record.disk is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        write(journal, entry, record)

    run, write = machine._run, machine._Journal.update
    child = Child(hold)
    if step == "held":
        child.wait_until_it_holds()
        assert swap_files()
    assert child.end(signal.SIGKILL if step == "held" else None) == -signal.SIGKILL
    assert machine._disks() != disks
    assert len(repair()) == 1
    assert (machine._disks(), swap_files()) == (disks, [])


@needs_root
@pytest.mark.usefixtures("journal")
def test_own_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """An own swap disk is used before the machine's and switched off alone; it waits for those who keep swap."""
    if not machine.ZRAM.exists():
        pytest.skip("needs zram")

    def keep(child: Child) -> None:
        monkeypatch.setattr(machine, "_swap_turn", machine._SwapTurn())  # it is not the one that has swap for itself
        keep_swap()
        child.hold()

    monkeypatch.setattr(machine, "_swap_turn", machine._SwapTurn())
    monkeypatch.setattr(machine, "SWAP_SECONDS", 0.1)
    before = swap_files()
    with Swap(1 << 20):
        others = swap_files()
        with Swap(1 << 20, own=True) as swap:
            [own] = set(swap_files()) - set(others)
            lines = [line.split() for line in machine.SWAPS.read_text().splitlines()[1:]]
            assert max(lines, key=lambda line: int(line[-1]))[0] == own
            keep_swap()  # by the same process, which goes on to have it for itself
            child = Child(keep)
            assert not select.select([child._ready], [], [], 0.1)[0]
            swap.off()
            assert swap_files() == others
        child.wait_until_it_holds()
        with pytest.raises(OSError, match="other tests have memory in swap"), Swap(1 << 20, own=True):
            pass
        assert swap_files() == others
        child.end(signal.SIGKILL)
    assert swap_files() == before


@needs_root
@pytest.mark.usefixtures("journal")
def test_killed_run_leaves_no_group() -> None:
    """The next run kills what is in the cgroup of a run that was killed, and in those below it, and removes them."""
    paths = []

    def hold(child: Child) -> None:
        with MemoryGroup() as group:
            (group.path / "below").mkdir()
            os.spawnvp(os.P_NOWAIT, "/bin/sh", group.command("sleep", "1000"))
            while len(group.processes()) != 1:
                pass
            (group.path / "below/cgroup.procs").write_text(str(group.processes()[0]))
            child.hold()

    try:
        with MemoryGroup() as group:
            paths.append(group.path.parent)
    except OSError as error:
        pytest.skip(str(error))
    child = Child(hold)
    child.wait_until_it_holds()
    path = paths[0] / f"uffd-selftests-{child.pid}"
    assert len(machine._members(path)) == 1
    child.end(signal.SIGKILL)
    assert repair() == [f"removed the cgroup {path} left by an interrupted run"]
    assert not path.exists()
