# SPDX-License-Identifier: GPL-2.0-only
"""What the page shows of one run and of several."""

from __future__ import annotations

import json

from tests.report.helpers import DEFECT, Folder, result
from uffd_selftests.report.page import MARKS

SKIPPED = MARKS["skip"][1]
LACKS_MOVE = "kernel lacks UFFD_FEATURE_MOVE (Linux 6.8)"


# ---- one run --------------------------------------------------------------------------------------------------------


def test_verdict_comes_first(folder: Folder) -> None:
    """The first sentence says whether promises are broken, and how many known defects are there."""
    kept = folder.document("6.18", result("a on anon"), result("b", "xfail", defect=DEFECT), result("c", "skip"))
    assert "keeps every promise that was checked, save 1 known defect." in folder.page(kept).text
    broken = folder.document("6.18", result("a on anon", "fail"), result("a on shmem", "error"), result("b", "timeout"))
    assert "This kernel breaks 2 promises." in folder.page(broken).text
    nothing = folder.document("6.18", result("a on anon", "skip"))
    assert "This kernel could not be tested." in folder.page(nothing).text


def test_failures_are_grouped_by_promise(folder: Folder) -> None:
    """Memory types that fail alike, but for addresses, are told once; another failure of the case is told beside."""
    run = folder.document(
        "6.18",
        result("a on anon", "fail", diagnostics=["promise: The promise of a.", "expected EEXIST at 0x7f00"]),
        result("a on shmem", "fail", diagnostics=["promise: The promise of a.", "expected EEXIST at 0x7fff"]),
        result("a on hugetlb", "timeout", reason="30 seconds", diagnostics=["blocked in handle_userfault"]),
        result("b on anon"),
    )
    broken = folder.page(run).section("broken").text
    assert broken.count("The promise of a.") == 1
    assert "anon, shmem" in broken
    assert "hugetlb: 30 seconds" in broken
    assert "0x7f00" in broken
    assert "0x7fff" not in broken
    assert "The promise of b." not in broken


def test_long_diagnostics(folder: Folder) -> None:
    """What one failure says is bounded, and it is said how much is left out."""
    lines = [f"line {number}." for number in range(1, 71)]
    run = folder.document("6.18", result("a", "fail", diagnostics=lines))
    broken = folder.page(run).section("broken").text
    assert "line 60." in broken
    assert "line 61." not in broken
    assert "10 lines more in results.json" in broken


def test_skips_are_grouped_by_reason(folder: Folder) -> None:
    """What is missing is said once, with how many results it costs and which."""
    skips = [result(f"s on {mem}", "skip", reason="no swap space: swapon a file") for mem in ("anon", "shmem")]
    section = folder.page(folder.document("6.18", *skips, result("a on anon"))).section("skipped")
    assert section.rows()[1:] == [["no swap space: swapon a files on anon, shmem", "2"]]


def test_known_defects(folder: Folder) -> None:
    """Those that did not show come first; what nobody could look for is not among them; each says what to do."""
    there = result("d on anon", "xfail", defect=DEFECT)
    gone = result("e on anon", "xpass", defect={**DEFECT, "id": "D-ZZ-01"})
    skipped = result("f on anon", "skip", defect={**DEFECT, "id": "D-AA-01"})
    rows = folder.page(folder.document("6.18", there, gone, skipped)).section("defects").rows()[1:]
    assert [(row[0], row[2]) for row in rows] == [("D-ZZ-01", "!"), ("D-CP-99", "D")]
    assert "Do not feed it" in rows[1][1]


def test_matrix(folder: Folder) -> None:
    """A line for each case, a column for each memory type, a sign for each outcome."""
    run = folder.document("6.18", result("a on anon"), result("a on hugetlb", "fail"), result("b on anon", "skip"))
    rows = folder.page(run).section("results").rows()
    assert rows[0] == ["Case", "anon", "hugetlb"]
    assert [row[1:] for row in rows[1:]] == [["✓", "✗"], [SKIPPED, ""]]
    assert "The promise of a." in rows[1][0]
    assert "anon 250, hugetlb 250 ms" in rows[1][0]


def test_interrupted_and_partial_runs_say_so(folder: Folder) -> None:
    """A run that is not whole cannot be taken for one that is."""
    run = folder.document(
        "6.18", result("a"), planned=2052, interrupted="SIGINT", options={"filters": ["move"], "keyword": "anon"}
    )
    text = folder.page(run).text
    assert "As far as the run came, this kernel keeps" in text
    assert "The run ended early (SIGINT): 1 of 2052 results came." in text
    assert "Only a part of the suite was run: -f move -k 'anon'." in text


def test_a_kernel_that_never_came_up(folder: Folder) -> None:
    """The least that a document can have is shown: whoever boots kernels writes it when nothing else came back."""
    path = folder.path / "results.json"
    boot = {"name": "boot", "outcome": "error", "reason": "kernel panic", "diagnostics": ["Unable to mount root fs"]}
    path.write_text(json.dumps({"results": [boot]}))
    text = folder.page(path).text
    assert "breaks 1 promise" in text
    assert "Unable to mount root fs" in text


# ---- several runs ---------------------------------------------------------------------------------------------------


def test_skips_of_several_runs(folder: Folder) -> None:
    """Each reason is told, and in how many results of which run it is one."""
    old = folder.document("6.1", result("m on anon", "skip", reason=LACKS_MOVE), result("s", "skip", reason="no swap"))
    new = folder.document("6.18", result("m on anon", "skip", reason="no swap"), result("s", "skip", reason="no swap"))
    rows = folder.page(old, new).section("skipped").rows()[1:]
    assert sorted(row[1:] for row in rows) == [["1", ""], ["1", "2"]]


def test_differences(folder: Folder) -> None:
    """Broken promises come first, then defects, then what is missing, once each; what is the same is left out."""
    old = [result(f"move{n} on anon", "skip", reason=LACKS_MOVE) for n in range(3)]
    new = [result(f"move{n} on anon", "xfail" if n == 2 else "pass") for n in range(3)]
    bad, good = result("a on anon", "fail"), result("a on anon")
    there, gone = (result("d on anon", outcome, defect=DEFECT) for outcome in ("xfail", "xpass"))
    same = result("b on anon")
    page = folder.page(folder.document("6.1", *old, good, gone, same), folder.document("6.18", *new, bad, there, same))
    assert "1 promise broken, on 1 of 2. They differ in 5 of 6 cases." in page.text
    rows = page.section("differences").rows()
    assert rows[0] == ["What", "6.1", "6.18"]
    signs = [[cell.replace(" ", "") for cell in row[1:]] for row in rows[1:]]
    assert signs == [["✓", "✗"], ["!", "D"], [f"{SKIPPED}3", "D1✓2"]]
    titles = ["The promise of a.", "D-CP-99 It bites", LACKS_MOVE]
    assert [row[0][: len(title)] for row, title in zip(rows[1:], titles, strict=True)] == titles
    assert page.section("defects").rows()[1][2:] == ["!", "D"]


def test_runs_that_agree(folder: Folder) -> None:
    """Two runs without a difference are said to have none."""
    page = folder.page(folder.document("6.1", result("a")), folder.document("6.18", result("a")))
    assert "They do not differ." in page.text
    assert page.section("differences").rows() == []


def test_results_that_one_version_of_the_suite_lacks(folder: Folder) -> None:
    """They are shown as missing, and the reader is told why."""
    old = folder.document("6.1", result("a"), versions={"kernel": "6.1", "uffd-selftests": "0.1"})
    new = folder.document("6.18", result("a"), result("b"), versions={"kernel": "6.18", "uffd-selftests": "0.2"})
    page = folder.page(old, new)
    assert "different versions of the suite (0.1, 0.2)" in page.text
    (missing,) = page.section("differences").rows()[1:]
    assert missing[0].startswith("No such result in 6.1")
    assert missing[1:] == ["·", "✓"]
