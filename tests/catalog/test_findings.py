# SPDX-License-Identifier: GPL-2.0-only
"""docs/findings.md speaks of defects and bugs that cases show."""

from __future__ import annotations

import re
from pathlib import Path

from uffd_selftests.catalog import bugs, contract

DOCUMENT = Path(__file__).parents[2] / "docs/findings.md"


def test_each_finding_is_declared() -> None:
    """Each paragraph's ID is that of a defect of a case, or of a bug of the list; none is told of twice."""
    text = DOCUMENT.read_text()
    found = re.findall(r"^\*\*(D-[A-Z]+-\d+|Bug \d+):", text, re.M)
    assert len(found) == len(set(found)) > 20
    declared = {one.case.defect.id for one in contract.declared() if one.case.defect}
    assert [name for name in found if name.startswith("D-") and name not in declared] == []
    known = {str(number) for number in bugs.known_bugs()}
    assert [name for name in found if name.startswith("Bug") and name.split()[1] not in known] == []
