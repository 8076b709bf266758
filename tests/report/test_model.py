# SPDX-License-Identifier: GPL-2.0-only
"""results.json is checked where it could do harm, and forgiven where something is only missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.helpers import Folder
from uffd_selftests.report.command import main
from uffd_selftests.report.model import Run
from uffd_selftests.report.page import render

BAD = {
    "no JSON": ("{", "not a JSON document"),
    "too deep": ("[" * 100_000, "not a JSON document"),
    "no object": ("[]", "no list of results"),
    "other JSON": ('{"summary": {}}', "no list of results"),
    "no list": ('{"results": {}}', "results is not a list"),
    "no result": ('{"results": [1]}', "result 1 is not an object"),
    "no name": ('{"results": [{"outcome": "pass"}]}', "result 1: no name"),
    "odd outcome": ('{"results": [{"name": "a", "outcome": "maybe"}]}', "result 1: outcome 'maybe' is none of"),
    "odd rows": ('{"results": [{"name": "a", "outcome": "pass", "rows": 1}]}', "result 1: rows is not a list"),
    "twice": (
        '{"results": [{"name": "a", "outcome": "pass"}, {"name": "a", "outcome": "fail"}]}',
        "two results are named 'a'",
    ),
    "newer": ('{"format": 2, "results": []}', "format 2, but this version reads up to 1"),
    "bytes": (b"\xff\xfe\x00", "not a JSON document"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_documents(folder: Folder, capsys: pytest.CaptureFixture[str], content: str | bytes, message: str) -> None:
    """They get one line that names the file, exit code 2, and no page."""
    path = folder.path / "bad.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert main([str(path), "-o", str(folder.path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"uffd-selftests report: {path}: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (folder.path / "report.html").exists()


def test_odd_values_do_no_harm(folder: Folder) -> None:
    """Numbers that are none, nulls, an empty run, facts of another shape: the page is made all the same."""
    path = folder.path / "odd.json"
    odd = {"name": "a", "outcome": "pass", "seconds": -1, "mem": None, "rows": None, "defect": None, "variant": None}
    facts = {"page_size": "4K", "thp": [], "hugepage_sizes": ["2M"], "access": None, "capabilities": 7, "memory": None}
    surroundings = {"facts": facts, "changed": [], "hugepage_shortage": 3}
    options = {"filters": "move", "deadline": "x", "workers": "two"}
    path.write_text(json.dumps({"results": [odd], "environment": surroundings, "options": options, "seconds": None}))
    assert "keeps every promise" in folder.page(path).text
    path.write_text('{"results": [{"name": "a", "outcome": "pass", "seconds": NaN}], "environment": {"facts": 1}}')
    assert "keeps every promise" in folder.page(path).text
    path.write_text('{"results": [], "planned": 5}')
    assert "5 results of 5 never came." in folder.page(path).text


def test_labels_tell_runs_apart() -> None:
    """The kernel's release, then the machine or the page size, then the folder, and at last a number."""

    def labels(*runs: tuple[dict[str, Any], str]) -> list[str]:
        made = [Run("6.12", {}, Path(path), environment={"facts": facts}) for facts, path in runs]
        render(made)
        return [run.label for run in made]

    x86, arm = {"machine": "x86_64", "page_size": 4096}, {"machine": "aarch64", "page_size": 4096}
    arm16 = {**arm, "page_size": 16384}
    assert labels((x86, "a/r"), (arm, "b/r")) == ["6.12 x86_64", "6.12 aarch64"]
    assert labels((arm, "a/r"), (arm16, "b/r")) == ["6.12 4K", "6.12 16K"]
    assert labels((x86, "a/r"), (x86, "b/r")) == ["6.12 a", "6.12 b"]
    assert labels((x86, "a/r"), (x86, "a/r")) == ["6.12 #1", "6.12 #2"]
