# SPDX-License-Identifier: GPL-2.0-only
"""The process that starts the cases does so as the harness itself would, and its own end is noticed."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import signal
import tempfile
import threading
import time
from typing import TYPE_CHECKING

import pytest

from uffd_selftests.command.interrupts import Signals
from uffd_selftests.harness import launcher as launcher_module
from uffd_selftests.harness import proc
from uffd_selftests.harness.isolation import Ending, How
from uffd_selftests.harness.launcher import Launcher, Order
from uffd_selftests.toolkit.memory import MAP_ANONYMOUS, MAP_PRIVATE, map_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from uffd_selftests.harness.isolation import Send, Work


SHARED = mmap.mmap(-1, 4096)
mapped: list[object] = []


def vanish() -> None:
    """Remove the current folder."""
    os.chdir(folder := tempfile.mkdtemp())
    os.rmdir(folder)


CHANGES: dict[str, Callable[[], object]] = {
    "umask": lambda: os.umask(0o777),
    "signal": lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    "blocked signal": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]),
    "timer": lambda: signal.setitimer(signal.ITIMER_REAL, 1000),
    "descriptor": lambda: os.open("/dev/null", os.O_RDONLY),
    "other descriptor": lambda: os.dup2(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), 0),
    "limit": lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    "thread": lambda: threading.Thread(target=time.sleep, args=(1000,), daemon=True).start(),
    "zombie": lambda: os.fork() or os._exit(0),
    "nice": lambda: os.nice(1),
    "folder": lambda: os.chdir("/"),
    "shared memory": lambda: SHARED.write(b"x"),
    "mapping": lambda: mapped.append(map_memory(4096, flags=MAP_PRIVATE | MAP_ANONYMOUS)),
    "environment": lambda: os.environ.update(CHANGED="1"),
    "handler": lambda: signal.signal(signal.SIGSEGV, lambda *_: None),
    "deleted folder": vanish,
    "no descriptors": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0)),
}
"""What a piece of work may change of its process, so that the next must not run in it."""


def find(name: str) -> Work:
    """Return the work of this name."""

    def work(send: Send) -> bool:
        if name == "hang":
            time.sleep(1000)
        elif name == "kill the launcher":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1000)
        elif name == "daemon" and not os.fork():
            os.setsid()
            time.sleep(1000)
        elif name == "hang beside a daemon":
            if not os.fork():
                os.setsid()
                SHARED[:8] = os.getpid().to_bytes(8, "little")
            time.sleep(1000)
        elif name == "stop the launcher":
            os.kill(os.getppid(), signal.SIGSTOP)
            time.sleep(1000)
        elif name == "fatal child":
            pid = os.fork()
            if not pid:
                os.abort()
            os.waitpid(pid, 0)
        elif name == "fail":
            raise RuntimeError
        elif name in CHANGES:
            CHANGES[name]()
        send(name * 100_000 if name == "much" else [name, os.getppid()])
        return name != "do badly"

    def ready(send: Send) -> bool:
        send(os.getpid())
        return work(send)

    return ready if name.startswith("do") or name in CHANGES else work


class Jobs:
    """Jobs whose tasks are names."""

    ready = False
    fragile = False

    def preload(self) -> None:
        """Do nothing."""

    def answer(self, name: str, *arguments: object) -> object:
        """Remember what set_up is told."""
        if name == "fail":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/the/file")
        self._settings, self.ready = arguments, True
        return [name, *arguments]

    def begin(self, task: object, *, early: bool) -> Ending | None:
        """Note it; say no to some."""
        refusal = Ending(How.DONE, "no", [], [], [], 0.0)
        if task == "never":
            return refusal
        self._note = f"{task} has begun"
        return refusal if early and task == "do later" else None

    def find(self, task: object) -> Work:
        """Return the work of this name."""
        assert isinstance(task, str)
        return find(task)

    def get_ready(self, task: object) -> None:
        """Do nothing."""

    def end(self, task: object, ending: Ending) -> None:
        """Tell what was noted, and what set_up was given."""
        ending.printed = [(self._note, f"{self._settings[0]}")]
        if task == "do and lose":
            ending.leftovers.append("something")

    def close(self) -> object:
        """Say good-bye."""
        return "farewell"


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    """Start a launcher."""
    launcher = Launcher.start(Jobs())
    launcher.ask("set_up", "settings")
    yield launcher
    launcher.close()


def test_work_is_found_by_name(launcher: Launcher) -> None:
    """Each piece of work runs in a child of the launcher, and what it sends comes through."""
    for name in ("one", "other"):
        ending = launcher.run(Order(name, 30))
        assert (ending.how, ending.records) == (How.DONE, [[name, launcher.pid]])
    assert launcher.run(Order("much", 30)).records == ["much" * 100_000]


def test_questions(launcher: Launcher) -> None:
    """What is asked for is answered between two pieces of work, or it is said what failed."""
    assert launcher.ask("anything", 1, [2]) == ["anything", 1, [2]]
    with pytest.raises(OSError, match="/the/file: Permission denied"):
        launcher.ask("fail")
    assert launcher.run(Order("one", 30)).how is How.DONE
    never = launcher.run(Order("never", 30))
    assert (never.how, never.reason, never.records) == (How.DONE, "no", [])
    assert launcher.run(Order("one", 30)).how is How.DONE


def test_finish(launcher: Launcher) -> None:
    """At the end it says what there is to say, also when an exception has come in the middle of its work."""
    assert launcher.ask("finish") == ["finish"]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            launcher.run(Order("hang", 1000))
    finally:
        signal.signal(signal.SIGALRM, old)
    assert launcher.finish() == "farewell"


def test_a_process_may_do_more(launcher: Launcher) -> None:
    """One process does several pieces of work as long as it is told to, succeeds and stays as it was."""

    def pid(name: str, *, more: bool) -> object:
        ending = launcher.run(Order(name, 30, more=more))
        assert (ending.how, ending.records[1]) == (How.DONE, [name, launcher.pid])
        return ending.records[0]

    first = pid("do", more=True)
    assert pid("do", more=True) == first
    assert pid("do", more=False) == first
    assert first not in proc.processes(), "it is there after the last piece"
    second = pid("do", more=True)
    launcher.dismiss()
    third = pid("do", more=True)
    assert pid("do badly", more=True) == third
    fourth = pid("do", more=True)
    assert len({first, second, third, fourth}) == 4


def test_a_process_does_not_do_what_is_apart(launcher: Launcher) -> None:
    """Work that is to be apart is not done by a process that waits for more, even when it begins early."""
    first = launcher.run(Order("do", 30, more=True), Order("do this", 30, apart=True))
    second = launcher.run(Order("do this", 30, apart=True))
    assert (first.rests, first.followed) == (True, True)
    assert second.records[0] != first.records[0]
    assert first.records[0] not in proc.processes()


def test_what_comes_next_begins_at_once(launcher: Launcher) -> None:
    """While somebody looks at one ending the next work runs, in the same process if that may do more."""
    for more in (True, False):
        first = launcher.run(Order("do", 30, more=more), Order("do this", 30))
        assert (first.followed, first.rests, first.printed) == (True, more, [("do has begun", "settings")])
        ran = proc.processes() if more else {}
        second = launcher.run(Order("do this", 30))
        assert (second.followed, second.printed) == (False, [("do this has begun", "settings")])
        assert second.records[1] == ["do this", launcher.pid]
        assert (first.records[0] == second.records[0]) == more
        assert not more or first.records[0] in ran


WAITING = [("do", "do later"), ("do and lose", "do"), ("daemon", "do"), ("fail", "do")]


@pytest.mark.parametrize(("name", "then"), WAITING)
def test_what_comes_next_waits(launcher: Launcher, name: str, then: str) -> None:
    """When it is not ready, or all is not well with what was there before, it begins when it is asked for."""
    assert not launcher.run(Order(name, 30, more=True), Order(then, 30)).followed
    ending = launcher.run(Order(then, 30))
    assert (ending.how, ending.leftovers, ending.printed) == (How.DONE, [], [(f"{then} has begun", "settings")])


def test_what_runs_ahead_can_be_dismissed(launcher: Launcher) -> None:
    """Work that has begun and is not wanted any more is ended, and done anew if it is asked for."""
    assert launcher.run(Order("do", 30, more=True), Order("hang", 30)).followed
    launcher.dismiss()
    assert launcher.run(Order("do", 30)).how is How.DONE
    assert launcher.run(Order("do", 30), Order("hang", 0.3)).followed
    assert launcher.run(Order("hang", 0.3)).how is How.TIMEOUT


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_process_does_no_more(launcher: Launcher, change: str) -> None:
    """What a piece of work changes of its process does not reach the next one."""
    first = launcher.run(Order(change, 30, more=True))
    assert (first.how, first.rests) == (How.DONE, False)
    second = launcher.run(Order("do", 30, more=True))
    assert second.records[0] != first.records[0]
    assert second.rests


def test_a_resting_process_may_fail(launcher: Launcher) -> None:
    """What ends a process that has done work before is told as ever, and the next one is new."""
    for name, how in (("hang", How.TIMEOUT), ("fail", How.ERROR), ("daemon", How.DONE)):
        assert launcher.run(Order("do", 30, more=True)).rests
        ending = launcher.run(Order(name, 0.3 if name == "hang" else 30, more=True))
        assert (ending.how, ending.rests, len(ending.leftovers)) == (how, False, name == "daemon")
        assert launcher.run(Order("do", 30)).how is How.DONE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_resting_process_may_die(launcher: Launcher, number: signal.Signals) -> None:
    """A process that dies while it waits is told of, but for the kernel's want of memory; the next one is new."""
    resting = launcher.run(Order("do", 30, more=True)).records[0]
    assert isinstance(resting, int)
    os.kill(resting, number)
    while proc.children(launcher.pid)[resting].state != "Z":
        time.sleep(0.001)
    ending = launcher.run(Order("do", 30))
    said = ["the process of the results before was killed by SIGSEGV while it waited"]
    assert (ending.how, ending.leftovers) == (How.DONE, said if number == signal.SIGSEGV else [])
    assert ending.records[0] != resting


def test_what_was_noted_is_not_told_of_the_next(launcher: Launcher) -> None:
    """What faulthandler wrote for one piece of work is no evidence against the next."""
    assert launcher.run(Order("fatal child", 30, more=True)).rests
    ending = launcher.run(Order("hang", 0.3))
    assert not any("Fatal" in line for line in ending.evidence)


def test_a_launcher_that_does_not_answer(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that stands still is given up."""
    monkeypatch.setattr(launcher_module, "LATE_SECONDS", 0.1)
    monkeypatch.setattr(launcher_module, "CLOSE_SECONDS", 0.1)
    ending = launcher.run(Order("stop the launcher", 0.3))
    assert (ending.how, ending.reason) == (How.ERROR, "the process that starts the cases does not answer")
    assert not launcher.alive


def test_hang_and_leftovers(launcher: Launcher) -> None:
    """A deadline and a process left behind are seen as they are without the launcher."""
    ending = launcher.run(Order("hang", 0.3))
    assert (ending.how, ending.reason) == (How.TIMEOUT, "0.3 seconds")
    assert len(launcher.run(Order("daemon", 30)).leftovers) == 1
    assert launcher.run(Order("one", 30)).how is How.DONE


def test_the_next_child_may_die(launcher: Launcher) -> None:
    """A child that is killed before it has work, as the kernel does when memory is short, is made good for."""
    assert launcher.run(Order("one", 30)).how is How.DONE

    def waiting() -> list[int]:
        return [pid for pid, process in proc.children(launcher.pid).items() if process.state != "Z"]

    while not waiting():
        time.sleep(0.001)
    for pid in waiting():
        os.kill(pid, signal.SIGKILL)
    while waiting():
        time.sleep(0.001)
    assert launcher.run(Order("other", 30)).how is How.DONE


def test_its_death_is_an_error(launcher: Launcher) -> None:
    """A case that kills the launcher, or for which the kernel does, is an error and ends with it."""
    ending = launcher.run(Order("kill the launcher", 30))
    assert (ending.how, ending.reason) == (How.ERROR, "the process that starts the cases died")
    assert not launcher.alive
    assert launcher.run(Order("one", 30)).how is How.ERROR


def test_end_right_after_the_beginning(tmp_path: Path) -> None:
    """A launcher that is closed before it could do anything does not go on as the process that started it."""
    who = tmp_path / "who"
    with contextlib.closing(Signals()):
        for _ in range(50):
            Launcher.start(Jobs()).close()
            with who.open("a") as file:
                file.write(f"{os.getpid()}\n")
    assert set(who.read_text().split()) == {str(os.getpid())}


def test_close_ends_what_runs() -> None:
    """Ctrl-C while a case runs leaves no process."""
    before = set(proc.processes())
    launcher = Launcher.start(Jobs())
    launcher.ask("set_up", None)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            launcher.run(Order("hang", 1000))
    finally:
        signal.signal(signal.SIGALRM, old)
        launcher.close()
    family = [process for process in proc.processes().values() if process.parent in (os.getpid(), launcher.pid)]
    assert {process.pid for process in family} <= before


def test_close_ends_what_runs_ahead() -> None:
    """While the launcher waits for an order, the end of its channel and SIGTERM come at once; nothing is left then."""
    for _ in range(10):
        SHARED[:8] = bytes(8)
        launcher = Launcher.start(Jobs())
        launcher.ask("set_up", None)
        assert launcher.run(Order("do", 30), Order("hang beside a daemon", 30)).followed
        while not any(SHARED[:8]):
            time.sleep(0.001)
        launcher.close()
        assert int.from_bytes(SHARED[:8], "little") not in proc.processes()
