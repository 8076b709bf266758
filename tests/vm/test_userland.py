# SPDX-License-Identifier: GPL-2.0-only
"""A guest of another architecture gets programs of its own, made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vm.test_bundle import read
from uffd_selftests import cli as command
from uffd_selftests.vm import bundle, qemu, session, userland


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "arm64", "--vm-accel", "kvm"], "--vm-accel kvm: a kernel for arm64 can only be emulated here"),
        (["--arch", "arm64"], "mmdebstrap failed: E: no such suite"),
        (["--arch", "x86_64"], "--arch x86_64: only kernels for riscv can be booted here"),
    ],
)
def test_foreign_usage_error(
    arguments: list[str], message: str, *, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What cannot be done for another architecture is said in one line, and nothing half made stays."""
    tools = tmp_path / "bin"
    tools.mkdir()
    answers = {
        "mmdebstrap": "echo 'I: working' >&2; echo 'E: no such suite' >&2; exit 1",
        qemu.ARCHITECTURES["arm64"].program: "echo 'QEMU emulator version 9.0.0'",
        qemu.ARCHITECTURES["x86_64"].program: "echo 'QEMU emulator version 9.0.0'",
        userland.TOOLCHAINS["arm64"].compiler: "exit 1",
    }
    for name, script in answers.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    for module in (qemu, session):
        monkeypatch.setattr(module, "native", lambda: "riscv")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    magic = bytes(0x38) + b"ARM\x64" if "arm64" in arguments else bytes(0x202) + b"HdrS" + bytes(0x1000)
    (tmp_path / "Image").write_bytes(magic)
    assert command.main(["--kernel", str(tmp_path / "Image"), *arguments]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"uffd-selftests: {message}"
    assert not list(tmp_path.glob("cache/uffd-selftests/making-*"))


def test_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made is kept until it would be made in another way."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []

    def make(draft: Path) -> None:
        (draft / "file").touch()

    first, again, other = (userland._once("root", [recipe], make, said.append) for recipe in ("a", "a", "b"))
    assert first == again
    assert first != other
    assert len(said) == 2
    assert (other / "file").exists()


def test_archive(tmp_path: Path) -> None:
    """A guest has what is needed of the root folder, and the suite with the native part of its architecture."""
    root = tmp_path / "root"
    for name in ("usr/bin/python3.99", "usr/lib/python3.99/abc.py", "usr/lib/python3.99/test/test_abc.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("pass\n")
    for name in ("usr/share/doc/python3/README", "usr/local/lib/python3.99/dist-packages/_cffi_backend.abi3.so"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")
    (root / "lib").symlink_to("usr/lib")
    module = tmp_path / "native.so"
    module.write_text("native")
    path = bundle.bundle(tmp_path / "cache", print, bundle.Foreign(root, module))
    entries = read(path.read_bytes())
    assert entries["/lib"].data == b"usr/lib"
    assert entries["/python"].data == b"/usr/bin/python3.99"
    assert entries["/usr/lib/python3.99/abc.py"].data == b"pass\n"
    assert entries["/usr/lib/python3.99/lib-dynload/_cffi_backend.abi3.so"].data == b"text"
    assert entries[str(bundle.NATIVE)].data == b"native"
    assert not [name for name in entries if "test_abc" in name or "README" in name]
    assert bundle.bundle(tmp_path / "cache", print, bundle.Foreign(root, module)) == path
    assert bundle.bundle(tmp_path / "cache", print) != path
