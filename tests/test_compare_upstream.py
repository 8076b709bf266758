# SPDX-License-Identifier: GPL-2.0-only
"""benchmarks/ reads what upstream's program prints, in all its forms, and tells any difference from ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# As Linux 6.12 prints it.
LINES = """\
Testing UFFDIO_API (with syscall)... done
Testing UFFDIO_API (with /dev/userfaultfd)... skipped [reason: cannot open userfaultfd handle]
Testing zeropage on anon... done
Testing wp-fork-pin on shmem... skipped [reason: Possible CONFIG_GUP_TEST missing or unprivileged]
Testing poison on hugetlb-private... failed [reason: SIGBUS count 3 (expected 4)]
Userfaults unit tests: pass=2, skip=2, fail=1 (total=5)
"""

# The same results as Linux 7.2 prints them.
KSELFTEST = """\
TAP version 13
1..5
ok 1 UFFDIO_API (with syscall)
ok 2 # SKIP UFFDIO_API (with /dev/userfaultfd) (cannot open userfaultfd handle)
ok 3 zeropage on anon
ok 4 # SKIP wp-fork-pin on shmem (Possibly CONFIG_GUP_TEST missing or unprivileged)
# failed reason: [SIGBUS count 3 (expected 4)]
not ok 5 poison on hugetlb-private
# Totals: pass:2 fail:1 xfail:0 xpass:0 skip:2 error:0
"""

# And as we do.
OURS = """\
TAP version 13
1..6
ok 1 UFFDIO_API (with syscall)
ok 2 UFFDIO_API (with /dev/userfaultfd) # SKIP /dev/userfaultfd: ENOENT
ok 3 zeropage on anon
ok 4 wp-fork-pin on shmem # SKIP CONFIG_GUP_TEST: /sys/kernel/debug/gup_test: ENOENT
# promise: a poisoned page raises SIGBUS
not ok 5 poison on hugetlb-private # TIMEOUT 30 seconds
ok 6 unregister-wakes on anon # XFAIL the kernel leaves the thread asleep
# Totals: pass:2 fail:1 xfail:1 xpass:0 skip:2 error:0
"""

OUTCOMES = {
    "UFFDIO_API (with syscall)": "ok",
    "UFFDIO_API (with /dev/userfaultfd)": "skip",
    "zeropage on anon": "ok",
    "wp-fork-pin on shmem": "skip",
    "poison on hugetlb-private": "fail",
}


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import benchmarks/upstream.py, which is no package's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import upstream  # noqa: PLC0415

    return upstream


@pytest.mark.parametrize("output", [LINES, KSELFTEST], ids=["lines", "kselftest"])
def test_upstreams_output(upstream: ModuleType, output: str) -> None:
    """Each verdict is read with its name and reason, whichever form the version prints."""
    verdicts, complete = upstream.parse(output)
    assert {name: verdict.outcome for name, verdict in verdicts.items()} == OUTCOMES
    assert verdicts["UFFDIO_API (with /dev/userfaultfd)"].reason == "cannot open userfaultfd handle"
    assert complete


def test_our_output(upstream: ModuleType) -> None:
    """Ours has the name first, and outcomes that upstream does not know."""
    verdicts, complete = upstream.parse(OURS)
    assert {name: verdict.outcome for name, verdict in verdicts.items()} == {
        **OUTCOMES,
        "unregister-wakes on anon": "xfail",
    }
    assert str(verdicts["poison on hugetlb-private"]) == "fail (TIMEOUT 30 seconds)"
    assert complete


@pytest.mark.parametrize("output", [LINES, KSELFTEST, OURS], ids=["lines", "kselftest", "ours"])
def test_early_end(upstream: ModuleType, output: str) -> None:
    """A program that died is not taken for one that ran to its end."""
    lines = output.splitlines(keepends=True)
    _, complete = upstream.parse("".join(lines[:4]))
    assert not complete


def test_death_within_a_case(upstream: ModuleType) -> None:
    """The case that upstream's program died in has no verdict."""
    verdicts, complete = upstream.parse("Testing zeropage on anon... done\nTesting events on anon... ")
    assert verdicts["events on anon"].outcome == "none"
    assert not complete


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
    """Ours is told to run what upstream has: by result, or by case where the result has no memory type."""
    compare(tmp_path, LINES, OURS)
    names = ["UFFDIO_API", "UFFDIO_API", "zeropage on anon", "wp-fork-pin on shmem", "poison on hugetlb-private"]
    expected = [argument for name in names for argument in ("-f", name)] + ["-n", "2"]
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
