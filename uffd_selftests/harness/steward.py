# SPDX-License-Identifier: GPL-2.0-only
"""What a run does once, in pytest's first process: the kernel probed, the machine changed and put back, all ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from uffd_selftests.harness import durations
from uffd_selftests.harness.results import Planned, Result
from uffd_selftests.harness.settings import STRESS_LOG
from uffd_selftests.harness.site import Lost, Site, merge, setting
from uffd_selftests.machine.facts import Facts

if TYPE_CHECKING:
    from collections.abc import Generator

    from uffd_selftests.command.interrupts import Signals
    from uffd_selftests.harness.guest import Machine
    from uffd_selftests.harness.reporter import Reporter
    from uffd_selftests.harness.runner import Runner
    from uffd_selftests.harness.settings import Settings

# Files in the folder that the steward and the workers share.
PAPER = "{worker}.json"
"""In it a worker hands in its plan."""
TURNS = "turns"
"""It is there when workers must take turns with the huge pages."""


def hand_in(folder: Path, worker: str, plan: list[Planned], error: str) -> None:
    """Give the steward a worker's plan, or the usage error that came of it."""
    paper = {"pid": os.getpid(), "error": error, "plan": [vars(planned) for planned in plan]}
    (folder / PAPER.format(worker=worker)).write_text(json.dumps(paper))


class Steward:
    """A pytest plugin, in the serial process or in xdist's controller, never in a worker."""

    def __init__(
        self, config: pytest.Config, settings: Settings, signals: Signals, reporter: Reporter | None = None,
        *, site: Site | None, machine: Machine | None = None,
    ) -> None:  # fmt: skip
        """Without a site each worker has one in a guest of its own, and the machine says what is known of them."""
        survey = machine.survey if machine else site.ask("survey") if site else {}
        self.facts = Facts.from_dict(survey["facts"])
        self.unreadable = str(survey["unreadable"])
        """Why the kernel's log cannot be read; empty when it can."""
        self.launchpad = ""
        """Where workers get their launchers, if not of themselves."""
        self.runner: Runner | None = None
        """What runs the cases, if this process does."""
        self._site = site
        self._machine = machine
        self._found: dict[str, Any] = {}
        self._changed: dict[str, Any] = {}
        self._cleanup = contextlib.ExitStack()
        if site:
            self._cleanup.callback(site.close)
        self._config = config
        self._settings = settings
        self._signals = signals
        self._reporter = reporter
        self._folder: Path | None = None
        self._workers: list[int] = []
        self._begun = False
        self._ended_by = self._lost = ""
        self._problems: list[Result] = []

    @property
    def folder(self) -> Path:
        """A folder that this process and its workers share, gone at the end."""
        if not self._folder:
            self._folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="uffd-selftests-")))
        return self._folder

    def close(self) -> None:
        """Put the machine back."""
        self._cleanup.close()

    # ---- the beginning ----

    def begin(self, plan: list[Planned], workers: int = 1) -> None:
        """Make ready for the results to come; does nothing if some could not be collected."""
        if self._ended_by or not plan:
            return
        self._begun = True
        if self._site:
            serial = self._config.getoption("dist", "no") == "no"
            told = setting(self._settings, self.facts, sole=serial, remote=self._site.remote)
            told["hugepages"] = workers * max(planned.hugepages for planned in plan)
            try:
                self._changed = self._site.set_up(told)
            except (EOFError, Lost) as error:
                raise pytest.exit.Exception(str(error), pytest.ExitCode.TESTS_FAILED) from None
            if self._changed["shortage"] and workers > 1:
                (self.folder / TURNS).touch()
        if self._reporter:
            self._reporter.begin(plan, self._remarks())

    def _remarks(self) -> list[str]:
        remarks = [f"Linux {self.facts.release} {self.facts.machine}"]
        if self.unreadable:
            remarks.append(f"the kernel log is not checked: {self.unreadable}")
        return remarks

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Hand an xdist worker what was probed."""
        node.workerinput["uffd"] = json.dumps(
            {
                "facts": self.facts.to_dict(),
                "folder": str(self.folder),
                "launchpad": self.launchpad,
                "shows": self._reporter is not None and self._reporter.shows,
            }
        )

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any) -> None:
        """Begin when the first xdist worker has collected; no test runs before all have."""
        paper = json.loads((self.folder / PAPER.format(worker=node.gateway.id)).read_text())
        self._workers.append(paper["pid"])
        if paper["error"]:
            raise pytest.UsageError(paper["error"])
        if self._ended_by:
            raise pytest.Session.Interrupted(self._ended_by)
        if not self._begun:
            self.begin([Planned.from_dict(planned) for planned in paper["plan"]], len(self._config.option.tx))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take what the guest of an xdist worker had to say at its end."""
        paper = json.loads(getattr(node, "workeroutput", {}).get("uffd", "{}"))
        self._lost = self._lost or paper.get("lost", "")
        self._ended_by = self._ended_by or self._lost
        merge(self._found, paper.get("found", {}))

    # ---- the end ----

    @pytest.hookimpl
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember that something cannot be collected."""
        if report.failed and not self._ended_by:
            self._ended_by = f"cannot collect {report.nodeid}: {_last_line(report.longrepr)}"

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Remember why the run ends early, and hurry the workers: xdist alone waits ten seconds for them."""
        self._ended_by = self._ended_by or str(excinfo.value) or excinfo.typename
        if self._signals.number:
            for pid in self._workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    @pytest.hookimpl(tryfirst=True)
    def pytest_internalerror(self, excrepr: object) -> None:
        """Remember why the run ends early."""
        self._ended_by = f"internal error: {_last_line(excrepr)}"

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        """End the run when xdist's workers are gone and pytest's own files are written, or cannot be."""
        failure: OSError | None = None
        try:
            yield
        except OSError as error:
            failure = error
        if self._begun:
            self._judge_run()
        lost = bool(self._lost or (self.runner and self.runner.lost))
        if lost or (self._problems and session.exitstatus == pytest.ExitCode.OK):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        self._write(session, failure)
        self.close()
        if self._reporter:
            self._reporter.write_page()

    def _write(self, session: pytest.Session, failure: OSError | None) -> None:
        """Write what is left to write; the run fails if it cannot."""
        ended_by = self._ended_by or str(session.shouldfail or session.shouldstop or "")
        if not self._reporter or not (self._begun or ended_by):
            return
        for problem in self._problems:
            self._reporter.add(problem)
        self._reporter.finish(ended_by)
        if self._machine:
            durations.remember(Path(self._machine.measured), self._reporter.results)
        try:
            self._reporter.write_files(self._documents(ended_by, int(session.exitstatus)))
            self._reporter.write_junit()
        except OSError as error:
            failure = error
        if self._reporter.complain(failure) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _judge_run(self) -> None:
        """Have the machine put back; find what no single result can be blamed for."""
        late = self.runner.late() if self.runner and self.runner.has_own_site else None
        self._found = self._site.finish() if self._site else self._found
        if complaints := self._found.get("complaints", []) if late is None else late:
            self._blame("kernel-log", complaints)
        if self._workers and (lost := self._found.get("lost")):
            self._blame("hugepages", lost)

    def _blame(self, name: str, lines: list[str]) -> None:
        self._problems.append(Result(Planned(name, name, name), "fail", diagnostics=lines))

    def _documents(self, ended_by: str, exitstatus: int) -> dict[str, Any]:
        environment = self._environment()
        return {
            "results.json": self._summary(ended_by, exitstatus, environment),
            "environment.json": environment,
            **({STRESS_LOG: log} if (log := self._found.get("stress")) else {}),
            "dmesg.txt": "".join(f"{record}\n" for record in self._found.get("records", ())),
        }

    def _environment(self) -> dict[str, Any]:
        pages = self._changed.get("hugepages")
        return {
            "facts": self.facts.to_dict(),
            "changed": {"hugepages": pages} if pages else {},
            "hugepage_shortage": self._changed.get("shortage"),
            "kernel_log_unreadable": self.unreadable or None,
            "tainted": self._found.get("tainted", ""),
        }

    def _summary(self, ended_by: str, exitstatus: int, environment: dict[str, Any]) -> dict[str, Any]:
        options = {**self._settings.to_dict(), "keyword": self._config.option.keyword, "workers": len(self._workers)}
        return self._reporter.summary(ended_by, exitstatus, options, environment) if self._reporter else {}

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Tell the reader of pytest's own output what no single result tells."""
        for problem in self._problems:
            terminalreporter.section(problem.name, red=True)
            for line in problem.diagnostics:
                terminalreporter.write_line(line)
        if self._begun and self.unreadable:
            terminalreporter.write_line(f"the kernel log was not checked: {self.unreadable}")


def _last_line(text: object) -> str:
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[-1].removeprefix("E ").strip() if lines else "unknown error"
