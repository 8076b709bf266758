# SPDX-License-Identifier: GPL-2.0-only
"""The summary in Markdown says what a reader wants to know first, and is bounded."""

from __future__ import annotations

from typing import Any

import pytest

from tests.formats.helpers import HOSTILE, ONE_OF_EACH, convert
from tests.report.helpers import Folder, result
from uffd_selftests.formats import summary


def test_summary(folder: Folder) -> None:
    """The table counts by kernel; broken promises and known defects follow."""
    text = convert("summary", folder, folder.document("6.1", ONE_OF_EACH[0]), folder.document("7.1", *ONE_OF_EACH))
    lines = text.splitlines()
    assert lines[0] == "### userfaultfd: 5 broken promises"
    assert lines[2] == "| kernel | pass | skip | xfail | xpass | error | timeout | fail |"
    assert lines[4:6] == ["| 6.1 | 1 | 0 | 0 | 0 | 0 | 0 | 0 |", "| 7.1 | 1 | 2 | 1 | 1 | 2 | 1 | 2 |"]
    assert "#### 7.1: broken promises" in lines
    assert "<details><summary>stuck on anon: TIMEOUT 30 seconds</summary>" in lines
    assert "<pre>promise: The promise of bad.\nexpected EEXIST; got EINVAL</pre>" in text
    assert "- D-CP-99: It bites (7.1)" in lines


@pytest.mark.parametrize(
    ("results", "more", "verdict"),
    [
        (ONE_OF_EACH[:1], {}, "no broken promise"),
        (ONE_OF_EACH[1:2], {}, "1 broken promise"),
        (ONE_OF_EACH[:1], {"planned": 2}, "the run is not whole"),
        ((ONE_OF_EACH[6],), {}, "nothing could be tested"),
    ],
)
def test_verdict(folder: Folder, results: tuple[dict[str, Any], ...], more: dict[str, Any], verdict: str) -> None:
    """Its heading says what a reader wants to know."""
    text = convert("summary", folder, folder.document("7.1", *results, **more))
    assert text.startswith(f"### userfaultfd: {verdict}\n")


def test_summary_hostile(folder: Folder) -> None:
    """Nothing that a result says ends its block or becomes a tag."""
    text = convert("summary", folder, folder.document("7.1", result(HOSTILE, "fail", diagnostics=HOSTILE.splitlines())))
    assert text.count("<pre>") == text.count("</pre>") == 1
    assert "<b>" not in text


def test_summary_is_bounded(folder: Folder) -> None:
    """A kernel on which everything fails does not make a page that GitHub refuses."""
    results = [result(f"case-{number} on anon", "fail", diagnostics=["x" * 500] * 40) for number in range(2000)]
    text = convert("summary", folder, folder.document("7.1", *results))
    assert f"and {2000 - summary.MAX_SHOWN} more" in text
    assert len(text) < 1 << 20
