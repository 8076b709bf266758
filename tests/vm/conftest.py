# SPDX-License-Identifier: GPL-2.0-only
"""What several tests of --kernel need: a host with a QEMU, and runs in other kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.vm.helpers import SMALL, FakeQemu, write_image
from uffd_selftests import cli as command

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    """Return a QEMU whose machines are processes of this host."""
    return FakeQemu.install(tmp_path, monkeypatch)


@dataclass
class Lab:
    """Runs --kernel in this process, which has the suite run in others."""

    qemu: FakeQemu
    output: Path
    capfd: pytest.CaptureFixture[str]
    said: list[str]
    """The last run's words on stderr, without the program's name."""

    def run(self, *arguments: str, kernels: int = 1) -> tuple[int, list[str]]:
        """Run in so many kernels, 6.99.1 and so on; return the exit code and the lines of KTAP."""
        call = ["-o", str(self.output), *SMALL]
        for number in range(1, kernels + 1):
            call += ["--kernel", str(self.image(number))]
        self.capfd.readouterr()
        code = command.main([*call, *arguments])
        out, err = self.capfd.readouterr()
        self.said[:] = [line.removeprefix("uffd-selftests: ") for line in err.splitlines()]
        return code, out.splitlines()

    def saved_are_gone(self) -> None:
        """Have the next run boot again."""
        for path in self.qemu.saved:
            path.unlink()

    def image(self, number: int) -> Path:
        """Return the image of a kernel, which stays as it is."""
        path = self.qemu.folder / f"bzImage{number}"
        return path if path.exists() else write_image(path, f"6.99.{number}")


@pytest.fixture
def lab(qemu: FakeQemu, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Lab:
    """Return the means to run --kernel without virtual machines."""
    return Lab(qemu, tmp_path / "out", capfd, [])
