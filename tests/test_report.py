# SPDX-License-Identifier: GPL-2.0-only
"""The page of results: what it shows of one run and of several, what it makes of bad input, and that it is safe."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from uffd_selftests.report import environment
from uffd_selftests.report.command import main, write
from uffd_selftests.report.model import Run, load
from uffd_selftests.report.page import MARKS, render

if TYPE_CHECKING:
    from tests.conftest import Starter, SuiteWriter

DOCUMENT = Path(__file__).parent.parent / "docs" / "results.md"
DEFECT = {"id": "D-CP-99", "summary": "It bites", "kernels": "6.1", "advice": "Do not feed it"}
SKIPPED = MARKS["skip"][1]
LACKS_MOVE = "kernel lacks UFFD_FEATURE_MOVE (Linux 6.8)"


def result(name: str, outcome: str = "pass", **more: Any) -> dict[str, Any]:
    """Return a result as results.json has it; its case and memory type are those of its name."""
    case, _, mem = name.partition(" on ")
    nodeid = f"uffd_selftests/cases/contract/test_copy.py::test_{case}[{mem}]"
    plain: dict[str, Any] = {"name": name, "outcome": outcome, "case": case, "mem": mem or None, "nodeid": nodeid}
    plain |= {"promise": f"The promise of {case}.", "rows": ["CP-01"], "kind": "promise", "seconds": 0.25}
    return {**plain, **more}


class Folder:
    """Writes results.json files and reads pages."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def document(self, kernel: str, *results: dict[str, Any], **more: Any) -> Path:
        """Write a results.json and return its path."""
        path = self.path / kernel / "results.json"
        path.parent.mkdir(exist_ok=True)
        plain = {"format": 1, "results": results, "planned": len(results), "versions": {"kernel": kernel}, **more}
        path.write_text(json.dumps(plain))
        return path

    def page(self, *documents: Path) -> Page:
        """Return the page of documents, made by the command."""
        output = self.path / "report.html"
        assert main([*map(str, documents), "-o", str(output)]) == 0
        return Page(output.read_text("utf-8"))


class Page(HTMLParser):
    """A page, taken apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the tag."""
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_data(self, data: str) -> None:
        """Keep the text that is shown."""
        if self._in not in ("style", "script"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        """Text behind a script is shown again."""
        self._in = ""

    def values(self, name: str) -> list[str]:
        """Return all values of an attribute."""
        return [value for _, attributes in self.tags if (value := attributes.get(name)) is not None]

    def section(self, name: str) -> Page:
        """Return one section."""
        return Page(self.source.partition(f"<section id={name} ")[2].partition("</section>")[0])

    def rows(self) -> list[list[str]]:
        """Return the text of every cell of every row of tables, spaces made one."""
        found = []
        for row in re.split(r"<tr\b[^>]*>", self.source)[1:]:
            cells = re.split(r"<t[hd]\b[^>]*>", row.partition("</table>")[0])[1:]
            found.append([" ".join(Page(cell).text.split()) for cell in cells])
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder for documents and pages."""
    return Folder(tmp_path)


# ---- one run -------------------------------------------------------------------------------------------------------


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


def test_skips_of_several_runs(folder: Folder) -> None:
    """Each reason is told, and in how many results of which run it is one."""
    old = folder.document("6.1", result("m on anon", "skip", reason=LACKS_MOVE), result("s", "skip", reason="no swap"))
    new = folder.document("6.18", result("m on anon", "skip", reason="no swap"), result("s", "skip", reason="no swap"))
    rows = folder.page(old, new).section("skipped").rows()[1:]
    assert sorted(row[1:] for row in rows) == [["1", ""], ["1", "2"]]


# ---- several runs --------------------------------------------------------------------------------------------------


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


def test_labels_tell_runs_apart() -> None:
    """The kernel's release, then the machine or the page size, then the folder, and at last a number."""

    def labels(*runs: tuple[dict[str, Any], str]) -> list[str]:
        made = [Run("6.12", {}, Path(path), environment={"facts": facts}) for facts, path in runs]
        render(made)
        return [run.label for run in made]

    x86, arm = {"machine": "x86_64", "page_size": 4096}, {"machine": "aarch64", "page_size": 4096}
    arm16 = {**arm, "page_size": 16384}
    assert labels((x86, "a/r"), (arm, "b/r")) == ["6.12 x86_64", "6.12 aarch64"]
    assert labels((arm, "a/r"), (arm16, "b/r")) == ["6.12 4K", "6.12 16K"]
    assert labels((x86, "a/r"), (x86, "b/r")) == ["6.12 a", "6.12 b"]
    assert labels((x86, "a/r"), (x86, "a/r")) == ["6.12 #1", "6.12 #2"]


def test_given_labels(folder: Folder) -> None:
    """LABEL=PATH names a run."""
    path = folder.document("6.18", result("a"))
    output = folder.path / "page.html"
    assert main([f"before={path}", f"after={path.parent}", "-o", str(output)]) == 0
    rows = Page(output.read_text("utf-8")).rows()
    assert [row[0] for row in rows[1:3]] == ["before", "after"]


# ---- safe and sound ------------------------------------------------------------------------------------------------


NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \" ' \ud800"


def test_nothing_is_taken_for_markup(folder: Folder) -> None:
    """Whatever a document says is shown and never executed, wherever it appears."""
    nasty = dict.fromkeys(("case", "reason", "promise", "nodeid", "variant", "kind", "mem"), NASTY)
    defect = dict.fromkeys(DEFECT, NASTY)
    facts = {"version": NASTY, "machine": NASTY, "feature_names": [NASTY], "access": {NASTY: NASTY}}
    results = [
        {**result(f"{outcome}{NASTY}", outcome, **nasty), "diagnostics": [NASTY], "rows": [NASTY], "defect": defect}
        for outcome in ("pass", "fail", "timeout", "error", "xpass", "xfail", "skip")
    ]
    more = {"interrupted": NASTY, "options": {"keyword": NASTY}, "environment": {"facts": facts, "tainted": NASTY}}
    one = folder.document("a", *results, **more, versions={"kernel": NASTY, "uffd-selftests": NASTY})
    two = folder.document("b", *results[:3], **more)
    plain = folder.page(folder.document("plain", result("a"), result("b", "fail", diagnostics=["x"])))
    for page in (folder.page(one), folder.page(one, two)):
        tags = [tag for tag, _ in page.tags]
        assert tags.count("script") == 1
        assert "img" not in tags
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        assert {name for _, attributes in page.tags for name in attributes} <= (
            {name for _, attributes in plain.tags for name in attributes} | {"data-label", "data-d", "title"}
        )
        assert "alert(1)" in page.text


def test_page_needs_nothing_else(folder: Folder) -> None:
    """Links lead to places on the page, all of which are there, once; the only script is the one allowed."""
    one = folder.document("6.1", result("a on anon"), result("B (x)", "fail", diagnostics=["x"]), result("b-x", "skip"))
    odd = result("odd", rows=["XX-01", "CP-02"])
    two = folder.document("6.18", result("a on anon", "fail"), result("B (x)"), result("B-x"), odd)
    page = folder.page(one, two)
    assert page.values("src") == []
    targets = {link[1:] for link in page.values("href") if link.startswith("#")}
    assert [link for link in page.values("href") if not link.startswith("#")] == ["data:,"]
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert sorted(targets - set(ids)) == []
    assert {"CP-01", "XX-01", "c-b-x", "c-B-x", "c-B-x-2"} <= set(ids)
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in page.values("content")[2]
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_size(folder: Folder) -> None:
    """Three kernels with 2250 results each, all broken and with much to say, are a page below a megabyte."""
    mems = ("anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private")
    runs = []
    for kernel in ("6.1.0-28-amd64", "6.12.117-debug", "6.18.44"):
        results = [
            result(f"a-case-of-{n} on {mem}", "fail", diagnostics=[f"{kernel} {n} {mem} " + 70 * "x"] * 40)
            for n in range(450)
            for mem in mems
        ]
        runs.append(load(folder.document(kernel, *results)))
    page = render(runs)
    assert len(page.encode()) < 1_000_000
    assert "what the results say is in results.json" in page


# ---- bad input -----------------------------------------------------------------------------------------------------


BAD = {
    "no JSON": ("{", "not a JSON document"),
    "too deep": ("[" * 100_000, "not a JSON document"),
    "no object": ("[]", "no list of results"),
    "other JSON": ('{"summary": {}}', "no list of results"),
    "no list": ('{"results": {}}', "results is not a list"),
    "no result": ('{"results": [1]}', "result 1 is not an object"),
    "no name": ('{"results": [{"outcome": "pass"}]}', "result 1: no name"),
    "odd outcome": ('{"results": [{"name": "a", "outcome": "maybe"}]}', "result 1: outcome 'maybe' is none of"),
    "odd rows": ('{"results": [{"name": "a", "outcome": "pass", "rows": 1}]}', "result 1: rows is not a list"),
    "twice": (
        '{"results": [{"name": "a", "outcome": "pass"}, {"name": "a", "outcome": "fail"}]}',
        "two results are named 'a'",
    ),
    "newer": ('{"format": 2, "results": []}', "format 2, but this version reads up to 1"),
    "bytes": (b"\xff\xfe\x00", "not a JSON document"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_documents(folder: Folder, capsys: pytest.CaptureFixture[str], content: str | bytes, message: str) -> None:
    """They get one line that names the file, exit code 2, and no page."""
    path = folder.path / "bad.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert main([str(path), "-o", str(folder.path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"uffd-selftests report: {path}: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (folder.path / "report.html").exists()


def test_files_that_cannot_be_used(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing document and an output that cannot be written are one line each."""
    assert main([str(folder.path / "none.json")]) == 2
    assert "none.json: no such file: name the folder that a run wrote with -o" in capsys.readouterr().err
    good = folder.document("6.18", result("a"))
    assert main([str(good), "-o", str(folder.path / "none" / "report.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_odd_values_do_no_harm(folder: Folder) -> None:
    """Numbers that are none, nulls, an empty run, facts of another shape: the page is made all the same."""
    path = folder.path / "odd.json"
    odd = {"name": "a", "outcome": "pass", "seconds": -1, "mem": None, "rows": None, "defect": None, "variant": None}
    facts = {"page_size": "4K", "thp": [], "hugepage_sizes": ["2M"], "access": None, "capabilities": 7, "memory": None}
    surroundings = {"facts": facts, "changed": [], "hugepage_shortage": 3}
    options = {"filters": "move", "deadline": "x", "workers": "two"}
    path.write_text(json.dumps({"results": [odd], "environment": surroundings, "options": options, "seconds": None}))
    assert "keeps every promise" in folder.page(path).text
    path.write_text('{"results": [{"name": "a", "outcome": "pass", "seconds": NaN}], "environment": {"facts": 1}}')
    assert "keeps every promise" in folder.page(path).text
    path.write_text('{"results": [], "planned": 5}')
    assert "5 results of 5 never came." in folder.page(path).text


# ---- as a part of the project --------------------------------------------------------------------------------------


def test_a_run_writes_its_page(cli: Starter, suite: SuiteWriter) -> None:
    """-o leaves report.html beside results.json, and docs/results.md has every key of that."""
    tests = suite.write("""
        @uffd_case("holds")
        def test_holds():
            \"\"\"It holds.\"\"\"

        @uffd_case("breaks", rows=("CP-01",))
        def test_breaks():
            \"\"\"It does not break.\"\"\"
            assert 1 == 2
    """)
    run = cli.run("--", tests)
    page = Page((run.folder / "report.html").read_text("utf-8"))
    assert "breaks 1 promise" in page.text
    assert "assert 1 == 2" in page.text
    described = set(re.findall(r"`([\w-]+)`", DOCUMENT.read_text("utf-8")))
    assert set(run.document) <= described
    assert set(run.results["breaks"]) <= described
    assert set(run.document["environment"]) <= described
    assert set(run.document["environment"]["facts"]) <= described
    assert set(run.document["options"]) <= described
    assert (run.document["format"], run.document["planned"]) == (1, 2)


def test_full_disk(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """A page that does not fit is said to be missing."""
    good = folder.document("6.18", result("a"))
    assert main([str(good), "-o", "/dev/full"]) == 2
    assert capsys.readouterr().err == "uffd-selftests report: cannot write /dev/full: No space left on device\n"


def test_run_on_a_full_disk(cli: Starter, suite: SuiteWriter, tmp_path: Path) -> None:
    """Results that cannot be written are one line and a failure; what went to stdout is whole."""
    out = tmp_path / "out"
    tests = suite.write(f"""
        @uffd_case("fills")
        def test_fills():
            os.symlink("/dev/full", "{out}/results.json")
    """)
    run = cli.run("-o", str(out), "--", tests)
    assert run.code == 1
    assert "uffd-selftests: cannot write the results: No space left on device\n" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout.splitlines()[-1].startswith("# Totals: pass:1 ")
    assert not (out / "results.json").exists()


def test_report_without_jinja2(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said what to install."""
    monkeypatch.setitem(sys.modules, "uffd_selftests.report.page", None)
    run = load(folder.document("6.18", result("a")))
    with pytest.raises(ValueError, match="pip install jinja2"):
        write([run], folder.path / "report.html")


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_an_anchor_opens_what_is_folded(folder: Folder) -> None:
    """In a browser, a link into a folded topic unfolds it and the case; the filter is there."""
    run = folder.document("6.18", result("a on anon"), result("b on anon"))
    folder.page(run)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder.path}/profile"]
    url = f"file://{folder.path}/report.html#c-b"
    dom = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.search(r'<details class="topic"[^>]* open=""', dom)
    line = dom.partition('<tr id="c-b"')[2].partition("</tr>")[0]
    assert '<details open="">' in line
    assert "<details>" in dom.partition('<tr id="c-a"')[2].partition("</tr>")[0]
    assert '<form class="filter" role="search">' in dom


def test_times_are_said_as_people_do() -> None:
    """The unit fits the time."""
    times = {0.0008: "0.8 ms", 0.25: "250 ms", 12.34: "12.3 s", 59.99: "1 min 0 s", 125: "2 min 5 s"}
    assert {seconds: environment.duration(seconds).replace("\xa0", " ") for seconds in times} == times
