# SPDX-License-Identifier: GPL-2.0-only
"""The first process of a guest, as far as it can be watched without one: its port, its child, its modules, its end."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from uffd_selftests.abi import syscalls
from uffd_selftests.vm import init


class PoweredOff(BaseException):
    """The machine is off."""


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder of the machine's ports, where there is another's only."""
    for name in ("sys/vport0p1", "dev"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "sys/vport0p1/name").write_text("org.qemu.guest_agent.0\n")
    monkeypatch.setattr(init, "PORTS", tmp_path / "sys")
    monkeypatch.setattr(init, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(init, "PORT_SECONDS", 0.05)
    return tmp_path / "sys"


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be prepared and nothing be switched off."""

    def power_off() -> NoReturn:
        raise PoweredOff

    monkeypatch.setattr(init, "prepare", lambda: None)
    monkeypatch.setattr(init, "power_off", power_off)


def add_port(ports: Path) -> None:
    """Add the suite's port."""
    (ports / "vport0p2").mkdir()
    (ports / "vport0p2/name").write_text("uffd-selftests\n")
    os.mkfifo(init.DEVICES / "vport0p2")


def test_port(ports: Path) -> None:
    """The port is found by its name, and can be read and written."""
    add_port(ports)
    port = init.open_port()
    os.write(port, b"word")
    assert os.read(port, 10) == b"word"
    os.close(port)


def test_host_not_there(ports: Path) -> None:
    """While the host has not opened its end, the port is of no use: whoever reads is told of an end."""
    add_port(ports)
    (init.DEVICES / "vport0p2").unlink()
    side, terminal = os.openpty()
    (init.DEVICES / "vport0p2").symlink_to(os.ttyname(terminal))
    real_open = os.open

    def hang_up(path: Path, flags: int) -> int:
        port = real_open(path, flags | os.O_NOCTTY)
        os.close(side)
        return port

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TimeoutError, match="the host does not open the port"):
        patch.setattr(os, "open", hang_up)
        init.open_port()
    os.close(terminal)


@pytest.mark.usefixtures("off")
def test_no_port(ports: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A machine without the port says so in one line, and ends."""
    with pytest.raises(PoweredOff):
        init.main()
    assert capfd.readouterr().err == (
        f"uffd-selftests: no port uffd-selftests in {ports}: CONFIG_VIRTIO_PCI, CONFIG_VIRTIO_CONSOLE\n"
    )


@pytest.mark.usefixtures("off")
def test_own_mistake(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The machine ends whatever happens, and the console tells what it was."""
    monkeypatch.setattr(init, "open_port", lambda: 1 // 0)
    with pytest.raises(PoweredOff):
        init.main()
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_launcher(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The first process waits for the launcher, whoever else ends before, and says when that does not end well."""
    port = os.open("/dev/null", os.O_RDWR)
    if not os.fork():
        os._exit(0)
    monkeypatch.setattr(init, "_launch", lambda fd: os._exit(3 + fd - port))
    init.serve(port)
    assert capfd.readouterr().err == "uffd-selftests: the launcher ended with 3\n"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(port)
    port = os.open("/dev/null", os.O_RDWR)
    monkeypatch.setattr(init, "_launch", lambda _: 1 // 0)
    init.serve(port)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Modules are loaded in the order of their names and removed; what is there already is no trouble."""
    answers = {"00-a.ko": 0, "01-b.ko": errno.EEXIST, "02-c.ko": errno.ENOEXEC, "10-d.ko": errno.ENODEV}
    loaded = []

    class Libc:
        """A C library that loads no module."""

        def syscall(self, number: int, fd: int, options: bytes, flags: int) -> int:
            """Remember what is to be loaded."""
            assert (number, options, flags) == (syscalls.number("finit_module"), b"", 0)
            name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
            loaded.append(name)
            ctypes.set_errno(answers[name])
            return -1 if answers[name] else 0

    for name in reversed(answers):
        (tmp_path / name).touch()
    monkeypatch.setattr(init, "_libc", Libc())
    init.load_modules(tmp_path)
    assert loaded == list(answers)
    assert capfd.readouterr().err == "uffd-selftests: 02-c.ko: Exec format error\n"
    assert list(tmp_path.iterdir()) == []
    init.load_modules(tmp_path / "none")


def test_mount_is_told() -> None:
    """What cannot be mounted is named, and what is there already is not mounted again."""
    init.mount("proc", "/proc")
    with pytest.raises(OSError, match=r"mount\(nofs, /nowhere\): E"), contextlib.suppress(FileNotFoundError):
        init.mount("nofs", "/nowhere")
