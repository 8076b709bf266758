# SPDX-License-Identifier: GPL-2.0-only
"""Tests that misbehave in every way a case may. Not collected by itself; tests/harness/test_isolation.py runs it."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

import pytest

from uffd_selftests.abi.uapi import Feature
from uffd_selftests.mem_types import ANON
from uffd_selftests.toolkit.access import touch
from uffd_selftests.toolkit.expectations import Skip
from uffd_selftests.toolkit.handle import MISSING, Uffd
from uffd_selftests.toolkit.memory import Advice, advise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uffd_selftests.toolkit.memory import Range


def unresolved() -> tuple[Uffd, Range]:
    """Return a userfaultfd and a page whose fault nobody resolves."""
    uffd = Uffd.open()
    page = ANON.allocate(2).page(0)
    uffd.register(page, MISSING)
    return uffd, page


def sleep_for_ever() -> NoReturn:
    """Never return."""
    while True:
        time.sleep(1000)


# ---- hangs ----------------------------------------------------------------------------------------------------------


def test_hang_in_fault() -> None:
    """A thread outside of Python's lock sleeps in handle_userfault."""
    print("said before the hang")
    uffd, page = unresolved()
    touch(page, page.len)
    uffd.close()


def test_hang_in_fault_with_gil() -> None:
    """The same while Python's lock is held: no other Python thread can run."""
    uffd, page = unresolved()
    ctypes.PyDLL(None).memset(ctypes.c_void_p(page.start), 0, ctypes.c_size_t(1))
    uffd.close()


def test_hang_in_read() -> None:
    """The kernel itself meets the fault, in the middle of read(2)."""
    uffd = Uffd.open(flags=os.O_CLOEXEC | os.O_NONBLOCK)
    page = ANON.allocate(2).page(0)
    uffd.register(page, MISSING)
    source, sink = os.pipe()
    os.write(sink, b"x")
    ctypes.CDLL(None).read(source, ctypes.c_void_p(page.start), ctypes.c_size_t(1))
    uffd.close()


def test_hang_in_event() -> None:
    """madvise(2) waits for its event to be read, ignoring all signals but SIGKILL."""
    uffd = Uffd.open(Feature.EVENT_REMOVE)
    page = ANON.allocate(2).page(0)
    uffd.register(page, MISSING)
    advise(page, Advice.DONTNEED)


def test_hang_grandchild() -> None:
    """A grandchild in a session of its own sleeps in a fault; the case waits for it."""
    child = os.fork()
    if not child:
        os.setsid()
        _uffd, page = unresolved()
        touch(page, page.len)
    os.waitpid(child, 0)


def test_hang_ignoring_signals() -> None:
    """Every signal that can be ignored is."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_IGN)
        except OSError:
            continue
    sleep_for_ever()


def test_hang_stopped() -> None:
    """It stops itself."""
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.fixture
def hangs_in_setup() -> None:
    """Never be ready."""
    sleep_for_ever()


@pytest.mark.usefixtures("hangs_in_setup")
def test_hang_in_setup() -> None:
    """Never comes so far."""


@pytest.fixture
def hangs_in_teardown() -> Iterator[None]:
    """Never clean up."""
    yield
    sleep_for_ever()


@pytest.mark.usefixtures("hangs_in_teardown")
def test_hang_in_teardown() -> None:
    """Passes, but never ends."""


@pytest.mark.usefixtures("hangs_in_teardown")
def test_hang_after_failure() -> None:
    """Fails, and then never ends."""
    raise AssertionError("this is not all")


@pytest.mark.xfail(reason="a hang is never expected")
def test_hang_expected_failure() -> None:
    """An expected failure does not excuse a hang."""
    sleep_for_ever()


# ---- crashes --------------------------------------------------------------------------------------------------------


def test_die_sigsegv() -> None:
    """A bad pointer."""
    ctypes.string_at(0)


def test_die_sigbus() -> None:
    """A bad page."""
    os.kill(os.getpid(), signal.SIGBUS)


def test_die_sigkill() -> None:
    """As the kernel kills when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_die_abort() -> None:
    """As the C library does."""
    os.abort()


def test_die_exit() -> None:
    """Leaves without a word."""
    print("said before the exit")
    os._exit(3)


def test_die_exit_zero() -> None:
    """Leaves without a word, as if all were well."""
    os._exit(0)


def test_die_system_exit() -> None:
    """Raises what ends a program."""
    sys.exit("enough")


def test_die_keyboard_interrupt() -> None:
    """Raises what Ctrl-C raises."""
    raise KeyboardInterrupt


def test_die_pytest_exit() -> None:
    """Tells pytest to end the run."""
    pytest.exit("no more")


def test_die_memory() -> None:
    """Wants more memory than it may have."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
    bytearray(1 << 33)


# ---- leaks ----------------------------------------------------------------------------------------------------------


def test_leak_child() -> None:
    """Leaves a child behind."""
    if not os.fork():
        sleep_for_ever()


def test_leak_daemon() -> None:
    """Leaves a daemon behind: another session, another group, another parent."""
    child = os.fork()
    if not child:
        os.setsid()
        if not os.fork():
            sleep_for_ever()
        os._exit(0)
    os.waitpid(child, 0)


def test_leak_program() -> None:
    """Leaves another program behind, which holds the report pipe open if it can."""
    subprocess.Popen(["sleep", "1000"], close_fds=False, start_new_session=True)


def test_leak_zombie() -> None:
    """Never asks how its child ended."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and still nobody asked


def test_leak_userfaultfd() -> None:
    """Leaves a userfaultfd open."""
    os.dup(Uffd.open().fileno())


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_noise_stdout() -> None:
    """Prints what looks like a result."""
    print("ok 1 forged\n1..1\nBail out! forged")
    os.write(1, b"not ok 2 forged\n")
    os.write(2, b"ok 3 forged\n")


def test_noise_everywhere() -> None:
    """Writes to whatever is open."""
    for fd in range(3, 256):
        try:
            os.write(fd, b"\nnot ok 99 garbage\n" * 10)
        except OSError:
            continue


def test_noise_close_everything() -> None:
    """Closes whatever is open."""
    os.closerange(0, 256)


def test_noise_fork_falls_through() -> None:
    """A child of the case comes back into the harness."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)


def test_noise_threads() -> None:
    """Leaves threads running."""
    for _ in range(4):
        threading.Thread(target=sleep_for_ever, daemon=True).start()


def test_noise_much() -> None:
    """Fails with a great deal of output."""
    print("line\n" * 100_000)
    raise AssertionError("x" * 300_000)


# ---- ordinary ends --------------------------------------------------------------------------------------------------


def test_ordinary_pass() -> None:
    """Passes."""


def test_ordinary_fail() -> None:
    """Says what was expected. Says no more."""
    print("said before the failure")
    assert 6 * 9 == 42, "six by nine"


def test_ordinary_raise() -> None:
    """Raises."""
    raise OSError(11, "EAGAIN")


def test_ordinary_skip() -> None:
    """Skips with a reason that looks like a directive."""
    pytest.skip("no luck # TODO")


def test_ordinary_skip_exception() -> None:
    """Skips as cases do."""
    raise Skip("needs a better machine")


@pytest.mark.skip(reason="marked")
def test_ordinary_skip_mark() -> None:
    """Skips by its mark."""


@pytest.mark.xfail(reason="known defect")
def test_ordinary_xfail() -> None:
    """Fails as expected."""
    raise AssertionError


@pytest.mark.xfail(reason="known defect")
def test_ordinary_xfail_skip_exception() -> None:
    """A skip is no failure, expected or not."""
    raise Skip("needs a better machine")


@pytest.mark.xfail(reason="repaired defect")
def test_ordinary_xpass() -> None:
    """Passes against expectation."""


@pytest.mark.xfail(reason="repaired defect", strict=True)
def test_ordinary_xpass_strict() -> None:
    """Passes against expectation, which is wrong."""


@pytest.fixture
def fails_in_setup() -> None:
    """Fail before the test."""
    raise RuntimeError("no setup")


@pytest.mark.usefixtures("fails_in_setup")
def test_ordinary_setup_fails() -> None:
    """Never comes so far."""


@pytest.fixture
def fails_in_teardown() -> Iterator[None]:
    """Fail after the test."""
    yield
    raise RuntimeError("no teardown")


@pytest.mark.usefixtures("fails_in_teardown")
def test_ordinary_teardown_fails() -> None:
    """Passes, but cannot clean up."""


def test_ordinary_last() -> None:
    """Still runs after all that."""
