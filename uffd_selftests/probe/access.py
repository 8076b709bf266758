# SPDX-License-Identifier: GPL-2.0-only
"""The three doors to a userfaultfd: which are open, why the others are shut, and who holds the key."""

from __future__ import annotations

from dataclasses import dataclass

from uffd_selftests.machine.doors import DEVICE
from uffd_selftests.machine.facts import AS_ROOT, Facts
from uffd_selftests.machine.requirements import REQUIREMENTS, no_userfaultfd

SYSCTL = "vm.unprivileged_userfaultfd"


@dataclass(frozen=True)
class Door:
    """One way to a userfaultfd."""

    name: str
    """The key: syscall, syscall-user-mode-only or device, as in Facts.access."""
    title: str
    kernel_faults: bool
    """Whether a handle from here reports the kernel's own faults as well."""
    refused: str | None
    """The errno's name; None when it is open."""
    reason: str | None
    """Why it is shut and how to open it."""


def doors(facts: Facts) -> tuple[Door, ...]:
    """Return all three, the best first."""
    ways = (
        ("syscall", "userfaultfd(2)", True, _syscall_reason(facts)),
        ("device", DEVICE, True, REQUIREMENTS["device"](facts)),
        ("syscall-user-mode-only", "userfaultfd(2), UFFD_USER_MODE_ONLY", False, _user_mode_reason(facts)),
    )
    if not facts.handshake:
        return tuple(Door(name, title, kernel, facts.access[name], reason) for name, title, kernel, reason in ways)
    return tuple(  # what can be opened does not serve
        Door(name, title, kernel, facts.access[name] or facts.handshake, reason or no_userfaultfd(facts))
        for name, title, kernel, reason in ways
    )


def _syscall_reason(facts: Facts) -> str | None:
    refused = facts.access["syscall"]
    if refused != "EPERM" or facts.unprivileged_userfaultfd != 0 or facts.access["syscall-user-mode-only"] == "EPERM":
        return REQUIREMENTS["syscall"](facts) if refused else None
    who = f"{AS_ROOT} outside of the container" if facts.user_namespace else AS_ROOT
    return f"userfaultfd(2): EPERM: needs CAP_SYS_PTRACE: {who}, or sysctl {SYSCTL}=1"


def _user_mode_reason(facts: Facts) -> str | None:
    refused = facts.access["syscall-user-mode-only"]
    if refused == "EINVAL":
        return "UFFD_USER_MODE_ONLY: EINVAL: needs Linux 5.11"
    return (REQUIREMENTS["syscall"](facts) or f"userfaultfd(2): {refused}") if refused else None
