# SPDX-License-Identifier: GPL-2.0-only
"""The probe tells what the kernel and this process can do, and why not; it never fails and changes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import struct
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uffd_selftests import kernel, machine
from uffd_selftests.kernel import REQUIREMENTS, Facts, missing_features, no_userfaultfd, open_debugfs, probe
from uffd_selftests.machine import Sysctl
from uffd_selftests.uapi import NR_USERFAULTFD, Feature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives up privileges that it must have first: run as root")

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_REC_PRIVATE = 1 << 14 | 1 << 18
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_THP_DISABLE = 38, 22, 41
SECCOMP_MODE_FILTER, SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW = 2, 0x50000, 0x7FFF0000

libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def facts() -> Facts:
    """Return what this process sees."""
    return probe()


# ---- processes that may do less ------------------------------------------------------------------------------------


def check(result: int) -> None:
    """Raise OSError for a C function that returned -1."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def as_nobody() -> None:
    """Become an ordinary user."""
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


def without_thp() -> None:
    """Switch transparent huge pages off for this process."""
    check(libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0))


def in_user_namespace() -> None:
    """Become root of a user namespace, as in a rootless container."""
    check(libc.unshare(CLONE_NEWUSER))


def with_debugfs_mounted() -> None:
    """Mount debugfs at its usual place, in a mount namespace of this process."""
    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(None, b"/", None, MS_REC_PRIVATE, None))
    check(libc.mount(b"debugfs", bytes(kernel.DEBUGFS), b"debugfs", 0, None))


def with_seccomp(error: int) -> Callable[[], None]:
    """Return a function that installs a filter which answers userfaultfd(2) with an errno, as containers do."""

    def install() -> None:
        program = b"".join(
            struct.pack("=HBBI", *instruction)
            for instruction in (
                (0x20, 0, 0, 0),  # load the system call's number
                (0x15, 0, 1, NR_USERFAULTFD),
                (0x06, 0, 0, SECCOMP_RET_ERRNO | error),
                (0x06, 0, 0, SECCOMP_RET_ALLOW),
            )
        )
        code = ctypes.create_string_buffer(program, len(program))
        filter_program = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
        check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_program, 0, 0))

    return install


@contextlib.contextmanager
def unprivileged_userfaultfd(value: int) -> Iterator[None]:
    """Set vm.unprivileged_userfaultfd; skips where that is not possible."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(Sysctl("/proc/sys/vm/unprivileged_userfaultfd", value))
        except OSError as error:
            pytest.skip(str(error))
        yield


def probe_after(*preparations: Callable[[], None]) -> Facts:
    """Return what a process finds that was prepared with these functions; skips when they are not possible here."""
    answer, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for prepare in preparations:
                try:
                    prepare()
                except OSError as error:
                    os.write(tell, json.dumps({"impossible": f"{prepare.__name__}: {error}"}).encode())
                    os._exit(0)
            os.write(tell, json.dumps(probe().to_dict()).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(tell)
    with open(answer) as pipe:
        plain = json.loads(pipe.read())
    os.waitpid(child, 0)
    if "impossible" in plain:
        pytest.skip(plain["impossible"])
    return Facts.from_dict(plain)


# ---- the probe -----------------------------------------------------------------------------------------------------


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


def test_bare_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without device, huge pages, THP, pagemap and log there are reasons instead of exceptions."""
    for module, name in (
        (kernel, "DEVICE"),
        (kernel, "THP"),
        (kernel, "PAGEMAP"),
        (kernel, "KMSG"),
        (kernel, "MEMINFO"),
        (machine, "HUGEPAGES"),
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


# ---- reasons -------------------------------------------------------------------------------------------------------


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
        ({"swap_total": 0}, "swap", "no swap space: swapon a file or a zram device"),
        (
            {"pmd_size": 1 << 21, "thp": {"enabled": "never"}},
            "thp",
            "transparent huge pages are off: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        ({"pmd_size": 1 << 21, "thp": {"enabled": "always"}, "thp_disabled": False}, "thp", None),
        (
            {"unprivileged_userfaultfd": None, "seccomp": 0}
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


# ---- debugfs -------------------------------------------------------------------------------------------------------


def list_debugfs() -> list[str]:
    """Return the names in debugfs' root."""
    fd = open_debugfs(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


@needs_root
@pytest.mark.skipif("\tdebugfs\n" not in Path("/proc/filesystems").read_text(), reason="needs CONFIG_DEBUG_FS")
def test_debugfs_where_it_is_not_mounted() -> None:
    """Its files are reached without a mount that anybody could see; what is not there is ENOENT."""
    mounts = Path("/proc/self/mountinfo").read_text()
    assert list_debugfs()
    with pytest.raises(FileNotFoundError):
        open_debugfs("no such file", os.O_RDONLY)
    assert Path("/proc/self/mountinfo").read_text() == mounts


@needs_root
def test_gup_test_reason_does_not_depend_on_the_mount(facts: Facts) -> None:
    """Mounted or not, the same answer; the ordinary user is told to be root."""
    assert probe_after(with_debugfs_mounted).gup_test == facts.gup_test
    assert facts.gup_test in (None, "CONFIG_GUP_TEST: /sys/kernel/debug/gup_test: ENOENT")
    assert str(probe_after(as_nobody).gup_test).endswith(": run as root")
    assert str(probe_after(with_debugfs_mounted, as_nobody).gup_test) == (
        "/sys/kernel/debug/gup_test: EACCES: run as root"
    )
