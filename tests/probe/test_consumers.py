# SPDX-License-Identifier: GPL-2.0-only
"""Everybody who uses userfaultfd hears whether they get what they need, and why not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.probe.helpers import capable, failing, verdicts, without
from uffd_selftests.abi.uapi import Feature
from uffd_selftests.probe.consumers import CONSUMERS, Verdict, judge
from uffd_selftests.probe.findings import Answer, Findings, Outcome
from uffd_selftests.probe.report import Report
from uffd_selftests.probe.trials import VCPU


def test_everything_suffices(found: Report) -> None:
    """A kernel with everything serves everybody."""
    assert {each.verdict for each in judge(capable(found.findings))} == {Verdict.YES}
    assert len({consumer.key for consumer in CONSUMERS}) == len(CONSUMERS)


REFUSED = Outcome(Answer.REFUSED, offered=True, errno="EINVAL")
SHUT = {"syscall": "EPERM", "device": "EACCES", "syscall-user-mode-only": None}
LIMITED: dict[str, tuple[Callable[[Findings], Findings], dict[str, tuple[Verdict, str]]]] = {
    "no-events": (
        lambda found: without(found, Feature.EVENT_REMOVE),
        {
            "firecracker-restore": (Verdict.NO, "kernel lacks UFFD_FEATURE_EVENT_REMOVE (Linux 4.11)"),
            "criu-lazy-pages": (
                Verdict.LIMITS,
                "restored processes must not drop memory (madvise): "
                "kernel lacks UFFD_FEATURE_EVENT_REMOVE (Linux 4.11)",
            ),
        },
    ),
    "no-markers": (
        lambda found: without(
            found, Feature.WP_HUGETLBFS_SHMEM, Feature.WP_UNPOPULATED, Feature.WP_ASYNC
        ),
        {
            "qemu-background-snapshot": (
                Verdict.LIMITS,
                "not with shared memory: kernel lacks UFFD_FEATURE_WP_HUGETLBFS_SHMEM (Linux 5.19)",
            ),
            "async-dirty-tracking": (
                Verdict.NO,
                "kernel lacks UFFD_FEATURE_WP_ASYNC (Linux 6.7); kernel lacks UFFD_FEATURE_WP_UNPOPULATED (Linux 6.4)",
            ),
        },
    ),
    "no-privilege": (
        lambda found: without(
            found, access=SHUT, unprivileged_userfaultfd=0, user_namespace=False, event_fork="EPERM", euid=1
        ),
        {
            "qemu-postcopy": (
                Verdict.NO,
                "userfaultfd(2): EPERM: needs CAP_SYS_PTRACE: run as root, or sysctl vm.unprivileged_userfaultfd=1; "
                "/dev/userfaultfd: EACCES: run as root, or setfacl -m u:$USER:rw /dev/userfaultfd",
            ),
            "criu-lazy-pages": (
                Verdict.NO,
                "userfaultfd(2): EPERM: needs CAP_SYS_PTRACE: run as root, or sysctl vm.unprivileged_userfaultfd=1",
            ),
            "async-dirty-tracking": (Verdict.YES, ""),
            "android-art": (Verdict.YES, ""),
        },
    ),
    "sysctl-only": (
        lambda found: without(
            found, access={**SHUT, "syscall": None}, user_namespace=False, capabilities=(), event_fork="EPERM", euid=1
        ),
        {
            "qemu-postcopy": (Verdict.YES, ""),
            "criu-lazy-pages": (Verdict.NO, "UFFD_FEATURE_EVENT_FORK: EPERM: needs CAP_SYS_PTRACE, run as root"),
        },
    ),
    "no-scan": (
        lambda found: without(found, pagemap_scan="PAGEMAP_SCAN: ENOTTY (Linux 6.7)"),
        {"gvisor-dirty-tracking": (Verdict.NO, "PAGEMAP_SCAN: ENOTTY (Linux 6.7)")},
    ),
    "broken-copy": (
        lambda found: failing(found, "anon", "COPY", REFUSED),
        {
            "qemu-postcopy": (Verdict.NO, "COPY on anon: EINVAL"),
            "qemu-postcopy-shared": (Verdict.YES, ""),
            "firecracker-restore": (Verdict.NO, "COPY on anon: EINVAL"),
        },
    ),
    "no-hugepages": (
        lambda found: failing(found, "hugetlb", "COPY", Outcome(Answer.UNTESTED, offered=True), "needs 4 huge pages"),
        {
            "qemu-postcopy-hugepages": (Verdict.NO, "needs 4 huge pages"),
            "qemu-postcopy": (Verdict.YES, ""),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITED)
def test_verdict(name: str, found: Report) -> None:
    """Each gets the reason that concerns it, with the remedy, and nobody else is harmed."""
    limit, expected = LIMITED[name]
    judged = verdicts(limit(capable(found.findings)))
    seen = {key: (judged[key].verdict, (judged[key].reasons or ("",))[0]) for key in expected}
    assert seen == expected


MONITORS = (
    "qemu-postcopy", "qemu-postcopy-shared", "qemu-postcopy-hugepages", "qemu-background-snapshot",
    "firecracker-restore", "cloud-hypervisor-restore",
)  # fmt: skip


def test_no_virtual_processor(found: Report) -> None:
    """Without KVM, monitors are told that their virtual processors were not tried, and what to do; others are not."""
    able = without(capable(found.findings), kvm={"reason": "/dev/kvm: ENOENT: load it", "accesses": None})
    untried = Outcome(Answer.UNTESTED, detail="/dev/kvm: ENOENT: load it")
    for memory in ("anon", "shmem", "hugetlb", "hugetlb-private"):
        able = failing(able, memory, VCPU, untried)
    for key, judgement in verdicts(able).items():
        if key in MONITORS:
            assert judgement.verdict is Verdict.LIMITS, key
            assert "faults of its virtual processors were not tried: /dev/kvm: ENOENT: load it" in judgement.reasons
        else:
            assert judgement.verdict is Verdict.YES, key


def test_virtual_processor_hangs(found: Report) -> None:
    """A monitor whose virtual processors hang in faults that threads have served cannot work."""
    hanging = failing(capable(found.findings), "anon", VCPU, Outcome(Answer.HANGS))
    judged = verdicts(hanging)
    for key in ("qemu-postcopy", "firecracker-restore", "cloud-hypervisor-restore"):
        assert (judged[key].verdict, judged[key].reasons) == (Verdict.NO, ("vCPU's faults on anon: hangs",))
    assert judged["criu-lazy-pages"].verdict is Verdict.YES
