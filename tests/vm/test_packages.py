# SPDX-License-Identifier: GPL-2.0-only
"""Debian packages that --kernel takes, alone and with those that belong to them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.vm.helpers import write_image
from uffd_selftests.vm import images

RELEASE = "6.99.0-test"
PARTS = {
    "image": ["usr/share/doc/empty"],
    "base": [f"usr/lib/modules/{RELEASE}/modules.order"],
    "binary": [f"usr/lib/modules/{RELEASE}/vmlinuz"],
    "modules": [f"usr/lib/modules/{RELEASE}/kernel/virtio.ko"],
}
"""Debian's packages of a kernel since Linux 6.19."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what is unpacked in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/uffd-selftests"


def write_package(folder: Path, name: str, *files: str, depends: str = "", version: str = "1") -> Path:
    """Build a Debian package with these files, which are kernels."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("no dpkg-deb: apt-get install dpkg")
    content = folder / f"content-{name}-{version}"
    for file in files:
        write_image(content / file)
    fields = [f"Package: {name}", f"Version: {version}", "Architecture: all", "Maintainer: me <me@x>"]
    (content / "DEBIAN").mkdir(parents=True)
    (content / "DEBIAN/control").write_text(
        "\n".join([*fields, *([f"Depends: {depends}"] if depends else []), "Description: none", ""])
    )
    package = folder / f"{name}_{version}_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(content), str(package)], check=True, capture_output=True)
    shutil.rmtree(content)
    return package


def write_parts(folder: Path, *parts: str, release: str = RELEASE, version: str = "1") -> dict[str, Path]:
    """Build some of the packages of a kernel."""
    return {part: write_package(folder, f"linux-{part}-{release}", *PARTS[part], version=version) for part in parts}


def test_package(tmp_path: Path, cache: Path) -> None:
    """A Debian package is unpacked once, beside its modules."""
    package = write_package(tmp_path, "linux", f"boot/vmlinuz-{RELEASE}", f"lib/modules/{RELEASE}/modules.order")
    kernel = images.find(str(package), "x86_64")
    assert (kernel.name, kernel.origin) == (RELEASE, package)
    root = kernel.image.parent.parent
    assert kernel.modules == root / "lib/modules"
    assert (root / f"lib/modules/{RELEASE}/modules.order").exists()
    (root / "mark").touch()
    assert images.find(str(package), "x86_64") == kernel
    assert sorted(path.name for path in cache.iterdir()) == [root.name]
    assert (root / "mark").exists()


def test_package_without_kernel(tmp_path: Path, cache: Path) -> None:
    """Headers or debugging symbols are the wrong package, and nothing of them stays."""
    for name in ("linux-headers-6.99", f"linux-image-{RELEASE}-dbg"):
        with pytest.raises(ValueError, match="has neither boot/vmlinuz-.* name the linux-image package"):
            images.find(str(write_package(tmp_path, name, "usr/src/Makefile")), "x86_64")
    assert not list(cache.iterdir())


def test_metapackage(tmp_path: Path) -> None:
    """A package that only depends on a kernel's leads to that."""
    package = write_package(tmp_path, "linux-image-amd64", depends=f"linux-base, linux-image-{RELEASE} (= 1)")
    with pytest.raises(ValueError, match=f": name linux-image-{RELEASE}$"):
        images.find(str(package), "x86_64")


@pytest.mark.parametrize("named", PARTS)
def test_parts(named: str, tmp_path: Path) -> None:
    """Whichever package of a kernel is named, those beside it complete it."""
    packages = write_parts(tmp_path, *PARTS)
    write_parts(tmp_path, "modules", "binary", release="6.98.0-test")
    kernel = images.find(str(packages[named]), "x86_64")
    assert (kernel.name, kernel.origin) == (RELEASE, packages[named])
    assert kernel.modules == kernel.image.parent.parent
    assert {images.find(str(package), "x86_64").image for package in packages.values()} == {kernel.image}
    present = sorted(str(path.relative_to(kernel.modules)) for path in kernel.modules.rglob("*") if path.is_file())
    assert present == [f"{RELEASE}/{name}" for name in ("kernel/virtio.ko", "modules.order", "vmlinuz")]


def test_package_of_lists_is_not_needed(tmp_path: Path) -> None:
    """Without linux-base the modules are found by their names."""
    assert images.find(str(write_parts(tmp_path, "binary", "modules")["binary"]), "x86_64").name == RELEASE


@pytest.mark.parametrize(
    ("there", "named", "missing"),
    [
        (["image"], "image", "image is in another package: put linux-binary"),
        (["base", "modules"], "modules", "image is in another package: put linux-binary"),
        (["image", "binary", "base"], "binary", "modules are missing: put linux-modules"),
        (["image", "binary", "base"], "image", "modules are missing: put linux-modules"),
    ],
)
def test_missing_part(there: list[str], named: str, missing: str, tmp_path: Path, cache: Path) -> None:
    """One line says which package is missing; nothing half unpacked is kept, and it works as soon as that is there."""
    packages = write_parts(tmp_path, *there)
    with pytest.raises(ValueError, match=rf"^{packages[named]}: [^\n]*{missing}-{RELEASE}_\*.deb beside it$"):
        images.find(str(packages[named]), "x86_64")
    assert not list(cache.iterdir())
    write_parts(tmp_path, *({"binary", "modules"} - {*there}))
    assert images.find(str(packages[named]), "x86_64").name == RELEASE


def test_missing_image_of_old(tmp_path: Path) -> None:
    """Until Linux 6.18 the image is in linux-image."""
    package = write_package(tmp_path, "linux-base-6.18.15+deb13-amd64")
    with pytest.raises(ValueError, match=r"put linux-image-6.18.15\+deb13-amd64_\*.deb beside it$"):
        images.find(str(package), "x86_64")


def test_version_of_parts(tmp_path: Path) -> None:
    """Of two versions of a package beside it, the one that is as old as the named one belongs to it."""
    first = write_parts(tmp_path, "binary", "modules")["binary"]
    write_package(tmp_path, f"linux-modules-{RELEASE}", f"usr/lib/modules/{RELEASE}/kernel/other.ko", version="2")
    kernel = images.find(str(first), "x86_64")
    assert [path.name for path in (kernel.image.parent / "kernel").iterdir()] == ["virtio.ko"]
