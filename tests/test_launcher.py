# SPDX-License-Identifier: GPL-2.0-only
"""The process that starts the cases does so as the harness itself would, and its own end is noticed."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from uffd_selftests.harness import proc
from uffd_selftests.harness.isolation import How
from uffd_selftests.harness.launcher import Launcher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uffd_selftests.harness.isolation import Send, Work


def find(name: str) -> Work:
    """Return the work of this name."""

    def work(send: Send) -> None:
        if name == "hang":
            time.sleep(1000)
        elif name == "kill the launcher":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1000)
        elif name == "daemon" and not os.fork():
            os.setsid()
            time.sleep(1000)
        send(name * 100_000 if name == "much" else [name, os.getppid()])

    return work


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    """Start a launcher."""
    launcher = Launcher(find)
    yield launcher
    launcher.close()


def test_work_is_found_by_name(launcher: Launcher) -> None:
    """Each piece of work runs in a child of the launcher, and what it sends comes through."""
    for name in ("one", "other"):
        ending = launcher.run(name, deadline=30)
        assert (ending.how, ending.records) == (How.DONE, [[name, launcher.pid]])
    assert launcher.run("much", deadline=30).records == ["much" * 100_000]


def test_hang_and_leftovers(launcher: Launcher) -> None:
    """A deadline and a process left behind are seen as they are without the launcher."""
    ending = launcher.run("hang", deadline=0.3)
    assert (ending.how, ending.reason) == (How.TIMEOUT, "0.3 seconds")
    assert len(launcher.run("daemon", deadline=30).leftovers) == 1
    assert launcher.run("one", deadline=30).how is How.DONE


def test_the_next_child_may_die(launcher: Launcher) -> None:
    """A child that is killed before it has work, as the kernel does when memory is short, is made good for."""
    assert launcher.run("one", deadline=30).how is How.DONE

    def waiting() -> list[int]:
        return [pid for pid, process in proc.children(launcher.pid).items() if process.state != "Z"]

    while not waiting():
        time.sleep(0.001)
    for pid in waiting():
        os.kill(pid, signal.SIGKILL)
    while waiting():
        time.sleep(0.001)
    assert launcher.run("other", deadline=30).how is How.DONE


def test_its_death_is_an_error(launcher: Launcher) -> None:
    """A case that kills the launcher, or for which the kernel does, is an error and ends with it."""
    ending = launcher.run("kill the launcher", deadline=30)
    assert (ending.how, ending.reason) == (How.ERROR, "the process that starts the cases died")
    assert not launcher.alive
    assert launcher.run("one", deadline=30).how is How.ERROR


def test_close_ends_what_runs() -> None:
    """Ctrl-C while a case runs leaves no process."""
    before = set(proc.processes())
    launcher = Launcher(find)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            launcher.run("hang", deadline=1000)
    finally:
        signal.signal(signal.SIGALRM, old)
        launcher.close()
    family = [process for process in proc.processes().values() if process.parent in (os.getpid(), launcher.pid)]
    assert {process.pid for process in family} <= before
