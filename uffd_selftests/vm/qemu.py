# SPDX-License-Identifier: GPL-2.0-only
"""How QEMU is called for a kernel, and what it needs of the host."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uffd_selftests.vm.init import PORT
from uffd_selftests.vm.options import native

if TYPE_CHECKING:
    from pathlib import Path

KVM, TCG, AUTO = "kvm", "tcg", "auto"

OLDEST = (5, 2)
"""Before, nobody has tried."""


@dataclass(frozen=True)
class Architecture:
    """What differs between architectures."""

    program: str
    package: str
    """Debian's package of the program."""
    machine: str
    console: str
    cpu: str
    """What is emulated: all that QEMU can, but for what makes kernels choose ways that are slow there, like clearing
    pages byte by byte: without it a run takes a quarter less time."""
    append: tuple[str, ...] = ()
    """Of the kernel's command line, when emulated."""


ARCHITECTURES = {
    # On a busy host an emulated guest misjudges its TSC, and its clock runs several times too fast.
    "x86_64": Architecture(
        "qemu-system-x86_64",
        "qemu-system-x86",
        "q35",
        "ttyS0",
        "max,erms=off,fsrm=off,la57=off,avx=off,avx2=off",
        ("tsc=unstable", "clocksource=hpet"),
    ),
    "arm64": Architecture("qemu-system-aarch64", "qemu-system-arm", "virt", "ttyAMA0", "max,pauth-impdef=on"),
}

COMMAND_LINE = (
    "panic=-1",  # then QEMU ends
    "printk.devkmsg=on",  # else the kernel drops most of what the suite notes in its log
    "cryptomgr.notests",
    "rootfstype=ramfs",  # in tmpfs, pages of programs would count as shared memory of whoever runs them
)


@dataclass(frozen=True)
class Shape:
    """What the virtual machines are like."""

    arch: str = "x86_64"
    memory: str = "3G"
    cpus: int = 1
    append: tuple[str, ...] = ()
    """More of the kernel's command line."""
    qemu: tuple[str, ...] = ()
    """More arguments for QEMU."""

    @property
    def bytes(self) -> int:
        """The memory of one."""
        return int(self.memory[:-1]) << {"M": 20, "G": 30}[self.memory[-1]]


def missing(arch: str) -> str | None:
    """Return one line that says what to install, or None."""
    wanted = ARCHITECTURES[arch]
    version = version_of(arch)
    if not version:
        return f"missing for --kernel: apt-get install {wanted.package}"
    words = version.replace("version ", "").split()
    number = next((word for word in words if word[:1].isdigit()), "0")
    if tuple(int(part) for part in number.split(".")[:2] if part.isdigit()) < OLDEST:
        return f"{wanted.program} {number} is too old: --kernel needs QEMU {'.'.join(map(str, OLDEST))} or later"
    return None


def version_of(arch: str) -> str:
    """Return what QEMU says it is; empty when it is not there."""
    program = shutil.which(ARCHITECTURES[arch].program)
    if not program:
        return ""
    call = [program, "--version"]
    result = subprocess.run(call, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    return result.stdout.partition("\n")[0]


def kvm_present() -> bool:
    """Whether KVM can be opened, which does not mean that it works."""
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


def command(image: Path, shape: Shape, accelerator: str, scale: float) -> list[str]:
    """Return the call that boots a kernel, without the archive of its files and without what is each guest's own."""
    arch = ARCHITECTURES[shape.arch]
    emulated = accelerator == TCG
    line = [f"console={arch.console}", *COMMAND_LINE, *(arch.append if emulated else ())]
    line += [f"UFFD_DEADLINE_SCALE={scale:g}", *shape.append]  # which becomes the first process's environment
    call = [arch.program, "-M", arch.machine, "-accel", accelerator, "-cpu", arch.cpu if emulated else "host"]
    call += ["-m", shape.memory, "-smp", str(shape.cpus), "-nodefaults", "-no-user-config", "-display", "none"]
    call += ["-no-reboot", "-kernel", str(image), "-append", " ".join(line)]
    call += ["-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=port,name={PORT}"]
    return [*call, *shape.qemu]


def native_only(arch: str) -> bool:
    """Whether kernels for an architecture can only be emulated here."""
    return arch != native()
