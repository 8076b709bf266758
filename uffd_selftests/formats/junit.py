# SPDX-License-Identifier: GPL-2.0-only
"""JUnit XML, as Jenkins and GitLab show it well.

pytest could write such a file, too, but only of what pytest saw: not that the kernel complained between two cases, and
nothing at all of a kernel that died under it.

A run is a test suite, what was found on its machine its properties. The class name is the topic, so that both group by
it; the name is that of all reports. Jenkins shows the attribute ``message``, GitLab the text: both say it all.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from uffd_selftests.report.model import Result, Run

SUITE = "uffd-selftests"
"""The class of results that no case has."""

TAGS = {"fail": "failure", "timeout": "failure", "error": "error", "skip": "skipped", "xfail": "skipped"}
"""The element of each outcome that has one."""

FACTS = ("machine", "version", "page_size", "hugepage_size", "cpus", "memory", "feature_names")
"""What of the probed facts (docs/results.md) becomes a property."""

PROMISE = "promise: "
"""How the diagnostics begin."""

_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What no XML document may hold, not even as a character reference."""


def document(runs: Sequence[Run]) -> bytes:
    """Return the document of some runs."""
    root = ET.Element("testsuites", name=SUITE)
    root.extend(_suite(run, alone=len(runs) == 1) for run in runs)
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    root.set("time", f"{sum(run.seconds for run in runs):.3f}")
    ET.indent(root)
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _suite(run: Run, *, alone: bool) -> ET.Element:
    """Return one run. GitLab drops a second result of the same class and name, so one of several runs names itself."""
    prefix = "" if alone else f"{run.label}."
    cases = [_case(result, prefix) for result in run.results.values()]
    if run.unfinished:
        cases.append(_element("testcase", {"classname": prefix + SUITE, "name": "run", "time": "0"}))
        cases[-1].append(_element("error", {"type": "error", "message": run.unfinished}, run.unfinished))
    suite = _element("testsuite", {"name": run.label})
    for name, tag in (("tests", ""), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(name, str(sum(not tag or case.find(tag) is not None for case in cases)))
    suite.set("time", f"{run.seconds:.3f}")
    if run.started:
        suite.set("timestamp", run.started)
    if properties := list(_properties(run)):
        ET.SubElement(suite, "properties").extend(properties)
    suite.extend(cases)
    return suite


def _properties(run: Run) -> Iterator[ET.Element]:
    values = {name: run.facts.get(name) for name in FACTS} | run.versions
    for name, value in values.items():
        if value is not None:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield _element("property", {"name": name, "value": text})


def _case(result: Result, prefix: str) -> ET.Element:
    attributes = {"classname": prefix + topic(result.nodeid), "name": result.name, "time": f"{result.seconds:.3f}"}
    case = _element("testcase", attributes)
    if tag := TAGS.get(result.outcome):
        message = _message(result)
        text = "\n".join(result.diagnostics) or message
        case.append(_element(tag, {"type": result.outcome, "message": message}, text))
    elif result.outcome == "xpass":
        case.append(_element("system-out", {}, f"a known defect did not show: {result.reason}"))
    return case


def topic(nodeid: str) -> str:
    """Return the topic of a result of the suite, else the file with the test."""
    path = nodeid.partition("::")[0]
    if "::" not in nodeid:
        return SUITE
    parts = path.partition("uffd_selftests/cases/")[2] or path
    return parts.removesuffix(".py").replace("test_", "").replace("/", ".")


def _message(result: Result) -> str:
    """Return in one line why a result is no pass."""
    if result.outcome in ("skip", "xfail"):
        return result.reason
    told = [line for line in result.diagnostics if not line.startswith(PROMISE)]
    why = f"{result.outcome.upper()} {result.reason}" if result.reason else (told[0] if told else result.outcome)
    return f"{why} ({PROMISE}{result.promise})" if result.promise else why


def _element(tag: str, attributes: dict[str, str], text: str = "") -> ET.Element:
    element = ET.Element(tag, {name: _legal(value) for name, value in attributes.items()})
    element.text = _legal(text) or None
    return element


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)
