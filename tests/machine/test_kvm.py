# SPDX-License-Identifier: GPL-2.0-only
"""Whether a virtual processor can be had is found out in a child, and told with the remedy."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from uffd_selftests.abi.errors import KernelError
from uffd_selftests.machine import kvm
from uffd_selftests.machine.system import OWN_MACHINE

X86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the code is x86-64's")


def state() -> tuple[list[str], str]:
    """Return the descriptors and the children of this process."""
    return os.listdir("/proc/self/fd"), Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def test_answer() -> None:
    """There is a reason, or a way by which memory is accessed; no descriptor and no process stays."""
    before = state()
    found = kvm.probe_kvm()
    assert (found["reason"] is None) == (found["accesses"] in (kvm.FAULTS, kvm.EMULATION))
    assert state() == before


def refusing(number: int) -> Callable[[], NoReturn]:
    """Return what fails as open(2) does."""

    def refuse() -> NoReturn:
        raise OSError(number, os.strerror(number))

    return refuse


@X86
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (
            errno.ENOENT,
            "/dev/kvm: ENOENT: load kvm_amd or kvm_intel, on a machine with SVM or VMX; "
            "a container needs --device /dev/kvm",
        ),
        (errno.EACCES, "/dev/kvm: EACCES: join the group kvm, or run as root"),
        (errno.EPERM, "/dev/kvm: EPERM: the container's device rules forbid it: --device /dev/kvm"),
        (errno.EMFILE, "/dev/kvm: EMFILE"),
    ],
)
def test_closed(monkeypatch: pytest.MonkeyPatch, number: int, reason: str) -> None:
    """Why /dev/kvm cannot be opened is told with what to do."""
    monkeypatch.delenv(OWN_MACHINE, raising=False)
    monkeypatch.setattr(kvm, "open_kvm", refusing(number))
    assert kvm.probe_kvm() == {"reason": reason, "accesses": None}


@X86
def test_absent_in_a_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a guest it is the kernel that lacks it."""
    monkeypatch.setenv(OWN_MACHINE, "1")
    monkeypatch.setattr(kvm, "open_kvm", refusing(errno.ENOENT))
    assert str(kvm.probe_kvm()["reason"]).startswith("/dev/kvm: ENOENT: boot a kernel with CONFIG_KVM, ")


@X86
def test_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KVM that makes no machine is somebody else's."""

    def refuse(_: int) -> NoReturn:
        raise KernelError(errno.EBUSY, "KVM_CREATE_VM(0)")

    monkeypatch.setattr(kvm, "open_kvm", lambda: 0)
    monkeypatch.setattr(kvm, "Vm", refuse)
    assert kvm.probe_kvm()["reason"] == (
        "/dev/kvm: KVM_CREATE_VM(0): EBUSY: is another hypervisor using the processor?"
    )


@pytest.mark.parametrize(
    ("what", "seconds", "reason"),
    [
        (
            lambda: time.sleep(60),
            0.1,
            "/dev/kvm: a virtual processor has not executed two instructions after 0.1 seconds",
        ),
        (lambda: os._exit(1), 60.0, "/dev/kvm: a process that tries a virtual processor dies"),
    ],
    ids=["hangs", "dies"],
)
def test_hangs(monkeypatch: pytest.MonkeyPatch, what: Callable[[], Any], seconds: float, reason: str) -> None:
    """A virtual processor that never comes to its end, or takes its process along, costs a moment."""
    monkeypatch.setattr(kvm, "_try", what)
    monkeypatch.setattr(kvm, "SECONDS", seconds)
    assert kvm.probe_kvm() == {"reason": reason, "accesses": None}


def test_other_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the code could not be executed."""
    monkeypatch.setattr(kvm, "MACHINE", "vax")
    assert kvm.probe_kvm()["reason"] == "what a virtual processor executes is code for vax"


def test_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a guest's modules those of its processor are loaded, in order, and one that fails does no harm."""
    flags = Path("/proc/cpuinfo").read_text().split()
    monkeypatch.setattr(kvm, "VENDORS", {"kvm_amd": flags[0], "kvm_intel": "no such flag"})
    for name in ("00-irqbypass", "01-kvm", "02-ccp", "03-kvm_amd", "04-kvm_intel"):
        (tmp_path / f"{name}.ko").touch()
    loaded = []

    def call(name: str, fd: int, *_: int) -> int:
        assert name == "finit_module"
        loaded.append(Path(os.readlink(f"/proc/self/fd/{fd}")).stem)
        if loaded[-1] == "02-ccp":
            raise KernelError(errno.ENODEV, name)
        return 0

    monkeypatch.setattr("uffd_selftests.abi.syscalls.call", call)
    assert kvm.load_modules(tmp_path)
    assert loaded == ["00-irqbypass", "01-kvm", "02-ccp", "03-kvm_amd"]
    assert not kvm.load_modules(tmp_path / "nothing")


def test_loaded_in_guests_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Modules are loaded where the machine is the suite's own, and the device is not there."""
    loaded = []
    device = tmp_path / "kvm"

    def load() -> bool:
        loaded.append(True)
        device.touch()
        return True

    monkeypatch.setattr(kvm, "DEVICE", str(device))
    monkeypatch.setattr(kvm, "load_modules", load)
    monkeypatch.delenv(OWN_MACHINE, raising=False)
    with pytest.raises(FileNotFoundError):
        kvm.open_kvm()
    monkeypatch.setenv(OWN_MACHINE, "1")
    os.close(kvm.open_kvm())
    os.close(kvm.open_kvm())
    assert loaded == [True]
