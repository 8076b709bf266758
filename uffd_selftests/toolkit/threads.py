# SPDX-License-Identifier: GPL-2.0-only
"""Threads that make one call which sleeps in the kernel."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from uffd_selftests.abi import syscalls
from uffd_selftests.toolkit.expectations import DEADLINE, Skip, eventually
from uffd_selftests.toolkit.messages import Fault

__all__ = ["waiting_threads", "WCHAN_SHOWN", "Waiter", "settle", "poised", "handled"]


waiting_threads: list[threading.Thread] = []
"""The threads in which cases make calls that may sleep: see Waiter."""


def _wchan_shown() -> bool:
    """Try on a thread that sleeps in read(2): x86 kernels before 5.16 lose their way on the stack, others say nothing.

    The thread may just be on its way to sleep, or wait for the interpreter's lock, which is shown as well.
    """
    if not os.path.exists("/proc/kallsyms"):
        return False
    end, other = os.pipe()
    thread = threading.Thread(target=os.read, args=(end, 1))
    thread.start()
    folder = Path(f"/proc/self/task/{thread.native_id}")
    try:
        for _ in range(100):
            before = folder.joinpath("status").read_text()
            shown = folder.joinpath("wchan").read_text() not in ("", "0")
            if shown or ("State:\tS" in before and before == folder.joinpath("status").read_text()):
                return shown
            time.sleep(0.0001)
        return False
    except OSError:
        return False
    finally:
        os.write(other, b"x")
        thread.join()
        os.close(end)
        os.close(other)


WCHAN_SHOWN = _wchan_shown()
"""Whether /proc/PID/wchan names the function in which a thread sleeps (CONFIG_KALLSYMS)."""


FUTEX_WAKE = 1


class Waiter:
    """A thread that makes one call which is expected to sleep in the kernel, in a ``with`` block.

    The call must release the interpreter's lock: all of memory.py and access.py and every Uffd method do.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._result: object = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self.fault: Fault | None = None
        """The page fault that it sleeps in, where faulting() has read it."""

    def _main(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        """Whether the call has returned."""
        return not self._thread.is_alive()

    @property
    def tid(self) -> int:
        """The thread's id in the kernel."""
        return self._thread.native_id or 0

    def join(self, seconds: float) -> None:
        """Wait for the call, so long at most."""
        self._thread.join(seconds)

    def result(self) -> object:
        """Wait for the call and return its result, or raise what it raised."""
        self.join(DEADLINE)
        if self._thread.is_alive():
            raise AssertionError(f"the call did not return within {DEADLINE:g} seconds; it sleeps in {self.wchan}")
        if self._error is not None:
            raise self._error
        return self._result

    @property
    def state(self) -> str:
        """The state letter of /proc/PID/stat: R running, S or D asleep, T stopped; empty when it has ended."""
        try:
            return Path(f"/proc/self/task/{self.tid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""

    @property
    def asleep(self) -> bool:
        """Whether the thread sleeps in the kernel, other than for the interpreter's lock."""
        if not WCHAN_SHOWN:
            return self.state in ("S", "D") and not self._in_futex
        return self.wchan != "0" and "futex" not in self.wchan

    def expect_sleeping(self) -> None:
        """Wait until the thread sleeps in the kernel; AssertionError when it ends instead or runs on."""
        eventually(lambda: self.done or self.asleep, "the thread to sleep")
        if self.done:
            raise AssertionError("expected the thread to sleep; its call has returned")

    def expect_in_event(self) -> None:
        """Wait until the thread waits for its event to be read: fork, mremap, madvise or munmap."""

        def waits() -> bool:
            return "userfaultfd" in self.wchan if WCHAN_SHOWN else self.state == "D"

        eventually(lambda: self.done or waits(), "the thread to wait until its event is read")
        if self.done:
            raise AssertionError("expected the thread to wait until its event is read; its call has returned")

    @property
    def _in_futex(self) -> bool:
        """Whether the thread waits in futex(2), as for the interpreter's lock; who wakes others does not wait there."""
        try:
            call = Path(f"/proc/self/task/{self.tid}/syscall").read_text().split()
        except OSError:
            return False
        return call[0] == str(syscalls.number("futex")) and int(call[2], 16) & 0x7F != FUTEX_WAKE

    @property
    def cpu_time(self) -> float:
        """Seconds that the thread has run; 0 when it has ended."""
        try:
            return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident or 0))
        except OSError:
            return 0.0

    def signal(self, number: int) -> None:
        """Send a signal to the thread itself."""
        signal.pthread_kill(self._thread.ident or 0, number)

    @property
    def wchan(self) -> str:
        """The kernel function in which the thread sleeps; "0" where it does not sleep, or not WCHAN_SHOWN."""
        try:
            return Path(f"/proc/self/task/{self.tid}/wchan").read_text()
        except OSError:
            return "0"

    def __enter__(self) -> Waiter:
        self._thread.start()
        waiting_threads.append(self._thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the thread may sleep for good; it is a daemon and goes with the process.
        if kind is None or (self.done and isinstance(self._error, Skip)):
            self.result()


def settle(*waiters: Waiter) -> None:
    """Wait until the call of each thread has returned, or sleeps in the kernel."""
    eventually(lambda: all(waiter.done or waiter.asleep for waiter in waiters), "the calls to sleep or to return")


@contextmanager
def poised(*calls: Callable[[], object]) -> Iterator[tuple[Callable[[], None], list[Waiter]]]:
    """Have a thread for each call; the block gets what lets them make these calls, and the threads.

    Afterwards all calls have returned. A thread that is to meet a locked address space must be there before: to make
    one takes memory for its stack.
    """
    gate = threading.Event()

    def after_gate(call: Callable[[], object]) -> object:
        gate.wait()
        return call()

    def go() -> None:
        """Let all make their calls, and wait until each has returned or sleeps."""
        gate.set()
        settle(*waiters)

    with ExitStack() as stack:
        waiters = [stack.enter_context(Waiter(partial(after_gate, call))) for call in calls]
        try:
            yield go, waiters
        finally:
            gate.set()


@contextmanager
def handled(number: int, *, restart: bool = False) -> Iterator[list[int]]:
    """Have a handler that only notes the signal, in the list that the block gets; ``restart`` is SA_RESTART.

    The thread that the signal is sent to is interrupted; the note is made by the main thread, soon after.
    """
    notes: list[int] = []
    previous = signal.signal(number, lambda signo, _: notes.append(signo))
    signal.siginterrupt(number, not restart)
    try:
        yield notes
    finally:
        signal.signal(number, previous)
