# SPDX-License-Identifier: GPL-2.0-only
"""What ``--kernel PATH`` can name: a kernel image, the tree it was built in, its Debian package, or that unpacked.

Headers: Documentation/arch/x86/boot.rst (bzImage), Documentation/arch/arm64/booting.rst (Image).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from uffd_selftests.vm import packages

if TYPE_CHECKING:
    from collections.abc import Iterable

IMAGES = {"x86_64": "arch/x86/boot/bzImage", "arm64": "arch/arm64/boot/Image"}
"""Where a build tree has its image, by architecture."""

PLACES = ("boot/vmlinu[xz]-*", "usr/lib/modules/*/vmlinuz", "lib/modules/*/vmlinuz", "vmlinuz")
"""Where an unpacked package has its image: until Linux 6.18, since then, and seen from the folder of its modules."""

HEADER = 0x20000
"""How much of an image is read: its header and the release that an x86 header points to."""

ELF = b"\x7fELF"
X86 = (0x202, b"HdrS")
ARM64 = ((0x38, b"ARM\x64"), (0, b"\x1f\x8b"), (4, b"zimg"))
"""Image; the same compressed with gzip; in an EFI application."""
BANNER = re.compile(rb"Linux version (\d[-+.~\w]*) ")
"""What every kernel says first, and where it is not compressed its image."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted."""

    image: Path
    name: str
    """Its name in reports and of its folder: the release, or the file's name where the image does not tell."""
    origin: Path
    """What the user named."""
    modules: Path | None = None
    """The folder lib/modules where its modules are, or its build tree."""
    release: str = ""


def cache() -> Path:
    """Return the folder where unpacked packages are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uffd-selftests"


def find(origin: str, arch: str) -> Kernel:
    """Return the kernel that a path names; raises ValueError with what is wrong with it."""
    path = Path(origin).absolute()
    try:
        if not origin:  # else that would be the current folder
            raise ValueError("--kernel: the path is empty")
        if path.is_dir():
            return _in_folder(path, arch)
        if path.is_fifo():  # who opens it may wait for ever
            raise ValueError(f"{origin} is a pipe: name a file")
        with path.open("rb") as file:
            start = file.read(HEADER)
        if start.startswith(packages.START):
            return replace(_in_folder(packages.unpacked(path, cache(), _packed), arch), origin=path)
    except FileNotFoundError:
        raise ValueError(f"{origin}: no such file") from None
    except OSError as error:
        raise ValueError(f"{origin}: {error.strerror}") from None
    name = _name(path, start, arch)
    return Kernel(path, name, path, modules(path), name)


def modules(image: Path) -> Path | None:
    """Return the nearest lib/modules above an image."""
    places = [parent / place for parent in image.parents for place in ("lib/modules", "usr/lib/modules")]
    return next((place for place in places if place.is_dir()), None)


def distinguish(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Give kernels of the same name different ones: with what the user named, then with a number."""
    return _numbered(_with_origin(list(kernels)))


def _with_origin(kernels: list[Kernel]) -> list[Kernel]:
    count = Counter(kernel.name for kernel in kernels)
    return [
        replace(kernel, name=f"{kernel.name}-{kernel.origin.name}") if count[kernel.name] > 1 else kernel
        for kernel in kernels
    ]


def _numbered(kernels: list[Kernel]) -> list[Kernel]:
    seen: Counter[str] = Counter()
    for index, kernel in enumerate(kernels):
        seen[kernel.name] += 1
        if seen[kernel.name] > 1:
            kernels[index] = replace(kernel, name=f"{kernel.name}-{seen[kernel.name]}")
    return kernels


def _in_folder(folder: Path, arch: str) -> Kernel:
    """Find the image in a build tree or in an unpacked package."""
    tree = folder / IMAGES[arch]
    packed = _packed(folder)
    if tree.exists():
        image = tree
    elif len(packed) == 1:
        image = packed[0]
    elif packed:
        names = ", ".join(str(each.relative_to(folder)) if each.name == "vmlinuz" else each.name for each in packed)
        raise ValueError(f"{folder} has several kernels: name one of {names}")
    else:
        raise ValueError(_no_image(folder, arch))
    if _is_beside_modules(image) and not (image.parent / "kernel").exists():
        wanted = f"linux-modules-{image.parent.name}_*.deb"
        raise ValueError(f"{folder}: its modules are missing: unpack {wanted} there, too")
    with image.open("rb") as file:
        name = _name(image, file.read(HEADER), arch)
    with contextlib.suppress(OSError):
        name = (folder / "include/config/kernel.release").read_text().strip() or name
    return Kernel(image, name, folder, folder if image == tree else modules(image), name)


def _packed(folder: Path) -> list[Path]:
    """Return the images in an unpacked package or a folder below lib/modules, of each release one."""
    found: dict[str, Path] = {}
    for image in (each for place in PLACES for each in sorted(folder.glob(place))):
        found.setdefault(_told(image), image)
    return list(found.values())


def _is_beside_modules(image: Path) -> bool:
    return image.name == "vmlinuz" and image.parent.parent.name == "modules"


def _told(image: Path) -> str:
    """Return the release that a path tells."""
    return image.parent.name if _is_beside_modules(image) else image.name.removeprefix("vmlinuz-")


def _no_image(folder: Path, arch: str) -> str:
    """Say what to do about a folder without an image."""
    releases = sorted(path.name for path in folder.glob("usr/lib/modules/*"))
    if len(releases) == 1:
        part = packages.part_with_image(releases[0])
        return f"{folder}: the kernel's image is missing: unpack {part}_*.deb there, too"
    return f"{folder} has neither {IMAGES[arch]} nor boot/vmlinuz-*: build it, or name an image"


def _name(path: Path, start: bytes, arch: str) -> str:
    """Return the release that an image tells, else its file's name; raises ValueError when it is no image."""
    if start.startswith(ELF):
        raise ValueError(f"{path} is an ELF file, not a boot image: name {IMAGES[arch]}")
    kinds = {"x86_64": _has(start, X86), "arm64": any(_has(start, magic) for magic in ARM64)}
    if not start:
        raise ValueError(f"{path} is empty")
    if not any(kinds.values()):
        raise ValueError(f"{path} is no kernel image, build tree or Debian package")
    if not kinds[arch]:
        other = next(name for name, matches in kinds.items() if matches)
        raise ValueError(f"{path} is an image for {other}: say --arch {other}")
    if arch == "x86_64":
        pointer = int.from_bytes(start[0x20E:0x210], "little")
        release = start[pointer + 0x200 :].partition(b"\0")[0].split(b" ")[0].decode("ascii", "replace")
        if pointer and release.isprintable() and "/" not in release:
            return release or _told(path)
    elif match := BANNER.search(path.read_bytes()):
        return match[1].decode()
    return _told(path)


def _has(start: bytes, magic: tuple[int, bytes]) -> bool:
    offset, value = magic
    return start[offset : offset + len(value)] == value
