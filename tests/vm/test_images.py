# SPDX-License-Identifier: GPL-2.0-only
"""What --kernel takes, and what it says of everything else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vm.helpers import write_image
from uffd_selftests import cli as command
from uffd_selftests.vm import images

if TYPE_CHECKING:
    from collections.abc import Callable


def test_image(tmp_path: Path) -> None:
    """An image tells its release."""
    image = write_image(tmp_path / "vmlinuz-of-mine")
    kernel = images.find(str(image), "x86_64")
    assert (kernel.image, kernel.origin, kernel.name, kernel.release) == (image, image, "6.99.0-test", "6.99.0-test")


def test_arm64_image(tmp_path: Path) -> None:
    """The release of an arm64 image is where its first message is; of a compressed one the file's name has to do."""
    image, packed = tmp_path / "Image", tmp_path / "vmlinuz-6.99.0-16k"
    image.write_bytes(bytes(0x38) + b"ARM\x64" + bytes(0x30000) + b"Linux version 6.99.0-rc1+ (someone@somewhere)")
    packed.write_bytes(b"\x1f\x8b rubbish")
    assert [images.find(str(path), "arm64").name for path in (image, packed)] == ["6.99.0-rc1+", "6.99.0-16k"]


def test_build_tree(tmp_path: Path) -> None:
    """A build tree is booted as such, for its modules, and named by the release it was built as."""
    image = write_image(tmp_path / "arch/x86/boot/bzImage", "6.99.0")
    (tmp_path / "include/config").mkdir(parents=True)
    (tmp_path / "include/config/kernel.release").write_text("6.99.0-rc1+\n")
    release = "6.99.0-rc1+"
    assert images.find(str(tmp_path), "x86_64") == images.Kernel(image, release, tmp_path, tmp_path, release)


def test_folder_of_modules(tmp_path: Path) -> None:
    """Since Linux 6.19 Debian's packages have the image beside its modules: either folder is named."""
    place = tmp_path / "usr/lib/modules/6.99.0-test"
    image = write_image(place / "vmlinuz")
    with pytest.raises(ValueError, match=r"modules are missing: unpack linux-modules-6.99.0-test_\*.deb there, too$"):
        images.find(str(tmp_path), "x86_64")
    (place / "kernel").mkdir()
    for named in (tmp_path, place):
        kernel = images.find(str(named), "x86_64")
        assert (kernel.image, kernel.modules, kernel.release) == (image, place.parent, "6.99.0-test")
    again = write_image(tmp_path / "boot/vmlinuz-6.99.0-test")
    assert images.find(str(tmp_path), "x86_64").image == again
    write_image(tmp_path / "usr/lib/modules/6.98.0-test/vmlinuz")
    with pytest.raises(ValueError, match="name one of vmlinuz-6.99.0-test, usr/lib/modules/6.98.0-test/vmlinuz$"):
        images.find(str(tmp_path), "x86_64")


def test_arm64_folder_of_modules(tmp_path: Path) -> None:
    """An image that does not tell its release is named by its folder."""
    place = tmp_path / "usr/lib/modules/6.99.0-16k"
    (place / "kernel").mkdir(parents=True)
    (place / "vmlinuz").write_bytes(b"MZ\0\0zimg")
    assert images.find(str(tmp_path), "arm64").release == "6.99.0-16k"


def test_folder_without_image(tmp_path: Path) -> None:
    """A folder with a kernel's modules alone says which package has the image."""
    (tmp_path / "usr/lib/modules/6.99.0-test/kernel").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"image is missing: unpack linux-binary-6.99.0-test_\*.deb there, too$"):
        images.find(str(tmp_path), "x86_64")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (os.mkfifo, "is a pipe: name a file"),
        (lambda path: path.write_text("#!/bin/sh\n"), "is no kernel image, build tree or Debian package"),
        (lambda path: path.write_bytes(b"\x7fELF" + bytes(600)), "is an ELF file, not a boot image: name arch/"),
        (lambda path: path.write_bytes(bytes(0x38) + b"ARM\x64"), "is an image for arm64: say --arch arm64"),
        (lambda path: path.mkdir(), "has neither arch/x86/boot/bzImage nor boot/vmlinuz-*: build it, or name an image"),
        (lambda path: path.write_bytes(b"!<arch>\nrubbish"), "cannot be unpacked: dpkg-deb: error: "),
        (
            lambda path: [write_image(path / "boot" / name) for name in ("vmlinuz-1", "vmlinuz-2")],
            "has several kernels: name one of vmlinuz-1, vmlinuz-2",
        ),
    ],
)
def test_no_kernel(
    make: Callable[[Path], object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What is no kernel is said in one line, before anything is booted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "thing"
    make(path)
    assert command.main(["--kernel", str(path)]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"uffd-selftests: {path}")
    assert message in err


def test_empty_path(capfd: pytest.CaptureFixture[str]) -> None:
    """An empty path, of a variable that is not set, is not the current folder."""
    assert command.main(["--kernel", ""]) == 2
    assert capfd.readouterr() == ("", "uffd-selftests: --kernel: the path is empty\n")


def test_names() -> None:
    """Kernels of one release are told apart with what the user named, then by number."""
    names = [("6.1", "a/vmlinuz-6.1"), ("6.12", "tree"), ("6.12", "vmlinuz-6.12-debug"), ("6.12", "other/tree")]
    kernels = [images.Kernel(Path(path), name, Path(path)) for name, path in names]
    assert [kernel.name for kernel in images.distinguish(kernels)] == [
        *("6.1", "6.12-tree", "6.12-vmlinuz-6.12-debug", "6.12-tree-2"),
    ]
