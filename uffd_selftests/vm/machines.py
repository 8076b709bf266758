# SPDX-License-Identifier: GPL-2.0-only
"""Machines to start guests from: each kernel is booted once, saved when its launcher is ready, and kept."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uffd_selftests.harness import durations
from uffd_selftests.harness.guest import Guest, Machine
from uffd_selftests.vm import bundle, images, qemu, userland
from uffd_selftests.vm.options import native
from uffd_selftests.vm.qemu import AUTO, KVM, TCG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from uffd_selftests.vm.images import Kernel
    from uffd_selftests.vm.qemu import Shape

BOOT_SECONDS = {KVM: 90.0, TCG: 240.0}
"""How long it may take until the launcher answers."""
KVM_SECONDS = 4.0
"""How long a kernel may take with KVM until it says its first word; a working one takes less than one second."""
SAVE_SECONDS = 120.0
BANDWIDTH = 1 << 40
"""Bytes a second, so that saving takes no longer than it must."""
FORGOTTEN_SECONDS, LONG_SECONDS = 900.0, 30 * 86400.0
"""How long a saved machine is kept that nobody uses, of the same kernel and of others."""
FIRST_WORDS = b"Linux version "

DRAFT = "making-"
"""How a folder's name begins that is not complete, before the process that makes it."""
STATE, NOTES, BOOT_LOG = "state", "machine.json", "boot.txt"
"""The files of a saved machine."""


class Unbootable(Exception):
    """The kernel does not get as far as the launcher; args are why, and what the console showed."""


def folder() -> Path:
    """Return the folder with the saved machines."""
    return images.cache() / "machines"


def size() -> int:
    """Return how many bytes the saved machines take."""
    return sum(path.stat().st_blocks * 512 for path in folder().glob("*/*"))


def empty() -> int:
    """Remove the saved machines and the archives of their files; return how many bytes that gave back."""
    freed = size()
    shutil.rmtree(folder(), ignore_errors=True)
    return freed


class Maker:
    """Makes the machines of a session."""

    def __init__(
        self, shape: Shape, accelerator: str, common: Path, say: Callable[[str], None],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Meanwhile is called when a kernel has begun to boot, which takes its time."""
        self._shape = shape
        self._wanted = accelerator
        self._common = common
        self._say = say
        self._meanwhile = meanwhile
        self._foreign: bundle.Foreign | None = None
        self._booting: set[int] = set()
        """The processes of guests that are about to be saved."""
        self._stopped = False
        self._used = contextlib.ExitStack()
        """The files of the machines that were handed out, locked."""
        self._version = qemu.version_of(shape.arch)

    def make(
        self, kernel: Kernel, consoles: Path, scale: Callable[[str], float], *, places: int, max_deaths: int
    ) -> Machine:
        """Return what guests of a kernel start from; raises Unbootable, OSError, ValueError."""
        if self._shape.arch != native() and not self._foreign:
            self._foreign = userland.prepare(self._shape.arch, self._say)
        files = bundle.bundle(folder(), self._say, self._foreign)
        drafts = [self._draft(kernel, accelerator, scale, files) for accelerator in self._accelerators()]
        measured = folder() / "durations.json"
        shared: dict[str, Any] = {
            "folder": str(consoles), "common": str(self._common), "places": places, "max_deaths": max_deaths,
            "durations": durations.known(measured), "measured": str(measured),
        }  # fmt: skip
        for draft in drafts:
            if found := draft.load(shared):
                return self._hold(found)
        with _locked(drafts[-1].folder):
            for draft in drafts:
                if found := draft.load(shared):  # made by somebody else meanwhile
                    return self._hold(found)
            return self._hold(self._boot(drafts, shared))

    def stop(self) -> None:
        """Have nothing more made, whatever another thread is at."""
        self._stopped = True
        for pid in list(self._booting):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _hold(self, machine: Machine) -> Machine:
        """Let nobody remove it as long as this process is there."""
        if machine.saved:
            file = Path(machine.saved).open()  # noqa: SIM115  # open as long as this is
            fcntl.flock(self._used.enter_context(file), fcntl.LOCK_SH)
        return machine

    def _accelerators(self) -> list[str]:
        """Return what may work, the best first."""
        if self._wanted != AUTO:
            return [self._wanted]
        mark = _kvm_mark()
        return [KVM, TCG] if qemu.kvm_present() and not mark.exists() else [TCG]

    def _draft(self, kernel: Kernel, accelerator: str, scale: Callable[[str], float], files: Path) -> _Draft:
        command = qemu.command(kernel.image, self._shape, accelerator, scale(accelerator))
        recipe = [self._version, files.name, *command, *map(_stat, (kernel.image, kernel.modules))]
        key = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]
        return _Draft(kernel, command, folder() / f"{kernel.name}-{accelerator}-{key}", files, accelerator)

    def _boot(self, drafts: list[_Draft], shared: dict[str, Any]) -> Machine:
        """Boot a kernel with what works here, and save the machine."""
        initrd = self._common / f"{drafts[0].kernel.name}.cpio"
        with initrd.open("wb") as file, drafts[0].files.open("rb") as source:
            shutil.copyfileobj(source, file)
            file.write(bundle.modules_archive(drafts[0].kernel.modules, drafts[0].kernel.release))
        with contextlib.ExitStack() as stack:
            guests = []
            for draft in drafts:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self._common)))
                command = [*draft.command, "-initrd", str(initrd)]
                seconds = BOOT_SECONDS[draft.accelerator]
                places = len(drafts)
                own = {**shared, "folder": str(scratch), "common": str(scratch), "places": places}
                machine = Machine(command, saved="", boot_log=os.devnull, survey={}, boot_seconds=seconds, **own)
                guest = Guest(machine, "boot")
                stack.callback(guest.close)
                guests.append((draft, guest, machine))
                self._booting.add(guest.pid)
                stack.callback(self._booting.discard, guest.pid)
                if self._stopped:
                    raise Unbootable("the run was ended", [])
            if len(guests) > 1:
                guests = [_choose(guests)]
            draft, guest, machine = guests[0]
            started = time.monotonic()
            self._meanwhile()
            self._say(f"{draft.kernel.name}: booting, {'with KVM' if draft.accelerator == KVM else 'emulated'}")
            try:
                survey = guest.ask("survey")
            except (OSError, EOFError) as error:
                raise Unbootable(str(error), guest.last_lines()) from None
            seconds = time.monotonic() - started
            why = _save(guest, draft, survey)
            if why:
                self._say(f"{draft.kernel.name}: cannot be saved, each guest boots: {why}")
                return replace(machine, survey=survey, **shared)
            initrd.unlink()
            made = draft.load(shared)
            assert made
            _forget(draft)
            mib, all_mib = Path(made.saved).stat().st_size >> 20, size() >> 20
            told = f"saved ({mib} MiB, {all_mib} in all: --vm-forget)"
            self._say(f"{draft.kernel.name}: ready after {seconds:.1f} seconds, {told} in {draft.folder}")
            return made


class _Draft:
    """A saved machine, which may not be there yet."""

    def __init__(self, kernel: Kernel, command: list[str], place: Path, files: Path, accelerator: str) -> None:
        self.kernel = kernel
        self.command = command
        self.folder = place
        self.files = files
        self.accelerator = accelerator

    def load(self, shared: dict[str, Any]) -> Machine | None:
        """Return it if it is there and whole."""
        state = self.folder / STATE
        try:
            notes = json.loads((self.folder / NOTES).read_text())
            if state.stat().st_size != notes["bytes"]:
                return None
            os.utime(state)
        except (OSError, ValueError, KeyError):
            return None
        log, seconds = str(self.folder / BOOT_LOG), BOOT_SECONDS[self.accelerator]
        return Machine(self.command, str(state), log, notes["survey"], boot_seconds=seconds, **shared)


def _forget(draft: _Draft) -> None:
    """Remove what was saved of the same kernel before the suite changed, and of any long ago, unless it is in use."""
    for place in folder().iterdir():
        same = place.name.rpartition("-")[0] == draft.folder.name.rpartition("-")[0]
        with contextlib.suppress(OSError), (place / STATE).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else a session has it
            unused = time.time() - os.fstat(file.fileno()).st_mtime
            if place != draft.folder and unused > (FORGOTTEN_SECONDS if same else LONG_SECONDS):
                shutil.rmtree(place)


def remove_drafts(pid: int) -> None:
    """Remove what a process has not completed, now that it is gone."""
    for place in folder().glob(f"{DRAFT}{pid}-*"):
        shutil.rmtree(place, ignore_errors=True)


def _stat(path: Path | None) -> str:
    """Return what tells a file or a folder from what was there before."""
    if not path:
        return ""
    status = path.stat()
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _kvm_mark() -> Path:
    """Return the file that is there when KVM boots no kernel, since this machine was booted."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return folder() / f"no-kvm-{boot}"


def _choose(guests: list[tuple[_Draft, Guest, Machine]]) -> tuple[_Draft, Guest, Machine]:
    """Return the machine with KVM, if its kernel says something; else remember that, and return the other."""
    (_, first, _), _ = guests
    until = time.monotonic() + KVM_SECONDS
    while time.monotonic() < until:
        if not first.runs:
            break
        with contextlib.suppress(OSError):
            if FIRST_WORDS in first.console.read_bytes():
                guests[1][1].close()
                return guests[0]
        time.sleep(0.02)
    first.close()
    with contextlib.suppress(OSError):
        _kvm_mark().touch()
    return guests[1]


def _save(guest: Guest, draft: _Draft, survey: dict[str, Any]) -> str:
    """Write a machine that waits to be asked into the cache; return why that cannot be done, if so."""
    place = draft.folder
    making = Path(tempfile.mkdtemp(dir=folder(), prefix=f"{DRAFT}{os.getpid()}-"))
    try:
        state, part = making / STATE, making / "part"
        guest.monitor.ask("migrate-set-parameters", **{"max-bandwidth": BANDWIDTH})
        guest.monitor.ask("stop")
        written = f"cat > {shlex.quote(str(part))} && mv {shlex.quote(str(part))} {shlex.quote(str(state))}"
        guest.monitor.ask("migrate", uri=f"exec:{written}")
        until = time.monotonic() + SAVE_SECONDS
        while (status := guest.monitor.ask("query-migrate"))["status"] not in ("completed", "failed"):
            if time.monotonic() > until:
                return f"not done after {SAVE_SECONDS:g} seconds"
            time.sleep(0.01)
        while status["status"] == "completed" and not state.exists():  # the shell has the rest to write
            if time.monotonic() > until or not _grows(part):
                return f"cannot write {part}: is the disk full?"
            time.sleep(0.01)
        if status["status"] == "failed":
            return str(status.get("error-desc", "QEMU does not say why"))
        shutil.copyfile(guest.console, making / BOOT_LOG)
        (making / NOTES).write_text(json.dumps({"bytes": state.stat().st_size, "survey": survey}))
        shutil.rmtree(place, ignore_errors=True)
        making.rename(place)
    except (OSError, EOFError, ValueError, KeyError) as error:
        return str(error) or "QEMU went away"
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return ""


def _grows(path: Path) -> bool:
    """Whether a file that somebody writes gets longer, or is complete."""
    with contextlib.suppress(OSError):
        before = path.stat().st_size
        time.sleep(0.2)
        return path.stat().st_size > before
    return True


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Be the only one who makes this machine."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(place.name + ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
