# SPDX-License-Identifier: GPL-2.0-only
"""Debian packages of a kernel: which of them belong together, and the folder that they make unpacked.

Until Linux 6.18 linux-image-RELEASE has the image and the modules. Since 6.19 it is empty: the image is in
linux-binary-RELEASE, the modules are in linux-modules-RELEASE, their lists in linux-base-RELEASE. Ubuntu has
linux-image-RELEASE and linux-modules-RELEASE.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

START = b"!<arch>\n"
"""How a package's file begins."""

PART = re.compile(r"linux-(image-unsigned|image|binary|modules-extra|modules|base)-(\d.*?)(-unsigned)?")
"""A package of a kernel: what it has, the kernel's release."""
OTHER = ("-dbg", "-dbgsym")
"""How packages end that have debugging symbols only."""
SPLIT = (6, 19)
"""Since when the image and its modules are in packages of their own."""


def unpacked(package: Path, cache: Path, find_image: Callable[[Path], object]) -> Path:
    """Unpack a package, and those of the same kernel in its folder, into the cache, once, and return the folder.

    find_image returns the images in a folder. Raises ValueError when there is none, with what to do.
    """
    if not shutil.which("dpkg-deb"):
        raise ValueError(f"{package} cannot be unpacked: apt-get install dpkg")
    name = _call(package, "-f", str(package), "Package")
    part = PART.fullmatch(name)
    release = part[2] if part and not part[2].endswith(OTHER) else ""
    packages = [package, *_siblings(package, release)] if release else [package]
    stamps = sorted(f"{each} {each.stat().st_size} {each.stat().st_mtime_ns}" for each in packages)
    key = hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:12]
    folder = cache / f"{f'linux-{release}' if release else package.stem}-{key}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="unpacking-") as draft:
        root = cache / draft / "root"
        for each in packages:
            _call(each, "-x", str(each), str(root))
        if not find_image(root):
            raise ValueError(_no_image(package, release))
        if release and _is_split(release) and not _has_modules(root):
            raise ValueError(f"{package}: its modules are missing: put linux-modules-{release}_*.deb beside it")
        with contextlib.suppress(FileExistsError, OSError):  # somebody else may have been faster
            root.rename(folder)
    return folder


def part_with_image(release: str) -> str:
    """Return the name of the package that has a kernel's image."""
    return f"linux-{'binary' if _is_split(release) else 'image'}-{release}"


def _siblings(package: Path, release: str) -> list[Path]:
    """Return the other packages of a kernel in a package's folder, of each name one, if possible of the same version.

    Among two of one part, the signed one and the one that is not, both are taken: they have the same files.
    """
    version = package.name.partition("_")[2]
    found: dict[str, Path] = {}
    for path in sorted(package.parent.glob("linux-*.deb")):
        name, _, rest = path.name.partition("_")
        part = PART.fullmatch(name)
        if part and part[2] == release and (name not in found or rest == version):
            found[name] = path
    return [path for name, path in found.items() if name != package.name.partition("_")[0]]


def _no_image(package: Path, release: str) -> str:
    """Say what to do about a package without an image."""
    if release:
        return f"{package}: the kernel's image is in another package: put {part_with_image(release)}_*.deb beside it"
    needed = re.findall(r"linux-(?:image|binary)-\d[^\s,]*", _call(package, "-f", str(package), "Depends"))
    wanted = needed[0] if needed else "the linux-image package, since 6.19 linux-binary with linux-modules beside it"
    return f"{package} has neither boot/vmlinuz-* nor usr/lib/modules/*/vmlinuz: name {wanted}"


def _is_split(release: str) -> bool:
    return tuple(map(int, re.findall(r"\d+", release)[:2])) >= SPLIT


def _has_modules(root: Path) -> bool:
    return any(any(root.glob(f"{place}/*/kernel")) for place in ("lib/modules", "usr/lib/modules"))


def _call(package: Path, *arguments: str) -> str:
    """Call dpkg-deb; raises ValueError with what it says."""
    call = ["dpkg-deb", *arguments]
    result = subprocess.run(call, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if result.returncode:
        raise ValueError(f"{package} cannot be unpacked: {result.stderr.strip().rpartition(chr(10))[2]}")
    return result.stdout.strip()
