# SPDX-License-Identifier: GPL-2.0-only
"""The step of --check that boots kernels finds some, or says why not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from uffd_selftests.checks import kernels as check
from uffd_selftests.vm import qemu


def write_apt(folder: Path, download: str) -> None:
    """Write programs that stand for apt's; a shell command downloads the package "$2"."""
    names = "linux-image-6.1.0-9-amd64\nlinux-image-6.1.0-56-amd64\nlinux-image-6.1.0-57-cloud-amd64\n"
    for name, script in {"apt-cache": f"printf '{names}'", "apt-get": download}.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)


def test_stock_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest of Debian's 6.1 kernels is downloaded once; a download that fails leaves nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    write_apt(tmp_path, 'touch "$2_6.1.deb"; echo "E: no space" >&2; exit 100')
    with pytest.raises(check.LeftOut, match="apt-get download linux-image-6.1.0-56-amd64 failed: E: no space"):
        check.stock()
    write_apt(tmp_path, 'touch "$2_6.1.deb"')
    package = check.stock()
    assert package.name == "linux-image-6.1.0-56-amd64_6.1.deb"
    write_apt(tmp_path, "exit 1")
    assert check.stock() == package


def test_given_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable names kernels by patterns; none is a reason to leave the step out."""
    for name in ("a1", "a2", "b"):
        (tmp_path / name).touch()
    monkeypatch.setenv(check.VARIABLE, f"{tmp_path}/a*:{tmp_path}/b")
    assert [path.name for path in check.given()] == ["a1", "a2", "b"]
    monkeypatch.setenv(check.VARIABLE, f"{tmp_path}/c*")
    with pytest.raises(check.LeftOut, match="no kernel at .*: name some in UFFD_TEST_KERNELS"):
        check.given()


def test_nothing_to_boot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that can boot nothing says why, and the step does not fail."""
    monkeypatch.setattr(qemu, "missing", lambda _arch: "missing for --kernel: apt-get install qemu-system-x86")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert check.main() == 0
    assert capsys.readouterr().out == "left out: missing for --kernel: apt-get install qemu-system-x86\n"
