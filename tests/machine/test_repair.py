# SPDX-License-Identifier: GPL-2.0-only
"""What a killed run left is put back by the next one, once, and what cannot be put back is said."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from tests.machine.helpers import NOTICE, Child, Pool, in_pool, leave_record, records
from uffd_selftests.machine import hugepages as hugepages_module
from uffd_selftests.machine.repair import repair


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


def test_repair_survives_its_own_death(pool: Pool, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair that was killed is finished by the next one; nothing is taken away twice."""
    leave_record(journal, added=5)
    pool.size = 12
    resize = hugepages_module._resize

    def resize_and_die(size: int, pages: int) -> None:
        resize(size, pages)
        os.kill(os.getpid(), signal.SIGKILL)

    def run(_: Child) -> None:
        monkeypatch.setattr(hugepages_module, "_resize", resize_and_die)
        repair()

    assert Child(run).end() == -signal.SIGKILL
    assert (pool.size, len(records(journal))) == (7, 1)
    assert repair() == []
    assert (pool.size, records(journal)) == (7, [])


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
        patch.setattr(hugepages_module, "_resize", refuse)
        (notice,) = repair()
    assert "Read-only file system" in notice
    assert repair() == [NOTICE.format(5)]
    assert pool.size == 5
