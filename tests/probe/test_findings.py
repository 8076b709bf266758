# SPDX-License-Identifier: GPL-2.0-only
"""The probe tries instead of guessing, and survives a broken kernel."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import FACTS, needs_userfaultfd
from uffd_selftests.abi.uapi import Feature, RangeIoctls
from uffd_selftests.harness.isolation import Isolator
from uffd_selftests.mem_types import ANON, SHMEM
from uffd_selftests.probe import findings, report
from uffd_selftests.probe.findings import Answer, Outcome, look
from uffd_selftests.probe.report import Report
from uffd_selftests.probe.trials import BY_MEMORY, OF_HANDLE, Stage, Trial


@pytest.fixture
def isolator() -> Iterator[Isolator]:
    """Run trials."""
    with contextlib.closing(Isolator()) as made:
        yield made


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
    for key in ("scan-of-unwatched", "scan-of-hole"):
        assert answers.get(key, "counts as written") in ("counts as written", "does not count as written")
    assert answers.get("scan-categories", "up to PAGE_IS_GUARD").startswith("up to PAGE_IS_")


KNOWN = {
    "unregister-foreign": {"succeeds", "EINVAL"},
    "register-droppable": {"succeeds", "EINVAL"},
    "register-sysv-hugetlb": {"succeeds", "EINVAL"},
    "copy-onto-guard": {"succeeds", "EEXIST with copy = -EEXIST"},
    "copy-beyond-end": {f"{errno} with copy = -{errno}" for errno in ("EFAULT", "ENOMEM")},
    "continue-beyond-end": {f"{errno} with mapped = -{errno}" for errno in ("EFAULT", "EINVAL")},
    "copy-overtaken": {"goes to what is mapped there now", "EAGAIN with copy = -EAGAIN"},
    "remap-several": {"EFAULT, moves none", "EFAULT, moves those before the registered one"},
    "remap-shrunk": {"the original one", "the new one"},
    "moved-beside": {"stays registered", "loses its registration"},
    "process-madvise": {"EINVAL", "drops them, with 1 UFFD_EVENT_REMOVE"},
}
"""The answers of kernels up to Linux 7.3 to what is asked since."""


@needs_userfaultfd
def test_changes_of_linux_7_3_are_asked(found: Report) -> None:
    """What Linux 7.3 does otherwise than 6.12 is told, where it can be asked, with an answer that is known."""
    outcomes = found.findings.behaviour
    assert set(outcomes) >= set(KNOWN)
    for key, answers in KNOWN.items():
        assert outcomes[key].answer in (Answer.WORKS, Answer.UNTESTED, Answer.REFUSED), (key, outcomes[key])
        assert not outcomes[key].works or outcomes[key].detail in answers, (key, outcomes[key])
    assert outcomes["unregister-foreign"].works
    assert outcomes["moved-beside"].works


@needs_userfaultfd
def test_kernel_with_rwp_is_a_new_one(found: Report) -> None:
    """UFFD_FEATURE_RWP came with Linux 7.3: where it is offered no answer is an older kernel's."""
    if Feature.RWP not in found.findings.facts.features:
        pytest.skip("no UFFD_FEATURE_RWP here")
    answers = {key: outcome.detail for key, outcome in found.findings.behaviour.items() if outcome.works}
    assert answers["unregister-foreign"] == "EINVAL"
    assert answers["moved-beside"] == "stays registered"
    assert answers["register-without-wp"] == "EBUSY"


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
        patch.setattr(findings, "DEADLINE_OF_TRIAL", 1 if answer is Answer.HANGS else 60)
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


def test_machine_is_left_alone() -> None:
    """No descriptor stays open and no process is left."""

    def state() -> tuple[list[str], set[str]]:
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        return sorted(os.listdir("/proc/self/fd")), set(children.read_text().split()) if children.exists() else set()

    before = state()
    look()
    assert state() == before
