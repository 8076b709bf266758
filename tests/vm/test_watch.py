# SPDX-License-Identifier: GPL-2.0-only
"""The streams of a guest tell how far it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from uffd_selftests.harness import reporter
from uffd_selftests.harness.results import Planned
from uffd_selftests.vm.watch import Lines, Watch


def test_lines() -> None:
    """A stream is cut into whole lines, free of what a terminal would make of them."""
    lines = Lines()
    assert [lines.feed(chunk) for chunk in (b"o", b"k 1\r\nok", b" \x1b[1m2\x1b[m\n\nok 3", b"")] == [
        *([], ["ok 1"], ["ok 2", ""], []),
    ]


def test_running_case() -> None:
    """The case that runs is the last that began, until its result is there."""
    watch = Watch()
    assert watch.running == ""
    assert watch.console("[    1.0] uffd-selftests: case move on anon")
    assert watch.running == "move on anon"
    watch.ktap("not ok 1 move on anon # TIMEOUT 30 seconds")
    assert watch.running == ""
    assert not watch.console("uffd-selftests: something for people")
    assert watch.messages == ["something for people"]


def test_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite notes in the kernel's log what the watch reads on the console."""
    monkeypatch.setattr(reporter, "KMSG", str(tmp_path / "kmsg"))
    settings: Any = SimpleNamespace(folder=None, data_only=False, ktap_fd=None, brief=False, kmsg=True)
    signals: Any = None
    writer = reporter.Reporter(settings, signals)
    writer.begin([Planned("test_move.py::test_move[anon]", "move on anon", "move")], [])
    writer.pytest_runtest_logstart("test_move.py::test_move[anon]")
    watch = Watch()
    assert watch.console(f"[    1.0] {(tmp_path / 'kmsg').read_text().rstrip()}")
    assert watch.running == "move on anon"
    writer.close()
