# SPDX-License-Identifier: GPL-2.0-only
"""JUnit XML is what Jenkins and GitLab take it for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

from tests.formats.helpers import HOSTILE, ONE_OF_EACH, convert
from tests.report.helpers import Folder, result

if TYPE_CHECKING:
    from tests.conftest import Starter, SuiteWriter


def junit(folder: Folder, *documents: Path) -> ET.Element:
    """Return the JUnit XML of documents."""
    return ET.fromstring(convert("junit", folder, *documents))


def told(case: ET.Element) -> tuple[str, str | None, str | None]:
    """Return the element in a test case, with its message and text."""
    (child,) = case
    return child.tag, child.get("message"), child.text


def test_junit(folder: Folder) -> None:
    """Each outcome is what Jenkins and GitLab take it for, and says all that there is to say."""
    (suite,) = root = junit(folder, folder.document("7.1", *ONE_OF_EACH))
    counts = {"tests": "10", "failures": "3", "errors": "2"}
    assert {name: root.get(name) for name in counts} == counts
    assert {name: suite.get(name) for name in (*counts, "skipped")} == {**counts, "skipped": "3"}
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert list(cases) == [each["name"] for each in ONE_OF_EACH]
    assert cases["good on anon"].attrib == {"classname": "contract.copy", "name": "good on anon", "time": "0.250"}
    assert not list(cases["good on anon"])
    message = "expected EEXIST; got EINVAL (promise: The promise of bad.)"
    text = "promise: The promise of bad.\nexpected EEXIST; got EINVAL"
    assert told(cases["bad on anon"]) == ("failure", message, text)
    tag, stuck, _text = told(cases["stuck on anon"])
    assert (tag, stuck) == ("failure", "TIMEOUT 30 seconds (promise: The promise of stuck.)")
    tag, dead, _text = told(cases["dead on anon"])
    assert (tag, dead) == ("error", "ERROR killed by SIGSEGV (promise: The promise of dead.)")
    assert told(cases["lacking on anon"]) == ("skipped", *["CONFIG_GUP_TEST: ENOENT"] * 2)
    assert told(cases["known on anon"]) == ("skipped", *["D-CP-99: It bites"] * 2)
    assert told(cases["fixed on anon"]) == ("system-out", None, "a known defect did not show: D-CP-99: It bites")
    assert cases["kernel-log"].get("classname") == "uffd-selftests"
    assert told(cases["kernel-log"]) == ("failure", *["WARNING: mm/userfaultfd.c:1"] * 2)


def test_junit_kernels(folder: Folder) -> None:
    """Of several kernels no two results have the same name, and each says on what it ran."""
    environment = {"facts": {"machine": "aarch64", "page_size": 16384, "feature_names": ["A", "B"]}}
    documents = [folder.document(kernel, ONE_OF_EACH[0], environment=environment) for kernel in ("6.1", "7.1")]
    suites = list(junit(folder, *documents))
    assert [suite.get("name") for suite in suites] == ["6.1", "7.1"]
    assert [case.get("classname") for suite in suites for case in suite.iter("testcase")] == [
        "6.1.contract.copy",
        "7.1.contract.copy",
    ]
    properties = {each.get("name"): each.get("value") for each in suites[0].iter("property")}
    assert properties == {"machine": "aarch64", "page_size": "16384", "feature_names": "A B", "kernel": "6.1"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"planned": 5, "interrupted": "interrupted by SIGINT"}, "interrupted by SIGINT: 4 of 5 results never came"),
        ({"planned": 2}, "1 of 2 results never came"),
    ],
)
def test_junit_of_half_a_run(folder: Folder, more: dict[str, Any], message: str) -> None:
    """A run that ended early is not all green."""
    root = junit(folder, folder.document("7.1", ONE_OF_EACH[0], **more))
    (run,) = [case for case in root.iter("testcase") if case.get("name") == "run"]
    assert told(run) == ("error", message, message)
    assert root.get("errors") == "1"


def test_junit_hostile(folder: Folder) -> None:
    """Whatever a result says, the document is well-formed."""
    root = junit(folder, folder.document("7.1", result(HOSTILE, "fail", diagnostics=[HOSTILE], reason=HOSTILE)))
    (case,) = root.iter("testcase")
    assert told(case)[2] == "a\ufffdb\ufffd[31m</pre> & <b>|`_\ufffd\n\nnext"


def test_junit_of_a_dead_kernel(folder: Folder) -> None:
    """A kernel of which only its end is known fails."""
    root = junit(folder, folder.document("7.1", planned=9, interrupted="kernel panic: Unable to mount root fs"))
    message = "kernel panic: Unable to mount root fs: 9 of 9 results never came"
    assert told(next(root.iter("testcase"))) == ("error", message, message)


def test_junit_of_a_run(cli: Starter, suite: SuiteWriter) -> None:
    """A run with -o writes it."""
    run = cli.run("--", suite.write("def test_bad():\n    assert 1 == 2\n"))
    (case,) = ET.parse(run.folder / "junit.xml").iter("testcase")
    assert (case.get("classname"), case.get("name")) == ("inner", "test_inner.py::test_bad")
    tag, _message, text = told(case)
    assert tag == "failure"
    assert "assert 1 == 2" in str(text)
