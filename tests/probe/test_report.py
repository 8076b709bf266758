# SPDX-License-Identifier: GPL-2.0-only
"""What the probe found can be read off its table."""

from __future__ import annotations

import dataclasses

import pytest

from tests.probe.helpers import capable, failing, verdicts
from uffd_selftests.probe import report
from uffd_selftests.probe.consumers import judge
from uffd_selftests.probe.findings import Answer, Outcome
from uffd_selftests.probe.report import Report


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
