# SPDX-License-Identifier: GPL-2.0-only
"""The page needs nothing else, is small, and takes nothing for markup that a document says."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess

import pytest

from tests.report.helpers import DEFECT, Folder, result
from uffd_selftests.report.model import load
from uffd_selftests.report.page import render

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
