# SPDX-License-Identifier: GPL-2.0-only
"""Doors that are shut: each reason says by whom, and what to ask of him; nothing dies of having tried."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.helpers import needs_userfaultfd
from tests.machine.processes import as_nobody, needs_root, probe_after, with_seccomp
from uffd_selftests.abi.uapi import UFFDIO_API, USERFAULTFD_IOC_NEW, Feature
from uffd_selftests.machine import doors
from uffd_selftests.machine import facts as facts_module
from uffd_selftests.machine.facts import Facts, probe
from uffd_selftests.machine.requirements import REQUIREMENTS, missing_features, no_userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHUT = {"syscall": "EPERM", "syscall-user-mode-only": "EPERM", "device": "ENOENT"}
PROFILE = "allow userfaultfd in the container's profile"


def kills(call: str) -> str:
    """The reason when a seccomp filter kills who makes a call."""
    return f"{call}: SIGSYS: a seccomp filter kills who makes it: {PROFILE}"


@needs_userfaultfd
@needs_root
@pytest.mark.parametrize(
    ("shut", "call", "said"),
    [
        (with_seccomp(None, "ioctl", (1, UFFDIO_API)), "UFFDIO_API", "SIGSYS"),
        (with_seccomp(errno.EACCES, "ioctl", (1, UFFDIO_API)), "UFFDIO_API", "EACCES"),
        (with_seccomp(errno.EPERM, "ioctl", (1, UFFDIO_API)), "UFFDIO_API", "EPERM"),
        (with_seccomp(errno.EACCES, "read", (2, doors.MESSAGE)), "read(2)", "EACCES"),
    ],
    ids=["api kills", "api EACCES", "api EPERM", "read EACCES"],
)
def test_descriptor_does_not_serve(shut: Callable[[], None], call: str, said: str) -> None:
    """A descriptor that can be had and not be used is none; the reason names the call."""
    found = probe_after(shut)
    assert (found.access["syscall"], found.handshake) == (None, f"{call}: {said}")
    assert found.features == Feature(0)
    reason = str(no_userfaultfd(found))
    if said == "EACCES":
        assert reason.startswith(f"{call}: EACCES: ")
        assert "with SELinux, have its policy allow " in reason
        assert reason.endswith(" self:anon_inode { create ioctl read }")
    else:
        assert reason in (kills(call), f"{call}: EPERM: forbidden by a seccomp filter: {PROFILE}")
    assert missing_features(found, Feature.MOVE) == [reason]


@needs_root
def test_filter_that_kills(facts: Facts) -> None:
    """Whoever calls userfaultfd(2) dies: it is tried in a child; the device still serves root."""
    found = probe_after(with_seccomp(None))
    assert (found.access["syscall"], found.access["syscall-user-mode-only"]) == ("SIGSYS", "SIGSYS")
    assert REQUIREMENTS["syscall"](found) == kills("userfaultfd(2)")
    assert (no_userfaultfd(found) is None) == (facts.access["device"] is None)
    nobody = probe_after(as_nobody, with_seccomp(None))
    assert str(no_userfaultfd(nobody)).startswith(kills("userfaultfd(2)"))


@dataclass(frozen=True)
class Doors:
    """What a run finds."""

    answer: int | None
    """Of userfaultfd(2); None: who calls it is killed."""
    device: bool
    """The device gives one."""
    code: int
    """The run's exit code."""
    reason: str
    """How the reason begins why nothing could be tested; empty when it could."""


RUNS = {
    "kills, no device": Doors(None, device=False, code=4, reason=kills("userfaultfd(2)")),
    "EACCES, no device": Doors(errno.EACCES, device=False, code=4, reason="userfaultfd(2): EACCES: a security module"),
    "kills": Doors(None, device=True, code=0, reason=""),
}


@needs_userfaultfd
@needs_root
@pytest.mark.parametrize("found", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("more", [[], ["-n", "2"], ["--probe", "--json"]], ids=["serial", "workers", "probe"])
def test_runs(facts: Facts, found: Doors, more: list[str]) -> None:
    """A run says the reason and ends in order, with what can still be had."""
    if found.device and facts.access["device"]:
        pytest.skip("no /dev/userfaultfd")

    def shut_doors() -> None:
        with_seccomp(found.answer)()
        if not found.device:
            with_seccomp(errno.EPERM, "ioctl", (1, USERFAULTFD_IOC_NEW))()

    chosen = more if "--probe" in more else ["-f", "=zeropage-dontwake", *more]
    command = [sys.executable, "-m", "uffd_selftests", *chosen]
    run = subprocess.run(command, preexec_fn=shut_doors, check=False, capture_output=True, text=True)
    assert (run.returncode, "Traceback" in run.stdout + run.stderr) == (found.code, False), run.stderr
    if "--probe" in more:
        assert str(json.loads(run.stdout)["reason"] or "").startswith(found.reason)
    else:
        wanted = f" # SKIP {found.reason}" if found.reason else ""
        assert f" zeropage-dontwake on anon{wanted}" in run.stdout


def changed(facts: Facts, **fields: object) -> Facts:
    """The facts of another machine."""
    return Facts.from_dict(facts.to_dict() | {"access": SHUT, "handshake": None, "sandbox": "", "seccomp": 0} | fields)


def nothing(name: str) -> dict[str, str]:
    """What each way says."""
    return {"syscall": name, "syscall-user-mode-only": name, "device": "ENOENT"}


DEVICE_TOO = "; /dev/userfaultfd: ENOENT: needs Linux 6.1, and a container needs --device /dev/userfaultfd"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"access": nothing("ENOSYS"), "seccomp": 2, "built_in": False},
            f"userfaultfd(2): ENOSYS: the host needs a kernel with CONFIG_USERFAULTFD{DEVICE_TOO}",
        ),
        (
            {"access": nothing("ENOSYS"), "seccomp": 2, "built_in": True},
            f"userfaultfd(2): ENOSYS: forbidden by a seccomp filter: {PROFILE}{DEVICE_TOO}",
        ),
        (
            {"access": nothing("ENOSYS"), "seccomp": 2, "built_in": None},
            "userfaultfd(2): ENOSYS: the host needs a kernel with CONFIG_USERFAULTFD, "
            f"unless a seccomp filter forbids it{DEVICE_TOO}",
        ),
        (
            {"access": nothing("ENOSYS"), "built_in": False},
            f"userfaultfd(2): ENOSYS: boot a kernel with CONFIG_USERFAULTFD{DEVICE_TOO}",
        ),
        (
            {"access": nothing("ENOSYS"), "built_in": None, "sandbox": "gVisor"},
            "userfaultfd(2): ENOSYS: gVisor has none: run outside of it",
        ),
        (
            {"access": nothing("EACCES"), "security_modules": ["lockdown", "selinux"], "security_context": "build_t"},
            "userfaultfd(2): EACCES: SELinux forbids it, to root too: have its policy allow build_t self:anon_inode "
            f"{{ create ioctl read }}{DEVICE_TOO}",
        ),
    ],
    ids=["container, not built in", "container, built in", "container", "not built in", "sandbox", "SELinux"],
)
def test_who_shuts(facts: Facts, fields: dict[str, object], reason: str) -> None:
    """The reason names who refuses, and what helps there."""
    assert no_userfaultfd(changed(facts, **fields)) == reason


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ([2 << 20, 512 << 20, 16 << 30], "boot with default_hugepagesz=2M"),
        ([512 << 20], "boot a kernel with smaller pages"),
    ],
)
def test_huge_pages_too_large(facts: Facts, sizes: list[int], reason: str) -> None:
    """Where the default huge page has half a gigabyte nothing is taken; the reason names the size to ask for."""
    found = changed(facts, hugepage_size=512 << 20, hugepage_sizes=sizes)
    assert REQUIREMENTS["hugetlb"](found) == f"huge pages of 512 MiB are too large to take several: {reason}"


def test_root_without_a_capability(facts: Facts) -> None:
    """Root of a container is not told to be root."""
    found = changed(facts, euid=0, capabilities=[], user_namespace=False)
    reason = "needs CAP_SYS_ADMIN, which root has not here: --cap-add SYS_ADMIN for a container"
    assert REQUIREMENTS["cap_sys_admin"](found) == reason


@pytest.mark.parametrize(
    ("locked", "said"), [("none [integrity] confidentiality", "locked down (integrity)"), ("", "run outside of it")]
)
def test_locked_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: str, said: str) -> None:
    """Root is told what keeps root out."""
    (tmp_path / "lockdown").write_text(locked)
    monkeypatch.setattr(doors, "SECURITYFS", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert said in facts_module.as_root()
    assert "run as root" not in facts_module.as_root()


def test_gvisor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known by what it says of itself."""
    names = (*os.uname()[:2], "4.4.0", "#1 SMP Sun Jan 10 15:06:54 PST 2016", "x86_64")
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(names))
    assert probe().sandbox == "gVisor"


@pytest.mark.parametrize(("listed", "found"), [("lockdown,selinux\n", ("lockdown", "selinux")), ("", ())])
def test_security_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, found: tuple[str, ...]
) -> None:
    """They are those that the kernel lists, or, in a container, SELinux where its file system is."""
    (tmp_path / "lsm").write_text(listed)
    monkeypatch.setattr(doors, "SECURITYFS", tmp_path)
    monkeypatch.setattr(doors, "SELINUXFS", tmp_path / "none")
    assert doors.security_modules() == found
    (tmp_path / "enforce").write_text("1")
    monkeypatch.setattr(doors, "SELINUXFS", tmp_path)
    assert "selinux" in doors.security_modules()
