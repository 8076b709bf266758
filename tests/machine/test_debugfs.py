# SPDX-License-Identifier: GPL-2.0-only
"""Files of debugfs are reached whether or not it is mounted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.machine.processes import (
    as_nobody,
    needs_root,
    probe_after,
    with_debugfs_mounted,
)
from uffd_selftests.machine.debugfs import open_debugfs
from uffd_selftests.machine.facts import Facts


def list_debugfs() -> list[str]:
    """Return the names in debugfs' root."""
    fd = open_debugfs(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


@needs_root
@pytest.mark.skipif("\tdebugfs\n" not in Path("/proc/filesystems").read_text(), reason="needs CONFIG_DEBUG_FS")
def test_debugfs_where_it_is_not_mounted() -> None:
    """Its files are reached without a mount that anybody could see; what is not there is ENOENT."""
    mounts = Path("/proc/self/mountinfo").read_text()
    assert list_debugfs()
    with pytest.raises(FileNotFoundError):
        open_debugfs("no such file", os.O_RDONLY)
    assert Path("/proc/self/mountinfo").read_text() == mounts


@needs_root
def test_gup_test_reason_does_not_depend_on_the_mount(facts: Facts) -> None:
    """Mounted or not, the same answer; the ordinary user is told to be root."""
    assert probe_after(with_debugfs_mounted).gup_test == facts.gup_test
    assert facts.gup_test in (None, "CONFIG_GUP_TEST: /sys/kernel/debug/gup_test: ENOENT")
    assert str(probe_after(as_nobody).gup_test).endswith(": run as root")
    assert str(probe_after(with_debugfs_mounted, as_nobody).gup_test) == (
        "/sys/kernel/debug/gup_test: EACCES: run as root"
    )
