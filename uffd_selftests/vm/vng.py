# SPDX-License-Identifier: GPL-2.0-only
"""How virtme-ng is called, and what it needs of the host.

virtme-ng hands some of its arguments to a shell as they are; such arguments are quoted here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uffd_selftests.vm import userland
from uffd_selftests.vm.images import modules
from uffd_selftests.vm.options import native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uffd_selftests.vm.images import Kernel
    from uffd_selftests.vm.userland import Userland

PROJECT = Path(__file__).resolve().parent.parent.parent

KVM, TCG = "kvm", "tcg"

QEMU = {"x86_64": ("qemu-system-x86_64", "qemu-system-x86"), "arm64": ("qemu-system-aarch64", "qemu-system-arm")}
"""The emulator of an architecture and Debian's package of it."""

TOOLS = {"modprobe": "kmod", "file": "file"}
"""What virtme-ng runs, and Debian's packages."""
GUEST_TOOLS = {"busybox": "busybox-static", "udevadm": "udev"}
"""What runs in a guest with the host's programs. Without udev neither output nor exit code leave the guest."""

SBIN = ("/usr/sbin", "/sbin")

HOST = "uffd-host"
"""Tag of the host's files, which are mounted once more where Python's are: cached, for nobody changes them."""
FAST_FILES = """
if mkdir /run/{host} && mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose {host} /run/{host}
then for folder in {folders}; do mount --bind "/run/{host}$folder" "$folder"; done
fi 2>/dev/null
exec env PYTHONPATH={path} {python} -S -m uffd_selftests.vm.guest {arguments}
"""
"""Without -S, Python would look for packages again, in files; it is told what it finds here."""
FOREIGN_FILES = """
set -e
mkdir /run/{host}
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose {host} /run/{host}
for folder in /usr /lib; do mount --bind "/run/{host}"{root}"$folder" "$folder"; done
for folder in {folders}; do mkdir -p "$folder"; mount --bind "/run/{host}$folder" "$folder"; done
mount --bind "/run/{host}"{module} {built}
for folder in {modules}; do mount --bind "/run/{host}$folder" /lib/modules; done
exec env PYTHONPATH={project} {python} -m uffd_selftests.vm.guest {arguments}
"""
"""The same for a guest with programs of its own: it gets the suite, with its native part, and the kernel's modules."""

UDEV = Path(__file__).with_name("udev")
"""The rules of udev in a guest. With the host's, which are for all devices there are, udev takes half of the boot."""

RESULTS = "/tmp/uffd-results"  # a folder of the guest
"""Where the guest finds its results folder."""
SCRIPT = "guest.sh"
"""What the guest does, in its results folder: virtme-ng's way is the kernel's command line, which has 2048 bytes."""

NEEDLESS_MODULES = (
    *("acpi_cpufreq", "aesni_intel", "ahci", "button", "ccp", "crc32_pclmul", "crct10dif_pclmul", "edac_mce_amd"),
    *("evdev", "ghash_clmulni_intel", "i2c_i801", "i6300esb", "iTCO_wdt", "intel_rapl_common", "intel_rapl_msr"),
    *("joydev", "k10temp", "kvm", "kvm_amd", "kvm_intel", "lpc_ich", "pcspkr", "polyval_clmulni", "powernow_k8"),
    *("psmouse", "qemu_fw_cfg", "rapl", "sg", "sha1_ssse3", "sha256_ssse3", "sha512_ssse3", "sr_mod"),
)
"""Modules that udev would load for the machine's devices: a third of the time to boot a distribution's kernel."""

COMMAND_LINE = (
    "printk.devkmsg=on",  # else the kernel drops most of what the suite notes in its log
    "udev.children_max=1",  # on one processor, more are only more forks
    f"modprobe.blacklist={','.join(NEEDLESS_MODULES)}",
)
EMULATED = ("tsc=unstable", "clocksource=hpet")
"""On a busy host the guest misjudges its TSC, and its clock runs several times too fast."""
PROCESSORS = {"arm64": "cortex-a76"}
"""What is emulated, where virtme-ng's own choice will not do: that of arm64 has no pages of 16 kB."""


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
    userland: Userland | None = None
    """The guest's programs, where it cannot run the host's."""


def program() -> str | None:
    """Return the path of vng: from PATH, else from the environment that this program runs in."""
    return shutil.which("vng") or shutil.which("vng", path=str(Path(sys.executable).parent))


def missing(arch: str) -> str | None:
    """Return one line that says what to install, or None."""
    if not program():
        return "virtme-ng is missing: pip install 'uffd-selftests[vm]'"
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])
    needed = dict([QEMU[arch]], **TOOLS, **(GUEST_TOOLS if arch == native() else userland.tools(arch)))
    packages = [package for tool, package in needed.items() if not shutil.which(tool, path=path)]
    return f"missing for --kernel: apt-get install {' '.join(packages)}" if packages else None


def kvm_present() -> bool:
    """Whether KVM can be opened, which does not mean that it works."""
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


def command(kernel: Kernel, shape: Shape, accelerator: str, results: Path, arguments: Sequence[str]) -> list[str]:
    """Return the call that boots a kernel and runs the suite in it, with one writable folder, where the script goes.

    Raises OSError when that cannot be written.
    """
    clock = EMULATED if accelerator == TCG and shape.arch == "x86_64" else ()
    line = [*COMMAND_LINE, *clock, *map(shlex.quote, shape.append)]
    call = [program() or "vng", "--verbose", "--run", shlex.quote(str(kernel.path))]
    call += ["--force-9p", "--disable-microvm", "--user", "root"]
    call += ["--memory", shape.memory, "--cpus", str(shape.cpus)]
    call += ["--rwdir", shlex.quote(f"{RESULTS}={results}"), "--append", " ".join(line)]
    if accelerator == TCG:
        call.append("--disable-kvm")
    qemu = ["-cpu", PROCESSORS[shape.arch]] if accelerator == TCG and shape.arch in PROCESSORS else []
    if shape.userland:
        root, busybox = str(shape.userland.root), str(shape.userland.busybox)
        call += ["--cwd", root, "--arch", shape.arch, "--root", root, "--busybox", busybox, "--no-virtme-ng-init"]
    else:
        call += ["--cwd", "/", "--rodir", shlex.quote(f"{os.path.realpath('/lib/udev/rules.d')}={UDEV}")]
    qemu += ["-fsdev", f"local,id={HOST},path=/,security_model=none,readonly=on,multidevs=remap"]
    qemu += ["-device", f"virtio-9p-pci,fsdev={HOST},mount_tag={HOST}", *shape.qemu]
    call += [f"--qemu-opts={shlex.quote(each)}" for each in qemu]
    script = _foreign_script(kernel, shape.userland, arguments) if shape.userland else _script(arguments)
    (results / SCRIPT).write_text(script)
    return [*call, "--", f"sh {RESULTS}/{SCRIPT}"]


def _script(arguments: Sequence[str]) -> str:
    """Return what the guest's shell does."""
    folders = dict.fromkeys([sysconfig.get_path("stdlib"), sys.prefix, str(PROJECT)])
    path = dict.fromkeys([str(PROJECT), *(each for each in sys.path if os.path.isabs(each) and os.path.isdir(each))])
    return FAST_FILES.format(
        host=HOST,
        folders=shlex.join(folders),
        path=shlex.quote(os.pathsep.join(path)),
        python=shlex.quote(sys.executable),
        arguments=shlex.join(arguments),
    )


def _foreign_script(kernel: Kernel, own: Userland, arguments: Sequence[str]) -> str:
    """Return what the shell of a guest does that has programs of its own."""
    folders = [PROJECT, *_folders_of_tests(arguments)]
    for folder in folders:
        own.add_mount_point(folder)
    found = modules(kernel.path)
    return FOREIGN_FILES.format(
        host=HOST,
        root=shlex.quote(str(own.root)),
        folders=shlex.join(map(str, folders)),
        module=shlex.quote(str(own.module)),
        built=shlex.quote(str(userland.BUILT)),
        modules=shlex.join([str(found)] if found else []),
        project=shlex.quote(str(PROJECT)),
        python=userland.PYTHON,
        arguments=shlex.join(arguments),
    )


def _folders_of_tests(arguments: Sequence[str]) -> list[Path]:
    """Return the folders of the tests that are named by their paths, outside of the project."""
    named = [Path(argument.partition("::")[0]) for argument in arguments if argument.startswith("/")]
    folders = [path if path.is_dir() else path.parent for path in named if path.exists()]
    return [folder for folder in dict.fromkeys(folders) if PROJECT not in [folder, *folder.parents]]


def environment(scratch: Path) -> dict[str, str]:
    """Return the environment of virtme-ng: its temporary files are ours to remove, its helpers lie beside it."""
    path = [str(Path(program() or "vng").parent), os.environ.get("PATH", os.defpath), *SBIN]
    return {**os.environ, "PATH": os.pathsep.join(path), "TMPDIR": str(scratch)}
