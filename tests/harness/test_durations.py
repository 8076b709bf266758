# SPDX-License-Identifier: GPL-2.0-only
"""What takes long comes first, as far as that is known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from uffd_selftests.case import ATTRIBUTE, uffd_case
from uffd_selftests.harness import durations
from uffd_selftests.harness.results import Planned, Result


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a table that this test knows."""
    path = tmp_path / "durations.txt"
    path.write_text("# Seconds and name\n\n12.5 move on anon\n3 two words (a variant) on shmem\n")
    monkeypatch.setattr(durations, "TABLE", path)
    return path


@pytest.mark.usefixtures("table")
def test_known(tmp_path: Path) -> None:
    """What was measured counts for more than the table."""
    measured = tmp_path / "durations.json"
    first = {"move on anon": 12.5, "two words (a variant) on shmem": 3.0}
    assert durations.known(measured) == first
    measured.write_text(json.dumps({"move on anon": 1, "new": 2.5}))
    assert durations.known(measured) == {**first, "move on anon": 1.0, "new": 2.5}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("text", ["", "[1, 2]", '{"a": null}', '{"a": "soon"}', "7", '{"a": [1]}'])
def test_nonsense(tmp_path: Path, text: str) -> None:
    """A file that somebody has spoilt is as good as none."""
    measured = tmp_path / "durations.json"
    measured.write_text(text)
    assert len(durations.known(measured)) == 2
    durations.remember(measured, [result("new", 2.0)])
    assert durations.known(measured)["new"] == 2.0


def test_own_table() -> None:
    """The package's own table can be read."""
    assert all(seconds > 0 for seconds in durations.known(Path("/nowhere")).values())


def result(name: str, seconds: float) -> Result:
    """Return a result that took so long."""
    return Result(Planned(name, name, name), "pass", seconds=seconds)


def test_remember(tmp_path: Path) -> None:
    """What takes long is kept, what does so no more is forgotten, and what did not run stays as it was."""
    measured = tmp_path / "durations.json"
    durations.remember(measured, [result("a", 5.04), result("b", 2.0), result("c", 0.1)])
    assert json.loads(measured.read_text()) == {"a": 5.0, "b": 2.0}
    durations.remember(measured, [result("b", 0.2), result("c", 1.0)])
    assert json.loads(measured.read_text()) == {"a": 5.0, "c": 1.0}
    durations.remember(tmp_path / "no/such/folder/file", [result("a", 1.0)])


def items(parent: str, *names: str) -> list[Any]:
    """Return what pytest would have collected from a file."""

    def make(name: str) -> SimpleNamespace:
        function = SimpleNamespace()
        uffd_case(name)(function)  # type: ignore[type-var]
        assert getattr(function, ATTRIBUTE).name == name
        return SimpleNamespace(function=function, parent=parent, name=name)

    return list(map(make, names))


def test_longest_first() -> None:
    """The file with the longest result comes first; within a file all stays as it is, and equal files do."""
    found = [*items("a", "a1", "a2"), *items("b", "b1", "b2", "b3"), *items("c", "c1"), *items("d", "d1")]
    known = {"a2": 1.0, "b3": 9.0, "d1": 1.0}
    sorted_items = durations.longest_first(found, known)
    assert [item.name for item in sorted_items] == ["b1", "b2", "b3", "a1", "a2", "d1", "c1"]
    assert [item.name for item in durations.longest_first(found, {})] == [item.name for item in found]
    assert durations.longest_first([], known) == []


def test_other_tests() -> None:
    """What is no case takes no time that is known."""
    plain: Any = SimpleNamespace(parent="x", name="plain", function=lambda: None)
    found = [plain, *items("a", "a1")]
    assert [item.name for item in durations.longest_first(found, {"a1": 1.0})] == ["a1", "plain"]
