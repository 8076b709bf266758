# SPDX-License-Identifier: GPL-2.0-only
"""A run ends with the exit code that fits, and nobody but KTAP has stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.helpers import needs_userfaultfd

if TYPE_CHECKING:
    from tests.conftest import Starter, SuiteWriter


# ---- nothing to run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
def test_nothing_matches(cli: Starter, workers: str) -> None:
    """A filter that leaves nothing is a mistake, too: a green run must not be an empty one."""
    run = cli.run("-f", "nonesuch", "-k", "neither", "-n", workers)
    assert (run.code, run.stdout) == (2, "")
    assert run.stderr == "uffd-selftests: nothing matches the given -f nonesuch and -k neither\n"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_case_file_that_does_not_load(cli: Starter, suite: SuiteWriter, workers: str) -> None:
    """A broken file of cases fails the run and is named."""
    path = suite.write("raise RuntimeError('half written')")
    run = cli.run("-n", workers, "--", path)
    assert run.code == 1
    assert "uffd-selftests: cannot collect test_inner.py" in run.stderr
    assert run.stdout == "TAP version 13\nBail out! cannot collect test_inner.py: RuntimeError: half written\n"


# ---- exit codes -----------------------------------------------------------------------------------------------------


@needs_userfaultfd
@pytest.mark.parametrize("workers", ["0", "2"])
def test_nothing_could_be_tested(cli: Starter, suite: SuiteWriter, workers: str) -> None:
    """A run in which everything is skipped has its own exit code."""
    path = suite.write("""
        @uffd_case("impossible", features=Feature(1 << 60), mem=(ANON, SHMEM))
        def test_impossible(ctx):
            raise RuntimeError("must not run")
    """)
    run = cli.run("-n", workers, "--", path)
    assert run.code == 4
    assert run.outcomes == {"impossible on anon": "skip", "impossible on shmem": "skip"}
    assert run.results["impossible on anon"]["reason"] == "kernel lacks bit 60"
    assert "nothing could be tested" in run.stderr


@needs_userfaultfd
def test_failure_is_not_masked(cli: Starter, suite: SuiteWriter) -> None:
    """One failure among skips fails the run."""
    path = suite.write("""
        @uffd_case("skips")
        def test_skips():
            pytest.skip("why not")

        @uffd_case("fails")
        def test_fails():
            '''The kernel does as it says.'''
            raise AssertionError("pages: expected 3, got 2")
    """)
    run = cli.run("--", path)
    assert run.code == 1
    assert run.stdout.splitlines()[3:] == [
        "ok 1 skips # SKIP why not",
        "# promise: The kernel does as it says.",
        "# AssertionError: pages: expected 3, got 2",
        "# at test_inner.py:15",
        "not ok 2 fails",
        "# Totals: pass:0 fail:1 xfail:0 xpass:0 skip:1 error:0",
    ]


@needs_userfaultfd
def test_stop_at_first_failure(cli: Starter, suite: SuiteWriter) -> None:
    """With pytest's -x the rest is called off, not failed."""
    path = suite.write("""
        @uffd_case("fails", variants=tuple("abc"))
        def test_fails(variant):
            assert False
    """)
    run = cli.run("--", path, "-x")
    assert run.code == 1
    assert run.stdout.splitlines()[-1] == "Bail out! stopping after 1 failures"


# ---- independence ---------------------------------------------------------------------------------------------------


@needs_userfaultfd
def test_strangers_do_not_interfere(cli: Starter, suite: SuiteWriter) -> None:
    """Another project's pytest configuration, in the folder or the environment, is not picked up."""
    (cli.folder / "pytest.ini").write_text("[pytest]\naddopts = --nonexistent\npython_functions = nothing_*\n")
    (cli.folder / "conftest.py").write_text("raise RuntimeError('not mine')\n")
    inner = cli.folder / "cases"
    inner.mkdir()
    suite.path = inner / "test_inner.py"
    run = cli.run("-f", "varies", "-l", env={"PYTEST_ADDOPTS": "--nonexistent", "PYTEST_PLUGINS": "nonexistent"})
    assert (run.code, run.stderr) == (2, "uffd-selftests: nothing matches the given -f varies\n")


@needs_userfaultfd
def test_stdout_is_ktap_only(cli: Starter, suite: SuiteWriter) -> None:
    """Nothing that pytest, a case or a plugin prints comes to stdout; without arguments for pytest stderr is empty."""
    path = suite.write("""
        print("while collecting")
        os.write(1, b"ok 1 forged while collecting\\n")

        @uffd_case("noisy")
        def test_noisy(capfd):
            with capfd.disabled():
                os.write(1, b"ok 1 forged\\n")
            print("noise")
            os.system("echo ok 2 forged")
    """)
    for more in ([], ["-s"]):
        run = cli.run("--", path, *more)
        assert [line for line in run.stdout.splitlines() if not line.startswith("#")] == [
            "TAP version 13",
            "1..1",
            "ok 1 noisy",
        ]
