# SPDX-License-Identifier: GPL-2.0-only
"""A result tells how its case ended, in whichever way it was run."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest

from tests.helpers import either_way, needs_userfaultfd

if TYPE_CHECKING:
    from tests.conftest import Starter, SuiteWriter


@needs_userfaultfd
def test_worker_dies(cli: Starter, suite: SuiteWriter) -> None:
    """A worker that dies takes only the case along that killed it; the plan is kept."""
    path = suite.write("""
        @uffd_case("killer")
        def test_killer():
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1000)

        @uffd_case("bystander", variants=tuple("abcdef"))
        def test_bystander(variant):
            pass
    """)
    run = cli.run("-n", "2", "--", path)
    assert run.code == 1
    outcomes = run.outcomes
    assert outcomes.pop("killer") == "error"
    assert set(outcomes.values()) == {"pass"}
    assert len(outcomes) == 6
    assert run.survivors() == []


@needs_userfaultfd
@pytest.mark.parametrize("way", [["--case-file"], ["--", "--tb=no"], ["--"]], ids=["serial", "hidden", "shown"])
def test_what_a_failure_says(cli: Starter, suite: SuiteWriter, way: list[str]) -> None:
    """A failure tells promise, error, place and output, whether or not pytest's own words are shown as well."""
    path = suite.write("""
        @uffd_case("fails")
        def test_fails():
            '''The kernel keeps its word. And more.'''
            print("said")
            raise AssertionError("expected EEXIST; the call succeeded")
    """)
    run = cli.run(*way, path)
    promise, error, place, *output = run.results["fails"]["diagnostics"]
    assert promise == "promise: The kernel keeps its word."
    assert error == "AssertionError: expected EEXIST; the call succeeded"
    assert re.fullmatch(rf"at (.*/)?{os.path.basename(path)}:[0-9]+", place)
    assert output == ["Captured stdout:", "  said"]


@needs_userfaultfd
@pytest.mark.parametrize("way", [["--case-file"], ["--"], ["-n", "2", "--"]], ids=["serial", "pytest", "workers"])
def test_which_form_came(cli: Starter, suite: SuiteWriter, way: list[str]) -> None:
    """A pass tells which of several documented forms the kernel has, each once, and nothing else that was printed."""
    path = suite.write("""
        from uffd_selftests.common import expect_one_of, saw

        @uffd_case("differs")
        def test_differs():
            print("said")
            for _ in range(3):
                expect_one_of("EBUSY", ("EBUSY", "success"), "dropping WP")
            saw("no hole counts")
    """)
    run = cli.run(*way, path)
    assert run.results["differs"]["diagnostics"] == ["saw: dropping WP: EBUSY", "saw: no hole counts"]
    assert "# saw: dropping WP: EBUSY\n# saw: no hole counts\nok 1 differs" in run.stdout


@needs_userfaultfd
@either_way
def test_ways_to_end(cli: Starter, suite: SuiteWriter, way: list[str]) -> None:
    """Each way to run a case tells the same of how it ended; no case hears of another's end or output."""
    path = suite.write("""
        import sys
        from uffd_selftests.common import Skip, Uffd

        @uffd_case("ends", variants=("pass", "print", "assert", "skip", "leak", "signal", "exit", "hang", "pass again"))
        def test_ends(variant):
            global uffd
            if variant == "print":
                print("said")
                sys.stderr.write("complained")
            elif variant == "assert":
                assert len(variant) == 7
            elif variant == "skip":
                raise Skip("nothing: get some")
            elif variant == "leak":
                uffd = Uffd.open()
            elif variant == "signal":
                print("never heard of again")
                os.kill(os.getpid(), signal.SIGSEGV)
            elif variant == "exit":
                os._exit(3)
            elif variant == "hang":
                time.sleep(1000)
    """)
    run = cli.run("--deadline", "4", *way, path)
    told = {name[6:-1]: (result["outcome"], result["reason"]) for name, result in run.results.items()}
    assert told == {
        "pass": ("pass", ""),
        "print": ("pass", ""),
        "assert": ("fail", ""),
        "skip": ("skip", "nothing: get some"),
        "leak": ("fail", ""),
        "signal": ("error", "killed by SIGSEGV"),
        "exit": ("error", "exited with status 3 before its reports"),
        "hang": ("timeout", "4 seconds"),
        "pass again": ("pass", ""),
    }
    lines = {name[6:-1]: "\n".join(result["diagnostics"]) for name, result in run.results.items()}
    assert "AssertionError: assert " in lines["assert"] or "assert 6 == 7" in lines["assert"]
    assert "left behind: userfaultfd" in lines["leak"]
    assert "never heard of again" in lines["signal"]
    assert "said" not in "".join(lines.values())
    assert run.survivors() == []
