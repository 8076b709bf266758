# SPDX-License-Identifier: GPL-2.0-only
"""What a case can need of the kernel, why it is missing and how to get it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from uffd_selftests.abi.uapi import Feature
from uffd_selftests.machine.doors import DEVICE
from uffd_selftests.machine.facts import AS_ROOT, THP, Facts
from uffd_selftests.machine.kvm import FAULTS
from uffd_selftests.machine.swap import NO_SWAP

PROFILE = "allow userfaultfd in the container's profile"
TOO_LARGE = 64 << 20
"""Bytes of a huge page of which a case can no longer take a handful."""


def no_userfaultfd(facts: Facts) -> str | None:
    """Return why no userfaultfd can be had at all, in any way."""
    if facts.sandbox and None not in facts.access.values():
        return f"userfaultfd(2): {facts.access['syscall']}: {facts.sandbox} has none: run outside of it"
    if None not in facts.access.values():
        return f"{_syscall_reason(facts)}; {_device_reason(facts)}"
    return _refused(facts, *facts.handshake.split(": ")) if facts.handshake else None


def _refused(facts: Facts, call: str, name: str) -> str:
    """Say who refuses a call to whom the kernel itself would grant it, and whom to ask."""
    if name == "EACCES":
        return f"{call}: EACCES: {_policy(facts)}"
    if name == "SIGSYS":
        return f"{call}: SIGSYS: a seccomp filter kills who makes it: {PROFILE}"
    if facts.seccomp and name in ("ENOSYS", "EPERM"):
        return f"{call}: {name}: forbidden by a seccomp filter: {PROFILE}"
    return f"{call}: {name}"


def _policy(facts: Facts) -> str:
    """Say which security module says EACCES, also to root, and what its policy must allow."""
    asked = f"allow {facts.security_context or 'its domain'} self:anon_inode {{ create ioctl read }}"
    if "selinux" in facts.security_modules:
        return f"SELinux forbids it, to root too: have its policy {asked}"
    there = f" (in force: {', '.join(facts.security_modules)})" if facts.security_modules else ""
    whose = " or a seccomp filter" if facts.seccomp else ""
    return f"a security module{there}{whose} forbids it, to root too: with SELinux, have its policy {asked}"


def missing_features(facts: Facts, wanted: Feature) -> list[str]:
    """Return one reason for each wanted feature that cannot be enabled."""
    if nothing := no_userfaultfd(facts):
        return [nothing] if wanted else []
    bits = [Feature(1 << bit) for bit in range(int(wanted).bit_length()) if int(wanted) >> bit & 1]
    reasons = [_lacking(bit) for bit in bits if not bit & facts.features]
    if wanted & facts.features & Feature.EVENT_FORK and facts.event_fork:
        reasons.append(f"{Feature.EVENT_FORK}: {facts.event_fork}: {_capability_remedy(facts, 'CAP_SYS_PTRACE')}")
    return reasons


def _lacking(feature: Feature) -> str:
    return f"kernel lacks {feature}" + (f" (Linux {feature.since})" if feature.since else "")


def _syscall_reason(facts: Facts) -> str | None:
    """Return why userfaultfd(2) does not work, not even for faults in user mode only."""
    name = facts.access["syscall-user-mode-only"]
    if facts.access["syscall"] is None or name is None:
        return None
    if name == "EINVAL":  # before Linux 5.11: no UFFD_USER_MODE_ONLY
        return _kernel_faults_reason(facts)
    if name == "ENOSYS" and not facts.built_in:
        where = "the host needs" if facts.seccomp else "boot"
        doubt = ", unless a seccomp filter forbids it" if facts.seccomp and facts.built_in is None else ""
        return f"userfaultfd(2): ENOSYS: {where} a kernel with CONFIG_USERFAULTFD{doubt}"
    if name in ("ENOSYS", "EPERM"):  # the kernel itself refuses nobody who asks for faults in user mode only
        return f"userfaultfd(2): {name}: forbidden by a seccomp filter: {PROFILE}"
    return _refused(facts, "userfaultfd(2)", name)


def _device_reason(facts: Facts) -> str | None:
    name = facts.access["device"]
    if name is None:
        return None
    remedies = {
        "ENOENT": "needs Linux 6.1, and a container needs --device /dev/userfaultfd",
        "EPERM": "the container's device rules forbid it: --device /dev/userfaultfd",
        "EACCES": f"{AS_ROOT}, or setfacl -m u:$USER:rw {DEVICE}" if facts.euid else _policy(facts),
        "SIGSYS": f"a seccomp filter kills who opens it: {PROFILE}",
    }
    return f"{DEVICE}: {name}" + (f": {remedies[name]}" if name in remedies else "")


def _kernel_faults_reason(facts: Facts) -> str | None:
    """Return why faults that the kernel itself meets (read(2) into a missing page) cannot be handled."""
    name = facts.access["syscall"]
    if name is None or facts.access["device"] is None:
        return None
    if name == "EPERM" and facts.unprivileged_userfaultfd == 0:
        return f"vm.unprivileged_userfaultfd is 0: {AS_ROOT}, or set it to 1, or get access to {DEVICE}"
    return no_userfaultfd(facts) or f"userfaultfd(2): {name}"


def _user_mode_only_reason(facts: Facts) -> str | None:
    missing = facts.access["syscall-user-mode-only"] == "EINVAL"
    return "kernel lacks UFFD_USER_MODE_ONLY (Linux 5.11)" if missing else None


def _swap_reason(facts: Facts) -> str | None:
    return None if facts.swap_total else NO_SWAP


def _thp_reason(facts: Facts) -> str | None:
    if not facts.pmd_size:
        return "no transparent huge pages: boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE"
    if facts.thp["enabled"] == "never":
        return f"transparent huge pages are off: echo madvise > {THP}/enabled"
    return "transparent huge pages are off for this process (PR_SET_THP_DISABLE)" if facts.thp_disabled else None


def _hugetlb_reason(facts: Facts) -> str | None:
    if not facts.hugepage_size:
        return "no huge pages: boot a kernel with CONFIG_HUGETLBFS"
    if facts.hugepage_size <= TOO_LARGE:
        return None
    mib = [size >> 20 for size in sorted(facts.hugepage_sizes) if size <= TOO_LARGE]
    remedy = f"boot with default_hugepagesz={mib[-1]}M" if mib else "boot a kernel with smaller pages"
    return f"huge pages of {facts.hugepage_size >> 20} MiB are too large to take several: {remedy}"


def wants_kvm(needs: Iterable[str]) -> bool:
    """Whether one of these has to do with virtual processors, which are only tried where that is so."""
    return any(name.startswith("kvm") for name in needs)


def _kvm_reason(facts: Facts, accesses: str = "") -> str | None:
    if facts.kvm is None:  # nobody has looked, so that nothing is known to be missing
        return None
    if reason := facts.kvm["reason"]:
        return reason
    if accesses and facts.kvm["accesses"] != accesses:
        return f"/dev/kvm: accesses of a virtual processor are {facts.kvm['accesses']} here, no {accesses}"
    return None


def _capability_reason(facts: Facts, name: str) -> str | None:
    if name in facts.capabilities and not facts.user_namespace:
        return None
    return _capability_remedy(facts, name)


def _capability_remedy(facts: Facts, name: str) -> str:
    if facts.euid or facts.user_namespace:
        where = " outside of the container" if facts.user_namespace else ""
        return f"needs {name}, {AS_ROOT}{where}"
    return f"needs {name}, which root has not here: --cap-add {name.removeprefix('CAP_')} for a container"


REQUIREMENTS: dict[str, Callable[[Facts], str | None]] = {
    "syscall": _syscall_reason,
    "device": _device_reason,
    "kernel_faults": _kernel_faults_reason,
    "user_mode_only": _user_mode_only_reason,
    "gup_test": lambda facts: facts.gup_test,
    "hugetlb": _hugetlb_reason,
    "kvm": _kvm_reason,
    "kvm_paging": lambda facts: _kvm_reason(facts, FAULTS),
    "pagemap": lambda facts: facts.pagemap,
    "pagemap_scan": lambda facts: facts.pagemap_scan,
    "swap": _swap_reason,
    "thp": _thp_reason,
    "cap_sys_admin": lambda facts: _capability_reason(facts, "CAP_SYS_ADMIN"),
    "cap_sys_ptrace": lambda facts: _capability_reason(facts, "CAP_SYS_PTRACE"),
}
"""What a case can need beside features: each name with the function that returns the reason why it is missing."""
