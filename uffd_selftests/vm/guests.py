# SPDX-License-Identifier: GPL-2.0-only
"""One virtual machine from its start to its end, whatever that is."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uffd_selftests.vm import vng
from uffd_selftests.vm.watch import Lines, Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO

    from uffd_selftests.vm.images import Kernel

AUTO = "auto"

KVM_SECONDS = 20.0
"""How long a kernel may take with KVM until it says its first word; a working one takes less than one second."""
BOOT_SECONDS = {vng.KVM: 90.0, vng.TCG: 240.0}
"""How long it may take until the suite has begun."""
MARGIN_SECONDS = 60.0
"""How much longer than a case may take until it is the kernel that hangs."""

END_SECONDS = 5.0
"""How long what was killed may take to die."""

GUARD = 'read -r _; exec 2>/dev/null; kill -s KILL -- "-$1"; rm -rf -- "$2" || { sleep 1; rm -rf -- "$2"; }'
"""A shell that outlives this process, however it ends, and then ends the virtual machine, which takes it a moment."""


@dataclass(frozen=True)
class Ending:
    """How a virtual machine ended, and what was seen of it."""

    watch: Watch
    code: int
    """virtme-ng's exit code: the suite's, or 255 when the machine is lost."""
    timeout: float = 0.0
    """Seconds without progress, if that is why it was ended."""
    trouble: str = ""
    """Why the console could not be written down."""
    stopped: bool = False
    """It was ended from outside."""


class Accelerator:
    """KVM if a kernel has come to life with it, emulation if one did so only there: found out once, by the first.

    A file that comes to life with neither tells nothing, and the next kernel is the first.
    """

    def __init__(self, wanted: str) -> None:
        self._turn = threading.Lock()
        self._known = wanted
        if wanted == AUTO:
            self._known = "" if vng.kvm_present() else vng.TCG
        self._failed = ""
        """The kernel that did not come to life with KVM when that was tried early."""

    def try_early(self, guest: Guest, command: Callable[[], Sequence[str]]) -> None:
        """Boot a machine with KVM, if that may work, and end it as soon as the kernel is alive."""

        def alive() -> None:
            self._known = vng.KVM
            guest.stop()

        with self._turn:
            if not self._known:
                guest.run(command(), vng.KVM, KVM_SECONDS, lambda _: None, alive)
                self._failed = "" if self._known else guest.kernel.name

    def run(
        self, boot: Callable[[str, Callable[[], None]], Ending], say: Callable[[str], None], kernel: str = ""
    ) -> Ending:
        """Boot a kernel with what works. While the first tries KVM the others wait.

        boot is given the accelerator and a function to call as soon as the kernel is alive.
        """
        with contextlib.ExitStack() as turn:
            turn.enter_context(self._turn)
            if not self._known:
                if not kernel or kernel != self._failed:
                    ending = boot(vng.KVM, lambda: self._decide(vng.KVM, turn))
                    if self._known or ending.stopped:
                        return ending

                def emulated() -> None:
                    say("KVM is there but boots no kernel")
                    self._decide(vng.TCG, turn)

                return boot(vng.TCG, emulated)
        return boot(self._known, lambda: None)

    def _decide(self, accelerator: str, turn: contextlib.ExitStack) -> None:
        self._known = accelerator
        turn.close()


class Guest:
    """A virtual machine for a kernel, with a folder that it may write to."""

    def __init__(self, kernel: Kernel, folder: Path) -> None:
        self.kernel = kernel
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def stop(self) -> None:
        """End it, and let it not be started any more; from any thread."""
        with self._lock:
            self._stopped = True
            self._kill()

    def _kill(self) -> None:
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def run(
        self,
        command: Sequence[str],
        accelerator: str,
        patience: float,
        ktap: Callable[[str], object],
        alive: Callable[[], None],
    ) -> Ending:
        """Boot and watch it to its end.

        Hands each line of KTAP to ktap, and calls alive once. Ends it when patience seconds passed without progress.
        """
        with tempfile.TemporaryDirectory(prefix="uffd-selftests-vm-", ignore_cleanup_errors=True) as scratch:
            watch = Watch()
            with self._lock:
                if self._stopped:
                    return Ending(watch, 255, stopped=True)
                self._process = process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    env=vng.environment(Path(scratch)), start_new_session=True,
                )  # fmt: skip
            attendant = _Attendant(watch, ktap, alive, self.folder / "console.txt")
            guard = ["/bin/sh", "-c", GUARD, "guard", str(process.pid), scratch]
            with process, subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True) as shell:
                try:
                    timeout = attendant.attend(process, accelerator, patience)
                finally:
                    with self._lock:
                        self._kill()
                        code = process.wait()
                    _await_end(process)
                    shell.kill()
            attendant.close()
        return Ending(watch, code, timeout, attendant.trouble, self._stopped)


def _await_end(process: subprocess.Popen[bytes]) -> None:
    """Wait until nobody has the streams of a process open any more: what was killed may still make a file."""
    until = time.monotonic() + END_SECONDS
    with selectors.DefaultSelector() as selector:
        for stream in filter(None, (process.stdout, process.stderr)):
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if not os.read(key.fd, 1 << 16):
                    selector.unregister(key.fileobj)


class _Attendant:
    """Reads what a guest says until nothing more comes, or for too long."""

    def __init__(
        self, watch: Watch, ktap: Callable[[str], object], alive: Callable[[], None], console: Path
    ) -> None:
        self._watch = watch
        self._ktap = ktap
        self._alive = alive
        self._news = time.monotonic()
        self.trouble = ""
        """Why the console could not be written down."""
        self._file: BinaryIO | None = None
        with self._without_file():
            self._file = console.open("wb", buffering=0)

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    @contextlib.contextmanager
    def _without_file(self) -> Iterator[None]:
        """Go on without the file when it cannot be written."""
        try:
            yield
        except OSError as error:
            self.trouble = f"cannot write console.txt: {error.strerror}"
            self.close()
            self._file = None

    def attend(self, process: subprocess.Popen[bytes], accelerator: str, patience: float) -> float:
        """Read both streams to their end and return 0, or how many seconds there was no progress if too many."""
        start = time.monotonic()
        streams = {process.stdout: (Lines(), self._hear_suite), process.stderr: (Lines(), self._hear_console)}
        with selectors.DefaultSelector() as selector:
            for stream, hearing in streams.items():
                if stream:
                    selector.register(stream, selectors.EVENT_READ, hearing)
            while selector.get_map():
                since, bound = self._bound(start, accelerator, patience)
                left = since + bound - time.monotonic()
                if left <= 0:
                    return bound
                for key, _ in selector.select(left):
                    chunk = os.read(key.fd, 1 << 16)
                    lines, hear = key.data
                    hear(chunk, lines.feed(chunk))
                    if not chunk:
                        selector.unregister(key.fileobj)
        return 0.0

    def _bound(self, start: float, accelerator: str, patience: float) -> tuple[float, float]:
        """Return since when there is no progress, and for how many seconds that may be."""
        if self._watch.spoke:
            return self._news, patience
        return start, KVM_SECONDS if accelerator == vng.KVM and not self._watch.alive else BOOT_SECONDS[accelerator]

    def _hear_suite(self, _chunk: bytes, lines: list[str]) -> None:
        if lines:
            self._news = time.monotonic()
            self._come_alive()
        for line in lines:
            self._watch.ktap(line)
            self._ktap(line)

    def _hear_console(self, chunk: bytes, lines: list[str]) -> None:
        if self._file:
            with self._without_file():
                self._file.write(chunk)
        for line in lines:
            if self._watch.console(line):
                self._news = time.monotonic()
        if self._watch.alive:
            self._come_alive()

    def _come_alive(self) -> None:
        """Say once that the kernel is alive."""
        self._alive()
        self._alive = lambda: None
