# SPDX-License-Identifier: GPL-2.0-only
"""Cases run where they do no harm, and pytest's reports tell whatever became of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.harness.helpers import FakePool
from tests.helpers import FACTS, needs_userfaultfd
from uffd_selftests.harness import health, jobs
from uffd_selftests.machine.hugepages import HugepageCounts

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.helpers import Run

pytest_plugins = ["pytester"]


@needs_userfaultfd
@pytest.mark.skipif(not FACTS.hugepage_size, reason="the kernel has no huge pages")
@pytest.mark.parametrize("required", [False, True])
def test_too_few_hugepages(run: Run, monkeypatch: pytest.MonkeyPatch, required: bool) -> None:
    """Without enough huge pages a result is skipped with the numbers, or failed if they were required."""
    reason = "needs 34 free huge pages of 2048 kB, 10 free: echo 34 > nr_hugepages"
    monkeypatch.setattr(jobs, "lack_of_hugepages", lambda _, needed: reason if needed == 34 else None)
    monkeypatch.setattr(jobs, "HugepagePool", FakePool)
    monkeypatch.setattr(health, "hugepages", lambda _: HugepageCounts(10, 10, 0, 0))
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


VCPU_CASES = """
    @uffd_case("plain")
    def test_plain():
        pass

    @uffd_case("vcpu", variants=("one", "two"), needs=("kvm",))
    def test_vcpu(variant):
        pass

    @uffd_case("paging", needs=("kvm_paging",))
    def test_paging():
        pass
"""


@needs_userfaultfd
@pytest.mark.parametrize(
    ("found", "outcomes"),
    [
        ({"reason": "/dev/kvm: ENOENT", "accesses": None}, {"passed": 1, "skipped": 3}),
        ({"reason": None, "accesses": "emulation"}, {"passed": 3, "skipped": 1}),
        ({"reason": None, "accesses": "page faults"}, {"passed": 4}),
    ],
    ids=["absent", "emulation", "page faults"],
)
def test_kvm_is_tried_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: dict[str, str | None], outcomes: dict[str, int]
) -> None:
    """A virtual processor is tried when the first case wants one, once; who cannot have it is skipped."""
    tried = tmp_path / "tried"

    def probe_kvm() -> dict[str, str | None]:
        with tried.open("a") as file:
            file.write("x")
        return found

    monkeypatch.setattr(jobs, "probe_kvm", probe_kvm)
    run(VCPU_CASES, "-k", "plain").assert_outcomes(passed=1)
    assert not tried.exists()
    result = run(VCPU_CASES, "-rs")
    result.assert_outcomes(**outcomes)
    assert tried.read_text() == "x"
    if found["reason"]:
        result.stdout.fnmatch_lines(["*/dev/kvm: ENOENT"])


@needs_userfaultfd
def test_kvm_that_cannot_be_tried(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the launcher dies of the attempt the cases run, to show why."""
    monkeypatch.setattr(jobs, "probe_kvm", lambda: os._exit(3))
    run(VCPU_CASES).assert_outcomes(passed=4)


@needs_userfaultfd
def test_kvm_can_be_required(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is required is no reason to skip."""
    monkeypatch.setattr(jobs, "probe_kvm", lambda: {"reason": "/dev/kvm: ENOENT", "accesses": None})
    result = run(VCPU_CASES, "--require=kvm")
    result.assert_outcomes(passed=1, errors=2, skipped=1)
    result.stdout.fnmatch_lines(["*kvm is required: /dev/kvm: ENOENT*"])
