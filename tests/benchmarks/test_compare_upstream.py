# SPDX-License-Identifier: GPL-2.0-only
"""compare_upstream.py tells any difference of upstream's verdicts from ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.helpers import BENCHMARKS
from tests.benchmarks.outputs import KSELFTEST, LINES, OURS


def compare(tmp_path: Path, theirs: str, ours: str) -> subprocess.CompletedProcess[str]:
    """Compare two programs that print what is given; the arguments of the last run are in the file arguments."""
    program = tmp_path / "uffd-unit-tests"
    for path, output in ((program, theirs), (tmp_path / "ours", ours)):
        script = f"cat <<'EOF'\n{output}EOF\nprintf '%s\\n' \"$@\" >'{tmp_path}/arguments'\n"
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(0o755)
    command = [sys.executable, str(BENCHMARKS / "compare_upstream.py"), "--rounds", "1", "--workers", "2"]
    command += ["--build-dir", str(tmp_path), "--ours", str(tmp_path / "ours")]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_same_verdicts(tmp_path: Path) -> None:
    """The same verdicts are exit code 0, also when we have more; the table has a line for each contender."""
    result = compare(tmp_path, LINES, OURS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "verdicts: all the same" in result.stdout
    assert "only ours, and in our time: unregister-wakes on anon" in result.stdout
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[-3:]] == ["upstream", "ours", "ours -n 2"]


def test_selection(tmp_path: Path) -> None:
    """Ours is told to run what upstream has: by the names of its results."""
    compare(tmp_path, LINES, OURS)
    names = [
        "UFFDIO_API (with syscall)",
        "UFFDIO_API (with /dev/userfaultfd)",
        "zeropage on anon",
        "wp-fork-pin on shmem",
        "poison on hugetlb-private",
    ]
    expected = [argument for name in names for argument in ("-f", f"={name}")] + ["-n", "2"]
    assert (tmp_path / "arguments").read_text().splitlines() == expected


@pytest.mark.parametrize(
    ("theirs", "change", "line"),
    [
        (KSELFTEST, ("ok 3 zeropage", "not ok 3 zeropage"), "zeropage on anon: upstream ok, ours fail"),
        (LINES, ("ok 3 zeropage on anon", ""), "zeropage on anon: upstream ok, ours missing"),
        (LINES, ("on anon\n", "on anon # SKIP no\n"), "zeropage on anon: upstream ok, ours skip (no)"),
        (LINES, ("not ok 5", "ok 5"), "poison on hugetlb-private: upstream fail (SIGBUS count 3 (expected 4))"),
    ],
    ids=["failed", "missing", "skipped", "passed"],
)
def test_different_verdicts(tmp_path: Path, theirs: str, change: tuple[str, str], line: str) -> None:
    """A different verdict is named, and exit code 1."""
    result = compare(tmp_path, theirs, OURS.replace(*change))
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"DIFFERENT  {line}" in result.stdout


def test_nothing_to_compare(tmp_path: Path) -> None:
    """A program without results is a line on stderr and exit code 2."""
    result = compare(tmp_path, LINES, "")
    assert result.returncode == 2
    assert "gave no results" in result.stderr.splitlines()[-1]
