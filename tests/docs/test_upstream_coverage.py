# SPDX-License-Identifier: GPL-2.0-only
"""docs/upstream-coverage.md names cases that exist, and every case of cases/mm."""

from __future__ import annotations

import re

from tests.conftest import ROOT
from uffd_selftests.catalog import contract

DOCUMENT = ROOT / "docs" / "upstream-coverage.md"


def named() -> set[str]:
    """Return the names in the last column of every table."""
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[-2])}


def test_named_cases_exist() -> None:
    """No table sends its reader to a case that is not there."""
    assert sorted(named() - {one.case.name for one in contract.declared()}) == []


def test_ported_cases_are_named() -> None:
    """Each case that was written for another suite's test is in its table."""
    ported = {one.case.name for one in contract.declared() if "/cases/mm/" in one.path}
    assert ported
    assert sorted(ported - named()) == []
