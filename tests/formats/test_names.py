# SPDX-License-Identifier: GPL-2.0-only
"""Every result has a name of its own, for those who allow few characters."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.conftest import ROOT
from tests.report.helpers import Folder, result
from uffd_selftests.formats import names
from uffd_selftests.report.model import load


def test_paths_of_the_suite(folder: Folder) -> None:
    """Every result of the suite has a path that KCIDB allows, its own, and without a checksum."""
    listing = subprocess.run(
        [sys.executable, "-m", "uffd_selftests", "-l"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    plain = []
    for name in listing.stdout.splitlines():
        match = re.fullmatch(r"(?P<case>.*?)(?: \((?P<variant>.*)\))?(?: on (?P<mem>\S+))?", name)
        assert match
        plain.append({"name": name, "outcome": "pass", **match.groupdict()})
    results = load(folder.document("7.1", *plain)).results
    paths = names.paths(results.values())
    assert len(paths) > 2000
    assert len(set(paths.values())) == len(paths)
    assert {name: path for name, path in paths.items() if path != names.path(results[name])} == {}
    assert paths["UFFDIO_API (with /dev/userfaultfd)"] == "uffd.UFFDIO_API.with-dev-userfaultfd"
    assert paths["move-pmd-split on anon"] == "uffd.move-pmd-split.anon"


def test_paths_that_clash(folder: Folder) -> None:
    """Names that only differ in what a path cannot hold do not become one."""
    alike = [result("a b"), result("a-b"), result("a(b)"), result("c")]
    paths = names.paths(load(folder.document("7.1", *alike)).results.values())
    assert len(set(paths.values())) == 4
    assert paths["c"] == "uffd.c"
    assert re.fullmatch(r"uffd\.a-b-[0-9a-f]{8}", paths["a b"])
