# SPDX-License-Identifier: GPL-2.0-only
"""Results for CI systems: JUnit XML, KCIDB, Markdown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

from tests.test_report import DEFECT, Folder, result
from uffd_selftests.formats import names, summary
from uffd_selftests.formats.command import main
from uffd_selftests.report.model import load

if TYPE_CHECKING:
    from tests.conftest import Starter, SuiteWriter

ROOT = Path(__file__).parent.parent

ONE_OF_EACH = (
    result("good on anon"),
    result("bad on anon", "fail", diagnostics=["promise: The promise of bad.", "expected EEXIST; got EINVAL"]),
    result("stuck on anon", "timeout", reason="30 seconds", diagnostics=["blocked in handle_userfault"]),
    result("dead on anon", "error", reason="killed by SIGSEGV"),
    result("panic on anon", "error", reason="kernel panic: Oops"),
    result("late on anon", "skip", reason="never ran: the kernel was gone"),
    result("lacking on anon", "skip", reason="CONFIG_GUP_TEST: ENOENT"),
    result("known on anon", "xfail", reason="D-CP-99: It bites", defect=DEFECT),
    result("fixed on anon", "xpass", reason="D-CP-99: It bites", defect=DEFECT),
    {"name": "kernel-log", "outcome": "fail", "nodeid": "kernel-log", "diagnostics": ["WARNING: mm/userfaultfd.c:1"]},
)
HOSTILE = "a\0b\x1b[31m</pre> & <b>|`_\ud800\n\nnext"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder for documents."""
    return Folder(tmp_path)


def convert(name: str, folder: Folder, *arguments: object) -> str:
    """Return what a command makes."""
    output = folder.path / name
    assert main(name, [*map(str, arguments), "-o", str(output)]) == 0
    return output.read_text("utf-8")


# ---- JUnit XML -----------------------------------------------------------------------------------------------------


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


# ---- KCIDB ---------------------------------------------------------------------------------------------------------


def kcidb(folder: Folder, *documents: Path) -> dict[str, Any]:
    """Return the submission of documents, judged by KCIDB's own library."""
    io = pytest.importorskip("kcidb_io", reason="kcidb-io is not installed: pip install kcidb-io")
    text = convert("kcidb", folder, *documents, "--origin", "mylab", "--build-id", "mylab:build-7")
    submission: dict[str, Any] = json.loads(text)
    io.schema.V5_3.validate(submission)
    return submission


def test_kcidb(folder: Folder) -> None:
    """Each outcome has its status; a known defect is an issue, with an incident for where it shows or does not."""
    submission = kcidb(folder, folder.document("7.1", *ONE_OF_EACH, started="2026-05-06T07:08:09+00:00"))
    whole, *tests = submission["tests"]
    assert {test["path"]: test["status"] for test in tests} == {
        "uffd.good.anon": "PASS",
        "uffd.bad.anon": "FAIL",
        "uffd.stuck.anon": "FAIL",
        "uffd.dead.anon": "ERROR",
        "uffd.panic.anon": "FAIL",
        "uffd.late.anon": "MISS",
        "uffd.lacking.anon": "SKIP",
        "uffd.known.anon": "FAIL",
        "uffd.fixed.anon": "PASS",
        "uffd.kernel-log": "FAIL",
    }
    assert (whole["path"], whole["status"], whole["start_time"]) == ("uffd", "FAIL", "2026-05-06T07:08:09+00:00")
    assert {test["build_id"] for test in submission["tests"]} == {"mylab:build-7"}
    assert len({test["id"] for test in submission["tests"]}) == 11
    assert tests[1]["log_excerpt"] == "promise: The promise of bad.\nexpected EEXIST; got EINVAL"
    (issue,) = submission["issues"]
    assert (issue["id"], issue["comment"]) == ("mylab:uffd-D-CP-99", "It bites")
    by_id = {test["id"]: test["path"] for test in tests}
    assert {by_id[each["test_id"]]: (each["issue_id"], each["present"]) for each in submission["incidents"]} == {
        "uffd.known.anon": (issue["id"], True),
        "uffd.fixed.anon": (issue["id"], False),
    }


def test_kcidb_again(folder: Folder) -> None:
    """The same results have the same ids when they are submitted again, two runs of a kernel have others."""
    document = folder.document("7.1", *ONE_OF_EACH, started="2026-05-06T07:08:09+00:00")
    assert kcidb(folder, document) == kcidb(folder, document)
    again = folder.document("again", *ONE_OF_EACH, versions={"kernel": "7.1"}, started="2026-05-06T08:00:00+00:00")
    ids = [test["id"] for test in kcidb(folder, document, again)["tests"]]
    assert len(set(ids)) == len(ids) == 22


@pytest.mark.parametrize(
    ("results", "more", "status"),
    [
        (ONE_OF_EACH[:1], {}, "PASS"),
        (ONE_OF_EACH[:1], {"interrupted": "interrupted by SIGINT"}, "ERROR"),
        (ONE_OF_EACH[:1], {"planned": 2}, "ERROR"),
        ((), {"planned": 2, "interrupted": "kernel panic: Unable to mount root fs"}, "FAIL"),
        ((ONE_OF_EACH[6],), {}, "SKIP"),
        ((), {}, "ERROR"),
    ],
)
def test_kcidb_of_a_run(folder: Folder, results: tuple[dict[str, Any], ...], more: dict[str, Any], status: str) -> None:
    """A run as a whole has the gravest status of its results, and is no pass when some are missing."""
    assert kcidb(folder, folder.document("7.1", *results, **more))["tests"][0]["status"] == status


def test_kcidb_hostile(folder: Folder) -> None:
    """Whatever a result says, KCIDB takes it."""
    said = {"diagnostics": [HOSTILE, "x" * 20000], "reason": HOSTILE, "promise": HOSTILE}
    (_, test) = kcidb(folder, folder.document("7.1", result(HOSTILE, "fail", **said)))["tests"]
    assert len(test["log_excerpt"]) == 16384


# ---- names ---------------------------------------------------------------------------------------------------------


def test_paths_of_the_suite(folder: Folder) -> None:
    """Every result of the suite has a path that KCIDB allows, its own, and without a checksum."""
    listing = subprocess.run(
        [sys.executable, "-m", "uffd_selftests", "-l"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    plain = []
    for name in listing.stdout.splitlines():
        match = re.fullmatch(r"(?P<case>.*?)(?: \((?P<variant>.*)\))?(?: on (?P<mem>\S+))?", name)
        assert match
        plain.append({"name": name, "outcome": "pass", **match.groupdict()})
    results = load(folder.document("7.1", *plain)).results
    paths = names.paths(results.values())
    assert len(paths) > 2000
    assert len(set(paths.values())) == len(paths)
    assert {name: path for name, path in paths.items() if path != names.path(results[name])} == {}
    assert paths["UFFDIO_API (with /dev/userfaultfd)"] == "uffd.UFFDIO_API.with-dev-userfaultfd"
    assert paths["move-pmd-split on anon"] == "uffd.move-pmd-split.anon"


def test_paths_that_clash(folder: Folder) -> None:
    """Names that only differ in what a path cannot hold do not become one."""
    alike = [result("a b"), result("a-b"), result("a(b)"), result("c")]
    paths = names.paths(load(folder.document("7.1", *alike)).results.values())
    assert len(set(paths.values())) == 4
    assert paths["c"] == "uffd.c"
    assert re.fullmatch(r"uffd\.a-b-[0-9a-f]{8}", paths["a b"])


# ---- Markdown ------------------------------------------------------------------------------------------------------


def test_summary(folder: Folder) -> None:
    """The table counts by kernel; broken promises and known defects follow."""
    text = convert("summary", folder, folder.document("6.1", ONE_OF_EACH[0]), folder.document("7.1", *ONE_OF_EACH))
    lines = text.splitlines()
    assert lines[0] == "### userfaultfd: 5 broken promises"
    assert lines[2] == "| kernel | pass | skip | xfail | xpass | error | timeout | fail |"
    assert lines[4:6] == ["| 6.1 | 1 | 0 | 0 | 0 | 0 | 0 | 0 |", "| 7.1 | 1 | 2 | 1 | 1 | 2 | 1 | 2 |"]
    assert "#### 7.1: broken promises" in lines
    assert "<details><summary>stuck on anon: TIMEOUT 30 seconds</summary>" in lines
    assert "<pre>promise: The promise of bad.\nexpected EEXIST; got EINVAL</pre>" in text
    assert "- D-CP-99: It bites (7.1)" in lines


@pytest.mark.parametrize(
    ("results", "more", "verdict"),
    [
        (ONE_OF_EACH[:1], {}, "no broken promise"),
        (ONE_OF_EACH[1:2], {}, "1 broken promise"),
        (ONE_OF_EACH[:1], {"planned": 2}, "the run is not whole"),
        ((ONE_OF_EACH[6],), {}, "nothing could be tested"),
    ],
)
def test_verdict(folder: Folder, results: tuple[dict[str, Any], ...], more: dict[str, Any], verdict: str) -> None:
    """Its heading says what a reader wants to know."""
    text = convert("summary", folder, folder.document("7.1", *results, **more))
    assert text.startswith(f"### userfaultfd: {verdict}\n")


def test_summary_hostile(folder: Folder) -> None:
    """Nothing that a result says ends its block or becomes a tag."""
    text = convert("summary", folder, folder.document("7.1", result(HOSTILE, "fail", diagnostics=HOSTILE.splitlines())))
    assert text.count("<pre>") == text.count("</pre>") == 1
    assert "<b>" not in text


def test_summary_is_bounded(folder: Folder) -> None:
    """A kernel on which everything fails does not make a page that GitHub refuses."""
    results = [result(f"case-{number} on anon", "fail", diagnostics=["x" * 500] * 40) for number in range(2000)]
    text = convert("summary", folder, folder.document("7.1", *results))
    assert f"and {2000 - summary.MAX_SHOWN} more" in text
    assert len(text) < 1 << 20


# ---- the commands --------------------------------------------------------------------------------------------------


def test_label(folder: Folder) -> None:
    """A run can be called something else than its kernel."""
    path = folder.document("7.1", ONE_OF_EACH[0])
    assert "| patched | 1 |" in convert("summary", folder, f"patched={path.parent}")


def test_stdout(folder: Folder) -> None:
    """Without -o it goes to stdout, and a reader may have enough."""
    path = folder.document("7.1", *ONE_OF_EACH)
    call = [sys.executable, "-m", "uffd_selftests", "summary", str(path)]
    assert subprocess.run(call, capture_output=True, text=True, check=True, cwd=ROOT).stdout.startswith("### ")
    reader, writing = os.pipe()
    os.close(reader)
    with open(writing, "wb") as broken:
        done = subprocess.run(call, stdout=broken, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "junit",
            ["missing.json"],
            "uffd-selftests junit: missing.json: no such file: name the folder that a run wrote with -o\n",
        ),
        ("junit", [], "uffd-selftests junit: the following arguments are required: [LABEL=]RESULTS; "),
        ("summary", ["{good}", "-o", "no/such/folder"], "uffd-selftests summary: cannot write no/such/folder: "),
        ("summary", ["{good}", "-o", "/dev/full"], "uffd-selftests summary: cannot write /dev/full: No space left"),
        ("kcidb", ["{good}"], "uffd-selftests kcidb: the following arguments are required: --origin, --build-id; "),
        ("kcidb", ["{good}", "--origin", "My Lab", "--build-id", "x:1"], "argument --origin: 'My Lab' has more than"),
        ("kcidb", ["{good}", "--origin", "lab", "--build-id", "1"], "argument --build-id: '1' does not begin with"),
    ],
)
def test_bad_call(
    folder: Folder, capfd: pytest.CaptureFixture[str], name: str, arguments: list[str], message: str
) -> None:
    """A wrong call gives one line that says what is wrong, and exit code 2."""
    good = folder.document("7.1", ONE_OF_EACH[0])
    try:
        code = main(name, [each.format(good=good) for each in arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    error = capfd.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
