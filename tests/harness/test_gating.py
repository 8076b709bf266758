# SPDX-License-Identifier: GPL-2.0-only
"""What a result lacks is named, whoever wants it can require it, and nothing risky runs unasked."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from tests.helpers import FACTS, needs_userfaultfd
from uffd_selftests.abi.uapi import Feature
from uffd_selftests.case import Case
from uffd_selftests.harness import gating
from uffd_selftests.mem_types import ANON, HUGETLB, SHMEM

if TYPE_CHECKING:
    from tests.conftest import Starter, SuiteWriter
    from uffd_selftests.mem_types import MemType


def test_everything_missing_is_named() -> None:
    """A reason names all that is missing, each with its remedy."""
    facts = dataclasses.replace(FACTS, features=Feature.SIGBUS, swap_total=0, access={"syscall": None}, hugepage_size=0)
    case = Case("c", mem=(HUGETLB,), features=Feature.SIGBUS | Feature.MOVE | Feature(1 << 60), needs=("swap",))
    found = gating.missing(case, HUGETLB, facts)
    assert [thing.name for thing in found] == ["move", "bit-60", "swap", "hugetlb"]
    sentence = gating.sentence(found)
    assert "kernel lacks UFFD_FEATURE_MOVE (Linux 6.8); kernel lacks bit 60; no swap space" in sentence
    assert "CONFIG_HUGETLBFS" in sentence


def test_nothing_missing() -> None:
    """A case without wishes runs wherever there is a userfaultfd."""
    facts = dataclasses.replace(FACTS, access={"syscall": None})
    assert gating.missing(Case("c"), None, facts) == []


@pytest.mark.parametrize(
    ("case", "mem", "pages"),
    [
        (Case("default"), ANON, 0),
        (Case("default"), SHMEM, 0),
        (Case("sized", pages=3), HUGETLB, 6),
        (Case("sized", pages=3, spare_hugepages=2), HUGETLB, 8),
        (Case("sized", pages=3, spare_hugepages=2), ANON, 0),
        (Case("own mappings", spare_hugepages=2), None, 2),
    ],
)
def test_hugepages_needed(case: Case, mem: MemType | None, pages: int) -> None:
    """Two areas and what the case adds; nothing on other memory types."""
    assert gating.hugepages_needed(case, mem, 32 << 20) == pages


def test_requirement_names() -> None:
    """Features go by their kernel names without prefix, requirements by theirs."""
    assert gating.parse_requirements("wp, MINOR_SHMEM,gup-test,") == {"wp", "minor-shmem", "gup-test"}
    assert gating.parse_requirements("") == frozenset()
    with pytest.raises(ValueError, match=r"unknown requirement bogus, wb; there are .*minor-shmem.*wp"):
        gating.parse_requirements("wb,bogus,wp")


# ---- in a run -------------------------------------------------------------------------------------------------------


@needs_userfaultfd
@pytest.mark.skipif(Feature.RWP in FACTS.features, reason="the kernel has what this wants to miss")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_required_feature(cli: Starter, suite: SuiteWriter, workers: str) -> None:
    """What is required must not be skipped for lack of it; what is skipped for another reason may be."""
    path = suite.write("""
        @uffd_case("future", features=Feature.RWP | Feature(1 << 60))
        def test_future():
            raise RuntimeError("must not run")

        @uffd_case("distant", features=Feature(1 << 60))
        def test_distant():
            raise RuntimeError("must not run")
    """)
    run = cli.run("-n", workers, "--require", "rwp", "--", path)
    assert run.code == 1
    assert run.outcomes == {"future": "fail", "distant": "skip"}
    why = "Failed: rwp is required: kernel lacks UFFD_FEATURE_RWP (Linux "
    assert run.results["future"]["diagnostics"][0].startswith(why)


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
