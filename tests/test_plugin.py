# SPDX-License-Identifier: GPL-2.0-only
"""The suite under plain pytest: names, gates, fixtures, and what the harness adds to pytest's reports."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from uffd_selftests import kernel
from uffd_selftests.case import Case
from uffd_selftests.harness import gating, health, proc, runner, steward
from uffd_selftests.harness.health import KernelLog
from uffd_selftests.harness.results import Planned
from uffd_selftests.machine import HugepageCounts
from uffd_selftests.mem_types import ANON, HUGETLB, SHMEM
from uffd_selftests.uapi import Feature

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from uffd_selftests.mem_types import MemType

    Run = Callable[..., pytest.RunResult]

pytest_plugins = ["pytester"]

FACTS = kernel.probe()
UNAVAILABLE = kernel.no_userfaultfd(FACTS)
needs_userfaultfd = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

PREAMBLE = """
    import os, sys, time
    import pytest
    from uffd_selftests.case import Defect, Kind, uffd_case
    from uffd_selftests.common import Skip
    from uffd_selftests.mem_types import ALL, ANON, HUGETLB, SHMEM
    from uffd_selftests.uapi import Feature
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest on a text in this process; its cases run in children all the same."""
    for name in ("PYTEST_ADDOPTS", "UFFD_DEADLINE", "UFFD_REQUIRE", "UFFD_AREA_MIB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UFFD_DEADLINE_SCALE", "1")

    def run(text: str, *args: str) -> pytest.RunResult:
        pytester.makepyfile(PREAMBLE + text)
        return pytester.runpytest_inprocess("-p", "uffd_selftests.harness.plugin", "-p", "no:cacheprovider", *args)

    return run


# ---- declarations ---------------------------------------------------------------------------------------------------


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


# ---- gates ----------------------------------------------------------------------------------------------------------


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


@needs_userfaultfd
@pytest.mark.skipif(not FACTS.hugepage_size, reason="the kernel has no huge pages")
@pytest.mark.parametrize("required", [False, True])
def test_too_few_hugepages(run: Run, monkeypatch: pytest.MonkeyPatch, required: bool) -> None:
    """Without enough huge pages a result is skipped with the numbers, or failed if they were required."""
    reason = "needs 34 free huge pages of 2048 kB, 10 free: echo 34 > nr_hugepages"
    monkeypatch.setattr(runner, "lack_of_hugepages", lambda _, needed: reason if needed == 34 else None)
    monkeypatch.setattr(kernel, "HugepagePool", FakePool)
    result = run(
        """
    @uffd_case("big", mem=(HUGETLB,), pages=16, spare_hugepages=2)
    def test_big(ctx):
        raise RuntimeError("must not run")
    """,
        "-rsE",
        *(["--require=hugepages"] if required else []),
    )
    result.assert_outcomes(**{"errors" if required else "skipped": 1})
    result.stdout.fnmatch_lines([f"*{reason}"])


class FakePool:
    """A pool that can give nothing."""

    def __init__(self, size: int, wanted: int) -> None:
        self.size, self.wanted, self.added = size, wanted, 0
        self.shortage: str | None = "no memory"

    def __enter__(self) -> FakePool:
        """Give nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take nothing back."""


# ---- isolation under pytest's reports -------------------------------------------------------------------------------


@needs_userfaultfd
@pytest.mark.parametrize("isolation", [[], ["--no-isolation"]], ids=["isolated", "in process"])
def test_isolation_can_be_seen(run: Run, isolation: list[str]) -> None:
    """Cases run in children unless --no-isolation says otherwise; other tests do not."""
    here = "==" if isolation else "!="
    result = run(
        f"""
    me = os.getpid()

    @uffd_case("case")
    def test_case():
        assert os.getpid() {here} me

    def test_other():
        assert os.getpid() == me

    @pytest.mark.isolated
    def test_marked():
        assert os.getpid() {here} me
    """,
        *isolation,
    )
    result.assert_outcomes(passed=3)


@needs_userfaultfd
def test_cases_share_a_process(run: Run, pytester: pytest.Pytester) -> None:
    """The cases of a file run in one process, until one fails or changes it."""
    text = """
    def note(name):
        with open("log", "a") as file:
            print(name, os.getpid(), file=file)

    @uffd_case("share", variants=("a", "b", "c"))
    def test_share(variant):
        note("share")

    @uffd_case("change", mem=(ANON, SHMEM))
    def test_change(mem):
        note("change")
        os.umask(0o777)

    @uffd_case("fail", mem=(ANON, SHMEM))
    def test_fail(mem):
        note("fail")
        raise AssertionError
    """
    run(text).assert_outcomes(passed=5, failed=2)
    pids: dict[str, set[str]] = {}
    for line in (pytester.path / "log").read_text().splitlines():
        name, pid = line.split()
        pids.setdefault(name, set()).add(pid)
    assert {name: len(found) for name, found in pids.items()} == {"share": 1, "change": 2, "fail": 2}
    assert pids["share"] & pids["change"]
    assert not (pids["share"] | pids["change"]) & pids["fail"]


@needs_userfaultfd
@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["serial", "workers"])
def test_subtests(run: Run, workers: list[str]) -> None:
    """A failing subtest fails the run; its report crosses the pipe."""
    if tuple(map(int, pytest.__version__.split(".")[:2])) < (9, 0):
        pytest.skip("subtests came with pytest 9")
    result = run(
        """
    @uffd_case("parts")
    def test_parts(subtests):
        for i in range(3):
            with subtests.test(i=i):
                assert i != 1
    """,
        *workers,
    )
    assert result.ret == 1
    result.stdout.fnmatch_lines(["SUBFAILED(i=*1*", "*1 failed*"])


@needs_userfaultfd
def test_properties_and_sections_survive(run: Run, pytester: pytest.Pytester) -> None:
    """What a test records and prints is in the reports of its process."""
    result = run(
        """
    @uffd_case("records")
    def test_records(record_property, caplog):
        record_property("faults", 17)
        print("printed")
        print("complained", file=sys.stderr)
        assert False
    """,
        "--junitxml=junit.xml",
    )
    result.stdout.fnmatch_lines(["*Captured stdout call*", "printed", "*Captured stderr call*", "complained"])
    assert 'name="faults" value="17"' in (pytester.path / "junit.xml").read_text()


@needs_userfaultfd
@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["serial", "workers"])
def test_timeout_in_pytests_words(run: Run, workers: list[str]) -> None:
    """The report of a hang in pytest's own output has the evidence, too."""
    result = run(
        """
    @uffd_case("hangs")
    def test_hangs():
        time.sleep(1000)
    """,
        "--deadline=0.3",
        *workers,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["TIMEOUT 0.3 seconds", "task * S in *"])


@needs_userfaultfd
def test_deadline_scale(run: Run) -> None:
    """One factor stretches all deadlines."""
    result = run(
        """
    @uffd_case("hangs")
    def test_hangs():
        time.sleep(1000)
    """,
        "--deadline=0.1",
        "--deadline-scale=3",
    )
    result.stdout.fnmatch_lines(["TIMEOUT 0.3 seconds"])


# ---- health ---------------------------------------------------------------------------------------------------------

COMPLAINT = "[    1.000000] BUG: Bad page state in process python3"
LOGGED = f"kernel log: {COMPLAINT}".replace("[", "[[]")  # as a pattern
LOGGING = """
    @uffd_case("first")
    def test_first():
        pass

    @uffd_case("guilty")
    def test_guilty():
        open("log", "w").close()

    @uffd_case("last")
    def test_last():
        pass
"""


@pytest.fixture
def fake_log(monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester) -> Path:
    """Let the kernel complain when a file appears: everybody who reads the log sees that once."""
    log = pytester.path / "log"
    told = set()

    def read(reader: KernelLog) -> list[str]:
        if not log.exists() or reader in told:
            return []
        told.add(reader)
        return [COMPLAINT, "[    1.000001] Call Trace:"]

    monkeypatch.setattr(KernelLog, "read", read)
    return log


@needs_userfaultfd
@pytest.mark.usefixtures("fake_log")
def test_kernel_complaint_fails_the_case(run: Run) -> None:
    """Serially, the case in which the kernel complained fails, and no other."""
    result = run(LOGGING, "-v")
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*::test_guilty ERROR*", f"the kernel complained: {LOGGED}"])


@needs_userfaultfd
@pytest.mark.usefixtures("fake_log")
def test_kernel_complaint_in_a_shared_process(run: Run) -> None:
    """A complaint at the end of a process may be the doing of all the results that it ran; the next one is new."""
    text = """
    @uffd_case("case", variants=("a", "b", "c"))
    def test_case(variant):
        if variant == "b":
            open("log", "w").close()
    """
    result = run(text, "-v")
    result.assert_outcomes(passed=3, errors=1)
    told = "the same process had run case (a); from now on each case has its own"
    result.stdout.fnmatch_lines(["*::test_case[[]b] ERROR*", told])


@needs_userfaultfd
@pytest.mark.usefixtures("fake_log")
def test_kernel_complaint_fails_the_run(run: Run) -> None:
    """With workers nobody can say which case it was: the run fails."""
    result = run(LOGGING, "-n2")
    result.assert_outcomes(passed=3)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*kernel-log*", LOGGED])


@needs_userfaultfd
@pytest.mark.usefixtures("fake_log")
def test_kernel_complaint_in_ktap(run: Run, pytester: pytest.Pytester) -> None:
    """In KTAP such a run has one result more."""
    run(LOGGING, "-n2", f"--report-dir={pytester.path}")
    lines = (pytester.path / "results.tap").read_text().splitlines()
    assert lines[1] == "1..3"
    assert lines[-4:] == [
        f"# kernel log: {COMPLAINT}",
        "# kernel log: [    1.000001] Call Trace:",
        "not ok 4 kernel-log",
        "# Totals: pass:3 fail:1 xfail:0 xpass:0 skip:0 error:0",
    ]
    assert "Bad page" in (pytester.path / "dmesg.txt").read_text()


@needs_userfaultfd
@pytest.mark.skipif(not FACTS.hugepage_size, reason="the kernel has no huge pages")
@pytest.mark.parametrize(("users", "outcome"), [([], "error"), ([1], "pass")])
def test_lost_hugepages(run: Run, monkeypatch: pytest.MonkeyPatch, users: list[int], outcome: str) -> None:
    """Huge pages that nobody has and that do not come back fail the case; those that somebody has do not."""
    used = iter([3, 3, 3, *[5] * 1000])  # for the steward's two watchers, and for the case's
    monkeypatch.setattr(health, "hugepages", lambda _: HugepageCounts(10, 10 - next(used), 0, 0))
    monkeypatch.setattr(health, "PAGES_BACK_SECONDS", 0.05)
    monkeypatch.setattr(proc, "hugetlb_users", lambda: users)
    monkeypatch.setattr(kernel, "HugepagePool", FakePool)
    monkeypatch.setattr(runner, "lack_of_hugepages", lambda *_: None)
    result = run("""
    @uffd_case("takes", spare_hugepages=1)
    def test_takes():
        pass

    @uffd_case("bystands")
    def test_bystands():
        pass
    """)
    result.assert_outcomes(passed=2, errors=1 if outcome == "error" else 0)
    if outcome == "error":
        result.stdout.fnmatch_lines(["left behind: 2 huge pages not given back"])


# ---- turns ----------------------------------------------------------------------------------------------------------


@needs_userfaultfd
@pytest.mark.skipif(not FACTS.hugepage_size, reason="the kernel has no huge pages")
@pytest.mark.parametrize("shortage", [None, "no memory"])
def test_turns(run: Run, monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester, shortage: str | None) -> None:
    """Workers that cannot all have their huge pages take them in turns; each page wanted is asked for."""
    pools = []

    class Pool(kernel.HugepagePool):
        def __enter__(self) -> Pool:
            super().__enter__()
            if self.shortage:
                pytest.skip(self.shortage)
            pools.append(self)
            self.shortage = shortage  # which is not true
            return self

    monkeypatch.setattr(kernel, "HugepagePool", Pool)
    # They want a huge page, but take none: with turns, each finds itself alone.
    result = run(
        f"""
    import pathlib
    here = pathlib.Path({str(pytester.path)!r})

    @uffd_case("takes", variants=tuple("abcdef"), spare_hugepages=1)
    def test_takes(variant):
        (here / f"in-{{variant}}").touch()
        time.sleep(0.05)
        alone = len(list(here.glob("in-*"))) == 1
        (here / f"in-{{variant}}").unlink()
        assert alone or {shortage!r} is None

    @uffd_case("most", spare_hugepages=3)
    def test_most():
        pass
    """,
        "-n2",
    )
    assert [pool.wanted for pool in pools] == [6]
    result.assert_outcomes(passed=7)


def test_worker_papers(tmp_path: Path) -> None:
    """A plan survives the way from a worker to the controller."""
    planned = Planned("id", "name", "case", "variant", "anon", "promise.", ("R-1",), "promise", {"id": "D"}, 3)
    steward.hand_in(tmp_path, "gw0", [planned], "")
    paper = json.loads((tmp_path / "gw0.json").read_text())
    assert [Planned.from_dict(each) for each in paper["plan"]] == [planned]
