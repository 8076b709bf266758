# SPDX-License-Identifier: GPL-2.0-only
"""A submission to KCIDB, the database of kernel test results (schema 5.3 of kcidb-io).

Each run is a test ``uffd`` and one more for each result. A known defect is an issue: the result in which it shows is a
FAIL with an incident that says so, one in which it does not show a PASS with an incident that says that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uffd_selftests.formats import names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from uffd_selftests.report.model import Defect, Result, Run

VERSION = {"major": 5, "minor": 3}
MAX_EXCERPT = 16384
"""Characters of ``log_excerpt``."""

STATUS = {
    "fail": "FAIL",
    "timeout": "FAIL",
    "error": "ERROR",
    "pass": "PASS",
    "xfail": "FAIL",
    "xpass": "PASS",
    "skip": "SKIP",
}
PRIORITY = ("FAIL", "ERROR", "MISS", "PASS", "SKIP")
"""The status of a run is the first of these that a result has."""

NEVER_RAN = "never ran"
"""How the reason of a result begins that the end of a kernel or of the run made impossible."""
DEAD_AT_BOOT = "does not boot"
"""How the reason begins why there is no result of a kernel."""


@dataclass(frozen=True)
class Submission:
    """Who submits what: the names that KCIDB wants."""

    origin: str
    """The CI system: lower case letters, digits, underscores."""
    build_id: str
    """The build that was tested, with its origin in front: ``origin:...``."""

    def document(self, runs: Sequence[Run]) -> dict[str, Any]:
        """Return the submission of some runs of the build; made again, it has the same ids."""
        results = [(run, self._run_id(run)) for run in runs]
        return {
            "version": VERSION,
            "tests": [test for run, run_id in results for test in self._tests(run, run_id)],
            "issues": [self._issue(defect) for defect in _defects(runs)],
            "incidents": [each for run, run_id in results for each in self._incidents(run, run_id)],
        }

    def _run_id(self, run: Run) -> str:
        told = [self.build_id, run.label, run.started, {name: each.outcome for name, each in run.results.items()}]
        return f"{self.origin}:uffd-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}"

    def _tests(self, run: Run, run_id: str) -> Iterator[dict[str, Any]]:
        common = {"build_id": self.build_id, "origin": self.origin}
        yield {
            **common,
            "environment": _environment(run),
            "id": run_id,
            "path": names.ROOT,
            "status": _run_status(run),
            "comment": _clean(run.unfinished or f"userfaultfd conformance suite: {_counts(run)}"),
            "duration": run.seconds,
            **({"start_time": run.started} if run.started else {}),
        }
        paths = names.paths(run.results.values())
        for result in run.results.values():
            path = paths[result.name]
            yield {**common, "id": f"{run_id}:{path}", "path": path, **_test(result)}

    def _issue(self, defect: Defect) -> dict[str, Any]:
        return {
            "id": self._issue_id(defect),
            "version": 1,
            "origin": self.origin,
            "culprit": {"code": True, "tool": False, "harness": False},
            "comment": _clean(defect.summary),
            "misc": {"kernels": defect.kernels, "advice": defect.advice},
        }

    def _issue_id(self, defect: Defect) -> str:
        return f"{self.origin}:uffd-{defect.id}"

    def _incidents(self, run: Run, run_id: str) -> Iterator[dict[str, Any]]:
        paths = names.paths(run.results.values())
        for result in run.results.values():
            if result.defect and result.outcome in ("xfail", "xpass"):
                test_id = f"{run_id}:{paths[result.name]}"
                yield {
                    "id": f"{test_id}:{result.defect.id}",
                    "origin": self.origin,
                    "issue_id": self._issue_id(result.defect),
                    "issue_version": 1,
                    "test_id": test_id,
                    "present": result.outcome == "xfail",
                }


def _defects(runs: Sequence[Run]) -> list[Defect]:
    """Return the known defects that some run looked for, each once."""
    shown = [result for run in runs for result in run.results.values() if result.outcome in ("xfail", "xpass")]
    return list({result.defect.id: result.defect for result in shown if result.defect}.values())


def _test(result: Result) -> dict[str, Any]:
    """Return what is said of a result itself."""
    test: dict[str, Any] = {"status": _status(result), "duration": result.seconds}
    test["comment"] = _clean(f"{result.name}: {result.reason}" if result.reason else result.name)
    if result.diagnostics:
        test["log_excerpt"] = _clean("\n".join(result.diagnostics))[:MAX_EXCERPT]
    known = {"promise": result.promise, "rows": list(result.rows), "kind": result.kind, "outcome": result.outcome}
    test["misc"] = {name: value for name, value in known.items() if value}
    return test


def _status(result: Result) -> str:
    if result.reason.startswith(NEVER_RAN):
        return "MISS"
    if result.died:
        return "FAIL"
    return STATUS[result.outcome]


def _run_status(run: Run) -> str:
    found = {_status(result) for result in run.results.values()}
    if run.unfinished or not found:
        found.add("FAIL" if run.interrupted.startswith(DEAD_AT_BOOT) else "ERROR")
    return next(status for status in PRIORITY if status in found)


def _counts(run: Run) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(run.totals.items()))


def _environment(run: Run) -> dict[str, Any]:
    machine = run.facts.get("machine")
    known = ("machine", "cpus", "memory", "page_size", "hugepage_size", "feature_names")
    misc = {name: run.facts[name] for name in known if name in run.facts} | {"versions": run.versions}
    return {"comment": _clean(" ".join(filter(None, ["Linux", run.kernel, machine]))), "misc": misc}


def _clean(text: str) -> str:
    """Return text that a database takes."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
