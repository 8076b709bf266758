# SPDX-License-Identifier: GPL-2.0-only
"""The programs that read what the suite prints: prove, the kernel's kunit.py and kselftest runner, LAVA.

UFFD_TEST_LINUX names a kernel source tree with the kernel's programs; without it /usr/src/linux or the running
kernel's own source will do.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uffd_selftests.formats import names
from uffd_selftests.harness import ktap
from uffd_selftests.harness.results import Planned, Result
from uffd_selftests.report.model import load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import SuiteWriter

ROOT = Path(__file__).parent.parent
CI = ROOT / "ci"
SOURCES = (os.environ.get("UFFD_TEST_LINUX", ""), f"/lib/modules/{os.uname().release}/source", "/usr/src/linux")

GOOD = (
    ("move on anon", "pass", ""),
    ("wp-fork-pin on shmem-private", "skip", "CONFIG_GUP_TEST: /sys/kernel/debug/gup_test: ENOENT"),
    ("unregister-wakes-wp on anon", "xfail", "D-UNR-11: a thread sleeps on"),
    ("UFFDIO_API (with /dev/userfaultfd)", "xpass", ""),
)
BAD = (
    ("zeropage on hugetlb", "fail", ""),
    ("events on anon", "timeout", "30 seconds"),
    ("sigbus (a, b) on shmem", "error", "killed by SIGSEGV"),
)


def document(results: Sequence[tuple[str, str, str]], planned: int | None = None) -> str:
    """Return the KTAP of a run, with a line of every sort."""
    stream = io.StringIO()
    writer = ktap.Writer(stream)
    writer.plan(len(results) if planned is None else planned, ["Linux 7.1 x86_64"])
    for name, outcome, reason in results:
        broken = outcome in ktap.FAILURES
        diagnostics = ["promise: it works.", "", "ok 99 is not a result here"] if broken else []
        writer.result(Result(Planned(name, name, name), outcome, reason, diagnostics))
    writer.totals({})
    return stream.getvalue()


def linux(path: str) -> Path:
    """Return a file of the kernel source; skips without one."""
    for source in filter(None, SOURCES):
        if (found := Path(source, path)).exists():
            return found
    pytest.skip(f"no kernel source with {path}: name one in UFFD_TEST_LINUX")


# ---- prove, kunit.py -----------------------------------------------------------------------------------------------


def prove(text: str, folder: Path) -> tuple[int, str]:
    """Return the exit code and the verdict of prove."""
    if not shutil.which("prove"):
        pytest.skip("no prove: apt-get install perl")
    (folder / "results.tap").write_text(text)
    done = subprocess.run(
        ["prove", "-e", "cat", "results.tap"], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_prove(tmp_path: Path) -> None:
    """Prove counts what is "not ok", and nothing else."""
    assert prove(document(GOOD), tmp_path)[0] == 0
    code, said = prove(document([*GOOD, *BAD]), tmp_path)
    assert code == 1
    assert "Failed tests:  5-7" in said
    assert "Bad plan" in prove(document(GOOD, planned=5), tmp_path)[1]


def kunit(text: str) -> tuple[int, str]:
    """Return the exit code of kunit.py and its last line."""
    program = linux("tools/testing/kunit/kunit.py")
    done = subprocess.run(
        [sys.executable, program, "parse"], input=text, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()[-1]


def test_kunit() -> None:
    """The kernel's reader of KTAP counts every result, and reports results that are missing."""
    code, said = kunit(document(GOOD))
    assert code == 0
    assert "Ran 4 tests: passed: 3, skipped: 1" in said
    code, said = kunit(document([*GOOD, *BAD]))
    assert code != 0
    assert "Ran 7 tests: passed: 3, failed: 3, skipped: 1" in said
    code, said = kunit(document(GOOD, planned=5))
    assert code != 0
    assert "Ran 5 tests: passed: 3, crashed: 1, skipped: 1, errors: 1" in said


# ---- kselftest -----------------------------------------------------------------------------------------------------


def install(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Call the script that makes a kselftest folder."""
    return subprocess.run(
        [CI / "kselftest" / "install.sh", *arguments], capture_output=True, text=True, check=False
    )


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


# ---- LAVA ----------------------------------------------------------------------------------------------------------

LAVA_TEST_CASE = """#!/bin/sh
[ "$2 $#" = "--result 3" ] && echo "lava: $1 $3"
"""


def lava(text: str, folder: Path) -> str:
    """Return what the filter for LAVA prints, with what lava-test-case is told."""
    program = folder / "lava-test-case"
    program.write_text(LAVA_TEST_CASE)
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        [CI / "lava" / "ktap-to-lava.sh"], input=text, env=environment, capture_output=True, text=True, check=True
    ).stdout


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
