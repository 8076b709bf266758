# SPDX-License-Identifier: GPL-2.0-only
"""Pools of huge pages have what is wanted while they last, and are put back down to the page, whatever ends a run."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.machine.helpers import SIZE, Child, Pool, in_pool, leave_record, needs_root, records
from uffd_selftests.machine import hugepages as hugepages_module
from uffd_selftests.machine.hugepages import HugepageCounts, HugepagePool, hugepage_sizes, hugepages, lack_of_hugepages
from uffd_selftests.machine.repair import repair

if TYPE_CHECKING:
    from collections.abc import Iterator


# ---- a pool ---------------------------------------------------------------------------------------------------------


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

    monkeypatch.setattr(hugepages_module, "_resize", resize)
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

    monkeypatch.setattr(hugepages_module, "_resize", grant_six)
    with HugepagePool(SIZE, 10) as taken:
        assert pool.size == taken.added == 6
        assert taken.shortage == (
            f"needs 10 free huge pages of 2048 kB, 6 free: "
            f"{'as root, ' if os.geteuid() else ''}echo 10 > {pool.directory}/nr_hugepages"
        )
        assert hugepages_module.COMPACT_MEMORY.read_text() == "1"
    assert pool.size == 0


def test_pool_not_permitted(pool: Pool, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the privilege there is no error but a shortage."""

    def refuse(_size: int, _pages: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(hugepages_module, "_resize", refuse)
    with HugepagePool(SIZE, 10) as taken:
        assert taken.shortage
        assert taken.shortage.startswith("needs 10 free huge pages of 2048 kB, 0 free (EROFS): ")
    assert pool.size == 0
    assert records(journal) == []


def test_pool_spares_memory(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most half of the available memory becomes huge pages."""
    monkeypatch.setattr(hugepages_module, "_memory_to_spare", lambda: 4 * SIZE + 1)
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
    monkeypatch.setattr(hugepages_module, "HUGEPAGES", tmp_path / "missing")
    assert hugepage_sizes() == ()
    assert hugepages(SIZE) == HugepageCounts(0, 0, 0, 0)
    assert lack_of_hugepages(SIZE, 1)
    assert lack_of_hugepages(SIZE, 0) is None


# ---- ends that are no ends ------------------------------------------------------------------------------------------


def test_next_pool_repairs(pool: Pool) -> None:
    """A pool that is set up repairs first, and takes nothing left over for its own."""
    in_pool(10).end(signal.SIGKILL)
    assert pool.size == 10
    with HugepagePool(SIZE, 4):
        assert pool.size == 4
    assert pool.size == 0


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["growing", "giving back"])
def test_killed_while_resizing(pool: Pool, monkeypatch: pytest.MonkeyPatch, step: str, when: str) -> None:
    """A run killed just before or just after it wrote nr_hugepages is repaired, down to the page."""
    pool.size = 7
    resize = hugepages_module._resize

    def resize_and_die(size: int, pages: int) -> None:
        dying = (step == "growing") == (pages > pool.size)
        if not dying or when == "after":
            resize(size, pages)
        if dying:
            os.kill(os.getpid(), signal.SIGKILL)

    def run(_: Child) -> None:
        monkeypatch.setattr(hugepages_module, "_resize", resize_and_die)
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


@pytest.mark.parametrize("step", ["growing", "giving back"])
def test_interrupt_while_resizing(pool: Pool, journal: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Ctrl-C in the middle of a change still puts everything back."""
    pool.size = 7
    resize = hugepages_module._resize
    interrupted: list[bool] = []

    def interrupt(size: int, pages: int) -> None:
        now = (step == "growing") == (pages > pool.size)
        resize(size, pages)
        if now and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(hugepages_module, "_resize", interrupt)
    with pytest.raises(KeyboardInterrupt), HugepagePool(SIZE, 10):
        pass
    assert (pool.size, records(journal)) == (7, [])


def test_forked_child_gives_nothing_back(pool: Pool) -> None:
    """A case's child that leaves the context changes nothing."""
    with HugepagePool(SIZE, 10) as taken:
        assert Child(lambda _: taken.__exit__()).end() == 0
        assert pool.size == 10
    assert pool.size == 0


# ---- the real machine -----------------------------------------------------------------------------------------------


@pytest.fixture
def _alone() -> Iterator[None]:
    """Wait for other tests of the real pools on this machine."""
    try:
        directory = os.open(hugepages_module.HUGEPAGES, os.O_RDONLY | os.O_DIRECTORY)
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
    size = max((size for size in hugepage_sizes() if 2 * size < hugepages_module._memory_to_spare()), default=0)
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
