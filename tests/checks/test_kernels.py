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


def test_newest_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 7.3 kernel comes with its siblings from a suite of its own, once; without a mirror it is left out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    log = tmp_path / "log"
    write_apt(tmp_path, f'echo "$*" >>{log}; echo "Debian bookworm-updates http://other/"')
    with pytest.raises(check.LeftOut, match="no mirror"):
        check.newest()
    write_apt(
        tmp_path,
        f"""
        echo "$*" >>{log}
        case $* in
            *indextargets*) echo "Debian bookworm http://mirror/" ;;
            *download*) touch linux-binary-7.3.11+deb13-amd64_1.deb linux-modules-7.3.11+deb13-amd64_1.deb ;;
        esac""",
    )
    names = "linux-binary-7.3.4+deb13-amd64\nlinux-binary-7.3.11+deb13-amd64\nlinux-binary-7.3.12+deb13-cloud-amd64"
    (tmp_path / "apt-cache").write_text(f"#!/bin/sh\nprintf '{names}'\n")
    package = check.newest()
    assert package.name == "linux-binary-7.3.11+deb13-amd64_1.deb"
    assert package.with_name("linux-modules-7.3.11+deb13-amd64_1.deb").exists()
    last = log.read_text().splitlines()[-1]
    wanted = "download linux-binary-7.3.11+deb13-amd64 linux-modules-7.3.11+deb13-amd64 linux-base-7.3.11+deb13-amd64"
    assert last.endswith(wanted)
    assert "-oDir::Etc::SourceParts=/dev/null" in last
    write_apt(tmp_path, "exit 1")
    assert check.newest() == package


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
