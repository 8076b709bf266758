# SPDX-License-Identifier: GPL-2.0-only
"""A guest of another architecture gets programs of its own, made once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.vm.helpers import PLAN
from uffd_selftests import cli as command
from uffd_selftests.vm import session, userland, vng


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "arm64", "--vm-accel", "kvm"], "--vm-accel kvm: a kernel for arm64 can only be emulated here"),
        (["--arch", "arm64"], "mmdebstrap failed: E: no such suite"),
        (["--arch", "x86_64"], "--arch x86_64: only kernels for riscv can be booted here"),
    ],
)
def test_foreign_usage_error(
    arguments: list[str], message: str, *, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What cannot be done for another architecture is said in one line, and nothing half made stays."""
    toolchain = userland.TOOLCHAINS["arm64"]
    for name in (vng.QEMU["arm64"][0], toolchain.compiler, "strings"):
        shutil.copy(tools / "vng", tools / name)
    (tools / "mmdebstrap").write_text("#!/bin/sh\necho 'I: working' >&2; echo 'E: no such suite' >&2; exit 1\n")
    (tools / "mmdebstrap").chmod(0o755)
    monkeypatch.setattr(vng, "native", lambda: "riscv")
    monkeypatch.setattr(session, "native", lambda: "riscv")
    monkeypatch.setattr(session, "_plan", lambda *_: session.Plan(PLAN, []))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    magic = bytes(0x38) + b"ARM\x64" if "arm64" in arguments else bytes(0x202) + b"HdrS" + bytes(0x1000)
    (tmp_path / "Image").write_bytes(magic)
    assert command.main(["--kernel", str(tmp_path / "Image"), *arguments]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"uffd-selftests: {message}"
    assert not list(tmp_path.glob("cache/uffd-selftests/*"))


def test_strange_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that virtme-ng's shell would take apart is refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/a b")
    with pytest.raises(ValueError, match="cannot take a root folder in /a b/uffd-selftests: name another in XDG_"):
        userland.prepare("arm64", print)


def test_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made is kept until it would be made in another way."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []

    def make(draft: Path) -> None:
        (draft / "file").touch()

    first, again, other = (userland._once("root", [recipe], make, said.append) for recipe in ("a", "a", "b"))
    assert first == again
    assert sorted(tmp_path.glob("uffd-selftests/*")) == sorted([first, other])
    assert said == [f"making {folder} (once)" for folder in (first, other)]
    assert (other / "file").exists()
