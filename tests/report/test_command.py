# SPDX-License-Identifier: GPL-2.0-only
"""The command names its runs, and says in one line what it cannot do."""

from __future__ import annotations

import sys

import pytest

from tests.report.helpers import Folder, Page, result
from uffd_selftests.report.command import main, write
from uffd_selftests.report.model import load


def test_given_labels(folder: Folder) -> None:
    """LABEL=PATH names a run."""
    path = folder.document("6.18", result("a"))
    output = folder.path / "page.html"
    assert main([f"before={path}", f"after={path.parent}", "-o", str(output)]) == 0
    rows = Page(output.read_text("utf-8")).rows()
    assert [row[0] for row in rows[1:3]] == ["before", "after"]


def test_files_that_cannot_be_used(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing document and an output that cannot be written are one line each."""
    assert main([str(folder.path / "none.json")]) == 2
    assert "none.json: no such file: name the folder that a run wrote with -o" in capsys.readouterr().err
    good = folder.document("6.18", result("a"))
    assert main([str(good), "-o", str(folder.path / "none" / "report.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_full_disk(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """A page that does not fit is said to be missing."""
    good = folder.document("6.18", result("a"))
    assert main([str(good), "-o", "/dev/full"]) == 2
    assert capsys.readouterr().err == "uffd-selftests report: cannot write /dev/full: No space left on device\n"


def test_report_without_jinja2(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said what to install."""
    monkeypatch.setitem(sys.modules, "uffd_selftests.report.page", None)
    run = load(folder.document("6.18", result("a")))
    with pytest.raises(ValueError, match="pip install jinja2"):
        write([run], folder.path / "report.html")
