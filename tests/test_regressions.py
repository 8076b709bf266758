# SPDX-License-Identifier: GPL-2.0-only
"""The bugs and the cases agree: no bug is forgotten, none is invented, and the document is up to date."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uffd_selftests import regressions
from uffd_selftests.bugs import known_bugs, untested
from uffd_selftests.contract import declared

if TYPE_CHECKING:
    from tests.conftest import Starter, SuiteWriter

DOCUMENT = Path(__file__).parent.parent / "docs" / "regressions.md"


def test_every_bug_has_a_case_or_a_reason() -> None:
    """A bug that no case cites is in the table of those that none looks for, and only such a bug."""
    cited = set(regressions.cases_by_bug())
    assert sorted(cited & set(untested())) == []
    assert sorted(cited | set(untested())) == sorted(known_bugs())


def test_cases_that_may_hang_the_kernel_name_the_bug() -> None:
    """Nobody is asked to risk a machine without being told for which bug."""
    assert [one.case.name for one in declared() if one.case.may_hang_kernel and not one.case.bugs] == []


def test_document_is_up_to_date() -> None:
    """docs/regressions.md is what the declarations make of it."""
    assert DOCUMENT.read_text() == regressions.document(), (
        "python -m uffd_selftests.regressions > docs/regressions.md"
    )


RISKY = """
    @uffd_case("risky", bugs=(34,), may_hang_kernel=True)
    def test_risky():
        '''It returns.'''
        assert {result}

    @uffd_case("harmless", bugs=(28,))
    def test_harmless():
        '''It is harmless.'''
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_may_hang_the_kernel_must_be_asked_for(cli: Starter, suite: SuiteWriter, workers: str) -> None:
    """Without --may-hang-kernel it is skipped, with the reason; it comes last in any case."""
    run = cli.run("-n", workers, "--", suite.write(RISKY.format(result=True)))
    assert run.code == 0
    assert run.outcomes == {"risky": "skip", "harmless": "pass"}
    assert "--may-hang-kernel, on a machine to spare" in run.results["risky"]["reason"]
    assert workers != "0" or list(run.outcomes) == ["harmless", "risky"]


@pytest.mark.parametrize("option", [True, False])
def test_what_may_hang_the_kernel_can_be_asked_for(cli: Starter, suite: SuiteWriter, option: bool) -> None:
    """With the option, or the variable, it runs; a failure tells which bug looks like that, and what fixes it."""
    args, env = (["--may-hang-kernel"], {}) if option else ([], {"UFFD_MAY_HANG_KERNEL": "1"})
    run = cli.run(*args, "--", suite.write(RISKY.format(result=False)), env=env)
    assert run.code == 1
    assert run.outcomes == {"harmless": "pass", "risky": "fail"}
    assert run.results["risky"]["bugs"] == [34]
    assert [line for line in run.results["risky"]["diagnostics"] if line.startswith("bug 34 (6.7 to 7.1) looks like")]


def test_bad_variable(cli: Starter) -> None:
    """A value that is neither yes nor no is a usage error."""
    run = cli.run("-l", env={"UFFD_MAY_HANG_KERNEL": "maybe"})
    assert (run.code, run.stdout) == (2, "")
    assert run.stderr.splitlines() == ["uffd-selftests: UFFD_MAY_HANG_KERNEL: 'maybe' is neither 0 nor 1"]
