# SPDX-License-Identifier: GPL-2.0-only
"""What several tests of the machine need: a journal and a pool of the test's own, and what the kernel offers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.machine.helpers import Pool
from uffd_selftests.machine import hugepages
from uffd_selftests.machine import journal as journal_module
from uffd_selftests.machine.facts import Facts, probe


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the journal in a folder of the test's own, and return that."""
    monkeypatch.setattr(journal_module, "JOURNAL_PARENTS", ("/nowhere", str(tmp_path)))
    return tmp_path / journal_module.JOURNAL_NAME


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: Path) -> Pool:
    """Replace the machine's huge pages by an empty pool of plain files."""
    assert not journal.exists()
    monkeypatch.setattr(hugepages, "HUGEPAGES", tmp_path / "hugepages")
    monkeypatch.setattr(hugepages, "COMPACT_MEMORY", tmp_path / "compact_memory")
    return Pool(tmp_path / "hugepages")


@pytest.fixture(scope="module")
def facts() -> Facts:
    """Return what this process sees."""
    return probe()
