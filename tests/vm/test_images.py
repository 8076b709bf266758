# SPDX-License-Identifier: GPL-2.0-only
"""What --kernel takes, and what it says of everything else."""

from __future__ import annotations

import os
import shutil
import subprocess
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


def write_package(folder: Path, *files: str) -> Path:
    """Build a Debian package with these files, which are kernels if they are below boot."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("no dpkg-deb: apt-get install dpkg")
    control = folder / "content/DEBIAN/control"
    for name in files:
        write_image(folder / "content" / name)
    control.parent.mkdir(parents=True)
    control.write_text("Package: linux\nVersion: 1\nArchitecture: all\nMaintainer: me <me@x>\nDescription: none\n")
    subprocess.run(["dpkg-deb", "-b", "content", "linux.deb"], cwd=folder, check=True, capture_output=True)
    return folder / "linux.deb"


def test_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Debian package is unpacked once, beside its modules."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package = write_package(tmp_path, "boot/vmlinuz-6.99.0-test", "lib/modules/6.99.0-test/modules.order")
    kernel = images.find(str(package), "x86_64")
    assert (kernel.name, kernel.origin) == ("6.99.0-test", package)
    root = kernel.image.parent.parent
    assert kernel.modules == root / "lib/modules"
    assert (root / "lib/modules/6.99.0-test/modules.order").exists()
    (root / "mark").touch()
    assert images.find(str(package), "x86_64") == kernel
    assert sorted(path.name for path in (tmp_path / "cache/uffd-selftests").iterdir()) == [root.name]
    assert (root / "mark").exists()


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


def test_package_without_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers or debug symbols are the wrong package, and nothing of them stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="has no boot/vmlinuz-.: name the linux-image package"):
        images.find(str(write_package(tmp_path, "usr/src/linux-headers-6.99/Makefile")), "x86_64")
    assert not list((tmp_path / "cache/uffd-selftests").iterdir())


def test_names() -> None:
    """Kernels of one release are told apart with what the user named, then by number."""
    names = [("6.1", "a/vmlinuz-6.1"), ("6.12", "tree"), ("6.12", "vmlinuz-6.12-debug"), ("6.12", "other/tree")]
    kernels = [images.Kernel(Path(path), name, Path(path)) for name, path in names]
    assert [kernel.name for kernel in images.distinguish(kernels)] == [
        *("6.1", "6.12-tree", "6.12-vmlinuz-6.12-debug", "6.12-tree-2"),
    ]
