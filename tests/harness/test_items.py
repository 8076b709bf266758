# SPDX-License-Identifier: GPL-2.0-only
"""Plain cases are collected in a way of their own, which finds what pytest's finds, under the same names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from uffd_selftests import cases
from uffd_selftests.catalog.contract import declared
from uffd_selftests.harness.items import DECLARED, results

if TYPE_CHECKING:
    from tests.conftest import Starter, SuiteWriter
    from tests.harness.helpers import Run

pytest_plugins = ["pytester"]

FOLDER = Path(cases.__file__).parent
TWO_CASES = """
    @uffd_case("plain", mem=(ANON, SHMEM), variants=("one", "two"), pages=1)
    def test_plain(ctx, variant):
        ctx.dst.expect_zero()

    @uffd_case("other")
    def test_other():
        pass
"""


def test_variants_of_another_kernel() -> None:
    """Variants that another kernel has take the place of those that this one has."""
    case = next(one.case for one in declared() if one.case.variants and not one.case.mem)
    assert [variant for variant, _ in results(case)] == list(case.variants)
    assert [variant for variant, _ in results(case, ["2048 kB"])] == ["2048 kB"]


def test_names_stand_in_the_text() -> None:
    """What a file declares is found in its text, so that a filter passes over files without loading them."""
    by_path: dict[str, set[str]] = {}
    for one in declared():
        by_path.setdefault(one.path, set()).add(one.case.name)
    for path, names in by_path.items():
        assert set(DECLARED.findall((FOLDER.parent.parent / path).read_text())) == names, path


def test_every_way_lists_the_same(cli: Starter) -> None:
    """The suite's results are those that its declarations make, with and without a filter."""
    everything = [one.case.result_name(*result) for one in declared() for result in results(one.case)]
    assert sorted(cli.run("-l").stdout.splitlines()) == sorted(everything)
    for part, wanted in (
        ("wp-fork", [name for name in everything if "wp-fork" in name.partition(" on ")[0].partition(" (")[0]]),
        ("zeropage on anon", [name for name in everything if "zeropage on anon" in name]),
        ("=zeropage on anon", ["zeropage on anon"]),
        ("=UFFDIO_API (with syscall)", ["UFFDIO_API (with syscall)"]),
        ("=UFFDIO_API", []),
        ("poll) on shmem", [name for name in everything if "poll) on shmem" in name]),
    ):
        assert sorted(cli.run("-l", "-f", part).stdout.splitlines()) == sorted(wanted), part


def test_ids_are_those_of_pytest(run: Run) -> None:
    """A file that pytest has to collect itself, for its fixture's sake, has the same ids."""
    ours = run(TWO_CASES, "--collect-only", "-q")
    theirs = run("    @pytest.fixture\n    def mine(): pass\n" + TWO_CASES, "--collect-only", "-q")
    names = [line for line in ours.outlines if "::" in line]
    assert names == [line for line in theirs.outlines if "::" in line]
    assert [name.partition("::")[2] for name in names] == [
        *(f"test_plain[{variant}-{mem}]" for variant in ("one", "two") for mem in ("anon", "shmem")),
        "test_other",
    ]


def test_what_pytest_has_to_run(run: Run) -> None:
    """Markers, fixtures and set-up functions of a file, and tests that are no cases, are heeded."""
    result = run(
        """
    ran = []

    def setup_module(): ran.append("module")

    @pytest.fixture(autouse=True)
    def always(): ran.append("always")

    @pytest.mark.skipif(True, reason="marked")
    @uffd_case("marked")
    def test_marked(): pass

    @uffd_case("fixture")
    def test_fixture(tmp_path): assert tmp_path.is_dir()

    def test_no_case(): assert ran[:2] == ["module", "always"]

    class TestMore:
        def test_in_class(self): pass
    """
    )
    result.assert_outcomes(passed=3, skipped=1)


def test_failure_is_shown_from_the_case_on(run: Run) -> None:
    """What pytest says of a failure begins in the case, isolated or not."""
    for way in ((), ("--no-isolation",)):
        result = run(
            """
    @uffd_case("fails")
    def test_fails():
        number = 1
        assert number == 2
    """,
            *way,
        )
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*assert number == 2*"])
        result.stdout.no_fnmatch_line("*harness/items.py*")


def test_a_filter_passes_over_what_it_does_not_load(cli: Starter, suite: SuiteWriter) -> None:
    """A file is loaded although no filter is in its text when a name there is not plain."""
    other = suite.path.with_name("test_other.py")
    other.write_text(
        'from uffd_selftests.case import uffd_case\nraise SystemError\n@uffd_case("other")\ndef test_other(): pass\n'
    )
    path = suite.write("""
        for number in (1, 2):
            @uffd_case(f"made-{number}")
            def test_made(): pass
    """)
    assert cli.run("-l", "-f", "made-2", "--case-file", path).stdout.splitlines() == ["made-2"]
    assert cli.run("-l", "-f", "made-2", "--case-file", str(suite.path.parent)).stdout.splitlines() == ["made-2"]
    assert "SystemError" in cli.run("-l", "-f", "other", "--case-file", str(suite.path.parent)).stderr
    run = cli.run("-l", "-f", "nothing", "--case-file", path)
    assert (run.code, run.stdout) == (2, "")
    assert "nothing matches" in run.stderr
