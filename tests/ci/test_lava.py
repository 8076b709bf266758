# SPDX-License-Identifier: GPL-2.0-only
"""LAVA hears of every result, in its own words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.harness.readers import BAD, GOOD, document
from uffd_selftests.formats import names
from uffd_selftests.report.model import load

FILTER = ROOT / "ci" / "lava" / "ktap-to-lava.sh"

LAVA_TEST_CASE = """#!/bin/sh
[ "$2 $#" = "--result 3" ] && echo "lava: $1 $3"
"""


def lava(text: str, folder: Path) -> str:
    """Return what the filter for LAVA prints, with what lava-test-case is told."""
    program = folder / "lava-test-case"
    program.write_text(LAVA_TEST_CASE)
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run([FILTER], input=text, env=environment, capture_output=True, text=True, check=True).stdout


def told(text: str) -> dict[str, str]:
    """Return what LAVA was told of each result."""
    return dict(re.findall(r"^lava: (\S+) (\S+)$", text, re.MULTILINE))


def test_lava(tmp_path: Path) -> None:
    """LAVA hears of every result in its words, at once, and its log has the whole KTAP."""
    text = document([*GOOD, *BAD])
    said = lava(text, tmp_path)
    assert told(said) == {
        "move.anon": "pass",
        "wp-fork-pin.shmem-private": "skip",
        "unregister-wakes-wp.anon": "pass",
        "UFFDIO_API.with-dev-userfaultfd": "pass",
        "zeropage.hugetlb": "fail",
        "events.anon": "fail",
        "sigbus.a-b.shmem": "fail",
        "complete": "pass",
    }
    assert [line for line in said.splitlines() if not line.startswith("lava: ")] == text.splitlines()
    assert "ok 1 move on anon\nlava: move.anon pass\n" in said


@pytest.mark.parametrize("text", ["", document(GOOD, planned=5), "run_tests.sh: no python3\n", "TAP version 13\n"])
def test_lava_of_half_a_run(tmp_path: Path, text: str) -> None:
    """A run that did not come to its end is no success."""
    assert told(lava(text, tmp_path))["complete"] == "fail"


def test_lava_names(tmp_path: Path) -> None:
    """A result has in LAVA the name that it has in KCIDB, and that is its own."""
    listing = subprocess.run(
        [sys.executable, "-m", "uffd_selftests", "-l"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    plain = []
    for name in listing.stdout.splitlines():
        match = re.fullmatch(r"(?P<case>.*?)(?: \((?P<variant>.*)\))?(?: on (?P<mem>\S+))?", name)
        assert match
        if re.search(r"[^a-z -]", name):  # all that are not simple
            plain.append({"name": name, "outcome": "pass", **match.groupdict()})
    assert plain
    (tmp_path / "results.json").write_text(json.dumps({"results": plain}))
    paths = names.paths(load(tmp_path).results.values())
    expected = [path.removeprefix("uffd.") for path in paths.values()]
    ours = told(lava(document([(name, "pass", "") for name in paths]), tmp_path))
    assert list(ours) == [*expected, "complete"]
