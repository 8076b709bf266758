# SPDX-License-Identifier: GPL-2.0-only
"""What the kernel logs and loses while a case runs decides about the case."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.harness.helpers import FakePool
from tests.helpers import FACTS, needs_userfaultfd
from uffd_selftests.harness import health, jobs, proc
from uffd_selftests.harness.health import KernelHealth, KernelLog, Patterns
from uffd_selftests.machine.facts import KMSG
from uffd_selftests.machine.hugepages import HugepageCounts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.harness.helpers import Run

pytest_plugins = ["pytester"]


# ---- patterns -------------------------------------------------------------------------------------------------------

COMPLAINTS = [
    "WARNING: CPU: 1 PID: 321 at mm/memory.c:1234 zap_pte_range+0x1/0x2",
    "WARNING: mm/memory.c:1234 at zap_pte_range+0x1/0x2, CPU#1: python3/321",
    "WARNING: possible circular locking dependency detected",
    "WARNING: possible recursive locking detected",
    "WARNING: suspicious RCU usage",
    "BUG: KASAN: slab-use-after-free in userfaultfd_release_all+0x1/0x2",
    "BUG: Bad page state in process python3  pfn:12345",
    "BUG: Bad page map in process python3  pte:800000 pmd:100067",
    "BUG: Bad rss-counter state mm:00000000 type:MM_ANONPAGES val:1",
    "BUG: non-zero pgtables_bytes on freeing mm: 4096",
    "BUG: sleeping function called from invalid context at mm/userfaultfd.c:1",
    "BUG: kernel NULL pointer dereference, address: 0000000000000008",
    "watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [python3:321]",
    "kernel BUG at mm/huge_memory.c:2345!",
    "Oops: general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1] PREEMPT SMP",
    "Unable to handle kernel paging request at virtual address ffff000000000000",
    "Internal error: Oops: 0000000096000004 [#1] SMP",
    "UBSAN: shift-out-of-bounds in mm/userfaultfd.c:1:2",
    "mm/pgtable-generic.c:50: bad pmd 0000000012345678(8000000012300067)",
    "page dumped because: VM_BUG_ON_FOLIO(folio_test_locked(folio))",
    "refcount_t: underflow; use-after-free.",
    "INFO: task python3:321 blocked for more than 120 seconds.",
    "INFO: rcu_preempt detected stalls on CPUs/tasks:",
    "INFO: rcu_preempt self-detected stall on CPU",
    "hugetlb: Huge Page Reserved count may go negative.",
    "Kernel panic - not syncing: Fatal exception",
]

HARMLESS = [
    "python3[321]: segfault at 0 ip 00007f0000000000 sp 00007ffc00000000 error 4 in libc.so.6[7f0000000000+155000]",
    "traps: python3[321] general protection fault ip:7f0000000000 sp:7ffc00000000 error:0 in libc.so.6[7f000+155000]",
    "MCE: Killing python3:321 due to hardware memory corruption fault at 7f0000000000",
    "Out of memory: Killed process 321 (python3) total-vm:1kB, anon-rss:1kB, file-rss:1kB, shmem-rss:0kB, UID:0",
    "python3 (321): drop_caches: 3",
    "debugfs: Directory 'x' with parent 'y' already present!",
    "HugeTLB: registered 2.00 MiB page size, pre-allocated 0 pages",
    "perf: interrupt took too long (2501 > 2500), lowering kernel.perf_event_max_sample_rate to 79750",
    "WARNING: Spectre v2 mitigation leaves CPU vulnerable to RETBleed attacks, data leaks possible!",
    "this is no WARNING: it only talks about one",
]


@pytest.mark.parametrize("text", COMPLAINTS)
def test_complaint(text: str) -> None:
    """What the kernel says about its own defects counts."""
    assert Patterns.load().complains(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless(text: str) -> None:
    """What it says about processes and the machine does not."""
    assert not Patterns.load().complains(text)


@pytest.mark.parametrize("text", ["", "[harmless]\n.\n", "[complaint]\n# nothing\n"])
def test_no_patterns(text: str) -> None:
    """Without patterns every log would look clean, so that is refused."""
    with pytest.raises(ValueError, match="no patterns"):
        Patterns(text)


# ---- the log --------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[KernelHealth, socket.socket]]:
    """Give a watcher a log that the test writes: a datagram socket, which like /dev/kmsg gives a record a read."""
    kernel, watcher = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    watcher.setblocking(False)
    monkeypatch.setattr(KernelHealth, "taints", lambda _: "")
    health = KernelHealth()
    health.close()
    health._log._fd = watcher.detach()
    yield health, kernel
    health.close()
    kernel.close()


def test_records(log: tuple[KernelHealth, socket.socket]) -> None:
    """From the first complaint on, the new records are shown; each is told once, and all are kept."""
    health, kernel = log
    assert health.complaints() == []
    kernel.send(b"6,100,1500000,-;loop0: detected capacity change\n")
    assert health.complaints() == []
    kernel.send(b"6,101,2000000,-;ordinary\n")
    kernel.send(b"4,102,2000001,-;WARNING: CPU: 0 PID: 1 at mm/memory.c:1 f+0x1/0x2\n SUBSYSTEM=x\n DEVICE=y\n")
    kernel.send(b"4,103,2000002,-;Call Trace:\n")
    assert health.complaints() == [
        "kernel log: [    2.000001] WARNING: CPU: 0 PID: 1 at mm/memory.c:1 f+0x1/0x2",
        "kernel log: [    2.000002] Call Trace:",
    ]
    assert health.complaints() == []
    assert [record.partition("] ")[2].split()[0] for record in health.records] == [
        "loop0:",
        "ordinary",
        "WARNING:",
        "Call",
    ]


def test_taint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new taint flag counts if it comes from a defect, and only once."""
    taints = iter(["O", "OE", "OEW", "OEW"])
    monkeypatch.setattr(KernelHealth, "taints", lambda _: next(taints))
    health = KernelHealth()
    monkeypatch.setattr(health._log, "read", list)
    assert health.complaints() == []
    assert health.complaints() == ["the kernel is tainted now: W"]
    assert health.complaints() == []
    health.close()


def test_unreadable_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A log that cannot be read is not a clean log: the reason is kept for the reports."""
    monkeypatch.setattr(health, "KMSG", str(tmp_path / "kmsg"))
    watcher = KernelHealth()
    assert watcher.unreadable.endswith("kmsg: ENOENT")
    assert watcher.complaints() == []


def test_running_kernel() -> None:
    """The real log can be read from its end without waiting, or says why not."""
    watcher = KernelHealth()
    assert bool(watcher.unreadable) != os.access(KMSG, os.R_OK)
    watcher.complaints()
    watcher.close()


# ---- in a run -------------------------------------------------------------------------------------------------------

COMPLAINT = "[    1.000000] BUG: Bad page state in process python3"
LOGGED = f"kernel log: {COMPLAINT}".replace("[", "[[]")  # as a pattern
LOGGING = """
    @uffd_case("first")
    def test_first():
        pass

    @uffd_case("guilty")
    def test_guilty():
        open("log", "w").close()

    @uffd_case("last")
    def test_last():
        pass
"""


@pytest.fixture
def fake_log(monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester) -> Path:
    """Let the kernel complain when a file appears: everybody who reads the log sees that once."""
    log = pytester.path / "log"
    told = set()

    def read(reader: KernelLog) -> list[str]:
        if not log.exists() or reader in told:
            return []
        told.add(reader)
        return [COMPLAINT, "[    1.000001] Call Trace:"]

    monkeypatch.setattr(KernelLog, "read", read)
    return log


@needs_userfaultfd
@pytest.mark.usefixtures("fake_log")
def test_kernel_complaint_fails_the_case(run: Run) -> None:
    """Serially, the case in which the kernel complained fails, and no other."""
    result = run(LOGGING, "-v")
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*::test_guilty ERROR*", f"the kernel complained: {LOGGED}"])


@needs_userfaultfd
@pytest.mark.usefixtures("fake_log")
def test_kernel_complaint_in_a_shared_process(run: Run) -> None:
    """A complaint at the end of a process may be the doing of all the results that it ran; the next one is new."""
    text = """
    @uffd_case("case", variants=("a", "b", "c"))
    def test_case(variant):
        if variant == "b":
            open("log", "w").close()
    """
    result = run(text, "-v")
    result.assert_outcomes(passed=3, errors=1)
    told = "the same process had run case (a); from now on each case has its own"
    result.stdout.fnmatch_lines(["*::test_case[[]b] ERROR*", told])


@needs_userfaultfd
@pytest.mark.usefixtures("fake_log")
def test_kernel_complaint_fails_the_run(run: Run) -> None:
    """With workers nobody can say which case it was: the run fails."""
    result = run(LOGGING, "-n2")
    result.assert_outcomes(passed=3)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*kernel-log*", LOGGED])


@needs_userfaultfd
@pytest.mark.usefixtures("fake_log")
def test_kernel_complaint_in_ktap(run: Run, pytester: pytest.Pytester) -> None:
    """In KTAP such a run has one result more."""
    run(LOGGING, "-n2", f"--report-dir={pytester.path}")
    lines = (pytester.path / "results.tap").read_text().splitlines()
    assert lines[1] == "1..3"
    assert lines[-4:] == [
        f"# kernel log: {COMPLAINT}",
        "# kernel log: [    1.000001] Call Trace:",
        "not ok 4 kernel-log",
        "# Totals: pass:3 fail:1 xfail:0 xpass:0 skip:0 error:0",
    ]
    assert "Bad page" in (pytester.path / "dmesg.txt").read_text()


@needs_userfaultfd
@pytest.mark.skipif(not FACTS.hugepage_size, reason="the kernel has no huge pages")
@pytest.mark.parametrize(("users", "outcome"), [([], "error"), ([1], "pass")])
def test_lost_hugepages(run: Run, monkeypatch: pytest.MonkeyPatch, users: list[int], outcome: str) -> None:
    """Huge pages that nobody has and that do not come back fail the case; those that somebody has do not."""
    used = iter([3, *[5] * 1000])  # of each launcher: first, and later
    monkeypatch.setattr(health, "hugepages", lambda _: HugepageCounts(10, 10 - next(used), 0, 0))
    monkeypatch.setattr(health, "PAGES_BACK_SECONDS", 0.05)
    monkeypatch.setattr(proc, "hugetlb_users", lambda: users)
    monkeypatch.setattr(jobs, "HugepagePool", FakePool)
    monkeypatch.setattr(jobs, "lack_of_hugepages", lambda *_: None)
    result = run("""
    @uffd_case("takes", spare_hugepages=1)
    def test_takes():
        pass

    @uffd_case("bystands")
    def test_bystands():
        pass
    """)
    result.assert_outcomes(passed=2, errors=1 if outcome == "error" else 0)
    if outcome == "error":
        result.stdout.fnmatch_lines(["left behind: 2 huge pages not given back"])
