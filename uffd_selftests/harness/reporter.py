# SPDX-License-Identifier: GPL-2.0-only
"""Collect the results of a run and write them: KTAP as they come, files at the end.

The files of ``-o DIR``:

results.tap
    The KTAP of the run.
results.json
    Everything about the run in one document; docs/results.md describes it.
environment.json
    What was found on the machine and what was changed there; a part of results.json, too.
dmesg.txt
    What the kernel logged during the run.
junit.xml
    results.json for CI systems.
stress.log
    A line for each bounce of a stress case (in a long run, two a second): result, seed, mode, what each thread did.
report.html
    results.json as a page for people.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TextIO

import pytest

import uffd_selftests
from uffd_selftests.harness import ktap
from uffd_selftests.harness.results import LAST, Planned, Result, judge, told_of_deaths
from uffd_selftests.report.model import FORMAT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from uffd_selftests.command.interrupts import Signals
    from uffd_selftests.harness.settings import Settings


class Reporter:
    """A pytest plugin, in the one process that sees all reports."""

    def __init__(self, settings: Settings, signals: Signals) -> None:
        self.results: list[Result] = []
        self._open: dict[str, Planned] = {}
        self._reports: dict[str, list[pytest.TestReport]] = {}
        self._folder = settings.folder
        self._data_only = settings.data_only
        self._progress = sys.stderr if settings.brief and sys.stderr.isatty() else None
        self._signals = signals
        self._planned = 0
        self._started = datetime.now(timezone.utc)
        self._clock = time.monotonic()
        self._streams: list[TextIO] = []
        if settings.ktap_fd is not None:
            self._streams.append(open(settings.ktap_fd, "w", closefd=False))  # noqa: SIM115  # open as long as this is
        if self._folder:
            self._streams.append((self._folder / "results.tap").open("w"))
        self._ktap = ktap.Writer(*self._streams)

    @property
    def shows(self) -> bool:
        """Whether it tells somebody what begins."""
        return bool(self._progress)

    @property
    def descriptors(self) -> list[int]:
        """What must not be written to by anybody else."""
        return [stream.fileno() for stream in self._streams]

    def close(self) -> None:
        """Close the files."""
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.close()

    @property
    def totals(self) -> Counter[str]:
        """How many results there are of each outcome."""
        return Counter(result.outcome for result in self.results)

    @property
    def deaths(self) -> list[str]:
        """The names of the results under which a guest has died."""
        return [result.name for result in self.results if result.died]

    def begin(self, plan: Iterable[Planned], remarks: Iterable[str]) -> None:
        """Announce the results to come."""
        self._open = {planned.nodeid: planned for planned in plan}
        self._planned = len(self._open)
        with self._ending_without_reader():
            self._ktap.plan(self._planned, remarks)

    @pytest.hookimpl
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Show what is running."""
        if self._progress and nodeid in self._open:
            self._show(f"[{len(self.results) + 1}/{self._planned}] {self._open[nodeid].name}")

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a report until its test is finished; xdist does not finish a test whose worker died."""
        self._reports.setdefault(report.nodeid, []).append(report)
        if report.when not in ("setup", "call", "teardown") or hasattr(report, LAST):
            self.pytest_runtest_logfinish(report.nodeid)

    @pytest.hookimpl
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Write the result of a test."""
        reports = self._reports.pop(nodeid, [])
        planned = self._open.pop(nodeid, None)
        if planned and reports:
            self.add(judge(planned, reports))

    def add(self, result: Result) -> None:
        """Write a result."""
        self.results.append(result)
        self._show("")
        with self._ending_without_reader():
            self._ktap.result(result)

    @contextlib.contextmanager
    def _ending_without_reader(self) -> Iterator[None]:
        """End the run as a program ends when nobody reads its output any more."""
        try:
            yield
        except BrokenPipeError:
            self._signals.interrupt(signal.SIGPIPE)

    def finish(self, interrupted: str) -> None:
        """Write what is left to say; interrupted says why the run ended before its time, if it did."""
        if not interrupted:
            for planned in list(self._open.values()):
                self.add(Result(planned, "error", "never ran"))
        self._show("")
        with contextlib.suppress(BrokenPipeError):
            if self.deaths:
                self._ktap.remark(told_of_deaths(self.deaths))
            if self._planned:
                self._ktap.totals(self.totals)
            if interrupted and (self._open or not self._planned):
                self._ktap.bail_out(interrupted)

    def write_files(self, documents: dict[str, Any]) -> None:
        """Write files of the given names into the folder, as text or as JSON; raises OSError, leaving no half file."""
        if not self._folder:
            return
        for name, content in documents.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            try:
                (self._folder / name).write_text(text, "utf-8", "surrogateescape")
            except OSError:
                (self._folder / name).unlink(missing_ok=True)
                raise

    def write_junit(self) -> None:
        """Write junit.xml from results.json; raises OSError, leaving no half file."""
        if self._folder and not self._data_only:
            from uffd_selftests.formats import junit  # noqa: PLC0415  # few runs want it
            from uffd_selftests.report import model  # noqa: PLC0415

            run = model.load(self._folder / "results.json")
            self.write_files({"junit.xml": junit.document([run]).decode()})

    def write_page(self) -> None:
        """Write report.html from results.json; one that cannot be made is no failure of the run."""
        source = self._folder and self._folder / "results.json"
        if self._data_only or not source or not source.exists():
            return
        from uffd_selftests.report import command, model  # noqa: PLC0415  # few runs want it

        try:
            command.write([model.load(source)], source.with_name("report.html"))
        except ValueError as error:
            sys.stderr.write(f"uffd-selftests: no report.html: {error}\n")

    def complain(self, error: OSError | None) -> bool:
        """Say that the reports are not whole, if so, because of an error or of one before."""
        if error := error or self._ktap.failure:
            sys.stderr.write(f"uffd-selftests: cannot write the results: {error.strerror}\n")
        return error is not None

    def summary(
        self, interrupted: str, exitstatus: int, options: dict[str, Any], environment: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the content of results.json."""
        return {
            "format": FORMAT,
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock, 3),
            "planned": self._planned,
            "results": [result.to_dict() for result in self.results],
            "totals": dict(self.totals),
            "interrupted": interrupted,
            **({"deaths": self.deaths} if self.deaths else {}),
            "exitstatus": exitstatus,
            "options": options,
            "versions": {
                "uffd-selftests": uffd_selftests.__version__,
                "kernel": str(environment["facts"]["release"]),
                "python": platform.python_version(),
                "pytest": pytest.__version__,
            },
            "environment": environment,
        }

    def _show(self, text: str) -> None:
        """Replace the progress line."""
        if self._progress:
            width = os.get_terminal_size(self._progress.fileno()).columns or 80  # 0 where nobody knows
            self._progress.write(f"\r\033[K{text[: width - 1]}")
            self._progress.flush()
