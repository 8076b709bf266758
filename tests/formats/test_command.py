# SPDX-License-Identifier: GPL-2.0-only
"""The commands that convert results say in one line what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.formats.helpers import ONE_OF_EACH, convert
from tests.report.helpers import Folder
from uffd_selftests.formats.command import main


def test_label(folder: Folder) -> None:
    """A run can be called something else than its kernel."""
    path = folder.document("7.1", ONE_OF_EACH[0])
    assert "| patched | 1 |" in convert("summary", folder, f"patched={path.parent}")


def test_stdout(folder: Folder) -> None:
    """Without -o it goes to stdout, and a reader may have enough."""
    path = folder.document("7.1", *ONE_OF_EACH)
    call = [sys.executable, "-m", "uffd_selftests", "summary", str(path)]
    assert subprocess.run(call, capture_output=True, text=True, check=True, cwd=ROOT).stdout.startswith("### ")
    reader, writing = os.pipe()
    os.close(reader)
    with open(writing, "wb") as broken:
        done = subprocess.run(call, stdout=broken, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "junit",
            ["missing.json"],
            "uffd-selftests junit: missing.json: no such file: name the folder that a run wrote with -o\n",
        ),
        ("junit", [], "uffd-selftests junit: the following arguments are required: [LABEL=]RESULTS; "),
        ("summary", ["{good}", "-o", "no/such/folder"], "uffd-selftests summary: cannot write no/such/folder: "),
        ("summary", ["{good}", "-o", "/dev/full"], "uffd-selftests summary: cannot write /dev/full: No space left"),
        ("kcidb", ["{good}"], "uffd-selftests kcidb: the following arguments are required: --origin, --build-id; "),
        ("kcidb", ["{good}", "--origin", "My Lab", "--build-id", "x:1"], "argument --origin: 'My Lab' has more than"),
        ("kcidb", ["{good}", "--origin", "lab", "--build-id", "1"], "argument --build-id: '1' does not begin with"),
    ],
)
def test_bad_call(
    folder: Folder, capfd: pytest.CaptureFixture[str], name: str, arguments: list[str], message: str
) -> None:
    """A wrong call gives one line that says what is wrong, and exit code 2."""
    good = folder.document("7.1", ONE_OF_EACH[0])
    try:
        code = main(name, [each.format(good=good) for each in arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    error = capfd.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
