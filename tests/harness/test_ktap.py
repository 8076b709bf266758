# SPDX-License-Identifier: GPL-2.0-only
"""KTAP comes out as its readers want it, among them prove and the kernel's kunit.py."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tap.parser import Parser  # type: ignore[import-untyped]

from tests.harness.readers import BAD, GOOD, document, linux
from uffd_selftests.harness import ktap
from uffd_selftests.harness.results import Planned, Result


def result(name: str, outcome: str, reason: str = "", *diagnostics: str) -> Result:
    """Return a result without a test."""
    return Result(Planned(name, name, name), outcome, reason, list(diagnostics))


@pytest.mark.parametrize(
    ("outcome", "reason", "line"),
    [
        ("pass", "", "ok 7 move on anon"),
        ("fail", "", "not ok 7 move on anon"),
        ("skip", "kernel lacks UFFD_FEATURE_MOVE", "ok 7 move on anon # SKIP kernel lacks UFFD_FEATURE_MOVE"),
        ("xfail", "D-UNR-11: sleeps on", "ok 7 move on anon # XFAIL D-UNR-11: sleeps on"),
        ("xpass", "", "ok 7 move on anon # XPASS"),
        ("timeout", "30 seconds", "not ok 7 move on anon # TIMEOUT 30 seconds"),
        ("error", "killed by SIGBUS", "not ok 7 move on anon # ERROR killed by SIGBUS"),
        ("skip", "line one\nline two # TODO", "ok 7 move on anon # SKIP line one line two \\# TODO"),
    ],
)
def test_result_line(outcome: str, reason: str, line: str) -> None:
    """Each outcome has its line; nothing in a reason breaks it."""
    assert ktap.result_line(7, result("move on anon", outcome, reason)) == line


def test_name_without_hash() -> None:
    """A name with a number sign would end there for the kernel's parser."""
    assert ktap.result_line(1, result("a # b\nc", "pass")) == "ok 1 a b c"


def test_run() -> None:
    """A run has its version and plan first, diagnostics before their result, totals last, and numbers in order."""
    stream = io.StringIO()
    writer = ktap.Writer(stream)
    writer.plan(2, ["Linux 7.0"])
    writer.result(result("first", "fail", "", "promise: it works.", "two\nlines"))
    writer.result(result("second", "pass"))
    writer.totals({"fail": 1, "pass": 1, "timeout": 2})
    assert stream.getvalue().splitlines() == [
        "TAP version 13",
        "1..2",
        "# Linux 7.0",
        "# promise: it works.",
        "# two",
        "# lines",
        "not ok 1 first",
        "ok 2 second",
        "# Totals: pass:1 fail:3 xfail:0 xpass:0 skip:0 error:0",
    ]


def test_independent_reader() -> None:
    """tap.py reads what was meant."""
    stream = io.StringIO()
    writer = ktap.Writer(stream)
    writer.plan(3)
    writer.result(result("wp-fork-pin on shmem", "skip", "CONFIG_GUP_TEST: ENOENT"))
    writer.result(result("UFFDIO_API (with /dev/userfaultfd)", "pass"))
    writer.result(result("events on anon", "timeout", "30 seconds"))
    writer.bail_out("interrupted by SIGINT")
    version, plan, *tests, bail = Parser().parse_text(stream.getvalue())
    assert (version.version, plan.expected_tests, bail.reason) == (13, 3, "interrupted by SIGINT")
    assert [(test.number, test.ok, test.skip) for test in tests] == [
        (1, True, True),
        (2, True, False),
        (3, False, False),
    ]
    assert tests[1].description == "UFFDIO_API (with /dev/userfaultfd)"


def test_broken_pipe() -> None:
    """When a reader goes away, the other stream still gets everything, and the caller hears of it once."""
    reader, writing = os.pipe()
    os.close(reader)
    kept = io.StringIO()
    with contextlib.suppress(BrokenPipeError), open(writing, "w") as broken:  # closing it fails as well
        writer = ktap.Writer(broken, kept)
        with pytest.raises(BrokenPipeError):
            writer.plan(1)
        writer.result(result("only", "pass"))
    assert kept.getvalue() == "TAP version 13\n1..1\nok 1 only\n"


def test_full_stream() -> None:
    """A stream on a full disk is given up and remembered; the others go on."""
    good = io.StringIO()
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # closing it fails as well
        writer = ktap.Writer(full, good)
        writer.plan(1)
        writer.result(result("a", "pass"))
        assert writer.failure is not None
        assert writer.failure.errno == errno.ENOSPC
    assert good.getvalue().splitlines() == ["TAP version 13", "1..1", "ok 1 a"]


# ---- prove, kunit.py ------------------------------------------------------------------------------------------------


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
