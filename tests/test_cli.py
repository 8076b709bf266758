# SPDX-License-Identifier: GPL-2.0-only
"""The command line does what it says, ends as it says, and leaves stdout to KTAP."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import uffd_selftests
from tests.conftest import ROOT
from tests.helpers import ONE_OF_EACH, needs_userfaultfd
from uffd_selftests import cli as command
from uffd_selftests.harness import settings
from uffd_selftests.vm.options import native

if TYPE_CHECKING:
    from tests.conftest import Starter, SuiteWriter


# ---- usage errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["extra"], "unrecognized arguments: extra"),
        (["--dead", "3"], "unrecognized arguments: --dead"),
        (["-n", "many"], "argument -n: 'many' is neither a number nor auto"),
        (["-n", "1000000"], "argument -n: 1000000 processes are too many for this machine: at most "),
        (["-n", "-1"], "argument -n: '-1' is neither a number nor auto"),
        (["--deadline", "soon"], "--deadline: 'soon' is not a positive number"),
        (["--deadline", "0"], "--deadline: '0' is not a positive number"),
        (["--deadline", "inf"], "--deadline: 'inf' is not a positive number"),
        (["--deadline-scale", "nan"], "--deadline-scale: 'nan' is not a positive number"),
        (["--area-mib", "0"], "--area-mib: '0' is not a positive whole number"),
        (["--area-mib", "1.5"], "--area-mib: '1.5' is not a positive whole number"),
        (["--require", "wp,bogus"], "--require: unknown requirement bogus; there are "),
        (["-k", "and"], "-k 'and': "),
        (["-k", "a b"], "-k 'a b': "),
        (["-o", "/proc/folder"], "cannot write into /proc/folder: ENOENT"),
        (["-o", __file__], f"cannot write into {__file__}: it is a file: name a folder"),
        (["--vm-cpus", "2"], "--vm-cpus needs --kernel: "),
        (["--vm-append", "quiet"], "--vm-append needs --kernel: "),
        (["--arch", {"x86_64": "arm64"}.get(native(), "x86_64")], "--arch needs --kernel: "),
        (["-k"], "argument -k: expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_error(args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A mistake is explained in one line on stderr; the exit code is 2 and there is no KTAP."""
    try:
        code = command.main(args)
    except SystemExit as error:  # argparse leaves this way
        code = int(str(error.code))
    out, err = capfd.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"uffd-selftests: {message}")


# ---- what it runs ---------------------------------------------------------------------------------------------------


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """--version names the version, --help each option."""
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit, match="0"):
            command.main([option])
    shown = capsys.readouterr().out
    assert f"uffd-selftests {uffd_selftests.__version__}" in shown
    for each in settings.OPTIONS:
        assert each.flag in shown
        assert each.variable in shown


def lines(*args: str) -> list[str]:
    """Return what -l lists."""
    done = subprocess.run(
        [sys.executable, "-m", "uffd_selftests", "-l", *args], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.splitlines()


def test_list(suite: SuiteWriter) -> None:
    """-l lists results by name, nothing else, and runs nothing."""
    path = suite.write(ONE_OF_EACH)
    everything = ["passes on anon", "passes on shmem", "varies (with syscall) on anon", "varies (with device) on anon"]
    everything.append("breaks")
    assert lines("--", path) == everything
    assert lines("-f", "pass", "-f", "vari", "--", path) == everything[:4]
    assert lines("-f", "passes on shm", "--", path) == ["passes on shmem"]
    assert lines("-k", "passes and not anon", "--", path) == ["passes on shmem"]
    assert lines("-k", "device", "--", path) == ["varies (with device) on anon"]
    assert lines("--documented-only", "--", path) == everything[2:]


def test_filter_is_about_names(suite: SuiteWriter) -> None:
    """-f looks at the case's name, not at memory types, unless it has " on " in it."""
    path = suite.write(ONE_OF_EACH)
    done = subprocess.run(
        [sys.executable, "-m", "uffd_selftests", "-l", "-f", "anon", "--", path],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2


@needs_userfaultfd
def test_strict(cli: Starter, suite: SuiteWriter) -> None:
    """--strict makes a failure of a known defect."""
    run = cli.run("--strict", "-f", "breaks", "--", suite.write(ONE_OF_EACH))
    assert run.code == 1
    assert "not ok 1 breaks\n" in run.stdout


@needs_userfaultfd
def test_old_reports_do_not_stay(cli: Starter, suite: SuiteWriter) -> None:
    """A folder does not keep the results of another run."""
    path = suite.write(ONE_OF_EACH)
    first = cli.run("--", path)
    (first.folder / "notes.txt").write_text("mine")
    subprocess.run(
        [sys.executable, "-m", "uffd_selftests", "-o", first.folder, "--", path, "--bogus"],
        capture_output=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert sorted(path.name for path in first.folder.iterdir()) == ["notes.txt"]


def test_the_suite_is_found_from_anywhere(cli: Starter) -> None:
    """Whatever the current folder is, the cases are those of the package."""
    run = cli.run("-l", "-f", "UFFDIO_API")
    assert run.stdout.splitlines() == ["UFFDIO_API (with syscall)", "UFFDIO_API (with /dev/userfaultfd)"]


# ---- streams --------------------------------------------------------------------------------------------------------


@needs_userfaultfd
@pytest.mark.parametrize("way", ["", "-n 2"])
@pytest.mark.parametrize(
    ("closed", "code", "err"), [("<&-", 0, ""), (">&-", 2, "uffd-selftests: stdout is closed\n"), ("2>&-", 0, "")]
)
def test_closed_streams(closed: str, code: int, err: str, way: str) -> None:
    """Without stdin or stderr a run is as ever, without stdout nobody would hear of it."""
    call = f"exec {sys.executable} -m uffd_selftests -f api-answer {way} {closed}"
    run = subprocess.run(["sh", "-c", call], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (code, err)
    assert ("\nok 1 api-answer\n" in run.stdout) == (code == 0)


def test_what_other_runs_are_told_of_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run elsewhere chooses the scale of its deadlines unless it was given one: this process says none."""
    monkeypatch.delenv("UFFD_DEADLINE_SCALE", raising=False)
    assert command.main(["--kernel", "/nowhere"]) == 2
    assert "UFFD_DEADLINE_SCALE" not in os.environ
