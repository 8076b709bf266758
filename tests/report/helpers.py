# SPDX-License-Identifier: GPL-2.0-only
"""Documents of results to show, and the page taken apart."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from uffd_selftests.report.command import main

DEFECT = {"id": "D-CP-99", "summary": "It bites", "kernels": "6.1", "advice": "Do not feed it"}


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
