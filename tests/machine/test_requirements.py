# SPDX-License-Identifier: GPL-2.0-only
"""A reason says what is missing and what to do."""

from __future__ import annotations

import dataclasses

import pytest

from uffd_selftests.abi.uapi import Feature
from uffd_selftests.machine.facts import Facts
from uffd_selftests.machine.requirements import REQUIREMENTS, missing_features


def test_missing_features(facts: Facts) -> None:
    """Each bit on its own, with the release that has it; an unknown one too."""
    old = dataclasses.replace(facts, access={"syscall": None}, features=Feature.MISSING_SHMEM)
    assert missing_features(old, Feature.MISSING_SHMEM) == []
    assert missing_features(old, Feature.MISSING_SHMEM | Feature.POISON | Feature.MOVE | Feature(1 << 40)) == [
        "kernel lacks UFFD_FEATURE_POISON (Linux 6.6)",
        "kernel lacks UFFD_FEATURE_MOVE (Linux 6.8)",
        "kernel lacks bit 40",
    ]


@pytest.mark.parametrize(
    ("changes", "requirement", "reason"),
    [
        ({"swap_total": 1 << 20}, "swap", None),
        ({"kvm": None}, "kvm", None),
        ({"kvm": {"reason": "/dev/kvm: ENOENT", "accesses": None}}, "kvm", "/dev/kvm: ENOENT"),
        ({"kvm": {"reason": "/dev/kvm: ENOENT", "accesses": None}}, "kvm_paging", "/dev/kvm: ENOENT"),
        ({"kvm": {"reason": None, "accesses": "emulation"}}, "kvm", None),
        (
            {"kvm": {"reason": None, "accesses": "emulation"}},
            "kvm_paging",
            "/dev/kvm: accesses of a virtual processor are emulation here, no page faults",
        ),
        ({"kvm": {"reason": None, "accesses": "page faults"}}, "kvm_paging", None),
        ({"swap_total": 0}, "swap", "no swap space: swapon a file or a zram device"),
        (
            {"pmd_size": 1 << 21, "thp": {"enabled": "never"}},
            "thp",
            "transparent huge pages are off: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        ({"pmd_size": 1 << 21, "thp": {"enabled": "always"}, "thp_disabled": False}, "thp", None),
        (
            {"unprivileged_userfaultfd": None, "seccomp": 0, "built_in": False}
            | {"access": {"syscall": "ENOSYS", "syscall-user-mode-only": "ENOSYS", "device": "ENOENT"}},
            "syscall",
            "userfaultfd(2): ENOSYS: boot a kernel with CONFIG_USERFAULTFD",
        ),
        (
            {"unprivileged_userfaultfd": 0}
            | {"access": {"syscall": "EPERM", "syscall-user-mode-only": "EINVAL", "device": "ENOENT"}},
            "syscall",
            "vm.unprivileged_userfaultfd is 0: run as root, or set it to 1, or get access to /dev/userfaultfd",
        ),
        (
            {"access": {"syscall": None, "syscall-user-mode-only": "EINVAL", "device": "ENOENT"}},
            "user_mode_only",
            "kernel lacks UFFD_USER_MODE_ONLY (Linux 5.11)",
        ),
        (
            {"access": {"syscall": "EPERM", "syscall-user-mode-only": None, "device": "ENOENT"}},
            "user_mode_only",
            None,
        ),
        (
            {"access": {"syscall": "EMFILE", "syscall-user-mode-only": "EMFILE", "device": "EMFILE"}},
            "kernel_faults",
            "userfaultfd(2): EMFILE; /dev/userfaultfd: EMFILE",
        ),
        (
            {"access": {"syscall": None, "syscall-user-mode-only": None, "device": "EPERM"}},
            "device",
            "/dev/userfaultfd: EPERM: the container's device rules forbid it: --device /dev/userfaultfd",
        ),
    ],
)
def test_reasons(facts: Facts, changes: dict[str, object], requirement: str, reason: str | None) -> None:
    """A reason says what is missing and what to do."""
    changed = Facts.from_dict(facts.to_dict() | changes)
    assert REQUIREMENTS[requirement](changed) == reason


def test_every_requirement_has_an_answer(facts: Facts) -> None:
    """None or a sentence without KTAP's special character."""
    for name, requirement in REQUIREMENTS.items():
        reason = requirement(facts)
        assert reason is None or (reason and "#" not in reason and "\n" not in reason), name
