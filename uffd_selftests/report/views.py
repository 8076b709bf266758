# SPDX-License-Identifier: GPL-2.0-only
"""What the page shows, worked out from the runs: plain data for the template, no markup.

A list with a place for each run has None where a run has no such result.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from uffd_selftests.catalog import contract
from uffd_selftests.mem_types import ALL
from uffd_selftests.report.model import BROKEN, OUTCOMES, Defect, Result, Run

FOLDERS = {
    "unit": "The kernel's own uffd-unit-tests",
    "mm": "The kernel's other tests of memory management",
    "kvm": "Virtual processors of KVM",
    "stress": "Stress, races and regressions",
}
"""Folders of cases that are a topic of their own; the cases of ``contract`` are sorted by what they promise."""
NO_CASE = "The run itself"
"""The topic of results that no case declares."""

MAX_DIAGNOSTICS, MAX_FURTHER = 60, 12
"""How many lines of diagnostics the first failure of a case shows, and each that is another one."""
DIAGNOSTICS_BUDGET = 100_000
"""How many characters of diagnostics a page shows; when all is broken, the first ones tell enough."""

Outcomes = list[str | None]
"""One outcome for each run."""


@dataclass
class Line:
    """A line of the matrix: a case, with its variant, on all memory types."""

    name: str
    slug: str
    """Its anchor on the page."""
    topic: str
    newest: Result
    """Whose promise, rows and kind stand for the line: a result of the last run that has one."""
    cells: dict[str, list[Result | None]] = field(default_factory=dict)
    """By memory type, "" for a case that has none: a result for each run."""

    @property
    def results(self) -> list[Result]:
        """All results of the line."""
        return [result for cell in self.cells.values() for result in cell if result]

    @property
    def differs(self) -> bool:
        """Whether runs had different outcomes."""
        return any(differ(cell) for cell in self.cells.values())

    @property
    def outcomes(self) -> list[str]:
        """The outcomes in it, each once, what a reader should look at first in front."""
        there = {result.outcome for result in self.results}
        return [outcome for outcome in OUTCOMES if outcome in there]

    @property
    def place(self) -> str:
        """Where the test is: ``uffd_selftests/cases/unit/test_move.py::test_move``."""
        return self.newest.nodeid.partition("[")[0]

    def reasons(self, runs: list[Run]) -> dict[tuple[str, str], str]:
        """Return which results have an outcome for a reason that is worth telling: ``anon, shmem (6.1.0)``."""
        found: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for mem, cell in self.cells.items():
            for number, result in enumerate(cell):
                if result and result.reason:
                    found.setdefault((result.outcome, result.reason), []).append((mem, number))
        return {key: _where(places, runs) for key, places in found.items()}

    @property
    def times(self) -> str:
        """How long the results took that were not skipped, those of several runs in order: ``anon 0.8 / 1.2 ms``."""
        parts = []
        for mem, cell in self.cells.items():
            times = [_milliseconds(result) for result in cell]
            if any(times):
                parts.append(f"{mem} {' / '.join(time or '-' for time in times)}".lstrip())
        return ", ".join(parts) + " ms" if parts else ""


def _milliseconds(result: Result | None) -> str:
    """Return how long a result took, with two digits that count; nothing for one that was skipped or is not there."""
    if not result or result.outcome == "skip":
        return ""
    milliseconds = result.seconds * 1e3
    return f"{milliseconds:.1f}" if milliseconds < 9.95 else f"{milliseconds:.0f}"


def differ(cell: Iterable[Result | None]) -> bool:
    """Whether one result came out differently in the runs, or is missing in some."""
    return len({result.outcome if result else None for result in cell}) > 1


def matrix(runs: list[Run]) -> list[Line]:
    """Return a line for every case that some run has, in the order of topics."""
    lines: dict[str, Line] = {}
    slugs: set[str] = set()
    for number, run in enumerate(runs):
        for result in run.results.values():
            line = lines.get(result.line)
            if not line:
                line = lines[result.line] = Line(result.line, _slug(result.line, slugs), "", result)
            line.newest = result
            line.cells.setdefault(result.mem, [None] * len(runs))[number] = result
    for line in lines.values():
        line.topic = _topic(line.newest)
    return sorted(lines.values(), key=lambda line: (*_topic_rank(line.topic), line.place.partition("::")[0]))


def _slug(name: str, taken: set[str]) -> str:
    stem = slug = "c-" + re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    number = 1
    while slug in taken:
        number += 1
        slug = f"{stem}-{number}"
    taken.add(slug)
    return slug


def _topic(result: Result) -> str:
    folder = re.search(r"(?:^|/)cases/(\w+)/", result.nodeid)
    if folder and folder[1] != "contract":
        return FOLDERS.get(folder[1], folder[1].replace("_", " ").capitalize())
    group = result.rows[0].partition("-")[0] if result.rows else ""
    return contract.GROUPS.get(group, "Other" if result.rows or "::" in result.name else NO_CASE)


def _topic_rank(topic: str) -> tuple[int, str]:
    order = [NO_CASE, *FOLDERS.values(), *contract.GROUPS.values()]
    return (order.index(topic), "") if topic in order else (len(order), topic)


def topics(lines: list[Line]) -> list[tuple[str, list[Line], list[tuple[str, int]]]]:
    """Return each topic with its lines and its outcomes, counted."""
    by_topic: dict[str, list[Line]] = {}
    for line in lines:
        by_topic.setdefault(line.topic, []).append(line)
    return [(topic, members, tally(members)) for topic, members in by_topic.items()]


def tally(lines: Iterable[Line]) -> list[tuple[str, int]]:
    """Count the outcomes in lines."""
    counts = Counter(result.outcome for line in lines for result in line.results)
    return [(outcome, counts[outcome]) for outcome in OUTCOMES if counts[outcome]]


def memory_types(lines: list[Line]) -> list[str]:
    """Return the memory types that occur, in the suite's order."""
    there = {mem for line in lines for mem in line.cells if mem}
    known = [mem.name for mem in ALL if mem.name in there]
    return known + sorted(there - set(known))


def _where(places: list[tuple[str, int]], runs: list[Run]) -> str:
    """Say on which memory types and in which runs: ``anon, shmem (6.1.0)``; nothing where that is plain."""
    by_runs: dict[tuple[int, ...], list[str]] = {}
    for mem in dict.fromkeys(mem for mem, _ in places):
        by_runs.setdefault(tuple(number for each, number in places if each == mem), []).append(mem)
    parts = []
    for numbers, mems in by_runs.items():
        labels = ", ".join(runs[number].label for number in numbers) if len(numbers) < len(runs) else ""
        parts.append(" ".join(filter(None, (", ".join(filter(None, mems)), f"({labels})" if labels else ""))))
    return "; ".join(filter(None, parts))


# ---- broken promises -----------------------------------------------------------------------------------------------


@dataclass
class Evidence:
    """What results have to say that failed alike."""

    outcome: str
    reason: str
    text: str
    """The diagnostics of the first of them."""
    cut: int
    """How many lines of it are left out."""
    where: str
    """The memory types and runs."""


@dataclass
class Broken:
    """A promise that some result broke."""

    line: Line
    evidence: list[Evidence]
    """Empty when the page says too much already."""


def broken(lines: list[Line], runs: list[Run]) -> list[Broken]:
    """Return the promises that are broken, each with its evidence."""
    found, budget = [], DIAGNOSTICS_BUDGET
    for line in lines:
        if not BROKEN.isdisjoint(line.outcomes):
            evidence = _evidence(line, runs) if budget > 0 else []
            budget -= sum(len(each.text) for each in evidence)
            found.append(Broken(line, evidence))
    return found


def _evidence(line: Line, runs: list[Run]) -> list[Evidence]:
    alike: dict[tuple[str, str, str], list[tuple[str, int, Result]]] = {}
    for mem, cell in line.cells.items():
        for number, result in enumerate(cell):
            if result and result.broken:
                key = (result.outcome, result.reason, _essence(result.diagnostics))
                alike.setdefault(key, []).append((mem, number, result))
    evidence: list[Evidence] = []
    for (outcome, reason, _), members in alike.items():
        first = members[0][2]
        said = [text for text in first.diagnostics if text != f"promise: {first.promise}"]
        where = _where([(mem, number) for mem, number, _ in members], runs)
        kept = said[: MAX_FURTHER if evidence else MAX_DIAGNOSTICS]
        evidence.append(Evidence(outcome, reason, "\n".join(kept), len(said) - len(kept), where))
    return evidence


def _essence(diagnostics: Iterable[str]) -> str:
    """Return diagnostics without what is another one in each run: addresses and other numbers."""
    return re.sub(r"0x[0-9a-f]+|\d+", "0", "\n".join(diagnostics))


# ---- what groups of results have in common -------------------------------------------------------------------------


@dataclass
class Group:
    """Results that belong together for one reason."""

    title: str
    per_run: list[Counter[str]]
    """How many of the group's results have which outcome, for each run; "" counts those that a run has not."""
    members: dict[str, list[str]] = field(default_factory=dict)
    """The cases, each with the memory types."""
    order: int = 0
    """Its place among other groups, the lowest first."""
    id: str = ""
    slug: str = ""
    """The anchor of the case, if all are of one."""
    defect: Defect | None = None

    @property
    def size(self) -> int:
        """How many results belong to it, those of all runs counted once."""
        return max(sum(counts.values()) for counts in self.per_run)

    @property
    def rank(self) -> int:
        """The place in OUTCOMES of what a reader should look at first."""
        return min(OUTCOMES.index(outcome) for counts in self.per_run for outcome in counts if outcome)

    @property
    def differs(self) -> bool:
        """Whether the runs differ, as far as they have such results."""
        shown = {frozenset(outcome for outcome in counts if outcome) for counts in self.per_run}
        return len(shown - {frozenset()}) > 1

    @property
    def mems(self) -> str:
        """The memory types of all members."""
        there = {mem for mems in self.members.values() for mem in mems if mem}
        known = [mem.name for mem in ALL if mem.name in there]
        return ", ".join(known + sorted(there - set(known)))

    def add(self, line: Line, mem: str, cell: list[Result | None]) -> None:
        """Take the results of one cell in."""
        self.members.setdefault(line.name, []).append(mem)
        for counts, result in zip(self.per_run, cell, strict=True):
            counts[result.outcome if result else ""] += 1


Key = Callable[[Line, list[Result | None]], tuple[str, Group] | None]


def _group(lines: list[Line], key: Key) -> list[Group]:
    """Put cells together for which the key is the same; the group is that of the first. None leaves a cell out."""
    groups: dict[str, Group] = {}
    for line in lines:
        for mem, cell in line.cells.items():
            if found := key(line, cell):
                groups.setdefault(*found).add(line, mem, cell)
    return list(groups.values())


def differences(lines: list[Line], runs: list[Run]) -> list[Group]:
    """Return where the runs differ, each difference once: a broken promise, a known defect, or a reason to skip."""

    def key(line: Line, cell: list[Result | None]) -> tuple[str, Group] | None:
        if not differ(cell):
            return None
        group = Group("", [Counter() for _ in runs])
        results = [result for result in cell if result]
        tested = {result.outcome for result in results} - {"skip"}
        defect = next((result.defect for result in results if result.defect), None)
        if tested & BROKEN:
            group.title, group.slug = line.newest.promise or line.name, line.slug
            return f"case {line.name}", group
        if defect and len(tested) > 1:
            group.order, group.id, group.title, group.slug = 1, defect.id, defect.summary, line.slug
            return f"defect {defect.id}", group
        group.order = 2
        if differ(results):  # the first thing missing; the list of skips has them all
            reasons = (result.reason.partition("; ")[0] for result in results if result.outcome == "skip")
            group.title = "; ".join(dict.fromkeys(reasons)) or line.newest.promise or line.name
        else:
            group.order = 3
            without = (run.label for run, result in zip(runs, cell, strict=True) if not result)
            group.title = f"No such result in {', '.join(without)}"
        return f"{[result and result.outcome == 'skip' for result in cell]} {group.title}", group

    found = _group(lines, key)
    return sorted(found, key=lambda group: (group.order, group.rank if group.order < 2 else 0, -group.size))


def defects(lines: list[Line], runs: list[Run]) -> list[Group]:
    """Return the known defects that were looked for: first those about which runs differ, then those gone."""

    def key(line: Line, cell: list[Result | None]) -> tuple[str, Group] | None:
        defect = next((result.defect for result in reversed(cell) if result and result.defect), None)
        if not defect:
            return None
        return defect.id, Group(
            defect.summary, [Counter() for _ in runs], id=defect.id, slug=line.slug, defect=defect
        )

    found = [group for group in _group(lines, key) if group.rank != OUTCOMES.index("skip")]
    return sorted(found, key=lambda group: (not group.differs, group.rank, group.id))


def skips(lines: list[Line], runs: list[Run]) -> list[Group]:
    """Return the reasons for which results were skipped, most frequent first."""
    groups: dict[str, Group] = {}
    for line in lines:
        for mem, cell in line.cells.items():
            reasons = [result.reason if result and result.outcome == "skip" else None for result in cell]
            for reason in dict.fromkeys(reasons):
                if reason is not None:
                    group = groups.setdefault(reason, Group(reason or "no reason", [Counter() for _ in runs]))
                    alike = (result if why == reason else None for result, why in zip(cell, reasons, strict=True))
                    group.add(line, mem, list(alike))
    return sorted(groups.values(), key=lambda group: -group.size)


# ---- the contract --------------------------------------------------------------------------------------------------


@dataclass
class Clause:
    """A row of the contract, with what became of it."""

    id: str
    kind: str
    stated: str
    outcomes: Outcomes
    """The worst outcome of its results, for each run."""
    lines: list[Line]
    why_not: str = ""
    """Why no case can check it."""


def clauses(lines: list[Line], runs: list[Run]) -> list[tuple[str, list[Clause]]]:
    """Return the rows of the contract by group: all that there are, and those that only a run knows."""
    known, untested = contract.rows(), contract.untested()
    by_row: dict[str, list[Line]] = {}
    for line in lines:
        for row_id in dict.fromkeys(line.newest.rows):
            by_row.setdefault(row_id, []).append(line)
    groups: dict[str, list[Clause]] = {}
    for row_id in [*known, *sorted(set(by_row) - set(known))]:
        row = known.get(row_id) or contract.Row(row_id, "not in this version", "")
        members = by_row.get(row_id, [])
        outcomes = [_worst(members, number) for number in range(len(runs))]
        clause = Clause(row_id, contract.KINDS.get(row.kind, row.kind), row.stated, outcomes, members)
        clause.why_not = untested.get(row_id, "") if not members else ""
        groups.setdefault(contract.GROUPS.get(row_id.partition("-")[0], "Other rows"), []).append(clause)
    order = [*contract.GROUPS.values(), "Other rows"]
    return [(title, groups[title]) for title in order if title in groups]


def _worst(lines: list[Line], number: int) -> str | None:
    outcomes = {result.outcome for line in lines for cell in line.cells.values() if (result := cell[number])}
    return next((outcome for outcome in OUTCOMES if outcome in outcomes), None)


# ---- the runs ------------------------------------------------------------------------------------------------------


def headline(runs: list[Run], lines: list[Line]) -> str:
    """Say in a sentence or two what the runs showed."""
    if len(runs) == 1:
        gone = _defect_ids(runs[0], "xpass")
        more = f" {count(len(gone), 'known defect')} did not show." if gone else ""
        start = "As far as the run came, this" if runs[0].interrupted or runs[0].missing else "This"
        return f"{start} kernel {verdict(runs[0])}.{more}"
    breaking = sum(1 for run in runs if _broken_lines(run))
    broken_promises = count(len({name for run in runs for name in _broken_lines(run)}), "promise")
    different = sum(1 for line in lines if line.differs)
    first = f"{broken_promises} broken, on {breaking} of {len(runs)}" if breaking else "No promise is broken"
    second = f"They differ in {different} of {count(len(lines), 'case')}" if different else "They do not differ"
    return f"{first}. {second}."


def verdict(run: Run) -> str:
    """Say in a clause what a run showed, about the kernel: ``breaks 2 promises``."""
    if not set(run.totals) - {"skip"}:
        return "could not be tested"
    if breaking := _broken_lines(run):
        return f"breaks {count(len(breaking), 'promise')}"
    known = _defect_ids(run, "xfail")
    return "keeps every promise that was checked" + (f", save {count(len(known), 'known defect')}" if known else "")


def _defect_ids(run: Run, outcome: str) -> set[str]:
    return {result.defect.id for result in run.results.values() if result.defect and result.outcome == outcome}


def _broken_lines(run: Run) -> set[str]:
    return {result.line for result in run.results.values() if result.broken}


def remarks(run: Run) -> Iterator[str]:
    """Say what a reader must know to judge a run: that it is not whole, or was not looked at properly."""
    if run.interrupted:
        came = f": {len(run.results)} of {count(run.planned, 'result')} came" if run.planned else ""
        yield f"The run ended early ({run.interrupted}){came}."
    elif run.missing:
        yield f"{count(run.missing, 'result')} of {run.planned} never came."
    if run.deaths:
        yield f"{count(len(run.deaths), 'guest')} died, under {', '.join(run.deaths)}."
    if chosen := _selection(run.options):
        yield f"Only a part of the suite was run: {chosen}."
    if run.options.get("strict"):
        yield "Known defects count as broken promises (--strict)."
    if run.options.get("isolation") is False:
        yield "Cases ran in one process (--no-isolation)."
    if unreadable := run.environment.get("kernel_log_unreadable"):
        yield f"The kernel log was not watched: {unreadable}."
    if shortage := run.environment.get("hugepage_shortage"):
        yield f"Too few huge pages: {shortage}."
    if tainted := run.environment.get("tainted"):
        yield f"The kernel is tainted: {tainted}."


def _selection(options: dict[str, Any]) -> str:
    filters = options.get("filters")
    chosen = [f"-f {part}" for part in filters] if isinstance(filters, list) else []
    if keyword := options.get("keyword"):
        chosen.append(f"-k '{keyword}'")
    if options.get("documented_only"):
        chosen.append("--documented-only")
    return " ".join(chosen)


def count(number: int, word: str) -> str:
    """Return a number with its word: ``1 promise``, ``2 promises``."""
    return f"{number} {word}" + ("" if number == 1 else "s")
