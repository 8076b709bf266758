# SPDX-License-Identifier: GPL-2.0-only
"""The options of a run are read wherever they come from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from uffd_selftests import cli as command
from uffd_selftests.case import Case
from uffd_selftests.harness.settings import Settings, duration

if TYPE_CHECKING:
    from tests.conftest import Starter


def test_duration_is_read() -> None:
    """As people write it; nothing is no duration."""
    assert [duration(text) for text in ("90s", "90", "10m", "2h", "1h30m", "")] == [90, 90, 600, 7200, 5400, 0]
    for text in ("fast", "1d", "-3s", "1.5h"):
        with pytest.raises(ValueError, match="is not a duration like 90s, 10m or 1h30m"):
            duration(text)


def test_deadline_of_a_case() -> None:
    """A case may have a shorter deadline than the others, never a longer one; an emulator counts for both."""
    emulated: Any = SimpleNamespace(deadline=240.0, deadline_scale=8.0, duration=60.0)
    expected = {None: 240.0, Case("plain"): 240.0, Case("long", stress=True): 300.0, Case("brief", deadline=5): 40.0}
    assert {case: Settings.deadline_of(emulated, case) for case in expected} == expected
    hurried: Any = SimpleNamespace(deadline=2.0, deadline_scale=8.0, duration=0.0)
    assert Settings.deadline_of(hurried, Case("brief", deadline=5)) == 2.0


@pytest.mark.parametrize(
    ("variable", "value"), [("UFFD_DEADLINE", "x"), ("UFFD_REQUIRE", "x"), ("UFFD_AREA_MIB", "-1")]
)
def test_usage_error_in_environment(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bad variable is named."""
    monkeypatch.setenv(variable, value)
    assert command.main([]) == 2
    assert capfd.readouterr().err.startswith(f"uffd-selftests: {variable}: ")


def test_bad_variable(cli: Starter) -> None:
    """A value that is neither yes nor no is a usage error."""
    run = cli.run("-l", env={"UFFD_MAY_HANG_KERNEL": "maybe"})
    assert (run.code, run.stdout) == (2, "")
    assert run.stderr.splitlines() == ["uffd-selftests: UFFD_MAY_HANG_KERNEL: 'maybe' is neither 0 nor 1"]
