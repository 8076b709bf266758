# SPDX-License-Identifier: GPL-2.0-only
"""The journal is ours alone, and keeps only what is to be undone by those who can."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.machine.helpers import NOTICE, SIZE, Pool, in_pool, leave_record, needs_root, records
from uffd_selftests.machine.hugepages import HugepagePool
from uffd_selftests.machine.journal import DRAFT
from uffd_selftests.machine.repair import repair

# ---- records --------------------------------------------------------------------------------------------------------


def test_living_run_is_left_alone(pool: Pool) -> None:
    """What a living process has written down is its own business."""
    child = in_pool(10)
    assert repair() == []
    assert pool.size == 10
    child.end(signal.SIGKILL)


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


ELSEWHERE = """
import sys
from uffd_selftests.machine import journal, settings
journal.JOURNAL_PARENTS = (sys.argv[1],)
with journal.Journal.open(create=False) as opened:
    print(opened.repair())
"""
"""A process that knows settings, but no huge pages."""


def test_record_that_only_others_can_undo(pool: Pool, journal: Path) -> None:
    """A process that does not know a record's kind neither undoes nor deletes it; the next one that knows it does."""
    record = leave_record(journal, added=5)
    text = record.read_text()
    pool.size = 10
    command = [sys.executable, "-c", ELSEWHERE, str(journal.parent)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"
    assert (pool.size, record.read_text()) == (10, text)
    assert repair() == [NOTICE.format(5)]
    assert (pool.size, records(journal)) == (5, [])


def test_record_of_a_kind_that_nobody_here_knows(pool: Pool, journal: Path) -> None:
    """It stays, whatever it says, and keeps nobody from changing and undoing other things, until the machine boots."""
    record = leave_record(journal, kind="tea", added=5)
    pool.size = 10
    with HugepagePool(SIZE, 4):
        assert pool.size == 14
    assert repair() == []
    assert (pool.size, records(journal)) == (10, [record.name])
    leave_record(journal, kind="tea", boot="an earlier one")
    assert repair() == []
    assert (pool.size, records(journal)) == (10, [])


def test_draft_is_cleared_away(pool: Pool, journal: Path) -> None:
    """A run killed while it wrote a record leaves a draft; it had changed nothing yet."""
    leave_record(journal).rename(journal / ("1-1.json" + DRAFT))
    pool.size = 10
    repair()
    assert (pool.size, records(journal)) == (10, [])


# ---- the directory --------------------------------------------------------------------------------------------------


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
