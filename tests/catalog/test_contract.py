# SPDX-License-Identifier: GPL-2.0-only
"""The contract and the cases agree: no row is forgotten, none is invented, and the document is up to date."""

from __future__ import annotations

import re
from collections import Counter

from tests.conftest import ROOT
from uffd_selftests.catalog import bugs, contract

DOCUMENT = ROOT / "docs" / "contract.md"


def test_every_row_is_checked_or_has_a_reason() -> None:
    """A row that is cited nowhere is in the table of rows that cannot be checked, and only such a row."""
    cited = {row for one in contract.declared() for row in one.case.rows}
    left_out = contract.untested()
    assert sorted(set(contract.rows()) - cited - set(left_out)) == []
    assert sorted(cited & set(left_out)) == []
    assert sorted((cited | set(left_out)) - set(contract.rows())) == []


EXPLAINED = {"DM-02"}
"""Contradictions that later documents explain: the address is exact with UFFD_FEATURE_EXACT_ADDRESS, else rounded."""


def test_every_contradiction_has_a_defect() -> None:
    """Rows of kind X, unless left out, are asserted by a case whose failure is expected."""
    excused = {row for one in contract.declared() if one.case.defect for row in one.case.rows}
    wanted = {row.id for row in contract.rows().values() if row.kind == "X"} - set(contract.untested()) - EXPLAINED
    assert sorted(wanted - excused) == []


def test_declarations_are_sound() -> None:
    """Names are unique, and fit into KTAP; promises are sentences; each case, stress apart, cites a row."""
    found = contract.declared()
    assert [name for name, count in Counter(one.case.name for one in found).items() if count > 1] == []
    assert [one.case.name for one in found if not one.promise.endswith(".")] == []
    assert [one.case.name for one in found if "#" in one.case.name] == []
    assert [one.case.name for one in found if not one.case.rows and "/stress/" not in one.path] == []


def test_document_is_up_to_date() -> None:
    """docs/contract.md is what the declarations make of it."""
    assert DOCUMENT.read_text() == contract.document(), "python -m uffd_selftests.catalog.contract > docs/contract.md"


def test_each_finding_is_declared() -> None:
    """docs/findings.md: each ID is that of a defect of a case, or of a bug; none is told of twice."""
    text = DOCUMENT.with_name("findings.md").read_text()
    found = re.findall(r"^\*\*(D-[A-Z]+-\d+|Bug \d+):", text, re.M)
    assert len(found) == len(set(found)) > 20
    declared = {one.case.defect.id for one in contract.declared() if one.case.defect}
    assert [name for name in found if name.startswith("D-") and name not in declared] == []
    known = {str(number) for number in bugs.known_bugs()}
    assert [name for name in found if name.startswith("Bug") and name.split()[1] not in known] == []
