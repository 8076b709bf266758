# SPDX-License-Identifier: GPL-2.0-only
"""A step of ``--check``: boot kernels and run upstream's cases, those of read-write protection and some of KVM in them.

Which: those that UFFD_TEST_KERNELS names (shell patterns between colons, ../shared/kernels/vmlinuz* by default), and
Debian's 6.1 and 7.3 kernels, from their packages, which are kept in the cache. Whatever cannot be had here is said and
left out.
"""

from __future__ import annotations

import glob
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from uffd_selftests.vm import images, qemu

ROOT = Path(__file__).resolve().parent.parent.parent
VARIABLE = "UFFD_TEST_KERNELS"
DEFAULT = "../shared/kernels/vmlinuz*"

STOCK = re.compile(r"linux-image-6\.1\.\d+-(\d+)-amd64")
BACKPORTS = "trixie-backports"
"""The suite of Debian that has the kernels whose packages come in three: the image, its modules, what both share."""
NEWEST = re.compile(r"linux-binary-(7\.3\.(\d+)\+deb\d+-amd64)")
SIBLINGS = ("linux-binary", "linux-modules", "linux-base")

PART = (
    "(unit and not test_wp_fork[hugetlb-private]) or rwp or rwprotect or set_mode or accessed or "
    "(kvm and (counting or async_told)) or test_placement or test_charges or test_handed_on"
)
"""What -k chooses: upstream's cases, without the one that fails on Linux 6.1: a fork leaves a child's private huge
pages write-protected there; read-write protection, which is skipped before 7.3; some of KVM's; those of memory nodes,
cgroups and handles in other hands."""
NODES = "--vm-append=numa=fake=2"
"""Makes two memory nodes of a machine's memory, where the kernel has CONFIG_NUMA_EMU."""
DOWNLOAD_SECONDS = 120
RUN_SECONDS = 900
"""These cases take some minutes a kernel on an idle machine without KVM."""


class LeftOut(Exception):
    """Why something cannot be had here."""


def given() -> list[Path]:
    """Return the kernels that are named or lie where some are expected; raises LeftOut when there are none."""
    patterns = os.environ.get(VARIABLE, DEFAULT)
    paths = [sorted(glob.glob(str(ROOT / pattern))) for pattern in patterns.split(":") if pattern]
    found = [Path(path) for some in paths for path in some]
    if not found:
        raise LeftOut(f"no kernel at {patterns}: name some in {VARIABLE}")
    return found


def stock() -> Path:
    """Return the package of Debian's 6.1 kernel, downloaded once; raises LeftOut."""
    matches = [match for line in _apt("apt-cache", "pkgnames", "linux-image-6.1.") if (match := STOCK.fullmatch(line))]
    if not matches:
        raise LeftOut("apt knows no package of Debian's 6.1 kernel: apt-get update")
    name = max(matches, key=lambda match: int(match[1]))[0]
    folder = _kept()
    if not list(folder.glob(f"{name}_*.deb")):
        _download(folder, "apt-get", "download", name)
    return next(folder.glob(f"{name}_*.deb"))


def newest() -> Path:
    """Return a package of Debian's 7.3 kernel, downloaded once with its siblings; raises LeftOut."""
    folder = _kept()
    if kept := sorted(folder.glob("linux-binary-7.3.*_*.deb")):
        return kept[-1]
    with tempfile.TemporaryDirectory(dir=folder) as state:
        # apt as it is set up here, but for a suite of its own; the machine's own lists stay as they are.
        sources = Path(state) / "sources.list"
        sources.write_text(f"deb {_mirror()} {BACKPORTS} main\n")
        places = {"Etc::SourceList": sources, "Etc::SourceParts": "/dev/null"}
        places |= {"State::Lists": f"{state}/lists", "Cache": f"{state}/cache"}
        (Path(state) / "lists/partial").mkdir(parents=True)
        (Path(state) / "cache/archives/partial").mkdir(parents=True)
        own = [f"-oDir::{name}={place}" for name, place in places.items()]
        _apt("apt-get", *own, "update")
        names = _apt("apt-cache", *own, "pkgnames", "linux-binary-7.3.")
        matches = [match for line in names if (match := NEWEST.fullmatch(line))]
        if not matches:
            raise LeftOut(f"{BACKPORTS} has no package of Debian's 7.3 kernel")
        release = max(matches, key=lambda match: int(match[2]))[1]
        _download(folder, "apt-get", *own, "download", *(f"{name}-{release}" for name in SIBLINGS))
    return next(folder.glob(f"linux-binary-{release}_*.deb"))


def _mirror() -> str:
    """Return from where this machine has Debian's packages."""
    for line in _apt("apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)"):
        origin, codename, address = line.split()
        if origin == "Debian" and "-" not in codename:
            return address
    raise LeftOut("apt knows no mirror of Debian's packages: apt-get update")


def _kept() -> Path:
    """Return the folder where packages are kept; raises LeftOut."""
    folder = images.cache() / "debian"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LeftOut(f"{folder}: {error.strerror}") from None
    return folder


def _download(folder: Path, *command: str) -> None:
    """Have apt download packages into the folder, all or none of them; raises LeftOut."""
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        _apt(*command, folder=Path(draft))
        for package in Path(draft).glob("*.deb"):
            package.rename(folder / package.name)


def _apt(*command: str, folder: Path | None = None) -> list[str]:
    """Run a program of apt and return its lines; raises LeftOut when it fails."""
    told = " ".join(word for word in command if not word.startswith("-o"))
    try:
        result = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=DOWNLOAD_SECONDS,
        )  # fmt: skip
    except FileNotFoundError:
        raise LeftOut(f"no {command[0]} here") from None
    except subprocess.TimeoutExpired:
        raise LeftOut(f"{told} took longer than {DOWNLOAD_SECONDS} seconds") from None
    if result.returncode:
        raise LeftOut(f"{told} failed: {result.stderr.strip().rpartition(chr(10))[2]}")
    return result.stdout.splitlines()


def kernels() -> list[Path]:
    """Return the kernels to boot, and say what is left out."""
    if platform.machine() != "x86_64":
        print(f"left out: the kernels to boot are for x86_64, and this is {platform.machine()}")
        return []
    if lacking := qemu.missing("x86_64"):
        print(f"left out: {lacking}")
        return []
    found: list[Path] = []
    for source in (given, lambda: [stock()], lambda: [newest()]):
        try:
            found += source()
        except LeftOut as reason:
            print(f"left out: {reason}")
    return found


def main() -> int:
    """Boot what is there; returns 1 when a kernel or a case failed."""
    found = kernels()
    if not found:
        return 0
    # Not two at once: the deadlines are for machines that have a processor of their own.
    command = [sys.executable, "-m", "uffd_selftests", NODES, "-k", PART, *(f"--kernel={path}" for path in found)]
    sys.stdout.flush()
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)
    try:
        return process.wait(RUN_SECONDS * len(found))
    except subprocess.TimeoutExpired:
        print(f"not done after {RUN_SECONDS * len(found)} seconds", file=sys.stderr)
        return 1
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
