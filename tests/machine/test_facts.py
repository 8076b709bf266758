# SPDX-License-Identifier: GPL-2.0-only
"""The facts tell what the kernel and this process can do; looking never fails and changes nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from tests.machine.processes import (
    as_nobody,
    in_user_namespace,
    needs_root,
    probe_after,
    unprivileged_userfaultfd,
    with_seccomp,
    without_thp,
)
from uffd_selftests.abi.uapi import Feature
from uffd_selftests.machine import doors, hugepages
from uffd_selftests.machine import facts as facts_module
from uffd_selftests.machine.facts import Facts, probe
from uffd_selftests.machine.requirements import REQUIREMENTS, missing_features, no_userfaultfd


def test_facts_agree_with_the_machine(facts: Facts) -> None:
    """Compared with other views of the same facts."""
    assert facts.release == Path("/proc/sys/kernel/osrelease").read_text().strip()
    assert facts.page_size == os.sysconf("SC_PAGESIZE")
    assert facts.memory == os.sysconf("SC_PHYS_PAGES") * facts.page_size
    assert facts.hugepage_size == 0 or facts.hugepage_size in facts.hugepage_sizes
    assert facts.euid == os.geteuid()
    assert facts.swap_total == sum(
        int(line.split()[2]) * 1024 for line in Path("/proc/swaps").read_text().splitlines()[1:]
    )


def test_facts_survive_the_journey(facts: Facts) -> None:
    """From the controller to its workers, and through JSON."""
    assert Facts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


def test_probe_leaves_nothing_behind() -> None:
    """No descriptor stays open, nothing is mounted."""

    def state() -> tuple[list[str], str]:
        return sorted(os.listdir("/proc/self/fd")), Path("/proc/self/mountinfo").read_text()

    before = state()
    probe()
    assert state() == before


# ---- processes that may do less -------------------------------------------------------------------------------------


@needs_root
def test_root_has_everything(facts: Facts) -> None:
    """Every way that exists works, and features are offered."""
    if no_userfaultfd(facts):
        pytest.skip(str(no_userfaultfd(facts)))
    assert facts.access["syscall"] is None
    assert facts.features
    assert facts.event_fork is None
    assert REQUIREMENTS["kernel_faults"](facts) is None
    assert REQUIREMENTS["cap_sys_ptrace"](facts) is None or facts.user_namespace


@needs_root
def test_ordinary_user(facts: Facts) -> None:
    """vm.unprivileged_userfaultfd=0 leaves faults of user mode; the reasons say how to get the rest."""
    with unprivileged_userfaultfd(0):
        found = probe_after(as_nobody)
    assert found.access["syscall"] == "EPERM"
    assert found.access["syscall-user-mode-only"] is None
    assert found.access["device"] in ("EACCES", "ENOENT")
    assert found.features == facts.features
    assert found.capabilities == ()
    assert no_userfaultfd(found) is None
    assert REQUIREMENTS["syscall"](found) is None
    reason = REQUIREMENTS["kernel_faults"](found)
    assert reason
    assert reason.startswith("vm.unprivileged_userfaultfd is 0: run as root, or set it to 1")
    assert missing_features(found, Feature.EVENT_FORK | Feature.EVENT_REMAP) == [
        "UFFD_FEATURE_EVENT_FORK: EPERM: needs CAP_SYS_PTRACE, run as root"
    ]
    assert REQUIREMENTS["cap_sys_ptrace"](found) == "needs CAP_SYS_PTRACE, run as root"
    if found.access["device"] == "EACCES":
        assert str(REQUIREMENTS["device"](found)).startswith("/dev/userfaultfd: EACCES: run as root, or setfacl ")


@needs_root
def test_ordinary_user_that_may() -> None:
    """vm.unprivileged_userfaultfd=1 opens the system call to everyone."""
    with unprivileged_userfaultfd(1):
        found = probe_after(as_nobody)
    assert found.unprivileged_userfaultfd == 1
    assert found.access["syscall"] is None
    assert REQUIREMENTS["kernel_faults"](found) is None


@needs_root
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS], ids=["EPERM", "ENOSYS"])
def test_container_that_forbids_the_call(facts: Facts, error: int) -> None:
    """With a seccomp filter against userfaultfd(2) the device still works for root, and nothing for anybody else."""
    name = errno.errorcode[error]
    found = probe_after(with_seccomp(error))
    assert (found.access["syscall"], found.access["syscall-user-mode-only"]) == (name, name)
    assert found.seccomp == 2
    reason = REQUIREMENTS["syscall"](found)
    remedy = "allow userfaultfd in the container's profile"
    assert reason == f"userfaultfd(2): {name}: forbidden by a seccomp filter: {remedy}"
    if facts.access["device"] is None:
        assert no_userfaultfd(found) is None
        assert found.features == facts.features

    nobody = probe_after(as_nobody, with_seccomp(error))
    assert nobody.features == Feature(0)
    nothing = no_userfaultfd(nobody)
    assert nothing == f"{reason}; {REQUIREMENTS['device'](nobody)}"
    assert missing_features(nobody, Feature.MOVE) == [nothing]
    assert missing_features(nobody, Feature(0)) == []


def test_user_namespace() -> None:
    """Root of a container has capabilities in name only."""
    found = probe_after(in_user_namespace)
    assert found.user_namespace
    assert "CAP_SYS_PTRACE" in found.capabilities
    assert REQUIREMENTS["cap_sys_ptrace"](found) == "needs CAP_SYS_PTRACE, run as root outside of the container"
    assert missing_features(found, Feature.EVENT_FORK)


def test_thp_switched_off_by_a_parent(facts: Facts) -> None:
    """PR_SET_THP_DISABLE is seen."""
    if REQUIREMENTS["thp"](facts):
        pytest.skip(str(REQUIREMENTS["thp"](facts)))
    found = probe_after(without_thp)
    assert REQUIREMENTS["thp"](found) == "transparent huge pages are off for this process (PR_SET_THP_DISABLE)"


# ---- kernels that have less -----------------------------------------------------------------------------------------


def test_bare_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without device, huge pages, THP, pagemap and log there are reasons instead of exceptions."""
    for module, name in (
        (doors, "DEVICE"),
        (facts_module, "THP"),
        (facts_module, "PAGEMAP"),
        (facts_module, "KMSG"),
        (facts_module, "MEMINFO"),
        (hugepages, "HUGEPAGES"),
    ):
        monkeypatch.setattr(module, name, tmp_path / "missing")
    found = probe()
    assert found.access["device"] == "ENOENT"
    assert found.device_mode is None
    assert (found.hugepage_size, found.hugepage_sizes, found.pmd_size) == (0, (), 0)
    for name, cause in (
        ("device", "ENOENT: needs Linux 6.1"),
        ("hugetlb", "CONFIG_HUGETLBFS"),
        ("thp", "CONFIG_TRANSPARENT_HUGEPAGE"),
        ("pagemap", "ENOENT: boot a kernel with CONFIG_PROC_PAGE_MONITOR"),
        ("swap", "no swap space"),
    ):
        assert cause in str(REQUIREMENTS[name](found))
