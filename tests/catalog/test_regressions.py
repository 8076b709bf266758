# SPDX-License-Identifier: GPL-2.0-only
"""The bugs and the cases agree: no bug is forgotten, none is invented, and the document is up to date."""

from __future__ import annotations

from tests.conftest import ROOT
from uffd_selftests.catalog import regressions
from uffd_selftests.catalog.bugs import known_bugs, untested
from uffd_selftests.catalog.contract import declared

DOCUMENT = ROOT / "docs" / "regressions.md"


def test_every_bug_has_a_case_or_a_reason() -> None:
    """A bug that no case cites is in the table of those that none looks for, and only such a bug."""
    cited = set(regressions.cases_by_bug())
    assert sorted(cited & set(untested())) == []
    assert sorted(cited | set(untested())) == sorted(known_bugs())


def test_cases_that_may_hang_the_kernel_name_the_bug() -> None:
    """Nobody is asked to risk a machine without being told for which bug."""
    assert [one.case.name for one in declared() if one.case.may_hang_kernel and not one.case.bugs] == []


def test_document_is_up_to_date() -> None:
    """docs/regressions.md is what the declarations make of it."""
    assert DOCUMENT.read_text() == regressions.document(), (
        "python -m uffd_selftests.catalog.regressions > docs/regressions.md"
    )
