# SPDX-License-Identifier: GPL-2.0-only
"""What a lack costs follows from the cases."""

from __future__ import annotations

import dataclasses

from tests.probe.helpers import AREA, capable, run
from uffd_selftests.machine.requirements import REQUIREMENTS
from uffd_selftests.mem_types import ANON, SHMEM
from uffd_selftests.probe import suite
from uffd_selftests.probe.report import Report


def names(results: list[suite.Expected], option: str) -> set[str]:
    """Return the names of the cases with a result that depends on an option."""
    return {each.case.name for each in results if option in each.options}


def test_results_are_those_of_a_run(results: list[suite.Expected]) -> None:
    """As many as --list shows."""
    assert len(results) == len(run("--list").stdout.splitlines())


def test_options_follow_from_the_cases(results: list[suite.Expected]) -> None:
    """From what a case declares, and from what the code names that it runs."""
    assert names(results, "GUP_TEST") == {each.case.name for each in results if "gup_test" in each.case.needs}
    assert set(suite.OPTIONS_OF_NEED) <= set(REQUIREMENTS)
    assert names(results, "MEM_SOFT_DIRTY") == {
        *("copy-soft-dirty", "move-soft-dirty", "move-huge-soft-dirty", "move-swapped-soft-dirty"),
        *("writeprotect-soft-dirty", "writeprotect-thp-soft-dirty", "writeprotect-swap-clear-refs"),
        *("rwprotect-soft-dirty", "rwprotect-thp-soft-dirty", "async-scan-soft-dirty"),
    }
    assert names(results, "HWPOISON_INJECT") == {
        *("continue-hardware-poison", "fork-broken-hugepage", "writeprotect-migrated", "writeprotect-thp-migrated"),
        *("writeprotect-folio-migrated", "rwprotect-folio-migrated", "rwprotect-folio-migrated-shared"),
        *("rwprotect-migrated", "rwprotect-migrated-waiter", "rwprotect-thp-migrated"),
    }
    assert names(results, "USERFAULTFD") == {each.case.name for each in results}
    assert "wp-unpopulated" in names(results, "PTE_MARKER_UFFD_WP")
    assert {each.mem for each in results if "HUGETLBFS" not in each.options} >= {ANON, SHMEM}


def test_costs(found: Report) -> None:
    """A lack that is declared is counted, for each result that it concerns."""
    facts = dataclasses.replace(capable(found.findings).facts, swap_total=0, gup_test="CONFIG_GUP_TEST: ENOENT")
    prospect = suite.prospect(facts, AREA, {"GUP_TEST", "MEM_SOFT_DIRTY"})
    costs = {shortage.name: shortage.results for shortage in prospect.shortages}
    assert costs["gup-test"] == prospect.dependent["GUP_TEST"] > 0
    assert costs["swap"] == prospect.dependent["SWAP"] > 0
    assert costs["swap"] <= prospect.skipped < prospect.results
    assert 0 < prospect.perhaps < prospect.dependent["MEM_SOFT_DIRTY"]  # of which one lacks swap anyway
