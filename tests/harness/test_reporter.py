# SPDX-License-Identifier: GPL-2.0-only
"""A run says the same on stdout and in its files, and says when it cannot write them."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT
from tests.helpers import ONE_OF_EACH, needs_userfaultfd
from tests.report.helpers import Page

if TYPE_CHECKING:
    from tests.conftest import Starter, SuiteWriter

DOCUMENT = ROOT / "docs" / "results.md"


@needs_userfaultfd
@pytest.mark.parametrize("workers", ["0", "2"])
def test_run_and_reports(cli: Starter, suite: SuiteWriter, workers: str) -> None:
    """A run says the same in KTAP and in its files."""
    run = cli.run("-n", workers, "--", suite.write(ONE_OF_EACH))
    assert run.code == 0
    assert {line.partition(" ")[2].partition(" ")[2] for line in run.stdout.splitlines() if line.startswith("ok")} == {
        "passes on anon",
        "passes on shmem",
        "varies (with syscall) on anon",
        "varies (with device) on anon # SKIP no device",
        "breaks # XFAIL D-ROW-3: sleeps for ever",
    }
    assert run.stdout.endswith("# Totals: pass:3 fail:0 xfail:1 xpass:0 skip:1 error:0\n")
    document = run.document
    assert document["totals"] == {"pass": 3, "skip": 1, "xfail": 1}
    assert (document["interrupted"], document["exitstatus"]) == ("", 0)
    varies = next(each for each in document["results"] if each["name"] == "varies (with syscall) on anon")
    assert (varies["case"], varies["variant"], varies["mem"]) == ("varies", "with syscall", "anon")
    assert (varies["promise"], varies["rows"]) == ("It does so either way.", ["ROW-1", "ROW-2"])
    breaks = next(each for each in document["results"] if each["name"] == "breaks")
    assert breaks["defect"]["advice"] == "wake it"
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["facts"]["release"] == os.uname().release
    assert (run.folder / "dmesg.txt").exists()
    junit = ET.parse(run.folder / "junit.xml").getroot()
    assert [len(junit.findall(f".//{tag}")) for tag in ("testcase", "skipped", "failure")] == [5, 2, 0]


def test_a_run_writes_its_page(cli: Starter, suite: SuiteWriter) -> None:
    """-o leaves report.html beside results.json, and docs/results.md has every key of that."""
    tests = suite.write("""
        @uffd_case("holds")
        def test_holds():
            \"\"\"It holds.\"\"\"

        @uffd_case("breaks", rows=("CP-01",))
        def test_breaks():
            \"\"\"It does not break.\"\"\"
            assert 1 == 2
    """)
    run = cli.run("--", tests)
    page = Page((run.folder / "report.html").read_text("utf-8"))
    assert "breaks 1 promise" in page.text
    assert "assert 1 == 2" in page.text
    described = set(re.findall(r"`([\w-]+)`", DOCUMENT.read_text("utf-8")))
    assert set(run.document) <= described
    assert set(run.results["breaks"]) <= described
    assert set(run.document["environment"]) <= described
    assert set(run.document["environment"]["facts"]) <= described
    assert set(run.document["options"]) <= described
    assert (run.document["format"], run.document["planned"]) == (1, 2)


def test_run_on_a_full_disk(cli: Starter, suite: SuiteWriter, tmp_path: Path) -> None:
    """Results that cannot be written are one line and a failure; what went to stdout is whole."""
    out = tmp_path / "out"
    tests = suite.write(f"""
        @uffd_case("fills")
        def test_fills():
            os.symlink("/dev/full", "{out}/results.json")
    """)
    run = cli.run("-o", str(out), "--", tests)
    assert run.code == 1
    assert "uffd-selftests: cannot write the results: No space left on device\n" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout.splitlines()[-1].startswith("# Totals: pass:1 ")
    assert not (out / "results.json").exists()
