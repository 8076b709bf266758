# SPDX-License-Identifier: GPL-2.0-only
"""Kernel images that are none, and a QEMU that boots them (fake_qemu.py).

No kernel is booted in these tests: uffd_selftests.checks.kernels boots some.
"""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conftest import ROOT
from uffd_selftests.harness import durations
from uffd_selftests.harness.guest import Machine
from uffd_selftests.machine.facts import probe
from uffd_selftests.vm import bundle, machines, qemu

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from uffd_selftests.vm.qemu import Shape

SMALL = ("--vm-accel", "tcg", "--vm-memory", "64M")
"""Options that let a machine be small and its deadlines be known."""

MACHINE = """
    import os, signal, time
    from pathlib import Path

    QEMU, KERNEL = int(os.environ.get("UFFD_FAKE_PID", 0)), os.environ.get("UFFD_FAKE_KERNEL", "")
    CONTROL = Path(os.environ.get("UFFD_FAKE_CONTROL", "/nowhere"))

    def say(text):
        with open(os.environ["UFFD_FAKE_CONSOLE"], "a") as file:
            file.write(f"[    2.000000] {text}\\n")

    def die(*messages, number=signal.SIGKILL):
        for message in messages:
            say(message)
        os.kill(QEMU, number)
        time.sleep(60)
"""
"""What a file of cases can do to the machine in which they run."""

BUG = "BUG: unable to handle page fault for address: 0000000000000000"
FATAL = "Kernel panic - not syncing: Fatal exception"


def write_image(path: Path, release: str = "6.99.0-test", magic: bytes = b"HdrS") -> Path:
    """Write what looks like a bzImage of this release."""
    header = bytearray(0x1000)
    header[0x202:0x206] = magic
    header[0x20E:0x210] = (0x300).to_bytes(2, "little")
    text = f"{release} (someone@somewhere) #1 SMP".encode() + b"\0"
    header[0x500 : 0x500 + len(text)] = text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(header))
    return path


def write_cases(path: Path, text: str) -> str:
    """Write a file of cases, which may use what MACHINE and the declarations of cases have; return its path."""
    imports = """
        from uffd_selftests.case import uffd_case
        from uffd_selftests.toolkit.expectations import Skip
    """
    path.write_text("".join(map(textwrap.dedent, (MACHINE, imports, text))))
    return str(path)


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@dataclass
class FakeQemu:
    """A QEMU of which a folder says how it misbehaves."""

    folder: Path
    """For the test alone."""

    @classmethod
    def install(cls, folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
        """Have it first in PATH, and machines saved in a folder of the test's own."""
        fake = cls(folder)
        fake.control.mkdir()
        program = folder / "bin/qemu-system-x86_64"
        program.parent.mkdir()
        called = shlex.join([sys.executable, str(ROOT / "tests/vm/fake_qemu.py")])
        program.write_text(f'#!/bin/sh\nexport FAKE_QEMU={shlex.quote(str(fake.control))}\nexec {called} "$@"\n')
        program.chmod(0o755)
        for name in [name for name in os.environ if name.startswith(("UFFD_", "PYTEST_ADDOPTS"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        # What a guest boots from takes seconds to make, and here nobody reads it.
        machines.folder().mkdir(parents=True)
        key = bundle._key()
        (machines.folder() / f"guest-{key}.cpio").touch()
        monkeypatch.setattr(bundle, "_key", lambda *_: key)  # whatever changes in the package meanwhile
        return fake

    @property
    def control(self) -> Path:
        """The folder that the program looks into."""
        return self.folder / "control"

    @property
    def log(self) -> list[str]:
        """What was done so far: "boot tcg bzImage", "save bzImage", "restore bzImage"."""
        path = self.control / "log"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def saved(self) -> list[Path]:
        """The state files of saved machines."""
        return sorted(machines.folder().glob("*/state"))

    def go_wrong(self, mishap: str) -> Path:
        """Have this go wrong, as long as the file is there that is returned."""
        path = self.control / mishap
        path.touch()
        return path

    def machine(self, shape: Shape, **fields: object) -> Machine:
        """Return what guests boot from, all in a folder of their own."""
        consoles = self.folder / "consoles"
        consoles.mkdir(exist_ok=True)
        for number in range(2):
            (consoles / f"place-{number}").touch()
        image = write_image(self.folder / "bzImage")
        plain: dict[str, object] = {
            "command": qemu.command(image, shape, qemu.TCG, 1), "saved": "", "boot_log": os.devnull,
            "survey": {"facts": probe().to_dict(), "unreadable": ""}, "folder": str(consoles),
            "common": str(consoles), "places": 2, "max_deaths": 20, "boot_seconds": 30.0,
            "durations": {}, "measured": str(self.folder / durations.TABLE.name),
        }  # fmt: skip
        return Machine(**{**plain, **fields})  # type: ignore[arg-type]
