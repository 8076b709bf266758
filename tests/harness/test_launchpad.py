# SPDX-License-Identifier: GPL-2.0-only
"""Launchers that come from a launchpad are as good as a process's own, and end with whoever asked for them."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.harness.test_launcher import Jobs
from uffd_selftests.harness import proc
from uffd_selftests.harness.isolation import How
from uffd_selftests.harness.launcher import Order
from uffd_selftests.harness.launchpad import Launchpad, connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Starter


@pytest.fixture
def launchpad() -> Iterator[Launchpad]:
    """Start a launchpad."""
    launchpad = Launchpad(Jobs())
    yield launchpad
    launchpad.close()


def gone(*pids: int) -> bool:
    """Wait until these processes are gone."""
    until = time.monotonic() + 10
    while set(pids) & set(proc.processes()):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_launchers(launchpad: Launchpad) -> None:
    """Each who asks gets a launcher, which does what it is told, until it is closed."""
    first, second = connect(launchpad.address), connect(launchpad.address)
    assert first
    assert second
    assert {first.pid, second.pid} <= set(proc.children(launchpad.pid))
    for launcher in (first, second):
        launcher.ask("set_up", "settings")
        ending = launcher.run(Order("one", 30))
        assert (ending.how, ending.records) == (How.DONE, [["one", launcher.pid]])
    first.close()
    assert gone(first.pid)
    assert second.run(Order("one", 30)).how is How.DONE
    second.close()
    assert gone(second.pid)


def test_close_ends_all(launchpad: Launchpad) -> None:
    """The end of the launchpad is that of its launchers and of what they run."""
    launcher = connect(launchpad.address)
    assert launcher
    launcher.ask("set_up", "settings")
    assert launcher.run(Order("do", 30, more=True)).rests
    below = [launchpad.pid, launcher.pid, *proc.children(launcher.pid)]
    assert len(below) > 2
    launchpad.close()
    assert gone(*below)
    launcher.close()


def test_a_worker_that_is_killed(launchpad: Launchpad) -> None:
    """When the process that asked for it dies, a launcher ends what it runs at once, and itself."""
    ours, theirs = os.pipe()
    worker = os.fork()
    if not worker:
        launcher = connect(launchpad.address)
        assert launcher
        launcher.ask("set_up", "settings")
        os.write(theirs, f"{launcher.pid}\n".encode())
        launcher.run(Order("hang", 1000))
        os._exit(0)
    pid = int(os.read(ours, 100))
    while not (below := list(proc.children(pid))):
        time.sleep(0.01)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    assert gone(pid, *below)
    assert launchpad.pid in proc.processes()
    os.close(ours)
    os.close(theirs)


def test_nobody_else_is_served(launchpad: Launchpad) -> None:
    """A process of another user gets nothing, nor does anybody from a launchpad that is gone."""
    if os.geteuid():
        pytest.skip("needs root, to be somebody else")
    child = os.fork()
    if not child:
        os.setresuid(65534, 65534, 65534)
        os._exit(connect(launchpad.address) is not None)
    assert os.waitpid(child, 0)[1] == 0
    assert connect(launchpad.address)
    launchpad.close()
    assert connect(launchpad.address) is None


def test_a_run_with_workers_leaves_nothing(cli: Starter) -> None:
    """A run with workers ends its launchpad with all that came from it."""
    run = cli.run("-n", "2", "-f", "=zeropage")
    assert run.code == 0
    assert run.survivors() == []
    assert set(run.outcomes.values()) <= {"pass", "skip"}
