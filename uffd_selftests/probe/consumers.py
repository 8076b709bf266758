# SPDX-License-Identifier: GPL-2.0-only
"""Who uses userfaultfd, what each asks the kernel for, and whether it gets that here.

The needs are those of the projects' own sources; ``source`` names the place. A need is a function of what was found: it
returns None, or the reason why it is not met, with the remedy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from uffd_selftests.abi.uapi import Feature
from uffd_selftests.machine.hugepages import lack_of_hugepages
from uffd_selftests.machine.hugetlb_cgroup import hugetlb_limit
from uffd_selftests.machine.requirements import missing_features, no_userfaultfd
from uffd_selftests.probe.access import doors
from uffd_selftests.probe.findings import Answer, Findings
from uffd_selftests.probe.trials import VCPU

Need = Callable[[Findings], str | None]


class Verdict(Enum):
    """Whether a program can do its work here."""

    YES = "yes"
    LIMITS = "yes, with limits"
    NO = "no"


@dataclass(frozen=True)
class Consumer:
    """A program, or one thing that it does."""

    key: str
    name: str
    source: str
    """Where it says what it needs."""
    needs: tuple[Need, ...]
    """Without one of these it does not work; the first that is not met is the reason."""
    wishes: tuple[tuple[str, Need], ...] = ()
    """What it can do without: each with the words for what is lost."""

    def judge(self, findings: Findings) -> Judgement:
        """Return the verdict with its reasons."""
        for need in self.needs:
            if reason := need(findings):
                return Judgement(self, Verdict.NO, (reason,))
        lost = tuple(f"{what}: {reason}" for what, wish in self.wishes if (reason := wish(findings)))
        return Judgement(self, Verdict.LIMITS if lost else Verdict.YES, lost)


@dataclass(frozen=True)
class Judgement:
    """A verdict, and why it is no plain yes."""

    consumer: Consumer
    verdict: Verdict
    reasons: tuple[str, ...]


def judge(findings: Findings) -> list[Judgement]:
    """Return the verdict for every program."""
    return [consumer.judge(findings) for consumer in CONSUMERS]


# ---- needs ---------------------------------------------------------------------------------------------------------


def door(*names: str) -> Need:
    """One of these ways to a userfaultfd is open."""

    def need(findings: Findings) -> str | None:
        ways = [way for way in doors(findings.facts) if way.name in names]
        if any(way.refused is None for way in ways):
            return None
        return "; ".join(dict.fromkeys(way.reason or f"{way.title}: {way.refused}" for way in ways))

    return need


def feature(*features: Feature) -> Need:
    """UFFDIO_API enables these."""

    def need(findings: Findings) -> str | None:
        reasons = [reason for bit in features for reason in missing_features(findings.facts, bit)]
        return "; ".join(dict.fromkeys(reasons)) or None

    return need


def allowed(bit: Feature) -> Need:
    """UFFDIO_API does not refuse a feature that it offers."""

    def need(findings: Findings) -> str | None:
        return feature(bit)(findings) if bit & findings.facts.features else None

    return need


def works(memory: str, *trials: str) -> Need:
    """These trials succeed on a memory type."""

    def need(findings: Findings) -> str | None:
        column = next((each for each in findings.columns if each.name == memory), None)
        if column is None:
            return no_userfaultfd(findings.facts) or f"no {memory} memory: boot a kernel with CONFIG_HUGETLBFS"
        for trial in trials:
            outcome = column.outcomes[trial]
            if outcome.answer is Answer.UNTESTED:
                return column.note or outcome.detail
            if not outcome.works:
                return f"{trial} on {memory}: {outcome.errno or outcome.answer.value}"
        return None

    return need


def vcpu(memory: str) -> Need:
    """A virtual processor's fault is served, where there is KVM to try one."""

    def need(findings: Findings) -> str | None:
        return None if _untried(findings, memory) else works(memory, VCPU)(findings)

    return need


def vcpu_tried(memory: str) -> Need:
    """A virtual processor was tried."""

    def need(findings: Findings) -> str | None:
        return _untried(findings, memory)

    return need


def _untried(findings: Findings, memory: str) -> str | None:
    """Return why there is no answer, for lack of KVM; huge pages that are not there are another matter."""
    reason = (findings.facts.kvm or {}).get("reason")
    column = next((each for each in findings.columns if each.name == memory), None)
    return reason if column and column.outcomes[VCPU].answer is Answer.UNTESTED else None


def events(*names: str) -> Need:
    """These features of the handle work."""

    def need(findings: Findings) -> str | None:
        broken = [name for name in names if not findings.handle[name].works]
        return ", ".join(f"{name}: {findings.handle[name].detail}" for name in broken) or None

    return need


def answers(key: str, answer: str) -> Need:
    """The question has this answer."""

    def need(findings: Findings) -> str | None:
        outcome = findings.behaviour.get(key)
        said = outcome.detail or outcome.errno if outcome else "not asked"
        return None if said == answer else f"{key}: {said}"

    return need


def pagemap_scan(findings: Findings) -> str | None:
    """PAGEMAP_SCAN is there."""
    return findings.facts.pagemap_scan


def mremap_dontunmap(findings: Findings) -> str | None:
    """mremap(2) can leave shared memory mapped where it was."""
    refused = findings.dontunmap
    return f"mremap(2) with MREMAP_DONTUNMAP of shared memory: {refused} (Linux 5.13)" if refused else None


def free_hugepages(findings: Findings) -> str | None:
    """There are huge pages of the default size that nobody uses."""
    size = findings.facts.hugepage_size
    if size and findings.pools[size].available > 0:
        limit = hugetlb_limit(size)
        return f"the cgroup allows no more huge pages: raise {limit.file}" if limit and not limit.pages else None
    return lack_of_hugepages(size, 1) if size else "no huge pages: boot a kernel with CONFIG_HUGETLBFS"


# ---- who ------------------------------------------------------------------------------------------------------------

KERNEL_FAULTS = (door("device", "syscall"), works("anon", "kernel faults"))
"""A guest's memory is touched by KVM, by vhost and in system calls, so the kernel's own faults must be reported."""

UNSEEN = "faults of its virtual processors were not tried"

ASYNC = feature(Feature.WP_ASYNC, Feature.WP_UNPOPULATED)

CONSUMERS = (
    Consumer(
        "qemu-postcopy",
        "QEMU post-copy migration",
        "qemu: migration/postcopy-ram.c (postcopy_ram_supported_by_host), util/userfaultfd.c (uffd_open)",
        (*KERNEL_FAULTS, works("anon", "COPY", "ZEROPAGE", "WAKE"), vcpu("anon")),
        (("no blocktime statistics", feature(Feature.THREAD_ID)), (UNSEEN, vcpu_tried("anon"))),
    ),
    Consumer(
        "qemu-postcopy-shared",
        "QEMU post-copy, shared memory",
        "qemu: migration/postcopy-ram.c (ram_block_enable_notify)",
        (
            *KERNEL_FAULTS,
            feature(Feature.MISSING_SHMEM),
            works("shmem", "COPY", "WAKE", "kernel faults"),
            vcpu("shmem"),
        ),
        ((UNSEEN, vcpu_tried("shmem")),),
    ),
    Consumer(
        "qemu-postcopy-hugepages",
        "QEMU post-copy, huge pages",
        "qemu: migration/postcopy-ram.c (ufd_check_and_apply asks for MISSING_HUGETLBFS)",
        (
            *KERNEL_FAULTS,
            feature(Feature.MISSING_HUGETLBFS),
            works("hugetlb", "COPY", "WAKE", "kernel faults"),
            vcpu("hugetlb"),
        ),
        (("no memory for it now", free_hugepages), (UNSEEN, vcpu_tried("hugetlb"))),
    ),
    Consumer(
        "qemu-background-snapshot",
        "QEMU background snapshot",
        "qemu: migration/ram.c (ram_write_tracking_available, ram_write_tracking_compatible)",
        (*KERNEL_FAULTS, feature(Feature.PAGEFAULT_FLAG_WP), works("anon", "WRITEPROTECT"), vcpu("anon")),
        (
            (UNSEEN, vcpu_tried("anon")),
            ("not with shared memory", feature(Feature.WP_HUGETLBFS_SHMEM)),
            ("not with shared memory", works("shmem", "WRITEPROTECT")),
            ("not with huge pages", works("hugetlb", "WRITEPROTECT")),
        ),
    ),
    Consumer(
        "firecracker-restore",
        "Firecracker snapshot restore",
        "firecracker: src/vmm/src/persist.rs (guest_memory_from_uffd requires EVENT_REMOVE, user_mode_only(false))",
        (*KERNEL_FAULTS, feature(Feature.EVENT_REMOVE), works("anon", "COPY"), events("EVENT_REMOVE"), vcpu("anon")),
        (
            (UNSEEN, vcpu_tried("anon")),
            ("a ballooned page cannot be given back as zeroes", works("anon", "ZEROPAGE")),
            ("not with huge pages", feature(Feature.MISSING_HUGETLBFS)),
            ("not with huge pages", works("hugetlb-private", "COPY", "kernel faults")),
            ("not with huge pages", vcpu("hugetlb-private")),
        ),
    ),
    Consumer(
        "cloud-hypervisor-restore",
        "Cloud Hypervisor on-demand restore",
        "cloud-hypervisor: vmm/src/memory_manager.rs, vmm/src/userfaultfd.rs; pull requests 7800, 8165, 8694",
        (*KERNEL_FAULTS, works("anon", "COPY", "WAKE"), vcpu("anon")),
        (
            (UNSEEN, vcpu_tried("anon")),
            ("not with shared memory", works("shmem", "COPY")),
            ("no memory source over a socket", feature(Feature.MINOR_SHMEM)),
            ("no memory source over a socket", works("shmem", "CONTINUE")),
            ("not with huge pages", feature(Feature.MISSING_HUGETLBFS)),
        ),
    ),
    Consumer(
        "criu-lazy-pages",
        "CRIU lazy-pages",
        "criu: criu/uffd.c (uffd_open uses userfaultfd(2) alone; setup_uffd asks for all events that are offered)",
        (door("syscall"), allowed(Feature.EVENT_FORK), works("anon", "COPY", "ZEROPAGE", "kernel faults")),
        tuple(
            (f"restored processes must not {verb}", feature(bit))
            for verb, bit in (
                ("fork", Feature.EVENT_FORK),
                ("mremap", Feature.EVENT_REMAP),
                ("munmap", Feature.EVENT_UNMAP),
                ("drop memory (madvise)", Feature.EVENT_REMOVE),
            )
        ),
    ),
    Consumer(
        "async-dirty-tracking",
        "Async dirty tracking (Wine, others)",
        "wine: dlls/ntdll/unix/virtual.c (kernel_writewatch_init)",
        (door("syscall-user-mode-only"), ASYNC, pagemap_scan, works("anon", "WP_ASYNC")),
        (
            ("not of shared memory", works("shmem", "WP_ASYNC")),
            ("not of huge pages", works("hugetlb", "WP_ASYNC")),
        ),
    ),
    Consumer(
        "gvisor-dirty-tracking",
        "gVisor incremental checkpoints",
        "gvisor: pkg/sentry/hostmm (NewWPAsyncUserfaultfd), --dirty-tracking=uffd",
        (door("syscall-user-mode-only"), ASYNC, pagemap_scan, works("shmem", "WP_ASYNC")),
    ),
    Consumer(
        "android-art",
        "Android ART garbage collector",
        "art: runtime/gc/collector/mark_compact.cc (KernelSupportsUffd, kUffdFeaturesForSigbus)",
        (
            door("syscall-user-mode-only", "syscall"),
            feature(Feature.SIGBUS),
            mremap_dontunmap,
            works("anon", "COPY", "ZEROPAGE", "SIGBUS"),
        ),
        (
            ("releases that ask for minor faults, too", feature(Feature.MISSING_SHMEM, Feature.MINOR_SHMEM)),
            ("no compaction by UFFDIO_MOVE", works("anon", "MOVE")),
        ),
    ),
    Consumer(
        "working-set-tracking",
        "Working-set tracking (RWP)",
        "kernel: Documentation/admin-guide/mm/userfaultfd.rst (Read-Write Protection), pagemap.rst (PAGE_IS_ACCESSED)",
        (
            door("syscall-user-mode-only", "syscall"),
            feature(Feature.RWP, Feature.RWP_ASYNC),
            pagemap_scan,
            works("anon", "RWPROTECT"),
            answers("scan-accessed", "tells it"),
        ),
        (
            ("not of shared memory", works("shmem", "RWPROTECT")),
            ("not of huge pages", works("hugetlb", "RWPROTECT")),
        ),
    ),
)
