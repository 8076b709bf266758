# SPDX-License-Identifier: GPL-2.0-only
"""The probe tries instead of guessing, survives a broken kernel, and says why somebody does not get what is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE, ROOT
from tests.test_kernel import as_nobody, needs_root, unprivileged_userfaultfd, with_seccomp
from uffd_selftests import cli, kernel
from uffd_selftests.harness.isolation import Isolator
from uffd_selftests.mem_types import ANON, HUGETLB, SHMEM
from uffd_selftests.probe import config, findings, report, suite
from uffd_selftests.probe.command import probe
from uffd_selftests.probe.consumers import CONSUMERS, Judgement, Verdict, judge
from uffd_selftests.probe.findings import Answer, Findings, Outcome, look
from uffd_selftests.probe.report import Report
from uffd_selftests.probe.trials import BY_MEMORY, OF_HANDLE, Stage, Trial
from uffd_selftests.uapi import Feature, RangeIoctls

FACTS = kernel.probe()
UNAVAILABLE = kernel.no_userfaultfd(FACTS)
needs_userfaultfd = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
needs_kernel_faults = pytest.mark.skipif(
    kernel.REQUIREMENTS["kernel_faults"](FACTS) is not None, reason=str(kernel.REQUIREMENTS["kernel_faults"](FACTS))
)

AREA = 32 << 20


@pytest.fixture(scope="module")
def found() -> Report:
    """Return what the probe finds here."""
    return probe(AREA)


@pytest.fixture
def isolator() -> Iterator[Isolator]:
    """Run trials."""
    with contextlib.closing(Isolator()) as made:
        yield made


# ---- trials ---------------------------------------------------------------------------------------------------------


@needs_userfaultfd
def test_everything_is_tried(found: Report) -> None:
    """Each trial has an outcome on each memory type, and what every kernel can do is found to work."""
    columns = {column.name: column.outcomes for column in found.findings.columns}
    assert list(columns)[:3] == ["anon", "shmem", "shmem-private"]
    assert all(list(outcomes) == [trial.name for trial in BY_MEMORY] for outcomes in columns.values())
    assert list(found.findings.handle) == [trial.name for trial in OF_HANDLE]
    for name in ("COPY", "ZEROPAGE", "WAKE", "UNREGISTER"):
        assert columns["anon"][name].works, columns["anon"][name]


@needs_userfaultfd
def test_offered_features_work(found: Report) -> None:
    """What UFFDIO_API enables does on anonymous memory, or on the handle, what it is for."""
    enabled = {feature.name for feature in found.findings.features if feature.enabled}
    anon = found.findings.columns[0].outcomes
    for name, outcome in (*anon.items(), *found.findings.handle.items()):
        if name in Feature.__members__:
            assert outcome.works == (name in enabled), (name, outcome)


@needs_userfaultfd
def test_questions_are_answered(found: Report) -> None:
    """With one of the answers that kernels give."""
    answers = {key: outcome.detail for key, outcome in found.findings.behaviour.items() if outcome.works}
    assert answers["copy-onto-present"] == "EEXIST with copy = -EEXIST"
    assert answers.get("unread-event", "EAGAIN with zeropage untouched").startswith("EAGAIN with zeropage ")
    assert answers.get("wp-of-hole", "has no effect") == "has no effect"
    assert answers.get("wp-after-move", "is lost") in ("is lost", "is kept")
    assert answers.get("scan-of-dropped", "is missed") in ("is missed", "counts as written")


def hang(_: Stage) -> None:
    """Sleep for good."""
    while True:
        time.sleep(60)


def crash(_: Stage) -> None:
    """Die."""
    os.kill(os.getpid(), signal.SIGSEGV)


def lie(on: Stage) -> None:
    """Find other contents than expected."""
    on.uffd.zeropage(on.dst.range)
    on.src.fill()
    on.expect_copy()


def refuse(on: Stage) -> None:
    """Map the page twice."""
    on.resolve()
    on.resolve()


@needs_userfaultfd
@pytest.mark.parametrize(
    ("body", "answer", "detail", "shown"),
    [
        (hang, Answer.HANGS, "nanosleep|1 seconds", "HANGS"),
        (crash, Answer.CRASHES, "killed by SIGSEGV", "CRASHES"),
        (lie, Answer.WRONG, "anon area, page 0 byte 0x0: expected 0x.*, got 0x00", "WRONG"),
        (refuse, Answer.REFUSED, "UFFDIO_COPY.*: EEXIST with copy = -EEXIST", "EEXIST*"),
    ],
)
def test_broken_kernel(
    body: Callable[[Stage], None], answer: Answer, detail: str, shown: str, isolator: Isolator
) -> None:
    """Whatever a trial meets ends that trial alone, and the table says what."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "DEADLINE_OF_TRIAL", 1)
        outcome = findings._try(isolator, Trial("COPY", body, ioctl=RangeIoctls.COPY), ANON, FACTS)
    assert outcome.answer is answer
    assert re.search(detail, outcome.detail), outcome.detail
    assert report.cell(outcome) == shown


@needs_userfaultfd
def test_memory_that_is_not_there_is_not_touched(isolator: Isolator) -> None:
    """Without huge pages it is known what UFFDIO_REGISTER offers, and nothing more."""
    trial = Trial("COPY", crash, ioctl=RangeIoctls.COPY)
    outcome = findings._try(isolator, trial, SHMEM, FACTS, use=False)
    assert outcome == Outcome(Answer.UNTESTED, offered=True)


@pytest.mark.parametrize(
    ("outcome", "shown"),
    [
        (Outcome(Answer.WORKS, offered=True), "yes"),
        (Outcome(Answer.WORKS), "yes"),
        (Outcome(Answer.WORKS, offered=False), "yes*"),
        (Outcome(Answer.REFUSED, offered=True, errno="EINVAL"), "EINVAL*"),
        (Outcome(Answer.REFUSED, offered=False, errno="EINVAL"), "-"),
        (Outcome(Answer.REFUSED, errno="EINVAL"), "-"),
        (Outcome(Answer.UNTESTED, offered=True), "(yes)"),
        (Outcome(Answer.UNTESTED, offered=False), "-"),
        (Outcome(Answer.UNTESTED), "?"),
    ],
)
def test_cell(outcome: Outcome, shown: str) -> None:
    """A star marks what UFFDIO_REGISTER said differently."""
    assert report.cell(outcome) == shown


# ---- verdicts -------------------------------------------------------------------------------------------------------


def capable(found: Findings) -> Findings:
    """Return findings of a kernel that can do everything, on a machine that allows everything."""
    facts = dataclasses.replace(
        found.facts,
        access=dict.fromkeys(found.facts.access, None),
        features=Feature(sum(Feature)),
        event_fork=None,
        pagemap_scan=None,
        hugepage_size=2 << 20,
    )
    works = Outcome(Answer.WORKS)
    outcomes = {trial.name: works for trial in BY_MEMORY}
    names = ("anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private")
    columns = tuple(findings.Column(dataclasses.replace(HUGETLB, name=name), dict(outcomes), None) for name in names)
    handle = {trial.name: works for trial in OF_HANDLE}
    pools = {2 << 20: kernel.HugepageCounts(4, 4, 0, 0)}
    return dataclasses.replace(found, facts=facts, columns=columns, handle=handle, pools=pools, dontunmap=None)


def verdicts(found: Findings) -> dict[str, Judgement]:
    """Return the verdicts by key."""
    return {judgement.consumer.key: judgement for judgement in judge(found)}


def without(found: Findings, *features: Feature, **facts: Any) -> Findings:
    """Return findings of a kernel without these features, or with other facts."""
    rest = found.facts.features.without(sum(features))
    return dataclasses.replace(found, facts=dataclasses.replace(found.facts, **{"features": rest, **facts}))


def failing(found: Findings, memory: str, trial: str, outcome: Outcome, note: str | None = None) -> Findings:
    """Return findings with another outcome of one trial."""
    columns = tuple(
        dataclasses.replace(column, outcomes={**column.outcomes, trial: outcome}, note=note)
        if column.name == memory
        else column
        for column in found.columns
    )
    return dataclasses.replace(found, columns=columns)


def test_everything_suffices(found: Report) -> None:
    """A kernel with everything serves everybody."""
    assert {each.verdict for each in judge(capable(found.findings))} == {Verdict.YES}
    assert len({consumer.key for consumer in CONSUMERS}) == len(CONSUMERS)


REFUSED = Outcome(Answer.REFUSED, offered=True, errno="EINVAL")
SHUT = {"syscall": "EPERM", "device": "EACCES", "syscall-user-mode-only": None}
LIMITED: dict[str, tuple[Callable[[Findings], Findings], dict[str, tuple[Verdict, str]]]] = {
    "no-events": (
        lambda found: without(found, Feature.EVENT_REMOVE),
        {
            "firecracker-restore": (Verdict.NO, "kernel lacks UFFD_FEATURE_EVENT_REMOVE (Linux 4.11)"),
            "criu-lazy-pages": (
                Verdict.LIMITS,
                "restored processes must not drop memory (madvise): "
                "kernel lacks UFFD_FEATURE_EVENT_REMOVE (Linux 4.11)",
            ),
        },
    ),
    "no-markers": (
        lambda found: without(
            found, Feature.WP_HUGETLBFS_SHMEM, Feature.WP_UNPOPULATED, Feature.WP_ASYNC
        ),
        {
            "qemu-background-snapshot": (
                Verdict.LIMITS,
                "not with shared memory: kernel lacks UFFD_FEATURE_WP_HUGETLBFS_SHMEM (Linux 5.19)",
            ),
            "async-dirty-tracking": (
                Verdict.NO,
                "kernel lacks UFFD_FEATURE_WP_ASYNC (Linux 6.7); kernel lacks UFFD_FEATURE_WP_UNPOPULATED (Linux 6.4)",
            ),
        },
    ),
    "no-privilege": (
        lambda found: without(found, access=SHUT, unprivileged_userfaultfd=0, user_namespace=False, event_fork="EPERM"),
        {
            "qemu-postcopy": (
                Verdict.NO,
                "userfaultfd(2): EPERM: needs CAP_SYS_PTRACE: run as root, or sysctl vm.unprivileged_userfaultfd=1; "
                "/dev/userfaultfd: EACCES: run as root, or setfacl -m u:$USER:rw /dev/userfaultfd",
            ),
            "criu-lazy-pages": (
                Verdict.NO,
                "userfaultfd(2): EPERM: needs CAP_SYS_PTRACE: run as root, or sysctl vm.unprivileged_userfaultfd=1",
            ),
            "async-dirty-tracking": (Verdict.YES, ""),
            "android-art": (Verdict.YES, ""),
        },
    ),
    "sysctl-only": (
        lambda found: without(
            found, access={**SHUT, "syscall": None}, user_namespace=False, capabilities=(), event_fork="EPERM"
        ),
        {
            "qemu-postcopy": (Verdict.YES, ""),
            "criu-lazy-pages": (Verdict.NO, "UFFD_FEATURE_EVENT_FORK: EPERM: needs CAP_SYS_PTRACE, run as root"),
        },
    ),
    "no-scan": (
        lambda found: without(found, pagemap_scan="PAGEMAP_SCAN: ENOTTY (Linux 6.7)"),
        {"gvisor-dirty-tracking": (Verdict.NO, "PAGEMAP_SCAN: ENOTTY (Linux 6.7)")},
    ),
    "broken-copy": (
        lambda found: failing(found, "anon", "COPY", REFUSED),
        {
            "qemu-postcopy": (Verdict.NO, "COPY on anon: EINVAL"),
            "qemu-postcopy-shared": (Verdict.YES, ""),
            "firecracker-restore": (Verdict.NO, "COPY on anon: EINVAL"),
        },
    ),
    "no-hugepages": (
        lambda found: failing(found, "hugetlb", "COPY", Outcome(Answer.UNTESTED, offered=True), "needs 4 huge pages"),
        {
            "qemu-postcopy-hugepages": (Verdict.NO, "needs 4 huge pages"),
            "qemu-postcopy": (Verdict.YES, ""),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITED)
def test_verdict(name: str, found: Report) -> None:
    """Each gets the reason that concerns it, with the remedy, and nobody else is harmed."""
    limit, expected = LIMITED[name]
    judged = verdicts(limit(capable(found.findings)))
    seen = {key: (judged[key].verdict, (judged[key].reasons or ("",))[0]) for key in expected}
    assert seen == expected


# ---- what a lack costs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> list[suite.Expected]:
    """Return all results."""
    return list(suite.expected())


def names(results: list[suite.Expected], option: str) -> set[str]:
    """Return the names of the cases with a result that depends on an option."""
    return {each.case.name for each in results if option in each.options}


def test_results_are_those_of_a_run(results: list[suite.Expected]) -> None:
    """As many as --list shows."""
    assert len(results) == len(run("--list").stdout.splitlines())


def test_options_follow_from_the_cases(results: list[suite.Expected]) -> None:
    """From what a case declares, and from what the code names that it runs."""
    assert names(results, "GUP_TEST") == {each.case.name for each in results if "gup_test" in each.case.needs}
    assert set(suite.OPTIONS_OF_NEED) <= set(kernel.REQUIREMENTS)
    assert names(results, "MEM_SOFT_DIRTY") == {
        *("copy-soft-dirty", "move-soft-dirty", "move-huge-soft-dirty", "move-swapped-soft-dirty"),
        *("writeprotect-soft-dirty", "writeprotect-thp-soft-dirty", "async-scan-soft-dirty"),
    }
    broken = {"continue-hardware-poison", "fork-broken-hugepage", "writeprotect-migrated", "writeprotect-thp-migrated"}
    assert names(results, "HWPOISON_INJECT") == broken
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


def test_fragment_has_what_skips_name() -> None:
    """Whatever option the package tells its users to set is in vm/kernel.config, each once, each with its purpose."""
    named = set()
    for path in (ROOT / "uffd_selftests").rglob("*.py"):
        named |= set(re.findall(r"\bCONFIG_([A-Z0-9_]+[A-Z0-9])", path.read_text()))
    options = config.fragment()
    assert named - {option.name for option in options} == set()
    assert len({option.name for option in options}) == len(options)
    assert all(option.purpose and option.value == "y" for option in options)


def test_options_by_their_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a configuration to read, the effects tell the same as far as they tell anything."""
    read = config.examine(FACTS)
    if not read.source:
        pytest.skip("no configuration of the running kernel to compare with")
    monkeypatch.setattr(config, "PLACES", ())
    looked = config.examine(FACTS)
    assert looked.source is None
    unknown = set(looked.unknown)
    assert set(read.lacking) - unknown == set(looked.lacking)
    assert len(unknown) < len(config.fragment()) / 2


# ---- the command ----------------------------------------------------------------------------------------------------


def run(*args: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    command = [sys.executable, "-m", "uffd_selftests", *args]
    pipe = subprocess.PIPE
    return subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=pipe, text=True, check=False, timeout=PATIENCE)


@needs_userfaultfd
def test_text() -> None:
    """The verdicts come first; no line is too long for a terminal of moderate width, none ends in blanks."""
    done = run("--probe")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"Linux {FACTS.release} ")
    assert lines[2] == "Who gets what they need"
    assert lines[3].startswith("  QEMU post-copy migration ")
    assert [line for line in lines if len(line) > 125 or line != line.rstrip()] == []


@needs_userfaultfd
def test_json() -> None:
    """The keys are those of docs/probe.md."""
    done = run("--probe", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    described = (ROOT / "docs" / "probe.md").read_text()
    for key in document:
        assert f"`{key}`" in described, key
    for name, value in document.items():
        for key in value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else ():
            assert f"`{key}`" in described, f"{name}: {key}"
    assert document["format"] == 1
    assert document["available"] is True
    assert {each["name"]: each for each in document["features"]}["EVENT_REMAP"]["bit"] == 2
    assert document["memory"][0]["tried"]["COPY"] == {
        "answer": "works", "offered": True, "errno": None, "detail": None,
    }  # fmt: skip
    assert kernel.Facts.from_dict(document["facts"]).release == FACTS.release


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--json",), "--json needs --probe"),
        (("--probe", "-k", "move"), "--probe runs nothing"),
        (("--probe", "-o", "out"), "--probe runs nothing"),
        (("--probe", "--", "-x"), "--probe runs nothing"),
        (("--probe", "--deadline-scale", "0"), "--deadline-scale: '0' is not a positive number"),
    ],
)
def test_usage(args: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What a probe would ignore is refused."""
    assert cli.main(args) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"uffd-selftests: {message}")
    assert err.count("\n") == 1


def test_full_disk() -> None:
    """One line says why nothing was written."""
    with open("/dev/full", "w") as full:
        done = run("--probe", stdout=full.fileno())
    assert (done.returncode, done.stderr) == (2, "uffd-selftests: cannot write: ENOSPC\n")


@needs_userfaultfd
def test_interrupt() -> None:
    """A signal ends the probe while a trial hangs, and the trial with it."""
    program = """
import sys, time
from uffd_selftests.probe import command, findings, trials
def hang(on):
    sys.stdout.write("hanging\\n")
    sys.stdout.flush()
    time.sleep(600)
findings.BY_MEMORY = (trials.Trial("COPY", hang),)
sys.exit(command.main(as_json=False, area_bytes=1 << 20))
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "hanging\n"
        process.terminate()
        assert process.stdout.read() == ""  # the trial is gone as well: nobody holds the pipe
        assert process.wait(60) == 128 + signal.SIGTERM


def look_after(*preparations: Callable[[], None]) -> Report:
    """Return what a process finds that was prepared with these functions."""
    answer, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(answer)
        try:
            for prepare in preparations:
                prepare()
            seen = look()
            with open(tell, "wb") as pipe:
                pickle.dump((seen, suite.prospect(seen.facts, AREA)), pipe)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(tell)
    with open(answer, "rb") as pipe:
        plain = pipe.read()
    os.waitpid(child, 0)
    seen, prospect = pickle.loads(plain)
    return Report(seen, judge(seen), config.examine(seen.facts), prospect)


@needs_root
@needs_kernel_faults
def test_ordinary_user(results: list[suite.Expected]) -> None:
    """Without privilege most is found out all the same; who needs more is told how to get it."""
    assert results
    with unprivileged_userfaultfd(0):
        found = look_after(as_nobody)
    judged = verdicts(found.findings)
    assert judged["qemu-postcopy"].verdict is Verdict.NO
    assert "or sysctl vm.unprivileged_userfaultfd=1" in judged["qemu-postcopy"].reasons[0]
    assert judged["criu-lazy-pages"].verdict is Verdict.NO
    anon = found.findings.columns[0].outcomes
    assert anon["COPY"].works
    assert anon["kernel faults"].errno == "EPERM"
    assert found.findings.handle["EVENT_FORK"].errno == "EPERM"
    text = found.text()
    assert "\n  EVENT_FORK          4.11   EPERM" in text
    assert "\n  userfaultfd(2)                        shut\n" in text


def test_broken_kernel_is_shown(found: Report) -> None:
    """The table marks what is broken, and a line below says how."""
    capable_here = capable(found.findings)
    broken = Outcome(Answer.HANGS, detail="task 7: handle_userfault")
    seen = failing(capable_here, "shmem", "COPY", broken)
    seen = dataclasses.replace(seen, handle={**seen.handle, "EVENT_FORK": Outcome(Answer.WRONG, detail="no message")})
    text = dataclasses.replace(found, findings=seen, judgements=judge(seen)).text()
    assert "  COPY            4.3    yes      HANGS    yes " in text
    assert "\n  COPY on shmem: hangs: task 7: handle_userfault\n" in text
    assert "\n  EVENT_FORK: wrong: no message\n" in text
    assert verdicts(seen)["qemu-postcopy-shared"].reasons == ("COPY on shmem: hangs",)


@needs_root
def test_forbidden(results: list[suite.Expected]) -> None:
    """With every door shut the reasons are said once, nothing is guessed, and no result could be had."""
    assert results
    found = look_after(as_nobody, with_seccomp(errno.EPERM))
    if kernel.no_userfaultfd(found.findings.facts) is None:
        pytest.skip("everybody may open /dev/userfaultfd here")
    assert {judgement.verdict for judgement in found.judgements} == {Verdict.NO}
    assert found.findings.features == ()
    assert found.findings.columns == ()
    assert found.prospect.skipped == found.prospect.results
    text = found.text()
    assert "forbidden by a seccomp filter: allow userfaultfd in the container's profile" in text
    assert "UFFD_FEATURE_ bits" not in text
    document = found.to_dict()
    assert document["available"] is False
    assert all(not way["open"] for way in document["access"])


def test_machine_is_left_alone() -> None:
    """No descriptor stays open and no process is left."""

    def state() -> tuple[list[str], set[str]]:
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        return sorted(os.listdir("/proc/self/fd")), set(children.read_text().split()) if children.exists() else set()

    before = state()
    look()
    assert state() == before
