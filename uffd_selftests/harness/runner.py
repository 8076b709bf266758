# SPDX-License-Identifier: GPL-2.0-only
"""Run each case where it can do no harm, and turn whatever became of it into pytest's reports."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import sys
from typing import TYPE_CHECKING, Any, Literal

import pytest
from _pytest.runner import runtestprotocol

from uffd_selftests.harness import gating, launchpad, plain
from uffd_selftests.harness.health import HugepageUse
from uffd_selftests.harness.isolation import Ending, How, Isolator, Send
from uffd_selftests.harness.items import CaseItem
from uffd_selftests.harness.launcher import Launcher, Order
from uffd_selftests.harness.results import LAST, declaration, place, skipped_for
from uffd_selftests.machine.hugepages import lack_of_hugepages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from uffd_selftests.case import Case
    from uffd_selftests.harness.health import KernelHealth
    from uffd_selftests.harness.settings import Settings
    from uffd_selftests.machine.facts import Facts
    from uffd_selftests.mem_types import MemType

SHOWN = 5
"""How many of the results are named that a process had before one that failed."""

GIVES_WAY = 10
"""How nice a case with one CPU is beside other workers: what they race for on all CPUs at once, one of them late leaves
the others idle."""

PHASES = ("setup", "call", "teardown")

REFUSAL = pytest.StashKey[str]()
"""Why a test fails without having run: it lacks something that was required."""


class Runner:
    """A pytest plugin, in each process that runs tests."""

    def __init__(
        self,
        settings: Settings,
        facts: Facts,
        *,
        turns: Path | None = None,
        health: KernelHealth | None = None,
        guarded: Iterable[int] = (),
        cpu: int = 0,
        launcher: Launcher | None = None,
        launchpad: str = "",
        shows: bool = False,
    ) -> None:
        self._settings = settings
        self._facts = facts
        self._turns = turns
        """If this file is there, the huge pages do not suffice for all workers: whoever takes some locks it."""
        self._health = health
        """Set if nobody else runs cases now, so that what the kernel says and loses is the doing of the case."""
        self._guarded = list(guarded)
        self._cpus = sorted(os.sched_getaffinity(0))
        self._cpu = self._cpus[cpu % len(self._cpus)]
        """Where cases run that want a single CPU; another one for each worker."""
        self._given = launcher
        """What is the launcher first; it is smaller than what this process can fork, and knows no pytest."""
        self._shows = shows
        """Somebody wants to know what begins, even in a run in which only the results are told."""
        self._launchpad = launchpad
        """Where there are others like that, if anywhere."""
        self._launcher: Launcher | None = None
        """Runs plain cases."""
        self._last: pytest.Item | None = None
        """What was run before."""
        self._together: list[str] = []
        """The results so far of the process that waits in the launcher for the next one."""
        self._ahead: dict[str, Order] = {}
        """What the launcher has begun already, if anything, by its nodeid."""
        self._shares = settings.sharing
        """Whether a process may run several cases: until the kernel complains, to know which one it means next time."""
        self._following: dict[str, pytest.Item | None] = {}
        """What runs after a test, by its nodeid; with workers that is a guess, but of the present one."""
        self._known_lacks: dict[tuple[int, MemType | None], list[gating.Missing]] = {}
        self._isolator: Isolator | None = None
        """Runs everything else: what is forked here has whatever other plugins left in this process."""

    def close(self) -> None:
        """End what is running."""
        for launcher in (self._given, self._launcher):
            if launcher:
                launcher.close()
        self._given = self._launcher = None
        if self._isolator:
            self._isolator.close()
            self._isolator = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Run a case in a child; leave to pytest what is to be skipped or to run in this process."""
        case, _, mem = declaration(item)
        if not self._following:
            items = item.session.items
            self._following = {each.nodeid: after for each, after in itertools.pairwise(items)}
        self._following[item.nodeid] = nextitem
        if not case:
            return self._run(item, isolate=self._settings.isolate_all or bool(item.get_closest_marker("isolated")))
        lacking = self._lacking(case, mem)
        needed = 0 if lacking else gating.hugepages_needed(case, mem, self._settings.area_bytes_of(case))
        with self._turn(needed):
            if item.nodeid in self._ahead:
                pass  # the launcher has looked
            elif needed and (reason := lack_of_hugepages(self._facts.hugepage_size, needed)):
                lacking = [gating.Missing(gating.HUGEPAGES, reason)]
            if lacking:
                self._refuse(item, lacking)
            return self._run(item, isolate=not lacking, hugepages=needed)

    def _lacking(self, case: Case, mem: MemType | None) -> list[gating.Missing]:
        known = self._known_lacks.get((id(case), mem))
        if known is None:
            known = gating.missing(case, mem, self._facts)
            if case.may_hang_kernel and not self._settings.may_hang_kernel:
                known.append(gating.NOT_ASKED_FOR)
            self._known_lacks[id(case), mem] = known
        return known

    def _refuse(self, item: pytest.Item, lacking: list[gating.Missing]) -> None:
        """Have pytest skip a test, or fail it if what it lacks was required."""
        reason = gating.sentence(lacking)
        if required := sorted({thing.name for thing in lacking} & self._settings.require):
            item.stash[REFUSAL] = f"{', '.join(required)} is required: {reason}"
        else:
            item.add_marker(pytest.mark.skip(reason=reason))
        self._part()

    def _part(self) -> None:
        """Let what runs next have a process of its own."""
        if self._launcher and self._together:
            self._launcher.dismiss()
        self._together = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Fail what lacks something required."""
        if reason := item.stash.get(REFUSAL, ""):
            pytest.fail(reason, pytrace=False)

    @contextlib.contextmanager
    def _turn(self, needed: int) -> Iterator[None]:
        """Wait until no other worker uses huge pages, if there are not enough for all."""
        if not needed or not self._turns or not self._turns.exists():
            yield
            return
        with self._turns.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # Not left to closing alone: a child that cannot be killed would still have the file open.
                fcntl.flock(file, fcntl.LOCK_UN)

    def _run(self, item: pytest.Item, *, isolate: bool, hugepages: int = 0) -> bool | None:
        """Run a test in a child and report, or leave it to pytest; hugepages says how many it may take."""
        if not isolate or not self._settings.isolate:
            return None
        hook, brief = item.ihook, self._settings.brief
        if self._shows or not brief:
            hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = self._isolated(item, hugepages=hugepages)
        if brief:
            reports = _shortened(reports)
        for report in reports:
            hook.pytest_runtest_logreport(report=report)
        if not brief:
            hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _isolated(self, item: pytest.Item, *, hugepages: int) -> list[pytest.TestReport]:
        case, _, _ = declaration(item)
        is_plain = isinstance(item, CaseItem)
        if self._last and self._last.parent is not item.parent:
            self._together = []
        together = self._together
        ending = self._launch(item) if isinstance(item, CaseItem) else self._fork(item, hugepages)
        self._last = item
        if case and case.stress and ending.how is not How.DONE:
            ending.evidence.append(f"again: --stress-seed {self._settings.stress_seed}")
        reports = _reports(item, ending, is_plain=is_plain)
        left = [record.line for record in ending.records if isinstance(record, plain.Leak)] + ending.leftovers
        if left:
            _fail_late(item, reports, "left behind", left)
        if self._health and not ending.followed and (complaints := self._health.complaints()):
            if together:
                others = f"{together[0]} and {len(together) - 1} more" if together[1:] else together[0]
                complaints.append(f"the same process had run {others}; from now on each case has its own")
            self._shares = False
            _fail_late(item, reports, "the kernel complained", complaints)
        if failed := [report for report in reports if report.failed]:
            self._part()
            if together:
                failed[0].sections.append(("Before it, its process had run", "\n".join(together[-SHOWN:])))
        return reports

    def _launch(self, item: CaseItem) -> Ending:
        """Run a plain case in a child of a process that does nothing else."""
        if not self._launcher:
            self._launcher = self._new_launcher(item.session)
            self._launcher.set_up(plain.Setting(dict(os.environ), list(sys.path), self._facts.hugepage_size))
            if self._isolator:
                self._isolator.spare(self._launcher.pid)
        following = self._following[item.nodeid]
        then = None
        if isinstance(following, CaseItem) and self._may_follow(following):
            then = self._order(following, before=item)
        ending = self._launcher.run(self._ahead.get(item.nodeid) or self._order(item, before=self._last), then)
        self._ahead = {following.nodeid: then} if following and then and ending.followed else {}
        self._together = [*self._together, item.result_name] if ending.rests else []
        if not self._launcher.alive:
            self._launcher.close()
            self._launcher = None
        return ending

    def _new_launcher(self, session: pytest.Session) -> Launcher:
        given, self._given = self._given, None
        if not given and self._launchpad:
            given = launchpad.connect(self._launchpad)
        return given or Launcher.start(plain.Cases(_describer(session)), self._guarded)

    def _order(self, item: CaseItem, *, before: pytest.Item | None) -> Order:
        """Return what the launcher needs to know of a plain case."""
        case, mem = item.case, item.mem
        capture = item.config.pluginmanager.getplugin("capturemanager")
        task = plain.Task(
            item.nodeid,
            item.function.__module__,
            item.function.__name__,
            item.arguments,
            item.variant,
            mem.name if mem else None,
            item.area_bytes,
            self._cpus_of(case),
            GIVES_WAY if self._turns and not case.smp else 0,
            gating.hugepages_needed(case, mem, item.area_bytes) if self._health else 0,
            bool(expectation(item)),
            captured=bool(capture) and capture.is_globally_capturing() and not case.stress,  # which shows how far it is
        )
        return Order(
            task,
            self._settings.deadline_of(case),
            apart=before is None or before.parent is not item.parent,
            more=self._shares and self._goes_on(item),
        )

    def _cpus_of(self, case: Case | None) -> frozenset[int]:
        """Return where a test may run."""
        return frozenset({self._cpu} if case and not case.smp else self._cpus)

    def _goes_on(self, item: pytest.Item) -> bool:
        """Whether what follows a case is one of the same file, and both are fit to share a process."""
        case, _, _ = declaration(item)
        following = self._following.get(item.nodeid)
        if not case or case.stress or not following or following.parent is not item.parent:
            return False
        return self._is_fit(following)

    def _may_follow(self, item: pytest.Item) -> bool:
        """Whether a test may begin while the result of the one before it is still to be written.

        Not when somebody is to know which case makes the kernel complain, or who has its turn with the huge pages.
        """
        case, _, _ = declaration(item)
        if self._turns and self._turns.exists():
            return False
        return self._shares and not self._settings.kmsg and self._is_fit(item) and not (case and case.may_hang_kernel)

    def _is_fit(self, item: pytest.Item) -> bool:
        """Whether a test is a plain case that can run here and is over soon: it does not show how far it is."""
        case, _, mem = declaration(item)
        return case is not None and isinstance(item, CaseItem) and not case.stress and not self._lacking(case, mem)

    def _fork(self, item: pytest.Item, hugepages: int) -> Ending:
        """Run a test in a child of this process."""
        if not self._isolator:
            self._isolator = Isolator()
            for fd in self._guarded:
                self._isolator.guard(fd)
        pages = HugepageUse(self._facts.hugepage_size if hugepages and self._health else 0)
        case, _, _ = declaration(item)
        ending = self._isolator.run(lambda send: self._perform(item, send), deadline=self._settings.deadline_of(case))
        ending.leftovers += pages.lost()
        return ending

    def _perform(self, item: pytest.Item, send: Send) -> None:
        """Run a test in the child and send its reports one by one, so that a later crash does not take them along."""
        failed = False

        def forward(*, report: pytest.TestReport) -> None:
            nonlocal failed
            failed |= report.failed
            send(item.config.hook.pytest_report_to_serializable(config=item.config, report=report))

        # Nobody in the child may hear of the reports: not the terminal, not the files, above all not xdist's channel.
        # Subtests report through the same hook.
        setattr(forward, "_hookimpls", [])  # noqa: B010  # which pytest looks at where only some conftest.py files count
        for relay in (item.config.hook, item.ihook):
            setattr(relay, "pytest_runtest_logreport", forward)  # noqa: B010  # mypy knows no hook by name
        case, _, _ = declaration(item)
        plain.keep_to(self._cpus_of(case))
        runtestprotocol(item, log=True, nextitem=None)
        if not failed:
            plain.send_leaks(send)


def _shortened(reports: list[pytest.TestReport]) -> list[pytest.TestReport]:
    """Leave out what only pytest's own plugins want to know, and say with the last one that it is the last."""
    if not any(report.failed for report in reports):
        reports = [report for report in reports if report.when == "call"] or reports
    setattr(reports[-1], LAST, True)
    return reports


def expectation(item: pytest.Item) -> str:
    """Return why a case is expected to fail; empty when it is not."""
    marker = item.get_closest_marker("xfail")  # the plugin's, for a plain case has no others
    return str(marker.kwargs["reason"]) if marker else ""


def _describer(session: pytest.Session) -> plain.Describe | None:
    """Return what makes pytest's report of a failure, if somebody wants to see it."""
    items = {item.nodeid: item for item in session.items}

    def describe(nodeid: str, error: BaseException) -> dict[str, Any]:
        def again() -> None:
            raise error

        item = items[nodeid]
        report = item.ihook.pytest_runtest_makereport(item=item, call=pytest.CallInfo.from_call(again, "call"))
        data: dict[str, Any] = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
        return data

    return describe if session.config.pluginmanager.hasplugin("terminalreporter") else None


def _reports(item: pytest.Item, ending: Ending, *, is_plain: bool) -> list[pytest.TestReport]:
    """Return pytest's reports of a child, with one more if it did not come to a good end."""
    unpack = item.config.hook.pytest_report_from_serializable
    reports = [unpack(config=item.config, data=data) for data in ending.records if isinstance(data, dict)]
    if is_plain:
        reports = _fill_in(item, ending, reports)
    if ending.how is How.DONE and not ending.leftovers:
        return reports
    sections = ending.printed if is_plain else _captured(item)
    if ending.how is not How.DONE and not (is_plain and any(report.failed for report in reports)):
        word = ending.how.name
        text = "\n".join([f"{word} {ending.reason}", *ending.evidence])
        verdict = {"outcome": word.lower(), "reason": ending.reason, "evidence": ending.evidence}
        reports.append(_failure(item, reports, text, sections=sections, duration=ending.seconds, uffd=verdict))
    return reports


def _fill_in(item: pytest.Item, ending: Ending, reports: list[pytest.TestReport]) -> list[pytest.TestReport]:
    """Add the reports of a plain case that the child leaves out."""
    for record in ending.records:
        if isinstance(record, plain.Passed):
            reports.append(_passed(item, "call", record.seconds))
            if reason := expectation(item):
                reports[-1].wasxfail = reason
        elif isinstance(record, plain.Failed) and not reports:  # nobody asked for more, or it took too long
            text = f"{record.message}\nat {place(item.location[0], record.places)}"
            reports.append(_failure(item, [_passed(item, "setup")], text, duration=record.seconds))
        elif isinstance(record, plain.Expected):
            failure = _passed(item, "call", record.seconds)
            failure.outcome, failure.longrepr, failure.wasxfail = "skipped", record.text, expectation(item)
            reports.append(failure)
        elif isinstance(record, plain.Skipped):
            skipped = _passed(item, "call", record.seconds)
            skipped.outcome, skipped.longrepr = "skipped", skipped_for(item, record.reason)
            reports.append(skipped)
    reports.insert(0, _passed(item, "setup"))
    if ending.how is How.DONE or reports[-1].failed:
        reports.append(_passed(item, "teardown"))
        reports[1].sections += ending.printed
    return reports


def _passed(item: pytest.Item, when: Literal["setup", "call", "teardown"], seconds: float = 0.0) -> pytest.TestReport:
    """Return the report of a phase that went well."""
    return pytest.TestReport(item.nodeid, item.location, {item.name: 1}, "passed", None, when, duration=seconds)


def _fail_late(item: pytest.Item, reports: list[pytest.TestReport], what: str, lines: list[str]) -> None:
    """Add a failure that shows only when a test is over; it takes the place of a teardown that went well."""
    failure = _failure(item, reports, f"{what}: " + "\n".join(lines))
    if reports and reports[-1].when == "teardown" and reports[-1].passed:
        failure.sections = reports.pop().sections
    reports.append(failure)


def _failure(item: pytest.Item, reports: list[pytest.TestReport], text: str, **more: Any) -> pytest.TestReport:
    """Return a failed report of the phase that follows those reported."""
    done = {report.when for report in reports if not hasattr(report, "context")}
    when = next((phase for phase in PHASES if phase not in done), "teardown")
    if any(report.when == "setup" and not report.passed for report in reports):
        when = "teardown"
    keywords = dict.fromkeys(item.keywords, 1)
    return pytest.TestReport(item.nodeid, item.location, keywords, "failed", text, when, **more)  # type: ignore[arg-type]


def _captured(item: pytest.Item) -> list[tuple[str, str]]:
    """Take what a killed child of this process printed: it wrote to the same files, and nobody else will read it."""
    manager = item.config.pluginmanager.getplugin("capturemanager")
    if not manager or not manager.is_globally_capturing():
        return []
    out, err = manager.read_global_capture()
    return [(f"Captured {name}", text) for name, text in (("stdout", out), ("stderr", err)) if text]
