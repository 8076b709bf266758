# SPDX-License-Identifier: GPL-2.0-only
"""A cgroup limits what is in it, and goes with its processes, whatever ends the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.machine.helpers import Child, needs_root
from tests.machine.scarcity import needs_soak
from uffd_selftests.machine import cgroup
from uffd_selftests.machine.cgroup import MemoryGroup
from uffd_selftests.machine.repair import repair
from uffd_selftests.machine.swap import Swap, swap_files


@needs_root
@pytest.mark.usefixtures("journal")
def test_killed_run_leaves_no_group() -> None:
    """The next run kills what is in the cgroup of a run that was killed, and in those below it, and removes them."""
    paths = []

    def hold(child: Child) -> None:
        with MemoryGroup() as group:
            (group.path / "below").mkdir()
            os.spawnvp(os.P_NOWAIT, "/bin/sh", group.command("sleep", "1000"))
            while len(group.processes()) != 1:
                pass
            (group.path / "below/cgroup.procs").write_text(str(group.processes()[0]))
            child.hold()

    try:
        with MemoryGroup() as group:
            paths.append(group.path.parent)
    except OSError as error:
        pytest.skip(str(error))
    child = Child(hold)
    child.wait_until_it_holds()
    path = paths[0] / f"uffd-selftests-{child.pid}"
    assert len(cgroup._members(path)) == 1
    child.end(signal.SIGKILL)
    assert repair() == [f"removed the cgroup {path} left by an interrupted run"]
    assert not path.exists()


@needs_soak
def test_group_pages_out() -> None:
    """What does not fit into the limit of a group is in swap, and back at its end."""
    code = "memory = bytearray(64 << 20); [memory.__setitem__(i, 1) for i in range(0, len(memory), 4096)]; input()"
    with Swap(128 << 20), MemoryGroup() as group:
        group.limit(32 << 20)
        command = group.command(sys.executable, "-c", code)
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            until = time.monotonic() + 60
            while group.statistics()["used"] < 64 << 20:
                assert time.monotonic() < until
                time.sleep(0.01)
            assert group.processes() == [process.pid]
            assert group.peak() <= 33 << 20
            assert swap_files()
        assert group.processes() == []
