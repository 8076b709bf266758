# SPDX-License-Identifier: GPL-2.0-only
"""The suite under plain pytest: names, declarations and fixtures, and what the harness adds to pytest's reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.helpers import needs_userfaultfd

if TYPE_CHECKING:
    from tests.conftest import Starter, SuiteWriter
    from tests.harness.helpers import Run

pytest_plugins = ["pytester"]


def test_ids_and_keywords(run: Run) -> None:
    """The names in pytest carry variant and memory type; -k finds a case by its own name, hyphens and all."""
    text = """
    @uffd_case("wp-fork", variants=("plain", "with event"), mem=(ANON, HUGETLB))
    def test_wp_fork(variant, mem):
        pass

    @uffd_case("move", mem=(ANON,))
    def test_other_name(mem):
        pass
    """
    listed = run(text, "--collect-only", "-q").outlines
    assert [line.partition("::")[2] for line in listed if "::" in line] == [
        "test_wp_fork[plain-anon]",
        "test_wp_fork[plain-hugetlb]",
        "test_wp_fork[with event-anon]",
        "test_wp_fork[with event-hugetlb]",
        "test_other_name[anon]",
    ]
    listed = run(text, "--collect-only", "-q", "-k", "wp-fork and hugetlb or move").outlines
    chosen = [line.partition("[")[2] for line in listed if "::" in line]
    assert chosen == ["plain-hugetlb]", "with event-hugetlb]", "anon]"]


@pytest.mark.parametrize(
    ("declaration", "signature", "message"),
    [
        ('"c", mem=(ANON,)', "", "case c: mem is declared but not taken by test_it"),
        ('"c"', "mem", "case c: mem is taken but not declared by test_it"),
        ('"c"', "ctx", "case c: mem is taken but not declared by test_it"),
        ('"c", variants=("a",)', "", "case c: variant is declared but not taken by test_it"),
        ('"c"', "variant", "case c: variant is taken but not declared by test_it"),
    ],
)
def test_declaration_and_function_disagree(run: Run, declaration: str, signature: str, message: str) -> None:
    """A declaration that the function does not use, or misses, is an error of the author."""
    result = run(f"""
    @uffd_case({declaration})
    def test_it({signature}):
        pass
    """)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*{message}"])


@pytest.mark.parametrize("workers", ["0", "2"])
def test_name_clash(cli: Starter, suite: SuiteWriter, workers: str) -> None:
    """Two results of one name are refused, with both places."""
    path = suite.write("""
        @uffd_case("twin", mem=(ANON,))
        def test_one(mem):
            pass

        @uffd_case("twin", mem=(ANON, SHMEM))
        def test_two(mem):
            pass
    """)
    run = cli.run("-n", workers, "--", path)
    assert (run.code, run.stdout) == (2, "")
    assert "two results are named twin on anon: test_inner.py::test_one[anon] and test_inner.py::test_two[anon]" in (
        run.stderr
    )


@needs_userfaultfd
def test_context(run: Run) -> None:
    """A case gets areas of its memory type and of the wanted size, and a handle with its features."""
    result = run(
        """
    def before(ctx):
        assert ctx.nr_pages == 3

    @uffd_case("sized", mem=(ANON, SHMEM), pages=3, features=Feature.THREAD_ID, pre_alloc=before)
    def test_sized(ctx, mem):
        assert (ctx.mem, ctx.nr_pages, ctx.features) == (mem, 3, Feature.THREAD_ID)

    @uffd_case("default", mem=(ANON,))
    def test_default(ctx):
        assert ctx.nr_pages * ctx.mem.page_size == 8 << 20
    """,
        "--area-mib=8",
    )
    result.assert_outcomes(passed=3)


@needs_userfaultfd
def test_known_defect(run: Run) -> None:
    """A defect excuses the failed assertion that it causes, and nothing else."""
    defect = "defect=Defect('D-X-1', 'it sleeps on', '6.18', 'wake it', 'expected 0, got 1')"
    result = run(
        f"""
    @uffd_case("asserts", {defect})
    def test_asserts():
        raise AssertionError("asleep: expected 0, got 1")

    @uffd_case("asserts-other", {defect})
    def test_asserts_other():
        raise AssertionError("asleep: expected 0, got 2")

    @uffd_case("asserts-with-fixture", {defect})
    def test_asserts_with_fixture(tmp_path):
        raise AssertionError("asleep: expected 0, got 1")

    @uffd_case("asserts-other-with-fixture", {defect})
    def test_asserts_other_with_fixture(tmp_path):
        raise AssertionError("asleep: expected 0, got 2")

    @uffd_case("raises", {defect})
    def test_raises():
        raise OSError

    @uffd_case("repaired", {defect})
    def test_repaired():
        pass
    """,
        "-rx",
    )
    result.assert_outcomes(xfailed=2, failed=3, xpassed=1)
    result.stdout.fnmatch_lines(["XFAIL * - D-X-1: it sleeps on*"])


@needs_userfaultfd
def test_strict_defects(run: Run) -> None:
    """With --strict-defects a known defect excuses nothing."""
    case = """
    @uffd_case("asserts", defect=Defect('D-X-1', 'it sleeps on', '6.18', 'wake it', ''))
    def test_asserts():
        assert False
    """
    run(case, "--strict-defects").assert_outcomes(failed=1)


@needs_userfaultfd
def test_skip_from_anywhere(run: Run) -> None:
    """Skip, raised in a case or in its hooks, is a skip with that reason, located at the case."""
    result = run(
        """
    def lacking(ctx):
        raise Skip("needs a bigger machine")

    @uffd_case("early", mem=(ANON,), pages=1, pre_alloc=lacking)
    def test_early(ctx):
        pass

    @uffd_case("late")
    def test_late():
        raise Skip("needs a bigger machine")
    """,
        "-rs",
    )
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED * test_skip_from_anywhere.py:*: needs a bigger machine"])
