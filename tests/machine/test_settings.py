# SPDX-License-Identifier: GPL-2.0-only
"""Settings are put back, whatever ends the process that changed them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.machine.helpers import Child, leave_record, records
from uffd_selftests.machine import settings
from uffd_selftests.machine.repair import repair
from uffd_selftests.machine.settings import Sysctl


@pytest.fixture
def setting(tmp_path: Path, journal: Path) -> Path:
    """Return a setting that is 0."""
    assert not journal.exists()
    path = tmp_path / "setting"
    path.write_text("0\n")
    return path


def test_setting_is_put_back(setting: Path, journal: Path) -> None:
    """It has the new value inside, the old one after."""
    with Sysctl(setting, 1):
        assert setting.read_text() == "1"
    assert setting.read_text() == "0"
    assert records(journal) == []


def test_setting_among_its_choices(setting: Path) -> None:
    """Settings that list their values mark the one in force with brackets."""
    setting.write_text("always [madvise] never\n")
    with Sysctl(setting, "never"):
        pass
    assert setting.read_text() == "madvise"


def test_setting_that_somebody_changed(setting: Path) -> None:
    """Somebody else's value stays."""
    with Sysctl(setting, 1):
        setting.write_text("2\n")
    assert setting.read_text() == "2\n"


def test_setting_of_a_killed_run(setting: Path) -> None:
    """The next run puts it back."""

    def hold(child: Child) -> None:
        with Sysctl(setting, 1):
            child.hold()

    child = Child(hold)
    child.wait_until_it_holds()
    child.end(signal.SIGKILL)
    assert setting.read_text() == "1"
    assert repair() == [f"restored {setting} to 0 left by an interrupted run"]
    assert setting.read_text() == "0"


def test_settings_take_turns(setting: Path) -> None:
    """Whoever wants to change what another process has changed waits, and finds the old value."""

    def change(_: Child) -> None:
        with Sysctl(setting, 2) as mine:
            assert mine._entry
            assert mine._entry.record == settings._SettingRecord(str(setting), "0", "2")

    with Sysctl(setting, 1):
        child = Child(change)
        assert setting.read_text() == "1"
    assert child.end() == 0
    assert setting.read_text() == "0"


def test_setting_that_is_not_there(tmp_path: Path, journal: Path) -> None:
    """ENOENT, and no record."""
    with pytest.raises(FileNotFoundError), Sysctl(tmp_path / "missing", 1):
        pass
    assert records(journal) == []


def test_setting_of_a_killed_run_that_is_gone(setting: Path, journal: Path) -> None:
    """A setting that went away with its module needs no repair."""
    leave_record(journal).unlink()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    record = {"boot": boot, "kind": "setting", "path": f"{setting}.gone", "old": "0", "new": "1"}
    (journal / "1-2.json").write_text(json.dumps(record))
    assert repair() == []
    assert records(journal) == []
