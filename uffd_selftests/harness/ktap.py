# SPDX-License-Identifier: GPL-2.0-only
"""Results as KTAP, the format of the kernel's own tests (Documentation/dev-tools/ktap.rst).

What its consumers insist on: the plan comes before the first result (kunit.py loops for ever otherwise), an expected
failure is "ok" with a directive (kunit.py counts "not ok ... # XFAIL" as a failure), a name holds no "#".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from uffd_selftests.harness.results import Result

VERSION = "TAP version 13"

DIRECTIVES = {"xfail": "XFAIL", "xpass": "XPASS", "skip": "SKIP", "timeout": "TIMEOUT", "error": "ERROR"}
"""The directive of each outcome that has one."""
FAILURES = ("fail", "timeout", "error")
"""The outcomes that are "not ok"."""


def escape(text: str) -> str:
    """Return text in one line, in which no part can be taken for a directive."""
    return " ".join(text.split()).replace("#", "\\#")


def result_line(number: int, result: Result) -> str:
    """Return the line of one result."""
    name = " ".join(result.name.replace("#", "").split())
    line = f"{'not ok' if result.outcome in FAILURES else 'ok'} {number} {name}"
    if directive := DIRECTIVES.get(result.outcome):
        line += f" # {directive} {escape(result.reason)}".rstrip()
    return line


def diagnostic_lines(lines: Iterable[str]) -> list[str]:
    """Return lines as diagnostics."""
    return [f"# {part}".rstrip() for line in lines for part in line.splitlines() or [""]]


def totals_line(counts: Mapping[str, int]) -> str:
    """Return the last line, as kselftest.h has it; it has no word for a timeout, which counts as a failure."""
    shown = {name: counts.get(name, 0) for name in ("pass", "fail", "xfail", "xpass", "skip", "error")}
    shown["fail"] += counts.get("timeout", 0)
    return "# Totals: " + " ".join(f"{name}:{count}" for name, count in shown.items())


class Writer:
    """Writes one run to its streams, each line at once.

    A method raises BrokenPipeError when nobody reads a stream any more; it writes no more to that one. Nor to one that
    cannot be written for another reason, a full disk above all, but then the run is worth more than the stream.
    """

    def __init__(self, *streams: TextIO) -> None:
        self.failure: OSError | None = None
        """Why a stream lacks what was written."""
        self._streams = list(streams)
        self._number = 0
        self._started = False

    def plan(self, count: int, remarks: Iterable[str] = ()) -> None:
        """Announce how many results will come, and say what the reader should know."""
        self._write(f"1..{count}", *diagnostic_lines(remarks))

    def result(self, result: Result) -> None:
        """Write a result behind its diagnostics."""
        self._number += 1
        self._write(*diagnostic_lines(result.diagnostics), result_line(self._number, result))

    def remark(self, *lines: str) -> None:
        """Write diagnostics that belong to no result."""
        self._write(*diagnostic_lines(lines))

    def bail_out(self, why: str) -> None:
        """Say that no more results will come."""
        self._write(f"Bail out! {escape(why)}")

    def totals(self, counts: Mapping[str, int]) -> None:
        """Write the counts of all outcomes."""
        self._write(totals_line(counts))

    def _write(self, *lines: str) -> None:
        if not self._started:
            self._started = True
            lines = (VERSION, *lines)
        text = "".join(f"{line}\n" for line in lines)
        broken: BrokenPipeError | None = None
        for stream in list(self._streams):
            try:
                stream.write(text)
                stream.flush()
            except BrokenPipeError as error:
                self._streams.remove(stream)
                broken = error
            except OSError as error:
                self._streams.remove(stream)
                self.failure = error
        if broken:
            raise broken
