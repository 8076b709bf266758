# SPDX-License-Identifier: GPL-2.0-only
"""A run that another one starts is told what was said to that."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from uffd_selftests import cli as command
from uffd_selftests.harness.again import suite_arguments

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The suite in the guest is told what was said here, in the environment as well."""
    for name in [name for name in os.environ if name.startswith("UFFD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("UFFD_REQUIRE", "wp")
    monkeypatch.setenv("UFFD_MAY_HANG_KERNEL", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_mine.py").touch()
    args = command.parser().parse_args(["-f", "move", "-k", "anon", "--strict", "--deadline", "5"])
    passed = suite_arguments(args, ["-x", "test_mine.py::test_a", "test_b"], 8)
    assert passed == [
        *("--filter=move", "-k", "anon", "--strict", "--may-hang-kernel"),
        *("--deadline=5", "--deadline-scale=8", "--require=wp"),
        *("--", "-x", f"{tmp_path}/test_mine.py::test_a", "test_b"),
    ]
    args = command.parser().parse_args(["--deadline-scale", "3"])
    assert suite_arguments(args, [], 8) == ["--may-hang-kernel", "--deadline-scale=3", "--require=wp"]
