# SPDX-License-Identifier: GPL-2.0-only
"""The results of runs in Markdown: what a CI job shows beside its log (GitHub's ``GITHUB_STEP_SUMMARY``)."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

from uffd_selftests.report.model import BROKEN, OUTCOMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from uffd_selftests.report.model import Defect, Result, Run

MAX_SHOWN = 50
"""How many broken promises of a run are shown; GitHub refuses more than 1 MiB."""
COLUMNS = tuple(reversed(OUTCOMES))


def document(runs: Sequence[Run]) -> str:
    """Return the page of some runs."""
    return "".join(f"{line}\n" for line in _lines(runs))


def _lines(runs: Sequence[Run]) -> Iterator[str]:
    yield f"### userfaultfd: {_verdict(runs)}"
    yield ""
    columns = [each for each in COLUMNS if each == "pass" or any(run.totals[each] for run in runs)]
    yield f"| kernel | {' | '.join(columns)} |"
    yield f"|---|{'---:|' * len(columns)}"
    for run in runs:
        yield f"| {_text(run.label)} | {' | '.join(str(run.totals[each]) for each in columns)} |"
    for run in runs:
        yield from _run(run)
    yield from _defects(runs)


def _verdict(runs: Sequence[Run]) -> str:
    broken = sum(run.totals[each] for run in runs for each in BROKEN)
    if broken:
        return f"{broken} broken {'promise' if broken == 1 else 'promises'}"
    if any(run.unfinished for run in runs):
        return "the run is not whole"
    if all(set(run.totals) <= {"skip"} for run in runs):
        return "nothing could be tested"
    return "no broken promise"


def _run(run: Run) -> Iterator[str]:
    if run.unfinished:
        yield from ("", f"**{_text(run.label)}**: {_text(run.unfinished)}")
    broken = [result for result in run.results.values() if result.broken]
    if broken:
        yield from ("", f"#### {_text(run.label)}: broken promises", "")
        for result in broken[:MAX_SHOWN]:
            yield from _failure(result)
        if len(broken) > MAX_SHOWN:
            yield from ("", f"and {len(broken) - MAX_SHOWN} more")


def _failure(result: Result) -> Iterator[str]:
    why = f": {result.outcome.upper()} {result.reason}" if result.reason else ""
    yield f"<details><summary>{_text(result.name + why)}</summary>"
    yield ""
    # As HTML: no run of backquotes in a diagnostic can end it.
    yield f"<pre>{html.escape(_joined(result), quote=False)}</pre>"
    yield "</details>"


def _joined(result: Result) -> str:
    """Return the diagnostics without empty lines, which would end the HTML for Markdown."""
    return "\n".join(line for line in result.diagnostics if line.strip())


def _defects(runs: Sequence[Run]) -> Iterator[str]:
    """Say which known defects showed, and where if not everywhere."""
    shown: dict[Defect, dict[str, None]] = {}
    for run in runs:
        for result in run.results.values():
            if result.outcome == "xfail" and result.defect:
                shown.setdefault(result.defect, {})[run.label] = None
    if shown:
        yield from ("", f"<details><summary>known defects of these kernels: {len(shown)}</summary>", "")
        for defect, labels in sorted(shown.items(), key=lambda each: each[0].id):
            where = f" ({', '.join(labels)})" if len(labels) < len(runs) else ""
            yield f"- {defect.id}: {_text(defect.summary + where)}"
        yield from ("", "</details>")


def _text(text: str) -> str:
    """Return text that means itself in Markdown, in one line."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
