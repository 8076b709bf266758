# SPDX-License-Identifier: GPL-2.0-only
"""How virtme-ng is called, and what is said when it is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from uffd_selftests.vm import images, userland, vng


def test_missing_tools(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names all packages that are missing."""
    monkeypatch.setattr(vng, "SBIN", ())
    monkeypatch.setattr(vng, "native", lambda: "x86_64")
    monkeypatch.setenv("PATH", str(tools))
    assert vng.missing("x86_64") is None
    packages = "qemu-system-arm mmdebstrap gcc-aarch64-linux-gnu binutils"
    assert vng.missing("arm64") == f"missing for --kernel: apt-get install {packages}"
    for name in ("qemu-system-x86_64", "udevadm"):
        (tools / name).unlink()
    assert vng.missing("x86_64") == "missing for --kernel: apt-get install qemu-system-x86 udev"
    (tools / "vng").unlink()
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    assert vng.missing("x86_64") == "virtme-ng is missing: pip install 'uffd-selftests[vm]'"


def test_command(tools: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options reach virtme-ng, quoted for its shell; emulation has a clock that does not run away."""
    monkeypatch.setenv("PATH", str(tools))
    kernel = images.Kernel(tmp_path / "a tree", "6.99", tmp_path / "a tree")
    shape = vng.Shape(memory="2G", cpus=2, append=("quiet",), qemu=("-cpu", "max,-la57"))
    results = tmp_path / "out put"
    results.mkdir()
    call = vng.command(kernel, shape, vng.TCG, results, ["-k", "move and anon"])
    assert call[call.index("--run") + 1] == f"'{tmp_path}/a tree'"
    assert call[call.index("--memory") + 1 :][:3] == ["2G", "--cpus", "2"]
    assert call[call.index("--rwdir") + 1] == f"'{vng.RESULTS}={tmp_path}/out put'"
    assert call[call.index("--append") + 1].endswith(" tsc=unstable clocksource=hpet quiet")
    assert "--disable-kvm" in call
    assert call[-4:-2] == ["--qemu-opts=-cpu", "--qemu-opts=max,-la57"]
    assert call[-1] == f"sh {vng.RESULTS}/guest.sh"
    assert (results / "guest.sh").read_text().endswith("-S -m uffd_selftests.vm.guest -k 'move and anon'\n")
    assert call[call.index("--rodir") + 1].endswith(f"/udev/rules.d={vng.UDEV}")
    assert list(vng.UDEV.glob("*.rules"))
    assert not {"--disable-kvm", "tsc=unstable"} & set(vng.command(kernel, shape, vng.KVM, tmp_path, []))


def test_foreign_command(tools: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A guest of another architecture has programs of its own; of the host it gets suite, modules and named tests."""
    monkeypatch.setenv("PATH", str(tools))
    image, tests = tmp_path / "boot/vmlinuz-6.99", tmp_path / "my tests"
    (tmp_path / "lib/modules").mkdir(parents=True)
    tests.mkdir()
    (tests / "test_mine.py").touch()
    own = userland.Userland(tmp_path / "root", tmp_path / "native.so")
    shape = vng.Shape("arm64", userland=own)
    kernel = images.Kernel(image, "6.99", image)
    call = vng.command(kernel, shape, vng.TCG, tmp_path, ["-k", "move", "--", f"{tests}/test_mine.py::test_a"])
    assert call[call.index("--arch") + 1 :][:5] == ["arm64", "--root", f"{own.root}", "--busybox", f"{own.busybox}"]
    assert "--qemu-opts=cortex-a76" in call
    assert "tsc=unstable" not in call[call.index("--append") + 1]
    script = (tmp_path / "guest.sh").read_text()
    assert f"for folder in {vng.PROJECT} '{tests}'; do" in script
    assert f'mount --bind "/run/uffd-host"{tmp_path}/native.so {userland.BUILT}' in script
    assert f"for folder in {tmp_path}/lib/modules; do" in script
    assert script.endswith(f"/usr/bin/python3 -m uffd_selftests.vm.guest -k move -- '{tests}/test_mine.py::test_a'\n")
    for folder in (vng.PROJECT, tests):
        assert (own.root / folder.relative_to("/")).is_dir()
