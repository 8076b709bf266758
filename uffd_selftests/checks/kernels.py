# SPDX-License-Identifier: GPL-2.0-only
"""A step of ``--check``: boot kernels and run upstream's cases in them.

Which: those that UFFD_TEST_KERNELS names (shell patterns between colons, ../shared/kernels/vmlinuz* by default), and
Debian's 6.1 kernel, from its package, which is kept in the cache. Whatever cannot be had here is said and left out.
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
PART = "unit and not test_wp_fork[hugetlb-private]"
"""What -k chooses: upstream's cases, without the one that fails on Linux 6.1: a fork leaves a child's private huge
pages write-protected there."""
DOWNLOAD_SECONDS = 120
RUN_SECONDS = 600
"""Upstream's cases take half a minute a kernel on an idle machine without KVM."""


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
    """Return the package of Debian's kernel, downloaded once; raises LeftOut."""
    matches = [match for line in _apt("apt-cache", "pkgnames", "linux-image-6.1.") if (match := STOCK.fullmatch(line))]
    if not matches:
        raise LeftOut("apt knows no package of Debian's 6.1 kernel: apt-get update")
    name = max(matches, key=lambda match: int(match[1]))[0]
    folder = images.cache() / "debian"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LeftOut(f"{folder}: {error.strerror}") from None
    if not list(folder.glob(f"{name}_*.deb")):
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            _apt("apt-get", "download", name, folder=Path(draft))
            package = next(Path(draft).glob("*.deb"))
            package.rename(folder / package.name)
    return next(folder.glob(f"{name}_*.deb"))


def _apt(*command: str, folder: Path | None = None) -> list[str]:
    """Run a program of apt and return its lines; raises LeftOut when it fails."""
    try:
        result = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=DOWNLOAD_SECONDS,
        )  # fmt: skip
    except FileNotFoundError:
        raise LeftOut(f"no {command[0]} here") from None
    except subprocess.TimeoutExpired:
        raise LeftOut(f"{' '.join(command)} took longer than {DOWNLOAD_SECONDS} seconds") from None
    if result.returncode:
        raise LeftOut(f"{' '.join(command)} failed: {result.stderr.strip().rpartition(chr(10))[2]}")
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
    for source in (given, lambda: [stock()]):
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
    command = [sys.executable, "-m", "uffd_selftests", "-k", PART, *(f"--kernel={path}" for path in found)]
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
