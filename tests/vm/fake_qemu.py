# SPDX-License-Identifier: GPL-2.0-only
"""A program that is called and answers as QEMU is and does, and whose guests are processes of this host.

Tests put it into PATH as qemu-system-x86_64 (tests/vm/helpers.py). The folder FAKE_QEMU says how it misbehaves: it does
what a file there is named after, each time, or once if ".once" follows; ".of-IMAGE" behind that means one kernel alone.

    no boot         it complains and exits           silent          the kernel says nothing
    no kvm boot     the same, with KVM alone         no kvm          the same, with KVM alone
    panic           the kernel panics at boot        no launcher     it boots, and nobody answers
    slow save       saving never ends                no save         migration is refused
    bad state       what is written is not whole     full disk       what saves cannot write much
    no set_up       the machine goes away when it is set up

A case knows its machine by UFFD_FAKE_PID, UFFD_FAKE_CONSOLE and UFFD_FAKE_KERNEL, and where this folder is by
UFFD_FAKE_CONTROL. What "babble" holds is sent to the host when SIGUSR1 comes. The file "version" says another version,
and each start adds a line to "log".
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uffd_selftests.harness.isolation import Ending
    from uffd_selftests.harness.jobs import Setting

FIRST_WORDS = "[    0.000000] Linux version 6.99.0"
STATE = b"a machine as it was\n" * (1 << 14) + b"to its end\n"
"""What is saved: more than a pipe holds."""
LITTLE = 4096
"""Bytes that fit on a full disk."""


class Options:
    """What QEMU was told."""

    def __init__(self, arguments: list[str]) -> None:
        self.given: dict[str, str] = {}
        self.chardevs: dict[str, dict[str, str]] = {}
        words = iter(arguments)
        for word in words:
            if word in ("-nodefaults", "-no-user-config", "-no-reboot"):
                continue
            value = next(words)
            if word == "-chardev":
                fields = dict(field.partition("=")[::2] for field in re.split(r"(?<!,),(?!,)", value))
                self.chardevs[fields["id"]] = {name: text.replace(",,", ",") for name, text in fields.items()}
            else:
                self.given[word.lstrip("-")] = value

    def connection(self, name: str) -> socket.socket:
        """Return the socket of a character device."""
        return socket.socket(fileno=int(self.chardevs[name]["fd"]))

    @property
    def environment(self) -> dict[str, str]:
        """What the kernel makes of words of its command line that it does not know."""
        words = (word.partition("=") for word in self.given["append"].split())
        return {name: value for name, _, value in words if name.startswith("UFFD_")}


class Machine:
    """A virtual machine that is none."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.control = Path(os.environ["FAKE_QEMU"])
        self.console = Path(options.chardevs["console"]["path"])
        self.kernel = Path(options.given["kernel"]).name
        self.status = "running"
        self._port, self._monitor = options.connection("port"), options.connection("qmp")
        self._guest: socket.socket | None = None
        self._asked = b""
        self._saving: threading.Thread | None = None
        self._saved: dict[str, object] = {"status": "active"}
        self._shells: list[subprocess.Popen[bytes]] = []
        self._bell, self._rope = os.pipe()

    def takes(self, mishap: str) -> bool:
        """Whether something is to go wrong here."""
        names = [mishap, f"{mishap}.of-{self.kernel}"]
        if any((self.control / name).exists() for name in names):
            return True
        for name in (f"{mishap}.once", f"{mishap}.once.of-{self.kernel}"):
            with contextlib.suppress(FileNotFoundError):
                (self.control / name).unlink()
                return True
        return False

    def say(self, text: str) -> None:
        """Let the kernel say something."""
        with self.console.open("a") as file:
            file.write(f"{text}\n")

    def note(self, text: str) -> None:
        """Tell the tests what is done."""
        with (self.control / "log").open("a") as file:
            file.write(f"{text} {self.kernel}\n")

    def run(self) -> None:
        """Boot, or be what was saved, until the guest is gone."""
        with_kvm = self.options.given["accel"] == "kvm"
        incoming = self.options.given.get("incoming")
        self.note("restore" if incoming else f"boot {self.options.given['accel']}")
        if self.takes("no boot") or (with_kvm and self.takes("no kvm boot")):
            sys.exit("qemu-system-x86_64: could not load kernel")
        if not incoming and (self.takes("silent") or (with_kvm and self.takes("no kvm"))):
            signal.pause()
        pidfd = os.pidfd_open(self._launch())
        signal.signal(signal.SIGUSR1, lambda *_: os.write(self._rope, b"!"))
        loading = None
        if incoming:
            self.status = "inmigrate"
            command = incoming.removeprefix("exec:")
            loading = subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.PIPE)
        else:
            self.say(FIRST_WORDS)
            if self.takes("panic"):
                self.say("[    1.000000] Kernel panic - not syncing: no init")
                return
            if self.takes("no launcher"):
                signal.pause()
        if loading:
            self._load(loading)
        self._serve(pidfd)

    def _load(self, loading: subprocess.Popen[bytes]) -> None:
        """Read what was saved."""
        state, _ = loading.communicate()
        if state != STATE:
            sys.exit("qemu-system-x86_64: error while loading state for instance 0x0 of device 'ram'")
        self.status = "paused"

    def _serve(self, pidfd: int) -> None:
        """Hand on what the guest and the host say to each other, and do what the monitor is asked for."""
        assert self._guest
        self._monitor.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
        ways = {self._port: self._guest, self._guest: self._port}
        watched: list[Any] = [self._monitor]
        while True:
            wanted = [*watched, *(ways if self.status == "running" else ()), pidfd, self._bell]
            ready = select.select(wanted, [], [])[0]
            if self._monitor in ready and not self._obey():
                watched.clear()
            for source in [each for each in ready if each in ways and self.status == "running"]:
                data = source.recv(1 << 16)
                with contextlib.suppress(OSError):
                    ways[source].sendall(data)
                    if not data:
                        ways[source].shutdown(socket.SHUT_WR)
                if not data:
                    del ways[source]
            if pidfd in ready:
                return
            if self._bell in ready and self._guest not in ready:  # what the guest itself has said comes before
                os.read(self._bell, 1)
                self._babble()

    # ---- the monitor ----

    def _obey(self) -> bool:
        """Do what was asked for; whether more can come."""
        data = self._monitor.recv(1 << 16)
        self._asked += data
        while self._asked:
            try:  # requests follow each other without a newline
                request, end = json.JSONDecoder().raw_decode(self._asked.decode())
            except ValueError:
                break
            self._asked = self._asked[end:].lstrip()
            self._monitor.sendall(json.dumps(self._answer(request)).encode() + b"\r\n")
        return bool(data)

    def _answer(self, request: dict[str, Any]) -> dict[str, object]:
        command = request["execute"].replace("-", "_")
        try:
            return {"return": getattr(self, f"do_{command}")(**request.get("arguments", {}))}
        except RuntimeError as error:
            return {"error": {"class": "GenericError", "desc": str(error)}}

    def do_qmp_capabilities(self) -> dict[str, object]:
        """Begin."""
        return {}

    def do_migrate_set_parameters(self, **_: object) -> dict[str, object]:
        """Heed nothing."""
        return {}

    def do_stop(self) -> dict[str, object]:
        """Let the guest stand still."""
        self.status = "paused"
        return {}

    def do_cont(self) -> dict[str, object]:
        """Let the guest go on."""
        self.status = "running"
        return {}

    def do_query_status(self) -> dict[str, object]:
        """Say whether the guest runs."""
        return {"status": self.status, "running": self.status == "running"}

    def do_migrate(self, uri: str) -> dict[str, object]:
        """Save the machine."""
        if self.takes("no save"):
            raise RuntimeError("State blocked by non-migratable device 'fake'")
        slow, full, bad = self.takes("slow save"), self.takes("full disk"), self.takes("bad state")
        self.note("save")
        limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LITTLE, LITTLE))) if full else None
        shell = subprocess.Popen(["/bin/sh", "-c", uri.removeprefix("exec:")], stdin=subprocess.PIPE, preexec_fn=limit)  # noqa: PLW1509
        self._shells.append(shell)
        if slow:
            return {}
        self._saving = threading.Thread(target=self._write, args=(shell, STATE[: len(STATE) // 2] if bad else STATE))
        self._saving.start()
        return {}

    def _write(self, shell: subprocess.Popen[bytes], state: bytes) -> None:
        assert shell.stdin
        try:
            with shell.stdin:
                shell.stdin.write(state)
            self._saved = {"status": "completed"}
        except OSError as error:
            self._saved = {"status": "failed", "error-desc": f"Unable to write to command: {error.strerror}"}

    def do_query_migrate(self) -> dict[str, object]:
        """Say how far that is."""
        return self._saved

    # ---- the guest ----

    def _launch(self) -> int:
        """Have a child that is the guest's launcher."""
        self._guest, theirs = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                for each in (self._guest, self._port, self._monitor):
                    each.close()
                os.environ.update(
                    self.options.environment,
                    UFFD_FAKE_PID=str(parent),
                    UFFD_FAKE_CONSOLE=str(self.console),
                    UFFD_FAKE_KERNEL=self.kernel,
                    UFFD_FAKE_CONTROL=str(self.control),
                )
                be_guest(self, theirs.detach(), parent)
            os._exit(1)
        theirs.close()
        return pid

    def _babble(self) -> None:
        """Send the host something else than the guest does."""
        with contextlib.suppress(OSError), (self.control / "babble").open("rb") as file:
            while data := file.read(1 << 20):
                self._port.sendall(data)


def be_guest(machine: Machine, fd: int, parent: int) -> NoReturn:
    """Be the launcher of a guest that has a machine of its own, or so it seems."""
    from uffd_selftests.harness import health, launcher  # noqa: PLC0415  # QEMU itself does without
    from uffd_selftests.harness.channel import Channel  # noqa: PLC0415
    from uffd_selftests.vm.jobs import GuestJobs  # noqa: PLC0415  # likewise

    taints = machine.control / f"tainted-{parent}"  # this host's own are none of the guest's business
    taints.write_text("0\n")
    health.TAINTED = str(taints)

    class Port(Channel):
        """Knows when the host has what was sent: a case that kills its machine may begin right behind that."""

        def send(self, value: object, until: float | None = None) -> None:
            """Send it, and wait until it has been taken."""
            super().send(value, until)
            end = time.monotonic() + 1
            while int.from_bytes(fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)), "little") and time.monotonic() < end:
                time.sleep(0.0002)

    class Log:
        """The kernel's log is what is on the console from here on."""

        unreadable = ""

        def __init__(self) -> None:
            self._seen = machine.console.stat().st_size if machine.console.exists() else 0

        def read(self) -> list[str]:
            """Return what came since."""
            with machine.console.open("rb") as file:
                file.seek(self._seen)
                text = file.read()
                self._seen = file.tell()
            return [line for line in text.decode(errors="replace").splitlines() if line.startswith("[")]

        def close(self) -> None:
            """Do nothing."""

    class Cases(GuestJobs):
        """Those of a guest, which leave this host alone."""

        def __init__(self) -> None:
            super().__init__()
            self._own_machine = False  # not everything is to be loaded

        def preload(self) -> None:
            """Load what all cases need."""
            super().preload()
            self._health._log = Log()  # type: ignore[assignment]

        def ask_set_up(self, setting: Setting) -> dict[str, Any]:
            """Do not set this host's clock, nor write to its log, nor touch its huge pages."""
            if machine.takes("no set_up"):
                os.kill(parent, signal.SIGKILL)
                time.sleep(60)
            host = ("now", "entropy", "kmsg", "hugepages")
            (machine.control / f"setting-{parent}.json").write_text(json.dumps(setting))
            kept: Any = {name: value for name, value in setting.items() if name not in host}
            return super().ask_set_up(kept)

        def ask_supply(self, folder: str, files: dict[str, str]) -> None:
            """Have the files elsewhere: where they come from there is no such folder in a guest."""
            super().ask_supply(f"{machine.control}/root-{parent}{folder}", files)

        def begin(self, task: list[Any], *, early: bool) -> Ending | None:
            """Note it on the console."""
            refusal = super().begin(task, early=early)
            if not refusal:
                machine.say(f"[    1.000000] {health.NOTE}{task[1]}")
            return refusal

    launcher.serve(Port(fd, fd), Cases(), [], parent)


def version(control: Path) -> Iterator[str]:
    """Yield what QEMU says of itself."""
    with contextlib.suppress(OSError):
        yield (control / "version").read_text()
    yield "QEMU emulator version 9.0.0 (Debian 1:9.0.0)"


if __name__ == "__main__":
    if sys.argv[1:] == ["--version"]:
        print(next(version(Path(os.environ["FAKE_QEMU"]))))
    else:
        Machine(Options(sys.argv[1:])).run()
