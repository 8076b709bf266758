# SPDX-License-Identifier: GPL-2.0-only
"""A submission is what KCIDB takes, and counts what is not whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.formats.helpers import HOSTILE, ONE_OF_EACH, convert
from tests.report.helpers import Folder, result


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
        ((), {"planned": 2, "interrupted": "does not boot: Kernel panic - not syncing"}, "FAIL"),
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
