# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's own runner runs the suite as one of its selftests.

UFFD_TEST_LINUX names its source tree: see tests/harness/readers.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT
from tests.harness.readers import SOURCES, linux

if TYPE_CHECKING:
    from tests.conftest import SuiteWriter

INSTALL = ROOT / "ci" / "kselftest" / "install.sh"


def install(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Call the script that makes a kselftest folder."""
    return subprocess.run([INSTALL, *arguments], capture_output=True, text=True, check=False)


def run_kselftest(folder: Path, arguments: str) -> str:
    """Run the collection with the kernel's runner and return what it says."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UFFD_", "PYTEST_"))}
    environment |= {"PYTHON": sys.executable, "UFFD_VENV": "none", "KSELFTEST_RUN_TESTS_SH_ARGS": arguments}
    done = subprocess.run(
        [folder / "run_kselftest.sh", "-c", "uffd"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


PASSES = "def test_passes():\n    pass\n"
FAILS = "def test_fails():\n    assert 1 == 2\n"
SKIPS = "def test_skips():\n    pytest.skip('no device')\n"


@pytest.mark.parametrize(
    ("text", "inner", "outer"),
    [
        (PASSES, "# ok 1 test_inner.py::test_passes", "ok 1 selftests: uffd: run_tests.sh"),
        (PASSES + FAILS, "# not ok 2 test_inner.py::test_fails", "not ok 1 selftests: uffd: run_tests.sh # exit=1"),
        (SKIPS, "# ok 1 test_inner.py::test_skips # SKIP no device", "ok 1 selftests: uffd: run_tests.sh # SKIP"),
    ],
)
def test_kselftest(tmp_path: Path, suite: SuiteWriter, text: str, inner: str, outer: str) -> None:
    """The kernel's own runner runs an installed suite, and understands how it ends."""
    linux("tools/testing/selftests/kselftest/runner.sh")
    source = next(each for each in SOURCES if each and Path(each, "tools/testing/selftests").exists())
    folder = tmp_path / "kselftest"
    assert install(folder, source).returncode == 0
    lines = run_kselftest(folder, f"-- {suite.write(text)} -p no:terminal").splitlines()
    assert lines[:2] == ["TAP version 13", "1..1"]
    assert "# timeout set to 900" in lines
    assert inner in lines
    assert lines[-1] == outer


def test_kselftest_folder(tmp_path: Path) -> None:
    """The suite is added to what the kernel's selftests installed, whole, and once."""
    (tmp_path / "run_kselftest.sh").touch()
    (tmp_path / "kselftest-list.txt").write_text("mm:run_vmtests.sh\n")
    for _ in range(2):
        assert install(tmp_path).returncode == 0
    assert (tmp_path / "kselftest-list.txt").read_text() == "mm:run_vmtests.sh\nuffd:run_tests.sh\n"
    assert os.access(tmp_path / "uffd" / "run_tests.sh", os.X_OK)
    here = {path.relative_to(ROOT) for path in (ROOT / "uffd_selftests").rglob("*") if path.is_file()}
    there = {path.relative_to(tmp_path / "uffd") for path in (tmp_path / "uffd" / "uffd_selftests").rglob("*.*")}
    built = {path for path in here if path.suffix in (".so", ".pyc", ".o") or path.name == "_native.c"}
    assert there == here - built


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "call it as: install.sh DIR [LINUX]"),
        (["{tmp}"], "no run_kselftest.sh in {tmp}: name what the kernel's selftests installed, or a kernel"),
        (["{tmp}", "/usr"], "/usr is no kernel source: there is no tools/testing/selftests in it"),
    ],
)
def test_kselftest_folder_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    """A wrong call of the script gives one line."""
    done = install(*(each.format(tmp=tmp_path) for each in arguments))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message.format(tmp=tmp_path) in done.stderr
