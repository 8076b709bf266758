# SPDX-License-Identifier: GPL-2.0-only
"""What a run is to produce, and what pytest's reports of one test say about its result."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from uffd_selftests.case import ATTRIBUTE, Case, first_sentence
from uffd_selftests.catalog.bugs import known_bugs
from uffd_selftests.harness.gating import hugepages_needed, missing
from uffd_selftests.harness.items import CaseItem
from uffd_selftests.toolkit.expectations import SAW

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from uffd_selftests.machine.facts import Facts
    from uffd_selftests.mem_types import MemType

MAX_LINE = 500
"""How much of a line a diagnostic shows."""
HARNESS = "uffd_selftests/harness/runner.py"
LAST = "uffd_last"
"""The attribute of the last of a test's reports, where pytest does not say that the test is finished."""
GUEST = "uffd_guest"
"""The attribute of a report that names the virtual machine in which its test ran."""
MAX_OUTPUT_LINES = 40
"""How much captured output a diagnostic shows: the last lines."""


@dataclass(frozen=True)
class Planned:
    """One result that a run will produce: plain data, the same in the controller and in its workers."""

    nodeid: str
    """pytest's name for it."""
    name: str
    """Its name in all reports: ``case (variant) on mem``; the nodeid of a test that declares no case."""
    case: str
    variant: str | None = None
    mem: str | None = None
    promise: str = ""
    """The first sentence of the docstring: what the kernel promises."""
    rows: tuple[str, ...] = ()
    """The promises of docs/contract.md that it checks."""
    kind: str = ""
    """What stands behind the case: promise, detail or version."""
    defect: dict[str, str] | None = None
    """The known defect of kernels (id, summary, kernels, advice, shows) that makes it an expected failure."""
    hugepages: int = 0
    """Huge pages of the default size that it takes; 0 when it is skipped for lack of something else."""
    bugs: tuple[int, ...] = ()
    """The bugs of docs/regressions.md that would make it fail."""

    @classmethod
    def of(cls, item: pytest.Item, area_bytes: int, facts: Facts | None) -> Planned:
        """Return the plan for one collected test; without facts, as if it could run."""
        case, variant, mem = declaration(item)
        promise = first_sentence(getattr(getattr(item, "function", None), "__doc__", None))
        if case is None:
            return cls(item.nodeid, item.nodeid, item.nodeid, promise=promise)
        return cls(
            item.nodeid,
            case.result_name(variant, mem),
            case.name,
            variant,
            mem.name if mem else None,
            promise,
            case.rows,
            case.kind.value,
            dataclasses.asdict(case.defect) if case.defect else None,
            _hugepages(case, mem, area_bytes, facts),
            case.bugs,
        )

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Planned:
        """Return what JSON has made of the fields."""
        return cls(**{**plain, "rows": tuple(plain["rows"]), "bugs": tuple(plain["bugs"])})


def _hugepages(case: Case, mem: MemType | None, area_bytes: int, facts: Facts | None) -> int:
    if facts and missing(case, mem, facts):
        return 0
    return hugepages_needed(case, mem, area_bytes, facts.hugepage_size if facts else 0)


def declaration(item: pytest.Item) -> tuple[Case | None, str | None, MemType | None]:
    """Return the case that a test declares, with its variant and memory type."""
    if isinstance(item, CaseItem):
        return item.case, item.variant, item.mem
    case = getattr(getattr(item, "function", None), ATTRIBUTE, None)
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if not isinstance(case, Case):
        return None, None, None
    return case, parameters.get("variant"), parameters.get("mem")


@dataclass
class Result:
    """One result of a run."""

    planned: Planned
    outcome: str
    """pass, fail, xfail, xpass, skip, error or timeout."""
    reason: str = ""
    """Why it is no plain pass or fail: what is missing, "30 seconds", "killed by SIGSEGV"."""
    diagnostics: list[str] = field(default_factory=list)
    """Lines for the reader: of a result that is not ok; of others, which of several documented forms came."""
    seconds: float = 0.0
    guest: str = ""
    """The virtual machine in which it ran, if it did."""
    died: bool = False
    """That machine died under it."""

    @property
    def name(self) -> str:
        """Its name in all reports."""
        return self.planned.name

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json says about it."""
        plain = dict(vars(self.planned))
        return {
            "name": plain.pop("name"),
            "outcome": self.outcome,
            "reason": self.reason,
            "seconds": round(self.seconds, 6),
            "diagnostics": self.diagnostics,
            **plain,
            "rows": list(self.planned.rows),
            "bugs": list(self.planned.bugs),
            **({"guest": self.guest, "died": self.died} if self.guest else {}),
        }


def told_of_deaths(names: Sequence[str]) -> str:
    """Say under which results guests have died."""
    return f"{len(names)} guest{'s' * (len(names) > 1)} died, under {', '.join(names)}"


def judge(planned: Planned, reports: Sequence[pytest.TestReport]) -> Result:
    """Make one result of the reports of a test's phases (and of its subtests)."""
    outcome, reason = _outcome(reports)
    result = Result(planned, outcome, reason, seconds=sum(report.duration for report in reports))
    for report in reports:
        result.guest = getattr(report, GUEST, result.guest)
        result.died |= bool(verdict(report).get("died"))
    if outcome in ("fail", "error", "timeout"):
        failed = [report for report in reports if report.failed]
        result.diagnostics = [line[:MAX_LINE] for part in _diagnostics(planned, failed) for line in part.splitlines()]
    else:
        result.diagnostics = list(_saw(reports))
    return result


def verdict(report: pytest.TestReport) -> dict[str, Any]:
    """Return what the harness itself had to say in a report: outcome, reason, evidence; empty for an ordinary one."""
    return getattr(report, "uffd", {})


def _outcome(reports: Sequence[pytest.TestReport]) -> tuple[str, str]:
    for report in reports:
        if "outcome" in verdict(report):
            return verdict(report)["outcome"], verdict(report)["reason"]
        if report.when not in ("setup", "call", "teardown"):  # xdist's own report of a worker that died
            return "error", "the worker process died"
    if any(report.failed for report in reports):
        return "fail", ""
    for report in reports:
        if hasattr(report, "wasxfail"):
            return "xfail" if report.skipped else "xpass", report.wasxfail.removeprefix("reason: ")
    whole = [report for report in reports if not hasattr(report, "context")]  # a skipped subtest is no skipped result
    for report in whole:
        if report.skipped:
            return "skip", skip_reason(report)
    return "pass", ""


def skipped_for(item: pytest.Item, reason: str) -> tuple[str, int, str]:
    """Return what pytest's report of a skip says: where and why."""
    path, line, _ = item.reportinfo()
    return os.fspath(path), (line or 0) + 1, f"Skipped: {reason}"


def skip_reason(report: pytest.TestReport) -> str:
    """Return why a test was skipped."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)


def _diagnostics(planned: Planned, failed: Sequence[pytest.TestReport]) -> Iterator[str]:
    if planned.promise:
        yield f"promise: {planned.promise}"
    for report in failed:
        yield from _message(report)
        yield from verdict(report).get("evidence", ())
    if any(report.when != "setup" for report in failed):  # else it never ran
        for number in planned.bugs:
            yield str(known_bugs()[number])
    yield from _output(failed)


def _message(report: pytest.TestReport) -> Iterator[str]:
    """Say what was raised and where; a report of the harness has only its verdict, which is told elsewhere."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        yield f"{crash.message} (in the teardown)" if report.when == "teardown" else crash.message
        entries = getattr(getattr(report.longrepr, "reprtraceback", None), "reprentries", ())
        places = [entry.reprfileloc for entry in entries if getattr(entry, "reprfileloc", None)]
        if not crash.path.endswith(HARNESS):  # the case never began
            yield f"at {place(report.location[0], [(each.path, each.lineno) for each in (*places, crash)])}"
    elif "outcome" not in verdict(report) and report.longrepr:
        yield str(report.longrepr)


def place(case: str, calls: Sequence[tuple[str, int]]) -> str:
    """Return the line of the case and, if that called something which failed, that line, too.

    case is the path of its file, from pytest's root on; calls are path and line of each call, outermost first.
    """
    lines = [f"{case}:{line}" for path, line in calls if path.endswith(case)][-1:]
    path, line = calls[-1]
    raised = f"{case if path.endswith(case) else _short(path)}:{line}"
    return ", in ".join(dict.fromkeys([*lines, raised]))


def _short(path: str) -> str:
    """Return a path from the package on."""
    _, package, rest = path.rpartition("uffd_selftests/")
    return package + rest


def _saw(reports: Sequence[pytest.TestReport]) -> Iterator[str]:
    """Yield what a test told of the kernel's choice among documented forms (expectations.saw()), each line once."""
    lines = [line for report in reports for _, content in report.sections for line in content.splitlines()]
    yield from dict.fromkeys(line[:MAX_LINE] for line in lines if line.startswith(SAW))


def _output(failed: Sequence[pytest.TestReport]) -> Iterator[str]:
    """Show what the test printed, each section once."""
    sections = dict(section for report in failed for section in report.sections)
    for title, content in sections.items():
        lines = content.splitlines()
        bound = f", last {MAX_OUTPUT_LINES} of {len(lines)} lines" if len(lines) > MAX_OUTPUT_LINES else ""
        yield f"{title}{bound}:"
        yield from (f"  {line}" for line in lines[-MAX_OUTPUT_LINES:])
