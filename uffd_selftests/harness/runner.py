# SPDX-License-Identifier: GPL-2.0-only
"""Run each case where it can do no harm, and turn whatever became of it into pytest's reports."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import pytest
from _pytest.runner import runtestprotocol

from uffd_selftests.harness import gating, plain
from uffd_selftests.harness.isolation import Ending, How, Isolator, Send
from uffd_selftests.harness.items import CaseItem
from uffd_selftests.harness.jobs import Cases, Setting
from uffd_selftests.harness.launcher import Launcher, Order
from uffd_selftests.harness.results import GUEST, LAST, declaration, place, skipped_for
from uffd_selftests.harness.site import Lost, Site, Spent, setting
from uffd_selftests.machine.kvm import UNKNOWN
from uffd_selftests.machine.requirements import wants_kvm

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from uffd_selftests.case import Case
    from uffd_selftests.harness.settings import Settings
    from uffd_selftests.machine.facts import Facts
    from uffd_selftests.mem_types import MemType

SHOWN = 5
"""How many of the results are named that a process had before one that failed."""

GIVES_WAY = 10
"""How nice a case with one CPU is beside other workers: what they race for on all CPUs at once, one of them late leaves
the others idle."""

FILTERED = "killed by SIGSYS"
"""How a case ends that makes a system call for which a seccomp filter kills."""
NOT_ALLOWED = "a seccomp filter kills who makes a system call that this case needs: run outside of the sandbox"
PHASES = ("setup", "call", "teardown")

REFUSAL = pytest.StashKey[str]()
"""Why a test fails without having run: it lacks something that was required."""


class Runner:
    """A pytest plugin, in each process that runs tests."""

    def __init__(
        self,
        settings: Settings,
        facts: Facts,
        site: Site | None,
        *,
        turns: Path | None = None,
        sole: bool = False,
        guarded: Iterable[int] = (),
        cpu: int = 0,
        shows: bool = False,
    ) -> None:
        self._settings = settings
        self._facts = facts
        self._site = site
        """Where plain cases run; without one, in what this process forks."""
        self.has_own_site = site is None
        """Whether plain cases run in what this process has forked."""
        self._turns = turns
        """If this file is there, the huge pages do not suffice for all workers: whoever takes some locks it."""
        self._sole = sole
        """Nobody else runs cases there now, so that what the kernel says and loses is the doing of the case."""
        self._guarded = list(guarded)
        self._cpu = cpu
        """Where cases run that want a single CPU; another one for each worker."""
        self._shows = shows
        """Somebody wants to know what begins, even in a run in which only the results are told."""
        self._last: pytest.Item | None = None
        """What was run before."""
        self._together: list[str] = []
        """The results so far of the process that waits in the launcher for the next one."""
        self._ahead: dict[str, Order] = {}
        """What the launcher has begun already, if anything, by its nodeid."""
        self._shares = settings.sharing and not settings.pristine
        """Whether a process may run several cases: until the kernel complains, to know which one it means next time."""
        self._following: dict[str, pytest.Item | None] = {}
        """What runs after a test, by its nodeid; with workers that is a guess, but of the present one."""
        self._known_lacks: dict[tuple[int, MemType | None], list[gating.Missing]] = {}
        self._isolator: Isolator | None = None
        """Runs everything else: what is forked here has whatever other plugins left in this process."""
        self._asked: Launcher | None = None
        """Who has said whether a virtual processor can be had."""
        self.lost = ""
        """Why nothing more could be run, if so."""

    def close(self) -> None:
        """End what is running."""
        if self._site:
            self._site.close()
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
        self._learn(item, case)
        if lacking := self._lacking(case, mem):
            self._refuse(item, lacking)
            return None
        needed = self._hugepages(case, mem)
        with self._turn(needed):
            elsewhere = isinstance(item, CaseItem)  # where somebody looks
            if needed and not elsewhere and (reason := self._site_of(item).ask("begin", needed)):
                self._refuse(item, [gating.Missing(gating.HUGEPAGES, reason)])
                return None
            return self._run(item, isolate=True)

    def _hugepages(self, case: Case, mem: MemType | None) -> int:
        """Return how many huge pages a case takes."""
        return gating.hugepages_needed(case, mem, self._settings.area_bytes_of(case), self._facts.hugepage_size)

    def _learn(self, item: pytest.Item, case: Case) -> None:
        """Find out, before the first case that wants a virtual processor, whether one can be had; on each machine."""
        site = self._launchers(item)
        if not wants_kvm(case.needs) or (self._facts.kvm is not None and not site.remote):
            return
        try:
            if self._asked is site.launcher:
                return
            found, self._asked = site.ask("kvm"), site.launcher
        except Spent:  # which the case is told as well
            return
        except (OSError, EOFError, Lost):  # a kernel that dies of it: the case is to show that
            site.close()
            found = UNKNOWN
        if self._facts.kvm is None:
            self._facts = replace(self._facts, kvm=found)

    def _lacking(self, case: Case, mem: MemType | None) -> list[gating.Missing]:
        known = self._known_lacks.get((id(case), mem))
        if known is None:
            known = gating.missing(case, mem, self._facts)
            if case.may_hang_kernel and not (self._settings.may_hang_kernel or (self._site and self._site.remote)):
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
        if self._site and self._together:
            self._site.dismiss()
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

    def _run(self, item: pytest.Item, *, isolate: bool) -> bool | None:
        """Run a test in a child and report, or leave it to pytest."""
        if not isolate or not self._settings.isolate:
            return None
        hook, brief = item.ihook, self._settings.brief
        if self._shows or not brief:
            hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        try:
            reports = self._isolated(item)
        except Spent as spent:
            reports = _reports(item, Ending(How.ERROR, str(spent), [], [], [], 0.0), is_plain=True)
        except Lost as lost:
            reports = _reports(item, Ending(How.ERROR, str(lost), [], [], [], 0.0), is_plain=True)
            item.session.shouldstop = self.lost = str(lost)
        if not reports:
            return None
        if brief:
            reports = _shortened(reports)
        for report in reports:
            hook.pytest_runtest_logreport(report=report)
        if not brief:
            hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _isolated(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Run a test in a child; return nothing when it lacks huge pages and is left to pytest."""
        case, _, _ = declaration(item)
        is_plain = isinstance(item, CaseItem)
        if self._last and self._last.parent is not item.parent:
            self._together = []
        together = self._together
        guest = ""
        if isinstance(item, CaseItem):
            ending, guest = self._launch(item)
        else:
            ending = self._fork(item)
        trusted = not self._site or not self._site.remote
        ending.records = [plain.unpack(record) or (record if trusted else None) for record in ending.records]
        for record in ending.records:
            if isinstance(record, plain.Lacking):
                self._refuse(item, [gating.Missing(gating.HUGEPAGES, record.reason)])
                return []
        self._last = item
        if case and case.stress and ending.how is not How.DONE:
            ending.evidence.append(f"again: --stress-seed {self._settings.stress_seed}")
        if self._facts.seccomp and ending.reason == FILTERED:
            reports = [_passed(item, "setup"), _skipped(item, ending.seconds, NOT_ALLOWED), _passed(item, "teardown")]
        else:
            reports = _reports(item, ending, is_plain=is_plain)
        left = [record.line for record in ending.records if isinstance(record, plain.Leak)] + ending.leftovers
        if left:
            _fail_late(item, reports, "left behind", left)
        if complaints := ending.complaints:
            if together:
                others = f"{together[0]} and {len(together) - 1} more" if together[1:] else together[0]
                complaints.append(f"the same process had run {others}; from now on each case has its own")
            self._shares = False
            _fail_late(item, reports, "the kernel complained", complaints)
        if failed := [report for report in reports if report.failed]:
            self._part()
            if together:
                failed[0].sections.append(("Before it, its process had run", "\n".join(together[-SHOWN:])))
        for report in reports if guest else ():
            setattr(report, GUEST, guest)
        if is_plain:
            self._look_after(ending)
        return reports

    def _look_after(self, ending: Ending) -> None:
        """Have another machine do what follows, if this one is not as it was and there are others."""
        if self._site and self._site.remote and (ending.damaged or self._settings.pristine):
            self._site.replace()
            self._ahead, self._together = {}, []

    def _launch(self, item: CaseItem) -> tuple[Ending, str]:
        """Run a plain case in a child of a process that does nothing else; return the name of its machine, too."""
        site = self._site_of(item)
        site.supply(item.path, item.function.__module__)
        following = self._following[item.nodeid]
        then = None
        if isinstance(following, CaseItem) and self._may_follow(following):
            then = self._order(following, before=item)
        guest = site.launcher.name
        ending = site.run(self._ahead.get(item.nodeid) or self._order(item, before=self._last), then)
        self._ahead = {following.nodeid: then} if following and then and ending.followed else {}
        self._together = [*self._together, item.result_name] if ending.rests else []
        return ending, guest

    def _launchers(self, item: pytest.Item) -> Site:
        """Return where plain cases run, which may not be ready for them."""
        if not self._site:
            self._site = Site(lambda: Launcher.start(Cases(_describer(item.session)), self._guarded))
        return self._site

    def _site_of(self, item: pytest.Item) -> Site:
        """Return where plain cases run, made ready for them."""
        site = self._launchers(item)
        if not site.is_set_up:
            site.set_up(self._setting(item))
            if self._isolator:
                self._isolator.spare(site.launcher.pid)
        return site

    def _setting(self, item: pytest.Item) -> Setting:
        """Return what a launcher is to know of this run; one of another machine takes care of its huge pages."""
        remote = self._site is not None and self._site.remote
        result = setting(self._settings, self._facts, sole=self._sole, remote=remote)
        if remote:
            items = [each for each in item.session.items if isinstance(each, CaseItem)]
            for each in items:
                self._learn(each, each.case)
            able = [each for each in items if not self._lacking(each.case, each.mem)]
            result["hugepages"] = max((self._hugepages(each.case, each.mem) for each in able), default=0)
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Hand the steward what a worker's guest has to say at its end."""
        output = getattr(session.config, "workeroutput", None)
        if output is not None and self._site and self._site.remote:
            output["uffd"] = json.dumps({"lost": self.lost, "found": self._site.finish()})

    def late(self) -> list[str]:
        """Return what the kernel complained of after the last case of a process that has a launcher of its own."""
        complaints: list[str] = []
        with contextlib.suppress(OSError, EOFError, Lost):
            if self._sole and self._site and self._site.is_set_up:
                complaints = self._site.ask("end")["complaints"]
        return complaints

    def _order(self, item: CaseItem, *, before: pytest.Item | None) -> Order:
        """Return what the launcher needs to know of a plain case."""
        case, mem = item.case, item.mem
        capture = item.config.pluginmanager.getplugin("capturemanager")
        task = plain.Task(
            item.nodeid,
            item.result_name,
            item.function.__module__,
            item.function.__name__,
            item.arguments,
            item.variant,
            mem.name if mem else None,
            item.area_bytes,
            None if case.smp else self._cpu,
            GIVES_WAY if self._turns and not case.smp else 0,
            self._hugepages(case, mem),
            bool(expectation(item)),
            captured=bool(capture) and capture.is_globally_capturing() and not case.stress,  # which shows how far it is
        )
        return Order(
            task,
            self._settings.deadline_of(case),
            apart=before is None or before.parent is not item.parent,
            more=self._shares and self._goes_on(item),
        )

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
        return self._shares and self._is_fit(item) and not (case and case.may_hang_kernel)

    def _is_fit(self, item: pytest.Item) -> bool:
        """Whether a test is a plain case that can run here and is over soon: it does not show how far it is."""
        case, _, mem = declaration(item)
        if case is None or (self._facts.kvm is None and wants_kvm(case.needs)):  # nobody knows yet
            return False
        return isinstance(item, CaseItem) and not case.stress and not self._lacking(case, mem)

    def _fork(self, item: pytest.Item) -> Ending:
        """Run a test in a child of this process."""
        if not self._isolator:
            self._isolator = Isolator()
            for fd in self._guarded:
                self._isolator.guard(fd)
        case, _, _ = declaration(item)
        ending = self._isolator.run(lambda send: self._perform(item, send), deadline=self._settings.deadline_of(case))
        if case:
            found = self._site_of(item).ask("end")
            ending.leftovers += found["leftovers"]
            ending.complaints = found["complaints"]
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
        cpus = sorted(os.sched_getaffinity(0))
        plain.keep_to({cpus[self._cpu % len(cpus)]} if case and not case.smp else set(cpus))
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
    reports = [unpack(config=item.config, data=_tupled(data)) for data in ending.records if isinstance(data, dict)]
    if is_plain:
        reports = _fill_in(item, ending, reports)
    if ending.how is How.DONE and not ending.leftovers:
        return reports
    sections = ending.printed if is_plain else _captured(item)
    if ending.how is not How.DONE and not (is_plain and any(report.failed for report in reports)):
        word = ending.how.name
        text = "\n".join([f"{word} {ending.reason}", *ending.evidence])
        verdict = {"outcome": word.lower(), "reason": ending.reason, "evidence": ending.evidence, "died": ending.died}
        reports.append(_failure(item, reports, text, sections=sections, duration=ending.seconds, uffd=verdict))
    return reports


def _tupled(data: dict[str, Any]) -> dict[str, Any]:
    """Return pytest's report, as plain data, with the tuples that JSON has made lists of."""
    for name in ("location", "longrepr"):
        if isinstance(data.get(name), list):
            data[name] = tuple(data[name])
    for name in ("sections", "user_properties"):
        data[name] = [tuple(each) for each in data.get(name, ())]
    return data


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
            reports.append(_skipped(item, record.seconds, record.reason))
    reports.insert(0, _passed(item, "setup"))
    if ending.how is How.DONE or reports[-1].failed:
        reports.append(_passed(item, "teardown"))
        reports[1].sections += ending.printed
    return reports


def _passed(item: pytest.Item, when: Literal["setup", "call", "teardown"], seconds: float = 0.0) -> pytest.TestReport:
    """Return the report of a phase that went well."""
    return pytest.TestReport(item.nodeid, item.location, {item.name: 1}, "passed", None, when, duration=seconds)


def _skipped(item: pytest.Item, seconds: float, reason: str) -> pytest.TestReport:
    """Return the report of a case that found something missing."""
    report = _passed(item, "call", seconds)
    report.outcome, report.longrepr = "skipped", skipped_for(item, reason)
    return report


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
