# SPDX-License-Identifier: GPL-2.0-only
"""A launcher in a virtual machine of its own: QEMU with a virtio port for what is said, and a file for the console.

Who prepares such machines is vm/; here they are started, from the file in which a booted one was saved or by booting,
and it is told what they died of.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import resource
import select
import shlex
import shutil
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uffd_selftests.harness.channel import Channel
from uffd_selftests.harness.health import NOTE, Patterns
from uffd_selftests.harness.isolation import Ending, How, end_with, fork, kill
from uffd_selftests.harness.launcher import Launcher
from uffd_selftests.harness.site import Spent

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffd_selftests.harness.launcher import Order

RESTORE_SECONDS = 60.0
"""How long a saved machine may take until it goes on; a second is much."""
END_SECONDS = 5.0
"""How long a killed QEMU, or one whose kernel has died, may take to vanish."""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
STAMP = re.compile(r"^\[ *\d+\.\d+\] ")
FAREWELL = re.compile(r"reboot: |ACPI: PM: ")
"""What the kernel says when a machine is switched off because its launcher has ended: not why."""
SHOWN = 25
"""How many of the console's last lines are shown."""
TAIL_BYTES = 1 << 16
CONSOLE_BYTES = 64 << 20
"""How much a guest may say on its console; what comes then is lost."""


@dataclass(frozen=True)
class Machine:
    """What guests of one kernel are started from: plain data."""

    command: list[str]
    """QEMU's call, without what is each guest's own."""
    saved: str
    """The file of a booted machine that they all start from; empty when each boots."""
    boot_log: str
    """What the kernel said before it was saved."""
    survey: dict[str, Any]
    """What the launcher found on the machine."""
    folder: str
    """Where the guests' consoles are written."""
    common: str
    """A folder for all guests of all kernels, and for what their processes tell each other."""
    places: int
    """How many guests may run at once."""
    max_deaths: int
    """After so many, no more guest is started."""
    boot_seconds: float
    """How long booting may take."""
    durations: dict[str, float]
    """How long results take in such guests."""
    measured: str
    """The file that keeps that."""
    running: tuple[int, int] | None = None
    """The descriptor of the port of a guest that is there already, which this process has inherited, and QEMU's ID."""

    @classmethod
    def load(cls, path: Path) -> Machine:
        """Return what save() wrote."""
        return cls(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        """Write it down, for the processes of a run."""
        path.write_text(json.dumps(asdict(self)))

    @property
    def deaths(self) -> Path:
        """A file with a byte for each guest of this kernel that has died."""
        return Path(self.folder, "deaths")

    def source(self, worker: str = "", first: int = 1) -> Callable[[], Launcher]:
        """Return what starts guests for a worker, one after the other; the first has this number."""
        numbers = itertools.count(first)
        if self.running:
            return lambda: Borrowed(self, *self.running or (0, 0))
        return lambda: Guest(self, f"{worker}-{next(numbers)}".lstrip("-"))


class Guest(Launcher):
    """A launcher in a virtual machine."""

    def __init__(self, machine: Machine, name: str) -> None:
        """Start it, and do not wait; raises EOFError when there is none to start, Spent when too many have died."""
        self.name = name
        self._machine = machine
        self._cleanup = contextlib.ExitStack()
        if machine.saved and not os.path.exists(machine.saved):
            raise EOFError(f"the saved machine cannot be started: {machine.saved} is gone")
        deaths = machine.deaths.stat().st_size if machine.deaths.exists() else 0
        if deaths >= machine.max_deaths:
            raise Spent(f"never ran: {deaths} guests have died")
        self._cleanup.enter_context(_place(Path(machine.common), machine.places))
        self.console = Path(machine.folder, f"console-{name}.txt")
        with contextlib.suppress(OSError):
            shutil.copyfile(machine.boot_log, self.console)
        port, theirs = socket.socketpair()
        monitor, monitors = socket.socketpair()
        with theirs, monitors:
            incoming = ["-incoming", f"exec:cat {shlex.quote(machine.saved)}"] if machine.saved else []
            pid = self._start([*machine.command, *wiring(theirs, monitors, self.console), *incoming])
        port.setblocking(False)
        fd = port.detach()
        super().__init__(Channel(fd, fd), pid)
        self.monitor = Monitor(monitor)
        self._cleanup.callback(self.monitor.close)
        self._sleeps = bool(machine.saved)
        if not machine.saved:
            self.patience = machine.boot_seconds

    def _start(self, command: list[str]) -> int:
        """Start QEMU, which ends with this process; what it says itself goes to the console."""
        parent = os.getpid()
        pid = fork()
        if not pid:
            try:
                os.setpgid(0, 0)
                end_with(parent)
                if self._machine.saved:  # else it has a file to write that is larger
                    resource.setrlimit(resource.RLIMIT_FSIZE, (CONSOLE_BYTES, CONSOLE_BYTES))
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                for fd in (1, 2):
                    os.dup2(os.open(self.console, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), fd)
                os.execvp(command[0], command)
            finally:
                os._exit(127)
        return pid

    def ask(self, name: str, *arguments: object) -> Any:
        """Return the answer of Jobs.answer; raises OSError with what failed there, EOFError when there is none."""
        if self._sleeps:
            self._sleeps = False
            self._wake()
        return super().ask(name, *arguments)

    def _wake(self) -> None:
        """Have a machine go on that comes from a file; raises EOFError."""
        with contextlib.suppress(OSError):
            os.utime(self._machine.saved)  # it is in use
        until = time.monotonic() + RESTORE_SECONDS
        try:
            while self.monitor.ask("query-status")["status"] == "inmigrate":
                if time.monotonic() > until:
                    raise TimeoutError
                time.sleep(0.005)
            self.monitor.ask("cont")
        except (OSError, EOFError, ValueError, KeyError):
            with contextlib.suppress(OSError):  # the next run makes another one
                os.unlink(self._machine.saved)
            words = self.last_lines()
            self.close()
            raise EOFError(f"the saved machine cannot be started: {words[-1] if words else 'no answer'}") from None

    @property
    def runs(self) -> bool:
        """Whether QEMU is still there."""
        return not select.select([self._pidfd], [], [], 0)[0]

    def own_setting(self) -> dict[str, Any]:
        """Return the time and random numbers, which are else those of all machines from one file."""
        return {"now": time.time(), "entropy": os.urandom(32).hex()}

    def last_words(self, what: str) -> str:
        """Say what became of it: in the kernel's words, if it said something."""
        if what == "died":
            kill(self.pid, time.monotonic() + END_SECONDS, 0, pidfd=self._pidfd)
        words = self.last_lines()
        patterns = Patterns.load()
        for line in words:
            text = STAMP.sub("", line)
            if patterns.complains(text) or "Kernel panic" in text:
                return text
        words = [line for line in words if not FAREWELL.search(line)] or words
        said = "the virtual machine went away" if what == "died" else f"the guest {what}"
        return f"{said}: {words[-1]}" if words else said

    def obituary(self, what: str, order: Order, seconds: float) -> Ending:
        """Return the ending of the case that ran when it died."""
        with self._machine.deaths.open("ab") as file:
            file.write(b".")
        words = self.last_words(what)
        evidence = [f"console: {self.console}", *(f"console: {line}" for line in self.last_lines()[:SHOWN])]
        if what == "does not answer":
            evidence.insert(0, words)
            return Ending(How.TIMEOUT, f"{order.deadline:g} seconds", [], evidence, [], seconds, died=True)
        return Ending(How.ERROR, words, [], evidence, [], seconds, died=True)

    def last_lines(self) -> list[str]:
        """Return what the console shows since the last case began, from the first complaint on if there is one."""
        try:
            with self.console.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        lines = [CONTROL.sub("", line.rstrip("\r")).strip() for line in text.splitlines()]
        lines = [line for line in lines if line]
        begun = max((number for number, line in enumerate(lines, 1) if NOTE in line), default=0)
        lines = lines[begun:]
        patterns = Patterns.load()
        first = next((i for i, line in enumerate(lines) if patterns.complains(STAMP.sub("", line))), None)
        return lines[first:] if first is not None else lines[-SHOWN:]

    def _end(self) -> None:
        kill(self.pid, time.monotonic() + END_SECONDS, pidfd=self._pidfd)
        self._cleanup.close()

    # ---- for a soak, whose rounds are processes that have one guest after the other ----

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a process must inherit that is to have the guest for a while."""
        return tuple(self._channel.descriptors)

    def lend(self, notes: Path, lent: Path) -> list[str]:
        """Return the option by which a process that has inherited the descriptors uses this guest."""
        (fd,) = self.descriptors
        replace(Machine.load(notes), running=(fd, self.pid)).save(lent)
        return [f"--machine={lent}"]


class Borrowed(Launcher):
    """A guest of another process, which takes it back in the end."""

    name = "1"

    def __init__(self, machine: Machine, port: int, pid: int) -> None:
        super().__init__(Channel(port, port), pid)
        self._machine = machine

    def last_words(self, what: str) -> str:
        """Say what became of it."""
        return f"the guest {what}"

    def finish(self, seconds: float | None = None) -> Any:
        """Have all put back that was for this run."""
        self.dismiss()
        return super().finish(seconds)

    def _end(self) -> None:
        """Leave it to its owner."""


class Monitor:
    """QEMU's own interface (docs/interop/qmp-spec.rst)."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(RESTORE_SECONDS)
        self._connection = connection
        self._file = connection.makefile("r", encoding="utf-8", errors="replace")
        self._greeted = False

    def ask(self, command: str, **arguments: object) -> Any:
        """Have QEMU execute a command and return its answer; raises OSError, EOFError, ValueError as it complains."""
        if not self._greeted:
            self._receive("QMP")
            self._greeted = True
            self.ask("qmp_capabilities")
        self._connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        return self._receive("return")

    def _receive(self, wanted: str) -> Any:
        while True:
            line = self._file.readline(1 << 20)
            if not line:
                raise EOFError
            message = json.loads(line)
            if "error" in message:
                raise ValueError(str(message["error"]["desc"]))
            if wanted in message:
                return message[wanted]

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._connection.close()


def wiring(port: socket.socket, monitor: socket.socket, console: Path) -> list[str]:
    """Return the part of QEMU's call that is about one guest's connections; the sockets are inherited."""
    for each in (port, monitor):
        each.set_inheritable(True)
    path = str(console).replace(",", ",,")
    return [
        *("-chardev", f"socket,id=port,fd={port.fileno()}"),
        *("-chardev", f"socket,id=qmp,fd={monitor.fileno()}", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"file,id=console,append=on,path={path}", "-serial", "chardev:console"),
    ]


@contextlib.contextmanager
def _place(folder: Path, places: int) -> Any:
    """Have one of so many places, which all processes of a session share."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / f"place-{number}").open("a")) for number in range(places)]
        while not any(map(_locked, files)):
            time.sleep(0.05)
        yield


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
