# SPDX-License-Identifier: GPL-2.0-only
"""What became of a kernel, in the words of the suite's own reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uffd_selftests.harness import ktap
from uffd_selftests.harness.results import Planned, Result

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffd_selftests.vm.guests import Ending

OUTCOMES = {word: outcome for outcome, word in ktap.DIRECTIVES.items()}
PLAIN = {"ok": "pass", "not ok": "fail"}
BY_EXIT_CODE = {0: "pass", 1: "fail", 4: "skip"}
NOTHING = "nothing could be tested"

NO_ROOT = "Unable to mount root fs"
"""What a kernel dies of that cannot read the host's files."""
ROOT_ADVICE = (
    "it cannot read the host's files: give it the options in uffd_selftests/vm/guest.config, "
    "and keep its modules, if it has some, in lib/modules above the image"
)


def judge(name: str, ending: Ending) -> Result:
    """Return the result of a kernel as a whole; one that died or hung shows the end of its console."""
    watch = ending.watch
    if watch.totals and not watch.panic and ending.code in BY_EXIT_CODE:
        outcome = BY_EXIT_CODE[ending.code]
        blamed = any(match["ok"] == "not ok" for match in watch.results)
        words = watch.messages if outcome == "fail" and not blamed else ()
        return named(name, outcome, NOTHING if outcome == "skip" else "", words)
    outcome, reason = _why(ending)
    if watch.running:
        reason += f" in {watch.running}"
    advice = [ROOT_ADVICE] if NO_ROOT in watch.panic else []
    words = [f"console: {line}" for line in watch.last_words()]
    if watch.running and not words:
        words = ["the console was silent since the case began"]
    return named(name, outcome, reason, [*advice, *words])


def _why(ending: Ending) -> tuple[str, str]:
    """Return as what and why a run inside did not come to its end."""
    watch = ending.watch
    if watch.panic:
        return "error", f"kernel panic: {watch.panic}"
    if ending.timeout:
        what = "without progress" if watch.spoke else "without getting as far as the suite"
        return "timeout", f"{ending.timeout:g} seconds {what}"
    if not watch.alive:
        return "error", "the kernel never said anything"
    if not watch.spoke:
        return "error", f"the kernel did not get as far as the suite (exit code {ending.code})"
    if ending.code == 255:  # virtme-ng's word for it
        return "error", "the virtual machine went away"
    return "error", f"the suite ended early (exit code {ending.code})"


def named(name: str, outcome: str, reason: str = "", diagnostics: Iterable[str] = ()) -> Result:
    """Return a result of which only the name is known."""
    case, _, mem = name.partition(" on ")
    return Result(Planned(name, name, case, mem=mem or None), outcome, reason, list(diagnostics))


def reported(ending: Ending) -> list[Result]:
    """Return the results that came out of a guest."""
    return [
        named(match["name"], OUTCOMES.get(match["directive"], PLAIN[match["ok"]]), match["reason"] or "")
        for match in ending.watch.results
    ]


def unfinished(plan: Iterable[str], ending: Ending, whole: Result) -> list[Result]:
    """Return results for what a guest left open: the case that was running is to blame, the others never ran."""
    watch = ending.watch
    rest = [named(watch.running, whole.outcome, _why(ending)[1], whole.diagnostics)] if watch.running else []
    done = {match["name"] for match in watch.results} | {watch.running}
    rest += [named(name, "skip", "never ran: the kernel was gone") for name in plan if name not in done]
    return rest if len(watch.results) + len(rest) == watch.planned else rest[: bool(watch.running)]
